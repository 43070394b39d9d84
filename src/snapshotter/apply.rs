//! A layer's tar stream as the content of an active snapshot, straight into the store.
//!
//! Nothing goes through the mount: the stream becomes a packed layer, which lies below the snapshot's upper from then
//! on. Commit makes it the content of the committed snapshot, if the upper has nothing of its own; else one layer of both.

use std::fs;
use std::io::Read;

use super::catalog::Found;
use super::chain;
use super::mounts::Mounts;
use super::types::*;
use super::{Snapshotter, diff, upper};
use crate::store::LayerName;
use crate::store::ingest::Observer;
use crate::store::layers::Expected;

/// What was applied.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct AppliedLayer {
    /// `sha256:` and the hash of the tar stream.
    pub diff_id: String,
    /// Bytes of the tar stream.
    pub tar_bytes: u64,
}

impl Snapshotter {
    /// Takes a layer in as what the active snapshot `key` changes. `stream` is its tar, plain or compressed; it is not
    /// read if the store knows the digest that it is expected to have. A live mount is made anew, and shows the layer. Fails
    /// with [`Error::NotPacked`] or [`Error::NotPristine`] where the layer has to be unpacked through the mount
    /// instead.
    pub fn apply_layer(
        &self,
        owner: Owner,
        key: &str,
        layer: (impl Read + Send, &Expected<'_>),
        observer: &dyn Observer,
    ) -> Result<AppliedLayer> {
        let applied = self.locked(owner, key, |found| {
            self.expect_active(&found)?;
            self.expect_pristine(&found)?;
            let ancestors = self.catalog.ancestors(&found.record)?;
            let below = match ancestors.first() {
                Some(parent) => self.packed_below(parent)?,
                None => Vec::new(),
            };
            let (stream, expected) = layer;
            let imported = self.packed.import(below, stream, expected, observer)?;
            let name = imported.name;
            let not_recorded = || Error::NotPristine {
                key: key.to_owned(),
            };
            let record = self.packed.layers().get(name).ok_or_else(not_recorded)?;
            let was_mounted = self.mounts.point(&found.id).is_some();
            // Again: whoever bound the mount meanwhile may have written.
            self.expect_pristine(&found)?;
            self.end_mount(&found, Mounts::unmount)?;
            self.expect_pristine(&found)?;

            let mut with_layer = found.clone();
            with_layer.record.packed = Some(name);
            self.renew_upper(&with_layer)?;
            let updated = self
                .catalog
                .update(&found, |record| record.packed = Some(name))?;
            imported.used();
            if was_mounted {
                self.mount_found(&updated)?;
            }
            Ok(AppliedLayer {
                diff_id: record.diff_id.unwrap_or_default(),
                tar_bytes: record.tar_bytes,
            })
        });
        // The layer may have been known, and damaged.
        self.refresh_mounts_and_log();
        applied
    }

    /// Fails if the snapshot has anything of its own, or somebody may be about to write to it.
    fn expect_pristine(&self, found: &Found) -> Result<()> {
        let upper = self.data.join(&found.id).join("upper");
        if found.record.packed.is_none()
            && upper::is_empty(&upper)?
            && self.mounts.places(&found.id)?.is_empty()
        {
            return Ok(());
        }
        Err(Error::NotPristine {
            key: found.record.key.clone(),
        })
    }

    /// Makes the empty upper's root what the layers below say, for one of them may be new.
    fn renew_upper(&self, found: &Found) -> Result<()> {
        let root = self.root_of(found)?;
        let upper = self.data.join(&found.id).join("upper");
        fs::remove_dir(&upper).map_err(io_error("make anew", &upper))?;
        upper::make(&upper, root.as_ref()).map_err(io_error("make", &upper))?;
        upper::sync(&upper).map_err(io_error("make durable", &upper))
    }

    /// The applied layer of a snapshot that is not mounted, if its upper says nothing that the layers below do not say.
    pub(super) fn untouched(&self, found: &Found) -> Result<Option<LayerName>> {
        let upper = self.data.join(&found.id).join("upper");
        let Some(applied) = found.record.packed else {
            return Ok(None);
        };
        if !upper::is_empty(&upper)? {
            return Ok(None);
        }
        // As a lower layer: a plyfs whose mount is still read may have the work directory.
        let own = upper::Root::of_directory(&upper)?;
        let below = self.root_of(found)?;
        Ok(below
            .is_some_and(|below| own.is_same(&below))
            .then_some(applied))
    }

    /// What the packed layer that a snapshot has takes.
    pub(super) fn usage_of_packed(&self, found: &Found) -> Usage {
        let usage = found.record.packed.map(|layer| self.packed.usage(layer));
        usage.unwrap_or_default()
    }

    /// What a snapshot's own packed layer changes, if it has one.
    pub(super) fn diff_packed(&self, found: &Found) -> Result<Vec<super::Change>> {
        if found.record.packed.is_none() {
            return Ok(Vec::new());
        }
        let ancestors = self.catalog.ancestors(&found.record)?;
        let ancestors: Vec<&Found> = ancestors.iter().collect();
        let mut chain = chain::packed_in(found, &ancestors);
        let new = self.packed.view(chain.clone())?;
        chain.remove(0);
        // A view has no more layers than that.
        let topmost = u16::try_from(chain.len()).unwrap_or(u16::MAX);
        let old = self.packed.view(chain)?;
        match new {
            Some(new) => diff::diff_packed(&new, old.as_deref(), topmost),
            None => Ok(Vec::new()),
        }
    }
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeMap;
    use std::os::unix::fs::{MetadataExt, PermissionsExt};

    use super::super::tests::{Place, directory_layer, layer, prepare};
    use super::super::{Change, ChangeKind};
    use super::*;
    use crate::cow::{NodeId, Union};

    const OWNER: Owner = Owner::Containerd;

    /// A layer of these files, each its own name's content.
    fn tar(files: &[&str]) -> Vec<u8> {
        let mut tar = tar::Builder::new(Vec::new());
        for file in files {
            let mut header = tar::Header::new_gnu();
            header.set_mode(0o644);
            header.set_size(file.len() as u64);
            tar.append_data(&mut header, file, file.as_bytes()).unwrap();
        }
        tar.into_inner().unwrap()
    }

    fn apply(snapshots: &Snapshotter, key: &str, tar: &[u8]) -> Result<AppliedLayer> {
        snapshots.apply_layer(OWNER, key, (tar, &Expected::default()), &())
    }

    fn commit(snapshots: &Snapshotter, name: &str, key: &str) -> SnapshotInfo {
        let committed = snapshots.commit(OWNER, name, key, BTreeMap::new());
        committed.unwrap()
    }

    fn changes(snapshots: &Snapshotter, key: &str) -> Vec<(String, ChangeKind)> {
        let told = |Change { path, kind }| (path.to_string_lossy().into_owned(), kind);
        let changes = snapshots.diff(OWNER, key).unwrap();
        changes.into_iter().map(told).collect()
    }

    fn shows(snapshots: &Snapshotter, key: &str, name: &str) -> bool {
        let union = Union::open(snapshots.union_config(OWNER, key).unwrap()).unwrap();
        let root = union.getattr(NodeId::ROOT, None).unwrap();
        assert_eq!((root.perm, root.mtime.sec), (0o755, 0));
        union.lookup(NodeId::ROOT, name.as_ref()).is_ok()
    }

    #[test]
    fn an_applied_layer_is_what_is_committed() {
        let place = Place::new();
        let snapshots = place.open();
        for (name, key, on) in [("base", "one", None), ("top", "two", Some("base"))] {
            prepare(&snapshots, key, on);
            let applied = apply(&snapshots, key, &tar(&[name])).unwrap();
            assert!(applied.diff_id.starts_with("sha256:"));
            assert!(shows(&snapshots, key, name));
            assert_eq!(
                changes(&snapshots, key),
                [(format!("/{name}"), ChangeKind::Added)]
            );
            let active = snapshots.usage(OWNER, key).unwrap();
            let info = commit(&snapshots, name, key);
            assert!(info.layer_dirs.is_empty() && info.upper_dir.is_none());
            assert_eq!(info.packed_layers.len(), 1 + usize::from(on.is_some()));
            let committed = snapshots.usage(OWNER, name).unwrap();
            assert!(committed.size > 0 && committed.size <= active.size);
            assert_eq!(
                changes(&snapshots, name),
                [(format!("/{name}"), ChangeKind::Added)]
            );
        }
        snapshots.remove(OWNER, "top").unwrap();
        snapshots.remove(OWNER, "base").unwrap();
        snapshots.wait_until_deleted();
        assert_eq!(snapshots.packed_layers().list(), []);
    }

    #[test]
    fn what_is_written_on_an_applied_layer_is_committed_with_it() {
        let place = Place::new();
        let snapshots = place.open();
        let upper = prepare(&snapshots, "work", None).upper_dir.unwrap();
        apply(&snapshots, "work", &tar(&["a", "b"])).unwrap();
        fs::write(upper.join("b"), "changed").unwrap();
        fs::write(upper.join("c"), "").unwrap();
        let expected = ["/a", "/b", "/c"].map(|path| (path.to_owned(), ChangeKind::Added));
        assert_eq!(changes(&snapshots, "work"), expected);
        drop(snapshots);

        // The record says so, and a new plyd finds all of it.
        let snapshots = place.open();
        assert_eq!(changes(&snapshots, "work"), expected);
        let info = commit(&snapshots, "done", "work");
        assert_eq!((info.layer_dirs.len(), info.packed_layers.len()), (0, 1));
        assert_eq!(changes(&snapshots, "done"), expected);
        // One layer of both, and nothing is left of the one that was applied.
        snapshots.wait_until_deleted();
        assert_eq!(snapshots.packed_layers().list().len(), 1);
        prepare(&snapshots, "next", Some("done"));
        assert!(changes(&snapshots, "next").is_empty());
        apply(&snapshots, "next", &tar(&["d"])).unwrap();
        snapshots.remove(OWNER, "next").unwrap();
        snapshots.remove(OWNER, "done").unwrap();
        snapshots.wait_until_deleted();
        assert_eq!(snapshots.packed_layers().list(), []);
        assert_eq!(
            fs::read_dir(place.root().join("layers")).unwrap().count(),
            0
        );
    }

    #[test]
    fn a_known_layer_that_is_damaged_is_taken_in_once_more() {
        let place = Place::new();
        let snapshots = place.open();
        let stream = tar(&["a", "b"]);
        prepare(&snapshots, "one", None);
        let diff_id = apply(&snapshots, "one", &stream).unwrap().diff_id;
        let layers = snapshots.packed_layers();
        let name = layers.list()[0].0;
        let recipe = place.root().join(format!("store/layers/{name}.tar"));
        fs::remove_file(&recipe).unwrap();
        assert!(!layers.is_whole(name));
        prepare(&snapshots, "two", None);
        let expected = Expected {
            blob: None,
            diff_id: Some(&diff_id),
        };
        let layer = (&*stream, &expected);
        snapshots.apply_layer(OWNER, "two", layer, &()).unwrap();
        assert!(layers.is_whole(name) && recipe.exists());
        assert_eq!(layers.list().len(), 1);
        // A whole one is not read.
        prepare(&snapshots, "three", None);
        let unread: (&[u8], _) = (b"nonsense", &expected);
        snapshots.apply_layer(OWNER, "three", unread, &()).unwrap();
    }

    #[test]
    fn a_changed_root_directory_is_kept() {
        let place = Place::new();
        let snapshots = place.open();
        let upper = prepare(&snapshots, "work", None).upper_dir.unwrap();
        apply(&snapshots, "work", &tar(&["a"])).unwrap();
        assert_eq!(fs::metadata(&upper).unwrap().mode() & 0o7777, 0o755);
        fs::set_permissions(&upper, fs::Permissions::from_mode(0o1755)).unwrap();
        let info = commit(&snapshots, "done", "work");
        assert_eq!((info.layer_dirs.len(), info.packed_layers.len()), (0, 1));
        let upper = prepare(&snapshots, "next", Some("done")).upper_dir.unwrap();
        assert_eq!(fs::metadata(upper).unwrap().mode() & 0o7777, 0o1755);
    }

    #[test]
    fn a_layer_is_applied_once_and_to_nothing_else() {
        let place = Place::new();
        let snapshots = place.open();
        let upper = prepare(&snapshots, "written", None).upper_dir.unwrap();
        fs::write(upper.join("file"), "").unwrap();
        let refused = apply(&snapshots, "written", &tar(&["a"]));
        assert!(matches!(refused, Err(Error::NotPristine { .. })));
        prepare(&snapshots, "twice", None);
        apply(&snapshots, "twice", &tar(&["a"])).unwrap();
        let refused = apply(&snapshots, "twice", &tar(&["b"]));
        assert!(matches!(refused, Err(Error::NotPristine { .. })));
        layer(&snapshots, "committed", None);
        let refused = apply(&snapshots, "committed", &tar(&["a"]));
        assert!(matches!(refused, Err(Error::NotActive { .. })));
        snapshots.remove(OWNER, "committed").unwrap();
        // No packed layer can lie on what an earlier plyd has left.
        directory_layer(&snapshots, "directory");
        prepare(&snapshots, "on a directory", Some("directory"));
        let refused = apply(&snapshots, "on a directory", &tar(&["a"]));
        assert!(matches!(refused, Err(Error::NotPacked { .. })));
        // What was refused has left no layer behind.
        snapshots.wait_until_deleted();
        assert_eq!(snapshots.packed_layers().list().len(), 1);
        // A broken stream leaves the snapshot as it was.
        prepare(&snapshots, "broken", None);
        let stream = tar(&["a"]);
        let broken = apply(&snapshots, "broken", &stream[..stream.len() / 2 + 300]);
        assert!(matches!(broken, Err(Error::Store(_))));
        assert!(changes(&snapshots, "broken").is_empty());
        apply(&snapshots, "broken", &stream).unwrap();
    }
}
