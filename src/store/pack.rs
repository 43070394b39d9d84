//! Pack files: many small objects in one file that is written once and synced once.
//!
//! A pack describes itself. Its table is found from its end; a pack without a sound end is read object
//! by object from its start, up to the first that is not whole. What is found so needs no sound header of the pack.

use std::fmt;
use std::fs::{self, File, OpenOptions};
use std::io::{self, BufWriter, Write};
use std::os::unix::fs::{FileExt, OpenOptionsExt};
use std::path::{Path, PathBuf};

use super::compression::{Compressor, decompress_into, with_scratch};
use super::error::{Result, io_error};
use super::format::tables::Object;
use super::format::{ObjectName, Record, check_features, short_sum};

const MAGIC: &[u8; 8] = b"plypack\0";
const END_MAGIC: &[u8; 8] = b"plypkend";
const OBJECT_MAGIC: &[u8; 4] = b"PLOB";
/// Bytes of the header of a pack, of that of an object, and of the end record.
const HEADER: usize = 64;
const TABLE_ENTRY: usize = 56;
const BUFFER: usize = 1 << 20;
/// Most bytes of an object in a pack.
pub(super) const LARGEST: u64 = 16 << 20;

/// Names a pack.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct PackId(pub [u8; 16]);

impl fmt::Display for PackId {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(formatter, "{:032x}", u128::from_be_bytes(self.0))
    }
}

impl PackId {
    /// A name that no pack has.
    fn new() -> Self {
        Self(rand::random())
    }

    /// The pack of a file name.
    pub(super) fn of_file(name: &str) -> Option<Self> {
        let digits = name.strip_suffix(".pack")?;
        let id = Self(u128::from_str_radix(digits, 16).ok()?.to_be_bytes());
        (id.to_string() == digits).then_some(id)
    }

    /// The name of its file.
    pub(super) fn file_name(self) -> String {
        format!("{self}.pack")
    }
}

/// Where an object lies in a pack.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Slot {
    /// Where its header starts.
    pub(super) offset: u64,
    /// Bytes behind the header.
    pub(super) stored: u32,
}

impl Slot {
    /// Where what is stored of the object ends.
    pub(super) fn end(self) -> u64 {
        self.offset + HEADER as u64 + u64::from(self.stored)
    }

    /// Bytes of the object with its header and what follows it up to the next one.
    pub(super) fn bytes(self) -> u64 {
        let stored = u64::from(self.stored);
        HEADER as u64 + stored + padding(stored)
    }
}

/// An object as it is stored.
#[derive(Debug)]
pub(super) struct Encoded {
    pub(super) object: Object,
    compressed: bool,
    bytes: Vec<u8>,
}

impl Encoded {
    /// Takes `content`, which is compressed if that saves an eighth.
    pub(super) fn new(
        object: Object,
        content: Vec<u8>,
        compressor: &mut Compressor,
    ) -> io::Result<Self> {
        // Too little for a frame to be smaller.
        if content.len() >= 64 {
            let compressed = compressor.compress(&content)?;
            if compressed.len() <= content.len() - content.len() / 8 {
                return Ok(Self {
                    object,
                    compressed: true,
                    bytes: compressed,
                });
            }
        }
        Ok(Self {
            object,
            compressed: false,
            bytes: content,
        })
    }
}

/// A pack that is being written. Dropped before it is sealed, it removes its file.
#[derive(Debug)]
pub(super) struct PackWriter {
    id: PackId,
    path: PathBuf,
    file: BufWriter<File>,
    at: u64,
    objects: Vec<(Object, Slot)>,
    sealed: bool,
}

impl PackWriter {
    /// Begins a pack in `dir`.
    pub(super) fn create(dir: &Path) -> Result<Self> {
        let id = PackId::new();
        let path = dir.join(id.file_name());
        let file = OpenOptions::new()
            .write(true)
            .create_new(true)
            .mode(0o600)
            .open(&path)
            .map_err(io_error("make", &path))?;
        let mut writer = Self {
            id,
            path,
            file: BufWriter::with_capacity(BUFFER, file),
            at: 0,
            objects: Vec::new(),
            sealed: false,
        };
        let mut header = [0; HEADER];
        header[..8].copy_from_slice(MAGIC);
        header[8..10].copy_from_slice(&1u16.to_le_bytes());
        header[40..56].copy_from_slice(&id.0);
        let sum = short_sum(&header[..56]);
        header[56..].copy_from_slice(&sum);
        writer.write(&header)?;
        Ok(writer)
    }

