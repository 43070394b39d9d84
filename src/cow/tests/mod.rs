//! Tests of the union without a mount. They run as root, on a file system with `trusted.*` attributes.

mod basics;
mod chunk_maps;
mod chunks;
mod concurrency;
mod copyup;
mod foreign;
mod kernel;
mod limits;
mod metacopy;
mod seal;
mod view;

use std::collections::BTreeMap;
use std::ffi::{OsStr, OsString};
use std::path::{Path, PathBuf};

use nix::mount::{MsFlags, mount};
use nix::sched::{CloneFlags, unshare};

use super::*;

/// Layers in a directory of their own, and a union over them that can be opened anew.
struct Fixture {
    base: tempfile::TempDir,
    lowers: Vec<PathBuf>,
    union: Option<Union>,
}

impl Fixture {
    /// `fill` gets the lower directories, the topmost first.
    fn new(layers: usize, fill: impl FnOnce(&[PathBuf])) -> Self {
        let base = tempfile::tempdir().unwrap();
        let lowers: Vec<PathBuf> = (0..layers)
            .map(|n| base.path().join(format!("lower{n}")))
            .collect();
        for dir in &lowers {
            std::fs::create_dir(dir).unwrap();
        }
        for name in ["upper", "work"] {
            std::fs::create_dir(base.path().join(name)).unwrap();
        }
        fill(&lowers);
        let mut fixture = Self {
            base,
            lowers,
            union: None,
        };
        fixture.reopen();
        fixture
    }

    fn config(&self) -> UnionConfig {
        UnionConfig {
            lowers: self.lowers.clone(),
            upper: Some(UpperConfig {
                dir: self.upper(),
                work: self.base.path().join("work"),
            }),
            volatile: true,
            ..UnionConfig::default()
        }
    }

    fn reopen(&mut self) {
        self.union = None;
        self.union = Some(Union::open(self.config()).unwrap());
    }

    fn union(&self) -> &Union {
        self.union.as_ref().unwrap()
    }

    fn upper(&self) -> PathBuf {
        self.base.path().join("upper")
    }

    /// Looks a path up; the lookups are never given back, as by a kernel with memory to spare.
    fn find(&self, path: &str) -> Result<Entry> {
        let mut entry = Entry {
            node: NodeId::ROOT,
            generation: 0,
            attr: self.union().getattr(NodeId::ROOT, None)?,
        };
        for name in Path::new(path) {
            entry = self.union().lookup(entry.node, name)?;
        }
        Ok(entry)
    }

    fn node(&self, path: &str) -> NodeId {
        match self.find(path) {
            Ok(entry) => entry.node,
            Err(error) => panic!("{path}: {error}"),
        }
    }

