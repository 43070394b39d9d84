//! What `system df` says of what the store takes.

use std::fs::{self, File};
use std::os::unix::fs::FileExt;
use std::path::Path;
use std::process::Command;

use nix::sys::signal::Signal;
use serde_json::Value;

use super::archive::*;
use super::common::Plyd;
use super::damage::{break_record, files, flip, image, load, mount, parse};

const LARGE: usize = 3 << 20;
const SMALL: usize = 100_000;

fn du(dir: &Path) -> u64 {
    let du = Command::new("du")
        .args(["-sx", "--block-size=1"])
        .arg(dir)
        .output()
        .unwrap();
    let text = String::from_utf8(du.stdout).unwrap();
    text.split_whitespace().next().unwrap().parse().unwrap()
}

/// What `system df` says, which is what du says.
fn df(plyd: &Plyd) -> Value {
    let df = plyd.json(["system", "df", "--json"]);
    let users = df["users"].as_array().unwrap();
    let number = |value: &Value| value.as_u64().unwrap();
    let sum: u64 = users.iter().map(|user| number(&user["on_disk"])).sum();
    assert_eq!(sum, number(&df["total"]));
    assert_eq!(sum, du(&plyd.root()), "{df:#}");
    for user in users.iter().filter(|user| !user["unique"].is_null()) {
        assert!(
            number(&user["unique"]) <= number(&user["on_disk"]),
            "{user}"
        );
    }
    df
}

fn find<'a>(df: &'a Value, kind: &str, name: &str) -> Option<&'a Value> {
    let mut users = df["users"].as_array().unwrap().iter();
    users.find(|user| {
        user["kind"] == kind && user["name"].as_str().unwrap_or_default().contains(name)
    })
}

fn user<'a>(df: &'a Value, kind: &str, name: &str) -> &'a Value {
    find(df, kind, name).unwrap_or_else(|| panic!("{kind} {name}: {df:#}"))
}

#[test]
fn what_everything_takes_adds_up_to_what_du_says() {
    let plyd = Plyd::start();
    df(&plyd);
    let shared = noise(1, 40 << 10);
    let large = noise(2, 300 << 10);
    let base = || Layer::new().file("base", 0o644, &noise(3, 100 << 10));
    let own = |name: &str, seed, bytes| {
        Layer::new()
            .file(name, 0o644, &noise(seed, bytes))
            .file("shared", 0o644, &shared)
            .file("large", 0o644, &large)
    };
    let image = |name: &str, top: Layer| archive(name, &[Blob::gzip(base()), Blob::gzip(top)]);
    // The second one's contents that the first has, too, are in the first one's pack.
    load(&plyd, &image("first", own("one", 4, 30 << 10)));
    load(&plyd, &image("second", own("two", 5, 60 << 10)));
    let two = df(&plyd);
    let bytes = |user: &Value, what: &str| user[what].as_u64().unwrap() >> 10;
    let (first, second) = (user(&two, "image", "first"), user(&two, "image", "second"));
    assert_eq!(bytes(first, "logical"), 100 + 30 + 40 + 300);
    assert_eq!(bytes(second, "logical"), 100 + 60 + 40 + 300);
    assert!((30..45).contains(&bytes(first, "unique")), "{first}");
    assert!((60..75).contains(&bytes(second, "unique")), "{second}");
    let half = (100 + 40 + 300) / 2;
    assert!(
        (half + 30..half + 55).contains(&bytes(first, "on_disk")),
        "{first}"
    );

    // A snapshot that is written to and mounted, and a committed one.
    let mnt = plyd.dir().join("mnt");
    fs::create_dir(&mnt).unwrap();
    let dir = mnt.to_str().unwrap();
    plyd.ok(["snapshot", "prepare", "work", "first"]);
    plyd.ok(["mount", "work", dir]);
    fs::write(mnt.join("data"), noise(6, 200 << 10)).unwrap();
    fs::remove_file(mnt.join("large")).unwrap();
    fs::hard_link(mnt.join("data"), mnt.join("again")).unwrap();
    assert!(Command::new("sync").status().unwrap().success());
    let active = df(&plyd);
    let work = user(&active, "snapshot", "work");
    assert_eq!(bytes(work, "logical"), 100 + 30 + 40 + 200);
    assert!((200..250).contains(&bytes(work, "unique")), "{work}");
    // Nothing comes free of an image that a snapshot stands on.
    assert_eq!(user(&active, "image", "first")["unique"], 0);
    plyd.umount(dir);
    // Not by the helper, which sees to it that nobody reads the layer in a way that moves its access times, as du does.
    let commit = plyd.piped(["snapshot", "commit", "work", "done"], b"");
    assert_eq!(commit.code, 0, "{}", commit.stderr);
    plyd.ok(["snapshot", "prepare", "next", "done"]);
    let committed = df(&plyd);
    let done = user(&committed, "snapshot", "done");
    assert_eq!(bytes(done, "logical"), 100 + 30 + 40 + 200);
    assert_eq!(done["unique"], 0, "{done}");
    assert_eq!(bytes(user(&committed, "snapshot", "next"), "logical"), 370);

    // What is dead in a pack that lives on, and what awaits collection.
    for key in ["next", "done"] {
        plyd.ok(["snapshot", "rm", key]);
    }
    plyd.ok(["image", "rm", "first"]);
    plyd.ok(["system", "gc"]);
    let left = df(&plyd);
    let dead = bytes(user(&left, "uncollected", ""), "on_disk");
    assert!((30..40).contains(&dead), "{left:#}");
    let orphan = plyd.root().join("store/objects/00").join("0".repeat(64));
    fs::create_dir_all(orphan.parent().unwrap()).unwrap();
    fs::write(&orphan, noise(7, 64 << 10)).unwrap();
    let dead = bytes(user(&df(&plyd), "uncollected", ""), "on_disk");
    assert!((94..110).contains(&dead), "{dead}");

    let table = plyd.ok(["system", "df"]);
    let words = |line: &str| -> Vec<String> {
        let words = line.split("  ").map(str::trim);
        words
            .filter(|word| !word.is_empty())
            .map(str::to_owned)
            .collect()
    };
    let lines: Vec<_> = table.lines().map(words).collect();
    assert_eq!(lines[0], ["KIND", "NAME", "LOGICAL", "UNIQUE", "ON DISK"]);
    assert_eq!(lines.last().unwrap()[0], "total");
    let total = plyd.ok(["system", "df", "-q"]);
    assert_eq!(total.trim(), du(&plyd.root()).to_string());
}

