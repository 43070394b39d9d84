//! Listing directories.
//!
//! A listing is a snapshot of the merged names, taken when reading starts; an entry's offset is the place of its name
//! ([`super::places`]), so offsets mean the same in all listings of a directory. Names that change meanwhile are
//! noted, and looked up anew when their turn comes.

use std::collections::{HashMap, HashSet};
use std::ffi::{OsStr, OsString};
use std::os::fd::AsFd;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};

use nix::errno::Errno;
use parking_lot::Mutex;

use super::attr::{attr_of, kind_of_dirent};
use super::error::{Context, Error, Result};
use super::lend;
use super::lower::ListedKind;
use super::node::{DirState, Node};
use super::types::{DirEntry, Entry, FileKind, NodeId, Quiet};
use super::union::Union;
use super::whiteout::is_whiteout;
use crate::sys::dirents;
use crate::sys::fs::{self, Object};

/// A visible name.
pub(super) struct Item {
    pub(super) name: Box<OsStr>,
    pub(super) kind: FileKind,
    /// Its number, if no look at the object is needed to tell.
    pub(super) ino: Option<NodeId>,
    /// Where it stands among the names of all listings of the directory.
    place: u64,
}

struct Listing {
    /// In order of their places.
    items: Vec<Item>,
    version: u64,
}

/// A listing that is being read.
#[derive(Default)]
pub(super) struct Stream {
    listing: Mutex<Option<Arc<Listing>>>,
    changed: Mutex<HashSet<OsString>>,
    changes: AtomicUsize,
}

impl Stream {
    pub(super) fn name_changed(&self, name: &OsStr) {
        let mut changed = self.changed.lock();
        if !changed.contains(name) {
            changed.insert(name.to_owned());
        }
        self.changes.store(changed.len(), Ordering::Release);
    }

    fn has_changed(&self, name: &OsStr) -> bool {
        self.changes.load(Ordering::Acquire) > 0 && self.changed.lock().contains(name)
    }
}

/// An open directory: a stable listing.
pub struct DirHandle {
    stream: Arc<Stream>,
}

impl Listing {
    /// What comes after an entry of that offset.
    fn after(&self, offset: u64) -> &[Item] {
        let start = self.items.partition_point(|item| item.offset() <= offset);
        &self.items[start..]
    }
}

impl Item {
    fn offset(&self) -> u64 {
        FIRST + self.place
    }
}

/// Offsets of `.` and `..`; a name has `FIRST` and its place.
const DOT: u64 = 1;
const DOT_DOT: u64 = 2;
const FIRST: u64 = 3;
/// Not a place.
const UNPLACED: u64 = u64::MAX;

impl Union {
    /// Takes the merged listing of the directory when it is first read.
    pub fn open_dir(&self, node: NodeId) -> Result<Arc<DirHandle>> {
        let node = self.node(node)?;
        let directory = Self::directory(&node)?;
        let stream = Arc::new(Stream::default());
        let mut state = directory.state.write();
        state.streams.retain(|stream| stream.strong_count() > 0);
        state.streams.push(Arc::downgrade(&stream));
        drop(state);
        Ok(Arc::new(DirHandle { stream }))
    }

    /// Whether a directory has come to another parent since this was last asked: what somebody keeps of a listing has
    /// another `..`.
    pub fn has_moved(&self, node: NodeId) -> bool {
        let node = self.table.get(node);
        let directory = node.as_ref().and_then(|node| node.directory.as_ref());
        directory.is_some_and(|directory| directory.moved.swap(false, Ordering::AcqRel))
    }

    fn listing(&self, node: &Arc<Node>, stream: &Stream, rewind: bool) -> Result<Arc<Listing>> {
        let known = stream.listing.lock().clone();
        let state = Self::directory(node)?.state.read();
        if let Some(known) = known
            && (!rewind || known.version == state.version)
        {
            return Ok(known);
        }
        let items = if state.removed {
            Vec::new()
        } else {
            self.merge(node, &state)?
        };
        let listing = Arc::new(Listing {
            items,
            version: state.version,
        });
        {
            let mut changed = stream.changed.lock();
            changed.clear();
            stream.changes.store(0, Ordering::Release);
        }
        *stream.listing.lock() = Some(Arc::clone(&listing));
        Ok(listing)
    }

