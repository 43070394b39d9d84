//! Room on the host: how much there is for us, and what is about to come back.
//!
//! A removed file goes on existing until the kernel says that it has forgotten it, because until then it may be used
//! by number. The kernel says so before the removing program goes on, but without waiting to be heard: that
//! program's next write could find a full disk that is not full any more.

use std::os::fd::AsFd;
use std::sync::atomic::Ordering;
use std::thread;
use std::time::Duration;

use nix::errno::Errno;

use super::error::Result;
use super::union::Union;
use crate::sys::{fs, process};

/// How long to wait before each further attempt, in milliseconds.
const WAITS: [u64; 6] = [1, 2, 5, 10, 20, 50];

impl Union {
    /// Whether this process could write so many bytes to the upper's file system.
    pub(super) fn has_room_for(&self, bytes: u64) -> Result<bool> {
        let (root, _) = self.upper()?.root.get();
        let stat = fs::fstatvfs(root.as_fd())?;
        let fits = |blocks: u64| bytes <= blocks.saturating_mul(stat.f_frsize);
        // What is free beyond that the host keeps for some, and this process may be one of them. A part of it ext4 keeps
        // from everybody (`ext4_calculate_resv_clusters`).
        let kept_from_all = (stat.f_blocks / 50).min(4096);
        Ok(fits(stat.f_bavail)
            || (fits(stat.f_bfree.saturating_sub(kept_from_all))
                && fs::has_reserve(root.as_fd())?
                && process::may_use_reserves()))
    }

    /// Tries an operation again that the host has no room for while there are removed files. Must not be called with
    /// a lock held: forgetting takes them.
    pub(super) fn with_room<T>(&self, mut operation: impl FnMut() -> Result<T>) -> Result<T> {
        let removed = || {
            self.upper_of()
                .is_some_and(|upper| upper.orphan_fds.load(Ordering::Relaxed) > 0)
        };
        for wait in WAITS {
            let before = removed();
            match operation() {
                Err(error)
                    if (error.is(Errno::ENOSPC) || error.is(Errno::EDQUOT))
                        && (before || removed()) =>
                {
                    thread::sleep(Duration::from_millis(wait));
                }
                result => return result,
            }
        }
        operation()
    }
}
