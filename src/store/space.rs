//! What packed layers take on disk, and for whom.
//!
//! Who has layers is a matter of others: they are holders here, known by their numbers. What several holders have is
//! divided evenly among them, so that the shares of all, what nobody has, and what belongs to the store itself
//! add up to what lies on the disk. Blocks are counted, as du(1) counts them; an object in a pack has the part of the pack's
//! blocks that it has of its bytes.

use std::collections::{BTreeSet, HashMap};
use std::fs::{self, Metadata};
use std::io;
use std::os::unix::fs::MetadataExt;
use std::path::Path;

use super::error::{Error, Result, io_error};
use super::format::{LayerName, ObjectName};
use super::layer::index::LayerIndex;
use super::layers::Layers;
use super::object::{Place, is_dir_of_files, object_in};
use super::usage::{own_bytes, tree_bytes};
use super::{pack, view};

/// Somebody who has layers.
#[derive(Clone, Debug, Default)]
pub struct Holder {
    /// Layers that it has.
    pub has: Vec<LayerName>,
    /// Layers that cannot go as long as it is there: those, and what they lie on.
    pub needs: Vec<LayerName>,
}

/// What is on disk for one holder.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Share {
    /// Bytes that only this holder needs.
    pub unique: u64,
    /// Its part of all bytes.
    pub on_disk: u64,
}

/// Bytes, divided among holders.
#[derive(Clone, Debug)]
pub struct Shares {
    of: Vec<Share>,
    unclaimed: u64,
}

impl Shares {
    /// Nothing yet, for so many holders.
    pub fn new(holders: usize) -> Self {
        Self {
            of: vec![Share::default(); holders],
            unclaimed: 0,
        }
    }

    /// Adds bytes that the holders `has` have and `needs` need.
    pub fn add(&mut self, bytes: u64, has: &[u32], needs: &[u32]) {
        if has.is_empty() {
            self.unclaimed += bytes;
        }
        let number = has.len().max(1) as u64;
        for (at, holder) in (0..).zip(has) {
            if let Some(share) = self.of.get_mut(*holder as usize) {
                share.on_disk += bytes / number + u64::from(at < bytes % number);
                if needs == [*holder] {
                    share.unique += bytes;
                }
            }
        }
    }

    /// Adds bytes that nobody has.
    pub fn add_unclaimed(&mut self, bytes: u64) {
        self.unclaimed += bytes;
    }

    /// The share of each holder.
    pub fn of(&self) -> &[Share] {
        &self.of
    }

    /// Bytes that nobody has: they await collection, or are on their way in.
    pub fn unclaimed(&self) -> u64 {
        self.unclaimed
    }
}

/// What keeps shares from being known.
#[derive(Debug)]
pub struct Hidden {
    /// The layer whose index cannot be read; `None`: it is a pack.
    pub layer: Option<LayerName>,
    /// Why nobody can tell what it has.
    pub error: Error,
}

/// What belongs to the store itself.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Overhead {
    /// Merged views.
    pub views: u64,
    /// Headers and tables of packs.
    pub packs: u64,
    /// Records and directories.
    pub records: u64,
    /// What others than plyd have put where packs and objects lie.
    pub foreign: u64,
}

/// Sets of holders by numbers, so that an object costs no more than two of these.
#[derive(Default)]
struct Sets {
    list: Vec<Vec<u32>>,
    known: HashMap<Vec<u32>, usize>,
    unions: HashMap<(usize, usize), usize>,
}

impl Sets {
    fn number(&mut self, set: Vec<u32>) -> usize {
        if let Some(number) = self.known.get(&set) {
            return *number;
        }
        let number = self.list.len();
        self.known.insert(set.clone(), number);
        self.list.push(set);
        number
    }

    fn union(&mut self, a: usize, b: usize) -> usize {
        let key = (a.min(b), a.max(b));
        if a == b {
            return a;
        }
        if let Some(number) = self.unions.get(&key) {
            return *number;
        }
        let mut both = [self.get(a), self.get(b)].concat();
        both.sort_unstable();
        both.dedup();
        let number = self.number(both);
        self.unions.insert(key, number);
        number
    }

