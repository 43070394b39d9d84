//! `plywood.v1.Layers`: the packed layers, to look at and to take out.

use std::collections::{HashMap, HashSet};
use std::io::{self, Write};
use std::sync::Arc;

use tokio::sync::mpsc;
use tokio_stream::wrappers::ReceiverStream;
use tonic::{Request, Response, Status};

use super::pb::plywood as api;
use super::pieces::Pieces;
use super::status::blocking;
use crate::image::{Image, ImageStore};
use crate::runtime::containers::Containers;
use crate::snapshotter::{Owner, ParentRef, Snapshotter};
use crate::store::layer::index::{Action, LayerIndex};
use crate::store::layers::LayerRecord;
use crate::store::{self, LayerName};

/// Messages that wait for the client: what is made faster waits.
const MESSAGES_WAITING: usize = 4;
/// Bytes of a stream in one message.
const PIECE: usize = 256 << 10;
/// Entries in one message: with the longest paths and targets some 2 MiB, below gRPC's limit of 4.
const ENTRIES: u32 = 256;

/// The service.
pub(super) struct Service {
    snapshotter: Arc<Snapshotter>,
    images: Arc<ImageStore>,
    containers: Containers,
}

impl Service {
    pub(super) fn new(
        snapshotter: Arc<Snapshotter>,
        images: Arc<ImageStore>,
        containers: Containers,
    ) -> Self {
        Self {
            snapshotter,
            images,
            containers,
        }
    }

    /// Has `work` answer a stream from a thread that may block; it ends early when the client has gone.
    fn stream<T: Send + 'static>(
        &self,
        reference: String,
        work: impl FnOnce(&Snapshotter, api::PackedLayer, LayerName, &Answers<T>) -> Result<(), Status>
        + Send
        + 'static,
    ) -> Response<ReceiverStream<Result<T, Status>>> {
        let (answers, answered) = mpsc::channel(MESSAGES_WAITING);
        let (snapshotter, images) = (Arc::clone(&self.snapshotter), Arc::clone(&self.images));
        let containers = self.containers.clone();
        tokio::task::spawn_blocking(move || {
            let answers = Answers(answers);
            let told = find(&snapshotter, &reference).and_then(|(name, record)| {
                let _held = snapshotter.hold_layer(name)?;
                let users = Users::read(&snapshotter, &images, &containers)?;
                work(&snapshotter, users.describe(name, record), name, &answers)
            });
            if let Err(status) = told {
                // A client that has gone does not hear it.
                let _ = answers.0.blocking_send(Err(status));
            }
        });
        Response::new(ReceiverStream::new(answered))
    }
}

/// Where answers go.
struct Answers<T>(mpsc::Sender<Result<T, Status>>);

impl<T> Answers<T> {
    fn send(&self, answer: T) -> Result<(), Status> {
        let sent = self.0.blocking_send(Ok(answer));
        sent.map_err(|_| Status::cancelled("the client has gone"))
    }
}

#[tonic::async_trait]
impl api::layers_server::Layers for Service {
    type InspectStream = ReceiverStream<Result<api::InspectLayerResponse, Status>>;
    type ExportStream = ReceiverStream<Result<api::ExportLayerResponse, Status>>;

    async fn list(
        &self,
        _request: Request<api::ListLayersRequest>,
    ) -> Result<Response<api::ListLayersResponse>, Status> {
        let (snapshotter, images) = (Arc::clone(&self.snapshotter), Arc::clone(&self.images));
        let containers = self.containers.clone();
        blocking(move || {
            let users = Users::read(&snapshotter, &images, &containers)?;
            let packed = snapshotter.packed_layers();
            let layers = packed.list().into_iter();
            Ok::<_, Status>(Response::new(api::ListLayersResponse {
                layers: layers
                    .map(|(name, record)| users.describe(name, record))
                    .collect(),
                unusable_records: packed.damaged().len() as u64,
            }))
        })
        .await
    }

