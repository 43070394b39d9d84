//! A tree in memory, to which the entries of layers are applied as unpacking into a directory would
//! apply them.
//!
//! The semantics are those of containerd's `archive.Apply`: a whiteout removes a tree, an opaque marker what the
//! layer itself did not write; a path passes through symbolic links as after `chroot` into the tree, its last
//! name is never followed; missing parents are made; a hard link's entry speaks for the file that it goes to. Beyond that a
//! hard link may come before its target.

mod attributes;
mod forward;

use std::collections::{BTreeMap, HashMap, HashSet, VecDeque};

pub(super) use self::attributes::LeftOut;
use self::forward::Forward;
use super::effort::Effort;
use crate::store::error::{Error, Result, printable, refused};
use crate::store::format::Time;
use crate::store::format::tables::{Extent, Object, Xattrs};
use crate::store::layer::index::{Action, LONGEST_PATH, LayerEntry, LayerIndex, is_name};

/// As containerd's resolver.
const MOST_LINKS: usize = 255;
/// Mode of a directory that no layer mentions.
pub(in crate::store) const MISSING_DIRECTORY: u16 = 0o755;
/// Bytes that an extended attribute takes beside its name and its value.
pub(super) const XATTR: usize = 96;
/// Bytes that a node takes with its place in a directory, beside what has as many as its layer says.
const NODE: usize = 250;
/// Not the number of a layer.
const NO_LAYER: u16 = u16::MAX;

/// Number of a node.
pub(super) type Id = u32;

/// What a name in a directory stands for.
#[derive(Clone, Copy, Debug)]
pub(super) struct Child {
    pub(super) node: Id,
    /// The layer that made it, or, if it is a directory, wrote below it last.
    pub(super) layer: u16,
    /// The last layer that wrote it or something below it: opaque markers of that layer spare it.
    written: u16,
}

/// What a node is, beyond its attributes.
#[derive(Debug)]
pub(super) enum Body {
    Directory(Directory),
    /// A regular file that is one object, or empty.
    Whole(Option<Object>),
    /// A regular file with holes. The extents' objects are places in the list.
    Sparse(Vec<Extent>, Vec<Object>),
    Symlink(Box<[u8]>),
    /// A device, a fifo or a socket.
    Other,
}

#[derive(Debug, Default)]
pub(super) struct Directory {
    pub(super) children: BTreeMap<Box<[u8]>, Child>,
    /// Directory above and name in it; the root's are its own number and no name.
    above: Id,
    name: Box<[u8]>,
    /// Bytes of its path with all slashes.
    path_bytes: usize,
}

/// An object of the tree.
#[derive(Debug)]
pub(super) struct Node {
    pub(super) mode: u16,
    pub(super) uid: u32,
    pub(super) gid: u32,
    pub(super) mtime: Time,
    pub(super) atime: Time,
    /// Number of the set in [`Tree::xattrs`].
    pub(super) xattrs: u32,
    /// As in an inode of an index.
    pub(super) size: u64,
    pub(super) body: Body,
}

/// The tree. What is removed stays in it as a node that no directory has.
pub(super) struct Tree {
    nodes: Vec<Node>,
    sets: Vec<Xattrs>,
    known_sets: HashMap<Xattrs, u32>,
    /// Paths that the layer at hand wrote and removed again. containerd knows what was written by its path, so opaque
    /// markers also spare a directory that is made there later as a missing parent.
    removed: HashSet<Vec<u8>>,
    /// Hard links of the layer at hand that go to what it has not listed yet.
    forward: Forward,
    left_out: Option<LeftOut>,
    /// Bytes of the names, targets of links and maps of sparse files that were ever in it.
    texts: usize,
    effort: Effort,
}

/// Number of the root.
pub(super) const ROOT: Id = 0;

impl Tree {
    /// A tree with an empty root.
    pub(super) fn new() -> Self {
        Self {
            nodes: vec![Node::directory(Directory::default())],
            sets: vec![Xattrs::new()],
            known_sets: HashMap::new(),
            removed: HashSet::new(),
            forward: Forward::default(),
            left_out: None,
            texts: 0,
            effort: Effort::default(),
        }
    }

    /// A node that a directory has; `None` if there is none of that number.
    pub(super) fn node(&self, id: Id) -> Option<&Node> {
        self.nodes.get(id as usize)
    }

    /// Nodes that were ever made.
    pub(super) fn len(&self) -> usize {
        self.nodes.len()
    }

    /// About how many bytes it takes in memory.
    pub(super) fn bytes(&self) -> usize {
        self.nodes.len() * NODE + self.texts + self.effort.held()
    }

