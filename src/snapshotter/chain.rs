//! What lies below a snapshot: directories, and below them packed layers as one merged view.

use std::collections::HashMap;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use super::catalog::Found;
use super::types::*;
use super::{Kind, Snapshotter, upper};
use crate::cow::{Chunking, UnionConfig, UpperConfig};
use crate::store::LayerName;
use crate::store::view::View;

/// The layers of a chain as a union takes them.
#[derive(Clone, Debug, Default)]
pub(super) struct Below {
    /// Those that are directories, the topmost first.
    pub(super) lowers: Vec<PathBuf>,
    /// The packed ones, which lie below all directories.
    pub(super) view: Option<Arc<View>>,
    /// The work directory of the topmost directory, if that is the upper of an active snapshot, which may be mounted.
    pub(super) work: Option<PathBuf>,
}

impl Below {
    pub(super) fn is_empty(&self) -> bool {
        self.lowers.is_empty() && self.view.is_none()
    }

    /// A read-only union.
    pub(super) fn union(self) -> UnionConfig {
        UnionConfig {
            lowers: self.lowers,
            lower_work: self.work,
            view: self.view,
            ..UnionConfig::default()
        }
    }

    /// These with the upper of the active snapshot in `dir` on top, to be read whoever uses it.
    pub(super) fn under_upper(&self, dir: &Path) -> Self {
        let mut all = self.clone();
        all.lowers.insert(0, dir.join("upper"));
        all.work = Some(dir.join("work"));
        all
    }
}

impl Snapshotter {
    /// How to open the snapshot's union in this process, for work on an active snapshot that is not
    /// mounted (unpacking a layer). The caller closes it before `mount`, `commit` or `remove`.
    pub fn union_config(&self, owner: Owner, key: &str) -> Result<UnionConfig> {
        let config = self.union_of(&self.catalog.resolve(owner, key)?)?;
        Ok(UnionConfig {
            // What is unpacked is about to be committed, and has to be whole then.
            no_metacopy: true,
            chunking: Chunking::OFF,
            ..config
        })
    }

    pub(super) fn union_of(&self, found: &Found) -> Result<UnionConfig> {
        let dir = self.data.join(&found.id);
        let mut below = self.below(found)?;
        let upper = match found.record.kind {
            Kind::Active => Some(UpperConfig {
                dir: dir.join("upper"),
                work: dir.join("work"),
            }),
            _ => None,
        };
        if below.is_empty() {
            below.lowers.push(dir.join("empty"));
        }
        Ok(UnionConfig {
            upper,
            ..below.union()
        })
    }

    /// Its own layer, if it is committed, and those below.
    pub(super) fn below(&self, found: &Found) -> Result<Below> {
        let ancestors = self.catalog.ancestors(&found.record)?;
        let ancestors: Vec<&Found> = ancestors.iter().collect();
        Ok(Below {
            lowers: self.lowers_in(found, &ancestors),
            view: self.packed.view(packed_in(found, &ancestors))?,
            work: None,
        })
    }

    /// The root directory of its own layer, if it is committed, and those below; `None` if there is no layer. No view is
    /// needed for it, unless a layer is damaged.
    pub(super) fn root_of(&self, found: &Found) -> Result<Option<upper::Root>> {
        let ancestors = self.catalog.ancestors(&found.record)?;
        let ancestors: Vec<&Found> = ancestors.iter().collect();
        if let Some(topmost) = self.lowers_in(found, &ancestors).first() {
            return upper::Root::of_directory(topmost).map(Some);
        }
        let mut layers = packed_in(found, &ancestors);
        if layers.is_empty() {
            return Ok(None);
        }
        layers.reverse();
        match self.packed.layers().root(&layers) {
            Ok(root) => Ok(Some(upper::Root::of_layers(root))),
            // All that a mount needs is in the view, if there is one.
            Err(error) => {
                tracing::warn!(%error, "the root of a snapshot is looked for in the merged view");
                upper::Root::of(self.below(found)?.union()).map(Some)
            }
        }
    }

    /// Whether there is a layer: its own, if it is committed, or one below.
    pub(super) fn has_layers(&self, found: &Found) -> Result<bool> {
        let has = |found: &Found| is_directory(found) || found.record.packed.is_some();
        // Nearly always, and then no other record is read.
        if has(found) {
            return Ok(true);
        }
        let ancestors = self.catalog.ancestors(&found.record)?;
        Ok(ancestors.iter().any(has))
    }

    /// Whether a layer of the chain is a directory.
    pub(super) fn is_on_directories(&self, found: &Found) -> Result<bool> {
        let ancestors = self.catalog.ancestors(&found.record)?;
        let ancestors: Vec<&Found> = ancestors.iter().collect();
        Ok(chain(found, &ancestors).any(is_directory))
    }

    /// The directories of a chain, the topmost first.
    pub(super) fn lowers_in(&self, found: &Found, ancestors: &[&Found]) -> Vec<PathBuf> {
        chain(found, ancestors)
            .filter_map(|found| found.record.layer.as_ref())
            .map(|layer| self.layers.lower_of(layer))
            .collect()
    }

    /// What a packed layer on `parent` lies on, the topmost first. Fails if none can lie there.
    pub(super) fn packed_below(&self, parent: &Found) -> Result<Vec<LayerName>> {
        let ancestors = self.catalog.ancestors(&parent.record)?;
        let ancestors: Vec<&Found> = ancestors.iter().collect();
        if chain(parent, &ancestors).any(is_directory) {
            return Err(Error::NotPacked {
                key: parent.record.key.clone(),
            });
        }
        Ok(packed_in(parent, &ancestors))
    }
}

/// The snapshots below one, the nearest first. Parents are older than their children, so the steps are fewer than the
/// snapshots.
pub(super) fn ancestors_among<'a>(
    found: &Found,
    by_id: &HashMap<&str, &'a Found>,
    most: usize,
) -> Vec<&'a Found> {
    let parent = |found: &Found| by_id.get(found.record.parent.as_deref()?).copied();
    std::iter::successors(parent(found), |found| parent(found))
        .take(most)
        .collect()
}

/// The packed layers of a chain, the topmost first.
pub(super) fn packed_in(found: &Found, ancestors: &[&Found]) -> Vec<LayerName> {
    chain(found, ancestors)
        .filter_map(|found| found.record.packed)
        .collect()
}

fn chain<'a>(
    found: &'a Found,
    ancestors: &'a [&'a Found],
) -> impl Iterator<Item = &'a Found> + use<'a> {
    std::iter::once(found).chain(ancestors.iter().copied())
}

/// Whether a snapshot's own layer is a directory.
fn is_directory(found: &Found) -> bool {
    found.record.layer.is_some()
}
