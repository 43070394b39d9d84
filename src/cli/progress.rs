//! What a long call shows on stderr while it runs: bars on a terminal, a line for each step elsewhere.

use std::collections::BTreeMap;
use std::io::{IsTerminal, stderr};

use indicatif::{MultiProgress, ProgressBar, ProgressStyle};

use super::output::{note, short, size};
use crate::grpc::pb::plywood::LoadProgress;

/// How progress is shown.
pub enum Progress {
    /// Not at all.
    Quiet,
    /// A line for each layer and phase, when it begins.
    Lines(BTreeMap<String, String>),
    /// Bars that move.
    Bars(MultiProgress, BTreeMap<String, ProgressBar>),
}

impl Progress {
    /// Bars when stderr is a terminal.
    pub fn new(quiet: bool) -> Self {
        if quiet {
            Self::Quiet
        } else if stderr().is_terminal() {
            Self::Bars(MultiProgress::new(), BTreeMap::new())
        } else {
            Self::Lines(BTreeMap::new())
        }
    }

    /// Shows one report of plyd.
    pub fn show(&mut self, report: &LoadProgress) {
        match self {
            Self::Quiet => {}
            Self::Lines(seen) => {
                let phase = seen.entry(report.digest.clone()).or_default();
                if *phase != report.phase {
                    note(&line(report));
                    phase.clone_from(&report.phase);
                }
            }
            Self::Bars(all, bars) => {
                let bar = bars
                    .entry(report.digest.clone())
                    .or_insert_with(|| all.add(bar()));
                // Without a total the length follows what is done: a count, not a fraction.
                bar.set_length(report.total.max(report.done));
                bar.set_position(report.done);
                bar.set_message(title(report));
            }
        }
    }

    /// Takes the bars away.
    pub fn finish(self) {
        if let Self::Bars(all, _) = self {
            // It fails only where the terminal has gone.
            let _ignored = all.clear();
        }
    }
}

fn bar() -> ProgressBar {
    let style = ProgressStyle::with_template("{msg:<24} {wide_bar} {bytes}/{total_bytes}");
    ProgressBar::new(0).with_style(style.unwrap_or_else(|_| ProgressStyle::default_bar()))
}

fn title(report: &LoadProgress) -> String {
    let (_, hex) = report.digest.split_once(':').unwrap_or(("", ""));
    format!("{} {}", report.phase, short(hex)).trim().to_owned()
}

fn line(report: &LoadProgress) -> String {
    if report.total == 0 {
        title(report)
    } else {
        format!("{} ({})", title(report), size(report.total))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn lines_name_phase_layer_and_size() {
        let mut report = LoadProgress {
            phase: "unpacking".into(),
            digest: "sha256:0123456789abcdef".into(),
            done: 0,
            total: 2_000_000,
        };
        assert_eq!(line(&report), "unpacking 0123456789ab (2.0 MB)");
        report.digest.clear();
        report.total = 0;
        report.phase = "reading".into();
        assert_eq!(line(&report), "reading");
    }
}
