//! Memory mappings for tests.
#![allow(unsafe_code, reason = "a test of mmap has to map")]

use std::fs::File;

use memmap2::{Mmap, MmapMut, MmapOptions};

/// Maps a whole file shared and read-only.
pub fn shared(file: &File) -> Mmap {
    // SAFETY: the test looks at the bytes only through short copies, and expects them to change.
    unsafe { Mmap::map(file) }.unwrap()
}

/// Maps a whole file shared and writable.
pub fn shared_mut(file: &File) -> MmapMut {
    // SAFETY: as above.
    unsafe { MmapMut::map_mut(file) }.unwrap()
}

/// Maps a whole file privately and writable.
pub fn private(file: &File) -> MmapMut {
    // SAFETY: as above.
    unsafe { MmapOptions::new().map_copy(file) }.unwrap()
}
