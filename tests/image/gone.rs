//! Records that are gone when plyd starts, though others say that they were there.

use std::fs;
use std::path::PathBuf;
use std::process::Stdio;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;
use std::time::Duration;

use nix::sys::signal::Signal;
use serde_json::Value;

use super::common::{Done, Plyd};
use super::damage::{
    NAME, assert_sound, break_record, faults, files, image, load, mount, newer, parse,
};

pub const REPAIR: [&str; 2] = ["system", "repair"];

/// The records of the snapshots of the image's layers, the lower one first.
pub fn of_layers(plyd: &Plyd) -> [PathBuf; 2] {
    let records = files(plyd, "snapshots/records", ".record");
    let text = |path: &PathBuf| fs::read_to_string(path).unwrap();
    let of_image = records
        .into_iter()
        .filter(|path| text(path).contains("\"owner\":\"image\""));
    let mut of_image: Vec<_> = of_image.collect();
    of_image.sort_by_key(|path| !text(path).contains("\"parent\":null"));
    of_image.try_into().unwrap()
}

/// Stops plyd, removes these, starts it again; what it has logged since.
pub fn lose(plyd: &mut Plyd, lost: &[&PathBuf]) -> String {
    plyd.signal(Signal::SIGTERM);
    for path in lost {
        if path.is_dir() {
            fs::remove_dir_all(path).unwrap();
        } else {
            fs::remove_file(path).unwrap();
        }
    }
    let before = plyd.log().len();
    plyd.launch();
    plyd.log()[before..].to_owned()
}

pub fn layers(plyd: &Plyd) -> usize {
    files(plyd, "store/layers", ".index").len()
}

fn repair_with(plyd: &Plyd, archive: &[u8]) -> Done {
    plyd.piped(["system", "repair", "-i", "-"], archive)
}

pub fn assert_counted(plyd: &Plyd, records: usize) {
    let info = plyd.json(["system", "info", "--json"]);
    assert_eq!(info["damaged_records"], records, "{info:#}");
}

/// The image's tree can be mounted, as it was.
pub fn assert_usable(plyd: &Plyd) {
    assert_sound(plyd);
    assert_counted(plyd, 0);
    plyd.ok(["snapshot", "prepare", "other", "whole"]);
    let mnt = mount(plyd, "other");
    assert_eq!(fs::read(mnt.join("file 7")).unwrap(), b"file 7");
    assert!(mnt.join("base").exists());
    plyd.umount(&mnt);
    fs::remove_dir(&mnt).unwrap();
    plyd.ok(["snapshot", "rm", "other"]);
}

/// The image was listed and everything was said to be sound, but nothing could be made of it, for the start had removed the layer, too.
#[test]
fn the_records_of_an_images_layers_that_are_gone_are_named_and_made_anew() {
    let mut plyd = Plyd::start();
    let archive = image("whole");
    load(&plyd, &archive);
    let index = plyd.root().join("index");
    for with_snapshot in [false, true] {
        if with_snapshot {
            plyd.ok(["snapshot", "prepare", "work", "whole"]);
        }
        for (places, of_index) in [
            (1..2, false),
            (1..2, true),
            (0..1, false),
            (0..1, true),
            (0..2, false),
        ] {
            let what = format!("{with_snapshot}, {places:?}, {of_index}");
            let number = places.len();
            let [lower, upper] = of_layers(&plyd);
            let good = fs::read(&upper).unwrap();
            let lost = &[&lower, &upper][places];
            let index = [&index];
            let of_index = if of_index { &index[..] } else { &[] };
            let log = lose(&mut plyd, &[lost, of_index].concat());
            assert_eq!(log.matches(": it is gone").count(), number, "{what}: {log}");
            assert_counted(&plyd, number);
            assert_eq!(layers(&plyd), 2, "{what}");
            for fault in faults(&plyd) {
                assert_eq!(fault["kind"], "record");
                let problem = fault["problem"].as_str().unwrap();
                assert!(problem.contains(": it is gone"), "{problem}");
                let advice = fault["advice"].as_str().unwrap();
                if of_index.is_empty() {
                    let of = fault["of"].as_str().unwrap();
                    assert!(of.ends_with(&format!(" of {NAME}")), "{of}");
                    assert!(advice.starts_with("`snapctl system repair` makes it anew"));
                }
            }
            assert_eq!(faults(&plyd).len(), number, "{what}");
            // Which record it was that the snapshot on it names, only the index can tell.
            if with_snapshot && lost == [&upper] && !of_index.is_empty() {
                let left = plyd.snapctl(REPAIR);
                assert_eq!(left.code, 1, "{}", left.stdout);
                fs::write(lost[0], &good).unwrap();
                plyd.ok(REPAIR);
                assert_usable(&plyd);
                continue;
            }
            let mended = plyd.ok(REPAIR);
            let made = mended.matches("was made anew from what the image says\n");
            assert_eq!(made.count(), number, "{what}: {mended}");
            assert!(mended.ends_with(" mended, 0 left\n"), "{what}: {mended}");
            assert_usable(&plyd);
        }
    }
    // All of it goes, and in one go.
    plyd.ok(["snapshot", "rm", "work"]);
    plyd.ok(["image", "rm", "whole"]);
    assert_eq!(layers(&plyd), 0);
    assert_eq!(plyd.ok(["snapshot", "ls", "-q"]), "");
}

