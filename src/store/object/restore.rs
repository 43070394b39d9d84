//! How objects that are not what they were are replaced.
//!
//! While a restoration is under way an import relies on no object that it has not read: one that does not have its name is
//! taken for missing and brought again. At other times it reads those that were damaged when they were last looked at, and looks
//! for the files of the others. What was replaced leaves the disk with the pack or the file that it was
//! in, whose other objects go into another pack; otherwise the next who reads the tables of all packs might find the bad
//! copy first. Where the pack has to stay, what other packs have goes before it.
//!
//! A pack whose header or table is damaged is written anew, too: what is sound in it, each object compared with its name. It
//! goes when that is durable and, where only its table could tell what else was in it, when no object that a layer
//! needs is missing: views may still know where in it such a one lies.

use std::cell::LazyCell;
use std::collections::BTreeSet;
use std::fs::{self, File};
use std::io;
use std::path::{Path, PathBuf};
use std::sync::atomic::Ordering;

use super::{Live, Objects, Place};
use crate::store::error::{Error, Result, damaged, io_error};
use crate::store::format::ObjectName;
use crate::store::format::tables::Object;
use crate::store::pack::{self, Found, PackId, Slot};

/// A restoration is under way.
#[derive(Debug)]
pub(in crate::store) struct Restoring<'a>(&'a Objects);

impl Drop for Restoring<'_> {
    fn drop(&mut self) {
        self.0.restorations.fetch_sub(1, Ordering::AcqRel);
        let is_importing = self.0.relied.lock().is_importing();
        if !is_importing {
            self.0.give_back();
        }
    }
}

