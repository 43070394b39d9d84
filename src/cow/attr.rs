//! Attributes: how the host's become the union's, and how they are changed.

use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::{SystemTime, UNIX_EPOCH};

use nix::errno::Errno;

use super::copyup::Content;
use super::dir::Item;
use super::error::{Context, Result};
use super::file::FileHandle;
use super::node::{Node, QuietCtime};
use super::owner::IdView;
use super::stat_override::HOST_PERM;
use super::types::{Attr, Caller, FileKind, NodeId, SetAttr, SetTime, StatFs, Timestamp};
use super::union::Union;
use crate::sys::fs::{Object, Stat};

const S_ISUID: u16 = 0o4000;
/// After so many seconds `relatime` moves an access time in any case.
pub(super) const DAY: i64 = 24 * 60 * 60;
const S_ISGID: u16 = 0o2000;
const S_IXGRP: u16 = 0o0010;
const S_IWOTH: u16 = 0o0002;

/// The link count that find(1) and others take as "look into every entry".
const NOT_COUNTED: u32 = 1;

/// The kind that the type bits of a mode stand for.
pub(super) fn kind_of_mode(mode: u32) -> FileKind {
    match mode & libc::S_IFMT {
        libc::S_IFDIR => FileKind::Directory,
        libc::S_IFLNK => FileKind::Symlink,
        libc::S_IFCHR => FileKind::CharDevice,
        libc::S_IFBLK => FileKind::BlockDevice,
        libc::S_IFIFO => FileKind::Fifo,
        libc::S_IFSOCK => FileKind::Socket,
        _ => FileKind::Regular,
    }
}

/// The kind that a directory entry tells; nothing if it does not.
pub(super) fn kind_of_dirent(kind: u8) -> Option<FileKind> {
    Some(match kind {
        libc::DT_REG => FileKind::Regular,
        libc::DT_DIR => FileKind::Directory,
        libc::DT_LNK => FileKind::Symlink,
        libc::DT_CHR => FileKind::CharDevice,
        libc::DT_BLK => FileKind::BlockDevice,
        libc::DT_FIFO => FileKind::Fifo,
        libc::DT_SOCK => FileKind::Socket,
        _ => return None,
    })
}

/// The host's attributes with the host's inode number.
pub(super) fn attr_of(stat: &Stat) -> Attr {
    let time = |sec, nsec: i64| Timestamp {
        sec,
        nsec: u32::try_from(nsec).unwrap_or(0),
    };
    Attr {
        ino: stat.st_ino,
        size: u64::try_from(stat.st_size).unwrap_or(0),
        blocks: u64::try_from(stat.st_blocks).unwrap_or(0),
        atime: time(stat.st_atime, stat.st_atime_nsec),
        mtime: time(stat.st_mtime, stat.st_mtime_nsec),
        ctime: time(stat.st_ctime, stat.st_ctime_nsec),
        kind: kind_of_mode(stat.st_mode),
        perm: (stat.st_mode & 0o7777) as u16,
        nlink: u32::try_from(stat.st_nlink).unwrap_or(u32::MAX),
        uid: stat.st_uid,
        gid: stat.st_gid,
        rdev: stat.st_rdev,
        blksize: u32::try_from(stat.st_blksize).unwrap_or(4096),
    }
}

/// The host's numbers of a file system.
pub(super) fn statfs_of(stat: &libc::statvfs) -> StatFs {
    let small = |value| u32::try_from(value).unwrap_or(u32::MAX);
    StatFs {
        blocks: stat.f_blocks,
        bfree: stat.f_bfree,
        bavail: stat.f_bavail,
        files: stat.f_files,
        ffree: stat.f_ffree,
        bsize: small(stat.f_bsize),
        namelen: 255,
        frsize: small(stat.f_frsize),
    }
}

/// Permission bits without setuid and setgid. Where that does not mean execution with the group, whoever is in
/// the group may keep it (`setattr_should_drop_sgid` in fs/attr.c).
fn without_set_ids(perm: u16, in_group: impl FnOnce() -> bool) -> u16 {
    let kept = perm & !S_ISUID;
    if perm & S_ISGID != 0 && (perm & S_IXGRP != 0 || !in_group()) {
        kept & !S_ISGID
    } else {
        kept
    }
}

