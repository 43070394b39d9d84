//! A tar stream written entry by entry: ustar, with PAX records for what that has no room for, so that the same entries
//! are always the same bytes.

use std::collections::BTreeMap;
use std::io::{self, Write};

use super::header::BLOCK;
use super::{Kind, Part};
use crate::store::format::Time;

const ZEROS: [u8; BLOCK] = [0; BLOCK];
/// Bytes of a name or a link's target in a header.
const LONGEST_NAME: usize = 100;
/// Holes are told in whole blocks: tar's, and those of the host's file systems.
const HOLE: u64 = 4096;
/// Names of extended attributes that a layer carries, or how they begin: all others are the host's own business.
const XATTRS: [&[u8]; 3] = [b"user.", b"security.capability", b"system.posix_acl_"];
/// Where the content of a sparse file's entry is said to lie, for readers that do not know of sparse files.
const SPARSE_DIRECTORY: &[u8] = b"GNUSparseFile.0/";

/// What an entry says.
#[derive(Clone, Debug)]
pub struct NewEntry<'a> {
    /// Name, without a slash at either end.
    pub path: &'a [u8],
    /// What it stands for.
    pub kind: Kind,
    /// Target of a link.
    pub link: &'a [u8],
    /// `0o7777` at most.
    pub perm: u16,
    /// Owner.
    pub uid: u32,
    /// Group.
    pub gid: u32,
    /// Last modification.
    pub mtime: Time,
    /// Bytes of a regular file.
    pub size: u64,
    /// Parts of a sparse file: in order, none empty, all but the last of whole blocks of 512 bytes. Go's reader takes them
    /// to follow each other, GNU tar's to begin in blocks of their own.
    pub parts: Option<&'a [Part]>,
    /// Major and minor number of a device.
    pub device: (u32, u32),
    /// Extended attributes, in order of their names.
    pub xattrs: &'a [(Vec<u8>, Vec<u8>)],
}

impl<'a> NewEntry<'a> {
    /// An empty object that belongs to nobody in particular.
    pub fn new(path: &'a [u8], kind: Kind) -> Self {
        Self {
            path,
            kind,
            link: b"",
            perm: 0,
            uid: 0,
            gid: 0,
            mtime: Time::default(),
            size: 0,
            parts: None,
            device: (0, 0),
            xattrs: &[],
        }
    }
}

/// Whether a layer's stream carries an extended attribute.
pub fn is_carried(xattr: &[u8]) -> bool {
    XATTRS.iter().any(|prefix| xattr.starts_with(prefix))
}

/// The parts of a file of `size` bytes that are no holes, in whole blocks. `data` answers the first byte from one on
/// that is data, `hole` the first that is in a hole. Somebody may write to the file meanwhile, or cut it, so that the answers do not
/// fit together, nor the size.
pub fn parts<E>(
    size: u64,
    mut data: impl FnMut(u64) -> Result<Option<u64>, E>,
    mut hole: impl FnMut(u64) -> Result<u64, E>,
) -> Result<Vec<Part>, E> {
    let mut parts: Vec<Part> = Vec::new();
    let mut from = 0;
    while from < size {
        let Some(data) = data(from)?.filter(|data| *data < size) else {
            break;
        };
        let start = data / HOLE * HOLE;
        let end = hole(data)?.next_multiple_of(HOLE).min(size);
        match parts.last_mut() {
            Some(last) if last.offset + last.length >= start => {
                last.length = last.length.max(end - last.offset);
            }
            _ if end > start => parts.push(Part {
                offset: start,
                length: end - start,
            }),
            _ => {}
        }
        from = end.max(from + 1);
    }
    Ok(parts)
}

/// Writes a stream.
#[derive(Debug)]
pub struct Writer<W> {
    out: W,
    /// Bytes of the current entry's content that are missing, and of the padding after it.
    missing: u64,
    padding: usize,
}

impl<W: Write> Writer<W> {
    /// Writes to `out`.
    pub fn new(out: W) -> Self {
        Self {
            out,
            missing: 0,
            padding: 0,
        }
    }

