//! Hard links of lower files.
//!
//! A lower file with several names is copied up once: the copy gets a second link in the work
//! directory's `index/`, named after the lower file, so that its other names, looked up later or after a
//! remount, lead to the same copy. `overlay.nlink` says how many links the union shows in terms of the
//! host's count. Both are kernel overlayfs's own forms (fs/overlayfs/namei.c, `ovl_get_index_name`, and
//! util.c, `ovl_set_nlink_upper`).

use std::collections::{BTreeSet, HashSet};
use std::ffi::{OsStr, OsString};
use std::os::fd::AsFd;
use std::sync::Arc;
use std::sync::atomic::Ordering;

use nix::errno::Errno;

use super::attr::attr_of;
use super::error::{Context, Result};
use super::lookup::Found;
use super::lower::{ListedKind, LowerObject, Ways};
use super::node::{LowerAt, Lowers, Node};
use super::origin::Origin;
use super::types::{FileKind, NodeId};
use super::union::Union;
use super::upper::{Draft, Upper};
use crate::sys::dirents;
use crate::sys::fs::{self, Object};

#[cfg(test)]
thread_local! {
    /// Names that this thread has looked at to settle links.
    pub(crate) static SETTLED: std::cell::Cell<u64> = const { std::cell::Cell::new(0) };
}

/// Whether the union shows no link any more to an index entry with this record and host count.
pub(super) fn is_dead(stored: Option<&[u8]>, links: u32) -> bool {
    let offset = stored.and_then(|stored| decode_links(stored, links, links));
    i64::from(links) + offset.unwrap_or(ONLY_INDEX) <= 0
}

/// The name in the index of an object that no file handle tells, of the number space with this index.
pub(super) fn numbered_index_name(space: u32, ino: u64) -> OsString {
    format!("{space:08x}{ino:016x}").into()
}

/// Without a record: every link counts but the one in the index.
const ONLY_INDEX: i64 = -1;

/// Reads `overlay.nlink`: `U` or `L`, then the difference to the upper's or the lower's count.
fn decode_links(stored: &[u8], upper: u32, lower: u32) -> Option<i64> {
    let text = std::str::from_utf8(stored).ok()?;
    let difference: i64 = text.get(1..)?.parse().ok()?;
    match text.as_bytes().first()? {
        b'U' => Some(difference),
        b'L' => Some(i64::from(lower) + difference - i64::from(upper)),
        _ => None,
    }
}

impl Union {
    /// Gives every visible name of a file in the index a link of its own in the upper, so that the upper
    /// says all by itself: for a caller who is about to use it without its work directory. No data is
    /// copied and no time changes; nothing is done when no file with several names was copied up.
    pub fn settle_links(&self) -> Result<()> {
        let wanted = self.indexed_nodes()?;
        if wanted.is_empty() {
            return Ok(());
        }
        let ways = self.ways_to(&wanted)?;
        let mut pending = vec![self.hold(self.node(NodeId::ROOT)?)];
        while let Some(dir) = pending.pop() {
            let names = match &ways {
                Some(ways) => self.names_on(ways, &dir)?,
                None => self.names_among(&wanted, &dir)?,
            };
            for name in names {
                #[cfg(test)]
                SETTLED.set(SETTLED.get() + 1);
                let node = match self.child(&dir, &name, false) {
                    // The upper hides it.
                    Err(error) if error.is(Errno::ENOENT) => continue,
                    found => self.hold(found?.0),
                };
                if node.kind == FileKind::Directory {
                    pending.push(node);
                } else if node.has_upper() {
                    self.bring_up(&node, &dir, &name)?;
                }
            }
        }
        Ok(())
    }

    /// How the one layer that there is below an upper, ours or that of others, reaches the objects of these numbers, if it can
    /// tell.
    pub(super) fn ways_to(&self, wanted: &HashSet<NodeId>) -> Result<Option<Ways>> {
        let [lower] = &self.lowers[usize::from(self.reads_upper)..] else {
            return Ok(None);
        };
        let space = lower.number_space();
        // What an object of another layer has left in the index has no name in this one.
        let numbers = wanted
            .iter()
            .filter_map(|id| self.numbers.in_space(space, *id));
        lower.ways_to(&numbers.collect())
    }

