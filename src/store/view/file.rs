//! An open regular file of a view.

use std::fs::File;
use std::io;

use crate::store::error::Result;
use crate::store::format::tables::Extent;
use crate::store::object::{Content, Framed};

/// An open regular file of a view.
#[derive(Debug)]
pub struct ViewFile {
    size: u64,
    extents: Vec<Extent>,
    /// Contents by the numbers of their objects.
    contents: Vec<(u32, Content)>,
}

impl ViewFile {
    pub(in crate::store) fn new(
        size: u64,
        extents: Vec<Extent>,
        contents: Vec<(u32, Content)>,
    ) -> Self {
        Self {
            size,
            extents,
            contents,
        }
    }

    /// The same with contents that are opened once more, by the numbers of their objects.
    pub(super) fn with_contents(&self, open: impl Fn(u32) -> Result<Content>) -> Result<Self> {
        let contents = self.contents.iter();
        let contents = contents.map(|(number, _)| Ok((*number, open(*number)?)));
        Ok(Self {
            size: self.size,
            extents: self.extents.clone(),
            contents: contents.collect::<Result<_>>()?,
        })
    }

    /// Whether a part of a content could not be used when it was last read.
    pub(super) fn was_damaged(&self) -> bool {
        self.contents
            .iter()
            .any(|(_, content)| content.was_damaged())
    }

    /// Its bytes.
    pub fn size(&self) -> u64 {
        self.size
    }

    /// Fills `buffer` from `offset`; fewer bytes only at the end.
    pub fn read_at(&self, buffer: &mut [u8], offset: u64) -> io::Result<usize> {
        let length = self.size.saturating_sub(offset).min(buffer.len() as u64) as usize;
        let buffer = &mut buffer[..length];
        let end = offset + length as u64;
        let mut at = offset;
        for extent in &self.extents[self.first_ending_after(offset)..] {
            if extent.offset >= end {
                break;
            }
            let from = extent.offset.max(offset);
            let to = (extent.offset + extent.length).min(end);
            buffer[(at - offset) as usize..(from - offset) as usize].fill(0);
            let part = &mut buffer[(from - offset) as usize..(to - offset) as usize];
            let content = self.content(extent)?;
            let start = extent.object_offset + (from - extent.offset);
            if content.read_at(part, start)? != part.len() {
                // It was long enough when it was opened.
                return Err(io::ErrorKind::UnexpectedEof.into());
            }
            at = to;
        }
        buffer[(at - offset) as usize..].fill(0);
        Ok(length)
    }

    /// The first byte from `offset` on that is not in a hole; `None` if there is none.
    pub fn next_data(&self, offset: u64) -> Option<u64> {
        let extent = self.extents.get(self.first_ending_after(offset))?;
        Some(extent.offset.max(offset))
    }

    /// The first byte from `offset` on that is in a hole, the end of the file being one.
    pub fn next_hole(&self, offset: u64) -> u64 {
        let mut at = offset;
        for extent in &self.extents[self.first_ending_after(offset)..] {
            if extent.offset > at {
                break;
            }
            at = extent.offset + extent.length;
        }
        at
    }

    /// The host's file that holds exactly this content, if there is one.
    pub fn host_file(&self) -> Option<&File> {
        match (self.extents.as_slice(), self.contents.as_slice()) {
            ([extent], [(_, Content::File(file))])
                if extent.offset == 0
                    && extent.object_offset == 0
                    && extent.length == self.size =>
            {
                Some(file)
            }
            _ => None,
        }
    }

    /// Whether it is in memory.
    pub fn is_in_memory(&self) -> bool {
        self.contents
            .iter()
            .any(|(_, content)| matches!(content, Content::Bytes(_)))
    }

    /// Whether a part of it could not be read. Opened again, it may be whole.
    pub fn has_failed(&self) -> bool {
        self.framed().any(|(_, framed)| framed.has_failed())
    }

    /// Contents in frames, with the numbers of their objects.
    pub(super) fn framed(&self) -> impl Iterator<Item = (u32, &Framed)> {
        self.contents
            .iter()
            .filter_map(|(number, content)| match content {
                Content::Framed(framed) => Some((*number, &**framed)),
                Content::Bytes(_) | Content::File(_) => None,
            })
    }

    fn first_ending_after(&self, offset: u64) -> usize {
        self.extents
            .partition_point(|extent| extent.offset + extent.length <= offset)
    }

    fn content(&self, extent: &Extent) -> io::Result<&Content> {
        let found = self
            .contents
            .iter()
            .find(|(number, _)| *number == extent.object);
        found
            .map(|(_, content)| content)
            .ok_or_else(|| io::ErrorKind::NotFound.into())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Ten bytes of data at 5 and at 20, in a file of 40 bytes.
    fn sparse() -> (ViewFile, Vec<u8>) {
        let data: Vec<u8> = (1..=20).collect();
        let extent = |offset, object_offset| Extent {
            offset,
            length: 10,
            object_offset,
            object: 3,
        };
        let mut whole = vec![0; 40];
        whole[5..15].copy_from_slice(&data[..10]);
        whole[20..30].copy_from_slice(&data[10..]);
        let contents = vec![(3, Content::Bytes(data.into()))];
        (
            ViewFile::new(40, vec![extent(5, 0), extent(20, 10)], contents),
            whole,
        )
    }

    #[test]
    fn every_range_reads_as_the_whole_does() {
        let (file, whole) = sparse();
        for from in 0..45 {
            for length in 0..45 {
                let mut buffer = vec![0xee; length];
                let count = file.read_at(&mut buffer, from as u64).unwrap();
                let expected = whole.get(from..).unwrap_or_default();
                let expected = &expected[..length.min(expected.len())];
                assert_eq!(&buffer[..count], expected, "{length} bytes at {from}");
            }
        }
        assert_eq!(file.read_at(&mut [0; 4], u64::MAX).unwrap(), 0);
    }

    #[test]
    fn holes_are_found() {
        let (file, whole) = sparse();
        for at in 0..40 {
            let data = (at..40).find(|at| whole[*at] != 0);
            let hole = (at..40).find(|at| whole[*at] == 0).unwrap_or(40);
            assert_eq!(file.next_data(at as u64), data.map(|at| at as u64));
            assert_eq!(file.next_hole(at as u64), hole as u64);
        }
        assert!(file.host_file().is_none());
    }
}
