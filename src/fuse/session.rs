//! One method for each request of the kernel: translate, call the union, translate the answer.
//!
//! Nothing is decided here but what belongs to the protocol itself: numbers for open files, the
//! protocol of xattr sizes, which answers the kernel may keep. A panic in the union is caught around
//! every request, answered EIO and logged; the mount lives on.

use std::cell::RefCell;
use std::ffi::OsStr;
use std::os::unix::ffi::OsStrExt;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::path::Path;
use std::sync::Arc;
use std::sync::OnceLock;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::SystemTime;

use fuser::{
    AccessFlags, BsdFileFlags, CopyFileRangeFlags, Errno, FileAttr, FileHandle as Fh, Filesystem,
    FopenFlags, Generation, INodeNo, IoctlFlags, KernelConfig, LockOwner, OpenFlags, PollEvents,
    PollFlags, PollNotifier, RenameFlags, ReplyAttr, ReplyCreate, ReplyData, ReplyDirectory,
    ReplyDirectoryPlus, ReplyEmpty, ReplyEntry, ReplyIoctl, ReplyLseek, ReplyOpen, ReplyPoll,
    ReplyStatfs, ReplyWrite, ReplyXattr, Request, TimeOrNow, WriteFlags,
};
use parking_lot::Mutex;

use super::convert::{self, FOREVER};
use super::handles::{HandleTable, STATELESS};
use super::options::SessionOptions;
use super::policy::Policy;
use super::seek::{SeekJob, Seeker};
use super::writers::Writers;
use crate::cow::union::{DirHandle, Error, FileHandle};
use crate::cow::{Caller, Entry, NodeId, RenameMode, SetAttr, SetXattrMode, Union};

/// The longest name that Linux has.
const NAME_MAX: usize = 255;

/// An open file: what the kernel has cached of it stays, and closing it is no news to the server.
const FILE_FLAGS: FopenFlags = FopenFlags::FOPEN_KEEP_CACHE.union(FopenFlags::FOPEN_NOFLUSH);

/// An open directory: the kernel may cache its listing.
const DIR_FLAGS: FopenFlags = FopenFlags::FOPEN_KEEP_CACHE.union(FopenFlags::FOPEN_CACHE_DIR);

/// The union as a FUSE file system.
pub struct UnionFs {
    union: Arc<Union>,
    options: SessionOptions,
    no_acl: bool,
    policy: Arc<OnceLock<Policy>>,
    files: HandleTable<FileHandle>,
    dirs: HandleTable<OpenDir>,
    writers: Writers,
    seeker: Seeker,
}

/// An open directory: its listing, taken again when the reader rewinds.
struct OpenDir {
    listing: Mutex<Arc<DirHandle>>,
    read: AtomicBool,
}

thread_local! {
    /// Where READ puts its data before it is sent: one buffer a thread, as large as the largest read so far.
    static READ_BUFFER: RefCell<Vec<u8>> = const { RefCell::new(Vec::new()) };
}

fn node(ino: INodeNo) -> NodeId {
    NodeId(ino.0)
}

/// The errno of a failed operation; what is the host's fault rather than the caller's is logged.
fn errno(error: &Error) -> Errno {
    if matches!(
        error.errno,
        libc::EIO | libc::ENOSYS | libc::EUCLEAN | libc::ESTALE
    ) {
        tracing::warn!(%error, "an operation failed");
    } else {
        tracing::debug!(%error, "an operation failed");
    }
    convert::errno(error.errno)
}

/// Runs a handler; a panic in it drops the reply, which fuser then answers with EIO.
pub(super) fn guarded(operation: &'static str, handler: impl FnOnce()) {
    if catch_unwind(AssertUnwindSafe(handler)).is_err() {
        tracing::error!(
            operation,
            "a request failed by a defect in plyfs and was answered EIO"
        );
    }
}

fn answer_entry(reply: ReplyEntry, result: Result<Entry, Error>) {
    match result {
        Ok(entry) => reply.entry(
            &FOREVER,
            &convert::file_attr(&entry.attr),
            Generation(entry.generation),
        ),
        Err(error) => reply.error(errno(&error)),
    }
}

