//! The options of `plyfs -o`: a pure function from words to what they ask for.
//!
//! The language is that of mount(8) and of kernel overlayfs: options are separated by commas, a
//! backslash takes the meaning away from a comma, a colon or a backslash, directories of `lowerdir`
//! are separated by colons, the topmost first. What other implementations of the same mount
//! understand and what has no bearing here is accepted; what would change the meaning of the mount
//! and is not known is refused by name.

use std::ffi::{OsStr, OsString};
use std::os::unix::ffi::{OsStrExt, OsStringExt};
use std::path::PathBuf;

use super::features::{Feature, FeatureSet};
use crate::cow::{UnionConfig, UpperConfig, XattrFamily, Xino};
use crate::sys::fuse_mount::MountOptions;

/// What the options ask for.
#[derive(Clone, Debug)]
pub struct Options {
    /// Lower directories by `lowerdir`, the topmost first.
    pub lowers: Vec<PathBuf>,
    /// A file with more of them, one a line, below those of `lowerdir`.
    pub lowerdir_file: Option<PathBuf>,
    /// `upperdir`.
    pub upper: Option<PathBuf>,
    /// `workdir`.
    pub work: Option<PathBuf>,
    /// How the mount appears to the host; `read_only` is also set when there is no upper.
    pub mount: MountOptions,
    /// `squash_to_root`.
    pub squash_to_root: bool,
    /// `volatile`.
    pub volatile: bool,
    /// `noacl`.
    pub no_acl: bool,
    /// Files are copied up with their data whatever changes.
    pub no_metacopy: bool,
    /// `userxattr`.
    pub user_xattr: bool,
    /// `xino`.
    pub xino: Xino,
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
        }
    }
}

/// What is wrong with the options.
#[derive(Debug, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum OptionError {
    /// Nothing of that name.
    #[error("unknown option `{0}`; docs/semantics.md lists what plyfs knows")]
    Unknown(String),
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
        expected: &'static str,
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

/// What an option does to the options read so far.
enum Action {
    Ignore,
    Flag(fn(&mut Options)),
    Value(fn(&mut Options, &OsStr) -> Result<(), OptionError>),
}

use Action::{Flag, Ignore, Value};

/// Every option that is known. A name that ends in `=` takes a value.
const TABLE: &[(&str, Action)] = &[
    ("lowerdir=", Value(set_lowers)),
    (
        "lowerdir_file=",
        Value(|o, v| path("lowerdir_file", v).map(|p| o.lowerdir_file = Some(p))),
    ),
    (
        "upperdir=",
        Value(|o, v| path("upperdir", v).map(|p| o.upper = Some(p))),
    ),
    (
        "workdir=",
        Value(|o, v| path("workdir", v).map(|p| o.work = Some(p))),
    ),
    ("ro", Flag(|o| o.mount.read_only = true)),
    ("rw", Flag(|o| o.mount.read_only = false)),
    ("suid", Flag(|o| o.mount.nosuid = false)),
    ("nosuid", Flag(|o| o.mount.nosuid = true)),
    ("dev", Flag(|o| o.mount.nodev = false)),
    ("nodev", Flag(|o| o.mount.nodev = true)),
    ("exec", Flag(|o| o.mount.noexec = false)),
    ("noexec", Flag(|o| o.mount.noexec = true)),
    ("atime", Flag(|o| o.mount.noatime = false)),
    ("noatime", Flag(|o| o.mount.noatime = true)),
    ("diratime", Flag(|o| o.mount.nodiratime = false)),
    ("nodiratime", Flag(|o| o.mount.nodiratime = true)),
    ("sync", Flag(|o| o.mount.synchronous = true)),
    ("async", Flag(|o| o.mount.synchronous = false)),
    ("dirsync", Flag(|o| o.mount.dirsync = true)),
    ("allow_other", Flag(|o| o.mount.allow_other = true)),
    ("squash_to_root", Flag(|o| o.squash_to_root = true)),
    ("volatile", Flag(|o| o.volatile = true)),
    ("noacl", Flag(|o| o.no_acl = true)),
    ("acl", Flag(|o| o.no_acl = false)),
    ("userxattr", Flag(|o| o.user_xattr = true)),
    ("xino=", Value(set_xino)),
    (
        "metacopy=",
        Value(|o, v| {
            one_of("metacopy", v, &["on", "off"])?;
            o.no_metacopy = v == "off";
            Ok(())
        }),
    ),
    (
        "fsname=",
        Value(|o, v| text("fsname", v).map(|t| o.mount.source = t)),
    ),
    (
        "subtype=",
        Value(|o, v| text("subtype", v).map(|t| o.mount.subtype = t)),
    ),
    ("context=", Value(|o, v| pass_on(o, "context", v))),
    ("fscontext=", Value(|o, v| pass_on(o, "fscontext", v))),
    ("defcontext=", Value(|o, v| pass_on(o, "defcontext", v))),
    ("rootcontext=", Value(|o, v| pass_on(o, "rootcontext", v))),
    ("max_read=", Value(|o, v| pass_on(o, "max_read", v))),
    ("threads=", Value(set_threads)),
    ("no_open", Flag(|o| o.session.no_open = true)),
    ("open", Flag(|o| o.session.no_open = false)),
    ("writeback", Flag(|o| o.session.writeback = true)),
    ("no_writeback", Flag(|o| o.session.writeback = false)),
    ("kernel_features=", Value(mask_features)),
    // What the union does in any case: overlayfs's switches for it are taken and mean nothing.
    (
        "redirect_dir=",
        Value(|_, v| one_of("redirect_dir", v, &["on", "off", "follow", "nofollow"])),
    ),
    ("index=", Value(|_, v| one_of("index", v, &["on", "off"]))),
    (
        "nfs_export=",
        Value(|_, v| one_of("nfs_export", v, &["off"])),
    ),
    (
        "uuid=",
        Value(|_, v| one_of("uuid", v, &["on", "off", "null", "auto"])),
    ),
    ("default_permissions", Ignore),
    // mount(8)'s own words, and what means nothing for a FUSE mount.
    ("defaults", Ignore),
    ("auto", Ignore),
    ("noauto", Ignore),
    ("nofail", Ignore),
    ("_netdev", Ignore),
    ("user", Ignore),
    ("nouser", Ignore),
    ("users", Ignore),
    ("owner", Ignore),
    ("group", Ignore),
    ("relatime", Ignore),
    ("norelatime", Ignore),
    ("strictatime", Ignore),
    ("nostrictatime", Ignore),
    ("lazytime", Ignore),
    ("nolazytime", Ignore),
    ("silent", Ignore),
    ("loud", Ignore),
    ("mand", Ignore),
    ("nomand", Ignore),
    ("iversion", Ignore),
    ("noiversion", Ignore),
    ("comment=", Value(|_, _| Ok(()))),
];

