//! What changes no data copies none.

use std::os::unix::fs::{MetadataExt, PermissionsExt};

use super::*;
use crate::sys::fs::Object;
use crate::sys::xattr;

const SIZE: usize = 3 << 20;

fn content(seed: u8) -> String {
    let lines = (0u32..).map(|n| format!("{seed} {n}\n"));
    let mut text: String = lines.take(SIZE / 8).collect();
    text.truncate(SIZE);
    text
}

fn mark(path: &Path, name: &str) -> Option<Vec<u8>> {
    let dir = std::fs::File::open(path.parent().unwrap()).unwrap();
    let object = Object::Entry(std::os::fd::AsFd::as_fd(&dir), path.file_name().unwrap());
    xattr::get(object, OsStr::new(name)).ok()
}

fn is_metacopy(path: &Path) -> bool {
    mark(path, "trusted.overlay.metacopy").is_some()
}

fn read_all(fixture: &Fixture, path: &str) -> String {
    let node = fixture.node(path);
    let mut buf = vec![0; SIZE + 100];
    let n = fixture.union().read(node, None, 0, &mut buf).unwrap();
    buf.truncate(n);
    String::from_utf8(buf).unwrap()
}

fn chmod(fixture: &Fixture, path: &str, perm: u16) -> Attr {
    let set = SetAttr {
        perm: Some(perm),
        ..SetAttr::default()
    };
    let node = fixture.node(path);
    fixture
        .union()
        .setattr(node, None, &set, &Caller::ROOT)
        .unwrap()
}

#[test]
fn attributes_and_names_change_without_a_copy_of_the_data() {
    let names = ["mode", "owner", "times", "xattr", "old", "d/linked"];
    let mut fixture = Fixture::new(2, |lowers| {
        for (n, name) in (0..).zip(names) {
            put(lowers[n % 2].join(name), &content(n as u8));
            std::fs::set_permissions(
                lowers[n % 2].join(name),
                std::fs::Permissions::from_mode(0o644),
            )
            .unwrap();
        }
    });
    let blocks = fixture.find("mode").unwrap().attr.blocks;
    let union = fixture.union();
    assert_eq!(chmod(&fixture, "mode", 0o600).blocks, blocks);
    for (path, set) in [
        (
            "owner",
            SetAttr {
                uid: Some(7),
                ..SetAttr::default()
            },
        ),
        (
            "times",
            SetAttr {
                mtime: Some(SetTime::At(Timestamp { sec: 5, nsec: 6 })),
                ..SetAttr::default()
            },
        ),
    ] {
        union
            .setattr(fixture.node(path), None, &set, &Caller::ROOT)
            .unwrap();
    }
    let name = OsStr::new("user.new");
    union
        .setxattr(fixture.node("xattr"), name, b"v", SetXattrMode::Any)
        .unwrap();
    fixture.mv("old", "d/new");
    fixture.link("d/linked", "also").unwrap();
    let seen = ["mode", "owner", "times", "xattr", "d/new", "also"];
    for remounted in [false, true] {
        for (n, path) in (0..).zip(seen) {
            let copy = fixture.upper().join(path);
            assert!(is_metacopy(&copy), "{path}");
            let stat = std::fs::metadata(&copy).unwrap();
            // An attribute may need a block.
            assert!(stat.blocks() <= 8, "{path}: {}", stat.blocks());
            assert_eq!(stat.size(), SIZE as u64);
            assert!(read_all(&fixture, path) == content(n), "{path} {remounted}");
        }
        fixture.reopen();
    }
    assert_eq!(fixture.find("mode").unwrap().attr.perm, 0o600);
    assert_eq!(fixture.find("owner").unwrap().attr.uid, 7);
    assert_eq!(fixture.find("times").unwrap().attr.mtime.sec, 5);
    assert_eq!(fixture.find("also").unwrap().attr.nlink, 2);
    // Again under another name, and the directory of it too.
    fixture.mv("d/new", "d/newer");
    fixture.mv("d", "e");
    fixture.reopen();
    assert!(read_all(&fixture, "e/newer") == content(4));
    assert!(read_all(&fixture, "e/linked") == content(5));
}

#[test]
fn the_data_comes_with_the_first_change_of_it() {
    let mut fixture = Fixture::new(1, |lowers| {
        for name in ["write", "cut", "grow", "empty"] {
            put(lowers[0].join(name), &content(1));
        }
    });
    for name in ["write", "cut", "grow", "empty"] {
        chmod(&fixture, name, 0o640);
    }
    let node = fixture.node("write");
    let union = fixture.union();
    let handle = union.open_file(node, libc::O_RDWR, &Caller::ROOT).unwrap();
    union.write(node, Some(&handle), 5, b"HELLO", None).unwrap();
    union.release(node, handle);
    for (name, size) in [("cut", 1000), ("grow", SIZE as u64 + 50), ("empty", 0)] {
        let set = SetAttr {
            size: Some(size),
            ..SetAttr::default()
        };
        let attr = union
            .setattr(fixture.node(name), None, &set, &Caller::ROOT)
            .unwrap();
        assert_eq!((attr.size, attr.perm), (size, 0o640));
    }
    for _ in 0..2 {
        let mut written = content(1);
        written.replace_range(5..10, "HELLO");
        assert!(read_all(&fixture, "write") == written);
        assert!(read_all(&fixture, "cut") == content(1)[..1000]);
        assert!(read_all(&fixture, "grow") == content(1) + &"\0".repeat(50));
        assert!(read_all(&fixture, "empty").is_empty());
        fixture.union().complete().unwrap();
        for name in ["write", "cut", "grow", "empty"] {
            assert!(!is_metacopy(&fixture.upper().join(name)), "{name}");
        }
        fixture.reopen();
    }
}

