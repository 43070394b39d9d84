//! Why an operation on packed layers failed.

use std::io;
use std::path::{Path, PathBuf};

use super::format::LayerName;
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
    #[error("{path} is damaged: {problem}; `snapctl system repair` mends it, or says what to do")]
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
    #[error("the layer cannot be used: {}{problem}", before_problem(entry))]
    Refused {
        /// The entry of its stream; empty, if it is none.
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
    #[error("there is no layer {layer} in the store; load the image that has it again")]
    NoLayer {
        /// Its name.
        layer: String,
    },
    /// A content that a layer names is not in the store.
    #[error(
        "the store has lost the object {object}; `snapctl system repair` brings it back, or says what to do"
    )]
    NoObject {
        /// Its name.
        object: String,
    },
    /// A content that a view names is gone with what it was in.
    #[error("{}", lost(.pack.as_deref(), .file, *.more))]
    Lost {
        /// The pack that it was in, if that is known, and gone.
        pack: Option<PathBuf>,
        /// Where it would lie if it was a file of its own.
        file: PathBuf,
        /// It stands for many that were lost together, of which the first were named.
        more: bool,
    },
    /// A content of a layer is not sound.
    #[error("{problem}")]
    Content {
        /// What is wrong.
        problem: String,
        /// What became of it and of all others that the same happened to, in words that follow these.
        cause: String,
    },
    /// Something that an entry of a layer needs cannot be used.
    #[error("{place}: {source}")]
    Entry {
        /// Its path, and which layer it is of.
        place: String,
        /// Why not.
        source: Box<Self>,
    },
    /// The records.
    #[error(transparent)]
    Record(#[from] record::Error),
}

impl Error {
    /// The error, of the entry at `path` of a layer.
    pub(super) fn of_entry(self, layer: LayerName, path: &[u8]) -> Self {
        self.of(format!("/{} of the layer {layer}", path.escape_ascii()))
    }

    /// The error, of an entry that is told so.
    pub(super) fn of(self, place: String) -> Self {
        Self::Entry {
            place,
            source: Box::new(self),
        }
    }

    /// Whether a file is not there.
    pub(super) fn is_not_found(&self) -> bool {
        matches!(self, Self::Io { source, .. } if source.kind() == io::ErrorKind::NotFound)
    }

    /// Whether something is not what was written, or the disk cannot read it, and not that something else kept it from being
    /// read.
    pub(super) fn is_damage(&self) -> bool {
        match self {
            Self::Io { source, .. } => source.raw_os_error() == Some(libc::EIO),
            _ => true,
        }
    }

    /// What is wrong, without what to do about it: for who says that for several at once.
    pub fn problem(&self) -> String {
        match self {
            Self::Damaged { path, problem } => format!("{} is damaged: {problem}", path.display()),
            Self::NoLayer { .. } => "it is not in the store".to_owned(),
            Self::NoObject { object } => format!("the object {object} is not in the store"),
            Self::Record(record::Error::Damaged(damaged)) => damaged.fact(),
            Self::Entry { place, source } => format!("{place}: {}", source.problem()),
            other => other.to_string(),
        }
    }
}

/// What is said of contents that are gone.
fn lost(pack: Option<&Path>, file: &Path, more: bool) -> String {
    let what = match more {
        true => "the contents of more files that were in it",
        false => "the content",
    };
    match pack {
        Some(pack) => format!(
            "the pack {} is gone, and nothing else has {what}; put it back, or run `snapctl system repair`, which mends it or says what to do",
            pack.display()
        ),
        None if more => "no pack and no file of the store has the contents of more files; `snapctl system repair` mends it, or says what to do".to_owned(),
        None => format!(
            "no pack of the store has {what}, nor is {} there; `snapctl system repair` mends it, or says what to do",
            file.display()
        ),
    }
}

/// What comes before a problem, if there is something.
pub(crate) fn before_problem(entry: &str) -> String {
    match entry {
        "" => String::new(),
        entry => format!("{entry}: "),
    }
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

/// A name of a stream as it can be shown on a terminal, and cut when it is very long: one that is refused may have a
/// megabyte, and an error goes to the client in a header of at most a few kilobytes.
pub(super) fn printable(name: &[u8]) -> String {
    const LONGEST: usize = 1000;
    match name.get(..LONGEST) {
        Some(start) if name.len() > LONGEST => format!("{}...", start.escape_ascii()),
        _ => name.escape_ascii().to_string(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_wrong_with_no_entry_has_no_empty_name() {
        assert_eq!(
            refused(b"", "it ends early").to_string(),
            "the layer cannot be used: it ends early"
        );
        assert_eq!(
            refused(b"a", "it ends early").to_string(),
            "the layer cannot be used: a: it ends early"
        );
    }

    /// A repair without descriptors left would have removed sound views.
    #[test]
    fn what_cannot_be_opened_is_not_damaged_for_that() {
        let failed = |errno| {
            let source = io::Error::from_raw_os_error(errno);
            io_error("open", Path::new("view"))(source).is_damage()
        };
        assert!(failed(libc::EIO) && damaged(Path::new("view"), "it is cut off").is_damage());
        assert!(!failed(libc::EMFILE) && !failed(libc::ENOMEM));
    }

    #[test]
    fn an_error_has_no_more_of_a_name_than_a_client_can_be_told() {
        let error = refused(&[0xff; 1 << 20], "it is too long").to_string();
        assert!(error.len() < 5000 && error.ends_with("...: it is too long"));
        assert_eq!(printable(&[b'n'; 1000]).len(), 1000);
    }
}
