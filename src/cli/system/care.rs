//! `snapctl system gc` and `verify`.

use std::collections::BTreeSet;

use indicatif::{ProgressBar, ProgressStyle};
use serde::Serialize;

use super::{GcArgs, VerifyArgs};
use crate::cli::client::Client;
use crate::cli::error::{Error, Result};
use crate::cli::output;
use crate::grpc::pb::plywood::verify_response::Event;
use crate::grpc::pb::plywood::{CollectRequest, Fault, VerifyProgress, VerifyRequest};

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
}

#[derive(Serialize)]
pub(super) struct FaultView {
    pub(super) layer: String,
    path: Option<String>,
    problem: String,
    snapshots: Vec<String>,
    kind: String,
    of: Option<String>,
    file: Option<String>,
    layers: Vec<String>,
    images: Vec<String>,
    pub(super) advice: Option<String>,
}

impl From<Fault> for FaultView {
    fn from(fault: Fault) -> Self {
        let known = |text: String| Some(text).filter(|text| !text.is_empty());
        Self {
            layer: fault.layer,
            path: known(fault.path),
            problem: fault.problem,
            snapshots: fault.snapshots,
            kind: fault.kind,
            of: known(fault.of),
            file: known(fault.file),
            layers: fault.layers,
            images: fault.images,
            advice: known(fault.advice),
        }
    }
}

impl FaultView {
    /// What is wrong with what; without what to do about it.
    pub(super) fn line(&self) -> String {
        if self.layer.is_empty() {
            return match &self.of {
                Some(of) => format!("{of}: {}", self.problem),
                None => self.problem.clone(),
            };
        }
        let layer = output::short(&self.layer);
        let path = self.path.as_deref().unwrap_or("the layer itself");
        let of = match self.snapshots.as_slice() {
            [] => String::new(),
            snapshots => format!(" (of {})", snapshots.join(", ")),
        };
        match self.kind.as_str() {
            // It names itself.
            "record" => format!("layer {layer}{of}: {}", self.problem),
            _ => format!("layer {layer}{of}: {path}: {}", self.problem),
        }
    }
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
    let mut faults: Vec<FaultView> = Vec::new();
    while let Some(answer) = events.message().await? {
        match answer.event {
            Some(Event::Progress(progress)) => {
                bar.set_length(progress.layers_total);
                bar.set_position(progress.layers);
                sum = progress;
            }
            Some(Event::Fault(fault)) => {
                let fault = FaultView::from(fault);
                if !args.json && !args.quiet {
                    let advice = fault.advice.iter();
                    let advice: String = advice.map(|advice| format!("; {advice}")).collect();
                    let line = output::printable(&format!("{}{advice}", fault.line()));
                    bar.suspend(|| output::lines_out(&[line]))?;
                }
                faults.push(fault);
            }
            None => {}
        }
    }
    bar.finish_and_clear();
    if sum.layers < sum.layers_total {
        return Err(Error::Protocol("a verification"));
    }
    let damaged = !faults.is_empty();
    if args.json {
        output::json(&VerifiedView {
            layers: sum.layers,
            objects: sum.objects,
            bytes: sum.bytes,
            faults,
        })?;
    } else if args.quiet {
        let mut layers: BTreeSet<_> = faults.iter().map(|fault| &*fault.layer).collect();
        layers.remove("");
        output::lines_out(&layers.into_iter().collect::<Vec<_>>())?;
    } else {
        let read = match args.deep {
            true => format!(", {} read", output::size(sum.bytes)),
            false => String::new(),
        };
        let how = match damaged {
            true => "; `snapctl system repair` mends it, or says what would",
            false if args.deep => "",
            false => "; what the contents are was not read, `--deep` does",
        };
        output::lines_out(&[format!(
            "{} with {}{read}: {} damaged{how}",
            output::count(sum.layers, "layer"),
            output::count(sum.objects, "content"),
            faults.len()
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
