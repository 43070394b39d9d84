//! What a user is told of damage, and of what is not plyd's.

use std::fs;
use std::path::Path;

use nix::sys::signal::Signal;
use serde_json::Value;

use super::archive::*;
use super::common::Plyd;
use super::damage::{NAME, break_record, files, flip, image, load, newer, parse};

pub fn restart(plyd: &mut Plyd, meanwhile: impl FnOnce(&Plyd)) {
    plyd.signal(Signal::SIGTERM);
    meanwhile(plyd);
    plyd.launch();
}

/// There was a line for each of the contents, in `verify` and in `repair`, whose words differed.
#[test]
fn a_lost_pack_is_told_by_one_line_for_each_layer() {
    let mut plyd = Plyd::start();
    load(&plyd, &image("whole"));
    let layers: Vec<String> = plyd
        .ok(["layer", "ls", "-q"])
        .lines()
        .map(str::to_owned)
        .collect();
    let packs = files(&plyd, "store/packs", ".pack");
    assert_eq!(packs.len(), 2);
    for pack in &packs {
        fs::remove_file(pack).unwrap();
    }
    for restarted in [false, true] {
        if restarted {
            restart(&mut plyd, |_| ());
        }
        let sum = "301 contents of 2 layers";
        for deep in [&[][..], &["--deep"]] {
            let verified = plyd.snapctl([&["system", "verify"], deep].concat());
            assert_eq!(verified.code, 1);
            let repaired = plyd.snapctl(["system", "repair"]);
            assert_eq!(repaired.code, 1);
            let lines: Vec<_> = verified.stdout.lines().collect();
            let [first, second, last] = lines[..] else {
                panic!("{}", verified.stdout);
            };
            assert!(last.contains(&format!(": {sum} damaged; ")), "{last}");
            let left: Vec<_> = repaired.stdout.lines().collect();
            assert_eq!(left.len(), 3, "{}", repaired.stdout);
            assert!(left[2].ends_with(&format!("0 mended, {sum} left")));
            for line in [first, second] {
                let layer = layers.iter().find(|layer| line.contains(&layer[..12]));
                assert!(layer.is_some(), "{line}");
                let (what, _) = line.split_once("; run `snapctl system repair`").unwrap();
                assert!(what.contains(&format!("image {NAME})")), "{line}");
                assert!(
                    left.iter()
                        .any(|left| left.starts_with(&format!("left: {what}; get the archive"))),
                    "{what}: {}",
                    repaired.stdout
                );
            }
            let many = [first, second]
                .into_iter()
                .find(|line| line.contains("300 contents "))
                .unwrap();
            let cause = match restarted {
                true => "): 300 contents are in no pack and no file of the store, first /file ",
                false => "): 300 contents are gone with the pack ",
            };
            assert!(many.contains(cause), "{many}");
            let named = packs
                .iter()
                .any(|pack| many.contains(&*pack.to_string_lossy()));
            assert_eq!(named, !restarted, "{many}");

            let all = plyd.snapctl([&["system", "verify", "--json"], deep].concat());
            let faults = parse(&all)["faults"].as_array().unwrap().clone();
            assert_eq!(faults.len(), 301);
            for fault in faults {
                assert_eq!(fault["kind"], "content");
                assert_eq!(fault["images"], serde_json::json!([NAME]));
                assert!(
                    fault["path"].is_string() && fault["cause"].is_string(),
                    "{fault}"
                );
                let advice = fault["advice"].as_str().unwrap();
                assert!(
                    advice.contains(&format!("the archive of the image {NAME} and give it to")),
                    "{advice}"
                );
            }
        }
    }
    let mended = plyd.piped(["system", "repair", "-i", "-"], &image("whole"));
    assert_eq!(mended.code, 0, "{}", mended.stdout);
    let verified = plyd.ok(["system", "verify", "--deep"]);
    assert!(verified.ends_with(": 0 damaged\n"), "{verified}");
}