    /// A set of extended attributes, in order of their names.
    pub(super) fn xattrs(&self, set: u32) -> &[(Vec<u8>, Vec<u8>)] {
        self.sets.get(set as usize).map_or(&[], Vec::as_slice)
    }

    /// What of the layer that was applied last is not in the tree.
    pub(super) fn left_out(&self) -> Option<&LeftOut> {
        self.left_out.as_ref()
    }

    /// Applies the layer `index`, the one of that number.
    pub(super) fn apply(&mut self, index: &LayerIndex, layer: u16) -> Result<()> {
        self.removed.clear();
        self.left_out = None;
        self.effort.allow(index.len());
        for number in 0..index.len() {
            let entry = index.entry(number)?;
            let path = index.path(entry.path)?;
            self.entry(index, &entry, &path, layer)
                .map_err(|fault| fault.at(&path))?;
        }
        self.join_links(index)
    }

    fn entry(
        &mut self,
        index: &LayerIndex,
        entry: &LayerEntry,
        path: &[&[u8]],
        layer: u16,
    ) -> Result<(), Fault> {
        if entry.action == Action::Clear {
            match self.make_directory(path, layer) {
                Ok(directory) => self.remove_unwritten(directory, layer),
                Err(Fault::NotADirectory) => {}
                Err(fault) => return Err(fault),
            }
            return Ok(());
        }
        let Some((name, above)) = path.split_last() else {
            // Of what comes in a stream, nothing but a marker speaks of the root.
            return match entry.action {
                Action::MakeExactly if entry.inode.kind() != libc::S_IFDIR => {
                    Err(index.damaged("its root is not a directory").into())
                }
                Action::MakeExactly => self.set_attributes(index, entry, ROOT, path),
                _ => Ok(()),
            };
        };
        let above = match self.make_directory(above, layer) {
            // Below a file there is nothing to remove. umoci writes such whiteouts for a directory that a
            // file has replaced.
            Err(Fault::NotADirectory) if entry.action == Action::Remove => return Ok(()),
            result => result?,
        };
        if entry.action == Action::Remove {
            return self.remove(above, name, layer);
        }
        self.check_length(above, name)?;
        let existing = self.child(above, name);
        let directory = entry.action != Action::Link && entry.inode.kind() == libc::S_IFDIR;
        let merged = existing.filter(|child| directory && self.is_directory(child.node));
        let node = match merged {
            Some(child) => child.node,
            None => {
                self.remove(above, name, layer)?;
                self.create(index, entry, above, name)?
            }
        };
        // A link that stands in for its target says nothing of it, for the target's own entry comes later.
        if self.forward.has(node) {
            self.forward.note(node, above, name);
        } else {
            self.set_attributes(index, entry, node, path)?;
        }
        let child = Child {
            node,
            layer,
            written: layer,
        };
        self.texts += name.len();
        if let Some(directory) = self.directory_mut(above) {
            directory.children.insert(Box::from(*name), child);
        }
        self.mark_written(above, layer);
        Ok(())
    }

    fn create(
        &mut self,
        index: &LayerIndex,
        entry: &LayerEntry,
        above: Id,
        name: &[u8],
    ) -> Result<Id, Fault> {
        let inode = &entry.inode;
        if entry.action == Action::Link {
            return match self.link_target(index.target(inode)?)? {
                Some(target) => Ok(target),
                None => self.stand_in(entry),
            };
        }
        let body = match inode.kind() {
            libc::S_IFREG => content(index, entry)?,
            libc::S_IFLNK => Body::Symlink(index.target(inode)?.into()),
            libc::S_IFDIR => Body::Directory(self.directory_below(above, name)),
            libc::S_IFCHR | libc::S_IFBLK | libc::S_IFIFO | libc::S_IFSOCK => Body::Other,
            other => {
                let problem = format!("an entry is of the unknown type {other:#o}");
                return Err(index.damaged(problem).into());
            }
        };
        self.add(Node {
            mode: inode.mode,
            uid: inode.uid,
            gid: inode.gid,
            mtime: inode.mtime,
            atime: inode.atime,
            xattrs: 0,
            size: inode.size,
            body,
        })
    }

    /// What a hard link goes to: a file of this layer or of one below; `None` if there is none.
    fn link_target(&self, target: &[u8]) -> Result<Option<Id>, Fault> {
        let path: Vec<&[u8]> = components(target).collect();
        let Some((name, above)) = path.split_last() else {
            return Err(Fault::of_target(target, "is the root"));
        };
        let (above, rest) = self.resolve(above)?;
        if !rest.is_empty() {
            return Ok(None);
        }
        match self.child(above, name) {
            Some(found) if self.is_directory(found.node) => {
                Err(Fault::of_target(target, "is a directory"))
            }
            found => Ok(found.map(|child| child.node)),
        }
    }

