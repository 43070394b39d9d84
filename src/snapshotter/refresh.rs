//! Mounts that have read of packed layers what was damaged, after it was mended.

use std::collections::HashMap;
use std::io;

use super::Snapshotter;
use super::types::*;
use crate::store::LayerName;

/// A mount that may go on with what was read of packed layers before they were mended.
#[derive(Debug)]
pub struct Stale {
    /// Id of its snapshot.
    pub id: String,
    /// The snapshot, unless its record is gone or cannot be used.
    pub snapshot: Option<SnapshotInfo>,
    /// Why.
    pub why: StaleReason,
}

/// Why a mount goes on as it was.
#[derive(Debug, thiserror::Error)]
pub enum StaleReason {
    /// What the kernel keeps of this one may be all that is left of it.
    #[error("its layer {0} is damaged still")]
    Damaged(LayerName),
    /// Its plyfs does not know how, or does not answer.
    #[error("its plyfs does not read anew: {0}")]
    Failed(io::Error),
}

impl Snapshotter {
    /// If packed layers were mended since this was last done: has the mounts read them once more, and answers which did not. One that
    /// has a layer which is known to be damaged still is not asked.
    pub fn refresh_mounts(&self) -> Result<Vec<Stale>> {
        let layers = self.packed_layers();
        layers.settle_healed();
        if !layers.take_mended() {
            return Ok(Vec::new());
        }
        let all = self.list(None).inspect_err(|_| layers.note_mended())?;
        self.mounts.forget_ended();
        let mut known: HashMap<String, SnapshotInfo> = all
            .into_iter()
            .map(|info| (info.id.clone(), info))
            .collect();
        let doubted = layers.doubted();
        let damaged_of = |info: &SnapshotInfo| {
            let mut layers = info.packed_layers.iter();
            layers.find(|layer| doubted.contains(layer)).copied()
        };
        let mut stale = Vec::new();
        let failed = self.mounts.refresh(|id| match known.get(id) {
            Some(info) if info.packed_layers.is_empty() && !info.is_cut => false,
            Some(info) => match damaged_of(info) {
                Some(layer) => {
                    stale.push((id.to_owned(), StaleReason::Damaged(layer)));
                    false
                }
                None => true,
            },
            None => true,
        });
        stale.extend(
            failed
                .into_iter()
                .map(|(id, error)| (id, StaleReason::Failed(error))),
        );
        let stale = stale.into_iter().map(|(id, why)| Stale {
            snapshot: known.remove(&id),
            id,
            why,
        });
        Ok(stale.collect())
    }

    /// The same, for who has nobody to tell.
    pub fn refresh_mounts_and_log(&self) {
        match self.refresh_mounts() {
            Ok(stale) => {
                for Stale { id, why, .. } in stale {
                    tracing::warn!(id, %why, "a mount may go on with what was read of a damaged layer; start again what runs on it");
                }
            }
            Err(error) => {
                tracing::warn!(%error, "mounts may go on with what was read of a damaged layer")
            }
        }
    }
}
