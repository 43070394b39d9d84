//! Nodes: what the union knows of the objects that somebody refers to, and the table of them.
//!
//! A node is the identity of an object; where it lies may change. The union path of a node is also its
//! path in the upper, so a node knows its parent and name and no host path.
//!
//! Locks, in the order in which they may be taken:
//! 1. `Node::copy_up` of a node, then that of its parent, and so on to the root;
//! 2. `Union::rename_lock`, by a rename between two directories;
//! 3. `Directory::state`: a parent before its child. Two directories of which neither is above the
//!    other are locked together only under `rename_lock`, in the order of their ids;
//! 4. the turn of one incomplete file (`chunks`), and then `Node::attributes` of one node: content is copied under both.
//!    A `Directory::state` may be taken below `Node::attributes`, and neither of the two below a `Directory::state`;
//! 5. `Node::place` of one node at a time;
//! 6. a shard of the table, the descriptor cache, the maps of incomplete files, and `Upper::modes`.
//!
//! No lock of 3, 5 and 6 is held while file content is copied.

use std::collections::{HashMap, hash_map};
use std::ffi::OsStr;
use std::ops::{Deref, DerefMut};
use std::os::fd::OwnedFd;
use std::sync::atomic::{
    AtomicBool, AtomicI64, AtomicU8, AtomicU32, AtomicU64, AtomicUsize, Ordering,
};
use std::sync::{Arc, Weak};

use parking_lot::{Mutex, RwLock};
use smallvec::SmallVec;

use super::chunks::Chunks;
use super::dir::Stream;
use super::fdcache::Slot;
use super::file::Backing;
use super::lower::LowerObject;
use super::places::Places;
use super::seal::UpperDir;
use super::types::{FileKind, NodeId, Timestamp};

/// An object in a lower layer.
#[derive(Clone)]
pub(super) struct LowerAt {
    /// Index of the layer, 0 the topmost.
    pub(super) layer: usize,
    /// The object.
    pub(super) object: Arc<dyn LowerObject>,
}

/// Objects of lower layers, mostly one.
#[derive(Clone, Default)]
pub(super) enum Lowers {
    #[default]
    None,
    One(LowerAt),
    Several(Arc<[LowerAt]>),
}

impl Deref for Lowers {
    type Target = [LowerAt];

    fn deref(&self) -> &[LowerAt] {
        match self {
            Self::None => &[],
            Self::One(only) => std::slice::from_ref(only),
            Self::Several(all) => all,
        }
    }
}

impl From<Vec<LowerAt>> for Lowers {
    fn from(mut all: Vec<LowerAt>) -> Self {
        match (all.pop(), all.is_empty()) {
            (None, _) => Self::None,
            (Some(only), true) => Self::One(only),
            (Some(last), false) => {
                all.push(last);
                Self::Several(all.into())
            }
        }
    }
}

/// A name of a node.
#[derive(Clone)]
pub(super) struct Name {
    /// The directory.
    pub(super) parent: Arc<Node>,
    /// The name in it.
    pub(super) name: Arc<OsStr>,
}

/// What keeps an upper object reachable that has no name any more.
#[derive(Clone)]
pub(super) enum Orphan {
    /// An `O_PATH` descriptor.
    Fd(Arc<OwnedFd>),
    /// A name in the work directory; removed with the node.
    Work(Arc<OsStr>),
}

/// Where an object lies at the moment.
#[derive(Default)]
pub(super) struct Place {
    /// Its names as far as they were looked up: one for a directory, none once it is removed.
    pub(super) names: SmallVec<[Name; 1]>,
    /// Host inode number in the upper.
    pub(super) upper: Option<u64>,
    /// A directory: the lower directories that merge, topmost first. Anything else: the lower object,
    /// or, for one with `metacopy`, the objects down to that with the data.
    pub(super) lowers: Lowers,
    /// A lower object that was read: its access time, which the layer must not store. With `metacopy`:
    /// when the upper's was last seen to.
    pub(super) atime: MaybeTime,
    /// The upper does not hold all of the data; what it does not is that of the last of `lowers`.
    pub(super) metacopy: bool,
    pub(super) rare: Rare,
}

/// What few nodes have, so that the others do not take the memory for it.
#[derive(Default)]
pub(super) struct Rare(Option<Box<RareParts>>);

#[derive(Default)]
pub(super) struct RareParts {
    /// Set once the last name is gone from the upper.
    pub(super) orphan: Option<Orphan>,
    /// Its entry in the index.
    pub(super) index: Option<Arc<OsStr>>,
    /// Links that the union shows beyond those that the host counts.
    pub(super) link_offset: i64,
    /// With `metacopy`: the upper holds some of the data.
    pub(super) chunks: Option<Arc<Chunks>>,
    pub(super) quiet_ctime: QuietCtime,
}

