//! Objects: contents by their names, small ones in packs and large ones in files of their own.
//!
//! An [`Objects`] knows where every object is once somebody asks for one by its name; it learns that from the
//! tables of the packs and the names of the files. Who has a view needs that only when an object is
//! not where the view says.

mod astray;
mod check;
mod file;
mod foreign;
mod framed;
mod places;
mod put_back;
mod restore;
mod sweep;

use std::collections::{HashMap, HashSet};
use std::fs::{self, File};
use std::io::{self, Read};
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, AtomicUsize};
use std::sync::{Arc, OnceLock};
use std::time::SystemTime;

use parking_lot::{Mutex, RwLock};

use super::durable::{create_dir, sync_dir};
use super::error::{Error, Result, damaged, io_error};
use super::format::ObjectName;
use super::format::tables::Object;
use super::pack::{self, PackId, SealedPack, Slot, Wrong};
use crate::sys::{self, private_mount};

use astray::OpenPacks;
pub(super) use check::Bits;
pub use check::{Check, FrameChecks, Verify};
pub(super) use file::{FileWriter, FrameWriter, NewFile};
pub(super) use foreign::{is_dir_of_files, object_in};
use framed::FrameCache;
pub use framed::Framed;
pub(super) use framed::{FRAME, Frame, LARGEST as LARGEST_FRAMED};
use places::Places;
use sweep::Relied;
pub(super) use sweep::{Live, Swept};

const BUFFER: usize = 128 << 10;
/// How often an object is looked for again when it has moved.
const MOST_MOVES: usize = 8;

/// Where an object is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Place {
    /// In a pack.
    Packed {
        /// Which one.
        pack: PackId,
        /// Where its header starts.
        offset: u64,
        /// Bytes behind the header.
        stored: u32,
    },
    /// In a file of its own.
    File,
}

impl Place {
    fn is_in(self, id: PackId) -> bool {
        self.pack() == Some(id)
    }

    fn pack(self) -> Option<PackId> {
        match self {
            Self::Packed { pack, .. } => Some(pack),
            Self::File => None,
        }
    }

    pub(super) fn packed(pack: PackId, slot: Slot) -> Self {
        Self::Packed {
            pack,
            offset: slot.offset,
            stored: slot.stored,
        }
    }
}

/// The content of an object.
#[derive(Clone, Debug)]
pub enum Content {
    /// In memory.
    Bytes(Arc<Vec<u8>>),
    /// In a file that holds exactly this content.
    File(Arc<File>),
    /// In a file, compressed in frames.
    Framed(Arc<Framed>),
}

impl Content {
    /// Whether some of it could not be used when it was last read.
    pub(super) fn was_damaged(&self) -> bool {
        match self {
            Self::Framed(framed) => framed.checks().has_failed(),
            Self::Bytes(_) | Self::File(_) => false,
        }
    }

    /// Fills `buffer` from `offset`; fewer bytes only at the end.
    pub fn read_at(&self, buffer: &mut [u8], offset: u64) -> io::Result<usize> {
        match self {
            Self::Bytes(bytes) => {
                let from = usize::try_from(offset)
                    .unwrap_or(usize::MAX)
                    .min(bytes.len());
                let count = buffer.len().min(bytes.len() - from);
                buffer[..count].copy_from_slice(&bytes[from..from + count]);
                Ok(count)
            }
            Self::File(file) => {
                let mut have = 0;
                while have < buffer.len() {
                    match file.read_at(&mut buffer[have..], offset + have as u64) {
                        Ok(0) => break,
                        Ok(count) => have += count,
                        Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                        Err(error) => return Err(error),
                    }
                }
                Ok(have)
            }
            Self::Framed(framed) => framed.read_at(buffer, offset),
        }
    }
}

/// How long packs were when they were looked for: who relies on thousands of contents looks once for the pack that they are in.
#[derive(Debug, Default)]
pub(super) struct Seen(Mutex<HashMap<PackId, u64>>);

impl Seen {
    /// The length of the file of a place, which `path` leads to.
    fn length_of(&self, place: Place, path: &Path) -> io::Result<u64> {
        let known = place.pack().and_then(|id| self.0.lock().get(&id).copied());
        if let Some(length) = known {
            return Ok(length);
        }
        let length = fs::metadata(path)?.len();
        if let Some(id) = place.pack() {
            self.0.lock().insert(id, length);
        }
        Ok(length)
    }
}