    /// The names of a directory that may lead to what `ways` lead to. A directory of the lower layer may have come to any
    /// place in the upper.
    fn names_on(&self, ways: &Ways, dir: &Arc<Node>) -> Result<BTreeSet<OsString>> {
        let (in_upper, alone) = {
            let place = dir.place.read();
            (place.upper.is_some(), place.lowers.is_empty())
        };
        let mut names = BTreeSet::new();
        if in_upper {
            let state = Self::directory(dir)?.state.read();
            self.list_upper(dir, &state, alone, &mut |name, kind, _| {
                if matches!(kind, ListedKind::Object(FileKind::Directory)) {
                    names.insert(name.to_owned());
                }
            })?;
        }
        names.extend(self.names_below(ways, dir)?.iter().cloned());
        Ok(names)
    }

    /// The names by which the one layer below an upper has `ways` lead through a directory.
    pub(super) fn names_below<'a>(&self, ways: &'a Ways, dir: &Node) -> Result<&'a [OsString]> {
        let lower = {
            let place = dir.place.read();
            let is_below = |lower: &&LowerAt| lower.layer == usize::from(self.reads_upper);
            place.lowers.iter().find(is_below).cloned()
        };
        let names = match lower {
            Some(lower) => ways.get(&lower.object.attr()?.ino),
            None => None,
        };
        Ok(names.map_or(&[], Vec::as_slice))
    }

    /// The names of a directory that are those of `wanted`, or of directories.
    pub(super) fn names_among(
        &self,
        wanted: &HashSet<NodeId>,
        dir: &Arc<Node>,
    ) -> Result<BTreeSet<OsString>> {
        let state = Self::directory(dir)?.state.read();
        let items = self.merge(dir, &state)?.into_iter().filter(|item| {
            item.kind == FileKind::Directory || item.ino.is_some_and(|id| wanted.contains(&id))
        });
        Ok(items.map(|item| item.name.into_os_string()).collect())
    }

    /// The numbers of the files in the index.
    fn indexed_nodes(&self) -> Result<HashSet<NodeId>> {
        let mut nodes = HashSet::new();
        let Some(upper) = self.upper_of() else {
            return Ok(nodes);
        };
        if !upper.indexed.load(Ordering::Acquire) {
            return Ok(nodes);
        }
        let mut names = Vec::new();
        let flags = libc::O_RDONLY | libc::O_DIRECTORY;
        let listing = fs::openat(upper.index(), OsStr::new("."), flags, 0)?;
        dirents::read_all(listing.as_fd(), &mut |entry| {
            names.push(entry.name.to_owned())
        })
        .context("listing the index")?;
        for name in names {
            let object = Object::Entry(upper.index(), &name);
            let attr = attr_of(&object.stat()?);
            let mut found = Found::new_upper(self.own_number(attr.ino), attr);
            self.resolve_origin(&mut found, object, attr)?;
            nodes.insert(found.id);
        }
        Ok(nodes)
    }

    /// Whether any file in the index has a `metacopy` mark of which `wanted` answers true.
    pub(super) fn index_has(&self, wanted: impl Fn(&[u8]) -> bool) -> Result<bool> {
        let upper = self.upper()?;
        let flags = libc::O_RDONLY | libc::O_DIRECTORY;
        let listing = fs::openat(upper.index(), OsStr::new("."), flags, 0)?;
        let mut names = Vec::new();
        dirents::read_all(listing.as_fd(), &mut |entry| {
            names.push(entry.name.to_owned())
        })
        .context("listing the index")?;
        for name in names {
            let object = Object::Entry(upper.index(), &name);
            if self
                .mark(object, self.family.metacopy())?
                .is_some_and(|value| wanted(&value))
            {
                return Ok(true);
            }
        }
        Ok(false)
    }

    pub(super) fn index_name(&self, object: &dyn LowerObject) -> Option<OsString> {
        match object.origin().and_then(|origin| origin.index_name()) {
            Some(name) => Some(name),
            None => {
                let space = self.numbers.index_of(object.number_space())?;
                Some(numbered_index_name(space, object.attr().ok()?.ino))
            }
        }
    }

    /// Adds to a lower file that was found the copy that another name of it has led to.
    pub(super) fn find_index(&self, found: &mut Found) -> Result<()> {
        let Some(upper) = self.upper_of() else {
            return Ok(());
        };
        if !upper.indexed.load(Ordering::Acquire) {
            return Ok(());
        }
        let Some(lower) = found.lowers.first().map(|lower| Arc::clone(&lower.object)) else {
            return Ok(());
        };
        let Some(name) = self.index_name(&*lower) else {
            return Ok(());
        };
        let attr = match fs::fstatat(upper.index(), &name) {
            Ok(stat) => attr_of(&stat),
            Err(Errno::ENOENT) => return Ok(()),
            Err(errno) => return Err(errno).context("looking up a hard link in the index"),
        };
        if attr.kind != found.kind {
            return Ok(());
        }
        found.link_offset = self.link_offset(upper, &name, attr.nlink, lower.attr()?.nlink)?;
        found.upper = Some(attr);
        if attr.kind == FileKind::Regular {
            self.resolve_metacopy(found, Object::Entry(upper.index(), &name), attr)?;
        }
        found.index = Some(name.into());
        if !found.metacopy {
            found.lowers = Lowers::default();
        }
        Ok(())
    }

    /// Finds out whether an upper file with an origin is in the index.
    pub(super) fn find_index_of(&self, found: &mut Found, origin: &Origin, ino: u64) -> Result<()> {
        let upper = self.upper()?;
        let Some(name) = origin.index_name() else {
            return Ok(());
        };
        match fs::fstatat(upper.index(), &name) {
            Ok(stat) if stat.st_ino == ino => {
                let links = attr_of(&stat).nlink;
                // The lower's count matters only to a form that is not written here.
                found.link_offset = self.link_offset(upper, &name, links, links)?;
                found.index = Some(name.into());
                Ok(())
            }
            Ok(_) | Err(Errno::ENOENT) => Ok(()),
            Err(errno) => Err(errno).context("looking up a hard link in the index"),
        }
    }

    fn link_offset(&self, upper: &Upper, name: &OsStr, links: u32, lower: u32) -> Result<i64> {
        let object = Object::Entry(upper.index(), name);
        let stored = self.mark(object, self.family.nlink())?;
        Ok(stored
            .and_then(|stored| decode_links(&stored, links, lower))
            .unwrap_or(ONLY_INDEX))
    }

    /// Puts a copy that has no place yet into the index. The caller accounts for the
    /// links.
    pub(super) fn add_index(
        &self,
        upper: &Upper,
        draft: &Draft<'_>,
        source: &dyn LowerObject,
        node: &Node,
    ) -> Result<Option<Arc<OsStr>>> {
        let Some(name) = self.index_name(source) else {
            return Ok(None);
        };
        // Two host links once it is in place: its name and this one.
        let offset = node.place.read().rare.link_offset + i64::from(source.attr()?.nlink) - 2;
        self.store_links(draft.object(), offset)?;
        match draft.link(upper.index(), &name) {
            Ok(()) => {}
            Err(Errno::EEXIST) => {
                // Left by a copy-up that did not get to its end.
                fs::unlinkat(upper.index(), &name)?;
                draft.link(upper.index(), &name)?;
            }
            Err(Errno::EPERM | Errno::EMLINK) => return Ok(None),
            Err(errno) => return Err(errno).context("adding a hard link to the index"),
        }
        upper.indexed.store(true, Ordering::Release);
        Ok(Some(name.into()))
    }

    /// Writes down how many links the union shows beyond the host's count.
    pub(super) fn store_links(&self, object: Object<'_>, offset: i64) -> Result<()> {
        let value = format!("U{offset:+}");
        match self.set_mark(object, self.family.nlink(), value.as_bytes()) {
            Err(Errno::EPERM | Errno::EOPNOTSUPP) => Ok(()),
            result => result.context("noting the number of links"),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn link_counts_are_told_as_the_kernel_does() {
        assert_eq!(decode_links(b"U+1", 2, 3), Some(1));
        assert_eq!(decode_links(b"L-1", 2, 3), Some(0));
        assert_eq!(decode_links(b"L+0", 2, 3), Some(1));
        assert_eq!(decode_links(b"U-1", 2, 3), Some(-1));
        assert_eq!(decode_links(b"", 2, 3), None);
        assert_eq!(decode_links(b"X+1", 2, 3), None);
    }
}
