//! The files and directories of such a layer.
//!
//! Objects are a tree of parent links with names: a layer never changes, so neither do they. A
//! directory's descriptor is kept while the budget lasts and is opened again by walking down from the
//! nearest ancestor that has one, which works at any depth.

use std::collections::HashSet;
use std::ffi::{OsStr, OsString};
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::ffi::{OsStrExt, OsStringExt};
use std::path::PathBuf;
use std::sync::{Arc, OnceLock};

use nix::errno::Errno;

use super::super::attr::{attr_of, kind_of_dirent};
use super::super::chunks::{check_lower_mark, content_over};
use super::super::error::{Context, Error, Result};
use super::super::fdcache::Slot;
use super::super::lower::{DirMarks, ListedKind, LowerEntry, LowerFile, LowerObject};
use super::super::metacopy::CAPABILITY;
use super::super::node::Flag;
use super::super::origin::Origin;
use super::super::types::{Attr, FileKind};
use super::super::whiteout::{
    FUSE_OVERLAYFS_OPAQUE, WH_OPAQUE, WH_PREFIX, is_fuse_overlayfs, is_wh_file, is_whiteout,
};
use super::Layer;
use crate::sys::fs::{self, Object};
use crate::sys::{dirents, flags, handle, xattr};

/// What is known of a directory beyond its attributes, found out when it is first needed.
struct Directory {
    marks: DirMarks,
    /// Empty files with the whiteout attribute are whiteouts here.
    xattr_whiteouts: bool,
    /// Entries may have been copied up, some without their data (`metacopy`).
    impure: bool,
    /// Hashes of all names, sorted: most lookups in a stack of layers are of names that a layer does
    /// not have, and are answered without asking the host.
    names: Box<[u32]>,
    /// Names that `.wh.` files hide.
    hidden: HashSet<Box<OsStr>>,
    /// Names of those files.
    marks_by_name: HashSet<Box<OsStr>>,
}

/// A file or directory of the layer.
pub(super) struct DirObject {
    layer: Arc<Layer>,
    /// `None` for the root.
    parent: Option<Arc<Self>>,
    name: Box<OsStr>,
    attr: Attr,
    /// A `.wh.` file beside it hides what lower layers have under its name.
    replaces: bool,
    directory: OnceLock<Box<Directory>>,
    fd: Slot<OwnedFd>,
    /// It has no extended attributes.
    bare: Flag,
}

impl Drop for DirObject {
    /// Takes a long chain of parents apart without recursion.
    fn drop(&mut self) {
        let mut next = self.parent.take();
        while let Some(parent) = next {
            next = Arc::into_inner(parent).and_then(|mut parent| parent.parent.take());
        }
    }
}

fn hash(name: &OsStr) -> u32 {
    // FNV-1a: the values never leave the process and a collision costs one stat.
    name.as_bytes().iter().fold(0x811c_9dc5, |hash, byte| {
        (hash ^ u32::from(*byte)).wrapping_mul(0x0100_0193)
    })
}

impl DirObject {
    /// The top of a layer, with these attributes.
    pub(super) fn root(layer: Arc<Layer>, attr: Attr) -> Self {
        Self {
            layer,
            parent: None,
            name: OsString::new().into_boxed_os_str(),
            attr,
            replaces: false,
            directory: OnceLock::new(),
            fd: Slot::default(),
            bare: Flag::default(),
        }
    }

    /// Opens a name of this layer for reading without touching its access time.
    fn open_quietly(dir: BorrowedFd<'_>, name: &OsStr, flags: i32) -> Result<OwnedFd, Errno> {
        Object::Entry(dir, name).open_quietly(flags)
    }

