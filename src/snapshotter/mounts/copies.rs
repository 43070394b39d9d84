//! Where the mount of a snapshot is to be seen beside its own place: binds that consumers made of it.

use std::path::{Path, PathBuf};

use super::super::types::*;
use super::{Live, Mounts, connection};
use crate::sys::mountinfo::{self, MountEntry};

impl Mounts {
    /// The snapshot whose mount has its own place at `path`.
    pub(in super::super) fn id_at<'a>(&self, path: &'a Path) -> Option<&'a str> {
        let id = path.parent()?.file_name()?.to_str()?;
        (self.place(id).root() == path).then_some(id)
    }

    /// Where else the mount of a snapshot is to be seen.
    pub(in super::super) fn places(&self, id: &str) -> Result<Vec<PathBuf>> {
        self.wait_for_arrival(id);
        let found = |live: &Live| (live.point.path.clone(), live.connection);
        let found = self.shared.live.lock().get(id).map(found);
        found.map_or(Ok(Vec::new()), |(path, number)| copies(&path, number))
    }
}

/// Where else the mount at `path`, of the connection of that number, is to be seen.
pub(super) fn copies(path: &Path, number: u64) -> Result<Vec<PathBuf>> {
    let table = mountinfo::read().map_err(io_error("look for copies of", path))?;
    let is_copy = |entry: &MountEntry| connection(entry) == Some(number) && entry.target != path;
    let copies = table.into_iter().filter(is_copy);
    Ok(copies.map(|entry| entry.target).collect())
}
