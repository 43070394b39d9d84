//! Copy-up: an object of a lower layer becomes one of the upper.
//!
//! The copy is made whole without a name, or with one in the work directory, and then put into its place, so at every
//! moment, also after a crash, the name stands for the old object or for the complete new one. Content is copied
//! with no lock held but the node's own, so nobody else waits; readers of the file itself go on reading
//! the lower meanwhile.

use std::ffi::OsStr;
use std::os::fd::{AsFd, BorrowedFd};
use std::sync::Arc;
use std::sync::atomic::Ordering;

use nix::errno::Errno;

use super::attr::{attr_of, timespec};
use super::error::{Context, Error, Result};
use super::lend::Lent;
use super::lower::{LowerFile, LowerObject};
use super::node::{Lowers, MaybeTime, Node, Orphan};
use super::stat_override::HOST_PERM;
use super::types::{Attr, FileKind, NodeId, Timestamp};
use super::union::Union;
use super::upper::{Draft, Temp, Upper};
use crate::sys::fs::{self, Object};

/// How much of a file's content the operation needs.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Content {
    /// None: only attributes or names change. The upper gets a `metacopy`.
    Metadata,
    /// Some: it is about to be written. Of a large file chunks come up as they change.
    Writable,
    /// All of it.
    All,
    /// The file will be truncated to this length at once.
    UpTo(u64),
}

const SET_IDS: u32 = 0o6000;

/// A change of attributes of an upper object.
pub(super) type Change<'a> = dyn Fn(Object<'_>) -> Result<()> + 'a;

/// The type bits of a mode.
pub(super) fn type_bits(kind: FileKind) -> u32 {
    match kind {
        FileKind::Regular => libc::S_IFREG,
        FileKind::Directory => libc::S_IFDIR,
        FileKind::Symlink => libc::S_IFLNK,
        FileKind::CharDevice => libc::S_IFCHR,
        FileKind::BlockDevice => libc::S_IFBLK,
        FileKind::Fifo => libc::S_IFIFO,
        FileKind::Socket => libc::S_IFSOCK,
    }
}

/// Reads our own form of an origin: index of the number space, number.
pub(super) fn decode_origin_number(stored: &[u8]) -> Option<(u32, u64)> {
    let (index, ino) = stored.split_at_checked(4)?;
    Some((
        u32::from_le_bytes(index.try_into().ok()?),
        u64::from_le_bytes(ino.try_into().ok()?),
    ))
}

impl Union {
    /// Sees to it that `node` and all directories above it are in the upper. Must not be called with a
    /// directory locked.
    pub(super) fn copy_up(&self, node: &Arc<Node>, content: Content) -> Result<()> {
        self.copy_up_changed(node, content, None).map(drop)
    }

    /// As `copy_up`. If it makes a copy, that has the `change` from the beginning; answers whether it was made.
    pub(super) fn copy_up_changed(
        &self,
        node: &Arc<Node>,
        content: Content,
        change: Option<&Change<'_>>,
    ) -> Result<bool> {
        self.upper()?;
        self.check_unprotected(node)?;
        if node.in_upper() {
            return Ok(false);
        }
        if content == Content::Metadata && node.has_upper() {
            Self::attributes_change(node);
            return Ok(false);
        }
        if content != Content::All && node.place.read().rare.chunks.is_some() {
            return Ok(false);
        }
        let mut chain = vec![Arc::clone(node)];
        let mut at = node.name().map(|name| name.parent);
        while let Some(parent) = at {
            if parent.in_upper() {
                break;
            }
            at = parent.name().map(|name| name.parent);
            chain.push(parent);
        }
        let mut changed = false;
        while let Some(next) = chain.pop() {
            let (content, change) = match chain.is_empty() {
                true => (content, change),
                false => (Content::All, None),
            };
            changed = self
                .with_room(|| self.copy_up_one(&next, content, change))
                .with_context(|| match next.name() {
                    Some(name) => format!("copying up {:?}", name.name),
                    None => "copying up a file without a name".into(),
                })?;
            if !chain.is_empty() {
                self.tell(next.id);
            }
        }
        Ok(changed)
    }

