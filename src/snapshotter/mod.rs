//! The life cycle of snapshots, their records, and the supervision of their mounts.
//!
//! A snapshot is known by its owner and a key. Active ones are written to, views are looked at,
//! committed ones are immutable and what the others build on. Below plyd's root:
//!
//! ```text
//! snapshots/records/ID.record   what is known of a snapshot; it exists if and only if this does
//! snapshots/data/ID/upper       what an active snapshot changes; kept of a committed one while copies of its mount are read
//! snapshots/data/ID/upper.new   the next upper of a snapshot that a layer is applied to
//! snapshots/data/ID/work        the union's scratch directory for it
//! snapshots/data/ID/empty       the only lower of a snapshot on nothing
//! snapshots/data/ID/mounted     the active snapshot is mounted, or was when its plyfs died
//! store/                        the packed layers of committed snapshots, and what was made of them
//! layers/LAYER                  the upper of a committed snapshot, of an earlier plyd or on such a layer
//! index/                        names to ids; can be deleted while plyd is not running
//! trash/                        trees on their way out
//! ```
//!
//! and below its state directory, which a reboot may clear:
//!
//! ```text
//! mounts/ID/root       where the snapshot is mounted, and what consumers bind
//! mounts/ID/ctl.sock   the control socket of the plyfs that serves it
//! mounts/ID/lowers     the lower directories, for that plyfs
//! mounts/ID/plyfs.log  what it has to say
//! trash/               what was written below a mount that had died, on its way out
//! ```
//!
//! What each change consists of, so that a crash at any point can be mended by the next `open`:
//!
//! - prepare: directories first, then the record. Left behind: a data directory that no record
//!   names, which is thrown away.
//! - apply: the layer is recorded in the store; a new upper, which is empty but for the root's attributes, takes the
//!   place of the empty one by one rename; the record is replaced by one that names the layer. Left behind: a layer that no
//!   snapshot has, which is removed, and the new upper, which goes with the snapshot or the next apply.
//! - commit: flush, unmount; what changed is made a packed layer, durable and recorded in the store; the record is
//!   replaced by one that names it; the upper is thrown away. Left behind: an active snapshot with its upper, and a layer that no
//!   snapshot has, which is removed; or the directories of a committed one, which are thrown away once no plyfs has
//!   them open. On a layer that is a directory: the upper becomes a layer by one rename before the record is replaced. Left
//!   behind: an active snapshot whose upper is a layer already, which is given back.
//! - remove: unmount; the record is removed; then the trees are thrown away. Left behind: trees that
//!   no record names.
//!
//! A record that cannot be read keeps its id taken: none of its trees is an orphan.

mod apply;
mod catalog;
mod chain;
mod commit;
mod diff;
mod export;
mod gone;
mod layers;
mod locks;
mod mounts;
mod packed;
mod queries;
mod recovery;
mod refresh;
mod settle;
mod space;
#[cfg(test)]
pub(in crate::snapshotter) mod tests;
pub mod types;
mod upper;
mod useful;

use std::collections::{BTreeMap, HashSet};
use std::fs;
use std::io;
use std::path::{Path, PathBuf};
use std::sync::Arc;

pub use apply::AppliedLayer;
use catalog::{Catalog, Found, SnapshotRecord};
pub use diff::{Change, ChangeKind};
pub use export::ExportedOverlay;
use locks::Locks;
use mounts::Mounts;
pub use packed::HeldLayer;
use packed::Packed;
use parking_lot::Mutex;
pub use refresh::{Stale, StaleReason};
pub use space::{Space, Taken};
pub use types::*;
use types::{io_error, plyfs_error};
use useful::Useful;

use crate::store::ingest::Settings;
use crate::store::layer::LayerStore;
use crate::store::trash::Trash;
use crate::store::{self, create_dir, sync_dir};

/// All snapshots of one plyd. Every method blocks and may be called from any thread; asynchronous
/// callers go through `spawn_blocking`. What a method has acknowledged is durable.
#[derive(Debug)]
pub struct Snapshotter {
    catalog: Arc<Catalog>,
    useful: Arc<Useful>,
    locks: Locks,
    layers: LayerStore,
    packed: Packed,
    packing: Settings,
    trash: Arc<Trash>,
    data: PathBuf,
    mounts: Arc<Mounts>,
    /// Ids of records that cannot be used of which the log has that what builds on them is not listed.
    hiding: Mutex<HashSet<String>>,
}

