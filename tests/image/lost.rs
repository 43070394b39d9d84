//! What containers of an image do of which small files are lost, and what is told of them.

use std::fs;

use super::archive::*;
use super::common::Plyd;
use super::damage::{files, flip, image, load, mount};
use super::told::restart;

/// An image of busybox.
fn lost() -> Vec<u8> {
    let busybox = ["/bin/busybox", "/usr/bin/busybox"].map(fs::read);
    let busybox = busybox.into_iter().find_map(Result::ok);
    let layer = Layer::new()
        .dir("bin", 0o755)
        .file(
            "bin/busybox",
            0o755,
            &busybox.expect("install busybox-static"),
        )
        .symlink("bin/sh", "busybox")
        .symlink("bin/sleep", "busybox")
        .file("bin/script", 0o755, b"#!/bin/sh\nexit 0\n")
        .dir("etc", 0o755)
        .file("etc/passwd", 0o644, b"root:x:0:0:root:/root:/bin/sh\n")
        .file("etc/group", 0o644, b"root:x:0:\n");
    archive("lost", &[Blob::gzip(layer)])
}

/// A plyd with that image, of which all small files are lost.
fn with_lost_files() -> Plyd {
    let mut plyd = Plyd::start();
    load(&plyd, &lost());
    // None is open then.
    restart(&mut plyd, |plyd| {
        for pack in files(plyd, "store/packs", ".pack") {
            fs::remove_file(pack).unwrap();
        }
    });
    plyd
}

/// It said that it could not look them up, or left that to runc, which reads the file, too.
#[test]
fn a_container_that_runs_as_numbers_starts_without_its_passwd() {
    let plyd = with_lost_files();
    let who = "echo $(busybox id -u) $(busybox id -g) $HOME; busybox wc -c </etc/passwd";
    for (user, code, words) in [
        ("0:0", 0, "0 0 /\n0\n"),
        ("7:8", 0, "7 8 /\n0\n"),
        (
            "0",
            125,
            "`-u UID:GID` needs no look-up; `snapctl system verify` names",
        ),
        ("root:0", 125, "`snapctl system repair` mends it"),
        (
            "0:root",
            125,
            "cannot open /etc/group inside the root: Input/output error",
        ),
    ] {
        let done = plyd.snapctl(["run", "--rm", "-u", user, "lost", "sh", "-c", who]);
        assert_eq!(done.code, code, "{user}: {}", done.stderr);
        let said = done.stdout + &done.stderr;
        assert!(said.contains(words), "{user}: {said}");
    }
    // What the user puts there is what is there.
    let own = plyd.dir().join("own");
    fs::create_dir(&own).unwrap();
    for name in ["passwd", "group"] {
        fs::write(own.join(name), format!("own {name}\n")).unwrap();
    }
    let cat = ["lost", "busybox", "cat", "/etc/passwd"];
    for volume in ["/etc", "/etc/passwd"] {
        let source = own.join(volume.trim_start_matches("/etc").trim_start_matches('/'));
        let volume = format!("{}:{volume}", source.display());
        let args = ["run", "--rm", "-u", "0:0", "-v", &volume];
        assert_eq!(plyd.ok(args.into_iter().chain(cat)), "own passwd\n");
    }
}

/// Its plyfs had said so in a log that went with the mount, and `system info` forgot it.
#[test]
fn what_a_container_could_not_read_is_known_after_its_end() {
    let plyd = with_lost_files();
    let ended = || plyd.json(["system", "info", "--json"])["damaged_mounts_ended"].clone();
    assert_eq!(ended(), 0);
    for times in 1..3 {
        let cat = [
            "run",
            "--rm",
            "-u",
            "0:0",
            "lost",
            "busybox",
            "cat",
            "/bin/script",
        ];
        assert_eq!(plyd.snapctl(cat).code, 1);
        assert_eq!(ended(), times);
    }
    let line = plyd
        .log()
        .lines()
        .find(|line| line.contains("/bin/script of the layer "))
        .map(str::to_owned);
    let line = line.expect("plyd's log has it");
    let objects = plyd.root().join("store/objects");
    for words in [
        " WARN ",
        "had said: ",
        &*objects.to_string_lossy(),
        "I/O error",
    ] {
        assert!(line.contains(words), "{line}");
    }
    let told = plyd.ok(["system", "info"]);
    let words = "something in 2 mounts since ended (plyd's log names it); `snapctl system repair` mends them";
    assert!(told.contains(words), "{told}");
    // What nobody could read any more is forgotten when it can be read again.
    let mended = plyd.piped(["system", "repair", "-i", "-"], &lost());
    assert_eq!(mended.code, 0, "{}", mended.stdout);
    assert_eq!(ended(), 0);
}

