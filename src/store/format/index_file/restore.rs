//! Making a damaged file whole where it lies, so that who has it open reads on.

use std::fs::File;
use std::io::{self, Seek};
use std::os::unix::fs::{FileExt, MetadataExt};
use std::path::Path;

use super::{HEADER, IndexFile, Kind, PAGE};
use crate::store::error::{Result, io_error};

/// Writes what is damaged of the file at `path` as it is in `other`, where that has what the file's sums say, and says whether
/// the file is whole then.
pub(in crate::store) fn restore(path: &Path, kind: Kind, other: &File) -> Result<bool> {
    match IndexFile::open(path, kind) {
        Ok(file) => file.restore_pages(other),
        // Its length or its sums may be what is wrong.
        Err(_) => rewrite(path, other),
    }
}

/// Writes all of the file, if its header says that it was the same as `other`: the header has the sum of the sums.
fn rewrite(path: &Path, other: &File) -> Result<bool> {
    let own = File::options().read(true).write(true).open(path);
    let mut own = own.map_err(io_error("open", path))?;
    let header = |file: &File| {
        let mut header = [0; HEADER];
        file.read_exact_at(&mut header, 0).map(|()| header)
    };
    let wanted = header(other).map_err(io_error("read what was built for", path))?;
    if header(&own).ok() != Some(wanted) {
        return Ok(false);
    }
    copy_into(&mut own, other).map_err(io_error("write", path))?;
    Ok(true)
}

fn copy_into(own: &mut File, mut other: &File) -> io::Result<()> {
    other.rewind()?;
    let length = io::copy(&mut other, own)?;
    own.set_len(length)?;
    own.sync_all()
}

impl IndexFile {
    /// Another file that has taken its place is left alone.
    pub(super) fn restore_pages(&self, other: &File) -> Result<bool> {
        let own = File::options().write(true).open(&self.path);
        let own = own.map_err(io_error("open", &self.path))?;
        let identity = |file: &File| file.metadata().map(|found| (found.dev(), found.ino()));
        let (ours, found) = (identity(&self.file), identity(&own));
        let look = |found: io::Result<_>| found.map_err(io_error("look at", &self.path));
        if look(ours)? != look(found)? {
            return Ok(false);
        }
        for page in 0..(self.sums.len() / 32) as u64 {
            if self.read_page(page).is_ok() {
                continue;
            }
            let mut buffer = [0; PAGE as usize];
            let (at, bytes) = self.page_in(page, &mut buffer);
            let is_it = other.read_exact_at(bytes, at).is_ok() && self.is_page(page, bytes);
            if !is_it {
                return Ok(false);
            }
            own.write_all_at(bytes, at)
                .map_err(io_error("write", &self.path))?;
        }
        own.sync_all().map_err(io_error("write", &self.path))?;
        Ok(true)
    }
}