    /// Whether what was opened is this object.
    fn verify(&self, fd: BorrowedFd<'_>) -> Result<()> {
        let stat = fs::fstat(fd)?;
        if stat.st_dev == self.layer.dev
            && stat.st_ino == self.attr.ino
            && attr_of(&stat).kind == self.attr.kind
        {
            Ok(())
        } else if self.layer.work.is_some() {
            // Others have removed it, and the name is that of something else now.
            Err(Errno::ENOENT.into())
        } else {
            Err(self.was_replaced())
        }
    }

    fn was_replaced(&self) -> Error {
        let path = self.host_path();
        Error {
            errno: libc::EIO,
            context: format!("{} was replaced while it is a lower layer", path.display()).into(),
        }
    }

    fn host_path(&self) -> PathBuf {
        let inner = self.inner_path();
        let inner = inner.strip_prefix("/").unwrap_or(&inner);
        self.layer.path.join(inner)
    }

    fn inner_path(&self) -> PathBuf {
        let mut names = Vec::new();
        let mut at = self;
        while let Some(parent) = &at.parent {
            names.push(&*at.name);
            at = parent;
        }
        let mut path = Vec::new();
        for name in names.iter().rev() {
            path.push(b'/');
            path.extend_from_slice(name.as_bytes());
        }
        if path.is_empty() {
            path.push(b'/');
        }
        PathBuf::from(OsString::from_vec(path))
    }

    /// A descriptor of this directory.
    fn dir_fd(&self) -> Result<Arc<OwnedFd>> {
        let mut missing = Vec::new();
        let mut at = self;
        let mut fd = loop {
            if let Some(fd) = at.fd.get() {
                break fd;
            }
            let Some(parent) = &at.parent else {
                break Arc::clone(&self.layer.root);
            };
            missing.push(at);
            at = parent;
        };
        for object in missing.into_iter().rev() {
            let flags = libc::O_RDONLY | libc::O_DIRECTORY;
            let opened = match Self::open_quietly(fd.as_fd(), &object.name, flags) {
                // As in `verify`.
                Err(Errno::ENOTDIR | Errno::ELOOP) if self.layer.work.is_some() => {
                    return Err(Errno::ENOENT.into());
                }
                opened => opened,
            };
            let opened =
                opened.with_context(|| format!("opening {}", object.host_path().display()))?;
            object.verify(opened.as_fd())?;
            fd = Arc::new(opened);
            object.fd.set(&self.layer.budget, Arc::clone(&fd));
        }
        Ok(fd)
    }

