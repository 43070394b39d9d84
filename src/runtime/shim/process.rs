//! A process in the container, the container's own or an exec's, and its streams.

use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::net::UnixListener;
use std::path::PathBuf;
use std::process::Stdio;

use nix::errno::Errno;
use nix::fcntl::{FcntlArg, OFlag, fcntl};
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::unistd::{Pid, pipe2, read, write};

use crate::runtime::log::{LONGEST, Stream};
use crate::runtime::wire::Window;
use crate::sys::{child, fd_passing, terminal};

/// Input that waits for its process is at most about this much; then its sender waits.
pub const INPUT_LIMIT: usize = 256 << 10;
/// End-of-file as a terminal's user types it.
const END_OF_TRANSMISSION: u8 = 4;

/// A process of the container.
#[derive(Debug, Default)]
pub struct Process {
    /// Its id once the OCI runtime has told it.
    pub pid: Option<Pid>,
    /// Wakes the loop when it ends, on kernels that can.
    pub pidfd: Option<OwnedFd>,
    /// It runs, or has run, its program; before that it is the OCI runtime's own.
    pub executed: bool,
    /// The client that is to hear whether it runs its program, once the OCI runtime has done its part.
    pub starting: Option<u64>,
    /// How it ended.
    pub end: Option<End>,
    /// Its streams, our end.
    pub streams: Streams,
}

/// The end of a process.
#[derive(Clone, Copy, Debug)]
pub struct End {
    /// Its exit code, or 128 and the signal's number.
    pub code: i32,
    /// It had come to run its program.
    pub executed: bool,
}

impl Process {
    /// Looks whether it has come to run its program.
    pub fn look(&mut self) {
        if let (Some(pid), false) = (self.pid, self.executed) {
            self.executed = match self.end {
                Some(end) => end.executed,
                // Where nothing can be known, what the OCI runtime has said counts.
                None => child::has_executed(pid).unwrap_or(true),
            };
        }
    }

    /// Learns its id.
    pub fn set_pid(&mut self, pid: Pid) {
        self.pid = Some(pid);
        // Without one, SIGCHLD alone wakes the loop, and the loop looks for itself now and then.
        self.pidfd = child::pidfd_open(pid).ok();
    }
}

/// Our end of a process's streams. With a terminal, `input` and `stdout` are its master.
#[derive(Debug, Default)]
pub struct Streams {
    input: Option<OwnedFd>,
    stdout: Option<OwnedFd>,
    stderr: Option<OwnedFd>,
    console: Option<Console>,
    terminal: Option<OwnedFd>,
    window: Option<Window>,
    queue: Vec<u8>,
    close_after_queue: bool,
}

/// The child's end of its streams.
#[derive(Debug)]
pub struct ChildEnds {
    /// To be its standard input.
    pub stdin: Stdio,
    /// To be its standard output.
    pub stdout: Stdio,
    /// To be its standard error.
    pub stderr: Stdio,
}

/// Where the OCI runtime delivers the master of a terminal.
#[derive(Debug)]
struct Console {
    listener: UnixListener,
    path: PathBuf,
}

/// What reading an output gave.
#[derive(Debug)]
pub enum Output {
    /// Some bytes.
    Data(Vec<u8>),
    /// Nothing at present.
    Empty,
    /// No more will come.
    End,
}

impl Streams {
    /// Pipes; without `stdin` the process reads /dev/null.
    pub fn pipes(stdin: bool) -> io::Result<(Self, ChildEnds)> {
        let (stdout, stdout_child) = pipe2(OFlag::O_CLOEXEC)?;
        let (stderr, stderr_child) = pipe2(OFlag::O_CLOEXEC)?;
        nonblocking(&stdout)?;
        nonblocking(&stderr)?;
        let mut streams = Self {
            stdout: Some(stdout),
            stderr: Some(stderr),
            ..Self::default()
        };
        let mut ends = ChildEnds {
            stdin: Stdio::null(),
            stdout: stdout_child.into(),
            stderr: stderr_child.into(),
        };
        if stdin {
            let (stdin_child, input) = pipe2(OFlag::O_CLOEXEC)?;
            nonblocking(&input)?;
            streams.input = Some(input);
            ends.stdin = stdin_child.into();
        }
        Ok((streams, ends))
    }

    /// A terminal, whose master the OCI runtime will send to the socket `name` in the current
    /// directory.
    pub fn terminal(name: &str, window: Option<Window>) -> io::Result<Self> {
        let path = PathBuf::from(name);
        remove_if_there(&path)?;
        let listener = UnixListener::bind(&path)?;
        listener.set_nonblocking(true)?;
        Ok(Self {
            console: Some(Console { listener, path }),
            window,
            ..Self::default()
        })
    }

    /// Takes the master of the terminal, if the OCI runtime has sent it.
    pub fn accept_terminal(&mut self) -> io::Result<()> {
        let Some(console) = &self.console else {
            return Ok(());
        };
        let connection = match console.listener.accept() {
            Ok((connection, _)) => connection,
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => return Ok(()),
            Err(error) => return Err(error),
        };
        connection.set_read_timeout(Some(std::time::Duration::from_secs(10)))?;
        let master = fd_passing::recv_with_fds(connection.as_fd(), &mut [0; 4096])?
            .1
            .into_iter()
            .next()
            .ok_or_else(|| io::Error::other("the OCI runtime sent no terminal"))?;
        nonblocking(&master)?;
        remove_if_there(&console.path)?;
        self.console = None;
        self.input = Some(master.try_clone()?);
        self.stdout = Some(master.try_clone()?);
        self.terminal = Some(master);
        match self.window {
            Some(window) => self.resize(window),
            None => Ok(()),
        }
    }

