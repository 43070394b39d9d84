//! The directory of the maps, `work/incompat/plywood.chunks` below the work directory. It is there as long as any
//! file is incomplete.

use std::collections::HashMap;
use std::ffi::{OsStr, OsString};
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::{Arc, Weak};

use nix::errno::Errno;
use parking_lot::Mutex;

use super::super::error::{Context, Error, Result};
use super::super::types::NodeId;
use super::super::upper::remove_tree;
use super::map::Map;
use super::{DIRECTORY, INCOMPAT, os};
use crate::sys::dirents;
use crate::sys::fs;

/// The maps of an upper.
pub(in super::super) struct Maps {
    /// `work/` of the work directory.
    work: Arc<OwnedFd>,
    open: Mutex<Open>,
}

#[derive(Default)]
struct Open {
    /// The directory, if there is one.
    dir: Option<Arc<OwnedFd>>,
    /// The maps in use: there is one of each.
    maps: HashMap<OsString, Weak<Map>>,
    /// Nodes that were found to be incomplete.
    nodes: Vec<NodeId>,
}

const DIR_FLAGS: i32 = libc::O_RDONLY | libc::O_DIRECTORY;

fn made(dir: BorrowedFd<'_>, name: &str) -> Result<OwnedFd, Errno> {
    match fs::mkdirat(dir, os(name), 0o700) {
        Ok(()) | Err(Errno::EEXIST) => {}
        Err(errno) => return Err(errno),
    }
    fs::openat(dir, os(name), DIR_FLAGS, 0)
}

fn names(dir: BorrowedFd<'_>) -> Result<Vec<OsString>, Errno> {
    let listing = fs::openat(dir, os("."), DIR_FLAGS, 0)?;
    let mut names = Vec::new();
    dirents::read_all(listing.as_fd(), &mut |entry| {
        names.push(entry.name.to_owned());
    })?;
    Ok(names)
}

/// Clears `work/incompat` of what is not ours.
pub(in super::super) fn tidy(work: BorrowedFd<'_>) -> Result<(), Errno> {
    let incompat = match fs::openat(work, os(INCOMPAT), DIR_FLAGS, 0) {
        Ok(incompat) => incompat,
        Err(Errno::ENOENT) => return Ok(()),
        Err(errno) => return Err(errno),
    };
    for name in names(incompat.as_fd())? {
        if name != DIRECTORY {
            remove_tree(incompat.as_fd(), &name);
        }
    }
    Ok(())
}

impl Maps {
    /// Whether a name in `work/` is where maps lie.
    pub(in super::super) fn is_place(name: &OsStr) -> bool {
        name == INCOMPAT
    }

    /// Those below `work`, which an earlier mount may have left.
    pub(in super::super) fn open(work: &Arc<OwnedFd>) -> Result<Self, Errno> {
        let find = || {
            let incompat = fs::openat(work.as_fd(), os(INCOMPAT), DIR_FLAGS, 0)?;
            fs::openat(incompat.as_fd(), os(DIRECTORY), DIR_FLAGS, 0)
        };
        let dir = match find() {
            Ok(dir) => Some(Arc::new(dir)),
            Err(Errno::ENOENT) => None,
            Err(errno) => return Err(errno),
        };
        Ok(Self {
            work: Arc::clone(work),
            open: Mutex::new(Open {
                dir,
                ..Open::default()
            }),
        })
    }

    /// Whether any file may be incomplete.
    pub(super) fn is_empty(&self) -> bool {
        self.open.lock().dir.is_none()
    }

    /// Makes the file of a new map; one that a crash has left there is overwritten.
    pub(super) fn create(&self, name: &OsStr, map: Map) -> Result<(OwnedFd, Arc<Map>)> {
        let mut open = self.open.lock();
        let dir = match &open.dir {
            Some(dir) => Arc::clone(dir),
            None => {
                let incompat = made(self.work.as_fd(), INCOMPAT)?;
                let dir = Arc::new(made(incompat.as_fd(), DIRECTORY)?);
                open.dir = Some(Arc::clone(&dir));
                dir
            }
        };
        let flags = libc::O_CREAT | libc::O_TRUNC | libc::O_RDWR;
        let fd = fs::openat(dir.as_fd(), name, flags, 0o600).context("making a chunk map")?;
        if let Err(error) = map.store(fd.as_fd()) {
            // Nothing refers to it yet.
            let _ = fs::unlinkat(dir.as_fd(), name);
            return Err(error);
        }
        let map = Arc::new(map);
        open.maps.insert(name.to_owned(), Arc::downgrade(&map));
        Ok((fd, map))
    }