fn answer_empty(reply: ReplyEmpty, result: Result<(), Error>) {
    match result {
        Ok(()) => reply.ok(),
        Err(error) => reply.error(errno(&error)),
    }
}

fn answer_attr(reply: ReplyAttr, result: Result<crate::cow::Attr, Error>) {
    match result {
        Ok(attr) => reply.attr(&FOREVER, &convert::file_attr(&attr)),
        Err(error) => reply.error(errno(&error)),
    }
}

fn answer_xattr(reply: ReplyXattr, size: u32, value: Result<Vec<u8>, Error>) {
    match value {
        Err(error) => reply.error(errno(&error)),
        Ok(value) => match u32::try_from(value.len()) {
            Err(_) => reply.error(Errno::E2BIG),
            Ok(length) if size == 0 => reply.size(length),
            Ok(length) if length > size => reply.error(Errno::ERANGE),
            Ok(_) => reply.data(&value),
        },
    }
}

impl UnionFs {
    /// `policy` is filled in when the kernel's INIT is answered.
    pub fn new(
        union: Arc<Union>,
        options: SessionOptions,
        no_acl: bool,
        policy: Arc<OnceLock<Policy>>,
        seeker: Seeker,
    ) -> Self {
        Self {
            union,
            options,
            no_acl,
            policy,
            files: HandleTable::default(),
            dirs: HandleTable::default(),
            writers: Writers::default(),
            seeker,
        }
    }

    fn policy(&self) -> Policy {
        self.policy.get().copied().unwrap_or(Policy::PLAIN)
    }

    fn caller(&self, request: &Request, umask: u32) -> Caller {
        Caller {
            uid: request.uid(),
            gid: request.gid(),
            // Otherwise the kernel has applied it already.
            umask: if self.policy().dont_mask { umask } else { 0 },
        }
    }

    /// The listing to go on with: a new one when the reader starts over, so that rewinddir shows what changed.
    fn listing(&self, ino: INodeNo, fh: Fh, offset: u64) -> Result<Arc<DirHandle>, Error> {
        let Some(dir) = self.dirs.get(fh.0) else {
            return self.union.open_dir(node(ino));
        };
        let mut listing = dir.listing.lock();
        if dir.read.swap(true, Ordering::Relaxed) && offset == 0 {
            *listing = self.union.open_dir(node(ino))?;
        }
        Ok(listing.clone())
    }
}

impl Filesystem for UnionFs {
    fn init(&mut self, _request: &Request, config: &mut KernelConfig) -> std::io::Result<()> {
        let policy = Policy::negotiate(config, &self.options, self.no_acl);
        tracing::debug!(abi = %config.kernel_abi(), ?policy, "the kernel's INIT is answered");
        // It can be set already only if the kernel said INIT twice, and then with the same outcome.
        let _ = self.policy.set(policy);
        Ok(())
    }

    fn lookup(&self, _request: &Request, parent: INodeNo, name: &OsStr, reply: ReplyEntry) {
        guarded("lookup", || {
            if name.len() > NAME_MAX {
                return reply.error(Errno::ENAMETOOLONG);
            }
            match self.union.lookup(node(parent), name) {
                Err(error) if error.errno == libc::ENOENT => {
                    reply.entry(&FOREVER, &convert::negative_entry(), Generation(0));
                }
                result => answer_entry(reply, result),
            }
        });
    }

    fn forget(&self, _request: &Request, ino: INodeNo, lookups: u64) {
        guarded("forget", || self.union.forget(node(ino), lookups));
    }

    fn getattr(&self, _request: &Request, ino: INodeNo, fh: Option<Fh>, reply: ReplyAttr) {
        guarded("getattr", || {
            let handle = fh.and_then(|fh| self.files.get(fh.0));
            answer_attr(reply, self.union.getattr(node(ino), handle.as_deref()));
        });
    }

