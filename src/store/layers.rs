//! All packed layers of a node: import, export, and the records that say which there are.

use std::collections::{BTreeMap, BTreeSet, HashSet};
use std::fs::{self, File, OpenOptions};
use std::io::{self, BufWriter, Read, Write};
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};
use std::sync::atomic::AtomicBool;
use std::sync::{Arc, OnceLock};

use parking_lot::Mutex;
use serde::{Deserialize, Serialize};

use super::durable::{create_dir, sync_dir};
use super::error::{Error, Result, io_error};
use super::export::{self, sha256};
use super::format::{LayerName, ViewKey};
use super::ingest::recipe;
use super::ingest::{self, Digests, NewLayer, Observer, Settings, Stored, Taken};
use super::layer::index::{FinishedLayer, LayerIndex};
use super::object::Objects;
use super::record::{Damaged, Record, RecordDir};
use super::view::{self, Verify, View};
use chains::{Chains, Merging};

pub mod chains;
mod unrecorded;

/// How the name of a view ends that another has taken the place of while it is mounted.
pub(super) const ASIDE: &str = "aside";

/// What a record says of a layer; the index says the rest.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct LayerRecord {
    /// `sha256:` and the hash of the tar stream, if the layer came as one.
    pub diff_id: Option<String>,
    /// `sha256:` and the hash of the blob that it came as.
    pub blob: Option<String>,
    /// That is what somebody says; the blob was not read to see that it has this layer.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub blob_is_claim: bool,
    /// Bytes of the tar stream.
    pub tar_bytes: u64,
    /// Entries of the index.
    pub entries: u32,
    /// Bytes of the index.
    pub index_bytes: u64,
    /// Objects, each of them once, and their bytes.
    pub objects: u32,
    /// Bytes of the objects.
    pub content_bytes: u64,
}

impl Record for LayerRecord {
    const KIND: &'static str = "layer";
    const VERSION: u32 = 1;
    /// All of it follows from the layer's index.
    const REMEDY: &'static str = "`snapctl system repair` makes it anew, or says what to do";
}

/// Digests that a stream should turn out to have, each `sha256:` and 64 digits.
#[derive(Clone, Copy, Debug, Default)]
pub struct Expected<'a> {
    /// Of the stream as it comes.
    pub blob: Option<&'a str>,
    /// Of its content.
    pub diff_id: Option<&'a str>,
}

/// What came of a layer's entries.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Made {
    /// The layer.
    pub name: LayerName,
    /// Objects of the tree that were made, the root included.
    pub inodes: u64,
    /// Bytes of contents that were handed over, those left out that the store was known to have.
    pub bytes: u64,
    /// Whether it can lie on any layers; otherwise see [`Layers::check`].
    pub modest: bool,
}

/// All packed layers below one directory. One process has it open at a time; any thread may use it.
#[derive(Debug)]
pub struct Layers {
    dir: PathBuf,
    tmp: PathBuf,
    settings: Settings,
    objects: Arc<Objects>,
    records: RecordDir<LayerRecord>,
    known: Mutex<BTreeMap<LayerName, LayerRecord>>,
    /// Layers whose records cannot be used, or are gone though snapshots have them. What they name is needed still.
    damaged: Mutex<Vec<LayerName>>,
    /// Layers that had no record when the store was opened, and of which no snapshot is known.
    unrecorded: Mutex<BTreeSet<LayerName>>,
    /// Held while the record of a layer that is known goes, and while one is taken for damaged.
    pub(super) removing: Mutex<()>,
    /// Layers that were damaged when they were last examined.
    pub(super) doubted: Mutex<HashSet<LayerName>>,
    /// Something was mended that mounts may have read before.
    pub(super) mended: AtomicBool,
    /// Held by a collection.
    pub(super) collecting: Mutex<()>,
    merging: Merging,
    /// Who knows which views are of use.
    pub(super) chains: OnceLock<Arc<dyn Chains>>,
    /// Held by who looks whether a view is there, puts one in its place or takes one away.
    pub(super) looking: Mutex<()>,
}

