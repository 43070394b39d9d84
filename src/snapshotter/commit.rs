//! From an active snapshot to a committed one.
//!
//! What the snapshot changes is made a packed layer, entry by entry. The layer is whole and durable, in its place, before the
//! one rename that makes the snapshot committed, and until then the upper is what it was: whatever fails or is killed
//! before leaves an active snapshot, and at most a layer that no snapshot has, which goes. Only then is the upper thrown
//! away; as long as copies of the mount are read that somebody else holds, it stays where it is.
//!
//! Packed layers lie on packed ones alone. On a layer that an earlier plyd has left as a directory the upper becomes
//! a directory, too, by a rename: to pack the whole chain first would take time that no caller of a commit expects.

use std::collections::BTreeMap;
use std::fs::File;
use std::io;
use std::os::fd::AsFd;
use std::path::Path;
use std::sync::Arc;

use nix::errno::Errno;

use super::catalog::{Found, SnapshotRecord};
use super::diff::{self, Directories};
use super::packed::Imported;
use super::types::*;
use super::{Snapshotter, upper, usage_of};
use crate::cow::Union;
use crate::store::layer::LayerId;
use crate::store::trash::Trash;
use crate::sys::fs;

impl Snapshotter {
    /// Flushes, unmounts, makes durable and turns the active snapshot `key` into the committed `name`.
    pub fn commit(
        &self,
        owner: Owner,
        name: &str,
        key: &str,
        labels: BTreeMap<String, String>,
    ) -> Result<SnapshotInfo> {
        if name.is_empty() {
            return Err(Error::EmptyKey);
        }
        let committed = self.locked(owner, key, |found| {
            self.expect_active(&found)?;
            if name != key {
                self.catalog.check_free(owner, name)?;
            }
            let committed = match self.is_on_directories(&found)? {
                true => self.commit_directory(&found, name, labels),
                false => self.commit_packed(&found, name, labels),
            };
            if committed.is_err() {
                self.mounts.end_sealed(&found.id, key);
            }
            self.describe(committed?)
        });
        // It may have had contents that were known, and damaged.
        self.refresh_mounts_and_log();
        committed
    }

    /// Of a snapshot on packed layers, or on nothing.
    fn commit_packed(
        &self,
        found: &Found,
        name: &str,
        labels: BTreeMap<String, String>,
    ) -> Result<Found> {
        self.end_mount(found, |mounts, id| {
            mounts.seal(id, &found.record.key, || {
                self.needs_work(found).map(|needs| !needs)
            })
        })?;
        let committed = self.make_committed(found, name, labels)?;
        discard(&self.data.join(&found.id), &self.trash);
        Ok(committed)
    }

    /// Of a snapshot that is not mounted any more: what it has is a layer, and then its record says so.
    fn make_committed(
        &self,
        found: &Found,
        name: &str,
        labels: BTreeMap<String, String>,
    ) -> Result<Found> {
        let untouched = self.untouched(found)?;
        let (made, layer, usage) = match untouched {
            Some(applied) => (None, applied, self.usage_of_packed(found)),
            None => {
                let made = self.pack(found)?;
                let (layer, usage) = (made.name, made.usage);
                (Some(made), layer, usage)
            }
        };
        let updated = self.catalog.update(found, |record| {
            record.key = name.to_owned();
            record.kind = Kind::Committed;
            record.labels = labels;
            record.packed = Some(layer);
            record.usage = Some(usage);
        });
        // A record that was replaced, but could not be made durable, needs its layer all the same.
        let is_active = |record: Option<SnapshotRecord>| {
            record.is_some_and(|record| record.kind == Kind::Active)
        };
        if let Some(made) = made
            && (updated.is_ok() || !self.catalog.get(&found.id).is_ok_and(is_active))
        {
            made.used();
            if let Some(applied) = found.record.packed {
                self.packed.release(applied);
            }
        }
        if untouched.is_some() && updated.is_ok() {
            // A layer of an image that is unpacked, and the view of those below it was mounted for that alone.
            self.packed.collect_useless_views();
        }
        updated
    }

