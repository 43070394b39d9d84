//! Open directories and their listings.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use fuser::{
    FileAttr, FileHandle as Fh, FopenFlags, Generation, INodeNo, ReplyDirectory,
    ReplyDirectoryPlus, ReplyOpen,
};
use parking_lot::Mutex;

use super::{UnionFs, answer};
use crate::cow::union::{DirHandle, Error};
use crate::cow::{DirEntry, Entry, NodeId};
use crate::fuse::convert::{self, FOREVER};
use crate::fuse::features::Feature;

/// An open directory: its listing, taken again when the reader rewinds.
pub(super) struct OpenDir {
    listing: Mutex<Arc<DirHandle>>,
    read: AtomicBool,
}

impl UnionFs {
    /// The kernel may cache a listing, and keep it as long as it is right. It is not told of a move, for that could wait for a
    /// program that is just reading the cache.
    fn directory_flags(&self, node: NodeId) -> FopenFlags {
        let mut flags = FopenFlags::empty();
        flags.set(FopenFlags::FOPEN_KEEP_CACHE, !self.union.has_moved(node));
        flags.set(
            FopenFlags::FOPEN_CACHE_DIR,
            self.policy().uses(Feature::CacheDir),
        );
        flags
    }

    pub(super) fn open_directory(&self, node: NodeId, reply: ReplyOpen) {
        match self.union.open_dir(node) {
            Ok(listing) => {
                let fh = self.dirs.insert(Arc::new(OpenDir {
                    listing: Mutex::new(listing),
                    read: AtomicBool::new(false),
                }));
                reply.opened(Fh(fh), self.directory_flags(node));
            }
            Err(error) => reply.error(answer::errno(&error)),
        }
    }

    pub(super) fn list(&self, node: NodeId, fh: Fh, offset: u64, mut reply: ReplyDirectory) {
        let result = self.listing(node, fh, offset).and_then(|listing| {
            self.union.read_dir(node, &listing, offset, &mut |entry| {
                let kind = convert::file_type(entry.kind);
                let number = self.passing.number(NodeId(entry.ino));
                !reply.add(INodeNo(number.0), entry.next_offset, kind, entry.name)
            })
        });
        match result {
            Ok(()) => reply.ok(),
            Err(error) => reply.error(answer::errno(&error)),
        }
    }

    /// With attributes, which counts as a lookup of every name in the answer.
    pub(super) fn list_plus(
        &self,
        node: NodeId,
        fh: Fh,
        offset: u64,
        mut reply: ReplyDirectoryPlus,
    ) {
        let result = self.listing(node, fh, offset).and_then(|listing| {
            let mut add = |entry: DirEntry, found: Option<Entry>| {
                let (attr, good_for, generation) = self.attributes_of(&entry, found);
                !reply.add(
                    attr.ino,
                    entry.next_offset,
                    &entry.name,
                    &good_for,
                    &attr,
                    Generation(generation),
                )
            };
            self.union.read_dir_plus(node, &listing, offset, &mut add)
        });
        match result {
            Ok(()) => reply.ok(),
            Err(error) => reply.error(answer::errno(&error)),
        }
    }

    /// The listing to go on with: a new one when the reader starts over, so that rewinddir shows what changed.
    fn listing(&self, node: NodeId, fh: Fh, offset: u64) -> Result<Arc<DirHandle>, Error> {
        let Some(dir) = self.dirs.get(fh.0) else {
            return self.union.open_dir(node);
        };
        let mut listing = dir.listing.lock();
        if dir.read.swap(true, Ordering::Relaxed) && offset == 0 {
            *listing = self.union.open_dir(node)?;
        }
        Ok(listing.clone())
    }

    /// What READDIRPLUS says of an entry: attributes, how long they are good for, and generation.
    fn attributes_of(&self, entry: &DirEntry, found: Option<Entry>) -> (FileAttr, Duration, u64) {
        if let Some(found) = found {
            let (attr, good_for) = self.seen.by_name(found.node, &found.attr);
            return (attr, good_for, found.generation);
        }
        // The kernel makes no node of `.` and `..`, whatever their numbers say. Nor does it of a name with the number of the
        // root, which it lists all the same, and looks up when somebody asks for it; a name without a number programs skip.
        let own_name = entry.name == "." || entry.name == "..";
        let number = if own_name { entry.ino } else { NodeId::ROOT.0 };
        let attr = FileAttr {
            ino: INodeNo(number),
            kind: convert::file_type(entry.kind),
            ..convert::negative_entry()
        };
        (attr, FOREVER, 0)
    }
}
