//! `plywood.v1.Containers`.

use std::sync::Arc;
use std::time::Duration;

use tokio::sync::mpsc;
use tokio_stream::wrappers::ReceiverStream;
use tonic::metadata::MetadataValue;
use tonic::{Code, Request, Response, Status, Streaming};

use super::pb::plywood as api;
use super::status::{blocking, io_code, record_code};
use crate::image::ImageStore;
use crate::runtime::client;
use crate::runtime::containers::{
    Container, Containers, CreateRequest, Error, ExecRequest, Input, Output, OutputEvent,
    VolumeRequest,
};
use crate::runtime::log::{Record, Stream};
use crate::runtime::signals;
use crate::runtime::state;
use crate::runtime::wire::Window;

/// In the trailer of an error: what `run` and `exec` should exit with.
const EXIT_CODE: &str = "plywood-exit-code";
/// Messages that may wait for a client; then its container's log waits in its file.
const QUEUE: usize = 4;

/// The service.
pub(super) struct Service {
    containers: Containers,
    images: Arc<ImageStore>,
}

impl Service {
    pub(super) fn new(containers: Containers, images: Arc<ImageStore>) -> Self {
        Self { containers, images }
    }
}

type Answer<T> = Result<Response<T>, Status>;
type Events<T> = ReceiverStream<Result<T, Status>>;

#[tonic::async_trait]
impl api::containers_server::Containers for Service {
    type LogsStream = Events<api::LogsResponse>;
    type AttachStream = Events<api::StdioResponse>;
    type ExecStream = Events<api::StdioResponse>;

    async fn create(
        &self,
        request: Request<api::CreateContainerRequest>,
    ) -> Answer<api::CreateContainerResponse> {
        let request = request.into_inner();
        let images = Arc::clone(&self.images);
        let reference = request.image.clone();
        let image = blocking(move || images.resolve(&reference).map_err(Status::from)).await?;
        let mut warnings = Vec::new();
        for volume in &image.config.volumes {
            let covered = request.volumes.iter().any(|mine| &mine.target == volume);
            if !covered {
                warnings.push(format!(
                    "the image wants a volume at {volume}; what is written there is kept in the \
                     container's own root and goes with it (-v keeps it elsewhere)"
                ));
            }
        }
        let entry = self.containers.create(from_request(request), image).await?;
        Ok(Response::new(api::CreateContainerResponse {
            id: entry.id.clone(),
            name: entry.record.name.clone(),
            warnings,
        }))
    }

    async fn start(
        &self,
        request: Request<api::StartContainerRequest>,
    ) -> Answer<api::StartContainerResponse> {
        let api::StartContainerRequest { id, window } = request.into_inner();
        self.containers.start(&id, window.map(from_window)).await?;
        Ok(Response::new(api::StartContainerResponse {}))
    }

    async fn stop(
        &self,
        request: Request<api::StopContainerRequest>,
    ) -> Answer<api::StopContainerResponse> {
        let api::StopContainerRequest {
            id,
            timeout_seconds,
        } = request.into_inner();
        let limit = timeout_seconds.map(|seconds| Duration::from_secs(seconds.into()));
        self.containers.stop(&id, limit).await?;
        Ok(Response::new(api::StopContainerResponse {}))
    }

    async fn kill(
        &self,
        request: Request<api::KillContainerRequest>,
    ) -> Answer<api::KillContainerResponse> {
        let api::KillContainerRequest { id, signal } = request.into_inner();
        let signal = match signal.as_str() {
            "" => libc::SIGKILL,
            name => parse_signal(name)?,
        };
        self.containers.kill(&id, signal).await?;
        Ok(Response::new(api::KillContainerResponse {}))
    }

    async fn wait(
        &self,
        request: Request<api::WaitContainerRequest>,
    ) -> Answer<api::WaitContainerResponse> {
        let state = self.containers.wait(&request.into_inner().id).await?;
        Ok(Response::new(api::WaitContainerResponse {
            exit_code: state.exit_code,
            oom_killed: state.oom_killed,
        }))
    }

    async fn remove(
        &self,
        request: Request<api::RemoveContainerRequest>,
    ) -> Answer<api::RemoveContainerResponse> {
        let api::RemoveContainerRequest { id, force } = request.into_inner();
        let id = self.containers.remove(&id, force).await?;
        Ok(Response::new(api::RemoveContainerResponse { id }))
    }

    async fn list(
        &self,
        request: Request<api::ListContainersRequest>,
    ) -> Answer<api::ListContainersResponse> {
        let all = request.into_inner().all;
        let containers = self.containers.list().await?.into_iter();
        let shown = containers
            .filter(|container| all || container.state.status == state::Status::Running)
            .map(into_message);
        Ok(Response::new(api::ListContainersResponse {
            containers: shown.collect(),
            unusable_records: self.containers.unusable() as u64,
        }))
    }

