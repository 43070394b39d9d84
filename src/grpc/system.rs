//! `plywood.v1.System`: what this daemon is and what the host can do.

use std::path::PathBuf;
use std::sync::Arc;

use parking_lot::Mutex;
use tokio::sync::mpsc;
use tokio_stream::wrappers::ReceiverStream;
use tonic::{Request, Response, Status, Streaming};

use super::care;
use super::content::Content;
use super::damage::{DamageLog, Stores};
use super::images::Archive;
use super::pb::plywood as api;
use super::repair::Repair;
use super::space;
use super::status::blocking;
use crate::cow::Damage;
use crate::fuse::probe;
use crate::image::ImageStore;
use crate::runtime::containers::Containers;
use crate::snapshotter::Snapshotter;

/// Where this plyd keeps its things.
#[derive(Clone, Debug)]
pub struct Place {
    /// Root directory.
    pub root: PathBuf,
    /// State directory.
    pub state: PathBuf,
}

/// The service.
pub(super) struct Service {
    place: Place,
    snapshotter: Arc<Snapshotter>,
    images: Arc<ImageStore>,
    containers: Containers,
    content: Content,
}

impl Service {
    pub(super) fn new(
        place: Place,
        snapshotter: Arc<Snapshotter>,
        images: Arc<ImageStore>,
        containers: Containers,
        content: Content,
    ) -> Self {
        Self {
            place,
            snapshotter,
            images,
            containers,
            content,
        }
    }
}

#[tonic::async_trait]
impl api::system_server::System for Service {
    type RepairStream = ReceiverStream<Result<api::RepairResponse, Status>>;
    type VerifyStream = ReceiverStream<Result<api::VerifyResponse, Status>>;

    async fn collect(
        &self,
        request: Request<api::CollectRequest>,
    ) -> Result<Response<api::CollectResponse>, Status> {
        let dry_run = request.into_inner().dry_run;
        let (snapshotter, images) = (Arc::clone(&self.snapshotter), Arc::clone(&self.images));
        blocking(move || {
            let collected = care::collect(&snapshotter, &images, dry_run);
            Ok::<_, Status>(Response::new(collected))
        })
        .await
    }

    async fn verify(
        &self,
        request: Request<api::VerifyRequest>,
    ) -> Result<Response<Self::VerifyStream>, Status> {
        let (answers, answered) = mpsc::channel(care::ANSWERS_WAITING);
        let (snapshotter, images) = (Arc::clone(&self.snapshotter), Arc::clone(&self.images));
        let stores = (snapshotter, images, self.containers.clone());
        care::start_verify(stores, request.into_inner().deep, answers);
        Ok(Response::new(ReceiverStream::new(answered)))
    }

    async fn repair(
        &self,
        request: Request<Streaming<api::RepairRequest>>,
    ) -> Result<Response<Self::RepairStream>, Status> {
        let mut messages = request.into_inner();
        let Some(api::repair_request::Part::Start(start)) =
            messages.message().await?.and_then(|message| message.part)
        else {
            return Err(Status::invalid_argument(
                "the first message of Repair must carry `start`",
            ));
        };
        let archive = start.archive.then(|| {
            let archive = Archive::receive(messages, |message| match message.part {
                Some(api::repair_request::Part::Data(part)) => Some(part),
                _ => None,
            });
            (archive, start.total)
        });
        let (answers, answered) = mpsc::channel(care::ANSWERS_WAITING);
        let repair = Repair {
            snapshotter: Arc::clone(&self.snapshotter),
            images: Arc::clone(&self.images),
            containers: self.containers.clone(),
            content: self.content.clone(),
            runtime: tokio::runtime::Handle::current(),
            answers,
            log: Mutex::new(DamageLog::new("repair left")),
        };
        tokio::task::spawn_blocking(move || repair.run(archive));
        Ok(Response::new(ReceiverStream::new(answered)))
    }

    async fn disk_usage(
        &self,
        _request: Request<api::DiskUsageRequest>,
    ) -> Result<Response<api::DiskUsageResponse>, Status> {
        let root = self.place.root.clone();
        let (snapshotter, images) = (Arc::clone(&self.snapshotter), Arc::clone(&self.images));
        let containers = self.containers.clone();
        blocking(move || {
            space::disk_usage(&root, &snapshotter, &images, &containers).map(Response::new)
        })
        .await
    }

    async fn info(
        &self,
        _request: Request<api::InfoSystemRequest>,
    ) -> Result<Response<api::InfoSystemResponse>, Status> {
        let place = self.place.clone();
        let snapshotter = Arc::clone(&self.snapshotter);
        let images = Arc::clone(&self.images);
        let all_containers = self.containers.clone();
        let oci_runtime = match self.containers.oci_runtime().await {
            Ok(found) => api::OciRuntime {
                path: found.path.to_string_lossy().into_owned(),
                version: found.version.clone(),
                problem: String::new(),
            },
            Err(error) => api::OciRuntime {
                problem: error.to_string(),
                ..api::OciRuntime::default()
            },
        };
        let (containers, running) = self.containers.count();
        let cgroups = self.containers.cgroups().as_str().to_owned();
        blocking(move || {
            let fuse = probe::probe();
            let features = fuse.features.into_iter().map(|feature| api::Feature {
                name: feature.name.to_owned(),
                supported: feature.supported,
                in_use: feature.in_use,
                reason: feature.reason.unwrap_or_default(),
            });
            let mounted = snapshotter.mounted();
            let kernel = nix::sys::utsname::uname()
                .map(|name| name.release().to_string_lossy().into_owned())
                .map_err(|errno| Status::internal(format!("uname fails: {errno}")))?;
            let damage = snapshotter.damage(&mounted);
            let stores = Stores {
                snapshotter: &snapshotter,
                images: &images,
                containers: &all_containers,
            };
            let is_damaged = |damage: &&Damage| damage.contents > 0 || damage.view;
            Ok::<_, Status>(Response::new(api::InfoSystemResponse {
                version: env!("CARGO_PKG_VERSION").to_owned(),
                kernel,
                root: place.root.to_string_lossy().into_owned(),
                state: place.state.to_string_lossy().into_owned(),
                pid: std::process::id(),
                fuse_abi: fuse.abi.unwrap_or_default(),
                features: features.collect(),
                images: images.list()?.len() as u64,
                snapshots: snapshotter.count() as u64,
                mounts: mounted.len() as u64,
                oci_runtime: Some(oci_runtime),
                containers: containers as u64,
                containers_running: running as u64,
                cgroups,
                damaged_contents: damage.iter().map(|damage| damage.contents).sum(),
                damaged_mounts: damage.iter().filter(is_damaged).count() as u64,
                damaged_views: damage.iter().filter(|damage| damage.view).count() as u64,
                damaged_mounts_ended: snapshotter.damaged_and_ended(),
                damaged_records: stores.damaged_records(),
            }))
        })
        .await
    }
}
