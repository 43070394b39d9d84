//! `snapctl system`.

mod care;
mod faults;
mod repair;
mod space;

use std::path::PathBuf;

use clap::{Args, Subcommand};
use serde::Serialize;

use crate::cli::client::Client;
use crate::cli::error::Result;
use crate::cli::output::{self, Cut};
use crate::grpc::pb::plywood::{Feature, InfoSystemRequest, InfoSystemResponse};

/// The commands of `snapctl system`.
#[derive(Debug, Subcommand)]
pub enum Command {
    /// Show what this plyd is, what the host can do, and what of it is in use
    #[command(after_help = "Examples:
  snapctl system info
  snapctl system info --json | jq '.features[] | select(.in_use | not)'")]
    Info(InfoArgs),
    /// Show what images and snapshots take on disk
    #[command(
        after_help = "LOGICAL is what the files of its tree have. UNIQUE is what nothing else needs: it comes free if that image \
or snapshot goes (in packs, when the pack is written anew). ON DISK is its part of what lies on the disk: \
what several have is divided evenly among them, so that the column adds up to what `du` says of plyd's \
root. A snapshot has what was written to it, or its own layer; a layer of an image is counted there.

views         trees of chains of layers, made again when they are needed
packs         headers and tables of the files that small contents are in
records       what is known of all of these, with indexes and directories
containers    bundles and logs
uncollected   what nothing has: it awaits a collection, or is being loaded
undivided     what damage keeps from being told apart; it is there only then
other         what plyd has not put there

Where damage hides whose something is, the figures that hang on that are `?`, stderr says what is damaged, and the \
exit code is 1. The total is right all the same.

Examples:
  snapctl system df
  snapctl system df --json | jq -r '.users[] | [.unique, .name] | @tsv'"
    )]
    Df(DfArgs),
    /// Remove what no layer needs any more; plyd does it by itself when layers are removed
    #[command(after_help = "Exits with 1 if something could not be removed.

Examples:
  snapctl system gc --dry-run --explain
  snapctl system gc")]
    Gc(GcArgs),
    /// Read what is stored of layers, and all records, and compare it with its checksums
    #[command(
        after_help = "Of layers that is the record, the index and the recipe of each, packs, and the merged views of their chains; the \
contents are looked for, and read with --deep. Records of snapshots, images and containers are read, too. \
Exits with 1 if something is damaged. Nothing is mended: `snapctl system repair` does that, or says what to do.

Examples:
  snapctl system verify
  snapctl system verify --deep --json"
    )]
    Verify(VerifyArgs),
    /// Make whole what is damaged of layers and records
    #[command(
        after_help = "Reads everything first. What can be made from something else is made anew; layers are taken in again \
from the archive, or else from containerd's content store, and contents from any layer there that has them. Mounts go on, and read what was mended. \
Exits with 1 if something is left, with a line for each: what it is, and what would mend it.

Examples:
  snapctl system repair
  snapctl system repair -i debian.tar"
    )]
    Repair(RepairArgs),
}

/// Arguments of `system df`.
#[derive(Args, Debug)]
pub struct DfArgs {
    #[command(flatten)]
    cut: Cut,
    /// Print a JSON object
    #[arg(long, conflicts_with = "quiet")]
    json: bool,
    /// Print the bytes of all together only
    #[arg(short, long)]
    quiet: bool,
}

/// Arguments of `system gc`.
#[derive(Args, Debug)]
pub struct GcArgs {
    /// Say what would go, and remove nothing
    #[arg(long)]
    dry_run: bool,
    /// Name each file and why it goes
    #[arg(long)]
    explain: bool,
    /// Print a JSON object
    #[arg(long, conflicts_with = "quiet")]
    json: bool,
    /// Print the paths only
    #[arg(short, long)]
    quiet: bool,
}

/// Arguments of `system verify`.
#[derive(Args, Debug)]
pub struct VerifyArgs {
    /// Read all contents, too
    #[arg(long)]
    deep: bool,
    /// Print a JSON object
    #[arg(long, conflicts_with = "quiet")]
    json: bool,
    /// Print the names of what is damaged only: of layers, or else paths of files
    #[arg(short, long)]
    quiet: bool,
}

/// Arguments of `system repair`.
#[derive(Args, Debug)]
pub struct RepairArgs {
    /// An image archive, a layout directory, or - for stdin, to take damaged layers from
    #[arg(short, long, value_name = "FILE|DIR|-")]
    input: Option<PathBuf>,
    /// Print a JSON object
    #[arg(long, conflicts_with = "quiet")]
    json: bool,
    /// Print the names of what is left only: of layers, or else paths of files, or else keys of mounted snapshots
    #[arg(short, long)]
    quiet: bool,
}

/// Arguments of `system info`.
#[derive(Args, Debug)]
pub struct InfoArgs {
    /// Print a JSON object
    #[arg(long)]
    json: bool,
}