    fn get(&self, number: usize) -> &[u32] {
        self.list.get(number).map_or(&[], Vec::as_slice)
    }
}

/// Numbers of the sets of holders that have something and that need it.
type Claim = (usize, usize);

struct Claims {
    sets: Sets,
    layers: HashMap<LayerName, Claim>,
    objects: HashMap<ObjectName, Claim>,
}

impl Claims {
    fn new(holders: &[Holder]) -> Self {
        let mut by_layer: HashMap<LayerName, (Vec<u32>, Vec<u32>)> = HashMap::new();
        for (number, holder) in (0..).zip(holders) {
            for layer in &holder.has {
                by_layer.entry(*layer).or_default().0.push(number);
            }
            for layer in &holder.needs {
                by_layer.entry(*layer).or_default().1.push(number);
            }
        }
        let mut sets = Sets::default();
        let mut number = |mut set: Vec<u32>| {
            set.dedup();
            sets.number(set)
        };
        let layers = by_layer
            .into_iter()
            .map(|(layer, (has, needs))| (layer, (number(has), number(needs))))
            .collect();
        Self {
            sets,
            layers,
            objects: HashMap::new(),
        }
    }

    fn add_objects(&mut self, layer: LayerName, index: &LayerIndex) -> Result<()> {
        let Some(of_layer) = self.layers.get(&layer).copied() else {
            return Ok(());
        };
        for number in 0..index.object_count() {
            let object = index.object(number)?;
            let claim = match self.objects.get(&object.name) {
                None => of_layer,
                Some((has, needs)) => (
                    self.sets.union(*has, of_layer.0),
                    self.sets.union(*needs, of_layer.1),
                ),
            };
            self.objects.insert(object.name, claim);
        }
        Ok(())
    }

    fn give(&self, claim: Option<&Claim>, bytes: u64, shares: &mut Shares) {
        match claim {
            Some((has, needs)) => shares.add(bytes, self.sets.get(*has), self.sets.get(*needs)),
            None => shares.add_unclaimed(bytes),
        }
    }
}

impl Layers {
    /// Divides what the store takes on disk among `holders`, whose numbers are those of `shares`. Imports and collections go
    /// on meanwhile; what they change may be counted or not. Answers also what cannot be read: as soon as that is something, no
    /// share of who has layers can be relied on, nor what nobody has, for each content may be that layer's, too.
    pub fn space(
        &self,
        holders: &[Holder],
        shares: &mut Shares,
    ) -> Result<(Overhead, Vec<Hidden>)> {
        let mut claims = Claims::new(holders);
        let mut hidden = Vec::new();
        let layers: BTreeSet<LayerName> = claims.layers.keys().copied().collect();
        for layer in layers {
            let added = LayerIndex::open(&self.index_path(layer), layer)
                .and_then(|index| claims.add_objects(layer, &index));
            hidden.extend(added.err().map(|error| Hidden {
                layer: Some(layer),
                error,
            }));
        }
        let mut overhead = Overhead::default();
        self.add_packs(&claims, shares, &mut overhead, &mut hidden)?;
        self.add_files(&claims, shares, &mut overhead)?;
        self.add_layers(&claims, shares, &mut overhead)?;
        overhead.views += tree(&self.views())?;
        shares.add_unclaimed(contents(self.tmp())?);
        let records = self.dir().join("records");
        overhead.records += tree(&records)? + own(self.dir())? + own(self.tmp())?;
        Ok((overhead, hidden))
    }

    /// Bytes of all regular files of a chain of layers, the lowest first, each file once.
    pub fn logical(&self, chain: &[LayerName]) -> Result<u128> {
        // Also of layers whose records cannot be used.
        let indexes = chain
            .iter()
            .map(|name| LayerIndex::open(&self.index_path(*name), *name));
        view::logical(&indexes.collect::<Result<Vec<_>>>()?)
    }

