//! Copies are there whole, with what they were made for, or not at all; and a directory does not notice those of its children.

use std::fs::File;
use std::os::fd::AsFd;
use std::os::unix::fs::PermissionsExt;
use std::sync::{Arc, Mutex};

use super::*;
use crate::cow::attr::attr_of;
use crate::sys::fs::{self, Object};
use crate::sys::xattr;

/// A version 2 capability, which Linux takes away with a change of owner.
pub(super) const CAPABILITY: [u8; 20] = [
    1, 0, 0, 2, 0, 0x20, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0,
];

fn set(fixture: &Fixture, path: &str, set: SetAttr) -> Attr {
    let node = fixture.node(path);
    fixture
        .union()
        .setattr(node, None, &set, &Caller::ROOT)
        .unwrap()
}

fn owner(uid: u32) -> SetAttr {
    SetAttr {
        uid: Some(uid),
        ..SetAttr::default()
    }
}

fn host_xattr(path: &Path, name: &str) -> Option<Vec<u8>> {
    let dir = File::open(path.parent().unwrap()).unwrap();
    let object = Object::Entry(dir.as_fd(), path.file_name().unwrap());
    xattr::get(object, OsStr::new(name)).ok()
}

fn scratch(fixture: &Fixture) -> Vec<OsString> {
    std::fs::read_dir(fixture.base.path().join("work/work"))
        .unwrap()
        .map(|entry| entry.unwrap().file_name())
        .filter(|name| name != "plywood")
        .collect()
}

/// A lower tree with what a change of owner has to keep or take away.
fn lower(dir: &Path) {
    for name in ["plain", "setuid", "capable", "linked", "theirs", "removed"] {
        put(dir.join(name), "text");
    }
    std::fs::hard_link(dir.join("linked"), dir.join("d-linked")).unwrap();
    std::os::unix::fs::symlink("plain", dir.join("symlink")).unwrap();
    std::os::unix::fs::chown(dir.join("theirs"), Some(5), Some(6)).unwrap();
    let mode = |name: &str, mode| {
        std::fs::set_permissions(dir.join(name), PermissionsExt::from_mode(mode)).unwrap();
    };
    mode("plain", 0o640);
    mode("setuid", 0o6755);
    mode("theirs", 0o2604);
    let file = File::open(dir.join("capable")).unwrap();
    let object = Object::Open(file.as_fd());
    for (name, value) in [
        ("security.capability", &CAPABILITY[..]),
        ("user.kept", b"v"),
    ] {
        xattr::set(object, OsStr::new(name), value, 0).unwrap();
    }
}

/// Before Linux 6.13 the clock of file systems goes in steps of up to 10 ms.
fn a_tick() {
    std::thread::sleep(std::time::Duration::from_millis(20));
}

#[test]
fn a_copy_has_its_new_owner_from_the_beginning_whether_the_host_has_files_without_a_name_or_not() {
    for nameless in [true, false] {
        let mut fixture = Fixture::new(1, |lowers| lower(&lowers[0]));
        let upper = fixture.union.as_mut().unwrap().upper.as_mut().unwrap();
        assert!(upper.nameless, "the host of the tests has them");
        upper.nameless = nameless;
        let before = fixture.find("plain").unwrap().attr;
        a_tick();
        let plain = set(&fixture, "plain", owner(7));
        assert_eq!((plain.uid, plain.gid, plain.perm), (7, 0, 0o640));
        assert_eq!((plain.mtime, plain.ino), (before.mtime, before.ino));
        assert!(plain.ctime > before.ctime);
        assert_eq!(set(&fixture, "setuid", owner(7)).perm, 0o755);
        set(&fixture, "capable", owner(7));
        let theirs = set(&fixture, "theirs", owner(7));
        // Without execution by the group it means something else, and stays.
        assert_eq!((theirs.gid, theirs.perm), (6, 0o2604));
        assert_eq!(set(&fixture, "linked", owner(7)).nlink, 2);
        assert_eq!(set(&fixture, "symlink", owner(7)).uid, 7);
        // Removed, but in use.
        let removed = fixture.node("removed");
        fixture.unlink("removed").unwrap();
        let attr = fixture
            .union()
            .setattr(removed, None, &owner(7), &Caller::ROOT)
            .unwrap();
        assert_eq!((attr.uid, attr.nlink), (7, 0));
        assert_eq!(fixture.read_node(removed).unwrap(), "text");
        fixture.union().forget(removed, 2);
        for again in [false, true] {
            let capable = fixture.upper().join("capable");
            assert_eq!(host_xattr(&capable, "security.capability"), None);
            assert_eq!(host_xattr(&capable, "user.kept").unwrap(), b"v");
            let names = ["plain", "setuid", "capable", "theirs", "linked", "d-linked"];
            for name in names.into_iter().chain(["symlink"]) {
                assert_eq!(fixture.find(name).unwrap().attr.uid, 7, "{name} {again}");
            }
            assert_eq!(fixture.read("d-linked"), "text");
            assert_eq!(scratch(&fixture), [""; 0]);
            fixture.check_remount();
        }
    }
}

