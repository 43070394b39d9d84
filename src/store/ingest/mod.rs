//! The ways of a layer into the store: as a tar stream, or entry by entry ([`NewLayer`]).
//!
//! A pipeline whose memory is bounded: one thread reads, hashes and decompresses the stream, another
//! hashes its content; the caller's parses it, writes large contents, the index and the recipe; workers hash and compress
//! small contents; one thread writes the pack. Nothing is unpacked into the host's file system, so
//! no name, link or device of a layer can reach it.
//!
//! The layer exists when its record does. Before that its pack, its large objects, its index and its
//! recipe are durable and in their places; what a failure leaves is in `tmp` or is an object that no record
//! reaches.

mod entries;
mod large;
mod pick;
pub(super) mod recipe;
mod sink;
mod source;

use std::io::{self, Read};
use std::path::Path;

use super::compression::Compressor;
use super::error::{Error, Result, printable, refused};
use super::format::Time;
use super::format::tables::Extent;
use super::layer::index::{Attributes, Body, LARGEST_XATTR, LONGEST_PATH, LayerBuilder};
use super::object::Objects;
use super::tar::names::{Meaning, clean, meaning};
use super::tar::{Entry, Kind, Reader};

pub(super) use entries::collect;
pub use entries::{NewContent, NewLayer};
pub(super) use pick::{Wanted, pick};
pub(super) use sink::Stored;
pub(super) use source::Digests;

const BUFFER: usize = 128 << 10;
const CAPABILITY: &[u8] = b"security.capability";
/// The last second that fits in 64 bits of nanoseconds; containerd takes later ones for damage.
const LATEST_SECOND: i64 = i64::MAX / 1_000_000_000;

/// What one layer may claim.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Limits {
    /// Uncompressed bytes.
    pub bytes: u64,
    /// Entries, and paths that they name.
    pub entries: u64,
    /// Bytes of names, link targets, extended attributes, and maps of sparse files.
    pub names: u64,
    /// Bytes of a file, its holes included.
    pub file: u64,
    /// Bytes of a path, also of that which a hard link goes to.
    pub path: u64,
    /// Bytes of the value of an extended attribute.
    pub xattr: u64,
}

impl Default for Limits {
    fn default() -> Self {
        Self {
            bytes: 1 << 40,
            entries: 10_000_000,
            names: 512 << 20,
            file: i64::MAX as u64,
            path: LONGEST_PATH as u64,
            xattr: LARGEST_XATTR as u64,
        }
    }
}

/// How layers are taken in.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Settings {
    /// Contents of more bytes become files of their own.
    pub small: u64,
    /// Whether those files are their contents as they are, so that the kernel can read them by itself, instead of
    /// compressed in frames.
    pub plain: bool,
    /// Level of zstd for what is compressed.
    pub level: i32,
    /// Threads that hash and compress.
    pub workers: usize,
    /// Bytes for contents on their way and for the window of a stream of zstd, half of it for each. The index of the layer
    /// comes on top.
    pub memory: u64,
    /// What a layer may claim.
    pub limits: Limits,
}

/// Threads that hash and compress, unless more are asked for: each takes a megabyte, and one hands over what they do.
const MOST_DEFAULT_WORKERS: usize = 32;

impl Settings {
    /// Bytes of memory with which an import can do: contents on their way, each as large as a packed one may be, one more for each
    /// worker, and what the workers need for compressing them.
    pub fn least_memory(&self) -> io::Result<u64> {
        const ON_THEIR_WAY: u64 = 8;
        let workers = self.workers as u64;
        let compressing = Compressor::memory(self.level, self.small.max(1))?;
        Ok(self.small * (ON_THEIR_WAY + workers) + compressing * workers)
    }
}

impl Default for Settings {
    fn default() -> Self {
        Self {
            small: 128 << 10,
            plain: false,
            level: 1,
            workers: std::thread::available_parallelism()
                .map_or(1, usize::from)
                .min(MOST_DEFAULT_WORKERS),
            memory: 256 << 20,
            limits: Limits::default(),
        }
    }
}

/// Who wants to know how far an import is.
pub trait Observer: Sync {
    /// So many bytes of the stream as it came were read.
    fn progress(&self, _bytes: u64) {}
    /// Whether nobody wants the layer any more.
    fn cancelled(&self) -> bool {
        false
    }
}

/// Nobody.
impl Observer for () {}

/// A layer whose contents are in the store's files, but not durable yet.
pub(super) struct Taken {
    pub(super) index: LayerBuilder,
    pub(super) recipe: recipe::Writer,
    pub(super) stored: Stored,
    pub(super) digests: Digests,
}

