//! The recipe of a tar stream: what is not content, and where content goes between.

use std::fs::{self, File, OpenOptions};
use std::io::{self, BufReader, BufWriter, Read, Write};
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};

use crate::store::error::{Error, Result, damaged, io_error};
use crate::store::format::{NOT_ZERO, Record, check_features, short_sum};
use crate::store::tar::Tape;

const MAGIC: &[u8; 8] = b"plytar\0\0";
const HEADER: usize = 64;
const RAW: u8 = 1;
const CONTENT: u8 = 2;
/// Most bytes of one part; a reader takes no larger one.
const LARGEST_PART: usize = 64 << 10;
const LEVEL: i32 = 3;

/// A recipe that is being written. Dropped before it is kept, it removes its file.
pub(in crate::store) struct Writer {
    path: PathBuf,
    frame: zstd::Encoder<'static, BufWriter<File>>,
    raw: Vec<u8>,
    kept: Unkept,
}

/// A file that is removed unless it was kept.
struct Unkept(Option<PathBuf>);

impl Drop for Unkept {
    fn drop(&mut self) {
        if let Some(path) = &self.0 {
            // What stays is cleared when the store is opened.
            let _ = fs::remove_file(path);
        }
    }
}

impl Writer {
    /// Begins the recipe at `path`, where nothing is.
    pub(in crate::store) fn create(path: &Path) -> Result<Self> {
        let fail = |error| io_error("make", path)(error);
        let file = OpenOptions::new()
            .write(true)
            .create_new(true)
            .mode(0o600)
            .open(path)
            .map_err(fail)?;
        let kept = Unkept(Some(path.to_owned()));
        let mut file = BufWriter::new(file);
        let mut header = [0; HEADER];
        header[..8].copy_from_slice(MAGIC);
        header[8..10].copy_from_slice(&1u16.to_le_bytes());
        let sum = short_sum(&header[..56]);
        header[56..].copy_from_slice(&sum);
        file.write_all(&header).map_err(fail)?;
        let mut frame = zstd::Encoder::new(file, LEVEL).map_err(fail)?;
        frame.include_checksum(true).map_err(fail)?;
        Ok(Self {
            path: path.to_owned(),
            frame,
            raw: Vec::with_capacity(LARGEST_PART),
            kept,
        })
    }

    /// Says that the content of the next file with content comes here.
    pub(in crate::store) fn content(&mut self) -> Result<()> {
        self.flush()?;
        self.write(&[CONTENT])
    }

    /// Ends the recipe and makes it durable. It stays where it is and is the caller's.
    pub(in crate::store) fn finish(mut self) -> Result<()> {
        self.flush()?;
        let fail = |error| io_error("write", &self.path)(error);
        let file = self.frame.finish().map_err(fail)?;
        let file = file
            .into_inner()
            .map_err(|error| fail(error.into_error()))?;
        file.sync_all()
            .map_err(io_error("make durable", &self.path))?;
        self.kept.0 = None;
        Ok(())
    }

    fn flush(&mut self) -> Result<()> {
        let raw = std::mem::take(&mut self.raw);
        if !raw.is_empty() {
            self.write(&[RAW])?;
            // Not longer than the largest part.
            self.write(&(raw.len() as u32).to_le_bytes())?;
            self.write(&raw)?;
        }
        self.raw = raw;
        self.raw.clear();
        Ok(())
    }

    fn write(&mut self, bytes: &[u8]) -> Result<()> {
        let written = self.frame.write_all(bytes);
        written.map_err(io_error("write", &self.path))
    }
}

impl Tape for Writer {
    fn raw(&mut self, mut bytes: &[u8]) -> Result<()> {
        while !bytes.is_empty() {
            if self.raw.len() == LARGEST_PART {
                self.flush()?;
            }
            let room = (LARGEST_PART - self.raw.len()).min(bytes.len());
            self.raw.extend_from_slice(&bytes[..room]);
            bytes = &bytes[room..];
        }
        Ok(())
    }
}

/// A part of a stream.
#[derive(Debug, PartialEq, Eq)]
pub(in crate::store) enum Part {
    /// These bytes.
    Raw(Vec<u8>),
    /// The content of the next file with content.
    Content,
}

/// A recipe that is read.
pub(in crate::store) struct Reader {
    path: PathBuf,
    frame: zstd::Decoder<'static, BufReader<File>>,
}

