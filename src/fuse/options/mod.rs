//! The options of `plyfs -o`: a pure function from words to what they ask for.
//!
//! The language is that of mount(8) and of kernel overlayfs: options are separated by commas, a
//! backslash takes the meaning away from a comma, a colon or a backslash, directories of `lowerdir`
//! are separated by colons, the topmost first. What other implementations of the same mount
//! understand and what has no bearing here is accepted; what would change the meaning of the mount
//! and is not known is refused by name.

use std::borrow::Cow;
use std::ffi::{OsStr, OsString};
use std::os::unix::ffi::{OsStrExt, OsStringExt};
use std::path::PathBuf;
use std::time::Duration;

mod copying;
pub mod help;
mod table;

use table::{Action, TABLE};

use super::features::FeatureSet;
use crate::cow::{Chunking, Owners, Quiet, StatOverride, UnionConfig, UpperConfig, XattrFamily};
use crate::store::view::Verify;
use crate::sys::fuse_mount::MountOptions;
use crate::sys::process;

/// What the options ask for.
#[derive(Clone, Debug)]
pub struct Options {
    /// Lower directories by `lowerdir`, the topmost first.
    pub lowers: Vec<PathBuf>,
    /// A file with more of them, one a line, below those of `lowerdir`.
    pub lowerdir_file: Option<PathBuf>,
    /// `view`: packed layers of a store, below all directories.
    pub view: Option<PathBuf>,
    /// `verify`: when their contents are compared with their names.
    pub verify: Verify,
    /// `upperdir`.
    pub upper: Option<PathBuf>,
    /// `workdir`.
    pub work: Option<PathBuf>,
    /// How the mount appears to the host; `read_only` is also set when there is no upper.
    pub mount: MountOptions,
    /// `squash_to_root`.
    pub squash_to_root: bool,
    /// `uidmapping` and `gidmapping`, with `squash_to_uid` and `squash_to_gid`, which go before `squash_to_root`.
    pub owners: Owners,
    /// `xattr_permissions`.
    pub stat_override: Option<StatOverride>,
    /// `static_nlink`.
    pub static_nlink: bool,
    /// `noxattrs`.
    pub no_xattrs: bool,
    /// `debug`, which says what `-d` does.
    pub debug: bool,
    /// `volatile`, or `fsync=0`.
    pub volatile: bool,
    /// `noacl`.
    pub no_acl: bool,
    /// `metacopy`. Without a word it is on, but with the marks of `userxattr`, where no other reads it.
    pub metacopy: Option<bool>,
    /// `chunk_size` and `copy_whole`.
    pub chunking: Chunking,
    /// `complete`: how often files that have largely been copied up are completed.
    pub complete: Option<Duration>,
    /// `userxattr`.
    pub user_xattr: bool,
    /// How the kernel is served.
    pub session: SessionOptions,
}

/// How the kernel is served: what is a matter of speed, or of an old kernel.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct SessionOptions {
    /// Threads that answer requests.
    pub threads: usize,
    /// Features that may be used when the kernel has them.
    pub allowed: FeatureSet,
    /// Do without OPEN requests; then a copy-up happens at the first write instead of at open.
    pub no_open: bool,
    /// Gather writes in the kernel.
    pub writeback: bool,
    /// Have the kernel read lower files by itself; excludes both of the above.
    pub passthrough: bool,
    /// The longest WRITE, if it is to be less than what can be had.
    pub max_write: Option<u32>,
    /// Let in nobody but root and the user who mounted.
    pub root_and_owner: bool,
}

/// Threads that answer requests unless `threads=` says otherwise: a second one keeps the mount
/// answering while the first waits for the disk, more cost more than they give.
pub const DEFAULT_THREADS: usize = 2;

/// The most that `threads=` takes.
pub const MAX_THREADS: usize = 64;

impl Default for SessionOptions {
    fn default() -> Self {
        Self {
            threads: DEFAULT_THREADS,
            allowed: FeatureSet::ALL,
            no_open: false,
            writeback: false,
            passthrough: false,
            max_write: None,
            root_and_owner: false,
        }
    }
}

/// Who mounts.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Mounter {
    /// Root of the host, whose mounts are by default for everyone, with working device nodes and setuid bits.
    Root,
    /// Root of a user namespace: the same, but the host lets it set no `trusted.` attributes.
    NamespaceRoot,
    /// Anyone else, who mounts by `fusermount3` and for himself.
    User,
}

