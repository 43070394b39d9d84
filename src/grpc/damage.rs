//! Damage that is nobody's contents, in words: merged views, and the records of snapshots, images and containers.

mod gone;
mod layers;
mod log;
mod put_back;

use std::collections::HashMap;
use std::path::Path;

use tonic::Status;

use super::layers::shown;
use super::pb::plywood as api;
use crate::image::ImageStore;
use crate::runtime::containers::Containers;
use crate::snapshotter::{Owner, SnapshotInfo, Snapshotter};
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
    /// What has it mounted, in words; empty if nothing has.
    pub(super) mounted: String,
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
            let known = views.describe(view.key, view.layers);
            let (kind, problem, advice) = match (view.replaced, known.mounted.as_str()) {
                (true, mounted) => (
                    "mount",
                    format!(
                        "{}, and what had it mounted before another took its place keeps it: {}",
                        view.error.problem(),
                        or_unknown(mounted)
                    ),
                    "mount that again: stop and start a container, or unmount a snapshot, STATE/mounts/ID/root last, and mount it anew".to_owned(),
                ),
                (false, "") => (
                    "view",
                    view.error.problem(),
                    "`snapctl system repair` builds it again".to_owned(),
                ),
                (false, mounted) => (
                    "view",
                    view.error.problem(),
                    format!("`snapctl system repair` builds it again; it is mounted by {mounted}"),
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

    /// Records that cannot be used, or are gone, but for those of layers. `advice` is what is said of what to do.
    pub(super) fn records(
        &self,
        advice: impl Fn(&Damaged) -> &'static str,
    ) -> Result<Vec<api::Fault>, Status> {
        let mut damaged = Vec::new();
        for (record, snapshot) in self.snapshotter.damaged_records()? {
            let of = match snapshot {
                Some(of) => self.words(of.owner, &of.key),
                None => "a snapshot".to_owned(),
            };
            damaged.push((record, of));
        }
        damaged.extend(self.images.damaged_records().map_err(Status::from)?);
        damaged.extend(self.missing_layers()?);
        let of_containers = self.containers.damaged_records().map_err(Status::from)?;
        damaged.extend(of_containers);
        let faults = damaged
            .into_iter()
            .map(|(record, of)| record_fault(&record, of, advice(&record)));
        let mut faults: Vec<_> = faults.collect();
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
        let mounted: Vec<String> = mounted.map(in_words).collect();
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
            mounted: listed(&mounted),
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
    use store::Error::{Damaged, Io, Unsupported};
    let newer = matches!(fault.error, Unsupported { .. });
    let advice = if newer { NEWER } else { advice };
    let file = match &fault.error {
        Io { path, .. } | Damaged { path, .. } | Unsupported { path, .. } => shown_path(path),
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

/// What has a view mounted, in words.
fn or_unknown(mounted: &str) -> &str {
    match mounted {
        "" => "a plyfs that plyd does not know",
        mounted => mounted,
    }
}

/// What kind of thing a fault of the packed layers is about.
fn kind_of(fault: &store::verify::Fault) -> &'static str {
    match (&fault.error, fault.layer) {
        (store::Error::Record(_), _) => "record",
        (store::Error::Content { .. }, _) => "content",
        (_, Some(_)) => "layer",
        (_, None) => "pack",
    }
}

fn listed(names: &[String]) -> String {
    match names.len().checked_sub(MOST_NAMED) {
        Some(more @ 1..) => format!("{} and {more} more", names[..MOST_NAMED].join(", ")),
        _ => names.join(", "),
    }
}

fn shown_path(path: &Path) -> String {
    path.to_string_lossy().into_owned()
}
