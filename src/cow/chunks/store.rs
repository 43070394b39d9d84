//! The directory of the maps, `work/incompat/plywood.chunks` below the work directory. It is there as long as any
//! file is incomplete.

use std::collections::HashMap;
use std::ffi::{OsStr, OsString};
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::path::Path;
use std::sync::atomic::Ordering;
use std::sync::{Arc, Weak};

use nix::errno::Errno;
use parking_lot::Mutex;

use super::super::error::{Context, Error, Result};
use super::super::types::NodeId;
use super::map::{Map, Run};
use super::{DIRECTORY, INCOMPAT, os};
use crate::sys::dirents;
use crate::sys::fs;

/// The maps of an upper.
pub(in super::super) struct Maps {
    /// `work/` of the work directory.
    work: Arc<OwnedFd>,
    run: Run,
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

impl Open {
    /// A map's file; none if there is no such map.
    fn file(&self, name: &OsStr) -> Result<Option<OwnedFd>> {
        let Some(dir) = &self.dir else {
            return Ok(None);
        };
        match fs::openat(dir.as_fd(), name, libc::O_RDWR, 0) {
            Ok(fd) => Ok(Some(fd)),
            Err(Errno::ENOENT) => Ok(None),
            Err(errno) => Err(errno).context("opening a chunk map"),
        }
    }

    /// The map in a file, read if it is not in use; none if nothing of it had reached the disk when the host went
    /// down.
    fn map(&mut self, name: &OsStr, fd: BorrowedFd<'_>, run: Run) -> Result<Option<Arc<Map>>> {
        if let Some(map) = self.maps.get(name).and_then(Weak::upgrade) {
            return Ok(Some(map));
        }
        Ok(Map::load(fd, run)?.map(|map| self.keep(name, map)))
    }

    /// Shares a map with whoever asks for it next.
    fn keep(&mut self, name: &OsStr, map: Map) -> Arc<Map> {
        let map = Arc::new(map);
        self.maps.insert(name.to_owned(), Arc::downgrade(&map));
        map
    }

    /// Whether the file of this name is still this map's.
    fn has(&self, name: &OsStr, map: &Arc<Map>) -> bool {
        let known = self.maps.get(name);
        known.is_some_and(|known| std::ptr::eq(known.as_ptr(), Arc::as_ptr(map)))
    }
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

/// The map of a file of an upper that somebody else may be writing to, opened for reading; none if there is no such map.
pub(super) fn foreign_map(work: &Path, name: &OsStr) -> Result<Option<OwnedFd>> {
    let path = work.join("work").join(INCOMPAT).join(DIRECTORY).join(name);
    match fs::open_path(&path, libc::O_RDONLY) {
        Ok(fd) => Ok(Some(fd)),
        Err(Errno::ENOENT) => Ok(None),
        Err(errno) => Err(errno).context("opening a chunk map"),
    }
}

/// Of a file with a mark.
pub(super) fn missing_map() -> Error {
    Error {
        errno: libc::EIO,
        context: "the chunk map of an incompletely copied file is missing; use the work directory that belongs to the upper directory".into(),
    }
}

/// What others have put into `work/incompat`: names of features without which the upper is not to be used
/// (`ovl_workdir_cleanup_recurse` in fs/overlayfs/readdir.c).
pub(in super::super) fn features_of_others(work: BorrowedFd<'_>) -> Result<Vec<OsString>, Errno> {
    let incompat = match fs::openat(work, os(INCOMPAT), DIR_FLAGS, 0) {
        Ok(incompat) => incompat,
        Err(Errno::ENOENT) => return Ok(Vec::new()),
        Err(errno) => return Err(errno),
    };
    let mut features = names(incompat.as_fd())?;
    features.retain(|name| name != DIRECTORY);
    features.sort_unstable();
    Ok(features)
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
            run: Run::current(),
            open: Mutex::new(Open {
                dir,
                ..Open::default()
            }),
        })
    }

    /// As of a process that cannot tell whether the host has restarted.
    #[cfg(test)]
    pub(in super::super) fn forget_run(&mut self) {
        self.run = Run::UNKNOWN;
    }

    /// The map of a file of which nothing is in the upper yet.
    pub(super) fn begin(&self, shift: u32, covers: u64) -> Map {
        Map::new(self.run, shift, covers)
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
        Ok((fd, open.keep(name, map)))
    }

    /// Opens a map. `fresh` is used where nothing of it had reached the disk when the host went down.
    pub(super) fn find(
        &self,
        name: &OsStr,
        fresh: impl FnOnce() -> Result<Map>,
    ) -> Result<(OwnedFd, Arc<Map>)> {
        let mut open = self.open.lock();
        let Some(fd) = open.file(name)? else {
            return Err(missing_map());
        };
        if let Some(map) = open.map(name, fd.as_fd(), self.run)? {
            return Ok((fd, map));
        }
        let map = fresh()?;
        map.store(fd.as_fd())?;
        Ok((fd, open.keep(name, map)))
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

    /// Makes all that is in the upper durable, by `sync`, and then what the maps say of it. One map that cannot be
    /// used keeps no other from it; the first error is answered when all the rest is done.
    pub(in super::super) fn sync(&self, sync: impl FnOnce() -> Result<()>) -> Result<()> {
        let mut failed = Ok(());
        let mut fails = |name: &OsStr, error: Error| {
            tracing::error!(%error, ?name, "a chunk map could not be made durable");
            if failed.is_ok() {
                failed = Err(error);
            }
        };
        let mut in_use = Vec::new();
        // There may be many: their files are not held open over the sync.
        let mut behind = Vec::new();
        for name in self.names()? {
            match self.existing(&name) {
                Ok(Some(map)) => {
                    let taken = map.take();
                    if map.is_scrubbed.load(Ordering::Acquire) {
                        in_use.push(Arc::downgrade(&map));
                    }
                    if map.has_news(&taken) {
                        behind.push((name, map, taken));
                    }
                }
                // Completed meanwhile; or nobody has used it since the host went down, so there is nothing to note.
                Ok(None) => {}
                Err(error) => fails(&name, error),
            }
        }
        sync()?;
        for (name, map, taken) in behind {
            let noted = self.file_of(&name, &map).and_then(|fd| match fd {
                // Its name is durable by now.
                Some(fd) => map.make_durable(fd.as_fd(), &taken, Some(&|| Ok(()))),
                None => Ok(()),
            });
            if let Err(error) = noted {
                fails(&name, error);
            }
        }
        let in_use = in_use.iter().filter_map(Weak::upgrade);
        in_use.for_each(|map| map.is_durable());
        failed
    }

    /// A map, if there is one of this name and it knows anything.
    fn existing(&self, name: &OsStr) -> Result<Option<Arc<Map>>> {
        let mut open = self.open.lock();
        match open.file(name)? {
            Some(fd) => open.map(name, fd.as_fd(), self.run),
            None => Ok(None),
        }
    }

    /// The file of a map, unless that was removed meanwhile.
    fn file_of(&self, name: &OsStr, map: &Arc<Map>) -> Result<Option<OwnedFd>> {
        let open = self.open.lock();
        match open.has(name, map) {
            true => open.file(name),
            false => Ok(None),
        }
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