    async fn inspect(
        &self,
        request: Request<api::InspectContainerRequest>,
    ) -> Answer<api::InspectContainerResponse> {
        let container = self.containers.inspect(&request.into_inner().id).await?;
        let id = &container.id;
        let path = |path: std::path::PathBuf| path.to_string_lossy().into_owned();
        Ok(Response::new(api::InspectContainerResponse {
            spec_json: self.containers.spec_json(id).await?,
            bundle_dir: path(self.containers.bundle_dir(id)),
            log_path: path(self.containers.log_path(id)),
            container: Some(into_message(container)),
        }))
    }

    async fn logs(&self, request: Request<api::LogsRequest>) -> Answer<Self::LogsStream> {
        let api::LogsRequest { id, follow, tail } = request.into_inner();
        let mut log = self.containers.logs(&id, tail, follow).await?;
        let (to, events) = mpsc::channel(QUEUE);
        tokio::spawn(async move {
            loop {
                let next = tokio::select! {
                    next = log.next() => next,
                    () = to.closed() => return,
                };
                let event = match next {
                    Ok(Some(record)) => Ok(into_log(record)),
                    Ok(None) => return,
                    Err(error) => Err(error.into()),
                };
                let last = event.is_err();
                if to.send(event).await.is_err() || last {
                    return;
                }
            }
        });
        Ok(Response::new(ReceiverStream::new(events)))
    }

    async fn attach(
        &self,
        request: Request<Streaming<api::StdioRequest>>,
    ) -> Answer<Self::AttachStream> {
        let mut client = request.into_inner();
        let Some(api::stdio_request::Part::Attach(start)) = first(&mut client).await? else {
            return Err(Status::invalid_argument(
                "the first message of Attach must carry `attach`",
            ));
        };
        let (input, output) = self.containers.attach(&start.id, start.stdin).await?;
        Ok(Response::new(join(client, input, output)))
    }

    async fn exec(
        &self,
        request: Request<Streaming<api::StdioRequest>>,
    ) -> Answer<Self::ExecStream> {
        let mut client = request.into_inner();
        let Some(api::stdio_request::Part::Exec(start)) = first(&mut client).await? else {
            return Err(Status::invalid_argument(
                "the first message of Exec must carry `exec`",
            ));
        };
        let request = ExecRequest {
            args: start.args,
            env: start.env,
            working_dir: start.working_dir,
            user: start.user,
            tty: start.tty,
            stdin: start.stdin,
            window: start.window.map(from_window),
        };
        let (input, output) = self.containers.exec(&start.id, request).await?;
        Ok(Response::new(join(client, input, output)))
    }
}

async fn first(
    client: &mut Streaming<api::StdioRequest>,
) -> Result<Option<api::stdio_request::Part>, Status> {
    Ok(client.message().await?.and_then(|message| message.part))
}

/// Carries bytes both ways, each at the pace of its reader, until the process ends or the client goes.
fn join(
    client: Streaming<api::StdioRequest>,
    input: Input,
    mut output: Output,
) -> Events<api::StdioResponse> {
    use api::stdio_response::Part;

    let (to, events) = mpsc::channel(QUEUE);
    let (complain, mut complaints) = mpsc::channel(1);
    let bring = tokio::spawn(async move {
        if let Err(status) = bring_input(client, input).await {
            // The other direction may have ended; then nobody needs to know.
            let _ = complain.send(status).await;
        }
    });
    tokio::spawn(async move {
        let mut part = Part::Attached(true);
        loop {
            let last = matches!(part, Part::ExitCode(_));
            let response = api::StdioResponse { part: Some(part) };
            if to.send(Ok(response)).await.is_err() {
                // The client has gone, which the other direction sees for itself.
                return;
            }
            if last {
                break;
            }
            let next = tokio::select! {
                next = output.next() => next.map_err(Status::from),
                Some(status) = complaints.recv() => Err(status),
                () = to.closed() => return,
            };
            match next {
                Ok(Some(event)) => part = into_part(event),
                Ok(None) => break,
                Err(status) => {
                    // First, or the client's leaving would look like the end of its input.
                    bring.abort();
                    // It may have gone already.
                    let _ = to.send(Err(status)).await;
                    return;
                }
            }
        }
        bring.abort();
    });
    ReceiverStream::new(events)
}