    /// Adds an object.
    pub(super) fn append(&mut self, encoded: &Encoded) -> Result<()> {
        let object = encoded.object;
        let slot = Slot {
            offset: self.at,
            // Not more than `LARGEST`.
            stored: encoded.bytes.len() as u32,
        };
        let mut header = [0; HEADER];
        header[..4].copy_from_slice(OBJECT_MAGIC);
        header[4] = u8::from(encoded.compressed);
        header[8..16].copy_from_slice(&object.size.to_le_bytes());
        header[16..24].copy_from_slice(&u64::from(slot.stored).to_le_bytes());
        header[24..56].copy_from_slice(&object.name.0);
        let sum = short_sum(&header[..56]);
        header[56..].copy_from_slice(&sum);
        self.write(&header)?;
        self.write(&encoded.bytes)?;
        self.write(&[0; 8][..padding(u64::from(slot.stored)) as usize])?;
        self.objects.push((object, slot));
        Ok(())
    }

    /// Whether nothing was added.
    pub(super) fn is_empty(&self) -> bool {
        self.objects.is_empty()
    }

    /// Ends the pack and makes it durable. It lies where it was begun and is the caller's.
    pub(super) fn seal(mut self) -> Result<SealedPack> {
        self.objects.sort_unstable_by_key(|(object, _)| object.name);
        let start = self.at;
        let mut table = Vec::with_capacity(self.objects.len() * TABLE_ENTRY);
        for (object, slot) in &self.objects {
            table.extend_from_slice(&object.name.0);
            table.extend_from_slice(&slot.offset.to_le_bytes());
            table.extend_from_slice(&u64::from(slot.stored).to_le_bytes());
            table.extend_from_slice(&object.size.to_le_bytes());
        }
        let mut end = [0; HEADER];
        end[..8].copy_from_slice(END_MAGIC);
        end[8..16].copy_from_slice(&(self.objects.len() as u64).to_le_bytes());
        end[16..24].copy_from_slice(&start.to_le_bytes());
        let sum = table_sum(&table, &end);
        end[32..].copy_from_slice(&sum);
        self.write(&table)?;
        self.write(&end)?;
        let path = &self.path;
        self.file.flush().map_err(io_error("write", path))?;
        let synced = self.file.get_ref().sync_all();
        synced.map_err(io_error("make durable", path))?;
        self.sealed = true;
        Ok(SealedPack {
            id: self.id,
            path: self.path.clone(),
            objects: std::mem::take(&mut self.objects),
        })
    }

    fn write(&mut self, bytes: &[u8]) -> Result<()> {
        self.at += bytes.len() as u64;
        let written = self.file.write_all(bytes);
        written.map_err(io_error("write", &self.path))
    }
}

impl Drop for PackWriter {
    fn drop(&mut self) {
        if !self.sealed {
            // What stays is cleared when the store is opened.
            let _ = fs::remove_file(&self.path);
        }
    }
}

/// A pack that is whole and durable, but not in its place yet.
#[derive(Debug)]
pub(super) struct SealedPack {
    pub(super) id: PackId,
    pub(super) path: PathBuf,
    pub(super) objects: Vec<(Object, Slot)>,
}

/// What can be found in a pack.
#[derive(Debug)]
pub(super) struct Found {
    /// Its objects, by its table or else by what is in it.
    pub(super) objects: Vec<(Object, Slot)>,
    /// Whether its table is sound. Otherwise more may be in it than was found.
    pub(super) has_table: bool,
    /// Its read-only compatible features; `None` where its header does not tell.
    pub(super) features: Option<u64>,
    /// Why the host could not read some of it.
    unreadable: Option<io::Error>,
}

impl Found {
    /// What of the pack itself is damaged, whatever its objects are.
    pub(super) fn problem(&self) -> Option<String> {
        let problem = match (self.features, self.has_table) {
            (Some(_), true) => return None,
            (None, true) => "it does not start as a pack does",
            (Some(_), false) => "its table is missing or damaged",
            (None, false) => "it neither starts nor ends as a pack does",
        };
        Some(match &self.unreadable {
            Some(error) => format!("{problem}: some of it cannot be read: {error}"),
            None => problem.to_owned(),
        })
    }

