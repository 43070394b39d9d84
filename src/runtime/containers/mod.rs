//! The containers of one plyd.
//!
//! Below plyd's root:
//!
//! ```text
//! containers/ID.record              what was created; the container exists if and only if this does
//! containers/ID/bundle/             the OCI bundle: config.json, hosts, hostname, resolv.conf
//! containers/ID/log                 its output
//! containers/ID/state/state.record  what became of it; its shim writes this, plyd only when that is dead
//! ```
//!
//! and below its state directory, which a reboot clears:
//!
//! ```text
//! containers/ID/shim.sock   where its shim listens; lock, shim.log and scratch files beside it
//! oci/                      the OCI runtime's own state
//! ```
//!
//! The root file system is a snapshot whose owner is `container` and whose key is the id. It is mounted
//! from the creation to the end of the container, and again when it is started again.
//!
//! What each change consists of, so that a crash at any point can be mended by the next `open`:
//!
//! - create: snapshot and directory first, then the record. Left behind: a snapshot and a directory
//!   that no record names, which are removed.
//! - start: the shim does it, and finishes it without plyd. Left behind if the shim died, too: a
//!   container of the OCI runtime whose state says that it was never started, which is killed.
//! - remove: the record first, then the rest, as above.
//!
//! Each container has a lock for what must not overlap: start, the cleaning up after its end, and
//! removal. Stop and kill take none; they act on the shim, and the end is everybody's to see.

mod create;
mod damage;
mod entry;
mod error;
mod life;
mod monitor;
mod record;
mod recovery;
mod roots;
mod streams;

use std::collections::{BTreeMap, BTreeSet};
use std::path::{Path, PathBuf};
use std::sync::Arc;

use parking_lot::Mutex;
use tokio::sync::{OnceCell, watch};

pub use create::{CreateRequest, VolumeRequest};
pub use entry::{Container, Entry};
use error::io_error;
pub use error::{Error, Result};
pub use life::STOP_SECONDS;
pub use record::ContainerRecord;
pub use roots::{ImageRoots, Roots};
pub use streams::{ExecRequest, Input, LogStream, Output, OutputEvent};

use super::oci::OciRuntime;
use super::spec::Cgroups;
use crate::store::create_dir;
use crate::store::record::{Damaged, Error as RecordError, RecordDir};

/// Settings.
#[derive(Clone, Debug, Default)]
pub struct ContainersConfig {
    /// The plyshim program; empty: beside the running executable, then on PATH.
    pub plyshim: Option<PathBuf>,
    /// The OCI runtime; empty: the first of runc and crun that works on this host.
    pub oci_runtime: Option<PathBuf>,
}

/// All containers of one plyd. Cheap to clone. Needs a tokio runtime. What a method has acknowledged is
/// durable; a call that is dropped half-way is finished in the background, and a creation undone then.
#[derive(Clone)]
pub struct Containers(Arc<Inner>);

struct Inner {
    config: ContainersConfig,
    roots: Arc<dyn Roots>,
    records: RecordDir<ContainerRecord>,
    dir: PathBuf,
    run_dir: PathBuf,
    oci_root: PathBuf,
    trial_dir: PathBuf,
    cgroups: Cgroups,
    oci: OnceCell<OciRuntime>,
    table: Mutex<Table>,
    closing: watch::Sender<bool>,
}

#[derive(Default)]
struct Table {
    entries: BTreeMap<String, Arc<Entry>>,
    /// Those whose records could not be read when plyd started: what they are is not known, only that they are.
    damaged: BTreeMap<String, Damaged>,
    /// Names of containers that are being created.
    reserved: BTreeSet<String>,
}

