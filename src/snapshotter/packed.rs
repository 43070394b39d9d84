//! The packed layers of committed snapshots, and the end of those that no snapshot has any more.
//!
//! A layer may be the content of several snapshots. It is removed with the last of them, but never while an import
//! is under way: that may have found it there already and be about to record a snapshot of it. A
//! layer that a crash left without a snapshot goes after the store was opened, as soon as all snapshots are known. While the records of
//! some cannot be read, or are gone, any layer that was there at the start may be theirs, and stays.

use std::collections::{HashMap, HashSet};
use std::io::Read;
use std::path::Path;
use std::sync::Arc;

use parking_lot::Mutex;

use super::catalog::Found;
use super::types::*;
use crate::store::ingest::{self, NewLayer, Settings};
use crate::store::layers::{Expected, Layers};
use crate::store::view::{Verify, View};
use crate::store::{Collector, LayerName};

#[derive(Debug)]
pub(super) struct Packed {
    layers: Arc<Layers>,
    collector: Collector,
    state: Mutex<State>,
    verify: Verify,
    /// What the trees of chains have, the lowest layer first, which never changes. Only of layers that there are.
    logical: Mutex<HashMap<Vec<LayerName>, u128>>,
}

#[derive(Debug, Default)]
struct State {
    /// By how many snapshots each layer is used.
    uses: HashMap<LayerName, usize>,
    /// Those that snapshots may have whose records cannot be read, or are gone.
    claimed: HashSet<LayerName>,
    /// Imports and commits under way.
    imports: usize,
}

/// A layer that an import has found or made, or a commit. It is not removed while this lives.
#[derive(Debug)]
pub(super) struct Imported<'a> {
    packed: &'a Packed,
    pub(super) name: LayerName,
    pub(super) usage: Usage,
}

/// Keeps a layer from being removed while it lives.
#[derive(Debug)]
pub struct HeldLayer<'a> {
    packed: &'a Packed,
    name: LayerName,
}

/// Ends an import, however it ends.
struct Import<'a>(&'a Packed);

impl Packed {
    /// Opens the store in `dir` for the snapshots `all`. Until [`settle`](Self::settle) there may be others.
    pub(super) fn open(
        dir: &Path,
        (settings, verify): (Settings, Verify),
        all: &[Found],
    ) -> Result<Self> {
        let (layers, damaged) = Layers::open(dir, settings)?;
        for damaged in &damaged {
            tracing::error!("{damaged}");
        }
        let mut state = State::default();
        for found in all {
            let Some(layer) = found.record.packed else {
                continue;
            };
            *state.uses.entry(layer).or_default() += 1;
            if let Some(missed) = layers.miss(layer) {
                tracing::error!(snapshot = found.record.key, "{missed}");
            }
        }
        state.claimed = layers.all().into_iter().collect();
        let layers = Arc::new(layers);
        let collector =
            Collector::start(Arc::clone(&layers)).map_err(io_error("start a thread for", dir))?;
        Ok(Self {
            layers,
            collector,
            state: Mutex::new(state),
            verify,
            logical: Mutex::default(),
        })
    }

    /// The merged view of the layers, the topmost first.
    pub(super) fn view(&self, mut layers: Vec<LayerName>) -> Result<Option<Arc<View>>> {
        if layers.is_empty() {
            return Ok(None);
        }
        layers.reverse();
        let view = self.layers.view(&layers, self.verify)?;
        Ok(Some(Arc::new(view)))
    }

    /// The same for who looks at it once; nothing of it stays on the disk.
    pub(super) fn passing_view(&self, mut layers: Vec<LayerName>) -> Result<Option<Arc<View>>> {
        if layers.is_empty() {
            return Ok(None);
        }
        layers.reverse();
        let view = self.layers.passing_view(&layers)?;
        Ok(Some(Arc::new(view)))
    }

