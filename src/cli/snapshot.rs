//! `snapctl snapshot`: snapshots of every owner, to look at and to work on by hand.

use std::collections::{BTreeMap, HashMap};
use std::os::unix::ffi::OsStringExt;
use std::path::PathBuf;

use clap::{Args, Subcommand};
use serde::Serialize;
use tonic::{Code, Status};

use super::args::utf8;
use super::client::Client;
use super::error::{Error, Result};
use super::output::{self, Cut, ListFormat, lines_out, or_dash, printable, report, size};
use super::time::{age, rfc3339};
use super::tree;
use crate::grpc::pb::plywood::diff_entry::Change;
use crate::grpc::pb::plywood::{
    CommitRequest, DiffEntry, DiffRequest, ExportOverlayRequest, InfoRequest, ListRequest,
    MaterializeRequest, Mount, MountsRequest, PrepareRequest, RemoveRequest, Snapshot,
    SnapshotKind, UsageRequest,
};

/// Whom the snapshots belong to that are made and committed here.
const OWNER: &str = "snapctl";

/// The commands of `snapctl snapshot`.
#[derive(Debug, Subcommand)]
pub enum Command {
    /// List snapshots
    #[command(
        visible_alias = "list",
        after_help = "Examples:
  snapctl snapshot ls
  snapctl snapshot ls --owner containerd --json"
    )]
    Ls(LsArgs),
    /// Show one snapshot
    #[command(after_help = "Examples:
  snapctl snapshot info work --json | jq -r .upper_dir")]
    Info(InfoArgs),
    /// Make a writable snapshot on a committed one, on an image, or on nothing
    #[command(after_help = "Examples:
  snapctl snapshot prepare work busybox:latest
  snapctl mount work /mnt")]
    Prepare(PrepareArgs),
    /// Make a read-only snapshot of a committed one or of an image
    #[command(after_help = "Examples:
  snapctl snapshot view look busybox:latest")]
    View(PrepareArgs),
    /// Turn a writable snapshot into a committed one
    #[command(
        after_help = "The writable snapshot comes first and the name that it gets second; \
`ctr snapshots commit` has them the other way round.

Examples:
  snapctl snapshot commit work my-layer --label purpose=test"
    )]
    Commit(CommitArgs),
    /// Show what mount(2) has to be told to mount a snapshot
    #[command(after_help = "Examples:
  snapctl snapshot mounts work --json")]
    Mounts(MountsArgs),
    /// Remove snapshots
    #[command(after_help = "Examples:
  snapctl snapshot rm work look")]
    Rm(RemoveArgs),
    /// Show the disk space that belongs to a snapshot alone
    #[command(after_help = "Examples:
  snapctl snapshot usage work")]
    Usage(InfoArgs),
    /// List the paths that a snapshot changes against its parent: A added, M modified, D deleted
    #[command(after_help = "Examples:
  snapctl snapshot diff work
  snapctl snapshot diff work --json | jq -r '.[] | select(.change == \"deleted\").path'")]
    Diff(DiffArgs),
    /// Show snapshots as the tree of their parents
    #[command(after_help = "Examples:
  snapctl snapshot tree")]
    Tree(TreeArgs),
    /// Copy up what files of an active snapshot still have of their data in its layers
    #[command(after_help = "Examples:
  snapctl snapshot materialize work")]
    Materialize(MaterializeArgs),
    /// Copy a snapshot into a new directory as plain overlayfs directories, and print the options to mount them
    #[command(
        name = "export-overlay",
        after_help = "Examples:
  mount -t overlay overlay -o \"$(snapctl snapshot export-overlay work /srv/work)\" /mnt"
    )]
    ExportOverlay(ExportOverlayArgs),
}

/// Arguments of `snapshot ls`.
#[derive(Args, Debug)]
pub struct LsArgs {
    #[command(flatten)]
    owner: OwnerArg,
    #[command(flatten)]
    cut: Cut,
    #[command(flatten)]
    format: ListFormat,
}

/// Whose snapshots a command is about.
#[derive(Args, Debug)]
struct OwnerArg {
    /// Only snapshots of this owner
    #[arg(long, value_parser = ["containerd", "snapctl", "image", "container"])]
    owner: Option<String>,
}

/// Arguments of `snapshot info` and `snapshot usage`.
#[derive(Args, Debug)]
pub struct InfoArgs {
    /// Key of the snapshot
    #[arg(value_parser = utf8())]
    key: String,
    #[command(flatten)]
    owner: OwnerArg,
    /// Print a JSON object
    #[arg(long)]
    json: bool,
}

