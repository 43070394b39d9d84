//! Memory mappings for tests.
#![allow(unsafe_code, reason = "a test of mmap has to map")]

use std::fs::File;
use std::io;
use std::os::fd::AsRawFd;
use std::path::Path;

use memmap2::{Mmap, MmapMut, MmapOptions};

/// Maps a whole file shared and read-only.
pub fn shared(file: &File) -> Mmap {
    // SAFETY: the test looks at the bytes only through short copies, and expects them to change.
    unsafe { Mmap::map(file) }.unwrap()
}

/// The same, of what is not empty.
pub fn shared_or_none(path: &Path) -> Option<Mmap> {
    let file = File::open(path).unwrap();
    (file.metadata().unwrap().len() > 0).then(|| shared(&file))
}

/// Maps a whole file shared and writable, or says why not.
pub fn try_shared_mut(file: &File) -> io::Result<MmapMut> {
    // SAFETY: as above.
    unsafe { MmapMut::map_mut(file) }
}

/// Maps a whole file shared and writable.
pub fn shared_mut(file: &File) -> MmapMut {
    try_shared_mut(file).unwrap()
}

/// Maps a whole file privately and writable.
pub fn private(file: &File) -> MmapMut {
    // SAFETY: as above.
    unsafe { MmapOptions::new().map_copy(file) }.unwrap()
}

/// Lists a directory into the memory that is mapped.
pub fn list_into(directory: &File, map: &mut MmapMut) {
    let (fd, buffer) = (directory.as_raw_fd(), map.as_mut_ptr());
    // SAFETY: the kernel writes no more than there is of the mapping, which nobody else has.
    let result = unsafe { libc::syscall(libc::SYS_getdents64, fd, buffer, map.len()) };
    assert!(result > 0, "{}", io::Error::last_os_error());
}

/// How many pages of a mapping are in memory.
pub fn resident(map: &Mmap) -> usize {
    let mut pages = vec![0u8; map.len().div_ceil(4096)];
    // SAFETY: the range is mapped for as long as `map` is borrowed, and there is a byte for each of its pages.
    let result = unsafe { libc::mincore(map.as_ptr() as *mut _, map.len(), pages.as_mut_ptr()) };
    assert_eq!(result, 0, "{}", io::Error::last_os_error());
    pages.iter().filter(|page| **page & 1 != 0).count()
}
