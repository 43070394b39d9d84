//! Large objects whose files are compressed in frames, so that any part can be read, and compared with the name of the
//! object, without the rest.
//!
//! A file of an object that has as many bytes as the object is its content; any other has this form, which
//! `docs/layer-format.md` gives byte by byte. The table has a value for each frame, which is what BLAKE3 makes of its
//! content on the way to the name of the whole. The values are merged to the name when the file is opened, and from then on each frame
//! is compared with its value alone.

mod subtree;
mod table;
#[cfg(test)]
mod tests;
mod write;

use std::collections::VecDeque;
use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use nix::fcntl::{PosixFadviseAdvice, posix_fadvise};
use parking_lot::Mutex;

use self::table::{Stored, Table};
use super::check::{Check, FrameChecks, Verify};
use crate::store::compression::{decompress_into, with_scratch};
use crate::store::error::{Error, Result, damaged, io_error};
use crate::store::format::ObjectName;
use crate::store::format::tables::Object;

pub(in crate::store) use self::table::LARGEST;
pub(super) use self::write::Layout;
pub(in crate::store) use self::write::{FRAME, Frame};

/// Frames that are kept decompressed: reads of a few pages come one after the other.
const MOST_KEPT: usize = 8;

/// A frame of an object, with the bytes that a frame has.
type Key = (ObjectName, u64, u64);

/// A frame that is kept decompressed.
#[derive(Clone, Debug)]
struct Kept {
    content: Arc<Vec<u8>>,
    /// Whether it was compared with its value.
    is_sound: bool,
}

/// Frames that were decompressed last, of all objects of a store.
#[derive(Debug, Default)]
pub(super) struct FrameCache(Mutex<VecDeque<(Key, Kept)>>);

impl FrameCache {
    fn get(&self, key: &Key) -> Option<Kept> {
        let mut kept = self.0.lock();
        let at = kept.iter().position(|(known, _)| known == key)?;
        let found = kept.remove(at)?;
        let frame = found.1.clone();
        kept.push_back(found);
        Some(frame)
    }

    fn put(&self, key: Key, frame: Kept) {
        let mut kept = self.0.lock();
        kept.retain(|(known, _)| *known != key);
        if kept.len() >= MOST_KEPT {
            kept.pop_front();
        }
        kept.push_back((key, frame));
    }

    /// Keeps no frame of this object any longer.
    fn forget(&self, name: &ObjectName) {
        self.0.lock().retain(|((known, ..), _)| known != name);
    }

    /// A buffer of `length` bytes, which is that of the frame that would go next if nobody uses it.
    fn buffer(&self, length: usize) -> Vec<u8> {
        let oldest = {
            let mut kept = self.0.lock();
            match kept.len() >= MOST_KEPT {
                true => kept.pop_front(),
                false => None,
            }
        };
        let oldest = oldest.and_then(|(_, frame)| Arc::try_unwrap(frame.content).ok());
        let mut buffer = oldest.unwrap_or_default();
        buffer.resize(length, 0);
        buffer
    }
}

/// An open object in frames.
#[derive(Debug)]
pub struct Framed {
    path: PathBuf,
    file: File,
    object: Object,
    table: Table,
    checks: Arc<FrameChecks>,
    cache: Arc<FrameCache>,
    /// A frame of this file could not be used.
    has_failed: AtomicBool,
}

impl Framed {
    /// Opens the file at `path`.
    pub(super) fn open(
        path: &Path,
        file: File,
        length: u64,
        object: &Object,
        check: &Check,
        cache: &Arc<FrameCache>,
    ) -> Result<Self> {
        let table = Table::read(path, &file, length, object)?;
        let (verify, known) = match check {
            Check::Nothing => (Verify::Never, None),
            Check::Whole => (Verify::First, None),
            Check::Parts { verify, frames, .. } => (*verify, frames.as_ref()),
        };
        let checks = match known.filter(|known| known.knows(&table.sum, verify)) {
            Some(known) => Arc::clone(known),
            None => {
                if verify != Verify::Never && table.name() != object.name {
                    let problem = "the values of its frames do not make its name";
                    return Err(damaged(path, problem));
                }
                Arc::new(FrameChecks::new(verify, table.sum, table.count()))
            }
        };
        if verify == Verify::Always {
            // What is read from now on comes from the disk once more.
            cache.forget(&object.name);
        }
        let framed = Self {
            path: path.to_owned(),
            file,
            object: *object,
            table,
            checks,
            cache: Arc::clone(cache),
            has_failed: AtomicBool::new(false),
        };
        if check.is_whole() {
            framed.verify()?;
        }
        Ok(framed)
    }

    /// Goes on with what others know of its frames, if that is of the same table.
    pub(in crate::store) fn share(&mut self, known: &Arc<FrameChecks>) -> bool {
        let is_like = self.checks.is_like(known);
        if is_like {
            self.checks = Arc::clone(known);
        }
        is_like
    }

    /// What is known of its frames.
    pub(in crate::store) fn checks(&self) -> &Arc<FrameChecks> {
        &self.checks
    }

    /// Whether a frame could not be used. Another file may be in the place of this one since.
    pub(in crate::store) fn has_failed(&self) -> bool {
        self.has_failed.load(Ordering::Relaxed)
    }

