//! Making new objects.
//!
//! A name that nothing stands for is made in its place at once. One that a whiteout stands for is made in
//! the work directory and renamed over the whiteout, so that the lower object never shows in between.

use std::ffi::OsStr;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::Arc;
use std::sync::atomic::Ordering;

use nix::errno::Errno;

use super::acl;
use super::attr::attr_of;
use super::copyup::Content;
use super::error::{Context, Result};
use super::file::{Backing, FileHandle};
use super::lookup::{Found, InUpper, check_name};
use super::node::{DirState, Node};
use super::stat_override::{HOST_PERM, StatOverride};
use super::types::{Attr, Caller, Entry, NodeId};
use super::union::Union;
use super::upper::Temp;
use crate::sys::fs::{self, Object};
use crate::sys::xattr;

const S_ISGID: u32 = 0o2000;
const SET_IDS: u32 = 0o6000;

/// What is to be made.
#[derive(Clone, Copy)]
enum New<'a> {
    Regular { mode: u32 },
    Directory { mode: u32 },
    Node { mode: u32, rdev: u64 },
    Symlink { target: &'a OsStr },
}

impl New<'_> {
    fn perm(self) -> Option<u32> {
        match self {
            Self::Regular { mode } | Self::Directory { mode } | Self::Node { mode, .. } => {
                Some(mode & 0o7777)
            }
            Self::Symlink { .. } => None,
        }
    }

    /// Makes it; a regular file comes open.
    fn make(self, dir: BorrowedFd<'_>, name: &OsStr, perm: u32) -> Result<Option<OwnedFd>, Errno> {
        match self {
            Self::Regular { .. } => {
                let flags = libc::O_CREAT | libc::O_EXCL | libc::O_RDWR;
                return fs::openat(dir, name, flags, perm).map(Some);
            }
            Self::Directory { .. } => fs::mkdirat(dir, name, perm)?,
            Self::Node { mode, rdev } => {
                fs::mknodat(dir, name, mode & libc::S_IFMT | perm, rdev)?;
            }
            Self::Symlink { target } => fs::symlinkat(target, dir, name)?,
        }
        Ok(None)
    }
}

/// Whether a free name needs a whiteout replaced.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(super) enum Free {
    /// Nothing is in the upper under it.
    Nothing,
    /// A whiteout is.
    Whiteout,
}

impl Union {
    /// Makes a fifo, socket, device or empty regular file.
    pub fn mknod(
        &self,
        parent: NodeId,
        name: &OsStr,
        mode: u32,
        rdev: u64,
        caller: &Caller,
    ) -> Result<Entry> {
        match mode & libc::S_IFMT {
            // It would be a whiteout.
            libc::S_IFCHR if rdev == 0 => return Err(Errno::EPERM.into()),
            libc::S_IFDIR | libc::S_IFLNK => return Err(Errno::EINVAL.into()),
            libc::S_IFREG | 0 => {
                let new = New::Regular { mode };
                return self.make(parent, name, new, caller).map(|(entry, _)| entry);
            }
            _ => {}
        }
        let new = New::Node { mode, rdev };
        self.make(parent, name, new, caller).map(|(entry, _)| entry)
    }

    /// Makes a directory.
    pub fn mkdir(&self, parent: NodeId, name: &OsStr, mode: u32, caller: &Caller) -> Result<Entry> {
        let new = New::Directory { mode };
        self.make(parent, name, new, caller).map(|(entry, _)| entry)
    }

    /// Makes a symbolic link.
    pub fn symlink(
        &self,
        parent: NodeId,
        name: &OsStr,
        target: &OsStr,
        caller: &Caller,
    ) -> Result<Entry> {
        let new = New::Symlink { target };
        self.make(parent, name, new, caller).map(|(entry, _)| entry)
    }

