//! Files of the layers below that have several names, changed by some of them in a snapshot that is in use.

use std::collections::BTreeMap;
use std::fs;
use std::io::Write;
use std::os::unix::fs::{MetadataExt, symlink};

use super::super::{layer, lookup};
use super::*;
use crate::cow::{Caller, Chunking, RenameMode, SetAttr, SetTime, Timestamp, UnionConfig};
use crate::snapshotter::Snapshotter;
use crate::snapshotter::chain::Below;
use crate::snapshotter::tests::{Place, directory_layer_of, prepare, tree};
use crate::store::layers::Expected;

const OWNER: Owner = Owner::Containerd;
const ROOT: NodeId = NodeId::ROOT;

/// The union of a snapshot as a mount opens it, with chunks that are worth it for small files.
fn open(snapshots: &Snapshotter, key: &str) -> Union {
    let chunking = Chunking {
        size: 4096,
        whole_up_to: 16 << 10,
    };
    let config = UnionConfig {
        no_metacopy: false,
        chunking,
        ..snapshots.union_config(OWNER, key).unwrap()
    };
    Union::open(config).unwrap()
}

pub(in crate::snapshotter::diff) fn find(union: &Union, path: &str) -> NodeId {
    let names = path.split('/').filter(|name| !name.is_empty());
    names.fold(ROOT, |parent, name| {
        union.lookup(parent, name.as_ref()).unwrap().node
    })
}

/// A path as the node of its directory and its name.
pub(in crate::snapshotter::diff) fn at<'a>(union: &Union, path: &'a str) -> (NodeId, &'a OsStr) {
    let (above, name) = path.rsplit_once('/').unwrap_or(("", path));
    (find(union, above), name.as_ref())
}

pub(in crate::snapshotter::diff) fn write(union: &Union, path: &str) {
    union
        .write(find(union, path), None, 0, b"changed", None)
        .unwrap();
}

pub(in crate::snapshotter::diff) fn unlink(union: &Union, path: &str) {
    let (parent, name) = at(union, path);
    union.unlink(parent, name).unwrap();
}

pub(in crate::snapshotter::diff) fn rename(union: &Union, from: &str, to: &str) {
    let ((parent, name), (new_parent, new_name)) = (at(union, from), at(union, to));
    union
        .rename(parent, name, new_parent, new_name, RenameMode::Replace)
        .unwrap();
}

pub(in crate::snapshotter::diff) fn set(union: &Union, path: &str, what: SetAttr) {
    union
        .setattr(find(union, path), None, &what, &Caller::ROOT)
        .unwrap();
}

pub(in crate::snapshotter::diff) fn create(union: &Union, path: &str) {
    let (parent, name) = at(union, path);
    let made = union.create(parent, name, 0o644, 0, &Caller::ROOT);
    let (entry, handle) = made.unwrap();
    union.write(entry.node, None, 0, b"anew", None).unwrap();
    union.release(entry.node, handle);
}

/// Files with three names, with two, a large one and symbolic links with two, and one with one.
fn fill(dir: &Path) {
    for made in ["d", "e", "f/deep", "l", "same"] {
        fs::create_dir_all(dir.join(made)).unwrap();
    }
    for (name, size, links) in [
        ("d/a", 5000, &["d/b", "e/c"][..]),
        ("f/deep/x", 10, &["y"]),
        ("l/one", 200_000, &["l/two"]),
        ("alone", 10, &[]),
        ("same/file", 10, &[]),
        ("same/empty", 0, &["d/empty"]),
    ] {
        fs::write(dir.join(name), vec![b'0'; size]).unwrap();
        for link in links {
            fs::hard_link(dir.join(name), dir.join(link)).unwrap();
        }
    }
    symlink("nowhere", dir.join("l/s1")).unwrap();
    fs::hard_link(dir.join("l/s1"), dir.join("s2")).unwrap();
}

fn commit(snapshots: &Snapshotter, name: &str, key: &str) {
    snapshots.commit(OWNER, name, key, BTreeMap::new()).unwrap();
}

fn apply(snapshots: &Snapshotter, key: &str, stream: &[u8]) {
    let layer = (stream, &Expected::default());
    snapshots.apply_layer(OWNER, key, layer, &()).unwrap();
}

