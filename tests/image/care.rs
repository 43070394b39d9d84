//! What an administrator has mended of the layer store.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use nix::sys::signal::Signal;
use serde_json::Value;

use super::archive::*;
use super::common::{Done, PLYD, Plyd};
use super::damage::{flip, load, mount, parse};

/// Every file below a directory of the store, the largest first.
pub fn stored(plyd: &Plyd, dir: &str) -> Vec<PathBuf> {
    let mut found = Vec::new();
    let mut waiting = vec![plyd.root().join("store").join(dir)];
    while let Some(dir) = waiting.pop() {
        for entry in fs::read_dir(dir).unwrap() {
            let entry = entry.unwrap();
            match entry.file_type().unwrap().is_dir() {
                true => waiting.push(entry.path()),
                false => found.push((entry.metadata().unwrap().len(), entry.path())),
            }
        }
    }
    found.sort();
    found.into_iter().rev().map(|(_, path)| path).collect()
}

/// An image of one layer that is kept in a pack, a file, an index and a recipe.
fn image() -> Vec<u8> {
    let layer = Layer::new().file("small", 0o644, &noise(1, 40 << 10)).file(
        "large",
        0o644,
        &noise(2, 300 << 10),
    );
    archive("whole", &[Blob::gzip(layer)])
}

fn repair(plyd: &Plyd, archive: &[u8]) -> Done {
    plyd.piped(["system", "repair", "-i", "-"], archive)
}

#[test]
fn what_is_damaged_is_restored_from_an_archive_below_a_mount() {
    let mut plyd = Plyd::start();
    let image = image();
    load(&plyd, &image);
    let whole = plyd.snapctl(["system", "repair"]);
    assert_eq!(whole.code, 0, "{}", whole.stderr);
    assert_eq!(
        whole.stdout,
        "1 layer with 2 contents looked at: 0 mended, 0 left\n"
    );

    plyd.ok(["snapshot", "prepare", "work", "whole"]);
    let mnt = mount(&plyd, "work");
    type Break = fn(&mut Plyd);
    let breaks: [(&str, Break); 6] = [
        ("a byte in a pack", |plyd| {
            flip(&stored(plyd, "packs")[0], 5000)
        }),
        ("a byte of a large object", |plyd| {
            flip(&stored(plyd, "objects")[0], 5000)
        }),
        ("a damaged index", |plyd| {
            let index = stored(plyd, "layers");
            let index = index
                .iter()
                .find(|path| path.extension().unwrap() == "index");
            let file = fs::File::options().write(true).open(index.unwrap());
            file.unwrap().set_len(1200).unwrap();
        }),
        ("no recipe", |plyd| {
            let recipe = stored(plyd, "layers");
            let recipe = recipe
                .iter()
                .find(|path| path.extension().unwrap() == "tar");
            fs::remove_file(recipe.unwrap()).unwrap();
        }),
        ("no pack", |plyd| {
            // It is not open then.
            plyd.signal(Signal::SIGTERM);
            plyd.launch();
            fs::remove_file(&stored(plyd, "packs")[0]).unwrap();
        }),
        ("a damaged view", |plyd| {
            flip(&stored(plyd, "views")[0], 1100)
        }),
    ];
    for (what, damage) in breaks {
        damage(&mut plyd);
        if what == "a damaged index" {
            // It said what is damaged, and not what follows from that.
            let told = "no content was collected, for nobody can tell what the layer ";
            let collected = plyd.snapctl(["system", "gc"]);
            assert_eq!(collected.code, 1);
            let stderr = &collected.stderr;
            assert!(stderr.contains(told), "{stderr}");
            assert!(stderr.contains("`snapctl system repair` "), "{stderr}");
            let collected = plyd.snapctl(["system", "gc", "--json"]);
            assert_eq!(collected.code, 1);
            let error = parse(&collected)["errors"][0].clone();
            assert!(error.as_str().unwrap().starts_with(told), "{error}");
        }
        if what != "a damaged view" {
            // Nothing that could mend it.
            let left = plyd.snapctl(["system", "repair"]);
            assert_eq!(left.code, 1, "{what}: {}", left.stdout);
            assert!(
                left.stdout
                    .contains("get the archive of the image docker.io/library/whole:latest"),
                "{what}: {}",
                left.stdout
            );
            let other = archive("other", &[Blob::gzip(Layer::new().file("x", 0o644, b"x"))]);
            let other = repair(&plyd, &other);
            assert_eq!(other.code, 1, "{what}");
            assert!(
                other.stdout.contains("the archive does not have it"),
                "{}",
                other.stdout
            );
        }
        let mended = repair(&plyd, &image);
        // Packs were written anew since this view was built, so it cannot be written in its place, and the mount keeps it.
        let (code, left) = match what {
            "a damaged view" => (1, "1 mount left"),
            _ => (0, "0 left"),
        };
        let told = format!(" 1 mended, {left}\n");
        assert!(mended.stdout.ends_with(&told), "{what}: {}", mended.stdout);
        assert_eq!(mended.code, code, "{what}: {}", mended.stderr);
        let verified = plyd.snapctl(["system", "verify", "--deep"]);
        assert_eq!(verified.code, code, "{what}: {}", verified.stdout);
        // Nothing of the archive is left, nor of what was replaced.
        assert!(
            fs::read_dir(plyd.root().join("images/spool"))
                .unwrap()
                .next()
                .is_none()
        );
        plyd.ok(["system", "gc"]);
        assert_eq!(
            (stored(&plyd, "packs").len(), stored(&plyd, "objects").len()),
            (1, 1)
        );
    }
    // The mount is older than all of this, and has read nothing of the two yet.
    assert!(fs::read(mnt.join("small")).unwrap() == noise(1, 40 << 10));
    assert!(fs::read(mnt.join("large")).unwrap() == noise(2, 300 << 10));
    plyd.umount(&mnt);
}

