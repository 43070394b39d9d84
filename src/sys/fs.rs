//! File system calls relative to descriptors: a name is always one component and is never followed.

use std::ffi::{CStr, CString, OsStr, OsString};
use std::os::fd::{AsRawFd, BorrowedFd, FromRawFd, OwnedFd, RawFd};
use std::os::unix::ffi::{OsStrExt, OsStringExt};
use std::path::Path;

pub use nix::errno::Errno;

use super::mode;

/// `stat(2)`'s answer as the host gave it.
pub type Stat = libc::stat;

/// Runs `body` with `name` as a C string, without an allocation for names up to 255 bytes.
pub(super) fn with_c_str<T>(
    name: &[u8],
    body: impl FnOnce(&CStr) -> Result<T, Errno>,
) -> Result<T, Errno> {
    const INLINE: usize = 320;
    if name.len() < INLINE {
        let mut buffer = [0u8; INLINE];
        buffer[..name.len()].copy_from_slice(name);
        match CStr::from_bytes_with_nul(&buffer[..=name.len()]) {
            Ok(text) => body(text),
            Err(_) => Err(Errno::EINVAL),
        }
    } else {
        let text = CString::new(name).map_err(|_| Errno::EINVAL)?;
        body(&text)
    }
}

fn check(result: libc::c_int) -> Result<(), Errno> {
    Errno::result(result).map(drop)
}

fn owned(result: libc::c_int) -> Result<OwnedFd, Errno> {
    let fd = Errno::result(result)?;
    // SAFETY: the kernel has just given us this descriptor; nobody else knows it.
    Ok(unsafe { OwnedFd::from_raw_fd(fd) })
}

fn count(result: libc::ssize_t) -> Result<usize, Errno> {
    Errno::result(result).map(|n| n as usize)
}

/// Opens a path as a caller of the process names it: symbolic links are followed.
pub fn open_path(path: &Path, flags: i32) -> Result<OwnedFd, Errno> {
    with_c_str(path.as_os_str().as_bytes(), |path| {
        // SAFETY: `path` is a C string that lives through the call.
        owned(unsafe { libc::open(path.as_ptr(), flags | libc::O_CLOEXEC, 0) })
    })
}

/// `openat` of one name; `O_NOFOLLOW` and `O_CLOEXEC` are added.
pub fn openat(dir: BorrowedFd<'_>, name: &OsStr, flags: i32, mode: u32) -> Result<OwnedFd, Errno> {
    with_c_str(name.as_bytes(), |name| {
        // SAFETY: `name` is a C string that lives through the call.
        owned(unsafe {
            libc::openat(
                dir.as_raw_fd(),
                name.as_ptr(),
                flags | libc::O_CLOEXEC | libc::O_NOFOLLOW,
                mode,
            )
        })
    })
}

/// Opens anew what `fd` (also an `O_PATH` descriptor) refers to.
pub fn reopen(fd: BorrowedFd<'_>, flags: i32) -> Result<OwnedFd, Errno> {
    with_proc_path(fd, None, |path| {
        // SAFETY: `path` is a C string that lives through the call.
        owned(unsafe { libc::open(path.as_ptr(), flags | libc::O_CLOEXEC, 0) })
    })
}

/// `fstat`, also of an `O_PATH` descriptor.
pub fn fstat(fd: BorrowedFd<'_>) -> Result<Stat, Errno> {
    let mut stat = std::mem::MaybeUninit::<Stat>::uninit();
    // SAFETY: `stat` is large enough; the kernel fills it whole when it answers 0.
    check(unsafe { libc::fstat(fd.as_raw_fd(), stat.as_mut_ptr()) })?;
    // SAFETY: filled above.
    Ok(unsafe { stat.assume_init() })
}