    /// The directory that holds `path`, and the last name.
    fn split<'a>(&self, path: &'a str) -> (NodeId, &'a OsStr) {
        let (parent, name) = path.rsplit_once('/').unwrap_or(("", path));
        (self.node(parent), OsStr::new(name))
    }

    fn write(&self, path: &str, text: &str) -> Result<()> {
        let (parent, name) = self.split(path);
        let (node, handle) =
            match self
                .union()
                .create(parent, name, 0o644, libc::O_RDWR, &Caller::ROOT)
            {
                Ok((entry, handle)) => (entry.node, handle),
                Err(error) if error.errno == libc::EEXIST => {
                    let node = self.node(path);
                    let flags = libc::O_RDWR | libc::O_TRUNC;
                    (node, self.union().open_file(node, flags, &Caller::ROOT)?)
                }
                Err(error) => return Err(error),
            };
        let written = self
            .union()
            .write(node, Some(&handle), 0, text.as_bytes(), None);
        self.union().release(node, handle);
        written.map(|n| assert_eq!(n, text.len()))
    }

    fn read_node(&self, node: NodeId) -> Result<String> {
        let mut buf = vec![0; 1 << 16];
        let n = self.union().read(node, None, 0, &mut buf)?;
        buf.truncate(n);
        Ok(String::from_utf8(buf).unwrap())
    }

    fn read(&self, path: &str) -> String {
        self.read_node(self.node(path)).unwrap()
    }

    fn mkdir(&self, path: &str) -> Result<Entry> {
        let (parent, name) = self.split(path);
        self.union().mkdir(parent, name, 0o755, &Caller::ROOT)
    }

    fn unlink(&self, path: &str) -> Result<()> {
        let (parent, name) = self.split(path);
        self.union().unlink(parent, name)
    }

    fn rmdir(&self, path: &str) -> Result<()> {
        let (parent, name) = self.split(path);
        self.union().rmdir(parent, name)
    }

    fn link(&self, old: &str, new: &str) -> Result<Entry> {
        let node = self.node(old);
        let (parent, name) = self.split(new);
        self.union().link(node, parent, name)
    }

    fn rename(&self, old: &str, new: &str, mode: RenameMode) -> Result<()> {
        let (parent, name) = self.split(old);
        let (new_parent, new_name) = self.split(new);
        self.union()
            .rename(parent, name, new_parent, new_name, mode)
    }

    fn mv(&self, old: &str, new: &str) {
        self.rename(old, new, RenameMode::Replace).unwrap();
    }

    /// Names of a directory; also checks that listed numbers and kinds are those of `stat`.
    fn list(&self, path: &str) -> Vec<String> {
        let dir = self.node(path);
        let handle = self.union().open_dir(dir).unwrap();
        let mut listed = Vec::new();
        self.union()
            .read_dir(dir, &handle, 0, &mut |entry| {
                listed.push(entry);
                true
            })
            .unwrap();
        assert_eq!(
            (&*listed[0].name, &*listed[1].name),
            (OsStr::new("."), OsStr::new(".."))
        );
        let mut names = BTreeMap::new();
        for entry in listed.drain(2..) {
            let found = self.union().lookup(dir, &entry.name).unwrap();
            assert_eq!(
                (entry.ino, entry.kind),
                (found.node.0, found.attr.kind),
                "{:?}",
                entry.name
            );
            assert_eq!(found.attr.ino, found.node.0);
            let name = entry.name.into_string().unwrap_or_else(lossy);
            assert!(names.insert(name, ()).is_none());
        }
        names.into_keys().collect()
    }

    /// The whole tree: path to kind, number, mode, owner, links, content or target.
    fn tree(&self) -> BTreeMap<String, String> {
        let mut out = BTreeMap::new();
        self.walk("", &mut out);
        out
    }

    fn walk(&self, dir: &str, out: &mut BTreeMap<String, String>) {
        for name in self.list(dir) {
            let path = if dir.is_empty() {
                name
            } else {
                format!("{dir}/{name}")
            };
            let attr = self.find(&path).unwrap().attr;
            let content = match attr.kind {
                FileKind::Regular => self.read(&path),
                FileKind::Symlink => self
                    .union()
                    .readlink(self.node(&path))
                    .unwrap()
                    .into_string()
                    .unwrap(),
                _ => String::new(),
            };
            out.insert(
                path.clone(),
                format!(
                    "{:?} {} {:o} {}:{} {} {content:?}",
                    attr.kind, attr.ino, attr.perm, attr.uid, attr.gid, attr.nlink
                ),
            );
            if attr.kind == FileKind::Directory {
                self.walk(&path, out);
            }
        }
    }

    /// As `tree`, without content.
    fn tree_of_attributes(&self) -> BTreeMap<String, String> {
        let mut out = BTreeMap::new();
        let mut pending = vec![String::new()];
        while let Some(dir) = pending.pop() {
            for name in self.list(&dir) {
                let path = format!("{dir}{name}");
                let attr = self.find(&path).unwrap().attr;
                if attr.kind == FileKind::Directory {
                    pending.push(format!("{path}/"));
                }
                let times = (attr.mtime, attr.size, attr.nlink);
                let facts = format!(
                    "{:?} {} {:o} {}:{} {times:?}",
                    attr.kind, attr.ino, attr.perm, attr.uid, attr.gid
                );
                out.insert(path, facts);
            }
        }
        out
    }

    /// What is seen is seen after a remount too, with the same numbers and links.
    fn check_remount(&mut self) {
        let before = self.tree();
        self.reopen();
        assert_eq!(self.tree(), before);
    }
}

fn lossy(name: OsString) -> String {
    name.to_string_lossy().into_owned()
}

fn errno<T>(result: Result<T>) -> i32 {
    match result {
        Ok(_) => 0,
        Err(error) => error.errno,
    }
}

/// Gives this thread mounts of its own.
fn leave_namespace() {
    unshare(CloneFlags::CLONE_NEWNS | CloneFlags::CLONE_FS).unwrap();
    let (none, flags) = (None::<&str>, MsFlags::MS_REC | MsFlags::MS_PRIVATE);
    mount(none, "/", none, flags, none).unwrap();
}

fn put(path: impl AsRef<Path>, text: &str) {
    std::fs::create_dir_all(path.as_ref().parent().unwrap()).unwrap();
    std::fs::write(path, text).unwrap();
}

fn is_whiteout(path: impl AsRef<Path>) -> bool {
    use std::os::unix::fs::{FileTypeExt, MetadataExt};
    let stat = std::fs::symlink_metadata(path).unwrap();
    stat.file_type().is_char_device() && stat.rdev() == 0
}
