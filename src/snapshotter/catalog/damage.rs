//! Records that cannot be used: whose they are, and how they are made anew or found again.

use std::collections::HashMap;

use super::{Catalog, Changes, SnapshotRecord, gone, name, parse_name};
use crate::snapshotter::types::*;
use crate::store::record::Damaged;

/// What to do about a record that is of no image's layer and that a repair has left.
const LEFT_OF_OTHERS: &str = "nothing here tells what it said: restore it from a backup and run `snapctl system repair`, or delete the file to give up the snapshot, start plyd again and remove what builds on it; what was written to it is erased then, so copy what you need out of its mount first";
/// What to do about the record of a layer of an image that a repair has left.
const LEFT_OF_IMAGE: &str = "`snapctl system repair -i` or `snapctl image load` with the archive of an image that has the layer makes it anew; only without that restore it from a backup and run `snapctl system repair`, or delete the file to give up the layer, start plyd again and remove what builds on it";

/// What to do about the record of a layer of an image that no plyd has read since it was damaged.
const FROM_IMAGE: &str = "`snapctl system repair` makes it anew from the image's record; where that is damaged or gone, too, `snapctl system repair -i` or `snapctl image load` with the image's archive does";
/// The same where nobody can tell whose the record is.
const OF_UNKNOWN: &str = "if it is of an image's layer, `snapctl system repair` makes it anew from the image's record, or with `-i` from the image's archive; else restore it from a backup and run `snapctl system repair`, or delete the file to give up the snapshot, start plyd again and remove what builds on it; what was written to it is erased then, so copy what you need out of its mount first";

impl Catalog {
    /// How many are [`damaged`](Self::damaged); of records only what has changed is read.
    pub(in crate::snapshotter) fn count_damaged(&self) -> Result<usize> {
        let expected = self.changes.lock().expected();
        match self.records.is_doubtful(expected)? {
            true => Ok(self.damaged()?.len()),
            false => Ok(0),
        }
    }

    /// Records that cannot be used, or are gone.
    pub(in crate::snapshotter) fn damaged(&self) -> Result<Vec<UnusableRecord>> {
        let expected = self.changes.lock().expected();
        let damaged = self.records.examine(expected)?;
        let mut found = Vec::new();
        for damaged in damaged {
            let (of, on_top) = {
                // Nobody removes it meanwhile.
                let changes = self.changes.lock();
                let known = changes.known.get(&damaged.id);
                if !self
                    .records
                    .is_unsound(&damaged.id, changes.expects(&damaged.id))
                {
                    continue;
                }
                (known.map(ref_to), changes.on_top_of(&damaged.id))
            };
            let (damaged, of) = match of {
                Some(of) => (damaged.known(), Some(of)),
                None => {
                    let name = self.index.find(&damaged.id)?;
                    let of = name.and_then(|name| parse_name(&name));
                    let owner = of.as_ref().map(|of| of.owner);
                    let damaged = match owner {
                        _ if damaged.newer => damaged,
                        _ if self.is_gone(&damaged.id) => gone::advised(damaged, owner, &on_top),
                        None => Damaged {
                            remedy: OF_UNKNOWN,
                            ..damaged
                        },
                        Some(Owner::Image) => Damaged {
                            remedy: FROM_IMAGE,
                            left: LEFT_OF_IMAGE,
                            ..damaged
                        },
                        Some(_) => damaged.advised(LEFT_OF_OTHERS),
                    };
                    (damaged, of)
                }
            };
            found.push(UnusableRecord {
                damaged,
                of,
                on_top,
            });
        }
        Ok(found)
    }

    /// Says in the log that `damaged` could not be read at the start, whose these are and what to do.
    pub(in crate::snapshotter) fn log_damaged(&self, damaged: &[Damaged]) {
        let unusable = self.damaged().unwrap_or_else(|error| {
            tracing::warn!(%error, "whose records they are that cannot be used cannot be told");
            let unknown = damaged.iter().map(|damaged| UnusableRecord {
                damaged: damaged.clone(),
                of: None,
                on_top: Vec::new(),
            });
            unknown.collect()
        });
        for UnusableRecord {
            damaged,
            of,
            on_top,
        } in unusable
        {
            let owner = of.as_ref().map(|of| of.owner.as_str());
            let snapshot = of.map(|of| of.key);
            let on_top = on_top.len();
            tracing::error!(owner, snapshot, on_top, "{damaged}");
        }
    }

    /// Whether the record of that id cannot be used, or is gone though its snapshot is not.
    pub(in crate::snapshotter) fn is_unusable(&self, id: &str) -> bool {
        let changes = self.changes.lock();
        let is_expected = changes.expects(id);
        (is_expected || changes.unread.contains(id)) && self.records.is_unsound(id, is_expected)
    }

    /// Writes records again that cannot be used, or are gone, and of which all is known; says whose they are.
    pub(in crate::snapshotter) fn rewrite(&self) -> Result<Vec<ParentRef>> {
        let mut written = Vec::new();
        let unusable = self.damaged()?.into_iter();
        let damaged = unusable.map(|unusable| unusable.damaged);
        for damaged in damaged.filter(|damaged| !damaged.newer) {
            let changes = self.changes.lock();
            let Some(record) = changes.known.get(&damaged.id) else {
                continue;
            };
            self.records.put(&damaged.id, record)?;
            written.push(ref_to(record));
        }
        Ok(written)
    }

