//! A row of the table: one sentence and the function that finds out whether it holds.

use crate::common::disk::Disk;
use crate::fill::Fill;
use crate::outcome::Outcome;
use crate::place::Place;

/// One row.
pub struct Row {
    /// Chapter and name, as `links::survive_copy_up`.
    pub name: String,
    /// What holds where the table says `yes`.
    pub promise: &'static str,
    /// Fills the lower directories.
    pub fill: fn(&Fill),
    /// Runs on a mounted tree.
    pub run: fn(&Place) -> Outcome,
    /// Everything lies on a small file system of its own.
    pub disk: Option<Disk>,
    /// Paths in the lowers are longer than the look at them before and after can take.
    pub unseen: bool,
    /// Only plyfs is asked: a property of its process, or too long for all.
    pub plyfs_alone: bool,
}

impl Row {
    /// The tree lies on an ext4 file system of its own, which the row may fill or break.
    pub fn on_disk_of(mut self, mib: u32) -> Self {
        self.disk = Some(Disk::Ext4 { mib, reserved: 0 });
        self
    }

    /// The tree lies on a btrfs file system of its own, whose quotas hold for root too.
    pub fn on_quota_disk(mut self) -> Self {
        self.disk = Some(Disk::Btrfs);
        self
    }

    /// The lowers are not looked at before and after.
    pub fn unseen(mut self) -> Self {
        self.unseen = true;
        self
    }

    /// The other file systems are not asked.
    pub fn plyfs_alone(mut self) -> Self {
        self.plyfs_alone = true;
        self
    }
}

/// A row without its chapter.
pub fn row(name: &str, promise: &'static str, fill: fn(&Fill), run: fn(&Place) -> Outcome) -> Row {
    Row {
        name: name.to_owned(),
        promise,
        fill,
        run,
        disk: None,
        unseen: false,
        plyfs_alone: false,
    }
}

/// For rows that start with an empty lower directory.
pub fn nothing(_: &Fill) {}
