//! The index of a packed layer: what its stream says, entry by entry, in the stream's order; or, of a layer that was
//! made by a commit, what that has changed.
//!
//! Nothing is resolved here. What a path means depends on the layers below (a parent may be a symbolic link
//! there, the target of a hard link may lie there) and on what the stream said before, so a view is
//! built by replaying entries, not by merging trees.

use std::collections::HashMap;
use std::io::{self, Write};
use std::path::Path;

use crate::store::error::{Result, refused};
use crate::store::format::index_file::{Identity, IndexFile, IndexWriter, Kind, Section};
use crate::store::format::tables::{Extent, Inode, Object, ObjectTable, Tables, Xattrs, next};
use crate::store::format::{LayerName, Time};

/// PATH_MAX without the final zero.
pub const LONGEST_PATH: usize = 4095;
/// Bytes of the value of an extended attribute, as the kernel has it.
pub const LARGEST_XATTR: usize = 64 << 10;
/// Parts of a file that are no holes.
const MOST_EXTENTS: usize = 1_000_000;
/// Bytes of a name.
pub const LONGEST_NAME: usize = 255;
const ENTRY: usize = Section::Entries.record();
const INODE: usize = Section::Inodes.record();
const PATH: usize = Section::Paths.record();

/// What an entry asks for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Action {
    /// Make the object that the inode describes. A directory that is there keeps the extended attributes that the
    /// inode does not name.
    Make,
    /// The same, with the inode's extended attributes alone. Of the root: its attributes.
    MakeExactly,
    /// Make a hard link; the inode's attributes go to its target.
    Link,
    /// Remove the path and all below it, if it is there.
    Remove,
    /// Remove from a directory what this layer has not written so far.
    Clear,
}

impl Action {
    const ALL: [Self; 5] = [
        Self::Make,
        Self::Link,
        Self::Remove,
        Self::Clear,
        Self::MakeExactly,
    ];

    fn number(self) -> u8 {
        match self {
            Self::Make => 1,
            Self::Link => 2,
            Self::Remove => 3,
            Self::Clear => 4,
            Self::MakeExactly => 5,
        }
    }
}

/// Attributes of an object, as a stream or a directory gives them.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Attributes {
    /// Type and permissions, as `st_mode`.
    pub mode: u16,
    /// Owner.
    pub uid: u32,
    /// Group.
    pub gid: u32,
    /// Last modification.
    pub mtime: Time,
    /// Last access.
    pub atime: Time,
    /// Extended attributes, each name once.
    pub xattrs: Xattrs,
}

/// What an object is, beyond its attributes.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Body {
    /// A directory, a fifo or a socket.
    Nothing,
    /// A device.
    Device {
        /// Major number.
        major: u32,
        /// Minor number.
        minor: u32,
    },
    /// A symbolic link's or a hard link's target.
    Target(Vec<u8>),
    /// A regular file that is one content whole, or empty.
    Whole {
        /// Its bytes.
        size: u64,
        /// Number of the content in the order of the stream; not used if there are no bytes.
        content: u32,
    },
    /// A regular file with holes. The extents' objects are numbers of contents, as above.
    Sparse {
        /// Its bytes with the holes.
        size: u64,
        /// What is not a hole.
        extents: Vec<Extent>,
    },
}

/// The index of a layer that is being made. Its memory grows with the entries, by 150 bytes or so for each.
#[derive(Debug, Default)]
pub struct LayerBuilder {
    entries: Vec<u8>,
    paths: Vec<u8>,
    names: Vec<u8>,
    /// Numbers of paths by the number of the one above and the name.
    known: HashMap<(u32, Box<[u8]>), u32>,
    tables: Tables,
}

impl LayerBuilder {
    /// An index without entries.
    pub fn new() -> Self {
        Self {
            paths: vec![0; PATH],
            ..Self::default()
        }
    }

    /// Entries so far.
    pub fn len(&self) -> usize {
        self.entries.len() / ENTRY
    }

    /// Whether there is no entry yet.
    pub fn is_empty(&self) -> bool {
        self.entries.is_empty()
    }

