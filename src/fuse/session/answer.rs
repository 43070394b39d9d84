//! How the outcome of an operation becomes a reply.

use std::panic::{AssertUnwindSafe, catch_unwind};

use fuser::{Errno, Generation, ReplyAttr, ReplyEmpty, ReplyEntry, ReplyWrite, ReplyXattr};

use crate::cow::union::Error;
use crate::cow::{Attr, Entry};
use crate::fuse::convert::{self, FOREVER};

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

pub fn entry(reply: ReplyEntry, result: Result<Entry, Error>) {
    match result {
        Ok(entry) => reply.entry(
            &FOREVER,
            &convert::file_attr(&entry.attr),
            Generation(entry.generation),
        ),
        Err(error) => reply.error(errno(&error)),
    }
}

pub fn empty(reply: ReplyEmpty, result: Result<(), Error>) {
    match result {
        Ok(()) => reply.ok(),
        Err(error) => reply.error(errno(&error)),
    }
}

pub fn attr(reply: ReplyAttr, result: Result<Attr, Error>) {
    match result {
        Ok(attr) => reply.attr(&FOREVER, &convert::file_attr(&attr)),
        Err(error) => reply.error(errno(&error)),
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
