//! The life cycle of snapshots, their records, and the supervision of their mounts.

pub mod types;

use std::collections::BTreeMap;
use std::path::Path;

pub use types::*;

/// All snapshots of one plyd. Every method blocks and may be called from any thread; asynchronous
/// callers go through `spawn_blocking`. What a method has acknowledged is durable.
pub struct Snapshotter {}

#[allow(
    unused_variables,
    clippy::todo,
    missing_docs,
    reason = "signatures that the first commit agrees on"
)]
impl Snapshotter {
    /// Reads the records below `root`, clears what a crash left, finds the mounts below `state` that
    /// still live.
    pub fn open(root: &Path, state: &Path, config: SnapshotterConfig) -> Result<Self> {
        todo!()
    }

    /// Makes an active snapshot on a committed parent. It is not mounted until `mount` or `mounts`.
    pub fn prepare(
        &self,
        owner: Owner,
        key: &str,
        parent: Option<&ParentRef>,
        labels: BTreeMap<String, String>,
    ) -> Result<SnapshotInfo> {
        todo!()
    }
    /// Makes a read-only snapshot.
    pub fn view(
        &self,
        owner: Owner,
        key: &str,
        parent: Option<&ParentRef>,
        labels: BTreeMap<String, String>,
    ) -> Result<SnapshotInfo> {
        todo!()
    }
    /// Flushes, unmounts, makes durable and turns the active snapshot `key` into the committed `name`.
    pub fn commit(
        &self,
        owner: Owner,
        name: &str,
        key: &str,
        labels: BTreeMap<String, String>,
    ) -> Result<SnapshotInfo> {
        todo!()
    }
    /// Deletes a snapshot that has no children; unmounts it first.
    pub fn remove(&self, owner: Owner, key: &str) -> Result<()> {
        todo!()
    }
    pub fn stat(&self, owner: Owner, key: &str) -> Result<SnapshotInfo> {
        todo!()
    }
    /// Snapshots of one owner, or of all, in order of creation.
    pub fn list(&self, owner: Option<Owner>) -> Result<Vec<SnapshotInfo>> {
        todo!()
    }
    pub fn set_labels(
        &self,
        owner: Owner,
        key: &str,
        labels: BTreeMap<String, String>,
    ) -> Result<SnapshotInfo> {
        todo!()
    }
    pub fn usage(&self, owner: Owner, key: &str) -> Result<Usage> {
        todo!()
    }
    /// Mounts the snapshot if it is not, or if its plyfs has died, and says where.
    pub fn mount(&self, owner: Owner, key: &str) -> Result<MountPoint> {
        todo!()
    }
    /// What a consumer has to mount: a bind of the above. Equal answers to equal calls.
    pub fn mounts(&self, owner: Owner, key: &str) -> Result<Vec<Mount>> {
        todo!()
    }
    pub fn unmount(&self, owner: Owner, key: &str) -> Result<()> {
        todo!()
    }
    /// How to open the snapshot's union in this process, for work on an active snapshot that is not
    /// mounted (unpacking a layer). The caller closes it before `mount`, `commit` or `remove`.
    pub fn union_config(&self, owner: Owner, key: &str) -> Result<crate::cow::UnionConfig> {
        todo!()
    }
}
