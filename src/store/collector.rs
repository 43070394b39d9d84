//! A thread that collects whenever something was removed.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::JoinHandle;
use std::time::Duration;

use parking_lot::{Condvar, Mutex};

use super::ingest::Observer;
use super::layers::Layers;

/// After how long it looks for memory that is held for nothing where nobody asks for anything.
const LOOK: Duration = Duration::from_secs(30);

/// Collects in the background. Dropped, it ends the collection under way.
#[derive(Debug)]
pub struct Collector {
    shared: Arc<Shared>,
    thread: Option<JoinHandle<()>>,
}

#[derive(Debug, Default)]
struct Shared {
    state: Mutex<State>,
    changed: Condvar,
    ending: AtomicBool,
}

#[derive(Debug, Default)]
struct State {
    wanted: Option<Wanted>,
    working: bool,
}

/// How much is to be collected; more comes later.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
enum Wanted {
    /// Views that are of no use.
    Views,
    /// What no layer needs, too.
    All,
}

impl Observer for Shared {
    fn cancelled(&self) -> bool {
        self.ending.load(Ordering::Acquire)
    }
}

impl Collector {
    /// Begins with a collection: a crash may have left something.
    pub fn start(layers: Arc<Layers>) -> std::io::Result<Self> {
        let shared = Arc::new(Shared::default());
        shared.state.lock().wanted = Some(Wanted::All);
        let of_thread = Arc::clone(&shared);
        let thread = std::thread::Builder::new()
            .name("collector".to_owned())
            .spawn(move || of_thread.work(&layers))?;
        Ok(Self {
            shared,
            thread: Some(thread),
        })
    }

    /// Asks for a collection and does not wait for it.
    pub fn ask(&self) {
        self.want(Wanted::All);
    }

    /// Asks for a collection of views alone and does not wait for it.
    pub fn ask_for_views(&self) {
        self.want(Wanted::Views);
    }

    fn want(&self, what: Wanted) {
        let mut state = self.shared.state.lock();
        state.wanted = state.wanted.max(Some(what));
        drop(state);
        self.shared.changed.notify_all();
    }

    /// Waits until what was asked for is done.
    pub fn wait_until_idle(&self) {
        let mut state = self.shared.state.lock();
        while state.wanted.is_some() || state.working {
            self.shared.changed.wait(&mut state);
        }
    }
}

impl Drop for Collector {
    fn drop(&mut self) {
        {
            // With the lock, so that the thread does not miss it between its look and its sleep.
            let _state = self.shared.state.lock();
            self.shared.ending.store(true, Ordering::Release);
        }
        self.shared.changed.notify_all();
        if let Some(thread) = self.thread.take() {
            // A panic in there was reported when it happened.
            let _ = thread.join();
        }
    }
}

impl Shared {
    fn work(&self, layers: &Layers) {
        loop {
            // Not with the lock: who asks for something does not wait for it.
            layers.rest();
            let wanted = {
                let mut state = self.state.lock();
                state.working = false;
                self.changed.notify_all();
                if state.wanted.is_none() && !self.cancelled() {
                    self.changed.wait_for(&mut state, LOOK);
                }
                if self.cancelled() {
                    // Nobody waits for what will not be done.
                    state.wanted = None;
                    self.changed.notify_all();
                    return;
                }
                let Some(wanted) = state.wanted.take() else {
                    continue;
                };
                state.working = true;
                wanted
            };
            let collected = match wanted {
                Wanted::All => layers.collect(false, self),
                Wanted::Views => layers.collect_useless_views(),
            };
            for error in &collected.errors {
                tracing::error!(%error, "a collection left something");
            }
            if !collected.orphans.is_empty() {
                tracing::info!(
                    files = collected.orphans.len(),
                    bytes = collected.bytes(),
                    "collected what no layer needs"
                );
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::super::ingest::Settings;
    use super::super::layers::Expected;
    use super::*;

    /// Where something was removed more often than every half minute, it stayed for good.
    #[test]
    fn memory_that_is_held_for_nothing_goes_whatever_else_is_collected() {
        let tmp = tempfile::tempdir().unwrap();
        let (layers, _) = Layers::open(tmp.path(), Settings::default()).unwrap();
        let layer = layers.import(&[0; 1024][..], &Expected::default(), &());
        layers.check(&[layer.unwrap()]).unwrap();
        let layers = Arc::new(layers);
        let collector = Collector::start(Arc::clone(&layers)).unwrap();
        collector.wait_until_idle();
        assert!(layers.has_merged());
        layers.forget_time_of_merge();
        collector.ask();
        collector.wait_until_idle();
        assert!(!layers.has_merged());
    }
}