    /// Fills `buffer` from `offset`; fewer bytes only at the end.
    pub(super) fn read_at(&self, buffer: &mut [u8], offset: u64) -> io::Result<usize> {
        let left = self.object.size.saturating_sub(offset);
        let length = left.min(buffer.len() as u64) as usize;
        let mut rest = &mut buffer[..length];
        let mut at = offset;
        self.announce(at, length);
        while !rest.is_empty() {
            let number = at / self.table.frame;
            let within = (at % self.table.frame) as usize;
            let full = self.table.plain_bytes(number);
            let (part, others) = rest.split_at_mut((full - within).min(rest.len()));
            at += part.len() as u64;
            rest = others;
            let read = match part.len() == full {
                true => self.read_frame(number, part).map(drop),
                false => self.read_part(number, within, part),
            };
            self.checks.note(number, read.is_ok());
            read.map_err(|error| {
                self.has_failed.store(true, Ordering::Relaxed);
                match &error {
                    Error::Io { source, .. } => io::Error::new(source.kind(), error),
                    _ => io::Error::new(io::ErrorKind::InvalidData, error),
                }
            })?;
        }
        Ok(length)
    }

    /// Has the host read what several frames are stored as in one go, while the first of them is decompressed and compared.
    fn announce(&self, offset: u64, length: usize) {
        let (first, end) = (offset / self.table.frame, offset + length as u64);
        let last = end.saturating_sub(1) / self.table.frame;
        if last <= first {
            return;
        }
        if let (Ok(first), Ok(last)) = (self.table.stored(first), self.table.stored(last)) {
            let length = last.start + last.bytes as u64 - first.start;
            let place = i64::try_from(first.start)
                .ok()
                .zip(i64::try_from(length).ok());
            if let Some((at, length)) = place {
                let advice = PosixFadviseAdvice::POSIX_FADV_WILLNEED;
                // Without it they are read one by one.
                let _ = posix_fadvise(&self.file, at, length, advice);
            }
        }
    }

    /// Reads a frame from the disk. `into` has as many bytes. Answers whether it was compared with its value.
    fn read_frame(&self, number: u64, into: &mut [u8]) -> Result<bool> {
        let Stored {
            start,
            bytes,
            plain,
        } = self.stored(number)?;
        if plain {
            self.read_file(number, into, start)?;
        } else {
            with_scratch(bytes, |stored| {
                self.read_file(number, stored, start)?;
                match decompress_into(stored, into) {
                    Ok(count) if count == into.len() => Ok(()),
                    _ => Err(self.wrong(number, "cannot be decompressed")),
                }
            })?;
        }
        let is_due = self.checks.is_due(number);
        if is_due {
            if !self.table.is_content(number, into) {
                return Err(self.wrong(number, "does not have its content"));
            }
            self.checks.is_sound(number);
        }
        Ok(is_due)
    }

    /// Reads less than a whole frame, from `within` it on.
    fn read_part(&self, number: u64, within: usize, part: &mut [u8]) -> Result<()> {
        let is_due = self.checks.is_due(number);
        let full = self.table.plain_bytes(number);
        let Stored { start, plain, .. } = self.stored(number)?;
        if plain && !is_due {
            return self.read_file(number, part, start + within as u64);
        }
        if plain {
            // Once it is known to be sound, parts of it can be read alone, so it need not be kept.
            return with_scratch(full, |content| {
                self.read_frame(number, content)?;
                part.copy_from_slice(&content[within..within + part.len()]);
                Ok(())
            });
        }
        let key = (self.object.name, self.table.frame, number);
        // Of a damaged view two objects of one name may have several lengths.
        let is_usable = |kept: &Kept| (kept.is_sound || !is_due) && kept.content.len() == full;
        let content = match self.cache.get(&key).filter(is_usable) {
            Some(kept) => kept.content,
            None => {
                let mut content = self.cache.buffer(full);
                let is_sound = self.read_frame(number, &mut content)?;
                let content = Arc::new(content);
                let kept = Kept {
                    content: Arc::clone(&content),
                    is_sound,
                };
                self.cache.put(key, kept);
                content
            }
        };
        part.copy_from_slice(&content[within..within + part.len()]);
        Ok(())
    }

    fn stored(&self, number: u64) -> Result<Stored> {
        let stored = self.table.stored(number);
        stored.map_err(|problem| self.wrong(number, problem))
    }

    fn read_file(&self, number: u64, into: &mut [u8], at: u64) -> Result<()> {
        match self.file.read_exact_at(into, at) {
            Err(error) if error.kind() == io::ErrorKind::UnexpectedEof => {
                Err(self.wrong(number, "is cut off"))
            }
            result => result.map_err(io_error("read", &self.path)),
        }
    }

    /// Reads and compares all of it.
    fn verify(&self) -> Result<()> {
        let mut buffer = vec![0; self.table.plain_bytes(0)];
        for number in 0..self.table.count() {
            let full = self.table.plain_bytes(number);
            self.read_frame(number, &mut buffer[..full])?;
        }
        Ok(())
    }

    fn wrong(&self, number: u64, problem: &str) -> Error {
        damaged(&self.path, format!("its frame {number} {problem}"))
    }
}
