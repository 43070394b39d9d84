//! Where the content of a file lies: for whoever makes a layer of what the union shows, and does not want to read what
//! the layers below have.

use std::sync::Arc;

use super::error::Result;
use super::file::Backing;
use super::lower::Stored;
use super::node::{LowerAt, Node};
use super::types::{FileKind, NodeId};
use super::union::Union;
use crate::store::view::StoredPart;
use crate::sys::handle::Handle;

/// A part of a regular file that is no hole.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ContentPart {
    /// A packed layer has it.
    Stored(StoredPart),
    /// It is to be read through the union.
    Own {
        /// Where it starts in the file.
        offset: u64,
        /// Its bytes.
        length: u64,
    },
}

impl Union {
    /// The parts of a regular file that are no holes, in order.
    pub fn content_of(&self, node: NodeId) -> Result<Vec<ContentPart>> {
        let node = self.node(node)?;
        let size = self.attr_of_node(&node)?.size;
        let mut parts = Vec::new();
        let stored = match node.in_upper() {
            true => None,
            false => self.data_of(&node)?,
        };
        let Some(stored) = stored else {
            self.own_parts(&node, 0, size, &mut parts)?;
            return Ok(parts);
        };
        let is_partial = node.place.read().rare.chunks.is_some();
        if !is_partial {
            add_stored(&stored, 0, size, &mut parts);
            return Ok(parts);
        }
        let backing = self.io(&node, false)?;
        let Backing::Partial(partial) = &*backing else {
            self.own_parts(&node, 0, size, &mut parts)?;
            return Ok(parts);
        };
        let mut at = 0;
        while at < size {
            let (end, is_lower) = partial.run(at, size);
            match is_lower {
                true => add_stored(&stored, at, end, &mut parts),
                false => self.own_parts(&node, at, end, &mut parts)?,
            }
            at = end;
        }
        Ok(parts)
    }

    /// Which inode of the packed layers' view a node is, if nothing of it is in a layer above those.
    pub fn stored_inode(&self, node: NodeId) -> Result<Option<u32>> {
        match self.topmost_lower(node)? {
            Some(top) => Ok(top.object.stored()?.map(|stored| stored.inode)),
            None => Ok(None),
        }
    }

    /// What tells the object of a lower layer that a node is from all others of the lower layers, if nothing of it
    /// is in the upper.
    pub fn lower_identity(&self, node: NodeId) -> Result<Option<(u64, u64)>> {
        match self.topmost_lower(node)? {
            Some(top) => Ok(Some((top.object.number_space(), top.object.attr()?.ino))),
            None => Ok(None),
        }
    }

    /// What its file system calls that object, if it can tell: unlike its number it comes to no other once the object is gone.
    pub fn lower_handle(&self, node: NodeId) -> Result<Option<Handle>> {
        let top = self.topmost_lower(node)?;
        let origin = top.and_then(|top| top.object.origin());
        Ok(origin.map(|origin| origin.handle))
    }

    fn topmost_lower(&self, node: NodeId) -> Result<Option<LowerAt>> {
        Ok(self.node(node)?.seen_lower())
    }

    /// What the store knows of the data of a file that has not come up.
    fn data_of(&self, node: &Node) -> Result<Option<Stored>> {
        let lowers = node.place.read().lowers.clone();
        match &*lowers {
            // Of a copy that others may be writing to nobody knows how much will lie below when it is read.
            [_, _, ..] if self.reads_upper => Ok(None),
            [.., data] => data.object.stored(),
            [] => Ok(None),
        }
    }

    /// Adds what of a range is no hole, as something to read.
    fn own_parts(
        &self,
        node: &Arc<Node>,
        from: u64,
        to: u64,
        parts: &mut Vec<ContentPart>,
    ) -> Result<()> {
        debug_assert_eq!(node.kind, FileKind::Regular);
        let mut at = from;
        while at < to {
            let Some(offset) = self.seek_of(node, at, libc::SEEK_DATA)? else {
                break;
            };
            if offset >= to {
                break;
            }
            let end = self.seek_of(node, offset, libc::SEEK_HOLE)?.unwrap_or(to);
            let end = end.clamp(offset + 1, to);
            parts.push(ContentPart::Own {
                offset,
                length: end - offset,
            });
            at = end;
        }
        Ok(())
    }

    /// `None` past the last data. A file system that cannot tell has nothing but data.
    fn seek_of(&self, node: &Node, from: u64, whence: i32) -> Result<Option<u64>> {
        let offset = i64::try_from(from).unwrap_or(i64::MAX);
        match self.lseek(node.id, None, offset, whence) {
            Ok(found) => Ok(u64::try_from(found).ok()),
            Err(error) if error.errno == libc::ENXIO => Ok(None),
            Err(error) if error.errno == libc::EINVAL && whence == libc::SEEK_DATA => {
                Ok(Some(from))
            }
            Err(error) if error.errno == libc::EINVAL => Ok(None),
            Err(error) => Err(error),
        }
    }
}

/// Adds what of a range the store has.
fn add_stored(stored: &Stored, from: u64, to: u64, parts: &mut Vec<ContentPart>) {
    for part in &stored.parts {
        let start = part.offset.max(from);
        let end = (part.offset + part.length).min(to);
        if start < end {
            parts.push(ContentPart::Stored(StoredPart {
                offset: start,
                length: end - start,
                object: part.object,
                object_offset: part.object_offset + (start - part.offset),
            }));
        }
    }
}
