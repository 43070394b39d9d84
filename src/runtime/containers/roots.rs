//! Where containers get their root file systems from.

use std::collections::BTreeMap;
use std::path::PathBuf;
use std::sync::Arc;

use crate::image::ImageStore;
use crate::snapshotter::{self, Owner, ParentRef, Snapshotter};
use crate::store::view::HeldDamage;

/// What the life cycle of containers needs of a snapshotter. Every method blocks.
pub trait Roots: Send + Sync + 'static {
    /// Makes a writable root on `parent`.
    fn prepare(&self, id: &str, parent: Option<&ParentRef>) -> snapshotter::Result<()>;
    /// Mounts it if it is not mounted and working; answers where.
    fn mount(&self, id: &str) -> snapshotter::Result<PathBuf>;
    /// Ends the mount, if there is one.
    fn unmount(&self, id: &str) -> snapshotter::Result<()>;
    /// Deletes it. That there is none is no error.
    fn remove(&self, id: &str) -> snapshotter::Result<()>;
    /// The ids of all roots.
    fn list(&self) -> snapshotter::Result<Vec<String>>;
    /// It is mounted, and what serves it lives.
    fn is_served(&self, id: &str) -> snapshotter::Result<bool>;
    /// How the merged view is damaged that its mount reads, if it is mounted and that is damaged. Reads all of it.
    fn view_damage(&self, id: &str) -> snapshotter::Result<Option<HeldDamage>>;
}

impl Roots for Snapshotter {
    fn prepare(&self, id: &str, parent: Option<&ParentRef>) -> snapshotter::Result<()> {
        self.prepare(Owner::Container, id, parent, BTreeMap::new())?;
        Ok(())
    }

    fn mount(&self, id: &str) -> snapshotter::Result<PathBuf> {
        Ok(self.mount(Owner::Container, id)?.path)
    }

    fn unmount(&self, id: &str) -> snapshotter::Result<()> {
        self.unmount(Owner::Container, id)
    }

    fn remove(&self, id: &str) -> snapshotter::Result<()> {
        match self.remove(Owner::Container, id) {
            Err(snapshotter::Error::NotFound { .. }) => Ok(()),
            result => result,
        }
    }

    fn list(&self) -> snapshotter::Result<Vec<String>> {
        let all = self.list(Some(Owner::Container))?;
        Ok(all.into_iter().map(|info| info.key).collect())
    }

    fn is_served(&self, id: &str) -> snapshotter::Result<bool> {
        self.is_served(Owner::Container, id)
    }

    fn view_damage(&self, id: &str) -> snapshotter::Result<Option<HeldDamage>> {
        self.view_damage(Owner::Container, id)
    }
}

/// Roots on the layers of images: those that only a removed container needed, because their image was
/// removed by force before it, go with it.
pub struct ImageRoots {
    /// Keeps the roots.
    pub snapshotter: Arc<Snapshotter>,
    /// Keeps the layers.
    pub images: Arc<ImageStore>,
}

impl Roots for ImageRoots {
    fn prepare(&self, id: &str, parent: Option<&ParentRef>) -> snapshotter::Result<()> {
        Roots::prepare(&*self.snapshotter, id, parent)
    }

    fn mount(&self, id: &str) -> snapshotter::Result<PathBuf> {
        Roots::mount(&*self.snapshotter, id)
    }

    fn unmount(&self, id: &str) -> snapshotter::Result<()> {
        Roots::unmount(&*self.snapshotter, id)
    }

    fn remove(&self, id: &str) -> snapshotter::Result<()> {
        Roots::remove(&*self.snapshotter, id)?;
        self.images.sweep_and_log();
        Ok(())
    }

    fn list(&self) -> snapshotter::Result<Vec<String>> {
        Roots::list(&*self.snapshotter)
    }

    fn is_served(&self, id: &str) -> snapshotter::Result<bool> {
        Roots::is_served(&*self.snapshotter, id)
    }

    fn view_damage(&self, id: &str) -> snapshotter::Result<Option<HeldDamage>> {
        Roots::view_damage(&*self.snapshotter, id)
    }
}
