//! containerd's Snapshots service in the words of a test.

use std::collections::HashMap;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use nix::mount::{MntFlags, MsFlags};
use plywood::grpc::pb::containerd::services::snapshots::v1::snapshots_client::SnapshotsClient;
use plywood::grpc::pb::containerd::services::snapshots::v1::*;
use plywood::grpc::pb::containerd::types::Mount;
use prost_types::FieldMask;
use tonic::Status;
use tonic::transport::{Channel, Endpoint};

use super::common::Plyd;
use super::common::committed::Committed;

/// A client that waits for each answer.
pub struct Snapshots {
    runtime: tokio::runtime::Runtime,
    client: SnapshotsClient<Channel>,
    committed: Arc<Committed>,
}

pub fn labels(pairs: &[(&str, &str)]) -> HashMap<String, String> {
    pairs
        .iter()
        .map(|(key, value)| ((*key).to_owned(), (*value).to_owned()))
        .collect()
}

impl Snapshots {
    pub fn of(plyd: &Plyd) -> Self {
        let runtime = tokio::runtime::Builder::new_multi_thread()
            .worker_threads(1)
            .enable_all()
            .build()
            .unwrap();
        let endpoint = Endpoint::from_shared(plyd.address()).unwrap();
        let channel = runtime.block_on(endpoint.connect()).unwrap();
        let client = SnapshotsClient::new(channel);
        Self {
            runtime,
            client,
            committed: plyd.committed(),
        }
    }

    fn client(&self) -> SnapshotsClient<Channel> {
        self.client.clone()
    }

    pub fn prepare_with(
        &self,
        key: &str,
        parent: &str,
        labels: HashMap<String, String>,
    ) -> Result<Vec<Mount>, Status> {
        let request = PrepareSnapshotRequest {
            key: key.to_owned(),
            parent: parent.to_owned(),
            labels,
            ..Default::default()
        };
        let answer = self.runtime.block_on(self.client().prepare(request))?;
        Ok(answer.into_inner().mounts)
    }

    pub fn prepare(&self, key: &str, parent: &str) -> Result<Vec<Mount>, Status> {
        self.prepare_with(key, parent, HashMap::new())
    }

    pub fn view(&self, key: &str, parent: &str) -> Result<Vec<Mount>, Status> {
        let request = ViewSnapshotRequest {
            key: key.to_owned(),
            parent: parent.to_owned(),
            ..Default::default()
        };
        let answer = self.runtime.block_on(self.client().view(request))?;
        Ok(answer.into_inner().mounts)
    }

    pub fn mounts(&self, key: &str) -> Result<Vec<Mount>, Status> {
        let request = MountsRequest {
            key: key.to_owned(),
            ..Default::default()
        };
        let answer = self.runtime.block_on(self.client().mounts(request))?;
        Ok(answer.into_inner().mounts)
    }

    pub fn commit_with(
        &self,
        name: &str,
        key: &str,
        labels: HashMap<String, String>,
    ) -> Result<(), Status> {
        let request = CommitSnapshotRequest {
            name: name.to_owned(),
            key: key.to_owned(),
            labels,
            ..Default::default()
        };
        self.runtime.block_on(self.client().commit(request))?;
        self.committed.remember();
        Ok(())
    }

    pub fn commit(&self, name: &str, key: &str) -> Result<(), Status> {
        self.commit_with(name, key, HashMap::new())
    }

    pub fn remove(&self, key: &str) -> Result<(), Status> {
        self.committed.check();
        let request = RemoveSnapshotRequest {
            key: key.to_owned(),
            ..Default::default()
        };
        self.runtime.block_on(self.client().remove(request))?;
        Ok(())
    }

    pub fn stat(&self, key: &str) -> Result<Info, Status> {
        let request = StatSnapshotRequest {
            key: key.to_owned(),
            ..Default::default()
        };
        let answer = self.runtime.block_on(self.client().stat(request))?;
        Ok(answer.into_inner().info.unwrap())
    }

    pub fn update(&self, info: Info, paths: &[&str]) -> Result<Info, Status> {
        let request = UpdateSnapshotRequest {
            info: Some(info),
            update_mask: Some(FieldMask {
                paths: paths.iter().map(|path| (*path).to_owned()).collect(),
            }),
            ..Default::default()
        };
        let answer = self.runtime.block_on(self.client().update(request))?;
        Ok(answer.into_inner().info.unwrap())
    }

    /// Names, and how many messages they came in.
    pub fn list(&self, filters: &[&str]) -> Result<(Vec<String>, usize), Status> {
        let request = ListSnapshotsRequest {
            filters: filters.iter().map(|filter| (*filter).to_owned()).collect(),
            ..Default::default()
        };
        self.runtime.block_on(async {
            let mut stream = self.client().list(request).await?.into_inner();
            let (mut names, mut messages) = (Vec::new(), 0);
            while let Some(message) = stream.message().await? {
                messages += 1;
                names.extend(message.info.into_iter().map(|info| info.name));
            }
            Ok((names, messages))
        })
    }

    pub fn names(&self) -> Vec<String> {
        self.list(&[]).unwrap().0
    }

    pub fn usage(&self, key: &str) -> Result<UsageResponse, Status> {
        let request = UsageRequest {
            key: key.to_owned(),
            ..Default::default()
        };
        Ok(self
            .runtime
            .block_on(self.client().usage(request))?
            .into_inner())
    }

    pub fn cleanup(&self) -> Result<(), Status> {
        let request = CleanupRequest::default();
        self.runtime.block_on(self.client().cleanup(request))?;
        Ok(())
    }

    /// Prepares on `parent`, lets `write` work in it, commits as `name`.
    pub fn layer(&self, name: &str, parent: &str, write: impl FnOnce(&Path)) {
        let key = format!("extract {name}");
        let mounts = self.prepare(&key, parent).unwrap();
        write(&source(&mounts));
        self.commit(name, &key).unwrap();
    }
}

/// Where the snapshot is to be seen.
pub fn source(mounts: &[Mount]) -> PathBuf {
    assert_eq!(mounts.len(), 1);
    assert_eq!(mounts[0].r#type, "bind");
    PathBuf::from(&mounts[0].source)
}

/// What a consumer does with the answer: a bind, taken away at the end.
pub struct Bind(PathBuf);

impl Bind {
    pub fn new(mounts: &[Mount], at: &Path) -> Self {
        std::fs::create_dir_all(at).unwrap();
        let none: Option<&str> = None;
        let flags = MsFlags::MS_BIND | MsFlags::MS_REC;
        nix::mount::mount(Some(&source(mounts)), at, none, flags, none).unwrap();
        Self(at.to_owned())
    }
}

impl Drop for Bind {
    fn drop(&mut self) {
        let _ = nix::mount::umount2(&self.0, MntFlags::MNT_DETACH);
    }
}
