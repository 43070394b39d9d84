//! What stands before the frames of an object, byte by byte in `docs/layer-format.md`.

use std::fs::File;
use std::io;
use std::ops::RangeInclusive;
use std::os::unix::fs::FileExt;
use std::path::Path;

use super::subtree::{Subtree, Value, name_of};
use super::write::FRAME;
use crate::store::error::{Result, damaged, io_error};
use crate::store::format::tables::Object;
use crate::store::format::{NOT_ZERO, ObjectName, Record, check_version, short_sum};

const MAGIC: &[u8; 8] = b"plyframe";
const VERSION: u16 = 2;
const HEADER: usize = 64;
const SUM: usize = 32;
/// Bytes of a frame's entry in the table.
const ENTRY: usize = 36;
/// In an entry: the frame is stored as it is.
const PLAIN: u32 = 1 << 31;
/// What a reader takes, so that no header has it hold much.
const FRAMES: RangeInclusive<u64> = 4 << 10..=16 << 20;
/// Most bytes of an object. With the frames that we write its table has 18 MiB, which a writer and every reader hold.
pub(in crate::store) const LARGEST: u64 = 64 << 30;
/// Most frames of an object: as many as the largest has. Smaller frames are for smaller objects.
const MOST: u64 = LARGEST / FRAME as u64;
/// Bytes that are read before the header is known to be sound.
const FIRST: u64 = 64 << 10;

/// Where a frame is stored.
#[derive(Clone, Copy, Debug)]
pub(super) struct Stored {
    pub(super) start: u64,
    pub(super) bytes: usize,
    /// The bytes are its content.
    pub(super) plain: bool,
}

/// The table of an object, with what its header says.
#[derive(Debug)]
pub(super) struct Table {
    /// Bytes of the object.
    size: u64,
    /// Plain bytes of a frame.
    pub(super) frame: u64,
    /// Where the first frame starts.
    body: u64,
    /// Where each frame ends, times two; one more if it is stored as it is.
    ends: Vec<u64>,
    values: Vec<Value>,
    /// Of all of it: two tables with one sum are the same.
    pub(super) sum: [u8; SUM],
}

impl Table {
    /// Reads the table of `object` from its file, which has `length` bytes and lies at `path`.
    pub(super) fn read(path: &Path, file: &File, length: u64, object: &Object) -> Result<Self> {
        let size = object.size;
        let no_frames = || {
            let problem = format!("it has {length} bytes and should have {size}, or frames");
            damaged(path, problem)
        };
        let read = |bytes: &mut [u8], at| match file.read_exact_at(bytes, at) {
            Err(error) if error.kind() == io::ErrorKind::UnexpectedEof => Err(no_frames()),
            result => result.map_err(io_error("read", path)),
        };
        if size > LARGEST {
            return Err(no_frames());
        }
        // What we write before the frames, in one go unless there is much of it.
        let usual = body(size.div_ceil(FRAME as u64)).min(length).min(FIRST);
        let mut head = vec![0; (usual as usize).max(HEADER)];
        read(&mut head, 0)?;
        let fields = Record(&head[..HEADER]);
        if fields.array::<8>(0) != *MAGIC || fields.array::<8>(56) != short_sum(&head[..56]) {
            return Err(no_frames());
        }
        let version = fields.u16(8);
        if version == 1 {
            let problem =
                "it has the form of builds before the first release, without values of its frames";
            return Err(damaged(path, problem));
        }
        check_version(path, VERSION, version, fields.u64(32))?;
        if !fields.is_zero(10, 16) || !fields.is_zero(52, 56) {
            return Err(damaged(path, NOT_ZERO));
        }
        let (said, frame) = (fields.u64(40), u64::from(fields.u32(48)));
        let is_frame = FRAMES.contains(&frame) && frame.is_power_of_two();
        if said != size || size == 0 || !is_frame || size.div_ceil(frame) > MOST {
            return Err(damaged(path, "its header says what cannot be"));
        }
        let count = size.div_ceil(frame);
        let body = body(count);
        if body > length {
            return Err(damaged(path, "its table is cut off"));
        }
        let known = head.len().min(body as usize);
        head.resize(body as usize, 0);
        read(&mut head[known..], known as u64)?;
        let (head, sum) = head.split_at(body as usize - SUM);
        if *blake3::hash(head).as_bytes() != sum {
            return Err(damaged(path, "its table is damaged"));
        }
        let mut end = body;
        let mut ends = Vec::with_capacity(count as usize);
        let mut values = Vec::with_capacity(count as usize);
        for entry in head[HEADER..].chunks_exact(ENTRY).map(Record) {
            let stored = entry.u32(0);
            end += u64::from(stored & !PLAIN);
            ends.push(end << 1 | u64::from(stored & PLAIN != 0));
            values.push(entry.array(4));
        }
        if end == size {
            let mut last = [1];
            read(&mut last, end)?;
            if last != [0] {
                return Err(damaged(path, "it does not end with a zero"));
            }
        }
        if length != end + u64::from(end == size) {
            let problem = "its frames have not the bytes that they should have";
            return Err(damaged(path, problem));
        }
        Ok(Self {
            size,
            frame,
            body,
            ends,
            values,
            sum: Record(sum).array(0),
        })
    }

