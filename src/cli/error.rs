//! Every failure of snapctl: one sentence on stderr and an exit code that a script can act on.

use std::io;
use std::path::PathBuf;

use tonic::{Code, Status};

/// Exit code of a failed command.
pub const FAILURE: u8 = 1;
/// Exit code of a command line that makes no sense.
pub const USAGE: u8 = 2;
/// Exit code of `run` and `exec` when Plywood failed, not the process: Docker's.
pub const ENGINE: u8 = 125;
/// Exit code after SIGPIPE, as a shell reports it: whoever read our output has gone.
pub const BROKEN_PIPE: u8 = 128 + 13;

/// The trailer in which plyd says what `run` and `exec` are to exit with.
const EXIT_CODE_TRAILER: &str = "plywood-exit-code";

/// Why a command failed.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The socket cannot be reached.
    #[error("{}", connect_message(.path, .source))]
    Connect {
        /// The socket.
        path: PathBuf,
        /// Why.
        source: io::Error,
    },
    /// plyd refused or failed a call.
    #[error("{}", status_message(.0))]
    Rpc(Box<Status>),
    /// An argument that makes no sense, whatever plyd and the host have.
    #[error("{0}")]
    Input(String),
    /// What the host has is not what the command needs.
    #[error("{0}")]
    Refused(String),
    /// A local file or directory.
    #[error("cannot {action} {}: {source}", .path.display())]
    File {
        /// What was tried, an infinitive.
        action: &'static str,
        /// On what.
        path: PathBuf,
        /// Why it failed.
        source: io::Error,
    },
    /// Our own stdin, stdout or terminal.
    #[error("cannot {action}: {source}")]
    Stdio {
        /// What was tried.
        action: &'static str,
        /// Why it failed.
        source: io::Error,
    },
    /// plyd answered with something that its protocol rules out.
    #[error("plyd broke off in the middle of {0}; its log says why")]
    Protocol(&'static str),
    /// The user gave up.
    #[error("{message}")]
    Interrupted {
        /// What became of the work.
        message: String,
        /// Number of the signal.
        signal: u8,
    },
    /// Some of several targets failed; each was reported when it did.
    #[error("")]
    Reported,
}

/// Result of a command.
pub type Result<T, E = Error> = std::result::Result<T, E>;

impl Error {
    /// The exit code for this failure; `engine` is set for `run` and `exec`, whose other exit codes
    /// are those of the process.
    pub fn exit_code(&self, engine: bool) -> u8 {
        if self.is_broken_pipe() {
            return BROKEN_PIPE;
        }
        match self {
            Self::Interrupted { signal, .. } => 128u8.saturating_add(*signal),
            Self::Rpc(status) if engine => exit_code_of(status).unwrap_or(ENGINE),
            _ if engine => ENGINE,
            Self::Input(_) => USAGE,
            _ => FAILURE,
        }
    }

    /// Nobody reads our output any more; nothing is to be said about it.
    pub fn is_broken_pipe(&self) -> bool {
        matches!(self, Self::Stdio { source, .. } if source.kind() == io::ErrorKind::BrokenPipe)
    }

    /// The sentence for stderr, on one line; empty when there is nothing left to say.
    pub fn sentence(&self) -> String {
        if self.is_broken_pipe() {
            return String::new();
        }
        let text = self.to_string();
        text.split_whitespace().collect::<Vec<_>>().join(" ")
    }
}

impl From<Status> for Error {
    fn from(status: Status) -> Self {
        Self::Rpc(Box::new(status))
    }
}

fn exit_code_of(status: &Status) -> Option<u8> {
    let value = status.metadata().get(EXIT_CODE_TRAILER)?;
    value.to_str().ok()?.parse().ok()
}

fn connect_message(path: &std::path::Path, source: &io::Error) -> String {
    let path = path.display();
    match source.kind() {
        io::ErrorKind::NotFound | io::ErrorKind::ConnectionRefused => format!(
            "cannot reach plyd at {path} ({source}): is it running? Start it with `plyd`, \
             or name its socket with --address"
        ),
        io::ErrorKind::PermissionDenied => format!(
            "no permission to use {path}: run snapctl as root, or as the user that plyd runs as"
        ),
        _ => format!("cannot connect to plyd at {path}: {source}"),
    }
}

fn status_message(status: &Status) -> String {
    let message = status.message();
    let what = match status.code() {
        Code::Unimplemented => {
            "this plyd is older than snapctl and does not know this command; update plyd"
        }
        Code::Unavailable => "the connection to plyd broke; its log says why",
        Code::Cancelled => "the call was cancelled",
        Code::DeadlineExceeded => "plyd took too long to answer",
        // What HTTP/2 has to say of a plyd that was killed.
        _ if message.starts_with("h2 protocol error") => {
            return "the connection to plyd broke: it has ended, or its log says why; containers go on without it, and when plyd runs again `snapctl logs` and `snapctl wait` tell of them".to_owned();
        }
        // plyd's own words say what happened and what to do.
        _ if !message.is_empty() => return message.to_owned(),
        code => return format!("plyd failed without a reason ({code})"),
    };
    if message.is_empty() {
        what.to_owned()
    } else {
        format!("{what} ({message})")
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use tonic::metadata::MetadataValue;

    #[test]
    fn exit_codes_tell_plywood_from_the_process() {
        let mut status = Status::not_found("no such file");
        assert_eq!(Error::from(status.clone()).exit_code(false), FAILURE);
        assert_eq!(Error::from(status.clone()).exit_code(true), ENGINE);
        status
            .metadata_mut()
            .insert(EXIT_CODE_TRAILER, MetadataValue::from_static("127"));
        assert_eq!(Error::from(status.clone()).exit_code(true), 127);
        assert_eq!(Error::from(status).exit_code(false), FAILURE);
        assert_eq!(Error::Input(String::new()).exit_code(false), USAGE);
        assert_eq!(Error::Input(String::new()).exit_code(true), ENGINE);
        assert_eq!(Error::Refused(String::new()).exit_code(false), FAILURE);
    }

    #[test]
    fn a_sentence_is_one_line() {
        let error = Error::from(Status::internal("first\n  second"));
        assert_eq!(error.sentence(), "first second");
    }

    #[test]
    fn a_broken_pipe_is_silent() {
        let error = Error::Stdio {
            action: "write",
            source: io::ErrorKind::BrokenPipe.into(),
        };
        assert_eq!(error.exit_code(false), BROKEN_PIPE);
        assert!(error.sentence().is_empty());
    }

    #[test]
    fn a_refused_connection_says_what_to_do() {
        let error = Error::Connect {
            path: "/run/x.sock".into(),
            source: io::ErrorKind::ConnectionRefused.into(),
        };
        assert!(error.sentence().contains("is it running? Start it with"));
    }
}
