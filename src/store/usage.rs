//! What a tree takes on disk.

use std::collections::HashSet;
use std::fs;
use std::io;
use std::os::unix::fs::MetadataExt;
use std::path::Path;

/// What a tree takes for itself.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Usage {
    /// Bytes allocated on disk.
    pub bytes: u64,
    /// Inodes.
    pub inodes: u64,
}

/// Adds up the tree at `dir`, its root included: an inode with several names counts once. Follows
/// no link and enters no mount. What vanishes meanwhile is not counted.
pub fn usage(dir: &Path) -> io::Result<Usage> {
    let root = fs::symlink_metadata(dir)?;
    let mut sum = Usage {
        bytes: root.blocks() * 512,
        inodes: 1,
    };
    let mut linked = HashSet::new();
    let mut waiting = vec![dir.to_owned()];
    while let Some(dir) = waiting.pop() {
        let entries = match fs::read_dir(&dir) {
            Err(error) if error.kind() == io::ErrorKind::NotFound => continue,
            entries => entries?,
        };
        for entry in entries {
            let entry = entry?;
            let meta = match entry.metadata() {
                Err(error) if error.kind() == io::ErrorKind::NotFound => continue,
                meta => meta?,
            };
            if meta.dev() != root.dev()
                || (!meta.is_dir() && meta.nlink() > 1 && !linked.insert(meta.ino()))
            {
                continue;
            }
            sum.bytes += meta.blocks() * 512;
            sum.inodes += 1;
            if meta.is_dir() {
                waiting.push(entry.path());
            }
        }
    }
    Ok(sum)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn counts_an_inode_once() {
        let tmp = tempfile::tempdir().unwrap();
        fs::create_dir(tmp.path().join("d")).unwrap();
        fs::write(tmp.path().join("d/a"), vec![1; 10_000]).unwrap();
        fs::hard_link(tmp.path().join("d/a"), tmp.path().join("b")).unwrap();
        std::os::unix::fs::symlink("/", tmp.path().join("link")).unwrap();
        let sum = usage(tmp.path()).unwrap();
        assert_eq!(sum.inodes, 4);
        assert!(sum.bytes >= 10_000 && sum.bytes < 100_000, "{sum:?}");
    }
}
