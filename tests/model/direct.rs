//! Runs operations on the union itself, without a mount: does for it what the kernel's VFS does for
//! a mounted file system, path walks and the checks that no file system sees included.

mod facts;
mod files;
mod names;

use std::collections::BTreeMap;
use std::ffi::OsStr;
use std::sync::{Arc, Mutex, PoisonError};

use plywood::cow::{
    Attr, Caller, Entry, Error, FileHandle, FileKind, NodeId, RenameMode, SetAttr, SetTime,
    SetXattrMode, Timestamp, Union, UnionConfig, UpperConfig,
};

use crate::jail::Oddity;
use crate::mounts::Dirs;
use crate::ops::{Access, How, MtimeChange, Op, OpenFlags, Outcome, SLOTS, XattrHow};
use crate::replay::Subject;
use crate::tree::{Facts, Item, Kind, Path, Snapshot, Time, show};

const MAX_SYMLINKS: usize = 40;
static RENAMES: Mutex<()> = Mutex::new(());
const CALLER: Caller = Caller::ROOT;

type Result<T> = std::result::Result<T, Errno>;

/// An errno, whoever found it.
struct Errno(i32);

impl From<Error> for Errno {
    fn from(error: Error) -> Self {
        Self(error.errno)
    }
}

struct Opened {
    node: NodeId,
    /// Directories are opened by the kernel without one that reads or writes.
    handle: Option<Arc<FileHandle>>,
    flags: OpenFlags,
}

/// A directory, a name in it, and what the name is now. No name: a directory that was reached by `..` or `/`.
struct Place {
    parent: NodeId,
    name: Option<String>,
    found: Option<(NodeId, Attr)>,
}

impl Place {
    fn existing(&self) -> Result<(NodeId, Attr)> {
        self.found.ok_or(Errno(libc::ENOENT))
    }

    /// The name, where only a name will do.
    fn name(&self) -> Result<&OsStr> {
        self.name.as_ref().map(OsStr::new).ok_or(Errno(libc::EBUSY))
    }

    fn vacant(&self) -> Result<(NodeId, &OsStr)> {
        match (&self.name, &self.found) {
            (Some(name), None) => Ok((self.parent, OsStr::new(name))),
            _ => Err(Errno(libc::EEXIST)),
        }
    }
}

/// The union as a subject.
pub struct Direct {
    dirs: Dirs,
    union: Option<Arc<Union>>,
    slots: Vec<Option<Opened>>,
    /// Lookups of the operation under way, to be given back.
    looked_up: Vec<NodeId>,
}

impl Direct {
    pub fn new(dirs: &Dirs) -> Self {
        Self::sharing(dirs, Arc::new(open(dirs)))
    }

    /// One more user of a union that is open.
    pub fn sharing(dirs: &Dirs, union: Arc<Union>) -> Self {
        Self {
            dirs: dirs.clone(),
            union: Some(union),
            slots: (0..SLOTS).map(|_| None).collect(),
            looked_up: Vec::new(),
        }
    }

    fn union(&self) -> &Union {
        self.union.as_ref().expect("is open")
    }

    fn take(&mut self, entry: &Entry) -> (NodeId, Attr) {
        assert_eq!(
            entry.node.0, entry.attr.ino,
            "the node id is the inode number"
        );
        self.looked_up.push(entry.node);
        (entry.node, entry.attr)
    }

    fn give_back(&mut self) {
        for node in std::mem::take(&mut self.looked_up) {
            self.union().forget(node, 1);
        }
    }

    // Paths.

    fn resolve(&mut self, path: &[String], follow: bool) -> Result<Place> {
        let mut way = vec![NodeId::ROOT];
        self.walk(&mut way, path, follow, &mut MAX_SYMLINKS.clone())
    }