pub(super) fn now() -> Timestamp {
    let since = SystemTime::now()
        .duration_since(UNIX_EPOCH)
        .unwrap_or_default();
    Timestamp {
        sec: i64::try_from(since.as_secs()).unwrap_or(i64::MAX),
        nsec: since.subsec_nanos(),
    }
}

pub(super) fn timespec(time: Timestamp) -> libc::timespec {
    libc::timespec {
        tv_sec: time.sec,
        tv_nsec: i64::from(time.nsec),
    }
}

/// Leaves a time as it is.
pub(super) const UNCHANGED: libc::timespec = libc::timespec {
    tv_sec: 0,
    tv_nsec: libc::UTIME_OMIT,
};

fn timespec_to_set(time: Option<SetTime>) -> libc::timespec {
    match time {
        None => UNCHANGED,
        Some(SetTime::Now) => libc::timespec {
            tv_sec: 0,
            tv_nsec: libc::UTIME_NOW,
        },
        Some(SetTime::At(time)) => timespec(time),
    }
}

impl SetAttr {
    fn is_empty(&self) -> bool {
        let owner = self.uid.is_some() || self.gid.is_some();
        let times = self.atime.is_some() || self.mtime.is_some();
        !(owner || times || self.perm.is_some() || self.size.is_some())
    }
}

impl Union {
    /// Attributes of a node.
    pub fn getattr(&self, node: NodeId, _handle: Option<&FileHandle>) -> Result<Attr> {
        self.attr_of_node(&self.node(node)?)
    }

    /// As `getattr`, of a node at hand. Not to be called with a directory locked.
    pub(super) fn attr_of_node(&self, node: &Arc<Node>) -> Result<Attr> {
        let lower = {
            let place = node.place.read();
            match place.upper {
                Some(_) => None,
                None => Some(place.lowers.first().ok_or(Errno::ESTALE)?.object.attr()?),
            }
        };
        let host = match (lower, &node.directory) {
            (Some(attr), _) => attr,
            (None, None) => self.with_upper(node, |object| self.upper_attr(object))?,
            (None, Some(directory)) => {
                // Not while a copy of a child moves times that are then put back.
                let state = directory.state.read();
                let mut attr = self.with_upper(node, |object| self.upper_attr(object))?;
                attr.ctime = state.quiet_ctime.shown(attr.ctime);
                attr
            }
        };
        Ok(self.shown(node, host))
    }

    /// Attributes of an upper object, with the owner and mode that it is to have for the union.
    pub(super) fn upper_attr(&self, object: Object<'_>) -> Result<Attr, Errno> {
        let stat = match &self.upper {
            Some(upper) => upper.stat_settled(object)?,
            None => object.stat()?,
        };
        let mut attr = attr_of(&stat);
        if let Some(form) = self.stat_override {
            form.read(object, &mut attr)?;
        }
        Ok(attr)
    }

    /// Gives an upper object an owner, as chown(2): setuid goes, and setgid where it means execution.
    pub(super) fn set_owner(
        &self,
        object: Object<'_>,
        uid: Option<u32>,
        gid: Option<u32>,
    ) -> Result<(), Errno> {
        let Some(form) = self.stat_override else {
            return object.chown(uid, gid);
        };
        let mut attr = self.upper_attr(object)?;
        attr.uid = uid.unwrap_or(attr.uid);
        attr.gid = gid.unwrap_or(attr.gid);
        if attr.kind != FileKind::Directory {
            attr.perm = without_set_ids(attr.perm, || true);
        }
        form.write(object, &attr)
    }

    /// Gives an upper object permission bits.
    pub(super) fn set_perm(&self, object: Object<'_>, perm: u16) -> Result<(), Errno> {
        let Some(form) = self.stat_override else {
            let _turn = self.upper.as_ref().map(|upper| upper.modes.read());
            return object.chmod(u32::from(perm));
        };
        let mut attr = self.upper_attr(object)?;
        attr.perm = perm;
        form.write(object, &attr)
    }

