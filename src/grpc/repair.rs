//! The part of `plywood.v1.System` that makes damaged layers whole.

mod mounts;
mod records;
mod sources;

use std::collections::{BTreeMap, HashMap};
use std::sync::Arc;

use parking_lot::Mutex;
use tokio::runtime::Handle;
use tokio::sync::mpsc;
use tonic::Status;

use super::care;
use super::content::Content;
use super::damage::{self, DamageLog, KnownLayer, Stores};
use super::images::{Archive, progress_message};
use super::pb::plywood as api;
use crate::image::{self, ImageStore};
use crate::runtime::containers::Containers;
use crate::snapshotter::Snapshotter;
use crate::store::ingest::Observer;
use crate::store::layers::Layers;
use crate::store::repair::{Mended, ViewCure};
use crate::store::verify::{Fault, Told};
use crate::store::{self, LayerName, ViewKey};

use api::repair_response::Event;

/// One call of Repair.
pub(super) struct Repair {
    /// What is left. Written before the client hears that this is the end.
    pub(super) log: Mutex<DamageLog>,
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
    known: KnownLayer,
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
        for what in self.stores().take_put_back(&self.runtime)? {
            self.mended(None, what);
        }
        match self.snapshotter.mend_index() {
            Ok(0) => {}
            Ok(1) => self.mended(
                None,
                "the index had lost a name, which leads to its record again".to_owned(),
            ),
            Ok(lost) => self.mended(
                None,
                format!("the index had lost {lost} names, which lead to their records again"),
            ),
            Err(error) => self.tell(Event::Left(api::Fault {
                kind: "index".to_owned(),
                problem: error.to_string(),
                advice:
                    "end plyd, delete the directory `index` below its root, and start plyd again"
                        .to_owned(),
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
                    self.restore_from_containerd(&mut patients)?;
                    self.pick_from_archive(&patients, layers);
                    self.learn_blobs(layers);
                    Ok(())
                });
            let (done, records, all): (Result<(), Status>, _, _) =
                restored.map_err(Status::from)?;
            done?;
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
        } else {
            self.restore_from_containerd(&mut patients)?;
        }
        self.pick_from_containerd(&patients)?;
        // A pack without a sound table stays until nothing is missing that might be in it.
        self.mend_without_source(Layers::mend)?;
        self.images.sweep_and_log();
        self.look_again(&mut patients);
        let others_have =
            patients.values().any(|patient| patient.known.has_source()) || !newer.is_empty();
        for patient in patients.values() {
            let advice = patient.known.advice(&patient.reasons, others_have);
            self.tell_what_is_left(patient, &advice);
        }
        for patient in newer.values() {
            self.tell_what_is_left(patient, damage::NEWER);
        }
        let stores = self.stores();
        for mut view in stores.views(self)? {
            if view.kind == "view" {
                "it can be neither restored nor removed, as plyd's log says"
                    .clone_into(&mut view.advice);
            }
            self.tell(Event::Left(view));
        }
        for record in stores.records(|record| record.left)? {
            self.tell(Event::Left(record));
        }
        let mounted = self.snapshotter.packed_layers().unreadable_mounted();
        let mounted: Vec<String> = mounted.iter().map(ToString::to_string).collect();
        for fault in self.snapshotter.packed_layers().verify_packs() {
            let advice = match mounted.is_empty() {
                true => "it stays for what may be in it, or as plyd's log says; mend what else is left, then repeat this".to_owned(),
                false => format!(
                    "it stays as long as somebody may need it who has a damaged view mounted (`fuser` with that path names the plyfs): end what runs on that, then repeat this; {}",
                    mounted.join("; ")
                ),
            };
            self.tell(Event::Left(damage::pack_fault(&fault, &advice)));
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
                ViewCure::Removed | ViewCure::RemovedBelow => format!(
                    "{of} was damaged, and {path} was removed; it is built again when it is needed"
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
        for path in mended.duplicates {
            let path = path.display();
            self.mended(
                None,
                format!("{path} had a bad copy of a content beside a good one, and was removed; all that is sound in it is elsewhere"),
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
            || self.stores().has_unknown_snapshots()?
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
        layers.verify(true, &found)?;
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
        if !patients.is_empty() {
            let (stores, all) = (self.stores(), self.stores().known_layers()?);
            for (layer, patient) in &mut patients {
                patient.known = stores.describe(*layer, &all);
            }
        }
        Ok(patients)
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

    fn tell_what_is_left(&self, patient: &Patient, advice: &str) {
        for fault in &patient.faults {
            let told = patient.known.fault(fault, advice.to_owned());
            self.tell(Event::Left(told));
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
        if let Event::Left(fault) = &event {
            self.log.lock().add(fault);
        }
        // Whoever has gone is noticed by `cancelled`.
        let _ = self
            .answers
            .blocking_send(Ok(api::RepairResponse { event: Some(event) }));
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
