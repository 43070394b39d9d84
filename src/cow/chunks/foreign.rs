//! A file of an upper that somebody else writes to, maybe at this moment: read, and nothing else.
//!
//! It is told anew with each opening whether it is complete, and with each read which chunks are the upper's. Chunks only
//! ever come up, and whoever completes a file has noted the last of them before the mark goes, and the mark before the
//! map. So a map that was found says all, even once it has no name any more, and a reader finds what one of the mount
//! finds.

use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::path::Path;
use std::sync::Arc;

use nix::errno::Errno;

use super::super::error::{Context, Result};
use super::super::lower::LowerFile;
use super::super::types::XattrFamily;
use super::map::{Map, Run};
use super::partial::Halves;
use super::store::{foreign_map, missing_map};
use super::{Marked, name_of};
use crate::sys::fs::{self, Object};
use crate::sys::xattr;

/// A chunk as long as any can be.
const LONGEST: u32 = 47;

/// What of a file is in an upper, and what below.
struct Foreign {
    upper: Arc<dyn LowerFile>,
    lower: Arc<dyn LowerFile>,
    map: OwnedFd,
    run: Run,
    /// Bytes from here on are the upper's, whatever the map says.
    limit: u64,
}

/// What a value of `overlay.metacopy` on an upper file says; none if all of the data is there.
pub(in super::super) fn mark_of(object: Object<'_>, family: XattrFamily) -> Result<Option<Marked>> {
    match xattr::get(object, family.metacopy()) {
        Ok(value) => Marked::of(&value).map(Some),
        Err(Errno::ENODATA | Errno::EOPNOTSUPP) => Ok(None),
        Err(errno) => Err(errno.into()),
    }
}

/// The content of an open file of an upper with this work directory, over `data`, which opens what the layers below have and
/// tells its length. All of it may be in the file.
pub(in super::super) fn content_over(
    file: Arc<dyn LowerFile>,
    work: &Path,
    family: XattrFamily,
    data: impl FnOnce() -> Result<(Arc<dyn LowerFile>, u64)>,
) -> Result<Arc<dyn LowerFile>> {
    let fd = fd_of(&*file)?;
    let object = Object::Open(fd);
    let limit = match mark_of(object, family)? {
        None => return Ok(file),
        Some(Marked::Metacopy) => return data().map(|(lower, _)| lower),
        Some(Marked::Partial { limit }) => limit,
    };
    let (lower, length) = data()?;
    let stat = fs::fstat(fd)?;
    let Some(map) = foreign_map(work, &name_of(object, stat.st_ino))? else {
        return match mark_of(object, family)? {
            // Completed meanwhile.
            None => Ok(file),
            Some(_) => Err(missing_map()),
        };
    };
    let size = u64::try_from(stat.st_size).unwrap_or(0);
    Ok(Arc::new(Foreign {
        upper: file,
        lower,
        map,
        run: Run::current(),
        limit: limit.min(size).min(length),
    }))
}

fn fd_of(file: &dyn LowerFile) -> Result<BorrowedFd<'_>> {
    let fd = file.host_fd().ok_or(Errno::EBADF);
    fd.context("an upper file is none of the host's")
}

impl Foreign {
    fn map(&self) -> Result<Map> {
        let map = match Map::read(self.map.as_fd(), self.run)? {
            Some((map, _)) => map,
            // Nothing of it had reached the disk when the host went down.
            None => Map::new(self.run, LONGEST, self.limit),
        };
        map.narrow(self.limit);
        Ok(map)
    }

    fn halves<'a>(&'a self, map: &'a Map) -> Result<Halves<'a>> {
        Ok(Halves {
            upper: fd_of(&*self.upper)?,
            lower: &*self.lower,
            map,
        })
    }
}

impl LowerFile for Foreign {
    fn read_at(&self, buf: &mut [u8], offset: u64) -> Result<usize> {
        self.halves(&self.map()?)?.read_at(buf, offset)
    }

    fn has_failed(&self) -> bool {
        self.lower.has_failed()
    }

    fn seek(&self, offset: i64, whence: i32) -> Result<i64> {
        self.halves(&self.map()?)?.seek(offset, whence)
    }

    fn host_fd(&self) -> Option<BorrowedFd<'_>> {
        None
    }
}
