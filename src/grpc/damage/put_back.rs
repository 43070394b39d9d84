//! What somebody has put back while plyd runs.

use tokio::runtime::Handle;
use tonic::Status;

use super::Stores;

impl Stores<'_> {
    /// Takes in what was put back since plyd started, from below: what stands on something finds that. Says what it was, a sentence
    /// for each. Blocks.
    pub(in crate::grpc) fn take_put_back(&self, runtime: &Handle) -> Result<Vec<String>, Status> {
        let put_back = self.snapshotter.packed_layers().take_put_back()?;
        let mut taken: Vec<String> = put_back
            .layers
            .iter()
            .map(|layer| format!("the record of the layer {layer}"))
            .collect();
        let snapshots = self.snapshotter.take_put_back()?;
        let images = self.images.take_put_back().map_err(Status::from)?;
        let containers = runtime.block_on(self.containers.take_put_back());
        let records = images
            .into_iter()
            // Of which images they are the layers is known now.
            .chain(snapshots.iter().map(|of| self.words(of.owner, &of.key)))
            .chain(containers.map_err(Status::from)?);
        taken.extend(records.map(|of| format!("the record of {of}")));
        taken.extend(
            put_back
                .packs
                .iter()
                .map(|pack| format!("the pack {}", pack.display())),
        );
        taken.extend(match put_back.files {
            0 => None,
            1 => Some("the file of a large content".to_owned()),
            files => Some(format!("the files of {files} large contents")),
        });
        let told = taken.into_iter();
        let told = told.map(|what| format!("{what} was put back while plyd ran, and is used now"));
        Ok(told.collect())
    }
}
