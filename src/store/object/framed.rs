//! Large objects whose files are compressed in frames, so that any part can be read without the rest.
//!
//! A file of an object that has as many bytes as the object is its content; any other has this form, which
//! `docs/layer-format.md` gives byte by byte.

use std::collections::VecDeque;
use std::fs::File;
use std::io;
use std::ops::Range;
use std::os::unix::fs::FileExt;
use std::path::Path;
use std::sync::Arc;

use parking_lot::Mutex;

use crate::store::compression::{Compressor, decompress_into};
use crate::store::error::{Error, Result, damaged, io_error};
use crate::store::format::tables::Object;
use crate::store::format::{ObjectName, Record, check_features, short_sum};

const MAGIC: &[u8; 8] = b"plyframe";
const HEADER: usize = 64;
const SUM: usize = 32;
/// Bytes of a frame's entry in the table.
const ENTRY: usize = 4;
/// In an entry: the frame is stored as it is.
const PLAIN: u32 = 1 << 31;
/// Plain bytes of a frame that we write.
pub(in crate::store) const FRAME: usize = 128 << 10;
/// What a reader takes, so that no header has it hold much.
const FRAMES: Range<u64> = 4 << 10..(16 << 20) + 1;
/// Most bytes of an object, so that a forged size does not have a reader allocate for its table.
pub(in crate::store) const LARGEST: u64 = 1 << 44;
/// Frames that are kept decompressed: reads of a few pages come one after the other.
const MOST_KEPT: usize = 16;

/// A frame as it is stored.
#[derive(Debug)]
pub(in crate::store) struct Frame {
    bytes: Vec<u8>,
    plain: bool,
}

impl Frame {
    /// Takes `content`, which is compressed if that saves an eighth.
    pub(in crate::store) fn new(content: Vec<u8>, compressor: &mut Compressor) -> io::Result<Self> {
        let compressed = compressor.compress(&content)?;
        Ok(
            match compressed.len() <= content.len() - content.len() / 8 {
                true => Self {
                    bytes: compressed,
                    plain: false,
                },
                false => Self {
                    bytes: content,
                    plain: true,
                },
            },
        )
    }
}

/// Writes the frames of an object of known size into a new file.
#[derive(Debug)]
pub(super) struct Layout {
    size: u64,
    table: Vec<u8>,
    /// Where the next frame goes.
    at: u64,
}

impl Layout {
    /// Of an object of `size` bytes, which is not zero.
    pub(super) fn new(size: u64) -> Self {
        let frames = size.div_ceil(FRAME as u64);
        Self {
            size,
            table: Vec::new(),
            at: body(frames),
        }
    }

    /// Adds the next frame.
    pub(super) fn append(&mut self, file: &File, frame: &Frame) -> io::Result<()> {
        file.write_all_at(&frame.bytes, self.at)?;
        self.at += frame.bytes.len() as u64;
        // Not more than a frame's plain bytes.
        let stored = frame.bytes.len() as u32 | if frame.plain { PLAIN } else { 0 };
        self.table.extend_from_slice(&stored.to_le_bytes());
        Ok(())
    }

    /// Writes what stands before the frames, once all of them are there.
    pub(super) fn finish(self, file: &File) -> io::Result<()> {
        let mut head = vec![0; HEADER];
        head[..8].copy_from_slice(MAGIC);
        head[8..10].copy_from_slice(&1u16.to_le_bytes());
        head[40..48].copy_from_slice(&self.size.to_le_bytes());
        head[48..52].copy_from_slice(&(FRAME as u32).to_le_bytes());
        let sum = short_sum(&head[..56]);
        head[56..].copy_from_slice(&sum);
        head.extend_from_slice(&self.table);
        let sum = blake3::hash(&head);
        head.extend_from_slice(sum.as_bytes());
        if head.len() as u64 != body(self.size.div_ceil(FRAME as u64)) {
            return Err(io::Error::other("its frames are not as many as it needs"));
        }
        file.write_all_at(&head, 0)?;
        if self.at == self.size {
            file.write_all_at(&[0], self.at)?;
        }
        Ok(())
    }
}

