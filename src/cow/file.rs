//! Open files and their content.
//!
//! A node has one host descriptor for reading and writing, shared by all its handles and by requests
//! that come without one; the descriptor cache may close it at any time, and copy-up puts another in its
//! place. So a handle is valid whatever happens to the file, and any number can be open.

use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::Arc;
use std::sync::atomic::Ordering;

use nix::errno::Errno;

use super::attr::{UNCHANGED, attr_of, timespec};
use super::chunks::Partial;
use super::copyup::Content;
use super::error::{Context, Result};
use super::lower::LowerFile;
use super::node::{Gathered, Node};
use super::types::{Caller, FileKind, NodeId, Quiet};
use super::union::Union;
use super::upper::Draft;
use crate::sys::fs::{self, Object};

/// What serves the content of a node.
pub(super) enum Backing {
    /// The file in the upper; whether it was opened after that was sealed.
    Upper {
        fd: OwnedFd,
        writable: bool,
        sealed: bool,
    },
    /// A file of a lower layer.
    Lower(Arc<dyn LowerFile>),
    /// Both, as far as it has been copied up.
    Partial(Box<Partial>),
}

impl Backing {
    /// The descriptor, if it is the upper's.
    pub(super) fn upper_fd(&self) -> Option<BorrowedFd<'_>> {
        match self {
            Self::Upper { fd, .. } => Some(fd.as_fd()),
            Self::Partial(partial) => Some(partial.upper_fd()),
            Self::Lower(_) => None,
        }
    }

    /// The host's descriptor of this content, if there is one.
    pub(super) fn host_fd(&self) -> Option<BorrowedFd<'_>> {
        match self {
            Self::Upper { fd, .. } => Some(fd.as_fd()),
            Self::Lower(file) => file.host_fd(),
            Self::Partial(_) => None,
        }
    }

    fn read_at(&self, buf: &mut [u8], offset: u64) -> Result<usize> {
        match self {
            Self::Upper { fd, .. } => Ok(fs::pread_full(fd.as_fd(), buf, offset)?),
            Self::Lower(file) => file.read_at(buf, offset),
            Self::Partial(partial) => partial.read_at(buf, offset),
        }
    }

    fn write_at(&self, data: &[u8], offset: u64) -> Result<usize> {
        match self {
            Self::Upper { fd, .. } => Ok(fs::pwrite_full(fd.as_fd(), data, offset)?),
            Self::Partial(partial) => partial.write_at(data, offset),
            Self::Lower(_) => Err(Errno::EIO.into()),
        }
    }
}

/// An open file.
pub struct FileHandle {
    node: NodeId,
}

impl FileHandle {
    /// The file that it was opened on.
    pub fn node(&self) -> NodeId {
        self.node
    }
}

/// A write that is not to move the time of change, counted for as long as this lives.
pub(super) struct UnderWay<'a>(&'a Node);

impl<'a> UnderWay<'a> {
    pub(super) fn begin(node: &'a Node, fd: BorrowedFd<'_>) -> Result<Self> {
        match &mut *node.attributes.lock() {
            Some(gathered) => gathered.writes += 1,
            none => {
                let mtime = attr_of(&fs::fstat(fd)?).mtime;
                *none = Some(Box::new(Gathered { writes: 1, mtime }));
            }
        }
        Ok(Self(node))
    }
}

impl Drop for UnderWay<'_> {
    /// Also after a panic, or the file would keep this time of change for good.
    fn drop(&mut self) {
        self.0.attributes.lock().take_if(|gathered| {
            gathered.writes -= 1;
            gathered.writes == 0
        });
    }
}