    /// EPERM for what a lower layer has as immutable or append-only, and for a directory that is a copy of such a one. Files
    /// that are so are never copied up.
    pub(super) fn check_unprotected(&self, node: &Arc<Node>) -> Result<()> {
        let is_protected = match (node.seen_lower(), &node.directory) {
            (Some(lower), _) => !lower.object.protection()?.is_empty(),
            (None, Some(directory)) => directory.protected.get_or(|| {
                let name = self.family.protattr();
                self.with_upper(node, |object| Ok(self.mark(object, name)))?
                    .map(|mark| mark.is_some())
            })?,
            (None, None) => false,
        };
        match is_protected {
            true => Err(Errno::EPERM).context("it is immutable or append-only in a lower layer"),
            false => Ok(()),
        }
    }

    /// Answers whether it has made the change.
    fn copy_up_one(
        &self,
        node: &Arc<Node>,
        content: Content,
        change: Option<&Change<'_>>,
    ) -> Result<bool> {
        let upper = self.upper()?;
        let _one_at_a_time = node.copy_up.lock();
        if node.in_upper() {
            return Ok(false);
        }
        let (has_upper, lowers, atime, in_chunks) = {
            let place = node.place.read();
            (
                place.upper.is_some(),
                place.lowers.clone(),
                place.atime.get(),
                place.rare.chunks.is_some(),
            )
        };
        let (Some(top), Some(bottom)) = (lowers.first(), lowers.last()) else {
            return Err(Errno::ESTALE.into());
        };
        if has_upper {
            match content {
                Content::Metadata => {}
                Content::All if in_chunks => self.complete_chunks(node)?,
                _ if in_chunks => {}
                _ if self.is_for_chunks(node, content, bottom.object.attr()?.size) => {
                    self.check_room_for(&*bottom.object, content)?;
                    self.begin_chunks(node, &*bottom.object)?;
                }
                _ => self.complete_metacopy(node, &*bottom.object, content)?,
            }
            return Ok(false);
        }
        let source = &*top.object;
        let of_source = source.attr()?;
        let in_chunks = self.is_for_chunks(node, content, of_source.size);
        if in_chunks {
            self.check_room_for(&*bottom.object, content)?;
        }
        let attr = Attr {
            atime: atime.unwrap_or(of_source.atime),
            ..of_source
        };
        let without_data = (content == Content::Metadata && self.makes_metacopies()) || in_chunks;
        let without_data = without_data && node.kind == FileKind::Regular && attr.size > 0;
        let draft = self.begin_copy(upper, source, &attr)?;
        let object = draft.object();
        let made = attr_of(&object.stat()?);
        let mut metacopy = false;
        if let (FileKind::Regular, Object::Open(fd)) = (node.kind, object) {
            // Cutting or writing it takes its capabilities and set-id bits away, so both come before the attributes.
            if without_data {
                fs::ftruncate(fd, attr.size)?;
                self.copy_metadata(source, &attr, object, &made)?;
                // After the origin: of both there is room for one in ext4's inode, and what does not fit goes into a block,
                // which files with equal attributes share. The mark is the same on all.
                metacopy = self.mark_metacopy(upper, object)?;
            }
            if !metacopy {
                self.copy_content(&*bottom.object, fd, attr.size, content)?;
            }
        }
        if !metacopy {
            self.copy_metadata(source, &attr, object, &made)?;
        }
        set_times(object, attr.atime, attr.mtime)?;
        if let Some(change) = change {
            change(object)?;
        }
        // A new name does not bring the data to the disk by itself.
        if let (FileKind::Regular, Object::Open(fd)) = (node.kind, object)
            && !metacopy
            && !self.volatile
            && attr.size > 0
            && content != Content::UpTo(0)
        {
            fs::fsync(fd, false)?;
        }
        self.install_copy(node, draft, made.ino, source, metacopy, change.is_some())?;
        if metacopy && in_chunks {
            self.begin_chunks(node, &*bottom.object)?;
        }
        Ok(change.is_some())
    }

