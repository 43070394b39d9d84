//! The control socket of a `plyfs` process: how plyd, or its successor, finds out that the process
//! lives, gets a duplicate of its FUSE descriptor, and asks it to flush, to
//! complete files, to seal the upper, to read mended layers anew, or to end.
//!
//! `plyfs --control PATH` listens on a SOCK_SEQPACKET Unix socket, mode 0600. One message is one JSON object;
//! descriptors travel with SCM_RIGHTS. The end of file on a connection is the death of the process.
//! The protocol carries a version; either side refuses one that it does not know. A request carries
//! a number and its answer the same one, so that an answer that came too late is not taken for the
//! next. An operation that the process does not know is answered with EOPNOTSUPP and costs nothing else. Connections come one after the other or side by side; each is served by a thread of its own.

use std::fs::{self, File};
use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use std::os::unix::fs::{FileTypeExt, MetadataExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::sync::{Arc, OnceLock};
use std::thread;
use std::time::{Duration, Instant};

use nix::sys::socket::{self, AddressFamily, SockFlag, SockType, UnixAddr, sockopt};
use nix::sys::stat::Mode;
use nix::sys::time::{TimeVal, TimeValLike};
use parking_lot::Mutex;

use super::server::Flusher;
use crate::cow::{Damage, Error as UnionError};
use crate::sys::fd_passing::{accept, recv_with_fds, send_with_fds};

/// The version of the protocol that this build speaks.
pub const VERSION: u32 = 1;

/// The longest message; the longest that is sent is an error with a path in it.
const MAX_MESSAGE: usize = 64 << 10;

/// Connections that may wait to be accepted.
const BACKLOG: i32 = 16;

/// What a plyfs says of itself.
#[derive(Clone, Debug, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
pub struct Hello {
    /// Version of the protocol.
    pub version: u32,
    /// Its process id.
    pub pid: u32,
    /// `CARGO_PKG_VERSION` of its build.
    pub release: String,
    /// The kernel's INIT has been answered: the mount serves.
    pub serving: bool,
    /// Contents of packed layers that could not be used when they were last read.
    #[serde(default)]
    pub damaged: u64,
    /// Something of the merged view could not.
    #[serde(default)]
    pub damaged_view: bool,
}

#[derive(Debug, serde::Serialize, serde::Deserialize)]
#[serde(rename_all = "snake_case")]
enum Operation {
    Hello { version: u32 },
    FuseFd,
    Flush,
    Complete,
    Seal,
    Refresh,
    Stop,
}

#[derive(Debug, serde::Serialize, serde::Deserialize)]
struct Request<O> {
    id: u64,
    operation: O,
}

#[derive(Debug, serde::Serialize, serde::Deserialize)]
#[serde(rename_all = "snake_case")]
enum Outcome {
    Hello(Hello),
    Done,
    Failed { errno: Option<i32>, message: String },
}

#[derive(Debug, serde::Serialize, serde::Deserialize)]
struct Reply {
    id: u64,
    outcome: Outcome,
}

fn bad_message(error: serde_json::Error) -> io::Error {
    io::Error::new(io::ErrorKind::InvalidData, error)
}

/// Calls `with` with an address for `path`. A path too long for sockaddr_un is reached through a
/// descriptor of its directory.
fn with_address<T>(path: &Path, with: impl FnOnce(&UnixAddr) -> io::Result<T>) -> io::Result<T> {
    if let Ok(address) = UnixAddr::new(path) {
        return with(&address);
    }
    let invalid = || io::Error::from_raw_os_error(libc::ENAMETOOLONG);
    let name = path.file_name().ok_or_else(invalid)?;
    let parent = path.parent().ok_or_else(invalid)?;
    let directory = File::options()
        .read(true)
        .custom_flags(libc::O_PATH | libc::O_DIRECTORY)
        .open(parent)?;
    let through = PathBuf::from(format!("/proc/self/fd/{}", directory.as_raw_fd())).join(name);
    let address = UnixAddr::new(&through).map_err(|_| invalid())?;
    with(&address)
}

fn new_socket() -> io::Result<OwnedFd> {
    Ok(socket::socket(
        AddressFamily::Unix,
        SockType::SeqPacket,
        SockFlag::SOCK_CLOEXEC,
        None,
    )?)
}

/// What the control socket gives access to.
pub struct Controlled {
    /// The FUSE descriptor.
    pub device: OwnedFd,
    /// There once the kernel's INIT has been answered.
    pub flusher: OnceLock<Flusher>,
    /// What could not be used when it was last read.
    pub damaged: Box<dyn Fn() -> Damage + Send + Sync>,
    /// Called by `stop`.
    pub stop: Box<dyn Fn() + Send + Sync>,
}

/// The listening socket. Its file is removed when this is dropped, unless another has taken its place.
pub struct ControlServer {
    listener: OwnedFd,
    path: PathBuf,
    /// Device and inode of the file, which no other has as long as the socket is there.
    identity: (u64, u64),
}

impl ControlServer {
    /// Listens at `path`, mode 0600. A socket that lies there already is replaced; anything else
    /// is left alone and an error.
    pub fn bind(path: &Path) -> io::Result<Self> {
        if fs::symlink_metadata(path).is_ok_and(|found| found.file_type().is_socket()) {
            fs::remove_file(path)?;
        }
        let listener = new_socket()?;
        // Linux gives the file the mode of the socket, so there is no moment at which it is open to others.
        nix::sys::stat::fchmod(&listener, Mode::S_IRUSR | Mode::S_IWUSR)?;
        with_address(path, |address| {
            Ok(socket::bind(listener.as_raw_fd(), address)?)
        })?;
        socket::listen(&listener, socket::Backlog::new(BACKLOG)?)?;
        Ok(Self {
            listener,
            path: path.to_owned(),
            identity: identity(path)?,
        })
    }

    /// Serves from a thread of its own until the process ends.
    pub fn serve(&self, controlled: Arc<Controlled>) -> io::Result<()> {
        let listener = self.listener.try_clone()?;
        thread::Builder::new()
            .name("plyfs-control".into())
            .spawn(move || {
                loop {
                    match accept(listener.as_fd()) {
                        Ok(connection) => serve_in_thread(connection, controlled.clone()),
                        Err(error) => {
                            tracing::warn!(%error, "a control connection could not be accepted");
                            // Out of descriptors or memory: others may end meanwhile.
                            thread::sleep(Duration::from_millis(100));
                        }
                    }
                }
            })?;
        Ok(())
    }
}

impl Drop for ControlServer {
    fn drop(&mut self) {
        if identity(&self.path).is_ok_and(|found| found == self.identity) {
            // The next who binds it replaces what stays.
            let _ = fs::remove_file(&self.path);
        }
    }
}

fn identity(path: &Path) -> io::Result<(u64, u64)> {
    let found = fs::symlink_metadata(path)?;
    Ok((found.dev(), found.ino()))
}

fn serve_in_thread(connection: OwnedFd, controlled: Arc<Controlled>) {
    let started = thread::Builder::new()
        .name("plyfs-control".into())
        .spawn(move || {
            if let Err(error) = serve_connection(&connection, &controlled) {
                tracing::warn!(%error, "a control connection ended");
            }
        });
    if let Err(error) = started {
        tracing::warn!(%error, "a control connection could not be served");
    }
}

fn serve_connection(connection: &OwnedFd, controlled: &Controlled) -> io::Result<()> {
    let peer = socket::getsockopt(connection, sockopt::PeerCredentials)?;
    if peer.uid() != 0 && peer.uid() != nix::unistd::geteuid().as_raw() {
        tracing::warn!(uid = peer.uid(), "a control connection was refused");
        return Ok(());
    }
    let mut buffer = vec![0; MAX_MESSAGE];
    loop {
        let (length, _) = recv_with_fds(connection.as_fd(), &mut buffer)?;
        if length == 0 {
            return Ok(());
        }
        let request: Request<serde_json::Value> =
            serde_json::from_slice(&buffer[..length]).map_err(bad_message)?;
        let asked = request.operation.to_string();
        let operation = serde_json::from_value(request.operation);
        let give_device = matches!(operation, Ok(Operation::FuseFd));
        let reply = Reply {
            id: request.id,
            outcome: match operation {
                Ok(operation) => perform(operation, controlled),
                Err(_) => unknown(&asked),
            },
        };
        let text = serde_json::to_vec(&reply).map_err(bad_message)?;
        let device = [controlled.device.as_fd()];
        let fds: &[BorrowedFd<'_>] = if give_device { &device } else { &[] };
        send_with_fds(connection.as_fd(), &text, fds)?;
    }
}

fn perform(operation: Operation, controlled: &Controlled) -> Outcome {
    match operation {
        Operation::Hello { version: VERSION } => {
            let damage = (controlled.damaged)();
            Outcome::Hello(Hello {
                version: VERSION,
                pid: std::process::id(),
                release: env!("CARGO_PKG_VERSION").to_owned(),
                serving: controlled.flusher.get().is_some(),
                damaged: damage.contents,
                damaged_view: damage.view,
            })
        }
        Operation::Hello { version } => Outcome::Failed {
            errno: Some(libc::EPROTONOSUPPORT),
            message: format!(
                "this plyfs speaks version {VERSION} of the control protocol, not {version}; use programs of one release"
            ),
        },
        Operation::FuseFd => Outcome::Done,
        Operation::Flush => by_flusher(controlled, Flusher::flush),
        Operation::Complete => by_flusher(controlled, Flusher::complete),
        Operation::Seal => by_flusher(controlled, Flusher::seal),
        Operation::Refresh => by_flusher(controlled, Flusher::refresh),
        Operation::Stop => {
            (controlled.stop)();
            Outcome::Done
        }
    }
}

/// The end of the connection would be taken for the end of this process.
fn unknown(operation: &str) -> Outcome {
    Outcome::Failed {
        errno: Some(libc::EOPNOTSUPP),
        message: format!(
            "plyfs {} does not know the operation {operation}; a plyfs of the caller's release does",
            env!("CARGO_PKG_VERSION")
        ),
    }
}

fn by_flusher(
    controlled: &Controlled,
    work: impl FnOnce(&Flusher) -> Result<(), UnionError>,
) -> Outcome {
    match controlled.flusher.get().map(work) {
        Some(Ok(())) => Outcome::Done,
        Some(Err(error)) => Outcome::Failed {
            errno: Some(error.errno),
            message: error.to_string(),
        },
        None => Outcome::Failed {
            errno: Some(libc::EAGAIN),
            message: "the mount does not serve yet; try again".to_owned(),
        },
    }
}

/// A connection to a plyfs. May be used from several threads; their calls take turns.
pub struct ControlClient {
    connection: OwnedFd,
    last_id: Mutex<u64>,
}

impl ControlClient {
    /// Connects to the socket at `path` and exchanges hellos within `timeout`. Paths longer than
    /// sockaddr_un allows are reached through a directory descriptor.
    pub fn connect(path: &Path, timeout: Duration) -> io::Result<(Self, Hello)> {
        let client = Self::dial(path, timeout)?;
        let hello = client.hello(timeout)?;
        Ok((client, hello))
    }

    /// Only connects: succeeds also when the process there lives and does not answer.
    pub fn dial(path: &Path, timeout: Duration) -> io::Result<Self> {
        let connection = new_socket()?;
        limit(&connection, timeout)?;
        with_address(path, |address| {
            Ok(socket::connect(connection.as_raw_fd(), address)?)
        })?;
        Ok(Self {
            connection,
            last_id: Mutex::new(0),
        })
    }

    /// Who listens there, as the kernel says. The number is that process's while the connection is open
    /// at its end.
    pub fn peer_pid(&self) -> io::Result<u32> {
        let peer = socket::getsockopt(&self.connection, sockopt::PeerCredentials)?;
        Ok(peer.pid().unsigned_abs())
    }

    /// Asks once more who is there, and whether it serves by now.
    pub fn hello(&self, timeout: Duration) -> io::Result<Hello> {
        match self.call(Operation::Hello { version: VERSION }, timeout)? {
            (Outcome::Hello(hello), _) => Ok(hello),
            (other, _) => Err(unexpected(&other)),
        }
    }

    /// A duplicate of the /dev/fuse descriptor.
    pub fn fuse_fd(&self, timeout: Duration) -> io::Result<OwnedFd> {
        let (outcome, fds) = self.call(Operation::FuseFd, timeout)?;
        fds.into_iter().next().ok_or_else(|| unexpected(&outcome))
    }

    /// Brings every dirty page of the mount to the upper and makes the upper durable.
    pub fn flush(&self, timeout: Duration) -> io::Result<()> {
        self.call(Operation::Flush, timeout).map(drop)
    }

    /// Brings up all data that files of the upper still have in lower layers.
    pub fn complete(&self, timeout: Duration) -> io::Result<()> {
        self.call(Operation::Complete, timeout).map(drop)
    }

    /// Has it leave the upper as it is from now on, access times included. For a mount that is read-only by now.
    pub fn seal(&self, timeout: Duration) -> io::Result<()> {
        self.call(Operation::Seal, timeout).map(drop)
    }

    /// Has it, and the kernel, read packed layers once more from now on: they were mended. A release that does not know how answers
    /// [`io::ErrorKind::Unsupported`].
    pub fn refresh(&self, timeout: Duration) -> io::Result<()> {
        self.call(Operation::Refresh, timeout).map(drop)
    }

    /// Asks the process to end: it goes on serving until the mount is gone or its connection is
    /// aborted, and then ends.
    pub fn stop(&self, timeout: Duration) -> io::Result<()> {
        self.call(Operation::Stop, timeout).map(drop)
    }

    /// For poll(2): readable or hung up means that the process is gone.
    pub fn as_fd(&self) -> BorrowedFd<'_> {
        self.connection.as_fd()
    }

    fn call(&self, operation: Operation, timeout: Duration) -> io::Result<(Outcome, Vec<OwnedFd>)> {
        let mut last_id = self.last_id.lock();
        *last_id += 1;
        let request = Request {
            id: *last_id,
            operation,
        };
        let deadline = Instant::now() + timeout;
        limit(&self.connection, timeout)?;
        let text = serde_json::to_vec(&request).map_err(bad_message)?;
        send_with_fds(self.connection.as_fd(), &text, &[]).map_err(timed_out)?;
        let mut buffer = vec![0; MAX_MESSAGE];
        loop {
            limit(
                &self.connection,
                deadline.saturating_duration_since(Instant::now()),
            )?;
            let (length, fds) =
                recv_with_fds(self.connection.as_fd(), &mut buffer).map_err(timed_out)?;
            if length == 0 {
                return Err(io::ErrorKind::UnexpectedEof.into());
            }
            let reply: Reply = serde_json::from_slice(&buffer[..length]).map_err(bad_message)?;
            if reply.id != request.id {
                continue;
            }
            return match reply.outcome {
                Outcome::Failed { errno, message } => {
                    Err(match errno.map(io::Error::from_raw_os_error) {
                        Some(error) => io::Error::new(error.kind(), message),
                        None => io::Error::other(message),
                    })
                }
                outcome => Ok((outcome, fds)),
            };
        }
    }
}

fn unexpected(outcome: &Outcome) -> io::Error {
    io::Error::new(
        io::ErrorKind::InvalidData,
        format!("the plyfs process answered {outcome:?} to another question"),
    )
}

/// A socket's timeout shows as EAGAIN.
fn timed_out(error: io::Error) -> io::Error {
    if error.kind() == io::ErrorKind::WouldBlock {
        return io::ErrorKind::TimedOut.into();
    }
    error
}

/// Limits every call on the socket; 0 would mean no limit, so it becomes the shortest one.
fn limit(socket: &OwnedFd, timeout: Duration) -> io::Result<()> {
    let micros = i64::try_from(timeout.as_micros())
        .unwrap_or(i64::MAX)
        .max(1);
    let value = TimeVal::microseconds(micros.min(i64::from(i32::MAX) * 1000));
    socket::setsockopt(socket, sockopt::ReceiveTimeout, &value)?;
    socket::setsockopt(socket, sockopt::SendTimeout, &value)?;
    Ok(())
}

#[cfg(test)]
mod tests {
    use std::io::Read;
    use std::sync::atomic::{AtomicBool, Ordering};

    use super::*;

    const SOON: Duration = Duration::from_secs(20);

    fn serve(path: &Path) -> (ControlServer, Arc<AtomicBool>) {
        let stopped = Arc::new(AtomicBool::new(false));
        let flag = stopped.clone();
        let server = ControlServer::bind(path).unwrap();
        let controlled = Controlled {
            device: File::open("/proc/self/comm").unwrap().into(),
            flusher: OnceLock::new(),
            damaged: Box::new(|| Damage {
                contents: 7,
                view: true,
            }),
            stop: Box::new(move || flag.store(true, Ordering::SeqCst)),
        };
        server.serve(Arc::new(controlled)).unwrap();
        (server, stopped)
    }

    #[test]
    fn two_clients_are_served_side_by_side() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("control");
        let (server, stopped) = serve(&path);
        assert_eq!(fs::metadata(&path).unwrap().mode() & 0o777, 0o600);
        let (first, hello) = ControlClient::connect(&path, SOON).unwrap();
        let (second, again) = ControlClient::connect(&path, SOON).unwrap();
        assert_eq!(hello, again);
        assert_eq!((hello.version, hello.pid), (VERSION, std::process::id()));
        assert!(!hello.serving);
        let mut text = String::new();
        File::from(second.fuse_fd(SOON).unwrap())
            .read_to_string(&mut text)
            .unwrap();
        assert!(!text.is_empty());
        let error = first.flush(SOON).unwrap_err();
        assert_eq!(error.kind(), io::ErrorKind::WouldBlock, "{error}");
        first.stop(SOON).unwrap();
        assert!(stopped.load(Ordering::SeqCst));
        drop(server);
        assert!(!path.exists());
    }

    #[test]
    fn a_path_longer_than_an_address_is_reached() {
        let dir = tempfile::tempdir().unwrap();
        let deep = dir.path().join("d".repeat(120));
        fs::create_dir(&deep).unwrap();
        let path = deep.join("control");
        let _server = serve(&path);
        ControlClient::connect(&path, SOON).unwrap();
    }

    /// The end of a plyfs took the socket from another that had been started in its place.
    #[test]
    fn a_socket_that_has_taken_the_place_of_one_outlives_it() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("control");
        let first = serve(&path);
        let _second = serve(&path);
        drop(first);
        ControlClient::connect(&path, SOON).unwrap();
    }

    #[test]
    fn a_stale_socket_is_replaced_but_no_other_file() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("control");
        let stale = new_socket().unwrap();
        socket::bind(stale.as_raw_fd(), &UnixAddr::new(&path).unwrap()).unwrap();
        drop(stale);
        let _server = serve(&path);
        let file = dir.path().join("file");
        fs::write(&file, "mine").unwrap();
        assert!(ControlServer::bind(&file).is_err());
        assert_eq!(fs::read(&file).unwrap(), b"mine");
    }

    /// Such a request once ended the connection, which whoever held it took for the death of plyfs.
    #[test]
    fn an_operation_that_is_not_known_is_refused_and_the_connection_goes_on() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("control");
        let _server = serve(&path);
        let (client, _) = ControlClient::connect(&path, SOON).unwrap();
        for operation in [r#""dance""#, r#"{"dance":{"steps":3}}"#] {
            let request = format!(r#"{{"id":1000,"operation":{operation}}}"#);
            send_with_fds(client.as_fd(), request.as_bytes(), &[]).unwrap();
            let mut buffer = vec![0; MAX_MESSAGE];
            let (length, _) = recv_with_fds(client.as_fd(), &mut buffer).unwrap();
            let reply: Reply = serde_json::from_slice(&buffer[..length]).unwrap();
            assert_eq!(reply.id, 1000);
            let Outcome::Failed { errno, message } = reply.outcome else {
                panic!("it danced");
            };
            assert_eq!(errno, Some(libc::EOPNOTSUPP));
            assert!(message.contains("dance"), "{message}");
        }
        client.hello(SOON).unwrap();
    }

    #[test]
    fn a_version_that_is_not_known_is_refused() {
        let controlled = Controlled {
            device: File::open("/dev/null").unwrap().into(),
            flusher: OnceLock::new(),
            damaged: Box::new(Damage::default),
            stop: Box::new(|| {}),
        };
        let outcome = perform(
            Operation::Hello {
                version: VERSION + 1,
            },
            &controlled,
        );
        assert!(matches!(outcome, Outcome::Failed { .. }));
    }
}
