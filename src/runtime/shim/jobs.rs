//! The OCI runtime's commands, run as children while the loop goes on.

use std::fs;
use std::io::{self, Read};
use std::os::fd::OwnedFd;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::SystemTime;

use nix::unistd::Pid;

use super::conn::Role;
use super::exits::find_oom_file;
use super::process::{ChildEnds, Process, Streams};
use super::server::{Phase, Shim, complain};
use crate::runtime::oci::{self, ENGINE_FAILED, not_executed};
use crate::runtime::state::{RunState, Status};
use crate::runtime::wire::{Reply, Window};

/// A command of the OCI runtime that is under way.
#[derive(Debug)]
pub struct Job {
    pid: i32,
    purpose: Purpose,
    log: PathBuf,
    stderr: Option<OwnedFd>,
}

/// What follows when a command has ended.
#[derive(Debug)]
enum Purpose {
    /// Start what was created, for this client.
    Create { conn: u64 },
    /// See whether it runs, and tell the client.
    Start { conn: u64 },
    /// Tell the client why it does not.
    Abandon {
        conn: u64,
        exit_code: i32,
        message: String,
    },
    /// Nothing is left of it.
    Delete,
    /// See whether its process runs, and tell the client.
    Exec { conn: u64, id: u64 },
}

impl Shim {
    /// Creates and starts the container for the client `conn`.
    pub(super) fn start(&mut self, conn: u64, window: Option<Window>) {
        if self.phase != Phase::Idle {
            let problem = "the container was started already".to_owned();
            return self.answer_result(conn, Err(problem));
        }
        self.set_role(conn, Role::Busy);
        let begun = self.streams("console", self.config.tty, self.config.stdin, window);
        let begun = begun.and_then(|(streams, ends)| {
            self.main = Process {
                streams,
                ..Process::default()
            };
            let mut arguments = vec!["create".into(), "--bundle".into()];
            arguments.push(self.config.dir.join("bundle").into_os_string());
            arguments.extend(["--pid-file".into(), self.own("init.pid")]);
            if self.config.tty {
                arguments.extend(["--console-socket".into(), socket_path("console")]);
            }
            arguments.push(self.config.id.clone().into());
            self.begin(Purpose::Create { conn }, &arguments, Some(ends))
        });
        match begun {
            Ok(()) => self.phase = Phase::Starting,
            Err(error) => {
                let message = format!("cannot execute the OCI runtime: {error}");
                self.refuse_start(conn, ENGINE_FAILED, message);
            }
        }
    }

    /// Runs one more process in the container for the client `conn`.
    pub(super) fn exec(
        &mut self,
        conn: u64,
        process: &serde_json::Value,
        stdin: bool,
        window: Option<Window>,
    ) {
        if self.phase != Phase::Running {
            let problem = "the container does not run".to_owned();
            return self.answer_result(conn, Err(problem));
        }
        let id = self.new_id();
        let tty = process["terminal"] == true;
        let console = format!("console-{id}");
        self.set_role(conn, Role::Busy);
        let begun = fs::write(exec_file(id), process.to_string())
            .and_then(|()| self.streams(&console, tty, stdin, window))
            .and_then(|(streams, ends)| {
                let mut arguments = vec!["exec".into(), "--detach".into()];
                arguments.extend(["--process".into(), self.own(exec_file(id))]);
                arguments.extend(["--pid-file".into(), self.own(exec_pid_file(id))]);
                if tty {
                    arguments.extend(["--console-socket".into(), socket_path(&console)]);
                }
                arguments.push(self.config.id.clone().into());
                let process = Process {
                    streams,
                    ..Process::default()
                };
                self.execs.insert(id, process);
                self.begin(Purpose::Exec { conn, id }, &arguments, Some(ends))
            });
        if let Err(error) = begun {
            self.execs.remove(&id);
            self.clear_exec_files(id);
            let problem = format!("cannot execute the OCI runtime: {error}");
            self.answer_result(conn, Err(problem));
        }
    }

    /// Has the OCI runtime clean up after the container.
    pub(super) fn delete(&mut self) {
        let arguments = [
            "delete".into(),
            "--force".into(),
            self.config.id.clone().into(),
        ];
        if let Err(error) = self.begin(Purpose::Delete, &arguments, None) {
            complain(&format!(
                "cannot execute the OCI runtime to clean up: {error}"
            ));
            self.phase = Phase::Gone;
        }
    }

