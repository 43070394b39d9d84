//! The log of a container: every byte that it wrote, in the order in which the shim read it.
//!
//! The file starts with [`MAGIC`]. Records follow, each a header of 16 bytes and its data:
//!
//! | bytes | content |
//! |---|---|
//! | 0..8 | time of reading, nanoseconds since 1970, little endian |
//! | 8..12 | length of the data, little endian, 1 to [`LONGEST`] |
//! | 12 | 1: stdout (or the terminal), 2: stderr |
//! | 13..16 | zero |
//!
//! A record is what one read(2) gave, so a line may be spread over several and a record may hold
//! several lines. Only the shim writes, and only appends; what a crash leaves of a last record is cut
//! off when the log is opened again for writing, and is the end of the log for a reader.

use std::fs::{File, OpenOptions};
use std::io::{self, BufReader, ErrorKind, Read, Seek, SeekFrom};
use std::os::unix::fs::{FileExt, OpenOptionsExt};
use std::path::Path;
use std::time::{Duration, SystemTime};

/// The first bytes of a log.
pub const MAGIC: &[u8; 8] = b"plylog1\n";
/// Bytes of a record's header.
pub const HEADER: usize = 16;
/// Most bytes of data in one record.
pub const LONGEST: usize = 64 << 10;

/// Which of a process's outputs a record holds.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Stream {
    /// Standard output, or the terminal.
    Stdout = 1,
    /// Standard error.
    Stderr = 2,
}

/// One piece of output.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Record {
    /// When it was read.
    pub time: SystemTime,
    /// From where.
    pub stream: Stream,
    /// What.
    pub data: Vec<u8>,
}

/// The header of a record with `length` bytes of data, read now.
pub fn header(stream: Stream, length: usize) -> [u8; HEADER] {
    let now = SystemTime::now()
        .duration_since(SystemTime::UNIX_EPOCH)
        .map_or(0, |time| u64::try_from(time.as_nanos()).unwrap_or(u64::MAX));
    let mut bytes = [0; HEADER];
    bytes[..8].copy_from_slice(&now.to_le_bytes());
    bytes[8..12].copy_from_slice(&u32::try_from(length).unwrap_or(u32::MAX).to_le_bytes());
    bytes[12] = stream as u8;
    bytes
}

/// Takes a header apart. `None`: these bytes are no header.
pub fn parse_header(bytes: &[u8; HEADER]) -> Option<(SystemTime, Stream, usize)> {
    let [
        t0,
        t1,
        t2,
        t3,
        t4,
        t5,
        t6,
        t7,
        l0,
        l1,
        l2,
        l3,
        stream,
        0,
        0,
        0,
    ] = *bytes
    else {
        return None;
    };
    let nanoseconds = u64::from_le_bytes([t0, t1, t2, t3, t4, t5, t6, t7]);
    let length = usize::try_from(u32::from_le_bytes([l0, l1, l2, l3])).ok()?;
    let stream = match stream {
        1 => Stream::Stdout,
        2 => Stream::Stderr,
        _ => return None,
    };
    (1..=LONGEST).contains(&length).then(|| {
        let time = SystemTime::UNIX_EPOCH + Duration::from_nanos(nanoseconds);
        (time, stream, length)
    })
}

/// Takes a whole record, header and data, apart.
pub fn parse(bytes: &[u8]) -> Option<Record> {
    let (head, data) = bytes.split_first_chunk::<HEADER>()?;
    let (time, stream, length) = parse_header(head)?;
    (data.len() == length).then(|| Record {
        time,
        stream,
        data: data.to_vec(),
    })
}

/// The shim's end of a log.
#[derive(Debug)]
pub struct LogWriter {
    file: File,
    end: u64,
}

impl LogWriter {
    /// Opens the log, mode 0600, and finds the end of its last whole record.
    pub fn open(path: &Path) -> io::Result<Self> {
        let file = OpenOptions::new()
            .read(true)
            .write(true)
            .create(true)
            .truncate(false)
            .mode(0o600)
            .open(path)?;
        let end = match whole_length(&file)? {
            0 => {
                file.write_all_at(MAGIC, 0)?;
                MAGIC.len() as u64
            }
            end => end,
        };
        file.set_len(end)?;
        Ok(Self { file, end })
    }

    /// Where the next record will be.
    pub fn end(&self) -> u64 {
        self.end
    }

    /// Appends `data`, at most [`LONGEST`] bytes, as one record. On an error nothing of it stays.
    pub fn append(&mut self, stream: Stream, data: &[u8]) -> io::Result<()> {
        let mut record = Vec::with_capacity(HEADER + data.len());
        record.extend_from_slice(&header(stream, data.len()));
        record.extend_from_slice(data);
        if let Err(error) = self.file.write_all_at(&record, self.end) {
            self.file.set_len(self.end)?;
            return Err(error);
        }
        self.end += record.len() as u64;
        Ok(())
    }

