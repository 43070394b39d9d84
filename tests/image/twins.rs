//! Records that are put back after others have been made in their places, and what may build on a record that cannot be used.

use std::fs;
use std::path::{Path, PathBuf};

use nix::sys::signal::Signal;

use super::common::Plyd;
use super::damage::{assert_sound, break_record, files, image, load, mount};
use super::gone::{REPAIR, assert_counted, assert_usable, layers, lose, of_layers};

/// Does something in the mount of a snapshot.
fn mounted<T>(plyd: &Plyd, key: &str, work: impl FnOnce(&Path) -> T) -> T {
    let mnt = mount(plyd, key);
    let done = work(&mnt);
    plyd.umount(&mnt);
    fs::remove_dir(&mnt).unwrap();
    done
}

fn content(plyd: &Plyd, key: &str, name: &str) -> String {
    mounted(plyd, key, |mnt| fs::read_to_string(mnt.join(name)).unwrap())
}

/// Removes all that there is.
fn assert_goes(plyd: &mut Plyd, keys: &[&str]) {
    for key in keys {
        plyd.ok(["snapshot", "rm", key]);
    }
    plyd.ok(["image", "rm", "whole"]);
    lose(plyd, &[]);
    assert_sound(plyd);
    assert_counted(plyd, 0);
    assert_eq!(layers(plyd), 0);
    assert_eq!(plyd.ok(["snapshot", "ls", "-q"]), "");
}

/// The index came to lead to the record that was put back, the image could not be removed any more, and plyd did not start again.
#[test]
fn a_record_whose_snapshot_was_made_again_meanwhile_does_no_harm() {
    let mut plyd = Plyd::start();
    let archive = image("whole");
    for while_it_runs in [true, false] {
        load(&plyd, &archive);
        let old = of_layers(&plyd);
        let texts = old.each_ref().map(|path| fs::read(path).unwrap());
        plyd.ok(["image", "rm", "whole"]);
        load(&plyd, &archive);
        if !while_it_runs {
            plyd.signal(Signal::SIGTERM);
        }
        // The upper one alone, and both.
        fs::write(&old[1], &texts[1]).unwrap();
        if while_it_runs {
            plyd.ok(REPAIR);
        } else {
            fs::write(&old[0], &texts[0]).unwrap();
            plyd.launch();
        }
        assert_usable(&plyd);
        assert_goes(&mut plyd, &[]);
    }
}

/// With the index, nothing told what ID the record had had that another builds on.
#[test]
fn what_builds_on_a_record_that_is_put_back_beside_a_new_one_builds_on_that() {
    let mut plyd = Plyd::start();
    let archive = image("whole");
    for with_lower in [false, true] {
        load(&plyd, &archive);
        plyd.ok(["snapshot", "prepare", "work", "whole"]);
        mounted(&plyd, "work", |mnt| {
            fs::write(mnt.join("own"), "kept").unwrap()
        });
        let [lower, upper] = of_layers(&plyd);
        let mut lost = vec![&upper];
        if with_lower {
            lost.push(&lower);
        }
        let good: Vec<_> = lost.iter().map(|path| fs::read(path).unwrap()).collect();
        let index = plyd.root().join("index");
        lose(&mut plyd, &[&lost[..], &[&index]].concat());
        load(&plyd, &archive);
        for (path, good) in lost.iter().zip(&good) {
            fs::write(path, good).unwrap();
        }
        plyd.ok(REPAIR);
        let assert_work = |plyd: &Plyd| {
            assert_eq!(content(plyd, "work", "own"), "kept");
            assert_eq!(content(plyd, "work", "file 7"), "file 7");
        };
        assert_work(&plyd);
        lose(&mut plyd, &[]);
        assert_work(&plyd);
        assert_usable(&plyd);
        assert_eq!(of_layers(&plyd).len(), 2);
        assert_goes(&mut plyd, &["work"]);
    }
}

