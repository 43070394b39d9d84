//! Files of the image that have several names, changed by some of them.
//!
//! A diff of a snapshot in use once had them under the names that they were changed by, and what unpacked it had the others
//! as they were.

use std::collections::BTreeMap;
use std::fs::{self, File};
use std::io::Read;
use std::os::unix::fs::{FileExt, MetadataExt, PermissionsExt};
use std::path::Path;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Duration;

use plywood::store::layers::Expected;

use super::{LARGE, OWNER, Place, SMALL, mapping, writer};

/// What is at each path: type and mode, links, size, time of the last change, content, and the first path of the same file.
fn seen(root: &Path) -> BTreeMap<String, String> {
    let mut paths = Vec::new();
    let mut waiting = vec![root.to_owned()];
    while let Some(dir) = waiting.pop() {
        for entry in fs::read_dir(dir).unwrap() {
            let entry = entry.unwrap();
            if entry.file_type().unwrap().is_dir() {
                waiting.push(entry.path());
            }
            paths.push(entry.path());
        }
    }
    paths.sort();
    let mut first = BTreeMap::new();
    let look = |path: std::path::PathBuf| {
        let name = path.strip_prefix(root).unwrap().display().to_string();
        let found = fs::symlink_metadata(&path).unwrap();
        let (links, size, content) = match found.file_type() {
            kind if kind.is_dir() => (0, 0, String::new()),
            kind if kind.is_symlink() => {
                let target = fs::read_link(&path).unwrap();
                (found.nlink(), found.size(), target.display().to_string())
            }
            _ => {
                let hash = blake3::hash(&fs::read(&path).unwrap());
                (found.nlink(), found.size(), hash.to_string())
            }
        };
        let same = first.entry(found.ino()).or_insert_with(|| name.clone());
        let (mode, time) = (found.mode(), (found.mtime(), found.mtime_nsec()));
        let what = format!("{mode:o} {links} {size} {time:?} {content} {same}");
        (name, what)
    };
    paths.into_iter().map(look).collect()
}

fn link(root: &Path, one: &str, others: &[&str]) {
    for other in others {
        fs::hard_link(root.join(one), root.join(other)).unwrap();
    }
}

fn check(options: &str) {
    let place = Place::new(options);
    let root = place.prepare("fill", None);
    for dir in ["d", "e/deep", "l", "m", "untouched"] {
        fs::create_dir_all(root.join(dir)).unwrap();
    }
    for (name, size, others) in [
        ("d/a", SMALL, &["d/b", "e/deep/c", "untouched/d"][..]),
        ("d/cut", SMALL, &["untouched/cut"]),
        ("l/large", LARGE, &["untouched/large"]),
        ("l/mapped", LARGE, &["untouched/mapped"]),
        ("m/mode", SMALL, &["untouched/mode"]),
        ("m/gone", SMALL, &["untouched/one", "untouched/two"]),
        ("m/same", SMALL, &["untouched/same"]),
    ] {
        fs::write(root.join(name), vec![b'0'; size]).unwrap();
        link(&root, name, others);
    }
    place.commit("base", "fill");

    let root = place.prepare("work", Some("base"));
    let [a, cut, large, mapped] =
        ["d/a", "d/cut", "l/large", "l/mapped"].map(|name| writer(root.join(name)));
    let mut map = mapping::shared_mut(&mapped);
    for file in [&a, &large] {
        file.write_all_at(b"written", 50_000).unwrap();
    }
    cut.set_len(777).unwrap();
    map[LARGE / 2..][..5].fill(b'm');
    let mode = fs::Permissions::from_mode(0o4751);
    fs::set_permissions(root.join("untouched/mode"), mode).unwrap();
    fs::remove_file(root.join("m/gone")).unwrap();
    fs::remove_file(root.join("d/b")).unwrap();
    fs::rename(root.join("e"), root.join("moved")).unwrap();
    link(&root, "moved/deep/c", &["m/new"]);
    // Nobody has told the mount of what is in the cache of the kernel.
    map[LARGE / 2 + 10..][..5].fill(b'm');
    a.write_all_at(b"later", 70_000).unwrap();

    let mut stream = Vec::new();
    let snapshots = &place.snapshots;
    snapshots
        .write_layer(OWNER, "work", &mut stream, None)
        .unwrap();
    let reader = seen(&root);
    let copy = place.prepare("copy", Some("base"));
    snapshots
        .apply_layer(OWNER, "copy", (&*stream, &Expected::default()), &())
        .unwrap();
    let told = seen(&copy);
    for (name, what) in &reader {
        assert_eq!(told.get(name), Some(what), "{options}: {name}");
    }
    assert_eq!(told.len(), reader.len(), "{options}");
    assert!(reader["d/a"].contains(" 4 "), "{}", reader["d/a"]);
    // And it is not all of the image.
    let same = "m/same";
    assert!(!names(&stream).contains_key(same), "{options}");
    drop((map, a, cut, large, mapped));
}

