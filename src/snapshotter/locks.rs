//! One lock for each snapshot, held over what takes long (mounting, committing, removing), so that
//! work on one snapshot waits for no other.

use std::collections::HashMap;
use std::sync::Arc;

use parking_lot::Mutex;

#[derive(Debug, Default)]
pub(super) struct Locks {
    held: Mutex<HashMap<String, Arc<Mutex<()>>>>,
}

impl Locks {
    /// Runs `work` while nobody else runs any for the same id.
    pub(super) fn with<T>(&self, id: &str, work: impl FnOnce() -> T) -> T {
        let lock = Arc::clone(self.held.lock().entry(id.to_owned()).or_default());
        let result = {
            let _held = lock.lock();
            work()
        };
        let mut held = self.held.lock();
        // The map's and this one: nobody else waits for it.
        if Arc::strong_count(&lock) == 2 {
            held.remove(id);
        }
        result
    }
}
