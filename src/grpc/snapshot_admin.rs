//! `plywood.v1.SnapshotAdmin`: the administrator's view of the snapshots of all owners.

use std::ffi::OsString;
use std::os::unix::ffi::OsStringExt;
use std::path::PathBuf;
use std::sync::Arc;

use tonic::{Code, Request, Response, Status};

use super::pb::plywood as api;
use super::snapshot_names::Named;
use super::status::blocking;
use crate::image::ImageStore;
use crate::runtime::containers::Containers;
use crate::snapshotter::{
    Change, ChangeKind, Error, Kind, Mount, Owner, ParentRef, SnapshotInfo, Snapshotter,
};

/// Whom the snapshots made here belong to.
const OWNER: Owner = Owner::Snapctl;

/// The service.
pub(super) struct Service {
    snapshotter: Arc<Snapshotter>,
    named: Named,
}

impl Service {
    pub(super) fn new(
        snapshotter: Arc<Snapshotter>,
        images: Arc<ImageStore>,
        containers: Containers,
    ) -> Self {
        let named = Named { images, containers };
        Self { snapshotter, named }
    }

    async fn with<T: Send + 'static>(
        &self,
        work: impl FnOnce(&Snapshotter, &Named) -> Result<T, Status> + Send + 'static,
    ) -> Result<Response<T>, Status> {
        let snapshotter = Arc::clone(&self.snapshotter);
        let named = self.named.clone();
        blocking(move || work(&snapshotter, &named).map(Response::new)).await
    }

    async fn make(
        &self,
        request: api::PrepareRequest,
        kind: Kind,
    ) -> Result<Response<api::PrepareResponse>, Status> {
        self.with(move |snapshotter, named| {
            let parent = match request.parent.as_str() {
                "" => None,
                key => find_parent(snapshotter, named, key)?,
            };
            let labels = request.labels.into_iter().collect();
            let (key, parent) = (&request.key, parent.as_ref());
            let made = match kind {
                Kind::View => snapshotter.view(OWNER, key, parent, labels)?,
                _ => snapshotter.prepare(OWNER, key, parent, labels)?,
            };
            let mounts = match snapshotter.mounts(OWNER, key) {
                Ok(mounts) => words(mounts),
                Err(error) => {
                    if let Err(left) = snapshotter.remove(OWNER, key) {
                        tracing::error!(snapshot = key, error = %left, "cannot undo a failed prepare");
                    }
                    return Err(error.into());
                }
            };
            let snapshot = snapshotter.stat(OWNER, key).unwrap_or(made);
            Ok(api::PrepareResponse {
                mounts,
                snapshot: Some(describe(snapshot)),
            })
        })
        .await
    }
}

#[tonic::async_trait]
impl api::snapshot_admin_server::SnapshotAdmin for Service {
    async fn list(
        &self,
        request: Request<api::ListRequest>,
    ) -> Result<Response<api::ListResponse>, Status> {
        let owner = owner_named(&request.into_inner().owner)?;
        self.with(move |snapshotter, _| {
            let (snapshots, unusable) = snapshotter.list_and_unusable(owner)?;
            Ok(api::ListResponse {
                snapshots: snapshots.into_iter().map(describe).collect(),
                unusable_records: unusable as u64,
            })
        })
        .await
    }

    async fn info(
        &self,
        request: Request<api::InfoRequest>,
    ) -> Result<Response<api::InfoResponse>, Status> {
        let request = request.into_inner();
        self.with(move |snapshotter, named| {
            let found = find(snapshotter, named, &request.key, &request.owner)?;
            let damage = snapshotter.damage(std::slice::from_ref(&found.id)).pop();
            Ok(api::InfoResponse {
                snapshot: Some(api::Snapshot {
                    damaged_contents: damage.map(|damage| damage.contents),
                    damaged_view: damage.map(|damage| damage.view),
                    ..describe(found)
                }),
            })
        })
        .await
    }

    async fn prepare(
        &self,
        request: Request<api::PrepareRequest>,
    ) -> Result<Response<api::PrepareResponse>, Status> {
        self.make(request.into_inner(), Kind::Active).await
    }

    async fn view(
        &self,
        request: Request<api::PrepareRequest>,
    ) -> Result<Response<api::PrepareResponse>, Status> {
        self.make(request.into_inner(), Kind::View).await
    }

    async fn commit(
        &self,
        request: Request<api::CommitRequest>,
    ) -> Result<Response<api::CommitResponse>, Status> {
        let request = request.into_inner();
        self.with(move |snapshotter, named| {
            let labels = request.labels.into_iter().collect();
            let key = &request.key;
            let committed = match snapshotter.commit(OWNER, &request.name, key, labels) {
                Err(Error::NotFound { .. }) => return Err(no_commit(snapshotter, named, key)),
                committed => committed?,
            };
            Ok(api::CommitResponse {
                snapshot: Some(describe(committed)),
            })
        })
        .await
    }

