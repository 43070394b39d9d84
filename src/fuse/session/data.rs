//! What is in open files.
//!
//! A request that is masked is answered ENOSYS: the kernel does not send it again and does without,
//! as one that does not know the request. FLUSH is answered so in any case, OPEN when opening is left
//! to the kernel; nothing else ever is.

use std::cell::RefCell;
use std::sync::atomic::Ordering;

use fuser::{
    Errno, FileHandle as Fh, INodeNo, ReplyData, ReplyEmpty, ReplyLseek, ReplyWrite, WriteFlags,
};

use super::{UnionFs, answer};
use crate::cow::{Caller, NodeId};
use crate::fuse::features::Feature;
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
    /// `flags` are open(2)'s.
    pub(super) fn read_at(&self, place: &Place, size: u32, flags: i32, reply: ReplyData) {
        let handle = self.files.get(place.fh);
        READ_BUFFER.with_borrow_mut(|buffer| {
            let size = size as usize;
            if buffer.len() < size {
                buffer.resize(size, 0);
            }
            let into = &mut buffer[..size];
            let read = match flags & libc::O_NOATIME {
                0 => self
                    .union
                    .read(place.node, handle.as_deref(), place.offset, into),
                _ => self.union.read_quietly(place.node, place.offset, into),
            };
            match read {
                Ok(length) => reply.data(&buffer[..length]),
                Err(error) => reply.error(answer::errno(&error)),
            }
        });
    }

    /// `caller` is who writes.
    pub(super) fn write_at(
        &self,
        place: &Place,
        data: &[u8],
        flags: WriteFlags,
        caller: &Caller,
        reply: ReplyWrite,
    ) {
        let Place { node, fh, offset } = *place;
        // The writer may not keep setuid, setgid and capabilities on the file.
        let kills = flags.contains(WriteFlags::FUSE_WRITE_KILL_SUIDGID);
        let kills = kills.then_some(caller);
        let from_cache = flags.contains(WriteFlags::FUSE_WRITE_CACHE);
        if from_cache {
            self.helpers.pages_sent.fetch_add(1, Ordering::Relaxed);
        }
        let writeback = self.policy().writeback;
        let gathered = writeback && from_cache;
        let result = match gathered {
            true => self.union.write_gathered(node, offset, data, kills),
            false => {
                let handle = self.files.get(fh);
                self.union
                    .write(node, handle.as_deref(), offset, data, kills)
            }
        };
        // The kernel keeps size and times by itself with `writeback`, but not the room that the data has taken.
        if writeback && !gathered {
            // The writer has the file open. Told later, the answer to what he asks next would count as an older one, and
            // a mode without setuid go unseen.
            self.union.tell(node);
        }
        answer::written(reply, result);
        if gathered {
            // Not before: dropping the last reference to the file may wait for the answer.
            self.union.tell(node);
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
        let handle = self.files.get(place.fh);
        let (union, caller, node, offset) = (self.union.clone(), *caller, place.node, place.offset);
        self.helpers.long.run("fallocate", move || {
            let handle = handle.as_deref();
            let result = union.fallocate(node, handle, mode, offset, length, &caller);
            answer::empty(reply, result);
        });
    }

    pub(super) fn seek(&self, ino: INodeNo, fh: Fh, offset: i64, whence: i32, reply: ReplyLseek) {
        if !self.policy().uses(Feature::Lseek) {
            return reply.error(Errno::ENOSYS);
        }
        if let Some(was) = self.replaced(ino) {
            // Its readers have the data from elsewhere. That there is no hole is always a right answer.
            return match u64::try_from(offset) {
                Ok(at) if at >= was.size => reply.error(Errno::ENXIO),
                Ok(_) if whence == libc::SEEK_HOLE => reply.offset(was.size as i64),
                Ok(_) => reply.offset(offset),
                Err(_) => reply.error(Errno::ENXIO),
            };
        }
        let node = self.node(ino);
        let job = SeekJob {
            ino,
            node,
            handle: self.files.get(fh),
            offset,
            whence,
            reply,
        };
        let dirty = self.policy().no_open || self.files.are_written(node);
        self.helpers.seeker.seek(&self.union, job, dirty);
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
        let (source, target) = (self.files.get(from.fh), self.files.get(to.fh));
        let (union, caller) = (self.union.clone(), *caller);
        let (from, from_offset) = (from.node, from.offset);
        let (to, to_offset) = (to.node, to.offset);
        self.helpers.long.run("copy_file_range", move || {
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