/// Such a pack was served from what was open of it, and nobody missed it before plyd started again.
#[test]
fn a_pack_that_was_moved_away_is_missed_and_written_anew_from_what_is_open_of_it() {
    let mut plyd = Plyd::start();
    load(&plyd, &image());
    plyd.ok(["system", "verify", "--deep"]);
    plyd.ok(["snapshot", "view", "look", "whole"]);
    let mnt = mount(&plyd, "look");
    assert!(fs::read(mnt.join("small")).unwrap() == noise(1, 40 << 10));
    let pack = stored(&plyd, "packs").remove(0);
    fs::rename(&pack, plyd.dir().join("moved")).unwrap();
    for how in [&["--deep"][..], &[]] {
        let verified = plyd.snapctl([&["system", "verify"], how].concat());
        assert_eq!(verified.code, 1, "{}", verified.stdout);
        let named = verified.stdout.contains(pack.to_str().unwrap());
        assert!(
            named && verified.stdout.contains("/small"),
            "{}",
            verified.stdout
        );
    }
    plyd.ok(["system", "gc"]);
    // Who has it mounted reads on.
    let read = Command::new("dd")
        .arg(format!("if={}", mnt.join("small").display()))
        .args(["iflag=direct", "bs=64k", "status=none"])
        .output()
        .unwrap();
    assert!(read.stdout == noise(1, 40 << 10), "{read:?}");
    let mended = plyd.ok(["system", "repair"]);
    let told = format!("the pack {} was not in its place", pack.display());
    assert!(
        mended.starts_with(&told) && mended.contains(" 1 mended, 0 left"),
        "{mended}"
    );
    plyd.umount(&mnt);
    plyd.signal(Signal::SIGTERM);
    plyd.launch();
    plyd.ok(["system", "verify", "--deep"]);
}

/// A repair once removed such a pack after a restart, with all that could still be read of it.
#[test]
fn a_pack_with_a_damaged_header_or_table_is_mended_without_an_archive() {
    let mut plyd = Plyd::start();
    load(&plyd, &image());
    type At = fn(u64) -> u64;
    let places: [At; 2] = [|_| 3, |length| length - 50];
    for at in places {
        for restart in [false, true] {
            let pack = stored(&plyd, "packs").remove(0);
            flip(&pack, at(fs::metadata(&pack).unwrap().len()));
            if restart {
                plyd.signal(Signal::SIGTERM);
                plyd.launch();
            }
            let verified = plyd.snapctl(["system", "verify", "--deep"]);
            assert_eq!(verified.code, 1);
            let told = format!("{} is damaged: ", pack.display());
            assert!(
                verified.stdout.starts_with(&told)
                    && verified.stdout.contains(": 1 pack damaged; "),
                "{}",
                verified.stdout
            );
            plyd.ok(["system", "gc"]);
            let mended = plyd.ok(["system", "repair"]);
            let told = format!("the damaged pack {} was written anew", pack.display());
            assert!(
                mended.starts_with(&told) && mended.contains("1 mended, 0 left"),
                "{mended}"
            );
            assert!(!pack.exists());
            plyd.ok(["system", "verify", "--deep"]);
        }
    }
    plyd.ok(["snapshot", "view", "look", "whole"]);
    let mnt = mount(&plyd, "look");
    assert!(fs::read(mnt.join("small")).unwrap() == noise(1, 40 << 10));
    plyd.ok(["umount", mnt.to_str().unwrap()]);
}

