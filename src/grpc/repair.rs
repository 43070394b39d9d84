//! The part of `plywood.v1.System` that makes damaged layers whole.
//!
//! Where a layer's stream comes from: an archive that the client sends, or containerd's content store.

mod mounts;
mod records;

use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::fs::File;
use std::path::PathBuf;
use std::sync::Arc;

use parking_lot::Mutex;
use tokio::runtime::Handle;
use tokio::sync::mpsc;
use tonic::Status;

use super::care;
use super::content::{self, Caller, Content};
use super::damage::{self, Stores};
use super::images::{Archive, progress_message};
use super::layers::shown;
use super::pb::plywood as api;
use crate::image::{self, ImageStore};
use crate::runtime::containers::Containers;
use crate::snapshotter::{Owner, ParentRef, SnapshotInfo, Snapshotter};
use crate::store::ingest::Observer;
use crate::store::layers::{Expected, Layers};
use crate::store::repair::{Mended, ViewCure};
use crate::store::verify::{Fault, Told};
use crate::store::{self, LayerName, ViewKey};

use api::repair_response::Event;

/// One call of Repair.
pub(super) struct Repair {
    pub(super) snapshotter: Arc<Snapshotter>,
    pub(super) images: Arc<ImageStore>,
    pub(super) containers: Containers,
    pub(super) content: Content,
    /// For what does not block.
    pub(super) runtime: Handle,
    pub(super) answers: mpsc::Sender<Result<api::RepairResponse, Status>>,
}

/// A layer that is not whole.
#[derive(Debug, Default)]
struct Patient {
    faults: Vec<Fault>,
    diff_id: Option<String>,
    blob: Option<String>,
    snapshots: Vec<ParentRef>,
    images: Vec<String>,
    /// Keys of the snapshots that build on those, the newest first.
    on_top: Vec<String>,
    /// Why it could not be fetched.
    reasons: Vec<String>,
}

type Patients = BTreeMap<LayerName, Patient>;

impl Repair {
    /// Does all of it on this thread, which may block.
    pub(super) fn run(self, archive: Option<(Archive, u64)>) {
        let repaired = self.repair(archive);
        // Also what was mended before it failed.
        let refreshed = self.refresh_mounts();
        if let Err(status) = repaired.and(refreshed) {
            // A client that has gone does not hear it.
            let _ = self.answers.blocking_send(Err(status));
        }
    }

    fn repair(&self, archive: Option<(Archive, u64)>) -> Result<(), Status> {
        match self.snapshotter.mend_index() {
            Ok(0) => {}
            Ok(lost) => self.mended(
                None,
                format!("the index had lost {lost} names, which lead to their records again"),
            ),
            Err(error) => self.tell(Event::Left(api::Fault {
                kind: "index".to_owned(),
                problem: error.to_string(),
                advice: "end plyd, delete ROOT/index, and start plyd again".to_owned(),
                ..api::Fault::default()
            })),
        }
        self.mend_records()?;
        self.mend_without_source(Layers::mend_before_layers)?;
        self.restore_records()?;
        let layers = self.snapshotter.packed_layers();
        let all = self.examine()?.into_iter();
        let (newer, mut patients): (Patients, Patients) =
            all.partition(|(layer, _)| layers.is_newer(*layer));
        if let Some((mut archive, total)) = archive
            && self.needs_archive(&patients)?
        {
            let restored = self
                .images
                .with_layers(&mut archive, total, self, |layers| {
                    self.restore_from_archive(&mut patients, layers);
                    self.learn_blobs(layers);
                });
            let ((), records, all) = restored.map_err(Status::from)?;
            for of in records {
                let what = format!("the record of {of} was made anew from the archive");
                self.mended(None, what);
            }
            if let Err(error) = all {
                tracing::warn!(%error, "not all records of images can be made anew");
                self.tell(Event::Left(api::Fault {
                    kind: "record".to_owned(),
                    problem: format!("not all records of images can be made anew: {error}"),
                    advice: "mend that, then repeat this".to_owned(),
                    ..api::Fault::default()
                }));
            }
        }
        self.restore_from_containerd(&mut patients)?;
        // A pack without a sound table stays until nothing is missing that might be in it.
        self.mend_without_source(Layers::mend)?;
        self.snapshotter.settle_records();
        self.look_again(&mut patients);
        let others_have = patients.values().any(Patient::has_source) || !newer.is_empty();
        for (layer, patient) in patients {
            self.tell_what_is_left(layer, &patient.advice(others_have), patient);
        }
        for (layer, patient) in newer {
            self.tell_what_is_left(layer, "have the newer release repair it", patient);
        }
        let stores = self.stores();
        for view in stores.views(self)? {
            self.tell(Event::Left(api::Fault {
                advice: "it can be neither restored nor removed, as plyd's log says".to_owned(),
                ..view
            }));
        }
        for record in stores.records()? {
            self.tell(Event::Left(record));
        }
        let mounted = self.snapshotter.packed_layers().unreadable_mounted();
        let mounted: Vec<String> = mounted.iter().map(ToString::to_string).collect();
        for fault in self.snapshotter.packed_layers().verify_packs() {
            let advice = match fault.error {
                store::Error::Unsupported { .. } => "have the newer release repair it".to_owned(),
                _ if mounted.is_empty() => {
                    "it stays for what may be in it, or as plyd's log says; mend what else is left, then repeat this".to_owned()
                }
                _ => format!(
                    "it stays as long as somebody may need it who has a damaged view mounted (`fuser` with that path names the plyfs): end what runs on that, then repeat this; {}",
                    mounted.join("; ")
                ),
            };
            self.tell(Event::Left(api::Fault {
                kind: damage::kind_of(&fault).to_owned(),
                problem: fault.error.problem(),
                advice,
                ..api::Fault::default()
            }));
        }
        Ok(())
    }

