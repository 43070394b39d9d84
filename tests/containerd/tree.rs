//! Everything of a tree that a program can see, for comparison.

use std::collections::{BTreeMap, HashMap};
use std::fs;
use std::os::unix::ffi::{OsStrExt, OsStringExt};
use std::os::unix::fs::{FileTypeExt, MetadataExt};
use std::path::Path;

/// One entry: what it is, in words that make a difference readable.
#[derive(Clone, Debug, PartialEq)]
pub struct Entry {
    mode: u32,
    owner: (u32, u32),
    /// Directories: their size and links are the file system's own affair.
    size: Option<u64>,
    nlink: Option<u64>,
    mtime: (i64, i64),
    rdev: Option<u64>,
    /// Hash of the content, or the target of a link.
    content: Vec<u8>,
    xattrs: BTreeMap<Vec<u8>, Vec<u8>>,
    /// First path, in byte order, of the same inode.
    same_as: Vec<u8>,
}

pub type Tree = BTreeMap<Vec<u8>, Entry>;

pub fn read(root: &Path) -> Tree {
    let mut tree = Tree::new();
    let mut first: HashMap<u64, Vec<u8>> = HashMap::new();
    let mut todo = vec![root.to_path_buf()];
    let mut paths = vec![root.to_path_buf()];
    while let Some(dir) = todo.pop() {
        for entry in fs::read_dir(&dir).unwrap() {
            let entry = entry.unwrap();
            if entry.file_type().unwrap().is_dir() {
                todo.push(entry.path());
            }
            paths.push(entry.path());
        }
    }
    paths.sort_by(|a, b| a.as_os_str().as_bytes().cmp(b.as_os_str().as_bytes()));
    for path in paths {
        let meta = fs::symlink_metadata(&path).unwrap();
        let kind = meta.file_type();
        let name = path
            .strip_prefix(root)
            .unwrap()
            .as_os_str()
            .as_bytes()
            .to_vec();
        let content = if kind.is_file() {
            blake3::hash(&fs::read(&path).unwrap()).as_bytes().to_vec()
        } else if kind.is_symlink() {
            fs::read_link(&path).unwrap().into_os_string().into_vec()
        } else {
            Vec::new()
        };
        let entry = Entry {
            mode: meta.mode(),
            owner: (meta.uid(), meta.gid()),
            size: (!kind.is_dir()).then(|| meta.size()),
            nlink: (!kind.is_dir()).then(|| meta.nlink()),
            mtime: (meta.mtime(), meta.mtime_nsec()),
            rdev: (kind.is_char_device() || kind.is_block_device()).then(|| meta.rdev()),
            content,
            xattrs: xattrs(&path),
            same_as: if kind.is_dir() {
                Vec::new()
            } else {
                first
                    .entry(meta.ino())
                    .or_insert_with(|| name.clone())
                    .clone()
            },
        };
        tree.insert(name, entry);
    }
    tree
}

fn xattrs(path: &Path) -> BTreeMap<Vec<u8>, Vec<u8>> {
    let names = xattr::list(path).unwrap();
    names
        .map(|name| {
            let value = xattr::get(path, &name).unwrap().unwrap_or_default();
            (name.into_vec(), value)
        })
        .collect()
}

/// What `got` has that is not as in `want`.
///
/// One thing of the native snapshotter is no oracle: it makes a snapshot by copying the parent's tree, which leaves
/// on every directory that no later layer names the time of the copy (later than `began`). For such a directory
/// `headers` says what the layers say of it; it may also have been changed by a later layer, during the unpacking.
pub fn differences(
    want: &Tree,
    got: &Tree,
    began: i64,
    headers: &BTreeMap<Vec<u8>, i64>,
) -> Vec<String> {
    let mut found = Vec::new();
    let same = |path: &[u8], a: &Entry, b: &Entry| {
        if a.size.is_some() || a.mtime.0 < began {
            return a == b;
        }
        let time = b.mtime.0 >= began || headers.get(path) == Some(&b.mtime.0);
        time && *b
            == Entry {
                mtime: b.mtime,
                ..a.clone()
            }
    };
    for path in want
        .keys()
        .chain(got.keys().filter(|k| !want.contains_key(*k)))
    {
        let shown = String::from_utf8_lossy(path);
        match (want.get(path), got.get(path)) {
            (Some(a), Some(b)) if same(path, a, b) => {}
            (Some(a), Some(b)) => found.push(format!("{shown}\n  want {a:?}\n  got  {b:?}")),
            (Some(_), None) => found.push(format!("{shown} is missing")),
            (None, _) => found.push(format!("{shown} should not be there")),
        }
    }
    found
}
