//! Layers as committed snapshots: made once, shared, and removed when nobody needs them.
//!
//! A layer's snapshot is named by its chain id, which says what the layer and all below it contain. It
//! goes into the store as a packed layer. On layers that are directories, as an earlier plyd made them, it is unpacked in an
//! active snapshot, whose key starts with `unpack-`; those are nobody's after a crash and go when plyd
//! starts.

use std::collections::{BTreeMap, HashMap, HashSet};
use std::fs::File;
use std::sync::Arc;
use std::time::Duration;

use parking_lot::{Condvar, Mutex};
use sha2::{Digest, Sha256};

use super::apply::{Source, apply};
use super::archive::ArchivedLayer;
use super::{Error, Observer, Phase, Progress, Result, io_error};
use crate::cow::Union;
use crate::snapshotter::{self, Kind, Owner, ParentRef, Snapshotter};
use crate::store::layers::Expected;
use crate::store::record::Damaged;
use crate::store::{self, ingest};

/// Two imports of one layer: how often the one that waits looks whether it is still wanted.
const LOOK_AGAIN: Duration = Duration::from_millis(200);

/// Keeps the layers.
#[derive(Debug)]
pub(super) struct Unpacker {
    snapshotter: Arc<Snapshotter>,
    state: Mutex<State>,
    unpacked: Condvar,
}

#[derive(Debug, Default)]
struct State {
    /// Chain ids that imports under way rely on, with their number.
    pins: HashMap<String, usize>,
    /// Chain ids that are being unpacked now.
    busy: HashSet<String>,
}

/// Keeps layers from being swept while it lives.
#[derive(Debug)]
pub(super) struct Pin<'a> {
    unpacker: &'a Unpacker,
    chain_ids: Vec<String>,
}

impl Drop for Pin<'_> {
    fn drop(&mut self) {
        let mut state = self.unpacker.state.lock();
        for chain_id in &self.chain_ids {
            if let Some(count) = state.pins.get_mut(chain_id) {
                *count -= 1;
                if *count == 0 {
                    state.pins.remove(chain_id);
                }
            }
        }
    }
}

/// The right to unpack a layer; given back when it goes.
struct Turn<'a> {
    unpacker: &'a Unpacker,
    chain_id: &'a str,
}

impl Drop for Turn<'_> {
    fn drop(&mut self) {
        self.unpacker.state.lock().busy.remove(self.chain_id);
        self.unpacker.unpacked.notify_all();
    }
}

impl Unpacker {
    /// Clears what a crash left half-unpacked.
    pub(super) fn open(snapshotter: Arc<Snapshotter>) -> Result<Self> {
        for snapshot in snapshotter.list(Some(Owner::Image))? {
            if snapshot.kind != Kind::Committed {
                snapshotter.remove(Owner::Image, &snapshot.key)?;
            }
        }
        Ok(Self {
            snapshotter,
            state: Mutex::default(),
            unpacked: Condvar::new(),
        })
    }

