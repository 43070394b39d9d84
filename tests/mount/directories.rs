//! Directories: listings, renames, removal.

use std::collections::BTreeSet;
use std::fs::{self, File};
use std::os::unix::fs::MetadataExt;
use std::path::Path;
use std::process::Command;

use nix::fcntl::{AT_FDCWD, OFlag, RenameFlags, renameat2};
use nix::sys::stat::Mode;

use crate::common::mode;
use crate::common::{Layers, Mount, errno};

fn names(dir: &Path) -> BTreeSet<String> {
    fs::read_dir(dir)
        .unwrap()
        .map(|entry| entry.unwrap().file_name().into_string().unwrap())
        .collect()
}

fn set(names: &[&str]) -> BTreeSet<String> {
    names.iter().map(|name| (*name).to_owned()).collect()
}

fn exchange(a: &Path, b: &Path) -> nix::Result<()> {
    renameat2(AT_FDCWD, a, AT_FDCWD, b, RenameFlags::RENAME_EXCHANGE)
}

#[test]
fn a_listing_is_the_merge_of_the_layers() {
    let layers = Layers::new(3);
    for (n, names) in [["a", "b"], ["b", "c"], ["c", "d"]].iter().enumerate() {
        for name in names {
            Layers::write(&layers.lower(n).join("dir").join(name), n.to_string());
        }
    }
    layers.seal();
    let mount = Mount::new(&layers, "");
    fs::write(mount.join("dir/e"), "").unwrap();
    fs::remove_file(mount.join("dir/a")).unwrap();
    assert_eq!(names(&mount.join("dir")), set(&["b", "c", "d", "e"]));
    assert_eq!(fs::read(mount.join("dir/b")).unwrap(), b"0");
    assert_eq!(fs::read(mount.join("dir/c")).unwrap(), b"1");
}

#[test]
fn numbers_in_listings_are_those_of_stat() {
    let layers = Layers::new(2);
    for n in 0..2 {
        for i in 0..20 {
            Layers::write(&layers.lower(n).join(format!("f{n}-{i}")), "");
        }
    }
    layers.seal();
    for options in ["", "kernel_features=-readdirplus"] {
        let mount = Mount::new(&layers, options);
        fs::write(mount.join("f0-3"), "copied up").unwrap();
        let mut seen = BTreeSet::new();
        for entry in fs::read_dir(mount.join("")).unwrap() {
            let entry = entry.unwrap();
            let inode = std::os::unix::fs::DirEntryExt::ino(&entry);
            assert_eq!(inode, entry.metadata().unwrap().ino(), "{entry:?}");
            assert!(seen.insert(inode), "{entry:?} shares its number");
        }
        assert_eq!(seen.len(), 40);
        mount.unmount();
    }
}

#[test]
fn a_rewound_listing_shows_what_changed() {
    let layers = Layers::new(1);
    fs::write(layers.lower(0).join("old"), "").unwrap();
    layers.seal();
    let mount = Mount::new(&layers, "");
    let flags = OFlag::O_RDONLY | OFlag::O_DIRECTORY;
    let mut dir = nix::dir::Dir::open(&mount.join(""), flags, Mode::empty()).unwrap();
    let mut list = || -> BTreeSet<String> {
        // `Dir::iter` rewinds when it is dropped.
        dir.iter()
            .map(|entry| entry.unwrap().file_name().to_str().unwrap().to_owned())
            .collect()
    };
    assert_eq!(list(), set(&[".", "..", "old"]));
    fs::write(mount.join("new"), "").unwrap();
    fs::remove_file(mount.join("old")).unwrap();
    assert_eq!(list(), set(&[".", "..", "new"]));
}

#[test]
fn every_name_is_met_once_while_names_vanish() {
    let layers = Layers::new(1);
    let count = 3000;
    for i in 0..count {
        fs::write(layers.lower(0).join(format!("name-{i}")), "").unwrap();
    }
    layers.seal();
    let mount = Mount::new(&layers, "");
    let mut met = BTreeSet::new();
    for entry in fs::read_dir(mount.join("")).unwrap() {
        let entry = entry.unwrap();
        assert!(met.insert(entry.file_name()));
        fs::remove_file(entry.path()).unwrap();
    }
    assert_eq!(met.len(), count);
    assert!(names(&mount.join("")).is_empty());
}