impl Union {
    /// `flags` are open(2)'s. Copies a lower file up when they ask for writing.
    pub fn open_file(&self, node: NodeId, flags: i32, caller: &Caller) -> Result<Arc<FileHandle>> {
        let node = self.node(node)?;
        match node.kind {
            FileKind::Regular => {}
            FileKind::Directory => return Err(Errno::EISDIR.into()),
            FileKind::Symlink => return Err(Errno::ELOOP.into()),
            // The kernel opens fifos and devices itself; those of the host are never opened.
            _ => return Err(Errno::ENXIO.into()),
        }
        let truncates = flags & libc::O_TRUNC != 0;
        if truncates {
            self.copy_up(&node, Content::UpTo(0))?;
            self.truncate(&node, 0)?;
            if caller.uid != 0 {
                self.kill_suidgid_told(&node, caller)?;
            }
        } else if flags & libc::O_ACCMODE != libc::O_RDONLY {
            self.copy_up(&node, Content::Writable)?;
            // Through a mapping nobody tells of it.
            node.written.store(true, Ordering::Relaxed);
        } else if self.is_verified_anew(&node) {
            // Whoever reads it meanwhile goes on with what was opened before.
            node.io.clear();
            self.io(&node, false)?;
        }
        Ok(self.handle(&node))
    }

    /// Whether what was read of a file before says nothing of the next open: its content is compared whenever it is opened,
    /// so what somebody keeps of it must go.
    pub fn is_verified_at_opens(&self, node: NodeId) -> bool {
        self.table
            .get(node)
            .is_some_and(|node| self.is_verified_anew(&node))
    }

    fn is_verified_anew(&self, node: &Node) -> bool {
        self.verifies_each_open && !node.in_upper()
    }

    pub(super) fn handle(&self, node: &Node) -> Arc<FileHandle> {
        node.handles.fetch_add(1, Ordering::Relaxed);
        Arc::new(FileHandle { node: node.id })
    }

    /// The last user of the handle is gone; must be called once for each handle given out.
    pub fn release(&self, node: NodeId, handle: Arc<FileHandle>) {
        debug_assert_eq!(node, handle.node);
        if let Some(node) = self.table.get(handle.node)
            && node.handles.fetch_sub(1, Ordering::Relaxed) == 1
            && let Some(backing) = node.io.get()
            && matches!(&*backing, Backing::Lower(file) if file.is_in_memory())
        {
            // What was read of it the kernel has.
            node.io.clear();
        }
        self.forget(handle.node, 0);
    }

    /// The descriptor that is at hand.
    pub(super) fn known_io(&self, node: &Node) -> Option<Arc<Backing>> {
        node.io.get().filter(|backing| match **backing {
            Backing::Upper { sealed, .. } => sealed == self.is_sealed(),
            Backing::Lower(ref file) => !file.has_failed(),
            Backing::Partial(ref partial) => !partial.lower_has_failed(),
        })
    }