    /// Keeps the layers of these chain ids, there already or not, from being swept.
    pub(super) fn pin(&self, chain_ids: &[String]) -> Pin<'_> {
        let mut state = self.state.lock();
        for chain_id in chain_ids {
            *state.pins.entry(chain_id.clone()).or_default() += 1;
        }
        Pin {
            unpacker: self,
            chain_ids: chain_ids.to_vec(),
        }
    }

    /// Unpacks those of the layers, the bottom first, that are not there. Answers the bytes that they
    /// all take on the disk. The caller has them pinned.
    pub(super) fn ensure(
        &self,
        layers: &[ArchivedLayer],
        chain_ids: &[String],
        observer: &dyn Observer,
    ) -> Result<u64> {
        let mut parent: Option<&String> = None;
        let mut size = 0;
        for (at, (layer, chain_id)) in layers.iter().zip(chain_ids).enumerate() {
            let turn = self.turn(chain_id, observer)?;
            let is_restored = self.restore_record(layer, chain_ids, at, observer)?;
            if !is_restored && self.exists(chain_id)? {
                if !self.heal(layer, chain_id, observer)? {
                    observer.progress(Progress {
                        phase: Phase::Exists,
                        digest: layer.digest.clone(),
                        done: layer.file.size,
                        total: layer.file.size,
                    });
                }
            } else if !is_restored {
                self.unpack(layer, chain_id, parent, observer)?;
            }
            drop(turn);
            size += self.snapshotter.usage(Owner::Image, chain_id)?.size;
            parent = Some(chain_id);
        }
        Ok(size)
    }

    /// Removes every layer that is neither needed, nor pinned, nor built on by another snapshot.
    pub(super) fn sweep(&self, needed: &dyn Fn(&str) -> bool) -> Result<()> {
        let state = self.state.lock();
        let layers = self.snapshotter.list(Some(Owner::Image))?.into_iter();
        let mut useless: Vec<String> = layers
            .filter(|layer| layer.kind == Kind::Committed)
            .map(|layer| layer.key)
            .filter(|chain_id| !needed(chain_id) && !state.pins.contains_key(chain_id))
            .collect();
        loop {
            let mut kept = Vec::new();
            let mut why = None;
            // In reverse order of creation, so mostly children before their parents.
            for chain_id in useless.iter().rev() {
                match self.snapshotter.remove(Owner::Image, chain_id) {
                    Ok(()) | Err(snapshotter::Error::NotFound { .. }) => {}
                    Err(snapshotter::Error::HasChildren { .. }) => kept.push(chain_id.clone()),
                    Err(error @ snapshotter::Error::MayHaveChildren { .. }) => {
                        kept.push(chain_id.clone());
                        why = Some(error);
                    }
                    Err(error) => return Err(error.into()),
                }
            }
            kept.reverse();
            if kept.is_empty() || kept.len() == useless.len() {
                if let Some(why) = why {
                    tracing::warn!(%why, "layers stay that no image needs");
                }
                return Ok(());
            }
            useless = kept;
        }
    }

    /// Those of these chain ids that no snapshot has, each with what is told of its record.
    pub(super) fn missing<'a>(
        &self,
        chain_ids: impl IntoIterator<Item = &'a String>,
    ) -> Result<Vec<(String, Damaged)>> {
        let chain_ids = chain_ids.into_iter().map(String::as_str);
        Ok(self.snapshotter.missing_layers(chain_ids)?)
    }

    /// Whether a snapshot is known for each of these chain ids.
    pub(super) fn has_all<'a>(&self, chain_ids: impl IntoIterator<Item = &'a String>) -> bool {
        self.snapshotter
            .has_snapshots(chain_ids.into_iter().map(String::as_str))
    }

    /// Lets the layers go that no snapshot has, if all of these are known.
    pub(super) fn settle_records(&self) {
        self.snapshotter.settle_records();
    }

    /// Unpacks the layer `at` of a chain if it is missing; says whether it did.
    pub(super) fn unpack_missing(
        &self,
        layer: &ArchivedLayer,
        chain_ids: &[String],
        at: usize,
        observer: &dyn Observer,
    ) -> Result<bool> {
        let chain_id = &chain_ids[at];
        let _turn = self.turn(chain_id, observer)?;
        let is_missing = !self.missing([chain_id])?.is_empty();
        if is_missing {
            let parent = at.checked_sub(1).map(|below| &chain_ids[below]);
            self.unpack(layer, chain_id, parent, observer)?;
        }
        Ok(is_missing)
    }

    /// Says which layers are the topmost of images, if that is known.
    pub(super) fn set_tops(&self, chain_ids: Option<HashSet<String>>) {
        self.snapshotter.set_tops(chain_ids);
    }

    /// Waits until nobody else unpacks the layer.
    fn turn<'a>(&'a self, chain_id: &'a str, observer: &dyn Observer) -> Result<Turn<'a>> {
        let mut state = self.state.lock();
        while state.busy.contains(chain_id) {
            self.unpacked.wait_for(&mut state, LOOK_AGAIN);
            if observer.cancelled() {
                return Err(Error::Cancelled);
            }
        }
        state.busy.insert(chain_id.to_owned());
        Ok(Turn {
            unpacker: self,
            chain_id,
        })
    }

    /// Bytes of the layers of these chain ids; `None` if one is not there, or its record cannot be used.
    pub(super) fn size(&self, chain_ids: &[String]) -> Result<Option<u64>> {
        let mut size = 0;
        for chain_id in chain_ids {
            match self.snapshotter.usage(Owner::Image, chain_id) {
                Ok(usage) => size += usage.size,
                Err(snapshotter::Error::NotFound { .. } | snapshotter::Error::Record(_)) => {
                    return Ok(None);
                }
                Err(error) => return Err(error.into()),
            }
        }
        Ok(Some(size))
    }

    fn exists(&self, chain_id: &str) -> Result<bool> {
        match self.snapshotter.stat(Owner::Image, chain_id) {
            Ok(_) => Ok(true),
            Err(snapshotter::Error::NotFound { .. }) => Ok(false),
            Err(error) => Err(error.into()),
        }
    }

    fn unpack(
        &self,
        layer: &ArchivedLayer,
        chain_id: &str,
        parent: Option<&String>,
        observer: &dyn Observer,
    ) -> Result<()> {
        let parent = parent.map(|parent| ParentRef {
            owner: Owner::Image,
            key: parent.clone(),
        });
        match self.pack(layer, chain_id, parent.as_ref(), observer) {
            Err(Error::Snapshot(snapshotter::Error::NotPacked { .. })) => {}
            packed => return packed,
        }
        let key = format!("unpack-{chain_id}-{:016x}", rand::random::<u64>());
        self.snapshotter
            .prepare(Owner::Image, &key, parent.as_ref(), BTreeMap::new())?;
        let committed = self.fill(&key, layer, observer).and_then(|()| {
            self.snapshotter
                .commit(Owner::Image, chain_id, &key, BTreeMap::new())
                .map_err(Error::from)
        });
        match committed {
            Ok(_) => Ok(()),
            Err(error) => {
                if let Err(error) = self.snapshotter.remove(Owner::Image, &key) {
                    tracing::warn!(%error, key, "cannot remove a half-unpacked layer; the next start will");
                }
                Err(error)
            }
        }
    }

    fn pack(
        &self,
        layer: &ArchivedLayer,
        chain_id: &str,
        parent: Option<&ParentRef>,
        observer: &dyn Observer,
    ) -> Result<()> {
        let path = &layer.file.path;
        let file = File::open(path).map_err(io_error("open", path))?;
        let expected = Expected {
            blob: None,
            diff_id: Some(&layer.diff_id),
        };
        let packed = self.snapshotter.commit_layer(
            Owner::Image,
            chain_id,
            parent,
            BTreeMap::new(),
            (file, &expected),
            &Told {
                layer,
                phase: Phase::Unpacking,
                observer,
            },
        );
        match packed {
            Ok(_) => Ok(()),
            Err(snapshotter::Error::Store(error)) => Err(worded(error, layer)),
            Err(error) => Err(error.into()),
        }
    }

    /// A layer that is there already may be damaged. Says whether it was, and is not any more.
    fn heal(&self, layer: &ArchivedLayer, chain_id: &str, observer: &dyn Observer) -> Result<bool> {
        let path = &layer.file.path;
        let file = File::open(path).map_err(io_error("open", path))?;
        let expected = Expected {
            blob: None,
            diff_id: Some(&layer.diff_id),
        };
        let healed = self.snapshotter.heal_layer(
            Owner::Image,
            chain_id,
            (file, &expected),
            &Told {
                layer,
                phase: Phase::Restoring,
                observer,
            },
        );
        match healed {
            Ok(healed) => Ok(healed),
            Err(snapshotter::Error::Store(error)) => Err(worded(error, layer)),
            Err(error) => Err(error.into()),
        }
    }

    /// Makes the record of the layer `at` of a chain anew if it cannot be used, and takes the layer in for that if it is not whole;
    /// says whether it did.
    pub(super) fn restore_record(
        &self,
        layer: &ArchivedLayer,
        chain_ids: &[String],
        at: usize,
        observer: &dyn Observer,
    ) -> Result<bool> {
        let path = &layer.file.path;
        let file = File::open(path).map_err(io_error("open", path))?;
        let expected = Expected {
            blob: None,
            diff_id: Some(&layer.diff_id),
        };
        let restored = self.snapshotter.restore_record_from(
            chain_ids,
            at,
            (file, &expected),
            &Told {
                layer,
                phase: Phase::Restoring,
                observer,
            },
        );
        match restored {
            Err(snapshotter::Error::NotPacked { .. }) => Ok(false),
            Err(snapshotter::Error::Store(error)) => Err(worded(error, layer)),
            restored => Ok(restored?),
        }
    }

    fn fill(&self, key: &str, layer: &ArchivedLayer, observer: &dyn Observer) -> Result<()> {
        let mut config = self.snapshotter.union_config(Owner::Image, key)?;
        // Nothing counts before the commit, which makes all of it durable.
        config.volatile = true;
        let union = Union::open(config)?;
        let source = Source {
            digest: &layer.digest,
            diff_id: &layer.diff_id,
            file: &layer.file.path,
            size: layer.file.size,
        };
        apply(
            &union,
            &source,
            &self.snapshotter.packing().limits,
            observer,
        )
    }
}

