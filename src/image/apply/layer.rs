//! What each entry of a layer does to the tree.

use std::ffi::OsStr;
use std::io::Read;
use std::os::unix::ffi::OsStrExt;
use std::rc::Rc;

use super::super::Limits;
use super::super::tar::{Entry, Kind, Reader};
use super::Fault;
use super::tree::{self, Directory, Found, Tree};
use super::written::Written;
use crate::cow::{
    Caller, FileKind, NodeId, SetAttr, SetTime, SetXattrMode, Timestamp, Union, union,
};
use crate::store::ingest;
use crate::store::layer::index::LARGEST_XATTR;

const BUFFER: usize = 1 << 20;
const WHITEOUT: &[u8] = b".wh.";
/// AUFS's own files; of these only the opaque marker has a meaning for others.
const WHITEOUT_META: &[u8] = b".wh..wh.";
const OPAQUE: &[u8] = b".wh..wh..opq";
const LONGEST_NAME: usize = 255;
/// The last second that fits in 64 bits of nanoseconds; containerd takes later ones for damage.
const LATEST_SECOND: i64 = i64::MAX / 1_000_000_000;

type Result<T, E = Fault> = std::result::Result<T, E>;

/// A layer on its way into a union.
pub(super) struct Layer<'u> {
    union: &'u Union,
    limits: &'u Limits,
    tree: Tree<'u>,
    written: Written,
    /// Directories' times are set last, for everything made in them changes these.
    directories: Vec<(Vec<u8>, SetAttr)>,
    directory_names: u64,
    buffer: Vec<u8>,
}