impl Mounter {
    /// The user of this process.
    pub fn current() -> Self {
        if !nix::unistd::geteuid().is_root() {
            Self::User
        } else if process::in_initial_user_namespace() {
            Self::Root
        } else {
            Self::NamespaceRoot
        }
    }
}

/// What is wrong with the options.
#[derive(Debug, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum OptionError {
    /// Nothing of that name.
    #[error("unknown option `{0}`; `plyfs --help` lists those that there are")]
    Unknown(String),
    /// Two that exclude each other.
    #[error("`passthrough` and `{0}` exclude each other in the kernel; leave one of them out")]
    NotWithPassthrough(&'static str),
    /// A value is missing.
    #[error("option `{0}` needs a value, as in `{0}=VALUE`")]
    NeedsValue(&'static str),
    /// A value is not one of those possible.
    #[error("option `{name}={value}`: {expected}")]
    BadValue {
        /// The option.
        name: &'static str,
        /// What was given.
        value: String,
        /// What would be right.
        expected: Cow<'static, str>,
    },
    /// Known to fuse-overlayfs, and not to be had here.
    #[error("option `{name}` cannot be used with plyfs: {why}")]
    Refused {
        /// The option.
        name: &'static str,
        /// Why, and what to do.
        why: &'static str,
    },
    /// No layer at all.
    #[error("no directory to show: give `lowerdir=A:B:C` or `lowerdir_file=PATH`")]
    NoLower,
    /// `lowerdir=A::B`.
    #[error(
        "an empty name among the directories of `lowerdir`; write a colon that belongs to a name as `\\:`"
    )]
    EmptyLower,
    /// An upper without a work directory.
    #[error("`upperdir` needs `workdir`, an empty directory on the same file system")]
    UpperWithoutWork,
    /// A work directory without an upper.
    #[error("`workdir` is of use only with `upperdir`")]
    WorkWithoutUpper,
}

/// Reads the arguments of every `-o`, in order; of an option given twice the last one counts.
/// The defaults depend on who mounts.
///
/// Some lists in the language of FUSE programs are separated by commas themselves: the features in
/// `kernel_features=-a,-b` and the ranges in `uidmapping=0:1:2,3:4:5`. A word that goes on with such a list is
/// told by its form.
pub fn parse<S: AsRef<OsStr>>(arguments: &[S], mounter: Mounter) -> Result<Options, OptionError> {
    let privileged = mounter != Mounter::User;
    let mut options = Options {
        lowers: Vec::new(),
        lowerdir_file: None,
        view: None,
        verify: Verify::default(),
        upper: None,
        work: None,
        mount: MountOptions {
            allow_other: privileged,
            nosuid: !privileged,
            nodev: !privileged,
            ..MountOptions::default()
        },
        squash_to_root: false,
        owners: Owners::default(),
        stat_override: None,
        static_nlink: false,
        no_xattrs: false,
        debug: false,
        volatile: false,
        no_acl: false,
        metacopy: None,
        chunking: Chunking::default(),
        complete: Some(copying::DEFAULT_COMPLETE),
        user_xattr: mounter != Mounter::Root,
        session: SessionOptions::default(),
    };
    for argument in arguments {
        let mut list = None;
        for word in split(argument.as_ref().as_bytes(), b',') {
            if let Some(list) = list
                && table::continues(list, word)
            {
                table::go_on(&mut options, list, OsStr::from_bytes(word))?;
                continue;
            }
            list = table::list(word);
            apply(&mut options, word)?;
        }
    }
    if options.squash_to_root {
        let owners = &mut options.owners;
        for view in [&mut owners.users, &mut owners.groups] {
            view.squash = view.squash.or(Some(0));
        }
    }
    let session = &options.session;
    if session.passthrough {
        for (other, name) in [
            (session.no_open, "no_open"),
            (session.writeback, "writeback"),
        ] {
            if other {
                return Err(OptionError::NotWithPassthrough(name));
            }
        }
    }
    if options.upper.is_none() {
        if options.work.is_some() {
            return Err(OptionError::WorkWithoutUpper);
        }
        options.mount.read_only = true;
    } else if options.work.is_none() {
        // A read-only mount writes nothing, so it needs no scratch directory: the upper is one more lower.
        if !options.mount.read_only {
            return Err(OptionError::UpperWithoutWork);
        }
    }
    // A snapshot without a parent is an upper alone.
    let lowers =
        !options.lowers.is_empty() || options.lowerdir_file.is_some() || options.view.is_some();
    if !lowers && options.upper.is_none() {
        return Err(OptionError::NoLower);
    }
    Ok(options)
}