impl Layers {
    /// Opens the store in `dir`, making it if it is missing, and clears what a crash left half-made, but for
    /// [unrecorded](Self::unrecorded) layers. Answers also the records that cannot be used.
    pub fn open(dir: &Path, settings: Settings) -> Result<(Self, Vec<Damaged>)> {
        let tmp = dir.join("tmp");
        for dir in [&tmp, &dir.join("layers"), &dir.join("views")] {
            create_dir(dir, 0o700).map_err(io_error("make the directory", dir))?;
        }
        let entries = fs::read_dir(&tmp).and_then(Iterator::collect::<io::Result<Vec<_>>>);
        for entry in entries.map_err(io_error("list", &tmp))? {
            let path = entry.path();
            fs::remove_file(&path).map_err(io_error("remove the left-over", &path))?;
        }
        let mut objects = Objects::new(dir);
        objects.prepare()?;
        let records = RecordDir::open(&dir.join("records"))?;
        let listing = records.list()?;
        let damaged_names = listing.damaged.iter();
        let damaged_names = damaged_names
            .filter_map(|damaged| damaged.id.parse().ok())
            .collect();
        let taken = listing.damaged.iter().map(|damaged| &*damaged.id);
        let taken = taken.chain(listing.records.iter().map(|(id, _)| &**id));
        let unrecorded = unrecorded::list(&dir.join("layers"), &taken.collect())?;
        let known = listing
            .records
            .into_iter()
            // `RecordDir` has checked the record; a name that is no layer's is nobody's.
            .filter_map(|(id, record)| Some((id.parse().ok()?, record)))
            .collect();
        let layers = Self {
            dir: dir.to_owned(),
            tmp,
            settings,
            objects: Arc::new(objects),
            records,
            known: Mutex::new(known),
            damaged: Mutex::new(damaged_names),
            unrecorded: Mutex::new(unrecorded),
            removing: Mutex::new(()),
            doubted: Mutex::default(),
            mended: AtomicBool::new(false),
            collecting: Mutex::new(()),
            merging: Merging::default(),
            chains: OnceLock::new(),
            looking: Mutex::new(()),
        };
        Ok((layers, listing.damaged))
    }

    /// The objects of all layers.
    pub fn objects(&self) -> &Arc<Objects> {
        &self.objects
    }

    /// Every layer with its record, in order of their names.
    pub fn list(&self) -> Vec<(LayerName, LayerRecord)> {
        let known = self.known.lock();
        known
            .iter()
            .map(|(name, record)| (*name, record.clone()))
            .collect()
    }

    /// What is recorded of a layer.
    pub fn get(&self, name: LayerName) -> Option<LayerRecord> {
        self.known.lock().get(&name).cloned()
    }

    /// The layer that came as a stream of a digest that is expected, by that of the content if both are. What somebody only says
    /// to be its blob leads to no layer.
    pub fn known(&self, expected: &Expected<'_>) -> Option<LayerName> {
        let known = self.known.lock();
        let found = known.iter().find(|(_, record)| match expected {
            Expected {
                diff_id: Some(diff_id),
                ..
            } => record.diff_id.as_deref() == Some(diff_id),
            Expected {
                blob: Some(blob), ..
            } => record.blob.as_deref() == Some(blob) && !record.blob_is_claim,
            _ => false,
        });
        found.map(|(name, _)| *name)
    }

    /// The index of a layer.
    pub fn index(&self, name: LayerName) -> Result<LayerIndex> {
        self.need(name)?;
        LayerIndex::open(&self.index_path(name), name)
    }

    /// Takes in the layer that `stream` is: a tar, plain or compressed with gzip or zstd. It exists, and is
    /// durable, when this returns; when it fails, nothing of it exists. Contents that are known to be damaged, or are not where they
    /// should be, come anew with it, for all layers.
    pub fn import(
        &self,
        stream: impl Read + Send,
        expected: &Expected<'_>,
        observer: &dyn Observer,
    ) -> Result<LayerName> {
        // What was replaced is remembered as long as this is held.
        let _importing = self.objects.importing();
        let name = self.take_in(stream, expected, observer)?;
        self.settle_healed();
        Ok(name)
    }

