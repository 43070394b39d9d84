//! Extended attributes of any object, also of symbolic links and of `O_PATH` descriptors, for which
//! the path through `/proc/self/fd` stands in.

use std::ffi::{CStr, OsStr, OsString};
use std::os::fd::AsRawFd;
use std::os::unix::ffi::{OsStrExt, OsStringExt};

use super::fs::{Errno, Object, with_c_str, with_proc_path};

/// Most attribute values fit; a larger one costs a second call.
const FIRST_TRY: usize = 512;

/// `getxattr` into `buf`; with an empty `buf` the size alone.
fn get_into(object: Object<'_>, name: &CStr, buf: &mut [u8]) -> Result<usize, Errno> {
    let (pointer, len) = (buf.as_mut_ptr().cast(), buf.len());
    let result = match object {
        // SAFETY: `name` is a C string and `pointer` is writable for `len` bytes, here and below.
        Object::Open(fd) => unsafe { libc::fgetxattr(fd.as_raw_fd(), name.as_ptr(), pointer, len) },
        Object::Path(fd) => with_proc_path(fd, None, |path| {
            // SAFETY: as above; `path` is a C string.
            Ok(unsafe { libc::getxattr(path.as_ptr(), name.as_ptr(), pointer, len) })
        })?,
        Object::Entry(dir, entry) => with_proc_path(dir, Some(entry), |path| {
            // SAFETY: as above; `path` is a C string.
            Ok(unsafe { libc::lgetxattr(path.as_ptr(), name.as_ptr(), pointer, len) })
        })?,
    };
    Errno::result(result).map(|n| n as usize)
}

fn list_into(object: Object<'_>, buf: &mut [u8]) -> Result<usize, Errno> {
    let (pointer, len) = (buf.as_mut_ptr().cast(), buf.len());
    let result = match object {
        // SAFETY: `pointer` is writable for `len` bytes, here and below.
        Object::Open(fd) => unsafe { libc::flistxattr(fd.as_raw_fd(), pointer, len) },
        Object::Path(fd) => with_proc_path(fd, None, |path| {
            // SAFETY: as above; `path` is a C string.
            Ok(unsafe { libc::listxattr(path.as_ptr(), pointer, len) })
        })?,
        Object::Entry(dir, entry) => with_proc_path(dir, Some(entry), |path| {
            // SAFETY: as above; `path` is a C string.
            Ok(unsafe { libc::llistxattr(path.as_ptr(), pointer, len) })
        })?,
    };
    Errno::result(result).map(|n| n as usize)
}

/// Calls with growing buffers until the answer fits: it may change between two calls.
fn sized(mut call: impl FnMut(&mut [u8]) -> Result<usize, Errno>) -> Result<Vec<u8>, Errno> {
    let mut first = [0u8; FIRST_TRY];
    match call(&mut first) {
        Ok(n) => return Ok(first[..n].to_vec()),
        Err(Errno::ERANGE) => {}
        Err(errno) => return Err(errno),
    }
    loop {
        let mut buf = vec![0u8; call(&mut [])?];
        match call(&mut buf) {
            Ok(n) => {
                buf.truncate(n);
                return Ok(buf);
            }
            Err(Errno::ERANGE) => {}
            Err(errno) => return Err(errno),
        }
    }
}

/// The value, or ENODATA, or EOPNOTSUPP.
pub fn get(object: Object<'_>, name: &OsStr) -> Result<Vec<u8>, Errno> {
    with_c_str(name.as_bytes(), |name| {
        sized(|buf| get_into(object, name, buf))
    })
}

/// All names.
pub fn list(object: Object<'_>) -> Result<Vec<OsString>, Errno> {
    let names = sized(|buf| list_into(object, buf))?;
    Ok(names
        .split(|byte| *byte == 0)
        .filter(|name| !name.is_empty())
        .map(|name| OsString::from_vec(name.to_vec()))
        .collect())
}

/// `setxattr`; `flags` are `XATTR_CREATE` and `XATTR_REPLACE`.
pub fn set(object: Object<'_>, name: &OsStr, value: &[u8], flags: i32) -> Result<(), Errno> {
    let (pointer, len) = (value.as_ptr().cast(), value.len());
    with_c_str(name.as_bytes(), |name| {
        let result = match object {
            // SAFETY: `name` is a C string and `pointer` is readable for `len` bytes, here and below.
            Object::Open(fd) => unsafe {
                libc::fsetxattr(fd.as_raw_fd(), name.as_ptr(), pointer, len, flags)
            },
            Object::Path(fd) => with_proc_path(fd, None, |path| {
                // SAFETY: as above; `path` is a C string.
                Ok(unsafe { libc::setxattr(path.as_ptr(), name.as_ptr(), pointer, len, flags) })
            })?,
            Object::Entry(dir, entry) => with_proc_path(dir, Some(entry), |path| {
                // SAFETY: as above; `path` is a C string.
                Ok(unsafe { libc::lsetxattr(path.as_ptr(), name.as_ptr(), pointer, len, flags) })
            })?,
        };
        Errno::result(result).map(drop)
    })
}

/// `removexattr`.
pub fn remove(object: Object<'_>, name: &OsStr) -> Result<(), Errno> {
    with_c_str(name.as_bytes(), |name| {
        let result = match object {
            // SAFETY: `name` is a C string, here and below.
            Object::Open(fd) => unsafe { libc::fremovexattr(fd.as_raw_fd(), name.as_ptr()) },
            Object::Path(fd) => with_proc_path(fd, None, |path| {
                // SAFETY: as above; `path` is a C string.
                Ok(unsafe { libc::removexattr(path.as_ptr(), name.as_ptr()) })
            })?,
            Object::Entry(dir, entry) => with_proc_path(dir, Some(entry), |path| {
                // SAFETY: as above; `path` is a C string.
                Ok(unsafe { libc::lremovexattr(path.as_ptr(), name.as_ptr()) })
            })?,
        };
        Errno::result(result).map(drop)
    })
}
