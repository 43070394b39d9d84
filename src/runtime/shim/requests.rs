//! What clients ask for.

use std::io;

use super::conn::Role;
use super::process::Process;
use super::server::{Phase, Shim, complain};
use crate::runtime::oci::ENGINE_FAILED;
use crate::runtime::wire::{Frame, Reply, Request, VERSION};
use crate::sys::child;

impl Shim {
    /// Deals with the frames that have arrived from one client, as far as they can be now.
    pub(super) fn serve_frames(&mut self, id: u64) -> io::Result<()> {
        loop {
            let Some(conn) = self.conns.get_mut(&id) else {
                return Ok(());
            };
            if matches!(conn.role, Role::Busy | Role::Asking | Role::Waiting) || conn.closing {
                return Ok(());
            }
            let Some(frame) = conn.next_frame()? else {
                return Ok(());
            };
            let stream = match conn.role {
                Role::Follower { stdin, .. } => Some((None, stdin)),
                Role::Exec { id } => Some((Some(id), true)),
                _ => None,
            };
            match stream {
                Some((process, stdin)) => self.serve_stream(process, stdin, &frame)?,
                None => self.serve_request(id, frame.message()?)?,
            }
        }
    }

    fn serve_stream(&mut self, id: Option<u64>, stdin: bool, frame: &Frame) -> io::Result<()> {
        let running = self.phase == Phase::Running;
        let Some(process) = self.process(id) else {
            return Ok(());
        };
        match frame {
            Frame::Data(data) if stdin => process.streams.push_input(data),
            Frame::Data(_) => return Err(invalid("input on a stream without input")),
            Frame::Message(_) => match frame.message()? {
                Request::CloseStdin if stdin => process.streams.close_input(),
                Request::Resize(window) => {
                    if let Err(error) = process.streams.resize(window) {
                        complain(&format!("cannot resize the terminal: {error}"));
                    }
                }
                Request::SignalStream { signal } if id.is_some() || running => {
                    // A stream has no answer to a signal that came too late.
                    if let Err(message) = send_signal(process, signal) {
                        complain(&message);
                    }
                }
                Request::SignalStream { .. } => {}
                other => return Err(invalid(&format!("{other:?} within a stream"))),
            },
        }
        Ok(())
    }

    fn serve_request(&mut self, id: u64, request: Request) -> io::Result<()> {
        let role = self.conns.get(&id).map_or(Role::Idle, |conn| conn.role);
        match (role, request) {
            (Role::New, Request::Hello { version }) if version == VERSION => {
                let pid = std::process::id();
                self.answer(
                    id,
                    &Reply::Hello {
                        version: VERSION,
                        pid,
                    },
                    Role::Idle,
                );
            }
            (Role::New, other) => {
                return Err(invalid(&format!(
                    "it opened with {other:?}, this is version {VERSION}"
                )));
            }
            (_, Request::State) => self.set_role(id, Role::Asking),
            (_, Request::Start { window }) => self.start(id, window),
            (_, Request::Signal { signal }) => {
                let result = match self.phase {
                    Phase::Running => send_signal(&self.main, signal),
                    _ => Err("the container does not run".to_owned()),
                };
                self.answer_result(id, result);
            }
            (_, Request::Wait) => self.set_role(id, Role::Waiting),
            (_, Request::Attach { stdin: true }) if !self.config.stdin => {
                self.answer_result(id, Err(
                    "the standard input of the container is closed; create it with -i to keep it open"
                        .to_owned(),
                ));
            }
            (_, Request::Attach { stdin }) => {
                let offset = self.log.end();
                let role = Role::Follower { offset, stdin };
                self.answer(id, &Reply::Attached { offset }, role);
            }
            (_, Request::Follow { offset }) => {
                let role = Role::Follower {
                    offset,
                    stdin: false,
                };
                self.answer(id, &Reply::Attached { offset }, role);
            }
            (
                _,
                Request::Exec {
                    process,
                    stdin,
                    window,
                },
            ) => self.exec(id, &process, stdin, window),
            (_, Request::Shutdown) => match self.phase {
                Phase::Idle => {
                    self.answer(id, &Reply::Done, Role::Idle);
                    self.phase = Phase::Gone;
                }
                Phase::Ended | Phase::Gone => self.answer(id, &Reply::Done, Role::Idle),
                _ => self.answer_result(id, Err("the container runs".to_owned())),
            },
            (_, other) => return Err(invalid(&format!("{other:?} outside of a stream"))),
        }
        Ok(())
    }

    pub(super) fn set_role(&mut self, id: u64, role: Role) {
        if let Some(conn) = self.conns.get_mut(&id) {
            conn.role = role;
        }
    }

    pub(super) fn answer_result(&mut self, id: u64, result: Result<(), String>) {
        let reply = match result {
            Ok(()) => Reply::Done,
            Err(message) => Reply::Refused {
                exit_code: ENGINE_FAILED,
                message,
            },
        };
        self.answer(id, &reply, Role::Idle);
    }
}

/// Signals a process that is our child and has not been waited for: its id cannot be another's.
fn send_signal(process: &Process, signal: i32) -> Result<(), String> {
    match (process.pid, process.end) {
        (Some(pid), None) => child::send_signal(pid, signal)
            .map_err(|error| format!("cannot send signal {signal}: {error}")),
        _ => Err("the process does not run".to_owned()),
    }
}

fn invalid(problem: &str) -> io::Error {
    io::Error::new(io::ErrorKind::InvalidData, problem.to_owned())
}