/// Once whoever asked for a repair was told to repeat it, which never helped.
#[test]
fn a_pack_of_a_newer_release_is_left_to_that() {
    let plyd = Plyd::start();
    load(&plyd, &image());
    let pack = stored(&plyd, "packs").remove(0);
    let mut bytes = fs::read(&pack).unwrap();
    // An incompatible feature, with the sum of such a header.
    bytes[32] = 4;
    let sum = blake3::hash(&bytes[..56]);
    bytes[56..64].copy_from_slice(&sum.as_bytes()[..8]);
    fs::write(&pack, &bytes).unwrap();
    let repaired = repair(&plyd, &image());
    assert_eq!(repaired.code, 1);
    let told = format!(
        "left: {} needs a newer release of Plywood: it uses the features 0x4, which this one does not know; have the newer release repair it",
        pack.display()
    );
    assert!(repaired.stdout.contains(&told), "{}", repaired.stdout);
    // What it had came from the archive.
    assert!(
        repaired.stdout.contains(" 1 pack left"),
        "{}",
        repaired.stdout
    );
    assert!(fs::read(&pack).unwrap() == bytes);
}

#[test]
fn a_mount_reads_what_it_could_not_read_before() {
    let plyd = Plyd::start();
    let image = image();
    load(&plyd, &image);
    plyd.ok(["snapshot", "view", "look", "whole"]);
    let mnt = mount(&plyd, "look");
    flip(&stored(&plyd, "packs")[0], 5000);
    flip(&stored(&plyd, "objects")[0], 5000);
    for name in ["small", "large"] {
        let error = fs::read(mnt.join(name)).unwrap_err();
        assert_eq!(error.raw_os_error(), Some(libc::EIO), "{name}");
    }
    let damaged = || {
        let snapshot = plyd.json(["snapshot", "info", "look", "--json"]);
        let system = plyd.json(["system", "info", "--json"]);
        assert_eq!(snapshot["damaged_contents"], system["damaged_contents"]);
        assert_eq!(
            system["damaged_mounts"],
            u64::from(system["damaged_contents"] != 0)
        );
        system["damaged_contents"].as_u64().unwrap()
    };
    assert_eq!(damaged(), 2);
    let info = plyd.ok(["system", "info"]);
    assert!(
        info.contains("2 contents in 1 mount; `snapctl system repair`"),
        "{info}"
    );
    // What is damaged is named with layer, path and object.
    let id = plyd.json(["snapshot", "info", "look", "--json"])["id"].clone();
    let log = plyd
        .state()
        .join("mounts")
        .join(id.as_str().unwrap())
        .join("plyfs.log");
    let log = fs::read_to_string(log).unwrap();
    let layer = plyd.ok(["layer", "ls", "-q"]);
    for (name, bytes) in [
        ("small", noise(1, 40 << 10)),
        ("large", noise(2, 300 << 10)),
    ] {
        let object = plywood::store::ObjectName::of(&bytes).to_string();
        let told = log.lines().any(|line| {
            let words = [&*format!("/{name} of the layer"), layer.trim(), &object];
            words.iter().all(|word| line.contains(word))
        });
        assert!(told, "{name}: {log}");
    }
    assert_eq!(repair(&plyd, &image).code, 0);
    assert!(fs::read(mnt.join("small")).unwrap() == noise(1, 40 << 10));
    assert!(fs::read(mnt.join("large")).unwrap() == noise(2, 300 << 10));
    assert_eq!(damaged(), 0);
    plyd.umount(&mnt);
}

/// One content that was gone kept all of the image from being mounted.
#[test]
fn what_is_gone_is_missing_alone_and_comes_back_below_the_mount() {
    let mut plyd = Plyd::start();
    let image = image();
    load(&plyd, &image);
    plyd.signal(Signal::SIGTERM);
    fs::remove_file(&stored(&plyd, "packs")[0]).unwrap();
    plyd.launch();
    plyd.ok(["snapshot", "view", "look", "whole"]);
    let mnt = plyd.dir().join("mnt");
    fs::create_dir(&mnt).unwrap();
    plyd.ok(["mount", "look", mnt.to_str().unwrap()]);
    assert_eq!(fs::metadata(mnt.join("small")).unwrap().len(), 40 << 10);
    let error = fs::read(mnt.join("small")).unwrap_err();
    assert_eq!(error.raw_os_error(), Some(libc::EIO));
    assert!(fs::read(mnt.join("large")).unwrap() == noise(2, 300 << 10));
    let info = plyd.json(["snapshot", "info", "look", "--json"]);
    assert_eq!(info["damaged_contents"], 1);
    assert!(
        plyd.log()
            .contains("contents of a view are not in the store")
    );

    assert_eq!(repair(&plyd, &image).code, 0);
    assert!(fs::read(mnt.join("small")).unwrap() == noise(1, 40 << 10));
    plyd.umount(&mnt);
}