    /// Bytes of the files of the tree that the layers make, the lowest first.
    pub(super) fn logical(&self, layers: &[LayerName]) -> Result<u128> {
        if let Some(bytes) = self.logical.lock().get(layers) {
            return Ok(*bytes);
        }
        let bytes = self.layers.logical(layers)?;
        let mut logical = self.logical.lock();
        // One may have been removed meanwhile, and who removes it looks here after that.
        if self.has_all(layers) {
            logical.insert(layers.to_vec(), bytes);
        }
        Ok(bytes)
    }

    fn has_all(&self, layers: &[LayerName]) -> bool {
        layers.iter().all(|name| self.layers.get(*name).is_some())
    }

    /// Takes a layer in, unless it is there already, which can lie on the layers `below`, the topmost first.
    pub(super) fn import(
        &self,
        mut below: Vec<LayerName>,
        stream: impl Read + Send,
        expected: &Expected<'_>,
        observer: &dyn ingest::Observer,
    ) -> Result<Imported<'_>> {
        self.state.lock().imports += 1;
        let import = Import(self);
        let name = match self.layers.known(expected) {
            Some(name) if self.layers.is_whole(name) => name,
            Some(name) => {
                tracing::warn!(layer = %name, "a known layer is damaged and is taken in once more");
                self.layers.restore(name, stream, expected, observer)?
            }
            None => self.layers.import(stream, expected, observer)?,
        };
        below.reverse();
        below.push(name);
        self.layers.check(&below)?;
        let usage = self.usage(name);
        std::mem::forget(import);
        Ok(Imported {
            packed: self,
            name,
            usage,
        })
    }

    /// Takes in a layer that snapshots have once more.
    pub(super) fn restore(
        &self,
        layer: LayerName,
        stream: impl Read + Send,
        expected: &Expected<'_>,
        observer: &dyn ingest::Observer,
    ) -> Result<()> {
        self.state.lock().imports += 1;
        let _import = Import(self);
        let found = self.layers.restore(layer, stream, expected, observer)?;
        if found == layer {
            Ok(())
        } else {
            Err(Error::AnotherLayer { layer, found })
        }
    }

    /// Makes the layer whose entries `fill` hands over, which lies on the layers `below`, the topmost first.
    pub(super) fn make(
        &self,
        mut below: Vec<LayerName>,
        fill: impl FnOnce(&mut NewLayer<'_, '_>) -> Result<()>,
    ) -> Result<Imported<'_>> {
        self.state.lock().imports += 1;
        let import = Import(self);
        let made = self.layers.make(fill)?;
        if !made.modest {
            below.reverse();
            below.push(made.name);
            self.layers.check(&below)?;
        }
        let record = self.layers.get(made.name);
        let usage = Usage {
            size: made.bytes + record.map_or(0, |record| record.index_bytes),
            inodes: made.inodes,
        };
        std::mem::forget(import);
        Ok(Imported {
            packed: self,
            name: made.name,
            usage,
        })
    }

    /// All packed layers.
    pub(super) fn layers(&self) -> &Arc<Layers> {
        &self.layers
    }

    /// Keeps a layer for somebody who reads it, as a snapshot would.
    pub(super) fn hold(&self, name: LayerName) -> Result<HeldLayer<'_>> {
        let mut state = self.state.lock();
        if self.layers.get(name).is_none() {
            return Err(self.layers.without(name).into());
        }
        *state.uses.entry(name).or_default() += 1;
        Ok(HeldLayer { packed: self, name })
    }

    /// Views that were of use may be so no more.
    pub(super) fn collect_useless_views(&self) {
        self.collector.ask_for_views();
    }

    /// Waits until what was removed has left the disk.
    pub(super) fn wait_until_collected(&self) {
        self.collector.wait_until_idle();
    }

    /// What a layer takes.
    pub(super) fn usage(&self, name: LayerName) -> Usage {
        let record = self.layers.get(name);
        record.map_or_else(Usage::default, |record| Usage {
            size: record.content_bytes + record.index_bytes,
            inodes: record.entries.into(),
        })
    }

    /// A snapshot has the layer that was not counted.
    pub(super) fn count(&self, name: LayerName) {
        if let Some(missed) = self.layers.miss(name) {
            tracing::error!("{missed}");
        }
        *self.state.lock().uses.entry(name).or_default() += 1;
    }

    /// A snapshot has the layer no more.
    pub(super) fn release(&self, name: LayerName) {
        let mut state = self.state.lock();
        if let Some(uses) = state.uses.get_mut(&name) {
            *uses -= 1;
            if *uses == 0 {
                state.uses.remove(&name);
            }
        }
        self.remove_unused(&state);
    }

    /// Whether layers are kept because snapshots may have them whose records cannot be read, or are gone.
    pub(super) fn keeps_claimed(&self) -> bool {
        !self.state.lock().claimed.is_empty()
    }

    /// Of all snapshots it is known now which layers they have.
    pub(super) fn settle(&self) {
        let mut state = self.state.lock();
        state.claimed.clear();
        self.remove_unused(&state);
    }

    /// Whoever has `state` locked keeps an import from beginning.
    fn remove_unused(&self, state: &State) {
        if state.imports > 0 {
            return;
        }
        let mut removed = false;
        let recorded = self.layers.list().into_iter().map(|(name, _)| name);
        for name in recorded.chain(self.layers.unrecorded()) {
            if state.uses.contains_key(&name) || state.claimed.contains(&name) {
                continue;
            }
            removed = true;
            if let Err(error) = self.layers.remove(name) {
                tracing::error!(layer = %name, %error, "a layer stays until plyd starts again");
            }
        }
        if removed {
            let mut logical = self.logical.lock();
            logical.retain(|layers, _| self.has_all(layers));
            self.collector.ask();
        }
    }

    fn end_import(&self) {
        let mut state = self.state.lock();
        state.imports -= 1;
        self.remove_unused(&state);
    }
}

