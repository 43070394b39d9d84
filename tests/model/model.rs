//! The reference: a POSIX file system in memory, with Linux's order of checks.
//!
//! Once its layers are merged a union owes its users nothing but an ordinary file system, so this
//! knows nothing of layers. It runs everything as the superuser with an empty umask.

mod files;
mod names;

use std::collections::BTreeMap;

use crate::layers::Meta;
use crate::ops::{Access, Fill, How, MtimeChange, Op, OpenFlags, Outcome, SLOTS, XattrHow};
use crate::tree::{Facts, Item, Kind, Path, Snapshot, Time};

pub type Ino = u64;
pub const ROOT: Ino = 1;
/// The kernel's limit of symlinks in one path.
const MAX_SYMLINKS: usize = 40;

type Result<T, E = i32> = std::result::Result<T, E>;

#[derive(Clone, Debug)]
pub struct Inode {
    pub kind: Kind,
    pub mode: u32,
    pub uid: u32,
    pub gid: u32,
    pub mtime: Time,
    pub rdev: u64,
    /// A file's bytes or a symlink's target.
    pub data: Vec<u8>,
    pub xattrs: BTreeMap<String, Vec<u8>>,
    /// Names of a directory.
    pub entries: BTreeMap<String, Ino>,
    /// The directory above a directory.
    pub parent: Ino,
    pub nlink: u64,
    /// False where the number of links cannot be known: see `differences`.
    pub nlink_known: bool,
}

#[derive(Clone, Debug)]
struct Handle {
    ino: Ino,
    flags: OpenFlags,
}

#[derive(Clone, Debug)]
pub struct Model {
    inodes: BTreeMap<Ino, Inode>,
    next: Ino,
    handles: Vec<Option<Handle>>,
}

/// Where a path leads: a directory and a name in it, and what the name is now. No name: the root.
struct Place {
    parent: Ino,
    name: Option<String>,
    ino: Option<Ino>,
}

impl Model {
    pub fn new(root: Inode) -> Self {
        Self {
            inodes: BTreeMap::from([(ROOT, root)]),
            next: ROOT + 1,
            handles: vec![None; SLOTS],
        }
    }

    /// Puts a new object there without any check: for building the merged tree.
    pub fn insert(&mut self, parent: Ino, name: &str, mut inode: Inode) -> Ino {
        let ino = self.next;
        self.next += 1;
        inode.parent = parent;
        self.inodes.insert(ino, inode);
        self.inode_mut(parent).entries.insert(name.to_owned(), ino);
        ino
    }

    /// One more name for `ino`, without any check: for building the merged tree.
    pub fn insert_link(&mut self, parent: Ino, name: &str, ino: Ino) {
        self.inode_mut(ino).nlink += 1;
        self.inode_mut(parent).entries.insert(name.to_owned(), ino);
    }

    pub fn inode(&self, ino: Ino) -> &Inode {
        &self.inodes[&ino]
    }

    pub fn inode_mut(&mut self, ino: Ino) -> &mut Inode {
        self.inodes
            .get_mut(&ino)
            .expect("the model names a live inode")
    }

    fn kind(&self, ino: Ino) -> Kind {
        self.inode(ino).kind
    }

    /// Runs one operation.
    pub fn run(&mut self, op: &Op) -> Outcome {
        self.try_run(op).unwrap_or_else(|errno| {
            if errno == SKIP {
                Outcome::Skip
            } else {
                Outcome::Errno(errno)
            }
        })
    }