    /// Gives a copy the owner and the mode of what it is copied from, with a call only for what differs. `made`: the copy
    /// as it was made.
    pub(super) fn copy_owner(&self, attr: &Attr, to: Object<'_>, made: &Attr) -> Result<(), Errno> {
        let has_perm = attr.kind != FileKind::Symlink;
        if let Some(form) = self.stat_override {
            if has_perm && u32::from(made.perm) != HOST_PERM {
                to.chmod(HOST_PERM)?;
            }
            return form.write(to, attr);
        }
        if (made.uid, made.gid) != (attr.uid, attr.gid) {
            match to.chown(Some(attr.uid), Some(attr.gid)) {
                Err(Errno::EPERM | Errno::EINVAL) if self.owners.is_squashed() => {}
                result => result?,
            }
        }
        if has_perm && made.perm != attr.perm {
            to.chmod(u32::from(attr.perm))?;
        }
        Ok(())
    }

    /// What the union shows for an object whose host attributes are `host`. Not to be called with a
    /// directory locked.
    pub(super) fn shown(&self, node: &Arc<Node>, host: Attr) -> Attr {
        let subdirectories = self.subdirectories(node);
        let place = node.place.read();
        let mut attr = host;
        attr.ino = node.id.0;
        attr.uid = self.owners.users.shown(host.uid);
        attr.gid = self.owners.groups.shown(host.gid);
        if node.kind == FileKind::Directory {
            attr.nlink = match subdirectories {
                _ if place.names.is_empty() && node.id != NodeId::ROOT => 0,
                _ if self.static_nlink => NOT_COUNTED,
                Some(count) => count.saturating_add(2),
                None if place.lowers.len() + usize::from(place.upper.is_some()) == 1 => host.nlink,
                None => NOT_COUNTED,
            };
        } else {
            let links = i64::from(host.nlink) + place.rare.link_offset;
            attr.nlink = u32::try_from(links.max(0)).unwrap_or(u32::MAX);
        }
        if let (None, Some(atime)) = (place.upper, place.atime.get()) {
            attr.atime = atime;
        }
        if node.kind == FileKind::Regular
            && (place.metacopy || place.lowers.len() > 1)
            && let Some(data) = place.lowers.last()
        {
            // Of damage whoever reads the data is told.
            let lower = data.object.attr().map_or(0, |attr| attr.blocks);
            attr.blocks = lower.max(host.blocks);
        }
        if place.upper.is_some() {
            attr.ctime = place.rare.quiet_ctime.shown(host.ctime);
        }
        attr
    }

    /// How many subdirectories of a merged directory are visible: listed when first asked for, counted
    /// along from then on. Nothing for one that lies in a single layer, where the host counts, and for
    /// one that cannot be listed.
    fn subdirectories(&self, node: &Arc<Node>) -> Option<u32> {
        let directory = node.directory.as_ref()?;
        if self.static_nlink {
            return None;
        }
        let layers = {
            let place = node.place.read();
            place.lowers.len() + usize::from(place.upper.is_some())
        };
        let state = directory.state.read();
        if let Some(count) = state.subdirectories.get() {
            return Some(count);
        }
        if layers < 2 || state.removed {
            return None;
        }
        match self.merge(node, &state) {
            Ok(items) => {
                let is_directory = |item: &&Item| item.kind == FileKind::Directory;
                let count = items.iter().filter(is_directory).count();
                let count = u32::try_from(count).unwrap_or(u32::MAX);
                state.subdirectories.set(count);
                Some(count)
            }
            Err(error) => {
                tracing::debug!(%error, "the subdirectories of a directory cannot be counted");
                None
            }
        }
    }

