//! Removing names: unlink, rmdir, and what becomes of the objects.

use std::ffi::OsStr;
use std::os::fd::{AsFd, BorrowedFd};
use std::sync::Arc;
use std::sync::atomic::Ordering;

use nix::errno::Errno;

use super::copyup::Content;
use super::error::{Context, Result};
use super::lookup::{InUpper, check_name};
use super::node::{DirState, Node, Orphan, QuietCtime};
use super::redirect::Wanted;
use super::types::NodeId;
use super::union::Union;
use super::upper::Temp;
use super::whiteout;
use crate::sys::fs::{self, Object};

impl Union {
    /// Removes a name of something that is no directory.
    pub fn unlink(&self, parent: NodeId, name: &OsStr) -> Result<()> {
        check_name(name)?;
        let parent = self.node(parent)?;
        let directory = Self::directory(&parent)?;
        self.upper()?;
        let (seen, _) = self.child(&parent, name, false)?;
        if seen.directory.is_some() {
            return Err(Errno::EISDIR.into());
        }
        // The directory first: what is copied up takes it along.
        self.check_unprotected(&parent)?;
        self.check_unprotected(&seen)?;
        self.count_links_in_upper(&seen)?;
        drop(seen);
        self.copy_up(&parent, Content::All)?;
        let mut state = directory.state.write();
        let node = self
            .child_locked(&parent, &mut state, name)?
            .ok_or(Errno::ENOENT)?;
        if node.directory.is_some() {
            return Err(Errno::EISDIR.into());
        }
        let dir = self.dir_fd(&parent)?;
        let in_upper = self.has_upper_entry(&parent, name, &node)?;
        let covered = self.lower_has(&parent, name)?;
        let orphan = self.orphan_before_unlink(&node, dir.as_fd(), name, in_upper)?;
        match (in_upper, covered) {
            (true, false) => fs::unlinkat(dir.as_fd(), name)?,
            (_, true) => self.put_whiteout(&parent, dir.as_fd(), name)?,
            (false, false) => {}
        }
        self.name_gone(&parent, &mut state, name, &node, in_upper, orphan)?;
        drop(state);
        self.let_go(node);
        Ok(())
    }

    /// Before a lower file with several names loses one, it is copied up: the copy's record of links is
    /// what tells after a remount how many are left. Kernel overlayfs does the same
    /// (`ovl_nlink_start`).
    pub(super) fn count_links_in_upper(&self, node: &Arc<Node>) -> Result<()> {
        let links = match node.place.read().lowers.first() {
            Some(lower) if node.directory.is_none() => lower.object.attr()?.nlink,
            _ => return Ok(()),
        };
        if links > 1 {
            self.copy_up(node, Content::Metadata)?;
        }
        Ok(())
    }

    /// Removes a directory in which nothing is visible.
    pub fn rmdir(&self, parent: NodeId, name: &OsStr) -> Result<()> {
        check_name(name)?;
        let parent = self.node(parent)?;
        let directory = Self::directory(&parent)?;
        self.upper()?;
        let (seen, _) = self.child(&parent, name, false)?;
        if seen.directory.is_none() {
            return Err(Errno::ENOTDIR.into());
        }
        self.check_unprotected(&seen)?;
        drop(seen);
        self.copy_up(&parent, Content::All)?;
        let mut state = directory.state.write();
        let node = self
            .child_locked(&parent, &mut state, name)?
            .ok_or(Errno::ENOENT)?;
        let mut inner = Self::directory(&node)?.state.write();
        self.check_empty(&node, &inner)?;
        let dir = self.dir_fd(&parent)?;
        let in_upper = node.place.read().upper.is_some();
        let covered = self.lower_has(&parent, name)?;
        let orphan = self.remove_directory(&parent, dir.as_fd(), name, in_upper, covered)?;
        inner.removed = true;
        drop(inner);
        state.subdirectories.add(-1);
        self.name_gone(&parent, &mut state, name, &node, in_upper, orphan)?;
        drop(state);
        self.let_go(node);
        Ok(())
    }

    /// ENOTEMPTY if anything is visible in a directory that the caller has locked.
    pub(super) fn check_empty(&self, node: &Arc<Node>, state: &DirState) -> Result<()> {
        if self.merge(node, state)?.is_empty() {
            Ok(())
        } else {
            Err(Errno::ENOTEMPTY.into())
        }
    }

