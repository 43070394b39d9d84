//! `snapctl layer`: the packed layers of all images and snapshots.

mod export;

use std::ffi::OsString;
use std::os::unix::ffi::{OsStrExt, OsStringExt};
use std::path::PathBuf;

use clap::{Args, Subcommand};
use serde::Serialize;

use super::args::name;
use super::client::Client;
use super::error::{Error, Result};
use super::output::{self, Cut, ListFormat, count, lines_out, or_dash, printable, size};
use super::time::rfc3339;
use crate::grpc::pb::plywood::inspect_layer_response::Part;
use crate::grpc::pb::plywood::layer_entry::Action;
use crate::grpc::pb::plywood::{
    InspectLayerRequest, LayerEntry, LayerUser, ListLayersRequest, PackedLayer,
};

/// The commands of `snapctl layer`.
#[derive(Debug, Subcommand)]
pub enum Command {
    /// List packed layers
    #[command(
        visible_alias = "list",
        after_help = "A content that several layers have counts for each of them: `snapctl system df` says what they take together.

Examples:
  snapctl layer ls
  snapctl layer ls --json | jq -r '.[] | select(.images == []).name'"
    )]
    Ls(LsArgs),
    /// Show one packed layer, and with --files what it says of each path
    #[command(after_help = "Examples:
  snapctl layer inspect 3f1c
  snapctl layer inspect --files sha256:$DIFF_ID
  snapctl layer inspect 3f1c --files --json | jq '.files[] | [.action, .path]'")]
    Inspect(InspectArgs),
    /// Write the tar stream of a packed layer, bit for bit as it came
    #[command(
        after_help = "Its diff id is compared on the way; when that or anything else fails, no file is made, and \
one that was there stays as it was.

Examples:
  snapctl layer export 3f1c -o layer.tar
  snapctl layer export 3f1c | tar tv"
    )]
    Export(ExportArgs),
}

/// Arguments of `layer ls`.
#[derive(Args, Debug)]
pub struct LsArgs {
    #[command(flatten)]
    cut: Cut,
    #[command(flatten)]
    format: ListFormat,
}

/// Arguments of `layer inspect`.
#[derive(Args, Debug)]
pub struct InspectArgs {
    /// Name or diff id, or the first digits of one
    #[arg(value_name = "LAYER", value_parser = name())]
    layer: String,
    /// Show its entries, too, in the order of its stream
    #[arg(long)]
    files: bool,
    /// Print a JSON object
    #[arg(long)]
    json: bool,
}

/// Arguments of `layer export`.
#[derive(Args, Debug)]
pub struct ExportArgs {
    /// Name or diff id, or the first digits of one
    #[arg(value_name = "LAYER", value_parser = name())]
    layer: String,
    /// The file to write, or - for stdout
    #[arg(short, long, default_value = "-", value_name = "FILE|-")]
    output: PathBuf,
    /// Show no progress
    #[arg(short, long)]
    quiet: bool,
}

#[derive(Serialize)]
struct LayerView {
    name: String,
    diff_id: Option<String>,
    blob: Option<String>,
    tar_bytes: u64,
    entries: u64,
    objects: u64,
    content_bytes: u64,
    index_bytes: u64,
    snapshots: Vec<UserView>,
    images: Vec<String>,
    kept_by: Vec<UserView>,
}

#[derive(Serialize)]
struct UserView {
    owner: String,
    key: String,
    /// What users call it, where that is not the key.
    name: Option<String>,
}

impl From<LayerUser> for UserView {
    fn from(user: LayerUser) -> Self {
        Self {
            owner: user.owner,
            key: user.key,
            name: Some(user.name).filter(|name| !name.is_empty()),
        }
    }
}

#[derive(Serialize)]
struct InspectView {
    #[serde(flatten)]
    layer: LayerView,
    #[serde(skip_serializing_if = "Option::is_none")]
    files: Option<Vec<EntryView>>,
}

#[derive(Serialize)]
struct EntryView {
    action: &'static str,
    path: String,
    /// Where the path is not UTF-8.
    #[serde(skip_serializing_if = "Option::is_none")]
    path_hex: Option<String>,
    mode: Option<u32>,
    uid: Option<u32>,
    gid: Option<u32>,
    size: Option<u64>,
    mtime: Option<String>,
    target: Option<String>,
    device: Option<String>,
}

