//! One method for each request of the kernel: translate, call the union, translate the answer.
//!
//! Nothing is decided here but what belongs to the protocol itself: numbers for open files, the
//! protocol of xattr sizes, which answers the kernel may keep. A panic in the union is caught around
//! every request, answered EIO and logged; the mount lives on.
//!
//! What takes more than a call lies in `names`, `attributes`, `files`, `data` and `directories`.

mod answer;
mod attributes;
mod data;
mod directories;
mod files;
mod names;

use std::ffi::OsStr;
use std::os::unix::ffi::OsStrExt;
use std::path::Path;
use std::sync::Arc;
use std::sync::OnceLock;
use std::sync::atomic::AtomicU64;
use std::time::SystemTime;

use fuser::{
    AccessFlags, BackingId, BsdFileFlags, CopyFileRangeFlags, Errno, FileHandle as Fh, Filesystem,
    INodeNo, IoctlFlags, KernelConfig, LockOwner, OpenFlags, PollEvents, PollFlags, PollNotifier,
    RenameFlags, ReplyAttr, ReplyCreate, ReplyData, ReplyDirectory, ReplyDirectoryPlus, ReplyEmpty,
    ReplyEntry, ReplyIoctl, ReplyLseek, ReplyOpen, ReplyPoll, ReplyStatfs, ReplyWrite, ReplyXattr,
    Request, TimeOrNow, WriteFlags,
};

use self::answer::Seen;
pub(super) use self::answer::guarded;
use self::data::Place;
use self::directories::OpenDir;
use self::files::Files;
use super::claims::Claims;
use super::convert;
use super::features::Feature;
use super::handles::HandleTable;
use super::long::Long;
use super::options::SessionOptions;
use super::passing::{Passing, Was};
use super::policy::Policy;
use super::seek::Seeker;
use crate::cow::{Caller, NodeId, SetAttr, Union};

/// Threads that do what no thread that answers requests may wait for.
pub struct Helpers {
    /// Answers LSEEK.
    pub seeker: Seeker,
    /// Does long work.
    pub long: Long,
    /// Takes files from readers without requests.
    pub claims: Claims,
    /// Counts the pages, some at a time, that the kernel has sent from its cache.
    pub pages_sent: Arc<AtomicU64>,
}

/// The union as a FUSE file system.
pub struct UnionFs {
    union: Arc<Union>,
    options: SessionOptions,
    no_acl: bool,
    policy: Arc<OnceLock<Policy>>,
    files: Arc<Files>,
    dirs: HandleTable<OpenDir>,
    passing: Arc<Passing<BackingId>>,
    seen: Seen,
    helpers: Helpers,
}

impl UnionFs {
    /// `policy` is filled in when the kernel's INIT is answered.
    pub fn new(
        union: Arc<Union>,
        options: SessionOptions,
        no_acl: bool,
        policy: Arc<OnceLock<Policy>>,
        passing: Arc<Passing<BackingId>>,
        helpers: Helpers,
    ) -> Self {
        let files = Files::new(union.clone(), policy.clone(), passing.clone());
        Self {
            union,
            options,
            no_acl,
            policy,
            files: Arc::new(files),
            dirs: HandleTable::default(),
            seen: Seen(passing.clone()),
            passing,
            helpers,
        }
    }

    /// The node that the kernel means.
    fn node(&self, ino: INodeNo) -> NodeId {
        self.passing.node(NodeId(ino.0))
    }

    /// What a file was, if this is a number that only those know who had it open then.
    fn replaced(&self, ino: INodeNo) -> Option<Was> {
        let second = self.passing.second(NodeId(ino.0))?;
        Some(second.was)
    }

    fn policy(&self) -> Policy {
        self.policy.get().copied().unwrap_or(Policy::PLAIN)
    }

    fn caller(&self, request: &Request, umask: u32) -> Caller {
        Caller {
            uid: request.uid(),
            gid: request.gid(),
            pid: request.pid(),
            // Otherwise the kernel has applied it already.
            umask: if self.policy().dont_mask { umask } else { 0 },
        }
    }
}

