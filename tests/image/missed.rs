//! Records of layers that are gone when plyd starts, though snapshots have the layers.

use std::fs;
use std::path::{Path, PathBuf};

use nix::sys::signal::Signal;
use serde_json::Value;

use super::archive::noise;
use super::common::Plyd;
use super::damage::{assert_sound, break_record, faults, files, image, load, mount};
use super::gone::{REPAIR, assert_counted, assert_usable, layers, lose, of_layers};

/// A layer of snapctl's own, of which nothing else has the content.
struct Own {
    layer: String,
    snapshot: PathBuf,
    record: PathBuf,
    index: PathBuf,
    content: Vec<u8>,
}

impl Own {
    /// Commits it as the snapshot `key`.
    fn commit(plyd: &Plyd, key: &str, seed: u64) -> Self {
        let content = noise(seed, 50_000);
        plyd.ok(["snapshot", "prepare", "own"]);
        let mnt = mount(plyd, "own");
        fs::write(mnt.join("only"), &content).unwrap();
        plyd.umount(&mnt);
        fs::remove_dir(&mnt).unwrap();
        plyd.ok(["snapshot", "commit", "own", key]);
        let info = plyd.json(["snapshot", "info", key, "--json"]);
        let layer = info["packed_layers"][0].as_str().unwrap().to_owned();
        let id = info["id"].as_str().unwrap();
        let root = plyd.root();
        Self {
            snapshot: root.join(format!("snapshots/records/{id}.record")),
            record: root.join(format!("store/records/{layer}.record")),
            index: root.join(format!("store/layers/{layer}.index")),
            layer,
            content,
        }
    }

    fn assert_usable(&self, plyd: &Plyd, key: &str) {
        assert_sound(plyd);
        assert_counted(plyd, 0);
        plyd.ok(["snapshot", "prepare", "other", key]);
        let mnt = mount(plyd, "other");
        assert!(fs::read(mnt.join("only")).unwrap() == self.content);
        plyd.umount(&mnt);
        fs::remove_dir(&mnt).unwrap();
        plyd.ok(["snapshot", "rm", "other"]);
    }
}

/// Contents of `snapctl system df`, as a user reads it, and its exit code.
fn space(plyd: &Plyd) -> (i32, String) {
    let told = plyd.snapctl(["system", "df", "--json"]);
    let space: Value = serde_json::from_str(&told.stdout).unwrap();
    (told.code, space["problems"].to_string())
}

fn assert_all_goes(plyd: &Plyd) {
    plyd.ok(["system", "gc"]);
    assert_sound(plyd);
    assert_counted(plyd, 0);
    assert_eq!(layers(plyd), 0);
    assert!(files(plyd, "store/packs", ".pack").is_empty());
}

/// The start removed the layer's index, and a collection its contents, though its snapshot was there.
#[test]
fn the_record_of_a_committed_layer_that_is_gone_is_made_anew_or_put_back() {
    let mut plyd = Plyd::start();
    let own = Own::commit(&plyd, "base", 1);
    plyd.ok(["snapshot", "prepare", "on it", "base"]);
    let good = fs::read(&own.record).unwrap();
    plyd.signal(Signal::SIGTERM);
    break_record(&own.record);
    plyd.launch();
    let of_damaged = space(&plyd);
    for put_back in [false, true, false] {
        let log = lose(&mut plyd, &[&own.record]);
        let told = format!(
            "the record {} cannot be used: it is gone; `snapctl system repair` makes it anew, or says what to do",
            own.record.display()
        );
        assert_eq!(log.matches(&told).count(), 1, "{log}");
        assert_counted(&plyd, 1);
        let listed = plyd.snapctl(["layer", "ls"]);
        assert!(listed.stderr.contains("1 record"), "{}", listed.stderr);
        let refused = plyd.snapctl(["layer", "inspect", &own.layer]);
        assert!(refused.stderr.contains(&told), "{}", refused.stderr);
        let found = faults(&plyd);
        assert_eq!(found.len(), 1, "{found:?}");
        assert_eq!(found[0]["kind"], "record");
        assert_eq!(found[0]["layer"], *own.layer);
        assert_eq!(found[0]["file"], own.record.to_str().unwrap());
        assert_eq!(found[0]["snapshots"], serde_json::json!(["base"]));
        assert_eq!(space(&plyd), of_damaged);
        plyd.ok(["system", "gc"]);
        if put_back {
            fs::write(&own.record, &good).unwrap();
        }
        let mended = plyd.ok(REPAIR);
        let told = match put_back {
            true => "was put back while plyd ran, and is used now",
            false => "was made anew from its index",
        };
        let told = format!("the record of the layer {} {told}\n", own.layer);
        assert!(mended.contains(&told), "{mended}");
        assert_eq!(fs::read(&own.record).unwrap(), good);
        own.assert_usable(&plyd, "base");
    }

    // Given up, it goes at once.
    plyd.ok(["snapshot", "rm", "on it"]);
    lose(&mut plyd, &[&own.record]);
    plyd.ok(["snapshot", "rm", "base"]);
    assert_all_goes(&plyd);
}

