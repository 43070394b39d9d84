//! The frame that the index of a layer and a view have in common: a header, sections of records, and
//! a sum for each page.
//!
//! Opening verifies the header and the table of sums, a few pages; every other page is verified when the
//! first byte of it is used. That goes through read(2), which tells what is wrong with a page that the disk cannot read; from
//! then on the mapping is used. If that loses something, because the file is cut off or the disk fails, all of it is mapped and
//! verified anew. All access goes through [`IndexFile::slice`], which checks bounds, so no damage leads beyond the file.

mod restore;
mod write;

use std::collections::BTreeSet;
use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU64, Ordering};

use parking_lot::Mutex;

use super::{NOT_ZERO, Record, check_features};
use crate::store::error::{Result, damaged, io_error};
use crate::sys::map::FileMap;

pub(in crate::store) use restore::restore;
pub(in crate::store) use write::IndexWriter;

const HEADER: usize = 1024;
const SUM_AT: usize = HEADER - 32;
const SECTIONS_AT: usize = 128;
const MOST_SECTIONS: usize = 16;
const PAGE: u64 = 4096;
/// A larger file is not one of ours: it also bounds what the table of sums takes.
const LARGEST_FILE: u64 = 64 << 30;

/// What a file is the index of.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(in crate::store) enum Kind {
    /// A layer.
    Layer,
    /// A chain of layers.
    View,
}

impl Kind {
    fn magic(self) -> &'static [u8; 8] {
        match self {
            Self::Layer => b"plylayer",
            Self::View => b"plyview\0",
        }
    }
}

/// The sections by their numbers on disk.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(in crate::store) enum Section {
    Entries = 1,
    Paths = 2,
    Inodes = 3,
    DirEntries = 4,
    Names = 5,
    Texts = 6,
    Objects = 7,
    Extents = 8,
    Xattrs = 9,
    XattrSets = 10,
    Times = 11,
    Locations = 12,
    Packs = 13,
    Layers = 14,
}

impl Section {
    /// Bytes of a record.
    pub(in crate::store) const fn record(self) -> usize {
        match self {
            Self::Entries => 64,
            Self::Paths => 12,
            Self::Inodes => 56,
            Self::Names | Self::Texts => 1,
            Self::Objects => 40,
            Self::Extents | Self::Layers => 32,
            Self::Xattrs => 24,
            Self::XattrSets => 8,
            Self::DirEntries | Self::Times | Self::Locations | Self::Packs => 16,
        }
    }

    const fn slot(self) -> usize {
        self as usize
    }
}

/// Sections by their number; number 0 is none.
const SLOTS: usize = 15;

/// What the header says of the whole.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(in crate::store) struct Identity {
    /// Diff id of a layer, zeros without one; key of a view.
    pub(in crate::store) key: [u8; 32],
    /// Bytes of the layer's tar stream.
    pub(in crate::store) tar_bytes: u64,
}

/// An index that is open for reading.
#[derive(Debug)]
pub(in crate::store) struct IndexFile {
    path: PathBuf,
    file: File,
    map: FileMap,
    identity: Identity,
    sum: [u8; 32],
    /// Start and bytes of each section.
    sections: [(u64, u64); SLOTS],
    /// Where the pages end.
    end: u64,
    sums: Vec<u8>,
    /// A bit for each page that was verified.
    verified: Box<[AtomicU64]>,
    /// Pages that were not sound when they were last read.
    bad: Mutex<BTreeSet<u64>>,
}

impl IndexFile {
    /// Opens the index at `path`.
    pub(in crate::store) fn open(path: &Path, kind: Kind) -> Result<Self> {
        let file = File::open(path).map_err(io_error("open", path))?;
        let length = file.metadata().map_err(io_error("look at", path))?.len();
        let mut header = [0; HEADER];
        read_exact(&file, path, &mut header, 0)?;
        let fields = Record(&header);
        if fields.array::<8>(0) != *kind.magic() {
            return Err(damaged(path, "it does not start as such a file does"));
        }
        let sum: [u8; 32] = fields.array(SUM_AT);
        if *blake3::hash(&header[..SUM_AT]).as_bytes() != sum {
            return Err(damaged(path, "the sum of its header is wrong"));
        }
        check_features(path, fields.u16(8), fields.u64(32))?;
        if !fields.is_zero(12, 16) {
            return Err(damaged(path, NOT_ZERO));
        }
        let (claimed, end, count) = (fields.u64(40), fields.u64(48), fields.u16(10));
        let pages = end.checked_sub(HEADER as u64).map(|n| n.div_ceil(PAGE));
        let whole = pages.and_then(|pages| end.checked_add(pages.checked_mul(32)?));
        if claimed != length || length > LARGEST_FILE || whole != Some(length) {
            return Err(damaged(path, "it does not have the length that it should"));
        }
        let mut sums = vec![0; (length - end) as usize];
        read_exact(&file, path, &mut sums, end)?;
        if *blake3::hash(&sums).as_bytes() != fields.array::<32>(64) {
            return Err(damaged(path, "the sum of its page sums is wrong"));
        }
        let sections = read_sections(path, fields, usize::from(count), end)?;
        let words = (sums.len() / 32).div_ceil(64);
        Ok(Self {
            path: path.to_owned(),
            map: FileMap::read_only(&file).map_err(io_error("map", path))?,
            file,
            identity: Identity {
                key: fields.array(96),
                tar_bytes: fields.u64(56),
            },
            sum,
            sections,
            end,
            sums,
            verified: (0..words).map(|_| AtomicU64::new(0)).collect(),
            bad: Mutex::default(),
        })
    }

