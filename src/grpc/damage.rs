//! Damage that is nobody's contents, in words: merged views, and the records of snapshots, images and containers.

mod gone;
mod layers;
mod log;
mod put_back;

use std::collections::{HashMap, HashSet};
use std::path::Path;

use tonic::Status;

use super::layers::shown;
use super::pb::plywood as api;
use crate::image::ImageStore;
use crate::runtime::containers::Containers;
use crate::snapshotter::{Owner, ParentRef, SnapshotInfo, Snapshotter};
use crate::store::ingest::Observer;
use crate::store::record::Damaged;
use crate::store::{self, LayerName, ViewKey};

pub(super) use layers::{KnownLayer, KnownLayers};
pub(super) use log::DamageLog;

/// What to do about what a newer release has written.
pub(super) const NEWER: &str = "have the newer release repair it";
/// Most that is named of what has the same layers.
const MOST_NAMED: usize = 5;

/// Where the things are that are looked at.
#[derive(Clone, Copy)]
pub(super) struct Stores<'a> {
    pub(super) snapshotter: &'a Snapshotter,
    pub(super) images: &'a ImageStore,
    pub(super) containers: &'a Containers,
}

/// A merged view, and whose it is.
pub(super) struct KnownView {
    /// In words.
    pub(super) of: String,
    /// What has it, or another of its chain, mounted.
    mounted: Vec<SnapshotInfo>,
    snapshots: Vec<String>,
    images: Vec<String>,
    /// The lowest first.
    layers: Vec<LayerName>,
}