/// What an entry's name asks for.
#[derive(Debug, PartialEq, Eq)]
enum Action<'a> {
    /// Nothing: the root itself, or a file of AUFS's own.
    Skip,
    /// The entry's object is to be made.
    Make { parent: Vec<u8>, name: &'a [u8] },
    /// A tree is to be removed.
    Remove { parent: Vec<u8>, name: &'a [u8] },
    /// All that the layers below have in a directory is to be removed.
    Clear { directory: Vec<u8> },
}

impl<'u> Layer<'u> {
    pub(super) fn new(union: &'u Union, limits: &'u Limits) -> Self {
        Self {
            union,
            limits,
            tree: Tree::new(union),
            written: Written::default(),
            directories: Vec::new(),
            directory_names: 0,
            buffer: vec![0; BUFFER],
        }
    }

    /// Makes everything that `reader` has.
    pub(super) fn unpack<R: Read>(&mut self, reader: &mut Reader<R>) -> Result<()> {
        let mut entries = 0;
        while let Some(entry) = reader.next_entry()? {
            entries += 1;
            if entries > self.limits.entries {
                let problem = format!("the layer has more than {} entries", self.limits.entries);
                return Err(refuse(&entry.path, problem));
            }
            self.entry(&entry, reader)?;
        }
        self.set_directory_times()
    }

    fn entry<R: Read>(&mut self, entry: &Entry, reader: &mut Reader<R>) -> Result<()> {
        let in_union = in_union(&entry.path);
        match action(&entry.path).map_err(|problem| refuse(&entry.path, problem))? {
            Action::Skip => Ok(()),
            Action::Make { parent, name } => {
                let parent = self.parent(entry, &parent)?;
                self.make(entry, &parent, name, reader)
            }
            Action::Remove { parent, name } => {
                let Some(parent) = self.parent_of_whiteout(entry, &parent)? else {
                    return Ok(());
                };
                self.tree
                    .remove_all(parent.id(), OsStr::from_bytes(name))
                    .map_err(in_union)
            }
            Action::Clear { directory } => {
                let Some(directory) = self.parent_of_whiteout(entry, &directory)? else {
                    return Ok(());
                };
                self.tree
                    .remove_unwritten(&directory, &self.written)
                    .map_err(in_union)
            }
        }
    }

    /// Below a file there is nothing to remove. umoci writes such whiteouts for a directory that a
    /// file has replaced.
    fn parent_of_whiteout(
        &mut self,
        entry: &Entry,
        path: &[u8],
    ) -> Result<Option<Rc<Directory<'u>>>> {
        match self.tree.make_directory(path) {
            Ok(parent) => Ok(Some(parent)),
            Err(error) if error.errno == libc::ENOTDIR => Ok(None),
            Err(source) => Err(in_tree(&entry.path, source)),
        }
    }

    fn parent(&mut self, entry: &Entry, path: &[u8]) -> Result<Rc<Directory<'u>>> {
        self.tree
            .make_directory(path)
            .map_err(|source| in_tree(&entry.path, source))
    }

    fn make<R: Read>(
        &mut self,
        entry: &Entry,
        parent: &Rc<Directory<'u>>,
        name: &[u8],
        reader: &mut Reader<R>,
    ) -> Result<()> {
        let path = parent.path_of(name);
        let name = OsStr::from_bytes(name);
        let in_union = in_union(&entry.path);
        tree::check_length(path.len()).map_err(|source| in_tree(&entry.path, source))?;
        let existing = self.tree.find(parent.id(), name).map_err(in_union)?;
        let merged = existing
            .as_ref()
            .is_some_and(|existing| existing.is_directory() && entry.kind == Kind::Directory);
        let made = match existing {
            Some(existing) if merged => existing,
            existing => {
                if existing.is_some() {
                    drop(existing);
                    self.tree.remove_all(parent.id(), name).map_err(in_union)?;
                }
                self.create(entry, parent.id(), name, reader)?
            }
        };
        let times = times(entry);
        self.set_metadata(entry, &made, &times)?;
        if entry.kind == Kind::Directory {
            self.directory_names += path.len() as u64;
            if self.directory_names > self.limits.names {
                return Err(refuse(&entry.path, "the layer has too many directories"));
            }
            self.directories.push((path.clone(), times));
        }
        self.written.insert(&path);
        Ok(())
    }

    fn create<R: Read>(
        &mut self,
        entry: &Entry,
        parent: NodeId,
        name: &OsStr,
        reader: &mut Reader<R>,
    ) -> Result<Found<'u>> {
        let in_union = in_union(&entry.path);
        let node = |kind: u32, device: u64| {
            let mode = kind | u32::from(entry.perm);
            self.union.mknod(parent, name, mode, device, &Caller::ROOT)
        };
        let made = match entry.kind {
            Kind::Regular => return self.write(entry, parent, name, reader),
            Kind::HardLink => {
                let target = self.link_target(entry)?;
                self.union.link(target.id(), parent, name)
            }
            Kind::Directory => {
                let mode = u32::from(entry.perm);
                self.union.mkdir(parent, name, mode, &Caller::ROOT)
            }
            Kind::Symlink => {
                if entry.link.is_empty() {
                    return Err(refuse(&entry.path, "it is a symbolic link to nothing"));
                }
                let target = OsStr::from_bytes(&entry.link);
                self.union.symlink(parent, name, target, &Caller::ROOT)
            }
            Kind::Fifo => node(libc::S_IFIFO, 0),
            Kind::BlockDevice => node(libc::S_IFBLK, device(entry)?),
            Kind::CharDevice if entry.device == (0, 0) => {
                return Err(refuse(
                    &entry.path,
                    "it is the character device 0:0, which marks a deletion in overlayfs and cannot be a file; write the deletion as a \".wh.\" entry",
                ));
            }
            Kind::CharDevice => node(libc::S_IFCHR, device(entry)?),
        };
        Ok(self.tree.count(made.map_err(in_union)?))
    }

    fn write<R: Read>(
        &mut self,
        entry: &Entry,
        parent: NodeId,
        name: &OsStr,
        reader: &mut Reader<R>,
    ) -> Result<Found<'u>> {
        let in_union = in_union(&entry.path);
        if entry.size > self.limits.bytes {
            let problem = format!(
                "it claims to have {} bytes, more than a layer may",
                entry.size
            );
            return Err(refuse(&entry.path, problem));
        }
        let flags = libc::O_WRONLY | libc::O_CREAT | libc::O_EXCL;
        let mode = u32::from(entry.perm);
        let (made, handle) = self
            .union
            .create(parent, name, mode, flags, &Caller::ROOT)
            .map_err(in_union)?;
        let made = self.tree.count(made);
        let mut offset = 0;
        let written = loop {
            let data = match reader.read_data(&mut self.buffer) {
                Ok(0) => break Ok(()),
                Ok(count) => &self.buffer[..count],
                Err(error) => break Err(error.into()),
            };
            if let Err(fault) = write_all(self.union, made.id(), &handle, offset, data) {
                break Err(in_union(fault));
            }
            offset += data.len() as u64;
        };
        self.union.release(made.id(), handle);
        written.map(|()| made)
    }

    /// What a hard link goes to: a file of this layer or of one below.
    fn link_target(&mut self, entry: &Entry) -> Result<Found<'u>> {
        let refuse = |problem: &str| {
            let target = super::printable(&entry.link);
            refuse(
                &entry.path,
                format!("its hard link's target {target} {problem}"),
            )
        };
        let mut parts = clean(&entry.link).map_err(&refuse)?;
        let name = parts.pop().ok_or_else(|| refuse("is the root"))?;
        let parent = self
            .tree
            .directory(&parts.join(&b'/'))
            .map_err(|source| in_tree(&entry.path, source))?;
        let found = match parent {
            Some(parent) => self
                .tree
                .find(parent.id(), OsStr::from_bytes(name))
                .map_err(|source| in_tree(&entry.path, source))?,
            None => None,
        };
        match found {
            Some(found) if found.is_directory() => Err(refuse("is a directory")),
            Some(found) => Ok(found),
            None => Err(refuse("does not exist in this layer or in those below")),
        }
    }

    /// Owner first, for it clears capabilities and setuid bits; then xattrs; then mode and times.
    fn set_metadata(&self, entry: &Entry, made: &Found<'u>, times: &SetAttr) -> Result<()> {
        let in_union = in_union(&entry.path);
        let owner = SetAttr {
            uid: Some(entry.uid),
            gid: Some(entry.gid),
            ..SetAttr::default()
        };
        let set = |attributes: &SetAttr| {
            self.union
                .setattr(made.id(), None, attributes, &Caller::ROOT)
                .map(drop)
                .map_err(in_union)
        };
        set(&owner)?;
        let mine = |(name, _): &&(Vec<u8>, Vec<u8>)| !ingest::is_private(name);
        for (name, value) in entry.xattrs.iter().filter(mine) {
            self.set_xattr(entry, made.id(), name, value)?;
        }
        // A symbolic link's mode is fixed. A hard link's entry speaks for the file that it goes to.
        let perm = (made.entry.attr.kind != FileKind::Symlink).then_some(entry.perm);
        set(&SetAttr { perm, ..*times })
    }

    fn set_xattr(&self, entry: &Entry, node: NodeId, name: &[u8], value: &[u8]) -> Result<()> {
        let shown = super::printable(name);
        if name.is_empty() || name.len() > LONGEST_NAME || name.contains(&0) {
            let problem = format!("the name of its extended attribute {shown} cannot be used");
            return Err(refuse(&entry.path, problem));
        }
        if value.len() > LARGEST_XATTR {
            let problem = format!("its extended attribute {shown} has more than 64 KiB");
            return Err(refuse(&entry.path, problem));
        }
        let name = OsStr::from_bytes(name);
        match self.union.setxattr(node, name, value, SetXattrMode::Any) {
            Ok(()) => Ok(()),
            // The latter for what is no regular file or directory; see xattr(7).
            Err(error)
                if error.errno == libc::EOPNOTSUPP
                    || error.errno == libc::EPERM && name.as_bytes().starts_with(b"user.") =>
            {
                let entry = super::printable(&entry.path);
                tracing::warn!(%entry, xattr = %shown, "the file system cannot store an extended attribute of a layer");
                Ok(())
            }
            // What ext4 says when there is no room in the inode's block; it is not the disk that is full.
            Err(error) if matches!(error.errno, libc::ENOSPC | libc::E2BIG | libc::ERANGE) => {
                let problem = format!(
                    "its extended attribute {shown} of {} bytes does not fit: {error}",
                    value.len()
                );
                Err(refuse(&entry.path, problem))
            }
            Err(source) => Err(Fault::Union {
                entry: entry.path.clone(),
                source,
            }),
        }
    }

    fn set_directory_times(&mut self) -> Result<()> {
        for (path, times) in std::mem::take(&mut self.directories) {
            let in_union = in_union(&path);
            let (parent, name) = split_last(&path);
            let parent = match self.tree.directory(parent) {
                Ok(Some(parent)) => parent,
                Ok(None) => continue,
                // A later entry of the layer has replaced a parent by a file, or by a link that leads nowhere.
                Err(error) if matches!(error.errno, libc::ENOTDIR | libc::ELOOP) => continue,
                Err(error) => return Err(in_union(error)),
            };
            let found = self
                .tree
                .find(parent.id(), OsStr::from_bytes(name))
                .map_err(in_union)?;
            // A later entry of the layer may have replaced it.
            if let Some(found) = found.filter(Found::is_directory) {
                self.union
                    .setattr(found.id(), None, &times, &Caller::ROOT)
                    .map_err(in_union)?;
            }
        }
        Ok(())
    }
}

