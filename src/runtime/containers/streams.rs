//! Attach, exec and logs: what flows between a container and its clients.

use std::collections::VecDeque;
use std::sync::Arc;

use tokio::time::timeout;

use super::create::check_environment;
use super::entry::Seen;
use super::error::io_error;
use super::life::{END_LIMIT, settled, stopped};
use super::{Containers, Entry, Error, Result, blocking};
use crate::runtime::client::{self, ShimClient, ShimReader, ShimWriter};
use crate::runtime::log::{self, HEADER, LogReader, Record};
use crate::runtime::lookup::Question;
use crate::runtime::spec::{self, ProcessSpec};
use crate::runtime::state::Status;
use crate::runtime::user::IF_DAMAGED;
use crate::runtime::wire::{Frame, Reply, Request, Window};
use crate::store::view::HeldDamage;

/// Bytes of a log that are read at once.
const BATCH: usize = 1 << 20;
/// What to do about a damaged view of a root, to go behind an error.
const IF_VIEW_DAMAGED: &str = "; the merged view of its image is damaged: `snapctl system repair` mends that below the container, or says that it has to be stopped and started again";
/// The same where only another one can be read.
const IF_VIEW_LOST: &str = "; the merged view of its image is damaged beyond repair below the container: stop it and start it again, for that makes another one";

/// One more process, as it is asked for. Empty words mean the container's.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct ExecRequest {
    /// Program and arguments.
    pub args: Vec<String>,
    /// `KEY=VALUE`, added to the container's.
    pub env: Vec<String>,
    /// Working directory.
    pub working_dir: String,
    /// Who runs it.
    pub user: String,
    /// It gets a terminal.
    pub tty: bool,
    /// It reads what is sent to it; otherwise /dev/null.
    pub stdin: bool,
    /// First size of its terminal.
    pub window: Option<Window>,
}

/// What comes from a process.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum OutputEvent {
    /// Some output.
    Data(Record),
    /// It has ended; nothing comes any more.
    Exit(i32),
}

/// Input to a process.
#[derive(Debug)]
pub struct Input {
    writer: ShimWriter,
    /// It was opened with standard input.
    pub stdin: bool,
    /// Its process has a terminal.
    pub tty: bool,
}

impl Input {
    /// Sends input; waits while the process reads no more. `false`: the process has ended.
    pub async fn send(&mut self, data: &[u8]) -> Result<bool> {
        if !self.stdin {
            return Err(Error::Invalid(
                "input for a process whose standard input was not asked for".to_owned(),
            ));
        }
        over(self.writer.send_input(data).await)
    }

    /// There is no more input.
    pub async fn close(&mut self) -> Result<bool> {
        if !self.stdin {
            return Ok(true);
        }
        over(self.writer.send(&Request::CloseStdin).await)
    }

    /// The client has gone: without a terminal, as if it had closed the input; a terminal stays, to be attached to again.
    pub async fn abandon(&mut self) -> Result<()> {
        if !self.tty {
            self.close().await?;
        }
        Ok(())
    }

    /// The terminal's new size.
    pub async fn resize(&mut self, window: Window) -> Result<bool> {
        over(self.writer.send(&Request::Resize(window)).await)
    }

    /// A signal for the process.
    pub async fn signal(&mut self, signal: i32) -> Result<bool> {
        over(self.writer.send(&Request::SignalStream { signal }).await)
    }
}

fn over(result: client::Result<()>) -> Result<bool> {
    match result {
        Ok(()) => Ok(true),
        Err(client::Error::Gone) => Ok(false),
        Err(error) => Err(error.into()),
    }
}

/// Output of a container, from its shim for as long as that lives, then from the log.
#[derive(Debug)]
pub struct Output {
    containers: Containers,
    entry: Arc<Entry>,
    shim: Option<ShimReader>,
    /// `None` for an exec, which has no log.
    log: Option<Box<LogStream>>,
    /// How many ends of the container were known when it was joined.
    ends: u64,
    ended: bool,
}

impl std::fmt::Debug for Containers {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Containers").finish_non_exhaustive()
    }
}

