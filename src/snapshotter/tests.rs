//! The life cycle without mounts, and what `open` makes of crashes and damage.

use std::collections::HashSet;
use std::fs;
use std::os::fd::AsFd;
use std::os::unix::fs::{MetadataExt, PermissionsExt};
use std::time::{Duration, SystemTime};

use nix::errno::Errno;

use super::*;
use crate::cow::{self, Union, UnionConfig};
use crate::store::layer::LayerId;
use crate::sys::fs::Object;
use crate::sys::xattr;

pub(super) struct Place {
    dir: PathBuf,
    _tmp: Option<tempfile::TempDir>,
}

impl Place {
    pub(super) fn new() -> Self {
        let tmp = tempfile::tempdir().unwrap();
        Self {
            dir: tmp.path().to_owned(),
            _tmp: Some(tmp),
        }
    }

    /// In a directory that the caller keeps.
    pub(super) fn at(dir: &Path) -> Self {
        Self {
            dir: dir.to_owned(),
            _tmp: None,
        }
    }

    pub(super) fn root(&self) -> PathBuf {
        self.dir.join("root")
    }

    pub(super) fn open(&self) -> Snapshotter {
        let state = self.dir.join("state");
        let config = SnapshotterConfig {
            index_prober: Some("/bin/true".into()),
            ..SnapshotterConfig::default()
        };
        let snapshots = Snapshotter::open(&self.root(), &state, config).unwrap();
        // As plyd does once it knows which images there are.
        snapshots.settle_records();
        snapshots
    }
}

fn parent(key: &str) -> ParentRef {
    ParentRef {
        owner: Owner::Containerd,
        key: key.to_owned(),
    }
}

pub(super) fn prepare(snapshots: &Snapshotter, key: &str, on: Option<&str>) -> SnapshotInfo {
    let on = on.map(parent);
    snapshots
        .prepare(Owner::Containerd, key, on.as_ref(), BTreeMap::new())
        .unwrap()
}

/// Prepares on `on`, writes a file of the same name, commits.
pub(super) fn layer(snapshots: &Snapshotter, name: &str, on: Option<&str>) -> SnapshotInfo {
    let key = format!("extract {name}");
    let info = prepare(snapshots, &key, on);
    fs::write(info.upper_dir.unwrap().join(name), name).unwrap();
    snapshots
        .commit(Owner::Containerd, name, &key, BTreeMap::new())
        .unwrap()
}

/// As `layer` on nothing, as a plyd before packed layers left it.
pub(super) fn directory_layer(snapshots: &Snapshotter, name: &str) -> SnapshotInfo {
    directory_layer_of(snapshots, name, |upper| {
        fs::write(upper.join(name), name).unwrap();
    })
}

/// A layer with what `fill` puts in, as a plyd before packed layers left it.
pub(super) fn directory_layer_of(
    snapshots: &Snapshotter,
    name: &str,
    fill: impl FnOnce(&Path),
) -> SnapshotInfo {
    let upper = prepare(snapshots, name, None).upper_dir.unwrap();
    fill(&upper);
    let found = snapshots.catalog.resolve(Owner::Containerd, name).unwrap();
    let layer = LayerId(found.id.clone());
    snapshots.layers.adopt(&layer, &upper).unwrap();
    let committed = snapshots.catalog.update(&found, |record| {
        record.kind = Kind::Committed;
        record.layer = Some(layer);
        record.usage = Some(Usage::default());
    });
    fs::remove_dir_all(snapshots.data.join(&found.id)).unwrap();
    snapshots.describe(committed.unwrap()).unwrap()
}

/// Everything below the root, as whoever looks at it sees it: attributes, what it is, and the first of its names.
pub(super) fn tree(union: &Union) -> BTreeMap<PathBuf, String> {
    let mut found = BTreeMap::new();
    let mut waiting = vec![(PathBuf::new(), cow::NodeId::ROOT)];
    while let Some((path, directory)) = waiting.pop() {
        for name in names_in(union, directory) {
            let entry = union.lookup(directory, &name).unwrap();
            let path = path.join(&name);
            if entry.attr.kind == cow::FileKind::Directory {
                waiting.push((path.clone(), entry.node));
            }
            found.insert(path, (entry.attr.ino, look(union, entry.node)));
        }
    }
    let mut first: BTreeMap<u64, PathBuf> = BTreeMap::new();
    let named = found.into_iter().map(|(path, (ino, text))| {
        let first = first.entry(ino).or_insert_with(|| path.clone());
        let text = format!("{} {text}", first.display());
        (path, text)
    });
    named.collect()
}