in_every_mode!(check);

/// The names in a stream, of links with what they go to, of others with the content.
fn names(stream: &[u8]) -> BTreeMap<String, Result<String, Vec<u8>>> {
    let mut told = BTreeMap::new();
    for entry in tar::Archive::new(stream).entries().unwrap() {
        let mut entry = entry.unwrap();
        let name = entry.path().unwrap().display().to_string();
        let link = entry
            .link_name()
            .unwrap()
            .map(|to| to.display().to_string());
        let mut content = Vec::new();
        entry.read_to_end(&mut content).unwrap();
        told.insert(name, link.ok_or(content));
    }
    told
}

/// A container changes one such file after the other while its changes are looked at, and that each time. Each file is told
/// by all of its names or by none. Half of such diffs were refused, and were to be repeated.
#[test]
fn what_is_changed_meanwhile_is_told_by_all_of_its_names() {
    const FILES: usize = 600;
    let place = Place::new("");
    let root = place.prepare("fill", None);
    for dir in ["one", "two"] {
        fs::create_dir(root.join(dir)).unwrap();
    }
    for number in 0..FILES {
        let (one, two) = (format!("one/{number}"), format!("two/{number}"));
        fs::write(root.join(&one), "before").unwrap();
        link(&root, &one, &[&two]);
    }
    place.commit("base", "fill");
    let root = place.prepare("work", Some("base"));
    let written = AtomicUsize::new(0);
    std::thread::scope(|scope| {
        scope.spawn(|| {
            for number in 0..FILES {
                // By the first name, by the second, and by a new one.
                let dir = ["one", "two", "one"][number % 3];
                let mut path = root.join(dir).join(number.to_string());
                if number % 3 == 2 {
                    link(&root, path.to_str().unwrap(), &[&format!("new{number}")]);
                    path = root.join(format!("new{number}"));
                }
                let file = File::options().write(true).open(path).unwrap();
                file.write_all_at(b"AFTER.", 0).unwrap();
                written.fetch_add(1, Ordering::Release);
                std::thread::sleep(Duration::from_millis(3));
            }
        });
        loop {
            let known = written.load(Ordering::Acquire);
            let mut stream = Vec::new();
            let snapshots = &place.snapshots;
            let written = snapshots.write_layer(OWNER, "work", &mut stream, None);
            written.unwrap();
            let told = names(&stream);
            for number in 0..FILES {
                let of = |dir: &str| told.get(&format!("{dir}/{number}"));
                match (of("one"), of("two")) {
                    (None, None) => assert!(number >= known, "{number} of {known}"),
                    (Some(Ok(to)), Some(Ok(other))) => {
                        assert_eq!((to, other), (&format!("new{number}"), to));
                    }
                    (Some(Err(content)), Some(Ok(to))) => {
                        assert_eq!(*to, format!("one/{number}"));
                        assert!(content == b"AFTER." || number >= known, "{number}");
                    }
                    told => panic!("{number} of {known}: {told:?}"),
                }
            }
            if known == FILES {
                break;
            }
        }
    });
}
