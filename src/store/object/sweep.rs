//! What a collection does to objects.
//!
//! A collection knows which objects the recorded layers name. An import that is under way relies on others: on those
//! that it found in the store, and on those that it has brought. So:
//!
//! - as long as an import or a collection is under way, the names of all objects that any import has relied on are kept;
//! - an import comes to rely on what it finds while the places are locked for reading, and a collection takes a name
//!   away while they are locked for writing, after a look at what is relied on. So an object is either found
//!   and kept, or not found and brought again;
//! - an import ends after its layer was recorded, a collection begins before it reads the records. So what an
//!   import relied on is among the objects of a recorded layer, or is still kept;
//! - a pack that is on its way to its place is left alone until the places know what is in it.
//!
//! Every step is one rename or unlink. Cut off between the two of a pack that is written anew, both packs have its
//! objects: the places know both, and the next collection that would take one away reads the other first.

use std::collections::HashSet;
use std::fs;
use std::os::unix::fs::MetadataExt;
use std::path::PathBuf;

use super::restore::remove;
use super::{Content, Objects, Place, Seen, names};
use crate::store::compression::Compressor;
use crate::store::durable::sync_dir;
use crate::store::error::{Result, io_error};
use crate::store::format::ObjectName;
use crate::store::format::tables::Object;
use crate::store::pack::{Encoded, PackId, PackWriter, Slot};
use crate::store::usage::bytes_of;

/// Names of the objects of all recorded layers.
pub(in crate::store) type Live = HashSet<ObjectName>;

/// What imports rely on.
#[derive(Debug, Default)]
pub(super) struct Relied {
    imports: usize,
    collections: usize,
    names: HashSet<ObjectName>,
    /// Packs on their way to their places, which do not know their objects yet.
    pub(super) coming: HashSet<PackId>,
}

impl Relied {
    pub(super) fn is_importing(&self) -> bool {
        self.imports > 0
    }

    /// Whether neither an import nor a collection is under way.
    pub(super) fn is_idle(&self) -> bool {
        self.imports == 0 && self.collections == 0
    }

    fn forget_if_idle(&mut self) {
        if self.is_idle() {
            self.names = HashSet::new();
        }
    }
}

/// An import is under way. To be dropped when its layer is recorded, or is given up.
#[derive(Debug)]
pub(in crate::store) struct Importing<'a>(&'a Objects);

impl Drop for Importing<'_> {
    fn drop(&mut self) {
        {
            let mut relied = self.0.relied.lock();
            relied.imports -= 1;
            relied.forget_if_idle();
        }
        self.0.give_back();
    }
}

/// A collection is under way. To be made before the records are read.
#[derive(Debug)]
pub(in crate::store) struct Collecting<'a>(&'a Objects);

impl Drop for Collecting<'_> {
    fn drop(&mut self) {
        let mut relied = self.0.relied.lock();
        relied.collections -= 1;
        relied.forget_if_idle();
    }
}

/// What became of a pack or a file, or would.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(in crate::store) enum Swept {
    /// It stays as it is.
    Kept,
    /// Nothing in it was alive; it took so many bytes on the disk.
    Removed(u64),
    /// What was alive is in another pack now; it took so many bytes on the disk and the other takes about so many.
    Rewritten(u64, u64),
}

