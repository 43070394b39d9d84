//! What others need who read the data of lower files without asking the union for it.
//!
//! They may do so as long as nobody writes the file: `reads_lower` says whether its data still lies where
//! `lower_data` has opened it. It stays there until an operation copies it up, all of which but the
//! completing of files, which changes no data, are done for a request to write or to truncate.

use std::ffi::OsString;
use std::os::fd::BorrowedFd;
use std::sync::Arc;

use super::error::Result;
use super::file::Backing;
use super::lower::LowerFile;
use super::types::{FileKind, NodeId};
use super::union::Union;

/// Data that lies in a lower layer alone.
pub struct LowerData(Arc<dyn LowerFile>);

impl LowerData {
    /// A descriptor of it that nobody can write by.
    pub fn fd(&self) -> Option<BorrowedFd<'_>> {
        self.0.sealed_fd()
    }
}

impl Union {
    /// The data of a regular file, if it lies in a lower layer alone and can be handed out.
    pub fn lower_data(&self, node: NodeId) -> Result<Option<LowerData>> {
        let node = self.node(node)?;
        if node.kind != FileKind::Regular || node.in_upper() {
            return Ok(None);
        }
        Ok(match &*self.io(&node, false)? {
            Backing::Lower(file) if file.sealed_fd().is_some() => Some(LowerData(Arc::clone(file))),
            _ => None,
        })
    }

    /// Whether the data of a file still lies in a lower layer alone.
    pub fn reads_lower(&self, node: NodeId) -> bool {
        self.table
            .get(node)
            .is_some_and(|node| !node.in_upper() && node.place.read().rare.chunks.is_none())
    }

    /// Says that a file is read, the data of which lies in a lower layer: its access time moves.
    pub fn is_read(&self, node: NodeId) {
        if let Some(node) = self.table.get(node) {
            self.touch_data(&node);
        }
    }

    /// Whether there is a node with this id: whoever has looked it up has not given it back.
    pub fn knows(&self, node: NodeId) -> bool {
        self.table.get(node).is_some()
    }

    /// Keeps a node that somebody has looked up from being forgotten, until [`Union::forget`] gives that back; says whether
    /// there is one.
    pub fn remember(&self, node: NodeId) -> bool {
        self.table.count_lookup(node).is_some()
    }

    /// A number that no node has nor ever gets.
    pub fn spare_number(&self) -> NodeId {
        self.numbers.fresh()
    }

    /// The names of a node that were looked up, each with its directory.
    pub fn names(&self, node: NodeId) -> Vec<(NodeId, OsString)> {
        let Some(node) = self.table.get(node) else {
            return Vec::new();
        };
        let place = node.place.read();
        let names = place.names.iter();
        names
            .map(|name| (name.parent.id, name.name.to_os_string()))
            .collect()
    }
}
