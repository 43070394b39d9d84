//! Which files the kernel reads by itself, from a file of a lower layer (FUSE passthrough).
//!
//! From the first open of an inode to its last release the kernel either asks the server for its data or reads it
//! from one backing file, and answers EIO to an open that would have it otherwise. A lower file cannot be written, so
//! whoever wants to write to a file that has such readers needs another inode. The file gets a second number: its names
//! stand for that from then on, and the first goes on for those who have it open, with the data, size and time of
//! change that the file had. An OPEN of the first is answered ESTALE, upon which the kernel looks the name up again.
//!
//! What always holds: while a file is `Passed`, nobody writes its data, so that the lower file's is the file's.
//! Therefore a truncation counts as an open while it runs, and readers are counted here before they are answered.

use std::collections::HashMap;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Instant;

use parking_lot::{Condvar, Mutex, RwLock};

use crate::cow::{Attr, NodeId, Timestamp};

/// Shards of the table: a power of two.
const SHARDS: usize = 16;

/// How a file is open.
enum State<B> {
    /// Its opens are served by requests: so many.
    Served(u32),
    /// The kernel reads from this backing file.
    Passed { opens: u32, backing: Arc<B> },
    /// It has a second number, and its first one stands for what it was, for so many readers.
    Replaced {
        second: Second,
        readers: u32,
        backing: Option<Arc<B>>,
    },
}

/// What there is to know of a file with two numbers.
#[derive(Clone, Copy)]
pub struct Second {
    /// What its names stand for.
    pub number: NodeId,
    /// What the first number goes on to show.
    pub was: Was,
}

/// What a file was when it got its second number.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Was {
    /// Its length.
    pub size: u64,
    blocks: u64,
    mtime: Timestamp,
}

impl Was {
    /// Of a file with these attributes.
    pub fn of(attr: &Attr) -> Self {
        Self {
            size: attr.size,
            blocks: attr.blocks,
            mtime: attr.mtime,
        }
    }

    /// Attributes of the file as it is, with what belongs to the data as it was.
    pub fn shown(&self, attr: Attr) -> Attr {
        Attr {
            size: self.size,
            blocks: self.blocks,
            mtime: self.mtime,
            ..attr
        }
    }
}

/// How an open is to be answered.
pub enum Joined<B> {
    /// Requests serve it. It is counted.
    Served,
    /// The kernel reads from this backing file. It is counted.
    Passed(Arc<B>),
    /// It was to be served, but there are readers without requests. It is not counted.
    Taken,
    /// The file has a second number, under which it is served. It is not counted.
    Replaced,
}

struct Shard<B> {
    states: Mutex<HashMap<NodeId, State<B>>>,
    /// The last reader of a file has left.
    left: Condvar,
}

/// The open files of a mount by how they are read. `B` is a backing file that the kernel knows.
pub struct Passing<B> {
    shards: [Shard<B>; SHARDS],
    /// Second numbers, and the nodes that they stand for.
    seconds: RwLock<HashMap<NodeId, NodeId>>,
    /// How many there are: mostly none, and then nothing is looked up.
    count: AtomicUsize,
}

impl<B> Default for Passing<B> {
    fn default() -> Self {
        Self {
            shards: std::array::from_fn(|_| Shard {
                states: Mutex::default(),
                left: Condvar::new(),
            }),
            seconds: RwLock::default(),
            count: AtomicUsize::new(0),
        }
    }
}

/// An open that was counted. It is not any more when this goes, also by a panic, unless it [stays](Self::stay).
pub struct Counted<'a, B> {
    passing: &'a Passing<B>,
    node: NodeId,
}

impl<B> Counted<'_, B> {
    /// The open has succeeded: its end is told to [`Passing::leave`].
    pub fn stay(self) {
        std::mem::forget(self);
    }
}

impl<B> Drop for Counted<'_, B> {
    fn drop(&mut self) {
        self.passing.leave(self.node);
    }
}

impl<B> Passing<B> {
    fn shard(&self, node: NodeId) -> &Shard<B> {
        &self.shards[node.0 as usize % SHARDS]
    }

    fn count_in(state: &mut State<B>) -> Joined<B> {
        match state {
            State::Served(opens) => {
                *opens += 1;
                Joined::Served
            }
            State::Passed { opens, backing } => {
                *opens += 1;
                Joined::Passed(Arc::clone(backing))
            }
            State::Replaced { .. } => Joined::Replaced,
        }
    }

