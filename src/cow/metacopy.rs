//! Files whose attributes are in the upper and whose data is still in a lower layer.
//!
//! What changes only the attributes or names of a lower file makes a sparse file of the right size in the
//! upper, marked `overlay.metacopy`: kernel overlayfs's own form (fs/overlayfs/copy_up.c), which it reads
//! with `metacopy=on`. The data is found as the file itself would be, by its name in the layers below; once
//! it has another name, `overlay.redirect` holds the path. It comes up when it is about to change.

use std::ffi::{OsStr, OsString};
use std::ops::ControlFlow;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::ffi::OsStrExt;
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::Ordering;

use nix::errno::Errno;

use super::attr::{DAY, attr_of, kind_of_dirent, now};
use super::copyup::{Content, restore_times};
use super::error::{Context, Result};
use super::lend;
use super::lower::LowerObject;
use super::node::{MaybeTime, Node};
use super::types::{FileKind, NodeId, Timestamp, XattrFamily};
use super::union::Union;
use super::upper::Upper;
use crate::sys::fs::{self, Object};
use crate::sys::{dirents, xattr};

/// Where Linux keeps the capabilities of a file; any write to it takes them away.
pub(super) const CAPABILITY: &str = "security.capability";

/// Whether the upper directory `dir` may hold files whose data is in lower layers.
pub fn may_hold_metacopies(dir: &Path, family: XattrFamily) -> std::io::Result<bool> {
    let root = fs::open_path(dir, libc::O_RDONLY | libc::O_DIRECTORY)?;
    match xattr::get(Object::Open(root.as_fd()), family.metacopies()) {
        Ok(_) => Ok(true),
        Err(Errno::ENODATA | Errno::EOPNOTSUPP) => Ok(false),
        Err(errno) => Err(errno.into()),
    }
}

impl Union {
    pub(super) fn makes_metacopies(&self) -> bool {
        !self.no_metacopy
    }

    /// Marks an object that is being made as one without data; false where there is no room for the
    /// mark.
    pub(super) fn mark_metacopy(&self, upper: &Upper, object: Object<'_>) -> Result<bool> {
        if !upper.metacopies.load(Ordering::Acquire) {
            // Said of the whole before the first has a name.
            let (root, _) = upper.root.get();
            let root = Object::Open(root.as_fd());
            xattr::set(root, self.family.metacopies(), b"y", 0)
                .context("noting that the upper relies on the lower layers for data")?;
            upper.metacopies.store(true, Ordering::Release);
        }
        match self.set_mark(object, self.family.metacopy(), b"") {
            Ok(()) => Ok(true),
            Err(Errno::ENOSPC | Errno::E2BIG) => Ok(false),
            Err(errno) => Err(errno).context("marking a copy without data"),
        }
    }

    /// The attributes of a file that is in the upper are about to change.
    pub(super) fn attributes_change(node: &Node) {
        let noted = node.place.read().atime.get().is_some();
        if noted {
            node.place.write().atime = MaybeTime::default();
        }
    }

    /// Notes on a `metacopy` that is about to lose the name, by which its data is found, where the data is
    /// (`ovl_set_redirect` in fs/overlayfs/dir.c). The path is always absolute: it holds for all names.
    pub(super) fn redirect_data(
        &self,
        object: Object<'_>,
        parent: &Arc<Node>,
        name: &OsStr,
    ) -> Result<()> {
        let known = self
            .redirect_mark(object)?
            .map(|path| path.into_os_string());
        if let Some(known) = &known
            && known.as_bytes().starts_with(b"/")
        {
            return Ok(());
        }
        let mut path: OsString = self.lower_path(parent)?;
        path.push("/");
        path.push(known.as_deref().unwrap_or(name));
        self.store_redirect(object, &path)
            .context("noting where the data of a renamed file is")
    }

    /// Stores where something continues below; EXDEV where no attribute of the host can be so long
    /// (`ovl_set_redirect` in fs/overlayfs/dir.c).
    pub(super) fn store_redirect(&self, object: Object<'_>, path: &OsStr) -> Result<()> {
        /// Room for an attribute of the longest path.
        const LONGEST: u64 = 64 << 10;
        match self.set_mark(object, self.family.redirect(), path.as_bytes()) {
            Err(Errno::E2BIG | Errno::ERANGE) => Err(Errno::EXDEV.into()),
            // Of a disk that is not full: ext4 has one block for the attributes of a file.
            Err(Errno::ENOSPC) if self.has_room_for(LONGEST)? => Err(Errno::EXDEV.into()),
            result => Ok(result?),
        }
    }