    /// As [`import`](Self::import), for who does himself what follows when something was healed.
    pub(super) fn take_in(
        &self,
        stream: impl Read + Send,
        expected: &Expected<'_>,
        observer: &dyn Observer,
    ) -> Result<LayerName> {
        let _importing = self.objects.importing();
        let recipe_path = self.temporary("recipe");
        let recipe = recipe::Writer::create(&recipe_path)?;
        let Taken {
            index,
            recipe,
            stored,
            digests,
        } = ingest::take(
            stream,
            &self.objects,
            &self.tmp,
            recipe,
            &self.settings,
            observer,
        )?;
        check("blob of the layer", expected.blob, &digests.blob)?;
        check("content of the layer", expected.diff_id, &digests.content)?;
        recipe.finish()?;
        let recipe = Temporary(Some(recipe_path));
        let index = index.finish(&stored.contents)?;
        self.keep(index, stored, Some((recipe, digests)))
    }

    /// Makes the layer whose entries `fill` hands over. It exists, and is durable, when this returns; when it fails,
    /// nothing of it exists. Nothing is made of one that is there.
    pub fn make<E: From<Error>>(
        &self,
        fill: impl FnOnce(&mut NewLayer<'_, '_>) -> Result<(), E>,
    ) -> Result<Made, E> {
        let _importing = self.objects.importing();
        let made = ingest::collect(&self.objects, &self.tmp, &self.settings, fill)?;
        let index = made.index.finish(&made.stored.contents)?;
        let name = self.keep(index, made.stored, None)?;
        self.settle_healed();
        Ok(Made {
            name,
            inodes: made.inodes,
            bytes: made.bytes,
            modest: made.modest,
        })
    }

    /// Writes the tar stream of a layer to `out`: the one that it came as, or one that is made of its index. When it
    /// fails, part of it may be written.
    pub fn export(&self, name: LayerName, out: &mut dyn Write) -> Result<()> {
        let index = self.index(name)?;
        match index.diff_id() {
            Some(diff_id) => {
                let recipe = recipe::Reader::open(&self.recipe_path(name))?;
                export::export(&index, (recipe, diff_id), &self.objects, out)
            }
            None => export::write(&index, &self.objects, out),
        }
    }

    /// The merged view of a chain of layers, the lowest first. It is built if it is not in the cache, or if
    /// what is there cannot be used.
    pub fn view(&self, chain: &[LayerName], verify: Verify) -> Result<View> {
        let key = ViewKey::of(chain);
        let path = self.dir.join("views").join(format!("{key}.view"));
        let there = {
            let _looking = self.looking.lock();
            View::open(&path, key, Arc::clone(&self.objects), verify)
        };
        let is_damaged = match there {
            Err(error) if error.is_not_found() => false,
            Err(error) if error.is_damage() => {
                tracing::warn!(%error, "a merged view is built again");
                !matches!(error, Error::Unsupported { .. })
            }
            opened => return opened,
        };
        let merged = self.merge(chain)?;
        let built = view::build(&merged, &self.objects)?;
        self.merging.keep(merged);
        // Durable before it has its name: a file of the right length with pages that a power cut has kept from the disk would
        // pass for a view.
        let mut temporary = self.write_temporary("view", |file| built.write(file))?;
        // In its place, if that can be, for who has it mounted.
        if is_damaged {
            self.restore_view_from(&path, temporary.path());
        }
        // It may be of no use to anybody but the caller, who has it once it is open.
        let _looking = self.looking.lock();
        // Restored, or built by somebody else meanwhile, and maybe mounted already.
        if let Ok(view) = View::open(&path, key, Arc::clone(&self.objects), verify) {
            return Ok(view);
        }
        let _unused = self.set_aside(&path)?;
        temporary.rename(&path)?;
        View::open(&path, key, Arc::clone(&self.objects), verify)
    }

    /// Says that the view at `path` is about to be removed or replaced, if there is one. One that is mounted, which its lock
    /// tells, gets another name first, which begins with its own and by which a collection finds it; another cannot be mounted as
    /// long as the answer is open. The caller is `looking` until it has done what it says.
    pub(super) fn set_aside(&self, path: &Path) -> Result<Option<File>> {
        match view::claim(path) {
            Ok(Some(unused)) => Ok(Some(unused)),
            Ok(None) => {
                let random = format!("-{:032x}.{ASIDE}", rand::random::<u128>());
                let mut name = path.file_stem().unwrap_or_default().to_owned();
                name.push(random);
                let aside = self.views().join(name);
                fs::hard_link(path, &aside).map_err(io_error("make", &aside))?;
                Ok(None)
            }
            Err(error) if error.is_not_found() => Ok(None),
            Err(error) => Err(error),
        }
    }