impl Imported<'_> {
    /// A snapshot of the layer is recorded.
    pub(super) fn used(self) {
        let mut state = self.packed.state.lock();
        *state.uses.entry(self.name).or_default() += 1;
    }
}

impl Drop for HeldLayer<'_> {
    fn drop(&mut self) {
        self.packed.release(self.name);
    }
}

impl Drop for Imported<'_> {
    fn drop(&mut self) {
        self.packed.end_import();
    }
}

impl Drop for Import<'_> {
    fn drop(&mut self) {
        self.0.end_import();
    }
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeMap;
    use std::fs;
    use std::path::PathBuf;

    use crate::snapshotter::tests::{Place, layer, prepare};
    use crate::snapshotter::{Owner, SnapshotInfo, Snapshotter};
    use crate::store::layers::Expected;

    const OWNER: Owner = Owner::Containerd;

    /// A root with the snapshots "one" and "two" as `make` makes them, where the record of "one" was damaged after plyd had ended;
    /// that record, and what it was.
    fn damaged(make: impl Fn(&Snapshotter, &str) -> SnapshotInfo) -> (Place, PathBuf, Vec<u8>) {
        let place = Place::new();
        let snapshots = place.open();
        let id = make(&snapshots, "one").id;
        make(&snapshots, "two");
        snapshots.close().unwrap();
        let record = place.root().join(format!("snapshots/records/{id}.record"));
        let good = fs::read(&record).unwrap();
        fs::write(&record, &good[..good.len() / 2]).unwrap();
        (place, record, good)
    }

    fn alone(snapshots: &Snapshotter, name: &str) -> SnapshotInfo {
        layer(snapshots, name, None)
    }

    /// The next import or removal took the layer away, and a record that was put back had lost its content.
    #[test]
    fn the_layer_of_a_damaged_record_stays() {
        let (place, record, good) = damaged(alone);
        let snapshots = place.open();
        alone(&snapshots, "three");
        for key in ["three", "two"] {
            snapshots.remove(OWNER, key).unwrap();
        }
        snapshots.close().unwrap();
        drop(snapshots);
        fs::write(&record, good).unwrap();
        let snapshots = place.open();
        let layers = snapshots.packed_layers();
        let of_one = snapshots.stat(OWNER, "one").unwrap().packed_layers;
        assert!(layers.get(of_one[0]).is_some());
        assert!(layers.verify_layer(of_one[0], true, &()).is_empty());
        // The others go as soon as it is known whose they are.
        assert_eq!(layers.list().len(), 1);
    }

    #[test]
    fn layers_that_may_be_somebodys_stay_until_a_start_finds_no_damaged_record() {
        let (place, record, good) = damaged(alone);
        let snapshots = place.open();
        snapshots.remove(OWNER, "two").unwrap();
        let left = || snapshots.packed_layers().list().len();
        assert!(!snapshots.settle_records());
        assert_eq!(left(), 2);
        // Whole, but who reads it only now does not know what else there was.
        fs::write(&record, good).unwrap();
        assert!(!snapshots.settle_records());
        assert_eq!(left(), 2);
        // Who removes it to put another one in its place has not given it up.
        fs::remove_file(&record).unwrap();
        assert!(!snapshots.settle_records());
        assert_eq!(left(), 2);
        snapshots.close().unwrap();
        drop(snapshots);
        assert_eq!(place.open().packed_layers().list().len(), 0);
    }

    /// With a snapshot that nobody had counted went the layer of another one.
    #[test]
    fn a_snapshot_whose_record_was_put_back_takes_no_layer_of_another_along() {
        let same = |snapshots: &Snapshotter, name: &str| {
            prepare(snapshots, "work", None);
            let stream = (&[0; 1024][..], &Expected::default());
            snapshots.apply_layer(OWNER, "work", stream, &()).unwrap();
            snapshots
                .commit(OWNER, name, "work", BTreeMap::new())
                .unwrap()
        };
        let (place, record, good) = damaged(same);
        let snapshots = place.open();
        let left = || snapshots.packed_layers().list().len();
        fs::write(&record, good).unwrap();
        snapshots.remove(OWNER, "one").unwrap();
        assert!(snapshots.settle_records());
        assert_eq!(left(), 1);
        snapshots.remove(OWNER, "two").unwrap();
        assert_eq!(left(), 0);
    }

    /// As a kill leaves it before a snapshot of the layer is recorded, or before the layer is.
    #[test]
    fn what_an_import_left_goes_once_all_is_known() {
        let (place, record, _) = damaged(alone);
        let dir = place.root().join("store");
        let snapshots = place.open();
        let [left] = &snapshots.stat(OWNER, "two").unwrap().packed_layers[..] else {
            panic!("one layer");
        };
        let of_left = ["records", "layers"].map(|of| dir.join(of));
        let of_left = of_left.map(|of| of.join(left.to_string()));
        snapshots.close().unwrap();
        let two = snapshots.stat(OWNER, "two").unwrap().id;
        drop(snapshots);
        fs::remove_file(of_left[0].with_extension("record")).unwrap();
        fs::remove_file(place.root().join(format!("snapshots/records/{two}.record"))).unwrap();
        let snapshots = place.open();
        let layers = snapshots.packed_layers();
        // Others come and go.
        alone(&snapshots, "three");
        snapshots.remove(OWNER, "three").unwrap();
        snapshots.wait_until_deleted();
        let index = of_left[1].with_extension("index");
        assert!(index.exists() && layers.damaged().is_empty());
        assert!(layers.verify_layer(*left, true, &()).is_empty());
        fs::remove_file(&record).unwrap();
        snapshots.close().unwrap();
        drop(snapshots);
        place.open().wait_until_deleted();
        assert!(!index.exists());
        assert_eq!(fs::read_dir(dir.join("packs")).unwrap().count(), 0);
    }

    #[test]
    fn of_removed_layers_nothing_is_kept_in_memory() {
        let place = Place::new();
        let snapshots = place.open();
        layer(&snapshots, "one", None);
        layer(&snapshots, "two", Some("one"));
        snapshots.space(&[]).unwrap();
        let packed = &snapshots.packed;
        assert_eq!(packed.logical.lock().len(), 2);
        for (key, left) in [("two", 1), ("one", 0)] {
            snapshots.remove(OWNER, key).unwrap();
            assert_eq!(packed.logical.lock().len(), left);
        }
    }
}
