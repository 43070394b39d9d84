//! The mode in which plyfs serves the mounts of a test run: `PLYWOOD_TEST_MODE` names one, so that
//! the same tests pass through every path that a kernel or a user can choose.

use std::process::Command;
use std::sync::OnceLock;

/// The program under test.
pub const PLYFS: &str = env!("CARGO_BIN_EXE_plyfs");

/// Runs a program without the system calls that Linux 3.10 does not have.
const OLD_CALLS: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/tests/common/linux-3.10");

/// A way to serve.
#[derive(Debug)]
pub struct Mode {
    /// As `PLYWOOD_TEST_MODE` has it.
    pub name: &'static str,
    /// What it adds to the options of every mount; what a test says itself comes later and counts.
    pub options: &'static str,
    /// The server has only the system calls of Linux 3.10.
    pub old_calls: bool,
}

/// `tests/modes/run` knows them by name, too.
const ALL: [Mode; 8] = [
    mode("all-on", "", false),
    mode("all-off", "kernel_features=-all", false),
    mode("protocol-7.22", "kernel_features=7.22", false),
    mode("writeback", "writeback", false),
    mode("no_open", "no_open", false),
    mode("no_open+writeback", "no_open,writeback", false),
    mode("old-calls", "", true),
    mode("linux-3.10", "kernel_features=7.22", true),
];

const fn mode(name: &'static str, options: &'static str, old_calls: bool) -> Mode {
    Mode {
        name,
        options,
        old_calls,
    }
}

impl Mode {
    /// The mode of this run; without one named, `all-on`.
    pub fn of_run() -> &'static Self {
        static MODE: OnceLock<&Mode> = OnceLock::new();
        MODE.get_or_init(|| {
            let name = std::env::var("PLYWOOD_TEST_MODE").unwrap_or_else(|_| "all-on".into());
            let names: Vec<_> = ALL.iter().map(|mode| mode.name).collect();
            ALL.iter()
                .find(|mode| mode.name == name)
                .unwrap_or_else(|| panic!("PLYWOOD_TEST_MODE={name}: say one of {names:?}"))
        })
    }

    /// Whether the kernel's part has what is newer than protocol 7.22.
    pub fn is_new(&self) -> bool {
        !self.options.contains("7.22")
    }

    /// Whether the server is asked when a file is opened.
    pub fn opens(&self) -> bool {
        !self.options.contains("no_open")
    }

    /// Whether an open that truncates is one request; otherwise it opens for writing first, and cuts then.
    pub fn truncates_at_open(&self) -> bool {
        self.opens() && self.name != "all-off"
    }

    /// Whether two names can be exchanged.
    pub fn exchanges(&self) -> bool {
        self.is_new() && !self.old_calls
    }
}

/// To start plyfs by, in the mode of this run.
pub fn plyfs() -> Command {
    if !Mode::of_run().old_calls {
        return Command::new(PLYFS);
    }
    let mut command = Command::new(OLD_CALLS);
    command.arg(PLYFS);
    command
}
