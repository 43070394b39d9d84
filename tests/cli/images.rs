//! `snapctl image`.

use std::fs;
use std::process::Command;

use nix::sys::signal::Signal;

use crate::common::{BUSYBOX, Plyd, busybox_archive};

/// Unpacks the archive to an OCI layout directory below `plyd`'s.
fn layout(plyd: &Plyd) -> std::path::PathBuf {
    let dir = plyd.dir().join("layout");
    fs::create_dir(&dir).unwrap();
    let mut tar = Command::new("tar");
    tar.arg("-xf").arg(busybox_archive()).arg("-C").arg(&dir);
    assert!(tar.status().unwrap().success());
    dir
}

#[test]
fn an_image_comes_from_a_file_a_directory_or_stdin() {
    let plyd = Plyd::start();
    let archive = busybox_archive().to_str().unwrap();
    let from_file = plyd.snapctl([
        "image",
        "load",
        "-i",
        archive,
        "--name",
        "example.org/file:1",
    ]);
    assert_eq!(from_file.code, 0, "{}", from_file.stderr);
    assert!(
        from_file.stdout.starts_with("loaded example.org/file:1 ("),
        "{}",
        from_file.stdout
    );
    // Not a terminal: progress is plain lines.
    assert!(from_file.stderr.lines().count() > 0 && !from_file.stderr.contains('\x1b'));

    let id = plyd.ok(["image", "ls", "-q"]);
    let dir = layout(&plyd);
    let from_dir = [
        "image",
        "load",
        "-q",
        "-i",
        dir.to_str().unwrap(),
        "--name",
        "example.org/dir:1",
    ];
    assert_eq!(plyd.ok(from_dir), id);
    let stdin = plyd.piped(["image", "load", "--json"], &fs::read(archive).unwrap());
    assert_eq!(stdin.code, 0, "{}", stdin.stderr);
    let loaded: serde_json::Value = serde_json::from_str(&stdin.stdout).unwrap();
    assert_eq!(loaded[0]["id"], id.trim_end());
    let names = loaded[0]["names"].as_array().unwrap();
    assert!(names.iter().any(|name| name == BUSYBOX), "{loaded}");
    assert_eq!(names.len(), 3, "{loaded}");
}

#[test]
fn images_are_listed_inspected_and_removed() {
    let plyd = Plyd::start();
    assert_eq!(plyd.ok(["image", "ls", "-q"]), "");
    plyd.load_busybox();
    let list = plyd.json(["image", "ls", "--json"]);
    let image = &list[0];
    let mut fields: Vec<&str> = image
        .as_object()
        .unwrap()
        .keys()
        .map(String::as_str)
        .collect();
    fields.sort_unstable();
    let documented = [
        "architecture",
        "chain_id",
        "created",
        "diff_ids",
        "id",
        "manifest_digest",
        "names",
        "os",
        "size",
    ];
    assert_eq!(fields, documented);
    assert_eq!(image["diff_ids"].as_array().unwrap().len(), 2);
    assert_eq!(image["os"], "linux");
    assert!(image["size"].as_u64() > Some(500_000), "{image}");
    let id = image["id"].as_str().unwrap();
    assert_eq!(id.len(), 64);

    let whole = plyd.ok(["image", "ls", "--no-trunc"]);
    assert!(whole.contains(id), "{whole}");
    let table = plyd.ok(["image", "ls"]);
    let lines: Vec<Vec<&str>> = table
        .lines()
        .map(|l| l.split_whitespace().collect())
        .collect();
    assert_eq!(lines[0], ["NAME", "ID", "LAYERS", "CREATED", "SIZE"]);
    assert_eq!(lines[1][..3], [BUSYBOX, &id[..12], "2"]);

    let inspected = plyd.json(["image", "inspect", BUSYBOX, &id[..12]]);
    assert_eq!(inspected[0]["config"]["config"]["Cmd"][0], "/bin/sh");
    assert_eq!(inspected[1]["manifest"]["schemaVersion"], 2);
    assert_eq!(inspected[0]["id"], inspected[1]["id"]);

    plyd.ok(["create", "--name", "user", BUSYBOX]);
    let used = plyd.snapctl(["image", "rm", BUSYBOX]);
    assert_eq!(
        (used.code, used.stdout.as_str()),
        (1, ""),
        "{}",
        used.stderr
    );
    let told = format!("the image \"{BUSYBOX}\" is used by the container user; remove");
    assert!(used.stderr.contains(&told), "{}", used.stderr);
    for name in ["another", "third"] {
        plyd.ok(["create", "--name", name, BUSYBOX]);
    }
    let used = plyd.snapctl(["image", "rm", BUSYBOX]);
    assert!(
        used.stderr
            .contains("is used by the containers another, third and user; remove"),
        "{}",
        used.stderr
    );
    plyd.ok(["rm", "user", "another", "third"]);
    let removed = plyd.ok(["image", "rm", BUSYBOX]);
    assert_eq!(removed, format!("untagged {BUSYBOX}\nremoved {id}\n"));
    assert_eq!(plyd.ok(["image", "ls", "-q"]), "");
    assert_eq!(plyd.ok(["snapshot", "ls", "-q"]), "");
}

