//! Errors as gRPC statuses: the code that a client acts on, the sentence that its user reads.
//!
//! A module's error type gets an `impl From<Error> for Status` here, or beside the service that alone
//! uses it; then [`blocking`] does the rest.

use std::io;

use tokio::task::JoinHandle;
use tonic::{Code, Status};

use crate::store::record;
use crate::{snapshotter, store};

/// Runs `work` on a thread that may block, and words its error.
pub(super) async fn blocking<T, E>(
    work: impl FnOnce() -> Result<T, E> + Send + 'static,
) -> Result<T, Status>
where
    T: Send + 'static,
    E: Into<Status> + Send + 'static,
{
    joined(tokio::task::spawn_blocking(work)).await
}

/// What came of a task, with its error worded.
pub(super) async fn joined<T, E: Into<Status>>(
    task: JoinHandle<Result<T, E>>,
) -> Result<T, Status> {
    match task.await {
        Ok(result) => result.map_err(Into::into),
        Err(error) => {
            tracing::error!(%error, "a request handler failed");
            Err(Status::internal(
                "plyd met an error of its own; its log has the details, please report it",
            ))
        }
    }
}

/// The code for a failure that the host reported.
pub(super) fn io_code(error: &io::Error) -> Code {
    match error.kind() {
        io::ErrorKind::StorageFull
        | io::ErrorKind::QuotaExceeded
        | io::ErrorKind::FileTooLarge
        | io::ErrorKind::OutOfMemory => Code::ResourceExhausted,
        io::ErrorKind::PermissionDenied => Code::PermissionDenied,
        io::ErrorKind::TimedOut => Code::DeadlineExceeded,
        _ => Code::Internal,
    }
}

/// The code for a failure of a record.
pub(super) fn record_code(error: &record::Error) -> Code {
    match error {
        record::Error::Io { source, .. } => io_code(source),
        record::Error::Damaged(_) => Code::DataLoss,
        record::Error::BadId { .. } => Code::InvalidArgument,
    }
}

/// The code for a failure of the packed layers.
pub(super) fn store_code(error: &store::Error) -> Code {
    use store::Error;
    match error {
        Error::Io { source, .. } => io_code(source),
        Error::Damaged { .. }
        | Error::NoObject { .. }
        | Error::Lost { .. }
        | Error::Content { .. }
        | Error::Duplicate { .. } => Code::DataLoss,
        Error::Refused { .. } | Error::Digest { .. } | Error::Input(_) => Code::InvalidArgument,
        Error::Cancelled => Code::Cancelled,
        Error::NoLayer { .. } => Code::NotFound,
        Error::Unsupported { .. } => Code::FailedPrecondition,
        Error::Output(source) => io_code(source),
        Error::Record(error) => record_code(error),
        Error::Entry { source, .. } | Error::Uncollected { source, .. } => store_code(source),
    }
}

impl From<store::Error> for Status {
    fn from(error: store::Error) -> Self {
        Self::new(store_code(&error), error.to_string())
    }
}

impl From<snapshotter::Error> for Status {
    fn from(error: snapshotter::Error) -> Self {
        use snapshotter::Error;
        let code = match &error {
            Error::NotFound { .. } | Error::NoParent { .. } => Code::NotFound,
            Error::AlreadyExists { .. } => Code::AlreadyExists,
            Error::ParentNotCommitted { .. } | Error::EmptyKey => Code::InvalidArgument,
            Error::NotActive { .. }
            | Error::NotMountable { .. }
            | Error::HasChildren { .. }
            | Error::MayHaveChildren { .. }
            | Error::Mount(_)
            | Error::ForeignMount { .. }
            | Error::Unmounted { .. }
            | Error::WritesLost { .. }
            | Error::NotPacked { .. }
            | Error::NotPristine { .. }
            | Error::Unspeakable { .. }
            | Error::AnotherLayer { .. }
            | Error::NoPlyfs { .. } => Code::FailedPrecondition,
            Error::LinksChanged => Code::Aborted,
            Error::Store(error) => store_code(error),
            Error::Record(error) => record_code(error),
            Error::Index(_) | Error::OpenUnion(_) => Code::Internal,
            // A layer below is damaged, or the disk has lost what it should read.
            Error::Union { source } if source.errno == libc::EIO => Code::DataLoss,
            Error::Union { source } => io_code(&io::Error::from_raw_os_error(source.errno)),
            Error::Io { source, .. } => io_code(source),
            Error::PlyfsFailed { .. } => Code::Internal,
        };
        Self::new(code, error.to_string())
    }
}
