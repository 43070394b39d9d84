//! Layers: random ones, written to disk in overlayfs format, and merged in memory by its rules.

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::os::unix::fs::{FileExt, MetadataExt, symlink};
use std::path::{Path as HostPath, PathBuf};

use proptest::prelude::*;
use rustix::fs::{AtFlags, CWD, FileType, Gid, Mode, Timespec, Timestamps, Uid, XattrFlags};

use crate::model::{Ino, Inode, Model, ROOT};
use crate::ops::{self, Fill};
use crate::tree::{Kind, Path, Time};

/// How a layer says that a name is gone.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Whiteout {
    /// Character device 0/0.
    Device,
    /// An empty file with `trusted.overlay.whiteout`, in a directory marked `x` (Linux 6.7, which honours
    /// it in lookups but lists it where nothing is merged).
    Xattr,
    /// A file `.wh.NAME`, as in an OCI layer; kernel overlayfs takes it for a file.
    Name,
}

/// How a directory says that nothing below it shows.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Opaque {
    No,
    Xattr,
    /// A file `.wh..wh..opq`; kernel overlayfs takes it for a file.
    Name,
    /// `user.fuseoverlayfs.opaque`; kernel overlayfs does not know it.
    FuseOverlayfs,
}

#[derive(Clone, Debug)]
pub struct Meta {
    pub mode: u32,
    pub uid: u32,
    pub gid: u32,
    pub mtime: (i64, u32),
    pub xattrs: BTreeMap<String, Vec<u8>>,
}

#[derive(Clone, Debug)]
pub enum Object {
    Dir(Opaque),
    File(Fill),
    Symlink(String),
    Special(Kind, u64),
    /// One more name of a file of the same layer.
    Link(Path),
    Whiteout(Whiteout),
}

#[derive(Clone, Debug)]
pub struct Entry {
    pub object: Object,
    pub meta: Meta,
}

/// One layer: parents come before their children, and every parent is there.
#[derive(Clone, Debug, Default)]
pub struct Layer {
    pub entries: BTreeMap<Path, Entry>,
}

impl Meta {
    pub fn plain(mode: u32) -> Self {
        Self {
            mode,
            uid: 0,
            gid: 0,
            mtime: (1_000_000_000, 0),
            xattrs: BTreeMap::new(),
        }
    }
}

impl Layer {
    /// Adds an object with the parents that it lacks; does nothing where that cannot be.
    pub fn add(&mut self, path: &[String], object: Object, meta: Meta) {
        let taken = self.entries.contains_key(path);
        let no_way = (1..path.len()).any(|len| {
            self.entries
                .get(&path[..len])
                .is_some_and(|entry| !matches!(entry.object, Object::Dir(_)))
        });
        if path.is_empty() || taken || no_way {
            return;
        }
        for len in 1..path.len() {
            self.entries
                .entry(path[..len].to_vec())
                .or_insert_with(|| Entry {
                    object: Object::Dir(Opaque::No),
                    meta: Meta::plain(0o755),
                });
        }
        self.entries.insert(path.to_vec(), Entry { object, meta });
    }

    /// An opaque directory has no room for the mark that whiteouts by xattr need.
    fn mend_whiteouts(&mut self) {
        let is_opaque = |entry: &Entry| !matches!(entry.object, Object::Dir(Opaque::No));
        let opaque: BTreeSet<Path> = self
            .entries
            .iter()
            .filter(|(_, entry)| is_opaque(entry))
            .map(|(path, _)| path.clone())
            .collect();
        for (path, entry) in &mut self.entries {
            if matches!(entry.object, Object::Whiteout(_))
                && opaque.contains(&path[..path.len() - 1])
            {
                entry.object = Object::Whiteout(Whiteout::Device);
            }
        }
    }

