//! What snapshots there are: their records, found by owner and key through the index.
//!
//! A name is looked up in the index and then checked against the record that it leads to, so an
//! entry that leads nowhere or astray is a miss and nothing worse. A change therefore adds the new
//! name to the index, changes the one record, and takes the old name away, in this order.

mod childless;
mod damage;
mod gone;
mod twins;

use std::cmp::Reverse;
use std::collections::{BTreeMap, HashMap, HashSet};
use std::path::{Path, PathBuf};
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use parking_lot::Mutex;
use serde::{Deserialize, Serialize};

use super::types::*;
use crate::store::LayerName;
use crate::store::index::Index;
use crate::store::layer::LayerId;
use crate::store::record::{self, Damaged, Record, RecordDir};

/// The record of one snapshot. Its id, the record's name, stays the same from prepare to remove.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub(super) struct SnapshotRecord {
    pub(super) owner: Owner,
    pub(super) key: String,
    pub(super) kind: Kind,
    /// Id of the parent.
    pub(super) parent: Option<String>,
    pub(super) labels: BTreeMap<String, String>,
    /// Nanoseconds since the epoch.
    pub(super) created: u64,
    pub(super) updated: u64,
    /// What was the upper, once it is committed.
    pub(super) layer: Option<LayerId>,
    /// The packed layer that it has, below that.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub(super) packed: Option<LayerName>,
    /// What it takes, once it is committed.
    pub(super) usage: Option<Usage>,
}

impl Record for SnapshotRecord {
    const KIND: &'static str = "snapshot";
    /// 2 has packed layers.
    const VERSION: u32 = 2;
    const REMEDY: &'static str = "`snapctl system repair` writes it again if this plyd has read it before it was damaged, or if it is of an image's layer, for which it may need the image's archive (`-i`); else restore it from a backup and run `snapctl system repair`, or delete the file to give up what it stands for, start plyd again and remove what builds on it";
    const LEFT: &'static str = "nothing here tells what it said: if it is of an image's layer, `snapctl system repair -i` with the archive of the image makes it anew; else restore it from a backup and run `snapctl system repair`, or delete the file to give up the snapshot, start plyd again and remove what builds on it; what was written to it is erased then, so copy what you need out of its mount first";
}

/// A snapshot with its id.
#[derive(Clone, Debug)]
pub(super) struct Found {
    pub(super) id: String,
    pub(super) record: SnapshotRecord,
}

#[derive(Debug)]
pub(super) struct Catalog {
    /// What was written to snapshots, by their ids.
    data: PathBuf,
    records: RecordDir<SnapshotRecord>,
    index: Index,
    /// Held while a record changes.
    changes: Mutex<Changes>,
}

#[derive(Debug)]
struct Changes {
    /// What the records say, by their ids: whether one has children is never the index's word, and one that is damaged
    /// can be written again.
    known: HashMap<String, SnapshotRecord>,
    /// Ids of the records that could not be read at the start and have neither been made anew nor gone since.
    unread: HashSet<String>,
    /// The last time given out: each is later than all before it, so that they give an order.
    last_time: u64,
}

impl Catalog {
    /// Opens the records in `root/snapshots/records` and the index in `root/index`. With it come all
    /// sound records, and those that cannot be used or are gone though others build on them.
    pub(super) fn open(
        root: &Path,
        prober: Option<&Path>,
    ) -> Result<(Self, Vec<Found>, Vec<Damaged>)> {
        let records = RecordDir::open(&root.join("snapshots/records"))?;
        let mut listing = records.list()?;
        let all: Vec<Found> = listing
            .records
            .into_iter()
            .map(|(id, record)| Found { id, record })
            .collect();
        let index = Index::open(&root.join("index"), prober)?;
        let last_time = all.iter().map(|f| f.record.updated).max().unwrap_or(0);
        let unread = listing.damaged.iter().map(|damaged| damaged.id.clone());
        let changes = Changes {
            unread: unread.collect(),
            known: all
                .into_iter()
                .map(|found| (found.id, found.record))
                .collect(),
            last_time,
        };
        let catalog = Self {
            data: root.join("snapshots/data"),
            records,
            index,
            changes: Mutex::new(changes),
        };
        let mut changes = catalog.changes.lock();
        catalog.join_twins(&mut changes);
        // The index may have been made anew, or not know a record that somebody has put back.
        catalog.lead_all(&changes)?;
        let gone = changes.unknown_parents().into_iter();
        let gone = gone.filter(|id| !changes.unread.contains(id));
        let gone = gone.map(|id| catalog.records.damaged(&id, gone::GONE.to_owned()));
        listing.damaged.extend(gone);
        let all = changes.all();
        drop(changes);
        Ok((catalog, all, listing.damaged))
    }

