//! Packed layers that are not whole: whose they are, and from where they can be had again.

use std::collections::HashMap;

use tonic::Status;

use super::{Stores, kind_of, record_fault};
use crate::grpc::layers::shown;
use crate::grpc::pb::plywood as api;
use crate::snapshotter::{Owner, ParentRef, SnapshotInfo};
use crate::store::record::{self, Damaged};
use crate::store::verify::Fault;
use crate::store::{self, LayerName};

/// Whose the layers are.
pub(in crate::grpc) struct KnownLayers {
    users: HashMap<LayerName, Vec<ParentRef>>,
    /// Diff ids and names of images by the chain ids of their layers.
    images: HashMap<String, (String, Vec<String>)>,
    /// In order of creation.
    snapshots: Vec<SnapshotInfo>,
    /// Of some snapshots nobody knows what they have.
    is_incomplete: bool,
}

/// A layer, and whose it is.
#[derive(Debug, Default)]
pub(in crate::grpc) struct KnownLayer {
    pub(in crate::grpc) diff_id: Option<String>,
    pub(in crate::grpc) blob: Option<String>,
    snapshots: Vec<ParentRef>,
    images: Vec<String>,
    /// Keys of the snapshots that build on those, the newest first.
    on_top: Vec<String>,
    /// It may be that of others, too.
    is_incomplete: bool,
}

impl Stores<'_> {
    /// Whose the layers are.
    pub(in crate::grpc) fn known_layers(&self) -> Result<KnownLayers, Status> {
        let mut images: HashMap<String, (String, Vec<String>)> = HashMap::new();
        for (image, chain_ids) in self.images.chains() {
            for (chain_id, diff_id) in chain_ids.into_iter().zip(&image.diff_ids) {
                let (_, names) = images
                    .entry(chain_id)
                    .or_insert_with(|| (diff_id.clone(), Vec::new()));
                names.push(shown(&image));
            }
        }
        Ok(KnownLayers {
            users: self.snapshotter.users_of_layers()?,
            images,
            snapshots: self.snapshotter.list(None)?,
            is_incomplete: self.has_unknown_snapshots()?,
        })
    }

    /// A layer, and whose it is.
    pub(in crate::grpc) fn describe(&self, layer: LayerName, all: &KnownLayers) -> KnownLayer {
        let record = self.snapshotter.packed_layers().get(layer);
        let (diff_id, blob) = record.map_or((None, None), |record| (record.diff_id, record.blob));
        let snapshots = all.users.get(&layer).cloned().unwrap_or_default();
        let mut known = KnownLayer {
            diff_id,
            blob,
            on_top: on_top_of(&snapshots, &all.snapshots),
            snapshots,
            images: Vec::new(),
            is_incomplete: all.is_incomplete,
        };
        let of_images = known.snapshots.iter();
        let of_images = of_images.filter(|snapshot| snapshot.owner == Owner::Image);
        for (diff_id, names) in of_images.filter_map(|snapshot| all.images.get(&snapshot.key)) {
            known.diff_id.get_or_insert_with(|| diff_id.clone());
            known.images.extend(names.iter().cloned());
        }
        known.images.sort();
        known.images.dedup();
        known
    }
}

impl KnownLayer {
    /// What is told of a fault of it. `advice` says what to do.
    pub(in crate::grpc) fn fault(&self, fault: &Fault, advice: String) -> api::Fault {
        let of_record = damaged_record(fault)
            .map(|damaged| record_fault(damaged, String::new(), &advice))
            .unwrap_or_default();
        let keys = self.snapshots.iter().map(|snapshot| snapshot.key.clone());
        let (object, cause) = match &fault.error {
            store::Error::Content { object, cause, .. } => {
                (object.clone().unwrap_or_default(), cause.clone())
            }
            _ => Default::default(),
        };
        let layer = fault.layer.map(|layer| layer.to_string());
        api::Fault {
            kind: kind_of(fault).to_owned(),
            layer: layer.unwrap_or_default(),
            path: fault.path.clone().unwrap_or_default(),
            problem: fault.error.problem(),
            cause,
            object,
            snapshots: keys.collect(),
            images: self.images.clone(),
            advice,
            ..of_record
        }
    }

