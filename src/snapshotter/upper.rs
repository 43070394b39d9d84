//! The upper directory of a snapshot: how it starts and how it becomes durable.

use std::ffi::OsString;
use std::fs::{self, DirBuilder, File};
use std::io;
use std::os::fd::AsFd;
use std::os::unix::ffi::OsStringExt;
use std::os::unix::fs::{DirBuilderExt, PermissionsExt, chown};
use std::path::Path;

use super::types::{Result, io_error};
use crate::cow::{NodeId, Timestamp, Union, UnionConfig, XattrFamily};
use crate::store::layer::index::Attributes;
use crate::store::{Time, sync_dir};
use crate::sys::fs::Object;
use crate::sys::xattr;

/// Mode of the root of a snapshot on nothing.
const ROOT_MODE: u32 = 0o755;

/// What the root directory of a snapshot is.
#[derive(Debug, PartialEq, Eq)]
pub(super) struct Root {
    perm: u16,
    uid: u32,
    gid: u32,
    mtime: Timestamp,
    atime: Timestamp,
    /// As a user of the union sees them.
    xattrs: Vec<(OsString, Vec<u8>)>,
}

impl Root {
    /// That of a directory in overlayfs format.
    pub(super) fn of_directory(dir: &Path) -> Result<Self> {
        Self::of(UnionConfig {
            lowers: vec![dir.to_owned()],
            ..UnionConfig::default()
        })
    }

    /// That of packed layers.
    pub(super) fn of_layers(root: Attributes) -> Self {
        let timestamp = |time: Time| Timestamp {
            sec: time.sec,
            nsec: time.nsec,
        };
        let xattrs = root.xattrs.into_iter();
        let mut xattrs: Vec<_> = xattrs
            .map(|(name, value)| (OsString::from_vec(name), value))
            .collect();
        xattrs.sort_unstable();
        Self {
            perm: root.mode & 0o7777,
            uid: root.uid,
            gid: root.gid,
            mtime: timestamp(root.mtime),
            atime: timestamp(root.atime),
            xattrs,
        }
    }

    /// That of a union.
    pub(super) fn of(union: UnionConfig) -> Result<Self> {
        let union = Union::open(union)?;
        let mut xattrs = Vec::new();
        let names = match union.listxattr(NodeId::ROOT) {
            // A file system without any.
            Err(error) if error.errno == libc::EOPNOTSUPP => Vec::new(),
            names => names?,
        };
        for name in names {
            let value = union.getxattr(NodeId::ROOT, &name)?;
            xattrs.push((name, value));
        }
        let attr = union.getattr(NodeId::ROOT, None)?;
        xattrs.sort_unstable();
        Ok(Self {
            perm: attr.perm,
            uid: attr.uid,
            gid: attr.gid,
            mtime: attr.mtime,
            atime: attr.atime,
            xattrs,
        })
    }

    /// Whether both are the same to whoever looks, but for access times.
    pub(super) fn is_same(&self, other: &Self) -> bool {
        let of = |root: &Self| (root.perm, root.uid, root.gid, root.mtime);
        of(self) == of(other) && self.xattrs == other.xattrs
    }
}

/// Makes the directory whose owner, mode and times a mount shows as those of its root: those of the
/// snapshot below, for a change of the root is a change like any other.
pub(super) fn make(dir: &Path, below: Option<&Root>) -> io::Result<()> {
    DirBuilder::new().mode(0o700).create(dir)?;
    let Some(root) = below else {
        // Not through the builder: the umask would take part.
        return fs::set_permissions(dir, fs::Permissions::from_mode(ROOT_MODE));
    };
    chown(dir, Some(root.uid), Some(root.gid))?;
    fs::set_permissions(dir, fs::Permissions::from_mode(u32::from(root.perm)))?;
    let opened = File::open(dir)?;
    let object = Object::Open(opened.as_fd());
    for (name, value) in &root.xattrs {
        let stored = XattrFamily::default().stored_name(name);
        xattr::set(object, &stored, value, 0)?;
    }
    let timespec = |time: Timestamp| libc::timespec {
        tv_sec: time.sec,
        tv_nsec: i64::from(time.nsec),
    };
    Ok(object.set_times(&[timespec(root.atime), timespec(root.mtime)])?)
}

/// Makes an empty one anew, as `make` would. However this ends, there is a whole one: it is replaced by a rename.
pub(super) fn renew(dir: &Path, below: Option<&Root>) -> io::Result<()> {
    let ready = dir.with_extension("new");
    match fs::remove_dir(&ready) {
        // Nobody was cut off here before.
        Err(error) if error.kind() == io::ErrorKind::NotFound => {}
        removed => removed?,
    }
    make(&ready, below)?;
    sync(&ready)?;
    fs::rename(&ready, dir)?;
    sync_dir(dir.parent().unwrap_or(dir))
}

/// Whether nothing is in it.
pub(super) fn is_empty(dir: &Path) -> Result<bool> {
    let mut entries = fs::read_dir(dir).map_err(io_error("list", dir))?;
    Ok(entries.next().is_none())
}

/// Makes everything in the upper durable: data, metadata and names.
pub(super) fn sync(dir: &Path) -> io::Result<()> {
    Ok(nix::unistd::syncfs(&File::open(dir)?)?)
}
