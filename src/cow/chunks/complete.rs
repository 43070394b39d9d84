//! How a file begins to be copied up in chunks, and how it is completed.

use std::collections::VecDeque;
use std::os::fd::{AsFd, OwnedFd};
use std::sync::Arc;
use std::sync::atomic::Ordering;

use nix::errno::Errno;

use super::super::attr::attr_of;
use super::super::copyup::Content;
use super::super::error::{Context, Result};
use super::super::file::Backing;
use super::super::lower::LowerObject;
use super::super::node::Node;
use super::super::types::FileKind;
use super::super::union::Union;
use super::super::upper::Upper;
use super::{Chunks, MARK, Marked, Partial, is_partial, name_of};
use crate::sys::fs::{self, Object};

/// So many steps are on their way to the disk at a time: others who need it wait for these at most, and the last sync
/// has little left to do.
const STEPS_UNDER_WAY: usize = 8;

impl Union {
    /// Whether what is needed of a node's lower file, which has this length, is copied up in chunks.
    pub(in super::super) fn is_for_chunks(&self, node: &Node, content: Content, size: u64) -> bool {
        let needed = match content {
            Content::Metadata | Content::All => return false,
            Content::Writable => size,
            Content::UpTo(limit) => size.min(limit),
        };
        node.kind == FileKind::Regular && needed > self.chunking.whole_up_to
    }

    /// Refuses, with ENOSPC, to begin with a file whose data could never all come up: whoever opens it is to learn
    /// that from open(2), as with a whole copy, and not the one who later unmounts or commits.
    pub(in super::super) fn check_room_for(
        &self,
        data: &dyn LowerObject,
        content: Content,
    ) -> Result<()> {
        let upper = self.upper()?;
        let attr = data.attr()?;
        let wanted = match content {
            Content::UpTo(limit) => attr.size.min(limit),
            _ => attr.size,
        };
        let wanted = wanted.min(attr.blocks.saturating_mul(512));
        if self.has_room_for(wanted)?
            || (upper.clones.load(Ordering::Relaxed) && self.can_clone(upper, data)?)
        {
            return Ok(());
        }
        Err(Errno::ENOSPC).context("copying up a file that does not fit into the upper")
    }

    /// What a node that is being made for an incomplete file knows of it.
    pub(in super::super) fn chunks_of(&self, object: Object<'_>, ino: u64) -> Arc<Chunks> {
        Chunks::new(name_of(object, ino))
    }

    /// Lets a `metacopy` be written in chunks, or shares all of the data with the lower file where the host can. The
    /// caller holds the node's `copy_up`.
    pub(in super::super) fn begin_chunks(
        &self,
        node: &Arc<Node>,
        data: &dyn LowerObject,
    ) -> Result<()> {
        let upper = self.upper()?;
        let fd = self.with_upper(node, |object| self.open_upper(object, libc::O_RDWR))?;
        let attr = attr_of(&fs::fstat(fd.as_fd())?);
        let size = attr.size.min(data.attr()?.size);
        if upper.clones.load(Ordering::Relaxed) && self.can_clone(upper, data)? {
            return self.complete_metacopy(node, data, Content::All);
        }
        let object = Object::Open(fd.as_fd());
        let name = name_of(object, attr.ino);
        // The map before the mark: a mark without a map is taken for damage.
        let map = upper.maps.begin(self.chunking.shift(size), size);
        let (_, map) = upper.maps.create(&name, map)?;
        if let Err(errno) = self.set_mark(object, self.family.metacopy(), &[MARK]) {
            upper.maps.remove(&name)?;
            return Err(errno).context("marking a file that is copied up in chunks");
        }
        // After the mark: a sync of all that has begun before does not take it for durable.
        map.is_scrubbed.store(true, Ordering::Release);
        let chunks = Chunks::new(name);
        // It is new, so nobody has set it.
        let _ = chunks.map.set(map);
        node.place.write().rare.chunks = Some(chunks);
        node.io.clear();
        upper.maps.note(node.id);
        Ok(())
    }

    /// Tries on a file without a name whether content can be shared with a lower file.
    fn can_clone(&self, upper: &Upper, data: &dyn LowerObject) -> Result<bool> {
        let from = data.open()?;
        let Some(host) = from.host_fd() else {
            return Ok(false);
        };
        let temp = super::super::upper::Temp::new(upper);
        let flags = libc::O_CREAT | libc::O_EXCL | libc::O_RDWR;
        let to = fs::openat(upper.work(), &temp.name, flags, 0o600)?;
        match fs::clone_content(host, to.as_fd()) {
            Ok(()) => Ok(true),
            Err(Errno::EOPNOTSUPP | Errno::ENOTTY) => {
                upper.clones.store(false, Ordering::Relaxed);
                Ok(false)
            }
            Err(_) => Ok(false),
        }
    }

