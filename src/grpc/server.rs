//! All services on one socket.

use std::fs;
use std::future::Future;
use std::io;
use std::os::unix::fs::FileTypeExt;
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use nix::sys::stat::{Mode, umask};
use tokio_stream::wrappers::UnixListenerStream;
use tonic::transport::Server;

use super::content::Content;
use super::pb::DESCRIPTORS;
use super::pb::containerd::services::diff::v1::diff_server::DiffServer;
use super::pb::containerd::services::snapshots::v1::snapshots_server::SnapshotsServer;
use super::pb::plywood::containers_server::ContainersServer;
use super::pb::plywood::images_server::ImagesServer;
use super::pb::plywood::layers_server::LayersServer;
use super::pb::plywood::snapshot_admin_server::SnapshotAdminServer;
use super::pb::plywood::system_server::SystemServer;
use super::system::Place;
use super::{container, diff, images, layers, snapshot_admin, snapshots, system};
use crate::image::ImageStore;
use crate::runtime::containers::Containers;
use crate::snapshotter::Snapshotter;

/// containerd's limit, in both directions.
pub(super) const LARGEST_MESSAGE: usize = 16 << 20;
/// How long the requests at hand may take when plyd ends.
const LAST_REQUESTS: Duration = Duration::from_secs(5);

/// What the services work with.
pub struct Backends {
    /// Root and state directory, for System.
    pub root: PathBuf,
    /// See `root`.
    pub state: PathBuf,
    /// Snapshots.
    pub snapshotter: Arc<Snapshotter>,
    /// Images.
    pub images: Arc<ImageStore>,
    /// Containers.
    pub containers: Containers,
    /// containerd's socket, for the content of layers.
    pub containerd: PathBuf,
}

