//! Open files and their content.

use super::*;

impl Model {
    pub(super) fn handle(&self, slot: usize) -> Result<&Handle> {
        self.handles[slot].as_ref().ok_or(SKIP)
    }

    pub(super) fn close(&mut self, slot: usize) {
        if let Some(handle) = self.handles[slot].take() {
            self.collect(handle.ino);
        }
    }

    pub(super) fn readable(&self, slot: usize) -> Result<Ino> {
        let handle = self.handle(slot)?;
        match handle.flags.access {
            Access::Write => Err(libc::EBADF),
            _ => Ok(handle.ino),
        }
    }

    pub(super) fn writable(&self, slot: usize, errno: i32) -> Result<Ino> {
        let handle = self.handle(slot)?;
        match handle.flags.access {
            Access::Read => Err(errno),
            _ => Ok(handle.ino),
        }
    }

    pub(super) fn open(&mut self, path: &[String], flags: OpenFlags, mode: u32) -> Result<Ino> {
        let follow = !(flags.no_follow || flags.create && flags.exclusive);
        let place = self.resolve(path, follow)?;
        let Some(ino) = place.ino else {
            if !flags.create {
                return Err(libc::ENOENT);
            }
            let name = place.name.ok_or(libc::EISDIR)?;
            let inode = self.fresh(place.parent, Kind::File, mode);
            return Ok(self.create(place.parent, &name, inode));
        };
        if flags.create && flags.exclusive {
            return Err(libc::EEXIST);
        }
        match self.kind(ino) {
            Kind::Symlink => Err(libc::ELOOP),
            Kind::Dir if flags.create || flags.access != Access::Read => Err(libc::EISDIR),
            Kind::Dir => Ok(ino),
            Kind::File => {
                if flags.truncate {
                    self.inode_mut(ino).data.clear();
                    self.touch(ino);
                }
                Ok(ino)
            }
            Kind::Fifo | Kind::CharDev | Kind::BlockDev | Kind::Socket => Err(SKIP),
        }
    }

    pub(super) fn read(&self, slot: usize, offset: u64, len: usize) -> Result<Vec<u8>> {
        let ino = self.readable(slot)?;
        if self.kind(ino) == Kind::Dir {
            return Err(libc::EISDIR);
        }
        let data = &self.inode(ino).data;
        let from = at(offset).min(data.len());
        Ok(data[from..(from + len).min(data.len())].to_vec())
    }

    pub(super) fn write(&mut self, slot: usize, offset: u64, fill: Fill) -> Result<u64> {
        let ino = self.writable(slot, libc::EBADF)?;
        let offset = match self.handle(slot)?.flags.append {
            true => self.inode(ino).data.len(),
            false => at(offset),
        };
        if fill.len > 0 {
            self.put(ino, offset, &fill.bytes());
        }
        Ok(fill.len as u64)
    }

    pub(super) fn put(&mut self, ino: Ino, offset: usize, bytes: &[u8]) {
        let data = &mut self.inode_mut(ino).data;
        if data.len() < offset + bytes.len() {
            data.resize(offset + bytes.len(), 0);
        }
        data[offset..offset + bytes.len()].copy_from_slice(bytes);
        self.touch(ino);
    }

    pub(super) fn set_len(&mut self, slot: usize, len: u64) -> Result<Outcome> {
        let ino = self.writable(slot, libc::EINVAL)?;
        self.inode_mut(ino).data.resize(at(len), 0);
        self.touch(ino);
        Ok(Outcome::Done)
    }

    pub(super) fn punch(&mut self, slot: usize, offset: u64, len: u64) -> Result<Outcome> {
        let ino = self.writable(slot, libc::EBADF)?;
        let data = &mut self.inode_mut(ino).data;
        let end = at(offset + len).min(data.len());
        let past_end = at(offset) >= data.len();
        if let Some(hole) = data.get_mut(at(offset)..end) {
            hole.fill(0);
        }
        // Whether a hole where there is nothing changes the time is the host's own affair.
        self.inode_mut(ino).mtime = if past_end { Time::Any } else { Time::Recent };
        Ok(Outcome::Done)
    }

    pub(super) fn copy_range(
        &mut self,
        from: usize,
        from_offset: u64,
        to: usize,
        to_offset: u64,
        len: u64,
    ) -> Result<Outcome> {
        let (input, output) = (self.handle(from)?.ino, self.handle(to)?.ino);
        if self.kind(input) == Kind::Dir || self.kind(output) == Kind::Dir {
            return Err(libc::EISDIR);
        }
        self.readable(from)?;
        self.writable(to, libc::EBADF)?;
        if self.handle(to)?.flags.append {
            return Err(libc::EBADF);
        }
        let size = self.inode(input).data.len() as u64;
        let len = len.min(size.saturating_sub(from_offset));
        if input == output {
            return Err(SKIP); // grows while it is read: the result depends on the size of one transfer
        }
        let bytes = self
            .inode(input)
            .data
            .get(at(from_offset)..at(from_offset + len));
        let bytes = bytes.unwrap_or_default().to_vec();
        if bytes.is_empty() {
            // Nothing is copied; whether the time changes is the host's own affair.
            self.inode_mut(output).mtime = Time::Any;
        } else {
            self.put(output, at(to_offset), &bytes);
        }
        Ok(Outcome::Count(len))
    }
}
