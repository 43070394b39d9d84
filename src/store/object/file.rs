//! Large objects on their way into files of their own.

use std::fs::{self, File, OpenOptions};
use std::io::Write;
use std::os::fd::AsFd;
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};

use super::framed::{Frame, Layout};
use crate::store::error::{Result, io_error};
use crate::store::format::ObjectName;
use crate::store::format::tables::Object;

/// A file on its way. Dropped before it is kept, it is removed.
#[derive(Debug)]
struct Unfinished {
    path: PathBuf,
    file: File,
    kept: bool,
}

impl Unfinished {
    fn create(dir: &Path) -> Result<Self> {
        let path = dir.join(format!("object-{:032x}", rand::random::<u128>()));
        let file = OpenOptions::new()
            .read(true)
            .write(true)
            .create_new(true)
            .mode(0o600)
            .open(&path)
            .map_err(io_error("make", &path))?;
        Ok(Self {
            path,
            file,
            kept: false,
        })
    }

    fn finish(mut self, object: Object) -> Result<NewFile> {
        let file = self
            .file
            .try_clone()
            .map_err(io_error("keep", &self.path))?;
        self.kept = true;
        Ok(NewFile {
            object,
            path: self.path.clone(),
            file,
            kept: false,
        })
    }
}

impl Drop for Unfinished {
    fn drop(&mut self) {
        if !self.kept {
            // What stays is cleared when the store is opened.
            let _ = fs::remove_file(&self.path);
        }
    }
}

/// A large object that is being written as it is.
#[derive(Debug)]
pub(in crate::store) struct FileWriter {
    file: Unfinished,
    hash: blake3::Hasher,
    size: u64,
}

impl FileWriter {
    /// Begins a file in `dir`.
    pub(in crate::store) fn create(dir: &Path) -> Result<Self> {
        Ok(Self {
            file: Unfinished::create(dir)?,
            hash: blake3::Hasher::new(),
            size: 0,
        })
    }

    /// Adds bytes.
    pub(in crate::store) fn write(&mut self, bytes: &[u8]) -> Result<()> {
        self.hash.update(bytes);
        self.size += bytes.len() as u64;
        let written = self.file.file.write_all(bytes);
        written.map_err(io_error("write", &self.file.path))
    }

    /// Ends the content.
    pub(in crate::store) fn finish(self) -> Result<NewFile> {
        self.file.finish(Object {
            name: ObjectName(*self.hash.finalize().as_bytes()),
            size: self.size,
        })
    }
}

/// A large object that is being written in frames, by whoever makes them.
#[derive(Debug)]
pub(in crate::store) struct FrameWriter {
    file: Unfinished,
    layout: Layout,
}

impl FrameWriter {
    /// Begins a file in `dir` for an object of `size` bytes.
    pub(in crate::store) fn create(dir: &Path, size: u64) -> Result<Self> {
        Ok(Self {
            file: Unfinished::create(dir)?,
            layout: Layout::new(size),
        })
    }

    /// Adds the next frame.
    pub(in crate::store) fn append(&mut self, frame: &Frame) -> Result<()> {
        let written = self.layout.append(&self.file.file, frame);
        written.map_err(io_error("write", &self.file.path))
    }

    /// Ends the object, all of whose frames were added.
    pub(in crate::store) fn finish(self) -> Result<NewFile> {
        let written = self.layout.finish(&self.file.file);
        let object = written.map_err(io_error("write", &self.file.path))?;
        self.file.finish(object)
    }
}

/// A large object that is written, but neither durable nor in its place. Dropped, it removes its file.
#[derive(Debug)]
pub(in crate::store) struct NewFile {
    pub(in crate::store) object: Object,
    pub(super) path: PathBuf,
    file: File,
    kept: bool,
}

impl NewFile {
    /// Has the host begin to write, so that less is left to do for [`sync`](Self::sync).
    pub(in crate::store) fn start_writing(&self) {
        // Only `sync` promises anything.
        let _ = crate::sys::fs::start_writeback(self.file.as_fd());
    }

    /// Makes the content durable.
    pub(in crate::store) fn sync(&self) -> Result<()> {
        let synced = self.file.sync_all();
        synced.map_err(io_error("make durable", &self.path))
    }

    pub(super) fn kept(mut self) {
        self.kept = true;
    }
}

impl Drop for NewFile {
    fn drop(&mut self) {
        if !self.kept {
            // What stays is cleared when the store is opened.
            let _ = fs::remove_file(&self.path);
        }
    }
}
