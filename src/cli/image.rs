//! `snapctl image`.

use std::path::PathBuf;

use clap::{Args, Subcommand};
use serde::Serialize;
use tokio::sync::mpsc;
use tokio_stream::wrappers::ReceiverStream;

use super::archive::Source;
use super::args::{name, optional_name};
use super::client::Client;
use super::error::{Error, Result};
use super::output::{self, Cut, ListFormat, embedded, lines_out, report, short, size};
use super::progress::Progress;
use super::time::{age, rfc3339};
use crate::grpc::pb::plywood::{
    Image, InspectImageRequest, ListImagesRequest, LoadRequest, LoadStart, RemoveImageRequest,
    load_request, load_response,
};

/// The commands of `snapctl image`.
#[derive(Debug, Subcommand)]
pub enum Command {
    /// Load an image from an OCI archive, an OCI layout directory, or stdin
    #[command(after_help = "Examples:
  snapctl image load -i busybox.tar
  snapctl image load -i ./layout --name example.org/app:1
  podman save --format oci-archive alpine | snapctl image load")]
    Load(LoadArgs),
    /// List images
    #[command(
        visible_alias = "list",
        after_help = "Examples:
  snapctl image ls
  snapctl image ls --json | jq -r '.[].names[]'"
    )]
    Ls(LsArgs),
    /// Remove names of images, and images with their last name
    #[command(after_help = "Examples:
  snapctl image rm busybox:latest
  snapctl image rm -f $(snapctl image ls -q)")]
    Rm(RemoveArgs),
    /// Show images with their config and manifest, as JSON
    #[command(after_help = "Examples:
  snapctl image inspect busybox:latest | jq '.[0].config.config.Cmd'")]
    Inspect(InspectArgs),
}

/// Arguments of `image ls`.
#[derive(Args, Debug)]
pub struct LsArgs {
    #[command(flatten)]
    cut: Cut,
    #[command(flatten)]
    format: ListFormat,
}

/// Arguments of `image load`.
#[derive(Args, Debug)]
pub struct LoadArgs {
    /// The archive, the layout directory, or - for stdin
    #[arg(short, long, default_value = "-", value_name = "FILE|DIR|-")]
    input: PathBuf,
    /// Name of the image, instead of the one in the archive
    #[arg(long, value_parser = optional_name())]
    name: Option<String>,
    /// Print a JSON array, one object for each image that was loaded
    #[arg(long, conflicts_with = "quiet")]
    json: bool,
    /// Show no progress, and print the ids of the images only, one a line
    #[arg(short, long)]
    quiet: bool,
}

/// Arguments of `image rm`.
#[derive(Args, Debug)]
pub struct RemoveArgs {
    /// Remove it though containers use it
    #[arg(short, long)]
    force: bool,
    /// Names, digests, or prefixes of ids
    #[arg(required = true, value_name = "IMAGE", value_parser = name())]
    images: Vec<String>,
    /// Print a JSON object: the names that were taken away, and the ids of the images that are gone
    #[arg(long, conflicts_with = "quiet")]
    json: bool,
    /// Print the ids of the images that are gone only, one a line
    #[arg(short, long)]
    quiet: bool,
}

/// Arguments of `image inspect`.
#[derive(Args, Debug)]
pub struct InspectArgs {
    /// Names, digests, or prefixes of ids
    #[arg(required = true, value_name = "IMAGE", value_parser = name())]
    images: Vec<String>,
}

#[derive(Serialize)]
struct ImageView {
    id: String,
    names: Vec<String>,
    manifest_digest: String,
    diff_ids: Vec<String>,
    chain_id: String,
    architecture: String,
    os: String,
    created: Option<String>,
    size: u64,
    #[serde(skip)]
    age: String,
}

impl From<Image> for ImageView {
    fn from(image: Image) -> Self {
        Self {
            created: image.created.as_ref().map(rfc3339),
            id: image.id,
            names: image.names,
            manifest_digest: image.manifest_digest,
            diff_ids: image.diff_ids,
            chain_id: image.chain_id,
            architecture: image.architecture,
            os: image.os,
            size: image.size,
            age: age(image.created.as_ref()),
        }
    }
}

#[derive(Serialize)]
struct InspectView {
    #[serde(flatten)]
    image: ImageView,
    config: serde_json::Value,
    manifest: serde_json::Value,
}

/// What a load has made, or has found to be there.
struct Loaded {
    image: Image,
    /// The names that it gave.
    given: Vec<String>,
}

#[derive(Default, Serialize)]
struct RemovedView {
    untagged: Vec<String>,
    removed: Vec<String>,
}

/// Runs one command.
pub async fn run(command: Command, client: &Client) -> Result<()> {
    match command {
        Command::Load(args) => load(args, client).await,
        Command::Ls(args) => list(args, client).await,
        Command::Rm(args) => remove(args, client).await,
        Command::Inspect(args) => inspect(args, client).await,
    }
}