    /// Runs `body` with the way to reach this object.
    fn with_object<T>(&self, body: impl FnOnce(Object<'_>) -> Result<T, Errno>) -> Result<T> {
        if self.attr.kind == FileKind::Directory {
            let fd = self.dir_fd()?;
            return Ok(body(Object::Open(fd.as_fd()))?);
        }
        let Some(parent) = &self.parent else {
            return Err(Errno::EIO.into());
        };
        let dir = parent.dir_fd()?;
        Ok(body(Object::Entry(dir.as_fd(), &self.name))?)
    }

    fn get_xattr(&self, name: &OsStr) -> Result<Option<Vec<u8>>> {
        match self.with_object(|object| xattr::get(object, name)) {
            Ok(value) => Ok(Some(value)),
            Err(error) if error.is(Errno::ENODATA) || error.is(Errno::EOPNOTSUPP) => Ok(None),
            Err(error) => Err(error),
        }
    }

    fn directory(&self) -> Result<&Directory> {
        if let Some(known) = self.directory.get() {
            return Ok(known);
        }
        let loaded = self.load_directory(&mut |_, _, _| {})?;
        Ok(self.directory.get_or_init(|| Box::new(loaded)))
    }

    /// Reads the directory; `sink` gets every host entry as well.
    fn load_directory(&self, sink: &mut dyn FnMut(&OsStr, u8, u64)) -> Result<Directory> {
        // Few directories have attributes: one call tells that there are no marks.
        let present = match self.with_object(xattr::list) {
            Err(error) if error.is(Errno::EOPNOTSUPP) => Vec::new(),
            result => result?,
        };
        let has = |name: &OsStr| present.iter().any(|known| known == name);
        let value = |name: &OsStr| {
            if has(name) {
                self.get_xattr(name)
            } else {
                Ok(None)
            }
        };
        let opaque = value(self.layer.family.opaque())?;
        let redirect = value(self.layer.family.redirect())?;
        let mut marks = DirMarks {
            opaque: self.replaces || opaque.as_deref() == Some(b"y"),
            redirect: redirect.map(|path| OsString::from_vec(path).into()),
        };
        let dir = self.dir_fd()?;
        let mut names = Vec::new();
        let mut hidden = HashSet::new();
        let mut marks_by_name = HashSet::new();
        self.read_host(&mut |name, kind, ino| {
            sink(name, kind, ino);
            if self.layer.foreign
                && let Some(rest) = name.as_bytes().strip_prefix(WH_PREFIX)
                && is_wh_file(dir.as_fd(), name)
            {
                if name.as_bytes() == WH_OPAQUE {
                    marks.opaque = true;
                } else if !rest.starts_with(WH_PREFIX) {
                    hidden.insert(OsStr::from_bytes(rest).into());
                }
                marks_by_name.insert(name.into());
            } else {
                names.push(hash(name));
            }
        })?;
        names.sort_unstable();
        if self.layer.foreign && has(OsStr::new(FUSE_OVERLAYFS_OPAQUE)) {
            marks.opaque = true;
        }
        Ok(Directory {
            marks,
            xattr_whiteouts: opaque.as_deref() == Some(b"x"),
            impure: has(self.layer.family.impure()),
            names: names.into_boxed_slice(),
            hidden,
            marks_by_name,
        })
    }

    /// Reads the host directory through a descriptor of its own: the position is not shared.
    fn read_host(&self, sink: &mut dyn FnMut(&OsStr, u8, u64)) -> Result<()> {
        let fd = self.dir_fd()?;
        let stream = Self::open_quietly(
            fd.as_fd(),
            OsStr::new("."),
            libc::O_RDONLY | libc::O_DIRECTORY,
        )?;
        let listed = dirents::read_all(stream.as_fd(), &mut |entry| {
            sink(entry.name, entry.kind, entry.ino);
        });
        match listed {
            // Removed by now, as the empty layer of a snapshot on nothing is when that is committed: it has no names.
            Err(Errno::ENOENT) => Ok(()),
            listed => listed.with_context(|| format!("listing {}", self.host_path().display())),
        }
    }

    /// What was honoured as a mark of another dialect is not shown, and so not copied up either.
    fn is_foreign_mark(&self, name: &OsStr) -> bool {
        let layer = &self.layer;
        (layer.foreign && is_fuse_overlayfs(name))
            || layer.stat_override.is_some_and(|form| form.name() == name)
    }

    fn is_xattr_whiteout(&self, directory: &Directory, name: &OsStr, attr: &Attr) -> Result<bool> {
        if !directory.xattr_whiteouts || attr.kind != FileKind::Regular || attr.size != 0 {
            return Ok(false);
        }
        let dir = self.dir_fd()?;
        let found = xattr::get(
            Object::Entry(dir.as_fd(), name),
            self.layer.family.whiteout(),
        );
        Ok(found.is_ok())
    }
}

impl LowerObject for DirObject {
    fn attr(&self) -> Result<Attr> {
        Ok(self.attr)
    }

    fn number_space(&self) -> u64 {
        self.layer.dev
    }

