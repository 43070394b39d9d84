//! What a snapshot changes against its parent, found by walking what it has itself.
//!
//! Both sides are opened as unions of read-only layers: the one with the snapshot's own layer on top,
//! the other without. Names come from the own layer; only below a directory that does not simply
//! merge with the one below it (opaque, or redirected) are both sides listed in full. A file of the layers
//! below that has several names is changed under all of them: those that the own layer has not are found
//! by the index in the snapshot's work directory.
//!
//! This reads the own layer as what the upper of an active snapshot always is, a directory in
//! overlayfs format that its container may change meanwhile, and takes a committed one for the same, unless it is
//! packed: then two merged views are compared at the paths that the layer names.
//!
//! Two snapshots of which none is the other's parent are compared whole.

mod between;
mod entries;
pub(super) mod layer;
pub(super) mod pack;
mod packed;
mod sides;
mod walk;

use std::collections::{BTreeMap, BTreeSet};
use std::ffi::{OsStr, OsString};
use std::io::Write;
use std::ops::Bound;
use std::os::unix::ffi::{OsStrExt, OsStringExt};
use std::path::{Path, PathBuf};

use super::Snapshotter;
use super::catalog::Found;
use super::chain::Below;
use super::{types::*, upper};
use crate::cow::{self, Entry, NodeId, Union};
use crate::store::layer::index::LayerIndex;
use crate::store::{self, Time, Xattrs};
pub(super) use packed::Views as PackedViews;
pub(super) use sides::Sides;
#[cfg(test)]
pub(super) use walk::COMPARED;
pub(super) use walk::{Directories, OwnDirectory, OwnLayer};
use walk::{Step, Walk};

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
    /// Every path that the snapshot changes against its parent, as a walk finds them that takes the names in a directory in byte order.
    pub fn diff(&self, owner: Owner, key: &str) -> Result<Vec<Change>> {
        self.locked(owner, key, |found| {
            let shown = self.shown_now(&found)?;
            anew(|| self.changes_of(&found, &Union::open(shown.clone().union())?))
        })
    }

    /// Writes what the snapshot changes as a layer: a tar stream, the same for the same changes. With an `epoch`, nothing
    /// was modified later than that, and whiteouts have that time; otherwise they have none.
    pub fn write_layer(
        &self,
        owner: Owner,
        key: &str,
        out: impl Write,
        epoch: Option<Time>,
    ) -> Result<()> {
        self.locked(owner, key, |found| {
            let shown = self.shown_now(&found)?;
            let (changes, new) = anew(|| {
                let new = Union::open(shown.clone().union())?;
                Ok((self.changes_of(&found, &new)?, new))
            })?;
            layer::write(&changes, &new, shown.view.as_deref(), out, epoch)
        })
    }

    /// As [`write_layer`](Self::write_layer), of what makes the tree of the snapshot `key` of that of `left`, whatever lies below
    /// the two, or of an empty one. Both trees are looked at whole, but for what lies in the same packed layers.
    pub fn write_difference(
        &self,
        owner: Owner,
        left: Option<&str>,
        key: &str,
        out: impl Write,
        epoch: Option<Time>,
    ) -> Result<()> {
        let write = |left: Option<Found>, found: Found| {
            let left = left.map(|left| self.shown_now(&left)).transpose()?;
            let shown = self.shown_now(&found)?;
            let view = |of: &Below| of.view.as_ref().map(|view| view.key());
            let same_view = left.as_ref().is_some_and(|left| view(left) == view(&shown));
            let (changes, new) = anew(|| {
                let left = left.clone();
                let old = left.map(|left| Union::open(left.union())).transpose()?;
                let new = Union::open(shown.clone().union())?;
                Ok((between::compare(&new, old, same_view)?, new))
            })?;
            layer::write(&changes, &new, shown.view.as_deref(), out, epoch)
        };
        match left {
            Some(left) => {
                self.locked_both(owner, left, key, |left, found| write(Some(left), found))
            }
            None => self.locked(owner, key, |found| write(None, found)),
        }
    }

    /// Whether the snapshot shows its parent, or nothing, and has no layer and no names of its own.
    pub fn is_untouched(&self, owner: Owner, key: &str) -> Result<bool> {
        self.locked(owner, key, |found| match found.record.kind {
            Kind::View => Ok(true),
            Kind::Active if found.record.packed.is_none() => {
                upper::is_empty(&self.data.join(&found.id).join("upper"))
            }
            Kind::Active | Kind::Committed => Ok(false),
        })
    }

    /// The layers of the tree that a snapshot shows.
    fn shown(&self, found: &Found) -> Result<Below> {
        let (dir, below) = (self.data.join(&found.id), self.below(found)?);
        let mut all = match found.record.kind {
            Kind::Active => below.under_upper(&dir),
            Kind::View | Kind::Committed => below,
        };
        if all.is_empty() {
            all.lowers.push(dir.join("empty"));
        }
        Ok(all)
    }

    /// As `shown`, with all that was written to a mount.
    fn shown_now(&self, found: &Found) -> Result<Below> {
        if found.record.kind == Kind::Active {
            let upper = self.upper_of(found);
            let flushed = self.mounts.flush(&found.id);
            flushed.map_err(plyfs_error("flush the mount of", &upper, &found.record.key))?;
        }
        self.shown(found)
    }

    fn upper_of(&self, found: &Found) -> PathBuf {
        self.data.join(&found.id).join("upper")
    }

    /// What the snapshot changes that `new` is the union of.
    fn changes_of(&self, found: &Found, new: &Union) -> Result<Vec<Change>> {
        let mut below = self.below(found)?;
        let own = match found.record.kind {
            Kind::View => return Ok(Vec::new()),
            Kind::Committed if found.record.layer.is_none() => return self.diff_packed(found),
            Kind::Committed => below.lowers.remove(0),
            Kind::Active => self.upper_of(found),
        };
        let below_own = self.diff_packed(found)?;
        changes(&own, new, below, below_own, Directories::Changed)
    }
}

