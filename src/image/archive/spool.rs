//! The members of an archive, taken from a stream to the disk.

use std::collections::HashMap;
use std::fs;
use std::io::{BufReader, Read, Write};
use std::path::{Path, PathBuf};

use sha2::{Digest, Sha256};

use super::super::tar::{self, Kind};
use super::super::{Error, Observer, Phase, Progress, Result, io_error};
use super::refuse;
use crate::store::compression;

const BUFFER: usize = 1 << 20;
/// Most members of an archive.
const MOST_MEMBERS: usize = 100_000;
/// What may follow the archive's end in the stream; writers pad to their block size.
const LARGEST_TRAILER: u64 = 64 << 20;

/// One regular file of an archive.
#[derive(Clone, Debug)]
pub struct File {
    /// Where it lies.
    pub path: PathBuf,
    /// Bytes.
    pub size: u64,
    digest: String,
}

/// The members of one archive, in a directory that goes with the value.
#[derive(Debug)]
pub struct Spool {
    dir: PathBuf,
    files: HashMap<String, File>,
    /// Symbolic links of an archive that `docker save` of old wrote: name to target, both complete.
    links: HashMap<String, String>,
    by_digest: HashMap<String, File>,
}

impl Drop for Spool {
    fn drop(&mut self) {
        if let Err(error) = fs::remove_dir_all(&self.dir) {
            tracing::warn!(dir = %self.dir.display(), %error, "cannot remove a spool; the next start will");
        }
    }
}

impl Spool {
    /// Makes an empty one in `dir`, which must not exist.
    pub fn create(dir: PathBuf) -> Result<Self> {
        fs::create_dir(&dir).map_err(io_error("make", &dir))?;
        Ok(Self {
            dir,
            files: HashMap::new(),
            links: HashMap::new(),
            by_digest: HashMap::new(),
        })
    }

    /// Takes in the whole stream. The name of each blob below `blobs/sha256` is checked against its
    /// content on the way.
    pub fn fill(
        &mut self,
        stream: &mut dyn Read,
        total: u64,
        observer: &dyn Observer,
    ) -> Result<()> {
        let counted = Watched {
            stream,
            done: 0,
            total,
            observer,
        };
        let plain = compression::decompress(
            BufReader::with_capacity(BUFFER, counted),
            compression::WINDOW,
        )
        .map_err(|error| input(observer, error))?;
        let mut archive = tar::Reader::new(plain);
        let mut buffer = vec![0; BUFFER];
        let mut members = 0;
        let fail = |error| match error {
            tar::Error::Read(error) => input(observer, error),
            tar::Error::Malformed { entry, problem } if entry.is_empty() => {
                refuse("the archive", problem)
            }
            tar::Error::Malformed { entry, problem } => refuse(shown(&entry), problem),
        };
        loop {
            let member = match archive.next_entry() {
                Ok(Some(member)) => member,
                Ok(None) => break,
                // Not even the first header is one.
                Err(tar::Error::Malformed { entry, .. }) if members == 0 && entry.is_empty() => {
                    return Err(Error::NoArchive {
                        problem: "it does not begin as a tar does",
                    });
                }
                Err(error) => return Err(fail(error)),
            };
            members += 1;
            if members > MOST_MEMBERS {
                return Err(refuse(
                    shown(&member.path),
                    "the archive has more than 100000 members",
                ));
            }
            let name = name_of(&member.path)?;
            match member.kind {
                Kind::Directory => {}
                Kind::Regular => {
                    let path = self.dir.join(members.to_string());
                    let file = self.keep(path, &mut buffer, &mut |buffer| {
                        archive.read_data(buffer).map_err(fail)
                    })?;
                    self.insert(name, file)?;
                }
                Kind::Symlink | Kind::HardLink => {
                    let mut target = Vec::new();
                    if member.kind == Kind::Symlink {
                        let parent = name.rsplit_once('/').map_or("", |(parent, _)| parent);
                        target.extend_from_slice(parent.as_bytes());
                        target.push(b'/');
                    }
                    target.extend_from_slice(&member.link);
                    self.links.insert(name, name_of(&target)?);
                }
                _ => {
                    return Err(refuse(
                        shown(&member.path),
                        "a device or fifo has no place in an image archive",
                    ));
                }
            }
        }
        if members == 0 {
            return Err(Error::NoArchive {
                problem: "it is empty",
            });
        }
        drain(archive.into_inner(), &mut buffer).map_err(|error| input(observer, error))
    }

    /// Whether there is such a member.
    pub fn contains(&self, name: &str) -> bool {
        self.by_name(name).is_some()
    }