impl Snapshotter {
    /// Reads the records below `root`, clears what a crash left, finds the mounts below `state` that
    /// still live. Only one process may have a root open; see [`store::lock_root`]. Packed layers that no snapshot has stay until
    /// [`settle_records`](Self::settle_records).
    pub fn open(root: &Path, state: &Path, config: SnapshotterConfig) -> Result<Self> {
        let data = root.join("snapshots/data");
        create_dir(root, 0o700).map_err(io_error("make", root))?;
        create_dir(&data, 0o700).map_err(io_error("make", &data))?;
        let layers_dir = root.join("layers");
        let layers = LayerStore::open(&layers_dir).map_err(io_error("open", &layers_dir))?;
        let trash_dir = root.join("trash");
        let trash = Arc::new(Trash::open(&trash_dir).map_err(io_error("open", &trash_dir))?);
        let (catalog, all, damaged) = Catalog::open(root, config.index_prober.as_deref())?;
        let catalog = Arc::new(catalog);
        let mounts = Arc::new(Mounts::open(state, config.plyfs, config.verify)?);
        mounts.adopt(|id| {
            // Whoever works in the mount of a damaged record has done nothing wrong.
            damaged.iter().any(|damaged| damaged.id == id)
                || all
                    .iter()
                    .any(|found| found.id == id && found.record.kind != Kind::Committed)
        })?;
        if !damaged.is_empty() {
            catalog.log_damaged(&damaged);
        }
        recovery::mend(&all, &damaged, &data, &layers, &trash)?;
        let store = root.join("store");
        let packed = Packed::open(&store, (config.packing, config.verify), &all)?;
        let useful = Arc::new(Useful::new(Arc::clone(&catalog)));
        let chains = Arc::clone(&useful);
        packed.layers().set_chains(chains);
        Ok(Self {
            catalog,
            useful,
            locks: Locks::default(),
            layers,
            packed,
            packing: config.packing,
            trash,
            data,
            mounts,
            hiding: Mutex::default(),
        })
    }

    /// Brings the index to the disk and leaves every mount to the next process. The last call.
    pub fn close(&self) -> Result<()> {
        self.mounts.close();
        self.catalog.close()
    }

    /// Makes an active snapshot on a committed parent. It is not mounted until `mount` or `mounts`.
    pub fn prepare(
        &self,
        owner: Owner,
        key: &str,
        parent: Option<&ParentRef>,
        labels: BTreeMap<String, String>,
    ) -> Result<SnapshotInfo> {
        self.make(Kind::Active, owner, key, parent, labels)
    }

    /// Makes a read-only snapshot.
    pub fn view(
        &self,
        owner: Owner,
        key: &str,
        parent: Option<&ParentRef>,
        labels: BTreeMap<String, String>,
    ) -> Result<SnapshotInfo> {
        self.make(Kind::View, owner, key, parent, labels)
    }

    fn make(
        &self,
        kind: Kind,
        owner: Owner,
        key: &str,
        parent: Option<&ParentRef>,
        labels: BTreeMap<String, String>,
    ) -> Result<SnapshotInfo> {
        if key.is_empty() {
            return Err(Error::EmptyKey);
        }
        self.catalog.check_free(owner, key)?;
        let parent = parent
            .map(|parent| self.resolve_parent(parent))
            .transpose()?;
        let record = SnapshotRecord {
            owner,
            key: key.to_owned(),
            kind,
            parent: parent.as_ref().map(|parent| parent.id.clone()),
            labels,
            created: 0,
            updated: 0,
            layer: None,
            packed: None,
            usage: None,
        };
        let id = catalog::new_id();
        let dir = self.data.join(&id);
        let made = self
            .make_directories(&dir, kind, parent.as_ref())
            .and_then(|()| self.catalog.insert(&id, record));
        match made {
            Ok(found) => self.describe(found),
            Err(error) => {
                self.throw_away(&dir);
                Err(error)
            }
        }
    }

    fn resolve_parent(&self, parent: &ParentRef) -> Result<Found> {
        let ParentRef { owner, key } = parent;
        let Some(found) = self.catalog.find(*owner, key)? else {
            self.catalog.check_missed(*owner, key)?;
            if *owner == Owner::Image {
                self.catalog.check_layer_is_not_gone(key)?;
            }
            return Err(Error::NoParent {
                owner: *owner,
                key: key.clone(),
            });
        };
        if found.record.kind != Kind::Committed {
            return Err(Error::ParentNotCommitted {
                key: key.clone(),
                kind: found.record.kind,
            });
        }
        self.take_in(&found.id)?;
        Ok(found)
    }

    fn make_directories(&self, dir: &Path, kind: Kind, parent: Option<&Found>) -> Result<()> {
        fs::create_dir(dir).map_err(io_error("make", dir))?;
        let below = match parent {
            Some(parent) if self.has_layers(parent)? => Some(parent),
            _ => None,
        };
        let empty = dir.join("empty");
        if below.is_none() {
            upper::make(&empty, None).map_err(io_error("make", &empty))?;
        }
        if kind == Kind::Active {
            let root = match below {
                Some(parent) => self.root_of(parent)?,
                None => Some(upper::Root::of_directory(&empty)?),
            };
            let upper = dir.join("upper");
            upper::make(&upper, root.as_ref()).map_err(io_error("make", &upper))?;
            let work = dir.join("work");
            fs::create_dir(&work).map_err(io_error("make", &work))?;
        }
        sync_dir(dir)
            .and_then(|()| sync_dir(&self.data))
            .map_err(io_error("make durable", dir))
    }

