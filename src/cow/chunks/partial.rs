//! The content of an incompletely copied file.
//!
//! A byte is the lower's until its chunk is the upper's. A chunk is brought up whole and its bit set after that, all
//! with the file's turn taken alone; reading needs no turn, because a chunk that changes sides has the same content on
//! both. What lies past the shortest length that the file has had since (`Map::limit`) is always the upper's.

use std::ffi::OsStr;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::Arc;
use std::sync::atomic::Ordering;

use nix::errno::Errno;

use super::super::attr::attr_of;
use super::super::copyup::{copy_extents, copy_range};
use super::super::error::{Context, Error, Result};
use super::super::lower::LowerFile;
use super::super::upper::Upper;
use super::map::Map;
use super::{Marked, mark_with};
use crate::sys::fs::{self, Object};
use crate::sys::xattr;

/// The two files and the map that say which of them has a byte.
pub(super) struct Halves<'a> {
    pub(super) upper: BorrowedFd<'a>,
    pub(super) lower: &'a dyn LowerFile,
    pub(super) map: &'a Map,
}

/// An open, incompletely copied file.
pub(in super::super) struct Partial {
    pub(super) upper: OwnedFd,
    pub(super) lower: Arc<dyn LowerFile>,
    pub(super) map_fd: OwnedFd,
    pub(super) map: Arc<Map>,
    /// Name of the attribute with the mark.
    pub(super) mark: &'static OsStr,
    /// Nothing is synced.
    pub(super) volatile: bool,
}

fn signed(offset: u64) -> Result<i64> {
    i64::try_from(offset).map_err(|_| Errno::EFBIG.into())
}

/// The next position of `whence` from `at` on; `end` if there is none before it.
fn seek_within(end: u64, seek: impl FnOnce() -> Result<i64>, none: u64) -> Result<u64> {
    match seek() {
        Ok(found) => Ok(u64::try_from(found).unwrap_or(end).min(end)),
        Err(error) if error.is(Errno::ENXIO) => Ok(none),
        Err(error) => Err(error),
    }
}

impl Halves<'_> {
    /// Fills `buf` from `offset`; fewer bytes only at the end.
    pub(super) fn read_at(&self, buf: &mut [u8], offset: u64) -> Result<usize> {
        let end = offset.saturating_add(buf.len() as u64);
        let mut at = offset;
        let mut done = 0;
        while at < end {
            let (stop, lower) = self.map.run(at, end);
            let len = usize::try_from(stop - at).unwrap_or(usize::MAX);
            let part = &mut buf[done..done + len];
            let n = if lower {
                let n = self.lower.read_at(part, at)?;
                if n < len {
                    return Err(Error::new(Errno::EIO))
                        .context("a lower file is shorter than it was");
                }
                n
            } else {
                fs::pread_full(self.upper, part, at)?
            };
            done += n;
            if n < len {
                break;
            }
            at = stop;
        }
        Ok(done)
    }

    /// `SEEK_DATA` and `SEEK_HOLE`.
    pub(super) fn seek(&self, offset: i64, whence: i32) -> Result<i64> {
        let size = attr_of(&fs::fstat(self.upper)?).size;
        let mut at = u64::try_from(offset).map_err(|_| Errno::ENXIO)?;
        if at >= size {
            return Err(Errno::ENXIO.into());
        }
        while at < size {
            let (stop, lower) = self.map.run(at, size);
            // Past the last data of a file there is a hole and no more data.
            let none = if whence == libc::SEEK_HOLE { at } else { stop };
            let found = if lower {
                let offset = signed(at)?;
                seek_within(stop, || self.lower.seek(offset, whence), none)?
            } else {
                self.seek_upper(at, stop, whence, none)?
            };
            if found < stop {
                return signed(found);
            }
            at = stop;
        }
        if whence == libc::SEEK_HOLE {
            signed(size)
        } else {
            Err(Errno::ENXIO.into())
        }
    }

    fn seek_upper(&self, at: u64, end: u64, whence: i32, none: u64) -> Result<u64> {
        let offset = signed(at)?;
        seek_within(end, || Ok(fs::lseek(self.upper, offset, whence)?), none)
    }
}

