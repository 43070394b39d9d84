//! What many rows do.

use std::ffi::OsString;
use std::fs::{self, File};
use std::io;
use std::os::unix::fs::{DirEntryExt, MetadataExt};
use std::path::Path;

use nix::fcntl::{AT_FDCWD, RenameFlags, renameat2};
use nix::unistd::{Gid, Uid, setegid, seteuid, setgroups};

use crate::outcome::{Outcome, Said, expect};

/// Somebody without privileges.
pub const USER: u32 = 1234;

/// Opens for reading and writing.
pub fn open_rw(path: impl AsRef<Path>) -> io::Result<File> {
    File::options().read(true).write(true).open(path)
}

/// Inode number.
pub fn ino(path: impl AsRef<Path>) -> io::Result<u64> {
    Ok(fs::symlink_metadata(path)?.ino())
}

/// Number of links.
pub fn nlink(path: impl AsRef<Path>) -> io::Result<u64> {
    Ok(fs::symlink_metadata(path)?.nlink())
}

/// Mode without the type.
pub fn mode(path: impl AsRef<Path>) -> io::Result<u32> {
    Ok(fs::symlink_metadata(path)?.mode() & 0o7777)
}

/// Names of a directory, sorted.
pub fn names(dir: impl AsRef<Path>) -> io::Result<Vec<OsString>> {
    let mut names = Vec::new();
    for entry in fs::read_dir(dir)? {
        names.push(entry?.file_name());
    }
    names.sort();
    Ok(names)
}

/// The directory must list exactly these, in this order.
pub fn lists(dir: impl AsRef<Path>, wanted: &[&str]) -> Outcome {
    expect(names(dir)? == wanted, "wrong listing")
}

/// The file must hold exactly this.
pub fn holds(path: impl AsRef<Path>, wanted: &str) -> Outcome {
    expect(fs::read(path)? == wanted.as_bytes(), "wrong content")
}

/// Nothing may be there.
pub fn absent(path: impl AsRef<Path>) -> Outcome {
    match fs::symlink_metadata(path) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(()),
        Err(error) => Err(error.into()),
        Ok(_) => Err(Said("still there".to_owned())),
    }
}

/// Renames with flags.
pub fn rename_with(from: &Path, to: &Path, flags: RenameFlags) -> nix::Result<()> {
    renameat2(AT_FDCWD, from, AT_FDCWD, to, flags)
}

/// Exchanges two names.
pub fn exchange(from: &Path, to: &Path) -> nix::Result<()> {
    rename_with(from, to, RenameFlags::RENAME_EXCHANGE)
}

/// Runs something as a user and group without privileges. Rows have a process to themselves.
pub fn as_user<T>(uid: u32, body: impl FnOnce() -> T) -> T {
    as_member(uid, &[], body)
}

/// The same, with supplementary groups.
pub fn as_member<T>(uid: u32, groups: &[u32], body: impl FnOnce() -> T) -> T {
    let groups: Vec<Gid> = groups.iter().copied().map(Gid::from_raw).collect();
    setgroups(&groups).unwrap();
    setegid(Gid::from_raw(uid)).unwrap();
    seteuid(Uid::from_raw(uid)).unwrap();
    let result = body();
    seteuid(Uid::from_raw(0)).unwrap();
    setegid(Gid::from_raw(0)).unwrap();
    result
}

/// Every entry of a tree must have the number in listings that stat shows, and no two share one.
/// Hands out the numbers.
pub fn numbers(dir: &Path) -> Result<Vec<(std::path::PathBuf, u64)>, Said> {
    let mut all = Vec::new();
    let mut pending = vec![dir.to_owned()];
    while let Some(dir) = pending.pop() {
        for entry in fs::read_dir(&dir)? {
            let entry = entry?;
            let m = fs::symlink_metadata(entry.path())?;
            expect(entry.ino() == m.ino(), "d_ino differs")?;
            if m.is_dir() {
                pending.push(entry.path());
            }
            all.push((entry.path(), m.ino()));
        }
    }
    all.sort();
    Ok(all)
}
