//! What becomes whole with something else that is taken in, or because somebody has put it back.

use std::fs;

use nix::sys::signal::Signal;

use super::archive::*;
use super::care::stored;
use super::common::Plyd;
use super::damage::{assert_sound, flip, load, mount};

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
            .contains("contents that were damaged or missing have come anew with a layer");
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