    /// The descriptor for reading, or for both, opened if it is not at hand.
    pub(super) fn io(&self, node: &Arc<Node>, write: bool) -> Result<Arc<Backing>> {
        if node.kind != FileKind::Regular {
            return Err(match node.kind {
                FileKind::Directory => Errno::EISDIR,
                _ => Errno::EINVAL,
            }
            .into());
        }
        let round = self.round();
        let in_upper = node.in_upper();
        let chunks = match in_upper {
            true => None,
            false => node.place.read().rare.chunks.clone(),
        };
        if let Some(backing) = self.known_io(node) {
            match (&*backing, &chunks) {
                (Backing::Upper { writable, .. }, _) if in_upper && (*writable || !write) => {
                    return Ok(backing);
                }
                (Backing::Partial(_), Some(_)) => return Ok(backing),
                (Backing::Lower(_), None) if !in_upper && !write => return Ok(backing),
                _ => {}
            }
        }
        let backing = Arc::new(if let Some(chunks) = chunks {
            let fd = self
                .with_upper(node, |object| self.open_upper(object, libc::O_RDWR))
                .context("opening a file of the upper layer")?;
            let ino = fs::fstat(fd.as_fd())?.st_ino;
            if node.place.read().upper != Some(ino) {
                return Err(Errno::EIO).context("a file of the upper layer was replaced");
            }
            match self.open_partial(node, &chunks, fd) {
                Ok(partial) => Backing::Partial(Box::new(partial)),
                // Completed since we looked.
                Err(_) if node.in_upper() => return self.io(node, write),
                Err(error) => return Err(error),
            }
        } else if in_upper {
            let flags = if write { libc::O_RDWR } else { libc::O_RDONLY };
            let sealed = self.is_sealed();
            let fd = self
                .with_upper(node, |object| self.open_upper(object, flags))
                .context("opening a file of the upper layer")?;
            let stat = fs::fstat(fd.as_fd())?;
            if node.place.read().upper != Some(stat.st_ino) {
                return Err(Errno::EIO).context("a file of the upper layer was replaced");
            }
            Backing::Upper {
                fd,
                writable: write,
                sealed,
            }
        } else {
            let lowers = node.place.read().lowers.clone();
            match lowers.first().zip(lowers.last()) {
                Some((top, data)) => Backing::Lower(top.object.open_over(&*data.object)?),
                // Copied up since we looked.
                None if node.in_upper() => return self.io(node, write),
                None => return Err(Errno::EIO.into()),
            }
        });
        self.keep(node, &backing, &round);
        Ok(backing)
    }

    /// Fills `buf` from `offset`; fewer bytes only at the end of the file. Without a handle (the
    /// kernel was told not to send OPEN) the file is opened by its node.
    pub fn read(
        &self,
        node: NodeId,
        _handle: Option<&FileHandle>,
        offset: u64,
        buf: &mut [u8],
    ) -> Result<usize> {
        let node = self.node(node)?;
        let backing = self.io(&node, false)?;
        let done = backing.read_at(buf, offset)?;
        if !matches!(*backing, Backing::Upper { .. }) {
            self.touch_data(&node);
        }
        Ok(done)
    }

    /// As `read`, by somebody who has opened the file with O_NOATIME: the access time stays.
    pub fn read_quietly(&self, node: NodeId, offset: u64, buf: &mut [u8]) -> Result<usize> {
        let node = self.node(node)?;
        let backing = self.io(&node, false)?;
        match &*backing {
            // The descriptor that is at hand serves others, too.
            Backing::Upper { .. } if self.quiet != Quiet::All => {
                match self.with_upper(&node, |object| self.open_upper_quietly(object)) {
                    Ok(fd) => Ok(fs::pread_full(fd.as_fd(), buf, offset)?),
                    // Without /proc what is open is not opened again, and the data is worth more than an access time.
                    Err(error) => {
                        tracing::debug!(%error, "a file is read by the descriptor that others have");
                        backing.read_at(buf, offset)
                    }
                }
            }
            _ => backing.read_at(buf, offset),
        }
    }

    /// Notes that data was read that lies in a lower layer, at least in part.
    pub(super) fn touch_data(&self, node: &Arc<Node>) {
        if self.quiet == Quiet::All {
            return;
        }
        let (in_upper, atime, lower) = {
            let place = node.place.read();
            (
                place.upper.is_some(),
                place.atime.get(),
                place.lowers.first().cloned(),
            )
        };
        match lower {
            Some(_) if in_upper => {
                // What was asked for is the data, and that is there.
                if let Err(error) = self.touch_metacopy(node, atime) {
                    tracing::debug!(%error, "an access time could not be moved");
                }
            }
            Some(lower) => {
                // The data was read, which is what of the lower could be damaged.
                if let Ok(attr) = lower.object.attr() {
                    self.touch_lower(node, atime, &attr);
                }
            }
            None => {}
        }
    }

    /// `kills`: who writes, if that clears setuid and setgid.
    pub fn write(
        &self,
        node: NodeId,
        _handle: Option<&FileHandle>,
        offset: u64,
        data: &[u8],
        kills: Option<&Caller>,
    ) -> Result<usize> {
        let (node, backing) = self.to_write(node)?;
        if let Some(caller) = kills {
            self.kill_suidgid_told(&node, caller)?;
        }
        self.with_room(|| backing.write_at(data, offset))
    }

