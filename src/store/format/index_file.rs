//! The frame that the index of a layer and a view have in common: a header, sections of records, and
//! a sum for each page.
//!
//! Opening verifies the header and the table of sums, a few pages; every other page is verified when the
//! first byte of it is used. That goes through read(2), so that a disk error or a file that was cut off is an
//! error and not a signal; from then on the mapping is used. All access goes through
//! [`IndexFile::slice`], which checks bounds, so no damage leads beyond the file.

use std::collections::BTreeSet;
use std::fs::File;
use std::io::{self, Write};
use std::os::unix::fs::{FileExt, MetadataExt};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU64, Ordering};

use parking_lot::Mutex;

use super::{Record, check_features};
use crate::store::error::{Result, damaged, io_error};
use crate::sys::map::FileMap;

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
        // Within the section, and so within the pages: `open` has checked where sections lie.
        let (from, to) = (start + at, start + to);
        for page in (from - HEADER as u64) / PAGE..=(to - 1 - HEADER as u64) / PAGE {
            self.verify(page)?;
        }
        let mapped = self.map.bytes().get(from as usize..to as usize);
        mapped.ok_or_else(outside)
    }

    /// Verifies every page.
    pub(in crate::store) fn verify_all(&self) -> Result<()> {
        for word in &self.verified {
            word.store(0, Ordering::Relaxed);
        }
        (0..(self.sums.len() / 32) as u64).try_for_each(|page| self.verify(page))
    }

    /// Writes the pages that are not sound as they are in `other`, where that has what the sums say, and says whether all are
    /// sound then. Who has the file open reads them from then on. Another file that has taken its place is left alone.
    pub(in crate::store) fn restore_pages(&self, other: &File) -> Result<bool> {
        let own = File::options().write(true).open(&self.path);
        let own = own.map_err(io_error("open", &self.path))?;
        let identity = |file: &File| file.metadata().map(|found| (found.dev(), found.ino()));
        let (ours, found) = (identity(&self.file), identity(&own));
        let look = |found: io::Result<_>| found.map_err(io_error("look at", &self.path));
        if look(ours)? != look(found)? {
            return Ok(false);
        }
        for page in 0..(self.sums.len() / 32) as u64 {
            if self.read_page(page).is_ok() {
                continue;
            }
            let mut buffer = [0; PAGE as usize];
            let (at, bytes) = self.page_in(page, &mut buffer);
            let is_it = other.read_exact_at(bytes, at).is_ok() && self.is_page(page, bytes);
            if !is_it {
                return Ok(false);
            }
            own.write_all_at(bytes, at)
                .map_err(io_error("write", &self.path))?;
        }
        own.sync_all().map_err(io_error("write", &self.path))?;
        Ok(true)
    }

    /// Whether something that was read of it was not sound when it was last read.
    pub(in crate::store) fn is_damaged(&self) -> bool {
        !self.bad.lock().is_empty()
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
        // Relaxed: the bytes do not change, so two threads at worst verify the same page.
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

/// The sections of an index that is being made.
#[derive(Debug, Default)]
pub(in crate::store) struct IndexWriter {
    sections: Vec<(Section, Vec<u8>)>,
}

impl IndexWriter {
    /// Adds a section; none is added twice.
    pub(in crate::store) fn section(&mut self, section: Section, bytes: Vec<u8>) {
        if !bytes.is_empty() {
            self.sections.push((section, bytes));
        }
    }

    /// Writes it to `out` and answers the sum of its header.
    pub(in crate::store) fn write(
        self,
        out: &mut impl Write,
        kind: Kind,
        identity: &Identity,
    ) -> io::Result<[u8; 32]> {
        let mut header = [0; HEADER];
        let mut at = HEADER as u64;
        let mut slot = SECTIONS_AT;
        for (section, bytes) in &self.sections {
            let length = bytes.len() as u64;
            header[slot..slot + 4].copy_from_slice(&(*section as u32).to_le_bytes());
            header[slot + 4..slot + 8].copy_from_slice(&(section.record() as u32).to_le_bytes());
            header[slot + 8..slot + 16].copy_from_slice(&at.to_le_bytes());
            header[slot + 16..slot + 24].copy_from_slice(&length.to_le_bytes());
            slot += 32;
            at += length.next_multiple_of(8);
        }
        let sums = self.page_sums();
        header[..8].copy_from_slice(kind.magic());
        header[8..10].copy_from_slice(&1u16.to_le_bytes());
        header[10..12].copy_from_slice(&(self.sections.len() as u16).to_le_bytes());
        header[40..48].copy_from_slice(&(at + sums.len() as u64).to_le_bytes());
        header[48..56].copy_from_slice(&at.to_le_bytes());
        header[56..64].copy_from_slice(&identity.tar_bytes.to_le_bytes());
        header[64..96].copy_from_slice(blake3::hash(&sums).as_bytes());
        header[96..128].copy_from_slice(&identity.key);
        let sum = *blake3::hash(&header[..SUM_AT]).as_bytes();
        header[SUM_AT..].copy_from_slice(&sum);
        out.write_all(&header)?;
        for (_, bytes) in &self.sections {
            out.write_all(bytes)?;
            out.write_all(padding(bytes.len()))?;
        }
        out.write_all(&sums)?;
        Ok(sum)
    }

    fn page_sums(&self) -> Vec<u8> {
        let mut sums = Vec::new();
        let mut page = Vec::with_capacity(PAGE as usize);
        let pieces = self
            .sections
            .iter()
            .flat_map(|(_, bytes)| [bytes.as_slice(), padding(bytes.len())]);
        for mut piece in pieces {
            while !piece.is_empty() {
                let room = (PAGE as usize - page.len()).min(piece.len());
                page.extend_from_slice(&piece[..room]);
                piece = &piece[room..];
                if page.len() == PAGE as usize {
                    sums.extend_from_slice(blake3::hash(&page).as_bytes());
                    page.clear();
                }
            }
        }
        if !page.is_empty() {
            sums.extend_from_slice(blake3::hash(&page).as_bytes());
        }
        sums
    }
}

fn padding(length: usize) -> &'static [u8] {
    &[0; 8][..length.next_multiple_of(8) - length]
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::store::Error;

    fn sample() -> Vec<u8> {
        let mut writer = IndexWriter::default();
        writer.section(Section::Names, b"names".to_vec());
        writer.section(Section::Texts, vec![7; 10_000]);
        writer.section(Section::Packs, vec![1; 32]);
        let mut file = Vec::new();
        let identity = Identity {
            key: [3; 32],
            tar_bytes: 5,
        };
        writer.write(&mut file, Kind::View, &identity).unwrap();
        file
    }

    fn opened(bytes: &[u8]) -> Result<IndexFile> {
        let tmp = tempfile::NamedTempFile::new().unwrap();
        std::fs::write(tmp.path(), bytes).unwrap();
        IndexFile::open(tmp.path(), Kind::View)
    }

    /// It was written over by pages of the one that it had replaced.
    #[test]
    fn pages_are_not_restored_in_another_file_that_has_taken_the_place() {
        let tmp = tempfile::tempdir().unwrap();
        let path = tmp.path().join("view");
        let good = tmp.path().join("good");
        std::fs::write(&good, sample()).unwrap();
        let mut bytes = sample();
        bytes[HEADER + 5000] ^= 1;
        std::fs::write(&path, &bytes).unwrap();
        let damaged = IndexFile::open(&path, Kind::View).unwrap();
        let new = tmp.path().join("new");
        std::fs::write(&new, b"another").unwrap();
        std::fs::rename(&new, &path).unwrap();
        let good = File::open(&good).unwrap();
        assert!(!damaged.restore_pages(&good).unwrap());
        assert_eq!(std::fs::read(&path).unwrap(), b"another");
    }

    /// Everything that a reader can get of it.
    fn contents(index: &IndexFile) -> Result<Vec<Vec<u8>>> {
        [Section::Names, Section::Texts, Section::Packs]
            .into_iter()
            .map(|section| {
                let bytes = u64::from(index.count(section)) * section.record() as u64;
                index.slice(section, 0, bytes).map(<[u8]>::to_vec)
            })
            .collect()
    }

    #[test]
    fn gives_back_what_was_written() {
        let index = opened(&sample()).unwrap();
        assert_eq!(index.identity().key, [3; 32]);
        assert_eq!(index.identity().tar_bytes, 5);
        assert_eq!(index.slice(Section::Names, 1, 3).unwrap(), b"ame");
        assert_eq!(index.count(Section::Packs), 2);
        assert_eq!(index.record(Section::Packs, 1).unwrap().0, [1; 16]);
        assert_eq!(index.count(Section::Layers), 0);
        index.verify_all().unwrap();
    }

    #[test]
    fn nothing_outside_a_section_is_reached() {
        let index = opened(&sample()).unwrap();
        for (section, at, bytes) in [
            (Section::Names, 0, 6),
            (Section::Names, 6, 0),
            (Section::Names, u64::MAX, 2),
            (Section::Texts, 10_000, 1),
            (Section::Layers, 0, 1),
        ] {
            assert!(index.slice(section, at, bytes).is_err(), "{section:?} {at}");
        }
        assert!(index.record(Section::Packs, 2).is_err());
        assert!(index.record(Section::Packs, u32::MAX).is_err());
    }

    #[test]
    fn every_damaged_byte_is_an_error_or_changes_nothing() {
        let good = sample();
        let expected = contents(&opened(&good).unwrap()).unwrap();
        for at in 0..good.len() {
            let mut bad = good.clone();
            bad[at] ^= 0x10;
            let seen = opened(&bad).and_then(|index| contents(&index));
            // Padding between sections is covered by a page's sum, too.
            assert!(seen.is_err() || seen.unwrap() == expected, "byte {at}");
        }
        for length in (0..good.len()).step_by(97) {
            assert!(opened(&good[..length]).is_err(), "cut at {length}");
        }
    }

    #[test]
    fn damage_is_known_from_when_it_is_read_until_what_is_read_is_sound() {
        let tmp = tempfile::NamedTempFile::new().unwrap();
        std::fs::write(tmp.path(), sample()).unwrap();
        let index = IndexFile::open(tmp.path(), Kind::View).unwrap();
        let flip = |at: u64| {
            let file = File::options().read(true).write(true).open(tmp.path());
            let (file, mut byte) = (file.unwrap(), [0]);
            file.read_exact_at(&mut byte, at).unwrap();
            file.write_all_at(&[byte[0] ^ 1], at).unwrap();
        };
        flip(HEADER as u64 + PAGE + 7);
        index.slice(Section::Names, 0, 5).unwrap();
        assert!(!index.is_damaged());
        assert!(contents(&index).is_err());
        assert!(index.is_damaged());
        flip(HEADER as u64 + PAGE + 7);
        contents(&index).unwrap();
        assert!(!index.is_damaged());
    }

    #[test]
    fn a_file_that_is_cut_off_while_it_is_open_is_an_error_and_no_signal() {
        let tmp = tempfile::NamedTempFile::new().unwrap();
        std::fs::write(tmp.path(), sample()).unwrap();
        let index = IndexFile::open(tmp.path(), Kind::View).unwrap();
        tmp.as_file().set_len(2000).unwrap();
        assert!(matches!(contents(&index), Err(Error::Damaged { .. })));
    }

    #[test]
    fn unknown_features_are_honoured() {
        let patched = |at: usize, value: u8| {
            let mut file = sample();
            file[at] = value;
            let sum = *blake3::hash(&file[..SUM_AT]).as_bytes();
            file[SUM_AT..HEADER].copy_from_slice(&sum);
            opened(&file)
        };
        assert!(patched(16, 1).is_ok());
        assert!(patched(24, 1).is_ok());
        for (at, value) in [(32, 1), (8, 2)] {
            let error = patched(at, value).unwrap_err();
            assert!(error.to_string().contains("newer release"), "{error}");
        }
    }
}
