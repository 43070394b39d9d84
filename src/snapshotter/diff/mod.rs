//! What a snapshot changes against its parent, found by walking what it has itself.
//!
//! Both sides are opened as unions of read-only layers: the one with the snapshot's own layer on top,
//! the other without. Names come from the own layer; only below a directory that does not simply
//! merge with the one below it (opaque, or redirected) are both sides listed in full.
//!
//! This reads the own layer as what the upper of an active snapshot always is, a directory in
//! overlayfs format that its container may change meanwhile, and takes a committed one for the same, unless it is
//! packed: then two merged views are compared.

pub(super) mod layer;
mod packed;

use std::collections::{BTreeMap, BTreeSet};
use std::ffi::{OsStr, OsString};
use std::io::Write;
use std::ops::Bound;
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::ffi::OsStrExt;
use std::path::{Path, PathBuf};

use nix::errno::Errno;

use super::Snapshotter;
use super::catalog::Found;
use super::chain::Below;
use super::types::*;
use crate::cow::{self, Attr, Entry, FileKind, NodeId, Union};
use crate::store::Time;
use crate::store::view::View;
use crate::sys::fs::{Object, Stat};
use crate::sys::tree::{self, Tree};
use crate::sys::xattr;

/// Marks of a directory that hides or leaves what lies at its place below.
const NOT_MERGED: [&str; 2] = ["trusted.overlay.opaque", "trusted.overlay.redirect"];

/// How a path differs from the parent.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum ChangeKind {
    /// It is new.
    Added,
    /// It is another one, or has other content or attributes.
    Modified,
    /// It is gone, with everything below it.
    Deleted,
}

/// One path that a snapshot changes.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Change {
    /// Absolute, as seen in the snapshot.
    pub path: PathBuf,
    /// How.
    pub kind: ChangeKind,
}

impl Snapshotter {
    /// Every path that the snapshot changes against its parent, in byte order.
    pub fn diff(&self, owner: Owner, key: &str) -> Result<Vec<Change>> {
        self.locked(owner, key, |found| self.changes_of(&found))
    }

    /// Writes what the snapshot changes as a layer: a tar stream, the same for the same changes. Whiteouts have
    /// the time `whiteouts`.
    pub fn write_layer(
        &self,
        owner: Owner,
        key: &str,
        out: impl Write,
        whiteouts: Time,
    ) -> Result<()> {
        self.locked(owner, key, |found| {
            let changes = self.changes_of(&found)?;
            let mut all = self.below(&found)?;
            if found.record.kind == Kind::Active {
                all.lowers
                    .insert(0, self.data.join(&found.id).join("upper"));
            }
            layer::write(&changes, all.union(), out, whiteouts)
        })
    }

    fn changes_of(&self, found: &Found) -> Result<Vec<Change>> {
        let mut below = self.below(found)?;
        let own = match found.record.kind {
            Kind::View => return Ok(Vec::new()),
            Kind::Committed if found.record.layer.is_none() => {
                return self.diff_packed(found);
            }
            Kind::Committed => below.lowers.remove(0),
            Kind::Active => {
                let upper = self.data.join(&found.id).join("upper");
                self.complete_partial(found)?;
                let flushed = self.mounts.flush(&found.id);
                flushed.map_err(plyfs_error("flush the mount of", &upper, &found.record.key))?;
                upper
            }
        };
        let on_top = diff(&own, below)?;
        Ok(joined(self.diff_packed(found)?, on_top, &own))
    }
}

/// Compares the layers `below` with the directory `own` on top of them, in byte order of the paths. Of a
/// directory that vanishes from `own` meanwhile, nothing below it is told.
fn diff(own: &Path, below: Below) -> Result<Vec<Change>> {
    let mut walk = Walk::new(own, below)?;
    while walk.step()? {}
    Ok(ordered(walk.changes))
}