#[test]
fn an_image_has_a_row_for_each_of_its_names() {
    let plyd = Plyd::start();
    plyd.load_busybox();
    let archive = busybox_archive().to_str().unwrap();
    let load = |name: &str| plyd.ok(["image", "load", "-i", archive, "--name", name]);
    let id = plyd.ok(["image", "ls", "-q"]);
    let id = id.trim_end();
    let line = |name: &str| format!("loaded {name} ({})\n", &id[..12]);
    // Only what is new is told.
    assert_eq!(load("example.org/a:1"), line("example.org/a:1"));
    assert_eq!(load("other"), line("docker.io/library/other:latest"));
    let table = plyd.ok(["image", "ls"]);
    let rows: Vec<Vec<&str>> = table
        .lines()
        .skip(1)
        .map(|line| line.split_whitespace().take(2).collect())
        .collect();
    let short = &id[..12];
    assert_eq!(
        rows,
        [
            ["docker.io/library/other:latest", short],
            ["example.org/a:1", short],
            [BUSYBOX, short]
        ],
        "{table}"
    );
    assert_eq!(plyd.ok(["image", "ls", "-q"]).lines().count(), 1);
    let json = plyd.json(["image", "ls", "--json"]);
    assert_eq!(json.as_array().unwrap().len(), 1);
    assert_eq!(json[0]["names"].as_array().unwrap().len(), 3);
    let removed = plyd.json(["image", "rm", "--json", "other"]);
    let untagged = serde_json::json!(["docker.io/library/other:latest"]);
    assert_eq!(
        removed,
        serde_json::json!({"untagged": untagged, "removed": []})
    );
}

#[test]
fn too_few_digits_of_an_id_are_told_how_many_are_needed() {
    let plyd = Plyd::start();
    plyd.load_busybox();
    let id = plyd.ok(["image", "ls", "-q"]);
    plyd.ok(["image", "inspect", &id[..4]]);
    let short = plyd.snapctl(["image", "inspect", &id[..3]]);
    assert_eq!(short.code, 1);
    assert!(
        short.stderr.contains("by 4 of its digits"),
        "{}",
        short.stderr
    );
}

#[test]
fn what_follows_the_end_of_an_archive_is_passed_over() {
    let plyd = Plyd::start();
    let mut archive = fs::read(busybox_archive()).unwrap();
    archive.extend((0..1000_u32).map(|i| (i * 7 % 251) as u8));
    let done = plyd.piped(["image", "load", "-q"], &archive);
    assert_eq!(done.code, 0, "{}", done.stderr);
}

/// Who wants to repair from an archive was told how to load one from stdin, which is another thing there.
#[test]
fn an_archive_that_is_not_there_is_told_with_what_may_be_given() {
    let plyd = Plyd::start();
    for command in [["image", "load"], ["system", "repair"]] {
        let done = plyd.snapctl(command.into_iter().chain(["-i", "/no/such/archive"]));
        assert_eq!((done.code, &*done.stdout), (1, ""), "{command:?}");
        let end =
            "name an image archive with -i, or the directory of an OCI layout, or - for stdin\n";
        assert!(done.stderr.ends_with(end), "{}", done.stderr);
    }
}