/// Two that are not the same stay, and the one is found once the other has gone.
#[test]
fn two_snapshots_of_one_name_are_removed_one_after_the_other() {
    let mut plyd = Plyd::start();
    let make = |plyd: &Plyd, content: &str| {
        plyd.ok(["snapshot", "prepare", "work"]);
        mounted(plyd, "work", |mnt| {
            fs::write(mnt.join("file"), content).unwrap()
        });
        plyd.ok(["snapshot", "commit", "work", "base"]);
    };
    make(&plyd, "one");
    let record = files(&plyd, "snapshots/records", ".record").remove(0);
    let good = fs::read(&record).unwrap();
    plyd.ok(["snapshot", "prepare", "on one", "base"]);
    lose(&mut plyd, &[&record]);
    make(&plyd, "other");
    plyd.ok(["snapshot", "prepare", "on the other", "base"]);
    fs::write(&record, good).unwrap();
    plyd.ok(REPAIR);
    for _ in 0..2 {
        assert_eq!(content(&plyd, "on one", "file"), "one");
        assert_eq!(content(&plyd, "on the other", "file"), "other");
        lose(&mut plyd, &[]);
        assert_sound(&plyd);
    }
    plyd.ok(["snapshot", "rm", "on the other"]);
    plyd.ok(["snapshot", "rm", "base"]);
    plyd.ok(["snapshot", "rm", "on one"]);
    plyd.ok(["snapshot", "rm", "base"]);
    assert_eq!(layers(&plyd), 0);
    assert_eq!(plyd.ok(["snapshot", "ls", "-q"]), "");
}

/// `image rm` took the layers below it, and with its record back nothing on it could be mounted.
#[test]
fn what_a_record_that_cannot_be_used_may_build_on_stays() {
    let mut plyd = Plyd::start();
    let archive = image("whole");
    for (gone, given_up) in [(false, false), (true, false), (false, true), (true, true)] {
        let what = format!("{gone}, {given_up}");
        load(&plyd, &archive);
        plyd.ok(["snapshot", "prepare", "work", "whole"]);
        plyd.ok(["snapshot", "commit", "work", "middle"]);
        plyd.ok(["snapshot", "prepare", "child", "middle"]);
        let record = record_of(&plyd, "middle");
        plyd.signal(Signal::SIGTERM);
        let good = match gone {
            true => {
                let good = fs::read(&record).unwrap();
                fs::remove_file(&record).unwrap();
                good
            }
            false => break_record(&record),
        };
        plyd.launch();
        plyd.ok(["image", "rm", "whole"]);
        assert_eq!(layers(&plyd), 3, "{what}");
        if given_up {
            if !gone {
                plyd.signal(Signal::SIGTERM);
                fs::remove_file(&record).unwrap();
                plyd.launch();
            }
            plyd.ok(["snapshot", "rm", "child"]);
        } else {
            fs::write(&record, &good).unwrap();
            plyd.ok(REPAIR);
            assert_sound(&plyd);
            assert_eq!(content(&plyd, "child", "file 7"), "file 7", "{what}");
            plyd.ok(["snapshot", "rm", "child"]);
            plyd.ok(["snapshot", "rm", "middle"]);
        }
        assert_eq!(layers(&plyd), 0, "{what}");
        assert!(files(&plyd, "snapshots/records", ".record").is_empty());
        assert_sound(&plyd);
    }
}

/// Of one whose record is damaged nobody can tell on which it builds.
#[test]
fn a_snapshot_is_not_removed_while_a_damaged_record_may_be_of_one_on_it() {
    let mut plyd = Plyd::start();
    plyd.ok(["snapshot", "prepare", "a"]);
    plyd.ok(["snapshot", "commit", "a", "base"]);
    plyd.ok(["snapshot", "prepare", "on it", "base"]);
    let record = record_of(&plyd, "on it");
    plyd.signal(Signal::SIGTERM);
    let good = break_record(&record);
    plyd.launch();
    let refused = plyd.snapctl(["snapshot", "rm", "base"]);
    assert_eq!(refused.code, 1);
    let told = format!(
        "one may build on it whose record {} cannot be used",
        record.display()
    );
    assert!(refused.stderr.contains(&told), "{}", refused.stderr);
    fs::write(&record, good).unwrap();
    plyd.ok(REPAIR);
    mounted(&plyd, "on it", |_| ());
    plyd.ok(["snapshot", "rm", "on it"]);
    plyd.ok(["snapshot", "rm", "base"]);
}

fn record_of(plyd: &Plyd, key: &str) -> PathBuf {
    let info = plyd.json(["snapshot", "info", key, "--json"]);
    let id = info["id"].as_str().unwrap();
    plyd.root().join(format!("snapshots/records/{id}.record"))
}
