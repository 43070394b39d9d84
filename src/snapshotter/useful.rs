//! Which merged views are worth their place on the disk.
//!
//! The view of a chain is of use if its snapshot is active or to be looked at, or if nothing committed builds on it: it
//! is the top of an image then, and the next container lies on it. So it is, whatever builds on it, where plyd knows the image. What lies
//! between the layers of an image is mounted while the image is unpacked and hardly ever again.

use std::collections::HashSet;
use std::sync::Arc;

use parking_lot::Mutex;

use super::catalog::{Catalog, Found};
use super::types::*;
use super::{Snapshotter, chain};
use crate::store::ViewKey;
use crate::store::layers::chains::Chains;

/// Answers from what the records say.
#[derive(Debug)]
pub(super) struct Useful {
    catalog: Arc<Catalog>,
    /// Keys of the topmost snapshots of images; none if the images are not known.
    tops: Mutex<Option<HashSet<String>>>,
}

impl Useful {
    pub(super) fn new(catalog: Arc<Catalog>) -> Self {
        Self {
            catalog,
            tops: Mutex::default(),
        }
    }
}

impl Chains for Useful {
    fn useful(&self) -> Option<HashSet<ViewKey>> {
        let tops = self.tops.lock().clone()?;
        let all = self.catalog.all_known()?;
        let by_id = all.iter().map(|found| (found.id.as_str(), found)).collect();
        let committed = all.iter().filter(|found| is_committed(found));
        let built_on: HashSet<&str> = committed
            .filter_map(|found| found.record.parent.as_deref())
            .collect();
        let is_top = |found: &Found| {
            let Found { id, record } = found;
            !is_committed(found)
                || !built_on.contains(id.as_str())
                || (record.owner == Owner::Image && tops.contains(&record.key))
        };
        let useful = all.iter().filter(|found| is_top(found)).map(|found| {
            let ancestors = chain::ancestors_among(found, &by_id, all.len());
            let mut layers = chain::packed_in(found, &ancestors);
            layers.reverse();
            ViewKey::of(&layers)
        });
        Some(useful.collect())
    }
}

fn is_committed(found: &Found) -> bool {
    found.record.kind == Kind::Committed
}

impl Snapshotter {
    /// Says which snapshots of [`Owner::Image`] are the topmost of images, or that nobody knows. Until it is said, no
    /// view counts as useless.
    pub fn set_tops(&self, tops: Option<HashSet<String>>) {
        *self.useful.tops.lock() = tops;
    }
}

#[cfg(test)]
mod tests;
