//! What is committed is what was there.

use std::collections::BTreeMap;
use std::ffi::OsStr;
use std::fs;
use std::os::unix::net::UnixListener;
use std::path::PathBuf;

use super::super::tests::{Place, directory_layer, look, names_in, prepare, tree};
use super::super::{Change, ChangeKind};
use super::*;
use crate::cow::{
    Attr, Caller, Chunking, FileKind, NodeId, RenameMode, SetAttr, SetTime, SetXattrMode,
    Timestamp, UnionConfig,
};
use crate::store::LayerName;
use crate::store::layers::Expected;

mod effort;
mod failures;
mod longest;
mod random;

const OWNER: Owner = Owner::Containerd;
const ROOT: NodeId = NodeId::ROOT;

/// The union of a snapshot as a mount opens it, with chunks that are worth it for small files.
fn open(snapshots: &Snapshotter, key: &str) -> Union {
    let config = UnionConfig {
        no_metacopy: false,
        chunking: Chunking {
            size: 4096,
            whole_up_to: 16 << 10,
        },
        ..snapshots.union_config(OWNER, key).unwrap()
    };
    Union::open(config).unwrap()
}

fn commit(snapshots: &Snapshotter, name: &str, key: &str) -> SnapshotInfo {
    let info = snapshots.commit(OWNER, name, key, BTreeMap::new()).unwrap();
    assert!(info.layer_dirs.is_empty(), "{info:?}");
    info
}

fn find(union: &Union, path: &str) -> NodeId {
    let names = path.split('/').filter(|name| !name.is_empty());
    names.fold(ROOT, |parent, name| {
        union.lookup(parent, name.as_ref()).unwrap().node
    })
}

fn write(union: &Union, parent: NodeId, name: &str, content: &[u8]) -> NodeId {
    let made = union.create(parent, name.as_ref(), 0o644, 0, &Caller::ROOT);
    let (entry, handle) = made.unwrap();
    union.write(entry.node, None, 0, content, None).unwrap();
    union.release(entry.node, handle);
    entry.node
}

fn set(union: &Union, node: NodeId, set: SetAttr) -> Attr {
    union.setattr(node, None, &set, &Caller::ROOT).unwrap()
}

/// Bytes that no file of another seed has.
fn noise(seed: u64, length: usize) -> Vec<u8> {
    let mut bytes = vec![0; length];
    let mut hash = blake3::Hasher::new();
    hash.update(&seed.to_le_bytes());
    hash.finalize_xof().fill(&mut bytes);
    bytes
}

fn changes(snapshots: &Snapshotter, key: &str) -> Vec<(String, ChangeKind)> {
    let told = |Change { path, kind }| (path.to_string_lossy().into_owned(), kind);
    snapshots
        .diff(OWNER, key)
        .unwrap()
        .into_iter()
        .map(told)
        .collect()
}

/// Files of the store that hold contents, and their bytes.
fn stored(place: &Place) -> (usize, u64) {
    let mut found = (0, 0);
    let mut waiting = ["packs", "objects"]
        .map(|dir| place.root().join("store").join(dir))
        .to_vec();
    while let Some(dir) = waiting.pop() {
        for entry in fs::read_dir(dir).unwrap() {
            let entry = entry.unwrap();
            match entry.file_type().unwrap().is_dir() {
                true => waiting.push(entry.path()),
                false => {
                    found.0 += 1;
                    found.1 += entry.metadata().unwrap().len();
                }
            }
        }
    }
    found
}

/// Everything that a tree has: parent, name and node.
fn all(union: &Union) -> Vec<(NodeId, std::ffi::OsString, NodeId, FileKind)> {
    let mut found = Vec::new();
    let mut waiting = vec![ROOT];
    while let Some(directory) = waiting.pop() {
        let mut names = names_in(union, directory);
        names.sort();
        for name in names {
            let entry = union.lookup(directory, &name).unwrap();
            if entry.attr.kind == FileKind::Directory {
                waiting.push(entry.node);
            }
            found.push((directory, name, entry.node, entry.attr.kind));
        }
    }
    found
}

fn remove_all(union: &Union, parent: NodeId, name: &OsStr) {
    let Ok(entry) = union.lookup(parent, name) else {
        return;
    };
    if entry.attr.kind != FileKind::Directory {
        union.unlink(parent, name).unwrap();
        return;
    }
    for inner in names_in(union, entry.node) {
        remove_all(union, entry.node, &inner);
    }
    union.rmdir(parent, name).unwrap();
}

