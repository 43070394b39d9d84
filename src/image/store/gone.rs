//! Records that are gone, though those of images say that they were there.
//!
//! An image is recorded after the last of its layers, which are pinned until then, and its record is removed before the first of them;
//! nobody but the sweep removes them, and that asks what images there are under the lock under which these change. So an image
//! that is known has all its layers at any moment, also after a kill or a power cut, and one that is missing has lost its record.

use super::{Error, Image, ImageStore, Records, Result, find};
use crate::image::reference;
use crate::store::record::{self, Damaged};

impl ImageStore {
    /// Chain ids of layers of images that have no snapshot, and of which no damaged record of one tells, each with what is told of its
    /// record, which is gone.
    pub fn missing_layers(&self) -> Result<Vec<(String, Damaged)>> {
        self.missing_layers_of(&self.records.lock())
    }

    fn missing_layers_of(&self, records: &Records) -> Result<Vec<(String, Damaged)>> {
        let chains: Vec<Vec<String>> = records.chains().map(|(_, chain)| chain).collect();
        self.unpacker.missing(chains.iter().flatten())
    }

    /// Says in the log what is missing.
    pub(super) fn log_missing(&self) -> Result<()> {
        let records = self.records.lock();
        for (chain_id, damaged) in self.missing_layers_of(&records)? {
            let chains = records.chains();
            let mut of = chains.filter(|(_, chain)| chain.contains(&chain_id));
            let image = of.next().map(|(image, _)| records.words(&image.id));
            tracing::error!(chain_id, image, "{damaged}");
        }
        Ok(())
    }

    /// Lets the layers go that were kept for snapshots whose records cannot be used or are gone, if there are none. While
    /// the record of an image or of a name is so, nobody knows which layers are.
    pub fn settle_layers(&self) {
        let records = self.records.lock();
        let chains: Vec<Vec<String>> = records.chains().map(|(_, chain)| chain).collect();
        if records.all_damaged().next().is_none() && self.unpacker.has_all(chains.iter().flatten())
        {
            self.unpacker.settle_records();
        }
    }

    /// Whether there is an image of that id, whose record need not be one that can be used.
    pub(super) fn is_here(&self, id: &str) -> Result<bool> {
        let records = self.records.lock();
        let mut unsound = records.examine()?.images.into_iter();
        Ok(records.image(id).is_some() || unsound.any(|damaged| damaged.id == id))
    }
}

/// As [`find`], also an image whose record cannot be used, or is gone.
pub(super) fn find_to_remove(
    records: &Records,
    reference: &str,
) -> Result<(Image, Option<String>)> {
    match find(records, reference) {
        Err(Error::Record(record::Error::Damaged(damaged))) => {
            let Some(image) = records.unreadable(&damaged.id) else {
                return Err(record::Error::from(damaged).into());
            };
            records.check_replaceable(&image.id, &image.names)?;
            let names = reference::candidates(reference)?.names.into_iter();
            let name = names.into_iter().find(|name| image.names.contains(name));
            Ok((image, name))
        }
        found => found,
    }
}
