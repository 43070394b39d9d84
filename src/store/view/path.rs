//! Where damage is, for messages.

use super::View;
use crate::store::error::{Error, Result};

impl View {
    /// The error, with the path of the inode that it is of and the layer that wrote it, as far as the view can tell. Of contents that
    /// were lost together only the first have a path: the same is said of all others.
    pub fn of_inode(&self, inode: u32, error: Error) -> Error {
        if let Some(error) = self.lost_with_others(inode, &error) {
            return error;
        }
        match self.path_of(inode) {
            Ok(Some((path, layer))) => {
                // The root's is empty.
                let path = path.strip_prefix(b"/").unwrap_or_default();
                match self.layer(layer) {
                    Ok(layer) => error.of_entry(layer, path),
                    Err(_) => error.of(format!("/{}", path.escape_ascii())),
                }
            }
            // The view itself is what is damaged, and the error names it.
            _ => error.of(format!("inode {inode} of the view {}", self.key())),
        }
    }

    /// A path of an inode and the number of the layer that wrote it; `None` if no directory has it. It looks at all names of
    /// the view, for nobody needs it but whoever reports damage.
    pub fn path_of(&self, inode: u32) -> Result<Option<(Vec<u8>, u16)>> {
        if inode == Self::ROOT {
            return Ok(Some((Vec::new(), 0)));
        }
        let found = self.names()?.path(inode)?;
        Ok(found.map(|(path, entry)| ([b"/", &*path].concat(), entry.layer)))
    }
}