    /// The member of that name, through links.
    pub fn by_name(&self, name: &str) -> Option<&File> {
        let mut name = name;
        for _ in 0..8 {
            match self.links.get(name) {
                Some(target) => name = target,
                None => return self.files.get(name),
            }
        }
        None
    }

    /// The member with that content.
    pub fn by_digest(&self, digest: &str) -> Option<File> {
        self.by_digest.get(digest).cloned()
    }

    /// All of a member's bytes; the caller has looked at its size.
    pub fn read(&self, file: &File) -> Result<Vec<u8>> {
        fs::read(&file.path).map_err(io_error("read", &file.path))
    }

    fn insert(&mut self, name: String, file: File) -> Result<()> {
        if let Some(hex) = name.strip_prefix("blobs/sha256/")
            && file.digest.strip_prefix("sha256:") != Some(hex)
        {
            let problem = format!("the blob's digest is {}", file.digest);
            return Err(refuse(format!("the blob {name}"), problem));
        }
        self.by_digest.insert(file.digest.clone(), file.clone());
        self.links.remove(&name);
        self.files.insert(name, file);
        Ok(())
    }

    fn keep(
        &self,
        path: PathBuf,
        buffer: &mut [u8],
        read: &mut dyn FnMut(&mut [u8]) -> Result<usize>,
    ) -> Result<File> {
        let mut file = fs::File::create_new(&path).map_err(io_error("make", &path))?;
        let mut hash = Sha256::new();
        let mut size = 0;
        loop {
            let count = read(buffer)?;
            if count == 0 {
                break;
            }
            hash.update(&buffer[..count]);
            file.write_all(&buffer[..count])
                .map_err(io_error("write", &path))?;
            size += count as u64;
        }
        Ok(File {
            path,
            size,
            digest: format!("sha256:{:x}", hash.finalize()),
        })
    }
}

impl File {
    /// `sha256:...` of the content.
    pub fn digest(&self) -> &str {
        &self.digest
    }
}

/// Counts what is read and gives up when nobody wants it any more.
struct Watched<'a> {
    stream: &'a mut dyn Read,
    done: u64,
    total: u64,
    observer: &'a dyn Observer,
}

impl Read for Watched<'_> {
    fn read(&mut self, buffer: &mut [u8]) -> std::io::Result<usize> {
        if self.observer.cancelled() {
            return Err(std::io::ErrorKind::ConnectionAborted.into());
        }
        let count = self.stream.read(buffer)?;
        self.done += count as u64;
        self.observer.progress(Progress {
            phase: Phase::Reading,
            digest: String::new(),
            done: self.done,
            total: self.total,
        });
        Ok(count)
    }
}

fn input(observer: &dyn Observer, error: std::io::Error) -> Error {
    if observer.cancelled() {
        Error::Cancelled
    } else {
        Error::Input(error)
    }
}

/// Reads to the end, so that the sender is not cut off in the middle of the padding.
fn drain(mut stream: impl Read, buffer: &mut [u8]) -> std::io::Result<()> {
    let mut trailer = 0;
    loop {
        let count = match stream.read(buffer) {
            Ok(count) => count,
            Err(error) if error.kind() == std::io::ErrorKind::Interrupted => continue,
            Err(error) => return Err(error),
        };
        trailer += count as u64;
        if count == 0 {
            return Ok(());
        }
        if trailer > LARGEST_TRAILER {
            let problem = "more than 64 MiB follow the end of the archive";
            return Err(std::io::Error::new(
                std::io::ErrorKind::InvalidData,
                problem,
            ));
        }
    }
}

/// The complete name of a member: no leading slash, no `.`, and `..` taken back. Names are only looked
/// up, never made on the disk.
fn name_of(path: &[u8]) -> Result<String> {
    let text =
        std::str::from_utf8(path).map_err(|_| refuse(shown(path), "its name is not UTF-8"))?;
    let mut parts: Vec<&str> = Vec::new();
    for part in text.split('/') {
        match part {
            "" | "." => {}
            ".." => {
                parts
                    .pop()
                    .ok_or_else(|| refuse(shown(path), "its name leads out of the archive"))?;
            }
            part => parts.push(part),
        }
    }
    Ok(parts.join("/"))
}

fn shown(path: &[u8]) -> String {
    format!("the member {}", super::super::printable(path))
}

/// Removes spools that a crash left in `dir`.
pub fn clear(dir: &Path) -> Result<()> {
    for entry in fs::read_dir(dir).map_err(io_error("list", dir))? {
        let path = entry.map_err(io_error("list", dir))?.path();
        fs::remove_dir_all(&path).map_err(io_error("remove the left-over", &path))?;
    }
    Ok(())
}
