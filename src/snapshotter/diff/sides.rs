//! A tree as it is and as it was, looked at side by side.

use std::collections::BTreeSet;
use std::ffi::{OsStr, OsString};

use super::{lookup, names_in};
use crate::cow::{Entry, NodeId, Union};
use crate::snapshotter::types::*;

/// Two unions whose nodes go in pairs, of which one may be missing.
pub(in crate::snapshotter) struct Sides<'a> {
    pub(super) new: &'a Union,
    pub(super) old: Option<Union>,
}

impl<'a> Sides<'a> {
    pub(in crate::snapshotter) fn new(new: &'a Union, old: Option<Union>) -> Self {
        Self { new, old }
    }

    /// Both, or the one that there is.
    pub(super) fn all(&self) -> impl Iterator<Item = &Union> {
        std::iter::once(self.new).chain(&self.old)
    }

    /// The root on both sides.
    pub(in crate::snapshotter) fn roots(&self) -> (NodeId, Option<NodeId>) {
        (NodeId::ROOT, self.old.as_ref().map(|_| NodeId::ROOT))
    }

    /// The names in two directories.
    pub(in crate::snapshotter) fn names(
        &self,
        new: Option<NodeId>,
        old: Option<NodeId>,
    ) -> Result<BTreeSet<OsString>> {
        let mut names = BTreeSet::new();
        if let Some(new) = new {
            names = names_in(self.new, new)?;
        }
        if let Some((union, old)) = self.old.as_ref().zip(old) {
            names.extend(names_in(union, old)?);
        }
        Ok(names)
    }

    /// Looks a name up in two directories. What is found is to be given back.
    pub(in crate::snapshotter) fn lookup(
        &self,
        new: Option<NodeId>,
        old: Option<NodeId>,
        name: &OsStr,
    ) -> Result<(Option<Entry>, Option<Entry>)> {
        let new = new.map(|new| lookup(self.new, new, name)).transpose()?;
        let old = self.old.as_ref().zip(old);
        let old = old.map(|(union, old)| lookup(union, old, name));
        Ok((new.flatten(), old.transpose()?.flatten()))
    }

    /// Gives back a lookup of each. Nobody has looked up the root.
    pub(in crate::snapshotter) fn forget(&self, new: Option<NodeId>, old: Option<NodeId>) {
        let given = |node: &NodeId| *node != NodeId::ROOT;
        if let Some(new) = new.filter(given) {
            self.new.forget(new, 1);
        }
        if let Some((union, old)) = self.old.as_ref().zip(old.filter(given)) {
            union.forget(old, 1);
        }
    }
}