/// `fstatat` of one name, not following it.
pub fn fstatat(dir: BorrowedFd<'_>, name: &OsStr) -> Result<Stat, Errno> {
    with_c_str(name.as_bytes(), |name| {
        let mut stat = std::mem::MaybeUninit::<Stat>::uninit();
        // SAFETY: `name` is a C string, `stat` is large enough; filled whole on success.
        check(unsafe {
            libc::fstatat(
                dir.as_raw_fd(),
                name.as_ptr(),
                stat.as_mut_ptr(),
                libc::AT_SYMLINK_NOFOLLOW | libc::AT_NO_AUTOMOUNT,
            )
        })?;
        // SAFETY: filled above.
        Ok(unsafe { stat.assume_init() })
    })
}

/// `mkdirat`.
pub fn mkdirat(dir: BorrowedFd<'_>, name: &OsStr, mode: u32) -> Result<(), Errno> {
    with_c_str(name.as_bytes(), |name| {
        // SAFETY: `name` is a C string that lives through the call.
        check(unsafe { libc::mkdirat(dir.as_raw_fd(), name.as_ptr(), mode) })
    })
}

/// `mknodat`; `mode` carries the type.
pub fn mknodat(dir: BorrowedFd<'_>, name: &OsStr, mode: u32, rdev: u64) -> Result<(), Errno> {
    with_c_str(name.as_bytes(), |name| {
        // SAFETY: `name` is a C string that lives through the call.
        check(unsafe { libc::mknodat(dir.as_raw_fd(), name.as_ptr(), mode, rdev) })
    })
}

/// `symlinkat`.
pub fn symlinkat(target: &OsStr, dir: BorrowedFd<'_>, name: &OsStr) -> Result<(), Errno> {
    with_c_str(target.as_bytes(), |target| {
        with_c_str(name.as_bytes(), |name| {
            // SAFETY: both are C strings that live through the call.
            check(unsafe { libc::symlinkat(target.as_ptr(), dir.as_raw_fd(), name.as_ptr()) })
        })
    })
}

/// `linkat` of one name to another, following neither.
pub fn linkat(
    from: BorrowedFd<'_>,
    name: &OsStr,
    to: BorrowedFd<'_>,
    new: &OsStr,
) -> Result<(), Errno> {
    with_c_str(name.as_bytes(), |name| {
        with_c_str(new.as_bytes(), |new| {
            // SAFETY: both are C strings that live through the call.
            check(unsafe {
                libc::linkat(
                    from.as_raw_fd(),
                    name.as_ptr(),
                    to.as_raw_fd(),
                    new.as_ptr(),
                    0,
                )
            })
        })
    })
}

/// Gives another name to what a descriptor, also an `O_PATH` one, refers to.
pub fn link_fd(fd: BorrowedFd<'_>, to: BorrowedFd<'_>, new: &OsStr) -> Result<(), Errno> {
    with_c_str(new.as_bytes(), |new| {
        let link = |dir: RawFd, path: &CStr, flags: i32| {
            // SAFETY: both are C strings that live through the call.
            check(unsafe { libc::linkat(dir, path.as_ptr(), to.as_raw_fd(), new.as_ptr(), flags) })
        };
        match link(fd.as_raw_fd(), c"", libc::AT_EMPTY_PATH) {
            // It takes CAP_DAC_READ_SEARCH, which shows in no other way.
            Err(Errno::ENOENT) => with_proc_path(fd, None, |path| {
                link(libc::AT_FDCWD, path, libc::AT_SYMLINK_FOLLOW)
            }),
            result => result,
        }
    })
}

/// `unlinkat` of something that is no directory.
pub fn unlinkat(dir: BorrowedFd<'_>, name: &OsStr) -> Result<(), Errno> {
    with_c_str(name.as_bytes(), |name| {
        // SAFETY: `name` is a C string that lives through the call.
        check(unsafe { libc::unlinkat(dir.as_raw_fd(), name.as_ptr(), 0) })
    })
}