fn written(snapshots: &Snapshotter, key: &str) -> Vec<u8> {
    let mut stream = Vec::new();
    snapshots
        .write_layer(OWNER, key, &mut stream, None)
        .unwrap();
    stream
}

/// Upper and work directory: when each object was read and changed.
fn times_below(dir: &Path) -> BTreeMap<PathBuf, [(i64, i64); 2]> {
    let mut times = BTreeMap::new();
    let mut waiting = vec![dir.to_owned()];
    while let Some(path) = waiting.pop() {
        let found = fs::symlink_metadata(&path).unwrap();
        if found.is_dir() {
            let entries = fs::read_dir(&path).unwrap();
            waiting.extend(entries.map(|entry| entry.unwrap().path()));
        }
        // Those of directories move as this reads them, and nobody sees those of the maps of files that are copied up in part.
        let is_map = path.starts_with(dir.join("work/work"));
        let read = match found.is_dir() || is_map {
            true => (0, 0),
            false => (found.atime(), found.atime_nsec()),
        };
        times.insert(path, [read, (found.ctime(), found.ctime_nsec())]);
    }
    times
}

/// The names in a stream, of links with what they go to.
pub(in crate::snapshotter::diff) fn names(stream: &[u8]) -> Vec<String> {
    let mut archive = tar::Archive::new(stream);
    let name = |entry: std::io::Result<tar::Entry<'_, _>>| {
        let entry = entry.unwrap();
        let name = entry.path().unwrap().display().to_string();
        match entry.header().entry_type() {
            tar::EntryType::Link => {
                let target = entry.link_name().unwrap().unwrap();
                format!("{name} = {}", target.display())
            }
            _ => name,
        }
    };
    archive.entries().unwrap().map(name).collect()
}

/// Makes "packed" of packed layers, and "directory" of a directory with the same in it.
fn base(snapshots: &Snapshotter) {
    directory_layer_of(snapshots, "directory", fill);
    let stream = written(snapshots, "directory");
    prepare(snapshots, "unpack", None);
    apply(snapshots, "unpack", &stream);
    commit(snapshots, "packed", "unpack");
}

type Case = (
    &'static str,
    fn(&Union),
    // Names in the layer.
    &'static [&'static str],
);