    /// `way`: the directories from the root to where the walk starts.
    fn walk(
        &mut self,
        way: &mut Vec<NodeId>,
        path: &[String],
        follow: bool,
        budget: &mut usize,
    ) -> Result<Place> {
        let start = way[way.len() - 1];
        let root = self.union().getattr(start, None)?;
        let mut at = Place {
            parent: start,
            name: None,
            found: Some((start, root)),
        };
        for (index, name) in path.iter().enumerate() {
            let (dir, attr) = at.existing()?;
            if attr.kind != FileKind::Directory {
                return Err(Errno(libc::ENOTDIR));
            }
            if name == ".." {
                way.truncate(way.len().saturating_sub(1).max(1));
                let parent = way[way.len() - 1];
                let attr = self.union().getattr(parent, None)?;
                at = Place {
                    parent,
                    name: None,
                    found: Some((parent, attr)),
                };
                continue;
            }
            let found = match self.union().lookup(dir, OsStr::new(name)) {
                Ok(entry) => Some(self.take(&entry)),
                Err(error) if error.errno == libc::ENOENT => None,
                Err(error) => return Err(error.into()),
            };
            at = Place {
                parent: dir,
                name: Some(name.clone()),
                found,
            };
            let last = index + 1 == path.len();
            match found {
                Some((node, attr)) if attr.kind == FileKind::Directory => way.push(node),
                Some((node, attr)) if attr.kind == FileKind::Symlink && (follow || !last) => {
                    *budget = budget.checked_sub(1).ok_or(Errno(libc::ELOOP))?;
                    let target = self.union().readlink(node)?.to_string_lossy().into_owned();
                    if target.starts_with('/') {
                        way.truncate(1);
                    }
                    at = self.walk(way, &crate::layers::parts(&target), true, budget)?;
                }
                _ => {}
            }
        }
        Ok(at)
    }

    // Operations.

    fn set(&self, node: NodeId, handle: Option<&FileHandle>, set: SetAttr) -> Result<Outcome> {
        self.union().setattr(node, handle, &set, &CALLER)?;
        Ok(Outcome::Done)
    }

    fn run(&mut self, op: &Op) -> Result<Outcome> {
        match op {
            Op::Open {
                slot,
                path,
                flags,
                mode,
            } => {
                self.close(*slot);
                return self.open(*slot, path, *flags, *mode);
            }
            Op::Close { slot } => self.close(*slot),
            Op::Read { slot, offset, len } => {
                let opened = self.readable(*slot)?;
                if opened.handle.is_none() {
                    return Err(Errno(libc::EISDIR));
                }
                return Ok(Outcome::Data(self.read(
                    opened.node,
                    opened.handle.as_deref(),
                    *offset,
                    *len,
                )?));
            }
            Op::Write { slot, offset, fill } => {
                let opened = self.writable(*slot, libc::EBADF)?;
                let handle = opened.handle.as_deref();
                let offset = match opened.flags.append {
                    true => self.union().getattr(opened.node, handle)?.size,
                    false => *offset,
                };
                if fill.len > 0 {
                    let done =
                        self.union()
                            .write(opened.node, handle, offset, &fill.bytes(), None)?;
                    return Ok(Outcome::Count(done as u64));
                }
                return Ok(Outcome::Count(0));
            }
            Op::SetLen { slot, len } => {
                let opened = self.writable(*slot, libc::EINVAL)?;
                let set = SetAttr {
                    size: Some(*len),
                    mtime: Some(SetTime::Now),
                    ..SetAttr::default()
                };
                return self.set(opened.node, opened.handle.as_deref(), set);
            }
            Op::Stat { slot } => {
                let opened = self.slot(*slot);
                let attr = self
                    .union()
                    .getattr(opened.node, opened.handle.as_deref())?;
                return Ok(Outcome::Facts(facts(&attr)));
            }
            Op::ChmodOpen { slot, mode } => {
                let opened = self.slot(*slot);
                return self.set(opened.node, opened.handle.as_deref(), perm(*mode));
            }
            Op::Sync { slot } => {
                let opened = self.slot(*slot);
                match &opened.handle {
                    Some(handle) => self.union().fsync(opened.node, Some(handle), false)?,
                    None => self.union().fsync_dir(opened.node, false)?,
                }
            }
            Op::Punch { slot, offset, len } => {
                let opened = self.writable(*slot, libc::EBADF)?;
                let mode = libc::FALLOC_FL_PUNCH_HOLE | libc::FALLOC_FL_KEEP_SIZE;
                self.union().fallocate(
                    opened.node,
                    opened.handle.as_deref(),
                    mode,
                    *offset,
                    *len,
                    &CALLER,
                )?;
            }
            Op::CopyRange {
                from,
                from_offset,
                to,
                to_offset,
                len,
            } => {
                return self.copy_range(*from, *from_offset, *to, *to_offset, *len);
            }
            Op::ReadAll { path } => {
                let (node, attr) = self.resolve(path, true)?.existing()?;
                if attr.kind == FileKind::Directory {
                    return Err(Errno(libc::EISDIR));
                }
                return Ok(Outcome::Data(self.content(node, attr)?));
            }
            Op::StatPath { path, follow } => {
                let (node, _) = self.resolve(path, *follow)?.existing()?;
                return Ok(Outcome::Facts(facts(&self.union().getattr(node, None)?)));
            }
            Op::List { path } => {
                let (node, attr) = self.resolve(path, true)?.existing()?;
                if attr.kind != FileKind::Directory {
                    return Err(Errno(libc::ENOTDIR));
                }
                let listed = self.list(node)?;
                return Ok(Outcome::Names(
                    listed
                        .into_iter()
                        .map(|(name, (kind, _))| (name, kind))
                        .collect(),
                ));
            }
            Op::Truncate { path, len } => {
                let (node, attr) = self.resolve(path, true)?.existing()?;
                match attr.kind {
                    FileKind::Regular => {}
                    FileKind::Directory => return Err(Errno(libc::EISDIR)),
                    _ => return Err(Errno(libc::EINVAL)),
                }
                return self.set(
                    node,
                    None,
                    SetAttr {
                        size: Some(*len),
                        ..SetAttr::default()
                    },
                );
            }
            Op::Readlink { path } => {
                let (node, attr) = self.resolve(path, false)?.existing()?;
                if attr.kind != FileKind::Symlink {
                    return Err(Errno(libc::EINVAL));
                }
                return Ok(Outcome::Data(
                    self.union().readlink(node)?.into_encoded_bytes(),
                ));
            }
            Op::Mkdir { .. } | Op::Mknod { .. } | Op::Symlink { .. } | Op::Link { .. } => {
                let entry = self.make(op)?;
                self.take(&entry);
            }
            Op::Unlink { path } | Op::Rmdir { path } => {
                let rmdir = matches!(op, Op::Rmdir { .. });
                let place = self.resolve(path, false)?;
                let (_, attr) = place.existing()?;
                match (attr.kind == FileKind::Directory, rmdir) {
                    (true, false) => return Err(Errno(libc::EISDIR)),
                    (false, true) => return Err(Errno(libc::ENOTDIR)),
                    (true, true) => self.union().rmdir(place.parent, place.name()?)?,
                    (false, false) => self.union().unlink(place.parent, place.name()?)?,
                }
            }
            Op::Rename { from, to, how } => return self.rename(from, to, *how),
            Op::Chmod { .. } | Op::Chown { .. } | Op::SetMtime { .. } => return self.change(op),
            Op::SetXattr { .. } | Op::GetXattr { .. } | Op::RemoveXattr { .. } => {
                return self.xattr(op);
            }
            Op::Remount => unreachable!("done by whoever replays"),
        }
        Ok(Outcome::Done)
    }

