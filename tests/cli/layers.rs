//! `snapctl layer`.

use std::fs;
use std::os::unix::fs::{FileExt, PermissionsExt};
use std::path::PathBuf;
use std::process::{Command, Stdio};

use sha2::{Digest, Sha256};

use crate::common::{BUSYBOX, Plyd, busybox_archive};

fn names(plyd: &Plyd) -> Vec<String> {
    let names = plyd.ok(["layer", "ls", "-q"]);
    names.lines().map(str::to_owned).collect()
}

fn files(dir: PathBuf) -> Vec<PathBuf> {
    let entries = fs::read_dir(dir).unwrap();
    entries.map(|entry| entry.unwrap().path()).collect()
}

#[test]
fn layers_are_listed_with_their_users() {
    let plyd = Plyd::start();
    assert_eq!(plyd.ok(["layer", "ls", "-q"]), "");
    plyd.load_busybox();
    let list = plyd.json(["layer", "ls", "--json"]);
    let mut fields: Vec<&str> = list[0]
        .as_object()
        .unwrap()
        .keys()
        .map(String::as_str)
        .collect();
    fields.sort_unstable();
    let documented = [
        "blob",
        "content_bytes",
        "diff_id",
        "entries",
        "images",
        "index_bytes",
        "kept_by",
        "name",
        "objects",
        "snapshots",
        "tar_bytes",
    ];
    assert_eq!(fields, documented);
    let image = &plyd.json(["image", "inspect", BUSYBOX])[0];
    let mut expected: Vec<_> = image["diff_ids"].as_array().unwrap().iter().collect();
    let mut found: Vec<_> = list.as_array().unwrap().iter().collect();
    expected.sort_by_key(|id| id.to_string());
    found.sort_by_key(|layer| layer["diff_id"].to_string());
    for (layer, diff_id) in found.iter().zip(expected) {
        assert_eq!(&layer["diff_id"], diff_id);
        assert_eq!(layer["images"][0], BUSYBOX);
        assert_eq!(layer["snapshots"][0]["owner"], "image");
    }
    let table = plyd.ok(["layer", "ls"]);
    let mut lines = table.lines();
    let header: Vec<_> = lines.next().unwrap().split("  ").map(str::trim).collect();
    let header: Vec<_> = header.into_iter().filter(|word| !word.is_empty()).collect();
    assert_eq!(
        header,
        ["NAME", "DIFF ID", "ENTRIES", "CONTENT", "INDEX", "USED BY"]
    );
    assert!(
        lines.all(|line| line.trim_end().ends_with("1 image")),
        "{table}"
    );
    let whole = plyd.ok(["layer", "ls", "--no-trunc"]);
    assert!(
        names(&plyd).iter().all(|name| whole.contains(name)),
        "{whole}"
    );
}

#[test]
fn a_layer_is_shown_by_a_prefix_or_its_diff_id_with_its_files() {
    let plyd = Plyd::start();
    plyd.load_busybox();
    let image = &plyd.json(["image", "inspect", BUSYBOX])[0];
    let top = image["diff_ids"][1].as_str().unwrap();
    let shown = plyd.json(["layer", "inspect", top, "--json", "--files"]);
    let name = shown["name"].as_str().unwrap();
    let removed = shown["files"].as_array().unwrap().iter();
    let removed: Vec<_> = removed.filter(|file| file["action"] == "remove").collect();
    assert_eq!(removed.len(), 1);
    assert_eq!(removed[0]["path"], "/etc/first-layer-only");
    assert!(removed[0]["mode"].is_null());
    let plain = plyd.ok(["layer", "inspect", &name[..8], "--files"]);
    assert!(
        plain.starts_with(&format!("name         {name}\n")),
        "{plain}"
    );
    assert!(plain.contains("drwxr-xr-x 0:0"), "{plain}");
    // Without --files none are sent.
    let record = plyd.json(["layer", "inspect", &name[..8], "--json"]);
    assert!(record.get("files").is_none());
    let none = plyd.snapctl(["layer", "inspect", "xyz"]);
    assert_eq!(none.code, 1);
    assert!(
        none.stderr.contains("`snapctl layer ls` names"),
        "{}",
        none.stderr
    );
}

/// The column of diff ids showed digits that no command took.
#[test]
fn what_the_table_shows_of_a_layer_means_it() {
    let plyd = Plyd::start();
    plyd.load_busybox();
    let table = plyd.ok(["layer", "ls"]);
    let names = names(&plyd);
    for (line, name) in table.lines().skip(1).zip(&names) {
        let mut words = line.split_whitespace();
        let [short, digits] = [words.next().unwrap(), words.next().unwrap()];
        for reference in [short, digits, &format!("sha256:{digits}")] {
            let shown = plyd.json(["layer", "inspect", reference, "--json"]);
            assert_eq!(shown["name"], **name, "{reference}");
            plyd.ok(["layer", "export", reference, "-o", "/dev/null"]);
        }
    }
}

#[test]
fn digits_that_several_layers_begin_with_are_refused() {
    let plyd = Plyd::start();
    // There are 16 digits.
    let shared = (0..17).find_map(|number: u32| {
        let key = format!("layer-{number}");
        plyd.ok(["snapshot", "prepare", "work"]);
        let mounts = plyd.json(["snapshot", "mounts", "work", "--json"]);
        let root = PathBuf::from(mounts[0]["source"].as_str().unwrap());
        fs::write(root.join("number"), &key).unwrap();
        plyd.ok(["snapshot", "commit", "work", &key]);
        let names = names(&plyd);
        let twice = names.windows(2).find(|pair| pair[0][..1] == pair[1][..1]);
        twice.map(|pair| pair[0][..1].to_owned())
    });
    let several = plyd.snapctl(["layer", "inspect", &shared.unwrap()]);
    assert_eq!((several.code, &*several.stdout), (1, ""));
    assert!(
        several
            .stderr
            .contains("fits 2 layers; give more digits of the name or the diff id"),
        "{}",
        several.stderr
    );
}

