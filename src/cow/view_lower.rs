//! A lower layer that is a merged view of packed layers.
//!
//! An object is the number of its inode. A view has no marks of the union: whiteouts and opaque directories were resolved when it was
//! built, and an attribute of a layer that looks like a mark is shown as what it is, an attribute of
//! that name.

use std::collections::HashSet;
use std::ffi::{OsStr, OsString};
use std::os::fd::{AsFd, BorrowedFd};
use std::os::unix::ffi::{OsStrExt, OsStringExt};
use std::sync::Arc;

use nix::errno::Errno;

use super::attr::statfs_of;
use super::error::{Error, Result};
use super::lower::{DirMarks, ListedKind, Lower, LowerEntry, LowerFile, LowerObject, Stored, Ways};
use super::origin::Origin;
use super::types::{Attr, Damage, FileKind, StatFs, Timestamp, XattrFamily};
use crate::store::view::{View, ViewFile};
use crate::store::{self, Inode, Time};
use crate::sys::fs;
use crate::sys::handle::Handle;

/// Length and units of 512 bytes that directories are shown with.
const DIRECTORY: (u64, u64) = (4096, 8);
/// Type of the handles by which copies of a view's objects are told. A file system's own handles have the
/// file system's UUID beside them, so none is mistaken for one of these.
const HANDLE: i32 = 0xfa;

/// What all objects of one view share.
struct Shared {
    view: Arc<View>,
    family: XattrFamily,
    /// Stands where a file system's device number and UUID do.
    space: u64,
    uuid: [u8; 16],
}

/// A merged view as a lower layer.
pub(super) struct ViewLower {
    shared: Arc<Shared>,
    root: Arc<ViewObject>,
}

impl ViewLower {
    /// Uses `view` as a lower of a mount that honours `family`.
    pub(super) fn open(view: Arc<View>, family: XattrFamily) -> Result<Self> {
        let mut space = [0; 8];
        space.copy_from_slice(&view.key().0[..8]);
        let uuid = uuid_of(&view);
        let shared = Arc::new(Shared {
            view,
            family,
            // No host has device numbers that high.
            space: u64::from_le_bytes(space) | 1 << 63,
            uuid,
        });
        let root = shared.object(View::ROOT);
        Ok(Self { shared, root })
    }
}

impl Lower for ViewLower {
    fn root(&self) -> Arc<dyn LowerObject> {
        Arc::clone(&self.root) as Arc<dyn LowerObject>
    }

    fn number_space(&self) -> u64 {
        self.shared.space
    }

    fn decode_origin(&self, origin: &Origin) -> Option<u64> {
        inode_of(&self.shared.view, origin).map(number_of)
    }

    fn decodes_origins(&self) -> bool {
        true
    }

    fn object_of(&self, origin: &Origin) -> Option<Arc<dyn LowerObject>> {
        let inode = inode_of(&self.shared.view, origin)?;
        Some(self.shared.object(inode))
    }

    fn ways_to(&self, numbers: &HashSet<u64>) -> Result<Option<Ways>> {
        let view = &self.shared.view;
        let inodes = numbers.iter().filter_map(|number| inode_numbered(*number));
        let ways = view.names().and_then(|names| names.ways_to(inodes));
        let ways = ways.map_err(|error| Error {
            errno: libc::EIO,
            context: error.to_string().into(),
        })?;
        let owned = |name: &[u8]| OsString::from_vec(name.to_vec());
        let ways = ways.into_iter().map(|(directory, names)| {
            let names = names.into_iter().map(owned).collect();
            (number_of(directory), names)
        });
        Ok(Some(ways.collect()))
    }

    fn damage(&self) -> Damage {
        let view = &self.shared.view;
        Damage {
            contents: view.damaged() as u64,
            view: view.is_damaged(),
        }
    }

    fn refresh(&self) -> bool {
        self.shared.view.refresh();
        true
    }

    fn statfs(&self) -> Result<StatFs> {
        Ok(statfs_of(&fs::fstatvfs(self.shared.view.as_fd())?))
    }
}

impl Shared {
    fn object(self: &Arc<Self>, number: u32) -> Arc<ViewObject> {
        Arc::new(ViewObject {
            shared: Arc::clone(self),
            number,
        })
    }