impl Stores<'_> {
    /// Merged views that are damaged.
    pub(super) fn views(&self, observer: &dyn Observer) -> Result<Vec<api::Fault>, Status> {
        let bad = self.snapshotter.packed_layers().verify_views(observer)?;
        if bad.is_empty() {
            return Ok(Vec::new());
        }
        let views = self.known_views()?;
        let faults = bad.into_iter().map(|view| {
            let mut known = views.describe(view.key, view.layers);
            known.mounted.retain(|user| {
                let reads = |mount| self.snapshotter.reads_view(mount, &view.path);
                user.mount.as_ref().is_some_and(reads)
            });
            let mounted = known.mounted.iter();
            let mounted: Vec<_> = mounted.map(|user| self.words(user.owner, &user.key)).collect();
            let mounted = listed(&mounted);
            let (kind, problem, advice) = match (view.replaced, mounted.as_str()) {
                (true, "") => (
                    "mount",
                    format!("{}, and somebody has it mounted still", view.error.problem()),
                    "`fuser` with that path names the process, a plyfs that plyd does not know: unmount what it serves".to_owned(),
                ),
                (true, mounted) => (
                    "mount",
                    format!(
                        "{}, and what had it mounted before another took its place keeps it: {mounted}",
                        view.error.problem(),
                    ),
                    self.how_to_mount_again(&known.mounted),
                ),
                (false, "") => (
                    "view",
                    view.error.problem(),
                    "`snapctl system repair` builds it again".to_owned(),
                ),
                (false, mounted) => (
                    "view",
                    view.error.problem(),
                    format!("`snapctl system repair` builds it again, below what has it mounted or, where that cannot be, for the next mount: {mounted}"),
                ),
            };
            api::Fault {
                kind: kind.to_owned(),
                file: shown_path(&view.path),
                problem,
                advice,
                of: known.of,
                snapshots: known.snapshots,
                images: known.images,
                layers: known.layers.iter().map(ToString::to_string).collect(),
                ..api::Fault::default()
            }
        });
        Ok(faults.collect())
    }

    /// What to do so that these read another merged view than they do.
    fn how_to_mount_again(&self, mounted: &[SnapshotInfo]) -> String {
        let again = mounted.iter().map(|user| {
            let (of, key) = (self.words(user.owner, &user.key), &user.key);
            match (user.owner, &user.mount) {
                (Owner::Container, _) => {
                    let named = self.containers.named(key);
                    let name = named.map_or_else(|| key.clone(), |(_, name)| name);
                    format!("stop the container {name} and start it again")
                }
                // It keeps its mount when the container ends.
                (Owner::Containerd, Some(mount)) => format!(
                    "stop the container on {of}, unmount {} (umount(8)), and start it again",
                    mount.path.display()
                ),
                (Owner::Image | Owner::Snapctl, Some(mount)) => format!(
                    "unmount {of} wherever it is bound to, {} last (umount(8)), and have it mounted anew with `snapctl snapshot mounts`",
                    mount.path.display()
                ),
                (_, None) => format!("have {of} mounted anew"),
            }
        });
        listed_by(&again.collect::<Vec<_>>(), "; ")
    }

    /// Records that cannot be used, or are gone, but for those of layers. `advice` is what is said of what to do.
    pub(super) fn records(
        &self,
        advice: impl Fn(&Damaged) -> &'static str,
    ) -> Result<Vec<api::Fault>, Status> {
        let mut faults = Vec::new();
        for unusable in self.snapshotter.damaged_records()? {
            let of = match unusable.of {
                Some(of) => self.words(of.owner, &of.key),
                None => "a snapshot".to_owned(),
            };
            let record = unusable.damaged;
            faults.push(api::Fault {
                on_top: self.words_for_all(&unusable.on_top),
                ..record_fault(&record, of, advice(&record))
            });
        }
        for (record, of) in self.images.damaged_records().map_err(Status::from)? {
            faults.push(api::Fault {
                on_top: self.containers.of_image(&record.id).unwrap_or_default(),
                ..record_fault(&record, of, advice(&record))
            });
        }
        for (record, of) in self.containers.damaged_records().map_err(Status::from)? {
            faults.push(record_fault(&record, of, advice(&record)));
        }
        for (record, of) in self.missing_layers()? {
            faults.push(record_fault(&record, of, advice(&record)));
        }
        for record in self.snapshotter.packed_layers().damaged_records()? {
            if record.id.parse::<LayerName>().is_err() {
                let advice = "no layer has that name; delete the file";
                faults.push(record_fault(&record, String::new(), advice));
            }
        }
        Ok(faults)
    }

    /// How many records cannot be used, those of layers too. A directory of them that cannot be read counts as one, for there is
    /// no better number; verification fails and says why.
    pub(super) fn damaged_records(&self) -> u64 {
        let of_layers = self.snapshotter.packed_layers().count_damaged_records();
        let of_snapshots = self.snapshotter.count_damaged_records();
        let of_images = self.images.damaged_records();
        let missing = self.images.missing_layers();
        let of_containers = self.containers.damaged_records();
        let counts = [
            of_layers.map_err(Status::from),
            of_snapshots.map_err(Status::from),
            of_images.map(|all| all.len()).map_err(Status::from),
            missing.map(|all| all.len()).map_err(Status::from),
            of_containers.map(|all| all.len()).map_err(Status::from),
        ];
        let counts = counts.into_iter().map(|count| {
            count.unwrap_or_else(|status| {
                tracing::warn!(
                    problem = status.message(),
                    "cannot count the damaged records"
                );
                1
            })
        });
        counts.sum::<usize>() as u64
    }

    /// Whose the merged views are.
    pub(super) fn known_views(&self) -> Result<KnownViews<'_>, Status> {
        let mut by_key: HashMap<ViewKey, Vec<SnapshotInfo>> = HashMap::new();
        for snapshot in self.snapshotter.list(None)? {
            by_key.entry(key_of(&snapshot)).or_default().push(snapshot);
        }
        let mut images: HashMap<String, Vec<String>> = HashMap::new();
        for (image, chain_ids) in self.images.chains() {
            if let Some(top) = chain_ids.last() {
                images.entry(top.clone()).or_default().push(shown(&image));
            }
        }
        Ok(KnownViews {
            stores: *self,
            by_key,
            images,
        })
    }

    /// Snapshots that build on one, in words, those of containers first. Layers of known images are left out, for what they build on
    /// is told to be of these.
    fn words_for_all(&self, snapshots: &[ParentRef]) -> String {
        let chains = self.images.chains();
        let of_images: HashSet<&str> = chains
            .iter()
            .flat_map(|(_, chain_ids)| chain_ids.iter().map(String::as_str))
            .collect();
        let mut others: Vec<_> = snapshots
            .iter()
            .filter(|of| of.owner != Owner::Image || !of_images.contains(&*of.key))
            .collect();
        others.sort_by_key(|of| of.owner != Owner::Container);
        let words = others.iter().map(|of| self.words(of.owner, &of.key));
        listed(&words.collect::<Vec<_>>())
    }

    /// A snapshot in words.
    pub(super) fn words(&self, owner: Owner, key: &str) -> String {
        match owner {
            Owner::Container => {
                let named = self.containers.named(key);
                let name = named.map_or_else(|| key.to_owned(), |(_, name)| name);
                format!("the root of the container {name}")
            }
            Owner::Image => {
                let images: Vec<_> = self
                    .images
                    .chains()
                    .into_iter()
                    .filter(|(_, chain_ids)| chain_ids.iter().any(|of| of == key))
                    .map(|(image, _)| shown(&image))
                    .collect();
                match images.is_empty() {
                    true => format!("the layer with the chain id {key}"),
                    false => format!("the layer with the chain id {key} of {}", listed(&images)),
                }
            }
            Owner::Snapctl => format!("the snapshot {key}"),
            Owner::Containerd => format!("containerd's snapshot {key}"),
        }
    }
}

