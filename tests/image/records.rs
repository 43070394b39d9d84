//! Records that were damaged, and are made anew from something else.

use std::fs;
use std::path::{Path, PathBuf};

use nix::sys::signal::Signal;
use serde_json::Value;

use super::archive::*;
use super::care::stored;
use super::common::Plyd;
use super::damage::{NAME, assert_sound, break_record, faults, files, image, load, mount};

/// It was told by two lines of which one was wrong, and a repair lost the blob's digest.
#[test]
fn a_record_that_is_damaged_when_plyd_starts_is_told_once_and_made_anew_with_its_blob() {
    let mut plyd = Plyd::start();
    let archive = image("whole");
    load(&plyd, &archive);
    plyd.ok(["snapshot", "prepare", "work", "whole"]);
    let layers = plyd.json(["layer", "ls", "--json"]);
    let blobs = |layers: &Value| -> Vec<Value> {
        let layers = layers.as_array().unwrap().iter();
        layers.map(|layer| layer["blob"].clone()).collect()
    };
    let good = blobs(&layers);
    assert!(good.iter().all(Value::is_string), "{layers:#}");
    let records = files(&plyd, "store/records", ".record");
    let restart = |plyd: &mut Plyd| {
        plyd.signal(Signal::SIGTERM);
        for record in &records {
            break_record(record);
        }
        let before = plyd.log().len();
        plyd.launch();
        plyd.log()[before..].to_owned()
    };
    let log = restart(&mut plyd);
    for record in &records {
        let told: Vec<_> = log
            .lines()
            .filter(|line| line.contains(record.file_stem().unwrap().to_str().unwrap()))
            .collect();
        assert_eq!(told.len(), 1, "{log}");
        let sentence = format!(
            "the record {} cannot be used: its checksum does not match its content; `snapctl system repair` makes it anew, or says what to do",
            record.display()
        );
        assert!(told[0].contains(&sentence), "{}", told[0]);
    }
    assert!(!log.contains("is missing"), "{log}");
    assert_eq!(faults(&plyd).len(), 2);
    let mended = plyd.ok(["system", "repair"]);
    assert!(mended.contains(" 2 mended, 0 left"), "{mended}");
    for (blob, record) in good.iter().zip(&records) {
        let line = format!(
            "the record of the layer {} was made anew from its index; the digest of its blob, {}, is the one that the image {NAME} gives",
            record.file_stem().unwrap().to_str().unwrap(),
            blob.as_str().unwrap()
        );
        assert!(mended.contains(&line), "{mended}");
    }
    assert_eq!(blobs(&plyd.json(["layer", "ls", "--json"])), good);
    assert_sound(&plyd);

    // Nobody who knows: that is told, with what would help, and it does.
    plyd.ok(["image", "rm", "-f", "whole"]);
    restart(&mut plyd);
    let mended = plyd.ok(["system", "repair"]);
    let line = "is not known any more, for no image here has the layer; `snapctl system repair -i`";
    assert_eq!(mended.matches(line).count(), 2, "{mended}");
    let lost = plyd.json(["layer", "ls", "--json"]);
    assert!(blobs(&lost).iter().all(Value::is_null), "{lost:#}");
    let mended = plyd.piped(["system", "repair", "-i", "-"], &archive);
    assert_eq!(mended.code, 0, "{}", mended.stderr);
    assert!(
        mended.stdout.contains(" 2 mended, 0 left"),
        "{}",
        mended.stdout
    );
    assert_eq!(blobs(&plyd.json(["layer", "ls", "--json"])), good);
    assert_sound(&plyd);
}

