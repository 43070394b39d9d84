//! The tar stream of a layer that did not come as one, written from its index.
//!
//! The same index always gives the same bytes. What a stream cannot say is left out or refused, as
//! `docs/layer-format.md` has it.

use std::io::{self, Write};

use super::{BUFFER, of_entry, unread};
use crate::store::error::{Error, Result, refused};
use crate::store::layer::index::{Action, LayerEntry, LayerIndex};
use crate::store::object::Objects;
use crate::store::tar::write::{self, NewEntry, Writer};
use crate::store::tar::{Kind, WHITEOUT};
use crate::store::view::ViewFile;

/// Writes what `layer` says to `out`. When it fails, part of the stream may be written.
pub(in crate::store) fn write(
    layer: &LayerIndex,
    objects: &Objects,
    out: &mut dyn Write,
) -> Result<()> {
    let mut stream = Stream {
        layer,
        objects,
        out: Writer::new(out),
        buffer: vec![0; BUFFER],
    };
    for number in 0..layer.len() {
        let entry = layer.entry(number)?;
        let path = layer.path(entry.path)?;
        stream.entry(&entry, &path)?;
    }
    stream.out.finish().map(drop).map_err(Error::Output)
}

struct Stream<'a> {
    layer: &'a LayerIndex,
    objects: &'a Objects,
    out: Writer<&'a mut dyn Write>,
    buffer: Vec<u8>,
}

impl Stream<'_> {
    fn entry(&mut self, entry: &LayerEntry, path: &[&[u8]]) -> Result<()> {
        let Some((name, above)) = path.split_last() else {
            return Ok(());
        };
        if path.iter().any(|name| name.starts_with(WHITEOUT)) {
            let problem = "a name in it begins with \".wh.\", which marks a deletion in a layer";
            return Err(refused(&path.join(&b'/'), problem));
        }
        let within = |name: &[u8]| [above, &[name]].concat().join(&b'/');
        let joined = path.join(&b'/');
        match entry.action {
            Action::Remove => self.mark(&within(&[WHITEOUT, name].concat())),
            Action::Clear => Err(self
                .layer
                .damaged("only a layer that came as a stream has such an entry")),
            Action::Make | Action::MakeExactly | Action::Link => self.object(entry, &joined),
        }
    }

    /// Writes a marker: an empty file that the layer itself does not have.
    fn mark(&mut self, path: &[u8]) -> Result<()> {
        let entry = NewEntry::new(path, Kind::Regular);
        self.out.entry(&entry).map_err(|error| failed(path, error))
    }

    fn object(&mut self, entry: &LayerEntry, path: &[u8]) -> Result<()> {
        let (layer, inode) = (self.layer, &entry.inode);
        let kind = match (entry.action, inode.kind()) {
            (_, libc::S_IFSOCK) => return Ok(()),
            (Action::Link, _) => Kind::HardLink,
            (_, libc::S_IFREG) => Kind::Regular,
            (_, libc::S_IFDIR) => Kind::Directory,
            (_, libc::S_IFLNK) => Kind::Symlink,
            (_, libc::S_IFIFO) => Kind::Fifo,
            (_, libc::S_IFCHR) => Kind::CharDevice,
            (_, libc::S_IFBLK) => Kind::BlockDevice,
            (_, other) => {
                return Err(layer.damaged(format!("an entry is of the unknown type {other:#o}")));
            }
        };
        let xattrs: Vec<_> = layer
            .xattrs(inode.xattrs)?
            .into_iter()
            .filter(|(name, _)| write::is_carried(name))
            .map(|(name, value)| (name.to_vec(), value.to_vec()))
            .collect();
        let mut new = NewEntry {
            perm: inode.mode & 0o7777,
            uid: inode.uid,
            gid: inode.gid,
            mtime: inode.mtime,
            ..NewEntry::new(path, kind)
        };
        match kind {
            Kind::HardLink => new.link = layer.target(inode)?,
            Kind::Symlink => {
                new.link = layer.target(inode)?;
                new.xattrs = &xattrs;
            }
            _ => new.xattrs = &xattrs,
        }
        if matches!(kind, Kind::CharDevice | Kind::BlockDevice) {
            new.device = inode.device();
        }
        if kind == Kind::Regular {
            return self.file(new, entry);
        }
        self.out.entry(&new).map_err(|error| failed(path, error))
    }

    fn file(&mut self, new: NewEntry<'_>, entry: &LayerEntry) -> Result<()> {
        let file = self.open(entry)?;
        let size = file.size();
        let parts = write::parts(
            size,
            |from| Ok::<_, Error>(file.next_data(from)),
            |from| Ok(file.next_hole(from)),
        )?;
        let (layer, path, new) = (self.layer, entry.path, NewEntry { size, ..new });
        let read = |buffer: &mut [u8], at| match file.read_at(buffer, at) {
            Ok(0) => Err(unread(layer, path, io::ErrorKind::UnexpectedEof.into())),
            read => read.map_err(|error| unread(layer, path, error)),
        };
        let failed = |error| failed(new.path, error);
        self.out.file(&new, &parts, &mut self.buffer, read, failed)
    }

    fn open(&self, entry: &LayerEntry) -> Result<ViewFile> {
        let extents = self.layer.extents(&entry.inode)?;
        let mut contents = Vec::new();
        for extent in &extents {
            if contents.iter().all(|(number, _)| *number != extent.object) {
                let object = self.layer.object(extent.object)?;
                let content = self.objects.read(&object, None, true);
                let content = content.map_err(of_entry(self.layer, entry.path))?;
                contents.push((extent.object, content));
            }
        }
        Ok(ViewFile::new(entry.inode.size, extents, contents))
    }
}

/// What the writer refuses is the entry's fault, all else that of where it writes to.
fn failed(path: &[u8], error: io::Error) -> Error {
    match error.kind() {
        io::ErrorKind::InvalidInput => refused(path, error.to_string()),
        _ => Error::Output(error),
    }
}
