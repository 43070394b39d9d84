//! What a snapshot changes, told entry by entry: of each path what is there now, or that nothing is.
//!
//! Whoever reads the entries in their order, on the tree that lies below, gets the tree that the snapshot shows. Every
//! path comes after its parents, and each parent of a change is told, changed or not.

use std::collections::HashMap;
use std::ffi::{OsStr, OsString};
use std::os::unix::ffi::{OsStrExt, OsStringExt};
use std::path::{Component, Path, PathBuf};

use super::{Change, ChangeKind, lookup, xattrs_of};
use crate::cow::{Attr, FileKind, NodeId, Union};
use crate::snapshotter::types::*;
use crate::store::view::{Names, View};
use crate::store::{self, Xattrs};

/// What is there now at a path.
#[derive(Clone, Copy)]
pub(super) struct Object<'a> {
    /// From below the root, without a slash at either end; empty for the root itself.
    pub(super) path: &'a [u8],
    pub(super) union: &'a Union,
    pub(super) node: NodeId,
    pub(super) attr: &'a Attr,
}

impl Object<'_> {
    /// Its extended attributes, as a user of a mount sees them, in order of their names.
    pub(super) fn xattrs(&self) -> Result<Xattrs, Fault> {
        Ok(xattrs_of(self.union, self.node)?)
    }

    /// The target of a symbolic link.
    pub(super) fn target(&self) -> Result<Vec<u8>, Fault> {
        Ok(self.union.readlink(self.node)?.into_vec())
    }

    /// Major and minor number of a device.
    pub(super) fn device(&self) -> Result<(u32, u32), Fault> {
        let rdev = self.attr.rdev;
        let device = (libc::major(rdev), libc::minor(rdev));
        if self.attr.kind == FileKind::CharDevice && device == (0, 0) {
            return Err(Fault::Unspeakable(
                "it is the character device 0:0, which marks a deletion in overlayfs",
            ));
        }
        Ok(device)
    }
}

