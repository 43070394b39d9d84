//! Copies of regular files, whoever writes to them meanwhile.

use std::ffi::OsStr;
use std::io;
use std::os::fd::{AsFd, BorrowedFd};
use std::path::{Component, Path, PathBuf};
use std::sync::Arc;

use nix::errno::Errno;

use super::super::attr::attr_of;
use super::super::chunks::{Marked, content_over, mark_of, without_map};
use super::super::copyup::copy_extents;
use super::super::dir_lower::HostFile;
use super::super::error::{Error, Result as CowResult};
use super::super::file::Backing;
use super::super::lower::LowerFile;
use super::super::types::{FileKind, NodeId, XattrFamily};
use super::super::union::Union;
use super::{copy_metadata, is_bound};
use crate::sys::fs::{self, Object};
use crate::sys::xattr;

/// Layers of plyd have the marks of root.
const FAMILY: XattrFamily = XattrFamily::Trusted;

/// Where a file is, if it is copied up in part.
pub(super) enum Over<'a> {
    /// At this path in the topmost layer of the union.
    Shown(&'a Union, &'a Path),
    /// In the index of the work directory, and what the lower layers have of it was copied to there.
    Copied { work: &'a Path, lower: &'a Path },
    /// At this path in a layer, which has to say all by itself.
    Layer(PathBuf),
}

impl Over<'_> {
    /// The content of `file`.
    fn content(&self, file: BorrowedFd<'_>) -> CowResult<Arc<dyn LowerFile>> {
        match self {
            Over::Shown(union, path) => shown(union, path, file),
            Over::Copied { work, lower } => over_copy(work, lower, file),
            Over::Layer(path) => Err(without_map(&path.display().to_string())),
        }
    }
}

/// Copies the file with the number `ino`; ESTALE if it has lost its name. One without data stays so; what says where that is has
/// to be of one moment.
pub(super) fn copy(
    (from, to): (BorrowedFd<'_>, BorrowedFd<'_>),
    name: &OsStr,
    ino: u64,
    over: &Over<'_>,
) -> io::Result<()> {
    let quiet = libc::O_RDONLY | libc::O_NONBLOCK | libc::O_NOATIME;
    let content = fs::openat(from, name, quiet, 0)?;
    let source = Object::Open(content.as_fd());
    let attr = attr_of(&fs::fstat(content.as_fd())?);
    if attr.kind != FileKind::Regular || attr.ino != ino {
        return Err(Errno::ESTALE.into());
    }
    // Goes after the mark.
    let redirect = match xattr::get(source, FAMILY.redirect()) {
        Ok(path) => Some(path),
        Err(Errno::ENODATA | Errno::EOPNOTSUPP) => None,
        Err(errno) => return Err(errno.into()),
    };
    let marked = mark_of(source, FAMILY).map_err(failed)?;
    let flags = libc::O_CREAT | libc::O_EXCL | libc::O_WRONLY;
    let copy = fs::openat(to, name, flags, 0o600)?;
    let target = Object::Open(copy.as_fd());
    match marked {
        None => copy_content(content.as_fd(), copy.as_fd(), attr.size)?,
        Some(Marked::Metacopy) => {
            fs::ftruncate(copy.as_fd(), attr.size)?;
            xattr::set(target, FAMILY.metacopy(), b"", 0)?;
            if let Some(path) = redirect {
                xattr::set(target, FAMILY.redirect(), &path, 0)?;
            }
        }
        Some(Marked::Partial { .. }) => {
            let whole = over.content(content.as_fd()).map_err(failed)?;
            fs::ftruncate(copy.as_fd(), attr.size)?;
            copy_extents(&*whole, copy.as_fd(), 0, attr.size).map_err(failed)?;
        }
    }
    let is_of_data = |name: &OsStr| name == FAMILY.metacopy() || name == FAMILY.redirect();
    let left_out = |name: &OsStr| is_bound(name) || is_of_data(name);
    Ok(copy_metadata(source, target, &attr, left_out)?)
}

/// The caller can tell some from the rest, which needs its words.
fn failed(error: Error) -> io::Error {
    match error.errno {
        libc::ENOSPC | libc::EDQUOT | libc::ENOENT | libc::ESTALE | libc::ENOTDIR => {
            io::Error::from_raw_os_error(error.errno)
        }
        _ => io::Error::other(error),
    }
}

fn shown(union: &Union, path: &Path, file: BorrowedFd<'_>) -> CowResult<Arc<dyn LowerFile>> {
    let mut nodes = vec![NodeId::ROOT];
    let mut found = Ok(());
    for part in path.components() {
        if let (Component::Normal(name), Some(&parent)) = (part, nodes.last()) {
            match union.lookup(parent, name) {
                Ok(entry) => nodes.push(entry.node),
                Err(error) => {
                    found = Err(error);
                    break;
                }
            }
        }
    }
    let content = found.and_then(|()| {
        let node = union.node(nodes.last().copied().unwrap_or(NodeId::ROOT))?;
        let ino = union.lower_identity(node.id)?.map(|(_, ino)| ino);
        match &*union.io(&node, false)? {
            Backing::Lower(content) if ino == Some(fs::fstat(file)?.st_ino) => {
                Ok(Arc::clone(content))
            }
            // Replaced since it was opened.
            _ => Err(Errno::ESTALE.into()),
        }
    });
    nodes.iter().skip(1).for_each(|node| union.forget(*node, 1));
    content
}

fn over_copy(work: &Path, lower: &Path, file: BorrowedFd<'_>) -> CowResult<Arc<dyn LowerFile>> {
    let data = || {
        let data = fs::open_path(lower, libc::O_RDONLY | libc::O_NOFOLLOW)?;
        let size = attr_of(&fs::fstat(data.as_fd())?).size;
        Ok((Arc::new(HostFile::new(data, size)) as Arc<_>, size))
    };
    let size = attr_of(&fs::fstat(file)?).size;
    let file = Object::Open(file).open_quietly(libc::O_RDONLY)?;
    content_over(Arc::new(HostFile::new(file, size)), work, FAMILY, data)
}

/// Shares the content where the host can, else copies what is no hole.
fn copy_content(from: BorrowedFd<'_>, to: BorrowedFd<'_>, size: u64) -> Result<(), Errno> {
    if fs::clone_content(from, to).is_ok() {
        return Ok(());
    }
    fs::ftruncate(to, size)?;
    let mut buffer = vec![0; 1 << 20];
    let mut at = 0;
    loop {
        let data = match fs::lseek(from, at, libc::SEEK_DATA) {
            Err(Errno::ENXIO) => return Ok(()),
            // A file system that cannot tell: all is data.
            Err(Errno::EINVAL) => at,
            data => data?,
        };
        let end = match fs::lseek(from, data, libc::SEEK_HOLE) {
            Err(Errno::EINVAL | Errno::ENXIO) => i64::try_from(size).unwrap_or(i64::MAX),
            end => end?,
        };
        at = data;
        while at < end {
            let offset = u64::try_from(at).map_err(|_| Errno::EIO)?;
            let most = usize::try_from(end - at).unwrap_or(usize::MAX);
            let most = most.min(buffer.len());
            let got = fs::pread_full(from, &mut buffer[..most], offset)?;
            if got == 0 {
                return Ok(());
            }
            let mut done = 0;
            while done < got {
                let wrote = fs::pwrite_full(to, &buffer[done..got], offset + done as u64)?;
                if wrote == 0 {
                    return Err(Errno::ENOSPC);
                }
                done += wrote;
            }
            at += i64::try_from(got).map_err(|_| Errno::EIO)?;
        }
    }
}
