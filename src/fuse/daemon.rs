//! A `plyfs` process from its command line to its end.
//!
//! Stand-alone it opens the union, mounts, and leaves its caller: the caller's process returns when
//! the mount answers, and nothing of the server is left on the caller's streams. Below plyd the
//! mount is there already and comes as an open descriptor; then the process stays in front and
//! serves the control socket. Either way it ends when the mount is gone, and a signal makes it
//! write everything down, take its mount away and end.

mod error;
mod mount;

use std::cell::Cell;
use std::ffi::OsStr;
use std::fs::{self, File};
use std::io::{self, Read, Write};
use std::os::fd::{OwnedFd, RawFd};
use std::os::unix::ffi::OsStrExt;
use std::path::{Path, PathBuf};
use std::sync::{Arc, OnceLock};
use std::thread;
use std::time::Duration;

use crossbeam::channel;
use nix::sys::resource::{Resource, getrlimit};
use nix::sys::signal::{SigSet, Signal};
use nix::sys::stat::{Mode, umask};

use super::control::{ControlServer, Controlled};
use super::log::{self, LogTarget};
use super::options::{Options, parse_lowerdir_file};
use super::server::{Flusher, Server};
use crate::cow::{Union, UnionConfig};
use crate::store::view::{Verify, View};
use crate::sys::{fuse_mount, process};

pub use error::DaemonError;
use mount::Mount;

/// How long a signal waits for the last users of the mount.
const LAST_USERS: Duration = Duration::from_secs(1);

/// What the command line says beside the options.
#[derive(Clone, Debug)]
pub struct Invocation {
    /// Where to mount, or where it is mounted.
    pub mountpoint: PathBuf,
    /// The options.
    pub options: Options,
    /// `-f`: stay in front.
    pub foreground: bool,
    /// `-d`: log every request; implies `foreground`.
    pub debug: bool,
    /// `--log-file`.
    pub log_file: Option<PathBuf>,
    /// `--fuse-fd`: number of the descriptor of a mount that is there already; implies `foreground`.
    pub fuse_fd: Option<RawFd>,
    /// `--control`: where to listen.
    pub control: Option<PathBuf>,
}

/// Runs the invocation. Returns when the mount answers (in the background) or is gone (in front).
pub fn run(mut invocation: Invocation) -> Result<(), DaemonError> {
    if invocation.foreground || invocation.debug || invocation.fuse_fd.is_some() {
        let config = resolve(&mut invocation)?;
        return serve(&invocation, config, || Ok(()));
    }
    let inherited = process::inherited().map_err(DaemonError::Background)?;
    let config = resolve(&mut invocation)?;
    let (mut outcome, report) = pipe().map_err(DaemonError::Background)?;
    match process::fork_single_threaded().map_err(DaemonError::Background)? {
        Some(_child) => {
            drop(report);
            let mut text = String::new();
            outcome
                .read_to_string(&mut text)
                .map_err(DaemonError::Background)?;
            match text.as_str() {
                READY => Ok(()),
                "" => Err(DaemonError::Reported(
                    "the server in the background died before the mount answered; `-f` shows why"
                        .to_owned(),
                )),
                message => Err(DaemonError::Reported(message.to_owned())),
            }
        }
        None => {
            drop(outcome);
            // The caller's locks and pipes; layers that were named by one of them are resolved by now.
            inherited.close();
            background(&invocation, config, report);
            Ok(())
        }
    }
}

/// What the background process writes when the mount answers.
const READY: &str = "\0ready";

fn pipe() -> io::Result<(File, File)> {
    let (read, write) = nix::unistd::pipe2(nix::fcntl::OFlag::O_CLOEXEC)?;
    Ok((read.into(), write.into()))
}

fn background(invocation: &Invocation, config: UnionConfig, report: File) {
    // Closed as soon as it is used: the caller reads to its end.
    let report = Cell::new(Some(report));
    let tell = |text: &str| match report.take() {
        Some(mut report) => report.write_all(text.as_bytes()),
        None => Ok(()),
    };
    let result = serve(invocation, config, || {
        let null = File::options().read(true).write(true).open("/dev/null")?;
        nix::unistd::dup2_stdin(&null)?;
        nix::unistd::dup2_stdout(&null)?;
        nix::unistd::dup2_stderr(&null)?;
        tell(READY)
    });
    if let Err(error) = result {
        tracing::error!(%error, "ended by an error");
        // The caller's process prints it; after READY it is gone and the log has the error.
        let _ = tell(&error.to_string());
    }
}

