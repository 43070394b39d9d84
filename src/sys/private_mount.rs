//! A read-only view of a directory that nobody else sees: a bind mount in a mount namespace that is
//! gone by the time the caller gets its descriptor. The descriptor keeps the mount.

use std::io;
use std::os::fd::OwnedFd;
use std::path::{Path, PathBuf};

use nix::mount::{MsFlags, mount};
use nix::sched::{CloneFlags, unshare};
use nix::sys::statvfs::{FsFlags, fstatvfs};

use super::fs;
use std::os::fd::AsFd;

/// `O_PATH` descriptors of directories through mounts that are read-only and never update access times.
/// Fails with EPERM without the privilege to mount; one directory may fail for itself.
pub fn read_only(paths: &[PathBuf]) -> io::Result<Vec<io::Result<OwnedFd>>> {
    let paths: Vec<PathBuf> = paths
        .iter()
        .map(std::path::absolute)
        .collect::<io::Result<_>>()?;
    // The namespace is the thread's own, so the process's mounts stay as they are. One serves all: to make
    // and to end it costs more than a mount.
    std::thread::Builder::new()
        .name("private-mount".into())
        .spawn(move || {
            enter_namespace()?;
            Ok(paths.iter().map(|path| bind(path)).collect())
        })?
        .join()
        .map_err(|_| io::Error::other("the thread that binds lower directories panicked"))?
}

fn enter_namespace() -> io::Result<()> {
    unshare(CloneFlags::CLONE_NEWNS | CloneFlags::CLONE_FS)?;
    mount(
        None::<&str>,
        "/",
        None::<&str>,
        MsFlags::MS_REC | MsFlags::MS_SLAVE,
        None::<&str>,
    )?;
    Ok(())
}

fn bind(path: &Path) -> io::Result<OwnedFd> {
    let flags = libc::O_PATH | libc::O_DIRECTORY;
    let plain = fs::open_path(path, flags)?;
    let before = fs::fstat(plain.as_fd())?;
    // Flags that a user namespace locks may not be dropped by the remount.
    let had = fstatvfs(&plain)?.flags();
    let mut keep = MsFlags::empty();
    for (flag, kept) in [
        (FsFlags::ST_NOSUID, MsFlags::MS_NOSUID),
        (FsFlags::ST_NODEV, MsFlags::MS_NODEV),
        (FsFlags::ST_NOEXEC, MsFlags::MS_NOEXEC),
        (FsFlags::ST_NODIRATIME, MsFlags::MS_NODIRATIME),
    ] {
        if had.contains(flag) {
            keep |= kept;
        }
    }
    mount(
        Some(path),
        path,
        None::<&str>,
        MsFlags::MS_BIND,
        None::<&str>,
    )?;
    mount(
        None::<&str>,
        path,
        None::<&str>,
        MsFlags::MS_REMOUNT | MsFlags::MS_BIND | MsFlags::MS_RDONLY | MsFlags::MS_NOATIME | keep,
        None::<&str>,
    )?;
    let bound = fs::open_path(path, flags)?;
    let after = fs::fstat(bound.as_fd())?;
    if (before.st_dev, before.st_ino) != (after.st_dev, after.st_ino) {
        return Err(io::Error::other("the directory was replaced meanwhile"));
    }
    Ok(bound)
}