pub(super) fn names_in(union: &Union, directory: cow::NodeId) -> Vec<std::ffi::OsString> {
    let handle = union.open_dir(directory).unwrap();
    let mut names = Vec::new();
    let mut take = |entry: cow::DirEntry| {
        if entry.name != "." && entry.name != ".." {
            names.push(entry.name);
        }
        true
    };
    union.read_dir(directory, &handle, 0, &mut take).unwrap();
    names
}

/// All that a user can see of an object but its number, its change time and when it was read.
pub(super) fn look(union: &Union, node: cow::NodeId) -> String {
    use cow::FileKind::{Directory, Regular, Symlink};

    let attr = union.getattr(node, None).unwrap();
    let what = match attr.kind {
        Directory => String::new(),
        Symlink => format!("{:?}", union.readlink(node).unwrap()),
        Regular => {
            let mut content = vec![0; attr.size as usize];
            let count = union.read(node, None, 0, &mut content).unwrap();
            assert_eq!(count, content.len());
            let digits = blake3::hash(&content).to_hex();
            format!("{:?} {}", data(union, node, attr.size), &digits[..16])
        }
        _ => attr.rdev.to_string(),
    };
    let mut xattrs: Vec<_> = union.listxattr(node).unwrap();
    xattrs.sort();
    let xattrs: Vec<_> = xattrs
        .into_iter()
        .map(|name| (union.getxattr(node, &name).unwrap(), name))
        .collect();
    let (links, size) = match attr.kind {
        Directory => (0, 0),
        _ => (attr.nlink, attr.size),
    };
    format!(
        "{:?} {:o} {}:{} {:?} {size} {links} {xattrs:?} {what}",
        attr.kind, attr.perm, attr.uid, attr.gid, attr.mtime
    )
}

/// The parts of a file that are no holes.
fn data(union: &Union, node: cow::NodeId, size: u64) -> Vec<(i64, i64)> {
    let mut parts = Vec::new();
    let mut at = 0;
    while at < size as i64
        && let Ok(from) = union.lseek(node, None, at, libc::SEEK_DATA)
    {
        at = union.lseek(node, None, from, libc::SEEK_HOLE).unwrap();
        parts.push((from, at));
    }
    parts
}

fn keys(snapshots: &Snapshotter) -> Vec<String> {
    let all = snapshots.list(None).unwrap();
    all.into_iter().map(|info| info.key).collect()
}

/// No tree that no record names.
fn assert_tidy(place: &Place, snapshots: &Snapshotter) {
    snapshots.wait_until_deleted();
    let count = |dir: &str| fs::read_dir(place.root().join(dir)).unwrap().count();
    let all = snapshots.list(None).unwrap();
    let committed = |info: &&SnapshotInfo| info.kind == Kind::Committed;
    let directories: Vec<_> = all.iter().flat_map(|info| &info.layer_dirs).collect();
    assert_eq!(count("layers"), HashSet::<_>::from_iter(directories).len());
    let packed: Vec<_> = all.iter().flat_map(|info| &info.packed_layers).collect();
    assert_eq!(
        snapshots.packed_layers().list().len(),
        HashSet::<_>::from_iter(packed).len()
    );
    assert_eq!(
        count("snapshots/data"),
        all.iter().filter(|info| !committed(info)).count()
    );
    assert_eq!(count("trash"), 0);
}

#[test]
fn from_prepare_to_remove() {
    let place = Place::new();
    let snapshots = place.open();
    let base = layer(&snapshots, "base", None);
    assert_eq!(base.kind, Kind::Committed);
    layer(&snapshots, "top", Some("base"));
    let info = prepare(&snapshots, "container", Some("top"));
    assert_eq!(info.parent, Some(parent("top")));
    assert_eq!((info.layer_dirs.len(), info.packed_layers.len()), (0, 2));
    assert_eq!(keys(&snapshots), ["base", "top", "container"]);

    let config = snapshots
        .union_config(Owner::Containerd, "container")
        .unwrap();
    assert!(config.lowers.is_empty());
    assert_eq!(
        config.upper.as_ref().unwrap().dir,
        *info.upper_dir.as_ref().unwrap()
    );
    let union = Union::open(config).unwrap();
    for name in ["base", "top"] {
        assert!(union.lookup(cow::NodeId::ROOT, name.as_ref()).is_ok());
    }
    drop(union);

    let error = snapshots.remove(Owner::Containerd, "top").unwrap_err();
    assert!(matches!(error, Error::HasChildren { children: 1, .. }));
    assert!(error.to_string().contains("remove"));
    for key in ["container", "top", "base"] {
        snapshots.remove(Owner::Containerd, key).unwrap();
    }
    assert_eq!(keys(&snapshots), [""; 0]);
    assert_tidy(&place, &snapshots);
}

