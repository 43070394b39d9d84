//! What the union needs of a read-only layer. Nothing outside an implementation may assume that an
//! object of a layer is a path or a descriptor of the host.

use std::collections::{HashMap, HashSet};
use std::ffi::{OsStr, OsString};
use std::os::fd::BorrowedFd;
use std::path::PathBuf;
use std::sync::Arc;

use super::error::Result;
use super::origin::Origin;
use super::types::{Attr, Damage, FileKind};
use crate::store::view::StoredPart;

/// A read-only layer.
pub trait Lower: Send + Sync {
    /// Its top directory.
    fn root(&self) -> Arc<dyn LowerObject>;
    /// Tells apart the inode number spaces of layers: two layers with the same one never use one
    /// number for two objects.
    fn number_space(&self) -> u64;
    /// The inode number of what `origin` names, if it is an object of this layer's number space that
    /// still exists. `None` when the origin belongs elsewhere or cannot be told.
    fn decode_origin(&self, origin: &Origin) -> Option<u64>;
    /// Whether origins of this layer can be told at all (file handles can be opened).
    fn decodes_origins(&self) -> bool;
    /// The object that `origin` names; `None` also where one is found by its name alone.
    fn object_of(&self, _origin: &Origin) -> Option<Arc<dyn LowerObject>> {
        None
    }
    /// How the objects of these numbers are reached from the top; `None` if only a walk over all of the layer can tell.
    fn ways_to(&self, _numbers: &HashSet<u64>) -> Result<Option<Ways>> {
        Ok(None)
    }
    /// Free space and sizes, for a union without an upper.
    fn statfs(&self) -> Result<super::types::StatFs>;
    /// What could not be used when it was last read, as far as the layer can tell.
    fn damage(&self) -> Damage {
        Damage::default()
    }
    /// Has the layer be read and compared once more, as if it was opened only now: somebody has mended it. Says whether it is
    /// of a kind that is mended in use.
    fn refresh(&self) -> bool {
        false
    }
}

/// By the numbers of directories, the names in each that lead to certain objects.
pub(super) type Ways = HashMap<u64, Vec<OsString>>;

/// What a directory of a layer says of the layers below it.
#[derive(Clone, Debug, Default)]
pub struct DirMarks {
    /// Nothing below shows through.
    pub opaque: bool,
    /// It continues below under this name (relative: in the same parent) or path (absolute).
    pub redirect: Option<PathBuf>,
}

/// A name in a directory of a layer.
pub enum LowerEntry {
    /// The name is gone, here and in the layers below.
    Whiteout,
    /// An object.
    Object(Arc<dyn LowerObject>),
}

/// One name of a listing.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ListedKind {
    /// The name is gone, here and in the layers below.
    Whiteout,
    /// An object of this kind.
    Object(FileKind),
}

/// An object of a merged view, as the store knows it.
pub struct Stored {
    /// Number of its inode.
    pub inode: u32,
    /// Parts of a regular file that are no holes.
    pub parts: Vec<StoredPart>,
}

/// A file or directory of a layer; never changes.
pub trait LowerObject: Send + Sync {
    /// Its attributes; `ino` is the number in the layer's number space.
    fn attr(&self) -> Result<Attr>;
    /// The layer's number space.
    fn number_space(&self) -> u64;
    /// Looks up a name in a directory.
    fn lookup(self: Arc<Self>, name: &OsStr) -> Result<Option<LowerEntry>>;
    /// Hands every name of a directory to `sink`, with inode numbers, in any order.
    fn list(&self, sink: &mut dyn FnMut(&OsStr, ListedKind, u64)) -> Result<()>;
    /// Marks of a directory.
    fn marks(&self) -> Result<DirMarks>;
    /// Whether a file's data is in the layers below (`metacopy`), and where it is redirected to.
    fn metacopy(&self) -> Result<Option<DirMarks>>;
    /// Target of a symbolic link.
    fn readlink(&self) -> Result<OsString>;
    /// The value of an extended attribute under its stored name.
    fn xattr(&self, stored: &OsStr) -> Result<Vec<u8>>;
    /// Stored names of all extended attributes.
    fn xattr_names(&self) -> Result<Vec<OsString>>;
    /// Opens a regular file for reading.
    fn open(&self) -> Result<Arc<dyn LowerFile>>;
    /// Opens a regular file for reading whose data the layers below have as `data`, which is the object itself if they have
    /// none of it.
    fn open_over(&self, data: &dyn LowerObject) -> Result<Arc<dyn LowerFile>> {
        data.open()
    }
    /// Which inode of a merged view it is, if the layer is one, and, of a regular file, where its content lies.
    fn stored(&self) -> Result<Option<Stored>> {
        Ok(None)
    }
    /// The letters by which chattr(1) has seen to it that nobody writes, changes or removes it; mostly none.
    fn protection(&self) -> Result<&'static str> {
        Ok("")
    }
    /// What names the object for `overlay.origin`, if the layer can tell.
    fn origin(&self) -> Option<Origin>;
}

/// An open regular file of a layer.
pub trait LowerFile: Send + Sync {
    /// Fills `buf` from `offset`; fewer bytes only at the end.
    fn read_at(&self, buf: &mut [u8], offset: u64) -> Result<usize>;
    /// Whether the content is in memory, so that an open file that nobody uses costs more than a descriptor.
    fn is_in_memory(&self) -> bool {
        false
    }
    /// Whether a part of it could not be read that might be mended since: it is to be opened again.
    fn has_failed(&self) -> bool {
        false
    }
    /// `SEEK_DATA` or `SEEK_HOLE` from `offset`; ENXIO past the end.
    fn seek(&self, offset: i64, whence: i32) -> Result<i64>;
    /// The host descriptor that holds exactly this content, if there is one.
    fn host_fd(&self) -> Option<BorrowedFd<'_>>;
    /// The same, if nobody can write the file by way of it, not by opening it again either.
    fn sealed_fd(&self) -> Option<BorrowedFd<'_>> {
        None
    }
}
