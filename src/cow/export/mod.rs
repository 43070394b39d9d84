//! Copies of layers for kernel overlayfs, in directories of their own.
//!
//! What only holds where a layer lies now is left out: file handles of other layers, and plywood's own marks.
//! Whiteouts, opaque marks, redirects and files without data stay as they are, and so do escaped attributes. The
//! index of hard links is made anew, because it names the lower files by their handles. Packed layers become one
//! directory. Files that are copied up in part have all their data in the copy, and no map.

mod file;
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

use self::file::Over;
use super::attr::{attr_of, timespec};
use super::copyup::type_bits;
use super::origin::Origin;
use super::types::{Attr, FileKind, XattrFamily};
use super::union::Union;
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

/// Copies the layer at `from` to `to`, which must not exist.
pub fn copy_layer(from: &Path, to: &Path, links: &mut Links) -> io::Result<()> {
    copy_tree(from, to, links, None)
}

/// As `copy_layer`, of the upper of a union that is `shown`, with that directory as its topmost lower and the upper's work
/// directory. Others may write meanwhile: each file is copied as it is found, in part or not; the caller has seen to it that what
/// was written before is there.
pub fn copy_upper(from: &Path, to: &Path, links: &mut Links, shown: &Union) -> io::Result<()> {
    copy_tree(from, to, links, Some(shown))
}

fn copy_tree(from: &Path, to: &Path, links: &mut Links, shown: Option<&Union>) -> io::Result<()> {
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
            let source = Object::Open(source.as_fd());
            copy_metadata(source, Object::Open(target.as_fd()), &attr, is_bound)?;
            continue;
        }
        pending.push((path.clone(), true));
        for name in names(source.as_fd())? {
            let at = path.join(&name);
            let over = match shown {
                Some(union) => Over::Shown(union, &at),
                None => Over::Layer(from.join(&at)),
            };
            let entry = Entry {
                from: source.as_fd(),
                to: target.as_fd(),
                name: &name,
                path: &to.join(&at),
                over: &over,
            };
            if entry.copy(links)? {
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

/// An entry to be copied from one directory into another.
struct Entry<'a> {
    from: BorrowedFd<'a>,
    to: BorrowedFd<'a>,
    name: &'a OsStr,
    /// Where the copy is.
    path: &'a Path,
    /// Where it is, if it is a file that is copied up in part.
    over: &'a Over<'a>,
}

impl Entry<'_> {
    /// Copies it; whether it is a directory, which is still empty then.
    fn copy(&self, links: &mut Links) -> io::Result<bool> {
        /// Nobody renames or replaces a file so often within so short a time.
        const TRIES: usize = 20;
        for _ in 1..TRIES {
            match self.try_copy(links) {
                Err(error) if is_gone(&error) => match fs::unlinkat(self.to, self.name) {
                    Ok(()) | Err(Errno::ENOENT) => {}
                    Err(errno) => return Err(errno.into()),
                },
                done => return done,
            }
        }
        self.try_copy(links)
    }

    fn try_copy(&self, links: &mut Links) -> io::Result<bool> {
        let Self { from, to, name, .. } = *self;
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
        let key = (stat.st_dev, stat.st_ino);
        if attr.nlink > 1
            && let Some(first) = links.of_files.get(&key)
        {
            let first = fs::open_path(first, libc::O_PATH | libc::O_NOFOLLOW)?;
            fs::link_fd(first.as_fd(), to, name)?;
            return Ok(false);
        }
        let (source, target) = (Object::Entry(from, name), Object::Entry(to, name));
        match attr.kind {
            FileKind::Regular => file::copy((from, to), name, stat.st_ino, self.over)?,
            FileKind::Symlink => {
                fs::symlinkat(&source.readlink()?, to, name)?;
                copy_metadata(source, target, &attr, is_bound)?;
            }
            kind => {
                fs::mknodat(to, name, type_bits(kind) | 0o600, attr.rdev)?;
                copy_metadata(source, target, &attr, is_bound)?;
            }
        }
        if attr.nlink > 1 {
            links.of_files.insert(key, self.path.to_owned());
        }
        Ok(false)
    }
}

/// Whether what was looked at is not there any more.
fn is_gone(error: &io::Error) -> bool {
    matches!(
        error.raw_os_error(),
        Some(libc::ENOENT | libc::ESTALE | libc::ENOTDIR)
    )
}

/// Owner, mode, attributes but those `left_out`, and times, in the order in which none undoes another.
fn copy_metadata(
    from: Object<'_>,
    to: Object<'_>,
    attr: &Attr,
    left_out: impl Fn(&OsStr) -> bool,
) -> Result<(), Errno> {
    to.chown(Some(attr.uid), Some(attr.gid))?;
    if attr.kind != FileKind::Symlink {
        to.chmod(u32::from(attr.perm))?;
    }
    let names = match xattr::list(from) {
        Err(Errno::EOPNOTSUPP) => Vec::new(),
        names => names?,
    };
    for name in names {
        if left_out(&name) {
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
/// original, which has the work directory `original`. The lower layers are on its file system, and in `view`.
pub fn copy_index(
    original: &Path,
    view: Option<&View>,
    work: &Path,
    links: &Links,
) -> io::Result<()> {
    let family = XattrFamily::Trusted;
    let to = work.join("index");
    for dir in [work, &to] {
        DirBuilder::new().mode(0o700).create(dir)?;
    }
    let (source, target) = (open_dir(&original.join("index"))?, open_dir(&to)?);
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
        let lower = copy;
        let copy = fs::open_path(lower, libc::O_PATH | libc::O_NOFOLLOW)?;
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
                let over = Over::Copied {
                    work: original,
                    lower,
                };
                let entry = Entry {
                    from: source.as_fd(),
                    to: target.as_fd(),
                    name: &name,
                    path: &to,
                    over: &over,
                };
                entry.copy(&mut own)?;
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