    /// Notes that the layer wrote something in `directory`, for it and all above it.
    fn mark_written(&mut self, mut directory: Id, layer: u16) {
        while directory != ROOT {
            let Some(Directory { above, name, .. }) = self.directory(directory) else {
                return;
            };
            let (above, name) = (*above, name.clone());
            let child = self
                .directory_mut(above)
                .and_then(|above| above.children.get_mut(&name));
            match child {
                // Whoever noted this one has noted those above.
                Some(child) if child.written != layer => {
                    (child.layer, child.written) = (layer, layer);
                }
                _ => return,
            }
            directory = above;
        }
    }

    /// Removes everything below `directory` that the layer has not written.
    fn remove_unwritten(&mut self, directory: Id, layer: u16) {
        let mut waiting = vec![directory];
        while let Some(id) = waiting.pop() {
            let Some(directory) = self.directory_mut(id) else {
                continue;
            };
            directory.children.retain(|_, child| child.written == layer);
            let kept: Vec<Id> = directory
                .children
                .values()
                .map(|child| child.node)
                .collect();
            waiting.extend(kept.into_iter().filter(|id| self.is_directory(*id)));
        }
    }

    fn remove(&mut self, directory: Id, name: &[u8], layer: u16) -> Result<(), Fault> {
        let path = self.path_of(directory, name)?;
        let removed = self
            .directory_mut(directory)
            .and_then(|directory| directory.children.remove(name));
        let mut waiting: Vec<_> = removed.map(|child| (path, child)).into_iter().collect();
        while let Some((path, child)) = waiting.pop() {
            if child.written != layer {
                continue;
            }
            if let Some(directory) = self.directory(child.node) {
                let below = directory.children.iter();
                waiting
                    .extend(below.map(|(name, child)| ([&path, &b"/"[..], name].concat(), *child)));
            }
            self.effort.hold(path.len())?;
            self.removed.insert(path);
        }
        Ok(())
    }

    /// The path of a name in a directory.
    fn path_of(&self, directory: Id, name: &[u8]) -> Result<Vec<u8>, Fault> {
        let mut names = vec![name];
        let mut at = directory;
        while at != ROOT
            && let Some(directory) = self.directory(at)
        {
            names.push(&directory.name);
            at = directory.above;
        }
        self.effort.step(names.len())?;
        names.reverse();
        Ok(names.join(&b'/'))
    }

    /// The directory that `path` leads to; what is missing of it is made.
    fn make_directory(&mut self, path: &[&[u8]], layer: u16) -> Result<Id, Fault> {
        let (mut directory, missing) = self.resolve(path)?;
        for name in missing {
            // The target of a symbolic link may have parts that no directory can have as names.
            if !is_name(&name) {
                return Err(Fault::TooLong);
            }
            self.check_length(directory, &name)?;
            let below = self.directory_below(directory, &name);
            let node = self.add(Node::directory(below))?;
            let again =
                !self.removed.is_empty() && self.removed.contains(&self.path_of(directory, &name)?);
            let child = Child {
                node,
                layer,
                written: if again { layer } else { NO_LAYER },
            };
            self.texts += name.len();
            if let Some(above) = self.directory_mut(directory) {
                above.children.insert(name.into(), child);
            }
            directory = node;
        }
        Ok(directory)
    }

    /// Follows `path` as far as it exists; the rest are names that are to be made one in the other.
    fn resolve(&self, path: &[&[u8]]) -> Result<(Id, Vec<Vec<u8>>), Fault> {
        let mut directory = ROOT;
        let mut to_do: VecDeque<&[u8]> = path.iter().copied().collect();
        let mut missing: Vec<Vec<u8>> = Vec::new();
        let mut links = 0;
        while let Some(name) = to_do.pop_front() {
            self.effort.step(1)?;
            if name == b".." {
                // At the root it stays there.
                if missing.pop().is_none() {
                    directory = self.directory(directory).map_or(ROOT, |here| here.above);
                }
                continue;
            }
            let found = if missing.is_empty() {
                self.child(directory, name)
            } else {
                None
            };
            let Some(found) = found.and_then(|child| Some((child.node, self.node(child.node)?)))
            else {
                missing.push(name.to_vec());
                continue;
            };
            match &found.1.body {
                Body::Directory(_) => directory = found.0,
                Body::Symlink(target) => {
                    links += 1;
                    if links > MOST_LINKS {
                        return Err(Fault::Loop);
                    }
                    if target.first() == Some(&b'/') {
                        directory = ROOT;
                    }
                    for part in components(target).rev() {
                        to_do.push_front(part);
                    }
                }
                _ => return Err(Fault::NotADirectory),
            }
        }
        Ok((directory, missing))
    }

