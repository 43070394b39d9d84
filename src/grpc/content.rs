//! containerd's content store, read and written through its API.

use std::collections::HashMap;
use std::io::{self, Read, Write};
use std::path::PathBuf;
use std::time::{Duration, SystemTime};

use hyper_util::rt::TokioIo;
use prost::bytes::Bytes;
use tokio::net::UnixStream;
use tokio::sync::{mpsc, oneshot};
use tokio_stream::wrappers::ReceiverStream;
use tonic::metadata::{Ascii, MetadataMap, MetadataValue};
use tonic::transport::{Channel, Endpoint};
use tonic::{Code, Request, Status};
use tower::service_fn;

use super::pb::containerd::services::content::v1 as api;
use super::pb::containerd::services::leases::v1 as leases;
use super::pieces::Pieces;
use super::server::LARGEST_MESSAGE;
use super::status::joined;
use api::content_client::ContentClient;
use leases::leases_client::LeasesClient;

/// Pieces of a blob between the connection and whoever reads it; containerd's are of up to 4 MiB.
pub(super) const PIECES: usize = 4;
/// Bytes in a piece of a blob that is written.
const PIECE: usize = 1 << 20;
/// Headers that say for whom containerd works.
const NAMESPACE: &str = "containerd-namespace";
const LEASE: &str = "containerd-lease";
/// The label of a lease that says when it ends by itself.
const EXPIRE: &str = "containerd.io/gc.expire";
/// How long a lease of ours lasts at most while a blob is written: a layer may be large and the disk slow. What plyd leaves
/// behind when it is killed ends with it.
const WRITE_TIME: Duration = Duration::from_secs(24 * 3600);
/// How long the caller has to name a blob that was written for it.
const LEASE_TIME: Duration = Duration::from_secs(600);

/// containerd's socket. Connected to when it is needed.
#[derive(Clone, Debug)]
pub(super) struct Content {
    socket: PathBuf,
}

/// For whom a request of containerd is.
#[derive(Clone, Debug)]
pub(super) struct Caller {
    namespace: MetadataValue<Ascii>,
    lease: Option<MetadataValue<Ascii>>,
}

impl Caller {
    /// As the headers say. Some releases of containerd send none; then the namespace is the part before the first slash of
    /// a snapshot's key.
    pub(super) fn new(headers: &MetadataMap, key: &str) -> Result<Self, Status> {
        let of_key = || {
            let (namespace, _) = key.split_once('/')?;
            namespace.parse().ok()
        };
        let namespace = headers.get(NAMESPACE).cloned().or_else(of_key);
        let namespace = namespace.ok_or_else(|| {
            Status::failed_precondition(
                "the request names no namespace; send the header containerd-namespace",
            )
        })?;
        Ok(Self {
            namespace,
            lease: headers.get(LEASE).cloned(),
        })
    }

    /// For a namespace, as whoever looks after it.
    pub(super) fn of_namespace(namespace: &str) -> Option<Self> {
        Some(Self {
            namespace: namespace.parse().ok()?,
            lease: None,
        })
    }

    fn request<T>(&self, message: T) -> Request<T> {
        let mut request = Request::new(message);
        let headers = request.metadata_mut();
        headers.insert(NAMESPACE, self.namespace.clone());
        if let Some(lease) = &self.lease {
            headers.insert(LEASE, lease.clone());
        }
        request
    }
}

impl Content {
    pub(super) fn new(socket: PathBuf) -> Self {
        Self { socket }
    }

    async fn connect(&self) -> Result<Channel, Status> {
        let path = self.socket.clone();
        let connector = service_fn(move |_| {
            let path = path.clone();
            async move { UnixStream::connect(path).await.map(TokioIo::new) }
        });
        // The address has no meaning beside the connector.
        Endpoint::from_static("http://containerd")
            .connect_with_connector(connector)
            .await
            .map_err(|error| {
                Status::unavailable(format!(
                    "cannot reach containerd at {}, whose content store has the layer: {}; name its socket in plyd's configuration (`containerd_address`) and start plyd again",
                    self.socket.display(),
                    root_cause(&error),
                ))
            })
    }

    fn client(channel: Channel) -> ContentClient<Channel> {
        ContentClient::new(channel)
            .max_decoding_message_size(LARGEST_MESSAGE)
            .max_encoding_message_size(LARGEST_MESSAGE)
    }

    /// A lease that keeps containerd's collector from what is written under it, and ends by itself.
    async fn lease(
        caller: &Caller,
        channel: Channel,
        time: Duration,
    ) -> Result<MetadataValue<Ascii>, Status> {
        let id = format!("plywood-diff-{:032x}", rand::random::<u128>());
        let end = prost_types::Timestamp::from(SystemTime::now() + time);
        let create = caller.request(leases::CreateRequest {
            id: id.clone(),
            labels: HashMap::from([(EXPIRE.to_owned(), end.to_string())]),
        });
        LeasesClient::new(channel).create(create).await?;
        id.parse()
            .map_err(|_| Status::internal("the name of a lease is no header"))
    }