#[test]
fn a_change_that_fails_copies_nothing() {
    let fixture = Fixture::new(1, |lowers| lower(&lowers[0]));
    let node = fixture.node("capable");
    let name = |name| OsStr::new(name);
    let union = fixture.union();
    let failed = union.setxattr(node, name("user.none"), b"v", SetXattrMode::Replace);
    assert_eq!(errno(failed), libc::ENODATA);
    let failed = union.setxattr(node, name("user.kept"), b"v", SetXattrMode::Create);
    assert_eq!(errno(failed), libc::EEXIST);
    assert!(!fixture.upper().join("capable").exists());
    assert_eq!(scratch(&fixture), [""; 0]);
    union.removexattr(node, name("user.kept")).unwrap();
    let copy = fixture.upper().join("capable");
    assert_eq!(host_xattr(&copy, "user.kept"), None);
    assert_eq!(
        host_xattr(&copy, "security.capability").unwrap(),
        CAPABILITY
    );
}

#[test]
fn a_directory_does_not_notice_that_a_child_is_copied_up() {
    let fixture = Fixture::new(1, |lowers| {
        for name in ["a", "b", "c", "h", "i", "j", "k", "e/f", "e/g"] {
            put(lowers[0].join("d").join(name), "text");
        }
    });
    let told = Arc::new(Mutex::new(Vec::new()));
    let union = fixture.union();
    union.on_side_effect({
        let told = Arc::clone(&told);
        move |node| told.lock().unwrap().push(node)
    });
    let (d, e) = (fixture.node("d"), fixture.node("d/e"));
    let before = union.getattr(d, None).unwrap();
    a_tick();
    set(&fixture, "d/a", owner(7));
    // What whoever keeps attributes has to be told of is the copy of the directory itself, which takes other room.
    assert_eq!(std::mem::take(&mut *told.lock().unwrap()), [d]);
    set(&fixture, "d/b", owner(7));
    set(&fixture, "d/e/f", owner(7));
    set(&fixture, "d/e/g", owner(7));
    assert_eq!(*told.lock().unwrap(), [e]);
    let after = union.getattr(d, None).unwrap();
    assert_eq!(
        (after.atime, after.mtime, after.ctime),
        (before.atime, before.mtime, before.ctime)
    );
    let host =
        || attr_of(&fs::fstat(File::open(fixture.upper().join("d")).unwrap().as_fd()).unwrap());
    assert_eq!((host().atime, host().mtime), (before.atime, before.mtime));
    assert_ne!(host().ctime, before.ctime);
    // What somebody asks for is noticed, also while the host's clock stands still.
    let shown = |ctime| {
        let node = union.node(d).unwrap();
        let state = node.directory.as_ref().unwrap().state.read();
        state.quiet_ctime.shown(ctime)
    };
    let changes: [(&str, &dyn Fn()); 4] = [
        ("d/c", &|| fixture.unlink("d/c").unwrap()),
        ("d/h", &|| fixture.write("d/new", "text").unwrap()),
        ("d/i", &|| {
            set(&fixture, "d", owner(8));
        }),
        ("d/j", &|| {
            let name = OsStr::new("user.new");
            let done = union.setxattr(d, name, b"v", SetXattrMode::Any);
            done.unwrap();
        }),
    ];
    for (child, change) in changes {
        a_tick();
        set(&fixture, child, owner(7));
        let quiet = host().ctime;
        assert_ne!(shown(quiet), quiet);
        change();
        assert_eq!(shown(quiet), quiet, "{child}");
        assert_eq!(union.getattr(d, None).unwrap().ctime, host().ctime);
    }
    a_tick();
    set(&fixture, "d/k", owner(7));
    let quiet = host().ctime;
    fixture.mv("d", "elsewhere");
    assert_eq!(shown(quiet), quiet);
}

#[test]
fn nobody_sees_a_directory_while_a_copy_of_a_child_moves_its_times() {
    const FILES: usize = 300;
    let fixture = Fixture::new(1, |lowers| {
        for n in 0..FILES {
            put(lowers[0].join(format!("d/{n}")), "text");
        }
    });
    set(&fixture, "d/0", owner(7));
    let union = fixture.union();
    let d = fixture.node("d");
    let times = || {
        let attr = union.getattr(d, None).unwrap();
        (attr.mtime, attr.ctime)
    };
    let before = times();
    std::thread::scope(|scope| {
        let copies = scope.spawn(|| {
            for n in 1..FILES {
                set(&fixture, &format!("d/{n}"), owner(7));
            }
        });
        while !copies.is_finished() {
            assert_eq!(times(), before);
        }
    });
    assert_eq!(times(), before);
}