    /// Begins an entry. The content of a regular file has to follow: all of it, or all parts of a sparse file.
    pub fn entry(&mut self, entry: &NewEntry<'_>) -> io::Result<()> {
        self.end_entry()?;
        let mut records = BTreeMap::new();
        let mut record = |key: &[u8], value: Vec<u8>| {
            records.insert(key.to_vec(), value);
        };
        let decimal = |number: u64| number.to_string().into_bytes();
        for (name, value) in entry.xattrs {
            if name.contains(&b'=') {
                return Err(io::Error::new(
                    io::ErrorKind::InvalidInput,
                    "the name of its extended attribute has a \"=\", which a tar stream cannot say",
                ));
            }
            record(&[b"SCHILY.xattr.", &**name].concat(), value.clone());
        }
        let mut path = entry.path.to_vec();
        if entry.kind == Kind::Directory {
            path.push(b'/');
        }
        let mut header = Block::new(entry.kind);
        let (map, stored) = match (entry.kind, entry.parts) {
            (Kind::Regular, None) => (Vec::new(), entry.size),
            (Kind::Regular, Some(parts)) => {
                let all_but_last = &parts[..parts.len().saturating_sub(1)];
                if all_but_last
                    .iter()
                    .any(|part| part.length % BLOCK as u64 != 0)
                {
                    return Err(io::Error::other(
                        "a part of a sparse file is no whole block",
                    ));
                }
                let map = map_of(parts, entry.size);
                let stored = parts.iter().map(|part| part.length).sum::<u64>();
                record(b"GNU.sparse.major", b"1".to_vec());
                record(b"GNU.sparse.minor", b"0".to_vec());
                record(b"GNU.sparse.name", path.clone());
                record(b"GNU.sparse.realsize", decimal(entry.size));
                let name = path.rsplit(|&byte| byte == b'/').next();
                path = [SPARSE_DIRECTORY, name.unwrap_or_default()].concat();
                (map, stored)
            }
            _ => (Vec::new(), 0),
        };
        let size = map.len() as u64 + stored;
        if !header.text(0, LONGEST_NAME, &path) && entry.parts.is_none() {
            record(b"path", path);
        }
        if !header.text(157, LONGEST_NAME, entry.link) {
            record(b"linkpath", entry.link.to_vec());
        }
        header.number(100, 8, u64::from(entry.perm));
        if !header.number(108, 8, u64::from(entry.uid)) {
            record(b"uid", decimal(u64::from(entry.uid)));
        }
        if !header.number(116, 8, u64::from(entry.gid)) {
            record(b"gid", decimal(u64::from(entry.gid)));
        }
        if !header.number(124, 12, size) {
            record(b"size", decimal(size));
        }
        let seconds = u64::try_from(entry.mtime.sec);
        if !header.number(136, 12, seconds.unwrap_or(0))
            || seconds.is_err()
            || entry.mtime.nsec != 0
        {
            record(b"mtime", decimal_time(entry.mtime));
        }
        if matches!(entry.kind, Kind::CharDevice | Kind::BlockDevice) {
            header.number(329, 8, u64::from(entry.device.0));
            header.number(337, 8, u64::from(entry.device.1));
        }
        if !records.is_empty() {
            self.records(&records)?;
        }
        self.out.write_all(&header.sealed())?;
        self.out.write_all(&map)?;
        self.missing = stored;
        self.padding = padding(size);
        Ok(())
    }

    /// Writes a regular file whose `parts` are all that is no hole. `read` reads from an offset into a buffer, one byte at
    /// least; `failed` says what an error of the stream's is.
    pub fn file<E>(
        &mut self,
        entry: &NewEntry<'_>,
        parts: &[Part],
        buffer: &mut [u8],
        mut read: impl FnMut(&mut [u8], u64) -> Result<usize, E>,
        failed: impl Fn(io::Error) -> E,
    ) -> Result<(), E> {
        let whole = Part {
            offset: 0,
            length: entry.size,
        };
        let sparse = entry.size > 0 && parts != [whole];
        let entry = NewEntry {
            parts: sparse.then_some(parts),
            ..entry.clone()
        };
        self.entry(&entry).map_err(&failed)?;
        for part in parts {
            let (mut at, end) = (part.offset, part.offset + part.length);
            while at < end {
                // No more than the buffer has.
                let most = (end - at).min(buffer.len() as u64) as usize;
                let count = read(&mut buffer[..most], at)?;
                if count == 0 {
                    let shrunk = io::Error::other("a file has shrunk while it was read");
                    return Err(failed(shrunk));
                }
                self.content(&buffer[..count]).map_err(&failed)?;
                at += count as u64;
            }
        }
        Ok(())
    }

    /// The next bytes of the current entry's content.
    pub fn content(&mut self, bytes: &[u8]) -> io::Result<()> {
        let Some(missing) = self.missing.checked_sub(bytes.len() as u64) else {
            return Err(io::Error::other("a file has grown while it was read"));
        };
        self.missing = missing;
        self.out.write_all(bytes)
    }

    /// Ends the stream and gives back where it was written to.
    pub fn finish(mut self) -> io::Result<W> {
        self.end_entry()?;
        self.out.write_all(&ZEROS)?;
        self.out.write_all(&ZEROS)?;
        Ok(self.out)
    }

    fn end_entry(&mut self) -> io::Result<()> {
        if self.missing > 0 {
            return Err(io::Error::other("a file has shrunk while it was read"));
        }
        self.out
            .write_all(&ZEROS[..std::mem::take(&mut self.padding)])
    }

