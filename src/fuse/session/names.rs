//! Names: looking them up, and the one change of them that has modes.

use std::ffi::OsStr;

use fuser::{Errno, Generation, INodeNo, RenameFlags, ReplyEmpty, ReplyEntry};

use super::{UnionFs, answer};
use crate::cow::{NodeId, RenameMode};
use crate::fuse::convert::{self, FOREVER};
use crate::fuse::features::Feature;

/// The longest name that Linux has.
const NAME_MAX: usize = 255;

impl UnionFs {
    pub(super) fn look_up(&self, parent: INodeNo, name: &OsStr, reply: ReplyEntry) {
        if name.len() > NAME_MAX {
            return reply.error(Errno::ENAMETOOLONG);
        }
        if self.replaced(parent).is_some() {
            // A file handle of what the file's names do not stand for any more.
            return reply.error(Errno::ESTALE);
        }
        match self.union.lookup(self.node(parent), name) {
            Err(error) if error.errno == libc::ENOENT => {
                reply.entry(&FOREVER, &convert::negative_entry(), Generation(0));
            }
            result => self.seen.entry(reply, result),
        }
    }

    pub(super) fn rename_entry(
        &self,
        from: (NodeId, &OsStr),
        to: (NodeId, &OsStr),
        flags: RenameFlags,
        reply: ReplyEmpty,
    ) {
        if !flags.is_empty() && !self.policy().uses(Feature::Rename2) {
            return reply.error(Errno::ENOSYS);
        }
        let mode = match flags {
            RenameFlags::RENAME_NOREPLACE => RenameMode::NoReplace,
            RenameFlags::RENAME_EXCHANGE => RenameMode::Exchange,
            flags if flags.is_empty() => RenameMode::Replace,
            // RENAME_WHITEOUT among them: a whiteout is the union's own mark.
            _ => return reply.error(Errno::EINVAL),
        };
        answer::empty(reply, self.union.rename(from.0, from.1, to.0, to.1, mode));
    }
}