/// Arguments of `snapshot prepare` and `snapshot view`.
#[derive(Args, Debug)]
pub struct PrepareArgs {
    /// Key of the new snapshot
    #[arg(value_parser = utf8())]
    key: String,
    /// Key of a committed snapshot, or name of an image
    #[arg(value_parser = utf8(), default_value = "", hide_default_value = true)]
    parent: String,
    #[command(flatten)]
    labels: Labels,
    /// Print the snapshot as a JSON object
    #[arg(long)]
    json: bool,
}

/// Arguments of `snapshot commit`.
#[derive(Args, Debug)]
pub struct CommitArgs {
    /// Key of the writable snapshot
    #[arg(value_parser = utf8())]
    key: String,
    /// Key of the committed snapshot that it becomes
    #[arg(value_parser = utf8())]
    name: String,
    #[command(flatten)]
    labels: Labels,
    /// Print the snapshot as a JSON object
    #[arg(long)]
    json: bool,
}

#[derive(Args, Debug)]
struct Labels {
    /// Set a label
    #[arg(long = "label", value_name = "KEY=VALUE", value_parser = utf8())]
    labels: Vec<String>,
}

/// Arguments of `snapshot mounts`.
#[derive(Args, Debug)]
pub struct MountsArgs {
    /// Key of the snapshot
    #[arg(value_parser = utf8())]
    key: String,
    #[command(flatten)]
    format: ListFormat,
}

/// Arguments of `snapshot rm`.
#[derive(Args, Debug)]
pub struct RemoveArgs {
    /// Keys of the snapshots
    #[arg(required = true, value_name = "KEY", value_parser = utf8())]
    keys: Vec<String>,
}

/// Arguments of `snapshot diff`.
#[derive(Args, Debug)]
pub struct DiffArgs {
    /// Key of the snapshot
    #[arg(value_parser = utf8())]
    key: String,
    #[command(flatten)]
    owner: OwnerArg,
    #[command(flatten)]
    format: ListFormat,
}

/// Arguments of `snapshot materialize`.
#[derive(Args, Debug)]
pub struct MaterializeArgs {
    /// Key of the snapshot
    #[arg(value_parser = utf8())]
    key: String,
    #[command(flatten)]
    owner: OwnerArg,
}

/// Arguments of `snapshot export-overlay`.
#[derive(Args, Debug)]
pub struct ExportOverlayArgs {
    /// Key of the snapshot
    #[arg(value_parser = utf8())]
    key: String,
    /// Directory to be made
    dir: PathBuf,
    #[command(flatten)]
    owner: OwnerArg,
    /// Print a JSON object
    #[arg(long)]
    json: bool,
}

/// Arguments of `snapshot tree`.
#[derive(Args, Debug)]
pub struct TreeArgs {
    #[command(flatten)]
    owner: OwnerArg,
    #[command(flatten)]
    cut: Cut,
    /// Print nested JSON objects
    #[arg(long)]
    json: bool,
}

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
    #[serde(skip)]
    age: String,
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
        }
    }
}

#[derive(Serialize)]
struct MountView {
    r#type: String,
    source: String,
    options: Vec<String>,
}

#[derive(Serialize)]
struct UsageView {
    size: u64,
    inodes: u64,
}

#[derive(Serialize)]
struct ExportView {
    options: String,
}

#[derive(Serialize)]
struct DiffView {
    change: &'static str,
    path: String,
    /// The path's bytes in hexadecimal, where they are not UTF-8 and `path` only resembles them.
    #[serde(skip_serializing_if = "Option::is_none")]
    path_hex: Option<String>,
}

/// Runs one command.
pub async fn run(command: Command, client: &Client) -> Result<()> {
    match command {
        Command::Ls(args) => ls(args, client).await,
        Command::Info(args) => info(args, client).await,
        Command::Prepare(args) => {
            let json = args.json;
            let request = prepare_request(args)?;
            let response = client.snapshots().prepare(request).await?.into_inner();
            made(response.snapshot, json)
        }
        Command::View(args) => {
            let json = args.json;
            let request = prepare_request(args)?;
            let response = client.snapshots().view(request).await?.into_inner();
            made(response.snapshot, json)
        }
        Command::Commit(args) => commit(args, client).await,
        Command::Mounts(args) => mounts(args, client).await,
        Command::Rm(args) => remove(args, client).await,
        Command::Usage(args) => usage(args, client).await,
        Command::Diff(args) => diff(args, client).await,
        Command::Materialize(args) => {
            let request = MaterializeRequest {
                key: args.key,
                owner: args.owner.owner.unwrap_or_default(),
            };
            client.snapshots().materialize(request).await?;
            Ok(())
        }
        Command::ExportOverlay(args) => export_overlay(args, client).await,
        Command::Tree(args) => {
            let snapshots = all(client, args.owner).await?;
            if args.json {
                output::json(&tree::nested(snapshots))
            } else {
                lines_out(&tree::lines(&snapshots, |key| args.cut.digests(key)))
            }
        }
    }
}

