//! Deaths of plyfs and plyd at any moment, and damage of what lies on disk.

use std::collections::BTreeSet;
use std::fs;
use std::io::Write;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::Arc;
use std::time::Duration;

use nix::mount::{MsFlags, mount, umount};
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use tonic::Code;

use super::client::{Bind, Snapshots, source};
use super::common::{PATIENCE, PLYD, Plyd, mounts_below, unmount, until};

/// The plyfs processes whose command lines name `dir`.
pub fn plyfs_of(dir: &Path) -> Vec<i32> {
    let needle = dir.to_str().unwrap();
    fs::read_dir("/proc")
        .unwrap()
        .flatten()
        .filter_map(|entry| entry.file_name().to_str()?.parse().ok())
        .filter(|pid: &i32| {
            let file = |name: &str| fs::read(format!("/proc/{pid}/{name}")).unwrap_or_default();
            file("comm").starts_with(b"plyfs")
                && String::from_utf8_lossy(&file("cmdline")).contains(needle)
        })
        .collect()
}

/// The same where there is one.
pub fn only_plyfs_of(dir: &Path) -> i32 {
    let [pid] = plyfs_of(dir)[..] else {
        panic!("not one plyfs");
    };
    pid
}

fn kill_9(pid: i32) {
    kill(Pid::from_raw(pid), Signal::SIGKILL).unwrap();
}

fn count(dir: PathBuf) -> usize {
    fs::read_dir(dir).unwrap().count()
}

/// The names of what is in a directory, without what follows their last dot.
pub fn names(dir: &Path) -> BTreeSet<String> {
    let entries = fs::read_dir(dir).unwrap();
    let stem = |path: PathBuf| path.file_stem().unwrap().to_str().unwrap().to_owned();
    entries.map(|entry| stem(entry.unwrap().path())).collect()
}

/// The packed layers that the records of snapshots name.
fn packed(root: &Path) -> BTreeSet<String> {
    let mut layers = BTreeSet::new();
    for entry in fs::read_dir(root.join("snapshots/records")).unwrap() {
        let record = fs::read_to_string(entry.unwrap().path()).unwrap();
        let Some((_, after)) = record.split_once("\"packed\"") else {
            continue;
        };
        layers.insert(after.split('"').nth(1).unwrap().to_owned());
    }
    layers
}

/// Exactly what the snapshots need is on disk, mounted and running.
pub fn assert_tidy(plyd: &Plyd, snapshots: &Snapshots, mounted: usize) {
    snapshots.cleanup().unwrap();
    let (committed, _) = snapshots.list(&["kind==committed"]).unwrap();
    let (others, _) = snapshots.list(&["kind!=committed"]).unwrap();
    let root = plyd.root();
    assert_eq!(count(root.join("layers")), 0);
    assert_eq!(count(root.join("store/tmp")), 0);
    assert_eq!(names(&root.join("store/records")), packed(&root));
    assert_eq!(count(root.join("snapshots/data")), others.len());
    assert_eq!(
        count(root.join("snapshots/records")),
        committed.len() + others.len()
    );
    assert_eq!(count(root.join("trash")), 0);
    assert_eq!(count(plyd.state().join("mounts")), mounted);
    assert_eq!(mounts_below(plyd.dir()).len(), mounted);
    until("no plyfs is left over", || {
        plyfs_of(plyd.dir()).len() == mounted
    });
}

#[test]
fn a_dead_plyfs_means_errors_at_once_and_a_new_mount_on_request() {
    let plyd = Plyd::start();
    let snapshots = Snapshots::of(&plyd);
    let mounts = snapshots.prepare("a", "").unwrap();
    let root = source(&mounts);
    fs::write(root.join("file"), "1").unwrap();
    let reader = fs::File::open(root.join("file")).unwrap();
    fs::File::open(&root).unwrap().sync_all().unwrap();
    let pid = only_plyfs_of(plyd.dir());
    kill_9(pid);
    until("the death is noticed", || plyd.log().contains("plyfs died"));
    // Not a hang: an error.
    assert!(reader.metadata().is_err());
    assert_eq!(mounts_below(plyd.dir()).len(), 0);

    // What the kernel had taken and plyfs had not may be lost, so this is no layer.
    let status = snapshots.commit("base", "a").unwrap_err();
    assert_eq!(status.code(), Code::FailedPrecondition);
    assert!(status.message().contains("may be lost"), "{status}");

    assert_eq!(snapshots.mounts("a").unwrap(), mounts);
    assert_eq!(fs::read(root.join("file")).unwrap(), b"1");
    snapshots.commit("base", "a").unwrap();
    assert_tidy(&plyd, &snapshots, 0);
}

