//! All images of one plyd.

use std::io::Read;
use std::path::Path;
use std::sync::Arc;

use super::{Image, ImageDetails, Observer, Removed, ResolvedImage, Result};
use crate::snapshotter::Snapshotter;

/// All images of one plyd. Every method blocks and may be called from any thread; asynchronous
/// callers go through `spawn_blocking`. What a method has acknowledged is durable.
pub struct ImageStore {}

#[allow(
    unused_variables,
    clippy::todo,
    reason = "signatures to build against; the bodies follow"
)]
impl ImageStore {
    /// Reads the records below `root` (plyd's root) and clears what a crash left.
    pub fn open(root: &Path, snapshotter: Arc<Snapshotter>) -> Result<Self> {
        todo!()
    }

    /// Reads one image archive to its end and keeps every image in it. `name`, if given, is the
    /// image's name in place of those in the archive. `total`: bytes of the archive, 0 when unknown.
    pub fn load(
        &self,
        archive: &mut (dyn Read + Send),
        name: Option<&str>,
        total: u64,
        observer: &dyn Observer,
    ) -> Result<Vec<Image>> {
        todo!()
    }

    /// All images, ordered by name.
    pub fn list(&self) -> Result<Vec<Image>> {
        todo!()
    }

    /// One image by name, digest or unique prefix of its id.
    pub fn inspect(&self, reference: &str) -> Result<ImageDetails> {
        todo!()
    }

    /// As `inspect`, for whoever wants to run it.
    pub fn resolve(&self, reference: &str) -> Result<ResolvedImage> {
        todo!()
    }

    /// Takes one name away, or all when `reference` is no name; the image goes with its last name.
    /// `user_of` names what uses an image (by id); it is asked before an image goes, unless `force`.
    pub fn remove(
        &self,
        reference: &str,
        force: bool,
        user_of: &dyn Fn(&str) -> Option<String>,
    ) -> Result<Removed> {
        todo!()
    }
}