async fn bring_input(
    mut client: Streaming<api::StdioRequest>,
    mut input: Input,
) -> Result<(), Status> {
    use api::stdio_request::Part;

    while let Ok(Some(message)) = client.message().await {
        let goes_on = match message.part {
            Some(Part::Stdin(data)) => input.send(&data).await?,
            Some(Part::CloseStdin(true)) => input.close().await?,
            Some(Part::CloseStdin(false)) => true,
            Some(Part::Resize(window)) => input.resize(from_window(window)).await?,
            Some(Part::Signal(name)) => input.signal(parse_signal(&name)?).await?,
            Some(Part::Attach(_) | Part::Exec(_)) | None => {
                return Err(Status::invalid_argument(
                    "only the first message of a stream says what it is for",
                ));
            }
        };
        if !goes_on {
            return Ok(());
        }
    }
    Ok(input.abandon().await?)
}

fn into_part(event: OutputEvent) -> api::stdio_response::Part {
    use api::stdio_response::Part;

    match event {
        OutputEvent::Exit(code) => Part::ExitCode(code),
        OutputEvent::Data(Record { stream, data, .. }) => match stream {
            Stream::Stdout => Part::Stdout(data),
            Stream::Stderr => Part::Stderr(data),
        },
    }
}

fn into_log(record: Record) -> api::LogsResponse {
    let stream = match record.stream {
        Stream::Stdout => api::logs_response::Stream::Stdout,
        Stream::Stderr => api::logs_response::Stream::Stderr,
    };
    api::LogsResponse {
        stream: stream.into(),
        data: record.data,
        time: Some(record.time.into()),
    }
}

fn into_message(container: Container) -> api::Container {
    let Container {
        id,
        record,
        state,
        root_unknown,
    } = container;
    let status = match state.status {
        state::Status::Created => api::ContainerStatus::Created,
        state::Status::Running => api::ContainerStatus::Running,
        state::Status::Stopped => api::ContainerStatus::Stopped,
    };
    api::Container {
        snapshot: id.clone(),
        id,
        name: record.name,
        image: record.image,
        image_id: record.image_id,
        status: status.into(),
        pid: state.pid,
        exit_code: state.exit_code,
        oom_killed: state.oom_killed,
        created: Some(record.created.into()),
        started: state.started.map(Into::into),
        finished: state.finished.map(Into::into),
        args: record.args,
        tty: record.tty,
        auto_remove: record.auto_remove,
        error: state.error,
        root_unknown,
    }
}

fn from_request(request: api::CreateContainerRequest) -> CreateRequest {
    let volumes = request.volumes.into_iter().map(|volume| VolumeRequest {
        source: volume.source,
        target: volume.target,
        read_only: volume.read_only,
    });
    CreateRequest {
        image: request.image,
        name: request.name,
        args: request.args,
        entrypoint: request.set_entrypoint.then_some(request.entrypoint),
        env: request.env,
        working_dir: request.working_dir,
        user: request.user,
        volumes: volumes.collect(),
        hostname: request.hostname,
        read_only: request.read_only,
        network: request.network,
        tty: request.tty,
        open_stdin: request.open_stdin,
        auto_remove: request.auto_remove,
        starts_next: request.starts_next,
    }
}

fn from_window(window: api::WindowSize) -> Window {
    let short = |value: u32| u16::try_from(value).unwrap_or(u16::MAX);
    Window {
        rows: short(window.rows),
        columns: short(window.columns),
    }
}

fn parse_signal(name: &str) -> Result<i32, Status> {
    signals::parse(name).ok_or_else(|| Status::invalid_argument(signals::unknown(name)))
}

impl From<Error> for Status {
    fn from(error: Error) -> Self {
        let text = error.to_string();
        let exit_code = error.exit_code();
        let mut status = match error {
            Error::Root(error) => error.into(),
            error => Self::new(code(&error), text),
        };
        if let Some(exit_code) = exit_code {
            let value = MetadataValue::from(exit_code);
            status.metadata_mut().insert(EXIT_CODE, value);
        }
        status
    }
}

fn code(error: &Error) -> Code {
    match error {
        Error::NotFound { .. } | Error::NotFoundInSound { .. } => Code::NotFound,
        Error::NameTaken { .. } => Code::AlreadyExists,
        Error::Ambiguous { .. } | Error::Invalid(_) => Code::InvalidArgument,
        Error::Running { .. }
        | Error::RemoveRunning { .. }
        | Error::NotRunning { .. }
        | Error::RootIsGone { .. }
        | Error::Start { .. }
        | Error::Exec { .. }
        | Error::Oci(_)
        | Error::NoShim { .. } => Code::FailedPrecondition,
        Error::WontEnd { .. } | Error::Shim(client::Error::Silent) => Code::DeadlineExceeded,
        Error::Removed { .. } => Code::Aborted,
        Error::Closing => Code::Unavailable,
        Error::Record(error) => record_code(error),
        Error::Io { source, .. } => io_code(source),
        Error::Root(_) | Error::Shim(_) | Error::Internal => Code::Internal,
    }
}