/// What keeps a change from being noticed that the union has made on its own account: the host's change time after it, and
/// the one to show instead.
#[derive(Clone, Copy, Default)]
pub(super) struct QuietCtime(Option<(Timestamp, Timestamp)>);

impl QuietCtime {
    /// Notes that such a change has moved the host's change time.
    pub(super) fn moved(&mut self, before: Timestamp, after: Timestamp) {
        self.0 = Some((after, self.shown(before)));
    }

    /// The change time to show for the host's.
    pub(super) fn shown(self, host: Timestamp) -> Timestamp {
        match self.0 {
            Some((quiet, shown)) if quiet == host => shown,
            _ => host,
        }
    }
}

impl Deref for Rare {
    type Target = RareParts;

    fn deref(&self) -> &RareParts {
        static NONE: RareParts = RareParts {
            orphan: None,
            index: None,
            link_offset: 0,
            chunks: None,
            quiet_ctime: QuietCtime(None),
        };
        self.0.as_deref().unwrap_or(&NONE)
    }
}

impl DerefMut for Rare {
    /// Makes room for it: not to be called for nothing.
    fn deref_mut(&mut self) -> &mut RareParts {
        self.0.get_or_insert_default()
    }
}

impl Place {
    /// Where a name is among the names.
    pub(super) fn position_of(&self, parent: &Arc<Node>, name: &OsStr) -> Option<usize> {
        self.names
            .iter()
            .position(|known| Arc::ptr_eq(&known.parent, parent) && &*known.name == name)
    }

    /// Takes a name away. `key` is what the directory had it under, mostly the same allocation: by that it is found
    /// among many names without reading them.
    pub(super) fn drop_name(&mut self, parent: &Arc<Node>, name: &OsStr, key: Option<Arc<OsStr>>) {
        let by_key = key.and_then(|key| {
            let same = |known: &Name| Arc::ptr_eq(&known.name, &key);
            self.names.iter().position(same)
        });
        if let Some(at) = by_key.or_else(|| self.position_of(parent, name)) {
            self.names.remove(at);
        }
    }
}

/// The part of a node that directories alone have.
#[derive(Default)]
pub(super) struct Directory {
    pub(super) state: RwLock<DirState>,
    /// Descriptor of the upper directory.
    pub(super) fd: Slot<UpperDir>,
    /// Whiteouts in xattr form count in the upper directory. Changes only with `state` locked for writing.
    pub(super) xattr_whiteouts: Flag,
    /// The upper directory is the copy of one that is immutable or append-only.
    pub(super) protected: Flag,
    /// It has another parent than when somebody last asked.
    pub(super) moved: AtomicBool,
}

/// Yes, no, or not asked yet.
#[derive(Default)]
pub(super) struct Flag(AtomicU8);

impl Flag {
    pub(super) fn get(&self) -> Option<bool> {
        match self.0.load(Ordering::Acquire) {
            0 => None,
            value => Some(value == 2),
        }
    }

    pub(super) fn set(&self, value: bool) {
        self.0.store(1 + u8::from(value), Ordering::Release);
    }

    /// What is known, or else what `ask` answers.
    pub(super) fn get_or<E>(&self, ask: impl FnOnce() -> Result<bool, E>) -> Result<bool, E> {
        if let Some(known) = self.get() {
            return Ok(known);
        }
        let value = ask()?;
        self.set(value);
        Ok(value)
    }
}

/// A number, or not counted yet.
pub(super) struct Count(AtomicI64);

impl Default for Count {
    fn default() -> Self {
        Self(AtomicI64::new(Self::UNKNOWN))
    }
}

impl Count {
    const UNKNOWN: i64 = -1;

    pub(super) fn get(&self) -> Option<u32> {
        u32::try_from(self.0.load(Ordering::Acquire)).ok()
    }

    pub(super) fn set(&self, count: u32) {
        self.0.store(count.into(), Ordering::Release);
    }

    /// Follows a change, if it was counted before.
    pub(super) fn add(&mut self, change: i64) {
        let count = self.0.get_mut();
        if *count != Self::UNKNOWN {
            *count = (*count + change).max(0);
        }
    }
}

/// What is known of a directory's entries; its lock is the lock of the directory.
#[derive(Default)]
pub(super) struct DirState {
    /// Entries that have a node.
    pub(super) children: HashMap<Arc<OsStr>, NodeId>,
    /// Counts changes of entries.
    pub(super) version: u64,
    /// After its own copy and those of children. Forgotten with every change that somebody asked for, because the host's clock may not
    /// have moved since.
    pub(super) quiet_ctime: QuietCtime,
    /// Removed: nothing can be made in it.
    pub(super) removed: bool,
    /// The upper directory is marked impure: entries may carry an origin.
    pub(super) impure: Flag,
    /// The upper directory has a default ACL.
    pub(super) default_acl: Flag,
    /// Subdirectories that are visible. Whoever changes it has the directory locked.
    pub(super) subdirectories: Count,
    /// Listings that are being read.
    pub(super) streams: Vec<Weak<Stream>>,
    /// Where the names stand that the upper alone has.
    pub(super) places: Mutex<Places>,
}

