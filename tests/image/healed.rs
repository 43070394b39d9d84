//! What becomes whole with something else that is taken in, or because somebody has put it back.

use std::fs;

use nix::sys::signal::Signal;
use serde_json::Value;

use super::archive::*;
use super::care::stored;
use super::common::{Done, Plyd};
use super::damage::{assert_sound, break_record, flip, image, load, mount, parse};
use super::told::restart;
use super::unusable::records;

const SMALL: u64 = 1;
const LARGE: u64 = 2;

fn small() -> Vec<u8> {
    noise(SMALL, 40 << 10)
}

fn large() -> Vec<u8> {
    noise(LARGE, 300 << 10)
}

/// An image of one layer with a small content, a large one, and one that no other image has.
fn with_shared(name: &str) -> Vec<u8> {
    let layer = Layer::new()
        .file("small", 0o644, &small())
        .file("large", 0o644, &large())
        .file("name", 0o644, name.as_bytes());
    archive(name, &[Blob::gzip(layer)])
}

/// What damages contents, and whether that is found out only by reading them.
type Damage = (&'static str, bool, fn(&mut Plyd));

const DAMAGES: [Damage; 3] = [
    ("bytes", true, |plyd| {
        flip(&stored(plyd, "packs")[0], 5000);
        flip(&stored(plyd, "objects")[0], 5000);
    }),
    ("gone while plyd runs", false, |plyd| {
        fs::remove_file(&stored(plyd, "packs")[0]).unwrap();
        fs::remove_file(&stored(plyd, "objects")[0]).unwrap();
    }),
    ("gone before plyd starts", false, |plyd| {
        plyd.signal(Signal::SIGTERM);
        fs::remove_file(&stored(plyd, "packs")[0]).unwrap();
        fs::remove_file(&stored(plyd, "objects")[0]).unwrap();
        plyd.launch();
    }),
];

/// They were taken for being there, so that the new image was damaged, too, though it had brought them.
#[test]
fn an_image_that_has_damaged_contents_brings_them_anew_for_all() {
    for (what, has_to_be_read, damage) in DAMAGES {
        let mut plyd = Plyd::start();
        load(&plyd, &with_shared("first"));
        plyd.ok(["snapshot", "view", "look", "first"]);
        let mnt = mount(&plyd, "look");
        let bad = stored(&plyd, "packs").remove(0);
        damage(&mut plyd);
        for name in ["small", "large"] {
            // It may read on in what it has open.
            if has_to_be_read {
                let error = fs::read(mnt.join(name)).unwrap_err();
                assert_eq!(error.raw_os_error(), Some(libc::EIO), "{what}: {name}");
            }
        }
        if has_to_be_read {
            let verified = plyd.snapctl(["system", "verify", "--deep"]);
            assert_eq!(verified.code, 1, "{what}: {}", verified.stdout);
        }
        load(&plyd, &with_shared("second"));
        assert!(!bad.exists(), "{what}");
        plyd.ok(["snapshot", "view", "other", "second"]);
        let other = mount(&plyd, "other");
        assert!(fs::read(other.join("small")).unwrap() == small(), "{what}");
        assert!(fs::read(other.join("large")).unwrap() == large(), "{what}");
        assert!(fs::read(mnt.join("small")).unwrap() == small(), "{what}");
        assert!(fs::read(mnt.join("large")).unwrap() == large(), "{what}");
        let info = plyd.json(["system", "info", "--json"]);
        assert_eq!(info["damaged_contents"], 0, "{what}");
        let told = plyd
            .log()
            .contains("contents that were damaged or missing are there again");
        // Of what is gone before plyd starts nobody has asked yet.
        assert_eq!(
            told,
            what != "gone before plyd starts",
            "{what}: {}",
            plyd.log()
        );
        // What was unique to the first image has gone with its pack.
        let mended = plyd.piped(["system", "repair", "-i", "-"], &with_shared("first"));
        assert_eq!(mended.code, 0, "{what}: {}", mended.stdout);
        assert_sound(&plyd);
        // The bad copies are not found again by who reads all packs.
        plyd.umount(&mnt);
        plyd.umount(&other);
        plyd.signal(Signal::SIGTERM);
        plyd.launch();
        assert_sound(&plyd);
    }
}

/// Of the damage of the first image the new one has a part.
#[test]
fn what_an_image_does_not_bring_stays_damaged() {
    let plyd = Plyd::start();
    let layer = Layer::new()
        .file("small", 0o644, &small())
        .file("own", 0o644, &noise(3, 40 << 10));
    load(&plyd, &archive("first", &[Blob::gzip(layer)]));
    let pack = stored(&plyd, "packs").remove(0);
    for at in [5000, 45 << 10] {
        flip(&pack, at);
    }
    assert_eq!(plyd.snapctl(["system", "verify", "--deep"]).code, 1);
    load(&plyd, &with_shared("second"));
    let verified = plyd.snapctl(["system", "verify", "--deep"]);
    assert!(
        verified.stdout.contains("/own: ")
            && verified.stdout.contains(": 1 content of 1 layer damaged"),
        "{}",
        verified.stdout
    );
}

/// What was written to a container and committed is new, though a damaged content has the same bytes.
#[test]
fn a_commit_brings_damaged_contents_anew() {
    let plyd = Plyd::start();
    load(&plyd, &with_shared("first"));
    flip(&stored(&plyd, "packs")[0], 5000);
    assert_eq!(plyd.snapctl(["system", "verify", "--deep"]).code, 1);
    plyd.ok(["snapshot", "prepare", "work"]);
    let mnt = mount(&plyd, "work");
    fs::write(mnt.join("copy"), small()).unwrap();
    plyd.umount(&mnt);
    let commit = plyd.piped(["snapshot", "commit", "work", "done"], b"");
    assert_eq!(commit.code, 0, "{}", commit.stderr);
    assert_sound(&plyd);
}

/// A repair took contents only from the very layer that was damaged.
#[test]
fn contents_that_a_layer_lacks_come_from_any_layer_of_an_archive() {
    let mut plyd = Plyd::start();
    load(&plyd, &with_shared("first"));
    plyd.ok(["snapshot", "prepare", "work"]);
    let mnt = mount(&plyd, "work");
    fs::write(mnt.join("copy"), noise(3, 50 << 10)).unwrap();
    plyd.umount(&mnt);
    let commit = plyd.piped(["snapshot", "commit", "work", "done"], b"");
    assert_eq!(commit.code, 0, "{}", commit.stderr);
    plyd.ok(["snapshot", "view", "look", "first"]);
    plyd.ok(["snapshot", "view", "own", "done"]);
    let mounts = ["look", "own"].map(|key| mount(&plyd, key));
    // Each lacks something that is in one of the others, and that is all that these have in common.
    let of = |name: &str, files: &[(&str, &[u8])]| {
        let layers = files.iter().map(|(path, content)| {
            let layer = Layer::new().file("x", 0o600, path.as_bytes());
            Blob::zstd(layer.file(path, 0o600, content))
        });
        archive(name, &layers.collect::<Vec<_>>())
    };
    let (small, large, own) = (small(), large(), noise(3, 50 << 10));
    // Of the same lengths, and not wanted.
    let (other_small, other_large) = (noise(8, small.len()), noise(9, large.len()));
    let parts: [(&str, &[u8]); 6] = [
        ("a", &other_small),
        ("b", &small),
        ("c", &other_large),
        ("d", &large),
        ("e", &own),
        ("f", b"first"),
    ];
    let all = of("rebuilt", &parts);
    let some = of("part", &parts[..3]);
    for (what, _, damage) in DAMAGES {
        match what {
            "bytes" => {
                for pack in stored(&plyd, "packs") {
                    flip(&pack, 5000);
                }
                flip(&stored(&plyd, "objects")[0], 5000);
            }
            _ => {
                damage(&mut plyd);
                for pack in stored(&plyd, "packs") {
                    fs::remove_file(pack).unwrap();
                }
                // What was moved away may be open.
                plyd.signal(Signal::SIGTERM);
                plyd.launch();
            }
        }
        let lost = plyd.snapctl(["system", "repair"]);
        assert_eq!(lost.code, 1, "{what}: {}", lost.stdout);
        let number = |done: &Done| -> usize {
            let left = parse(done)["left"].clone();
            let left = left.as_array().unwrap().iter();
            left.filter(|fault| fault["kind"] == "content").count()
        };
        let before = number(&plyd.snapctl(["system", "repair", "--json"]));
        let partly = plyd.piped(["system", "repair", "-i", "-", "--json"], &some);
        assert_eq!(number(&partly), before - 1, "{what}: {}", partly.stdout);
        let mended = plyd.piped(["system", "repair", "-i", "-"], &all);
        assert_eq!(mended.code, 0, "{what}: {}", mended.stdout);
        let told = " lacked came with other layers\n";
        assert_eq!(mended.stdout.matches(told).count(), 2, "{}", mended.stdout);
        assert!(mended.stderr.contains("searching "), "{}", mended.stderr);
        assert_sound(&plyd);
        // Nothing else of the archive was kept.
        let collected = plyd.json(["system", "gc", "--json"]);
        assert_eq!(collected["files"], Value::Array(Vec::new()), "{what}");
        assert_eq!(stored(&plyd, "objects").len(), 1, "{what}");
        assert_eq!(plyd.ok(["image", "ls", "-q"]).lines().count(), 1, "{what}");
        assert!(
            fs::read(mounts[0].join("small")).unwrap() == small,
            "{what}"
        );
        assert!(
            fs::read(mounts[0].join("large")).unwrap() == large,
            "{what}"
        );
        assert!(fs::read(mounts[1].join("copy")).unwrap() == own, "{what}");
    }
    for mnt in &mounts {
        plyd.umount(mnt);
    }
}

/// It was missed until plyd was started again, though it was there.
#[test]
fn a_pack_and_a_file_that_were_put_back_are_used_without_a_restart() {
    for command in ["verify", "repair"] {
        let mut plyd = Plyd::start();
        load(&plyd, &with_shared("first"));
        let away = ["packs", "objects"].map(|dir| stored(&plyd, dir).remove(0));
        restart(&mut plyd, |plyd| {
            for (number, path) in away.iter().enumerate() {
                fs::rename(path, plyd.dir().join(format!("away {number}"))).unwrap();
            }
        });
        plyd.ok(["snapshot", "view", "look", "first"]);
        let mnt = mount(&plyd, "look");
        for name in ["small", "large"] {
            let error = fs::read(mnt.join(name)).unwrap_err();
            assert_eq!(error.raw_os_error(), Some(libc::EIO), "{name}");
        }
        assert_eq!(plyd.snapctl(["system", command]).code, 1);
        // Nothing goes meanwhile.
        plyd.ok(["system", "gc"]);
        for (number, path) in away.iter().enumerate() {
            fs::rename(plyd.dir().join(format!("away {number}")), path).unwrap();
        }
        plyd.ok(["system", "gc"]);
        let told = plyd.ok(["system", command]);
        let pack = format!("the pack {} was put back", away[0].display());
        let file = "the file of a large content was put back while plyd ran, and is used now";
        match command {
            "repair" => assert!(told.contains(&pack) && told.contains(file), "{told}"),
            _ => {
                let log = plyd.log();
                assert!(log.contains(&pack) && log.contains(file), "{log}");
            }
        }
        assert!(fs::read(mnt.join("small")).unwrap() == small());
        assert!(fs::read(mnt.join("large")).unwrap() == large());
        assert_sound(&plyd);
        // It is told once.
        let told = plyd.ok(["system", "repair"]);
        assert!(told.ends_with(": 0 mended, 0 left\n"), "{told}");
        plyd.umount(&mnt);
    }
}

/// A record that was restored from a backup was used after the next start of plyd only.
#[test]
fn records_that_were_put_back_are_used_without_a_restart() {
    for command in ["verify", "repair"] {
        let mut plyd = Plyd::start();
        plyd.load_busybox();
        let image = image("whole");
        load(&plyd, &image);
        plyd.ok(["snapshot", "prepare", "work", "whole"]);
        let box_id = plyd.ok([
            "run",
            "-d",
            "--name",
            "box",
            "localhost/busybox",
            "sleep",
            "1000",
        ]);
        let root = plyd.json([
            "snapshot",
            "info",
            "--owner",
            "container",
            box_id.trim(),
            "--json",
        ]);
        let root = root["id"].as_str().unwrap();
        let mut broken = records(&plyd, box_id.trim()).to_vec();
        broken.push(plyd.root().join(format!("snapshots/records/{root}.record")));
        let layers = plyd.ok(["layer", "ls", "--json"]);
        let state = |plyd: &Plyd| {
            let lists = [
                &["image", "ls", "--json"][..],
                &["ps", "-a", "--json"],
                &["snapshot", "tree", "--json"],
                &["layer", "ls", "--json"],
            ];
            lists.map(|list| {
                let done = plyd.snapctl(list);
                assert_eq!(done.stderr, "", "{list:?}");
                done.stdout
            })
        };
        let before = state(&plyd);
        let mut good = Vec::new();
        restart(&mut plyd, |_| {
            good = broken.iter().map(|path| break_record(path)).collect();
        });
        assert!(plyd.ok(["ps", "-q"]).is_empty());
        let found = plyd.snapctl(["system", "verify", "--json"]);
        assert_eq!(
            parse(&found)["faults"].as_array().unwrap().len(),
            6,
            "{found:?}"
        );
        for (path, good) in broken.iter().zip(&good) {
            fs::write(path, good).unwrap();
        }
        let told = plyd.ok(["system", command]);
        if command == "repair" {
            let told = told.matches(" was put back while plyd ran, and is used now\n");
            assert_eq!(told.count(), 6);
        }
        assert_eq!(state(&plyd), before, "{command}");
        assert_eq!(plyd.ok(["layer", "ls", "--json"]), layers);
        assert_eq!(
            plyd.ok(["exec", "box", "cat", "/etc/image-name"]),
            "busybox from Debian\n"
        );
        let told = plyd.ok(["system", "repair"]);
        assert!(told.ends_with(": 0 mended, 0 left\n"), "{told}");
        // Nothing is counted twice, nor too little.
        plyd.ok(["image", "rm", "-f", "whole"]);
        assert_eq!(
            plyd.json(["layer", "ls", "--json"])
                .as_array()
                .unwrap()
                .len(),
            4
        );
        let mnt = mount(&plyd, "work");
        assert_eq!(fs::read(mnt.join("file 7")).unwrap(), b"file 7");
        plyd.umount(&mnt);
        plyd.ok(["rm", "-f", "box"]);
        plyd.ok(["snapshot", "rm", "work"]);
        plyd.ok(["image", "rm", "localhost/busybox"]);
        assert_eq!(plyd.ok(["layer", "ls", "-q"]), "");
        assert_eq!(plyd.ok(["snapshot", "ls", "-q"]), "");
    }
}
