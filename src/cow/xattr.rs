//! Extended attributes. The union's own marks are neither shown nor reachable: what a user gives one of
//! their names is stored escaped.

use std::ffi::{OsStr, OsString};
use std::sync::atomic::Ordering;

use nix::errno::Errno;

use super::acl;
use super::copyup::Content;
use super::error::Result;
use super::types::{NodeId, SetXattrMode};
use super::union::Union;
use super::whiteout::is_fuse_overlayfs;
use crate::sys::fs::Object;
use crate::sys::xattr;

fn is_acl(name: &OsStr) -> bool {
    name == acl::ACCESS || name == acl::DEFAULT
}

impl Union {
    /// From now on POSIX ACLs are refused and not inherited: for a kernel that would not enforce them.
    pub fn refuse_acls(&self) {
        self.no_acl.store(true, Ordering::Relaxed);
    }

    /// Whether POSIX ACLs are kept. Where the mode lies in an attribute they could not be kept in step with it.
    pub fn keeps_acls(&self) -> bool {
        !self.no_acl.load(Ordering::Relaxed) && !self.no_xattrs && self.stat_override.is_none()
    }

    /// Refuses what this mount does not keep.
    fn check_name(&self, name: &OsStr) -> Result<()> {
        if self.no_xattrs || (is_acl(name) && !self.keeps_acls()) {
            Err(Errno::EOPNOTSUPP.into())
        } else {
            Ok(())
        }
    }

    /// Whether an attribute holds owner and mode, which are not to be seen or set as such.
    fn holds_owner(&self, name: &OsStr) -> bool {
        self.stat_override.is_some_and(|form| form.name() == name)
    }

    /// The value; ENODATA if there is none.
    pub fn getxattr(&self, node: NodeId, name: &OsStr) -> Result<Vec<u8>> {
        self.check_name(name)?;
        if self.holds_owner(name) {
            return Err(Errno::ENODATA.into());
        }
        let node = self.node(node)?;
        let stored = self.family.stored_name(name);
        match node.seen_lower() {
            Some(lower) => lower.object.xattr(&stored),
            None => self.with_upper(&node, |object| xattr::get(object, &stored)),
        }
    }

    /// All names.
    pub fn listxattr(&self, node: NodeId) -> Result<Vec<OsString>> {
        if self.no_xattrs {
            return Err(Errno::EOPNOTSUPP.into());
        }
        let node = self.node(node)?;
        let stored = match node.seen_lower() {
            Some(lower) => lower.object.xattr_names()?,
            None => self.with_upper(&node, xattr::list)?,
        };
        Ok(stored
            .into_iter()
            .filter_map(|stored| self.family.shown_name(stored))
            .filter(|name| self.check_name(name).is_ok() && !self.holds_owner(name))
            .collect())
    }

    /// Sets a value.
    pub fn setxattr(
        &self,
        node: NodeId,
        name: &OsStr,
        value: &[u8],
        mode: SetXattrMode,
    ) -> Result<()> {
        self.check_name(name)?;
        // What is found of fuse-overlayfs's in an upper has to be its own.
        if self.holds_owner(name) || is_fuse_overlayfs(name) {
            return Err(Errno::EPERM.into());
        }
        self.upper()?;
        let node = self.node(node)?;
        let stored = self.family.stored_name(name);
        let flags = match mode {
            SetXattrMode::Any => 0,
            SetXattrMode::Create => libc::XATTR_CREATE,
            SetXattrMode::Replace => libc::XATTR_REPLACE,
            SetXattrMode::CreateAndReplace => libc::XATTR_CREATE | libc::XATTR_REPLACE,
        };
        let set = |object: Object<'_>| Ok(xattr::set(object, &stored, value, flags)?);
        if !self.copy_up_changed(&node, Content::Metadata, Some(&set))? {
            self.change(&node, set)?;
        }
        self.default_acl_changed(&node, name);
        Ok(())
    }

    /// Removes a value; ENODATA if there is none. An ACL that is not there is removed already, as on the host.
    pub fn removexattr(&self, node: NodeId, name: &OsStr) -> Result<()> {
        self.upper()?;
        // Asked first, so that a failure copies nothing up.
        match self.getxattr(node, name) {
            Err(error) if error.is(Errno::ENODATA) && is_acl(name) => return Ok(()),
            result => result?,
        };
        let node = self.node(node)?;
        let stored = self.family.stored_name(name);
        let remove = |object: Object<'_>| Ok(xattr::remove(object, &stored)?);
        if !self.copy_up_changed(&node, Content::Metadata, Some(&remove))? {
            self.change(&node, remove)?;
        }
        self.default_acl_changed(&node, name);
        Ok(())
    }

    fn default_acl_changed(&self, node: &super::node::Node, name: &OsStr) {
        if name == acl::DEFAULT
            && let Some(directory) = &node.directory
        {
            directory.state.write().default_acl = super::node::Flag::default();
        }
    }

    /// Target of a symbolic link.
    pub fn readlink(&self, node: NodeId) -> Result<OsString> {
        let node = self.node(node)?;
        if node.kind != super::types::FileKind::Symlink {
            return Err(Errno::EINVAL.into());
        }
        match node.seen_lower() {
            Some(lower) => lower.object.readlink(),
            None => self.with_upper(&node, |object| object.readlink()),
        }
    }
}