/// Where the first of so many frames starts.
fn body(frames: u64) -> u64 {
    HEADER as u64 + frames * ENTRY as u64 + SUM as u64
}

/// A frame of an object, with the bytes that a frame has.
type Key = (ObjectName, u64, u64);

/// Frames that were decompressed last, of all objects of a store.
#[derive(Debug, Default)]
pub(super) struct FrameCache(Mutex<VecDeque<(Key, Arc<[u8]>)>>);

impl FrameCache {
    fn get(&self, key: Key) -> Option<Arc<[u8]>> {
        let mut kept = self.0.lock();
        let at = kept.iter().position(|(known, _)| *known == key)?;
        let found = kept.remove(at)?;
        let bytes = Arc::clone(&found.1);
        kept.push_back(found);
        Some(bytes)
    }

    fn put(&self, key: Key, bytes: Arc<[u8]>) {
        let mut kept = self.0.lock();
        kept.retain(|(known, _)| *known != key);
        if kept.len() >= MOST_KEPT {
            kept.pop_front();
        }
        kept.push_back((key, bytes));
    }
}

/// An open object in frames.
#[derive(Debug)]
pub struct Framed {
    file: File,
    object: Object,
    frame: u64,
    /// Where each frame ends, and whether it is stored as it is.
    ends: Vec<(u64, bool)>,
    body: u64,
    cache: Arc<FrameCache>,
}

impl Framed {
    /// Opens the file at `path`.
    pub(super) fn open(
        path: &Path,
        file: File,
        length: u64,
        object: &Object,
        cache: &Arc<FrameCache>,
    ) -> Result<Self> {
        let read = |bytes: &mut [u8], at| match file.read_exact_at(bytes, at) {
            Err(error) if error.kind() == io::ErrorKind::UnexpectedEof => {
                let size = object.size;
                let problem = format!("it has {length} bytes and should have {size}, or frames");
                Err(damaged(path, problem))
            }
            result => result.map_err(io_error("read", path)),
        };
        let mut head = vec![0; HEADER];
        read(&mut head, 0)?;
        let fields = Record(&head);
        if fields.array::<8>(0) != *MAGIC || fields.array::<8>(56) != short_sum(&head[..56]) {
            let size = object.size;
            let problem = format!("it has {length} bytes and should have {size}, or frames");
            return Err(damaged(path, problem));
        }
        check_features(path, fields.u16(8), fields.u64(32))?;
        let (size, frame) = (fields.u64(40), u64::from(fields.u32(48)));
        if !fields.is_zero(10, 16) || !fields.is_zero(52, 56) {
            return Err(damaged(
                path,
                "its header has something where zeros have to be",
            ));
        }
        if size != object.size || size == 0 || size > LARGEST || !FRAMES.contains(&frame) {
            return Err(damaged(path, "its header says what cannot be"));
        }
        let count = size.div_ceil(frame);
        let body = body(count);
        if body > length {
            return Err(damaged(path, "its table is cut off"));
        }
        // Bounded by the bytes of the file.
        head.resize((body - SUM as u64) as usize, 0);
        read(&mut head[HEADER..], HEADER as u64)?;
        let mut sum = [0; SUM];
        read(&mut sum, body - SUM as u64)?;
        if *blake3::hash(&head).as_bytes() != sum {
            return Err(damaged(path, "its table is damaged"));
        }
        let mut end = body;
        let mut ends = Vec::with_capacity(count as usize);
        for entry in head[HEADER..].chunks_exact(ENTRY) {
            let stored = Record(entry).u32(0);
            end += u64::from(stored & !PLAIN);
            ends.push((end, stored & PLAIN != 0));
        }
        if end == size {
            let mut last = [1];
            read(&mut last, end)?;
            if last != [0] {
                return Err(damaged(path, "it does not end with a zero"));
            }
        }
        if length != end + u64::from(end == size) {
            return Err(damaged(
                path,
                "its frames have not the bytes that they should have",
            ));
        }
        Ok(Self {
            file,
            object: *object,
            frame,
            ends,
            body,
            cache: Arc::clone(cache),
        })
    }

