//! OCI images: from an archive to records and a chain of committed snapshots.
//!
//! An image is a config, a manifest and a chain of layers. [`ImageStore`] keeps the first two in one
//! record file and each layer as a committed snapshot of [`Owner::Image`](crate::snapshotter::Owner)
//! whose key is the layer's chain id, so that images which share layers share snapshots.

//! The way in: an archive is taken in by [`archive`], which says what images it makes; each layer that
//! is not there yet is unpacked by [`apply`] into an active snapshot, which is committed; last come the
//! records. A load that fails or is cut off leaves nothing behind.

mod apply;
mod archive;
mod error;
mod records;
mod reference;
mod store;
mod tar;
mod types;
mod unpack;

use std::path::Path;

pub use error::{Error, Result};
pub use store::ImageStore;
pub use types::*;

pub use crate::store::ingest::Limits;

fn io_error(action: &'static str, path: &Path) -> impl FnOnce(std::io::Error) -> Error + use<> {
    let path = path.to_owned();
    move |source| Error::Io {
        action,
        path,
        source,
    }
}

/// A name that somebody else chose, fit for a message: escaped, and cut when it is very long.
fn printable(name: &[u8]) -> String {
    const LONGEST: usize = 200;
    let text = String::from_utf8_lossy(&name[..name.len().min(LONGEST)]);
    let more = if name.len() > LONGEST { "..." } else { "" };
    format!("\"{}{more}\"", text.escape_debug())
}
