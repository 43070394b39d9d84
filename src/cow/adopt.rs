//! Taking over an upper that something else has written.
//!
//! What plywood writes says so on its top directory, and there `.wh.` names are ordinary ones. An upper
//! without that mark may hold fuse-overlayfs's forms: `.wh.NAME` and `.wh..wh..opq` files where it could not
//! make devices, `user.fuseoverlayfs.opaque` on directories, and owners in attributes. The first mount puts
//! overlayfs's forms in their place, which fuse-overlayfs reads as well, and leaves the mark. Every
//! step can be done again after a crash, and the mark comes last.
//!
//! An upper may also go to fuse-overlayfs in between and come back. Whoever mounts with a work directory empties
//! the `work/` in it, so a file there that is gone, while the one beside `work/` is not, tells of that.

use std::ffi::{OsStr, OsString};
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::ffi::OsStrExt;
use std::sync::atomic::{AtomicBool, Ordering};

use nix::errno::Errno;

use super::attr::attr_of;
use super::stat_override::StatOverride;
use super::types::XattrFamily;
use super::whiteout::{
    self, FUSE_OVERLAYFS_OPAQUE, FUSE_OVERLAYFS_ORIGIN, WH_OPAQUE, WH_PREFIX, is_wh_file,
};
use crate::sys::fs::{self, Object};
use crate::sys::{dirents, xattr};

/// What the mark of an upper begins with.
const DIALECT: &[u8] = b"overlay";

/// Name of the files that tell whether somebody else has used the work directory.
pub(super) const OURS: &str = "plywood";

/// What a layer's mark says: nothing where there is no mark, then the form of its owners.
pub(super) fn dialect(
    root: BorrowedFd<'_>,
    family: XattrFamily,
) -> Result<Option<Option<StatOverride>>, Errno> {
    match xattr::get(Object::Open(root), family.dialect()) {
        Ok(value) => {
            let mut words = value.split(|byte| *byte == b',').skip(1);
            Ok(Some(words.next().and_then(StatOverride::of_word)))
        }
        Err(Errno::ENODATA) => Ok(None),
        Err(errno) => Err(errno),
    }
}

/// What adoption looks at.
pub(super) struct Place<'a> {
    /// Top of the upper.
    pub(super) root: BorrowedFd<'a>,
    /// The work directory.
    pub(super) base: BorrowedFd<'a>,
    /// `work/` in it.
    pub(super) scratch: BorrowedFd<'a>,
    /// Which attributes are the union's.
    pub(super) family: XattrFamily,
}

/// Makes an upper plywood's own, if it is not yet, and tells where its owners lie. Also finds out whether the
/// upper stores the family's attributes at all. What an upper holds already goes before what is `wanted`.
pub(super) fn adopt(
    place: &Place<'_>,
    wanted: Option<StatOverride>,
) -> Result<Option<StatOverride>, Errno> {
    let (root, family) = (place.root, place.family);
    let known = dialect(root, family)?;
    let strangers = exists(place.base)? && !exists(place.scratch)?;
    let names = match known {
        // It may have been kernel overlayfs's until now, for which `.wh.` is no mark either.
        None if is_kernels(root, family)? => Some(Names::Ordinary),
        None => Some(Names::Marks),
        // Where devices can be made, fuse-overlayfs writes no whiteouts by name: such are somebody's files.
        Some(_) if strangers => Some(match makes_devices(place.scratch)? {
            true => Names::Ordinary,
            false => Names::Marks,
        }),
        Some(_) => None,
    };
    if let Some(names) = names
        && translate(root, family, names)?
    {
        fs::syncfs(root)?;
    }
    let object = Object::Open(root);
    let held = known.unwrap_or_else(|| StatOverride::of_layer(object));
    let form = held.or(wanted);
    if known != Some(form) {
        let mut mark = DIALECT.to_vec();
        if let Some(form) = form {
            // By this others know it, and a mount of it as a lower layer by them.
            if xattr::get(object, form.name()).is_err() {
                form.write(object, &attr_of(&object.stat()?))?;
            }
            mark.push(b',');
            mark.extend_from_slice(form.word());
        }
        xattr::set(object, family.dialect(), &mark, 0)?;
    }
    for dir in [place.scratch, place.base] {
        fs::openat(dir, OsStr::new(OURS), libc::O_CREAT | libc::O_RDONLY, 0o600)?;
    }
    Ok(form)
}

/// Whether kernel overlayfs has written the upper: with `index=on` it notes on the top directory where that comes from
/// (`ovl_verify_origin_fh` in fs/overlayfs/namei.c), newer ones an id as well. fuse-overlayfs does neither.
fn is_kernels(root: BorrowedFd<'_>, family: XattrFamily) -> Result<bool, Errno> {
    for name in [family.origin(), family.uuid()] {
        match xattr::get(Object::Open(root), name) {
            Ok(_) => return Ok(true),
            Err(Errno::ENODATA | Errno::EOPNOTSUPP) => {}
            Err(errno) => return Err(errno),
        }
    }
    Ok(false)
}

fn exists(dir: BorrowedFd<'_>) -> Result<bool, Errno> {
    match fs::fstatat(dir, OsStr::new(OURS)) {
        Ok(_) => Ok(true),
        Err(Errno::ENOENT) => Ok(false),
        Err(errno) => Err(errno),
    }
}