/// Makes every path absolute, reads `lowerdir_file`, and refuses a mount inside its own layers.
fn resolve(invocation: &mut Invocation) -> Result<UnionConfig, DaemonError> {
    let options = &invocation.options;
    let more = match &options.lowerdir_file {
        None => Vec::new(),
        Some(path) => {
            parse_lowerdir_file(&fs::read(path).map_err(|source| DaemonError::LowerdirFile {
                path: path.clone(),
                source,
            })?)
        }
    };
    let mut config = options.union_config(more);
    for lower in &mut config.lowers {
        *lower = absolute(lower);
    }
    if let Some(path) = &options.view {
        config.view = Some(Arc::new(View::open_stored(
            &absolute(path),
            options.verify,
        )?));
    }
    if invocation.options.verify == Verify::Always {
        // Without OPEN nobody would know when a file is to be looked at again.
        invocation.options.session.no_open = false;
    }
    if let Some(upper) = &mut config.upper {
        upper.dir = absolute(&upper.dir);
        upper.work = absolute(&upper.work);
    }
    if invocation.fuse_fd.is_none() {
        // Below plyd the mount is there already, and looking it up would wait for ourselves.
        invocation.mountpoint =
            fs::canonicalize(&invocation.mountpoint).map_err(|source| DaemonError::Mountpoint {
                path: invocation.mountpoint.clone(),
                source,
            })?;
        refuse_self_nesting(&invocation.mountpoint, &config)?;
    }
    if !Path::new("/sys/fs/selinux").exists() {
        // No kernel without SELinux knows these words, and none needs them.
        let extra = &mut invocation.options.mount.extra;
        extra.retain(|word| !is_context(word));
    }
    if let Some(path) = &mut invocation.log_file {
        *path = absolute(path);
    }
    if let Some(path) = &mut invocation.control {
        *path = absolute(path);
    }
    Ok(config)
}

fn is_context(word: &OsStr) -> bool {
    let name = word.as_bytes().split(|byte| *byte == b'=').next();
    name.is_some_and(|name| name.ends_with(b"context"))
}

/// The path without links if it leads somewhere, else as it is: opening it says what is wrong.
fn absolute(path: &Path) -> PathBuf {
    fs::canonicalize(path)
        .or_else(|_| std::path::absolute(path))
        .unwrap_or_else(|_| path.to_owned())
}

fn refuse_self_nesting(mountpoint: &Path, config: &UnionConfig) -> Result<(), DaemonError> {
    let upper = config
        .upper
        .iter()
        .flat_map(|upper| [&upper.dir, &upper.work]);
    for layer in config.lowers.iter().chain(upper) {
        if mountpoint.starts_with(layer) {
            return Err(DaemonError::SelfNesting {
                mountpoint: mountpoint.to_owned(),
                layer: layer.clone(),
            });
        }
    }
    Ok(())
}

enum End {
    Session(io::Result<()>),
    Signal(Signal),
}

