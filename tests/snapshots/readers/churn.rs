//! A container that makes, removes, replaces and cuts what its changes consist of while they are told.
//!
//! A diff failed as soon as something was gone between the moment when it was found to be changed and its turn in the stream.

use std::fs::{self, File};
use std::os::unix::fs::{FileExt, symlink};
use std::path::Path;
use std::process::{Command, Stdio};
use std::sync::atomic::{AtomicBool, Ordering};

use plywood::store::layers::Expected;

use super::{LARGE, OWNER, Place};

/// What of the image comes and goes as a whole.
const DIRECTORIES: usize = 20;
const FILES: usize = 10;

/// What a file of a directory has in it, at whatever path it is and whenever it is written; always as long.
fn content(directory: usize, file: &str) -> String {
    format!("{:<20}", format!("{file} of {directory}"))
}

/// Holds what a layer has of files to being theirs, and counts them. One that was about to be written may be empty, or have zeros.
fn check_contents(stream: &[u8]) -> usize {
    let mut checked = 0;
    let mut archive = tar::Archive::new(stream);
    for entry in archive.entries().unwrap() {
        let mut entry = entry.unwrap();
        let path = entry.path().unwrap().to_str().unwrap().to_owned();
        let Some(expected) = content_at(&path) else {
            continue;
        };
        checked += 1;
        if let Some(target) = entry.link_name().unwrap() {
            let of_target = content_at(target.to_str().unwrap());
            let is_link = entry.header().entry_type().is_hard_link();
            assert!(
                !is_link || of_target == Some(expected),
                "{path} is {target:?}"
            );
        } else if entry.header().entry_type().is_file() {
            let mut read = Vec::new();
            std::io::Read::read_to_end(&mut entry, &mut read).unwrap();
            let is_its = read == expected.as_bytes() || read.iter().all(|byte| *byte == 0);
            assert!(is_its, "{path} has {:?}", String::from_utf8_lossy(&read));
        }
    }
    checked
}

/// What is in the file at a path, if it is always the same.
fn content_at(path: &str) -> Option<String> {
    let (top, file) = path.split_once('/')?;
    let directory = top
        .strip_prefix("aside")
        .or_else(|| top.strip_prefix('d'))?;
    let file = match file {
        "moved" | "inside/linked" => "0",
        file => file.strip_prefix("inside/")?,
    };
    let is_told = !file.starts_with(".wh.") && !file.contains("/.wh.");
    is_told.then(|| content(directory.parse().unwrap(), file))
}

fn fill(root: &Path) {
    for number in 0..DIRECTORIES {
        let directory = root.join(format!("d{number}/inside"));
        fs::create_dir_all(&directory).unwrap();
        for file in 0..FILES {
            let file = file.to_string();
            fs::write(directory.join(&file), content(number, &file)).unwrap();
        }
        fs::hard_link(directory.join("0"), directory.join("linked")).unwrap();
    }
    fs::write(root.join("large"), vec![b'0'; LARGE]).unwrap();
}

/// One round of all that can become of a directory.
fn change(root: &Path, number: usize) {
    let at = root.join(format!("d{}", number % DIRECTORIES));
    let inside = at.join("inside");
    let file = |name: usize| inside.join(name.to_string());
    let write =
        |path: &Path, name: &str| fs::write(path, content(number % DIRECTORIES, name)).unwrap();
    // Written, replaced, removed and made anew.
    write(&file(1), "1");
    write(&at.join("new"), "2");
    fs::rename(at.join("new"), file(2)).unwrap();
    fs::remove_file(file(3)).unwrap();
    write(&file(3), "3");
    // Of another kind.
    fs::remove_file(file(4)).unwrap();
    fs::create_dir(file(4)).unwrap();
    write(&file(4).join("file"), "4/file");
    fs::remove_file(file(5)).unwrap();
    symlink("nowhere", file(5)).unwrap();
    write(&inside.join("linked"), "0");
    fs::rename(inside.join("linked"), at.join("moved")).unwrap();
    let large = File::options().write(true).open(root.join("large"));
    let large = large.unwrap();
    large.set_len((number % 7) as u64 * 300_000).unwrap();
    large.write_all_at(b"end", LARGE as u64 - 3).unwrap();
    // All of it goes, with whatever somebody is about to read.
    match number % 3 {
        0 => fs::remove_dir_all(&at).unwrap(),
        1 => {
            let aside = root.join(format!("aside{number}"));
            fs::rename(&at, &aside).unwrap();
            fs::write(&at, "a file").unwrap();
            fs::remove_dir_all(&aside).unwrap();
            fs::remove_file(&at).unwrap();
        }
        _ => {
            fs::remove_dir_all(&inside).unwrap();
            fs::write(&inside, "a file").unwrap();
            fs::remove_file(&inside).unwrap();
            fs::remove_dir_all(&at).unwrap();
        }
    }
    fs::create_dir_all(&inside).unwrap();
    for name in 0..FILES {
        write(&file(name), &name.to_string());
    }
    fs::hard_link(file(0), inside.join("linked")).unwrap();
}

/// Ends the writers, also where a check fails.
struct Done<'a>(&'a AtomicBool);

impl Drop for Done<'_> {
    fn drop(&mut self) {
        self.0.store(true, Ordering::Relaxed);
    }
}

#[test]
fn a_layer_of_it_is_whole_whatever_happens_meanwhile() {
    const LAYERS: usize = 40;
    let place = Place::new("");
    fill(&place.prepare("fill", None));
    place.commit("base", "fill");
    let root = place.prepare("work", Some("base"));
    place.prepare("other", Some("base"));
    let is_done = AtomicBool::new(false);
    std::thread::scope(|scope| {
        for first in [0, DIRECTORIES / 2] {
            let (root, is_done) = (&root, &is_done);
            scope.spawn(move || {
                for round in 0.. {
                    change(root, first + round % (DIRECTORIES / 2));
                    if is_done.load(Ordering::Relaxed) {
                        break;
                    }
                }
            });
        }
        let _done = Done(&is_done);
        let snapshots = &place.snapshots;
        let mut checked = 0;
        let made = (0..LAYERS).try_for_each(|number| {
            let mut stream = Vec::new();
            match number % 4 {
                0 => snapshots.write_difference(OWNER, Some("other"), "work", &mut stream, None)?,
                1 => snapshots.diff(OWNER, "work").map(drop)?,
                _ => snapshots.write_layer(OWNER, "work", &mut stream, None)?,
            }
            if number % 4 == 1 {
                return Ok(());
            }
            let mut tar = Command::new("tar")
                .args(["--list", "--file", "-"])
                .stdin(Stdio::piped())
                .stdout(Stdio::null())
                .spawn()
                .unwrap();
            std::io::Write::write_all(&mut tar.stdin.take().unwrap(), &stream).unwrap();
            assert!(tar.wait().unwrap().success());
            checked += check_contents(&stream);
            let key = format!("copy {number}");
            let on = plywood::snapshotter::ParentRef {
                owner: OWNER,
                key: "base".to_owned(),
            };
            snapshots.prepare(OWNER, &key, Some(&on), Default::default())?;
            snapshots.apply_layer(OWNER, &key, (&*stream, &Expected::default()), &())?;
            snapshots.remove(OWNER, &key)
        });
        made.unwrap();
        assert!(checked > LAYERS * DIRECTORIES, "{checked}");
    });
}