#[test]
fn a_program_whose_content_is_damaged_is_126_and_says_what_mends_it() {
    let plyd = with_lost_files();
    plyd.ok([
        "run", "-d", "--name", "long", "-u", "0:0", "lost", "sleep", "1000",
    ]);
    for args in [
        &["run", "--rm", "-u", "0:0", "lost", "script"][..],
        &["run", "--rm", "-d", "-u", "0:0", "lost", "/bin/script"],
        &["exec", "long", "script"],
    ] {
        let done = plyd.snapctl(args);
        assert_eq!(
            (done.code, &*done.stdout),
            (126, ""),
            "{args:?}: {}",
            done.stderr
        );
        let advice = "`snapctl system repair` mends it";
        assert!(done.stderr.contains(advice), "{args:?}: {}", done.stderr);
    }
    assert_eq!(plyd.ok(["ps", "-aq"]).lines().count(), 1);
}

/// It was documented as 126, too, though the kernel has started it then.
#[test]
fn a_program_that_is_damaged_further_on_is_ended_by_a_signal() {
    let plyd = Plyd::start();
    load(&plyd, &lost());
    let dirs = fs::read_dir(plyd.root().join("store/objects")).unwrap();
    let mut files = dirs.flat_map(|dir| fs::read_dir(dir.unwrap().path()).unwrap());
    let busybox = files.next().unwrap().unwrap().path();
    // Neither the beginning nor the data, which the kernel reads when it starts the program.
    let length = fs::metadata(&busybox).unwrap().len();
    for at in (length / 4..length / 3 * 2).step_by(8 << 10) {
        flip(&busybox, at);
    }
    let run = [
        "run",
        "--rm",
        "-u",
        "0:0",
        "lost",
        "sh",
        "-c",
        "echo $((1 + 1))",
    ];
    let done = plyd.snapctl(run);
    assert_eq!(
        (done.code, &*done.stdout),
        (128 + libc::SIGBUS, ""),
        "{done:?}"
    );
    let mended = plyd.piped(["system", "repair", "-i", "-"], &lost());
    assert_eq!(mended.code, 0, "{}", mended.stdout);
    assert_eq!(plyd.ok(run), "2\n");
}

/// There was a line for each file, of the file in `objects` that its content never was.
#[test]
fn files_that_are_lost_with_a_pack_are_told_by_few_lines_that_name_it() {
    let plyd = Plyd::start();
    load(&plyd, &image("whole"));
    plyd.ok(["snapshot", "view", "look", "whole"]);
    let mnt = mount(&plyd, "look");
    let packs = files(&plyd, "store/packs", ".pack");
    let away = |number: usize| plyd.dir().join(format!("away {number}"));
    for (number, pack) in packs.iter().enumerate() {
        fs::rename(pack, away(number)).unwrap();
    }
    let read = || {
        let paths = fs::read_dir(&mnt)
            .unwrap()
            .map(|entry| entry.unwrap().path());
        let read: Vec<_> = paths.map(|path| fs::read(path).map(drop)).collect();
        read.into_iter().filter(Result::is_err).count()
    };
    for _ in 0..2 {
        assert_eq!(read(), 301);
    }
    let log = || {
        let own = plyd.json(["snapshot", "mounts", "look", "--json"])[0]["source"].clone();
        let own = fs::canonicalize(own.as_str().unwrap()).unwrap();
        fs::read_to_string(own.with_file_name("plyfs.log")).unwrap()
    };
    let told = log();
    let failed = |told: &str| told.matches("an operation failed").count();
    // Five of one pack, the only one of the other, and one for all the rest.
    assert_eq!(failed(&told), 7, "{told}");
    for pack in &packs {
        let gone = format!(
            ": the pack {} is gone, and nothing else has the content; ",
            pack.display()
        );
        assert!(told.contains(&gone), "{told}");
    }
    let rest = " is gone, and nothing else has the contents of more files that were in it; ";
    assert_eq!(told.matches(rest).count(), 1, "{told}");
    assert!(!told.contains("/objects/"), "{told}");

    for (number, pack) in packs.iter().enumerate() {
        fs::rename(away(number), pack).unwrap();
    }
    plyd.ok(["system", "repair"]);
    assert_eq!(read(), 0);
    assert_eq!(failed(&log()), 7);
    plyd.umount(&mnt);
}