#[test]
fn when_contents_are_verified_is_a_setting_of_plyd() {
    for (when, unread, read) in [
        ("never", false, false),
        ("first", true, false),
        ("always", true, true),
    ] {
        let mut command = Command::new(PLYD);
        command.args(["--verify", when]);
        let plyd = Plyd::start_with(command);
        load(&plyd, &image());
        let damage = || {
            flip(&stored(&plyd, "objects")[0], 5000);
            flip(&stored(&plyd, "packs")[0], 5000);
        };
        let files = [
            ("small", noise(1, 40 << 10)),
            ("large", noise(2, 300 << 10)),
        ];
        let look = |key: &str| {
            plyd.ok(["snapshot", "view", key, "whole"]);
            mount(&plyd, key)
        };

        damage();
        let mnt = look("damaged");
        for (name, content) in &files {
            match fs::read(mnt.join(name)) {
                Ok(found) => assert!(!unread && found != *content, "{when}: {name}"),
                Err(_) => assert!(unread, "{when}: {name}"),
            }
        }
        plyd.umount(&mnt);
        damage();

        let mnt = look("sound");
        for (name, content) in &files {
            assert!(fs::read(mnt.join(name)).unwrap() == *content, "{name}");
        }
        damage();
        for (name, _) in &files {
            let found = fs::read(mnt.join(name));
            assert_eq!(found.is_err(), read, "{when}: {name}");
        }
        plyd.umount(&mnt);
    }
}

#[test]
fn loading_an_image_again_heals_it() {
    let mut plyd = Plyd::start();
    let image = image();
    load(&plyd, &image);
    // What is missing is seen at once.
    for (dir, extension) in [("layers", "tar"), ("layers", "index"), ("packs", "pack")] {
        let files = stored(&plyd, dir);
        let file = files
            .iter()
            .find(|path| path.extension().unwrap() == extension);
        fs::remove_file(file.unwrap()).unwrap();
        if dir == "packs" {
            // Which packs there are it learns at its start.
            plyd.signal(Signal::SIGTERM);
            plyd.launch();
        }
        assert_eq!(plyd.snapctl(["system", "verify"]).code, 1);
        let healed = plyd.piped(["image", "load"], &image);
        assert_eq!(healed.code, 0, "{}", healed.stderr);
        let told: Vec<_> = healed.stderr.lines().collect();
        assert!(
            matches!(told[..], [reading, restoring] if reading.starts_with("reading") && restoring.starts_with("restoring ")),
            "{told:?}"
        );
        assert_eq!(
            plyd.snapctl(["system", "verify", "--deep"]).code,
            0,
            "{extension}"
        );
    }
    // What is not what it was is once somebody has found that out.
    flip(&stored(&plyd, "objects")[0], 5000);
    load(&plyd, &image);
    assert_eq!(plyd.snapctl(["system", "verify", "--deep"]).code, 1);
    load(&plyd, &image);
    assert_eq!(plyd.snapctl(["system", "verify", "--deep"]).code, 0);
    // A layer whose record is gone, and all of which it could be made anew.
    let record = stored(&plyd, "records").remove(0);
    let of_layer = stored(&plyd, "layers").into_iter();
    let of_layer = of_layer.filter(|path| path.file_stem() == record.file_stem());
    let lost = [record.clone()].into_iter().chain(of_layer);
    assert_eq!(lost.map(|path| fs::remove_file(path).unwrap()).count(), 3);
    plyd.signal(Signal::SIGTERM);
    plyd.launch();
    assert_eq!(plyd.snapctl(["system", "verify"]).code, 1);
    let left = plyd.snapctl(["system", "repair", "--json"]);
    assert_eq!(left.code, 1);
    let left: Value = serde_json::from_str(&left.stdout).unwrap();
    assert_eq!(
        left["left"][0]["images"][0],
        "docker.io/library/whole:latest"
    );
    load(&plyd, &image);
    assert_eq!(plyd.snapctl(["system", "repair"]).code, 0);
}