    fn setattr(
        &self,
        request: &Request,
        ino: INodeNo,
        mode: Option<u32>,
        uid: Option<u32>,
        gid: Option<u32>,
        size: Option<u64>,
        atime: Option<TimeOrNow>,
        mtime: Option<TimeOrNow>,
        _ctime: Option<SystemTime>,
        fh: Option<Fh>,
        _crtime: Option<SystemTime>,
        _chgtime: Option<SystemTime>,
        _bkuptime: Option<SystemTime>,
        _flags: Option<BsdFileFlags>,
        reply: ReplyAttr,
    ) {
        guarded("setattr", || {
            let set = SetAttr {
                perm: mode.map(|mode| (mode & 0o7777) as u16),
                uid,
                gid,
                size,
                atime: atime.map(convert::set_time),
                mtime: mtime.map(convert::set_time),
            };
            let handle = fh.and_then(|fh| self.files.get(fh.0));
            let caller = self.caller(request, 0);
            let result = self
                .union
                .setattr(node(ino), handle.as_deref(), &set, &caller);
            answer_attr(reply, result);
        });
    }

    fn readlink(&self, _request: &Request, ino: INodeNo, reply: ReplyData) {
        guarded("readlink", || match self.union.readlink(node(ino)) {
            Ok(target) => reply.data(target.as_bytes()),
            Err(error) => reply.error(errno(&error)),
        });
    }

    fn mknod(
        &self,
        request: &Request,
        parent: INodeNo,
        name: &OsStr,
        mode: u32,
        umask: u32,
        rdev: u32,
        reply: ReplyEntry,
    ) {
        guarded("mknod", || {
            let (caller, rdev) = (self.caller(request, umask), convert::decode_dev(rdev));
            let result = self.union.mknod(node(parent), name, mode, rdev, &caller);
            answer_entry(reply, result);
        });
    }

    fn mkdir(
        &self,
        request: &Request,
        parent: INodeNo,
        name: &OsStr,
        mode: u32,
        umask: u32,
        reply: ReplyEntry,
    ) {
        guarded("mkdir", || {
            let caller = self.caller(request, umask);
            answer_entry(reply, self.union.mkdir(node(parent), name, mode, &caller));
        });
    }

    fn unlink(&self, _request: &Request, parent: INodeNo, name: &OsStr, reply: ReplyEmpty) {
        guarded("unlink", || {
            answer_empty(reply, self.union.unlink(node(parent), name));
        });
    }

    fn rmdir(&self, _request: &Request, parent: INodeNo, name: &OsStr, reply: ReplyEmpty) {
        guarded("rmdir", || {
            answer_empty(reply, self.union.rmdir(node(parent), name));
        });
    }

    fn symlink(
        &self,
        request: &Request,
        parent: INodeNo,
        name: &OsStr,
        target: &Path,
        reply: ReplyEntry,
    ) {
        guarded("symlink", || {
            let caller = self.caller(request, 0);
            let result = self
                .union
                .symlink(node(parent), name, target.as_os_str(), &caller);
            answer_entry(reply, result);
        });
    }

    fn rename(
        &self,
        _request: &Request,
        parent: INodeNo,
        name: &OsStr,
        new_parent: INodeNo,
        new_name: &OsStr,
        flags: RenameFlags,
        reply: ReplyEmpty,
    ) {
        guarded("rename", || {
            let mode = match flags {
                RenameFlags::RENAME_NOREPLACE => RenameMode::NoReplace,
                RenameFlags::RENAME_EXCHANGE => RenameMode::Exchange,
                flags if flags.is_empty() => RenameMode::Replace,
                // RENAME_WHITEOUT among them: a whiteout is the union's own mark.
                _ => return reply.error(Errno::EINVAL),
            };
            let result = self
                .union
                .rename(node(parent), name, node(new_parent), new_name, mode);
            answer_empty(reply, result);
        });
    }

    fn link(
        &self,
        _request: &Request,
        ino: INodeNo,
        new_parent: INodeNo,
        new_name: &OsStr,
        reply: ReplyEntry,
    ) {
        guarded("link", || {
            let result = self.union.link(node(ino), node(new_parent), new_name);
            answer_entry(reply, result);
        });
    }

