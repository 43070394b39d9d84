//! The way from an inode back to its path, for messages.

use super::View;
use crate::store::error::{Error, Result};
use crate::store::format::index_file::Section;
use crate::store::layer::index::LONGEST_PATH;

impl View {
    /// The error, with the path of the inode that it is of and the layer that wrote it, as far as the view can tell.
    pub fn of_inode(&self, inode: u32, error: Error) -> Error {
        match self.path_of(inode) {
            Ok(Some((path, layer))) => match (path.strip_prefix(b"/"), self.layer(layer)) {
                (Some(path), Ok(layer)) => error.of_entry(layer, path),
                _ => error.of(path.escape_ascii().to_string()),
            },
            // The view itself is what is damaged, and the error names it.
            _ => error.of(format!("inode {inode} of the view {}", self.key())),
        }
    }

    /// A path of an inode and the number of the layer that wrote it; `None` if no directory has it. It looks at the whole
    /// view, for nobody needs it but whoever reports damage.
    pub fn path_of(&self, inode: u32) -> Result<Option<(Vec<u8>, u16)>> {
        let mut path = Vec::new();
        let mut layer = None;
        let mut at = inode;
        while at != Self::ROOT {
            let Some(place) = self.entry_of(at)? else {
                return Ok(None);
            };
            let entry = self.entry(self.file.record(Section::DirEntries, place)?)?;
            layer.get_or_insert(entry.layer);
            path.splice(0..0, [b"/", entry.name].concat());
            let Some(above) = self.directory_with(place)? else {
                return Ok(None);
            };
            // Only a damaged view leads in a circle.
            if path.len() > LONGEST_PATH + 1 {
                return Err(self.file.damaged("a path in it has no end"));
            }
            at = above;
        }
        Ok(Some((path, layer.unwrap_or(0))))
    }

    /// Number of the first directory entry with an inode.
    fn entry_of(&self, inode: u32) -> Result<Option<u32>> {
        for place in 0..self.file.count(Section::DirEntries) {
            if self.file.record(Section::DirEntries, place)?.u32(4) == inode {
                return Ok(Some(place));
            }
        }
        Ok(None)
    }

    /// The directory that has the entry of that number.
    fn directory_with(&self, place: u32) -> Result<Option<u32>> {
        for number in 0..self.len() {
            let inode = self.inode(number)?;
            let (first, count) = self.entries(&inode)?;
            if (first..first + count).contains(&place) {
                return Ok(Some(number));
            }
        }
        Ok(None)
    }
}
