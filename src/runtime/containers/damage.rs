//! Records of containers that cannot be used.

use std::sync::Arc;

use super::{Containers, Entry, Result, blocking};
use crate::runtime::state::{RunState, STATE_RECORD};
use crate::store::record::{Damaged, RecordDir};

impl Containers {
    /// Records that cannot be used now, or are gone though their containers are not, each with what it is of, in words.
    /// Blocks.
    pub fn damaged_records(&self) -> Result<Vec<(Damaged, String)>> {
        let entries = self.entries();
        let ids = entries.iter().map(|entry| entry.id.clone());
        let mut found = Vec::new();
        for damaged in self.0.records.examine(ids)? {
            match entries.iter().find(|entry| entry.id == damaged.id) {
                Some(entry) if !self.is_unsound(entry) => {}
                Some(entry) => {
                    let of = format!("the container {}", entry.record.name);
                    found.push((damaged.known(), of));
                }
                None => {
                    let of = format!("the container {}", damaged.id);
                    found.push((damaged, of));
                }
            }
        }
        for entry in entries {
            // Its shim writes it, and the directory goes with the container.
            let states = RecordDir::<RunState>::of_another(&self.dir(&entry.id).join("state"));
            if let Some(damaged) = states.problem_of(STATE_RECORD) {
                let of = format!("the state of the container {}", entry.record.name);
                found.push((damaged, of));
            }
        }
        Ok(found)
    }

    /// How many containers there are besides those that are known: their records could not be used when plyd started.
    pub fn unusable(&self) -> usize {
        self.0.table.lock().damaged.len()
    }

    /// Writes records anew that cannot be used, or are gone, of containers that are known all the same; says what they are of,
    /// in words.
    pub async fn mend_records(&self) -> Result<Vec<String>> {
        let mut mended = Vec::new();
        for entry in self.entries() {
            let this = self.clone();
            let written = blocking(move || {
                if !this.is_unsound(&entry) || this.0.records.is_newer(&entry.id) {
                    return Ok(None);
                }
                let _held = entry.lock.blocking_lock();
                // Removed meanwhile, it has none.
                if !this.0.table.lock().entries.contains_key(&entry.id) {
                    return Ok(None);
                }
                this.0.records.put(&entry.id, &entry.record)?;
                Ok(Some(format!("the container {}", entry.record.name)))
            });
            mended.extend(written.await?);
        }
        Ok(mended)
    }

    fn entries(&self) -> Vec<Arc<Entry>> {
        self.0.table.lock().entries.values().cloned().collect()
    }

    fn is_unsound(&self, entry: &Entry) -> bool {
        // Whoever removes it holds this.
        let held = entry.lock.try_lock();
        let is_known = held.is_ok() && self.0.table.lock().entries.contains_key(&entry.id);
        self.0.records.is_unsound(&entry.id, is_known)
    }
}
