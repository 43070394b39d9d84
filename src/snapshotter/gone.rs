//! Layers of images that have no snapshot any more, for the record is gone.

use super::Snapshotter;
use super::catalog;
use super::types::*;
use crate::store::record::Damaged;

impl Snapshotter {
    /// Those keys of layers of images that no snapshot has and that no [damaged record](Self::damaged_records) is of, each with what
    /// is told of its record. None if there is a damaged one of which nobody can tell whose it is, for it may be theirs.
    pub fn missing_layers<'a>(
        &self,
        keys: impl IntoIterator<Item = &'a str>,
    ) -> Result<Vec<(String, Damaged)>> {
        let mut missing = self.catalog.unknown_layers(keys);
        if missing.is_empty() {
            return Ok(Vec::new());
        }
        for damaged in self.damaged_records()? {
            match damaged.of {
                None => return Ok(Vec::new()),
                Some(of) => missing.retain(|key| of.owner != Owner::Image || of.key != *key),
            }
        }
        let missing = missing.into_iter().map(|key| {
            let damaged = self.catalog.gone_layer(&key)?;
            Ok((key, damaged))
        });
        missing.collect()
    }

    /// Whether a snapshot is known for each of these keys of layers of images.
    pub fn has_snapshots<'a>(&self, keys: impl IntoIterator<Item = &'a str>) -> bool {
        self.catalog.unknown_layers(keys).is_empty()
    }

    /// Makes the record of one of the [`missing_layers`](Self::missing_layers) anew, if the packed layer is there: `chain` are the
    /// chain ids of the image, `at` the place of the layer in it. Answers whether it did.
    pub fn restore_missing(&self, chain: &[String], at: usize, diff_id: &str) -> Result<bool> {
        match self.new_record(chain, at)? {
            Some(record) => self.record_known(record, diff_id, |record| {
                self.catalog
                    .insert(&catalog::new_id(), record)
                    .map(|_| true)
            }),
            None => Ok(false),
        }
    }
}

#[cfg(test)]
mod tests;
