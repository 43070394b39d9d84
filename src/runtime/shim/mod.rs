//! `plyshim`: the process that a container belongs to.
//!
//! plyd starts one for a container and can then die, be upgraded, or come back: the shim goes on. It is
//! a single thread around poll(2) with no blocking call in it; the OCI runtime's commands run as its
//! children. It is the subreaper of everything in the container, so the container's own process and
//! every exec become its children when the OCI runtime has ended, and it alone can wait for them.
//!
//! - Output is appended to the log ([`super::log`]) and nowhere else. Whoever attaches reads the log from
//!   where it was at that moment, each at its own pace: a slow client delays neither the container nor another client,
//!   and loses nothing. An exec's output is not logged; it waits in its pipe for its client.
//! - Input is taken from a client only as fast as the process reads it.
//! - A full disk stops the log: the container's output then waits in its pipe until there is room.
//! - The end of the container is written durably ([`super::state`]) before anyone hears of it.
//! - It ends when the container has ended, the OCI runtime has cleaned up and every client has been
//!   served; or when its container was not started and nobody is connected.
//!
//! Its working directory is the container's state directory, so that no socket path can be too long.

mod conn;
mod exits;
mod jobs;
mod process;
mod requests;
mod server;

use std::fs::{self, File, OpenOptions};
use std::io::{self, Write};
use std::os::unix::fs::{OpenOptionsExt, PermissionsExt};
use std::os::unix::net::UnixListener;
use std::path::PathBuf;

use nix::errno::Errno;
use nix::fcntl::{Flock, FlockArg};
use nix::sys::prctl::set_child_subreaper;
use nix::sys::signal::Signal;
use nix::unistd::{dup2_stderr, dup2_stdout, setsid};

use super::log::LogWriter;
use super::state::STATE_RECORD;
use crate::store::record::RecordDir;
use crate::sys::child::SignalPipe;
use server::Shim;

/// Name of the shim's socket in the container's state directory.
pub const SOCKET: &str = "shim.sock";
/// What the shim writes to standard output when it can be connected to; anything else is an error.
pub const READY: &str = "ready\n";

/// What a shim has to know of its container.
#[derive(Clone, Debug)]
pub struct Config {
    /// Id of the container.
    pub id: String,
    /// The container's directory below plyd's root: bundle, log, state record.
    pub dir: PathBuf,
    /// The container's directory below plyd's state directory: socket and scratch files.
    pub run_dir: PathBuf,
    /// The OCI runtime.
    pub runtime: PathBuf,
    /// The OCI runtime's state directory.
    pub runtime_root: PathBuf,
    /// The process gets a terminal.
    pub tty: bool,
    /// Its standard input can be written to by clients.
    pub stdin: bool,
}

/// Serves the container until its end. Says [`READY`] on standard output, then lets go of it.
pub fn run(config: Config) -> io::Result<()> {
    std::env::set_current_dir(&config.run_dir)?;
    // Already a session leader if started from a shell.
    match setsid() {
        Ok(_) | Err(Errno::EPERM) => {}
        Err(error) => return Err(error.into()),
    }
    let lock = OpenOptions::new()
        .write(true)
        .create(true)
        .truncate(false)
        .mode(0o600)
        .open("lock")?;
    let _lock = Flock::lock(lock, FlockArg::LockExclusiveNonblock).map_err(|(_, errno)| {
        let problem = format!("another shim serves this container already: {errno}");
        io::Error::new(io::ErrorKind::AddrInUse, problem)
    })?;
    set_child_subreaper(true)?;
    // Terminations are for the container, not for its shim; the handler only wakes the loop.
    let signals = SignalPipe::install(&[
        Signal::SIGCHLD,
        Signal::SIGTERM,
        Signal::SIGINT,
        Signal::SIGHUP,
    ])?;
    let log = LogWriter::open(&config.dir.join("log"))?;
    let records = RecordDir::open(&config.dir.join("state")).map_err(io::Error::other)?;
    let state = records
        .get(STATE_RECORD)
        .map_err(io::Error::other)?
        .unwrap_or_default();
    let listener = listen()?;
    let mut shim = Shim::new(config, listener, signals, log, records, state);
    let complaints = OpenOptions::new()
        .append(true)
        .create(true)
        .mode(0o600)
        .open("shim.log")?;
    io::stdout().write_all(READY.as_bytes())?;
    io::stdout().flush()?;
    dup2_stdout(File::open("/dev/null")?)?;
    dup2_stderr(complaints)?;
    shim.serve()
}

fn listen() -> io::Result<UnixListener> {
    match fs::remove_file(SOCKET) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(error),
        _ => {}
    }
    // Bound under a name that nobody connects to until its mode is right.
    let temporary = "shim.sock.new";
    match fs::remove_file(temporary) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(error),
        _ => {}
    }
    let listener = UnixListener::bind(temporary)?;
    fs::set_permissions(temporary, fs::Permissions::from_mode(0o600))?;
    listener.set_nonblocking(true)?;
    fs::rename(temporary, SOCKET)?;
    Ok(listener)
}
