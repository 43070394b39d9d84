//! What a user is told of records that cannot be used.

use std::fs;
use std::path::PathBuf;

use super::archive::*;
use super::common::{Plyd, busybox_archive};
use super::damage::{break_record, files, image, load, newer, parse};
use super::told::restart;

/// Where the records of a store lie of which one each is to be damaged.
pub fn records(plyd: &Plyd, container: &str) -> [PathBuf; 5] {
    let of = |key: &str, field: &str| {
        let info = plyd.json(["snapshot", "info", key, "--json"]);
        let value = &info[field];
        value
            .as_str()
            .or_else(|| value[0].as_str())
            .unwrap()
            .to_owned()
    };
    let image = plyd.json(["image", "inspect", "whole"])[0]["id"].clone();
    let name = blake3::hash(b"localhost/busybox:latest").to_hex();
    [
        format!("images/records/{}", image.as_str().unwrap()),
        format!("images/names/{name}"),
        format!("containers/{container}"),
        format!("snapshots/records/{}", of("work", "id")),
        format!("store/records/{}", of("work", "packed_layers")),
    ]
    .map(|path| plyd.root().join(format!("{path}.record")))
}

/// They left out what had a damaged record, without a word.
#[test]
fn a_list_that_is_not_complete_says_so() {
    let mut plyd = Plyd::start();
    plyd.load_busybox();
    load(&plyd, &image("whole"));
    plyd.ok(["snapshot", "prepare", "work", "whole"]);
    let container = plyd.ok(["create", "--name", "box", "localhost/busybox", "sh"]);
    let broken = records(&plyd, container.trim());
    let lists: [(&[&str], usize); 6] = [
        (&["image", "ls"], 2),
        (&["ps"], 1),
        (&["ps", "-a"], 1),
        (&["snapshot", "ls"], 1),
        (&["snapshot", "tree"], 1),
        (&["layer", "ls"], 1),
    ];
    let told = |plyd: &Plyd, list: &[&str], format: &[&str]| {
        let done = plyd.snapctl([list, format].concat());
        assert_eq!(done.code, 0, "{list:?}: {}", done.stderr);
        if format == ["--json"] {
            assert!(parse(&done).is_array(), "{list:?}: {}", done.stdout);
        }
        done.stderr
    };
    let before = lists.map(|(list, _)| plyd.ok([list, &["-q"]].concat()));
    let mut good = Vec::new();
    restart(&mut plyd, |_| {
        good = broken.iter().map(|path| break_record(path)).collect()
    });
    for (list, number) in lists {
        let what = match number {
            1 => "1 record",
            _ => "2 records",
        };
        let line = format!(
            "snapctl: {what} cannot be used, so that not all is shown; `snapctl system verify` names what is missing, and `snapctl system repair` mends it, or says what to do\n"
        );
        for format in [&[][..], &["--json"], &["-q"]] {
            assert_eq!(told(&plyd, list, format), line, "{list:?} {format:?}");
        }
    }
    let verified = plyd.snapctl(["system", "verify"]);
    assert!(
        verified.stdout.contains(": 5 records damaged; "),
        "{}",
        verified.stdout
    );
    restart(&mut plyd, |_| {
        for (path, good) in broken.iter().zip(&good) {
            fs::write(path, good).unwrap();
        }
    });
    for ((list, _), before) in lists.into_iter().zip(before) {
        assert_eq!(told(&plyd, list, &[]), "");
        assert_eq!(plyd.ok([list, &["-q"]].concat()), before);
    }
    // What is read from the disk each time is missed at once.
    fs::remove_file(&broken[3]).unwrap();
    let line = told(&plyd, &["snapshot", "ls"], &[]);
    assert!(
        line.starts_with("snapctl: 1 record cannot be used"),
        "{line}"
    );
    plyd.ok(["system", "repair"]);
    assert_eq!(told(&plyd, &["snapshot", "ls"], &[]), "");
}

