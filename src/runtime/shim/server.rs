//! The loop: what is waited for, and in which order what has happened is dealt with.

use std::collections::{BTreeMap, HashMap};
use std::io;
use std::os::fd::AsFd;
use std::os::unix::net::UnixListener;
use std::path::PathBuf;
use std::time::{Duration, Instant, SystemTime};

use nix::poll::{PollFlags, PollTimeout};

use super::Config;
use super::conn::{Conn, Role};
use super::jobs::Job;
use super::process::{self, End, Output, Process};
use crate::runtime::log::{self, LogWriter, Stream};
use crate::runtime::state::{RunState, STATE_RECORD};
use crate::runtime::wire::Reply;
use crate::store::record::RecordDir;
use crate::sys::child::SignalPipe;

/// How often the loop looks for itself, in case that a kernel without pidfds lost a SIGCHLD.
const LOOK: Duration = Duration::from_secs(10);
/// How often a process is looked at that is about to run its program, of which nothing else tells.
const STARTING: Duration = Duration::from_millis(1);
/// How often something that failed for want of disk space is tried again.
const RETRY: Duration = Duration::from_millis(500);
/// How long a shim without a started container and without a client stays.
const IDLE: Duration = Duration::from_secs(10);
/// How long a client that takes nothing can keep an ended container's shim.
const STUCK: Duration = Duration::from_secs(30);

/// Where the container is, seen from its shim.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Phase {
    /// Not started, or the start failed.
    Idle,
    /// The OCI runtime creates or starts it.
    Starting,
    /// Its process runs.
    Running,
    /// Its process has ended; the OCI runtime cleans up.
    Ended,
    /// The OCI runtime has cleaned up.
    Gone,
}

/// Everything that a shim knows.
pub struct Shim {
    pub(super) config: Config,
    pub(super) phase: Phase,
    pub(super) state: RunState,
    pub(super) main: Process,
    pub(super) execs: BTreeMap<u64, Process>,
    pub(super) conns: BTreeMap<u64, Conn>,
    pub(super) jobs: Vec<Job>,
    /// Ends of processes that nobody has claimed yet: they ended before the OCI runtime told their id.
    pub(super) unclaimed: HashMap<i32, End>,
    pub(super) log: LogWriter,
    /// Where the kernel counts the container's OOM kills.
    pub(super) oom_file: Option<PathBuf>,
    pub(super) next_id: u64,
    listener: UnixListener,
    signals: SignalPipe,
    records: RecordDir<RunState>,
    /// The state has not reached the disk yet.
    unsaved: bool,
    /// What the disk had no room for.
    unlogged: Option<(Stream, Vec<u8>)>,
    progress: Instant,
}

/// What a polled descriptor belongs to.
#[derive(Clone, Copy)]
enum Token {
    Listener,
    Signals,
    Ended,
    Console(Option<u64>),
    Output(Option<u64>, Stream),
    Input(Option<u64>),
    Conn(u64),
}

const STREAMS: [Stream; 2] = [Stream::Stdout, Stream::Stderr];

impl Shim {
    pub(super) fn new(
        config: Config,
        listener: UnixListener,
        signals: SignalPipe,
        log: LogWriter,
        records: RecordDir<RunState>,
        state: RunState,
    ) -> Self {
        Self {
            config,
            phase: Phase::Idle,
            state,
            main: Process::default(),
            execs: BTreeMap::new(),
            conns: BTreeMap::new(),
            jobs: Vec::new(),
            unclaimed: HashMap::new(),
            log,
            oom_file: None,
            next_id: 0,
            listener,
            signals,
            records,
            unsaved: false,
            unlogged: None,
            progress: Instant::now(),
        }
    }

    /// Runs until there is nothing left to do.
    pub(super) fn serve(&mut self) -> io::Result<()> {
        loop {
            self.reap();
            self.settle();
            if self.finished() {
                return Ok(());
            }
            for (token, ready) in self.wait()? {
                if !ready.is_empty() {
                    self.progress = Instant::now();
                    self.handle(token, ready)?;
                }
            }
        }
    }

    fn finished(&self) -> bool {
        let quiet = self.jobs.is_empty() && !self.unsaved;
        let idle_for = self.progress.elapsed();
        match self.phase {
            Phase::Idle => quiet && self.conns.is_empty() && idle_for >= IDLE,
            Phase::Gone => {
                let served = !self.conns.values().any(Conn::pending);
                quiet && ((served && self.main.streams.outputs_closed()) || idle_for >= STUCK)
            }
            _ => false,
        }
    }

    /// The container's process, or an exec's.
    pub(super) fn process(&mut self, id: Option<u64>) -> Option<&mut Process> {
        match id {
            None => Some(&mut self.main),
            Some(id) => self.execs.get_mut(&id),
        }
    }

    fn processes(&self) -> impl Iterator<Item = (Option<u64>, &Process)> {
        let execs = self.execs.iter().map(|(&id, process)| (Some(id), process));
        std::iter::once((None, &self.main)).chain(execs)
    }

