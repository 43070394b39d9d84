//! `containerd.services.snapshots.v1.Snapshots`: plyd as containerd's proxy snapshotter.
//!
//! Only snapshots of [`Owner::Containerd`] exist here. containerd's collector lists this service
//! without a filter and removes every name that it does not know, so whatever else is stored must
//! neither be seen nor be reached through it.

use std::collections::{BTreeMap, HashMap};
use std::sync::Arc;

use tonic::{Request, Response, Status};

use super::filter::Filters;
use super::pb::containerd::services::snapshots::v1 as api;
use super::pb::containerd::types;
use super::status::blocking;
use crate::image::ImageStore;
use crate::snapshotter::{Kind, Mount, Owner, ParentRef, SnapshotInfo, Snapshotter};

const OWNER: Owner = Owner::Containerd;
/// Snapshots in one message of List; containerd's own number.
const BATCH: usize = 100;
/// The API's limit for a label's key and value together, in bytes.
const LONGEST_LABEL: usize = 4096;
/// On Prepare: the name under which the result is to be committed.
const LABEL_REF: &str = "containerd.io/snapshot.ref";

/// The service.
pub(super) struct Service {
    snapshotter: Arc<Snapshotter>,
    images: Arc<ImageStore>,
}

impl Service {
    pub(super) fn new(snapshotter: Arc<Snapshotter>, images: Arc<ImageStore>) -> Self {
        Self {
            snapshotter,
            images,
        }
    }

    async fn with<T: Send + 'static>(
        &self,
        work: impl FnOnce(&Snapshotter) -> Result<T, Status> + Send + 'static,
    ) -> Result<T, Status> {
        let snapshotter = Arc::clone(&self.snapshotter);
        blocking(move || work(&snapshotter)).await
    }
}

#[tonic::async_trait]
impl api::snapshots_server::Snapshots for Service {
    async fn prepare(
        &self,
        request: Request<api::PrepareSnapshotRequest>,
    ) -> Result<Response<api::PrepareSnapshotResponse>, Status> {
        let request = request.into_inner();
        let mounts = self
            .with(move |snapshotter| {
                let labels = checked(request.labels)?;
                let parent = parent_of(request.parent);
                if let Some(target) = labels.get(LABEL_REF) {
                    refuse_if_committed(snapshotter, target, parent.as_ref())?;
                }
                snapshotter.prepare(OWNER, &request.key, parent.as_ref(), labels)?;
                mounts_of_new(snapshotter, &request.key)
            })
            .await?;
        Ok(Response::new(api::PrepareSnapshotResponse { mounts }))
    }

    async fn view(
        &self,
        request: Request<api::ViewSnapshotRequest>,
    ) -> Result<Response<api::ViewSnapshotResponse>, Status> {
        let request = request.into_inner();
        let mounts = self
            .with(move |snapshotter| {
                let labels = checked(request.labels)?;
                let parent = parent_of(request.parent);
                snapshotter.view(OWNER, &request.key, parent.as_ref(), labels)?;
                mounts_of_new(snapshotter, &request.key)
            })
            .await?;
        Ok(Response::new(api::ViewSnapshotResponse { mounts }))
    }

    async fn mounts(
        &self,
        request: Request<api::MountsRequest>,
    ) -> Result<Response<api::MountsResponse>, Status> {
        let key = request.into_inner().key;
        let mounts = self
            .with(move |snapshotter| Ok(snapshotter.mounts(OWNER, &key)?))
            .await?;
        Ok(Response::new(api::MountsResponse {
            mounts: words(mounts),
        }))
    }

    async fn commit(
        &self,
        request: Request<api::CommitSnapshotRequest>,
    ) -> Result<Response<()>, Status> {
        let request = request.into_inner();
        self.with(move |snapshotter| {
            let labels = checked(request.labels)?;
            snapshotter.commit(OWNER, &request.name, &request.key, labels)?;
            Ok(Response::new(()))
        })
        .await
    }

    async fn remove(
        &self,
        request: Request<api::RemoveSnapshotRequest>,
    ) -> Result<Response<()>, Status> {
        let key = request.into_inner().key;
        let images = Arc::clone(&self.images);
        self.with(move |snapshotter| {
            snapshotter.remove(OWNER, &key)?;
            // It may have been the last to tell of a record that is gone.
            if snapshotter.is_unsettled() {
                images.settle_layers();
            }
            Ok(Response::new(()))
        })
        .await
    }

    async fn stat(
        &self,
        request: Request<api::StatSnapshotRequest>,
    ) -> Result<Response<api::StatSnapshotResponse>, Status> {
        let key = request.into_inner().key;
        let found = self
            .with(move |snapshotter| Ok(snapshotter.stat(OWNER, &key)?))
            .await?;
        Ok(Response::new(api::StatSnapshotResponse {
            info: Some(info(found)),
        }))
    }

