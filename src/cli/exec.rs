//! `snapctl exec`.

use std::process::ExitCode;

use clap::Args;

use super::args::{EnvVar, env, env_list, filled, named, utf8};
use super::client::Client;
use super::error::Result;
use super::run::process_exit;
use super::signals::Signals;
use super::stdio::{Forward, Session};
use super::terminal::{self, RawMode};
use crate::grpc::pb::plywood::ExecStart;

/// Arguments of `exec`.
#[derive(Args, Debug)]
pub struct ExecArgs {
    /// Pass our stdin to the process
    #[arg(short, long)]
    interactive: bool,
    /// Give the process a terminal
    #[arg(short, long)]
    tty: bool,
    /// Set a variable of the environment; a KEY alone takes its value from here
    #[arg(short, long, value_name = "KEY[=VALUE]", value_parser = env())]
    env: Vec<EnvVar>,
    /// Working directory, instead of the container's
    #[arg(short, long, value_name = "DIR", value_parser = filled())]
    workdir: Option<String>,
    /// User, instead of the container's
    #[arg(short, long, value_name = "USER[:GROUP]", value_parser = filled())]
    user: Option<String>,
    // As for `run`.
    /// The container (name, id, or a prefix of an id), then command and arguments
    #[arg(required = true, num_args = 2.., trailing_var_arg = true, value_names = ["CONTAINER", "COMMAND"], value_parser = utf8())]
    words: Vec<String>,
}

/// Runs `snapctl exec`; the exit code is the process's.
pub async fn run(args: ExecArgs, client: &Client) -> Result<ExitCode> {
    let mut signals = Signals::catch()?;
    let (stdin, tty) = (args.interactive, args.tty);
    terminal::check(stdin, tty)?;
    let mut words = args.words.into_iter();
    // The parser demands two.
    let id = named(words.next(), "CONTAINER")?;
    let start = ExecStart {
        id,
        args: words.collect(),
        env: env_list(&args.env),
        working_dir: args.workdir.unwrap_or_default(),
        user: args.user.unwrap_or_default(),
        tty,
        stdin,
        window: terminal::size().filter(|_| tty),
    };
    let interrupted = "interrupted before the process was started";
    let session = signals
        .interrupt(Session::exec(client, start), interrupted)
        .await?;
    let raw = match stdin && tty {
        true => RawMode::enter()?,
        false => None,
    };
    let code = session
        .pump(stdin, tty, &mut signals, Forward::Stream)
        .await;
    drop(raw);
    Ok(process_exit(code?))
}
