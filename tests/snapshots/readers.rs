//! Usage, Diff and Commit of a mounted snapshot see what a reader inside the mount sees, also of files that are open and
//! mapped, whatever the kernel keeps to itself.
//!
//! - `churn`: what is made, removed and replaced all the time.
//! - `content`: names, sizes and bytes.
//! - `usage`: what it takes on disk.
//! - `times`: when everything was changed.
//! - `dirtied`: bytes of large files that are written to for the first time while somebody looks.
//! - `links`: files of the image that have several names.
//! - `mapped`: many files that are written through mappings alone.

use std::collections::BTreeMap;
use std::fs::{self, File};
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};

use plywood::snapshotter::{Owner, ParentRef, Snapshotter, SnapshotterConfig};
use plywood::store::ingest::Settings;

use super::mapping;

/// Has a check made in every way in which the kernel may keep something to itself.
macro_rules! in_every_mode {
    ($check:ident) => {
        #[test]
        fn by_default() {
            $check("");
        }

        #[test]
        fn with_writeback() {
            $check("writeback");
        }

        #[test]
        fn without_opens() {
            $check("no_open");
        }

        #[test]
        fn with_writeback_and_without_opens() {
            $check("no_open,writeback");
        }

        #[test]
        fn with_passthrough() {
            $check("passthrough");
        }

        #[test]
        fn without_any_feature_of_the_kernel() {
            $check("kernel_features=-all");
        }
    };
}

mod churn;
mod content;
mod dirtied;
mod links;
mod mapped;
mod times;
mod usage;

const OWNER: Owner = Owner::Snapctl;
/// Large enough that a mount copies it up in chunks.
const LARGE: usize = 3 << 20;
const SMALL: usize = 100_000;

/// plyfs with more options.
fn plyfs_with(dir: &Path, options: &str) -> PathBuf {
    let path = dir.join("plyfs");
    let plyfs = env!("CARGO_BIN_EXE_plyfs");
    let script = format!("#!/bin/sh\nexec {plyfs} -o '{options}' \"$@\"\n");
    fs::write(&path, script).unwrap();
    fs::set_permissions(&path, fs::Permissions::from_mode(0o755)).unwrap();
    path
}

struct Place {
    dir: tempfile::TempDir,
    snapshots: Snapshotter,
}

impl Place {
    fn new(options: &str) -> Self {
        let dir = tempfile::tempdir().unwrap();
        let config = SnapshotterConfig {
            plyfs: Some(plyfs_with(dir.path(), options)),
            // The kernel reads by itself what is kept as it is.
            packing: Settings {
                small: 10_000,
                plain: options.contains("passthrough"),
                ..Settings::default()
            },
            ..SnapshotterConfig::default()
        };
        let (root, state) = (dir.path().join("root"), dir.path().join("state"));
        let snapshots = Snapshotter::open(&root, &state, config).unwrap();
        Self { dir, snapshots }
    }

    fn prepare(&self, key: &str, on: Option<&str>) -> PathBuf {
        let on = on.map(|key| ParentRef {
            owner: OWNER,
            key: key.to_owned(),
        });
        let snapshots = &self.snapshots;
        snapshots
            .prepare(OWNER, key, on.as_ref(), BTreeMap::new())
            .unwrap();
        snapshots.mount(OWNER, key).unwrap().path
    }

    fn commit(&self, name: &str, key: &str) {
        let committed = self.snapshots.commit(OWNER, name, key, BTreeMap::new());
        assert!(committed.unwrap().layer_dirs.is_empty());
    }
}

impl Drop for Place {
    fn drop(&mut self) {
        for snapshot in self.snapshots.list(None).unwrap() {
            let _ = self.snapshots.unmount(snapshot.owner, &snapshot.key);
        }
        let _ = self.dir.path();
    }
}

/// Opens a file to write to it, which is made if it is not there.
fn writer(path: impl AsRef<Path>) -> File {
    let mut options = File::options();
    let options = options.read(true).write(true).create(true).truncate(false);
    options.open(path).unwrap()
}
