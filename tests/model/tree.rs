//! A tree as anyone sees it: what is compared, and how a difference is told.

use std::collections::{BTreeMap, BTreeSet};
use std::fmt::Write as _;

/// A path below the root of the union, one element a component; empty for the root itself.
pub type Path = Vec<String>;

/// `/a/b` for people and for system calls inside the jail.
pub fn show(path: &[String]) -> String {
    format!("/{}", path.join("/"))
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Kind {
    File,
    Dir,
    Symlink,
    Fifo,
    CharDev,
    BlockDev,
    Socket,
}

/// What the model knows of an object's time of last change of content.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Time {
    /// Exactly this: seconds and nanoseconds.
    At(i64, u32),
    /// The clock's, read after the test began.
    Recent,
    /// Not determined by any standard.
    Any,
}

impl Time {
    /// Whether a time read from a real file system is what the model expects. `began` is the time, in
    /// whole seconds, when the run began.
    fn admits(self, seen: Self, began: i64) -> bool {
        match (self, seen) {
            (Self::Any, _) => true,
            (Self::Recent, Self::At(sec, _)) => sec >= began,
            (want, seen) => want == seen,
        }
    }
}

/// Everything of one object that has to agree.
#[derive(Clone, PartialEq, Eq)]
pub struct Facts {
    pub kind: Kind,
    pub mode: u32,
    pub uid: u32,
    pub gid: u32,
    /// Bytes of a file or of a symlink's target; 0 for the rest, whose size is the host's own affair.
    pub size: u64,
    pub rdev: u64,
    /// `None` for directories: their link count is the host's own affair.
    pub nlink: Option<u64>,
    pub mtime: Time,
}

impl std::fmt::Debug for Facts {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(
            f,
            "{:?} {:o} {}:{} size {} rdev {:#x} nlink {:?} mtime {:?}",
            self.kind, self.mode, self.uid, self.gid, self.size, self.rdev, self.nlink, self.mtime
        )
    }
}

impl Facts {
    /// What differs, or nothing. `self` is what the model expects.
    pub fn differs(&self, seen: &Self, began: i64) -> Option<String> {
        // A model that cannot know a link count says so with `None`.
        let links_known = self.nlink.is_some() && seen.nlink.is_some();
        let want = Self {
            mtime: seen.mtime,
            nlink: self.nlink.filter(|_| links_known),
            ..self.clone()
        };
        let got = Self {
            nlink: seen.nlink.filter(|_| links_known),
            ..seen.clone()
        };
        if want == got && self.mtime.admits(seen.mtime, began) {
            return None;
        }
        Some(format!("expected {self:?}\n         seen     {seen:?}"))
    }
}

/// One object of a listed tree.
#[derive(Clone, Debug)]
pub struct Item {
    pub facts: Facts,
    /// A file's bytes or a symlink's target.
    pub data: Vec<u8>,
    pub xattrs: BTreeMap<String, Vec<u8>>,
    /// The inode number: a real one, or the model's.
    pub ino: u64,
}

/// A whole tree, by path.
pub type Snapshot = BTreeMap<Path, Item>;

/// Which model inode has which inode number; kept over a whole run to see that numbers are stable.
#[derive(Default)]
pub struct InodeMap {
    real_of: BTreeMap<u64, u64>,
}

impl InodeMap {
    /// Checks `seen` against everything seen before: one object, one number, forever.
    pub fn check(&mut self, model: &Snapshot, seen: &Snapshot, why: &mut String) {
        let live: BTreeSet<u64> = model.values().map(|item| item.ino).collect();
        self.real_of.retain(|id, _| live.contains(id));
        let mut owner: BTreeMap<u64, u64> = BTreeMap::new();
        for (path, item) in model {
            let Some(real) = seen.get(path) else { continue };
            let known = *self.real_of.entry(item.ino).or_insert(real.ino);
            if known != real.ino {
                let _ = writeln!(
                    why,
                    "  {}: inode number was {known:#x}, is {:#x}",
                    show(path),
                    real.ino
                );
            }
            let first = *owner.entry(real.ino).or_insert(item.ino);
            if first != item.ino {
                let _ = writeln!(
                    why,
                    "  {}: inode number {:#x} belongs to another object too",
                    show(path),
                    real.ino
                );
            }
        }
    }
}

/// Everything in which `seen` is not what the model says, one line each; empty when they agree.
pub fn compare(model: &Snapshot, seen: &Snapshot, began: i64) -> String {
    let mut why = String::new();
    for path in model.keys().filter(|path| !seen.contains_key(*path)) {
        let _ = writeln!(why, "  {}: is missing", show(path));
    }
    for path in seen.keys().filter(|path| !model.contains_key(*path)) {
        let _ = writeln!(why, "  {}: should not be there", show(path));
    }
    for (path, want) in model {
        let Some(got) = seen.get(path) else { continue };
        if let Some(text) = want.facts.differs(&got.facts, began) {
            let _ = writeln!(why, "  {}: {text}", show(path));
        }
        if want.data != got.data {
            let _ = writeln!(
                why,
                "  {}: {}",
                show(path),
                data_differs(&want.data, &got.data)
            );
        }
        if want.xattrs != got.xattrs {
            let _ = writeln!(
                why,
                "  {}: expected xattrs {:?}\n         seen     {:?}",
                show(path),
                want.xattrs,
                got.xattrs
            );
        }
    }
    why
}

/// Where two contents part, in one line.
pub fn data_differs(want: &[u8], got: &[u8]) -> String {
    let at = want.iter().zip(got).take_while(|(a, b)| a == b).count();
    format!(
        "content differs from byte {at} on: expected {:?}, seen {:?}; {} and {} bytes",
        want.get(at),
        got.get(at),
        want.len(),
        got.len()
    )
}
