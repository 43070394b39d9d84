//! kill -9 of plyd in the middle of an Apply: it is done or nothing is left of it, and it can be repeated.

use std::convert::Infallible;
use std::fs;
use std::path::Path;
use std::process::Command;
use std::sync::Arc;
use std::task::{Context, Poll};
use std::time::{Duration, Instant};

use nix::sys::signal::Signal;
use plywood::grpc::pb::containerd::services::content::v1::{
    ReadContentRequest, ReadContentResponse,
};
use plywood::grpc::pb::containerd::services::diff::v1::ApplyRequest;
use plywood::grpc::pb::containerd::services::diff::v1::diff_client::DiffClient;
use plywood::grpc::pb::containerd::types::{Descriptor, Mount};
use tokio::net::UnixListener;
use tokio::sync::{mpsc, watch};
use tokio_stream::wrappers::{ReceiverStream, UnixListenerStream};
use tonic::body::Body;
use tonic::codegen::{BoxFuture, Service, http};
use tonic::server::{Grpc, NamedService};
use tonic::transport::Endpoint;
use tonic::{Code, Request, Response, Status};
use tonic_prost::ProstCodec;
use tower::service_fn;

use super::archive::{Layer, gzip, noise, sha256};
use super::client::{Snapshots, source};
use super::common::{PATIENCE, PLYD, Plyd};
use super::crash::{assert_tidy, names};

/// Of the layer's large file.
const LARGE: usize = 1 << 20;
const SMALL_FILES: u64 = 50;
/// Bytes of the blob in a message.
const PIECE: usize = 64 << 10;
/// So many have to be cut off once they have all of the blob, however fast the machine.
const ENOUGH: usize = 3;

fn blob() -> Vec<u8> {
    let mut layer = Layer::new().file("large", 0o644, &noise(1, LARGE));
    for number in 0..SMALL_FILES {
        layer = layer.file(&number.to_string(), 0o644, &noise(number, 5000));
    }
    gzip(&layer.tar())
}

fn assert_whole(root: &Path) {
    assert!(fs::read(root.join("large")).unwrap() == noise(1, LARGE));
    for number in 0..SMALL_FILES {
        assert!(fs::read(root.join(number.to_string())).unwrap() == noise(number, 5000));
    }
}

/// A content store that has one blob, and gives out as many bytes of it as it is let.
#[derive(Clone)]
struct Store {
    blob: Arc<Vec<u8>>,
    most: watch::Receiver<usize>,
    /// How many it has given out.
    given: watch::Sender<usize>,
}

impl NamedService for Store {
    const NAME: &'static str = "containerd.services.content.v1.Content";
}

impl Store {
    fn read(self) -> ReceiverStream<Result<ReadContentResponse, Status>> {
        let (pieces, answer) = mpsc::channel(1);
        let Self {
            blob,
            mut most,
            given,
        } = self;
        tokio::spawn(async move {
            for start in (0..blob.len()).step_by(PIECE) {
                let end = blob.len().min(start + PIECE);
                if most.wait_for(|most| *most >= end).await.is_err() {
                    return;
                }
                let piece = ReadContentResponse {
                    offset: i64::try_from(start).unwrap(),
                    data: blob[start..end].to_vec(),
                };
                if pieces.send(Ok(piece)).await.is_err() {
                    return;
                }
                given.send_replace(end);
            }
        });
        ReceiverStream::new(answer)
    }
}

impl Service<http::Request<Body>> for Store {
    type Response = http::Response<Body>;
    type Error = Infallible;
    type Future = BoxFuture<Self::Response, Infallible>;

    fn poll_ready(&mut self, _: &mut Context<'_>) -> Poll<Result<(), Infallible>> {
        Poll::Ready(Ok(()))
    }

    fn call(&mut self, request: http::Request<Body>) -> Self::Future {
        let store = self.clone();
        Box::pin(async move {
            assert!(request.uri().path().ends_with("/Read"));
            let read = service_fn(move |_: Request<ReadContentRequest>| {
                let answer = Response::new(store.clone().read());
                std::future::ready(Ok::<_, Status>(answer))
            });
            let mut server = Grpc::new(ProstCodec::default());
            Ok(server.server_streaming(read, request).await)
        })
    }
}

/// plyd, and a content store for it that has the blob.
struct Fixture {
    plyd: Plyd,
    runtime: tokio::runtime::Runtime,
    blob: Arc<Vec<u8>>,
    most: watch::Sender<usize>,
    given: watch::Sender<usize>,
    dir: tempfile::TempDir,
}