impl Containers {
    /// Reads the records below `root`, mends what a crash left, and finds the containers that still run
    /// with the shims below `state`.
    pub async fn open(
        root: &Path,
        state: &Path,
        roots: Arc<dyn Roots>,
        config: ContainersConfig,
    ) -> Result<Self> {
        let dir = root.join("containers");
        let run_dir = state.join("containers");
        let oci_root = state.join("oci");
        for new in [&dir, &run_dir, &oci_root] {
            create_dir(new, 0o700).map_err(io_error("make", new))?;
        }
        let this = Self(Arc::new(Inner {
            config,
            roots,
            records: RecordDir::open(&dir)?,
            dir,
            run_dir,
            oci_root,
            trial_dir: state.join("trial"),
            cgroups: Cgroups::of_host(),
            oci: OnceCell::new(),
            table: Mutex::default(),
            closing: watch::Sender::new(false),
        }));
        if let Err(error) = this.plyshim() {
            tracing::warn!("no container can be started: {error}");
        }
        this.recover().await?;
        Ok(this)
    }

    /// Ends every stream with [`Error::Closing`]; the containers go on.
    pub fn close(&self) {
        self.0.closing.send_replace(true);
    }

    /// Ready when [`close`](Self::close) has been called.
    pub async fn closed(&self) {
        let mut closing = self.0.closing.subscribe();
        // The sender lives as long as `self`.
        let _ = closing.wait_for(|closing| *closing).await;
    }

    /// The OCI runtime that works on this host. A success is remembered, a failure is not: one may be
    /// installed at any time.
    pub async fn oci_runtime(&self) -> Result<&OciRuntime> {
        let find = || async {
            let configured = self.0.config.oci_runtime.clone();
            let scratch = self.0.trial_dir.clone();
            blocking(move || Ok(OciRuntime::find(configured.as_deref(), &scratch)?)).await
        };
        self.0.oci.get_or_try_init(find).await
    }

    /// How the host's cgroups are mounted.
    pub fn cgroups(&self) -> Cgroups {
        self.0.cgroups
    }

    /// All containers, the newest first.
    pub async fn list(&self) -> Result<Vec<Container>> {
        let mut entries: Vec<_> = self.0.table.lock().entries.values().cloned().collect();
        entries.sort_by_key(|entry| std::cmp::Reverse(entry.record.created));
        let roots = Arc::clone(&self.0.roots);
        blocking(move || Ok(entries.iter().map(|entry| entry.look(&*roots)).collect())).await
    }

    /// One container by id, unique prefix of an id, or name.
    pub async fn inspect(&self, reference: &str) -> Result<Container> {
        let entry = self.find(reference)?;
        let roots = Arc::clone(&self.0.roots);
        blocking(move || Ok(entry.look(&*roots))).await
    }

    /// Id and name of the container that a reference means, if there is one.
    pub fn named(&self, reference: &str) -> Option<(String, String)> {
        let entry = self.find(reference).ok()?;
        Some((entry.id.clone(), entry.record.name.clone()))
    }

    /// The OCI runtime's config.json of a container.
    pub async fn spec_json(&self, id: &str) -> Result<Vec<u8>> {
        let path = self.bundle_dir(id).join("config.json");
        blocking(move || std::fs::read(&path).map_err(io_error("read", &path))).await
    }

    /// Who was created from the image `image_id`, or may have been, as words for a sentence.
    pub fn users_of_image(&self, image_id: &str) -> Option<String> {
        if let Some(users) = self.of_image(image_id) {
            return Some(users);
        }
        let table = self.0.table.lock();
        let (id, damaged) = table.damaged.first_key_value()?;
        let path = damaged.path.display();
        Some(format!(
            "the container {id}, for all that is known, for its record {path} cannot be used"
        ))
    }

    /// The known containers that were created from the image `image_id`, as words for a sentence.
    pub fn of_image(&self, image_id: &str) -> Option<String> {
        let table = self.0.table.lock();
        let users = table.entries.values();
        let users = users.filter(|entry| entry.record.image_id == image_id);
        let mut names: Vec<_> = users.map(|entry| &*entry.record.name).collect();
        names.sort_unstable();
        named_users(&names)
    }

    /// How many there are, and how many run.
    pub fn count(&self) -> (usize, usize) {
        let table = self.0.table.lock();
        let running = table.entries.values().filter(|entry| entry.runs()).count();
        (table.entries.len(), running)
    }