    /// Opens an incomplete file.
    pub(in super::super) fn open_partial(
        &self,
        node: &Arc<Node>,
        chunks: &Chunks,
        fd: OwnedFd,
    ) -> Result<Partial> {
        let upper = self.upper()?;
        let lower = node.place.read().lowers.last().cloned();
        let lower = lower.ok_or(Errno::ESTALE)?.object;
        let (map_fd, map) = upper.maps.find(&chunks.name, || {
            let size = attr_of(&fs::fstat(fd.as_fd())?).size;
            let size = size.min(lower.attr()?.size);
            Ok(upper.maps.begin(self.chunking.shift(size), size))
        })?;
        // Kept for as long as the node is.
        let _ = chunks.map.set(Arc::clone(&map));
        let marked = match self.mark(Object::Open(fd.as_fd()), self.family.metacopy())? {
            Some(value) => Marked::of(&value)?,
            None => Marked::Metacopy,
        };
        let partial = Partial {
            upper: fd,
            lower: lower.open()?,
            map_fd,
            map,
            mark: self.family.metacopy(),
            volatile: self.volatile,
        };
        partial.scrub(&marked, |body| {
            self.quietly(node, partial.upper.as_fd(), body)
        })?;
        upper.maps.note(node.id);
        Ok(partial)
    }

    /// Brings up all chunks of a file that are still the lower's, in small steps, and makes it a plain file. The
    /// caller holds the node's `copy_up`; writers wait for one step at most.
    pub(in super::super) fn complete_chunks(&self, node: &Arc<Node>) -> Result<()> {
        let upper = self.upper()?;
        let Some(chunks) = node.place.read().rare.chunks.clone() else {
            return Ok(());
        };
        let backing = self.io(node, true)?;
        let Backing::Partial(partial) = &*backing else {
            return Ok(());
        };
        let map = &partial.map;
        let fd = partial.upper.as_fd();
        let mut at = 0;
        let mut under_way = VecDeque::with_capacity(STEPS_UNDER_WAY + 1);
        loop {
            let turn = map.turn.write();
            let Some((start, end)) = partial.next_step(at)? else {
                break;
            };
            let brought = self.quietly(node, fd, || partial.bring_up(start, end));
            // Where it has to sync, nobody's attributes wait for that.
            partial.caught_up(brought)?;
            drop(turn);
            at = end;
            if !self.volatile {
                // Not a sync: each would have the host's journal written, which others wait for, too.
                fs::write_out(fd, start, end, false)?;
                under_way.push_back((start, end));
                if under_way.len() > STEPS_UNDER_WAY
                    && let Some((start, end)) = under_way.pop_front()
                {
                    fs::write_out(fd, start, end, true)?;
                }
            }
            if upper.gives_way.load(Ordering::Relaxed) && upper.is_wanted() {
                return Err(Errno::EINTR).context("somebody else waits for the work directory");
            }
        }
        if !self.volatile {
            fs::fsync(fd, false)?;
        }
        let _turn = map.turn.write();
        let ino = fs::fstat(fd)?.st_ino;
        self.quietly(node, fd, || self.unmark_metacopy(Object::Open(fd)))?;
        map.retire();
        {
            let mut place = node.place.write();
            Self::arrived(node, &mut place, ino, false);
        }
        upper.maps.remove(&chunks.name)
    }

    /// Completes files of which a good part has come up already: those that are worth being plain ones. For a thread of
    /// its own; answers how many files were completed.
    pub fn complete_hot(&self) -> Result<usize> {
        self.complete_noted(|done, all| 2 * done >= all)
    }

    /// Completes all files that are copied up in part, so that the upper is one that kernel overlayfs mounts. Stops with
    /// EINTR when another union waits for the work directory.
    pub fn complete_partial(&self) -> Result<()> {
        let Some(upper) = self.upper_of() else {
            return Ok(());
        };
        if upper.maps.is_empty() {
            return Ok(());
        }
        upper.gives_way.store(true, Ordering::Relaxed);
        self.complete_noted(|_, _| true)?;
        if upper.maps.is_empty() {
            return Ok(());
        }
        if self.index_has(is_partial)? {
            // Of which the upper has no name, so that a walk would not find it.
            self.settle_links()?;
        }
        // What an earlier mount has left and this one has not looked at.
        self.complete_marked(is_partial)?;
        for name in upper.maps.names()? {
            // Of a file that is gone.
            upper.maps.remove(&name)?;
        }
        Ok(())
    }

    fn complete_noted(&self, wanted: impl Fn(u64, u64) -> bool) -> Result<usize> {
        let Some(upper) = self.upper_of() else {
            return Ok(0);
        };
        let mut completed = 0;
        let mut failed = None;
        for id in upper.maps.take_noted() {
            let Some(node) = self.table.get(id) else {
                continue;
            };
            let chunks = node.place.read().rare.chunks.clone();
            let map = chunks.as_ref().and_then(|chunks| chunks.map.get());
            if let Some(map) = map {
                let (done, all) = map.progress();
                // A removed file needs no more of its data than its users ask for.
                if node.name().is_some() && wanted(done, all) {
                    match self.copy_up(&node, Content::All) {
                        Ok(()) => completed += 1,
                        Err(error) => {
                            upper.maps.note(id);
                            failed.get_or_insert(error);
                        }
                    }
                } else {
                    upper.maps.note(id);
                }
            }
            self.let_go(node);
        }
        failed.map_or(Ok(completed), Err)
    }

    /// A file is about to be forgotten of which the last name is gone: its map goes too.
    pub(in super::super) fn drop_chunks(&self, chunks: &Chunks) {
        if let Some(upper) = self.upper_of()
            && let Err(error) = upper.maps.remove(&chunks.name)
        {
            tracing::warn!(%error, "the chunk map of a removed file stays until the mount ends");
        }
    }
}
