//! `snapctl run` and `snapctl create`.

use std::pin::pin;
use std::process::ExitCode;

use clap::Args;

use super::args::{EnvVar, env, env_list, filled, named, optional_name, utf8, volume};
use super::client::Client;
use super::error::{Error, Result};
use super::output::{lines_out, note, report};
use super::signals::Signals;
use super::stdio::{Forward, Session};
use super::terminal::{self, RawMode};
use crate::grpc::pb::plywood::{
    AttachStart, CreateContainerRequest, CreateContainerResponse, RemoveContainerRequest,
    StartContainerRequest, Volume,
};

/// What a new container is to be.
#[derive(Args, Debug)]
pub struct ContainerArgs {
    /// Keep stdin open for the process
    #[arg(short, long)]
    interactive: bool,
    /// Give the process a terminal
    #[arg(short, long)]
    tty: bool,
    /// Remove the container when it ends
    #[arg(long)]
    rm: bool,
    /// Name of the container; generated when not given
    #[arg(long, value_parser = optional_name())]
    name: Option<String>,
    /// Set a variable of the environment; a KEY alone takes its value from here
    #[arg(short, long, value_name = "KEY[=VALUE]", value_parser = env())]
    env: Vec<EnvVar>,
    /// Working directory, instead of the image's
    #[arg(short, long, value_name = "DIR", value_parser = filled())]
    workdir: Option<String>,
    /// User, instead of the image's: a name or number, and after a colon the group
    #[arg(short, long, value_name = "USER[:GROUP]", value_parser = filled())]
    user: Option<String>,
    /// Show a path of the host in the container
    #[arg(short, long = "volume", value_name = "SOURCE:TARGET[:ro]", value_parser = volume())]
    volumes: Vec<Volume>,
    /// Program to run, instead of the image's Entrypoint and Cmd; "" for none
    #[arg(long, value_name = "PROGRAM", value_parser = utf8())]
    entrypoint: Option<String>,
    /// Host name; the first digits of the id when not given
    #[arg(long, value_parser = filled())]
    hostname: Option<String>,
    /// Make the root file system read-only
    #[arg(long)]
    read_only: bool,
    /// Network: the host's, or none but a loopback interface
    #[arg(long, value_parser = ["host", "none"], default_value = "none")]
    network: String,
    // One argument for both: only after the first value of such a one is every word a value, as is right
    // for all that follows the image.
    /// The image (a name, a digest, or a prefix of an id), then command and arguments instead of its Cmd
    #[arg(required = true, trailing_var_arg = true, value_name = "IMAGE", value_parser = utf8())]
    words: Vec<String>,
}

/// Arguments of `run`.
#[derive(Args, Debug)]
pub struct RunArgs {
    /// Print the container's id and leave it running
    #[arg(short, long)]
    detach: bool,
    #[command(flatten)]
    container: ContainerArgs,
}

impl ContainerArgs {
    fn into_request(self) -> Result<CreateContainerRequest> {
        let set_entrypoint = self.entrypoint.is_some();
        let mut words = self.words.into_iter();
        // The parser demands one.
        let image = named(words.next(), "IMAGE")?;
        Ok(CreateContainerRequest {
            image,
            name: self.name.unwrap_or_default(),
            args: words.collect(),
            entrypoint: self
                .entrypoint
                .into_iter()
                .filter(|e| !e.is_empty())
                .collect(),
            set_entrypoint,
            env: env_list(&self.env),
            working_dir: self.workdir.unwrap_or_default(),
            user: self.user.unwrap_or_default(),
            volumes: self.volumes,
            hostname: self.hostname.unwrap_or_default(),
            read_only: self.read_only,
            network: self.network,
            tty: self.tty,
            open_stdin: self.interactive,
            auto_remove: self.rm,
            starts_next: false,
        })
    }
}

/// Runs `snapctl create`.
pub async fn create(args: ContainerArgs, client: &Client) -> Result<()> {
    let created = make(args.into_request()?, client).await?;
    lines_out(&[created.id])
}

/// Runs `snapctl run`; the exit code is the process's.
pub async fn run(args: RunArgs, client: &Client) -> Result<ExitCode> {
    let mut signals = Signals::catch()?;
    let request = CreateContainerRequest {
        starts_next: true,
        ..args.container.into_request()?
    };
    if args.detach {
        detached(request, client, &mut signals).await
    } else {
        foreground(request, client, &mut signals).await
    }
}

