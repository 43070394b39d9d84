//! How the outcome of an operation becomes a reply.

use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::{Arc, LazyLock};
use std::time::{Duration, Instant};

use fuser::{
    BackingId, Errno, FileAttr, Generation, INodeNo, ReplyAttr, ReplyEmpty, ReplyEntry, ReplyWrite,
    ReplyXattr,
};

use crate::cow::union::Error;
use crate::cow::{Attr, Entry, NodeId};
use crate::fuse::convert::{self, FOREVER};
use crate::fuse::passing::{Passing, Second};
use crate::fuse::repeats::Repeats;

/// Runs a handler; a panic in it drops the reply, which fuser then answers with EIO.
pub fn guarded(operation: &'static str, handler: impl FnOnce()) {
    if catch_unwind(AssertUnwindSafe(handler)).is_err() {
        tracing::error!(
            operation,
            "a request failed by a defect in plyfs and was answered EIO"
        );
    }
}

/// The errno of a failed operation; what is the host's fault rather than the caller's is logged.
pub fn errno(error: &Error) -> Errno {
    static SAID: LazyLock<Repeats> = LazyLock::new(Repeats::default);
    let is_hosts = matches!(
        error.errno,
        libc::EIO | libc::ENOSYS | libc::EUCLEAN | libc::ESTALE
    );
    let admitted = is_hosts.then(|| SAID.admit(&error.to_string(), Instant::now()));
    match admitted.flatten() {
        Some(0) => tracing::warn!(%error, "an operation failed"),
        Some(missed) => {
            tracing::warn!(%error, "an operation failed, and {missed} like it since that was said last");
        }
        None => tracing::debug!(%error, "an operation failed"),
    }
    convert::errno(error.errno)
}

pub fn empty(reply: ReplyEmpty, result: Result<(), Error>) {
    match result {
        Ok(()) => reply.ok(),
        Err(error) => reply.error(errno(&error)),
    }
}

/// What the kernel is shown of nodes: those that have two numbers are looked up and looked at each time anew,
/// because what is done by one number is no news to the kernel of the other.
#[derive(Clone)]
pub struct Seen(pub Arc<Passing<BackingId>>);

impl Seen {
    /// Attributes by a name, and how long they and the name are good for.
    pub fn by_name(&self, node: NodeId, attr: &Attr) -> (FileAttr, Duration) {
        let attr = convert::file_attr(attr);
        match self.0.second(node) {
            Some(Second { number, .. }) => {
                let ino = INodeNo(number.0);
                (FileAttr { ino, ..attr }, Duration::ZERO)
            }
            None => (attr, FOREVER),
        }
    }

    /// Attributes by a number.
    fn by_number(&self, ino: INodeNo, attr: &Attr) -> (FileAttr, Duration) {
        let node = self.0.node(NodeId(ino.0));
        match self.0.second(node) {
            Some(second) if node.0 == ino.0 => {
                (convert::file_attr(&second.was.shown(*attr)), Duration::ZERO)
            }
            _ => self.by_name(node, attr),
        }
    }

    pub fn entry(&self, reply: ReplyEntry, result: Result<Entry, Error>) {
        match result {
            Ok(entry) => {
                let (attr, good_for) = self.by_name(entry.node, &entry.attr);
                reply.entry(&good_for, &attr, Generation(entry.generation));
            }
            Err(error) => reply.error(errno(&error)),
        }
    }

    pub fn attr(&self, ino: INodeNo, reply: ReplyAttr, result: Result<Attr, Error>) {
        match result {
            Ok(attr) => {
                let (attr, good_for) = self.by_number(ino, &attr);
                reply.attr(&good_for, &attr);
            }
            Err(error) => reply.error(errno(&error)),
        }
    }
}

/// How much was written, which is never more than was asked for in 32 bits.
pub fn written(reply: ReplyWrite, result: Result<usize, Error>) {
    match result {
        Ok(length) => reply.written(length as u32),
        Err(error) => reply.error(errno(&error)),
    }
}

/// The protocol of xattr sizes: 0 asks for the size alone.
pub fn xattr(reply: ReplyXattr, size: u32, value: Result<Vec<u8>, Error>) {
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
