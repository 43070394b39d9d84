//! OCI images: from an archive to records and a chain of committed snapshots.
//!
//! An image is a config, a manifest and a chain of layers. [`ImageStore`] keeps the first two in one
//! record file and each layer as a committed snapshot of [`Owner::Image`](crate::snapshotter::Owner)
//! whose key is the layer's chain id, so that images which share layers share snapshots.

mod error;
mod store;
mod types;

pub use error::{Error, Result};
pub use store::ImageStore;
pub use types::*;