    fn open(&self, request: &Request, ino: INodeNo, flags: OpenFlags, reply: ReplyOpen) {
        guarded("open", || {
            if self.policy().no_open {
                // The one intended ENOSYS beside FLUSH: the kernel then opens every file by itself.
                return reply.error(Errno::ENOSYS);
            }
            let caller = self.caller(request, 0);
            match self.union.open_file(node(ino), flags.0, &caller) {
                Ok(handle) => {
                    self.writers.opened(node(ino), flags.0);
                    reply.opened(Fh(self.files.insert(handle)), FILE_FLAGS);
                }
                Err(error) => reply.error(errno(&error)),
            }
        });
    }

    fn create(
        &self,
        request: &Request,
        parent: INodeNo,
        name: &OsStr,
        mode: u32,
        umask: u32,
        flags: i32,
        reply: ReplyCreate,
    ) {
        guarded("create", || {
            let caller = self.caller(request, umask);
            match self.union.create(node(parent), name, mode, flags, &caller) {
                Ok((entry, handle)) => {
                    let fh = if self.policy().no_open {
                        self.union.release(entry.node, handle);
                        STATELESS
                    } else {
                        self.writers.opened(entry.node, flags);
                        self.files.insert(handle)
                    };
                    reply.created(
                        &FOREVER,
                        &convert::file_attr(&entry.attr),
                        Generation(entry.generation),
                        Fh(fh),
                        FILE_FLAGS,
                    );
                }
                Err(error) => reply.error(errno(&error)),
            }
        });
    }

    fn read(
        &self,
        _request: &Request,
        ino: INodeNo,
        fh: Fh,
        offset: u64,
        size: u32,
        _flags: OpenFlags,
        _lock_owner: Option<LockOwner>,
        reply: ReplyData,
    ) {
        guarded("read", || {
            let handle = self.files.get(fh.0);
            READ_BUFFER.with_borrow_mut(|buffer| {
                let size = size as usize;
                if buffer.len() < size {
                    buffer.resize(size, 0);
                }
                let into = &mut buffer[..size];
                match self.union.read(node(ino), handle.as_deref(), offset, into) {
                    Ok(length) => reply.data(&buffer[..length]),
                    Err(error) => reply.error(errno(&error)),
                }
            });
        });
    }

    fn write(
        &self,
        _request: &Request,
        ino: INodeNo,
        fh: Fh,
        offset: u64,
        data: &[u8],
        write_flags: WriteFlags,
        _flags: OpenFlags,
        _lock_owner: Option<LockOwner>,
        reply: ReplyWrite,
    ) {
        guarded("write", || {
            let handle = self.files.get(fh.0);
            let kill = write_flags.contains(WriteFlags::FUSE_WRITE_KILL_SUIDGID);
            match self
                .union
                .write(node(ino), handle.as_deref(), offset, data, kill)
            {
                // It cannot be more than `data` is long, which came as 32 bits.
                Ok(length) => reply.written(length as u32),
                Err(error) => reply.error(errno(&error)),
            }
        });
    }

    fn flush(
        &self,
        _request: &Request,
        _ino: INodeNo,
        _fh: Fh,
        _lock_owner: LockOwner,
        reply: ReplyEmpty,
    ) {
        // Nothing is held back at close, so an old kernel that does not know FOPEN_NOFLUSH need not
        // ask a second time; it still writes its own dirty pages first.
        reply.error(Errno::ENOSYS);
    }

    fn release(
        &self,
        _request: &Request,
        ino: INodeNo,
        fh: Fh,
        flags: OpenFlags,
        _lock_owner: Option<LockOwner>,
        _flush: bool,
        reply: ReplyEmpty,
    ) {
        guarded("release", || {
            if let Some(handle) = self.files.remove(fh.0) {
                self.writers.released(node(ino), flags.0);
                self.union.release(node(ino), handle);
            }
            reply.ok();
        });
    }

