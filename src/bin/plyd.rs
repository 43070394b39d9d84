//! `plyd`: the daemon that keeps snapshots, images and containers, and serves them on one socket.

use std::ffi::OsStr;
use std::io::{self, IsTerminal};
use std::os::unix::net::UnixDatagram;
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::sync::Arc;

use clap::{Parser, ValueEnum};
use plywood::grpc::server::{self, Backends};
use plywood::image::ImageStore;
use plywood::runtime::containers::{Containers, ContainersConfig, ImageRoots};
use plywood::snapshotter::{Snapshotter, SnapshotterConfig};
use plywood::store::{self, index};
use plywood::sys::process;
use serde::Deserialize;
use tokio::signal::unix::{SignalKind, signal};
use tracing_subscriber::EnvFilter;
use tracing_subscriber::filter::LevelFilter;

const DEFAULT_CONFIG: &str = "/etc/plywood/config.toml";
const DEFAULT_ADDRESS: &str = "unix:///run/plywood/plyd.sock";

type Failure = Box<dyn std::error::Error + Send + Sync>;

/// Keeps container root file systems and serves them to containerd and snapctl.
///
/// Every option but --config can also stand in the configuration file, with "_" for "-"; the command
/// line wins.
#[derive(Debug, Parser)]
#[command(version, max_term_width = 100)]
struct Args {
    /// Configuration file [default: /etc/plywood/config.toml, if it is there]
    #[arg(long, value_name = "FILE")]
    config: Option<PathBuf>,
    #[command(flatten)]
    settings: Settings,
}

#[derive(Debug, Default, clap::Args, Deserialize)]
#[serde(deny_unknown_fields)]
struct Settings {
    /// Directory of everything that lasts [default: /var/lib/plywood]
    #[arg(long, value_name = "DIR")]
    root: Option<PathBuf>,
    /// Directory of everything that a reboot ends; best on a tmpfs [default: /run/plywood]
    #[arg(long, value_name = "DIR")]
    state: Option<PathBuf>,
    /// Socket to serve on [default: unix:///run/plywood/plyd.sock]
    #[arg(long, value_name = "unix://PATH")]
    address: Option<String>,
    /// What to log: error, warn, info, debug, trace, or a list such as info,plywood::snapshotter=debug
    /// [default: info]
    #[arg(long, value_name = "LEVEL")]
    log_level: Option<String>,
    /// How to log, to standard error [default: text]
    #[arg(long, value_enum, value_name = "FORMAT")]
    log_format: Option<LogFormat>,
    /// The plyfs program [default: beside plyd, then on PATH]
    #[arg(long, value_name = "FILE")]
    plyfs: Option<PathBuf>,
    /// The plyshim program [default: beside plyd, then on PATH]
    #[arg(long, value_name = "FILE")]
    plyshim: Option<PathBuf>,
    /// The OCI runtime [default: the first of runc and crun that works here]
    #[arg(long, value_name = "FILE")]
    oci_runtime: Option<PathBuf>,
}

#[derive(Clone, Copy, Debug, Default, Deserialize, ValueEnum)]
#[serde(rename_all = "lowercase")]
enum LogFormat {
    /// One JSON object a line
    Json,
    /// For people
    #[default]
    Text,
}

/// Settings of which nothing is wrong in itself.
struct Checked {
    settings: Settings,
    log_filter: EnvFilter,
    socket: PathBuf,
}

impl Settings {
    fn or(self, other: Self) -> Self {
        Self {
            root: self.root.or(other.root),
            state: self.state.or(other.state),
            address: self.address.or(other.address),
            log_level: self.log_level.or(other.log_level),
            log_format: self.log_format.or(other.log_format),
            plyfs: self.plyfs.or(other.plyfs),
            plyshim: self.plyshim.or(other.plyshim),
            oci_runtime: self.oci_runtime.or(other.oci_runtime),
        }
    }
}

fn main() -> ExitCode {
    let mut words = std::env::args_os().skip(1);
    if words.next().as_deref() == Some(OsStr::new(index::PROBE_ARGUMENT)) {
        return probe_index(words.next().map(PathBuf::from));
    }
    let args = Args::parse();
    let started = match settings(args) {
        Ok(settings) => run(settings),
        Err(problem) => {
            eprintln!("plyd: {problem}");
            return ExitCode::from(2);
        }
    };
    match started {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("plyd: {error}");
            ExitCode::FAILURE
        }
    }
}

/// What a plyd asks of a child process before it opens an old index itself.
fn probe_index(dir: Option<PathBuf>) -> ExitCode {
    match dir.map(|dir| index::probe(&dir)) {
        Some(Ok(())) => ExitCode::SUCCESS,
        _ => ExitCode::FAILURE,
    }
}

fn settings(args: Args) -> Result<Checked, String> {
    let path = args.config.as_deref();
    let path_or_default = path.unwrap_or(Path::new(DEFAULT_CONFIG));
    let text = match std::fs::read_to_string(path_or_default) {
        Ok(text) => text,
        Err(error) if error.kind() == io::ErrorKind::NotFound && path.is_none() => String::new(),
        Err(error) => {
            return Err(format!(
                "cannot read {}: {error}",
                path_or_default.display()
            ));
        }
    };
    let file: Settings = toml::from_str(&text)
        .map_err(|error| format!("{} is wrong:\n{error}", path_or_default.display()))?;
    let settings = args.settings.or(file);
    let address = settings.address.as_deref().unwrap_or(DEFAULT_ADDRESS);
    Ok(Checked {
        log_filter: log_filter(settings.log_level.as_deref().unwrap_or("info"))?,
        socket: socket_path(address)?,
        settings,
    })
}

