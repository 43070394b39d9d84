//! Damage to what is nobody's contents: merged views and records are looked at, told of and mended.

use std::fs;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, Ordering};

use nix::sys::signal::Signal;
use serde_json::Value;

use super::archive::*;
use super::common::{Done, Plyd, unmount, until};

pub const NAME: &str = "docker.io/library/whole:latest";

pub fn load(plyd: &Plyd, image: &[u8]) {
    let loaded = plyd.piped(["image", "load", "-q"], image);
    assert_eq!(loaded.code, 0, "{}", loaded.stderr);
}

/// An image of two layers, whose view has many pages.
pub fn image(name: &str) -> Vec<u8> {
    let mut top = Layer::new();
    for number in 0..300 {
        let path = format!("file {number}");
        top = top.file(&path, 0o644, path.as_bytes());
    }
    let base = Layer::new().file("base", 0o644, &noise(1, 40 << 10));
    archive(name, &[Blob::gzip(base), Blob::gzip(top)])
}

/// The files in a directory below plyd's root that end so.
pub fn files(plyd: &Plyd, dir: &str, end: &str) -> Vec<PathBuf> {
    let entries = fs::read_dir(plyd.root().join(dir)).unwrap();
    let paths = entries.map(|entry| entry.unwrap().path());
    let mut paths: Vec<_> = paths
        .filter(|path| path.to_str().unwrap().ends_with(end))
        .collect();
    paths.sort();
    paths
}

pub fn flip(path: &Path, at: u64) {
    let file = fs::File::options().read(true).write(true).open(path);
    let file = file.unwrap();
    let mut byte = [0];
    file.read_exact_at(&mut byte, at).unwrap();
    file.write_all_at(&[byte[0] ^ 1], at).unwrap();
}

/// Damages a record in its middle.
pub fn break_record(path: &Path) -> Vec<u8> {
    let good = fs::read(path).unwrap();
    flip(path, good.len() as u64 / 2);
    good
}

pub fn parse(done: &Done) -> Value {
    serde_json::from_str(&done.stdout).unwrap_or_else(|_| panic!("{done:?}"))
}

/// What verification finds, which has to be something.
pub fn faults(plyd: &Plyd) -> Vec<Value> {
    let verified = plyd.snapctl(["system", "verify", "--json"]);
    assert_eq!(verified.code, 1, "{}", verified.stdout);
    let faults = parse(&verified)["faults"].as_array().unwrap().clone();
    let deep = plyd.snapctl(["system", "verify", "--deep", "--json"]);
    assert_eq!(parse(&deep)["faults"].as_array(), Some(&faults));
    faults
}

pub fn assert_sound(plyd: &Plyd) {
    let verified = plyd.snapctl(["system", "verify", "--deep"]);
    assert_eq!(verified.code, 0, "{}{}", verified.stdout, verified.stderr);
}

pub fn mount(plyd: &Plyd, key: &str) -> PathBuf {
    let mnt = plyd.dir().join(format!("mnt-{key}"));
    fs::create_dir(&mnt).unwrap();
    plyd.ok(["mount", key, mnt.to_str().unwrap()]);
    mnt
}

/// A process that had something mounted may take a moment to end.
fn until_sound(plyd: &Plyd) {
    let is_sound = || plyd.snapctl(["system", "verify", "--deep"]).code == 0;
    until("everything is sound", is_sound);
}