    /// Shorthand for tests that build a layer by hand.
    pub fn with(mut self, path: &str, object: Object) -> Self {
        let mode = if matches!(object, Object::Dir(_)) {
            0o755
        } else {
            0o644
        };
        self.add(&parts(path), object, Meta::plain(mode));
        self
    }

    /// Whether two names of this layer are one file.
    pub fn has_links(&self) -> bool {
        self.entries
            .values()
            .any(|entry| matches!(entry.object, Object::Link(_)))
    }

    /// Whether only Plywood understands this layer's marks.
    pub fn is_foreign_to_kernel(&self) -> bool {
        self.entries.values().any(|entry| {
            matches!(
                entry.object,
                Object::Whiteout(Whiteout::Name | Whiteout::Xattr)
                    | Object::Dir(Opaque::Name | Opaque::FuseOverlayfs)
            )
        })
    }

    /// Writes the layer below `dir`, which exists and is empty.
    pub fn write(&self, dir: &HostPath) {
        for (path, entry) in &self.entries {
            let at = host(dir, path);
            match &entry.object {
                Object::Dir(_) => fs::create_dir(&at).unwrap(),
                Object::File(fill) => fs::write(&at, fill.bytes()).unwrap(),
                Object::Symlink(target) => symlink(target, &at).unwrap(),
                Object::Special(kind, rdev) => mknod(&at, *kind, *rdev),
                Object::Link(target) => fs::hard_link(host(dir, target), &at).unwrap(),
                Object::Whiteout(Whiteout::Device) => mknod(&at, Kind::CharDev, 0),
                Object::Whiteout(Whiteout::Xattr) => {
                    fs::write(&at, "").unwrap();
                    set_xattr(&at, "trusted.overlay.whiteout", b"");
                }
                Object::Whiteout(Whiteout::Name) => {
                    let name = format!(".wh.{}", path.last().unwrap());
                    fs::write(at.with_file_name(name), "").unwrap();
                }
            }
        }
        // Attributes last and from below, because making a child changes its parent's times.
        for (path, entry) in self.entries.iter().rev() {
            if !matches!(entry.object, Object::Link(_) | Object::Whiteout(_)) {
                self.write_meta(&host(dir, path), path, entry);
            }
        }
        if self.holds_xattr_whiteout(&[]) {
            set_xattr(dir, "trusted.overlay.opaque", b"x");
        }
    }

    fn holds_xattr_whiteout(&self, dir: &[String]) -> bool {
        self.entries.iter().any(|(path, entry)| {
            path.len() == dir.len() + 1
                && path.starts_with(dir)
                && matches!(entry.object, Object::Whiteout(Whiteout::Xattr))
        })
    }

    fn write_meta(&self, at: &HostPath, path: &[String], entry: &Entry) {
        let meta = &entry.meta;
        if let Object::Dir(opaque) = &entry.object {
            match opaque {
                Opaque::Xattr => set_xattr(at, "trusted.overlay.opaque", b"y"),
                Opaque::Name => fs::write(at.join(".wh..wh..opq"), "").unwrap(),
                Opaque::FuseOverlayfs => set_xattr(at, "user.fuseoverlayfs.opaque", b"y"),
                Opaque::No if self.holds_xattr_whiteout(path) => {
                    set_xattr(at, "trusted.overlay.opaque", b"x");
                }
                Opaque::No => {}
            }
        }
        rustix::fs::chownat(
            CWD,
            at,
            Some(Uid::from_raw(meta.uid)),
            Some(Gid::from_raw(meta.gid)),
            AtFlags::SYMLINK_NOFOLLOW,
        )
        .unwrap();
        if !matches!(entry.object, Object::Symlink(_)) {
            rustix::fs::chmod(at, Mode::from_raw_mode(meta.mode)).unwrap();
        }
        for (name, value) in visible_xattrs(&entry.object, meta) {
            set_xattr(at, &escaped(&name), &value);
        }
        set_mtime(at, meta.mtime);
    }
}

