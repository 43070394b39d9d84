//! What a snapshot changes as entries of a packed layer: everything that a user of its mount can see.
//!
//! Of what lies in the layers below no content is read: the new layer names the objects that are there.

use std::collections::HashSet;

use super::entries::{Fault, Object, Output, at, tell};
use super::{Change, Path};
use crate::cow::{ContentPart, FileKind, NodeId, Timestamp, Union};
use crate::snapshotter::types::*;
use crate::store::ingest::NewLayer;
use crate::store::layer::index::{Attributes, Body};
use crate::store::view::View;
use crate::store::{Extent, ObjectName, Time};

const BUFFER: usize = 256 << 10;
/// A file that is changed in part again and again is written whole once it has come to so many objects: each is opened
/// by whoever opens the file.
const MOST_OBJECTS: usize = 8;
/// As well once it has come to so many parts.
const MOST_PARTS: usize = 100_000;

/// Tells the root, and the changes, which are in the order of a walk, of the union `new`. `view` is that of the
/// packed layers in it.
pub(in crate::snapshotter) fn write(
    changes: &[Change],
    new: &Union,
    view: Option<&View>,
    layer: &mut NewLayer<'_, '_>,
) -> Result<()> {
    let mut packing = Packing {
        layer,
        buffer: vec![0; BUFFER],
    };
    let root = Object {
        path: b"",
        union: new,
        node: NodeId::ROOT,
        attr: &new.getattr(NodeId::ROOT, None)?,
    };
    packing
        .object(&root)
        .map_err(|fault| at(Path::new("/"), fault))?;
    tell(changes, new, view, &mut packing)
}

struct Packing<'a, 'l, 's> {
    layer: &'a mut NewLayer<'l, 's>,
    buffer: Vec<u8>,
}

impl Output for Packing<'_, '_, '_> {
    fn object(&mut self, object: &Object<'_>) -> Result<(), Fault> {
        let attributes = attributes_of(object)?;
        let body = match object.attr.kind {
            FileKind::Regular => self.content(object)?,
            FileKind::Symlink => Body::Target(object.target()?),
            FileKind::CharDevice | FileKind::BlockDevice => {
                let (major, minor) = object.device()?;
                Body::Device { major, minor }
            }
            FileKind::Directory | FileKind::Fifo | FileKind::Socket => Body::Nothing,
        };
        Ok(self.layer.make(&names(object.path), &attributes, &body)?)
    }

    fn link(&mut self, object: &Object<'_>, target: &[u8]) -> Result<(), Fault> {
        let attributes = attributes_of(object)?;
        Ok(self.layer.link(&names(object.path), &attributes, target)?)
    }

    fn remove(&mut self, path: &[u8]) -> Result<(), Fault> {
        Ok(self.layer.remove(&names(path))?)
    }
}

