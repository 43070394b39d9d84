//! The writable layer: its directories on the host, and how an object in it is reached.
//!
//! The work directory is laid out as kernel overlayfs has it: `work/` for objects that are being made,
//! `index/` for hard links to copied-up files that have more names in a lower layer.

use std::ffi::{OsStr, OsString};
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};

use nix::errno::Errno;
use parking_lot::RwLock;

use super::chunks::Maps;
use super::error::{Context, Result};
use super::file::Backing;
use super::lend;
use super::node::{Node, Orphan};
use super::seal::{Root, UpperDir};
use super::stat_override::StatOverride;
use super::types::{FileKind, NodeId};
use super::union::Union;
use crate::sys::fs::{self, Object};
use crate::sys::{dirents, xattr};

/// The upper's descriptors.
pub(super) struct Upper {
    /// Top of the layer.
    pub(super) root: Root,
    /// Device of the file system of upper and work.
    pub(super) dev: u64,
    /// `work/`: objects on their way into the upper, and those that have lost their last name.
    pub(super) work: Arc<OwnedFd>,
    /// `index/`.
    pub(super) index: Arc<OwnedFd>,
    /// Whether the index has any entry.
    pub(super) indexed: AtomicBool,
    /// The work directory that the configuration names, locked.
    pub(super) base: OwnedFd,
    pub(super) next_name: AtomicU64,
    /// Orphans that are held by a descriptor.
    pub(super) orphan_fds: AtomicU64,
    /// How many may be.
    pub(super) orphan_fd_limit: u64,
    /// Files can be made without a name and get one later.
    pub(super) nameless: bool,
    /// Content can be shared with a lower file (reflinks); until a try has failed.
    pub(super) clones: AtomicBool,
    /// There may be files whose data is in the lower layers; the root says so, too.
    pub(super) metacopies: AtomicBool,
    /// Completing files stops when somebody else waits for the work directory.
    pub(super) gives_way: AtomicBool,
    /// Maps of files that are copied up in part.
    pub(super) maps: Maps,
    /// Whiteouts are made as character devices; otherwise in xattr form.
    pub(super) device_whiteouts: AtomicBool,
    /// Owner and mode of objects lie in this attribute.
    pub(super) stat_override: Option<StatOverride>,
    /// Held alone while a mode is lent, and shared while one is changed or, with `lends`, told. But for that of a directory
    /// that a copy is put into: its attributes are neither changed nor told meanwhile, for which its own locks see.
    pub(super) modes: RwLock<()>,
    /// Modes may be lent: this process is held to them.
    pub(super) lends: AtomicBool,
}

impl Upper {
    /// Whether somebody waits for the work directory.
    pub(super) fn is_wanted(&self) -> bool {
        fs::fstatat(self.base.as_fd(), OsStr::new(super::open::WANTED)).is_ok()
    }

    /// A name for something new in the work directory.
    pub(super) fn temp_name(&self) -> OsString {
        format!("#{:x}", self.next_name.fetch_add(1, Ordering::Relaxed)).into()
    }

    pub(super) fn work(&self) -> BorrowedFd<'_> {
        self.work.as_fd()
    }

    pub(super) fn index(&self) -> BorrowedFd<'_> {
        self.index.as_fd()
    }
}

/// A name in the work directory that is removed again unless the object has left it.
pub(super) struct Temp<'a> {
    upper: &'a Upper,
    pub(super) name: OsString,
    kept: bool,
}

impl<'a> Temp<'a> {
    /// A free name; nothing is made.
    pub(super) fn new(upper: &'a Upper) -> Self {
        Self {
            upper,
            name: upper.temp_name(),
            kept: false,
        }
    }

