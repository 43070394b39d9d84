//! What images and snapshots take on disk.
//!
//! Image and snapshot each have what they were made of: an image the layers of its chain, a snapshot its own layer or what was
//! written to it. A snapshot that is a layer of an image is counted there. Nothing is locked: what changes
//! meanwhile may be counted or not.

use std::collections::{HashMap, HashSet};
use std::fs;
use std::path::{Path, PathBuf};

use super::Snapshotter;
use super::catalog::Found;
use super::chain::{self, Below, ancestors_among};
use super::diff::{OwnDirectory, OwnLayer, Sides, lookup, names_in};
use super::types::*;
use super::upper;
use crate::cow::{FileKind, NodeId, Union};
use crate::store::space::{Hidden, Holder, Overhead, Shares};
use crate::store::{self, layer::LayerId};

/// What an image or a snapshot takes. What damage hides is `None`.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Taken {
    /// Bytes of the files that its tree has, each file once; `u64::MAX` also for more.
    pub logical: Option<u64>,
    /// Bytes on disk that nothing else needs.
    pub unique: Option<u64>,
    /// Its part of the bytes on disk.
    pub on_disk: Option<u64>,
}

/// What lies below a root, as far as it belongs to snapshots.
#[derive(Clone, Debug)]
pub struct Space {
    /// In the order in which they were given.
    pub images: Vec<Taken>,
    /// Snapshots that are no layers of these images, in order of creation.
    pub snapshots: Vec<(SnapshotInfo, Taken)>,
    /// What the store of packed layers takes for itself.
    pub store: Overhead,
    /// Records and directories.
    pub records: u64,
    /// What nobody has: it awaits collection, or is on its way in. `None` if damage hides what that is.
    pub unclaimed: Option<u64>,
    /// What would be divided if damage did not hide whose it is.
    pub undivided: u64,
    /// What hides something, a sentence each.
    pub problems: Vec<String>,
}

impl Snapshotter {
    /// Divides what lies in [`places`](Self::space_is_of) among images, each given as the keys of its layers' snapshots,
    /// and snapshots. What several have is divided evenly.
    pub fn space(&self, images: &[Vec<String>]) -> Result<Space> {
        self.space_of(&self.catalog.all()?, images)
    }

    /// As `space`, where there were the snapshots `all`.
    fn space_of(&self, all: &[Found], images: &[Vec<String>]) -> Result<Space> {
        let by_id: HashMap<&str, &Found> =
            all.iter().map(|found| (found.id.as_str(), found)).collect();
        let by_chain: HashMap<&str, &Found> = all
            .iter()
            .filter(|found| found.record.owner == Owner::Image)
            .map(|found| (found.record.key.as_str(), found))
            .collect();
        let of_images: Vec<Vec<&Found>> = images
            .iter()
            .map(|keys| {
                let found = keys.iter().filter_map(|key| by_chain.get(key.as_str()));
                found.copied().collect()
            })
            .collect();
        let covered: HashSet<&str> = of_images
            .iter()
            .flatten()
            .map(|found| found.id.as_str())
            .collect();
        let others: Vec<&Found> = all
            .iter()
            .filter(|found| !covered.contains(found.id.as_str()))
            .collect();

        let mut held = Held::default();
        for has in &of_images {
            held.add(has, &by_id, all.len());
        }
        for found in &others {
            held.add(&[*found], &by_id, all.len());
        }
        let mut shares = Shares::new(held.holders.len());
        let packed = self.packed.layers();
        let (store, hidden) = packed.space(&held.holders, &mut shares)?;
        let records = self.add_trees(all, &held, &mut shares)?;
        let mut problems = self.problems(&hidden)?;
        let is_hidden = !problems.is_empty();

        let mut undivided = 0;
        // Of a snapshot that has no packed layer all that it has is its own.
        let mut taken = |number: usize, logical: Option<u64>, is_whole: bool| {
            let share = shares.of().get(number).copied().unwrap_or_default();
            let has_packed = held
                .holders
                .get(number)
                .is_some_and(|holder| !holder.has.is_empty());
            if is_hidden && (has_packed || !is_whole) {
                undivided += share.on_disk;
                return Taken {
                    logical,
                    ..Taken::default()
                };
            }
            Taken {
                logical,
                unique: Some(share.unique),
                on_disk: Some(share.on_disk),
            }
        };
        let mut of = Vec::with_capacity(images.len());
        for (number, (has, keys)) in of_images.iter().zip(images).enumerate() {
            let is_whole = has.len() == keys.len();
            let logical = match has.last() {
                Some(top) if is_whole => self.logical(top, &by_id, all.len(), &mut problems),
                _ => is_whole.then_some(0),
            };
            of.push(taken(number, logical, is_whole));
        }
        let mut snapshots = Vec::with_capacity(others.len());
        let mut unclaimed = shares.unclaimed();
        for (number, found) in (images.len()..).zip(&others) {
            let logical = self.logical(found, &by_id, all.len(), &mut problems);
            let taken = taken(number, logical, true);
            // A row of something removed meanwhile would be all `?`, and nothing would say why.
            if logical.is_none() && self.is_gone(found) {
                unclaimed += taken.on_disk.unwrap_or_default();
                continue;
            }
            let ancestors = ancestors_among(found, &by_id, all.len());
            let info = self.info((*found).clone(), &ancestors);
            snapshots.push((info, taken));
        }
        undivided += if is_hidden { unclaimed } else { 0 };
        Ok(Space {
            images: of,
            snapshots,
            store,
            records,
            unclaimed: (!is_hidden).then_some(unclaimed),
            undivided,
            problems,
        })
    }

