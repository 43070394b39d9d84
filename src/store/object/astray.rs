//! Packs that are kept open, and those of them that are not where their names lead any more.
//!
//! A file that is open can be read on after somebody has moved it away, removed it, or put another in its place. Whoever answers
//! for the store must not take that for being there: when contents are compared with their names, what counts is what lies
//! under the name of the pack. A file that does not is astray. Nothing is served of it, but it may be all that is left of the
//! pack, and a repair writes it anew from there.

use std::collections::{BTreeSet, VecDeque};
use std::fs::{self, File, OpenOptions};
use std::io::{self, Seek};
use std::os::unix::fs::{MetadataExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::sync::Arc;

use super::Objects;
use super::restore::remove;
use crate::store::durable::sync_dir;
use crate::store::error::{Result, io_error};
use crate::store::format::ObjectName;
use crate::store::pack::{self, PackId, Slot};

/// Packs that are kept open: far fewer than a process may have files open.
const MOST_OPEN: usize = 64;

type OpenPack = (PackId, Arc<File>);

/// Packs that are open.
#[derive(Debug, Default)]
pub(super) struct OpenPacks {
    /// Those that were read from, the last one at the end.
    used: VecDeque<OpenPack>,
    /// Those that were found astray, the last one at the end.
    astray: VecDeque<OpenPack>,
    /// Those among the used ones that were not on the disk any more when somebody looked.
    gone: BTreeSet<PackId>,
}

impl OpenPacks {
    /// A pack that is open, unless it turns out to be astray, as `is_in_place` tells.
    pub(super) fn get(
        &mut self,
        id: PackId,
        is_in_place: impl FnOnce(&File) -> bool,
    ) -> Option<Arc<File>> {
        let at = self.used.iter().position(|(known, _)| *known == id)?;
        let found = self.used.remove(at)?;
        let file = Arc::clone(&found.1);
        if is_in_place(&file) {
            keep(&mut self.used, found);
            return Some(file);
        }
        keep(&mut self.astray, found);
        None
    }

    /// For who reads on what it has open, once the store was mended: closes packs in whose places other files lie, and notes
    /// those in whose places nothing does.
    pub(super) fn refresh(&mut self, path_of: impl Fn(PackId) -> PathBuf) {
        self.gone.clear();
        self.used.retain(|(id, file)| {
            let path = path_of(*id);
            let is_gone = !path.exists();
            if is_gone {
                self.gone.insert(*id);
            }
            is_gone || lies_at(file, &path)
        });
    }

    /// Whether a pack that may be open was not on the disk any more when the store was last mended.
    pub(super) fn is_gone(&self, id: PackId) -> bool {
        self.gone.contains(&id)
    }

    /// Keeps one that was opened.
    pub(super) fn add(&mut self, id: PackId, file: Arc<File>) {
        keep(&mut self.used, (id, file));
    }

    /// Closes what was the pack of that name.
    pub(super) fn forget(&mut self, id: PackId) {
        self.used.retain(|(known, _)| *known != id);
        self.forget_astray(|astray| astray == id);
    }

    /// Closes what is astray of packs.
    pub(super) fn forget_astray(&mut self, of: impl Fn(PackId) -> bool) {
        self.astray.retain(|(known, _)| !of(*known));
    }

    /// Whether a pack is astray, as `is_in_place` tells.
    fn is_astray(&mut self, id: PackId, is_in_place: impl Fn(&File) -> bool) -> bool {
        self.get(id, &is_in_place);
        // One may have been moved back.
        self.astray
            .retain(|(known, file)| *known != id || !is_in_place(file));
        self.astray.iter().any(|(known, _)| *known == id)
    }

    /// All that are astray, as `is_in_place` tells.
    fn astray(&mut self, is_in_place: impl Fn(PackId, &File) -> bool) -> Vec<OpenPack> {
        self.astray.retain(|(id, file)| !is_in_place(*id, file));
        for pack in std::mem::take(&mut self.used) {
            match is_in_place(pack.0, &pack.1) {
                true => self.used.push_back(pack),
                false => keep(&mut self.astray, pack),
            }
        }
        self.astray.iter().cloned().collect()
    }
}

fn keep(list: &mut VecDeque<OpenPack>, pack: OpenPack) {
    if list.len() >= MOST_OPEN {
        list.pop_front();
    }
    list.push_back(pack);
}

/// Whether the file is what `path` leads to.
pub(super) fn lies_at(file: &File, path: &Path) -> bool {
    let identity = |metadata: fs::Metadata| (metadata.dev(), metadata.ino());
    let under_name = fs::metadata(path).map(identity);
    file.metadata()
        .map(identity)
        .is_ok_and(|ours| under_name.is_ok_and(|found| found == ours))
}

/// Whether nobody else can open the file any more.
pub(super) fn is_removed(file: &File) -> bool {
    file.metadata().is_ok_and(|metadata| metadata.nlink() == 0)
}

impl Objects {
    /// Whether what is open of a pack does not lie under its name. What does is not all that there is of it then.
    pub(super) fn is_astray(&self, id: PackId) -> bool {
        let path = self.pack_path(id);
        self.open.lock().is_astray(id, |file| lies_at(file, &path))
    }

    /// Puts packs that are astray back into their places, where nothing as good lies there. To be called while no collection is
    /// under way. Answers their places, and what could not be done.
    pub(in crate::store) fn put_back(&self, tmp: &Path) -> Vec<Result<PathBuf>> {
        let is_in_place = |id, file: &File| lies_at(file, &self.pack_path(id));
        let astray = self.open.lock().astray(is_in_place);
        let put = |(id, file): OpenPack| self.put_back_pack(id, &file, tmp).transpose();
        astray.into_iter().filter_map(put).collect()
    }

    fn put_back_pack(&self, id: PackId, file: &File, tmp: &Path) -> Result<Option<PathBuf>> {
        let path = self.pack_path(id);
        let open = self.sound_in(id, file);
        // Of a pack in which nothing is known to be, nobody can say what is worth keeping.
        let (is_as_good, is_worse) = match pack::open(&path, id) {
            Ok(there) => {
                let there = self.sound_in(id, &there);
                let is_as_good = !there.is_empty() && open.is_subset(&there);
                (is_as_good, !is_as_good && there.is_subset(&open))
            }
            Err(error) => (false, error.is_not_found()),
        };
        if is_as_good {
            self.open.lock().forget_astray(|astray| astray == id);
        } else if is_worse && !open.is_empty() {
            let new = tmp.join(format!("again-{:032x}", rand::random::<u128>()));
            let written = copy(file, &new).and_then(|()| fs::rename(&new, &path));
            if written.is_err() {
                // What stays is cleared when the store is opened.
                let _ = remove(&new);
            }
            written.map_err(io_error("make", &path))?;
            sync_dir(&self.packs).map_err(io_error("make durable", &self.packs))?;
            // Also what was in its place till now, which may be in use.
            self.open.lock().forget(id);
            return Ok(Some(path));
        }
        Ok(None)
    }

    /// What is known to be in a pack and can be read from `file`.
    fn sound_in(&self, id: PackId, file: &File) -> BTreeSet<ObjectName> {
        let sound = |slot: Slot| {
            let object = pack::object_at(file, slot).ok()??;
            pack::read(file, &object, slot, true).ok()?;
            Some(object.name)
        };
        self.slots_of(id).into_iter().filter_map(sound).collect()
    }
}

/// Makes a durable file with the same content, byte by byte.
fn copy(mut from: &File, to: &Path) -> io::Result<()> {
    let mut to = OpenOptions::new()
        .write(true)
        .create_new(true)
        .mode(0o600)
        .open(to)?;
    from.rewind()?;
    io::copy(&mut from, &mut to)?;
    to.sync_all()
}