    async fn mounts(
        &self,
        request: Request<api::MountsRequest>,
    ) -> Result<Response<api::MountsResponse>, Status> {
        let key = request.into_inner().key;
        self.with(move |snapshotter, named| {
            let mounts = match snapshotter.mounts(OWNER, &key) {
                Err(Error::NotFound { .. } | Error::NotMountable { .. }) => {
                    return Err(no_mount(snapshotter, named, &key));
                }
                mounts => words(mounts?),
            };
            Ok(api::MountsResponse { mounts })
        })
        .await
    }

    async fn remove(
        &self,
        request: Request<api::RemoveRequest>,
    ) -> Result<Response<api::RemoveResponse>, Status> {
        let key = request.into_inner().key;
        self.with(move |snapshotter, named| {
            if let Ok(places) = snapshotter.mounted_at(OWNER, &key)
                && let Some(place) = places.first()
            {
                let place = place.display();
                return Err(Status::failed_precondition(format!(
                    "the snapshot {key:?} is mounted at {place}; take it away first: `snapctl umount {place}`"
                )));
            }
            match snapshotter.remove(OWNER, &key) {
                Err(Error::NotFound { .. }) => {
                    // It may be there and belong to someone who needs it.
                    let found = find(snapshotter, named, &key, "")?;
                    return Err(Status::failed_precondition(format!(
                        "the snapshot {key:?} {}",
                        named.how_to_remove(&found)
                    )));
                }
                result => result?,
            }
            // It may have been the last to need the layers of an image that has gone.
            named.images.sweep_and_log();
            Ok(api::RemoveResponse {})
        })
        .await
    }

    async fn usage(
        &self,
        request: Request<api::UsageRequest>,
    ) -> Result<Response<api::UsageResponse>, Status> {
        let request = request.into_inner();
        self.with(move |snapshotter, named| {
            let found = find(snapshotter, named, &request.key, &request.owner)?;
            let usage = snapshotter.usage(found.owner, &found.key)?;
            Ok(api::UsageResponse {
                size: usage.size,
                inodes: usage.inodes,
            })
        })
        .await
    }

    type DiffStream = tokio_stream::Iter<std::vec::IntoIter<Result<api::DiffEntry, Status>>>;

    async fn diff(
        &self,
        request: Request<api::DiffRequest>,
    ) -> Result<Response<Self::DiffStream>, Status> {
        let request = request.into_inner();
        self.with(move |snapshotter, named| {
            let found = find(snapshotter, named, &request.key, &request.owner)?;
            let changes = snapshotter.diff(found.owner, &found.key)?;
            let entries: Vec<_> = changes.into_iter().map(|c| Ok(entry(c))).collect();
            Ok(tokio_stream::iter(entries))
        })
        .await
    }

    async fn materialize(
        &self,
        request: Request<api::MaterializeRequest>,
    ) -> Result<Response<api::MaterializeResponse>, Status> {
        let request = request.into_inner();
        self.with(move |snapshotter, named| {
            let found = find(snapshotter, named, &request.key, &request.owner)?;
            snapshotter.materialize(found.owner, &found.key)?;
            Ok(api::MaterializeResponse {})
        })
        .await
    }

    async fn export_overlay(
        &self,
        request: Request<api::ExportOverlayRequest>,
    ) -> Result<Response<api::ExportOverlayResponse>, Status> {
        let request = request.into_inner();
        self.with(move |snapshotter, named| {
            let dir = PathBuf::from(OsString::from_vec(request.dir));
            if !dir.is_absolute() {
                return Err(Status::invalid_argument(format!(
                    "{} is not an absolute path, and plyd works in a directory of its own",
                    dir.display()
                )));
            }
            if dir.symlink_metadata().is_ok() {
                return Err(Status::already_exists(format!(
                    "{} exists already; name a directory that is to be made",
                    dir.display()
                )));
            }
            let found = find(snapshotter, named, &request.key, &request.owner)?;
            let exported = snapshotter.export_overlay(found.owner, &found.key, &dir)?;
            Ok(api::ExportOverlayResponse {
                options: exported.options().into_vec(),
            })
        })
        .await
    }
}

fn entry(change: Change) -> api::DiffEntry {
    let kind = match change.kind {
        ChangeKind::Added => api::diff_entry::Change::Added,
        ChangeKind::Modified => api::diff_entry::Change::Modified,
        ChangeKind::Deleted => api::diff_entry::Change::Deleted,
    };
    api::DiffEntry {
        change: kind.into(),
        path: change.path.into_os_string().into_vec(),
    }
}

/// The snapshot `key` of the owner named, or of the only owner that has one of that key.
fn find(
    snapshotter: &Snapshotter,
    named: &Named,
    key: &str,
    owner: &str,
) -> Result<SnapshotInfo, Status> {
    let missing = |otherwise: Status| match named.snapshot_of(key) {
        Some(meant) => Status::not_found(format!("there is no snapshot {key:?}; {meant}")),
        None => otherwise,
    };
    if let Some(owner) = owner_named(owner)? {
        return match snapshotter.stat(owner, key) {
            Err(error @ Error::NotFound { .. }) => Err(missing(error.into())),
            found => Ok(found?),
        };
    }
    let mut found = Vec::new();
    for owner in Owner::ALL {
        match snapshotter.stat(owner, key) {
            Ok(info) => found.push(info),
            Err(Error::NotFound { .. }) => {}
            Err(error) => return Err(error.into()),
        }
    }
    match <[SnapshotInfo; 1]>::try_from(found) {
        Ok([info]) => Ok(info),
        Err(found) if found.is_empty() => Err(missing(Status::not_found(format!(
            "there is no snapshot {key:?}; `snapctl snapshot ls` names those that exist"
        )))),
        Err(found) => {
            let owners: Vec<_> = found.iter().map(|info| info.owner.as_str()).collect();
            Err(Status::invalid_argument(format!(
                "several owners have a snapshot {key:?}: say which of {} with `--owner`",
                owners.join(", ")
            )))
        }
    }
}

