//! The index: finds a record's id by another name than its own.
//!
//! sled keeps it, and sled is not trusted with anything: whatever the index answers is checked against
//! the record it leads to, and the index is made anew from the records
//! - when it was not closed in order (the marker `clean` is missing: it exists only between a close
//!   and the next open), or when it does not hold what it held then (the marker has the sum; sled
//!   opens a truncated or overwritten file without complaint, as an empty one);
//! - when opening and reading it through fails, panics, aborts or takes too long, which a child
//!   process tries first, so that no damage of its files can take the daemon with it.
//!
//! So nothing of it has to be durable before it is closed, and it is never flushed in between.

use std::fs::{self, File};
use std::io::{self, Write};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use super::durable::{create_dir, sync_dir};

/// The hidden argument with which a program is asked to call [`probe`] on the directory that follows.
pub const PROBE_ARGUMENT: &str = "--probe-index";

/// How long reading an index may take before making it anew is the better choice.
const PROBE_DEADLINE: Duration = Duration::from_secs(10);
const CACHE_BYTES: u64 = 16 << 20;

/// Why the index could not be used.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// The host refused an operation on its directory.
    #[error("cannot {action} the index {path}: {source}")]
    Io {
        /// What was tried.
        action: &'static str,
        /// Where.
        path: PathBuf,
        /// What the host said.
        source: io::Error,
    },
    /// sled refused an operation.
    #[error("the index {path} fails: {source}; restart plyd to have it made anew")]
    Sled {
        /// Where.
        path: PathBuf,
        /// What sled said.
        source: sled::Error,
    },
}

/// Result of an operation of the index.
pub type Result<T, E = Error> = std::result::Result<T, E>;

/// An open index of names.
#[derive(Debug)]
pub struct Index {
    dir: PathBuf,
    db: sled::Db,
}

impl Index {
    /// Opens the index in `dir`. `prober` is a program that answers [`PROBE_ARGUMENT`]; without one
    /// no old index is trusted, and it is empty.
    pub fn open(dir: &Path, prober: Option<&Path>) -> Result<Self> {
        let fail = |action| {
            let path = dir.to_owned();
            move |source| Error::Io {
                action,
                path,
                source,
            }
        };
        create_dir(dir, 0o700).map_err(fail("make"))?;
        let marker = dir.join("clean");
        let db_dir = dir.join("sled");
        let closed_as = match fs::read(&marker) {
            Ok(sum) => Some(sum),
            Err(error) if error.kind() == io::ErrorKind::NotFound => None,
            Err(error) => return Err(fail("open")(error)),
        };
        if closed_as.is_some() {
            fs::remove_file(&marker)
                .and_then(|()| sync_dir(dir))
                .map_err(fail("open"))?;
        }
        if let (Some(sum), Some(prober)) = (closed_as, prober) {
            match reopen(prober, &db_dir, &sum) {
                Ok(db) => {
                    let dir = dir.to_owned();
                    return Ok(Self { dir, db });
                }
                Err(problem) => {
                    tracing::warn!(index = %db_dir.display(), problem, "the index is unusable and is made anew");
                }
            }
        }
        match fs::remove_dir_all(&db_dir) {
            Err(error) if error.kind() != io::ErrorKind::NotFound => {
                return Err(fail("clear")(error));
            }
            _ => {}
        }
        let db = open_sled(&db_dir).map_err(|source| Error::Sled {
            path: db_dir,
            source,
        })?;
        let dir = dir.to_owned();
        Ok(Self { dir, db })
    }

    /// What `name` leads to.
    pub fn get(&self, name: &[u8]) -> Result<Option<String>> {
        let value = self.db.get(name).map_err(|e| self.failed(e))?;
        Ok(value.map(|bytes| String::from_utf8_lossy(&bytes).into_owned()))
    }

    /// A name that leads to `id`, for messages: it looks at all of them.
    pub fn find(&self, id: &str) -> Result<Option<Vec<u8>>> {
        for entry in self.db.iter() {
            let (name, of) = entry.map_err(|e| self.failed(e))?;
            if *of == *id.as_bytes() {
                return Ok(Some(name.to_vec()));
            }
        }
        Ok(None)
    }

    /// Makes `name` lead to `id`.
    pub fn insert(&self, name: &[u8], id: &str) -> Result<()> {
        let old = self.db.insert(name, id.as_bytes());
        old.map(drop).map_err(|e| self.failed(e))
    }

    /// Makes `name` lead nowhere.
    pub fn remove(&self, name: &[u8]) -> Result<()> {
        let old = self.db.remove(name);
        old.map(drop).map_err(|e| self.failed(e))
    }

    /// Forgets everything.
    pub fn clear(&self) -> Result<()> {
        self.db.clear().map_err(|e| self.failed(e))
    }

    /// Brings the index to the disk and marks it as whole. Whatever is changed after this is lost to
    /// the next open, so it is the last call.
    pub fn close(&self) -> Result<()> {
        let sum = checksum(&self.db).map_err(|e| self.failed(e))?;
        self.db.flush().map_err(|e| self.failed(e))?;
        File::create(self.dir.join("clean"))
            .and_then(|mut marker| {
                marker.write_all(sum.as_bytes())?;
                marker.sync_all()
            })
            .and_then(|()| sync_dir(&self.dir))
            .map_err(|source| Error::Io {
                action: "close",
                path: self.dir.clone(),
                source,
            })
    }

