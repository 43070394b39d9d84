//! A layer that does not come as a stream: its entries are handed over one by one, and their contents with them.
//!
//! The contents go the same way as those of a stream, so memory is bounded as there. What the store has already is
//! named, and not read.

use std::path::Path;

use super::Settings;
use super::sink::{Incoming, Sink, with_sink};
use crate::store::error::{Error, Result};
use crate::store::format::tables::Object;
use crate::store::layer::index::{Attributes, Body, LayerBuilder};
use crate::store::object::Objects;
use crate::store::view::is_modest;

/// A layer that is being made.
pub struct NewLayer<'a, 's> {
    index: LayerBuilder,
    sink: &'a mut Sink<'s>,
    inodes: u64,
    bytes: u64,
    asked: Asked,
}

/// What the entries ask of whoever applies them.
#[derive(Clone, Copy, Debug, Default)]
struct Asked {
    entries: u64,
    /// Names in all paths.
    names: u64,
    xattrs: u64,
    /// Of the extended attributes.
    bytes: u64,
}

impl Asked {
    fn add(&mut self, path: &[&[u8]], attributes: Option<&Attributes>) {
        self.entries += 1;
        self.names += path.len() as u64;
        for (name, value) in attributes.iter().flat_map(|attributes| &attributes.xattrs) {
            self.xattrs += 1;
            self.bytes += (name.len() + value.len()) as u64;
        }
    }

    fn is_modest(&self) -> bool {
        is_modest(self.entries, self.names, self.xattrs, self.bytes)
    }
}

/// A content that is being handed over.
#[derive(Debug)]
pub struct NewContent(Incoming, u64);

/// What was handed over.
pub(in crate::store) struct Collected {
    pub(in crate::store) index: LayerBuilder,
    pub(in crate::store) inodes: u64,
    pub(in crate::store) bytes: u64,
    /// Whether it can lie on any layers, however much those ask for.
    pub(in crate::store) modest: bool,
    pub(in crate::store) stored: super::Stored,
}

/// Calls `fill` with a layer without entries and answers what came of it.
pub(in crate::store) fn collect<E: From<Error>>(
    objects: &Objects,
    tmp: &Path,
    settings: &Settings,
    fill: impl FnOnce(&mut NewLayer<'_, '_>) -> Result<(), E>,
) -> Result<Collected, E> {
    let ((index, inodes, bytes, modest), stored) = with_sink(objects, tmp, settings, |sink| {
        let mut layer = NewLayer {
            index: LayerBuilder::new(),
            sink,
            inodes: 0,
            bytes: 0,
            asked: Asked::default(),
        };
        fill(&mut layer)?;
        let modest = layer.asked.is_modest();
        Ok::<_, E>((layer.index, layer.inodes, layer.bytes, modest))
    })?;
    Ok(Collected {
        index,
        inodes,
        bytes,
        modest,
        stored,
    })
}

impl NewLayer<'_, '_> {
    /// Adds an object at the path of these components, or, without any, the attributes of the root. It has the extended
    /// attributes that are given, and no others. Numbers of contents in `body` are those that this has answered.
    pub fn make(&mut self, path: &[&[u8]], attributes: &Attributes, body: &Body) -> Result<()> {
        self.inodes += 1;
        self.asked.add(path, Some(attributes));
        self.index.make_exactly(path, attributes, body)
    }

    /// Adds a hard link to `target`, a path from the root. The attributes are those of the target.
    pub fn link(&mut self, path: &[&[u8]], attributes: &Attributes, target: &[u8]) -> Result<()> {
        self.asked.add(path, Some(attributes));
        self.index.link(path, attributes, target)
    }

    /// Says that a path is removed.
    pub fn remove(&mut self, path: &[&[u8]]) -> Result<()> {
        self.asked.add(path, None);
        self.index.remove(path)
    }

    /// Begins a content of `size` bytes, all of which have to follow.
    pub fn begin(&self, size: u64) -> Result<NewContent> {
        self.sink.begin(size).map(|content| NewContent(content, 0))
    }

    /// Ends a content and answers its number.
    pub fn end(&mut self, content: NewContent) -> Result<u32> {
        self.bytes += content.1;
        self.sink.end(content.0)
    }

    /// The number of a content that the store has. Fails if it does not have it.
    pub fn known(&mut self, object: Object) -> Result<u32> {
        self.sink.known(object)
    }
}

impl NewContent {
    /// Adds bytes.
    pub fn write(&mut self, bytes: &[u8]) -> Result<()> {
        self.1 += bytes.len() as u64;
        self.0.write(bytes)
    }
}
