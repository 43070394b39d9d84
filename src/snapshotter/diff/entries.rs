//! What a snapshot changes, told entry by entry: of each path what is there now, or that nothing is.
//!
//! Whoever reads the entries in their order, on the tree that lies below, gets the tree that the snapshot shows. Every
//! path comes after its parents, and each parent of a change is told, changed or not.
//!
//! A snapshot that is in use may be another by the time that its changes are told. Then each path is told as what is there at
//! its turn: what has gone as gone, and what has come to be something else as that. What has come to other paths is not told.

use std::collections::{BTreeSet, HashMap};
use std::ffi::{OsStr, OsString};
use std::os::unix::ffi::{OsStrExt, OsStringExt};
use std::path::{Component, Path, PathBuf};

use super::{Change, ChangeKind, in_walk, lookup, may_have_changed, xattrs_of};
use crate::cow::{self, Attr, Entry, FileKind, NodeId, Union};
use crate::snapshotter::types::*;
use crate::store::view::{Names, View};
use crate::store::{self, Xattrs};
use crate::sys::handle::Handle;

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
    /// The content cannot be read of a file that is being told.
    Content(cow::Error),
    /// Anything else; nothing of the entry has been handed over then.
    Other(Error),
}

impl From<std::io::Error> for Fault {
    fn from(source: std::io::Error) -> Self {
        Self::Io(source)
    }
}

impl From<cow::Error> for Fault {
    fn from(source: cow::Error) -> Self {
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
        Fault::Content(source) => source.into(),
        Fault::Other(error) => error,
    }
}

/// Tells the changes, which are in the order of a walk, of the union `new`. `view` is that of the packed layers in
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
        leaves: BTreeSet::new(),
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

/// Where a directory was when the changes were found.
enum Above {
    /// It is there; a lookup of it is held.
    Directory(NodeId),
    /// It has gone since it was told.
    Gone,
}

fn path_of<'a>(names: impl IntoIterator<Item = &'a &'a OsStr>) -> Vec<u8> {
    let path: PathBuf = names.into_iter().collect();
    path.into_os_string().into_vec()
}

