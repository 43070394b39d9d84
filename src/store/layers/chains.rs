//! Chains of layers: what they make together, and which of them are of use.
//!
//! An image comes layer by layer, and each has to be compared with all below it: once when it is taken in, and again for the view
//! of the chain. So the tree of the chain that was merged last stays in memory for a while, and the next layer on it costs
//! what its own entries cost, however many there are below.

use std::collections::HashSet;
use std::fmt;
use std::path::Path;
use std::sync::Arc;
use std::time::{Duration, Instant};

use parking_lot::Mutex;

use super::Layers;
use crate::store::error::Result;
use crate::store::format::{LayerName, Time, ViewKey};
use crate::store::layer::index::Attributes;
use crate::store::view::{self, MISSING_DIRECTORY, Merged, Verify, View};

/// How long a tree waits for the next layer.
const PATIENCE: Duration = Duration::from_secs(30);
/// Bytes of the largest tree that waits, which are a quarter of a million objects of usual names.
const LARGEST: usize = 64 << 20;

/// Who knows which chains may be mounted soon.
pub trait Chains: fmt::Debug + Send + Sync {
    /// The views that are worth their place on the disk; `None` if that cannot be told.
    fn useful(&self) -> Option<HashSet<ViewKey>>;
}

/// The tree that was merged last.
#[derive(Default)]
pub(super) struct Merging {
    waiting: Mutex<Option<(Merged, Instant)>>,
    /// Entries that were merged since the store was opened.
    #[cfg(test)]
    entries: std::sync::atomic::AtomicU64,
}

impl fmt::Debug for Merging {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Merging").finish_non_exhaustive()
    }
}

impl Merging {
    /// Keeps a tree for the next layer on it, unless it is too large to keep.
    pub(super) fn keep(&self, merged: Merged) {
        if merged.bytes() <= LARGEST {
            let before = self.waiting.lock().replace((merged, Instant::now()));
            // Not with the lock: there may be many objects.
            drop(before);
        }
    }

    /// The tree that waits, if it is that of the lowest layers of `chain`.
    fn take(&self, chain: &[LayerName]) -> Option<Merged> {
        let fits = |(merged, _): &mut (Merged, Instant)| chain.starts_with(merged.layers());
        Some(self.waiting.lock().take_if(fits)?.0)
    }
}

impl Layers {
    /// Fails if the topmost layer of a chain, the lowest first, has an entry that cannot be what it says on those below it:
    /// what depends on them is not known when it is taken in. The log says what of it no mount will show.
    pub fn check(&self, chain: &[LayerName]) -> Result<()> {
        let merged = self.merge(chain)?;
        merged.tell_left_out();
        self.merging.keep(merged);
        Ok(())
    }

    /// What the layers of a chain, the lowest first, make together.
    pub(in crate::store) fn merge(&self, chain: &[LayerName]) -> Result<Merged> {
        let mut merged = self.merging.take(chain).unwrap_or_else(Merged::new);
        let (there, missing) = chain.split_at(merged.layers().len());
        for name in there {
            self.need(*name)?;
        }
        for name in missing {
            let index = self.index(*name)?;
            #[cfg(test)]
            self.merging.count(index.len());
            merged.add(&index)?;
        }
        Ok(merged)
    }

    /// The merged view of a chain of layers, the lowest first, for who looks at it once: where there is none that can be used, one is
    /// built that has no name and goes when it is closed.
    pub fn passing_view(&self, chain: &[LayerName]) -> Result<View> {
        let key = ViewKey::of(chain);
        let open = |path: &Path| View::open(path, key, Arc::clone(&self.objects), Verify::Never);
        match open(&self.views().join(format!("{key}.view"))) {
            Err(error) if error.is_not_found() || error.is_damage() => {}
            opened => return opened,
        }
        let merged = self.merge(chain)?;
        let built = view::build(&merged, &self.objects)?;
        self.merging.keep(merged);
        let temporary = self.write_temporary("view", |file| built.write(file))?;
        open(temporary.path())
    }

    /// The attributes of the root of a chain, the lowest layer first, as its view has them.
    pub fn root(&self, chain: &[LayerName]) -> Result<Attributes> {
        // Of what comes in a stream, nothing speaks of the root's attributes.
        let is_stream = |name: &LayerName| {
            let known = self.known.lock();
            known
                .get(name)
                .is_some_and(|record| record.diff_id.is_some())
        };
        for name in chain.iter().rev().filter(|name| !is_stream(name)) {
            if let Some(root) = self.index(*name)?.root()? {
                return Ok(root);
            }
        }
        Ok(Attributes {
            mode: libc::S_IFDIR as u16 | MISSING_DIRECTORY,
            uid: 0,
            gid: 0,
            mtime: Time::default(),
            atime: Time::default(),
            xattrs: Vec::new(),
        })
    }

    /// Gives up the memory of a tree that no layer has come for.
    pub(in crate::store) fn rest(&self) {
        let late = |(_, since): &mut (Merged, Instant)| since.elapsed() >= PATIENCE;
        // Not with the lock: there may be many objects.
        let late = self.merging.waiting.lock().take_if(late);
        drop(late);
    }

    /// Says who knows which views are of use. Until then no collection takes one for useless.
    pub fn set_chains(&self, chains: Arc<dyn Chains>) {
        // There is one who knows.
        let _ = self.chains.set(chains);
    }
}

#[cfg(test)]
impl Merging {
    fn count(&self, entries: u32) {
        use std::sync::atomic::Ordering;
        self.entries.fetch_add(entries.into(), Ordering::Relaxed);
    }
}

#[cfg(test)]
impl Layers {
    /// Entries of layers that were merged since the store was opened, each as often as it was.
    pub(crate) fn merged_entries(&self) -> u64 {
        self.merging
            .entries
            .load(std::sync::atomic::Ordering::Relaxed)
    }

    /// Whether a tree waits for the next layer.
    pub(in crate::store) fn has_merged(&self) -> bool {
        self.merging.waiting.lock().is_some()
    }

    /// As if the tree that waits had done so for as long as one does.
    pub(in crate::store) fn forget_time_of_merge(&self) {
        if let Some((_, since)) = &mut *self.merging.waiting.lock() {
            *since = since.checked_sub(PATIENCE).unwrap();
        }
    }
}
