//! The index of a merged view, made from the tree that layers left.

use std::collections::HashMap;
use std::io::{self, Write};

use super::merged::Merged;
use super::tree::{Body, Id, Node, ROOT, Tree};
use crate::store::error::Result;
use crate::store::format::ViewKey;
use crate::store::format::index_file::{Identity, IndexWriter, Kind, Section};
use crate::store::format::tables::{Inode, ObjectTable, Tables, next};
use crate::store::layer::index::LayerIndex;
use crate::store::object::{Objects, Place};
use crate::store::pack::PackId;

/// Stands for a file of its own in a location.
const OWN_FILE: u32 = u32::MAX;
/// No inode has this number.
const NONE: u32 = u32::MAX;

/// A view that is ready to be written.
pub(in crate::store) struct Built {
    writer: IndexWriter,
    key: ViewKey,
}

impl Built {
    /// Writes it.
    pub(in crate::store) fn write(self, out: &mut impl Write) -> io::Result<()> {
        let identity = Identity {
            key: self.key.0,
            tar_bytes: 0,
        };
        self.writer.write(out, Kind::View, &identity).map(drop)
    }
}

/// Bytes of all regular files of the tree of `layers`, the lowest first. A file may have 63 bits of them, so the sum has more
/// than 64.
pub(in crate::store) fn logical(layers: &[LayerIndex]) -> Result<u128> {
    let Merged { tree, .. } = Merged::of(layers)?;
    let nodes = Builder::number(&tree).order;
    let nodes = nodes.into_iter().filter_map(|id| tree.node(id));
    let files = nodes.filter(|node| matches!(node.body, Body::Whole(_) | Body::Sparse(..)));
    Ok(files.map(|node| u128::from(node.size)).sum())
}

/// Builds the view of a chain, whose contents are in `objects`, or should be.
pub(in crate::store) fn build(chain: &Merged, objects: &Objects) -> Result<Built> {
    let mut writer = IndexWriter::default();
    let mut builder = Builder::number(&chain.tree);
    builder.add_all()?;
    builder.finish(&mut writer, objects)?;
    let names = chain.layers();
    let layers = names.iter().flat_map(|name| name.0).collect();
    writer.section(Section::Layers, layers);
    Ok(Built {
        writer,
        key: ViewKey::of(names),
    })
}

struct Builder<'a> {
    tree: &'a Tree,
    /// Nodes by the numbers of their inodes.
    order: Vec<Id>,
    /// Numbers of inodes by nodes.
    numbers: Vec<u32>,
    /// Names of each inode, and for a directory the directories in it.
    links: Vec<u32>,
    inodes: Vec<u8>,
    entries: Vec<u8>,
    names: Vec<u8>,
    tables: Tables,
    objects: ObjectTable,
}

impl<'a> Builder<'a> {
    /// Numbers what is in the tree, the names of a directory one after the other.
    fn number(tree: &'a Tree) -> Self {
        let mut order = vec![ROOT];
        let mut numbers = vec![NONE; tree.len()];
        let mut links = vec![0];
        numbers[ROOT as usize] = 0;
        let mut at = 0;
        while let Some(id) = order.get(at).copied() {
            if let Some(Body::Directory(directory)) = tree.node(id).map(|node| &node.body) {
                links[at] += 1;
                for child in directory.children.values() {
                    // A tree has no child that is not a node of it.
                    let Some(number) = numbers.get_mut(child.node as usize) else {
                        continue;
                    };
                    if *number == NONE {
                        // Fewer than nodes, whose numbers have 32 bits.
                        *number = order.len() as u32;
                        order.push(child.node);
                        links.push(0);
                    }
                    links[*number as usize] += 1;
                    let is_directory = tree
                        .node(child.node)
                        .is_some_and(|node| matches!(node.body, Body::Directory(_)));
                    if is_directory {
                        links[at] += 1;
                    }
                }
            }
            at += 1;
        }
        // Its own dot-dot.
        links[ROOT as usize] += 1;
        Self {
            tree,
            order,
            numbers,
            links,
            inodes: Vec::new(),
            entries: Vec::new(),
            names: Vec::new(),
            tables: Tables::default(),
            objects: ObjectTable::default(),
        }
    }

    fn add_all(&mut self) -> Result<()> {
        let tree = self.tree;
        for (id, links) in self.order.clone().into_iter().zip(self.links.clone()) {
            let Some(node) = tree.node(id) else {
                continue;
            };
            let inode = self.inode(node, links)?;
            let bytes = self.tables.inode(&inode)?;
            self.inodes.extend_from_slice(&bytes);
        }
        Ok(())
    }

