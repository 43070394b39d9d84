//! Modes of names in a directory. `fchmodat(2)` has no word for a name that is not to be followed.

use std::ffi::OsStr;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd};
use std::os::unix::ffi::OsStrExt;

use nix::errno::Errno;

use super::fs::{self, Object, with_c_str};

/// `fchmodat2(2)`, which Linux 6.6 brought. Where another number stands for it (Alpha, MIPS, x32) this one is ENOSYS.
const SYS_FCHMODAT2: libc::c_long = 452;

/// Changes the permission bits of what a name stands for; a symbolic link is EOPNOTSUPP and never followed.
pub(super) fn chmod_entry(dir: BorrowedFd<'_>, name: &OsStr, perm: u32) -> Result<(), Errno> {
    let result = with_c_str(name.as_bytes(), |name| {
        // SAFETY: `name` is a C string that lives through the call.
        Errno::result(unsafe {
            libc::syscall(
                SYS_FCHMODAT2,
                dir.as_raw_fd(),
                name.as_ptr(),
                perm,
                libc::AT_SYMLINK_NOFOLLOW,
            )
        })
    });
    match result {
        // EPERM is what older seccomp profiles of container engines have for calls that they do not know.
        Err(Errno::ENOSYS | Errno::EPERM) => chmod_opened(dir, name, perm),
        result => result.map(drop),
    }
}

/// As `chmod_entry`, with the calls of older kernels: what is changed is what was looked at, whatever becomes of the name.
fn chmod_opened(dir: BorrowedFd<'_>, name: &OsStr, perm: u32) -> Result<(), Errno> {
    let found = fs::openat(dir, name, libc::O_PATH, 0)?;
    let kind = fs::fstat(found.as_fd())?.st_mode & libc::S_IFMT;
    if kind == libc::S_IFLNK {
        return Err(Errno::EOPNOTSUPP);
    }
    match Object::Path(found.as_fd()).chmod(perm) {
        // Without /proc only what can be opened without an effect can be changed.
        Err(Errno::ENOENT) if matches!(kind, libc::S_IFREG | libc::S_IFDIR) => {
            let opened = fs::openat(dir, name, libc::O_RDONLY | libc::O_NONBLOCK, 0)?;
            Object::Open(opened.as_fd()).chmod(perm)
        }
        result => result,
    }
}

#[cfg(test)]
mod tests {
    use std::fs::{File, Permissions, metadata, set_permissions, write};
    use std::os::unix::fs::{PermissionsExt, symlink};

    use super::*;

    /// The mode of a link's target was changed in its place, also where it lay outside of the layer.
    #[test]
    fn a_link_is_never_followed() {
        let dir = tempfile::tempdir().unwrap();
        let (secret, link) = (dir.path().join("secret"), dir.path().join("link"));
        write(&secret, "").unwrap();
        set_permissions(&secret, Permissions::from_mode(0o600)).unwrap();
        symlink(&secret, link).unwrap();
        let top = File::open(dir.path()).unwrap();
        for chmod in [chmod_entry, chmod_opened] {
            let result = chmod(top.as_fd(), OsStr::new("link"), 0o777);
            assert_eq!(result, Err(Errno::EOPNOTSUPP));
            let mode = || metadata(&secret).unwrap().permissions().mode() & 0o7777;
            assert_eq!(mode(), 0o600);
            chmod(top.as_fd(), OsStr::new("secret"), 0o4640).unwrap();
            assert_eq!(mode(), 0o4640);
            set_permissions(&secret, Permissions::from_mode(0o600)).unwrap();
        }
    }
}