    /// Makes an empty object of the kind of `source`.
    fn begin_copy<'a>(
        &self,
        upper: &'a Upper,
        source: &dyn LowerObject,
        attr: &Attr,
    ) -> Result<Draft<'a>> {
        if attr.kind == FileKind::Regular {
            let perm = match self.stat_override {
                Some(_) => HOST_PERM,
                None => u32::from(attr.perm) & !SET_IDS,
            };
            return Ok(Draft::file(upper, perm)?);
        }
        let temp = Temp::new(upper);
        let mut fd = None;
        match attr.kind {
            FileKind::Directory => {
                fs::mkdirat(upper.work(), &temp.name, 0o700)?;
                let flags = libc::O_RDONLY | libc::O_DIRECTORY;
                fd = Some(fs::openat(upper.work(), &temp.name, flags, 0)?);
            }
            FileKind::Symlink => fs::symlinkat(&source.readlink()?, upper.work(), &temp.name)?,
            kind => {
                let mode = type_bits(kind) | 0o600;
                fs::mknodat(upper.work(), &temp.name, mode, attr.rdev)?;
            }
        }
        Ok(Draft::Named(temp, fd))
    }

    /// `changed`: it is not only a copy.
    fn install_copy(
        &self,
        node: &Arc<Node>,
        draft: Draft<'_>,
        ino: u64,
        source: &dyn LowerObject,
        metacopy: bool,
        changed: bool,
    ) -> Result<()> {
        let upper = self.upper()?;
        if node.id == NodeId::ROOT {
            return Err(Errno::EIO).context("the root of the union is not in the upper");
        }
        loop {
            let Some(name) = node.name() else {
                // Removed meanwhile, or a removed file that somebody still writes: it needs no name.
                let orphan = if self.may_keep_open()? {
                    let fd = draft.keep_open()?;
                    upper.orphan_fds.fetch_add(1, Ordering::Relaxed);
                    Orphan::Fd(Arc::new(fd))
                } else {
                    Orphan::Work(draft.keep()?.as_os_str().into())
                };
                let mut place = node.place.write();
                place.rare.orphan = Some(orphan);
                place.rare.link_offset -= 1;
                Self::arrived(node, &mut place, ino, metacopy);
                return Ok(());
            };
            let directory = Self::directory(&name.parent)?;
            // Nobody sets times or the mode of the directory meanwhile, which would be undone.
            let _turn = name.parent.attributes.lock();
            let mut state = directory.state.write();
            let still = node
                .name()
                .is_some_and(|now| Arc::ptr_eq(&now.parent, &name.parent) && now.name == name.name);
            if !still {
                continue;
            }
            let dir = self.dir_fd(&name.parent)?;
            let before = attr_of(&fs::fstat(dir.as_fd())?);
            let lent = Lent::for_names(dir.as_fd(), &before)?;
            self.mark_impure(&state, dir.as_fd())?;
            let links = source.attr()?.nlink;
            let index = if links > 1 && node.kind != FileKind::Directory {
                self.add_index(upper, &draft, source, node)?
            } else {
                None
            };
            draft.install(dir.as_fd(), &name.name)?;
            // A copy of a directory is no change of it either.
            let mut copied = match &node.directory {
                Some(directory) if !changed => Some(directory.state.write()),
                _ => None,
            };
            if let Some(copied) = &mut copied {
                let now = attr_of(&fs::fstatat(dir.as_fd(), &name.name)?).ctime;
                copied.quiet_ctime.moved(source.attr()?.ctime, now);
            }
            let mut place = node.place.write();
            if index.is_some() {
                place.rare.index = index;
            }
            if node.kind != FileKind::Directory {
                let host = 1 + i64::from(place.rare.index.is_some());
                if host != i64::from(links) {
                    place.rare.link_offset += i64::from(links) - host;
                }
            }
            Self::arrived(node, &mut place, ino, metacopy);
            drop(place);
            drop(copied);
            drop(lent);
            // A copy of a child is no change of its directory. That is not told to whoever keeps attributes of the
            // directory, so its change time is to be the same, too.
            set_times(Object::Open(dir.as_fd()), before.atime, before.mtime)?;
            let after = attr_of(&fs::fstat(dir.as_fd())?).ctime;
            state.quiet_ctime.moved(before.ctime, after);
            return Ok(());
        }
    }

    /// The upper has the object from now on; with `metacopy` all but its data.
    pub(super) fn arrived(node: &Node, place: &mut super::node::Place, ino: u64, metacopy: bool) {
        place.upper = Some(ino);
        place.atime = MaybeTime::default();
        place.metacopy = metacopy;
        if metacopy {
            return;
        }
        if place.rare.chunks.is_some() {
            place.rare.chunks = None;
        }
        if node.kind != FileKind::Directory {
            place.lowers = Lowers::default();
        }
        node.in_upper.store(true, Ordering::Release);
        // Whoever reads through the lower's descriptor finds that it is not the upper's.
        node.io.clear();
    }

    /// Marks a directory of the upper as holding entries with an origin.
    pub(super) fn mark_impure(
        &self,
        state: &super::node::DirState,
        dir: BorrowedFd<'_>,
    ) -> Result<()> {
        if state.impure.get() != Some(true) {
            self.set_mark(Object::Open(dir), self.family.impure(), b"y")
                .context("marking an upper directory as impure")?;
            state.impure.set(true);
        }
        Ok(())
    }

    /// Copies the first `size` bytes, as far as they are wanted, into a file without data.
    pub(super) fn copy_content(
        &self,
        source: &dyn LowerObject,
        to: BorrowedFd<'_>,
        size: u64,
        content: Content,
    ) -> Result<()> {
        let size = size.min(source.attr()?.size);
        let wanted = match content {
            Content::All | Content::Writable | Content::Metadata => size,
            Content::UpTo(limit) => size.min(limit),
        };
        if wanted == 0 {
            return Ok(fs::ftruncate(to, 0)?);
        }
        let from = source.open()?;
        let upper = self.upper()?;
        if let Some(host) = from.host_fd()
            && upper.clones.load(Ordering::Relaxed)
        {
            match fs::clone_content(host, to) {
                Ok(()) => return Ok(fs::ftruncate(to, wanted)?),
                // The file system has no such thing. Other failures are of this file alone.
                Err(Errno::EOPNOTSUPP | Errno::ENOTTY) => {
                    upper.clones.store(false, Ordering::Relaxed);
                }
                Err(_) => {}
            }
        }
        copy_extents(&*from, to, 0, wanted)?;
        fs::ftruncate(to, wanted)?;
        Ok(())
    }

    /// Owner, mode, attributes and origin, in the order in which none undoes another. `made`: the copy as it was made.
    fn copy_metadata(
        &self,
        source: &dyn LowerObject,
        attr: &Attr,
        to: Object<'_>,
        made: &Attr,
    ) -> Result<()> {
        self.copy_owner(attr, to, made)?;
        for name in source.xattr_names()? {
            if self.family.is_mark(&name) {
                continue;
            }
            let value = source.xattr(&name)?;
            match self.set_mark(to, &name, &value) {
                Err(Errno::EOPNOTSUPP) if !must_be_kept(&name) => {}
                result => result.with_context(|| format!("copying the attribute {name:?}"))?,
            }
        }
        if attr.kind == FileKind::Directory {
            let protection = source.protection()?;
            if !protection.is_empty() {
                // The flags of the host would keep us out, too.
                self.set_mark(to, self.family.protattr(), protection.as_bytes())
                    .context("keeping that a directory is immutable or append-only")?;
            }
        }
        self.set_origin(source, to)
    }

    fn set_origin(&self, source: &dyn LowerObject, to: Object<'_>) -> Result<()> {
        let origin = source.origin().and_then(|origin| origin.encode());
        let ino = source.attr()?.ino;
        let stored = match origin {
            Some(stored) => self.set_mark(to, self.family.origin(), &stored),
            None => Ok(()),
        };
        let stored = stored.and_then(|()| match self.numbers.index_of(source.number_space()) {
            Some(index) if self.origin_numbers => {
                let mut value = index.to_le_bytes().to_vec();
                value.extend_from_slice(&ino.to_le_bytes());
                self.set_mark(to, self.family.origin_number(), &value)
            }
            _ => Ok(()),
        });
        match stored {
            // `user.` attributes cannot be set on links and devices: those lose their number.
            Err(Errno::EPERM | Errno::EOPNOTSUPP) => Ok(()),
            result => result.context("noting where a copy comes from"),
        }
    }
}