/// As `diff`, of packed layers: `new` is the view of a chain whose topmost layer has that number, `old` of what is below it.
pub(super) fn diff_packed(new: &View, old: Option<&View>, topmost: u16) -> Result<Vec<Change>> {
    packed::compare(new, old, topmost).map(ordered)
}

/// The changes of a directory `own`, which lies on a layer with the changes `below`, and those, as one step from what is
/// below both.
fn joined(below: Vec<Change>, on_top: Vec<Change>, own: &Path) -> Vec<Change> {
    use ChangeKind::{Added, Deleted, Modified};

    if below.is_empty() {
        return on_top;
    }
    let mut all: BTreeMap<PathBuf, ChangeKind> = below
        .into_iter()
        .map(|change| (change.path, change.kind))
        .collect();
    for Change { path, kind } in on_top {
        // Below what is gone, or no directory any more, nothing is told.
        let inside = path.strip_prefix("/").unwrap_or(&path);
        let is_directory = |path: &Path| path.symlink_metadata().is_ok_and(|meta| meta.is_dir());
        if kind == Deleted || !is_directory(&own.join(inside)) {
            // Paths are in the order of their parts, so what lies below one follows it.
            let after = all.range::<PathBuf, _>((Bound::Excluded(&path), Bound::Unbounded));
            let inside = after
                .map(|(other, _)| other)
                .take_while(|other| other.starts_with(&path));
            for other in inside.cloned().collect::<Vec<_>>() {
                all.remove(&other);
            }
        }
        let kind = match (all.get(&path), kind) {
            (Some(Added), Deleted) => None,
            (Some(Added), _) => Some(Added),
            (Some(Deleted), Added) => Some(Modified),
            (_, kind) => Some(kind),
        };
        match kind {
            Some(kind) => all.insert(path, kind),
            None => all.remove(&path),
        };
    }
    let all = all.into_iter();
    ordered(all.map(|(path, kind)| Change { path, kind }).collect())
}

fn ordered(mut changes: Vec<Change>) -> Vec<Change> {
    changes.sort_by_cached_key(|change| change.path.as_os_str().as_bytes().to_vec());
    changes
}

/// Not a recursion: a container decides how deep its directories are.
struct Walk {
    own: OwnLayer,
    new: Union,
    old: Option<Union>,
    waiting: Vec<Directory>,
    changes: Vec<Change>,
}

/// A directory to compare; a lookup of its nodes is held.
struct Directory {
    /// Absolute, as seen in the snapshot.
    path: PathBuf,
    new: NodeId,
    old: Option<NodeId>,
    /// The snapshot's own layer has it, under the same path.
    in_own: bool,
}

impl Walk {
    fn new(own: &Path, below: Below) -> Result<Self> {
        let old = match below.is_empty() {
            true => None,
            false => Some(Union::open(below.clone().union())?),
        };
        let mut all = below;
        all.lowers.insert(0, own.to_owned());
        let new = Union::open(all.union())?;
        let root = Directory {
            path: "/".into(),
            new: NodeId::ROOT,
            old: old.is_some().then_some(NodeId::ROOT),
            in_own: true,
        };
        Ok(Self {
            own: OwnLayer::open(own)?,
            new,
            old,
            waiting: vec![root],
            changes: Vec::new(),
        })
    }

    /// Compares what is in one directory; false when there is none left.
    fn step(&mut self) -> Result<bool> {
        let Some(at) = self.waiting.pop() else {
            return Ok(false);
        };
        self.directory(&at)?;
        if at.new != NodeId::ROOT {
            self.forget(Some(at.new), at.old);
        }
        Ok(true)
    }

