//! Watching for the ends of containers, and cleaning up after them.

use std::sync::Arc;
use std::time::SystemTime;

use super::{Containers, Entry, Error, Result, blocking};
use crate::runtime::client::ShimClient;
use crate::runtime::state::{RunState, STATE_RECORD, Status};
use crate::runtime::wire::Reply;
use crate::store::record::{self, RecordDir};

/// The exit code of a container whose shim was killed: that of SIGKILL, which it then gets, too.
const LOST: i32 = 137;

impl Containers {
    /// Sees to the end of start number `start`, which `watcher` has been told to wait for.
    pub(super) fn watch(&self, entry: &Arc<Entry>, start: u64, watcher: ShimClient) {
        let (this, entry) = (self.clone(), Arc::clone(entry));
        tokio::spawn(async move {
            if let Err(error) = this.see_to_end(&entry, start, watcher).await {
                tracing::error!(container = entry.id, %error, "cannot clean up after its end");
            }
            if entry.current_start() == start {
                entry.publish_settled();
            }
        });
    }

    async fn see_to_end(
        &self,
        entry: &Arc<Entry>,
        start: u64,
        mut watcher: ShimClient,
    ) -> Result<()> {
        match watcher.hear().await {
            Ok(Reply::Exit {
                code,
                oom_killed,
                finished,
            }) => entry.publish(RunState {
                status: Status::Stopped,
                pid: 0,
                exit_code: code,
                oom_killed,
                finished: Some(finished),
                ..entry.state()
            }),
            other => {
                tracing::warn!(container = entry.id, ?other, "its shim has gone");
                let _held = entry.lock.lock().await;
                let state = self.after_shim(&entry.id).await?;
                entry.publish(state);
            }
        }
        let _held = entry.lock.lock().await;
        if entry.current_start() != start || entry.removed() {
            // Started again before we came to it: the new start has its own watch.
            return Ok(());
        }
        self.end_shim(entry).await?;
        self.settle(entry).await
    }

    /// What a container has become whose shim does not live: what the shim wrote last, unless that says
    /// that it runs; then it is killed, and that is written.
    pub(super) async fn after_shim(&self, id: &str) -> Result<RunState> {
        let dir = self.dir(id).join("state");
        let read = blocking(move || {
            let records = RecordDir::<RunState>::open(&dir)?;
            Ok(records.get(STATE_RECORD)?.unwrap_or_default())
        });
        let mut state = match read.await {
            // Whoever restores the file gets what it says; so nothing is written over it.
            Err(Error::Record(record::Error::Damaged(damaged))) => {
                tracing::error!(container = id, error = %damaged, "what became of it is not known");
                self.kill_leftover(id).await?;
                return Ok(RunState {
                    status: Status::Stopped,
                    exit_code: LOST,
                    error: damaged.to_string(),
                    ..RunState::default()
                });
            }
            read => read?,
        };
        self.kill_leftover(id).await?;
        if state.status == Status::Running {
            state = RunState {
                status: Status::Stopped,
                pid: 0,
                exit_code: LOST,
                finished: Some(SystemTime::now()),
                error: "its plyshim was killed, or the host went down; how it ended is not known"
                    .to_owned(),
                ..state
            };
            self.save_state(id, &state).await?;
        }
        Ok(state)
    }

    /// Gives back what a stopped container does not need; removes one that wants that.
    pub(super) async fn settle(&self, entry: &Arc<Entry>) -> Result<()> {
        if entry.record.auto_remove && entry.state().status == Status::Stopped {
            return self.remove_locked(entry).await;
        }
        let (roots, id) = (Arc::clone(&self.0.roots), entry.id.clone());
        match blocking(move || Ok(roots.unmount(&id)?)).await {
            // The mount is gone all the same; what matters is what the container's user should know.
            Err(Error::Root(error)) => {
                tracing::error!(container = entry.id, %error, "its root failed");
                let state = RunState {
                    error: "the plyfs that served its root died or did not answer: what it wrote \
                            last may be lost; start it again to go on with what there is"
                        .to_owned(),
                    ..entry.state()
                };
                self.save_state(&entry.id, &state).await?;
                entry.publish(state);
                Ok(())
            }
            result => result,
        }
    }
}