    /// Where a frame is stored, its bytes, and whether they are its content.
    fn stored(&self, number: u64) -> io::Result<(u64, usize, bool)> {
        let at = |number: u64| usize::try_from(number).ok().and_then(|n| self.ends.get(n));
        let (end, plain) = *at(number).ok_or(io::ErrorKind::UnexpectedEof)?;
        let start = match number.checked_sub(1).and_then(at) {
            Some((start, _)) => *start,
            None => self.body,
        };
        let bytes = (end - start) as usize;
        let full = self.plain_bytes(number);
        if bytes > full || plain && bytes != full {
            return Err(wrong("a frame of it has not the bytes that it should have"));
        }
        Ok((start, bytes, plain))
    }

    /// Plain bytes of a frame.
    fn plain_bytes(&self, number: u64) -> usize {
        self.frame.min(self.object.size - number * self.frame) as usize
    }

    fn decompress(&self, number: u64, into: &mut [u8]) -> io::Result<()> {
        let (start, bytes, _) = self.stored(number)?;
        let mut stored = vec![0; bytes];
        self.file.read_exact_at(&mut stored, start)?;
        match decompress_into(&stored, into) {
            Ok(count) if count == into.len() => Ok(()),
            _ => Err(wrong("a frame of it cannot be decompressed")),
        }
    }

    /// Fills `buffer` from `offset`; fewer bytes only at the end.
    pub(super) fn read_at(&self, buffer: &mut [u8], offset: u64) -> io::Result<usize> {
        let left = self.object.size.saturating_sub(offset);
        let length = left.min(buffer.len() as u64) as usize;
        let buffer = &mut buffer[..length];
        let mut done = 0;
        while done < buffer.len() {
            let at = offset + done as u64;
            let number = at / self.frame;
            let within = (at % self.frame) as usize;
            let full = self.plain_bytes(number);
            let count = (full - within).min(buffer.len() - done);
            let part = &mut buffer[done..done + count];
            let (start, _, plain) = self.stored(number)?;
            if plain {
                self.file.read_exact_at(part, start + within as u64)?;
            } else if count == full {
                self.decompress(number, part)?;
            } else {
                let key = (self.object.name, self.frame, number);
                let whole = match self.cache.get(key) {
                    Some(known) => known,
                    None => {
                        let mut whole = vec![0; full];
                        self.decompress(number, &mut whole)?;
                        let whole: Arc<[u8]> = whole.into();
                        self.cache.put(key, Arc::clone(&whole));
                        whole
                    }
                };
                part.copy_from_slice(&whole[within..within + count]);
            }
            done += count;
        }
        Ok(length)
    }

    /// Compares the content with its name.
    pub(super) fn verify(&self, path: &Path) -> Result<()> {
        let mut hash = blake3::Hasher::new();
        let mut buffer = vec![0; self.plain_bytes(0)];
        let mut at = 0;
        while at < self.object.size {
            let count = self
                .read_at(&mut buffer, at)
                .map_err(|error| match error.kind() {
                    io::ErrorKind::InvalidData => damaged(path, error.to_string()),
                    _ => io_error("read", path)(error),
                })?;
            hash.update(&buffer[..count]);
            at += count as u64;
        }
        if *hash.finalize().as_bytes() == self.object.name.0 {
            Ok(())
        } else {
            Err::<(), Error>(damaged(path, "its content does not have its name"))
        }
    }
}

fn wrong(problem: &str) -> io::Error {
    io::Error::new(io::ErrorKind::InvalidData, problem)
}

