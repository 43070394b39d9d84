//! Why an operation on a container failed.

use std::io;
use std::path::{Path, PathBuf};

use super::entry::ROOT_IS_GONE;
use crate::runtime::{client, oci};
use crate::snapshotter;
use crate::store::record;

/// Why an operation on a container failed. Mapped once to gRPC codes in [`grpc`](crate::grpc).
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// No such container.
    #[error("there is no container {reference:?}; `snapctl ps -a` names those that exist")]
    NotFound {
        /// What was asked for.
        reference: String,
    },
    /// None that is known, and there are some of which nothing is.
    #[error(
        "there is no container {reference:?} among those whose records can be read, and the record {path} cannot be; restore it from a backup and run `snapctl system repair`, or delete the file to give up what it stands for and start plyd again"
    )]
    NotFoundInSound {
        /// What was asked for.
        reference: String,
        /// One of the damaged records.
        path: PathBuf,
    },
    /// The prefix of an id fits several.
    #[error("{reference:?} fits {count} containers; give more digits of the id")]
    Ambiguous {
        /// What was asked for.
        reference: String,
        /// How many it fits.
        count: usize,
    },
    /// The name is taken.
    #[error(
        "the name {name:?} is in use by the container {id}; remove that, or choose another name"
    )]
    NameTaken {
        /// The name.
        name: String,
        /// Who has it.
        id: String,
    },
    /// The request cannot be fulfilled as it is.
    #[error("{0}")]
    Invalid(String),
    /// It runs.
    #[error("the container {name} runs already")]
    Running {
        /// Its name.
        name: String,
    },
    /// It runs and is to be removed.
    #[error("the container {name} runs; stop it first, or remove it by force (`snapctl rm -f`)")]
    RemoveRunning {
        /// Its name.
        name: String,
    },
    /// It does not run.
    #[error("the container {name} does not run; start it first")]
    NotRunning {
        /// Its name.
        name: String,
    },
    /// Its mount has failed under it.
    #[error(
        "cannot execute in the container {name}, for {ROOT_IS_GONE}; stop it and start it again"
    )]
    RootIsGone {
        /// Its name.
        name: String,
    },
    /// Its process could not be started.
    #[error("cannot start the container {name}: {message}")]
    Start {
        /// Its name.
        name: String,
        /// 125, 126 or 127.
        exit_code: i32,
        /// What the OCI runtime says.
        message: String,
    },
    /// One more process could not be started.
    #[error("cannot execute in the container {name}: {message}")]
    Exec {
        /// Its name.
        name: String,
        /// 125, 126 or 127.
        exit_code: i32,
        /// What the OCI runtime says.
        message: String,
    },
    /// It does not end.
    #[error(
        "the container {name} has been sent SIGKILL and has not ended; a process of it hangs in the kernel"
    )]
    WontEnd {
        /// Its name.
        name: String,
    },
    /// It was removed meanwhile.
    #[error("the container {name} has been removed")]
    Removed {
        /// Its name.
        name: String,
    },
    /// plyd ends.
    #[error("plyd ends; the container goes on, ask the next plyd")]
    Closing,
    /// There is no OCI runtime.
    #[error(transparent)]
    Oci(#[from] oci::Error),
    /// There is no shim program.
    #[error(
        "there is no plyshim beside {executable} nor on PATH; install it, or name it with --plyshim"
    )]
    NoShim {
        /// The running program.
        executable: PathBuf,
    },
    /// The conversation with its shim failed.
    #[error(transparent)]
    Shim(#[from] client::Error),
    /// Its root file system.
    #[error(transparent)]
    Root(#[from] snapshotter::Error),
    /// The records.
    #[error(transparent)]
    Record(#[from] record::Error),
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
    /// A task of plyd ended in a panic.
    #[error("plyd met an error of its own; its log has the details, please report it")]
    Internal,
}

impl Error {
    /// What `run` and `exec` should exit with, where that is not plain 125.
    pub fn exit_code(&self) -> Option<i32> {
        match self {
            Self::Start { exit_code, .. } | Self::Exec { exit_code, .. } => Some(*exit_code),
            _ => None,
        }
    }
}

/// Result of an operation on a container.
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
