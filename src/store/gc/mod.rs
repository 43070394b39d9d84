//! Collection: what no recorded layer needs any more goes.
//!
//! The objects of all recorded layers are alive, also those that only their streams name. Files of others are
//! removed, packs without any alive are removed, and packs that are mostly dead are written anew; see
//! [`Objects`](super::object::Objects) for how an import is kept from losing what it relies on. A merged
//! view goes when a layer of its chain is gone and no plyfs has it mounted, which the lock on its file tells; until then
//! its objects are alive, too. So are those of a view that another has taken the place of while it was mounted, and
//! which has another name since. A view whose chain is there goes as well when nobody has it mounted and whoever knows the
//! chains ([`Chains`](super::layers::chains::Chains)) calls it useless. Where the index of a layer or a view that is mounted cannot be read, or nobody can say whether a
//! view is, nobody knows what is needed, and no object is removed at all.
//!
//! An error does not end a collection; what it could not do it says, and the next one tries again.

use std::collections::HashSet;
use std::fs;
use std::path::{Path, PathBuf};

use super::error::{Error, Result, io_error};
use super::format::{LayerName, ViewKey};
use super::ingest::Observer;
use super::layer::index::LayerIndex;
use super::layers::{ASIDE, Layers};
use super::object::{Live, Swept};
use super::usage::bytes_of;
use super::view;

/// Below so many percent of it alive, a pack is written anew.
const LEAST_ALIVE: u64 = 50;

/// Why something goes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Reason {
    /// No recorded layer names the object.
    NoLayerNamesIt,
    /// No recorded layer names any object of the pack.
    NothingAlive,
    /// Most of the pack is not alive; what is goes into another pack.
    MostlyDead,
    /// A layer of the view's chain is gone, or the view cannot be read.
    ChainIsGone,
    /// Nothing is mounted of the view's chain, nor likely to be.
    NotMounted,
}

impl Reason {
    /// A sentence for people.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::NoLayerNamesIt => "no layer names this object",
            Self::NothingAlive => "no layer names any object of this pack",
            Self::MostlyDead => {
                "layers name less than half of this pack; that is moved to a new pack"
            }
            Self::ChainIsGone => {
                "a layer of this view is gone, or it is damaged; a view is built again when it is needed"
            }
            Self::NotMounted => {
                "no snapshot shows this view, and it is not the top of an image; a view is built again when it is needed"
            }
        }
    }
}

/// Something that goes.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Orphan {
    /// Where it lies.
    pub path: PathBuf,
    /// How many bytes come free on the disk.
    pub bytes: u64,
    /// Why it goes.
    pub reason: Reason,
}

/// What a collection did, or would do.
#[derive(Debug, Default)]
pub struct Collected {
    /// What went.
    pub orphans: Vec<Orphan>,
    /// What could not be done.
    pub errors: Vec<Error>,
}

impl Collected {
    /// Bytes that came free.
    pub fn bytes(&self) -> u64 {
        self.orphans.iter().map(|orphan| orphan.bytes).sum()
    }

    /// The caller has claimed it.
    fn remove_view(&mut self, entry: &fs::DirEntry, dry: bool, reason: Reason) {
        let path = entry.path();
        let bytes = entry.metadata().map_or(0, |metadata| bytes_of(&metadata));
        if !dry {
            let removed = fs::remove_file(&path).map_err(io_error("remove", &path));
            if self.note(removed).is_none() {
                return;
            }
        }
        self.orphans.push(Orphan {
            path,
            bytes,
            reason,
        });
    }

    fn note<T>(&mut self, result: Result<T>) -> Option<T> {
        result.map_err(|error| self.errors.push(error)).ok()
    }
}

/// What views that are mounted keep.
#[derive(Default)]
struct Kept {
    mounted: Live,
    /// Why it is not known what else they do.
    unknown: Vec<Error>,
}