/// `repair -i` said that nothing was left.
#[test]
fn an_archive_brings_back_the_layers_of_which_all_is_gone() {
    let mut plyd = Plyd::start();
    let archive = image("whole");
    load(&plyd, &archive);
    let index = plyd.root().join("index");
    let of_image = files(&plyd, "images/records", ".record").remove(0);
    for number in 0..4 {
        let [_, upper] = of_layers(&plyd);
        let layer = plyd.json(["snapshot", "ls", "--json"]);
        let layer = layer[1]["packed_layers"][0].as_str().unwrap().to_owned();
        let of_layer = |dir: &str, end: &str| plyd.root().join(format!("store/{dir}/{layer}{end}"));
        let all = [
            &upper,
            &of_layer("records", ".record"),
            &of_layer("layers", ".index"),
            &index,
            &of_image,
        ];
        // In turns with the index, and with the record of the image.
        let lost = [&all[..3], &all[..4], &all[..5]].into_iter().cycle();
        lose(&mut plyd, lost.clone().nth(number).unwrap());
        let left = plyd.snapctl(REPAIR);
        assert_eq!(left.code, 1, "{}", left.stdout);
        assert!(
            left.stdout.contains("`snapctl system repair -i`"),
            "{}",
            left.stdout
        );
        assert!(left.stdout.contains("it is gone"), "{}", left.stdout);
        let mended = match number {
            3 => plyd.piped(["image", "load", "-q"], &archive),
            _ => repair_with(&plyd, &archive),
        };
        assert_eq!(mended.code, 0, "{number}: {}", mended.stdout);
        assert_usable(&plyd);
    }
    plyd.ok(["image", "rm", "whole"]);
    assert_eq!(layers(&plyd), 0);
}

/// Its layers were removed by the start, and its name with them.
#[test]
fn the_record_of_an_image_that_is_gone_is_named_and_its_layers_stay() {
    let mut plyd = Plyd::start();
    let archive = image("whole");
    load(&plyd, &archive);
    let of_image = files(&plyd, "images/records", ".record").remove(0);
    let good = fs::read(&of_image).unwrap();
    let log = lose(&mut plyd, &[&of_image]);
    let told = format!(
        "the record {} cannot be used: it is gone; ",
        of_image.display()
    );
    assert!(log.contains(&told), "{log}");
    assert_counted(&plyd, 1);
    assert_eq!(layers(&plyd), 2);
    let found = faults(&plyd);
    assert_eq!(found.len(), 1);
    assert_eq!(found[0]["of"], format!("the image {NAME}"));
    let left = plyd.snapctl(REPAIR);
    assert_eq!(left.code, 1, "{}", left.stdout);
    let refused = plyd.snapctl(["image", "inspect", "whole"]);
    assert!(refused.stderr.contains(&told), "{}", refused.stderr);
    let mended = repair_with(&plyd, &archive);
    assert_eq!(mended.code, 0, "{}", mended.stdout);
    assert_usable(&plyd);
    assert_eq!(fs::read(&of_image).unwrap(), good);

    // Its name may go to another image.
    lose(&mut plyd, &[&of_image]);
    load(&plyd, &super::archive::archive("whole", &[]));
    assert_sound(&plyd);
    plyd.ok(["image", "rm", "whole"]);
    assert_eq!(layers(&plyd), 0);

    // Given up, also where it is damaged, but not where a newer release wrote it.
    for what in ["gone", "damaged", "newer"] {
        load(&plyd, &archive);
        plyd.signal(Signal::SIGTERM);
        match what {
            "gone" => fs::remove_file(&of_image).unwrap(),
            "damaged" => drop(break_record(&of_image)),
            _ => fs::write(&of_image, newer(&good)).unwrap(),
        }
        plyd.launch();
        let removed = plyd.snapctl(["image", "rm", "whole"]);
        assert_eq!(removed.code, i32::from(what == "newer"), "{what}");
        if what == "newer" {
            assert!(of_image.exists());
            assert_eq!(layers(&plyd), 2);
            continue;
        }
        assert_sound(&plyd);
        assert_eq!(layers(&plyd), 0, "{what}");
        lose(&mut plyd, &[]);
        assert_sound(&plyd);
    }
}

/// It was looked for only if it had been damaged at the start.
#[test]
fn records_of_images_that_are_put_back_are_taken_in_though_they_were_gone() {
    let mut plyd = Plyd::start();
    load(&plyd, &image("whole"));
    let of_image = files(&plyd, "images/records", ".record").remove(0);
    let of_name = files(&plyd, "images/names", ".record").remove(0);
    plyd.ok(["snapshot", "prepare", "work", "whole"]);
    for lost in [&[&of_image, &of_name][..], &[&of_image], &[&of_name]] {
        let good: Vec<_> = lost.iter().map(|path| fs::read(path).unwrap()).collect();
        lose(&mut plyd, lost);
        for (path, good) in lost.iter().zip(&good) {
            fs::write(path, good).unwrap();
        }
        let taken = plyd.ok(REPAIR);
        let told = " was put back while plyd ran, and is used now\n";
        assert_eq!(taken.matches(told).count(), lost.len(), "{taken}");
        assert_usable(&plyd);
    }
    // Only then does anything hang on it.
    plyd.ok(["snapshot", "rm", "work"]);
    plyd.ok(["image", "rm", "whole"]);
    assert_eq!(layers(&plyd), 0);
}

