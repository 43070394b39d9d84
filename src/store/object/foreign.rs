//! What lies where objects do: files of plyd's, by their names, and what somebody else has put there, which nobody reads and no
//! collection takes.

use std::fs::{self, FileType};
use std::io;
use std::path::{Path, PathBuf};

use super::Objects;
use crate::store::error::{Result, io_error};
use crate::store::format::ObjectName;
use crate::store::pack::PackId;

impl Objects {
    /// The directories that objects which are files lie in.
    pub(in crate::store) fn file_dirs(&self) -> Result<Vec<String>> {
        let entries = entries(&self.files)?.into_iter();
        let dirs = entries.filter(|(name, kind)| is_dir_of_files(name, *kind));
        Ok(dirs.map(|(name, _)| name).collect())
    }

    /// The objects in one of these.
    pub(super) fn files_in(&self, dir: &str) -> Result<Vec<ObjectName>> {
        let entries = entries(&self.files.join(dir))?.into_iter();
        Ok(entries
            .filter_map(|(name, _)| object_in(dir, &name))
            .collect())
    }

    /// What is not plyd's where packs lie, and where objects that are files do.
    pub(in crate::store) fn foreign(&self) -> Result<(Vec<PathBuf>, Vec<PathBuf>)> {
        let beside_packs = entries(&self.packs)?
            .into_iter()
            .filter(|(name, _)| PackId::of_file(name).is_none())
            .map(|(name, _)| self.packs.join(name));
        let mut beside_files = Vec::new();
        for (name, kind) in entries(&self.files)? {
            let path = self.files.join(&name);
            if !is_dir_of_files(&name, kind) {
                beside_files.push(path);
                continue;
            }
            let inside = entries(&path)?.into_iter();
            let foreign = inside.filter(|(inner, _)| object_in(&name, inner).is_none());
            beside_files.extend(foreign.map(|(inner, _)| path.join(inner)));
        }
        Ok((beside_packs.collect(), beside_files))
    }
}

/// Whether a directory of that name, among the files of objects, is one that these lie in.
pub(in crate::store) fn is_dir_of_files(name: &str, kind: FileType) -> bool {
    let is_digit = |byte: u8| matches!(byte, b'0'..=b'9' | b'a'..=b'f');
    kind.is_dir() && name.len() == 2 && name.bytes().all(is_digit)
}

/// The object that a file of that name is in the directory `dir`, if it is one.
pub(in crate::store) fn object_in(dir: &str, name: &str) -> Option<ObjectName> {
    name.parse().ok().filter(|_| name.starts_with(dir))
}

/// Names, in which what is not UTF-8 is replaced, and types.
fn entries(dir: &Path) -> Result<Vec<(String, FileType)>> {
    let read = || {
        let entries = fs::read_dir(dir)?.map(|entry| {
            let entry = entry?;
            let name = entry.file_name().to_string_lossy().into_owned();
            Ok((name, entry.file_type()?))
        });
        entries.collect::<io::Result<Vec<_>>>()
    };
    read().map_err(io_error("list", dir))
}