impl Containers {
    /// Joins the streams of a created or running container.
    pub async fn attach(&self, reference: &str, stdin: bool) -> Result<(Input, Output)> {
        let entry = self.find(reference)?;
        let Seen { state, ends, .. } = entry.seen.borrow().clone();
        let client = match state.status {
            Status::Running => ShimClient::connect(&self.run_dir(&entry.id)).await,
            Status::Created => {
                let _held = entry.lock.lock().await;
                if entry.removed() {
                    let name = entry.record.name.clone();
                    return Err(Error::Removed { name });
                }
                Ok(self.shim(&entry).await?)
            }
            Status::Stopped => Err(client::Error::Absent),
        };
        let client = client.map_err(|error| gone(&entry, error))?;
        let opened = client.open(&Request::Attach { stdin }).await;
        let (offset, reader, writer) = opened.map_err(|error| gone(&entry, error))?;
        // Opened now: when the container removes itself, what was not delivered yet can still be read.
        let path = self.log_path(&entry.id);
        let log = blocking(move || {
            LogReader::open(&path, Some(offset)).map_err(io_error("open the log", &path))
        })
        .await?;
        let output = Output {
            containers: self.clone(),
            entry: Arc::clone(&entry),
            shim: Some(reader),
            log: Some(Box::new(LogStream::new(self, &entry, log))),
            ends,
            ended: false,
        };
        let tty = entry.record.tty;
        Ok((Input { writer, stdin, tty }, output))
    }

    /// Runs one more process in a running container.
    pub async fn exec(&self, reference: &str, request: ExecRequest) -> Result<(Input, Output)> {
        let entry = self.find(reference)?;
        if !entry.runs() {
            let name = entry.record.name.clone();
            return Err(Error::NotRunning { name });
        }
        let (roots, id) = (Arc::clone(&self.0.roots), entry.id.clone());
        if !blocking(move || Ok(roots.is_served(&id)?)).await? {
            let name = entry.record.name.clone();
            return Err(Error::RootIsGone { name });
        }
        let process = self.exec_process(&entry, &request).await?;
        let (tty, stdin) = (request.tty, request.stdin);
        let message = Request::Exec {
            process,
            stdin,
            window: request.window,
        };
        let opened = async {
            let client = ShimClient::connect(&self.run_dir(&entry.id)).await?;
            client.open(&message).await
        };
        let (_, reader, writer) = match opened.await {
            Ok(opened) => opened,
            Err(client::Error::Refused { exit_code, message }) if entry.runs() => {
                return Err(Error::Exec {
                    name: entry.record.name.clone(),
                    exit_code,
                    message: self.with_damage(&entry, message).await,
                });
            }
            Err(error) => return Err(gone(&entry, error)),
        };
        let output = Output {
            containers: self.clone(),
            entry,
            shim: Some(reader),
            log: None,
            ends: 0,
            ended: false,
        };
        Ok((Input { writer, stdin, tty }, output))
    }

    async fn exec_process(
        &self,
        entry: &Entry,
        request: &ExecRequest,
    ) -> Result<serde_json::Value> {
        if request.args.is_empty() {
            return Err(Error::Invalid("name a program to execute".to_owned()));
        }
        check_environment(&request.env)?;
        let spec: serde_json::Value = serde_json::from_slice(&self.spec_json(&entry.id).await?)
            .map_err(|error| {
                io_error("read the config of", &self.bundle_dir(&entry.id))(error.into())
            })?;
        let text = |value: &serde_json::Value| value.as_str().unwrap_or_default().to_owned();
        let user = match request.user.as_str() {
            "" => entry.record.user.clone(),
            user => user.to_owned(),
        };
        let working_dir = match request.working_dir.as_str() {
            "" => text(&spec["process"]["cwd"]),
            dir if dir.starts_with('/') => dir.to_owned(),
            dir => {
                return Err(Error::Invalid(format!(
                    "the working directory {dir:?} has to start with /"
                )));
            }
        };
        let question = Question {
            root: text(&spec["root"]["path"]).into(),
            user,
            working_dir: working_dir.clone(),
            make: false,
            volumes: Vec::new(),
        };
        let answer = match client::look_up(&self.plyshim()?, &question).await? {
            Ok(answer) => answer,
            Err(message) => return Err(Error::Invalid(self.with_damage(entry, message).await)),
        };
        let list = spec["process"]["env"].as_array();
        let mut base: Vec<String> = list.into_iter().flatten().map(text).collect();
        if !request.user.is_empty() {
            // Another user has another home, unless somebody has said otherwise.
            base.retain(|variable| !variable.starts_with("HOME="));
            base.push(format!("HOME={}", answer.identity.home));
        }
        if request.tty {
            base = spec::merge_environment(&["TERM=xterm".to_owned()], &base);
        }
        let env = spec::merge_environment(&base, &request.env);
        Ok(spec::process(&ProcessSpec {
            args: &request.args,
            env: &env,
            working_dir: &working_dir,
            identity: &answer.identity,
            tty: request.tty,
        }))
    }