/// Nobody but a repair looked at them, and who had one mounted had to find out by himself.
#[test]
fn a_damaged_view_is_named_and_restored_below_its_mount() {
    let plyd = Plyd::start();
    load(&plyd, &image("whole"));
    plyd.ok(["snapshot", "prepare", "work", "whole"]);
    let mnt = mount(&plyd, "work");
    assert_sound(&plyd);
    let views = files(&plyd, "store/views", ".view");
    let [view] = &views[..] else {
        panic!("{views:?}");
    };
    let layers = plyd.json(["snapshot", "info", "work", "--json"])["packed_layers"].clone();
    let lowest_first: Vec<_> = layers.as_array().unwrap().iter().rev().cloned().collect();
    let good = fs::read(view).unwrap();
    let places = [3, 100, 1100, good.len() / 2, good.len() - 10];
    for at in places {
        flip(view, at as u64);
        let found = faults(&plyd);
        assert_eq!(found.len(), 1, "{at}: {found:?}");
        let fault = &found[0];
        assert_eq!(
            (&fault["kind"], &fault["layer"]),
            (&"view".into(), &"".into())
        );
        assert_eq!(fault["file"], view.to_str().unwrap());
        assert_eq!(fault["images"], serde_json::json!([NAME]), "{at}");
        assert_eq!(fault["layers"].as_array(), Some(&lowest_first), "{at}");
        let snapshots = fault["snapshots"].as_array().unwrap();
        assert!(snapshots.contains(&"work".into()), "{fault}");
        let told = plyd.snapctl(["system", "verify"]);
        let line = format!(
            "the merged view of the image {NAME} (layers {}, {}): {} is damaged: ",
            &lowest_first[0].as_str().unwrap()[..12],
            &lowest_first[1].as_str().unwrap()[..12],
            view.display()
        );
        assert!(told.stdout.starts_with(&line), "{}", told.stdout);
        let advice = "; `snapctl system repair` builds it again, below what has it mounted or, where that cannot be, for the next mount: the snapshot work\n";
        assert!(told.stdout.contains(advice), "{}", told.stdout);
        flip(view, at as u64);
    }

    // Known is what was read.
    let system = || plyd.json(["system", "info", "--json"]);
    let snapshot = || plyd.json(["snapshot", "info", "work", "--json"])["damaged_view"].clone();
    flip(view, good.len() as u64 / 2);
    assert_eq!(
        (&system()["damaged_views"], snapshot()),
        (&0.into(), false.into())
    );
    let list = || {
        let entries = fs::read_dir(&mnt)?;
        entries
            .map(|entry| entry.and_then(|entry| entry.metadata()).map(drop))
            .collect::<std::io::Result<Vec<_>>>()
    };
    assert_eq!(list().unwrap_err().raw_os_error(), Some(libc::EIO));
    let info = system();
    assert_eq!(
        (&info["damaged_views"], snapshot()),
        (&1.into(), true.into())
    );
    assert_eq!(
        (&info["damaged_mounts"], &info["damaged_contents"]),
        (&1.into(), &0.into())
    );
    let info = plyd.ok(["system", "info"]);
    let line = "damaged        1 merged view in 1 mount; `snapctl system repair`";
    assert!(info.contains(line), "{info}");
    let info = plyd.ok(["snapshot", "info", "work"]);
    assert!(
        info.contains("the merged view of its layers; `snapctl"),
        "{info}"
    );

    let mended = plyd.ok(["system", "repair"]);
    let line = format!("was damaged, and {} is what it was again\n", view.display());
    assert!(
        mended.contains(&line) && mended.contains(" 1 mended, 0 left"),
        "{mended}"
    );
    assert!(fs::read(view).unwrap() == good);
    // It was not mounted again.
    assert_eq!(list().unwrap().len(), 301);
    assert_eq!(
        (&system()["damaged_views"], snapshot()),
        (&0.into(), false.into())
    );
    assert_sound(&plyd);

    // What cannot be restored below the mount is built for the next one, and it is told who has to do something.
    let own = plyd.json(["snapshot", "mounts", "work", "--json"])[0]["source"].clone();
    let own = PathBuf::from(own.as_str().unwrap());
    flip(view, 100);
    let keeps = |mended: u32| {
        let told = plyd.snapctl(["system", "repair"]);
        assert_eq!(told.code, 1, "{}", told.stdout);
        let line = format!(
            "what had it mounted before another took its place keeps it: the snapshot work; unmount the snapshot work wherever it is bound to, {} last (umount(8)), and have it mounted anew with `snapctl snapshot mounts`\n",
            own.display()
        );
        assert!(told.stdout.contains(&line), "{}", told.stdout);
        let sum = format!(" {mended} mended, 1 mount left\n");
        assert!(told.stdout.ends_with(&sum), "{}", told.stdout);
    };
    keeps(1);
    // It was forgotten at once.
    keeps(0);
    assert_eq!(plyd.snapctl(["system", "verify"]).code, 1);
    plyd.umount(&mnt);
    // As it is said.
    unmount(&own);
    until_sound(&plyd);
    plyd.ok(["snapshot", "mounts", "work"]);
    assert!(fs::read_dir(&own).unwrap().count() == 301);
    assert_sound(&plyd);
    plyd.ok(["snapshot", "rm", "work"]);
    // Without a header and without anybody who has it, it is nobody's.
    plyd.ok(["snapshot", "view", "look", "whole"]);
    let mnt = mount(&plyd, "look");
    assert!(fs::read(view).unwrap() == good);
    plyd.umount(&mnt);
}

