//! Renaming. What moves is in the upper by then; a directory that merges with lower ones takes a
//! redirect along, and its old name gets a whiteout in the same step of the host where the host can.

use std::ffi::{OsStr, OsString};
use std::os::fd::{AsFd, BorrowedFd};
use std::os::unix::ffi::OsStrExt;
use std::sync::Arc;
use std::sync::atomic::Ordering;

use nix::errno::Errno;
use parking_lot::RwLockWriteGuard;

use super::copyup::Content;
use super::error::{Context, Error, Result};
use super::lookup::{InUpper, check_name};
use super::node::{DirState, Name, Node, Orphan, QuietCtime};
use super::types::{FileKind, NodeId, RenameMode};
use super::union::Union;
use super::upper::Temp;
use crate::sys::fs::{self, Object};

/// One end of a rename.
struct End<'a> {
    parent: &'a Arc<Node>,
    name: &'a OsStr,
    dir: BorrowedFd<'a>,
    /// A lower layer would show something under the name.
    covered: bool,
}

/// Both directories locked; `second` is `None` when they are one.
struct Locked<'a> {
    first: RwLockWriteGuard<'a, DirState>,
    second: Option<RwLockWriteGuard<'a, DirState>>,
}

impl Locked<'_> {
    fn source(&mut self) -> &mut DirState {
        &mut self.first
    }

    fn target(&mut self) -> &mut DirState {
        self.second.as_deref_mut().unwrap_or(&mut self.first)
    }
}

impl Union {
    /// Moves a name.
    pub fn rename(
        &self,
        parent: NodeId,
        name: &OsStr,
        new_parent: NodeId,
        new_name: &OsStr,
        mode: RenameMode,
    ) -> Result<()> {
        check_name(name)?;
        check_name(new_name)?;
        self.upper()?;
        let parent = self.node(parent)?;
        let new_parent = self.node(new_parent)?;
        Self::directory(&parent)?;
        Self::directory(&new_parent)?;
        // Before anything below takes them to the upper.
        self.check_unprotected(&parent)?;
        self.check_unprotected(&new_parent)?;
        loop {
            let (node, _) = self.child(&parent, name, false)?;
            let other = match self.child(&new_parent, new_name, false) {
                Ok((other, _)) => Some(other),
                Err(error) if error.is(Errno::ENOENT) => None,
                Err(error) => return Err(error),
            };
            // Asked before anything is copied up, and again when all is locked.
            if !Self::check_kinds(&node, other.as_ref(), mode)? {
                return Ok(());
            }
            if let Some(other) = &other {
                self.check_unprotected(other)?;
            }
            self.bring_up(&node, &parent, name)?;
            self.copy_up(&new_parent, Content::All)?;
            match (mode, &other) {
                (RenameMode::Exchange, Some(other)) => {
                    self.bring_up(other, &new_parent, new_name)?;
                }
                (_, Some(other)) => self.count_links_in_upper(other)?,
                (_, None) => {}
            }
            let done = self.rename_locked(&node, &parent, name, &new_parent, new_name, mode);
            let done = match done {
                Err(error) if error.is(Errno::EXDEV) => {
                    self.fetch_unmovable(&node, other.as_ref(), mode, error)
                }
                done => done,
            };
            self.let_go(node);
            if let Some(other) = other {
                self.let_go(other);
            }
            if done? {
                return Ok(());
            }
        }
    }

    /// After `error`: no mark can tell where the data of a file would be found. With its data in the upper it can move,
    /// so the rename is to be tried again.
    fn fetch_unmovable(
        &self,
        node: &Arc<Node>,
        other: Option<&Arc<Node>>,
        mode: RenameMode,
        error: Error,
    ) -> Result<bool> {
        let other = other.filter(|_| mode == RenameMode::Exchange);
        let mut fetched = false;
        for moved in [Some(node), other].into_iter().flatten() {
            if moved.place.read().metacopy {
                self.copy_up(moved, Content::All)?;
                fetched = true;
            }
        }
        if fetched { Ok(false) } else { Err(error) }
    }

