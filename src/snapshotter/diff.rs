//! What a snapshot changes against its parent, found by walking what it has itself.
//!
//! Both sides are opened as unions of read-only layers: the one with the snapshot's own layer on top,
//! the other without. Names come from the own layer; only below a directory that does not simply
//! merge with the one below it (opaque, or redirected) are both sides listed in full.

use std::collections::BTreeSet;
use std::ffi::{OsStr, OsString};
use std::fs::{self, File};
use std::io;
use std::os::fd::AsFd;
use std::os::unix::ffi::OsStrExt;
use std::path::{Path, PathBuf};

use nix::errno::Errno;

use super::types::*;
use crate::cow::{self, Attr, Entry, FileKind, NodeId, Union, UnionConfig};
use crate::sys::fs::Object;
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

/// Compares the layers `ancestors` with `own` on top of them, in byte order of the paths.
pub(super) fn diff(own: &Path, ancestors: Vec<PathBuf>) -> Result<Vec<Change>> {
    let open = |lowers: Vec<PathBuf>| {
        Union::open(UnionConfig {
            lowers,
            ..UnionConfig::default()
        })
    };
    let old = match ancestors.is_empty() {
        true => None,
        false => Some(open(ancestors.clone())?),
    };
    let new = open(std::iter::once(own.to_owned()).chain(ancestors).collect())?;
    let mut walk = Walk {
        new,
        old,
        changes: Vec::new(),
    };
    let old_root = walk.old.is_some().then_some(NodeId::ROOT);
    walk.directory(Path::new("/"), NodeId::ROOT, old_root, Some(own))?;
    let key = |change: &Change| change.path.as_os_str().as_bytes().to_vec();
    walk.changes.sort_by_cached_key(key);
    Ok(walk.changes)
}

struct Walk {
    new: Union,
    old: Option<Union>,
    changes: Vec<Change>,
}

impl Walk {
    /// `own` is the directory in the snapshot's own layer, if it has it.
    fn directory(
        &mut self,
        path: &Path,
        new: NodeId,
        old: Option<NodeId>,
        own: Option<&Path>,
    ) -> Result<()> {
        let merged = match own {
            Some(own) => !is_marked(own)?,
            None => false,
        };
        let names: BTreeSet<OsString> = match own {
            Some(own) if merged => own_names(own)?,
            _ => {
                let mut names = names_in(&self.new, new)?;
                if let (Some(union), Some(old)) = (&self.old, old) {
                    names.extend(names_in(union, old)?);
                }
                names
            }
        };
        for name in names {
            let found = lookup(&self.new, new, &name)?;
            let before = match (&self.old, old) {
                (Some(union), Some(old)) => lookup(union, old, &name)?,
                _ => None,
            };
            let own = own.map(|own| own.join(&name));
            self.entry(&path.join(&name), found, before, own.as_deref())?;
            if let Some(entry) = found {
                self.new.forget(entry.node, 1);
            }
            if let (Some(union), Some(entry)) = (&self.old, before) {
                union.forget(entry.node, 1);
            }
        }
        Ok(())
    }

    fn entry(
        &mut self,
        path: &Path,
        new: Option<Entry>,
        old: Option<Entry>,
        own: Option<&Path>,
    ) -> Result<()> {
        let is_dir = |entry: &Entry| entry.attr.kind == FileKind::Directory;
        let own_meta = own.and_then(|own| fs::symlink_metadata(own).ok());
        let kind = match (&new, &old) {
            (None, None) => return Ok(()),
            (None, Some(_)) => Some(ChangeKind::Deleted),
            (Some(_), None) => Some(ChangeKind::Added),
            (Some(new), Some(old)) if is_dir(new) && is_dir(old) => {
                looks_different(&new.attr, &old.attr).then_some(ChangeKind::Modified)
            }
            // A file of the own layer was written to, or was made anew.
            (Some(new), Some(old)) => (own_meta.is_some() || looks_different(&new.attr, &old.attr))
                .then_some(ChangeKind::Modified),
        };
        if let Some(kind) = kind {
            let path = path.to_owned();
            self.changes.push(Change { path, kind });
        }
        let Some(new) = new.filter(is_dir) else {
            return Ok(());
        };
        let own = own.filter(|_| own_meta.is_some_and(|meta| meta.is_dir()));
        let old = old.filter(is_dir);
        if own.is_none() && old.is_some() && kind.is_none() {
            return Ok(()); // It is the parent's own directory.
        }
        self.directory(path, new.node, old.map(|old| old.node), own)
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

fn lookup(union: &Union, parent: NodeId, name: &OsStr) -> Result<Option<Entry>> {
    match union.lookup(parent, name) {
        Ok(entry) => Ok(Some(entry)),
        Err(error) if error.errno == libc::ENOENT => Ok(None),
        Err(error) => Err(error.into()),
    }
}

fn names_in(union: &Union, node: NodeId) -> Result<BTreeSet<OsString>> {
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

/// What the layer itself names: a whiteout stands under the name that it hides.
fn own_names(dir: &Path) -> Result<BTreeSet<OsString>> {
    let list = || {
        fs::read_dir(dir)?
            .map(|entry| Ok(entry?.file_name()))
            .collect::<io::Result<BTreeSet<_>>>()
    };
    list().map_err(io_error("list", dir))
}

fn is_marked(dir: &Path) -> Result<bool> {
    let failed = |error: io::Error| io_error("look at", dir)(error);
    let file = File::open(dir).map_err(failed)?;
    for name in NOT_MERGED {
        match xattr::get(Object::Open(file.as_fd()), OsStr::new(name)) {
            // "x" marks a directory that holds whiteouts of another kind, which merges.
            Ok(value) if value != b"x" => return Ok(true),
            Ok(_) | Err(Errno::ENODATA | Errno::EOPNOTSUPP) => {}
            Err(errno) => return Err(failed(errno.into())),
        }
    }
    Ok(false)
}

impl From<cow::Error> for Error {
    fn from(source: cow::Error) -> Self {
        Self::Union { source }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn changes(own: &Path, below: &Path) -> Vec<(String, ChangeKind)> {
        let all = diff(own, vec![below.to_owned()]).unwrap();
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
    fn without_a_parent_everything_is_new() {
        let tmp = tempfile::tempdir().unwrap();
        fs::create_dir(tmp.path().join("a")).unwrap();
        fs::write(tmp.path().join("a/b"), "").unwrap();
        let all = diff(tmp.path(), Vec::new()).unwrap();
        assert!(all.iter().all(|change| change.kind == ChangeKind::Added));
        assert_eq!(all.len(), 2);
    }
}