    /// Writes the entry that carries the records of the next one.
    fn records(&mut self, records: &BTreeMap<Vec<u8>, Vec<u8>>) -> io::Result<()> {
        let mut data = Vec::new();
        for (key, value) in records {
            // " ", "=" and the line's end; the length counts its own digits.
            let rest = key.len() + value.len() + 3;
            let mut length = rest + digits(rest);
            if digits(length) > digits(rest) {
                length = rest + digits(length);
            }
            data.extend_from_slice(format!("{length} ").as_bytes());
            data.extend_from_slice(key);
            data.push(b'=');
            data.extend_from_slice(value);
            data.push(b'\n');
        }
        let mut header = Block::new(Kind::Regular);
        header.0[156] = b'x';
        header.text(0, LONGEST_NAME, b"PaxHeaders.0/entry");
        header.number(100, 8, 0o644);
        header.number(124, 12, data.len() as u64);
        for at in [108, 116] {
            header.number(at, 8, 0);
        }
        header.number(136, 12, 0);
        let padding = padding(data.len() as u64);
        data.resize(data.len() + padding, 0);
        self.out.write_all(&header.sealed())?;
        self.out.write_all(&data)
    }
}

/// A header that is being made.
struct Block([u8; BLOCK]);

impl Block {
    fn new(kind: Kind) -> Self {
        let mut block = Self(ZEROS);
        block.0[156] = match kind {
            Kind::Regular => b'0',
            Kind::HardLink => b'1',
            Kind::Symlink => b'2',
            Kind::CharDevice => b'3',
            Kind::BlockDevice => b'4',
            Kind::Directory => b'5',
            Kind::Fifo => b'6',
        };
        block.0[257..265].copy_from_slice(b"ustar\x0000");
        block
    }

    /// Writes as much of the text as there is room for; whether that is all.
    fn text(&mut self, at: usize, room: usize, text: &[u8]) -> bool {
        let fits = text.len().min(room);
        self.0[at..at + fits].copy_from_slice(&text[..fits]);
        fits == text.len()
    }

    /// Writes octal digits and a zero byte; zero, if the number does not fit, which is answered.
    fn number(&mut self, at: usize, room: usize, number: u64) -> bool {
        let fits = number < 1 << (3 * (room - 1));
        let digits = format!(
            "{:0width$o}",
            if fits { number } else { 0 },
            width = room - 1
        );
        self.0[at..at + room - 1].copy_from_slice(digits.as_bytes());
        fits
    }

    fn sealed(mut self) -> [u8; BLOCK] {
        self.0[148..156].fill(b' ');
        let sum: u64 = self.0.iter().map(|&byte| u64::from(byte)).sum();
        self.number(148, 7, sum);
        self.0[154] = 0;
        self.0
    }
}

/// The map in front of a sparse file's parts, in the form 1.0. It ends with where the file does.
fn map_of(parts: &[Part], size: u64) -> Vec<u8> {
    let ends_early = parts
        .last()
        .is_none_or(|part| part.offset + part.length < size);
    let mut map = format!("{}\n", parts.len() + usize::from(ends_early));
    for part in parts {
        map += &format!("{}\n{}\n", part.offset, part.length);
    }
    if ends_early {
        map += &format!("{size}\n0\n");
    }
    let mut map = map.into_bytes();
    map.resize(map.len() + padding(map.len() as u64), 0);
    map
}

fn padding(size: u64) -> usize {
    // Less than a block.
    (size.next_multiple_of(BLOCK as u64) - size) as usize
}

fn digits(number: usize) -> usize {
    number.to_string().len()
}

fn decimal_time(time: Time) -> Vec<u8> {
    let nanoseconds = i128::from(time.sec) * 1_000_000_000 + i128::from(time.nsec);
    let sign = if nanoseconds < 0 { "-" } else { "" };
    let all = nanoseconds.unsigned_abs();
    let (seconds, rest) = (all / 1_000_000_000, all % 1_000_000_000);
    let text = format!("{sign}{seconds}.{rest:09}");
    text.trim_end_matches('0')
        .trim_end_matches('.')
        .as_bytes()
        .to_vec()
}

#[cfg(test)]
mod tests {
    use std::fs;
    use std::process::Command;

    use super::super::tests::{find, read_all};
    use super::*;