/// `-` stood there, as if nothing kept it.
#[test]
fn what_keeps_a_layer_whose_image_has_gone_is_named() {
    let plyd = Plyd::start();
    plyd.load_busybox();
    let id = plyd.ok(["create", "--name", "web", BUSYBOX, "true"]);
    plyd.ok(["snapshot", "prepare", "work", BUSYBOX]);
    plyd.ok(["snapshot", "view", "look", BUSYBOX]);
    let used_by = || {
        let table = plyd.ok(["layer", "ls"]);
        let last = table.lines().skip(1).map(|line| {
            let used_by = line.rsplit("  ").map(str::trim);
            used_by
                .into_iter()
                .find(|word| !word.is_empty())
                .unwrap()
                .to_owned()
        });
        last.collect::<Vec<_>>()
    };
    assert_eq!(used_by(), ["1 image"; 2]);
    plyd.ok(["image", "rm", "-f", BUSYBOX]);
    assert_eq!(used_by(), ["1 container, 2 snapshots"; 2]);
    for name in names(&plyd) {
        let shown = plyd.ok(["layer", "inspect", &name]);
        for line in [
            "kept by      web (container)",
            "kept by      work (snapctl)",
            "kept by      look (snapctl)",
        ] {
            assert!(shown.lines().any(|shown| shown == line), "{shown}");
        }
        let shown = plyd.json(["layer", "inspect", &name, "--json"]);
        let container =
            serde_json::json!({"owner": "container", "key": id.trim_end(), "name": "web"});
        assert_eq!(shown["kept_by"].as_array().unwrap().len(), 3);
        assert!(
            shown["kept_by"].as_array().unwrap().contains(&container),
            "{shown:#}"
        );
    }
}

#[test]
fn a_committed_layer_has_no_stream_before_it_is_exported() {
    let plyd = Plyd::start();
    plyd.ok(["snapshot", "prepare", "work"]);
    plyd.ok(["snapshot", "commit", "work", "base"]);
    let [name] = &names(&plyd)[..] else {
        panic!("one layer");
    };
    let shown = plyd.ok(["layer", "inspect", name]);
    assert!(
        shown.contains("\ntar stream   made when it is exported\n"),
        "{shown}"
    );
    assert!(
        !shown.contains("diff id") && !shown.contains("blob"),
        "{shown}"
    );
    let shown = plyd.json(["layer", "inspect", name, "--json"]);
    assert!(shown["diff_id"].is_null() && shown["blob"].is_null());
}

#[test]
fn a_layer_is_exported_bit_for_bit_or_not_at_all() {
    let plyd = Plyd::start();
    // Not by the helper, which sees to it that nobody damages what was loaded.
    let archive = fs::read(busybox_archive()).unwrap();
    assert_eq!(plyd.piped(["image", "load"], &archive).code, 0);
    let to = plyd.dir().join("layer.tar");
    let to_arg = to.to_str().unwrap();
    for name in names(&plyd) {
        let record = plyd.json(["layer", "inspect", &name, "--json"]);
        let done = plyd.snapctl(["layer", "export", &name]);
        assert_eq!(done.code, 0, "{}", done.stderr);
        let digest = format!("sha256:{:x}", Sha256::digest(&done.bytes));
        assert_eq!(digest, record["diff_id"]);
        plyd.ok(["layer", "export", &name, "-o", to_arg]);
        assert!(fs::read(&to).unwrap() == done.bytes);
        // What nobody else could read stays that.
        fs::set_permissions(&to, fs::Permissions::from_mode(0o600)).unwrap();
        plyd.ok(["layer", "export", &name, "-o", to_arg]);
        assert_eq!(
            fs::metadata(&to).unwrap().permissions().mode() & 0o7777,
            0o600
        );
    }
    let before = fs::read(&to).unwrap();
    // What reads no further is told nothing, and plyd goes on.
    let mut reader = plyd.command();
    let large = &names(&plyd)[0];
    reader
        .args(["layer", "export", large])
        .stdout(Stdio::piped());
    let mut child = reader.spawn().unwrap();
    drop(child.stdout.take());
    child.wait().unwrap();

    // A content that is not what it was: the file that was there stays, and nothing lies beside it.
    for pack in files(plyd.root().join("store/packs")) {
        let file = fs::File::options().write(true).open(pack).unwrap();
        file.write_all_at(&[0xff; 64], 130).unwrap();
    }
    for dir in files(plyd.root().join("store/objects")) {
        for object in files(dir) {
            let file = fs::File::options().write(true).open(object).unwrap();
            file.write_all_at(b"rot", 1000).unwrap();
        }
    }
    for name in names(&plyd) {
        let failed = plyd.snapctl(["layer", "export", &name, "-o", to_arg]);
        assert_eq!(failed.code, 1);
        assert!(failed.stderr.contains("damaged"), "{}", failed.stderr);
    }
    assert!(fs::read(&to).unwrap() == before);
    let beside = Command::new("ls").arg(plyd.dir()).output().unwrap();
    let beside = String::from_utf8(beside.stdout).unwrap();
    assert!(!beside.contains("partial"), "{beside}");
}
