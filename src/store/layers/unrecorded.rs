//! Layers that have files but no record: an import was cut short before it came to that, or the record is gone. Only who knows all
//! snapshots can tell which.

use std::collections::{BTreeSet, HashSet};
use std::fs;
use std::io;
use std::path::Path;

use super::Layers;
use crate::store::error::{Error, Result, io_error};
use crate::store::export::sha256;
use crate::store::format::LayerName;
use crate::store::layer::index::LayerIndex;

impl Layers {
    /// Every layer that may be somebody's: those that are [listed](Self::list), the [damaged](Self::damaged) and those that had no
    /// record when the store was opened.
    pub fn all(&self) -> BTreeSet<LayerName> {
        // In this order none is passed over that goes from one to the next meanwhile.
        let mut all = self.unrecorded.lock().clone();
        all.extend(self.damaged());
        all.extend(self.known.lock().keys());
        all
    }

    /// Whether the layer is one of [`all`](Self::all).
    pub fn has(&self, name: LayerName) -> bool {
        self.all().contains(&name)
    }

    /// Layers that have no record. What they name is kept until they are removed, which is for who knows that no snapshot has them.
    pub fn unrecorded(&self) -> Vec<LayerName> {
        let mut unrecorded: Vec<_> = self.unrecorded.lock().iter().copied().collect();
        let is_gone = |name: &LayerName| matches!(self.records.get(&name.to_string()), Ok(None));
        unrecorded.extend(self.damaged().into_iter().filter(is_gone));
        unrecorded
    }

    /// Takes the layer, which a snapshot has, for [damaged](Self::damaged) if no record of it is known. Answers what is to be told
    /// of that, if nobody was told before.
    pub fn miss(&self, name: LayerName) -> Option<Error> {
        {
            let _none_goes = self.removing.lock();
            let mut damaged = self.damaged.lock();
            if damaged.contains(&name) || self.known.lock().contains_key(&name) {
                return None;
            }
            self.unrecorded.lock().remove(&name);
            damaged.push(name);
        }
        Some(self.without(name))
    }

    /// Makes the record of a layer anew that came as the stream of that diff id and that nobody was known to have, for somebody has it.
    pub fn recover(&self, diff_id: &str) -> Option<LayerName> {
        let unrecorded = self.unrecorded.lock().clone();
        unrecorded.into_iter().find(|name| {
            let index = LayerIndex::open(&self.index_path(*name), *name);
            let its = index.ok().and_then(|index| index.diff_id());
            its.is_some_and(|its| sha256(&its) == diff_id)
                && self
                    .mend_record(*name)
                    .inspect_err(|error| tracing::warn!(layer = %name, %error, "the record of a layer cannot be made anew"))
                    .is_ok()
        })
    }

    /// Whether the record of the layer has to be there.
    pub(in crate::store) fn expects(&self, name: LayerName) -> bool {
        self.get(name).is_some() || self.damaged().contains(&name)
    }

    /// Ids of the records that have to be there.
    pub(super) fn expected(&self) -> Vec<String> {
        let mut expected: BTreeSet<_> = self.damaged().into_iter().collect();
        expected.extend(self.known.lock().keys());
        expected.iter().map(ToString::to_string).collect()
    }

    /// The layer has a record that can be used, or has gone.
    pub(super) fn forget_unrecorded(&self, name: LayerName) {
        self.damaged.lock().retain(|damaged| *damaged != name);
        self.unrecorded.lock().remove(&name);
    }
}

/// The layers of which there are files, but no record that is `taken`. Removes what is no layer's.
pub(super) fn list(layers: &Path, taken: &HashSet<&str>) -> Result<BTreeSet<LayerName>> {
    let mut unrecorded = BTreeSet::new();
    let entries = fs::read_dir(layers).and_then(Iterator::collect::<io::Result<Vec<_>>>);
    for entry in entries.map_err(io_error("list", layers))? {
        let path = entry.path();
        let id = path.file_stem().and_then(|stem| stem.to_str());
        if id.is_some_and(|id| taken.contains(id)) {
            continue;
        }
        match id.and_then(|id| id.parse().ok()) {
            Some(name) => drop(unrecorded.insert(name)),
            None => fs::remove_file(&path).map_err(io_error("remove the left-over", &path))?,
        }
    }
    Ok(unrecorded)
}
