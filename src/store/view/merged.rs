//! The tree of a chain in memory, ready for the next layer on it.

use super::tree::{LeftOut, Tree};
use crate::store::error::{Result, refused};
use crate::store::format::LayerName;
use crate::store::layer::index::LayerIndex;

/// Most layers of a view.
const MOST_LAYERS: usize = u16::MAX as usize;

/// What the layers of a chain make together.
pub(in crate::store) struct Merged {
    layers: Vec<LayerName>,
    pub(super) tree: Tree,
}

impl Merged {
    /// Of no layer.
    pub(in crate::store) fn new() -> Self {
        Self {
            layers: Vec::new(),
            tree: Tree::new(),
        }
    }

    /// Of all of these, the lowest first.
    pub(super) fn of(layers: &[LayerIndex]) -> Result<Self> {
        let mut merged = Self::new();
        for layer in layers {
            merged.add(layer)?;
        }
        Ok(merged)
    }

    /// The layers, the lowest first.
    pub(in crate::store) fn layers(&self) -> &[LayerName] {
        &self.layers
    }

    /// About how many bytes it takes in memory.
    pub(in crate::store) fn bytes(&self) -> usize {
        self.tree.bytes()
    }

    /// Says in the log what of the topmost layer no mount will show.
    pub(in crate::store) fn tell_left_out(&self) {
        let told = self.tree.left_out().zip(self.layers.last());
        let Some((
            LeftOut {
                path,
                attribute,
                count,
            },
            layer,
        )) = told
        else {
            return;
        };
        tracing::warn!(%layer, path, attribute, count, "mounts do not show extended attributes of a layer that its files cannot have; the first is named");
    }

    /// Puts a layer on top. Fails if an entry of it cannot be what it says on those below; part of it is there then, and
    /// the tree is that of no chain.
    pub(in crate::store) fn add(&mut self, layer: &LayerIndex) -> Result<()> {
        let number = u16::try_from(self.layers.len()).ok();
        let Some(number) = number.filter(|number| usize::from(*number) < MOST_LAYERS) else {
            let problem = format!("a chain of more than {MOST_LAYERS} layers is too long");
            return Err(refused(b"", problem));
        };
        self.tree.apply(layer, number)?;
        self.layers.push(layer.name());
        Ok(())
    }
}
