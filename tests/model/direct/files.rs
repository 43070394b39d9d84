//! Open files and their content.

use super::*;

impl Direct {
    pub(super) fn slot(&self, slot: usize) -> &Opened {
        self.slots[slot]
            .as_ref()
            .expect("the model has seen to it that the slot is open")
    }

    pub(super) fn close(&mut self, slot: usize) {
        if let Some(opened) = self.slots[slot].take() {
            if let Some(handle) = opened.handle {
                self.union().release(opened.node, handle);
            }
            self.union().forget(opened.node, 1);
        }
    }

    pub(super) fn open(
        &mut self,
        slot: usize,
        path: &[String],
        flags: OpenFlags,
        mode: u32,
    ) -> Result<Outcome> {
        let follow = !(flags.no_follow || flags.create && flags.exclusive);
        let place = self.resolve(path, follow)?;
        let (node, handle) = match place.found {
            None if !flags.create => return Err(Errno(libc::ENOENT)),
            None => {
                let name = place.name.as_ref().ok_or(Errno(libc::EISDIR))?;
                let name = OsStr::new(name);
                let (entry, handle) =
                    self.union()
                        .create(place.parent, name, mode, flags.bits(), &CALLER)?;
                (self.take(&entry).0, Some(handle))
            }
            Some(_) if flags.create && flags.exclusive => return Err(Errno(libc::EEXIST)),
            Some((node, attr)) => match attr.kind {
                FileKind::Symlink => return Err(Errno(libc::ELOOP)),
                FileKind::Directory if flags.create || flags.access != Access::Read => {
                    return Err(Errno(libc::EISDIR));
                }
                FileKind::Directory => (node, None),
                _ => {
                    let bits = flags.bits() & !(libc::O_CREAT | libc::O_EXCL);
                    (node, Some(self.union().open_file(node, bits, &CALLER)?))
                }
            },
        };
        // An open file keeps its node: one of the lookups stays.
        if let Some(at) = self.looked_up.iter().position(|held| *held == node) {
            self.looked_up.remove(at);
        } else {
            assert_eq!(node, NodeId::ROOT, "every other node was looked up");
        }
        self.slots[slot] = Some(Opened {
            node,
            handle,
            flags,
        });
        Ok(Outcome::Done)
    }

    pub(super) fn readable(&self, slot: usize) -> Result<&Opened> {
        match self.slot(slot) {
            opened if opened.flags.access == Access::Write => Err(Errno(libc::EBADF)),
            opened => Ok(opened),
        }
    }

    pub(super) fn writable(&self, slot: usize, errno: i32) -> Result<&Opened> {
        match self.slot(slot) {
            opened if opened.flags.access == Access::Read => Err(Errno(errno)),
            opened => Ok(opened),
        }
    }

    pub(super) fn read(
        &self,
        node: NodeId,
        handle: Option<&FileHandle>,
        offset: u64,
        len: usize,
    ) -> Result<Vec<u8>> {
        let mut buf = vec![0; len];
        let got = self.union().read(node, handle, offset, &mut buf)?;
        buf.truncate(got);
        Ok(buf)
    }

    pub(super) fn copy_range(
        &self,
        from: usize,
        from_offset: u64,
        to: usize,
        to_offset: u64,
        len: u64,
    ) -> Result<Outcome> {
        if self.slot(from).handle.is_none() || self.slot(to).handle.is_none() {
            return Err(Errno(libc::EISDIR));
        }
        let (input, output) = (self.readable(from)?, self.writable(to, libc::EBADF)?);
        if output.flags.append {
            return Err(Errno(libc::EBADF));
        }
        let mut done = 0;
        while done < len {
            let some = self.union().copy_file_range(
                input.node,
                input.handle.as_deref(),
                from_offset + done,
                output.node,
                output.handle.as_deref(),
                to_offset + done,
                len - done,
                &CALLER,
            )?;
            if some == 0 {
                break;
            }
            done += some as u64;
        }
        Ok(Outcome::Count(done))
    }
}
