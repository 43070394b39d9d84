//! Packs and files that somebody has put back into their places since they were looked for.

use std::collections::HashSet;
use std::path::PathBuf;

use super::{Objects, Place, Seen};
use crate::store::error::{Error, Result};
use crate::store::format::ObjectName;
use crate::store::format::tables::Object;
use crate::store::pack::{self, PackId, Slot};

impl Objects {
    /// Finds what is in packs and files of which nothing is known, as they were not there when the places were read. Of an object that
    /// is known elsewhere the copy here counts only if it is good and the other is not there. To be called while no collection is
    /// under way. Answers the packs, and how many objects there are in files.
    pub(in crate::store) fn take_put_back(&self) -> Result<(Vec<PathBuf>, usize)> {
        let mut packs = Vec::new();
        let mut taken = Vec::new();
        for id in self.unknown_packs()? {
            let found = match pack::look_into(&self.pack_path(id), id) {
                Err(error) if error.is_not_found() => continue,
                // Whoever needs something of it is told.
                Err(Error::Unsupported { .. }) => continue,
                found => found?,
            };
            let before = taken.len();
            for (object, slot) in found.objects {
                if self.is_better(&object, id, slot)? {
                    taken.push((object.name, Place::packed(id, slot)));
                }
            }
            if taken.len() > before {
                packs.push(self.pack_path(id));
            }
        }
        let in_packs = taken.len();
        for dir in self.file_dirs()? {
            for name in self.files_in(&dir)? {
                if self.find(&name)?.is_none() {
                    taken.push((name, Place::File));
                }
            }
        }
        let in_files = taken.len() - in_packs;
        let names: Vec<ObjectName> = taken.iter().map(|(name, _)| *name).collect();
        if let Some(places) = &mut *self.places.write() {
            for (name, place) in taken {
                places.bring(name, place);
            }
        }
        self.note_put_back(&names);
        Ok((packs, in_files))
    }

    /// Packs on the disk in which nothing is known to be.
    fn unknown_packs(&self) -> Result<Vec<PackId>> {
        let mut packs = self.all_packs()?;
        // In this order: the objects of one that has come are known before it is not on its way any more.
        let coming = self.relied.lock().coming.clone();
        let known: HashSet<PackId> = match &*self.places.read() {
            Some(places) => places.packs(),
            None => HashSet::new(),
        };
        packs.retain(|id| !coming.contains(id) && !known.contains(id));
        Ok(packs)
    }

    fn is_better(&self, object: &Object, id: PackId, slot: Slot) -> Result<bool> {
        Ok(match self.find(&object.name)? {
            None => true,
            Some(_) => {
                self.look_for(object, &Seen::default()).is_err()
                    && self
                        .read_from(object, Place::packed(id, slot), true)
                        .is_ok()
            }
        })
    }
}