    async fn inspect(
        &self,
        request: Request<api::InspectLayerRequest>,
    ) -> Result<Response<Self::InspectStream>, Status> {
        use api::inspect_layer_response::Part;

        let api::InspectLayerRequest { r#ref, entries } = request.into_inner();
        Ok(
            self.stream(r#ref, move |snapshotter, layer, name, answers| {
                let answer = |part| answers.send(api::InspectLayerResponse { part: Some(part) });
                let index = snapshotter.packed_layers().index(name)?;
                answer(Part::Layer(layer))?;
                let mut next = 0;
                while entries && next < index.len() {
                    let end = index.len().min(next.saturating_add(ENTRIES));
                    let some = (next..end).map(|number| entry(&index, number));
                    let entries = some.collect::<Result<_, _>>()?;
                    answer(Part::Entries(api::LayerEntries { entries }))?;
                    next = end;
                }
                Ok(())
            }),
        )
    }

    async fn export(
        &self,
        request: Request<api::ExportLayerRequest>,
    ) -> Result<Response<Self::ExportStream>, Status> {
        use api::export_layer_response::Part;

        let reference = request.into_inner().r#ref;
        Ok(self.stream(reference, |snapshotter, layer, name, answers| {
            let answer = |part| answers.send(api::ExportLayerResponse { part: Some(part) });
            answer(Part::Layer(layer))?;
            let mut pieces = Pieces::new(PIECE, |piece| {
                let sent = answer(Part::Data(piece));
                sent.map_err(|status| io::Error::new(io::ErrorKind::BrokenPipe, status.message()))
            });
            snapshotter.packed_layers().export(name, &mut pieces)?;
            pieces
                .flush()
                .map_err(|error| store::Error::Output(error).into())
        }))
    }
}

/// The layer that a reference means.
fn find(snapshotter: &Snapshotter, reference: &str) -> Result<(LayerName, LayerRecord), Status> {
    let layers = snapshotter.packed_layers();
    let mut found = layers.list();
    found.retain(|(name, record)| fits(reference, &name.to_string(), record.diff_id.as_deref()));
    let is_damaged = |name: &LayerName| fits(reference, &name.to_string(), None);
    match found.len() {
        0 | 1 => found.pop().ok_or_else(|| {
            match layers.damaged().into_iter().find(is_damaged) {
                Some(name) => layers.without(name).into(),
                None => Status::not_found(format!(
                    "there is no packed layer {reference:?}; `snapctl layer ls` names those that exist"
                )),
            }
        }),
        count => Err(Status::invalid_argument(format!(
            "{reference:?} fits {count} layers; give more digits of the name or the diff id"
        ))),
    }
}

/// Whether a reference means the layer of this name and diff id, of which it may be the first digits.
fn fits(reference: &str, name: &str, diff_id: Option<&str>) -> bool {
    const ALGORITHM: &str = "sha256:";
    let digits = diff_id.and_then(|id| id.strip_prefix(ALGORITHM));
    let (of_name, of_diff_id) = match reference.strip_prefix(ALGORITHM) {
        Some(digits) => ("", digits),
        None => (reference, reference),
    };
    let begins = |whole: &str, with: &str| !with.is_empty() && whole.starts_with(with);
    begins(name, of_name) || digits.is_some_and(|digits| begins(digits, of_diff_id))
}

/// Who has which layer.
struct Users {
    snapshots: HashMap<LayerName, Vec<ParentRef>>,
    /// Names of the images by the chain ids of their layers.
    images: HashMap<String, Vec<String>>,
    /// Snapshots of others than images that stand on each layer.
    standing: HashMap<LayerName, Vec<api::LayerUser>>,
}

impl Users {
    fn read(
        snapshotter: &Snapshotter,
        images: &ImageStore,
        containers: &Containers,
    ) -> Result<Self, Status> {
        let mut by_chain: HashMap<String, Vec<String>> = HashMap::new();
        for (image, chain_ids) in images.chains() {
            let name = shown(&image);
            for chain_id in chain_ids {
                by_chain.entry(chain_id).or_default().push(name.clone());
            }
        }
        let mut standing: HashMap<LayerName, Vec<api::LayerUser>> = HashMap::new();
        let all = snapshotter.list(None)?.into_iter();
        for snapshot in all.filter(|snapshot| snapshot.owner != Owner::Image) {
            let name = match snapshot.owner {
                Owner::Container => containers.named(&snapshot.key).map(|(_, name)| name),
                _ => None,
            };
            let user = api::LayerUser {
                name: name.unwrap_or_default(),
                ..user(snapshot.owner, &snapshot.key)
            };
            for layer in snapshot.packed_layers {
                standing.entry(layer).or_default().push(user.clone());
            }
        }
        Ok(Self {
            snapshots: snapshotter.users_of_layers()?,
            images: by_chain,
            standing,
        })
    }