    async fn update(
        &self,
        request: Request<api::UpdateSnapshotRequest>,
    ) -> Result<Response<api::UpdateSnapshotResponse>, Status> {
        let request = request.into_inner();
        let Some(wanted) = request.info else {
            return Err(Status::invalid_argument(
                "the update names no snapshot: set `info.name`",
            ));
        };
        let paths = request.update_mask.map_or_else(Vec::new, |mask| mask.paths);
        let change = LabelChange::new(wanted.labels, paths)?;
        let updated = self
            .with(move |snapshotter| {
                let change = |labels: &mut BTreeMap<_, _>| change.apply(labels);
                Ok(snapshotter.update_labels(OWNER, &wanted.name, change)?)
            })
            .await?;
        Ok(Response::new(api::UpdateSnapshotResponse {
            info: Some(info(updated)),
        }))
    }

    type ListStream =
        tokio_stream::Iter<std::vec::IntoIter<Result<api::ListSnapshotsResponse, Status>>>;

    async fn list(
        &self,
        request: Request<api::ListSnapshotsRequest>,
    ) -> Result<Response<Self::ListStream>, Status> {
        let filters = Filters::parse(&request.into_inner().filters)
            .map_err(|error| Status::invalid_argument(error.to_string()))?;
        let mut infos = self
            .with(|snapshotter| Ok(snapshotter.list(Some(OWNER))?))
            .await?
            .into_iter()
            .filter(|info| filters.matches(|path| field(info, path)))
            .map(info);
        let batches: Vec<_> = std::iter::from_fn(|| {
            let info: Vec<_> = infos.by_ref().take(BATCH).collect();
            (!info.is_empty()).then_some(Ok(api::ListSnapshotsResponse { info }))
        })
        .collect();
        Ok(Response::new(tokio_stream::iter(batches)))
    }

    async fn usage(
        &self,
        request: Request<api::UsageRequest>,
    ) -> Result<Response<api::UsageResponse>, Status> {
        let key = request.into_inner().key;
        let usage = self
            .with(move |snapshotter| Ok(snapshotter.usage(OWNER, &key)?))
            .await?;
        Ok(Response::new(api::UsageResponse {
            size: i64::try_from(usage.size).unwrap_or(i64::MAX),
            inodes: i64::try_from(usage.inodes).unwrap_or(i64::MAX),
        }))
    }

    /// Waits until what was removed has left the disk.
    async fn cleanup(
        &self,
        _request: Request<api::CleanupRequest>,
    ) -> Result<Response<()>, Status> {
        self.with(|snapshotter| {
            snapshotter.wait_until_deleted();
            Ok(Response::new(()))
        })
        .await
    }
}

/// containerd asks for a snapshot to unpack a layer into before it downloads it. One that another
/// of its namespaces committed already will do, and AlreadyExists makes it look for that.
fn refuse_if_committed(
    snapshotter: &Snapshotter,
    target: &str,
    parent: Option<&ParentRef>,
) -> Result<(), Status> {
    let is_it = |labels: &BTreeMap<String, String>| {
        labels.get(LABEL_REF).is_some_and(|label| label == target)
    };
    let is_there = snapshotter.has_committed_on(OWNER, parent, is_it)?;
    if is_there {
        return Err(Status::already_exists(format!(
            "the snapshot {target:?} is committed already; use it"
        )));
    }
    Ok(())
}

/// A snapshot whose mount cannot be answered is not made.
fn mounts_of_new(snapshotter: &Snapshotter, key: &str) -> Result<Vec<types::Mount>, Status> {
    match snapshotter.mounts(OWNER, key) {
        Ok(mounts) => Ok(words(mounts)),
        Err(error) => {
            if let Err(left) = snapshotter.remove(OWNER, key) {
                tracing::error!(snapshot = key, error = %left, "cannot undo a failed prepare");
            }
            Err(error.into())
        }
    }
}

/// The labels of a request, in containerd's reading: an empty value is as good as none.
fn checked(labels: HashMap<String, String>) -> Result<BTreeMap<String, String>, Status> {
    for (key, value) in &labels {
        if key.len() + value.len() > LONGEST_LABEL {
            let start: String = key.chars().take(64).collect();
            return Err(Status::invalid_argument(format!(
                "the label {start:?} has {} bytes with its value, and {LONGEST_LABEL} are the limit; shorten it",
                key.len() + value.len()
            )));
        }
    }
    Ok(labels
        .into_iter()
        .filter(|(_, value)| !value.is_empty())
        .collect())
}

