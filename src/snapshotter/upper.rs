//! The upper directory of a snapshot: how it starts and how it becomes durable.

use std::fs::{self, DirBuilder, File};
use std::io;
use std::os::unix::fs::{DirBuilderExt, MetadataExt, PermissionsExt, chown};
use std::path::Path;

/// Mode of the root of a snapshot on nothing.
const ROOT_MODE: u32 = 0o755;

/// Makes the directory whose owner, mode and times a mount shows as those of its root: those of the
/// layer below, for a change of the root is a change like any other.
pub(super) fn make(dir: &Path, below: Option<&Path>) -> io::Result<()> {
    DirBuilder::new().mode(0o700).create(dir)?;
    let Some(below) = below else {
        // Not through the builder: the umask would take part.
        return fs::set_permissions(dir, fs::Permissions::from_mode(ROOT_MODE));
    };
    let like = fs::symlink_metadata(below)?;
    chown(dir, Some(like.uid()), Some(like.gid()))?;
    fs::set_permissions(dir, fs::Permissions::from_mode(like.mode() & 0o7777))?;
    let times = fs::FileTimes::new()
        .set_accessed(like.accessed()?)
        .set_modified(like.modified()?);
    File::open(dir)?.set_times(times)
}

/// Makes everything in the upper durable: data, metadata and names.
pub(super) fn sync(dir: &Path) -> io::Result<()> {
    Ok(nix::unistd::syncfs(&File::open(dir)?)?)
}