impl Packing<'_, '_, '_> {
    fn content(&mut self, object: &Object<'_>) -> Result<Body, Fault> {
        let size = object.attr.size;
        if size == 0 {
            return Ok(Body::Whole { size, content: 0 });
        }
        let mut parts = object.union.content_of(object.node)?;
        if is_scattered(&parts) {
            parts = to_read(&parts);
        }
        let own = self.own(object, &parts)?;
        let mut extents = Vec::with_capacity(parts.len());
        let mut own_offset = 0;
        let mut known: Vec<(ObjectName, u32)> = Vec::new();
        for part in &parts {
            let extent = match part {
                ContentPart::Own { offset, length } => {
                    let object_offset = own_offset;
                    own_offset += length;
                    Extent {
                        offset: *offset,
                        length: *length,
                        object_offset,
                        object: own,
                    }
                }
                ContentPart::Stored(part) => {
                    let name = part.object.name;
                    let number = match known.iter().find(|(known, _)| *known == name) {
                        Some((_, number)) => *number,
                        None => {
                            let number = self.layer.known(part.object)?;
                            if part.object.size == size && part.length == size {
                                let content = number;
                                return Ok(Body::Whole { size, content });
                            }
                            known.push((name, number));
                            number
                        }
                    };
                    Extent {
                        offset: part.offset,
                        length: part.length,
                        object_offset: part.object_offset,
                        object: number,
                    }
                }
            };
            extents.push(extent);
        }
        let whole = ContentPart::Own {
            offset: 0,
            length: size,
        };
        if parts == [whole] {
            return Ok(Body::Whole { size, content: own });
        }
        Ok(Body::Sparse { size, extents })
    }

    /// Hands over all that no layer below has, as one content, and answers its number.
    fn own(&mut self, object: &Object<'_>, parts: &[ContentPart]) -> Result<u32, Fault> {
        let own = parts.iter().filter_map(|part| match part {
            ContentPart::Own { offset, length } => Some((*offset, *length)),
            ContentPart::Stored(_) => None,
        });
        let size: u64 = own.clone().map(|(_, length)| length).sum();
        if size == 0 {
            return Ok(0);
        }
        let mut content = self.layer.begin(size)?;
        for (offset, length) in own {
            let (mut at, end) = (offset, offset + length);
            while at < end {
                // No more than the buffer has.
                let most = (end - at).min(self.buffer.len() as u64) as usize;
                let buffer = &mut self.buffer[..most];
                let count = object.union.read(object.node, None, at, buffer)?;
                if count == 0 {
                    return Err(std::io::Error::other("it has shrunk while it was read").into());
                }
                content.write(&self.buffer[..count])?;
                at += count as u64;
            }
        }
        Ok(self.layer.end(content)?)
    }
}

/// Whether a file that has something new consists of too many objects.
fn is_scattered(parts: &[ContentPart]) -> bool {
    let objects = parts.iter().filter_map(|part| match part {
        ContentPart::Stored(part) => Some(part.object.name),
        ContentPart::Own { .. } => None,
    });
    let has_new = parts
        .iter()
        .any(|part| matches!(part, ContentPart::Own { .. }));
    has_new && (parts.len() > MOST_PARTS || objects.collect::<HashSet<_>>().len() >= MOST_OBJECTS)
}

/// The same parts as something to read, those that touch as one.
fn to_read(parts: &[ContentPart]) -> Vec<ContentPart> {
    let mut read: Vec<ContentPart> = Vec::new();
    for part in parts {
        let (from, bytes) = match part {
            ContentPart::Stored(part) => (part.offset, part.length),
            ContentPart::Own { offset, length } => (*offset, *length),
        };
        match read.last_mut() {
            Some(ContentPart::Own { offset, length }) if *offset + *length == from => {
                *length += bytes;
            }
            _ => read.push(ContentPart::Own {
                offset: from,
                length: bytes,
            }),
        }
    }
    read
}

fn attributes_of(object: &Object<'_>) -> Result<Attributes, Fault> {
    let attr = object.attr;
    let kind = match attr.kind {
        FileKind::Regular => libc::S_IFREG,
        FileKind::Directory => libc::S_IFDIR,
        FileKind::Symlink => libc::S_IFLNK,
        FileKind::CharDevice => libc::S_IFCHR,
        FileKind::BlockDevice => libc::S_IFBLK,
        FileKind::Fifo => libc::S_IFIFO,
        FileKind::Socket => libc::S_IFSOCK,
    };
    Ok(Attributes {
        // Type bits have no more than sixteen.
        mode: kind as u16 | attr.perm,
        uid: attr.uid,
        gid: attr.gid,
        mtime: time(attr.mtime),
        atime: time(attr.atime),
        xattrs: object.xattrs()?,
    })
}

fn time(time: Timestamp) -> Time {
    Time {
        sec: time.sec,
        nsec: time.nsec,
    }
}

fn names(path: &[u8]) -> Vec<&[u8]> {
    path.split(|&byte| byte == b'/')
        .filter(|name| !name.is_empty())
        .collect()
}