#[test]
fn who_meets_damage_is_told_what_names_and_mends_it() {
    let plyd = Plyd::start();
    let layer = Layer::new()
        .dir("etc", 0o755)
        .file("etc/passwd", 0o644, &noise(1, 40 << 10));
    load(&plyd, &archive("whole", &[Blob::gzip(layer)]));
    flip(&stored(&plyd, "packs")[0], 5000);
    let run = plyd.snapctl(["run", "--rm", "whole", "/bin/true"]);
    assert_eq!(run.code, 125);
    for words in [
        "user \"root\"",
        "`snapctl system verify`",
        "`snapctl system repair`",
    ] {
        assert!(run.stderr.contains(words), "{words}: {}", run.stderr);
    }
    assert_eq!(plyd.ok(["ps", "-aq"]), "");
}

/// The advice was to remove the snapshot, which is refused as long as others build on it.
#[test]
fn what_cannot_be_mended_is_removed_with_what_builds_on_it() {
    let plyd = Plyd::start();
    for (key, parent, kib) in [("first", None, 40), ("second", Some("first"), 20)] {
        plyd.ok(["snapshot", "prepare", "work"].into_iter().chain(parent));
        let mounts = plyd.json(["snapshot", "mounts", "work", "--json"]);
        let root = Path::new(mounts[0]["source"].as_str().unwrap());
        fs::write(root.join(key), noise(kib, (kib << 10) as usize)).unwrap();
        // Not by the helper, which sees to it that nothing committed changes.
        let commit = plyd.piped(["snapshot", "commit", "work", key], b"");
        assert_eq!(commit.code, 0, "{}", commit.stderr);
    }
    plyd.ok(["snapshot", "prepare", "third", "second"]);
    plyd.ok(["snapshot", "view", "aside", "first"]);
    let advice = || {
        let left = plyd.snapctl(["system", "repair", "--json"]);
        assert_eq!(left.code, 1, "{}", left.stderr);
        let left: Value = serde_json::from_str(&left.stdout).unwrap();
        left["left"][0]["advice"].as_str().unwrap().to_owned()
    };
    flip(&stored(&plyd, "packs")[0], 5000);
    let told = advice();
    assert!(
        told.contains("remove them in this order: aside, third, second, then"),
        "{told}"
    );
    for key in ["aside", "third", "second"] {
        plyd.ok(["snapshot", "rm", key]);
    }
    let told = advice();
    assert!(
        told.ends_with("remove the snapshot and make it again"),
        "{told}"
    );
    plyd.ok(["snapshot", "rm", "first"]);
    assert_eq!(plyd.snapctl(["system", "repair"]).code, 0);
}

/// As a disk that was full, or a copy that broke off, leaves them; only reading found out.
#[test]
fn what_is_too_short_is_missed_without_reading_contents() {
    let plyd = Plyd::start();
    let image = image();
    load(&plyd, &image);
    for of in ["objects", "packs"] {
        let path = stored(&plyd, of).remove(0);
        let file = fs::File::options().write(true).open(&path).unwrap();
        file.set_len(if of == "packs" { 300 } else { 0 }).unwrap();
        let verified = plyd.snapctl(["system", "verify"]);
        assert_eq!(verified.code, 1, "{of}: {}", verified.stdout);
        let told = "is damaged: it is too short to have";
        assert!(verified.stdout.contains(told), "{of}: {}", verified.stdout);
        assert_eq!(repair(&plyd, &image).code, 0, "{of}");
        let verified = plyd.snapctl(["system", "verify", "--deep"]);
        assert_eq!(verified.code, 0, "{of}: {}", verified.stdout);
    }
}

/// It said that all was there, as it knew of the file from before.
#[test]
fn what_is_gone_is_missed_without_reading_contents() {
    let plyd = Plyd::start();
    let image = image();
    load(&plyd, &image);
    for of in ["objects", "packs"] {
        fs::remove_file(&stored(&plyd, of)[0]).unwrap();
        let verified = plyd.snapctl(["system", "verify"]);
        assert_eq!(verified.code, 1, "{of}: {}", verified.stdout);
        assert!(
            verified.stdout.contains("No such file or directory"),
            "{of}: {}",
            verified.stdout
        );
        load(&plyd, &image);
        let verified = plyd.snapctl(["system", "verify", "--deep"]);
        assert_eq!(verified.code, 0, "{of}: {}", verified.stdout);
    }
}
