//! The operations of the union, one method for each.

use std::ffi::{OsStr, OsString};
use std::sync::Arc;

use super::types::*;

/// A failed operation: the errno to answer, and what to log.
#[derive(Debug, thiserror::Error)]
#[error("{context}: {}", std::io::Error::from_raw_os_error(*errno))]
pub struct Error {
    /// The errno that the caller is to see.
    pub errno: i32,
    /// What was being done, on which layer and path; for logs.
    pub context: String,
}

/// Result of an operation of the union.
pub type Result<T, E = Error> = std::result::Result<T, E>;

/// Why a union could not be opened: the sentence tells the user what to mend.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum OpenError {
    /// A lower directory cannot be opened.
    #[error("cannot open the lower directory {path}: {source}; name an existing directory")]
    Lower {
        /// The directory.
        path: std::path::PathBuf,
        /// What the host said.
        source: std::io::Error,
    },
}

/// An open file.
pub struct FileHandle {}

/// An open directory: a stable listing.
pub struct DirHandle {}

/// The union itself; every method may be called from any thread.
pub struct Union {}

#[allow(
    unused_variables,
    clippy::todo,
    missing_docs,
    reason = "signatures that the first commit agrees on"
)]
impl Union {
    /// Checks the directories, locks the work directory and opens the layers.
    pub fn open(config: UnionConfig) -> Result<Self, OpenError> {
        todo!()
    }
    pub fn is_read_only(&self) -> bool {
        todo!()
    }

    pub fn lookup(&self, parent: NodeId, name: &OsStr) -> Result<Entry> {
        todo!()
    }
    pub fn forget(&self, node: NodeId, lookups: u64) {
        todo!()
    }
    pub fn getattr(&self, node: NodeId, handle: Option<&FileHandle>) -> Result<Attr> {
        todo!()
    }
    pub fn setattr(
        &self,
        node: NodeId,
        handle: Option<&FileHandle>,
        set: &SetAttr,
        caller: &Caller,
    ) -> Result<Attr> {
        todo!()
    }
    pub fn readlink(&self, node: NodeId) -> Result<OsString> {
        todo!()
    }

    pub fn mknod(
        &self,
        parent: NodeId,
        name: &OsStr,
        mode: u32,
        rdev: u64,
        caller: &Caller,
    ) -> Result<Entry> {
        todo!()
    }
    pub fn mkdir(&self, parent: NodeId, name: &OsStr, mode: u32, caller: &Caller) -> Result<Entry> {
        todo!()
    }
    pub fn symlink(
        &self,
        parent: NodeId,
        name: &OsStr,
        target: &OsStr,
        caller: &Caller,
    ) -> Result<Entry> {
        todo!()
    }
    pub fn link(&self, node: NodeId, parent: NodeId, name: &OsStr) -> Result<Entry> {
        todo!()
    }
    pub fn unlink(&self, parent: NodeId, name: &OsStr) -> Result<()> {
        todo!()
    }
    pub fn rmdir(&self, parent: NodeId, name: &OsStr) -> Result<()> {
        todo!()
    }
    pub fn rename(
        &self,
        parent: NodeId,
        name: &OsStr,
        new_parent: NodeId,
        new_name: &OsStr,
        mode: RenameMode,
    ) -> Result<()> {
        todo!()
    }

    /// `flags` are open(2)'s. Copies a lower file up when they ask for writing.
    pub fn open_file(&self, node: NodeId, flags: i32, caller: &Caller) -> Result<Arc<FileHandle>> {
        todo!()
    }
    pub fn create(
        &self,
        parent: NodeId,
        name: &OsStr,
        mode: u32,
        flags: i32,
        caller: &Caller,
    ) -> Result<(Entry, Arc<FileHandle>)> {
        todo!()
    }
    /// Fills `buf` from `offset`; fewer bytes only at the end of the file. Without a handle (the
    /// kernel was told not to send OPEN) the file is opened by its node.
    pub fn read(
        &self,
        node: NodeId,
        handle: Option<&FileHandle>,
        offset: u64,
        buf: &mut [u8],
    ) -> Result<usize> {
        todo!()
    }
    /// `kill_suidgid`: clear setuid, and setgid of a group-executable file.
    pub fn write(
        &self,
        node: NodeId,
        handle: Option<&FileHandle>,
        offset: u64,
        data: &[u8],
        kill_suidgid: bool,
    ) -> Result<usize> {
        todo!()
    }
    pub fn fsync(&self, node: NodeId, handle: Option<&FileHandle>, datasync: bool) -> Result<()> {
        todo!()
    }
    /// The last user of the handle is gone; must be called once for each handle given out.
    pub fn release(&self, node: NodeId, handle: Arc<FileHandle>) {
        todo!()
    }
    pub fn fallocate(
        &self,
        node: NodeId,
        handle: Option<&FileHandle>,
        mode: i32,
        offset: u64,
        len: u64,
        caller: &Caller,
    ) -> Result<()> {
        todo!()
    }
    pub fn lseek(
        &self,
        node: NodeId,
        handle: Option<&FileHandle>,
        offset: i64,
        whence: i32,
    ) -> Result<i64> {
        todo!()
    }
    #[allow(clippy::too_many_arguments, reason = "the system call has as many")]
    pub fn copy_file_range(
        &self,
        node_in: NodeId,
        handle_in: Option<&FileHandle>,
        offset_in: u64,
        node_out: NodeId,
        handle_out: Option<&FileHandle>,
        offset_out: u64,
        len: u64,
    ) -> Result<usize> {
        todo!()
    }

    /// Takes the merged listing of the directory.
    pub fn open_dir(&self, node: NodeId) -> Result<Arc<DirHandle>> {
        todo!()
    }
    /// Hands entries after `offset` (0: from the start, `.` and `..` included) to `sink` until it answers false.
    pub fn read_dir(
        &self,
        node: NodeId,
        handle: &DirHandle,
        offset: u64,
        sink: &mut dyn FnMut(DirEntry) -> bool,
    ) -> Result<()> {
        todo!()
    }
    /// As `read_dir` with the entry looked up as well (one lookup is counted for each that `sink`
    /// accepts; `None` for `.` and `..`, or when it vanished).
    pub fn read_dir_plus(
        &self,
        node: NodeId,
        handle: &DirHandle,
        offset: u64,
        sink: &mut dyn FnMut(DirEntry, Option<Entry>) -> bool,
    ) -> Result<()> {
        todo!()
    }
    pub fn fsync_dir(&self, node: NodeId, datasync: bool) -> Result<()> {
        todo!()
    }

    pub fn statfs(&self) -> Result<StatFs> {
        todo!()
    }
    pub fn getxattr(&self, node: NodeId, name: &OsStr) -> Result<Vec<u8>> {
        todo!()
    }
    pub fn listxattr(&self, node: NodeId) -> Result<Vec<OsString>> {
        todo!()
    }
    pub fn setxattr(
        &self,
        node: NodeId,
        name: &OsStr,
        value: &[u8],
        mode: SetXattrMode,
    ) -> Result<()> {
        todo!()
    }
    pub fn removexattr(&self, node: NodeId, name: &OsStr) -> Result<()> {
        todo!()
    }

    /// Live regular files of the upper that may have been written: what has to be flushed through
    /// the mount before anyone reads the upper.
    pub fn writable_nodes(&self) -> Vec<NodeId> {
        todo!()
    }
    /// Makes everything in the upper durable.
    pub fn sync(&self) -> Result<()> {
        todo!()
    }
}
