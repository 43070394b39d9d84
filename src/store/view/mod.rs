//! Merged views: what a chain of layers looks like, flattened into one index.
//!
//! A lookup costs the same for one layer and for five hundred. A view needs nothing of the layers that it was
//! built from, and of the store only the contents.

mod build;
mod effort;
mod file;
mod held;
mod lost;
mod merged;
mod names;
mod path;
mod tree;

use std::collections::{HashMap, HashSet};
use std::fs::{File, OpenOptions};
use std::io;
use std::os::fd::{AsFd, BorrowedFd};
use std::os::unix::fs::MetadataExt;
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};

use nix::errno::Errno;
use parking_lot::{Mutex, RwLock};

use super::error::{Result, damaged, io_error};
use super::format::index_file::{IndexFile, Kind, Section};
use super::format::tables::{Extent, Inode, Object};
use super::format::{LayerName, ObjectName, Record, ViewKey};
use super::layer::index::is_name;
use super::object::{Bits, Check, Content, FrameChecks, Framed, Objects, Place};
use super::pack::PackId;
use crate::sys;

pub use super::object::Verify;
pub(super) use build::{build, logical};
pub(super) use effort::is_modest;
pub use file::ViewFile;
pub use held::{HeldDamage, HeldView};
use lost::NamedLost;
pub(super) use merged::Merged;
pub use names::Names;
#[cfg(test)]
pub(crate) use names::PASSES;
pub(super) use tree::MISSING_DIRECTORY;

/// A name in a directory of a view.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct DirEntry<'a> {
    /// The name.
    pub name: &'a [u8],
    /// Number of the inode.
    pub inode: u32,
    /// Type bits of its mode.
    pub kind: u32,
    /// Number of the layer that wrote it.
    pub layer: u16,
}

/// A part of a regular file that is no hole.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct StoredPart {
    /// Where it starts in the file.
    pub offset: u64,
    /// Its bytes.
    pub length: u64,
    /// What has them.
    pub object: Object,
    /// Where they start in it.
    pub object_offset: u64,
}

/// The layers of the view at `path`, the lowest first.
pub(super) fn chain_of(path: &Path) -> Result<Vec<LayerName>> {
    let file = IndexFile::open(path, Kind::View)?;
    let numbers = 0..file.count(Section::Layers);
    numbers
        .map(|number| Ok(LayerName(file.record(Section::Layers, number)?.array(0))))
        .collect()
}

/// The view at `path`, whatever is in it, for whoever takes it away; `None` if a process has it mounted. As long as the file
/// is open nobody mounts it: who comes waits, and looks again for the view if it was removed meanwhile.
pub(super) fn claim(path: &Path) -> Result<Option<File>> {
    // NFS gives an exclusive lock only to who may write.
    let file = OpenOptions::new().read(true).write(true).open(path);
    let file = file.map_err(io_error("open", path))?;
    match sys::fs::try_lock(file.as_fd()) {
        Ok(()) => Ok(Some(file)),
        Err(Errno::EWOULDBLOCK) => Ok(None),
        Err(errno) => Err(io_error("lock", path)(errno.into())),
    }
}

/// The objects of the view at `path`.
pub(super) fn objects_of(path: &Path) -> Result<Vec<ObjectName>> {
    let file = IndexFile::open(path, Kind::View)?;
    let numbers = 0..file.count(Section::Objects);
    numbers
        .map(|number| Ok(file.object(number)?.name))
        .collect()
}

/// A merged view, open for reading. Any thread may use it.
#[derive(Debug)]
pub struct View {
    file: IndexFile,
    objects: Arc<Objects>,
    verify: Verify,
    /// Another one takes its place when the store was mended: what is found out till then of what was opened before counts for nothing.
    known: RwLock<Arc<Known>>,
    /// Objects that could not be used when they were last read, and their number for whoever only asks for that.
    damaged: Mutex<HashSet<u32>>,
    damage: AtomicUsize,
    lost: NamedLost,
}

/// What is known of contents by the numbers of their objects.
#[derive(Debug)]
struct Known {
    /// Those that were compared with their names as a whole.
    verified: Bits,
    /// The others, which are in frames.
    frames: Mutex<HashMap<u32, Arc<FrameChecks>>>,
}