async fn all(client: &Client, owner: OwnerArg) -> Result<Vec<SnapshotView>> {
    let request = ListRequest {
        owner: owner.owner.unwrap_or_default(),
    };
    let response = client.snapshots().list(request).await?.into_inner();
    Ok(response.snapshots.into_iter().map(Into::into).collect())
}

async fn ls(args: LsArgs, client: &Client) -> Result<()> {
    let snapshots = all(client, args.owner).await?;
    args.format.print(
        &snapshots,
        &["KEY", "OWNER", "KIND", "PARENT", "CREATED", "MOUNTED"],
        |snapshot| snapshot.key.clone(),
        |snapshot| {
            vec![
                args.cut.digests(&snapshot.key),
                snapshot.owner.clone(),
                snapshot.kind.to_owned(),
                or_dash(
                    &args
                        .cut
                        .digests(snapshot.parent.as_deref().unwrap_or_default()),
                ),
                snapshot.age.clone(),
                or_dash(snapshot.mountpoint.as_deref().unwrap_or_default()),
            ]
        },
    )
}

async fn info(args: InfoArgs, client: &Client) -> Result<()> {
    let request = InfoRequest {
        key: args.key,
        owner: args.owner.owner.unwrap_or_default(),
    };
    let response = client.snapshots().info(request).await?.into_inner();
    let view = SnapshotView::from(response.snapshot.unwrap_or_default());
    if args.json {
        return output::json(&view);
    }
    let mut lines = Vec::new();
    let mut line = |key: &str, value: &str| {
        if !value.is_empty() {
            lines.push(printable(&format!("{key:<12}{value}")));
        }
    };
    let or_empty = |text: &Option<String>| text.clone().unwrap_or_default();
    line("key", &view.key);
    line("id", &view.id);
    line("owner", &view.owner);
    line("kind", view.kind);
    line("parent", &or_empty(&view.parent));
    line("created", &or_empty(&view.created));
    line("updated", &or_empty(&view.updated));
    line("mounted at", &or_empty(&view.mountpoint));
    let pid = view.plyfs_pid.map(|pid| pid.to_string());
    line("plyfs pid", &or_empty(&pid));
    line("upper", &or_empty(&view.upper_dir));
    for dir in &view.layer_dirs {
        line("layer", dir);
    }
    for (key, value) in &view.labels {
        line("label", &format!("{key}={value}"));
    }
    lines_out(&lines)
}

fn prepare_request(args: PrepareArgs) -> Result<PrepareRequest> {
    Ok(PrepareRequest {
        key: args.key,
        parent: args.parent,
        labels: label_map(args.labels)?,
    })
}

fn label_map(labels: Labels) -> Result<HashMap<String, String>> {
    let pair = |label: String| match label.split_once('=') {
        Some((key, value)) if !key.is_empty() => Ok((key.to_owned(), value.to_owned())),
        _ => Err(Error::Input(format!(
            "{label:?} is not a label: write KEY=VALUE"
        ))),
    };
    labels.labels.into_iter().map(pair).collect()
}

/// Answers with what was made: its key, or all of it.
fn made(snapshot: Option<Snapshot>, json: bool) -> Result<()> {
    let view = SnapshotView::from(snapshot.unwrap_or_default());
    if json {
        output::json(&view)
    } else {
        lines_out(&[printable(&view.key)])
    }
}

async fn commit(args: CommitArgs, client: &Client) -> Result<()> {
    let request = CommitRequest {
        key: args.key.clone(),
        name: args.name.clone(),
        labels: label_map(args.labels)?,
    };
    match client.snapshots().commit(request).await {
        Ok(response) => made(response.into_inner().snapshot, args.json),
        Err(status) if status.code() == Code::NotFound => {
            Err(or_swapped(status, &args.key, &args.name, client).await)
        }
        Err(status) => Err(status.into()),
    }
}

