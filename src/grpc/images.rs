//! `plywood.v1.Images`: the images that plyd itself keeps.

use std::io::{self, Read};
use std::sync::Arc;
use std::time::{Duration, Instant};

use parking_lot::Mutex;
use tokio::sync::mpsc;
use tokio_stream::wrappers::ReceiverStream;
use tonic::{Code, Request, Response, Status, Streaming};

use super::pb::plywood as api;
use super::status::{blocking, io_code, record_code};
use crate::image::{self, Image, ImageStore, Observer, Phase, Progress};
use crate::runtime::containers::Containers;

/// Messages of an archive that wait for the reader: what is sent faster is held back by HTTP/2.
const MESSAGES_WAITING: usize = 8;
/// Answers that wait for the client; progress that finds no room is left out.
const ANSWERS_WAITING: usize = 32;
/// Time between two messages about the same blob.
const PROGRESS_INTERVAL: Duration = Duration::from_millis(100);

/// The service.
pub(super) struct Service {
    images: Arc<ImageStore>,
    containers: Containers,
}

impl Service {
    pub(super) fn new(images: Arc<ImageStore>, containers: Containers) -> Self {
        Self { images, containers }
    }
}

#[tonic::async_trait]
impl api::images_server::Images for Service {
    type LoadStream = ReceiverStream<Result<api::LoadResponse, Status>>;

    async fn load(
        &self,
        request: Request<Streaming<api::LoadRequest>>,
    ) -> Result<Response<Self::LoadStream>, Status> {
        let mut messages = request.into_inner();
        let Some(api::load_request::Part::Start(start)) =
            messages.message().await?.and_then(|message| message.part)
        else {
            return Err(Status::invalid_argument(
                "the first message of Load must carry `start`",
            ));
        };
        let archive = Archive::receive(messages, |message| match message.part {
            Some(api::load_request::Part::Data(part)) => Some(part),
            _ => None,
        });
        let (answers, answered) = mpsc::channel(ANSWERS_WAITING);
        let images = Arc::clone(&self.images);
        tokio::task::spawn_blocking(move || load(&images, &start, archive, &answers));
        Ok(Response::new(ReceiverStream::new(answered)))
    }

    async fn list(
        &self,
        _request: Request<api::ListImagesRequest>,
    ) -> Result<Response<api::ListImagesResponse>, Status> {
        let store = Arc::clone(&self.images);
        let listed = move || Ok::<_, Status>((store.list()?, store.unusable()));
        let (images, unusable) = blocking(listed).await?;
        Ok(Response::new(api::ListImagesResponse {
            images: images.into_iter().map(into_message).collect(),
            unusable_records: unusable as u64,
        }))
    }

    async fn inspect(
        &self,
        request: Request<api::InspectImageRequest>,
    ) -> Result<Response<api::InspectImageResponse>, Status> {
        let reference = request.into_inner().r#ref;
        let store = Arc::clone(&self.images);
        let details = blocking(move || store.inspect(&reference)).await?;
        Ok(Response::new(api::InspectImageResponse {
            image: Some(into_message(details.image)),
            config_json: details.config_json.into_bytes(),
            manifest_json: details.manifest_json.into_bytes(),
        }))
    }