#[test]
fn of_what_was_made_here_it_is_said_that_a_repair_knows_more() {
    let mut plyd = Plyd::start();
    plyd.ok(["snapshot", "prepare", "work"]);
    let mounts = plyd.json(["snapshot", "mounts", "work", "--json"]);
    let root = Path::new(mounts[0]["source"].as_str().unwrap());
    fs::write(root.join("file"), noise(1, 40 << 10)).unwrap();
    // Not by the helper, which sees to it that nothing committed changes.
    let commit = plyd.piped(["snapshot", "commit", "work", "done"], b"");
    assert_eq!(commit.code, 0, "{}", commit.stderr);
    fs::remove_file(files(&plyd, "store/packs", ".pack").remove(0)).unwrap();
    let verified = plyd.snapctl(["system", "verify"]);
    let advice = "; run `snapctl system repair`, which takes what other layers have of it, or says what to remove\n";
    assert!(
        verified.stdout.contains(" (of done): /file: ") && verified.stdout.contains(advice),
        "{}",
        verified.stdout
    );
    // Whoever did what is said of a layer that nothing uses would lose it.
    let id = plyd.json(["snapshot", "info", "done", "--json"])["id"].clone();
    let record = format!("snapshots/records/{}.record", id.as_str().unwrap());
    let record = plyd.root().join(record);
    restart(&mut plyd, |_| drop(break_record(&record)));
    for command in ["verify", "repair"] {
        let told = plyd.snapctl(["system", command]).stdout;
        let advice = "; whose it is cannot be told while the record of a snapshot cannot be used: mend that, then run `snapctl system repair`\n";
        assert!(told.contains(advice), "{told}");
    }
}

/// Such files were called uncollected, though no collection takes them.
#[test]
fn what_is_not_plyds_is_called_that() {
    let mut plyd = Plyd::start();
    load(&plyd, &image("whole"));
    let on_disk = |plyd: &Plyd, kind: &str| {
        let df = plyd.json(["system", "df", "--json"]);
        let mut users = df["users"].as_array().unwrap().iter();
        let user = users.find(|user| user["kind"] == kind).unwrap();
        user["on_disk"].as_u64().unwrap()
    };
    let before = ["uncollected", "other"].map(|kind| on_disk(&plyd, kind));
    let note = plyd.root().join("store/packs/note");
    let dir = plyd.root().join("store/objects");
    let others = [dir.join("a file"), dir.join("xy")];
    fs::create_dir(&others[1]).unwrap();
    for path in [&note, &others[0], &others[1].join("z")] {
        fs::write(path, noise(1, 50 << 10)).unwrap();
    }
    for restarted in [false, true] {
        if restarted {
            restart(&mut plyd, |_| ());
        }
        assert_eq!(on_disk(&plyd, "uncollected"), before[0]);
        assert!(on_disk(&plyd, "other") >= before[1] + (150 << 10));
        let notes = [
            format!(
                "{} is not plyd's: it is neither read nor collected, and can be moved away",
                note.display()
            ),
            format!(
                "2 files are not plyd's, first {}: they are neither read nor collected, and can be moved away",
                others[0].display()
            ),
        ];
        let verified = plyd.ok(["system", "verify"]);
        let lines: Vec<_> = verified.lines().collect();
        assert_eq!(lines.len(), 3, "{verified}");
        for (line, note) in lines.iter().zip(&notes) {
            assert_eq!(*line, format!("note: {note}"));
        }
        let told = plyd.json(["system", "verify", "--json"]);
        assert_eq!(told["notes"], serde_json::json!(notes));
        assert_eq!(told["faults"], Value::Array(Vec::new()));
        assert_eq!(plyd.ok(["system", "verify", "-q"]), "");
        plyd.ok(["system", "gc"]);
        let is_there = |path: &Path| path.exists();
        assert!(is_there(&note) && others.iter().all(|path| is_there(path)));
    }
    fs::remove_file(&note).unwrap();
    fs::remove_file(&others[0]).unwrap();
    fs::remove_dir_all(&others[1]).unwrap();
    assert_eq!(
        plyd.json(["system", "verify", "--json"])["notes"],
        serde_json::json!([])
    );
}

