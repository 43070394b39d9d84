//! The part of `plywood.v1.System` that looks after the packed layers.

use std::collections::BTreeSet;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use tokio::sync::mpsc;
use tonic::Status;

use super::pb::plywood as api;
use crate::snapshotter::Snapshotter;
use crate::store::ingest::Observer;
use crate::store::verify::{Fault, Told};
use crate::store::{self, LayerName};

/// Answers that wait for the client.
pub(super) const ANSWERS_WAITING: usize = 32;

pub(super) fn collect(snapshotter: &Snapshotter, dry_run: bool) -> api::CollectResponse {
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

pub(super) fn verify(
    snapshotter: &Snapshotter,
    deep: bool,
    answers: mpsc::Sender<Result<api::VerifyResponse, Status>>,
) {
    let client = Client {
        snapshotter,
        answers,
        gone: AtomicBool::new(false),
    };
    for layer in unknown_layers(snapshotter) {
        client.fault(Fault {
            layer: Some(layer),
            path: None,
            error: store::Error::NoLayer {
                layer: layer.to_string(),
            },
        });
    }
    snapshotter.packed_layers().verify(deep, &client);
}

/// Layers that have no record that can be used, though something needs them or a record is there.
pub(super) fn unknown_layers(snapshotter: &Snapshotter) -> BTreeSet<LayerName> {
    let layers = snapshotter.packed_layers();
    let mut unknown: BTreeSet<_> = layers.damaged().into_iter().collect();
    match snapshotter.users_of_layers() {
        Ok(users) => unknown.extend(users.into_keys()),
        Err(error) => tracing::warn!(%error, "cannot tell which layers are needed"),
    }
    unknown.retain(|layer| layers.get(*layer).is_none());
    unknown
}

struct Client<'a> {
    snapshotter: &'a Snapshotter,
    answers: mpsc::Sender<Result<api::VerifyResponse, Status>>,
    gone: AtomicBool,
}

impl Client<'_> {
    fn answer(&self, event: api::verify_response::Event) {
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
        let keys = fault.layer.map_or_else(
            || Ok(Vec::new()),
            |layer| self.snapshotter.keys_of_layer(layer),
        );
        let snapshots = match keys {
            Ok(keys) => keys,
            Err(error) => {
                tracing::warn!(%error, "cannot tell whose layer is damaged");
                Vec::new()
            }
        };
        self.answer(api::verify_response::Event::Fault(api::Fault {
            layer: fault
                .layer
                .map(|layer| layer.to_string())
                .unwrap_or_default(),
            path: fault.path.unwrap_or_default(),
            problem: fault.error.problem(),
            snapshots,
            ..api::Fault::default()
        }));
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
    snapshotter: Arc<Snapshotter>,
    deep: bool,
    answers: mpsc::Sender<Result<api::VerifyResponse, Status>>,
) {
    tokio::task::spawn_blocking(move || verify(&snapshotter, deep, answers));
}
