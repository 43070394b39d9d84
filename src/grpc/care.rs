//! The part of `plywood.v1.System` that collects what no layer needs, and looks for damage.

use std::collections::BTreeSet;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, OnceLock};

use parking_lot::Mutex;
use tokio::runtime::Handle;
use tokio::sync::mpsc;
use tonic::Status;

use super::damage::{self, DamageLog, KnownLayer, KnownLayers, Stores};
use super::pb::plywood as api;
use crate::image::ImageStore;
use crate::runtime::containers::Containers;
use crate::snapshotter::Snapshotter;
use crate::store::ingest::Observer;
use crate::store::verify::{Fault, Told};
use crate::store::{self, LayerName};

/// Answers that wait for the client.
pub(super) const ANSWERS_WAITING: usize = 32;
/// What to do about what is damaged, if nobody knows more.
const REMEDY: &str = "`snapctl system repair` mends it, or says what to do";

pub(super) fn collect(
    snapshotter: &Snapshotter,
    images: &ImageStore,
    dry_run: bool,
) -> api::CollectResponse {
    if !dry_run {
        // What was kept for a record may be nobody's by now.
        images.sweep_and_log();
    }
    let collected = snapshotter.packed_layers().collect(dry_run, &());
    api::CollectResponse {
        orphans: collected
            .orphans
            .iter()
            .map(|orphan| api::Orphan {
                path: orphan.path.to_string_lossy().into_owned(),
                bytes: orphan.bytes,
                reason: orphan.reason.as_str().to_owned(),
            })
            .collect(),
        errors: collected.errors.iter().map(ToString::to_string).collect(),
    }
}

fn verify(
    stores: Stores<'_>,
    deep: bool,
    answers: mpsc::Sender<Result<api::VerifyResponse, Status>>,
) {
    let client = Client {
        stores,
        layers: OnceLock::new(),
        answers,
        gone: AtomicBool::new(false),
        log: Mutex::new(DamageLog::new("verify found")),
    };
    if let Err(status) = client.verify(deep) {
        // A client that has gone does not hear it.
        let _ = client.answers.blocking_send(Err(status));
    }
}

impl Client<'_> {
    fn verify(&self, deep: bool) -> Result<(), Status> {
        let stores = self.stores;
        let put_back = stores.take_put_back(&Handle::current())?;
        for what in &put_back {
            tracing::info!("verify: {what}");
        }
        if !put_back.is_empty() {
            // It may have been what was lacking.
            stores.images.sweep_and_log();
            stores.snapshotter.refresh_mounts_and_log();
        }
        let layers = stores.snapshotter.packed_layers();
        let with_damaged_record = layers.damaged();
        for layer in unknown_layers(stores.snapshotter) {
            // Of these the record is told.
            if with_damaged_record.contains(&layer) {
                continue;
            }
            self.fault(Fault {
                layer: Some(layer),
                path: None,
                error: store::Error::NoLayer {
                    layer: layer.to_string(),
                },
            });
        }
        for fault in stores
            .records(|record| record.remedy)?
            .into_iter()
            .chain(stores.views(self)?)
        {
            self.answer(api::verify_response::Event::Fault(fault));
        }
        layers.verify(deep, self)?;
        for note in layers.foreign()? {
            self.answer(api::verify_response::Event::Note(note));
        }
        Ok(())
    }
}

/// Layers that have no record that can be used, though something needs them or a record is there.
pub(super) fn unknown_layers(snapshotter: &Snapshotter) -> BTreeSet<LayerName> {
    let layers = snapshotter.packed_layers();
    let unrecorded = |mut unknown: BTreeSet<LayerName>| {
        unknown.retain(|layer| layers.get(*layer).is_none());
        unknown
    };
    let needed = || match snapshotter.users_of_layers() {
        Ok(users) => users.into_keys().collect(),
        Err(error) => {
            tracing::warn!(%error, "cannot tell which layers are needed");
            BTreeSet::new()
        }
    };
    let mut unknown = unrecorded(needed());
    if !unknown.is_empty() {
        // The last snapshot of a layer may have gone between the two, and the layer with it.
        let needed = needed();
        unknown.retain(|layer| needed.contains(layer));
    }
    unknown.extend(layers.damaged());
    unrecorded(unknown)
}

struct Client<'a> {
    /// Written before the client hears that this is the end.
    log: Mutex<DamageLog>,
    stores: Stores<'a>,
    /// Read when the first layer is found damaged.
    layers: OnceLock<Option<KnownLayers>>,
    answers: mpsc::Sender<Result<api::VerifyResponse, Status>>,
    gone: AtomicBool,
}

impl Client<'_> {
    /// A layer, and whose it is, if that can be told.
    fn known(&self, layer: LayerName) -> Option<KnownLayer> {
        let all = self.layers.get_or_init(|| {
            let all = self.stores.known_layers();
            all.inspect_err(|status| {
                let problem = status.message();
                tracing::warn!(problem, "cannot tell whose layer is damaged");
            })
            .ok()
        });
        Some(self.stores.describe(layer, all.as_ref()?))
    }

    fn answer(&self, event: api::verify_response::Event) {
        if let api::verify_response::Event::Fault(fault) = &event {
            self.log.lock().add(fault);
        }
        let answer = api::VerifyResponse { event: Some(event) };
        if self.answers.blocking_send(Ok(answer)).is_err() {
            self.gone.store(true, Ordering::Release);
        }
    }
}

impl Observer for Client<'_> {
    fn cancelled(&self) -> bool {
        self.gone.load(Ordering::Acquire) || self.answers.is_closed()
    }
}

impl Told for Client<'_> {
    fn fault(&self, fault: Fault) {
        let known = fault.layer.map(|layer| self.known(layer));
        let told = match known {
            Some(Some(known)) => known.fault(&fault, known.remedy(&fault)),
            Some(None) => KnownLayer::default().fault(&fault, REMEDY.to_owned()),
            None => damage::pack_fault(&fault, REMEDY),
        };
        self.answer(api::verify_response::Event::Fault(told));
    }

    fn sum(&self, layers: u64, total: u64, objects: u64, bytes: u64) {
        self.answer(api::verify_response::Event::Progress(api::VerifyProgress {
            layers,
            layers_total: total,
            objects,
            bytes,
        }));
    }
}

/// Starts `verify` on a thread that may block.
pub(super) fn start_verify(
    (snapshotter, images, containers): (Arc<Snapshotter>, Arc<ImageStore>, Containers),
    deep: bool,
    answers: mpsc::Sender<Result<api::VerifyResponse, Status>>,
) {
    tokio::task::spawn_blocking(move || {
        let stores = Stores {
            snapshotter: &snapshotter,
            images: &images,
            containers: &containers,
        };
        verify(stores, deep, answers);
    });
}
