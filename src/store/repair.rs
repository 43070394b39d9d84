//! Repair: what verification finds damaged is made whole again.
//!
//! What follows from something else is made from that: a record of a layer from what is known of it or from its index, a view from
//! its layers, in its place or when it is needed next, a pack that is not in its place any more from what is open of it. All else has
//! to come from the layer's stream once more. Taking that in again gives the same index and recipe, which replace those that are
//! there by renames, and brings the contents that are not what they were. Contents alone come out of any stream that has them, for
//! they are known by their names. Whoever has one of the old files open goes on with that,
//! and finds the new one with the next file that it opens; what it has found out about contents before it keeps until it is told
//! ([`View::refresh`](super::view::View::refresh)).

mod pick;
mod put_back;

use std::collections::{BTreeSet, HashMap, HashSet};
use std::fs::{self, File};
use std::io::{self, Read};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::Ordering;

use super::error::{Error, Result, io_error};
use super::export::sha256;
use super::format::index_file::{self, Kind};
use super::format::{LayerName, ViewKey};
use super::ingest::{self, Observer};
use super::layer::index::LayerIndex;
use super::layers::{Expected, LayerRecord, Layers};
use super::verify::{BadView, Examination, Fault, Reads};
use super::view::{self, Verify, View};

pub use pick::Lacking;
pub use put_back::PutBack;

/// What was mended without a source.
#[derive(Debug, Default)]
pub struct Mended {
    /// Layers whose records were made anew from their indexes.
    pub records: Vec<LayerName>,
    /// Layers whose records were damaged or gone, and were written again as they were.
    pub rewritten: Vec<LayerName>,
    /// Views.
    pub views: Vec<MendedView>,
    /// Packs that had gone from their places and were written there anew from what was open of them.
    pub put_back: Vec<PathBuf>,
    /// Packs that were damaged; what was sound in them is in others.
    pub packs: Vec<PathBuf>,
    /// Packs and files that have gone with bad copies of contents of which there are good ones; what was sound in them is in others.
    pub duplicates: BTreeSet<PathBuf>,
    /// What could not be done.
    pub errors: Vec<Error>,
}

/// What became of a damaged view.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ViewCure {
    /// It is what it was, also for those who have it mounted.
    Restored,
    /// It was removed.
    Removed,
    /// It was removed, and a process that has it mounted keeps it until it is mounted again.
    RemovedBelow,
}

/// A view that was damaged.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct MendedView {
    /// Where it lies, or lay.
    pub path: PathBuf,
    /// The chain that it is of.
    pub key: ViewKey,
    /// What became of it.
    pub cure: ViewCure,
}

impl Layers {
    /// Mends what needs no source. `chains` are those that are known to have views, each the lowest layer first. Ends early when
    /// `observer` wants that.
    pub fn mend(
        &self,
        chains: &HashMap<ViewKey, Vec<LayerName>>,
        observer: &dyn Observer,
    ) -> Mended {
        self.mend_all(chains, observer, true)
    }

    /// As [`mend`](Self::mend), but a damaged view that cannot be restored stays: its layers may have to be whole for that.
    pub fn mend_before_layers(
        &self,
        chains: &HashMap<ViewKey, Vec<LayerName>>,
        observer: &dyn Observer,
    ) -> Mended {
        self.mend_all(chains, observer, false)
    }

    fn mend_all(
        &self,
        chains: &HashMap<ViewKey, Vec<LayerName>>,
        observer: &dyn Observer,
        drop_views: bool,
    ) -> Mended {
        let mut mended = Mended::default();
        let damaged = self.damaged().into_iter();
        for layer in damaged.filter(|layer| !self.is_newer(*layer)) {
            match self.mend_record(layer) {
                Ok(()) => mended.records.push(layer),
                Err(error) => mended.errors.push(error),
            }
        }
        self.rewrite_records(&mut mended);
        self.mend_views(chains, observer, drop_views, &mut mended);
        let _no_collection = self.collecting.lock();
        let (tmp, level) = (self.tmp(), self.settings().level);
        let objects = self.objects();
        for pack in objects.put_back(tmp) {
            match pack {
                Ok(pack) => mended.put_back.push(pack),
                Err(error) => mended.errors.push(error),
            }
        }
        let _restoring = objects.restoring();
        let packs = objects.mend_packs(|| self.needed(), tmp, level);
        for pack in packs.unwrap_or_else(|error| vec![Err(error)]) {
            match pack {
                Ok(pack) => mended.packs.push(pack),
                Err(error) => mended.errors.push(error),
            }
        }
        // A second copy of something may have turned out to be a bad one.
        let bad = objects.bad_copies();
        mended.errors.extend(self.purge().err());
        let paths = bad.into_iter().filter_map(|error| match error {
            Error::Duplicate { path, .. } => Some(path),
            _ => None,
        });
        mended.duplicates = paths.filter(|path| !path.exists()).collect();
        if !(mended.views.is_empty() && mended.put_back.is_empty() && mended.packs.is_empty()) {
            self.note_mended();
        }
        mended
    }