    /// Brings the index to the disk; the last call.
    pub(super) fn close(&self) -> Result<()> {
        let _changes = self.changes.lock();
        Ok(self.index.close()?)
    }

    /// Makes each name lead to its record again; says how many did not.
    pub(super) fn mend_index(&self) -> Result<usize> {
        // Nobody changes a record meanwhile; whoever looks one up finds it at any moment.
        self.lead_all(&self.changes.lock())
    }

    fn lead_all(&self, changes: &Changes) -> Result<usize> {
        let mut lost = 0;
        let mut known: Vec<_> = changes.known.iter().collect();
        // Of several with one name it leads to the one that was made last.
        known.sort_by_key(|(id, record)| (Reverse(record.created), *id));
        for (id, record) in known {
            let name = name(record.owner, &record.key);
            let named = self.index.get(&name)?;
            let named = named.and_then(|id| changes.known.get(&id));
            // It may lead to another one that has it, too.
            if named.is_none_or(|named| (named.owner, &named.key) != (record.owner, &record.key)) {
                self.index.insert(&name, id)?;
                lost += 1;
            }
        }
        Ok(lost)
    }

    /// The snapshot `key` of `owner`.
    pub(super) fn find(&self, owner: Owner, key: &str) -> Result<Option<Found>> {
        let Some(id) = self.index.get(&name(owner, key))? else {
            return Ok(None);
        };
        Ok(self
            .records
            .get(&id)?
            .filter(|record| record.owner == owner && record.key == key)
            .map(|record| Found { id, record }))
    }

    /// The id of the snapshot `key` of `owner`, whose record need not be one that can be used.
    pub(super) fn id_of(&self, owner: Owner, key: &str) -> Result<Option<String>> {
        let id = self.index.get(&name(owner, key))?;
        let changes = self.changes.lock();
        Ok(id.filter(|id| match changes.known.get(id) {
            Some(record) => record.owner == owner && record.key == key,
            None => changes.unread.contains(id),
        }))
    }

    /// The record of that id.
    pub(super) fn get(&self, id: &str) -> Result<Option<SnapshotRecord>> {
        Ok(self.records.get(id)?)
    }

    /// Ids of what builds on `parent`, or on nothing; no record is read.
    pub(super) fn children(&self, parent: Option<&str>) -> Vec<String> {
        self.changes.lock().children(parent)
    }

    /// As [`find`](Self::find); none is an error.
    pub(super) fn resolve(&self, owner: Owner, key: &str) -> Result<Found> {
        match self.find(owner, key)? {
            Some(found) => Ok(found),
            None => {
                self.check_kept(owner, key)?;
                let key = key.to_owned();
                Err(Error::NotFound { owner, key })
            }
        }
    }

    /// The snapshots below `record`, the nearest first. Fails if a record of the chain is damaged, or gone.
    pub(super) fn ancestors(&self, record: &SnapshotRecord) -> Result<Vec<Found>> {
        match self.ancestors_that_are_there(record)? {
            (chain, None) => Ok(chain),
            (_, Some(id)) => Err(self.gone(&id)),
        }
    }

    /// As [`ancestors`](Self::ancestors), but only down to one whose record was gone when plyd started, and still is.
    pub(super) fn ancestors_as_listed(&self, record: &SnapshotRecord) -> Result<Vec<Found>> {
        match self.ancestors_that_are_there(record)? {
            (_, Some(id)) if !self.given_up().contains(&id) => Err(self.gone(&id)),
            (chain, _) => Ok(chain),
        }
    }