    /// Makes a regular file and opens it; EEXIST if the name stands for something.
    pub fn create(
        &self,
        parent: NodeId,
        name: &OsStr,
        mode: u32,
        _flags: i32,
        caller: &Caller,
    ) -> Result<(Entry, Arc<FileHandle>)> {
        let (entry, node) = self.make(parent, name, New::Regular { mode }, caller)?;
        let handle = self.handle(&node);
        Ok((entry, handle))
    }

    fn make(
        &self,
        parent: NodeId,
        name: &OsStr,
        new: New<'_>,
        caller: &Caller,
    ) -> Result<(Entry, Arc<Node>)> {
        check_name(name)?;
        let parent = self.node(parent)?;
        self.with_room(|| self.make_in(&parent, name, new, caller))
    }

    fn make_in(
        &self,
        parent: &Arc<Node>,
        name: &OsStr,
        new: New<'_>,
        caller: &Caller,
    ) -> Result<(Entry, Arc<Node>)> {
        let directory = Self::directory(parent)?;
        self.copy_up(parent, Content::All)?;
        let mut state = directory.state.write();
        let dir = self.dir_fd(parent)?;
        let free = self.free_name(parent, &state, name)?;
        let parent_attr = self.upper_attr(Object::Open(dir.as_fd()))?;
        let default_acl = self.keeps_acls() && self.has_default_acl(&state, dir.as_fd())?;
        let wanted = Wants::new(new, caller, self, &parent_attr, default_acl);
        let made = match free {
            Free::Nothing => match new.make(dir.as_fd(), name, wanted.create_perm) {
                Ok(fd) => {
                    let object = fd.as_ref().map_or(Object::Entry(dir.as_fd(), name), |fd| {
                        Object::Open(fd.as_fd())
                    });
                    match wanted.apply(object, default_acl) {
                        Ok(attr) => Ok((fd, attr)),
                        Err(error) => {
                            super::upper::remove_tree(dir.as_fd(), name);
                            Err(error)
                        }
                    }
                }
                // Without lowers the name was not looked at before.
                Err(Errno::EEXIST) => match self.in_upper(parent, name)? {
                    InUpper::Whiteout => {
                        self.make_over_whiteout(new, dir.as_fd(), name, &wanted, default_acl)
                    }
                    _ => Err(Errno::EEXIST.into()),
                },
                Err(errno) => Err(errno.into()),
            },
            Free::Whiteout => self.make_over_whiteout(new, dir.as_fd(), name, &wanted, default_acl),
        };
        let (fd, attr) = made?;
        state.changed(name);
        if wanted.is_directory {
            state.subdirectories.add(1);
        }
        let found = Found::new_upper(self.own_number(attr.ino), attr);
        let node = self.adopt(parent, &mut state, name, found, true);
        if let Some(made) = &node.directory {
            // Copied from nothing.
            made.protected.set(false);
        }
        drop(state);
        if let Some(fd) = fd {
            node.written.store(true, Ordering::Relaxed);
            let backing = Backing::Upper {
                fd,
                writable: true,
                sealed: false,
            };
            node.io.set(&self.budget, Arc::new(backing));
        }
        let entry = self.entry_of(Arc::clone(&node), Some(attr))?;
        Ok((entry, node))
    }

    /// EEXIST unless the name is free. In a directory without lowers only known nodes are looked at:
    /// the host says EEXIST itself.
    pub(super) fn free_name(
        &self,
        parent: &Arc<Node>,
        state: &DirState,
        name: &OsStr,
    ) -> Result<Free> {
        if state.removed {
            return Err(Errno::ENOENT.into());
        }
        if let Some(id) = state.children.get(name)
            && self.table.get(*id).is_some()
        {
            return Err(Errno::EEXIST.into());
        }
        let lowers = parent.place.read().lowers.clone();
        if lowers.is_empty() {
            return Ok(Free::Nothing);
        }
        match self.in_upper(parent, name)? {
            InUpper::Object(_) => Err(Errno::EEXIST.into()),
            InUpper::Whiteout => Ok(Free::Whiteout),
            InUpper::Nothing => match self.lower_has(parent, name)? {
                false => Ok(Free::Nothing),
                true => Err(Errno::EEXIST.into()),
            },
        }
    }

