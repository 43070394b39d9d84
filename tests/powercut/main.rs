//! Power cuts. plyd works on a file system whose disk is recorded write by write; then, for many moments of that
//! work, the disk is made as a power cut at that moment may leave it, and a new plyd has to start on it and to have
//! all that had been acknowledged by then.
//!
//! - `recorder`: the disk that remembers.
//! - `work`: what plyd is asked to do, and what of it has to be there once it was acknowledged.
//!
//! At a cut everything up to the last flush is on the disk. Of what was written after it nothing is there, or any part: the
//! disk had it in a cache that has no order. On a file system without a journal there are cuts only where something was
//! acknowledged. The seed of the cuts is printed; `PLYWOOD_POWERCUT_SEED` sets it and `PLYWOOD_POWERCUT_CUTS` their number for
//! each file system.
//!
//! A file system that the kernel lacks is passed over, and said to be; one of them has to be there.
//!
//! Needs root, /dev/fuse and a loop device.
#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    reason = "a test that cannot go on ends"
)]

#[path = "../image/archive.rs"]
#[allow(dead_code, reason = "other tests use the rest of it")]
mod archive;
#[path = "../cli/common.rs"]
mod common;
#[path = "../common/many.rs"]
mod many;
mod recorder;
mod work;

use std::fs;
use std::io::{self, Write};
use std::path::Path;
use std::process::Command;

use nix::errno::Errno;
use nix::mount::MsFlags;
use nix::sys::signal::Signal;
use plywood::store::ingest::Settings;
use plywood::store::layers::Layers;
use rand::rngs::StdRng;
use rand::{Rng, SeedableRng};

use common::{PLYD, Plyd};
use recorder::{Event, Image, Recorder};
use work::{Fact, Images};

/// Which file system plyd's root lies on.
#[derive(Clone, Copy)]
struct Host {
    name: &'static str,
    /// What the kernel calls it.
    kind: &'static str,
    mkfs: &'static [&'static str],
    /// What makes it whole after a cut, if mounting it does not. Then it is cut right after acknowledgements alone, and nothing is
    /// there that was not flushed: in the middle of something nothing tells what it was to be.
    fsck: Option<&'static [&'static str]>,
    mib: u64,
}

const EXT4: Host = Host {
    name: "ext4",
    kind: "ext4",
    mkfs: &[
        "mkfs.ext4",
        "-qF",
        "-E",
        "nodiscard,lazy_itable_init=0,lazy_journal_init=0",
    ],
    fsck: None,
    mib: 128,
};
/// The others bring all names to the disk that are older than what they are asked to sync. This one brings what it is asked to,
/// and so tells whether each directory is synced.
const UNORDERED: Host = Host {
    name: "ext4 without a journal",
    kind: "ext4",
    mkfs: &[
        "mkfs.ext4",
        "-qF",
        "-O",
        "^has_journal,^metadata_csum,^uninit_bg",
        "-E",
        "nodiscard,lazy_itable_init=0",
    ],
    fsck: Some(&["e2fsck", "-fy"]),
    mib: 96,
};
const XFS: Host = Host {
    name: "xfs",
    kind: "xfs",
    mkfs: &["mkfs.xfs", "-qK"],
    fsck: None,
    mib: 320,
};
const BTRFS: Host = Host {
    name: "btrfs",
    kind: "btrfs",
    mkfs: &["mkfs.btrfs", "-qK"],
    fsck: None,
    mib: 192,
};

#[test]
fn what_was_acknowledged_survives_a_power_cut_on_ext4() {
    survives_on(EXT4);
}

#[test]
fn what_was_acknowledged_survives_a_power_cut_without_a_journal() {
    survives_on(UNORDERED);
}

#[test]
fn what_was_acknowledged_survives_a_power_cut_on_xfs() {
    survives_on(XFS);
}

#[test]
fn what_was_acknowledged_survives_a_power_cut_on_btrfs() {
    survives_on(BTRFS);
}

fn setting(name: &str, default: u64) -> u64 {
    std::env::var(name).map_or(default, |text| text.parse().expect("a number"))
}

fn survives_on(host: Host) {
    if !is_known(host) {
        // Not by a macro, whose output the harness keeps to itself when the test passes.
        writeln!(io::stderr(), "not tested: this kernel has no {}", host.kind).unwrap();
        let hosts = [EXT4, XFS, BTRFS];
        assert!(
            hosts.into_iter().any(is_known),
            "this kernel has none of the file systems that are tested"
        );
        return;
    }
    let full = std::env::var_os("PLYWOOD_TEST_FULL").is_some();
    let seed = setting("PLYWOOD_POWERCUT_SEED", rand::random());
    let cuts = setting("PLYWOOD_POWERCUT_CUTS", if full { 400 } else { 8 });
    eprintln!("{}: PLYWOOD_POWERCUT_SEED={seed}", host.name);
    let images = Images::new();
    let (log, from, facts) = record(host, &images);
    let flushes = log.iter().filter(|event| matches!(event, Event::Flush));
    eprintln!(
        "{}: {} events, {} of them flushes, {} facts",
        host.name,
        log.len(),
        flushes.count(),
        facts.len()
    );
    let mut random = StdRng::seed_from_u64(seed);
    // At once after each acknowledgement, and anywhere.
    let mut moments: Vec<usize> = facts.iter().map(|fact| fact.from).collect();
    moments.dedup();
    if host.fsck.is_none() {
        moments.extend((0..cuts).map(|_| random.random_range(from..=log.len())));
    }
    moments.sort_unstable();
    let mut disk = Replay::of(&log, host.mib << 20);
    for moment in moments {
        let part = match host.fsck {
            Some(_) => 0.0,
            None => [0.0, 0.0, 0.3, 0.9][random.random_range(0..4)],
        };
        eprintln!(
            "{}: cut at {moment}, {part} of what was not flushed",
            host.name
        );
        let left = disk.cut_at(moment, || random.random_bool(part));
        check(&left, host, &facts, moment, &images);
    }
}

