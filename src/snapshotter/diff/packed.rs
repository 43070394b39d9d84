//! What a packed layer changes against those below it: two merged views, compared at the paths that the layer names, or name by
//! name where it may have changed something else.

use std::collections::{BTreeMap, HashMap};
use std::ffi::OsStr;
use std::os::unix::ffi::OsStrExt;
use std::path::PathBuf;

use super::{Change, ChangeKind};
use crate::snapshotter::types::*;
use crate::store::layer::index::{Action, LayerIndex};
use crate::store::view::View;
use crate::store::{self, Inode};

/// Two directories of one path.
struct Directory {
    path: PathBuf,
    new: Inode,
    old: Option<Inode>,
}

/// A name on one side.
struct Named {
    number: u32,
    inode: Inode,
    layer: u16,
}

/// The view of a chain beside that of the chain without its topmost layer.
pub(in crate::snapshotter) struct Views<'a> {
    pub(in crate::snapshotter) new: &'a View,
    pub(in crate::snapshotter) old: Option<&'a View>,
    /// Number of the topmost layer in `new`.
    pub(in crate::snapshotter) topmost: u16,
}

/// What is at a path of the layer: its inodes on both sides.
#[derive(Clone, Copy)]
struct Place {
    new: Option<u32>,
    old: Option<u32>,
    was_link: bool,
    /// Everything below was compared.
    is_done: bool,
    entries: Entries,
}

/// What the entries of a layer do at a path.
#[derive(Clone, Copy, Default)]
struct Entries {
    count: u32,
    /// Number of the last.
    last: u32,
    /// They make something other than a directory.
    makes_other: bool,
    /// What was there is gone.
    removes: bool,
    /// A path may lead through it to elsewhere.
    leads_away: bool,
    /// It hides what a directory has of the layers below.
    clears: bool,
}

/// Compares the views, in no order. `index` is that of the topmost layer.
pub(super) fn compare(views: &Views<'_>, index: store::Result<LayerIndex>) -> Result<Vec<Change>> {
    let index = index.map_err(Error::from);
    match index.and_then(|index| views.at_paths_of(&index)) {
        Ok(Some(changes)) => return Ok(changes),
        Ok(None) => {}
        // All that there is to tell is in the views.
        Err(error) => tracing::warn!(%error, "merged views are compared whole"),
    }
    views.everywhere()
}

