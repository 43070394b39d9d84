//! Layers that were mended below the union.
//!
//! What was read of such a layer before may be wrong, and a file that was opened may be one that another has taken the place of. So
//! all of it is forgotten. Whoever opens a file meanwhile may have found out about it before, and so does not keep it.

use std::sync::Arc;
use std::sync::atomic::{Ordering, fence};

use super::file::Backing;
use super::node::Node;
use super::types::NodeId;
use super::union::Union;

/// A time between two refreshes.
pub(super) struct Round(u64);

impl Union {
    /// Has all layers that can be mended in use be read and compared once more. Answers the nodes that show anything of them: what
    /// others keep of these from before is to be dropped now. An operation that has begun before ends with what it has opened.
    pub fn refresh(&self) -> Vec<NodeId> {
        let refreshed: Vec<bool> = self.lowers.iter().map(|lower| lower.refresh()).collect();
        if !refreshed.contains(&true) {
            return Vec::new();
        }
        self.refreshes.fetch_add(1, Ordering::Release);
        // With the one in `keep`: either that sees that it has come too late, or what it keeps is dropped here.
        fence(Ordering::SeqCst);
        let mut ids = self.table.ids();
        ids.retain(|id| {
            let Some(node) = self.table.get(*id) else {
                return false;
            };
            let node = self.hold(node);
            let shows = {
                let place = node.place.read();
                place.lowers.iter().any(|at| refreshed[at.layer])
            };
            if shows {
                node.io.clear();
            }
            shows
        });
        ids
    }

    /// To be asked before a file is opened that is kept.
    pub(super) fn round(&self) -> Round {
        Round(self.refreshes.load(Ordering::Acquire))
    }

    /// Keeps what was opened for a node in `round`, if that is not over.
    pub(super) fn keep(&self, node: &Node, backing: &Arc<Backing>, round: &Round) {
        node.io.set(&self.budget, Arc::clone(backing));
        fence(Ordering::SeqCst);
        if self.refreshes.load(Ordering::Relaxed) != round.0 {
            node.io.clear();
        }
    }
}
