//! Opening and closing files.

use std::ffi::OsStr;
use std::io;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, OnceLock};

use fuser::{
    BackingId, Errno, FileHandle as Fh, FopenFlags, Generation, INodeNo, ReplyCreate, ReplyEmpty,
    ReplyOpen,
};

use super::{UnionFs, answer};
use crate::cow::union::{FileHandle, LowerData};
use crate::cow::{Caller, NodeId, Union};
use crate::fuse::claims::Claimed;
use crate::fuse::convert::{self, FOREVER};
use crate::fuse::features::Feature;
use crate::fuse::handles::{HandleTable, STATELESS};
use crate::fuse::opens::{Opens, asks_for_writing};
use crate::fuse::passing::{Joined, Passing};
use crate::fuse::policy::Policy;

/// The open files of a mount.
pub(super) struct Files {
    union: Arc<Union>,
    policy: Arc<OnceLock<Policy>>,
    passing: Arc<Passing<BackingId>>,
    handles: HandleTable<FileHandle>,
    opens: Opens,
    /// A lower file could not be made a backing file, which was said.
    unpassable: AtomicBool,
}

/// A request to open a file.
struct Opening {
    caller: Caller,
    node: NodeId,
    /// By its second number, which is not counted.
    second: bool,
    flags: i32,
    reply: ReplyOpen,
}

/// Whether the kernel may read a file by itself that is opened with these flags. Some file systems refuse O_DIRECT,
/// which would be EIO then.
fn can_be_passed(flags: i32) -> bool {
    !asks_for_writing(flags) && flags & (libc::O_TRUNC | libc::O_DIRECT) == 0
}

impl Files {
    pub(super) fn new(
        union: Arc<Union>,
        policy: Arc<OnceLock<Policy>>,
        passing: Arc<Passing<BackingId>>,
    ) -> Self {
        Self {
            union,
            policy,
            passing,
            handles: HandleTable::default(),
            opens: Opens::default(),
            unpassable: AtomicBool::new(false),
        }
    }

    pub(super) fn get(&self, fh: Fh) -> Option<Arc<FileHandle>> {
        self.handles.get(fh.0)
    }

    /// Whether a file may have dirty pages.
    pub(super) fn are_written(&self, node: NodeId) -> bool {
        self.opens.is_written(node)
    }

    fn policy(&self) -> Policy {
        self.policy.get().copied().unwrap_or(Policy::PLAIN)
    }

    /// Closing it is no news to the server.
    fn flags(&self) -> FopenFlags {
        match self.policy().uses(Feature::NoFlush) {
            true => FopenFlags::FOPEN_NOFLUSH,
            false => FopenFlags::empty(),
        }
    }

    /// What the kernel has cached of a file stays, unless the content is to be compared once more.
    fn served_flags(&self, node: NodeId) -> FopenFlags {
        match self.union.is_verified_at_opens(node) {
            true => self.flags(),
            false => FopenFlags::FOPEN_KEEP_CACHE | self.flags(),
        }
    }

    /// Opens a file that is counted as open already, or that needs no counting.
    fn open(&self, opening: Opening, backing: Option<&BackingId>) {
        let Opening {
            caller,
            node,
            second,
            flags,
            reply,
        } = opening;
        let counted = (!second).then(|| self.passing.counted(node));
        if self.opens.cuts_program(node, flags) {
            drop(counted);
            return reply.error(Errno::ETXTBSY);
        }
        match self.union.open_file(node, flags, &caller) {
            Ok(handle) => {
                if let Some(counted) = counted {
                    counted.stay();
                }
                self.opens.opened(node, flags);
                let fh = Fh(self.handles.insert(handle));
                match backing {
                    Some(backing) => {
                        if flags & libc::O_NOATIME == 0 {
                            // Nobody tells of the reading itself.
                            self.union.is_read(node);
                        }
                        reply.opened_passthrough(fh, self.flags(), backing);
                    }
                    None => reply.opened(fh, self.served_flags(node)),
                }
            }
            Err(error) => {
                drop(counted);
                reply.error(answer::errno(&error));
            }
        }
    }