async fn detached(
    request: CreateContainerRequest,
    client: &Client,
    signals: &mut Signals,
) -> Result<ExitCode> {
    let remove = request.auto_remove;
    let id = make_or_undo(request, client, signals).await?.id;
    let interrupted = match remove {
        true => "interrupted while the container was being started; it is removed",
        false => "interrupted while the container was being started; `snapctl ps -a` tells of it",
    };
    let started = start(client, &id, remove);
    match signals.interrupt(started, interrupted).await {
        Err(error @ Error::Interrupted { .. }) => {
            discard(client, &id, remove).await;
            return Err(error);
        }
        started => started?,
    }
    lines_out(&[id])?;
    Ok(ExitCode::SUCCESS)
}

async fn foreground(
    request: CreateContainerRequest,
    client: &Client,
    signals: &mut Signals,
) -> Result<ExitCode> {
    let (stdin, tty, remove) = (request.open_stdin, request.tty, request.auto_remove);
    terminal::check(stdin, tty)?;
    let id = make_or_undo(request, client, signals).await?.id;
    let attach = AttachStart {
        id: id.clone(),
        stdin,
    };
    let interrupted = "interrupted before the process was started";
    let attached = signals
        .interrupt(Session::attach(client, attach), interrupted)
        .await;
    let session = match attached {
        Ok(session) => session,
        Err(error) => {
            discard(client, &id, remove).await;
            return Err(error);
        }
    };
    start(client, &id, remove).await?;
    let raw = match stdin && tty {
        true => RawMode::enter()?,
        false => None,
    };
    let ended = session
        .pump(stdin, tty, signals, Forward::Kill(client, &id))
        .await;
    drop(raw);
    if let Err(error) = &ended
        && error.is_broken_pipe()
        && remove
    {
        // In a pipeline of plain processes SIGPIPE would have ended it; nobody else knows of it.
        discard(client, &id, remove).await;
    }
    Ok(process_exit(ended?))
}

/// The exit code of a process as our own.
pub fn process_exit(code: i32) -> ExitCode {
    // wait(2) has no more than eight bits; anything else is not a process's code.
    ExitCode::from(u8::try_from(code).unwrap_or(super::error::ENGINE))
}

async fn make(request: CreateContainerRequest, client: &Client) -> Result<CreateContainerResponse> {
    let created = client.containers().create(request).await?.into_inner();
    for warning in &created.warnings {
        note(&format!("snapctl: warning: {warning}"));
    }
    Ok(created)
}

/// Makes a container, or none if a signal comes meanwhile. Only plyd's answer tells whether one is made
/// by then, so it is waited for, and what it tells of is removed. Whoever sends one more signal does not
/// wait; a creation whose client goes away is undone by plyd.
async fn make_or_undo(
    request: CreateContainerRequest,
    client: &Client,
    signals: &mut Signals,
) -> Result<CreateContainerResponse> {
    let interrupted = "interrupted before the container was created";
    let mut making = pin!(make(request, client));
    let error = match signals.interrupt(making.as_mut(), interrupted).await {
        Err(error @ Error::Interrupted { .. }) => error,
        made => return made,
    };
    let undone = async {
        if let Ok(made) = making.await {
            discard(client, &made.id, true).await;
        }
        Ok(())
    };
    signals.interrupt(undone, interrupted).await?;
    Err(error)
}

async fn start(client: &Client, id: &str, remove: bool) -> Result<()> {
    let request = StartContainerRequest {
        id: id.to_owned(),
        window: terminal::size(),
    };
    match client.containers().start(request).await {
        Ok(_) => Ok(()),
        Err(status) => {
            discard(client, id, remove).await;
            Err(status.into())
        }
    }
}

/// Removes a container that was to be removed at its end, without waiting for one.
async fn discard(client: &Client, id: &str, remove: bool) {
    if !remove {
        return;
    }
    let request = RemoveContainerRequest {
        id: id.to_owned(),
        force: true,
    };
    match client.containers().remove(request).await {
        Ok(_) => {}
        Err(status) if status.code() == tonic::Code::NotFound => {}
        Err(status) => report(&Error::from(status)),
    }
}