/// Whose the merged views are.
pub(super) struct KnownViews<'a> {
    stores: Stores<'a>,
    by_key: HashMap<ViewKey, Vec<SnapshotInfo>>,
    /// Names by the chain ids of all their layers.
    images: HashMap<String, Vec<String>>,
}

impl KnownViews<'_> {
    /// The chains of the views, each the lowest layer first.
    pub(super) fn chains(&self) -> HashMap<ViewKey, Vec<LayerName>> {
        let chains = self.by_key.iter();
        let layers = |users: &[SnapshotInfo]| {
            users
                .first()
                .map(|user| user.packed_layers.iter().rev().copied().collect())
        };
        chains
            .filter_map(|(key, users)| Some((*key, layers(users)?)))
            .collect()
    }

    /// Whose the view of that key is. `told` are its layers, the lowest first, as it says itself.
    pub(super) fn describe(&self, key: ViewKey, told: Option<Vec<LayerName>>) -> KnownView {
        let users = self.by_key.get(&key).map_or(&[][..], Vec::as_slice);
        let images: Vec<String> = users
            .iter()
            .filter(|user| user.owner == Owner::Image)
            .filter_map(|user| self.images.get(&user.key))
            .flatten()
            .cloned()
            .collect();
        let in_words = |user: &SnapshotInfo| self.stores.words(user.owner, &user.key);
        let mut of: Vec<String> = images
            .iter()
            .map(|name| format!("the image {name}"))
            .collect();
        if of.is_empty() {
            of = users.iter().map(in_words).collect();
        }
        let mounted = users.iter().filter(|user| user.mount.is_some());
        let mounted = mounted.cloned().collect();
        let layers = match users.first() {
            Some(user) => user.packed_layers.iter().rev().copied().collect(),
            None => told.unwrap_or_default(),
        };
        let whose = match of.is_empty() {
            true => "a chain that no snapshot has".to_owned(),
            false => listed(&of),
        };
        let short: Vec<_> = layers
            .iter()
            .map(|layer| layer.to_string()[..12].to_owned())
            .collect();
        let which = match (short.len(), layers.is_empty()) {
            (_, true) => String::new(),
            (1, _) => format!(" (layer {})", short[0]),
            _ => format!(" (layers {})", short.join(", ")),
        };
        KnownView {
            of: format!("the merged view of {whose}{which}"),
            mounted,
            snapshots: users.iter().map(|user| user.key.clone()).collect(),
            images,
            layers,
        }
    }
}

/// A record that cannot be used.
fn record_fault(damaged: &Damaged, of: String, advice: &str) -> api::Fault {
    api::Fault {
        kind: "record".to_owned(),
        file: shown_path(&damaged.path),
        problem: damaged.fact(),
        advice: advice.to_owned(),
        of,
        newer: damaged.newer,
        ..api::Fault::default()
    }
}

/// The key of the view that a mount of the snapshot shows.
pub(super) fn key_of(snapshot: &SnapshotInfo) -> ViewKey {
    let layers: Vec<LayerName> = snapshot.packed_layers.iter().rev().copied().collect();
    ViewKey::of(&layers)
}

/// What is told of a fault of what is no layer's. `advice` says what to do.
pub(super) fn pack_fault(fault: &store::verify::Fault, advice: &str) -> api::Fault {
    use store::Error::{Damaged, Duplicate, Io, Unsupported};
    let newer = matches!(fault.error, Unsupported { .. });
    let advice = if newer { NEWER } else { advice };
    let file = match &fault.error {
        Io { path, .. }
        | Damaged { path, .. }
        | Duplicate { path, .. }
        | Unsupported { path, .. } => shown_path(path),
        _ => String::new(),
    };
    api::Fault {
        kind: kind_of(fault).to_owned(),
        file,
        problem: fault.error.problem(),
        advice: advice.to_owned(),
        newer,
        ..api::Fault::default()
    }
}

/// What kind of thing a fault of the packed layers is about.
fn kind_of(fault: &store::verify::Fault) -> &'static str {
    match (&fault.error, fault.layer) {
        (store::Error::Record(_), _) => "record",
        (store::Error::Content { .. }, _) => "content",
        (store::Error::Duplicate { .. }, _) => "duplicate",
        (_, Some(_)) => "layer",
        (_, None) => "pack",
    }
}

fn listed(names: &[String]) -> String {
    listed_by(names, ", ")
}

fn listed_by(names: &[String], separator: &str) -> String {
    match names.len().checked_sub(MOST_NAMED) {
        Some(more @ 1..) => format!("{} and {more} more", names[..MOST_NAMED].join(separator)),
        _ => names.join(separator),
    }
}

fn shown_path(path: &Path) -> String {
    path.to_string_lossy().into_owned()
}
