//! Start, stop, kill, wait, remove.

use std::fs;
use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use nix::unistd::Pid;
use tokio::time::timeout;

use super::create::{make_readable, remove_tree};
use super::entry::Seen;
use super::error::io_error;
use super::{Containers, Entry, Error, Result, blocking, detached};
use crate::runtime::client::{self, ShimClient};
use crate::runtime::oci::{self, ENGINE_FAILED};
use crate::runtime::shim;
use crate::runtime::state::{RunState, STATE_RECORD, Status};
use crate::runtime::wire::{Reply, Request, Window};
use crate::store::create_dir;
use crate::store::record::RecordDir;
use crate::sys::child;

/// How long the OCI runtime may take to start a container.
pub(super) const START_LIMIT: Duration = Duration::from_secs(120);
/// How long a process may take to end after SIGKILL, and its shim to clean up.
pub(super) const END_LIMIT: Duration = Duration::from_secs(30);
/// How many seconds `stop` waits before SIGKILL if nothing else is asked for.
pub const STOP_SECONDS: u32 = 10;

impl Containers {
    /// Runs the container's process.
    pub async fn start(&self, reference: &str, window: Option<Window>) -> Result<()> {
        let entry = self.find(reference)?;
        let this = self.clone();
        detached(async move {
            let _held = entry.lock.lock().await;
            this.start_locked(&entry, window).await
        })
        .await
    }

    async fn start_locked(&self, entry: &Arc<Entry>, window: Option<Window>) -> Result<()> {
        let name = || entry.record.name.clone();
        if entry.removed() {
            return Err(Error::Removed { name: name() });
        }
        match entry.state().status {
            Status::Running => return Err(Error::Running { name: name() }),
            // The shim of the last run may still be cleaning up.
            Status::Stopped => self.end_shim(entry).await?,
            Status::Created => {}
        }
        self.oci_runtime().await?;
        let (this, prepared) = (self.clone(), Arc::clone(entry));
        blocking(move || this.prepare_bundle(&prepared)).await?;
        let mut client = self.shim(entry).await?;
        // Connected before the start: a container may have come and gone by the time that it is known.
        let mut watcher = ShimClient::connect(&self.run_dir(&entry.id)).await?;
        watcher.send(&Request::Wait).await?;
        let answer = client
            .ask_within(START_LIMIT, &Request::Start { window })
            .await;
        let error = match answer {
            Ok(Reply::State(state)) => {
                let start = entry.publish_start(state);
                self.watch(entry, start, watcher);
                return Ok(());
            }
            Ok(other) => client::Error::Unexpected(format!("{other:?}")),
            Err(error) => error,
        };
        let (exit_code, message) = match error {
            client::Error::Refused { exit_code, message } => (exit_code, message),
            error => {
                // Whether it runs is not known; after this, it does not.
                kill_shim(&mut client).await;
                self.kill_leftover(&entry.id).await?;
                (ENGINE_FAILED, error.to_string())
            }
        };
        let failed = RunState {
            exit_code,
            error: message.clone(),
            ..entry.state()
        };
        self.write_state(&entry.id, &failed, &mut client).await?;
        entry.publish(failed);
        let (roots, id) = (Arc::clone(&self.0.roots), entry.id.clone());
        if let Err(error) = blocking(move || Ok(roots.unmount(&id)?)).await {
            tracing::warn!(container = entry.id, %error, "its root stays mounted");
        }
        Err(Error::Start {
            name: name(),
            exit_code,
            message,
        })
    }

    /// Writes the state of a container that has no shim; a shim that lives has written its own.
    async fn write_state(&self, id: &str, state: &RunState, client: &mut ShimClient) -> Result<()> {
        if client.ask(&Request::State).await.is_ok() {
            return Ok(());
        }
        self.save_state(id, state).await
    }

