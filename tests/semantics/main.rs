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
//!     SEMANTICS_OPTIONS=writeback cargo test ...           ask plyfs alone, with more options
//!
//! After that all rows run on plyfs again as it is on the oldest kernels, and in one other mode, and those on file
//! handles where the kernel has none; where they come to something else there the document has a list.
//!
//! A column is not compared where its file system cannot be had, or where the kernel or fuse-overlayfs is
//! another version than the document's.

#[path = "../common/mod.rs"]
#[allow(unused_imports, reason = "another program mounts by it")]
mod common;

mod acls;
mod base;
mod chunks;
mod directories;
mod errors;
mod files;
mod fill;
mod handles;
mod identity;
mod interchange;
mod limits;
mod links;
mod listings;
mod marks;
mod metadata;
mod names;
mod outcome;
mod place;
mod protected;
mod row;
mod run;
mod set_ids;
mod table;
mod tools;
mod uncarried;
mod without_data;

use std::env;
use std::panic::{self, AssertUnwindSafe};
use std::process::ExitCode;
use std::sync::Mutex;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::thread;
use std::time::{SystemTime, UNIX_EPOCH};

use base::Base;
use common::mode::kernel_passes;
use place::Peer;
use row::Row;
use table::Table;

/// Asked of the chapter on file handles alone.
const WITHOUT_HANDLES: &str = "kernel_features=-export";

/// Rows that run at once: they wait for the disk more than they compute.
const WORKERS: usize = 4;

fn rows() -> Vec<Row> {
    let chapters: [(&str, Vec<Row>); 16] = [
        ("identity", identity::rows()),
        ("handles", handles::rows()),
        ("directories", directories::rows()),
        ("listings", listings::rows()),
        ("links", links::rows()),
        ("metadata", metadata::rows()),
        ("set_ids", set_ids::rows()),
        ("protected", protected::rows()),
        ("without_data", without_data::rows()),
        ("files", files::rows()),
        ("chunks", chunks::rows()),
        ("names", names::rows()),
        ("marks", marks::rows()),
        ("interchange", interchange::rows()),
        ("errors", errors::rows()),
        ("uncarried", uncarried::rows()),
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

    /// Nothing but the program was asked for.
    fn everything(&self) -> bool {
        self.filters.is_empty() && self.peers.is_none() && !self.update
    }
}

fn main() -> ExitCode {
    let mut rows = rows();
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
    rows.retain(|row| wanted.row(&row.name));
    let base = Base::new();
    let mut failed = match env::var("SEMANTICS_OPTIONS") {
        Ok(options) => run_with_options(&rows, &options, &base),
        Err(_) => run_all(&rows, &wanted, &base),
    };
    let mut count = rows.len();
    if wanted.everything() && env::var_os("SEMANTICS_OPTIONS").is_none() {
        // What only repeats the long rows is left out.
        rows.retain(|row| !row.plyfs_alone);
        for options in modes() {
            println!("with -o {options}");
            failed.extend(run_with_options(&rows, options, &base));
            count += rows.len();
        }
        rows.retain(|row| row.name.starts_with("handles::"));
        println!("with -o {WITHOUT_HANDLES}");
        // One by one: without handles a row does not survive that another drops the kernel's caches.
        for row in &rows {
            let row = std::slice::from_ref(row);
            failed.extend(run_with_options(row, WITHOUT_HANDLES, &base));
        }
        count += rows.len();
    }
    if !failed.is_empty() {
        println!("\nfailures:\n    {}", failed.join("\n    "));
    }
    let (word, passed) = match failed.len() {
        0 => ("ok", count),
        bad => ("FAILED", count - bad),
    };
    println!(
        "\ntest result: {word}. {passed} passed; {} failed",
        failed.len()
    );
    ExitCode::from(u8::from(!failed.is_empty()))
}

/// Other ways to mount: what the oldest kernels leave, and the others in turn, one a day.
fn modes() -> Vec<&'static str> {
    const OLDEST: &str = "kernel_features=-all";
    const IN_TURN: [&str; 4] = ["writeback", "no_open", "no_open,writeback", "passthrough"];
    let turns: Vec<_> = IN_TURN
        .into_iter()
        .filter(|options| *options != "passthrough" || kernel_passes())
        .collect();
    if run::full() {
        return [OLDEST].into_iter().chain(turns).collect();
    }
    let day = SystemTime::now()
        .duration_since(UNIX_EPOCH)
        .unwrap()
        .as_secs()
        / 86_400;
    vec![OLDEST, turns[day as usize % turns.len()]]
}