    /// Sees to it that the data of a file is found under a name that it is about to get.
    pub(super) fn keep_data_found(&self, node: &Arc<Node>) -> Result<()> {
        if !node.place.read().metacopy {
            return Ok(());
        }
        match node.name() {
            Some(name) => {
                let file = self.with_upper(node, |object| object.open(libc::O_PATH))?;
                let file = Object::Path(file.as_fd());
                match self.redirect_data(file, &name.parent, &name.name) {
                    Err(error) if error.is(Errno::EXDEV) => self.copy_up(node, Content::All),
                    result => result,
                }
            }
            None => self.copy_up(node, Content::All),
        }
    }

    /// Moves the access time of a file whose data was read from a lower layer, as the host does it for
    /// one of the upper. `seen`: when this was last looked at.
    pub(super) fn touch_metacopy(&self, node: &Arc<Node>, seen: Option<Timestamp>) -> Result<()> {
        let now = now();
        if seen.is_some_and(|seen| now.sec - seen.sec < DAY) {
            return Ok(());
        }
        // Setting it would be a change of the file and move its change time, too.
        let file = self.with_upper(node, |object| self.open_upper(object, libc::O_RDONLY))?;
        fs::pread_full(file.as_fd(), &mut [0], 0)?;
        let mut place = node.place.write();
        if place.metacopy {
            place.atime = now.into();
        }
        Ok(())
    }

    /// Brings up the data of a file that so far has only attributes in the upper. The caller holds its
    /// `copy_up`.
    pub(super) fn complete_metacopy(
        &self,
        node: &Arc<Node>,
        data: &dyn LowerObject,
        content: Content,
    ) -> Result<()> {
        let (fd, size) = self.fetch_data(node, data, content)?;
        if !self.volatile && size > 0 && content != Content::UpTo(0) {
            fs::fsync(fd.as_fd(), false)?;
        }
        self.data_is_here(node, fd.as_fd())
    }

    /// Copies the data of a `metacopy` into it; answers the file and its size. It is not used yet.
    pub(super) fn fetch_data(
        &self,
        node: &Arc<Node>,
        data: &dyn LowerObject,
        content: Content,
    ) -> Result<(OwnedFd, u64)> {
        let fd = self.with_upper(node, |object| self.open_upper(object, libc::O_RDWR))?;
        let size = attr_of(&fs::fstat(fd.as_fd())?).size;
        self.quietly(node, fd.as_fd(), || {
            // A truncation that a crash has interrupted counts: what it cut off does not come back.
            self.copy_content(data, fd.as_fd(), size, content)
        })?;
        Ok((fd, size))
    }

    /// Makes a `metacopy` whose data is there, and durable, an ordinary file. Before this a crash leaves the data of
    /// the lower valid.
    pub(super) fn data_is_here(&self, node: &Node, fd: BorrowedFd<'_>) -> Result<()> {
        self.quietly(node, fd, || self.unmark_metacopy(Object::Open(fd)))?;
        let ino = attr_of(&fs::fstat(fd)?).ino;
        Self::arrived(node, &mut node.place.write(), ino, false);
        Ok(())
    }

    /// Takes the marks of a file without data off, also where that has failed in the middle before.
    pub(super) fn unmark_metacopy(&self, object: Object<'_>) -> Result<()> {
        for mark in [self.family.metacopy(), self.family.redirect()] {
            match self
                .upper()?
                .permitted(object, lend::WRITE, || xattr::remove(object, mark))
            {
                Ok(()) | Err(Errno::ENODATA) => {}
                Err(errno) => return Err(errno.into()),
            }
        }
        Ok(())
    }

