//! Between the union's words and those of FUSE.

use std::time::{Duration, SystemTime, UNIX_EPOCH};

use fuser::{Errno, FileAttr, FileType, INodeNo, TimeOrNow};
use nix::sys::stat::{major, makedev, minor};

use crate::cow::{Attr, FileKind, SetTime, Timestamp};

/// How long the kernel may keep what it was told: for good, because nothing changes the tree but
/// this process, and what it changes goes through the kernel. A hundred years stay clear of the
/// overflows that the largest numbers meet in old kernels.
pub const FOREVER: Duration = Duration::from_secs(100 * 365 * 24 * 3600);

/// The attributes as FUSE sends them.
pub fn file_attr(attr: &Attr) -> FileAttr {
    FileAttr {
        ino: INodeNo(attr.ino),
        size: attr.size,
        blocks: attr.blocks,
        atime: system_time(attr.atime),
        mtime: system_time(attr.mtime),
        ctime: system_time(attr.ctime),
        crtime: UNIX_EPOCH,
        kind: file_type(attr.kind),
        perm: attr.perm,
        nlink: attr.nlink,
        uid: attr.uid,
        gid: attr.gid,
        rdev: encode_dev(attr.rdev),
        blksize: attr.blksize,
        flags: 0,
    }
}

/// "There is no such name, and you may remember it": an entry with node 0.
pub fn negative_entry() -> FileAttr {
    FileAttr {
        ino: INodeNo(0),
        size: 0,
        blocks: 0,
        atime: UNIX_EPOCH,
        mtime: UNIX_EPOCH,
        ctime: UNIX_EPOCH,
        crtime: UNIX_EPOCH,
        kind: FileType::RegularFile,
        perm: 0,
        nlink: 0,
        uid: 0,
        gid: 0,
        rdev: 0,
        blksize: 0,
        flags: 0,
    }
}

/// The type as FUSE sends it.
pub fn file_type(kind: FileKind) -> FileType {
    match kind {
        FileKind::Regular => FileType::RegularFile,
        FileKind::Directory => FileType::Directory,
        FileKind::Symlink => FileType::Symlink,
        FileKind::CharDevice => FileType::CharDevice,
        FileKind::BlockDevice => FileType::BlockDevice,
        FileKind::Fifo => FileType::NamedPipe,
        FileKind::Socket => FileType::Socket,
    }
}

fn system_time(time: Timestamp) -> SystemTime {
    let fraction = Duration::from_nanos(u64::from(time.nsec));
    let whole = Duration::from_secs(time.sec.unsigned_abs());
    let time = if time.sec >= 0 {
        UNIX_EPOCH.checked_add(whole)
    } else {
        UNIX_EPOCH.checked_sub(whole)
    };
    time.and_then(|time| time.checked_add(fraction))
        .unwrap_or(UNIX_EPOCH)
}

/// A time out of a request, from the `SystemTime` that fuser 0.18 makes of it.
///
/// Of seconds before 1970 and nanoseconds, fuser subtracts both from the epoch, although the
/// nanoseconds count forward: -1.8 s, which is (-2 s, 200 ms), arrives as -2.2 s. Nothing is lost
/// by that, so it is turned back here exactly. To be looked at when fuser is upgraded; a test
/// through a real mount watches it.
pub fn timestamp(time: SystemTime) -> Timestamp {
    match time.duration_since(UNIX_EPOCH) {
        Ok(after) => Timestamp {
            sec: i64::try_from(after.as_secs()).unwrap_or(i64::MAX),
            nsec: after.subsec_nanos(),
        },
        Err(before) => {
            let before = before.duration();
            Timestamp {
                sec: i64::try_from(before.as_secs()).map_or(i64::MIN, |sec| -sec),
                nsec: before.subsec_nanos(),
            }
        }
    }
}

/// A time to set.
pub fn set_time(time: TimeOrNow) -> SetTime {
    match time {
        TimeOrNow::Now => SetTime::Now,
        TimeOrNow::SpecificTime(time) => SetTime::At(timestamp(time)),
    }
}

/// A device number in the 32 bits that FUSE has for it (the kernel's `new_encode_dev`).
pub fn encode_dev(dev: u64) -> u32 {
    let (major, minor) = (major(dev), minor(dev));
    let encoded = (minor & 0xff) | (major << 8) | ((minor & !0xff) << 12);
    encoded as u32
}

/// The host's device number out of FUSE's.
pub fn decode_dev(dev: u32) -> u64 {
    let (major, minor) = (
        (dev & 0xf_ff00) >> 8,
        (dev & 0xff) | ((dev >> 12) & 0xf_ff00),
    );
    makedev(u64::from(major), u64::from(minor))
}

/// The errno to answer. ENOSYS is never one: the kernel takes it as "never ask again" for the whole
/// connection, whatever one file's host file system meant by it.
pub fn errno(errno: i32) -> Errno {
    match errno {
        libc::ENOSYS => Errno::EOPNOTSUPP,
        1.. => Errno::from_i32(errno),
        _ => Errno::EIO,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// What fuser 0.18 makes of the two numbers in a request.
    fn as_fuser(sec: i64, nsec: u32) -> SystemTime {
        if sec >= 0 {
            UNIX_EPOCH + Duration::new(sec.unsigned_abs(), nsec)
        } else {
            UNIX_EPOCH - Duration::new(sec.unsigned_abs(), nsec)
        }
    }

    #[test]
    fn times_before_1970_survive_in_both_directions() {
        for (sec, nsec) in [
            (0, 0),
            (5, 999_999_999),
            (-1, 0),
            (-2, 200_000_000),
            (-1, 1),
        ] {
            let time = Timestamp { sec, nsec };
            assert_eq!(timestamp(as_fuser(sec, nsec)), time);
            let sent = system_time(time);
            let exact = i128::from(sec) * 1_000_000_000 + i128::from(nsec);
            let seen = match sent.duration_since(UNIX_EPOCH) {
                Ok(after) => after.as_nanos() as i128,
                Err(before) => -(before.duration().as_nanos() as i128),
            };
            assert_eq!(seen, exact, "{time:?}");
        }
    }

    #[test]
    fn device_numbers_survive() {
        for (major, minor) in [(0, 0), (1, 3), (8, 255), (8, 256), (4095, 1_048_575)] {
            let dev = makedev(major, minor);
            assert_eq!(decode_dev(encode_dev(dev)), dev, "{major}:{minor}");
        }
    }

    #[test]
    fn a_host_that_lacks_a_call_does_not_switch_it_off_for_good() {
        assert_eq!(errno(libc::ENOSYS), Errno::EOPNOTSUPP);
        assert_eq!(errno(libc::ENOSPC), Errno::ENOSPC);
        assert_eq!(errno(0), Errno::EIO);
    }
}