    /// The features that keep this release from writing the pack anew; 0 for none. Where nobody knows them, the pack is worth
    /// more without what is damaged.
    pub(super) fn unknown_features(&self) -> u64 {
        self.features.unwrap_or(0)
    }
}

/// Opens a pack to read objects of it. One of a newer release that forbids that is refused; a header that cannot be used keeps
/// nobody from what is in it.
pub(super) fn open(path: &Path, id: PackId) -> Result<File> {
    let file = File::open(path).map_err(io_error("open", path))?;
    if let Ok(Some(header)) = header_of(&file) {
        features_of(&header, path, id)?;
    }
    Ok(file)
}

/// Looks into a pack. Where its header or its table cannot be used or read, the other one is; an object has a checksum of its
/// own.
pub(super) fn look_into(path: &Path, id: PackId) -> Result<Found> {
    let file = File::open(path).map_err(io_error("open", path))?;
    let length = file.metadata().map_err(io_error("look at", path))?.len();
    let mut unreadable = None;
    let features = match header_of(&file) {
        Ok(Some(header)) => features_of(&header, path, id)?,
        Ok(None) => None,
        Err(error) => {
            unreadable = Some(error);
            None
        }
    };
    let table = table_of(&file, length).unwrap_or_else(|error| {
        unreadable = Some(error);
        None
    });
    let has_table = table.is_some();
    let objects = table.unwrap_or_else(|| {
        let (objects, end) = scan(&file, length);
        unreadable = end.err().or(unreadable.take());
        objects
    });
    Ok(Found {
        objects,
        has_table,
        features,
        unreadable,
    })
}

/// The header of a pack; `None` if it is not sound.
fn header_of(file: &File) -> io::Result<Option<[u8; HEADER]>> {
    let Some(header) = header_at(file, 0)? else {
        return Ok(None);
    };
    let is_sound = header[..8] == *MAGIC && header[56..] == short_sum(&header[..56]);
    Ok(is_sound.then_some(header))
}

/// The read-only compatible features that a sound header has; `None` if it is that of another pack, or has something where zeros
/// have to be.
fn features_of(header: &[u8; HEADER], path: &Path, id: PackId) -> Result<Option<u64>> {
    let fields = Record(header);
    check_features(path, fields.u16(8), fields.u64(32))?;
    // Of a pack that has another's name nobody knows more than of one without a header.
    let is_it = fields.array::<16>(40) == id.0 && fields.is_zero(10, 16);
    Ok(is_it.then(|| fields.u64(24)))
}

/// The table at the end of a pack; `None` if there is no sound one.
fn table_of(file: &File, length: u64) -> io::Result<Option<Vec<(Object, Slot)>>> {
    let Some(end_at) = length.checked_sub(HEADER as u64) else {
        return Ok(None);
    };
    let mut end = [0; HEADER];
    file.read_exact_at(&mut end, end_at)?;
    let fields = Record(&end);
    let (count, start) = (fields.u64(8), fields.u64(16));
    let bytes = count.checked_mul(TABLE_ENTRY as u64);
    if fields.array::<8>(0) != *END_MAGIC
        || !fields.is_zero(24, 32)
        || bytes.and_then(|bytes| start.checked_add(bytes)) != Some(end_at)
    {
        return Ok(None);
    }
    let mut table = vec![0; (end_at - start) as usize];
    file.read_exact_at(&mut table, start)?;
    if fields.array::<32>(32) != table_sum(&table, &end) {
        return Ok(None);
    }
    let mut objects = Vec::with_capacity(table.len() / TABLE_ENTRY);
    for entry in table.chunks_exact(TABLE_ENTRY) {
        let fields = Record(entry);
        let object = Object {
            name: ObjectName(fields.array(0)),
            size: fields.u64(48),
        };
        let (offset, stored) = (fields.u64(32), fields.u64(40));
        let to = offset.checked_add(HEADER as u64 + stored.min(LARGEST));
        if object.size > LARGEST || stored > object.size || to.is_none_or(|to| to > start) {
            return Ok(None);
        }
        let stored = stored as u32;
        objects.push((object, Slot { offset, stored }));
    }
    Ok(Some(objects))
}

