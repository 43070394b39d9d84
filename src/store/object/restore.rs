//! How objects that are not what they were are replaced.
//!
//! While a restoration is under way an import relies on no object that it has not read: one that does not have its name is
//! taken for missing and brought again. At other times it reads those that were damaged when they were last looked at, and looks
//! for the files of the others. What was replaced leaves the disk with the pack or the file that it was
//! in, whose other objects go into another pack; otherwise the next who reads the tables of all packs might find the bad
//! copy first. Where the pack has to stay, what other packs have goes before it. A bad copy is remembered until it has left the disk, whatever
//! fails meanwhile; of one that a kill has left nobody knows, and whoever finds it damaged reads the next copy.
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

use super::places::Places;
use super::{Live, Objects, Place, Seen};
use crate::store::durable::sync_dir;
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
        self.0.give_back();
    }
}

impl Objects {
    /// Says that a restoration is under way.
    pub(in crate::store) fn restoring(&self) -> Restoring<'_> {
        self.restorations.fetch_add(1, Ordering::AcqRel);
        Restoring(self)
    }

    /// If neither a restoration nor an import is under way: what nothing has come in place of is where it was. Maybe it can be
    /// read another time.
    pub(super) fn give_back(&self) {
        let mut places = self.places.write();
        // Whoever begins one from now on takes nothing away before this is done.
        let relied = self.relied.lock();
        if self.restorations.load(Ordering::Acquire) > 0 || relied.is_importing() {
            return;
        }
        if let Some(places) = &mut *places {
            let mut distrusted = self.distrusted.lock();
            let all = std::mem::take(&mut *distrusted).into_iter();
            let (replaced, rest) = all.partition(|copy| is_replaced(places, copy));
            *distrusted = replaced;
            for (object, place) in rest {
                places.add(object.name, place);
                // What came in place of it may have been collected since.
                self.doubt(object.name);
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

    /// Whether an import that has `seen` packs may rely on the object at `place`. If not, the next copy is where that one was.
    pub(super) fn is_trusted(&self, object: &Object, place: Place, seen: &Seen) -> bool {
        let has_to_read =
            self.restorations.load(Ordering::Acquire) > 0 || self.is_doubted(&object.name);
        let looked = match has_to_read {
            true => self.read_from(object, place, true).map(drop),
            false => self.look_for(object, seen),
        };
        match looked {
            Ok(()) => {
                if has_to_read {
                    self.trust(&object.name);
                }
                return true;
            }
            Err(error) if error.is_exhaustion() => {}
            Err(_) => self.doubt(object.name),
        }
        self.distrust(object, place);
        false
    }

    fn distrust(&self, object: &Object, place: Place) {
        if let Some(places) = &mut *self.places.write()
            && places.take_away(&object.name, place)
        {
            self.distrusted.lock().push((*object, place));
        }
    }

    /// Reads all copies of an object and compares them with its name; the first good one is where it is read from then. Fails if
    /// there is none.
    pub(in crate::store) fn read_copies(&self, object: &Object) -> Result<()> {
        let copies = self.copies(&object.name);
        if let [] | [_] = copies[..] {
            return self.read(object, copies.first().copied(), true).map(drop);
        }
        let mut failed = Vec::new();
        for place in &copies {
            let read = self.read_from(object, *place, true);
            failed.extend(read.err().map(|error| (*place, error)));
        }
        if failed.len() == copies.len() {
            return failed
                .into_iter()
                .next()
                .map_or(Ok(()), |(_, error)| Err(error));
        }
        for (place, error) in failed {
            if !error.is_exhaustion() && !error.is_not_found() {
                self.distrust(object, place);
            } else if let Some(places) = &mut *self.places.write()
                && places.take_away(&object.name, place)
                && error.is_exhaustion()
            {
                // It may be good.
                places.add(object.name, place);
            }
        }
        Ok(())
    }

    /// Has each of these be read from a good copy of it, and forgets the others. Says whether all have one.
    pub(super) fn settle(&self, objects: &[Object]) -> Result<bool> {
        for object in objects {
            match self.read_copies(object) {
                Ok(()) => {}
                Err(error) if error.is_exhaustion() => return Err(error),
                Err(_) => return Ok(false),
            }
            if let Some(places) = &mut *self.places.write() {
                places.forget_others(&object.name, |_| true);
            }
        }
        Ok(true)
    }

    /// Copies that were not what they were, beside which there are others.
    fn replaced(&self) -> Vec<(Object, Place)> {
        let places = self.places.read();
        let distrusted = self.distrusted.lock();
        let replaced = distrusted.iter().filter(|copy| {
            let places = places.as_ref();
            places.is_some_and(|places| is_replaced(places, copy))
        });
        replaced.copied().collect()
    }

    /// What is to leave the disk with the next [`purge`](Self::purge).
    pub(in crate::store) fn bad_copies(&self) -> Vec<Error> {
        let replaced = self.replaced().into_iter();
        let told = replaced.map(|(object, place)| {
            let path = match place {
                Place::Packed { pack, .. } => self.pack_path(pack),
                Place::File => self.path_of(&object.name),
            };
            Error::Duplicate {
                path,
                object: object.name.to_string(),
            }
        });
        told.collect()
    }

    /// Whether something is to leave the disk.
    pub(in crate::store) fn has_bad_copies(&self) -> bool {
        !self.replaced().is_empty()
    }

    /// Takes bad copies off the disk beside which there are good ones. To be called while no collection is under way. What could
    /// not be done the next call tries again.
    pub(in crate::store) fn purge(&self, tmp: &Path, level: i32) -> Result<()> {
        let replaced = self.replaced();
        if replaced.is_empty() {
            return Ok(());
        }
        // What is kept of a pack is read, and what takes the place of a file.
        let _restoring = self.restoring();
        let mut done = Ok(());
        let mut packs = BTreeSet::new();
        for (object, place) in &replaced {
            match place {
                Place::Packed { pack, .. } => drop(packs.insert(*pack)),
                Place::File => done = done.and(self.purge_file(object)),
            }
        }
        for id in packs {
            let purged = self.purge_pack(id, tmp, level).map(|()| {
                // Also where it has to stay: who reads the tables of all packs finds first what others have.
                self.forget_bad(|copy| copy.1.is_in(id) && replaced.contains(copy));
            });
            done = done.and(purged);
        }
        done
    }

    fn purge_file(&self, object: &Object) -> Result<()> {
        match self.find(&object.name)? {
            // Another file has taken its place.
            Some(Place::File) => {}
            Some(place) if self.is_trusted(object, place, &Seen::default()) => {
                let path = self.path_of(&object.name);
                remove(&path)?;
                if let Some(dir) = path.parent() {
                    sync_dir(dir).map_err(io_error("make durable", dir))?;
                }
            }
            _ => return Ok(()),
        }
        self.forget_bad(|copy| *copy == (*object, Place::File));
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

    /// Forgets bad copies that have left the disk.
    pub(super) fn forget_bad(&self, of: impl Fn(&(Object, Place)) -> bool) {
        self.distrusted.lock().retain(|copy| !of(copy));
    }

    /// Writes what is sound in a pack into another one and removes it, while a restoration is under way.
    fn replace_pack(&self, id: PackId, found: Found, tmp: &Path, level: i32) -> Result<()> {
        let mut keep = Vec::new();
        for (object, slot) in found.objects {
            let here = Place::packed(id, slot);
            let others = self.copies(&object.name).into_iter();
            let mut others = others.filter(|place| *place != here);
            if others.any(|other| self.is_trusted(&object, other, &Seen::default())) {
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
            places.retain(|_, place| !place.is_in(id));
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
        let places = self.places.read();
        let slots = places.as_ref().map(|places| places.slots_in(id));
        slots.unwrap_or_default()
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

/// Whether an object is to be found elsewhere than at a place that it was taken away from.
fn is_replaced(places: &Places, (object, place): &(Object, Place)) -> bool {
    let known = places.get(&object.name);
    known.is_some_and(|known| known != *place)
}

pub(super) fn remove(path: &Path) -> Result<()> {
    match fs::remove_file(path) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => {
            Err(io_error("remove", path)(error))
        }
        _ => Ok(()),
    }
}
