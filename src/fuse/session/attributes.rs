//! Attributes, extended ones among them.

use std::ffi::OsStr;
use std::os::unix::ffi::OsStrExt;

use fuser::{Errno, FileHandle as Fh, INodeNo, ReplyAttr, ReplyEmpty, ReplyXattr};

use super::{UnionFs, answer};
use crate::cow::{ACCESS_ACL, Caller, NodeId, SetAttr, SetTime, SetXattrMode};
use crate::fuse::claims::Claimed;
use crate::fuse::passing::Joined;

impl UnionFs {
    pub(super) fn attributes(&self, ino: INodeNo, fh: Option<Fh>, reply: ReplyAttr) {
        let handle = fh.and_then(|fh| self.files.get(fh));
        let result = self.union.getattr(self.node(ino), handle.as_deref());
        self.seen.attr(ino, reply, result);
    }

    pub(super) fn set_attributes(
        &self,
        caller: &Caller,
        ino: INodeNo,
        fh: Option<Fh>,
        set: SetAttr,
        reply: ReplyAttr,
    ) {
        let handle = fh.and_then(|fh| self.files.get(fh));
        let (union, seen, caller) = (self.union.clone(), self.seen.clone(), *caller);
        let node = self.node(ino);
        // Then it is the kernel that says when a file was changed, also by being cut: not if it keeps its length.
        let keeps_mtime = set.size.is_some() && set.mtime.is_none() && self.policy().writeback;
        let change = move |reply| {
            let set_all = |set: SetAttr| union.setattr(node, handle.as_deref(), &set, &caller);
            let result = match keeps_mtime {
                true => union.getattr(node, handle.as_deref()).and_then(|attr| {
                    set_all(SetAttr {
                        mtime: Some(SetTime::At(attr.mtime)),
                        ..set
                    })
                }),
                false => set_all(set),
            };
            seen.attr(ino, reply, result);
        };
        if set.size.is_none() || !self.policy().passthrough {
            return change(reply);
        }
        match self.passing.serve(node) {
            Joined::Served | Joined::Passed(_) => {
                let _counted = self.passing.counted(node);
                change(reply);
            }
            Joined::Replaced if node.0 != ino.0 => change(reply),
            // By a path, which the caller looks up again.
            Joined::Replaced => reply.error(Errno::ESTALE),
            Joined::Taken => {
                let (passing, long) = (self.passing.clone(), self.helpers.long.clone());
                self.helpers
                    .claims
                    .claim(node, move |claimed| match claimed {
                        Claimed::Served => long.run("setattr", move || {
                            let _counted = passing.counted(node);
                            change(reply);
                        }),
                        Claimed::Replaced => reply.error(Errno::ESTALE),
                    });
            }
        }
    }

    pub(super) fn set_xattr(
        &self,
        caller: &Caller,
        node: NodeId,
        name: &OsStr,
        value: &[u8],
        flags: i32,
        reply: ReplyEmpty,
    ) {
        const BOTH: i32 = libc::XATTR_CREATE | libc::XATTR_REPLACE;
        let mode = match flags {
            0 => SetXattrMode::Any,
            libc::XATTR_CREATE => SetXattrMode::Create,
            libc::XATTR_REPLACE => SetXattrMode::Replace,
            BOTH => SetXattrMode::CreateAndReplace,
            _ => return reply.error(Errno::EINVAL),
        };
        let set = self.union.setxattr(node, name, value, mode);
        let result = match name == ACCESS_ACL && caller.uid != 0 {
            true => set.and_then(|()| self.union.access_acl_set_by(node, caller)),
            false => set,
        };
        answer::empty(reply, result);
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