impl Views<'_> {
    /// Compares all that there is.
    pub(in crate::snapshotter) fn everywhere(&self) -> Result<Vec<Change>> {
        let mut changes = Vec::new();
        let old = self.old.map(|old| old.inode(View::ROOT)).transpose()?;
        let new = self.new.inode(View::ROOT)?;
        self.below("/".into(), (new, old), &mut changes)?;
        Ok(changes)
    }

    /// Compares what the layer names. `None` if it may have changed something else: where one of its paths leads through a
    /// symbolic link, or a hard link changes a file of the layers below, of which it changes the other names, too.
    pub(super) fn at_paths_of(&self, index: &LayerIndex) -> Result<Option<Vec<Change>>> {
        let (entries, links) = entries_of(index)?;
        if !self.are_known(index, &entries, &links)? {
            return Ok(None);
        }
        let mut changes = Vec::new();
        let mut places: Vec<Place> = Vec::with_capacity(entries.len());
        for (number, entries) in (0..).zip(entries) {
            let (above, [new, old]) = match number {
                0 => (None, [root_of(Some(self.new))?, root_of(self.old)?]),
                _ => {
                    let (above, name) = index.path_step(number)?;
                    let above = places[above as usize];
                    if above.leads_away() {
                        return Ok(None);
                    }
                    let new = lookup(Some(self.new), above.new, name)?;
                    let old = lookup(self.old, above.old, name)?;
                    (Some(above), [new, old])
                }
            };
            let mut place = Place {
                new: new.as_ref().map(|new| new.number),
                old: old.as_ref().map(|old| old.number),
                was_link: old
                    .as_ref()
                    .is_some_and(|old| old.inode.kind() == libc::S_IFLNK),
                is_done: above.is_some_and(|above| above.is_done),
                entries,
            };
            if entries.clears && place.leads_away() {
                return Ok(None);
            }
            if !place.is_done {
                let path = || path_of(index, number);
                // What is below a directory that is gone, or a file now, is gone with it.
                if let Some(above) = above
                    && self.is_directory(above.new)?
                    && let Some(kind) = self.kind(new.as_ref(), old.as_ref())?
                {
                    let path = path()?;
                    changes.push(Change { path, kind });
                }
                if let (Some(new), Some(old)) = (new, old)
                    && is_directory(&new.inode)
                    && is_directory(&old.inode)
                    && (entries.makes_other || entries.removes)
                {
                    self.below(path()?, (new.inode, Some(old.inode)), &mut changes)?;
                    place.is_done = true;
                }
            }
            places.push(place);
        }
        Ok(Some(changes))
    }

    /// Whether an inode of the new view is that of a directory.
    fn is_directory(&self, number: Option<u32>) -> Result<bool> {
        let inode = number.map(|number| self.new.inode(number)).transpose()?;
        Ok(inode.is_some_and(|inode| is_directory(&inode)))
    }

    /// Whether the layer's hard links change no name but their own.
    fn are_known(
        &self,
        index: &LayerIndex,
        entries: &[Entries],
        links: &[(u32, Inode)],
    ) -> Result<bool> {
        let mut numbers: HashMap<(u32, &[u8]), u32> = HashMap::new();
        if !links.is_empty() {
            for number in 1..index.path_count() {
                numbers.insert(index.path_step(number)?, number);
            }
        }
        let step = |above: u32, name: &[u8]| numbers.get(&(above, name)).copied();
        for (link, inode) in links {
            let names = index.target(inode)?.split(|&byte| byte == b'/');
            let names = names.filter(|name| !name.is_empty() && *name != b".");
            let is_known = match names.clone().try_fold(0, step) {
                // What the layer itself has made there before, and has not touched since.
                Some(path) => {
                    let made = entries[path as usize];
                    made.count == 1 && made.last < *link && made.makes_other
                }
                None => self.looks_the_same(names)?,
            };
            if !is_known {
                return Ok(false);
            }
        }
        Ok(true)
    }

    /// Whether what the layers below have at a path that the layer does not name is there still, and looks as it did: so do
    /// its other names then.
    fn looks_the_same<'n>(&self, names: impl Iterator<Item = &'n [u8]>) -> Result<bool> {
        let (mut new, mut old) = (root_of(Some(self.new))?, root_of(self.old)?);
        for name in names {
            new = lookup(Some(self.new), new.map(|new| new.number), name)?;
            old = lookup(self.old, old.map(|old| old.number), name)?;
        }
        Ok(match (new, old) {
            (Some(new), Some(old)) => !is_changed(&new, &old, self.topmost),
            _ => false,
        })
    }

    /// Compares everything below two directories of one path.
    fn below(
        &self,
        path: PathBuf,
        (new, old): (Inode, Option<Inode>),
        changes: &mut Vec<Change>,
    ) -> Result<()> {
        let mut waiting = vec![Directory { path, new, old }];
        while let Some(at) = waiting.pop() {
            let of_new = names(Some(self.new), Some(&at.new))?;
            let mut of_old = names(self.old, at.old.as_ref())?;
            for (name, now) in of_new {
                let path = at.path.join(OsStr::from_bytes(name));
                let before = of_old.remove(name);
                if let Some(kind) = self.kind(Some(&now), before.as_ref())? {
                    let path = path.clone();
                    changes.push(Change { path, kind });
                }
                if is_directory(&now.inode) {
                    waiting.push(Directory {
                        path,
                        new: now.inode,
                        old: before.map(|before| before.inode).filter(is_directory),
                    });
                }
            }
            // What is below a directory that is gone, or a file now, is gone with it.
            for name in of_old.into_keys() {
                let path = at.path.join(OsStr::from_bytes(name));
                let kind = ChangeKind::Deleted;
                changes.push(Change { path, kind });
            }
        }
        Ok(())
    }

    /// How what is under a name differs from what was.
    fn kind(&self, now: Option<&Named>, before: Option<&Named>) -> Result<Option<ChangeKind>> {
        #[cfg(test)]
        super::COMPARED.set(super::COMPARED.get() + 1);
        let (now, before) = match (now, before) {
            (None, None) => return Ok(None),
            (None, Some(_)) => return Ok(Some(ChangeKind::Deleted)),
            (Some(_), None) => return Ok(Some(ChangeKind::Added)),
            (Some(now), Some(before)) => (now, before),
        };
        let changed = is_changed(now, before, self.topmost)
            || (now.layer == self.topmost && xattrs_differ((self.new, now), (self.old, before))?);
        Ok(changed.then_some(ChangeKind::Modified))
    }
}