    fn find(&self, reference: &str) -> Result<Arc<Entry>> {
        let table = self.0.table.lock();
        if let Some(entry) = table.entries.get(reference) {
            return Ok(Arc::clone(entry));
        }
        let named = |entry: &&Arc<Entry>| entry.record.name == reference;
        if let Some(entry) = table.entries.values().find(named) {
            return Ok(Arc::clone(entry));
        }
        let range = table.entries.range(reference.to_owned()..);
        let fits: Vec<_> = range
            .take_while(|(id, _)| id.starts_with(reference))
            .map(|(_, entry)| entry)
            .collect();
        let damaged = table.damaged.values();
        let fits_damaged: Vec<_> = damaged.filter(|d| d.id.starts_with(reference)).collect();
        let reference = reference.to_owned();
        match (&fits[..], &fits_damaged[..]) {
            _ if reference.is_empty() => Err(Error::NotFound { reference }),
            ([entry], []) => Ok(Arc::clone(entry)),
            ([], [damaged]) => Err(RecordError::from((*damaged).clone()).into()),
            ([], []) => Err(match table.damaged.first_key_value() {
                Some((_, damaged)) => Error::NotFoundInSound {
                    reference,
                    path: damaged.path.clone(),
                },
                None => Error::NotFound { reference },
            }),
            _ => Err(Error::Ambiguous {
                reference,
                count: fits.len() + fits_damaged.len(),
            }),
        }
    }

    fn dir(&self, id: &str) -> PathBuf {
        self.0.dir.join(id)
    }

    /// Where the container's OCI bundle is.
    pub fn bundle_dir(&self, id: &str) -> PathBuf {
        self.dir(id).join("bundle")
    }

    /// Where the container's log is.
    pub fn log_path(&self, id: &str) -> PathBuf {
        self.dir(id).join("log")
    }

    fn run_dir(&self, id: &str) -> PathBuf {
        self.0.run_dir.join(id)
    }

    fn plyshim(&self) -> Result<PathBuf> {
        if let Some(configured) = &self.0.config.plyshim {
            return Ok(configured.clone());
        }
        let executable = std::env::current_exe().unwrap_or_default();
        let beside = executable.with_file_name("plyshim");
        let path = std::env::var_os("PATH").unwrap_or_default();
        std::iter::once(beside)
            .chain(std::env::split_paths(&path).map(|dir| dir.join("plyshim")))
            .find(|candidate| candidate.is_file())
            .ok_or(Error::NoShim { executable })
    }
}

/// Containers as words for a sentence: all, or the first few and how many more there are.
fn named_users(names: &[&str]) -> Option<String> {
    const MOST: usize = 5;
    Some(match names {
        [] => return None,
        [name] => format!("the container {name}"),
        [first @ .., last] if names.len() <= MOST => {
            format!("the containers {} and {last}", first.join(", "))
        }
        _ => {
            let (first, rest) = names.split_at(MOST - 1);
            let first = first.join(", ");
            format!("the containers {first} and {} more", rest.len())
        }
    })
}

/// Runs `work` on a thread that may block. It is finished even if the caller goes away.
async fn blocking<T: Send + 'static>(
    work: impl FnOnce() -> Result<T> + Send + 'static,
) -> Result<T> {
    match tokio::task::spawn_blocking(work).await {
        Ok(result) => result,
        Err(error) => {
            tracing::error!(%error, "an operation on containers failed");
            Err(Error::Internal)
        }
    }
}

/// Runs `work` as a task of its own, so that it is finished even if the caller goes away.
async fn detached<T: Send + 'static>(
    work: impl Future<Output = Result<T>> + Send + 'static,
) -> Result<T> {
    match tokio::spawn(work).await {
        Ok(result) => result,
        Err(error) => {
            tracing::error!(%error, "an operation on containers failed");
            Err(Error::Internal)
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_first_few_users_are_named_and_the_others_counted() {
        let names = ["a", "b", "c", "d", "e", "f", "g"];
        for (count, words) in [
            (0, None),
            (1, Some("the container a")),
            (2, Some("the containers a and b")),
            (3, Some("the containers a, b and c")),
            (5, Some("the containers a, b, c, d and e")),
            (6, Some("the containers a, b, c, d and 2 more")),
            (7, Some("the containers a, b, c, d and 3 more")),
        ] {
            assert_eq!(named_users(&names[..count]).as_deref(), words);
        }
    }
}