/// All objects of a store.
#[derive(Debug)]
pub struct Objects {
    packs: PathBuf,
    files: PathBuf,
    /// Read when it is first needed.
    places: RwLock<Option<Places>>,
    open: Mutex<OpenPacks>,
    /// Those who have an object open keep the one that was here then.
    frames: Mutex<Arc<FrameCache>>,
    /// Whether it is this process that collects, and so knows all places.
    collects: bool,
    /// What must not be collected, though no layer may name it yet.
    relied: Mutex<Relied>,
    /// How many are under way.
    restorations: AtomicUsize,
    /// Copies that were not what they were. One beside which there is another stays here until it has left the disk.
    distrusted: Mutex<Vec<(Object, Place)>>,
    /// Objects that were damaged or missing when they were last looked at.
    doubted: Mutex<HashSet<ObjectName>>,
    /// Something was brought anew that was damaged or missing.
    healed: AtomicBool,
    /// The directory of the files, through a mount that is read-only.
    sealed: OnceLock<OwnedFd>,
    /// When the directory of the packs had changed last before the places were read.
    read_at: Mutex<Option<SystemTime>>,
}

impl Objects {
    /// The objects below `dir`.
    pub fn new(dir: &Path) -> Self {
        Self {
            packs: dir.join("packs"),
            files: dir.join("objects"),
            places: RwLock::new(None),
            open: Mutex::default(),
            frames: Mutex::default(),
            collects: false,
            relied: Mutex::default(),
            restorations: AtomicUsize::new(0),
            distrusted: Mutex::default(),
            doubted: Mutex::default(),
            healed: AtomicBool::new(false),
            sealed: OnceLock::new(),
            read_at: Mutex::default(),
        }
    }

    /// Makes the directories and finds all objects, for the one process that changes the store.
    pub(super) fn prepare(&mut self) -> Result<()> {
        for dir in [&self.packs, &self.files] {
            create_dir(dir, 0o700).map_err(io_error("make the directory", dir))?;
        }
        // A process that was killed may have renamed without syncing the directory; what is
        // found from now on is as durable as what is written.
        let dir = File::open(&self.packs).map_err(io_error("open", &self.packs))?;
        nix::unistd::syncfs(dir)
            .map_err(|errno| io_error("sync the file system of", &self.packs)(errno.into()))?;
        *self.places.write() = Some(self.load()?);
        self.collects = true;
        Ok(())
    }

    /// Where an object is; `None` if the store does not have it.
    pub fn find(&self, name: &ObjectName) -> Result<Option<Place>> {
        if let Some(places) = &*self.places.read() {
            return Ok(places.get(name));
        }
        let places = self.load()?;
        let place = places.get(name);
        *self.places.write() = Some(places);
        Ok(place)
    }

    /// Looks on the disk for the file that an object is in, or for the pack unless it was `seen`; an error if it is not there, or too
    /// short for it to be in it.
    pub(super) fn look_for(&self, object: &Object, seen: &Seen) -> Result<()> {
        let mut tried = None;
        let mut error = Error::NoObject {
            object: object.name.to_string(),
        };
        // A collection may bring it to another pack meanwhile.
        while let Some(place) = self.find(&object.name)?
            && tried != Some(place)
        {
            let (path, least) = match place {
                // Compressed, it may be far shorter than its content.
                Place::File => (self.path_of(&object.name), object.size.min(1)),
                Place::Packed {
                    pack,
                    offset,
                    stored,
                } => (self.pack_path(pack), Slot { offset, stored }.end()),
            };
            error = match seen.length_of(place, &path) {
                Ok(length) if length >= least => return Ok(()),
                Ok(_) => damaged(&path, format!("it is too short to have {}", object.name)),
                Err(failed) => io_error("open", &path)(failed),
            };
            tried = Some(place);
        }
        Err(error)
    }

    /// The content of an object, which is looked for at `place` first. With `verify` all of it is
    /// compared with its name.
    pub fn read(&self, object: &Object, place: Option<Place>, verify: bool) -> Result<Content> {
        let opened = self.open(object, place, &whole(verify))?;
        Ok(opened.0)
    }

