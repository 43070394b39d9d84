//! Mounts that have read what was damaged.

use tonic::Status;

use super::{Event, Repair, api};
use crate::snapshotter::{Owner, SnapshotInfo, Stale, StaleReason};

impl Repair {
    /// Has mounts read what was mended in place of what was read of it before, and tells of those that did not.
    pub(super) fn refresh_mounts(&self) -> Result<(), Status> {
        for stale in self.snapshotter.refresh_mounts()? {
            self.tell(Event::Left(self.stale_mount(stale)));
        }
        Ok(())
    }

    fn stale_mount(&self, stale: Stale) -> api::Fault {
        let Stale { id, snapshot, why } = stale;
        let mount = snapshot.as_ref().and_then(|info| info.mount.as_ref());
        let again = match (snapshot.as_ref().map(|info| info.owner), mount) {
            (Some(Owner::Container), _) => "start it again".to_owned(),
            // It keeps its mount when the container ends.
            (Some(Owner::Containerd), Some(mount)) => format!(
                "stop its container, unmount {} (umount(8)), and start it again",
                mount.path.display()
            ),
            _ => "mount it again, and start again what runs on it".to_owned(),
        };
        let advice = match &why {
            StaleReason::Damaged(_) => format!("mend that, then repeat this, or {again}"),
            StaleReason::Failed(_) => again,
        };
        let words = |info: &SnapshotInfo| self.stores().words(info.owner, &info.key);
        let known = snapshot.as_ref().map(words);
        api::Fault {
            kind: "mount".to_owned(),
            of: known.unwrap_or_else(|| format!("a mount of the snapshot with the id {id}")),
            problem: format!(
                "it may go on with what was read of contents while they were damaged, for {why}"
            ),
            advice,
            snapshots: snapshot.into_iter().map(|info| info.key).collect(),
            ..api::Fault::default()
        }
    }
}
