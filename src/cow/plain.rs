//! The last step of a mount: an upper that needs nothing of its reader.
//!
//! Kernel overlayfs reads a `metacopy` only when it is told to, and by default it is not. So where the data that such
//! files lack is little, it is brought up when the mount ends: after a `chmod` or two the upper is one that every
//! kernel mounts. Where it is much, the copies stay as they are.

use std::collections::HashSet;
use std::ops::ControlFlow;
use std::os::fd::{AsFd, OwnedFd};
use std::sync::Arc;
use std::sync::atomic::Ordering;

use nix::errno::Errno;

use super::chunks;
use super::copyup::Content;
use super::error::{Context, Result};
use super::forget::Held;
use super::types::NodeId;
use super::union::Union;
use super::upper::Upper;
use crate::sys::fs;
use crate::sys::xattr;

/// So many bytes are little.
const LITTLE: u64 = 64 << 20;
/// What a file counts for at the least: what it costs is not its length alone.
const LEAST: u64 = 4096;
/// Little is also at most one part in so many of the room that the host has left.
const OF_FREE: u64 = 8;
/// Files whose data one sync makes durable.
const BATCH: usize = 256;

impl Union {
    /// Brings up the data of all files that have only attributes in the upper, unless it is more than little. For a
    /// caller who alone uses the union: what changes meanwhile may be missed. Stops when another union waits for the
    /// work directory.
    pub fn complete_little(&self) -> Result<()> {
        let Some(upper) = self.upper_of() else {
            return Ok(());
        };
        if !upper.metacopies.load(Ordering::Acquire) {
            return Ok(());
        }
        let Some(files) = self.files_with_little()? else {
            return Ok(());
        };
        let mut files = files.into_iter();
        loop {
            if upper.is_wanted() {
                return Ok(());
            }
            let batch: Vec<_> = files.by_ref().take(BATCH).collect();
            if batch.is_empty() {
                break;
            }
            self.complete_batch(upper, &batch)?;
        }
        // A file of which no name is in the upper was not among them.
        if !self.index_has(|_| true)? {
            let (root, _) = upper.root.get();
            let root = fs::Object::Open(root.as_fd());
            xattr::remove(root, self.family.metacopies())
                .context("noting that the upper has all its data")?;
            upper.metacopies.store(false, Ordering::Release);
        }
        Ok(())
    }

    /// The files that lack their data; none when that is more than little.
    fn files_with_little(&self) -> Result<Option<Vec<Held<'_>>>> {
        let statfs = self.statfs()?;
        let free = statfs.bavail.saturating_mul(u64::from(statfs.frsize));
        let most = LITTLE.min(free / OF_FREE);
        let mut files = Vec::new();
        let mut seen: HashSet<NodeId> = HashSet::new();
        let mut total = 0u64;
        self.visit_marked(|mark| !chunks::is_partial(mark), &mut |node| {
            if !seen.insert(node.id) {
                // Another name of it.
                return Ok(ControlFlow::Continue(()));
            }
            let size = self.with_upper(node, |object| object.stat())?.st_size;
            total += u64::try_from(size).unwrap_or(0).max(LEAST);
            if total > most {
                return Ok(ControlFlow::Break(()));
            }
            files.push(self.hold(Arc::clone(node)));
            Ok(ControlFlow::Continue(()))
        })?;
        Ok((total <= most).then_some(files))
    }

    fn complete_batch(&self, upper: &Upper, batch: &[Held<'_>]) -> Result<()> {
        let mut fetched: Vec<(&Held<'_>, OwnedFd)> = Vec::with_capacity(batch.len());
        for node in batch {
            let data = node.place.read().lowers.last().cloned();
            let data = data.ok_or(Errno::ESTALE)?.object;
            let (fd, _) = self.fetch_data(node, &*data, Content::All)?;
            fetched.push((node, fd));
        }
        if !self.volatile {
            fs::syncfs(upper.root.get().0.as_fd()).context("making the data of files durable")?;
        }
        for (node, fd) in fetched {
            self.data_is_here(node, fd.as_fd())?;
        }
        Ok(())
    }
}
