//! Why there is no mount.

use std::io;
use std::path::PathBuf;

use crate::cow::union::OpenError;
use crate::store;
use crate::sys::fuse_mount::{MountError, way_out};

/// Why there is no mount. Each says what to do; all of them are exit code 1.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum DaemonError {
    /// The union cannot be made of these directories.
    #[error(transparent)]
    Union(#[from] OpenError),
    /// The packed layers cannot be used.
    #[error(transparent)]
    View(#[from] store::Error),
    /// Mounting failed.
    #[error(transparent)]
    Mount(#[from] MountError),
    /// The file with the lower directories cannot be read.
    #[error("cannot read `lowerdir_file={path}`: {source}; name a file with one directory a line")]
    LowerdirFile {
        /// The file.
        path: PathBuf,
        /// What the host said.
        source: io::Error,
    },
    /// The mount point cannot be used.
    #[error("cannot mount on {path}: {source}; {}", way_out(.source))]
    Mountpoint {
        /// The directory.
        path: PathBuf,
        /// What the host said.
        source: io::Error,
    },
    /// The mount would be a part of one of its own layers.
    #[error(
        "the mount point {mountpoint} lies in the layer {layer}: the mount would contain itself; choose a directory outside of all layers"
    )]
    SelfNesting {
        /// Where to mount.
        mountpoint: PathBuf,
        /// The layer.
        layer: PathBuf,
    },
    /// The descriptor that `--fuse-fd` names cannot be used.
    #[error(
        "cannot use the descriptor of --fuse-fd: {0}; it has to be an open /dev/fuse that the caller leaves open for this process"
    )]
    FuseFd(#[source] io::Error),
    /// The kernel could not be agreed with.
    #[error("the kernel refused the FUSE session: {0}; `dmesg` may say more")]
    Session(#[source] io::Error),
    /// The control socket cannot be made.
    #[error(
        "cannot listen at the control socket {path}: {source}; choose a path in an existing directory of your own"
    )]
    Control {
        /// Its path.
        path: PathBuf,
        /// What the host said.
        source: io::Error,
    },
    /// The log file cannot be opened.
    #[error("cannot write the log file {path}: {source}")]
    LogFile {
        /// Its path.
        path: PathBuf,
        /// What the host said.
        source: io::Error,
    },
    /// The process could not be put in the background.
    #[error("cannot start in the background: {0}; `-f` stays in front")]
    Background(#[source] io::Error),
    /// The server in the background reported an error, already worded.
    #[error("{0}")]
    Reported(String),
}