impl Objects {
    /// Says that an import is under way.
    pub(in crate::store) fn importing(&self) -> Importing<'_> {
        self.relied.lock().imports += 1;
        Importing(self)
    }

    /// Says that a collection is under way.
    pub(in crate::store) fn collecting(&self) -> Collecting<'_> {
        self.relied.lock().collections += 1;
        Collecting(self)
    }

    /// Where an object is, for an import that has `seen` packs, and relies on it from now on.
    pub(in crate::store) fn find_for_import(
        &self,
        object: &Object,
        seen: &Seen,
    ) -> Result<Option<Place>> {
        // Each copy that is not trusted makes room for the next.
        while let Some(place) = self.find(&object.name)?
            && !self.is_trusted(object, place, seen)
        {}
        self.find_to_name(&object.name)
    }

    /// As [`find_for_import`](Self::find_for_import), of one that the import cannot bring, so that it may well be damaged.
    pub(in crate::store) fn find_to_name(&self, name: &ObjectName) -> Result<Option<Place>> {
        // Reads the places if that was not done.
        self.find(name)?;
        let places = self.places.read();
        let found = places.as_ref().and_then(|places| places.get(name));
        if found.is_some() {
            self.rely_on([*name]);
        }
        Ok(found)
    }

    pub(super) fn rely_on(&self, names: impl IntoIterator<Item = ObjectName>) {
        let mut relied = self.relied.lock();
        if !relied.is_idle() {
            relied.names.extend(names);
        }
    }

    /// Every pack.
    pub(in crate::store) fn all_packs(&self) -> Result<Vec<PackId>> {
        let names = names(&self.packs)?;
        Ok(names
            .iter()
            .filter_map(|name| PackId::of_file(name))
            .collect())
    }

    /// The place of a pack.
    pub(in crate::store) fn pack_path(&self, id: PackId) -> PathBuf {
        self.packs.join(id.file_name())
    }

    /// Whether the places of all of these are known.
    pub(super) fn has_all(&self, live: &Live) -> bool {
        let places = self.places.read();
        let known = |name| places.as_ref().is_some_and(|places| places.has(name));
        live.iter().all(known)
    }

    /// Removes a pack without anything alive, and writes one anew of which less than `least` percent are. With
    /// `dry`, only says so. A pack whose table is damaged may have more than can be found, and stays as long as something
    /// that is alive is missing. One of which something else is open is left to a repair.
    pub(in crate::store) fn sweep_pack(
        &self,
        id: PackId,
        live: &Live,
        least: u64,
        tmp: &std::path::Path,
        level: i32,
        dry: bool,
    ) -> Result<Swept> {
        let path = self.pack_path(id);
        let found = self.look_into(id)?;
        if self.is_astray(id) || (!found.has_table && !self.has_all(live)) {
            return Ok(Swept::Kept);
        }
        let rewritable = found.features == Some(0);
        let metadata = fs::metadata(&path).map_err(io_error("look at", &path))?;
        let (bytes, allocated) = (metadata.len(), bytes_of(&metadata));
        let here = |place: Place| place.is_in(id);
        let (keep, kept_bytes) = loop {
            let copies: Vec<Object> = {
                let mut places = self.places.write();
                let relied = self.relied.lock();
                if relied.coming.contains(&id) {
                    return Ok(Swept::Kept);
                }
                let is_needed = |object: &Object| {
                    live.contains(&object.name) || relied.names.contains(&object.name)
                };
                let all = found.objects.iter().copied();
                let (keep, dead): (Vec<_>, Vec<_>) = all.partition(|(object, _)| {
                    let known = places.as_ref().and_then(|places| places.get(&object.name));
                    is_needed(object) && known.is_none_or(here)
                });
                let kept_bytes = keep
                    .iter()
                    .map(|(_, slot)| u64::from(slot.stored))
                    .sum::<u64>();
                let worth_it = rewritable && kept_bytes * 100 < bytes * least;
                if !keep.is_empty() && (dead.is_empty() || !worth_it) {
                    return Ok(Swept::Kept);
                }
                let Some(places) = places.as_mut().filter(|_| !dry) else {
                    break (keep, kept_bytes);
                };
                let all = found.objects.iter().map(|(object, _)| *object);
                let copies: Vec<_> = all
                    .filter(|object| is_needed(object) && !places.others(&object.name).is_empty())
                    .collect();
                if copies.is_empty() {
                    for (object, slot) in dead {
                        places.take_away(&object.name, Place::packed(id, slot));
                    }
                    break (keep, kept_bytes);
                }
                copies
            };
            // What would go may be the only good copy.
            if !self.settle(&copies)? {
                return Ok(Swept::Kept);
            }
        };
        let swept = match keep.is_empty() {
            true => Swept::Removed(allocated),
            false => Swept::Rewritten(
                allocated,
                kept_bytes.next_multiple_of(metadata.blksize().max(1)),
            ),
        };
        if dry {
            return Ok(swept);
        }
        if !keep.is_empty() {
            self.write_anew(id, &keep, tmp, level)?;
        }
        if !found.has_table {
            // Also what was known to be in it and cannot be read.
            self.forget_pack(id);
        }
        self.remove_pack(id)?;
        Ok(swept)
    }

    /// Forgets of what is not in its place any more what nobody needs: the next import of it has to bring it.
    pub(in crate::store) fn forget_missing(&self, live: &Live) -> Result<()> {
        let mut places = self.places.write();
        let relied = self.relied.lock();
        let mut there: HashSet<PackId> = self.all_packs()?.into_iter().collect();
        there.extend(&relied.coming);
        let Some(places) = &mut *places else {
            return Ok(());
        };
        places.retain(|name, place| {
            live.contains(name)
                || relied.names.contains(name)
                || match place {
                    Place::Packed { pack, .. } => there.contains(&pack),
                    Place::File => self.path_of(name).try_exists().unwrap_or(true),
                }
        });
        // Places that were taken away may be given back.
        if self.distrusted.lock().is_empty() {
            let known = places.packs();
            self.open.lock().forget_astray(|id| !known.contains(&id));
        }
        Ok(())
    }

    /// Removes a pack that nothing is in any more.
    pub(super) fn remove_pack(&self, id: PackId) -> Result<()> {
        remove(&self.pack_path(id))?;
        self.forget_bad(|copy| copy.1.is_in(id));
        self.open.lock().forget(id);
        sync_dir(&self.packs).map_err(io_error("make durable", &self.packs))
    }

    pub(super) fn write_anew(
        &self,
        id: PackId,
        keep: &[(Object, Slot)],
        tmp: &std::path::Path,
        level: i32,
    ) -> Result<()> {
        let mut writer = PackWriter::create(tmp)?;
        let path = self.pack_path(id);
        let compressing = |error| io_error("compress an object of", &path)(error);
        let mut compressor = Compressor::new(level).map_err(compressing)?;
        for (object, slot) in keep {
            let place = Place::packed(id, *slot);
            let Content::Bytes(content) = self.read_from(object, place, true)? else {
                continue;
            };
            let encoded = Encoded::new(*object, content.to_vec(), &mut compressor);
            writer.append(&encoded.map_err(compressing)?)?;
        }
        self.publish(Some(writer.seal()?), Vec::new())
    }

    /// Removes the files of one directory that nobody needs; what a caller is told of is gone, or would be.
    pub(in crate::store) fn sweep_files(
        &self,
        dir: &str,
        live: &Live,
        dry: bool,
        told: &mut dyn FnMut(PathBuf, u64),
    ) -> Result<()> {
        let mut dead = self.files_in(dir)?;
        dead.retain(|name| !live.contains(name));
        {
            let mut places = self.places.write();
            let relied = self.relied.lock();
            dead.retain(|name| !relied.names.contains(name));
            if !dry && let Some(places) = &mut *places {
                for name in &dead {
                    places.take_away(name, Place::File);
                }
            }
        }
        for name in &dead {
            let path = self.path_of(name);
            // An import relies on a file before it brings it here, so one that nobody relies on while this is locked is
            // the one that was found dead.
            let relied = self.relied.lock();
            if relied.names.contains(name) {
                continue;
            }
            let metadata = fs::metadata(&path).map_err(io_error("look at", &path))?;
            if !dry {
                fs::remove_file(&path).map_err(io_error("remove", &path))?;
            }
            drop(relied);
            told(path, bytes_of(&metadata));
        }
        Ok(())
    }
}