/// `unlinkat` of an empty directory.
pub fn rmdirat(dir: BorrowedFd<'_>, name: &OsStr) -> Result<(), Errno> {
    with_c_str(name.as_bytes(), |name| {
        // SAFETY: `name` is a C string that lives through the call.
        check(unsafe { libc::unlinkat(dir.as_raw_fd(), name.as_ptr(), libc::AT_REMOVEDIR) })
    })
}

/// `renameat2`, made directly so that it needs no C library that knows it. Without flags it is
/// `renameat`, which Linux before 3.15 has too.
pub fn renameat2(
    from: BorrowedFd<'_>,
    name: &OsStr,
    to: BorrowedFd<'_>,
    new: &OsStr,
    flags: u32,
) -> Result<(), Errno> {
    with_c_str(name.as_bytes(), |name| {
        with_c_str(new.as_bytes(), |new| {
            if flags == 0 {
                // SAFETY: both are C strings that live through the call.
                return check(unsafe {
                    libc::renameat(
                        from.as_raw_fd(),
                        name.as_ptr(),
                        to.as_raw_fd(),
                        new.as_ptr(),
                    )
                });
            }
            // SAFETY: both are C strings that live through the call.
            Errno::result(unsafe {
                libc::syscall(
                    libc::SYS_renameat2,
                    from.as_raw_fd(),
                    name.as_ptr(),
                    to.as_raw_fd(),
                    new.as_ptr(),
                    flags,
                )
            })
            .map(drop)
        })
    })
}

/// `readlinkat` of one name, or of what an `O_PATH` descriptor refers to when the name is empty.
pub fn readlinkat(dir: BorrowedFd<'_>, name: &OsStr) -> Result<OsString, Errno> {
    with_c_str(name.as_bytes(), |name| {
        let mut target = vec![0u8; libc::PATH_MAX as usize];
        // SAFETY: `name` is a C string and `target` has the length given.
        let n = count(unsafe {
            libc::readlinkat(
                dir.as_raw_fd(),
                name.as_ptr(),
                target.as_mut_ptr().cast(),
                target.len(),
            )
        })?;
        target.truncate(n);
        target.shrink_to_fit();
        Ok(OsString::from_vec(target))
    })
}

/// `pread`, the whole of `buf` unless the file ends before.
pub fn pread_full(fd: BorrowedFd<'_>, buf: &mut [u8], offset: u64) -> Result<usize, Errno> {
    transfer(buf.len(), |done| {
        let at = (offset + done as u64) as libc::off_t;
        nix::sys::uio::pread(fd, &mut buf[done..], at)
    })
}

/// `pwrite` until all is written; an error after some bytes is reported as a short count.
pub fn pwrite_full(fd: BorrowedFd<'_>, data: &[u8], offset: u64) -> Result<usize, Errno> {
    transfer(data.len(), |done| {
        let at = (offset + done as u64) as libc::off_t;
        nix::sys::uio::pwrite(fd, &data[done..], at)
    })
}

/// Repeats `step`, which is told how many bytes are through, until all `len` are or it moves none.
fn transfer(
    len: usize,
    mut step: impl FnMut(usize) -> Result<usize, Errno>,
) -> Result<usize, Errno> {
    let mut done = 0;
    while done < len {
        match step(done) {
            Ok(0) => break,
            Ok(n) => done += n,
            Err(Errno::EINTR) => {}
            Err(errno) if done == 0 => return Err(errno),
            Err(_) => break,
        }
    }
    Ok(done)
}

/// `ftruncate`.
pub fn ftruncate(fd: BorrowedFd<'_>, len: u64) -> Result<(), Errno> {
    let len = libc::off_t::try_from(len).map_err(|_| Errno::EFBIG)?;
    // SAFETY: plain values.
    check(unsafe { libc::ftruncate(fd.as_raw_fd(), len) })
}