#[test]
fn a_layer_on_a_directory_is_a_directory_and_whole_whatever_little_was_changed() {
    let place = Place::new();
    let snapshots = place.open();
    let text = "data\n".repeat(100_000);
    let base = directory_layer(&snapshots, "base");
    for name in ["file", "linked"] {
        fs::write(base.layer_dirs[0].join(name), &text).unwrap();
    }
    let commit = |name: &str, key: &str| {
        snapshots
            .commit(Owner::Containerd, name, key, BTreeMap::new())
            .unwrap()
    };
    let info = prepare(&snapshots, "container", Some("base"));
    {
        let config = UnionConfig {
            no_metacopy: false,
            ..snapshots
                .union_config(Owner::Containerd, "container")
                .unwrap()
        };
        let union = Union::open(config).unwrap();
        let file = union.lookup(cow::NodeId::ROOT, "file".as_ref()).unwrap();
        let set = cow::SetAttr {
            perm: Some(0o600),
            ..cow::SetAttr::default()
        };
        let root = cow::Caller::ROOT;
        union.setattr(file.node, None, &set, &root).unwrap();
        let linked = union.lookup(cow::NodeId::ROOT, "linked".as_ref()).unwrap();
        union
            .link(linked.node, cow::NodeId::ROOT, "link".as_ref())
            .unwrap();
    }
    let upper = info.upper_dir.unwrap();
    assert!(fs::metadata(upper.join("file")).unwrap().blocks() < 16);
    let changes = snapshots.diff(Owner::Containerd, "container").unwrap();
    let paths: Vec<_> = changes
        .iter()
        .map(|change| change.path.to_str().unwrap())
        .collect();
    assert_eq!(paths, ["/file", "/link", "/linked"]);
    let before = snapshots.usage(Owner::Containerd, "container").unwrap();
    let layer = commit("top", "container").layer_dirs[0].clone();
    for name in ["file", "link", "linked"] {
        assert!(fs::read_to_string(layer.join(name)).unwrap() == text);
        let dir = fs::File::open(&layer).unwrap();
        let object = Object::Entry(dir.as_fd(), name.as_ref());
        let mark = xattr::get(object, "trusted.overlay.metacopy".as_ref());
        assert_eq!(mark, Err(Errno::ENODATA));
    }
    let usage = snapshots.usage(Owner::Containerd, "top").unwrap();
    // The marks of a copy may have had a block of ext4's, which goes with them.
    let marks = 2 * 4096;
    assert!(usage.size + marks >= before.size + 2 * text.len() as u64);
}

#[test]
fn refusals() {
    let place = Place::new();
    let snapshots = place.open();
    layer(&snapshots, "base", None);
    prepare(&snapshots, "active", Some("base"));
    let make = |key: &str, on: Option<&str>| {
        let on = on.map(parent);
        snapshots.prepare(Owner::Containerd, key, on.as_ref(), BTreeMap::new())
    };
    assert!(matches!(make("", None), Err(Error::EmptyKey)));
    assert!(matches!(
        make("base", None),
        Err(Error::AlreadyExists { .. })
    ));
    assert!(matches!(
        make("x", Some("nowhere")),
        Err(Error::NoParent { .. })
    ));
    assert!(matches!(
        make("x", Some("active")),
        Err(Error::ParentNotCommitted { .. })
    ));
    let commit =
        |name: &str, key: &str| snapshots.commit(Owner::Containerd, name, key, BTreeMap::new());
    assert!(matches!(
        commit("base", "active"),
        Err(Error::AlreadyExists { .. })
    ));
    assert!(matches!(
        commit("new", "base"),
        Err(Error::NotActive { .. })
    ));
    assert!(matches!(
        commit("new", "nowhere"),
        Err(Error::NotFound { .. })
    ));
    assert_eq!(keys(&snapshots), ["base", "active"]);
    assert_tidy(&place, &snapshots);
}

