//! What damaged layers are made whole from: layers of an archive, and blobs of containerd's content store.
//!
//! First a layer is taken in once more, where it can be had. What is lacking still is then looked for in the others, each of which is
//! read once: the layer itself may be nowhere, but a content is known by its name, whichever layer has it. A layer that the store has
//! is not read for that, since its contents are those that the store has.

use std::collections::{BTreeSet, HashMap};
use std::fs::File;
use std::io::Read;
use std::path::PathBuf;

use tonic::Status;

use super::{Patient, Patients, Repair};
use crate::grpc::content::{self, Caller};
use crate::image::{self, Phase, Progress};
use crate::snapshotter::Owner;
use crate::store::ingest::Observer;
use crate::store::layers::Expected;
use crate::store::repair::Lacking;
use crate::store::{self, LayerName};

/// Tells the client how far a layer is read.
struct Reading<'a> {
    repair: &'a Repair,
    phase: Phase,
    /// Of the layer.
    digest: &'a str,
    /// Bytes; 0 if that is not known.
    total: u64,
}

impl Observer for Reading<'_> {
    fn progress(&self, bytes: u64) {
        image::Observer::progress(
            self.repair,
            Progress {
                phase: self.phase,
                digest: self.digest.to_owned(),
                done: bytes,
                total: self.total,
            },
        );
    }

    fn cancelled(&self) -> bool {
        Observer::cancelled(self.repair)
    }
}

impl Repair {
    /// Takes damaged layers in once more that the archive has, whose layers are `archived` by their diff ids.
    pub(super) fn restore_from_archive(
        &self,
        patients: &mut Patients,
        archived: &HashMap<String, PathBuf>,
    ) {
        patients.retain(|layer, patient| {
            let known = patient.known.diff_id.clone();
            let Some((diff_id, path)) = known.and_then(|id| archived.get_key_value(&id)) else {
                patient
                    .reasons
                    .push("the archive does not have it".to_owned());
                return true;
            };
            let expected = Expected {
                blob: None,
                diff_id: Some(diff_id),
            };
            let restored =
                open(path)
                    .map_err(|error| error.to_string())
                    .and_then(|(file, total)| {
                        let reading = Reading {
                            repair: self,
                            phase: Phase::Restoring,
                            digest: diff_id,
                            total,
                        };
                        let restored = self
                            .snapshotter
                            .restore_layer(*layer, file, &expected, &reading);
                        restored.map_err(|error| error.to_string())
                    });
            !self.is_restored(*layer, patient, restored, "the archive")
        });
    }

    /// Takes damaged layers in once more of which containerd has kept the blobs.
    pub(super) fn restore_from_containerd(&self, patients: &mut Patients) -> Result<(), Status> {
        let has_blob = |patient: &Patient| patient.known.blob.is_some();
        if !patients.values().any(has_blob) {
            return Ok(());
        }
        let namespaces = self.namespaces()?;
        patients.retain(|layer, patient| {
            let Some(blob) = patient.known.blob.clone() else {
                return true;
            };
            for namespace in &namespaces {
                let expected = Expected {
                    blob: Some(&blob),
                    diff_id: None,
                };
                let reading = Reading {
                    repair: self,
                    phase: Phase::Restoring,
                    digest: &blob,
                    total: 0,
                };
                let restored = self.read_blob(namespace, &blob, |stream| {
                    self.snapshotter
                        .restore_layer(*layer, stream, &expected, &reading)
                });
                if self.is_restored(*layer, patient, restored, "containerd's content store") {
                    return false;
                }
            }
            true
        });
        Ok(())
    }

    /// Looks for contents that patients lack still in those layers of the archive that the store does not have.
    pub(super) fn pick_from_archive(
        &self,
        patients: &Patients,
        archived: &HashMap<String, PathBuf>,
    ) {
        let layers = self.snapshotter.packed_layers();
        let mut lacking = layers.lacking(patients.keys().copied());
        for (diff_id, path) in archived {
            if lacking.is_empty() || Observer::cancelled(self) {
                break;
            }
            let expected = Expected {
                blob: None,
                diff_id: Some(diff_id),
            };
            if self.has_sound(patients, layers.known(&expected)) {
                continue;
            }
            let picked = open(path)
                .map_err(store::Error::Input)
                .and_then(|(file, total)| self.pick(file, &mut lacking, diff_id, total));
            if let Err(error) = picked {
                tracing::warn!(diff_id, %error, "a layer of the archive cannot be looked through");
            }
        }
    }

