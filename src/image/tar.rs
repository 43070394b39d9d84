//! A tar stream read entry by entry, each part of it bounded.
//!
//! What is understood: ustar, PAX (path, linkpath, size, uid, gid, mtime, atime, `SCHILY.xattr.*`) and
//! GNU's long names and binary numbers, as Go's `archive/tar` reads them, for that is what builders
//! and containerd use. Sparse members are refused. What an entry may claim in memory is limited, so a
//! hostile stream costs no more than a good one.
//!
//! The reader of [`store::tar`](crate::store::tar) takes sparse members, and longer names, keeps every byte that is not content and
//! gives no stream back: to be this one, too, it would need a switch for each of these.

use std::io::{self, Read};

use crate::cow::Timestamp;

const BLOCK: usize = 512;
/// Most bytes of a PAX header or of a long name; Go's limit too.
const LARGEST_EXTENSION: u64 = 1 << 20;
/// PATH_MAX without the final zero.
const LONGEST_PATH: usize = 4095;
const XATTR_PREFIX: &[u8] = b"SCHILY.xattr.";

/// Why the stream cannot be read on.
#[derive(Debug)]
pub enum Error {
    /// Reading it failed: whatever lies below says why.
    Read(io::Error),
    /// It is not a tar, or one that is not understood.
    Malformed {
        /// The entry's name as far as it is known.
        entry: Vec<u8>,
        /// What is wrong.
        problem: String,
    },
}

/// What an entry stands for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    /// Regular file.
    Regular,
    /// One more name of a file.
    HardLink,
    /// Symbolic link.
    Symlink,
    /// Character device.
    CharDevice,
    /// Block device.
    BlockDevice,
    /// Directory.
    Directory,
    /// Named pipe.
    Fifo,
}

/// One entry, without its data.
#[derive(Clone, Debug)]
pub struct Entry {
    /// Name as it is written.
    pub path: Vec<u8>,
    /// Kind.
    pub kind: Kind,
    /// Target of a link.
    pub link: Vec<u8>,
    /// Permission bits, `0o7777` at most.
    pub perm: u16,
    /// Owner.
    pub uid: u32,
    /// Group.
    pub gid: u32,
    /// Bytes of data; 0 for all but regular files.
    pub size: u64,
    /// Last change of content.
    pub mtime: Timestamp,
    /// Last access, if the stream has it.
    pub atime: Option<Timestamp>,
    /// Major and minor number of a device.
    pub device: (u32, u32),
    /// Extended attributes, in the stream's order.
    pub xattrs: Vec<(Vec<u8>, Vec<u8>)>,
}

/// Reads entries from a stream.
pub struct Reader<R> {
    stream: R,
    /// Bytes of the current entry's data that were not read, and of the padding after it.
    unread: u64,
    padding: u64,
    entry: Vec<u8>,
}

/// What precedes an entry and changes its meaning.
#[derive(Default)]
struct Extensions {
    long_path: Option<Vec<u8>>,
    long_link: Option<Vec<u8>>,
    pax: Vec<(Vec<u8>, Vec<u8>)>,
}

impl<R: Read> Reader<R> {
    /// Reads from `stream`, which stands at the first header.
    pub fn new(stream: R) -> Self {
        Self {
            stream,
            unread: 0,
            padding: 0,
            entry: Vec::new(),
        }
    }

    /// The next entry; `None` after the last. What was not read of the one before is skipped.
    pub fn next_entry(&mut self) -> Result<Option<Entry>, Error> {
        self.skip_rest()?;
        self.entry.clear();
        let mut extensions = Extensions::default();
        loop {
            let Some(block) = self.header()? else {
                return Ok(None);
            };
            let header = tar::Header::from_byte_slice(&block);
            if self.entry.is_empty() {
                self.entry = header.path_bytes().into_owned();
            }
            let size = self.number(&header.as_old().size, "size")?;
            let size = u64::try_from(size).map_err(|_| self.malformed("its size is negative"))?;
            match block[156] {
                b'x' => {
                    let data = self.extension(size)?;
                    extensions.pax = parse_pax(&data)
                        .ok_or_else(|| self.malformed("its PAX header is damaged"))?;
                }
                b'g' => self.skip(size.checked_next_multiple_of(BLOCK as u64))?,
                b'L' => extensions.long_path = Some(until_zero(self.extension(size)?)),
                b'K' => extensions.long_link = Some(until_zero(self.extension(size)?)),
                flag => return self.entry(header, flag, size, extensions).map(Some),
            }
        }
    }

