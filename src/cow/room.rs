//! Room on the host that is about to come back.
//!
//! A removed file goes on existing until the kernel says that it has forgotten it, because until then it may be used
//! by number. The kernel says so before the removing program goes on, but without waiting to be heard: that
//! program's next write could find a full disk that is not full any more.

use std::sync::atomic::Ordering;
use std::thread;
use std::time::Duration;

use nix::errno::Errno;

use super::error::Result;
use super::union::Union;

/// How long to wait before each further attempt, in milliseconds.
const WAITS: [u64; 6] = [1, 2, 5, 10, 20, 50];

impl Union {
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
