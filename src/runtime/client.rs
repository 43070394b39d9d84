//! plyd's end of the conversation with a shim: starting one, connecting to it, asking it.

use std::fs::File;
use std::io;
use std::os::fd::AsRawFd;
use std::path::{Path, PathBuf};
use std::process::Stdio;
use std::time::Duration;

use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::UnixStream;
use tokio::net::unix::{OwnedReadHalf, OwnedWriteHalf};
use tokio::process::Command;
use tokio::time::timeout;

use super::lookup::{Answer, Question};
use super::shim::{Config, READY, SOCKET};
use super::wire::{self, Decoder, Frame, Reply, Request, VERSION};

/// How long a shim may take for anything that does not wait for the container.
pub const PATIENCE: Duration = Duration::from_secs(30);

/// Why a shim did not do what it was asked.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// No shim listens: the container does not run, or its shim has died.
    #[error("nothing listens at the container's shim socket")]
    Absent,
    /// The shim hung up in the middle: it has died, or the container has ended.
    #[error("the container's shim has gone")]
    Gone,
    /// It answered that it could not.
    #[error("{message}")]
    Refused {
        /// 125, 126 or 127.
        exit_code: i32,
        /// Why.
        message: String,
    },
    /// It could not be started.
    #[error(
        "cannot start {program}: {problem}; it is installed beside plyd, or named with --plyshim"
    )]
    Launch {
        /// The program.
        program: PathBuf,
        /// Why.
        problem: String,
    },
    /// It ended at once.
    #[error("the container's shim cannot serve it: {0}")]
    Ended(String),
    /// It does not answer.
    #[error("the container's shim has not answered for {} seconds", PATIENCE.as_secs())]
    Silent,
    /// It answered something else than what was asked.
    #[error("the container's shim answered {0}, which was not asked; it is of another release")]
    Unexpected(String),
    /// The connection failed.
    #[error("the connection to the container's shim failed: {0}")]
    Io(#[from] io::Error),
}

/// Result of a conversation with a shim.
pub type Result<T, E = Error> = std::result::Result<T, E>;

/// Starts a shim and waits until it can be connected to. It stays when this process ends.
pub async fn launch(program: &Path, config: &Config) -> Result<()> {
    let fail = |problem: String| Error::Launch {
        program: program.to_owned(),
        problem,
    };
    let mut command = Command::new(program);
    command
        .arg("serve")
        .arg("--id")
        .arg(&config.id)
        .arg("--dir")
        .arg(&config.dir)
        .arg("--run-dir")
        .arg(&config.run_dir)
        .arg("--runtime")
        .arg(&config.runtime)
        .arg("--runtime-root")
        .arg(&config.runtime_root)
        .args(config.tty.then_some("--tty"))
        .args(config.stdin.then_some("--stdin"))
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped());
    // tokio reaps it whenever it ends, also when this handle is gone.
    let mut child = command.spawn().map_err(|error| fail(error.to_string()))?;
    let (Some(mut stdout), Some(mut stderr)) = (child.stdout.take(), child.stderr.take()) else {
        return Err(fail("it has no output".to_owned()));
    };
    let mut said = String::new();
    let mut complaint = String::new();
    let heard = async {
        stdout.read_to_string(&mut said).await?;
        stderr.read_to_string(&mut complaint).await
    };
    match timeout(PATIENCE, heard).await {
        Ok(Ok(_)) if said == READY => Ok(()),
        Ok(Ok(_)) => Err(Error::Ended(complaint.trim().to_owned())),
        Ok(Err(error)) => Err(fail(error.to_string())),
        Err(_) => {
            child.start_kill()?;
            Err(Error::Silent)
        }
    }
}

/// Asks `plyshim lookup`, which is killed if it takes too long. The inner error is the question's own: a
/// sentence for whoever named the user, the directory or the volume.
pub async fn look_up(program: &Path, question: &Question) -> Result<Result<Answer, String>> {
    let fail = |problem: String| Error::Launch {
        program: program.to_owned(),
        problem,
    };
    let mut child = Command::new(program)
        .arg("lookup")
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .kill_on_drop(true)
        .spawn()
        .map_err(|error| fail(error.to_string()))?;
    let json = serde_json::to_vec(question).map_err(io::Error::other)?;
    let answered = async {
        if let Some(mut stdin) = child.stdin.take() {
            stdin.write_all(&json).await?;
        }
        child.wait_with_output().await
    };
    let output = timeout(PATIENCE, answered)
        .await
        .map_err(|_| Error::Silent)?
        .map_err(|error| fail(error.to_string()))?;
    if !output.status.success() {
        let problem = String::from_utf8_lossy(&output.stderr).trim().to_owned();
        return Ok(Err(problem));
    }
    let answer = serde_json::from_slice(&output.stdout).map_err(|error| fail(error.to_string()))?;
    Ok(Ok(answer))
}

/// A connection to a shim.
#[derive(Debug)]
pub struct ShimClient {
    reader: ShimReader,
    writer: ShimWriter,
    /// Process id of the shim.
    pub pid: u32,
}

/// The half that hears.
#[derive(Debug)]
pub struct ShimReader {
    stream: OwnedReadHalf,
    decoder: Decoder,
}

/// The half that speaks.
#[derive(Debug)]
pub struct ShimWriter {
    stream: OwnedWriteHalf,
}

