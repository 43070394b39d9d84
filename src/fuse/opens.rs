//! What files are open for, as far as the kernel's requests tell.

use std::collections::HashMap;
use std::thread;
use std::time::Duration;

use parking_lot::Mutex;

use crate::cow::NodeId;

/// Shards of a table: a power of two.
const SHARDS: usize = 16;

/// `__FMODE_EXEC` of include/linux/fs.h: the kernel opens the file to run it.
const EXEC: i32 = 0x20;

/// How often it is looked whether a program that may have ended is still open, and the first pause, which doubles: the kernel
/// tells of a close and waits for no answer.
const LOOKS: u32 = 8;
const PAUSE: Duration = Duration::from_millis(1);

/// Counts open handles of each file by what they allow.
#[derive(Default)]
pub struct Opens {
    writers: Counts,
    programs: Counts,
}

/// Whether open(2)'s flags ask for writing.
pub fn asks_for_writing(flags: i32) -> bool {
    flags & libc::O_ACCMODE != libc::O_RDONLY
}

/// Whether the kernel opens a file with these flags to run it.
fn asks_for_running(flags: i32) -> bool {
    flags & EXEC != 0
}

impl Opens {
    /// The file was opened with these flags.
    pub fn opened(&self, node: NodeId, flags: i32) {
        for counts in self.of(flags) {
            counts.add(node);
        }
    }

    /// A handle that was opened with these flags is gone.
    pub fn released(&self, node: NodeId, flags: i32) {
        for counts in self.of(flags) {
            counts.remove(node);
        }
    }

    /// Whether the file is open for writing. A mapping holds its file open, so no page of another file can be dirty.
    pub fn is_written(&self, node: NodeId) -> bool {
        self.writers.contains(node)
    }

    /// Whether an open with these flags has to fail with ETXTBSY, as it would cut off a program that runs. Before it asks to
    /// open a file the kernel looks for that only if the file is to be written to: what is opened with O_RDONLY | O_TRUNC is
    /// cut off by then (do_open in fs/namei.c, with FUSE_ATOMIC_O_TRUNC).
    pub fn cuts_program(&self, node: NodeId, flags: i32) -> bool {
        let unasked = flags & libc::O_TRUNC != 0 && !asks_for_writing(flags);
        unasked
            && (0..LOOKS).all(|look| {
                if look > 0 {
                    thread::sleep(PAUSE * (1 << (look - 1)));
                }
                self.programs.contains(node)
            })
    }

    fn of(&self, flags: i32) -> impl Iterator<Item = &Counts> {
        let writers = asks_for_writing(flags).then_some(&self.writers);
        let programs = asks_for_running(flags).then_some(&self.programs);
        writers.into_iter().chain(programs)
    }
}

/// Files with numbers of their handles.
#[derive(Default)]
struct Counts {
    shards: [Mutex<HashMap<NodeId, u32>>; SHARDS],
}

impl Counts {
    fn shard(&self, node: NodeId) -> &Mutex<HashMap<NodeId, u32>> {
        &self.shards[node.0 as usize % SHARDS]
    }

    fn add(&self, node: NodeId) {
        *self.shard(node).lock().entry(node).or_default() += 1;
    }

    fn remove(&self, node: NodeId) {
        let mut shard = self.shard(node).lock();
        if let Some(count) = shard.get_mut(&node) {
            *count -= 1;
            if *count == 0 {
                shard.remove(&node);
            }
        }
    }

    fn contains(&self, node: NodeId) -> bool {
        self.shard(node).lock().contains_key(&node)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const NODE: NodeId = NodeId(40);

    #[test]
    fn a_file_is_written_as_long_as_one_writer_is_open() {
        let opens = Opens::default();
        opens.opened(NODE, libc::O_RDONLY);
        assert!(!opens.is_written(NODE));
        opens.opened(NODE, libc::O_WRONLY | libc::O_APPEND);
        opens.opened(NODE, libc::O_RDWR);
        opens.released(NODE, libc::O_RDWR);
        assert!(opens.is_written(NODE));
        opens.released(NODE, libc::O_WRONLY | libc::O_APPEND);
        assert!(!opens.is_written(NODE));
        opens.released(NODE, libc::O_RDWR);
    }

    #[test]
    fn only_what_cuts_off_a_running_program_unasked_is_refused() {
        let opens = Opens::default();
        let cuts = libc::O_RDONLY | libc::O_TRUNC;
        assert!(!opens.cuts_program(NODE, cuts));
        opens.opened(NODE, EXEC);
        assert!(opens.cuts_program(NODE, cuts));
        assert!(!opens.cuts_program(NodeId(41), cuts));
        // Of these the kernel has seen to it.
        assert!(!opens.cuts_program(NODE, libc::O_WRONLY | libc::O_TRUNC));
        assert!(!opens.cuts_program(NODE, libc::O_RDONLY));
        opens.released(NODE, EXEC);
        assert!(!opens.cuts_program(NODE, cuts));
    }
}