impl DirState {
    /// Notes that what `name` stands for has changed.
    pub(super) fn changed(&mut self, name: &OsStr) {
        self.version += 1;
        self.quiet_ctime = QuietCtime::default();
        if !self.streams.is_empty() {
            self.streams.retain(|stream| match stream.upgrade() {
                Some(stream) => {
                    stream.name_changed(name);
                    true
                }
                None => false,
            });
        }
    }
}

/// Writes under way that are not to move the time of change.
pub(super) struct Gathered {
    /// How many there are.
    pub(super) writes: u32,
    /// The time that they are not to move.
    pub(super) mtime: Timestamp,
}

/// A point in time that may not be known, in the room of one: there is one for each file that the kernel knows.
#[derive(Clone, Copy)]
pub(super) struct MaybeTime(Timestamp);

impl MaybeTime {
    /// No point in time has as many nanoseconds.
    const NONE: Self = Self(Timestamp {
        sec: 0,
        nsec: u32::MAX,
    });

    pub(super) fn get(self) -> Option<Timestamp> {
        (self.0.nsec != Self::NONE.0.nsec).then_some(self.0)
    }
}

impl Default for MaybeTime {
    fn default() -> Self {
        Self::NONE
    }
}

impl From<Timestamp> for MaybeTime {
    fn from(time: Timestamp) -> Self {
        Self(time)
    }
}

/// An object of the union.
pub(super) struct Node {
    pub(super) id: NodeId,
    pub(super) generation: u64,
    pub(super) kind: FileKind,
    /// Held while the object is copied up; its readers go on meanwhile.
    pub(super) copy_up: Mutex<()>,
    /// Held while attributes of the upper object change, or are put back to what they were. Has something while such writes are under
    /// way.
    pub(super) attributes: Mutex<Option<Box<Gathered>>>,
    pub(super) place: RwLock<Place>,
    /// Mirrors `place.upper.is_some()`, and not `place.metacopy`.
    pub(super) in_upper: AtomicBool,
    /// It may have been written since it was made or found.
    pub(super) written: AtomicBool,
    /// The descriptor that serves reads and writes.
    pub(super) io: Slot<Backing>,
    /// Open handles.
    pub(super) handles: AtomicU32,
    pub(super) directory: Option<Box<Directory>>,
}

impl Node {
    pub(super) fn new(id: NodeId, generation: u64, kind: FileKind, place: Place) -> Self {
        Self {
            id,
            generation,
            kind,
            copy_up: Mutex::new(()),
            attributes: Mutex::default(),
            in_upper: AtomicBool::new(place.upper.is_some() && !place.metacopy),
            written: AtomicBool::new(false),
            place: RwLock::new(place),
            io: Slot::default(),
            handles: AtomicU32::new(0),
            directory: (kind == FileKind::Directory).then(Box::default),
        }
    }

    /// Whether data and metadata are in the upper.
    pub(super) fn in_upper(&self) -> bool {
        self.in_upper.load(Ordering::Acquire)
    }

    /// Whether it has an object in the upper, be it without data.
    pub(super) fn has_upper(&self) -> bool {
        self.place.read().upper.is_some()
    }

    /// The topmost object in the lowers, if that is what is seen: nothing of the node is in the upper.
    pub(super) fn seen_lower(&self) -> Option<LowerAt> {
        let place = self.place.read();
        match place.upper {
            Some(_) => None,
            None => place.lowers.first().cloned(),
        }
    }

    /// One of its names.
    pub(super) fn name(&self) -> Option<Name> {
        self.place.read().names.first().cloned()
    }
}

impl Drop for Node {
    /// Takes a long chain of parents apart without recursion.
    fn drop(&mut self) {
        let mut pending: Vec<Arc<Self>> = Vec::new();
        pending.extend(self.place.get_mut().names.drain(..).map(|name| name.parent));
        while let Some(parent) = pending.pop() {
            if let Some(mut parent) = Arc::into_inner(parent) {
                let names = std::mem::take(&mut parent.place.get_mut().names);
                pending.extend(names.into_iter().map(|name| name.parent));
            }
        }
    }
}

struct Entry {
    node: Arc<Node>,
    lookups: u64,
}

const SHARDS: usize = 64;