/// What Update is to do: only labels can change.
#[derive(Debug)]
struct LabelChange {
    wanted: BTreeMap<String, String>,
    /// Replace all of them.
    all: bool,
    /// Or these.
    keys: Vec<String>,
}

impl LabelChange {
    fn new(labels: HashMap<String, String>, paths: Vec<String>) -> Result<Self, Status> {
        let wanted = checked(labels)?;
        let mut all = paths.is_empty();
        let mut keys = Vec::new();
        for path in paths {
            if path == "labels" {
                all = true;
            } else if let Some(key) = path.strip_prefix("labels.").filter(|key| !key.is_empty()) {
                keys.push(key.to_owned());
            } else {
                return Err(Status::invalid_argument(format!(
                    "the field {path:?} of a snapshot cannot be changed; only \"labels\" and \"labels.KEY\" can"
                )));
            }
        }
        Ok(Self { wanted, all, keys })
    }

    fn apply(mut self, labels: &mut BTreeMap<String, String>) {
        if self.all {
            *labels = self.wanted;
            return;
        }
        for key in self.keys {
            match self.wanted.remove(&key) {
                Some(value) => labels.insert(key, value),
                None => labels.remove(&key),
            };
        }
    }
}

fn parent_of(key: String) -> Option<ParentRef> {
    (!key.is_empty()).then_some(ParentRef { owner: OWNER, key })
}

/// The fields that filters know.
fn field<'a>(info: &'a SnapshotInfo, path: &[String]) -> Option<&'a str> {
    let (first, rest) = path.split_first()?;
    match first.as_str() {
        "name" => Some(&info.key),
        "parent" => Some(info.parent.as_ref().map_or("", |parent| &parent.key)),
        "kind" => Some(match info.kind {
            Kind::View => "view",
            Kind::Active => "active",
            Kind::Committed => "committed",
        }),
        "labels" => info.labels.get(&rest.join(".")).map(String::as_str),
        _ => None,
    }
}

fn info(info: SnapshotInfo) -> api::Info {
    let kind = match info.kind {
        Kind::View => api::Kind::View,
        Kind::Active => api::Kind::Active,
        Kind::Committed => api::Kind::Committed,
    };
    api::Info {
        name: info.key,
        parent: info.parent.map_or_else(String::new, |parent| parent.key),
        kind: kind.into(),
        created_at: Some(info.created.into()),
        updated_at: Some(info.updated.into()),
        labels: info.labels.into_iter().collect(),
    }
}

fn words(mounts: Vec<Mount>) -> Vec<types::Mount> {
    mounts
        .into_iter()
        .map(|mount| types::Mount {
            r#type: mount.kind,
            source: mount.source,
            options: mount.options,
            ..types::Mount::default()
        })
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn map<M: FromIterator<(String, String)>>(pairs: &[(&str, &str)]) -> M {
        pairs
            .iter()
            .map(|(key, value)| ((*key).to_owned(), (*value).to_owned()))
            .collect()
    }

    fn updated(wanted: &[(&str, &str)], mask: &[&str]) -> BTreeMap<String, String> {
        let paths = mask.iter().map(|path| (*path).to_owned()).collect();
        let mut labels = map(&[("a.b/c", "old"), ("keep", "1")]);
        LabelChange::new(map(wanted), paths)
            .unwrap()
            .apply(&mut labels);
        labels
    }

    #[test]
    fn an_update_changes_what_its_mask_names() {
        let wanted = [("a.b/c", "new"), ("other", "2"), ("empty", "")];
        assert_eq!(
            updated(&wanted, &["labels.a.b/c"]),
            map(&[("a.b/c", "new"), ("keep", "1")])
        );
        assert_eq!(
            updated(&wanted, &["labels.keep", "labels.empty"]),
            map(&[("a.b/c", "old")])
        );
        let replaced = map(&[("a.b/c", "new"), ("other", "2")]);
        assert_eq!(updated(&wanted, &[]), replaced);
        assert_eq!(updated(&wanted, &["labels"]), replaced);
    }

    #[test]
    fn other_fields_and_huge_labels_are_refused() {
        for path in ["name", "parent", "kind", "created_at", "labels.", ""] {
            let status = LabelChange::new(HashMap::new(), vec![path.to_owned()]).unwrap_err();
            assert_eq!(status.code(), tonic::Code::InvalidArgument, "{path:?}");
        }
        let value = "x".repeat(LONGEST_LABEL - 1);
        assert!(checked(map(&[("k", &value)])).is_ok());
        let status = checked(map(&[("kk", &value)])).unwrap_err();
        assert_eq!(status.code(), tonic::Code::InvalidArgument);
    }
}