    /// Reads data of the current entry; 0 at its end.
    pub fn read_data(&mut self, buffer: &mut [u8]) -> Result<usize, Error> {
        let most = usize::try_from(self.unread).unwrap_or(usize::MAX);
        let most = most.min(buffer.len());
        if most == 0 {
            return Ok(0);
        }
        match self.stream.read(&mut buffer[..most]) {
            Ok(0) => Err(self.malformed("the stream ends within its data")),
            Ok(count) => {
                self.unread -= count as u64;
                Ok(count)
            }
            Err(error) if error.kind() == io::ErrorKind::Interrupted => self.read_data(buffer),
            Err(error) => Err(Error::Read(error)),
        }
    }

    /// The stream itself, standing wherever reading has come to.
    pub fn into_inner(self) -> R {
        self.stream
    }

    fn entry(
        &mut self,
        header: &tar::Header,
        flag: u8,
        size: u64,
        extensions: Extensions,
    ) -> Result<Entry, Error> {
        let old = header.as_old();
        let mut entry = Entry {
            path: header.path_bytes().into_owned(),
            kind: Kind::Regular,
            link: header
                .link_name_bytes()
                .map(std::borrow::Cow::into_owned)
                .unwrap_or_default(),
            perm: (self.number(&old.mode, "mode")? & 0o7777) as u16,
            uid: 0,
            gid: 0,
            size,
            mtime: Timestamp {
                sec: self.number(&old.mtime, "mtime")?,
                nsec: 0,
            },
            atime: None,
            device: (0, 0),
            xattrs: Vec::new(),
        };
        let (mut uid, mut gid) = (self.number(&old.uid, "uid")?, self.number(&old.gid, "gid")?);
        if let Some(path) = extensions.long_path {
            entry.path = path;
        }
        if let Some(link) = extensions.long_link {
            entry.link = link;
        }
        for (key, value) in extensions.pax {
            // An empty value takes back what the header says; for a number that is 0.
            match key.as_slice() {
                b"path" if !value.is_empty() => entry.path = value,
                b"linkpath" if !value.is_empty() => entry.link = value,
                b"size" => entry.size = self.decimal(&value, "size")?,
                b"uid" => uid = self.decimal(&value, "uid")?,
                b"gid" => gid = self.decimal(&value, "gid")?,
                b"mtime" => entry.mtime = self.time(&value)?,
                b"atime" => entry.atime = Some(self.time(&value)?),
                _ if key.starts_with(b"GNU.sparse.") => return Err(self.malformed(SPARSE)),
                _ => {
                    if let Some(name) = key.strip_prefix(XATTR_PREFIX) {
                        entry.xattrs.push((name.to_vec(), value));
                    }
                }
            }
        }
        self.entry.clone_from(&entry.path);
        entry.kind = match flag {
            0 if entry.path.ends_with(b"/") => Kind::Directory,
            0 | b'0' | b'7' => Kind::Regular,
            b'1' => Kind::HardLink,
            b'2' => Kind::Symlink,
            b'3' => Kind::CharDevice,
            b'4' => Kind::BlockDevice,
            b'5' => Kind::Directory,
            b'6' => Kind::Fifo,
            b'S' => return Err(self.malformed(SPARSE)),
            other => {
                let shown = char::from(other).escape_default();
                return Err(self.malformed(format!("its type '{shown}' is not known")));
            }
        };
        if entry.kind != Kind::Regular {
            entry.size = 0;
        }
        if matches!(entry.kind, Kind::CharDevice | Kind::BlockDevice) {
            entry.device = self.device(header)?;
        }
        for text in [&entry.path, &entry.link] {
            if text.len() > LONGEST_PATH {
                return Err(self.malformed("its name or target is longer than 4095 bytes"));
            }
            if text.contains(&0) {
                return Err(self.malformed("its name or target contains a zero byte"));
            }
        }
        // The highest number means "leave as it is" to chown, so it is nobody's.
        let owner = |id: i64| u32::try_from(id).ok().filter(|&id| id != u32::MAX);
        entry.uid =
            owner(uid).ok_or_else(|| self.malformed(format!("no user has the id {uid}")))?;
        entry.gid =
            owner(gid).ok_or_else(|| self.malformed(format!("no group has the id {gid}")))?;
        self.unread = entry.size;
        self.padding = entry.size.wrapping_neg() % BLOCK as u64;
        Ok(entry)
    }

