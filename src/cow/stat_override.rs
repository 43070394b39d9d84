//! Owner and mode of an object in an attribute beside it, for hosts where the owner cannot be set:
//! NFS, a user namespace with one id, storage that is shared between users.
//!
//! Three forms are in use: fuse-overlayfs's two (`UID:GID:MODE`, the mode octal with the bits of the
//! type) and that of containers-storage (`UID:GID:0PERMISSIONS`, newer ones followed by `:TYPE`). A layer
//! whose top directory carries one of them is read so throughout; an object without the attribute is what
//! the host says of it.

use std::ffi::OsStr;

use nix::errno::Errno;

use super::copyup::type_bits;
use super::types::{Attr, FileKind};
use crate::sys::fs::Object;
use crate::sys::xattr;

/// What the host's own permission bits are where the attribute holds the real ones: this process has to reach
/// everything, whoever it belongs to.
pub(super) const HOST_PERM: u32 = 0o755;

/// Which attribute holds owner and mode.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum StatOverride {
    /// `security.fuseoverlayfs.override_stat`: as root, on objects of every kind.
    Privileged,
    /// `user.fuseoverlayfs.override_stat`: on regular files and directories.
    User,
    /// `user.containers.override_stat`: the same as containers-storage writes it.
    Containers,
}

impl StatOverride {
    const ALL: [Self; 3] = [Self::Privileged, Self::User, Self::Containers];

    /// The attribute's name.
    pub(super) fn name(self) -> &'static OsStr {
        OsStr::new(match self {
            Self::Privileged => "security.fuseoverlayfs.override_stat",
            Self::User => "user.fuseoverlayfs.override_stat",
            Self::Containers => "user.containers.override_stat",
        })
    }

    /// The word for it in the mark of an upper.
    pub(super) fn word(self) -> &'static [u8] {
        match self {
            Self::Privileged => b"security",
            Self::User => b"user",
            Self::Containers => b"containers",
        }
    }

    /// The form that a word names.
    pub(super) fn of_word(word: &[u8]) -> Option<Self> {
        Self::ALL.into_iter().find(|form| form.word() == word)
    }

    /// The form that the top directory of a layer is marked with.
    pub(super) fn of_layer(root: Object<'_>) -> Option<Self> {
        Self::ALL
            .into_iter()
            .find(|form| xattr::get(root, form.name()).is_ok())
    }

    /// Whether the host can keep the attribute on an object of that kind.
    fn holds(self, kind: FileKind) -> bool {
        self == Self::Privileged || matches!(kind, FileKind::Regular | FileKind::Directory)
    }

    /// Puts what the attribute says, if it is there, in place of what the host said.
    pub(super) fn read(self, object: Object<'_>, attr: &mut Attr) -> Result<(), Errno> {
        if !self.holds(attr.kind) {
            return Ok(());
        }
        let value = match xattr::get(object, self.name()) {
            Ok(value) => value,
            Err(Errno::ENODATA | Errno::EOPNOTSUPP) => return Ok(()),
            Err(errno) => return Err(errno),
        };
        let (uid, gid, perm) = parse(&value).ok_or(Errno::EIO)?;
        attr.uid = uid;
        attr.gid = gid;
        attr.perm = perm;
        Ok(())
    }

    /// Stores owner and mode of an object; one that cannot carry the attribute gets them on the host as far as
    /// the host lets us.
    pub(super) fn write(self, object: Object<'_>, attr: &Attr) -> Result<(), Errno> {
        if !self.holds(attr.kind) {
            return match object.chown(Some(attr.uid), Some(attr.gid)) {
                Err(Errno::EPERM | Errno::EINVAL) => Ok(()),
                result => result,
            };
        }
        xattr::set(object, self.name(), self.encode(attr).as_bytes(), 0)
    }

    fn encode(self, attr: &Attr) -> String {
        let Attr { uid, gid, perm, .. } = attr;
        match self {
            Self::Containers => format!("{uid}:{gid}:0{perm:o}"),
            Self::Privileged | Self::User => {
                format!("{uid}:{gid}:{:o}", type_bits(attr.kind) | u32::from(*perm))
            }
        }
    }
}

/// Owner, group and permission bits of either form; the type is the host's.
fn parse(value: &[u8]) -> Option<(u32, u32, u16)> {
    let text = std::str::from_utf8(value).ok()?;
    let mut words = text.trim_end_matches('\0').split(':');
    let uid = words.next()?.parse().ok()?;
    let gid = words.next()?.parse().ok()?;
    let mode = u32::from_str_radix(words.next()?, 8).ok()?;
    Some((uid, gid, (mode & 0o7777) as u16))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::cow::Timestamp;

    fn attr(kind: FileKind) -> Attr {
        Attr {
            ino: 1,
            size: 0,
            blocks: 0,
            atime: Timestamp::default(),
            mtime: Timestamp::default(),
            ctime: Timestamp::default(),
            kind,
            perm: 0o4750,
            nlink: 1,
            uid: 10,
            gid: 11,
            rdev: 0,
            blksize: 4096,
        }
    }

    #[test]
    fn the_forms_are_those_of_their_makers() {
        let written = |form: StatOverride, kind| form.encode(&attr(kind));
        assert_eq!(
            written(StatOverride::User, FileKind::Directory),
            "10:11:44750"
        );
        assert_eq!(
            written(StatOverride::Privileged, FileKind::Regular),
            "10:11:104750"
        );
        assert_eq!(
            written(StatOverride::Containers, FileKind::Regular),
            "10:11:04750"
        );
    }

    #[test]
    fn both_forms_are_read_and_nonsense_is_not() {
        for value in [
            "10:11:104750",
            "10:11:04750",
            "10:11:4750:file",
            "10:11:04750\0",
        ] {
            assert_eq!(parse(value.as_bytes()), Some((10, 11, 0o4750)), "{value}");
        }
        for value in ["", "10:11", "10:11:9", "-1:0:755", "a:b:c"] {
            assert_eq!(parse(value.as_bytes()), None, "{value}");
        }
    }

    #[test]
    fn a_word_names_its_form() {
        for form in StatOverride::ALL {
            assert_eq!(StatOverride::of_word(form.word()), Some(form));
        }
    }
}
