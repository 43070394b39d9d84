//! The marks by which a layer says more than a plain directory can: the names of the private
//! extended attributes, and the dialects of "this name is gone".
//!
//! Read in a lower layer: character devices 0:0 and the `overlay.*` attributes of the mount's family
//! as kernel overlayfs writes them (`Documentation/filesystems/overlayfs.rst`), files `.wh.NAME` and
//! `.wh..wh..opq` as AUFS and OCI layers have them, `user.fuseoverlayfs.opaque` of fuse-overlayfs. An upper that
//! holds such when it is first mounted is translated (`adopt`). Written: overlayfs's forms alone.

use std::ffi::{OsStr, OsString};
use std::os::fd::{AsFd, BorrowedFd};
use std::os::unix::ffi::{OsStrExt, OsStringExt};
use std::sync::atomic::{AtomicBool, Ordering};

use nix::errno::Errno;

use super::attr::attr_of;
use super::types::{Attr, FileKind, XattrFamily};
use crate::sys::fs::{self, Object};
use crate::sys::xattr;

/// Prefix of AUFS's and OCI's whiteout files.
pub(super) const WH_PREFIX: &[u8] = b".wh.";
/// AUFS's and OCI's mark of an opaque directory.
pub(super) const WH_OPAQUE: &[u8] = b".wh..wh..opq";
/// fuse-overlayfs's mark of an opaque directory.
pub(super) const FUSE_OVERLAYFS_OPAQUE: &str = "user.fuseoverlayfs.opaque";
/// Where fuse-overlayfs notes what a file was copied from.
pub(super) const FUSE_OVERLAYFS_ORIGIN: &str = "user.fuseoverlayfs.origin";
/// What all of fuse-overlayfs's own attributes begin with.
const FUSE_OVERLAYFS: [&[u8]; 2] = [b"user.fuseoverlayfs.", b"security.fuseoverlayfs."];

/// Whether a name is one of the attributes that fuse-overlayfs keeps for itself.
pub(super) fn is_fuse_overlayfs(name: &OsStr) -> bool {
    FUSE_OVERLAYFS
        .iter()
        .any(|prefix| name.as_bytes().starts_with(prefix))
}

/// Whether a file with the prefix is a mark: AUFS and OCI layers have empty regular files. Anything else is
/// somebody's file of that name.
pub(super) fn is_wh_file(dir: BorrowedFd<'_>, name: &OsStr) -> bool {
    fs::fstatat(dir, name)
        .is_ok_and(|stat| stat.st_size == 0 && attr_of(&stat).kind == FileKind::Regular)
}

/// Makes a whiteout under a free name: a device 0:0, or, where the kernel does not let us (without
/// CAP_MKNOD before Linux 5.8), overlayfs's form as an attribute, which counts only where `allow_in` was said.
pub(super) fn make(
    dir: BorrowedFd<'_>,
    name: &OsStr,
    family: XattrFamily,
    devices: &AtomicBool,
) -> Result<(), Errno> {
    if devices.load(Ordering::Relaxed) {
        match fs::mknodat(dir, name, libc::S_IFCHR, 0) {
            Err(Errno::EPERM) => devices.store(false, Ordering::Relaxed),
            result => return result,
        }
    }
    // Without the rights of root its owner has to be able to write and to read the attribute.
    let fd = fs::openat(
        dir,
        name,
        libc::O_CREAT | libc::O_EXCL | libc::O_WRONLY,
        0o600,
    )?;
    xattr::set(Object::Open(fd.as_fd()), family.whiteout(), b"y", 0)
}

/// Has whiteouts in attribute form count in a directory. An opaque one needs none, and stays opaque.
pub(super) fn allow_in(dir: BorrowedFd<'_>, family: XattrFamily) -> Result<(), Errno> {
    match xattr::set(Object::Open(dir), family.opaque(), b"x", libc::XATTR_CREATE) {
        Err(Errno::EEXIST) => Ok(()),
        result => result,
    }
}

