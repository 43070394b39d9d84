//! The stream of a layer: read, hashed and decompressed in one thread, its content hashed in another, and
//! read by the caller in a third.

use std::io::{self, BufRead, BufReader, Read};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::thread;

use crossbeam::channel::{Receiver, Sender, bounded};
use sha2::{Digest, Sha256};

use super::{Observer, Settings};
use crate::store::compression;
use crate::store::error::{Error, Result};

const CHUNK: usize = 512 << 10;
/// Chunks between two threads.
const DEPTH: usize = 4;

/// What is known of a stream when it was read to its end.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(in crate::store) struct Digests {
    /// SHA-256 of the stream as it came.
    pub(in crate::store) blob: [u8; 32],
    /// SHA-256 of its content.
    pub(in crate::store) content: [u8; 32],
    /// Bytes of its content.
    pub(in crate::store) bytes: u64,
}

/// Calls `consume` with the content of `stream`; it has to read it to the end. Content of more bytes than `settings` allow is
/// an error of reading, and so is one for which zstd needs more than half of their memory: contents take the other half.
pub(super) fn with_content<T>(
    stream: impl Read + Send,
    settings: &Settings,
    observer: &dyn Observer,
    consume: impl FnOnce(Content<'_>) -> Result<T>,
) -> Result<(T, Digests)> {
    let (to_reader, content) = bounded(DEPTH);
    let (to_hash, chunks) = bounded::<Arc<Vec<u8>>>(DEPTH);
    let done = AtomicU64::new(0);
    thread::scope(|scope| {
        let hash = thread::Builder::new()
            .name("layer-digest".to_owned())
            .spawn_scoped(scope, move || {
                let mut hash = Sha256::new();
                for chunk in chunks {
                    hash.update(chunk.as_slice());
                }
                <[u8; 32]>::from(hash.finalize())
            })
            .map_err(Error::Input)?;
        let counted = Counted {
            stream,
            hash: Sha256::new(),
            done: &done,
        };
        let producer = thread::Builder::new()
            .name("layer-content".to_owned())
            .spawn_scoped(scope, move || {
                produce(counted, settings, &to_reader, &to_hash)
            })
            .map_err(Error::Input)?;
        // `consume` drops the receiver in any case, which ends the threads.
        let consumed = consume(Content {
            receiver: content,
            done: &done,
            told: 0,
            observer,
            chunk: Arc::default(),
            at: 0,
        });
        let produced = producer.join();
        let content = hash.join();
        if observer.cancelled() {
            return Err(Error::Cancelled);
        }
        let consumed = consumed?;
        match (produced, content) {
            (Ok(Some((blob, bytes))), Ok(content)) => Ok((
                consumed,
                Digests {
                    blob,
                    content,
                    bytes,
                },
            )),
            // A thread that panicked; what it said is in the log.
            _ => Err(Error::Input(io::Error::other(
                "a thread of the import ended early",
            ))),
        }
    })
}

/// Sends the content chunk by chunk. Answers the digest of the blob and the bytes of its content; `None` when it did
/// not come to its end, which the receiver was told.
fn produce<R: Read>(
    counted: Counted<'_, R>,
    settings: &Settings,
    to_reader: &Sender<io::Result<Arc<Vec<u8>>>>,
    to_hash: &Sender<Arc<Vec<u8>>>,
) -> Option<([u8; 32], u64)> {
    let mut blob = BufReader::with_capacity(CHUNK, counted);
    let mut bytes = 0;
    let largest = settings.limits.bytes;
    let sent = produce_content(&mut blob, settings.memory / 2, |chunk| {
        bytes += chunk.len() as u64;
        if bytes > largest {
            return Err(io::Error::new(
                io::ErrorKind::InvalidData,
                format!("it has more than {largest} bytes uncompressed, the limit for a layer"),
            ));
        }
        let chunk = Arc::new(chunk);
        // Nobody listens any more: then nobody wants to know.
        let gone = |_| io::Error::from(io::ErrorKind::BrokenPipe);
        to_hash.send(Arc::clone(&chunk)).map_err(|_| gone(()))?;
        to_reader.send(Ok(chunk)).map_err(|_| gone(()))
    });
    // What follows the compressed content still counts for the digest of the blob.
    let drained = sent.and_then(|()| io::copy(&mut blob, &mut io::sink()));
    match drained {
        Ok(_) => Some((blob.into_inner().hash.finalize().into(), bytes)),
        Err(error) => {
            // As above.
            let _ = to_reader.send(Err(error));
            None
        }
    }
}

fn produce_content(
    blob: &mut impl BufRead,
    window: u64,
    mut send: impl FnMut(Vec<u8>) -> io::Result<()>,
) -> io::Result<()> {
    let mut content = compression::decompress(blob, window)?;
    loop {
        let mut chunk = Vec::with_capacity(CHUNK);
        let read = content.by_ref().take(CHUNK as u64).read_to_end(&mut chunk);
        match read {
            Ok(0) => return Ok(()),
            Ok(_) => send(chunk)?,
            // Only the host's own errors have a number.
            Err(error) if error.raw_os_error().is_some() => return Err(error),
            Err(error) => {
                let advice = match error.kind() {
                    io::ErrorKind::OutOfMemory => {
                        "; raise import_memory, half of which is for that"
                    }
                    _ => "",
                };
                let problem = format!("it cannot be decompressed: {error}{advice}");
                return Err(io::Error::new(error.kind(), problem));
            }
        }
    }
}

/// The blob, counting and hashing what has been read of it.
struct Counted<'a, R> {
    stream: R,
    hash: Sha256,
    done: &'a AtomicU64,
}

impl<R: Read> Read for Counted<'_, R> {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        let count = self.stream.read(buffer)?;
        self.hash.update(&buffer[..count]);
        self.done.fetch_add(count as u64, Ordering::Relaxed);
        Ok(count)
    }
}

/// The uncompressed content. Reading it tells the observer how much of the blob was read, and stops when nobody wants it any more.
pub(super) struct Content<'a> {
    receiver: Receiver<io::Result<Arc<Vec<u8>>>>,
    done: &'a AtomicU64,
    told: u64,
    observer: &'a dyn Observer,
    chunk: Arc<Vec<u8>>,
    at: usize,
}

impl Read for Content<'_> {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        if self.at == self.chunk.len() {
            if self.observer.cancelled() {
                return Err(io::ErrorKind::ConnectionAborted.into());
            }
            let done = self.done.load(Ordering::Relaxed);
            if done != self.told {
                self.told = done;
                self.observer.progress(done);
            }
            self.at = 0;
            self.chunk = match self.receiver.recv() {
                Ok(chunk) => chunk?,
                Err(_) => Arc::default(),
            };
        }
        let rest = &self.chunk[self.at..];
        let count = rest.len().min(buffer.len());
        buffer[..count].copy_from_slice(&rest[..count]);
        self.at += count;
        Ok(count)
    }
}
