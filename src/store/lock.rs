//! One process for each root, and for each state directory.

use std::fs::{File, OpenOptions};
use std::io::{self, Read, Seek, Write};
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};

use nix::fcntl::{Flock, FlockArg};

use super::durable::create_dir;

/// Keeps every other process off the root for as long as it lives.
#[derive(Debug)]
pub struct RootLock {
    _file: Flock<File>,
}

/// Why a root could not be locked.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum LockError {
    /// Another process has it.
    #[error(
        "{root} is in use by another plyd (process {pid}); end that one, or give this one another `--root` and `--state`"
    )]
    InUse {
        /// The root.
        root: PathBuf,
        /// Who says that it has it.
        pid: String,
    },
    /// The host refused an operation.
    #[error("cannot lock {root}: {source}")]
    Io {
        /// The root.
        root: PathBuf,
        /// What the host said.
        source: io::Error,
    },
}

/// Locks `root`, or a state directory, making it (mode 0700) if it is missing.
pub fn lock_root(root: &Path) -> Result<RootLock, LockError> {
    let io_error = |source| LockError::Io {
        root: root.to_owned(),
        source,
    };
    create_dir(root, 0o700).map_err(io_error)?;
    let file = OpenOptions::new()
        .read(true)
        .write(true)
        .create(true)
        .truncate(false)
        .mode(0o600)
        .open(root.join("lock"))
        .map_err(io_error)?;
    match Flock::lock(file, FlockArg::LockExclusiveNonblock) {
        Ok(mut file) => {
            let pid = std::process::id().to_string();
            file.set_len(0)
                .and_then(|()| file.rewind())
                .and_then(|()| file.write_all(pid.as_bytes()))
                .map_err(io_error)?;
            Ok(RootLock { _file: file })
        }
        Err((mut file, nix::Error::EWOULDBLOCK)) => {
            let mut pid = String::new();
            // It only adorns the message.
            let _ = file.read_to_string(&mut pid);
            Err(LockError::InUse {
                root: root.to_owned(),
                pid,
            })
        }
        Err((_, error)) => Err(io_error(error.into())),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_second_one_is_told_who_has_it() {
        let tmp = tempfile::tempdir().unwrap();
        let root = tmp.path().join("root");
        let lock = lock_root(&root).unwrap();
        let error = lock_root(&root).unwrap_err().to_string();
        assert!(error.contains(&std::process::id().to_string()), "{error}");
        drop(lock);
        lock_root(&root).unwrap();
    }
}