#[test]
fn owners_do_not_see_each_other() {
    let place = Place::new();
    let snapshots = place.open();
    for owner in Owner::ALL {
        snapshots
            .prepare(owner, "same", None, BTreeMap::new())
            .unwrap();
    }
    snapshots.remove(Owner::Image, "same").unwrap();
    assert!(matches!(
        snapshots.stat(Owner::Image, "same"),
        Err(Error::NotFound { .. })
    ));
    assert_eq!(snapshots.list(Some(Owner::Containerd)).unwrap().len(), 1);
    assert_eq!(snapshots.list(None).unwrap().len(), 3);
}

#[test]
fn everything_is_there_after_opening_again() {
    let place = Place::new();
    for close in [true, false] {
        let snapshots = place.open();
        let name = format!("base {close}");
        layer(&snapshots, &name, None);
        snapshots
            .set_labels(
                Owner::Containerd,
                &name,
                BTreeMap::from([("a".to_owned(), "b".to_owned())]),
            )
            .unwrap();
        let before = snapshots.list(None).unwrap();
        if close {
            snapshots.close().unwrap();
        }
        drop(snapshots);
        let snapshots = place.open();
        assert_eq!(snapshots.list(None).unwrap(), before);
        let info = snapshots.stat(Owner::Containerd, &name).unwrap();
        assert_eq!(info.labels["a"], "b");
        assert!(snapshots.usage(Owner::Containerd, &name).unwrap().inodes >= 2);
    }
}

#[test]
fn the_root_directory_keeps_what_it_is() {
    let place = Place::new();
    let snapshots = place.open();
    let info = prepare(&snapshots, "a", None);
    let upper = info.upper_dir.unwrap();
    assert_eq!(fs::metadata(&upper).unwrap().mode() & 0o7777, 0o755);
    fs::set_permissions(&upper, fs::Permissions::from_mode(0o1701)).unwrap();
    std::os::unix::fs::chown(&upper, Some(7), Some(8)).unwrap();
    let dir = fs::File::open(&upper).unwrap();
    dir.set_modified(SystemTime::UNIX_EPOCH + Duration::new(5, 6))
        .unwrap();
    // The last one is what a mount stores of a user's `trusted.overlay.opaque`.
    let xattrs = ["user.note", "trusted.overlay.overlay.opaque"];
    for name in xattrs {
        xattr::set(Object::Open(dir.as_fd()), name.as_ref(), b"y", 0).unwrap();
    }
    let mark = "trusted.overlay.impure".as_ref();
    xattr::set(Object::Open(dir.as_fd()), mark, b"y", 0).unwrap();
    drop(dir);
    snapshots
        .commit(Owner::Containerd, "base", "a", BTreeMap::new())
        .unwrap();
    let info = prepare(&snapshots, "b", Some("base"));
    let dir = fs::File::open(info.upper_dir.unwrap()).unwrap();
    let meta = dir.metadata().unwrap();
    assert_eq!(
        (meta.mode() & 0o7777, meta.uid(), meta.gid()),
        (0o1701, 7, 8)
    );
    assert_eq!((meta.mtime(), meta.mtime_nsec()), (5, 6));
    for name in xattrs {
        let value = xattr::get(Object::Open(dir.as_fd()), name.as_ref());
        assert_eq!(value.unwrap(), b"y");
    }
    let mark = xattr::get(Object::Open(dir.as_fd()), mark);
    assert_eq!(mark, Err(Errno::ENODATA));
}

#[test]
fn a_commit_cut_short_did_not_happen() {
    let place = Place::new();
    let snapshots = place.open();
    let info = prepare(&snapshots, "a", None);
    let upper = info.upper_dir.unwrap();
    fs::write(upper.join("file"), b"1").unwrap();
    drop(snapshots);
    fs::rename(&upper, place.root().join("layers").join(&info.id)).unwrap();

    let snapshots = place.open();
    assert_eq!(fs::read(upper.join("file")).unwrap(), b"1");
    assert_tidy(&place, &snapshots);
    snapshots
        .commit(Owner::Containerd, "b", "a", BTreeMap::new())
        .unwrap();
    assert_eq!(keys(&snapshots), ["b"]);
}

