//! Where all trees of a run lie: on ext4, which the table is about.

use std::path::PathBuf;

use nix::sys::statfs::{EXT4_SUPER_MAGIC, statfs};
use tempfile::TempDir;

use crate::common::disk::{Attached, Disk};

/// A directory on ext4. Where the temporary directory is on something else, a file in it is mounted.
pub struct Base {
    // Before the directory, so that it is unmounted first.
    _disk: Option<Attached>,
    _dir: TempDir,
    path: PathBuf,
    is_ext4: bool,
}

impl Base {
    /// Made for one run, removed when dropped.
    pub fn new() -> Self {
        const MIB: u32 = 8192;
        let prefix = "ply-semantics.";
        let dir = tempfile::Builder::new().prefix(prefix).tempdir().unwrap();
        let open = std::os::unix::fs::PermissionsExt::from_mode(0o755);
        std::fs::set_permissions(dir.path(), open).unwrap();
        let path = dir.path().join("disk");
        std::fs::create_dir(&path).unwrap();
        let is_ext4 = || statfs(&path).unwrap().filesystem_type() == EXT4_SUPER_MAGIC;
        let disk = match is_ext4() {
            true => None,
            false => Disk::Ext4 {
                mib: MIB,
                reserved: 0,
            }
            .attach(&path),
        };
        Self {
            is_ext4: is_ext4(),
            _disk: disk,
            _dir: dir,
            path,
        }
    }

    /// A directory for one row.
    pub fn directory(&self) -> TempDir {
        let dir = tempfile::tempdir_in(&self.path).unwrap();
        let open = std::os::unix::fs::PermissionsExt::from_mode(0o755);
        std::fs::set_permissions(dir.path(), open).unwrap();
        dir
    }

    /// Whether it is what the first column says.
    pub fn is_ext4(&self) -> bool {
        self.is_ext4
    }
}