impl From<PackedLayer> for LayerView {
    fn from(layer: PackedLayer) -> Self {
        let known = |text: String| (!text.is_empty()).then_some(text);
        Self {
            name: layer.name,
            diff_id: known(layer.diff_id),
            blob: known(layer.blob),
            tar_bytes: layer.tar_bytes,
            entries: layer.entries,
            objects: layer.objects,
            content_bytes: layer.content_bytes,
            index_bytes: layer.index_bytes,
            images: layer.images,
            snapshots: layer.snapshots.into_iter().map(UserView::from).collect(),
            kept_by: layer.kept_by.into_iter().map(UserView::from).collect(),
        }
    }
}

impl From<LayerEntry> for EntryView {
    fn from(entry: LayerEntry) -> Self {
        let action = entry.action();
        // What removes something has no attributes.
        let makes = matches!(action, Action::Make | Action::Link);
        let kind = entry.mode & libc::S_IFMT;
        let path = OsString::from_vec(entry.path);
        let hex = |bytes: &[u8]| bytes.iter().map(|byte| format!("{byte:02x}")).collect();
        let path_hex = path.to_str().is_none().then(|| hex(path.as_bytes()));
        let mtime = prost_types::Timestamp {
            seconds: entry.mtime,
            nanos: i32::try_from(entry.mtime_nanos).unwrap_or_default(),
        };
        Self {
            action: match action {
                Action::Link => "link",
                Action::Remove => "remove",
                Action::Clear => "clear",
                Action::Make | Action::Unspecified => "make",
            },
            path: path.to_string_lossy().into_owned(),
            path_hex,
            mode: makes.then_some(entry.mode),
            uid: makes.then_some(entry.uid),
            gid: makes.then_some(entry.gid),
            size: (kind == libc::S_IFREG).then_some(entry.size),
            mtime: makes.then(|| rfc3339(&mtime)),
            target: (!entry.target.is_empty())
                .then(|| String::from_utf8_lossy(&entry.target).into_owned()),
            device: matches!(kind, libc::S_IFCHR | libc::S_IFBLK)
                .then(|| format!("{}:{}", entry.major, entry.minor)),
        }
    }
}

impl EntryView {
    /// As `tar tv` and `ls -l` have it.
    fn line(&self) -> String {
        let owner = match (self.uid, self.gid) {
            (Some(uid), Some(gid)) => format!("{uid}:{gid}"),
            _ => String::new(),
        };
        let what = match (self.action, self.mode) {
            ("make", Some(mode)) => permissions(mode),
            (action, _) => action.to_owned(),
        };
        let amount = match (&self.device, self.size) {
            (Some(device), _) => device.clone(),
            (None, Some(size)) => size.to_string(),
            (None, None) => String::new(),
        };
        let target = self.target.as_ref().map(|target| format!(" -> {target}"));
        let target = target.unwrap_or_default();
        printable(&format!(
            "{what:<10} {owner:<11} {amount:>11} {}{target}",
            self.path
        ))
    }
}

/// Type and permissions, as `ls -l` shows them.
fn permissions(mode: u32) -> String {
    let kind = match mode & libc::S_IFMT {
        libc::S_IFDIR => 'd',
        libc::S_IFLNK => 'l',
        libc::S_IFCHR => 'c',
        libc::S_IFBLK => 'b',
        libc::S_IFIFO => 'p',
        libc::S_IFSOCK => 's',
        _ => '-',
    };
    let mut text = String::from(kind);
    for (shift, special, letter) in [
        (6, libc::S_ISUID, 's'),
        (3, libc::S_ISGID, 's'),
        (0, libc::S_ISVTX, 't'),
    ] {
        let bits = mode >> shift;
        text.push(if bits & 4 != 0 { 'r' } else { '-' });
        text.push(if bits & 2 != 0 { 'w' } else { '-' });
        text.push(match (bits & 1 != 0, mode & special != 0) {
            (true, true) => letter,
            (false, true) => letter.to_ascii_uppercase(),
            (true, false) => 'x',
            (false, false) => '-',
        });
    }
    text
}

/// Runs one command.
pub async fn run(command: Command, client: &Client) -> Result<()> {
    match command {
        Command::Ls(args) => list(args, client).await,
        Command::Inspect(args) => inspect(args, client).await,
        Command::Export(args) => export::export(args, client).await,
    }
}