struct Teller<'a, O> {
    changes: &'a [Change],
    new: &'a Union,
    view: Option<&'a View>,
    out: &'a mut O,
    /// The directories that lead to the last entry, from below the root, each with its node and an entry of its own.
    above: Vec<(OsString, NodeId)>,
    /// Paths of what was a directory, or may have been one, and was told as gone or as something else. Nothing below them is told.
    leaves: BTreeSet<Vec<u8>>,
    /// Paths of files with several names, by number, and what tells them from others that have the number later.
    links: HashMap<u64, (Vec<u8>, Option<Handle>)>,
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
        let Some(parent) = self.descend(&parts)? else {
            return Ok(());
        };
        let path = path_of(parts.iter().chain([&name]));
        if change.kind == ChangeKind::Deleted {
            return self.out.remove(&path);
        }
        let told = match parent {
            Above::Directory(parent) => self.name(parent, name, &path)?,
            Above::Gone => None,
        };
        match told {
            Some((node, true)) => self.above.push((name.to_owned(), node)),
            Some(_) if self.has_changes_below(&path) => {
                self.leaves.insert(path);
            }
            Some(_) => {}
            None => {
                if change.kind == ChangeKind::Modified {
                    self.out.remove(&path)?;
                }
                self.leaves.insert(path);
            }
        }
        Ok(())
    }

    /// Goes to a directory by these names. Whatever reads the entries without those of directories makes of them what it
    /// likes. `None` where nothing is to be told.
    fn descend(&mut self, names: &[&OsStr]) -> Result<Option<Above>, Fault> {
        let pairs = self.above.iter().zip(names);
        let common = pairs
            .take_while(|((name, _), other)| name == *other)
            .count();
        for (_, node) in self.above.drain(common..) {
            self.new.forget(node, 1);
        }
        let mut at = Above::Directory(self.above.last().map_or(NodeId::ROOT, |(_, node)| *node));
        for depth in common..names.len() {
            let path = path_of(&names[..=depth]);
            if self.leaves.contains(&path) {
                return Ok(None);
            }
            let told = match at {
                Above::Directory(parent) => self.name(parent, names[depth], &path)?,
                Above::Gone => None,
            };
            at = match told {
                Some((node, true)) => {
                    self.above.push((names[depth].to_owned(), node));
                    Above::Directory(node)
                }
                // It was told in its turn, as a directory.
                None if self.is_change(&path) => Above::Gone,
                told => {
                    if told.is_none() {
                        self.out.remove(&path)?;
                    }
                    self.leaves.insert(path);
                    return Ok(None);
                }
            };
        }
        Ok(Some(at))
    }

    /// Tells what is there under a name of a directory, if anything is. Answers its node, and whether it is a directory; a lookup of
    /// such a one is held.
    fn name(
        &mut self,
        parent: NodeId,
        name: &OsStr,
        path: &[u8],
    ) -> Result<Option<(NodeId, bool)>, Fault> {
        // To be unlucky so many times somebody would have to replace it all the time.
        const AGAIN: usize = 30;
        let mut tries = 0;
        loop {
            let Some(Entry { node, attr, .. }) = self.lookup(parent, name)? else {
                return Ok(None);
            };
            let is_directory = attr.kind == FileKind::Directory;
            let told = self.object(path, node, &attr);
            if told.is_err() || !is_directory {
                self.new.forget(node, 1);
            }
            match told {
                Err(Fault::Other(error))
                    if self.new.is_live() && may_have_changed(&error) && tries < AGAIN =>
                {
                    tries += 1;
                }
                told => return told.map(|()| Some((node, is_directory))),
            }
        }
    }

    fn lookup(&self, parent: NodeId, name: &OsStr) -> Result<Option<Entry>, Fault> {
        match self.new.lookup(parent, name) {
            Err(error) if error.errno == libc::ENOENT && self.new.is_live() => Ok(None),
            entry => Ok(Some(entry?)),
        }
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
        let handle = match self.new.is_live() {
            true => self.new.lower_handle(node)?,
            false => None,
        };
        if let Some((first, known)) = self.links.get(&attr.ino)
            && *known == handle
        {
            return self.out.link(&object, first);
        }
        let first = match self.unchanged_name(node, attr)? {
            Some(first) => {
                self.out.link(&object, &first)?;
                first
            }
            None => {
                self.out.object(&object)?;
                path.to_owned()
            }
        };
        self.links.insert(attr.ino, (first, handle));
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
            let is_gone = || {
                let below = |leaf: &Vec<u8>| Some(name.strip_prefix(&**leaf)?.first()? == &b'/');
                self.leaves.iter().any(|leaf| below(leaf) == Some(true))
            };
            if !self.is_change(&name) && !is_gone() && self.leads_to(&name, attr.ino)? {
                return Ok(Some(name));
            }
        }
        Ok(None)
    }

    fn is_change(&self, path: &[u8]) -> bool {
        self.first_change(&[b"/", path].concat(), |found, path| found == path)
    }

    fn has_changes_below(&self, path: &[u8]) -> bool {
        self.first_change(&[b"/", path, b"/"].concat(), <[u8]>::starts_with)
    }

    /// Whether that holds of the first change that does not come before a path.
    fn first_change(&self, path: &[u8], holds: impl Fn(&[u8], &[u8]) -> bool) -> bool {
        fn path_of(change: &Change) -> &[u8] {
            change.path.as_os_str().as_bytes()
        }
        let first = self
            .changes
            .partition_point(|change| in_walk(path_of(change)).lt(in_walk(path)));
        let found = self.changes.get(first);
        found.is_some_and(|change| holds(path_of(change), path))
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

#[cfg(test)]
mod tests;