impl Filesystem for UnionFs {
    fn init(&mut self, _request: &Request, config: &mut KernelConfig) -> std::io::Result<()> {
        let policy = Policy::negotiate(config, &self.options, self.no_acl);
        if !policy.uses(Feature::PosixAcl) {
            self.union.refuse_acls();
        }
        tracing::debug!(abi = %config.kernel_abi(), ?policy, "the kernel's INIT is answered");
        // It can be set already only if the kernel said INIT twice, and then with the same outcome.
        let _ = self.policy.set(policy);
        Ok(())
    }

    fn lookup(&self, _request: &Request, parent: INodeNo, name: &OsStr, reply: ReplyEntry) {
        guarded("lookup", || self.look_up(parent, name, reply));
    }

    fn forget(&self, _request: &Request, ino: INodeNo, lookups: u64) {
        guarded("forget", || {
            let node = self.node(ino);
            self.union.forget(node, lookups);
            self.passing.forgotten(node, || self.union.knows(node));
        });
    }

    fn getattr(&self, _request: &Request, ino: INodeNo, fh: Option<Fh>, reply: ReplyAttr) {
        guarded("getattr", || self.attributes(ino, fh, reply));
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
        let set = SetAttr {
            perm: mode.map(|mode| (mode & 0o7777) as u16),
            uid,
            gid,
            size,
            atime: atime.map(convert::set_time),
            mtime: mtime.map(convert::set_time),
        };
        guarded("setattr", || {
            self.set_attributes(&self.caller(request, 0), ino, fh, set, reply);
        });
    }

    fn readlink(&self, _request: &Request, ino: INodeNo, reply: ReplyData) {
        guarded("readlink", || match self.union.readlink(self.node(ino)) {
            Ok(target) => reply.data(target.as_bytes()),
            Err(error) => reply.error(answer::errno(&error)),
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
            let result = self
                .union
                .mknod(self.node(parent), name, mode, rdev, &caller);
            self.seen.entry(reply, result);
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
            self.seen.entry(
                reply,
                self.union.mkdir(self.node(parent), name, mode, &caller),
            );
        });
    }

    fn unlink(&self, _request: &Request, parent: INodeNo, name: &OsStr, reply: ReplyEmpty) {
        guarded("unlink", || {
            answer::empty(reply, self.union.unlink(self.node(parent), name));
        });
    }

    fn rmdir(&self, _request: &Request, parent: INodeNo, name: &OsStr, reply: ReplyEmpty) {
        guarded("rmdir", || {
            answer::empty(reply, self.union.rmdir(self.node(parent), name));
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
                .symlink(self.node(parent), name, target.as_os_str(), &caller);
            self.seen.entry(reply, result);
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
        let (from, to) = ((self.node(parent), name), (self.node(new_parent), new_name));
        guarded("rename", || self.rename_entry(from, to, flags, reply));
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
            let result = self
                .union
                .link(self.node(ino), self.node(new_parent), new_name);
            self.seen.entry(reply, result);
        });
    }

    fn open(&self, request: &Request, ino: INodeNo, flags: OpenFlags, reply: ReplyOpen) {
        guarded("open", || {
            self.open_node(&self.caller(request, 0), ino, flags.0, reply);
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
            self.create_file(&caller, self.node(parent), name, mode, flags, reply);
        });
    }

    fn read(
        &self,
        _request: &Request,
        ino: INodeNo,
        fh: Fh,
        offset: u64,
        size: u32,
        flags: OpenFlags,
        _lock_owner: Option<LockOwner>,
        reply: ReplyData,
    ) {
        let place = Place {
            node: self.node(ino),
            fh,
            offset,
        };
        guarded("read", || self.read_at(&place, size, flags.0, reply));
    }

