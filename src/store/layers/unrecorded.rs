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

#[cfg(test)]
mod tests {
    use std::collections::HashMap;
    use std::path::PathBuf;

    use super::*;
    use crate::store::ingest::Settings;
    use crate::store::layers::Expected;

    fn open(dir: &Path) -> Layers {
        let (layers, damaged) = Layers::open(dir, Settings::default()).unwrap();
        assert!(damaged.is_empty());
        layers
    }

    /// A tar with one file.
    fn stream() -> Vec<u8> {
        let mut builder = tar::Builder::new(Vec::new());
        let mut header = tar::Header::new_ustar();
        header.set_size(7);
        header.set_mode(0o644);
        builder
            .append_data(&mut header, "a", &b"content"[..])
            .unwrap();
        builder.into_inner().unwrap()
    }

    /// A store whose only layer has lost its record, the layer, and the files that it has.
    fn lost() -> (tempfile::TempDir, LayerName, [PathBuf; 2]) {
        let dir = tempfile::tempdir().unwrap();
        let layers = open(dir.path());
        let name = layers.import(&*stream(), &Expected::default(), &());
        let name = name.unwrap();
        let files = [layers.index_path(name), layers.recipe_path(name)];
        fs::remove_file(dir.path().join(format!("records/{name}.record"))).unwrap();
        (dir, name, files)
    }

    fn packs(dir: &Path) -> usize {
        fs::read_dir(dir.join("packs")).unwrap().count()
    }

    #[test]
    fn what_has_no_record_is_kept_without_a_word_until_it_is_removed() {
        let (dir, name, files) = lost();
        let layers = open(dir.path());
        assert_eq!(layers.unrecorded(), [name]);
        let collected = layers.collect(false, &());
        assert!(collected.errors.is_empty() && collected.orphans.is_empty());
        assert!(layers.damaged().is_empty() && layers.list().is_empty());
        assert_eq!(layers.count_damaged_records().unwrap(), 0);
        assert!(layers.damaged_records().unwrap().is_empty());
        let mended = layers.mend(&HashMap::new(), &());
        assert!(mended.records.is_empty() && mended.errors.is_empty());
        assert_eq!(packs(dir.path()), 1);

        assert!(!layers.remove(name).unwrap());
        assert!(layers.unrecorded().is_empty());
        assert!(!files.iter().any(|file| file.exists()));
        assert_eq!(layers.collect(false, &()).orphans.len(), 1);
        assert_eq!(packs(dir.path()), 0);
    }

    /// As a removal leaves it that is cut short.
    #[test]
    fn a_recipe_alone_needs_nothing() {
        let (dir, name, [index, recipe]) = lost();
        fs::remove_file(index).unwrap();
        let layers = open(dir.path());
        let collected = layers.collect(false, &());
        assert!(collected.errors.is_empty());
        assert_eq!(packs(dir.path()), 0);
        assert_eq!(layers.unrecorded(), [name]);
        layers.remove(name).unwrap();
        assert!(!recipe.exists());
    }

    #[test]
    fn what_a_snapshot_has_is_damaged_without_its_record_and_the_index_gives_it_anew() {
        let (dir, name, _) = lost();
        let layers = open(dir.path());
        let told = layers.miss(name).unwrap().to_string();
        assert!(told.contains(": it is gone; `snapctl system repair` makes it anew"));
        assert!(layers.miss(name).is_none());
        assert_eq!(layers.damaged(), [name]);
        assert_eq!(layers.unrecorded(), [name]);
        assert_eq!(layers.count_damaged_records().unwrap(), 1);
        assert!(layers.collect(false, &()).orphans.is_empty());
        assert_eq!(layers.mend(&HashMap::new(), &()).records, [name]);
        assert!(layers.is_whole(name) && layers.miss(name).is_none());
        assert!(layers.damaged().is_empty() && layers.unrecorded().is_empty());

        let mut exported = Vec::new();
        layers.export(name, &mut exported).unwrap();
        assert_eq!(exported, stream());
    }

    #[test]
    fn a_layer_of_which_nothing_is_there_is_missed_until_it_goes() {
        let (dir, name, files) = lost();
        for file in files {
            fs::remove_file(file).unwrap();
        }
        let layers = open(dir.path());
        assert!(layers.miss(name).is_some());
        // Its index may come back.
        assert_eq!(layers.collect(false, &()).errors.len(), 1);
        assert_eq!(layers.mend(&HashMap::new(), &()).errors.len(), 1);
        assert_eq!(packs(dir.path()), 1);
        layers.remove(name).unwrap();
        assert!(layers.damaged().is_empty());
        assert!(layers.collect(false, &()).errors.is_empty());
        assert_eq!(packs(dir.path()), 0);
    }

    #[test]
    fn one_that_is_taken_in_again_or_turns_out_to_be_somebodys_is_recorded() {
        let (dir, name, _) = lost();
        let layers = open(dir.path());
        let diff_id = layers.index_path(name);
        let diff_id = LayerIndex::open(&diff_id, name).unwrap().diff_id();
        let diff_id = sha256(&diff_id.unwrap());
        assert_eq!(layers.recover("sha256:0"), None);
        assert_eq!(layers.recover(&diff_id), Some(name));
        let is_known = |layers: &Layers| layers.is_whole(name) && layers.unrecorded().is_empty();
        assert!(is_known(&layers));
        drop(layers);

        fs::remove_file(dir.path().join(format!("records/{name}.record"))).unwrap();
        let layers = open(dir.path());
        let again = layers.import(&*stream(), &Expected::default(), &());
        assert_eq!(again.unwrap(), name);
        assert!(is_known(&layers));
    }
}
