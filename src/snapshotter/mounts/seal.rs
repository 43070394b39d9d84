//! The end of a mount whose upper is about to become a layer.

use std::time::Duration;

use nix::mount::MsFlags;

use super::super::types::Result;
use super::{Live, Mounts, copies};

/// How long a plyfs may take to leave its upper alone: whoever does not is ended, and what still reads there with it.
const SEALING: Duration = Duration::from_secs(60);

impl Mounts {
    /// Ends the mount, if there is one. Copies that someone still holds go on, read-only; when this
    /// returns, nobody writes to the upper any more, and who reads it leaves no trace in it.
    pub(in super::super) fn seal(&self, id: &str) -> Result<()> {
        self.wait_for_arrival(id);
        let Some(live) = self.shared.live.lock().remove(id) else {
            return self.clear(id);
        };
        self.shared.wake_up();
        // Of the whole file system, not of this mount alone. Refused while a file is open for writing.
        let flags = MsFlags::MS_REMOUNT | MsFlags::MS_RDONLY;
        let none: Option<&str> = None;
        let sealed = nix::mount::mount(none, &live.point.path, none, flags, none);
        if let Err(errno) = sealed {
            tracing::warn!(id, %errno, "a snapshot is committed while files of it are open for writing: they fail from now on");
            live.abort();
        }
        let goes_on = sealed.is_ok()
            && !copies(&live.point.path, live.connection)?.is_empty()
            && live.seal(id);
        self.take_away(&live)?;
        if goes_on {
            tracing::debug!(
                id,
                "a committed snapshot is still mounted elsewhere, read-only"
            );
            // Goes on being watched, to be reaped.
            let left = format!("{id} (left)");
            self.shared
                .live
                .lock()
                .insert(left, Live { left: true, ..live });
            self.shared.wake_up();
        } else {
            live.end();
        }
        self.clear(id)
    }
}

impl Live {
    /// Has the process leave the upper as it is. Where it cannot, or is of a release that does not know how, whoever
    /// uses the mount gets errors: reading on would move access times of the layer.
    fn seal(&self, id: &str) -> bool {
        match self.control.seal(SEALING) {
            Ok(()) => true,
            Err(error) => {
                tracing::warn!(id, %error, "a committed snapshot cannot go on being mounted elsewhere: its users get errors from now on");
                self.abort();
                false
            }
        }
    }
}
