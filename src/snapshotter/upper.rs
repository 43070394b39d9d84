//! The upper directory of a snapshot: how it starts and how it becomes durable.

use std::fs::{self, DirBuilder, File};
use std::io;
use std::os::fd::AsFd;
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::{DirBuilderExt, MetadataExt, PermissionsExt, chown};
use std::path::Path;

use nix::errno::Errno;

use crate::sys::fs::Object;
use crate::sys::xattr;

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
    copy_xattrs(below, dir)?;
    let times = fs::FileTimes::new()
        .set_accessed(like.accessed()?)
        .set_modified(like.modified()?);
    File::open(dir)?.set_times(times)
}

/// All but the union's own marks.
fn copy_xattrs(from: &Path, to: &Path) -> io::Result<()> {
    let (from, to) = (File::open(from)?, File::open(to)?);
    let (from, to) = (Object::Open(from.as_fd()), Object::Open(to.as_fd()));
    let names = match xattr::list(from) {
        Err(Errno::EOPNOTSUPP) => return Ok(()),
        names => names?,
    };
    for name in names {
        let is_mark = [b"trusted.overlay.".as_slice(), b"user.overlay."]
            .iter()
            .any(|prefix| name.as_bytes().starts_with(prefix));
        if !is_mark {
            xattr::set(to, &name, &xattr::get(from, &name)?, 0)?;
        }
    }
    Ok(())
}

/// Makes everything in the upper durable: data, metadata and names.
pub(super) fn sync(dir: &Path) -> io::Result<()> {
    Ok(nix::unistd::syncfs(&File::open(dir)?)?)
}
