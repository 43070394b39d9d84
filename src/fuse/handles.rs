//! Numbers for open files and directories.

use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};

use parking_lot::Mutex;

/// Shards of a table: a power of two.
const SHARDS: usize = 16;

/// The number that stands for no handle at all: the kernel sends it when it was told not to send
/// OPEN, and it is given out where nothing needs to be remembered.
pub const STATELESS: u64 = 0;

/// A table from numbers to open objects. A number is in use by one object at a time, and shard and
/// slot are found in it without a search.
pub struct HandleTable<T> {
    shards: [Mutex<Slab<T>>; SHARDS],
    next: AtomicUsize,
}

struct Slab<T> {
    slots: Vec<Option<Arc<T>>>,
    free: Vec<usize>,
}

impl<T> Default for HandleTable<T> {
    fn default() -> Self {
        Self {
            shards: std::array::from_fn(|_| {
                Mutex::new(Slab {
                    slots: Vec::new(),
                    free: Vec::new(),
                })
            }),
            next: AtomicUsize::new(0),
        }
    }
}

impl<T> HandleTable<T> {
    /// Keeps an object and gives its number, which is never [`STATELESS`].
    pub fn insert(&self, object: Arc<T>) -> u64 {
        let shard = self.next.fetch_add(1, Ordering::Relaxed) % SHARDS;
        let mut slab = self.shards[shard].lock();
        let slot = match slab.free.pop() {
            Some(slot) => {
                slab.slots[slot] = Some(object);
                slot
            }
            None => {
                slab.slots.push(Some(object));
                slab.slots.len() - 1
            }
        };
        (slot * SHARDS + shard) as u64 + 1
    }

    /// The object of that number.
    pub fn get(&self, number: u64) -> Option<Arc<T>> {
        let (shard, slot) = place(number)?;
        self.shards[shard].lock().slots.get(slot)?.clone()
    }

    /// Gives the number free.
    pub fn remove(&self, number: u64) -> Option<Arc<T>> {
        let (shard, slot) = place(number)?;
        let mut slab = self.shards[shard].lock();
        let object = slab.slots.get_mut(slot)?.take()?;
        slab.free.push(slot);
        Some(object)
    }
}

fn place(number: u64) -> Option<(usize, usize)> {
    let index = usize::try_from(number.checked_sub(1)?).ok()?;
    Some((index % SHARDS, index / SHARDS))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn numbers_lead_back_to_their_objects_until_removed() {
        let table = HandleTable::default();
        let numbers: Vec<u64> = (0..100).map(|i| table.insert(Arc::new(i))).collect();
        for (i, number) in numbers.iter().enumerate() {
            assert_ne!(*number, STATELESS);
            assert_eq!(*table.get(*number).unwrap(), i);
        }
        assert_eq!(*table.remove(numbers[7]).unwrap(), 7);
        assert!(table.get(numbers[7]).is_none());
        assert!(table.remove(numbers[7]).is_none());
        assert!(table.get(STATELESS).is_none());
        assert!(table.get(u64::MAX).is_none());
    }

    #[test]
    fn numbers_are_used_again() {
        let table = HandleTable::default();
        for _ in 0..10 * SHARDS {
            let number = table.insert(Arc::new(()));
            assert!(number <= SHARDS as u64);
            table.remove(number);
        }
    }
}
