//! An image store of its own for each test.

use std::path::{Path, PathBuf};
use std::sync::Arc;

use plywood::image::{Error, Image, ImageStore, Limits, Observer, Progress, Result};
use plywood::snapshotter::{Owner, ParentRef, Snapshotter, SnapshotterConfig};

use super::tree::{self, Tree};

pub struct Store {
    pub images: Arc<ImageStore>,
    pub snapshotter: Arc<Snapshotter>,
    pub dir: tempfile::TempDir,
}

/// Nobody watches, nobody cancels.
pub struct Quiet;

impl Observer for Quiet {
    fn progress(&self, _progress: Progress) {}
    fn cancelled(&self) -> bool {
        false
    }
}

impl Store {
    pub fn new() -> Self {
        Self::with(Limits::default())
    }

    pub fn with(limits: Limits) -> Self {
        Self::open(tempfile::tempdir().unwrap(), limits)
    }

    /// On another disk than the system's.
    pub fn within(dir: &Path) -> Self {
        Self::open(tempfile::tempdir_in(dir).unwrap(), Limits::default())
    }

    fn open(dir: tempfile::TempDir, limits: Limits) -> Self {
        let (images, snapshotter) = open(dir.path(), limits);
        Self {
            images,
            snapshotter,
            dir,
        }
    }

    /// As plyd does when it starts again.
    pub fn reopen(self) -> Self {
        self.snapshotter.close().unwrap();
        let Self { dir, .. } = self;
        let (images, snapshotter) = open(dir.path(), Limits::default());
        Self {
            images,
            snapshotter,
            dir,
        }
    }

    pub fn root(&self) -> PathBuf {
        self.dir.path().join("root")
    }

    pub fn load(&self, mut archive: &[u8]) -> Result<Vec<Image>> {
        let total = archive.len() as u64;
        let loaded = self.images.load(&mut archive, None, total, &Quiet)?;
        Ok(loaded.into_iter().map(|loaded| loaded.image).collect())
    }

    pub fn load_one(&self, archive: &[u8]) -> Image {
        let mut images = self.load(archive).unwrap();
        assert_eq!(images.len(), 1);
        images.remove(0)
    }

    /// Refused, with a message that has all of these words; and nothing of it is left.
    pub fn refuses(&self, archive: &[u8], words: &[&str]) {
        let error = self.load(archive).expect_err("was accepted");
        let message = error.to_string();
        for word in words {
            assert!(message.contains(word), "{word:?} is not in {message:?}");
        }
        assert!(
            !matches!(error, Error::Io { .. } | Error::Union { .. }),
            "not seen as the archive's fault: {message}"
        );
        self.assert_empty();
    }

    /// No image, no layer, no spool, no half-made snapshot.
    pub fn assert_empty(&self) {
        assert_eq!(self.images.list().unwrap(), []);
        assert_eq!(self.snapshotter.list(None).unwrap(), []);
        self.snapshotter.wait_until_deleted();
        for dir in [
            "images/spool",
            "images/records",
            "images/names",
            "layers",
            "store/layers",
            "store/records",
            "store/tmp",
            "snapshots/data",
        ] {
            let left: Vec<_> = names(&self.root().join(dir));
            assert!(left.is_empty(), "left in {dir}: {left:?}");
        }
    }

    /// Everything that a container of the image would see.
    pub fn tree(&self, image: &Image) -> Tree {
        let key = format!("look-{}", image.id);
        let parent = ParentRef {
            owner: Owner::Image,
            key: image.chain_id.clone(),
        };
        self.snapshotter
            .prepare(Owner::Snapctl, &key, Some(&parent), Default::default())
            .unwrap();
        let config = self.snapshotter.union_config(Owner::Snapctl, &key).unwrap();
        let tree = tree::of_union(config);
        self.snapshotter.remove(Owner::Snapctl, &key).unwrap();
        tree
    }
}

pub fn names(dir: &Path) -> Vec<std::ffi::OsString> {
    match std::fs::read_dir(dir) {
        Ok(entries) => entries.map(|entry| entry.unwrap().file_name()).collect(),
        Err(_) => Vec::new(),
    }
}

fn open(dir: &Path, limits: Limits) -> (Arc<ImageStore>, Arc<Snapshotter>) {
    let root = dir.join("root");
    let mut config = SnapshotterConfig::default();
    config.packing.limits = limits;
    let snapshotter = Snapshotter::open(&root, &dir.join("state"), config).unwrap();
    let snapshotter = Arc::new(snapshotter);
    let images = ImageStore::open(&root, Arc::clone(&snapshotter)).unwrap();
    (Arc::new(images), snapshotter)
}
