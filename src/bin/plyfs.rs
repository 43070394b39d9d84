//! `plyfs`: mounts a union of directories, and serves it. See `docs/SEMANTICS.md`.

use std::ffi::OsString;
use std::io::Write;
use std::os::fd::RawFd;
use std::path::PathBuf;
use std::process::ExitCode;

use clap::{CommandFactory, Parser};
use plywood::cli::usage;
use plywood::fuse::daemon::{self, Invocation};
use plywood::fuse::options::{self, Mounter};
use plywood::fuse::probe;

/// Exit code for a command line that cannot be understood; clap uses the same.
const USAGE: u8 = 2;

/// Mount a union: read-only directories below one writable directory.
///
/// Exits with 0 when the mount answers, 1 when it could not be made, 2 when the command line is wrong.
#[derive(Parser)]
#[command(
    name = "plyfs",
    version,
    override_usage = "plyfs [OPTIONS] [SOURCE] MOUNTPOINT",
    max_term_width = 100,
    after_long_help = options::help::text()
)]
struct Arguments {
    /// Where to mount; before it there may be a source as mount(8) gives it, which is shown in the mount table.
    #[arg(value_name = "MOUNTPOINT", num_args = 0..=2, required_unless_present = "probe")]
    places: Vec<OsString>,
    /// lowerdir=A:B:C (A on top), upperdir=U, workdir=W and others, separated by commas; --help lists all.
    #[arg(short = 'o', value_name = "OPTIONS")]
    options: Vec<OsString>,
    /// Stay in the foreground.
    #[arg(short, long)]
    foreground: bool,
    /// Stay in the foreground and log every request.
    #[arg(short, long)]
    debug: bool,
    /// Answer one request after the other, as `-o threads=1`.
    #[arg(short = 's')]
    single_threaded: bool,
    /// Append the log to this file instead of sending it to the system log.
    #[arg(long, value_name = "PATH")]
    log_file: Option<PathBuf>,
    /// Serve a mount that is there already, on this inherited descriptor of /dev/fuse.
    #[arg(long, value_name = "NUMBER")]
    fuse_fd: Option<RawFd>,
    /// Listen for plyd at this path.
    #[arg(long, value_name = "PATH")]
    control: Option<PathBuf>,
    /// Print what FUSE offers on this host and what of it is used, and end.
    #[arg(long)]
    probe: bool,
    /// With --probe, print JSON.
    #[arg(long, requires = "probe")]
    json: bool,
    /// Type of the file system, as mount(8) gives it; it says nothing new.
    #[arg(short = 't', value_name = "TYPE", hide = true)]
    fstype: Option<OsString>,
}

fn main() -> ExitCode {
    let mut arguments = match Arguments::try_parse() {
        Ok(arguments) => arguments,
        Err(error) => return usage::refuse(&error, Arguments::command(), &[], USAGE),
    };
    if arguments.probe {
        let probe = probe::probe();
        let text = if arguments.json {
            probe.json()
        } else {
            probe.table()
        };
        // Whoever reads it may leave early.
        let _ = std::io::stdout().write_all(text.as_bytes());
        return ExitCode::SUCCESS;
    }
    let mut options = match options::parse(&arguments.options, Mounter::current()) {
        Ok(options) => options,
        Err(error) => {
            eprintln!("plyfs: {error}");
            return ExitCode::from(USAGE);
        }
    };
    if arguments.single_threaded {
        options.session.threads = 1;
    }
    let Some(mountpoint) = arguments.places.pop() else {
        eprintln!("plyfs: no mount point; see `plyfs --help`");
        return ExitCode::from(USAGE);
    };
    if let Some(source) = arguments.places.pop() {
        options.mount.source = source;
    }
    let invocation = Invocation {
        mountpoint: mountpoint.into(),
        foreground: arguments.foreground,
        debug: arguments.debug || options.debug,
        log_file: arguments.log_file,
        fuse_fd: arguments.fuse_fd,
        control: arguments.control,
        options,
    };
    match daemon::run(invocation) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("plyfs: {error}");
            ExitCode::FAILURE
        }
    }
}
