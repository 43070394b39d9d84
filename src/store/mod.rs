//! What lies on disk below plyd's root: [`record`] files hold every fact, [`index`] finds them by
//! other names than their own, [`layer`] keeps the content of committed snapshots, [`trash`] deletes
//! trees.
//!
//! Packed layers (`docs/layer-format.md`): `format` and `pack` are the files, [`object`] finds contents
//! by their names, [`layer::index`] is what a layer says, [`ingest`] takes layers in and `export` gives
//! their streams back, [`layers`] has all of them. A [`view`] is what a
//! chain of layers looks like, in one index. [`gc`] removes what no layer needs, [`verify`] finds damage, [`repair`] mends it,
//! [`space`] says what takes how much.
//!
//! The rules that everything here follows:
//! - A fact is true when its record file is in place. Every change of state is exactly one rename
//!   or one unlink of a record; whatever it names was made durable before.
//! - The index holds no truth. It can be thrown away at any time, and nothing is deleted on its word.
//! - What a crash can leave is harmless, is recognised by its place and cleared: temporaries when the store is opened, a layer
//!   without a record once somebody knows that it is nobody's, for the record may have been lost.

mod collector;
pub(crate) mod compression;
mod durable;
mod error;
mod export;
mod format;
pub mod gc;
pub mod index;
pub mod ingest;
pub mod layer;
pub mod layers;
mod lock;
pub mod object;
mod pack;
pub mod record;
pub mod repair;
pub mod space;
pub mod tar;
pub mod trash;
mod usage;
pub mod verify;
pub mod view;

pub use collector::Collector;
pub use durable::{create_dir, sync_dir};
pub(crate) use error::before_problem;
pub use error::{Error, Result};
pub use format::tables::{Extent, Inode, Object, Xattrs};
pub use format::{LayerName, NotAName, ObjectName, Time, ViewKey};
pub use lock::{LockError, RootLock, lock_root};
pub use pack::PackId;
pub use usage::{Usage, own_bytes, tree_bytes, usage};
