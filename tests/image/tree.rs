//! A directory tree as values that can be compared.

use std::collections::{BTreeMap, HashMap};
use std::ffi::OsString;
use std::fs;
use std::os::unix::fs::{FileTypeExt, MetadataExt};
use std::path::Path;

use plywood::cow::{Caller, FileKind, NodeId, Timestamp, Union, UnionConfig};

use super::archive::sha256;

/// Path below the root to what is there.
pub type Tree = BTreeMap<String, Object>;

#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Object {
    pub kind: char,
    pub mode: u32,
    pub owner: (u32, u32),
    pub size: u64,
    pub mtime: (i64, u32),
    pub rdev: u64,
    pub nlink: u32,
    /// Digest of a file's content, target of a link.
    pub content: String,
    pub xattrs: BTreeMap<OsString, Vec<u8>>,
    /// The first path, in order, of the same inode.
    pub same_as: String,
}

/// The tree that a union shows.
pub fn of_union(config: UnionConfig) -> Tree {
    let union = Union::open(config).unwrap();
    let mut tree = Tree::new();
    let mut inodes = HashMap::new();
    add_union(&union, NodeId::ROOT, "", &mut tree, &mut inodes);
    tree
}

fn add_union(
    union: &Union,
    dir: NodeId,
    path: &str,
    tree: &mut Tree,
    inodes: &mut HashMap<u64, String>,
) {
    let handle = union.open_dir(dir).unwrap();
    let mut names = Vec::new();
    union
        .read_dir(dir, &handle, 0, &mut |entry| {
            if entry.name != "." && entry.name != ".." {
                names.push(entry.name);
            }
            true
        })
        .unwrap();
    names.sort();
    for name in names {
        let entry = union.lookup(dir, &name).unwrap();
        let path = format!("{path}/{}", name.to_string_lossy());
        let attr = entry.attr;
        let (kind, content) = match attr.kind {
            FileKind::Regular => ('f', sha256(&read(union, entry.node, attr.size))),
            FileKind::Directory => ('d', String::new()),
            FileKind::Symlink => {
                let target = union.readlink(entry.node).unwrap();
                ('l', target.to_string_lossy().into_owned())
            }
            FileKind::CharDevice => ('c', String::new()),
            FileKind::BlockDevice => ('b', String::new()),
            FileKind::Fifo => ('p', String::new()),
            FileKind::Socket => ('s', String::new()),
        };
        let same_as = inodes
            .entry(attr.ino)
            .or_insert_with(|| path.clone())
            .clone();
        let xattrs = union
            .listxattr(entry.node)
            .unwrap()
            .into_iter()
            .map(|name| {
                let value = union.getxattr(entry.node, &name).unwrap();
                (name, value)
            })
            .collect();
        let Timestamp { sec, nsec } = attr.mtime;
        let directory = attr.kind == FileKind::Directory;
        tree.insert(
            path.clone(),
            Object {
                kind,
                mode: u32::from(attr.perm),
                owner: (attr.uid, attr.gid),
                size: if directory { 0 } else { attr.size },
                mtime: (sec, nsec),
                rdev: attr.rdev,
                nlink: if directory { 0 } else { attr.nlink },
                content,
                xattrs,
                same_as,
            },
        );
        if directory {
            add_union(union, entry.node, &path, tree, inodes);
        }
        union.forget(entry.node, 1);
    }
}

fn read(union: &Union, node: NodeId, size: u64) -> Vec<u8> {
    let handle = union
        .open_file(node, libc::O_RDONLY, &Caller::ROOT)
        .unwrap();
    let mut content = vec![0; size as usize];
    let count = union.read(node, Some(&handle), 0, &mut content).unwrap();
    assert_eq!(count, content.len());
    union.release(node, handle);
    content
}