    pub(super) fn object(&self) -> Object<'_> {
        Object::Entry(self.upper.work(), &self.name)
    }

    /// Leaves the object where it is; its name is the caller's now.
    pub(super) fn keep(mut self) -> OsString {
        self.kept = true;
        std::mem::take(&mut self.name)
    }

    /// Moves the object to its place; `flags` are renameat2's. With an exchange, what was there is
    /// removed from the work directory afterwards.
    pub(super) fn install(
        mut self,
        dir: BorrowedFd<'_>,
        name: &OsStr,
        flags: u32,
    ) -> Result<(), (Self, Errno)> {
        let upper = self.upper;
        match upper.rename(upper.work(), &self.name, dir, name, flags) {
            Ok(()) => {
                self.kept = flags & libc::RENAME_EXCHANGE == 0;
                Ok(())
            }
            Err(errno) => Err((self, errno)),
        }
    }
}

impl Drop for Temp<'_> {
    fn drop(&mut self) {
        if !self.kept {
            remove_tree(self.upper.work(), &self.name);
        }
    }
}

/// A copy that is being made: nobody sees it before it is installed, and it is gone when it is dropped before that.
pub(super) enum Draft<'a> {
    /// A regular file that the host knows by this descriptor alone.
    Nameless(&'a Upper, OwnedFd),
    /// Anything else, in the work directory; open if it is a regular file or a directory.
    Named(Temp<'a>, Option<OwnedFd>),
}

impl<'a> Draft<'a> {
    /// An empty regular file, open for reading and writing.
    pub(super) fn file(upper: &'a Upper, perm: u32) -> Result<Self, Errno> {
        if upper.nameless {
            return nameless(upper.work(), perm).map(|fd| Self::Nameless(upper, fd));
        }
        let temp = Temp::new(upper);
        let flags = libc::O_CREAT | libc::O_EXCL | libc::O_RDWR;
        let fd = fs::openat(upper.work(), &temp.name, flags, perm)?;
        Ok(Self::Named(temp, Some(fd)))
    }

    pub(super) fn object(&self) -> Object<'_> {
        match self {
            Self::Nameless(_, fd) | Self::Named(_, Some(fd)) => Object::Open(fd.as_fd()),
            Self::Named(temp, None) => temp.object(),
        }
    }

    /// Gives it a name, under which it stays.
    pub(super) fn link(&self, dir: BorrowedFd<'_>, name: &OsStr) -> Result<(), Errno> {
        match self {
            Self::Nameless(_, fd) => fs::link_fd(fd.as_fd(), dir, name),
            Self::Named(temp, _) => fs::linkat(temp.upper.work(), &temp.name, dir, name),
        }
    }

    /// Puts it into its place.
    pub(super) fn install(self, dir: BorrowedFd<'_>, name: &OsStr) -> Result<(), Errno> {
        match self {
            Self::Nameless(..) => self.link(dir, name),
            Self::Named(temp, _) => temp.install(dir, name, 0).map_err(|(_, errno)| errno),
        }
    }

    /// Keeps it without a place in the upper, by a descriptor.
    pub(super) fn keep_open(self) -> Result<OwnedFd, Errno> {
        match self {
            Self::Nameless(_, fd) => Ok(fd),
            Self::Named(temp, _) => temp.object().open(libc::O_PATH),
        }
    }

    /// The same, by a name in the work directory.
    pub(super) fn keep(self) -> Result<OsString, Errno> {
        match self {
            Self::Nameless(upper, fd) => {
                let name = upper.temp_name();
                fs::link_fd(fd.as_fd(), upper.work(), &name).map(|()| name)
            }
            Self::Named(temp, _) => Ok(temp.keep()),
        }
    }
}

/// A file without a name in the file system of `dir`.
fn nameless(dir: BorrowedFd<'_>, perm: u32) -> Result<OwnedFd, Errno> {
    fs::openat(dir, OsStr::new("."), libc::O_TMPFILE | libc::O_RDWR, perm)
}

/// Whether the host has files without a name (not on NFS, nor before Linux 3.11), and lets them get one (that
/// takes /proc, or a privilege).
pub(super) fn makes_nameless(work: BorrowedFd<'_>) -> bool {
    let name = OsStr::new("nameless");
    nameless(work, 0o600)
        .and_then(|fd| fs::link_fd(fd.as_fd(), work, name))
        .and_then(|()| fs::unlinkat(work, name))
        .inspect_err(|errno| tracing::debug!(%errno, "copies have a name while they are made"))
        .is_ok()
}