    fn attr(&self, number: u32, inode: &Inode) -> store::Result<Attr> {
        let kind = kind_of(inode.kind());
        let (size, blocks) = match kind {
            FileKind::Directory => DIRECTORY,
            FileKind::Symlink => (self.view.target(inode)?.len() as u64, 0),
            FileKind::Regular => (inode.size, self.view.allocated(inode)?.div_ceil(512)),
            _ => (0, 0),
        };
        let (major, minor) = inode.device();
        let device = matches!(kind, FileKind::CharDevice | FileKind::BlockDevice);
        Ok(Attr {
            ino: number_of(number),
            size,
            blocks,
            atime: timestamp(inode.atime),
            mtime: timestamp(inode.mtime),
            ctime: timestamp(inode.mtime),
            kind,
            perm: inode.mode & 0o7777,
            nlink: inode.links,
            uid: inode.uid,
            gid: inode.gid,
            rdev: if device {
                libc::makedev(major, minor)
            } else {
                0
            },
            blksize: 4096,
        })
    }

    /// EIO, with what is damaged and where.
    fn failed(&self, number: u32, error: store::Error) -> Error {
        Error {
            errno: libc::EIO,
            context: self.view.of_inode(number, error).to_string().into(),
        }
    }
}

/// An object of the view. There is one for each file that the kernel knows, so it keeps nothing that the view can tell.
struct ViewObject {
    shared: Arc<Shared>,
    number: u32,
}

impl ViewObject {
    fn inode(&self) -> Result<Inode> {
        self.ok(self.shared.view.inode(self.number))
    }

    fn ok<T>(&self, result: store::Result<T>) -> Result<T> {
        result.map_err(|error| self.shared.failed(self.number, error))
    }
}

impl LowerObject for ViewObject {
    fn attr(&self) -> Result<Attr> {
        let inode = self.inode()?;
        self.ok(self.shared.attr(self.number, &inode))
    }

    fn number_space(&self) -> u64 {
        self.shared.space
    }

    fn lookup(self: Arc<Self>, name: &OsStr) -> Result<Option<LowerEntry>> {
        let found = self.ok(self.shared.view.lookup(&self.inode()?, name.as_bytes()))?;
        match found {
            None => Ok(None),
            Some(entry) => {
                let object = self.shared.object(entry.inode);
                Ok(Some(LowerEntry::Object(object)))
            }
        }
    }

    fn list(&self, sink: &mut dyn FnMut(&OsStr, ListedKind, u64)) -> Result<()> {
        let directory = self.inode()?;
        let mut place = 0;
        while let Some(entry) = self.ok(self.shared.view.nth(&directory, place))? {
            let kind = ListedKind::Object(kind_of(entry.kind));
            sink(OsStr::from_bytes(entry.name), kind, number_of(entry.inode));
            place += 1;
        }
        Ok(())
    }

    fn marks(&self) -> Result<DirMarks> {
        Ok(DirMarks::default())
    }

    fn metacopy(&self) -> Result<Option<DirMarks>> {
        Ok(None)
    }

    fn readlink(&self) -> Result<OsString> {
        let inode = self.inode()?;
        if kind_of(inode.kind()) != FileKind::Symlink {
            return Err(Errno::EINVAL.into());
        }
        let target = self.ok(self.shared.view.target(&inode))?;
        Ok(OsString::from_vec(target.to_vec()))
    }

    fn xattr(&self, stored: &OsStr) -> Result<Vec<u8>> {
        for (name, value) in self.ok(self.shared.view.xattrs(&self.inode()?))? {
            if self.shared.family.stored_name(OsStr::from_bytes(name)) == stored {
                return Ok(value.to_vec());
            }
        }
        Err(Errno::ENODATA.into())
    }

    fn xattr_names(&self) -> Result<Vec<OsString>> {
        let xattrs = self.ok(self.shared.view.xattrs(&self.inode()?))?;
        Ok(xattrs
            .into_iter()
            .map(|(name, _)| self.shared.family.stored_name(OsStr::from_bytes(name)))
            .collect())
    }

