//! Mounts below which packed layers were mended.

use std::collections::BTreeMap;
use std::io;
use std::sync::Arc;
use std::time::Duration;

use super::seal::snapshot_of;
use super::{ANSWER, Mounts};
use crate::fuse::control::ControlClient;

/// How long a plyfs may take to have the kernel drop all that it keeps: dirty pages are written first.
const REFRESH: Duration = Duration::from_secs(60);

impl Mounts {
    /// Has the mounts of the snapshots whose ids are `wanted` read packed layers once more. Answers those that did not, with these
    /// ids and why.
    pub(in super::super) fn refresh(
        &self,
        mut wanted: impl FnMut(&str) -> bool,
    ) -> Vec<(String, io::Error)> {
        // In this order: one that arrives is in both for a moment, and never in none.
        let arriving: Vec<String> = self.arriving.lock().keys().cloned().collect();
        let mut all: BTreeMap<String, Option<Arc<ControlClient>>> = BTreeMap::new();
        all.extend(arriving.into_iter().map(|id| (id, None)));
        for (name, live) in &*self.shared.live.lock() {
            // Of a mount that has no place any more there is only this connection, which nobody else uses.
            let control = live.left.then(|| Arc::clone(&live.control));
            all.insert(name.clone(), control);
        }
        all.retain(|name, _| wanted(snapshot_of(name)));
        let refresh = |(name, control): (String, Option<Arc<ControlClient>>)| {
            let refreshed = match control {
                Some(control) => control.refresh(REFRESH),
                // A connection of its own: calls on one take turns, and a flush may take long.
                None => ControlClient::connect(&self.place(&name).socket(), ANSWER)
                    .and_then(|(control, _)| control.refresh(REFRESH)),
            };
            let error = refreshed.err()?;
            let is_there = self.point(&name).is_some();
            is_there.then(|| (snapshot_of(&name).to_owned(), error))
        };
        all.into_iter().filter_map(refresh).collect()
    }
}