/// Who wants to know how far the layer is.
struct Told<'a> {
    layer: &'a ArchivedLayer,
    phase: Phase,
    observer: &'a dyn Observer,
}

impl ingest::Observer for Told<'_> {
    fn progress(&self, bytes: u64) {
        self.observer.progress(Progress {
            phase: self.phase,
            digest: self.layer.digest.clone(),
            done: bytes,
            total: self.layer.file.size,
        });
    }

    fn cancelled(&self) -> bool {
        self.observer.cancelled()
    }
}

/// What the store says of a layer, in the words of an image.
fn worded(error: store::Error, layer: &ArchivedLayer) -> Error {
    let archive = |problem| Error::Archive {
        subject: format!("the layer {}", layer.digest),
        problem,
    };
    match error {
        store::Error::Cancelled => Error::Cancelled,
        store::Error::Refused { entry, problem } => Error::Layer {
            layer: layer.digest.clone(),
            entry: match &*entry {
                "" => entry,
                _ => format!("\"{entry}\""),
            },
            problem,
        },
        store::Error::Digest {
            expected, found, ..
        } => archive(format!(
            "its content has the digest {found}, and the image's config says {expected}"
        )),
        // Only the host's own errors have a number.
        store::Error::Input(source) if source.raw_os_error().is_some() => {
            io_error("read", &layer.file.path)(source)
        }
        store::Error::Input(source) => archive(source.to_string()),
        store::Error::Io {
            action,
            path,
            source,
        } => Error::Io {
            action,
            path,
            source,
        },
        error => snapshotter::Error::from(error).into(),
    }
}

