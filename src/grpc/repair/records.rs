//! Records that are made anew, and what layers have come as.

use std::collections::{HashMap, HashSet};
use std::fs::File;
use std::path::PathBuf;

use tonic::Status;

use super::Repair;
use crate::grpc::layers::shown;
use crate::snapshotter::{self, Owner};
use crate::store::{self, LayerName};

impl Repair {
    /// Notes which blobs layers have come as of which that is not known, as far as manifests of images say so; `made` are those
    /// whose records were made anew, which is told here.
    pub(super) fn claim_blobs(&self, made: &[LayerName]) {
        let layers = self.snapshotter.packed_layers();
        let mut claims: HashMap<LayerName, String> = HashMap::new();
        let mut unknown = HashSet::new();
        for (layer, diff_id) in layers.without_blob() {
            if layers
                .get(layer)
                .is_some_and(|record| record.blob.is_some())
            {
                continue;
            }
            let Some((blob, image)) = self.images.blob_of(&diff_id) else {
                unknown.insert(layer);
                continue;
            };
            match layers.claim_blob(layer, &blob) {
                Ok(()) => {
                    claims.insert(
                        layer,
                        format!(
                            "the digest of its blob, {blob}, is the one that the image {} gives",
                            shown(&image)
                        ),
                    );
                }
                Err(error) => {
                    tracing::warn!(%layer, %error, "the digest of a layer's blob cannot be noted");
                }
            }
        }
        for layer in made {
            let blob = match claims.remove(layer) {
                Some(claim) => format!("; {claim}"),
                None if unknown.contains(layer) => {
                    "; the digest of the blob that it came as is not known any more, for no image here has the layer; `snapctl system repair -i` with an archive that has it finds the digest again".to_owned()
                }
                // It came as none.
                None => String::new(),
            };
            let what =
                format!("the record of the layer {layer} was made anew from its index{blob}");
            self.mended(Some(*layer), what);
        }
        for (layer, claim) in claims {
            let what = format!("the record of the layer {layer} is complete again: {claim}");
            self.mended(Some(layer), what);
        }
    }

    /// Reads those layers of the archive of which nobody is sure which blob they have come as.
    pub(super) fn learn_blobs(&self, archive: &HashMap<String, PathBuf>) {
        let layers = self.snapshotter.packed_layers();
        for (layer, diff_id) in layers.without_blob() {
            let Some(path) = archive.get(&diff_id) else {
                continue;
            };
            let blob_of = || layers.get(layer).and_then(|record| record.blob);
            let was = blob_of();
            let learnt = File::open(path)
                .map_err(store::Error::Input)
                .and_then(|file| layers.learn_blob(layer, file, self));
            match learnt {
                // The manifest of an image said the same.
                Ok(true) if was == blob_of() => {}
                Ok(true) => {
                    let blob = blob_of().unwrap_or_default();
                    let what = format!(
                        "the record of the layer {layer} is complete again: the digest of its blob is {blob}, as the archive has it"
                    );
                    self.mended(Some(layer), what);
                }
                // It is not what the archive says, or it cannot be read, which harms nothing here.
                Ok(false) => {
                    tracing::warn!(%layer, "the archive has another layer under its diff id")
                }
                Err(error) => tracing::warn!(%layer, %error, "the archive's layer cannot be read"),
            }
        }
    }

    /// Writes records of snapshots, images and containers of which all is known.
    pub(super) fn mend_records(&self) -> Result<(), Status> {
        let stores = self.stores();
        let of_snapshots = self.snapshotter.mend_records()?.into_iter();
        let of_snapshots = of_snapshots.map(|of| stores.words(of.owner, &of.key));
        let of_images = self.images.mend_records().map_err(Status::from)?;
        let of_containers = self.runtime.block_on(self.containers.mend_records());
        for of in of_snapshots
            .chain(of_images)
            .chain(of_containers.map_err(Status::from)?)
        {
            let what = format!("the record of {of} was written again as it was");
            self.mended(None, what);
        }
        Ok(())
    }

    /// Makes records of images' layers anew of which nothing is known but what the images say.
    pub(super) fn restore_records(&self) -> Result<(), Status> {
        let stores = self.stores();
        if !stores.has_unknown_snapshots()? {
            return Ok(());
        }
        for (image, chain_ids) in self.images.chains() {
            // From below: one has to have what it lies on.
            for (at, diff_id) in image.diff_ids.iter().enumerate() {
                match self.restore_record(&chain_ids, at, diff_id) {
                    Ok(false) => {}
                    Ok(true) => {
                        let of = stores.words(Owner::Image, &chain_ids[at]);
                        let what =
                            format!("the record of {of} was made anew from what the image says");
                        self.mended(None, what);
                    }
                    Err(error) => {
                        tracing::warn!(image = image.id, %error, "the record of a layer of an image cannot be made anew");
                    }
                }
            }
        }
        Ok(())
    }

    /// Makes the record of the layer `at` of an image anew, if it cannot be used or is gone and the layer is there; says whether it
    /// did.
    fn restore_record(
        &self,
        chain_ids: &[String],
        at: usize,
        diff_id: &str,
    ) -> Result<bool, snapshotter::Error> {
        let snapshotter = &self.snapshotter;
        if snapshotter.restore_record(chain_ids, at, diff_id)? {
            return Ok(true);
        }
        match snapshotter.missing_layers([&*chain_ids[at]])?.is_empty() {
            true => Ok(false),
            false => snapshotter.restore_missing(chain_ids, at, diff_id),
        }
    }
}
