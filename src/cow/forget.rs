//! The end of a node: it leaves the table when nobody refers to it any more, and takes what a removed object has left.

use std::ops::Deref;
use std::os::fd::AsFd;
use std::sync::Arc;
use std::sync::atomic::Ordering;

use super::chunks::Chunks;
use super::node::{Forgotten, Node, Orphan};
use super::types::NodeId;
use super::union::Union;
use super::upper::remove_tree;
use crate::sys::fs;
use crate::sys::process;

/// A node that is given back when this is dropped, so that no error on the way leaves it in the table.
pub(super) struct Held<'a> {
    // Dropped before the table is asked who else has it.
    node: Arc<Node>,
    _end: LetGo<'a>,
}

impl Deref for Held<'_> {
    type Target = Arc<Node>;

    fn deref(&self) -> &Arc<Node> {
        &self.node
    }
}

struct LetGo<'a> {
    union: &'a Union,
    id: NodeId,
}

impl Drop for LetGo<'_> {
    fn drop(&mut self) {
        self.union.settle(self.id, 0);
    }
}

impl Union {
    /// Gives back lookups; the node is dropped when nothing refers to it any more.
    pub fn forget(&self, node: NodeId, lookups: u64) {
        self.settle(node, lookups);
        if self.table.shrink() {
            process::give_back_memory();
        }
        // What an operation held while it was forgotten is looked at again.
        if self.busy_count.load(Ordering::Relaxed) > 0 {
            let busy = std::mem::take(&mut *self.busy.lock());
            self.busy_count.store(0, Ordering::Relaxed);
            for id in busy {
                self.settle(id, 0);
            }
        }
    }

    /// A node that an operation has looked up for itself, given back whatever becomes of the operation.
    pub(super) fn hold(&self, node: Arc<Node>) -> Held<'_> {
        let id = node.id;
        Held {
            node,
            _end: LetGo { union: self, id },
        }
    }

    /// Drops a node that an operation has looked up for itself, unless somebody else refers to it.
    pub(super) fn let_go(&self, node: Arc<Node>) {
        drop(self.hold(node));
    }

    fn settle(&self, node: NodeId, lookups: u64) {
        let mut pending = vec![(node, lookups)];
        while let Some((id, lookups)) = pending.pop() {
            match self.table.forget(id, lookups) {
                Forgotten::Unknown | Forgotten::InUse => {}
                Forgotten::Busy => {
                    let is_parent = self.table.get(id).is_some_and(|node| {
                        node.directory
                            .as_ref()
                            .is_some_and(|directory| !directory.state.read().children.is_empty())
                    });
                    // A parent is looked at again when its last child goes.
                    if !is_parent {
                        let mut busy = self.busy.lock();
                        busy.push(id);
                        self.busy_count.store(busy.len(), Ordering::Relaxed);
                    }
                }
                Forgotten::Dropped(node) => {
                    let (names, rare) = {
                        let mut place = node.place.write();
                        (
                            std::mem::take(&mut place.names),
                            std::mem::take(&mut place.rare),
                        )
                    };
                    if let Some(orphan) = rare.orphan.clone() {
                        self.drop_orphan(orphan, rare.chunks.as_deref());
                    }
                    drop(node);
                    for name in names {
                        if let Some(directory) = &name.parent.directory {
                            let mut state = directory.state.write();
                            if state.children.get(&name.name) == Some(&id)
                                && self.table.get(id).is_none()
                            {
                                state.children.remove(&name.name);
                            }
                        }
                        let parent = name.parent.id;
                        drop(name);
                        pending.push((parent, 0));
                    }
                }
            }
        }
    }

    /// Nobody uses a removed object any more.
    pub(super) fn drop_orphan(&self, orphan: Orphan, chunks: Option<&Chunks>) {
        let Some(upper) = &self.upper else { return };
        let (stat, mine) = match &orphan {
            Orphan::Fd(fd) => (fs::fstat(fd.as_fd()), 0),
            Orphan::Work(name) => (fs::fstatat(upper.work(), name), 1),
        };
        // It may have names that nobody has looked up.
        if let (Some(chunks), Ok(stat)) = (chunks, stat)
            && stat.st_nlink <= mine
        {
            self.drop_chunks(chunks);
        }
        match orphan {
            Orphan::Fd(_) => {
                upper.orphan_fds.fetch_sub(1, Ordering::Relaxed);
            }
            Orphan::Work(name) => remove_tree(upper.work(), &name),
        }
    }
}