/// The kernel tells a reader the first part of a listing from what it kept of another's, and asks for the rest by an offset
/// of that: once it meant another place in the listing that was made for the rest, so names came twice or never.
#[test]
fn a_reader_goes_on_where_it_was_in_a_listing_that_was_made_for_another() {
    let layers = Layers::new(2);
    let name = |n: usize| format!("{n:04}-{}", "x".repeat(200));
    for n in 0..600 {
        let dir = match n % 3 {
            0 => layers.upper(),
            lower => layers.lower(lower - 1),
        };
        fs::write(dir.join(name(n)), "").unwrap();
    }
    layers.seal();
    let mount = Mount::new(&layers, "");
    let all = names(&mount.join(""));
    let mut reader = fs::read_dir(mount.join("")).unwrap();
    let mut next = || Some(reader.next()?.unwrap().file_name().into_string().unwrap());
    let mut met: Vec<String> = (0..100).map_while(|_| next()).collect();
    let gone: BTreeSet<String> = met.iter().take(70).cloned().collect();
    for name in &gone {
        fs::remove_file(mount.join(name)).unwrap();
    }
    for n in 600..650 {
        fs::write(mount.join(name(n)), "").unwrap();
    }
    // Now the kernel keeps another listing.
    assert_eq!(names(&mount.join("")).len(), all.len() - 70 + 50);
    met.extend(std::iter::from_fn(next));
    let twice = met.len() - met.iter().collect::<BTreeSet<_>>().len();
    let missed = all.iter().filter(|name| !met.contains(name)).count();
    assert_eq!((twice, missed), (0, 0));
}

#[test]
fn a_lower_directory_is_renamed_for_good() {
    let layers = Layers::new(2);
    Layers::write(&layers.lower(0).join("d/sub/f"), "top");
    Layers::write(&layers.lower(1).join("d/g"), "bottom");
    layers.seal();
    let mount = Mount::new(&layers, "");
    let inode = fs::metadata(mount.join("d")).unwrap().ino();
    fs::rename(mount.join("d"), mount.join("e")).unwrap();
    fs::rename(mount.join("e/sub"), mount.join("e/moved")).unwrap();
    fs::create_dir(mount.join("d")).unwrap();
    let check = |mount: &Mount| {
        assert_eq!(fs::read(mount.join("e/moved/f")).unwrap(), b"top");
        assert_eq!(fs::read(mount.join("e/g")).unwrap(), b"bottom");
        assert_eq!(fs::metadata(mount.join("e")).unwrap().ino(), inode);
        assert_eq!(names(&mount.join("e")), set(&["g", "moved"]));
        assert!(names(&mount.join("d")).is_empty());
    };
    check(&mount);
    mount.unmount();
    check(&Mount::new(&layers, ""));
}

#[test]
fn renames_that_exchange_or_must_not_replace() {
    let layers = Layers::new(1);
    Layers::write(&layers.lower(0).join("d/f"), "in d");
    Layers::write(&layers.lower(0).join("e/f"), "in e");
    Layers::write(&layers.lower(0).join("file"), "file");
    layers.seal();
    let mount = Mount::new(&layers, "");
    if !mode::Mode::of_run().exchanges() {
        let result = exchange(&mount.join("d"), &mount.join("e"));
        assert_eq!(errno(result), libc::EINVAL);
        assert_eq!(fs::read(mount.join("d/f")).unwrap(), b"in d");
        assert_eq!(fs::read(mount.join("e/f")).unwrap(), b"in e");
        return;
    }
    exchange(&mount.join("d"), &mount.join("e")).unwrap();
    assert_eq!(fs::read(mount.join("d/f")).unwrap(), b"in e");
    assert_eq!(fs::read(mount.join("e/f")).unwrap(), b"in d");
    exchange(&mount.join("d"), &mount.join("file")).unwrap();
    assert_eq!(fs::read(mount.join("d")).unwrap(), b"file");
    assert_eq!(fs::read(mount.join("file/f")).unwrap(), b"in e");
    let keep = |from: &str, to: &str| {
        let flags = RenameFlags::RENAME_NOREPLACE;
        renameat2(
            AT_FDCWD,
            &mount.join(from),
            AT_FDCWD,
            &mount.join(to),
            flags,
        )
    };
    assert_eq!(errno(keep("d", "e")), libc::EEXIST);
    keep("d", "free").unwrap();
    keep("e", "d").unwrap();
    let whiteout = renameat2(
        AT_FDCWD,
        &mount.join("d"),
        AT_FDCWD,
        &mount.join("w"),
        RenameFlags::RENAME_WHITEOUT,
    );
    assert_eq!(errno(whiteout), libc::EINVAL);
}

