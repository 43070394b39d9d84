//! Reading directories by `getdents64`.

use std::ffi::OsStr;
use std::os::fd::{AsRawFd, BorrowedFd};
use std::os::unix::ffi::OsStrExt;

use super::fs::{Errno, lseek};

/// One entry as the host gave it.
#[derive(Clone, Copy, Debug)]
pub struct RawEntry<'a> {
    /// Inode number.
    pub ino: u64,
    /// `DT_*`; `DT_UNKNOWN` where the file system does not say.
    pub kind: u8,
    /// Name; `.` and `..` are left out.
    pub name: &'a OsStr,
}

/// Hands every entry of `dir` to `sink`, from the start. The position of `dir` moves, so the
/// descriptor must not be shared with another reader.
pub fn read_all(dir: BorrowedFd<'_>, sink: &mut dyn FnMut(RawEntry<'_>)) -> Result<(), Errno> {
    const HEADER: usize = 19;
    lseek(dir, 0, libc::SEEK_SET)?;
    let mut buf = vec![0u8; 32 * 1024];
    loop {
        // SAFETY: `buf` is writable for its length.
        let result = unsafe {
            libc::syscall(
                libc::SYS_getdents64,
                dir.as_raw_fd(),
                buf.as_mut_ptr(),
                buf.len(),
            )
        };
        let filled = Errno::result(result)? as usize;
        if filled == 0 {
            return Ok(());
        }
        let mut rest = &buf[..filled];
        // struct linux_dirent64: u64 ino, i64 off, u16 reclen, u8 type, then the name with its NUL.
        while let Some((header, _)) = rest.split_at_checked(HEADER) {
            let mut ino = [0; 8];
            ino.copy_from_slice(&header[..8]);
            let len = usize::from(u16::from_ne_bytes([header[16], header[17]]));
            if len < HEADER || len > rest.len() {
                return Err(Errno::EIO);
            }
            let name = &rest[HEADER..len];
            let end = name.iter().position(|b| *b == 0).unwrap_or(name.len());
            let name = &name[..end];
            if name != b"." && name != b".." {
                sink(RawEntry {
                    ino: u64::from_ne_bytes(ino),
                    kind: header[18],
                    name: OsStr::from_bytes(name),
                });
            }
            rest = &rest[len..];
        }
    }
}