    /// Whether there is anything to do.
    fn check_kinds(node: &Arc<Node>, other: Option<&Arc<Node>>, mode: RenameMode) -> Result<bool> {
        match (mode, other) {
            (RenameMode::NoReplace, Some(_)) => Err(Errno::EEXIST.into()),
            (RenameMode::Exchange, None) => Err(Errno::ENOENT.into()),
            (_, None) => Ok(true),
            // Two names of one file: POSIX leaves both.
            (_, Some(other)) if Arc::ptr_eq(node, other) => Ok(false),
            (RenameMode::Replace, Some(other)) => {
                match (node.directory.is_some(), other.directory.is_some()) {
                    (true, false) => Err(Errno::ENOTDIR.into()),
                    (false, true) => Err(Errno::EISDIR.into()),
                    _ => Ok(true),
                }
            }
            (RenameMode::Exchange, Some(_)) => Ok(true),
        }
    }

    /// Copies a node up and sees to it that this very name of it is in the upper.
    pub(super) fn bring_up(
        &self,
        node: &Arc<Node>,
        parent: &Arc<Node>,
        name: &OsStr,
    ) -> Result<()> {
        self.copy_up(node, Content::Metadata)?;
        // In the copy of a protected directory a missing name may be put; whoever changes names has asked for itself.
        if !parent.in_upper() {
            self.copy_up(parent, Content::All)?;
        }
        if node.directory.is_some() || node.place.read().rare.index.is_none() {
            return Ok(());
        }
        let source = self.with_upper(node, |object| object.open(libc::O_PATH))?;
        let state = Self::directory(parent)?.state.write();
        if state.children.get(name) != Some(&node.id)
            || !matches!(self.in_upper(parent, name)?, InUpper::Nothing)
        {
            return Ok(());
        }
        let dir = self.dir_fd(parent)?;
        self.mark_impure(&state, dir.as_fd())?;
        let before = fs::fstat(dir.as_fd())?;
        let mut place = node.place.write();
        self.store_links(Object::Path(source.as_fd()), place.rare.link_offset - 1)?;
        fs::link_fd(source.as_fd(), dir.as_fd(), name)?;
        place.rare.link_offset -= 1;
        super::copyup::restore_times(dir.as_fd(), &before)
    }

    fn lock_two<'a>(&self, parent: &'a Arc<Node>, new_parent: &'a Arc<Node>) -> Result<Locked<'a>> {
        let first = &Self::directory(parent)?.state;
        let second = &Self::directory(new_parent)?.state;
        if Arc::ptr_eq(parent, new_parent) {
            return Ok(Locked {
                first: first.write(),
                second: None,
            });
        }
        let parent_first = is_above(parent, new_parent)
            || (!is_above(new_parent, parent) && parent.id < new_parent.id);
        let (first, second) = if parent_first {
            let first = first.write();
            (first, second.write())
        } else {
            let second = second.write();
            (first.write(), second)
        };
        Ok(Locked {
            first,
            second: Some(second),
        })
    }

    /// The rename itself; false when something changed before the locks were had.
    fn rename_locked(
        &self,
        node: &Arc<Node>,
        parent: &Arc<Node>,
        name: &OsStr,
        new_parent: &Arc<Node>,
        new_name: &OsStr,
        mode: RenameMode,
    ) -> Result<bool> {
        let _order = (!Arc::ptr_eq(parent, new_parent)).then(|| self.rename_lock.lock());
        if node.directory.is_some() && (Arc::ptr_eq(node, new_parent) || is_above(node, new_parent))
        {
            return Err(Errno::EINVAL.into());
        }
        let mut locked = self.lock_two(parent, new_parent)?;
        let still = self.child_locked(parent, locked.source(), name)?;
        if !still.is_some_and(|still| Arc::ptr_eq(&still, node)) {
            return Ok(false);
        }
        let other = self.child_locked(new_parent, locked.target(), new_name)?;
        if !Self::check_kinds(node, other.as_ref(), mode)? {
            return Ok(true);
        }
        if mode == RenameMode::Exchange && other.as_ref().is_some_and(|other| !other.has_upper()) {
            return Ok(false);
        }
        if let Some(other) = &other
            && other.directory.is_some()
            && (Arc::ptr_eq(other, parent) || is_above(other, parent))
        {
            return Err(match mode {
                RenameMode::Exchange => Errno::EINVAL,
                _ => Errno::ENOTEMPTY,
            }
            .into());
        }
        let dir = self.dir_fd(parent)?;
        let new_dir = self.dir_fd(new_parent)?;
        let from = End {
            parent,
            name,
            dir: dir.as_fd(),
            covered: self.lower_has(parent, name)?,
        };
        let to = End {
            parent: new_parent,
            name: new_name,
            dir: new_dir.as_fd(),
            covered: self.lower_has(new_parent, new_name)?,
        };
        self.prepare_move(node, &from, &to, locked.target())?;
        match (mode, other) {
            (RenameMode::Exchange, Some(other)) => {
                self.prepare_move(&other, &to, &from, locked.source())?;
                match fs::renameat2(from.dir, name, to.dir, new_name, libc::RENAME_EXCHANGE) {
                    // Before Linux 3.15. By several renames, a crash could leave one of the two without
                    // a name: it is refused as on a file system that cannot do it.
                    Err(Errno::ENOSYS) => return Err(Errno::EINVAL.into()),
                    result => result?,
                }
                moved(node, &from, None, &to, new_name.into());
                moved(&other, &to, None, &from, name.into());
                locked.source().changed(name);
                locked.target().changed(new_name);
                locked.source().children.insert(name.into(), other.id);
                locked.target().children.insert(new_name.into(), node.id);
                let net =
                    i64::from(node.directory.is_some()) - i64::from(other.directory.is_some());
                locked.source().subdirectories.add(-net);
                locked.target().subdirectories.add(net);
            }
            (_, other) => self.replace(node, &from, &to, other, &mut locked)?,
        }
        Ok(true)
    }

