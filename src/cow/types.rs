//! The words of the union's interface: what callers hand in and what they get back.

use std::ffi::OsString;
use std::path::PathBuf;
use std::sync::Arc;

pub use super::chunks::Chunking;
use super::owner::Owners;
use super::stat_override::StatOverride;
use crate::store::view::View;
use crate::sys::process;

/// The identity of a file or directory of the union.
///
/// It is the inode number that `stat` shows and the node id of FUSE at once (fuser forces the two to
/// be equal). It does not change by copy-up, rename or remount, and no two live objects share one.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct NodeId(pub u64);

impl NodeId {
    /// The root of the union, FUSE's own number for it.
    pub const ROOT: Self = Self(1);
}

/// Which family of private extended attributes a mount honours. Fixed when it is mounted.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum XattrFamily {
    /// `trusted.overlay.*`: as root.
    #[default]
    Trusted,
    /// `user.overlay.*`: in a user namespace, or asked for by `userxattr`.
    User,
}

/// What kind of object a node is.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum FileKind {
    /// Regular file.
    Regular,
    /// Directory.
    Directory,
    /// Symbolic link.
    Symlink,
    /// Character device.
    CharDevice,
    /// Block device.
    BlockDevice,
    /// Named pipe.
    Fifo,
    /// Unix socket.
    Socket,
}

/// A point in time: seconds since the epoch (negative before 1970) and nanoseconds, 0 to 999,999,999,
/// always counted forward.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Timestamp {
    /// Whole seconds.
    pub sec: i64,
    /// Nanoseconds after `sec`.
    pub nsec: u32,
}

/// What `stat` shows.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Attr {
    /// Inode number; equal to the node id.
    pub ino: u64,
    /// Length in bytes.
    pub size: u64,
    /// Allocated units of 512 bytes.
    pub blocks: u64,
    /// Last access.
    pub atime: Timestamp,
    /// Last change of content.
    pub mtime: Timestamp,
    /// Last change of anything.
    pub ctime: Timestamp,
    /// Type.
    pub kind: FileKind,
    /// Permission bits with setuid, setgid and sticky: `0o7777` at most.
    pub perm: u16,
    /// Number of links that are visible in the union.
    pub nlink: u32,
    /// Owner.
    pub uid: u32,
    /// Group.
    pub gid: u32,
    /// Device number, for devices.
    pub rdev: u64,
    /// Preferred size of one transfer.
    pub blksize: u32,
}

/// The answer to a lookup or to a creation. Each one handed out is to be given back by
/// [`Union::forget`](super::Union::forget).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Entry {
    /// The node.
    pub node: NodeId,
    /// Tells apart two objects that had the same id one after the other.
    pub generation: u64,
    /// Its attributes.
    pub attr: Attr,
}

/// On whose behalf a request is made. Permission checks are the kernel's (`default_permissions`);
/// the union needs the caller for the ownership of what it makes and for the clearing of setuid bits.
#[derive(Clone, Copy, Debug)]
pub struct Caller {
    /// Effective user.
    pub uid: u32,
    /// Effective group.
    pub gid: u32,
    /// Bits to take from the mode of a new object whose parent has no default ACL.
    pub umask: u32,
    /// Its thread, by which other groups of it are found; 0 if that cannot be named here.
    pub pid: u32,
}

impl Caller {
    /// The superuser with an empty umask: what unpacking a layer runs as.
    pub const ROOT: Self = Self {
        uid: 0,
        gid: 0,
        umask: 0,
        pid: 0,
    };

    /// Whether it is in a group, be it by a supplementary one. Of a process that cannot be looked at, only the effective
    /// one is known.
    pub(super) fn is_in_group(&self, gid: u32) -> bool {
        gid == self.gid
            || process::supplementary_groups(self.pid).is_ok_and(|groups| groups.contains(&gid))
    }
}

/// A time to set.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum SetTime {
    /// The host's current time.
    Now,
    /// A given one.
    At(Timestamp),
}