/// Takes in the layer that `stream` is: a tar, plain or compressed with gzip or zstd.
pub(super) fn take(
    stream: impl Read + Send,
    objects: &Objects,
    tmp: &Path,
    recipe: recipe::Writer,
    settings: &Settings,
    observer: &dyn Observer,
) -> Result<Taken> {
    let taken = source::with_content(stream, settings, observer, |content| {
        sink::with_sink(objects, tmp, settings, |sink| {
            let mut layer = Layer {
                reader: Reader::new(content, recipe),
                index: LayerBuilder::new(),
                limits: &settings.limits,
                buffer: vec![0; BUFFER],
            };
            layer.take(sink)?;
            Ok((layer.index, layer.reader.finish()?))
        })
    });
    let (((index, recipe), stored), digests) = taken?;
    Ok(Taken {
        index,
        recipe,
        stored,
        digests,
    })
}

/// Reads the stream of a layer for its digests alone.
pub(super) fn digests(
    stream: impl Read + Send,
    settings: &Settings,
    observer: &dyn Observer,
) -> Result<Digests> {
    let read = source::with_content(stream, settings, observer, |mut content| {
        io::copy(&mut content, &mut io::sink()).map_err(Error::Input)
    });
    read.map(|(_, digests)| digests)
}

struct Layer<'a, R> {
    reader: Reader<R, recipe::Writer>,
    index: LayerBuilder,
    limits: &'a Limits,
    buffer: Vec<u8>,
}

impl<R: Read> Layer<'_, R> {
    fn take(&mut self, sink: &mut sink::Sink<'_>) -> Result<()> {
        let mut entries = 0;
        while let Some(entry) = self.reader.next_entry()? {
            entries += 1;
            self.check(&entry)?;
            match meaning(&entry.path).map_err(|problem| refused(&entry.path, problem))? {
                Meaning::Nothing => {}
                Meaning::Make(path) => {
                    self.check_path(&entry, "it", &path)?;
                    self.make(&entry, &path, sink)?;
                }
                Meaning::Remove(path) => {
                    self.check_path(&entry, "what it removes", &path)?;
                    self.index.remove(&path)?;
                }
                Meaning::Clear(path) => {
                    self.check_path(&entry, "what it empties", &path)?;
                    self.index.clear(&path)?;
                }
            }
            // What the last entry has brought counts, too.
            if entries.max(self.index.paths()) > self.limits.entries {
                let problem = format!("the layer has more than {} entries", self.limits.entries);
                return Err(refused(&entry.path, problem));
            }
            if self.index.text_bytes() > self.limits.names {
                let problem = "the names in the layer have, with its link targets, extended attributes and maps of sparse files, more bytes than a layer may have";
                return Err(refused(&entry.path, problem));
            }
        }
        Ok(())
    }

    /// Fails if an entry claims more than it may.
    fn check(&self, entry: &Entry) -> Result<()> {
        let claims = [
            (entry.stored, self.limits.bytes, "a layer"),
            (entry.size, self.limits.file, "a file of a layer"),
        ];
        for (bytes, most, whose) in claims {
            if bytes > most {
                let problem = format!("it claims to have {bytes} bytes, more than {whose} may");
                return Err(refused(&entry.path, problem));
            }
        }
        let too_large = |value: &Vec<u8>| value.len() as u64 > self.limits.xattr;
        if let Some((name, _)) = entry.xattrs.iter().find(|(_, value)| too_large(value)) {
            let (name, most) = (printable(name), bytes(self.limits.xattr));
            let problem = format!("its extended attribute {name} has more than {most}");
            return Err(refused(&entry.path, problem));
        }
        let is_bad =
            |(name, value): &(Vec<u8>, Vec<u8>)| name == CAPABILITY && !is_capability(value);
        if entry.xattrs.iter().any(is_bad) {
            let problem =
                "its extended attribute security.capability is none that the kernel knows";
            return Err(refused(&entry.path, problem));
        }
        Ok(())
    }

    fn check_path(&self, entry: &Entry, what: &str, path: &[&[u8]]) -> Result<()> {
        let length = path.iter().map(|name| name.len() + 1).sum::<usize>();
        let most = self.limits.path;
        if length as u64 > most + 1 {
            let problem = format!("{what} is longer than {most} bytes");
            return Err(refused(&entry.path, problem));
        }
        Ok(())
    }

    fn make(&mut self, entry: &Entry, path: &[&[u8]], sink: &mut sink::Sink<'_>) -> Result<()> {
        let (kind, body) = match entry.kind {
            Kind::Regular => (libc::S_IFREG, self.content(entry, sink)?),
            Kind::Directory => (libc::S_IFDIR, Body::Nothing),
            Kind::Fifo => (libc::S_IFIFO, Body::Nothing),
            Kind::Symlink if entry.link.is_empty() => {
                return Err(refused(&entry.path, "it is a symbolic link to nothing"));
            }
            Kind::Symlink => (libc::S_IFLNK, Body::Target(entry.link.clone())),
            Kind::BlockDevice => (libc::S_IFBLK, device(entry)?),
            Kind::CharDevice if entry.device == (0, 0) => {
                return Err(refused(
                    &entry.path,
                    "it is the character device 0:0, which marks a deletion in overlayfs and cannot be a file; write the deletion as a \".wh.\" entry",
                ));
            }
            Kind::CharDevice => (libc::S_IFCHR, device(entry)?),
            Kind::HardLink => {
                let target = clean(&entry.link).map_err(|problem| {
                    refused(&entry.path, format!("its hard link's target: {problem}"))
                })?;
                if target.is_empty() {
                    return Err(refused(&entry.path, "it is a hard link to the root"));
                }
                self.check_path(entry, "its hard link's target", &target)?;
                let attributes = attributes(entry, 0);
                return self.index.link(path, &attributes, &target.join(&b'/'));
            }
        };
        let mut attributes = attributes(entry, kind);
        if entry.kind == Kind::Symlink {
            // The kernel knows no other.
            attributes.mode = (libc::S_IFLNK | 0o777) as u16;
        }
        self.index.make(path, &attributes, &body)
    }

    /// Hands over the content of a regular file.
    fn content(&mut self, entry: &Entry, sink: &mut sink::Sink<'_>) -> Result<Body> {
        let mut number = 0;
        if entry.stored != 0 {
            let mut content = sink.begin(entry.stored)?;
            self.reader.tape().content()?;
            loop {
                let count = self.reader.read(&mut self.buffer)?;
                if count == 0 {
                    break;
                }
                content.write(&self.buffer[..count])?;
            }
            number = sink.end(content)?;
        }
        let Some(parts) = &entry.parts else {
            return Ok(Body::Whole {
                size: entry.size,
                content: number,
            });
        };
        let mut object_offset = 0;
        let extents = parts.iter().map(|part| {
            let extent = Extent {
                offset: part.offset,
                length: part.length,
                object_offset,
                object: number,
            };
            object_offset += part.length;
            extent
        });
        Ok(Body::Sparse {
            size: entry.size,
            extents: extents.collect(),
        })
    }
}