    fn try_run(&mut self, op: &Op) -> Result<Outcome> {
        match op {
            Op::Open {
                slot,
                path,
                flags,
                mode,
            } => {
                // A slot that is in use is closed before, also when the open fails then.
                self.close(*slot);
                let ino = self.open(path, *flags, *mode)?;
                self.handles[*slot] = Some(Handle { ino, flags: *flags });
                Ok(Outcome::Done)
            }
            Op::Close { slot } => {
                self.close(*slot);
                Ok(Outcome::Done)
            }
            Op::Read { slot, offset, len } => self.read(*slot, *offset, *len).map(Outcome::Data),
            Op::Write { slot, offset, fill } => {
                self.write(*slot, *offset, *fill).map(Outcome::Count)
            }
            Op::SetLen { slot, len } => self.set_len(*slot, *len),
            Op::Stat { slot } => Ok(Outcome::Facts(self.facts(self.handle(*slot)?.ino))),
            Op::ChmodOpen { slot, mode } => {
                let ino = self.handle(*slot)?.ino;
                self.inode_mut(ino).mode = *mode;
                Ok(Outcome::Done)
            }
            Op::Sync { slot } => self.handle(*slot).map(|_| Outcome::Done),
            Op::Punch { slot, offset, len } => self.punch(*slot, *offset, *len),
            Op::CopyRange {
                from,
                from_offset,
                to,
                to_offset,
                len,
            } => self.copy_range(*from, *from_offset, *to, *to_offset, *len),
            Op::ReadAll { path } => {
                let ino = self.open(path, OpenFlags::plain(Access::Read), 0)?;
                match self.kind(ino) {
                    Kind::Dir => Err(libc::EISDIR),
                    _ => Ok(Outcome::Data(self.inode(ino).data.clone())),
                }
            }
            Op::StatPath { path, follow } => {
                Ok(Outcome::Facts(self.facts(self.existing(path, *follow)?)))
            }
            Op::List { path } => self.list(path),
            Op::Truncate { path, len } => self.truncate(path, *len),
            Op::Mkdir { path, mode } => {
                let (parent, name) = self.vacant(path)?;
                let mut inode = self.fresh(parent, Kind::Dir, mode & 0o1777);
                if self.inode(parent).mode & 0o2000 != 0 {
                    inode.mode |= 0o2000;
                }
                self.create(parent, &name, inode);
                Ok(Outcome::Done)
            }
            Op::Mknod {
                path,
                kind,
                mode,
                rdev,
            } => {
                let (parent, name) = self.vacant(path)?;
                if *kind == Kind::CharDev && *rdev == 0 {
                    return Err(libc::EPERM); // would be a whiteout
                }
                let mut inode = self.fresh(parent, *kind, *mode);
                inode.rdev = *rdev;
                self.create(parent, &name, inode);
                Ok(Outcome::Done)
            }
            Op::Symlink { target, path } => {
                let (parent, name) = self.vacant(path)?;
                let mut inode = self.fresh(parent, Kind::Symlink, 0o777);
                inode.data = target.clone().into_bytes();
                self.create(parent, &name, inode);
                Ok(Outcome::Done)
            }
            Op::Readlink { path } => {
                let ino = self.existing(path, false)?;
                match self.kind(ino) {
                    Kind::Symlink => Ok(Outcome::Data(self.inode(ino).data.clone())),
                    _ => Err(libc::EINVAL),
                }
            }
            Op::Link { from, to } => self.link(from, to),
            Op::Unlink { path } => self.unlink(path),
            Op::Rmdir { path } => self.rmdir(path),
            Op::Rename { from, to, how } => self.rename(from, to, *how),
            Op::Chmod { path, mode } => {
                let ino = self.existing(path, true)?;
                self.inode_mut(ino).mode = *mode;
                Ok(Outcome::Done)
            }
            Op::Chown {
                path,
                uid,
                gid,
                follow,
            } => self.chown(path, *uid, *gid, *follow),
            Op::SetMtime { path, at, follow } => {
                let ino = self.existing(path, *follow)?;
                match at {
                    MtimeChange::At(sec, nsec) => self.inode_mut(ino).mtime = Time::At(*sec, *nsec),
                    MtimeChange::Now => self.touch(ino),
                    MtimeChange::Omit => {}
                }
                Ok(Outcome::Done)
            }
            Op::SetXattr {
                path,
                name,
                value,
                how,
            } => self.set_xattr(path, name, value, *how),
            Op::GetXattr { path, name } => {
                let ino = self.existing(path, false)?;
                let found = self.inode(ino).xattrs.get(name).cloned();
                found.map(Outcome::Data).ok_or(libc::ENODATA)
            }
            Op::RemoveXattr { path, name } => {
                let ino = self.existing(path, false)?;
                self.may_have_user_xattr(ino, name)?;
                let old = self.inode_mut(ino).xattrs.remove(name);
                old.map(|_| Outcome::Done).ok_or(libc::ENODATA)
            }
            Op::Remount => {
                for slot in 0..SLOTS {
                    self.close(slot);
                }
                Ok(Outcome::Done)
            }
        }
    }

    // Paths.

    fn resolve(&self, path: &[String], follow: bool) -> Result<Place> {
        let mut budget = MAX_SYMLINKS;
        self.walk(ROOT, path, follow, &mut budget)
    }

