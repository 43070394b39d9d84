//! Copy-up: an object of a lower layer becomes one of the upper.
//!
//! The copy is made whole in the work directory and then renamed to its place, so at every moment, also
//! after a crash, the name stands for the old object or for the complete new one. Content is copied
//! with no lock held but the node's own, so nobody else waits; readers of the file itself go on reading
//! the lower meanwhile.

use std::ffi::OsStr;
use std::os::fd::{AsFd, BorrowedFd};
use std::sync::Arc;
use std::sync::atomic::Ordering;

use nix::errno::Errno;

use super::attr::timespec;
use super::error::{Context, Error, Result};
use super::lower::{LowerFile, LowerObject};
use super::node::{Lowers, Node, Orphan};
use super::types::{Attr, FileKind, NodeId, Timestamp};
use super::union::Union;
use super::upper::{Temp, Upper};
use crate::sys::fs::{self, Object};
use crate::sys::xattr;

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
        self.upper()?;
        if node.in_upper() {
            return Ok(());
        }
        if content == Content::Metadata && node.has_upper() {
            Self::attributes_change(node);
            return Ok(());
        }
        if content != Content::All && node.place.read().rare.chunks.is_some() {
            return Ok(());
        }
        Self::check_unprotected(node)?;
        let mut chain = vec![Arc::clone(node)];
        let mut at = node.name().map(|name| name.parent);
        let mut directories = Vec::new();
        while let Some(parent) = at {
            directories.push(parent.id);
            if parent.in_upper() {
                break;
            }
            at = parent.name().map(|name| name.parent);
            chain.push(parent);
        }
        while let Some(next) = chain.pop() {
            let content = if chain.is_empty() {
                content
            } else {
                Content::All
            };
            self.with_room(|| self.copy_up_one(&next, content))
                .with_context(|| format!("copying up {:?}", next.name().map(|name| name.name)))?;
        }
        if let Some(tell) = self.on_side_effect.get() {
            directories.into_iter().for_each(tell);
        }
        Ok(())
    }

    /// EPERM for what a lower layer has as immutable or append-only. What is in the upper the host protects.
    pub(super) fn check_unprotected(node: &Node) -> Result<()> {
        let lower = {
            let place = node.place.read();
            match place.upper {
                Some(_) => None,
                None => place.lowers.first().cloned(),
            }
        };
        match lower {
            Some(lower) if lower.object.is_protected()? => {
                Err(Errno::EPERM).context("a lower layer has it as immutable or append-only")
            }
            _ => Ok(()),
        }
    }

    fn copy_up_one(&self, node: &Arc<Node>, content: Content) -> Result<()> {
        let upper = self.upper()?;
        let _one_at_a_time = node.copy_up.lock();
        if node.in_upper() {
            return Ok(());
        }
        let (has_upper, lowers, atime, in_chunks) = {
            let place = node.place.read();
            (
                place.upper.is_some(),
                place.lowers.clone(),
                place.atime,
                place.rare.chunks.is_some(),
            )
        };
        let (Some(top), Some(bottom)) = (lowers.first(), lowers.last()) else {
            return Err(Errno::ESTALE.into());
        };
        if has_upper {
            return match content {
                Content::Metadata => Ok(()),
                Content::All if in_chunks => self.complete_chunks(node),
                _ if in_chunks => Ok(()),
                _ if self.is_for_chunks(node, content, bottom.object.attr()?.size) => {
                    self.check_room_for(&*bottom.object, content)?;
                    self.begin_chunks(node, &*bottom.object)
                }
                _ => self.complete_metacopy(node, &*bottom.object, content),
            };
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
        let temp = Temp::new(upper);
        let mut metacopy = false;
        match node.kind {
            FileKind::Regular => {
                let fd = fs::openat(
                    upper.work(),
                    &temp.name,
                    libc::O_CREAT | libc::O_EXCL | libc::O_RDWR,
                    0o600,
                )?;
                let object = Object::Open(fd.as_fd());
                let without_data = content == Content::Metadata && self.makes_metacopies();
                metacopy = (without_data || in_chunks)
                    && attr.size > 0
                    && self.mark_metacopy(upper, object)?;
                if metacopy {
                    fs::ftruncate(fd.as_fd(), attr.size)?;
                } else {
                    self.copy_content(&*bottom.object, fd.as_fd(), attr.size, content)?;
                }
                self.copy_metadata(source, &attr, object)?;
                // A rename to a new name does not bring the data to the disk by itself.
                if !metacopy && !self.volatile && attr.size > 0 && content != Content::UpTo(0) {
                    fs::fsync(fd.as_fd(), false)?;
                }
            }
            FileKind::Directory => {
                fs::mkdirat(upper.work(), &temp.name, 0o700)?;
                let fd = fs::openat(
                    upper.work(),
                    &temp.name,
                    libc::O_RDONLY | libc::O_DIRECTORY,
                    0,
                )?;
                self.copy_metadata(source, &attr, Object::Open(fd.as_fd()))?;
            }
            FileKind::Symlink => {
                fs::symlinkat(&source.readlink()?, upper.work(), &temp.name)?;
                self.copy_metadata(source, &attr, temp.object())?;
            }
            kind => {
                let mode = type_bits(kind) | 0o600;
                fs::mknodat(upper.work(), &temp.name, mode, attr.rdev)?;
                self.copy_metadata(source, &attr, temp.object())?;
            }
        }
        self.install_copy(node, upper, temp, source, metacopy)?;
        if metacopy && in_chunks {
            return self.begin_chunks(node, &*bottom.object);
        }
        Ok(())
    }

    fn install_copy(
        &self,
        node: &Arc<Node>,
        upper: &Upper,
        temp: Temp<'_>,
        source: &dyn LowerObject,
        metacopy: bool,
    ) -> Result<()> {
        let ino = temp.object().stat()?.st_ino;
        if node.id == NodeId::ROOT {
            return Err(Errno::EIO).context("the root of the union is not in the upper");
        }
        loop {
            let Some(name) = node.name() else {
                // Removed meanwhile, or a removed file that somebody still writes: it needs no name.
                let orphan = if self.may_keep_open()? {
                    let fd = fs::openat(upper.work(), &temp.name, libc::O_PATH, 0)?;
                    upper.orphan_fds.fetch_add(1, Ordering::Relaxed);
                    drop(temp);
                    Orphan::Fd(Arc::new(fd))
                } else {
                    Orphan::Work(temp.keep().as_os_str().into())
                };
                let mut place = node.place.write();
                place.rare.orphan = Some(orphan);
                place.rare.link_offset -= 1;
                Self::arrived(node, &mut place, ino, metacopy);
                return Ok(());
            };
            let directory = Self::directory(&name.parent)?;
            let state = directory.state.write();
            let still = node
                .name()
                .is_some_and(|now| Arc::ptr_eq(&now.parent, &name.parent) && now.name == name.name);
            if !still {
                continue;
            }
            let dir = self.dir_fd(&name.parent)?;
            self.mark_impure(&state, dir.as_fd())?;
            let links = source.attr()?.nlink;
            let index = if links > 1 && node.kind != FileKind::Directory {
                self.add_index(upper, &temp, source, node)?
            } else {
                None
            };
            // A copy of a child is no change of its directory.
            let before = fs::fstat(dir.as_fd())?;
            temp.install(dir.as_fd(), &name.name, 0)
                .map_err(|(_, errno)| errno)?;
            restore_times(dir.as_fd(), &before)?;
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
            return Ok(());
        }
    }

    /// The upper has the object from now on; with `metacopy` all but its data.
    pub(super) fn arrived(node: &Node, place: &mut super::node::Place, ino: u64, metacopy: bool) {
        place.upper = Some(ino);
        place.atime = None;
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
            xattr::set(Object::Open(dir), self.family.impure(), b"y", 0)
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

    /// Owner, mode, attributes, origin and times, in the order in which none undoes another.
    fn copy_metadata(&self, source: &dyn LowerObject, attr: &Attr, to: Object<'_>) -> Result<()> {
        self.copy_owner(attr, to)?;
        for name in source.xattr_names()? {
            if self.family.is_mark(&name) {
                continue;
            }
            let value = source.xattr(&name)?;
            match xattr::set(to, &name, &value, 0) {
                Err(Errno::EOPNOTSUPP) if !must_be_kept(&name) => {}
                result => result.with_context(|| format!("copying the attribute {name:?}"))?,
            }
        }
        self.set_origin(source, to)?;
        set_times(to, attr.atime, attr.mtime)
    }

    fn set_origin(&self, source: &dyn LowerObject, to: Object<'_>) -> Result<()> {
        let origin = source.origin().and_then(|origin| origin.encode());
        let ino = source.attr()?.ino;
        let stored = match origin {
            Some(stored) => xattr::set(to, self.family.origin(), &stored, 0),
            None => Ok(()),
        };
        let stored = stored.and_then(|()| match self.numbers.index_of(source.number_space()) {
            Some(index) if self.origin_numbers => {
                let mut value = index.to_le_bytes().to_vec();
                value.extend_from_slice(&ino.to_le_bytes());
                xattr::set(to, self.family.origin_number(), &value, 0)
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
    let attr = super::attr::attr_of(before);
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