    /// Its client can take more of an exec's output, or is gone; the log can take the container's.
    fn output_wanted(&self, id: Option<u64>) -> bool {
        match id {
            None => self.unlogged.is_none(),
            Some(_) => self.client_of(id).is_none_or(Conn::has_room),
        }
    }

    fn client_of(&self, id: Option<u64>) -> Option<&Conn> {
        let id = id?;
        self.conns
            .values()
            .find(|conn| conn.role == Role::Exec { id })
    }

    /// The process that a connection's input is for, if more can be taken.
    fn wants_input(&self, conn: &Conn) -> bool {
        match conn.role {
            Role::Follower { stdin: true, .. } => self.main.streams.wants_input(),
            Role::Exec { id } => self
                .execs
                .get(&id)
                .is_none_or(|process| process.streams.wants_input()),
            _ => true,
        }
    }

    fn wait(&self) -> io::Result<Vec<(Token, PollFlags)>> {
        let mut tokens = vec![Token::Listener, Token::Signals];
        let mut fds = vec![
            (self.listener.as_fd(), PollFlags::POLLIN),
            (self.signals.as_fd(), PollFlags::POLLIN),
        ];
        let mut add = |token, fd, flags| {
            tokens.push(token);
            fds.push((fd, flags));
        };
        for (id, process) in self.processes() {
            if let (Some(pidfd), None) = (&process.pidfd, process.end) {
                add(Token::Ended, pidfd.as_fd(), PollFlags::POLLIN);
            }
            if let Some(console) = process.streams.console() {
                add(Token::Console(id), console, PollFlags::POLLIN);
            }
            // While the OCI runtime sets a process up, what is in its pipes may be the runtime's own.
            if process.executed && self.output_wanted(id) {
                for stream in STREAMS {
                    if let Some(fd) = process.streams.output(stream) {
                        add(Token::Output(id, stream), fd, PollFlags::POLLIN);
                    }
                }
            }
            if let Some(fd) = process.streams.pending_input() {
                add(Token::Input(id), fd, PollFlags::POLLOUT);
            }
        }
        for (&id, conn) in &self.conns {
            let mut flags = PollFlags::empty();
            if conn.reads() && self.wants_input(conn) {
                flags |= PollFlags::POLLIN;
            } else if conn.hung_up {
                // What it sent before is read when there is room for it.
                continue;
            }
            if conn.pending() {
                flags |= PollFlags::POLLOUT;
            }
            add(Token::Conn(id), conn.stream.as_fd(), flags);
        }
        let timeout = if self
            .processes()
            .any(|(_, process)| process.starting.is_some())
        {
            STARTING
        } else if self.unsaved || self.unlogged.is_some() {
            RETRY
        } else {
            LOOK
        };
        let timeout = PollTimeout::try_from(timeout).unwrap_or(PollTimeout::NONE);
        let ready = process::wait(&fds, timeout)?;
        Ok(tokens.into_iter().zip(ready).collect())
    }

    fn handle(&mut self, token: Token, ready: PollFlags) -> io::Result<()> {
        match token {
            Token::Listener => match self.listener.accept() {
                Ok((stream, _)) => {
                    let id = self.new_id();
                    self.conns.insert(id, Conn::new(stream)?);
                }
                // It may have gone before it was accepted; or descriptors are short for now.
                Err(error) => complain(&format!("cannot accept a connection: {error}")),
            },
            Token::Signals => self.signals.clear(),
            // The next turn of the loop reaps it.
            Token::Ended => {}
            Token::Console(id) => {
                if let Some(process) = self.process(id)
                    && let Err(error) = process.streams.accept_terminal()
                {
                    complain(&format!("cannot take the terminal over: {error}"));
                }
            }
            Token::Output(id, stream) => drop(self.pump(id, stream)),
            Token::Input(id) => {
                if let Some(process) = self.process(id) {
                    process.streams.write_input();
                }
            }
            Token::Conn(id) => self.serve_conn(id, ready),
        }
        Ok(())
    }

    fn serve_conn(&mut self, id: u64, ready: PollFlags) {
        let Some(conn) = self.conns.get(&id) else {
            return;
        };
        let wanted = self.wants_input(conn);
        let Some(conn) = self.conns.get_mut(&id) else {
            return;
        };
        conn.hung_up |= ready.contains(PollFlags::POLLHUP);
        let mut result = if ready.contains(PollFlags::POLLOUT) {
            conn.flush()
        } else {
            Ok(())
        };
        if wanted
            && conn.reads()
            && ready.intersects(PollFlags::POLLIN | PollFlags::POLLHUP | PollFlags::POLLERR)
        {
            result = result.and_then(|()| conn.fill().map(drop));
        }
        if let Err(error) = result.and_then(|()| self.serve_frames(id)) {
            // A client that went away is no news.
            if error.kind() == io::ErrorKind::InvalidData {
                complain(&format!("a client was hung up on: {error}"));
            }
            self.conns.remove(&id);
        }
    }

