//! The words of the snapshotter's interface.

use std::collections::BTreeMap;
use std::path::PathBuf;
use std::time::SystemTime;

/// Who made a snapshot, and who alone may resolve or remove it through its own service.
#[derive(
    Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord, serde::Serialize, serde::Deserialize,
)]
#[serde(rename_all = "lowercase")]
pub enum Owner {
    /// Made through `containerd.services.snapshots.v1`.
    Containerd,
    /// Made by `snapctl snapshot`.
    Snapctl,
    /// A layer chain of an image that plyd loaded; its key is the chain id.
    Image,
    /// The root of a container that plyd runs; its key is the container's id.
    Container,
}

/// A committed snapshot to build on: a key is unique within its owner only.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ParentRef {
    /// Whose.
    pub owner: Owner,
    /// Which.
    pub key: String,
}

/// The state of a snapshot.
#[derive(Clone, Copy, Debug, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Kind {
    /// Read-only look at a committed snapshot.
    View,
    /// Writable.
    Active,
    /// Immutable; may be a parent.
    Committed,
}

/// What is known of a snapshot.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct SnapshotInfo {
    /// Internal id, never reused.
    pub id: String,
    /// Owner.
    pub owner: Owner,
    /// Name within the owner.
    pub key: String,
    /// Parent.
    pub parent: Option<ParentRef>,
    /// State.
    pub kind: Kind,
    /// Labels.
    pub labels: BTreeMap<String, String>,
    /// When it was made.
    pub created: SystemTime,
    /// When its labels or state changed last.
    pub updated: SystemTime,
    /// The live mount, if there is one.
    pub mount: Option<MountPoint>,
    /// Host directory of the upper while layers are directories; for humans and tests.
    pub upper_dir: Option<PathBuf>,
    /// Host directories of the layers, the topmost first; for humans and tests.
    pub layer_dirs: Vec<PathBuf>,
}

/// A live mount of a snapshot.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct MountPoint {
    /// Where.
    pub path: PathBuf,
    /// Process id of the plyfs that serves it.
    pub pid: u32,
}

/// What mount(2) is to be told; containerd's words.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Mount {
    /// Always `bind`.
    pub kind: String,
    /// Source.
    pub source: String,
    /// Options.
    pub options: Vec<String>,
}

/// What a snapshot takes for itself alone.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
pub struct Usage {
    /// Bytes allocated on disk.
    pub size: u64,
    /// Inodes.
    pub inodes: u64,
}

/// Settings.
#[derive(Clone, Debug, Default)]
pub struct SnapshotterConfig {
    /// The plyfs program; empty: beside the running executable, then on PATH.
    pub plyfs: Option<PathBuf>,
}

/// Why an operation on a snapshot failed. Mapped once to gRPC codes in `grpc`.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// No such snapshot.
    #[error(
        "there is no snapshot {key:?} of {owner:?}; `snapctl snapshot ls` names those that exist"
    )]
    NotFound {
        /// Owner.
        owner: Owner,
        /// Key.
        key: String,
    },
}

/// Result of an operation on a snapshot.
pub type Result<T, E = Error> = std::result::Result<T, E>;