    fn fsync(&self, _request: &Request, ino: INodeNo, fh: Fh, datasync: bool, reply: ReplyEmpty) {
        guarded("fsync", || {
            let handle = self.files.get(fh.0);
            let result = self.union.fsync(node(ino), handle.as_deref(), datasync);
            answer_empty(reply, result);
        });
    }

    fn opendir(&self, _request: &Request, ino: INodeNo, _flags: OpenFlags, reply: ReplyOpen) {
        guarded("opendir", || match self.union.open_dir(node(ino)) {
            Ok(listing) => {
                let fh = self.dirs.insert(Arc::new(OpenDir {
                    listing: Mutex::new(listing),
                    read: AtomicBool::new(false),
                }));
                reply.opened(Fh(fh), DIR_FLAGS);
            }
            Err(error) => reply.error(errno(&error)),
        });
    }

    fn readdir(
        &self,
        _request: &Request,
        ino: INodeNo,
        fh: Fh,
        offset: u64,
        mut reply: ReplyDirectory,
    ) {
        guarded("readdir", || {
            let result = self.listing(ino, fh, offset).and_then(|listing| {
                self.union
                    .read_dir(node(ino), &listing, offset, &mut |entry| {
                        let kind = convert::file_type(entry.kind);
                        !reply.add(INodeNo(entry.ino), entry.next_offset, kind, entry.name)
                    })
            });
            match result {
                Ok(()) => reply.ok(),
                Err(error) => reply.error(errno(&error)),
            }
        });
    }

    fn readdirplus(
        &self,
        _request: &Request,
        ino: INodeNo,
        fh: Fh,
        offset: u64,
        mut reply: ReplyDirectoryPlus,
    ) {
        guarded("readdirplus", || {
            let result = self.listing(ino, fh, offset).and_then(|listing| {
                let mut add = |entry: crate::cow::DirEntry, found: Option<Entry>| {
                    let (attr, generation) = match found {
                        Some(found) => (convert::file_attr(&found.attr), found.generation),
                        // The kernel makes no node of `.` and `..`, whatever their numbers say.
                        None if entry.name == "." || entry.name == ".." => (
                            FileAttr {
                                ino: INodeNo(entry.ino),
                                kind: convert::file_type(entry.kind),
                                ..convert::negative_entry()
                            },
                            0,
                        ),
                        // Deleted since the listing was taken.
                        None => return true,
                    };
                    !reply.add(
                        attr.ino,
                        entry.next_offset,
                        &entry.name,
                        &FOREVER,
                        &attr,
                        Generation(generation),
                    )
                };
                self.union
                    .read_dir_plus(node(ino), &listing, offset, &mut add)
            });
            match result {
                Ok(()) => reply.ok(),
                Err(error) => reply.error(errno(&error)),
            }
        });
    }

    fn releasedir(
        &self,
        _request: &Request,
        _ino: INodeNo,
        fh: Fh,
        _flags: OpenFlags,
        reply: ReplyEmpty,
    ) {
        guarded("releasedir", || {
            self.dirs.remove(fh.0);
            reply.ok();
        });
    }

    fn fsyncdir(
        &self,
        _request: &Request,
        ino: INodeNo,
        _fh: Fh,
        datasync: bool,
        reply: ReplyEmpty,
    ) {
        guarded("fsyncdir", || {
            answer_empty(reply, self.union.fsync_dir(node(ino), datasync));
        });
    }

    fn statfs(&self, _request: &Request, _ino: INodeNo, reply: ReplyStatfs) {
        guarded("statfs", || match self.union.statfs() {
            Ok(s) => reply.statfs(
                s.blocks, s.bfree, s.bavail, s.files, s.ffree, s.bsize, s.namelen, s.frsize,
            ),
            Err(error) => reply.error(errno(&error)),
        });
    }

    fn setxattr(
        &self,
        _request: &Request,
        ino: INodeNo,
        name: &OsStr,
        value: &[u8],
        flags: i32,
        _position: u32,
        reply: ReplyEmpty,
    ) {
        guarded("setxattr", || {
            let mode = match flags {
                0 => SetXattrMode::Any,
                libc::XATTR_CREATE => SetXattrMode::Create,
                libc::XATTR_REPLACE => SetXattrMode::Replace,
                _ => return reply.error(Errno::EINVAL),
            };
            answer_empty(reply, self.union.setxattr(node(ino), name, value, mode));
        });
    }

