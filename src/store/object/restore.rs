//! How objects that are not what they were are replaced.
//!
//! While a restoration is under way an import relies on no object that it has not read: one that does not have its name is
//! taken for missing and brought again. What was replaced leaves the disk with the pack or the file that it was
//! in, whose other objects go into another pack; otherwise the next who reads the tables of all packs might find the bad
//! copy first.

use std::collections::BTreeSet;
use std::fs;
use std::io;
use std::path::Path;
use std::sync::atomic::Ordering;

use super::{Objects, Place};
use crate::store::durable::sync_dir;
use crate::store::error::{Error, Result, io_error};
use crate::store::format::ObjectName;
use crate::store::format::tables::Object;
use crate::store::pack::{self, PackId, Slot};

/// A restoration is under way.
#[derive(Debug)]
pub(in crate::store) struct Restoring<'a>(&'a Objects);

impl Drop for Restoring<'_> {
    fn drop(&mut self) {
        if self.0.restorations.fetch_sub(1, Ordering::AcqRel) > 1 {
            return;
        }
        // What nothing has come in place of is where it was: maybe it can be read another time.
        let distrusted = std::mem::take(&mut *self.0.distrusted.lock());
        if let Some(places) = &mut *self.0.places.write() {
            for (name, place) in distrusted {
                places.entry(name).or_insert(place);
            }
        }
    }
}

impl Objects {
    /// Says that a restoration is under way.
    pub(in crate::store) fn restoring(&self) -> Restoring<'_> {
        self.restorations.fetch_add(1, Ordering::AcqRel);
        Restoring(self)
    }

    /// Whether an import may rely on the object at `place`.
    pub(super) fn is_trusted(&self, object: &Object, place: Place) -> bool {
        if self.restorations.load(Ordering::Acquire) == 0
            || self.read_from(object, place, true).is_ok()
        {
            return true;
        }
        if let Some(places) = &mut *self.places.write()
            && places.get(&object.name) == Some(&place)
        {
            places.remove(&object.name);
            self.distrusted.lock().push((object.name, place));
        }
        false
    }

    /// Takes what was replaced since the restoration began off the disk. To be called while no collection is under way.
    pub(in crate::store) fn purge(&self, tmp: &Path, level: i32) -> Result<()> {
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
        let path = self.pack_path(id);
        let objects = match pack::objects_of(&path, id) {
            Ok(objects) => objects,
            // Who opens the store finds nothing in it; what was found before can still be read.
            Err(Error::Damaged { .. }) => self.known_in(id)?,
            Err(Error::Io { source, .. }) if source.kind() == io::ErrorKind::NotFound => {
                return Ok(());
            }
            Err(error) => return Err(error),
        };
        let mut keep = Vec::new();
        for (object, slot) in objects {
            let place = Place::Packed {
                pack: id,
                offset: slot.offset,
                stored: slot.stored,
            };
            if self.find(&object.name)? != Some(place) {
                continue;
            }
            match self.read_from(&object, place, true) {
                Ok(_) => keep.push((object, slot)),
                // Another layer's, whose turn is still to come; there is nothing in it to be kept.
                Err(Error::Damaged { .. }) => {}
                Err(error) => return Err(error),
            }
        }
        if !keep.is_empty() {
            self.write_anew(id, &keep, tmp, level)?;
        }
        if let Some(places) = &mut *self.places.write() {
            places.retain(|_, place| slot_in(id)(place).is_none());
        }
        remove(&path)?;
        self.open.lock().retain(|(known, _)| *known != id);
        sync_dir(&self.packs).map_err(io_error("make durable", &self.packs))
    }

    /// The objects that are known to be in a pack and have sound headers there.
    fn known_in(&self, id: PackId) -> Result<Vec<(Object, Slot)>> {
        let path = self.pack_path(id);
        let mut known: Vec<Slot> = match &*self.places.read() {
            Some(places) => places.values().filter_map(slot_in(id)).collect(),
            None => Vec::new(),
        };
        known.sort_unstable_by_key(|slot| slot.offset);
        let file = self.pack(id, &path)?;
        let mut objects = Vec::new();
        for slot in known {
            let found = pack::object_at(&file, slot).map_err(io_error("read", &path))?;
            objects.extend(found.map(|object| (object, slot)));
        }
        Ok(objects)
    }

    /// Removes packs that do not begin as one and have nothing that is known. To be called while no collection is under
    /// way. Answers what they were.
    pub(in crate::store) fn remove_unusable_packs(&self) -> Result<Vec<std::path::PathBuf>> {
        let mut removed = Vec::new();
        for id in self.all_packs()? {
            let path = self.pack_path(id);
            let Err(Error::Damaged { .. }) = pack::objects_of(&path, id) else {
                continue;
            };
            let known = match &*self.places.read() {
                Some(places) => places.values().any(|place| slot_in(id)(place).is_some()),
                None => true,
            };
            if !known {
                remove(&path)?;
                removed.push(path);
            }
        }
        Ok(removed)
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

fn remove(path: &Path) -> Result<()> {
    match fs::remove_file(path) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => {
            Err(io_error("remove", path)(error))
        }
        _ => Ok(()),
    }
}