/// Looks at a snapshot, and again a few times if what may be in use has changed under that: one more look costs little
/// beside a refusal, but where all of them fail it is not for chance.
fn anew<T>(mut look: impl FnMut() -> Result<T>) -> Result<T> {
    const AGAIN: usize = 4;
    for _ in 0..AGAIN {
        match look() {
            Err(error) if may_have_changed(&error) => {
                tracing::debug!(%error, "a snapshot has changed while it was looked at");
            }
            looked => return looked,
        }
    }
    look()
}

/// Whether an error may come of somebody having removed or replaced what had just been found.
fn may_have_changed(error: &Error) -> bool {
    use libc::{EINVAL, ELOOP, ENOENT, ENOTDIR, ENXIO, ESTALE};
    match error {
        Error::LinksChanged => true,
        Error::Union { source } => {
            [ENOENT, ENOTDIR, ESTALE, ENXIO, EINVAL, ELOOP].contains(&source.errno)
        }
        Error::Io { source, .. } => source.kind() == std::io::ErrorKind::NotFound,
        _ => false,
    }
}

/// A directory and what lies below it.
pub(super) fn with_own(own: &Path, below: &Below) -> Below {
    let mut all = below.clone();
    all.lowers.insert(0, own.to_owned());
    all
}

/// Compares the layers `below` with `new`, the union of them and the directory `own` on top, in the order of a
/// walk. Changes of the topmost one below count as those of `own`. Of a directory that vanishes from `own` meanwhile, nothing
/// below it is told.
pub(super) fn changes(
    own: &Path,
    new: &Union,
    below: Below,
    below_own: Vec<Change>,
    directories: Directories,
) -> Result<Vec<Change>> {
    let old = match below.is_empty() {
        true => None,
        false => Some(Union::open(below.union())?),
    };
    let mut walk = Walk::new(own, new, old, directories)?;
    while walk.step()? {}
    Ok(joined(below_own, walk.finish()?))
}

/// As `changes`, of packed layers: of the topmost one in the new of these views, which has that `index`.
pub(super) fn diff_packed(
    views: &PackedViews<'_>,
    index: store::Result<LayerIndex>,
) -> Result<Vec<Change>> {
    packed::compare(views, index).map(ordered)
}

/// The changes of a layer on one with the changes `below`, and those, as one step from what is below both. What may have been a
/// directory there, was none between the two and is one again is both, removed and then added.
fn joined(below: Vec<Change>, on_top: Vec<Step>) -> Vec<Change> {
    use ChangeKind::{Added, Deleted, Modified};

    let mut all: BTreeMap<PathBuf, ChangeKind> = below
        .into_iter()
        .map(|change| (change.path, change.kind))
        .collect();
    let mut made_anew = Vec::new();
    for step in on_top {
        let Change { path, kind } = step.change;
        // Below what is gone, or no directory any more, nothing is told.
        if !step.is_directory {
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
            (Some(_), _) if step.is_directory && !step.was_directory => {
                let kind = Deleted;
                made_anew.push(Change {
                    path: path.clone(),
                    kind,
                });
                Some(Added)
            }
            (Some(Deleted), Added) => Some(Modified),
            (_, kind) => Some(kind),
        };
        match kind {
            Some(kind) => all.insert(path, kind),
            None => all.remove(&path),
        };
    }
    let all = all.into_iter().map(|(path, kind)| Change { path, kind });
    // The sort leaves equal paths in this order.
    ordered(made_anew.into_iter().chain(all).collect())
}

