//! From a name to a node.

use std::ffi::OsStr;
use std::os::fd::AsFd;
use std::os::unix::ffi::{OsStrExt, OsStringExt};
use std::path::PathBuf;
use std::sync::Arc;

use nix::errno::Errno;

use super::attr::attr_of;
use super::chunks::{Chunks, Marked};
use super::error::{Context, Result};
use super::node::{DirState, LowerAt, Lowers, Name, Node, Place};
use super::origin::Origin;
use super::redirect::Wanted;
use super::types::{Attr, Entry, FileKind, NodeId};
use super::union::Union;
use super::upper::Upper;
use super::whiteout::is_whiteout;
use crate::sys::fs::Object;
use crate::sys::handle;

/// What the layers have under a name.
pub(super) struct Found {
    pub(super) id: NodeId,
    pub(super) kind: FileKind,
    /// Attributes in the upper, if it is there.
    pub(super) upper: Option<Attr>,
    pub(super) lowers: Lowers,
    pub(super) index: Option<Arc<OsStr>>,
    pub(super) link_offset: i64,
    pub(super) metacopy: bool,
    pub(super) chunks: Option<Arc<Chunks>>,
}

impl Found {
    /// Something that is in the upper alone.
    pub(super) fn new_upper(id: NodeId, attr: Attr) -> Self {
        Self {
            id,
            kind: attr.kind,
            upper: Some(attr),
            lowers: Lowers::default(),
            index: None,
            link_offset: 0,
            metacopy: false,
            chunks: None,
        }
    }

    /// What the host has counted of a directory that lies in one lower layer alone.
    fn counted_subdirectories(&self) -> Option<u32> {
        match (self.kind, self.upper, &*self.lowers) {
            (FileKind::Directory, None, [only]) => only.object.attr().ok()?.nlink.checked_sub(2),
            _ => None,
        }
    }

    fn place(self, name: Option<Name>) -> Place {
        let mut place = Place {
            names: name.into_iter().collect(),
            upper: self.upper.map(|attr| attr.ino),
            lowers: self.lowers,
            metacopy: self.metacopy,
            ..Place::default()
        };
        if self.index.is_some() || self.link_offset != 0 || self.chunks.is_some() {
            place.rare.index = self.index;
            place.rare.link_offset = self.link_offset;
            place.rare.chunks = self.chunks;
        }
        place
    }
}

/// What the upper has under a name.
pub(super) enum InUpper {
    Nothing,
    Whiteout,
    Object(Attr),
}

/// Refuses what no entry can be called.
pub(super) fn check_name(name: &OsStr) -> Result<()> {
    let bytes = name.as_bytes();
    if bytes.len() > 255 {
        Err(Errno::ENAMETOOLONG.into())
    } else if bytes.is_empty()
        || bytes == b"."
        || bytes == b".."
        || bytes.contains(&b'/')
        || bytes.contains(&0)
    {
        Err(Errno::EINVAL.into())
    } else {
        Ok(())
    }
}

impl Union {
    /// Looks up a name; the answer counts as one lookup of the node. `.` and `..` are asked for by
    /// whoever has nothing but a number, as the opening of file handles.
    pub fn lookup(&self, parent: NodeId, name: &OsStr) -> Result<Entry> {
        match name.as_bytes() {
            b"." => return self.lookup_number(parent),
            b".." => {
                let node = self.node(parent)?;
                let above = node.name().map_or(NodeId::ROOT, |name| name.parent.id);
                return self.lookup_number(above);
            }
            name if name.len() > 255 => return Err(Errno::ENAMETOOLONG.into()),
            _ => {}
        }
        let parent = self.node(parent)?;
        let (node, attr) = self.child(&parent, name, true)?;
        self.entry_of(node, attr)
    }

    /// The answer for a node of which a lookup has just been counted.
    pub(super) fn entry_of(&self, node: Arc<Node>, attr: Option<Attr>) -> Result<Entry> {
        let attr = match attr {
            // With owners in attributes, what the host's stat said is not all of it.
            Some(attr) if self.stat_override.is_none() => Ok(self.shown(&node, attr)),
            _ => self.attr_of_node(&node),
        };
        match attr {
            Ok(attr) => Ok(Entry {
                node: node.id,
                generation: node.generation,
                attr,
            }),
            Err(error) => {
                let id = node.id;
                drop(node);
                self.forget(id, 1);
                Err(error)
            }
        }
    }

    /// The node with this id.
    pub(super) fn node(&self, id: NodeId) -> Result<Arc<Node>> {
        self.table.get(id).ok_or(Errno::ESTALE.into())
    }

