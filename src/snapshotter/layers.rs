//! Committed snapshots whose content is a packed layer.

use std::collections::BTreeMap;
use std::io::Read;
use std::sync::Arc;

use super::Snapshotter;
use super::catalog::{self, SnapshotRecord};
use super::packed::HeldLayer;
use super::types::*;
use crate::store::LayerName;
use crate::store::ingest::{Observer, Settings};
use crate::store::layer::LayerId;
use crate::store::layers::{Expected, Layers};

impl Snapshotter {
    /// Takes a layer in as the committed snapshot `name`. `stream` is its tar, plain or compressed; it is not read
    /// if the store has the layer of that diff id already. The layers below have to be packed ones.
    pub fn commit_layer(
        &self,
        owner: Owner,
        name: &str,
        parent: Option<&ParentRef>,
        labels: BTreeMap<String, String>,
        layer: (impl Read + Send, &Expected<'_>),
        observer: &dyn Observer,
    ) -> Result<SnapshotInfo> {
        if name.is_empty() {
            return Err(Error::EmptyKey);
        }
        self.catalog.check_free(owner, name)?;
        let parent = parent
            .map(|parent| self.resolve_parent(parent))
            .transpose()?;
        let below = match &parent {
            Some(parent) => self.packed_below(parent)?,
            None => Vec::new(),
        };
        let (stream, expected) = layer;
        let imported = self.packed.import(below, stream, expected, observer)?;
        let record = SnapshotRecord {
            owner,
            key: name.to_owned(),
            kind: Kind::Committed,
            parent: parent.map(|parent| parent.id),
            labels,
            created: 0,
            updated: 0,
            layer: None,
            packed: Some(imported.name),
            usage: Some(imported.usage),
        };
        let found = self.catalog.insert(&catalog::new_id(), record)?;
        imported.used();
        self.refresh_mounts_and_log();
        self.describe(found)
    }

    /// How layers are packed.
    pub fn packing(&self) -> &Settings {
        &self.packing
    }

    /// Takes the packed layer of a committed snapshot in once more, if it is not whole; says whether it did. Without a need for it
    /// `stream` is not read.
    pub fn heal_layer(
        &self,
        owner: Owner,
        name: &str,
        layer: (impl Read + Send, &Expected<'_>),
        observer: &dyn Observer,
    ) -> Result<bool> {
        let found = self.catalog.resolve(owner, name)?;
        match found.record.packed {
            Some(packed) if !self.packed.layers().is_whole(packed) => {
                tracing::warn!(snapshot = name, layer = %packed, "a damaged layer is taken in once more");
                let (stream, expected) = layer;
                self.packed.restore(packed, stream, expected, observer)?;
                self.refresh_mounts_and_log();
                Ok(true)
            }
            _ => Ok(false),
        }
    }

    /// Makes the record of a layer of an image anew, if it cannot be used and the packed layer is there: `chain` are the chain ids
    /// of the image, `at` the place of the layer in it. Answers whether it did.
    pub fn restore_record(&self, chain: &[String], at: usize, diff_id: &str) -> Result<bool> {
        match self.record_to_restore(chain, at)? {
            Some(record) => self.record_known(record, diff_id, |record| {
                self.catalog.replace_damaged(record, chain, at)
            }),
            None => Ok(false),
        }
    }

    /// Has `write` write the record of a layer of an image that the store has; answers whether it did.
    pub(super) fn record_known(
        &self,
        mut record: SnapshotRecord,
        diff_id: &str,
        write: impl FnOnce(SnapshotRecord) -> Result<bool>,
    ) -> Result<bool> {
        let expected = Expected {
            blob: None,
            diff_id: Some(diff_id),
        };
        let layers = self.packed.layers();
        let known = layers.known(&expected);
        let Some(packed) = known.or_else(|| layers.recover(diff_id)) else {
            return Ok(false);
        };
        // Kept until the record says the same.
        let held = self.packed.hold(packed)?;
        record.packed = Some(packed);
        record.usage = Some(self.packed.usage(packed));
        let is_made = write(record)?;
        if is_made {
            // It is the record's now.
            std::mem::forget(held);
        }
        Ok(is_made)
    }

    /// As [`restore_record`](Self::restore_record), also if the packed layer is damaged or missing: `layer` is its stream and what
    /// that has to be, as for [`commit_layer`](Self::commit_layer).
    pub fn restore_record_from(
        &self,
        chain: &[String],
        at: usize,
        layer: (impl Read + Send, &Expected<'_>),
        observer: &dyn Observer,
    ) -> Result<bool> {
        let Some(mut record) = self.record_to_restore(chain, at)? else {
            return Ok(false);
        };
        let below = match at.checked_sub(1) {
            None => Vec::new(),
            Some(below) => {
                self.packed_below(&self.catalog.resolve(Owner::Image, &chain[below])?)?
            }
        };
        let (stream, expected) = layer;
        let imported = self.packed.import(below, stream, expected, observer)?;
        record.packed = Some(imported.name);
        record.usage = Some(imported.usage);
        let is_made = self.catalog.replace_damaged(record, chain, at)?;
        if is_made {
            imported.used();
        }
        self.refresh_mounts_and_log();
        Ok(is_made)
    }

    /// The record of a layer of an image, but for its packed layer, if the one that is there cannot be used. One of a layer that
    /// an earlier plyd left as a directory cannot be told.
    fn record_to_restore(&self, chain: &[String], at: usize) -> Result<Option<SnapshotRecord>> {
        let Some(id) = self.catalog.damaged_id(Owner::Image, chain, at)? else {
            return Ok(None);
        };
        if self.layers.contains(&LayerId(id)) {
            return Ok(None);
        }
        self.new_record(chain, at)
    }

    /// A record for the layer `at` of an image, but for its packed layer, if what it lies on has one.
    pub(super) fn new_record(&self, chain: &[String], at: usize) -> Result<Option<SnapshotRecord>> {
        let owner = Owner::Image;
        let parent = match at.checked_sub(1) {
            None => None,
            Some(below) => match self.catalog.find(owner, &chain[below])? {
                Some(found) => Some(found.id),
                None => return Ok(None),
            },
        };
        Ok(Some(SnapshotRecord {
            owner,
            key: chain[at].clone(),
            kind: Kind::Committed,
            parent,
            labels: BTreeMap::new(),
            created: 0,
            updated: 0,
            layer: None,
            packed: None,
            usage: None,
        }))
    }

    /// Takes a packed layer in once more, in place of what is damaged of it. Mounts read that anew after
    /// [`refresh_mounts`](Self::refresh_mounts).
    pub fn restore_layer(
        &self,
        layer: LayerName,
        stream: impl Read + Send,
        expected: &Expected<'_>,
        observer: &dyn Observer,
    ) -> Result<()> {
        self.packed.restore(layer, stream, expected, observer)
    }

    /// Lets the layers go that no snapshot has: those that a crash left, and those that were kept because they might have been those of
    /// snapshots whose records could not be read when plyd started, or were gone, if each of these has been made anew or
    /// removed. Answers whether that is so. To be called after [`open`](Self::open), once nobody tells of more snapshots.
    pub fn settle_records(&self) -> bool {
        let settled = self.catalog.is_complete().unwrap_or_else(|error| {
            tracing::warn!(%error, "layers stay that nobody may need");
            false
        });
        if settled {
            self.packed.settle();
        }
        settled
    }

    /// Whether layers are kept that [`settle_records`](Self::settle_records) may let go. Nothing is read for that.
    pub fn is_unsettled(&self) -> bool {
        self.packed.keeps_claimed()
    }

    /// Takes in what was put back if the record of that id is, before anybody changes that.
    pub(super) fn take_in(&self, id: &str) -> Result<()> {
        if self.catalog.knows(id) {
            return Ok(());
        }
        self.take_strays()
    }

    /// Takes in what was put back, if anything was.
    pub(super) fn take_strays(&self) -> Result<()> {
        if self.catalog.has_strays()? {
            for ParentRef { owner, key } in self.take_put_back()? {
                tracing::info!(%owner, key, "a record that was put back is used now");
            }
        }
        Ok(())
    }

    /// Takes in records that somebody has put back since plyd started; answers of which snapshots. Those of packed layers have to be
    /// known before. What was kept because of them is settled by [`settle_records`](Self::settle_records).
    pub fn take_put_back(&self) -> Result<Vec<ParentRef>> {
        self.catalog.take_put_back(
            |record| {
                if let Some(layer) = record.packed {
                    self.packed.count(layer);
                }
            },
            |joined| {
                if let Some(layer) = joined.packed {
                    self.packed.release(layer);
                }
            },
        )
    }

    /// Puts the names into the index that it has lost; says how many.
    pub fn mend_index(&self) -> Result<usize> {
        self.catalog.mend_index()
    }

    /// Keeps a packed layer while somebody reads it; its last snapshot may be removed meanwhile.
    pub fn hold_layer(&self, name: LayerName) -> Result<HeldLayer<'_>> {
        self.packed.hold(name)
    }

    /// The packed layers, to collect, verify and look at.
    pub fn packed_layers(&self) -> &Arc<Layers> {
        self.packed.layers()
    }
}
