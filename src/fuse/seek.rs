//! LSEEK of a file with dirty pages.
//!
//! The kernel sends SEEK_DATA and SEEK_HOLE without first writing its dirty pages, so the host file
//! may not have the data yet that the caller wrote. Invalidating the file makes the kernel write
//! them, by WRITE requests that a request worker must be free to answer: therefore the waiting is
//! done by a thread of its own.

use std::sync::Arc;
use std::sync::OnceLock;
use std::thread;

use crossbeam::channel::{self, Sender};
use fuser::{INodeNo, Notifier, ReplyLseek};

use super::convert;
use crate::cow::union::FileHandle;
use crate::cow::{NodeId, Union};

/// A request that waits for its answer.
pub struct SeekJob {
    /// The file's number.
    pub ino: INodeNo,
    /// Its node.
    pub node: NodeId,
    /// Its handle, if it has one.
    pub handle: Option<Arc<FileHandle>>,
    /// Where to start.
    pub offset: i64,
    /// SEEK_DATA or SEEK_HOLE.
    pub whence: i32,
    /// Where the answer goes.
    pub reply: ReplyLseek,
}

impl SeekJob {
    fn answer(self, union: &Union) {
        match union.lseek(self.node, self.handle.as_deref(), self.offset, self.whence) {
            Ok(offset) => self.reply.offset(offset),
            Err(error) => self.reply.error(convert::errno(error.errno)),
        }
    }
}

/// Answers LSEEK requests.
#[derive(Clone, Default)]
pub struct Seeker {
    queue: Arc<OnceLock<Sender<SeekJob>>>,
}

impl Seeker {
    /// Starts the thread that flushes. It ends when the last `Seeker` is gone.
    pub fn start(&self, union: Arc<Union>, notifier: Notifier) -> std::io::Result<()> {
        let (sender, jobs) = channel::unbounded::<SeekJob>();
        thread::Builder::new()
            .name("plyfs-seek".into())
            .spawn(move || {
                for job in jobs {
                    if let Err(error) = flush(&notifier, job.ino) {
                        tracing::warn!(%error, ino = job.ino.0, "dirty pages could not be flushed");
                    }
                    super::session::guarded("lseek", || job.answer(&union));
                }
            })?;
        // A second start would only leave the first thread in charge.
        let _ = self.queue.set(sender);
        Ok(())
    }

    /// Answers now, or after the dirty pages are written when there may be some.
    pub fn seek(&self, union: &Union, job: SeekJob, dirty: bool) {
        match self.queue.get() {
            Some(queue) if dirty => {
                if let Err(unsent) = queue.send(job) {
                    unsent.into_inner().answer(union);
                }
            }
            _ => job.answer(union),
        }
    }
}

/// Makes the kernel write the dirty pages of a file, waits until they are written, and has it drop all pages and the attributes of
/// the file. Never to be called by a request worker.
pub fn flush(notifier: &Notifier, ino: INodeNo) -> std::io::Result<()> {
    notifier.inval_inode(ino, 0, 0)
}
