//! Questions about snapshots.

use std::collections::{BTreeMap, HashMap};
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use super::Snapshotter;
use super::catalog::Found;
use super::types::*;
use crate::cow::Damage;
use crate::store::LayerName;
use crate::store::view::HeldDamage;

/// How long all mounts together may take to tell of damage.
const PATIENCE: Duration = Duration::from_secs(2);

impl Snapshotter {
    /// Where the snapshot's mount is to be seen beside its own place.
    pub fn mounted_at(&self, owner: Owner, key: &str) -> Result<Vec<PathBuf>> {
        self.mounts.places(&self.catalog.resolve(owner, key)?.id)
    }

    /// The snapshot of `owner` whose mount is at `path`, as [`mounts`](Self::mounts) says it. Fails if a record below it is gone.
    pub fn mounted_from(&self, owner: Owner, path: &Path) -> Result<Option<SnapshotInfo>> {
        let Some(id) = self.mounts.id_at(path) else {
            return Ok(None);
        };
        match self.catalog.get(id)? {
            Some(record) if record.owner == owner => {
                let ancestors = self.catalog.ancestors(&record)?;
                let id = id.to_owned();
                let ancestors: Vec<&Found> = ancestors.iter().collect();
                Ok(Some(self.info(Found { id, record }, &ancestors)))
            }
            _ => Ok(None),
        }
    }

    /// How many snapshots there are, also such as build on one of which the record cannot be read. No record is read.
    pub fn count(&self) -> usize {
        self.catalog.count()
    }

    /// The ids of the snapshots that are mounted.
    pub fn mounted(&self) -> Vec<String> {
        self.mounts.ids()
    }

    /// What of packed layers the mounts of these snapshots could not use when they last read it. One that does not answer soon is
    /// left out.
    pub fn damage(&self, ids: &[String]) -> Vec<Damage> {
        let deadline = Instant::now() + PATIENCE;
        let told = ids.iter();
        told.filter_map(|id| self.mounts.damage(id, deadline))
            .collect()
    }

    /// Whether the snapshot is mounted, and what serves it lives. Of all records only its own has to be known, if that.
    pub fn is_served(&self, owner: Owner, key: &str) -> Result<bool> {
        let id = self.catalog.id_of(owner, key)?;
        let id = id.ok_or_else(|| Error::NotFound {
            owner,
            key: key.to_owned(),
        })?;
        Ok(self.mounts.point(&id).is_some())
    }

    /// Whether the process of a mount has the merged view at `path` open, and not another one that has taken its place. Where that
    /// cannot be told, it may.
    pub fn reads_view(&self, mount: &MountPoint, path: &Path) -> bool {
        let held = self.packed_layers().views_held_by(mount.pid);
        held.map_or_else(
            |error| {
                let pid = mount.pid;
                tracing::warn!(pid, %error, "what a plyfs has open cannot be told");
                true
            },
            |held| held.iter().any(|view| view.is_at(path)),
        )
    }

    /// How the merged view is damaged that the mount of a snapshot reads, if it is mounted and that is damaged. Reads all of it.
    pub fn view_damage(&self, owner: Owner, key: &str) -> Result<Option<HeldDamage>> {
        let id = self.catalog.id_of(owner, key)?;
        let Some(mount) = id.and_then(|id| self.mounts.point(&id)) else {
            return Ok(None);
        };
        let layers = self.packed_layers();
        for view in layers.views_held_by(mount.pid)? {
            if let Some(damage) = layers.damage_of_held(&view)? {
                return Ok(Some(damage));
            }
        }
        Ok(None)
    }

    /// How many mounts have ended that could not read something of packed layers, since plyd was started or such layers were
    /// last mended.
    pub fn damaged_and_ended(&self) -> u64 {
        self.mounts.damaged_and_ended()
    }

    /// How many [`damaged_records`](Self::damaged_records) there are; of records only what has changed is read.
    pub fn count_damaged_records(&self) -> Result<usize> {
        self.catalog.count_damaged()
    }

    /// Records that cannot be used now, or are gone though their snapshots are not.
    pub fn damaged_records(&self) -> Result<Vec<UnusableRecord>> {
        self.catalog.damaged()
    }

    /// Writes records again that cannot be used, or are gone, and of which all is known; says whose they are.
    pub fn mend_records(&self) -> Result<Vec<ParentRef>> {
        self.catalog.rewrite()
    }