fn apply(options: &mut Options, word: &[u8]) -> Result<(), OptionError> {
    if word.is_empty() || word.starts_with(b"x-") {
        return Ok(());
    }
    let shown = || String::from_utf8_lossy(word).into_owned();
    let (name, value) = match word.iter().position(|&byte| byte == b'=') {
        Some(at) => (&word[..=at], Some(OsStr::from_bytes(&word[at + 1..]))),
        None => (word, None),
    };
    let known = TABLE.iter().find(|(known, _)| known.as_bytes() == name);
    match (known, value) {
        (Some((_, Action::Ignore)), _) => Ok(()),
        (Some((_, Action::Refuse(name, why))), _) => Err(OptionError::Refused { name, why }),
        (Some((_, Action::Flag(set))), _) => {
            set(options);
            Ok(())
        }
        (Some((_, Action::Value(set))), Some(value)) => set(options, value),
        _ => {
            let valued = TABLE.iter().find(|(known, _)| {
                value.is_none() && known.strip_suffix('=').map(str::as_bytes) == Some(name)
            });
            match valued {
                Some((known, _)) => Err(OptionError::NeedsValue(known.trim_end_matches('='))),
                None => Err(OptionError::Unknown(shown())),
            }
        }
    }
}

/// Splits at every `separator` without a backslash before it and outside of quotes, which begin a value
/// (`context="a,b"`); backslashes and quotes stay in the pieces.
fn split(text: &[u8], separator: u8) -> Vec<&[u8]> {
    let mut pieces = Vec::new();
    let mut start = 0;
    let mut at = 0;
    let mut quoted = false;
    while at < text.len() {
        match text[at] {
            b'\\' => at += 1,
            b'"' if quoted => quoted = false,
            b'"' if table::may_be_quoted(&text[start..at]) => quoted = true,
            byte if byte == separator && !quoted => {
                pieces.push(&text[start..at]);
                start = at + 1;
            }
            _ => {}
        }
        at += 1;
    }
    pieces.push(&text[start..]);
    pieces
}

/// Takes the backslashes away that protect a comma, a colon or a backslash; any other stays.
fn unescape(text: &[u8]) -> OsString {
    let mut out = Vec::with_capacity(text.len());
    let mut bytes = text.iter().copied().peekable();
    while let Some(byte) = bytes.next() {
        match (byte, bytes.peek()) {
            (b'\\', Some(&next @ (b',' | b':' | b'\\'))) => {
                out.push(next);
                bytes.next();
            }
            _ => out.push(byte),
        }
    }
    OsString::from_vec(out)
}

/// The directories of a `lowerdir_file`: one a line, the topmost first, empty lines ignored; nothing
/// is escaped, so a name cannot contain a line feed.
pub fn parse_lowerdir_file(content: &[u8]) -> Vec<PathBuf> {
    content
        .split(|byte| *byte == b'\n')
        .filter(|line| !line.is_empty())
        .map(|line| PathBuf::from(OsStr::from_bytes(line)))
        .collect()
}

impl Options {
    /// The kernel leaves access times to the server, so its own flag of that name does nothing.
    fn quiet(&self) -> Quiet {
        match (self.mount.noatime, self.mount.nodiratime) {
            (true, _) => Quiet::All,
            (false, true) => Quiet::Directories,
            (false, false) => Quiet::Nothing,
        }
    }

    /// The union that the options describe, without its view, which is to be opened. `more_lowers` are the lines of
    /// `lowerdir_file`.
    pub fn union_config(&self, more_lowers: Vec<PathBuf>) -> UnionConfig {
        let mut lowers = self.lowers.clone();
        lowers.extend(more_lowers);
        let upper = match (&self.upper, &self.work) {
            (Some(dir), Some(work)) if !self.mount.read_only => Some(UpperConfig {
                dir: dir.clone(),
                work: work.clone(),
            }),
            (Some(dir), _) => {
                lowers.insert(0, dir.clone());
                None
            }
            (None, _) => None,
        };
        UnionConfig {
            lowers,
            lower_work: None,
            view: None,
            upper,
            xattr_family: if self.user_xattr {
                XattrFamily::User
            } else {
                XattrFamily::Trusted
            },
            owners: self.owners.clone(),
            stat_override: self.stat_override,
            static_nlink: self.static_nlink,
            no_xattrs: self.no_xattrs,
            volatile: self.volatile,
            no_acl: self.no_acl,
            quiet: self.quiet(),
            chunking: self.chunking,
            no_metacopy: !self.metacopy.unwrap_or(!self.user_xattr),
        }
    }
}

#[cfg(test)]
mod tests;