    pub(super) async fn save_state(&self, id: &str, state: &RunState) -> Result<()> {
        let dir = self.dir(id).join("state");
        let state = state.clone();
        blocking(move || Ok(RecordDir::open(&dir)?.put(STATE_RECORD, &state)?)).await
    }

    /// Brings the bundle up to date: the root is mounted, the files that it binds are the host's of today.
    fn prepare_bundle(&self, entry: &Entry) -> Result<()> {
        let root = self.0.roots.mount(&entry.id)?;
        let bundle = self.bundle_dir(&entry.id);
        let config = bundle.join("config.json");
        let text = fs::read(&config).map_err(io_error("read", &config))?;
        let mut spec: serde_json::Value = serde_json::from_slice(&text)
            .map_err(|error| io_error("read", &config)(error.into()))?;
        if spec["root"]["path"] != serde_json::json!(root) {
            spec["root"]["path"] = serde_json::json!(root);
            super::create::write_durable(&config, spec.to_string().as_bytes())?;
        }
        let write = |name: &str, content: &str| {
            let path = bundle.join(name);
            fs::write(&path, content).map_err(io_error("write", &path))?;
            make_readable(&path)
        };
        write("hostname", &format!("{}\n", entry.record.hostname))?;
        write("hosts", &hosts_file(entry.record.host_network))?;
        let resolv = fs::read_to_string("/etc/resolv.conf").unwrap_or_default();
        write("resolv.conf", &resolv)
    }

    /// A connection to the container's shim, which is started if it does not run. To be called with the
    /// container's lock held.
    pub(super) async fn shim(&self, entry: &Entry) -> Result<ShimClient> {
        let run_dir = self.run_dir(&entry.id);
        match ShimClient::connect(&run_dir).await {
            Err(client::Error::Absent | client::Error::Gone) => {}
            result => return Ok(result?),
        }
        create_dir(&run_dir, 0o700).map_err(io_error("make", &run_dir))?;
        let config = shim::Config {
            id: entry.id.clone(),
            dir: self.dir(&entry.id),
            run_dir: run_dir.clone(),
            runtime: self.oci_runtime().await?.path.clone(),
            runtime_root: self.0.oci_root.clone(),
            tty: entry.record.tty,
            stdin: entry.record.open_stdin,
        };
        client::launch(&self.plyshim()?, &config).await?;
        Ok(ShimClient::connect(&run_dir).await?)
    }

    /// Has the shim of a container that does not run end, and waits until it has.
    pub(super) async fn end_shim(&self, entry: &Entry) -> Result<()> {
        let mut client = match ShimClient::connect(&self.run_dir(&entry.id)).await {
            Err(client::Error::Absent | client::Error::Gone) => return Ok(()),
            result => result?,
        };
        match client.ask(&Request::Shutdown).await {
            Ok(_) | Err(client::Error::Gone) => {}
            Err(error) => tracing::warn!(container = entry.id, %error, "its shim does not end"),
        }
        if timeout(END_LIMIT, client.until_gone()).await.is_err() {
            kill_shim(&mut client).await;
        }
        Ok(())
    }

    /// Sends a signal to the container's process.
    pub async fn kill(&self, reference: &str, signal: i32) -> Result<()> {
        let entry = self.find(reference)?;
        self.signal(&entry, signal).await
    }

    pub(super) async fn signal(&self, entry: &Entry, signal: i32) -> Result<()> {
        let not_running = || Error::NotRunning {
            name: entry.record.name.clone(),
        };
        if !entry.runs() {
            return Err(not_running());
        }
        let asked = async {
            let mut client = ShimClient::connect(&self.run_dir(&entry.id)).await?;
            client.ask(&Request::Signal { signal }).await
        };
        match asked.await {
            Ok(_) => Ok(()),
            Err(client::Error::Absent | client::Error::Gone) => Err(not_running()),
            Err(client::Error::Refused { message, .. }) if entry.runs() => {
                Err(Error::Invalid(message))
            }
            Err(client::Error::Refused { .. }) => Err(not_running()),
            Err(error) => Err(error.into()),
        }
    }