    fn getxattr(
        &self,
        _request: &Request,
        ino: INodeNo,
        name: &OsStr,
        size: u32,
        reply: ReplyXattr,
    ) {
        guarded("getxattr", || {
            answer_xattr(reply, size, self.union.getxattr(node(ino), name));
        });
    }

    fn listxattr(&self, _request: &Request, ino: INodeNo, size: u32, reply: ReplyXattr) {
        guarded("listxattr", || {
            let list = self.union.listxattr(node(ino)).map(|names| {
                let mut list = Vec::new();
                for name in names {
                    list.extend_from_slice(name.as_bytes());
                    list.push(0);
                }
                list
            });
            answer_xattr(reply, size, list);
        });
    }

    fn removexattr(&self, _request: &Request, ino: INodeNo, name: &OsStr, reply: ReplyEmpty) {
        guarded("removexattr", || {
            answer_empty(reply, self.union.removexattr(node(ino), name));
        });
    }

    fn access(&self, _request: &Request, _ino: INodeNo, _mask: AccessFlags, reply: ReplyEmpty) {
        // With `default_permissions` the kernel answers access(2) itself.
        reply.ok();
    }

    fn ioctl(
        &self,
        _request: &Request,
        _ino: INodeNo,
        _fh: Fh,
        _flags: IoctlFlags,
        _command: u32,
        _data: &[u8],
        _out_size: u32,
        reply: ReplyIoctl,
    ) {
        reply.error(Errno::ENOTTY);
    }

    fn poll(
        &self,
        _request: &Request,
        _ino: INodeNo,
        _fh: Fh,
        _notifier: PollNotifier,
        _events: PollEvents,
        _flags: PollFlags,
        reply: ReplyPoll,
    ) {
        // Files here are always ready: the kernel need not ask again.
        reply.error(Errno::ENOSYS);
    }

    fn fallocate(
        &self,
        request: &Request,
        ino: INodeNo,
        fh: Fh,
        offset: u64,
        length: u64,
        mode: i32,
        reply: ReplyEmpty,
    ) {
        guarded("fallocate", || {
            let (handle, caller) = (self.files.get(fh.0), self.caller(request, 0));
            let result =
                self.union
                    .fallocate(node(ino), handle.as_deref(), mode, offset, length, &caller);
            answer_empty(reply, result);
        });
    }

    fn lseek(
        &self,
        _request: &Request,
        ino: INodeNo,
        fh: Fh,
        offset: i64,
        whence: i32,
        reply: ReplyLseek,
    ) {
        guarded("lseek", || {
            let job = SeekJob {
                node: node(ino),
                handle: self.files.get(fh.0),
                offset,
                whence,
                reply,
            };
            let dirty = self.policy().no_open || self.writers.contains(node(ino));
            self.seeker.seek(&self.union, job, dirty);
        });
    }

    fn copy_file_range(
        &self,
        request: &Request,
        ino_in: INodeNo,
        fh_in: Fh,
        offset_in: u64,
        ino_out: INodeNo,
        fh_out: Fh,
        offset_out: u64,
        len: u64,
        _flags: CopyFileRangeFlags,
        reply: ReplyWrite,
    ) {
        guarded("copy_file_range", || {
            let (from, to) = (self.files.get(fh_in.0), self.files.get(fh_out.0));
            let caller = self.caller(request, 0);
            // The answer has 32 bits; a caller that gets less goes on by itself.
            let len = len.min(1 << 30);
            let result = self.union.copy_file_range(
                node(ino_in),
                from.as_deref(),
                offset_in,
                node(ino_out),
                to.as_deref(),
                offset_out,
                len,
                &caller,
            );
            match result {
                Ok(copied) => reply.written(copied as u32),
                Err(error) => reply.error(errno(&error)),
            }
        });
    }
}