impl Fixture {
    fn new() -> Self {
        let dir = tempfile::tempdir().unwrap();
        let socket = dir.path().join("containerd.sock");
        let runtime = tokio::runtime::Builder::new_multi_thread()
            .worker_threads(1)
            .enable_all()
            .build()
            .unwrap();
        let blob = Arc::new(blob());
        let (most, let_through) = watch::channel(0);
        let (given, _) = watch::channel(0);
        let store = Store {
            blob: Arc::clone(&blob),
            most: let_through,
            given: given.clone(),
        };
        let listener = runtime.block_on(async { UnixListener::bind(&socket) });
        let listener = UnixListenerStream::new(listener.unwrap());
        let server = tonic::transport::Server::builder()
            .add_service(store)
            .serve_with_incoming(listener);
        runtime.spawn(async { server.await.unwrap() });
        // Which finds it in the configuration each time it is started.
        let config = dir.path().join("config.toml");
        let address = format!("containerd_address = \"unix://{}\"\n", socket.display());
        fs::write(&config, address).unwrap();
        let mut command = Command::new(PLYD);
        command.arg("--config").arg(&config);
        Self {
            plyd: Plyd::start_with(command),
            runtime,
            blob,
            most,
            given,
            dir,
        }
    }

    /// Starts plyd again.
    fn launch(&mut self) -> Snapshots {
        let mut command = Command::new(PLYD);
        command
            .arg("--config")
            .arg(self.dir.path().join("config.toml"));
        self.plyd.launch_with(command);
        Snapshots::of(&self.plyd)
    }

    /// Asks for an Apply, and does not wait for it.
    fn apply(&self, mounts: Vec<Mount>) -> tokio::task::JoinHandle<Result<(), Status>> {
        let address = self.plyd.address();
        let descriptor = Descriptor {
            media_type: "application/vnd.oci.image.layer.v1.tar+gzip".to_owned(),
            digest: sha256(&self.blob),
            size: i64::try_from(self.blob.len()).unwrap(),
            ..Descriptor::default()
        };
        self.runtime.spawn(async move {
            let channel = Endpoint::from_shared(address).unwrap().connect().await;
            let request = ApplyRequest {
                diff: Some(descriptor),
                mounts,
                ..ApplyRequest::default()
            };
            let applied = DiffClient::new(channel.unwrap()).apply(request).await;
            applied.map(drop)
        })
    }
}

/// When plyd dies: it was given that part of the blob, in hundredths, so long ago.
fn moments() -> impl Iterator<Item = (usize, Duration)> {
    let within = [0, 1, 50, 99].map(|part| (part, 10));
    let behind = (0..).map(|round| (100, 15 * (round % 20)));
    let all = within.into_iter().chain(behind);
    all.map(|(part, delay)| (part, Duration::from_millis(delay)))
}

#[test]
fn an_apply_whose_plyd_is_killed_is_done_or_leaves_nothing_and_can_be_repeated() {
    let mut fixture = Fixture::new();
    let mut snapshots = Snapshots::of(&fixture.plyd);
    let bytes = fixture.blob.len();
    let deadline = Instant::now() + PATIENCE;
    let mut late = 0;
    for (part, delay) in moments() {
        assert!(Instant::now() < deadline, "{late} were cut off late");
        fixture.most.send_replace(bytes * part / 100);
        fixture.given.send_replace(0);
        let apply = fixture.apply(snapshots.prepare("default/work", "").unwrap());
        if part == 100 {
            let mut given = fixture.given.subscribe();
            let all = given.wait_for(|given| *given == bytes);
            let waited = async { tokio::time::timeout(PATIENCE, all).await.map(drop) };
            fixture.runtime.block_on(waited).unwrap();
        }
        std::thread::sleep(delay);
        fixture.plyd.signal(Signal::SIGKILL);
        let acknowledged = fixture.runtime.block_on(apply).unwrap().is_ok();
        fixture.most.send_replace(bytes);
        late += usize::from(part == 100 && !acknowledged);

        snapshots = fixture.launch();
        assert_eq!(snapshots.names(), ["default/work"]);
        let root = fixture.plyd.root();
        let layers = names(&root.join("store/records"));
        if part < 100 {
            assert!(layers.is_empty(), "{layers:?}");
        }
        fixture.plyd.ok(["system", "verify", "--deep"]);
        fixture.plyd.ok(["system", "gc"]);
        let dead = fixture
            .plyd
            .ok(["system", "gc", "--dry-run", "--explain", "--quiet"]);
        assert_eq!(dead, "");
        if layers.is_empty() {
            for dir in ["packs", "layers", "tmp"] {
                assert_eq!(names(&root.join("store").join(dir)).len(), 0, "{dir}");
            }
        }

        let mounts = snapshots.mounts("default/work").unwrap();
        let again = fixture.apply(mounts);
        match fixture.runtime.block_on(again).unwrap() {
            Ok(()) => assert!(!acknowledged && layers.is_empty(), "{layers:?}"),
            // It was done before; whoever asks once more is told to look for himself.
            Err(status) => {
                assert_eq!(status.code(), Code::Unimplemented, "{status}");
                assert_eq!(layers.len(), 1);
            }
        }
        snapshots.commit("default/layer", "default/work").unwrap();
        assert_whole(&source(
            &snapshots.view("default/look", "default/layer").unwrap(),
        ));
        for key in ["default/look", "default/layer"] {
            snapshots.remove(key).unwrap();
        }
        assert_tidy(&fixture.plyd, &snapshots, 0);
        // From when it has all of the blob to the answer.
        if late >= ENOUGH && acknowledged {
            break;
        }
    }
    assert!(!fixture.plyd.log().contains("panicked"));
}
