//! A bounded cache of descriptors. Objects hold a [`Slot`] each; the [`Budget`] they share empties the
//! slots that were not used for longest, so that any number of files gets by with few descriptors.

use std::collections::VecDeque;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::{Arc, OnceLock, Weak};

use parking_lot::Mutex;

/// How many descriptors may be kept, and which slots hold one.
pub(super) struct Budget {
    limit: usize,
    held: AtomicUsize,
    /// The hand of a clock: slots in the order in which they were filled, each once. Some may have been emptied since.
    ring: Mutex<VecDeque<Weak<dyn Evict>>>,
}

trait Evict: Send + Sync {
    fn is_filled(&self) -> bool;
    /// Whether it is in the ring; changes with that locked alone.
    fn listed(&self) -> &AtomicBool;
    /// Whether it was used since it was last asked.
    fn was_used(&self) -> bool;
    fn evict(&self);
}

impl Budget {
    /// A budget of `limit` descriptors.
    pub(super) fn new(limit: usize) -> Arc<Self> {
        Arc::new(Self {
            limit: limit.max(8),
            held: AtomicUsize::new(0),
            ring: Mutex::new(VecDeque::new()),
        })
    }

    fn filled(&self, filled: &Arc<impl Evict + 'static>) {
        self.held.fetch_add(1, Ordering::Relaxed);
        let mut victims = Vec::new();
        {
            let mut ring = self.ring.lock();
            if !filled.listed().swap(true, Ordering::Relaxed) {
                let slot: Weak<dyn Evict> = Arc::downgrade(filled) as Weak<dyn Evict>;
                ring.push_back(slot);
            }
            // No more than are held stay, so the next time is far off.
            if ring.len() > 2 * self.limit {
                ring.retain(|slot| {
                    let cell = slot.upgrade().filter(still_filled);
                    cell.is_some()
                });
            }
            let over = self.held.load(Ordering::Relaxed).saturating_sub(self.limit);
            let mut turns = 2 * ring.len();
            while victims.len() < over && turns > 0 {
                turns -= 1;
                let Some(slot) = ring.pop_front() else { break };
                let Some(cell) = slot.upgrade().filter(still_filled) else {
                    continue;
                };
                if cell.was_used() {
                    ring.push_back(slot);
                } else {
                    cell.listed().store(false, Ordering::Relaxed);
                    victims.push(cell);
                }
            }
        }
        // Closing may take time; nobody waits for it.
        for victim in victims {
            victim.evict();
        }
    }

    fn emptied(&self) {
        self.held.fetch_sub(1, Ordering::Relaxed);
    }

    /// Descriptors held at this moment.
    #[cfg(test)]
    pub(super) fn held(&self) -> usize {
        self.held.load(Ordering::Relaxed)
    }
}

/// Whether a slot is to stay in the ring, which is locked; it is told if it is not.
fn still_filled(cell: &Arc<dyn Evict>) -> bool {
    let is_filled = cell.is_filled();
    if !is_filled {
        cell.listed().store(false, Ordering::Relaxed);
    }
    is_filled
}

struct Cell<T> {
    value: Mutex<Option<Arc<T>>>,
    used: AtomicBool,
    listed: AtomicBool,
    budget: Arc<Budget>,
}

impl<T: Send + Sync> Evict for Cell<T> {
    fn is_filled(&self) -> bool {
        self.value.lock().is_some()
    }

    fn listed(&self) -> &AtomicBool {
        &self.listed
    }

    fn was_used(&self) -> bool {
        self.used.swap(false, Ordering::Relaxed)
    }

    fn evict(&self) {
        let taken = self.value.lock().take();
        if taken.is_some() {
            self.budget.emptied();
        }
    }
}

impl<T> Drop for Cell<T> {
    fn drop(&mut self) {
        if self.value.get_mut().is_some() {
            self.budget.emptied();
        }
    }
}

/// Where one object keeps its descriptor while the budget lasts.
pub(super) struct Slot<T>(OnceLock<Arc<Cell<T>>>);

impl<T> Default for Slot<T> {
    fn default() -> Self {
        Self(OnceLock::new())
    }
}

impl<T: Send + Sync + 'static> Slot<T> {
    /// What is in it.
    pub(super) fn get(&self) -> Option<Arc<T>> {
        let cell = self.0.get()?;
        let value = cell.value.lock().clone()?;
        cell.used.store(true, Ordering::Relaxed);
        Some(value)
    }

    /// Puts a descriptor in, in place of what was there.
    pub(super) fn set(&self, budget: &Arc<Budget>, value: Arc<T>) {
        let cell = self.0.get_or_init(|| {
            Arc::new(Cell {
                value: Mutex::new(None),
                used: AtomicBool::new(false),
                listed: AtomicBool::new(false),
                budget: Arc::clone(budget),
            })
        });
        let before = cell.value.lock().replace(value);
        if before.is_none() {
            budget.filled(cell);
        }
    }

    /// Empties it.
    pub(super) fn clear(&self) {
        if let Some(cell) = self.0.get() {
            cell.evict();
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn never_more_than_the_budget_is_held_and_the_used_ones_stay() {
        let budget = Budget::new(16);
        let slots: Vec<Slot<usize>> = (0..1000).map(|_| Slot::default()).collect();
        slots[0].set(&budget, Arc::new(0));
        for (n, slot) in slots.iter().enumerate().skip(1) {
            slot.set(&budget, Arc::new(n));
            assert!(slots[0].get().is_some());
            assert!(budget.held() <= 16);
        }
        drop(slots);
        assert_eq!(budget.held(), 0);
    }

    /// They stayed in the ring, all of which was gone through for each file that was opened once it was long.
    #[test]
    fn slots_that_were_emptied_leave_the_ring() {
        let budget = Budget::new(16);
        let slots: Vec<Slot<usize>> = (0..1000).map(|_| Slot::default()).collect();
        let fill = |slot: &Slot<usize>| slot.set(&budget, Arc::new(0));
        for slot in slots.iter().chain(&slots) {
            fill(slot);
            slot.clear();
            assert!(budget.ring.lock().len() <= 2 * budget.limit);
        }
        for _ in 0..1000 {
            fill(&slots[0]);
            slots[0].clear();
        }
        for slot in &slots {
            fill(slot);
            assert!(budget.held() <= 16 && budget.ring.lock().len() <= 2 * budget.limit);
        }
        let filled = slots.iter().filter(|slot| slot.get().is_some()).count();
        assert_eq!(filled, budget.held());
    }
}
