//! POSIX ACLs, as far as the union must do what the host does when an object is made in its place:
//! inheritance of the parent's default ACL by what is made in the work directory.
//!
//! Format: `include/uapi/linux/posix_acl_xattr.h`, little endian.

use std::ffi::OsStr;
use std::os::fd::BorrowedFd;

use nix::errno::Errno;

use super::error::{Context, Result};
use crate::sys::fs::Object;
use crate::sys::xattr;

/// What new entries of a directory inherit.
pub(super) const DEFAULT: &str = "system.posix_acl_default";
/// What access is checked against.
pub const ACCESS: &str = "system.posix_acl_access";

const VERSION: u32 = 2;
const HEADER: usize = 4;
const ENTRY: usize = 8;
const USER_OBJ: u16 = 0x01;
const GROUP_OBJ: u16 = 0x04;
const MASK: u16 = 0x10;
const OTHER: u16 = 0x20;

/// An access ACL made from a default ACL for an object created with `perm`, and the permission bits that
/// result (`posix_acl_create_masq` in fs/posix_acl.c).
fn masked(default: &[u8], perm: u32) -> Option<(Vec<u8>, u32)> {
    let mut acl = default.to_vec();
    let version = u32::from_le_bytes(acl.get(..HEADER)?.try_into().ok()?);
    if version != VERSION || !(acl.len() - HEADER).is_multiple_of(ENTRY) {
        return None;
    }
    let mut bits = perm & !0o777;
    let has_mask = acl[HEADER..]
        .chunks_exact(ENTRY)
        .any(|entry| u16::from_le_bytes([entry[0], entry[1]]) == MASK);
    for entry in acl[HEADER..].chunks_exact_mut(ENTRY) {
        let tag = u16::from_le_bytes([entry[0], entry[1]]);
        let shift = match tag {
            USER_OBJ => 6,
            GROUP_OBJ if !has_mask => 3,
            MASK => 3,
            OTHER => 0,
            _ => continue,
        };
        let allowed = u16::from_le_bytes([entry[2], entry[3]]) & 0o7;
        let kept = allowed & (perm >> shift) as u16 & 0o7;
        entry[2..4].copy_from_slice(&kept.to_le_bytes());
        bits |= u32::from(kept) << shift;
    }
    Some((acl, bits))
}

/// Gives a new object what the default ACL of `dir` says.
pub(super) fn inherit(
    dir: BorrowedFd<'_>,
    to: Object<'_>,
    is_directory: bool,
    perm: u32,
) -> Result<()> {
    let default = xattr::get(Object::Open(dir), OsStr::new(DEFAULT))?;
    let (access, bits) = masked(&default, perm)
        .ok_or(Errno::EIO)
        .context("the default ACL of a directory is not valid")?;
    to.chmod(bits & 0o7777)?;
    xattr::set(to, OsStr::new(ACCESS), &access, 0)?;
    if is_directory {
        xattr::set(to, OsStr::new(DEFAULT), &default, 0)?;
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn acl(entries: &[(u16, u16, u32)]) -> Vec<u8> {
        let mut out = VERSION.to_le_bytes().to_vec();
        for (tag, perm, id) in entries {
            out.extend_from_slice(&tag.to_le_bytes());
            out.extend_from_slice(&perm.to_le_bytes());
            out.extend_from_slice(&id.to_le_bytes());
        }
        out
    }

    #[test]
    fn the_mask_takes_the_place_of_the_group() {
        let none = u32::MAX;
        let default = acl(&[
            (USER_OBJ, 7, none),
            (2, 7, 1000),
            (GROUP_OBJ, 5, none),
            (MASK, 7, none),
            (OTHER, 5, none),
        ]);
        let (access, bits) = masked(&default, 0o640).unwrap();
        assert_eq!(bits, 0o640);
        let expected = acl(&[
            (USER_OBJ, 6, none),
            (2, 7, 1000),
            (GROUP_OBJ, 5, none),
            (MASK, 4, none),
            (OTHER, 0, none),
        ]);
        assert_eq!(access, expected);
        assert!(masked(b"x", 0o640).is_none());
    }
}