    /// The directory part of a node.
    pub(super) fn directory(node: &Node) -> Result<&super::node::Directory> {
        node.directory.as_deref().ok_or(Errno::ENOTDIR.into())
    }

    /// The node of a name, looked up in the layers if it is not known; with its attributes in the
    /// upper if they were seen on the way. `count` counts a lookup.
    pub(super) fn child(
        &self,
        parent: &Arc<Node>,
        name: &OsStr,
        count: bool,
    ) -> Result<(Arc<Node>, Option<Attr>)> {
        let directory = Self::directory(parent)?;
        loop {
            let (version, found) = {
                let state = directory.state.read();
                if let Some(node) = self.known_child(&state, name, count) {
                    return Ok((node, None));
                }
                if state.removed {
                    return Err(Errno::ENOENT.into());
                }
                (state.version, self.resolve(parent, &state, name)?)
            };
            let Some(found) = found else {
                return Err(Errno::ENOENT.into());
            };
            let mut state = directory.state.write();
            if state.version != version {
                continue;
            }
            if let Some(node) = self.known_child(&state, name, count) {
                return Ok((node, None));
            }
            let attr = found.upper;
            let node = self.adopt(parent, &mut state, name, found, count);
            return Ok((node, attr));
        }
    }

    /// As `child` without counting, in a directory that the caller has locked for writing.
    pub(super) fn child_locked(
        &self,
        parent: &Arc<Node>,
        state: &mut DirState,
        name: &OsStr,
    ) -> Result<Option<Arc<Node>>> {
        if let Some(node) = self.known_child(state, name, false) {
            return Ok(Some(node));
        }
        if state.removed {
            return Err(Errno::ENOENT.into());
        }
        let found = self.resolve(parent, state, name)?;
        Ok(found.map(|found| self.adopt(parent, state, name, found, false)))
    }

    fn known_child(&self, state: &DirState, name: &OsStr, count: bool) -> Option<Arc<Node>> {
        let id = *state.children.get(name)?;
        if count {
            self.table.count_lookup(id)
        } else {
            self.table.get(id)
        }
    }

    /// Makes the node for what was found, or finds that there is one already (another link).
    pub(super) fn adopt(
        &self,
        parent: &Arc<Node>,
        state: &mut DirState,
        name: &OsStr,
        found: Found,
        count: bool,
    ) -> Arc<Node> {
        let name: Arc<OsStr> = name.into();
        let at = Name {
            parent: Arc::clone(parent),
            name: Arc::clone(&name),
        };
        let own = found.upper.map(|attr| self.own_number(attr.ino));
        let generation = self.generation_of(parent, &name, &found);
        let counted = found.counted_subdirectories();
        let mut new = Node::new(
            found.id,
            generation,
            found.kind,
            found.place(Some(at.clone())),
        );
        if let (Some(directory), Some(count)) = (&mut new.directory, counted) {
            directory.state.get_mut().subdirectories.set(count);
        }
        let node = loop {
            match self.table.insert(new) {
                Ok(node) => break node,
                Err((known, again)) if Self::is_same_object(&known, &again) => {
                    // A name that the directory does not know is none of the node's: with many links the
                    // others need not be looked through.
                    let listed = state.children.get(&name) == Some(&known.id);
                    let mut place = known.place.write();
                    if !listed || place.position_of(parent, &name).is_none() {
                        place.names.push(at);
                    }
                    drop(place);
                    break known;
                }
                // Two objects that claim one number: layers that were copied, or links that an upper has
                // broken. The later one gets a number of its own.
                Err((_, mut other)) => {
                    other.id = match own {
                        Some(own) if own != other.id => own,
                        _ => self.numbers.fresh(),
                    };
                    new = *other;
                }
            }
        };
        if count {
            // The node cannot have left the table: its name is not in the directory yet, but we hold it.
            self.table.count_lookup(node.id);
        }
        state.children.insert(name, node.id);
        node
    }

    /// Tells an object from an earlier one that had its number; the same whenever the object is looked
    /// up, because file handles carry it. What comes from a lower layer keeps a number that nothing else
    /// gets; a number of the upper comes back with another generation of the host.
    fn generation_of(&self, parent: &Arc<Node>, name: &OsStr, found: &Found) -> u64 {
        const OF_LOWERS: u64 = 1;
        match found.upper {
            Some(attr) if found.id == self.own_number(attr.ino) => {
                let handle = self
                    .dir_fd(parent)
                    .and_then(|dir| Ok(handle::of(Object::Entry(dir.as_fd(), name))?));
                match handle {
                    Ok(handle) => u64::from(handle.fold()),
                    // Where the host has no handles: never the same, so none of ours outlives a lookup.
                    Err(_) => self.table.next_generation(),
                }
            }
            _ => OF_LOWERS,
        }
    }