/// The chain ids of layers with these diff ids, the bottom first, as the OCI image specification
/// defines them.
pub(super) fn chain_ids<'a>(diff_ids: impl Iterator<Item = &'a str>) -> Vec<String> {
    let mut chain_ids: Vec<String> = Vec::new();
    for diff_id in diff_ids {
        let chain_id = match chain_ids.last() {
            None => diff_id.to_owned(),
            Some(below) => {
                let sum = Sha256::digest(format!("{below} {diff_id}"));
                format!("sha256:{sum:x}")
            }
        };
        chain_ids.push(chain_id);
    }
    chain_ids
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn chain_ids_are_those_of_the_specification() {
        let diff_ids = [
            "sha256:c6f988f4874bb0add23a778f753c65efe992244e148a1d2ec2a8b664fb66bbd1",
            "sha256:5f70bf18a086007016e948b04aed3b82103a36bea41755b6cddfaf10ace3c6ef",
        ];
        let chain = chain_ids(diff_ids.into_iter());
        assert_eq!(chain[0], diff_ids[0]);
        // printf 'sha256:c6f988... sha256:5f70bf...' | sha256sum
        assert_eq!(
            chain[1],
            "sha256:c3191d32a37d7159b2e30830937d2e30268ad6c375a773a8994911a3aba9b93f"
        );
    }
}
