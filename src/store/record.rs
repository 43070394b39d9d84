//! Record files: small, checksummed, self-describing, replaced as a whole.
//!
//! A record is a text file of four lines, so that a human can read it in an emergency:
//!
//! ```text
//! plywood-record
//! {"kind":"snapshot","version":1,"compatible":0,"read_only_compatible":0,"incompatible":0}
//! {...the payload...}
//! 64 hex digits: blake3 of everything above
//! ```
//!
//! `version` is that of the payload's meaning. The feature words are ext4's: a reader that meets an
//! unknown bit in `compatible` goes on, in `read_only_compatible` may read but not replace the file,
//! in `incompatible` leaves it alone.
//!
//! A record is written to a temporary beside it, synced, renamed over the old one, and the directory
//! is synced: after a crash it is the old one or the new one, whole. A record that cannot be read is
//! reported by name and stays where it is, so that its id stays taken and nothing that belongs to it
//! is cleared away as an orphan; it takes no other record with it.

use std::collections::{HashMap, HashSet};
use std::fs::{self, File, OpenOptions};
use std::io::{self, Write};
use std::marker::PhantomData;
use std::os::unix::fs::{MetadataExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, SystemTime};

use parking_lot::Mutex;
use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};

use super::durable::{create_dir, sync_dir};

const MAGIC: &str = "plywood-record";
const SUFFIX: &str = ".record";
const TEMPORARY: &str = ".tmp-";
/// Longest id in bytes; leaves room for the suffixes within a name of 255 bytes.
const LONGEST_ID: usize = 200;
/// A larger file is not one of ours.
const LARGEST_FILE: u64 = 16 << 20;

/// What a type has to say of itself to be kept in a [`RecordDir`].
pub trait Record: Serialize + DeserializeOwned {
    /// What the file is a record of, e.g. `snapshot`. A file of another kind is refused.
    const KIND: &'static str;
    /// Version of the payload's meaning; a higher one is refused on reading.
    const VERSION: u32;
    /// What to do about a file that cannot be used.
    const REMEDY: &'static str = "restore it from a backup and run `snapctl system repair`, or delete the file to give up what it stands for and start plyd again";
    /// The same once a repair could not make it anew.
    const LEFT: &'static str = Self::REMEDY;
}

#[derive(Serialize, Deserialize)]
struct Header {
    kind: String,
    version: u32,
    compatible: u64,
    read_only_compatible: u64,
    incompatible: u64,
}

/// Why a record could not be read or written.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// The host refused an operation.
    #[error("cannot {action} {path}: {source}")]
    Io {
        /// What was tried.
        action: &'static str,
        /// On which file.
        path: PathBuf,
        /// What the host said.
        source: io::Error,
    },
    /// The file is there, but it is not a record that this release can use.
    #[error("{0}")]
    Damaged(#[from] Damaged),
    /// Not a name that a record can have.
    #[error(
        "{id:?} cannot name a record: use 1 to {LONGEST_ID} letters, digits, '.', '_' and '-', not starting with '.'"
    )]
    BadId {
        /// The name.
        id: String,
    },
}

/// A record file that cannot be used.
#[derive(Clone, Debug, thiserror::Error)]
#[error("{}; {remedy}", self.fact())]
pub struct Damaged {
    /// The id that its name gives.
    pub id: String,
    /// The file.
    pub path: PathBuf,
    /// What is wrong with it.
    pub problem: String,
    /// What to do about it.
    pub remedy: &'static str,
    /// The same once a repair could not make it anew.
    pub left: &'static str,
    /// A newer release wrote it, to which it is left: no repair writes it anew.
    pub newer: bool,
}

impl Damaged {
    /// The same of a record of which plyd knows all that it said.
    pub fn known(self) -> Self {
        if self.newer {
            return self;
        }
        self.advised("`snapctl system repair` writes it again as it was, as long as this plyd runs")
    }

    /// The same with another word on what to do about it, whether a repair was tried or not.
    pub fn advised(self, advice: &'static str) -> Self {
        Self {
            remedy: advice,
            left: advice,
            ..self
        }
    }

    /// What is wrong, without what to do about it.
    pub fn fact(&self) -> String {
        let path = self.path.display();
        format!("the record {path} cannot be used: {}", self.problem)
    }
}

/// Result of an operation on records.
pub type Result<T, E = Error> = std::result::Result<T, E>;

/// What [`RecordDir::list`] found.
#[derive(Debug)]
pub struct Listing<T> {
    /// The sound records with their ids, in order of id.
    pub records: Vec<(String, T)>,
    /// Those that cannot be used. Their ids are taken.
    pub damaged: Vec<Damaged>,
}