    /// Asks the container to end, waits, and kills it. One that does not run is left as it is.
    pub async fn stop(&self, reference: &str, limit: Option<Duration>) -> Result<()> {
        let entry = self.find(reference)?;
        if !entry.runs() {
            return Ok(());
        }
        match self.signal(&entry, entry.record.stop_signal).await {
            Ok(()) => {}
            Err(Error::NotRunning { .. }) => return self.end(&entry).await,
            Err(error) => return Err(error),
        }
        let patience = Duration::from_secs(STOP_SECONDS.into());
        let waited = timeout(limit.unwrap_or(patience), stopped(&entry)).await;
        match waited {
            Ok(()) => self.end(&entry).await,
            Err(_) => self.kill_and_wait(&entry).await,
        }
    }

    async fn kill_and_wait(&self, entry: &Entry) -> Result<()> {
        match self.signal(entry, libc::SIGKILL).await {
            Ok(()) | Err(Error::NotRunning { .. }) => self.end(entry).await,
            Err(error) => Err(error),
        }
    }

    /// Waits until a container that has been told to end has ended and is cleaned up after.
    async fn end(&self, entry: &Entry) -> Result<()> {
        let ended = async {
            stopped(entry).await;
            settled(entry).await;
        };
        timeout(END_LIMIT, ended).await.map_err(|_| Error::WontEnd {
            name: entry.record.name.clone(),
        })
    }

    /// Waits until the container has stopped; answers how it ended. One that removes itself is gone
    /// by then.
    pub async fn wait(&self, reference: &str) -> Result<RunState> {
        let entry = self.find(reference)?;
        let mut seen = entry.seen.subscribe();
        let ends = seen.borrow().ends;
        let over =
            |seen: &Seen| seen.removed || seen.ends > ends || seen.state.status == Status::Stopped;
        let ended = async {
            let Ok(seen) = seen.wait_for(over).await else {
                return Err(Error::Internal);
            };
            let Some(ended) = &seen.ended else {
                return Err(Error::Removed {
                    name: entry.record.name.clone(),
                });
            };
            Ok(ended.clone())
        };
        let state = tokio::select! {
            state = ended => state?,
            () = self.closed() => return Err(Error::Closing),
        };
        self.gone_if_auto_removed(&entry).await;
        Ok(state)
    }

    /// For a container that removes itself when it ends: waits until it has, so that nothing of it is
    /// left when its user hears of the end.
    pub(super) async fn gone_if_auto_removed(&self, entry: &Entry) {
        if entry.record.auto_remove {
            // If it takes longer, the user has waited long enough.
            let _ = timeout(END_LIMIT, settled(entry)).await;
        }
    }

    /// Deletes a container, its root and its log. Answers its id.
    pub async fn remove(&self, reference: &str, force: bool) -> Result<String> {
        let entry = self.find(reference)?;
        let this = self.clone();
        let id = entry.id.clone();
        detached(async move {
            if entry.runs() {
                if !force {
                    let name = entry.record.name.clone();
                    return Err(Error::RemoveRunning { name });
                }
                this.kill_and_wait(&entry).await?;
            }
            let _held = entry.lock.lock().await;
            if entry.removed() {
                return Ok(());
            }
            if entry.runs() {
                let name = entry.record.name.clone();
                return Err(Error::RemoveRunning { name });
            }
            this.remove_locked(&entry).await
        })
        .await?;
        Ok(id)
    }

