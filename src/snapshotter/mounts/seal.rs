//! The end of a mount whose upper is about to become a layer.

use std::time::Duration;

use nix::mount::MsFlags;

use super::super::types::Result;
use super::{Live, Mounts, has_ended, kill};

/// How long a plyfs may take to leave its upper alone: whoever does not is ended, and what still reads there with it.
const SEALING: Duration = Duration::from_secs(60);

/// What follows from the end of a mount that is in use.
const ENDS: &str = "whatever uses the mount, as a running container does, gets errors from now on";

impl Mounts {
    /// Ends the mount, if there is one. Copies that someone still holds go on, read-only, if `may_go_on` answers true,
    /// which is asked when nobody can write any more. When this returns, nobody writes to the upper, and who reads
    /// it leaves no trace in it. `key` is for the log.
    pub(in super::super) fn seal(
        &self,
        id: &str,
        key: &str,
        may_go_on: impl FnOnce() -> Result<bool>,
    ) -> Result<()> {
        self.wait_for_arrival(id);
        let Some(live) = self.shared.live.lock().remove(id) else {
            return self.clear(id);
        };
        self.shared.wake_up();
        let met_damage = Self::met_damage(&live);
        // Of the whole file system, not of this mount alone. Refused while a file is open for writing.
        let flags = MsFlags::MS_REMOUNT | MsFlags::MS_RDONLY;
        let none: Option<&str> = None;
        let sealed = nix::mount::mount(none, &live.point.path, none, flags, none);
        if let Err(errno) = sealed {
            tracing::warn!(snapshot = key, id, %errno, "a snapshot is committed while files of its mount are open for writing: {ENDS}");
            live.abort();
        }
        let goes_on = sealed.is_ok() && live.is_in_use(id) && live.seal_if(id, key, may_go_on);
        let live = self.take_away(live)?;
        if goes_on {
            tracing::warn!(
                snapshot = key,
                id,
                "a snapshot is committed while its mount is in use: whatever uses that, as a running container does, can only read from now on"
            );
            // Goes on being watched, to be reaped.
            self.shared
                .live
                .lock()
                .insert(left_of(id), Live { left: true, ..live });
            self.shared.wake_up();
        } else {
            self.remember(met_damage);
            live.end();
        }
        self.clear(id)
    }

    /// Ends what goes on of a mount that was sealed: whoever uses it gets errors. For a commit that has failed after all,
    /// so that the snapshot can be mounted again.
    pub(in super::super) fn end_sealed(&self, id: &str, key: &str) {
        let Some(live) = self.shared.live.lock().remove(&left_of(id)) else {
            return;
        };
        self.shared.wake_up();
        tracing::warn!(
            snapshot = key,
            id,
            "a commit has failed, and it had taken the mount of the snapshot away: {ENDS}"
        );
        // Its mount is at no place of ours, and ends with the last descriptor: its, and then ours.
        kill(live.point.pid);
        has_ended(&live.control, SEALING);
        live.reap();
    }
}

const LEFT: &str = " (left)";

/// The name of a mount that goes on after its snapshot was committed.
fn left_of(id: &str) -> String {
    format!("{id}{LEFT}")
}

/// The snapshot of a mount, also if that goes on after its snapshot was committed.
pub(super) fn snapshot_of(name: &str) -> &str {
    name.strip_suffix(LEFT).unwrap_or(name)
}

impl Live {
    /// As `seal`, if that is allowed; otherwise whoever uses the mount gets errors.
    fn seal_if(&self, id: &str, key: &str, may_go_on: impl FnOnce() -> Result<bool>) -> bool {
        match may_go_on() {
            Ok(true) => self.seal(id, key),
            Ok(false) => {
                tracing::warn!(
                    snapshot = key,
                    id,
                    "a snapshot is committed that needs its work directory for that: {ENDS}"
                );
                self.abort();
                false
            }
            Err(error) => {
                tracing::warn!(snapshot = key, id, %error, "a snapshot is committed, and whether its mount can go on cannot be told: {ENDS}");
                self.abort();
                false
            }
        }
    }

    /// Has the process leave the upper as it is. Where it cannot, or is of a release that does not know how, whoever
    /// uses the mount gets errors: reading on would move access times of the layer.
    fn seal(&self, id: &str, key: &str) -> bool {
        match self.control.seal(SEALING) {
            Ok(()) => true,
            Err(error) => {
                tracing::warn!(snapshot = key, id, %error, "a snapshot is committed, and its plyfs cannot leave the upper alone: {ENDS}");
                self.abort();
                false
            }
        }
    }
}