impl Layers {
    /// Collects; with `dry`, only says what would go. Imports and mounts go on meanwhile. Ends early when `observer`
    /// wants that.
    pub fn collect(&self, dry: bool, observer: &dyn Observer) -> Collected {
        let _one_at_a_time = self.collecting.lock();
        let collecting = self.objects().collecting();
        let mut collected = Collected::default();
        // In this order: the layers of a view that is not looked into were there when their objects were.
        let live = self.live(&mut collected);
        let views = self.collect_views(dry, &mut collected);
        self.collect_useless(dry, &mut collected);
        if let Some((mut live, views)) = live.zip(views) {
            live.extend(views.mounted);
            if views.unknown.is_empty() {
                self.collect_objects(&live, dry, observer, &mut collected);
            } else {
                // What these name is of interest only where there is something that no layer names.
                let mut dead = Collected::default();
                self.collect_objects(&live, true, observer, &mut dead);
                if !dead.orphans.is_empty() {
                    let unknown = views.unknown.into_iter();
                    let told = unknown
                        .map(|error| uncollected("a view that is mounted".to_owned(), error));
                    collected.errors.extend(told);
                }
                collected.errors.append(&mut dead.errors);
            }
        }
        drop(collecting);
        if !dry {
            collected.note(self.purge());
        }
        collected
    }

    /// Collects only views that are of no use, which does not look at what lies in the store.
    pub fn collect_useless_views(&self) -> Collected {
        let _one_at_a_time = self.collecting.lock();
        let mut collected = Collected::default();
        self.collect_useless(false, &mut collected);
        collected
    }

    /// Why views cannot be read that somebody has mounted, so that nobody knows what of the store they need.
    pub fn unreadable_mounted(&self) -> Vec<Error> {
        let _no_collection = self.collecting.lock();
        let views = self.collect_views(true, &mut Collected::default());
        views.map(|views| views.unknown).unwrap_or_default()
    }

    /// What a collection would keep; `None` if that cannot be told.
    pub(super) fn needed(&self) -> Option<Live> {
        let mut unused = Collected::default();
        let mut live = self.live(&mut unused)?;
        let views = self.collect_views(true, &mut unused)?;
        live.extend(views.mounted);
        views.unknown.is_empty().then_some(live)
    }

    /// The objects of all layers; `None` if they cannot be told.
    fn live(&self, collected: &mut Collected) -> Option<Live> {
        let mut live = Live::new();
        let mut whole = true;
        for name in self.all() {
            let path = self.index_path(name);
            match LayerIndex::open(&path, name).and_then(|index| add(&index, &mut live)) {
                Ok(()) => {}
                // Removed since the list was made.
                Err(_) if !self.has(name) => {}
                // A removal that was cut short leaves the recipe alone.
                Err(error) if error.is_not_found() && !self.expects(name) => {}
                Err(error) => {
                    let error = uncollected(format!("the layer {name}"), error);
                    collected.errors.push(error);
                    whole = false;
                }
            }
        }
        whole.then_some(live)
    }

    fn collect_objects(
        &self,
        live: &Live,
        dry: bool,
        observer: &dyn Observer,
        collected: &mut Collected,
    ) {
        let objects = self.objects();
        let (tmp, level) = (self.tmp(), self.settings().level);
        for id in collected.note(objects.all_packs()).unwrap_or_default() {
            if observer.cancelled() {
                return;
            }
            let swept = objects.sweep_pack(id, live, LEAST_ALIVE, tmp, level, dry);
            let (bytes, reason) = match collected.note(swept) {
                None | Some(Swept::Kept) => continue,
                Some(Swept::Removed(bytes)) => (bytes, Reason::NothingAlive),
                Some(Swept::Rewritten(bytes, now)) => {
                    (bytes.saturating_sub(now), Reason::MostlyDead)
                }
            };
            collected.orphans.push(Orphan {
                path: objects.pack_path(id),
                bytes,
                reason,
            });
        }
        for dir in collected.note(objects.file_dirs()).unwrap_or_default() {
            if observer.cancelled() {
                return;
            }
            let mut orphans = Vec::new();
            let swept = objects.sweep_files(&dir, live, dry, &mut |path, bytes| {
                let reason = Reason::NoLayerNamesIt;
                orphans.push(Orphan {
                    path,
                    bytes,
                    reason,
                });
            });
            collected.note(swept);
            collected.orphans.append(&mut orphans);
        }
        if !dry {
            collected.note(objects.forget_missing(live));
        }
    }