/// A directory of records of one type. Any thread may use it at any time; of two `put`s of one id the
/// later rename wins, so callers that read, change and write hold a lock of their own.
#[derive(Debug)]
pub struct RecordDir<T> {
    dir: PathBuf,
    temporaries: AtomicU64,
    /// Files that were found sound, as they were then.
    sound: Mutex<HashMap<String, Stamp>>,
    records: PhantomData<fn() -> T>,
}

/// What changes with every change of a file: inode, length, times of modification and change.
#[derive(Debug, PartialEq, Eq)]
struct Stamp {
    file: (u64, u64),
    modified: (i64, i64),
    changed: (i64, i64),
}

/// Two changes that follow closer than the kernel's clock ticks have one time, so nothing is made of one that is younger.
const SETTLED: Duration = Duration::from_secs(1);

impl Stamp {
    fn of(meta: &fs::Metadata) -> Self {
        Self {
            file: (meta.ino(), meta.len()),
            modified: (meta.mtime(), meta.mtime_nsec()),
            changed: (meta.ctime(), meta.ctime_nsec()),
        }
    }

    fn is_settled(&self, now: SystemTime) -> bool {
        let now = now.duration_since(SystemTime::UNIX_EPOCH);
        let limit = now.unwrap_or_default().saturating_sub(SETTLED).as_secs();
        u64::try_from(self.changed.0).is_ok_and(|changed| changed < limit)
    }
}

impl<T: Record> RecordDir<T> {
    /// Opens the directory, makes it (mode 0700) if it is missing, and clears temporaries that a
    /// crash left. Only one process may have it open.
    pub fn open(dir: &Path) -> Result<Self> {
        create_dir(dir, 0o700).map_err(io_error("make the directory", dir))?;
        let this = Self::of_another(dir);
        for name in this.names()? {
            if name.starts_with(TEMPORARY) {
                let path = dir.join(&name);
                fs::remove_file(&path).map_err(io_error("remove the left-over", &path))?;
            }
        }
        Ok(this)
    }

    /// A directory that another process has open, to read what is in it.
    pub fn of_another(dir: &Path) -> Self {
        Self {
            dir: dir.to_owned(),
            temporaries: AtomicU64::new(0),
            sound: Mutex::default(),
            records: PhantomData,
        }
    }

    /// Reads all records. Fails only if the directory itself cannot be read.
    pub fn list(&self) -> Result<Listing<T>> {
        let mut listing = Listing {
            records: Vec::new(),
            damaged: Vec::new(),
        };
        let mut names = self.names()?;
        names.sort_unstable();
        for name in names {
            let Some(id) = name.strip_suffix(SUFFIX) else {
                continue;
            };
            match self.get(id) {
                Ok(Some(record)) => listing.records.push((id.to_owned(), record)),
                Ok(None) => {}
                Err(error) => listing.damaged.push(self.because(id, error)),
            }
        }
        Ok(listing)
    }

    /// Ids of all records, whether they can be used or not. None is read.
    pub fn ids(&self) -> Result<Vec<String>> {
        let names = self.names()?.into_iter();
        let ids = names.filter_map(|name| name.strip_suffix(SUFFIX).map(str::to_owned));
        Ok(ids.collect())
    }

    /// Reads all records and answers those that cannot be used, and those of `known` that have no file. Whoever may remove
    /// records meanwhile asks of each [`is_unsound`](Self::is_unsound) once more.
    pub fn examine(&self, known: impl IntoIterator<Item = String>) -> Result<Vec<Damaged>> {
        let listing = self.list()?;
        let mut damaged = listing.damaged;
        let found: HashSet<&str> = listing.records.iter().map(|(id, _)| &**id).collect();
        let unusable: HashSet<String> = damaged.iter().map(|damaged| damaged.id.clone()).collect();
        let gone = known
            .into_iter()
            .filter(|id| !found.contains(&**id) && !unusable.contains(id));
        damaged.extend(gone.map(|id| self.gone(&id)));
        Ok(damaged)
    }

    /// Whether [`examine`](Self::examine) may find something: reads only what has changed since it was last found sound here. What
    /// a disk has lost of a file that nobody has written to is not seen.
    pub fn is_doubtful(&self, known: impl IntoIterator<Item = String>) -> Result<bool> {
        let names = self.names()?;
        let ids: HashSet<&str> = names
            .iter()
            .filter_map(|name| name.strip_suffix(SUFFIX))
            .collect();
        if known.into_iter().any(|id| !ids.contains(&*id)) {
            return Ok(true);
        }
        let mut sound = self.sound.lock();
        sound.retain(|id, _| ids.contains(&**id));
        for id in ids {
            // Gone meanwhile, or whoever reads it will say.
            let stamp = self.path(id).and_then(|path| {
                let meta = fs::symlink_metadata(&path);
                meta.map_err(io_error("look at", &path))
            });
            let stamp = stamp.ok().as_ref().map(Stamp::of);
            if stamp.is_some() && sound.get(id) == stamp.as_ref() {
                continue;
            }
            match self.get(id) {
                Err(_) => return Ok(true),
                Ok(None) => {}
                Ok(Some(_)) => {
                    if let Some(stamp) = stamp.filter(|stamp| stamp.is_settled(SystemTime::now())) {
                        sound.insert(id.to_owned(), stamp);
                    }
                }
            }
        }
        Ok(false)
    }