    fn change(&mut self, op: &Op) -> Result<Outcome> {
        let (path, follow) = match op {
            Op::Chmod { path, .. } => (path, true),
            Op::Chown { path, follow, .. } | Op::SetMtime { path, follow, .. } => (path, *follow),
            _ => unreachable!("only these change attributes"),
        };
        let (node, attr) = self.resolve(path, follow)?.existing()?;
        let set = match op {
            Op::Chmod { mode, .. } => perm(*mode),
            Op::Chown { uid, gid, .. } => {
                let mut kept = u32::from(attr.perm);
                // chown(2): the kernel asks for this as one change.
                if attr.kind != FileKind::Directory {
                    let group = if kept & 0o010 == 0 { 0 } else { 0o2000 };
                    kept &= !(0o4000 | group);
                }
                let perm = u16::try_from(kept).unwrap();
                let perm = (perm != attr.perm).then_some(perm);
                SetAttr {
                    uid: *uid,
                    gid: *gid,
                    perm,
                    ..SetAttr::default()
                }
            }
            Op::SetMtime { at, .. } => SetAttr {
                mtime: match at {
                    MtimeChange::At(sec, nsec) => Some(SetTime::At(Timestamp {
                        sec: *sec,
                        nsec: *nsec,
                    })),
                    MtimeChange::Now => Some(SetTime::Now),
                    MtimeChange::Omit => None,
                },
                atime: Some(SetTime::Now),
                ..SetAttr::default()
            },
            _ => unreachable!("only these change attributes"),
        };
        self.set(node, None, set)
    }

    fn xattr(&mut self, op: &Op) -> Result<Outcome> {
        let (Op::SetXattr { path, name, .. }
        | Op::GetXattr { path, name }
        | Op::RemoveXattr { path, name }) = op
        else {
            unreachable!("only these are about xattrs");
        };
        let (node, attr) = self.resolve(path, false)?.existing()?;
        let plain = matches!(attr.kind, FileKind::Regular | FileKind::Directory);
        let name = OsStr::new(name);
        if name.as_encoded_bytes().starts_with(b"user.") && !plain {
            let read = matches!(op, Op::GetXattr { .. });
            return Err(Errno(if read { libc::ENODATA } else { libc::EPERM }));
        }
        match op {
            Op::GetXattr { .. } => return Ok(Outcome::Data(self.union().getxattr(node, name)?)),
            Op::RemoveXattr { .. } => self.union().removexattr(node, name)?,
            Op::SetXattr { value, how, .. } => {
                let mode = match how {
                    XattrHow::Any => SetXattrMode::Any,
                    XattrHow::Create => SetXattrMode::Create,
                    XattrHow::Replace => SetXattrMode::Replace,
                };
                self.union().setxattr(node, name, value, mode)?;
            }
            _ => unreachable!("only these are about xattrs"),
        }
        Ok(Outcome::Done)
    }