    fn open(&self) -> Result<Arc<dyn LowerFile>> {
        let inode = self.inode()?;
        match kind_of(inode.kind()) {
            FileKind::Regular => {}
            FileKind::Directory => return Err(Errno::EISDIR.into()),
            _ => return Err(Errno::ENXIO.into()),
        }
        let file = self.ok(self.shared.view.open_file(&inode))?;
        Ok(Arc::new(OpenFile {
            shared: Arc::clone(&self.shared),
            number: self.number,
            file,
        }))
    }

    fn stored(&self) -> Result<Option<Stored>> {
        let inode = self.inode()?;
        let parts = match kind_of(inode.kind()) {
            FileKind::Regular => self.ok(self.shared.view.parts(&inode))?,
            _ => Vec::new(),
        };
        let inode = self.number;
        Ok(Some(Stored { inode, parts }))
    }

    fn origin(&self) -> Option<Origin> {
        Some(Origin {
            uuid: self.shared.uuid,
            handle: Handle {
                kind: HANDLE,
                data: self.number.to_le_bytes().to_vec(),
            },
        })
    }
}

/// An open file of the view.
struct OpenFile {
    shared: Arc<Shared>,
    number: u32,
    file: ViewFile,
}

impl LowerFile for OpenFile {
    fn read_at(&self, buf: &mut [u8], offset: u64) -> Result<usize> {
        let read = self.shared.view.read_at(&self.file, buf, offset);
        read.map_err(|error| self.shared.failed(self.number, error))
    }

    fn is_in_memory(&self) -> bool {
        self.file.is_in_memory()
    }

    fn has_failed(&self) -> bool {
        self.file.has_failed()
    }

    fn seek(&self, offset: i64, whence: i32) -> Result<i64> {
        let from = u64::try_from(offset).map_err(|_| Errno::ENXIO)?;
        if from >= self.file.size() {
            return Err(Errno::ENXIO.into());
        }
        let found = match whence {
            libc::SEEK_DATA => self.file.next_data(from).ok_or(Errno::ENXIO)?,
            libc::SEEK_HOLE => self.file.next_hole(from),
            _ => return Err(Errno::EINVAL.into()),
        };
        i64::try_from(found).map_err(|_| Errno::EOVERFLOW.into())
    }

    fn host_fd(&self) -> Option<BorrowedFd<'_>> {
        self.file.host_file().map(AsFd::as_fd)
    }

    fn sealed_fd(&self) -> Option<BorrowedFd<'_>> {
        match self.shared.view.is_sealed() {
            true => self.host_fd(),
            false => None,
        }
    }
}

/// The inode of `view` that `origin` names.
pub(super) fn inode_of(view: &View, origin: &Origin) -> Option<u32> {
    if origin.uuid != uuid_of(view) || origin.handle.kind != HANDLE {
        return None;
    }
    let bytes = origin.handle.data.as_slice().try_into().ok()?;
    let number = u32::from_le_bytes(bytes);
    (number < view.len()).then_some(number)
}

/// Stands where a file system's UUID does.
fn uuid_of(view: &View) -> [u8; 16] {
    let mut uuid = [0; 16];
    uuid.copy_from_slice(&view.key().0[8..24]);
    uuid
}

/// Inode numbers start at 1: 0 is none to many programs.
fn number_of(inode: u32) -> u64 {
    u64::from(inode) + 1
}

/// The inode that has such a number.
fn inode_numbered(number: u64) -> Option<u32> {
    u32::try_from(number.checked_sub(1)?).ok()
}

fn timestamp(time: Time) -> Timestamp {
    Timestamp {
        sec: time.sec,
        nsec: time.nsec,
    }
}

/// The kind of a type of a mode. A view has no others than these; a damaged one shows a fifo.
fn kind_of(mode: u32) -> FileKind {
    match mode {
        libc::S_IFREG => FileKind::Regular,
        libc::S_IFDIR => FileKind::Directory,
        libc::S_IFLNK => FileKind::Symlink,
        libc::S_IFCHR => FileKind::CharDevice,
        libc::S_IFBLK => FileKind::BlockDevice,
        libc::S_IFSOCK => FileKind::Socket,
        _ => FileKind::Fifo,
    }
}