fn serve(
    invocation: &Invocation,
    config: UnionConfig,
    ready: impl FnOnce() -> io::Result<()>,
) -> Result<(), DaemonError> {
    let own_mount = invocation.fuse_fd.is_none();
    let in_front = invocation.foreground || invocation.debug || !own_mount;
    start_log(invocation, in_front)?;
    if !in_front {
        nix::unistd::setsid().map_err(|errno| DaemonError::Background(errno.into()))?;
    }
    umask(Mode::empty());
    let signals = block_signals().map_err(DaemonError::Session)?;
    protect();

    // Here and not before: it takes a thread, and who has any cannot go into the background.
    if invocation.options.session.passthrough
        && let Some(view) = &config.view
        && let Err(error) = view.seal()
    {
        tracing::debug!(%error, "files of packed layers are not passed through");
    }
    let union = Arc::new(Union::open_keeping(config, kept_descriptors())?);
    let control = match &invocation.control {
        None => None,
        Some(path) => Some(
            ControlServer::bind(path).map_err(|source| DaemonError::Control {
                path: path.clone(),
                source,
            })?,
        ),
    };
    let device = match invocation.fuse_fd {
        Some(number) => process::adopt_fd(number).map_err(DaemonError::FuseFd)?,
        None => fuse_mount::mount(&invocation.mountpoint, &invocation.options.mount)?,
    };
    let mount = Mount::find(&invocation.mountpoint);
    if own_mount {
        // Relative paths are resolved by now, and no directory is to be kept busy.
        std::env::set_current_dir("/").map_err(DaemonError::Background)?;
    }
    let outcome = serve_mount(
        invocation,
        union.clone(),
        device,
        control.as_ref(),
        &mount,
        signals,
        ready,
    );
    if own_mount {
        mount.remove();
    }
    union.ends();
    // Below plyd nobody else mounts the directories, and a commit completes what it makes a layer of. Nor is anything
    // completed beside programs that go on writing to a mount which a signal has only detached.
    let alone = own_mount && matches!(outcome, Ok(Ended::WithMount));
    if alone && let Err(error) = union.complete_partial() {
        tracing::error!(%error, "files stay that are copied up in part: kernel overlayfs refuses the upper until plyfs has mounted and completed it");
    }
    if alone
        && invocation.options.metacopy.is_none()
        && let Err(error) = union.complete_little()
    {
        tracing::warn!(%error, "files stay of which only the attributes are in the upper: kernel overlayfs needs metacopy=on to read them");
    }
    // plyd syncs what it promises to keep, and waits for the end of a process whose snapshot it removes. Whom a signal ends
    // nobody waits for, and nobody else syncs.
    let promised = own_mount || matches!(outcome, Ok(Ended::BySignal));
    if promised
        && !invocation.options.volatile
        && let Err(error) = union.sync()
    {
        tracing::error!(%error, "the upper could not be made durable at the end");
    }
    tracing::info!("ended");
    outcome.map(drop)
}

enum Ended {
    /// Nobody uses it any more.
    WithMount,
    /// Whoever is still in the mount gets errors from now on.
    BySignal,
}

fn serve_mount(
    invocation: &Invocation,
    union: Arc<Union>,
    device: OwnedFd,
    control: Option<&ControlServer>,
    mount: &Mount,
    signals: SigSet,
    ready: impl FnOnce() -> io::Result<()>,
) -> Result<Ended, DaemonError> {
    let options = &invocation.options;
    let (ends, end) = channel::unbounded();
    let controlled = match control {
        None => None,
        Some(server) => {
            let damaged_in = Arc::clone(&union);
            let controlled = Arc::new(Controlled {
                device: device.try_clone().map_err(DaemonError::FuseFd)?,
                flusher: OnceLock::new(),
                damaged: Box::new(move || damaged_in.damage()),
                stop: Box::new(|| tracing::info!("asked to end with the mount")),
            });
            server
                .serve(controlled.clone())
                .map_err(DaemonError::Session)?;
            Some(controlled)
        }
    };
    let completed = union.clone();
    let no_acl = !union.keeps_acls();
    let server =
        Server::attach(union, device, options.session, no_acl).map_err(DaemonError::Session)?;
    let flusher = match mount.device() {
        Some(device) => server.flusher().at(mount.target.clone(), device),
        None => server.flusher(),
    };
    if let Some(controlled) = controlled {
        // It is set once, here.
        let _ = controlled.flusher.set(flusher.clone());
    }
    wait_for_signals(signals, ends.clone()).map_err(DaemonError::Session)?;
    if let Some(every) = options.complete {
        complete_now_and_then(completed, every).map_err(DaemonError::Session)?;
    }
    let policy = server.policy();
    thread::Builder::new()
        .name("plyfs-session".into())
        .spawn(move || {
            // The receiver is gone only when the process is ending anyway.
            let _ = ends.send(End::Session(server.run()));
        })
        .map_err(DaemonError::Session)?;
    mount.set_read_ahead();
    tracing::info!(mountpoint = %invocation.mountpoint.display(), "serving");
    tracing::debug!(?policy, "how the kernel is served");
    ready().map_err(DaemonError::Background)?;
    match end.recv() {
        Ok(End::Signal(signal)) => {
            tracing::info!(%signal, "ending");
            flush(&flusher);
            mount.remove();
            // Unless somebody is still in it, the mount is gone with that.
            match end.recv_timeout(LAST_USERS) {
                Ok(End::Session(Ok(()))) => Ok(Ended::WithMount),
                _ => Ok(Ended::BySignal),
            }
        }
        Ok(End::Session(Err(error))) => {
            tracing::error!(%error, "the session failed");
            Err(DaemonError::Session(error))
        }
        Ok(End::Session(Ok(()))) | Err(_) => Ok(Ended::WithMount),
    }
}

