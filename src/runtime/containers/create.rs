//! The creation of containers.

use std::fs;
use std::io::Write;
use std::os::unix::fs::{OpenOptionsExt, PermissionsExt};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::SystemTime;

use tokio::runtime::Handle;

use super::error::io_error;
use super::{ContainerRecord, Containers, Entry, Error, Result, blocking, detached};
use crate::image::ResolvedImage;
use crate::runtime::client;
use crate::runtime::lookup::{Answer, Question, VolumeQuestion};
use crate::runtime::spec::{self, Bind, ContainerSpec, Network, ProcessSpec};
use crate::runtime::state::RunState;
use crate::runtime::{names, signals};
use crate::store::{create_dir, sync_dir};

/// `__NEW_UTS_LEN` of `linux/utsname.h`.
const LONGEST_HOSTNAME: usize = 64;

/// A volume, as it is asked for.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct VolumeRequest {
    /// Absolute path on the host.
    pub source: String,
    /// Absolute path in the container.
    pub target: String,
    /// Not to be written to.
    pub read_only: bool,
}

/// A container, as it is asked for. Empty words mean the image's.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct CreateRequest {
    /// The reference that the image was asked for by.
    pub image: String,
    /// Its name; generated when empty.
    pub name: String,
    /// In place of the image's Cmd.
    pub args: Vec<String>,
    /// In place of the image's Entrypoint and Cmd.
    pub entrypoint: Option<Vec<String>>,
    /// `KEY=VALUE`, added to the image's.
    pub env: Vec<String>,
    /// Working directory.
    pub working_dir: String,
    /// Who runs it.
    pub user: String,
    /// Paths of the host to show in it.
    pub volumes: Vec<VolumeRequest>,
    /// Its host name; from the id when empty.
    pub hostname: String,
    /// Its root is not to be written to.
    pub read_only: bool,
    /// `host`, or `none`, or empty for that.
    pub network: String,
    /// It gets a terminal.
    pub tty: bool,
    /// Its standard input can be attached to.
    pub open_stdin: bool,
    /// It is removed when it ends.
    pub auto_remove: bool,
    /// Whoever creates it starts it next.
    pub starts_next: bool,
}

/// Keeps a name for a container that is being created.
struct Reservation {
    containers: Containers,
    name: String,
}

impl Drop for Reservation {
    fn drop(&mut self) {
        self.containers.0.table.lock().reserved.remove(&self.name);
    }
}

/// A container that whoever asked for it has not heard of. If nobody does, nobody knows its id, so it is
/// removed.
struct Unclaimed {
    containers: Containers,
    made: Option<Arc<Entry>>,
    runtime: Handle,
}

impl Unclaimed {
    fn claim(mut self) -> Option<Arc<Entry>> {
        self.made.take()
    }
}

impl Drop for Unclaimed {
    fn drop(&mut self) {
        let Some(entry) = self.made.take() else {
            return;
        };
        let containers = self.containers.clone();
        self.runtime.spawn(async move {
            // Not by force: somebody may have found it in a list and started it.
            if let Err(error) = containers.remove(&entry.id, false).await {
                tracing::warn!(
                    container = entry.id,
                    %error,
                    "a container that nobody waited for stays"
                );
            }
        });
    }
}

impl Containers {
    /// Makes a container of `image`: its root, its bundle, its record. Nothing runs yet. If this is dropped
    /// half-way, the container is removed when it is made.
    pub async fn create(&self, request: CreateRequest, image: ResolvedImage) -> Result<Arc<Entry>> {
        let this = self.clone();
        let unclaimed = detached(async move {
            let made = this.create_whole(request, image).await?;
            Ok(Unclaimed {
                containers: this,
                made: Some(made),
                runtime: Handle::current(),
            })
        })
        .await?;
        unclaimed.claim().ok_or(Error::Internal)
    }

    async fn create_whole(
        &self,
        request: CreateRequest,
        image: ResolvedImage,
    ) -> Result<Arc<Entry>> {
        let plan = Plan::new(request, image)?;
        let plyshim = self.plyshim()?;
        let reservation = self.reserve(&plan.request.name)?;
        let id = new_id();
        let made = self.make(&id, &plan, &reservation.name, &plyshim).await;
        let record = match made {
            Ok(record) => record,
            Err(error) => {
                self.discard(&id).await;
                return Err(error);
            }
        };
        let entry = Arc::new(Entry::new(id.clone(), record, RunState::default()));
        let mut table = self.0.table.lock();
        table.entries.insert(id, Arc::clone(&entry));
        drop(table);
        Ok(entry)
    }