/// It was a SIGBUS of the plyfs that had it mounted, and the end of all that ran there.
#[test]
fn a_view_that_is_cut_short_below_its_mount_is_missed_and_restored() {
    let plyd = Plyd::start();
    load(&plyd, &image("whole"));
    for (key, keeps) in [("half", 0.5), ("header", 0.1), ("nothing", 0.0)] {
        plyd.ok(["snapshot", "view", key, "whole"]);
        let mnt = mount(&plyd, key);
        // What is looked at now is mapped.
        fs::metadata(mnt.join("file 7")).unwrap();
        let [view] = &files(&plyd, "store/views", ".view")[..] else {
            panic!("there is one view");
        };
        let good = fs::read(view).unwrap();
        let file = fs::File::options().write(true).open(view).unwrap();
        let length = good.len() as f64 * keeps;
        file.set_len(length as u64).unwrap();
        let list = || -> std::io::Result<usize> {
            let entries = fs::read_dir(&mnt)?.collect::<Result<Vec<_>, _>>()?;
            entries
                .iter()
                .try_for_each(|entry| entry.metadata().map(drop))?;
            Ok(entries.len())
        };
        assert_eq!(list().unwrap_err().raw_os_error(), Some(libc::EIO), "{key}");
        let info = plyd.json(["snapshot", "info", key, "--json"]);
        assert_eq!(info["damaged_view"], true, "{key}");
        // Whoever else needs it has it written whole, too.
        if key == "half" {
            plyd.ok(["snapshot", "prepare", "other", "whole"]);
            let mnt = mount(&plyd, "other");
            assert_eq!(list().unwrap(), 301, "{key}");
            plyd.umount(&mnt);
            plyd.ok(["snapshot", "rm", "other"]);
        }
        let mended = plyd.snapctl(["system", "repair"]);
        match key {
            "half" => assert!(mended.stdout.ends_with(" 0 mended, 0 left\n"), "{mended:?}"),
            "header" => {
                let line = format!("was damaged, and {} is what it was again\n", view.display());
                assert!(mended.stdout.contains(&line), "{mended:?}");
            }
            _ => assert!(
                mended.stdout.ends_with(" 1 mended, 1 mount left\n"),
                "{mended:?}"
            ),
        }
        if keeps > 0.0 {
            assert!(fs::read(view).unwrap() == good, "{key}");
            assert_eq!(list().unwrap(), 301, "{key}");
            assert_sound(&plyd);
        }
        plyd.umount(&mnt);
        plyd.ok(["snapshot", "rm", key]);
        until_sound(&plyd);
    }
}

/// A program was said not to be there, and a repair to mend it, though a mount whose view has lost its header never reads the new one.
#[test]
fn what_cannot_be_executed_for_a_damaged_view_says_so() {
    let plyd = Plyd::start();
    plyd.load_busybox();
    for name in ["box", "other"] {
        let sleep = ["localhost/busybox", "sleep", "1000"];
        plyd.ok(["run", "-d", "--name", name].into_iter().chain(sleep));
    }
    let view = files(&plyd, "store/views", ".view").remove(0);
    let exec = |name: &str| {
        let done = plyd.snapctl(["exec", "-u", "0:0", name, "/bin/nosuch"]);
        assert!(matches!(done.code, 125..=127), "{done:?}");
        done.stderr
    };
    let again = |name: &str| {
        plyd.ok(["stop", "-t", "0", name]);
        plyd.ok(["start", name]);
    };
    assert!(!exec("box").contains("merged view"));
    let length = fs::metadata(&view).unwrap().len();
    flip(&view, length / 2);
    let told = exec("box");
    let advice = "; the merged view of its image is damaged: `snapctl system repair` mends that below the container, or says that it has to be stopped and started again\n";
    assert!(told.ends_with(advice), "{told}");
    plyd.ok(["system", "repair"]);
    assert!(!exec("box").contains("merged view"));

    fs::write(&view, vec![0; length as usize]).unwrap();
    let told = exec("box");
    let advice = "; the merged view of its image is damaged beyond repair below the container: stop it and start it again, for that makes another one\n";
    assert!(told.ends_with(advice), "{told}");
    let told = plyd.snapctl(["system", "repair"]);
    assert_eq!(told.code, 1);
    let advice = " keeps it: the root of the container box, the root of the container other; stop the container box and start it again; stop the container other and start it again\n";
    assert!(told.stdout.contains(advice), "{}", told.stdout);
    again("box");
    assert!(!exec("box").contains("merged view"));
    plyd.ok(["exec", "box", "true"]);
    // It was named, too, once it had another one.
    let told = plyd.snapctl(["system", "verify"]).stdout;
    let advice =
        " keeps it: the root of the container other; stop the container other and start it again\n";
    assert!(told.contains(advice), "{told}");
    let sum = ": 1 mount damaged; what has to be mounted again no repair can mend\n";
    assert!(told.ends_with(sum), "{told}");
    again("other");
    assert_sound(&plyd);
}

