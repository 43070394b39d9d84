//! What layers' indexes and views keep in the same way: inodes, objects, extents, extended
//! attributes, access times.

use std::collections::HashMap;

use super::index_file::{IndexFile, IndexWriter, Section};
use super::{ObjectName, Record, Time};
use crate::store::error::{Result, refused};

/// Flag of an inode: `start` is the number of an object that is the whole content.
const WHOLE: u16 = 1;
const INODE: usize = Section::Inodes.record();

/// Name and value of each extended attribute.
pub type Xattrs = Vec<(Vec<u8>, Vec<u8>)>;

/// A content and its length.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Object {
    /// Its name.
    pub name: ObjectName,
    /// Its bytes.
    pub size: u64,
}

/// A part of a file that is not a hole.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Extent {
    /// Where it starts in the file.
    pub offset: u64,
    /// Its bytes.
    pub length: u64,
    /// Where it starts in the object.
    pub object_offset: u64,
    /// Number of the object in the index.
    pub object: u32,
}

/// What an index says of an object of the tree.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Inode {
    /// Type and permissions, as `st_mode`.
    pub mode: u16,
    /// Links in the view; 0 in a layer.
    pub links: u32,
    /// Owner.
    pub uid: u32,
    /// Group.
    pub gid: u32,
    /// Last modification.
    pub mtime: Time,
    /// Last access.
    pub atime: Time,
    /// Set of extended attributes.
    pub xattrs: u32,
    /// Bytes of a regular file; major number times 2^32 plus minor number of a device.
    pub size: u64,
    pub(in crate::store) start: u64,
    pub(in crate::store) count: u32,
    pub(in crate::store) whole: bool,
}

impl Inode {
    /// The type bits of the mode.
    pub fn kind(&self) -> u32 {
        u32::from(self.mode) & libc::S_IFMT
    }

    /// Whether the type is one that an inode can have.
    pub fn is_of_a_type(&self) -> bool {
        matches!(
            self.kind(),
            libc::S_IFREG
                | libc::S_IFDIR
                | libc::S_IFLNK
                | libc::S_IFCHR
                | libc::S_IFBLK
                | libc::S_IFSOCK
                | libc::S_IFIFO
        )
    }

    /// Major and minor number of a device.
    pub fn device(&self) -> (u32, u32) {
        ((self.size >> 32) as u32, self.size as u32)
    }
}

impl IndexFile {
    /// An inode, also that of an entry.
    pub(in crate::store) fn inode(&self, section: Section, number: u32) -> Result<Inode> {
        let record = self.record(section, number)?;
        let mtime = Time {
            sec: record.i64(16),
            nsec: self.nanoseconds(record.u32(24))?,
        };
        let atime = match record.u32(52).checked_sub(1) {
            None => mtime,
            Some(number) => {
                let record = self.record(Section::Times, number)?;
                self.expect_zero(record, 12, 16)?;
                Time {
                    sec: record.i64(0),
                    nsec: self.nanoseconds(record.u32(8))?,
                }
            }
        };
        let flags = record.u16(2);
        if flags & !WHOLE != 0 {
            return Err(self.damaged(format!("an inode has the flags {flags:#x}")));
        }
        Ok(Inode {
            mode: record.u16(0),
            links: record.u32(4),
            uid: record.u32(8),
            gid: record.u32(12),
            mtime,
            atime,
            xattrs: record.u32(28),
            size: record.u64(32),
            start: record.u64(40),
            count: record.u32(48),
            whole: flags & WHOLE != 0,
        })
    }

    fn nanoseconds(&self, nsec: u32) -> Result<u32> {
        if nsec < 1_000_000_000 {
            Ok(nsec)
        } else {
            Err(self.damaged(format!("a time has {nsec} nanoseconds")))
        }
    }

    /// The target of a symbolic link, or of a hard link of a layer.
    pub(in crate::store) fn target(&self, inode: &Inode) -> Result<&[u8]> {
        self.slice(Section::Texts, inode.start, u64::from(inode.count))
    }

    /// The object of that number.
    pub(in crate::store) fn object(&self, number: u32) -> Result<Object> {
        let record = self.record(Section::Objects, number)?;
        Ok(Object {
            name: ObjectName(record.array(0)),
            size: record.u64(32),
        })
    }