#[test]
fn removal_needs_an_empty_directory() {
    let layers = Layers::new(1);
    Layers::write(&layers.lower(0).join("d/f"), "");
    layers.seal();
    let mount = Mount::new(&layers, "");
    assert_eq!(errno(fs::remove_dir(mount.join("d"))), libc::ENOTEMPTY);
    assert_eq!(errno(fs::remove_dir(mount.join("d/f"))), libc::ENOTDIR);
    fs::remove_file(mount.join("d/f")).unwrap();
    fs::remove_dir(mount.join("d")).unwrap();
    assert!(!mount.join("d").exists());
    fs::create_dir(mount.join("d")).unwrap();
    assert!(names(&mount.join("d")).is_empty());
    mount.unmount();
    let mount = Mount::new(&layers, "");
    assert!(names(&mount.join("d")).is_empty());
}

#[test]
fn a_tree_of_a_lower_is_removed_as_a_whole() {
    let layers = Layers::new(2);
    for i in 0..200 {
        let n = i % 2;
        Layers::write(
            &layers.lower(n).join(format!("t/{}/{}/f{i}", i % 7, i % 3)),
            "",
        );
    }
    layers.seal();
    let mount = Mount::new(&layers, "");
    fs::remove_dir_all(mount.join("t")).unwrap();
    assert!(names(&mount.join("")).is_empty());
}

#[test]
fn many_threads_work_in_one_tree() {
    let layers = Layers::new(1);
    for i in 0..64 {
        Layers::write(&layers.lower(0).join(format!("d{}/f{i}", i % 4)), "lower");
    }
    layers.seal();
    let mount = Mount::new(&layers, "");
    std::thread::scope(|scope| {
        for t in 0..8 {
            let mount = &mount;
            scope.spawn(move || {
                for i in 0..64 {
                    let shared = mount.join(format!("d{}/f{i}", i % 4));
                    // Others may have it removed or renamed at any moment.
                    let _ = fs::read(&shared);
                    let _ = fs::write(&shared, format!("by {t}"));
                    let own = mount.join(format!("d{}/own-{t}-{i}", i % 4));
                    fs::write(&own, "mine").unwrap();
                    fs::rename(&own, mount.join(format!("d{}/moved-{t}-{i}", (i + 1) % 4)))
                        .unwrap();
                    if i % 8 == t {
                        let _ = fs::remove_file(&shared);
                    }
                }
            });
        }
    });
    for t in 0..8 {
        for i in 0..64 {
            let path = mount.join(format!("d{}/moved-{t}-{i}", (i + 1) % 4));
            assert_eq!(fs::read(path).unwrap(), b"mine");
        }
    }
}

#[test]
fn of_many_that_create_exclusively_one_wins() {
    let layers = Layers::new(1);
    fs::write(layers.lower(0).join("name"), "").unwrap();
    layers.seal();
    let mount = Mount::new(&layers, "");
    for _ in 0..20 {
        fs::remove_file(mount.join("name")).unwrap();
        let winners: usize = std::thread::scope(|scope| {
            let racers: Vec<_> = (0..8)
                .map(|_| scope.spawn(|| File::create_new(mount.join("name")).is_ok()))
                .collect();
            racers
                .into_iter()
                .map(|racer| usize::from(racer.join().unwrap()))
                .sum()
        });
        assert_eq!(winners, 1);
    }
}

/// One file that could not be looked up made all of its directory unlistable, and one without data could not be removed.
#[test]
fn a_file_without_data_is_listed_and_removed_with_its_directory() {
    let layers = Layers::new(1);
    for name in ["a", "b", "c", "z"] {
        Layers::write(&layers.lower(0).join("dir").join(name), name);
        Layers::write(&layers.upper().join("other").join(name), name);
    }
    let mark = |path: &Path, name: &str, value: &str| {
        let arguments = ["-n", name, "-v", value, path.to_str().unwrap()];
        let marked = Command::new("setfattr").args(arguments).status();
        assert!(marked.unwrap().success());
    };
    for dir in [layers.lower(0).join("dir"), layers.upper().join("other")] {
        mark(&dir, "trusted.overlay.impure", "y");
        mark(&dir.join("b"), "trusted.overlay.metacopy", "");
    }
    // A copy in the upper of something that no layer has is no file at all.
    let all = set(&["a", "b", "c", "z"]);
    for options in ["", "kernel_features=-readdirplus"] {
        let mount = Mount::new(&layers, options);
        assert_eq!(names(&mount.join("dir")), all);
        assert_eq!(names(&mount.join("other")), all);
        let missing = fs::metadata(mount.join("other/b"));
        assert_eq!(errno(missing), libc::EIO);
        assert_eq!(fs::read(mount.join("other/c")).unwrap(), b"c");
        assert_eq!(errno(fs::read(mount.join("dir/b"))), libc::EIO);
        assert_eq!(fs::read(mount.join("dir/c")).unwrap(), b"c");
    }
    let mount = Mount::new(&layers, "");
    fs::remove_dir_all(mount.join("dir")).unwrap();
    assert_eq!(names(&mount.join("")), set(&["other"]));
}
