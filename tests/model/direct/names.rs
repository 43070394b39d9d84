//! New objects, and names of what is there already.

use super::*;

impl Direct {
    pub(super) fn make(&mut self, op: &Op) -> Result<Entry> {
        if let Op::Link { from, to } = op {
            let (node, attr) = self.resolve(from, false)?.existing()?;
            let place = self.resolve(to, false)?;
            let (parent, name) = place.vacant()?;
            if attr.kind == FileKind::Directory {
                return Err(Errno(libc::EPERM));
            }
            return Ok(self.union().link(node, parent, name)?);
        }
        let (Op::Mkdir { path, .. } | Op::Mknod { path, .. } | Op::Symlink { path, .. }) = op
        else {
            unreachable!("only these are made");
        };
        let place = self.resolve(path, false)?;
        let (parent, name) = place.vacant()?;
        Ok(match op {
            Op::Mkdir { mode, .. } => self.union().mkdir(parent, name, *mode & 0o1777, &CALLER)?,
            Op::Symlink { target, .. } => {
                self.union()
                    .symlink(parent, name, OsStr::new(target), &CALLER)?
            }
            Op::Mknod {
                kind, mode, rdev, ..
            } => {
                let format = match kind {
                    Kind::CharDev => libc::S_IFCHR,
                    Kind::BlockDev => libc::S_IFBLK,
                    Kind::Socket => libc::S_IFSOCK,
                    _ => libc::S_IFIFO,
                };
                self.union()
                    .mknod(parent, name, format | mode, *rdev, &CALLER)?
            }
            _ => unreachable!("only these are made"),
        })
    }

    /// The kernel's checks in the kernel's order, and then the union's.
    pub(super) fn rename(&mut self, from: &Path, to: &Path, how: How) -> Result<Outcome> {
        // The kernel lets one rename between directories into a file system at a time.
        let _alone = RENAMES.lock().unwrap_or_else(PoisonError::into_inner);
        let source = self.resolve(from, false)?;
        // What lies on the way to the target, to see whether it would move into itself.
        let mut way = vec![NodeId::ROOT];
        let target = self.walk(&mut way, to, false, &mut MAX_SYMLINKS.clone())?;
        let mut source_way = vec![NodeId::ROOT];
        self.walk(&mut source_way, from, false, &mut MAX_SYMLINKS.clone())?;
        let (source_name, target_name) = (source.name()?, target.name()?);
        let (old, old_attr) = source.existing()?;
        let mode = match (how, target.found) {
            (How::NoReplace, Some(_)) => return Err(Errno(libc::EEXIST)),
            (How::Exchange, None) => return Err(Errno(libc::ENOENT)),
            (How::Replace, _) => RenameMode::Replace,
            (How::NoReplace, None) => RenameMode::NoReplace,
            (How::Exchange, Some(_)) => RenameMode::Exchange,
        };
        let is_dir = |attr: &Attr| attr.kind == FileKind::Directory;
        let target_dir = target
            .found
            .filter(|(_, attr)| is_dir(attr))
            .map(|(node, _)| node);
        way.retain(|node| Some(*node) != target_dir);
        source_way.retain(|node| *node != old);
        if is_dir(&old_attr) && way.contains(&old) {
            return Err(Errno(libc::EINVAL));
        }
        if target_dir.is_some_and(|node| source_way.contains(&node)) {
            return Err(Errno(if how == How::Exchange {
                libc::EINVAL
            } else {
                libc::ENOTEMPTY
            }));
        }
        if let Some((new, new_attr)) = target.found {
            if new == old {
                return Ok(Outcome::Done);
            }
            match (is_dir(&old_attr), is_dir(&new_attr)) {
                _ if how == How::Exchange => {}
                (true, false) => return Err(Errno(libc::ENOTDIR)),
                (false, true) => return Err(Errno(libc::EISDIR)),
                _ => {}
            }
        }
        self.union()
            .rename(source.parent, source_name, target.parent, target_name, mode)?;
        Ok(Outcome::Done)
    }
}
