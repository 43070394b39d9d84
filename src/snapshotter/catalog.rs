//! What snapshots there are: their records, found by owner and key through the index.
//!
//! A name is looked up in the index and then checked against the record that it leads to, so an
//! entry that leads nowhere or astray is a miss and nothing worse. A change therefore adds the new
//! name to the index, changes the one record, and takes the old name away, in this order.

use std::collections::{BTreeMap, HashMap};
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
}

/// A snapshot with its id.
#[derive(Clone, Debug)]
pub(super) struct Found {
    pub(super) id: String,
    pub(super) record: SnapshotRecord,
}

#[derive(Debug)]
pub(super) struct Catalog {
    records: RecordDir<SnapshotRecord>,
    index: Index,
    /// Held while a record changes.
    changes: Mutex<Changes>,
}

#[derive(Debug)]
struct Changes {
    /// Parent of every snapshot, taken from the records: whether one has children is never the
    /// index's word.
    parents: HashMap<String, Option<String>>,
    /// The last time given out: each is later than all before it, so that they give an order.
    last_time: u64,
}

impl Catalog {
    /// Opens the records in `root/snapshots/records` and the index in `root/index`. With it come all
    /// sound records, and those that cannot be used.
    pub(super) fn open(
        root: &Path,
        prober: Option<&Path>,
    ) -> Result<(Self, Vec<Found>, Vec<Damaged>)> {
        let records = RecordDir::open(&root.join("snapshots/records"))?;
        let listing = records.list()?;
        let all: Vec<Found> = listing
            .records
            .into_iter()
            .map(|(id, record)| Found { id, record })
            .collect();
        let (index, empty) = Index::open(&root.join("index"), prober)?;
        if empty {
            for found in &all {
                index.insert(&name(found.record.owner, &found.record.key), &found.id)?;
            }
        }
        let parents = all
            .iter()
            .map(|found| (found.id.clone(), found.record.parent.clone()))
            .collect();
        let last_time = all.iter().map(|f| f.record.updated).max().unwrap_or(0);
        let catalog = Self {
            records,
            index,
            changes: Mutex::new(Changes { parents, last_time }),
        };
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
        let _changes = self.changes.lock();
        let mut lost = 0;
        for (id, record) in self.records.list()?.records {
            let name = name(record.owner, &record.key);
            if self.index.get(&name)?.as_deref() != Some(&*id) {
                self.index.insert(&name, &id)?;
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

    /// The record of that id.
    pub(super) fn get(&self, id: &str) -> Result<Option<SnapshotRecord>> {
        Ok(self.records.get(id)?)
    }

    /// Ids of what builds on `parent`, or on nothing; no record is read.
    pub(super) fn children(&self, parent: Option<&str>) -> Vec<String> {
        let changes = self.changes.lock();
        let parents = changes.parents.iter();
        let children = parents.filter(|(_, of)| of.as_deref() == parent);
        children.map(|(id, _)| id.clone()).collect()
    }

    /// As [`find`](Self::find); none is an error.
    pub(super) fn resolve(&self, owner: Owner, key: &str) -> Result<Found> {
        self.find(owner, key)?.ok_or_else(|| Error::NotFound {
            owner,
            key: key.to_owned(),
        })
    }

    /// The snapshots below `record`, the nearest first. Fails if a record of the chain is damaged.
    pub(super) fn ancestors(&self, record: &SnapshotRecord) -> Result<Vec<Found>> {
        let mut chain: Vec<Found> = Vec::new();
        let mut next = record.parent.clone();
        while let Some(id) = next {
            // Parents exist before their children, so the chain ends; a forged record cannot loop it.
            let missing = |problem: &str| Damaged {
                id: id.clone(),
                path: PathBuf::from(format!("{id}.record")),
                problem: problem.to_owned(),
            };
            if chain.iter().any(|found| found.id == id) {
                return Err(record::Error::from(missing("it is its own ancestor")).into());
            }
            let Some(record) = self.records.get(&id)? else {
                return Err(record::Error::from(missing(
                    "it is missing, though other snapshots build on it",
                ))
                .into());
            };
            next = record.parent.clone();
            chain.push(Found { id, record });
        }
        Ok(chain)
    }

    /// All sound snapshots, in order of creation.
    pub(super) fn all(&self) -> Result<Vec<Found>> {
        let listing = self.records.list()?;
        let mut all: Vec<Found> = listing
            .records
            .into_iter()
            .map(|(id, record)| Found { id, record })
            .collect();
        all.sort_by(|a, b| (a.record.created, &a.id).cmp(&(b.record.created, &b.id)));
        Ok(all)
    }

    /// All snapshots; `None` if there are some that cannot be read.
    pub(super) fn all_sound(&self) -> Result<Option<Vec<Found>>> {
        let listing = self.records.list()?;
        let records = listing.records.into_iter();
        let all = records.map(|(id, record)| Found { id, record }).collect();
        Ok(listing.damaged.is_empty().then_some(all))
    }

    /// Records a new snapshot. Its times are set here.
    pub(super) fn insert(&self, id: &str, mut record: SnapshotRecord) -> Result<Found> {
        let mut changes = self.changes.lock();
        self.check_free(record.owner, &record.key)?;
        if let Some(parent) = &record.parent
            && !changes.parents.contains_key(parent)
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
        changes.parents.insert(id.to_owned(), record.parent.clone());
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
        let mut new = old.clone();
        change(&mut new.record);
        new.record.updated = changes.now();
        let (old_name, new_name) = (
            name(old.record.owner, &old.record.key),
            name(new.record.owner, &new.record.key),
        );
        let renamed = old_name != new_name;
        if renamed {
            self.check_free(new.record.owner, &new.record.key)?;
            new.record.created = new.record.updated;
            self.index.insert(&new_name, &new.id)?;
        }
        self.records.put(&new.id, &new.record)?;
        if renamed {
            self.forget_name(&old_name);
        }
        Ok(new)
    }

    /// Fails if anything builds on `found`.
    pub(super) fn check_childless(&self, found: &Found) -> Result<()> {
        self.changes.lock().check_childless(found)
    }

    /// Removes the record of a snapshot that nothing builds on.
    pub(super) fn remove(&self, found: &Found) -> Result<()> {
        let mut changes = self.changes.lock();
        changes.check_childless(found)?;
        self.records.remove(&found.id)?;
        changes.parents.remove(&found.id);
        self.forget_name(&name(found.record.owner, &found.record.key));
        Ok(())
    }

    /// Fails if the key is taken.
    pub(super) fn check_free(&self, owner: Owner, key: &str) -> Result<()> {
        match self.find(owner, key)? {
            None => Ok(()),
            Some(_) => Err(Error::AlreadyExists {
                owner,
                key: key.to_owned(),
            }),
        }
    }

    fn forget_name(&self, name: &[u8]) {
        if let Err(error) = self.index.remove(name) {
            // It leads nowhere now, which a lookup notices.
            tracing::warn!(%error, "a name stays in the index");
        }
    }
}

impl Changes {
    fn check_childless(&self, found: &Found) -> Result<()> {
        let is_child = |parent: &&Option<String>| parent.as_ref() == Some(&found.id);
        match self.parents.values().filter(is_child).count() {
            0 => Ok(()),
            children => Err(Error::HasChildren {
                key: found.record.key.clone(),
                children,
            }),
        }
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
