//! `plyshim`: one process per container, see [`plywood::runtime::shim`]. plyd starts it; it is of no use by hand.

use std::path::PathBuf;
use std::process::ExitCode;

use clap::{Args, Parser, Subcommand};
use plywood::runtime::lookup::{self, Question};
use plywood::runtime::shim::{self, Config};

#[derive(Parser)]
#[command(
    name = "plyshim",
    version,
    about = "Owns one container's process; started by plyd"
)]
struct Arguments {
    #[command(subcommand)]
    task: Task,
}

#[derive(Subcommand)]
enum Task {
    /// Serve a container until its end
    Serve(Serve),
    /// Answer the question on standard input about a container's root
    Lookup,
}

#[derive(Args)]
struct Serve {
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
    let result = match Arguments::parse().task {
        Task::Serve(serve) => shim::run(Config {
            id: serve.id,
            dir: serve.dir,
            run_dir: serve.run_dir,
            runtime: serve.runtime,
            runtime_root: serve.runtime_root,
            tty: serve.tty,
            stdin: serve.stdin,
        })
        .map_err(|error| error.to_string()),
        Task::Lookup => look_up(),
    };
    match result {
        Ok(()) => ExitCode::SUCCESS,
        Err(problem) => {
            eprintln!("{problem}");
            ExitCode::FAILURE
        }
    }
}

fn look_up() -> Result<(), String> {
    let question: Question =
        serde_json::from_reader(std::io::stdin()).map_err(|error| error.to_string())?;
    let answer = lookup::answer(&question).map_err(|error| error.to_string())?;
    serde_json::to_writer(std::io::stdout(), &answer).map_err(|error| error.to_string())
}
