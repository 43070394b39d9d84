//! Attributes of objects. Of the extended ones that a stream gives, an object has those that one in a file system could have.
//!
//! containerd leaves out what the file system does not take, and so does whoever wants its tree. What a mount shows has to be
//! such that a copy of the object can have it, too.

use std::collections::BTreeMap;

use super::{Body, Fault, Id, Tree, XATTR};
use crate::store::error::printable;
use crate::store::format::tables::Xattrs;
use crate::store::layer::index::{Action, LayerEntry, LayerIndex};

/// Access to an object, and what is made in a directory gets.
const ACCESS: &[u8] = b"system.posix_acl_access";
const DEFAULT: &[u8] = b"system.posix_acl_default";

/// What becomes of an attribute.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Fate {
    /// The object has it.
    Had,
    /// The object has no attribute of this name.
    Taken,
    /// Nothing: there is no such attribute.
    LeftOut,
}

/// What a layer says of extended attributes that its objects cannot have: the first, and how many there are.
#[derive(Debug)]
pub(in crate::store::view) struct LeftOut {
    pub(in crate::store::view) path: String,
    pub(in crate::store::view) attribute: String,
    pub(in crate::store::view) count: u64,
}

impl Tree {
    /// Sets owner, extended attributes, mode and times, in that order: a new owner takes a file's capabilities.
    pub(super) fn set_attributes(
        &mut self,
        index: &LayerIndex,
        entry: &LayerEntry,
        node: Id,
        path: &[&[u8]],
    ) -> Result<(), Fault> {
        let inode = &entry.inode;
        let Some(known) = self.node(node) else {
            return Ok(());
        };
        let mut xattrs: BTreeMap<Vec<u8>, Vec<u8>> = match entry.action {
            Action::MakeExactly => BTreeMap::new(),
            _ => self.xattrs(known.xattrs).iter().cloned().collect(),
        };
        if !matches!(known.body, Body::Directory(_)) {
            xattrs.remove(b"security.capability".as_slice());
        }
        let kind = u32::from(known.mode) & libc::S_IFMT;
        // What was committed is what a file system had.
        let is_told = index.diff_id().is_some();
        for (name, value) in index.xattrs(inode.xattrs)? {
            let fate = match is_told {
                true => fate(kind, name, value),
                false => Fate::Had,
            };
            match fate {
                Fate::Had => {
                    xattrs.insert(name.to_vec(), value.to_vec());
                }
                Fate::Taken => {
                    xattrs.remove(name);
                }
                Fate::LeftOut => {
                    let first = || LeftOut {
                        path: printable(&path.join(&b'/')),
                        attribute: printable(name),
                        count: 0,
                    };
                    self.left_out.get_or_insert_with(first).count += 1;
                }
            }
        }
        let xattrs = self.set(xattrs.into_iter().collect())?;
        if let Some(node) = self.nodes.get_mut(node as usize) {
            node.xattrs = xattrs;
            (node.uid, node.gid) = (inode.uid, inode.gid);
            (node.mtime, node.atime) = (inode.mtime, inode.atime);
            // A symbolic link's mode is fixed.
            if !matches!(node.body, Body::Symlink(_)) {
                node.mode = node.mode & !0o7777 | inode.mode & 0o7777;
            }
        }
        Ok(())
    }

    fn set(&mut self, xattrs: Xattrs) -> Result<u32, Fault> {
        if xattrs.is_empty() {
            return Ok(0);
        }
        let bytes = xattrs.iter().map(|(name, value)| name.len() + value.len());
        let bytes = bytes.sum();
        self.effort.step(xattrs.len())?;
        self.effort.attributes(bytes)?;
        if let Some(known) = self.known_sets.get(&xattrs) {
            return Ok(*known);
        }
        self.effort.hold(2 * (bytes + xattrs.len() * XATTR))?;
        // There are fewer sets than nodes, which `add` counts.
        let set = self.sets.len() as u32;
        self.sets.push(xattrs.clone());
        self.known_sets.insert(xattrs, set);
        Ok(set)
    }
}

/// What setting an attribute of an object of the type `kind` comes to.
fn fate(kind: u32, name: &[u8], value: &[u8]) -> Fate {
    let is_acl_of = match name {
        ACCESS => kind != libc::S_IFLNK,
        DEFAULT => kind == libc::S_IFDIR,
        _ => {
            let within = |prefix: &[u8]| name.len() > prefix.len() && name.starts_with(prefix);
            let user = within(b"user.") && matches!(kind, libc::S_IFREG | libc::S_IFDIR);
            return match user || within(b"security.") {
                true => Fate::Had,
                false => Fate::LeftOut,
            };
        }
    };
    match acl(value) {
        Some(0) if is_acl_of => Fate::Taken,
        Some(_) if is_acl_of => Fate::Had,
        _ => Fate::LeftOut,
    }
}

/// The entries of an ACL; `None` if it is none, as `posix_acl_valid` in fs/posix_acl.c has it. An empty value is one
/// without entries.
fn acl(value: &[u8]) -> Option<usize> {
    const VERSION: [u8; 4] = 2u32.to_le_bytes();
    if value.is_empty() {
        return Some(0);
    }
    let entries = value.strip_prefix(&VERSION)?;
    if !entries.len().is_multiple_of(8) {
        return None;
    }
    // What may come: the owner, users, the owning group, groups, the mask, others, the end.
    let (mut next, mut needs_mask) = (0, false);
    for entry in entries.chunks_exact(8) {
        let tag = u16::from_le_bytes([entry[0], entry[1]]);
        let perm = u16::from_le_bytes([entry[2], entry[3]]);
        let somebody = entry[4..] != [0xff; 4];
        next = match (tag, next) {
            (0x01, 0) => 1,
            (0x02, 1) if somebody => 1,
            (0x04, 1) => 2,
            (0x08, 2) if somebody => 2,
            (0x10, 2) => 3,
            (0x20, 3) => 4,
            (0x20, 2) if !needs_mask => 4,
            _ => return None,
        };
        needs_mask |= matches!(tag, 0x02 | 0x08);
        if perm > 0o7 {
            return None;
        }
    }
    (entries.is_empty() || next == 4).then_some(entries.len() / 8)
}