    /// How many frames there are.
    pub(super) fn count(&self) -> u64 {
        self.ends.len() as u64
    }

    /// The name of the object whose frames have these values.
    pub(super) fn name(&self) -> ObjectName {
        name_of(&self.values)
    }

    /// Whether `content` is that of the frame.
    pub(super) fn is_content(&self, number: u64, content: &[u8]) -> bool {
        let subtree = Subtree::new(number * self.frame, self.frame, self.size);
        let value = usize::try_from(number)
            .ok()
            .and_then(|number| self.values.get(number));
        value == Some(&subtree.value(content))
    }

    /// Plain bytes of a frame.
    pub(super) fn plain_bytes(&self, number: u64) -> usize {
        let start = number * self.frame;
        self.frame.min(self.size.saturating_sub(start)) as usize
    }

    /// Where a frame is stored; what is wrong if its bytes cannot be.
    pub(super) fn stored(&self, number: u64) -> Result<Stored, &'static str> {
        let at = |number: u64| usize::try_from(number).ok().and_then(|n| self.ends.get(n));
        let end = *at(number).ok_or("is not there")?;
        let start = match number.checked_sub(1).and_then(at) {
            Some(start) => start >> 1,
            None => self.body,
        };
        let (end, plain) = (end >> 1, end & 1 != 0);
        let bytes = (end - start) as usize;
        let full = self.plain_bytes(number);
        if bytes > full || plain && bytes != full {
            return Err("has not the bytes that it should have");
        }
        Ok(Stored {
            start,
            bytes,
            plain,
        })
    }
}

/// Where the first of so many frames starts.
pub(super) fn body(frames: u64) -> u64 {
    HEADER as u64 + frames * ENTRY as u64 + SUM as u64
}

/// Adds the entry of the next frame to a table.
pub(super) fn add_entry(entries: &mut Vec<u8>, bytes: u32, plain: bool, value: &Value) {
    let stored = bytes | if plain { PLAIN } else { 0 };
    entries.extend_from_slice(&stored.to_le_bytes());
    entries.extend_from_slice(value);
}

/// What stands before the frames of an object of `size` bytes with frames of `frame` bytes, and the name that they make.
pub(super) fn head(size: u64, frame: u32, entries: &[u8]) -> (Vec<u8>, ObjectName) {
    let mut head = vec![0; HEADER];
    head[..8].copy_from_slice(MAGIC);
    head[8..10].copy_from_slice(&VERSION.to_le_bytes());
    head[40..48].copy_from_slice(&size.to_le_bytes());
    head[48..52].copy_from_slice(&frame.to_le_bytes());
    let sum = short_sum(&head[..56]);
    head[56..].copy_from_slice(&sum);
    head.extend_from_slice(entries);
    let sum = blake3::hash(&head);
    head.extend_from_slice(sum.as_bytes());
    let values: Vec<Value> = entries
        .chunks_exact(ENTRY)
        .map(|entry| Record(entry).array(4))
        .collect();
    (head, name_of(&values))
}