    /// A file of our directory as the OCI runtime has to name it: crun changes into the bundle first.
    fn own(&self, name: impl AsRef<Path>) -> std::ffi::OsString {
        self.config.run_dir.join(name).into_os_string()
    }

    fn streams(
        &self,
        console: &str,
        tty: bool,
        stdin: bool,
        window: Option<Window>,
    ) -> io::Result<(Streams, ChildEnds)> {
        if !tty {
            return Streams::pipes(stdin);
        }
        let ends = ChildEnds {
            stdin: Stdio::null(),
            stdout: Stdio::null(),
            stderr: Stdio::null(),
        };
        Ok((Streams::terminal(console, window)?, ends))
    }

    fn begin(
        &mut self,
        purpose: Purpose,
        arguments: &[std::ffi::OsString],
        ends: Option<ChildEnds>,
    ) -> io::Result<()> {
        let log = PathBuf::from(format!("oci-{}.log", self.new_id()));
        let mut command: Command = oci::command(
            &self.config.runtime,
            &self.config.runtime_root,
            self.own(&log).as_ref(),
        );
        command.args(arguments).stdin(Stdio::null());
        let piped = ends.is_none();
        match ends {
            Some(ends) => command
                .stdin(ends.stdin)
                .stdout(ends.stdout)
                .stderr(ends.stderr),
            None => command.stdout(Stdio::null()).stderr(Stdio::piped()),
        };
        let mut child = command.spawn()?;
        // The loop waits for all children alike, so the handle is not needed.
        self.jobs.push(Job {
            pid: i32::try_from(child.id()).map_err(io::Error::other)?,
            purpose,
            log,
            stderr: child.stderr.take().filter(|_| piped).map(OwnedFd::from),
        });
        Ok(())
    }

    /// If `pid` is a command's, goes on with what follows it.
    pub(super) fn job_ended(&mut self, pid: i32, status: i32) -> bool {
        let Some(index) = self.jobs.iter().position(|job| job.pid == pid) else {
            return false;
        };
        let job = self.jobs.swap_remove(index);
        let said = fs::read_to_string(&job.log).unwrap_or_default();
        remove(&job.log);
        let mut stderr = String::new();
        if let Some(pipe) = job.stderr {
            // The command has ended; a process that it left behind cannot hold this pipe up for long
            // since the OCI runtime's children have other streams.
            if let Err(error) = fs::File::from(pipe)
                .take(64 << 10)
                .read_to_string(&mut stderr)
            {
                complain(&format!("cannot read what the OCI runtime said: {error}"));
            }
        }
        let done = status == 0;
        match job.purpose {
            Purpose::Create { conn } if done => self.created(conn),
            Purpose::Create { conn } => {
                let stderr = self.main.streams.take_words();
                let (exit_code, message) = oci::failure(&said, &stderr);
                self.abandon(conn, exit_code, message);
            }
            Purpose::Start { conn } if done => self.main.starting = Some(conn),
            Purpose::Start { conn } => {
                let (exit_code, message) = oci::failure(&said, &stderr);
                self.abandon(conn, exit_code, message);
            }
            Purpose::Abandon {
                conn,
                exit_code,
                message,
            } => self.refuse_start(conn, exit_code, message),
            Purpose::Delete => {
                if !done {
                    let (_, message) = oci::failure(&said, &stderr);
                    complain(&format!("the OCI runtime could not clean up: {message}"));
                }
                self.phase = Phase::Gone;
            }
            Purpose::Exec { conn, id } => self.exec_created(conn, id, done, &said),
        }
        true
    }

    fn created(&mut self, conn: u64) {
        let result = self.main.streams.expect_terminal().and_then(|()| {
            let pid = read_pid(Path::new("init.pid"))?;
            self.main.set_pid(pid);
            self.main.end = self.unclaimed.remove(&pid.as_raw());
            self.oom_file = find_oom_file(pid);
            let arguments = ["start".into(), self.config.id.clone().into()];
            self.begin(Purpose::Start { conn }, &arguments, None)
        });
        if let Err(error) = result {
            let message = format!("cannot take the created container over: {error}");
            self.abandon(conn, ENGINE_FAILED, message);
        }
    }