    /// `message`, why something cannot be executed, with what to do if the merged view of the root is damaged: who reads that misses names, or
    /// meets errors, and nobody knows why.
    async fn with_damage(&self, entry: &Entry, message: String) -> String {
        let (roots, id) = (Arc::clone(&self.0.roots), entry.id.clone());
        let advice = match blocking(move || Ok(roots.view_damage(&id)?)).await {
            Ok(None) => return message,
            Ok(Some(HeldDamage::Restorable)) => IF_VIEW_DAMAGED,
            Ok(Some(HeldDamage::Lost)) => IF_VIEW_LOST,
            Err(error) => {
                let id = &entry.id;
                tracing::warn!(id, %error, "whether the merged view of a root is damaged cannot be told");
                return message;
            }
        };
        let message = message.strip_suffix(IF_DAMAGED).unwrap_or(&message);
        format!("{message}{advice}")
    }

    /// What the container has written until now: all of it, or the last `tail` lines. With `follow` it goes on
    /// until the container ends.
    pub async fn logs(
        &self,
        reference: &str,
        tail: Option<u64>,
        follow: bool,
    ) -> Result<LogStream> {
        let entry = self.find(reference)?;
        let path = self.log_path(&entry.id);
        let opened = blocking(move || {
            let mut reader = match LogReader::open(&path, None) {
                Ok(reader) => reader,
                // It was never started.
                Err(error) if error.kind() == std::io::ErrorKind::NotFound => return Ok(None),
                Err(error) => return Err(io_error("open the log", &path)(error)),
            };
            if !follow {
                reader.end_here().map_err(io_error("look at", &path))?;
            }
            let skip = match tail {
                Some(lines) => reader
                    .seek_tail(lines)
                    .map_err(io_error("read the log", &path))?,
                None => 0,
            };
            Ok(Some((reader, skip)))
        })
        .await?;
        let (reader, skip) = match opened {
            Some((reader, skip)) => (Some(reader), skip),
            None => (None, 0),
        };
        let mut stream = LogStream::new(self, &entry, reader);
        stream.follow = follow;
        stream.skip = skip;
        Ok(stream)
    }
}

fn gone(entry: &Entry, error: client::Error) -> Error {
    match error {
        client::Error::Absent | client::Error::Gone => Error::NotRunning {
            name: entry.record.name.clone(),
        },
        client::Error::Refused { message, .. } => Error::Invalid(message),
        error => Error::Shim(error),
    }
}

impl Output {
    /// What comes next; `None` after the exit. Waits while there is nothing. Must not be called again
    /// after it was cancelled.
    pub async fn next(&mut self) -> Result<Option<OutputEvent>> {
        if self.ended {
            return Ok(None);
        }
        let containers = self.containers.clone();
        tokio::select! {
            event = self.next_event() => event.map(Some),
            () = containers.closed() => Err(Error::Closing),
        }
    }

    async fn next_event(&mut self) -> Result<OutputEvent> {
        while let Some(shim) = &mut self.shim {
            match shim.next_frame().await? {
                Some(Frame::Data(bytes)) => {
                    let record = log::parse(&bytes)
                        .ok_or_else(|| client::Error::Unexpected("no log record".to_owned()))?;
                    if let Some(log) = &mut self.log {
                        log.skip_ahead((HEADER + record.data.len()) as u64);
                    }
                    return Ok(OutputEvent::Data(record));
                }
                Some(frame) => match frame.message().map_err(client::Error::from)? {
                    Reply::Exit { code, .. } => {
                        self.until_known().await;
                        return Ok(self.exit(code));
                    }
                    other => {
                        let answer = client::Error::Unexpected(format!("{other:?}"));
                        return Err(answer.into());
                    }
                },
                None => self.shim = None,
            }
        }
        // The shim has been killed. What it wrote down is still there.
        let Some(log) = &mut self.log else {
            stopped(&self.entry).await;
            return Err(Error::NotRunning {
                name: self.entry.record.name.clone(),
            });
        };
        settled(&self.entry).await;
        match log.next().await? {
            Some(record) => Ok(OutputEvent::Data(record)),
            None => {
                let code = self.entry.state().exit_code;
                Ok(self.exit(code))
            }
        }
    }

