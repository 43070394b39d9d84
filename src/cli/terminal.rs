//! The local terminal while a process in a container uses it.

use std::io::{self, IsTerminal};
use std::os::fd::AsFd;

use nix::sys::termios::{SetArg, Termios, cfmakeraw, tcgetattr, tcsetattr};

use super::error::{Error, Result};
use crate::grpc::pb::plywood::WindowSize;
use crate::sys::terminal::window_size;

/// Stdin in raw mode. It goes back to what it was when this is dropped, also by a panic; signals are
/// caught while one lives (see [`super::signals`]), so that none ends the process past the drop.
pub struct RawMode {
    before: Termios,
}

impl RawMode {
    /// Makes stdin raw, if it is a terminal.
    pub fn enter() -> Result<Option<Self>> {
        let stdin = io::stdin();
        if !stdin.is_terminal() {
            return Ok(None);
        }
        let failed = |error: nix::Error| Error::Stdio {
            action: "switch the terminal to raw mode",
            source: error.into(),
        };
        let before = tcgetattr(stdin.as_fd()).map_err(failed)?;
        let mut raw = before.clone();
        cfmakeraw(&mut raw);
        tcsetattr(stdin.as_fd(), SetArg::TCSADRAIN, &raw).map_err(failed)?;
        Ok(Some(Self { before }))
    }
}

impl Drop for RawMode {
    fn drop(&mut self) {
        // A terminal that has gone needs no restoring.
        let _ignored = tcsetattr(io::stdin().as_fd(), SetArg::TCSADRAIN, &self.before);
    }
}

/// Refuses to give a process our stdin as a terminal where it is none, as Docker does: what is typed before the process
/// reads would be lost, and so would be the end.
pub fn check(stdin: bool, tty: bool) -> Result<()> {
    match stdin && tty && !io::stdin().is_terminal() {
        true => Err(Error::Input(
            "-i and -t together need a terminal on standard input, which is none; leave out -t to pass a file or a pipe"
                .to_owned(),
        )),
        false => Ok(()),
    }
}

/// The size of the terminal that we are on, if we are on one.
pub fn size() -> Option<WindowSize> {
    let (rows, columns) = window_size(io::stdin())
        .or_else(|_| window_size(io::stdout()))
        .or_else(|_| window_size(io::stderr()))
        .ok()?;
    Some(WindowSize {
        rows: rows.into(),
        columns: columns.into(),
    })
}
