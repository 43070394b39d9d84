//! Users and groups of a container, looked up in its own `/etc/passwd` and `/etc/group`.
//!
//! The rules are Docker's. The host's users and its name services play no part, and neither does libc:
//! the files are read by a parser of their own, inside the root only, up to a limit.

use std::path::Path;

use serde::{Deserialize, Serialize};

use crate::sys::inroot;

/// More than this of a passwd or group file is refused.
const LIMIT: u64 = 8 << 20;
/// The largest id that the kernel's tools agree on.
const LARGEST_ID: u32 = i32::MAX as u32;

/// Who a process runs as.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Identity {
    /// User id.
    pub uid: u32,
    /// Group id.
    pub gid: u32,
    /// Supplementary groups, in order.
    pub groups: Vec<u32>,
    /// Home directory, `/` when nothing says otherwise.
    pub home: String,
}

/// Why a user could not be looked up.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// A file of the root is there and cannot be used.
    #[error("cannot look up the user {:?}: {source}{}", or_root(.user), user_advice(.source))]
    File {
        /// What was asked for.
        user: String,
        /// What is wrong.
        source: inroot::Error,
    },
    /// There is no such user.
    #[error("there is no user {user:?} in the image's /etc/passwd; a number needs no entry")]
    NoUser {
        /// Its name.
        user: String,
    },
    /// There is no such group.
    #[error("there is no group {group:?} in the image's /etc/group; a number needs no entry")]
    NoGroup {
        /// Its name.
        group: String,
    },
    /// A number that cannot be an id.
    #[error("{id:?} is not an id: ids are 0 to {LARGEST_ID}")]
    OutOfRange {
        /// The number.
        id: String,
    },
}

/// Who runs where nobody is named.
fn or_root(user: &str) -> &str {
    match user {
        "" => "root",
        user => user,
    }
}

/// What to do where a root answers EIO, to go behind the error.
pub(in crate::runtime) const IF_DAMAGED: &str = "; `snapctl system verify` names what of the image is damaged, and `snapctl system repair` mends it, or says what to do";

/// What goes behind the error.
pub(super) fn advice(error: &inroot::Error) -> &'static str {
    match is_damage(error) {
        true => IF_DAMAGED,
        false => "",
    }
}

fn is_damage(error: &inroot::Error) -> bool {
    matches!(error, inroot::Error::Io { source, .. } if source.raw_os_error() == Some(libc::EIO))
}

fn user_advice(error: &inroot::Error) -> String {
    match is_damage(error) {
        true => format!("; `-u UID:GID` needs no look-up{IF_DAMAGED}"),
        false => String::new(),
    }
}

struct User<'a> {
    name: &'a str,
    uid: u32,
    gid: u32,
    home: &'a str,
}

struct Group<'a> {
    name: &'a str,
    gid: u32,
    members: &'a str,
}

/// What was found.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Found {
    /// Who runs.
    pub identity: Identity,
    /// Files of the root that cannot be read, and that tell nothing which is needed.
    pub damaged: Vec<String>,
}

/// Looks `wanted` (`user`, `uid`, `user:group` or any mix; empty for root) up in the files below
/// `root`. A file that does not exist has no entries; one that is not a regular file, or is a link that
/// leads out of the root, is an error. So is one that is damaged, unless numbers say all that it would have to; the home directory
/// is not known then.
pub fn look_up(root: &Path, wanted: &str) -> Result<Found, Error> {
    let mut damaged = Vec::new();
    let mut read =
        |path: &str, needed: bool| match inroot::read_limited(root, Path::new(path), LIMIT) {
            Ok(bytes) => Ok(String::from_utf8_lossy(&bytes).into_owned()),
            Err(error) if error.is_not_found() => Ok(String::new()),
            Err(error) if !needed && is_damage(&error) => {
                damaged.push(path.to_owned());
                Ok(String::new())
            }
            Err(source) => Err(Error::File {
                user: wanted.to_owned(),
                source,
            }),
        };
    let (user, group) = parts(wanted);
    // Of a user whose group is not given it names that.
    let passwd = read("/etc/passwd", !is_number(user) || group.is_none())?;
    let group = read("/etc/group", !group.is_some_and(is_number))?;
    let identity = identify(wanted, &passwd, &group)?;
    Ok(Found { identity, damaged })
}

/// The user, and the group if one is named.
fn parts(wanted: &str) -> (&str, Option<&str>) {
    let (user, group) = match wanted.split_once(':') {
        Some((user, group)) => (user, Some(group).filter(|group| !group.is_empty())),
        None => (wanted, None),
    };
    (if user.is_empty() { "0" } else { user }, group)
}

