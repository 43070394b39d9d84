//! The commands on containers that exist: start, stop, kill, wait, rm, ps, inspect, logs.

use clap::Args;
use serde::Serialize;
use tonic::Status;

use super::args::{count, name, signal};
use super::client::Client;
use super::error::{Error, Result};
use super::output::{self, Cut, ListFormat, embedded, lines_out, or_dash, printable, report};
use super::time::{age, rfc3339};
use crate::grpc::pb::plywood::logs_response::Stream;
use crate::grpc::pb::plywood::{
    Container, ContainerStatus, InspectContainerRequest, KillContainerRequest,
    ListContainersRequest, LogsRequest, RemoveContainerRequest, StartContainerRequest,
    StopContainerRequest, WaitContainerRequest,
};
use crate::runtime::containers::STOP_SECONDS;

/// Containers that a command is about.
#[derive(Args, Debug)]
pub struct Targets {
    /// Names, ids, or prefixes of ids
    #[arg(required = true, value_name = "CONTAINER", value_parser = name())]
    containers: Vec<String>,
}

/// Arguments of `stop`.
#[derive(Args, Debug)]
pub struct StopArgs {
    /// Seconds to wait before SIGKILL
    // With a hyphen it is a number that makes no sense, and not an option that does not exist.
    #[arg(short, long, value_name = "SECONDS", default_value_t = STOP_SECONDS, allow_hyphen_values = true, value_parser = count("seconds", u32::MAX))]
    timeout: u32,
    #[command(flatten)]
    targets: Targets,
}

/// Arguments of `kill`.
#[derive(Args, Debug)]
pub struct KillArgs {
    /// Signal, by number or name
    #[arg(short, long, default_value = "SIGKILL", value_parser = signal())]
    signal: String,
    #[command(flatten)]
    targets: Targets,
}

/// Arguments of `rm`.
#[derive(Args, Debug)]
pub struct RemoveArgs {
    /// Kill a container that runs
    #[arg(short, long)]
    force: bool,
    #[command(flatten)]
    targets: Targets,
}

/// Arguments of `ps`.
#[derive(Args, Debug)]
pub struct PsArgs {
    /// Show stopped containers, too
    #[arg(short, long)]
    all: bool,
    #[command(flatten)]
    cut: Cut,
    #[command(flatten)]
    format: ListFormat,
}

/// Arguments of `logs`.
#[derive(Args, Debug)]
pub struct LogsArgs {
    /// Go on until the container ends
    #[arg(short, long)]
    follow: bool,
    /// Only the last N lines
    #[arg(short = 'n', long, value_name = "N", allow_hyphen_values = true, value_parser = count("lines", u64::MAX))]
    tail: Option<u64>,
    /// Put the time before each piece of output
    #[arg(short, long)]
    timestamps: bool,
    /// Name, id, or a prefix of an id
    #[arg(value_parser = name())]
    container: String,
}

#[derive(Serialize)]
struct ContainerView {
    id: String,
    name: String,
    image: String,
    image_id: String,
    status: &'static str,
    pid: Option<u32>,
    exit_code: Option<i32>,
    oom_killed: bool,
    created: Option<String>,
    started: Option<String>,
    finished: Option<String>,
    args: Vec<String>,
    tty: bool,
    auto_remove: bool,
    snapshot: String,
    error: Option<String>,
    #[serde(skip)]
    state: String,
    #[serde(skip)]
    age: String,
}