    fn entry(path: &[u8], kind: Kind) -> NewEntry<'_> {
        NewEntry {
            path,
            kind,
            link: b"",
            perm: 0o644,
            uid: 0,
            gid: 0,
            mtime: Time::default(),
            size: 0,
            parts: None,
            device: (0, 0),
            xattrs: &[],
        }
    }

    #[test]
    fn what_is_written_is_what_is_read_here_and_by_gnu_tar() {
        let long = format!("{}/{}", "d".repeat(130), "f".repeat(150));
        let parts = [(4096, 1024), (1 << 20, 5000)].map(|(offset, length)| Part { offset, length });
        let xattrs = [(b"user.name".to_vec(), b"v\0al=ue\n".to_vec())];
        let mtime = Time {
            sec: 1_600_000_000,
            nsec: 120_000_000,
        };
        let mut writer = Writer::new(Vec::new());
        let mut add = |entry: &NewEntry<'_>, content: &[u8]| {
            writer.entry(entry).unwrap();
            writer.content(content).unwrap();
        };
        let file = NewEntry {
            size: 700,
            uid: 3_000_000_000,
            gid: 0o7_777_777,
            perm: 0o4755,
            mtime,
            xattrs: &xattrs,
            ..entry(long.as_bytes(), Kind::Regular)
        };
        add(&file, &[7; 700]);
        add(&entry(b"dir", Kind::Directory), b"");
        let sparse = NewEntry {
            size: 2 << 20,
            parts: Some(&parts),
            ..entry(b"dir/sparse", Kind::Regular)
        };
        add(&sparse, &[1; 6024]);
        let link = NewEntry {
            link: long.as_bytes(),
            ..entry(b"hard", Kind::HardLink)
        };
        add(&link, b"");
        let device = NewEntry {
            device: (4095, 1_048_575),
            ..entry(b"device", Kind::CharDevice)
        };
        add(&device, b"");
        let stream = writer.finish().unwrap();

        let entries = read_all(&stream).unwrap();
        assert_eq!(entries.len(), 5);
        let (read, content) = find(&entries, &long);
        assert_eq!(
            (read.uid, read.gid, read.perm),
            (file.uid, file.gid, 0o4755)
        );
        assert_eq!((read.mtime, &*read.xattrs), (mtime, &xattrs[..]));
        assert_eq!(content, &[7; 700]);
        let (read, content) = find(&entries, "dir/sparse");
        assert_eq!(
            (read.size, read.parts.as_deref()),
            (2 << 20, Some(&parts[..]))
        );
        assert_eq!(content, &[1; 6024]);
        assert_eq!(find(&entries, "hard").0.link, long.as_bytes());
        assert_eq!(find(&entries, "device").0.device, (4095, 1_048_575));

        let tmp = tempfile::tempdir().unwrap();
        let archive = tmp.path().join("archive");
        fs::write(&archive, &stream).unwrap();
        let unpacked = Command::new("tar")
            .args(["--extract", "--file"])
            .arg(&archive)
            .arg("--directory")
            .arg(tmp.path())
            .args(["--exclude=device", "--no-same-owner"])
            .output()
            .unwrap();
        assert!(unpacked.status.success(), "{unpacked:?}");
        let sparse = fs::read(tmp.path().join("dir/sparse")).unwrap();
        assert_eq!(sparse.len(), 2 << 20);
        assert_eq!(sparse.iter().filter(|&&byte| byte == 1).count(), 6024);
        assert_eq!(fs::read(tmp.path().join("hard")).unwrap(), [7; 700]);
    }

    /// A file that had grown since its size was told had a part that began behind it.
    #[test]
    fn parts_lie_in_a_file_that_grows_and_is_cut() {
        let of = |data: &[u64], hole: &[u64]| {
            let (mut data, mut hole) = (data.iter(), hole.iter());
            let found = parts(
                10_000,
                |_| Ok::<_, io::Error>(data.next().copied()),
                |_| Ok(*hole.next().unwrap()),
            );
            let found = found.unwrap().into_iter();
            found
                .map(|part| (part.offset, part.length))
                .collect::<Vec<_>>()
        };
        assert_eq!(of(&[0, 20_000], &[4096]), [(0, 4096)]);
        assert_eq!(of(&[20_000], &[]), []);
        assert_eq!(of(&[8192], &[30_000]), [(8192, 1808)]);
        // Cut between the two answers.
        assert_eq!(of(&[4096], &[4096]), []);
        assert_eq!(of(&[0, 4096], &[4096, 4096]), [(0, 4096)]);
    }

    #[test]
    fn times_are_decimal_with_as_many_digits_as_they_need() {
        let told = |sec, nsec| String::from_utf8(decimal_time(Time { sec, nsec })).unwrap();
        assert_eq!(told(5, 0), "5");
        assert_eq!(told(10, 500_000_000), "10.5");
        assert_eq!(told(-2, 500_000_000), "-1.5");
        assert_eq!(told(0, 1), "0.000000001");
    }

    #[test]
    fn a_record_counts_its_own_digits() {
        for length in 80..120 {
            let path = vec![b'p'; length];
            let mut writer = Writer::new(Vec::new());
            writer.entry(&entry(&path, Kind::Regular)).unwrap();
            let entries = read_all(&writer.finish().unwrap()).unwrap();
            assert_eq!(entries[0].0.path, path);
        }
    }
}
