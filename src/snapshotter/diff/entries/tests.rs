//! What becomes of paths between the moment when they are found to have changed and their turn to be told.
//!
//! A file that went in that while made the whole layer fail, as did a file that was cut while it was read.

use std::fs;
use std::io::{self, Write};
use std::os::unix::fs::MetadataExt;
use std::process::{Command, Stdio};

use super::super::walk::tests::{
    InUse, at, create, find, names, rename, set, unlink, write as write_to,
};
use super::*;
use crate::cow::{Caller, SetAttr};
use crate::snapshotter::tests::{Place, prepare};
use crate::store::layers::Expected;

const OWNER: Owner = Owner::Containerd;

fn mkdir(union: &Union, path: &str) {
    let (parent, name) = at(union, path);
    union.mkdir(parent, name, 0o755, &Caller::ROOT).unwrap();
}

fn rmdir(union: &Union, path: &str) {
    let (parent, name) = at(union, path);
    union.rmdir(parent, name).unwrap();
}

fn symlink(union: &Union, path: &str) {
    let (parent, name) = at(union, path);
    let target = OsStr::new("nowhere");
    union.symlink(parent, name, target, &Caller::ROOT).unwrap();
}

fn chmod(union: &Union, path: &str) {
    let perm = Some(0o700);
    let what = SetAttr {
        perm,
        ..SetAttr::default()
    };
    set(union, path, what);
}

fn cut(union: &Union, path: &str, size: u64) {
    let size = Some(size);
    let what = SetAttr {
        size,
        ..SetAttr::default()
    };
    set(union, path, what);
}

/// Holds a stream to being one that others read, too.
fn check(stream: &[u8], case: &str) {
    let mut tar = Command::new("tar")
        .args(["--list", "--file", "-"])
        .stdin(Stdio::piped())
        .stdout(Stdio::null())
        .spawn()
        .unwrap();
    tar.stdin.take().unwrap().write_all(stream).unwrap();
    assert!(tar.wait().unwrap().success(), "{case}");
    let place = Place::new();
    let work = InUse::new(&place, "packed");
    prepare(&work.snapshots, "copy", Some("packed"));
    let applied = (stream, &Expected::default());
    let applied = work.snapshots.apply_layer(OWNER, "copy", applied, &());
    assert!(applied.is_ok(), "{case}: {applied:?}");
}

type Case = (
    &'static str,
    // Before the changes are found, and after.
    fn(&Union),
    fn(&Union),
    // Names in the layer.
    &'static [&'static str],
);

const CASES: [Case; 12] = [
    (
        "a new file goes",
        |union| create(union, "new"),
        |union| unlink(union, "new"),
        &[],
    ),
    (
        "a file of the image goes",
        |union| write_to(union, "alone"),
        |union| unlink(union, "alone"),
        &[".wh.alone"],
    ),
    (
        "a new symbolic link goes",
        |union| symlink(union, "new"),
        |union| unlink(union, "new"),
        &[],
    ),
    (
        "a new directory goes",
        |union| {
            mkdir(union, "new");
            create(union, "new/file");
            mkdir(union, "new/inside");
            create(union, "new/inside/file");
        },
        |union| {
            unlink(union, "new/file");
            unlink(union, "new/inside/file");
            rmdir(union, "new/inside");
            rmdir(union, "new");
        },
        &[],
    ),
    (
        "a directory of the image goes in which a file was changed",
        |union| write_to(union, "f/deep/x"),
        |union| {
            unlink(union, "f/deep/x");
            rmdir(union, "f/deep");
        },
        &["f/", "f/.wh.deep", "y"],
    ),
    (
        "a directory of the image goes that was changed with a file in it",
        |union| {
            chmod(union, "f");
            create(union, "f/deep/new");
        },
        |union| {
            unlink(union, "f/deep/new");
            unlink(union, "f/deep/x");
            rmdir(union, "f/deep");
            rmdir(union, "f");
        },
        &[".wh.f"],
    ),
    (
        "a file comes to be a directory",
        |union| write_to(union, "alone"),
        |union| {
            unlink(union, "alone");
            mkdir(union, "alone");
            create(union, "alone/new");
        },
        &["alone/"],
    ),
    (
        "a directory comes to be a file",
        |union| {
            chmod(union, "f");
            create(union, "f/deep/new");
        },
        |union| {
            rename(union, "f", "g");
            create(union, "f");
        },
        &["f"],
    ),
    (
        "a directory that was not changed comes to be a file",
        |union| create(union, "f/deep/new"),
        |union| {
            rename(union, "f/deep", "g");
            create(union, "f/deep");
        },
        &["f/", "f/deep"],
    ),
    (
        "a file takes the place of another",
        |union| {
            create(union, "new");
            mkdir(union, "other");
            create(union, "other/new");
        },
        |union| rename(union, "other/new", "new"),
        &["new", "other/"],
    ),
    (
        "a symbolic link comes to be a file",
        |union| symlink(union, "new"),
        |union| {
            unlink(union, "new");
            create(union, "new");
        },
        &["new"],
    ),
    (
        "a name of several goes",
        |union| write_to(union, "d/a"),
        |union| unlink(union, "d/a"),
        &["d/", "d/.wh.a", "d/b", "e/", "e/c = d/b"],
    ),
];