    async fn remove(
        &self,
        request: Request<api::RemoveImageRequest>,
    ) -> Result<Response<api::RemoveImageResponse>, Status> {
        let api::RemoveImageRequest { r#ref, force } = request.into_inner();
        let store = Arc::clone(&self.images);
        let containers = self.containers.clone();
        let removed = blocking(move || {
            let users_of = |image: &Image| containers.users_of_image(&image.id);
            store.remove(&r#ref, force, &users_of).map_err(Status::from)
        })
        .await?;
        Ok(Response::new(api::RemoveImageResponse {
            untagged: removed.untagged,
            removed: removed.removed,
        }))
    }
}

/// Hands the archive's bytes on, and how the stream ended: one that broke off must not look complete.
async fn forward<M>(
    mut messages: Streaming<M>,
    part_of: fn(M) -> Option<Vec<u8>>,
    data: mpsc::Sender<io::Result<Vec<u8>>>,
) {
    loop {
        let part = match messages.message().await {
            Ok(None) => return,
            Ok(Some(message)) => part_of(message)
                .ok_or_else(|| io::Error::other("every message but the first must carry `data`")),
            Err(status) => Err(io::Error::other(status.message().to_owned())),
        };
        let last = part.is_err();
        // The reader has gone: it has answered why.
        if data.send(part).await.is_err() || last {
            return;
        }
    }
}

fn load(
    images: &ImageStore,
    start: &api::LoadStart,
    mut archive: Archive,
    answers: &mpsc::Sender<Result<api::LoadResponse, Status>>,
) {
    let client = Client {
        answers,
        last: Mutex::new(None),
    };
    let name = (!start.name.is_empty()).then_some(start.name.as_str());
    // A client that has gone does not hear the answer; nobody else is waiting for it.
    match images.load(&mut archive, name, start.total, &client) {
        Ok(loaded) => {
            for image::Loaded { image, given } in loaded {
                let part = Some(api::load_response::Part::Loaded(into_message(image)));
                let _ = answers.blocking_send(Ok(api::LoadResponse { part, given }));
            }
        }
        Err(error) => {
            let _ = answers.blocking_send(Err(error.into()));
        }
    }
}

/// The client's messages as a stream of bytes. Only for threads that may block.
pub(super) struct Archive {
    received: mpsc::Receiver<io::Result<Vec<u8>>>,
    part: Vec<u8>,
    at: usize,
}

impl Archive {
    /// Begins to take in messages, of each of which `part_of` is the bytes.
    pub(super) fn receive<M: Send + 'static>(
        messages: Streaming<M>,
        part_of: fn(M) -> Option<Vec<u8>>,
    ) -> Self {
        let (data, received) = mpsc::channel(MESSAGES_WAITING);
        tokio::spawn(forward(messages, part_of, data));
        Self {
            received,
            part: Vec::new(),
            at: 0,
        }
    }
}

impl Read for Archive {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        while self.at == self.part.len() {
            match self.received.blocking_recv() {
                Some(part) => self.part = part?,
                None => return Ok(0),
            }
            self.at = 0;
        }
        let count = (&self.part[self.at..]).read(buffer)?;
        self.at += count;
        Ok(count)
    }
}

/// Whoever called Load.
struct Client<'a> {
    answers: &'a mpsc::Sender<Result<api::LoadResponse, Status>>,
    last: Mutex<Option<(Instant, Phase, String)>>,
}

impl Observer for Client<'_> {
    fn progress(&self, progress: Progress) {
        let mut last = self.last.lock();
        let same = last
            .as_ref()
            .filter(|(_, phase, digest)| *phase == progress.phase && *digest == progress.digest);
        if same.is_some_and(|(when, ..)| when.elapsed() < PROGRESS_INTERVAL) {
            return;
        }
        *last = Some((Instant::now(), progress.phase, progress.digest.clone()));
        let part = api::load_response::Part::Progress(progress_message(progress));
        // No room, or nobody there: either way the next one will do.
        let _ = self.answers.try_send(Ok(api::LoadResponse {
            part: Some(part),
            given: Vec::new(),
        }));
    }

    fn cancelled(&self) -> bool {
        self.answers.is_closed()
    }
}

/// How far something is, as a message.
pub(super) fn progress_message(progress: Progress) -> api::LoadProgress {
    let phase = match progress.phase {
        Phase::Reading => "reading",
        Phase::Unpacking => "unpacking",
        Phase::Exists => "exists",
        Phase::Restoring => "restoring",
        Phase::Searching => "searching",
    };
    api::LoadProgress {
        phase: phase.to_owned(),
        digest: progress.digest,
        done: progress.done,
        total: progress.total,
    }
}

fn into_message(image: Image) -> api::Image {
    api::Image {
        id: image.id,
        names: image.names,
        manifest_digest: image.manifest_digest,
        diff_ids: image.diff_ids,
        chain_id: image.chain_id,
        architecture: image.architecture,
        os: image.os,
        created: image.created.map(Into::into),
        size: image.size,
    }
}

impl From<image::Error> for Status {
    fn from(error: image::Error) -> Self {
        use image::Error;
        let message = error.to_string();
        let code = match error {
            Error::NotFound { .. } | Error::NotFoundInSound { .. } | Error::ShortPrefix { .. } => {
                Code::NotFound
            }
            Error::Ambiguous { .. }
            | Error::BadName { .. }
            | Error::Archive { .. }
            | Error::NoArchive { .. }
            | Error::Layer { .. }
            | Error::Input(_) => Code::InvalidArgument,
            Error::InUse { .. } => Code::FailedPrecondition,
            Error::Cancelled => Code::Cancelled,
            Error::Io { source, .. } => io_code(&source),
            Error::Union { source, .. } => io_code(&io::Error::from_raw_os_error(source.errno)),
            Error::Open(_) => Code::Internal,
            Error::Snapshot(error) => Self::from(error).code(),
            Error::Record(error) => record_code(&error),
        };
        Self::new(code, message)
    }
}