    /// Removes a layer; durable on return. Its objects stay until they are collected.
    pub fn remove(&self, name: LayerName) -> Result<bool> {
        let was = {
            let _removing = self.removing.lock();
            let was = self.records.remove(&name.to_string())?;
            self.known.lock().remove(&name);
            self.forget_unrecorded(name);
            was
        };
        for path in [self.index_path(name), self.recipe_path(name)] {
            match fs::remove_file(&path) {
                Err(error) if error.kind() != io::ErrorKind::NotFound => {
                    return Err(io_error("remove", &path)(error));
                }
                _ => {}
            }
        }
        Ok(was)
    }

    /// Makes contents durable and brings them to their places.
    pub(super) fn keep_contents(&self, stored: Stored) -> Result<()> {
        let Stored { pack, files, .. } = stored;
        let pack = (!pack.is_empty()).then(|| pack.seal()).transpose()?;
        for file in &files {
            file.sync()?;
        }
        self.objects.publish(pack, files)
    }

    /// Makes everything durable, and last of all the record.
    fn keep(
        &self,
        index: FinishedLayer,
        stored: Stored,
        stream: Option<(Temporary, Digests)>,
    ) -> Result<LayerName> {
        self.keep_contents(stored)?;
        let all = index.objects();
        let (objects, content_bytes) =
            (all.len() as u32, all.iter().map(|object| object.size).sum());
        let (recipe, digests) = stream.unzip();
        let diff_id = digests.map(|digests: Digests| digests.content);
        let tar_bytes = digests.map_or(0, |digests| digests.bytes);
        let mut temporary = Temporary(Some(self.temporary("index")));
        let name = temporary.write(|file| index.write(file, diff_id, tar_bytes))?;
        // A layer never changes, its files included; only one that came as a stream can be here to be mended.
        let is_sound = || self.index(name).and_then(|index| index.verify()).is_ok();
        if diff_id.is_none() && self.known.lock().contains_key(&name) && is_sound() {
            return Ok(name);
        }
        // Its index and its recipe are that release's, too.
        self.records.check_replaceable(&name.to_string())?;
        temporary.rename(&self.index_path(name))?;
        if let Some(mut recipe) = recipe {
            recipe.rename(&self.recipe_path(name))?;
        }
        let layers = self.dir.join("layers");
        sync_dir(&layers).map_err(io_error("make durable", &layers))?;

        let index = LayerIndex::open(&self.index_path(name), name)?;
        let record = LayerRecord {
            diff_id: diff_id.as_ref().map(sha256),
            blob: digests.map(|digests| sha256(&digests.blob)),
            blob_is_claim: false,
            tar_bytes,
            entries: index.len(),
            index_bytes: index.bytes(),
            objects,
            content_bytes,
        };
        self.put_record(name, record)?;
        Ok(name)
    }

    fn need(&self, name: LayerName) -> Result<()> {
        match self.known.lock().contains_key(&name) {
            true => Ok(()),
            false => Err(self.without(name)),
        }
    }

    /// Why a layer that is not known is not: it may be there, and its record damaged.
    pub fn without(&self, name: LayerName) -> Error {
        let layer = name.to_string();
        let problem = match self.damaged.lock().contains(&name) {
            true => self.records.problem_of_known(&layer),
            false => None,
        };
        problem.map_or(Error::NoLayer { layer }, |damaged| {
            Error::Record(damaged.into())
        })
    }

    /// How many [`damaged_records`](Self::damaged_records) there are; of records only what has changed is read.
    pub fn count_damaged_records(&self) -> Result<usize> {
        match self.records.is_doubtful(self.expected())? {
            true => Ok(self.damaged_records()?.len()),
            false => Ok(0),
        }
    }

    /// Records that cannot be used now, or are gone though their layers are not.
    pub fn damaged_records(&self) -> Result<Vec<Damaged>> {
        let mut damaged = self.records.examine(self.expected())?;
        let _none_goes = self.removing.lock();
        damaged.retain(|damaged| !self.has_sound_record(&damaged.id));
        Ok(damaged)
    }