/// The nodes by id, in shards that are locked one at a time.
pub(super) struct Table {
    shards: Vec<Mutex<HashMap<NodeId, Entry>>>,
    generation: AtomicU64,
    /// Nodes in it, and the most there were since it was last made smaller.
    live: AtomicUsize,
    most: AtomicUsize,
}

impl Table {
    pub(super) fn new() -> Self {
        Self {
            shards: (0..SHARDS).map(|_| Mutex::default()).collect(),
            generation: AtomicU64::new(0),
            live: AtomicUsize::new(0),
            most: AtomicUsize::new(0),
        }
    }

    fn shard(&self, id: NodeId) -> &Mutex<HashMap<NodeId, Entry>> {
        // Fibonacci hashing: host numbers are dense.
        let spread = id.0.wrapping_mul(0x9e37_79b9_7f4a_7c15) >> 58;
        &self.shards[spread as usize % SHARDS]
    }

    /// A number that tells this node from earlier ones with its id.
    pub(super) fn next_generation(&self) -> u64 {
        self.generation.fetch_add(1, Ordering::Relaxed) + 1
    }

    pub(super) fn get(&self, id: NodeId) -> Option<Arc<Node>> {
        self.shard(id)
            .lock()
            .get(&id)
            .map(|entry| Arc::clone(&entry.node))
    }

    /// Counts a lookup of a node that is in the table.
    pub(super) fn count_lookup(&self, id: NodeId) -> Option<Arc<Node>> {
        let mut shard = self.shard(id).lock();
        let entry = shard.get_mut(&id)?;
        entry.lookups += 1;
        Some(Arc::clone(&entry.node))
    }

    /// Adds a node, unless there is one with its id: then both are given back. No lookup is counted.
    pub(super) fn insert(&self, node: Node) -> Result<Arc<Node>, (Arc<Node>, Box<Node>)> {
        let mut shard = self.shard(node.id).lock();
        match shard.entry(node.id) {
            hash_map::Entry::Occupied(known) => {
                Err((Arc::clone(&known.get().node), Box::new(node)))
            }
            hash_map::Entry::Vacant(free) => {
                let node = Arc::new(node);
                let live = self.live.fetch_add(1, Ordering::Relaxed) + 1;
                self.most.fetch_max(live, Ordering::Relaxed);
                free.insert(Entry {
                    node: Arc::clone(&node),
                    lookups: 0,
                });
                Ok(node)
            }
        }
    }

    /// Takes back lookups and drops the node if nothing refers to it any more: no lookup, no handle,
    /// no child, no operation under way.
    pub(super) fn forget(&self, id: NodeId, lookups: u64) -> Forgotten {
        let mut shard = self.shard(id).lock();
        let Some(entry) = shard.get_mut(&id) else {
            return Forgotten::Unknown;
        };
        entry.lookups = entry.lookups.saturating_sub(lookups);
        if entry.lookups > 0 || id == NodeId::ROOT || entry.node.handles.load(Ordering::Relaxed) > 0
        {
            return Forgotten::InUse;
        }
        if Arc::strong_count(&entry.node) > 1 {
            return Forgotten::Busy;
        }
        match shard.remove(&id) {
            Some(entry) => {
                self.live.fetch_sub(1, Ordering::Relaxed);
                Forgotten::Dropped(entry.node)
            }
            None => Forgotten::Unknown,
        }
    }

    /// Makes the table smaller once half of the nodes have gone; says whether it did. So a million that
    /// are forgotten cost ten rounds.
    pub(super) fn shrink(&self) -> bool {
        const FEW: usize = 4096;
        let most = self.most.load(Ordering::Relaxed);
        let live = self.live.load(Ordering::Relaxed);
        let halved = most > FEW && live <= most / 2;
        let first = || {
            self.most
                .compare_exchange(most, live, Ordering::Relaxed, Ordering::Relaxed)
                .is_ok()
        };
        if !halved || !first() {
            return false;
        }
        for shard in &self.shards {
            shard.lock().shrink_to_fit();
        }
        true
    }

    /// The ids of all nodes, for rare walks that would keep too many from being forgotten.
    pub(super) fn ids(&self) -> Vec<NodeId> {
        let mut ids = Vec::new();
        for shard in &self.shards {
            ids.extend(shard.lock().keys());
        }
        ids
    }

    /// All nodes, for rare walks.
    pub(super) fn all(&self) -> Vec<Arc<Node>> {
        let mut nodes = Vec::new();
        for shard in &self.shards {
            nodes.extend(shard.lock().values().map(|entry| Arc::clone(&entry.node)));
        }
        nodes
    }
}

/// What became of a node that was forgotten.
pub(super) enum Forgotten {
    /// It was not in the table.
    Unknown,
    /// It is still looked up or open.
    InUse,
    /// Children or running operations hold it; whoever lets go last must try again.
    Busy,
    /// It has left the table.
    Dropped(Arc<Node>),
}
