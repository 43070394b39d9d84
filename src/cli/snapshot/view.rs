//! What the commands of `snapctl snapshot` print.

use std::collections::BTreeMap;
use std::os::unix::ffi::OsStringExt;

use serde::Serialize;

use super::super::time::{age, rfc3339};
use crate::grpc::pb::plywood::diff_entry::Change;
use crate::grpc::pb::plywood::{DiffEntry, Snapshot, SnapshotKind};

/// A snapshot as JSON.
#[derive(Serialize)]
pub struct SnapshotView {
    pub id: String,
    pub key: String,
    pub parent: Option<String>,
    pub kind: &'static str,
    pub owner: String,
    pub labels: BTreeMap<String, String>,
    pub created: Option<String>,
    pub updated: Option<String>,
    pub mountpoint: Option<String>,
    pub plyfs_pid: Option<u32>,
    pub upper_dir: Option<String>,
    pub layer_dirs: Vec<String>,
    pub packed_layers: Vec<String>,
    /// Of a mounted one, where it was asked for.
    pub damaged_contents: Option<u64>,
    /// As above.
    pub damaged_view: Option<bool>,
    #[serde(skip)]
    pub age: String,
}

impl From<Snapshot> for SnapshotView {
    fn from(snapshot: Snapshot) -> Self {
        let some = |text: String| Some(text).filter(|text| !text.is_empty());
        Self {
            kind: match snapshot.kind() {
                SnapshotKind::View => "view",
                SnapshotKind::Active => "active",
                SnapshotKind::Committed => "committed",
                SnapshotKind::Unspecified => "unknown",
            },
            age: age(snapshot.created.as_ref()),
            created: snapshot.created.as_ref().map(rfc3339),
            updated: snapshot.updated.as_ref().map(rfc3339),
            id: snapshot.id,
            key: snapshot.key,
            parent: some(snapshot.parent),
            owner: snapshot.owner,
            labels: snapshot.labels.into_iter().collect(),
            mountpoint: some(snapshot.mountpoint),
            plyfs_pid: Some(snapshot.plyfs_pid).filter(|pid| *pid != 0),
            upper_dir: some(snapshot.upper_dir),
            layer_dirs: snapshot.layer_dirs,
            packed_layers: snapshot.packed_layers,
            damaged_contents: snapshot.damaged_contents,
            damaged_view: snapshot.damaged_view,
        }
    }
}

/// A mount as JSON.
#[derive(Serialize)]
pub struct MountView {
    pub r#type: String,
    pub source: String,
    pub options: Vec<String>,
}

/// Disk space as JSON.
#[derive(Serialize)]
pub struct UsageView {
    pub size: u64,
    pub inodes: u64,
}

/// What `mount -t overlay` is to be told, as JSON.
#[derive(Serialize)]
pub struct ExportView {
    pub options: String,
}

/// A changed path as JSON.
#[derive(Serialize)]
pub struct DiffView {
    pub change: &'static str,
    pub path: String,
    /// The path's bytes in hexadecimal, where they are not UTF-8 and `path` only resembles them.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub path_hex: Option<String>,
}

/// A change as it stands before its path in a list.
pub fn letter(change: Change) -> u8 {
    match change {
        Change::Added => b'A',
        Change::Modified => b'M',
        Change::Deleted => b'D',
        Change::Unspecified => b'?',
    }
}

/// A change of plyd's.
pub fn diff_view(entry: DiffEntry) -> DiffView {
    let change = match entry.change() {
        Change::Added => "added",
        Change::Modified => "modified",
        Change::Deleted => "deleted",
        Change::Unspecified => "unknown",
    };
    match std::ffi::OsString::from_vec(entry.path).into_string() {
        Ok(path) => DiffView {
            change,
            path,
            path_hex: None,
        },
        Err(bytes) => DiffView {
            change,
            path: bytes.to_string_lossy().into_owned(),
            path_hex: Some(
                bytes
                    .into_vec()
                    .iter()
                    .map(|byte| format!("{byte:02x}"))
                    .collect(),
            ),
        },
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn paths_that_are_not_utf8_keep_their_bytes() {
        let view = diff_view(DiffEntry {
            change: Change::Added.into(),
            path: b"/a\xff".to_vec(),
        });
        assert_eq!(view.path, "/a\u{fffd}");
        assert_eq!(view.path_hex.as_deref(), Some("2f61ff"));
    }
}
