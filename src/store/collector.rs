//! A thread that collects whenever something was removed.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::JoinHandle;
use std::time::Duration;

use parking_lot::{Condvar, Mutex};

use super::ingest::Observer;
use super::layers::Layers;

/// How often it looks for memory that is held for nothing.
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
            let wanted = {
                let mut state = self.state.lock();
                state.working = false;
                self.changed.notify_all();
                loop {
                    if self.cancelled() {
                        // Nobody waits for what will not be done.
                        state.wanted = None;
                        self.changed.notify_all();
                        return;
                    }
                    if let Some(wanted) = state.wanted.take() {
                        state.working = true;
                        break wanted;
                    }
                    if self.changed.wait_for(&mut state, LOOK).timed_out() {
                        layers.rest();
                    }
                }
            };
            let collected = match wanted {
                Wanted::All => layers.collect(false, self),
                Wanted::Chains => layers.collect_chains(),
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