    /// Hands entries after `offset` (0: from the start, `.` and `..` included) to `sink` until it answers false.
    pub fn read_dir(
        &self,
        node: NodeId,
        handle: &DirHandle,
        offset: u64,
        sink: &mut dyn FnMut(DirEntry) -> bool,
    ) -> Result<()> {
        let node = self.node(node)?;
        let listing = self.listing(&node, &handle.stream, offset == 0)?;
        if !self.dots(&node, offset, sink) {
            return Ok(());
        }
        let directory = Self::directory(&node)?;
        for item in listing.after(offset) {
            let (kind, ino) = {
                let state = directory.state.read();
                let known = state.children.get(&*item.name).copied();
                match (handle.stream.has_changed(&item.name), known, item.ino) {
                    (false, Some(id), _) | (false, None, Some(id)) => (item.kind, id),
                    _ if state.removed => continue,
                    _ => match self.resolve(&node, &state, &item.name) {
                        Ok(Some(found)) => (found.kind, known.unwrap_or(found.id)),
                        Ok(None) => continue,
                        // Whoever asks for it is told, and whoever lists goes on.
                        Err(_) => (item.kind, known.unwrap_or_else(|| self.numbers.fresh())),
                    },
                }
            };
            let entry = DirEntry {
                ino: ino.0,
                next_offset: item.offset(),
                kind,
                name: item.name.clone().into(),
            };
            if !sink(entry) {
                break;
            }
        }
        Ok(())
    }

    /// As `read_dir` with the entry looked up as well (one lookup is counted for each that `sink`
    /// accepts; `None` for `.` and `..`, and for one of which that fails).
    pub fn read_dir_plus(
        &self,
        node: NodeId,
        handle: &DirHandle,
        offset: u64,
        sink: &mut dyn FnMut(DirEntry, Option<Entry>) -> bool,
    ) -> Result<()> {
        let node = self.node(node)?;
        let listing = self.listing(&node, &handle.stream, offset == 0)?;
        if !self.dots(&node, offset, &mut |entry| sink(entry, None)) {
            return Ok(());
        }
        for item in listing.after(offset) {
            let looked_up = self
                .child(&node, &item.name, true)
                .and_then(|(child, attr)| self.entry_of(child, attr));
            let entry = match looked_up {
                Ok(entry) => Some(entry),
                Err(error) if error.is(Errno::ENOENT) => continue,
                // Whoever asks for it is told, and whoever lists goes on.
                Err(_) => None,
            };
            let (id, kind) = match &entry {
                Some(entry) => (entry.node, entry.attr.kind),
                None => (item.ino.unwrap_or_else(|| self.numbers.fresh()), item.kind),
            };
            let listed = DirEntry {
                ino: id.0,
                next_offset: item.offset(),
                kind,
                name: item.name.clone().into(),
            };
            if !sink(listed, entry) {
                if entry.is_some() {
                    self.forget(id, 1);
                }
                break;
            }
        }
        Ok(())
    }

    fn dots(&self, node: &Arc<Node>, offset: u64, sink: &mut dyn FnMut(DirEntry) -> bool) -> bool {
        let parent = node.name().map_or(node.id, |name| name.parent.id);
        for (n, name, id) in [(DOT, ".", node.id), (DOT_DOT, "..", parent)] {
            let entry = DirEntry {
                ino: id.0,
                next_offset: n,
                kind: FileKind::Directory,
                name: name.into(),
            };
            if offset < n && !sink(entry) {
                return false;
            }
        }
        true
    }