    /// An open for reading. `data` finds what a first reader could read from, and may take its time; `back` makes it a
    /// backing file, unless it has changed meanwhile.
    pub fn read<D>(
        &self,
        node: NodeId,
        data: impl FnOnce() -> Option<D>,
        back: impl FnOnce(D) -> Option<B>,
    ) -> Joined<B> {
        let shard = self.shard(node);
        if let Some(state) = shard.states.lock().get_mut(&node) {
            return Self::count_in(state);
        }
        let data = data();
        let mut states = shard.states.lock();
        let state = states
            .entry(node)
            .or_insert_with(|| match data.and_then(back) {
                Some(backing) => State::Passed {
                    opens: 0,
                    backing: Arc::new(backing),
                },
                None => State::Served(0),
            });
        Self::count_in(state)
    }

    /// An open that has to be served.
    pub fn serve(&self, node: NodeId) -> Joined<B> {
        let mut states = self.shard(node).states.lock();
        match states.entry(node).or_insert(State::Served(0)) {
            State::Passed { .. } => Joined::Taken,
            state => Self::count_in(state),
        }
    }

    /// Takes charge of an open that was just counted.
    pub fn counted(&self, node: NodeId) -> Counted<'_, B> {
        Counted {
            passing: self,
            node,
        }
    }

    /// An open that was counted is over.
    pub fn leave(&self, node: NodeId) {
        let shard = self.shard(node);
        // Told to the kernel once the table is free again.
        let _unused: Option<Arc<B>> = {
            let mut states = shard.states.lock();
            match states.get_mut(&node) {
                Some(State::Replaced {
                    readers, backing, ..
                }) => {
                    *readers = readers.saturating_sub(1);
                    if *readers == 0 { backing.take() } else { None }
                }
                Some(State::Served(opens) | State::Passed { opens, .. }) if *opens > 1 => {
                    *opens -= 1;
                    None
                }
                _ => match states.remove(&node) {
                    Some(State::Passed { backing, .. }) => {
                        shard.left.notify_all();
                        Some(backing)
                    }
                    _ => None,
                },
            }
        };
    }

    /// Waits until a file has no readers without requests, no longer than to `deadline`.
    pub fn wait_until_left(&self, node: NodeId, deadline: Instant) {
        let shard = self.shard(node);
        let mut states = shard.states.lock();
        while let Some(State::Passed { .. }) = states.get(&node) {
            if shard.left.wait_until(&mut states, deadline).timed_out() {
                return;
            }
        }
    }

    /// Gives a file that has readers without requests a second number; says whether it did.
    pub fn replace(&self, node: NodeId, second: Second) -> bool {
        let mut states = self.shard(node).states.lock();
        let Some(state) = states.get_mut(&node) else {
            return false;
        };
        let State::Passed { opens, backing } = state else {
            return false;
        };
        *state = State::Replaced {
            second,
            readers: *opens,
            // An open that was answered with it may not have got there yet.
            backing: Some(Arc::clone(backing)),
        };
        self.seconds.write().insert(second.number, node);
        self.count.fetch_add(1, Ordering::SeqCst);
        true
    }

    /// The node that a number stands for.
    pub fn node(&self, number: NodeId) -> NodeId {
        if self.count.load(Ordering::SeqCst) == 0 {
            return number;
        }
        let seconds = self.seconds.read();
        seconds.get(&number).copied().unwrap_or(number)
    }

    /// What there is to know of a node that has two numbers.
    pub fn second(&self, node: NodeId) -> Option<Second> {
        if self.count.load(Ordering::SeqCst) == 0 {
            return None;
        }
        match self.shard(node).states.lock().get(&node) {
            Some(State::Replaced { second, .. }) => Some(*second),
            _ => None,
        }
    }

    /// The number that a node's names stand for.
    pub fn number(&self, node: NodeId) -> NodeId {
        self.second(node).map_or(node, |second| second.number)
    }

    /// The kernel has forgotten a number of the node. When it knows none any more, the node has one again.
    pub fn forgotten(&self, node: NodeId, known: impl FnOnce() -> bool) {
        if self.count.load(Ordering::SeqCst) == 0 {
            return;
        }
        // Whoever looks the node up asks for its number afterwards: under the lock, so that none gets one that goes away here.
        let mut states = self.shard(node).states.lock();
        if let Some(State::Replaced { second, .. }) = states.get(&node)
            && !known()
        {
            self.seconds.write().remove(&second.number);
            self.count.fetch_sub(1, Ordering::SeqCst);
            states.remove(&node);
        }
    }
}

#[cfg(test)]
mod tests {
    use std::panic::{AssertUnwindSafe, catch_unwind};
    use std::time::Duration;

    use super::*;

