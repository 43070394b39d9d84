//! Names inside the union while a layer is unpacked into it.
//!
//! A path is resolved as `chroot` to the union's root would, with directories that are missing made on
//! the way; the last component is left to the caller and is never followed.

use std::collections::{HashMap, VecDeque};
use std::ffi::{OsStr, OsString};
use std::os::unix::ffi::{OsStrExt, OsStringExt};
use std::rc::Rc;

use super::written::Written;
use crate::cow::union::{Error, Result};
use crate::cow::{Caller, DirEntry, Entry, FileKind, NodeId, Union};

/// As containerd's resolver.
const MOST_LINKS: usize = 255;
/// PATH_MAX without the final zero: also bounds the depth of what can be made.
const LONGEST_PATH: usize = 4095;
/// Directories that are kept open in case that the next entry lies there too.
const LARGEST_CACHE: usize = 1024;
/// Mode of a directory that the layer does not mention.
const MISSING_DIRECTORY: u32 = 0o755;

/// One counted reference to a node.
struct NodeRef<'u> {
    union: &'u Union,
    id: NodeId,
}

impl Drop for NodeRef<'_> {
    fn drop(&mut self) {
        // The root was not looked up.
        if self.id != NodeId::ROOT {
            self.union.forget(self.id, 1);
        }
    }
}

/// A directory that a path has led to.
pub(super) struct Directory<'u> {
    node: NodeRef<'u>,
    parent: Option<Rc<Directory<'u>>>,
    /// Where it is, without links; empty for the root.
    path: Vec<u8>,
}

impl Directory<'_> {
    pub(super) fn id(&self) -> NodeId {
        self.node.id
    }

    /// The path of a name in it.
    pub(super) fn path_of(&self, name: &[u8]) -> Vec<u8> {
        let mut path = self.path.clone();
        if !path.is_empty() {
            path.push(b'/');
        }
        path.extend_from_slice(name);
        path
    }
}

/// A name and what it stands for, one lookup counted.
pub(super) struct Found<'u> {
    node: NodeRef<'u>,
    pub(super) entry: Entry,
}

impl Found<'_> {
    pub(super) fn id(&self) -> NodeId {
        self.node.id
    }

    pub(super) fn is_directory(&self) -> bool {
        self.entry.attr.kind == FileKind::Directory
    }
}

/// The union as a tree of names.
pub(super) struct Tree<'u> {
    union: &'u Union,
    root: Rc<Directory<'u>>,
    /// Where directory names of the layer have led to. Emptied when a directory or a link goes, for
    /// nothing else can change where a path that exists leads to.
    cache: HashMap<Vec<u8>, Rc<Directory<'u>>>,
}

impl<'u> Tree<'u> {
    pub(super) fn new(union: &'u Union) -> Self {
        let node = NodeRef {
            union,
            id: NodeId::ROOT,
        };
        Self {
            union,
            root: Rc::new(Directory {
                node,
                parent: None,
                path: Vec::new(),
            }),
            cache: HashMap::new(),
        }
    }