fn identify(wanted: &str, passwd: &str, group: &str) -> Result<Identity, Error> {
    let (user_part, group_part) = parts(wanted);
    let users = || passwd.lines().filter_map(parse_user);
    let groups = || group.lines().filter_map(parse_group);
    let entry = match users().find(|user| user.name == user_part) {
        Some(user) => Some(user),
        None if is_number(user_part) => {
            let uid = parse_id(user_part)?;
            users().find(|user| user.uid == uid)
        }
        None => {
            let user = user_part.to_owned();
            return Err(Error::NoUser { user });
        }
    };
    let mut identity = Identity {
        uid: match &entry {
            Some(user) => user.uid,
            None => parse_id(user_part)?,
        },
        gid: entry.as_ref().map_or(0, |user| user.gid),
        groups: Vec::new(),
        home: entry
            .as_ref()
            .map(|user| user.home)
            .filter(|home| !home.is_empty())
            .unwrap_or("/")
            .to_owned(),
    };
    match (group_part, &entry) {
        // A group that is named replaces all others.
        (Some(wanted), _) => {
            identity.gid = match groups().find(|group| group.name == wanted) {
                Some(group) => group.gid,
                None if is_number(wanted) => parse_id(wanted)?,
                None => {
                    let group = wanted.to_owned();
                    return Err(Error::NoGroup { group });
                }
            };
        }
        (None, Some(user)) => {
            let member = |group: &Group<'_>| group.members.split(',').any(|one| one == user.name);
            identity.groups = groups().filter(member).map(|group| group.gid).collect();
            identity.groups.sort_unstable();
            identity.groups.dedup();
        }
        (None, None) => {}
    }
    Ok(identity)
}

fn is_number(text: &str) -> bool {
    !text.is_empty() && text.bytes().all(|byte| byte.is_ascii_digit())
}

fn parse_id(text: &str) -> Result<u32, Error> {
    text.parse()
        .ok()
        .filter(|&id| id <= LARGEST_ID)
        .ok_or_else(|| Error::OutOfRange {
            id: text.to_owned(),
        })
}

fn parse_user(line: &str) -> Option<User<'_>> {
    let mut fields = line.trim_end().split(':');
    let name = fields.next().filter(|name| !name.is_empty())?;
    let uid = parse_id(fields.nth(1)?).ok()?;
    let gid = parse_id(fields.next()?).ok()?;
    let home = fields.nth(1).unwrap_or_default();
    Some(User {
        name,
        uid,
        gid,
        home,
    })
}

fn parse_group(line: &str) -> Option<Group<'_>> {
    let mut fields = line.trim_end().split(':');
    let name = fields.next().filter(|name| !name.is_empty())?;
    let gid = parse_id(fields.nth(1)?).ok()?;
    let members = fields.next().unwrap_or_default();
    Some(Group { name, gid, members })
}

#[cfg(test)]
mod tests {
    use super::*;

    const PASSWD: &str = "root:x:0:0:root:/root:/bin/sh\n\
                          # a comment\n\
                          broken:x:many:0::/:/bin/sh\n\
                          ann:x:1000:100:Ann:/home/ann:/bin/sh\n\
                          42:x:7:8::/seven:\n";
    const GROUP: &str = "root:x:0:\nusers:x:100:\naudio:x:29:bob,ann\nwheel:x:10:ann\n";

    fn who(wanted: &str) -> Result<(u32, u32, Vec<u32>, String), String> {
        identify(wanted, PASSWD, GROUP)
            .map(|found| (found.uid, found.gid, found.groups, found.home))
            .map_err(|error| error.to_string())
    }

    #[test]
    fn docker_s_rules() {
        let ok =
            |uid, gid, groups: &[u32], home: &str| Ok((uid, gid, groups.to_vec(), home.into()));
        assert_eq!(who(""), ok(0, 0, &[], "/root"));
        assert_eq!(who("ann"), ok(1000, 100, &[10, 29], "/home/ann"));
        assert_eq!(who("1000"), ok(1000, 100, &[10, 29], "/home/ann"));
        assert_eq!(who("ann:audio"), ok(1000, 29, &[], "/home/ann"));
        assert_eq!(who("ann:5"), ok(1000, 5, &[], "/home/ann"));
        assert_eq!(who(":wheel"), ok(0, 10, &[], "/root"));
        assert_eq!(who("555"), ok(555, 0, &[], "/"));
        assert_eq!(who("555:666"), ok(555, 666, &[], "/"));
        // A name made of digits is a name first.
        assert_eq!(who("42"), ok(7, 8, &[], "/seven"));
    }

    #[test]
    fn what_is_not_there_is_named() {
        for (wanted, word) in [
            ("eve", "eve"),
            ("broken", "broken"),
            ("ann:nosuch", "nosuch"),
            ("4294967295", "4294967295"),
            ("-1", "-1"),
        ] {
            assert!(who(wanted).unwrap_err().contains(word), "{wanted}");
        }
    }

    #[test]
    fn a_missing_file_has_no_entries_and_a_fifo_is_an_error() {
        let root = tempfile::tempdir().unwrap();
        assert_eq!(look_up(root.path(), "").unwrap().identity.home, "/");
        std::fs::create_dir(root.path().join("etc")).unwrap();
        let fifo = root.path().join("etc/passwd");
        nix::unistd::mkfifo(&fifo, nix::sys::stat::Mode::S_IRWXU).unwrap();
        // The OCI runtime would open it all the same, and wait.
        for wanted in ["root", "0:0"] {
            let error = look_up(root.path(), wanted).unwrap_err();
            assert!(error.to_string().contains("not a regular file"), "{error}");
        }
    }
}