#[test]
fn what_goes_or_comes_to_be_something_else_is_told_as_what_it_is_now() {
    for (case, before, after, expected) in CASES {
        for below in ["packed", "directory"] {
            let place = Place::new();
            let work = InUse::new(&place, below);
            before(&work.union);
            let mut stream = Vec::new();
            work.write(after, &mut stream);
            let told = names(&stream);
            let told = told.iter().map(String::as_str).collect::<Vec<_>>();
            assert_eq!(told, expected, "{case}, {below}");
            check(&stream, case);
        }
    }
}

/// Has something done once so many bytes were written.
struct Midway<F: FnMut()> {
    stream: Vec<u8>,
    at: usize,
    act: Option<F>,
}

impl<F: FnMut()> Write for Midway<F> {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        self.stream.extend_from_slice(bytes);
        if self.stream.len() >= self.at
            && let Some(mut act) = self.act.take()
        {
            act();
        }
        Ok(bytes.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

/// A layer with `change` after so many bytes of it.
fn with_midway(work: &InUse, at: usize, change: impl FnMut()) -> Vec<u8> {
    let mut midway = Midway {
        stream: Vec::new(),
        at,
        act: Some(change),
    };
    work.write(|_| {}, &mut midway);
    assert!(midway.act.is_none());
    midway.stream
}

#[test]
fn a_file_that_is_cut_or_goes_while_it_is_read_has_its_size_or_its_content() {
    const SIZE: usize = 2 << 20;
    type End = fn(&Union);
    let cut: End = |union| cut(union, "large", 300_000);
    let gone: End = |union| unlink(union, "large");
    for (case, change) in [("cut", cut), ("gone", gone)] {
        let place = Place::new();
        let work = InUse::new(&place, "packed");
        create(&work.union, "large");
        create(&work.union, "z");
        let large = find(&work.union, "large");
        let content = vec![b'1'; SIZE];
        for (part, bytes) in content.chunks(1 << 20).enumerate() {
            let at = (part << 20) as u64;
            work.union.write(large, None, at, bytes, None).unwrap();
        }
        let stream = with_midway(&work, 1 << 20, || change(&work.union));
        assert_eq!(names(&stream), ["large", "z"].map(str::to_owned), "{case}");
        let mut archive = tar::Archive::new(&*stream);
        let mut entry = archive.entries().unwrap().next().unwrap().unwrap();
        let mut read = Vec::new();
        io::Read::read_to_end(&mut entry, &mut read).unwrap();
        assert_eq!(read.len(), SIZE, "{case}");
        let count = read.iter().take_while(|&&byte| byte == b'1').count();
        match case {
            "gone" => assert_eq!(count, SIZE),
            _ => assert!((1 << 19..SIZE).contains(&count), "{count}"),
        }
        assert!(read[count..].iter().all(|&byte| byte == 0), "{case}");
        check(&stream, case);
    }
}

/// Nothing may be said of what is below a directory that is none, and what was told of one before it went stays.
#[test]
fn a_directory_that_goes_once_it_was_told_is_empty() {
    let place = Place::new();
    let work = InUse::new(&place, "packed");
    chmod(&work.union, "f");
    create(&work.union, "f/a-new");
    unlink(&work.union, "f/deep/x");
    create(&work.union, "f/deep/new");
    let stream = with_midway(&work, 512, || {
        for file in ["f/a-new", "f/deep/new"] {
            unlink(&work.union, file);
        }
        rmdir(&work.union, "f/deep");
        rmdir(&work.union, "f");
    });
    assert_eq!(names(&stream), ["f/", "f/.wh.deep"].map(str::to_owned));
    check(&stream, "");
}

/// A file that had the number of one that was told, and was gone since, was told as a link of it, with its content.
#[test]
fn a_file_with_the_number_of_another_that_has_gone_is_no_link_of_it() {
    let place = Place::new();
    let work = InUse::new(&place, "packed");
    let upper = work.snapshots.stat(OWNER, "work").unwrap().upper_dir;
    let upper = upper.unwrap();
    let at = |name: &str| upper.join(name);
    let write = |name: &str| fs::write(at(name), name).unwrap();
    let number = |name: &str| fs::metadata(at(name)).unwrap().ino();
    for name in ["a", "b", "c", "taken"] {
        write(name);
    }
    for (name, other) in [("a", "a-too"), ("c", "d")] {
        fs::hard_link(at(name), at(other)).unwrap();
    }
    let first = number("a");
    // At the header of `b`.
    let stream = with_midway(&work, 2048, || {
        for name in ["a", "a-too", "c", "d", "taken"] {
            fs::remove_file(at(name)).unwrap();
        }
        let is_it = |name: &String| {
            write(name);
            number(name) == first
        };
        let found = (0..1000).map(|number| format!("new-{number}")).find(is_it);
        // Some file systems give no number twice.
        let name = found.unwrap_or_else(|| "new-0".to_owned());
        fs::rename(at(&name), at("c")).unwrap();
        fs::hard_link(at("c"), at("d")).unwrap();
    });
    assert_eq!(names(&stream), ["a", "a-too = a", "b", "c", "d = c"]);
}