/// Whether the kernel has the file system, or can load it.
fn is_known(host: Host) -> bool {
    let tmp = tempfile::tempdir().unwrap();
    let nothing = Some("/dev/null");
    let kind = Some(host.kind);
    let tried = nix::mount::mount(nothing, tmp.path(), kind, MsFlags::empty(), None::<&str>);
    // It looks for the file system first, and then at what it is to lie on, which is no block device.
    match tried.expect_err("there is nothing to mount") {
        Errno::ENODEV => false,
        Errno::ENOTBLK => true,
        other => panic!("mount of {}: {other}", host.kind),
    }
}

/// Has plyd work on a recorded disk. Answers what the disk was asked, from where on plyd was at work, and what was acknowledged.
fn record(host: Host, images: &Images) -> (Vec<Event>, usize, Vec<Fact>) {
    let tmp = tempfile::tempdir().unwrap();
    let disk = Recorder::new(tmp.path(), host.mib << 20);
    let [program, options @ ..] = host.mkfs else {
        panic!("no mkfs");
    };
    run(Command::new(program).args(options).arg(disk.path()));
    let prepare = |root: &Path| {
        fs::create_dir(root).unwrap();
        mount(disk.path(), root);
        // So that a cut leaves a file system in any case.
        nix::unistd::syncfs(fs::File::open(root).unwrap()).unwrap();
    };
    let plyd = Plyd::start_on(prepare, Command::new(PLYD));
    let from = disk.position();
    let facts = work::work(&plyd, images, &|| disk.position());
    let end = disk.position();
    // Ends with the mount below its directory.
    drop(plyd);
    let mut log = disk.finish();
    // What comes of the end of the mount is no power cut.
    log.truncate(end);
    (log, from, facts)
}

/// A disk that is made anew, event by event.
struct Replay<'a> {
    log: &'a [Event],
    /// All that was flushed.
    flushed: Image,
    /// Up to where.
    at: usize,
}

impl<'a> Replay<'a> {
    fn of(log: &'a [Event], size: u64) -> Self {
        Self {
            log,
            flushed: Image::new(size),
            at: 0,
        }
    }

    /// What a power cut after that many events leaves, no fewer than the last time; `takes` says of each block
    /// that was not flushed whether it is there.
    fn cut_at(&mut self, moment: usize, mut takes: impl FnMut() -> bool) -> Image {
        let log = &self.log[self.at..moment];
        let flush = log.iter().rposition(|event| matches!(event, Event::Flush));
        let (done, open) = log.split_at(flush.map_or(0, |at| at + 1));
        let write = |image: &mut Image, events: &[Event], takes: &mut dyn FnMut() -> bool| {
            for event in events {
                if let Event::Write { at, bytes } = event {
                    image.write(*at, bytes, &mut *takes);
                }
            }
        };
        write(&mut self.flushed, done, &mut || true);
        self.at += done.len();
        let mut left = self.flushed.clone();
        write(&mut left, open, &mut takes);
        left
    }
}

/// Starts plyd on what a cut has left and compares it with what was acknowledged before.
fn check(left: &Image, host: Host, facts: &[Fact], moment: usize, images: &Images) {
    let tmp = tempfile::tempdir().unwrap();
    let image = tmp.path().join("disk.img");
    left.save(&image);
    if let Some([program, options @ ..]) = host.fsck {
        let output = Command::new(program).args(options).arg(&image).output();
        let output = output.unwrap();
        let told = String::from_utf8_lossy(&output.stdout);
        eprintln!("{told}");
        // What 1 and 2 add up to: it was mended.
        assert!(output.status.code().is_some_and(|code| code < 4), "{told}");
    }
    let prepare = |root: &Path| {
        fs::create_dir(root).unwrap();
        // It replays its journal.
        mount(&image, root);
    };
    let mut plyd = Plyd::start_on(prepare, Command::new(PLYD));
    let verified = plyd.snapctl(["system", "verify", "--deep"]);
    assert_eq!(verified.code, 0, "{}{}", verified.stdout, verified.stderr);
    for fact in facts {
        fact.check(&plyd, moment);
    }
    // And it goes on from here.
    plyd.ok(["system", "gc"]);
    assert_eq!(plyd.ok(["system", "gc", "--dry-run", "--quiet"]), "");
    work::go_on(&plyd, images);
    let log = plyd.log();
    assert!(
        !log.contains("panicked") && !log.contains(" ERROR "),
        "{log}"
    );

    plyd.signal(Signal::SIGTERM);
    let (layers, damaged) = Layers::open(&plyd.root().join("store"), Settings::default()).unwrap();
    assert!(damaged.is_empty(), "{damaged:?}");
    for (layer, record) in layers.list() {
        if record.diff_id.is_some() {
            // Compares the stream with the diff id.
            layers.export(layer, &mut io::sink()).unwrap();
        }
    }
}

/// Mounts the disk in a file.
fn mount(disk: &Path, target: &Path) {
    run(Command::new("mount")
        .args(["-o", "loop"])
        .arg(disk)
        .arg(target));
}

fn run(command: &mut Command) {
    let output = command.output().unwrap();
    let problem = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "{command:?}: {problem}");
}