    /// Opens a map. `fresh` is used where nothing of it had reached the disk when the host went down.
    pub(super) fn find(
        &self,
        name: &OsStr,
        fresh: impl FnOnce() -> Result<Map>,
    ) -> Result<(OwnedFd, Arc<Map>)> {
        let mut open = self.open.lock();
        let missing = || {
            Error {
            errno: libc::EIO,
            context: "the chunk map of an incompletely copied file is missing; use the work directory that belongs to the upper directory".into(),
        }
        };
        let dir = open.dir.as_ref().ok_or_else(missing)?;
        let fd = match fs::openat(dir.as_fd(), name, libc::O_RDWR, 0) {
            Err(Errno::ENOENT) => return Err(missing()),
            opened => opened.context("opening a chunk map")?,
        };
        if let Some(map) = open.maps.get(name).and_then(Weak::upgrade) {
            return Ok((fd, map));
        }
        let map = match Map::load(fd.as_fd())? {
            Some(map) => map,
            None => {
                let map = fresh()?;
                map.store(fd.as_fd())?;
                map
            }
        };
        let map = Arc::new(map);
        open.maps.insert(name.to_owned(), Arc::downgrade(&map));
        Ok((fd, map))
    }

    /// Removes a map, and the directory with the last one, so that kernel overlayfs mounts again.
    pub(in super::super) fn remove(&self, name: &OsStr) -> Result<()> {
        let mut open = self.open.lock();
        open.maps.remove(name);
        let Some(dir) = &open.dir else {
            return Ok(());
        };
        match fs::unlinkat(dir.as_fd(), name) {
            Ok(()) | Err(Errno::ENOENT) => {}
            Err(errno) => return Err(errno).context("removing a chunk map"),
        }
        let incompat = fs::openat(self.work.as_fd(), os(INCOMPAT), DIR_FLAGS, 0)?;
        match fs::rmdirat(incompat.as_fd(), os(DIRECTORY)) {
            Ok(()) => open.dir = None,
            Err(Errno::ENOTEMPTY | Errno::EEXIST) => return Ok(()),
            Err(errno) => return Err(errno).context("removing the directory of chunk maps"),
        }
        match fs::rmdirat(self.work.as_fd(), os(INCOMPAT)) {
            Ok(()) | Err(Errno::ENOTEMPTY | Errno::EEXIST) => Ok(()),
            Err(errno) => Err(errno).context("removing the directory of chunk maps"),
        }
    }

    /// Names of all maps.
    pub(super) fn names(&self) -> Result<Vec<OsString>> {
        let dir = self.open.lock().dir.clone();
        match dir {
            Some(dir) => names(dir.as_fd()).context("listing the chunk maps"),
            None => Ok(Vec::new()),
        }
    }

    /// Makes the names of the maps durable.
    pub(super) fn sync_names(&self) -> Result<()> {
        let dir = self.open.lock().dir.clone();
        let Some(dir) = dir else { return Ok(()) };
        fs::fsync(dir.as_fd(), false)?;
        let incompat = fs::openat(self.work.as_fd(), os(INCOMPAT), DIR_FLAGS, 0)?;
        fs::fsync(incompat.as_fd(), false)?;
        Ok(fs::fsync(self.work.as_fd(), false)?)
    }

    /// Makes all that is in the upper durable, by `sync`, and then what the maps say of it.
    pub(in super::super) fn sync(&self, sync: impl FnOnce() -> Result<()>) -> Result<()> {
        let mut taken = Vec::new();
        for name in self.names()? {
            let fresh = || Err(Errno::ENODATA.into());
            match self.find(&name, fresh) {
                Ok((fd, map)) => {
                    let part = map.take();
                    taken.push((fd, map, part));
                }
                // Nobody has used it since the host went down, so there is nothing to note.
                Err(error) if error.is(Errno::ENODATA) => {}
                // Completed meanwhile.
                Err(error) if error.is(Errno::EIO) => {
                    tracing::warn!(%error, ?name, "a chunk map was passed over");
                }
                Err(error) => return Err(error),
            }
        }
        sync()?;
        for (fd, map, part) in taken {
            map.make_durable(fd.as_fd(), &part, Some(&|| self.sync_names()))?;
        }
        Ok(())
    }

    /// Notes that a node is incomplete.
    pub(super) fn note(&self, node: NodeId) {
        let mut open = self.open.lock();
        if !open.nodes.contains(&node) {
            open.nodes.push(node);
        }
    }

    /// The nodes that were noted; each is to be noted again if it still is.
    pub(super) fn take_noted(&self) -> Vec<NodeId> {
        std::mem::take(&mut self.open.lock().nodes)
    }
}