    /// Reads whole records from `offset` on, about `limit` bytes of them, one `take` for each.
    /// Answers the offset of the next.
    pub fn read(
        &self,
        mut offset: u64,
        limit: usize,
        mut take: impl FnMut(&[u8]),
    ) -> io::Result<u64> {
        let mut done = 0;
        let mut record = Vec::new();
        while offset < self.end && done < limit {
            let mut head = [0; HEADER];
            self.file.read_exact_at(&mut head, offset)?;
            let (_, _, length) = parse_header(&head).ok_or_else(|| damaged(offset))?;
            record.clear();
            record.extend_from_slice(&head);
            record.resize(HEADER + length, 0);
            self.file
                .read_exact_at(&mut record[HEADER..], offset + HEADER as u64)?;
            take(&record);
            offset += record.len() as u64;
            done += record.len();
        }
        Ok(offset)
    }
}

/// A reader of a log that may still grow.
#[derive(Debug)]
pub struct LogReader {
    file: BufReader<File>,
    offset: u64,
    /// The file's own position is not `offset`.
    moved: bool,
    /// What is written from here on is not read.
    end: Option<u64>,
}

impl LogReader {
    /// Opens the log at `path` at its first record, or at `offset`.
    pub fn open(path: &Path, offset: Option<u64>) -> io::Result<Self> {
        let mut file = BufReader::new(File::open(path)?);
        let mut magic = [0; MAGIC.len()];
        match file.read_exact(&mut magic) {
            Ok(()) if magic == *MAGIC => {}
            // Nothing has been written yet.
            Err(error) if error.kind() == ErrorKind::UnexpectedEof => {}
            Err(error) => return Err(error),
            Ok(()) => {
                return Err(io::Error::new(
                    ErrorKind::InvalidData,
                    "it is no container log",
                ));
            }
        }
        let offset = offset.unwrap_or(MAGIC.len() as u64);
        Ok(Self {
            file,
            offset,
            moved: true,
            end: None,
        })
    }

    /// Takes the present end for the last, whatever is written from now on.
    pub fn end_here(&mut self) -> io::Result<()> {
        self.end = Some(self.file.get_ref().metadata()?.len());
        Ok(())
    }

    /// Where the next record is.
    pub fn offset(&self) -> u64 {
        self.offset
    }

    /// Goes on `bytes` further: a whole number of records that the caller has already.
    pub fn skip(&mut self, bytes: u64) {
        self.offset += bytes;
        self.moved = true;
    }

    /// The next record; `None` at the end, after which it may be called again.
    pub fn next_record(&mut self) -> io::Result<Option<Record>> {
        if std::mem::take(&mut self.moved) {
            self.file.seek(SeekFrom::Start(self.offset))?;
        }
        let whole = self.read_whole();
        self.moved = !matches!(whole, Ok(Some(_)));
        whole
    }

    fn read_whole(&mut self) -> io::Result<Option<Record>> {
        let is_over = |next| self.end.is_some_and(|end| next > end);
        let mut head = [0; HEADER];
        // What is at the end may be there in part only, and be no header yet.
        if is_over(self.offset + HEADER as u64) || !read_or_end(&mut self.file, &mut head)? {
            return Ok(None);
        }
        let (time, stream, length) = parse_header(&head).ok_or_else(|| damaged(self.offset))?;
        let next = self.offset + (HEADER + length) as u64;
        let mut data = vec![0; length];
        if is_over(next) || !read_or_end(&mut self.file, &mut data)? {
            return Ok(None);
        }
        self.offset = next;
        Ok(Some(Record { time, stream, data }))
    }

    /// Moves to where the last `lines` lines begin. A line that has no newline yet counts.
    /// Answers how many bytes at the start of the next record belong to an earlier line.
    pub fn seek_tail(&mut self, lines: u64) -> io::Result<usize> {
        let start = self.offset;
        let mut ends = 0u64;
        let mut open_line = false;
        while let Some(record) = self.next_record()? {
            ends += newlines(&record.data);
            open_line = record.data.last() != Some(&b'\n');
        }
        let total = ends + u64::from(open_line);
        let mut skip = total.saturating_sub(lines);
        if skip == total {
            return Ok(0);
        }
        self.seek_to(start);
        while skip > 0 {
            let here = self.offset;
            let Some(record) = self.next_record()? else {
                break;
            };
            let count = newlines(&record.data);
            if count < skip {
                skip -= count;
                continue;
            }
            let mut position = 0;
            while skip > 0 {
                let rest = record.data[position..].iter();
                position += rest.take_while(|&&byte| byte != b'\n').count() + 1;
                skip -= 1;
            }
            if position < record.data.len() {
                self.seek_to(here);
                return Ok(position);
            }
        }
        Ok(0)
    }

    fn seek_to(&mut self, offset: u64) {
        self.offset = offset;
        self.moved = true;
    }
}

fn newlines(data: &[u8]) -> u64 {
    data.iter().filter(|&&byte| byte == b'\n').count() as u64
}

fn damaged(offset: u64) -> io::Error {
    let problem = format!("the container's log is damaged at byte {offset}");
    io::Error::new(ErrorKind::InvalidData, problem)
}