    /// What is wrong with the record `id`, if it is there.
    pub fn problem_of(&self, id: &str) -> Option<Damaged> {
        self.get(id).err().map(|error| self.because(id, error))
    }

    /// What is wrong with the record `id`, which has to be there.
    pub fn problem_of_known(&self, id: &str) -> Option<Damaged> {
        match self.get(id) {
            Ok(Some(_)) => None,
            Ok(None) => Some(self.gone(id)),
            Err(error) => Some(self.because(id, error)),
        }
    }

    /// Whether the file of the record `id`, which need not be one that can be used, has that text.
    pub fn has_text(&self, id: &str, text: &str) -> bool {
        let bytes = self
            .path(id)
            .and_then(|path| match fs::symlink_metadata(&path) {
                Ok(meta) if meta.len() <= LARGEST_FILE => {
                    fs::read(&path).map_err(io_error("read", &path))
                }
                _ => Ok(Vec::new()),
            });
        // Where it cannot be read, nobody can tell.
        bytes.is_ok_and(|bytes| {
            bytes
                .windows(text.len())
                .any(|found| found == text.as_bytes())
        })
    }

    /// Whether the record `id` is a newer release's, which is left to that.
    pub fn is_newer(&self, id: &str) -> bool {
        self.problem_of(id).is_some_and(|damaged| damaged.newer)
    }

    /// Fails if the record `id` is a newer release's.
    pub fn check_replaceable(&self, id: &str) -> Result<()> {
        match self.problem_of(id) {
            Some(damaged) if damaged.newer => Err(damaged.into()),
            _ => Ok(()),
        }
    }

    /// Whether the record `id`, which should be there if it is `known`, cannot be used. The answer holds as long as nobody
    /// removes it.
    pub fn is_unsound(&self, id: &str, known: bool) -> bool {
        match self.get(id) {
            Ok(Some(_)) => false,
            Ok(None) => known,
            Err(_) => true,
        }
    }

    fn because(&self, id: &str, error: Error) -> Damaged {
        match error {
            Error::Damaged(damaged) => damaged,
            error => self.damaged(id, error.to_string()),
        }
    }

    /// What is told of the record `id` that has that problem.
    pub fn damaged(&self, id: &str, problem: String) -> Damaged {
        Damaged {
            id: id.to_owned(),
            path: self.dir.join(format!("{id}{SUFFIX}")),
            problem,
            remedy: T::REMEDY,
            left: T::LEFT,
            newer: false,
        }
    }

    fn gone(&self, id: &str) -> Damaged {
        self.damaged(id, "it is gone".to_owned())
    }

    fn unusable(&self, id: &str, unusable: Unusable) -> Damaged {
        let damaged = self.damaged(id, unusable.to_string());
        match unusable {
            Unusable::Damaged(_) => damaged,
            Unusable::Newer => Damaged {
                newer: true,
                ..damaged.advised("have the newer release repair it")
            },
        }
    }

    /// The record `id`, or `None` if there is none.
    pub fn get(&self, id: &str) -> Result<Option<T>> {
        let path = self.path(id)?;
        let length = match fs::symlink_metadata(&path) {
            Ok(meta) => meta.len(),
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(None),
            Err(error) => return Err(io_error("look at", &path)(error)),
        };
        let damaged = |problem| self.damaged(id, problem);
        if length > LARGEST_FILE {
            return Err(damaged(format!("it has {length} bytes, too many for a record")).into());
        }
        let bytes = match fs::read(&path) {
            Ok(bytes) => bytes,
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(None),
            Err(error) => return Err(io_error("read", &path)(error)),
        };
        let decoded = decode(&bytes);
        Ok(Some(decoded.map_err(|error| self.unusable(id, error))?))
    }

    /// Makes `record` the record `id`, in place of one that may be there, unless that is a newer release's. Durable on return.
    pub fn put(&self, id: &str, record: &T) -> Result<()> {
        self.check_replaceable(id)?;
        let path = self.path(id)?;
        let bytes = encode(record).map_err(io_error("write", &path))?;
        let number = self.temporaries.fetch_add(1, Ordering::Relaxed);
        let temporary = self.dir.join(format!("{TEMPORARY}{number}"));
        let written = write_synced(&temporary, &bytes).and_then(|()| fs::rename(&temporary, &path));
        if let Err(error) = written {
            // Also cleared by the next `open`; this one only gives back the space at once.
            let _ = fs::remove_file(&temporary);
            return Err(io_error("write", &path)(error));
        }
        sync_dir(&self.dir).map_err(io_error("make durable", &path))
    }

