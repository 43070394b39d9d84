//! What can go wrong, in a running union and when one is opened.

use std::borrow::Cow;
use std::path::PathBuf;

use nix::errno::Errno;

/// A failed operation: the errno to answer, and what to log.
///
/// Most failures are answers that a program expects (ENOENT of a lookup), so an error costs no
/// allocation unless somebody gave it a context.
#[derive(Debug)]
pub struct Error {
    /// The errno that the caller is to see. Never ENOSYS: the kernel would remember it for the
    /// whole connection.
    pub errno: i32,
    /// What was being done, on which layer and path; for logs. Empty for the expected answers.
    pub context: Cow<'static, str>,
}

impl Error {
    /// An error that needs no explanation.
    pub(super) const fn new(errno: Errno) -> Self {
        Self {
            errno: match errno {
                Errno::ENOSYS => libc::EOPNOTSUPP,
                other => other as i32,
            },
            context: Cow::Borrowed(""),
        }
    }

    /// The same, met while something else was done: what was said of it stays, which may name a layer and a path.
    fn within(self, doing: Cow<'static, str>) -> Self {
        let context = match &*self.context {
            "" => doing,
            inner => format!("{doing}: {inner}").into(),
        };
        Self { context, ..self }
    }

    /// Whether it is this errno.
    pub(super) fn is(&self, errno: Errno) -> bool {
        self.errno == errno as i32
    }
}

impl std::fmt::Display for Error {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        if !self.context.is_empty() {
            write!(f, "{}: ", self.context)?;
        }
        f.write_str(Errno::from_raw(self.errno).desc())
    }
}

impl std::error::Error for Error {}

impl From<Errno> for Error {
    fn from(errno: Errno) -> Self {
        Self::new(errno)
    }
}

/// Result of an operation of the union.
pub type Result<T, E = Error> = std::result::Result<T, E>;

/// Adds what was being done, before what was said already.
pub(super) trait Context<T> {
    /// A fixed text.
    fn context(self, text: &'static str) -> Result<T>;
    /// A text that is put together only if there is an error.
    fn with_context(self, text: impl FnOnce() -> String) -> Result<T>;
}

impl<T, E: Into<Error>> Context<T> for std::result::Result<T, E> {
    fn context(self, text: &'static str) -> Result<T> {
        self.map_err(|error| error.into().within(Cow::Borrowed(text)))
    }

    fn with_context(self, text: impl FnOnce() -> String) -> Result<T> {
        self.map_err(|error| error.into().within(Cow::Owned(text())))
    }
}

/// Why a union could not be opened: the sentence tells the user what to mend.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum OpenError {
    /// Neither a lower nor an upper is given.
    #[error(
        "no directory is given; name at least one lower directory, or an upper and a work directory"
    )]
    NoLayer,
    /// A lower directory cannot be opened.
    #[error("cannot open the lower directory {path}: {source}; name an existing directory")]
    Lower {
        /// The directory.
        path: PathBuf,
        /// What the host said.
        source: std::io::Error,
    },
    /// A merged view of packed layers cannot be used.
    #[error("cannot use the packed layers of {path}: {problem}")]
    View {
        /// The view.
        path: PathBuf,
        /// What is wrong.
        problem: String,
    },
    /// A lower is something else than a directory.
    #[error("the lower layer {path} is not a directory; name a directory")]
    LowerNotDirectory {
        /// What was named.
        path: PathBuf,
    },
    /// The upper directory cannot be opened.
    #[error("cannot open the upper directory {path}: {source}; create it first")]
    Upper {
        /// The directory.
        path: PathBuf,
        /// What the host said.
        source: std::io::Error,
    },
    /// The upper is something else than a directory.
    #[error("the upper layer {path} is not a directory; name a directory")]
    UpperNotDirectory {
        /// What was named.
        path: PathBuf,
    },
    /// The upper cannot be written.
    #[error(
        "the upper directory {path} cannot be written: {source}; give one on a writable file system, or none for a read-only union"
    )]
    UpperReadOnly {
        /// The directory.
        path: PathBuf,
        /// What the host said.
        source: std::io::Error,
    },
    /// The work directory cannot be opened or prepared.
    #[error(
        "cannot use the work directory {path}: {source}; name an empty directory on the file system of the upper directory"
    )]
    Work {
        /// The directory.
        path: PathBuf,
        /// What the host said.
        source: std::io::Error,
    },
    /// The work directory is something else than a directory.
    #[error("the work directory {path} is not a directory; name an empty directory")]
    WorkNotDirectory {
        /// What was named.
        path: PathBuf,
    },
    /// Upper and work are on two file systems.
    #[error(
        "the upper directory {upper} and the work directory {work} are on different file systems; a file could not be moved from one to the other, so put both on one"
    )]
    DifferentFileSystems {
        /// The upper.
        upper: PathBuf,
        /// The work directory.
        work: PathBuf,
    },
    /// Two of the directories are the same or one is inside of the other.
    #[error(
        "the {a_role} directory {a} and the {b_role} directory {b} overlap; give directories of which none contains another"
    )]
    Overlap {
        /// What the first is to the union.
        a_role: &'static str,
        /// The first.
        a: PathBuf,
        /// What the second is to the union.
        b_role: &'static str,
        /// The second.
        b: PathBuf,
    },
    /// Another mount uses the work directory.
    #[error(
        "the work directory {path} is in use by another mount; unmount that one, or give this one an upper and a work directory of its own"
    )]
    WorkInUse {
        /// The directory.
        path: PathBuf,
    },
    /// Another mount writes to the upper directory.
    #[error(
        "the upper directory {path} is in use by another mount; unmount that one, or give this one an upper and a work directory of its own"
    )]
    UpperInUse {
        /// The directory.
        path: PathBuf,
    },
    /// Kernel overlayfs has written the upper without ever waiting for the disk.
    #[error(
        "the upper directory {upper} was written by kernel overlayfs with `volatile`, so after a crash of the host it may be damaged; give a new upper and work directory, or mount with `-o volatile`, or, if the host has not crashed since, remove {mark}"
    )]
    Volatile {
        /// The upper.
        upper: PathBuf,
        /// What says so.
        mark: PathBuf,
    },
    /// The upper is not to be used by who does not know a feature.
    #[error(
        "the work directory {work} says that its upper needs the feature `{feature}`, which this release does not know; mount it by what wrote it, or give an upper and a work directory of their own"
    )]
    UnknownFeature {
        /// The work directory.
        work: PathBuf,
        /// The name below `work/incompat` in it.
        feature: String,
    },
    /// The upper's file system does not store the extended attributes of the union.
    #[error(
        "the file system of the upper directory {path} does not store {prefix}* extended attributes: {source}; use one that does, such as ext4, xfs, btrfs or tmpfs"
    )]
    NoXattr {
        /// The upper.
        path: PathBuf,
        /// Which attributes.
        prefix: &'static str,
        /// What the host said.
        source: std::io::Error,
    },
}
