//! Packed layers as one directory in overlayfs's format: what their merged view shows.

use std::ffi::OsStr;
use std::fs::DirBuilder;
use std::io;
use std::os::fd::{AsFd, BorrowedFd};
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::DirBuilderExt;
use std::path::{Path, PathBuf};

use nix::errno::Errno;

use super::super::types::XattrFamily;
use super::{Links, open_dir};
use crate::store::view::{View, ViewFile};
use crate::store::{self, Inode, Time};
use crate::sys::fs::{self, Object};
use crate::sys::xattr;

/// Writes what `view` shows to `to`, which must not exist.
pub fn copy_view(view: &View, to: &Path, links: &mut Links) -> io::Result<()> {
    DirBuilder::new().mode(0o700).create(to)?;
    // Depth first, so that a directory gets its times after everything in it was made.
    let mut pending = vec![(PathBuf::new(), View::ROOT, false)];
    while let Some((path, number, filled)) = pending.pop() {
        let inode = view.inode(number).map_err(of(view, number))?;
        let target = open_dir(&to.join(&path))?;
        if filled {
            set_metadata(view, number, &inode, Object::Open(target.as_fd()))?;
            continue;
        }
        pending.push((path.clone(), number, true));
        let mut place = 0;
        while let Some(entry) = view.nth(&inode, place).map_err(of(view, number))? {
            place += 1;
            let name = OsStr::from_bytes(entry.name);
            let at = path.join(name);
            if entry.kind == libc::S_IFDIR {
                fs::mkdirat(target.as_fd(), name, 0o700)?;
                pending.push((at, entry.inode, false));
            } else {
                let path = to.join(&at);
                make(view, entry.inode, target.as_fd(), name, path, links)?;
            }
        }
    }
    Ok(())
}

fn make(
    view: &View,
    number: u32,
    dir: BorrowedFd<'_>,
    name: &OsStr,
    path: PathBuf,
    links: &mut Links,
) -> io::Result<()> {
    let inode = view.inode(number).map_err(of(view, number))?;
    if inode.links > 1 {
        if let Some(first) = links.of_view.get(&number) {
            let first = fs::open_path(first, libc::O_PATH | libc::O_NOFOLLOW)?;
            return Ok(fs::link_fd(first.as_fd(), dir, name)?);
        }
        links.of_view.insert(number, path);
    }
    match inode.kind() {
        libc::S_IFREG => {
            let content = view.open_file(&inode).map_err(of(view, number))?;
            let flags = libc::O_CREAT | libc::O_EXCL | libc::O_WRONLY;
            let copy = fs::openat(dir, name, flags, 0o600)?;
            let read = |buffer: &mut [u8], at| {
                let read = view.read_at(&content, buffer, at);
                read.map_err(of(view, number))
            };
            write_content(&content, read, copy.as_fd())?;
        }
        libc::S_IFLNK => {
            let target = view.target(&inode).map_err(of(view, number))?;
            fs::symlinkat(OsStr::from_bytes(target), dir, name)?;
        }
        kind => {
            let (major, minor) = inode.device();
            let device = matches!(kind, libc::S_IFCHR | libc::S_IFBLK);
            let device = if device {
                libc::makedev(major, minor)
            } else {
                0
            };
            fs::mknodat(dir, name, kind | 0o600, device)?;
        }
    }
    set_metadata(view, number, &inode, Object::Entry(dir, name))
}

/// What of the view could not be read.
fn of(view: &View, inode: u32) -> impl Fn(store::Error) -> io::Error {
    move |error| io::Error::other(view.of_inode(inode, error))
}

/// Writes what is no hole.
fn write_content(
    content: &ViewFile,
    read: impl Fn(&mut [u8], u64) -> io::Result<usize>,
    to: BorrowedFd<'_>,
) -> io::Result<()> {
    fs::ftruncate(to, content.size())?;
    let mut buffer = vec![0; 1 << 20];
    let mut at = 0;
    while let Some(data) = content.next_data(at) {
        let end = content.next_hole(data);
        at = data;
        while at < end {
            let most = usize::try_from(end - at).unwrap_or(usize::MAX);
            let most = most.min(buffer.len());
            let got = read(&mut buffer[..most], at)?;
            if got == 0 {
                return Err(io::ErrorKind::UnexpectedEof.into());
            }
            let mut done = 0;
            while done < got {
                let wrote = fs::pwrite_full(to, &buffer[done..got], at + done as u64)?;
                if wrote == 0 {
                    return Err(Errno::ENOSPC.into());
                }
                done += wrote;
            }
            at += got as u64;
        }
    }
    Ok(())
}

/// Owner, mode, attributes and times, in the order in which none undoes another.
fn set_metadata(view: &View, number: u32, inode: &Inode, to: Object<'_>) -> io::Result<()> {
    to.chown(Some(inode.uid), Some(inode.gid))?;
    if inode.kind() != libc::S_IFLNK {
        to.chmod(u32::from(inode.mode & 0o7777))?;
    }
    for (name, value) in view.xattrs(inode).map_err(of(view, number))? {
        // A layer's own attributes may look like the union's marks, and are none.
        let stored = XattrFamily::Trusted.stored_name(OsStr::from_bytes(name));
        xattr::set(to, &stored, value, 0)?;
    }
    Ok(to.set_times(&[timespec(inode.atime), timespec(inode.mtime)])?)
}

fn timespec(time: Time) -> libc::timespec {
    libc::timespec {
        tv_sec: time.sec,
        tv_nsec: i64::from(time.nsec),
    }
}