impl ShimClient {
    /// Connects to the shim that serves the state directory `run_dir`.
    pub async fn connect(run_dir: &Path) -> Result<Self> {
        // Through the descriptor's short name, since a socket's path may have 107 bytes at most.
        let absent = |error: io::Error| match error.kind() {
            // Reset is the connection of a shim that ended before it took it.
            io::ErrorKind::NotFound
            | io::ErrorKind::ConnectionRefused
            | io::ErrorKind::ConnectionReset => Error::Absent,
            _ => Error::Io(error),
        };
        let dir = File::open(run_dir).map_err(absent)?;
        let path = format!("/proc/self/fd/{}/{SOCKET}", dir.as_raw_fd());
        let stream = UnixStream::connect(path).await.map_err(absent)?;
        let (reader, writer) = stream.into_split();
        let mut client = Self {
            reader: ShimReader {
                stream: reader,
                decoder: Decoder::default(),
            },
            writer: ShimWriter { stream: writer },
            pid: 0,
        };
        match client.ask(&Request::Hello { version: VERSION }).await? {
            Reply::Hello { version, pid } if version == VERSION => {
                client.pid = pid;
                Ok(client)
            }
            other => Err(Error::Unexpected(format!("{other:?}"))),
        }
    }

    /// Asks, and waits a limited time for the answer; a refusal is an error.
    pub async fn ask(&mut self, request: &Request) -> Result<Reply> {
        self.ask_within(PATIENCE, request).await
    }

    /// As [`ask`](Self::ask), with a limit of its own.
    pub async fn ask_within(&mut self, limit: Duration, request: &Request) -> Result<Reply> {
        let answered = async {
            self.send(request).await?;
            self.hear().await
        };
        timeout(limit, answered).await.map_err(|_| Error::Silent)?
    }

    /// Asks without waiting for the answer.
    pub async fn send(&mut self, request: &Request) -> Result<()> {
        self.writer.send(request).await
    }

    /// Waits, for as long as it takes, until the shim is gone.
    pub async fn until_gone(&mut self) {
        while let Ok(Some(_)) = self.reader.next_frame().await {}
    }

    /// The next answer, for as long as it takes.
    pub async fn hear(&mut self) -> Result<Reply> {
        match self.reader.next_frame().await? {
            None => Err(Error::Gone),
            Some(frame) => match frame.message()? {
                Reply::Refused { exit_code, message } => Err(Error::Refused { exit_code, message }),
                reply => Ok(reply),
            },
        }
    }

    /// Opens a stream: `request` is `Attach`, `Follow` or `Exec`. Answers where in the log it begins.
    pub async fn open(mut self, request: &Request) -> Result<(u64, ShimReader, ShimWriter)> {
        match self.ask(request).await? {
            Reply::Attached { offset } => Ok((offset, self.reader, self.writer)),
            other => Err(Error::Unexpected(format!("{other:?}"))),
        }
    }
}

impl ShimReader {
    /// The next frame; `None` when the shim has hung up. Loses nothing when it is cancelled.
    pub async fn next_frame(&mut self) -> Result<Option<Frame>> {
        loop {
            if let Some(frame) = self.decoder.next_frame()? {
                return Ok(Some(frame));
            }
            let mut bytes = [0; 16 << 10];
            match self.stream.read(&mut bytes).await {
                Ok(0) => return Ok(None),
                Ok(length) => self.decoder.push(&bytes[..length]),
                Err(error) if error.kind() == io::ErrorKind::ConnectionReset => return Ok(None),
                Err(error) => return Err(error.into()),
            }
        }
    }
}

impl ShimWriter {
    /// Sends a message; waits while the shim takes no more.
    pub async fn send(&mut self, request: &Request) -> Result<()> {
        self.write(&wire::encode(request)?).await
    }

    /// Sends input; waits while the process reads no more.
    pub async fn send_input(&mut self, data: &[u8]) -> Result<()> {
        for part in data.chunks(super::log::LONGEST) {
            let mut frame = Vec::with_capacity(part.len() + 8);
            wire::encode_data(&mut frame, part)?;
            self.write(&frame).await?;
        }
        Ok(())
    }

    async fn write(&mut self, bytes: &[u8]) -> Result<()> {
        match self.stream.write_all(bytes).await {
            Ok(()) => Ok(()),
            Err(error)
                if matches!(
                    error.kind(),
                    io::ErrorKind::BrokenPipe | io::ErrorKind::ConnectionReset
                ) =>
            {
                Err(Error::Gone)
            }
            Err(error) => Err(error.into()),
        }
    }
}

#[cfg(test)]
mod tests {
    use std::os::unix::net::UnixListener;
    use std::sync::{Arc, Barrier};
    use std::{fs, thread};

    use super::*;

    /// A container that was to be removed at its end stayed, because its shim was killed while plyd connected to it:
    /// the connection had been made and was reset before anybody took it.
    #[tokio::test]
    async fn a_shim_that_ends_while_it_is_connected_to_is_absent() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join(SOCKET);
        for _ in 0..2000 {
            let listener = UnixListener::bind(&path).unwrap();
            let start = Arc::new(Barrier::new(2));
            let started = Arc::clone(&start);
            let ends = thread::spawn(move || {
                started.wait();
                drop(listener);
            });
            start.wait();
            let connected = ShimClient::connect(dir.path()).await;
            ends.join().unwrap();
            assert!(
                matches!(connected, Err(Error::Absent | Error::Gone)),
                "{connected:?}"
            );
            fs::remove_file(&path).unwrap();
        }
    }
}
