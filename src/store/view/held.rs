//! Merged views that a process has open, whatever their names are now.

use std::fs;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use super::{Verify, View};
use crate::store::error::{Error, Result, io_error};
use crate::store::format::ViewKey;
use crate::store::layers::Layers;

/// A merged view that a process has open.
#[derive(Debug)]
pub struct HeldView {
    /// Leads to the file as long as the process has it open.
    path: PathBuf,
    key: ViewKey,
    /// Device and inode.
    file: (u64, u64),
}

/// How a merged view is damaged that a process has open.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum HeldDamage {
    /// It may be written in its place, below who reads it.
    Restorable,
    /// Not even its header is sound, which says what belongs there: only another one can be read.
    Lost,
}

impl HeldView {
    /// Whether it is the file at `path`.
    pub fn is_at(&self, path: &Path) -> bool {
        fs::metadata(path).is_ok_and(|metadata| (metadata.dev(), metadata.ino()) == self.file)
    }
}

impl Layers {
    /// The merged views of this store that the process `pid` has open; none if it has ended.
    pub fn views_held_by(&self, pid: u32) -> Result<Vec<HeldView>> {
        let views = self.views();
        // As the kernel shows paths.
        let views = fs::canonicalize(&views).map_err(io_error("resolve", &views))?;
        let dir = PathBuf::from(format!("/proc/{pid}/fd"));
        let entries = match fs::read_dir(&dir).map_err(io_error("list", &dir)) {
            Err(error) if error.is_not_found() => return Ok(Vec::new()),
            entries => entries?,
        };
        let mut held = Vec::new();
        for entry in entries {
            let path = entry.map_err(io_error("list", &dir))?.path();
            // Nothing else of what is open is looked at: it may lie on a mount that hangs.
            let key = fs::read_link(&path).ok().and_then(|target| {
                let is_view = target.parent() == Some(&*views);
                let name = target.file_name().filter(|_| is_view)?;
                name.to_str()?.split(['.', '-']).next()?.parse().ok()
            });
            // Closed meanwhile.
            if let Some((key, metadata)) = key.zip(fs::metadata(&path).ok()) {
                let file = (metadata.dev(), metadata.ino());
                held.push(HeldView { path, key, file });
            }
        }
        Ok(held)
    }

    /// Reads all of a view that a process has open; says how it is damaged, if it is.
    pub fn damage_of_held(&self, view: &HeldView) -> Result<Option<HeldDamage>> {
        let objects = Arc::clone(self.objects());
        let opened = View::open(&view.path, view.key, objects, Verify::Never);
        match opened {
            Ok(opened) => Ok(opened.verify().err().map(|_| HeldDamage::Restorable)),
            Err(error) if error.is_not_found() => Ok(None),
            Err(Error::Damaged { .. }) => Ok(Some(HeldDamage::Lost)),
            Err(error) => Err(error),
        }
    }
}