    fn child(&self, directory: Id, name: &[u8]) -> Option<Child> {
        self.directory(directory)?.children.get(name).copied()
    }

    fn is_directory(&self, id: Id) -> bool {
        self.directory(id).is_some()
    }

    fn directory(&self, id: Id) -> Option<&Directory> {
        match &self.node(id)?.body {
            Body::Directory(directory) => Some(directory),
            _ => None,
        }
    }

    fn directory_mut(&mut self, id: Id) -> Option<&mut Directory> {
        match &mut self.nodes.get_mut(id as usize)?.body {
            Body::Directory(directory) => Some(directory),
            _ => None,
        }
    }

    fn directory_below(&self, above: Id, name: &[u8]) -> Directory {
        let path_bytes = self.directory(above).map_or(0, |above| above.path_bytes);
        Directory {
            children: BTreeMap::new(),
            above,
            name: name.into(),
            path_bytes: path_bytes + 1 + name.len(),
        }
    }

    /// PATH_MAX also bounds the depth of what can be made.
    fn check_length(&self, above: Id, name: &[u8]) -> Result<(), Fault> {
        let above = self.directory(above).map_or(0, |above| above.path_bytes);
        if above + name.len() > LONGEST_PATH {
            return Err(Fault::TooLong);
        }
        Ok(())
    }

    fn add(&mut self, node: Node) -> Result<Id, Fault> {
        self.effort.make(self.nodes.len())?;
        let id = u32::try_from(self.nodes.len()).ok();
        let id = id.filter(|id| *id < u32::MAX - 2);
        let id = id.ok_or_else(|| Fault::Refused("there are too many entries".to_owned()))?;
        self.texts += match &node.body {
            Body::Directory(directory) => directory.name.len(),
            Body::Symlink(target) => target.len(),
            Body::Sparse(extents, objects) => size_of_val(&**extents) + size_of_val(&**objects),
            Body::Whole(_) | Body::Other => 0,
        };
        self.nodes.push(node);
        Ok(id)
    }
}

impl Node {
    fn directory(directory: Directory) -> Self {
        let mode = libc::S_IFDIR as u16 | MISSING_DIRECTORY;
        Self::unmentioned(mode, Body::Directory(directory))
    }

    /// One of which no entry gives attributes.
    fn unmentioned(mode: u16, body: Body) -> Self {
        Self {
            mode,
            uid: 0,
            gid: 0,
            mtime: Time::default(),
            atime: Time::default(),
            xattrs: 0,
            size: 0,
            body,
        }
    }
}

/// The content of a regular file.
fn content(index: &LayerIndex, entry: &LayerEntry) -> Result<Body> {
    let mut extents = index.extents(&entry.inode)?;
    if let [only] = extents.as_slice()
        && only.offset == 0
        && only.object_offset == 0
        && only.length == entry.inode.size
    {
        let object = index.object(only.object)?;
        if object.size == entry.inode.size {
            return Ok(Body::Whole(Some(object)));
        }
    }
    if entry.inode.size == 0 {
        return Ok(Body::Whole(None));
    }
    let mut objects: Vec<Object> = Vec::new();
    for extent in &mut extents {
        let object = index.object(extent.object)?;
        let known = objects.iter().position(|known| *known == object);
        extent.object = known.unwrap_or(objects.len()) as u32;
        if known.is_none() {
            objects.push(object);
        }
    }
    Ok(Body::Sparse(extents, objects))
}

/// The names in a path, without empty ones and `.`.
fn components(path: &[u8]) -> impl DoubleEndedIterator<Item = &[u8]> {
    path.split(|&byte| byte == b'/')
        .filter(|part| !part.is_empty() && *part != b".")
}

/// Why an entry cannot be applied.
enum Fault {
    NotADirectory,
    Loop,
    TooLong,
    Refused(String),
    Other(Error),
}

impl From<Error> for Fault {
    fn from(error: Error) -> Self {
        Self::Other(error)
    }
}

impl From<&'static str> for Fault {
    fn from(problem: &'static str) -> Self {
        Self::Refused(problem.to_owned())
    }
}

impl Fault {
    /// What is wrong with a hard link.
    fn of_target(target: &[u8], problem: &str) -> Self {
        Self::Refused(format!(
            "its hard link's target {} {problem}",
            printable(target)
        ))
    }

    fn at(self, path: &[&[u8]]) -> Error {
        let problem = match self {
            Self::Other(error) => return error,
            Self::NotADirectory => "a parent of it is not a directory".to_owned(),
            Self::Loop => "the symbolic links on its way are too many or go in a circle".to_owned(),
            Self::TooLong => "it is longer than 4095 bytes once its links are followed".to_owned(),
            Self::Refused(problem) => problem,
        };
        refused(&path.join(&b'/'), problem)
    }
}