    /// Owners and keys of the snapshots whose content each packed layer is.
    pub fn users_of_layers(&self) -> Result<HashMap<LayerName, Vec<ParentRef>>> {
        let mut users: HashMap<LayerName, Vec<ParentRef>> = HashMap::new();
        for Found { record, .. } in self.catalog.all()? {
            if let Some(layer) = record.packed {
                users.entry(layer).or_default().push(ParentRef {
                    owner: record.owner,
                    key: record.key,
                });
            }
        }
        Ok(users)
    }

    /// What is known of one snapshot, as [`list`](Self::list) has it.
    pub fn stat(&self, owner: Owner, key: &str) -> Result<SnapshotInfo> {
        self.describe(self.catalog.resolve(owner, key)?)
    }

    /// Snapshots of one owner, or of all, in order of creation. Those that build on one whose record is damaged are left out, and the
    /// log says so once for each such record. What builds on one whose record was gone when plyd started has no parent here.
    pub fn list(&self, owner: Option<Owner>) -> Result<Vec<SnapshotInfo>> {
        Ok(self.list_and_unusable(owner)?.0)
    }

    /// As [`list`](Self::list), and how many records of snapshots, of any owner, cannot be used.
    pub fn list_and_unusable(&self, owner: Option<Owner>) -> Result<(Vec<SnapshotInfo>, usize)> {
        let (all, unusable) = self.catalog.all_and_unusable()?;
        Ok((self.infos(&all, owner), unusable))
    }

    /// Those of `all` that [`list`](Self::list) answers; some may have been removed since these were read.
    pub(super) fn infos(&self, all: &[Found], owner: Option<Owner>) -> Vec<SnapshotInfo> {
        let given_up = self.catalog.given_up();
        let by_id: HashMap<&str, &Found> =
            all.iter().map(|found| (found.id.as_str(), found)).collect();
        let wanted = |found: &&Found| owner.is_none_or(|owner| owner == found.record.owner);
        let mut infos = Vec::with_capacity(all.len());
        let mut hidden: BTreeMap<&str, Vec<&str>> = BTreeMap::new();
        for found in all.iter().filter(wanted) {
            // Parents are older than their children, so the steps are fewer than the snapshots.
            let next = |found: &&Found| {
                let parent = found.record.parent.as_deref()?;
                by_id.get(parent).copied()
            };
            let ancestors: Vec<&Found> = std::iter::successors(next(&found), next)
                .take(all.len())
                .collect();
            let root = ancestors.last().copied().unwrap_or(found);
            match &root.record.parent {
                // What builds on one that is gone for good has to be seen to be removed.
                Some(missing) if !given_up.contains(missing) => {
                    hidden.entry(missing).or_default().push(&found.record.key);
                }
                _ => infos.push(self.info(found.clone(), &ancestors)),
            }
        }
        self.log_hidden(&by_id, &hidden);
        infos
    }

    /// Says in the log what was left out of a listing, by the records that it builds on, unless it has been said since these were last
    /// found sound.
    fn log_hidden(&self, sound: &HashMap<&str, &Found>, hidden: &BTreeMap<&str, Vec<&str>>) {
        let mut hiding = self.hiding.lock();
        hiding.retain(|id| !sound.contains_key(&**id));
        for (id, keys) in hidden {
            // Otherwise all of it was removed meanwhile.
            if !hiding.contains(*id) && self.catalog.is_unusable(id) {
                hiding.insert((*id).to_owned());
                tracing::warn!(
                    record = id,
                    snapshot = keys.first(),
                    "left out of listings, as all that builds on the same record, for that cannot be used: `snapctl system verify` names it"
                );
            }
        }
    }

    /// Whether `owner` has a committed snapshot on `parent`, or on nothing, whose labels are `wanted`. Only the
    /// records of what builds on that parent are read.
    pub fn has_committed_on(
        &self,
        owner: Owner,
        parent: Option<&ParentRef>,
        wanted: impl Fn(&BTreeMap<String, String>) -> bool,
    ) -> Result<bool> {
        let parent = match parent {
            None => None,
            Some(parent) => match self.catalog.find(parent.owner, &parent.key)? {
                Some(found) => Some(found.id),
                None => return Ok(false),
            },
        };
        for id in self.catalog.children(parent.as_deref()) {
            match self.catalog.get(&id) {
                Ok(Some(record)) => {
                    let fits = record.owner == owner && record.kind == Kind::Committed;
                    if fits && wanted(&record.labels) {
                        return Ok(true);
                    }
                }
                // Removed meanwhile.
                Ok(None) => {}
                // It stands for itself alone; nobody else's layers have to wait for its repair.
                Err(error) => tracing::error!(id, %error, "passed over"),
            }
        }
        Ok(false)
    }
}
