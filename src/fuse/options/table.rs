//! Every word of the language, and what it does to the options.

use std::borrow::Cow;
use std::ffi::{OsStr, OsString};
use std::os::unix::ffi::OsStrExt;
use std::path::PathBuf;
use std::str::FromStr;

use super::copying;
use super::{DEFAULT_THREADS, MAX_THREADS, OptionError, Options, split, unescape};
use crate::cow::{IdRange, StatOverride};
use crate::fuse::features::{Feature, FeatureSet};
use crate::store::view::Verify;

/// What an option does to the options read so far.
pub(super) enum Action {
    Ignore,
    Flag(fn(&mut Options)),
    Value(fn(&mut Options, &OsStr) -> Result<(), OptionError>),
    /// Known, and not to be had: a name and the reason.
    Refuse(&'static str, &'static str),
}

use Action::{Flag, Ignore, Refuse, Value};

/// Every option that is known. A name that ends in `=` takes a value.
pub(super) const TABLE: &[(&str, Action)] = &[
    ("lowerdir=", Value(set_lowers)),
    (
        "lowerdir_file=",
        Value(|o, v| path("lowerdir_file", v).map(|p| o.lowerdir_file = Some(p))),
    ),
    (
        "view=",
        Value(|o, v| path("view", v).map(|p| o.view = Some(p))),
    ),
    ("verify=", Value(set_verify)),
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
    (
        "allow_other",
        Flag(|o| {
            o.mount.allow_other = true;
            o.session.root_and_owner = false;
        }),
    ),
    (
        "allow_root",
        Flag(|o| {
            o.mount.allow_other = true;
            o.session.root_and_owner = true;
        }),
    ),
    ("uidmapping=", Value(|o, v| mapping(o, List::Users, v))),
    ("gidmapping=", Value(|o, v| mapping(o, List::Groups, v))),
    ("squash_to_root", Flag(|o| o.squash_to_root = true)),
    (
        "squash_to_uid=",
        Value(|o, v| id("squash_to_uid", v).map(|id| o.owners.users.squash = Some(id))),
    ),
    (
        "squash_to_gid=",
        Value(|o, v| id("squash_to_gid", v).map(|id| o.owners.groups.squash = Some(id))),
    ),
    ("xattr_permissions=", Value(set_stat_override)),
    ("static_nlink", Flag(|o| o.static_nlink = true)),
    ("noxattrs", Flag(|o| o.no_xattrs = true)),
    (
        "noxattrs=",
        Value(|o, v| switch("noxattrs", v).map(|on| o.no_xattrs = on)),
    ),
    ("volatile", Flag(|o| o.volatile = true)),
    (
        "fsync=",
        Value(|o, v| switch("fsync", v).map(|on| o.volatile = !on)),
    ),
    ("debug", Flag(|o| o.debug = true)),
    (
        "plugins=",
        Refuse(
            "plugins",
            "it loads no shared objects for lower layers; mount the layer by itself and name its directory in `lowerdir`",
        ),
    ),
    (
        "remount",
        Refuse(
            "remount",
            "the options of a mount are fixed; unmount it and mount it again",
        ),
    ),
    ("noacl", Flag(|o| o.no_acl = true)),
    ("acl", Flag(|o| o.no_acl = false)),
    ("userxattr", Flag(|o| o.user_xattr = true)),
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
    (
        "threaded=",
        Value(|o, v| {
            switch("threaded", v).map(|on| o.session.threads = if on { DEFAULT_THREADS } else { 1 })
        }),
    ),
    ("max_write=", Value(set_max_write)),
    ("no_open", Flag(|o| o.session.no_open = true)),
    ("open", Flag(|o| o.session.no_open = false)),
    ("writeback", Flag(|o| o.session.writeback = true)),
    ("passthrough", Flag(|o| o.session.passthrough = true)),
    ("no_passthrough", Flag(|o| o.session.passthrough = false)),
    ("no_writeback", Flag(|o| o.session.writeback = false)),
    (
        "writeback=",
        Value(|o, v| switch("writeback", v).map(|on| o.session.writeback = on)),
    ),
    ("kernel_features=", Value(mask_features)),
    // What the union does in any case: overlayfs's switches for it are taken and mean nothing.
    (
        "redirect_dir=",
        Value(|_, v| one_of("redirect_dir", v, &["on", "off", "follow", "nofollow"])),
    ),
    ("chunk_size=", Value(copying::set_chunk_size)),
    ("copy_whole=", Value(copying::set_copy_whole)),
    ("complete=", Value(copying::set_complete)),
    (
        "metacopy=",
        Value(|o, v| {
            one_of("metacopy", v, &["on", "off"])?;
            o.metacopy = Some(v == "on");
            Ok(())
        }),
    ),
    ("index=", Value(|_, v| one_of("index", v, &["on", "off"]))),
    (
        "xino=",
        Value(|_, v| one_of("xino", v, &["on", "off", "auto"])),
    ),
    (
        "nfs_export=",
        Value(|_, v| one_of("nfs_export", v, &["off"])),
    ),
    (
        "uuid=",
        Value(|_, v| one_of("uuid", v, &["on", "off", "null", "auto"])),
    ),
    ("default_permissions", Ignore),
    // Words of fuse-overlayfs and libfuse for what plyfs does in any case, or in its own way.
    (
        "timeout=",
        Value(|_, v| number::<f64>("timeout", v, "say a number of seconds").map(drop)),
    ),
    ("fast_ino=", Value(|_, v| switch("fast_ino", v).map(drop))),
    (
        "max_threads=",
        Value(|_, v| number::<u32>("max_threads", v, "say a number").map(drop)),
    ),
    (
        "max_idle_threads=",
        Value(|_, v| number::<i64>("max_idle_threads", v, "say a number").map(drop)),
    ),
    ("clone_fd", Ignore),
    ("auto_unmount", Ignore),
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
    ("dirsync", Ignore),
    ("silent", Ignore),
    ("loud", Ignore),
    ("mand", Ignore),
    ("nomand", Ignore),
    ("iversion", Ignore),
    ("noiversion", Ignore),
    ("comment=", Value(|_, _| Ok(()))),
];

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