    /// What keeps shares from being known, a sentence each.
    fn problems(&self, hidden: &[Hidden]) -> Result<Vec<String>> {
        let mut problems = Vec::new();
        for UnusableRecord { damaged, of, .. } in self.damaged_records()? {
            let of = of.map_or_else(
                || "a snapshot".to_owned(),
                |of| format!("the snapshot {}", of.key),
            );
            problems.push(format!(
                "which layers {of} has cannot be told: {}",
                damaged.fact()
            ));
        }
        let users = match hidden.is_empty() {
            true => HashMap::new(),
            false => self.users_of_layers()?,
        };
        for Hidden { layer, error } in hidden {
            match layer {
                // Removed meanwhile.
                Some(layer) if !users.contains_key(layer) => {}
                Some(layer) => problems.push(format!(
                    "which contents the layer {layer} has cannot be told: {}",
                    error.problem()
                )),
                None => problems.push(format!(
                    "what is in a pack cannot be told: {}",
                    error.problem()
                )),
            }
        }
        Ok(problems)
    }

    /// Names in the root of what [`space`](Self::space) divides.
    pub fn space_is_of() -> [&'static str; 4] {
        ["snapshots", "layers", "store", "trash"]
    }

    /// Adds what is not packed: uppers, layers that are directories, and what is on its way out. Answers what records
    /// take.
    fn add_trees(&self, all: &[Found], held: &Held<'_>, shares: &mut Shares) -> Result<u64> {
        let mut records = 0;
        let by_id: HashSet<&str> = all.iter().map(|found| found.id.as_str()).collect();
        let by_layer: HashMap<&LayerId, &str> = all
            .iter()
            .filter_map(|found| Some((found.record.layer.as_ref()?, found.id.as_str())))
            .collect();
        let layers = self.layers.dir();
        for (dir, is_data) in [(&*self.data, true), (layers, false)] {
            records += own(dir)?;
            for entry in fs::read_dir(dir).map_err(io_error("list", dir))? {
                let entry = entry.map_err(io_error("list", dir))?;
                let bytes = tree(&entry.path())?;
                let name = entry.file_name().to_string_lossy().into_owned();
                let id = match is_data {
                    true => by_id.get(&*name).copied(),
                    false => by_layer.get(&LayerId(name)).copied(),
                };
                match id {
                    Some(id) => shares.add(bytes, held.has(id), held.needs(id)),
                    None => shares.add_unclaimed(bytes),
                }
            }
        }
        let trash = self.trash.dir();
        shares.add_unclaimed(tree(trash)?.saturating_sub(own(trash)?));
        records += own(trash)?;
        if let Some(snapshots) = self.data.parent() {
            records += own(snapshots)? + tree(&snapshots.join("records"))?;
        }
        Ok(records)
    }

