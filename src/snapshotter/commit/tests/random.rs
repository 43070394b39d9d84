//! Anything that can be done to a tree, on layers of which the same is true.

use proptest::prelude::*;

use super::*;
use crate::snapshotter::diff::PackedViews;
use crate::store::gc::Collected;
use crate::store::view::Verify;

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
                    .write(entry.node, None, number % 3 * 50_000, &content, None)
                    .unwrap();
                union.release(entry.node, handle);
            }
        }
        3 | 4 => {
            if let Some(file) = file {
                let _ = union.write(file, None, number, &noise(number, size / 8), None);
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
                if step.other.is_multiple_of(2) {
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

/// A step with nothing that the stream of a layer cannot say or that is not taken from one: names of whiteouts, sockets, most
/// extended attributes, and times before 1970.
fn speakable(step: Step) -> Step {
    let is_whiteout = NAMES[usize::from(step.number) % NAMES.len()].starts_with(".wh.");
    let what = match (step.what % 18, step.one % 5) {
        (13, 1) | (16, _) => 4,
        (what, _) => what,
    };
    let is_early = matches!(what, 14 | 15) && step.other.is_multiple_of(4);
    Step {
        what,
        one: step.one,
        other: step.other + u8::from(is_early),
        number: step.number + u16::from(is_whiteout),
    }
}

/// Everything, but for where files have holes: of those in a stream are only whole blocks.
fn without_holes(union: &Union) -> BTreeMap<PathBuf, String> {
    let mut all = tree(union);
    for look in all.values_mut().filter(|look| look.contains(" Regular ")) {
        let (rest, content) = look.rsplit_once("] ").unwrap();
        let (rest, _) = rest.rsplit_once(" [").unwrap();
        *look = format!("{rest} {content}");
    }
    all
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

/// The changes of a committed snapshot, found by comparing all that there is.
fn all_changes(snapshots: &Snapshotter, name: &str) -> Vec<(String, ChangeKind)> {
    let mut chain = snapshots.stat(OWNER, name).unwrap().packed_layers;
    chain.reverse();
    let layers = snapshots.packed_layers();
    let view = |chain: &[LayerName]| layers.view(chain, Verify::First).unwrap();
    let (topmost, new) = (chain.len() - 1, view(&chain));
    let old = (topmost > 0).then(|| view(&chain[..topmost]));
    let views = PackedViews {
        new: &new,
        old: old.as_ref(),
        topmost: topmost as u16,
    };
    let all = views.everywhere().unwrap().into_iter();
    let mut all: Vec<_> = all
        .map(|change| (change.path.to_string_lossy().into_owned(), change.kind))
        .collect();
    all.sort();
    all
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 40, failure_persistence: None, ..ProptestConfig::default() })]

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
            prop_assert_eq!(&told, &all_changes(&snapshots, &name));
            let more: Vec<_> = after.1.keys().filter(|path| !before.1.contains_key(*path)).collect();
            prop_assert!(more.is_empty(), "{more:?} after {told:?}");
            snapshots.remove(OWNER, "look").unwrap();
            below = Some(name);
        }
        snapshots.wait_until_deleted();
        let Collected { errors, .. } = snapshots.packed_layers().collect(false, &());
        prop_assert!(errors.is_empty());
    }

    #[test]
    fn what_a_diff_tells_of_a_snapshot_in_use_makes_it_of_its_parent(
        rounds in proptest::collection::vec((steps(), any::<bool>()), 1..5)
    ) {
        let place = Place::new();
        let snapshots = place.open();
        let mut below: Option<String> = None;
        let apply = |key: &str, below: Option<&str>, layer: &[u8]| {
            prepare(&snapshots, key, below);
            snapshots.apply_layer(OWNER, key, (layer, &Expected::default()), &()).unwrap();
        };
        for (number, (steps, with_layer)) in rounds.into_iter().enumerate() {
            let name = format!("layer {number}");
            match with_layer {
                true => apply("work", below.as_deref(), &applied()),
                false => drop(prepare(&snapshots, "work", below.as_deref())),
            }
            prepare(&snapshots, "left", below.as_deref());
            let union = open(&snapshots, "work");
            for step in steps {
                take(&union, speakable(step));
            }
            let shown = without_holes(&union);
            let mut layer = Vec::new();
            snapshots.write_layer(OWNER, "work", &mut layer, None).unwrap();
            apply("copy", below.as_deref(), &layer);
            prop_assert_eq!(&without_holes(&open(&snapshots, "copy")), &shown);
            layer.clear();
            snapshots.write_difference(OWNER, Some("left"), "work", &mut layer, None).unwrap();
            apply("other copy", below.as_deref(), &layer);
            prop_assert_eq!(&without_holes(&open(&snapshots, "other copy")), &shown);
            drop(union);
            commit(&snapshots, &name, "work");
            for key in ["left", "copy", "other copy"] {
                snapshots.remove(OWNER, key).unwrap();
            }
            below = Some(name);
        }
    }
}