    fn lookup(self: Arc<Self>, name: &OsStr) -> Result<Option<LowerEntry>> {
        let directory = self.directory()?;
        let hidden = directory.hidden.contains(name);
        let absent = || Ok(hidden.then_some(LowerEntry::Whiteout));
        // Others may have made it since.
        let may_be_new = self.layer.work.is_some();
        let is_listed = may_be_new || directory.names.binary_search(&hash(name)).is_ok();
        if !is_listed || directory.marks_by_name.contains(name) {
            return absent();
        }
        let dir = self.dir_fd()?;
        let stat = match fs::fstatat(dir.as_fd(), name) {
            Ok(stat) => stat,
            // Others have removed it since it was found: what it hid of the layers below is not to come back.
            Err(Errno::ENOENT) if may_be_new && fs::fstat(dir.as_fd())?.st_nlink == 0 => {
                return Ok(Some(LowerEntry::Whiteout));
            }
            Err(Errno::ENOENT) => return absent(),
            Err(errno) => {
                return Err(errno).with_context(|| {
                    format!("looking up {:?} in {}", name, self.host_path().display())
                });
            }
        };
        let mut attr = attr_of(&stat);
        if is_whiteout(&attr) || self.is_xattr_whiteout(directory, name, &attr)? {
            return Ok(Some(LowerEntry::Whiteout));
        }
        if let Some(form) = self.layer.stat_override {
            form.read(Object::Entry(dir.as_fd(), name), &mut attr)
                .with_context(|| {
                    format!(
                        "reading the owner of {:?} in {}",
                        name,
                        self.host_path().display()
                    )
                })?;
        }
        if stat.st_dev != self.layer.dev {
            // Something is mounted inside of the layer; what lies below it is not the layer's.
            return absent();
        }
        Ok(Some(LowerEntry::Object(Arc::new(Self {
            layer: Arc::clone(&self.layer),
            name: name.into(),
            attr,
            replaces: hidden,
            directory: OnceLock::new(),
            fd: Slot::default(),
            bare: Flag::default(),
            parent: Some(self),
        }))))
    }

    fn list(&self, sink: &mut dyn FnMut(&OsStr, ListedKind, u64)) -> Result<()> {
        let mut entries: Vec<(Box<OsStr>, u8, u64)> = Vec::new();
        let mut keep = |name: &OsStr, kind: u8, ino: u64| entries.push((name.into(), kind, ino));
        let directory = match self.directory.get() {
            Some(known) => {
                self.read_host(&mut keep)?;
                known
            }
            None => {
                let loaded = self.load_directory(&mut keep)?;
                self.directory.get_or_init(|| Box::new(loaded))
            }
        };
        let dir = self.dir_fd()?;
        for (name, kind, ino) in entries {
            if directory.marks_by_name.contains(&name) {
                continue;
            }
            let known = kind_of_dirent(kind).filter(|kind| {
                *kind != FileKind::CharDevice
                    && !(directory.xattr_whiteouts && *kind == FileKind::Regular)
            });
            let listed = match known {
                Some(kind) => ListedKind::Object(kind),
                None => {
                    let attr = attr_of(&fs::fstatat(dir.as_fd(), &name)?);
                    if is_whiteout(&attr) || self.is_xattr_whiteout(directory, &name, &attr)? {
                        ListedKind::Whiteout
                    } else {
                        ListedKind::Object(attr.kind)
                    }
                }
            };
            sink(&name, listed, ino);
        }
        for name in &directory.hidden {
            let beside = directory.names.binary_search(&hash(name)).is_ok()
                && fs::fstatat(dir.as_fd(), name).is_ok();
            if !beside {
                sink(name, ListedKind::Whiteout, 0);
            }
        }
        Ok(())
    }

    fn marks(&self) -> Result<DirMarks> {
        Ok(self.directory()?.marks.clone())
    }

    fn metacopy(&self) -> Result<Option<DirMarks>> {
        // A directory that others write to may be so since it was looked at.
        let is_live = self.layer.work.is_some();
        let impure = match &self.parent {
            Some(parent) => is_live || parent.directory()?.impure,
            None => false,
        };
        if !impure {
            return Ok(None);
        }
        let Some(mark) = self.get_xattr(self.layer.family.metacopy())? else {
            return Ok(None);
        };
        if !is_live {
            check_lower_mark(&mark, || self.host_path().display().to_string())?;
        }
        let redirect = self.get_xattr(self.layer.family.redirect())?;
        Ok(Some(DirMarks {
            opaque: false,
            redirect: redirect.map(|path| OsString::from_vec(path).into()),
        }))
    }

