//! A directory tree as facts that can be compared: names, metadata with times, attributes, content.
#![allow(dead_code, reason = "each test program uses a part of it")]

use std::collections::BTreeMap;
use std::ffi::OsStr;
use std::fs::{self, File};
use std::io::Read;
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::{FileTypeExt, MetadataExt, OpenOptionsExt};
use std::path::{Path, PathBuf};

use nix::fcntl::{AT_FDCWD, OFlag};
use nix::sys::stat::{UtimensatFlags, utimensat};
use nix::sys::time::TimeSpec;

/// The facts of every object of a tree, by path.
#[derive(PartialEq, Eq)]
pub struct Snapshot {
    facts: BTreeMap<PathBuf, String>,
    /// Access times are among them.
    access: bool,
}

impl Snapshot {
    /// Takes the facts without changing any: no access time moves.
    pub fn of(root: &Path) -> Self {
        Self::taken(root, true)
    }

    /// As `of`, without access times, for whom reading may move them.
    pub fn but_access_times(root: &Path) -> Self {
        Self::taken(root, false)
    }

    fn taken(root: &Path, access: bool) -> Self {
        let mut facts = BTreeMap::new();
        add(root, Path::new(""), access, &mut facts);
        Self { facts, access }
    }

    /// Fails with the first differences when the tree is not what it was.
    pub fn assert_same(&self, root: &Path) {
        let now = Self::taken(root, self.access);
        let (was, is) = (&self.facts, &now.facts);
        let paths = was.keys().chain(is.keys());
        let different: Vec<String> = paths
            .filter(|path| was.get(*path) != is.get(*path))
            .take(6)
            .map(|path| {
                format!(
                    "{}:\n  was {:?}\n  is  {:?}",
                    path.display(),
                    was.get(path),
                    is.get(path)
                )
            })
            .collect();
        assert!(
            different.is_empty(),
            "{} was changed:\n{}",
            root.display(),
            different.join("\n")
        );
    }
}

/// Sets every access time (but those of symbolic links) far back, so that a single read of a lower
/// that updates it shows.
pub fn age_access_times(root: &Path) {
    let metadata = fs::symlink_metadata(root).unwrap();
    if metadata.file_type().is_symlink() {
        return;
    }
    if metadata.is_dir() {
        for entry in fs::read_dir(root).unwrap() {
            age_access_times(&entry.unwrap().path());
        }
    }
    let long_ago = TimeSpec::new(1_000_000_000, 5);
    let mtime = TimeSpec::new(metadata.mtime(), metadata.mtime_nsec());
    utimensat(
        AT_FDCWD,
        root,
        &long_ago,
        &mtime,
        UtimensatFlags::NoFollowSymlink,
    )
    .unwrap();
}

fn add(root: &Path, relative: &Path, access: bool, facts: &mut BTreeMap<PathBuf, String>) {
    let path = if relative.as_os_str().is_empty() {
        root.to_owned()
    } else {
        root.join(relative)
    };
    settle(&path);
    let m = fs::symlink_metadata(&path).unwrap();
    let kind = m.file_type();
    let atime = if kind.is_symlink() || !access {
        // Reading the target moves it.
        (0, 0)
    } else {
        (m.atime(), m.atime_nsec())
    };
    let content = if kind.is_symlink() {
        format!("{:?}", fs::read_link(&path).unwrap())
    } else if kind.is_file() {
        digest(&path)
    } else if kind.is_char_device() || kind.is_block_device() {
        format!("device {}", m.rdev())
    } else {
        String::new()
    };
    facts.insert(
        relative.to_owned(),
        format!(
            "ino {} mode {:o} owner {}:{} links {} size {} blocks {} mtime {}.{} ctime {}.{} atime {:?} {:?} {content}",
            m.ino(),
            m.mode(),
            m.uid(),
            m.gid(),
            m.nlink(),
            m.size(),
            m.blocks(),
            m.mtime(),
            m.mtime_nsec(),
            m.ctime(),
            m.ctime_nsec(),
            atime,
            xattrs(&path),
        ),
    );
    if kind.is_dir() {
        for name in list(&path) {
            add(
                root,
                &relative.join(OsStr::from_bytes(&name)),
                access,
                facts,
            );
        }
    }
}

/// Has the host give a large file its blocks. Until it is written back, ext4 counts those that it may need for the file's own map.
fn settle(path: &Path) {
    const LARGE: u64 = 1 << 20;
    let found = fs::symlink_metadata(path).unwrap();
    if found.is_file() && found.size() >= LARGE {
        let file = File::options()
            .read(true)
            .custom_flags(libc::O_NOATIME)
            .open(path)
            .unwrap();
        file.sync_all().unwrap();
    }
}

fn list(path: &Path) -> Vec<Vec<u8>> {
    let flags = OFlag::O_RDONLY | OFlag::O_DIRECTORY | OFlag::O_NOATIME | OFlag::O_CLOEXEC;
    let mut dir = nix::dir::Dir::open(path, flags, nix::sys::stat::Mode::empty()).unwrap();
    dir.iter()
        .map(|entry| entry.unwrap().file_name().to_bytes().to_vec())
        .filter(|name| name != b"." && name != b"..")
        .collect()
}

fn digest(path: &Path) -> String {
    let mut file = File::options()
        .read(true)
        .custom_flags(libc::O_NOATIME)
        .open(path)
        .unwrap();
    let mut hasher = blake3::Hasher::new();
    let mut buffer = vec![0; 1 << 16];
    loop {
        match file.read(&mut buffer).unwrap() {
            0 => return hasher.finalize().to_hex().to_string(),
            length => hasher.update(&buffer[..length]),
        };
    }
}

/// Every extended attribute with its value, sorted.
pub fn xattrs(path: &Path) -> BTreeMap<Vec<u8>, Vec<u8>> {
    let mut names = vec![0; 1 << 16];
    let length = rustix::fs::llistxattr(path, &mut names).unwrap();
    names[..length]
        .split(|byte| *byte == 0)
        .filter(|name| !name.is_empty())
        .map(|name| {
            let mut value = vec![0; 1 << 16];
            let length = rustix::fs::lgetxattr(path, OsStr::from_bytes(name), &mut value).unwrap();
            value.truncate(length);
            (name.to_vec(), value)
        })
        .collect()
}