#[test]
fn what_is_no_image_is_refused_and_leaves_nothing() {
    let plyd = Plyd::start();
    let dir = layout(&plyd);
    let truncated = plyd.dir().join("truncated.tar");
    let bytes = fs::read(busybox_archive()).unwrap();
    fs::write(&truncated, &bytes[..bytes.len() / 2]).unwrap();
    let no_layout = plyd.dir().join("no-layout");
    fs::create_dir(&no_layout).unwrap();
    // A blob that is not what its name says.
    let blobs = dir.join("blobs/sha256");
    let largest = fs::read_dir(&blobs)
        .unwrap()
        .flatten()
        .max_by_key(|e| e.metadata().unwrap().len());
    let largest = largest.unwrap().path();
    let mut blob = fs::read(&largest).unwrap();
    let middle = blob.len() / 2;
    blob[middle] ^= 1;
    fs::write(&largest, blob).unwrap();
    let digest = largest.file_name().unwrap().to_str().unwrap();
    // One that is not there.
    let missing = plyd.dir().join("missing");
    let copied = Command::new("cp").arg("-r").args([&dir, &missing]).status();
    assert!(copied.unwrap().success());
    fs::remove_file(missing.join("blobs/sha256").join(digest)).unwrap();

    for (path, code, words) in [
        ("/no/such/archive", 1, "cannot open /no/such/archive"),
        (
            no_layout.to_str().unwrap(),
            1,
            "is not the directory of an OCI image layout",
        ),
        ("/dev/null", 1, "this is no image archive, for it is empty"),
        (
            "/etc/passwd",
            1,
            "this is no image archive, for it does not begin as a tar does; one is a tar of an \
             OCI layout or of `docker save`",
        ),
        (truncated.to_str().unwrap(), 1, "ends within"),
        (dir.to_str().unwrap(), 1, digest),
        (missing.to_str().unwrap(), 1, digest),
    ] {
        let done = plyd.snapctl(["image", "load", "-i", path]);
        assert_eq!(
            (done.code, done.stdout.as_str()),
            (code, ""),
            "{path}: {}",
            done.stderr
        );
        let last = done.stderr.lines().last().unwrap();
        assert!(
            last.starts_with("snapctl: ") && last.contains(words),
            "{path}: {last}"
        );
    }
    let garbage = plyd.piped(["image", "load"], &[b'x'; 100_000]);
    assert_eq!(garbage.code, 1, "{}", garbage.stderr);
    assert_eq!(plyd.ok(["image", "ls", "-q"]), "");
    assert_eq!(plyd.ok(["snapshot", "ls", "-q"]), "");
    let none = plyd.snapctl(["image", "inspect", "nope"]);
    assert_eq!((none.code, none.stdout.as_str()), (1, "[]\n"));
}

#[test]
fn an_image_whose_record_is_damaged_is_told_by_name_and_id() {
    let mut plyd = Plyd::start();
    plyd.load_busybox();
    let id = plyd.json(["image", "inspect", BUSYBOX])[0]["id"]
        .as_str()
        .unwrap()
        .to_owned();
    let names = plyd.root().join("images/names");
    let of_name = fs::read_dir(&names).unwrap().next().unwrap().unwrap();
    let of_image = plyd.root().join(format!("images/records/{id}.record"));
    for (record, references) in [
        (of_image, vec![BUSYBOX, "localhost/busybox", &id, &id[..12]]),
        (of_name.path(), vec![BUSYBOX]),
    ] {
        plyd.signal(Signal::SIGTERM);
        let sound = fs::read(&record).unwrap();
        fs::write(&record, &sound[..sound.len() / 2]).unwrap();
        plyd.launch();
        let path = record.to_str().unwrap();
        for reference in references {
            let done = plyd.snapctl(["image", "inspect", reference]);
            let told = &done.stderr;
            assert_eq!(done.code, 1, "{told}");
            assert!(told.contains(path) && told.contains("restore it"), "{told}");
            assert!(!told.contains("there is no image"), "{reference}: {told}");
        }
        let other = plyd.snapctl(["image", "rm", "other"]);
        assert!(
            other.stderr.contains("there is no image"),
            "{}",
            other.stderr
        );
        assert!(other.stderr.contains(path), "{}", other.stderr);
        // Loaded again it is whole again, without a restart.
        plyd.load_busybox();
        plyd.ok(["image", "inspect", BUSYBOX]);
    }
}