/// Removes an object of the work directory, a directory with what is in it. Failing leaves something
/// behind that the next mount clears away.
pub(super) fn remove_tree(dir: BorrowedFd<'_>, name: &OsStr) {
    match fs::unlinkat(dir, name) {
        Err(Errno::EISDIR | Errno::EPERM) => {}
        Ok(()) | Err(_) => return,
    }
    if fs::rmdirat(dir, name).is_ok() {
        return;
    }
    if let Ok(inner) = fs::openat(dir, name, libc::O_RDONLY | libc::O_DIRECTORY, 0) {
        let mut names = Vec::new();
        let listed = dirents::read_all(inner.as_fd(), &mut |entry| {
            names.push(entry.name.to_owned());
        });
        if let Err(errno) = listed {
            tracing::warn!(%errno, "cannot list a leftover in the work directory");
        }
        for name in names {
            remove_tree(inner.as_fd(), &name);
        }
    }
    if let Err(errno) = fs::rmdirat(dir, name) {
        tracing::warn!(%errno, ?name, "cannot remove a leftover in the work directory");
    }
}

/// How an upper object is reached, kept alive.
pub(super) enum Reach {
    Path(Arc<OwnedFd>),
    Entry(Arc<OwnedFd>, Arc<OsStr>),
    Io(Arc<Backing>),
}

impl Reach {
    fn object(&self) -> Option<Object<'_>> {
        match self {
            Self::Path(fd) => Some(Object::Path(fd.as_fd())),
            Self::Entry(dir, name) => Some(Object::Entry(dir.as_fd(), name)),
            Self::Io(backing) => backing.upper_fd().map(Object::Open),
        }
    }
}

impl Union {
    /// The upper, or EROFS.
    pub(super) fn upper(&self) -> Result<&Upper> {
        self.upper.as_ref().ok_or(Errno::EROFS.into())
    }

    /// A descriptor of the upper directory of `node`, opened for reading (a removed one may be
    /// `O_PATH`).
    pub(super) fn dir_fd(&self, node: &Arc<Node>) -> Result<Arc<OwnedFd>> {
        /// A rename may move an ancestor while we walk down to the node.
        const TRIES: u32 = 16;
        let mut tries = 0;
        loop {
            match self.try_dir_fd(node) {
                Err(error)
                    if tries < TRIES
                        && (error.is(Errno::ENOENT)
                            || error.is(Errno::ESTALE)
                            || error.is(Errno::ENOTDIR)) =>
                {
                    tries += 1;
                }
                result => return result,
            }
        }
    }

    fn try_dir_fd(&self, node: &Arc<Node>) -> Result<Arc<OwnedFd>> {
        let upper = self.upper()?;
        let (root, sealed) = upper.root.get();
        let mut missing: Vec<(Arc<Node>, Arc<OsStr>)> = Vec::new();
        let mut at = Arc::clone(node);
        let mut fd = loop {
            if at.id == NodeId::ROOT {
                break root;
            }
            let directory = at.directory.as_ref().ok_or(Errno::ENOTDIR)?;
            if let Some(known) = directory.fd.get()
                && known.sealed == sealed
            {
                break Arc::clone(&known.fd);
            }
            let (name, orphan) = {
                let place = at.place.read();
                (place.names.first().cloned(), place.rare.orphan.clone())
            };
            match (name, orphan) {
                (_, Some(Orphan::Fd(fd))) => break fd,
                (_, Some(Orphan::Work(name))) => {
                    missing.push((at, name));
                    break Arc::clone(&upper.work);
                }
                (Some(name), None) => {
                    missing.push((at, name.name));
                    at = name.parent;
                }
                (None, None) => return Err(Errno::ENOENT.into()),
            }
        };
        for (node, name) in missing.into_iter().rev() {
            let flags = libc::O_RDONLY | libc::O_DIRECTORY;
            let opened = match fs::openat(fd.as_fd(), &name, flags, 0) {
                Err(Errno::EACCES) => {
                    // By its name it might be another one when the mode is given back.
                    let found = upper.pin(fd.as_fd(), &name)?;
                    let found = Object::Path(found.as_fd());
                    upper.permitted(found, lend::READ | lend::SEARCH, || found.open(flags))?
                }
                opened => opened?,
            };
            let stat = fs::fstat(opened.as_fd())?;
            let expected = node.place.read().upper;
            if stat.st_dev != upper.dev || Some(stat.st_ino) != expected {
                return Err(Errno::ESTALE).context("an upper directory was replaced");
            }
            fd = Arc::new(opened);
            if let Some(directory) = &node.directory {
                let fd = Arc::clone(&fd);
                directory
                    .fd
                    .set(&self.budget, Arc::new(UpperDir { fd, sealed }));
            }
        }
        Ok(fd)
    }