/// A private name is stored escaped, as the kernel does, so that it means nothing.
fn escaped(name: &str) -> String {
    match name.strip_prefix("trusted.overlay.") {
        Some(rest) => format!("trusted.overlay.overlay.{rest}"),
        None => name.to_owned(),
    }
}

/// xattr(7): user attributes are for files and directories alone.
fn visible_xattrs(object: &Object, meta: &Meta) -> BTreeMap<String, Vec<u8>> {
    let plain = matches!(object, Object::Dir(_) | Object::File(_));
    let all = meta
        .xattrs
        .iter()
        .filter(|(name, _)| plain || !name.starts_with("user."));
    all.map(|(name, value)| (name.clone(), value.clone()))
        .collect()
}

pub fn parts(path: &str) -> Path {
    path.split('/')
        .filter(|part| !part.is_empty())
        .map(str::to_owned)
        .collect()
}

fn host(dir: &HostPath, path: &[String]) -> PathBuf {
    dir.join(path.join("/"))
}

fn mknod(at: &HostPath, kind: Kind, rdev: u64) {
    let kind = match kind {
        Kind::CharDev => FileType::CharacterDevice,
        Kind::BlockDev => FileType::BlockDevice,
        Kind::Socket => FileType::Socket,
        _ => FileType::Fifo,
    };
    rustix::fs::mknodat(CWD, at, kind, Mode::from_raw_mode(0o644), rdev).unwrap();
}

fn set_xattr(at: &HostPath, name: &str, value: &[u8]) {
    rustix::fs::lsetxattr(at, name, value, XattrFlags::empty())
        .unwrap_or_else(|error| panic!("cannot set {name} on {}: {error}", at.display()));
}

pub fn set_mtime(at: &HostPath, (sec, nsec): (i64, u32)) {
    let time = Timespec {
        tv_sec: sec,
        tv_nsec: i64::from(nsec),
    };
    let times = Timestamps {
        last_access: time,
        last_modification: time,
    };
    rustix::fs::utimensat(CWD, at, &times, AtFlags::SYMLINK_NOFOLLOW).unwrap();
}

// Merging.

/// Merges `layers`, the topmost first, below an empty upper whose root is `root`.
pub fn merge(layers: &[Layer], root: &Meta) -> Model {
    let mut merge = Merge {
        layers,
        model: Model::new(inode(&Object::Dir(Opaque::No), root)),
        links: BTreeMap::new(),
    };
    let all: Vec<usize> = (0..layers.len()).collect();
    merge.dir(ROOT, &Path::new(), &all);
    // A link count is known only where every link of the layer's file shows.
    for ((layer, path), (ino, _)) in &merge.links {
        let in_layer = layers[*layer].entries.values();
        let links =
            in_layer.filter(|entry| matches!(&entry.object, Object::Link(to) if to == path));
        let inode = merge.model.inode_mut(*ino);
        inode.nlink_known = inode.nlink == 1 + links.count() as u64;
    }
    merge.model
}

struct Merge<'a> {
    layers: &'a [Layer],
    model: Model,
    /// The one inode of each file of a layer, by the path of its first name.
    links: BTreeMap<(usize, Path), (Ino, ())>,
}