    /// Where it lies.
    pub(in crate::store) fn path(&self) -> &Path {
        &self.path
    }

    /// The file.
    pub(in crate::store) fn file(&self) -> &File {
        &self.file
    }

    /// The sum of the header, which covers everything.
    pub(in crate::store) fn sum(&self) -> [u8; 32] {
        self.sum
    }

    /// What the header says of the whole.
    pub(in crate::store) fn identity(&self) -> Identity {
        self.identity
    }

    /// Bytes of the file.
    pub(in crate::store) fn bytes(&self) -> u64 {
        self.end + self.sums.len() as u64
    }

    /// How many records a section has.
    pub(in crate::store) fn count(&self, section: Section) -> u32 {
        // `open` has refused more records than that.
        (self.sections[section.slot()].1 / section.record() as u64) as u32
    }

    /// A record of a section.
    pub(in crate::store) fn record(&self, section: Section, number: u32) -> Result<Record<'_>> {
        let size = section.record() as u64;
        self.slice(section, u64::from(number) * size, size)
            .map(Record)
    }

    /// Fails unless these bytes of one of its records are zero.
    pub(in crate::store) fn expect_zero(
        &self,
        record: Record<'_>,
        from: usize,
        to: usize,
    ) -> Result<()> {
        match record.is_zero(from, to) {
            true => Ok(()),
            false => Err(self.damaged(NOT_ZERO)),
        }
    }

    /// Part of a section.
    pub(in crate::store) fn slice(&self, section: Section, at: u64, bytes: u64) -> Result<&[u8]> {
        let (start, length) = self.sections[section.slot()];
        let outside = || {
            self.damaged(format!(
                "something refers to {bytes} bytes at {at} of its section {section:?}, which has {length}"
            ))
        };
        let to = at.checked_add(bytes).ok_or_else(outside)?;
        if to > length {
            return Err(outside());
        }
        if bytes == 0 {
            return Ok(&[]);
        }
        if self.map.is_lost() {
            self.renew()?;
        }
        // Within the section, and so within the pages: `open` has checked where sections lie.
        let (from, to) = (start + at, start + to);
        for page in (from - HEADER as u64) / PAGE..=(to - 1 - HEADER as u64) / PAGE {
            self.verify(page)?;
        }
        let mapped = self.map.get(from as usize, to as usize);
        mapped.ok_or_else(|| self.damaged("part of it is not there any more, or cannot be read"))
    }

    /// Maps the file as it is now. What was known of its pages may not be true any more.
    fn renew(&self) -> Result<()> {
        self.forget_pages();
        let renewed = self.map.renew(&self.file);
        renewed.map_err(io_error("map", &self.path))
    }

    /// Has every page be compared with its sum once more when it is read next.
    pub(in crate::store) fn forget_pages(&self) {
        for word in &self.verified {
            word.store(0, Ordering::Relaxed);
        }
    }

    /// Verifies every page.
    pub(in crate::store) fn verify_all(&self) -> Result<()> {
        self.forget_pages();
        (0..(self.sums.len() / 32) as u64).try_for_each(|page| self.verify(page))
    }

    /// Whether something that was read of it was not sound when it was last read.
    pub(in crate::store) fn is_damaged(&self) -> bool {
        !self.bad.lock().is_empty()
    }

    /// How many pages were read and are known to be sound.
    #[cfg(test)]
    pub(in crate::store) fn pages_read(&self) -> usize {
        let pages = self
            .verified
            .iter()
            .map(|word| word.load(Ordering::Relaxed));
        pages.map(|word| word.count_ones() as usize).sum()
    }

    /// An error that names this file.
    pub(in crate::store) fn damaged(&self, problem: impl Into<String>) -> crate::store::Error {
        damaged(&self.path, problem)
    }

    fn verify(&self, page: u64) -> Result<()> {
        let number = page as usize;
        let (word, bit) = (number / 64, 1u64 << (number % 64));
        let Some(word) = self.verified.get(word) else {
            return Err(self.damaged(format!("it has no page {page}")));
        };
        // Relaxed: two threads at worst verify the same page.
        if word.load(Ordering::Relaxed) & bit != 0 {
            return Ok(());
        }
        let sound = self.read_page(page);
        match &sound {
            Ok(()) => {
                self.bad.lock().remove(&page);
                word.fetch_or(bit, Ordering::Relaxed);
            }
            Err(_) => {
                self.bad.lock().insert(page);
            }
        }
        sound
    }

    /// Reads a page and compares it with its sum.
    fn read_page(&self, page: u64) -> Result<()> {
        let mut buffer = [0; PAGE as usize];
        let (at, bytes) = self.page_in(page, &mut buffer);
        read_exact(&self.file, &self.path, bytes, at)?;
        match self.is_page(page, bytes) {
            true => Ok(()),
            false => Err(self.damaged(format!("the sum of its page {page} is wrong"))),
        }
    }

    /// Where a page starts, and the part of `buffer` that it takes.
    fn page_in<'a>(&self, page: u64, buffer: &'a mut [u8; PAGE as usize]) -> (u64, &'a mut [u8]) {
        let start = HEADER as u64 + page * PAGE;
        let length = (self.end.saturating_sub(start)).min(PAGE) as usize;
        (start, &mut buffer[..length])
    }

    fn is_page(&self, page: u64, bytes: &[u8]) -> bool {
        let at = page as usize * 32;
        self.sums.get(at..at + 32) == Some(blake3::hash(bytes).as_bytes())
    }
}

