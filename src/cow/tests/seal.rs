//! A sealed upper stays as it is, whoever reads.

use std::os::unix::fs::MetadataExt;

use super::*;

const NAMES: [&str; 5] = ["", "file", "dir", "dir/inner", "link"];

fn access_times(fixture: &Fixture) -> Vec<i64> {
    let upper = match fixture.upper() {
        upper if upper.exists() => upper,
        _ => fixture.base.path().join("layer"),
    };
    let stat = |name| std::fs::symlink_metadata(upper.join(name)).unwrap();
    NAMES.iter().map(|name| stat(name).atime()).collect()
}

/// Sets all of them to a time long ago, so that the host moves those of what is read.
fn age(fixture: &Fixture) {
    for name in NAMES {
        let dir = std::fs::File::open(fixture.upper().join(name).parent().unwrap()).unwrap();
        let (dir, name) = match name {
            "" => (std::fs::File::open(fixture.upper()).unwrap(), "."),
            name => (dir, name.rsplit('/').next().unwrap()),
        };
        let old = libc::timespec {
            tv_sec: 1000,
            tv_nsec: 0,
        };
        let dir = std::os::fd::AsFd::as_fd(&dir);
        crate::sys::fs::Object::Entry(dir, OsStr::new(name))
            .set_times(&[old, old])
            .unwrap();
    }
}

fn read_everything(fixture: &Fixture) {
    assert_eq!(fixture.read("file"), "text");
    assert_eq!(fixture.read("dir/inner"), "inner");
    assert_eq!(fixture.list("dir"), ["inner"]);
    assert_eq!(fixture.list("").len(), 4);
    let link = fixture.node("link");
    assert_eq!(fixture.union().readlink(link).unwrap(), "file");
}

#[test]
fn nothing_that_is_read_moves_a_time_of_a_sealed_upper() {
    let fixture = Fixture::new(1, |lowers| put(lowers[0].join("lower"), "lower"));
    fixture.write("file", "text").unwrap();
    fixture.mkdir("dir").unwrap();
    fixture.write("dir/inner", "inner").unwrap();
    let (root, name) = fixture.split("link");
    let union = fixture.union();
    union
        .symlink(root, name, OsStr::new("file"), &Caller::ROOT)
        .unwrap();
    age(&fixture);
    read_everything(&fixture);
    assert!(access_times(&fixture).iter().all(|time| *time > 1000));
    // By now all of it is open.
    age(&fixture);
    for _ in 0..2 {
        union.seal().unwrap();
        read_everything(&fixture);
        assert!(access_times(&fixture).iter().all(|time| *time == 1000));
    }
    std::fs::rename(fixture.upper(), fixture.base.path().join("layer")).unwrap();
    read_everything(&fixture);
    assert!(access_times(&fixture).iter().all(|time| *time == 1000));
    assert_eq!(errno(fixture.write("new", "x")), libc::EROFS);
    assert_eq!(errno(fixture.unlink("file")), libc::EROFS);
    assert_eq!(errno(fixture.write("file", "x")), libc::EROFS);
}

#[test]
fn an_upper_that_was_replaced_cannot_be_sealed() {
    let fixture = Fixture::new(1, |_| {});
    fixture.write("file", "text").unwrap();
    let aside = fixture.base.path().join("aside");
    std::fs::rename(fixture.upper(), aside).unwrap();
    std::fs::create_dir(fixture.upper()).unwrap();
    assert_eq!(errno(fixture.union().seal()), libc::ESTALE);
    assert_eq!(fixture.read("file"), "text");
}
