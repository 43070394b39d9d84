//! One row on all file systems, each in a process of its own, so that a row may change its user, its
//! limits and its working directory, and a hang ends.

use std::env;
use std::fs::{self, File};
use std::path::Path;
use std::process::{Command, ExitCode, Stdio};
use std::time::{Duration, Instant};

use nix::mount::{MntFlags, umount2};

use crate::base::Base;
use crate::common::snapshot::{Snapshot, age_access_times};
use crate::fill::Fill;
use crate::outcome::Outcome;
use crate::place::{Peer, Place};
use crate::row::Row;

/// The environment variable that makes this program a child: row, column, options of plyfs, layers, directory.
pub const REQUEST: &str = "SEMANTICS_CHILD";

/// The outcome of a file system that this host lacks.
const NOT_TO_BE_HAD: &str = "not to be had";

/// How long one row may take on one file system, on a loaded machine.
fn deadline() -> Duration {
    Duration::from_secs(if full() { 1200 } else { 120 })
}

/// Whether the long forms of the rows that have one are wanted.
pub fn full() -> bool {
    env::var_os("PLYWOOD_TEST_FULL").is_some()
}

/// Runs a row on the file systems that are wanted; also says what is wrong besides.
pub fn row(
    row: &Row,
    options: &str,
    base: &Base,
    wanted: impl Fn(Peer) -> bool,
) -> (Vec<Option<String>>, Vec<String>) {
    let base = base.directory();
    let layers = base.path().join("layers");
    fs::create_dir(&layers).unwrap();
    let fill = Fill::new(&layers);
    (row.fill)(&fill);
    let mut outcomes = vec![None; Peer::ALL.len()];
    let mut notes = Vec::new();
    // plyfs goes first: what it does to the layers is not to be mixed up with what others do.
    for (n, peer) in Peer::ALL.into_iter().enumerate().rev() {
        if !wanted(peer) || row.plyfs_alone && peer != Peer::Plyfs {
            continue;
        }
        let before = (peer == Peer::Plyfs && !row.unseen).then(|| {
            age_access_times(&layers);
            Snapshot::of(&layers)
        });
        let dir = base.path().join(peer.name());
        fs::create_dir(&dir).unwrap();
        let log = base.path().join(format!("{}.log", peer.name()));
        let outcome = in_child(row, peer, options, &layers, &dir, &log);
        unmount_below(&dir);
        if peer == Peer::Plyfs && outcome != "yes" {
            notes.extend(fs::read_to_string(&log).unwrap().lines().map(str::to_owned));
        }
        if let Some(before) = before {
            let same = std::panic::catch_unwind(|| before.assert_same(&layers));
            if same.is_err() {
                notes.push("a lower layer was changed".to_owned());
            }
        }
        outcomes[n] = (outcome != NOT_TO_BE_HAD).then_some(outcome);
    }
    unmount_below(base.path());
    // Only what is wrong is told; a word that the document has is not.
    notes.retain(|note| note.contains("panicked") || note.contains("lower layer"));
    (outcomes, notes)
}

fn in_child(row: &Row, peer: Peer, options: &str, layers: &Path, dir: &Path, log: &Path) -> String {
    let disk = match row.disk {
        Some(disk) => match disk.attach(dir) {
            Some(attached) => Some(attached),
            None => return NOT_TO_BE_HAD.to_owned(),
        },
        None => None,
    };
    let output = log.with_extension("out");
    let request = [
        row.name.as_str(),
        peer.name(),
        options,
        path(layers),
        path(dir),
    ]
    .join("\n");
    let mut child = Command::new(env::current_exe().unwrap())
        .env(REQUEST, request)
        .stdin(Stdio::null())
        .stdout(File::create(&output).unwrap())
        .stderr(File::create(log).unwrap())
        .spawn()
        .unwrap();
    let start = Instant::now();
    let status = loop {
        if let Some(status) = child.try_wait().unwrap() {
            break Some(status);
        }
        if start.elapsed() > deadline() {
            break None;
        }
        std::thread::sleep(Duration::from_millis(2));
    };
    let Some(status) = status else {
        // Whatever it waits for is ended by the end of its mount.
        unmount_below(dir);
        let _ = child.kill();
        let _ = child.wait();
        return "hangs".to_owned();
    };
    unmount_below(dir);
    drop(disk);
    let said = fs::read_to_string(&output).unwrap();
    match (status.success(), said.lines().last()) {
        (true, Some(word)) => word.to_owned(),
        _ => {
            let log = fs::read_to_string(log).unwrap();
            eprintln!("{} on {}: {status}\n{log}", row.name, peer.name());
            "fails".to_owned()
        }
    }
}

fn path(path: &Path) -> &str {
    path.to_str().unwrap()
}

/// Takes away every mount below a directory, the last one first.
fn unmount_below(dir: &Path) {
    let text = fs::read_to_string("/proc/self/mountinfo").unwrap();
    let points = text.lines().filter_map(|line| line.split(' ').nth(4));
    let points: Vec<&str> = points
        .filter(|point| point.starts_with(&format!("{}/", path(dir))))
        .collect();
    for point in points.iter().rev() {
        let _ = umount2(*point, MntFlags::MNT_DETACH);
    }
}

/// The child's side: runs one row on one file system and says what it comes to.
pub fn child(rows: &[Row], request: &str) -> ExitCode {
    let words: Vec<&str> = request.split('\n').collect();
    let [name, peer, options, layers, dir] = words[..] else {
        return ExitCode::from(2);
    };
    let row = rows.iter().find(|row| row.name == name).unwrap();
    let peer = Peer::ALL.into_iter().find(|known| known.name() == peer);
    let said = match run(
        row,
        peer.unwrap(),
        options,
        Path::new(layers),
        Path::new(dir),
    ) {
        Ok(()) => "yes".to_owned(),
        Err(said) => said.to_string(),
    };
    println!("{said}");
    ExitCode::SUCCESS
}

fn run(row: &Row, peer: Peer, options: &str, layers: &Path, dir: &Path) -> Outcome {
    let place = Place::new(peer, options, dir, &Fill::new(layers), row.unseen)?;
    (row.run)(&place)?;
    env::set_current_dir("/")?;
    place.unmount()
}