#[derive(Serialize)]
struct InfoView {
    client_version: &'static str,
    version: String,
    kernel: String,
    root: String,
    state: String,
    pid: u32,
    fuse_abi: String,
    features: Vec<FeatureView>,
    oci_runtime: RuntimeView,
    cgroups: String,
    images: u64,
    snapshots: u64,
    mounts: u64,
    containers: u64,
    containers_running: u64,
    damaged_contents: u64,
    damaged_mounts: u64,
    damaged_views: u64,
    damaged_mounts_ended: u64,
    damaged_records: u64,
}

#[derive(Serialize)]
struct FeatureView {
    name: String,
    supported: bool,
    in_use: bool,
    reason: String,
}

#[derive(Serialize)]
struct RuntimeView {
    path: String,
    version: String,
    problem: String,
}

impl From<InfoSystemResponse> for InfoView {
    fn from(info: InfoSystemResponse) -> Self {
        let runtime = info.oci_runtime.unwrap_or_default();
        Self {
            client_version: env!("CARGO_PKG_VERSION"),
            version: info.version,
            kernel: info.kernel,
            root: info.root,
            state: info.state,
            pid: info.pid,
            fuse_abi: info.fuse_abi,
            features: info.features.into_iter().map(FeatureView::from).collect(),
            oci_runtime: RuntimeView {
                path: runtime.path,
                version: runtime.version,
                problem: runtime.problem,
            },
            cgroups: info.cgroups,
            images: info.images,
            snapshots: info.snapshots,
            mounts: info.mounts,
            containers: info.containers,
            containers_running: info.containers_running,
            damaged_contents: info.damaged_contents,
            damaged_mounts: info.damaged_mounts,
            damaged_views: info.damaged_views,
            damaged_mounts_ended: info.damaged_mounts_ended,
            damaged_records: info.damaged_records,
        }
    }
}

impl From<Feature> for FeatureView {
    fn from(feature: Feature) -> Self {
        Self {
            name: feature.name,
            supported: feature.supported,
            in_use: feature.in_use,
            reason: feature.reason,
        }
    }
}

/// Runs one command.
pub async fn run(command: Command, client: &Client) -> Result<()> {
    match command {
        Command::Info(args) => info(args, client).await,
        Command::Df(args) => space::df(args, client).await,
        Command::Gc(args) => care::gc(args, client).await,
        Command::Repair(args) => repair::repair(args, client).await,
        Command::Verify(args) => care::verify(args, client).await,
    }
}

async fn info(args: InfoArgs, client: &Client) -> Result<()> {
    let info = client.system().info(InfoSystemRequest {}).await?;
    let view = InfoView::from(info.into_inner());
    if args.json {
        return output::json(&view);
    }
    output::lines_out(&lines(&view))?;
    let yes_no = |yes: bool| if yes { "yes" } else { "no" }.to_owned();
    output::table(
        &["FUSE FEATURE", "SUPPORTED", "IN USE", "WHY NOT"],
        view.features.iter().map(|feature| {
            vec![
                feature.name.clone(),
                yes_no(feature.supported),
                yes_no(feature.in_use),
                output::or_dash(&feature.reason),
            ]
        }),
    )
}

fn lines(info: &InfoView) -> Vec<String> {
    let runtime = match info.oci_runtime.path.as_str() {
        "" => format!("none: {}", info.oci_runtime.problem),
        path => format!("{path} {}", info.oci_runtime.version),
    };
    [
        ("plyd", format!("{} (pid {})", info.version, info.pid)),
        ("snapctl", info.client_version.to_owned()),
        ("kernel", info.kernel.clone()),
        ("FUSE protocol", info.fuse_abi.clone()),
        ("OCI runtime", runtime),
        ("cgroups", info.cgroups.clone()),
        ("root", info.root.clone()),
        ("state", info.state.clone()),
        ("images", info.images.to_string()),
        (
            "snapshots",
            format!("{} ({} mounted)", info.snapshots, info.mounts),
        ),
        (
            "containers",
            format!("{} ({} running)", info.containers, info.containers_running),
        ),
        ("damaged", damaged(info)),
        ("", String::new()),
    ]
    .into_iter()
    .map(|(key, value)| output::printable(format!("{key:<15}{value}").trim_end()))
    .collect()
}

/// What mounts could not read, and records.
fn damaged(info: &InfoView) -> String {
    let some = |number: u64, what| (number > 0).then(|| output::count(number, what));
    let read = [
        some(info.damaged_contents, "content"),
        some(info.damaged_views, "merged view"),
    ];
    let read: Vec<String> = read.into_iter().flatten().collect();
    let read = (!read.is_empty()).then(|| {
        let mounts = output::count(info.damaged_mounts, "mount");
        format!("{} in {mounts}", read.join(" and "))
    });
    let ended = some(info.damaged_mounts_ended, "mount")
        .map(|mounts| format!("something in {mounts} since ended (plyd's log names it)"));
    let all = [read, ended, some(info.damaged_records, "record")];
    let all: Vec<String> = all.into_iter().flatten().collect();
    let number = info.damaged_contents
        + info.damaged_views
        + info.damaged_mounts_ended
        + info.damaged_records;
    let them = if number == 1 { "it" } else { "them" };
    match all.is_empty() {
        true => "nothing that was read".to_owned(),
        false => format!(
            "{}; `snapctl system repair` mends {them}, or says what to do",
            all.join(", ")
        ),
    }
}
