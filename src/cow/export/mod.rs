//! Copies of layers for kernel overlayfs, in directories of their own.
//!
//! What only holds where a layer lies now is left out: file handles of other layers, and plywood's own marks.
//! Whiteouts, opaque marks, redirects and files without data stay as they are, and so do escaped attributes. The
//! index of hard links is made anew, because it names the lower files by their handles. Packed layers become one
//! directory.

mod view;

use std::collections::HashMap;
use std::ffi::{OsStr, OsString};
use std::fs::DirBuilder;
use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::DirBuilderExt;
use std::path::{Path, PathBuf};

use nix::errno::Errno;

use super::attr::{attr_of, timespec};
use super::copyup::type_bits;
use super::origin::Origin;
use super::types::{Attr, FileKind, XattrFamily};
use super::view_lower;
use crate::store::view::View;
use crate::sys::fs::{self, Object};
use crate::sys::tree::Tree;
use crate::sys::{dirents, handle, private_mount, xattr};

/// Files with several names that were copied so far.
#[derive(Debug, Default)]
pub struct Links {
    /// By device and inode number.
    of_files: HashMap<(u64, u64), PathBuf>,
    /// By number of the view's inode.
    of_view: HashMap<u32, PathBuf>,
}

pub use view::copy_view;

/// Copies the layer at `from` to `to`, which must not exist. A file that changes meanwhile is copied as it is
/// found; the caller has seen to it that what was written before is there.
pub fn copy_layer(from: &Path, to: &Path, links: &mut Links) -> io::Result<()> {
    DirBuilder::new().mode(0o700).create(to)?;
    let (tree, _mount) = quiet_tree(from)?;
    // Depth first, so that a directory gets its times after everything in it was made.
    let mut pending = vec![(PathBuf::new(), false)];
    while let Some((path, filled)) = pending.pop() {
        let Some(source) = tree.directory(&path)? else {
            // Removed since the listing.
            continue;
        };
        let target = open_dir(&to.join(&path))?;
        if filled {
            let attr = attr_of(&fs::fstat(source.as_fd())?);
            copy_metadata(
                Object::Open(source.as_fd()),
                Object::Open(target.as_fd()),
                &attr,
            )?;
            continue;
        }
        pending.push((path.clone(), true));
        for name in names(source.as_fd())? {
            let at = path.join(&name);
            if copy_entry(source.as_fd(), target.as_fd(), &name, &to.join(&at), links)? {
                pending.push((at, false));
            }
        }
    }
    Ok(())
}

/// A tree that is looked at without a trace: a private read-only mount of it, where that is allowed, keeps even
/// the access times of links. The mount lasts as long as its descriptor.
fn quiet_tree(path: &Path) -> io::Result<(Tree, Option<OwnedFd>)> {
    let mounted = private_mount::read_only(&[path.to_owned()]);
    match mounted.ok().and_then(|mut mounts| mounts.pop()?.ok()) {
        Some(mount) => {
            // With a name below it, the magic link itself is followed.
            let path = format!("/proc/self/fd/{}/.", mount.as_raw_fd());
            Ok((Tree::open(Path::new(&path))?, Some(mount)))
        }
        None => Ok((Tree::open(path)?, None)),
    }
}

fn open_dir(path: &Path) -> Result<OwnedFd, Errno> {
    fs::open_path(path, libc::O_RDONLY | libc::O_DIRECTORY | libc::O_NOFOLLOW)
}

fn names(dir: BorrowedFd<'_>) -> Result<Vec<OsString>, Errno> {
    let mut names = Vec::new();
    dirents::read_all(dir, &mut |entry| names.push(entry.name.to_owned()))?;
    Ok(names)
}