impl Partial {
    fn halves(&self) -> Halves<'_> {
        Halves {
            upper: self.upper.as_fd(),
            lower: &*self.lower,
            map: &self.map,
        }
    }

    /// The copy in the upper.
    pub(in super::super) fn upper_fd(&self) -> BorrowedFd<'_> {
        self.upper.as_fd()
    }

    /// Its length.
    pub(super) fn size(&self) -> Result<u64> {
        Ok(attr_of(&fs::fstat(self.upper.as_fd())?).size)
    }

    /// Removes what a crash has left in chunks that are still the lower's: there a hole has to be one, or zeros. Called
    /// before anything else is done, with the file's mark. What changes the upper is done `quietly`.
    pub(super) fn scrub(
        &self,
        marked: &Marked,
        quietly: impl FnOnce(&dyn Fn() -> Result<()>) -> Result<()>,
    ) -> Result<()> {
        if self.map.is_scrubbed.load(Ordering::Acquire) {
            return Ok(());
        }
        let _turn = self.map.turn.write();
        if self.map.is_scrubbed.load(Ordering::Acquire) {
            return Ok(());
        }
        // A cut that a crash interrupted counts.
        // Written down, so that after another crash nothing of the lower's comes back where others have written.
        let size = match *marked {
            Marked::Partial { limit } => {
                self.map.was_marked(limit);
                limit.min(self.size()?)
            }
            Marked::Metacopy => self.size()?,
        };
        self.map.cut(self.map_fd.as_fd(), size)?;
        self.catch_up()?;
        let limit = self.map.limit();
        let mut doubtful = Vec::new();
        let mut at = 0;
        while let Some(start) = self.map.next_lower(at) {
            let (end, _) = self.map.run(start, limit);
            let data = self.halves().seek_upper(start, end, libc::SEEK_DATA, end)?;
            if data < end {
                doubtful.push((data, end));
            }
            at = end;
        }
        if !doubtful.is_empty() {
            quietly(&|| {
                for &(start, end) in &doubtful {
                    if self.has_content(start, end)? {
                        self.empty(start, end);
                    }
                }
                Ok(())
            })?;
        }
        self.map.is_scrubbed.store(true, Ordering::Release);
        Ok(())
    }

    /// Whether a part of the upper has other bytes than zero. Space that a program has reserved looks like data once a page
    /// of it was read, and stays reserved.
    fn has_content(&self, start: u64, end: u64) -> Result<bool> {
        const STEP: u64 = 128 << 10;
        let mut buf = Vec::new();
        let mut at = start;
        loop {
            at = self.halves().seek_upper(at, end, libc::SEEK_DATA, end)?;
            if at >= end {
                return Ok(false);
            }
            let len = usize::try_from(STEP.min(end - at)).unwrap_or(0);
            buf.resize(len, 0);
            let n = fs::pread_full(self.upper.as_fd(), &mut buf, at)?;
            if buf[..n].iter().any(|byte| *byte != 0) {
                return Ok(true);
            }
            at += len as u64;
        }
    }

    /// Makes a hole of a part of the upper that is still the lower's.
    fn empty(&self, start: u64, end: u64) {
        let mode = libc::FALLOC_FL_PUNCH_HOLE | libc::FALLOC_FL_KEEP_SIZE;
        if let Err(errno) = fs::fallocate(self.upper.as_fd(), mode, start, end - start) {
            tracing::debug!(%errno, "holes of a file are filled while it is copied up");
            self.map.has_remains.store(true, Ordering::Release);
        }
    }

    /// Whether a part of the lower could not be read: it is to be opened again.
    pub(in super::super) fn lower_has_failed(&self) -> bool {
        self.lower.has_failed()
    }

    /// Fills `buf` from `offset`; fewer bytes only at the end.
    pub(in super::super) fn read_at(&self, buf: &mut [u8], offset: u64) -> Result<usize> {
        self.halves().read_at(buf, offset)
    }

    /// Whether a chunk that has anything of `offset..end` in it is the lower's.
    fn touches_lower(&self, offset: u64, end: u64) -> bool {
        let mut at = offset;
        while at < end {
            let (start, next) = self.map.chunk(at);
            if self.map.is_lower(start) {
                return true;
            }
            at = next;
        }
        false
    }

    /// Copies chunks of the lower to the upper and lets them be the upper's. The turn is taken.
    pub(super) fn bring_up(&self, start: u64, end: u64) -> Result<()> {
        if self.map.has_remains.load(Ordering::Acquire) {
            copy_range(&*self.lower, self.upper.as_fd(), start, end)?;
        } else {
            copy_extents(&*self.lower, self.upper.as_fd(), start, end)?;
        }
        self.map.set(self.map_fd.as_fd(), start, end)
    }

    /// Brings up the chunks that `offset..end` covers in part; answers those that it covers whole.
    fn bring_up_edges(&self, offset: u64, end: u64) -> Result<Vec<(u64, u64)>> {
        let mut whole = Vec::new();
        let mut at = offset;
        while at < end {
            let (start, next) = self.map.chunk(at);
            if self.map.is_lower(start) {
                let stop = next.min(self.map.limit());
                if offset <= start && stop <= end {
                    whole.push((start, stop));
                } else {
                    self.bring_up(start, stop)?;
                }
            }
            at = next;
        }
        Ok(whole)
    }

    /// Brings up as much as is brought up in one turn, from the first chunk on that has `offset` or more in it; answers
    /// where to go on, or that there is none left. The turn is taken.
    pub(super) fn next_step(&self, offset: u64) -> Result<Option<(u64, u64)>> {
        const STEP: u64 = 1 << 20;
        let limit = self.map.limit();
        let Some(first) = self.map.next_lower(offset) else {
            return Ok(None);
        };
        let (start, next) = self.map.chunk(first);
        let (run, _) = self.map.run(start, limit);
        let at = signed(start)?;
        let data = seek_within(run, || self.lower.seek(at, libc::SEEK_DATA), run)?;
        // A hole costs nothing, however long.
        let to = if data > start { data } else { start + STEP };
        let end = if to >= run { run } else { self.map.chunk(to).0 };
        Ok(Some((start, end.max(next.min(limit)))))
    }

    /// A file that was cut off and grows again must not show its old content after a power cut. Its limit goes into the
    /// mark, which reaches the disk before the new length does: a journal keeps the order of what happens to one file. On
    /// a file system without one only a sync would; `docs/chunks.md` says what may show there.
    fn before_growth(&self, end: u64) -> Result<()> {
        let limit = self.map.limit();
        if self.volatile || end <= limit || !self.map.cut_is_pending() {
            return Ok(());
        }
        let file = Object::Open(self.upper.as_fd());
        match xattr::set(file, self.mark, &mark_with(limit), libc::XATTR_REPLACE) {
            Ok(()) => self.map.was_marked(limit),
            // A sync needs no room, nor leave to write a file that is read-only by now.
            Err(Errno::ENOSPC | Errno::EDQUOT | Errno::E2BIG | Errno::EACCES) => {
                self.make_durable()?
            }
            // A completion has failed between taking the mark away and the end: that it is gone is to reach the disk before.
            Err(Errno::ENODATA) => self.make_durable()?,
            Err(errno) => {
                return Err(errno).context("noting the length of a file that was cut off");
            }
        }
        Ok(())
    }

    fn make_durable(&self) -> Result<()> {
        let taken = self.map.take();
        if !self.volatile {
            fs::fsync(self.upper.as_fd(), false)?;
        }
        self.map.make_durable(self.map_fd.as_fd(), &taken, None)
    }

    /// Called before anything that changed the map is answered. The turn is taken.
    pub(super) fn catch_up(&self) -> Result<()> {
        if self.map.is_behind() {
            self.make_durable()?;
            self.map.has_caught_up();
        }
        Ok(())
    }

    /// As `catch_up`, after something that may have failed.
    pub(super) fn caught_up<T>(&self, done: Result<T>) -> Result<T> {
        let caught_up = self.catch_up();
        let done = done?;
        caught_up.map(|()| done)
    }

    /// Writes; an error after some bytes is reported as a short count.
    pub(in super::super) fn write_at(&self, data: &[u8], offset: u64) -> Result<usize> {
        let end = offset.saturating_add(data.len() as u64);
        {
            let _turn = self.map.turn.read();
            let grows = end > self.map.limit() && self.map.cut_is_pending();
            if !grows && !self.map.is_behind() && !self.touches_lower(offset, end) {
                return Ok(fs::pwrite_full(self.upper.as_fd(), data, offset)?);
            }
        }
        let _turn = self.map.turn.write();
        self.before_growth(end)?;
        self.caught_up(self.write_over_lower(data, offset, end))
    }

    /// Writes where chunks may be the lower's. The turn is taken.
    fn write_over_lower(&self, data: &[u8], offset: u64, end: u64) -> Result<usize> {
        let whole = self.bring_up_edges(offset, end)?;
        let written = fs::pwrite_full(self.upper.as_fd(), data, offset);
        let reached = offset + *written.as_ref().unwrap_or(&0) as u64;
        for (start, stop) in whole {
            if stop <= reached {
                if let Err(error) = self.map.set(self.map_fd.as_fd(), start, stop) {
                    self.empty(start, stop);
                    return Err(error);
                }
            } else if start < reached {
                // Part of a chunk, and no space to copy the rest of it.
                self.empty(start, stop);
                return match usize::try_from(start.saturating_sub(offset)) {
                    Ok(0) | Err(_) => Err(Errno::ENOSPC.into()),
                    Ok(n) => Ok(n),
                };
            }
        }
        Ok(written?)
    }

    /// Sets the length.
    pub(in super::super) fn truncate(&self, size: u64) -> Result<()> {
        let _turn = self.map.turn.write();
        if size > self.size()? {
            self.before_growth(size)?;
        }
        fs::ftruncate(self.upper.as_fd(), size)?;
        self.caught_up(self.map.cut(self.map_fd.as_fd(), size))
    }

    /// `mode` are fallocate(2)'s bits.
    pub(in super::super) fn fallocate(&self, mode: i32, offset: u64, len: u64) -> Result<()> {
        let end = offset.checked_add(len).ok_or(Errno::EFBIG)?;
        let _turn = self.map.turn.write();
        self.caught_up(self.allocate(mode, offset, len, end))
    }

    fn allocate(&self, mode: i32, offset: u64, len: u64, end: u64) -> Result<()> {
        let mut whole = Vec::new();
        match mode & !libc::FALLOC_FL_KEEP_SIZE {
            0 => {}
            libc::FALLOC_FL_PUNCH_HOLE | libc::FALLOC_FL_ZERO_RANGE => {
                whole = self.bring_up_edges(offset, end.min(self.size()?))?;
            }
            _ => return Err(Errno::EOPNOTSUPP.into()),
        }
        if mode & libc::FALLOC_FL_KEEP_SIZE == 0 {
            self.before_growth(end)?;
        }
        fs::fallocate(self.upper.as_fd(), mode, offset, len)?;
        for (start, stop) in whole {
            self.map.set(self.map_fd.as_fd(), start, stop)?;
        }
        Ok(())
    }

    /// The run of bytes of one kind from `offset` on, no longer than to `end`: where it ends, and whether it is the
    /// lower's.
    pub(in super::super) fn run(&self, offset: u64, end: u64) -> (u64, bool) {
        self.map.run(offset, end)
    }

    /// `SEEK_DATA` and `SEEK_HOLE`.
    pub(in super::super) fn seek(&self, offset: i64, whence: i32) -> Result<i64> {
        self.halves().seek(offset, whence)
    }

    /// Makes the content durable: the data, and then the map's word for it.
    pub(in super::super) fn fsync(&self, upper: &Upper, data_only: bool) -> Result<()> {
        let taken = self.map.take();
        // The mark on the file is no data.
        fs::fsync(self.upper.as_fd(), data_only && self.map.is_begun())?;
        self.map.make_durable(
            self.map_fd.as_fd(),
            &taken,
            Some(&|| upper.maps.sync_names()),
        )
    }
}