    /// The snapshots below `record`, down to one that has no record, whose id is answered, too.
    fn ancestors_that_are_there(
        &self,
        record: &SnapshotRecord,
    ) -> Result<(Vec<Found>, Option<String>)> {
        let mut chain: Vec<Found> = Vec::new();
        let mut next = record.parent.clone();
        while let Some(id) = next {
            // Parents exist before their children, so the chain ends; a forged record cannot loop it.
            if chain.iter().any(|found| found.id == id) {
                let problem = "it is its own ancestor".to_owned();
                return Err(record::Error::from(self.records.damaged(&id, problem)).into());
            }
            let Some(record) = self.records.get(&id)? else {
                return Ok((chain, Some(id)));
            };
            next = record.parent.clone();
            chain.push(Found { id, record });
        }
        Ok((chain, None))
    }

    /// All sound snapshots, in order of creation.
    pub(super) fn all(&self) -> Result<Vec<Found>> {
        Ok(in_order(self.records.list()?.records))
    }

    /// All sound snapshots, in order of creation, and how many others there are, of which the records cannot be used or are gone.
    pub(super) fn all_and_unusable(&self) -> Result<(Vec<Found>, usize)> {
        let mut missing = self.changes.lock().expected();
        let listing = self.records.list()?;
        let damaged = listing.damaged.iter().map(|damaged| &damaged.id);
        for id in listing.records.iter().map(|(id, _)| id).chain(damaged) {
            missing.remove(id);
        }
        if !missing.is_empty() {
            // Most often removed meanwhile.
            let changes = self.changes.lock();
            missing.retain(|id| changes.expects(id) && self.records.is_unsound(id, true));
        }
        let unusable = listing.damaged.len() + missing.len();
        Ok((in_order(listing.records), unusable))
    }

    /// How many snapshots are known. No record is read.
    pub(super) fn count(&self) -> usize {
        self.changes.lock().known.len()
    }

    /// All snapshots; `None` if there are some of which nothing is known. No record is read.
    pub(super) fn all_known(&self) -> Option<Vec<Found>> {
        let changes = self.changes.lock();
        changes.is_complete().then(|| changes.all())
    }

    /// Records a new snapshot. Its times are set here.
    pub(super) fn insert(&self, id: &str, mut record: SnapshotRecord) -> Result<Found> {
        let mut changes = self.changes.lock();
        self.check_unrecorded(record.owner, &record.key)?;
        if let Some(parent) = &record.parent
            && !changes.known.contains_key(parent)
        {
            // Removed since the caller looked it up.
            return Err(Error::NoParent {
                owner: record.owner,
                key: parent.clone(),
            });
        }
        record.created = changes.now();
        record.updated = record.created;
        self.index.insert(&name(record.owner, &record.key), id)?;
        self.records.put(id, &record)?;
        changes.known.insert(id.to_owned(), record.clone());
        Ok(Found {
            id: id.to_owned(),
            record,
        })
    }

    /// Replaces the record of `old` by what `change` makes of it.
    pub(super) fn update(
        &self,
        old: &Found,
        change: impl FnOnce(&mut SnapshotRecord),
    ) -> Result<Found> {
        let mut changes = self.changes.lock();
        let Some(known) = changes.known.get(&old.id) else {
            return Err(Error::NotFound {
                owner: old.record.owner,
                key: old.record.key.clone(),
            });
        };
        let mut new = old.clone();
        // Another may have become that meanwhile.
        new.record.parent.clone_from(&known.parent);
        change(&mut new.record);
        new.record.updated = changes.now();
        let (old_name, new_name) = (
            name(old.record.owner, &old.record.key),
            name(new.record.owner, &new.record.key),
        );
        let renamed = old_name != new_name;
        if renamed {
            self.check_unrecorded(new.record.owner, &new.record.key)?;
            new.record.created = new.record.updated;
            self.index.insert(&new_name, &new.id)?;
        }
        self.records.put(&new.id, &new.record)?;
        changes.known.insert(new.id.clone(), new.record.clone());
        if renamed {
            self.lead_on(&changes, old.record.owner, &old.record.key);
        }
        Ok(new)
    }

    /// Removes the record of a snapshot that nothing builds on. Answers the packed layer that it had.
    pub(super) fn remove(&self, found: &Found) -> Result<Option<LayerName>> {
        let mut changes = self.changes.lock();
        changes.check_childless(found)?;
        self.records.remove(&found.id)?;
        let removed = changes.known.remove(&found.id);
        self.lead_on(&changes, found.record.owner, &found.record.key);
        Ok(removed.and_then(|record| record.packed))
    }