/// The objects from the start of a pack up to the first that is not whole, and whether it is the host that cannot read on. Only
/// their headers are read.
fn scan(file: &File, length: u64) -> (Vec<(Object, Slot)>, io::Result<()>) {
    let mut objects = Vec::new();
    let mut offset = HEADER as u64;
    loop {
        let header = match header_at(file, offset) {
            Ok(header) => header.as_ref().and_then(parse),
            Err(error) => return (objects, Err(error)),
        };
        let Some(found) = header else {
            return (objects, Ok(()));
        };
        let stored = found.stored;
        let slot = Slot { offset, stored };
        offset += slot.bytes();
        if offset > length {
            return (objects, Ok(()));
        }
        objects.push((found.object, slot));
    }
}

/// What should be a header; `None` at the end of the file.
fn header_at(file: &File, offset: u64) -> io::Result<Option<[u8; HEADER]>> {
    let mut header = [0; HEADER];
    match file.read_exact_at(&mut header, offset) {
        Err(error) if error.kind() == io::ErrorKind::UnexpectedEof => Ok(None),
        result => result.map(|()| Some(header)),
    }
}

struct Header {
    object: Object,
    stored: u32,
    compressed: bool,
}

/// A sound header of an object.
fn parse(header: &[u8; HEADER]) -> Option<Header> {
    let fields = Record(header);
    let (size, stored) = (fields.u64(8), fields.u64(16));
    let sound = fields.array::<4>(0) == *OBJECT_MAGIC
        && fields.array::<8>(56) == short_sum(&header[..56])
        && fields.u8(4) <= 1
        && fields.is_zero(5, 8)
        && size <= LARGEST
        && stored <= size;
    sound.then(|| Header {
        object: Object {
            name: ObjectName(fields.array(24)),
            size,
        },
        stored: stored as u32,
        compressed: fields.u8(4) == 1,
    })
}

/// The object of the header that is at a slot; `None` if there is no sound one.
pub(super) fn object_at(file: &File, slot: Slot) -> io::Result<Option<Object>> {
    let header = header_at(file, slot.offset)?;
    Ok(header.as_ref().and_then(parse).map(|found| found.object))
}

/// What is wrong with an object in a pack.
#[derive(Debug)]
pub(super) enum Wrong {
    /// Something else is there.
    Moved,
    /// It is not what it was.
    Damaged(&'static str),
    /// The host cannot read it.
    Io(io::Error),
}

/// Reads an object. Its content is compared with its name if `verify` is set, and has its length in any case.
pub(super) fn read(
    file: &File,
    object: &Object,
    slot: Slot,
    verify: bool,
) -> Result<Vec<u8>, Wrong> {
    if object.size > LARGEST || u64::from(slot.stored) > object.size {
        return Err(Wrong::Moved);
    }
    let content = with_scratch(HEADER + slot.stored as usize, |bytes| {
        file.read_exact_at(bytes, slot.offset)
            .map_err(|error| match error.kind() {
                io::ErrorKind::UnexpectedEof => Wrong::Damaged("the pack is cut off"),
                _ => Wrong::Io(error),
            })?;
        let header = bytes.first_chunk().and_then(parse);
        let header = header.ok_or(Wrong::Damaged("its header is damaged"))?;
        if header.object != *object || header.stored != slot.stored {
            return Err(Wrong::Moved);
        }
        let stored = &bytes[HEADER..];
        if !header.compressed {
            return Ok(stored.to_vec());
        }
        let mut content = Vec::with_capacity(object.size as usize);
        match decompress_into(stored, &mut content) {
            Ok(_) => Ok(content),
            Err(_) => Err(Wrong::Damaged("it cannot be decompressed")),
        }
    })?;
    if content.len() as u64 != object.size {
        return Err(Wrong::Damaged("it does not have its length"));
    }
    if verify && ObjectName::of(&content) != object.name {
        return Err(Wrong::Damaged("its content does not have its name"));
    }
    Ok(content)
}

fn table_sum(table: &[u8], end: &[u8; HEADER]) -> [u8; 32] {
    let mut hash = blake3::Hasher::new();
    hash.update(table);
    hash.update(&end[..32]);
    *hash.finalize().as_bytes()
}

fn padding(stored: u64) -> u64 {
    stored.wrapping_neg() % 8
}

#[cfg(test)]
mod tests;