/// Why no snapshot of ours named `key` can be committed: somebody else may have one of that key, or of that name.
fn no_commit(snapshotter: &Snapshotter, named: &Named, key: &str) -> Status {
    let found = find(snapshotter, named, key, "");
    let found = found.or_else(|status| match named.containers.named(key) {
        Some((id, _)) => find(snapshotter, named, &id, Owner::Container.as_str()),
        None => Err(status),
    });
    match found {
        Ok(found) => Status::failed_precondition(format!(
            "the snapshot {key:?} {}",
            named.how_to_commit(&found)
        )),
        Err(status) => status,
    }
}

/// Why a snapshot of ours named `key` cannot be mounted, and what can be instead.
fn no_mount(snapshotter: &Snapshotter, named: &Named, key: &str) -> Status {
    match find(snapshotter, named, key, "") {
        Ok(found) if found.kind == Kind::Committed => Status::failed_precondition(format!(
            "the snapshot {key:?} is committed and has no mount of its own; make a snapshot on it and mount that: `snapctl snapshot view NEW {key}`, or `prepare` for one to write to"
        )),
        Ok(found) => Status::failed_precondition(format!(
            "the snapshot {key:?} belongs to {}, who mounts it; `snapctl snapshot info --owner {} {key}` says where",
            named.holder(&found),
            found.owner
        )),
        Err(_) if named.image(key).is_some() => Status::not_found(format!(
            "there is no snapshot {key:?}; make one on the image of that name and mount that: `snapctl snapshot view NEW {key}`, or `prepare` for one to write to"
        )),
        Err(status) => status,
    }
}

/// A committed snapshot by its key, or the top of an image by its name; an image without layers is as
/// good as no parent.
fn find_parent(
    snapshotter: &Snapshotter,
    named: &Named,
    name: &str,
) -> Result<Option<ParentRef>, Status> {
    let parent = match find(snapshotter, named, name, "") {
        Err(status) if status.code() == Code::NotFound => match named.image(name) {
            Some(image) => return Ok(image.parent()),
            None => {
                return Err(Status::not_found(format!(
                    "there is no snapshot and no image {name:?} to be the parent; `snapctl snapshot ls` and `snapctl image ls` name those that exist"
                )));
            }
        },
        found => found?,
    };
    if parent.kind != Kind::Committed {
        return Err(Status::failed_precondition(format!(
            "the snapshot {name:?} cannot be a parent, for it is {}; commit it first",
            parent.kind
        )));
    }
    Ok(Some(ParentRef {
        owner: parent.owner,
        key: parent.key,
    }))
}

fn owner_named(name: &str) -> Result<Option<Owner>, Status> {
    if name.is_empty() {
        return Ok(None);
    }
    let owner = Owner::ALL.into_iter().find(|owner| owner.as_str() == name);
    owner.map(Some).ok_or_else(|| {
        Status::invalid_argument(format!(
            "there is no owner {name:?}; they are containerd, snapctl, image and container"
        ))
    })
}

fn describe(info: SnapshotInfo) -> api::Snapshot {
    let kind = match info.kind {
        Kind::View => api::SnapshotKind::View,
        Kind::Active => api::SnapshotKind::Active,
        Kind::Committed => api::SnapshotKind::Committed,
    };
    let text = |path: PathBuf| path.to_string_lossy().into_owned();
    api::Snapshot {
        id: info.id,
        key: info.key,
        parent: info.parent.map_or_else(String::new, |parent| parent.key),
        kind: kind.into(),
        owner: info.owner.as_str().to_owned(),
        labels: info.labels.into_iter().collect(),
        created: Some(info.created.into()),
        updated: Some(info.updated.into()),
        plyfs_pid: info.mount.as_ref().map_or(0, |mount| mount.pid),
        mountpoint: info
            .mount
            .map_or_else(String::new, |mount| text(mount.path)),
        upper_dir: info.upper_dir.map_or_else(String::new, text),
        layer_dirs: info.layer_dirs.into_iter().map(text).collect(),
        packed_layers: info.packed_layers.into_iter().map(String::from).collect(),
        damaged_contents: None,
        damaged_view: None,
    }
}

fn words(mounts: Vec<Mount>) -> Vec<api::Mount> {
    mounts
        .into_iter()
        .map(|mount| api::Mount {
            r#type: mount.kind,
            source: mount.source,
            options: mount.options,
        })
        .collect()
}
