//! What the last plyd left: containers that run, containers that ended meanwhile, and halves.

use std::collections::BTreeSet;
use std::fs;
use std::path::Path;
use std::sync::Arc;

use tokio::time::{Duration, Instant, timeout_at};

use super::error::io_error;
use super::life::START_LIMIT;
use super::{Containers, Entry, Result, blocking};
use crate::runtime::client::{self, ShimClient};
use crate::runtime::state::{RunState, Status};
use crate::runtime::wire::{Reply, Request};

/// How long plyd waits in all for the shims of its containers before it serves.
const PATIENCE: Duration = Duration::from_secs(3);

impl Containers {
    /// Fills the table and mends what is broken. One container's trouble is logged and does not keep the
    /// others from being found.
    pub(super) async fn recover(&self) -> Result<()> {
        let this = self.clone();
        let (listing, roots, dirs) = blocking(move || {
            let mut dirs = directories(&this.0.dir)?;
            dirs.extend(directories(&this.0.run_dir)?);
            dirs.extend(directories(&this.0.oci_root)?);
            Ok((this.0.records.list()?, this.0.roots.list()?, dirs))
        })
        .await?;
        let mut known: BTreeSet<String> = BTreeSet::new();
        for damaged in listing.damaged {
            tracing::error!("{damaged}");
            known.insert(damaged.id.clone());
            let mut table = self.0.table.lock();
            table.damaged.insert(damaged.id.clone(), damaged);
        }
        let mut tasks = Vec::new();
        for (id, record) in listing.records {
            known.insert(id.clone());
            let entry = Arc::new(Entry::new(id.clone(), record, RunState::default()));
            self.0.table.lock().entries.insert(id, Arc::clone(&entry));
            let this = self.clone();
            tasks.push(tokio::spawn(async move {
                if let Err(error) = this.rediscover(&entry).await {
                    tracing::error!(container = entry.id, %error, "cannot find out how it is");
                    return;
                }
                let was_to_start = entry.record.auto_remove && entry.record.starts_next;
                if was_to_start && entry.state().status == Status::Created {
                    this.remove_unstarted(&entry).await;
                }
            }));
        }
        // A shim that hangs must not keep plyd from serving: whoever asks for its container waits for it.
        let deadline = Instant::now() + PATIENCE;
        for task in tasks {
            match timeout_at(deadline, task).await {
                Ok(Ok(())) => {}
                Ok(Err(error)) => {
                    tracing::error!(%error, "an operation on containers failed");
                }
                Err(_) => tracing::warn!("a shim does not answer; waiting for it goes on"),
            }
        }
        let orphans = roots
            .into_iter()
            .chain(dirs)
            .filter(|id| !known.contains(id));
        for id in orphans.collect::<BTreeSet<_>>() {
            tracing::info!(container = id, "clearing what a crash left");
            self.end_orphaned_shim(&id).await;
            if let Err(error) = self.clear(&id).await {
                tracing::warn!(container = id, %error, "cannot clear what a crash left");
            }
        }
        Ok(())
    }

    /// Takes in records that could not be used when plyd started, if they can be now; says of which containers, in words. One whose name
    /// another container has got since is left.
    pub async fn take_put_back(&self) -> Result<Vec<String>> {
        let this = self.clone();
        let found = blocking(move || {
            let damaged: Vec<String> = this.0.table.lock().damaged.keys().cloned().collect();
            let records = damaged.into_iter().filter_map(|id| {
                let record = this.0.records.get(&id).ok()??;
                Some((id, record))
            });
            Ok(records.collect::<Vec<_>>())
        })
        .await?;
        let mut taken = Vec::new();
        for (id, record) in found {
            let entry = Arc::new(Entry::new(id.clone(), record, RunState::default()));
            let name = entry.record.name.clone();
            {
                let mut table = self.0.table.lock();
                let mut entries = table.entries.values();
                let is_taken = entries.any(|other| other.record.name == name);
                if is_taken || table.reserved.contains(&name) {
                    tracing::warn!(
                        container = id,
                        name,
                        "its record was put back, but its name is another's now"
                    );
                    continue;
                }
                table.damaged.remove(&id);
                table.entries.insert(id, Arc::clone(&entry));
            }
            if let Err(error) = self.rediscover(&entry).await {
                tracing::error!(container = entry.id, %error, "cannot find out how it is");
            }
            taken.push(format!("the container {name}"));
        }
        Ok(taken)
    }

    async fn rediscover(&self, entry: &Arc<Entry>) -> Result<()> {
        let _held = entry.lock.lock().await;
        match self.ask_shim(entry).await {
            Ok((state, watcher)) => match state.status {
                Status::Running => {
                    tracing::info!(container = entry.id, pid = state.pid, "found running");
                    let start = entry.publish_start(state);
                    self.watch(entry, start, watcher);
                }
                // It has just ended, or waits to be started again.
                Status::Stopped => {
                    entry.publish(state);
                    self.end_shim(entry).await?;
                    self.settle(entry).await?;
                }
                Status::Created => entry.publish(state),
            },
            Err(client::Error::Absent | client::Error::Gone) => {
                let state = self.after_shim(&entry.id).await?;
                let status = state.status;
                entry.publish(state);
                if status == Status::Stopped {
                    self.settle(entry).await?;
                }
            }
            Err(error) => return Err(error.into()),
        }
        Ok(())
    }

    /// Removes a container whose start the last plyd did not live to see: whoever wanted it was told that it failed.
    async fn remove_unstarted(&self, entry: &Arc<Entry>) {
        tracing::info!(
            container = entry.id,
            "removing what was created for a run that never began"
        );
        if let Err(error) = self.remove(&entry.id, true).await {
            tracing::warn!(container = entry.id, %error, "it stays");
        }
    }

    /// The state that the container's shim tells, and a connection that waits for the end.
    async fn ask_shim(&self, entry: &Entry) -> client::Result<(RunState, ShimClient)> {
        let run_dir = self.run_dir(&entry.id);
        let mut watcher = ShimClient::connect(&run_dir).await?;
        let state = match watcher.ask_within(START_LIMIT, &Request::State).await? {
            Reply::State(state) => state,
            other => return Err(client::Error::Unexpected(format!("{other:?}"))),
        };
        watcher.send(&Request::Wait).await?;
        Ok((state, watcher))
    }

    /// A shim may live whose container's record is gone: plyd died between the two.
    async fn end_orphaned_shim(&self, id: &str) {
        let Ok(mut client) = ShimClient::connect(&self.run_dir(id)).await else {
            return;
        };
        let kill = Request::Signal {
            signal: libc::SIGKILL,
        };
        // Either of the two applies.
        let _ = client.ask(&kill).await;
        let _ = client.ask(&Request::Shutdown).await;
        let _ = tokio::time::timeout(client::PATIENCE, client.until_gone()).await;
    }
}

/// The names of the directories in `dir` that can be containers' ids.
fn directories(dir: &Path) -> Result<Vec<String>> {
    let read = || -> std::io::Result<Vec<String>> {
        let mut names = Vec::new();
        for entry in fs::read_dir(dir)? {
            let entry = entry?;
            let name = entry.file_name().to_string_lossy().into_owned();
            let is_id = name.len() == 64 && name.bytes().all(|byte| byte.is_ascii_hexdigit());
            if is_id && entry.file_type()?.is_dir() {
                names.push(name);
            }
        }
        Ok(names)
    };
    read().map_err(io_error("list", dir))
}