/// It printed nothing but layers, so that a script took the rest for whole.
#[test]
fn quiet_names_all_that_is_damaged_and_left() {
    let mut plyd = Plyd::start();
    load(&plyd, &image("whole"));
    plyd.ok(["snapshot", "prepare", "work", "whole"]);
    plyd.ok(["snapshot", "mounts", "work"]);
    let layers = plyd.ok(["layer", "ls", "-q"]);
    let quiet = |plyd: &Plyd, command: &str| {
        let done = plyd.snapctl(["system", command, "-q"]);
        assert_eq!(done.code, 1, "{done:?}");
        assert_eq!(done.stderr, "");
        done.stdout
    };
    let shown = |path: &Path| format!("{}\n", path.display());
    let view = files(&plyd, "store/views", ".view").remove(0);
    flip(&view, fs::metadata(&view).unwrap().len() / 2);
    assert_eq!(quiet(&plyd, "verify"), shown(&view));
    plyd.ok(["system", "repair", "-q"]);
    // What keeps a view that was replaced.
    flip(&view, 100);
    let left = quiet(&plyd, "repair");
    let kept = files(&plyd, "store/views", ".aside").remove(0);
    assert_eq!(left, shown(&kept));
    plyd.ok(["snapshot", "rm", "work"]);
    let image = files(&plyd, "images/records", ".record").remove(0);
    let packs = files(&plyd, "store/packs", ".pack");
    let good = fs::read(&image).unwrap();
    restart(&mut plyd, |_| fs::write(&image, newer(&good)).unwrap());
    for command in ["verify", "repair"] {
        assert_eq!(quiet(&plyd, command), shown(&image), "{command}");
    }
    let told = plyd.snapctl(["system", "verify"]).stdout;
    let sum = ": 1 record damaged; what a newer release of Plywood wrote is left to that\n";
    assert!(told.ends_with(sum), "{told}");
    flip(&packs[0], 3);
    assert_eq!(
        quiet(&plyd, "verify"),
        format!("{}{}", shown(&image), shown(&packs[0]))
    );
    let told = plyd.snapctl(["system", "verify"]).stdout;
    let sum = ": 1 pack, 1 record damaged; `snapctl system repair` mends what it can, and says what to do about the rest; what a newer release of Plywood wrote is left to that\n";
    assert!(told.ends_with(sum), "{told}");
    for pack in &packs {
        fs::remove_file(pack).unwrap();
    }
    let mut all: Vec<_> = layers.lines().collect();
    all.push(image.to_str().unwrap());
    all.sort_unstable();
    assert_eq!(quiet(&plyd, "verify").lines().collect::<Vec<_>>(), all);
}

/// There was nothing of it.
#[test]
fn the_log_has_what_was_found_mended_and_left() {
    let plyd = Plyd::start();
    load(&plyd, &image("whole"));
    let record = files(&plyd, "images/records", ".record").remove(0);
    break_record(&record);
    for pack in files(&plyd, "store/packs", ".pack") {
        fs::remove_file(pack).unwrap();
    }
    let warned = |before: usize| -> Vec<String> {
        let log = plyd.log()[before..].to_owned();
        let lines = log.lines().filter(|line| line.contains(" WARN "));
        lines.map(str::to_owned).collect()
    };
    for (command, what) in [("verify", "verify found: "), ("repair", "repair left: ")] {
        let before = plyd.log().len();
        assert_eq!(plyd.snapctl(["system", command]).code, 1);
        let told = warned(before);
        let of = |words: &str| {
            let lines = told.iter();
            lines
                .filter(|line| line.contains(what) && line.contains(words))
                .count()
        };
        assert_eq!(told.len(), 3, "{told:#?}");
        assert_eq!(of("300 contents are gone with the pack "), 1, "{told:#?}");
        assert_eq!(of("/base: "), 1, "{told:#?}");
        assert_eq!(of(record.to_str().unwrap()), 1, "{told:#?}");
    }
    let before = plyd.log().len();
    let mended = plyd.piped(["system", "repair", "-i", "-"], &image("whole"));
    assert_eq!(mended.code, 0, "{}", mended.stdout);
    assert_eq!(warned(before), [""; 0]);
    let log = plyd.log()[before..].to_owned();
    let told = log
        .lines()
        .filter(|line| line.contains(" INFO ") && line.contains("repair: the "));
    assert_eq!(told.count(), 3, "{log}");
}