fn read_sections(
    path: &Path,
    header: Record<'_>,
    count: usize,
    end: u64,
) -> Result<[(u64, u64); SLOTS]> {
    let wrong = |number: u32, problem: &str| {
        Err(damaged(
            path,
            format!("its header gives the section {number} a wrong {problem}"),
        ))
    };
    let mut sections = [(0, 0); SLOTS];
    if count > MOST_SECTIONS {
        return Err(damaged(path, format!("it claims to have {count} sections")));
    }
    for slot in 0..count {
        let at = SECTIONS_AT + slot * 32;
        let (number, record) = (header.u32(at), header.u32(at + 4));
        let (start, bytes) = (header.u64(at + 8), header.u64(at + 16));
        if !header.is_zero(at + 24, at + 32) {
            return Err(damaged(path, NOT_ZERO));
        }
        let Some(section) = section_of(number) else {
            // A feature that a reader may ignore, or else a word of features has said so.
            continue;
        };
        if record as usize != section.record() {
            return wrong(number, "record size");
        }
        let inside = start.checked_add(bytes).is_some_and(|to| to <= end);
        if !inside || start < HEADER as u64 || !start.is_multiple_of(8) {
            return wrong(number, "place");
        }
        let records = bytes / u64::from(record);
        if !bytes.is_multiple_of(u64::from(record)) || records >= u64::from(u32::MAX) {
            return wrong(number, "length");
        }
        sections[section.slot()] = (start, bytes);
    }
    if !header.is_zero(SECTIONS_AT + count * 32, SUM_AT) {
        return Err(damaged(path, NOT_ZERO));
    }
    Ok(sections)
}

fn section_of(number: u32) -> Option<Section> {
    use Section::{
        DirEntries, Entries, Extents, Inodes, Layers, Locations, Names, Objects, Packs, Paths,
        Texts, Times, XattrSets, Xattrs,
    };
    [
        Entries, Paths, Inodes, DirEntries, Names, Texts, Objects, Extents, Xattrs, XattrSets,
        Times, Locations, Packs, Layers,
    ]
    .into_iter()
    .find(|section| *section as u32 == number)
}

fn read_exact(file: &File, path: &Path, buffer: &mut [u8], at: u64) -> Result<()> {
    match file.read_exact_at(buffer, at) {
        Err(error) if error.kind() == io::ErrorKind::UnexpectedEof => {
            Err(damaged(path, "it is cut off"))
        }
        result => result.map_err(io_error("read", path)),
    }
}

#[cfg(test)]
mod tests;