impl Known {
    /// Nothing, of as many objects as `file` has.
    fn nothing(file: &IndexFile) -> Arc<Self> {
        Arc::new(Self {
            verified: Bits::new(u64::from(file.count(Section::Objects))),
            frames: Mutex::default(),
        })
    }

    /// Has all who read an object, at once or one after the other, know the same of its frames.
    fn share(&self, number: u32, framed: &mut Arc<Framed>) {
        let mut frames = self.frames.lock();
        let known = frames
            .entry(number)
            .or_insert_with(|| Arc::clone(framed.checks()));
        // Nobody else has yet what was just opened.
        let is_shared = Arc::get_mut(framed).is_some_and(|framed| framed.share(known));
        if !is_shared {
            *known = Arc::clone(framed.checks());
        }
    }
}

impl AsFd for View {
    /// The file of its index, for questions about the file system that it lies on.
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.file.file().as_fd()
    }
}

impl View {
    /// Number of the root's inode.
    pub const ROOT: u32 = 0;

    /// Opens the view at `path`, which has to be that of `key`.
    pub fn open(path: &Path, key: ViewKey, objects: Arc<Objects>, verify: Verify) -> Result<Self> {
        let file = IndexFile::open(path, Kind::View)?;
        if file.identity().key != key.0 {
            return Err(file.damaged("it is the view of another chain"));
        }
        let view = Self {
            known: RwLock::new(Known::nothing(&file)),
            file,
            objects,
            verify,
            damaged: Mutex::default(),
            damage: AtomicUsize::new(0),
            lost: NamedLost::default(),
        };
        if view.inode(Self::ROOT)?.kind() != libc::S_IFDIR {
            return Err(view.file.damaged("its root is not a directory"));
        }
        Ok(view)
    }

    /// Opens a view by its place in a store, as another process has named it. As long as it is open, no collection takes
    /// away what it names, not even when its layers are removed.
    pub fn open_stored(path: &Path, verify: Verify) -> Result<Self> {
        let key = path
            .file_stem()
            .and_then(|stem| stem.to_str()?.parse().ok());
        let store = path.parent().and_then(Path::parent);
        let Some((key, store)) = key.zip(store) else {
            return Err(damaged(
                path,
                "it does not lie where a store keeps its views",
            ));
        };
        let objects = Arc::new(Objects::new(store));
        loop {
            let view = Self::open(path, key, Arc::clone(&objects), verify)?;
            // Waits no longer than it takes to see that nobody has it and to remove it.
            sys::fs::lock_shared(view.as_fd())
                .map_err(|errno| io_error("lock", path)(errno.into()))?;
            let metadata = view.file.file().metadata();
            // The lock of a file without a name tells nobody anything.
            if metadata.map_err(io_error("look at", path))?.nlink() > 0 {
                return Ok(view);
            }
        }
    }

    /// Number of inodes.
    pub fn len(&self) -> u32 {
        self.file.count(Section::Inodes)
    }

    /// Whether there is nothing but the root.
    pub fn is_empty(&self) -> bool {
        self.len() <= 1
    }

    /// Bytes of the index.
    pub fn bytes(&self) -> u64 {
        self.file.bytes()
    }

    /// What names the chain.
    pub fn key(&self) -> ViewKey {
        ViewKey(self.file.identity().key)
    }

    /// The layer of that number, the lowest first.
    pub fn layer(&self, number: u16) -> Result<LayerName> {
        let record = self.file.record(Section::Layers, u32::from(number))?;
        Ok(LayerName(record.array(0)))
    }

    /// An inode.
    pub fn inode(&self, number: u32) -> Result<Inode> {
        let inode = self.file.inode(Section::Inodes, number)?;
        if inode.is_of_a_type() {
            return Ok(inode);
        }
        // The file was written over since it was compared. To whoever opens it, it must not be a pipe that nobody writes to.
        self.file.forget_pages();
        Err(self.file.damaged("an inode is of no type"))
    }

