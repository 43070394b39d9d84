//! One container in plyd's memory.

use tokio::sync::{Mutex, watch};

use super::{ContainerRecord, Roots};
use crate::runtime::state::{RunState, Status};

/// What is said of a container whose mount has failed under it.
pub(super) const ROOT_IS_GONE: &str =
    "the plyfs that served its root has ended: every access to its files fails";

/// A container, for whoever asks.
#[derive(Clone, Debug)]
pub struct Container {
    /// 64 hex digits.
    pub id: String,
    /// As it was created.
    pub record: ContainerRecord,
    /// How it is.
    pub state: RunState,
    /// It runs, and whether its root can be used cannot be told; the state's error says why.
    pub root_unknown: bool,
}

/// A container in the table.
#[derive(Debug)]
pub struct Entry {
    /// 64 hex digits.
    pub id: String,
    /// As it was created.
    pub record: ContainerRecord,
    /// Held by start, by the cleaning up after its end, and by removal.
    pub(super) lock: Mutex<()>,
    pub(super) seen: watch::Sender<Seen>,
}

/// What can be seen of a container at one moment.
#[derive(Clone, Debug)]
pub(super) struct Seen {
    pub(super) state: RunState,
    /// How often it has been started, and has ended, under this plyd.
    pub(super) starts: u64,
    pub(super) ends: u64,
    /// How it was when it ended last.
    pub(super) ended: Option<RunState>,
    /// Nothing is left to clean up after its last end.
    pub(super) settled: bool,
    pub(super) removed: bool,
}

impl Entry {
    pub(super) fn new(id: String, record: ContainerRecord, state: RunState) -> Self {
        Self {
            id,
            record,
            lock: Mutex::new(()),
            seen: watch::Sender::new(Seen {
                ended: end_of(&state),
                state,
                starts: 0,
                ends: 0,
                settled: true,
                removed: false,
            }),
        }
    }

    pub(super) fn state(&self) -> RunState {
        self.seen.borrow().state.clone()
    }

    pub(super) fn runs(&self) -> bool {
        self.seen.borrow().state.status == Status::Running
    }

    pub(super) fn removed(&self) -> bool {
        self.seen.borrow().removed
    }

    /// Tells everybody of a new state.
    pub(super) fn publish(&self, state: RunState) {
        self.seen.send_modify(|seen| {
            if let Some(end) = end_of(&state) {
                seen.ended = Some(end);
                seen.ends += 1;
            }
            seen.state = state;
        });
    }

    /// Tells everybody that it runs; answers which start this was.
    pub(super) fn publish_start(&self, state: RunState) -> u64 {
        self.seen.send_modify(|seen| {
            seen.state = state;
            seen.starts += 1;
            seen.settled = false;
        });
        self.current_start()
    }

    pub(super) fn current_start(&self) -> u64 {
        self.seen.borrow().starts
    }

    pub(super) fn publish_settled(&self) {
        self.seen.send_modify(|seen| seen.settled = true);
    }

    pub(super) fn publish_removed(&self) {
        self.seen.send_modify(|seen| {
            seen.settled = true;
            seen.removed = true;
        });
    }

    /// As it is, with a word about its root if that has failed under it.
    pub(super) fn look(&self, roots: &dyn Roots) -> Container {
        let mut state = self.state();
        let mut root_unknown = false;
        if state.status == Status::Running {
            match roots.is_served(&self.id) {
                Ok(true) => {}
                Ok(false) => state.error = format!("{ROOT_IS_GONE}; stop it and start it again"),
                Err(error) => {
                    root_unknown = true;
                    state.error = format!("how its root is cannot be told: {error}");
                }
            }
        }
        Container {
            id: self.id.clone(),
            record: self.record.clone(),
            state,
            root_unknown,
        }
    }
}

fn end_of(state: &RunState) -> Option<RunState> {
    (state.status == Status::Stopped).then(|| state.clone())
}
