//! containerd's content store, read and written through its API.

use std::io::{self, Read};
use std::path::PathBuf;

use hyper_util::rt::TokioIo;
use prost::bytes::Bytes;
use tokio::net::UnixStream;
use tokio::sync::{mpsc, oneshot};
use tonic::metadata::{Ascii, MetadataMap, MetadataValue};
use tonic::transport::{Channel, Endpoint};
use tonic::{Request, Status};
use tower::service_fn;

use super::pb::containerd::services::content::v1 as api;
use super::server::LARGEST_MESSAGE;

/// Pieces of a blob between the connection and whoever reads it; containerd's are of up to 4 MiB.
const PIECES: usize = 4;
/// Headers that say for whom containerd works.
const NAMESPACE: &str = "containerd-namespace";
const LEASE: &str = "containerd-lease";

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

    async fn client(&self) -> Result<api::content_client::ContentClient<Channel>, Status> {
        let path = self.socket.clone();
        let connector = service_fn(move |_| {
            let path = path.clone();
            async move { UnixStream::connect(path).await.map(TokioIo::new) }
        });
        // The address has no meaning beside the connector.
        let channel = Endpoint::from_static("http://containerd")
            .connect_with_connector(connector)
            .await
            .map_err(|error| {
                Status::unavailable(format!(
                    "cannot reach containerd at {}, whose content store has the layer: {}; name its socket with --containerd-address",
                    self.socket.display(),
                    root_cause(&error),
                ))
            })?;
        Ok(api::content_client::ContentClient::new(channel)
            .max_decoding_message_size(LARGEST_MESSAGE)
            .max_encoding_message_size(LARGEST_MESSAGE))
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
        let mut pieces = self.client().await?.read(request).await?.into_inner();
        while let Some(piece) = pieces.message().await? {
            if out.send(Ok(piece.data.into())).await.is_err() {
                break;
            }
        }
        Ok(())
    }
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
