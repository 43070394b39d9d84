//! Where objects lie: each in one place that it is read from, and a few in others as well.
//!
//! Two copies of an object are what is left of a pack that was being written anew when plyd was killed, or of a bad copy that
//! was to leave the disk once a good one was there; or two imports have brought it at the same time. Nobody knows which of them is
//! good before they are read. So the others are remembered: whoever finds one damaged reads the next.

use std::collections::{HashMap, HashSet};

use super::{Objects, Place, names};
use crate::store::error::{Error, Result};
use crate::store::format::ObjectName;
use crate::store::pack::{self, PackId, Slot};

/// Where objects lie.
#[derive(Debug, Default)]
pub(super) struct Places {
    first: HashMap<ObjectName, Place>,
    /// Further copies of those that have some, which are few.
    others: HashMap<ObjectName, Vec<Place>>,
}

impl Places {
    /// Where an object is read from.
    pub(super) fn get(&self, name: &ObjectName) -> Option<Place> {
        self.first.get(name).copied()
    }

    /// Whether it is known where an object lies.
    pub(super) fn has(&self, name: &ObjectName) -> bool {
        self.first.contains_key(name)
    }

    /// Where further copies of it lie.
    pub(super) fn others(&self, name: &ObjectName) -> &[Place] {
        self.others.get(name).map_or(&[], Vec::as_slice)
    }

    /// Adds a copy, which is read where none before it can be.
    pub(super) fn add(&mut self, name: ObjectName, place: Place) {
        match self.get(&name) {
            None => drop(self.first.insert(name, place)),
            Some(first) if first == place || self.others(&name).contains(&place) => {}
            Some(_) => self.others.entry(name).or_default().push(place),
        }
    }

    /// A copy that was just written is read before all others.
    pub(super) fn bring(&mut self, name: ObjectName, place: Place) {
        self.forget_others(&name, |other| other == place);
        self.first.insert(name, place);
    }

    /// Forgets one copy; the next takes its place. Says whether it was known.
    pub(super) fn take_away(&mut self, name: &ObjectName, place: Place) -> bool {
        if self.get(name) != Some(place) {
            let before = self.others(name).len();
            self.forget_others(name, |other| other == place);
            return self.others(name).len() < before;
        }
        self.first.remove(name);
        if let Some(next) = self.others(name).first().copied() {
            self.bring(*name, next);
        }
        true
    }

    /// Forgets further copies.
    pub(super) fn forget_others(&mut self, name: &ObjectName, of: impl Fn(Place) -> bool) {
        if let Some(others) = self.others.get_mut(name) {
            others.retain(|place| !of(*place));
            if others.is_empty() {
                self.others.remove(name);
            }
        }
    }

    /// Forgets all copies but those that `keep` says.
    pub(super) fn retain(&mut self, keep: impl Fn(&ObjectName, Place) -> bool) {
        let gone = self.all().filter(|(name, place)| !keep(name, *place));
        let gone: Vec<_> = gone.map(|(name, place)| (*name, place)).collect();
        for (name, place) in gone {
            self.take_away(&name, place);
        }
    }

    /// All copies.
    pub(super) fn all(&self) -> impl Iterator<Item = (&ObjectName, Place)> {
        let others = self.others.iter();
        let others =
            others.flat_map(|(name, places)| places.iter().map(move |place| (name, *place)));
        let first = self.first.iter().map(|(name, place)| (name, *place));
        first.chain(others)
    }

    /// The packs that any lie in.
    pub(super) fn packs(&self) -> HashSet<PackId> {
        self.all().filter_map(|(_, place)| place.pack()).collect()
    }

    /// Where any lie in a pack, from its start on.
    pub(super) fn slots_in(&self, id: PackId) -> Vec<Slot> {
        let mut slots: Vec<Slot> = self
            .all()
            .filter_map(|(_, place)| match place {
                Place::Packed {
                    pack,
                    offset,
                    stored,
                } if pack == id => Some(Slot { offset, stored }),
                _ => None,
            })
            .collect();
        slots.sort_unstable_by_key(|slot| slot.offset);
        slots
    }
}

impl Objects {
    /// All copies of an object, as far as they are known, the one that it is read from first.
    pub(super) fn copies(&self, name: &ObjectName) -> Vec<Place> {
        match &*self.places.read() {
            Some(places) => places
                .get(name)
                .into_iter()
                .chain(places.others(name).iter().copied())
                .collect(),
            None => Vec::new(),
        }
    }

    /// Reads the tables of all packs and the names of all files.
    pub(super) fn load(&self) -> Result<Places> {
        *self.read_at.lock() = self.changed_at();
        let mut places = Places::default();
        for dir in self.file_dirs()? {
            for name in self.files_in(&dir)? {
                places.add(name, Place::File);
            }
        }
        // A repair may have had to leave a bad copy in a pack that is not whole; the good one is in another then.
        let mut last = Vec::new();
        for name in names(&self.packs)? {
            let Some(id) = PackId::of_file(&name) else {
                continue;
            };
            let path = self.packs.join(&name);
            match pack::look_into(&path, id) {
                Ok(found) => {
                    let problem = found.problem();
                    if let Some(problem) = &problem {
                        tracing::warn!(path = %path.display(), found = found.objects.len(), "a pack is damaged: {problem}");
                    }
                    let is_whole = problem.is_none() && found.features == Some(0);
                    let found = found.objects.into_iter();
                    let found = found.map(|(object, slot)| (object.name, Place::packed(id, slot)));
                    match is_whole {
                        true => found.for_each(|(name, place)| places.add(name, place)),
                        false => last.extend(found),
                    }
                }
                // Collected since they were listed.
                Err(error) if error.is_not_found() => {}
                // The others can be used; whoever needs something of this one is told.
                Err(error @ Error::Unsupported { .. }) => {
                    tracing::warn!(%error, "a pack cannot be used");
                }
                Err(error) => return Err(error),
            }
        }
        for (name, place) in last {
            places.add(name, place);
        }
        Ok(places)
    }
}