    fn add_packs(
        &self,
        claims: &Claims,
        shares: &mut Shares,
        overhead: &mut Overhead,
        hidden: &mut Vec<Hidden>,
    ) -> Result<()> {
        let objects = self.objects();
        let (dir, files) = list(objects.packs())?;
        overhead.records += dir;
        for (name, metadata) in files {
            let blocks = allocated(&metadata);
            let path = objects.packs().join(&name);
            let Some(id) = pack::PackId::of_file(&name) else {
                overhead.foreign += tree(&path)?;
                continue;
            };
            let found = match pack::look_into(&path, id) {
                Ok(found) => found.objects,
                // Collected meanwhile.
                Err(error) if error.is_not_found() => continue,
                Err(error) => {
                    shares.add_unclaimed(blocks);
                    hidden.push(Hidden { layer: None, error });
                    continue;
                }
            };
            let mut rest = blocks;
            for (object, slot) in found {
                let part = u128::from(blocks) * u128::from(slot.bytes());
                let part = (part / u128::from(metadata.len().max(1))).min(rest.into()) as u64;
                rest -= part;
                let is_here = objects.find(&object.name)? == Some(Place::packed(id, slot));
                let claim = claims.objects.get(&object.name).filter(|_| is_here);
                claims.give(claim, part, shares);
            }
            overhead.packs += rest;
        }
        Ok(())
    }

    fn add_files(
        &self,
        claims: &Claims,
        shares: &mut Shares,
        overhead: &mut Overhead,
    ) -> Result<()> {
        let files = self.objects().files();
        let (dir, dirs) = list(files)?;
        overhead.records += dir;
        for (dir, metadata) in dirs {
            let path = files.join(&dir);
            if !is_dir_of_files(&dir, metadata.file_type()) {
                overhead.foreign += tree(&path)?;
                continue;
            }
            let (own, inside) = list(&path)?;
            overhead.records += own;
            for (name, metadata) in inside {
                match object_in(&dir, &name) {
                    Some(object) => {
                        let claim = claims.objects.get(&object);
                        claims.give(claim, allocated(&metadata), shares);
                    }
                    None => overhead.foreign += tree(&path.join(name))?,
                }
            }
        }
        Ok(())
    }

    /// Indexes and recipes.
    fn add_layers(
        &self,
        claims: &Claims,
        shares: &mut Shares,
        overhead: &mut Overhead,
    ) -> Result<()> {
        let (dir, files) = list(&self.dir().join("layers"))?;
        overhead.records += dir;
        for (name, metadata) in files {
            let layer = name.split('.').next().and_then(|name| name.parse().ok());
            let claim = layer.and_then(|layer: LayerName| claims.layers.get(&layer));
            claims.give(claim, allocated(&metadata), shares);
        }
        Ok(())
    }
}

/// Bytes that a directory takes itself, and what is in it. What vanishes meanwhile is left out.
fn list(dir: &Path) -> Result<(u64, Vec<(String, Metadata)>)> {
    let mut found = Vec::new();
    let entries = match fs::read_dir(dir) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok((0, found)),
        entries => entries.map_err(io_error("list", dir))?,
    };
    for entry in entries {
        let entry = entry.map_err(io_error("list", dir))?;
        let name = entry.file_name().to_string_lossy().into_owned();
        match entry.metadata() {
            Ok(metadata) => found.push((name, metadata)),
            Err(error) if error.kind() == io::ErrorKind::NotFound => {}
            Err(error) => return Err(io_error("look at", &entry.path())(error)),
        }
    }
    Ok((own(dir)?, found))
}

fn own(dir: &Path) -> Result<u64> {
    own_bytes(dir).map_err(io_error("look at", dir))
}

fn tree(dir: &Path) -> Result<u64> {
    tree_bytes(dir).map_err(io_error("add up", dir))
}

/// What is in a directory, without itself.
fn contents(dir: &Path) -> Result<u64> {
    Ok(tree(dir)?.saturating_sub(own(dir)?))
}

