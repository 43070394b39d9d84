//! Files of which only some chunks are in the upper.
//!
//! The first small write to a large lower file does not copy all of it. The upper gets a `metacopy`, a sparse
//! file, and a chunk is copied when something in it changes. The [`map`] in the work directory says which
//! chunks are the upper's; all others are read from the lower layer. Its directory lies below `work/incompat/`,
//! so that kernel overlayfs, which knows no such maps, refuses the mount; a value of `overlay.metacopy` that it
//! does not take makes it refuse the file, should somebody give it another work directory.
//!
//! - `map`: the format, and what holds after a crash;
//! - `partial`: the content of such a file: reading, writing, cutting, syncing;
//! - `store`: the directory of the maps;
//! - `complete`: how a file begins to be one, and how it ends;
//! - `foreign`: such a file of somebody else's upper, for reading.

mod complete;
mod foreign;
mod map;
mod partial;
mod store;

use std::ffi::{OsStr, OsString};
use std::sync::{Arc, OnceLock};

use nix::errno::Errno;

use super::error::{Context, Error, Result};
pub(super) use foreign::{content_over, mark_of};
pub(super) use partial::Partial;
pub(super) use store::{Maps, features_of_others};

/// What the value of `overlay.metacopy` on such a file begins with: no version of `struct ovl_metacopy`, which the kernel
/// answers with EIO (since Linux 6.6; before, it does not look at the value).
const MARK: u8 = b'P';

/// A chunk of no file is smaller, so that a bit never stands for less than a page.
const MIN_CHUNK: u64 = 4096;

/// More chunks than this make a larger chunk worth it.
const MANY: u64 = 1 << 20;

/// When and how files are copied up in chunks.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Chunking {
    /// Length of a chunk in bytes, a power of two; more for files of more than a million chunks.
    pub size: u64,
    /// Files up to this length are copied whole.
    pub whole_up_to: u64,
}

impl Default for Chunking {
    fn default() -> Self {
        Self {
            size: 64 << 10,
            whole_up_to: 1 << 20,
        }
    }
}

impl Chunking {
    /// Every file is copied whole.
    pub const OFF: Self = Self {
        size: MIN_CHUNK,
        whole_up_to: u64::MAX,
    };

    fn shift(self, length: u64) -> u32 {
        let mut shift = self.size.max(MIN_CHUNK).ilog2();
        while length >> shift > MANY {
            shift += 1;
        }
        shift
    }
}

/// What a node knows of its chunks: the name of the map, and the map once it was needed.
pub(super) struct Chunks {
    name: OsString,
    map: OnceLock<Arc<map::Map>>,
}

impl Chunks {
    fn new(name: OsString) -> Arc<Self> {
        Arc::new(Self {
            name,
            map: OnceLock::new(),
        })
    }

    /// The map of a file that was written.
    #[cfg(test)]
    pub(super) fn known_map(&self) -> &map::Map {
        self.map.get().unwrap()
    }
}

/// What a value of `overlay.metacopy` says.
pub(super) enum Marked {
    /// None of the data is in the upper.
    Metacopy,
    /// Some of it is; of bytes from the limit on, all is.
    Partial { limit: u64 },
}

/// The mark of a file that was cut off at the limit and may be longer again.
fn mark_with(limit: u64) -> [u8; 9] {
    let mut mark = [MARK; 9];
    mark[1..].copy_from_slice(&limit.to_le_bytes());
    mark
}

/// Whether a value of `overlay.metacopy` is of a file that is copied up in part.
pub(super) fn is_partial(value: &[u8]) -> bool {
    matches!(Marked::of(value), Ok(Marked::Partial { .. }))
}

impl Marked {
    /// Reads a mark. The kernel's own form begins with version 0 or is empty.
    pub(super) fn of(value: &[u8]) -> Result<Self> {
        match value {
            [] | [0, ..] => return Ok(Self::Metacopy),
            [MARK] => return Ok(Self::Partial { limit: u64::MAX }),
            [MARK, limit @ ..] => {
                if let Ok(limit) = limit.try_into() {
                    let limit = u64::from_le_bytes(limit);
                    return Ok(Self::Partial { limit });
                }
            }
            _ => {}
        }
        Err(Error::new(Errno::EIO)).context(
            "a file is marked in a way that this release does not know; use the one that wrote it",
        )
    }
}

/// A mark in a lower layer has to stand for itself: layers have no work directory.
pub(super) fn check_lower_mark(value: &[u8], path: impl FnOnce() -> String) -> Result<()> {
    match Marked::of(value)? {
        Marked::Metacopy => Ok(()),
        Marked::Partial { .. } => Err(without_map(&path())),
    }
}

/// Of a file that is copied up in part, in a layer.
pub(super) fn without_map(path: &str) -> Error {
    Error {
        errno: libc::EIO,
        context: format!("{path} is copied up in part; mount its layer as an upper and unmount it, which completes it").into(),
    }
}

/// The name of the map of an upper object.
fn name_of(object: crate::sys::fs::Object<'_>, ino: u64) -> OsString {
    let handle = crate::sys::handle::of(object).ok();
    map::name_of(handle.as_ref(), ino).into()
}

/// Names in the work directory.
const INCOMPAT: &str = "incompat";
const DIRECTORY: &str = "plywood.chunks";

fn os(name: &str) -> &OsStr {
    OsStr::new(name)
}