    /// Bytes of the files of a snapshot's tree, if it can be read. Why it cannot is one of the `problems`.
    fn logical(
        &self,
        found: &Found,
        by_id: &HashMap<&str, &Found>,
        most: usize,
        problems: &mut Vec<String>,
    ) -> Option<u64> {
        let ancestors = ancestors_among(found, by_id, most);
        let root = ancestors.last().copied().unwrap_or(found);
        if root.record.parent.is_some() {
            // That of which the record cannot be used is told.
            return None;
        }
        match self.logical_of(found, &ancestors) {
            Ok(bytes) => Some(u64::try_from(bytes).unwrap_or(u64::MAX)),
            Err(_) if self.is_gone(found) => None,
            Err(error) => {
                let (why, path) = match &error {
                    Error::Store(
                        source @ (store::Error::Damaged { path, .. }
                        | store::Error::Io { path, .. }),
                    ) => (source.problem(), path.display().to_string()),
                    error => (error.to_string(), error.to_string()),
                };
                // One cause is told once.
                if !problems.iter().any(|problem| problem.contains(&path)) {
                    let key = &found.record.key;
                    problems.push(format!(
                        "the tree of the snapshot {key} cannot be counted: {why}"
                    ));
                }
                None
            }
        }
    }

    /// Whether a snapshot was removed meanwhile.
    fn is_gone(&self, found: &Found) -> bool {
        matches!(self.catalog.get(&found.id), Ok(None))
    }

    fn logical_of(&self, found: &Found, ancestors: &[&Found]) -> Result<u128> {
        let lowers = self.lowers_in(found, ancestors);
        let dir = self.data.join(&found.id);
        let has_upper = found.record.kind == Kind::Active && !upper::is_empty(&dir.join("upper"))?;
        let mut chain = chain::packed_in(found, ancestors);
        if lowers.is_empty() && !has_upper {
            chain.reverse();
            return self.packed.logical(&chain);
        }
        let mut all = Below {
            lowers,
            view: self.packed.passing_view(chain.clone())?,
            work: None,
        };
        if has_upper {
            all = all.under_upper(&dir);
        }
        // What it has itself is little, and what lies below was counted before.
        if all.lowers.len() == 1
            && let Some(change) = Change::of(&all)?
        {
            chain.reverse();
            let before = self.packed.logical(&chain)?;
            return Ok(before.saturating_add_signed(change));
        }
        count(&Union::open(all.union())?)
    }
}

/// Who has and needs which snapshots.
#[derive(Default)]
struct Held<'a> {
    holders: Vec<Holder>,
    has: HashMap<&'a str, Vec<u32>>,
    needs: HashMap<&'a str, Vec<u32>>,
}

impl<'a> Held<'a> {
    /// One more holder, of the snapshots `has`.
    fn add(&mut self, has: &[&'a Found], by_id: &HashMap<&str, &'a Found>, most: usize) {
        let number = u32::try_from(self.holders.len()).unwrap_or(u32::MAX);
        let mut holder = Holder::default();
        let mut met = HashSet::new();
        for found in has {
            let chain = std::iter::once(*found).chain(ancestors_among(found, by_id, most));
            for needed in chain {
                if !met.insert(&*needed.id) {
                    break;
                }
                self.needs.entry(&needed.id).or_default().push(number);
                holder.needs.extend(needed.record.packed);
            }
            self.has.entry(&found.id).or_default().push(number);
            holder.has.extend(found.record.packed);
        }
        self.holders.push(holder);
    }

    fn has(&self, id: &str) -> &[u32] {
        self.has.get(id).map_or(&[], Vec::as_slice)
    }

    fn needs(&self, id: &str) -> &[u32] {
        self.needs.get(id).map_or(&[], Vec::as_slice)
    }
}

/// What a directory in overlayfs's format changes in the bytes of a tree.
struct Change<'a> {
    own: OwnLayer,
    sides: Sides<'a>,
    waiting: Vec<Pair>,
    bytes: i128,
}

/// A directory as it is and as it was; a lookup of its nodes is held.
struct Pair {
    path: PathBuf,
    new: Option<NodeId>,
    old: Option<NodeId>,
    /// What is in one of them has nothing to do with what is in the other.
    unrelated: bool,
}

