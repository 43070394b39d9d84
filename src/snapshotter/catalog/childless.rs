//! Whether anything builds on a snapshot that is to go, also such of which nothing is known.

use super::damage::beginning;
use super::{Catalog, Changes, Found, parse_name};
use crate::snapshotter::types::*;

impl Catalog {
    /// Fails if anything builds on `found`, or may: a snapshot whose record cannot be used, or is gone, can come back as long as what it
    /// builds on is there. Of containerd's own, and of images' layers, others say on what they build.
    pub(in crate::snapshotter) fn check_childless(&self, found: &Found) -> Result<()> {
        let changes = self.changes.lock();
        changes.check_childless(found)?;
        if found.record.kind != Kind::Committed {
            return Ok(());
        }
        // A container's root lies on an image.
        let may_be_on_it = |owner| match found.record.owner {
            Owner::Containerd => owner == Owner::Snapctl,
            _ => matches!(owner, Owner::Snapctl | Owner::Container),
        };
        let parents = changes.unknown_parents();
        for id in changes.unread.union(&parents) {
            let may_build = match changes.oldest_on(id) {
                Some(oldest) => {
                    let on_top = changes.on_top_of(id);
                    found.record.created < oldest && on_top.iter().any(|of| may_be_on_it(of.owner))
                }
                None => match self.owner_of(id)? {
                    Some(owner) => may_be_on_it(owner),
                    None => found.record.owner != Owner::Containerd,
                },
            };
            if may_build {
                return Err(Error::MayHaveChildren {
                    key: found.record.key.clone(),
                    record: self.records.damaged(id, String::new()).path,
                });
            }
        }
        Ok(())
    }

    /// Whose the record of that id is, which cannot be used, as the index says or what can still be read of it.
    fn owner_of(&self, id: &str) -> Result<Option<Owner>> {
        if let Some(of) = self.index.find(id)?.and_then(|name| parse_name(&name)) {
            return Ok(Some(of.owner));
        }
        let mut owners = Owner::ALL.into_iter();
        Ok(owners.find(|owner| self.records.has_text(id, &beginning(*owner))))
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
