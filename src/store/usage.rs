//! What a tree takes on disk.

use std::collections::HashSet;
use std::io;
use std::os::fd::AsFd;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};

use crate::sys::fs::{Errno, Stat, fstat};
use crate::sys::tree::{self, Tree};

/// What a tree takes for itself.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Usage {
    /// Bytes allocated on disk.
    pub bytes: u64,
    /// Inodes.
    pub inodes: u64,
}

/// Adds up the tree at `dir`, its root included: an inode with several names counts once. Follows
/// no link and enters no mount. What vanishes meanwhile is not counted, nor what is in it.
pub fn usage(dir: &Path) -> io::Result<Usage> {
    let mut walk = Walk::new(dir)?;
    while walk.step()? {}
    Ok(walk.sum)
}

/// Bytes that what is at `path` takes for itself, a directory without what is in it; none if it is gone.
pub fn own_bytes(path: &Path) -> io::Result<u64> {
    match std::fs::symlink_metadata(path) {
        Ok(metadata) => Ok(bytes_of(&metadata)),
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(0),
        Err(error) => Err(error),
    }
}

/// Bytes that are allocated on disk.
pub(super) fn bytes_of(metadata: &std::fs::Metadata) -> u64 {
    // `st_blocks` counts 512 bytes each, whatever the file system's blocks are.
    metadata.blocks() * 512
}

/// Bytes that what is at `path` takes, a directory with all that is in it; none if it is gone.
pub fn tree_bytes(path: &Path) -> io::Result<u64> {
    match std::fs::symlink_metadata(path) {
        Ok(metadata) if metadata.is_dir() => match usage(path) {
            Ok(usage) => Ok(usage.bytes),
            Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(0),
            Err(error) => Err(error),
        },
        _ => own_bytes(path),
    }
}

struct Walk {
    tree: Tree,
    device: libc::dev_t,
    sum: Usage,
    /// Inodes with several names that were met.
    linked: HashSet<libc::ino_t>,
    /// Directories to look into, relative to the root.
    waiting: Vec<PathBuf>,
}

impl Walk {
    fn new(dir: &Path) -> Result<Self, Errno> {
        let tree = Tree::open(dir)?;
        let root = fstat(tree.root())?;
        Ok(Self {
            tree,
            device: root.st_dev,
            sum: Usage {
                bytes: allocated(&root),
                inodes: 1,
            },
            linked: HashSet::new(),
            waiting: vec![PathBuf::new()],
        })
    }

    /// Adds what is in one directory; false when there is none left.
    fn step(&mut self) -> Result<bool, Errno> {
        let Some(path) = self.waiting.pop() else {
            return Ok(false);
        };
        let Some(dir) = self.tree.directory(&path)? else {
            return Ok(true);
        };
        for name in tree::names(dir.as_fd())? {
            let Some(stat) = tree::stat(dir.as_fd(), &name)? else {
                continue;
            };
            let is_dir = stat.st_mode & libc::S_IFMT == libc::S_IFDIR;
            if stat.st_dev != self.device
                || (!is_dir && stat.st_nlink > 1 && !self.linked.insert(stat.st_ino))
            {
                continue;
            }
            self.sum.bytes += allocated(&stat);
            self.sum.inodes += 1;
            if is_dir {
                self.waiting.push(path.join(name));
            }
        }
        Ok(true)
    }
}

fn allocated(stat: &Stat) -> u64 {
    // `st_blocks` counts 512 bytes each, whatever the file system's blocks are.
    u64::try_from(stat.st_blocks).unwrap_or(0) * 512
}

#[cfg(test)]
mod tests {
    use std::fs;

    use nix::sys::stat::Mode;
    use nix::unistd::mkfifo;

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

    #[test]
    fn a_directory_that_was_replaced_is_neither_waited_for_nor_followed() {
        let tmp = tempfile::tempdir().unwrap();
        let (root, outside) = (tmp.path().join("root"), tmp.path().join("outside"));
        fs::create_dir(&outside).unwrap();
        fs::write(outside.join("file"), "").unwrap();
        for name in ["fifo", "link", "file", "gone", "kept", "above/below"] {
            fs::create_dir_all(root.join(name)).unwrap();
            fs::write(root.join(name).join("inside"), "").unwrap();
        }
        let mut walk = Walk::new(&root).unwrap();
        walk.step().unwrap();
        assert_eq!((walk.sum.inodes, walk.waiting.len()), (7, 6));
        for name in ["fifo", "link", "file", "gone"] {
            fs::remove_dir_all(root.join(name)).unwrap();
        }
        mkfifo(&root.join("fifo"), Mode::S_IRWXU).unwrap();
        std::os::unix::fs::symlink(&outside, root.join("link")).unwrap();
        fs::write(root.join("file"), "").unwrap();
        // Also on the way to a directory.
        walk.waiting.retain(|path| path != Path::new("above"));
        walk.waiting.push("above/below".into());
        fs::rename(root.join("above"), outside.join("above")).unwrap();
        std::os::unix::fs::symlink(outside.join("above"), root.join("above")).unwrap();
        while walk.step().unwrap() {}
        // `inside` of `kept` is all that came to it.
        assert_eq!(walk.sum.inodes, 8);
    }
}
