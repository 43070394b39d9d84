//! An upper that becomes a layer for others while somebody still reads through this union.
//!
//! The host moves access times of what is read from an upper, as it does for any file. A layer stays as it is, to the
//! last byte. So once the upper is sealed, it is read as the lowers are: through a private mount that is read-only
//! and keeps access times. What was opened before is opened anew.

use std::os::fd::{AsFd, OwnedFd};
use std::path::PathBuf;
use std::slice;
use std::sync::Arc;

use nix::errno::Errno;
use parking_lot::RwLock;

use super::error::{Context, Result};
use super::union::Union;
use crate::sys::{fs, private_mount};

/// The top of an upper. As long as the upper is written to, its descriptor has the lock on it.
pub(super) struct Root {
    /// As the configuration names it.
    dir: PathBuf,
    now: RwLock<(Arc<OwnedFd>, bool)>,
}

impl Root {
    pub(super) fn new(dir: PathBuf, fd: OwnedFd) -> Self {
        Self {
            dir,
            now: RwLock::new((Arc::new(fd), false)),
        }
    }

    /// The directory, opened for reading, and whether it is sealed.
    pub(super) fn get(&self) -> (Arc<OwnedFd>, bool) {
        self.now.read().clone()
    }
}

/// A directory of the upper, opened for reading.
pub(super) struct UpperDir {
    pub(super) fd: Arc<OwnedFd>,
    /// Reached from the sealed top.
    pub(super) sealed: bool,
}

impl Union {
    /// Whether the upper is sealed.
    pub(super) fn is_sealed(&self) -> bool {
        self.upper_of().is_some_and(|upper| upper.root.now.read().1)
    }

    /// From now on nothing of the upper changes, access times included, whoever reads. For a caller who knows that
    /// nobody writes any more; what is being read at this moment may still move a time. Fails without the
    /// privilege to mount.
    pub fn seal(&self) -> Result<()> {
        let Some(upper) = self.upper_of() else {
            return Ok(());
        };
        let failed =
            |error: std::io::Error| Errno::from_raw(error.raw_os_error().unwrap_or(libc::EIO));
        let bound = private_mount::read_only(slice::from_ref(&upper.root.dir))
            .and_then(|mut mounts| mounts.pop().unwrap_or(Err(Errno::ENOENT.into())))
            .map_err(failed)
            .context("mounting a sealed upper for reading")?;
        let flags = libc::O_RDONLY | libc::O_DIRECTORY;
        let root = fs::openat(bound.as_fd(), ".".as_ref(), flags, 0)?;
        let (before, _) = upper.root.get();
        let (before, after) = (fs::fstat(before.as_fd())?, fs::fstat(root.as_fd())?);
        if (before.st_dev, before.st_ino) != (after.st_dev, after.st_ino) {
            return Err(Errno::ESTALE).context("the upper directory was replaced");
        }
        *upper.root.now.write() = (Arc::new(root), true);
        // Nobody uses these any more.
        for node in self.table.all() {
            node.io.clear();
            if let Some(directory) = &node.directory {
                directory.fd.clear();
            }
        }
        Ok(())
    }
}