/// It was said not to be there, with the advice to load the image, though a repair mends it.
#[test]
fn a_layer_with_a_damaged_record_is_not_said_to_be_gone() {
    let mut plyd = Plyd::start();
    let layer = Layer::new().file("file", 0o644, b"content");
    load(&plyd, &archive("whole", &[Blob::gzip(layer)]));
    let record = files(&plyd, "store/records", ".record").remove(0);
    let name = record.file_stem().unwrap().to_str().unwrap().to_owned();
    restart(&mut plyd, |_| drop(break_record(&record)));
    let run = plyd.snapctl(["run", "--rm", "whole", "/file"]);
    assert_eq!(run.code, 125);
    let export = plyd.snapctl(["layer", "export", &name[..8]]);
    assert_eq!(export.code, 1);
    let sentence = format!(
        "the record {} cannot be used: its checksum does not match its content; `snapctl system repair` makes it anew, or says what to do\n",
        record.display()
    );
    for told in [run.stderr, export.stderr] {
        assert!(told.ends_with(&sentence), "{told}");
    }
    plyd.ok(["system", "repair"]);
    plyd.ok(["snapshot", "view", "look", "whole"]);
    plyd.ok(["snapshot", "mounts", "look"]);
    plyd.ok(["layer", "export", &name[..8], "-o", "/dev/null"]);
}

/// A repair spoke of what a repair would do, and a file was to be deleted that an archive makes anew.
#[test]
fn it_is_said_what_became_of_a_record_and_what_the_user_must_do() {
    let mut plyd = Plyd::start();
    let archive = image("whole");
    load(&plyd, &archive);
    plyd.ok(["snapshot", "prepare", "work", "whole"]);
    let id = plyd.json(["snapshot", "info", "work", "--json"])["id"].clone();
    let snapshot = format!("snapshots/records/{}.record", id.as_str().unwrap());
    let snapshot = plyd.root().join(snapshot);
    let image = files(&plyd, "images/records", ".record").remove(0);
    let mut good = Vec::new();
    restart(&mut plyd, |_| {
        good = break_record(&snapshot);
        break_record(&image);
    });
    let of_snapshot = "; nothing here tells what it said: restore it from a backup and run `snapctl system repair`, or delete the file to give up the snapshot, start plyd again and remove what builds on it; what was written to it is erased then, so copy what you need out of its mount first";
    let of_image = "; `snapctl system repair -i` or `snapctl image load` with the image's archive makes it anew; only without that restore it from a backup and run `snapctl system repair`, or give the image up with `snapctl image rm`";
    for command in ["verify", "repair"] {
        let told = plyd.snapctl(["system", command]);
        assert_eq!(told.code, 1);
        for (path, advice) in [(&snapshot, of_snapshot), (&image, of_image)] {
            let path = path.to_str().unwrap();
            let line = told.stdout.lines().find(|line| line.contains(path));
            assert!(line.unwrap().ends_with(advice), "{}", told.stdout);
        }
    }
    let other = plyd.snapctl(["image", "inspect", "other"]);
    assert!(
        other.stderr.ends_with(&format!("cannot be{of_image}\n")),
        "{}",
        other.stderr
    );
    let repaired = plyd.piped(["system", "repair", "-i", "-"], &archive);
    assert!(
        repaired.stdout.ends_with(": 1 mended, 1 record left\n"),
        "{}",
        repaired.stdout
    );
    // Given up, as the advice has it.
    restart(&mut plyd, |_| fs::remove_file(&snapshot).unwrap());
    plyd.ok(["system", "verify", "--deep"]);
    assert!(!plyd.ok(["snapshot", "ls", "-q"]).contains("work"));
    assert!(
        !plyd
            .root()
            .join("snapshots/data")
            .join(id.as_str().unwrap())
            .exists()
    );
    plyd.ok(["snapshot", "prepare", "work", "whole"]);
}

/// It wrote what this release knows over what it could not read; a repair leaves such records alone.
#[test]
fn an_image_is_not_loaded_over_records_of_a_newer_release() {
    let mut plyd = Plyd::start();
    let archive = image("whole");
    load(&plyd, &archive);
    let dirs = [
        "images/records",
        "images/names",
        "store/records",
        "snapshots/records",
    ];
    let records = dirs.map(|dir| files(&plyd, dir, ".record")).concat();
    assert_eq!(records.len(), 6);
    let state = |plyd: &Plyd| {
        let dirs = dirs.iter().chain(&["store/layers"]);
        let files = dirs.flat_map(|dir| files(plyd, dir, ""));
        files
            .map(|path| (fs::read(&path).unwrap(), path))
            .collect::<Vec<_>>()
    };
    for record in &records {
        let good = fs::read(record).unwrap();
        for restarted in [false, true] {
            let write = |_: &Plyd| fs::write(record, newer(&good)).unwrap();
            match restarted {
                true => restart(&mut plyd, write),
                false => write(&plyd),
            }
            let before = state(&plyd);
            let loaded = plyd.piped(["image", "load", "-q"], &archive);
            let sentence = format!(
                "the record {} cannot be used: a newer release of Plywood wrote it; have the newer release repair it\n",
                record.display()
            );
            assert_eq!(loaded.code, 1, "{} {restarted}", record.display());
            assert!(loaded.stderr.ends_with(&sentence), "{}", loaded.stderr);
            assert!(state(&plyd) == before, "{} {restarted}", record.display());
            restart(&mut plyd, |_| fs::write(record, &good).unwrap());
            plyd.ok(["system", "verify"]);
        }
    }
    load(&plyd, &archive);
}

