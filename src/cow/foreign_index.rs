//! Hard links of lower files in an upper that somebody else writes to, maybe at this moment: read, and nothing else.
//!
//! The copy of a lower file with several names lies under those of them that it was changed by. Under the others it is found as
//! whoever writes to the upper finds it, by the index in the work directory (`index`), so that all names are one file
//! here, too. No directory of the upper tells of those others: whoever looks only at what the upper has asks for the
//! names that lead to them.

use std::collections::{BTreeSet, HashSet};
use std::ffi::{OsStr, OsString};
use std::sync::Arc;

use nix::errno::Errno;

use super::chunks::Marked;
use super::error::Result;
use super::lookup::Found;
use super::lower::{LowerEntry, LowerObject, Ways};
use super::node::LowerAt;
use super::origin::Origin;
use super::types::{FileKind, NodeId};
use super::union::Union;

/// The lower files with several names of which somebody else's upper has had copies at some moment.
#[derive(Default)]
pub struct CopiedLinks {
    /// Names in the index.
    names: BTreeSet<OsString>,
    /// Of what in the lower layers.
    files: HashSet<NodeId>,
    /// The names that lead to them, if the layers below can tell.
    ways: Option<Ways>,
}

impl Union {
    /// The copies that the upper has now which is the topmost lower layer here; none where no layer is somebody's upper.
    pub fn copied_links(&self) -> Result<CopiedLinks> {
        let names = self.index_names()?;
        if names.is_empty() {
            return Ok(CopiedLinks::default());
        }
        let mut files = HashSet::new();
        for name in &names {
            if let Some(copy) = self.copy_of_others(name)? {
                files.extend(self.copied_from(&*copy)?);
            }
        }
        let ways = self.ways_to(&files)?;
        Ok(CopiedLinks { names, files, ways })
    }

    /// Whether one of those copies is gone, or there is another one among the nodes that `is_told` of: with those who have
    /// been told of it, not all of its names may have been.
    pub fn have_links_changed(
        &self,
        links: &CopiedLinks,
        is_told: impl Fn(NodeId) -> bool,
    ) -> Result<bool> {
        let now = self.index_names()?;
        if !links.names.is_subset(&now) {
            return Ok(true);
        }
        for name in now.difference(&links.names) {
            if let Some(copy) = self.copy_of_others(name)?
                && is_told(self.numbers.of(copy.number_space(), copy.attr()?.ino))
            {
                return Ok(true);
            }
        }
        Ok(false)
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

    /// Puts in the place of a lower file that was found the copy that another name of it has led to.
    pub(super) fn find_copy_of_others(&self, found: &mut Found) -> Result<()> {
        if self.index_of_others.is_none() {
            return Ok(());
        }
        let Some(top) = found.lowers.first().filter(|top| top.layer > 0) else {
            return Ok(());
        };
        let Some(name) = self.index_name(&*top.object) else {
            return Ok(());
        };
        let Some(copy) = self.copy_of_others(&name)? else {
            return Ok(());
        };
        let attr = copy.attr()?;
        if attr.kind != found.kind {
            return Ok(());
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
        Ok(())
    }

    fn index_names(&self) -> Result<BTreeSet<OsString>> {
        let mut names = BTreeSet::new();
        if let Some(index) = &self.index_of_others {
            index.list(&mut |name, _, _| {
                names.insert(name.to_owned());
            })?;
        }
        Ok(names)
    }

    /// What the index has under a name.
    fn copy_of_others(&self, name: &OsString) -> Result<Option<Arc<dyn LowerObject>>> {
        let Some(index) = &self.index_of_others else {
            return Ok(None);
        };
        match Arc::clone(index).lookup(name)? {
            Some(LowerEntry::Object(copy)) => Ok(Some(copy)),
            Some(LowerEntry::Whiteout) | None => Ok(None),
        }
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
    let absent = [Errno::ENODATA, Errno::EOPNOTSUPP, Errno::ENOENT];
    match object.xattr(name) {
        Ok(value) => Ok(Some(value)),
        Err(error) if absent.into_iter().any(|errno| error.is(errno)) => Ok(None),
        Err(error) => Err(error),
    }
}