    /// The same in the blobs of containerd's content store, of which nobody knows whether they are layers.
    pub(super) fn pick_from_containerd(&self, patients: &Patients) -> Result<(), Status> {
        let layers = self.snapshotter.packed_layers();
        let mut lacking = layers.lacking(patients.keys().copied());
        if lacking.is_empty() {
            return Ok(());
        }
        let mut seen = BTreeSet::new();
        for namespace in self.namespaces()? {
            let Some(caller) = Caller::of_namespace(&namespace) else {
                continue;
            };
            let listed = self.runtime.block_on(self.content.list(&caller));
            let blobs = match listed {
                Ok(blobs) => blobs,
                Err(status) => {
                    let problem = status.message();
                    tracing::warn!(
                        namespace,
                        problem,
                        "containerd's content store cannot be looked through"
                    );
                    continue;
                }
            };
            for (blob, total) in blobs {
                if lacking.is_empty() || Observer::cancelled(self) {
                    return Ok(());
                }
                let expected = Expected {
                    blob: Some(&blob),
                    diff_id: None,
                };
                // Namespaces share blobs.
                if !seen.insert(blob.clone()) || self.has_sound(patients, layers.known(&expected)) {
                    continue;
                }
                let picked = self.read_blob(&namespace, &blob, |stream| {
                    self.pick(stream, &mut lacking, &blob, total)
                });
                if let Err(problem) = picked {
                    // Most often it is a manifest or a config.
                    tracing::debug!(blob, problem, "a blob cannot be looked through");
                }
            }
        }
        Ok(())
    }

    /// Whether the store has a layer, and has found nothing wrong with it.
    fn has_sound(&self, patients: &Patients, layer: Option<LayerName>) -> bool {
        layer.is_some_and(|layer| !patients.contains_key(&layer))
    }

    fn pick(
        &self,
        stream: impl Read + Send,
        lacking: &mut Lacking,
        digest: &str,
        total: u64,
    ) -> Result<(), store::Error> {
        let before = lacking.len();
        let reading = Reading {
            repair: self,
            phase: Phase::Searching,
            digest,
            total,
        };
        let layers = self.snapshotter.packed_layers();
        layers.pick(stream, lacking, &reading)?;
        let found = before - lacking.len();
        if found > 0 {
            tracing::info!(digest, found, "contents that layers lacked were in another");
        }
        Ok(())
    }

    /// Namespaces of containerd that have snapshots here.
    fn namespaces(&self) -> Result<BTreeSet<String>, Status> {
        let snapshots = self.snapshotter.list(Some(Owner::Containerd))?;
        let namespaces = snapshots
            .into_iter()
            .filter_map(|snapshot| Some(snapshot.key.split_once('/')?.0.to_owned()));
        Ok(namespaces.collect())
    }

    /// Hands a blob of containerd's to `work`.
    fn read_blob<E: ToString>(
        &self,
        namespace: &str,
        blob: &str,
        work: impl FnOnce(content::Blob) -> Result<(), E>,
    ) -> Result<(), String> {
        let caller = Caller::of_namespace(namespace)
            .ok_or_else(|| format!("{namespace:?} is no namespace of containerd"))?;
        let (source, stream) = content::pipe();
        let (content, digest) = (self.content.clone(), blob.to_owned());
        let read = self
            .runtime
            .spawn(async move { content.read(&caller, &digest, source).await });
        let done = work(stream);
        let read = self.runtime.block_on(read);
        match (read, done) {
            // The reason, of which the other end only knows that there is one.
            (Ok(Err(status)), Err(_)) => Err(status.message().to_owned()),
            (_, done) => done.map_err(|error| error.to_string()),
        }
    }
}

/// A file, and its bytes.
fn open(path: &PathBuf) -> std::io::Result<(File, u64)> {
    let file = File::open(path)?;
    let bytes = file.metadata()?.len();
    Ok((file, bytes))
}
