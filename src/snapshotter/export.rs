//! A snapshot as plain overlayfs directories, for a host that goes on with kernel overlayfs.

use std::ffi::OsString;
use std::fs;
use std::path::{Path, PathBuf};

use super::types::{Kind, Owner, Result, io_error, plyfs_error};
use super::{Found, Snapshotter};
use crate::cow::Union;
use crate::cow::export::{Links, copy_index, copy_layer, copy_upper, copy_view, escaped};

/// Directories that kernel overlayfs mounts.
#[derive(Clone, Debug)]
pub struct ExportedOverlay {
    /// Lower directories, the topmost first. All packed layers are one.
    pub lowers: Vec<PathBuf>,
    /// Upper and work directory of what was an active snapshot.
    pub upper: Option<(PathBuf, PathBuf)>,
}

impl ExportedOverlay {
    /// What follows `mount -t overlay overlay -o`.
    pub fn options(&self) -> OsString {
        let mut options = OsString::from("lowerdir=");
        for (n, lower) in self.lowers.iter().enumerate() {
            if n > 0 {
                options.push(":");
            }
            options.push(escaped(lower));
        }
        if let Some((upper, work)) = &self.upper {
            options.push(",upperdir=");
            options.push(escaped(upper));
            options.push(",workdir=");
            options.push(escaped(work));
            options.push(",index=on");
        }
        options.push(",redirect_dir=on,metacopy=on");
        options
    }
}

impl Snapshotter {
    /// Copies a snapshot's layers into `dir`, which is made: one lower directory for each committed layer, and an
    /// upper and a work directory for an active snapshot. What was written to its mount before is in the copy; what is
    /// written meanwhile may be. A failure leaves nothing behind.
    pub fn export_overlay(&self, owner: Owner, key: &str, dir: &Path) -> Result<ExportedOverlay> {
        self.locked(owner, key, |found| {
            fs::create_dir(dir).map_err(io_error("make", dir))?;
            let exported = self.export_into(&found, dir);
            if exported.is_err()
                && let Err(error) = fs::remove_dir_all(dir)
            {
                tracing::error!(dir = %dir.display(), %error, "what a failed export has left cannot be removed");
            }
            exported
        })
    }

    fn export_into(&self, found: &Found, dir: &Path) -> Result<ExportedOverlay> {
        let mut links = Links::default();
        let below = self.below(found)?;
        let mut lowers = Vec::new();
        for layer in &below.lowers {
            let to = dir.join(format!("lower{}", lowers.len()));
            copy_layer(layer, &to, &mut links).map_err(io_error("copy", layer))?;
            lowers.push(to);
        }
        if let Some(view) = &below.view {
            let to = dir.join(format!("lower{}", lowers.len()));
            copy_view(view, &to, &mut links)
                .map_err(io_error("write the packed layers to", &to))?;
            lowers.push(to);
        }
        let mut upper = None;
        let active = found.record.kind == Kind::Active;
        if active {
            let data = self.data.join(&found.id);
            let from = data.join("upper");
            self.mounts.flush(&found.id).map_err(plyfs_error(
                "flush the mount of",
                &from,
                &found.record.key,
            ))?;
            let (to, work) = (dir.join("upper"), dir.join("work"));
            let shown = Union::open(below.under_upper(&data).union())?;
            copy_upper(&from, &to, &mut links, &shown).map_err(io_error("copy", &from))?;
            let original = data.join("work");
            match original.join("index").exists() && !below.is_empty() {
                true => copy_index(&original, below.view.as_deref(), &work, &links)
                    .map_err(io_error("copy the index of hard links of", &from))?,
                false => fs::create_dir(&work).map_err(io_error("make", &work))?,
            }
            upper = Some((to, work));
        }
        // Without an upper overlayfs wants two lower directories, with one it wants one.
        let least = if active { 1 } else { 2 };
        while lowers.len() < least {
            let empty = dir.join(format!("empty{}", lowers.len()));
            fs::create_dir(&empty).map_err(io_error("make", &empty))?;
            lowers.push(empty);
        }
        Ok(ExportedOverlay { lowers, upper })
    }
}
