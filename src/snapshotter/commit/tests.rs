//! What is committed is what was there.

use std::collections::BTreeMap;
use std::ffi::OsStr;
use std::path::PathBuf;

use proptest::prelude::*;

use super::super::tests::{Place, directory_layer, look, names_in, prepare, tree};
use super::super::{Change, ChangeKind};
use super::*;
use crate::cow::{
    Attr, Caller, Chunking, FileKind, NodeId, RenameMode, SetAttr, SetTime, SetXattrMode,
    Timestamp, UnionConfig,
};
use crate::store::gc::Collected;
use crate::store::layers::Expected;

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
    union.write(entry.node, None, 0, content, false).unwrap();
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
        for entry in std::fs::read_dir(dir).unwrap() {
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

/// One thing that is done to a tree; the numbers choose among what there is.
#[derive(Clone, Copy, Debug)]
struct Step {
    what: u8,
    one: u8,
    other: u8,
    number: u16,
}

fn steps() -> impl Strategy<Value = Vec<Step>> {
    let step = any::<(u8, u8, u8, u16)>().prop_map(|(what, one, other, number)| Step {
        what,
        one,
        other,
        number,
    });
    proptest::collection::vec(step, 0..40)
}

const NAMES: [&str; 8] = [
    "a",
    "b",
    "c",
    "d",
    "e",
    ".wh.f",
    "g",
    "h-long-enough-to-differ",
];
const SIZES: [usize; 6] = [0, 10, 5000, 20_000, 60_000, 200_000];

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

/// Does it, or finds that it cannot be done.
fn take(union: &Union, step: Step) {
    let all = all(union);
    let pick = |number: u8| all.get(usize::from(number) % all.len().max(1)).cloned();
    let directories: Vec<NodeId> = [ROOT]
        .into_iter()
        .chain(
            all.iter()
                .filter(|(.., kind)| *kind == FileKind::Directory)
                .map(|(_, _, node, _)| *node),
        )
        .collect();
    let directory = directories[usize::from(step.other) % directories.len()];
    let name: &OsStr = NAMES[usize::from(step.number) % NAMES.len()].as_ref();
    let size = SIZES[usize::from(step.other) % SIZES.len()];
    let number = u64::from(step.number);
    let files: Vec<NodeId> = all
        .iter()
        .filter(|(.., kind)| *kind == FileKind::Regular)
        .map(|(_, _, node, _)| *node)
        .collect();
    let file = files
        .get(usize::from(step.one) % files.len().max(1))
        .copied();
    // What is refused is no less a test.
    match step.what % 18 {
        0..3 => {
            if let Ok((entry, handle)) = union.create(directory, name, 0o644, 0, &Caller::ROOT) {
                let content = noise(number, SIZES[usize::from(step.one) % SIZES.len()]);
                union
                    .write(entry.node, None, number % 3 * 50_000, &content, false)
                    .unwrap();
                union.release(entry.node, handle);
            }
        }
        3 | 4 => {
            if let Some(file) = file {
                let _ = union.write(file, None, number, &noise(number, size / 8), false);
            }
        }
        5 => {
            if let Some(file) = file {
                set(
                    union,
                    file,
                    SetAttr {
                        size: Some(number * 3),
                        ..SetAttr::default()
                    },
                );
            }
        }
        6 | 7 => drop(union.mkdir(directory, name, 0o750, &Caller::ROOT)),
        8 => {
            if let Some((parent, name, ..)) = pick(step.one) {
                remove_all(union, parent, &name);
                if step.other % 2 == 0 {
                    drop(union.mkdir(parent, &name, 0o711, &Caller::ROOT));
                }
            }
        }
        9 | 10 => {
            if let Some((parent, old, ..)) = pick(step.one) {
                drop(union.rename(parent, &old, directory, name, RenameMode::Replace));
            }
        }
        11 => {
            if let (Some(one), Some(other)) = (pick(step.one), pick(step.other)) {
                drop(union.rename(one.0, &one.1, other.0, &other.1, RenameMode::Exchange));
            }
        }
        12 => {
            if let Some((_, _, node, kind)) = pick(step.one)
                && kind != FileKind::Directory
            {
                drop(union.link(node, directory, name));
            }
        }
        13 => {
            let kinds = [
                (libc::S_IFIFO, 0),
                (libc::S_IFSOCK, 0),
                (libc::S_IFCHR, libc::makedev(1, 3)),
                (libc::S_IFBLK, libc::makedev(254, 70_000)),
            ];
            match kinds.get(usize::from(step.one) % 5) {
                Some((kind, device)) => {
                    drop(union.mknod(directory, name, kind | 0o600, *device, &Caller::ROOT))
                }
                None => drop(union.symlink(directory, name, OsStr::new("../a/b"), &Caller::ROOT)),
            }
        }
        14 | 15 => {
            let node = pick(step.one).map_or(ROOT, |(_, _, node, _)| node);
            let link = union.getattr(node, None).unwrap().kind == FileKind::Symlink;
            let times = [-7_000_000_001, 5, 4_000_000_000, 9_000_000_000];
            let time = SetTime::At(Timestamp {
                sec: times[usize::from(step.other) % 4],
                nsec: u32::from(step.number),
            });
            let what = SetAttr {
                uid: (number % 2 == 0).then_some(3_000_000_000),
                gid: (number % 3 == 0).then_some(7),
                perm: (number % 5 == 0 && !link).then_some(0o6755),
                mtime: (number % 7 < 3).then_some(time),
                ..SetAttr::default()
            };
            set(union, node, what);
        }
        16 => {
            let node = pick(step.one).map_or(ROOT, |(_, _, node, _)| node);
            let names = [
                "user.one",
                "trusted.two",
                "trusted.overlay.opaque",
                "security.three",
            ];
            let name = names[usize::from(step.other) % names.len()];
            drop(union.setxattr(node, name.as_ref(), &noise(number, 5), SetXattrMode::Any));
        }
        _ => {
            let node = pick(step.one).map_or(ROOT, |(_, _, node, _)| node);
            for name in union.listxattr(node).unwrap() {
                union.removexattr(node, &name).unwrap();
            }
        }
    }
}

fn everything(snapshots: &Snapshotter, key: &str) -> (String, BTreeMap<PathBuf, String>) {
    let union = open(snapshots, key);
    (look(&union, ROOT), tree(&union))
}

/// A layer that has something of most of the names.
fn applied() -> Vec<u8> {
    let mut tar = tar::Builder::new(Vec::new());
    let mut add = |path: &str, kind: tar::EntryType, content: &[u8]| {
        let mut header = tar::Header::new_gnu();
        header.set_entry_type(kind);
        header.set_mode(0o755);
        header.set_size(content.len() as u64);
        tar.append_data(&mut header, path, content).unwrap();
    };
    use tar::EntryType::{Directory, Regular};
    add(".wh.a", Regular, b"");
    add("b", Directory, b"");
    add("b/.wh..wh..opq", Regular, b"");
    add("b/c", Regular, b"of the layer");
    add("c", Directory, b"");
    add("c/d", Directory, b"");
    add("c/d/e", Regular, &noise(1, 30_000));
    add("g", Regular, b"");
    tar.into_inner().unwrap()
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 60, failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn what_is_committed_shows_what_it_showed(
        rounds in proptest::collection::vec((steps(), any::<bool>()), 1..5)
    ) {
        let place = Place::new();
        let snapshots = place.open();
        let mut below: Option<String> = None;
        for (number, (steps, with_layer)) in rounds.into_iter().enumerate() {
            let name = format!("layer {number}");
            prepare(&snapshots, "work", below.as_deref());
            if with_layer {
                let layer = applied();
                snapshots.apply_layer(OWNER, "work", (&*layer, &Expected::default()), &()).unwrap();
            }
            let union = open(&snapshots, "work");
            for step in steps {
                take(&union, step);
            }
            drop(union);
            let before = everything(&snapshots, "work");
            commit(&snapshots, &name, "work");
            prepare(&snapshots, "look", Some(&name));
            let after = everything(&snapshots, "look");
            prop_assert_eq!(before.0, after.0);
            for (path, look) in &before.1 {
                prop_assert_eq!(Some(look), after.1.get(path), "{}", path.display());
            }
            let told = changes(&snapshots, &name);
            let more: Vec<_> = after.1.keys().filter(|path| !before.1.contains_key(*path)).collect();
            prop_assert!(more.is_empty(), "{more:?} after {told:?}");
            snapshots.remove(OWNER, "look").unwrap();
            below = Some(name);
        }
        snapshots.wait_until_deleted();
        let Collected { errors, .. } = snapshots.packed_layers().collect(false, &());
        prop_assert!(errors.is_empty());
    }
}