    /// Paths so far, but for the root.
    pub fn paths(&self) -> u64 {
        ((self.paths.len() / PATH) as u64).saturating_sub(1)
    }

    /// Bytes so far of what an entry may have any number of: names, targets, extended attributes, extents.
    pub fn text_bytes(&self) -> u64 {
        self.names.len() as u64 + self.tables.bytes()
    }

    /// Adds an object at the path of these components.
    pub fn make(&mut self, path: &[&[u8]], attributes: &Attributes, body: &Body) -> Result<()> {
        self.object(Action::Make, path, attributes, body)
    }

    /// Adds an object, or the attributes of the root, with these extended attributes and no others.
    pub fn make_exactly(
        &mut self,
        path: &[&[u8]],
        attributes: &Attributes,
        body: &Body,
    ) -> Result<()> {
        self.object(Action::MakeExactly, path, attributes, body)
    }

    /// Adds a hard link to `target`, a path from the root.
    pub fn link(&mut self, path: &[&[u8]], attributes: &Attributes, target: &[u8]) -> Result<()> {
        let body = Body::Target(target.to_vec());
        self.object(Action::Link, path, attributes, &body)
    }

    /// Says that a path is removed.
    pub fn remove(&mut self, path: &[&[u8]]) -> Result<()> {
        self.entry(Action::Remove, path, &[0; INODE])
    }

    /// Says that a directory shows nothing of the layers below.
    pub fn clear(&mut self, path: &[&[u8]]) -> Result<()> {
        self.entry(Action::Clear, path, &[0; INODE])
    }

    /// Ends the index. `contents` are the objects by the numbers of contents.
    pub fn finish(mut self, contents: &[Object]) -> Result<FinishedLayer> {
        let mut objects = ObjectTable::default();
        let numbers = contents
            .iter()
            .map(|object| objects.number(*object))
            .collect::<Result<Vec<_>>>()?;
        // Every number was given out for a content that is in the list.
        let number = |content: u32| numbers.get(content as usize).copied().unwrap_or(u32::MAX);
        self.tables.renumber_extents(number);
        for entry in self.entries.chunks_exact_mut(ENTRY) {
            if entry[2] & 1 != 0 {
                let content = u32::from_le_bytes([entry[40], entry[41], entry[42], entry[43]]);
                entry[40..44].copy_from_slice(&number(content).to_le_bytes());
            }
        }
        let mut writer = IndexWriter::default();
        let all = objects.objects().to_vec();
        writer.section(Section::Entries, self.entries);
        writer.section(Section::Paths, self.paths);
        writer.section(Section::Names, self.names);
        objects.finish(&mut writer);
        self.tables.finish(&mut writer);
        Ok(FinishedLayer {
            writer,
            objects: all,
        })
    }

    fn object(
        &mut self,
        action: Action,
        path: &[&[u8]],
        attributes: &Attributes,
        body: &Body,
    ) -> Result<()> {
        let mut xattrs = attributes.xattrs.clone();
        xattrs.sort_unstable();
        let mut inode = Inode {
            mode: attributes.mode,
            uid: attributes.uid,
            gid: attributes.gid,
            mtime: attributes.mtime,
            atime: attributes.atime,
            xattrs: self.tables.xattr_set(&xattrs)?,
            ..Inode::default()
        };
        match body {
            Body::Nothing => {}
            Body::Device { major, minor } => {
                inode.size = u64::from(*major) << 32 | u64::from(*minor);
            }
            Body::Target(target) => {
                inode.start = self.tables.text(target)?;
                // `text` has refused more than 4 GiB.
                inode.count = target.len() as u32;
            }
            Body::Whole { size: 0, .. } => {}
            Body::Whole { size, content } => {
                inode.size = *size;
                inode.start = u64::from(*content);
                inode.whole = true;
            }
            Body::Sparse { size, extents } => {
                inode.size = *size;
                if extents.len() > MOST_EXTENTS {
                    return Err(refused(
                        &path.join(&b'/'),
                        "it has more than a million parts",
                    ));
                }
                // Less than a million.
                inode.count = extents.len() as u32;
                inode.start = self.tables.extents(extents)?;
            }
        }
        let inode = self.tables.inode(&inode)?;
        self.entry(action, path, &inode)
    }