const CASES: [Case; 19] = [
    (
        "written",
        |union| write(union, "d/a"),
        &["d/", "d/a", "d/b = d/a", "e/", "e/c = d/a"],
    ),
    (
        "attributes",
        |union| {
            let perm = Some(0o600);
            set(
                union,
                "e/c",
                SetAttr {
                    perm,
                    ..SetAttr::default()
                },
            );
        },
        &["d/", "d/a", "d/b = d/a", "e/", "e/c = d/a"],
    ),
    (
        "copied up in part",
        |union| {
            let node = find(union, "l/two");
            union.write(node, None, 100_000, b"changed", None).unwrap();
        },
        &["l/", "l/one", "l/two = l/one"],
    ),
    (
        "cut off",
        |union| {
            let size = Some(150_000);
            set(
                union,
                "l/one",
                SetAttr {
                    size,
                    ..SetAttr::default()
                },
            );
        },
        &["l/", "l/one", "l/two = l/one"],
    ),
    (
        "only a name removed",
        |union| unlink(union, "d/b"),
        &["d/", "d/.wh.b"],
    ),
    (
        "only a name removed of what has no data",
        |union| {
            unlink(union, "s2");
            unlink(union, "same/empty");
        },
        &[".wh.s2", "same/", "same/.wh.empty"],
    ),
    (
        "only a name removed, another in use",
        |union| {
            find(union, "e/c");
            unlink(union, "d/b");
        },
        &["d/", "d/.wh.b"],
    ),
    (
        "a name removed and another put in the place of a file",
        |union| {
            unlink(union, "d/b");
            rename(union, "d/a", "alone");
        },
        &["alone", "d/", "d/.wh.a", "d/.wh.b", "e/", "e/c = alone"],
    ),
    (
        "a name removed",
        |union| {
            write(union, "d/a");
            unlink(union, "d/b");
        },
        &["d/", "d/a", "d/.wh.b", "e/", "e/c = d/a"],
    ),
    (
        "the name removed by which it was written",
        |union| {
            write(union, "d/a");
            unlink(union, "d/a");
        },
        &["d/", "d/.wh.a", "d/b", "e/", "e/c = d/b"],
    ),
    (
        "all but one removed",
        |union| {
            write(union, "d/a");
            unlink(union, "d/a");
            unlink(union, "d/b");
        },
        &["d/", "d/.wh.a", "d/.wh.b", "e/", "e/c"],
    ),
    (
        "moved",
        |union| {
            write(union, "d/a");
            rename(union, "e/c", "d/new");
        },
        &["d/", "d/a", "d/b = d/a", "d/new = d/a", "e/", "e/.wh.c"],
    ),
    (
        "in a directory that was moved",
        |union| {
            rename(union, "f", "same/f");
            write(union, "y");
        },
        &[
            ".wh.f",
            "same/",
            "same/f/",
            "same/f/deep/",
            "same/f/deep/x",
            "y = same/f/deep/x",
        ],
    ),
    (
        "in a directory that was moved and moved back",
        |union| {
            rename(union, "f", "g");
            rename(union, "g", "f");
            write(union, "y");
        },
        &["f/", "f/deep/", "f/deep/x", "y = f/deep/x"],
    ),
    (
        "in a directory that was made anew",
        |union| {
            write(union, "d/a");
            unlink(union, "e/c");
            let (parent, name) = at(union, "e");
            union.rmdir(parent, name).unwrap();
            union.mkdir(parent, name, 0o700, &Caller::ROOT).unwrap();
            create(union, "e/c");
        },
        &["d/", "d/a", "d/b = d/a", "e/", "e/c"],
    ),
    (
        "removed with its directory",
        |union| {
            write(union, "d/a");
            unlink(union, "e/c");
            let (parent, name) = at(union, "e");
            union.rmdir(parent, name).unwrap();
        },
        &["d/", "d/a", "d/b = d/a", ".wh.e"],
    ),
    (
        "another file in the place of a name",
        |union| {
            write(union, "d/a");
            rename(union, "alone", "d/b");
        },
        &[".wh.alone", "d/", "d/a", "d/b", "e/", "e/c = d/a"],
    ),
    (
        "a new name",
        |union| {
            let (parent, name) = at(union, "same/new");
            union.link(find(union, "d/b"), parent, name).unwrap();
        },
        &[
            "d/",
            "d/a",
            "d/b = d/a",
            "e/",
            "e/c = d/a",
            "same/",
            "same/new = d/a",
        ],
    ),
    (
        "a symbolic link",
        |union| {
            let time = Timestamp { sec: 5, nsec: 0 };
            let mtime = Some(SetTime::At(time));
            set(
                union,
                "s2",
                SetAttr {
                    mtime,
                    ..SetAttr::default()
                },
            );
        },
        &["l/", "l/s1", "s2 = l/s1"],
    ),
];

/// Only the name that each was written by was told, and the others stayed what they were.
#[test]
fn a_changed_file_is_told_by_all_of_its_names() {
    let place = Place::new();
    let snapshots = place.open();
    base(&snapshots);
    for (case, change, expected) in CASES {
        for below in ["packed", "directory"] {
            let key = format!("{case}, {below}");
            let info = prepare(&snapshots, &key, Some(below));
            let data = info.upper_dir.unwrap().parent().unwrap().to_owned();
            let union = open(&snapshots, &key);
            change(&union);
            let before = times_below(&data);
            let stream = written(&snapshots, &key);
            assert_eq!(names(&stream), expected, "{key}");
            let told = snapshots.diff(OWNER, &key).unwrap();
            let told = told.iter().map(|change| change.path.to_str().unwrap());
            let told: Vec<_> = told.collect();
            for name in expected.iter().filter(|name| !name.ends_with('/')) {
                let (name, _) = name.split_once(" = ").unwrap_or((name, ""));
                let name = format!("/{}", name.replace(".wh.", ""));
                assert!(told.contains(&&*name), "{key}: {name}, {told:?}");
            }
            // Nobody that is told of it changes anything.
            assert_eq!(times_below(&data), before, "{key}");
            let shown = tree(&union);
            assert!(written(&snapshots, &key) == stream, "{key}");
            drop(union);
            prepare(&snapshots, &format!("copy of {key}"), Some("packed"));
            apply(&snapshots, &format!("copy of {key}"), &stream);
            let copy = tree(&open(&snapshots, &format!("copy of {key}")));
            assert_eq!(copy, shown, "{key}");
        }
    }
}