impl Place {
    /// Whether a path of the layer that leads through it may lead elsewhere.
    fn leads_away(&self) -> bool {
        self.was_link || self.entries.leads_away
    }
}

/// The hard links of a layer: numbers of their entries, and what has their targets.
type Links = Vec<(u32, Inode)>;

/// What the entries of the layer do, by the numbers of paths, and its hard links.
fn entries_of(index: &LayerIndex) -> Result<(Vec<Entries>, Links)> {
    let mut all = vec![Entries::default(); index.path_count() as usize];
    let mut links = Vec::new();
    for number in 0..index.len() {
        let entry = index.entry(number)?;
        let kind = entry.inode.kind();
        let is_link = entry.action == Action::Link;
        let makes = matches!(entry.action, Action::Make | Action::MakeExactly);
        // A view was built of it, so there is no entry without a path.
        let Some(at) = all.get_mut(entry.path as usize) else {
            continue;
        };
        at.count += 1;
        at.last = number;
        at.makes_other |= is_link || (makes && kind != libc::S_IFDIR);
        at.removes |= !is_link && !makes;
        at.leads_away |= is_link || (makes && kind == libc::S_IFLNK);
        at.clears |= entry.action == Action::Clear;
        if is_link {
            links.push((number, entry.inode));
        }
    }
    Ok((all, links))
}

/// An absolute path of the layer.
fn path_of(index: &LayerIndex, number: u32) -> Result<PathBuf> {
    let names = index.path(number)?;
    let names = names.into_iter().map(OsStr::from_bytes);
    Ok([OsStr::new("/")].into_iter().chain(names).collect())
}

fn root_of(view: Option<&View>) -> Result<Option<Named>> {
    view.map(|view| named(view, View::ROOT, 0)).transpose()
}

fn lookup(view: Option<&View>, above: Option<u32>, name: &[u8]) -> Result<Option<Named>> {
    let (Some(view), Some(above)) = (view, above) else {
        return Ok(None);
    };
    let found = view.lookup(&view.inode(above)?, name)?;
    found
        .map(|entry| named(view, entry.inode, entry.layer))
        .transpose()
}

fn named(view: &View, number: u32, layer: u16) -> Result<Named> {
    let inode = view.inode(number)?;
    Ok(Named {
        number,
        inode,
        layer,
    })
}

fn names<'a>(
    view: Option<&'a View>,
    directory: Option<&Inode>,
) -> Result<BTreeMap<&'a [u8], Named>> {
    let mut names = BTreeMap::new();
    let (Some(view), Some(directory)) = (view, directory) else {
        return Ok(names);
    };
    let mut place = 0;
    while let Some(entry) = view.nth(directory, place)? {
        let named = named(view, entry.inode, entry.layer)?;
        names.insert(entry.name, named);
        place += 1;
    }
    Ok(names)
}

fn is_directory(inode: &Inode) -> bool {
    inode.kind() == libc::S_IFDIR
}

/// Matters to directories: whatever else the topmost layer names it has changed.
fn xattrs_differ(
    (new, now): (&View, &Named),
    (old, before): (Option<&View>, &Named),
) -> Result<bool> {
    let of_old = match old {
        Some(old) => old.xattrs(&before.inode)?,
        None => Vec::new(),
    };
    Ok(new.xattrs(&now.inode)? != of_old)
}

fn is_changed(new: &Named, old: &Named, topmost: u16) -> bool {
    let look = |inode: &Inode| (inode.mode, inode.uid, inode.gid, inode.mtime);
    let directories = is_directory(&new.inode) && is_directory(&old.inode);
    look(&new.inode) != look(&old.inode)
        || (!directories && (new.layer == topmost || new.inode.size != old.inode.size))
}

#[cfg(test)]
mod tests;