    fn is_same_object(known: &Node, found: &Node) -> bool {
        if known.kind != found.kind || known.kind == FileKind::Directory {
            return false;
        }
        let found = found.place.read().upper;
        match (known.place.read().upper, found) {
            (Some(one), Some(other)) => one == other,
            (None, Some(_)) => false,
            // Another name of a lower file, which was copied up by its first name or not at all.
            (_, None) => true,
        }
    }

    /// The number of an object of the upper that was copied from nowhere.
    pub(super) fn own_number(&self, ino: u64) -> NodeId {
        match &self.upper {
            Some(upper) => self.numbers.of(upper.dev, ino),
            None => self.numbers.fresh(),
        }
    }

    /// What the upper has under a name of a directory that is in the upper, and whose state the caller has locked.
    pub(super) fn in_upper(&self, parent: &Arc<Node>, name: &OsStr) -> Result<InUpper> {
        let upper = self.upper()?;
        let dir = self.dir_fd(parent)?;
        let stat = match upper.stat_settled(Object::Entry(dir.as_fd(), name)) {
            Ok(stat) => stat,
            Err(Errno::ENOENT) => return Ok(InUpper::Nothing),
            Err(errno) => return Err(errno).context("looking up a name in the upper layer"),
        };
        let attr = attr_of(&stat);
        if is_whiteout(&attr) {
            return Ok(InUpper::Whiteout);
        }
        if stat.st_dev != upper.dev {
            return Err(Errno::EIO).context("something is mounted inside of the upper layer");
        }
        if attr.kind == FileKind::Regular
            && attr.size == 0
            && self.has_xattr_whiteouts(parent, dir.as_fd())?
            && self
                .mark(Object::Entry(dir.as_fd(), name), self.family.whiteout())?
                .is_some()
        {
            return Ok(InUpper::Whiteout);
        }
        Ok(InUpper::Object(attr))
    }

    /// Whether entries of an upper directory may carry an origin.
    pub(super) fn is_impure(&self, node: &Arc<Node>, state: &DirState) -> Result<bool> {
        state.impure.get_or(|| {
            let dir = self.dir_fd(node)?;
            Ok(self
                .mark(Object::Open(dir.as_fd()), self.family.impure())?
                .is_some())
        })
    }

    /// What the layers have under a name of `parent`, whose state the caller has locked.
    pub(super) fn resolve(
        &self,
        parent: &Arc<Node>,
        state: &DirState,
        name: &OsStr,
    ) -> Result<Option<Found>> {
        let (parent_upper, parent_lowers) = {
            let place = parent.place.read();
            (place.upper.is_some(), place.lowers.clone())
        };
        if parent_upper {
            match self.in_upper(parent, name)? {
                InUpper::Nothing => {}
                InUpper::Whiteout => return Ok(None),
                InUpper::Object(attr) => {
                    return self
                        .resolve_upper(parent, state, &parent_lowers, name, attr)
                        .map(Some);
                }
            }
        }
        let lowers = self.find_lowers(&parent_lowers, name, None, Wanted::Anything)?;
        let lowers = self.before_later_copies(&parent_lowers, name, lowers)?;
        let Some(top) = lowers.first() else {
            return Ok(None);
        };
        let attr = top.object.attr()?;
        let mut found = Found {
            id: self.numbers.of(top.object.number_space(), attr.ino),
            kind: attr.kind,
            upper: None,
            index: None,
            link_offset: 0,
            metacopy: false,
            chunks: None,
            lowers: lowers.into(),
        };
        if attr.nlink > 1 && attr.kind != FileKind::Directory {
            self.find_index(&mut found)?;
            if !self.find_copy_of_others(&mut found)? {
                return Ok(None);
            }
        }
        Ok(Some(found))
    }