fn write_all(
    union: &Union,
    node: NodeId,
    handle: &union::FileHandle,
    mut offset: u64,
    mut data: &[u8],
) -> union::Result<()> {
    while !data.is_empty() {
        let count = union.write(node, Some(handle), offset, data, None)?;
        offset += count as u64;
        data = &data[count..];
    }
    Ok(())
}

/// What an entry of that name asks for. The problem is what is wrong with the name.
fn action(path: &[u8]) -> Result<Action<'_>, &'static str> {
    let mut parts = clean(path)?;
    let Some(name) = parts.pop() else {
        // containerd leaves the root as it is, and so must whoever wants the same tree.
        return Ok(Action::Skip);
    };
    let marked = parts.iter().find(|part| part.starts_with(WHITEOUT));
    match marked {
        Some(part) if part.starts_with(WHITEOUT_META) => return Ok(Action::Skip),
        Some(_) => return Err("it lies below a whiteout"),
        None => {}
    }
    let parent = parts.join(&b'/');
    if name == OPAQUE {
        return Ok(Action::Clear { directory: parent });
    }
    if name.starts_with(WHITEOUT_META) {
        return Ok(Action::Skip);
    }
    match name.strip_prefix(WHITEOUT) {
        None => Ok(Action::Make { parent, name }),
        Some(b"" | b"." | b"..") => Err("it is a whiteout of no name"),
        Some(name) => Ok(Action::Remove { parent, name }),
    }
}