    /// The parts of a regular file that are not holes, in order. Each lies within the file and
    /// within its object.
    pub(in crate::store) fn extents(&self, inode: &Inode) -> Result<Vec<Extent>> {
        if inode.whole {
            let number = u32::try_from(inode.start)
                .map_err(|_| self.damaged("a file has an object that cannot be"))?;
            if self.object(number)?.size != inode.size {
                return Err(self.damaged("a file and its object differ in length"));
            }
            return Ok(vec![Extent {
                offset: 0,
                length: inode.size,
                object_offset: 0,
                object: number,
            }]);
        }
        let mut extents = Vec::new();
        let mut end = 0;
        let wrong = || self.damaged("an extent does not lie within its file and its object");
        for index in 0..u64::from(inode.count) {
            let number = inode.start.checked_add(index).ok_or_else(wrong)?;
            let number = u32::try_from(number).map_err(|_| wrong())?;
            let record = self.record(Section::Extents, number)?;
            self.expect_zero(record, 28, 32)?;
            let extent = Extent {
                offset: record.u64(0),
                length: record.u64(8),
                object_offset: record.u64(16),
                object: record.u32(24),
            };
            let to = extent.offset.checked_add(extent.length);
            let to_in_object = extent.object_offset.checked_add(extent.length);
            let size = self.object(extent.object)?.size;
            if extent.offset < end
                || to.is_none_or(|to| to > inode.size)
                || to_in_object.is_none_or(|to| to > size)
            {
                return Err(wrong());
            }
            end = extent.offset.saturating_add(extent.length);
            extents.push(extent);
        }
        Ok(extents)
    }

    /// The extended attributes of a set.
    pub(in crate::store) fn xattrs(&self, set: u32) -> Result<Vec<(&[u8], &[u8])>> {
        if set == 0 {
            return Ok(Vec::new());
        }
        let record = self.record(Section::XattrSets, set)?;
        let (first, count) = (record.u32(0), record.u32(4));
        let wrong = || self.damaged("a set of extended attributes is longer than all of them");
        let last = first.checked_add(count).ok_or_else(wrong)?;
        if last > self.count(Section::Xattrs) {
            return Err(wrong());
        }
        let mut xattrs = Vec::with_capacity(count as usize);
        for number in first..last {
            let record = self.record(Section::Xattrs, number)?;
            self.expect_zero(record, 20, 24)?;
            let name = u64::from(record.u32(0));
            xattrs.push((
                self.slice(Section::Texts, name, u64::from(record.u32(4)))?,
                self.slice(Section::Texts, record.u64(8), u64::from(record.u32(16)))?,
            ));
        }
        Ok(xattrs)
    }
}

/// The tables of an index that is being made.
#[derive(Debug)]
pub(in crate::store) struct Tables {
    texts: Vec<u8>,
    extents: Vec<u8>,
    xattrs: Vec<u8>,
    sets: Vec<u8>,
    times: Vec<u8>,
    known_sets: HashMap<Xattrs, u32>,
    known_texts: HashMap<Vec<u8>, u64>,
    known_times: HashMap<Time, u32>,
}

impl Default for Tables {
    fn default() -> Self {
        Self {
            texts: Vec::new(),
            extents: Vec::new(),
            xattrs: Vec::new(),
            // Set 0 is empty.
            sets: vec![0; Section::XattrSets.record()],
            times: Vec::new(),
            known_sets: HashMap::new(),
            known_texts: HashMap::new(),
            known_times: HashMap::new(),
        }
    }
}

impl Tables {
    /// Bytes of all tables so far.
    pub(in crate::store) fn bytes(&self) -> u64 {
        let tables = [
            &self.texts,
            &self.extents,
            &self.xattrs,
            &self.sets,
            &self.times,
        ];
        tables.iter().map(|table| table.len() as u64).sum()
    }

    /// Keeps a text and answers where it starts.
    pub(in crate::store) fn text(&mut self, text: &[u8]) -> Result<u64> {
        let start = self.texts.len() as u64;
        if start + text.len() as u64 > u64::from(u32::MAX) {
            return Err(refused(
                b"",
                "link targets and extended attributes have more than 4 GiB together",
            ));
        }
        self.texts.extend_from_slice(text);
        Ok(start)
    }

    /// Keeps extents and answers the number of the first.
    pub(in crate::store) fn extents(&mut self, extents: &[Extent]) -> Result<u64> {
        let first = next(&self.extents, Section::Extents)?;
        for extent in extents {
            self.extents.extend_from_slice(&extent.offset.to_le_bytes());
            self.extents.extend_from_slice(&extent.length.to_le_bytes());
            let object_offset = extent.object_offset.to_le_bytes();
            self.extents.extend_from_slice(&object_offset);
            self.extents.extend_from_slice(&extent.object.to_le_bytes());
            self.extents.extend_from_slice(&[0; 4]);
        }
        Ok(u64::from(first))
    }

    /// Replaces the numbers of objects in all extents by what `number` makes of them.
    pub(in crate::store) fn renumber_extents(&mut self, number: impl Fn(u32) -> u32) {
        for extent in self.extents.chunks_exact_mut(Section::Extents.record()) {
            let object = number(Record(extent).u32(24));
            extent[24..28].copy_from_slice(&object.to_le_bytes());
        }
    }

