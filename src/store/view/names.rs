//! The way from an inode back to its names. A view has no table for that: one pass over the entries of all its directories makes
//! one, which lasts as long as somebody asks it.

use std::collections::{HashMap, HashSet};

use super::{DirEntry, View};
use crate::store::error::Result;
use crate::store::format::Record;
use crate::store::format::index_file::Section;
use crate::store::layer::index::LONGEST_PATH;

/// No directory entry has this number.
const NONE: u32 = u32::MAX;
/// Entries that are taken in at once: those of a page.
const BLOCK: u32 = 256;

#[cfg(test)]
thread_local! {
    /// Passes over the entries of a view that this thread has made.
    pub(crate) static PASSES: std::cell::Cell<u64> = const { std::cell::Cell::new(0) };
}

/// Where the inodes of a view are named. It takes four bytes of memory for each inode, and eight for each directory at
/// most.
pub struct Names<'a> {
    view: &'a View,
    /// The first directory entry with each inode.
    first: Vec<u32>,
    /// The others with inodes of several names, in order.
    others: HashMap<u32, Vec<u32>>,
    /// Directories in the order of their entries.
    directories: Vec<u32>,
}

impl View {
    /// Takes in all directory entries, which are 16 bytes for each name, and nothing else.
    pub fn names(&self) -> Result<Names<'_>> {
        #[cfg(test)]
        PASSES.set(PASSES.get() + 1);
        let mut names = Names {
            view: self,
            first: vec![NONE; self.len() as usize],
            others: HashMap::new(),
            directories: vec![Self::ROOT],
        };
        const RECORD: usize = Section::DirEntries.record();
        let count = self.file.count(Section::DirEntries);
        for start in (0..count).step_by(BLOCK as usize) {
            let bytes = (count - start).min(BLOCK) as usize * RECORD;
            let at = u64::from(start) * RECORD as u64;
            let block = self.file.slice(Section::DirEntries, at, bytes as u64)?;
            for (place, record) in (start..).zip(block.chunks_exact(RECORD)) {
                names.take(place, Record(record))?;
            }
        }
        Ok(names)
    }
}

impl<'a> Names<'a> {
    fn take(&mut self, place: u32, record: Record<'_>) -> Result<()> {
        let inode = record.u32(4);
        match self.first.get_mut(inode as usize) {
            None => return Err(self.view.file.damaged("an entry of a directory cannot be")),
            Some(first) if *first == NONE => *first = place,
            Some(_) => self.others.entry(inode).or_default().push(place),
        }
        if u32::from(record.u8(13)) << 12 == libc::S_IFDIR {
            self.directories.push(inode);
        }
        Ok(())
    }

    /// All paths of an inode, from below the root.
    pub fn paths(&self, inode: u32) -> Result<Vec<Vec<u8>>> {
        self.places(inode)
            .map(|place| Ok(self.path_to(place)?.0))
            .collect()
    }

    /// One path of an inode, and the entry at its end; `None` if nothing leads there.
    pub(super) fn path(&self, inode: u32) -> Result<Option<(Vec<u8>, DirEntry<'a>)>> {
        let place = self.places(inode).next();
        place.map(|place| self.path_to(place)).transpose()
    }

    /// By the numbers of directories, the names in each that are those of `inodes` or lead to them.
    pub fn ways_to(
        &self,
        inodes: impl IntoIterator<Item = u32>,
    ) -> Result<HashMap<u32, Vec<&'a [u8]>>> {
        let mut ways: HashMap<u32, Vec<&[u8]>> = HashMap::new();
        let mut waiting: Vec<u32> = inodes.into_iter().collect();
        let mut seen: HashSet<u32> = waiting.iter().copied().collect();
        while let Some(inode) = waiting.pop() {
            for place in self.places(inode) {
                let (directory, entry) = self.entry_at(place)?;
                ways.entry(directory).or_default().push(entry.name);
                if seen.insert(directory) {
                    waiting.push(directory);
                }
            }
        }
        Ok(ways)
    }

    /// The entries with an inode.
    fn places(&self, inode: u32) -> impl Iterator<Item = u32> {
        let first = self.first.get(inode as usize).copied();
        let others = self.others.get(&inode).into_iter().flatten().copied();
        first
            .filter(|first| *first != NONE)
            .into_iter()
            .chain(others)
    }

    /// The path to an entry, and that entry.
    fn path_to(&self, place: u32) -> Result<(Vec<u8>, DirEntry<'a>)> {
        let (mut above, entry) = self.entry_at(place)?;
        let mut names = vec![entry.name];
        let mut length = entry.name.len();
        while above != View::ROOT {
            let Some(place) = self.places(above).next() else {
                return Err(self.view.file.damaged("a directory in it has no name"));
            };
            let entry = self.entry_at(place)?;
            above = entry.0;
            length += 1 + entry.1.name.len();
            // Only a damaged view leads in a circle.
            if length > LONGEST_PATH {
                return Err(self.view.file.damaged("a path in it has no end"));
            }
            names.push(entry.1.name);
        }
        names.reverse();
        Ok((names.join(&b'/'), entry))
    }

    /// An entry and the number of the directory that has it.
    fn entry_at(&self, place: u32) -> Result<(u32, DirEntry<'a>)> {
        let view = self.view;
        let entry = view.entry(view.file.record(Section::DirEntries, place)?)?;
        // The entries of directories follow each other as the directories do.
        let (mut low, mut high) = (0, self.directories.len());
        while low < high {
            let middle = low + (high - low) / 2;
            let (first, count) = view.entries(&view.inode(self.directories[middle])?)?;
            if (first..first + count).contains(&place) {
                return Ok((self.directories[middle], entry));
            }
            match first <= place {
                true => low = middle + 1,
                false => high = middle,
            }
        }
        Err(view.file.damaged("an entry in it is in no directory"))
    }
}