    async fn make(
        &self,
        id: &str,
        plan: &Plan,
        name: &str,
        plyshim: &Path,
    ) -> Result<ContainerRecord> {
        let root = {
            let roots = Arc::clone(&self.0.roots);
            let (id, parent) = (id.to_owned(), plan.image.image.parent());
            blocking(move || {
                roots.prepare(&id, parent.as_ref())?;
                Ok(roots.mount(&id)?)
            })
            .await?
        };
        let question = plan.question(root.clone());
        let answer = client::look_up(plyshim, &question)
            .await?
            .map_err(Error::Invalid)?;
        let host = host_name();
        let host_network = plan.network == Network::Host;
        let hostname = match plan.request.hostname.as_str() {
            "" if host_network => host,
            "" => id[..12].to_owned(),
            wanted => wanted.to_owned(),
        };
        let bundle = self.bundle_dir(id);
        let config = plan.config(id, &root, &bundle, &hostname, &answer, self.0.cgroups);
        let record = ContainerRecord {
            name: name.to_owned(),
            image: plan.request.image.clone(),
            image_id: plan.image.image.id.clone(),
            created: SystemTime::now(),
            args: plan.args.clone(),
            user: plan.user.clone(),
            tty: plan.request.tty,
            open_stdin: plan.request.open_stdin,
            auto_remove: plan.request.auto_remove,
            starts_next: plan.request.starts_next,
            host_network,
            hostname,
            stop_signal: plan.stop_signal,
        };
        let this = self.clone();
        let stand_ins: Vec<_> = stand_ins(&bundle, &answer)
            .inspect(|bind| {
                let path = bind.target.display();
                tracing::warn!(container = id, %path, "a damaged file of the image is empty in the container");
            })
            .map(|bind| bind.source)
            .collect();
        let (id, dir, kept) = (id.to_owned(), self.dir(id), record.clone());
        blocking(move || {
            create_dir(&bundle, 0o700).map_err(io_error("make", &bundle))?;
            for stand_in in &stand_ins {
                write_durable(stand_in, b"")?;
                make_readable(stand_in)?;
            }
            write_durable(&bundle.join("config.json"), config.to_string().as_bytes())?;
            sync_dir(&dir).map_err(io_error("make durable", &dir))?;
            this.0.records.put(&id, &kept)?;
            Ok(())
        })
        .await?;
        Ok(record)
    }

    /// Removes what a creation that failed has made.
    async fn discard(&self, id: &str) {
        let this = self.clone();
        let id = id.to_owned();
        let result = blocking(move || {
            // Should even this fail, the next `open` finds a root without a record.
            this.0.records.remove(&id)?;
            this.0.roots.remove(&id)?;
            remove_tree(&this.dir(&id))
        })
        .await;
        if let Err(error) = result {
            tracing::warn!(%error, "what is left of a container that could not be created stays until plyd starts again");
        }
    }

    fn reserve(&self, wanted: &str) -> Result<Reservation> {
        if let (false, Some(problem)) = (wanted.is_empty(), names::problem(wanted)) {
            return Err(Error::Invalid(format!(
                "{wanted:?} cannot be a container's name: {problem}"
            )));
        }
        let mut table = self.0.table.lock();
        let holder = |table: &super::Table, name: &str| {
            let mut entries = table.entries.values();
            let entry = entries.find(|entry| entry.record.name == name);
            match entry {
                Some(entry) => Some(entry.id.clone()),
                None => table
                    .reserved
                    .contains(name)
                    .then(|| "that is being created".to_owned()),
            }
        };
        let name = if wanted.is_empty() {
            names::generate(|name| holder(&table, name).is_some())
        } else {
            wanted.to_owned()
        };
        if let Some(id) = holder(&table, &name) {
            return Err(Error::NameTaken { name, id });
        }
        table.reserved.insert(name.clone());
        Ok(Reservation {
            containers: self.clone(),
            name,
        })
    }
}

/// A request that has been checked and completed by what the image says.
struct Plan {
    request: CreateRequest,
    image: ResolvedImage,
    args: Vec<String>,
    user: String,
    working_dir: String,
    network: Network,
    stop_signal: i32,
}

impl Plan {
    fn new(request: CreateRequest, image: ResolvedImage) -> Result<Self> {
        let invalid = |problem: String| Err(Error::Invalid(problem));
        let mut args = match &request.entrypoint {
            Some(entrypoint) => entrypoint.clone(),
            None => image.config.entrypoint.clone(),
        };
        if request.args.is_empty() && request.entrypoint.is_none() {
            args.extend(image.config.cmd.iter().cloned());
        } else {
            args.extend(request.args.iter().cloned());
        }
        if args.is_empty() {
            return invalid(format!(
                "the image {:?} names no program to run; name one after it",
                request.image
            ));
        }
        let or = |wanted: &str, otherwise: &str| match wanted {
            "" => otherwise.to_owned(),
            wanted => wanted.to_owned(),
        };
        let working_dir = or(&or(&request.working_dir, &image.config.working_dir), "/");
        if !working_dir.starts_with('/') {
            return invalid(format!(
                "the working directory {working_dir:?} has to start with /"
            ));
        }
        let network = match request.network.as_str() {
            "" | "none" => Network::None,
            "host" => Network::Host,
            other => return invalid(format!("there is no network {other:?}; use host or none")),
        };
        let stop_signal = or(&image.config.stop_signal, "SIGTERM");
        let Some(stop_signal) = signals::parse(&stop_signal) else {
            return invalid(format!(
                "the image's StopSignal {stop_signal:?} is no signal"
            ));
        };
        check_environment(&request.env)?;
        for volume in &request.volumes {
            for path in [&volume.source, &volume.target] {
                if !path.starts_with('/') {
                    return invalid(format!("{path:?} in a volume has to start with /"));
                }
            }
        }
        let hostname = &request.hostname;
        if hostname.len() > LONGEST_HOSTNAME {
            let length = hostname.len();
            return invalid(format!(
                "the host name {hostname:?} has {length} bytes, and the kernel takes {LONGEST_HOSTNAME} at most; give a shorter one"
            ));
        }
        if hostname.contains(['/', '\0', '\n', ' ']) {
            return invalid(format!(
                "{hostname:?} cannot be a host name: leave out slashes, spaces and line feeds"
            ));
        }
        let texts = args.iter().chain([&working_dir, &request.hostname]);
        if texts.into_iter().any(|text| text.contains('\0')) {
            return invalid("an argument or a path contains a NUL byte".to_owned());
        }
        Ok(Self {
            user: or(&request.user, &image.config.user),
            request,
            image,
            args,
            working_dir,
            network,
            stop_signal,
        })
    }