    /// The content of an object, which is looked for at `place` first and compared with its name as `check` says; elsewhere what was
    /// compared before is another copy. Answers also whether it was at `place`.
    pub fn open(
        &self,
        object: &Object,
        place: Option<Place>,
        check: &Check,
    ) -> Result<(Content, bool)> {
        let check_elsewhere = check.of_unknown();
        let mut tried = None;
        let mut next = place;
        if let Some(Place::Packed { pack, .. }) = place
            && self.open.lock().is_gone(pack)
        {
            // What is open of it may be what was mended elsewhere since, or all that is left.
            next = self.find(&object.name)?.or(place);
        }
        let mut error = None;
        let mut loaded = false;
        // A collection may bring the object to another pack between a look and a try, but not often.
        for _ in 0..MOST_MOVES {
            if let Some(at) = next
                && next != tried
            {
                let is_there = next == place;
                let check = if is_there { check } else { &check_elsewhere };
                match self.open_from(object, at, check) {
                    Ok(content) if !content.was_damaged() => return Ok((content, is_there)),
                    Ok(content) => {
                        let copy = self.open_copy(object, at).map(|copy| (copy, false));
                        // What can be read of it is better than nothing.
                        return Ok(copy.unwrap_or((content, is_there)));
                    }
                    Err(failed) => error = Some(failed),
                }
                tried = next;
                next = self.find(&object.name)?;
                continue;
            }
            if let Some(place) = tried
                && let Some(content) = self.open_copy(object, place)
            {
                return Ok((content, false));
            }
            let missing = error.as_ref().is_some_and(Error::is_not_found);
            if tried.is_none() && next.is_none() {
                next = self.find(&object.name)?;
                if next.is_some() {
                    continue;
                }
            }
            let in_doubt = !loaded && (missing || tried.is_none()) || self.is_out_of_date();
            if self.collects || !in_doubt {
                break;
            }
            // Another process collects and repairs: the places are out of date.
            *self.places.write() = Some(self.load()?);
            loaded = true;
            next = self.find(&object.name)?;
            tried = None;
        }
        Err(match error {
            Some(error) if next.is_some() || !error.is_not_found() => error,
            _ => {
                let path = self.path_of(&object.name);
                damaged(&path, "neither it nor a pack has this object")
            }
        })
    }

    /// Another copy of an object than the one at `bad`, which is whole.
    fn open_copy(&self, object: &Object, bad: Place) -> Option<Content> {
        // Reads the places if that was not done.
        self.find(&object.name).ok()?;
        let copies = self.copies(&object.name);
        let mut others = copies.into_iter().filter(|place| *place != bad);
        others.find_map(|place| self.read_from(object, place, true).ok())
    }

    fn read_from(&self, object: &Object, place: Place, verify: bool) -> Result<Content> {
        self.open_from(object, place, &whole(verify))
    }

    fn open_from(&self, object: &Object, place: Place, check: &Check) -> Result<Content> {
        let (id, slot) = match place {
            Place::File => return self.open_file(object, check),
            Place::Packed {
                pack,
                offset,
                stored,
            } => (pack, Slot { offset, stored }),
        };
        let path = self.packs.join(id.file_name());
        let file = self.pack(id, check.is_whole())?;
        match pack::read(&file, object, slot, check.is_due()) {
            Ok(bytes) => Ok(Content::Bytes(Arc::new(bytes))),
            Err(Wrong::Io(error)) => Err(io_error("read", &path)(error)),
            Err(Wrong::Moved) => Err(damaged(
                &path,
                format!("{} is not in its place", object.name),
            )),
            Err(Wrong::Damaged(problem)) => Err(damaged(
                &path,
                format!("its object {} cannot be used: {problem}", object.name),
            )),
        }
    }

    /// The file of a pack; with `by_name`, what lies under its name now.
    fn pack(&self, id: PackId, by_name: bool) -> Result<Arc<File>> {
        let path = self.pack_path(id);
        let is_in_place = |file: &File| match (self.collects, by_name) {
            // Who mounts a view reads on what it has open.
            (false, _) => true,
            (true, true) => astray::lies_at(file, &path),
            (true, false) => !astray::is_removed(file),
        };
        let mut open = self.open.lock();
        if let Some(file) = open.get(id, is_in_place) {
            return Ok(file);
        }
        let file = Arc::new(pack::open(&path, id)?);
        open.add(id, Arc::clone(&file));
        Ok(file)
    }

    fn open_file(&self, object: &Object, check: &Check) -> Result<Content> {
        let path = self.path_of(&object.name);
        let mut file = self.open_at(&path).map_err(io_error("open", &path))?;
        let length = file.metadata().map_err(io_error("look at", &path))?.len();
        if length != object.size {
            let frames = Arc::clone(&self.frames.lock());
            let framed = Framed::open(&path, file, length, object, check, &frames)?;
            return Ok(Content::Framed(Arc::new(framed)));
        }
        if check.is_due() {
            let mut hash = blake3::Hasher::new();
            let mut buffer = vec![0; BUFFER];
            loop {
                match file.read(&mut buffer) {
                    Ok(0) => break,
                    Ok(count) => hash.update(&buffer[..count]),
                    Err(error) if error.kind() == io::ErrorKind::Interrupted => continue,
                    Err(error) => return Err(io_error("read", &path)(error)),
                };
            }
            if *hash.finalize().as_bytes() != object.name.0 {
                return Err(damaged(&path, "its content does not have its name"));
            }
        }
        Ok(Content::File(Arc::new(file)))
    }