/// The names in a path, `..` taken back as far as there is something to take back.
fn clean(path: &[u8]) -> Result<Vec<&[u8]>, &'static str> {
    let mut parts: Vec<&[u8]> = Vec::new();
    for part in path.split(|&byte| byte == b'/') {
        match part {
            b"" | b"." => {}
            b".." => {
                parts.pop().ok_or("leads out of the layer by \"..\"")?;
            }
            part if part.len() > LONGEST_NAME => return Err("has a part of more than 255 bytes"),
            part => parts.push(part),
        }
    }
    Ok(parts)
}

fn split_last(path: &[u8]) -> (&[u8], &[u8]) {
    match path.iter().rposition(|&byte| byte == b'/') {
        Some(slash) => (&path[..slash], &path[slash + 1..]),
        None => (b"", path),
    }
}

/// Both times as containerd sets them: access no older than modification, and what cannot be a time is
/// the epoch.
fn times(entry: &Entry) -> SetAttr {
    let bound = |time: Timestamp| {
        if (0..LATEST_SECOND).contains(&time.sec) {
            time
        } else {
            Timestamp::default()
        }
    };
    let atime = entry.atime.unwrap_or_default().max(entry.mtime);
    SetAttr {
        atime: Some(SetTime::At(bound(atime))),
        mtime: Some(SetTime::At(bound(entry.mtime))),
        ..SetAttr::default()
    }
}