    /// Takes an empty directory, which may hold whiteouts, out of the upper, and leaves a whiteout if
    /// its name would show something else. Answers what keeps it reachable.
    pub(super) fn remove_directory(
        &self,
        parent: &Node,
        dir: BorrowedFd<'_>,
        name: &OsStr,
        in_upper: bool,
        covered: bool,
    ) -> Result<Option<Orphan>> {
        if !in_upper {
            self.put_whiteout(parent, dir, name)?;
            return Ok(None);
        }
        if !self.may_keep_open()? {
            return self.move_to_work(parent, dir, name, covered).map(Some);
        }
        let orphan = self.keep_open(dir, name)?;
        let plain = !covered && fs::rmdirat(dir, name).is_ok();
        if !plain {
            // It holds whiteouts, or one takes its place.
            match self.move_to_work(parent, dir, name, covered) {
                Ok(moved) => self.drop_orphan(moved, None),
                Err(error) => {
                    self.drop_orphan(orphan, None);
                    return Err(error);
                }
            }
        }
        Ok(Some(orphan))
    }

    /// Moves a directory into the work directory, with a whiteout in its place where one is needed.
    fn move_to_work(
        &self,
        parent: &Node,
        dir: BorrowedFd<'_>,
        name: &OsStr,
        covered: bool,
    ) -> Result<Orphan> {
        let upper = self.upper()?;
        if !covered {
            let away = upper.temp_name();
            upper.rename(dir, name, upper.work(), &away, 0)?;
            return Ok(Orphan::Work(away.as_os_str().into()));
        }
        let whiteout = self.spare_whiteout(parent, dir)?;
        let flags = libc::RENAME_EXCHANGE;
        match upper.rename(dir, name, upper.work(), &whiteout.name, flags) {
            Ok(()) => Ok(Orphan::Work(whiteout.keep().as_os_str().into())),
            Err(Errno::ENOSYS | Errno::EINVAL) => {
                let away = upper.temp_name();
                upper.rename(dir, name, upper.work(), &away, 0)?;
                whiteout.install(dir, name, 0).map_err(|(_, errno)| errno)?;
                Ok(Orphan::Work(away.as_os_str().into()))
            }
            Err(errno) => Err(errno.into()),
        }
    }

    /// Whether a lower layer would show something under a name if the upper said nothing.
    pub(super) fn lower_has(&self, parent: &Arc<Node>, name: &OsStr) -> Result<bool> {
        let lowers = parent.place.read().lowers.clone();
        if lowers.is_empty() {
            return Ok(false);
        }
        let found = self.find_lowers(&lowers, name, None, Wanted::Anything)?;
        Ok(!found.is_empty())
    }

    /// Whether this very name of a node is in the upper: another name of a copied-up file may not be.
    pub(super) fn has_upper_entry(
        &self,
        parent: &Arc<Node>,
        name: &OsStr,
        node: &Node,
    ) -> Result<bool> {
        let (in_upper, several) = {
            let place = node.place.read();
            (
                place.upper.is_some(),
                place.rare.index.is_some() || place.names.len() > 1,
            )
        };
        if !in_upper || !several {
            return Ok(in_upper);
        }
        Ok(matches!(self.in_upper(parent, name)?, InUpper::Object(_)))
    }

    /// Writes a whiteout in place of what the upper has under a name, if anything (no directory). `dir` is that of
    /// `parent`.
    fn put_whiteout(&self, parent: &Node, dir: BorrowedFd<'_>, name: &OsStr) -> Result<()> {
        let upper = self.upper()?;
        if upper.device_whiteouts.load(Ordering::Relaxed) {
            match fs::mknodat(dir, name, libc::S_IFCHR, 0) {
                Ok(()) => return Ok(()),
                Err(Errno::EEXIST | Errno::EPERM) => {}
                Err(errno) => return Err(errno).context("writing a whiteout"),
            }
        }
        let whiteout = self.spare_whiteout(parent, dir)?;
        Ok(whiteout.install(dir, name, 0).map_err(|(_, errno)| errno)?)
    }