    fn open_at(&self, path: &Path) -> io::Result<File> {
        match (self.sealed.get(), path.strip_prefix(&self.files)) {
            (Some(dir), Ok(inside)) => {
                let file = sys::fs::openat(dir.as_fd(), inside.as_os_str(), libc::O_RDONLY, 0)?;
                Ok(file.into())
            }
            _ => File::open(path),
        }
    }

    /// Has files be opened through a mount that is read-only and that nobody else sees.
    pub(super) fn seal(&self) -> io::Result<()> {
        let bound = private_mount::read_only(std::slice::from_ref(&self.files))?;
        for dir in bound {
            // Only the first call counts, as one mount is as good as another.
            let _ = self.sealed.set(dir?);
        }
        Ok(())
    }

    /// Whether files are opened so.
    pub(super) fn is_sealed(&self) -> bool {
        self.sealed.get().is_some()
    }

    /// Where packs lie.
    pub(super) fn packs(&self) -> &Path {
        &self.packs
    }

    /// Where objects that are files of their own lie, in a directory for each first two digits.
    pub(super) fn files(&self) -> &Path {
        &self.files
    }

    fn path_of(&self, name: &ObjectName) -> PathBuf {
        let digits = name.to_string();
        self.files.join(&digits[..2]).join(digits)
    }

    /// Brings a durable pack and durable files to their places and makes the names durable. From then on they are found.
    pub(super) fn publish(&self, pack: Option<SealedPack>, files: Vec<NewFile>) -> Result<()> {
        let id = pack.as_ref().map(|pack| pack.id);
        self.relied.lock().coming.extend(id);
        let published = self.bring(pack, files);
        if let Some(id) = id {
            self.relied.lock().coming.remove(&id);
        }
        published
    }

    fn bring(&self, pack: Option<SealedPack>, files: Vec<NewFile>) -> Result<()> {
        // Before they are in their places, where a collection would find nobody who needs them.
        self.rely_on(
            pack.iter()
                .flat_map(|pack| &pack.objects)
                .map(|(object, _)| object.name),
        );
        self.rely_on(files.iter().map(|file| file.object.name));
        let mut found = Vec::new();
        if let Some(pack) = pack {
            let path = self.packs.join(pack.id.file_name());
            fs::rename(&pack.path, &path).map_err(io_error("make", &path))?;
            sync_dir(&self.packs).map_err(io_error("make durable", &self.packs))?;
            let places = pack.objects.into_iter();
            found.extend(places.map(|(object, slot)| (object.name, Place::packed(pack.id, slot))));
        }
        let mut dirs = Vec::new();
        for file in files {
            let path = self.path_of(&file.object.name);
            if let Some(dir) = path.parent() {
                create_dir(dir, 0o700).map_err(io_error("make the directory", dir))?;
                dirs.push(dir.to_owned());
            }
            // If another import has brought the same content meanwhile, this one takes its place.
            fs::rename(&file.path, &path).map_err(io_error("make", &path))?;
            found.push((file.object.name, Place::File));
            file.kept();
        }
        dirs.sort_unstable();
        dirs.dedup();
        if !dirs.is_empty() {
            // Another import may have made one of them a moment ago.
            dirs.push(self.files.clone());
        }
        for dir in dirs {
            sync_dir(&dir).map_err(io_error("make durable", &dir))?;
        }
        let names: Vec<ObjectName> = found.iter().map(|(name, _)| *name).collect();
        if let Some(places) = &mut *self.places.write() {
            for (name, place) in found {
                places.bring(name, place);
            }
        }
        self.note_brought(&names);
        Ok(())
    }

    /// Forgets where objects were found and what was read of them, because the process that changes the store has mended it.
    pub(super) fn refresh(&self) {
        *self.places.write() = None;
        *self.frames.lock() = Arc::default();
        self.open.lock().refresh(|id| self.pack_path(id));
    }

    /// Whether a pack has come or gone since the places were read.
    fn is_out_of_date(&self) -> bool {
        *self.read_at.lock() != self.changed_at()
    }

    fn changed_at(&self) -> Option<SystemTime> {
        fs::metadata(&self.packs)
            .and_then(|metadata| metadata.modified())
            .ok()
    }
}

fn whole(verify: bool) -> Check {
    match verify {
        true => Check::Whole,
        false => Check::Nothing,
    }
}

fn names(dir: &Path) -> Result<Vec<String>> {
    let entries = fs::read_dir(dir).and_then(Iterator::collect::<io::Result<Vec<_>>>);
    Ok(entries
        .map_err(io_error("list", dir))?
        .into_iter()
        // A name that is not UTF-8 is not one of ours.
        .filter_map(|entry| entry.file_name().into_string().ok())
        .collect())
}

#[cfg(test)]
mod tests;
