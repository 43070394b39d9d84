//! kill -9 of plyfs and of plyd in the middle of a commit: it is done or it is not, and can be repeated.

use std::fs;
use std::os::unix::fs::FileExt;
use std::path::Path;
use std::sync::Arc;
use std::time::{Duration, Instant};

use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use tonic::Code;

use super::client::{Snapshots, source};
use super::common::{PATIENCE, Plyd};
use super::crash::{assert_tidy, plyfs_of, within_patience};

/// So many commits are cut off, however fast the machine.
const ENOUGH: usize = 4;
/// Of the layer's large file, most of which a commit has to bring up.
const LARGE: usize = 32 << 20;
const SMALL_FILES: usize = 200;

fn fill_base(root: &Path) {
    fs::write(root.join("large"), vec![7; LARGE]).unwrap();
}

fn change(root: &Path) {
    let large = fs::File::options()
        .write(true)
        .open(root.join("large"))
        .unwrap();
    for place in [0, LARGE / 2] {
        large.write_all_at(b"changed", place as u64).unwrap();
    }
    for number in 0..SMALL_FILES {
        fs::write(root.join(number.to_string()), vec![8; 5000]).unwrap();
    }
}

fn assert_changed(root: &Path) {
    let mut expected = vec![7; LARGE];
    for place in [0, LARGE / 2] {
        expected[place..place + 7].copy_from_slice(b"changed");
    }
    assert!(fs::read(root.join("large")).unwrap() == expected);
    for number in 0..SMALL_FILES {
        assert_eq!(fs::read(root.join(number.to_string())).unwrap(), [8; 5000]);
    }
}

/// Commits changes again and again, with `strike` at another point of each, until enough were cut off;
/// `repeat` is what a client does then.
fn cut_off(
    mut strike: impl FnMut(&mut Plyd),
    mut repeat: impl FnMut(&mut Plyd, tonic::Status) -> Arc<Snapshots>,
) {
    let mut plyd = Plyd::start();
    let mut snapshots = Arc::new(Snapshots::of(&plyd));
    snapshots.layer("base", "", fill_base);
    let mut deadline = Instant::now() + PATIENCE;
    let (mut failed, mut round) = (0, 0);
    while failed < ENOUGH {
        assert!(
            Instant::now() < deadline,
            "{failed} of {round} commits were cut off"
        );
        change(&source(&snapshots.prepare("work", "base").unwrap()));
        let calls = Arc::clone(&snapshots);
        let commit = std::thread::spawn(move || {
            within_patience("commit", move || calls.commit("layer", "work"))
        });
        std::thread::sleep(Duration::from_millis(9 * (round % 12)));
        round += 1;
        strike(&mut plyd);
        if let Err(status) = commit.join().unwrap() {
            failed += 1;
            deadline = Instant::now() + PATIENCE;
            snapshots = repeat(&mut plyd, status);
        } else if plyd.snapctl(["system", "info"]).code != 0 {
            // It was acknowledged before.
            plyd.launch();
            snapshots = Arc::new(Snapshots::of(&plyd));
        }
        assert_eq!(snapshots.names(), ["base", "layer"]);
        assert_changed(&source(&snapshots.view("look", "layer").unwrap()));
        snapshots.remove("look").unwrap();
        snapshots.remove("layer").unwrap();
        assert_tidy(&plyd, &snapshots, 0);
    }
    assert!(!plyd.log().contains("panicked"));
}

#[test]
fn a_commit_whose_plyfs_is_killed_is_done_or_can_be_repeated() {
    cut_off(
        |plyd| {
            for pid in plyfs_of(plyd.dir()) {
                // It may have ended by itself meanwhile.
                let _gone = kill(Pid::from_raw(pid), Signal::SIGKILL);
            }
        },
        |plyd, status| {
            assert!(
                !matches!(status.code(), Code::Internal | Code::Unknown),
                "{status}"
            );
            let snapshots = Snapshots::of(plyd);
            assert_eq!(snapshots.names(), ["base", "work"]);
            // What was written last may be lost, so a client makes it again.
            snapshots.remove("work").unwrap();
            snapshots.layer("layer", "base", change);
            Arc::new(snapshots)
        },
    );
}

#[test]
fn a_commit_whose_plyd_is_killed_is_done_or_can_be_repeated() {
    cut_off(
        |plyd| {
            plyd.signal(Signal::SIGKILL);
        },
        |plyd, _broken_connection| {
            plyd.launch();
            let snapshots = Snapshots::of(plyd);
            // Done though nobody was told, or as it was before.
            if snapshots.names() == ["base", "layer"] {
                return Arc::new(snapshots);
            }
            assert_eq!(snapshots.names(), ["base", "work"]);
            if let Err(status) = snapshots.commit("layer", "work") {
                // The mount had been ended, but who ended it can no longer say so.
                assert_eq!(status.code(), Code::FailedPrecondition, "{status}");
                assert!(status.message().contains("may be lost"), "{status}");
                assert_changed(&source(&snapshots.mounts("work").unwrap()));
                snapshots.commit("layer", "work").unwrap();
            }
            Arc::new(snapshots)
        },
    );
}