    fn make_over_whiteout(
        &self,
        new: New<'_>,
        dir: BorrowedFd<'_>,
        name: &OsStr,
        wanted: &Wants,
        default_acl: bool,
    ) -> Result<(Option<OwnedFd>, Attr)> {
        let upper = self.upper()?;
        let temp = Temp::new(upper);
        let fd = new.make(upper.work(), &temp.name, wanted.create_perm)?;
        let object = fd
            .as_ref()
            .map_or(temp.object(), |fd| Object::Open(fd.as_fd()));
        // A symbolic link has none.
        if default_acl && wanted.perm.is_some() {
            acl::inherit(dir, object, wanted.is_directory, wanted.create_perm)?;
        }
        let mut attr = wanted.apply(object, default_acl)?;
        if wanted.is_directory {
            self.set_mark(object, self.family.opaque(), b"y")
                .context("marking a new directory as opaque")?;
            self.replace_by_directory(temp, dir, name)?;
        } else {
            temp.install(dir, name, 0).map_err(|(_, errno)| errno)?;
        }
        // Moving it to its place was a change of it.
        attr.ctime = attr_of(&fs::fstatat(dir, name)?).ctime;
        attr.nlink = attr.nlink.max(1);
        Ok((fd, attr))
    }

    /// Puts a directory from the work directory where a whiteout is.
    pub(super) fn replace_by_directory(
        &self,
        temp: Temp<'_>,
        dir: BorrowedFd<'_>,
        name: &OsStr,
    ) -> Result<()> {
        match temp.install(dir, name, libc::RENAME_EXCHANGE) {
            Ok(()) => Ok(()),
            Err((temp, Errno::ENOSYS | Errno::EINVAL)) => {
                // Before Linux 3.15, or on a file system that cannot exchange, there is a moment without
                // the whiteout; the directory's lock keeps it from everyone but a crash.
                fs::unlinkat(dir, name)?;
                Ok(temp.install(dir, name, 0).map_err(|(_, errno)| errno)?)
            }
            Err((_, errno)) => Err(errno.into()),
        }
    }

    pub(super) fn has_default_acl(&self, state: &DirState, dir: BorrowedFd<'_>) -> Result<bool> {
        state.default_acl.get_or(
            || match xattr::get(Object::Open(dir), OsStr::new(acl::DEFAULT)) {
                Ok(_) => Ok(true),
                Err(Errno::ENODATA | Errno::EOPNOTSUPP) => Ok(false),
                Err(errno) => Err(errno.into()),
            },
        )
    }

    /// Makes another name for a file.
    pub fn link(&self, node: NodeId, parent: NodeId, name: &OsStr) -> Result<Entry> {
        check_name(name)?;
        let node = self.node(node)?;
        let parent = self.node(parent)?;
        let directory = Self::directory(&parent)?;
        if node.directory.is_some() {
            return Err(Errno::EPERM.into());
        }
        if node.name().is_none() && self.attr_of_node(&node)?.nlink == 0 {
            return Err(Errno::ENOENT.into());
        }
        // Before the file takes it to the upper.
        self.check_unprotected(&parent)?;
        self.copy_up(&node, Content::Metadata)?;
        self.copy_up(&parent, Content::All)?;
        self.keep_data_found(&node)?;
        let source = self.with_upper(&node, |object| object.open(libc::O_PATH))?;
        let mut state = directory.state.write();
        let dir = self.dir_fd(&parent)?;
        let free = self.free_name(&parent, &state, name)?;
        self.carry_impure(&node, &state, dir.as_fd())?;
        match free {
            Free::Nothing => fs::link_fd(source.as_fd(), dir.as_fd(), name)?,
            Free::Whiteout => {
                let upper = self.upper()?;
                let temp = Temp::new(upper);
                fs::link_fd(source.as_fd(), upper.work(), &temp.name)?;
                temp.install(dir.as_fd(), name, 0)
                    .map_err(|(_, errno)| errno)?;
            }
        }
        state.changed(name);
        let name: Arc<OsStr> = name.into();
        state.children.insert(Arc::clone(&name), node.id);
        node.place.write().names.push(super::node::Name {
            parent: Arc::clone(&parent),
            name,
        });
        self.table.count_lookup(node.id);
        drop(state);
        self.entry_of(node, None)
    }

