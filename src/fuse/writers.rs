//! Which files may have dirty pages in the kernel: those that are open for writing.

use std::collections::HashMap;

use parking_lot::Mutex;

use crate::cow::NodeId;

/// Shards of the table: a power of two.
const SHARDS: usize = 16;

/// Counts the open handles of each file that allow writing. A mapping holds its file open, so no
/// page of a file that is not counted here can be dirty.
#[derive(Default)]
pub struct Writers {
    shards: [Mutex<HashMap<NodeId, u32>>; SHARDS],
}

/// Whether open(2)'s flags ask for writing.
pub fn asks_for_writing(flags: i32) -> bool {
    flags & libc::O_ACCMODE != libc::O_RDONLY
}

impl Writers {
    fn shard(&self, node: NodeId) -> &Mutex<HashMap<NodeId, u32>> {
        &self.shards[node.0 as usize % SHARDS]
    }

    /// The file was opened with these flags.
    pub fn opened(&self, node: NodeId, flags: i32) {
        if asks_for_writing(flags) {
            *self.shard(node).lock().entry(node).or_default() += 1;
        }
    }

    /// A handle that was opened with these flags is gone.
    pub fn released(&self, node: NodeId, flags: i32) {
        if !asks_for_writing(flags) {
            return;
        }
        let mut shard = self.shard(node).lock();
        if let Some(count) = shard.get_mut(&node) {
            *count -= 1;
            if *count == 0 {
                shard.remove(&node);
            }
        }
    }

    /// Whether the file is open for writing.
    pub fn contains(&self, node: NodeId) -> bool {
        self.shard(node).lock().contains_key(&node)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_file_is_in_as_long_as_one_writer_is_open() {
        let writers = Writers::default();
        let node = NodeId(40);
        writers.opened(node, libc::O_RDONLY);
        assert!(!writers.contains(node));
        writers.opened(node, libc::O_WRONLY | libc::O_APPEND);
        writers.opened(node, libc::O_RDWR);
        writers.released(node, libc::O_RDWR);
        assert!(writers.contains(node));
        writers.released(node, libc::O_WRONLY | libc::O_APPEND);
        assert!(!writers.contains(node));
        writers.released(node, libc::O_RDWR);
    }
}