impl Merge<'_> {
    /// `stack`: the layers whose directories make up this one, from the top.
    fn dir(&mut self, dir: Ino, path: &Path, stack: &[usize]) {
        let mut names = BTreeSet::new();
        for layer in stack {
            let inside = self.layers[*layer].entries.keys();
            names.extend(
                inside
                    .filter(|inner| inner.len() == path.len() + 1 && inner.starts_with(path))
                    .filter_map(|inner| inner.last().cloned()),
            );
        }
        for name in names {
            let mut inner = path.clone();
            inner.push(name.clone());
            self.name(dir, &name, &inner, stack);
        }
    }

    fn name(&mut self, dir: Ino, name: &str, path: &Path, stack: &[usize]) {
        let layers = self.layers;
        let mut below = Vec::new();
        let mut top: Option<&Entry> = None;
        for layer in stack {
            let Some(entry) = layers[*layer].entries.get(path) else {
                continue;
            };
            match (&entry.object, top) {
                (Object::Dir(opaque), _) => {
                    top = top.or(Some(entry));
                    below.push(*layer);
                    if *opaque != Opaque::No {
                        break;
                    }
                }
                (Object::Whiteout(_), _) | (_, Some(_)) => break,
                (object, None) => {
                    let first = match object {
                        Object::Link(to) => to.clone(),
                        _ => path.clone(),
                    };
                    return self.file(dir, name, *layer, &first);
                }
            }
        }
        if let Some(entry) = top {
            let ino = self
                .model
                .insert(dir, name, inode(&entry.object, &entry.meta));
            self.dir(ino, path, &below);
        }
    }

    fn file(&mut self, dir: Ino, name: &str, layer: usize, first: &Path) {
        if let Some((ino, ())) = self.links.get(&(layer, first.clone())) {
            self.model.insert_link(dir, name, *ino);
            return;
        }
        let entry = &self.layers[layer].entries[first];
        let ino = self
            .model
            .insert(dir, name, inode(&entry.object, &entry.meta));
        self.links.insert((layer, first.clone()), (ino, ()));
    }
}

fn inode(object: &Object, meta: &Meta) -> Inode {
    let (kind, rdev, data) = match object {
        Object::Dir(_) => (Kind::Dir, 0, Vec::new()),
        Object::File(fill) => (Kind::File, 0, fill.bytes()),
        Object::Symlink(target) => (Kind::Symlink, 0, target.clone().into_bytes()),
        Object::Special(kind, rdev) => (*kind, *rdev, Vec::new()),
        Object::Link(_) | Object::Whiteout(_) => unreachable!("resolved by the caller"),
    };
    Inode {
        uid: meta.uid,
        gid: meta.gid,
        mtime: Time::At(meta.mtime.0, meta.mtime.1),
        rdev,
        data,
        xattrs: visible_xattrs(object, meta),
        ..Inode::blank(
            kind,
            if kind == Kind::Symlink {
                0o777
            } else {
                meta.mode
            },
        )
    }
}

// Random layers.

fn meta(mode: impl Strategy<Value = u32>) -> impl Strategy<Value = Meta> {
    let xattrs = prop_oneof![3 => Just(Vec::new()), 1 => prop::collection::vec(ops::xattr(), 1..3)];
    (mode, ops::owner(), ops::owner(), ops::past(), xattrs).prop_map(
        |(mode, uid, gid, mtime, xattrs)| Meta {
            mode,
            uid,
            gid,
            mtime,
            xattrs: xattrs.into_iter().collect(),
        },
    )
}

fn object(foreign: bool) -> impl Strategy<Value = (Object, Meta)> {
    let opaque = match foreign {
        false => prop_oneof![5 => Just(Opaque::No), 1 => Just(Opaque::Xattr)].boxed(),
        true => prop_oneof![
            4 => Just(Opaque::No),
            1 => Just(Opaque::Xattr),
            1 => Just(Opaque::Name),
            1 => Just(Opaque::FuseOverlayfs),
        ]
        .boxed(),
    };
    let whiteout = match foreign {
        false => Just(Whiteout::Device).boxed(),
        true => {
            prop::sample::select(&[Whiteout::Device, Whiteout::Xattr, Whiteout::Name][..]).boxed()
        }
    };
    prop_oneof![
        4 => (opaque, meta(ops::dir_mode())).prop_map(|(opaque, meta)| (Object::Dir(opaque), meta)),
        5 => (ops::fill(), meta(ops::file_mode())).prop_map(|(fill, meta)| (Object::File(fill), meta)),
        1 => (ops::target(), meta(ops::file_mode())).prop_map(|(target, meta)| (Object::Symlink(target), meta)),
        1 => (ops::special_in_layer(), meta(ops::file_mode()))
            .prop_map(|((kind, rdev), meta)| (Object::Special(kind, rdev), meta)),
        2 => ops::path().prop_map(|to| (Object::Link(to), Meta::plain(0o644))),
        2 => whiteout.prop_map(|whiteout| (Object::Whiteout(whiteout), Meta::plain(0))),
    ]
}

