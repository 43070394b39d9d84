//! The kernel's table of mounts, proc_pid_mountinfo(5): what is known of a mount without touching it.

use std::fs;
use std::io;
use std::os::unix::ffi::OsStringExt;
use std::path::{Path, PathBuf};

/// One line of the table.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct MountEntry {
    pub(super) mount_point: PathBuf,
    /// Number of the mount's connection below `/sys/fs/fuse/connections`: the device's minor number.
    pub(super) connection: u64,
    /// `fuse.plyfs` or the like.
    pub(super) filesystem: String,
}

/// Every mount at `path`, the lowest first.
pub(super) fn mounts_at(path: &Path) -> io::Result<Vec<MountEntry>> {
    let mut mounts = table()?;
    mounts.retain(|entry| entry.mount_point == path);
    Ok(mounts)
}

/// Whether the FUSE connection is mounted anywhere in this name space.
pub(super) fn has_connection(connection: u64) -> io::Result<bool> {
    let is_it = |entry: &MountEntry| {
        entry.connection == connection && entry.filesystem.starts_with("fuse.")
    };
    Ok(table()?.iter().any(is_it))
}

fn table() -> io::Result<Vec<MountEntry>> {
    let table = fs::read("/proc/self/mountinfo")?;
    let lines = table.split(|&byte| byte == b'\n');
    Ok(lines.filter_map(parse).collect())
}

fn parse(line: &[u8]) -> Option<MountEntry> {
    let mut fields = line.split(|&byte| byte == b' ');
    let device = std::str::from_utf8(fields.nth(2)?).ok()?;
    let mount_point = PathBuf::from(std::ffi::OsString::from_vec(unescaped(fields.nth(1)?)));
    let filesystem = fields.skip_while(|field| field != b"-").nth(1)?;
    Some(MountEntry {
        mount_point,
        connection: device.split_once(':')?.1.parse().ok()?,
        filesystem: String::from_utf8_lossy(filesystem).into_owned(),
    })
}

/// Space, tab, newline and backslash stand as a backslash and three octal digits.
fn unescaped(field: &[u8]) -> Vec<u8> {
    let mut bytes = Vec::with_capacity(field.len());
    let mut rest = field;
    while let Some((&first, tail)) = rest.split_first() {
        let code = tail.get(..3).and_then(|digits| {
            let digits = std::str::from_utf8(digits).ok()?;
            u8::from_str_radix(digits, 8).ok()
        });
        match (first, code) {
            (b'\\', Some(byte)) => {
                bytes.push(byte);
                rest = &tail[3..];
            }
            _ => {
                bytes.push(first);
                rest = tail;
            }
        }
    }
    bytes
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_line_is_read() {
        let line = b"36 35 0:51 / /run/a\\040b\\134c/root rw,noatime master:1 shared:2 - fuse.plyfs plyfs rw,user_id=0";
        assert_eq!(
            parse(line),
            Some(MountEntry {
                mount_point: "/run/a b\\c/root".into(),
                connection: 51,
                filesystem: "fuse.plyfs".to_owned(),
            })
        );
        assert_eq!(parse(b""), None);
        assert_eq!(parse(b"36 35 0:51 / /x rw"), None);
    }

    #[test]
    fn the_real_table_has_a_root() {
        assert!(!mounts_at(Path::new("/")).unwrap().is_empty());
        assert!(mounts_at(Path::new("/nonexistent")).unwrap().is_empty());
    }
}