    /// Tells who waits for it of processes that have come to run their programs, or have ended without.
    pub(super) fn settle_starts(&mut self) {
        let execs: Vec<_> = self.execs.keys().copied().map(Some).collect();
        for id in std::iter::once(None).chain(execs) {
            let Some(process) = self.process(id) else {
                continue;
            };
            process.look();
            let ended = process.end.map(|end| end.code);
            let failed = match (process.executed, ended) {
                (true, _) => None,
                (false, Some(code)) => Some(code),
                (false, None) => continue,
            };
            let Some(conn) = process.starting.take() else {
                continue;
            };
            let failed = failed.map(|code| not_executed(code, &process.streams.take_words()));
            match (id, failed) {
                (None, None) => self.started(conn),
                (None, Some((exit_code, message))) => self.abandon(conn, exit_code, message),
                (Some(id), failed) => self.exec_started(conn, id, failed.map_or(Ok(()), Err)),
            }
        }
    }

    fn started(&mut self, conn: u64) {
        self.state = RunState {
            status: Status::Running,
            pid: self.main.pid.map_or(0, |pid| pid.as_raw().unsigned_abs()),
            started: Some(SystemTime::now()),
            ..RunState::default()
        };
        self.save();
        self.phase = Phase::Running;
        let state = Reply::State(self.state.clone());
        self.answer(conn, &state, Role::Idle);
    }

    /// Removes what a failed start left, then tells the client.
    fn abandon(&mut self, conn: u64, exit_code: i32, message: String) {
        let purpose = Purpose::Abandon {
            conn,
            exit_code,
            message: message.clone(),
        };
        let arguments = [
            "delete".into(),
            "--force".into(),
            self.config.id.clone().into(),
        ];
        if self.begin(purpose, &arguments, None).is_err() {
            self.refuse_start(conn, exit_code, message);
        }
    }

    fn refuse_start(&mut self, conn: u64, exit_code: i32, message: String) {
        self.phase = Phase::Idle;
        self.main = Process::default();
        self.unclaimed.clear();
        self.state.exit_code = exit_code;
        self.state.error.clone_from(&message);
        self.save();
        let reply = Reply::Refused { exit_code, message };
        self.answer(conn, &reply, Role::Idle);
    }

    fn exec_created(&mut self, conn: u64, id: u64, done: bool, said: &str) {
        let outcome = match self.execs.get_mut(&id) {
            None => Err((ENGINE_FAILED, "the exec is gone".to_owned())),
            Some(process) if !done => {
                let stderr = process.streams.take_words();
                Err(oci::failure(said, &stderr))
            }
            Some(process) => process
                .streams
                .expect_terminal()
                .and_then(|()| read_pid(&exec_pid_file(id)))
                .map(|pid| {
                    process.set_pid(pid);
                    process.end = self.unclaimed.remove(&pid.as_raw());
                    process.starting = Some(conn);
                })
                .map_err(|error| (ENGINE_FAILED, format!("cannot take the exec over: {error}"))),
        };
        self.clear_exec_files(id);
        if outcome.is_err() {
            self.exec_started(conn, id, outcome);
        }
    }

    fn exec_started(&mut self, conn: u64, id: u64, outcome: Result<(), (i32, String)>) {
        match outcome {
            Ok(()) => self.answer(conn, &Reply::Attached { offset: 0 }, Role::Exec { id }),
            Err((exit_code, message)) => {
                self.execs.remove(&id);
                let reply = Reply::Refused { exit_code, message };
                self.answer(conn, &reply, Role::Idle);
            }
        }
    }

    /// No command is under way whose process may be unknown yet.
    pub(super) fn all_claimed(&self) -> bool {
        self.jobs.is_empty()
    }

    fn clear_exec_files(&self, id: u64) {
        remove(&exec_file(id));
        remove(&exec_pid_file(id));
    }
}

fn exec_file(id: u64) -> PathBuf {
    PathBuf::from(format!("exec-{id}.json"))
}

fn exec_pid_file(id: u64) -> PathBuf {
    PathBuf::from(format!("exec-{id}.pid"))
}

/// A short path to a socket in our directory, for another process.
fn socket_path(name: &str) -> std::ffi::OsString {
    format!("/proc/{}/cwd/{name}", std::process::id()).into()
}

fn read_pid(path: &Path) -> io::Result<Pid> {
    let text = fs::read_to_string(path)?;
    let pid = text.trim().parse().map_err(io::Error::other)?;
    remove(path);
    Ok(Pid::from_raw(pid))
}

fn remove(path: &Path) {
    if let Err(error) = fs::remove_file(path)
        && error.kind() != io::ErrorKind::NotFound
    {
        complain(&format!("cannot remove {}: {error}", path.display()));
    }
}