#[test]
fn trees_without_a_record_are_cleared() {
    let place = Place::new();
    let snapshots = place.open();
    layer(&snapshots, "base", None);
    drop(snapshots);
    fs::create_dir_all(place.root().join("layers/orphan/a")).unwrap();
    fs::create_dir_all(place.root().join("snapshots/data/orphan/upper/a")).unwrap();
    let snapshots = place.open();
    assert_tidy(&place, &snapshots);
    assert_eq!(keys(&snapshots), ["base"]);
}

#[test]
fn a_damaged_record_costs_no_tree_and_no_other_snapshot() {
    let place = Place::new();
    let snapshots = place.open();
    let base = directory_layer(&snapshots, "base");
    layer(&snapshots, "other", None);
    prepare(&snapshots, "child", Some("base"));
    drop(snapshots);
    let record = place
        .root()
        .join(format!("snapshots/records/{}.record", base.id));
    let good = fs::read(&record).unwrap();
    fs::write(&record, &good[..good.len() / 2]).unwrap();

    let snapshots = place.open();
    assert_eq!(keys(&snapshots), ["other"]);
    let error = snapshots.stat(Owner::Containerd, "child").unwrap_err();
    assert!(error.to_string().contains(&base.id), "{error}");
    assert!(matches!(
        snapshots.stat(Owner::Containerd, "base"),
        Err(Error::NotFound { .. })
    ));
    assert!(base.layer_dirs[0].join("base").exists());
    drop(snapshots);

    fs::write(&record, good).unwrap();
    let snapshots = place.open();
    assert_eq!(keys(&snapshots), ["base", "other", "child"]);
    assert_tidy(&place, &snapshots);
}

/// It was listed without a parent, as if it built on one whose record was gone when plyd started.
#[test]
fn what_is_removed_with_its_parent_while_a_list_is_made_is_left_out() {
    let place = Place::new();
    let snapshots = place.open();
    layer(&snapshots, "base", None);
    prepare(&snapshots, "child", Some("base"));
    let mut all = snapshots.catalog.all().unwrap();
    for key in ["child", "base"] {
        snapshots.remove(Owner::Containerd, key).unwrap();
    }
    // Its record was read, and that of its parent was not there any more.
    all.retain(|found| found.record.key == "child");
    assert_eq!(snapshots.infos(&all, None), []);
}

/// It counted as having no packed layers, and a mount that had gone on was not asked to read them anew after a repair.
#[test]
fn what_builds_on_a_record_that_is_gone_is_told_from_what_builds_on_nothing() {
    let place = Place::new();
    let snapshots = place.open();
    let base = layer(&snapshots, "base", None);
    layer(&snapshots, "above", Some("base"));
    prepare(&snapshots, "child", Some("above"));
    prepare(&snapshots, "alone", None);
    drop(snapshots);
    let record = format!("snapshots/records/{}.record", base.id);
    fs::remove_file(place.root().join(record)).unwrap();
    let all = place.open().list(None).unwrap().into_iter();
    let told: Vec<_> = all.map(|info| (info.key, info.is_cut)).collect();
    let expected = [("above", true), ("child", true), ("alone", false)];
    assert_eq!(told, expected.map(|(key, cut)| (key.to_owned(), cut)));
}

/// It was said that there is no such snapshot, and whoever believed that made another.
#[test]
fn a_snapshot_whose_record_is_gone_is_not_said_not_to_be_there() {
    let place = Place::new();
    let snapshots = place.open();
    layer(&snapshots, "base", None);
    let found = snapshots
        .catalog
        .resolve(Owner::Containerd, "base")
        .unwrap();
    let record = format!("snapshots/records/{}.record", found.id);
    fs::remove_file(place.root().join(record)).unwrap();
    let on_it = snapshots.prepare(
        Owner::Containerd,
        "on it",
        Some(&parent("base")),
        BTreeMap::new(),
    );
    for error in [
        snapshots.stat(Owner::Containerd, "base").map(drop),
        on_it.map(drop),
    ] {
        let text = error.unwrap_err().to_string();
        assert!(
            text.contains(&found.id) && text.contains("it is gone; `snapctl system repair`"),
            "{text}"
        );
    }
    snapshots.remove(Owner::Containerd, "base").unwrap_err();
}
