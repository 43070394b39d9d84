//! Hard links of lower files in an upper that somebody else writes to, maybe at this moment: read, and nothing else.
//!
//! The copy of a lower file with several names lies under those of them that it was changed by. Under the others it is found as
//! whoever writes to the upper finds it, by the index in the work directory (`index`), so that all names are one file
//! here, too. No directory of the upper tells of those others: whoever looks only at what the upper has asks for the
//! names that lead to them.
//!
//! A file that is copied while somebody reads would be the copy under the names that are looked at from then on, and the
//! lower file under the others. So what the index had when the union was opened decides for as long as that is open: each
//! file is one of the two under all of its names. Which names it has is as it is found.

use std::collections::{BTreeSet, HashSet};
use std::ffi::{OsStr, OsString};
use std::io;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use nix::errno::Errno;

use super::chunks::Marked;
use super::copyup::decode_origin_number;
use super::error::Result;
use super::index::numbered_index_name;
use super::lookup::Found;
use super::lower::{LowerEntry, LowerObject, Ways};
use super::node::LowerAt;
use super::origin::Origin;
use super::redirect::Wanted;
use super::types::{FileKind, NodeId};
use super::union::Union;

/// The index of that upper, as it was at one moment.
pub(super) struct ForeignIndex {
    dir: Arc<dyn LowerObject>,
    /// What it had when the union was opened.
    names: BTreeSet<OsString>,
    /// A name of a later copy was met that the layers below do not have.
    has_missed: AtomicBool,
}

impl ForeignIndex {
    pub(super) fn open(dir: Arc<dyn LowerObject>) -> io::Result<Self> {
        let mut names = BTreeSet::new();
        let listed = dir.list(&mut |name, _, _| {
            names.insert(name.to_owned());
        });
        listed.map_err(|error| io::Error::from_raw_os_error(error.errno))?;
        Ok(Self {
            dir,
            names,
            has_missed: AtomicBool::new(false),
        })
    }

    /// What it has now under a name.
    fn copy(&self, name: &OsStr) -> Result<Option<Arc<dyn LowerObject>>> {
        match Arc::clone(&self.dir).lookup(name)? {
            Some(LowerEntry::Object(copy)) => Ok(Some(copy)),
            Some(LowerEntry::Whiteout) | None => Ok(None),
        }
    }
}

/// The lower files with several names of which somebody else's upper had copies when the union was opened.
#[derive(Default)]
pub struct CopiedLinks {
    /// Of what in the lower layers.
    files: HashSet<NodeId>,
    /// The names that lead to them, if the layers below can tell.
    ways: Option<Ways>,
}

impl Union {
    /// The copies in the upper which is the topmost lower layer here; none where no layer is somebody's upper.
    pub fn copied_links(&self) -> Result<CopiedLinks> {
        let Some(index) = self.index_of_others.as_ref() else {
            return Ok(CopiedLinks::default());
        };
        let mut files = HashSet::new();
        for name in &index.names {
            if let Some(copy) = index.copy(name)? {
                files.extend(self.copied_from(&*copy)?);
            }
        }
        if files.is_empty() {
            return Ok(CopiedLinks::default());
        }
        let ways = self.ways_to(&files)?;
        Ok(CopiedLinks { files, ways })
    }

    /// Whether a file of the layers below may have been shown under fewer names than it has: since the union was opened it was
    /// copied, and got a name, and only directories lie below, which say what they have by names alone.
    pub fn has_missed_links(&self) -> bool {
        let index = self.index_of_others.as_ref();
        index.is_some_and(|index| index.has_missed.load(Ordering::Relaxed))
    }

    /// The names of a directory that may be those of copied files or lead to such, in it or below.
    pub fn names_to_links(&self, links: &CopiedLinks, dir: NodeId) -> Result<BTreeSet<OsString>> {
        let dir = self.node(dir)?;
        match &links.ways {
            Some(ways) => Ok(self.names_below(ways, &dir)?.iter().cloned().collect()),
            None if links.files.is_empty() => Ok(BTreeSet::new()),
            None => self.names_among(&links.files, &dir),
        }
    }

    /// Whether there may be such names in a directory.
    pub fn leads_to_links(&self, links: &CopiedLinks, dir: NodeId) -> Result<bool> {
        match &links.ways {
            Some(ways) => Ok(!self.names_below(ways, &*self.node(dir)?)?.is_empty()),
            None => Ok(!links.files.is_empty()),
        }
    }

    /// Whether a file is a copy of that object of the lower layers and has no data that its upper could have changed. Its attributes may
    /// be others.
    pub fn has_data_of(&self, node: NodeId, object: (u64, u64)) -> Result<bool> {
        let node = self.node(node)?;
        let lowers = node.place.read().lowers.clone();
        let (copy, data) = match &*lowers {
            [copy, rest @ ..] if self.reads_upper && copy.layer == 0 => {
                (&*copy.object, rest.last())
            }
            _ => return Ok(false),
        };
        if let Some(data) = data {
            let mark = mark_of(copy, self.family.metacopy())?;
            let mark = mark.as_deref().map(Marked::of).transpose()?;
            let of_data = (data.object.number_space(), data.object.attr()?.ino);
            return Ok(of_data == object && matches!(mark, Some(Marked::Metacopy)));
        }
        if node.kind == FileKind::Regular && copy.attr()?.size > 0 {
            return Ok(false);
        }
        let (space, ino) = object;
        Ok(self.copied_from(copy)? == Some(self.numbers.of(space, ino)))
    }