    fn stores(&self) -> Stores<'_> {
        Stores {
            snapshotter: &self.snapshotter,
            images: &self.images,
            containers: &self.containers,
        }
    }

    fn mend_without_source(
        &self,
        mend: impl FnOnce(&Layers, &HashMap<ViewKey, Vec<LayerName>>, &dyn Observer) -> Mended,
    ) -> Result<(), Status> {
        let stores = self.stores();
        let views = stores.known_views()?;
        let mended = mend(self.snapshotter.packed_layers(), &views.chains(), self);
        for layer in mended.rewritten {
            let what = format!("the record of the layer {layer} was written again as it was");
            self.mended(Some(layer), what);
        }
        self.claim_blobs(&mended.records);
        for view in mended.views {
            let known = views.describe(view.key, None);
            let (of, path) = (known.of, view.path.display());
            let what = match view.cure {
                ViewCure::Restored => format!("{of} was damaged, and {path} is what it was again"),
                ViewCure::Removed => format!(
                    "{of} was damaged, and {path} was removed; it is built again when it is needed"
                ),
                ViewCure::RemovedBelow => format!(
                    "{of} was damaged, and {path} was removed; what has it mounted keeps the damaged one until it is mounted again: {}",
                    or_unknown(&known.mounted)
                ),
            };
            self.mended(None, what);
        }
        for pack in mended.put_back {
            let pack = pack.display();
            self.mended(
                None,
                format!("the pack {pack} was not in its place; it was written anew from what plyd had open of it"),
            );
        }
        for pack in mended.packs {
            let pack = pack.display();
            self.mended(
                None,
                format!("the damaged pack {pack} was written anew as others, with all that is sound in it"),
            );
        }
        for error in mended.errors {
            tracing::warn!(%error, "something cannot be mended without a source");
        }
        Ok(())
    }

    /// Whether an archive might mend something.
    fn needs_archive(&self, patients: &Patients) -> Result<bool, Status> {
        Ok(!patients.is_empty()
            || !self.snapshotter.packed_layers().without_blob().is_empty()
            || !self
                .images
                .damaged_records()
                .map_err(Status::from)?
                .is_empty())
    }

    /// Reads everything and answers what is not sound, also layers that have no record any more.
    fn examine(&self) -> Result<Patients, Status> {
        let layers = self.snapshotter.packed_layers();
        let found = Found {
            repair: self,
            faults: Mutex::default(),
        };
        layers.verify(true, &found);
        let mut patients = Patients::new();
        for fault in found.faults.into_inner() {
            // What is left of packs is told in the end.
            if let Some(layer) = fault.layer {
                patients.entry(layer).or_default().faults.push(fault);
            }
        }
        for layer in care::unknown_layers(&self.snapshotter) {
            if patients.contains_key(&layer) {
                continue;
            }
            let mut faults = layers.verify_layer(layer, true, self);
            if faults.is_empty() {
                // All there but the record, which could not be made anew.
                faults.push(Fault {
                    layer: Some(layer),
                    path: None,
                    error: store::Error::NoLayer {
                        layer: layer.to_string(),
                    },
                });
            }
            patients.insert(
                layer,
                Patient {
                    faults,
                    ..Patient::default()
                },
            );
        }
        let mut users = self.snapshotter.users_of_layers()?;
        let images = self.images_by_chain();
        let all = match patients.is_empty() {
            true => Vec::new(),
            false => self.snapshotter.list(None)?,
        };
        for (layer, patient) in &mut patients {
            if let Some(record) = layers.get(*layer) {
                patient.diff_id = record.diff_id;
                patient.blob = record.blob;
            }
            patient.snapshots = users.remove(layer).unwrap_or_default();
            patient.on_top = on_top_of(&patient.snapshots, &all);
            for snapshot in &patient.snapshots {
                if snapshot.owner == Owner::Image
                    && let Some((diff_id, names)) = images.get(&snapshot.key)
                {
                    patient.diff_id.get_or_insert_with(|| diff_id.clone());
                    patient.images.extend(names.iter().cloned());
                }
            }
            patient.images.sort();
            patient.images.dedup();
        }
        Ok(patients)
    }

    /// Diff ids and names of images by the chain ids of their layers.
    fn images_by_chain(&self) -> HashMap<String, (String, Vec<String>)> {
        let mut by_chain: HashMap<String, (String, Vec<String>)> = HashMap::new();
        for (image, chain_ids) in self.images.chains() {
            for (chain_id, diff_id) in chain_ids.into_iter().zip(&image.diff_ids) {
                let (_, names) = by_chain
                    .entry(chain_id)
                    .or_insert_with(|| (diff_id.clone(), Vec::new()));
                names.push(shown(&image));
            }
        }
        by_chain
    }

    fn restore_from_archive(&self, patients: &mut Patients, layers: &HashMap<String, PathBuf>) {
        patients.retain(|layer, patient| {
            let path = patient.diff_id.as_ref().and_then(|id| layers.get(id));
            let Some(path) = path else {
                patient
                    .reasons
                    .push("the archive does not have it".to_owned());
                return true;
            };
            let expected = Expected {
                blob: None,
                diff_id: patient.diff_id.as_deref(),
            };
            let restored = File::open(path)
                .map_err(|error| error.to_string())
                .and_then(|file| {
                    let restored = self
                        .snapshotter
                        .restore_layer(*layer, file, &expected, self);
                    restored.map_err(|error| error.to_string())
                });
            !self.is_restored(*layer, patient, restored, "the archive")
        });
    }

    fn restore_from_containerd(&self, patients: &mut Patients) -> Result<(), Status> {
        if patients.values().all(|patient| patient.blob.is_none()) {
            return Ok(());
        }
        let snapshots = self.snapshotter.list(Some(Owner::Containerd))?;
        let namespaces: BTreeSet<String> = snapshots
            .into_iter()
            .filter_map(|snapshot| Some(snapshot.key.split_once('/')?.0.to_owned()))
            .collect();
        patients.retain(|layer, patient| {
            let Some(blob) = patient.blob.clone() else {
                return true;
            };
            for namespace in &namespaces {
                let restored = self.fetch(*layer, namespace, &blob);
                if self.is_restored(*layer, patient, restored, "containerd's content store") {
                    return false;
                }
            }
            true
        });
        Ok(())
    }

    /// Restores a layer from a blob of containerd's.
    fn fetch(&self, layer: LayerName, namespace: &str, blob: &str) -> Result<(), String> {
        let caller = Caller::of_namespace(namespace)
            .ok_or_else(|| format!("{namespace:?} is no namespace of containerd"))?;
        let (source, stream) = content::pipe();
        let (content, digest) = (self.content.clone(), blob.to_owned());
        let read = self
            .runtime
            .spawn(async move { content.read(&caller, &digest, source).await });
        let expected = Expected {
            blob: Some(blob),
            diff_id: None,
        };
        let restored = self
            .snapshotter
            .restore_layer(layer, stream, &expected, self);
        let read = self.runtime.block_on(read);
        match (read, restored) {
            // The reason, of which the other end only knows that there is one.
            (Ok(Err(status)), Err(_)) => Err(status.message().to_owned()),
            (_, restored) => restored.map_err(|error| error.to_string()),
        }
    }

    /// Notes what came of a try. What was taken in has to be found whole, too.
    fn is_restored(
        &self,
        layer: LayerName,
        patient: &mut Patient,
        restored: Result<(), String>,
        source: &str,
    ) -> bool {
        match restored {
            Ok(()) => {
                let layers = self.snapshotter.packed_layers();
                patient.faults = layers.verify_layer(layer, true, self);
                if patient.faults.is_empty() {
                    let what = format!("the layer {layer} was restored from {source}");
                    self.mended(Some(layer), what);
                    return true;
                }
                patient
                    .reasons
                    .push(format!("{source} did not make it whole"));
            }
            Err(problem) => patient.reasons.push(problem),
        }
        false
    }

    /// Takes out those that have become whole with others: layers share contents.
    fn look_again(&self, patients: &mut Patients) {
        let layers = self.snapshotter.packed_layers();
        patients.retain(|layer, patient| {
            if layers.get(*layer).is_none() {
                return true;
            }
            patient.faults = layers.verify_layer(*layer, true, self);
            let is_whole = patient.faults.is_empty();
            if is_whole {
                let what = format!("what the layer {layer} lacked came with other layers");
                self.mended(Some(*layer), what);
            }
            !is_whole
        });
    }

    fn tell_what_is_left(&self, layer: LayerName, advice: &str, patient: Patient) {
        let snapshots: Vec<String> = patient
            .snapshots
            .into_iter()
            .map(|snapshot| snapshot.key)
            .collect();
        for fault in patient.faults {
            self.tell(Event::Left(api::Fault {
                kind: damage::kind_of(&fault).to_owned(),
                layer: layer.to_string(),
                path: fault.path.unwrap_or_default(),
                problem: fault.error.problem(),
                snapshots: snapshots.clone(),
                images: patient.images.clone(),
                advice: advice.to_owned(),
                ..api::Fault::default()
            }));
        }
    }

    fn mended(&self, layer: Option<LayerName>, what: String) {
        tracing::info!("repair: {what}");
        self.tell(Event::Mended(api::Mended {
            what,
            layer: layer.map(|layer| layer.to_string()).unwrap_or_default(),
        }));
    }

    fn tell(&self, event: Event) {
        // Whoever has gone is noticed by `cancelled`.
        let _ = self
            .answers
            .blocking_send(Ok(api::RepairResponse { event: Some(event) }));
    }
}

