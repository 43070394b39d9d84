//! The union: read-only lowers merged below one writable upper, in user space.
//!
//! [`Union`] is used by node ids, as FUSE does, and knows nothing of FUSE. Its operations are found by
//! topic: `lookup`, `attr`, `file` (open files), `dir` (listings), `create`, `remove`, `rename`,
//! `xattr`. Beneath them:
//!
//! - `node`: what is known of an object, the table of all, and the order of locks; `forget`: its end;
//! - `lower`, `dir_lower`, `view_lower`: a read-only layer, and the two kinds of it that there are;
//! - `upper`: the writable layer and how an object in it is reached; `seal`: when it becomes a layer for others;
//! - `copyup`, `index`, `origin`: how a lower object becomes an upper one and keeps its identity; `foreign_index`: the
//!   same as somebody else's upper has it;
//! - `chunks`: large files, of which only what changes is copied up;
//! - `metacopy`: files whose attributes are in the upper and whose data is in a lower layer; `plain`: what becomes of
//!   them when a mount ends;
//! - `no_data`: files whose data is missing;
//! - `content`: where the data of a file lies;
//! - `whiteout`, `redirect`: the marks of overlayfs's on-disk format;
//! - `lend`: what the mode of an upper object forbids its owner and not the union;
//! - `owner`, `stat_override`: whose an object is shown as, and owners kept in attributes; `adopt`: uppers that
//!   fuse-overlayfs has written;
//! - `export`: copies of layers for kernel overlayfs;
//! - `room`: what of the host's room is ours, and what removed files still take of it;
//! - `number`: inode numbers; `find`: the way back from one; `fdcache`: a bounded number of descriptors;
//!   `acl`: inheritance of ACLs.

mod acl;
mod adopt;
mod attr;
mod chunks;
mod content;
mod copyup;
mod create;
mod dir;
mod dir_lower;
mod error;
pub mod export;
mod fdcache;
mod file;
mod find;
mod foreign_index;
mod forget;
mod index;
mod lend;
mod lookup;
mod lower;
mod lower_data;
mod metacopy;
mod no_data;
mod node;
mod number;
mod open;
mod origin;
mod owner;
mod places;
mod plain;
mod redirect;
mod refresh;
mod remove;
mod rename;
mod room;
mod seal;
mod stat_override;
#[cfg(test)]
mod tests;
pub mod types;
pub mod union;
mod upper;
mod view_lower;
mod whiteout;
mod xattr;

pub use acl::ACCESS as ACCESS_ACL;
pub use content::ContentPart;
pub use foreign_index::CopiedLinks;
#[cfg(test)]
pub(crate) use index::SETTLED;
pub use metacopy::may_hold_metacopies;
pub use owner::{IdRange, IdView, OVERFLOW_ID, Owners};
pub use stat_override::StatOverride;
pub use types::*;
pub use union::{DirHandle, Error, FileHandle, OpenError, Result, Union};
