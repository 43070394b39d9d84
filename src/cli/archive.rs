//! Where an image archive comes from: a file, stdin, or an OCI layout directory that becomes a tar
//! stream on the way. Sends chunks to the call that loads it.

use std::fs::{self, File};
use std::io::{self, IsTerminal, Read, Write};
use std::path::{Path, PathBuf};

use tokio::sync::mpsc;

use super::error::{Error, Result};
use crate::grpc::pb::plywood::{LoadRequest, load_request};

/// Bytes in one message. Far below gRPC's limit of 4 MiB, far above what a message costs.
const CHUNK: usize = 256 << 10;

/// Size of a tar header, and the unit that tar pads to.
const TAR_BLOCK: u64 = 512;

/// An archive that is about to be sent.
#[derive(Debug)]
pub enum Source {
    /// Our stdin.
    Stdin,
    /// A file, or anything else that can be read from its beginning to its end.
    File(PathBuf, File),
    /// The files of a layout directory, in the order in which they are to be sent.
    Layout(PathBuf, Vec<Entry>),
}

/// A file of a layout directory.
#[derive(Debug)]
pub struct Entry {
    /// Path below the layout.
    name: PathBuf,
    size: u64,
}

impl Source {
    /// Opens `path`; `-` is stdin.
    pub fn open(path: &Path) -> Result<Self> {
        if path.as_os_str() == "-" {
            if io::stdin().is_terminal() {
                return Err(Error::Input(
                    "stdin is a terminal: name the archive with -i FILE, or pipe it in".to_owned(),
                ));
            }
            return Ok(Self::Stdin);
        }
        let file = File::open(path).map_err(|error| {
            Error::Refused(format!(
                "cannot open {}: {error}; name an image archive with -i, or the directory of an OCI layout, or - for stdin",
                path.display()
            ))
        })?;
        let meta = file.metadata().map_err(|e| failed("read", path, e))?;
        if meta.is_dir() {
            Ok(Self::Layout(path.to_owned(), layout_entries(path)?))
        } else {
            Ok(Self::File(path.to_owned(), file))
        }
    }

    /// How many bytes will be sent; 0 when that cannot be known.
    pub fn total(&self) -> u64 {
        match self {
            Self::Stdin => 0,
            Self::File(_, file) => file.metadata().map_or(0, |meta| meta.len()),
            Self::Layout(_, entries) => {
                let padded = |e: &Entry| TAR_BLOCK + e.size.next_multiple_of(TAR_BLOCK);
                entries.iter().map(padded).sum::<u64>() + 2 * TAR_BLOCK
            }
        }
    }

    /// Sends the whole archive to `to` and gives `to` back: when reading fails the stream must not
    /// look as if it had ended. Blocks. Ends early without an error when the receiver has gone, who
    /// knows why.
    pub fn send(self, to: mpsc::Sender<LoadRequest>) -> (Result<()>, mpsc::Sender<LoadRequest>) {
        let mut sink = Sink {
            to,
            buffer: Vec::with_capacity(CHUNK),
            gone: false,
        };
        let result = self.copy(&mut sink);
        let result = if sink.gone { Ok(()) } else { result };
        (result, sink.to)
    }

    fn copy(self, sink: &mut Sink) -> Result<()> {
        match self {
            Self::Stdin => pour(Path::new("stdin"), io::stdin().lock(), sink),
            Self::File(path, file) => pour(&path, file, sink),
            Self::Layout(path, entries) => {
                let mut tar = tar::Builder::new(&mut *sink);
                tar.mode(tar::HeaderMode::Deterministic);
                for entry in entries {
                    append(&mut tar, &path.join(&entry.name), &entry)?;
                }
                tar.finish().map_err(|e| failed("send", &path, e))?;
                drop(tar);
                sink.flush().map_err(|e| failed("send", &path, e))
            }
        }
    }
}

/// Copies what `from` has. One read is one message at most, so that a slow pipe is not held back.
fn pour(path: &Path, mut from: impl Read, sink: &mut Sink) -> Result<()> {
    let mut buffer = vec![0; CHUNK];
    loop {
        let count = match from.read(&mut buffer) {
            Ok(0) => return sink.flush().map_err(|e| failed("send", path, e)),
            Ok(count) => count,
            Err(e) if e.kind() == io::ErrorKind::Interrupted => continue,
            Err(e) => return Err(failed("read", path, e)),
        };
        sink.write_all(&buffer[..count])
            .map_err(|e| failed("send", path, e))?;
    }
}

fn append(tar: &mut tar::Builder<&mut Sink>, path: &Path, entry: &Entry) -> Result<()> {
    let file = File::open(path).map_err(|e| failed("open", path, e))?;
    let mut header = tar::Header::new_ustar();
    header.set_mode(0o644);
    header.set_size(entry.size);
    // A file that shrank since it was listed would shift all that follows it.
    let mut exact = Exact {
        inner: file,
        left: entry.size,
    };
    tar.append_data(&mut header, &entry.name, &mut exact)
        .map_err(|e| failed("send", path, e))
}

/// The files of an OCI layout that belong to it: `oci-layout`, `index.json` and the blobs.
fn layout_entries(path: &Path) -> Result<Vec<Entry>> {
    if !path.join("oci-layout").is_file() {
        return Err(Error::Refused(format!(
            "{} is not the directory of an OCI image layout, for it has no file named oci-layout; \
             `skopeo copy SOURCE oci:DIR` makes one, and an archive is named as a file",
            path.display()
        )));
    }
    let mut entries = Vec::new();
    for name in ["oci-layout", "index.json"] {
        entries.push(entry_of(path, PathBuf::from(name))?);
    }
    for algorithm in names_in(&path.join("blobs"))? {
        let below = Path::new("blobs").join(algorithm);
        for blob in names_in(&path.join(&below))? {
            entries.push(entry_of(path, below.join(blob))?);
        }
    }
    Ok(entries)
}

