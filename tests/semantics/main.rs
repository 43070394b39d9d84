//! The table of `docs/SEMANTICS.md`, row by row.
//!
//! A row is one sentence and one function. The function runs on native ext4, on kernel overlayfs as it
//! comes and with everything on, on fuse-overlayfs and on plyfs, each with fresh layers and in a process
//! of its own with a deadline; what it comes to (`yes`, or one word) is compared with the document. The
//! lower layers are looked at before and after plyfs has used them.
//!
//!     cargo test --test semantics [-- NAME...]             run the rows whose names contain one of these
//!     cargo test --test semantics -- --list                name them
//!     UPDATE_TABLE=1 cargo test --test semantics           write what ran into the document
//!     SEMANTICS_PEERS=plyfs cargo test --test semantics    ask only these columns
//!     SEMANTICS_OPTIONS=writeback cargo test ...           give plyfs more options
//!
//! A column is not compared where its file system cannot be had, or where the kernel or fuse-overlayfs is
//! another version than the document's.

#[path = "../common/mod.rs"]
#[allow(unused_imports, reason = "another program mounts by it")]
mod common;

mod directories;
mod disk;
mod errors;
mod files;
mod fill;
mod handles;
mod identity;
mod limits;
mod links;
mod listings;
mod marks;
mod metadata;
mod names;
mod outcome;
mod place;
mod row;
mod run;
mod table;
mod tools;

use std::env;
use std::panic;
use std::process::ExitCode;
use std::sync::Mutex;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::thread;

use place::Peer;
use row::Row;
use table::Table;

/// Rows that run at once: they wait for the disk more than they compute.
const WORKERS: usize = 4;

fn rows() -> Vec<Row> {
    let chapters: [(&str, Vec<Row>); 10] = [
        ("identity", identity::rows()),
        ("handles", handles::rows()),
        ("directories", directories::rows()),
        ("listings", listings::rows()),
        ("links", links::rows()),
        ("metadata", metadata::rows()),
        ("files", files::rows()),
        ("names", names::rows()),
        ("marks", marks::rows()),
        ("errors", errors::rows()),
    ];
    let mut all = Vec::new();
    for (chapter, rows) in chapters.into_iter().chain([("limits", limits::rows())]) {
        all.extend(rows.into_iter().map(|row| Row {
            name: format!("{chapter}::{}", row.name),
            ..row
        }));
    }
    all
}

/// What is to be done, by command line and environment.
struct Wanted {
    filters: Vec<String>,
    peers: Option<String>,
    update: bool,
}

impl Wanted {
    fn row(&self, name: &str) -> bool {
        self.filters.is_empty() || self.filters.iter().any(|filter| name.contains(filter))
    }

    fn peer(&self, peer: Peer) -> bool {
        let chosen = |list: &String| list.split(',').any(|name| name == peer.name());
        self.peers.as_ref().is_none_or(chosen)
    }
}

fn main() -> ExitCode {
    let rows = rows();
    if let Ok(request) = env::var(run::REQUEST) {
        return run::child(&rows, &request);
    }
    let arguments: Vec<String> = env::args().skip(1).collect();
    if arguments.iter().any(|word| word == "--list") {
        rows.iter().for_each(|row| println!("{}: test", row.name));
        return ExitCode::SUCCESS;
    }
    let is_filter = |word: &String| !word.starts_with('-');
    let wanted = Wanted {
        filters: arguments.into_iter().filter(is_filter).collect(),
        peers: env::var("SEMANTICS_PEERS").ok(),
        update: env::var_os("UPDATE_TABLE").is_some(),
    };
    let mut rows = rows;
    rows.retain(|row| wanted.row(&row.name));
    run_all(&rows, &wanted)
}

fn run_all(rows: &[Row], wanted: &Wanted) -> ExitCode {
    let documented = table::read();
    let comparable = table::comparable();
    let next = AtomicUsize::new(0);
    let failed = Mutex::new(Vec::new());
    let seen = Mutex::new(documented.clone());
    thread::scope(|scope| {
        for _ in 0..WORKERS {
            scope.spawn(|| {
                while let Some(row) = rows.get(next.fetch_add(1, Ordering::Relaxed)) {
                    let ran = panic::catch_unwind(|| run::row(row, |peer| wanted.peer(peer)));
                    let Ok((outcomes, mut wrong)) = ran else {
                        println!("test {} ... FAILED", row.name);
                        failed.lock().unwrap().push(row.name.clone());
                        continue;
                    };
                    let stated = documented.get(&row.name);
                    for (n, outcome) in outcomes.iter().enumerate() {
                        let Some(outcome) = outcome else { continue };
                        let stated = stated.and_then(|cells| cells.get(n));
                        if stated != Some(outcome) {
                            let stated = stated.map_or("nothing", String::as_str);
                            let peer = table::COLUMNS[n].name();
                            let difference =
                                format!("{peer}: {outcome}, the document says {stated}");
                            if wanted.update {
                                println!("{}: {difference}", row.name);
                            } else if comparable[n] {
                                wrong.push(difference);
                            } else {
                                println!("{}: {difference} (of another version)", row.name);
                            }
                        }
                    }
                    record(&seen, row, outcomes);
                    let ok = wrong.is_empty() || wanted.update;
                    println!("test {} ... {}", row.name, if ok { "ok" } else { "FAILED" });
                    for line in &wrong {
                        println!("  {line}");
                    }
                    if !ok {
                        failed.lock().unwrap().push(row.name.clone());
                    }
                }
            });
        }
    });
    if wanted.update {
        table::write(&self::rows(), &seen.into_inner().unwrap());
    }
    let failed = failed.into_inner().unwrap();
    if !failed.is_empty() {
        println!("\nfailures:\n    {}", failed.join("\n    "));
    }
    println!(
        "\ntest result: {}. {} passed; {} failed",
        if failed.is_empty() { "ok" } else { "FAILED" },
        rows.len() - failed.len(),
        failed.len()
    );
    if failed.is_empty() {
        ExitCode::SUCCESS
    } else {
        ExitCode::FAILURE
    }
}

/// Keeps what ran; what did not run stays as it was documented.
fn record(seen: &Mutex<Table>, row: &Row, outcomes: Vec<Option<String>>) {
    let mut seen = seen.lock().unwrap();
    let before = seen.remove(&row.name).unwrap_or_default();
    let cells = outcomes
        .into_iter()
        .enumerate()
        .map(|(n, outcome)| table::column(outcome.or_else(|| before.get(n).cloned())));
    seen.insert(row.name.clone(), cells.collect());
}
