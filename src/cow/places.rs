//! Where the names of a directory stand in its listings.
//!
//! The kernel may serve the first part of a listing from what another reader was told, and ask for the rest
//! with an offset of its own. So a name has one place for as long as the kernel knows the directory, whoever reads it: names
//! that a lower has stand where the lowers list them, which never change; names that the upper alone has
//! get the next free place when they are first listed. Places are small numbers, for 32-bit programs.

use std::collections::{HashMap, HashSet};
use std::ffi::OsStr;
use std::hash::{BuildHasher, RandomState};

/// The places of the names that the upper alone has, behind those of the lowers.
#[derive(Default)]
pub(super) struct Places {
    /// Hashes that nobody can foresee stand for the names.
    of: HashMap<u64, u64>,
    hasher: RandomState,
    next: u64,
}

impl Places {
    /// The places of `names`, all that the upper alone has now, counted from the end of the lowers' places.
    pub(super) fn of<'a>(&mut self, names: impl Iterator<Item = &'a OsStr>) -> Vec<u64> {
        let hashes: Vec<u64> = names.map(|name| self.hasher.hash_one(name)).collect();
        // Names that come and go, as those of temporary files, are not kept for good.
        if self.of.len() > 2 * hashes.len() + 64 {
            let present: HashSet<u64> = hashes.iter().copied().collect();
            self.of.retain(|hash, _| present.contains(hash));
        }
        let place = |hash| {
            *self.of.entry(hash).or_insert_with(|| {
                self.next += 1;
                self.next - 1
            })
        };
        hashes.into_iter().map(place).collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn of(places: &mut Places, names: &[String]) -> Vec<u64> {
        places.of(names.iter().map(OsStr::new))
    }

    #[test]
    fn a_name_keeps_its_place_and_no_other_gets_it() {
        let mut places = Places::default();
        let names =
            |range: std::ops::Range<usize>| range.map(|n| n.to_string()).collect::<Vec<_>>();
        assert_eq!(of(&mut places, &names(0..3)), [0, 1, 2]);
        assert_eq!(of(&mut places, &names(2..4)), [2, 3]);
        for round in 0..100 {
            assert_eq!(of(&mut places, &names(3..4)), [3]);
            let passing = names(1000 * (round + 1)..1000 * (round + 1) + 100);
            let found = of(&mut places, &passing);
            assert_eq!(found[0], 4 + 100 * round as u64);
        }
        assert!(places.of.len() < 1000);
    }
}