/// Such a record could not be mended, and whoever deleted it, as he was told to, could not load the image again: what built on the
/// snapshot was in the way.
#[test]
fn the_records_of_an_images_layers_are_made_anew_from_the_image() {
    let mut plyd = Plyd::start();
    load(&plyd, &image("whole"));
    plyd.ok(["snapshot", "prepare", "work", "whole"]);
    // In order of creation.
    let listed = plyd.ok(["snapshot", "ls", "-q"]);
    let tree = plyd.ok(["snapshot", "tree"]);
    let mut records = files(&plyd, "snapshots/records", ".record");
    let text = |path: &Path| fs::read_to_string(path).unwrap();
    records.retain(|path| text(path).contains("\"image\""));
    records.sort_by_key(|path| !text(path).contains("\"parent\":null"));
    assert_eq!(records.len(), 2);
    let good = fs::read(&records[1]).unwrap();
    let (lower, upper) = records.split_at(1);
    for (broken, lose_index, empty) in [
        (lower, false, false),
        (upper, false, false),
        (&records[..], false, true),
        (lower, true, true),
        (upper, true, false),
        (upper, true, true),
    ] {
        plyd.signal(Signal::SIGTERM);
        for record in broken {
            match empty {
                true => fs::write(record, b"").unwrap(),
                false => drop(break_record(record)),
            }
        }
        if lose_index {
            fs::remove_dir_all(plyd.root().join("index")).unwrap();
        }
        let before = plyd.log().len();
        plyd.launch();
        let told = match lose_index {
            true => {
                "; if it is of an image's layer, `snapctl system repair` makes it anew from the image's record, or with `-i` from the image's archive; else restore "
            }
            false => {
                "; `snapctl system repair` makes it anew from the image's record; where that is damaged or gone, too, `snapctl system repair -i` or `snapctl image load` with the image's archive does "
            }
        };
        let log = plyd.log()[before..].to_owned();
        assert_eq!(log.matches(told).count(), broken.len(), "{log}");
        // What is of a layer stays while nobody can say that it has a snapshot.
        let other = Layer::new().file("x", 0o644, b"x");
        load(&plyd, &archive("other", &[Blob::gzip(other)]));
        plyd.ok(["image", "rm", "other"]);
        assert_eq!(faults(&plyd).len(), broken.len());
        let repaired = plyd.snapctl(["system", "repair"]);
        let made = repaired
            .stdout
            .matches("was made anew from what the image says\n");
        // Which record that of the upper layer was only the index can tell, or what is left of it.
        let is_known = !(lose_index && empty && broken == upper);
        assert_eq!(made.count(), if is_known { broken.len() } else { 0 });
        assert_eq!(repaired.code, i32::from(!is_known), "{}", repaired.stdout);
        if is_known {
            assert_sound(&plyd);
            assert_eq!(plyd.ok(["snapshot", "tree"]), tree);
            assert_eq!(plyd.ok(["snapshot", "ls", "-q"]), listed);
        }
    }
    plyd.signal(Signal::SIGTERM);
    fs::write(&upper[0], &good).unwrap();
    plyd.launch();
    assert_sound(&plyd);
    let mnt = mount(&plyd, "work");
    assert_eq!(fs::read(mnt.join("file 7")).unwrap(), b"file 7");
    plyd.umount(&mnt);

    // What was kept because of a record goes when that is whole again, and so does what is removed later.
    let other = Layer::new().file("x", 0o644, b"x");
    load(&plyd, &archive("other", &[Blob::gzip(other)]));
    plyd.signal(Signal::SIGTERM);
    break_record(&lower[0]);
    plyd.launch();
    plyd.ok(["image", "rm", "other"]);
    let left = || files(&plyd, "store/layers", ".index").len();
    assert_eq!(left(), 3);
    plyd.ok(["system", "repair"]);
    assert_eq!(left(), 2);
    plyd.ok(["snapshot", "rm", "work"]);
    plyd.ok(["image", "rm", "whole"]);
    assert_eq!(left(), 0);
    plyd.ok(["system", "gc"]);
    assert_eq!(files(&plyd, "store/records", ".record").len(), 0);
    assert_eq!(files(&plyd, "store/packs", "").len(), 0);
}

/// The record of the snapshot whose content is the top layer of the image `whole`.
fn record_of_top(plyd: &Plyd) -> PathBuf {
    let image = &plyd.json(["image", "inspect", "whole"])[0];
    let chain_id = image["chain_id"].as_str().unwrap();
    let info = plyd.json(["snapshot", "info", "--owner", "image", chain_id, "--json"]);
    let id = info["id"].as_str().unwrap();
    plyd.root().join(format!("snapshots/records/{id}.record"))
}

