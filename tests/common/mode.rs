//! The mode in which plyfs serves the mounts of a test run: `PLYWOOD_TEST_MODE` names one, so that
//! the same tests pass through every path that a kernel or a user can choose.

use std::process::Command;
use std::sync::OnceLock;

/// The program under test.
pub const PLYFS: &str = env!("CARGO_BIN_EXE_plyfs");

/// Runs a program without some system calls.
const RESTRICT: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/tests/common/restrict");
/// Without those that Linux 3.10 does not have.
const OLD_CALLS: Option<&str> = Some("linux-3.10");
/// Without what came after Linux 4.10, which is forbidden and not missing.
const OLD_PROFILE: Option<&str> = Some("old-profile");
/// Without the making of devices.
const NO_MKNOD: Option<&str> = Some("no-mknod");

/// A way to serve.
#[derive(Debug)]
pub struct Mode {
    /// As `PLYWOOD_TEST_MODE` has it.
    pub name: &'static str,
    options: &'static str,
    /// What the server's system calls are restricted to, as `tests/common/restrict` names it.
    restriction: Option<&'static str>,
}

const PASSTHROUGH: &str = "passthrough";

/// `tests/modes/run` knows them by name, too.
const ALL: [Mode; 11] = [
    mode("all-on", "", None),
    mode("all-off", "kernel_features=-all", None),
    mode("protocol-7.22", "kernel_features=7.22", None),
    mode("writeback", "writeback", None),
    mode("no_open", "no_open", None),
    mode("no_open+writeback", "no_open,writeback", None),
    mode(PASSTHROUGH, PASSTHROUGH, None),
    mode("old-calls", "", OLD_CALLS),
    mode("linux-3.10", "kernel_features=7.22", OLD_CALLS),
    mode("old-profile", "", OLD_PROFILE),
    mode("no-mknod", "", NO_MKNOD),
];

const fn mode(
    name: &'static str,
    options: &'static str,
    restriction: Option<&'static str>,
) -> Mode {
    Mode {
        name,
        options,
        restriction,
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

    /// What it adds to the options of a mount; `own`, which a test says itself, come later and count. Where the two
    /// exclude each other, it adds nothing: plyfs refuses a contradiction.
    pub fn options_before(&self, own: &str) -> &'static str {
        let has = |options: &str, words: [&str; 2]| {
            let mut all = options.split(',');
            all.any(|word| words.contains(&word))
        };
        let excluded = ["no_open", "writeback"];
        let passthrough = [PASSTHROUGH; 2];
        let contradicts = has(self.options, passthrough) && has(own, excluded)
            || has(self.options, excluded) && has(own, passthrough);
        if contradicts { "" } else { self.options }
    }

    /// Whether the kernel reads lower files by itself: who has one open before it is written goes on with its old data.
    pub fn passes(&self) -> bool {
        self.options == PASSTHROUGH && kernel_passes()
    }

    /// Whether the kernel's part has what is newer than protocol 7.22.
    pub fn is_new(&self) -> bool {
        !self.options.contains("7.22")
    }

    /// Whether the kernel gathers writes.
    pub fn gathers(&self) -> bool {
        self.options.contains("writeback")
    }

    /// Whether the server is asked when a file is opened.
    pub fn opens(&self) -> bool {
        !self.options.contains("no_open")
    }

    /// Whether an open that truncates is one request; otherwise it opens for writing first, and cuts then.
    pub fn truncates_at_open(&self) -> bool {
        self.opens() && self.name != "all-off"
    }

    /// Whether the kernel keeps listings and the targets of symbolic links.
    pub fn keeps_listings(&self) -> bool {
        self.is_new() && self.name != "all-off"
    }

    /// Whether the server can make devices; otherwise whiteouts are attributes.
    pub fn makes_devices(&self) -> bool {
        self.restriction != NO_MKNOD
    }

    /// Whether two names can be exchanged.
    pub fn exchanges(&self) -> bool {
        self.is_new() && self.restriction != OLD_CALLS
    }
}

/// Whether this kernel can read lower files by itself, as Linux 6.9 and later may.
pub fn kernel_passes() -> bool {
    let output = Command::new(PLYFS).arg("--probe").output().unwrap();
    let table = String::from_utf8(output.stdout).unwrap();
    let row = table.lines().find(|line| line.starts_with("passthrough "));
    // Name, protocol, whether the kernel offers it.
    row.and_then(|row| row.split_whitespace().nth(2)) == Some("yes")
}

/// To start plyfs by, in the mode of this run.
pub fn plyfs() -> Command {
    let Some(restriction) = Mode::of_run().restriction else {
        return Command::new(PLYFS);
    };
    let mut command = Command::new(RESTRICT);
    command.args([restriction, PLYFS]);
    command
}
