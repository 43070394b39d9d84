//! The union beside its peers: the same real tree under kernel overlayfs, Debian's fuse-overlayfs and
//! plyfs, on directories and on packed layers, in turns, in one run.
//!
//! `cargo bench --bench union -- [--rounds N] [--rows SUBSTRING] [--huge MIB] [--plyfs NAME=OPTION,...]`
//!
//! A row is one job on a fresh mount. The systems take turns within each round, so that the machine's
//! moods hit all of them, and the figure of a row is the median over the rounds. What is printed are
//! ratios, since the absolute times of a shared machine say nothing. `--plyfs` adds a column of plyfs with
//! other options, to compare its modes. `--rows attributes` changes attributes of 1 GiB that copy no data.
//! `--rows stall` and `--rows completion` measure what small requests wait for meanwhile; `--huge` is the length of
//! the file that is completed.

#[path = "../common/mod.rs"]
mod common;
mod memory;
mod metadata;
mod rows;
mod stall;
mod start;
mod systems;

use std::collections::BTreeMap;
use std::path::Path;
use std::process::ExitCode;

use common::median;
use rows::{ROWS, Row};
use systems::{Image, System};

struct Options {
    rounds: usize,
    rows: String,
    /// MiB of the file that is completed.
    huge: u64,
    extra: Vec<(String, String)>,
}

fn options() -> Result<Options, String> {
    let mut options = Options {
        rounds: 5,
        rows: String::new(),
        huge: 4096,
        extra: Vec::new(),
    };
    let mut args = std::env::args().skip(1);
    while let Some(arg) = args.next() {
        let mut value = || args.next().ok_or(format!("{arg} needs a value"));
        match arg.as_str() {
            "--bench" => {}
            "--rounds" => {
                options.rounds = value()?.parse().map_err(|e| format!("--rounds: {e}"))?;
            }
            "--rows" => options.rows = value()?,
            "--huge" => options.huge = value()?.parse().map_err(|e| format!("--huge: {e}"))?,
            "--plyfs" => {
                let v = value()?;
                let (name, opts) = v.split_once('=').ok_or("--plyfs takes NAME=OPTIONS")?;
                options.extra.push((name.into(), opts.into()));
            }
            _ => {
                return Err(format!(
                    "unknown argument {arg}; known: --rounds N, --rows SUBSTRING, --huge MIB, --plyfs NAME=OPTIONS"
                ));
            }
        }
    }
    Ok(options)
}

/// Seconds of one row: system name to one figure a round.
type Figures = BTreeMap<String, Vec<f64>>;

fn run_row(row: &Row, systems: &[System], image: &Image, rounds: usize) -> Result<Figures, String> {
    let mut figures = Figures::new();
    for round in 0..rounds {
        for i in 0..systems.len() {
            let system = &systems[(i + round) % systems.len()];
            let mount = system.mount(image)?;
            let seconds = (row.run)(&mount, image)
                .map_err(|e| format!("{} on {}: {e}", row.name, system.name))?;
            figures
                .entry(system.name.clone())
                .or_default()
                .push(seconds);
        }
    }
    Ok(figures)
}

fn geometric_mean(values: &[f64]) -> f64 {
    (values.iter().map(|v| v.ln()).sum::<f64>() / values.len() as f64).exp()
}

fn print_table(systems: &[System], results: &[(&str, Figures)]) {
    let plyfs: Vec<&str> = systems
        .iter()
        .map(|s| s.name.as_str())
        .filter(|n| n.starts_with("plyfs"))
        .collect();
    print!("\n| row | overlayfs (ms) | fuse-overlayfs / overlayfs |");
    for name in &plyfs {
        print!(" {name} / overlayfs | {name} / fuse-overlayfs |");
    }
    println!("\n|---|---|---|{}", "---|---|".repeat(plyfs.len()));
    for (row, figures) in results {
        let of = |name: &str| figures.get(name).map_or(f64::NAN, |v| median(v));
        let (kernel, peer) = (of("overlayfs"), of("fuse-overlayfs"));
        print!("| {row} | {:.1} | {:.2} |", kernel * 1e3, peer / kernel);
        for name in &plyfs {
            print!(" {:.2} | {:.2} |", of(name) / kernel, of(name) / peer);
        }
        println!();
    }
    print!("| **geometric mean** | | |");
    for name in &plyfs {
        let ratios = ratios(results, name, "fuse-overlayfs");
        print!(" | **{:.2}** |", geometric_mean(&ratios));
    }
    println!("\n");
    for name in &plyfs {
        print_summary(results, name, "fuse-overlayfs");
    }
    print_summary(results, "plyfs packed", "plyfs");
}

/// Of each row, the time of `name` beside that of `peer`.
fn ratios(results: &[(&str, Figures)], name: &str, peer: &str) -> Vec<f64> {
    let of = |figures: &Figures, name: &str| figures.get(name).map_or(f64::NAN, |v| median(v));
    results
        .iter()
        .map(|(_, figures)| of(figures, name) / of(figures, peer))
        .collect()
}

fn print_summary(results: &[(&str, Figures)], name: &str, peer: &str) {
    let ratios = ratios(results, name, peer);
    let rows = results.iter().map(|(row, _)| *row);
    let worst = rows.zip(&ratios).max_by(|a, b| a.1.total_cmp(b.1));
    let (row, worst) = worst.map_or(("none", f64::NAN), |(row, ratio)| (row, *ratio));
    println!(
        "{name}: {:.2} of the time of {peer} in the geometric mean; its slowest row against it is {row:?} ({worst:.2})",
        geometric_mean(&ratios)
    );
}

fn run() -> Result<(), String> {
    let options = options()?;
    let image = Image::prepare(Path::new(env!("CARGO_MANIFEST_DIR")))?;
    let mut systems = vec![
        System::overlayfs(),
        System::fuse_overlayfs(),
        System::plyfs("plyfs", ""),
        System::packed(),
    ];
    for (name, opts) in &options.extra {
        systems.push(System::plyfs(&format!("plyfs {name}"), opts));
    }
    let mut results = Vec::new();
    for row in ROWS.iter().filter(|r| r.name.contains(&options.rows)) {
        let figures = run_row(row, &systems, &image, options.rounds)?;
        let line: Vec<String> = systems
            .iter()
            .map(|s| format!("{} {:.1} ms", s.name, median(&figures[&s.name]) * 1e3))
            .collect();
        eprintln!("{}: {}", row.name, line.join(", "));
        results.push((row.name, figures));
    }
    if !results.is_empty() {
        print_table(&systems, &results);
    }
    if "memory".contains(&options.rows) {
        memory::run(&systems, &image)?;
    }
    if "attributes of 1 GiB".contains(&options.rows) {
        metadata::run(&image, options.rounds)?;
    }
    // They take their time and load the disk: only when asked for by name.
    if options.rows == "stall" {
        stall::run(&systems, &image)?;
    }
    if options.rows == "completion" {
        stall::complete(&image, options.huge << 20)?;
    }
    if "container start".contains(&options.rows) {
        start::run(options.rounds.max(10))?;
    }
    Ok(())
}

fn main() -> ExitCode {
    match run() {
        Ok(()) => ExitCode::SUCCESS,
        Err(e) => {
            eprintln!("bench: {e}");
            ExitCode::FAILURE
        }
    }
}