    /// What to do about a fault that no repair has seen yet.
    pub(in crate::grpc) fn remedy(&self, fault: &Fault) -> String {
        if let Some(damaged) = damaged_record(fault) {
            return damaged.remedy.to_owned();
        }
        if self.snapshots.is_empty() {
            return self.without_users().to_owned();
        }
        match self.source("then repeat it") {
            Some(source) => format!("run `snapctl system repair`; if that leaves it, {source}"),
            None => "run `snapctl system repair`, which takes what other layers have of it, or says what to remove".to_owned(),
        }
    }

    /// Why a repair leaves it, and what to do. `others_have`: other layers that are left can be had again, and may have its
    /// contents.
    pub(in crate::grpc) fn advice(&self, reasons: &[String], others_have: bool) -> String {
        if self.snapshots.is_empty() {
            return self.without_users().to_owned();
        }
        let why: String = reasons.iter().map(|reason| format!("{reason}; ")).collect();
        let what = self.source("then repeat this").unwrap_or_else(|| match others_have {
            true => "it was made here, but other layers may have what it lacks: mend what else is left first, then repeat this".to_owned(),
            false => format!("nothing else has it, for it was made here; {}", self.removal("make it")),
        });
        format!("{why}{what}")
    }

    /// Whether it can be had again from somewhere.
    pub(in crate::grpc) fn has_source(&self) -> bool {
        !self.images.is_empty() || self.blob.is_some() || self.diff_id.is_some()
    }

    /// What to do about one that is no snapshot's, as far as that can be told.
    fn without_users(&self) -> &'static str {
        match self.is_incomplete {
            true => {
                "whose it is cannot be told while the record of a snapshot cannot be used: mend that, then run `snapctl system repair`"
            }
            false => {
                "nothing uses it; end plyd, delete the record of that name in store/records below its root, and start plyd again"
            }
        }
    }

    /// How to give it up and `make` it again.
    fn removal(&self, make: &str) -> String {
        match &self.on_top[..] {
            [] => format!("remove the snapshot and {make} again"),
            on_top => format!(
                "save what can be read of the snapshots that build on it, remove them in this order: {}, then remove it and {make} again",
                on_top.join(", ")
            ),
        }
    }

    /// From where it can be had again, and what to do for that, in the end `then`.
    fn source(&self, then: &str) -> Option<String> {
        let namespace = self
            .snapshots
            .iter()
            .filter(|snapshot| snapshot.owner == Owner::Containerd)
            .find_map(|snapshot| snapshot.key.split_once('/'));
        match (&self.images[..], namespace, &self.blob, &self.diff_id) {
            ([image, ..], ..) => Some(format!(
                "get the archive of the image {image} and give it to `snapctl system repair -i`"
            )),
            ([], Some((namespace, _)), Some(blob), _) => Some(format!(
                "fetch the blob {blob} into containerd's content store (`ctr -n {namespace} content fetch` of its image does), {then}"
            )),
            ([], _, _, Some(diff_id)) => Some(format!(
                "get the archive of an image with the layer {diff_id} and give it to `snapctl system repair -i`"
            )),
            // Of an image that containerd has unpacked through the mount, most often.
            ([], Some(_), None, None) => Some(format!(
                "get the archive of its image, or of another with the same files, and give it to `snapctl system repair -i`; if no archive has what it lacks, as none has the index of a layer that containerd unpacked itself, {}",
                self.removal("make it, or import its image,")
            )),
            ([], None, _, None) => None,
        }
    }
}

fn damaged_record(fault: &Fault) -> Option<&Damaged> {
    match &fault.error {
        store::Error::Record(record::Error::Damaged(damaged)) => Some(damaged),
        _ => None,
    }
}

/// Keys of the snapshots among `all`, which are in order of creation, that build on these, the newest first.
fn on_top_of(snapshots: &[ParentRef], all: &[SnapshotInfo]) -> Vec<String> {
    let mut below = snapshots.to_vec();
    let mut on_top = Vec::new();
    for info in all {
        if info
            .parent
            .as_ref()
            .is_some_and(|parent| below.contains(parent))
        {
            below.push(ParentRef {
                owner: info.owner,
                key: info.key.clone(),
            });
            on_top.push(info.key.clone());
        }
    }
    on_top.reverse();
    on_top
}