/// plyd once waited for the dead one's process, with all mounts locked.
#[test]
fn a_dead_plyfs_whose_process_lingers_keeps_nobody_from_being_served() {
    let dir = tempfile::tempdir().unwrap();
    let (server, linger) = (dir.path().join("server"), dir.path().join("linger"));
    fs::write(&linger, "").unwrap();
    let script = format!(
        "#!/bin/sh\n{} \"$@\"\nstatus=$?\n\
         while [ \"$1\" != --version ] && [ -e {} ]; do sleep 0.1; done\nexit $status\n",
        env!("CARGO_BIN_EXE_plyfs"),
        linger.display()
    );
    fs::write(&server, script).unwrap();
    fs::set_permissions(&server, fs::Permissions::from_mode(0o755)).unwrap();
    let mut command = Command::new(PLYD);
    command.arg("--plyfs").arg(&server);
    let plyd = Plyd::start_with(command);
    let snapshots = Arc::new(Snapshots::of(&plyd));
    for key in ["a", "b"] {
        snapshots.prepare(key, "").unwrap();
    }
    let pids = plyfs_of(plyd.dir());
    assert_eq!(pids.len(), 2);
    for (n, pid) in pids.into_iter().enumerate() {
        kill_9(pid);
        let dead = || plyd.log().matches("plyfs died").count();
        until("the death is noticed", || dead() == n + 1);
        let calls = Arc::clone(&snapshots);
        let view = move || calls.view(&format!("v{n}"), "");
        within_patience("a mount of another", view).unwrap();
    }
    fs::remove_file(&linger).unwrap();
}

#[test]
fn mounts_outlive_plyd_and_are_found_again() {
    let mut plyd = Plyd::start();
    let snapshots = Snapshots::of(&plyd);
    let root = source(&snapshots.prepare("a", "").unwrap());
    let before = plyfs_of(plyd.dir());
    for signal in [Signal::SIGKILL, Signal::SIGTERM] {
        plyd.signal(signal);
        fs::write(root.join(signal.as_str()), "1").unwrap();
        plyd.launch();
    }
    let snapshots = Snapshots::of(&plyd);
    assert_eq!(source(&snapshots.mounts("a").unwrap()), root);
    assert_eq!(plyfs_of(plyd.dir()), before);
    assert_tidy(&plyd, &snapshots, 1);
    snapshots.commit("base", "a").unwrap();
    let view = source(&snapshots.view("v", "base").unwrap());
    assert!(view.join("SIGKILL").exists() && view.join("SIGTERM").exists());
}

#[test]
fn a_plyfs_that_hangs_keeps_nobody_from_being_served() {
    let mut plyd = Plyd::start();
    let snapshots = Snapshots::of(&plyd);
    let hung = source(&snapshots.prepare("hung", "").unwrap());
    fs::write(hung.join("file"), "1").unwrap();
    let pid = only_plyfs_of(plyd.dir());
    let other = source(&snapshots.prepare("other", "").unwrap());
    let before = plyfs_of(plyd.dir());
    kill(Pid::from_raw(pid), Signal::SIGSTOP).unwrap();
    plyd.signal(Signal::SIGKILL);
    plyd.launch();
    // Served while that one still hangs, and has not been given up.
    let snapshots = Snapshots::of(&plyd);
    assert_eq!(snapshots.names(), ["hung", "other"]);
    assert_eq!(source(&snapshots.mounts("other").unwrap()), other);
    fs::write(other.join("file"), "2").unwrap();
    assert!(!plyd.log().contains("clearing a mount"), "{}", plyd.log());
    assert_eq!(plyfs_of(plyd.dir()), before);

    kill(Pid::from_raw(pid), Signal::SIGCONT).unwrap();
    assert_eq!(source(&snapshots.mounts("hung").unwrap()), hung);
    assert_eq!(fs::read(hung.join("file")).unwrap(), b"1");
    assert_eq!(plyfs_of(plyd.dir()), before);
    snapshots.commit("base", "hung").unwrap();
    assert_tidy(&plyd, &snapshots, 1);
}

