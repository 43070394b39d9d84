//! The words of the image store's interface.

use std::time::SystemTime;

use oci_spec::image::ImageConfiguration;

use crate::snapshotter::{Owner, ParentRef};

/// What is known of an image.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Image {
    /// Hex sha256 of the config blob: 64 digits.
    pub id: String,
    /// Every name, complete (`docker.io/library/busybox:latest`), in order. Empty when another image
    /// took the last one.
    pub names: Vec<String>,
    /// `sha256:...` of the manifest.
    pub manifest_digest: String,
    /// Digests of the uncompressed layers, the bottom first.
    pub diff_ids: Vec<String>,
    /// Chain id of the topmost layer; empty when there is no layer.
    pub chain_id: String,
    /// In GOARCH's words.
    pub architecture: String,
    /// In GOOS's words.
    pub os: String,
    /// When it was built, as its config says.
    pub created: Option<SystemTime>,
    /// Bytes of all layers on disk.
    pub size: u64,
}

impl Image {
    /// What a container's snapshot of this image builds on; `None` when the image has no layer.
    pub fn parent(&self) -> Option<ParentRef> {
        (!self.chain_id.is_empty()).then(|| ParentRef {
            owner: Owner::Image,
            key: self.chain_id.clone(),
        })
    }
}

/// An image with its documents as they were loaded.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ImageDetails {
    /// The image.
    pub image: Image,
    /// The config blob.
    pub config_json: String,
    /// The manifest blob.
    pub manifest_json: String,
}

/// What a container needs of an image.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ResolvedImage {
    /// The image.
    pub image: Image,
    /// How to run it.
    pub config: ImageConfig,
}

/// How an image wants to be run; empty where it says nothing.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct ImageConfig {
    /// First words of the command line.
    pub entrypoint: Vec<String>,
    /// Further words, those that a caller replaces.
    pub cmd: Vec<String>,
    /// `KEY=VALUE`.
    pub env: Vec<String>,
    /// `user`, `uid`, `user:group` or any mix.
    pub user: String,
    /// Absolute path in the container.
    pub working_dir: String,
    /// Name or number.
    pub stop_signal: String,
    /// Directories that the image wants to be volumes, in order.
    pub volumes: Vec<String>,
    /// Labels, in order.
    pub labels: std::collections::BTreeMap<String, String>,
    /// In GOARCH's words.
    pub architecture: String,
    /// In GOOS's words.
    pub os: String,
}

impl From<&ImageConfiguration> for ImageConfig {
    fn from(document: &ImageConfiguration) -> Self {
        let mut config = Self {
            architecture: document.architecture().to_string(),
            os: document.os().to_string(),
            ..Self::default()
        };
        if let Some(run) = document.config() {
            config.entrypoint = run.entrypoint().clone().unwrap_or_default();
            config.cmd = run.cmd().clone().unwrap_or_default();
            config.env = run.env().clone().unwrap_or_default();
            config.user = run.user().clone().unwrap_or_default();
            config.working_dir = run.working_dir().clone().unwrap_or_default();
            config.stop_signal = run.stop_signal().clone().unwrap_or_default();
            config.volumes = run.volumes().clone().unwrap_or_default();
            config.volumes.sort_unstable();
            config.labels = run
                .labels()
                .clone()
                .unwrap_or_default()
                .into_iter()
                .collect();
        }
        config
    }
}

/// What [`ImageStore::load`](super::ImageStore::load) has made of an image, or found to be there.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Loaded {
    /// The image, with all names that it has.
    pub image: Image,
    /// The names that it was given.
    pub given: Vec<String>,
}

/// What [`ImageStore::remove`](super::ImageStore::remove) did.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Removed {
    /// Names taken away.
    pub untagged: Vec<String>,
    /// Ids of images that are gone.
    pub removed: Vec<String>,
}

/// What a load is busy with.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Phase {
    /// Taking the archive in.
    Reading,
    /// Unpacking a layer.
    Unpacking,
    /// A layer is there already.
    Exists,
    /// A layer that is there already was damaged, and is taken in once more.
    Restoring,
    /// Looking through a layer for contents that others lack.
    Searching,
}

/// How far a load has come.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Progress {
    /// What is under way.
    pub phase: Phase,
    /// Digest of the blob it is about; empty while reading.
    pub digest: String,
    /// Bytes done.
    pub done: u64,
    /// Bytes to do; 0 when unknown.
    pub total: u64,
}

/// Whoever asked for a load: told of progress, asked whether it is still wanted.
pub trait Observer: Sync {
    /// Told now and then, from one thread at a time.
    fn progress(&self, progress: Progress);
    /// Whether to give up; asked often.
    fn cancelled(&self) -> bool;
}
