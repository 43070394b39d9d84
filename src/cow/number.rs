//! Inode numbers of the union: the number space of a layer and the object's number in it, packed into
//! one 64-bit number as kernel overlayfs does with `xino=on`.
//!
//! The space's index lies in the highest bits, just as many as there are spaces, so that on one host
//! file system the numbers are the host's own. What does not fit gets a number from a table, in the
//! range of one index that no space has.

use std::collections::HashMap;

use parking_lot::Mutex;

use super::types::NodeId;

/// Packs numbers.
pub(super) struct Numbers {
    /// Number spaces (device numbers) by index.
    spaces: Vec<u64>,
    /// Bits of an object's own number.
    bits: u32,
    allotted: Mutex<Allotted>,
}

#[derive(Default)]
struct Allotted {
    by_object: HashMap<(u64, u64), u64>,
    last: u64,
}

impl Numbers {
    /// `spaces` in a stable order, the upper's first; duplicates are ignored.
    pub(super) fn new(spaces: impl IntoIterator<Item = u64>) -> Self {
        let mut distinct = Vec::new();
        for space in spaces {
            if !distinct.contains(&space) {
                distinct.push(space);
            }
        }
        // One index more than there are spaces, for the table.
        let indices = distinct.len() as u64 + 1;
        let index_bits = u64::BITS - (indices - 1).leading_zeros();
        Self {
            spaces: distinct,
            bits: u64::BITS - index_bits.max(1),
            allotted: Mutex::default(),
        }
    }

    /// The number of an object, the same whenever it is asked for.
    pub(super) fn of(&self, space: u64, ino: u64) -> NodeId {
        let index = self.spaces.iter().position(|known| *known == space);
        if let Some(index) = index
            && ino >> self.bits == 0
        {
            let number = (index as u64) << self.bits | ino;
            if number > NodeId::ROOT.0 {
                return NodeId(number);
            }
        }
        let mut allotted = self.allotted.lock();
        if let Some(number) = allotted.by_object.get(&(space, ino)) {
            return NodeId(*number);
        }
        let number = self.next(&mut allotted);
        allotted.by_object.insert((space, ino), number.0);
        number
    }

    /// The own number of the object of a space that has this one; `None` if it is none of that space.
    pub(super) fn in_space(&self, space: u64, id: NodeId) -> Option<u64> {
        let index = (id.0 >> self.bits) as usize;
        match self.spaces.get(index) {
            Some(known) => (*known == space).then_some(id.0 & ((1 << self.bits) - 1)),
            None => {
                let allotted = self.allotted.lock();
                let found = allotted.by_object.iter().find(|(_, id_of)| **id_of == id.0);
                let (of, ino) = found?.0;
                (*of == space).then_some(*ino)
            }
        }
    }

    /// A number that no object has.
    pub(super) fn fresh(&self) -> NodeId {
        self.next(&mut self.allotted.lock())
    }

    fn next(&self, allotted: &mut Allotted) -> NodeId {
        allotted.last += 1;
        NodeId((self.spaces.len() as u64) << self.bits | allotted.last)
    }

    /// The index of a number space.
    pub(super) fn index_of(&self, space: u64) -> Option<u32> {
        let index = self.spaces.iter().position(|known| *known == space)?;
        u32::try_from(index).ok()
    }

    /// The number space with an index.
    pub(super) fn space(&self, index: u32) -> Option<u64> {
        self.spaces.get(index as usize).copied()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn on_one_file_system_numbers_are_the_hosts() {
        let numbers = Numbers::new([10, 10]);
        assert_eq!(numbers.of(10, 77), NodeId(77));
    }

    #[test]
    fn no_two_objects_share_a_number_and_none_is_the_roots() {
        let numbers = Numbers::new([10, 11, 12]);
        let mut seen = std::collections::HashSet::from([NodeId(0), NodeId::ROOT]);
        for space in [10, 11, 12, 13] {
            for ino in [0, 1, 2, u64::MAX, u64::MAX >> 2, (u64::MAX >> 2) + 1] {
                let number = numbers.of(space, ino);
                assert_eq!(numbers.of(space, ino), number);
                assert_eq!(numbers.in_space(space, number), Some(ino));
                assert_eq!(numbers.in_space(space + 1, number), None);
                assert!(seen.insert(number), "{space} {ino}");
            }
        }
        assert!(seen.insert(numbers.fresh()));
    }
}
