//! What is left of a request that its client has given up.

use std::convert::Infallible;
use std::pin::pin;
use std::task::{Context, Poll};
use std::time::Duration;

use api::diff_server::Diff;
use tokio::net::UnixListener;
use tokio::sync::mpsc::{UnboundedReceiver, UnboundedSender, unbounded_channel};
use tokio_stream::wrappers::UnixListenerStream;
use tonic::body::Body;
use tonic::codegen::{BoxFuture, Service as TowerService, http};
use tonic::server::{Grpc, NamedService};
use tonic_prost::ProstCodec;
use tower::service_fn;

use super::*;
use crate::grpc::pb::containerd::services::leases::v1 as leases;
use crate::snapshotter::SnapshotterConfig;

/// Longer than anything here takes.
const PATIENCE: Duration = Duration::from_secs(30);
/// Digest of no bytes.
const NOTHING: &str = "sha256:e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855";

/// Leases or contents of a containerd that tells what it is asked and gives out leases, but does not answer anything of
/// contents.
#[derive(Clone)]
struct Containerd<const LEASES: bool>(UnboundedSender<String>);

impl NamedService for Containerd<true> {
    const NAME: &'static str = "containerd.services.leases.v1.Leases";
}

impl NamedService for Containerd<false> {
    const NAME: &'static str = "containerd.services.content.v1.Content";
}

impl<const LEASES: bool> TowerService<http::Request<Body>> for Containerd<LEASES> {
    type Response = http::Response<Body>;
    type Error = Infallible;
    type Future = BoxFuture<Self::Response, Infallible>;

    fn poll_ready(&mut self, _: &mut Context<'_>) -> Poll<Result<(), Infallible>> {
        Poll::Ready(Ok(()))
    }

    fn call(&mut self, request: http::Request<Body>) -> Self::Future {
        let asked = self.0.clone();
        let (_, what) = request.uri().path().rsplit_once('/').unwrap();
        let what = what.to_owned();
        Box::pin(async move {
            match what.as_str() {
                "Create" => {
                    let create = service_fn(move |request: Request<leases::CreateRequest>| {
                        let told = asked.send(format!("create {}", request.get_ref().id));
                        async move {
                            told.unwrap();
                            Ok::<_, Status>(Response::new(leases::CreateResponse::default()))
                        }
                    });
                    let mut server = Grpc::new(ProstCodec::default());
                    Ok(server.unary(create, request).await)
                }
                "Delete" => {
                    let delete = service_fn(move |request: Request<leases::DeleteRequest>| {
                        let told = asked.send(format!("delete {}", request.get_ref().id));
                        async move {
                            told.unwrap();
                            Ok::<_, Status>(Response::new(()))
                        }
                    });
                    let mut server = Grpc::new(ProstCodec::default());
                    Ok(server.unary(delete, request).await)
                }
                _ => {
                    asked.send(what).unwrap();
                    std::future::pending().await
                }
            }
        })
    }
}

/// Has a containerd listen at `socket`; answers what it is asked.
fn containerd(socket: &Path) -> UnboundedReceiver<String> {
    let (tell, asked) = unbounded_channel();
    let listener = UnixListenerStream::new(UnixListener::bind(socket).unwrap());
    let server = tonic::transport::Server::builder()
        .add_service(Containerd::<true>(tell.clone()))
        .add_service(Containerd::<false>(tell))
        .serve_with_incoming(listener);
    tokio::spawn(async { server.await.unwrap() });
    asked
}

/// Drops `request` once containerd is asked for `what`; answers what it was asked before.
async fn give_up<T: std::fmt::Debug>(
    request: impl Future<Output = T>,
    asked: &mut UnboundedReceiver<String>,
    what: &str,
) -> Vec<String> {
    let mut request = pin!(request);
    let mut before = Vec::new();
    loop {
        tokio::select! {
            answer = &mut request => panic!("it has ended with {answer:?}"),
            told = asked.recv() => match told.unwrap() {
                told if told == what => return before,
                told => before.push(told),
            }
        }
    }
}

/// A lease of a day was once left behind by each.
#[tokio::test]
async fn the_lease_of_a_diff_ends_with_the_request_that_wanted_it() {
    let tmp = tempfile::tempdir().unwrap();
    let socket = tmp.path().join("containerd.sock");
    let mut asked = containerd(&socket);
    let content = Content::new(socket);
    let caller = Caller::of_namespace("default").unwrap();
    let (pieces, blob) = mpsc::channel(PIECES);
    let (_tell, about) = oneshot::channel();
    let write = content.write(&caller, "layer", blob, about);
    let before = give_up(write, &mut asked, "Write").await;
    let [create] = &before[..] else {
        panic!("{before:?}");
    };
    let ended = tokio::time::timeout(PATIENCE, asked.recv()).await.unwrap();
    assert_eq!(ended.unwrap(), create.replace("create", "delete"));
    // Nor does anybody go on to make the layer.
    tokio::time::timeout(PATIENCE, pieces.closed())
        .await
        .unwrap();
}

#[tokio::test]
async fn an_import_ends_with_the_request_that_wanted_it() {
    let tmp = tempfile::tempdir().unwrap();
    let socket = tmp.path().join("containerd.sock");
    let mut asked = containerd(&socket);
    let (root, state) = (tmp.path().join("root"), tmp.path().join("state"));
    let config = SnapshotterConfig {
        index_prober: Some("/bin/true".into()),
        ..SnapshotterConfig::default()
    };
    let snapshotter = Arc::new(Snapshotter::open(&root, &state, config).unwrap());
    let key = "default/1/layer";
    let prepared = snapshotter.prepare(OWNER, key, None, Default::default());
    let prepared = prepared.unwrap();
    let place = state.join("mounts").join(prepared.id).join("root");
    let service = Service::new(Arc::clone(&snapshotter), Content::new(socket));
    let mount = types::Mount {
        source: place.to_str().unwrap().to_owned(),
        ..types::Mount::default()
    };
    // What comes of it is whole when nothing has come, so only who knows that nobody waits takes no layer.
    let apply = service.apply(Request::new(api::ApplyRequest {
        diff: Some(types::Descriptor {
            media_type: PLAIN_LAYER.to_owned(),
            digest: NOTHING.to_owned(),
            ..types::Descriptor::default()
        }),
        mounts: vec![mount],
        ..api::ApplyRequest::default()
    }));
    give_up(apply, &mut asked, "Read").await;
    // Waits for the thread, which has the snapshot locked.
    let snapshot = blocking(move || snapshotter.update_labels(OWNER, key, |_| ()))
        .await
        .unwrap();
    assert_eq!(snapshot.packed_layers, []);
}