    const NODE: NodeId = NodeId(20);
    const SECOND: Second = Second {
        number: NodeId(99),
        was: Was {
            size: 3,
            blocks: 1,
            mtime: Timestamp { sec: 1, nsec: 2 },
        },
    };

    fn reads(passing: &Passing<u8>, data: Option<u8>) -> Joined<u8> {
        passing.read(NODE, || data, Some)
    }

    #[test]
    fn the_first_open_decides_until_the_last_one_is_over() {
        let passing = Passing::default();
        assert!(matches!(reads(&passing, Some(1)), Joined::Passed(b) if *b == 1));
        // Not asked for again: there is one backing file.
        assert!(matches!(reads(&passing, Some(2)), Joined::Passed(b) if *b == 1));
        assert!(matches!(passing.serve(NODE), Joined::Taken));
        passing.leave(NODE);
        assert!(matches!(passing.serve(NODE), Joined::Taken));
        passing.leave(NODE);
        assert!(matches!(passing.serve(NODE), Joined::Served));
        assert!(matches!(reads(&passing, Some(3)), Joined::Served));
        passing.leave(NODE);
        assert!(matches!(reads(&passing, Some(3)), Joined::Served));
        passing.leave(NODE);
        passing.leave(NODE);
        assert!(matches!(reads(&passing, None), Joined::Served));
        passing.leave(NODE);
        assert!(matches!(reads(&passing, Some(4)), Joined::Passed(b) if *b == 4));
    }

    #[test]
    fn an_open_that_panics_is_not_counted() {
        let passing = Passing::default();
        assert!(matches!(passing.serve(NODE), Joined::Served));
        let panicked = catch_unwind(AssertUnwindSafe(|| {
            let _counted = passing.counted(NODE);
            panic!("as it should");
        }));
        assert!(panicked.is_err());
        assert!(matches!(reads(&passing, Some(1)), Joined::Passed(_)));
        passing.counted(NODE).stay();
        assert!(matches!(passing.serve(NODE), Joined::Taken));
    }

    #[test]
    fn what_was_opened_for_writing_meanwhile_is_not_passed() {
        let passing = Passing::<u8>::default();
        let joined = passing.read(
            NODE,
            || {
                assert!(matches!(passing.serve(NODE), Joined::Served));
                Some(1)
            },
            Some,
        );
        assert!(matches!(joined, Joined::Served));
    }

    #[test]
    fn a_second_number_lasts_until_the_node_is_forgotten() {
        let passing = Passing::default();
        assert!(!passing.replace(NODE, SECOND));
        reads(&passing, Some(1));
        assert!(passing.replace(NODE, SECOND) && !passing.replace(NODE, SECOND));
        assert_eq!(passing.node(SECOND.number), NODE);
        assert_eq!(passing.node(NODE), NODE);
        assert_eq!(passing.number(NODE), SECOND.number);
        assert!(matches!(reads(&passing, Some(1)), Joined::Replaced));
        assert!(matches!(passing.serve(NODE), Joined::Replaced));
        passing.leave(NODE);
        passing.forgotten(NODE, || true);
        assert_eq!(passing.number(NODE), SECOND.number);
        passing.forgotten(NODE, || false);
        assert_eq!(passing.number(NODE), NODE);
        assert_eq!(passing.node(SECOND.number), SECOND.number);
        assert!(matches!(passing.serve(NODE), Joined::Served));
    }

    #[test]
    fn a_backing_file_is_kept_for_its_readers_and_no_longer() {
        let passing = Passing::default();
        let backing = Arc::new(());
        let read = || passing.read(NODE, || Some(Arc::clone(&backing)), Some);
        for replaced in [false, true] {
            drop((read(), read()));
            if replaced {
                passing.replace(NODE, SECOND);
            }
            passing.leave(NODE);
            assert_eq!(Arc::strong_count(&backing), 2);
            passing.leave(NODE);
            assert_eq!(Arc::strong_count(&backing), 1);
        }
    }

    #[test]
    fn whoever_waits_learns_that_the_last_reader_left() {
        let passing = Passing::default();
        reads(&passing, Some(1));
        let now = Instant::now();
        passing.wait_until_left(NODE, now);
        assert!(matches!(passing.serve(NODE), Joined::Taken));
        std::thread::scope(|scope| {
            let waiter = scope.spawn(|| {
                passing.wait_until_left(NODE, now + Duration::from_secs(600));
                matches!(passing.serve(NODE), Joined::Served)
            });
            passing.leave(NODE);
            assert!(waiter.join().unwrap());
        });
    }
}