    /// Reads one header block; `None` at the end of the archive or of the stream.
    fn header(&mut self) -> Result<Option<[u8; BLOCK]>, Error> {
        let mut block = [0; BLOCK];
        if !self.fill(&mut block)? {
            return Ok(None);
        }
        if block == [0; BLOCK] {
            if self.fill(&mut block)? && block != [0; BLOCK] {
                return Err(self.malformed("a block of zeros is followed by more entries"));
            }
            return Ok(None);
        }
        let claimed = self.number(&block[148..156], "checksum")?;
        let bytes = || block[..148].iter().chain(b"        ").chain(&block[156..]);
        let unsigned: i64 = bytes().map(|&byte| i64::from(byte)).sum();
        let signed: i64 = bytes().map(|&byte| i64::from(byte.cast_signed())).sum();
        if claimed != unsigned && claimed != signed {
            return Err(self
                .malformed("the checksum of a header is wrong; this is no tar, or a damaged one"));
        }
        Ok(Some(block))
    }

    /// Fills the block; false if the stream ends exactly before it.
    fn fill(&mut self, block: &mut [u8; BLOCK]) -> Result<bool, Error> {
        let mut have = 0;
        while have < BLOCK {
            match self.stream.read(&mut block[have..]) {
                Ok(0) if have == 0 => return Ok(false),
                Ok(0) => return Err(self.malformed("the stream ends within a header")),
                Ok(count) => have += count,
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) => return Err(Error::Read(error)),
            }
        }
        Ok(true)
    }

    fn extension(&mut self, size: u64) -> Result<Vec<u8>, Error> {
        if size > LARGEST_EXTENSION {
            return Err(self.malformed("its extended header has more than 1 MiB"));
        }
        self.unread = size;
        self.padding = size.wrapping_neg() % BLOCK as u64;
        let mut data = vec![0; size as usize];
        let mut have = 0;
        while have < data.len() {
            have += self.read_data(&mut data[have..])?;
        }
        self.skip_rest()?;
        Ok(data)
    }

    fn skip_rest(&mut self) -> Result<(), Error> {
        let unread = std::mem::take(&mut self.unread);
        let padding = std::mem::take(&mut self.padding);
        self.skip(Some(unread))?;
        // `umoci insert` ends its layers without the last padding and without a trailer. Go reads
        // them, and nothing of the entry is missing.
        let mut padding = self.stream.by_ref().take(padding);
        io::copy(&mut padding, &mut io::sink())
            .map(drop)
            .map_err(Error::Read)
    }

    fn skip(&mut self, count: Option<u64>) -> Result<(), Error> {
        let count = count.ok_or_else(|| self.malformed("its size is absurd"))?;
        let mut rest = self.stream.by_ref().take(count);
        match io::copy(&mut rest, &mut io::sink()) {
            Ok(skipped) if skipped == count => Ok(()),
            Ok(_) => Err(self.malformed("the stream ends within its data")),
            Err(error) => Err(Error::Read(error)),
        }
    }

    fn device(&self, header: &tar::Header) -> Result<(u32, u32), Error> {
        let bytes = header.as_bytes();
        let field = |range: std::ops::Range<usize>, what| {
            let number = self.number(&bytes[range], what)?;
            u32::try_from(number).map_err(|_| self.malformed("its device number is absurd"))
        };
        Ok((
            field(329..337, "major number")?,
            field(337..345, "minor number")?,
        ))
    }

    fn number(&self, field: &[u8], what: &str) -> Result<i64, Error> {
        parse_number(field).ok_or_else(|| self.malformed(format!("its {what} is not a number")))
    }

    fn decimal<T: std::str::FromStr + Default>(
        &self,
        value: &[u8],
        what: &str,
    ) -> Result<T, Error> {
        if value.is_empty() {
            return Ok(T::default());
        }
        std::str::from_utf8(value)
            .ok()
            .and_then(|text| text.parse().ok())
            .ok_or_else(|| self.malformed(format!("its {what} is not a number")))
    }

    fn time(&self, value: &[u8]) -> Result<Timestamp, Error> {
        parse_time(value).ok_or_else(|| self.malformed("its time is not a number"))
    }

    fn malformed(&self, problem: impl Into<String>) -> Error {
        Error::Malformed {
            entry: self.entry.clone(),
            problem: problem.into(),
        }
    }
}