/// Copies one entry; whether it is a directory, which is still empty then.
fn copy_entry(
    from: BorrowedFd<'_>,
    to: BorrowedFd<'_>,
    name: &OsStr,
    path: &Path,
    links: &mut Links,
) -> Result<bool, Errno> {
    let stat = match fs::fstatat(from, name) {
        // Removed since the listing.
        Err(Errno::ENOENT) => return Ok(false),
        stat => stat?,
    };
    let attr = attr_of(&stat);
    if attr.kind == FileKind::Directory {
        fs::mkdirat(to, name, 0o700)?;
        return Ok(true);
    }
    if attr.nlink > 1 {
        let key = (stat.st_dev, stat.st_ino);
        if let Some(first) = links.of_files.get(&key) {
            let first = fs::open_path(first, libc::O_PATH | libc::O_NOFOLLOW)?;
            fs::link_fd(first.as_fd(), to, name)?;
            return Ok(false);
        }
        links.of_files.insert(key, path.to_owned());
    }
    let (source, target) = (Object::Entry(from, name), Object::Entry(to, name));
    match attr.kind {
        FileKind::Regular => {
            let quiet = libc::O_RDONLY | libc::O_NONBLOCK | libc::O_NOATIME;
            let content = fs::openat(from, name, quiet, 0)?;
            if attr_of(&fs::fstat(content.as_fd())?).kind != FileKind::Regular {
                // Replaced since it was looked at.
                return Err(Errno::ESTALE);
            }
            let flags = libc::O_CREAT | libc::O_EXCL | libc::O_WRONLY;
            let copy = fs::openat(to, name, flags, 0o600)?;
            copy_content(content.as_fd(), copy.as_fd(), attr.size)?;
        }
        FileKind::Symlink => fs::symlinkat(&source.readlink()?, to, name)?,
        kind => fs::mknodat(to, name, type_bits(kind) | 0o600, attr.rdev)?,
    }
    copy_metadata(source, target, &attr)?;
    Ok(false)
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

/// Owner, mode, attributes and times, in the order in which none undoes another.
fn copy_metadata(from: Object<'_>, to: Object<'_>, attr: &Attr) -> Result<(), Errno> {
    to.chown(Some(attr.uid), Some(attr.gid))?;
    if attr.kind != FileKind::Symlink {
        to.chmod(u32::from(attr.perm))?;
    }
    let names = match xattr::list(from) {
        Err(Errno::EOPNOTSUPP) => Vec::new(),
        names => names?,
    };
    for name in names {
        if is_bound(&name) {
            continue;
        }
        match xattr::get(from, &name) {
            Ok(value) => xattr::set(to, &name, &value, 0)?,
            Err(Errno::ENODATA) => {}
            Err(errno) => return Err(errno),
        }
    }
    to.set_times(&[timespec(attr.atime), timespec(attr.mtime)])
}

/// Whether a mark holds only where the layer lies now. Layers of plyd have the marks of root.
fn is_bound(name: &OsStr) -> bool {
    let family = XattrFamily::Trusted;
    [
        family.origin(),
        family.impure(),
        family.nlink(),
        family.dialect(),
        family.origin_number(),
    ]
    .contains(&name)
}

/// Makes the index below `work` for an upper that was copied with `links`, from the index of the
/// original. The lower layers are on its file system, and in `view`.
pub fn copy_index(index: &Path, view: Option<&View>, work: &Path, links: &Links) -> io::Result<()> {
    let family = XattrFamily::Trusted;
    let to = work.join("index");
    for dir in [work, &to] {
        DirBuilder::new().mode(0o700).create(dir)?;
    }
    let (source, target) = (open_dir(index)?, open_dir(&to)?);
    for name in names(source.as_fd())? {
        let entry = Object::Entry(source.as_fd(), &name);
        let stat = entry.stat()?;
        if attr_of(&stat).kind == FileKind::Directory {
            continue;
        }
        let Ok(stored) = xattr::get(entry, family.origin()) else {
            continue;
        };
        // The original's lower file, and the copy of it.
        let Some(origin) = Origin::decode(&stored) else {
            continue;
        };
        let copy = match view.and_then(|view| view_lower::inode_of(view, &origin)) {
            Some(number) => links.of_view.get(&number),
            None => {
                let original = handle::open(source.as_fd(), &origin.handle)?;
                let original = fs::fstat(original.as_fd())?;
                links.of_files.get(&(original.st_dev, original.st_ino))
            }
        };
        let Some(copy) = copy else {
            continue;
        };
        let copy = fs::open_path(copy, libc::O_PATH | libc::O_NOFOLLOW)?;
        let origin = Origin {
            uuid: handle::fs_uuid(target.as_fd()),
            handle: handle::of(Object::Path(copy.as_fd()))?,
        };
        let (Some(stored), Some(indexed)) = (origin.encode(), origin.index_name()) else {
            return Err(Errno::EOPNOTSUPP.into());
        };
        match links.of_files.get(&(stat.st_dev, stat.st_ino)) {
            Some(first) => {
                let first = fs::open_path(first, libc::O_PATH | libc::O_NOFOLLOW)?;
                fs::link_fd(first.as_fd(), target.as_fd(), &indexed)?;
            }
            // Its names are all in the lower layers.
            None => {
                let mut own = Links::default();
                copy_entry(source.as_fd(), target.as_fd(), &name, &to, &mut own)?;
                fs::renameat2(target.as_fd(), &name, target.as_fd(), &indexed, 0)?;
            }
        }
        let object = Object::Entry(target.as_fd(), &indexed);
        xattr::set(object, family.origin(), &stored, 0)?;
        if let Ok(value) = xattr::get(entry, family.nlink()) {
            xattr::set(object, family.nlink(), &value, 0)?;
        }
    }
    Ok(())
}

/// A path as overlayfs's mount options take it.
pub fn escaped(path: &Path) -> OsString {
    let mut out = Vec::new();
    for &byte in path.as_os_str().as_bytes() {
        if matches!(byte, b'\\' | b':' | b',') {
            out.push(b'\\');
        }
        out.push(byte);
    }
    std::os::unix::ffi::OsStringExt::from_vec(out)
}