/// `fallocate` with any mode bits.
pub fn fallocate(fd: BorrowedFd<'_>, mode: i32, offset: u64, len: u64) -> Result<(), Errno> {
    let offset = libc::off_t::try_from(offset).map_err(|_| Errno::EFBIG)?;
    let len = libc::off_t::try_from(len).map_err(|_| Errno::EFBIG)?;
    // SAFETY: plain values.
    check(unsafe { libc::fallocate(fd.as_raw_fd(), mode, offset, len) })
}

/// `lseek`; the position of `fd` moves, so only for uses that name their own offsets.
pub fn lseek(fd: BorrowedFd<'_>, offset: i64, whence: i32) -> Result<i64, Errno> {
    // SAFETY: plain values.
    Errno::result(unsafe { libc::lseek(fd.as_raw_fd(), offset, whence) })
}

/// `copy_file_range` with offsets given; ENOSYS before Linux 4.5.
pub fn copy_file_range(
    from: BorrowedFd<'_>,
    mut from_offset: i64,
    to: BorrowedFd<'_>,
    mut to_offset: i64,
    len: usize,
) -> Result<usize, Errno> {
    // SAFETY: both offsets are this function's own variables.
    let result = unsafe {
        libc::syscall(
            libc::SYS_copy_file_range,
            from.as_raw_fd(),
            &raw mut from_offset,
            to.as_raw_fd(),
            &raw mut to_offset,
            len,
            0u32,
        )
    };
    Errno::result(result).map(|n| n as usize)
}

/// `FICLONE`: makes `to` share the whole content of `from`, where the file system can.
pub fn clone_content(from: BorrowedFd<'_>, to: BorrowedFd<'_>) -> Result<(), Errno> {
    // SAFETY: the request takes a descriptor by value.
    check(unsafe { libc::ioctl(to.as_raw_fd(), libc::FICLONE, from.as_raw_fd()) })
}

/// `sync_file_range`: begins to write what is dirty of a file, and waits for nothing.
pub fn start_writeback(fd: BorrowedFd<'_>) -> Result<(), Errno> {
    // SAFETY: no pointer is passed.
    check(unsafe { libc::sync_file_range(fd.as_raw_fd(), 0, 0, libc::SYNC_FILE_RANGE_WRITE) })
}

/// `fsync`, or `fdatasync`.
pub fn fsync(fd: BorrowedFd<'_>, data_only: bool) -> Result<(), Errno> {
    // SAFETY: plain values.
    check(unsafe {
        if data_only {
            libc::fdatasync(fd.as_raw_fd())
        } else {
            libc::fsync(fd.as_raw_fd())
        }
    })
}

/// `sync_file_range`: has the data of a range written, without the metadata that finds it. `wait` until it is. Nothing is
/// durable by that, so where the call is missing or forbidden nothing happens.
pub fn write_out(fd: BorrowedFd<'_>, start: u64, end: u64, wait: bool) -> Result<(), Errno> {
    let offset = libc::off64_t::try_from(start).map_err(|_| Errno::EFBIG)?;
    let len = libc::off64_t::try_from(end - start).map_err(|_| Errno::EFBIG)?;
    let flags = match wait {
        true => {
            libc::SYNC_FILE_RANGE_WAIT_BEFORE
                | libc::SYNC_FILE_RANGE_WRITE
                | libc::SYNC_FILE_RANGE_WAIT_AFTER
        }
        false => libc::SYNC_FILE_RANGE_WRITE,
    };
    // SAFETY: plain values.
    match check(unsafe { libc::sync_file_range(fd.as_raw_fd(), offset, len, flags) }) {
        Err(Errno::ENOSYS | Errno::EPERM) => Ok(()),
        result => result,
    }
}

/// `syncfs` of the file system that `fd` lies on.
pub fn syncfs(fd: BorrowedFd<'_>) -> Result<(), Errno> {
    // SAFETY: plain values.
    check(unsafe { libc::syncfs(fd.as_raw_fd()) })
}