impl Change<'_> {
    /// Of the one directory of `all` on the packed layers. `None` if a file with several names is involved, which this cannot
    /// count.
    fn of(all: &Below) -> Result<Option<i128>> {
        let below = Below {
            view: all.view.clone(),
            ..Below::default()
        };
        let old = match below.is_empty() {
            true => None,
            false => Some(Union::open(below.union())?),
        };
        let new = Union::open(all.clone().union())?;
        let sides = Sides::new(&new, old);
        let (new, old) = sides.roots();
        let root = Pair {
            path: PathBuf::new(),
            new: Some(new),
            old,
            unrelated: false,
        };
        let mut change = Change {
            own: OwnLayer::open(&all.lowers[0])?,
            sides,
            waiting: vec![root],
            bytes: 0,
        };
        while let Some(pair) = change.waiting.pop() {
            if !change.directory(&pair)? {
                return Ok(None);
            }
            change.sides.forget(pair.new, pair.old);
        }
        Ok(Some(change.bytes))
    }

    fn directory(&mut self, at: &Pair) -> Result<bool> {
        let own = match (at.unrelated, at.new.and(at.old)) {
            (false, Some(_)) => self.own.directory(&at.path)?,
            _ => None,
        };
        let own = match own {
            Some(own) if !own.is_marked()? => Some(own),
            _ => None,
        };
        let names = match &own {
            Some(own) => own.names()?,
            None => self.sides.names(at.new, at.old)?,
        };
        for name in names {
            let (new, old) = self.sides.lookup(at.new, at.old, &name)?;
            let sides = [(&new, 1), (&old, -1)];
            for (attr, sign) in sides
                .iter()
                .filter_map(|(entry, sign)| Some((entry.as_ref()?.attr, *sign)))
                .filter(|(attr, _)| attr.kind == FileKind::Regular)
            {
                if attr.nlink > 1 {
                    return Ok(false);
                }
                self.bytes += sign * i128::from(attr.size);
            }
            let (mut files, mut dirs) = ([None; 2], [None; 2]);
            for (side, (entry, _)) in sides.iter().enumerate() {
                if let Some(entry) = entry {
                    match entry.attr.kind {
                        FileKind::Directory => dirs[side] = Some(entry.node),
                        _ => files[side] = Some(entry.node),
                    }
                }
            }
            self.sides.forget(files[0], files[1]);
            let both = dirs.iter().all(Option::is_some);
            let has = |own: &OwnDirectory| Ok::<_, Error>(own.stat(&name)?.is_some());
            // Without a directory of its own in between, the two are one.
            if both
                && let Some(own) = &own
                && !has(own)?
            {
                self.sides.forget(dirs[0], dirs[1]);
            } else if dirs != [None; 2] {
                self.waiting.push(Pair {
                    path: at.path.join(&name),
                    new: dirs[0],
                    old: dirs[1],
                    unrelated: own.is_none(),
                });
            }
        }
        Ok(true)
    }
}

/// Bytes of all regular files of a union, each file once.
fn count(union: &Union) -> Result<u128> {
    let mut bytes = 0;
    let mut met = HashSet::new();
    let mut waiting = vec![NodeId::ROOT];
    while let Some(directory) = waiting.pop() {
        for name in names_in(union, directory)? {
            let Some(entry) = lookup(union, directory, &name)? else {
                continue;
            };
            if entry.attr.kind == FileKind::Directory {
                waiting.push(entry.node);
                continue;
            }
            if entry.attr.kind == FileKind::Regular
                && (entry.attr.nlink < 2 || met.insert(entry.attr.ino))
            {
                bytes += u128::from(entry.attr.size);
            }
            union.forget(entry.node, 1);
        }
        if directory != NodeId::ROOT {
            union.forget(directory, 1);
        }
    }
    Ok(bytes)
}

fn tree(dir: &Path) -> Result<u64> {
    store::tree_bytes(dir).map_err(io_error("add up", dir))
}

fn own(dir: &Path) -> Result<u64> {
    store::own_bytes(dir).map_err(io_error("look at", dir))
}

#[cfg(test)]
mod tests;