impl Objects {
    /// Says that a restoration is under way.
    pub(in crate::store) fn restoring(&self) -> Restoring<'_> {
        self.restorations.fetch_add(1, Ordering::AcqRel);
        Restoring(self)
    }

    /// Once neither a restoration nor an import is under way: what nothing has come in place of is where it was. Maybe it can be
    /// read another time.
    pub(super) fn give_back(&self) {
        if self.restorations.load(Ordering::Acquire) > 0 {
            return;
        }
        let mut places = self.places.write();
        let distrusted = std::mem::take(&mut *self.distrusted.lock());
        if let Some(places) = &mut *places {
            for (name, place) in distrusted {
                places.entry(name).or_insert(place);
            }
        }
    }

    /// Whether an object was damaged or missing when it was last looked at.
    pub(in crate::store) fn is_doubted(&self, name: &ObjectName) -> bool {
        self.doubted.lock().contains(name)
    }

    /// Remembers that an object is damaged or missing.
    pub(in crate::store) fn doubt(&self, name: ObjectName) {
        self.doubted.lock().insert(name);
    }

    /// Remembers that an object is what it was.
    pub(in crate::store) fn trust(&self, name: &ObjectName) {
        self.doubted.lock().remove(name);
    }

    /// These are where somebody has put them. Nobody has read them, so those that were damaged or missing are read before they are
    /// relied on.
    pub(super) fn note_put_back(&self, names: &[ObjectName]) {
        let doubted = self.doubted.lock();
        if names.iter().any(|name| doubted.contains(name)) {
            self.healed.store(true, Ordering::Release);
        }
    }

    /// These are in the store now, and are what was read of a layer.
    pub(super) fn note_brought(&self, names: &[ObjectName]) {
        let mut doubted = self.doubted.lock();
        // Each of them is looked at.
        let healed = names.iter().filter(|name| doubted.remove(name)).count();
        if healed > 0 {
            self.healed.store(true, Ordering::Release);
        }
    }

    /// Whether something was brought anew that was damaged or missing, since this was last asked.
    pub(in crate::store) fn take_healed(&self) -> bool {
        self.healed.swap(false, Ordering::AcqRel)
    }

    /// Whether an import may rely on the object at `place`.
    pub(super) fn is_trusted(&self, object: &Object, place: Place) -> bool {
        let has_to_read =
            self.restorations.load(Ordering::Acquire) > 0 || self.is_doubted(&object.name);
        let is_good = match has_to_read {
            true => self.read_from(object, place, true).is_ok(),
            false => self.look_for(object).is_ok(),
        };
        if is_good {
            if has_to_read {
                self.trust(&object.name);
            }
            return true;
        }
        self.doubt(object.name);
        if let Some(places) = &mut *self.places.write()
            && places.get(&object.name) == Some(&place)
        {
            places.remove(&object.name);
            self.distrusted.lock().push((object.name, place));
        }
        false
    }

    /// Takes off the disk what was replaced by restorations and imports that are under way. To be called while no collection is.
    pub(in crate::store) fn purge(&self, tmp: &Path, level: i32) -> Result<()> {
        // What is kept of a pack is read.
        let _restoring = self.restoring();
        let replaced: Vec<(ObjectName, Place)> = {
            let places = self.places.read();
            let known = |name: &ObjectName| {
                let places = places.as_ref();
                places.is_some_and(|places| places.contains_key(name))
            };
            let mut distrusted = self.distrusted.lock();
            let (replaced, rest) = distrusted.drain(..).partition(|(name, _)| known(name));
            *distrusted = rest;
            replaced
        };
        let mut packs = BTreeSet::new();
        for (name, was) in replaced {
            match was {
                Place::Packed { pack, .. } => {
                    packs.insert(pack);
                }
                Place::File if self.find(&name)? != Some(Place::File) => {
                    let path = self.path_of(&name);
                    remove(&path)?;
                }
                // Another file has taken its place.
                Place::File => {}
            }
        }
        for id in packs {
            self.purge_pack(id, tmp, level)?;
        }
        Ok(())
    }

    fn purge_pack(&self, id: PackId, tmp: &Path, level: i32) -> Result<()> {
        let found = match self.look_into(id) {
            Err(error) if error.is_not_found() => return Ok(()),
            // It has to stay, too.
            Err(Error::Unsupported { .. }) => return Ok(()),
            found => found?,
        };
        if found.has_table && found.unknown_features() == 0 {
            self.replace_pack(id, found, tmp, level)?;
        }
        Ok(())
    }

    /// Writes what is sound in a pack into another one and removes it, while a restoration is under way.
    fn replace_pack(&self, id: PackId, found: Found, tmp: &Path, level: i32) -> Result<()> {
        let mut keep = Vec::new();
        for (object, slot) in found.objects {
            let here = Place::packed(id, slot);
            if let Some(other) = self.find(&object.name)?
                && other != here
                && self.is_trusted(&object, other)
            {
                continue;
            }
            match self.read_from(&object, here, true) {
                Ok(_) => keep.push((object, slot)),
                // There is nothing in it to be kept.
                Err(Error::Damaged { .. }) => {}
                Err(error) => return Err(error),
            }
        }
        if !keep.is_empty() {
            self.write_anew(id, &keep, tmp, level)?;
        }
        self.forget_pack(id);
        self.remove_pack(id)
    }

    /// Nothing is in the pack any more.
    pub(super) fn forget_pack(&self, id: PackId) {
        if let Some(places) = &mut *self.places.write() {
            places.retain(|_, place| slot_in(id)(place).is_none());
        }
    }

    /// What is in a pack: also what was known to be, where its table is damaged.
    pub(super) fn look_into(&self, id: PackId) -> Result<Found> {
        let mut found = pack::look_into(&self.pack_path(id), id)?;
        if !found.has_table {
            let file = self.pack(id, true)?;
            let objects = &mut found.objects;
            objects.extend(self.known_in(id, &file)?);
            objects.sort_unstable_by_key(|(_, slot)| slot.offset);
            objects.dedup_by_key(|(_, slot)| slot.offset);
        }
        Ok(found)
    }

    /// Where objects are known to be in a pack, from its start on.
    pub(super) fn slots_of(&self, id: PackId) -> Vec<Slot> {
        let mut known: Vec<Slot> = match &*self.places.read() {
            Some(places) => places.values().filter_map(slot_in(id)).collect(),
            None => Vec::new(),
        };
        known.sort_unstable_by_key(|slot| slot.offset);
        known
    }

    /// The objects that are known to be in a pack and have sound headers in `file`.
    pub(super) fn known_in(&self, id: PackId, file: &File) -> Result<Vec<(Object, Slot)>> {
        let path = self.pack_path(id);
        let mut objects = Vec::new();
        for slot in self.slots_of(id) {
            let found = pack::object_at(file, slot).map_err(io_error("read", &path))?;
            objects.extend(found.map(|object| (object, slot)));
        }
        Ok(objects)
    }

    /// Replaces packs whose header or table is damaged; `needed` answers what the layers need, if that can be told. To be
    /// called while no collection is under way, and a restoration is. Answers what they were, and what could not be done.
    pub(in crate::store) fn mend_packs(
        &self,
        needed: impl FnOnce() -> Option<Live>,
        tmp: &Path,
        level: i32,
    ) -> Result<Vec<Result<PathBuf>>> {
        let needed = LazyCell::new(needed);
        let is_there = || needed.as_ref().is_some_and(|live| self.has_all(live));
        let mend = |id| {
            let found = match self.look_into(id) {
                // Whoever needs something of it is told.
                Err(Error::Unsupported { .. }) => return Ok(None),
                found => found?,
            };
            let Some(problem) = found.problem() else {
                return Ok(None);
            };
            if found.unknown_features() != 0 {
                return Err(needs_newer(&self.pack_path(id), &found, &problem));
            }
            if !(found.has_table || is_there()) {
                return Ok(None);
            }
            self.replace_pack(id, found, tmp, level)?;
            Ok(Some(self.pack_path(id)))
        };
        let packs = self.all_packs()?.into_iter();
        Ok(packs.filter_map(|id| mend(id).transpose()).collect())
    }

    /// What is wrong with packs themselves, whatever the objects in them are.
    pub(in crate::store) fn pack_problems(&self) -> Result<Vec<Error>> {
        let problem = |id| {
            let path = self.pack_path(id);
            match pack::look_into(&path, id) {
                // Collected since they were listed.
                Err(error) if error.is_not_found() => None,
                Err(error) => Some(error),
                Ok(found) => found
                    .problem()
                    .map(|problem| match found.unknown_features() {
                        0 => damaged(&path, problem),
                        _ => needs_newer(&path, &found, &problem),
                    }),
            }
        };
        Ok(self.all_packs()?.into_iter().filter_map(problem).collect())
    }
}

/// What is said of a damaged pack with features that forbid this release to write it anew.
fn needs_newer(path: &Path, found: &Found, problem: &str) -> Error {
    Error::Unsupported {
        path: path.to_owned(),
        problem: format!(
            "{problem}, and this one may not write it anew for its features {:#x}",
            found.unknown_features()
        ),
    }
}

/// Where in the pack `id` a place is, if it is there.
fn slot_in(id: PackId) -> impl Fn(&Place) -> Option<Slot> {
    move |place| match *place {
        Place::Packed {
            pack,
            offset,
            stored,
        } if pack == id => Some(Slot { offset, stored }),
        _ => None,
    }
}

pub(super) fn remove(path: &Path) -> Result<()> {
    match fs::remove_file(path) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => {
            Err(io_error("remove", path)(error))
        }
        _ => Ok(()),
    }
}
