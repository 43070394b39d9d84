//! What a user is told of damage, and of what is not plyd's.

use std::fs;
use std::path::{Path, PathBuf};

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

/// An image of busybox.
fn lost() -> Vec<u8> {
    let busybox = ["/bin/busybox", "/usr/bin/busybox"].map(fs::read);
    let busybox = busybox.into_iter().find_map(Result::ok);
    let layer = Layer::new()
        .dir("bin", 0o755)
        .file(
            "bin/busybox",
            0o755,
            &busybox.expect("install busybox-static"),
        )
        .symlink("bin/sh", "busybox")
        .symlink("bin/sleep", "busybox")
        .file("bin/script", 0o755, b"#!/bin/sh\nexit 0\n")
        .dir("etc", 0o755)
        .file("etc/passwd", 0o644, b"root:x:0:0:root:/root:/bin/sh\n")
        .file("etc/group", 0o644, b"root:x:0:\n");
    archive("lost", &[Blob::gzip(layer)])
}

/// A plyd with that image, of which all small files are lost.
fn with_lost_files() -> Plyd {
    let mut plyd = Plyd::start();
    load(&plyd, &lost());
    // None is open then.
    restart(&mut plyd, |plyd| {
        for pack in files(plyd, "store/packs", ".pack") {
            fs::remove_file(pack).unwrap();
        }
    });
    plyd
}

/// It said that it could not look them up, or left that to runc, which reads the file, too.
#[test]
fn a_container_that_runs_as_numbers_starts_without_its_passwd() {
    let plyd = with_lost_files();
    let who = "echo $(busybox id -u) $(busybox id -g) $HOME; busybox wc -c </etc/passwd";
    for (user, code, words) in [
        ("0:0", 0, "0 0 /\n0\n"),
        ("7:8", 0, "7 8 /\n0\n"),
        (
            "0",
            125,
            "`-u UID:GID` needs no look-up; `snapctl system verify` names",
        ),
        ("root:0", 125, "`snapctl system repair` mends it"),
        (
            "0:root",
            125,
            "cannot open /etc/group inside the root: Input/output error",
        ),
    ] {
        let done = plyd.snapctl(["run", "--rm", "-u", user, "lost", "sh", "-c", who]);
        assert_eq!(done.code, code, "{user}: {}", done.stderr);
        let said = done.stdout + &done.stderr;
        assert!(said.contains(words), "{user}: {said}");
    }
    // What the user puts there is what is there.
    let own = plyd.dir().join("own");
    fs::create_dir(&own).unwrap();
    for name in ["passwd", "group"] {
        fs::write(own.join(name), format!("own {name}\n")).unwrap();
    }
    let cat = ["lost", "busybox", "cat", "/etc/passwd"];
    for volume in ["/etc", "/etc/passwd"] {
        let source = own.join(volume.trim_start_matches("/etc").trim_start_matches('/'));
        let volume = format!("{}:{volume}", source.display());
        let args = ["run", "--rm", "-u", "0:0", "-v", &volume];
        assert_eq!(plyd.ok(args.into_iter().chain(cat)), "own passwd\n");
    }
}

/// Its plyfs had said so in a log that went with the mount, and `system info` forgot it.
#[test]
fn what_a_container_could_not_read_is_known_after_its_end() {
    let plyd = with_lost_files();
    let ended = || plyd.json(["system", "info", "--json"])["damaged_mounts_ended"].clone();
    assert_eq!(ended(), 0);
    for times in 1..3 {
        let cat = [
            "run",
            "--rm",
            "-u",
            "0:0",
            "lost",
            "busybox",
            "cat",
            "/bin/script",
        ];
        assert_eq!(plyd.snapctl(cat).code, 1);
        assert_eq!(ended(), times);
    }
    let line = plyd
        .log()
        .lines()
        .find(|line| line.contains("/bin/script of the layer "))
        .map(str::to_owned);
    let line = line.expect("plyd's log has it");
    let objects = plyd.root().join("store/objects");
    for words in [
        " WARN ",
        "had said: ",
        &*objects.to_string_lossy(),
        "I/O error",
    ] {
        assert!(line.contains(words), "{line}");
    }
    let told = plyd.ok(["system", "info"]);
    let words = "something in 2 mounts since ended (plyd's log names it); `snapctl system repair` mends them";
    assert!(told.contains(words), "{told}");
    // What nobody could read any more is forgotten when it can be read again.
    let mended = plyd.piped(["system", "repair", "-i", "-"], &lost());
    assert_eq!(mended.code, 0, "{}", mended.stdout);
    assert_eq!(ended(), 0);
}

#[test]
fn a_program_whose_content_is_damaged_is_126_and_says_what_mends_it() {
    let plyd = with_lost_files();
    plyd.ok([
        "run", "-d", "--name", "long", "-u", "0:0", "lost", "sleep", "1000",
    ]);
    for args in [
        &["run", "--rm", "-u", "0:0", "lost", "script"][..],
        &["run", "--rm", "-d", "-u", "0:0", "lost", "/bin/script"],
        &["exec", "long", "script"],
    ] {
        let done = plyd.snapctl(args);
        assert_eq!(
            (done.code, &*done.stdout),
            (126, ""),
            "{args:?}: {}",
            done.stderr
        );
        let advice = "`snapctl system repair` mends it";
        assert!(done.stderr.contains(advice), "{args:?}: {}", done.stderr);
    }
    assert_eq!(plyd.ok(["ps", "-aq"]).lines().count(), 1);
}

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
            "snapctl: {what} cannot be used, so that not all is shown; `snapctl system verify` names what is missing, and `snapctl system repair` mends it, or says what would\n"
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
        "the record {} cannot be used: its checksum does not match its content; `snapctl system repair` makes it anew, or says what would\n",
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
    let of_snapshot = "; nothing here tells what it said: restore it from a backup and run `snapctl system repair`, or delete the file to give up the snapshot and what builds on it and start plyd again";
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
    let sum = ": 1 record damaged; a newer release of Plywood wrote it, and `snapctl system repair` leaves it to that\n";
    assert!(told.ends_with(sum), "{told}");
    flip(&packs[0], 3);
    assert_eq!(
        quiet(&plyd, "verify"),
        format!("{}{}", shown(&image), shown(&packs[0]))
    );
    let told = plyd.snapctl(["system", "verify"]).stdout;
    let sum = ": 1 pack, 1 record damaged; `snapctl system repair` mends it, or says what would, and leaves to a newer release of Plywood what that wrote\n";
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
