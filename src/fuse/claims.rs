//! Opening a file for writing that others read without requests (`passing`).
//!
//! A close is told to the server after it was made, and by two threads it may learn of an open first that came later.
//! So whoever claims such a file waits a moment for its readers to leave. When they stay, the file gets a second
//! number, and the kernel is told to look its names up again. All this is done by one thread of its own, which no request
//! waits for but those that claim.
//!
//! Telling the kernel waits for whatever is under way in the directories, which may have no end: a listing may write to
//! memory that somebody else has to bring. So no claim waits for it longer than a moment. Whoever claims looks its own
//! name up again in any case, and then nobody finds the first number by that name any more.
//!
//! The kernel does so once. The readers may leave meanwhile, and with them what the kernel knows of the file, so that it had
//! its first number again, and the next reader would be in the way once more. So the node is kept until the name was looked up.

use std::collections::VecDeque;
use std::io;
use std::sync::Arc;
use std::thread;
use std::time::{Duration, Instant};

use crossbeam::channel::{self, Receiver, RecvTimeoutError, Sender};
use fuser::{BackingId, INodeNo, Notifier};

use super::passing::{Joined, Passing, Second, Was};
use super::session::guarded;
use crate::cow::{NodeId, Union};

/// How long the readers of a file that is to be written have to close it.
const PATIENCE: Duration = Duration::from_millis(100);

/// How long a claim waits until the kernel knows of a second number.
const TELLING: Duration = Duration::from_secs(1);

/// How long a file keeps its second number at least: whoever claimed it looks for that at once, but may get no processor.
const KEPT: Duration = Duration::from_secs(2);

/// What became of a claim.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Claimed {
    /// It is served, and counted as an open.
    Served,
    /// It has a second number, which is to be opened in its place.
    Replaced,
}

struct Claim {
    node: NodeId,
    deadline: Instant,
    done: Box<dyn FnOnce(Claimed) + Send>,
}

/// Takes claims.
pub struct Claims(Sender<Claim>);

/// Claims that nobody looks at yet.
pub struct Pending(Receiver<Claim>);

impl Claims {
    /// Claims may be made before anybody looks at them.
    pub fn new() -> (Self, Pending) {
        let (sender, claims) = channel::unbounded();
        (Self(sender), Pending(claims))
    }

    /// Has `done` called once the file can be served, or has a second number.
    pub fn claim(&self, node: NodeId, done: impl FnOnce(Claimed) + Send + 'static) {
        let claim = Claim {
            node,
            deadline: Instant::now() + PATIENCE,
            done: Box::new(done),
        };
        if let Err(unsent) = self.0.send(claim) {
            // The session is ending.
            (unsent.into_inner().done)(Claimed::Replaced);
        }
    }
}

impl Pending {
    /// Starts the thread that looks at them. It ends when `Claims` is gone.
    pub fn serve(
        self,
        union: Arc<Union>,
        passing: Arc<Passing<BackingId>>,
        notifier: Notifier,
    ) -> io::Result<()> {
        let mut settler = Settler {
            union,
            passing,
            notifier,
            kept: VecDeque::new(),
        };
        thread::Builder::new()
            .name("plyfs-claims".into())
            .spawn(move || {
                while let Some(claim) = settler.next(&self.0) {
                    settler.passing.wait_until_left(claim.node, claim.deadline);
                    guarded("claim", || (claim.done)(settler.settle(claim.node)));
                }
            })?;
        Ok(())
    }
}

struct Settler {
    union: Arc<Union>,
    passing: Arc<Passing<BackingId>>,
    notifier: Notifier,
    /// Files that have got a second number, and until when they keep it; the first comes first.
    kept: VecDeque<(Instant, NodeId)>,
}

impl Settler {
    /// The next claim; nothing at the end of the session.
    fn next(&mut self, claims: &Receiver<Claim>) -> Option<Claim> {
        while let Some((until, node)) = self.kept.front().copied() {
            if Instant::now() < until {
                match claims.recv_deadline(until) {
                    Ok(claim) => return Some(claim),
                    Err(RecvTimeoutError::Disconnected) => return None,
                    Err(RecvTimeoutError::Timeout) => {}
                }
            }
            self.kept.pop_front();
            guarded("forget", || {
                self.union.forget(node, 1);
                self.passing.forgotten(node, || self.union.knows(node));
            });
        }
        claims.recv().ok()
    }

    fn settle(&mut self, node: NodeId) -> Claimed {
        match self.passing.serve(node) {
            Joined::Served | Joined::Passed(_) => return Claimed::Served,
            Joined::Replaced => return Claimed::Replaced,
            Joined::Taken => {}
        }
        let was = match self.union.getattr(node, None) {
            Ok(attr) => Was::of(&attr),
            Err(error) => {
                tracing::warn!(%error, node = node.0, "a file that is read cannot be opened for writing");
                return Claimed::Replaced;
            }
        };
        let number = self.union.spare_number();
        if self.passing.replace(node, Second { number, was }) {
            tracing::debug!(
                node = node.0,
                number = number.0,
                "a file that is read gets a second number"
            );
            self.tell(node);
            if self.union.remember(node) {
                self.kept.push_back((Instant::now() + KEPT, node));
            }
        } else {
            // They left just now.
            return self.settle(node);
        }
        Claimed::Replaced
    }

    /// Makes the kernel ask for the attributes of the first number again, and for what its names stand for.
    fn tell(&self, node: NodeId) {
        let (names, notifier) = (self.union.names(node), self.notifier.clone());
        let told = within(TELLING, move || {
            let mut told = notifier.inval_inode(INodeNo(node.0), -1, 0);
            for (directory, name) in names {
                told = told.and(notifier.inval_entry(INodeNo(directory.0), &name));
            }
            told
        });
        if let Err(error) = told {
            tracing::debug!(%error, node = node.0, "the kernel could not be told of a second number");
        }
    }
}

/// Does the work in a thread of its own, which is left alone after `patience`.
fn within(
    patience: Duration,
    work: impl FnOnce() -> io::Result<()> + Send + 'static,
) -> io::Result<()> {
    let (sender, done) = channel::bounded(1);
    thread::Builder::new()
        .name("plyfs-tell".into())
        .spawn(move || {
            // Nobody waits for it any more if it took too long.
            let _ = sender.send(work());
        })?;
    done.recv_timeout(patience)
        .unwrap_or_else(|_| Err(io::ErrorKind::TimedOut.into()))
}