    /// As `write`, of what the kernel has gathered: it keeps the time of change by itself then, and does not tell of one
    /// that was the same before the write. Whoever keeps attributes is to be told after the answer.
    pub fn write_gathered(
        &self,
        node: NodeId,
        offset: u64,
        data: &[u8],
        kills: Option<&Caller>,
    ) -> Result<usize> {
        let (node, backing) = self.to_write(node)?;
        if let Some(caller) = kills {
            self.kill_suidgid(&node, caller)?;
        }
        let fd = backing.upper_fd().ok_or(Errno::EIO)?;
        let _under_way = UnderWay::begin(&node, fd)?;
        // Not under the lock: the turn of an incomplete file comes before it.
        let written = self.with_room(|| backing.write_at(data, offset));
        let kept = {
            let gathered = node.attributes.lock();
            // There is this one.
            gathered.as_ref().map_or(Ok(()), |gathered| {
                let times = [UNCHANGED, timespec(gathered.mtime)];
                Object::Open(fd).set_times(&times)
            })
        };
        let written = written?;
        kept.context("keeping the time of change of a file")?;
        Ok(written)
    }

    /// What a write goes to.
    fn to_write(&self, node: NodeId) -> Result<(Arc<Node>, Arc<Backing>)> {
        let node = self.node(node)?;
        let backing = self.writable(&node)?;
        Ok((node, backing))
    }

    /// The descriptor for writing, after copy-up.
    fn writable(&self, node: &Arc<Node>) -> Result<Arc<Backing>> {
        self.upper()?;
        if !node.in_upper() {
            self.copy_up(node, Content::Writable)?;
        }
        node.written.store(true, Ordering::Relaxed);
        self.io(node, true)
    }

    /// Sets the length of a file that is in the upper.
    pub(super) fn truncate(&self, node: &Arc<Node>, size: u64) -> Result<()> {
        let backing = self.writable(node)?;
        match &*backing {
            Backing::Upper { fd, .. } => Ok(fs::ftruncate(fd.as_fd(), size)?),
            Backing::Partial(partial) => partial.truncate(size),
            Backing::Lower(_) => Err(Errno::EIO.into()),
        }
    }

    /// Makes the content durable, unless the union is volatile.
    pub fn fsync(&self, node: NodeId, _handle: Option<&FileHandle>, datasync: bool) -> Result<()> {
        let node = self.node(node)?;
        if self.volatile || !node.has_upper() || node.kind != FileKind::Regular {
            return Ok(());
        }
        match &*self.io(&node, false)? {
            Backing::Upper { fd, .. } => Ok(fs::fsync(fd.as_fd(), datasync)?),
            Backing::Partial(partial) => partial.fsync(self.upper()?, datasync),
            // Its attributes alone are the upper's.
            Backing::Lower(_) => self
                .with_upper(&node, |object| self.open_upper(object, libc::O_RDONLY))
                .and_then(|fd| Ok(fs::fsync(fd.as_fd(), datasync)?)),
        }
        .context("making a file durable")
    }

    /// `mode` are fallocate(2)'s bits.
    #[allow(clippy::too_many_arguments, reason = "the system call has as many")]
    pub fn fallocate(
        &self,
        node: NodeId,
        _handle: Option<&FileHandle>,
        mode: i32,
        offset: u64,
        len: u64,
        caller: &Caller,
    ) -> Result<()> {
        let node = self.node(node)?;
        let backing = self.writable(&node)?;
        if caller.uid != 0 && self.has_set_ids(&node)? {
            self.check_allocates(mode)?;
            self.kill_suidgid_told(&node, caller)?;
        }
        self.with_room(|| match &*backing {
            Backing::Upper { fd, .. } => Ok(fs::fallocate(fd.as_fd(), mode, offset, len)?),
            Backing::Partial(partial) => partial.fallocate(mode, offset, len),
            Backing::Lower(_) => Err(Errno::EIO.into()),
        })
    }

