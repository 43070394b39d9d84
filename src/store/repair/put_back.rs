//! What somebody has put back while the store is open.

use std::path::PathBuf;

use crate::store::error::Result;
use crate::store::format::LayerName;
use crate::store::layers::Layers;

/// What was not there when the store was opened, or could not be used, and is taken for what it is now.
#[derive(Debug, Default)]
pub struct PutBack {
    /// Layers whose records can be used.
    pub layers: Vec<LayerName>,
    /// Packs that have contents which were in no other.
    pub packs: Vec<PathBuf>,
    /// How many large contents have their files.
    pub files: usize,
}

impl Layers {
    /// Looks for what somebody has put back since the store was opened. What was known all the time needs no look: it is read where it
    /// lies.
    pub fn take_put_back(&self) -> Result<PutBack> {
        let mut put_back = PutBack::default();
        for layer in self.all() {
            if self.get(layer).is_none() && self.take_record(layer) {
                put_back.layers.push(layer);
            }
        }
        let found = {
            let _no_collection = self.collecting.lock();
            self.objects().take_put_back()
        };
        (put_back.packs, put_back.files) = found?;
        if !put_back.packs.is_empty() || put_back.files > 0 {
            // A mount may have looked for them in vain.
            self.note_mended();
            self.settle_healed();
        }
        Ok(put_back)
    }
}