fn everything(snapshots: &Snapshotter, key: &str) -> (String, BTreeMap<PathBuf, String>) {
    let union = open(snapshots, key);
    (look(&union, ROOT), tree(&union))
}

/// Files of 5,000 bytes in directories of ten, and two large ones.
fn fill(union: &Union) {
    for directory in 0..20 {
        let name = format!("directory {directory}");
        let made = union.mkdir(ROOT, name.as_ref(), 0o755, &Caller::ROOT);
        let node = made.unwrap().node;
        for file in 0..10 {
            write(
                union,
                node,
                &file.to_string(),
                &noise(directory * 10 + file, 5000),
            );
        }
    }
    write(union, ROOT, "large", &noise(1000, 1 << 20));
    write(union, ROOT, "another", &noise(1001, 1 << 20));
}

fn base(place: &Place) -> Snapshotter {
    let snapshots = place.open();
    prepare(&snapshots, "fill", None);
    fill(&open(&snapshots, "fill"));
    commit(&snapshots, "base", "fill");
    snapshots
}

fn layer_of(snapshots: &Snapshotter, info: &SnapshotInfo) -> LayerName {
    let found = snapshots.catalog.resolve(OWNER, &info.key).unwrap();
    found.record.packed.unwrap()
}

#[test]
fn what_changes_owners_and_names_alone_brings_no_content() {
    let place = Place::new();
    let snapshots = base(&place);
    let before = stored(&place);
    prepare(&snapshots, "work", Some("base"));
    let union = open(&snapshots, "work");
    for (_, _, node, _) in all(&union) {
        let owner = SetAttr {
            uid: Some(1000),
            gid: Some(1000),
            ..SetAttr::default()
        };
        set(&union, node, owner);
    }
    for number in 0..10 {
        let (old, new) = (format!("directory {number}"), format!("moved {number}"));
        let renamed = union.rename(ROOT, old.as_ref(), ROOT, new.as_ref(), RenameMode::Replace);
        renamed.unwrap();
    }
    union
        .link(find(&union, "large"), ROOT, "link".as_ref())
        .unwrap();
    // Cut off, it still is what it was.
    set(
        &union,
        find(&union, "another"),
        SetAttr {
            size: Some(1_000_000),
            ..SetAttr::default()
        },
    );
    drop(union);
    let shown = everything(&snapshots, "work");
    commit(&snapshots, "top", "work");
    assert_eq!(stored(&place), before);
    let usage = snapshots.usage(OWNER, "top").unwrap();
    assert!(usage.size < 100_000, "{usage:?}");
    // The root, directories and files, but not the link.
    assert_eq!(usage.inodes, 1 + 20 + 200 + 2);
    prepare(&snapshots, "look", Some("top"));
    assert_eq!(everything(&snapshots, "look"), shown);
}

#[test]
fn of_a_file_that_is_changed_in_part_only_that_is_kept() {
    let place = Place::new();
    let snapshots = base(&place);
    let mut expected = noise(1000, 1 << 20);
    let mut below = "base".to_owned();
    let mut objects = Vec::new();
    for round in 0..MOST_COMMITS {
        let before = stored(&place);
        let key = format!("work {round}");
        prepare(&snapshots, &key, Some(&below));
        let union = open(&snapshots, &key);
        let file = find(&union, "large");
        for at in [round * 50_000, 1_000_000] {
            let content = noise(at as u64 + 7, 100);
            union.write(file, None, at as u64, &content, None).unwrap();
            expected[at..at + 100].copy_from_slice(&content);
        }
        drop(union);
        below = format!("layer {round}");
        let info = commit(&snapshots, &below, &key);
        let layer = snapshots
            .packed_layers()
            .index(layer_of(&snapshots, &info))
            .unwrap();
        objects.push(layer.object_count());
        let grown = stored(&place).1 - before.1;
        assert!(
            grown < 64 << 10 || layer.object_count() == 1,
            "{grown} bytes in round {round}"
        );
        prepare(&snapshots, "look", Some(&below));
        let union = open(&snapshots, "look");
        let mut content = vec![0; 1 << 20];
        union
            .read(find(&union, "large"), None, 0, &mut content)
            .unwrap();
        assert!(content == expected, "round {round}");
        drop(union);
        snapshots.remove(OWNER, "look").unwrap();
    }
    // Each brings one more, until the file is written whole.
    assert_eq!(objects[..4], [2, 3, 4, 5]);
    assert!(
        objects.contains(&1) && objects.iter().all(|count| *count <= 9),
        "{objects:?}"
    );
}