    /// Makes a whiteout for a name in `dir`, that of `parent`, of which only the installation is left to be done.
    pub(super) fn spare_whiteout(&self, parent: &Node, dir: BorrowedFd<'_>) -> Result<Temp<'_>> {
        let upper = self.upper()?;
        let temp = Temp::new(upper);
        whiteout::make(
            upper.work(),
            &temp.name,
            self.family,
            &upper.device_whiteouts,
        )
        .context("writing a whiteout")?;
        if !upper.device_whiteouts.load(Ordering::Relaxed) {
            self.allow_xattr_whiteouts(parent, dir)?;
        }
        Ok(temp)
    }

    /// Has whiteouts in attribute form count in `dir`, that of `parent`, of which the state is locked for writing.
    pub(super) fn allow_xattr_whiteouts(&self, parent: &Node, dir: BorrowedFd<'_>) -> Result<()> {
        let known = &Self::directory(parent)?.xattr_whiteouts;
        if known.get() != Some(true) {
            whiteout::allow_in(dir, self.family)
                .context("marking a directory as holding whiteouts")?;
            known.set(true);
        }
        Ok(())
    }

    /// Whether whiteouts in attribute form count in `dir`, that of `parent`, of which the state is locked.
    pub(super) fn has_xattr_whiteouts(&self, parent: &Node, dir: BorrowedFd<'_>) -> Result<bool> {
        Self::directory(parent)?.xattr_whiteouts.get_or(|| {
            let opaque = self.mark(Object::Open(dir), self.family.opaque())?;
            Ok(opaque.as_deref() == Some(b"x"))
        })
    }

    /// Whether one more removed object may be held by a descriptor.
    pub(super) fn may_keep_open(&self) -> Result<bool> {
        let upper = self.upper()?;
        Ok(upper.orphan_fds.load(Ordering::Relaxed) < upper.orphan_fd_limit)
    }

    fn keep_open(&self, dir: BorrowedFd<'_>, name: &OsStr) -> Result<Orphan> {
        let fd = fs::openat(dir, name, libc::O_PATH, 0)?;
        self.upper()?.orphan_fds.fetch_add(1, Ordering::Relaxed);
        Ok(Orphan::Fd(Arc::new(fd)))
    }

    /// What keeps a file reachable of which the last known name is about to go. Beyond the budget of
    /// descriptors it gets a name in the work directory.
    pub(super) fn orphan_before_unlink(
        &self,
        node: &Node,
        dir: BorrowedFd<'_>,
        name: &OsStr,
        in_upper: bool,
    ) -> Result<Option<Orphan>> {
        let reachable = {
            let place = node.place.read();
            place.names.len() > 1 || place.rare.orphan.is_some() || place.rare.index.is_some()
        };
        if reachable || !in_upper {
            return Ok(None);
        }
        if self.may_keep_open()? {
            return self.keep_open(dir, name).map(Some);
        }
        let upper = self.upper()?;
        let away = upper.temp_name();
        fs::linkat(dir, name, upper.work(), &away)
            .context("keeping a file reachable that is about to be removed")?;
        node.place.write().rare.link_offset -= 1;
        Ok(Some(Orphan::Work(away.as_os_str().into())))
    }

    /// Settles the books after a name has gone.
    pub(super) fn name_gone(
        &self,
        parent: &Arc<Node>,
        state: &mut DirState,
        name: &OsStr,
        node: &Arc<Node>,
        was_in_upper: bool,
        orphan: Option<Orphan>,
    ) -> Result<()> {
        let upper = self.upper()?;
        let key = state.children.remove_entry(name).map(|(key, _)| key);
        state.changed(name);
        let mut place = node.place.write();
        place.drop_name(parent, name, key);
        if !was_in_upper {
            place.rare.link_offset -= 1;
        }
        if orphan.is_some() {
            place.rare.orphan = orphan;
        }
        if let Some(index) = place.rare.index.clone() {
            let object = Object::Entry(upper.index(), &index);
            let links = i64::try_from(object.stat()?.st_nlink).unwrap_or(i64::MAX);
            if links + place.rare.link_offset <= 0 {
                place.rare.orphan = Some(if self.may_keep_open()? {
                    let orphan = self.keep_open(upper.index(), &index)?;
                    fs::unlinkat(upper.index(), &index)?;
                    place.rare.link_offset += 1;
                    orphan
                } else {
                    let away = upper.temp_name();
                    fs::renameat2(upper.index(), &index, upper.work(), &away, 0)?;
                    Orphan::Work(away.as_os_str().into())
                });
                place.rare.index = None;
            } else if !was_in_upper {
                self.store_links(object, place.rare.link_offset)?;
            }
        }
        drop(place);
        if let Some(directory) = &node.directory {
            directory.fd.clear();
            // That moved its own change time, too.
            directory.state.write().quiet_ctime = QuietCtime::default();
        }
        Ok(())
    }
}
