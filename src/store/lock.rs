//! One process for each root, and for each state directory.

use std::fs::{File, OpenOptions};
use std::io::{self, Read, Seek, Write};
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};
use std::thread::sleep;
use std::time::{Duration, Instant};

use nix::fcntl::{Flock, FlockArg};

use super::durable::create_dir;
use crate::sys::process;

/// How long the child of a plyd that was killed may take to run its program.
const PATIENCE: Duration = Duration::from_secs(5);
const LOOK_AGAIN: Duration = Duration::from_millis(10);

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
///
/// A child that a plyd has just forked has the lock, too, until it runs its program. Where the plyd was killed meanwhile, that is
/// waited for.
pub fn lock_root(root: &Path) -> Result<RootLock, LockError> {
    let io_error = |source| LockError::Io {
        root: root.to_owned(),
        source,
    };
    create_dir(root, 0o700).map_err(io_error)?;
    let mut file = OpenOptions::new()
        .read(true)
        .write(true)
        .create(true)
        .truncate(false)
        .mode(0o600)
        .open(root.join("lock"))
        .map_err(io_error)?;
    let deadline = Instant::now() + PATIENCE;
    let mut waits = false;
    let mut file = loop {
        let mut refused = match Flock::lock(file, FlockArg::LockExclusiveNonblock) {
            Ok(locked) => break locked,
            Err((refused, nix::Error::EWOULDBLOCK)) => refused,
            Err((_, error)) => return Err(io_error(error.into())),
        };
        let mut pid = String::new();
        // Who has just taken it has not written its number yet; otherwise it only adorns the message.
        let _ = refused
            .rewind()
            .and_then(|()| refused.read_to_string(&mut pid));
        if pid.parse().is_ok_and(process::is_running) || Instant::now() >= deadline {
            return Err(LockError::InUse {
                root: root.to_owned(),
                pid,
            });
        }
        if !std::mem::replace(&mut waits, true) {
            tracing::info!(root = %root.display(), process = pid, "waiting for a child of the last plyd to let go");
        }
        sleep(LOOK_AGAIN);
        file = refused;
    };
    let pid = std::process::id().to_string();
    file.set_len(0)
        .and_then(|()| file.rewind())
        .and_then(|()| file.write_all(pid.as_bytes()))
        .map_err(io_error)?;
    Ok(RootLock { _file: file })
}

#[cfg(test)]
mod tests {
    use std::os::fd::AsRawFd;

    use super::*;

    #[test]
    fn a_second_one_is_told_who_has_it() {
        let tmp = tempfile::tempdir().unwrap();
        let root = tmp.path().join("root");
        let lock = lock_root(&root).unwrap();
        let error = lock_root(&root).unwrap_err().to_string();
        assert!(error.contains(&std::process::id().to_string()), "{error}");
        drop(lock);
        // A child that another test forks has the lock a moment longer, and the number is that of this process.
        let deadline = Instant::now() + PATIENCE;
        while let Err(error) = lock_root(&root) {
            assert!(Instant::now() < deadline, "{error}");
            sleep(LOOK_AGAIN);
        }
    }

    /// A plyd that was killed once kept the next from starting, by a child that it had just forked.
    #[test]
    fn what_a_dead_one_has_left_of_the_lock_is_waited_for() {
        let tmp = tempfile::tempdir().unwrap();
        // Killed before or after it had written its number, here one that Linux never gives to a process.
        for dead in [i32::MAX.to_string(), String::new()] {
            let path = tmp.path().join("lock");
            std::fs::write(&path, dead).unwrap();
            let child = File::open(&path).unwrap();
            #[expect(
                deprecated,
                reason = "the other one unlocks, which an end by a kill does not"
            )]
            nix::fcntl::flock(child.as_raw_fd(), FlockArg::LockExclusive).unwrap();
            let until = Instant::now() + Duration::from_millis(300);
            std::thread::scope(|scope| {
                scope.spawn(move || {
                    sleep(until - Instant::now());
                    drop(child);
                });
                lock_root(tmp.path()).unwrap();
                assert!(Instant::now() >= until);
            });
        }
    }
}
