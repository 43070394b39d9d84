//! Frames on their way into a file.

use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt;

use super::subtree::{Subtree, Value};
use super::table;
use crate::store::compression::Compressor;
use crate::store::format::tables::Object;

/// Plain bytes of a frame that we write.
pub(in crate::store) const FRAME: usize = 128 << 10;

/// A frame as it is stored.
#[derive(Debug)]
pub(in crate::store) struct Frame {
    bytes: Vec<u8>,
    plain: bool,
    value: Value,
}

impl Frame {
    /// The frame that starts at `start` in an object of `size` bytes. `content` is not empty; it is compressed if that
    /// saves an eighth.
    pub(in crate::store) fn new(
        content: Vec<u8>,
        (start, size): (u64, u64),
        compressor: &mut Compressor,
    ) -> io::Result<Self> {
        let value = Subtree::new(start, FRAME as u64, size).value(&content);
        let compressed = compressor.compress(&content)?;
        let plain = compressed.len() > content.len() - content.len() / 8;
        Ok(Self {
            bytes: if plain { content } else { compressed },
            plain,
            value,
        })
    }
}

/// Writes the frames of an object of known size into a new file.
#[derive(Debug)]
pub(in crate::store::object) struct Layout {
    size: u64,
    frames: u64,
    entries: Vec<u8>,
    /// Where the next frame goes.
    at: u64,
}

impl Layout {
    /// Of an object of `size` bytes, which is not zero.
    pub(in crate::store::object) fn new(size: u64) -> Self {
        let frames = size.div_ceil(FRAME as u64);
        Self {
            size,
            frames,
            entries: Vec::new(),
            at: table::body(frames),
        }
    }

    /// Adds the next frame.
    pub(in crate::store::object) fn append(
        &mut self,
        file: &File,
        frame: &Frame,
    ) -> io::Result<()> {
        file.write_all_at(&frame.bytes, self.at)?;
        self.at += frame.bytes.len() as u64;
        // Not more than a frame's plain bytes.
        let bytes = frame.bytes.len() as u32;
        table::add_entry(&mut self.entries, bytes, frame.plain, &frame.value);
        Ok(())
    }

    /// Writes what stands before the frames, once all of them are there. Answers what object they are.
    pub(in crate::store::object) fn finish(self, file: &File) -> io::Result<Object> {
        let (head, name) = table::head(self.size, FRAME as u32, &self.entries);
        if head.len() as u64 != table::body(self.frames) {
            return Err(io::Error::other("its frames are not as many as it needs"));
        }
        file.write_all_at(&head, 0)?;
        if self.at == self.size {
            file.write_all_at(&[0], self.at)?;
        }
        Ok(Object {
            name,
            size: self.size,
        })
    }
}
