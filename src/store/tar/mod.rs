//! A tar stream read entry by entry, each part of it bounded, and every byte of it accounted for.
//!
//! What is understood: ustar, star's prefix, PAX (path, linkpath, size, uid, gid, mtime, atime,
//! `SCHILY.xattr.*`, `LIBARCHIVE.xattr.*`), GNU's long names and binary numbers, and sparse files
//! in GNU's old form and PAX 0.0, 0.1 and 1.0. Where there is a choice it is as Go's `archive/tar` has it,
//! for that is what containerd reads layers with.
//!
//! Content is handed to the caller; all other bytes go to a [`Tape`], so that the stream can be put
//! together again.

mod header;
pub(super) mod names;
mod pax;
pub mod write;

use std::io::{self, Read};

use super::error::{Error, Result, refused};
use super::format::Time;
use super::format::tables::Xattrs;
use super::layer::index::LONGEST_PATH;
use header::{BLOCK, Header};
pub(crate) use names::WHITEOUT;

/// Most bytes of a PAX header or of a long name; Go's limit too.
const LARGEST_EXTENSION: u64 = 1 << 20;
/// Most parts of a sparse file.
const MOST_PARTS: usize = 1_000_000;
/// Most extended headers in front of one entry.
const MOST_EXTENSIONS: usize = 64;

/// Takes the bytes of a stream that are not content.
pub(super) trait Tape {
    /// The next bytes.
    fn raw(&mut self, bytes: &[u8]) -> Result<()>;
}

/// What an entry stands for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    /// A file with content.
    Regular,
    /// Another name of a file.
    HardLink,
    /// A symbolic link.
    Symlink,
    /// A character device.
    CharDevice,
    /// A block device.
    BlockDevice,
    /// A directory.
    Directory,
    /// A fifo.
    Fifo,
}

/// A part of a sparse file that is not a hole.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Part {
    /// Where it begins in the file.
    pub offset: u64,
    /// Its bytes.
    pub length: u64,
}

/// One entry, without its content.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Entry {
    /// Name as it is written.
    pub(super) path: Vec<u8>,
    pub(super) kind: Kind,
    /// Target of a link.
    pub(super) link: Vec<u8>,
    /// `0o7777` at most.
    pub(super) perm: u16,
    pub(super) uid: u32,
    pub(super) gid: u32,
    /// Bytes of the file.
    pub(super) size: u64,
    /// Bytes of content in the stream; the same unless the file is sparse.
    pub(super) stored: u64,
    /// Parts of a sparse file: in order, none empty, together as long as the content.
    pub(super) parts: Option<Vec<Part>>,
    pub(super) mtime: Time,
    pub(super) atime: Option<Time>,
    /// Major and minor number.
    pub(super) device: (u32, u32),
    /// Each name once.
    pub(super) xattrs: Xattrs,
}

/// Reads entries from a stream.
#[derive(Debug)]
pub(super) struct Reader<R, T> {
    stream: R,
    tape: T,
    /// Bytes of the current entry's content that were not read, and of the padding after it.
    unread: u64,
    padding: u64,
    /// Name of the current entry as far as it is known.
    entry: Vec<u8>,
}

/// What precedes an entry and changes its meaning.
#[derive(Default)]
struct Extensions {
    long_path: Option<Vec<u8>>,
    long_link: Option<Vec<u8>>,
    pax: pax::Records,
}

impl<R: Read, T: Tape> Reader<R, T> {
    /// Reads from `stream`, which stands at the first header.
    pub(super) fn new(stream: R, tape: T) -> Self {
        Self {
            stream,
            tape,
            unread: 0,
            padding: 0,
            entry: Vec::new(),
        }
    }

    /// Where the bytes go that are not content.
    pub(super) fn tape(&mut self) -> &mut T {
        &mut self.tape
    }