    fn entry(&mut self, action: Action, path: &[&[u8]], inode: &[u8; INODE]) -> Result<()> {
        next(&self.entries, Section::Entries)?;
        let path = self.path(path)?;
        self.entries.extend_from_slice(inode);
        self.entries.extend_from_slice(&path.to_le_bytes());
        self.entries.extend_from_slice(&[action.number(), 0, 0, 0]);
        Ok(())
    }

    fn path(&mut self, components: &[&[u8]]) -> Result<u32> {
        let length = components.iter().map(|name| name.len() + 1).sum::<usize>();
        let refuse = |problem: &str| Err(refused(&components.join(&b'/'), problem));
        if length > LONGEST_PATH + 1 {
            return refuse("it is longer than 4095 bytes");
        }
        let mut above = 0;
        for name in components {
            if !is_name(name) {
                return refuse("a part of it cannot be a name");
            }
            let key = (above, Box::from(*name));
            above = match self.known.get(&key) {
                Some(known) => *known,
                None => {
                    let number = next(&self.paths, Section::Paths)?;
                    let start = u32::try_from(self.names.len())
                        .ok()
                        .filter(|start| start.checked_add(u32::from(u16::MAX)).is_some());
                    let Some(start) = start else {
                        return refuse("the names of the layer have more than 4 GiB");
                    };
                    self.names.extend_from_slice(name);
                    self.paths.extend_from_slice(&above.to_le_bytes());
                    self.paths.extend_from_slice(&start.to_le_bytes());
                    self.paths
                        .extend_from_slice(&(name.len() as u32).to_le_bytes());
                    self.known.insert(key, number);
                    number
                }
            };
        }
        Ok(above)
    }
}

/// Whether these bytes can name something in a directory.
pub(in crate::store) fn is_name(name: &[u8]) -> bool {
    !name.is_empty()
        && name.len() <= LONGEST_NAME
        && name != b"."
        && name != b".."
        && !name.iter().any(|&byte| byte == b'/' || byte == 0)
}

/// An index that is ready to be written.
#[derive(Debug)]
pub struct FinishedLayer {
    writer: IndexWriter,
    objects: Vec<Object>,
}

impl FinishedLayer {
    /// The layer's objects, each of them once.
    pub fn objects(&self) -> &[Object] {
        &self.objects
    }

    /// Writes the index. `diff_id` and the bytes of the stream are given if the layer came as one.
    pub(in crate::store) fn write(
        self,
        out: &mut impl Write,
        diff_id: Option<[u8; 32]>,
        tar_bytes: u64,
    ) -> io::Result<LayerName> {
        let identity = Identity {
            key: diff_id.unwrap_or_default(),
            tar_bytes,
        };
        self.writer
            .write(out, Kind::Layer, &identity)
            .map(LayerName)
    }
}

/// An entry of a layer's index.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct LayerEntry {
    /// What it asks for.
    pub action: Action,
    /// Number of its path.
    pub path: u32,
    /// What it describes.
    pub inode: Inode,
}

/// The index of a layer, open for reading. Any thread may use it.
#[derive(Debug)]
pub struct LayerIndex {
    file: IndexFile,
}

impl LayerIndex {
    /// Opens the index at `path`, which has to be that of the layer `name`.
    pub fn open(path: &Path, name: LayerName) -> Result<Self> {
        let file = IndexFile::open(path, Kind::Layer)?;
        if LayerName(file.sum()) != name {
            return Err(file.damaged(format!("it is the layer {}", LayerName(file.sum()))));
        }
        Ok(Self { file })
    }

    /// The layer's name.
    pub fn name(&self) -> LayerName {
        LayerName(self.file.sum())
    }

    /// The SHA-256 hash of the layer's tar stream, if it came as one.
    pub fn diff_id(&self) -> Option<[u8; 32]> {
        let key = self.file.identity().key;
        (key != [0; 32]).then_some(key)
    }

    /// Bytes of the tar stream.
    pub fn tar_bytes(&self) -> u64 {
        self.file.identity().tar_bytes
    }