    /// The directory that `path` (clean, relative to the root) leads to; what is missing of it is made.
    pub(super) fn make_directory(&mut self, path: &[u8]) -> Result<Rc<Directory<'u>>> {
        let (mut directory, missing) = self.resolve(path)?;
        for name in missing {
            let name = OsString::from_vec(name);
            check_length(directory.path.len() + 1 + name.len())?;
            let made = self
                .union
                .mkdir(directory.id(), &name, MISSING_DIRECTORY, &Caller::ROOT)?;
            let found = self.count(made);
            directory = enter(&directory, name.as_bytes(), found);
        }
        self.remember(path, &directory);
        Ok(directory)
    }

    /// The directory that `path` leads to, if all of it exists.
    pub(super) fn directory(&mut self, path: &[u8]) -> Result<Option<Rc<Directory<'u>>>> {
        let (directory, missing) = self.resolve(path)?;
        if !missing.is_empty() {
            return Ok(None);
        }
        self.remember(path, &directory);
        Ok(Some(directory))
    }

    /// What `name` is in `directory`, not followed.
    pub(super) fn find(&self, directory: NodeId, name: &OsStr) -> Result<Option<Found<'u>>> {
        match self.union.lookup(directory, name) {
            Ok(entry) => Ok(Some(self.count(entry))),
            Err(error) if error.errno == libc::ENOENT => Ok(None),
            Err(error) => Err(error),
        }
    }

    /// Takes over the lookup that an answer of the union counts.
    pub(super) fn count(&self, entry: Entry) -> Found<'u> {
        Found {
            node: NodeRef {
                union: self.union,
                id: entry.node,
            },
            entry,
        }
    }

    /// Removes `name` and all below it. It is no error if there is none.
    pub(super) fn remove_all(&mut self, parent: NodeId, name: &OsStr) -> Result<()> {
        let Some(found) = self.find(parent, name)? else {
            return Ok(());
        };
        if !found.is_directory() {
            if found.entry.attr.kind == FileKind::Symlink {
                self.cache.clear();
            }
            return self.union.unlink(parent, name);
        }
        self.cache.clear();
        // No recursion: the layers below may be deeper than the stack.
        let mut levels = vec![self.empty_of_files(found, name)?];
        while let Some(level) = levels.last_mut() {
            let id = level.found.id();
            if let Some(name) = level.directories.pop() {
                if let Some(found) = self.find(id, &name)? {
                    let below = self.empty_of_files(found, &name)?;
                    levels.push(below);
                }
            } else if let Some(empty) = levels.pop() {
                let parent = levels.last().map_or(parent, |above| above.found.id());
                self.union.rmdir(parent, &empty.name)?;
            }
        }
        Ok(())
    }

    /// Removes everything below `directory` that is not in `written`.
    pub(super) fn remove_unwritten(
        &mut self,
        directory: &Rc<Directory<'u>>,
        written: &Written,
    ) -> Result<()> {
        let mut waiting = vec![Rc::clone(directory)];
        while let Some(directory) = waiting.pop() {
            for child in self.list(directory.id())? {
                if !written.contains(&directory.path_of(child.name.as_bytes())) {
                    self.remove_all(directory.id(), &child.name)?;
                } else if let Some(found) = self.find(directory.id(), &child.name)?
                    && found.is_directory()
                {
                    waiting.push(enter(&directory, child.name.as_bytes(), found));
                }
            }
        }
        Ok(())
    }

    fn remember(&mut self, path: &[u8], directory: &Rc<Directory<'u>>) {
        if self.cache.len() >= LARGEST_CACHE {
            self.cache.clear();
        }
        self.cache.insert(path.to_vec(), Rc::clone(directory));
    }

    /// Follows `path` as far as it exists; the rest are names that are to be made one in the other.
    fn resolve(&self, path: &[u8]) -> Result<(Rc<Directory<'u>>, Vec<Vec<u8>>)> {
        let (mut directory, mut to_do) = self.longest_cached(path);
        let mut missing: Vec<Vec<u8>> = Vec::new();
        let mut links = 0;
        while let Some(name) = to_do.pop_front() {
            if name == b".." {
                // At the root it stays there.
                if missing.pop().is_none()
                    && let Some(parent) = &directory.parent
                {
                    directory = Rc::clone(parent);
                }
                continue;
            }
            if !missing.is_empty() {
                missing.push(name);
                continue;
            }
            let Some(found) = self.find(directory.id(), OsStr::from_bytes(&name))? else {
                missing.push(name);
                continue;
            };
            match found.entry.attr.kind {
                FileKind::Directory => directory = enter(&directory, &name, found),
                FileKind::Symlink => {
                    links += 1;
                    let target = self.union.readlink(found.id())?;
                    if links > MOST_LINKS {
                        return Err(fail(libc::ELOOP, "follow a symbolic link"));
                    }
                    if target.as_bytes().first() == Some(&b'/') {
                        directory = Rc::clone(&self.root);
                    }
                    for part in components(target.as_bytes()).rev() {
                        to_do.push_front(part.to_vec());
                    }
                }
                _ => return Err(fail(libc::ENOTDIR, "enter what is not a directory")),
            }
        }
        Ok((directory, missing))
    }

    /// Where to start on the way along `path`, and what is left of it.
    fn longest_cached(&self, path: &[u8]) -> (Rc<Directory<'u>>, VecDeque<Vec<u8>>) {
        let mut known = path;
        loop {
            let directory = if known.is_empty() {
                Some(&self.root)
            } else {
                self.cache.get(known)
            };
            if let Some(directory) = directory {
                let rest = components(&path[known.len()..]).map(<[u8]>::to_vec);
                return (Rc::clone(directory), rest.collect());
            }
            let slash = known.iter().rposition(|&byte| byte == b'/');
            known = &known[..slash.unwrap_or(0)];
        }
    }

    fn empty_of_files(&self, found: Found<'u>, name: &OsStr) -> Result<Level<'u>> {
        let mut directories = Vec::new();
        for child in self.list(found.id())? {
            if child.kind == FileKind::Directory {
                directories.push(child.name);
            } else {
                self.union.unlink(found.id(), &child.name)?;
            }
        }
        Ok(Level {
            found,
            name: name.to_owned(),
            directories,
        })
    }

    /// The names in a directory, without `.` and `..`.
    fn list(&self, directory: NodeId) -> Result<Vec<DirEntry>> {
        let handle = self.union.open_dir(directory)?;
        let mut children = Vec::new();
        self.union.read_dir(directory, &handle, 0, &mut |child| {
            if child.name != "." && child.name != ".." {
                children.push(child);
            }
            true
        })?;
        Ok(children)
    }
}

/// A directory on its way out.
struct Level<'u> {
    found: Found<'u>,
    name: OsString,
    directories: Vec<OsString>,
}

fn enter<'u>(parent: &Rc<Directory<'u>>, name: &[u8], found: Found<'u>) -> Rc<Directory<'u>> {
    Rc::new(Directory {
        path: parent.path_of(name),
        parent: Some(Rc::clone(parent)),
        node: found.node,
    })
}

/// The names in a path, without empty ones and `.`.
fn components(path: &[u8]) -> impl DoubleEndedIterator<Item = &[u8]> {
    path.split(|&byte| byte == b'/')
        .filter(|part| !part.is_empty() && *part != b".")
}

pub(super) fn check_length(length: usize) -> Result<()> {
    if length > LONGEST_PATH {
        return Err(fail(libc::ENAMETOOLONG, "make a path that long"));
    }
    Ok(())
}

fn fail(errno: i32, what: &'static str) -> Error {
    Error {
        errno,
        context: what.into(),
    }
}