    /// Fails if the key is taken, also by a snapshot whose record is gone.
    pub(super) fn check_free(&self, owner: Owner, key: &str) -> Result<()> {
        self.check_kept(owner, key)?;
        self.check_unrecorded(owner, key)
    }

    fn check_unrecorded(&self, owner: Owner, key: &str) -> Result<()> {
        match self.find(owner, key)? {
            None => Ok(()),
            Some(_) => Err(Error::AlreadyExists {
                owner,
                key: key.to_owned(),
            }),
        }
    }
}

impl Changes {
    fn all(&self) -> Vec<Found> {
        let known = self.known.iter();
        let all = known.map(|(id, record)| Found {
            id: id.clone(),
            record: record.clone(),
        });
        all.collect()
    }

    /// Ids of what builds on `parent`, or on nothing.
    fn children(&self, parent: Option<&str>) -> Vec<String> {
        let all = self.known.iter();
        let children = all.filter(|(_, record)| record.parent.as_deref() == parent);
        children.map(|(id, _)| id.clone()).collect()
    }

    fn of(&self, owner: Owner, key: &str) -> Option<&SnapshotRecord> {
        let all = self.known.values();
        let all = all.filter(|record| record.owner == owner && record.key == key);
        all.max_by_key(|record| record.created)
    }

    /// A time for the layer `at` of a chain, whose id is `id`: later than that of what it lies on, and earlier than those of all
    /// that builds on it. Between the two there is a nanosecond for each layer, for each took longer to be made.
    fn time_between(
        &mut self,
        record: &SnapshotRecord,
        id: &str,
        chain: &[String],
        at: usize,
    ) -> u64 {
        let below = record.parent.as_ref().and_then(|id| self.known.get(id));
        let below = below.map_or(0, |below| below.created);
        let children = self.known.values();
        let children = children
            .filter(|other| other.parent.as_deref() == Some(id))
            .map(|child| child.created.saturating_sub(1));
        let above = (at + 1..).zip(chain.iter().skip(at + 1));
        let above = above.filter_map(|(place, key)| {
            let layer = self.of(record.owner, key)?;
            Some(layer.created.saturating_sub((place - at) as u64))
        });
        let limit = children.chain(above).min().or_else(|| {
            // What builds on layers above of which nothing is known may be any of these.
            let later = self.known.values().map(|other| other.created);
            let oldest = later.filter(|created| *created > below).min();
            oldest.map(|oldest| oldest.saturating_sub((chain.len() - at) as u64))
        });
        limit.unwrap_or_else(|| self.now())
    }

    fn now(&mut self) -> u64 {
        let since = SystemTime::now()
            .duration_since(UNIX_EPOCH)
            .unwrap_or_default();
        let now = u64::try_from(since.as_nanos()).unwrap_or(u64::MAX);
        self.last_time = now.max(self.last_time.saturating_add(1));
        self.last_time
    }
}

/// Snapshots in order of creation.
fn in_order(records: Vec<(String, SnapshotRecord)>) -> Vec<Found> {
    let all = records.into_iter().map(|(id, record)| Found { id, record });
    let mut all: Vec<Found> = all.collect();
    all.sort_by(|a, b| (a.record.created, &a.id).cmp(&(b.record.created, &b.id)));
    all
}

/// A time of a record.
pub(super) fn time(nanoseconds: u64) -> SystemTime {
    UNIX_EPOCH + Duration::from_nanos(nanoseconds)
}

/// A new id: 128 random bits, so none is ever given out twice.
pub(super) fn new_id() -> String {
    format!("{:032x}", rand::random::<u128>())
}

fn name(owner: Owner, key: &str) -> Vec<u8> {
    format!("{owner}\0{key}").into_bytes()
}

fn parse_name(name: &[u8]) -> Option<ParentRef> {
    let (owner, key) = std::str::from_utf8(name).ok()?.split_once('\0')?;
    let owner = Owner::ALL.into_iter().find(|of| of.as_str() == owner)?;
    let key = key.to_owned();
    Some(ParentRef { owner, key })
}