    fn exit(&mut self, code: i32) -> OutputEvent {
        self.ended = true;
        OutputEvent::Exit(code)
    }

    /// The shim has told this stream that the container has ended. Its other connections may bring that,
    /// and even the start, later: waits for them, so that whoever hears of the end finds the container
    /// ended, and gone if it removes itself.
    async fn until_known(&self) {
        if self.log.is_none() {
            return;
        }
        let mut seen = self.entry.seen.subscribe();
        let known = seen.wait_for(|seen| seen.removed || seen.ends > self.ends);
        // If it takes longer, the user has waited long enough.
        let _ = timeout(END_LIMIT, known).await;
        self.containers.gone_if_auto_removed(&self.entry).await;
    }
}

/// The log of a container, read in batches off the threads that must not block.
#[derive(Debug)]
pub struct LogStream {
    containers: Containers,
    entry: Arc<Entry>,
    reader: Option<LogReader>,
    follow: bool,
    /// Bytes of the first record that are not wanted.
    skip: usize,
    ready: VecDeque<Record>,
    shim: Option<ShimReader>,
}

impl LogStream {
    fn new(
        containers: &Containers,
        entry: &Arc<Entry>,
        reader: impl Into<Option<LogReader>>,
    ) -> Self {
        Self {
            containers: containers.clone(),
            entry: Arc::clone(entry),
            reader: reader.into(),
            follow: false,
            skip: 0,
            ready: VecDeque::new(),
            shim: None,
        }
    }

    /// What comes next; `None` at the end. Must not be called again after it was cancelled.
    pub async fn next(&mut self) -> Result<Option<Record>> {
        let containers = self.containers.clone();
        tokio::select! {
            record = self.next_record() => record,
            () = containers.closed() => Err(Error::Closing),
        }
    }

    async fn next_record(&mut self) -> Result<Option<Record>> {
        loop {
            if let Some(record) = self.ready.pop_front() {
                return Ok(Some(record));
            }
            if let Some(shim) = &mut self.shim {
                match shim.next_frame().await? {
                    Some(Frame::Data(bytes)) => {
                        let record = log::parse(&bytes)
                            .ok_or_else(|| client::Error::Unexpected("no log record".to_owned()))?;
                        self.skip_ahead(bytes.len() as u64);
                        return Ok(Some(record));
                    }
                    // Its end; whatever it did not send is in the file.
                    Some(_) | None => {
                        self.shim = None;
                        self.follow = false;
                    }
                }
            }
            // Looked at before the file: what was written before the end is found in the file after it.
            let runs = self.entry.runs();
            self.fill().await?;
            if !self.ready.is_empty() {
                continue;
            }
            if !self.follow || !runs || !self.connect().await? {
                return Ok(None);
            }
        }
    }

    /// Follows through the shim. `false`: it has ended meanwhile, and the file has been read to its end.
    async fn connect(&mut self) -> Result<bool> {
        let Some(reader) = &self.reader else {
            return Ok(false);
        };
        let offset = reader.offset();
        let opened = async {
            let client = ShimClient::connect(&self.containers.run_dir(&self.entry.id)).await?;
            client.open(&Request::Follow { offset }).await
        };
        match opened.await {
            Ok((_, shim, _)) => self.shim = Some(shim),
            Err(client::Error::Absent | client::Error::Gone) => {
                settled(&self.entry).await;
                self.follow = false;
            }
            Err(error) => return Err(error.into()),
        }
        Ok(true)
    }

    async fn fill(&mut self) -> Result<()> {
        let Some(mut reader) = self.reader.take() else {
            return Ok(());
        };
        let path = self.containers.log_path(&self.entry.id);
        let (reader, mut records) = blocking(move || {
            let mut records = VecDeque::new();
            let mut size = 0;
            while size < BATCH
                && let Some(record) = reader
                    .next_record()
                    .map_err(io_error("read the log", &path))?
            {
                size += record.data.len();
                records.push_back(record);
            }
            Ok((reader, records))
        })
        .await?;
        self.reader = Some(reader);
        if let Some(first) = records.front_mut() {
            first.data.drain(..std::mem::take(&mut self.skip));
        }
        self.ready = records;
        Ok(())
    }

    /// The next `bytes` of the file have come by another way.
    fn skip_ahead(&mut self, bytes: u64) {
        if let Some(reader) = &mut self.reader {
            reader.skip(bytes);
        }
    }
}