    fn walk(&self, start: Ino, path: &[String], follow: bool, budget: &mut usize) -> Result<Place> {
        let mut at = Place {
            parent: start,
            name: None,
            ino: Some(start),
        };
        for (index, name) in path.iter().enumerate() {
            let dir = at.ino.ok_or(libc::ENOENT)?;
            if self.kind(dir) != Kind::Dir {
                return Err(libc::ENOTDIR);
            }
            if name == ".." {
                let parent = self.inode(dir).parent;
                at = Place {
                    parent,
                    name: None,
                    ino: Some(parent),
                };
                continue;
            }
            let ino = self.inode(dir).entries.get(name).copied();
            at = Place {
                parent: dir,
                name: Some(name.clone()),
                ino,
            };
            let last = index + 1 == path.len();
            let link = ino.filter(|ino| self.kind(*ino) == Kind::Symlink && (follow || !last));
            if let Some(link) = link {
                *budget = budget.checked_sub(1).ok_or(libc::ELOOP)?;
                let target = String::from_utf8_lossy(&self.inode(link).data).into_owned();
                let from = if target.starts_with('/') { ROOT } else { dir };
                let parts: Path = target
                    .split('/')
                    .filter(|part| !part.is_empty())
                    .map(str::to_owned)
                    .collect();
                at = self.walk(from, &parts, true, budget)?;
            }
        }
        Ok(at)
    }

    fn existing(&self, path: &[String], follow: bool) -> Result<Ino> {
        self.resolve(path, follow)?.ino.ok_or(libc::ENOENT)
    }

    /// A directory and a name in it that is free.
    fn vacant(&self, path: &[String]) -> Result<(Ino, String)> {
        let place = self.resolve(path, false)?;
        match (place.name, place.ino) {
            (Some(name), None) => Ok((place.parent, name)),
            _ => Err(libc::EEXIST),
        }
    }

    /// A directory, a name in it, and what is there.
    fn named(&self, path: &[String]) -> Result<(Ino, String, Ino)> {
        let place = self.resolve(path, false)?;
        let ino = place.ino.ok_or(libc::ENOENT)?;
        Ok((place.parent, place.name.ok_or(libc::EBUSY)?, ino))
    }

    /// Whether `dir` is `ino` or lies below it.
    fn is_below(&self, mut dir: Ino, ino: Ino) -> bool {
        while dir != ino && dir != ROOT {
            dir = self.inode(dir).parent;
        }
        dir == ino
    }

    // Inodes.

    fn fresh(&self, parent: Ino, kind: Kind, mode: u32) -> Inode {
        let parent = self.inode(parent);
        Inode {
            gid: if parent.mode & 0o2000 == 0 {
                0
            } else {
                parent.gid
            },
            ..Inode::blank(kind, mode)
        }
    }

    fn create(&mut self, parent: Ino, name: &str, inode: Inode) -> Ino {
        self.touch(parent);
        self.insert(parent, name, inode)
    }

    fn touch(&mut self, ino: Ino) {
        self.inode_mut(ino).mtime = Time::Recent;
    }

    fn drop_link(&mut self, ino: Ino) {
        let inode = self.inode_mut(ino);
        inode.nlink -= 1;
        self.collect(ino);
    }

    fn collect(&mut self, ino: Ino) {
        let open = self
            .handles
            .iter()
            .flatten()
            .any(|handle| handle.ino == ino);
        if self.inode(ino).nlink == 0 && !open {
            self.inodes.remove(&ino);
        }
    }

    fn facts(&self, ino: Ino) -> Facts {
        let inode = self.inode(ino);
        Facts {
            kind: inode.kind,
            mode: inode.mode,
            uid: inode.uid,
            gid: inode.gid,
            size: inode.data.len() as u64,
            rdev: inode.rdev,
            nlink: (inode.kind != Kind::Dir && inode.nlink_known).then_some(inode.nlink),
            mtime: inode.mtime,
        }
    }

    // Open files.

    // Names.

    fn list(&self, path: &[String]) -> Result<Outcome> {
        let ino = self.existing(path, true)?;
        if self.kind(ino) != Kind::Dir {
            return Err(libc::ENOTDIR);
        }
        let entries = &self.inode(ino).entries;
        Ok(Outcome::Names(
            entries
                .iter()
                .map(|(name, ino)| (name.clone(), self.kind(*ino)))
                .collect(),
        ))
    }