    pub(super) async fn remove_locked(&self, entry: &Arc<Entry>) -> Result<()> {
        self.end_shim(entry).await?;
        let (this, id) = (self.clone(), entry.id.clone());
        blocking(move || {
            this.0.records.remove(&id)?;
            Ok(())
        })
        .await?;
        // From here on it does not exist; what is left is removed now or by the next `open`.
        self.0.table.lock().entries.remove(&entry.id);
        if let Err(error) = self.clear(&entry.id).await {
            tracing::warn!(container = entry.id, %error, "what is left of a removed container stays until plyd starts again");
        }
        entry.publish_removed();
        Ok(())
    }

    /// Removes everything of a container that has no record.
    pub(super) async fn clear(&self, id: &str) -> Result<()> {
        self.kill_leftover(id).await?;
        let (this, id) = (self.clone(), id.to_owned());
        blocking(move || {
            this.0.roots.remove(&id)?;
            remove_tree(&this.run_dir(&id))?;
            remove_tree(&this.dir(&id))
        })
        .await
    }

    /// Has the OCI runtime kill and delete a container that no shim looks after, if it knows one.
    pub(super) async fn kill_leftover(&self, id: &str) -> Result<()> {
        let known = self.0.oci_root.join(id);
        if !known.exists() {
            return Ok(());
        }
        let program = self.oci_runtime().await?.path.clone();
        let (root, log) = (
            self.0.oci_root.clone(),
            self.0.run_dir.join(format!("{id}.oci.log")),
        );
        let id = id.to_owned();
        blocking(move || {
            let output = oci::command(&program, &root, &log)
                .args(["delete", "--force", &id])
                .output()
                .map_err(io_error("execute", &program))?;
            let said = fs::read_to_string(&log).unwrap_or_default();
            remove_file(&log)?;
            if !output.status.success() && known.exists() {
                let stderr = String::from_utf8_lossy(&output.stderr);
                let (_, message) = oci::failure(&said, &stderr);
                tracing::warn!(
                    container = id,
                    message,
                    "the OCI runtime could not clean up"
                );
            }
            Ok(())
        })
        .await
    }
}

fn remove_file(path: &Path) -> Result<()> {
    match fs::remove_file(path) {
        Err(error) if error.kind() != std::io::ErrorKind::NotFound => {
            Err(io_error("remove", path)(error))
        }
        _ => Ok(()),
    }
}

/// Kills a shim that does not answer. It is connected to us, so that its process id is its own.
async fn kill_shim(client: &mut ShimClient) {
    let pid = Pid::from_raw(i32::try_from(client.pid).unwrap_or(0));
    if let Err(error) = child::send_signal(pid, libc::SIGKILL) {
        tracing::debug!(%pid, %error, "the shim had ended");
    }
    // A process that hangs in the kernel ends later, or never.
    let _ = timeout(END_LIMIT, client.until_gone()).await;
}

pub(super) async fn stopped(entry: &Entry) {
    let mut seen = entry.seen.subscribe();
    let over = |seen: &Seen| seen.removed || seen.state.status != Status::Running;
    // The sender lives as long as the entry.
    let _ = seen.wait_for(over).await;
}

/// Waits until nothing is left to clean up after the container's last end. Not to be called with the
/// container's lock held.
pub(super) async fn settled(entry: &Entry) {
    // Whoever holds the lock may be about to tell of a start, or finds out what a former plyd has left.
    drop(entry.lock.lock().await);
    let mut seen = entry.seen.subscribe();
    let over = |seen: &Seen| seen.settled && seen.state.status != Status::Running;
    let _ = seen.wait_for(over).await;
}

/// Docker's, for a container without a network of its own name; the host's where it is shared.
fn hosts_file(host_network: bool) -> String {
    if host_network && let Ok(hosts) = fs::read_to_string("/etc/hosts") {
        return hosts;
    }
    "127.0.0.1\tlocalhost\n\
     ::1\tlocalhost ip6-localhost ip6-loopback\n\
     fe00::\tip6-localnet\n\
     ff00::\tip6-mcastprefix\n\
     ff02::1\tip6-allnodes\n\
     ff02::2\tip6-allrouters\n"
        .to_owned()
}