    /// Removes the record `id`, damaged or not. Durable on return. Answers whether it was there.
    pub fn remove(&self, id: &str) -> Result<bool> {
        let path = self.path(id)?;
        match fs::remove_file(&path) {
            Ok(()) => {}
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(false),
            Err(error) => return Err(io_error("remove", &path)(error)),
        }
        sync_dir(&self.dir).map_err(io_error("make durable the removal of", &path))?;
        Ok(true)
    }

    fn path(&self, id: &str) -> Result<PathBuf> {
        let allowed = |byte: u8| byte.is_ascii_alphanumeric() || b"._-".contains(&byte);
        if id.is_empty() || id.len() > LONGEST_ID || id.starts_with('.') || !id.bytes().all(allowed)
        {
            return Err(Error::BadId { id: id.to_owned() });
        }
        Ok(self.dir.join(format!("{id}{SUFFIX}")))
    }

    fn names(&self) -> Result<Vec<String>> {
        let fail = io_error("list", &self.dir);
        let entries = fs::read_dir(&self.dir).and_then(Iterator::collect::<io::Result<Vec<_>>>);
        Ok(entries
            .map_err(fail)?
            .into_iter()
            // A name that is not UTF-8 is not one of ours.
            .filter_map(|entry| entry.file_name().into_string().ok())
            .collect())
    }
}

fn io_error(action: &'static str, path: &Path) -> impl FnOnce(io::Error) -> Error + use<> {
    let path = path.to_owned();
    move |source| Error::Io {
        action,
        path,
        source,
    }
}

fn write_synced(path: &Path, bytes: &[u8]) -> io::Result<()> {
    let mut file: File = OpenOptions::new()
        .write(true)
        .create(true)
        .truncate(true)
        .mode(0o600)
        .open(path)?;
    file.write_all(bytes)?;
    file.sync_all()
}

fn encode<T: Record>(record: &T) -> io::Result<Vec<u8>> {
    let header = Header {
        kind: T::KIND.to_owned(),
        version: T::VERSION,
        compatible: 0,
        read_only_compatible: 0,
        incompatible: 0,
    };
    let mut bytes = format!(
        "{MAGIC}\n{}\n{}\n",
        serde_json::to_string(&header)?,
        serde_json::to_string(record)?
    )
    .into_bytes();
    let sum = blake3::hash(&bytes).to_hex();
    bytes.extend_from_slice(sum.as_bytes());
    bytes.push(b'\n');
    Ok(bytes)
}

/// Why a file is not a record that this release can use.
#[derive(Debug, thiserror::Error)]
enum Unusable {
    #[error("{0}")]
    Damaged(String),
    #[error("a newer release of Plywood wrote it")]
    Newer,
}

impl From<String> for Unusable {
    fn from(problem: String) -> Self {
        Self::Damaged(problem)
    }
}

fn decode<T: Record>(bytes: &[u8]) -> Result<T, Unusable> {
    let body_and_sum = bytes
        .strip_suffix(b"\n")
        .ok_or_else(|| "it is empty or cut off".to_owned())?;
    let split = body_and_sum
        .iter()
        .rposition(|&byte| byte == b'\n')
        .ok_or_else(|| "it is cut off".to_owned())?;
    let (body, sum) = (&bytes[..=split], &body_and_sum[split + 1..]);
    if sum != blake3::hash(body).to_hex().as_bytes() {
        return Err("its checksum does not match its content".to_owned().into());
    }
    let text = std::str::from_utf8(body).map_err(|error| format!("it is not text: {error}"))?;
    let lines: Vec<&str> = text.lines().collect();
    let [MAGIC, header, payload] = lines[..] else {
        return Err(format!("it does not start with \"{MAGIC}\"").into());
    };
    let header: Header =
        serde_json::from_str(header).map_err(|error| format!("its header is wrong: {error}"))?;
    if header.kind != T::KIND {
        return Err(format!(
            "it is the record of a {}, not of a {}",
            header.kind,
            T::KIND
        )
        .into());
    }
    // No bit of either word has a meaning yet, and a record that may be read is also replaced.
    if header.version > T::VERSION || header.incompatible != 0 || header.read_only_compatible != 0 {
        return Err(Unusable::Newer);
    }
    serde_json::from_str(payload).map_err(|error| format!("its payload is wrong: {error}").into())
}

#[cfg(test)]
mod tests;
