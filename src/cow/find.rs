//! From a number to a node: for file handles that outlive what the kernel and the table remember.

use std::sync::Arc;

use nix::errno::Errno;

use super::error::Result;
use super::forget::Held;
use super::node::Node;
use super::types::{Entry, FileKind, NodeId};
use super::union::Union;

impl Union {
    /// The object with this number; counts as one lookup. What nobody remembers is searched for in the
    /// whole tree: a number says nothing of the way to it, and a table of all numbers that were ever
    /// shown would have no bound.
    pub(super) fn lookup_number(&self, id: NodeId) -> Result<Entry> {
        if let Some(node) = self.table.count_lookup(id) {
            let entry = self.entry_of(node, None)?;
            if entry.attr.nlink > 0 {
                return Ok(entry);
            }
            // The kernel asks for what it has no inode of, so nobody has it open, and its FORGET is under way.
            self.forget(id, 1);
            return Err(Errno::ENOENT.into());
        }
        let mut pending = vec![self.hold(self.node(NodeId::ROOT)?)];
        while let Some(dir) = pending.pop() {
            if let Some(found) = self.find_in(&dir, id, &mut pending)? {
                return self.entry_of(found, None);
            }
        }
        Err(Errno::ENOENT.into())
    }

    /// Looks for a number in one directory; adds those below it to `pending`.
    fn find_in<'a>(
        &'a self,
        dir: &Arc<Node>,
        id: NodeId,
        pending: &mut Vec<Held<'a>>,
    ) -> Result<Option<Arc<Node>>> {
        let items = {
            let state = Self::directory(dir)?.state.read();
            if state.removed {
                return Ok(None);
            }
            self.merge(dir, &state)?
        };
        for item in items {
            let is_directory = item.kind == FileKind::Directory;
            if !is_directory && item.ino.is_some_and(|number| number != id) {
                continue;
            }
            let node = match self.child(dir, &item.name, false) {
                Ok((node, _)) => self.hold(node),
                // Removed since it was listed.
                Err(error) if error.is(Errno::ENOENT) => continue,
                Err(error) => return Err(error),
            };
            if node.id == id
                && let Some(node) = self.table.count_lookup(id)
            {
                return Ok(Some(node));
            }
            if is_directory {
                pending.push(node);
            }
        }
        Ok(None)
    }
}