    fn directory(&mut self, at: &Directory) -> Result<()> {
        let own = match at.in_own {
            true => match self.own.directory(&at.path)? {
                Some(own) => Some(own),
                None => return Ok(()),
            },
            false => None,
        };
        let names: BTreeSet<OsString> = match &own {
            Some(own) if !own.is_marked()? => own.names()?,
            _ => {
                let mut names = names_in(&self.new, at.new)?;
                if let (Some(union), Some(old)) = (&self.old, at.old) {
                    names.extend(names_in(union, old)?);
                }
                names
            }
        };
        for name in names {
            let new = lookup(&self.new, at.new, &name)?;
            let old = match (&self.old, at.old) {
                (Some(union), Some(old)) => lookup(union, old, &name)?,
                _ => None,
            };
            let own = match &own {
                Some(own) => own.stat(&name)?,
                None => None,
            };
            self.entry(at.path.join(&name), new, old, own);
        }
        Ok(())
    }

    /// Notes what `path` is, and to look into it where more may have changed.
    fn entry(&mut self, path: PathBuf, new: Option<Entry>, old: Option<Entry>, own: Option<Stat>) {
        let is_dir = |entry: &Entry| entry.attr.kind == FileKind::Directory;
        let kind = match (&new, &old) {
            (None, None) => None,
            (None, Some(_)) => Some(ChangeKind::Deleted),
            (Some(_), None) => Some(ChangeKind::Added),
            (Some(new), Some(old)) if is_dir(new) && is_dir(old) => {
                looks_different(&new.attr, &old.attr).then_some(ChangeKind::Modified)
            }
            // A file of the own layer was written to, or was made anew.
            (Some(new), Some(old)) => (own.is_some() || looks_different(&new.attr, &old.attr))
                .then_some(ChangeKind::Modified),
        };
        if let Some(kind) = kind {
            let path = path.clone();
            self.changes.push(Change { path, kind });
        }
        let in_own = own.is_some_and(|stat| stat.st_mode & libc::S_IFMT == libc::S_IFDIR);
        let old_dir = old.filter(is_dir);
        // Otherwise it is the parent's own directory.
        let may_differ = in_own || old_dir.is_none() || kind.is_some();
        let (new, old) = (
            new.map(|new| (new.node, is_dir(&new))),
            old.map(|old| old.node),
        );
        match new {
            Some((new, true)) if may_differ => {
                if old_dir.is_none() {
                    self.forget(None, old);
                }
                self.waiting.push(Directory {
                    path,
                    new,
                    old: old_dir.map(|old| old.node),
                    in_own,
                });
            }
            new => self.forget(new.map(|(new, _)| new), old),
        }
    }

    /// Gives back a lookup of each.
    fn forget(&self, new: Option<NodeId>, old: Option<NodeId>) {
        if let Some(new) = new {
            self.new.forget(new, 1);
        }
        if let (Some(union), Some(old)) = (&self.old, old) {
            union.forget(old, 1);
        }
    }
}

/// What a snapshot has itself, as it lies on disk.
pub(super) struct OwnLayer {
    dir: PathBuf,
    tree: Tree,
}

impl OwnLayer {
    pub(super) fn open(dir: &Path) -> Result<Self> {
        let tree = Tree::open(dir).map_err(|errno| io_error("open", dir)(errno.into()))?;
        let dir = dir.to_owned();
        Ok(Self { dir, tree })
    }

    /// The directory at `path`, which is absolute as seen in the snapshot, if it is (still) one.
    pub(super) fn directory(&self, path: &Path) -> Result<Option<OwnDirectory>> {
        let path = path.strip_prefix("/").unwrap_or(path);
        let on_disk = self.dir.join(path);
        match self.tree.directory(path) {
            Ok(fd) => Ok(fd.map(|fd| OwnDirectory { fd, on_disk })),
            Err(errno) => Err(io_error("open", &on_disk)(errno.into())),
        }
    }
}

pub(super) struct OwnDirectory {
    fd: OwnedFd,
    /// For messages.
    on_disk: PathBuf,
}

impl OwnDirectory {
    fn failed(&self, action: &'static str) -> impl FnOnce(Errno) -> Error + use<> {
        let error = io_error(action, &self.on_disk);
        |errno| error(errno.into())
    }

    /// What the layer itself names: a whiteout stands under the name that it hides.
    pub(super) fn names(&self) -> Result<BTreeSet<OsString>> {
        let names = tree::names(self.fd.as_fd()).map_err(self.failed("list"))?;
        Ok(names.into_iter().collect())
    }

