//! The streams of a process in a container, carried between plyd and our own stdin, stdout and stderr.
//!
//! Reading stdin blocks in a thread of its own that nobody waits for: the command ends when the
//! process ends, not when the user presses a key. Signals for a container do not travel here but by
//! a call of their own: a process that does not read its stdin blocks this stream.

use std::io;
use std::os::fd::AsFd;

use nix::errno::Errno;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use tokio::signal::unix::{Signal as Listener, SignalKind, signal};
use tokio::sync::mpsc;
use tokio_stream::wrappers::ReceiverStream;
use tonic::Streaming;

use super::client::Client;
use super::error::{Error, Result};
use super::signals::Signals;
use super::terminal;
use crate::grpc::pb::plywood::stdio_request::Part;
use crate::grpc::pb::plywood::{
    AttachStart, ExecStart, KillContainerRequest, StdioRequest, StdioResponse, stdio_response,
};

/// Bytes read from stdin at once.
const CHUNK: usize = 64 << 10;

/// The streams of one process.
pub struct Session {
    to: mpsc::Sender<StdioRequest>,
    from: Streaming<StdioResponse>,
}

/// How the signals that we get reach the process.
pub enum Forward<'a> {
    /// By a call, to the first process of this container.
    Kill(&'a Client, &'a str),
    /// On the stream: the only way to a process of `exec`.
    Stream,
}

impl Session {
    /// Joins a container's streams; from then on none of its output is lost to us.
    pub async fn attach(client: &Client, start: AttachStart) -> Result<Self> {
        let (to, from) = mpsc::channel(8);
        // The channel is empty and its receiver is ours: this cannot fail.
        let _ignored = to.try_send(message(Part::Attach(start)));
        let call = client
            .containers()
            .attach(ReceiverStream::new(from))
            .await?;
        Self::open(to, call.into_inner()).await
    }

    /// Starts one more process in a container.
    pub async fn exec(client: &Client, start: ExecStart) -> Result<Self> {
        let (to, from) = mpsc::channel(8);
        let _ignored = to.try_send(message(Part::Exec(start)));
        let call = client.containers().exec(ReceiverStream::new(from)).await?;
        Self::open(to, call.into_inner()).await
    }

    async fn open(
        to: mpsc::Sender<StdioRequest>,
        mut from: Streaming<StdioResponse>,
    ) -> Result<Self> {
        match from.message().await?.and_then(|response| response.part) {
            Some(stdio_response::Part::Attached(_)) => Ok(Self { to, from }),
            _ => Err(Error::Protocol("joining the process")),
        }
    }

    /// Carries everything until the process ends; returns its exit code.
    pub async fn pump(
        self,
        stdin: bool,
        tty: bool,
        signals: &mut Signals,
        forward: Forward<'_>,
    ) -> Result<i32> {
        if stdin {
            let to = self.to.clone();
            tokio::task::spawn_blocking(move || read_stdin(&to));
        }
        let mut resized = match tty {
            true => Some(listen(SignalKind::window_change())?),
            false => None,
        };
        // A task of its own, so that a slow reader of our output does not hold back signals.
        let mut output = tokio::spawn(deliver_all(self.from));
        loop {
            tokio::select! {
                done = &mut output => {
                    return done.unwrap_or(Err(Error::Protocol("running the process")));
                }
                signal = signals.next() => match signal {
                    Ok(signal) => pass_on(&self.to, &forward, signal.name).await,
                    Err(signal) => return Err(Error::Interrupted {
                        message: "interrupted; the process was left running".to_owned(),
                        signal: signal.number,
                    }),
                },
                () = changed(&mut resized) => {
                    if let Some(size) = terminal::size() {
                        // A full stream means unread stdin; the next resize makes up for this one.
                        let _ignored = self.to.try_send(message(Part::Resize(size)));
                    }
                }
            }
        }
    }
}

/// Passes a signal on. That it does not arrive because the process has just ended is no error: its
/// exit code is on the way.
async fn pass_on(to: &mpsc::Sender<StdioRequest>, forward: &Forward<'_>, name: &str) {
    match forward {
        Forward::Kill(client, id) => {
            let request = KillContainerRequest {
                id: (*id).to_owned(),
                signal: name.to_owned(),
            };
            let _ignored = client.containers().kill(request).await;
        }
        Forward::Stream => {
            let _ignored = to.send(message(Part::Signal(name.to_owned()))).await;
        }
    }
}

fn message(part: Part) -> StdioRequest {
    StdioRequest { part: Some(part) }
}

fn listen(kind: SignalKind) -> Result<Listener> {
    signal(kind).map_err(|source| Error::Stdio {
        action: "catch signals",
        source,
    })
}

async fn changed(listener: &mut Option<Listener>) {
    match listener {
        Some(listener) => {
            listener.recv().await;
        }
        None => std::future::pending().await,
    }
}

/// Writes what the process writes until it ends; returns its exit code.
async fn deliver_all(mut from: Streaming<StdioResponse>) -> Result<i32> {
    let mut exit_code = None;
    while let Some(response) = from.message().await? {
        let written = match response.part {
            Some(stdio_response::Part::Stdout(bytes)) => write(io::stdout(), &bytes),
            Some(stdio_response::Part::Stderr(bytes)) => write(io::stderr(), &bytes),
            Some(stdio_response::Part::ExitCode(code)) => {
                exit_code = Some(code);
                Ok(())
            }
            Some(stdio_response::Part::Attached(_)) | None => Ok(()),
        };
        written.map_err(|source| Error::Stdio {
            action: "write the process's output",
            source,
        })?;
    }
    exit_code.ok_or(Error::Protocol("running the process"))
}

/// Writes everything at once. Blocks where the reader of our output is slow; the runtime moves its
/// other work away meanwhile.
fn write(out: impl AsFd, mut bytes: &[u8]) -> io::Result<()> {
    tokio::task::block_in_place(|| {
        while !bytes.is_empty() {
            match nix::unistd::write(&out, bytes) {
                Ok(count) => bytes = &bytes[count..],
                Err(Errno::EINTR) => {}
                Err(Errno::EAGAIN) => wait_for(&out, PollFlags::POLLOUT)?,
                Err(error) => return Err(error.into()),
            }
        }
        Ok(())
    })
}

/// Waits on a descriptor that whoever shares it with us has made non-blocking.
fn wait_for(fd: impl AsFd, events: PollFlags) -> io::Result<()> {
    match poll(&mut [PollFd::new(fd.as_fd(), events)], PollTimeout::NONE) {
        Ok(_) | Err(Errno::EINTR) => Ok(()),
        Err(error) => Err(error.into()),
    }
}

fn read_stdin(to: &mpsc::Sender<StdioRequest>) {
    let stdin = io::stdin();
    let mut buffer = vec![0; CHUNK];
    loop {
        let part = match nix::unistd::read(&stdin, &mut buffer) {
            Ok(count) if count > 0 => Part::Stdin(buffer[..count].to_vec()),
            Err(Errno::EINTR) => continue,
            Err(Errno::EAGAIN) if wait_for(&stdin, PollFlags::POLLIN).is_ok() => continue,
            // A stdin that cannot be read has ended for the process, too.
            Ok(_) | Err(_) => Part::CloseStdin(true),
        };
        let last = matches!(part, Part::CloseStdin(_));
        if to.blocking_send(message(part)).is_err() || last {
            return;
        }
    }
}