    /// Gives a blob that was written under a lease of ours to one that ends soon.
    async fn keep_for_a_while(
        caller: &Caller,
        channel: Channel,
        digest: String,
    ) -> Result<(), Status> {
        let lease = Self::lease(caller, channel.clone(), LEASE_TIME).await?;
        let add = caller.request(leases::AddResourceRequest {
            id: lease.to_str().unwrap_or_default().to_owned(),
            resource: Some(leases::Resource {
                id: digest,
                r#type: "content".to_owned(),
            }),
        });
        LeasesClient::new(channel).add_resource(add).await.map(drop)
    }

    /// Ends a lease of ours.
    async fn end_lease(caller: &Caller, channel: Channel, lease: &MetadataValue<Ascii>) {
        let delete = caller.request(leases::DeleteRequest {
            id: lease.to_str().unwrap_or_default().to_owned(),
            sync: false,
        });
        if let Err(status) = LeasesClient::new(channel).delete(delete).await {
            tracing::warn!(
                problem = status.message(),
                "a lease of containerd stays until it ends by itself"
            );
        }
    }

    /// Digests of all blobs of a namespace, and their bytes.
    pub(super) async fn list(&self, caller: &Caller) -> Result<Vec<(String, u64)>, Status> {
        let request = caller.request(api::ListContentRequest {
            filters: Vec::new(),
        });
        let channel = self.connect().await?;
        let mut answers = Self::client(channel).list(request).await?.into_inner();
        let mut blobs = Vec::new();
        while let Some(answer) = answers.message().await? {
            let found = answer.info.into_iter();
            blobs.extend(found.map(|info| (info.digest, info.size.cast_unsigned())));
        }
        Ok(blobs)
    }

    /// Sends a blob, piece by piece, from when its first piece is wanted and for as long as somebody reads it.
    pub(super) async fn read(
        &self,
        caller: &Caller,
        digest: &str,
        source: Source,
    ) -> Result<(), Status> {
        if source.wanted.await.is_err() {
            return Ok(());
        }
        let sent = self.read_into(caller, digest, &source.pieces).await;
        if let Err(status) = &sent {
            let problem = io::Error::other(status.message());
            // Whoever does not read any more knows of a reason of its own.
            let _ = source.pieces.send(Err(problem)).await;
        }
        sent
    }

    /// Writes a blob, piece by piece as it comes, and makes it known once `blob` has ended and `about` says what it is. A
    /// blob that is there already gets the labels.
    pub(super) async fn write(
        &self,
        caller: &Caller,
        reference: &str,
        blob: mpsc::Receiver<Bytes>,
        about: oneshot::Receiver<About>,
    ) -> Result<(), Status> {
        let channel = self.connect().await?;
        if caller.lease.is_some() {
            return Self::write_leased(caller, reference, blob, about, channel)
                .await
                .map(drop);
        }
        // Some releases do not say under which lease they ask, and nothing names the blob yet. The lease has to end when this
        // future is dropped, too, so it is another task's.
        let (_waiting, given_up) = oneshot::channel::<()>();
        let (caller, reference) = (caller.clone(), reference.to_owned());
        joined(tokio::spawn(async move {
            let lease = Self::lease(&caller, channel.clone(), WRITE_TIME).await?;
            let leased = Caller {
                lease: Some(lease.clone()),
                ..caller.clone()
            };
            let write = async {
                let channel = channel.clone();
                match Self::write_leased(&leased, &reference, blob, about, channel.clone()).await {
                    Ok(Some(digest)) => Self::keep_for_a_while(&caller, channel, digest).await,
                    written => written.map(drop),
                }
            };
            let kept = tokio::select! {
                kept = write => kept,
                _ = given_up => Err(Status::cancelled("nobody waits for the layer any more")),
            };
            Self::end_lease(&caller, channel, &lease).await;
            kept
        }))
        .await
    }