    /// The number of the set of these attributes, which are in order of their names.
    pub(in crate::store) fn xattr_set(&mut self, xattrs: &Xattrs) -> Result<u32> {
        if xattrs.is_empty() {
            return Ok(0);
        }
        if let Some(known) = self.known_sets.get(xattrs) {
            return Ok(*known);
        }
        let set = next(&self.sets, Section::XattrSets)?;
        let first = next(&self.xattrs, Section::Xattrs)?;
        for (name, value) in xattrs {
            let name_at = match self.known_texts.get(name) {
                Some(known) => *known,
                None => {
                    let at = self.text(name)?;
                    self.known_texts.insert(name.clone(), at);
                    at
                }
            };
            let value_at = self.text(value)?;
            // `text` has refused what does not fit.
            self.xattrs
                .extend_from_slice(&(name_at as u32).to_le_bytes());
            self.xattrs
                .extend_from_slice(&(name.len() as u32).to_le_bytes());
            self.xattrs.extend_from_slice(&value_at.to_le_bytes());
            self.xattrs
                .extend_from_slice(&(value.len() as u32).to_le_bytes());
            self.xattrs.extend_from_slice(&[0; 4]);
        }
        self.sets.extend_from_slice(&first.to_le_bytes());
        self.sets
            .extend_from_slice(&(xattrs.len() as u32).to_le_bytes());
        self.known_sets.insert(xattrs.clone(), set);
        Ok(set)
    }

    /// The bytes of an inode.
    pub(in crate::store) fn inode(&mut self, inode: &Inode) -> Result<[u8; INODE]> {
        let atime = if inode.atime == inode.mtime {
            0
        } else {
            self.time(inode.atime)? + 1
        };
        let mut bytes = [0; INODE];
        bytes[..2].copy_from_slice(&inode.mode.to_le_bytes());
        bytes[2..4].copy_from_slice(&(if inode.whole { WHOLE } else { 0 }).to_le_bytes());
        bytes[4..8].copy_from_slice(&inode.links.to_le_bytes());
        bytes[8..12].copy_from_slice(&inode.uid.to_le_bytes());
        bytes[12..16].copy_from_slice(&inode.gid.to_le_bytes());
        bytes[16..24].copy_from_slice(&inode.mtime.sec.to_le_bytes());
        bytes[24..28].copy_from_slice(&inode.mtime.nsec.to_le_bytes());
        bytes[28..32].copy_from_slice(&inode.xattrs.to_le_bytes());
        bytes[32..40].copy_from_slice(&inode.size.to_le_bytes());
        bytes[40..48].copy_from_slice(&inode.start.to_le_bytes());
        bytes[48..52].copy_from_slice(&inode.count.to_le_bytes());
        bytes[52..].copy_from_slice(&atime.to_le_bytes());
        Ok(bytes)
    }

    fn time(&mut self, time: Time) -> Result<u32> {
        if let Some(known) = self.known_times.get(&time) {
            return Ok(*known);
        }
        let number = next(&self.times, Section::Times)?;
        self.times.extend_from_slice(&time.sec.to_le_bytes());
        self.times.extend_from_slice(&time.nsec.to_le_bytes());
        self.times.extend_from_slice(&[0; 4]);
        self.known_times.insert(time, number);
        Ok(number)
    }

    /// Hands the tables to `writer`.
    pub(in crate::store) fn finish(self, writer: &mut IndexWriter) {
        writer.section(Section::Texts, self.texts);
        writer.section(Section::Extents, self.extents);
        writer.section(Section::Xattrs, self.xattrs);
        writer.section(Section::XattrSets, self.sets);
        writer.section(Section::Times, self.times);
    }
}

/// The objects of an index that is being made, each of them once.
#[derive(Debug, Default)]
pub(in crate::store) struct ObjectTable {
    bytes: Vec<u8>,
    known: HashMap<ObjectName, u32>,
    objects: Vec<Object>,
}

impl ObjectTable {
    /// The number of an object, which gets one if it has none.
    pub(in crate::store) fn number(&mut self, object: Object) -> Result<u32> {
        if let Some(known) = self.known.get(&object.name) {
            return Ok(*known);
        }
        let number = next(&self.bytes, Section::Objects)?;
        self.bytes.extend_from_slice(&object.name.0);
        self.bytes.extend_from_slice(&object.size.to_le_bytes());
        self.known.insert(object.name, number);
        self.objects.push(object);
        Ok(number)
    }

    /// All of them by their numbers.
    pub(in crate::store) fn objects(&self) -> &[Object] {
        &self.objects
    }

    /// Hands the table to `writer`.
    pub(in crate::store) fn finish(self, writer: &mut IndexWriter) {
        writer.section(Section::Objects, self.bytes);
    }
}

/// The number of the next record of a section that is being made.
pub(in crate::store) fn next(bytes: &[u8], section: Section) -> Result<u32> {
    // One less than the format's limit, which is that of the count.
    match u32::try_from(bytes.len() / section.record()) {
        Ok(number) if number < u32::MAX - 2 => Ok(number),
        _ => Err(refused(
            b"",
            format!("there are more than 4 billion records of the section {section:?}"),
        )),
    }
}
