//! File handles (`name_to_handle_at(2)`) and the identity of file systems.

use std::os::fd::{AsRawFd, BorrowedFd, FromRawFd, OwnedFd};

use super::fs::{Errno, Object, with_c_str};
use std::os::unix::ffi::OsStrExt;

/// Largest handle of any file system (`MAX_HANDLE_SZ`).
const MAX_BYTES: usize = 128;

#[repr(C)]
struct RawHandle {
    bytes: u32,
    kind: i32,
    data: [u8; MAX_BYTES],
}

/// What names an inode of a file system as long as it exists.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct Handle {
    /// The file system's own type of handle.
    pub kind: i32,
    /// The handle.
    pub data: Vec<u8>,
}

impl Handle {
    /// 32 bits of it. Of two inodes that had one number one after the other they differ wherever the
    /// file system keeps 32 bits of generation.
    pub fn fold(&self) -> u32 {
        self.data.chunks(4).fold(0, |folded, bytes| {
            let mut word = [0; 4];
            word[..bytes.len()].copy_from_slice(bytes);
            folded ^ u32::from_ne_bytes(word)
        })
    }
}

/// The handle of an object; EOPNOTSUPP where its file system has none.
pub fn of(object: Object<'_>) -> Result<Handle, Errno> {
    let mut raw = RawHandle {
        bytes: MAX_BYTES as u32,
        kind: 0,
        data: [0; MAX_BYTES],
    };
    let mut mount_id: libc::c_int = 0;
    let mut call = |dir: i32, name: &std::ffi::CStr, flags: i32| {
        // SAFETY: `name` is a C string; `raw` says how many bytes it has room for.
        Errno::result(unsafe {
            libc::syscall(
                libc::SYS_name_to_handle_at,
                dir,
                name.as_ptr(),
                &raw mut raw,
                &raw mut mount_id,
                flags,
            )
        })
    };
    match object {
        Object::Open(fd) | Object::Path(fd) => call(fd.as_raw_fd(), c"", libc::AT_EMPTY_PATH)?,
        Object::Entry(dir, name) => {
            with_c_str(name.as_bytes(), |name| call(dir.as_raw_fd(), name, 0))?
        }
    };
    let len = (raw.bytes as usize).min(MAX_BYTES);
    Ok(Handle {
        kind: raw.kind,
        data: raw.data[..len].to_vec(),
    })
}

/// Opens what a handle names, as an `O_PATH` descriptor; `on` lies on its file system. Needs
/// CAP_DAC_READ_SEARCH; ESTALE when it is gone.
pub fn open(on: BorrowedFd<'_>, handle: &Handle) -> Result<OwnedFd, Errno> {
    if handle.data.len() > MAX_BYTES {
        return Err(Errno::EINVAL);
    }
    let mut raw = RawHandle {
        bytes: handle.data.len() as u32,
        kind: handle.kind,
        data: [0; MAX_BYTES],
    };
    raw.data[..handle.data.len()].copy_from_slice(&handle.data);
    // SAFETY: `raw` is a complete handle of the length it says.
    let fd = Errno::result(unsafe {
        libc::syscall(
            libc::SYS_open_by_handle_at,
            on.as_raw_fd(),
            &raw mut raw,
            libc::O_PATH | libc::O_CLOEXEC,
        )
    })?;
    // SAFETY: the kernel has just given us this descriptor.
    Ok(unsafe { OwnedFd::from_raw_fd(fd as i32) })
}

/// The file system's UUID (`FS_IOC_GETFSUUID`, Linux 6.9), all zero where it is not to be had.
pub fn fs_uuid(fd: BorrowedFd<'_>) -> [u8; 16] {
    #[repr(C)]
    struct FsUuid2 {
        len: u8,
        uuid: [u8; 16],
    }
    /// `_IOR(0x15, 0, struct fsuuid2)`.
    const FS_IOC_GETFSUUID: libc::c_ulong = 0x8011_1500;
    let mut answer = FsUuid2 {
        len: 0,
        uuid: [0; 16],
    };
    // SAFETY: the request fills the structure whose size it carries.
    let result = unsafe { libc::ioctl(fd.as_raw_fd(), FS_IOC_GETFSUUID, &raw mut answer) };
    if result == 0 && answer.len == 16 {
        answer.uuid
    } else {
        [0; 16]
    }
}
