//! Files mapped for reading.

use std::fs::File;
use std::io;

/// A whole file, mapped read-only and private.
#[derive(Debug)]
pub struct FileMap(memmap2::Mmap);

impl FileMap {
    /// Maps `file`, which nobody writes to or cuts off any more. An access to a part that is not
    /// there all the same, or that the disk cannot read, is a SIGBUS: whoever uses the map reads a part by
    /// read(2) before its first use.
    pub fn read_only(file: &File) -> io::Result<Self> {
        // SAFETY: the bytes are only ever read as bytes, and the caller has made sure that the file does not
        // change while it is mapped.
        unsafe { memmap2::Mmap::map(file) }.map(Self)
    }

    /// The bytes.
    pub fn bytes(&self) -> &[u8] {
        &self.0
    }
}