    fn question(&self, root: PathBuf) -> Question {
        let volumes = self.request.volumes.iter();
        Question {
            root,
            user: self.user.clone(),
            working_dir: self.working_dir.clone(),
            make: true,
            volumes: volumes
                .map(|volume| VolumeQuestion {
                    source: PathBuf::from(&volume.source),
                    target: volume.target.clone(),
                })
                .collect(),
        }
    }

    fn config(
        &self,
        id: &str,
        root: &Path,
        bundle: &Path,
        hostname: &str,
        answer: &Answer,
        cgroups: spec::Cgroups,
    ) -> serde_json::Value {
        let env = spec::environment(
            hostname,
            self.request.tty,
            &self.image.config.env,
            &self.request.env,
            &answer.identity.home,
        );
        let volumes = self.request.volumes.iter().zip(&answer.targets);
        let volumes = volumes.map(|(volume, target)| Bind {
            source: PathBuf::from(&volume.source),
            target: target.clone(),
            read_only: volume.read_only,
        });
        let volumes: Vec<Bind> = stand_ins(bundle, answer).chain(volumes).collect();
        spec::container(&ContainerSpec {
            id,
            root,
            files: bundle,
            process: ProcessSpec {
                args: &self.args,
                env: &env,
                working_dir: &self.working_dir,
                identity: &answer.identity,
                tty: self.request.tty,
            },
            hostname,
            read_only: self.request.read_only,
            network: self.network,
            volumes: &volumes,
            cgroups,
        })
    }
}

/// Empty files in place of those of its image in which runc looks the container's user up, also where that is numbers, and
/// of which it starts nothing if it cannot read them.
fn stand_ins(bundle: &Path, answer: &Answer) -> impl Iterator<Item = Bind> {
    let paths = answer.damaged.iter().map(Path::new);
    let shown = paths.filter(|path| !answer.targets.iter().any(|volume| path.starts_with(volume)));
    shown.map(|path| Bind {
        source: bundle.join(path.file_name().unwrap_or_default()),
        target: path.to_owned(),
        read_only: false,
    })
}

/// Variables that a process can have.
pub(super) fn check_environment(variables: &[String]) -> Result<()> {
    for variable in variables {
        let name = variable.split_once('=').map_or("", |(name, _)| name);
        if name.is_empty() || variable.contains('\0') {
            return Err(Error::Invalid(format!(
                "{variable:?} is not a variable: write KEY=VALUE"
            )));
        }
    }
    Ok(())
}

pub(super) fn host_name() -> String {
    nix::unistd::gethostname()
        .map(|name| name.to_string_lossy().into_owned())
        .unwrap_or_else(|_| "localhost".to_owned())
}

pub(super) fn write_durable(path: &Path, bytes: &[u8]) -> Result<()> {
    let mut file = fs::OpenOptions::new()
        .write(true)
        .create(true)
        .truncate(true)
        .mode(0o600)
        .open(path)
        .map_err(io_error("make", path))?;
    file.write_all(bytes)
        .and_then(|()| file.sync_all())
        .map_err(io_error("write", path))?;
    let parent = path.parent().unwrap_or(Path::new("."));
    sync_dir(parent).map_err(io_error("make durable", parent))
}

/// Lets whoever runs in the container read it, root or not.
pub(super) fn make_readable(path: &Path) -> Result<()> {
    fs::set_permissions(path, fs::Permissions::from_mode(0o644))
        .map_err(io_error("change the mode of", path))
}

pub(super) fn remove_tree(dir: &Path) -> Result<()> {
    match fs::remove_dir_all(dir) {
        Err(error) if error.kind() != std::io::ErrorKind::NotFound => {
            Err(io_error("remove", dir)(error))
        }
        _ => Ok(()),
    }
}

fn new_id() -> String {
    let bytes: [u8; 32] = rand::random();
    bytes.iter().map(|byte| format!("{byte:02x}")).collect()
}