/// `.wh.` names are marks in a layer, so no random object of a layer has one.
fn layer_path() -> impl Strategy<Value = Path> {
    ops::path().prop_map(|path| {
        path.into_iter()
            .map(|name| name.replace(".wh.a", "d"))
            .collect()
    })
}

fn layer(foreign: bool) -> impl Strategy<Value = Layer> {
    prop::collection::vec((layer_path(), object(foreign)), 0..14).prop_map(|entries| {
        let mut layer = Layer::default();
        let (links, others): (Vec<_>, Vec<_>) = entries
            .into_iter()
            .partition(|(_, (object, _))| matches!(object, Object::Link(_)));
        for (path, (object, meta)) in others {
            layer.add(&path, object, meta);
        }
        for (path, (object, meta)) in links {
            let Object::Link(to) = &object else { continue };
            // Any file of the layer will do; the drawn path only chooses which.
            let files: Vec<&Path> = layer
                .entries
                .iter()
                .filter(|(_, entry)| matches!(entry.object, Object::File(_)))
                .map(|(path, _)| path)
                .collect();
            let chosen = files.get(to.concat().len() % files.len().max(1));
            // A file sorts before its other names, so that it is written before.
            if let Some(first) = chosen
                .filter(|first| **first < &path)
                .map(|first| (*first).clone())
            {
                layer.add(&path, Object::Link(first), meta);
            }
        }
        layer.mend_whiteouts();
        layer
    })
}

/// One to four layers, the topmost first. `foreign`: with marks that kernel overlayfs does not know.
pub fn stack(foreign: bool) -> impl Strategy<Value = Vec<Layer>> {
    prop::collection::vec(layer(foreign), 1..5)
}

// The standing check that nobody writes to a lower.

/// Everything that can be read of a directory tree except access times, one line an object.
pub fn fingerprint(dir: &HostPath) -> Vec<String> {
    let mut lines = Vec::new();
    let mut todo = vec![dir.to_owned()];
    while let Some(path) = todo.pop() {
        let meta = fs::symlink_metadata(&path).unwrap();
        let mut content = Vec::new();
        if meta.is_dir() {
            todo.extend(
                fs::read_dir(&path)
                    .unwrap()
                    .map(|entry| entry.unwrap().path()),
            );
        } else if meta.is_file() {
            // Without a copy of the access time the reading itself would show.
            content = vec![0; usize::try_from(meta.size()).unwrap()];
            fs::File::open(&path)
                .unwrap()
                .read_exact_at(&mut content, 0)
                .unwrap();
        } else if meta.is_symlink() {
            content = fs::read_link(&path)
                .unwrap()
                .into_os_string()
                .into_encoded_bytes();
        }
        let xattrs: Vec<(String, Vec<u8>)> = crate::jail::xattrs_of(&path);
        lines.push(format!(
            "{} {:o} {}:{} ino {} nlink {} rdev {} size {} blocks {} mtime {}.{} ctime {}.{} {} {xattrs:?}",
            path.display(),
            meta.mode(),
            meta.uid(),
            meta.gid(),
            meta.ino(),
            meta.nlink(),
            meta.rdev(),
            meta.size(),
            meta.blocks(),
            meta.mtime(),
            meta.mtime_nsec(),
            meta.ctime(),
            meta.ctime_nsec(),
            blake3::hash(&content).to_hex(),
        ));
    }
    lines.sort();
    lines
}
