//! The content of committed snapshots: immutable layers.
//!
//! Today a layer is a directory in overlayfs format, `DIR/ID`, and a union takes it as it is. This
//! module and whoever opens a union know that, and the comparison of snapshots
//! (`snapshotter::diff`), which has to change when layers are packed. Everyone else holds a [`LayerId`].
//! [`index`] is that of a packed layer.

pub mod index;

use std::fs;
use std::io;
use std::path::{Path, PathBuf};

use super::durable::{create_dir, sync_dir};
use super::trash::Trash;

/// Names a layer. Never reused.
#[derive(
    Clone, Debug, PartialEq, Eq, Hash, PartialOrd, Ord, serde::Serialize, serde::Deserialize,
)]
pub struct LayerId(pub String);

/// All layers of a root.
#[derive(Debug)]
pub struct LayerStore {
    dir: PathBuf,
}

impl LayerStore {
    /// Opens the directory, making it if it is missing.
    pub fn open(dir: &Path) -> io::Result<Self> {
        create_dir(dir, 0o700)?;
        let dir = dir.to_owned();
        Ok(Self { dir })
    }

    /// Where they lie.
    pub fn dir(&self) -> &Path {
        &self.dir
    }

    /// Makes the tree at `upper`, whose content is durable already and has no writer any more, the
    /// layer `id`. One rename, durable on return.
    pub fn adopt(&self, id: &LayerId, upper: &Path) -> io::Result<()> {
        fs::rename(upper, self.dir.join(&id.0))?;
        sync_dir(&self.dir)
    }

    /// The reverse of [`adopt`](Self::adopt), for a layer that no record came to name.
    pub fn give_back(&self, id: &LayerId, upper: &Path) -> io::Result<()> {
        fs::rename(self.dir.join(&id.0), upper)?;
        sync_dir(&self.dir)
    }

    /// What a union takes as a lower.
    pub fn lower_of(&self, id: &LayerId) -> PathBuf {
        self.dir.join(&id.0)
    }

    /// Whether the layer is there.
    pub fn contains(&self, id: &LayerId) -> bool {
        self.dir.join(&id.0).is_dir()
    }

    /// All layers, also those that no record names.
    pub fn list(&self) -> io::Result<Vec<LayerId>> {
        let mut layers = Vec::new();
        for entry in fs::read_dir(&self.dir)? {
            // A name that is not UTF-8 is not one of ours.
            if let Ok(name) = entry?.file_name().into_string() {
                layers.push(LayerId(name));
            }
        }
        Ok(layers)
    }

    /// Removes a layer that no record names any more.
    pub fn remove(&self, id: &LayerId, trash: &Trash) -> io::Result<()> {
        trash.put(&self.dir.join(&id.0))
    }
}