/// A number of bytes as people say it.
fn bytes(number: u64) -> String {
    match number % 1024 {
        0 => format!("{} KiB", number / 1024),
        _ => format!("{number} bytes"),
    }
}

fn attributes(entry: &Entry, kind: u32) -> Attributes {
    let xattrs = entry.xattrs.iter().filter(|(name, _)| !is_private(name));
    Attributes {
        mode: kind as u16 | entry.perm,
        uid: entry.uid,
        gid: entry.gid,
        mtime: bounded(entry.mtime),
        atime: bounded(entry.atime.unwrap_or_default().max(entry.mtime)),
        xattrs: xattrs.cloned().collect(),
    }
}

/// Whether a layer may not set an extended attribute: those of the host's administrator say nothing of an image. As
/// containerd has it.
pub fn is_private(xattr: &[u8]) -> bool {
    xattr.starts_with(b"trusted.")
}

/// Whether the kernel takes a value of `security.capability`: of the second revision, or of the third, which has an owner; the
/// lowest bit of the first number is a flag. See `cap_convert_nscap` in security/commoncap.c.
fn is_capability(value: &[u8]) -> bool {
    const FLAGS: u32 = 1;
    let revision = value
        .first_chunk()
        .map(|first| u32::from_le_bytes(*first) & !FLAGS);
    matches!(
        (revision, value.len()),
        (Some(0x0200_0000), 20) | (Some(0x0300_0000), 24)
    )
}

/// As containerd sets times: access no older than modification, and what cannot be a time is the
/// epoch.
fn bounded(time: Time) -> Time {
    if (0..LATEST_SECOND).contains(&time.sec) {
        time
    } else {
        Time::default()
    }
}

/// The number of a device, if the kernel has such numbers.
fn device(entry: &Entry) -> Result<Body, Error> {
    let (major, minor) = entry.device;
    if major >= 1 << 12 || minor >= 1 << 20 {
        return Err(refused(&entry.path, "its device number is too large"));
    }
    Ok(Body::Device { major, minor })
}