    fn failed(&self, source: sled::Error) -> Error {
        Error::Sled {
            path: self.dir.clone(),
            source,
        }
    }
}

/// Opens the sled in `dir` and reads it through: what the child process of [`Index::open`] does.
pub fn probe(dir: &Path) -> Result<(), sled::Error> {
    checksum(&open_sled(dir)?).map(drop)
}

fn checksum(db: &sled::Db) -> Result<String, sled::Error> {
    let mut sum = blake3::Hasher::new();
    for entry in db.iter() {
        let (name, id) = entry?;
        for part in [&name, &id] {
            sum.update(&(part.len() as u64).to_le_bytes());
            sum.update(part);
        }
    }
    Ok(sum.finalize().to_hex().to_string())
}

fn reopen(prober: &Path, dir: &Path, sum: &[u8]) -> Result<sled::Db, String> {
    probe_in_child(prober, dir)?;
    let db = open_sled(dir).map_err(|error| error.to_string())?;
    match checksum(&db) {
        Ok(found) if found.as_bytes() == sum => Ok(db),
        Ok(_) => Err("it does not hold what it held when it was closed".to_owned()),
        Err(error) => Err(error.to_string()),
    }
}

fn open_sled(dir: &Path) -> Result<sled::Db, sled::Error> {
    sled::Config::new()
        .path(dir)
        .cache_capacity(CACHE_BYTES)
        .flush_every_ms(None)
        .open()
}

fn probe_in_child(program: &Path, dir: &Path) -> Result<(), String> {
    let mut child = Command::new(program)
        .arg(PROBE_ARGUMENT)
        .arg(dir)
        .stdin(Stdio::null())
        .stdout(Stdio::null())
        .stderr(Stdio::null())
        .spawn()
        .map_err(|error| format!("cannot run {}: {error}", program.display()))?;
    let deadline = Instant::now() + PROBE_DEADLINE;
    let mut pause = Duration::from_millis(1);
    loop {
        match child.try_wait() {
            Ok(Some(status)) if status.success() => return Ok(()),
            Ok(Some(status)) => return Err(format!("reading it ended with {status}")),
            Ok(None) if Instant::now() < deadline => {
                std::thread::sleep(pause);
                pause = (pause * 2).min(Duration::from_millis(50));
            }
            outcome => {
                // Killed and reaped, it has let go of sled's lock.
                let _ = child.kill();
                let _ = child.wait();
                return Err(match outcome {
                    Err(error) => format!("cannot wait for the reader: {error}"),
                    _ => format!("reading it takes longer than {PROBE_DEADLINE:?}"),
                });
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Stands in for plyd: succeeds, so that what sled itself makes of the files is seen.
    const TRUSTING: &str = "/bin/true";
    const REFUSING: &str = "/bin/false";

    fn open(dir: &Path, prober: Option<&str>) -> Index {
        Index::open(dir, prober.map(Path::new)).unwrap()
    }

    #[test]
    fn an_index_closed_in_order_is_kept() {
        let tmp = tempfile::tempdir().unwrap();
        let index = open(tmp.path(), Some(TRUSTING));
        index.insert(b"name", "id").unwrap();
        index.close().unwrap();
        drop(index);
        let index = open(tmp.path(), Some(TRUSTING));
        assert_eq!(index.get(b"name").unwrap().as_deref(), Some("id"));
        assert_eq!(index.find("id").unwrap().as_deref(), Some(&b"name"[..]));
        index.remove(b"name").unwrap();
        assert_eq!(index.get(b"name").unwrap(), None);
        assert_eq!(index.find("id").unwrap(), None);
    }

    #[test]
    fn it_is_made_anew_when_not_closed_or_refused_by_the_probe() {
        let tmp = tempfile::tempdir().unwrap();
        for (close, prober) in [
            (false, Some(TRUSTING)),
            (true, Some(REFUSING)),
            (true, Some("/nonexistent")),
            (true, None),
        ] {
            let index = open(tmp.path(), Some(TRUSTING));
            index.insert(b"name", "id").unwrap();
            if close {
                index.close().unwrap();
            }
            drop(index);
            let index = open(tmp.path(), prober);
            let found = index.get(b"name").unwrap();
            assert_eq!(found, None, "close {close}, prober {prober:?}");
        }
    }

    #[test]
    fn garbage_in_its_place_is_replaced() {
        let tmp = tempfile::tempdir().unwrap();
        for damage in [
            |path: &Path| fs::write(path, [0xff; 4096]).unwrap(),
            |path: &Path| fs::write(path, []).unwrap(),
            |path: &Path| fs::write(path, &fs::read(path).unwrap()[..20]).unwrap(),
        ] {
            for file in ["sled/db", "sled/conf"] {
                let index = open(tmp.path(), None);
                index.insert(b"name", "id").unwrap();
                index.close().unwrap();
                drop(index);
                damage(&tmp.path().join(file));
                let index = open(tmp.path(), Some(TRUSTING));
                let found = index.get(b"name").unwrap();
                // sled mends some damage of its `conf` by itself.
                let whole = found.as_deref() == Some("id") && file == "sled/conf";
                assert!(found.is_none() || whole, "{file}: {found:?}");
                index.insert(b"name", "id").unwrap();
            }
        }
    }
}