/// Fills `buffer`; `false` when the file ends before it is full.
fn read_or_end(file: &mut impl Read, buffer: &mut [u8]) -> io::Result<bool> {
    match file.read_exact(buffer) {
        Ok(()) => Ok(true),
        Err(error) if error.kind() == ErrorKind::UnexpectedEof => Ok(false),
        Err(error) => Err(error),
    }
}

/// Bytes up to the end of the last whole record; 0 for an empty file.
fn whole_length(file: &File) -> io::Result<u64> {
    let total = file.metadata()?.len();
    if total < MAGIC.len() as u64 {
        return Ok(0);
    }
    let mut reader = BufReader::new(file);
    reader.seek(SeekFrom::Start(0))?;
    let mut magic = [0; MAGIC.len()];
    reader.read_exact(&mut magic)?;
    if magic != *MAGIC {
        return Err(io::Error::new(
            ErrorKind::InvalidData,
            "it is no container log",
        ));
    }
    let mut end = MAGIC.len() as u64;
    let mut head = [0; HEADER];
    while read_or_end(&mut reader, &mut head)? {
        let Some((_, _, length)) = parse_header(&head) else {
            break;
        };
        let next = end + (HEADER + length) as u64;
        if next > total {
            break;
        }
        reader.seek_relative(i64::try_from(length).map_err(io::Error::other)?)?;
        end = next;
    }
    Ok(end)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn all(reader: &mut LogReader) -> Vec<u8> {
        let mut bytes = Vec::new();
        while let Some(record) = reader.next_record().unwrap() {
            bytes.extend(record.data);
        }
        bytes
    }

    #[test]
    fn reads_back_what_was_written_and_goes_on_at_the_end() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("log");
        let mut writer = LogWriter::open(&path).unwrap();
        writer.append(Stream::Stdout, b"one\ntw").unwrap();
        let mut reader = LogReader::open(&path, None).unwrap();
        assert_eq!(reader.next_record().unwrap().unwrap().data, b"one\ntw");
        assert_eq!(reader.next_record().unwrap(), None);
        writer.append(Stream::Stderr, b"o\n").unwrap();
        let record = reader.next_record().unwrap().unwrap();
        assert_eq!(
            (record.stream, record.data.as_slice()),
            (Stream::Stderr, &b"o\n"[..])
        );
        assert_eq!(reader.offset(), writer.end());
    }

    #[test]
    fn a_torn_record_is_the_end_and_is_cut_off() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("log");
        let mut writer = LogWriter::open(&path).unwrap();
        writer.append(Stream::Stdout, b"whole").unwrap();
        writer.append(Stream::Stdout, b"torn").unwrap();
        let end = writer.end();
        drop(writer);
        OpenOptions::new()
            .write(true)
            .open(&path)
            .unwrap()
            .set_len(end - 1)
            .unwrap();
        assert_eq!(all(&mut LogReader::open(&path, None).unwrap()), b"whole");
        let mut writer = LogWriter::open(&path).unwrap();
        writer.append(Stream::Stdout, b"!").unwrap();
        assert_eq!(all(&mut LogReader::open(&path, None).unwrap()), b"whole!");
    }

    #[test]
    fn tail_counts_lines_across_records() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("log");
        let mut writer = LogWriter::open(&path).unwrap();
        for part in ["a\nb", "b\nc\n", "d\ne", "e"] {
            writer.append(Stream::Stdout, part.as_bytes()).unwrap();
        }
        for (lines, expected) in [
            (0, ""),
            (1, "ee"),
            (2, "d\nee"),
            (3, "c\nd\nee"),
            (4, "bb\nc\nd\nee"),
            (5, "a\nbb\nc\nd\nee"),
            (9, "a\nbb\nc\nd\nee"),
        ] {
            let mut reader = LogReader::open(&path, None).unwrap();
            let skip = reader.seek_tail(lines).unwrap();
            let bytes = all(&mut reader);
            assert_eq!(String::from_utf8_lossy(&bytes[skip..]), expected, "{lines}");
        }
    }

    /// What came while the lines were counted was shown beside them.
    #[test]
    fn what_is_written_later_is_behind_the_end() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("log");
        let mut writer = LogWriter::open(&path).unwrap();
        writer.append(Stream::Stdout, b"a\nb\n").unwrap();
        let mut reader = LogReader::open(&path, None).unwrap();
        reader.end_here().unwrap();
        for late in [&b"c\n"[..], b"d\n"] {
            writer.append(Stream::Stdout, late).unwrap();
            let skip = reader.seek_tail(1).unwrap();
            assert_eq!(&all(&mut reader)[skip..], b"b\n");
            reader.seek_to(MAGIC.len() as u64);
        }
        assert_eq!(all(&mut reader), b"a\nb\n");
        // In the middle of a record.
        reader.end = Some(writer.end() - 1);
        assert_eq!(all(&mut reader), b"c\n");
        reader.end = Some(writer.end() - 10);
        assert_eq!(all(&mut reader), b"");
    }

    #[test]
    fn another_file_is_refused() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("log");
        std::fs::write(&path, "something else").unwrap();
        assert!(LogWriter::open(&path).is_err());
        assert!(LogReader::open(&path, None).is_err());
    }
}
