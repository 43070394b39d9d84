//! The proof that no committed layer is ever changed: each is looked at when it was made and again before it may go.

use std::collections::BTreeMap;
use std::fs;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::sync::Mutex;
use std::time::SystemTime;

use super::snapshot::{Snapshot, age_access_times};

/// What the committed layers of a plyd were when they were first seen.
pub struct Committed {
    layers: PathBuf,
    seen: Mutex<BTreeMap<PathBuf, Snapshot>>,
    store: PathBuf,
    packed: Mutex<BTreeMap<PathBuf, File>>,
}

/// A file of the packed layers: its content, when it was made, and its mode, owner and times, that of its inode's last
/// change too.
#[derive(Debug, PartialEq)]
struct File(Vec<u8>, Option<SystemTime>, [i64; 7]);

impl File {
    /// What is there; a layer may go meanwhile.
    fn of(path: &Path) -> Option<Self> {
        let found = fs::metadata(path).ok()?;
        let look = [
            i64::from(found.mode()),
            i64::from(found.uid()),
            i64::from(found.gid()),
            found.mtime(),
            found.mtime_nsec(),
            found.ctime(),
            found.ctime_nsec(),
        ];
        Some(Self(fs::read(path).ok()?, found.created().ok(), look))
    }

    /// Whether it is what it was, or another of the same content: one may be collected and come again.
    fn is_still(&self, before: &Self) -> bool {
        self == before || self.1 != before.1 && self.0 == before.0
    }
}

impl Committed {
    /// Those of the plyd on `root`; none is known yet.
    pub fn of(root: &Path) -> Self {
        Self {
            layers: root.join("layers"),
            seen: Mutex::default(),
            store: root.join("store"),
            packed: Mutex::default(),
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
        let mut packed = self.packed.lock().unwrap();
        for dir in ["packs", "objects", "layers", "records"] {
            for path in files(&self.store.join(dir)) {
                if !packed.contains_key(&path)
                    && let Some(file) = File::of(&path)
                {
                    packed.insert(path, file);
                }
            }
        }
    }

    /// Fails if a layer that is still there differs by one byte, time or attribute. Answers how many were compared.
    pub fn check(&self) -> usize {
        let seen = self.seen.lock().unwrap();
        let packed = self.packed.lock().unwrap();
        let files = packed
            .iter()
            .filter_map(|(path, before)| Some((path, before, File::of(path)?)))
            .inspect(|(path, before, now)| {
                assert!(now.is_still(before), "{} has changed", path.display())
            })
            .count();
        let there = seen.iter().filter(|(path, _)| path.exists());
        there
            .inspect(|(path, before)| before.assert_same(path))
            .count()
            + files
    }
}

/// Every file below `dir`, as far as it is still there.
fn files(dir: &Path) -> Vec<PathBuf> {
    let mut found = Vec::new();
    let mut waiting = vec![dir.to_owned()];
    while let Some(dir) = waiting.pop() {
        for entry in fs::read_dir(dir).into_iter().flatten().flatten() {
            match entry.file_type() {
                Ok(kind) if kind.is_dir() => waiting.push(entry.path()),
                _ => found.push(entry.path()),
            }
        }
    }
    found
}