    /// Puts in the place of a lower file that was found the copy that another name of it has led to. Of one that had a copy
    /// when the union was opened and has none any more every name is gone: then answers false.
    pub(super) fn find_copy_of_others(&self, found: &mut Found) -> Result<bool> {
        let Some(index) = &self.index_of_others else {
            return Ok(true);
        };
        let Some(top) = found.lowers.first().filter(|top| top.layer > 0) else {
            return Ok(true);
        };
        let name = self.index_name(&*top.object);
        let Some(name) = name.filter(|name| index.names.contains(name)) else {
            return Ok(true);
        };
        let Some(copy) = index.copy(&name)? else {
            return Ok(false);
        };
        let attr = copy.attr()?;
        if attr.kind != found.kind {
            return Ok(true);
        }
        found.id = self.numbers.of(copy.number_space(), attr.ino);
        // How many names it has stands in a mark, which changes apart from them. It has others, as far as anybody is to look.
        found.link_offset = i64::from(2u32.saturating_sub(attr.nlink));
        let has_data_below = copy.metacopy()?.is_some();
        let mut lowers = vec![LowerAt {
            layer: 0,
            object: copy,
        }];
        if has_data_below {
            lowers.extend(found.lowers.iter().cloned());
        }
        found.lowers = lowers.into();
        Ok(true)
    }

    /// What the layers have under a name of a directory that they have as `parents`, without copies that were made after the
    /// union was opened: in the place of such a one, what it was made of.
    pub(super) fn before_later_copies(
        &self,
        parents: &[LowerAt],
        name: &OsStr,
        mut found: Vec<LowerAt>,
    ) -> Result<Vec<LowerAt>> {
        let Some(index) = &self.index_of_others else {
            return Ok(found);
        };
        let Some(top) = found.first().filter(|top| top.layer == 0) else {
            return Ok(found);
        };
        let attr = top.object.attr()?;
        // One that is in the index has a name there, too.
        if attr.kind == FileKind::Directory || attr.nlink < 2 {
            return Ok(found);
        }
        let (origin, of_copy) = match self.origin_of(&*top.object) {
            Ok(Some(origin)) => origin,
            Ok(None) => return Ok(found),
            // The name has gone since it was found.
            Err(error) if error.is(Errno::ENOENT) => return Ok(Vec::new()),
            Err(error) => return Err(error),
        };
        if index.names.contains(&of_copy) {
            return Ok(found);
        }
        match index.copy(&of_copy)? {
            Some(copy) if copy.attr()?.ino == attr.ino => {}
            _ => return Ok(found),
        }
        for (layer, lower) in self.lowers.iter().enumerate() {
            if let Some(object) = origin.as_ref().and_then(|origin| lower.object_of(origin)) {
                return Ok(vec![LowerAt { layer, object }]);
            }
        }
        let mut below = found.split_off(1);
        if below.is_empty() {
            let of_others = parents.iter().filter(|parent| parent.layer > 0);
            let parents: Vec<LowerAt> = of_others.cloned().collect();
            below = self.find_lowers(&parents, name, None, Wanted::Anything)?;
        }
        let object = below.first().map(|top| &*top.object);
        if object.and_then(|object| self.index_name(object)) == Some(of_copy) {
            return Ok(below);
        }
        index.has_missed.store(true, Ordering::Relaxed);
        Ok(Vec::new())
    }

    /// What a copy was made of, if a file handle tells it, and the name in the index for that; `None` for what is no copy.
    fn origin_of(&self, copy: &dyn LowerObject) -> Result<Option<(Option<Origin>, OsString)>> {
        let stored = value_of(copy, self.family.origin())?;
        let origin = stored.as_deref().and_then(Origin::decode);
        if let Some(name) = origin.as_ref().and_then(Origin::index_name) {
            return Ok(Some((origin, name)));
        }
        let noted = value_of(copy, self.family.origin_number())?;
        let noted = noted.as_deref().and_then(decode_origin_number);
        Ok(noted.map(|(space, ino)| (None, numbered_index_name(space, ino))))
    }

    /// The number of the file below that a copy was made of.
    fn copied_from(&self, copy: &dyn LowerObject) -> Result<Option<NodeId>> {
        let origin = mark_of(copy, self.family.origin())?;
        let origin = origin.as_deref().and_then(Origin::decode);
        if let Some(id) = origin.and_then(|origin| self.number_of_origin(&origin)) {
            return Ok(Some(id));
        }
        let noted = mark_of(copy, self.family.origin_number())?;
        Ok(noted.and_then(|noted| self.number_noted(&noted)))
    }
}

/// The value of a mark; `None` if there is none, or what had it is gone since it was found.
fn mark_of(object: &dyn LowerObject, name: &OsStr) -> Result<Option<Vec<u8>>> {
    match value_of(object, name) {
        Err(error) if error.is(Errno::ENOENT) => Ok(None),
        value => value,
    }
}

/// The value of a mark, if there is one.
fn value_of(object: &dyn LowerObject, name: &OsStr) -> Result<Option<Vec<u8>>> {
    match object.xattr(name) {
        Ok(value) => Ok(Some(value)),
        Err(error) if error.is(Errno::ENODATA) || error.is(Errno::EOPNOTSUPP) => Ok(None),
        Err(error) => Err(error),
    }
}