    /// Marks what is about to move so that it stays what it is under the new name.
    fn prepare_move(
        &self,
        node: &Arc<Node>,
        from: &End<'_>,
        to: &End<'_>,
        target: &DirState,
    ) -> Result<()> {
        self.carry_impure(node, target, to.dir)?;
        let object = Object::Entry(from.dir, from.name);
        if node.kind != FileKind::Directory {
            if node.place.read().metacopy {
                self.redirect_data(object, from.parent, from.name)?;
            }
            return Ok(());
        }
        if !node.place.read().lowers.is_empty() {
            let path = self.lower_path(node)?;
            self.store_redirect(object, &path)
                .context("noting where a renamed directory continues")?;
        } else if to.covered {
            self.set_mark(object, self.family.opaque(), b"y")
                .context("marking a renamed directory as opaque")?;
        }
        Ok(())
    }

    /// The path under which a merged directory is found in the layers below: its union path, with what
    /// the upper's redirects say in place of names (`ovl_get_redirect` in fs/overlayfs/dir.c).
    pub(super) fn lower_path(&self, node: &Arc<Node>) -> Result<OsString> {
        let mut names: Vec<OsString> = Vec::new();
        let mut at = Arc::clone(node);
        while at.id != NodeId::ROOT {
            let name = at.name().ok_or(Errno::ENOENT)?;
            let mut step = name.name.to_os_string();
            if at.in_upper() {
                let fd = self.dir_fd(&at)?;
                if let Some(redirect) = self.redirect_mark(Object::Open(fd.as_fd()))? {
                    step = redirect.into_os_string();
                }
            }
            let absolute = step.as_bytes().starts_with(b"/");
            names.push(step);
            if absolute {
                break;
            }
            at = name.parent;
        }
        let mut path = OsString::new();
        for name in names.iter().rev() {
            if !name.as_bytes().starts_with(b"/") {
                path.push("/");
            }
            path.push(name);
        }
        Ok(path)
    }

    fn replace(
        &self,
        node: &Arc<Node>,
        from: &End<'_>,
        to: &End<'_>,
        other: Option<Arc<Node>>,
        locked: &mut Locked<'_>,
    ) -> Result<()> {
        let mut in_upper = false;
        let mut orphan = None;
        let mut inner = None;
        if let Some(other) = &other {
            if let Some(directory) = &other.directory {
                let state = directory.state.write();
                self.check_empty(other, &state)?;
                inner = Some(state);
            }
            in_upper = self.has_upper_entry(to.parent, to.name, other)?;
            if other.directory.is_none() {
                orphan = self.orphan_before_unlink(other, to.dir, to.name, in_upper)?;
            }
        }
        let whiteout = other.is_none() || !in_upper;
        let whiteout = whiteout && matches!(self.in_upper(to.parent, to.name)?, InUpper::Whiteout);
        if node.kind == FileKind::Directory && (in_upper || whiteout) {
            orphan = self.rename_over(from, to)?;
        } else {
            self.rename_away(from, to)?;
        }
        if let Some(mut state) = inner {
            state.removed = true;
        }
        if let Some(other) = &other {
            self.name_gone(to.parent, locked.target(), to.name, other, in_upper, orphan)?;
        }
        let source = locked.source();
        let key = source.children.remove_entry(from.name).map(|(key, _)| key);
        let name: Arc<OsStr> = to.name.into();
        moved(node, from, key, to, Arc::clone(&name));
        let moves = i64::from(node.directory.is_some());
        let goes = other
            .as_ref()
            .is_some_and(|other| other.directory.is_some());
        source.changed(from.name);
        source.subdirectories.add(-moves);
        let target = locked.target();
        target.subdirectories.add(moves - i64::from(goes));
        target.changed(to.name);
        target.children.insert(name, node.id);
        Ok(())
    }