    /// The backing file for a first reader, if the data still is what it was when `data` was opened.
    fn back(&self, node: NodeId, data: &LowerData, reply: &ReplyOpen) -> Option<BackingId> {
        if !self.union.reads_lower(node) {
            return None;
        }
        match reply.open_backing(data.fd()?) {
            Ok(backing) => Some(backing),
            Err(error) => {
                self.say_unpassable(&error);
                None
            }
        }
    }

    fn say_unpassable(&self, error: &io::Error) {
        if self.unpassable.swap(true, Ordering::Relaxed) {
            return;
        }
        let why = match error.raw_os_error() {
            Some(libc::ELOOP) => "its layer lies on another stacked file system",
            Some(libc::EPERM) => "plyfs may not, without CAP_SYS_ADMIN on the host",
            _ => "the kernel refuses it",
        };
        tracing::warn!(%error, "a file is served by requests, passthrough or not: {why}; others may follow");
    }
}

impl UnionFs {
    pub(super) fn open_node(&self, caller: &Caller, ino: INodeNo, flags: i32, reply: ReplyOpen) {
        let policy = self.policy();
        if policy.no_open {
            // The kernel then opens every file by itself.
            return reply.error(Errno::ENOSYS);
        }
        let node = self.node(ino);
        let opening = Opening {
            caller: *caller,
            node,
            second: node.0 != ino.0,
            flags,
            reply,
        };
        if !policy.passthrough {
            return self.files.open(opening, None);
        }
        let joined = if can_be_passed(flags) {
            self.passing.read(
                node,
                || self.data_to_pass(node),
                |data| self.files.back(node, &data, &opening.reply),
            )
        } else {
            self.passing.serve(node)
        };
        match joined {
            Joined::Served => self.files.open(opening, None),
            Joined::Passed(backing) => self.files.open(opening, Some(&backing)),
            // The second number; what was opened by the first stays with it.
            Joined::Replaced if opening.second => self.files.open(opening, None),
            Joined::Replaced => opening.reply.error(Errno::ESTALE),
            Joined::Taken => {
                let (files, long) = (self.files.clone(), self.helpers.long.clone());
                self.helpers
                    .claims
                    .claim(node, move |claimed| match claimed {
                        // A copy-up may take long.
                        Claimed::Served => long.run("open", move || files.open(opening, None)),
                        Claimed::Replaced => opening.reply.error(Errno::ESTALE),
                    });
            }
        }
    }

    fn data_to_pass(&self, node: NodeId) -> Option<LowerData> {
        match self.union.lower_data(node) {
            Ok(data) => data,
            Err(error) => {
                // The open that follows says the same, if it matters.
                tracing::debug!(%error, "a lower file cannot be opened");
                None
            }
        }
    }

    pub(super) fn create_file(
        &self,
        caller: &Caller,
        parent: NodeId,
        name: &OsStr,
        mode: u32,
        flags: i32,
        reply: ReplyCreate,
    ) {
        match self.union.create(parent, name, mode, flags, caller) {
            Ok((entry, handle)) => {
                let fh = if self.policy().no_open {
                    self.union.release(entry.node, handle);
                    STATELESS
                } else {
                    if self.policy().passthrough {
                        // Nobody else has opened it yet, so it cannot but be served.
                        self.passing.serve(entry.node);
                    }
                    self.files.opens.opened(entry.node, flags);
                    self.files.handles.insert(handle)
                };
                reply.created(
                    &FOREVER,
                    &convert::file_attr(&entry.attr),
                    Generation(entry.generation),
                    Fh(fh),
                    self.files.served_flags(entry.node),
                );
            }
            Err(error) => reply.error(answer::errno(&error)),
        }
    }

    pub(super) fn close(&self, ino: INodeNo, fh: Fh, flags: i32, reply: ReplyEmpty) {
        let node = self.node(ino);
        if let Some(handle) = self.files.handles.remove(fh.0) {
            self.files.opens.released(node, flags);
            if self.policy().passthrough && node.0 == ino.0 {
                self.passing.leave(node);
            }
            self.union.release(node, handle);
            self.passing.forgotten(node, || self.union.knows(node));
        }
        reply.ok();
    }
}
