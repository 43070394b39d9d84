//! Repair: what verification finds damaged is made whole again.
//!
//! What follows from something else is made from that: a record of a layer from its index, a view, when it is needed next, from
//! its layers, a pack that is not in its place any more from what is open of it. All else has to come from the layer's stream
//! once more. Taking that in again gives the same index and recipe, which replace those that are there by renames, and brings the
//! contents that are not what they were. Whoever has one of the old files open goes on with that, and finds the new one with the
//! next file that it opens.

use std::fs;
use std::io::{self, Read};
use std::path::PathBuf;
use std::sync::Arc;

use super::error::{Error, Result, io_error};
use super::export::sha256;
use super::format::LayerName;
use super::ingest::Observer;
use super::layer::index::LayerIndex;
use super::layers::{Expected, LayerRecord, Layers};
use super::verify::Examination;
use super::view::{Verify, View};

/// What was mended without a source.
#[derive(Debug, Default)]
pub struct Mended {
    /// Layers whose records were made anew.
    pub records: Vec<LayerName>,
    /// Views that were removed, to be built again.
    pub views: Vec<PathBuf>,
    /// Packs that had gone from their places and were written there anew from what was open of them.
    pub put_back: Vec<PathBuf>,
    /// Packs that were damaged; what was sound in them is in others.
    pub packs: Vec<PathBuf>,
    /// What could not be done.
    pub errors: Vec<Error>,
}

impl Layers {
    /// Mends what needs no source. Ends early when `observer` wants that.
    pub fn mend(&self, observer: &dyn Observer) -> Mended {
        let mut mended = Mended::default();
        for layer in self.damaged() {
            match self.mend_record(layer) {
                Ok(()) => mended.records.push(layer),
                Err(error) => mended.errors.push(error),
            }
        }
        if let Err(error) = self.mend_views(observer, &mut mended.views) {
            mended.errors.push(error);
        }
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
        mended.errors.extend(objects.purge(tmp, level).err());
        mended
    }

    /// Whether a layer can be relied on: its index and recipe are sound and its contents are there. They are read only if the
    /// layer was found to be damaged before.
    pub fn is_whole(&self, layer: LayerName) -> bool {
        let deep = self.doubted.lock().contains(&layer);
        self.get(layer).is_some() && Examination::new(deep, &()).layer(self, layer).is_empty()
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
        let name = self.import(stream, expected, observer)?;
        if let (Some(was), Some(now)) = (was, self.get(name))
            && name == layer
            && was.blob.is_some()
            && was.blob != now.blob
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
            self.objects().purge(self.tmp(), self.settings().level)?;
        }
        drop(restoring);
        if name == layer {
            self.doubted.lock().remove(&layer);
        }
        Ok(name)
    }

    /// Remembers that a layer is damaged.
    pub(super) fn doubt(&self, layer: LayerName) {
        self.doubted.lock().insert(layer);
    }

    fn mend_record(&self, layer: LayerName) -> Result<()> {
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
            tar_bytes: index.tar_bytes(),
            entries: index.len(),
            index_bytes: index.bytes(),
            objects: index.object_count(),
            content_bytes,
        };
        self.put_record(layer, record)
    }

    fn mend_views(&self, observer: &dyn Observer, removed: &mut Vec<PathBuf>) -> Result<()> {
        let dir = self.views();
        let entries = fs::read_dir(&dir).and_then(Iterator::collect::<io::Result<Vec<_>>>);
        for entry in entries.map_err(io_error("list", &dir))? {
            if observer.cancelled() {
                return Ok(());
            }
            let path = entry.path();
            let key = path
                .file_stem()
                .and_then(|stem| stem.to_str()?.parse().ok());
            let sound = match key {
                Some(key) => View::open(&path, key, Arc::clone(self.objects()), Verify::Never)
                    .and_then(|view| view.verify()),
                None => continue,
            };
            if let Err(Error::Damaged { .. }) = sound {
                let _unused = self.set_aside(&path)?;
                match fs::remove_file(&path) {
                    Err(error) if error.kind() != io::ErrorKind::NotFound => {
                        return Err(io_error("remove", &path)(error));
                    }
                    _ => removed.push(path),
                }
            }
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests;