/// Names that only one of the two sides tells apart were passed over with the directory of the image that has them.
#[test]
fn so_are_those_of_either_side_of_a_comparison() {
    let place = Place::new();
    let snapshots = place.open();
    base(&snapshots);
    let untouched: Case = ("untouched", |_| {}, &[]);
    let cases: Vec<Case> = [untouched].into_iter().chain(CASES).collect();
    for below in ["packed", "directory"] {
        let mut shown = Vec::new();
        for (case, change, _) in &cases {
            let key = format!("{case}, {below}");
            prepare(&snapshots, &key, Some(below));
            let union = open(&snapshots, &key);
            change(&union);
            shown.push(tree(&union));
            drop(union);
            // The left side, as what can be applied to.
            let copy = format!("copy of {key}");
            prepare(&snapshots, &copy, Some("packed"));
            apply(&snapshots, &copy, &written(&snapshots, &key));
            commit(&snapshots, &format!("committed {key}"), &copy);
        }
        let count = cases.len();
        for (left, right) in (0..count).flat_map(|n| [(0, n), (n, 0), (n, n), (n, (n + 7) % count)])
        {
            let [of_left, of_right] = [left, right].map(|n| format!("{}, {below}", cases[n].0));
            let mut stream = Vec::new();
            let told =
                snapshots.write_difference(OWNER, Some(&of_left), &of_right, &mut stream, None);
            told.unwrap();
            let key = format!("{of_left} to {of_right}");
            if left == right {
                assert_eq!(stream, [0; 1024], "{key}");
            }
            prepare(&snapshots, &key, Some(&format!("committed {of_left}")));
            apply(&snapshots, &key, &stream);
            assert_eq!(tree(&open(&snapshots, &key)), shown[right], "{key}");
            snapshots.remove(OWNER, &key).unwrap();
        }
    }
}

/// A snapshot that is in use, on packed layers or on a directory, and what a diff opens of it.
pub(in crate::snapshotter::diff) struct InUse {
    pub(in crate::snapshotter::diff) snapshots: Snapshotter,
    pub(in crate::snapshotter::diff) union: Union,
    below: Below,
    shown: Below,
    upper: PathBuf,
}

impl InUse {
    pub(in crate::snapshotter::diff) fn new(place: &Place, below: &str) -> Self {
        let snapshots = place.open();
        base(&snapshots);
        let info = prepare(&snapshots, "work", Some(below));
        let found = snapshots.catalog.resolve(OWNER, "work").unwrap();
        Self {
            union: open(&snapshots, "work"),
            below: snapshots.below(&found).unwrap(),
            shown: snapshots.shown(&found).unwrap(),
            upper: info.upper_dir.unwrap(),
            snapshots,
        }
    }

    fn reader(&self) -> Union {
        Union::open(self.shown.clone().union()).unwrap()
    }

    /// A walk with `change` in the middle of it, and what it tells.
    fn walk(&self, change: impl FnOnce(&Union)) -> Result<Vec<String>> {
        let new = self.reader();
        let old = Union::open(self.below.clone().union()).unwrap();
        let mut walk = Walk::new(&self.upper, &new, Some(old), Directories::Changed).unwrap();
        change(&self.union);
        while walk.step()? {}
        let path = |step: Step| step.change.path.to_str().unwrap().to_owned();
        let mut told: Vec<_> = walk.finish()?.into_iter().map(path).collect();
        told.sort();
        Ok(told)
    }