/// Its figures were guesses, and nothing said so.
#[test]
fn what_damage_hides_of_the_space_is_not_guessed() {
    let plyd = Plyd::start();
    load(&plyd, &image("whole"));
    let other = Layer::new().file("other", 0o644, &noise(5, 30 << 10));
    load(&plyd, &archive("other", &[Blob::gzip(other)]));
    plyd.ok(["snapshot", "prepare", "work", "whole"]);
    let mnt = mount(&plyd, "work");
    fs::write(mnt.join("data"), noise(6, 100 << 10)).unwrap();
    plyd.umount(&mnt);
    let sound = plyd.json(["system", "df", "--json"]);
    assert_eq!(sound["problems"], serde_json::json!([]));
    let row =
        |df: &Value, kind: &str, name: &str| find(df, kind, name).cloned().unwrap_or_default();
    assert!(row(&sound, "undivided", "").is_null(), "{sound:#}");
    let index = files(&plyd, "store/layers", ".index");
    let layers = plyd.json(["snapshot", "info", "work", "--json"])["packed_layers"].clone();
    let top = layers[0].as_str().unwrap();
    let index = index
        .iter()
        .find(|path| path.to_str().unwrap().contains(top));
    let index = index.unwrap();
    flip(index, 100);
    let df = plyd.snapctl(["system", "df", "--json"]);
    assert_eq!(df.code, 1);
    let why = format!(
        "snapctl: which contents the layer {top} has cannot be told: {} is damaged: ",
        index.display()
    );
    assert!(df.stderr.contains(&why), "{}", df.stderr);
    assert!(
        df.stderr
            .ends_with("; `snapctl system repair` mends it, or says what to do\n")
    );
    let hidden = parse(&df);
    assert_eq!(
        hidden["problems"].as_array().unwrap().len(),
        1,
        "{hidden:#}"
    );
    // Which of these has what the layer has, too, nobody can say.
    for name in ["whole", "other"] {
        let image = row(&hidden, "image", name);
        assert!(
            image["unique"].is_null() && image["on_disk"].is_null(),
            "{image}"
        );
    }
    let logical = |df: &Value, kind: &str, name: &str| row(df, kind, name)["logical"].clone();
    assert_eq!(
        logical(&hidden, "image", "other"),
        logical(&sound, "image", "other")
    );
    assert!(
        row(&hidden, "uncollected", "")["on_disk"].is_null(),
        "{hidden:#}"
    );
    // What was written is its own.
    let work = row(&hidden, "snapshot", "work");
    assert_eq!(work["unique"], row(&sound, "snapshot", "work")["unique"]);
    let users = hidden["users"].as_array().unwrap();
    let known = users.iter().filter_map(|user| user["on_disk"].as_u64());
    assert_eq!(known.sum::<u64>(), hidden["total"].as_u64().unwrap());
    assert_eq!(hidden["total"], sound["total"]);
    let table = plyd.snapctl(["system", "df"]);
    assert_eq!(table.code, 1);
    let line = table
        .stdout
        .lines()
        .find(|line| line.contains("library/other"));
    let words: Vec<_> = line.unwrap().split_whitespace().collect();
    assert_eq!(words[words.len() - 2..], ["?", "?"]);
    let total = plyd.snapctl(["system", "df", "-q"]);
    assert_eq!(
        (total.code, total.stdout.trim()),
        (1, &*sound["total"].to_string())
    );
    flip(index, 100);

    // A record says which layers there are; without it the same holds.
    let id = plyd.json(["snapshot", "info", "work", "--json"])["id"].clone();
    let record = format!("snapshots/records/{}.record", id.as_str().unwrap());
    let record = plyd.root().join(record);
    let good = break_record(&record);
    let df = plyd.snapctl(["system", "df", "--json"]);
    assert_eq!(df.code, 1);
    let why = "which layers the snapshot work has cannot be told: the record ";
    assert!(df.stderr.contains(why), "{}", df.stderr);
    assert!(row(&parse(&df), "image", "other")["unique"].is_null());
    fs::write(&record, good).unwrap();
    // The record of a layer says nothing that the index does not.
    for record in files(&plyd, "store/records", ".record") {
        break_record(&record);
    }
    assert_eq!(plyd.json(["system", "df", "--json"]), sound);
    plyd.ok(["system", "repair"]);
}

