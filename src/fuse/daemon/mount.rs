//! The mount of a `plyfs` process.

use std::fs;
use std::path::{Path, PathBuf};

use super::log_refusal;
use crate::sys::{fuse_mount, mountinfo};

/// Read-ahead of the mount, in KiB, where the host lets us set it.
const READ_AHEAD_KB: u32 = 1024;

/// Our entry in the mount table, so that never somebody else's mount is taken away.
pub(super) struct Mount {
    pub(super) target: PathBuf,
    entry: Option<mountinfo::MountEntry>,
}

impl Mount {
    pub(super) fn find(target: &Path) -> Self {
        let entry = mountinfo::at(target).ok().flatten();
        Self {
            target: target.to_owned(),
            entry: entry.filter(|entry| entry.fstype.starts_with("fuse")),
        }
    }

    pub(super) fn set_read_ahead(&self) {
        if let Some(entry) = &self.entry {
            let path = format!("/sys/class/bdi/{}/read_ahead_kb", entry.device);
            log_refusal(
                "the mount's read-ahead",
                fs::write(path, READ_AHEAD_KB.to_string()),
            );
        }
    }

    /// The number that the kernel gives the mount's device.
    pub(super) fn device(&self) -> Option<u64> {
        let (major, minor) = self.entry.as_ref()?.device.split_once(':')?;
        Some(libc::makedev(major.parse().ok()?, minor.parse().ok()?))
    }

    /// Takes the mount away if it is still there.
    pub(super) fn remove(&self) {
        let Some(entry) = &self.entry else { return };
        if mountinfo::at(&self.target).ok().flatten().as_ref() != Some(entry) {
            return;
        }
        if let Err(error) = fuse_mount::unmount_lazily(&self.target) {
            tracing::error!(%error, "the mount could not be taken away");
        }
    }
}