    /// Moves one piece of output on. Answers whether there may be more at once.
    fn pump(&mut self, id: Option<u64>, stream: Stream) -> bool {
        if !self.output_wanted(id) {
            return false;
        }
        let Some(process) = self.process(id) else {
            return false;
        };
        let Output::Data(data) = process.streams.read_output(stream) else {
            return false;
        };
        match id {
            None => self.append(stream, data),
            Some(exec) => {
                let mut record = log::header(stream, data.len()).to_vec();
                record.extend_from_slice(&data);
                let role = Role::Exec { id: exec };
                if let Some(conn) = self.conns.values_mut().find(|conn| conn.role == role)
                    && let Err(error) = conn.send_record(&record)
                {
                    complain(&format!("cannot pass output on: {error}"));
                }
            }
        }
        true
    }

    fn append(&mut self, stream: Stream, data: Vec<u8>) {
        if let Err(error) = self.log.append(stream, &data) {
            if self.unlogged.is_none() {
                complain(&format!("the log waits: {error}"));
            }
            self.unlogged = Some((stream, data));
        }
    }

    /// Brings everything up to date with what has happened.
    fn settle(&mut self) {
        if let Some((stream, data)) = self.unlogged.take() {
            self.append(stream, data);
        }
        if self.unsaved {
            self.save();
        }
        self.settle_starts();
        self.settle_ends();
        // What arrived while an earlier request was under way.
        let mut broken = Vec::new();
        for id in self.conns.keys().copied().collect::<Vec<_>>() {
            if let Err(error) = self.serve_frames(id) {
                complain(&format!("a client was hung up on: {error}"));
                broken.push(id);
            }
        }
        for (&id, conn) in &mut self.conns {
            if let Err(error) = feed(conn, &self.log, self.phase, &self.state, &self.main)
                .and_then(|()| conn.flush())
            {
                if error.kind() == io::ErrorKind::InvalidData {
                    complain(&format!("cannot read the log: {error}"));
                }
                broken.push(id);
            } else if conn.finished() {
                broken.push(id);
            }
        }
        for id in broken {
            self.conns.remove(&id);
            self.progress = Instant::now();
        }
    }

    /// Reads all that is left of a process that has ended, then closes its outputs: whatever of the
    /// container might still hold the other ends ended before it did.
    pub(super) fn drain(&mut self, id: Option<u64>) {
        for stream in STREAMS {
            while self.pump(id, stream) {}
            if self.output_wanted(id)
                && let Some(process) = self.process(id)
            {
                process.streams.close_output(stream);
            }
        }
    }

    /// Writes the state down; tries again later if that fails.
    pub(super) fn save(&mut self) {
        match self.records.put(STATE_RECORD, &self.state) {
            Ok(()) => self.unsaved = false,
            Err(error) => {
                if !self.unsaved {
                    complain(&format!("the state waits: {error}"));
                }
                self.unsaved = true;
            }
        }
    }

    pub(super) fn new_id(&mut self) -> u64 {
        self.next_id += 1;
        self.next_id
    }

    /// Answers a client, if it is still there.
    pub(super) fn answer(&mut self, conn: u64, reply: &Reply, role: Role) {
        if let Some(client) = self.conns.get_mut(&conn) {
            client.role = role;
            if let Err(error) = client.send(reply) {
                complain(&format!("cannot answer: {error}"));
                self.conns.remove(&conn);
            }
        }
    }
}

/// Gives a client what it waits for: the next part of the log, or the end.
fn feed(
    conn: &mut Conn,
    log: &LogWriter,
    phase: Phase,
    state: &RunState,
    main: &Process,
) -> io::Result<()> {
    if conn.role == Role::Asking && phase != Phase::Starting {
        conn.send(&Reply::State(state.clone()))?;
        conn.role = Role::Idle;
    }
    let ended = matches!(phase, Phase::Ended | Phase::Gone) && main.streams.outputs_closed();
    if let Role::Follower { offset, stdin } = conn.role {
        let mut offset = offset;
        while offset < log.end() && conn.has_room() {
            let mut sent = Ok(());
            offset = log.read(offset, super::conn::OUTPUT_LIMIT, |record| {
                sent = std::mem::replace(&mut sent, Ok(())).and_then(|()| conn.send_record(record));
            })?;
            sent?;
            conn.flush()?;
        }
        conn.role = Role::Follower { offset, stdin };
        if offset < log.end() {
            return Ok(());
        }
    }
    if ended && matches!(conn.role, Role::Follower { .. } | Role::Waiting) && !conn.closing {
        conn.send(&Reply::Exit {
            code: state.exit_code,
            oom_killed: state.oom_killed,
            finished: state.finished.unwrap_or_else(SystemTime::now),
        })?;
        conn.closing = true;
    }
    Ok(())
}

/// The shim's own log: standard error, which is a file in its directory.
pub(super) fn complain(problem: &str) {
    eprintln!("{problem}");
}