    fn resolve_upper(
        &self,
        parent: &Arc<Node>,
        state: &DirState,
        parent_lowers: &[LowerAt],
        name: &OsStr,
        attr: Attr,
    ) -> Result<Found> {
        let mut found = Found::new_upper(self.own_number(attr.ino), attr);
        let impure = !self.lowers.is_empty() && self.is_impure(parent, state)?;
        if attr.kind == FileKind::Directory {
            if !impure && parent_lowers.is_empty() {
                return Ok(found);
            }
            let dir = self.dir_fd(parent)?;
            let object = Object::Entry(dir.as_fd(), name);
            let marks = Self::marks(object)?;
            let marked = |name: &OsStr| marks.iter().any(|mark| mark == name);
            if marked(self.family.opaque())
                && self.mark(object, self.family.opaque())?.as_deref() == Some(b"y")
            {
                return Ok(found);
            }
            let redirect = if marked(self.family.redirect()) {
                self.redirect_mark(object)?
            } else {
                None
            };
            let lowers = self.find_lowers(
                parent_lowers,
                name,
                redirect.as_deref(),
                Wanted::Directories,
            )?;
            if let Some(top) = lowers.first() {
                found.id = self
                    .numbers
                    .of(top.object.number_space(), top.object.attr()?.ino);
            }
            found.lowers = lowers.into();
            return Ok(found);
        }
        if impure {
            let dir = self.dir_fd(parent)?;
            let object = Object::Entry(dir.as_fd(), name);
            let marks = self.resolve_origin(&mut found, object, attr)?;
            let metacopy = marks.iter().any(|mark| mark == self.family.metacopy());
            if attr.kind == FileKind::Regular && metacopy {
                let redirect = self.redirect_mark(object)?;
                let lowers =
                    self.find_lowers(parent_lowers, name, redirect.as_deref(), Wanted::Data)?;
                if lowers.is_empty() {
                    return Err(Errno::EIO).context(
                        "the data of a file in the upper layer is missing from the lower layers",
                    );
                }
                self.resolve_metacopy(&mut found, object, attr)?;
                found.lowers = lowers.into();
            }
        }
        Ok(found)
    }

    /// Notes that not all of the data is in the upper.
    pub(super) fn resolve_metacopy(
        &self,
        found: &mut Found,
        object: Object<'_>,
        attr: Attr,
    ) -> Result<()> {
        if let Some(value) = self.mark(object, self.family.metacopy())? {
            found.metacopy = true;
            if let Marked::Partial { .. } = Marked::of(&value)? {
                found.chunks = Some(self.chunks_of(object, attr.ino));
            }
        }
        Ok(())
    }

    pub(super) fn redirect_mark(&self, object: Object<'_>) -> Result<Option<PathBuf>> {
        let value = self.mark(object, self.family.redirect())?;
        Ok(value.map(|path| std::ffi::OsString::from_vec(path).into()))
    }

    /// The identity of an upper object that may have been copied up. Answers the names of its attributes.
    pub(super) fn resolve_origin(
        &self,
        found: &mut Found,
        object: Object<'_>,
        attr: Attr,
    ) -> Result<Vec<std::ffi::OsString>> {
        let marks = Self::marks(object)?;
        let marked = |name: &OsStr| marks.iter().any(|mark| mark == name);
        if marked(self.family.origin()) {
            self.resolve_copied(found, object, attr)?;
        } else if marked(self.family.origin_number()) {
            self.resolve_by_number(found, object)?;
        }
        Ok(marks)
    }

    /// As above for one that carries a file handle.
    fn resolve_copied(&self, found: &mut Found, object: Object<'_>, attr: Attr) -> Result<()> {
        let stored = self.mark(object, self.family.origin())?;
        let Some(origin) = stored.as_deref().and_then(Origin::decode) else {
            return Ok(());
        };
        if attr.nlink > 1 {
            self.find_index_of(found, &origin, attr.ino)?;
        }
        match self.number_of_origin(&origin) {
            Some(id) => found.id = id,
            None => self.resolve_by_number(found, object)?,
        }
        Ok(())
    }

    /// The number of the lower object that a file handle names.
    pub(super) fn number_of_origin(&self, origin: &Origin) -> Option<NodeId> {
        self.lowers.iter().find_map(|lower| {
            let ino = lower.decode_origin(origin)?;
            Some(self.numbers.of(lower.number_space(), ino))
        })
    }

    /// As above where file handles cannot be opened.
    fn resolve_by_number(&self, found: &mut Found, object: Object<'_>) -> Result<()> {
        if !self.origin_numbers {
            return Ok(());
        }
        let Some(stored) = self.mark(object, self.family.origin_number())? else {
            return Ok(());
        };
        if let Some(id) = self.number_noted(&stored) {
            found.id = id;
        }
        Ok(())
    }

    /// The number of the lower object that our own form of an origin names.
    pub(super) fn number_noted(&self, stored: &[u8]) -> Option<NodeId> {
        let (index, ino) = super::copyup::decode_origin_number(stored)?;
        Some(self.numbers.of(self.numbers.space(index)?, ino))
    }

    /// The upper, for code that has found out that there is one.
    pub(super) fn upper_of(&self) -> Option<&Upper> {
        self.upper.as_ref()
    }
}