fn or_unknown(mounted: &str) -> &str {
    match mounted {
        "" => "a plyfs that plyd does not know",
        mounted => mounted,
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

impl Patient {
    /// Whether it can be had again from somewhere.
    fn has_source(&self) -> bool {
        !self.images.is_empty() || self.blob.is_some() || self.diff_id.is_some()
    }

    /// Why it is left, and what to do. `others_have`: other layers that are left can be had again, and may have its contents.
    fn advice(&self, others_have: bool) -> String {
        let why = match self.reasons.as_slice() {
            [] => String::new(),
            reasons => format!("{}; ", reasons.join("; ")),
        };
        if self.snapshots.is_empty() {
            return "nothing uses it; end plyd, delete the record of that name in ROOT/store/records, and start plyd again".to_owned();
        }
        let namespace = self
            .snapshots
            .iter()
            .filter(|snapshot| snapshot.owner == Owner::Containerd)
            .find_map(|snapshot| snapshot.key.split_once('/'));
        match (&self.images[..], namespace, &self.blob, &self.diff_id) {
            ([image, ..], ..) => format!(
                "{why}get the archive of the image {image} and give it to `snapctl system repair -i`"
            ),
            ([], Some((namespace, _)), Some(blob), _) => format!(
                "{why}fetch the blob {blob} into containerd's content store (`ctr -n {namespace} content fetch` of its image does), then repeat this"
            ),
            ([], _, _, Some(diff_id)) => format!(
                "{why}get the archive of an image with the layer {diff_id} and give it to `snapctl system repair -i`"
            ),
            ([], _, _, None) if others_have => format!(
                "{why}it was made here, but other layers may have what it lacks: mend what else is left first, then repeat this"
            ),
            ([], _, _, None) if self.on_top.is_empty() => format!(
                "{why}nothing else has it, for it was made here; remove the snapshot and make it again"
            ),
            ([], _, _, None) => format!(
                "{why}nothing else has it, for it was made here; save what can be read of the snapshots that build on it, remove them in this order: {}, then remove it and make it again",
                self.on_top.join(", ")
            ),
        }
    }
}

impl Observer for Repair {
    fn cancelled(&self) -> bool {
        self.answers.is_closed()
    }
}

impl image::Observer for Repair {
    fn progress(&self, progress: image::Progress) {
        // No room: the next one will do.
        let _ = self.answers.try_send(Ok(api::RepairResponse {
            event: Some(Event::Progress(progress_message(progress))),
        }));
    }

    fn cancelled(&self) -> bool {
        self.answers.is_closed()
    }
}

/// Collects faults.
struct Found<'a> {
    repair: &'a Repair,
    faults: Mutex<Vec<Fault>>,
}

impl Observer for Found<'_> {
    fn cancelled(&self) -> bool {
        self.repair.answers.is_closed()
    }
}

impl Told for Found<'_> {
    fn fault(&self, fault: Fault) {
        self.faults.lock().push(fault);
    }

    fn sum(&self, layers: u64, total: u64, objects: u64, bytes: u64) {
        self.repair.tell(Event::Checked(api::VerifyProgress {
            layers,
            layers_total: total,
            objects,
            bytes,
        }));
    }
}