/// Whether an object is overlayfs's whiteout: a character device 0:0.
pub(super) fn is_whiteout(attr: &Attr) -> bool {
    attr.kind == FileKind::CharDevice && attr.rdev == 0
}

macro_rules! marks {
    ($($(#[$doc:meta])* $method:ident = $name:literal;)*) => {
        impl XattrFamily {
            $($(#[$doc])*
            pub(super) fn $method(self) -> &'static OsStr {
                OsStr::new(match self {
                    Self::Trusted => concat!("trusted.overlay.", $name),
                    Self::User => concat!("user.overlay.", $name),
                })
            })*
        }
    };
}

marks! {
    /// On a directory: nothing below shows through (`y`); or it holds whiteouts in xattr form (`x`).
    opaque = "opaque";
    /// On a directory: where in the layers below it continues.
    redirect = "redirect";
    /// The lower object that an upper one was copied from, as a file handle.
    origin = "origin";
    /// On the top of an upper: an id that kernel overlayfs has given it.
    uuid = "uuid";
    /// On an upper directory: entries in it may carry an origin.
    impure = "impure";
    /// On a file: the data is in the layers below.
    metacopy = "metacopy";
    /// On an upper file with an index entry: how its link count in the union relates to the host's.
    nlink = "nlink";
    /// On an upper directory: what of it is immutable (`i`) or append-only (`a`), which the host does not enforce.
    protattr = "protattr";
    /// On an empty regular file in a directory with opaque `x`: a whiteout.
    whiteout = "whiteout";
    /// Plywood's own, on the root of an upper: layers made by it hold only overlayfs's dialect, so
    /// that `.wh.` names in it are plain files also when it has become a lower.
    dialect = "plywood.dialect";
    /// Plywood's own, on the root of an upper: there may be a `metacopy` in it.
    metacopies = "plywood.metacopies";
    /// Plywood's own, where file handles cannot be opened: file system index and inode number of
    /// the origin.
    origin_number = "plywood.origin";
}

impl XattrFamily {
    /// The prefix of all marks.
    pub(super) fn prefix(self) -> &'static str {
        match self {
            Self::Trusted => "trusted.overlay.",
            Self::User => "user.overlay.",
        }
    }

    /// The name under which an attribute that a user names is stored: one that looks like a mark is
    /// escaped, as the kernel does since 6.8.
    pub fn stored_name(self, name: &OsStr) -> OsString {
        match name.as_bytes().strip_prefix(self.prefix().as_bytes()) {
            Some(rest) => {
                OsString::from_vec([self.prefix().as_bytes(), b"overlay.", rest].concat())
            }
            None => name.to_owned(),
        }
    }

    /// What a stored name is shown as; nothing for a mark.
    pub(super) fn shown_name(self, stored: OsString) -> Option<OsString> {
        match stored.as_bytes().strip_prefix(self.prefix().as_bytes()) {
            Some(rest) => rest
                .strip_prefix(b"overlay.")
                .map(|rest| OsString::from_vec([self.prefix().as_bytes(), rest].concat())),
            None => Some(stored),
        }
    }

    /// Whether a stored name is one of the union's marks.
    pub(super) fn is_mark(self, stored: &OsStr) -> bool {
        stored
            .as_bytes()
            .strip_prefix(self.prefix().as_bytes())
            .is_some_and(|rest| !rest.starts_with(b"overlay."))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_mark_named_by_a_user_is_escaped_and_shown_as_named() {
        let family = XattrFamily::Trusted;
        for name in ["trusted.overlay.opaque", "trusted.overlay.overlay.opaque"] {
            let stored = family.stored_name(OsStr::new(name));
            assert!(!family.is_mark(&stored));
            assert_eq!(family.shown_name(stored), Some(OsString::from(name)));
        }
        let other = OsStr::new("user.overlay.opaque");
        assert_eq!(family.stored_name(other), other);
        assert_eq!(family.shown_name("trusted.overlay.opaque".into()), None);
    }
}