/// What [`Union::setattr`](super::Union::setattr) is to change; `None` leaves a thing as it is.
#[derive(Clone, Copy, Debug, Default)]
pub struct SetAttr {
    /// Permission bits, `0o7777` at most.
    pub perm: Option<u16>,
    /// Owner.
    pub uid: Option<u32>,
    /// Group.
    pub gid: Option<u32>,
    /// Length.
    pub size: Option<u64>,
    /// Last access.
    pub atime: Option<SetTime>,
    /// Last change of content.
    pub mtime: Option<SetTime>,
}

/// One name of a directory.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct DirEntry {
    /// Inode number, equal to what `stat` of the name shows.
    pub ino: u64,
    /// Where reading goes on after this entry: stable for as long as the directory is open.
    pub next_offset: u64,
    /// Type.
    pub kind: FileKind,
    /// Name.
    pub name: OsString,
}

/// How [`Union::rename`](super::Union::rename) treats a target that exists.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum RenameMode {
    /// Replace it.
    #[default]
    Replace,
    /// EEXIST.
    NoReplace,
    /// Exchange the two.
    Exchange,
}

/// What `statfs` shows.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct StatFs {
    /// Blocks of `frsize` bytes in all.
    pub blocks: u64,
    /// Free ones.
    pub bfree: u64,
    /// Free ones for others than root.
    pub bavail: u64,
    /// Inodes in all.
    pub files: u64,
    /// Free inodes.
    pub ffree: u64,
    /// Preferred block size.
    pub bsize: u32,
    /// Longest name.
    pub namelen: u32,
    /// Fundamental block size.
    pub frsize: u32,
}

/// `setxattr`'s flags.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum SetXattrMode {
    /// Create or replace.
    #[default]
    Any,
    /// EEXIST if it is there.
    Create,
    /// ENODATA if it is not.
    Replace,
    /// Never sets anything: EEXIST if it is there, and ENODATA if it is not.
    CreateAndReplace,
}

/// Whose access times stay as they are when something is read.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Quiet {
    /// Nothing's: they move as `relatime` has it, or as the host has it of the upper.
    #[default]
    Nothing,
    /// Those of directories.
    Directories,
    /// Those of directories and files.
    All,
}

/// What a union is made of.
#[derive(Clone, Debug, Default)]
pub struct UnionConfig {
    /// Read-only layers in overlayfs format, the topmost first. At least one unless there is a view or an upper.
    pub lowers: Vec<PathBuf>,
    /// The work directory of the topmost of `lowers`, if that is the upper of a union of others, which may write to both
    /// meanwhile: there the maps lie of files that are copied up in part, and the index of those with several names, which
    /// counts as it is when the union is opened.
    pub lower_work: Option<PathBuf>,
    /// Packed layers, below all the directories.
    pub view: Option<Arc<View>>,
    /// The writable layer; without it the union is read-only.
    pub upper: Option<UpperConfig>,
    /// Private xattrs honoured and written.
    pub xattr_family: XattrFamily,
    /// Whose objects are shown as.
    pub owners: Owners,
    /// Keep owner and mode of what is written in an attribute. An upper that holds some already, or is
    /// marked so by its maker, is served so unasked.
    pub stat_override: Option<StatOverride>,
    /// Show a link count of 1 for every directory.
    pub static_nlink: bool,
    /// Refuse every extended attribute with EOPNOTSUPP; the union's own marks are kept as ever.
    pub no_xattrs: bool,
    /// Never wait for the disk: `fsync` is a no-op, copy-up is not made durable.
    pub volatile: bool,
    /// Refuse POSIX ACLs with EOPNOTSUPP.
    pub no_acl: bool,
    /// Whose access times stay when they are read.
    pub quiet: Quiet,
    /// Copy a file's data up when only its attributes or names change, so that the upper alone says all.
    pub no_metacopy: bool,
    /// Which files are copied up in chunks.
    pub chunking: Chunking,
}

/// What of packed layers could not be used when it was last read.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Damage {
    /// Contents.
    pub contents: u64,
    /// Something of the merged view itself.
    pub view: bool,
}

/// The writable layer.
#[derive(Clone, Debug)]
pub struct UpperConfig {
    /// Where changes go, locked while the union is open and not sealed.
    pub dir: PathBuf,
    /// Scratch directory on the same file system, locked while the union is open.
    pub work: PathBuf,
}
