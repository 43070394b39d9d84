//! Records that have no file any more, though others say that they had one.
//!
//! A snapshot's record is written after that of its parent and removed before it, so a parent without a record has lost it.

use std::collections::HashSet;

use super::{Catalog, Changes, SnapshotRecord, name, parse_name};
use crate::snapshotter::types::*;
use crate::store::record::{self, Damaged};

/// What is wrong with them.
pub(super) const GONE: &str = "it is gone";
/// What to do about one that is of no image's layer.
const OF_OTHERS: &str = "nothing here tells what it said: restore it from a backup and run `snapctl system repair`, or remove what builds on it";
/// The same where nothing is known to build on it.
const OF_NOTHING: &str = "restore it from a backup and run `snapctl system repair`, or start plyd again to give up what it stood for";
/// What to do about one of containerd's, which believes that the snapshot is there.
const OF_CONTAINERD: &str = "nothing here tells what it said: restore it from a backup and run `snapctl system repair`, or have containerd remove the containers on it and each image that has it (`ctr containers rm`, `ctr images rm --sync`; `crictl rm`, `crictl rmi`), and only then pull the image again";
/// What to do about one of which nobody can tell whose it is.
const OF_UNKNOWN: &str = "`snapctl system repair` makes it anew if it is of an image's layer; else restore it from a backup and run `snapctl system repair`, or remove what builds on it";
/// What to do about one of a layer of an image.
const OF_IMAGE: &str =
    "`snapctl system repair` makes it anew from what the image says, or says what else to do";
/// The same once a repair could not make it anew.
const LEFT_OF_IMAGE: &str = "`snapctl system repair -i` or `snapctl image load` with the archive of an image that has the layer makes it anew";

/// The same with what to do about it. `owner` is whose it is, if that is known; after a crash, that made the index anew, what is
/// `on_top` tells: what containerd and images have lies on their own alone.
pub(super) fn advised(damaged: Damaged, owner: Option<Owner>, on_top: &[ParentRef]) -> Damaged {
    let mut above = on_top.iter().map(|of| of.owner);
    let own = |owner: &Owner| matches!(owner, Owner::Containerd | Owner::Image);
    match owner.or_else(|| above.find(own)) {
        Some(Owner::Image) => Damaged {
            remedy: OF_IMAGE,
            left: LEFT_OF_IMAGE,
            ..damaged
        },
        _ if on_top.is_empty() => damaged.advised(OF_NOTHING),
        Some(Owner::Containerd) => damaged.advised(OF_CONTAINERD),
        Some(_) => damaged.advised(OF_OTHERS),
        None => Damaged {
            remedy: OF_UNKNOWN,
            left: OF_OTHERS,
            ..damaged
        },
    }
}