/// Reads the arguments of every `-o`, in order; of an option given twice the last one counts.
/// `privileged`: run by root, whose mounts are by default for everyone, with working device nodes
/// and setuid bits.
pub fn parse<S: AsRef<OsStr>>(arguments: &[S], privileged: bool) -> Result<Options, OptionError> {
    let mut options = Options {
        lowers: Vec::new(),
        lowerdir_file: None,
        upper: None,
        work: None,
        mount: MountOptions {
            allow_other: privileged,
            nosuid: !privileged,
            nodev: !privileged,
            ..MountOptions::default()
        },
        squash_to_root: false,
        volatile: false,
        no_acl: false,
        no_metacopy: false,
        user_xattr: !privileged,
        xino: Xino::default(),
        session: SessionOptions::default(),
    };
    for argument in arguments {
        let mut in_features = false;
        for word in split(argument.as_ref().as_bytes(), b',') {
            // The features in `kernel_features=-a,-b` are separated by commas themselves.
            if in_features && matches!(word.first(), Some(b'-' | b'+')) {
                mask_features(&mut options, OsStr::from_bytes(word))?;
                continue;
            }
            in_features = word.starts_with(b"kernel_features=");
            apply(&mut options, word)?;
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
    let lowers = !options.lowers.is_empty() || options.lowerdir_file.is_some();
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
        (Some((_, Ignore)), _) => Ok(()),
        (Some((_, Flag(set))), _) => {
            set(options);
            Ok(())
        }
        (Some((_, Value(set))), Some(value)) => set(options, value),
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

/// Splits at every `separator` without a backslash before it; the backslashes stay in the pieces.
fn split(text: &[u8], separator: u8) -> Vec<&[u8]> {
    let mut pieces = Vec::new();
    let mut start = 0;
    let mut at = 0;
    while at < text.len() {
        match text[at] {
            b'\\' => at += 1,
            byte if byte == separator => {
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

fn text(name: &'static str, value: &OsStr) -> Result<OsString, OptionError> {
    if value.is_empty() {
        return Err(OptionError::NeedsValue(name));
    }
    Ok(unescape(value.as_bytes()))
}

fn path(name: &'static str, value: &OsStr) -> Result<PathBuf, OptionError> {
    text(name, value).map(PathBuf::from)
}

fn set_lowers(options: &mut Options, value: &OsStr) -> Result<(), OptionError> {
    options.lowers = split(value.as_bytes(), b':')
        .into_iter()
        .map(|piece| {
            if piece.is_empty() {
                return Err(OptionError::EmptyLower);
            }
            Ok(PathBuf::from(unescape(piece)))
        })
        .collect::<Result<_, _>>()?;
    Ok(())
}

fn set_xino(options: &mut Options, value: &OsStr) -> Result<(), OptionError> {
    options.xino = match value.as_bytes() {
        b"on" => Xino::On,
        b"auto" => Xino::Auto,
        b"off" => Xino::Off,
        _ => return Err(bad_value("xino", value, "say `on`, `off` or `auto`")),
    };
    Ok(())
}

fn set_threads(options: &mut Options, value: &OsStr) -> Result<(), OptionError> {
    options.session.threads = value
        .to_str()
        .and_then(|text| text.parse().ok())
        .filter(|threads| (1..=MAX_THREADS).contains(threads))
        .ok_or_else(|| bad_value("threads", value, "say a number from 1 to 64"))?;
    Ok(())
}

/// `-name` masks a feature, `+name` allows it again; `all` is every one whose absence no program sees;
/// `7.N` leaves what that protocol has.
fn mask_features(options: &mut Options, value: &OsStr) -> Result<(), OptionError> {
    let bad = || {
        bad_value(
            "kernel_features",
            value,
            "say `-NAME` or `+NAME` with a name that `plyfs --probe` prints, `-all`, or a protocol such as `7.22`",
        )
    };
    for word in value.as_bytes().split(|byte| *byte == b':') {
        let word = std::str::from_utf8(word).map_err(|_| bad())?;
        let allowed = &mut options.session.allowed;
        if let Some(name) = word.strip_prefix('-') {
            match name {
                "all" => *allowed = allowed.without(FeatureSet::unseen()),
                name => allowed.remove(Feature::by_name(name).ok_or_else(bad)?),
            }
        } else if let Some(name) = word.strip_prefix('+') {
            match name {
                "all" => *allowed = FeatureSet::ALL,
                name => allowed.insert(Feature::by_name(name).ok_or_else(bad)?),
            }
        } else {
            let minor = word.strip_prefix("7.").and_then(|minor| minor.parse().ok());
            *allowed = allowed.without(FeatureSet::newer_than(minor.ok_or_else(bad)?));
        }
    }
    Ok(())
}

fn pass_on(options: &mut Options, name: &str, value: &OsStr) -> Result<(), OptionError> {
    let mut word = OsString::from(name);
    word.push("=");
    word.push(value);
    options.mount.extra.push(word);
    Ok(())
}

fn one_of(name: &'static str, value: &OsStr, known: &[&str]) -> Result<(), OptionError> {
    if known.iter().any(|known| *known == value) {
        return Ok(());
    }
    Err(bad_value(name, value, "plyfs has no such setting"))
}

fn bad_value(name: &'static str, value: &OsStr, expected: &'static str) -> OptionError {
    OptionError::BadValue {
        name,
        value: value.to_string_lossy().into_owned(),
        expected,
    }
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
    /// The union that the options describe. `more_lowers` are the lines of `lowerdir_file`.
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
            upper,
            xattr_family: if self.user_xattr {
                XattrFamily::User
            } else {
                XattrFamily::Trusted
            },
            squash: self.squash_to_root.then_some((0, 0)),
            volatile: self.volatile,
            no_acl: self.no_acl,
            xino: self.xino,
            no_metacopy: self.no_metacopy,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn root(options: &str) -> Result<Options, OptionError> {
        parse(&[options], true)
    }

    fn lowers(options: &str) -> Vec<PathBuf> {
        root(options).unwrap().lowers
    }

    #[test]
    fn directories_and_escapes() {
        assert_eq!(lowers("lowerdir=/a:/b"), [PathBuf::from("/a"), "/b".into()]);
        assert_eq!(
            lowers(r"lowerdir=/a\:b:/c\,d:/e\\f:/g\h"),
            [
                PathBuf::from("/a:b"),
                "/c,d".into(),
                r"/e\f".into(),
                r"/g\h".into()
            ]
        );
        let options = root(r"lowerdir=/l,upperdir=/u\:\,1,workdir=/w").unwrap();
        assert_eq!(options.upper, Some("/u:,1".into()));
        assert_eq!(options.work, Some("/w".into()));
        assert!(!options.mount.read_only);
    }

    #[test]
    fn a_name_need_not_be_utf8() {
        let options = parse(&[OsStr::from_bytes(b"lowerdir=/\xff")], true).unwrap();
        assert_eq!(options.lowers[0].as_os_str().as_bytes(), b"/\xff");
    }

    #[test]
    fn the_last_word_counts_and_empty_ones_do_not() {
        let options = parse(
            &["", "lowerdir=/a,,ro,xino=off,", "lowerdir=/b,xino=on"],
            true,
        );
        let options = options.unwrap();
        assert_eq!(options.lowers, [PathBuf::from("/b")]);
        assert_eq!(options.xino, Xino::On);
        assert!(options.mount.read_only);
    }

    #[test]
    fn defaults_depend_on_who_mounts() {
        let mine = parse(&["lowerdir=/a"], true).unwrap().mount;
        assert!(mine.allow_other && !mine.nosuid && !mine.nodev);
        let theirs = parse(&["lowerdir=/a"], false).unwrap();
        assert!(!theirs.mount.allow_other && theirs.mount.nosuid && theirs.mount.nodev);
        assert_eq!(
            theirs.union_config(Vec::new()).xattr_family,
            XattrFamily::User
        );
    }

    #[test]
    fn without_an_upper_a_mount_is_read_only() {
        assert!(root("lowerdir=/a,rw").unwrap().mount.read_only);
        let options = root("lowerdir=/a,upperdir=/u,ro").unwrap();
        let config = options.union_config(Vec::new());
        assert!(config.upper.is_none());
        assert_eq!(config.lowers, [PathBuf::from("/u"), "/a".into()]);
    }

    #[test]
    fn features_are_masked_one_by_one_or_all() {
        let allowed = |text: &str| root(text).unwrap().session.allowed;
        let some = allowed("lowerdir=/a,kernel_features=-writeback,-readdirplus,ro");
        assert!(!some.contains(Feature::Writeback));
        assert!(!some.contains(Feature::Readdirplus));
        assert!(some.contains(Feature::PosixAcl));
        let one = allowed("kernel_features=-all:+posix_acl,lowerdir=/a");
        assert!(one.contains(Feature::PosixAcl) && !one.contains(Feature::Writeback));
        assert!(one.contains(Feature::Rename2) && !one.contains(Feature::CacheDir));
        let old = allowed("lowerdir=/a,kernel_features=7.22,-readdirplus");
        assert!(old.contains(Feature::AsyncDio) && !old.contains(Feature::Readdirplus));
        assert!(!old.contains(Feature::Rename2) && !old.contains(Feature::Lseek));
        assert!(matches!(
            root("lowerdir=/a,kernel_features=-nonsense"),
            Err(OptionError::BadValue { .. })
        ));
        assert!(matches!(
            root("lowerdir=/a,ro,-writeback"),
            Err(OptionError::Unknown(_))
        ));
    }

    #[test]
    fn each_mistake_has_its_own_error() {
        let cases = [
            (
                "lowerdir=/a,frobnicate",
                OptionError::Unknown("frobnicate".into()),
            ),
            ("lowerdir=/a,frob=1", OptionError::Unknown("frob=1".into())),
            ("lowerdir=/a,ro=1", OptionError::Unknown("ro=1".into())),
            ("lowerdir", OptionError::NeedsValue("lowerdir")),
            ("lowerdir=/a,upperdir=", OptionError::NeedsValue("upperdir")),
            ("lowerdir=/a::/b", OptionError::EmptyLower),
            ("ro", OptionError::NoLower),
            ("lowerdir=/a,upperdir=/u", OptionError::UpperWithoutWork),
            ("lowerdir=/a,workdir=/w", OptionError::WorkWithoutUpper),
        ];
        for (text, expected) in cases {
            assert_eq!(root(text).unwrap_err(), expected, "{text}");
        }
        for text in ["xino=maybe", "threads=0", "threads=65", "metacopy=yes"] {
            let error = root(&format!("lowerdir=/a,{text}")).unwrap_err();
            assert!(
                matches!(error, OptionError::BadValue { .. }),
                "{text}: {error}"
            );
        }
    }

    #[test]
    fn what_other_mount_programs_are_given_is_taken() {
        root("lowerdir=/a,x-systemd.automount,_netdev,relatime,metacopy=on,index=off,redirect_dir=on,default_permissions,context=\"a\"").unwrap();
    }

    #[test]
    fn a_file_of_lowers_has_one_a_line() {
        assert_eq!(
            parse_lowerdir_file(b"/a\n\n/b:c\n"),
            [PathBuf::from("/a"), "/b:c".into()]
        );
    }
}