/// plyd looked at its records when it started, and never again.
#[test]
fn each_damaged_record_is_named_while_plyd_runs() {
    let plyd = Plyd::start();
    plyd.load_busybox();
    let image = image("whole");
    load(&plyd, &image);
    plyd.ok(["snapshot", "prepare", "work", "whole"]);
    let container = plyd.ok(["create", "--name", "box", "localhost/busybox", "sh"]);
    assert_sound(&plyd);
    let id = |reference: &str| {
        let image = plyd.json(["image", "inspect", reference]);
        image[0]["id"].as_str().unwrap().to_owned()
    };
    let name = blake3::hash(NAME.as_bytes()).to_hex();
    let snapshot = plyd.json(["snapshot", "info", "work", "--json"])["id"].clone();
    let layer = plyd.json(["snapshot", "info", "work", "--json"])["packed_layers"][0].clone();
    let layer = layer.as_str().unwrap();
    let whole = id("whole");
    // Where it lies, what it is of, and whether plyd still knows all of what it said.
    let kinds = [
        (
            format!("store/records/{layer}"),
            format!("layer {}", &layer[..12]),
            true,
        ),
        (
            format!("images/names/{name}"),
            format!("the name {NAME} of an image"),
            true,
        ),
        (
            format!("containers/{}", container.trim()),
            "the container box".to_owned(),
            true,
        ),
        (
            format!("images/records/{whole}"),
            format!("the image {NAME}"),
            false,
        ),
        (
            format!("snapshots/records/{}", snapshot.as_str().unwrap()),
            "the snapshot work".to_owned(),
            true,
        ),
    ];
    let records = || plyd.json(["system", "info", "--json"])["damaged_records"].clone();
    for gone in [false, true] {
        for (path, of, is_known) in &kinds {
            assert_eq!(records(), 0);
            let path = plyd.root().join(format!("{path}.record"));
            let good = fs::read(&path).unwrap();
            match gone {
                true => fs::remove_file(&path).unwrap(),
                false => drop(break_record(&path)),
            }
            let found = faults(&plyd);
            assert_eq!(found.len(), 1, "{of}: {found:#?}");
            assert_eq!(found[0]["kind"], "record", "{of}");
            assert_eq!(found[0]["file"], path.to_str().unwrap());
            assert_eq!(records(), 1);
            let info = plyd.ok(["system", "info"]);
            assert!(info.contains("damaged        1 record; `snapctl"), "{info}");
            let told = plyd.snapctl(["system", "verify"]);
            let why = match gone {
                true => "it is gone",
                false => "its checksum does not match its content",
            };
            let problem = format!("the record {} cannot be used: {why}; ", path.display());
            let line = told.stdout.lines().next().unwrap();
            assert!(line.starts_with(of.as_str()), "{line}");
            // Whoever restarted plyd instead would lose what it said.
            let again =
                "; `snapctl system repair` writes it again as it was, as long as this plyd runs";
            let is_told = line.ends_with(again);
            assert_eq!(is_told, *is_known && !of.starts_with("layer"), "{line}");
            assert!(line.contains(&problem), "{line}");

            let repaired = plyd.snapctl(["system", "repair"]);
            if *is_known {
                assert_eq!(repaired.code, 0, "{of}: {}", repaired.stdout);
                assert!(
                    repaired.stdout.contains("was written again as it was\n"),
                    "{}",
                    repaired.stdout
                );
                assert!(fs::read(&path).unwrap() == good, "{of}");
            } else {
                assert_eq!(repaired.code, 1, "{of}: {}", repaired.stdout);
                let left = format!("left: {of}: {}", problem.trim_end_matches("; "));
                assert!(repaired.stdout.contains(&left), "{}", repaired.stdout);
                let repaired = plyd.piped(["system", "repair", "-i", "-"], &image);
                assert_eq!(repaired.code, 0, "{}", repaired.stdout);
                let told = format!("the record of {of} was made anew from the archive\n");
                assert!(repaired.stdout.contains(&told), "{}", repaired.stdout);
                assert!(fs::read(&path).unwrap() == good, "{of}");
            }
            assert_sound(&plyd);
        }
    }
}