    /// An object that was copied up keeps the number of its origin wherever it goes, so the directory
    /// it goes to must say that there are such.
    pub(super) fn carry_impure(
        &self,
        node: &Node,
        state: &DirState,
        dir: BorrowedFd<'_>,
    ) -> Result<()> {
        let copied = {
            let place = node.place.read();
            !place.lowers.is_empty()
                || place
                    .upper
                    .is_some_and(|ino| self.own_number(ino) != node.id)
        };
        if copied {
            self.mark_impure(state, dir)?;
        }
        Ok(())
    }
}

/// Owner and mode that a new object is to have.
struct Wants {
    uid: u32,
    gid: u32,
    /// Permission bits, unless it is a symbolic link.
    perm: Option<u32>,
    /// What to ask of the host when making it.
    create_perm: u32,
    is_directory: bool,
    /// Where owner and mode go instead of the host's.
    stat_override: Option<StatOverride>,
    /// The host's owner is not shown, so it is no failure if it cannot be set.
    any_owner: bool,
}

impl Wants {
    fn new(new: New<'_>, caller: &Caller, union: &Union, parent: &Attr, default_acl: bool) -> Self {
        let uid = union.owners.users.of_new(caller.uid);
        let mut gid = union.owners.groups.of_new(caller.gid);
        let is_directory = matches!(new, New::Directory { .. });
        let mut perm = new.perm();
        if let Some(perm) = &mut perm {
            if !default_acl {
                *perm &= !caller.umask;
            }
            if u32::from(parent.perm) & S_ISGID != 0 && is_directory {
                *perm |= S_ISGID;
            }
        }
        if u32::from(parent.perm) & S_ISGID != 0 {
            gid = parent.gid;
        }
        let create_perm = match union.stat_override {
            Some(_) => HOST_PERM,
            None => perm.unwrap_or(0o777),
        };
        Self {
            uid,
            gid,
            perm,
            create_perm,
            is_directory,
            stat_override: union.stat_override,
            any_owner: union.owners.is_squashed(),
        }
    }

    /// Brings a new object to what is wanted, with a call only for what differs. `masked`: the mode was
    /// masked by an ACL and is right as the host made it.
    fn apply(&self, object: Object<'_>, masked: bool) -> Result<Attr> {
        let mut attr = attr_of(&object.stat()?);
        if let Some(form) = self.stat_override {
            attr.uid = self.uid;
            attr.gid = self.gid;
            if let Some(perm) = self.perm {
                attr.perm = (perm & 0o7777) as u16;
            }
            form.write(object, &attr)?;
            return Ok(attr);
        }
        let made = u32::from(attr.perm);
        let mut chowned = false;
        if attr.uid != self.uid || attr.gid != self.gid {
            match object.chown(Some(self.uid), Some(self.gid)) {
                Ok(()) => {
                    attr.uid = self.uid;
                    attr.gid = self.gid;
                    chowned = true;
                }
                Err(Errno::EPERM | Errno::EINVAL) if self.any_owner => {}
                Err(errno) => return Err(errno.into()),
            }
        }
        if let Some(perm) = self.perm {
            let perm = if masked { made | perm & SET_IDS } else { perm };
            if perm != made || (chowned && perm & SET_IDS != 0) {
                object.chmod(perm)?;
                attr.perm = (perm & 0o7777) as u16;
            }
        }
        Ok(attr)
    }
}
