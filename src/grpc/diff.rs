//! `containerd.services.diff.v1.Diff`: layers between containerd's content store and ours, without a mount.
//!
//! What this service cannot do it answers with Unimplemented: containerd asks the next differ of its list then.

use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use tokio::sync::{mpsc, oneshot};
use tonic::{Request, Response, Status};

use super::content::{self, About, Caller, Content, PIECES};
use super::layer::{Compression, OCI_GZIP};
use super::pb::containerd::services::diff::v1 as api;
use super::pb::containerd::types;
use super::status::blocking;
use crate::snapshotter::{self, Kind, Owner, SnapshotInfo, Snapshotter};
use crate::store::Time;
use crate::store::ingest::Observer;
use crate::store::layers::Expected;

const OWNER: Owner = Owner::Containerd;
/// The label that names the digest of a blob's content.
const UNCOMPRESSED: &str = "containerd.io/uncompressed";
/// What an applied layer is, whatever it came as.
const PLAIN_LAYER: &str = "application/vnd.oci.image.layer.v1.tar";
/// Layers that the store reads, whose compression it finds out itself.
const LAYERS: [&str; 12] = [
    PLAIN_LAYER,
    "application/vnd.oci.image.layer.v1.tar+gzip",
    "application/vnd.oci.image.layer.v1.tar+zstd",
    "application/vnd.oci.image.layer.nondistributable.v1.tar",
    "application/vnd.oci.image.layer.nondistributable.v1.tar+gzip",
    "application/vnd.oci.image.layer.nondistributable.v1.tar+zstd",
    "application/vnd.docker.image.rootfs.diff.tar",
    "application/vnd.docker.image.rootfs.diff.tar.gzip",
    "application/vnd.docker.image.rootfs.diff.tar.zstd",
    "application/vnd.docker.image.rootfs.foreign.diff.tar",
    "application/vnd.docker.image.rootfs.foreign.diff.tar.gzip",
    "application/vnd.docker.image.rootfs.foreign.diff.tar.zstd",
];

/// Dropped, it tells a thread that nobody waits any more for what that does for a request.
#[derive(Debug, Default)]
struct Waiting(Arc<AtomicBool>);

impl Drop for Waiting {
    fn drop(&mut self) {
        self.0.store(true, Ordering::Release);
    }
}

/// Ends an import that nobody waits for.
struct Until(Arc<AtomicBool>);

impl Observer for Until {
    fn cancelled(&self) -> bool {
        self.0.load(Ordering::Acquire)
    }
}

/// Runs `work` on a thread that may block, with what tells it that the answer has been dropped and nobody waits for it.
async fn awaited<T: Send + 'static>(
    work: impl FnOnce(&Until) -> Result<T, Status> + Send + 'static,
) -> Result<T, Status> {
    let waiting = Waiting::default();
    let until = Until(Arc::clone(&waiting.0));
    blocking(move || work(&until)).await
}

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

    /// The snapshot whose own changes are all that tells `right` from `left`, if there is one.
    async fn step_between(
        &self,
        left: Option<SnapshotInfo>,
        right: SnapshotInfo,
    ) -> Result<Option<SnapshotInfo>, Status> {
        let snapshotter = Arc::clone(&self.snapshotter);
        blocking(move || {
            let below = match left {
                Some(left) if !snapshotter.is_untouched(OWNER, &left.key)? => return Ok(None),
                Some(left) => left.parent,
                None => None,
            };
            if right.parent == below {
                return Ok(Some(right));
            }
            let committed = match (right.kind, &right.parent) {
                (Kind::View, Some(parent)) => Some(snapshotter.stat(parent.owner, &parent.key)?),
                _ => None,
            };
            Ok::<_, Status>(committed.filter(|committed| committed.parent == below))
        })
        .await
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
        let applied = awaited(move |until| {
            let expected = Expected {
                blob: Some(&digest),
                diff_id: None,
            };
            match snapshotter.apply_layer(OWNER, &snapshot.key, (blob, &expected), until) {
                Ok(applied) => Ok(applied),
                // Another differ can unpack through the mount.
                Err(
                    error @ (snapshotter::Error::NotPacked { .. }
                    | snapshotter::Error::NotPristine { .. }),
                ) => Err(Status::unimplemented(error.to_string())),
                Err(error) => Err(Status::from(error)),
            }
        });
        // Dropped in this order when the client gives the request up: the import is told before its blob ends, which it could
        // take for the whole layer.
        let (applied, read) = tokio::join!(applied, read);
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
        request: Request<api::DiffRequest>,
    ) -> Result<Response<api::DiffResponse>, Status> {
        let (headers, _, request) = request.into_parts();
        let media_type = match &*request.media_type {
            "" => OCI_GZIP.to_owned(),
            named => named.to_owned(),
        };
        let compression = Compression::of(&media_type).ok_or_else(|| {
            Status::unimplemented(format!(
                "plyd does not write layers of the type {media_type:?}"
            ))
        })?;
        let left = match request.left.is_empty() {
            true => None,
            false => Some(self.snapshot_of(request.left).await?),
        };
        let right = self.snapshot_of(request.right).await?;
        let caller = Caller::new(&headers, &right.key)?;
        let step = self.step_between(left.clone(), right.clone()).await?;
        let epoch = request.source_date_epoch.map(|time| Time {
            sec: time.seconds,
            nsec: u32::try_from(time.nanos).unwrap_or_default(),
        });
        let reference = match request.r#ref.is_empty() {
            true => format!("plywood-diff-{:032x}", rand::random::<u128>()),
            false => request.r#ref,
        };

        let (pieces, blob) = mpsc::channel(PIECES);
        let (tell, about) = oneshot::channel();
        let write = self.content.write(&caller, &reference, blob, about);
        let snapshotter = Arc::clone(&self.snapshotter);
        let labels = request.labels;
        let made = blocking(move || {
            let made = compression.write(content::pieces(pieces), |out| {
                let left = left.as_ref().map(|left| &*left.key);
                match step {
                    Some(step) => snapshotter.write_layer(step.owner, &step.key, out, epoch),
                    None => snapshotter.write_difference(OWNER, left, &right.key, out, epoch),
                }
            })?;
            let digest = made.digest.clone();
            let mut labels = labels;
            labels.insert(UNCOMPRESSED.to_owned(), made.diff_id.clone());
            // Whoever does not listen any more has said why.
            let _ = tell.send(About { digest, labels });
            Ok::<_, Status>(made)
        });
        let (written, made) = tokio::join!(write, made);
        // Where the store does not take it, what made it only knows that nobody wants it.
        written?;
        let made = made?;
        let diff = types::Descriptor {
            media_type,
            digest: made.digest,
            size: i64::try_from(made.size).unwrap_or(i64::MAX),
            ..types::Descriptor::default()
        };
        Ok(Response::new(api::DiffResponse { diff: Some(diff) }))
    }
}

#[cfg(test)]
mod tests;
