//! The words of the snapshotter's interface.

use std::collections::BTreeMap;
use std::fmt;
use std::io;
use std::path::{Path, PathBuf};
use std::time::SystemTime;

use crate::cow;
use crate::store::ingest::Settings;
use crate::store::record::{self, Damaged};
use crate::store::view::Verify;
use crate::store::{self, LayerName, index};
use crate::sys::fuse_mount;

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

/// A record of a snapshot that cannot be used, or is gone though the snapshot is not.
#[derive(Clone, Debug)]
pub struct UnusableRecord {
    /// What is wrong with it, and what to do.
    pub damaged: Damaged,
    /// Whose it is, if that is known or the index of names can tell.
    pub of: Option<ParentRef>,
    /// What is known to build on it, also by way of others, in order of creation.
    pub on_top: Vec<ParentRef>,
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
    /// The record of something below it is gone: neither that nor the layers from there on are told.
    pub is_cut: bool,
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
    /// Host directory of the upper; for humans and tests.
    pub upper_dir: Option<PathBuf>,
    /// Host directories of those layers that are directories, the topmost first; for humans and tests.
    pub layer_dirs: Vec<PathBuf>,
    /// The packed layers, which lie below the directories, the topmost first.
    pub packed_layers: Vec<LayerName>,
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
    /// A program that answers [`store::index::PROBE_ARGUMENT`](crate::store::index::PROBE_ARGUMENT):
    /// plyd. Without one the index is made anew at each open.
    pub index_prober: Option<PathBuf>,
    /// How layers are packed.
    pub packing: Settings,
    /// When contents of packed layers are compared with their names.
    pub verify: Verify,
}

impl std::ops::Add for Usage {
    type Output = Self;

    fn add(self, other: Self) -> Self {
        Self {
            size: self.size + other.size,
            inodes: self.inodes + other.inodes,
        }
    }
}

impl Owner {
    /// Every owner.
    pub const ALL: [Self; 4] = [
        Self::Containerd,
        Self::Snapctl,
        Self::Image,
        Self::Container,
    ];

    /// The word that records, the API and messages use.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Containerd => "containerd",
            Self::Snapctl => "snapctl",
            Self::Image => "image",
            Self::Container => "container",
        }
    }
}

impl fmt::Display for Owner {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.as_str())
    }
}

impl fmt::Display for Kind {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::View => "view",
            Self::Active => "active",
            Self::Committed => "committed",
        })
    }
}