/// Why plyd cannot listen or serve.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// Another process answers there.
    #[error("{path} is served by another process; end that one, or use another `--address`")]
    InUse {
        /// The socket.
        path: PathBuf,
    },
    /// Something else lies there.
    #[error("{path} is there and is not a socket; move it away, or use another `--address`")]
    NotASocket {
        /// The path.
        path: PathBuf,
    },
    /// The host refused an operation.
    #[error("cannot listen on {path}: {source}")]
    Listen {
        /// The socket.
        path: PathBuf,
        /// What the host said.
        source: io::Error,
    },
    /// Serving failed.
    #[error("cannot serve: {0}")]
    Serve(#[from] tonic::transport::Error),
    /// The reflection service does not accept our descriptors.
    #[error("cannot offer reflection: {0}")]
    Reflection(#[from] tonic_reflection::server::Error),
}

/// Listens on `path` with mode 0600 from the first moment, in place of a socket that a dead process
/// left. To be called while the process has one thread, for the umask is the process's.
pub fn listen(path: &Path) -> Result<UnixListener, Error> {
    let failed = |source| Error::Listen {
        path: path.to_owned(),
        source,
    };
    if let Some(parent) = path.parent() {
        crate::store::create_dir(parent, 0o755).map_err(failed)?;
    }
    match fs::symlink_metadata(path) {
        Ok(meta) if !meta.file_type().is_socket() => {
            let path = path.to_owned();
            return Err(Error::NotASocket { path });
        }
        Ok(_) if UnixStream::connect(path).is_ok() => {
            let path = path.to_owned();
            return Err(Error::InUse { path });
        }
        Ok(_) => fs::remove_file(path).map_err(failed)?,
        Err(error) if error.kind() == io::ErrorKind::NotFound => {}
        Err(error) => return Err(failed(error)),
    }
    let old = umask(Mode::from_bits_truncate(0o177));
    let bound = UnixListener::bind(path);
    umask(old);
    let listener = bound.map_err(failed)?;
    listener.set_nonblocking(true).map_err(failed)?;
    Ok(listener)
}

/// Serves until `end` is ready and the requests at hand are answered, or cut off when that takes long:
/// a stream may go on for ever.
pub async fn serve(
    backends: Backends,
    listener: UnixListener,
    end: impl Future<Output = ()>,
) -> Result<(), Error> {
    let path = listener
        .local_addr()
        .ok()
        .and_then(|address| address.as_pathname().map(Path::to_owned))
        .unwrap_or_default();
    let incoming = tokio::net::UnixListener::from_std(listener)
        .map(UnixListenerStream::new)
        .map_err(|source| Error::Listen { path, source })?;

    let Backends {
        root,
        state,
        snapshotter,
        images: image_store,
        containers: all_containers,
        containerd,
    } = backends;
    let snapshots_service =
        snapshots::Service::new(Arc::clone(&snapshotter), Arc::clone(&image_store));
    let snapshots = SnapshotsServer::new(snapshots_service)
        .max_decoding_message_size(LARGEST_MESSAGE)
        .max_encoding_message_size(LARGEST_MESSAGE);
    let content = Content::new(containerd);
    let differ = DiffServer::new(diff::Service::new(
        Arc::clone(&snapshotter),
        content.clone(),
    ))
    .max_decoding_message_size(LARGEST_MESSAGE);
    let admin_service = snapshot_admin::Service::new(
        Arc::clone(&snapshotter),
        Arc::clone(&image_store),
        all_containers.clone(),
    );
    let admin = SnapshotAdminServer::new(admin_service)
        .max_decoding_message_size(LARGEST_MESSAGE)
        .max_encoding_message_size(LARGEST_MESSAGE);
    let images = ImagesServer::new(images::Service::new(
        Arc::clone(&image_store),
        all_containers.clone(),
    ))
    .max_decoding_message_size(LARGEST_MESSAGE);
    let containers = ContainersServer::new(container::Service::new(
        all_containers.clone(),
        Arc::clone(&image_store),
    ))
    .max_decoding_message_size(LARGEST_MESSAGE)
    .max_encoding_message_size(LARGEST_MESSAGE);
    let layers = LayersServer::new(layers::Service::new(
        Arc::clone(&snapshotter),
        Arc::clone(&image_store),
        all_containers.clone(),
    ))
    .max_encoding_message_size(LARGEST_MESSAGE);
    let system = SystemServer::new(system::Service::new(
        Place { root, state },
        snapshotter,
        image_store,
        all_containers.clone(),
        content,
    ));
    // Streams that follow a container would keep the server from ending.
    let end = async move {
        end.await;
        all_containers.close();
    };

    let (health, health_service) = tonic_health::server::health_reporter();
    health
        .set_serving::<SnapshotsServer<snapshots::Service>>()
        .await;
    health.set_serving::<DiffServer<diff::Service>>().await;
    health
        .set_serving::<SnapshotAdminServer<snapshot_admin::Service>>()
        .await;
    health.set_serving::<ImagesServer<images::Service>>().await;
    health.set_serving::<LayersServer<layers::Service>>().await;
    health
        .set_serving::<ContainersServer<container::Service>>()
        .await;
    health.set_serving::<SystemServer<system::Service>>().await;
    let reflection = || {
        tonic_reflection::server::Builder::configure()
            .register_encoded_file_descriptor_set(DESCRIPTORS)
            .register_encoded_file_descriptor_set(tonic_health::pb::FILE_DESCRIPTOR_SET)
    };

    let (ending, ended) = tokio::sync::oneshot::channel();
    let end = async move {
        end.await;
        // Nobody listens when serving has failed meanwhile.
        let _ = ending.send(());
    };
    let patience = async {
        if ended.await.is_ok() {
            tokio::time::sleep(LAST_REQUESTS).await;
        } else {
            std::future::pending().await
        }
    };
    let serving = Server::builder()
        .add_service(health_service)
        .add_service(reflection().build_v1()?)
        .add_service(reflection().build_v1alpha()?)
        .add_service(snapshots)
        .add_service(differ)
        .add_service(admin)
        .add_service(images)
        .add_service(layers)
        .add_service(containers)
        .add_service(system)
        .serve_with_incoming_shutdown(incoming, end);
    tokio::select! {
        served = serving => served?,
        () = patience => tracing::info!("cutting off the streams that are still open"),
    }
    Ok(())
}
