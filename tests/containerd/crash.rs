//! kill -9 of plyfs and of plyd in the middle of an import: it ends, nothing is left, and it can be repeated.

use std::fs;
use std::io::Read;
use std::path::Path;
use std::process::Child;
use std::time::{Duration, Instant};

use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;

use super::host::Host;
use super::image::{MANY, MANY_LAYERS, many};
use super::tree::{self, Tree};

/// When to kill: this many layers are committed, and the next one has this many entries.
struct Moment {
    layers: usize,
    entries: usize,
}

/// At the first mount, early, late and at the commit of a layer, in a layer with parents.
const MOMENTS: [Moment; 6] = [
    moment(0, 1),
    moment(0, 100),
    moment(1, 0),
    moment(1, 1),
    moment(1, 500),
    moment(2, 900),
];

/// So many imports have to be cut off. On a machine on which most are done before they are noticed, the
/// moments come round again.
const ENOUGH: usize = MOMENTS.len() / 2;

/// How long that may take; nothing is measured by it.
const DEADLINE: Duration = Duration::from_secs(300);

const fn moment(layers: usize, entries: usize) -> Moment {
    Moment { layers, entries }
}

fn import(archive: &Path) -> [&str; 5] {
    let archive = archive.to_str().unwrap();
    ["images", "import", "--snapshotter", "plywood", archive]
}

/// Starts an import and comes back at the moment, or when the import has passed it.
fn import_until(host: &Host, archive: &Path, moment: &Moment) -> Child {
    let mut child = host.spawn_ctr(&import(archive));
    let data = host.dir.join("ply/snapshots/data");
    let deadline = Instant::now() + DEADLINE;
    loop {
        let layers = host.stored("store/records");
        let there = layers == moment.layers && entries(&data) >= moment.entries;
        if there || layers > moment.layers || child.try_wait().unwrap().is_some() {
            return child;
        }
        assert!(Instant::now() < deadline, "the import comes to nothing");
        std::thread::sleep(Duration::from_millis(1));
    }
}

/// Entries of all uppers. They come and go meanwhile.
fn entries(data: &Path) -> usize {
    let mut todo: Vec<_> = list(data).map(|dir| dir.join("upper")).collect();
    let mut count = 0;
    while let Some(path) = todo.pop() {
        count += usize::from(path.exists());
        if path.is_dir() {
            todo.extend(list(&path));
        }
    }
    count
}

fn list(dir: &Path) -> impl Iterator<Item = std::path::PathBuf> {
    let entries = fs::read_dir(dir).into_iter().flatten().flatten();
    entries.map(|entry| entry.path())
}

/// Whether the import failed, which it has to say. That it ends is what matters.
fn has_failed(host: &Host, mut import: Child) -> bool {
    let mut status = None;
    host.until("the import has ended", || {
        status = import.try_wait().unwrap();
        status.is_some()
    });
    let mut said = String::new();
    import.stderr.unwrap().read_to_string(&mut said).unwrap();
    let failed = !status.unwrap().success();
    assert!(!failed || said.contains("ctr: "), "{said:?}");
    failed
}

fn look(host: &Host) -> Tree {
    let root = host.look_into("plywood", &host.chain_id(MANY));
    let tree = tree::read(&root);
    host.look_away("plywood", &root);
    tree
}

/// Takes the image away, and with it everything that was made for it.
fn remove(host: &Host) {
    host.ctr(&["images", "rm", "--sync", MANY]);
    host.until("every snapshot is collected", || {
        host.snapshots("plywood").is_empty() && host.stored("snapshots/records") == 0
    });
    host.until("nothing is left", || {
        let dirs = ["layers", "store/records", "snapshots/data", "trash"];
        dirs.map(|dir| host.stored(dir)) == [0; 4]
            && host.mounts().is_empty()
            && host.plyfs().is_empty()
    });
}

/// An image that was imported in peace, what cuts the others off, and how many were.
struct Cuts {
    host: Host,
    archive: std::path::PathBuf,
    began: i64,
    untouched: Tree,
    failed: usize,
    tried: usize,
    deadline: Instant,
}

impl Cuts {
    fn new() -> Self {
        let host = Host::start();
        let archive = many(&host.dir);
        let began = super::now();
        host.ctr(&import(&archive));
        assert_eq!(host.stored("store/records"), MANY_LAYERS);
        let untouched = look(&host);
        assert!(untouched.len() > 2000, "{}", untouched.len());
        remove(&host);
        Self {
            host,
            archive,
            began,
            untouched,
            failed: 0,
            tried: 0,
            deadline: Instant::now() + DEADLINE,
        }
    }

    /// When to cut off the next import; `None` when each moment has been tried and enough were cut off.
    fn next(&mut self) -> Option<&'static Moment> {
        let round = self.tried;
        self.tried += 1;
        if round >= MOMENTS.len() && self.failed >= ENOUGH {
            assert!(!self.host.log_of_plyd().contains("panicked"));
            return None;
        }
        assert!(
            round < MOMENTS.len() || Instant::now() < self.deadline,
            "{} of {round} imports were cut off",
            self.failed
        );
        Some(&MOMENTS[round % MOMENTS.len()])
    }

    /// After an import that was cut off, or was not: it is repeated, and nothing differs.
    fn repeat(&mut self, failed: bool) {
        self.failed += usize::from(failed);
        let host = &self.host;
        // A snapshot that was to be unpacked into goes with containerd's next collection.
        // That may also take a layer of the failed import between containerd's look and its use of it.
        let raced =
            |said: &String| said.contains("parent snapshot") && said.contains("does not exist");
        if let Err(said) = host.try_ctr(&import(&self.archive)) {
            assert!(raced(&said), "{said}");
        }
        host.ctr(&import(&self.archive));
        let times = Default::default();
        let differences = tree::differences(&self.untouched, &look(host), self.began, &times);
        assert!(differences.is_empty(), "{}", differences.join("\n"));
        remove(host);
    }
}

#[test]
fn an_import_whose_plyfs_is_killed_ends_and_can_be_repeated() {
    let mut cuts = Cuts::new();
    while let Some(moment) = cuts.next() {
        let import = import_until(&cuts.host, &cuts.archive, moment);
        for pid in cuts.host.plyfs() {
            // It may have ended by itself meanwhile.
            let _gone = kill(Pid::from_raw(pid), Signal::SIGKILL);
        }
        let failed = has_failed(&cuts.host, import);
        cuts.repeat(failed);
    }
}

#[test]
fn an_import_whose_plyd_is_killed_ends_and_can_be_repeated() {
    let mut cuts = Cuts::new();
    while let Some(moment) = cuts.next() {
        let import = import_until(&cuts.host, &cuts.archive, moment);
        cuts.host.kill_plyd();
        let failed = if cuts.tried.is_multiple_of(2) {
            cuts.host.restart_plyd();
            has_failed(&cuts.host, import)
        } else {
            let failed = has_failed(&cuts.host, import);
            cuts.host.restart_plyd();
            failed
        };
        let records = cuts.host.stored("snapshots/records");
        let trees = cuts.host.stored("store/records") + cuts.host.stored("snapshots/data");
        assert_eq!(
            records, trees,
            "a tree without its record, or the other way round"
        );
        cuts.host.until("containerd has connected again", || {
            let prepare = ["snapshots", "--snapshotter", "plywood", "prepare", "probe"];
            cuts.host.try_ctr(&prepare).is_ok()
        });
        cuts.host
            .ctr(&["snapshots", "--snapshotter", "plywood", "rm", "probe"]);
        cuts.repeat(failed);
    }
}