    pub(super) fn stat(&self, name: &OsStr) -> Result<Option<Stat>> {
        tree::stat(self.fd.as_fd(), name).map_err(self.failed("look into"))
    }

    pub(super) fn is_marked(&self) -> Result<bool> {
        for name in NOT_MERGED {
            match xattr::get(Object::Open(self.fd.as_fd()), OsStr::new(name)) {
                // "x" marks a directory that holds whiteouts of another kind, which merges.
                Ok(value) if value != b"x" => return Ok(true),
                Ok(_) | Err(Errno::ENODATA | Errno::EOPNOTSUPP) => {}
                Err(errno) => return Err(self.failed("look at")(errno)),
            }
        }
        Ok(false)
    }
}

fn looks_different(new: &Attr, old: &Attr) -> bool {
    let look = |attr: &Attr| {
        (
            attr.kind, attr.perm, attr.uid, attr.gid, attr.mtime, attr.rdev,
        )
    };
    look(new) != look(old) || (new.kind != FileKind::Directory && new.size != old.size)
}

pub(super) fn lookup(union: &Union, parent: NodeId, name: &OsStr) -> Result<Option<Entry>> {
    match union.lookup(parent, name) {
        Ok(entry) => Ok(Some(entry)),
        Err(error) if error.errno == libc::ENOENT => Ok(None),
        Err(error) => Err(error.into()),
    }
}

pub(super) fn names_in(union: &Union, node: NodeId) -> Result<BTreeSet<OsString>> {
    let handle = union.open_dir(node)?;
    let mut names = BTreeSet::new();
    union.read_dir(node, &handle, 0, &mut |entry| {
        if entry.name != "." && entry.name != ".." {
            names.insert(entry.name);
        }
        true
    })?;
    Ok(names)
}

impl From<cow::Error> for Error {
    fn from(source: cow::Error) -> Self {
        Self::Union { source }
    }
}

#[cfg(test)]
mod tests {
    use std::fs::{self, File};

    use super::*;

    fn directory(path: &Path) -> Below {
        Below {
            lowers: vec![path.to_owned()],
            view: None,
        }
    }

    fn changes(own: &Path, below: &Path) -> Vec<(String, ChangeKind)> {
        let all = diff(own, directory(below)).unwrap();
        all.into_iter()
            .map(|change| (change.path.to_str().unwrap().to_owned(), change.kind))
            .collect()
    }

    #[test]
    fn every_kind_of_change_is_named_once() {
        use ChangeKind::{Added, Deleted, Modified};
        use nix::sys::stat::{Mode, SFlag, mknod};

        let tmp = tempfile::tempdir().unwrap();
        let (below, own) = (tmp.path().join("below"), tmp.path().join("own"));
        for dir in ["same", "touched/deep", "opaque", "gone"] {
            fs::create_dir_all(below.join(dir)).unwrap();
            fs::write(below.join(dir).join("file"), dir).unwrap();
        }
        fs::create_dir_all(own.join("touched/new/dir")).unwrap();
        fs::write(own.join("touched/new/dir/file"), "").unwrap();
        fs::create_dir_all(own.join("touched/deep")).unwrap();
        fs::write(own.join("touched/deep/file"), "changed").unwrap();
        fs::create_dir(own.join("opaque")).unwrap();
        fs::write(own.join("opaque/other"), "").unwrap();
        let opaque = File::open(own.join("opaque")).unwrap();
        xattr::set(
            Object::Open(opaque.as_fd()),
            OsStr::new("trusted.overlay.opaque"),
            b"y",
            0,
        )
        .unwrap();
        mknod(&own.join("gone"), SFlag::S_IFCHR, Mode::empty(), 0).unwrap();
        for dir in ["touched/deep", "touched", "opaque"] {
            let time = fs::metadata(below.join(dir)).unwrap().modified().unwrap();
            let copy = File::open(own.join(dir)).unwrap();
            copy.set_modified(time).unwrap();
        }

        assert_eq!(
            changes(&own, &below),
            [
                ("/gone", Deleted),
                ("/opaque/file", Deleted),
                ("/opaque/other", Added),
                ("/touched/deep/file", Modified),
                ("/touched/new", Added),
                ("/touched/new/dir", Added),
                ("/touched/new/dir/file", Added),
            ]
            .map(|(path, kind)| (path.to_owned(), kind))
        );
    }

