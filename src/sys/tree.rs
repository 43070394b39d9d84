//! Looking at a tree that somebody else may change meanwhile, such as the upper of a running
//! container: directories are reached from the root one name at a time, so that no link is followed
//! whatever takes a directory's place, and only directories are opened, so that nothing blocks.

use std::ffi::{OsStr, OsString};
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::path::Path;

use super::dirents;
use super::fs::{self, Errno};

/// A tree, held by its root.
#[derive(Debug)]
pub struct Tree {
    root: OwnedFd,
}

impl Tree {
    /// Holds the directory at `root`.
    pub fn open(root: &Path) -> Result<Self, Errno> {
        let flags = libc::O_PATH | libc::O_DIRECTORY | libc::O_NOFOLLOW;
        let root = fs::open_path(root, flags)?;
        Ok(Self { root })
    }

    /// Its root, as an `O_PATH` descriptor.
    pub fn root(&self) -> BorrowedFd<'_> {
        self.root.as_fd()
    }

    /// Opens the directory at `path`, which is relative and made of plain names, for reading; the
    /// root when it is empty. Nothing when no directory is there (any more). The descriptors in use do
    /// not grow with the depth.
    pub fn directory(&self, path: &Path) -> Result<Option<OwnedFd>, Errno> {
        self.descend(path).map(Some).or_else(|errno| match errno {
            Errno::ENOENT | Errno::ENOTDIR | Errno::ELOOP => Ok(None),
            errno => Err(errno),
        })
    }

    fn descend(&self, path: &Path) -> Result<OwnedFd, Errno> {
        let mut above: Option<OwnedFd> = None;
        for name in path {
            let dir = above.as_ref().unwrap_or(&self.root).as_fd();
            above = Some(fs::openat(dir, name, libc::O_PATH | libc::O_DIRECTORY, 0)?);
        }
        let dir = above.as_ref().unwrap_or(&self.root).as_fd();
        let flags = libc::O_RDONLY | libc::O_DIRECTORY | libc::O_NONBLOCK;
        match fs::openat(dir, ".".as_ref(), flags | libc::O_NOATIME, 0) {
            // Only the owner and root may ask that the access time stays.
            Err(Errno::EPERM) => fs::openat(dir, ".".as_ref(), flags, 0),
            result => result,
        }
    }
}

/// All names in a directory that was opened for reading; none when it has been removed.
pub fn names(dir: BorrowedFd<'_>) -> Result<Vec<OsString>, Errno> {
    let mut names = Vec::new();
    match dirents::read_all(dir, &mut |entry| names.push(entry.name.to_owned())) {
        Err(Errno::ENOENT) => Ok(Vec::new()),
        result => result.map(|()| names),
    }
}

/// What is under a name of a directory, not followed; nothing when it is gone.
pub fn stat(dir: BorrowedFd<'_>, name: &OsStr) -> Result<Option<fs::Stat>, Errno> {
    match fs::fstatat(dir, name) {
        Err(Errno::ENOENT) => Ok(None),
        result => result.map(Some),
    }
}
