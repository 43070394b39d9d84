//! The proof that no committed layer is ever changed: each is looked at when it was made and again before it may go.

use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};
use std::sync::Mutex;

use super::snapshot::{Snapshot, age_access_times};

/// What the committed layers of a plyd were when they were first seen.
pub struct Committed {
    layers: PathBuf,
    seen: Mutex<BTreeMap<PathBuf, Snapshot>>,
}

impl Committed {
    /// Those of the plyd on `root`; none is known yet.
    pub fn of(root: &Path) -> Self {
        Self {
            layers: root.join("layers"),
            seen: Mutex::default(),
        }
    }

    /// Looks at the layers that are new. To be called when a commit has been acknowledged, and none is under way.
    pub fn remember(&self) {
        let mut seen = self.seen.lock().unwrap();
        for entry in fs::read_dir(&self.layers).unwrap() {
            let layer = entry.unwrap().path();
            seen.entry(layer).or_insert_with_key(|path| {
                age_access_times(path);
                Snapshot::of(path)
            });
        }
    }

    /// Fails if a layer that is still there differs by one byte, time or attribute. Answers how many were compared.
    pub fn check(&self) -> usize {
        let seen = self.seen.lock().unwrap();
        let there = seen.iter().filter(|(path, _)| path.exists());
        there
            .inspect(|(path, before)| before.assert_same(path))
            .count()
    }
}