    /// As `accept_terminal`, once the OCI runtime has sent whatever it sends. Fails if a terminal that is needed has not come:
    /// nobody would hold it for the process.
    pub fn expect_terminal(&mut self) -> io::Result<()> {
        self.accept_terminal()?;
        match &self.console {
            None => Ok(()),
            Some(_) => Err(io::Error::other("the OCI runtime has sent no terminal")),
        }
    }

    /// The listener to wait for, while the terminal has not come.
    pub fn console(&self) -> Option<BorrowedFd<'_>> {
        self.console
            .as_ref()
            .map(|console| console.listener.as_fd())
    }

    /// An output to wait for.
    pub fn output(&self, stream: Stream) -> Option<BorrowedFd<'_>> {
        self.slot(stream).map(AsFd::as_fd)
    }

    fn slot(&self, stream: Stream) -> Option<&OwnedFd> {
        match stream {
            Stream::Stdout => self.stdout.as_ref(),
            Stream::Stderr => self.stderr.as_ref(),
        }
    }

    /// The input, while something waits to be written to it.
    pub fn pending_input(&self) -> Option<BorrowedFd<'_>> {
        (!self.queue.is_empty())
            .then_some(self.input.as_ref()?.as_fd())
            .map(Some)?
    }

    /// No output is open any more.
    pub fn outputs_closed(&self) -> bool {
        self.stdout.is_none() && self.stderr.is_none() && self.console.is_none()
    }

    /// Gives up one output.
    pub fn close_output(&mut self, stream: Stream) {
        match stream {
            Stream::Stdout => self.stdout = None,
            Stream::Stderr => self.stderr = None,
        }
    }

    /// Reads what there is, at most one record's worth.
    pub fn read_output(&mut self, stream: Stream) -> Output {
        let Some(fd) = self.slot(stream) else {
            return Output::End;
        };
        let mut bytes = vec![0; LONGEST];
        match read(fd, &mut bytes) {
            Ok(length) if length > 0 => {
                bytes.truncate(length);
                Output::Data(bytes)
            }
            Err(Errno::EAGAIN | Errno::EINTR) => Output::Empty,
            // A terminal whose last user is gone says EIO.
            Ok(_) | Err(_) => {
                self.close_output(stream);
                Output::End
            }
        }
    }

    /// More input may be taken.
    pub fn wants_input(&self) -> bool {
        self.queue.len() < INPUT_LIMIT
    }

    /// Queues input. It is dropped when the process has closed its end, as a pipe would.
    pub fn push_input(&mut self, data: &[u8]) {
        if (self.input.is_some() || self.console.is_some()) && !self.close_after_queue {
            self.queue.extend_from_slice(data);
            self.write_input();
        }
    }

    /// After what is queued there is no more input.
    pub fn close_input(&mut self) {
        if self.terminal.is_some() || self.console.is_some() {
            self.push_input(&[END_OF_TRANSMISSION]);
        } else {
            self.close_after_queue = true;
            self.write_input();
        }
    }

    /// Writes as much of the queue as the process takes.
    pub fn write_input(&mut self) {
        while let (Some(input), false) = (&self.input, self.queue.is_empty()) {
            match write(input, &self.queue) {
                Ok(length) => drop(self.queue.drain(..length)),
                Err(Errno::EAGAIN | Errno::EINTR) => return,
                Err(_) => {
                    self.queue.clear();
                    self.input = None;
                }
            }
        }
        if self.close_after_queue && self.queue.is_empty() {
            self.input = None;
        }
    }

    /// Sets the terminal's size, now or when it comes.
    pub fn resize(&mut self, window: Window) -> io::Result<()> {
        self.window = Some(window);
        match &self.terminal {
            Some(master) => terminal::set_window_size(master, window.rows, window.columns),
            None => Ok(()),
        }
    }

    /// What can be read from stderr, or the terminal, without waiting: after a failed start, the OCI runtime's words.
    pub fn take_words(&mut self) -> String {
        let stream = match self.terminal {
            Some(_) => Stream::Stdout,
            None => Stream::Stderr,
        };
        let mut bytes = Vec::new();
        while let Output::Data(data) = self.read_output(stream) {
            bytes.extend(data);
        }
        String::from_utf8_lossy(&bytes).into_owned()
    }
}

fn remove_if_there(path: &std::path::Path) -> io::Result<()> {
    match std::fs::remove_file(path) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => Err(error),
        _ => Ok(()),
    }
}

fn nonblocking(fd: impl AsFd) -> io::Result<()> {
    let flags = OFlag::from_bits_retain(fcntl(&fd, FcntlArg::F_GETFL)?);
    fcntl(&fd, FcntlArg::F_SETFL(flags | OFlag::O_NONBLOCK))?;
    Ok(())
}

/// Waits until one of `fds` is ready and answers what each is ready for.
pub fn wait(
    fds: &[(BorrowedFd<'_>, PollFlags)],
    timeout: PollTimeout,
) -> io::Result<Vec<PollFlags>> {
    let mut set: Vec<_> = fds
        .iter()
        .map(|&(fd, flags)| PollFd::new(fd, flags))
        .collect();
    match poll(&mut set, timeout) {
        Ok(_) => {}
        Err(Errno::EINTR) => return Ok(vec![PollFlags::empty(); fds.len()]),
        Err(error) => return Err(error.into()),
    }
    Ok(set
        .iter()
        .map(|fd| fd.revents().unwrap_or(PollFlags::empty()))
        .collect())
}