    /// Deletes a snapshot that has no children; unmounts it first.
    pub fn remove(&self, owner: Owner, key: &str) -> Result<()> {
        // Something that was put back may build on it, or have its layer.
        self.take_strays()?;
        self.locked(owner, key, |found| {
            self.catalog.check_childless(&found)?;
            self.mounts.unmount(&found.id)?;
            let layer = self.catalog.remove(&found)?;
            let dir = self.data.join(&found.id);
            match found.record.kind {
                Kind::Committed => commit::discard(&dir, &self.trash),
                Kind::Active | Kind::View => self.throw_away(&dir),
            }
            if let Some(layer) = layer {
                self.packed.release(layer);
            }
            if let Some(layer) = &found.record.layer
                && let Err(error) = self.layers.remove(layer, &self.trash)
            {
                tracing::error!(layer = layer.0, %error, "a layer stays until plyd starts again");
            }
            Ok(())
        })
    }

    /// Replaces the labels.
    pub fn set_labels(
        &self,
        owner: Owner,
        key: &str,
        labels: BTreeMap<String, String>,
    ) -> Result<SnapshotInfo> {
        self.update_labels(owner, key, |old| *old = labels)
    }

    /// Changes the labels while nobody else does.
    pub fn update_labels(
        &self,
        owner: Owner,
        key: &str,
        change: impl FnOnce(&mut BTreeMap<String, String>),
    ) -> Result<SnapshotInfo> {
        self.locked(owner, key, |found| {
            let updated = self
                .catalog
                .update(&found, |record| change(&mut record.labels))?;
            self.describe(updated)
        })
    }

    /// Waits until everything removed so far has left the disk.
    pub fn wait_until_deleted(&self) {
        self.trash.wait_until_empty();
        self.packed.wait_until_collected();
    }

    /// What the snapshot takes for itself alone: as it was at commit, or what an active one has now.
    pub fn usage(&self, owner: Owner, key: &str) -> Result<Usage> {
        let found = self.catalog.resolve(owner, key)?;
        match (found.record.usage, found.record.kind) {
            (Some(usage), _) => Ok(usage),
            (None, Kind::Active) => {
                let upper = self.data.join(&found.id).join("upper");
                let flushed = self.mounts.flush(&found.id);
                flushed.map_err(plyfs_error("flush the mount of", &upper, key))?;
                Ok(usage_of(&upper)? + self.usage_of_packed(&found))
            }
            (None, _) => Ok(Usage::default()),
        }
    }

    /// Mounts the snapshot if it is not, or if its plyfs has died, and says where.
    pub fn mount(&self, owner: Owner, key: &str) -> Result<MountPoint> {
        self.locked(owner, key, |found| self.mount_found(&found))
    }

    /// What a consumer has to mount: a bind of the above. Equal answers to equal calls.
    pub fn mounts(&self, owner: Owner, key: &str) -> Result<Vec<Mount>> {
        self.locked(owner, key, |found| {
            let point = self.mount_found(&found)?;
            let access = match found.record.kind {
                Kind::Active => "rw",
                _ => "ro",
            };
            Ok(vec![Mount {
                kind: "bind".to_owned(),
                source: point.path.to_string_lossy().into_owned(),
                options: vec!["rbind".to_owned(), access.to_owned()],
            }])
        })
    }

    fn mount_found(&self, found: &Found) -> Result<MountPoint> {
        if found.record.kind == Kind::Committed {
            return Err(Error::NotMountable {
                key: found.record.key.clone(),
            });
        }
        if found.record.kind == Kind::Active {
            self.mark_mounted(found)?;
        }
        self.mounts.mount(&found.id, &self.union_of(found)?)
    }

    /// The mark is on the disk before anybody can write: a power cut that took it, and acknowledged
    /// writes with it, would let the rest pass for a whole layer.
    fn mark_mounted(&self, found: &Found) -> Result<()> {
        let mark = self.mounted_mark(found);
        if self.mounts.point(&found.id).is_some() && mark.exists() {
            return Ok(());
        }
        fs::File::create(&mark)
            .and_then(|_| sync_dir(&self.data.join(&found.id)))
            .map_err(io_error("make", &mark))
    }