/// Attributes without which the copy would not be the same to the kernel.
fn must_be_kept(name: &OsStr) -> bool {
    let name = name.as_encoded_bytes();
    name.starts_with(b"security.") || name.starts_with(b"system.posix_acl")
}

pub(super) fn set_times(to: Object<'_>, atime: Timestamp, mtime: Timestamp) -> Result<()> {
    Ok(to.set_times(&[timespec(atime), timespec(mtime)])?)
}

/// Puts a file's or directory's times back to what they were.
pub(super) fn restore_times(fd: BorrowedFd<'_>, before: &fs::Stat) -> Result<()> {
    let attr = attr_of(before);
    set_times(Object::Open(fd), attr.atime, attr.mtime)
}

/// Copies a range, leaving out what the source has as holes.
pub(super) fn copy_extents(
    from: &dyn LowerFile,
    to: BorrowedFd<'_>,
    start: u64,
    end: u64,
) -> Result<()> {
    let mut at = start;
    while at < end {
        let signed = i64::try_from(at).map_err(|_| Errno::EFBIG)?;
        let data = match from.seek(signed, libc::SEEK_DATA) {
            Ok(data) => u64::try_from(data).unwrap_or(at),
            Err(error) if error.is(Errno::ENXIO) => return Ok(()),
            // A file system that cannot tell: all is data.
            Err(error) if error.is(Errno::EINVAL) => at,
            Err(error) => return Err(error),
        };
        let signed = i64::try_from(data).map_err(|_| Errno::EFBIG)?;
        if data >= end {
            return Ok(());
        }
        let hole = match from.seek(signed, libc::SEEK_HOLE) {
            Ok(hole) => u64::try_from(hole).unwrap_or(end).min(end),
            Err(error) if error.is(Errno::EINVAL) || error.is(Errno::ENXIO) => end,
            Err(error) => return Err(error),
        };
        copy_range(from, to, data, hole)?;
        at = hole;
    }
    Ok(())
}

