//! `plyshim`: one process per container, see [`plywood::runtime::shim`]. plyd starts it; it is of no use by hand.

use std::path::PathBuf;
use std::process::ExitCode;

use clap::Parser;
use plywood::runtime::shim::{Config, run};

#[derive(Parser)]
#[command(version, about = "Owns one container's process; started by plyd")]
struct Arguments {
    /// Id of the container
    #[arg(long)]
    id: String,
    /// The container's directory below plyd's root
    #[arg(long)]
    dir: PathBuf,
    /// The container's directory below plyd's state directory
    #[arg(long)]
    run_dir: PathBuf,
    /// The OCI runtime
    #[arg(long)]
    runtime: PathBuf,
    /// The OCI runtime's state directory
    #[arg(long)]
    runtime_root: PathBuf,
    /// Give the process a terminal
    #[arg(long)]
    tty: bool,
    /// Let clients write to its standard input
    #[arg(long)]
    stdin: bool,
}

fn main() -> ExitCode {
    let arguments = Arguments::parse();
    let config = Config {
        id: arguments.id,
        dir: arguments.dir,
        run_dir: arguments.run_dir,
        runtime: arguments.runtime,
        runtime_root: arguments.runtime_root,
        tty: arguments.tty,
        stdin: arguments.stdin,
    };
    match run(config) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("plyshim: {error}");
            ExitCode::FAILURE
        }
    }
}