    #[test]
    fn two_steps_are_told_as_one() {
        use ChangeKind::{Added, Deleted, Modified};

        let own = tempfile::tempdir().unwrap();
        fs::create_dir(own.path().join("made-a-directory")).unwrap();
        fs::write(own.path().join("made-a-file"), "").unwrap();
        let list = |list: &[(&str, ChangeKind)]| {
            let change = |(path, kind): &(&str, ChangeKind)| Change {
                path: path.into(),
                kind: *kind,
            };
            list.iter().map(change).collect::<Vec<_>>()
        };
        let below = list(&[
            ("/changed", Modified),
            ("/gone-again", Added),
            ("/gone-again/inside", Added),
            ("/made-a-directory", Modified),
            ("/made-a-file", Modified),
            ("/made-a-file/gone", Deleted),
            ("/made-a-file/new", Added),
            ("/new", Added),
            ("/removed", Deleted),
            ("/removed-once", Deleted),
        ]);
        let on_top = list(&[
            ("/changed", Deleted),
            ("/gone-again", Deleted),
            ("/made-a-directory/new", Added),
            ("/made-a-file", Modified),
            ("/new", Modified),
            ("/removed", Added),
        ]);
        let expected = list(&[
            ("/changed", Deleted),
            ("/made-a-directory", Modified),
            ("/made-a-directory/new", Added),
            ("/made-a-file", Modified),
            ("/new", Added),
            ("/removed", Modified),
            ("/removed-once", Deleted),
        ]);
        assert_eq!(joined(below, on_top, own.path()), expected);
    }

    #[test]
    fn without_a_parent_everything_is_new() {
        let tmp = tempfile::tempdir().unwrap();
        fs::create_dir(tmp.path().join("a")).unwrap();
        fs::write(tmp.path().join("a/b"), "").unwrap();
        let all = diff(tmp.path(), Below::default()).unwrap();
        assert!(all.iter().all(|change| change.kind == ChangeKind::Added));
        assert_eq!(all.len(), 2);
    }

    #[test]
    fn a_directory_that_was_replaced_is_neither_waited_for_nor_followed() {
        use nix::sys::stat::Mode;
        use nix::unistd::mkfifo;

        let tmp = tempfile::tempdir().unwrap();
        let [below, own, outside] = ["below", "own", "outside"].map(|name| tmp.path().join(name));
        for dir in [&below, &outside] {
            fs::create_dir(dir).unwrap();
            fs::write(dir.join("file"), "").unwrap();
        }
        for name in ["fifo", "link", "gone", "kept"] {
            fs::create_dir_all(own.join(name)).unwrap();
            fs::write(own.join(name).join("inside"), "").unwrap();
        }
        let mut walk = Walk::new(&own, directory(&below)).unwrap();
        walk.step().unwrap();
        assert_eq!(walk.waiting.len(), 4);
        for name in ["fifo", "link", "gone"] {
            fs::remove_dir_all(own.join(name)).unwrap();
        }
        mkfifo(&own.join("fifo"), Mode::S_IRWXU).unwrap();
        std::os::unix::fs::symlink(&outside, own.join("link")).unwrap();
        while walk.step().unwrap() {}
        let mut paths: Vec<_> = walk.changes.iter().map(|change| &*change.path).collect();
        paths.sort();
        let expected = ["/fifo", "/gone", "/kept", "/kept/inside", "/link"];
        assert_eq!(paths, expected.map(Path::new));
    }
}