    /// Flushes and unmounts. Fails if the last plyfs died: the kernel has acknowledged writes to the
    /// mount's users that it never got.
    fn end_mount(
        &self,
        found: &Found,
        end: impl FnOnce(&Mounts, &str) -> Result<()>,
    ) -> Result<()> {
        let mark = self.mounted_mark(found);
        let flushed = self.mounts.flush(&found.id).map_err(plyfs_error(
            "flush the mount of",
            &self.data.join(&found.id),
            &found.record.key,
        ))?;
        if !flushed && mark.exists() {
            return Err(Error::WritesLost {
                key: found.record.key.clone(),
            });
        }
        end(&self.mounts, &found.id)?;
        if flushed && found.record.kind == Kind::Active {
            // Somebody may have written until the mount went, and without the mark it counts as whole.
            self.sync_upper(found)?;
        }
        match fs::remove_file(&mark) {
            Err(error) if error.kind() != io::ErrorKind::NotFound => {
                Err(io_error("remove", &mark)(error))
            }
            _ => Ok(()),
        }
    }

    fn mounted_mark(&self, found: &Found) -> PathBuf {
        self.data.join(&found.id).join("mounted")
    }

    /// Flushes and ends the mount, if there is one. Whatever still uses it gets errors.
    pub fn unmount(&self, owner: Owner, key: &str) -> Result<()> {
        self.locked(owner, key, |found| {
            let ended = self.end_mount(&found, Mounts::unmount);
            if ended.is_err() {
                self.mounts.unmount(&found.id)?;
            }
            ended
        })
    }

    /// As a listing has it.
    fn describe(&self, found: Found) -> Result<SnapshotInfo> {
        let ancestors = self.catalog.ancestors_as_listed(&found.record)?;
        let ancestors: Vec<&Found> = ancestors.iter().collect();
        Ok(self.info(found, &ancestors))
    }

    fn info(&self, found: Found, ancestors: &[&Found]) -> SnapshotInfo {
        let layer_dirs = self.lowers_in(&found, ancestors);
        let packed_layers = chain::packed_in(&found, ancestors);
        let upper_dir =
            (found.record.kind == Kind::Active).then(|| self.data.join(&found.id).join("upper"));
        let mount = self.mounts.point(&found.id);
        let lowest = ancestors.last().copied().unwrap_or(&found);
        let is_cut = lowest.record.parent.is_some();
        let Found { id, record } = found;
        SnapshotInfo {
            id,
            owner: record.owner,
            key: record.key,
            parent: ancestors.first().map(|parent| ParentRef {
                owner: parent.record.owner,
                key: parent.record.key.clone(),
            }),
            is_cut,
            kind: record.kind,
            labels: record.labels,
            created: catalog::time(record.created),
            updated: catalog::time(record.updated),
            mount,
            upper_dir,
            layer_dirs,
            packed_layers,
        }
    }

    /// Runs `work` on the snapshot while nobody else changes it.
    fn locked<T>(
        &self,
        owner: Owner,
        key: &str,
        work: impl FnOnce(Found) -> Result<T>,
    ) -> Result<T> {
        let id = self.catalog.resolve(owner, key)?.id;
        self.take_in(&id)?;
        self.locks.with(&id, || work(self.still(owner, key, &id)?))
    }

    /// As `locked`, of two snapshots, which may be one.
    fn locked_both<T>(
        &self,
        owner: Owner,
        one: &str,
        other: &str,
        work: impl FnOnce(Found, Found) -> Result<T>,
    ) -> Result<T> {
        let of_one = self.catalog.resolve(owner, one)?.id;
        let of_other = self.catalog.resolve(owner, other)?.id;
        let mut order = [&of_one, &of_other];
        // Whoever else wants both waits for them in this order.
        order.sort();
        let work = || {
            work(
                self.still(owner, one, &of_one)?,
                self.still(owner, other, &of_other)?,
            )
        };
        let [first, second] = order;
        self.locks.with(first, || match first == second {
            true => work(),
            false => self.locks.with(second, work),
        })
    }

    /// The snapshot of the key, which had that id: it may have been committed, and so renamed, or removed meanwhile.
    fn still(&self, owner: Owner, key: &str, id: &str) -> Result<Found> {
        let found = self.catalog.resolve(owner, key)?;
        match found.id == id {
            true => Ok(found),
            false => Err(Error::NotFound {
                owner,
                key: key.to_owned(),
            }),
        }
    }

    fn expect_active(&self, found: &Found) -> Result<()> {
        if found.record.kind == Kind::Active {
            return Ok(());
        }
        Err(Error::NotActive {
            key: found.record.key.clone(),
            kind: found.record.kind,
        })
    }

    fn throw_away(&self, dir: &Path) {
        if let Err(error) = self.trash.put(dir) {
            tracing::error!(dir = %dir.display(), %error, "stays until plyd starts again");
        }
    }
}

fn usage_of(upper: &Path) -> Result<Usage> {
    let sum = store::usage(upper).map_err(io_error("add up", upper))?;
    Ok(Usage {
        size: sum.bytes,
        inodes: sum.inodes,
    })
}
