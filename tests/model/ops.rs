//! The operations that are tried, what they answer, and how random ones are made.

use proptest::prelude::*;

use crate::mounts::mode::Mode;
use crate::tree::{Facts, Kind, Path};

/// An operation on the merged tree. Paths are resolved as the kernel does, symlinks in them included;
/// `slot` names one of a few open files that live on over other operations.
#[derive(Clone, Debug, PartialEq)]
pub enum Op {
    Open {
        slot: usize,
        path: Path,
        flags: OpenFlags,
        mode: u32,
    },
    Close {
        slot: usize,
    },
    Read {
        slot: usize,
        offset: u64,
        len: usize,
    },
    Write {
        slot: usize,
        offset: u64,
        fill: Fill,
    },
    SetLen {
        slot: usize,
        len: u64,
    },
    Stat {
        slot: usize,
    },
    ChmodOpen {
        slot: usize,
        mode: u32,
    },
    Sync {
        slot: usize,
    },
    Punch {
        slot: usize,
        offset: u64,
        len: u64,
    },
    CopyRange {
        from: usize,
        from_offset: u64,
        to: usize,
        to_offset: u64,
        len: u64,
    },
    ReadAll {
        path: Path,
    },
    StatPath {
        path: Path,
        follow: bool,
    },
    List {
        path: Path,
    },
    Truncate {
        path: Path,
        len: u64,
    },
    Mkdir {
        path: Path,
        mode: u32,
    },
    Mknod {
        path: Path,
        kind: Kind,
        mode: u32,
        rdev: u64,
    },
    Symlink {
        target: String,
        path: Path,
    },
    Readlink {
        path: Path,
    },
    Link {
        from: Path,
        to: Path,
    },
    Unlink {
        path: Path,
    },
    Rmdir {
        path: Path,
    },
    Rename {
        from: Path,
        to: Path,
        how: How,
    },
    Chmod {
        path: Path,
        mode: u32,
    },
    Chown {
        path: Path,
        uid: Option<u32>,
        gid: Option<u32>,
        follow: bool,
    },
    SetMtime {
        path: Path,
        at: MtimeChange,
        follow: bool,
    },
    SetXattr {
        path: Path,
        name: String,
        value: Vec<u8>,
        how: XattrHow,
    },
    GetXattr {
        path: Path,
        name: String,
    },
    RemoveXattr {
        path: Path,
        name: String,
    },
    /// Unmount and mount again; open files are closed before.
    Remount,
}