#[test]
fn all_names_of_a_lower_file_share_a_copy_without_data() {
    let mut fixture = Fixture::new(1, |lowers| {
        put(lowers[0].join("a"), &content(1));
        std::fs::create_dir(lowers[0].join("d")).unwrap();
        std::fs::hard_link(lowers[0].join("a"), lowers[0].join("d/b")).unwrap();
        std::fs::hard_link(lowers[0].join("a"), lowers[0].join("c")).unwrap();
    });
    chmod(&fixture, "a", 0o604);
    // A name that is not in the upper leads to the copy, and its data to the lower.
    for name in ["d/b", "c", "a"] {
        fixture.reopen();
        assert!(read_all(&fixture, name) == content(1), "{name}");
        assert_eq!(fixture.find(name).unwrap().attr.perm, 0o604);
    }
    fixture.reopen();
    fixture.mv("d/b", "d/moved");
    fixture.check_remount();
    assert!(read_all(&fixture, "d/moved") == content(1));
    let node = fixture.node("c");
    fixture.union().write(node, None, 0, b"W", None).unwrap();
    fixture.reopen();
    for name in ["a", "d/moved", "c"] {
        assert!(read_all(&fixture, name).starts_with("W "), "{name}");
    }
}

#[test]
fn a_file_that_only_the_index_has_is_completed_too() {
    let mut fixture = Fixture::new(1, |lowers| {
        put(lowers[0].join("a"), &content(1));
        std::fs::hard_link(lowers[0].join("a"), lowers[0].join("b")).unwrap();
    });
    chmod(&fixture, "a", 0o604);
    fixture.unlink("a").unwrap();
    fixture.reopen();
    fixture.union().settle_links().unwrap();
    fixture.union().complete().unwrap();
    let path = fixture.upper().join("b");
    assert!(!is_metacopy(&path));
    assert!(std::fs::read_to_string(&path).unwrap() == content(1));
}

#[test]
fn a_completed_upper_needs_no_lower() {
    needs_no_lower_after(Union::complete);
}

#[test]
fn at_its_end_a_mount_brings_up_data_that_is_little() {
    needs_no_lower_after(Union::complete_little);
    let mut fixture = Fixture::new(1, |lowers| {
        put(lowers[0].join("a"), &content(1));
        std::fs::hard_link(lowers[0].join("a"), lowers[0].join("b")).unwrap();
        let large = std::fs::File::create(lowers[0].join("large")).unwrap();
        large.set_len(65 << 20).unwrap();
    });
    chmod(&fixture, "a", 0o604);
    fixture.mv("b", "c");
    fixture.union().complete_little().unwrap();
    for name in ["a", "c"] {
        assert!(!is_metacopy(&fixture.upper().join(name)), "{name}");
    }
    assert!(!may_hold_metacopies(&fixture.upper(), XattrFamily::Trusted).unwrap());
    fixture.check_remount();
    assert!(read_all(&fixture, "c") == content(1));
    // What is more than little is left as it is, all of it.
    chmod(&fixture, "large", 0o604);
    fixture.union().complete_little().unwrap();
    assert!(is_metacopy(&fixture.upper().join("large")));
    assert!(may_hold_metacopies(&fixture.upper(), XattrFamily::Trusted).unwrap());
}

#[test]
fn an_end_that_fails_leaves_no_node() {
    let mut fixture = Fixture::new(1, |lowers| {
        for name in ["a", "d/b", "z"] {
            put(lowers[0].join(name), &content(1));
        }
    });
    for name in ["a", "d/b", "z"] {
        chmod(&fixture, name, 0o604);
    }
    fixture.reopen();
    let seen = [fixture.node("d/b"), fixture.node("d")];
    std::fs::remove_file(fixture.lowers[0].join("d/b")).unwrap();
    let completions: [fn(&Union) -> Result<()>; 2] = [Union::complete_little, Union::complete];
    for complete in completions {
        assert_ne!(errno(complete(fixture.union())), 0);
    }
    for node in seen {
        fixture.union().forget(node, 2);
    }
    let left = fixture.union().table.all();
    assert_eq!(left.len(), 1, "{:?}", left[1].name().map(|name| name.name));
}