    /// Makes a layer of what the snapshot, which is not mounted, changes against its parent.
    fn pack(&self, found: &Found) -> Result<Imported<'_>> {
        let own = self.data.join(&found.id).join("upper");
        let below = self.below(found)?;
        let view = below.view.clone();
        // Where the work directory is not needed, it may be in the hands of a plyfs whose mount is still read.
        let new = match self.needs_work(found)? {
            true => {
                let new = Union::open(self.union_of(found)?)?;
                new.settle_links()?;
                new
            }
            false => Union::open(diff::with_own(&own, &below).union())?,
        };
        let below_own = self.diff_packed(found)?;
        let changes = diff::changes(&own, &new, below, below_own, Directories::Own)?;
        let ancestors = self.catalog.ancestors(&found.record)?;
        let chain = ancestors.iter().filter_map(|found| found.record.packed);
        self.packed.make(chain.collect(), |layer| {
            diff::pack::write(&changes, &new, view.as_deref(), layer)
        })
    }

    /// Of a snapshot on a layer that is a directory.
    fn commit_directory(
        &self,
        found: &Found,
        name: &str,
        labels: BTreeMap<String, String>,
    ) -> Result<Found> {
        let dir = self.data.join(&found.id);
        let upper = dir.join("upper");
        // Settling needs the work directory for itself: then no copy of the mount can go on.
        self.end_mount(found, |mounts, id| {
            mounts.seal(id, &found.record.key, || {
                self.needs_settling(found).map(|needs| !needs)
            })
        })?;
        self.settle(found)?;
        upper::sync(&upper).map_err(io_error("make durable", &upper))?;
        let usage = usage_of(&upper)? + self.usage_of_packed(found);
        let layer = LayerId(found.id.clone());
        self.layers
            .adopt(&layer, &upper)
            .map_err(io_error("commit", &upper))?;
        let committed = self.catalog.update(found, |record| {
            record.key = name.to_owned();
            record.kind = Kind::Committed;
            record.labels = labels;
            record.layer = Some(layer.clone());
            record.usage = Some(usage);
        });
        match committed {
            Ok(committed) => {
                self.throw_away(&dir);
                Ok(committed)
            }
            Err(error) => {
                // Whether the record was replaced before it failed decides the next `open`.
                if let Ok(Some(_)) = self.catalog.find(found.record.owner, &found.record.key)
                    && let Err(error) = self.layers.give_back(&layer, &upper)
                {
                    tracing::error!(snapshot = found.record.key, %error, "cannot undo a failed commit; restart plyd");
                }
                Err(error)
            }
        }
    }
}

/// Throws the directories of a snapshot away that has no upper any more; later, if a plyfs still has them in use for
/// those who read what was mounted.
pub(super) fn discard(dir: &Path, trash: &Arc<Trash>) {
    let thrown = match in_use(&dir.join("work")) {
        Ok(Some(work)) => {
            let (dir, trash) = (dir.to_owned(), Arc::clone(trash));
            std::thread::Builder::new()
                .name("discard".to_owned())
                .spawn(move || {
                    if let Err(error) = wait_and_discard(&work, &dir, &trash) {
                        tracing::error!(dir = %dir.display(), %error, "stays until plyd starts again");
                    }
                })
                .map(drop)
        }
        Ok(None) => trash.put(dir),
        Err(error) => Err(error),
    };
    if let Err(error) = thrown {
        tracing::error!(dir = %dir.display(), %error, "stays until plyd starts again");
    }
}

/// The work directory, if a union has it open.
fn in_use(work: &Path) -> io::Result<Option<File>> {
    let work = match File::open(work) {
        // Nor is it if a power cut has made something else of what it was to lie in.
        Err(error)
            if matches!(
                error.kind(),
                io::ErrorKind::NotFound | io::ErrorKind::NotADirectory
            ) =>
        {
            return Ok(None);
        }
        opened => opened?,
    };
    match fs::try_lock(work.as_fd()) {
        Ok(()) => Ok(None),
        Err(Errno::EWOULDBLOCK) => Ok(Some(work)),
        Err(errno) => Err(errno.into()),
    }
}

fn wait_and_discard(work: &File, dir: &Path, trash: &Trash) -> io::Result<()> {
    fs::lock(work.as_fd())?;
    trash.put(dir)
}

#[cfg(test)]
mod tests;