    /// Changes attributes; what is in a lower layer is copied up first.
    pub fn setattr(
        &self,
        node: NodeId,
        _handle: Option<&FileHandle>,
        set: &SetAttr,
        caller: &Caller,
    ) -> Result<Attr> {
        let node = self.node(node)?;
        self.upper()?;
        if set.is_empty() && !self.may_take_set_ids(&node, caller)? {
            return self.attr_of_node(&node);
        }
        if node.kind == FileKind::Symlink && set.perm.is_some() {
            return Err(Errno::EOPNOTSUPP.into());
        }
        let uid = Self::wanted_owner(&self.owners.users, set.uid)?;
        let gid = Self::wanted_owner(&self.owners.groups, set.gid)?;
        if let Some(size) = set.size {
            match node.kind {
                FileKind::Regular => {}
                FileKind::Directory => return Err(Errno::EISDIR.into()),
                _ => return Err(Errno::EINVAL.into()),
            }
            self.copy_up(&node, Content::UpTo(size))?;
        }
        // The order matters: a chown clears setuid, which a mode given together with it sets again,
        // and times come last because all the others change them.
        let owner = |object: Object<'_>| {
            if uid.is_none() && gid.is_none() && !set.is_empty() {
                return Ok(());
            }
            if caller.uid != 0 && node.kind != FileKind::Directory {
                self.clear_bits(object, |attr| self.without_set_ids_of(attr, caller))?;
            }
            self.set_owner(object, uid, gid)
                .context("changing the owner")
        };
        let rest = |object: Object<'_>| {
            if let Some(perm) = set.perm {
                self.set_perm(object, perm).context("changing the mode")?;
                // A mode is also how set-id bits are cleared without FUSE_HANDLE_KILLPRIV_V2, and the kernel leaves this one.
                let without_execution = perm & (S_ISGID | S_IXGRP) == S_ISGID;
                if without_execution && caller.uid != 0 && node.kind == FileKind::Regular {
                    self.clear_bits(object, |attr| self.without_setgid(attr, caller))?;
                }
            }
            if set.atime.is_some() || set.mtime.is_some() {
                let times = [timespec_to_set(set.atime), timespec_to_set(set.mtime)];
                object.set_times(&times).context("changing times")?;
            }
            Ok(())
        };
        let all = |object: Object<'_>| owner(object).and_then(|()| rest(object));
        if let Some(size) = set.size {
            self.change(&node, owner)?;
            self.truncate(&node, size)?;
            if caller.uid != 0 && set.perm.is_none() {
                self.kill_suidgid(&node, caller)?;
            }
            self.change_times(&node, set.mtime.is_some(), rest)?;
        } else if !self.copy_up_changed(&node, Content::Metadata, Some(&all))? {
            self.change_times(&node, set.mtime.is_some(), all)?;
        }
        self.attr_of_node(&node)
    }

    /// Changes attributes of a node that is in the upper, and no time of change.
    pub(super) fn change(
        &self,
        node: &Arc<Node>,
        change: impl FnOnce(Object<'_>) -> Result<()>,
    ) -> Result<()> {
        self.change_times(node, false, change)
    }

    /// As `change`; with `sets_mtime` writes that are under way keep the time of change that this sets.
    fn change_times(
        &self,
        node: &Arc<Node>,
        sets_mtime: bool,
        change: impl FnOnce(Object<'_>) -> Result<()>,
    ) -> Result<()> {
        let mut gathered = node.attributes.lock();
        self.with_upper(node, |object| Ok(change(object)))??;
        if sets_mtime && let Some(gathered) = gathered.as_mut() {
            gathered.mtime = self
                .with_upper(node, |object| Ok(attr_of(&object.stat()?)))?
                .mtime;
        }
        if let Some(directory) = &node.directory {
            directory.state.write().quiet_ctime = QuietCtime::default();
        }
        Ok(())
    }

    /// Whether an empty change is to be made: chown(2) with neither owner nor group comes as one, which moves the
    /// time of change and clears set-id bits. So does what the kernel takes from a file before a write, and then the
    /// write clears them, but on old kernels not setgid without a meaning. Whoever could not have called chown(2), because
    /// bits would go, is left to that; what has no meaning goes for those who may write. A directory keeps its bits, and
    /// only the time moves.
    fn may_take_set_ids(&self, node: &Arc<Node>, caller: &Caller) -> Result<bool> {
        if node.kind == FileKind::Directory {
            return Ok(true);
        }
        let attr = self.attr_of_node(node)?;
        if caller.uid == 0 || caller.uid == attr.uid || attr.perm & (S_ISUID | S_ISGID) == 0 {
            return Ok(true);
        }
        let without_meaning = without_set_ids(attr.perm, || true) == attr.perm;
        Ok(without_meaning && (attr.perm & S_IWOTH != 0 || caller.is_in_group(attr.gid)))
    }

    /// What Linux does when a file is written by `caller` without CAP_FSETID: setuid goes, and setgid unless it does
    /// not mean execution and the caller is in the group. Answers whether anything went.
    pub(super) fn kill_suidgid(&self, node: &Arc<Node>, caller: &Caller) -> Result<bool> {
        let mut cleared = false;
        self.change(node, |object| {
            cleared = self.clear_bits(object, |attr| self.without_set_ids_of(attr, caller))?;
            Ok(())
        })?;
        Ok(cleared)
    }

    /// As `kill_suidgid`, for a request whose answer has no attributes. The kernel executes a file with the mode that it knows.
    pub(super) fn kill_suidgid_told(&self, node: &Arc<Node>, caller: &Caller) -> Result<()> {
        if self.kill_suidgid(node, caller)? {
            self.tell(node.id);
        }
        Ok(())
    }

    /// Whether a file of the upper has set-id bits, with or without a meaning.
    pub(super) fn has_set_ids(&self, node: &Arc<Node>) -> Result<bool> {
        let attr = self.with_upper(node, |object| self.upper_attr(object))?;
        Ok(attr.perm & (S_ISUID | S_ISGID) != 0)
    }

    /// What Linux does when `caller` without CAP_FSETID has set an access ACL: setgid goes unless the caller is in the
    /// group (`posix_acl_update_mode` in fs/posix_acl.c). Here because the host goes by its own caller, this process.
    pub fn access_acl_set_by(&self, node: NodeId, caller: &Caller) -> Result<()> {
        self.change(&self.node(node)?, |object| {
            self.clear_bits(object, |attr| self.without_setgid(attr, caller))
                .map(drop)
        })
    }

    /// What is left of the permission bits for a caller without CAP_FSETID.
    fn without_set_ids_of(&self, attr: &Attr, caller: &Caller) -> u16 {
        let group = self.owners.groups.shown(attr.gid);
        without_set_ids(attr.perm, || caller.is_in_group(group))
    }

    /// The permission bits without setgid unless the caller is in the group.
    fn without_setgid(&self, attr: &Attr, caller: &Caller) -> u16 {
        let group = self.owners.groups.shown(attr.gid);
        match attr.perm & S_ISGID != 0 && !caller.is_in_group(group) {
            true => attr.perm & !S_ISGID,
            false => attr.perm,
        }
    }

    /// Takes away what `kept` leaves out of the permission bits of an object of the upper; answers whether there was any.
    fn clear_bits(&self, object: Object<'_>, kept: impl FnOnce(&Attr) -> u16) -> Result<bool> {
        let attr = self.upper_attr(object)?;
        let kept = kept(&attr);
        let clears = kept != attr.perm;
        if clears {
            self.set_perm(object, kept)?;
        }
        Ok(clears)
    }

    /// The id to store for the owner that a caller names. A squashed one is shown whatever the host has, so
    /// there is nothing to change.
    fn wanted_owner(view: &IdView, wanted: Option<u32>) -> Result<Option<u32>> {
        match (wanted, view.squash) {
            (None, _) | (_, Some(_)) => Ok(None),
            (Some(id), None) => match view.stored(id) {
                Some(stored) => Ok(Some(stored)),
                None => Err(Errno::EINVAL).context("the mount's mapping of owners has no such id"),
            },
        }
    }

    /// Notes that a lower object was read: its access time moves as `relatime` has it, in memory.
    pub(super) fn touch_lower(&self, node: &Node, place_atime: Option<Timestamp>, lower: &Attr) {
        let atime = place_atime.unwrap_or(lower.atime);
        let now = now();
        if atime <= lower.mtime || atime <= lower.ctime || now.sec - atime.sec >= DAY {
            node.place.write().atime = now.into();
        }
    }

    /// Sizes and free space: the upper's, or the topmost lower's.
    pub fn statfs(&self) -> Result<StatFs> {
        match (&self.upper, self.lowers.first()) {
            (Some(upper), _) => {
                use std::os::fd::AsFd;
                Ok(statfs_of(&crate::sys::fs::fstatvfs(
                    upper.root.get().0.as_fd(),
                )?))
            }
            (None, Some(lower)) => lower.statfs(),
            (None, None) => Err(Errno::EIO.into()),
        }
    }

    /// Regular files that the kernel knows, of whatever layer.
    pub fn known_files(&self) -> Vec<NodeId> {
        let nodes = self.table.all().into_iter();
        nodes
            .filter(|node| node.kind == FileKind::Regular)
            .map(|node| node.id)
            .collect()
    }

    /// Regular files of the upper that may have been written and are still known: what has to be
    /// flushed through the mount before anyone reads the upper.
    pub fn writable_nodes(&self) -> Vec<NodeId> {
        self.table
            .all()
            .into_iter()
            .filter(|node| {
                node.kind == FileKind::Regular
                    && node.has_upper()
                    && node.written.load(Ordering::Relaxed)
            })
            .map(|node| node.id)
            .collect()
    }
}
