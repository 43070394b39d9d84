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
        let again = match snapshot.as_ref().map(|info| info.owner) {
            Some(Owner::Container) => "start it again",
            Some(Owner::Containerd) => "start its container again",
            Some(Owner::Image | Owner::Snapctl) | None => {
                "mount it again, and start again what runs on it"
            }
        };
        let advice = match &why {
            StaleReason::Damaged(_) => format!("mend that, then repeat this, or {again}"),
            StaleReason::Failed(_) => again.to_owned(),
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