fn makes_devices(scratch: BorrowedFd<'_>) -> Result<bool, Errno> {
    let name = OsStr::new("device");
    match fs::mknodat(scratch, name, libc::S_IFCHR, 0) {
        Ok(()) => fs::unlinkat(scratch, name).map(|()| true),
        Err(Errno::EPERM) => Ok(false),
        Err(errno) => Err(errno),
    }
}

/// What `.wh.NAME` is in an upper.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Names {
    /// A whiteout.
    Marks,
    /// A file of that name; but `.wh..wh..opq` in an opaque directory is fuse-overlayfs's.
    Ordinary,
}

/// Puts overlayfs's forms in place of fuse-overlayfs's throughout; whether there were any. Goes back up by
/// `..`, so that the depth costs no descriptors; nobody else has the upper open yet.
fn translate(root: BorrowedFd<'_>, family: XattrFamily, names: Names) -> Result<bool, Errno> {
    let devices = AtomicBool::new(true);
    let mut at = open(root, OsStr::new("."))?;
    let (mut inner, mut changed) = directory(&at, family, names, &devices)?;
    let mut pending = Vec::new();
    loop {
        match inner.pop() {
            Some(name) => {
                at = open(at.as_fd(), &name)?;
                let (below, any) = directory(&at, family, names, &devices)?;
                changed |= any;
                pending.push(std::mem::replace(&mut inner, below));
            }
            None => {
                let Some(above) = pending.pop() else {
                    return Ok(changed);
                };
                at = open(at.as_fd(), OsStr::new(".."))?;
                inner = above;
            }
        }
    }
}

/// Opens a directory to look through it. Nobody has read anything yet, so no access time is to move.
fn open(dir: BorrowedFd<'_>, name: &OsStr) -> Result<OwnedFd, Errno> {
    Object::Entry(dir, name).open_quietly(libc::O_RDONLY | libc::O_DIRECTORY)
}

/// Translates one directory. Answers the directories in it, and whether anything was changed.
fn directory(
    at: &OwnedFd,
    family: XattrFamily,
    meaning: Names,
    devices: &AtomicBool,
) -> Result<(Vec<OsString>, bool), Errno> {
    let dir = at.as_fd();
    let before = fs::fstat(dir)?;
    let has = |name: &OsStr| xattr::get(Object::Open(dir), name).is_ok_and(|value| value == b"y");
    let marked = has(OsStr::new(FUSE_OVERLAYFS_OPAQUE));
    let opaque = marked || has(family.opaque());
    let (mut names, mut inner, mut marks) = (Vec::new(), Vec::new(), Vec::new());
    dirents::read_all(dir, &mut |entry| names.push(entry.name.to_owned()))?;
    let mut changed = false;
    for name in names {
        let directory = fs::fstatat(dir, &name)?.st_mode & libc::S_IFMT == libc::S_IFDIR;
        let may_mark = name.as_bytes().starts_with(WH_PREFIX)
            && (meaning == Names::Marks || (opaque && name.as_bytes() == WH_OPAQUE));
        if may_mark && is_wh_file(dir, &name) {
            marks.push(name);
            continue;
        }
        changed |= drop_attribute(Object::Entry(dir, &name), FUSE_OVERLAYFS_ORIGIN)?;
        if directory {
            inner.push(name);
        }
    }
    let opaque = opaque || marks.iter().any(|name| name.as_bytes() == WH_OPAQUE);
    if opaque {
        xattr::set(Object::Open(dir), family.opaque(), b"y", 0)?;
    }
    for mark in &marks {
        // In an opaque directory nothing is left to hide, and whiteouts in attribute form would not count.
        if let Some(hidden) = mark.as_bytes().strip_prefix(WH_PREFIX)
            && !hidden.starts_with(WH_PREFIX)
            && !opaque
        {
            hide(dir, OsStr::from_bytes(hidden), family, devices)?;
        }
        fs::unlinkat(dir, mark)?;
    }
    changed |= drop_attribute(Object::Open(dir), FUSE_OVERLAYFS_OPAQUE)?;
    if !marks.is_empty() {
        changed = true;
        let attr = attr_of(&before);
        let times = [attr.atime, attr.mtime].map(super::attr::timespec);
        Object::Open(dir).set_times(&times)?;
    }
    Ok((inner, changed))
}

/// Does what `.wh.NAME` means: what the layers below have under the name is gone, also below a directory
/// that is beside it.
fn hide(
    dir: BorrowedFd<'_>,
    name: &OsStr,
    family: XattrFamily,
    devices: &AtomicBool,
) -> Result<(), Errno> {
    match fs::fstatat(dir, name) {
        Ok(stat) if stat.st_mode & libc::S_IFMT == libc::S_IFDIR => {
            xattr::set(Object::Entry(dir, name), family.opaque(), b"y", 0)
        }
        Ok(_) => Ok(()),
        Err(Errno::ENOENT) => {
            whiteout::make(dir, name, family, devices)?;
            match devices.load(Ordering::Relaxed) {
                true => Ok(()),
                false => whiteout::allow_in(dir, family),
            }
        }
        Err(errno) => Err(errno),
    }
}

/// Removes an attribute; whether it was there.
fn drop_attribute(object: Object<'_>, name: &str) -> Result<bool, Errno> {
    match xattr::remove(object, OsStr::new(name)) {
        Ok(()) => Ok(true),
        // Links and devices cannot have it, and some kernels say so before they look.
        Err(Errno::ENODATA | Errno::EPERM | Errno::EOPNOTSUPP) => Ok(false),
        Err(errno) => Err(errno),
    }
}
