//! Contents that layers lack, out of the streams of others.

use std::io::Read;

use crate::store::error::Result;
use crate::store::format::LayerName;
use crate::store::ingest::{self, Observer, Wanted};
use crate::store::layers::Layers;

/// Contents that were damaged or missing when they were last looked at, and that layers need.
#[derive(Debug, Default)]
pub struct Lacking(Wanted);

impl Lacking {
    /// Whether there are none.
    pub fn is_empty(&self) -> bool {
        self.0.is_empty()
    }

    /// How many they are.
    pub fn len(&self) -> usize {
        self.0.len()
    }
}

impl Layers {
    /// What these layers lack, as far as their indexes can tell.
    pub fn lacking(&self, layers: impl IntoIterator<Item = LayerName>) -> Lacking {
        let mut lacking = Wanted::new();
        for layer in layers {
            // Of one whose index is damaged nobody knows what it has, and of what cannot be read of it that was told.
            let Ok(index) = self.index(layer) else {
                continue;
            };
            let objects = (0..index.object_count()).filter_map(|number| index.object(number).ok());
            let doubted = objects.filter(|object| self.objects().is_doubted(&object.name));
            lacking.extend(doubted.map(|object| (object.name, object.size)));
        }
        Lacking(lacking)
    }

    /// Takes what is `lacking` out of the stream of any layer, a tar as for [`import`](Self::import). What it has is durable then, and
    /// not lacking any more, also where the stream ends badly after that. Memory is bounded as for an import, and nothing else of the
    /// stream is kept, nor read once nothing is lacking.
    pub fn pick(
        &self,
        stream: impl Read + Send,
        lacking: &mut Lacking,
        observer: &dyn Observer,
    ) -> Result<()> {
        let objects = self.objects();
        // What was replaced is remembered as long as this is held.
        let _importing = objects.importing();
        let (stored, ended) = ingest::pick(
            stream,
            &lacking.0,
            objects,
            self.tmp(),
            self.settings(),
            observer,
        )?;
        self.keep_contents(stored)?;
        self.settle_healed();
        lacking.0.retain(|name, _| objects.is_doubted(name));
        match lacking.is_empty() {
            // Maybe it was not read to its end.
            true => Ok(()),
            false => ended,
        }
    }
}
