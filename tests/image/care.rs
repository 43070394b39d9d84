//! What an administrator asks of the layer store: what it takes, and to mend it.

use std::fs;
use std::path::Path;
use std::process::Command;

use serde_json::Value;

use super::archive::*;
use super::common::Plyd;

/// Bytes that no compression makes fewer.
fn noise(seed: u64, bytes: usize) -> Vec<u8> {
    let mut state = seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1;
    let words = std::iter::repeat_with(|| {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        state.to_le_bytes()
    });
    words.flatten().take(bytes).collect()
}

fn load(plyd: &Plyd, image: &[u8]) {
    let loaded = plyd.piped(["image", "load", "-q"], image);
    assert_eq!(loaded.code, 0, "{}", loaded.stderr);
}

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

fn user<'a>(df: &'a Value, kind: &str, name: &str) -> &'a Value {
    let users = df["users"].as_array().unwrap().iter();
    let mut found = users.filter(|user| {
        user["kind"] == kind && user["name"].as_str().unwrap_or_default().contains(name)
    });
    found
        .next()
        .unwrap_or_else(|| panic!("{kind} {name}: {df:#}"))
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
    plyd.ok(["umount", dir]);
    plyd.ok(["snapshot", "commit", "work", "done"]);
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
