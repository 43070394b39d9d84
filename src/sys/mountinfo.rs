//! The mount table of this process, `/proc/self/mountinfo` (proc_pid_mountinfo(5)): reading it
//! never waits for the file systems in it.

use std::ffi::{OsStr, OsString};
use std::fs;
use std::io;
use std::os::unix::ffi::{OsStrExt, OsStringExt};
use std::path::{Path, PathBuf};

/// One mount.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct MountEntry {
    /// Number of the mount, unique among those there are.
    pub id: u64,
    /// `major:minor` of its file system.
    pub device: String,
    /// Where it is mounted.
    pub target: PathBuf,
    /// Type of the file system.
    pub fstype: String,
}

/// Every mount, in the order of the table: of two on the same directory the later covers the earlier.
pub fn read() -> io::Result<Vec<MountEntry>> {
    Ok(parse(&fs::read("/proc/self/mountinfo")?))
}

/// The mount that is visible at `target`, an absolute path without links.
pub fn at(target: &Path) -> io::Result<Option<MountEntry>> {
    Ok(read()?
        .into_iter()
        .rev()
        .find(|entry| entry.target == target))
}

/// The upper and work directories of kernel overlayfs's mounts, as who mounted them named them.
pub fn overlay_directories() -> io::Result<Vec<PathBuf>> {
    Ok(parse_overlays(&fs::read("/proc/self/mountinfo")?))
}

fn parse_overlays(table: &[u8]) -> Vec<PathBuf> {
    let of_line = |line: &[u8]| {
        let mut words = line.split(|byte| *byte == b' ');
        let fstype = words.by_ref().skip_while(|word| *word != b"-").nth(1)?;
        let options = words.nth(1).filter(|_| fstype == b"overlay")?;
        let named = options.split(|byte| *byte == b',').filter_map(|option| {
            let upper = option.strip_prefix(b"upperdir=");
            upper.or_else(|| option.strip_prefix(b"workdir="))
        });
        Some(named.map(|path| unescape(path).into()).collect::<Vec<_>>())
    };
    let lines = table.split(|byte| *byte == b'\n');
    lines.filter_map(of_line).flatten().collect()
}

fn parse(table: &[u8]) -> Vec<MountEntry> {
    table
        .split(|byte| *byte == b'\n')
        .filter_map(parse_line)
        .collect()
}

/// `36 35 98:0 /root /target rw,... shared:1 - ext4 /dev/root rw`
fn parse_line(line: &[u8]) -> Option<MountEntry> {
    let mut words = line.split(|byte| *byte == b' ');
    let id = std::str::from_utf8(words.next()?).ok()?.parse().ok()?;
    let device = String::from_utf8(words.nth(1)?.to_vec()).ok()?;
    let target = unescape(words.nth(1)?).into();
    let fstype = words.skip_while(|word| *word != b"-").nth(1)?;
    Some(MountEntry {
        id,
        device,
        target,
        fstype: OsStr::from_bytes(fstype).to_string_lossy().into_owned(),
    })
}

/// Space, tab, line feed and backslash are written as a backslash and three octal digits.
fn unescape(word: &[u8]) -> OsString {
    let mut out = Vec::with_capacity(word.len());
    let mut rest = word;
    while let Some((&byte, tail)) = rest.split_first() {
        if byte == b'\\'
            && let Some(digits) = tail.get(..3)
            && digits.iter().all(|digit| (b'0'..=b'7').contains(digit))
        {
            let value = digits.iter().fold(0u8, |value, digit| {
                value.wrapping_mul(8).wrapping_add(digit - b'0')
            });
            out.push(value);
            rest = &tail[3..];
        } else {
            out.push(byte);
            rest = tail;
        }
    }
    OsString::from_vec(out)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn lines_are_taken_apart() {
        let table = b"36 35 98:0 / /a\\040b rw,noatime master:1 shared:2 - ext4 /dev/root rw\n\
                      40 36 0:44 / /f rw - fuse.plyfs plyfs rw,user_id=0\nbroken line\n";
        let entries = parse(table);
        assert_eq!(entries.len(), 2);
        assert_eq!(entries[0].target, Path::new("/a b"));
        assert_eq!(
            (
                entries[1].id,
                entries[1].device.as_str(),
                entries[1].fstype.as_str()
            ),
            (40, "0:44", "fuse.plyfs")
        );
    }

    #[test]
    fn an_overlay_names_where_it_writes() {
        let table = b"36 35 0:50 / /m rw shared:2 - overlay overlay rw,lowerdir=/l,upperdir=/a\\040b/u\\054,workdir=/w,index=on\n\
                      37 35 0:51 / /r rw - overlay none ro,lowerdir=/upperdir=/x\n\
                      40 36 0:44 / /f rw - fuse.other other rw,upperdir=/y\nbroken\n";
        let named = parse_overlays(table);
        assert_eq!(named, [Path::new("/a b/u,"), Path::new("/w")]);
    }

    #[test]
    fn the_root_is_mounted() {
        assert!(at(Path::new("/")).unwrap().is_some());
    }
}
