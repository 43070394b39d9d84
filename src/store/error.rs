//! Why an operation on packed layers failed.

use std::io;
use std::path::{Path, PathBuf};

use super::record;

/// Why an operation on packed layers failed.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// The host refused an operation.
    #[error("cannot {action} {path}: {source}")]
    Io {
        /// What was tried.
        action: &'static str,
        /// On which file.
        path: PathBuf,
        /// What the host said.
        source: io::Error,
    },
    /// A file of the store does not hold what was written to it.
    #[error("{path} is damaged: {problem}; remove the layer that uses it and import that again")]
    Damaged {
        /// The file.
        path: PathBuf,
        /// What is wrong with it.
        problem: String,
    },
    /// A file of the store was written by a newer release.
    #[error("{path} needs a newer release of Plywood: {problem}")]
    Unsupported {
        /// The file.
        path: PathBuf,
        /// What it needs.
        problem: String,
    },
    /// A layer cannot be taken because of what is in it.
    #[error("the layer cannot be used: {entry}: {problem}")]
    Refused {
        /// The entry of its stream.
        entry: String,
        /// What is wrong with it.
        problem: String,
    },
    /// A stream does not have the digest that it should have.
    #[error("the {what} has the digest {found}, and {expected} was expected; fetch it again")]
    Digest {
        /// Which stream.
        what: &'static str,
        /// The digest that was given.
        expected: String,
        /// The digest of what came.
        found: String,
    },
    /// The stream of a layer cannot be read.
    #[error("the stream of the layer cannot be read to its end: {0}")]
    Input(io::Error),
    /// What is exported cannot be written.
    #[error("the stream of the layer cannot be written: {0}")]
    Output(io::Error),
    /// The caller does not want it any more.
    #[error("the import was cancelled; nothing of it was kept")]
    Cancelled,
    /// There is no such layer.
    #[error("there is no layer {layer} in the store; import it again")]
    NoLayer {
        /// Its name.
        layer: String,
    },
    /// A content that a layer names is not in the store.
    #[error("the store has lost the object {object}; import the layers that use it again")]
    NoObject {
        /// Its name.
        object: String,
    },
    /// A content of a layer is not sound.
    #[error("{problem}")]
    Content {
        /// What is wrong, and what to do.
        problem: String,
    },
    /// The records.
    #[error(transparent)]
    Record(#[from] record::Error),
}

/// Result of an operation on packed layers.
pub type Result<T, E = Error> = std::result::Result<T, E>;

pub(super) fn io_error(action: &'static str, path: &Path) -> impl FnOnce(io::Error) -> Error {
    let path = path.to_owned();
    move |source| Error::Io {
        action,
        path,
        source,
    }
}

pub(super) fn damaged(path: &Path, problem: impl Into<String>) -> Error {
    Error::Damaged {
        path: path.to_owned(),
        problem: problem.into(),
    }
}

pub(super) fn refused(entry: &[u8], problem: impl Into<String>) -> Error {
    Error::Refused {
        entry: printable(entry),
        problem: problem.into(),
    }
}

/// A name of a stream as it can be shown on a terminal.
pub(super) fn printable(name: &[u8]) -> String {
    name.escape_ascii().to_string()
}