impl Op {
    /// The open files that the operation needs.
    pub fn slots(&self) -> Vec<usize> {
        match self {
            Self::Read { slot, .. }
            | Self::Write { slot, .. }
            | Self::SetLen { slot, .. }
            | Self::Stat { slot }
            | Self::ChmodOpen { slot, .. }
            | Self::Sync { slot }
            | Self::Punch { slot, .. } => vec![*slot],
            Self::CopyRange { from, to, .. } => vec![*from, *to],
            _ => Vec::new(),
        }
    }
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Access {
    Read,
    Write,
    Both,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct OpenFlags {
    pub access: Access,
    pub create: bool,
    pub exclusive: bool,
    pub truncate: bool,
    pub append: bool,
    pub no_follow: bool,
}

impl OpenFlags {
    pub const fn plain(access: Access) -> Self {
        Self {
            access,
            create: false,
            exclusive: false,
            truncate: false,
            append: false,
            no_follow: false,
        }
    }
    pub const fn create(access: Access) -> Self {
        let mut flags = Self::plain(access);
        flags.create = true;
        flags
    }
    pub fn bits(self) -> i32 {
        let access = match self.access {
            Access::Read => libc::O_RDONLY,
            Access::Write => libc::O_WRONLY,
            Access::Both => libc::O_RDWR,
        };
        [
            (self.create, libc::O_CREAT),
            (self.exclusive, libc::O_EXCL),
            (self.truncate, libc::O_TRUNC),
            (self.append, libc::O_APPEND),
            (self.no_follow, libc::O_NOFOLLOW),
        ]
        .iter()
        .filter(|(on, _)| *on)
        .fold(access, |bits, (_, bit)| bits | bit)
    }
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum How {
    Replace,
    NoReplace,
    Exchange,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum XattrHow {
    Any,
    Create,
    Replace,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum MtimeChange {
    At(i64, u32),
    Now,
    Omit,
}

/// Bytes made from a seed, so that a failing sequence prints short.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Fill {
    pub seed: u8,
    pub len: usize,
}

impl Fill {
    pub fn bytes(self) -> Vec<u8> {
        // The period is a prime, so that pages and chunks never look alike.
        (0..self.len)
            .map(|at| u8::try_from((at + usize::from(self.seed) * 31) % 251).unwrap_or(0))
            .collect()
    }
}

/// What an operation answered.
#[derive(Clone, Debug, PartialEq)]
pub enum Outcome {
    Done,
    Errno(i32),
    Data(Vec<u8>),
    Count(u64),
    Facts(Facts),
    Names(Vec<(String, Kind)>),
    /// Nobody is to try this: it would block or touch a device.
    Skip,
}

impl Outcome {
    /// This one, with no more said of a time than in `known`.
    pub fn at_time_of(self, known: Self) -> Self {
        match (self, known) {
            (Self::Facts(seen), Self::Facts(known)) => Self::Facts(Facts {
                mtime: known.mtime,
                ..seen
            }),
            (seen, _) => seen,
        }
    }
}

pub const SLOTS: usize = 4;
const DIR_MODES: [u32; 5] = [0o755, 0o700, 0o2755, 0o1755, 0o711];
const FILE_MODES: [u32; 6] = [0o644, 0o600, 0o755, 0o4755, 0o2755, 0o6711];
const OWNERS: [u32; 3] = [0, 1000, 65534];
const LENGTHS: [usize; 7] = [0, 1, 10, 4095, 4097, 70_000, 200_000];
/// Names that anybody may set, names that only the superuser may, and a name that the union keeps for
/// itself and has to store escaped.
const XATTR_NAMES: [&str; 5] = [
    "user.a",
    "user.b",
    "trusted.c",
    "trusted.overlay.opaque",
    "user.overlay.opaque",
];
const TARGETS: [&str; 7] = ["a", "b/c", "/a/b", "../b", "/c", "a/a", "nowhere"];
/// Few names, so that operations meet; one looks like a mark of another union.
const NAMES: [&str; 5] = ["a", "b", "c", "d", ".wh.a"];

pub fn name() -> impl Strategy<Value = String> {
    prop_oneof![4 => 0..3usize, 2 => 3..4usize, 1 => 4..5usize].prop_map(|at| NAMES[at].to_owned())
}

/// A path of one to three components.
pub fn path() -> impl Strategy<Value = Path> {
    prop_oneof![
        3 => prop::collection::vec(name(), 1..2),
        4 => prop::collection::vec(name(), 2..3),
        2 => prop::collection::vec(name(), 3..4),
    ]
}

fn path_or_root() -> impl Strategy<Value = Path> {
    prop_oneof![1 => Just(Path::new()), 15 => path()]
}

pub fn dir_mode() -> impl Strategy<Value = u32> {
    prop::sample::select(&DIR_MODES[..])
}

pub fn file_mode() -> impl Strategy<Value = u32> {
    prop::sample::select(&FILE_MODES[..])
}

pub fn owner() -> impl Strategy<Value = u32> {
    prop::sample::select(&OWNERS[..])
}

pub fn target() -> impl Strategy<Value = String> {
    prop::sample::select(&TARGETS[..]).prop_map(str::to_owned)
}

pub fn fill() -> impl Strategy<Value = Fill> {
    (any::<u8>(), prop::sample::select(&LENGTHS[..])).prop_map(|(seed, len)| Fill { seed, len })
}

/// Times of the past: after the epoch, before it, and with nanoseconds.
pub fn past() -> impl Strategy<Value = (i64, u32)> {
    prop::sample::select(
        &[
            (1_000_000_000, 0),
            (1_234_567_890, 123_456_789),
            (86_400, 1),
            (-3600, 0),
        ][..],
    )
}

pub fn xattr() -> impl Strategy<Value = (String, Vec<u8>)> {
    let value = prop_oneof![
        Just(b"y".to_vec()),
        Just(Vec::new()),
        Just(vec![0, 255, 10]),
        Just(vec![7; 40]),
    ];
    (
        prop::sample::select(&XATTR_NAMES[..]).prop_map(str::to_owned),
        value,
    )
}

fn offset() -> impl Strategy<Value = u64> {
    prop::sample::select(&[0, 1, 9, 4090, 4096, 69_999, 131_072][..])
}

fn open_flags() -> impl Strategy<Value = OpenFlags> {
    (
        prop::sample::select(&[Access::Read, Access::Write, Access::Both][..]),
        prop::bool::weighted(0.4),
        prop::bool::weighted(0.2),
        prop::bool::weighted(0.2),
        prop::bool::weighted(0.2),
        prop::bool::weighted(0.1),
    )
        .prop_map(
            |(access, create, exclusive, truncate, append, no_follow)| OpenFlags {
                access,
                create,
                exclusive: create && exclusive,
                // Undefined with read access alone, by the manual page.
                truncate: truncate && access != Access::Read,
                append,
                no_follow,
            },
        )
}

/// One random operation.
pub fn op() -> impl Strategy<Value = Op> {
    let slot = || 0..SLOTS;
    let handles = prop_oneof![
        6 => (slot(), path(), open_flags(), file_mode())
            .prop_map(|(slot, path, flags, mode)| Op::Open { slot, path, flags, mode }),
        1 => slot().prop_map(|slot| Op::Close { slot }),
        3 => (slot(), offset(), prop::sample::select(&[1, 10, 5000, 300_000][..]))
            .prop_map(|(slot, offset, len)| Op::Read { slot, offset, len }),
        4 => (slot(), offset(), fill()).prop_map(|(slot, offset, fill)| Op::Write { slot, offset, fill }),
        1 => (slot(), offset()).prop_map(|(slot, len)| Op::SetLen { slot, len }),
        2 => slot().prop_map(|slot| Op::Stat { slot }),
        1 => (slot(), file_mode()).prop_map(|(slot, mode)| Op::ChmodOpen { slot, mode }),
        1 => slot().prop_map(|slot| Op::Sync { slot }),
        1 => (slot(), offset(), 1..100_000u64)
            .prop_map(|(slot, offset, len)| Op::Punch { slot, offset, len }),
        1 => (slot(), offset(), slot(), offset(), 1..100_000u64)
            .prop_map(|(from, from_offset, to, to_offset, len)| Op::CopyRange { from, from_offset, to, to_offset, len }),
    ];
    let how = || prop_oneof![6 => Just(How::Replace), 1 => Just(How::NoReplace), 2 => Just(How::Exchange)];
    let names = prop_oneof![
        3 => (path(), dir_mode()).prop_map(|(path, mode)| Op::Mkdir { path, mode }),
        1 => (path(), special(), file_mode()).prop_map(|(path, (kind, rdev), mode)| Op::Mknod { path, kind, mode, rdev }),
        1 => (target(), path()).prop_map(|(target, path)| Op::Symlink { target, path }),
        2 => (path(), path()).prop_map(|(from, to)| Op::Link { from, to }),
        4 => path().prop_map(|path| Op::Unlink { path }),
        2 => path().prop_map(|path| Op::Rmdir { path }),
        8 => (path(), path(), how()).prop_map(|(from, to, how)| Op::Rename { from, to, how }),
    ];
    let mtime = prop_oneof![
        4 => past().prop_map(|(sec, nsec)| MtimeChange::At(sec, nsec)),
        1 => Just(MtimeChange::Now),
        1 => Just(MtimeChange::Omit),
    ];
    let xattr_how = prop_oneof![
        4 => Just(XattrHow::Any),
        1 => Just(XattrHow::Create),
        1 => Just(XattrHow::Replace),
    ];
    let attributes = prop_oneof![
        2 => (path_or_root(), offset()).prop_map(|(path, len)| Op::Truncate { path, len }),
        2 => (path_or_root(), prop_oneof![file_mode(), dir_mode()]).prop_map(|(path, mode)| Op::Chmod { path, mode }),
        2 => (path(), prop::option::of(owner()), prop::option::of(owner()), any::<bool>())
            .prop_map(|(path, uid, gid, follow)| {
                // FUSE tells its server nothing of a chown of neither, though it has to clear setuid.
                let gid = gid.or(uid.is_none().then_some(0));
                Op::Chown { path, uid, gid, follow }
            }),
        2 => (path_or_root(), mtime, any::<bool>()).prop_map(|(path, at, follow)| Op::SetMtime { path, at, follow }),
        3 => (path_or_root(), xattr(), xattr_how)
            .prop_map(|(path, (name, value), how)| Op::SetXattr { path, name, value, how }),
        1 => (path_or_root(), xattr()).prop_map(|(path, (name, _))| Op::RemoveXattr { path, name }),
    ];
    let looks = prop_oneof![
        2 => path().prop_map(|path| Op::ReadAll { path }),
        2 => (path_or_root(), any::<bool>()).prop_map(|(path, follow)| Op::StatPath { path, follow }),
        2 => path_or_root().prop_map(|path| Op::List { path }),
        1 => path().prop_map(|path| Op::Readlink { path }),
        1 => (path_or_root(), xattr()).prop_map(|(path, (name, _))| Op::GetXattr { path, name }),
    ];
    prop_oneof![
        10 => handles,
        12 => names,
        7 => attributes,
        5 => looks,
        1 => Just(Op::Remount),
    ]
}

/// A special file's type and device number. Character device 0/0 is there because it must be refused.
fn special() -> impl Strategy<Value = (Kind, u64)> {
    prop_oneof![
        4 => special_in_layer(),
        1 => Just((Kind::CharDev, 0)),
    ]
}

/// The same of what a layer may have. Where the server can make no devices it can copy none up either.
pub fn special_in_layer() -> impl Strategy<Value = (Kind, u64)> {
    let mut kinds = vec![(Kind::Fifo, 0), (Kind::Socket, 0)];
    if Mode::of_run().makes_devices() {
        kinds.push((Kind::CharDev, libc::makedev(1, 3)));
        kinds.push((Kind::BlockDev, libc::makedev(259, 70_000)));
    }
    prop::sample::select(kinds)
}