    /// EOPNOTSUPP of fallocate(2)'s bits that the host's file system does not know, before anything has changed.
    fn check_allocates(&self, mode: i32) -> Result<()> {
        let scratch = match Draft::file(self.upper()?, 0o600) {
            // A full disk does not keep anybody from giving room back.
            Err(Errno::ENOSPC | Errno::EDQUOT) => return Ok(()),
            scratch => scratch?,
        };
        match scratch.object() {
            Object::Open(fd) => match fs::fallocate(fd, mode, 0, 1) {
                Err(Errno::EOPNOTSUPP) => Err(Errno::EOPNOTSUPP.into()),
                // Whether there is room for it is no question here.
                _ => Ok(()),
            },
            Object::Path(_) | Object::Entry(..) => Ok(()),
        }
    }

    /// `SEEK_DATA` and `SEEK_HOLE`; the kernel does the rest itself.
    pub fn lseek(
        &self,
        node: NodeId,
        _handle: Option<&FileHandle>,
        offset: i64,
        whence: i32,
    ) -> Result<i64> {
        let node = self.node(node)?;
        if whence != libc::SEEK_DATA && whence != libc::SEEK_HOLE {
            return Err(Errno::EINVAL.into());
        }
        match &*self.io(&node, false)? {
            Backing::Upper { fd, .. } => Ok(fs::lseek(fd.as_fd(), offset, whence)?),
            Backing::Partial(partial) => partial.seek(offset, whence),
            Backing::Lower(file) => file.seek(offset, whence),
        }
    }

    /// Copies between two files, on the host where it can.
    #[allow(clippy::too_many_arguments, reason = "the system call has as many")]
    pub fn copy_file_range(
        &self,
        node_in: NodeId,
        _handle_in: Option<&FileHandle>,
        offset_in: u64,
        node_out: NodeId,
        _handle_out: Option<&FileHandle>,
        offset_out: u64,
        len: u64,
        caller: &Caller,
    ) -> Result<usize> {
        /// What is copied by hand in one call; the caller asks again for the rest.
        const BY_HAND: usize = 1 << 20;
        let from = self.node(node_in)?;
        let to = self.node(node_out)?;
        let backing_out = self.writable(&to)?;
        let backing_in = self.io(&from, false)?;
        let overlap = node_in == node_out
            && offset_in < offset_out.saturating_add(len)
            && offset_out < offset_in.saturating_add(len);
        if overlap {
            return Err(Errno::EINVAL.into());
        }
        if caller.uid != 0 {
            self.kill_suidgid_told(&to, caller)?;
        }
        let len = usize::try_from(len).unwrap_or(usize::MAX);
        if let (Some(input), Some(out)) = (backing_in.host_fd(), backing_out.host_fd()) {
            let signed = |offset: u64| i64::try_from(offset).map_err(|_| Errno::EINVAL);
            match fs::copy_file_range(input, signed(offset_in)?, out, signed(offset_out)?, len) {
                Err(Errno::ENOSYS | Errno::EXDEV | Errno::EOPNOTSUPP | Errno::EINVAL) => {}
                result => return Ok(result?),
            }
        }
        let mut buf = vec![0; len.min(BY_HAND)];
        let got = backing_in.read_at(&mut buf, offset_in)?;
        backing_out.write_at(&buf[..got], offset_out)
    }

    /// Makes everything in the upper durable.
    pub fn sync(&self) -> Result<()> {
        match &self.upper {
            Some(upper) => upper.maps.sync(|| {
                fs::syncfs(upper.root.get().0.as_fd()).context("making the upper durable")
            }),
            None => Ok(()),
        }
    }
}
