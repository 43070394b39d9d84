//! Single contents out of the stream of a layer.

use std::collections::{HashMap, HashSet};
use std::io::Read;
use std::path::Path;

use super::sink::{self, Stored};
use super::{BUFFER, Observer, Settings, source};
use crate::store::error::{Error, Result};
use crate::store::format::ObjectName;
use crate::store::object::Objects;
use crate::store::tar::{Reader, Tape};

/// Objects by their names, with their bytes.
pub(in crate::store) type Wanted = HashMap<ObjectName, u64>;

/// The rest of the stream is of no use.
struct Nowhere;

impl Tape for Nowhere {
    fn raw(&mut self, _bytes: &[u8]) -> Result<()> {
        Ok(())
    }
}

/// Takes those contents out of `stream`, a tar as for [`take`](super::take), that are wanted and that the store does not have. Only
/// what has the length of one of them is looked at; whose stream it is does not matter, for a content is known by its name. So
/// what comes before a bad end is as good as any, and what follows the last one is not read. Answers also how the stream has ended.
pub(in crate::store) fn pick(
    stream: impl Read + Send,
    wanted: &Wanted,
    objects: &Objects,
    tmp: &Path,
    settings: &Settings,
    observer: &dyn Observer,
) -> Result<(Stored, Result<()>)> {
    let names: HashSet<ObjectName> = wanted.keys().copied().collect();
    let sizes: HashSet<u64> = wanted.values().copied().collect();
    let mut found = None;
    let read = source::with_content(stream, settings, observer, |content| {
        let (ended, stored) = sink::with_sink_of(objects, Some(&names), tmp, settings, |sink| {
            Ok::<_, Error>(look_through(content, &sizes, sink))
        })?;
        found = Some(stored);
        ended
    });
    match found {
        Some(stored) => Ok((stored, read.map(drop))),
        None => Err(read.err().unwrap_or_else(|| sink::ended_early(tmp))),
    }
}

fn look_through(content: impl Read, sizes: &HashSet<u64>, sink: &mut sink::Sink<'_>) -> Result<()> {
    let mut reader = Reader::new(content, Nowhere);
    let mut buffer = vec![0; BUFFER];
    while let Some(entry) = reader.next_entry()? {
        if sink.has_all() {
            return Ok(());
        }
        if entry.stored == 0 || !sizes.contains(&entry.stored) {
            continue;
        }
        let mut content = sink.begin(entry.stored)?;
        loop {
            let count = reader.read(&mut buffer)?;
            if count == 0 {
                break;
            }
            content.write(&buffer[..count])?;
        }
        sink.end(content)?;
    }
    reader.finish().map(drop)
}