impl From<Container> for ContainerView {
    fn from(container: Container) -> Self {
        let status = container.status();
        let stopped = status == ContainerStatus::Stopped;
        Self {
            status: match status {
                ContainerStatus::Created => "created",
                ContainerStatus::Running => "running",
                ContainerStatus::Stopped => "stopped",
                ContainerStatus::Unspecified => "unknown",
            },
            state: state(&container),
            age: age(container.created.as_ref()),
            pid: Some(container.pid).filter(|pid| *pid != 0),
            exit_code: stopped.then_some(container.exit_code),
            oom_killed: container.oom_killed,
            created: container.created.as_ref().map(rfc3339),
            started: container.started.as_ref().map(rfc3339),
            finished: container.finished.as_ref().map(rfc3339),
            error: Some(container.error).filter(|error| !error.is_empty()),
            id: container.id,
            name: container.name,
            image: container.image,
            image_id: container.image_id,
            args: container.args,
            tty: container.tty,
            auto_remove: container.auto_remove,
            snapshot: container.snapshot,
        }
    }
}

#[derive(Serialize)]
struct InspectView {
    #[serde(flatten)]
    container: ContainerView,
    bundle_dir: String,
    log_path: String,
    spec: serde_json::Value,
}

/// The status in words, for people.
fn state(container: &Container) -> String {
    match container.status() {
        // What went wrong is in `inspect`.
        ContainerStatus::Created if container.error.is_empty() => "created".to_owned(),
        ContainerStatus::Created => "created, its start failed".to_owned(),
        ContainerStatus::Running if container.root_unknown => {
            "running, but how its root is cannot be told".to_owned()
        }
        ContainerStatus::Running if !container.error.is_empty() => {
            "running, but its root has failed".to_owned()
        }
        ContainerStatus::Running => format!("running, started {}", age(container.started.as_ref())),
        ContainerStatus::Stopped => format!(
            "exited ({}){} {}",
            container.exit_code,
            if container.oom_killed {
                ", out of memory"
            } else {
                ""
            },
            age(container.finished.as_ref())
        ),
        ContainerStatus::Unspecified => "unknown".to_owned(),
    }
}

/// Does `call` for every target in turn, prints what it returns, reports what fails and goes on. What
/// only does something returns the target as the user wrote it, as Docker does.
async fn each<F>(targets: Targets, call: impl Fn(String) -> F) -> Result<()>
where
    F: Future<Output = Result<String, Status>>,
{
    let mut failed = false;
    for container in targets.containers {
        match call(container).await {
            Ok(line) => lines_out(&[printable(&line)])?,
            Err(status) => {
                failed = true;
                report(&status.into());
            }
        }
    }
    if failed { Err(Error::Reported) } else { Ok(()) }
}

/// Runs `snapctl start`.
pub async fn start(targets: Targets, client: &Client) -> Result<()> {
    each(targets, async |id: String| {
        let request = StartContainerRequest {
            id: id.clone(),
            window: None,
        };
        client.containers().start(request).await.map(|_| id)
    })
    .await
}

/// Runs `snapctl stop`.
pub async fn stop(args: StopArgs, client: &Client) -> Result<()> {
    each(args.targets, async |id: String| {
        let request = StopContainerRequest {
            id: id.clone(),
            timeout_seconds: Some(args.timeout),
        };
        client.containers().stop(request).await.map(|_| id)
    })
    .await
}

/// Runs `snapctl kill`.
pub async fn kill(args: KillArgs, client: &Client) -> Result<()> {
    each(args.targets, async |id: String| {
        let request = KillContainerRequest {
            id: id.clone(),
            signal: args.signal.clone(),
        };
        client.containers().kill(request).await.map(|_| id)
    })
    .await
}

/// Runs `snapctl wait`: prints exit codes.
pub async fn wait(targets: Targets, client: &Client) -> Result<()> {
    each(targets, async |id: String| {
        let response = client
            .containers()
            .wait(WaitContainerRequest { id })
            .await?;
        Ok(response.into_inner().exit_code.to_string())
    })
    .await
}

/// Runs `snapctl rm`.
pub async fn remove(args: RemoveArgs, client: &Client) -> Result<()> {
    each(args.targets, async |id: String| {
        let request = RemoveContainerRequest {
            id: id.clone(),
            force: args.force,
        };
        client.containers().remove(request).await.map(|_| id)
    })
    .await
}