/// Until a file that is changed again and again was written whole, and some more.
const MOST_COMMITS: usize = 12;

#[test]
fn a_name_that_nothing_was_done_to_stays_a_link_of_one_that_was_moved() {
    let place = Place::new();
    let snapshots = place.open();
    prepare(&snapshots, "fill", None);
    let union = open(&snapshots, "fill");
    for name in ["moved", "kept"] {
        union
            .mkdir(ROOT, name.as_ref(), 0o755, &Caller::ROOT)
            .unwrap();
    }
    let file = write(&union, find(&union, "moved"), "file", b"one content");
    union
        .link(file, find(&union, "kept"), "link".as_ref())
        .unwrap();
    let inner = write(&union, find(&union, "moved"), "both", b"two");
    union
        .link(inner, find(&union, "moved"), "names".as_ref())
        .unwrap();
    drop(union);
    commit(&snapshots, "base", "fill");
    prepare(&snapshots, "work", Some("base"));
    let union = open(&snapshots, "work");
    let renamed = union.rename(
        ROOT,
        "moved".as_ref(),
        ROOT,
        "away".as_ref(),
        RenameMode::Replace,
    );
    renamed.unwrap();
    drop(union);
    let shown = everything(&snapshots, "work");
    assert!(shown.1[OsStr::new("kept/link").as_ref() as &Path].starts_with("away/file "));
    commit(&snapshots, "top", "work");
    prepare(&snapshots, "look", Some("top"));
    assert_eq!(everything(&snapshots, "look"), shown);
    // So it is in a stream.
    let mut stream = Vec::new();
    snapshots
        .write_layer(OWNER, "top", &mut stream, None)
        .unwrap();
    prepare(&snapshots, "copy", Some("base"));
    let layer = (&*stream, &Expected::default());
    snapshots.apply_layer(OWNER, "copy", layer, &()).unwrap();
    assert_eq!(everything(&snapshots, "copy").1, shown.1);
}

#[test]
fn a_committed_layer_is_exported_as_the_same_stream_each_time() {
    let place = Place::new();
    let snapshots = base(&place);
    prepare(&snapshots, "work", Some("base"));
    let union = open(&snapshots, "work");
    let fresh = write(&union, ROOT, "new", b"");
    union
        .write(fresh, None, 1 << 20, &noise(5, 10_000), None)
        .unwrap();
    union
        .write(find(&union, "large"), None, 500_000, b"changed", None)
        .unwrap();
    union.link(fresh, ROOT, "zlink".as_ref()).unwrap();
    union
        .setxattr(fresh, "user.name".as_ref(), b"value", SetXattrMode::Any)
        .unwrap();
    union.unlink(ROOT, "another".as_ref()).unwrap();
    union
        .symlink(ROOT, "symlink".as_ref(), "large".as_ref(), &Caller::ROOT)
        .unwrap();
    remove_all(&union, ROOT, "directory 3".as_ref());
    let device = libc::makedev(1, 3);
    union
        .mknod(
            ROOT,
            "null".as_ref(),
            libc::S_IFCHR | 0o666,
            device,
            &Caller::ROOT,
        )
        .unwrap();
    drop(union);
    let shown = everything(&snapshots, "work").1;
    let info = commit(&snapshots, "top", "work");
    let layers = snapshots.packed_layers();
    let export = || {
        let mut stream = Vec::new();
        let written = layers.export(layer_of(&snapshots, &info), &mut stream);
        written.map(|()| stream)
    };
    let stream = export().unwrap();
    assert!(export().unwrap() == stream);
    assert!(stream.len() < 1_200_000, "{}: no holes", stream.len());
    prepare(&snapshots, "copy", Some("base"));
    let layer = (&*stream, &Expected::default());
    snapshots.apply_layer(OWNER, "copy", layer, &()).unwrap();
    assert_eq!(everything(&snapshots, "copy").1, shown);

    // What a stream cannot say is left out, or refused.
    for (name, kind) in [("socket", libc::S_IFSOCK), (".wh.name", libc::S_IFREG)] {
        prepare(&snapshots, name, Some("base"));
        let union = open(&snapshots, name);
        union
            .mknod(ROOT, name.as_ref(), kind | 0o600, 0, &Caller::ROOT)
            .unwrap();
        let trusted = OsStr::new("trusted.name");
        union
            .setxattr(ROOT, trusted, b"x", SetXattrMode::Any)
            .unwrap();
        drop(union);
        let info = commit(&snapshots, &format!("{name} committed"), name);
        let mut stream = Vec::new();
        let written = layers.export(layer_of(&snapshots, &info), &mut stream);
        match kind {
            libc::S_IFSOCK => assert_eq!(stream, [0; 1024]),
            _ => {
                let problem = written.unwrap_err().to_string();
                assert!(
                    problem.contains(".wh.name") && problem.contains("marks a deletion"),
                    "{problem}"
                );
            }
        }
    }
}