/// The log at the start did not name the archive, which the image's record cannot be made anew without, nothing said what hangs on a
/// record, and each listing was an error in the log for each snapshot that it left out.
#[test]
fn of_a_damaged_record_it_is_told_what_builds_on_it_and_what_mends_it() {
    let mut plyd = Plyd::start();
    plyd.load_busybox();
    let busybox = "localhost/busybox";
    plyd.ok(["run", "-d", "--name", "box", busybox, "sleep", "1000"]);
    for number in 1..=6 {
        plyd.ok(["snapshot", "prepare", &format!("work-{number}"), busybox]);
    }
    let image = files(&plyd, "images/records", ".record").remove(0);
    let top = plyd.json(["image", "inspect", busybox])[0]["chain_id"].clone();
    let all = plyd.json(["snapshot", "ls", "--json"]);
    let mut all = all.as_array().unwrap().iter();
    let layer = all.find(|snapshot| snapshot["key"] == top).unwrap();
    let layer = format!("snapshots/records/{}.record", layer["id"].as_str().unwrap());
    let layer = plyd.root().join(layer);
    let before = plyd.log().len();
    restart(&mut plyd, |_| {
        for record in [&layer, &image] {
            break_record(record);
        }
    });
    let advice = "; `snapctl system repair` makes it anew from the image's record; where that is damaged or gone, too, `snapctl system repair -i` or `snapctl image load` with the image's archive does";
    let log = plyd.log()[before..].to_owned();
    let mut lines = log.lines();
    let started = lines.find(|line| line.contains(layer.to_str().unwrap()));
    let started = started.unwrap();
    for words in [advice, " on_top=7", top.as_str().unwrap()] {
        assert!(started.contains(words), "{started}");
    }

    let told = plyd.snapctl(["system", "verify"]).stdout;
    let of_layer = "; what builds on it: the root of the container box, the snapshot work-1, the snapshot work-2, the snapshot work-3, the snapshot work-4 and 2 more";
    let of_image = "; what builds on it: the container box";
    for (record, words) in [(&layer, of_layer), (&image, of_image)] {
        let line = told
            .lines()
            .find(|line| line.contains(record.to_str().unwrap()));
        assert!(line.unwrap().contains(&format!("{words}; ")), "{told}");
        let logged = plyd.log();
        let mut lines = logged.lines();
        let is_it = |line: &&str| line.contains("verify found") && line.ends_with(words);
        assert!(lines.any(|line| is_it(&line)), "{logged}");
    }
    assert!(told.contains(advice), "{told}");
    let faults = parse(&plyd.snapctl(["system", "verify", "--json"]))["faults"].clone();
    let named = faults.as_array().unwrap().iter();
    assert_eq!(named.filter(|fault| fault["on_top"].is_string()).count(), 2);

    let left_out = |plyd: &Plyd| {
        for _ in 0..3 {
            plyd.ok(["snapshot", "ls"]);
            plyd.snapctl(["system", "df", "-q"]);
        }
        let log = plyd.log()[before..].to_owned();
        let lines = log.lines();
        let lines = lines.filter(|line| line.contains("left out of listings"));
        assert!(
            !log.contains("ERROR plywood::snapshotter::queries"),
            "{log}"
        );
        lines.count()
    };
    assert_eq!(left_out(&plyd), 1);
    plyd.ok([
        "system",
        "repair",
        "-i",
        busybox_archive().to_str().unwrap(),
    ]);
    assert_eq!(left_out(&plyd), 1);
    // Another time.
    break_record(&layer);
    assert_eq!(left_out(&plyd), 2);
    plyd.ok(["system", "repair"]);
    plyd.ok(["exec", "box", "true"]);
}