    /// The next entry; `None` after the last. Content of the one before that was not read goes to the
    /// tape.
    pub(super) fn next_entry(&mut self) -> Result<Option<Entry>> {
        self.keep_rest()?;
        self.entry.clear();
        let mut extensions = Extensions::default();
        for _ in 0..MOST_EXTENSIONS {
            let Some(block) = self.header()? else {
                return Ok(None);
            };
            let header = Header(&block);
            if self.entry.is_empty() {
                self.entry = header.path();
            }
            let size = self.need(header.size(), "its size is not a number")?;
            match header.flag() {
                b'x' => {
                    let data = self.extension(size)?;
                    extensions.pax = self.need(pax::parse(&data), "its PAX header is damaged")?;
                }
                // As for Go, a global header says nothing of the entries.
                b'g' => {
                    self.extension(size)?;
                }
                b'L' => extensions.long_path = Some(until_zero(self.extension(size)?)),
                b'K' => extensions.long_link = Some(until_zero(self.extension(size)?)),
                _ => return self.entry(&header, size, extensions).map(Some),
            }
        }
        Err(self.refused("it has too many extended headers"))
    }

    /// Reads content of the current entry; 0 at its end.
    pub(super) fn read(&mut self, buffer: &mut [u8]) -> Result<usize> {
        let most = usize::try_from(self.unread).unwrap_or(usize::MAX);
        let most = most.min(buffer.len());
        if most == 0 {
            return Ok(0);
        }
        loop {
            match self.stream.read(&mut buffer[..most]) {
                Ok(0) => return Err(self.refused("the stream ends within its content")),
                Ok(count) => {
                    self.unread -= count as u64;
                    return Ok(count);
                }
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) => return Err(Error::Input(error)),
            }
        }
    }

    /// Brings what follows the last entry to the tape, which is answered.
    pub(super) fn finish(mut self) -> Result<T> {
        let mut buffer = vec![0; 64 << 10];
        loop {
            match self.stream.read(&mut buffer) {
                Ok(0) => return Ok(self.tape),
                Ok(count) => self.tape.raw(&buffer[..count])?,
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) => return Err(Error::Input(error)),
            }
        }
    }

    fn entry(&mut self, header: &Header<'_>, size: u64, extensions: Extensions) -> Result<Entry> {
        let records = &extensions.pax;
        // Go keeps what the header says when a long name or a record is empty.
        let long = |name: Option<Vec<u8>>| name.filter(|name| !name.is_empty());
        let mut path = long(extensions.long_path).unwrap_or_else(|| header.path());
        let mut link = long(extensions.long_link).unwrap_or_else(|| header.link());
        if let Some(value) = records.text("path") {
            path = value.to_vec();
        }
        if let Some(value) = records.text("linkpath") {
            link = value.to_vec();
        }
        self.entry.clone_from(&path);
        let kind = self.kind(header.flag(), &path)?;
        let number = |record: &str, field: Option<i64>| match records.text(record) {
            Some(value) => pax::decimal(value),
            None => field,
        };
        let uid = self.need(number("uid", header.uid()), "its owner is not a number")?;
        let gid = self.need(number("gid", header.gid()), "its group is not a number")?;
        let perm = self.need(header.mode(), "its mode is not a number")?;
        let mtime = match records.text("mtime") {
            Some(value) => pax::time(value),
            None => header.mtime().map(|sec| Time { sec, nsec: 0 }),
        };
        let atime = match records.text("atime") {
            Some(value) => Some(self.need(pax::time(value), "its time is not a number")?),
            None => header.atime().map(|sec| Time { sec, nsec: 0 }),
        };
        let mut stored = match records.text("size") {
            Some(value) => {
                let size = pax::decimal(value).and_then(|size| u64::try_from(size).ok());
                self.need(size, "its size is not a number")?
            }
            None => size,
        };
        if kind != Kind::Regular {
            stored = 0;
        }
        self.unread = stored;
        self.padding = stored.wrapping_neg() % BLOCK as u64;
        let mut entry = Entry {
            path,
            kind,
            link,
            perm: (perm & 0o7777) as u16,
            uid: self.id(uid, "user")?,
            gid: self.id(gid, "group")?,
            size: stored,
            stored,
            parts: None,
            mtime: self.need(mtime, "its time is not a number")?,
            atime,
            device: (0, 0),
            xattrs: self.need(records.xattrs(), "an extended attribute is damaged")?,
        };
        if matches!(kind, Kind::CharDevice | Kind::BlockDevice) {
            entry.device = self.need(header.device(), "its device number is absurd")?;
        }
        if kind == Kind::Regular {
            self.sparse(header, records, &mut entry)?;
        }
        self.check(&entry)?;
        Ok(entry)
    }

    fn kind(&self, flag: u8, path: &[u8]) -> Result<Kind> {
        Ok(match flag {
            0 if path.ends_with(b"/") => Kind::Directory,
            0 | b'0' | b'7' | b'S' => Kind::Regular,
            b'1' => Kind::HardLink,
            b'2' => Kind::Symlink,
            b'3' => Kind::CharDevice,
            b'4' => Kind::BlockDevice,
            b'5' => Kind::Directory,
            b'6' => Kind::Fifo,
            other => {
                let shown = char::from(other).escape_default();
                return Err(self.refused(format!("its type '{shown}' is not known")));
            }
        })
    }

    fn check(&self, entry: &Entry) -> Result<()> {
        if [&entry.path, &entry.link]
            .iter()
            .any(|text| text.contains(&0))
        {
            return Err(self.refused("its name or target contains a zero byte"));
        }
        if entry.kind == Kind::Symlink && entry.link.len() > LONGEST_PATH {
            return Err(self.refused("its target is longer than 4095 bytes"));
        }
        for (name, _) in &entry.xattrs {
            let shown = super::error::printable(name);
            if name.is_empty() || name.len() > 255 || name.contains(&0) {
                return Err(self.refused(format!(
                    "the name of its extended attribute {shown} cannot be used"
                )));
            }
        }
        Ok(())
    }

    /// Finds out what of a regular file is a hole.
    fn sparse(
        &mut self,
        header: &Header<'_>,
        records: &pax::Records,
        entry: &mut Entry,
    ) -> Result<()> {
        let what = "its map of a sparse file is damaged";
        let mut parts = Vec::new();
        if header.flag() == b'S' {
            entry.size = self.need(header.real_size(), what)?;
            let more = self.need(header.parts(&mut parts), what)?;
            let mut more = more;
            while more {
                let mut block = [0; BLOCK];
                if !self.fill(&mut block)? {
                    return Err(self.refused("the stream ends within its header"));
                }
                more = self.need(header::more_parts(&block, &mut parts), what)?;
                self.check_parts(parts.len())?;
            }
        } else {
            let version = self.need(
                records.sparse_version(),
                "its form of a sparse file is not known",
            )?;
            let Some(version) = version else {
                return Ok(());
            };
            if let Some(name) = records.text("GNU.sparse.name") {
                entry.path = name.to_vec();
                self.entry.clone_from(&entry.path);
            }
            entry.size = self.need(records.sparse_size(entry.size), what)?;
            parts = match version {
                pax::Sparse::InHeader => self.need(records.sparse_map(), what)?,
                pax::Sparse::InData => self.map_in_data()?,
            };
            entry.stored = self.unread;
        }
        let mut end = 0u64;
        let mut sum = 0u64;
        for part in &parts {
            let to = part.offset.checked_add(part.length);
            if part.offset < end || to.is_none_or(|to| to > entry.size) {
                return Err(self.refused(what));
            }
            end = part.offset + part.length;
            sum += part.length;
        }
        if sum != entry.stored {
            return Err(self.refused("its map of a sparse file is not as long as its content"));
        }
        parts.retain(|part| part.length != 0);
        entry.parts = Some(parts);
        Ok(())
    }

    /// The map at the start of the content: decimal numbers, each with a newline, up to a full block.
    fn map_in_data(&mut self) -> Result<Vec<Part>> {
        let what = "its map of a sparse file is damaged";
        let mut text = Vec::new();
        let mut numbers = Vec::new();
        loop {
            let wanted = match numbers.first() {
                Some(&count) => {
                    let count = usize::try_from(count).unwrap_or(usize::MAX);
                    self.check_parts(count)?;
                    1 + count * 2
                }
                None => 1,
            };
            if numbers.len() >= wanted {
                let parts = numbers[1..wanted].chunks_exact(2).map(|pair| Part {
                    offset: pair[0],
                    length: pair[1],
                });
                return Ok(parts.collect());
            }
            match text.iter().position(|&byte| byte == b'\n') {
                Some(end) => {
                    let number = pax::decimal(&text[..end]);
                    let number = number.and_then(|number| u64::try_from(number).ok());
                    numbers.push(self.need(number, what)?);
                    text.drain(..=end);
                }
                None if text.len() > BLOCK => return Err(self.refused(what)),
                None => {
                    if self.unread < BLOCK as u64 {
                        return Err(self.refused(what));
                    }
                    let mut block = [0; BLOCK];
                    if !self.fill(&mut block)? {
                        return Err(self.refused("the stream ends within its content"));
                    }
                    self.unread -= BLOCK as u64;
                    text.extend_from_slice(&block);
                }
            }
        }
    }

    fn check_parts(&self, count: usize) -> Result<()> {
        if count > MOST_PARTS {
            return Err(self.refused("it is a sparse file of more than a million parts"));
        }
        Ok(())
    }

    /// Reads one header block; `None` at the end of the archive or of the stream.
    fn header(&mut self) -> Result<Option<[u8; BLOCK]>> {
        let mut block = [0; BLOCK];
        if !self.fill(&mut block)? {
            return Ok(None);
        }
        if block == [0; BLOCK] {
            if self.fill(&mut block)? && block != [0; BLOCK] {
                return Err(self.refused("a block of zeros is followed by more entries"));
            }
            return Ok(None);
        }
        if Header(&block).is_sound() {
            Ok(Some(block))
        } else {
            Err(self.refused("the checksum of a header is wrong; this is no tar, or a damaged one"))
        }
    }

    /// Fills the block, which goes to the tape; false if the stream ends exactly before it.
    fn fill(&mut self, block: &mut [u8; BLOCK]) -> Result<bool> {
        let mut have = 0;
        while have < BLOCK {
            match self.stream.read(&mut block[have..]) {
                Ok(0) if have == 0 => return Ok(false),
                Ok(0) => return Err(self.refused("the stream ends within a header")),
                Ok(count) => have += count,
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) => return Err(Error::Input(error)),
            }
        }
        self.tape.raw(block)?;
        Ok(true)
    }

    fn extension(&mut self, size: u64) -> Result<Vec<u8>> {
        if size > LARGEST_EXTENSION {
            return Err(self.refused("its extended header has more than 1 MiB"));
        }
        self.unread = size;
        self.padding = size.wrapping_neg() % BLOCK as u64;
        let mut data = vec![0; size as usize];
        let mut have = 0;
        while have < data.len() {
            have += self.read(&mut data[have..])?;
        }
        self.tape.raw(&data)?;
        self.keep_rest()?;
        Ok(data)
    }

    fn keep_rest(&mut self) -> Result<()> {
        let mut buffer = [0; 8 << 10];
        loop {
            let count = self.read(&mut buffer)?;
            if count == 0 {
                break;
            }
            self.tape.raw(&buffer[..count])?;
        }
        // `umoci insert` ends its layers without the last padding and without a trailer. Go reads
        // them, and nothing of the entry is missing.
        let mut padding = Vec::with_capacity(BLOCK);
        let most = std::mem::take(&mut self.padding);
        let read = self.stream.by_ref().take(most).read_to_end(&mut padding);
        read.map_err(Error::Input)?;
        if padding.is_empty() {
            return Ok(());
        }
        self.tape.raw(&padding)
    }

    /// The highest number means "leave as it is" to chown, so it is nobody's.
    fn id(&self, id: i64, whose: &str) -> Result<u32> {
        let known = u32::try_from(id).ok().filter(|&id| id != u32::MAX);
        known.ok_or_else(|| self.refused(format!("no {whose} has the id {id}")))
    }

    fn need<V>(&self, value: Option<V>, problem: &str) -> Result<V> {
        value.ok_or_else(|| self.refused(problem))
    }

    fn refused(&self, problem: impl Into<String>) -> Error {
        refused(&self.entry, problem)
    }
}

fn until_zero(mut data: Vec<u8>) -> Vec<u8> {
    if let Some(end) = data.iter().position(|&byte| byte == 0) {
        data.truncate(end);
    }
    data
}

#[cfg(test)]
mod tests;