fn set_verify(options: &mut Options, value: &OsStr) -> Result<(), OptionError> {
    options.verify = match value.as_bytes() {
        b"never" => Verify::Never,
        b"first" => Verify::First,
        b"always" => Verify::Always,
        _ => {
            let expected = "say `never`, `first` or `always`";
            return Err(bad_value("verify", value, expected));
        }
    };
    Ok(())
}

fn set_threads(options: &mut Options, value: &OsStr) -> Result<(), OptionError> {
    const EXPECTED: &str = "say a number from 1 to 64";
    let threads = number("threads", value, EXPECTED)?;
    if !(1..=MAX_THREADS).contains(&threads) {
        return Err(bad_value("threads", value, EXPECTED));
    }
    options.session.threads = threads;
    Ok(())
}

fn set_max_write(options: &mut Options, value: &OsStr) -> Result<(), OptionError> {
    const PAGE: u32 = 4096;
    const EXPECTED: &str = "say a number of bytes, 4096 or more";
    let bytes = number("max_write", value, EXPECTED)?;
    if bytes < PAGE {
        return Err(bad_value("max_write", value, EXPECTED));
    }
    options.session.max_write = Some(bytes);
    Ok(())
}

fn set_stat_override(options: &mut Options, value: &OsStr) -> Result<(), OptionError> {
    options.stat_override = match value.as_bytes() {
        b"0" => None,
        b"1" => Some(StatOverride::Privileged),
        b"2" => Some(StatOverride::User),
        _ => {
            return Err(bad_value(
                "xattr_permissions",
                value,
                "say 0, 1 (as root, `security.` attributes) or 2 (`user.` attributes)",
            ));
        }
    };
    Ok(())
}

/// `HOST:SHOWN:LENGTH`, any number of times; of an option given twice the last one counts.
fn mapping(options: &mut Options, list: List, value: &OsStr) -> Result<(), OptionError> {
    list.ranges(options).clear();
    add_ranges(options, list, value)
}

