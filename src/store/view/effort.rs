//! What applying layers may cost: as much as their entries, within reason.
//!
//! A few bytes of a stream can ask for much: a path through links that lead through links; directories that no entry lists, made
//! and removed and made again; a directory that gets one more attribute by each of ten thousand entries. What no image needs
//! is refused before it takes the host's memory, or hours.

use std::cell::Cell;

/// Names that paths may lead through and attributes that may be looked at, and the same for each entry.
const STEPS: (u64, u64) = (2_000_000, 200);
/// Objects that may be made, and the same for each entry.
const OBJECTS: (u64, u64) = (100_000, 8);
/// Bytes of extended attributes and of paths that were removed, and the same for each entry.
const HELD: (u64, u64) = (256 << 20, 1 << 10);
/// Bytes of the extended attributes of one object.
const MOST_ATTRIBUTES: u64 = 1 << 20;

/// What is allowed and what was taken of it.
#[derive(Default)]
pub(super) struct Effort {
    /// Of all layers so far.
    entries: u64,
    steps: Cell<u64>,
    held: u64,
}

impl Effort {
    /// A layer of so many entries comes.
    pub(super) fn allow(&mut self, entries: u32) {
        self.entries += u64::from(entries);
    }

    /// So many steps were made.
    pub(super) fn step(&self, steps: usize) -> Result<(), &'static str> {
        let all = self.steps.get().saturating_add(steps as u64);
        self.steps.set(all);
        let most = STEPS.0 + STEPS.1 * self.entries;
        within(all, most, "the paths of the layer lead through too much")
    }

    /// There are so many objects.
    pub(super) fn make(&self, objects: usize) -> Result<(), &'static str> {
        let most = OBJECTS.0 + OBJECTS.1 * self.entries;
        let problem = "the layer makes too many directories that it does not list";
        within(objects as u64, most, problem)
    }

    /// So many bytes are kept for as long as layers are applied.
    pub(super) fn hold(&mut self, bytes: usize) -> Result<(), &'static str> {
        self.held += bytes as u64;
        let most = HELD.0 + HELD.1 * self.entries;
        let problem =
            "the layer removes too much of what it made, or changes extended attributes too often";
        within(self.held, most, problem)
    }

    /// What was kept so.
    pub(super) fn held(&self) -> usize {
        self.held as usize
    }

    /// An object has so many bytes of extended attributes.
    pub(super) fn attributes(&self, bytes: usize) -> Result<(), &'static str> {
        let problem = "it has more than 1 MiB of extended attributes";
        within(bytes as u64, MOST_ATTRIBUTES, problem)
    }
}

/// Whether a layer of so many entries, whose paths have so many names in all and whose extended attributes are so many with
/// so many bytes, asks for no more than its own entries allow: then it can lie on any layers.
pub(in crate::store) fn is_modest(entries: u64, names: u64, xattrs: u64, bytes: u64) -> bool {
    // A path is followed, and may be removed and told.
    const FOLLOWED: u64 = 4;
    let steps = FOLLOWED * names + xattrs;
    let held = 2 * (bytes + xattrs * super::tree::XATTR as u64);
    steps <= STEPS.1 * entries && held <= HELD.1 * entries
}

fn within(what: u64, most: u64, problem: &'static str) -> Result<(), &'static str> {
    if what <= most { Ok(()) } else { Err(problem) }
}