    fn readlink(&self) -> Result<OsString> {
        self.with_object(|object| object.readlink())
    }

    fn xattr(&self, stored: &OsStr) -> Result<Vec<u8>> {
        // Asked for before each chown, which then asks for all names. Others may have a value and not be listed.
        let is_absent = stored == CAPABILITY && self.xattr_names()?.is_empty();
        if is_absent || self.is_foreign_mark(stored) {
            return Err(Errno::ENODATA.into());
        }
        self.with_object(|object| xattr::get(object, stored))
    }

    fn xattr_names(&self) -> Result<Vec<OsString>> {
        if self.bare.get() == Some(true) {
            return Ok(Vec::new());
        }
        let mut names = self.with_object(xattr::list)?;
        self.bare.set(names.is_empty());
        names.retain(|name| !self.is_foreign_mark(name));
        Ok(names)
    }

    fn open(&self) -> Result<Arc<dyn LowerFile>> {
        let Some(parent) = &self.parent else {
            return Err(Errno::EISDIR.into());
        };
        let dir = parent.dir_fd()?;
        let fd = Self::open_quietly(dir.as_fd(), &self.name, libc::O_RDONLY | libc::O_NONBLOCK)
            .with_context(|| format!("opening {}", self.host_path().display()))?;
        self.verify(fd.as_fd())?;
        Ok(Arc::new(HostFile {
            fd,
            size: self.attr.size,
            sealed: self.layer.sealed,
        }))
    }

    fn open_over(&self, data: &dyn LowerObject) -> Result<Arc<dyn LowerFile>> {
        let Some(work) = &self.layer.work else {
            return data.open();
        };
        let file = self.open()?;
        let below = || {
            let attr = data.attr()?;
            if (data.number_space(), attr.ino) == (self.layer.dev, self.attr.ino) {
                return Err(self.was_replaced());
            }
            Ok((data.open()?, attr.size))
        };
        content_over(file, work, self.layer.family, below)
    }

    fn protection(&self) -> Result<&'static str> {
        self.with_object(flags::protection)
    }

    fn origin(&self) -> Option<Origin> {
        let handle = self.with_object(handle::of).ok()?;
        Some(Origin {
            uuid: self.layer.uuid,
            handle,
        })
    }
}

/// An open file of the host.
pub(in super::super) struct HostFile {
    fd: OwnedFd,
    /// When it was found. A layer never changes, so the end of the file needs no second read to be known.
    size: u64,
    sealed: bool,
}

impl HostFile {
    /// One of this length, which somebody may write to by way of it.
    pub(in super::super) fn new(fd: OwnedFd, size: u64) -> Self {
        Self {
            fd,
            size,
            sealed: false,
        }
    }
}

impl LowerFile for HostFile {
    fn read_at(&self, buf: &mut [u8], offset: u64) -> Result<usize> {
        let rest = usize::try_from(self.size.saturating_sub(offset)).unwrap_or(usize::MAX);
        let len = buf.len().min(rest);
        Ok(fs::pread_full(self.fd.as_fd(), &mut buf[..len], offset)?)
    }

    fn seek(&self, offset: i64, whence: i32) -> Result<i64> {
        Ok(fs::lseek(self.fd.as_fd(), offset, whence)?)
    }

    fn host_fd(&self) -> Option<BorrowedFd<'_>> {
        Some(self.fd.as_fd())
    }

    fn sealed_fd(&self) -> Option<BorrowedFd<'_>> {
        self.sealed.then(|| self.fd.as_fd())
    }
}