impl Catalog {
    /// Those keys of layers of images that no known snapshot has. No record is read.
    pub(in crate::snapshotter) fn unknown_layers<'a>(
        &self,
        keys: impl IntoIterator<Item = &'a str>,
    ) -> Vec<String> {
        let changes = self.changes.lock();
        let known = changes.known.values();
        let known = known.filter(|record| record.owner == Owner::Image);
        let known: HashSet<&str> = known.map(|record| &*record.key).collect();
        let mut unknown: Vec<String> = Vec::new();
        for key in keys {
            if !known.contains(key) && !unknown.iter().any(|seen| seen == key) {
                unknown.push(key.to_owned());
            }
        }
        unknown
    }

    /// Fails if the record of a layer of an image is gone: that of one that was removed has no name in the index.
    pub(in crate::snapshotter) fn check_layer_is_not_gone(&self, key: &str) -> Result<()> {
        let id = self.index.get(&name(Owner::Image, key))?;
        match id.is_some_and(|id| self.is_gone(&id)) {
            true => Err(record::Error::from(self.gone_layer(key)?).into()),
            false => Ok(()),
        }
    }

    /// What is told of the record of a layer of an image that is gone.
    pub(in crate::snapshotter) fn gone_layer(&self, key: &str) -> Result<Damaged> {
        let id = self.index.get(&name(Owner::Image, key))?;
        let damaged = match id.filter(|id| self.is_gone(id)) {
            Some(id) => self.records.damaged(&id, GONE.to_owned()),
            None => {
                let problem = format!("{GONE}, and nothing tells what ID it had");
                self.records.damaged("ID", problem)
            }
        };
        Ok(advised(damaged, Some(Owner::Image), &[]))
    }

    /// Fails if the record of a snapshot that is known is gone: then it is not that there is none.
    pub(in crate::snapshotter) fn check_kept(&self, owner: Owner, key: &str) -> Result<()> {
        let Some(id) = self.index.get(&name(owner, key))? else {
            return Ok(());
        };
        // Nobody removes it meanwhile.
        let changes = self.changes.lock();
        let known = changes.known.get(&id);
        let is_known = known.is_some_and(|known| known.owner == owner && known.key == key);
        match is_known && self.is_gone(&id) {
            true => {
                let damaged = self.records.damaged(&id, GONE.to_owned());
                Err(record::Error::from(damaged.known()).into())
            }
            false => Ok(()),
        }
    }

    /// As [`check_kept`](Self::check_kept), also where only what builds on the snapshot is known.
    pub(in crate::snapshotter) fn check_missed(&self, owner: Owner, key: &str) -> Result<()> {
        self.check_kept(owner, key)?;
        let id = self.index.get(&name(owner, key))?;
        match id.filter(|id| self.given_up().contains(id)) {
            Some(id) => Err(self.gone(&id)),
            None => Ok(()),
        }
    }

    /// That the record of that id, on which others build, is gone.
    pub(super) fn gone(&self, id: &str) -> Error {
        let damaged = self.records.damaged(id, GONE.to_owned());
        let (is_known, on_top) = {
            let changes = self.changes.lock();
            (changes.known.contains_key(id), changes.on_top_of(id))
        };
        let damaged = match is_known {
            true => damaged.known(),
            false => {
                let name = self.index.find(id).ok().flatten();
                let of = name.and_then(|name| parse_name(&name));
                advised(damaged, of.map(|of| of.owner), &on_top)
            }
        };
        record::Error::from(damaged).into()
    }

    /// Ids of the parents whose records were gone when plyd started, and still are. One that was removed since has no child.
    pub(in crate::snapshotter) fn given_up(&self) -> HashSet<String> {
        let mut parents = self.changes.lock().unknown_parents();
        parents.retain(|id| self.is_gone(id));
        parents
    }

    /// Whether no file is the record of that id.
    pub(super) fn is_gone(&self, id: &str) -> bool {
        matches!(self.records.get(id), Ok(None))
    }
}

impl Changes {
    /// Ids of the records that have to be there.
    pub(super) fn expected(&self) -> HashSet<String> {
        let known = self.known.keys().chain(&self.unread).cloned();
        known.chain(self.unknown_parents()).collect()
    }

    /// Whether the record of that id has to be there.
    pub(super) fn expects(&self, id: &str) -> bool {
        let is_child = |record: &SnapshotRecord| record.parent.as_deref() == Some(id);
        self.known.contains_key(id) || self.unread.contains(id) || self.known.values().any(is_child)
    }

    /// Whether it is known of all snapshots what they are, as far as anything tells of them.
    pub(super) fn is_complete(&self) -> bool {
        self.unread.is_empty() && self.unknown_parents().is_empty()
    }

    /// Ids of parents that are not known.
    pub(super) fn unknown_parents(&self) -> HashSet<String> {
        let known = self.known.values();
        let parents = known.filter_map(|record| record.parent.as_ref());
        let unknown = parents.filter(|id| !self.known.contains_key(*id));
        unknown.cloned().collect()
    }
}