    /// Number of entries.
    pub fn len(&self) -> u32 {
        self.file.count(Section::Entries)
    }

    /// Whether the layer says nothing.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// Bytes of the index.
    pub fn bytes(&self) -> u64 {
        self.file.bytes()
    }

    /// An entry by its number in the order of the stream.
    pub fn entry(&self, number: u32) -> Result<LayerEntry> {
        let record = self.file.record(Section::Entries, number)?;
        self.file.expect_zero(record, 61, 64)?;
        let action = Action::ALL
            .into_iter()
            .find(|action| action.number() == record.u8(60))
            .ok_or_else(|| self.file.damaged("an entry is of an unknown kind"))?;
        Ok(LayerEntry {
            action,
            path: record.u32(56),
            inode: self.file.inode(Section::Entries, number)?,
        })
    }

    /// The names of a path, from the root.
    pub fn path(&self, number: u32) -> Result<Vec<&[u8]>> {
        let mut names = Vec::new();
        let mut length = 0;
        let mut at = number;
        while at != 0 {
            let (above, name) = self.path_step(at)?;
            length += name.len() + 1;
            if length > LONGEST_PATH + 1 {
                return Err(self.file.damaged(format!("its path {number} cannot be")));
            }
            names.push(name);
            at = above;
        }
        names.reverse();
        Ok(names)
    }

    /// Number of paths: of all entries, and what lies above. The path 0 is the root.
    pub fn path_count(&self) -> u32 {
        self.file.count(Section::Paths)
    }

    /// The path above one that is not the root, and the name in it. The one above has a lower number.
    pub fn path_step(&self, number: u32) -> Result<(u32, &[u8])> {
        let record = self.file.record(Section::Paths, number)?;
        self.file.expect_zero(record, 10, 12)?;
        let (above, start) = (record.u32(0), u64::from(record.u32(4)));
        let bytes = u64::from(record.u16(8));
        let name = self.file.slice(Section::Names, start, bytes)?;
        if !is_name(name) || above >= number {
            return Err(self.file.damaged(format!("its path {number} cannot be")));
        }
        Ok((above, name))
    }

    /// The attributes that the layer gives the root, if it does.
    pub fn root(&self) -> Result<Option<Attributes>> {
        // The root's entry is the first of a layer that was made by a commit, and no other layer has one.
        if self.diff_id().is_some() || self.is_empty() {
            return Ok(None);
        }
        let LayerEntry {
            action,
            path,
            inode,
        } = self.entry(0)?;
        if path != 0 || action != Action::MakeExactly {
            return Ok(None);
        }
        if inode.kind() != libc::S_IFDIR {
            return Err(self.damaged("its root is not a directory"));
        }
        let xattrs = self.xattrs(inode.xattrs)?.into_iter();
        Ok(Some(Attributes {
            mode: inode.mode,
            uid: inode.uid,
            gid: inode.gid,
            mtime: inode.mtime,
            atime: inode.atime,
            xattrs: xattrs
                .map(|(name, value)| (name.to_vec(), value.to_vec()))
                .collect(),
        }))
    }

    /// The target of a symbolic or a hard link.
    pub fn target(&self, inode: &Inode) -> Result<&[u8]> {
        self.file.target(inode)
    }

    /// The extended attributes of a set.
    pub fn xattrs(&self, set: u32) -> Result<Vec<(&[u8], &[u8])>> {
        self.file.xattrs(set)
    }

    /// The parts of a regular file that are not holes.
    pub fn extents(&self, inode: &Inode) -> Result<Vec<Extent>> {
        self.file.extents(inode)
    }

    /// Number of objects, each of them counted once.
    pub fn object_count(&self) -> u32 {
        self.file.count(Section::Objects)
    }

    /// An object by its number.
    pub fn object(&self, number: u32) -> Result<Object> {
        self.file.object(number)
    }

    /// Verifies every page.
    pub fn verify(&self) -> Result<()> {
        self.file.verify_all()
    }

    /// An error that names the layer's file.
    pub(in crate::store) fn damaged(&self, problem: impl Into<String>) -> crate::store::Error {
        self.file.damaged(problem)
    }
}