    /// Whether a layer can be relied on: its record, index and recipe are sound and its contents are there. These are read only if
    /// they, or the layer, were found to be damaged or missing before.
    pub fn is_whole(&self, layer: LayerName) -> bool {
        let reads = match self.doubted.lock().contains(&layer) {
            true => Reads::All,
            false => Reads::Doubted,
        };
        let is_recorded = self.get(layer).is_some() && self.has_sound_record(&layer.to_string());
        is_recorded && Examination::new(reads, &()).layer(self, layer).is_empty()
    }

    /// Takes in the stream of a layer once more, in place of what is damaged of it; nothing of it is believed that is not read.
    /// Answers the name of the layer that the stream turns out to be, which is another one if it is another stream.
    pub fn restore(
        &self,
        layer: LayerName,
        stream: impl Read + Send,
        expected: &Expected<'_>,
        observer: &dyn Observer,
    ) -> Result<LayerName> {
        let was = self.get(layer);
        let restoring = self.objects().restoring();
        let name = self.take_in(stream, expected, observer)?;
        self.note_mended();
        if let (Some(was), Some(now)) = (was, self.get(name))
            && name == layer
            && was.blob.is_some()
            && was.blob != now.blob
            && !was.blob_is_claim
        {
            // The same stream, compressed in another way. The blob that is known is the one that others ask for.
            self.put_record(
                layer,
                LayerRecord {
                    blob: was.blob,
                    ..now
                },
            )?;
        }
        {
            let _no_collection = self.collecting.lock();
            self.purge()?;
        }
        drop(restoring);
        if name == layer {
            self.doubted.lock().remove(&layer);
        }
        Ok(name)
    }

    /// If contents that were damaged or missing have come with a layer: takes their bad copies off the disk, and finds out which
    /// layers are whole with them.
    pub fn settle_healed(&self) {
        // What an import that failed has brought anew may have waited for this.
        if self.objects().has_bad_copies() {
            let _no_collection = self.collecting.lock();
            if let Err(error) = self.purge() {
                tracing::warn!(%error, "a damaged copy of a content stays beside the good one for now");
            }
        }
        if !self.objects().take_healed() {
            return;
        }
        tracing::info!("contents that were damaged or missing are there again");
        self.note_mended();
        let mut examination = Examination::new(Reads::Doubted, &());
        for layer in self.doubted() {
            if examination.layer(self, layer).is_empty() {
                self.doubted.lock().remove(&layer);
            }
        }
    }

    /// Takes bad copies off the disk beside which there are good ones. A mount may have read them, and have them open. To be called by
    /// who is [`collecting`](Self::collecting), so that no collection is under way.
    pub(super) fn purge(&self) -> Result<()> {
        if !self.objects().has_bad_copies() {
            return Ok(());
        }
        self.note_mended();
        self.objects().purge(self.tmp(), self.settings().level)
    }

    /// Remembers what was found of a layer: that it is damaged, or that it is not. Where nobody could look, that is neither.
    pub(super) fn remember_faults(&self, layer: LayerName, faults: &[Fault]) {
        let is_damaged = faults.iter().any(|fault| !fault.error.is_exhaustion());
        let mut doubted = self.doubted.lock();
        if is_damaged {
            doubted.insert(layer);
        } else if faults.is_empty() && doubted.remove(&layer) {
            self.note_mended();
        }
    }

    /// Layers that were damaged when they were last examined.
    pub fn doubted(&self) -> HashSet<LayerName> {
        self.doubted.lock().clone()
    }

    /// Says that something was mended that mounts may have read before.
    pub fn note_mended(&self) {
        self.mended.store(true, Ordering::Release);
    }

    /// Whether something was mended that mounts may have read before, since this was last asked.
    pub fn take_mended(&self) -> bool {
        self.mended.swap(false, Ordering::AcqRel)
    }

    pub(super) fn mend_record(&self, layer: LayerName) -> Result<()> {
        let index = LayerIndex::open(&self.index_path(layer), layer)?;
        index.verify()?;
        let mut content_bytes = 0;
        for number in 0..index.object_count() {
            content_bytes += index.object(number)?.size;
        }
        let record = LayerRecord {
            diff_id: index.diff_id().as_ref().map(sha256),
            // Only the record knew.
            blob: None,
            blob_is_claim: false,
            tar_bytes: index.tar_bytes(),
            entries: index.len(),
            index_bytes: index.bytes(),
            objects: index.object_count(),
            content_bytes,
        };
        self.put_record(layer, record)
    }

    /// Writes records of which all is known and that cannot be used, or are gone.
    fn rewrite_records(&self, mended: &mut Mended) {
        let damaged = match self.damaged_records() {
            Ok(damaged) => damaged,
            Err(error) => return mended.errors.push(error),
        };
        let damaged = damaged.iter().filter(|damaged| !damaged.newer);
        for layer in damaged.filter_map(|damaged| damaged.id.parse().ok()) {
            let _none_goes = self.removing.lock();
            let Some(record) = self.get(layer) else {
                continue;
            };
            match self.put_record(layer, record) {
                Ok(()) => mended.rewritten.push(layer),
                Err(error) => mended.errors.push(error),
            }
        }
    }

