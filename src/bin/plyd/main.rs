//! `plyd`: the daemon that keeps snapshots, images and containers, and serves them on one socket.

mod host;
mod packing;
mod settings;

use std::ffi::OsStr;
use std::io::{self, IsTerminal};
use std::os::unix::net::UnixDatagram;
use std::path::PathBuf;
use std::process::ExitCode;
use std::sync::Arc;

use clap::{CommandFactory, Parser};
use plywood::cli::usage;
use plywood::grpc::server::{self, Backends};
use plywood::image::ImageStore;
use plywood::runtime::containers::{Containers, ContainersConfig, ImageRoots};
use plywood::runtime::oci::OciRuntime;
use plywood::snapshotter::{Snapshotter, SnapshotterConfig};
use plywood::store::{self, index};
use plywood::sys::process;
use tokio::signal::unix::{SignalKind, signal};
use tracing_subscriber::EnvFilter;

use settings::{Args, Checked, LogFormat};

/// Exit code of a command line or a configuration file that makes no sense.
const USAGE: u8 = 2;

type Failure = Box<dyn std::error::Error + Send + Sync>;

fn main() -> ExitCode {
    let mut words = std::env::args_os().skip(1);
    if words.next().as_deref() == Some(OsStr::new(index::PROBE_ARGUMENT)) {
        return probe_index(words.next().map(PathBuf::from));
    }
    let args = match Args::try_parse() {
        Ok(args) => args,
        Err(error) => return usage::refuse(&error, Args::command(), &[], USAGE),
    };
    // First, or the configuration file may be what an ordinary user is told of.
    if let Err(problem) = host::privileged() {
        eprintln!("plyd: {problem}");
        return ExitCode::FAILURE;
    }
    let started = match settings::read(args) {
        Ok(settings) => run(settings),
        Err(problem) => {
            eprintln!("plyd: {problem}");
            return ExitCode::from(USAGE);
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

fn run(checked: Checked) -> Result<(), Failure> {
    let Checked {
        settings,
        log_filter,
        socket,
        containerd,
        packing,
    } = checked;
    start_log(log_filter, settings.log_format.unwrap_or_default());
    if let Err(error) = process::raise_open_files() {
        tracing::warn!(%error, "cannot raise the limit of open files");
    }
    let root = settings.root.unwrap_or("/var/lib/plywood".into());
    let state = settings.state.unwrap_or("/run/plywood".into());
    let root = host::directory("--root", &root)?;
    let state = host::directory("--state", &state)?;
    let ours = |option, name, program: Option<PathBuf>| {
        let check = |program: PathBuf| host::program(option, name, &program);
        program.map(check).transpose()
    };
    let plyfs = ours("--plyfs", "plyfs", settings.plyfs)?;
    let plyshim = ours("--plyshim", "plyshim", settings.plyshim)?;
    if let Some(runtime) = &settings.oci_runtime {
        OciRuntime::check(runtime)?;
    }

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
            plyfs,
            index_prober: std::env::current_exe().ok(),
            packing,
            verify: settings.verify.unwrap_or_default().into(),
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
                plyshim,
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
            containerd,
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