/// One byte that was written to a large file of an image once hid what the snapshot takes, and made the command fail, until
/// somebody mounted the snapshot anew.
/// There was a `?` that nothing explained, and the exit code was 0.
#[test]
fn an_image_without_the_record_of_a_layer_is_named() {
    let mut plyd = Plyd::start();
    load(&plyd, &image("whole"));
    let records = files(&plyd, "snapshots/records", ".record");
    let is_top = |path: &&std::path::PathBuf| {
        !fs::read_to_string(path)
            .unwrap()
            .contains("\"parent\":null")
    };
    let top = records.iter().find(is_top).unwrap();
    plyd.signal(Signal::SIGTERM);
    fs::remove_file(top).unwrap();
    plyd.launch();
    let df = plyd.snapctl(["system", "df"]);
    assert_eq!(df.code, 1, "{}", df.stdout);
    let said = "the tree of the image docker.io/library/whole:latest cannot be counted: records of its layers are gone; load it again";
    assert!(df.stderr.contains(said), "{}", df.stderr);
    load(&plyd, &image("whole"));
    plyd.ok(["system", "df"]);
}

#[test]
fn a_file_that_is_copied_up_in_part_counts_as_the_mount_shows_it() {
    let mut plyd = Plyd::start();
    let layer = Layer::new()
        .file("large", 0o644, &noise(1, LARGE))
        .file("other", 0o644, &noise(2, LARGE))
        .file("small", 0o644, &noise(3, SMALL));
    load(&plyd, &archive("image", &[Blob::gzip(layer)]));
    let mnt = plyd.dir().join("mnt");
    fs::create_dir(&mnt).unwrap();
    let dir = mnt.to_str().unwrap().to_owned();
    plyd.ok(["snapshot", "prepare", "work", "image"]);
    plyd.ok(["mount", "work", &dir]);
    let open = |name: &str| File::options().write(true).open(mnt.join(name)).unwrap();
    let upper = plyd.json(["snapshot", "info", "work", "--json"])["upper_dir"].clone();
    let upper = upper.as_str().unwrap().to_owned();
    let check = |plyd: &Plyd, sizes: &[usize]| {
        let mark = xattr::get(Path::new(&upper).join("large"), "trusted.overlay.metacopy");
        assert_eq!(mark.unwrap().unwrap()[0], b'P');
        // The host may find room for it only now.
        rustix::fs::syncfs(File::open(&upper).unwrap()).unwrap();
        let df = df(plyd);
        let work = user(&df, "snapshot", "work");
        assert_eq!(work["logical"], sizes.iter().sum::<usize>(), "{df:#}");
        assert!(work["unique"].as_u64().unwrap() < 1 << 20, "{df:#}");
    };

    open("large").write_all_at(b"x", 2_000_000).unwrap();
    check(&plyd, &[LARGE, LARGE, SMALL]);
    // Longer than before, by a hole, and shorter.
    open("large").set_len(5 << 20).unwrap();
    open("other").write_all_at(b"x", 100).unwrap();
    open("other").set_len(2 << 20).unwrap();
    check(&plyd, &[5 << 20, 2 << 20, SMALL]);
    // All of the tree is counted then.
    fs::hard_link(mnt.join("small"), mnt.join("again")).unwrap();
    fs::rename(mnt.join("other"), mnt.join("moved")).unwrap();
    check(&plyd, &[5 << 20, 2 << 20, SMALL]);
    plyd.umount(&dir);
    check(&plyd, &[5 << 20, 2 << 20, SMALL]);
    plyd.signal(Signal::SIGTERM);
    plyd.launch();
    check(&plyd, &[5 << 20, 2 << 20, SMALL]);
}