#[test]
fn a_plyfs_that_dies_before_it_answers_the_next_plyd_is_replaced() {
    let mut plyd = Plyd::start();
    let snapshots = Snapshots::of(&plyd);
    let root = source(&snapshots.prepare("a", "").unwrap());
    fs::write(root.join("file"), "1").unwrap();
    fs::File::open(&root).unwrap().sync_all().unwrap();
    let pid = only_plyfs_of(plyd.dir());
    kill(Pid::from_raw(pid), Signal::SIGSTOP).unwrap();
    plyd.signal(Signal::SIGKILL);
    plyd.launch();
    let snapshots = Snapshots::of(&plyd);
    kill_9(pid);
    assert_eq!(source(&snapshots.mounts("a").unwrap()), root);
    assert_eq!(fs::read(root.join("file")).unwrap(), b"1");
    assert!(!plyfs_of(plyd.dir()).contains(&pid));
    snapshots.remove("a").unwrap();
    assert_tidy(&plyd, &snapshots, 0);
}

/// It once was what had come to the upper until then, and only the log said that there may be more.
#[test]
fn usage_is_refused_when_the_plyfs_dies_before_it_has_flushed() {
    let plyd = Plyd::start();
    let snapshots = Snapshots::of(&plyd);
    let root = source(&snapshots.prepare("a", "").unwrap());
    fs::write(root.join("file"), "1").unwrap();
    let pid = only_plyfs_of(plyd.dir());
    kill(Pid::from_raw(pid), Signal::SIGSTOP).unwrap();
    let refused = std::thread::scope(|scope| {
        let asked = scope.spawn(|| snapshots.usage("a"));
        // Time to ask that plyfs.
        std::thread::sleep(Duration::from_secs(1));
        kill_9(pid);
        asked.join().unwrap().unwrap_err()
    });
    assert_eq!(refused.code(), Code::FailedPrecondition);
    assert!(refused.message().contains("plyfs"), "{refused}");
    until("it is what there is without a plyfs", || {
        snapshots.usage("a").is_ok()
    });
}

#[test]
fn dead_mounts_are_cleared_by_the_next_plyd() {
    let mut plyd = Plyd::start();
    let snapshots = Snapshots::of(&plyd);
    snapshots.layer("base", "", |root| {
        fs::write(root.join("file"), "1").unwrap()
    });
    let root = source(&snapshots.prepare("a", "base").unwrap());
    plyd.signal(Signal::SIGKILL);
    for pid in plyfs_of(plyd.dir()) {
        kill_9(pid);
    }
    plyd.launch();
    let snapshots = Snapshots::of(&plyd);
    assert_tidy(&plyd, &snapshots, 0);
    assert_eq!(source(&snapshots.mounts("a").unwrap()), root);
    assert_eq!(fs::read(root.join("file")).unwrap(), b"1");
}

