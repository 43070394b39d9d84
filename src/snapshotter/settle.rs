//! Making the upper of a snapshot say all by itself.

use std::fs;
use std::io;

use super::types::{Kind, Owner, Result, io_error, plyfs_error};
use super::{Found, Snapshotter, upper};
use crate::cow::{self, Union};

impl Snapshotter {
    /// Brings up all data that files of an active snapshot still have in the layers below, whether it is mounted or
    /// not; who uses it meanwhile goes on. What changes while this runs may lack data again afterwards.
    pub fn materialize(&self, owner: Owner, key: &str) -> Result<()> {
        self.locked(owner, key, |found| match found.record.kind {
            Kind::Active => self.complete(&found),
            Kind::View | Kind::Committed => Ok(()),
        })
    }

    /// As `materialize`, of an active snapshot that is locked.
    pub(super) fn complete(&self, found: &Found) -> Result<()> {
        let upper = self.data.join(&found.id).join("upper");
        let action = "bring up the data of files in";
        let unanswered = plyfs_error(action, &upper, &found.record.key);
        if self.mounts.complete(&found.id).map_err(unanswered)? {
            return Ok(());
        }
        let failed = |error| io_error(action, &upper)(error);
        let union = Union::open(self.union_of(found)?)
            .map_err(|error| failed(io::Error::other(error.to_string())))?;
        union
            .complete()
            .map_err(|error| failed(io::Error::from_raw_os_error(error.errno)))
    }

    fn has_partial(&self, found: &Found) -> Result<bool> {
        // While there is one, this keeps kernel overlayfs from the upper (`docs/chunks.md`).
        let incompat = self.data.join(&found.id).join("work/work/incompat");
        let there = incompat.try_exists();
        there.map_err(io_error("look for", &incompat))
    }

    /// Makes everything that was written to an active snapshot durable. It is locked and not mounted.
    pub(super) fn sync_upper(&self, found: &Found) -> Result<()> {
        let dir = self.data.join(&found.id).join("upper");
        let failed = |error| io_error("make durable", &dir)(error);
        if !self.has_partial(found)? {
            return upper::sync(&dir).map_err(failed);
        }
        // What the chunk maps say of it, too.
        let union = Union::open(self.union_of(found)?)
            .map_err(|error| failed(io::Error::other(error.to_string())))?;
        union
            .sync()
            .map_err(|error| failed(io::Error::from_raw_os_error(error.errno)))
    }

    /// Hard links of lower files that were copied up hang together by the work directory's index.
    fn has_link_index(&self, found: &Found) -> Result<bool> {
        let index = self.data.join(&found.id).join("work/index");
        match fs::read_dir(&index).map(|mut entries| entries.next()) {
            Ok(entry) => Ok(entry.is_some()),
            Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(false),
            Err(error) => Err(io_error("read", &index)(error)),
        }
    }

    /// Whether the upper needs its work directory to be read: for the links of a file that hang together by the index,
    /// or for the map of one that is copied up in part.
    pub(super) fn needs_work(&self, found: &Found) -> Result<bool> {
        Ok(self.has_link_index(found)? || self.has_partial(found)?)
    }

    /// Whether the upper does not say all by itself.
    pub(super) fn needs_settling(&self, found: &Found) -> Result<bool> {
        let config = self.union_of(found)?;
        let upper = self.data.join(&found.id).join("upper");
        let metacopies = cow::may_hold_metacopies(&upper, config.xattr_family)
            .map_err(io_error("look into", &upper))?;
        Ok(metacopies || self.has_link_index(found)?)
    }

    /// Makes links of the names in the index, for a layer has no index; then brings up the data of files
    /// whose attributes alone were changed, for it has no parents to rely on.
    pub(super) fn settle(&self, found: &Found) -> Result<()> {
        if !self.needs_settling(found)? {
            return Ok(());
        }
        let upper = self.data.join(&found.id).join("upper");
        let failed = |error: &dyn std::fmt::Display| {
            io_error("make a whole layer of", &upper)(io::Error::other(error.to_string()))
        };
        let union = Union::open(self.union_of(found)?).map_err(|error| failed(&error))?;
        union.settle_links().map_err(|error| failed(&error))?;
        union.complete().map_err(|error| failed(&error))?;
        drop(union);
        self.clear_link_index(found)
    }

    /// Removes the index, which counts as a link of every file in it: whoever sees a committed layer sees link counts
    /// that stay. All that it said is in the upper now, so an active snapshot that is not committed after all loses
    /// nothing.
    fn clear_link_index(&self, found: &Found) -> Result<()> {
        let index = self.data.join(&found.id).join("work/index");
        match fs::remove_dir_all(&index) {
            Err(error) if error.kind() != io::ErrorKind::NotFound => {
                Err(io_error("remove", &index)(error))
            }
            _ => Ok(()),
        }
    }
}
