//! `snapctl snapshot`: snapshots of every owner, to look at and to work on by hand.

mod args;
mod view;

use std::os::unix::ffi::OsStringExt;

use clap::Subcommand;
use tonic::{Code, Status};

use self::args::*;
pub use self::view::SnapshotView;
use self::view::{ExportView, MountView, UsageView, diff_view, letter};
use super::client::Client;
use super::error::{Error, Result};
use super::output::{self, count, lines_out, or_dash, printable, report, size};
use super::tree;
use crate::grpc::pb::plywood::{
    CommitRequest, DiffRequest, ExportOverlayRequest, InfoRequest, ListRequest, MaterializeRequest,
    Mount, MountsRequest, PrepareRequest, RemoveRequest, Snapshot, SnapshotKind, UsageRequest,
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
  snapctl snapshot diff work --json | jq -r '.[] | [.change, .path] | @tsv'")]
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
  options=$(snapctl snapshot export-overlay work /srv/work)
  mount -t overlay overlay -o \"$options\" /mnt"
    )]
    ExportOverlay(ExportOverlayArgs),
}

/// Runs one command.
pub async fn run(command: Command, client: &Client) -> Result<()> {
    match command {
        Command::Ls(args) => ls(args, client).await,
        Command::Info(args) => info(args, client).await,
        Command::Prepare(args) => {
            let json = args.json;
            let request = prepare_request(args);
            let response = client.snapshots().prepare(request).await?.into_inner();
            made(response.snapshot, json)
        }
        Command::View(args) => {
            let json = args.json;
            let request = prepare_request(args);
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
            } else if args.quiet {
                lines_out(&tree::keys(&snapshots))
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
    output::note_unusable(response.unusable_records);
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
            lines.push(printable(&format!("{key:<12} {value}")));
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
    for name in &view.packed_layers {
        line("packed layer", name);
    }
    if let Some(damaged) = view.damaged_contents.filter(|contents| *contents > 0) {
        let contents = count(damaged, "content");
        let them = if damaged == 1 { "it" } else { "them" };
        line(
            "damaged",
            &format!("{contents}; `snapctl system repair` mends {them}, or says what to do"),
        );
    }
    if view.damaged_view == Some(true) {
        line(
            "damaged",
            "the merged view of its layers; `snapctl system repair` builds it again, or says what to mount anew",
        );
    }
    for (key, value) in &view.labels {
        line("label", &format!("{key}={value}"));
    }
    lines_out(&lines)
}

fn prepare_request(args: PrepareArgs) -> PrepareRequest {
    PrepareRequest {
        key: args.key,
        parent: args.parent.unwrap_or_default(),
        labels: args.labels.labels.into_iter().collect(),
    }
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
        labels: args.labels.labels.into_iter().collect(),
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
    let inodes = count(usage.inodes, "inode");
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