    /// Takes away views of chains that are there, if nobody has them mounted and they are of no use.
    fn collect_useless(&self, dry: bool, collected: &mut Collected) {
        let Some(chains) = self.chains.get() else {
            return;
        };
        let dir = self.views();
        let listed = fs::read_dir(&dir).and_then(Iterator::collect::<std::io::Result<Vec<_>>>);
        let Some(mut listed) = collected.note(listed.map_err(io_error("list", &dir))) else {
            return;
        };
        let is_useless = |entry: &fs::DirEntry, useful: &HashSet<ViewKey>| {
            let path = entry.path();
            let key = path
                .file_stem()
                .and_then(|stem| stem.to_str()?.parse().ok());
            key.is_some_and(|key| !useful.contains(&key))
        };
        // Nobody who mounts has to wait where nothing goes.
        let Some(useful) = chains.useful() else {
            return;
        };
        // One that cannot be looked at stays for now, and the others that are not needed go with all that no layer needs.
        let is_needed = |path: &Path| self.needs_view(path).unwrap_or(false);
        listed.retain(|entry| is_useless(entry, &useful) && is_needed(&entry.path()));
        if listed.is_empty() {
            return;
        }
        // Whoever is about to mount a chain says so first and looks for its view then: before this, and it is of use, or
        // after this, and builds it.
        let _looking = self.looking.lock();
        let Some(useful) = chains.useful() else {
            return;
        };
        listed.retain(|entry| is_useless(entry, &useful));
        for entry in listed {
            let path = entry.path();
            let _unused = match view::claim(&path) {
                Ok(Some(unused)) => unused,
                Ok(None) => continue,
                Err(error) if error.is_not_found() => continue,
                Err(error) => {
                    collected.errors.push(error);
                    continue;
                }
            };
            collected.remove_view(&entry, dry, Reason::NotMounted);
        }
    }

    /// Answers what has to stay without its layers; `None` if the views cannot be listed.
    fn collect_views(&self, dry: bool, collected: &mut Collected) -> Option<Kept> {
        let mut kept = Kept::default();
        let dir = self.views();
        let listed = fs::read_dir(&dir).and_then(Iterator::collect::<std::io::Result<Vec<_>>>);
        let listed = listed.map_err(io_error("list", &dir));
        for entry in collected.note(listed)? {
            let path = entry.path();
            // Nobody who mounts has to wait where nothing goes.
            if matches!(self.needs_view(&path), Ok(true)) {
                continue;
            }
            let _looking = self.looking.lock();
            // Once more: it may have been built again meanwhile.
            match self.needs_view(&path) {
                Ok(true) => continue,
                Ok(false) => {}
                Err(error) => {
                    kept.unknown.push(error);
                    continue;
                }
            }
            let claimed = view::claim(&path).and_then(|unused| match unused {
                Some(unused) => Ok(Some(unused)),
                None => view::objects_of(&path).map(|objects| {
                    kept.mounted.extend(objects);
                    None
                }),
            });
            // Open until it is removed, so that nobody mounts it meanwhile.
            let _unused = match claimed {
                Ok(Some(unused)) => unused,
                Ok(None) => continue,
                // A repair has removed it.
                Err(error) if error.is_not_found() => continue,
                Err(error) => {
                    kept.unknown.push(error);
                    continue;
                }
            };
            collected.remove_view(&entry, dry, Reason::ChainIsGone);
        }
        Some(kept)
    }

    /// Whether the view at `path` is one that who mounts its chain looks for, and all layers of that are there. Where
    /// it is damaged, it is built again. Fails if nobody could look.
    fn needs_view(&self, path: &Path) -> Result<bool> {
        let known = |name: &LayerName| self.get(*name).is_some();
        if path.extension().is_some_and(|ending| ending == ASIDE) {
            return Ok(false);
        }
        match view::chain_of(path) {
            Ok(chain) => Ok(chain.iter().all(known)),
            Err(error) if error.is_damage() || error.is_not_found() => Ok(false),
            Err(error) => Err(error),
        }
    }
}

fn uncollected(whose: String, error: Error) -> Error {
    Error::Uncollected {
        whose,
        source: Box::new(error),
    }
}

fn add(index: &LayerIndex, live: &mut Live) -> Result<()> {
    for number in 0..index.object_count() {
        live.insert(index.object(number)?.name);
    }
    Ok(())
}

#[cfg(test)]
mod tests;