async fn list(args: LsArgs, client: &Client) -> Result<()> {
    let listed = client.layers().list(ListLayersRequest {}).await?;
    let listed = listed.into_inner();
    output::note_unusable(listed.unusable_records);
    let layers: Vec<_> = listed.layers.into_iter().map(LayerView::from).collect();
    args.format.print(
        &layers,
        &["NAME", "DIFF ID", "ENTRIES", "CONTENT", "INDEX", "USED BY"],
        |layer| layer.name.clone(),
        |layer| {
            let diff_id = layer.diff_id.as_deref().unwrap_or_default();
            let (_, digits) = diff_id.split_once(':').unwrap_or_default();
            vec![
                args.cut.id(&layer.name).to_owned(),
                or_dash(args.cut.id(digits)),
                layer.entries.to_string(),
                size(layer.content_bytes),
                size(layer.index_bytes),
                used_by(layer),
            ]
        },
    )
}

fn used_by(layer: &LayerView) -> String {
    // Those of images are counted as the images.
    let others = || {
        let users = layer.snapshots.iter().chain(&layer.kept_by);
        users.filter(|user| user.owner != "image")
    };
    let containers = others().filter(|user| user.owner == "container").count();
    let counts = [
        (layer.images.len(), "image"),
        (containers, "container"),
        (others().count() - containers, "snapshot"),
    ];
    let words = counts.iter().filter(|(number, _)| *number > 0);
    let words: Vec<_> = words
        .map(|(number, what)| count(*number as u64, what))
        .collect();
    or_dash(&words.join(", "))
}

async fn inspect(args: InspectArgs, client: &Client) -> Result<()> {
    let request = InspectLayerRequest {
        r#ref: args.layer,
        entries: args.files,
    };
    let mut parts = client.layers().inspect(request).await?.into_inner();
    let Some(Part::Layer(layer)) = parts.message().await?.and_then(|message| message.part) else {
        return Err(Error::Protocol("describing the layer"));
    };
    let layer = LayerView::from(layer);
    if !args.json {
        lines_out(&lines(&layer))?;
    }
    let mut files = Vec::new();
    while let Some(message) = parts.message().await? {
        let Some(Part::Entries(some)) = message.part else {
            continue;
        };
        let some = some.entries.into_iter().map(EntryView::from);
        if args.json {
            files.extend(some);
        } else {
            lines_out(&some.map(|entry| entry.line()).collect::<Vec<_>>())?;
        }
    }
    match args.json {
        true => output::json(&InspectView {
            layer,
            files: args.files.then_some(files),
        }),
        false => Ok(()),
    }
}

fn lines(layer: &LayerView) -> Vec<String> {
    let mut lines = Vec::new();
    let mut line = |key: &str, value: &str| {
        if !value.is_empty() {
            lines.push(printable(&format!("{key:<12} {value}")));
        }
    };
    line("name", &layer.name);
    if let Some(diff_id) = &layer.diff_id {
        line("diff id", diff_id);
        line("blob", layer.blob.as_deref().unwrap_or("none"));
        line("tar stream", &size(layer.tar_bytes));
    } else {
        line("tar stream", "made when it is exported");
    }
    line("entries", &layer.entries.to_string());
    let contents = count(layer.objects, "content");
    line(
        "contents",
        &format!("{contents}, {}", size(layer.content_bytes)),
    );
    line("index", &size(layer.index_bytes));
    for image in &layer.images {
        line("image", image);
    }
    for (what, users) in [("snapshot", &layer.snapshots), ("kept by", &layer.kept_by)] {
        for UserView { owner, key, name } in users {
            line(what, &format!("{} ({owner})", name.as_ref().unwrap_or(key)));
        }
    }
    lines
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn permissions_are_shown_as_by_ls() {
        for (mode, text) in [
            (0o100_644, "-rw-r--r--"),
            (0o040_755, "drwxr-xr-x"),
            (0o041_777, "drwxrwxrwt"),
            (0o104_755, "-rwsr-xr-x"),
            (0o106_644, "-rwSr-Sr--"),
            (0o120_777, "lrwxrwxrwx"),
            (0o020_600, "crw-------"),
        ] {
            assert_eq!(permissions(mode), text);
        }
    }
}
