//! Leave to do what the mode of an object of the upper forbids its owner.
//!
//! The mode of an object in the upper is the one that it has in the union, to which the kernel holds callers. Root passes
//! over modes, and so does who is root in a user namespace. A plyfs of any other user is held to them as well: it could
//! neither set an attribute `user.*` of a read-only file, its own marks among them, nor move a read-only directory
//! out of the work directory, nor put a copy into one. So such a mode lets it for the moment. A crash in between leaves the
//! owner more rights, and nobody else.

use std::ffi::OsStr;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::atomic::Ordering;

use nix::errno::Errno;
use nix::fcntl::AtFlags;
use nix::unistd::{AccessFlags, faccessat};

use super::types::{Attr, Quiet};
use super::union::Union;
use super::upper::Upper;
use crate::sys::fs::{self, Object};
use crate::sys::xattr;

/// Its owner may read it.
pub(super) const READ: u32 = 0o400;
/// Its owner may write it.
pub(super) const WRITE: u32 = 0o200;
/// Its owner may look for names in it.
pub(super) const SEARCH: u32 = 0o100;

/// A mode that lets its owner do more, for as long as this lives.
pub(super) struct Lent<'a> {
    object: Object<'a>,
    perm: u32,
}

impl<'a> Lent<'a> {
    /// Adds bits to the mode of a file or directory; EACCES where that is not allowed.
    pub(super) fn new(object: Object<'a>, bits: u32) -> Result<Self, Errno> {
        let mode = object.stat()?.st_mode;
        if !matches!(mode & libc::S_IFMT, libc::S_IFREG | libc::S_IFDIR) {
            return Err(Errno::EACCES);
        }
        let perm = mode & 0o7777;
        object
            .chmod(perm | bits)
            .map_err(|_| Errno::EACCES)
            .map(|()| Self { object, perm })
    }

    /// Lets names be put into a directory with these attributes; nothing where they may be.
    pub(super) fn for_names(dir: BorrowedFd<'a>, attr: &Attr) -> Result<Option<Self>, Errno> {
        let is_open = u32::from(attr.perm) & (WRITE | SEARCH) == WRITE | SEARCH || {
            let flags = AccessFlags::W_OK | AccessFlags::X_OK;
            faccessat(dir, ".", flags, AtFlags::empty()).is_ok()
        };
        match is_open {
            true => Ok(None),
            false => Self::new(Object::Open(dir), WRITE | SEARCH).map(Some),
        }
    }
}

impl Drop for Lent<'_> {
    fn drop(&mut self) {
        if let Err(errno) = self.object.chmod(self.perm) {
            tracing::warn!(%errno, "the owner of an object of the upper keeps rights that were lent");
        }
    }
}

impl Upper {
    /// Runs `body`, for which the mode of an object may lack these bits.
    ///
    /// The mode that is lent is told to nobody: the kernel would keep it.
    pub(super) fn permitted<T>(
        &self,
        object: Object<'_>,
        bits: u32,
        body: impl Fn() -> Result<T, Errno>,
    ) -> Result<T, Errno> {
        match body() {
            Err(Errno::EACCES) => {
                // Also of a root without the right to pass over modes.
                self.lends.store(true, Ordering::Release);
                // Of two at once, the later one would take the lent mode for the object's own.
                let _turn = self.modes.write();
                let _lent = Lent::new(object, bits)?;
                body()
            }
            result => result,
        }
    }

    /// Attributes of an object with its own mode, and not a lent one.
    pub(super) fn stat_settled(&self, object: Object<'_>) -> Result<fs::Stat, Errno> {
        let stat = {
            let _turn = self
                .lends
                .load(Ordering::Acquire)
                .then(|| self.modes.read());
            object.stat()
        };
        match (stat, object) {
            (Err(Errno::EACCES), Object::Entry(dir, _)) => {
                self.permitted(Object::Open(dir), SEARCH, || object.stat())
            }
            (stat, _) => stat,
        }
    }

    /// Whether names in a directory are to be had without leave.
    pub(super) fn may_search(&self, dir: BorrowedFd<'_>) -> bool {
        !self.lends.load(Ordering::Acquire)
            || faccessat(dir, ".", AccessFlags::X_OK, AtFlags::empty()) != Err(Errno::EACCES)
    }

    /// What a name stands for, also in a directory that is closed to its owner.
    pub(super) fn pin(&self, dir: BorrowedFd<'_>, name: &OsStr) -> Result<OwnedFd, Errno> {
        let open = || Object::Entry(dir, name).open(libc::O_PATH);
        self.permitted(Object::Open(dir), SEARCH, open)
    }

    /// As `renameat2`, to or from the work directory: that changes the `..` of a directory, which is to be writable.
    pub(super) fn rename(
        &self,
        from: BorrowedFd<'_>,
        name: &OsStr,
        to: BorrowedFd<'_>,
        new: &OsStr,
        flags: u32,
    ) -> Result<(), Errno> {
        let rename = || fs::renameat2(from, name, to, new, flags);
        match rename() {
            Err(Errno::EACCES) => {
                // By its name it is not to be had any more then.
                let moved = self.pin(from, name)?;
                self.permitted(Object::Path(moved.as_fd()), WRITE, rename)
            }
            renamed => renamed,
        }
    }
}

impl Union {
    /// Sets an attribute of an object of the upper, as the union needs it and whatever the mode is.
    pub(super) fn set_mark(
        &self,
        object: Object<'_>,
        name: &OsStr,
        value: &[u8],
    ) -> Result<(), Errno> {
        let upper = self.upper.as_ref().ok_or(Errno::EROFS)?;
        upper.permitted(object, WRITE, || xattr::set(object, name, value, 0))
    }

    /// As `open_upper`, for reading that moves no access time, where the host lets us.
    pub(super) fn open_upper_quietly(&self, object: Object<'_>) -> Result<OwnedFd, Errno> {
        let upper = self.upper.as_ref().ok_or(Errno::EROFS)?;
        upper.permitted(object, READ, || object.open_quietly(libc::O_RDONLY))
    }

    /// Opens a regular file of the upper whatever its mode is, also to read what somebody reads of the mount.
    pub(super) fn open_upper(&self, object: Object<'_>, flags: i32) -> Result<OwnedFd, Errno> {
        let upper = self.upper.as_ref().ok_or(Errno::EROFS)?;
        upper.permitted(object, READ | WRITE, || match self.quiet {
            Quiet::All => object.open_quietly(flags),
            Quiet::Nothing | Quiet::Directories => object.open(flags),
        })
    }
}
