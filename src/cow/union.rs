//! The union itself: what its operations share.

use std::sync::Arc;
use std::sync::atomic::AtomicUsize;

use parking_lot::Mutex;

pub use super::dir::DirHandle;
pub use super::error::{Error, OpenError, Result};
use super::fdcache::Budget;
pub use super::file::FileHandle;
use super::lower::Lower;
use super::node::Table;
use super::number::Numbers;
use super::types::{NodeId, XattrFamily};
use super::upper::Upper;

/// The union itself; every method may be called from any thread. Each operation is in the file that is
/// named after its topic.
pub struct Union {
    pub(super) family: XattrFamily,
    pub(super) squash: Option<(u32, u32)>,
    pub(super) volatile: bool,
    pub(super) no_acl: bool,
    /// File handles cannot be opened: origins are noted by number.
    pub(super) origin_numbers: bool,
    /// The topmost first.
    pub(super) lowers: Vec<Box<dyn Lower>>,
    pub(super) upper: Option<Upper>,
    pub(super) numbers: Numbers,
    pub(super) table: Table,
    pub(super) budget: Arc<Budget>,
    /// Held by a rename between two directories: meanwhile no directory gets another parent.
    pub(super) rename_lock: Mutex<()>,
    /// Nodes that were forgotten while an operation held them.
    pub(super) busy: Mutex<Vec<NodeId>>,
    pub(super) busy_count: AtomicUsize,
}

impl Union {
    /// Whether there is no upper.
    pub fn is_read_only(&self) -> bool {
        self.upper.is_none()
    }
}