#[test]
fn what_lies_below_a_dead_mount_goes_but_nothing_that_is_mounted_there() {
    let mut plyd = Plyd::start();
    let snapshots = Snapshots::of(&plyd);
    let root = source(&snapshots.prepare("a", "").unwrap());
    plyd.signal(Signal::SIGKILL);
    for pid in plyfs_of(plyd.dir()) {
        kill_9(pid);
    }
    until("the mount is gone", || umount(&root).is_err());
    // As somebody does who missed its end: a mount of the very file system that it lies on.
    let precious = plyd.dir().join("precious");
    fs::create_dir(&precious).unwrap();
    fs::write(precious.join("file"), "1").unwrap();
    let inside = root.join("deep/er");
    fs::create_dir_all(&inside).unwrap();
    fs::write(root.join("deep/file"), "stray").unwrap();
    let none: Option<&str> = None;
    mount(Some(&precious), &inside, none, MsFlags::MS_BIND, none).unwrap();

    plyd.launch();
    let snapshots = Snapshots::of(&plyd);
    for refused in [
        snapshots.mounts("a").map(drop),
        snapshots.remove("a").map(drop),
    ] {
        let status = refused.unwrap_err();
        assert_eq!(status.code(), Code::FailedPrecondition);
        assert!(status.message().contains("deep/er"), "{status}");
    }
    assert_eq!(fs::read(precious.join("file")).unwrap(), b"1");
    assert_eq!(fs::read(root.join("deep/file")).unwrap(), b"stray");

    unmount(&inside);
    assert_eq!(source(&snapshots.mounts("a").unwrap()), root);
    assert_eq!(count(root), 0);
    snapshots.remove("a").unwrap();
    assert_tidy(&plyd, &snapshots, 0);
    let trash = plyd.state().join("trash");
    until("what was written is deleted", || count(trash.clone()) == 0);
}

/// The answer was the place of a mount that was about to end, an empty directory.
#[test]
fn what_somebody_has_unmounted_is_mounted_anew_once_its_copies_are_gone() {
    let plyd = Plyd::start();
    let snapshots = Snapshots::of(&plyd);
    let mounts = snapshots.prepare("a", "").unwrap();
    let root = source(&mounts);
    fs::write(root.join("file"), "1").unwrap();
    let copy = Bind::new(&mounts, &plyd.dir().join("copy"));
    unmount(&root);
    let status = snapshots.mounts("a").unwrap_err();
    assert_eq!(status.code(), Code::FailedPrecondition, "{status}");
    assert!(
        status.message().contains(root.to_str().unwrap()),
        "{status}"
    );

    let again = std::thread::scope(|scope| {
        scope.spawn(|| {
            std::thread::sleep(Duration::from_millis(500));
            drop(copy);
        });
        snapshots.mounts("a").unwrap()
    });
    assert_eq!(again, mounts);
    assert_eq!(fs::read(root.join("file")).unwrap(), b"1");
    snapshots.remove("a").unwrap();
    assert_tidy(&plyd, &snapshots, 0);
}

/// Prepares, writes, commits and removes without end until plyd is gone, and answers the names whose
/// commit and whose removal were acknowledged.
fn churn(snapshots: &Snapshots, round: usize) -> (BTreeSet<String>, BTreeSet<String>) {
    let (mut committed, mut removed) = (BTreeSet::new(), BTreeSet::new());
    let mut parent = String::new();
    for number in 0.. {
        let name = format!("layer {round} {number}");
        let key = format!("extract {round} {number}");
        let Ok(mounts) = snapshots.prepare(&key, &parent) else {
            break;
        };
        if fs::write(source(&mounts).join(&name), &name).is_err() {
            break;
        }
        if snapshots.commit(&name, &key).is_err() {
            break;
        }
        committed.insert(name.clone());
        if number % 3 == 2 {
            if snapshots.remove(&name).is_err() {
                break;
            }
            removed.insert(name);
        } else {
            parent = name;
        }
    }
    (committed, removed)
}

#[test]
fn plyd_can_be_killed_in_the_middle_of_anything() {
    let mut plyd = Plyd::start();
    let (mut committed, mut removed) = (BTreeSet::new(), BTreeSet::new());
    for round in 0..8 {
        let snapshots = Snapshots::of(&plyd);
        let pid = i32::try_from(plyd.pid()).unwrap();
        let worker = std::thread::spawn(move || churn(&snapshots, round));
        // Anywhere in the first few cycles; which one does not matter, that they differ does.
        std::thread::sleep(Duration::from_millis(150 + 173 * round as u64));
        kill_9(pid);
        let (more, gone) = worker.join().unwrap();
        committed.extend(more);
        removed.extend(gone);
        plyd.signal(Signal::SIGKILL);
        plyd.launch();

        let snapshots = Snapshots::of(&plyd);
        let names: BTreeSet<String> = snapshots.names().into_iter().collect();
        for name in committed.difference(&removed) {
            // A removal that was under way may have been done or not.
            if !names.contains(name) {
                assert!(
                    name.starts_with(&format!("layer {round} ")),
                    "{name} is lost"
                );
                continue;
            }
            let view = source(&snapshots.view("look", name).unwrap());
            assert_eq!(fs::read(view.join(name)).unwrap(), name.as_bytes());
            snapshots.remove("look").unwrap();
        }
        assert!(names.is_disjoint(&removed));
        committed.retain(|name| names.contains(name));
        // What was under way can be repeated, or removed.
        for key in names.iter().filter(|name| name.starts_with("extract")) {
            snapshots.remove(key).unwrap();
        }
        assert_tidy(&plyd, &snapshots, 0);
    }
    assert!(!plyd.log().contains("panicked"));
}