    /// Whether there is nothing wrong with the record of that id. Nobody may be [`removing`](Self::removing) it.
    pub(super) fn has_sound_record(&self, id: &str) -> bool {
        let name: Option<LayerName> = id.parse().ok();
        let is_expected = name.is_some_and(|name| self.expects(name));
        !self.records.is_unsound(id, is_expected)
    }

    /// Whether the record of the layer is a newer release's, which is left to that.
    pub fn is_newer(&self, layer: LayerName) -> bool {
        self.records.is_newer(&layer.to_string())
    }

    /// Layers whose records could not be used when the store was opened, or were [missed](Self::miss), and have not been made anew
    /// since.
    pub fn damaged(&self) -> Vec<LayerName> {
        self.damaged.lock().clone()
    }

    /// Takes the record of a layer as it is on the disk, of one whose record could not be used; says whether it can be now.
    pub(super) fn take_record(&self, name: LayerName) -> bool {
        let _none_goes = self.removing.lock();
        let Ok(Some(record)) = self.records.get(&name.to_string()) else {
            return false;
        };
        self.known.lock().insert(name, record);
        self.forget_unrecorded(name);
        true
    }

    /// Records a layer of which everything is there.
    pub(super) fn put_record(&self, name: LayerName, record: LayerRecord) -> Result<()> {
        self.records.put(&name.to_string(), &record)?;
        self.known.lock().insert(name, record);
        self.forget_unrecorded(name);
        Ok(())
    }

    pub(super) fn settings(&self) -> &Settings {
        &self.settings
    }

    /// Where all of it lies.
    pub(super) fn dir(&self) -> &Path {
        &self.dir
    }

    /// Where what is half-made lies.
    pub(super) fn tmp(&self) -> &Path {
        &self.tmp
    }

    /// Where merged views lie.
    pub(super) fn views(&self) -> PathBuf {
        self.dir.join("views")
    }

    pub(super) fn index_path(&self, name: LayerName) -> PathBuf {
        self.dir.join("layers").join(format!("{name}.index"))
    }

    pub(super) fn recipe_path(&self, name: LayerName) -> PathBuf {
        self.dir.join("layers").join(format!("{name}.tar"))
    }

    pub(super) fn write_temporary<T>(
        &self,
        what: &str,
        write: impl FnOnce(&mut BufWriter<File>) -> io::Result<T>,
    ) -> Result<Temporary> {
        let temporary = Temporary(Some(self.temporary(what)));
        temporary.write(write)?;
        Ok(temporary)
    }

    fn temporary(&self, what: &str) -> PathBuf {
        let number = rand::random::<u128>();
        self.tmp.join(format!("{what}-{number:032x}"))
    }
}

/// A file on its way to its place. Dropped before, it is removed.
pub(super) struct Temporary(Option<PathBuf>);

impl Temporary {
    /// Makes the file with what `write` writes, and makes it durable.
    fn write<T>(&self, write: impl FnOnce(&mut BufWriter<File>) -> io::Result<T>) -> Result<T> {
        let path = self.path();
        let written = OpenOptions::new()
            .write(true)
            .create_new(true)
            .mode(0o600)
            .open(path)
            .and_then(|file| {
                let mut file = BufWriter::with_capacity(1 << 20, file);
                let result = write(&mut file)?;
                let file = file.into_inner().map_err(io::IntoInnerError::into_error)?;
                file.sync_all()?;
                Ok(result)
            });
        written.map_err(io_error("write", path))
    }

    fn rename(&mut self, to: &Path) -> Result<()> {
        fs::rename(self.path(), to).map_err(io_error("make", to))?;
        self.0 = None;
        Ok(())
    }

    pub(super) fn path(&self) -> &Path {
        self.0.as_deref().unwrap_or(Path::new(""))
    }
}

impl Drop for Temporary {
    fn drop(&mut self) {
        if let Some(path) = &self.0 {
            // What stays is cleared when the store is opened.
            let _ = fs::remove_file(path);
        }
    }
}

fn check(what: &'static str, expected: Option<&str>, found: &[u8; 32]) -> Result<()> {
    let found = sha256(found);
    match expected {
        Some(expected) if expected != found => Err(Error::Digest {
            what,
            expected: expected.to_owned(),
            found,
        }),
        _ => Ok(()),
    }
}

#[cfg(test)]
mod made;
#[cfg(test)]
mod streams;
#[cfg(test)]
mod tests;
#[cfg(test)]
mod views;