    fn inode(&mut self, node: &Node, links: u32) -> Result<Inode> {
        let xattrs = self.tree.xattrs(node.xattrs).to_vec();
        let mut inode = Inode {
            mode: node.mode,
            links,
            uid: node.uid,
            gid: node.gid,
            mtime: node.mtime,
            atime: node.atime,
            xattrs: self.tables.xattr_set(&xattrs)?,
            size: node.size,
            ..Inode::default()
        };
        match &node.body {
            Body::Directory(directory) => {
                inode.start = u64::from(next(&self.entries, Section::DirEntries)?);
                inode.count = directory.children.len() as u32;
                for (name, child) in &directory.children {
                    self.entry(name, child.node, child.layer)?;
                }
            }
            Body::Whole(None) | Body::Other => {}
            Body::Whole(Some(object)) => {
                inode.start = u64::from(self.objects.number(*object)?);
                inode.whole = true;
            }
            Body::Sparse(extents, objects) => {
                let numbers = objects
                    .iter()
                    .map(|object| self.objects.number(*object))
                    .collect::<Result<Vec<_>>>()?;
                let mut extents = extents.clone();
                for extent in &mut extents {
                    let number = numbers.get(extent.object as usize);
                    // The tree made them of one list.
                    extent.object = number.copied().unwrap_or(NONE);
                }
                inode.start = self.tables.extents(&extents)?;
                inode.count = extents.len() as u32;
            }
            Body::Symlink(target) => {
                inode.start = self.tables.text(target)?;
                inode.count = target.len() as u32;
            }
        }
        Ok(inode)
    }

    fn entry(&mut self, name: &[u8], node: Id, layer: u16) -> Result<()> {
        next(&self.entries, Section::DirEntries)?;
        let start = next(&self.names, Section::Names)?;
        let number = self.numbers.get(node as usize).copied().unwrap_or(NONE);
        let kind = self.tree.node(node).map_or(0, |node| node.mode >> 12);
        self.names.extend_from_slice(name);
        self.entries.extend_from_slice(&start.to_le_bytes());
        self.entries.extend_from_slice(&number.to_le_bytes());
        self.entries.extend_from_slice(&prefix(name).to_le_bytes());
        // A name has at most 255 bytes, and a type four bits.
        self.entries
            .extend_from_slice(&[name.len() as u8, kind as u8]);
        self.entries.extend_from_slice(&layer.to_le_bytes());
        Ok(())
    }

    fn finish(self, writer: &mut IndexWriter, objects: &Objects) -> Result<()> {
        let mut packs = Vec::new();
        let mut known = HashMap::new();
        let mut locations = Vec::new();
        let mut missing = 0;
        for object in self.objects.objects() {
            let place = objects.find(&object.name)?;
            missing += u64::from(place.is_none());
            let (pack, stored, offset) = match place {
                // One that is missing is missed when it is read, and only there. What brings it back has it found by its name.
                Some(Place::File) | None => (OWN_FILE, 0, 0),
                Some(Place::Packed {
                    pack,
                    offset,
                    stored,
                }) => (pack_number(&mut packs, &mut known, pack)?, stored, offset),
            };
            locations.extend_from_slice(&pack.to_le_bytes());
            locations.extend_from_slice(&stored.to_le_bytes());
            locations.extend_from_slice(&offset.to_le_bytes());
        }
        if missing > 0 {
            tracing::warn!(
                missing,
                "contents of a view are not in the store: reading their files is EIO until `snapctl system repair` has brought them back"
            );
        }
        writer.section(Section::Inodes, self.inodes);
        writer.section(Section::DirEntries, self.entries);
        writer.section(Section::Names, self.names);
        self.objects.finish(writer);
        writer.section(Section::Locations, locations);
        writer.section(Section::Packs, packs);
        self.tables.finish(writer);
        Ok(())
    }
}

fn pack_number(packs: &mut Vec<u8>, known: &mut HashMap<PackId, u32>, pack: PackId) -> Result<u32> {
    if let Some(number) = known.get(&pack) {
        return Ok(*number);
    }
    let number = next(packs, Section::Packs)?;
    packs.extend_from_slice(&pack.0);
    known.insert(pack, number);
    Ok(number)
}

/// The first four bytes of a name as a number that sorts as the names do.
pub(super) fn prefix(name: &[u8]) -> u32 {
    let mut bytes = [0; 4];
    let length = name.len().min(4);
    bytes[..length].copy_from_slice(&name[..length]);
    u32::from_be_bytes(bytes)
}