#[test]
fn plyfs_can_be_killed_in_the_middle_of_anything() {
    const ENOUGH: usize = 10;

    let plyd = Plyd::start();
    let snapshots = Snapshots::of(&plyd);
    snapshots.layer("base", "", |_| {});
    let worker = std::thread::spawn(move || {
        let (mut committed, mut failed) = (Vec::new(), 0);
        for number in 0..1000 {
            if committed.len() >= ENOUGH && failed >= ENOUGH {
                break;
            }
            let (name, key) = (format!("layer {number}"), format!("extract {number}"));
            let done = snapshots.prepare(&key, "base").is_ok_and(|mounts| {
                fs::write(source(&mounts).join(&name), &name).is_ok()
                    && snapshots.commit(&name, &key).is_ok()
            });
            if done {
                committed.push(name);
                continue;
            }
            failed += 1;
            match snapshots.remove(&key) {
                Ok(()) => {}
                // The failed prepare was undone already.
                Err(status) => assert_eq!(status.code(), Code::NotFound, "{status}"),
            }
        }
        (snapshots, committed, failed)
    });
    let mut turn = 0;
    while !worker.is_finished() {
        // At another point of the cycle each time.
        std::thread::sleep(Duration::from_millis(11 + 37 * (turn % 9)));
        turn += 1;
        for pid in plyfs_of(plyd.dir()) {
            // It may have ended by itself meanwhile.
            let _gone = kill(Pid::from_raw(pid), Signal::SIGKILL);
        }
    }
    let (snapshots, committed, failed) = worker.join().unwrap();
    assert!(
        committed.len() >= ENOUGH && failed >= ENOUGH,
        "{} {failed}",
        committed.len()
    );
    for name in &committed {
        let view = source(&snapshots.view("look", name).unwrap());
        assert_eq!(fs::read(view.join(name)).unwrap(), name.as_bytes());
        snapshots.remove("look").unwrap();
    }
    let mut names = snapshots.names();
    names.retain(|name| name != "base");
    assert_eq!(names, committed);
    assert_tidy(&plyd, &snapshots, 0);
}

/// Runs `work` on a thread of its own and waits for it as long as anything may take: a call that hangs
/// fails the test, whose end lets it go.
pub fn within_patience<T: Send + 'static>(
    what: &str,
    work: impl FnOnce() -> T + Send + 'static,
) -> T {
    let (answer, answered) = std::sync::mpsc::channel();
    std::thread::spawn(move || answer.send(work()));
    answered
        .recv_timeout(PATIENCE)
        .unwrap_or_else(|error| panic!("{what}: {error}"))
}

/// Kills whatever plyfs serves `plyd`'s snapshots, after a while that is another one each turn.
fn kill_plyfs_after(plyd: &Plyd, delay: Duration) -> std::thread::JoinHandle<()> {
    let pids = plyfs_of(plyd.dir());
    std::thread::spawn(move || {
        std::thread::sleep(delay);
        for pid in pids {
            // It may have ended by itself meanwhile.
            let _gone = kill(Pid::from_raw(pid), Signal::SIGKILL);
        }
    })
}

/// Enough to be in the middle of when plyfs dies a few milliseconds later.
const DIRECTORIES: usize = 12;
const FILES: usize = 24;

