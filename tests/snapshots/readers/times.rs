//! When everything was changed, to the nanosecond.
//!
//! Of a store through a mapping the kernel tells with the pages, unless it gathers writes: then it has the time of the
//! store. What stays in its hands until somebody flushes is as late as that.

use std::collections::BTreeMap;
use std::fs::{self, Permissions};
use std::os::unix::fs::{FileExt, MetadataExt, PermissionsExt, symlink};
use std::path::{Path, PathBuf};
use std::time::{Duration, SystemTime};

use nix::fcntl::posix_fallocate;
use nix::sys::stat::{Mode, UtimensatFlags, utimensat};
use nix::sys::time::TimeSpec;
use nix::unistd::{mkfifo, truncate};

use super::{LARGE, OWNER, Place, SMALL, mapping, writer};

/// Seconds and nanoseconds.
type Moment = (i64, i64);

/// When each path below a directory was changed, the directory itself among them.
fn changed(root: &Path) -> BTreeMap<PathBuf, Moment> {
    let mut changed = BTreeMap::new();
    let mut waiting = vec![PathBuf::new()];
    while let Some(path) = waiting.pop() {
        let metadata = fs::symlink_metadata(root.join(&path)).unwrap();
        if metadata.is_dir() {
            for entry in fs::read_dir(root.join(&path)).unwrap() {
                waiting.push(path.join(entry.unwrap().file_name()));
            }
        }
        changed.insert(path, (metadata.mtime(), metadata.mtime_nsec()));
    }
    changed
}

/// The same of a layer's entries, as somebody else's parser reads them.
fn told(stream: &[u8]) -> BTreeMap<PathBuf, Moment> {
    let mut told = BTreeMap::new();
    for entry in tar::Archive::new(stream).entries().unwrap() {
        let mut entry = entry.unwrap();
        let mut path = entry.path().unwrap().into_owned();
        let mut moment = (entry.header().mtime().unwrap() as i64, 0);
        for extension in entry.pax_extensions().unwrap().into_iter().flatten() {
            let extension = extension.unwrap();
            let value = extension.value().unwrap();
            match extension.key().unwrap() {
                "mtime" => moment = parsed(value),
                // Of one with holes.
                "GNU.sparse.name" => path = value.into(),
                _ => {}
            }
        }
        told.insert(path.components().collect(), moment);
    }
    told
}

/// Seconds with as many decimals as it takes.
fn parsed(text: &str) -> Moment {
    let (seconds, decimals) = text.split_once('.').unwrap_or((text, ""));
    let (seconds, nanoseconds): Moment = (
        seconds.parse().unwrap(),
        format!("{decimals:0<9}").parse().unwrap(),
    );
    match text.starts_with('-') && nanoseconds > 0 {
        true => (seconds - 1, 1_000_000_000 - nanoseconds),
        false => (seconds, nanoseconds),
    }
}

fn set(path: &Path, (seconds, nanoseconds): Moment) {
    let access = TimeSpec::new(seconds - 5, 1);
    let change = TimeSpec::new(seconds, nanoseconds);
    let follow = UtimensatFlags::NoFollowSymlink;
    utimensat(nix::fcntl::AT_FDCWD, path, &access, &change, follow).unwrap();
}

/// When each of them was read, but for directories, which whoever looks for these has to read.
fn accessed(root: &Path, paths: &BTreeMap<PathBuf, Moment>) -> BTreeMap<PathBuf, Moment> {
    let mut accessed = BTreeMap::new();
    for path in paths.keys() {
        let metadata = fs::symlink_metadata(root.join(path)).unwrap();
        if !metadata.is_dir() {
            accessed.insert(path.clone(), (metadata.atime(), metadata.atime_nsec()));
        }
    }
    accessed
}

const OLD: Moment = (1_000_000_000, 123_456_789);

fn fill(root: &Path) {
    for dir in ["kept/deep", "touched", "set", "renamed"] {
        fs::create_dir_all(root.join(dir)).unwrap();
    }
    for file in [
        "kept/file",
        "kept/deep/file",
        "mode",
        "written",
        "stored",
        "cut",
        "not cut",
        "linked",
        "touched/gone",
        "renamed/file",
    ] {
        fs::write(root.join(file), vec![b'0'; SMALL]).unwrap();
    }
    for file in ["large", "reserved"] {
        fs::write(root.join(file), vec![b'0'; LARGE]).unwrap();
    }
    fs::hard_link(root.join("reserved"), root.join("reserved too")).unwrap();
    symlink("target", root.join("kept/symlink")).unwrap();
    symlink("target", root.join("symlink")).unwrap();
    mkfifo(&root.join("fifo"), Mode::S_IRWXU).unwrap();
    // Those below a directory before the directory itself.
    for path in changed(root).into_keys().rev() {
        set(&root.join(&path), OLD);
    }
}