#[test]
fn the_changes_of_a_snapshot_are_told_the_same_before_and_after_its_commit() {
    let place = Place::new();
    let snapshots = base(&place);
    prepare(&snapshots, "work", Some("base"));
    let union = open(&snapshots, "work");
    let of = |name: &str| find(&union, name);
    let name = OsStr::new("user.name");
    let noted = union.setxattr(of("directory 1"), name, b"1", SetXattrMode::Any);
    noted.unwrap();
    // Copied up, and as it was.
    let (file, directory) = (of("directory 2/3"), of("directory 2"));
    let time = union.getattr(directory, None).unwrap().mtime;
    set(
        &union,
        file,
        SetAttr {
            perm: Some(0o600),
            ..SetAttr::default()
        },
    );
    set(
        &union,
        directory,
        SetAttr {
            mtime: Some(SetTime::At(time)),
            ..SetAttr::default()
        },
    );
    let renamed = union.rename(
        ROOT,
        "directory 4".as_ref(),
        ROOT,
        "moved".as_ref(),
        RenameMode::Replace,
    );
    renamed.unwrap();
    drop(union);
    let told = changes(&snapshots, "work");
    assert_eq!(told.len(), 1 + 1 + 1 + 11, "{told:?}");
    commit(&snapshots, "top", "work");
    assert_eq!(changes(&snapshots, "top"), told);
}

#[test]
fn times_of_any_year_and_objects_without_content_are_kept() {
    let place = Place::new();
    let snapshots = place.open();
    let upper = prepare(&snapshots, "work", None).upper_dir.unwrap();
    let _socket = UnixListener::bind(upper.join("socket")).unwrap();
    let union = open(&snapshots, "work");
    let at = |sec| {
        SetTime::At(Timestamp {
            sec,
            nsec: 123_456_789,
        })
    };
    let dir = union
        .mkdir(ROOT, "dir".as_ref(), 0o755, &Caller::ROOT)
        .unwrap()
        .node;
    let file = write(&union, dir, "file", b"");
    let mut expected = Vec::new();
    for (node, sec) in [
        (file, -2_000_000_000),
        (dir, 10_000_000_000),
        (ROOT, 4_000_000_000),
    ] {
        let times = SetAttr {
            atime: Some(at(sec + 1)),
            mtime: Some(at(sec)),
            ..SetAttr::default()
        };
        let attr = set(&union, node, times);
        expected.push((attr.atime, attr.mtime));
    }
    drop(union);
    commit(&snapshots, "done", "work");
    prepare(&snapshots, "look", Some("done"));
    let union = open(&snapshots, "look");
    let found = ["dir/file", "dir", ""].map(|path| {
        let attr = union.getattr(find(&union, path), None).unwrap();
        (attr.atime, attr.mtime)
    });
    assert_eq!(found.as_slice(), expected);
    let socket = union.getattr(find(&union, "socket"), None).unwrap();
    assert_eq!(socket.kind, FileKind::Socket);
}

#[test]
fn on_a_layer_that_is_a_directory_commits_go_on_as_directories() {
    let place = Place::new();
    let snapshots = place.open();
    directory_layer(&snapshots, "base");
    let upper = prepare(&snapshots, "work", Some("base")).upper_dir.unwrap();
    fs::write(upper.join("file"), "1").unwrap();
    let info = snapshots
        .commit(OWNER, "top", "work", BTreeMap::new())
        .unwrap();
    assert_eq!((info.layer_dirs.len(), info.packed_layers.len()), (2, 0));
    assert_eq!(
        changes(&snapshots, "top"),
        [("/file".to_owned(), ChangeKind::Added)]
    );
}

/// As fsck leaves a directory that had not come to the disk whole. It stayed for good.
#[test]
fn what_is_no_directory_among_the_uppers_is_cleared() {
    let place = Place::new();
    let stray = place.root().join("snapshots/data/stray");
    let snapshots = place.open();
    snapshots.close().unwrap();
    drop(snapshots);
    fs::write(&stray, "").unwrap();
    place.open().wait_until_deleted();
    assert!(!stray.exists());
}
