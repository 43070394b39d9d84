//! `snapctl system repair`.

use indicatif::ProgressBar;
use serde::Serialize;
use tokio::sync::mpsc;
use tokio_stream::StreamExt;
use tokio_stream::wrappers::ReceiverStream;

use super::RepairArgs;
use super::care::style;
use super::faults::{self, FaultView};
use crate::cli::archive::Source;
use crate::cli::client::Client;
use crate::cli::error::{Error, Result};
use crate::cli::output;
use crate::cli::progress::Progress;
use crate::grpc::pb::plywood::repair_response::Event;
use crate::grpc::pb::plywood::{
    LoadRequest, RepairRequest, RepairStart, VerifyProgress, load_request, repair_request,
};

#[derive(Default, Serialize)]
struct RepairedView {
    layers: u64,
    objects: u64,
    bytes: u64,
    mended: Vec<MendedView>,
    left: Vec<FaultView>,
}

#[derive(Serialize)]
struct MendedView {
    what: String,
    layer: Option<String>,
}

pub(super) async fn repair(args: RepairArgs, client: &Client) -> Result<()> {
    let source = args.input.as_deref().map(Source::open).transpose()?;
    let (to, from) = mpsc::channel::<LoadRequest>(8);
    let start = RepairRequest {
        part: Some(repair_request::Part::Start(RepairStart {
            archive: source.is_some(),
            total: source.as_ref().map_or(0, Source::total),
        })),
    };
    let data = ReceiverStream::new(from).map(|message| RepairRequest {
        part: match message.part {
            Some(load_request::Part::Data(data)) => Some(repair_request::Part::Data(data)),
            _ => None,
        },
    });
    let requests = tokio_stream::once(start).chain(data);
    // As for `image load`: what was sent so far must not look like a whole archive.
    let failed_sending = async move {
        let Some(source) = source else {
            drop(to);
            return std::future::pending().await;
        };
        match tokio::task::spawn_blocking(move || source.send(to)).await {
            Ok((Ok(()), to)) => {
                drop(to);
                std::future::pending().await
            }
            Ok((Err(error), to)) => (error, Some(to)),
            Err(_) => (Error::Protocol("sending the archive"), None),
        }
    };
    let quiet = args.quiet || args.json;
    let received = async {
        let call = client.system().repair(requests).await?;
        receive(call.into_inner(), quiet).await
    };
    let view = tokio::select! {
        received = received => received?,
        (error, _unsent) = failed_sending => return Err(error),
    };
    if args.json {
        output::json(&view)?;
    } else if args.quiet {
        output::lines_out(&faults::names(&view.left))?;
    } else {
        output::lines_out(&[format!(
            "{} with {} looked at: {} mended, {} left",
            output::count(view.layers, "layer"),
            output::count(view.objects, "content"),
            view.mended.len(),
            faults::sum(&view.left)
        )])?;
    }
    if view.left.is_empty() {
        Ok(())
    } else {
        Err(Error::Reported)
    }
}

async fn receive(
    mut events: tonic::Streaming<crate::grpc::pb::plywood::RepairResponse>,
    quiet: bool,
) -> Result<RepairedView> {
    let mut progress = Progress::new(quiet);
    let bar = match quiet {
        true => ProgressBar::hidden(),
        // Shown on a terminal only.
        false => ProgressBar::new(0).with_style(style()),
    };
    let mut view = RepairedView::default();
    let mut sum = VerifyProgress::default();
    while let Some(answer) = events.message().await? {
        match answer.event {
            Some(Event::Checked(checked)) => {
                bar.set_length(checked.layers_total);
                bar.set_position(checked.layers);
                if checked.layers == checked.layers_total {
                    bar.finish_and_clear();
                }
                sum = checked;
            }
            Some(Event::Progress(report)) => progress.show(&report),
            Some(Event::Mended(mended)) => {
                if !quiet {
                    let line = output::printable(&mended.what);
                    bar.suspend(|| output::lines_out(&[line]))?;
                }
                view.mended.push(MendedView {
                    what: mended.what,
                    layer: Some(mended.layer).filter(|layer| !layer.is_empty()),
                });
            }
            Some(Event::Left(fault)) => view.left.push(FaultView::from(fault)),
            None => {}
        }
    }
    progress.finish();
    if !quiet {
        let lines = faults::lines(&view.left).into_iter();
        let lines: Vec<_> = lines.map(|line| format!("left: {line}")).collect();
        output::lines_out(&lines)?;
    }
    if sum.layers < sum.layers_total {
        return Err(Error::Protocol("a repair"));
    }
    view.layers = sum.layers;
    view.objects = sum.objects;
    view.bytes = sum.bytes;
    Ok(view)
}