fn flush(flusher: &Flusher) {
    if let Err(error) = flusher.flush() {
        tracing::error!(%error, "the mount could not be flushed at the end");
    }
}

fn start_log(invocation: &Invocation, in_front: bool) -> Result<(), DaemonError> {
    let target = match &invocation.log_file {
        Some(path) => LogTarget::File(
            File::options()
                .create(true)
                .append(true)
                .open(path)
                .map_err(|source| DaemonError::LogFile {
                    path: path.clone(),
                    source,
                })?,
        ),
        None if in_front => LogTarget::Stderr,
        None => LogTarget::Syslog,
    };
    log::start(target, invocation.debug);
    Ok(())
}

/// Blocks, in this thread and all that it starts, the signals that end the process.
fn block_signals() -> io::Result<SigSet> {
    let mut signals = SigSet::empty();
    for signal in [Signal::SIGTERM, Signal::SIGINT, Signal::SIGHUP] {
        signals.add(signal);
    }
    signals.thread_block()?;
    Ok(signals)
}

fn wait_for_signals(signals: SigSet, ends: channel::Sender<End>) -> io::Result<()> {
    thread::Builder::new()
        .name("plyfs-signal".into())
        .spawn(move || {
            if let Ok(signal) = signals.wait() {
                // As above.
                let _ = ends.send(End::Signal(signal));
            }
        })?;
    Ok(())
}

/// Completes files that have largely been copied up, in a thread that nobody waits for.
fn complete_now_and_then(union: Arc<Union>, every: Duration) -> io::Result<()> {
    thread::Builder::new()
        .name("plyfs-complete".into())
        .spawn(move || {
            log_refusal("the priority of completions", process::give_way());
            loop {
                thread::sleep(every);
                match union.complete_hot() {
                    Ok(0) => {}
                    Ok(files) => tracing::debug!(files, "completed"),
                    Err(error) => {
                        tracing::warn!(%error, "a file could not be completed; it is tried again");
                    }
                }
            }
        })?;
    Ok(())
}

/// Everything here makes the process sturdier and none of it is needed; an old kernel or a
/// container refuses some.
fn protect() {
    // It holds a mount that others work in: the OOM killer is to take somebody else.
    log_refusal("the OOM score", process::set_oom_score_adj(-1000));
    // Memory reclaim may write to this mount, and must not wait for this process to do so.
    log_refusal("the I/O flusher mark", process::set_io_flusher());
    log_refusal("the limit of open files", process::raise_open_files());
    // Needed for the lines above alone; with it, writes of clients would go past their quotas.
    log_refusal("the set of capabilities", process::drop_sys_resource());
}

/// How many descriptors the union may keep. The process is for this one alone; the rest is for those
/// that requests hold while they run.
fn kept_descriptors() -> u64 {
    const MOST: u64 = 32_768;
    let limit = getrlimit(Resource::RLIMIT_NOFILE).map_or(1024, |(soft, _)| soft);
    // A file that is copied up in part is held by three.
    limit.min(MOST) / 4
}

fn log_refusal(what: &str, result: io::Result<()>) {
    if let Err(error) = result {
        tracing::debug!(%error, "{what} could not be set");
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::cow::UpperConfig;

    #[test]
    fn a_mount_inside_its_own_layers_is_refused() {
        let config = UnionConfig {
            lowers: vec!["/l/a".into(), "/l/b".into()],
            upper: Some(UpperConfig {
                dir: "/u/upper".into(),
                work: "/u/work".into(),
            }),
            ..UnionConfig::default()
        };
        for inside in ["/l/a", "/l/b/mnt", "/u/upper/x", "/u/work"] {
            let result = refuse_self_nesting(Path::new(inside), &config);
            assert!(
                matches!(result, Err(DaemonError::SelfNesting { .. })),
                "{inside}"
            );
        }
        for outside in ["/l", "/l/ab", "/u/merged"] {
            assert!(
                refuse_self_nesting(Path::new(outside), &config).is_ok(),
                "{outside}"
            );
        }
    }
}
