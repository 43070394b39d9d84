//! The union itself: what its operations share.

use std::sync::atomic::{AtomicBool, AtomicU64, AtomicUsize};
use std::sync::{Arc, OnceLock};

use parking_lot::Mutex;

pub use super::dir::DirHandle;
pub use super::error::{Error, OpenError, Result};
use super::fdcache::Budget;
pub use super::file::FileHandle;
use super::foreign_index::ForeignIndex;
use super::lower::Lower;
pub use super::lower_data::LowerData;
use super::node::Table;
use super::number::Numbers;
use super::owner::Owners;
use super::stat_override::StatOverride;
use super::types::{Chunking, Damage, NodeId, Quiet, XattrFamily};
use super::upper::Upper;

/// The union itself; every method may be called from any thread. Each operation is in the file that is
/// named after its topic.
pub struct Union {
    pub(super) family: XattrFamily,
    pub(super) owners: Owners,
    /// Owner and mode of upper objects lie in this attribute.
    pub(super) stat_override: Option<StatOverride>,
    pub(super) static_nlink: bool,
    pub(super) no_xattrs: bool,
    pub(super) volatile: bool,
    pub(super) no_acl: AtomicBool,
    pub(super) quiet: Quiet,
    pub(super) no_metacopy: bool,
    pub(super) chunking: Chunking,
    /// Lower files are opened anew, and so verified, for each open.
    pub(super) verifies_each_open: bool,
    /// How often layers were mended below.
    pub(super) refreshes: AtomicU64,
    /// File handles cannot be opened: origins are noted by number.
    pub(super) origin_numbers: bool,
    /// The topmost first.
    pub(super) lowers: Vec<Box<dyn Lower>>,
    /// The topmost is the upper of others (`UnionConfig::lower_work`).
    pub(super) reads_upper: bool,
    /// The index of hard links in the work directory of that upper.
    pub(super) index_of_others: Option<ForeignIndex>,
    pub(super) upper: Option<Upper>,
    pub(super) numbers: Numbers,
    pub(super) table: Table,
    pub(super) budget: Arc<Budget>,
    /// Held by a rename between two directories: meanwhile no directory gets another parent.
    pub(super) rename_lock: Mutex<()>,
    /// Nodes that were forgotten while an operation held them.
    pub(super) busy: Mutex<Vec<NodeId>>,
    pub(super) busy_count: AtomicUsize,
    pub(super) on_side_effect: OnceLock<SideEffect>,
}

/// Told of a node whose attributes changed without a request for them.
pub(super) type SideEffect = Box<dyn Fn(NodeId) + Send + Sync>;

impl Union {
    /// Whether there is no upper.
    pub fn is_read_only(&self) -> bool {
        self.upper.is_none()
    }

    /// Whether the topmost layer is the upper of others: what is in it may change, go and be another at any moment.
    pub fn is_live(&self) -> bool {
        self.reads_upper
    }

    /// What of packed layers could not be used when it was last read.
    pub fn damage(&self) -> Damage {
        let each = self.lowers.iter().map(|lower| lower.damage());
        each.fold(Damage::default(), |all, one| Damage {
            contents: all.contents + one.contents,
            view: all.view || one.view,
        })
    }

    /// Says that attributes of a node have changed without a request for it.
    pub fn tell(&self, node: NodeId) {
        if let Some(tell) = self.on_side_effect.get() {
            tell(node);
        }
    }

    /// Has `tell` called with every directory that was copied up because something in it was, and every file that lost
    /// setuid or setgid because it was written: nobody asked for that, so whoever keeps attributes has to be told. It is
    /// called with no lock held, before the operation at hand answers. Only the first call counts.
    pub fn on_side_effect(&self, tell: impl Fn(NodeId) + Send + Sync + 'static) {
        // As documented, a second one is not taken.
        let _ = self.on_side_effect.set(Box::new(tell));
    }
}
