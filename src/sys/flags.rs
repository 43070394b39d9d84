//! Flags of a file that chattr(1) sets, as statx(2) tells them.

use std::ffi::OsStr;
use std::mem::MaybeUninit;
use std::os::fd::AsRawFd;
use std::os::unix::ffi::OsStrExt;

use nix::errno::Errno;

use super::fs::{Object, with_c_str};

/// What of an object is immutable or append-only, by chattr(1)'s letters; mostly nothing. Before Linux 4.11, which has no
/// statx(2), and where that is not allowed, nothing is.
pub fn protection(object: Object<'_>) -> Result<&'static str, Errno> {
    const IMMUTABLE: u64 = libc::STATX_ATTR_IMMUTABLE as u64;
    const APPEND: u64 = libc::STATX_ATTR_APPEND as u64;
    let (fd, name) = match object {
        Object::Open(fd) | Object::Path(fd) => (fd, OsStr::new("")),
        Object::Entry(dir, name) => (dir, name),
    };
    let mut statx = MaybeUninit::<libc::statx>::zeroed();
    let flags = libc::AT_SYMLINK_NOFOLLOW | libc::AT_EMPTY_PATH;
    let result = with_c_str(name.as_bytes(), |name| {
        // SAFETY: the name and the buffer live through the call, and the buffer has the kernel's layout.
        let result = unsafe {
            libc::syscall(
                libc::SYS_statx,
                fd.as_raw_fd(),
                name.as_ptr(),
                flags,
                0,
                statx.as_mut_ptr(),
            )
        };
        Errno::result(result)
    });
    match result {
        Ok(_) => {}
        // EPERM is what older seccomp profiles of container engines have for calls that they do not know.
        Err(Errno::ENOSYS | Errno::EPERM) => return Ok(""),
        Err(errno) => return Err(errno),
    }
    // SAFETY: zeros are a value of it, and whatever the kernel writes over them, too.
    let set = unsafe { statx.assume_init() }.stx_attributes;
    Ok(match (set & APPEND != 0, set & IMMUTABLE != 0) {
        (false, false) => "",
        (false, true) => "i",
        (true, false) => "a",
        (true, true) => "ai",
    })
}