    /// Does something to an upper file that nobody is to notice: its times, mode and capabilities stay what they
    /// were, and its change time is shown as before.
    pub(super) fn quietly(
        &self,
        node: &Node,
        fd: BorrowedFd<'_>,
        body: impl FnOnce() -> Result<()>,
    ) -> Result<()> {
        let object = Object::Open(fd);
        // A change in between would be undone.
        let _turn = node.attributes.lock();
        let before = {
            // Its own mode, and not a lent one.
            let _turn = self.upper()?.modes.read();
            fs::fstat(fd)?
        };
        let attr = attr_of(&before);
        let capability = self.mark(object, OsStr::new(CAPABILITY))?;
        let done = body();
        if let Some(capability) = capability {
            xattr::set(object, OsStr::new(CAPABILITY), &capability, 0)
                .context("keeping the capabilities of a file")?;
        }
        {
            // Nor is a mode given back while it is lent: who has lent it would lack it, and put the bits back that are lost.
            let _turn = self.upper()?.modes.read();
            if attr_of(&object.stat()?).perm != attr.perm {
                object.chmod(u32::from(attr.perm))?;
            }
        }
        restore_times(fd, &before)?;
        let after = attr_of(&fs::fstat(fd)?).ctime;
        let mut place = node.place.write();
        place.rare.quiet_ctime.moved(attr.ctime, after);
        done
    }

    /// Brings up the data of every file that has only attributes in the upper, so that the upper says all
    /// by itself. Files that operations meanwhile leave without data are not waited for, nor are those
    /// whose names in the upper are all gone: `settle_links` gives them one.
    pub fn complete(&self) -> Result<()> {
        let Some(upper) = self.upper_of() else {
            return Ok(());
        };
        if !upper.metacopies.load(Ordering::Acquire) {
            return Ok(());
        }
        self.complete_marked(|_| true)
    }

    /// As `complete`, of the files with a mark of which `wanted` answers true.
    pub(super) fn complete_marked(&self, wanted: impl Fn(&[u8]) -> bool) -> Result<()> {
        self.visit_marked(wanted, &mut |node| {
            self.copy_up(node, Content::All)?;
            Ok(ControlFlow::Continue(()))
        })
    }

    /// Shows `visit` the files with a mark of which `wanted` answers true, until it breaks off.
    pub(super) fn visit_marked(
        &self,
        wanted: impl Fn(&[u8]) -> bool,
        visit: &mut impl FnMut(&Arc<Node>) -> Result<ControlFlow<()>>,
    ) -> Result<()> {
        let mut pending = vec![self.hold(self.node(NodeId::ROOT)?)];
        while let Some(dir) = pending.pop() {
            for (name, kind) in self.names_to_complete(&dir, &wanted)? {
                let node = match self.child(&dir, &name, false) {
                    Ok((node, _)) => self.hold(node),
                    Err(error) if error.is(Errno::ENOENT) => continue,
                    Err(error) => return Err(error),
                };
                if kind == FileKind::Directory && node.directory.is_some() {
                    pending.push(node);
                    continue;
                }
                let is_it = node.kind == FileKind::Regular && node.has_upper();
                if is_it && visit(&node)?.is_break() {
                    return Ok(());
                }
            }
        }
        Ok(())
    }

    /// The directories of an upper directory, and the files in it that have no data.
    fn names_to_complete(
        &self,
        dir: &Arc<Node>,
        wanted: &impl Fn(&[u8]) -> bool,
    ) -> Result<Vec<(OsString, FileKind)>> {
        let state = Self::directory(dir)?.state.read();
        if state.removed || !dir.has_upper() {
            return Ok(Vec::new());
        }
        let impure = self.is_impure(dir, &state)?;
        let fd = self.dir_fd(dir)?;
        let flags = libc::O_RDONLY | libc::O_DIRECTORY;
        let listing = Object::Entry(fd.as_fd(), OsStr::new(".")).open_quietly(flags)?;
        let mut names = Vec::new();
        dirents::read_all(listing.as_fd(), &mut |entry| {
            names.push((entry.name.to_owned(), kind_of_dirent(entry.kind)));
        })
        .context("listing a directory of the upper layer")?;
        let mut found = Vec::new();
        for (name, kind) in names {
            let object = Object::Entry(fd.as_fd(), &name);
            let kind = match kind {
                Some(kind) => kind,
                None => attr_of(&object.stat()?).kind,
            };
            let visited = match kind {
                FileKind::Directory => true,
                FileKind::Regular if impure => {
                    let mark = self.mark(object, self.family.metacopy())?;
                    mark.is_some_and(|value| wanted(&value))
                }
                _ => false,
            };
            if visited {
                found.push((name, kind));
            }
        }
        Ok(found)
    }
}
