//! The walk over what a snapshot has itself, beside what lies below.

use std::collections::{BTreeSet, HashSet};
use std::ffi::{OsStr, OsString};
use std::os::fd::{AsFd, OwnedFd};
use std::path::{Path, PathBuf};

use nix::errno::Errno;

use super::sides::Sides;
use super::{Change, ChangeKind, xattrs_of};
use crate::cow::{Attr, CopiedLinks, Entry, FileKind, NodeId, Union};
use crate::snapshotter::types::*;
use crate::sys::fs::{Object, Stat};
use crate::sys::tree::{self, Tree};
use crate::sys::xattr;

/// Marks of a directory that hides or leaves what lies at its place below.
const NOT_MERGED: [&str; 2] = ["trusted.overlay.opaque", "trusted.overlay.redirect"];

#[cfg(test)]
thread_local! {
    /// Names that this thread has compared.
    pub(in crate::snapshotter) static COMPARED: std::cell::Cell<u64> = const { std::cell::Cell::new(0) };
}

/// A change, and whether there is a directory at its path, before and now.
#[derive(Clone, Debug)]
pub(super) struct Step {
    pub(super) change: Change,
    pub(super) was_directory: bool,
    pub(super) is_directory: bool,
}

/// Which directories of its own a snapshot is said to change.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(in crate::snapshotter) enum Directories {
    /// Those that look different.
    Changed,
    /// All of them: with everything that cannot be seen to be different.
    Own,
}

/// Not a recursion: a container decides how deep its directories are.
pub(super) struct Walk<'a> {
    own: OwnLayer,
    sides: Sides<'a>,
    directories: Directories,
    /// What the snapshot changes under names that its own layer does not have.
    links: CopiedLinks,
    waiting: Vec<Directory>,
    pub(super) steps: Vec<Step>,
    /// Files with several names that are among the steps.
    linked: HashSet<NodeId>,
    /// Names that say nothing new, unless another name of the same file does.
    same: Vec<(NodeId, Step)>,
}

/// A directory to compare; a lookup of its nodes is held.
struct Directory {
    /// Absolute, as seen in the snapshot.
    path: PathBuf,
    new: NodeId,
    old: Option<NodeId>,
    /// The snapshot's own layer has it, under the same path.
    in_own: bool,
    /// None of those above it hides what lies at its place below, or has been put there from elsewhere.
    in_place: bool,
}

impl<'a> Walk<'a> {
    /// `new` is the union of `own` and `old`.
    pub(super) fn new(
        own: &Path,
        new: &'a Union,
        old: Option<Union>,
        directories: Directories,
    ) -> Result<Self> {
        let own = OwnLayer::open(own)?;
        let links = new.copied_links()?;
        let sides = Sides::new(new, old);
        let (new, old) = sides.roots();
        let root = Directory {
            path: "/".into(),
            new,
            old,
            in_own: true,
            in_place: true,
        };
        Ok(Self {
            own,
            sides,
            directories,
            links,
            waiting: vec![root],
            steps: Vec::new(),
            linked: HashSet::new(),
            same: Vec::new(),
        })
    }

    /// What was found, once there is nothing left to compare.
    pub(super) fn finish(mut self) -> Result<Vec<Step>> {
        if self.sides.new.has_missed_links() {
            return Err(Error::LinksChanged);
        }
        let linked = &self.linked;
        let told = self
            .same
            .into_iter()
            .filter(|(file, _)| linked.contains(file));
        self.steps.extend(told.map(|(_, step)| step));
        Ok(self.steps)
    }

    /// Compares what is in one directory; false when there is none left.
    pub(super) fn step(&mut self) -> Result<bool> {
        let Some(at) = self.waiting.pop() else {
            return Ok(false);
        };
        self.directory(&at)?;
        self.sides.forget(Some(at.new), at.old);
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
        let in_place = match &own {
            Some(own) => at.in_place && !own.is_marked()?,
            // It is looked at for what it leads to.
            None => at.in_place,
        };
        let names: BTreeSet<OsString> = match in_place {
            true => {
                let mut names = self.sides.new.names_to_links(&self.links, at.new)?;
                if let Some(own) = &own {
                    names.extend(own.names()?);
                }
                names
            }
            false => self.sides.names(Some(at.new), at.old)?,
        };
        for name in names {
            #[cfg(test)]
            COMPARED.set(COMPARED.get() + 1);
            let found = self.sides.lookup(Some(at.new), at.old, &name)?;
            let own = match &own {
                Some(own) => own.stat(&name)?,
                None => None,
            };
            self.entry(at.path.join(&name), found, own, in_place)?;
        }
        Ok(())
    }

