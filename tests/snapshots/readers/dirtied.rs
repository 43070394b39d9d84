//! A container writes to one large file of its image after the other, each for the first time, while its changes are looked
//! at. Each file that is told of is as it was before the write or after it, and never of both, nor an error: a file that was
//! copied up in part in the middle of it once failed the whole diff, and lay in an export as holes around one chunk.

use std::collections::BTreeMap;
use std::fs::{self, File};
use std::io::Read;
use std::os::unix::fs::FileExt;
use std::path::Path;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Duration;

use super::{OWNER, Place};

const FILES: usize = 60;
/// More than a mount copies whole.
const SIZE: usize = 1_300_000;
const AT: usize = 700_000;
const NEW: &[u8] = b"of the container";

fn name(number: usize) -> String {
    format!("f{number:02}")
}

fn before(number: usize) -> Vec<u8> {
    vec![b'0' + number as u8; SIZE]
}

fn after(number: usize) -> Vec<u8> {
    let mut content = before(number);
    content[AT..AT + NEW.len()].copy_from_slice(NEW);
    content
}

/// Checks the files that were told of, of which the first `written` were written before anybody looked.
fn check_told(told: &BTreeMap<String, Vec<u8>>, written: usize, what: &str) {
    for number in 0..FILES {
        let content = told.get(&name(number));
        let is = |other: &[u8]| content.is_some_and(|content| content == other);
        let is_right = match number < written {
            true => is(&after(number)),
            false => content.is_none() || is(&before(number)) || is(&after(number)),
        };
        assert!(is_right, "{what}: {}, {written} written", name(number));
    }
}

fn diff(place: &Place) -> BTreeMap<String, Vec<u8>> {
    let mut stream = Vec::new();
    let snapshots = &place.snapshots;
    snapshots
        .write_layer(OWNER, "work", &mut stream, None)
        .unwrap();
    files_in(&stream)
}

fn files_in(stream: &[u8]) -> BTreeMap<String, Vec<u8>> {
    let mut told = BTreeMap::new();
    for entry in tar::Archive::new(stream).entries().unwrap() {
        let mut entry = entry.unwrap();
        let name = entry.path().unwrap().to_str().unwrap().to_owned();
        let mut content = Vec::new();
        entry.read_to_end(&mut content).unwrap();
        told.insert(name, content);
    }
    told
}

/// What says that not all of the data is in a file.
fn mark_of(path: &Path) -> Option<Vec<u8>> {
    xattr::get(path, "trusted.overlay.metacopy").unwrap()
}

/// What the copy of the upper has itself: of the others the data is in the copies of the layers.
fn export(place: &Place, to: &Path) -> BTreeMap<String, Vec<u8>> {
    let exported = place.snapshots.export_overlay(OWNER, "work", to).unwrap();
    let (upper, _) = exported.upper.unwrap();
    let mut told = BTreeMap::new();
    for entry in fs::read_dir(upper).unwrap() {
        let path = entry.unwrap().path();
        match mark_of(&path) {
            Some(mark) => assert_eq!(mark, b"", "{}", path.display()),
            None => {
                let name = path.file_name().unwrap().to_str().unwrap().to_owned();
                told.insert(name, fs::read(&path).unwrap());
            }
        }
    }
    fs::remove_dir_all(to).unwrap();
    told
}

fn check(options: &str) {
    let place = Place::new(options);
    let root = place.prepare("fill", None);
    for number in 0..FILES {
        fs::write(root.join(name(number)), before(number)).unwrap();
    }
    place.commit("base", "fill");
    let root = place.prepare("work", Some("base"));
    let written = AtomicUsize::new(0);
    let copy = place.dir.path().join("copy");
    std::thread::scope(|scope| {
        scope.spawn(|| {
            for number in 0..FILES {
                let file = File::options().write(true).open(root.join(name(number)));
                file.unwrap().write_all_at(NEW, AT as u64).unwrap();
                written.fetch_add(1, Ordering::Release);
                std::thread::sleep(Duration::from_millis(5));
            }
        });
        loop {
            let known = written.load(Ordering::Acquire);
            check_told(&diff(&place), known, &format!("{options}: the diff"));
            let known = written.load(Ordering::Acquire);
            let told = export(&place, &copy);
            check_told(&told, known, &format!("{options}: the export"));
            if known == FILES {
                break;
            }
        }
    });
    // Only what was written tells it from the file of the image.
    let left = place.prepare("left", Some("base"));
    let time = fs::metadata(left.join(name(0)))
        .unwrap()
        .modified()
        .unwrap();
    let file = File::options().write(true).open(root.join(name(0)));
    file.unwrap().set_modified(time).unwrap();
    let mut stream = Vec::new();
    let written =
        (place.snapshots).write_difference(OWNER, Some("left"), "work", &mut stream, None);
    written.unwrap();
    check_told(
        &files_in(&stream),
        FILES,
        &format!("{options}: against another"),
    );
    // Whoever looks changes nothing: what the mount has copied up in part it goes on with.
    let upper = place.snapshots.stat(OWNER, "work").unwrap().upper_dir;
    let mark = mark_of(&upper.unwrap().join(name(0)));
    assert_eq!(mark.as_deref(), Some(&b"P"[..]));
}

in_every_mode!(check);