/// The state is its shim's, who may be writing it.
#[test]
fn the_damaged_state_of_a_container_is_named() {
    let plyd = Plyd::start();
    plyd.load_busybox();
    plyd.ok(["run", "--name", "box", "localhost/busybox", "true"]);
    let id = plyd.ok(["ps", "-aq"]);
    let state = plyd.root().join("containers").join(id.trim()).join("state");
    let half = state.join(".tmp-7");
    fs::write(&half, "half").unwrap();
    let path = state.join("state.record");
    let good = break_record(&path);
    let found = faults(&plyd);
    assert_eq!(found.len(), 1, "{found:#?}");
    assert_eq!(found[0]["of"], "the state of the container box");
    assert!(
        found[0]["advice"]
            .as_str()
            .unwrap()
            .contains("forgets how the container ended")
    );
    assert!(half.exists());
    fs::write(&path, good).unwrap();
    assert_sound(&plyd);
}

#[test]
fn what_changes_while_it_is_looked_at_is_not_damage() {
    let plyd = Plyd::start();
    let archive = image("whole");
    load(&plyd, &archive);
    let changing = AtomicBool::new(true);
    std::thread::scope(|scope| {
        scope.spawn(|| {
            for round in 0..12 {
                let key = format!("work {round}");
                plyd.ok(["snapshot", "prepare", &*key, "whole"]);
                plyd.ok(["snapshot", "mounts", &*key]);
                plyd.ok(["snapshot", "rm", &*key]);
                let other = Layer::new().file("other", 0o644, &noise(round, 2000));
                load(
                    &plyd,
                    &super::archive::archive("other", &[Blob::gzip(other)]),
                );
                plyd.ok(["image", "rm", "other"]);
            }
            changing.store(false, Ordering::Release);
        });
        while changing.load(Ordering::Acquire) {
            assert_sound(&plyd);
        }
    });
}

/// A record as a newer release writes it.
pub fn newer(record: &[u8]) -> String {
    let text = std::str::from_utf8(record).unwrap();
    let (body, _) = text.trim_end().rsplit_once('\n').unwrap();
    let body = format!("{body}\n").replacen("\"incompatible\":0", "\"incompatible\":1", 1);
    format!("{body}{}\n", blake3::hash(body.as_bytes()).to_hex())
}

/// A repair wrote what this release knows over what it could not read.
#[test]
fn a_record_of_a_newer_release_is_left_to_that() {
    let mut plyd = Plyd::start();
    let archive = image("whole");
    load(&plyd, &archive);
    let dirs = [
        "snapshots/records",
        "images/records",
        "images/names",
        "store/records",
    ];
    let records = dirs.map(|dir| files(&plyd, dir, ".record")).concat();
    assert_eq!(records.len(), 6);
    for record in &records {
        let good = fs::read(record).unwrap();
        let newer = newer(&good);
        for restart in [false, true] {
            if restart {
                plyd.signal(Signal::SIGTERM);
            }
            fs::write(record, &newer).unwrap();
            if restart {
                plyd.launch();
            }
            let repaired = plyd.piped(["system", "repair", "-i", "-"], &archive);
            let told = repaired.stdout;
            assert_eq!(repaired.code, 1, "{} {restart}: {told}", record.display());
            assert!(
                told.contains("a newer release of Plywood wrote it")
                    && told.contains("have the newer release repair it"),
                "{told}"
            );
            assert!(told.contains(" 0 mended, "), "{told}");
            assert_eq!(fs::read_to_string(record).unwrap(), newer);
            plyd.signal(Signal::SIGTERM);
            fs::write(record, &good).unwrap();
            plyd.launch();
            assert_sound(&plyd);
        }
    }
}