/// The number of a device, if the kernel has such numbers.
fn device(entry: &Entry) -> Result<u64> {
    let (major, minor) = entry.device;
    if major >= 1 << 12 || minor >= 1 << 20 {
        return Err(refuse(&entry.path, "its device number is too large"));
    }
    Ok(libc::makedev(major, minor))
}

/// What goes wrong on the way to a name is the layer's fault, unless the host says otherwise.
fn in_tree(entry: &[u8], source: union::Error) -> Fault {
    let problem = match source.errno {
        libc::ENOTDIR => "a parent of it is not a directory",
        libc::ELOOP => "the symbolic links on its way are too many or go in a circle",
        libc::ENAMETOOLONG => "it is longer than 4095 bytes once its links are followed",
        _ => {
            return Fault::Union {
                entry: entry.to_vec(),
                source,
            };
        }
    };
    refuse(entry, problem)
}

/// Makes the fault that an error of the union is at an entry.
fn in_union(entry: &[u8]) -> impl Fn(union::Error) -> Fault + Copy + '_ {
    move |source| Fault::Union {
        entry: entry.to_vec(),
        source,
    }
}

fn refuse(entry: &[u8], problem: impl Into<String>) -> Fault {
    Fault::Refused {
        entry: entry.to_vec(),
        problem: problem.into(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_say_what_to_do() {
        let make = |parent: &str, name: &'static str| {
            Ok(Action::Make {
                parent: parent.as_bytes().to_vec(),
                name: name.as_bytes(),
            })
        };
        assert_eq!(action(b"./a//b/"), make("a", "b"));
        assert_eq!(action(b"/etc/passwd"), make("etc", "passwd"));
        assert_eq!(action(b"a/../b"), make("", "b"));
        assert_eq!(action(b"a/.whiteout"), make("a", ".whiteout"));
        for root in [&b""[..], b".", b"./", b"/", b"a/.."] {
            assert_eq!(action(root), Ok(Action::Skip));
        }
        let remove = Action::Remove {
            parent: b"a".to_vec(),
            name: b"b",
        };
        assert_eq!(action(b"a/.wh.b"), Ok(remove));
        let clear = |directory: &[u8]| {
            Ok(Action::Clear {
                directory: directory.to_vec(),
            })
        };
        assert_eq!(action(b".wh..wh..opq"), clear(b""));
        assert_eq!(action(b"a/b/.wh..wh..opq"), clear(b"a/b"));
        for aufs in [&b".wh..wh.plnk"[..], b".wh..wh.plnk/1.2", b"a/.wh..wh.aufs"] {
            assert_eq!(action(aufs), Ok(Action::Skip));
        }
    }

    #[test]
    fn hostile_names_are_refused() {
        let long = [b'x'; 256];
        for name in [
            &b"../a"[..],
            b"a/../../b",
            b"/..",
            b".wh.",
            b".wh..",
            b".wh...",
            b"a/.wh..",
            b".wh.a/b",
            &long,
        ] {
            assert!(action(name).is_err(), "{}", String::from_utf8_lossy(name));
        }
    }

    #[test]
    fn times_are_bounded_as_containerd_does() {
        let at = |sec, nsec| Timestamp { sec, nsec };
        let bounded = |mtime, atime| {
            let entry = Entry {
                path: Vec::new(),
                kind: Kind::Regular,
                link: Vec::new(),
                perm: 0,
                uid: 0,
                gid: 0,
                size: 0,
                mtime,
                atime,
                device: (0, 0),
                xattrs: Vec::new(),
            };
            let set = times(&entry);
            (set.mtime, set.atime)
        };
        let same = |time| (Some(SetTime::At(time)), Some(SetTime::At(time)));
        assert_eq!(bounded(at(5, 7), None), same(at(5, 7)));
        assert_eq!(bounded(at(5, 7), Some(at(5, 6))), same(at(5, 7)));
        assert_eq!(
            bounded(at(5, 7), Some(at(6, 0))),
            (Some(SetTime::At(at(5, 7))), Some(SetTime::At(at(6, 0))))
        );
        assert_eq!(bounded(at(-1, 0), None).0, Some(SetTime::At(at(0, 0))));
        assert_eq!(bounded(at(i64::MAX, 0), None), same(at(0, 0)));
    }
}