    /// Answers the digest of what was written; `None` if the blob has not come to its end.
    async fn write_leased(
        caller: &Caller,
        reference: &str,
        mut blob: mpsc::Receiver<Bytes>,
        about: oneshot::Receiver<About>,
        channel: Channel,
    ) -> Result<Option<String>, Status> {
        let mut client = Self::client(channel);
        let (requests, outgoing) = mpsc::channel(1);
        let begin = api::WriteContentRequest {
            action: api::WriteAction::Stat.into(),
            r#ref: reference.to_owned(),
            ..api::WriteContentRequest::default()
        };
        let gone = |_| Status::unavailable("containerd has closed the connection");
        requests.send(begin).await.map_err(gone)?;
        let outgoing = caller.request(ReceiverStream::new(outgoing));
        let mut answers = client.write(outgoing).await?.into_inner();
        let ended_early =
            || Status::unavailable("containerd has ended the writing of the layer early");
        answers.message().await?.ok_or_else(ended_early)?;
        let mut offset = 0;
        while let Some(piece) = blob.recv().await {
            let count = i64::try_from(piece.len()).unwrap_or(i64::MAX);
            let write = api::WriteContentRequest {
                action: api::WriteAction::Write.into(),
                offset,
                data: piece.into(),
                ..api::WriteContentRequest::default()
            };
            requests.send(write).await.map_err(gone)?;
            answers.message().await?.ok_or_else(ended_early)?;
            offset += count;
        }
        // Without a word of what it is the blob has not come to its end; then nothing of it is kept.
        let Ok(About { digest, labels }) = about.await else {
            drop(requests);
            // containerd takes nothing away that it still writes to, and ends its answers when it has closed it.
            while let Ok(Some(_)) = answers.message().await {}
            let abort = caller.request(api::AbortRequest {
                r#ref: reference.to_owned(),
            });
            // Whoever made the blob says why it has no end.
            if let Err(status) = client.abort(abort).await {
                tracing::warn!(
                    reference,
                    problem = status.message(),
                    "containerd keeps what was written of a layer that failed"
                );
            }
            return Ok(None);
        };
        let commit = api::WriteContentRequest {
            action: api::WriteAction::Commit.into(),
            offset,
            total: offset,
            expected: digest.clone(),
            labels: labels.clone(),
            ..api::WriteContentRequest::default()
        };
        requests.send(commit).await.map_err(gone)?;
        match answers.message().await {
            Err(status) if status.code() == Code::AlreadyExists => {
                let paths = labels.keys().map(|key| format!("labels.{key}"));
                let update = caller.request(api::UpdateRequest {
                    update_mask: Some(prost_types::FieldMask {
                        paths: paths.collect(),
                    }),
                    info: Some(api::Info {
                        digest: digest.clone(),
                        labels,
                        ..api::Info::default()
                    }),
                });
                client.update(update).await?;
            }
            Err(status) => return Err(status),
            Ok(answer) => drop(answer.ok_or_else(ended_early)?),
        }
        Ok(Some(digest))
    }

    async fn read_into(
        &self,
        caller: &Caller,
        digest: &str,
        out: &mpsc::Sender<io::Result<Bytes>>,
    ) -> Result<(), Status> {
        let request = caller.request(api::ReadContentRequest {
            digest: digest.to_owned(),
            offset: 0,
            size: 0,
        });
        let mut pieces = Self::client(self.connect().await?)
            .read(request)
            .await?
            .into_inner();
        while let Some(piece) = pieces.message().await? {
            if out.send(Ok(piece.data.into())).await.is_err() {
                break;
            }
        }
        Ok(())
    }
}

/// What a blob turned out to be.
#[derive(Debug)]
pub(super) struct About {
    pub(super) digest: String,
    pub(super) labels: HashMap<String, String>,
}

fn root_cause(error: &dyn std::error::Error) -> String {
    let mut error = error;
    while let Some(source) = error.source() {
        error = source;
    }
    error.to_string()
}

/// Two ends of a blob: one for [`Content::read`], one for a thread that may block.
pub(super) fn pipe() -> (Source, Blob) {
    let (sender, receiver) = mpsc::channel(PIECES);
    let (want, wanted) = oneshot::channel();
    let source = Source {
        pieces: sender,
        wanted,
    };
    let blob = Blob {
        want: Some(want),
        pieces: receiver,
        piece: Bytes::new(),
    };
    (source, blob)
}

/// Where the pieces of a blob come in.
#[derive(Debug)]
pub(super) struct Source {
    pieces: mpsc::Sender<io::Result<Bytes>>,
    /// Told when the first piece is wanted.
    wanted: oneshot::Receiver<()>,
}

/// A blob that comes piece by piece. Only for threads that may block.
#[derive(Debug)]
pub(super) struct Blob {
    want: Option<oneshot::Sender<()>>,
    pieces: mpsc::Receiver<io::Result<Bytes>>,
    piece: Bytes,
}

impl Read for Blob {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        if let Some(want) = self.want.take() {
            // Nobody listens when the request has been given up; then no piece comes.
            let _ = want.send(());
        }
        while self.piece.is_empty() {
            match self.pieces.blocking_recv() {
                Some(piece) => self.piece = piece?,
                None => return Ok(0),
            }
        }
        let count = buffer.len().min(self.piece.len());
        buffer[..count].copy_from_slice(&self.piece.split_to(count));
        Ok(count)
    }
}

/// Sends a blob piece by piece, for [`Content::write`]. Only for threads that may block.
pub(super) fn pieces(out: mpsc::Sender<Bytes>) -> impl Write {
    Pieces::new(PIECE, move |piece| {
        out.blocking_send(piece.into())
            .map_err(|_| io::Error::other("containerd's content store takes no more of it"))
    })
}