    /// Layers that came as streams and of which it is not known which blob that was, with their diff ids.
    pub fn without_blob(&self) -> Vec<(LayerName, String)> {
        let without = |record: &LayerRecord| record.blob.is_none() || record.blob_is_claim;
        let all = self.list().into_iter();
        all.filter(|(layer, record)| without(record) && !self.is_newer(*layer))
            .filter_map(|(name, record)| Some((name, record.diff_id?)))
            .collect()
    }

    /// Notes which blob a layer is said to have come as, if nothing is known of that.
    pub fn claim_blob(&self, layer: LayerName, blob: &str) -> Result<()> {
        self.note_blob(layer, blob, true)
    }

    /// Reads the stream of a layer of which the blob is not known, and notes that if it is indeed the layer's; says whether
    /// it is.
    pub fn learn_blob(
        &self,
        layer: LayerName,
        stream: impl Read + Send,
        observer: &dyn Observer,
    ) -> Result<bool> {
        let digests = ingest::digests(stream, self.settings(), observer)?;
        let record = self.get(layer);
        let is_it = record.is_some_and(|record| record.diff_id == Some(sha256(&digests.content)));
        if is_it {
            self.note_blob(layer, &sha256(&digests.blob), false)?;
        }
        Ok(is_it)
    }

    fn note_blob(&self, layer: LayerName, blob: &str, is_claim: bool) -> Result<()> {
        let _none_goes = self.removing.lock();
        match self.get(layer) {
            // What is known is no worse.
            Some(record) if record.blob.is_none() || record.blob_is_claim && !is_claim => {
                let record = LayerRecord {
                    blob: Some(blob.to_owned()),
                    blob_is_claim: is_claim,
                    ..record
                };
                self.put_record(layer, record)
            }
            _ => Ok(()),
        }
    }

    fn mend_views(
        &self,
        chains: &HashMap<ViewKey, Vec<LayerName>>,
        observer: &dyn Observer,
        drop_views: bool,
        mended: &mut Mended,
    ) {
        let bad = match self.verify_views(observer) {
            Ok(bad) => bad,
            Err(error) => return mended.errors.push(error),
        };
        for BadView {
            path,
            key,
            layers,
            replaced,
            error,
        } in bad
        {
            // It may be sound: nobody could look, for want of descriptors or memory.
            if !error.is_damage() {
                mended.errors.push(error);
                continue;
            }
            let chain = chains.get(&key).or(layers.as_ref());
            // Most often a layer is damaged, too, or packs were written anew since it was built.
            let is_restored = chain.is_some_and(|chain| {
                self.restore_view(&path, chain).unwrap_or_else(|error| {
                    tracing::debug!(%error, "a view cannot be built again");
                    false
                })
            });
            let cure = match is_restored {
                true => Ok(ViewCure::Restored),
                // One that was replaced goes when nobody has it any more.
                false if replaced || !drop_views => continue,
                false => self.drop_view(&path, key),
            };
            match cure {
                Ok(cure) => mended.views.push(MendedView { path, key, cure }),
                Err(error) => mended.errors.push(error),
            }
        }
    }

    /// Builds a view again and writes what is damaged of the one at `path` into its place; says whether that is whole then.
    fn restore_view(&self, path: &Path, chain: &[LayerName]) -> Result<bool> {
        let built = view::build(&self.merge(chain)?, self.objects())?;
        let temporary = self.write_temporary("view", |file| built.write(file))?;
        Ok(self.restore_view_from(path, temporary.path()))
    }

    /// Writes what is damaged of the view at `path` as it is in another file; says whether that is whole then. A disk that cannot
    /// read a page may not write it either; another file takes the place then.
    pub(super) fn restore_view_from(&self, path: &Path, other: &Path) -> bool {
        let other = File::open(other).map_err(io_error("open", other));
        let restored = other.and_then(|other| index_file::restore(path, Kind::View, &other));
        restored.unwrap_or_else(|error| {
            tracing::debug!(%error, "a view cannot be restored in its place");
            false
        })
    }

    fn drop_view(&self, path: &Path, key: ViewKey) -> Result<ViewCure> {
        // A collection has listed the views, and would miss one by its other name.
        let _no_collection = self.collecting.lock();
        let _looking = self.looking.lock();
        let objects = Arc::clone(self.objects());
        let there = View::open(path, key, objects, Verify::Never);
        if there.and_then(|view| view.verify()).is_ok() {
            // Somebody has built it anew since.
            return Ok(ViewCure::Removed);
        }
        let unused = self.set_aside(path)?;
        match fs::remove_file(path) {
            Ok(()) if unused.is_none() => Ok(ViewCure::RemovedBelow),
            Err(error) if error.kind() != io::ErrorKind::NotFound => {
                Err(io_error("remove", path)(error))
            }
            _ => Ok(ViewCure::Removed),
        }
    }
}

#[cfg(test)]
mod tests;