/// Why `key` cannot be committed as `name`: if the names fit the other way round, that is said, too.
async fn or_swapped(status: Status, key: &str, name: &str, client: &Client) -> Error {
    let request = InfoRequest {
        key: name.to_owned(),
        owner: OWNER.to_owned(),
    };
    let other = client.snapshots().info(request).await;
    let other = other.map(|response| response.into_inner().snapshot.unwrap_or_default());
    match other {
        Ok(other) if other.kind() == SnapshotKind::Active => Error::Refused(format!(
            "{name:?} is the writable snapshot, which comes first: \
             `snapctl snapshot commit {name} {key}` ({})",
            status.message()
        )),
        _ => status.into(),
    }
}

/// What plyd answers to Mounts.
pub async fn fetch_mounts(key: String, client: &Client) -> Result<Vec<Mount>> {
    let response = client.snapshots().mounts(MountsRequest { key }).await?;
    Ok(response.into_inner().mounts)
}

async fn mounts(args: MountsArgs, client: &Client) -> Result<()> {
    let mounts = fetch_mounts(args.key, client).await?;
    let views: Vec<MountView> = mounts
        .into_iter()
        .map(|mount| MountView {
            r#type: mount.r#type,
            source: mount.source,
            options: mount.options,
        })
        .collect();
    args.format.print(
        &views,
        &["TYPE", "SOURCE", "OPTIONS"],
        |mount| mount.source.clone(),
        |mount| {
            vec![
                mount.r#type.clone(),
                mount.source.clone(),
                or_dash(&mount.options.join(",")),
            ]
        },
    )
}

async fn remove(args: RemoveArgs, client: &Client) -> Result<()> {
    let mut failed = false;
    for key in args.keys {
        let request = RemoveRequest { key: key.clone() };
        match client.snapshots().remove(request).await {
            Ok(_) => lines_out(&[printable(&key)])?,
            Err(status) => {
                failed = true;
                report(&status.into());
            }
        }
    }
    if failed { Err(Error::Reported) } else { Ok(()) }
}

async fn usage(args: InfoArgs, client: &Client) -> Result<()> {
    let request = UsageRequest {
        key: args.key,
        owner: args.owner.owner.unwrap_or_default(),
    };
    let usage = client.snapshots().usage(request).await?.into_inner();
    if args.json {
        return output::json(&UsageView {
            size: usage.size,
            inodes: usage.inodes,
        });
    }
    let inodes = match usage.inodes {
        1 => "1 inode".to_owned(),
        several => format!("{several} inodes"),
    };
    lines_out(&[format!("{} in {inodes}", size(usage.size))])
}

async fn diff(args: DiffArgs, client: &Client) -> Result<()> {
    let request = DiffRequest {
        key: args.key,
        owner: args.owner.owner.unwrap_or_default(),
    };
    let mut entries = client.snapshots().diff(request).await?.into_inner();
    let mut views = Vec::new();
    while let Some(entry) = entries.message().await? {
        if args.format.json {
            views.push(diff_view(entry));
            continue;
        }
        let mut line = Vec::new();
        if !args.format.quiet {
            line.extend([letter(entry.change()), b' ']);
        }
        // Paths go out as the bytes that they are: programs read them.
        line.extend(&entry.path);
        line.push(b'\n');
        output::bytes_out(&line)?;
    }
    if args.format.json {
        output::json(&views)?;
    }
    Ok(())
}

async fn export_overlay(args: ExportOverlayArgs, client: &Client) -> Result<()> {
    let dir = std::path::absolute(&args.dir)
        .map_err(|error| Error::Input(format!("{}: {error}", args.dir.display())))?;
    let request = ExportOverlayRequest {
        key: args.key,
        owner: args.owner.owner.unwrap_or_default(),
        dir: dir.into_os_string().into_vec(),
    };
    let response = client.snapshots().export_overlay(request).await?;
    let mut options = response.into_inner().options;
    if args.json {
        let options = String::from_utf8_lossy(&options).into_owned();
        return output::json(&ExportView { options });
    }
    options.push(b'\n');
    // A program reads it, so the bytes stay what they are.
    output::bytes_out(&options)
}

fn letter(change: Change) -> u8 {
    match change {
        Change::Added => b'A',
        Change::Modified => b'M',
        Change::Deleted => b'D',
        Change::Unspecified => b'?',
    }
}

fn diff_view(entry: DiffEntry) -> DiffView {
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

    #[test]
    fn labels() {
        let map = |labels: &[&str]| {
            label_map(Labels {
                labels: labels.iter().map(|label| (*label).to_owned()).collect(),
            })
        };
        assert_eq!(map(&["a=b=c", "d="]).unwrap().len(), 2);
        assert!(map(&["a"]).is_err());
        assert!(map(&["=b"]).is_err());
    }
}