/// `flock`, exclusive and without waiting.
pub fn try_lock(fd: BorrowedFd<'_>) -> Result<(), Errno> {
    // SAFETY: plain values.
    check(unsafe { libc::flock(fd.as_raw_fd(), libc::LOCK_EX | libc::LOCK_NB) })
}

/// `flock`, shared and without waiting.
pub fn try_lock_shared(fd: BorrowedFd<'_>) -> Result<(), Errno> {
    // SAFETY: plain values.
    check(unsafe { libc::flock(fd.as_raw_fd(), libc::LOCK_SH | libc::LOCK_NB) })
}

/// `flock`, exclusive, waiting for whoever has it.
pub fn lock(fd: BorrowedFd<'_>) -> Result<(), Errno> {
    wait_for_lock(fd, libc::LOCK_EX)
}

/// `flock`, shared, waiting for whoever has it for itself.
pub fn lock_shared(fd: BorrowedFd<'_>) -> Result<(), Errno> {
    wait_for_lock(fd, libc::LOCK_SH)
}

fn wait_for_lock(fd: BorrowedFd<'_>, how: libc::c_int) -> Result<(), Errno> {
    loop {
        // SAFETY: plain values.
        match check(unsafe { libc::flock(fd.as_raw_fd(), how) }) {
            Err(Errno::EINTR) => {}
            result => return result,
        }
    }
}

/// `fstatvfs`.
pub fn fstatvfs(fd: BorrowedFd<'_>) -> Result<libc::statvfs, Errno> {
    let mut stat = std::mem::MaybeUninit::<libc::statvfs>::uninit();
    // SAFETY: `stat` is large enough; the call fills it whole when it answers 0.
    check(unsafe { libc::fstatvfs(fd.as_raw_fd(), stat.as_mut_ptr()) })?;
    // SAFETY: filled above.
    Ok(unsafe { stat.assume_init() })
}

/// Whether a file system keeps free blocks for root: ext2, ext3 and ext4. What others count as free and do not give to
/// all, they give to nobody.
pub fn has_reserve(fd: BorrowedFd<'_>) -> Result<bool, Errno> {
    let stat = nix::sys::statfs::fstatfs(fd)?;
    Ok(stat.filesystem_type() == nix::sys::statfs::EXT4_SUPER_MAGIC)
}

/// Runs `body` with the `/proc/self/fd` path of a descriptor, or of a name below it.
pub(super) fn with_proc_path<T>(
    fd: BorrowedFd<'_>,
    name: Option<&OsStr>,
    body: impl FnOnce(&CStr) -> Result<T, Errno>,
) -> Result<T, Errno> {
    let mut path = Vec::with_capacity(32 + name.map_or(0, |name| name.len() + 1));
    path.extend_from_slice(b"/proc/self/fd/");
    push_decimal(&mut path, fd.as_raw_fd());
    if let Some(name) = name {
        path.push(b'/');
        path.extend_from_slice(name.as_bytes());
    }
    with_c_str(&path, body)
}

fn push_decimal(out: &mut Vec<u8>, value: RawFd) {
    let mut digits = [0u8; 12];
    let mut at = digits.len();
    let mut rest = value.unsigned_abs();
    loop {
        at -= 1;
        digits[at] = b'0' + (rest % 10) as u8;
        rest /= 10;
        if rest == 0 {
            break;
        }
    }
    out.extend_from_slice(&digits[at..]);
}