    fn truncate(&mut self, path: &[String], len: u64) -> Result<Outcome> {
        let ino = self.existing(path, true)?;
        match self.kind(ino) {
            Kind::File => {}
            Kind::Dir => return Err(libc::EISDIR),
            _ => return Err(libc::EINVAL),
        }
        let inode = self.inode_mut(ino);
        // Truncating to the same length is the one change of which file systems disagree on the time.
        inode.mtime = if inode.data.len() == at(len) {
            Time::Any
        } else {
            Time::Recent
        };
        inode.data.resize(at(len), 0);
        Ok(Outcome::Done)
    }

    // Attributes.

    fn chown(
        &mut self,
        path: &[String],
        uid: Option<u32>,
        gid: Option<u32>,
        follow: bool,
    ) -> Result<Outcome> {
        let ino = self.existing(path, follow)?;
        let inode = self.inode_mut(ino);
        inode.uid = uid.unwrap_or(inode.uid);
        inode.gid = gid.unwrap_or(inode.gid);
        if inode.kind != Kind::Dir {
            inode.mode &= !0o4000;
            // Without execution for the group the bit means mandatory locking and stays.
            if inode.mode & 0o010 != 0 {
                inode.mode &= !0o2000;
            }
        }
        Ok(Outcome::Done)
    }

    /// xattr(7): user attributes are for files and directories alone.
    fn may_have_user_xattr(&self, ino: Ino, name: &str) -> Result<()> {
        let plain = matches!(self.kind(ino), Kind::File | Kind::Dir);
        if name.starts_with("user.") && !plain {
            Err(libc::EPERM)
        } else {
            Ok(())
        }
    }

    fn set_xattr(
        &mut self,
        path: &[String],
        name: &str,
        value: &[u8],
        how: XattrHow,
    ) -> Result<Outcome> {
        let ino = self.existing(path, false)?;
        self.may_have_user_xattr(ino, name)?;
        let xattrs = &mut self.inode_mut(ino).xattrs;
        match how {
            XattrHow::Create if xattrs.contains_key(name) => return Err(libc::EEXIST),
            XattrHow::Replace if !xattrs.contains_key(name) => return Err(libc::ENODATA),
            _ => {}
        }
        xattrs.insert(name.to_owned(), value.to_vec());
        Ok(Outcome::Done)
    }

    /// The whole tree as it would be listed.
    pub fn snapshot(&self) -> Snapshot {
        let mut found = Snapshot::new();
        let mut todo: Vec<(Path, Ino)> = vec![(Path::new(), ROOT)];
        while let Some((path, ino)) = todo.pop() {
            let inode = self.inode(ino);
            for (name, child) in &inode.entries {
                let mut path = path.clone();
                path.push(name.clone());
                todo.push((path, *child));
            }
            let item = Item {
                facts: self.facts(ino),
                data: inode.data.clone(),
                xattrs: inode.xattrs.clone(),
                ino,
            };
            found.insert(path, item);
        }
        found
    }

    /// Gives the root the attributes of another upper.
    pub fn set_root(&mut self, meta: &Meta) {
        let root = self.inode_mut(ROOT);
        (root.mode, root.uid, root.gid) = (meta.mode, meta.uid, meta.gid);
        root.mtime = Time::At(meta.mtime.0, meta.mtime.1);
        root.xattrs.clear();
    }

    /// Forgets when the directory was changed in which `path` lies.
    pub fn blur_parent_time(&mut self, path: &[String]) {
        if let Ok(place) = self.resolve(path, false) {
            self.inode_mut(place.parent).mtime = Time::Any;
        }
    }
}

impl Inode {
    /// A new object without content, owned by the superuser.
    pub fn blank(kind: Kind, mode: u32) -> Self {
        Self {
            kind,
            mode,
            uid: 0,
            gid: 0,
            mtime: Time::Recent,
            rdev: 0,
            data: Vec::new(),
            xattrs: BTreeMap::new(),
            entries: BTreeMap::new(),
            parent: ROOT,
            nlink: 1,
            nlink_known: true,
        }
    }
}

/// Not an errno: the operation is not to be tried.
const SKIP: i32 = -1;

fn at(offset: u64) -> usize {
    usize::try_from(offset).expect("the generators use small offsets")
}
