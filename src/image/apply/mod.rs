//! Unpacking of one layer onto the layers below it.
//!
//! The semantics are those of the OCI image specification as containerd's `archive.Apply` shows them
//! on a plain directory: a whiteout removes a tree, an opaque marker what the layer itself did not
//! write, a path passes through the symbolic links of the layers below, and a hard link may go to
//! them. Everything is done through a [`Union`] in this process, as its superuser; nothing is ever
//! looked up by a path of the host, so no name, link or race in a layer can lead out of it.

mod layer;
mod stream;
#[cfg(test)]
mod tests;
mod tree;
mod written;

use std::path::Path;

use super::{Error, Limits, Observer, Phase, Progress, Result, printable, tar};
use crate::cow::{Union, union};

/// What is to be unpacked.
#[derive(Clone, Copy, Debug)]
pub struct Source<'a> {
    /// Digest of the blob, which has been checked.
    pub digest: &'a str,
    /// Digest that the uncompressed content must turn out to have.
    pub diff_id: &'a str,
    /// The blob.
    pub file: &'a Path,
    /// Its bytes.
    pub size: u64,
}

/// Unpacks `source` into `union`, whose lowers are the layers below. When it fails, the upper holds
/// part of the layer and is to be thrown away.
pub fn apply(
    union: &Union,
    source: &Source<'_>,
    limits: &Limits,
    observer: &dyn Observer,
) -> Result<()> {
    let context = Context { source };
    let diff_id = stream::with_content(source, limits.bytes, |content| {
        let progress = |done| {
            observer.progress(Progress {
                phase: Phase::Unpacking,
                digest: source.digest.to_owned(),
                done,
                total: source.size,
            });
        };
        let mut reader = tar::Reader::new(stream::Watched::new(content, observer, &progress));
        let mut layer = layer::Layer::new(union, limits);
        let unpacked = layer.unpack(&mut reader);
        unpacked
            .and_then(|()| stream::drain(reader.into_inner()))
            .map_err(|fault| context.error(fault, observer))
    })?;
    if diff_id != source.diff_id {
        return Err(Error::Archive {
            subject: format!("the layer {}", source.digest),
            problem: format!(
                "its content has the digest {diff_id}, and the image's config says {}",
                source.diff_id
            ),
        });
    }
    Ok(())
}

/// Why unpacking stopped, before it is known which layer it was.
#[derive(Debug)]
enum Fault {
    /// The layer is not to be unpacked.
    Refused { entry: Vec<u8>, problem: String },
    /// The union refused.
    Union {
        entry: Vec<u8>,
        source: union::Error,
    },
    /// The blob could not be read or decompressed.
    Read(std::io::Error),
}

impl From<tar::Error> for Fault {
    fn from(error: tar::Error) -> Self {
        match error {
            tar::Error::Read(error) => Self::Read(error),
            tar::Error::Malformed { entry, problem } => Self::Refused { entry, problem },
        }
    }
}

struct Context<'a> {
    source: &'a Source<'a>,
}

impl Context<'_> {
    fn error(&self, fault: Fault, observer: &dyn Observer) -> Error {
        let layer = self.source.digest.to_owned();
        match fault {
            _ if observer.cancelled() => Error::Cancelled,
            Fault::Refused { entry, problem } => Error::Layer {
                layer,
                entry: match entry.is_empty() {
                    true => String::new(),
                    false => printable(&entry),
                },
                problem,
            },
            Fault::Union { entry, source } => Error::Union {
                layer,
                entry: printable(&entry),
                source,
            },
            // Only the host's own errors have a number.
            Fault::Read(source) if source.raw_os_error().is_some() => Error::Io {
                action: "read",
                path: self.source.file.to_owned(),
                source,
            },
            Fault::Read(source) => Error::Archive {
                subject: format!("the layer {layer}"),
                problem: source.to_string(),
            },
        }
    }
}