/// How an object of a host file system is reached.
#[derive(Clone, Copy, Debug)]
pub enum Object<'a> {
    /// A descriptor opened for reading or writing.
    Open(BorrowedFd<'a>),
    /// An `O_PATH` descriptor.
    Path(BorrowedFd<'a>),
    /// A name in a directory; not followed.
    Entry(BorrowedFd<'a>, &'a OsStr),
}

impl Object<'_> {
    /// Its attributes.
    pub fn stat(self) -> Result<Stat, Errno> {
        match self {
            Self::Open(fd) | Self::Path(fd) => fstat(fd),
            Self::Entry(dir, name) => fstatat(dir, name),
        }
    }

    /// Changes owner and group; `None` leaves one as it is.
    pub fn chown(self, uid: Option<u32>, gid: Option<u32>) -> Result<(), Errno> {
        let uid = uid.unwrap_or(u32::MAX);
        let gid = gid.unwrap_or(u32::MAX);
        match self {
            // SAFETY: plain values.
            Self::Open(fd) => check(unsafe { libc::fchown(fd.as_raw_fd(), uid, gid) }),
            Self::Path(fd) => {
                // SAFETY: the name is a static C string.
                check(unsafe {
                    libc::fchownat(
                        fd.as_raw_fd(),
                        c"".as_ptr(),
                        uid,
                        gid,
                        libc::AT_EMPTY_PATH | libc::AT_SYMLINK_NOFOLLOW,
                    )
                })
            }
            Self::Entry(dir, name) => with_c_str(name.as_bytes(), |name| {
                // SAFETY: `name` is a C string that lives through the call.
                check(unsafe {
                    libc::fchownat(
                        dir.as_raw_fd(),
                        name.as_ptr(),
                        uid,
                        gid,
                        libc::AT_SYMLINK_NOFOLLOW,
                    )
                })
            }),
        }
    }

    /// Changes the permission bits; EOPNOTSUPP of a symbolic link by its name.
    pub fn chmod(self, perm: u32) -> Result<(), Errno> {
        match self {
            // SAFETY: plain values.
            Self::Open(fd) => check(unsafe { libc::fchmod(fd.as_raw_fd(), perm) }),
            Self::Path(fd) => with_proc_path(fd, None, |path| {
                // SAFETY: `path` is a C string that lives through the call.
                check(unsafe { libc::chmod(path.as_ptr(), perm) })
            }),
            Self::Entry(dir, name) => mode::chmod_entry(dir, name, perm),
        }
    }

    /// Sets access and modification time; `UTIME_NOW` and `UTIME_OMIT` in the nanoseconds work.
    pub fn set_times(self, times: &[libc::timespec; 2]) -> Result<(), Errno> {
        match self {
            // SAFETY: `times` has the two elements that the call reads.
            Self::Open(fd) => check(unsafe { libc::futimens(fd.as_raw_fd(), times.as_ptr()) }),
            Self::Path(fd) => with_proc_path(fd, None, |path| {
                // SAFETY: `path` is a C string and `times` has two elements.
                check(unsafe { libc::utimensat(libc::AT_FDCWD, path.as_ptr(), times.as_ptr(), 0) })
            }),
            Self::Entry(dir, name) => with_c_str(name.as_bytes(), |name| {
                // SAFETY: `name` is a C string and `times` has two elements.
                check(unsafe {
                    libc::utimensat(
                        dir.as_raw_fd(),
                        name.as_ptr(),
                        times.as_ptr(),
                        libc::AT_SYMLINK_NOFOLLOW,
                    )
                })
            }),
        }
    }

    /// Opens it (again). The caller has made sure that opening has no side effect: no fifo, no device.
    pub fn open(self, flags: i32) -> Result<OwnedFd, Errno> {
        match self {
            Self::Open(fd) | Self::Path(fd) => reopen(fd, flags),
            Self::Entry(dir, name) => openat(dir, name, flags, 0),
        }
    }

    /// As `open`, without touching the access time.
    pub fn open_quietly(self, flags: i32) -> Result<OwnedFd, Errno> {
        match self.open(flags | libc::O_NOATIME) {
            // Only the owner and root may ask for that.
            Err(Errno::EPERM) => self.open(flags),
            result => result,
        }
    }

    /// Target of a symbolic link.
    pub fn readlink(self) -> Result<OsString, Errno> {
        match self {
            Self::Open(fd) | Self::Path(fd) => readlinkat(fd, OsStr::new("")),
            Self::Entry(dir, name) => readlinkat(dir, name),
        }
    }
}
