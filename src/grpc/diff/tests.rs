//! What is left of a request that its client has given up, or that failed, and what Diff compares.

use std::convert::Infallible;
use std::os::unix::fs::FileExt;
use std::pin::pin;
use std::task::{Context, Poll};
use std::time::Duration;

use api::diff_server::Diff;
use parking_lot::Mutex;
use tokio::net::UnixListener;
use tokio::sync::mpsc::{UnboundedReceiver, UnboundedSender, unbounded_channel};
use tokio_stream::wrappers::{ReceiverStream, UnixListenerStream};
use tonic::Streaming;
use tonic::body::Body;
use tonic::codegen::{BoxFuture, Service as TowerService, http};
use tonic::server::{Grpc, NamedService};
use tonic_prost::ProstCodec;
use tower::service_fn;

use super::*;
use crate::cow::{self, NodeId, Union};
use crate::grpc::pb::containerd::services::content::v1 as contents;
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

/// A content store that takes what is written, has it in `Written`, and tells what it does. It can abort nothing.
#[derive(Clone)]
struct Store(UnboundedSender<String>, Written);

type Written = Arc<Mutex<Vec<u8>>>;

impl NamedService for Containerd<true> {
    const NAME: &'static str = "containerd.services.leases.v1.Leases";
}

impl NamedService for Containerd<false> {
    const NAME: &'static str = "containerd.services.content.v1.Content";
}

impl NamedService for Store {
    const NAME: &'static str = Containerd::<false>::NAME;
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
                "AddResource" => {
                    let add = service_fn(|_: Request<leases::AddResourceRequest>| {
                        std::future::ready(Ok::<_, Status>(Response::new(())))
                    });
                    let mut server = Grpc::new(ProstCodec::default());
                    Ok(server.unary(add, request).await)
                }
                _ => {
                    asked.send(what).unwrap();
                    std::future::pending().await
                }
            }
        })
    }
}

impl TowerService<http::Request<Body>> for Store {
    type Response = http::Response<Body>;
    type Error = Infallible;
    type Future = BoxFuture<Self::Response, Infallible>;

    fn poll_ready(&mut self, _: &mut Context<'_>) -> Poll<Result<(), Infallible>> {
        Poll::Ready(Ok(()))
    }

    fn call(&mut self, request: http::Request<Body>) -> Self::Future {
        let Self(tell, written) = self.clone();
        Box::pin(async move {
            if request.uri().path().ends_with("/Abort") {
                let mut server = Grpc::new(ProstCodec::default());
                let abort = service_fn(move |_: Request<contents::AbortRequest>| {
                    tell.send("abort".to_owned()).unwrap();
                    std::future::ready(Err::<Response<()>, _>(Status::unknown("not empty")))
                });
                return Ok(server.unary(abort, request).await);
            }
            let mut server = Grpc::new(ProstCodec::default());
            let write = service_fn(
                move |request: Request<Streaming<contents::WriteContentRequest>>| {
                    let (tell, written) = (tell.clone(), Arc::clone(&written));
                    let (answer, answers) = mpsc::channel(1);
                    tokio::spawn(async move {
                        let mut requests = request.into_inner();
                        while let Ok(Some(request)) = requests.message().await {
                            written.lock().extend(request.data);
                            let done = Ok(contents::WriteContentResponse::default());
                            answer.send(done).await.unwrap();
                        }
                        // As long as a slow disk takes to close a file.
                        tokio::time::sleep(Duration::from_millis(200)).await;
                        tell.send("closed".to_owned()).unwrap();
                    });
                    let answers: ReceiverStream<Result<_, Status>> = ReceiverStream::new(answers);
                    std::future::ready(Ok::<_, Status>(Response::new(answers)))
                },
            );
            Ok(server.streaming(write, request).await)
        })
    }
}