    /// Moves to a name that is free in the upper, or a file over a file or whiteout.
    fn rename_away(&self, from: &End<'_>, to: &End<'_>) -> Result<()> {
        if !from.covered {
            return Ok(fs::renameat2(from.dir, from.name, to.dir, to.name, 0)?);
        }
        match fs::renameat2(from.dir, from.name, to.dir, to.name, libc::RENAME_WHITEOUT) {
            Err(Errno::EINVAL | Errno::ENOSYS | Errno::EPERM) => {}
            result => return Ok(result?),
        }
        // What may need space is done before anything has moved.
        let whiteout = self.spare_whiteout(from.parent, from.dir)?;
        fs::renameat2(from.dir, from.name, to.dir, to.name, 0)?;
        let installed = whiteout.install(from.dir, from.name, 0);
        Ok(installed.map_err(|(_, errno)| errno)?)
    }

    /// Moves a directory over what the host would not let a directory replace: a whiteout, or a directory
    /// that holds whiteouts. Answers what keeps that directory reachable.
    fn rename_over(&self, from: &End<'_>, to: &End<'_>) -> Result<Option<Orphan>> {
        let upper = self.upper()?;
        let is_directory = |dir, name| -> Result<bool> {
            Ok(fs::fstatat(dir, name)?.st_mode & libc::S_IFMT == libc::S_IFDIR)
        };
        if from.covered && self.has_xattr_whiteouts(to.parent, to.dir)? {
            // One may come along.
            self.allow_xattr_whiteouts(from.parent, from.dir)?;
        }
        match fs::renameat2(from.dir, from.name, to.dir, to.name, libc::RENAME_EXCHANGE) {
            Ok(()) => {}
            Err(Errno::EINVAL | Errno::ENOSYS) => {
                let replaced = is_directory(to.dir, to.name)?;
                let away = Temp::new(upper);
                fs::renameat2(to.dir, to.name, upper.work(), &away.name, 0)?;
                self.rename_away(from, to)?;
                return Ok(replaced.then(|| Orphan::Work(away.keep().as_os_str().into())));
            }
            Err(errno) => return Err(errno.into()),
        }
        match (is_directory(from.dir, from.name)?, from.covered) {
            (true, covered) => {
                self.remove_directory(from.parent, from.dir, from.name, true, covered)
            }
            // The whiteout has come to where one is needed.
            (false, true) => Ok(None),
            (false, false) => {
                fs::unlinkat(from.dir, from.name)?;
                Ok(None)
            }
        }
    }
}

/// Whether `above` is an ancestor of `node`. Holds only as long as no directory moves between others.
fn is_above(above: &Arc<Node>, node: &Arc<Node>) -> bool {
    let mut at = node.name();
    while let Some(name) = at {
        if Arc::ptr_eq(&name.parent, above) {
            return true;
        }
        at = name.parent.name();
    }
    false
}

/// `key` is what the directory had the name under that goes, `name` the one that comes.
fn moved(node: &Node, from: &End<'_>, key: Option<Arc<OsStr>>, to: &End<'_>, name: Arc<OsStr>) {
    if let Some(directory) = &node.directory {
        // It has moved the directory's own change time.
        directory.state.write().quiet_ctime = QuietCtime::default();
        if !Arc::ptr_eq(from.parent, to.parent) {
            directory.moved.store(true, Ordering::Release);
        }
    }
    let mut place = node.place.write();
    place.drop_name(from.parent, from.name, key);
    place.names.push(Name {
        parent: Arc::clone(to.parent),
        name,
    });
}
