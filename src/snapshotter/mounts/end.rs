//! How a mount ends: its connection, and the process that served it.

use std::fs;
use std::io;
use std::path::Path;
use std::time::{Duration, Instant};

use nix::errno::Errno;
use nix::poll::{PollFd, PollFlags, PollTimeout};
use nix::sys::signal::Signal;
use nix::unistd::Pid;

use super::copies::copies;
use super::{ANSWER, Live};
use crate::fuse::control::ControlClient;
use crate::sys::mountinfo::{self, MountEntry};

impl Live {
    /// Whether there are copies of the mount. Where that cannot be told, there may be.
    pub(super) fn is_in_use(&self, id: &str) -> bool {
        copies(&self.point.path, self.connection).map_or_else(
            |error| {
                tracing::warn!(id, %error, "whether a mount is in use cannot be told");
                true
            },
            |copies| !copies.is_empty(),
        )
    }

    /// Makes every call on the mount fail, at whatever place. To be done while it is at its own.
    pub(super) fn abort(&self) {
        if !abort_at(&self.point.path) {
            // The connection ends with the last descriptor: its, and then ours.
            kill(self.point.pid);
        }
    }

    /// Ends the process of a mount that was taken away, or aborted.
    pub(super) fn end(self) {
        // Gone already is as good.
        let _ = self.control.stop(ANSWER);
        if !has_ended(&self.control, ANSWER) {
            let pid = self.point.pid;
            tracing::warn!(pid, "killing a plyfs that does not end with its mount");
            kill(pid);
            has_ended(&self.control, ANSWER);
        }
        self.reap();
    }

    /// As `reap`, in a thread of its own: a process that has hung up may take its time to end, and every other mount
    /// is still to be watched.
    pub(super) fn reap_aside(self, id: &str) {
        let owned = id.to_owned();
        let reaping = std::thread::Builder::new()
            .name("reaper".to_owned())
            .spawn(move || {
                let pid = self.point.pid;
                let status = self.reap();
                tracing::info!(id = owned, pid, status, "a plyfs has ended");
            });
        if let Err(error) = reaping {
            tracing::warn!(id, %error, "a dead plyfs stays a zombie");
        }
    }

    /// Lets go of everything, of the descriptor first, and says how the process ended.
    pub(super) fn reap(self) -> String {
        drop(self.fuse);
        match self.child.map(|mut child| child.wait()) {
            Some(Ok(status)) => status.to_string(),
            Some(Err(error)) => error.to_string(),
            None => "unknown, for another plyd started it".to_owned(),
        }
    }
}

/// The number of a FUSE mount's connection: its device's minor number.
pub(super) fn connection(entry: &MountEntry) -> Option<u64> {
    let is_fuse = entry.fstype == "fuse" || entry.fstype.starts_with("fuse.");
    let (_, minor) = entry.device.split_once(':').filter(|_| is_fuse)?;
    minor.parse().ok()
}

/// Waits until the process at the other end is gone.
pub(super) fn has_ended(control: &ControlClient, patience: Duration) -> bool {
    let deadline = Instant::now() + patience;
    loop {
        let left = deadline.saturating_duration_since(Instant::now());
        let timeout = PollTimeout::try_from(left).unwrap_or(PollTimeout::MAX);
        let mut fds = [PollFd::new(control.as_fd(), PollFlags::empty())];
        match nix::poll::poll(&mut fds, timeout) {
            Ok(0) => return false,
            Ok(_) => return true,
            Err(Errno::EINTR) => {}
            Err(_) => return false,
        }
    }
}

/// Ends the FUSE connection of the mount at `path`: every call on it fails from now on, also those
/// that wait. Answers whether it could: where fusectl is not mounted, only the end of the process does
/// the same.
pub(super) fn abort_at(path: &Path) -> bool {
    let Ok(Some(connection)) = mountinfo::at(path).map(|entry| connection(&entry?)) else {
        return false;
    };
    let abort = format!("/sys/fs/fuse/connections/{connection}/abort");
    match fs::write(&abort, "1") {
        Ok(()) => true,
        Err(error) if error.kind() == io::ErrorKind::NotFound => false,
        Err(error) => {
            tracing::warn!(path = abort, %error, "cannot abort a FUSE connection");
            false
        }
    }
}

pub(super) fn kill(pid: u32) {
    // 0, whom the kernel names for a process of another name space, would mean all of ours.
    if let Ok(pid) = i32::try_from(pid)
        && pid > 0
    {
        // Gone is as good as killed. The number is still the process's: its connection is open.
        let _ = nix::sys::signal::kill(Pid::from_raw(pid), Signal::SIGKILL);
    }
}