async fn load(args: LoadArgs, client: &Client) -> Result<()> {
    let source = Source::open(&args.input)?;
    let (to, from) = mpsc::channel::<LoadRequest>(8);
    let start = LoadStart {
        name: args.name.unwrap_or_default(),
        total: source.total(),
    };
    let mut progress = Progress::new(args.quiet);
    // Ends only when sending fails. The sender then lives until the call is dropped, and so is
    // cancelled: what was sent so far must not look like a whole archive.
    let failed_sending = async move {
        let start = LoadRequest {
            part: Some(load_request::Part::Start(start)),
        };
        // A receiver that has gone tells why itself.
        let _ignored = to.send(start).await;
        match tokio::task::spawn_blocking(move || source.send(to)).await {
            Ok((Ok(()), to)) => {
                drop(to);
                std::future::pending().await
            }
            Ok((Err(error), to)) => (error, Some(to)),
            Err(_) => (Error::Protocol("sending the archive"), None),
        }
    };
    let loaded = tokio::select! {
        loaded = receive(client, from, &mut progress) => loaded,
        (error, _unsent) = failed_sending => Err(error),
    };
    progress.finish();
    let loaded = loaded?;
    if args.json {
        let images = loaded.into_iter().map(|loaded| loaded.image.into());
        return output::json(&images.collect::<Vec<ImageView>>());
    }
    let mut lines = Vec::new();
    for Loaded { image, given } in &loaded {
        if args.quiet {
            lines.push(image.id.clone());
        } else {
            let names = one_or_dash(given);
            let line = |name| format!("loaded {name} ({})", short(&image.id));
            lines.extend(names.map(line));
        }
    }
    lines_out(&lines)
}

/// Each name, or what stands for none.
fn one_or_dash(names: &[String]) -> impl Iterator<Item = &str> {
    let none = names.is_empty().then_some("-");
    names.iter().map(String::as_str).chain(none)
}

async fn receive(
    client: &Client,
    from: mpsc::Receiver<LoadRequest>,
    progress: &mut Progress,
) -> Result<Vec<Loaded>> {
    let call = client.images().load(ReceiverStream::new(from)).await?;
    let mut responses = call.into_inner();
    let mut loaded = Vec::new();
    while let Some(response) = responses.message().await? {
        let given = response.given;
        match response.part {
            Some(load_response::Part::Progress(report)) => progress.show(&report),
            Some(load_response::Part::Loaded(image)) => loaded.push(Loaded { image, given }),
            None => {}
        }
    }
    if loaded.is_empty() {
        return Err(Error::Protocol("loading the image"));
    }
    Ok(loaded)
}

async fn list(args: LsArgs, client: &Client) -> Result<()> {
    let listed = client.images().list(ListImagesRequest {}).await?;
    let listed = listed.into_inner();
    output::note_unusable(listed.unusable_records);
    let images: Vec<ImageView> = listed.images.into_iter().map(ImageView::from).collect();
    // A row for each name, as Docker has it; an object or a line for each image.
    let row = |image: &ImageView, name: &str| {
        vec![
            name.to_owned(),
            args.cut.id(&image.id).to_owned(),
            image.diff_ids.len().to_string(),
            image.age.clone(),
            size(image.size),
        ]
    };
    args.format.print_rows(
        &images,
        &["NAME", "ID", "LAYERS", "CREATED", "SIZE"],
        |image| image.id.clone(),
        |image| {
            let names = one_or_dash(&image.names);
            names.map(|name| row(image, name)).collect()
        },
    )
}

async fn remove(args: RemoveArgs, client: &Client) -> Result<()> {
    let mut all = RemovedView::default();
    let mut failed = false;
    for image in args.images {
        let request = RemoveImageRequest {
            r#ref: image,
            force: args.force,
        };
        match client.images().remove(request).await {
            Ok(response) => {
                let response = response.into_inner();
                all.untagged.extend(response.untagged);
                all.removed.extend(response.removed);
            }
            Err(status) => {
                failed = true;
                report(&status.into());
            }
        }
    }
    if args.json {
        output::json(&all)?;
    } else if args.quiet {
        lines_out(&all.removed)?;
    } else {
        let untagged = all.untagged.iter().map(|name| format!("untagged {name}"));
        let removed = all.removed.iter().map(|id| format!("removed {id}"));
        lines_out(&untagged.chain(removed).collect::<Vec<_>>())?;
    }
    if failed { Err(Error::Reported) } else { Ok(()) }
}

async fn inspect(args: InspectArgs, client: &Client) -> Result<()> {
    let mut views = Vec::new();
    let mut failed = false;
    for image in args.images {
        let request = InspectImageRequest { r#ref: image };
        match client.images().inspect(request).await {
            Ok(response) => {
                let response = response.into_inner();
                let image = response.image.unwrap_or_default();
                views.push(InspectView {
                    image: image.into(),
                    config: embedded(&response.config_json),
                    manifest: embedded(&response.manifest_json),
                });
            }
            Err(status) => {
                failed = true;
                report(&status.into());
            }
        }
    }
    output::json(&views)?;
    if failed { Err(Error::Reported) } else { Ok(()) }
}