    /// Looks up a name in a directory. What is not a directory has no names.
    pub fn lookup(&self, directory: &Inode, name: &[u8]) -> Result<Option<DirEntry<'_>>> {
        let (first, count) = self.entries(directory)?;
        let wanted = build::prefix(name);
        let (mut low, mut high) = (0, count);
        while low < high {
            let middle = low + (high - low) / 2;
            let record = self.file.record(Section::DirEntries, first + middle)?;
            let order = match record.u32(8).cmp(&wanted) {
                std::cmp::Ordering::Equal => self.name(record)?.cmp(name),
                order => order,
            };
            match order {
                std::cmp::Ordering::Less => low = middle + 1,
                std::cmp::Ordering::Greater => high = middle,
                std::cmp::Ordering::Equal => return self.entry(record).map(Some),
            }
        }
        Ok(None)
    }

    /// The name of that place in a directory, counted from 0 in the order of the names; `None` past the last.
    pub fn nth(&self, directory: &Inode, place: u32) -> Result<Option<DirEntry<'_>>> {
        let (first, count) = self.entries(directory)?;
        if place >= count {
            return Ok(None);
        }
        let record = self.file.record(Section::DirEntries, first + place)?;
        self.entry(record).map(Some)
    }

    /// The target of a symbolic link.
    pub fn target(&self, link: &Inode) -> Result<&[u8]> {
        if link.kind() != libc::S_IFLNK {
            return Err(self
                .file
                .damaged("what is no symbolic link was read as one"));
        }
        self.file.target(link)
    }

    /// The extended attributes of an inode, in order of their names.
    pub fn xattrs(&self, inode: &Inode) -> Result<Vec<(&[u8], &[u8])>> {
        self.file.xattrs(inode.xattrs)
    }

    /// Opens a regular file.
    pub fn open_file(&self, inode: &Inode) -> Result<ViewFile> {
        let extents = self.file.extents(inode)?;
        let mut contents: Vec<(u32, Content)> = Vec::new();
        for extent in &extents {
            if contents.iter().all(|(number, _)| *number != extent.object) {
                contents.push((extent.object, self.content(extent.object)?));
            }
        }
        Ok(ViewFile::new(inode.size, extents, contents))
    }

    /// Fills `buffer` from `offset` of a file of this view; fewer bytes only at the end.
    pub fn read_at(&self, file: &ViewFile, buffer: &mut [u8], offset: u64) -> Result<usize> {
        let mut read = file.read_at(buffer, offset);
        if read.is_err() || self.damaged() > 0 {
            for (number, framed) in file.framed() {
                self.note(number, !framed.checks().has_failed());
            }
        }
        if read.is_err()
            && let Some(other) = self.other_copy(file)
        {
            read = other.read_at(buffer, offset);
        }
        // What was found wrong with a content says where that lies.
        read.map_err(|error| match error.downcast() {
            Ok(error) => error,
            Err(error) => io_error("read a content of", self.path())(error),
        })
    }

    /// A file, a part of which could not be read, with other copies of its contents; `None` where there is no other.
    fn other_copy(&self, file: &ViewFile) -> Option<ViewFile> {
        let other = file.with_contents(|number| self.content(number)).ok()?;
        (!other.was_damaged()).then_some(other)
    }

    /// Where the content of a regular file lies: its parts that are no holes, in order.
    pub fn parts(&self, file: &Inode) -> Result<Vec<StoredPart>> {
        let extents = self.file.extents(file)?;
        let part = |extent: &Extent| {
            Ok(StoredPart {
                offset: extent.offset,
                length: extent.length,
                object: self.file.object(extent.object)?,
                object_offset: extent.object_offset,
            })
        };
        extents.iter().map(part).collect()
    }

    /// Bytes of a regular file that are not holes.
    pub fn allocated(&self, file: &Inode) -> Result<u64> {
        if file.whole {
            return Ok(file.size);
        }
        let extents = self.file.extents(file)?;
        Ok(extents.iter().map(|extent| extent.length).sum())
    }

    /// Where the index of the view lies.
    pub fn path(&self) -> &Path {
        self.file.path()
    }

    /// Verifies every page.
    pub fn verify(&self) -> Result<()> {
        self.file.verify_all()
    }

    /// Has contents be compared once more when they are read next, and looked for where they are now, as if the view was opened only
    /// then: the process that changes the store has mended it. Whoever has a file open goes on with what that was. Of the
    /// index nothing is forgotten: a page that was mended is seen as it is, and one that was not may be sound in what is read of it.
    pub fn refresh(&self) {
        self.objects.refresh();
        self.lost.forget();
        *self.known.write() = Known::nothing(&self.file);
    }

    /// Whether something that was read of its index was not sound when it was last read.
    pub fn is_damaged(&self) -> bool {
        self.file.is_damaged()
    }

    /// When contents are compared with their names.
    pub fn when_verified(&self) -> Verify {
        self.verify
    }

    /// How many contents could not be used when they were last read.
    pub fn damaged(&self) -> usize {
        self.damage.load(Ordering::Relaxed)
    }

    /// Has contents that are files be opened so that nobody can write them by way of the descriptor. Fails with EPERM
    /// without the privilege to mount.
    pub fn seal(&self) -> io::Result<()> {
        self.objects.seal()
    }

    /// Whether [`seal`](Self::seal) was called.
    pub fn is_sealed(&self) -> bool {
        self.objects.is_sealed()
    }

    fn content(&self, number: u32) -> Result<Content> {
        let object = self.file.object(number)?;
        let place = self.place(number, &object)?;
        let known = Arc::clone(&self.known.read());
        let check = Check::Parts {
            verify: self.verify,
            known: known.verified.get(u64::from(number)),
            frames: known.frames.lock().get(&number).cloned(),
        };
        let opened = self.objects.open(&object, place, &check);
        let (mut content, is_there) = opened.map_err(|error| {
            self.note(number, false);
            self.or_lost(place, error)
        })?;
        match &mut content {
            Content::Framed(framed) => {
                known.share(number, framed);
                self.note(number, !framed.checks().has_failed());
            }
            Content::Bytes(_) | Content::File(_) => {
                self.note(number, true);
                // Who comes next begins where the view says, and a bad copy may be there.
                if self.verify == Verify::First && is_there {
                    known.verified.set(u64::from(number));
                }
            }
        }
        Ok(content)
    }

    /// Notes whether an object could be used.
    fn note(&self, number: u32, usable: bool) {
        if usable && self.damaged() == 0 {
            return;
        }
        let mut damaged = self.damaged.lock();
        match usable {
            true => damaged.remove(&number),
            false => damaged.insert(number),
        };
        self.damage.store(damaged.len(), Ordering::Relaxed);
    }

    /// Where the view says that an object is.
    fn place(&self, number: u32, object: &Object) -> Result<Option<Place>> {
        let record = self.file.record(Section::Locations, number)?;
        let (pack, stored) = (record.u32(0), record.u32(4));
        if pack == u32::MAX {
            return Ok(Some(Place::File));
        }
        if u64::from(stored) > object.size {
            return Err(self
                .file
                .damaged("an object is stored in more bytes than it has"));
        }
        let pack = PackId(self.file.record(Section::Packs, pack)?.array(0));
        Ok(Some(Place::Packed {
            pack,
            offset: record.u64(8),
            stored,
        }))
    }

    /// First entry of a directory and their number.
    fn entries(&self, directory: &Inode) -> Result<(u32, u32)> {
        if directory.kind() != libc::S_IFDIR {
            return Ok((0, 0));
        }
        let first = u32::try_from(directory.start).ok();
        let end = first.and_then(|first| first.checked_add(directory.count));
        match first.zip(end) {
            Some((first, end)) if end <= self.file.count(Section::DirEntries) => {
                Ok((first, directory.count))
            }
            _ => Err(self.file.damaged("a directory has more entries than all")),
        }
    }

    fn name(&self, entry: Record<'_>) -> Result<&[u8]> {
        let (start, bytes) = (u64::from(entry.u32(0)), u64::from(entry.u8(12)));
        self.file.slice(Section::Names, start, bytes)
    }

    fn entry(&self, record: Record<'_>) -> Result<DirEntry<'_>> {
        let name = self.name(record)?;
        if !is_name(name) || record.u32(4) >= self.len() {
            return Err(self.file.damaged("an entry of a directory cannot be"));
        }
        Ok(DirEntry {
            name,
            inode: record.u32(4),
            kind: u32::from(record.u8(13)) << 12,
            layer: record.u16(14),
        })
    }
}

#[cfg(test)]
mod tests;
