//! Depth and number have no limit but memory.

use std::os::fd::AsFd;

use super::*;
use crate::sys::fs;

const DEPTH: usize = 700;
const NAME: &str = "a-name-of-some-length";

/// Makes a chain of directories longer than any path may be.
fn deep(top: &Path) {
    let mut dir = fs::open_path(top, libc::O_RDONLY).unwrap();
    for _ in 0..DEPTH {
        fs::mkdirat(dir.as_fd(), OsStr::new(NAME), 0o755).unwrap();
        dir = fs::openat(dir.as_fd(), OsStr::new(NAME), libc::O_RDONLY, 0).unwrap();
    }
    let flags = libc::O_CREAT | libc::O_WRONLY;
    fs::openat(dir.as_fd(), OsStr::new("file"), flags, 0o644).unwrap();
}

#[test]
fn trees_deeper_than_a_path_work_with_few_descriptors() {
    let mut fixture = Fixture::new(1, |lowers| deep(&lowers[0]));
    fixture.union = None;
    let union = Union::open_keeping(fixture.config(), 32).unwrap();
    fixture.union = Some(union);
    let union = fixture.union();
    let bottom = |start: &str| {
        let mut at = union.lookup(NodeId::ROOT, OsStr::new(start)).unwrap().node;
        for _ in 1..DEPTH {
            at = union.lookup(at, OsStr::new(NAME)).unwrap().node;
        }
        at
    };
    let dir = bottom(NAME);
    let file = union.lookup(dir, OsStr::new("file")).unwrap().node;
    union.write(file, None, 0, b"deep", None).unwrap();
    union
        .rename(
            NodeId::ROOT,
            OsStr::new(NAME),
            NodeId::ROOT,
            OsStr::new("moved"),
            RenameMode::Replace,
        )
        .unwrap();
    union
        .mkdir(dir, OsStr::new("new"), 0o755, &Caller::ROOT)
        .unwrap();
    assert_eq!(fixture.read_node(file).unwrap(), "deep");
    assert!(union.budget.held() <= 32);
    fixture.union = None;
    fixture.union = Some(Union::open_keeping(fixture.config(), 32).unwrap());
    let union = fixture.union();
    let mut at = union
        .lookup(NodeId::ROOT, OsStr::new("moved"))
        .unwrap()
        .node;
    for _ in 1..DEPTH {
        at = union.lookup(at, OsStr::new(NAME)).unwrap().node;
    }
    assert_eq!(union.lookup(at, OsStr::new("file")).unwrap().node, file);
    union.lookup(at, OsStr::new("new")).unwrap();
}

#[test]
fn many_open_and_many_removed_files_need_few_descriptors() {
    const FILES: usize = 400;
    let mut fixture = Fixture::new(1, |lowers| {
        for n in 0..FILES {
            put(lowers[0].join(format!("d{}/f{n}", n % 50)), &n.to_string());
        }
    });
    fixture.union = None;
    fixture.union = Some(Union::open_keeping(fixture.config(), 64).unwrap());
    let union = fixture.union();
    let mut open = Vec::new();
    for n in 0..FILES {
        let path = format!("d{}/f{n}", n % 50);
        let node = fixture.node(&path);
        let handle = union.open_file(node, libc::O_RDWR, &Caller::ROOT).unwrap();
        union
            .write(node, Some(&handle), 0, format!("+{n}").as_bytes(), None)
            .unwrap();
        fixture.unlink(&path).unwrap();
        open.push((node, handle));
    }
    assert!(union.budget.held() <= 64);
    for (n, (node, handle)) in open.into_iter().enumerate() {
        assert_eq!(fixture.read_node(node).unwrap(), format!("+{n}"));
        let attr = union.getattr(node, Some(&handle)).unwrap();
        assert_eq!(attr.nlink, 0);
        union.release(node, handle);
        union.forget(node, 1);
    }
    let left = std::fs::read_dir(fixture.base.path().join("work/work"))
        .unwrap()
        .map(|entry| entry.unwrap().file_name())
        // It tells that nobody else has used the work directory.
        .filter(|name| name != "plywood")
        .count();
    assert_eq!(left, 0);
}

#[test]
fn a_union_keeps_few_descriptors_unless_more_are_granted() {
    let fixture = Fixture::new(1, |lowers| {
        for number in 0..400 {
            let dir = lowers[0].join(number.to_string());
            std::fs::create_dir(&dir).unwrap();
            std::fs::write(dir.join("file"), "1").unwrap();
        }
    });
    let union = fixture.union();
    for number in 0..400 {
        let name = number.to_string();
        let dir = union.lookup(NodeId::ROOT, OsStr::new(&name)).unwrap().node;
        let file = union.lookup(dir, OsStr::new("file")).unwrap().node;
        assert_eq!(fixture.read_node(file).unwrap(), "1");
        union.write(file, None, 0, b"2", None).unwrap();
        assert!(union.budget.held() <= 128);
    }
}