/// Calls `body` for every row, several at a time; gives the names of those that it answers false for.
fn in_parallel(rows: &[Row], body: impl Fn(&Row) -> bool + Sync) -> Vec<String> {
    let next = AtomicUsize::new(0);
    let failed = Mutex::new(Vec::new());
    thread::scope(|scope| {
        for _ in 0..WORKERS {
            scope.spawn(|| {
                while let Some(row) = rows.get(next.fetch_add(1, Ordering::Relaxed)) {
                    let ok = panic::catch_unwind(AssertUnwindSafe(|| body(row))).unwrap_or(false);
                    println!("test {} ... {}", row.name, if ok { "ok" } else { "FAILED" });
                    if !ok {
                        failed.lock().unwrap().push(row.name.clone());
                    }
                }
            });
        }
    });
    failed.into_inner().unwrap()
}

/// All rows on all columns.
fn run_all(rows: &[Row], wanted: &Wanted, base: &Base) -> Vec<String> {
    let documented = table::read();
    let comparable = table::comparable(base);
    let seen = Mutex::new(documented.clone());
    let failed = in_parallel(rows, |row| {
        let (outcomes, mut wrong) = run::row(row, "", base, |peer| wanted.peer(peer));
        let stated = documented.get(&row.name);
        for (n, outcome) in outcomes.iter().enumerate() {
            let Some(outcome) = outcome else { continue };
            let stated = stated.and_then(|cells| cells.get(n));
            if stated.is_some_and(|cell| table::allows(cell, outcome)) {
                continue;
            }
            let stated = stated.map_or("nothing", String::as_str);
            let peer = table::COLUMNS[n].name();
            let difference = format!("{peer}: {outcome}, the document says {stated}");
            if comparable[n] {
                wrong.push(difference);
            } else {
                println!("{}: {difference} (not compared)", row.name);
            }
        }
        record(&seen, row, outcomes);
        wrong
            .iter()
            .for_each(|line| println!("{}: {line}", row.name));
        wrong.is_empty() || wanted.update
    });
    if wanted.update {
        table::write(&self::rows(), &seen.into_inner().unwrap());
    }
    failed
}

/// All rows on plyfs with more options.
fn run_with_options(rows: &[Row], options: &str, base: &Base) -> Vec<String> {
    let documented = table::read();
    let exceptions = table::exceptions(options);
    in_parallel(rows, |row| {
        let (outcomes, mut wrong) = run::row(row, options, base, |peer| peer == Peer::Plyfs);
        let normal = documented.get(&row.name).and_then(|cells| cells.last());
        let stated = exceptions.get(&row.name).or(normal);
        let outcome = outcomes.last().and_then(Option::as_ref);
        if outcome != stated {
            wrong.push(format!("{outcome:?}, the document says {stated:?}"));
        }
        wrong
            .iter()
            .for_each(|line| println!("{} with {options}: {line}", row.name));
        wrong.is_empty()
    })
}

/// Keeps what ran; what did not run stays as it was documented.
fn record(seen: &Mutex<Table>, row: &Row, outcomes: Vec<Option<String>>) {
    let mut seen = seen.lock().unwrap();
    let before = seen.remove(&row.name).unwrap_or_default();
    let cells = outcomes.into_iter().enumerate().map(|(n, outcome)| {
        let stated = before.get(n).cloned();
        match (outcome, stated) {
            (Some(outcome), Some(cell)) if table::allows(&cell, &outcome) => cell,
            (outcome, stated) => table::column(outcome.or(stated)),
        }
    });
    seen.insert(row.name.clone(), cells.collect());
}