    /// Notes what `path` is, and to look into it where more may have changed.
    fn entry(
        &mut self,
        path: PathBuf,
        (new, old): (Option<Entry>, Option<Entry>),
        own: Option<Stat>,
        in_place: bool,
    ) -> Result<()> {
        let is_dir = |entry: &Entry| entry.attr.kind == FileKind::Directory;
        let in_own = own.is_some_and(|stat| stat.st_mode & libc::S_IFMT == libc::S_IFDIR);
        let kind = match (&new, &old) {
            (None, None) => None,
            (None, Some(_)) => Some(ChangeKind::Deleted),
            (Some(_), None) => Some(ChangeKind::Added),
            (Some(new), Some(old)) if is_dir(new) && is_dir(old) => {
                let differs = looks_different(&new.attr, &old.attr)
                    || (in_own && self.directory_differs(new, old)?);
                differs.then_some(ChangeKind::Modified)
            }
            // A file of the own layer was written to, or was made anew.
            (Some(new), Some(old)) => {
                let differs = looks_different(&new.attr, &old.attr) || self.is_another(new, old)?;
                differs.then_some(ChangeKind::Modified)
            }
        };
        if let Some(kind) = kind {
            let path = path.clone();
            let step = Step {
                change: Change { path, kind },
                was_directory: old.as_ref().is_some_and(is_dir),
                is_directory: new.as_ref().is_some_and(is_dir),
            };
            match new.filter(|new| !is_dir(new) && new.attr.nlink > 1) {
                Some(new) if self.is_same(&new, old.as_ref())? => {
                    self.same.push((new.node, step));
                }
                linked => {
                    self.linked.extend(linked.map(|new| new.node));
                    self.steps.push(step);
                }
            }
        }
        let old_dir = old.filter(is_dir);
        let other_dir = match (&new, &old_dir, own) {
            (Some(new), Some(old), None) => self.is_another(new, old)?,
            _ => false,
        };
        // Otherwise it is the parent's own directory.
        let may_differ = in_own || old_dir.is_none() || kind.is_some() || other_dir;
        let may_differ = match &new {
            Some(new) if is_dir(new) && !may_differ => {
                self.sides.new.leads_to_links(&self.links, new.node)?
            }
            _ => may_differ,
        };
        let (new, old) = (
            new.map(|new| (new.node, is_dir(&new))),
            old.map(|old| old.node),
        );
        match new {
            Some((new, true)) if may_differ => {
                if old_dir.is_none() {
                    self.sides.forget(None, old);
                }
                self.waiting.push(Directory {
                    path,
                    new,
                    old: old_dir.map(|old| old.node),
                    in_own,
                    in_place,
                });
            }
            new => self.sides.forget(new.map(|(new, _)| new), old),
        }
        Ok(())
    }

    /// Whether a directory of the own layer that looks the same is to be told of.
    fn directory_differs(&self, new: &Entry, old: &Entry) -> Result<bool> {
        let sides = &self.sides;
        match (self.directories, &sides.old) {
            (Directories::Own, _) => Ok(true),
            (_, Some(union)) => Ok(xattrs_of(sides.new, new.node)? != xattrs_of(union, old.node)?),
            (_, None) => Ok(false),
        }
    }

    /// Whether a file of the own layer is what it was below in all but the number of its names: one of them was removed.
    fn is_same(&self, new: &Entry, old: Option<&Entry>) -> Result<bool> {
        let sides = &self.sides;
        let (Some(old), Some(union)) = (old, &sides.old) else {
            return Ok(false);
        };
        let Some(object) = union.lower_identity(old.node)? else {
            return Ok(false);
        };
        Ok(!looks_different(&new.attr, &old.attr)
            && sides.new.has_data_of(new.node, object)?
            && xattrs_of(sides.new, new.node)? == xattrs_of(union, old.node)?)
    }

    /// Whether what looks the same are two objects: one of the own layer, or a directory with the one was put where a
    /// directory with the other was.
    fn is_another(&self, new: &Entry, old: &Entry) -> Result<bool> {
        let Some(union) = &self.sides.old else {
            return Ok(false);
        };
        Ok(self.sides.new.lower_identity(new.node)? != union.lower_identity(old.node)?)
    }
}

/// What a snapshot has itself, as it lies on disk.
pub(in crate::snapshotter) struct OwnLayer {
    dir: PathBuf,
    tree: Tree,
}

impl OwnLayer {
    pub(in crate::snapshotter) fn open(dir: &Path) -> Result<Self> {
        let tree = Tree::open(dir).map_err(|errno| io_error("open", dir)(errno.into()))?;
        let dir = dir.to_owned();
        Ok(Self { dir, tree })
    }

    /// The directory at `path`, which is absolute as seen in the snapshot, if it is (still) one.
    pub(in crate::snapshotter) fn directory(&self, path: &Path) -> Result<Option<OwnDirectory>> {
        let path = path.strip_prefix("/").unwrap_or(path);
        let on_disk = self.dir.join(path);
        match self.tree.directory(path) {
            Ok(fd) => Ok(fd.map(|fd| OwnDirectory { fd, on_disk })),
            Err(errno) => Err(io_error("open", &on_disk)(errno.into())),
        }
    }
}

pub(in crate::snapshotter) struct OwnDirectory {
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
    pub(in crate::snapshotter) fn names(&self) -> Result<BTreeSet<OsString>> {
        let names = tree::names(self.fd.as_fd()).map_err(self.failed("list"))?;
        Ok(names.into_iter().collect())
    }

    pub(in crate::snapshotter) fn stat(&self, name: &OsStr) -> Result<Option<Stat>> {
        tree::stat(self.fd.as_fd(), name).map_err(self.failed("look into"))
    }

    pub(in crate::snapshotter) fn is_marked(&self) -> Result<bool> {
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

pub(super) fn looks_different(new: &Attr, old: &Attr) -> bool {
    let look = |attr: &Attr| {
        (
            attr.kind, attr.perm, attr.uid, attr.gid, attr.mtime, attr.rdev,
        )
    };
    look(new) != look(old) || (new.kind != FileKind::Directory && new.size != old.size)
}

#[cfg(test)]
pub(super) mod tests;
