//! Names of what is there already.

use super::*;

impl Model {
    pub(super) fn link(&mut self, from: &[String], to: &[String]) -> Result<Outcome> {
        let ino = self.existing(from, false)?;
        let (parent, name) = self.vacant(to)?;
        if self.kind(ino) == Kind::Dir {
            return Err(libc::EPERM);
        }
        self.insert_link(parent, &name, ino);
        self.touch(parent);
        Ok(Outcome::Done)
    }

    pub(super) fn unlink(&mut self, path: &[String]) -> Result<Outcome> {
        let (parent, name, ino) = self.named(path)?;
        if self.kind(ino) == Kind::Dir {
            return Err(libc::EISDIR);
        }
        self.inode_mut(parent).entries.remove(&name);
        self.touch(parent);
        self.drop_link(ino);
        Ok(Outcome::Done)
    }

    pub(super) fn rmdir(&mut self, path: &[String]) -> Result<Outcome> {
        let (parent, name, ino) = self.named(path)?;
        if self.kind(ino) != Kind::Dir {
            return Err(libc::ENOTDIR);
        }
        if !self.inode(ino).entries.is_empty() {
            return Err(libc::ENOTEMPTY);
        }
        self.inode_mut(parent).entries.remove(&name);
        self.touch(parent);
        self.drop_link(ino);
        Ok(Outcome::Done)
    }

    pub(super) fn rename(&mut self, from: &[String], to: &[String], how: How) -> Result<Outcome> {
        let source = self.resolve(from, false)?;
        let target = self.resolve(to, false)?;
        let (Some(old_name), Some(new_name)) = (source.name, target.name) else {
            return Err(libc::EBUSY);
        };
        let old = source.ino.ok_or(libc::ENOENT)?;
        let (old_parent, new_parent) = (source.parent, target.parent);
        match (how, target.ino) {
            (How::NoReplace, Some(_)) => return Err(libc::EEXIST),
            (How::Exchange, None) => return Err(libc::ENOENT),
            _ => {}
        }
        if self.kind(old) == Kind::Dir && self.is_below(new_parent, old) {
            return Err(libc::EINVAL);
        }
        if let Some(new) = target
            .ino
            .filter(|new| self.kind(*new) == Kind::Dir && self.is_below(old_parent, *new))
        {
            debug_assert!(self.kind(new) == Kind::Dir);
            return Err(if how == How::Exchange {
                libc::EINVAL
            } else {
                libc::ENOTEMPTY
            });
        }
        if target.ino == Some(old) {
            return Ok(Outcome::Done); // two names of one file, or the same name: nothing happens
        }
        if let (Some(new), true) = (target.ino, how != How::Exchange) {
            match (self.kind(old) == Kind::Dir, self.kind(new) == Kind::Dir) {
                (true, false) => return Err(libc::ENOTDIR),
                (false, true) => return Err(libc::EISDIR),
                _ if !self.inode(new).entries.is_empty() => return Err(libc::ENOTEMPTY),
                _ => {}
            }
        }
        self.inode_mut(old_parent).entries.remove(&old_name);
        self.inode_mut(new_parent).entries.insert(new_name, old);
        self.inode_mut(old).parent = new_parent;
        self.touch(old_parent);
        self.touch(new_parent);
        match target.ino {
            Some(new) if how == How::Exchange => {
                self.inode_mut(old_parent).entries.insert(old_name, new);
                self.inode_mut(new).parent = old_parent;
            }
            Some(new) => self.drop_link(new),
            None => {}
        }
        Ok(Outcome::Done)
    }
}
