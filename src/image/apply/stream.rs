//! A layer's content: decompressed and hashed in one thread while another unpacks it.

use std::fs::File;
use std::io::{self, BufRead, BufReader, Read};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use crossbeam::channel::{Receiver, Sender, bounded};
use sha2::{Digest, Sha256};

use super::super::{Error, Observer, Result, io_error};
use super::{Fault, Source};
use crate::store::compression;

const CHUNK: usize = 1 << 20;
/// Chunks between the two threads.
const DEPTH: usize = 4;

type Chunk = io::Result<Vec<u8>>;

/// Calls `consume` with the content of the layer; it has to read it to the end. Returns the digest of
/// the content.
pub(super) fn with_content(
    source: &Source<'_>,
    largest: u64,
    consume: impl FnOnce(Content) -> Result<()>,
) -> Result<String> {
    let file = File::open(source.file).map_err(io_error("open", source.file))?;
    let (sender, receiver) = bounded(DEPTH);
    let done = Arc::new(AtomicU64::new(0));
    let counted = Counted {
        file,
        done: Arc::clone(&done),
    };
    std::thread::scope(|scope| {
        let producer = std::thread::Builder::new()
            .name("layer-content".to_owned())
            .spawn_scoped(scope, move || produce(counted, largest, &sender))
            .map_err(io_error("start a thread for", source.file))?;
        // `consume` drops the receiver in any case, which ends the thread.
        let consumed = consume(Content {
            receiver,
            done,
            chunk: Vec::new(),
            at: 0,
        });
        let digest = producer.join();
        consumed?;
        match digest {
            Ok(Some(digest)) => Ok(digest),
            _ => Err(Error::Archive {
                subject: format!("the layer {}", source.digest),
                problem: "it could not be read to its end".to_owned(),
            }),
        }
    })
}

/// Sends the content chunk by chunk; `None` when it did not come to its end.
fn produce(blob: Counted, largest: u64, sender: &Sender<Chunk>) -> Option<String> {
    let mut hash = Sha256::new();
    let mut sum = 0;
    let blob = BufReader::with_capacity(CHUNK, blob);
    let mut content = match compression::decompress(blob, compression::WINDOW) {
        Ok(content) => content,
        Err(error) => {
            // Nobody listens any more: then nobody wants to know.
            let _ = sender.send(Err(error));
            return None;
        }
    };
    loop {
        let mut chunk = Vec::with_capacity(CHUNK);
        let read = content.by_ref().take(CHUNK as u64).read_to_end(&mut chunk);
        sum += chunk.len() as u64;
        let message = match read {
            Ok(0) => return Some(format!("sha256:{:x}", hash.finalize())),
            Ok(_) if sum > largest => Err(io::Error::new(
                io::ErrorKind::InvalidData,
                format!("it has more than {largest} bytes uncompressed, the limit for a layer"),
            )),
            Ok(_) => {
                hash.update(&chunk);
                Ok(chunk)
            }
            Err(error) if error.raw_os_error().is_some() => Err(error),
            Err(error) => Err(io::Error::new(
                error.kind(),
                format!("it cannot be decompressed: {error}"),
            )),
        };
        let failed = message.is_err();
        if sender.send(message).is_err() || failed {
            return None;
        }
    }
}

/// The blob, counting what has been read of it.
struct Counted {
    file: File,
    done: Arc<AtomicU64>,
}

impl Read for Counted {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        let count = self.file.read(buffer)?;
        self.done.fetch_add(count as u64, Ordering::Relaxed);
        Ok(count)
    }
}

/// The uncompressed content.
pub(super) struct Content {
    receiver: Receiver<Chunk>,
    done: Arc<AtomicU64>,
    chunk: Vec<u8>,
    at: usize,
}

impl Read for Content {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        let count = self.fill_buf()?.read(buffer)?;
        self.consume(count);
        Ok(count)
    }
}

impl BufRead for Content {
    fn fill_buf(&mut self) -> io::Result<&[u8]> {
        if self.at == self.chunk.len() {
            self.at = 0;
            self.chunk = match self.receiver.recv() {
                Ok(chunk) => chunk?,
                Err(_) => Vec::new(),
            };
        }
        Ok(&self.chunk[self.at..])
    }

    fn consume(&mut self, count: usize) {
        self.at += count;
    }
}

/// Tells the observer how much of the blob has been read, and stops when nobody wants it any more.
pub(super) struct Watched<'a> {
    content: Content,
    observer: &'a dyn Observer,
    progress: &'a dyn Fn(u64),
    told: u64,
}

impl<'a> Watched<'a> {
    pub(super) fn new(
        content: Content,
        observer: &'a dyn Observer,
        progress: &'a dyn Fn(u64),
    ) -> Self {
        Self {
            content,
            observer,
            progress,
            told: 0,
        }
    }
}

impl Read for Watched<'_> {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        if self.observer.cancelled() {
            return Err(io::ErrorKind::ConnectionAborted.into());
        }
        let done = self.content.done.load(Ordering::Relaxed);
        if done != self.told {
            self.told = done;
            (self.progress)(done);
        }
        self.content.read(buffer)
    }
}

/// Reads what follows the end of the tar: it counts for the digest.
pub(super) fn drain(mut stream: Watched<'_>) -> Result<(), Fault> {
    io::copy(&mut stream, &mut io::sink())
        .map(|_| ())
        .map_err(Fault::Read)
}