const SPARSE: &str =
    "it is a sparse member, which image layers do not have; build the image without `tar --sparse`";

fn until_zero(mut data: Vec<u8>) -> Vec<u8> {
    if let Some(end) = data.iter().position(|&byte| byte == 0) {
        data.truncate(end);
    }
    data
}

/// A number of a header: octal text, or GNU's big-endian two's complement behind a set high bit.
fn parse_number(field: &[u8]) -> Option<i64> {
    if field.first().is_some_and(|byte| byte & 0x80 != 0) {
        let negative = field[0] & 0x40 != 0;
        let first = if negative {
            i128::from(field[0]) - 0x100
        } else {
            i128::from(field[0] & 0x7f)
        };
        return field[1..]
            .iter()
            .try_fold(first, |sum, &byte| {
                sum.checked_mul(256)?.checked_add(i128::from(byte))
            })
            .and_then(|sum| i64::try_from(sum).ok());
    }
    let blank = |byte: &u8| *byte == b' ' || *byte == 0;
    let start = field
        .iter()
        .position(|byte| !blank(byte))
        .unwrap_or(field.len());
    let digits = &field[start..];
    let end = digits.iter().position(blank).unwrap_or(digits.len());
    digits[..end].iter().try_fold(0i64, |sum, byte| match byte {
        b'0'..=b'7' => sum.checked_mul(8)?.checked_add(i64::from(byte - b'0')),
        _ => None,
    })
}

/// Records of the form `LENGTH KEY=VALUE\n`, the length counting all of it. Values are bytes.
fn parse_pax(mut data: &[u8]) -> Option<Vec<(Vec<u8>, Vec<u8>)>> {
    let mut records = Vec::new();
    while !data.is_empty() {
        let space = data.iter().take(20).position(|&byte| byte == b' ')?;
        let length: usize = std::str::from_utf8(&data[..space]).ok()?.parse().ok()?;
        let record = data.get(space + 1..length)?.strip_suffix(b"\n")?;
        let equals = record.iter().position(|&byte| byte == b'=')?;
        if equals == 0 {
            return None;
        }
        records.push((record[..equals].to_vec(), record[equals + 1..].to_vec()));
        data = &data[length..];
    }
    Some(records)
}

/// Decimal seconds with a fraction, cut to nanoseconds; may be negative.
fn parse_time(value: &[u8]) -> Option<Timestamp> {
    if value.is_empty() {
        return Some(Timestamp::default());
    }
    let text = std::str::from_utf8(value).ok()?;
    let (whole, fraction) = text.split_once('.').unwrap_or((text, ""));
    let sec: i64 = whole.parse().ok()?;
    if !fraction.bytes().all(|byte| byte.is_ascii_digit()) {
        return None;
    }
    let nsec = fraction
        .bytes()
        .chain(std::iter::repeat(b'0'))
        .take(9)
        .fold(0u32, |sum, digit| sum * 10 + u32::from(digit - b'0'));
    if whole.starts_with('-') && nsec != 0 {
        return Some(Timestamp {
            sec: sec.checked_sub(1)?,
            nsec: 1_000_000_000 - nsec,
        });
    }
    Some(Timestamp { sec, nsec })
}
