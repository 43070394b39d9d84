//! `snapctl system gc` and `verify`.

use indicatif::{ProgressBar, ProgressStyle};
use serde::Serialize;

use super::faults::{self, FaultView};
use super::{GcArgs, VerifyArgs};
use crate::cli::client::Client;
use crate::cli::error::{Error, Result};
use crate::cli::output;
use crate::grpc::pb::plywood::verify_response::Event;
use crate::grpc::pb::plywood::{CollectRequest, VerifyProgress, VerifyRequest};

#[derive(Serialize)]
struct CollectedView {
    dry_run: bool,
    bytes: u64,
    files: Vec<OrphanView>,
    errors: Vec<String>,
}

#[derive(Serialize)]
struct OrphanView {
    path: String,
    bytes: u64,
    reason: String,
}

pub(super) async fn gc(args: GcArgs, client: &Client) -> Result<()> {
    let request = CollectRequest {
        dry_run: args.dry_run,
    };
    let collected = client.system().collect(request).await?.into_inner();
    let files = collected.orphans.into_iter().map(|orphan| OrphanView {
        path: orphan.path,
        bytes: orphan.bytes,
        reason: orphan.reason,
    });
    let mut view = CollectedView {
        dry_run: args.dry_run,
        bytes: 0,
        files: files.collect(),
        errors: collected.errors,
    };
    view.bytes = view.files.iter().map(|file| file.bytes).sum();
    if args.json {
        output::json(&view)?;
    } else if args.quiet {
        let paths: Vec<_> = view.files.iter().map(|file| &*file.path).collect();
        output::lines_out(&paths)?;
    } else {
        if args.explain {
            for file in &view.files {
                let line = format!(
                    "{} ({}): {}",
                    file.path,
                    output::size(file.bytes),
                    file.reason
                );
                output::lines_out(&[output::printable(&line)])?;
            }
        }
        let word = if args.dry_run { "would come" } else { "came" };
        let files = output::count(view.files.len() as u64, "file");
        let size = output::size(view.bytes);
        output::lines_out(&[format!("{size} {word} free, in {files}")])?;
    }
    match view.errors.as_slice() {
        [] => Ok(()),
        errors => {
            for error in errors {
                output::note(&format!("snapctl: {error}"));
            }
            Err(Error::Reported)
        }
    }
}

#[derive(Serialize)]
struct VerifiedView {
    layers: u64,
    objects: u64,
    bytes: u64,
    faults: Vec<FaultView>,
    notes: Vec<String>,
}

pub(super) async fn verify(args: VerifyArgs, client: &Client) -> Result<()> {
    let request = VerifyRequest { deep: args.deep };
    let mut events = client.system().verify(request).await?.into_inner();
    let bar = match args.json || args.quiet {
        true => ProgressBar::hidden(),
        // Shown on a terminal only.
        false => ProgressBar::new(0).with_style(style()),
    };
    let mut sum = VerifyProgress::default();
    let (mut found, mut told) = (Vec::new(), 0);
    let mut notes = Vec::new();
    while let Some(answer) = events.message().await? {
        match answer.event {
            // Follows what is damaged of a layer.
            Some(Event::Progress(progress)) => {
                if !args.json && !args.quiet {
                    let lines = faults::lines(&found[told..]);
                    bar.suspend(|| output::lines_out(&lines))?;
                    told = found.len();
                }
                bar.set_length(progress.layers_total);
                bar.set_position(progress.layers);
                sum = progress;
            }
            Some(Event::Fault(fault)) => found.push(FaultView::from(fault)),
            Some(Event::Note(note)) => notes.push(note),
            None => {}
        }
    }
    bar.finish_and_clear();
    if sum.layers < sum.layers_total {
        return Err(Error::Protocol("a verification"));
    }
    let damaged = !found.is_empty();
    if args.json {
        output::json(&VerifiedView {
            layers: sum.layers,
            objects: sum.objects,
            bytes: sum.bytes,
            faults: found,
            notes,
        })?;
    } else if args.quiet {
        output::lines_out(&faults::names(&found))?;
    } else {
        let read = match args.deep {
            true => format!(", {} read", output::size(sum.bytes)),
            false => String::new(),
        };
        let how = match damaged {
            true => faults::remedy(&found),
            false if args.deep => String::new(),
            false => "; what the contents are was not read, `--deep` does".to_owned(),
        };
        let notes = notes
            .iter()
            .map(|note| output::printable(&format!("note: {note}")));
        output::lines_out(&notes.collect::<Vec<_>>())?;
        output::lines_out(&[format!(
            "{} with {}{read}: {} damaged{how}",
            output::count(sum.layers, "layer"),
            output::count(sum.objects, "content"),
            faults::sum(&found)
        )])?;
    }
    if damaged {
        Err(Error::Reported)
    } else {
        Ok(())
    }
}

pub(super) fn style() -> ProgressStyle {
    let style = ProgressStyle::with_template("{bar:30} {pos}/{len} layers {elapsed}");
    style.unwrap_or_else(|_| ProgressStyle::default_bar())
}