/// What built on it was neither listed nor named by anything.
#[test]
fn the_record_of_a_snapshot_that_others_build_on_is_missed() {
    let mut plyd = Plyd::start();
    load(&plyd, &image("whole"));
    plyd.ok(["snapshot", "prepare", "work", "whole"]);
    plyd.ok(["snapshot", "commit", "work", "base"]);
    let id = plyd.json(["snapshot", "info", "base", "--json"])["id"].clone();
    plyd.ok(["snapshot", "prepare", "child", "base"]);
    let id = id.as_str().unwrap();
    let record = plyd.root().join(format!("snapshots/records/{id}.record"));
    let good = fs::read(&record).unwrap();
    lose(&mut plyd, &[&record]);
    assert_counted(&plyd, 1);
    let listed = plyd.snapctl(["snapshot", "ls"]);
    assert!(listed.stderr.contains("1 record"), "{}", listed.stderr);
    let found = faults(&plyd);
    assert_eq!(found.len(), 1);
    assert_eq!(found[0]["of"], "the snapshot base");
    assert_eq!(found[0]["file"], record.to_str().unwrap());
    let left = plyd.snapctl(REPAIR);
    assert_eq!(left.code, 1, "{}", left.stdout);
    fs::write(&record, good).unwrap();
    plyd.ok(REPAIR);
    assert_usable(&plyd);
    assert!(plyd.ok(["snapshot", "ls", "-q"]).contains("child"));

    lose(&mut plyd, &[&record]);
    plyd.ok(["snapshot", "rm", "child"]);
    assert_usable(&plyd);
    plyd.ok(["image", "rm", "whole"]);
    assert_eq!(layers(&plyd), 0);
}

#[test]
fn nothing_is_missed_while_images_come_and_go() {
    let mut plyd = Plyd::start();
    let archive = image("whole");
    let end = AtomicBool::new(false);
    thread::scope(|scope| {
        let looks = scope.spawn(|| {
            let mut looks = 0;
            while !end.load(Ordering::Acquire) {
                let verified = plyd.snapctl(["system", "verify", "--json"]);
                let found = parse(&verified);
                assert_eq!(found["faults"], Value::Array(Vec::new()), "{found:#}");
                assert_counted(&plyd, 0);
                looks += 1;
            }
            looks
        });
        for _ in 0..20 {
            load(&plyd, &archive);
            plyd.ok(["image", "rm", "whole"]);
        }
        end.store(true, Ordering::Release);
        assert!(looks.join().unwrap() > 3);
    });
    // Nor after a kill in the middle of it.
    for number in 0..10 {
        load(&plyd, &archive);
        let mut removal = plyd.command();
        let removal = removal.args(["image", "rm", "whole"]);
        let mut removal = removal.stderr(Stdio::null()).spawn().unwrap();
        thread::sleep(Duration::from_millis(4 * number));
        plyd.signal(Signal::SIGKILL);
        removal.wait().unwrap();
        plyd.launch();
        assert_sound(&plyd);
        assert_counted(&plyd, 0);
    }
}

/// What built on the record was hidden from those who had to remove it, so the image never went, and the store missed the record for good.
#[test]
fn an_image_goes_whose_lowest_record_is_gone() {
    let mut plyd = Plyd::start();
    load(&plyd, &image("whole"));
    let [lower, _] = of_layers(&plyd);
    lose(&mut plyd, &[&lower]);
    assert_counted(&plyd, 1);
    plyd.ok(["image", "rm", "whole"]);
    assert_sound(&plyd);
    assert_counted(&plyd, 0);
    assert_eq!(layers(&plyd), 0);
    assert!(files(&plyd, "snapshots/records", ".record").is_empty());
}

/// One that was made here, which no image tells of.
#[test]
fn what_builds_on_a_snapshot_that_is_gone_can_be_removed() {
    let mut plyd = Plyd::start();
    plyd.ok(["snapshot", "prepare", "work"]);
    plyd.ok(["snapshot", "commit", "work", "base"]);
    let base = files(&plyd, "snapshots/records", ".record");
    plyd.ok(["snapshot", "prepare", "on it", "base"]);
    lose(&mut plyd, &[&base[0]]);
    assert_counted(&plyd, 1);
    let all = plyd.json(["snapshot", "ls", "--json"]);
    assert_eq!(all[0]["key"], "on it");
    assert_eq!(all[0]["parent"], Value::Null);
    plyd.ok(["snapshot", "rm", "on it"]);
    assert_sound(&plyd);
    assert_counted(&plyd, 0);
    assert_eq!(layers(&plyd), 0);
}