/// Why an operation on a snapshot failed. Mapped once to gRPC codes in `grpc`.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// No such snapshot.
    #[error(
        "there is no snapshot {key:?} of {owner}; `snapctl snapshot ls` names those that exist"
    )]
    NotFound {
        /// Owner.
        owner: Owner,
        /// Key.
        key: String,
    },
    /// The key is taken.
    #[error("a snapshot {key:?} of {owner} exists already; remove it first or choose another key")]
    AlreadyExists {
        /// Owner.
        owner: Owner,
        /// Key.
        key: String,
    },
    /// No such parent.
    #[error("there is no snapshot {key:?} of {owner} to be the parent")]
    NoParent {
        /// Owner.
        owner: Owner,
        /// Key.
        key: String,
    },
    /// Only committed snapshots can be parents.
    #[error("the snapshot {key:?} cannot be a parent, for it is {kind}; commit it first")]
    ParentNotCommitted {
        /// Key.
        key: String,
        /// What it is.
        kind: Kind,
    },
    /// The operation wants an active snapshot.
    #[error("the snapshot {key:?} is {kind}, and this needs an active one; prepare one on it")]
    NotActive {
        /// Key.
        key: String,
        /// What it is.
        kind: Kind,
    },
    /// A committed snapshot is not mounted as it is.
    #[error(
        "the snapshot {key:?} is committed and has no mount of its own; prepare a snapshot or a view on it"
    )]
    NotMountable {
        /// Key.
        key: String,
    },
    /// Its plyfs died with writes that had not reached it.
    #[error(
        "the plyfs of snapshot {key:?} died, and what was written last may be lost; remove the snapshot and make it again, or mount it again to go on with what there is"
    )]
    WritesLost {
        /// Key.
        key: String,
    },
    /// Others build on it.
    #[error("cannot remove the snapshot {key:?}, for {}", builders(*.children))]
    HasChildren {
        /// Key.
        key: String,
        /// How many.
        children: usize,
    },
    /// Others may build on it, of which nothing is known.
    #[error(
        "cannot remove the snapshot {key:?}, for one may build on it whose record {} cannot be used; `snapctl system verify` says what to do about that", record.display()
    )]
    MayHaveChildren {
        /// Key.
        key: String,
        /// The record.
        record: PathBuf,
    },
    /// A packed layer cannot lie on a directory.
    #[error(
        "the layers of snapshot {key:?} are directories, on which no packed layer can lie; unpack the layer into a snapshot instead"
    )]
    NotPacked {
        /// Key of the parent.
        key: String,
    },
    /// It has something that no layer can say.
    #[error("cannot write a layer with {path}: {problem}; rename or remove it first")]
    Unspeakable {
        /// Absolute, as seen in the snapshot.
        path: PathBuf,
        /// Why.
        problem: &'static str,
    },
    /// Something was written to it already, or can be at this moment.
    #[error(
        "the snapshot {key:?} is not empty or is mounted elsewhere; unpack the layer through its mount, or prepare a new snapshot"
    )]
    NotPristine {
        /// Key.
        key: String,
    },
    /// What was to restore a layer is another one.
    #[error(
        "the stream is that of the layer {found} and not of {layer}; remove the image that has it and load that again"
    )]
    AnotherLayer {
        /// What is to be restored.
        layer: LayerName,
        /// What the stream is.
        found: LayerName,
    },
    /// A key must not be empty.
    #[error("a snapshot needs a key that is not empty")]
    EmptyKey,
    /// The packed layers.
    #[error(transparent)]
    Store(#[from] store::Error),
    /// The records.
    #[error(transparent)]
    Record(#[from] record::Error),
    /// The index.
    #[error(transparent)]
    Index(#[from] index::Error),
    /// The host refused an operation.
    #[error("cannot {action} {path}: {source}")]
    Io {
        /// What was tried.
        action: &'static str,
        /// On what.
        path: PathBuf,
        /// What the host said.
        source: io::Error,
    },
    /// The union of its layers cannot be opened.
    #[error(transparent)]
    OpenUnion(#[from] cow::OpenError),
    /// The union of its layers cannot be read.
    #[error("cannot read the layers: {source}")]
    Union {
        /// What failed.
        source: cow::Error,
    },
    /// A file with several names got another one while names of it were told, and again each time that this was begun anew.
    #[error(
        "a file that has several names in the layers below, which are directories, was changed and got a new name each time that the names were looked at; repeat this when less is written to the snapshot, or pause the container meanwhile (`ctr tasks pause`; one of snapctl's can only be stopped, `snapctl stop`)"
    )]
    LinksChanged,
    /// mount(2) or what it needs.
    #[error(transparent)]
    Mount(#[from] fuse_mount::MountError),
    /// Somebody mounted something below a mount that had died.
    #[error(
        "{mount} is mounted in {place}, where the mount of a snapshot was; unmount it, then repeat this"
    )]
    ForeignMount {
        /// The directory of the snapshot's mount.
        place: PathBuf,
        /// What is mounted in it.
        mount: PathBuf,
    },
    /// Somebody has unmounted a snapshot, and its plyfs goes on.
    #[error(
        "somebody has unmounted {mountpoint}, and its plyfs goes on, most often for a copy of the mount that is in use; stop what uses that, or unmount it, too, then repeat this"
    )]
    Unmounted {
        /// Where it was mounted.
        mountpoint: PathBuf,
    },
    /// There is no plyfs to mount with.
    #[error(
        "there is no plyfs beside {executable} nor on PATH; install it, or name it with `--plyfs`"
    )]
    NoPlyfs {
        /// The running program.
        executable: PathBuf,
    },
    /// A plyfs did not come to serve.
    #[error("plyfs does not serve {mountpoint}: {problem}")]
    PlyfsFailed {
        /// Where it was to.
        mountpoint: PathBuf,
        /// What is known, its own last words included.
        problem: String,
    },
}

/// Who keeps a snapshot from being removed.
fn builders(children: usize) -> String {
    match children {
        1 => "another one builds on it; remove that first".to_owned(),
        several => format!("{several} others build on it; remove those first"),
    }
}

/// Result of an operation on a snapshot.
pub type Result<T, E = Error> = std::result::Result<T, E>;

/// For `map_err`: adds what was tried on what.
pub(super) fn io_error(
    action: &'static str,
    path: &Path,
) -> impl FnOnce(io::Error) -> Error + use<> {
    let path = path.to_owned();
    move |source| Error::Io {
        action,
        path,
        source,
    }
}

/// As `io_error`, of what a plyfs was asked for: when it ends on the way, the kernel has acknowledged
/// writes that it never got.
pub(super) fn plyfs_error(
    action: &'static str,
    path: &Path,
    key: &str,
) -> impl FnOnce(io::Error) -> Error + use<> {
    let failed = io_error(action, path);
    let key = key.to_owned();
    move |source| match source.kind() {
        io::ErrorKind::UnexpectedEof
        | io::ErrorKind::ConnectionReset
        | io::ErrorKind::BrokenPipe => Error::WritesLost { key },
        _ => failed(source),
    }
}