fn check(options: &str) {
    let place = Place::new(options);
    let root = place.prepare("fill", None);
    fill(&root);
    let reader = changed(&root);
    assert!(reader.values().all(|moment| *moment == OLD), "{reader:?}");
    place.commit("base", "fill");

    let root = place.prepare("work", Some("base"));
    assert_eq!(changed(&root), reader, "{options}: the base");
    let files = ["large", "written", "cut", "made"].map(|name| writer(root.join(name)));
    let [_, _, cut, made] = &files;
    made.set_len(SMALL as u64).unwrap();
    let stored = ["large", "stored", "made"].map(|name| writer(root.join(name)));
    let mut maps = stored.each_ref().map(mapping::shared_mut);
    for file in &files {
        file.write_all_at(b"written", 10_000).unwrap();
    }
    cut.set_len(SMALL as u64 - 7).unwrap();
    truncate(&root.join("not cut"), SMALL as i64).unwrap();
    // Space that lies below what is the layers' still, and that reading makes look like data.
    posix_fallocate(writer(root.join("reserved")), 0, 10).unwrap();
    fs::read(root.join("reserved")).unwrap();
    fs::set_permissions(root.join("mode"), Permissions::from_mode(0o600)).unwrap();
    fs::hard_link(root.join("linked"), root.join("link")).unwrap();
    fs::remove_file(root.join("touched/gone")).unwrap();
    fs::write(root.join("touched/new"), "new").unwrap();
    fs::rename(root.join("renamed"), root.join("touched/renamed")).unwrap();
    fs::create_dir(root.join("new")).unwrap();
    symlink("target", root.join("new/symlink")).unwrap();
    mkfifo(&root.join("new/fifo"), Mode::S_IRWXU).unwrap();
    let own: [(&str, Moment); 6] = [
        ("set", (-5, 1)),
        ("symlink", (1, 999_999_999)),
        ("fifo", (2_000_000_000, 0)),
        ("new/set", (5_000_000_000, 100)),
        ("new/symlink", (7, 70)),
        ("new", (9, 90)),
    ];
    let set_last = writer(root.join("new/set"));
    set_last.write_all_at(&[1; SMALL], 0).unwrap();
    for (name, moment) in own {
        set(&root.join(name), moment);
    }

    // Diff, with stores that nobody has flushed.
    let before = now();
    store(&mut maps, 1);
    let reader = changed(&root);
    let mut stream = Vec::new();
    let snapshots = &place.snapshots;
    snapshots
        .write_layer(OWNER, "work", &mut stream, None)
        .unwrap();
    let told = told(&stream);
    let mut expected = reader.clone();
    expected.retain(|path, _| told.contains_key(path));
    if !options.contains("writeback") {
        // Inside, too, it is seen only now.
        let reader = changed(&root);
        for name in STORED {
            let moment = reader[Path::new(name)];
            assert!(moment >= before, "{options}: {name}");
            expected.insert(name.into(), moment);
        }
    }
    let mut entries = told.clone();
    entries.retain(|path, _| reader.contains_key(path));
    assert_eq!(entries, expected, "{options}: the diff");
    for (name, _) in own {
        assert_eq!(told[Path::new(name)], own_of(&own, name), "{options}");
    }
    for name in STORED
        .iter()
        .chain(&["written", "cut", "link", "touched", "mode"])
    {
        assert!(told.contains_key(Path::new(name)), "{options}: {name}");
    }

    // Commit, with stores again.
    let before = now();
    store(&mut maps, 2);
    let reader = changed(&root);
    let read = accessed(&root, &reader);
    place.commit("done", "work");
    let after = now();
    let view = place.prepare("look", Some("done"));
    let mut committed = changed(&view);
    if !options.contains("writeback") {
        for name in STORED {
            let moment = committed.insert(name.into(), reader[Path::new(name)]);
            let moment = moment.unwrap();
            assert!((before..after).contains(&moment), "{options}: {name}");
        }
    }
    assert_eq!(committed, reader, "{options}: the commit");
    assert_eq!(accessed(&view, &reader), read, "{options}: access");
}

const STORED: [&str; 3] = ["large", "stored", "made"];

fn store(maps: &mut [memmap2::MmapMut; 3], round: u8) {
    for map in maps {
        map[50_000 + usize::from(round)] = round;
    }
}

fn own_of(own: &[(&str, Moment)], name: &str) -> Moment {
    own.iter().find(|(other, _)| *other == name).unwrap().1
}

/// This moment, once the kernel's clock for files, which moves in steps, has come to it.
fn now() -> Moment {
    let since = SystemTime::now().duration_since(SystemTime::UNIX_EPOCH);
    let since = since.unwrap();
    std::thread::sleep(Duration::from_millis(20));
    (since.as_secs() as i64, i64::from(since.subsec_nanos()))
}

in_every_mode!(check);