/// The archive of busybox with another layer on it, as the image `whole`.
fn on_busybox() -> Vec<u8> {
    let busybox = fs::read("/bin/busybox").unwrap();
    let mut base = Layer::new()
        .dir("bin", 0o755)
        .file("bin/busybox", 0o755, &busybox);
    for name in ["sh", "sleep", "cat"] {
        base = base.symlink(&format!("bin/{name}"), "busybox");
    }
    let top = Layer::new().file("top", 0o644, b"the top");
    archive("whole", &[Blob::gzip(base), Blob::gzip(top)])
}

/// Neither could be made anew without the other, and it was advised to give the snapshot up. Of containers that ran on it was said
/// that their roots had failed.
#[test]
fn an_archive_restores_the_records_of_an_image_and_of_its_top_layer_together() {
    let mut plyd = Plyd::start();
    let archive = on_busybox();
    load(&plyd, &archive);
    plyd.ok(["run", "-d", "--name", "box", "whole", "sleep", "1000"]);
    plyd.ok(["snapshot", "prepare", "work", "whole"]);
    let exec = ["exec", "box", "cat", "/top"];
    assert_eq!(plyd.ok(exec), "the top");
    let of_top = record_of_top(&plyd);
    let of_image = files(&plyd, "images/records", ".record").remove(0);
    let layer = plyd.json(["snapshot", "info", "work", "--json"])["packed_layers"][0].clone();
    let of_layer = |dir: &str, end: &str| {
        let name = format!("store/{dir}/{}{end}", layer.as_str().unwrap());
        plyd.root().join(name)
    };
    let (index, record) = (of_layer("layers", ".index"), of_layer("records", ".record"));
    let tree = plyd.ok(["snapshot", "tree"]);
    let image = plyd.json(["image", "inspect", "whole"]);
    let with_load = ["image", "load", "-q"];
    let with_repair = ["system", "repair", "-i", "-"];
    let cases: [(&str, Signal, &[&PathBuf], &[&str]); 5] = [
        ("both", Signal::SIGTERM, &[], &with_repair),
        ("loaded", Signal::SIGTERM, &[], &with_load),
        ("killed", Signal::SIGKILL, &[], &with_repair),
        ("layer", Signal::SIGTERM, &[&record], &with_repair),
        (
            "all of the layer",
            Signal::SIGKILL,
            &[&record, &index],
            &with_repair,
        ),
    ];
    for (what, signal, also, command) in cases {
        plyd.signal(signal);
        for path in [&of_top, &of_image].into_iter().chain(also.iter().copied()) {
            break_record(path);
        }
        plyd.launch();
        let listed = plyd.ok(["ps"]);
        assert!(listed.contains("running, started"), "{what}: {listed}");
        assert_eq!(plyd.ok(exec), "the top", "{what}");
        let mended = plyd.piped(command.iter(), &archive);
        assert_eq!(mended.code, 0, "{what}: {}{}", mended.stdout, mended.stderr);
        if command == &with_repair[..] {
            for of in [
                "of docker.io/library/whole:latest",
                "the image docker.io/library/whole:latest",
            ] {
                let told = format!("{of} was made anew from the archive\n");
                assert!(mended.stdout.contains(&told), "{what}: {}", mended.stdout);
            }
        }
        assert_sound(&plyd);
        assert_eq!(plyd.ok(["snapshot", "tree"]), tree, "{what}");
        assert_eq!(plyd.json(["image", "inspect", "whole"]), image, "{what}");
        plyd.ok(["snapshot", "prepare", "other", "whole"]);
        let mnt = mount(&plyd, "other");
        assert_eq!(fs::read(mnt.join("top")).unwrap(), b"the top", "{what}");
        plyd.umount(&mnt);
        fs::remove_dir(&mnt).unwrap();
        plyd.ok(["snapshot", "rm", "other"]);
    }
    // Nothing is counted twice: it all goes.
    plyd.ok(["rm", "-f", "box"]);
    plyd.ok(["snapshot", "rm", "work"]);
    plyd.ok(["image", "rm", "whole"]);
    assert_eq!(plyd.ok(["layer", "ls", "-q"]), "");
    plyd.ok(["system", "gc"]);
    assert_eq!(stored(&plyd, "packs").len(), 0);
}
