//! Layers of images whose records are gone.

use tonic::Status;

use super::Stores;
use crate::snapshotter::Owner;
use crate::store::record::Damaged;

impl Stores<'_> {
    /// Records of layers of images that are gone and of which only the images tell, each with what it is of, in words.
    pub(super) fn missing_layers(&self) -> Result<Vec<(Damaged, String)>, Status> {
        let missing = self.images.missing_layers().map_err(Status::from)?;
        let missing = missing.into_iter();
        let missing = missing.map(|(key, damaged)| (damaged, self.words(Owner::Image, &key)));
        Ok(missing.collect())
    }

    /// Whether of some snapshots nobody knows what they have.
    pub(in crate::grpc) fn has_unknown_snapshots(&self) -> Result<bool, Status> {
        Ok(!self.snapshotter.damaged_records()?.is_empty() || !self.missing_layers()?.is_empty())
    }
}