/// All of them, and their blobs are known again, too.
#[test]
fn the_records_of_an_images_layers_are_made_anew_with_those_of_its_snapshots() {
    let mut plyd = Plyd::start();
    load(&plyd, &image("whole"));
    let listed = plyd.json(["layer", "ls", "--json"]);
    let of_layers_of_image = files(&plyd, "store/records", ".record");
    let of_snapshots = of_layers(&plyd);
    for with_snapshots in [false, true] {
        let mut lost: Vec<_> = of_layers_of_image.iter().collect();
        if with_snapshots {
            lost.extend(&of_snapshots);
        }
        lose(&mut plyd, &lost);
        plyd.ok(["system", "gc"]);
        assert_eq!(layers(&plyd), 2);
        let mended = plyd.ok(REPAIR);
        assert!(mended.ends_with(" mended, 0 left\n"), "{mended}");
        assert_usable(&plyd);
        assert_eq!(plyd.json(["layer", "ls", "--json"]), listed);
        for layer in listed.as_array().unwrap() {
            let name = layer["name"].as_str().unwrap();
            let exported = plyd.dir().join(name);
            plyd.ok(["layer", "export", name, "-o", exported.to_str().unwrap()]);
        }
    }
    plyd.ok(["image", "rm", "whole"]);
    assert_all_goes(&plyd);
}

/// Any layer may be that of a snapshot of which nothing is known.
#[test]
fn a_layer_without_a_record_stays_while_it_may_be_that_of_a_lost_snapshot() {
    let mut plyd = Plyd::start();
    let [own, lost, left] =
        [("base", 1), ("lost", 2), ("left", 3)].map(|(key, seed)| Own::commit(&plyd, key, seed));
    let good = [&own.record, &lost.record, &lost.snapshot].map(|path| fs::read(path).unwrap());
    for is_gone in [false, true] {
        // It tells that a snapshot is gone.
        plyd.ok(["snapshot", "prepare", "on it", "lost"]);
        plyd.signal(Signal::SIGTERM);
        for path in [&own.record, &lost.record] {
            fs::remove_file(path).unwrap();
        }
        if is_gone {
            fs::remove_file(&lost.snapshot).unwrap();
        } else {
            break_record(&lost.snapshot);
        }
        for path in [&left.record, &left.snapshot] {
            // As an import leaves it that was killed.
            let _ = fs::remove_file(path);
        }
        plyd.launch();
        assert_eq!(layers(&plyd), if is_gone { 2 } else { 3 });
        // Which of the others is damaged, nobody can tell.
        assert_counted(&plyd, 2);
        let found = faults(&plyd);
        assert_eq!(found.len(), 2, "{found:#?}");
        assert!(found.iter().all(|fault| fault["kind"] == "record"));
        let told = |what: &Path| {
            let of = |fault: &&Value| fault["file"] == what.to_str().unwrap();
            found.iter().filter(of).count()
        };
        assert_eq!((told(&own.record), told(&lost.snapshot)), (1, 1));
        plyd.ok(["system", "gc"]);
        let repaired = plyd.snapctl(REPAIR);
        assert_eq!(repaired.code, 1, "{}", repaired.stdout);
        assert_eq!(fs::read(&own.record).unwrap(), good[0]);
        // A start that does not know it either.
        lose(&mut plyd, &[&own.record]);
        fs::write(&lost.snapshot, &good[2]).unwrap();
        let mended = plyd.ok(REPAIR);
        let made = "was made anew from its index\n";
        assert_eq!(mended.matches(made).count(), 2, "{mended}");
        assert_eq!(fs::read(&lost.record).unwrap(), good[1]);
        own.assert_usable(&plyd, "base");
        lost.assert_usable(&plyd, "lost");
        // That of nobody has gone, for all is known.
        assert_eq!(layers(&plyd), 2);
        assert!(!left.index.exists());
        plyd.ok(["snapshot", "rm", "on it"]);
    }
    // What nobody has goes at a start at which all is known.
    lose(&mut plyd, &[&lost.record, &lost.snapshot]);
    assert_eq!(layers(&plyd), 1);
    own.assert_usable(&plyd, "base");
    plyd.ok(["snapshot", "rm", "base"]);
    assert_all_goes(&plyd);
}

/// A collection took the contents, which were of use once both were put back.
#[test]
fn contents_stay_while_the_record_and_the_index_of_a_layer_are_gone() {
    let mut plyd = Plyd::start();
    let own = Own::commit(&plyd, "base", 1);
    let good = [&own.record, &own.index].map(|path| fs::read(path).unwrap());
    for put_back in [true, false] {
        lose(&mut plyd, &[&own.record, &own.index]);
        assert_counted(&plyd, 1);
        let collected = plyd.snapctl(["system", "gc"]);
        assert_eq!(collected.code, 1, "{}", collected.stdout);
        let found = faults(&plyd);
        let kinds: Vec<_> = found.iter().map(|fault| &fault["kind"]).collect();
        assert_eq!(kinds, ["record", "layer"], "{found:#?}");
        let left = plyd.snapctl(REPAIR);
        assert_eq!(left.code, 1, "{}", left.stdout);
        let advice =
            "nothing else has it, for it was made here; remove the snapshot and make it again";
        assert!(left.stdout.contains(advice), "{}", left.stdout);
        if put_back {
            for (path, good) in [&own.record, &own.index].into_iter().zip(&good) {
                fs::write(path, good).unwrap();
            }
            plyd.ok(REPAIR);
            own.assert_usable(&plyd, "base");
        }
    }
    plyd.ok(["snapshot", "rm", "base"]);
    assert_all_goes(&plyd);
}