/// Where entries go to.
pub(super) trait Output {
    /// The object is to be made; a directory that is there stays, with what is in it.
    fn object(&mut self, object: &Object<'_>) -> Result<(), Fault>;
    /// The object is another name of what is at `target`.
    fn link(&mut self, object: &Object<'_>, target: &[u8]) -> Result<(), Fault>;
    /// The path is gone, with all below it.
    fn remove(&mut self, path: &[u8]) -> Result<(), Fault>;
}

/// Why an entry cannot be told.
pub(super) enum Fault {
    Io(std::io::Error),
    /// What a form of layers has no word for.
    Unspeakable(&'static str),
    Other(Error),
}

impl From<std::io::Error> for Fault {
    fn from(source: std::io::Error) -> Self {
        Self::Io(source)
    }
}

impl From<crate::cow::Error> for Fault {
    fn from(source: crate::cow::Error) -> Self {
        Self::Other(source.into())
    }
}

impl From<store::Error> for Fault {
    fn from(source: store::Error) -> Self {
        Self::Other(source.into())
    }
}

pub(super) fn at(path: &Path, fault: Fault) -> Error {
    match fault {
        Fault::Io(source) => io_error("write a layer with", path)(source),
        Fault::Unspeakable(problem) => Error::Unspeakable {
            path: path.to_owned(),
            problem,
        },
        Fault::Other(error) => error,
    }
}

/// Tells the changes, which are in byte order of their paths, of the union `new`. `view` is that of the packed layers in
/// it.
pub(super) fn tell(
    changes: &[Change],
    new: &Union,
    view: Option<&View>,
    out: &mut impl Output,
) -> Result<()> {
    let mut teller = Teller {
        changes,
        new,
        view,
        out,
        above: Vec::new(),
        links: HashMap::new(),
        names: None,
    };
    for change in changes {
        teller
            .change(change)
            .map_err(|fault| at(&change.path, fault))?;
    }
    Ok(())
}

struct Teller<'a, O> {
    changes: &'a [Change],
    new: &'a Union,
    view: Option<&'a View>,
    out: &'a mut O,
    /// The directories that lead to the last entry, from below the root, each with its node and an entry of its own.
    above: Vec<(OsString, NodeId)>,
    /// Paths of files with several names, by number.
    links: HashMap<u64, Vec<u8>>,
    /// Where the inodes of the view are named; found when that is first needed.
    names: Option<Names<'a>>,
}

impl<O: Output> Teller<'_, O> {
    fn change(&mut self, change: &Change) -> Result<(), Fault> {
        let parts = change.path.components().filter_map(|part| match part {
            Component::Normal(name) => Some(name),
            _ => None,
        });
        let mut parts: Vec<&OsStr> = parts.collect();
        let Some(name) = parts.pop() else {
            return Ok(());
        };
        let parent = self.descend(&parts)?;
        let path: PathBuf = parts.iter().collect();
        let path = path.join(name).into_os_string().into_vec();
        if change.kind == ChangeKind::Deleted {
            return self.out.remove(&path);
        }
        let entry = self.new.lookup(parent, name)?;
        let told = self.object(&path, entry.node, &entry.attr);
        if entry.attr.kind == FileKind::Directory {
            self.above.push((name.to_owned(), entry.node));
        } else {
            self.new.forget(entry.node, 1);
        }
        told
    }

    /// Goes to a directory by these names. Whatever reads the entries without those of directories makes of them what it
    /// likes.
    fn descend(&mut self, names: &[&OsStr]) -> Result<NodeId, Fault> {
        let pairs = self.above.iter().zip(names);
        let common = pairs
            .take_while(|((name, _), other)| name == *other)
            .count();
        for (_, node) in self.above.drain(common..) {
            self.new.forget(node, 1);
        }
        for depth in common..names.len() {
            let parent = self.above.last().map_or(NodeId::ROOT, |(_, node)| *node);
            let entry = self.new.lookup(parent, names[depth])?;
            self.above.push((names[depth].to_owned(), entry.node));
            let path: PathBuf = names[..=depth].iter().collect();
            self.object(path.as_os_str().as_bytes(), entry.node, &entry.attr)?;
        }
        Ok(self.above.last().map_or(NodeId::ROOT, |(_, node)| *node))
    }

    fn object(&mut self, path: &[u8], node: NodeId, attr: &Attr) -> Result<(), Fault> {
        let object = Object {
            path,
            union: self.new,
            node,
            attr,
        };
        if attr.nlink < 2 || attr.kind == FileKind::Directory {
            return self.out.object(&object);
        }
        if let Some(first) = self.links.get(&attr.ino) {
            return self.out.link(&object, first);
        }
        if let Some(first) = self.unchanged_name(node, attr)? {
            self.out.link(&object, &first)?;
            self.links.insert(attr.ino, first);
            return Ok(());
        }
        self.out.object(&object)?;
        self.links.insert(attr.ino, path.to_owned());
        Ok(())
    }

    /// Another name of a file that lies in a packed layer, which is not among the changes: a directory with the one name
    /// was renamed, and nothing was done to the other.
    fn unchanged_name(&mut self, node: NodeId, attr: &Attr) -> Result<Option<Vec<u8>>, Fault> {
        let Some(view) = self.view else {
            return Ok(None);
        };
        let Some(inode) = self.new.stored_inode(node)? else {
            return Ok(None);
        };
        let names = match &mut self.names {
            Some(names) => names,
            none => none.insert(view.names()?),
        };
        for name in names.paths(inode)? {
            if !self.is_change(&name) && self.leads_to(&name, attr.ino)? {
                return Ok(Some(name));
            }
        }
        Ok(None)
    }

    fn is_change(&self, path: &[u8]) -> bool {
        let path = [b"/", path].concat();
        self.changes
            .binary_search_by(|change| change.path.as_os_str().as_bytes().cmp(&path))
            .is_ok()
    }

    /// Whether the path is a name of the node of that number.
    fn leads_to(&self, path: &[u8], ino: u64) -> Result<bool, Fault> {
        let mut nodes = Vec::new();
        let mut found = Ok(None);
        for name in path.split(|&byte| byte == b'/') {
            let parent = nodes.last().copied().unwrap_or(NodeId::ROOT);
            found = lookup(self.new, parent, OsStr::from_bytes(name));
            match &found {
                Ok(Some(entry)) => nodes.push(entry.node),
                _ => break,
            }
        }
        for node in nodes {
            self.new.forget(node, 1);
        }
        match found {
            Ok(found) => Ok(found.is_some_and(|entry| entry.attr.ino == ino)),
            // What was a directory is none any more.
            Err(Error::Union { source }) if source.errno == libc::ENOTDIR => Ok(false),
            Err(error) => Err(Fault::Other(error)),
        }
    }
}
