//! Hard links over a chain of commits.

use std::fs;
use std::os::unix::fs::{FileExt, MetadataExt};
use std::path::Path;
use std::process::Command;

use super::client::{Snapshots, source};
use super::common::Plyd;

/// These names are one file, of as many links, with this content, and no other.
fn assert_one_file(root: &Path, names: &[&str], content: &str) {
    let first = fs::metadata(root.join(names[0])).unwrap();
    for name in names {
        let m = fs::metadata(root.join(name)).unwrap();
        assert_eq!((name, m.ino()), (name, first.ino()));
        assert_eq!((name, m.nlink()), (name, names.len() as u64));
        let text = fs::read_to_string(root.join(name)).unwrap();
        assert_eq!((name, &*text), (name, content));
    }
}

#[test]
fn links_are_one_file_over_commits_in_other_layers_and_directories() {
    let plyd = Plyd::start();
    let snapshots = Snapshots::of(&plyd);
    snapshots.layer("one", "", |root| {
        fs::create_dir_all(root.join("d")).unwrap();
        fs::create_dir_all(root.join("e/deep")).unwrap();
        fs::write(root.join("d/a"), "old").unwrap();
        fs::hard_link(root.join("d/a"), root.join("e/b")).unwrap();
        fs::write(root.join("d/alone"), "alone").unwrap();
    });
    // A name in another layer, and one for a file that had no second.
    snapshots.layer("two", "one", |root| {
        fs::hard_link(root.join("e/b"), root.join("e/deep/c")).unwrap();
        fs::hard_link(root.join("d/alone"), root.join("e/other")).unwrap();
    });
    // A write by one name alone, and a name in a directory that is new.
    snapshots.layer("three", "two", |root| {
        assert_one_file(root, &["d/a", "e/b", "e/deep/c"], "old");
        let file = fs::File::options().write(true).open(root.join("d/a"));
        file.unwrap().write_all_at(b"new", 0).unwrap();
        fs::create_dir(root.join("f")).unwrap();
        fs::hard_link(root.join("e/deep/c"), root.join("f/d")).unwrap();
    });
    // One name goes, another moves, and attributes change by one of them.
    snapshots.layer("four", "three", |root| {
        assert_one_file(root, &["d/a", "e/b", "e/deep/c", "f/d"], "new");
        fs::remove_file(root.join("e/b")).unwrap();
        fs::rename(root.join("d/a"), root.join("f/moved")).unwrap();
        xattr::set(root.join("e/deep/c"), "user.x", b"y").unwrap();
        fs::rename(root.join("e/deep"), root.join("deep")).unwrap();
    });
    let names = ["f/moved", "deep/c", "f/d"];
    let others = ["d/alone", "e/other"];
    let check = |root: &Path, links: &[&str]| {
        assert_one_file(root, links, "new");
        assert_one_file(root, &others, "alone");
        assert!(!root.join("d/a").exists() && !root.join("e/b").exists());
        for name in links {
            let value = xattr::get(root.join(name), "user.x").unwrap();
            assert_eq!(value.as_deref(), Some(&b"y"[..]), "{name}");
        }
    };
    check(&source(&snapshots.view("look", "four").unwrap()), &names);

    let work = source(&snapshots.prepare("work", "four").unwrap());
    check(&work, &names);
    fs::hard_link(work.join("deep/c"), work.join("more")).unwrap();
    let all = ["f/moved", "deep/c", "f/d", "more"];
    check(&work, &all);
    let (to, mnt) = (plyd.dir().join("exported"), plyd.dir().join("mnt"));
    fs::create_dir(&mnt).unwrap();
    let options = plyd.ok([
        "snapshot",
        "export-overlay",
        "--owner",
        "containerd",
        "work",
        to.to_str().unwrap(),
    ]);
    let mount = |program: &str, words: &[&str]| {
        let status = Command::new(program).args(words).arg(&mnt).status();
        assert!(status.unwrap().success(), "{program} {words:?}");
    };
    mount("mount", &["-t", "overlay", "overlay", "-o", options.trim()]);
    check(&mnt, &all);
    mount("umount", &[]);
}
