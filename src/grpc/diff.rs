//! `containerd.services.diff.v1.Diff`: layers go from containerd's content store into ours without a mount.
//!
//! What this service cannot do it answers with Unimplemented: containerd asks the next differ of its list then.

use std::path::Path;
use std::sync::Arc;

use tonic::{Request, Response, Status};

use super::content::{self, Caller, Content};
use super::pb::containerd::services::diff::v1 as api;
use super::pb::containerd::types;
use super::status::blocking;
use crate::snapshotter::{self, Owner, SnapshotInfo, Snapshotter};
use crate::store::layers::Expected;

const OWNER: Owner = Owner::Containerd;
/// What an applied layer is, whatever it came as.
const PLAIN_LAYER: &str = "application/vnd.oci.image.layer.v1.tar";
/// Layers that the store reads, whose compression it finds out itself.
const LAYERS: [&str; 10] = [
    PLAIN_LAYER,
    "application/vnd.oci.image.layer.v1.tar+gzip",
    "application/vnd.oci.image.layer.v1.tar+zstd",
    "application/vnd.oci.image.layer.nondistributable.v1.tar",
    "application/vnd.oci.image.layer.nondistributable.v1.tar+gzip",
    "application/vnd.oci.image.layer.nondistributable.v1.tar+zstd",
    "application/vnd.docker.image.rootfs.diff.tar",
    "application/vnd.docker.image.rootfs.diff.tar.gzip",
    "application/vnd.docker.image.rootfs.diff.tar.zstd",
    "application/vnd.docker.image.rootfs.foreign.diff.tar.gzip",
];

/// The service.
pub(super) struct Service {
    snapshotter: Arc<Snapshotter>,
    content: Content,
}

impl Service {
    pub(super) fn new(snapshotter: Arc<Snapshotter>, content: Content) -> Self {
        Self {
            snapshotter,
            content,
        }
    }

    /// The snapshot that these mounts, as Prepare answered them, are of.
    async fn snapshot_of(&self, mounts: Vec<types::Mount>) -> Result<SnapshotInfo, Status> {
        let foreign = || Status::unimplemented("the mounts are not those of a snapshot of plyd");
        let [mount] = &mounts[..] else {
            return Err(foreign());
        };
        let (snapshotter, source) = (Arc::clone(&self.snapshotter), mount.source.clone());
        blocking(move || snapshotter.mounted_from(OWNER, Path::new(&source)))
            .await?
            .ok_or_else(foreign)
    }
}

#[tonic::async_trait]
impl api::diff_server::Diff for Service {
    async fn apply(
        &self,
        request: Request<api::ApplyRequest>,
    ) -> Result<Response<api::ApplyResponse>, Status> {
        let (headers, _, request) = request.into_parts();
        let layer = request.diff.ok_or_else(|| {
            Status::invalid_argument("the request names no layer: set `diff` to its descriptor")
        })?;
        if !LAYERS.contains(&&*layer.media_type) {
            return Err(Status::unimplemented(format!(
                "plyd does not read layers of the type {:?}",
                layer.media_type
            )));
        }
        let snapshot = self.snapshot_of(request.mounts).await?;
        let caller = Caller::new(&headers, &snapshot.key)?;
        let (source, blob) = content::pipe();
        let read = self.content.read(&caller, &layer.digest, source);
        let (snapshotter, digest) = (Arc::clone(&self.snapshotter), layer.digest.clone());
        let applied = blocking(move || {
            let expected = Expected {
                blob: Some(&digest),
                diff_id: None,
            };
            match snapshotter.apply_layer(OWNER, &snapshot.key, (blob, &expected), &()) {
                Ok(applied) => Ok(applied),
                // Another differ can unpack through the mount.
                Err(
                    error @ (snapshotter::Error::NotPacked { .. }
                    | snapshotter::Error::NotPristine { .. }),
                ) => Err(Status::unimplemented(error.to_string())),
                Err(error) => Err(Status::from(error)),
            }
        });
        let (read, applied) = tokio::join!(read, applied);
        let applied = match (read, applied) {
            (Err(status), Err(_)) => return Err(status),
            (_, applied) => applied?,
        };
        let applied = types::Descriptor {
            media_type: PLAIN_LAYER.to_owned(),
            digest: applied.diff_id,
            size: i64::try_from(applied.tar_bytes).unwrap_or(i64::MAX),
            ..types::Descriptor::default()
        };
        Ok(Response::new(api::ApplyResponse {
            applied: Some(applied),
        }))
    }

    async fn diff(
        &self,
        _request: Request<api::DiffRequest>,
    ) -> Result<Response<api::DiffResponse>, Status> {
        Err(Status::unimplemented(
            "plyd does not write layers; let containerd's differ \"walking\" do it",
        ))
    }
}
