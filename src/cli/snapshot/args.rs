//! What the commands of `snapctl snapshot` are told.

use std::path::PathBuf;

use clap::Args;

use super::super::args::{label, name, optional_name};
use super::super::output::{Cut, ListFormat};

/// Arguments of `snapshot ls`.
#[derive(Args, Debug)]
pub struct LsArgs {
    #[command(flatten)]
    pub(super) owner: OwnerArg,
    #[command(flatten)]
    pub(super) cut: Cut,
    #[command(flatten)]
    pub(super) format: ListFormat,
}

/// Whose snapshots a command is about.
#[derive(Args, Debug)]
pub struct OwnerArg {
    /// Only snapshots of this owner
    #[arg(long, value_parser = ["containerd", "snapctl", "image", "container"])]
    pub(super) owner: Option<String>,
}

/// Arguments of `snapshot info` and `snapshot usage`.
#[derive(Args, Debug)]
pub struct InfoArgs {
    /// Key of the snapshot
    #[arg(value_parser = name())]
    pub(super) key: String,
    #[command(flatten)]
    pub(super) owner: OwnerArg,
    /// Print a JSON object
    #[arg(long)]
    pub(super) json: bool,
}

/// Arguments of `snapshot prepare` and `snapshot view`.
#[derive(Args, Debug)]
pub struct PrepareArgs {
    /// Key of the new snapshot
    #[arg(value_parser = name())]
    pub(super) key: String,
    /// Key of a committed snapshot, or name of an image
    #[arg(value_parser = optional_name())]
    pub(super) parent: Option<String>,
    #[command(flatten)]
    pub(super) labels: Labels,
    /// Print the snapshot as a JSON object
    #[arg(long)]
    pub(super) json: bool,
}

/// Arguments of `snapshot commit`.
#[derive(Args, Debug)]
pub struct CommitArgs {
    /// Key of the writable snapshot
    #[arg(value_parser = name())]
    pub(super) key: String,
    /// Key of the committed snapshot that it becomes
    #[arg(value_parser = name())]
    pub(super) name: String,
    #[command(flatten)]
    pub(super) labels: Labels,
    /// Print the snapshot as a JSON object
    #[arg(long)]
    pub(super) json: bool,
}

#[derive(Args, Debug)]
pub struct Labels {
    /// Set a label
    #[arg(long = "label", value_name = "KEY=VALUE", value_parser = label())]
    pub(super) labels: Vec<(String, String)>,
}

/// Arguments of `snapshot mounts`.
#[derive(Args, Debug)]
pub struct MountsArgs {
    /// Key of the snapshot
    #[arg(value_parser = name())]
    pub(super) key: String,
    #[command(flatten)]
    pub(super) format: ListFormat,
}

/// Arguments of `snapshot rm`.
#[derive(Args, Debug)]
pub struct RemoveArgs {
    /// Keys of the snapshots
    #[arg(required = true, value_name = "KEY", value_parser = name())]
    pub(super) keys: Vec<String>,
}

/// Arguments of `snapshot diff`.
#[derive(Args, Debug)]
pub struct DiffArgs {
    /// Key of the snapshot
    #[arg(value_parser = name())]
    pub(super) key: String,
    #[command(flatten)]
    pub(super) owner: OwnerArg,
    #[command(flatten)]
    pub(super) format: ListFormat,
}

/// Arguments of `snapshot materialize`.
#[derive(Args, Debug)]
pub struct MaterializeArgs {
    /// Key of the snapshot
    #[arg(value_parser = name())]
    pub(super) key: String,
    #[command(flatten)]
    pub(super) owner: OwnerArg,
}

/// Arguments of `snapshot export-overlay`.
#[derive(Args, Debug)]
pub struct ExportOverlayArgs {
    /// Key of the snapshot
    #[arg(value_parser = name())]
    pub(super) key: String,
    /// Directory to be made
    pub(super) dir: PathBuf,
    #[command(flatten)]
    pub(super) owner: OwnerArg,
    /// Print a JSON object
    #[arg(long)]
    pub(super) json: bool,
}

/// Arguments of `snapshot tree`.
#[derive(Args, Debug)]
pub struct TreeArgs {
    #[command(flatten)]
    pub(super) owner: OwnerArg,
    #[command(flatten)]
    pub(super) cut: Cut,
    /// Print nested JSON objects
    #[arg(long, conflicts_with = "quiet")]
    pub(super) json: bool,
    /// Print the keys only, one a line, each after that of its parent
    #[arg(short, long)]
    pub(super) quiet: bool,
}