fn entry_of(layout: &Path, name: PathBuf) -> Result<Entry> {
    let path = layout.join(&name);
    let meta = fs::metadata(&path).map_err(|e| failed("read", &path, e))?;
    if !meta.is_file() {
        return Err(Error::Refused(format!(
            "{} is not a regular file, so this is not an OCI image layout",
            path.display()
        )));
    }
    Ok(Entry {
        name,
        size: meta.len(),
    })
}

fn names_in(path: &Path) -> Result<Vec<std::ffi::OsString>> {
    let entries = fs::read_dir(path).map_err(|e| failed("read", path, e))?;
    let mut names = entries
        .map(|entry| entry.map(|entry| entry.file_name()))
        .collect::<io::Result<Vec<_>>>()
        .map_err(|e| failed("read", path, e))?;
    names.sort();
    Ok(names)
}

fn failed(action: &'static str, path: &Path, source: io::Error) -> Error {
    Error::File {
        action,
        path: path.to_owned(),
        source,
    }
}

/// Collects bytes into messages.
struct Sink {
    to: mpsc::Sender<LoadRequest>,
    buffer: Vec<u8>,
    gone: bool,
}

impl Write for Sink {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        let count = bytes.len().min(CHUNK - self.buffer.len());
        self.buffer.extend_from_slice(&bytes[..count]);
        if self.buffer.len() == CHUNK {
            self.flush()?;
        }
        Ok(count)
    }

    fn flush(&mut self) -> io::Result<()> {
        if self.buffer.is_empty() {
            return Ok(());
        }
        let data = std::mem::replace(&mut self.buffer, Vec::with_capacity(CHUNK));
        let message = LoadRequest {
            part: Some(load_request::Part::Data(data)),
        };
        self.to.blocking_send(message).map_err(|_| {
            self.gone = true;
            io::ErrorKind::BrokenPipe.into()
        })
    }
}

/// Reads exactly `left` bytes, or fails.
struct Exact<R> {
    inner: R,
    left: u64,
}

impl<R: Read> Read for Exact<R> {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        let want = usize::try_from(self.left).map_or(buffer.len(), |left| left.min(buffer.len()));
        let count = self.inner.read(&mut buffer[..want])?;
        if count == 0 && want > 0 {
            return Err(io::Error::new(
                io::ErrorKind::UnexpectedEof,
                "it became shorter while it was read",
            ));
        }
        self.left -= count as u64;
        Ok(count)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn collect(source: Source) -> (Result<()>, Vec<u8>) {
        let (to, mut from) = mpsc::channel(1);
        let thread = std::thread::spawn(move || source.send(to).0);
        let mut bytes = Vec::new();
        while let Some(message) = from.blocking_recv() {
            match message.part {
                Some(load_request::Part::Data(data)) => bytes.extend(data),
                other => panic!("{other:?}"),
            }
        }
        (thread.join().unwrap(), bytes)
    }

    fn layout() -> tempfile::TempDir {
        let dir = tempfile::tempdir().unwrap();
        fs::create_dir_all(dir.path().join("blobs/sha256")).unwrap();
        fs::write(dir.path().join("oci-layout"), "{}").unwrap();
        fs::write(dir.path().join("index.json"), "{\"a\":1}").unwrap();
        fs::write(dir.path().join("blobs/sha256/00"), vec![7; CHUNK + 1]).unwrap();
        fs::write(dir.path().join("unrelated"), "x").unwrap();
        dir
    }

    #[test]
    fn a_layout_becomes_a_tar_of_the_announced_size() {
        let dir = layout();
        let source = Source::open(dir.path()).unwrap();
        let total = source.total();
        let (result, bytes) = collect(source);
        result.unwrap();
        assert_eq!(bytes.len() as u64, total);
        let mut archive = tar::Archive::new(&bytes[..]);
        let names: Vec<_> = archive
            .entries()
            .unwrap()
            .map(|e| e.unwrap().path().unwrap().display().to_string())
            .collect();
        assert_eq!(names, ["oci-layout", "index.json", "blobs/sha256/00"]);
    }

    #[test]
    fn a_file_is_sent_as_it_is() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("a.tar");
        let content: Vec<u8> = (0..3 * CHUNK + 5).map(|i| (i % 251) as u8).collect();
        fs::write(&path, &content).unwrap();
        let source = Source::open(&path).unwrap();
        assert_eq!(source.total(), content.len() as u64);
        let (result, bytes) = collect(source);
        result.unwrap();
        assert!(bytes == content);
    }

    #[test]
    fn what_is_no_layout_is_refused() {
        let dir = tempfile::tempdir().unwrap();
        let error = Source::open(dir.path()).unwrap_err();
        assert!(
            error
                .to_string()
                .contains("is not the directory of an OCI image layout")
        );
        let error = Source::open(&dir.path().join("none")).unwrap_err();
        assert!(error.to_string().starts_with("cannot open"));
    }

    #[test]
    fn a_file_that_shrinks_is_an_error() {
        let dir = layout();
        let source = Source::open(dir.path()).unwrap();
        fs::write(dir.path().join("blobs/sha256/00"), "short").unwrap();
        let (result, _) = collect(source);
        assert!(result.unwrap_err().to_string().contains("became shorter"));
    }

    #[test]
    fn a_receiver_that_went_away_is_no_error_of_ours() {
        let dir = layout();
        let (to, from) = mpsc::channel(1);
        drop(from);
        Source::open(dir.path()).unwrap().send(to).0.unwrap();
    }
}
