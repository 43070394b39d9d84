//! Usage, Diff and Commit of a mounted snapshot see what a reader inside the mount sees, also of files that are open and
//! mapped, whatever the kernel keeps to itself.

use std::collections::BTreeMap;
use std::fs::{self, File};
use std::os::unix::fs::{FileExt, MetadataExt, PermissionsExt};
use std::path::{Path, PathBuf};

use plywood::snapshotter::{Owner, ParentRef, Snapshotter, SnapshotterConfig};
use plywood::store::Time;
use plywood::store::ingest::Settings;
use plywood::store::layers::Expected;

use super::mapping;

const OWNER: Owner = Owner::Snapctl;
/// Large enough that a mount copies it up in chunks.
const LARGE: usize = 3 << 20;
const SMALL: usize = 100_000;

/// Size, time of the last change, and content of every file.
type Seen = BTreeMap<String, (u64, (i64, i64), blake3::Hash)>;

fn seen(root: &Path) -> Seen {
    let look = |entry: std::io::Result<fs::DirEntry>| {
        let entry = entry.unwrap();
        let content = fs::read(entry.path()).unwrap();
        let metadata = entry.metadata().unwrap();
        let time = (metadata.mtime(), metadata.mtime_nsec());
        let name = entry.file_name().into_string().unwrap();
        (name, (metadata.len(), time, blake3::hash(&content)))
    };
    fs::read_dir(root).unwrap().map(look).collect()
}

/// The same without times: of a file that is mapped, the kernel may find out when it was written only while it is flushed.
fn contents(seen: &Seen) -> Vec<(&String, u64, blake3::Hash)> {
    let files = seen.iter();
    files
        .map(|(name, (size, _, hash))| (name, *size, *hash))
        .collect()
}

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

fn in_mode(options: &str) {
    let place = Place::new(options);
    let root = place.prepare("fill", None);
    for (name, size) in [
        ("large", LARGE),
        ("mapped", SMALL),
        ("cut", SMALL),
        ("left", SMALL),
    ] {
        fs::write(root.join(name), vec![b'0'; size]).unwrap();
    }
    place.commit("base", "fill");

    let root = place.prepare("work", Some("base"));
    let open = |name: &str| {
        let mut options = File::options();
        let options = options.read(true).write(true).create(true).truncate(false);
        options.open(root.join(name)).unwrap()
    };
    let files = ["large", "mapped", "cut", "new"].map(open);
    let [large, mapped, cut, new] = &files;
    new.set_len(SMALL as u64).unwrap();
    let mut maps = [large, mapped, new].map(mapping::shared_mut);
    let write = |maps: &mut [memmap2::MmapMut; 3], round: u8| {
        for map in &mut *maps {
            let middle = map.len() / 2;
            map[middle + usize::from(round) * 10..][..5].fill(b'm');
        }
        for file in &files {
            let at = u64::from(round) * 20_000;
            file.write_all_at(&[b'w'; 10_000], at).unwrap();
        }
        let end = cut.metadata().unwrap().len();
        cut.set_len(end - 7).unwrap();
        new.write_all_at(b"end", (SMALL + usize::from(round)) as u64)
            .unwrap();
    };

    write(&mut maps, 1);
    let usage = place.snapshots.usage(OWNER, "work").unwrap();
    assert!(usage.size >= 10_000 * 4, "{options}: {usage:?}");
    let reader = seen(&root);
    assert_eq!(reader["new"].0, SMALL as u64 + 4);

    write(&mut maps, 2);
    let mut stream = Vec::new();
    let snapshots = &place.snapshots;
    snapshots
        .write_layer(OWNER, "work", &mut stream, Time::default())
        .unwrap();
    let reader = seen(&root);
    assert_eq!(reader.len(), 5);
    let copy = place.prepare("copy", Some("base"));
    let layer = (&*stream, &Expected::default());
    snapshots.apply_layer(OWNER, "copy", layer, &()).unwrap();
    assert_eq!(seen(&copy), reader, "{options}: the diff");

    write(&mut maps, 3);
    let reader = seen(&root);
    place.commit("done", "work");
    let view = place.prepare("look", Some("done"));
    let committed = seen(&view);
    assert_eq!(
        contents(&committed),
        contents(&reader),
        "{options}: the commit"
    );
    assert_eq!(committed["cut"], reader["cut"], "{options}: times");
    let usage = snapshots.usage(OWNER, "done").unwrap();
    assert!(usage.size >= 10_000 * 4, "{options}: {usage:?}");
}

#[test]
fn by_default() {
    in_mode("");
}

#[test]
fn with_writeback() {
    in_mode("writeback");
}

#[test]
fn without_opens() {
    in_mode("no_open");
}

#[test]
fn with_writeback_and_without_opens() {
    in_mode("no_open,writeback");
}

#[test]
fn with_passthrough() {
    in_mode("passthrough");
}

#[test]
fn without_any_feature_of_the_kernel() {
    in_mode("kernel_features=-all");
}