/// Runs `snapctl ps`.
pub async fn ps(args: PsArgs, client: &Client) -> Result<()> {
    let request = ListContainersRequest { all: args.all };
    let response = client.containers().list(request).await?.into_inner();
    output::note_unusable(response.unusable_records);
    let views: Vec<ContainerView> = response.containers.into_iter().map(Into::into).collect();
    args.format.print(
        &views,
        &["ID", "NAME", "IMAGE", "COMMAND", "CREATED", "STATUS"],
        |container| container.id.clone(),
        |container| {
            vec![
                args.cut.id(&container.id).to_owned(),
                container.name.clone(),
                args.cut.digests(&container.image),
                command(&container.args, args.cut),
                container.age.clone(),
                container.state.clone(),
            ]
        },
    )
}

/// A command line that fits into a column, unless nothing is to be cut.
fn command(args: &[String], cut: Cut) -> String {
    const WIDTH: usize = 30;
    let line = args.join(" ");
    match line.char_indices().nth(WIDTH) {
        Some((end, _)) if !cut.no_trunc => format!("{}...", &line[..end]),
        _ => or_dash(&line),
    }
}

/// Runs `snapctl inspect`.
pub async fn inspect(targets: Targets, client: &Client) -> Result<()> {
    let mut views = Vec::new();
    let mut failed = false;
    for id in targets.containers {
        match client
            .containers()
            .inspect(InspectContainerRequest { id })
            .await
        {
            Ok(response) => {
                let response = response.into_inner();
                views.push(InspectView {
                    container: response.container.unwrap_or_default().into(),
                    bundle_dir: response.bundle_dir,
                    log_path: response.log_path,
                    spec: embedded(&response.spec_json),
                });
            }
            Err(status) => {
                failed = true;
                report(&status.into());
            }
        }
    }
    output::json(&views)?;
    if failed { Err(Error::Reported) } else { Ok(()) }
}

/// Runs `snapctl logs`: what went to the process's stderr goes to ours.
pub async fn logs(args: LogsArgs, client: &Client) -> Result<()> {
    let request = LogsRequest {
        id: args.container,
        follow: args.follow,
        tail: args.tail,
    };
    let mut responses = client.containers().logs(request).await?.into_inner();
    while let Some(piece) = responses.message().await? {
        let mut bytes = Vec::new();
        if args.timestamps {
            let time = piece.time.as_ref().map(rfc3339).unwrap_or_default();
            bytes.extend_from_slice(time.as_bytes());
            bytes.push(b' ');
        }
        bytes.extend_from_slice(&piece.data);
        match piece.stream() {
            Stream::Stderr => output::bytes_err(&bytes)?,
            Stream::Stdout | Stream::Unspecified => output::bytes_out(&bytes)?,
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn long_commands_are_cut() {
        let command = |args: &[String]| command(args, Cut::default());
        assert_eq!(command(&[]), "-");
        assert_eq!(command(&["a".into(), "b c".into()]), "a b c");
        assert_eq!(command(&["x".repeat(31)]), format!("{}...", "x".repeat(30)));
        assert_eq!(command(&["\u{e9}".repeat(30)]), "\u{e9}".repeat(30));
        let whole = super::command(&["x".repeat(31)], Cut { no_trunc: true });
        assert_eq!(whole, "x".repeat(31));
    }

    #[test]
    fn only_a_stopped_container_has_an_exit_code() {
        let mut container = Container {
            exit_code: 3,
            status: ContainerStatus::Running.into(),
            ..Container::default()
        };
        let view = ContainerView::from(container.clone());
        assert_eq!((view.status, view.exit_code), ("running", None));
        container.status = ContainerStatus::Stopped.into();
        let view = ContainerView::from(container);
        assert_eq!((view.status, view.exit_code), ("stopped", Some(3)));
        assert!(view.state.starts_with("exited (3) "), "{}", view.state);
    }
}