fn add_ranges(options: &mut Options, list: List, value: &OsStr) -> Result<(), OptionError> {
    let name = match list {
        List::Groups => "gidmapping",
        _ => "uidmapping",
    };
    let bad = || {
        bad_value(
            name,
            value,
            "say HOST:SHOWN:LENGTH, three numbers for each range of ids, as in `0:100000:65536`",
        )
    };
    let text = value.to_str().ok_or_else(bad)?;
    let numbers: Vec<u32> = text
        .split(':')
        .map(|word| word.parse().map_err(|_| bad()))
        .collect::<Result<_, _>>()?;
    let (triples, rest) = numbers.as_chunks::<3>();
    if !rest.is_empty() {
        return Err(bad());
    }
    for &[host, shown, length] in triples {
        let range = IdRange {
            host,
            shown,
            length,
        };
        if !range.is_valid() {
            return Err(bad());
        }
        let ranges = list.ranges(options);
        if ranges.iter().any(|known| known.overlaps(&range)) {
            return Err(bad_value(
                name,
                value,
                "give every id of the host, and every id that is shown, in one range only",
            ));
        }
        ranges.push(range);
    }
    Ok(())
}

/// A value that is a list whose words are separated by commas.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum List {
    Features,
    Users,
    Groups,
}

impl List {
    fn ranges(self, options: &mut Options) -> &mut Vec<IdRange> {
        match self {
            Self::Groups => &mut options.owners.groups.ranges,
            _ => &mut options.owners.users.ranges,
        }
    }
}

/// The list that a word begins.
pub(super) fn list(word: &[u8]) -> Option<List> {
    let lists: [(&[u8], List); 3] = [
        (b"kernel_features=", List::Features),
        (b"uidmapping=", List::Users),
        (b"gidmapping=", List::Groups),
    ];
    lists
        .into_iter()
        .find_map(|(name, list)| word.starts_with(name).then_some(list))
}

/// Whether a value may follow in quotes, with commas in it: security contexts have them.
pub(super) fn may_be_quoted(name: &[u8]) -> bool {
    matches!(
        name,
        b"context=" | b"fscontext=" | b"defcontext=" | b"rootcontext="
    )
}

/// Whether a word goes on with a list.
pub(super) fn continues(list: List, word: &[u8]) -> bool {
    match list {
        List::Features => matches!(word.first(), Some(b'-' | b'+')),
        List::Users | List::Groups => word.first().is_some_and(u8::is_ascii_digit),
    }
}

/// Takes a word that goes on with a list.
pub(super) fn go_on(options: &mut Options, list: List, word: &OsStr) -> Result<(), OptionError> {
    match list {
        List::Features => mask_features(options, word),
        List::Users | List::Groups => add_ranges(options, list, word),
    }
}

fn number<T: FromStr>(
    name: &'static str,
    value: &OsStr,
    expected: &'static str,
) -> Result<T, OptionError> {
    value
        .to_str()
        .and_then(|text| text.parse().ok())
        .ok_or_else(|| bad_value(name, value, expected))
}

/// A user or group; the highest number means "no change" in system calls.
fn id(name: &'static str, value: &OsStr) -> Result<u32, OptionError> {
    const EXPECTED: &str = "say the number of a user or group";
    let id = number(name, value, EXPECTED)?;
    if id == u32::MAX {
        return Err(bad_value(name, value, EXPECTED));
    }
    Ok(id)
}

fn switch(name: &'static str, value: &OsStr) -> Result<bool, OptionError> {
    match value.as_bytes() {
        b"0" => Ok(false),
        b"1" => Ok(true),
        _ => Err(bad_value(name, value, "say 0 or 1")),
    }
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
    let known: Vec<String> = known.iter().map(|word| format!("`{word}`")).collect();
    let expected = format!("say {}", known.join(" or "));
    Err(bad_value(name, value, expected))
}

pub(super) fn bad_value(
    name: &'static str,
    value: &OsStr,
    expected: impl Into<Cow<'static, str>>,
) -> OptionError {
    OptionError::BadValue {
        name,
        value: value.to_string_lossy().into_owned(),
        expected: expected.into(),
    }
}