/// Has a containerd listen at `socket` that takes what is written; answers what it does, and what was written.
fn writable_containerd(socket: &Path) -> (UnboundedReceiver<String>, Written) {
    let (tell, told) = unbounded_channel();
    let written = Written::default();
    let listener = UnixListenerStream::new(UnixListener::bind(socket).unwrap());
    let server = tonic::transport::Server::builder()
        .add_service(Containerd::<true>(tell.clone()))
        .add_service(Store(tell, Arc::clone(&written)))
        .serve_with_incoming(listener);
    tokio::spawn(async { server.await.unwrap() });
    (told, written)
}

/// Snapshots below `dir`, and the diff service for them.
fn service(dir: &Path, socket: &Path) -> (Arc<Snapshotter>, Service) {
    let config = SnapshotterConfig {
        index_prober: Some("/bin/true".into()),
        ..SnapshotterConfig::default()
    };
    let opened = Snapshotter::open(&dir.join("root"), &dir.join("state"), config);
    let snapshotter = Arc::new(opened.unwrap());
    let service = Service::new(Arc::clone(&snapshotter), Content::new(socket.to_owned()));
    (snapshotter, service)
}

/// As Prepare answers it.
fn mount_of(dir: &Path, snapshot: &SnapshotInfo) -> types::Mount {
    let place = dir.join("state/mounts").join(&snapshot.id).join("root");
    types::Mount {
        source: place.to_str().unwrap().to_owned(),
        ..types::Mount::default()
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
    let (snapshotter, service) = service(tmp.path(), &socket);
    let key = "default/1/layer";
    let prepared = snapshotter.prepare(OWNER, key, None, Default::default());
    let prepared = prepared.unwrap();
    let mount = mount_of(tmp.path(), &prepared);
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

/// It was told by the error of containerd, which cannot take away what it still writes to and kept it.
#[tokio::test]
async fn a_diff_that_fails_says_why_and_leaves_nothing() {
    let tmp = tempfile::tempdir().unwrap();
    let socket = tmp.path().join("containerd.sock");
    let (mut told, _) = writable_containerd(&socket);
    let (snapshotter, service) = service(tmp.path(), &socket);
    let prepared = snapshotter.prepare(OWNER, "default/1/layer", None, Default::default());
    let prepared = prepared.unwrap();
    let upper = prepared.upper_dir.as_ref().unwrap();
    std::fs::write(upper.join("file"), vec![7; 3 << 20]).unwrap();
    {
        let union = snapshotter.union_config(OWNER, &prepared.key).unwrap();
        let union = Union::open(union).unwrap();
        let name = ".wh.name".as_ref();
        let made = union.create(NodeId::ROOT, name, 0o644, 0, &cow::Caller::ROOT);
        made.unwrap();
    }
    for media_type in [PLAIN_LAYER, OCI_GZIP] {
        let request = api::DiffRequest {
            right: vec![mount_of(tmp.path(), &prepared)],
            media_type: media_type.to_owned(),
            ..api::DiffRequest::default()
        };
        let status = service.diff(Request::new(request)).await.unwrap_err();
        assert_eq!(status.code(), tonic::Code::FailedPrecondition, "{status}");
        let told_why = "cannot write a layer with /.wh.name: its name begins";
        assert!(status.message().starts_with(told_why), "{status}");
        let mut done = Vec::new();
        while done
            .last()
            .is_none_or(|last: &String| !last.starts_with("delete"))
        {
            done.push(told.recv().await.unwrap());
        }
        assert_eq!(done[1..done.len() - 1], ["closed", "abort"]);
    }
}

/// The left side was taken for its parent.
#[tokio::test]
async fn what_was_written_to_the_left_side_is_compared_too() {
    let tmp = tempfile::tempdir().unwrap();
    let socket = tmp.path().join("containerd.sock");
    let (_told, written) = writable_containerd(&socket);
    let (snapshotter, service) = service(tmp.path(), &socket);
    let on = |key: &str| snapshotter::ParentRef {
        owner: OWNER,
        key: key.to_owned(),
    };
    let prepare = |key: &str, parent: Option<&str>| {
        let prepared = snapshotter.prepare(OWNER, key, parent.map(on).as_ref(), Default::default());
        let prepared = prepared.unwrap();
        let upper = prepared.upper_dir.clone().unwrap();
        (prepared, upper)
    };
    let write = |upper: &Path, name: &str| std::fs::write(upper.join(name), name).unwrap();
    let commit = |name: &str, key: &str| {
        let committed = snapshotter.commit(OWNER, name, key, Default::default());
        committed.unwrap();
    };
    let (_, upper) = prepare("n/extract", None);
    write(&upper, "base");
    commit("n/base", "n/extract");
    let (_, upper) = prepare("n/extract", Some("n/base"));
    write(&upper, "top");
    commit("n/top", "n/extract");
    let (clean, _) = prepare("n/clean", Some("n/base"));
    let (a, upper) = prepare("n/a", Some("n/base"));
    write(&upper, "a");
    let (b, upper) = prepare("n/b", Some("n/base"));
    write(&upper, "b");
    let (lone, upper) = prepare("n/lone", None);
    write(&upper, "lone");
    let view = |key: &str, parent| {
        let made = snapshotter.view(OWNER, key, Some(&on(parent)), Default::default());
        made.unwrap()
    };
    let (base, top) = (
        view("n/view of base", "n/base"),
        view("n/view of top", "n/top"),
    );
    for (left, right, names) in [
        (Some(&a), &b, &[".wh.a", "b"][..]),
        (Some(&a), &top, &[".wh.a", "top"]),
        (Some(&a), &base, &[".wh.a"]),
        (Some(&top), &a, &["a", ".wh.top"]),
        (Some(&lone), &a, &["a", "base", ".wh.lone"]),
        (Some(&a), &a, &[]),
        (Some(&a), &clean, &[".wh.a"]),
        (Some(&clean), &a, &["a"]),
        (Some(&base), &a, &["a"]),
        (Some(&base), &top, &["top"]),
        (Some(&clean), &top, &["top"]),
        (None, &lone, &["lone"]),
        (None, &base, &["base"]),
        (None, &top, &["base", "top"]),
        (None, &a, &["a", "base"]),
    ] {
        written.lock().clear();
        let mounts = |of: &SnapshotInfo| vec![mount_of(tmp.path(), of)];
        let request = api::DiffRequest {
            left: left.map(mounts).unwrap_or_default(),
            right: mounts(right),
            media_type: PLAIN_LAYER.to_owned(),
            ..api::DiffRequest::default()
        };
        service.diff(Request::new(request)).await.unwrap();
        let stream = std::mem::take(&mut *written.lock());
        let mut archive = tar::Archive::new(&*stream);
        let entries = archive.entries().unwrap();
        let told: Vec<_> = entries
            .map(|entry| {
                let entry = entry.unwrap();
                entry.path().unwrap().to_str().unwrap().to_owned()
            })
            .collect();
        assert_eq!(
            told,
            names,
            "{:?} {}",
            left.map(|left| &left.key),
            right.key
        );
    }
}

/// Only the name that it was written by was in the layer, and the others stayed what they were.
#[tokio::test]
async fn a_changed_file_with_several_names_is_in_the_layer_with_all_of_them() {
    let tmp = tempfile::tempdir().unwrap();
    let socket = tmp.path().join("containerd.sock");
    let (_told, written) = writable_containerd(&socket);
    let (snapshotter, service) = service(tmp.path(), &socket);
    let base = snapshotter.prepare(OWNER, "n/extract", None, Default::default());
    let upper = base.unwrap().upper_dir.unwrap();
    std::fs::write(upper.join("b"), "old").unwrap();
    for name in ["a", "c"] {
        std::fs::hard_link(upper.join("b"), upper.join(name)).unwrap();
    }
    let committed = snapshotter.commit(OWNER, "n/base", "n/extract", Default::default());
    committed.unwrap();
    let parent = snapshotter::ParentRef {
        owner: OWNER,
        key: "n/base".to_owned(),
    };
    let prepare = |key: &str| {
        let made = snapshotter.prepare(OWNER, key, Some(&parent), Default::default());
        vec![mount_of(tmp.path(), &made.unwrap())]
    };
    let (work, left) = (prepare("n/work"), prepare("n/left"));
    let union = Union::open(snapshotter.union_config(OWNER, "n/work").unwrap()).unwrap();
    let node = union.lookup(NodeId::ROOT, "b".as_ref()).unwrap().node;
    union.write(node, None, 0, b"new", None).unwrap();
    for (left, right, content) in [
        (vec![], work.clone(), "new"),
        (left.clone(), work.clone(), "new"),
        (work, left, "old"),
    ] {
        let request = api::DiffRequest {
            left,
            right,
            media_type: PLAIN_LAYER.to_owned(),
            ..api::DiffRequest::default()
        };
        service.diff(Request::new(request)).await.unwrap();
        let stream = std::mem::take(&mut *written.lock());
        let mut archive = tar::Archive::new(&*stream);
        let told = archive.entries().unwrap().map(|entry| {
            let mut entry = entry.unwrap();
            let link = entry
                .link_name()
                .unwrap()
                .map(|to| to.display().to_string());
            let mut content = String::new();
            std::io::Read::read_to_string(&mut entry, &mut content).unwrap();
            let name = entry.path().unwrap().display().to_string();
            (name, link.unwrap_or(content))
        });
        let expected = [("a", content), ("b", "a"), ("c", "a")];
        let expected = expected.map(|(name, what)| (name.to_owned(), what.to_owned()));
        assert_eq!(told.collect::<Vec<_>>(), expected);
    }
}

/// It had the code of an error of plyd's own, and referred to a log for what it said itself.
#[tokio::test]
async fn a_diff_that_meets_damage_says_that_data_is_lost_and_where() {
    let tmp = tempfile::tempdir().unwrap();
    let socket = tmp.path().join("containerd.sock");
    let (_told, _) = writable_containerd(&socket);
    let (snapshotter, service) = service(tmp.path(), &socket);
    let base = snapshotter.prepare(OWNER, "n/extract", None, Default::default());
    let upper = base.unwrap().upper_dir.unwrap();
    let noise: Vec<u8> = (0..40 << 10).map(|_| rand::random()).collect();
    std::fs::write(upper.join("file"), noise).unwrap();
    let committed = snapshotter.commit(OWNER, "n/base", "n/extract", Default::default());
    committed.unwrap();
    for pack in std::fs::read_dir(tmp.path().join("root/store/packs")).unwrap() {
        let pack = std::fs::File::options()
            .write(true)
            .open(pack.unwrap().path());
        pack.unwrap().write_all_at(&[0; 64], 20_000).unwrap();
    }
    let parent = snapshotter::ParentRef {
        owner: OWNER,
        key: "n/base".to_owned(),
    };
    let made = snapshotter.prepare(OWNER, "n/work", Some(&parent), Default::default());
    let made = made.unwrap();
    {
        // As a mount does, which brings no content up.
        let config = cow::UnionConfig {
            no_metacopy: false,
            ..snapshotter.union_config(OWNER, "n/work").unwrap()
        };
        let union = Union::open(config).unwrap();
        let node = union.lookup(NodeId::ROOT, "file".as_ref()).unwrap().node;
        let change = cow::SetAttr {
            perm: Some(0o600),
            ..cow::SetAttr::default()
        };
        union
            .setattr(node, None, &change, &cow::Caller::ROOT)
            .unwrap();
    }
    let request = api::DiffRequest {
        right: vec![mount_of(tmp.path(), &made)],
        media_type: PLAIN_LAYER.to_owned(),
        ..api::DiffRequest::default()
    };
    let status = service.diff(Request::new(request)).await.unwrap_err();
    assert_eq!(status.code(), tonic::Code::DataLoss, "{status}");
    let message = status.message();
    assert!(
        message.contains("file") && !message.contains("see the log"),
        "{message}"
    );
}