impl Reader {
    /// Reads all of it.
    pub(in crate::store) fn verify(mut self) -> Result<()> {
        while self.next()?.is_some() {}
        Ok(())
    }

    /// Opens the recipe at `path`.
    pub(in crate::store) fn open(path: &Path) -> Result<Self> {
        let fail = |error| io_error("open", path)(error);
        let mut file = File::open(path).map_err(fail)?;
        let mut header = [0; HEADER];
        file.read_exact(&mut header)
            .map_err(|error| wrong(path, error))?;
        let fields = Record(&header);
        if fields.array::<8>(0) != *MAGIC || fields.array::<8>(56) != short_sum(&header[..56]) {
            return Err(damaged(path, "it does not start as a recipe does"));
        }
        check_features(path, fields.u16(8), fields.u64(32))?;
        if !fields.is_zero(10, 16) || !fields.is_zero(40, 56) {
            return Err(damaged(path, NOT_ZERO));
        }
        Ok(Self {
            path: path.to_owned(),
            frame: zstd::Decoder::new(file).map_err(fail)?,
        })
    }

    /// The next part; `None` at the end.
    pub(in crate::store) fn next(&mut self) -> Result<Option<Part>> {
        let mut tag = [0];
        loop {
            match self.frame.read(&mut tag) {
                Ok(0) => return Ok(None),
                Ok(_) => break,
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) => return Err(wrong(&self.path, error)),
            }
        }
        match tag[0] {
            CONTENT => Ok(Some(Part::Content)),
            RAW => {
                let mut length = [0; 4];
                self.fill(&mut length)?;
                let length = u32::from_le_bytes(length) as usize;
                if length > LARGEST_PART {
                    return Err(damaged(&self.path, "a part of it is too long"));
                }
                let mut bytes = vec![0; length];
                self.fill(&mut bytes)?;
                Ok(Some(Part::Raw(bytes)))
            }
            other => Err(damaged(
                &self.path,
                format!("it has a part of type {other}"),
            )),
        }
    }

    fn fill(&mut self, bytes: &mut [u8]) -> Result<()> {
        let read = self.frame.read_exact(bytes);
        read.map_err(|error| wrong(&self.path, error))
    }
}

/// Only the host's own errors have a number; the others are the decoder's.
fn wrong(path: &Path, error: io::Error) -> Error {
    if error.raw_os_error().is_some() {
        io_error("read", path)(error)
    } else {
        damaged(path, format!("it cannot be read to its end: {error}"))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parts(path: &Path) -> Result<Vec<Part>> {
        let mut reader = Reader::open(path)?;
        let mut parts = Vec::new();
        while let Some(part) = reader.next()? {
            parts.push(part);
        }
        Ok(parts)
    }

    #[test]
    fn parts_come_back_in_order_and_damage_is_seen() {
        let tmp = tempfile::tempdir().unwrap();
        let path = tmp.path().join("recipe");
        let mut writer = Writer::create(&path).unwrap();
        writer.raw(b"header").unwrap();
        writer.raw(b" padding").unwrap();
        writer.content().unwrap();
        writer.content().unwrap();
        let long: Vec<u8> = (0..LARGEST_PART + 5).map(|at| (at % 251) as u8).collect();
        writer.raw(&long).unwrap();
        writer.finish().unwrap();
        let expected = [
            Part::Raw(b"header padding".to_vec()),
            Part::Content,
            Part::Content,
            Part::Raw(long[..LARGEST_PART].to_vec()),
            Part::Raw(long[LARGEST_PART..].to_vec()),
        ];
        assert_eq!(parts(&path).unwrap(), expected);
        let good = fs::read(&path).unwrap();
        for at in 0..good.len() {
            let mut bad = good.clone();
            bad[at] ^= 4;
            fs::write(&path, bad).unwrap();
            if let Ok(seen) = parts(&path) {
                assert!(seen == expected, "byte {at}");
            }
            fs::write(&path, &good[..at]).unwrap();
            assert!(parts(&path).is_err(), "cut at {at}");
        }
    }

    #[test]
    fn what_was_not_finished_is_removed() {
        let tmp = tempfile::tempdir().unwrap();
        drop(Writer::create(&tmp.path().join("recipe")).unwrap());
        assert_eq!(fs::read_dir(tmp.path()).unwrap().count(), 0);
    }
}