/// What lies below a directory follows it at once, before `name-more` and all else that has its name as a beginning: a
/// layer has an entry for each directory that leads to a change, and may have but one.
fn ordered(mut changes: Vec<Change>) -> Vec<Change> {
    changes.sort_by_cached_key(|change| {
        in_walk(change.path.as_os_str().as_bytes()).collect::<Vec<_>>()
    });
    changes
}

/// Paths in the order of these are as a walk finds them that takes the names in a directory in byte order.
fn in_walk(path: &[u8]) -> impl Iterator<Item = u8> {
    path.iter().map(|&byte| match byte {
        b'/' => 0,
        byte => byte,
    })
}

pub(super) fn lookup(union: &Union, parent: NodeId, name: &OsStr) -> Result<Option<Entry>> {
    match union.lookup(parent, name) {
        Ok(entry) => Ok(Some(entry)),
        Err(error) if error.errno == libc::ENOENT => Ok(None),
        Err(error) => Err(error.into()),
    }
}

pub(super) fn names_in(union: &Union, node: NodeId) -> Result<BTreeSet<OsString>> {
    let mut names = BTreeSet::new();
    let listed = union.open_dir(node).and_then(|handle| {
        union.read_dir(node, &handle, 0, &mut |entry| {
            if entry.name != "." && entry.name != ".." {
                names.insert(entry.name);
            }
            true
        })
    });
    match listed {
        // It has been removed since it was found.
        Err(error) if error.errno == libc::ENOENT && union.is_live() => Ok(BTreeSet::new()),
        listed => {
            listed?;
            Ok(names)
        }
    }
}

/// The extended attributes that a node shows, in order of their names.
fn xattrs_of(union: &Union, node: NodeId) -> Result<Xattrs, cow::Error> {
    let names = match union.listxattr(node) {
        // A file system without any.
        Err(error) if error.errno == libc::EOPNOTSUPP => Vec::new(),
        names => names?,
    };
    let mut xattrs = Vec::with_capacity(names.len());
    for name in names {
        let value = union.getxattr(node, &name)?;
        xattrs.push((name.into_vec(), value));
    }
    xattrs.sort_unstable();
    Ok(xattrs)
}

impl From<cow::Error> for Error {
    fn from(source: cow::Error) -> Self {
        Self::Union { source }
    }
}

#[cfg(test)]
mod tests {
    use std::fs::{self, File};
    use std::os::fd::AsFd;

    use super::*;
    use crate::sys::fs::Object;
    use crate::sys::xattr;

    fn directory(path: &Path) -> Below {
        Below {
            lowers: vec![path.to_owned()],
            ..Below::default()
        }
    }

    fn diff(own: &Path, below: Below) -> Result<Vec<Change>> {
        let new = Union::open(with_own(own, &below).union())?;
        super::changes(own, &new, below, Vec::new(), Directories::Changed)
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
            ("/removed-once", Added),
        ]);
        let on_top = on_top.into_iter().map(|change| Step {
            was_directory: change.path != Path::new("/removed-once"),
            is_directory: change.path.starts_with("/made-a-directory")
                || change.path == Path::new("/removed-once"),
            change,
        });
        let expected = list(&[
            ("/changed", Deleted),
            ("/made-a-directory", Modified),
            ("/made-a-directory/new", Added),
            ("/made-a-file", Modified),
            ("/new", Added),
            ("/removed", Modified),
            ("/removed-once", Deleted),
            ("/removed-once", Added),
        ]);
        assert_eq!(joined(below, on_top.collect()), expected);
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
        let new = Union::open(with_own(&own, &directory(&below)).union()).unwrap();
        let old = Union::open(directory(&below).union()).unwrap();
        let mut walk = Walk::new(&own, &new, Some(old), Directories::Changed).unwrap();
        walk.step().unwrap();
        for name in ["fifo", "link", "gone"] {
            fs::remove_dir_all(own.join(name)).unwrap();
        }
        mkfifo(&own.join("fifo"), Mode::S_IRWXU).unwrap();
        std::os::unix::fs::symlink(&outside, own.join("link")).unwrap();
        while walk.step().unwrap() {}
        let mut paths: Vec<_> = walk.steps.iter().map(|step| &*step.change.path).collect();
        paths.sort();
        let expected = ["/fifo", "/gone", "/kept", "/kept/inside", "/link"];
        assert_eq!(paths, expected.map(Path::new));
    }
}