fn needs_no_lower_after(complete: fn(&Union) -> Result<()>) {
    let mut fixture = Fixture::new(2, |lowers| {
        for name in ["a", "d/e/f", "d/cap"] {
            put(lowers[1].join(name), &content(1));
        }
        put(lowers[0].join("d/other"), "x");
    });
    let capability = [
        1, 0, 0, 2, 0, 0x20, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0,
    ];
    let name = OsStr::new("security.capability");
    let node = fixture.node("d/cap");
    let union = fixture.union();
    union
        .setxattr(node, name, &capability, SetXattrMode::Any)
        .unwrap();
    chmod(&fixture, "a", 0o4755);
    chmod(&fixture, "d/e/f", 0o600);
    fixture.mv("d/e/f", "d/g");
    fixture.reopen();
    assert!(may_hold_metacopies(&fixture.upper(), XattrFamily::Trusted).unwrap());
    let before = fixture.tree_of_attributes();
    complete(fixture.union()).unwrap();
    fixture.reopen();
    assert_eq!(fixture.tree_of_attributes(), before);
    for name in ["a", "d/g", "d/cap"] {
        let path = fixture.upper().join(name);
        assert!(!is_metacopy(&path));
        assert!(mark(&path, "trusted.overlay.redirect").is_none());
        assert!(
            std::fs::read_to_string(&path).unwrap() == content(1),
            "{name}"
        );
    }
    let kept = mark(&fixture.upper().join("d/cap"), "security.capability");
    assert_eq!(kept.unwrap(), capability);
}

#[test]
fn reading_moves_the_access_time_of_a_copy_without_data() {
    let fixture = Fixture::new(1, |lowers| put(lowers[0].join("f"), "text"));
    chmod(&fixture, "f", 0o640);
    let old = SetTime::At(Timestamp { sec: 5, nsec: 0 });
    let set = SetAttr {
        atime: Some(old),
        ..SetAttr::default()
    };
    let node = fixture.node("f");
    let union = fixture.union();
    let before = union.setattr(node, None, &set, &Caller::ROOT).unwrap();
    fixture.read("f");
    let moved = union.getattr(node, None).unwrap();
    assert!(moved.atime > moved.mtime);
    assert_eq!(moved.ctime, before.ctime);
    union.setattr(node, None, &set, &Caller::ROOT).unwrap();
    fixture.read("f");
    assert!(union.getattr(node, None).unwrap().atime > moved.atime);
    assert!(is_metacopy(&fixture.upper().join("f")));
}

#[test]
fn without_metacopies_everything_is_copied() {
    let mut fixture = Fixture::new(1, |lowers| put(lowers[0].join("f"), "text"));
    fixture.union = None;
    let config = UnionConfig {
        no_metacopy: true,
        ..fixture.config()
    };
    fixture.union = Some(Union::open(config).unwrap());
    chmod(&fixture, "f", 0o640);
    assert!(!is_metacopy(&fixture.upper().join("f")));
    assert!(!may_hold_metacopies(&fixture.upper(), XattrFamily::Trusted).unwrap());
    assert_eq!(fixture.read("f"), "text");
}

/// They were read as zeros, and a write copied these up.
#[test]
fn a_lower_file_of_which_no_layer_has_the_data_is_an_error() {
    let mut fixture = Fixture::new(1, |lowers| {
        put(lowers[0].join("d/f"), "text");
        put(lowers[0].join("d/g"), "text");
        put(lowers[0].join("d/whole"), "text");
    });
    chmod(&fixture, "d/f", 0o640);
    chmod(&fixture, "d/g", 0o640);
    fixture.mv("d/g", "d/moved");
    fixture.union = None;
    let (layer, data) = (fixture.upper(), fixture.lowers[0].clone());
    let empty = fixture.base.path().join("empty");
    std::fs::create_dir(&empty).unwrap();
    let of_layers = |lowers: Vec<PathBuf>| {
        Union::open(UnionConfig {
            lowers,
            upper: None,
            ..fixture.config()
        })
        .unwrap()
    };
    for lowers in [vec![layer.clone()], vec![layer.clone(), empty]] {
        let union = of_layers(lowers);
        let dir = union.lookup(NodeId::ROOT, OsStr::new("d")).unwrap().node;
        for name in ["f", "moved"] {
            let found = union.lookup(dir, OsStr::new(name)).unwrap();
            assert_eq!((found.attr.size, found.attr.perm), (4, 0o640));
            let read = union.read(found.node, None, 0, &mut [0; 8]);
            assert_eq!(errno(read), libc::EIO);
        }
    }
    let union = of_layers(vec![layer.clone(), data]);
    let dir = union.lookup(NodeId::ROOT, OsStr::new("d")).unwrap().node;
    for name in ["f", "moved", "whole"] {
        let node = union.lookup(dir, OsStr::new(name)).unwrap().node;
        let mut buf = [0; 8];
        assert_eq!(union.read(node, None, 0, &mut buf).unwrap(), 4);
        assert_eq!(&buf[..4], b"text");
    }
}