#[cfg(test)]
mod tests {
    use std::fs;

    use super::*;

    /// Half of it can be compressed.
    fn content(size: usize) -> Vec<u8> {
        let mut random = blake3::Hasher::new().finalize_xof();
        let mut content = vec![0; size];
        random.fill(&mut content);
        for part in content.chunks_mut(FRAME).step_by(2) {
            part.fill(7);
        }
        content
    }

    fn written(path: &Path, content: &[u8]) -> Object {
        let file = File::create_new(path).unwrap();
        let mut layout = Layout::new(content.len() as u64);
        let mut compressor = Compressor::new(1).unwrap();
        for part in content.chunks(FRAME) {
            let frame = Frame::new(part.to_vec(), &mut compressor).unwrap();
            layout.append(&file, &frame).unwrap();
        }
        layout.finish(&file).unwrap();
        Object {
            name: ObjectName::of(content),
            size: content.len() as u64,
        }
    }

    fn open(path: &Path, object: &Object) -> Result<Framed> {
        let file = File::open(path).unwrap();
        let length = file.metadata().unwrap().len();
        Framed::open(path, file, length, object, &Arc::default())
    }

    #[test]
    fn every_part_reads_as_the_whole_does() {
        let tmp = tempfile::tempdir().unwrap();
        for size in [1, FRAME - 1, FRAME, FRAME + 1, 3 * FRAME + 500] {
            let path = tmp.path().join(size.to_string());
            let content = content(size);
            let framed = open(&path, &written(&path, &content)).unwrap();
            framed.verify(&path).unwrap();
            for (from, length) in [
                (0, size),
                (0, 1),
                (size - 1, 10),
                (size, 10),
                (size / 2, FRAME),
                (FRAME - 5, 10),
                (2 * FRAME - 5, FRAME + 10),
            ] {
                let mut buffer = vec![0xee; length];
                let count = framed.read_at(&mut buffer, from as u64).unwrap();
                let expected = content.get(from..).unwrap_or_default();
                let expected = &expected[..length.min(expected.len())];
                assert!(buffer[..count] == *expected, "{length} at {from} of {size}");
            }
        }
    }

    #[test]
    fn a_file_in_frames_never_has_as_many_bytes_as_its_content() {
        let tmp = tempfile::tempdir().unwrap();
        // The first frame is stored as it is; the second is made shorter by as much as the rest takes.
        let mut met = false;
        for zeros in 0..400 {
            let mut content = vec![0; FRAME + 300];
            blake3::Hasher::new().finalize_xof().fill(&mut content);
            content.extend(std::iter::repeat_n(0, zeros));
            let path = tmp.path().join("object");
            let object = written(&path, &content);
            let length = fs::metadata(&path).unwrap().len();
            assert_ne!(length, object.size);
            open(&path, &object).unwrap().verify(&path).unwrap();
            fs::remove_file(&path).unwrap();
            met |= length == object.size + 1;
        }
        assert!(met, "no content was as long as its frames");
    }

    #[test]
    fn every_damaged_byte_is_an_error() {
        let tmp = tempfile::tempdir().unwrap();
        let path = tmp.path().join("object");
        let content = content(2 * FRAME + 100);
        let object = written(&path, &content);
        let whole = fs::read(&path).unwrap();
        // The header, the table, the compressed frames; of the plain one some bytes.
        for at in (0..2000).chain((2000..whole.len()).step_by(997)) {
            let mut bad = whole.clone();
            bad[at] ^= 0x41;
            fs::write(&path, &bad).unwrap();
            let read = open(&path, &object).and_then(|framed| framed.verify(&path));
            // Bytes of the header that nobody reads yet are under its sum as well.
            assert!(read.is_err(), "{at}");
        }
        for length in [0, 1, 63, 64, 100, whole.len() - 1] {
            fs::write(&path, &whole[..length]).unwrap();
            assert!(open(&path, &object).is_err(), "cut at {length}");
        }
    }
}
