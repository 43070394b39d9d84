//! What users call a snapshot that has another name: the image or the container that it belongs to.

use std::sync::Arc;

use crate::image::{Image, ImageStore};
use crate::runtime::containers::Containers;
use crate::snapshotter::{Kind, Owner, SnapshotInfo};

/// Whoever has names of their own for snapshots.
#[derive(Clone)]
pub(super) struct Named {
    pub(super) images: Arc<ImageStore>,
    pub(super) containers: Containers,
}

impl Named {
    /// The image that `name` means.
    pub(super) fn image(&self, name: &str) -> Option<Image> {
        // That it is not there, or not to be read, is for whoever asks for an image.
        Some(self.images.inspect(name).ok()?.image)
    }

    /// Which snapshot was meant by the name of a container or an image, as words for a sentence.
    pub(super) fn snapshot_of(&self, name: &str) -> Option<String> {
        if let Some((id, name)) = self.containers.named(name) {
            return Some(format!(
                "that of the container {name} has the key {id} and --owner container"
            ));
        }
        let key = self.image(name)?.parent()?.key;
        Some(format!(
            "that of the image {name} has the key {key} and --owner image"
        ))
    }

    /// Whom a snapshot belongs to.
    pub(super) fn holder(&self, snapshot: &SnapshotInfo) -> String {
        match snapshot.owner {
            Owner::Container => match self.containers.named(&snapshot.key) {
                Some((_, name)) => format!("the container {name}"),
                None => "a container".to_owned(),
            },
            Owner::Image => "an image".to_owned(),
            owner => owner.to_string(),
        }
    }

    /// Who commits a snapshot that `snapctl snapshot commit` leaves alone, and how, as words for a sentence.
    pub(super) fn how_to_commit(&self, snapshot: &SnapshotInfo) -> String {
        let (holder, key) = (self.holder(snapshot), &snapshot.key);
        if snapshot.kind == Kind::Committed {
            return format!(
                "belongs to {holder} and is committed already; make one on it: `snapctl snapshot prepare NEW {key}`"
            );
        }
        let how = match (snapshot.owner, containerd_name(key)) {
            (Owner::Container, _) => format!(
                "and cannot be committed; to keep what that has changed, make one of your own on its image, copy what `snapctl snapshot diff {key}` lists into it, and commit that: `snapctl snapshot prepare NEW IMAGE`"
            ),
            (_, Some((namespace, name))) => format!(
                "and is committed there: `ctr -n {namespace} snapshots --snapshotter plywood commit NEW {name}`"
            ),
            _ => "and is committed there, with `ctr snapshots --snapshotter plywood commit`"
                .to_owned(),
        };
        format!("belongs to {holder} {how}")
    }

    /// Who removes a snapshot that `snapctl snapshot rm` leaves alone, and how, as words for a sentence.
    pub(super) fn how_to_remove(&self, snapshot: &SnapshotInfo) -> String {
        let holder = self.holder(snapshot);
        let how = match snapshot.owner {
            Owner::Container => match self.containers.named(&snapshot.key) {
                Some((_, name)) => format!("and goes with it: `snapctl rm {name}`"),
                None => "and goes with it".to_owned(),
            },
            Owner::Image => {
                "and goes with the last image that needs it: `snapctl image rm`".to_owned()
            }
            _ => match containerd_name(&snapshot.key) {
                Some((namespace, name)) => format!(
                    "and is removed there: with the image or container that needs it (`crictl rmi`, `crictl rm`, `ctr -n {namespace} images rm`), or by `ctr -n {namespace} snapshots --snapshotter plywood rm {name}`"
                ),
                None => {
                    "and is removed there, with `ctr snapshots --snapshotter plywood rm`".to_owned()
                }
            },
        };
        format!("belongs to {holder} {how}")
    }
}

/// containerd gives a snapshot `NAME` of a name space the key `NAMESPACE/NUMBER/NAME`.
fn containerd_name(key: &str) -> Option<(&str, &str)> {
    let (namespace, rest) = key.split_once('/')?;
    let (number, name) = rest.split_once('/')?;
    let is_number = !number.is_empty() && number.bytes().all(|byte| byte.is_ascii_digit());
    (is_number && !name.is_empty()).then_some((namespace, name))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn keys_of_containerd_have_a_name_in_a_name_space() {
        for (key, parts) in [
            ("default/12/work", Some(("default", "work"))),
            ("k8s.io/3/sha256:00/a", Some(("k8s.io", "sha256:00/a"))),
            ("default/x/work", None),
            ("default//work", None),
            ("work", None),
        ] {
            assert_eq!(containerd_name(key), parts, "{key}");
        }
    }
}
