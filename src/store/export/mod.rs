//! The tar stream of a layer: the one that it came as, given back bit for bit, or else one that is written from its
//! index.

mod written;

use std::io::{self, Write};

use sha2::{Digest, Sha256};

use super::error::{Error, Result};
use super::ingest::recipe::{Part, Reader};
use super::layer::index::{Action, LayerIndex};
use super::object::Objects;

pub(super) use written::write;

const BUFFER: usize = 128 << 10;

/// Writes the stream that `recipe` and the contents of `layer` make to `out`, and compares it with the diff
/// id. When it fails, part of the stream may be written.
pub(super) fn export(
    layer: &LayerIndex,
    (mut recipe, diff_id): (Reader, [u8; 32]),
    objects: &Objects,
    out: &mut dyn Write,
) -> Result<()> {
    let mut hash = Sha256::new();
    let mut bytes = 0u64;
    let mut write = |part: &[u8]| {
        bytes += part.len() as u64;
        if bytes > layer.tar_bytes() {
            return Err(layer.damaged("its stream turns out to be too long"));
        }
        hash.update(part);
        out.write_all(part).map_err(Error::Output)
    };
    let mut next = 0;
    let mut buffer = vec![0; BUFFER];
    while let Some(part) = recipe.next()? {
        match part {
            Part::Raw(raw) => write(&raw)?,
            Part::Content => {
                let (path, contents) = next_content(layer, &mut next)?;
                for object in contents {
                    let object = layer.object(object)?;
                    let content = objects.read(&object, None, true);
                    let content = content.map_err(of_entry(layer, path))?;
                    let mut at = 0;
                    while at < object.size {
                        let most = buffer.len().min((object.size - at) as usize);
                        let read = content.read_at(&mut buffer[..most], at);
                        let count = read.map_err(|error| unread(layer, path, error))?;
                        if count == 0 {
                            return Err(unread(layer, path, io::ErrorKind::UnexpectedEof.into()));
                        }
                        write(&buffer[..count])?;
                        at += count as u64;
                    }
                }
            }
        }
    }
    let found: [u8; 32] = hash.finalize().into();
    if found == diff_id && bytes == layer.tar_bytes() {
        Ok(())
    } else {
        Err(Error::Digest {
            what: "exported stream of the layer",
            expected: sha256(&diff_id),
            found: sha256(&found),
        })
    }
}

/// The error, of the entry of the layer that has the path of that number.
fn of_entry(layer: &LayerIndex, path: u32) -> impl Fn(Error) -> Error {
    move |error| match layer.path(path) {
        Ok(path) => error.of_entry(layer.name(), &path.join(&b'/')),
        // What the layer cannot tell either.
        Err(_) => error,
    }
}

/// The error of a content that was opened and cannot be read.
fn unread(layer: &LayerIndex, path: u32, error: io::Error) -> Error {
    let error = error.downcast().unwrap_or_else(|error| {
        layer.damaged(format!("a content that it names cannot be read: {error}"))
    });
    of_entry(layer, path)(error)
}

/// The path and the objects of the next file that has any, from entry `next` on.
fn next_content(layer: &LayerIndex, next: &mut u32) -> Result<(u32, Vec<u32>)> {
    while *next < layer.len() {
        let entry = layer.entry(*next)?;
        *next += 1;
        if entry.action != Action::Make || entry.inode.kind() != libc::S_IFREG {
            continue;
        }
        let mut objects: Vec<u32> = layer
            .extents(&entry.inode)?
            .iter()
            .map(|extent| extent.object)
            .collect();
        objects.dedup();
        if !objects.is_empty() {
            return Ok((entry.path, objects));
        }
    }
    Err(layer.damaged("its stream has more contents than its index"))
}

/// A digest as it is written.
pub(super) fn sha256(digest: &[u8; 32]) -> String {
    let digits: String = digest.iter().map(|byte| format!("{byte:02x}")).collect();
    format!("sha256:{digits}")
}
