//! The layer store beside containerd's overlayfs snapshotter: how fast images are unpacked, what they take of the disk, and what a
//! view of their layers costs.
//!
//! `cargo bench --bench store -- [--rounds N] [--rows WORD]`
//!
//! Whatever is compared takes turns in one run, and what counts are the ratios. Rows: unpack, disk, second, layers, view.

#[path = "../common/mod.rs"]
mod common;
mod hosts;
mod images;
mod views;

use std::path::Path;
use std::process::ExitCode;

struct Options {
    rounds: usize,
    rows: String,
}

fn options() -> Result<Options, String> {
    let mut options = Options {
        rounds: 5,
        rows: String::new(),
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
            _ => {
                return Err(format!(
                    "unknown argument {arg}; known: --rounds N, --rows WORD"
                ));
            }
        }
    }
    Ok(options)
}

fn run() -> Result<(), String> {
    let options = options()?;
    let asked = |row: &str| row.contains(&options.rows);
    let top = Path::new(env!("CARGO_MANIFEST_DIR"));
    if asked("unpack") || asked("disk") || asked("second") {
        let images = images::Images::prepare(top)?;
        if asked("unpack") {
            images.unpack(options.rounds)?;
        }
        if asked("disk") {
            images.disk()?;
        }
        if asked("second") {
            images.second()?;
        }
    }
    if asked("layers") {
        views::lookups(options.rounds)?;
    }
    if asked("view") {
        views::large(options.rounds)?;
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