    /// Runs `body` on the upper object of `node`. Must not be called with a directory locked: where the
    /// object is reached by its name, its directory is locked meanwhile so that it keeps it.
    pub(super) fn with_upper<T>(
        &self,
        node: &Arc<Node>,
        body: impl FnOnce(Object<'_>) -> Result<T, Errno>,
    ) -> Result<T> {
        let upper = self.upper()?;
        if node.kind == FileKind::Directory {
            let fd = self.dir_fd(node)?;
            let removed = matches!(node.place.read().rare.orphan, Some(Orphan::Fd(_)));
            let object = if removed {
                Object::Path(fd.as_fd())
            } else {
                Object::Open(fd.as_fd())
            };
            return Ok(body(object)?);
        }
        let reach = loop {
            if let Some(backing) = self.known_io(node)
                && backing.upper_fd().is_some()
            {
                break Reach::Io(backing);
            }
            let name = {
                let place = node.place.read();
                match (&place.rare.orphan, &place.rare.index) {
                    (Some(Orphan::Fd(fd)), _) => break Reach::Path(Arc::clone(fd)),
                    (Some(Orphan::Work(name)), _) => {
                        break Reach::Entry(Arc::clone(&upper.work), Arc::clone(name));
                    }
                    (None, Some(name)) => {
                        break Reach::Entry(Arc::clone(&upper.index), Arc::clone(name));
                    }
                    (None, None) => place.names.first().cloned().ok_or(Errno::ESTALE)?,
                }
            };
            let directory = name.parent.directory.as_ref().ok_or(Errno::ENOTDIR)?;
            let _unmoved = directory.state.read();
            let still = node
                .name()
                .is_some_and(|now| Arc::ptr_eq(&now.parent, &name.parent) && now.name == name.name);
            if still {
                let fd = self.dir_fd(&name.parent)?;
                if !upper.may_search(fd.as_fd()) {
                    // Whoever has it open goes on with it.
                    let found = upper.pin(fd.as_fd(), &name.name)?;
                    return Ok(body(Object::Path(found.as_fd()))?);
                }
                return Ok(body(Object::Entry(fd.as_fd(), &name.name))?);
            }
        };
        match reach.object() {
            Some(object) => Ok(body(object)?),
            None => Err(Errno::ESTALE.into()),
        }
    }

    /// Names of all attributes of an upper object: one call tells of many marks that they are not there.
    pub(super) fn marks(object: Object<'_>) -> Result<Vec<OsString>> {
        match xattr::list(object) {
            Ok(names) => Ok(names),
            Err(Errno::EOPNOTSUPP) => Ok(Vec::new()),
            Err(errno) => Err(errno).context("listing the marks of the upper layer"),
        }
    }

    /// The value of a mark on an upper object, if it is there.
    pub(super) fn mark(&self, object: Object<'_>, name: &OsStr) -> Result<Option<Vec<u8>>> {
        let get = || xattr::get(object, name);
        match self.upper()?.permitted(object, lend::READ, get) {
            Ok(value) => Ok(Some(value)),
            Err(Errno::ENODATA | Errno::EOPNOTSUPP) => Ok(None),
            Err(errno) => Err(errno).context("reading a mark of the upper layer"),
        }
    }
}
