//! Attributes, extended ones among them.

use std::ffi::OsStr;
use std::os::unix::ffi::OsStrExt;

use fuser::{Errno, FileHandle as Fh, ReplyAttr, ReplyEmpty, ReplyXattr};

use super::{UnionFs, answer};
use crate::cow::{Caller, NodeId, SetAttr, SetXattrMode};

impl UnionFs {
    pub(super) fn attributes(&self, node: NodeId, fh: Option<Fh>, reply: ReplyAttr) {
        let handle = fh.and_then(|fh| self.files.get(fh.0));
        answer::attr(reply, self.union.getattr(node, handle.as_deref()));
    }

    pub(super) fn set_attributes(
        &self,
        caller: &Caller,
        node: NodeId,
        fh: Option<Fh>,
        set: &SetAttr,
        reply: ReplyAttr,
    ) {
        let handle = fh.and_then(|fh| self.files.get(fh.0));
        let result = self.union.setattr(node, handle.as_deref(), set, caller);
        answer::attr(reply, result);
    }

    pub(super) fn set_xattr(
        &self,
        node: NodeId,
        name: &OsStr,
        value: &[u8],
        flags: i32,
        reply: ReplyEmpty,
    ) {
        let mode = match flags {
            0 => SetXattrMode::Any,
            libc::XATTR_CREATE => SetXattrMode::Create,
            libc::XATTR_REPLACE => SetXattrMode::Replace,
            _ => return reply.error(Errno::EINVAL),
        };
        answer::empty(reply, self.union.setxattr(node, name, value, mode));
    }

    /// All names, each with a zero byte behind it; those of `trusted.` are root's alone, which the kernel
    /// leaves to the server where it lists, other than where it reads.
    pub(super) fn list_xattrs(&self, caller: u32, node: NodeId, size: u32, reply: ReplyXattr) {
        let hidden = |name: &OsStr| caller != 0 && name.as_bytes().starts_with(b"trusted.");
        let list = self.union.listxattr(node).map(|names| {
            let mut list = Vec::new();
            for name in names.into_iter().filter(|name| !hidden(name)) {
                list.extend_from_slice(name.as_bytes());
                list.push(0);
            }
            list
        });
        answer::xattr(reply, size, list);
    }
}