/// What an importer does with a layer: directories, files with owners and modes, links, and a sync.
fn unpack(root: &Path) -> std::io::Result<()> {
    for dir in 0..DIRECTORIES {
        let dir = root.join(format!("dir{dir}"));
        fs::create_dir(&dir)?;
        for number in 0..FILES {
            let file = dir.join(format!("file{number}"));
            fs::write(&file, vec![number as u8; 3000 * number])?;
            std::os::unix::fs::chown(&file, Some(7), Some(8))?;
            fs::hard_link(&file, dir.join(format!("link{number}")))?;
        }
        fs::File::open(&dir)?.sync_all()?;
    }
    Ok(())
}

fn assert_unpacked(root: &Path) {
    for dir in 0..DIRECTORIES {
        let dir = root.join(format!("dir{dir}"));
        assert_eq!(count(dir.clone()), 2 * FILES);
        for number in 0..FILES {
            let content = fs::read(dir.join(format!("link{number}"))).unwrap();
            assert_eq!(content, vec![number as u8; 3000 * number]);
        }
    }
}

#[test]
fn an_import_whose_plyfs_is_killed_fails_and_can_be_repeated() {
    const ROUNDS: u64 = 10;

    let plyd = Plyd::start();
    let snapshots = Arc::new(Snapshots::of(&plyd));
    let mut cut_off = 0;
    for round in 0..ROUNDS {
        let name = format!("layer {round}");
        let root = source(&snapshots.prepare("extract", "").unwrap());
        let delay = Duration::from_millis(round * round * 2);
        let killer = kill_plyfs_after(&plyd, delay);
        let (calls, commit) = (Arc::clone(&snapshots), name.clone());
        let (unpacked, committed) = within_patience("unpacking and commit", move || {
            let unpacked = unpack(&root);
            (unpacked, calls.commit(&commit, "extract"))
        });
        killer.join().unwrap();
        if unpacked.is_err() {
            cut_off += 1;
            let status = committed.as_ref().unwrap_err();
            assert_ne!(status.code(), Code::Unknown, "{status}");
            assert_ne!(status.code(), Code::Internal, "{status}");
        }
        if committed.is_err() {
            // What an importer does next: all over again, by the same names.
            snapshots.remove("extract").unwrap();
            let root = source(&snapshots.prepare("extract", "").unwrap());
            unpack(&root).unwrap();
            snapshots.commit(&name, "extract").unwrap();
        }
        let view = source(&snapshots.view("look", &name).unwrap());
        assert_unpacked(&view);
        snapshots.remove("look").unwrap();
        assert_tidy(&plyd, &snapshots, 0);
    }
    assert!(cut_off > 0, "no unpacking was cut off");
    assert_eq!(snapshots.names().len(), ROUNDS as usize);
    assert!(!plyd.log().contains("panicked"));
}

#[test]
fn a_removal_whose_plyfs_is_killed_is_done_or_can_be_repeated() {
    const ROUNDS: u64 = 16;

    let plyd = Plyd::start();
    let snapshots = Arc::new(Snapshots::of(&plyd));
    snapshots.layer("base", "", |root| unpack(root).unwrap());
    for round in 0..ROUNDS {
        let root = source(&snapshots.prepare("a", "base").unwrap());
        // Something that plyfs still holds, and somebody who is still inside.
        let mut inside = fs::File::create(root.join("file")).unwrap();
        inside.write_all(&[7; 200_000]).unwrap();
        let killer = kill_plyfs_after(&plyd, Duration::from_millis(round));
        let calls = Arc::clone(&snapshots);
        let removed = within_patience("removal", move || calls.remove("a"));
        killer.join().unwrap();
        if removed.is_err() {
            match snapshots.remove("a") {
                Ok(()) => {}
                Err(status) => assert_eq!(status.code(), Code::NotFound, "{status}"),
            }
        }
        let _an_error_and_no_hang =
            within_patience("a call from inside", move || inside.sync_all());
        assert_eq!(snapshots.names(), ["base"]);
        assert_tidy(&plyd, &snapshots, 0);
    }
    let view = source(&snapshots.view("look", "base").unwrap());
    assert_unpacked(&view);
    assert!(!plyd.log().contains("panicked"));
}