    /// All visible names of a directory that the caller has locked.
    pub(super) fn merge(&self, node: &Arc<Node>, state: &DirState) -> Result<Vec<Item>> {
        let (in_upper, lowers) = {
            let place = node.place.read();
            (place.upper.is_some(), place.lowers.clone())
        };
        let mut items = Vec::new();
        // Names that a layer above has decided: the item that is shown, or hidden.
        let mut decided: HashMap<Box<OsStr>, Option<usize>> = HashMap::new();
        if in_upper {
            self.list_upper(node, state, lowers.is_empty(), &mut |name, kind, ino| {
                if !lowers.is_empty() {
                    let shown = matches!(kind, ListedKind::Object(_)).then_some(items.len());
                    decided.insert(name.into(), shown);
                }
                if let ListedKind::Object(kind) = kind {
                    items.push(Item {
                        name: name.into(),
                        kind,
                        ino,
                        place: UNPLACED,
                    });
                }
            })?;
        }
        let of_upper = items.len();
        // Every entry of every lower has a place, so that no change of the upper moves another.
        let mut places = 0;
        for (depth, lower) in lowers.iter().enumerate() {
            let bottom = depth + 1 == lowers.len();
            let space = lower.object.number_space();
            lower.object.list(&mut |name, kind, ino| {
                let place = places;
                places += 1;
                if let Some(shown) = decided.get(name) {
                    // The first lower that has a name places it.
                    if let Some(item) = shown.and_then(|item| items.get_mut(item))
                        && item.place == UNPLACED
                    {
                        item.place = place;
                    }
                    return;
                }
                let shown = matches!(kind, ListedKind::Object(_)).then_some(items.len());
                if !bottom {
                    decided.insert(name.into(), shown);
                }
                if let ListedKind::Object(kind) = kind {
                    items.push(Item {
                        name: name.into(),
                        kind,
                        ino: Some(self.numbers.of(space, ino)),
                        place,
                    });
                }
            })?;
        }
        if of_upper > 0 {
            let (upper, _) = items.split_at_mut(of_upper);
            let mut alone: Vec<_> = upper
                .iter_mut()
                .filter(|item| item.place == UNPLACED)
                .collect();
            let found = state.places.lock().of(alone.iter().map(|item| &*item.name));
            for (item, place) in alone.iter_mut().zip(found) {
                item.place = places + place;
            }
            items.sort_unstable_by_key(|item| item.place);
        }
        Ok(items)
    }

    pub(super) fn list_upper(
        &self,
        node: &Arc<Node>,
        state: &DirState,
        alone: bool,
        sink: &mut dyn FnMut(&OsStr, ListedKind, Option<NodeId>),
    ) -> Result<()> {
        let dir = self.dir_fd(node)?;
        let impure = !self.lowers.is_empty() && self.is_impure(node, state)?;
        let xattr_whiteouts = self.has_xattr_whiteouts(node, dir.as_fd())?;
        let flags = libc::O_RDONLY | libc::O_DIRECTORY;
        let top = Object::Entry(dir.as_fd(), OsStr::new("."));
        let bits = lend::READ | lend::SEARCH;
        let stream = self
            .upper()?
            .permitted(Object::Open(dir.as_fd()), bits, || match self.quiet {
                Quiet::Nothing => top.open(flags),
                Quiet::Directories | Quiet::All => top.open_quietly(flags),
            })?;
        let mut failed: Option<Error> = None;
        dirents::read_all(stream.as_fd(), &mut |entry| {
            let kind = kind_of_dirent(entry.kind);
            let needs_look = match kind {
                None | Some(FileKind::CharDevice) => true,
                Some(FileKind::Regular) => xattr_whiteouts,
                Some(_) => false,
            };
            let listed = match kind {
                Some(kind) if !needs_look => ListedKind::Object(kind),
                _ => match self.look(dir.as_fd(), entry.name, xattr_whiteouts) {
                    Ok(Some(listed)) => listed,
                    Ok(None) => return,
                    Err(error) => {
                        failed.get_or_insert(error);
                        return;
                    }
                },
            };
            let own = match listed {
                ListedKind::Object(FileKind::Directory) => !impure && alone,
                _ => !impure,
            };
            sink(entry.name, listed, own.then(|| self.own_number(entry.ino)));
        })
        .context("listing a directory of the upper layer")?;
        failed.map_or(Ok(()), Err)
    }

    fn look(
        &self,
        dir: std::os::fd::BorrowedFd<'_>,
        name: &OsStr,
        xattr_whiteouts: bool,
    ) -> Result<Option<ListedKind>> {
        let attr = match fs::fstatat(dir, name) {
            Ok(stat) => attr_of(&stat),
            Err(Errno::ENOENT) => return Ok(None),
            Err(errno) => return Err(errno.into()),
        };
        let whiteout = is_whiteout(&attr)
            || (xattr_whiteouts
                && attr.kind == FileKind::Regular
                && attr.size == 0
                && self
                    .mark(Object::Entry(dir, name), self.family.whiteout())?
                    .is_some());
        Ok(Some(if whiteout {
            ListedKind::Whiteout
        } else {
            ListedKind::Object(attr.kind)
        }))
    }

    /// Makes a directory's entries durable, unless the union is volatile.
    pub fn fsync_dir(&self, node: NodeId, datasync: bool) -> Result<()> {
        let node = self.node(node)?;
        if self.volatile || !node.in_upper() {
            return Ok(());
        }
        self.with_upper(&node, |object| match object {
            Object::Open(fd) => fs::fsync(fd, datasync),
            // A removed directory has nothing to keep.
            _ => Ok(()),
        })
        .context("making a directory durable")
    }
}