/// The tree below a directory of the host.
pub fn of_directory(root: &Path) -> Tree {
    let mut tree = Tree::new();
    add_directory(root, "", &mut tree, &mut HashMap::new());
    for (path, xattrs) in xattrs(root) {
        if let Some(object) = tree.get_mut(&path) {
            object.xattrs = xattrs;
        }
    }
    tree
}

fn add_directory(dir: &Path, path: &str, tree: &mut Tree, inodes: &mut HashMap<u64, String>) {
    let mut names: Vec<_> = fs::read_dir(dir)
        .unwrap()
        .map(|entry| entry.unwrap().file_name())
        .collect();
    names.sort();
    for name in names {
        let host = dir.join(&name);
        let path = format!("{path}/{}", name.to_string_lossy());
        let meta = fs::symlink_metadata(&host).unwrap();
        let kind = meta.file_type();
        let (kind, content) = if kind.is_file() {
            ('f', sha256(&fs::read(&host).unwrap()))
        } else if kind.is_dir() {
            ('d', String::new())
        } else if kind.is_symlink() {
            let target = fs::read_link(&host).unwrap();
            ('l', target.to_string_lossy().into_owned())
        } else if kind.is_char_device() {
            ('c', String::new())
        } else if kind.is_block_device() {
            ('b', String::new())
        } else if kind.is_fifo() {
            ('p', String::new())
        } else {
            ('s', String::new())
        };
        let same_as = inodes
            .entry(meta.ino())
            .or_insert_with(|| path.clone())
            .clone();
        let directory = kind == 'd';
        tree.insert(
            path.clone(),
            Object {
                kind,
                mode: meta.mode() & 0o7777,
                owner: (meta.uid(), meta.gid()),
                size: if directory { 0 } else { meta.size() },
                mtime: (meta.mtime(), meta.mtime_nsec() as u32),
                rdev: meta.rdev(),
                nlink: if directory { 0 } else { meta.nlink() as u32 },
                content,
                xattrs: BTreeMap::new(),
                same_as,
            },
        );
        if directory {
            add_directory(&host, &path, tree, inodes);
        }
    }
}

/// All xattrs below `root`, through getfattr, for the standard library has no call for it.
fn xattrs(root: &Path) -> HashMap<String, BTreeMap<OsString, Vec<u8>>> {
    let output = std::process::Command::new("getfattr")
        .args([
            "-R",
            "-P",
            "-h",
            "-d",
            "-m",
            "-",
            "-e",
            "hex",
            "--absolute-names",
        ])
        .arg(root)
        .output()
        .unwrap();
    let prefix = format!("# file: {}", root.display());
    let mut all: HashMap<String, BTreeMap<OsString, Vec<u8>>> = HashMap::new();
    let mut path = String::new();
    for line in String::from_utf8(output.stdout).unwrap().lines() {
        if let Some(rest) = line.strip_prefix(&prefix) {
            path = rest.to_owned();
        } else if let Some((name, hex)) = line.split_once("=0x") {
            let value = (0..hex.len())
                .step_by(2)
                .map(|at| u8::from_str_radix(&hex[at..at + 2], 16).unwrap())
                .collect();
            let of = all.entry(path.clone()).or_default();
            of.insert(OsString::from(name), value);
        }
    }
    all
}

/// Where two trees differ, in words; empty when they do not.
pub fn differences(
    ours: &Tree,
    theirs: &Tree,
    ignore: &dyn Fn(&str, &Object) -> Object,
) -> Vec<String> {
    let mut found = Vec::new();
    for (path, object) in ours {
        match theirs.get(path) {
            None => found.push(format!("only ours: {path}")),
            Some(other) => {
                let (a, b) = (ignore(path, object), ignore(path, other));
                if a != b {
                    found.push(format!("{path}:\n  ours   {a:?}\n  theirs {b:?}"));
                }
            }
        }
    }
    found.extend(
        theirs
            .keys()
            .filter(|path| !ours.contains_key(*path))
            .map(|path| format!("only theirs: {path}")),
    );
    found
}