    fn describe(&self, name: LayerName, record: LayerRecord) -> api::PackedLayer {
        let snapshots = self.snapshots.get(&name).map_or(&[][..], Vec::as_slice);
        let mut met = HashSet::new();
        let images = snapshots
            .iter()
            .filter(|snapshot| snapshot.owner == Owner::Image)
            .filter_map(|snapshot| self.images.get(&snapshot.key))
            .flatten()
            .filter(|image| met.insert(*image));
        let images: Vec<String> = images.cloned().collect();
        let is_only_kept =
            images.is_empty() && snapshots.iter().all(|user| user.owner == Owner::Image);
        let standing = self.standing.get(&name).filter(|_| is_only_kept);
        api::PackedLayer {
            name: name.to_string(),
            diff_id: record.diff_id.unwrap_or_default(),
            blob: record.blob.unwrap_or_default(),
            tar_bytes: record.tar_bytes,
            entries: record.entries.into(),
            objects: record.objects.into(),
            content_bytes: record.content_bytes,
            index_bytes: record.index_bytes,
            images,
            snapshots: snapshots
                .iter()
                .map(|ParentRef { owner, key }| user(*owner, key))
                .collect(),
            kept_by: standing.cloned().unwrap_or_default(),
        }
    }
}

fn user(owner: Owner, key: &str) -> api::LayerUser {
    api::LayerUser {
        owner: owner.to_string(),
        key: key.to_owned(),
        name: String::new(),
    }
}

/// What an image is called.
pub(super) fn shown(image: &Image) -> String {
    image.names.first().unwrap_or(&image.id).clone()
}

fn entry(index: &LayerIndex, number: u32) -> Result<api::LayerEntry, store::Error> {
    use api::layer_entry::Action as Told;

    let entry = index.entry(number)?;
    let inode = &entry.inode;
    let kind = inode.kind();
    let has_target = entry.action == Action::Link || kind == libc::S_IFLNK;
    let is_device = matches!(kind, libc::S_IFCHR | libc::S_IFBLK);
    let (major, minor) = if is_device { inode.device() } else { (0, 0) };
    let mut path = vec![b'/'];
    path.extend(index.path(entry.path)?.join(&b'/'));
    Ok(api::LayerEntry {
        action: match entry.action {
            Action::Make | Action::MakeExactly => Told::Make,
            Action::Link => Told::Link,
            Action::Remove => Told::Remove,
            Action::Clear => Told::Clear,
        }
        .into(),
        path,
        mode: inode.mode.into(),
        uid: inode.uid,
        gid: inode.gid,
        size: if kind == libc::S_IFREG { inode.size } else { 0 },
        mtime: inode.mtime.sec,
        mtime_nanos: inode.mtime.nsec,
        target: match has_target {
            true => index.target(inode)?.to_vec(),
            false => Vec::new(),
        },
        major,
        minor,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_layer_is_meant_by_the_first_digits_of_its_name_or_diff_id() {
        let (name, diff_id) = ("ab".repeat(32), format!("sha256:{}", "cd".repeat(32)));
        for (reference, of_name, of_diff_id) in [
            ("a", true, false),
            (&*name, true, false),
            ("abc", false, false),
            ("cdc", false, true),
            ("sha256:c", false, true),
            (&*diff_id, false, true),
            ("sha256:a", false, false),
            ("sha256:", false, false),
            ("sha256", false, false),
            ("s", false, false),
            ("", false, false),
        ] {
            let both = fits(reference, &name, Some(&diff_id));
            assert_eq!(both, of_name || of_diff_id, "{reference}");
            assert_eq!(fits(reference, &name, None), of_name, "{reference}");
        }
    }
}
