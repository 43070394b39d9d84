//! Whether anything builds on a snapshot that is to go, also such of which nothing is known.

use super::{Catalog, Changes, Found, parse_name};
use crate::snapshotter::types::*;

impl Catalog {
    /// Fails if anything builds on `found`, or may: a snapshot whose record cannot be used, or is gone, can come back as long as what it
    /// builds on is there. What containerd builds on its own it knows itself.
    pub(in crate::snapshotter) fn check_childless(&self, found: &Found) -> Result<()> {
        let changes = self.changes.lock();
        changes.check_childless(found)?;
        if found.record.kind != Kind::Committed {
            return Ok(());
        }
        for id in self.strays(&changes)? {
            // One that cannot be read is looked at below.
            if let Ok(Some(record)) = self.records.get(&id)
                && record.parent.as_ref() == Some(&found.id)
            {
                return Err(self.may_build(&id, found));
            }
        }
        let parents = changes.unknown_parents();
        for id in changes.unread.union(&parents) {
            let may_build = match changes.oldest_on(id) {
                Some(oldest) => {
                    // All that an image needs of its layers it says itself.
                    found.record.created < oldest
                        && changes.on_top_of(id).iter().any(|of| is_own(of.owner))
                }
                None => {
                    let of = self.index.find(id)?.and_then(|name| parse_name(&name));
                    // Nobody can tell then whose it is.
                    of.map_or(found.record.owner != Owner::Containerd, |of| {
                        is_own(of.owner)
                    })
                }
            };
            if may_build {
                return Err(self.may_build(id, found));
            }
        }
        Ok(())
    }

    fn may_build(&self, id: &str, on: &Found) -> Error {
        Error::MayHaveChildren {
            key: on.record.key.clone(),
            record: self.records.damaged(id, String::new()).path,
        }
    }
}

impl Changes {
    /// Fails if anything that is known builds on `found`.
    pub(super) fn check_childless(&self, found: &Found) -> Result<()> {
        match self.children(Some(&found.id)).len() {
            0 => Ok(()),
            children => Err(Error::HasChildren {
                key: found.record.key.clone(),
                children,
            }),
        }
    }

    /// When the first was made of what is known to build on the snapshot of that id, which is older.
    fn oldest_on(&self, id: &str) -> Option<u64> {
        let known = self.known.values();
        let on_it = known.filter(|record| record.parent.as_deref() == Some(id));
        on_it.map(|record| record.created).min()
    }
}

/// Whether only the records of such snapshots say on which of them, and of images' layers, they build.
fn is_own(owner: Owner) -> bool {
    matches!(owner, Owner::Snapctl | Owner::Container)
}