    /// Id of a record that cannot be used, or is gone, and of which it is certain that it was that of the layer `at` of an image with
    /// the keys `chain`: the layer above says so, or the index, or what can still be read of it.
    pub(in crate::snapshotter) fn damaged_id(
        &self,
        owner: Owner,
        chain: &[String],
        at: usize,
    ) -> Result<Option<String>> {
        self.damaged_of(&self.changes.lock(), owner, chain, at)
    }

    fn damaged_of(
        &self,
        changes: &Changes,
        owner: Owner,
        chain: &[String],
        at: usize,
    ) -> Result<Option<String>> {
        let Some(key) = chain.get(at) else {
            return Ok(None);
        };
        let above = chain.get(at + 1).and_then(|key| changes.of(owner, key));
        let id = match above {
            Some(above) => above.parent.clone(),
            None => self.index.get(&name(owner, key))?,
        };
        let id = id.or_else(|| {
            let text = format!("{}\"key\":\"{key}\",", beginning(owner));
            let mut unread = changes.unread.iter();
            unread.find(|id| self.records.has_text(id, &text)).cloned()
        });
        Ok(id.filter(|id| {
            !changes.known.contains_key(id)
                && match self.records.problem_of(id) {
                    Some(damaged) => !damaged.newer,
                    None => self.is_gone(id),
                }
        }))
    }

    /// Records `record`, of the layer `at` of an image with the keys `chain`, in place of one that cannot be used.
    /// Answers whether there is such a one.
    pub(in crate::snapshotter) fn replace_damaged(
        &self,
        mut record: SnapshotRecord,
        chain: &[String],
        at: usize,
    ) -> Result<bool> {
        let mut changes = self.changes.lock();
        let Some(id) = self.damaged_of(&changes, record.owner, chain, at)? else {
            return Ok(false);
        };
        record.created = changes.time_between(&record, &id, chain, at);
        record.updated = record.created;
        self.index.insert(&name(record.owner, &record.key), &id)?;
        self.records.put(&id, &record)?;
        changes.unread.remove(&id);
        changes.known.insert(id, record);
        Ok(true)
    }

    /// Takes records as they are on the disk of which nothing is known, as they could not be used when plyd started, or were not there: as
    /// a start would. `count` is told of each before it can be found, `uncount` of those that are another's now; whose they are is
    /// answered.
    pub(in crate::snapshotter) fn take_put_back(
        &self,
        count: impl Fn(&SnapshotRecord),
        uncount: impl Fn(&SnapshotRecord),
    ) -> Result<Vec<ParentRef>> {
        let mut changes = self.changes.lock();
        let mut taken = Vec::new();
        for id in self.strays(&changes)? {
            let record = match self.records.get(&id) {
                Ok(Some(record)) => record,
                Ok(None) => continue,
                Err(_) => {
                    changes.unread.insert(id);
                    continue;
                }
            };
            count(&record);
            changes.last_time = changes.last_time.max(record.updated);
            changes.unread.remove(&id);
            taken.push(ref_to(&record));
            changes.known.insert(id, record);
        }
        if !taken.is_empty() {
            for joined in self.join_twins(&mut changes) {
                uncount(&joined);
            }
            self.lead_all(&changes)?;
        }
        Ok(taken)
    }

    /// Whether there are records of which nothing is known: somebody has put them back since the start.
    pub(in crate::snapshotter) fn has_strays(&self) -> Result<bool> {
        let changes = self.changes.lock();
        let mut strays = self.strays(&changes)?.into_iter();
        let is_sound = |id: &String| matches!(self.records.get(id), Ok(Some(_)));
        Ok(strays.any(|id| !changes.unread.contains(&id) || is_sound(&id)))
    }

    /// Whether it is known of all snapshots what their records say, and no record is there that is not known.
    pub(in crate::snapshotter) fn is_complete(&self) -> Result<bool> {
        let changes = self.changes.lock();
        Ok(changes.is_complete() && self.strays(&changes)?.is_empty())
    }

    /// Whether the record of that id is known. One that somebody has put back since the start is not before it was taken in.
    pub(in crate::snapshotter) fn knows(&self, id: &str) -> bool {
        self.changes.lock().known.contains_key(id)
    }

    /// Ids of records that are there and of which nothing is known.
    fn strays(&self, changes: &Changes) -> Result<Vec<String>> {
        let mut ids = self.records.ids()?;
        ids.retain(|id| !changes.known.contains_key(id));
        Ok(ids)
    }
}

impl Changes {
    /// What is known to build on the snapshot of that id, also by way of others, in order of creation.
    pub(super) fn on_top_of(&self, id: &str) -> Vec<ParentRef> {
        let mut children: HashMap<&str, Vec<(&str, &SnapshotRecord)>> = HashMap::new();
        for (id, record) in &self.known {
            if let Some(parent) = &record.parent {
                children.entry(parent).or_default().push((id, record));
            }
        }
        let mut on_top = Vec::new();
        let mut waiting = vec![id];
        // Each is taken out once, so that forged records cannot make a loop of it.
        while let Some(id) = waiting.pop() {
            let of = children.remove(id).unwrap_or_default();
            waiting.extend(of.iter().map(|(id, _)| *id));
            on_top.extend(of);
        }
        on_top.sort_by_key(|(id, record)| (record.created, *id));
        on_top
            .into_iter()
            .map(|(_, record)| ref_to(record))
            .collect()
    }
}

/// As a record of a snapshot begins.
pub(super) fn beginning(owner: Owner) -> String {
    format!("{{\"owner\":\"{owner}\",")
}

fn ref_to(record: &SnapshotRecord) -> ParentRef {
    ParentRef {
        owner: record.owner,
        key: record.key.clone(),
    }
}
