//! The part of `plywood.v1.System` that says what lies below plyd's root.

use std::fs;
use std::io;
use std::path::Path;

use tonic::Status;

use super::layers::shown;
use super::pb::plywood as api;
use super::status::io_code;
use crate::image::ImageStore;
use crate::runtime::containers::Containers;
use crate::snapshotter::{Owner, SnapshotInfo, Snapshotter, Taken};
use crate::store;

/// Divides everything below `root` among images, snapshots, and what belongs to neither.
pub(super) fn disk_usage(
    root: &Path,
    snapshotter: &Snapshotter,
    store: &ImageStore,
    containers: &Containers,
) -> Result<api::DiskUsageResponse, Status> {
    let (images, chains): (Vec<_>, Vec<_>) = store.chains().into_iter().unzip();
    let space = snapshotter.space(&chains)?;
    let mut problems = space.problems;
    for (damaged, of) in store.unknown_images() {
        let why = damaged.fact();
        problems.push(format!(
            "{of} is not shown, and its layers are shown as snapshots: {why}"
        ));
    }
    let mut beside = Beside::look(root)?;
    let mut users = Vec::new();
    for (image, taken) in images.iter().zip(&space.images) {
        // Removed while this looked, with layers of it.
        if taken.logical.is_none() && !store.has(&image.id) {
            beside.unclaimed += taken.on_disk.unwrap_or_default();
            continue;
        }
        let name = shown(image);
        if taken.logical.is_none() && problems.is_empty() {
            problems.push(format!(
                "the tree of the image {name} cannot be counted: records of its layers are gone; load it again"
            ));
        }
        users.push(user("image", name, "", *taken));
    }
    users.sort_by(|a, b| a.name.cmp(&b.name));
    for (snapshot, taken) in &space.snapshots {
        users.push(of_snapshot(snapshot, *taken, containers));
    }
    let undivided = match space.unclaimed {
        Some(_) => None,
        None => Some(space.undivided + beside.unclaimed),
    };
    for (kind, on_disk) in [
        ("views", Some(space.store.views)),
        ("packs", Some(space.store.packs)),
        (
            "records",
            Some(space.records + space.store.records + beside.records),
        ),
        ("containers", Some(beside.containers)),
        (
            "uncollected",
            space.unclaimed.map(|bytes| bytes + beside.unclaimed),
        ),
        ("undivided", undivided),
        ("other", Some(beside.other + space.store.foreign)),
    ] {
        if kind == "undivided" && on_disk.is_none() {
            continue;
        }
        let taken = Taken {
            on_disk,
            ..Taken::default()
        };
        users.push(user(kind, String::new(), "", taken));
    }
    let total = users.iter().filter_map(|user| user.on_disk).sum();
    Ok(api::DiskUsageResponse {
        users,
        total,
        problems,
    })
}

fn of_snapshot(snapshot: &SnapshotInfo, taken: Taken, containers: &Containers) -> api::DiskUser {
    let owner = snapshot.owner.as_str();
    match snapshot.owner {
        Owner::Container => {
            let named = containers.named(&snapshot.key);
            let name = named.map_or_else(|| snapshot.key.clone(), |(_, name)| name);
            user("container", name, owner, taken)
        }
        _ => user("snapshot", snapshot.key.clone(), owner, taken),
    }
}

fn user(kind: &str, name: String, owner: &str, taken: Taken) -> api::DiskUser {
    api::DiskUser {
        kind: kind.to_owned(),
        name,
        owner: owner.to_owned(),
        logical: taken.logical,
        unique: taken.unique,
        on_disk: taken.on_disk,
    }
}

/// What lies beside the snapshots and the layers.
#[derive(Default)]
struct Beside {
    records: u64,
    containers: u64,
    unclaimed: u64,
    other: u64,
}

impl Beside {
    fn look(root: &Path) -> Result<Self, Status> {
        let mut beside = Self {
            records: own(root)?,
            ..Self::default()
        };
        for entry in fs::read_dir(root).map_err(failed("list", root))? {
            let entry = entry.map_err(failed("list", root))?;
            let path = entry.path();
            match entry.file_name().to_str() {
                Some(name) if Snapshotter::space_is_of().contains(&name) => {}
                Some("images") => {
                    // Archives that are being loaded.
                    let spool = path.join("spool");
                    let spooled = tree(&spool)?.saturating_sub(own(&spool)?);
                    beside.unclaimed += spooled;
                    beside.records += tree(&path)?.saturating_sub(spooled);
                }
                Some("containers") => beside.containers += tree(&path)?,
                Some("index" | "lock") => beside.records += tree(&path)?,
                _ => beside.other += tree(&path)?,
            }
        }
        Ok(beside)
    }
}

/// Bytes of a file, or of a directory and all that is in it; none if it is gone.
fn tree(path: &Path) -> Result<u64, Status> {
    store::tree_bytes(path).map_err(failed("add up", path))
}

fn own(path: &Path) -> Result<u64, Status> {
    store::own_bytes(path).map_err(failed("look at", path))
}

fn failed(action: &'static str, path: &Path) -> impl FnOnce(io::Error) -> Status {
    let path = path.display().to_string();
    move |error| Status::new(io_code(&error), format!("cannot {action} {path}: {error}"))
}