    fn write(
        &self,
        request: &Request,
        ino: INodeNo,
        fh: Fh,
        offset: u64,
        data: &[u8],
        write_flags: WriteFlags,
        _flags: OpenFlags,
        _lock_owner: Option<LockOwner>,
        reply: ReplyWrite,
    ) {
        let place = Place {
            node: self.node(ino),
            fh,
            offset,
        };
        guarded("write", || {
            let caller = self.caller(request, 0);
            self.write_at(&place, data, write_flags, &caller, reply);
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
        guarded("release", || self.close(ino, fh, flags.0, reply));
    }

    fn fsync(&self, _request: &Request, ino: INodeNo, fh: Fh, datasync: bool, reply: ReplyEmpty) {
        guarded("fsync", || {
            let handle = self.files.get(fh);
            let (union, node) = (self.union.clone(), self.node(ino));
            let writeback = self.policy().writeback;
            self.helpers.long.run("fsync", move || {
                let result = union.fsync(node, handle.as_deref(), datasync);
                if writeback {
                    // As after a write, and before the answer: whoever waits for it has the file open.
                    union.tell(node);
                }
                answer::empty(reply, result);
            });
        });
    }

    fn opendir(&self, _request: &Request, ino: INodeNo, _flags: OpenFlags, reply: ReplyOpen) {
        guarded("opendir", || self.open_directory(self.node(ino), reply));
    }

    fn readdir(
        &self,
        _request: &Request,
        ino: INodeNo,
        fh: Fh,
        offset: u64,
        reply: ReplyDirectory,
    ) {
        guarded("readdir", || self.list(self.node(ino), fh, offset, reply));
    }

    fn readdirplus(
        &self,
        _request: &Request,
        ino: INodeNo,
        fh: Fh,
        offset: u64,
        reply: ReplyDirectoryPlus,
    ) {
        guarded("readdirplus", || {
            self.list_plus(self.node(ino), fh, offset, reply)
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
            let (union, node) = (self.union.clone(), self.node(ino));
            self.helpers.long.run("fsyncdir", move || {
                answer::empty(reply, union.fsync_dir(node, datasync));
            });
        });
    }

    fn statfs(&self, _request: &Request, _ino: INodeNo, reply: ReplyStatfs) {
        guarded("statfs", || match self.union.statfs() {
            Ok(s) => reply.statfs(
                s.blocks, s.bfree, s.bavail, s.files, s.ffree, s.bsize, s.namelen, s.frsize,
            ),
            Err(error) => reply.error(answer::errno(&error)),
        });
    }

    fn setxattr(
        &self,
        request: &Request,
        ino: INodeNo,
        name: &OsStr,
        value: &[u8],
        flags: i32,
        _position: u32,
        reply: ReplyEmpty,
    ) {
        guarded("setxattr", || {
            let caller = self.caller(request, 0);
            self.set_xattr(&caller, self.node(ino), name, value, flags, reply);
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
            answer::xattr(reply, size, self.union.getxattr(self.node(ino), name));
        });
    }

    fn listxattr(&self, request: &Request, ino: INodeNo, size: u32, reply: ReplyXattr) {
        guarded("listxattr", || {
            self.list_xattrs(request.uid(), self.node(ino), size, reply)
        });
    }

    fn removexattr(&self, _request: &Request, ino: INodeNo, name: &OsStr, reply: ReplyEmpty) {
        guarded("removexattr", || {
            answer::empty(reply, self.union.removexattr(self.node(ino), name));
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
        let place = Place {
            node: self.node(ino),
            fh,
            offset,
        };
        guarded("fallocate", || {
            self.allocate(&self.caller(request, 0), &place, length, mode, reply);
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
        guarded("lseek", || self.seek(ino, fh, offset, whence, reply));
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
        let from = Place {
            node: self.node(ino_in),
            fh: fh_in,
            offset: offset_in,
        };
        let to = Place {
            node: self.node(ino_out),
            fh: fh_out,
            offset: offset_out,
        };
        guarded("copy_file_range", || {
            if self.replaced(ino_in).is_some() {
                // Its readers have the data from elsewhere: the kernel copies it by itself.
                return reply.error(Errno::EXDEV);
            }
            self.copy_range(&self.caller(request, 0), &from, &to, len, reply);
        });
    }
}