    // Reading.
}

impl Drop for Direct {
    fn drop(&mut self) {
        if self.union.is_some() {
            for slot in 0..SLOTS {
                self.close(slot);
            }
        }
    }
}

impl Subject for Direct {
    fn perform(&mut self, op: &Op) -> Outcome {
        // Under a model every slot that is used is open; under stress nobody knows.
        if op.slots().iter().any(|slot| self.slots[*slot].is_none()) {
            return Outcome::Skip;
        }
        let outcome = self.run(op).unwrap_or_else(|errno| Outcome::Errno(errno.0));
        self.give_back();
        outcome
    }

    fn snapshot(&mut self) -> (Snapshot, Vec<Oddity>) {
        let mut found = Snapshot::new();
        let mut odd = Vec::new();
        let mut todo = vec![(Path::new(), NodeId::ROOT)];
        while let Some((path, node)) = todo.pop() {
            let item = match self.item(node) {
                Ok(item) => item,
                Err(Errno(errno)) => {
                    odd.push(Oddity::Other(format!("{}: errno {errno}", show(&path))));
                    continue;
                }
            };
            let listed = match item.facts.kind {
                Kind::Dir => self.list(node),
                _ => Ok(BTreeMap::new()),
            };
            found.insert(path.clone(), item);
            let Ok(listed) = listed else {
                odd.push(Oddity::Other(format!("{}: cannot be listed", show(&path))));
                continue;
            };
            for (name, told) in listed {
                let mut inner = path.clone();
                inner.push(name.clone());
                let Ok(entry) = self.union().lookup(node, OsStr::new(&name)) else {
                    odd.push(Oddity::Ghost(inner));
                    continue;
                };
                let (child, attr) = self.take(&entry);
                let is = (kind_of(attr.kind), attr.ino);
                if told != is {
                    odd.push(Oddity::Other(format!(
                        "{}: listed as {told:x?}, is {is:x?}",
                        show(&inner)
                    )));
                }
                todo.push((inner, child));
            }
        }
        self.give_back();
        (found, odd)
    }

    fn remount(&mut self) {
        for slot in 0..SLOTS {
            self.close(slot);
        }
        // The old one has to let go of the work directory before.
        drop(self.union.take());
        self.union = Some(Arc::new(open(&self.dirs)));
    }
}

pub fn open(dirs: &Dirs) -> Union {
    let config = UnionConfig {
        lowers: dirs.lowers.clone(),
        upper: (!dirs.is_read_only).then(|| UpperConfig {
            dir: dirs.upper.clone(),
            work: dirs.work.clone(),
        }),
        ..UnionConfig::default()
    };
    Union::open(config).unwrap_or_else(|error| panic!("the union does not open: {error}"))
}

fn perm(mode: u32) -> SetAttr {
    SetAttr {
        perm: Some(u16::try_from(mode).unwrap()),
        ..SetAttr::default()
    }
}

fn kind_of(kind: FileKind) -> Kind {
    match kind {
        FileKind::Regular => Kind::File,
        FileKind::Directory => Kind::Dir,
        FileKind::Symlink => Kind::Symlink,
        FileKind::CharDevice => Kind::CharDev,
        FileKind::BlockDevice => Kind::BlockDev,
        FileKind::Fifo => Kind::Fifo,
        FileKind::Socket => Kind::Socket,
    }
}

fn facts(attr: &Attr) -> Facts {
    let kind = kind_of(attr.kind);
    let has_size = matches!(kind, Kind::File | Kind::Symlink);
    let is_device = matches!(kind, Kind::CharDev | Kind::BlockDev);
    Facts {
        kind,
        mode: u32::from(attr.perm),
        uid: attr.uid,
        gid: attr.gid,
        size: if has_size { attr.size } else { 0 },
        rdev: if is_device { attr.rdev } else { 0 },
        nlink: (kind != Kind::Dir).then_some(u64::from(attr.nlink)),
        mtime: Time::At(attr.mtime.sec, attr.mtime.nsec),
    }
}