fn run(checked: Checked) -> Result<(), Failure> {
    let Checked {
        settings,
        log_filter,
        socket,
    } = checked;
    start_log(log_filter, settings.log_format.unwrap_or_default());
    if let Err(error) = process::raise_open_files() {
        tracing::warn!(%error, "cannot raise the limit of open files");
    }
    let root = settings.root.unwrap_or("/var/lib/plywood".into());
    let state = settings.state.unwrap_or("/run/plywood".into());
    let root = absolute(&root)?;
    let state = absolute(&state)?;

    let _lock = store::lock_root(&root)?;
    // Whoever has the mounts below it would take those of another for left-overs. It may be the root itself.
    let one = std::fs::canonicalize(&state)
        .is_ok_and(|state| std::fs::canonicalize(&root).is_ok_and(|root| root == state));
    let _state_lock = (!one).then(|| store::lock_root(&state)).transpose()?;
    let listener = server::listen(&socket)?;
    let snapshotter = Arc::new(Snapshotter::open(
        &root,
        &state,
        SnapshotterConfig {
            plyfs: settings.plyfs,
            index_prober: std::env::current_exe().ok(),
            ..SnapshotterConfig::default()
        },
    )?);
    let images = Arc::new(ImageStore::open(&root, Arc::clone(&snapshotter))?);
    let runtime = tokio::runtime::Builder::new_multi_thread()
        .enable_all()
        .build()?;
    let served = runtime.block_on(async {
        let mut interrupt = signal(SignalKind::interrupt())?;
        let mut terminate = signal(SignalKind::terminate())?;
        let end = async move {
            tokio::select! {
                _ = interrupt.recv() => {}
                _ = terminate.recv() => {}
            }
            tracing::info!("ending; mounts and containers go on");
        };
        let containers = Containers::open(
            &root,
            &state,
            Arc::new(ImageRoots {
                snapshotter: Arc::clone(&snapshotter),
                images: Arc::clone(&images),
            }),
            ContainersConfig {
                plyshim: settings.plyshim,
                oci_runtime: settings.oci_runtime,
            },
        )
        .await?;
        let backends = Backends {
            root: root.clone(),
            state,
            snapshotter: Arc::clone(&snapshotter),
            images,
            containers,
        };
        tracing::info!(version = env!("CARGO_PKG_VERSION"), root = %root.display(), socket = %socket.display(), "serving");
        tell_systemd("READY=1");
        server::serve(backends, listener, end).await?;
        Ok::<(), Failure>(())
    });
    // Requests that block are few and short; a mount that hangs is not worth waiting for.
    runtime.shutdown_timeout(std::time::Duration::from_secs(5));
    let closed = snapshotter.close();
    served?;
    closed?;
    std::fs::remove_file(&socket)?;
    Ok(())
}

/// Reads `--log-level`.
fn log_filter(level: &str) -> Result<EnvFilter, String> {
    let wrong = |why: &dyn std::fmt::Display| format!("the log level {level:?} is wrong: {why}");
    // EnvFilter takes a bare word for the name of a module and is then silent about all others.
    let is_level = |word: &str| word.trim().parse::<LevelFilter>().is_ok();
    if let Some(word) = level
        .split(',')
        .find(|word| !level.contains('[') && !word.contains('=') && !is_level(word))
    {
        let why = format!("{word:?} is none of error, warn, info, debug, trace and off");
        return Err(wrong(&why));
    }
    EnvFilter::try_new(level).map_err(|error| wrong(&error))
}

fn start_log(filter: EnvFilter, format: LogFormat) {
    let log = tracing_subscriber::fmt()
        .with_env_filter(filter)
        .with_ansi(io::stderr().is_terminal())
        .with_writer(io::stderr);
    match format {
        LogFormat::Json => log.json().init(),
        LogFormat::Text => log.init(),
    }
}

fn socket_path(address: &str) -> Result<PathBuf, String> {
    let path = address.strip_prefix("unix://").map(Path::new);
    path.filter(|path| path.is_absolute())
        .map(Path::to_owned)
        .ok_or_else(|| {
            format!("the address {address:?} is wrong: write unix:// and an absolute path")
        })
}

fn absolute(path: &Path) -> Result<PathBuf, String> {
    std::path::absolute(path).map_err(|error| format!("cannot use {}: {error}", path.display()))
}

/// sd_notify(3), for `Type=notify`. Without systemd there is no socket to write to.
fn tell_systemd(message: &str) {
    use std::os::linux::net::SocketAddrExt;
    use std::os::unix::ffi::OsStrExt;
    use std::os::unix::net::SocketAddr;

    let Some(name) = std::env::var_os("NOTIFY_SOCKET") else {
        return;
    };
    let sent = match name.as_bytes().strip_prefix(b"@") {
        Some(name) => SocketAddr::from_abstract_name(name),
        None => SocketAddr::from_pathname(&name),
    }
    .and_then(|to| UnixDatagram::unbound()?.send_to_addr(message.as_bytes(), &to));
    if let Err(error) = sent {
        tracing::warn!(%error, "cannot tell systemd");
    }
}
