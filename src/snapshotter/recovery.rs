//! What `open` does about the traces of a crash. The rules are in the module's essay.

use std::collections::HashSet;
use std::fs;
use std::path::Path;
use std::sync::Arc;

use super::catalog::Found;
use super::commit::discard;
use super::types::*;
use crate::store::layer::{LayerId, LayerStore};
use crate::store::record::Damaged;
use crate::store::trash::Trash;

/// Makes the trees on disk agree with the records.
pub(super) fn mend(
    all: &[Found],
    damaged: &[Damaged],
    data: &Path,
    layers: &LayerStore,
    trash: &Arc<Trash>,
) -> Result<()> {
    // A damaged record may stand for a tree of its id in either place.
    let mut data_kept: HashSet<&str> = damaged.iter().map(|d| d.id.as_str()).collect();
    let mut layers_kept: HashSet<&str> = data_kept.clone();
    for found in all {
        match &found.record.layer {
            Some(layer) => {
                layers_kept.insert(&layer.0);
                if !layers.contains(layer) {
                    tracing::error!(
                        snapshot = found.record.key,
                        path = %layers.lower_of(layer).display(),
                        "the content of a committed snapshot is missing; remove the snapshot and pull its image again"
                    );
                }
            }
            None if found.record.kind == Kind::Committed => {}
            None => {
                data_kept.insert(&found.id);
                undo_half_commit(found, data, layers)?;
            }
        }
    }
    for entry in fs::read_dir(data).map_err(io_error("list", data))? {
        let entry = entry.map_err(io_error("list", data))?;
        let path = entry.path();
        if entry
            .file_name()
            .to_str()
            .is_none_or(|id| !data_kept.contains(id))
        {
            tracing::info!(path = %path.display(), "clearing what a crash left");
            // The upper of a committed snapshot may still be read where somebody holds a copy of its mount.
            discard(&path, trash);
        }
    }
    let stored = layers
        .list()
        .map_err(io_error("list the layers beside", data))?;
    for layer in stored
        .iter()
        .filter(|l| !layers_kept.contains(l.0.as_str()))
    {
        let path = layers.lower_of(layer);
        tracing::info!(path = %path.display(), "clearing what a crash left");
        layers
            .remove(layer, trash)
            .map_err(io_error("throw away", &path))?;
    }
    Ok(())
}

/// A commit that ended between its rename and its record did not happen.
fn undo_half_commit(found: &Found, data: &Path, layers: &LayerStore) -> Result<()> {
    let layer = LayerId(found.id.clone());
    let upper = data.join(&found.id).join("upper");
    if found.record.kind != Kind::Active || upper.exists() || !layers.contains(&layer) {
        return Ok(());
    }
    tracing::info!(
        snapshot = found.record.key,
        "undoing a commit that a crash cut short"
    );
    layers
        .give_back(&layer, &upper)
        .map_err(io_error("give back", &upper))
}