fn allocated(metadata: &Metadata) -> u64 {
    // `st_blocks` counts 512 bytes each, whatever the file system's blocks are.
    metadata.blocks() * 512
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::store::ingest::Settings;
    use crate::store::layers::Expected;

    /// A layer of files whose contents are their names, drawn out to that many KiB.
    fn import(layers: &Layers, files: &[(&str, usize)]) -> LayerName {
        let mut builder = tar::Builder::new(Vec::new());
        for (name, kib) in files {
            // Nothing that a compression makes small.
            let content: Vec<u8> = (0..32 * kib)
                .flat_map(|number| *blake3::hash(format!("{name} {number}").as_bytes()).as_bytes())
                .collect();
            let mut header = tar::Header::new_ustar();
            header.set_size(content.len() as u64);
            header.set_mode(0o644);
            builder.append_data(&mut header, name, &*content).unwrap();
        }
        let stream = builder.into_inner().unwrap();
        layers.import(&*stream, &Expected::default(), &()).unwrap()
    }

    fn open(dir: &Path) -> Layers {
        let settings = Settings {
            small: 64 << 10,
            ..Settings::default()
        };
        Layers::open(dir, settings).unwrap().0
    }

    fn space(layers: &Layers, holders: &[Holder]) -> (Shares, Overhead) {
        let mut shares = Shares::new(holders.len());
        let (overhead, hidden) = layers.space(holders, &mut shares).unwrap();
        assert!(hidden.is_empty(), "{hidden:?}");
        (shares, overhead)
    }

    fn holder(has: &[LayerName], needs: &[LayerName]) -> Holder {
        Holder {
            has: has.to_vec(),
            needs: needs.to_vec(),
        }
    }

    fn sum(shares: &Shares, overhead: Overhead) -> u64 {
        let of_holders: u64 = shares.of().iter().map(|share| share.on_disk).sum();
        let overhead = overhead.views + overhead.packs + overhead.records + overhead.foreign;
        of_holders + shares.unclaimed() + overhead
    }

    #[test]
    fn bytes_are_divided_without_a_rest() {
        let mut shares = Shares::new(3);
        shares.add(10, &[0, 1, 2], &[0, 1, 2]);
        shares.add(5, &[1], &[1, 2]);
        shares.add(7, &[2], &[2]);
        shares.add(1, &[], &[]);
        let share = |unique, on_disk| Share { unique, on_disk };
        assert_eq!(shares.of(), [share(0, 4), share(0, 8), share(7, 10)]);
        assert_eq!(shares.unclaimed(), 1);
    }

    #[test]
    fn all_shares_are_what_du_says_also_with_dead_objects() {
        let tmp = tempfile::tempdir().unwrap();
        let dir = tmp.path().join("store");
        let layers = open(&dir);
        let base = import(&layers, &[("base", 40), ("big base", 100), ("same", 30)]);
        let one = import(&layers, &[("one", 40), ("big one", 300), ("same", 30)]);
        // Most of its pack dies with it; `shared` does not.
        let other = import(
            &layers,
            &[("other", 10), ("shared", 20), ("big other", 200)],
        );
        let third = import(&layers, &[("shared", 20), ("third", 1)]);
        layers.view(&[base, one], view::Verify::First).unwrap();
        let holders = [
            holder(&[base, one], &[base, one]),
            holder(&[base], &[base]),
            holder(&[other], &[base, other]),
            holder(&[third], &[third]),
        ];
        let check = |holders: &[Holder]| {
            let (shares, overhead) = space(&layers, holders);
            assert_eq!(sum(&shares, overhead), tree_bytes(&dir).unwrap());
            (shares, overhead)
        };
        let (shares, overhead) = check(&holders);
        assert_eq!(shares.unclaimed(), 0);
        assert!(overhead.views > 0 && overhead.packs > 0);
        let unique: Vec<_> = shares.of().iter().map(|share| share.unique >> 10).collect();
        assert!((340..360).contains(&unique[0]), "{unique:?}");
        // Three need it.
        assert_eq!(unique[1], 0);
        assert!((210..225).contains(&unique[2]), "{unique:?}");
        // `shared` is needed by two.
        assert!((1..12).contains(&unique[3]), "{unique:?}");
        let of: Vec<_> = shares.of().iter().map(|share| share.on_disk).collect();
        assert!(
            shares
                .of()
                .iter()
                .all(|share| share.unique <= share.on_disk)
        );
        // Half of what two have is each one's.
        assert!(of[1] > 80 << 10 && of[1] < 96 << 10, "{of:?}");

        // A layer that went, before it is collected.
        layers.remove(other).unwrap();
        let rest = [holders[0].clone(), holders[1].clone(), holders[3].clone()];
        let (shares, _) = check(&rest);
        let unclaimed = shares.unclaimed() >> 10;
        assert!((208..230).contains(&unclaimed), "{unclaimed}");
        let collected = layers.collect(false, &());
        assert!(collected.errors.is_empty());
        let (shares, _) = check(&rest);
        assert!(shares.unclaimed() < 16 << 10, "{shares:?}");
        // What a store without holders has is nobody's.
        let (shares, overhead) = check(&[]);
        assert!(shares.unclaimed() > overhead.packs);
    }

    /// It was called uncollected, and a file among the directories of objects kept the store from being opened.
    #[test]
    fn what_others_have_put_there_is_told_apart() {
        let tmp = tempfile::tempdir().unwrap();
        let dir = tmp.path().join("store");
        let layers = open(&dir);
        let base = import(&layers, &[("base", 40), ("big base", 100)]);
        let object = layers.objects().foreign().unwrap();
        assert_eq!(object, (Vec::new(), Vec::new()));
        let own = fs::read_dir(dir.join("objects")).unwrap().next().unwrap();
        let own = own.unwrap().path();
        let other = match own.ends_with("00") {
            true => "11",
            false => "00",
        };
        let packs = [dir.join("packs/note"), dir.join("packs/0.pack")];
        let files = [
            dir.join("objects/note"),
            dir.join("objects/AB"),
            own.join("note"),
            // In the directory of another name it is not found.
            own.join(other.repeat(32)),
        ];
        for path in packs.iter().chain(&files) {
            fs::write(path, vec![7; 10_000]).unwrap();
        }
        let tree = dir.join("objects/tree");
        fs::create_dir(&tree).unwrap();
        fs::write(tree.join("file"), vec![7; 10_000]).unwrap();
        let (beside_packs, mut beside_files) = layers.objects().foreign().unwrap();
        assert_eq!(
            beside_packs.into_iter().collect::<BTreeSet<_>>(),
            packs.into()
        );
        beside_files.retain(|path| *path != tree);
        assert_eq!(
            beside_files.into_iter().collect::<BTreeSet<_>>(),
            files.into()
        );
        drop(layers);
        let layers = open(&dir);
        let holders = [holder(&[base], &[base])];
        let (shares, overhead) = space(&layers, &holders);
        assert_eq!(shares.unclaimed(), 0);
        assert!(overhead.foreign >= 7 * 10_000, "{overhead:?}");
        assert_eq!(sum(&shares, overhead), tree_bytes(&dir).unwrap());
        let collected = layers.collect(false, &());
        assert!(collected.errors.is_empty(), "{collected:?}");
        assert!(collected.orphans.is_empty(), "{collected:?}");
        assert_eq!(space(&layers, &holders).1, overhead);
    }

    #[test]
    fn a_tree_has_the_bytes_of_what_is_left_in_it() {
        let tmp = tempfile::tempdir().unwrap();
        let layers = open(tmp.path());
        let below = import(&layers, &[("a", 10), ("d/b", 20)]);
        let above = import(&layers, &[("a", 1), ("c", 3), (".wh.d", 0)]);
        assert_eq!(layers.logical(&[below]).unwrap(), 30 << 10);
        assert_eq!(layers.logical(&[below, above]).unwrap(), 4 << 10);
        assert_eq!(layers.logical(&[]).unwrap(), 0);
    }
}
