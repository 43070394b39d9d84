//! Why an operation on an image failed.

use std::path::PathBuf;

use crate::store::before_problem;

/// Why an operation on an image failed. Mapped once to gRPC codes in [`grpc`](crate::grpc).
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// No such image.
    #[error("there is no image {reference:?}; `snapctl image ls` names those that exist")]
    NotFound {
        /// What was asked for.
        reference: String,
    },
    /// None that is known, and there are some of which nothing is.
    #[error(
        "there is no image {reference:?} among those whose records can be read, and the record {path} cannot be; {remedy}"
    )]
    NotFoundInSound {
        /// What was asked for.
        reference: String,
        /// One of the damaged records.
        path: PathBuf,
        /// What to do about it.
        remedy: &'static str,
    },
    /// No such image, and too few digits for the prefix of an id.
    #[error(
        "there is no image named {reference:?}, and an id is given by {shortest} of its digits at least; `snapctl image ls` shows both"
    )]
    ShortPrefix {
        /// What was asked for.
        reference: String,
        /// Digits that are needed.
        shortest: usize,
    },
    /// The prefix of an id fits several images.
    #[error("{reference:?} fits {count} images; give more digits of the id")]
    Ambiguous {
        /// What was asked for.
        reference: String,
        /// How many it fits.
        count: usize,
    },
    /// Not a name an image can have.
    #[error("{name:?} is not an image name: {problem}")]
    BadName {
        /// The name.
        name: String,
        /// Which rule it breaks.
        problem: &'static str,
    },
    /// Containers use the image.
    #[error("the image {reference:?} is used by {users}; remove what uses it first, or force it")]
    InUse {
        /// What was asked for.
        reference: String,
        /// Who uses it.
        users: String,
    },
    /// The archive, or something that a blob in it says, cannot be used.
    #[error("cannot load the archive: {subject}: {problem}")]
    Archive {
        /// The blob or the entry of the archive.
        subject: String,
        /// What is wrong with it.
        problem: String,
    },
    /// What was sent is something else.
    #[error(
        "this is no image archive, for {problem}; one is a tar of an OCI layout or of `docker save`, plain or compressed with gzip or zstd: `skopeo copy SOURCE oci-archive:FILE` makes one"
    )]
    NoArchive {
        /// What it lacks.
        problem: &'static str,
    },
    /// A layer cannot be unpacked because of what it contains.
    #[error("cannot unpack the layer {layer}: {}{problem}", before_problem(entry))]
    Layer {
        /// Digest of the layer's blob.
        layer: String,
        /// The tar entry; empty, if it is none.
        entry: String,
        /// What is wrong with it.
        problem: String,
    },
    /// The stream of the client broke off.
    #[error("the archive could not be read to its end: {0}")]
    Input(std::io::Error),
    /// The client went away.
    #[error("the import was cancelled; nothing of it was kept")]
    Cancelled,
    /// The host refused an operation.
    #[error("cannot {action} {path}: {source}")]
    Io {
        /// What was tried.
        action: &'static str,
        /// On which file.
        path: PathBuf,
        /// What the host said.
        source: std::io::Error,
    },
    /// The union of the layer's parents refused an operation that was none of the layer's fault.
    #[error("cannot unpack the layer {layer}: {entry}: {source}")]
    Union {
        /// Digest of the layer's blob.
        layer: String,
        /// The tar entry.
        entry: String,
        /// What the union said.
        source: crate::cow::union::Error,
    },
    /// The union of the layer's parents could not be opened.
    #[error(transparent)]
    Open(#[from] crate::cow::union::OpenError),
    /// The snapshots.
    #[error(transparent)]
    Snapshot(#[from] crate::snapshotter::Error),
    /// The records.
    #[error(transparent)]
    Record(#[from] crate::store::record::Error),
}

/// Result of an operation on images.
pub type Result<T, E = Error> = std::result::Result<T, E>;
