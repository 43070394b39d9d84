//! Open files and what is in them.
//!
//! A request that is masked is answered ENOSYS: the kernel does not send it again and does without,
//! as one that does not know the request. FLUSH is answered so in any case, OPEN when opening is left
//! to the kernel; nothing else ever is.

use std::cell::RefCell;
use std::ffi::OsStr;

use fuser::{
    Errno, FileHandle as Fh, FopenFlags, Generation, ReplyCreate, ReplyData, ReplyEmpty,
    ReplyLseek, ReplyOpen, ReplyWrite,
};

use super::{UnionFs, answer};
use crate::cow::{Caller, NodeId};
use crate::fuse::convert::{self, FOREVER};
use crate::fuse::features::Feature;
use crate::fuse::handles::STATELESS;
use crate::fuse::seek::SeekJob;

/// The most that one COPY_FILE_RANGE copies: the answer has 32 bits, and a caller that gets less goes
/// on by itself.
const MAX_COPY: u64 = 1 << 30;

thread_local! {
    /// Where READ puts its data before it is sent: one buffer a thread, as large as the largest read so far.
    static READ_BUFFER: RefCell<Vec<u8>> = const { RefCell::new(Vec::new()) };
}

/// A place in an open file.
pub(super) struct Place {
    pub(super) node: NodeId,
    pub(super) fh: Fh,
    pub(super) offset: u64,
}

impl UnionFs {
    /// What the kernel has cached of a file stays, and closing it is no news to the server.
    fn file_flags(&self) -> FopenFlags {
        let mut flags = FopenFlags::FOPEN_KEEP_CACHE;
        flags.set(
            FopenFlags::FOPEN_NOFLUSH,
            self.policy().uses(Feature::NoFlush),
        );
        flags
    }

    pub(super) fn open_node(&self, caller: &Caller, node: NodeId, flags: i32, reply: ReplyOpen) {
        if self.policy().no_open {
            // The kernel then opens every file by itself.
            return reply.error(Errno::ENOSYS);
        }
        match self.union.open_file(node, flags, caller) {
            Ok(handle) => {
                self.writers.opened(node, flags);
                reply.opened(Fh(self.files.insert(handle)), self.file_flags());
            }
            Err(error) => reply.error(answer::errno(&error)),
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
                    self.writers.opened(entry.node, flags);
                    self.files.insert(handle)
                };
                reply.created(
                    &FOREVER,
                    &convert::file_attr(&entry.attr),
                    Generation(entry.generation),
                    Fh(fh),
                    self.file_flags(),
                );
            }
            Err(error) => reply.error(answer::errno(&error)),
        }
    }

    pub(super) fn close(&self, node: NodeId, fh: Fh, flags: i32, reply: ReplyEmpty) {
        if let Some(handle) = self.files.remove(fh.0) {
            self.writers.released(node, flags);
            self.union.release(node, handle);
        }
        reply.ok();
    }

    pub(super) fn read_at(&self, place: &Place, size: u32, reply: ReplyData) {
        let handle = self.files.get(place.fh.0);
        READ_BUFFER.with_borrow_mut(|buffer| {
            let size = size as usize;
            if buffer.len() < size {
                buffer.resize(size, 0);
            }
            let into = &mut buffer[..size];
            match self
                .union
                .read(place.node, handle.as_deref(), place.offset, into)
            {
                Ok(length) => reply.data(&buffer[..length]),
                Err(error) => reply.error(answer::errno(&error)),
            }
        });
    }

    /// `kill`: the writer may not keep setuid, setgid and capabilities on the file.
    pub(super) fn write_at(&self, place: &Place, data: &[u8], kill: bool, reply: ReplyWrite) {
        let handle = self.files.get(place.fh.0);
        let result = self
            .union
            .write(place.node, handle.as_deref(), place.offset, data, kill);
        answer::written(reply, result);
        if self.policy().writeback {
            // The kernel keeps size and times by itself then, but not the room that the data has taken. Told
            // after the answer: dropping the last reference to the file may wait for it.
            self.union.tell(place.node);
        }
    }

    pub(super) fn allocate(
        &self,
        caller: &Caller,
        place: &Place,
        length: u64,
        mode: i32,
        reply: ReplyEmpty,
    ) {
        if !self.policy().uses(Feature::Fallocate) {
            return reply.error(Errno::ENOSYS);
        }
        let handle = self.files.get(place.fh.0);
        let (union, caller, node, offset) = (self.union.clone(), *caller, place.node, place.offset);
        self.long.run("fallocate", move || {
            let handle = handle.as_deref();
            let result = union.fallocate(node, handle, mode, offset, length, &caller);
            answer::empty(reply, result);
        });
    }

    pub(super) fn seek(&self, node: NodeId, fh: Fh, offset: i64, whence: i32, reply: ReplyLseek) {
        if !self.policy().uses(Feature::Lseek) {
            return reply.error(Errno::ENOSYS);
        }
        let job = SeekJob {
            node,
            handle: self.files.get(fh.0),
            offset,
            whence,
            reply,
        };
        let dirty = self.policy().no_open || self.writers.contains(node);
        self.seeker.seek(&self.union, job, dirty);
    }

    pub(super) fn copy_range(
        &self,
        caller: &Caller,
        from: &Place,
        to: &Place,
        len: u64,
        reply: ReplyWrite,
    ) {
        if !self.policy().uses(Feature::CopyFileRange) {
            return reply.error(Errno::ENOSYS);
        }
        let (source, target) = (self.files.get(from.fh.0), self.files.get(to.fh.0));
        let (union, caller) = (self.union.clone(), *caller);
        let (from, from_offset) = (from.node, from.offset);
        let (to, to_offset) = (to.node, to.offset);
        self.long.run("copy_file_range", move || {
            let result = union.copy_file_range(
                from,
                source.as_deref(),
                from_offset,
                to,
                target.as_deref(),
                to_offset,
                len.min(MAX_COPY),
                &caller,
            );
            answer::written(reply, result);
        });
    }
}