    /// Writes a layer, with `change` after its changes were found.
    pub(in crate::snapshotter::diff) fn write(&self, change: impl FnOnce(&Union), out: impl Write) {
        let found = self.snapshots.catalog.resolve(OWNER, "work").unwrap();
        let new = self.reader();
        let changes = self.snapshots.changes_of(&found, &new).unwrap();
        change(&self.union);
        layer::write(&changes, &new, self.shown.view.as_deref(), out, None).unwrap();
    }

    fn written(&self, change: impl FnOnce(&Union)) -> Vec<u8> {
        let mut stream = Vec::new();
        self.write(change, &mut stream);
        stream
    }
}

/// A layer with some of the names is a wrong one, and nobody would know.
#[test]
fn what_is_changed_meanwhile_is_told_by_all_names_or_by_none() {
    for below in ["packed", "directory"] {
        let place = Place::new();
        let work = InUse::new(&place, below);
        write(&work.union, "same/file");
        write(&work.union, "l/one");
        // By all, for it had a copy when the walk began.
        let told = work.walk(|union| unlink(union, "s2")).unwrap();
        let expected = ["/l/one", "/l/two", "/s2", "/same/file"];
        assert_eq!(told, expected.map(str::to_owned), "{below}");
        // By none, for it had none.
        let told = work.walk(|union| write(union, "d/a")).unwrap();
        assert_eq!(told, expected.map(str::to_owned), "{below}");
        let told = work.walk(|_| {}).unwrap();
        for name in ["/d/a", "/d/b", "/e/c"] {
            assert!(told.iter().any(|told| told == name), "{below}: {told:?}");
        }
        let told = work.walk(|union| {
            for name in ["d/a", "d/b", "e/c"] {
                unlink(union, name);
            }
        });
        let told = told.unwrap();
        for name in ["/d/a", "/d/b", "/e/c"] {
            assert!(told.iter().any(|told| told == name), "{below}: {told:?}");
        }
    }
}

/// It is not told by the new name as it was: of that only a view knows the way to it. Without it a file that was moved would
/// be lost.
#[test]
fn what_gets_a_name_meanwhile_is_told_as_it_was_or_not_at_all() {
    let place = Place::new();
    let work = InUse::new(&place, "packed");
    let told = work.walk(|union| {
        rename(union, "d/a", "moved");
        write(union, "moved");
    });
    assert_eq!(told.unwrap(), ["/d", "/d/a", "/moved"].map(str::to_owned));
    let place = Place::new();
    let work = InUse::new(&place, "directory");
    let refused = work.walk(|union| {
        rename(union, "d/a", "moved");
        write(union, "moved");
    });
    let refused = refused.unwrap_err();
    assert!(matches!(refused, Error::LinksChanged), "{refused}");
    assert!(work.walk(|_| {}).is_ok());
}

/// As when the last of them goes while one is looked up.
#[test]
fn a_file_that_has_no_copy_any_more_does_not_come_back_under_its_other_names() {
    for below in ["packed", "directory"] {
        let place = Place::new();
        let work = InUse::new(&place, below);
        write(&work.union, "d/a");
        let reader = work.reader();
        let index = work.upper.with_file_name("work").join("index");
        fs::remove_dir_all(&index).unwrap();
        fs::create_dir(&index).unwrap();
        let found = lookup(&reader, find(&reader, "e"), "c".as_ref());
        assert!(found.unwrap().is_none(), "{below}");
    }
}

/// The one name is told for it was moved, and is to be a link to the other, which is what it was.
#[test]
fn so_is_what_is_changed_while_the_layer_is_written() {
    let place = Place::new();
    let work = InUse::new(&place, "packed");
    rename(&work.union, "f", "g");
    let expected = [".wh.f", "g/", "g/deep/", "g/deep/x = y"];
    let written = |change: &dyn Fn(&Union)| names(&work.written(|union| change(union)));
    assert_eq!(written(&|_| {}), expected.map(str::to_owned));
    let stays = written(&|union| {
        write(union, "d/a");
        write(union, "y");
    });
    assert_eq!(stays, expected.map(str::to_owned));
    let told = written(&|_| {});
    for name in ["d/a", "e/c = d/a", "y = g/deep/x"] {
        assert!(told.iter().any(|told| told == name), "{told:?}");
    }
}
