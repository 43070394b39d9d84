//! Several records with one name: one that somebody has put back, and the one that was made in its place.
//!
//! The index leads to one of them. Where both are of one layer, and all other records can be used, one is made of them: what builds on the other comes to build on
//! the one that stays. A record of what was not committed goes if nothing is left of that. Others stay, each with what builds on it, and
//! the name leads to another once the one that it leads to has gone.

use std::collections::{HashMap, HashSet};

use super::{Catalog, Changes, SnapshotRecord, name};
use crate::snapshotter::types::*;

/// A record that another one says all of.
#[derive(Debug)]
struct Twin {
    id: String,
    /// Id of the other.
    kept: String,
}

impl Catalog {
    /// Makes one of those that are the same, and answers the records that are no more.
    pub(super) fn join_twins(&self, changes: &mut Changes) -> Vec<SnapshotRecord> {
        let mut joined = Vec::new();
        if let Err(error) = self.try_join(changes, &mut joined) {
            tracing::error!(%error, "two records of one snapshot stay");
        }
        joined
    }

    fn try_join(&self, changes: &mut Changes, joined: &mut Vec<SnapshotRecord>) -> Result<()> {
        let twins = self.twins(changes)?;
        let ids: HashSet<&str> = twins.iter().map(|twin| &*twin.id).collect();
        let others = changes.known.iter().filter(|(id, _)| !ids.contains(&***id));
        let is_known = |id: &String| changes.known.contains_key(id);
        if !changes.unread.is_empty()
            || others
                .filter_map(|(_, record)| record.parent.as_ref())
                .any(|id| !is_known(id))
        {
            // What builds on one of them may be put back yet.
            return Ok(());
        }
        for twin in twins {
            tracing::warn!(
                record = twin.id,
                kept = twin.kept,
                "two records are of one snapshot; the first goes, and what builds on it builds on the second"
            );
            let children = changes.children(Some(&twin.id));
            if !children.is_empty() {
                self.make_older(changes, &twin)?;
            }
            for id in children {
                self.change(changes, &id, |record| {
                    record.parent = Some(twin.kept.clone());
                })?;
            }
            self.records.remove(&twin.id)?;
            if let Some(record) = changes.known.remove(&twin.id) {
                self.index
                    .insert(&name(record.owner, &record.key), &twin.kept)?;
                joined.push(record);
            }
        }
        Ok(())
    }

    /// Has the one that is kept, and what it lies on, be as old as the other, so that all of it is older than what comes to build on it.
    fn make_older(&self, changes: &mut Changes, twin: &Twin) -> Result<()> {
        let mut limit = changes.known.get(&twin.id).map(|record| record.created);
        let mut next = Some(twin.kept.clone());
        while let (Some(id), Some(created)) = (next, limit) {
            next = None;
            if let Some(record) = changes.known.get(&id)
                && record.created > created
            {
                next = record.parent.clone();
                limit = created.checked_sub(1);
                self.change(changes, &id, |record| record.created = created)?;
            }
        }
        Ok(())
    }

    fn change(
        &self,
        changes: &mut Changes,
        id: &str,
        change: impl FnOnce(&mut SnapshotRecord),
    ) -> Result<()> {
        if let Some(record) = changes.known.get_mut(id) {
            let mut changed = record.clone();
            change(&mut changed);
            self.records.put(id, &changed)?;
            *record = changed;
        }
        Ok(())
    }

    fn twins(&self, changes: &Changes) -> Result<Vec<Twin>> {
        let is_there = |id: &str, record: &SnapshotRecord| {
            // Where nobody can tell, it may be.
            record.kind == Kind::Committed || self.data.join(id).try_exists().unwrap_or(true)
        };
        let mut by_name: HashMap<Vec<u8>, Vec<(&String, &SnapshotRecord)>> = HashMap::new();
        for (id, record) in &changes.known {
            let name = name(record.owner, &record.key);
            by_name.entry(name).or_default().push((id, record));
        }
        by_name.retain(|_, of_name| of_name.len() > 1);
        let mut twins = Vec::new();
        for (name, mut of_name) in by_name {
            let named = self.index.get(&name)?;
            // Those first that stay rather: one that has lost what it builds on is of no use.
            of_name.sort_by_key(|(id, record)| {
                let parent = record.parent.as_ref();
                let is_cut = parent.is_some_and(|id| !changes.known.contains_key(id));
                let is_named = named.as_ref() == Some(*id);
                (!is_there(id, record), is_cut, !is_named, record.created)
            });
            let Some((&(kept, first), others)) = of_name.split_first() else {
                continue;
            };
            let same = others
                .iter()
                .filter(|(id, other)| is_same(first, other) || !is_there(id, other));
            twins.extend(same.map(|(id, _)| Twin {
                id: (*id).clone(),
                kept: kept.clone(),
            }));
        }
        Ok(twins)
    }

    /// Has a name that no longer leads to a snapshot lead to another one that has it, if there is one.
    pub(super) fn lead_on(&self, changes: &Changes, owner: Owner, key: &str) {
        let name = name(owner, key);
        let known = changes.known.iter();
        let others = known.filter(|(_, record)| record.owner == owner && record.key == key);
        let other = others.max_by_key(|(id, record)| (record.created, *id));
        let led = match other {
            Some((id, _)) => self.index.insert(&name, id),
            None => self.index.remove(&name),
        };
        if let Err(error) = led {
            // It leads nowhere now, which a lookup notices.
            tracing::warn!(%error, "a name stays in the index");
        }
    }
}

/// Whether two committed snapshots of one name are the same. The key of an image's layer says what it is and what lies below.
fn is_same(one: &SnapshotRecord, other: &SnapshotRecord) -> bool {
    let is_packed =
        |record: &SnapshotRecord| record.kind == Kind::Committed && record.layer.is_none();
    is_packed(one)
        && is_packed(other)
        && one.packed.is_some()
        && one.packed == other.packed
        && (one.owner == Owner::Image || one.parent == other.parent)
}