/// Copies a range with its holes as zeros.
pub(super) fn copy_range(
    from: &dyn LowerFile,
    to: BorrowedFd<'_>,
    start: u64,
    end: u64,
) -> Result<()> {
    const STEP: u64 = 1 << 20;
    let mut at = start;
    if let Some(host) = from.host_fd() {
        while at < end {
            let offset = i64::try_from(at).map_err(|_| Errno::EFBIG)?;
            let len = usize::try_from(end - at).unwrap_or(usize::MAX).min(1 << 30);
            match fs::copy_file_range(host, offset, to, offset, len) {
                Ok(0) => break,
                Ok(n) => at += n as u64,
                Err(Errno::EINTR) => {}
                Err(Errno::ENOSYS | Errno::EXDEV | Errno::EOPNOTSUPP | Errno::EINVAL) => break,
                Err(errno) => return Err(errno.into()),
            }
        }
    }
    let mut buf = vec![0u8; usize::try_from(STEP.min(end - at)).unwrap_or(0)];
    while at < end {
        let len = usize::try_from(STEP.min(end - at)).unwrap_or(0);
        let got = from.read_at(&mut buf[..len], at)?;
        if got == 0 {
            return Err(Error::new(Errno::EIO)).context("a lower file is shorter than it was");
        }
        let mut done = 0;
        while done < got {
            let n = fs::pwrite_full(to, &buf[done..got], at + done as u64)?;
            if n == 0 {
                return Err(Errno::ENOSPC.into());
            }
            done += n;
        }
        at += got as u64;
    }
    Ok(())
}
