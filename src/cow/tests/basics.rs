//! Reading, writing, making, removing and moving, one rule at a time.

use std::os::fd::AsFd;

use nix::mount::{MntFlags, MsFlags, umount2};

use super::file::UnderWay;
use super::node::Gathered;
use super::*;

#[test]
fn the_topmost_layer_wins_and_directories_merge() {
    let fixture = Fixture::new(3, |lowers| {
        put(lowers[0].join("d/a"), "top");
        put(lowers[1].join("d/a"), "middle");
        put(lowers[1].join("d/b"), "middle");
        put(lowers[2].join("d/c"), "bottom");
    });
    assert_eq!(fixture.list("d"), ["a", "b", "c"]);
    assert_eq!(fixture.read("d/a"), "top");
    assert_eq!(fixture.read("d/c"), "bottom");
    assert_eq!(errno(fixture.find("d/x")), libc::ENOENT);
    assert_eq!(errno(fixture.find("d/a/x")), libc::ENOTDIR);
}

#[test]
fn a_write_copies_up_and_leaves_the_lower_alone() {
    let mut fixture = Fixture::new(1, |lowers| put(lowers[0].join("d/e/f"), "old"));
    let before = fixture.find("d/e/f").unwrap();
    fixture.write("d/e/f", "new!").unwrap();
    let after = fixture.find("d/e/f").unwrap();
    assert_eq!(after.node, before.node);
    assert_eq!(fixture.read("d/e/f"), "new!");
    assert_eq!(
        std::fs::read(fixture.lowers[0].join("d/e/f")).unwrap(),
        b"old"
    );
    assert_eq!(fixture.list("d/e"), ["f"]);
    fixture.check_remount();
}

#[test]
fn what_the_kernel_has_gathered_moves_no_time_of_change() {
    let fixture = Fixture::new(1, |lowers| put(lowers[0].join("f"), "old"));
    let (union, id) = (fixture.union(), fixture.node("f"));
    let mtime = || union.getattr(id, None).unwrap().mtime;
    let set = |sec| {
        let mtime = Timestamp { sec, nsec: 7 };
        let set = SetAttr {
            mtime: Some(SetTime::At(mtime)),
            ..SetAttr::default()
        };
        union.setattr(id, None, &set, &Caller::ROOT).unwrap();
        mtime
    };
    let gather = || assert_eq!(union.write_gathered(id, 0, b"new", None).unwrap(), 3);
    let below = mtime();
    gather();
    assert_eq!((mtime(), &*fixture.read("f")), (below, "new"));
    let told = set(1000);
    gather();
    assert_eq!(mtime(), told);
    // Another one is under way, and has moved the time already.
    let node = union.table.get(id).unwrap();
    *node.attributes.lock() = Some(Box::new(Gathered {
        writes: 1,
        mtime: told,
    }));
    union.write(id, None, 0, b"old", None).unwrap();
    assert_ne!(mtime(), told);
    gather();
    assert_eq!(mtime(), told);
    let told = set(2000);
    union.write(id, None, 0, b"old", None).unwrap();
    gather();
    assert_eq!(mtime(), told);
    *node.attributes.lock() = None;
    union.write(id, None, 0, b"old", None).unwrap();
    gather();
    assert_ne!(mtime(), told);
}

#[test]
fn a_gathered_write_that_panics_is_not_under_way_any_more() {
    let fixture = Fixture::new(1, |lowers| put(lowers[0].join("f"), "old"));
    let (union, id) = (fixture.union(), fixture.node("f"));
    union.write_gathered(id, 0, b"new", None).unwrap();
    let node = union.node(id).unwrap();
    let backing = union.io(&node, true).unwrap();
    let panicked = std::panic::catch_unwind(std::panic::AssertUnwindSafe(|| {
        let _under_way = UnderWay::begin(&node, backing.upper_fd().unwrap()).unwrap();
        assert!(node.attributes.lock().is_some());
        panic!("as it should");
    }));
    assert!(panicked.is_err());
    assert!(node.attributes.lock().is_none());
}

#[test]
fn a_removed_object_is_not_found_by_its_number_while_its_forget_is_under_way() {
    let fixture = Fixture::new(1, |lowers| {
        put(lowers[0].join("d/f"), "old");
        put(lowers[0].join("e/f"), "old");
    });
    let union = fixture.union();
    let by_number = |node| union.lookup(node, OsStr::new("."));
    let (file, dir) = (fixture.find("d/f").unwrap(), fixture.find("d").unwrap());
    assert_eq!(by_number(file.node).unwrap().attr.size, 3);
    fixture.unlink("d/f").unwrap();
    fixture.rmdir("d").unwrap();
    for removed in [file, dir] {
        assert_eq!(errno(by_number(removed.node)), libc::ENOENT);
        assert_eq!(union.getattr(removed.node, None).unwrap().nlink, 0);
    }
}

#[test]
fn removed_lower_names_leave_whiteouts_and_upper_ones_nothing() {
    let mut fixture = Fixture::new(2, |lowers| {
        put(lowers[0].join("d/a"), "0");
        put(lowers[1].join("d/a"), "1");
        put(lowers[1].join("d/sub/x"), "1");
    });
    fixture.unlink("d/a").unwrap();
    assert!(is_whiteout(fixture.upper().join("d/a")));
    assert_eq!(errno(fixture.rmdir("d/sub")), libc::ENOTEMPTY);
    fixture.unlink("d/sub/x").unwrap();
    fixture.rmdir("d/sub").unwrap();
    assert!(is_whiteout(fixture.upper().join("d/sub")));
    assert!(fixture.list("d").is_empty());
    fixture.write("d/new", "").unwrap();
    fixture.unlink("d/new").unwrap();
    assert!(!fixture.upper().join("d/new").exists());
    fixture.check_remount();
    fixture.write("d/a", "again").unwrap();
    fixture.mkdir("d/sub").unwrap();
    assert!(fixture.list("d/sub").is_empty());
    fixture.check_remount();
    fixture.rmdir("d/sub").unwrap();
    fixture.unlink("d/a").unwrap();
    fixture.rmdir("d").unwrap();
    assert!(is_whiteout(fixture.upper().join("d")));
    assert!(fixture.list("").is_empty());
    fixture.check_remount();
}

#[test]
fn a_renamed_lower_directory_keeps_its_children() {
    let mut fixture = Fixture::new(2, |lowers| {
        put(lowers[0].join("a/b/c"), "c0");
        put(lowers[1].join("a/b/d"), "d1");
        put(lowers[1].join("t/keep"), "t");
    });
    let number = fixture.node("a/b");
    fixture.mv("a/b", "t/moved");
    assert_eq!(fixture.node("t/moved"), number);
    assert_eq!(fixture.list("t/moved"), ["c", "d"]);
    fixture.check_remount();
    fixture.mv("t", "u");
    fixture.mv("u/moved", "back");
    assert_eq!(fixture.list("back"), ["c", "d"]);
    assert!(fixture.list("a").is_empty());
    fixture.check_remount();
    fixture.mkdir("a/b").unwrap();
    assert!(fixture.list("a/b").is_empty());
    fixture.check_remount();
}

#[test]
fn a_directory_over_an_emptied_one_hides_what_is_below() {
    let mut fixture = Fixture::new(1, |lowers| {
        put(lowers[0].join("old/x"), "x");
        put(lowers[0].join("other/y"), "y");
    });
    fixture.unlink("old/x").unwrap();
    fixture.mkdir("new").unwrap();
    fixture.write("new/z", "z").unwrap();
    fixture.mv("new", "old");
    assert_eq!(fixture.list("old"), ["z"]);
    fixture.check_remount();
    fixture
        .rename("old", "other", RenameMode::Exchange)
        .unwrap();
    assert_eq!(fixture.list("old"), ["y"]);
    assert_eq!(fixture.list("other"), ["z"]);
    fixture.check_remount();
    assert_eq!(
        errno(fixture.rename("old", "old/in", RenameMode::Replace)),
        libc::EINVAL
    );
    assert_eq!(
        errno(fixture.rename("old", "other", RenameMode::Replace)),
        libc::ENOTEMPTY
    );
    assert_eq!(
        errno(fixture.rename("old", "other", RenameMode::NoReplace)),
        libc::EEXIST
    );
}

#[test]
fn all_names_of_a_lower_file_stay_one_file() {
    let mut fixture = Fixture::new(1, |lowers| {
        put(lowers[0].join("a"), "text");
        std::fs::hard_link(lowers[0].join("a"), lowers[0].join("b")).unwrap();
        std::fs::hard_link(lowers[0].join("a"), lowers[0].join("c")).unwrap();
    });
    assert_eq!(fixture.node("a"), fixture.node("b"));
    fixture.write("a", "changed").unwrap();
    assert_eq!(fixture.read("b"), "changed");
    assert_eq!(fixture.find("c").unwrap().attr.nlink, 3);
    fixture.check_remount();
    assert_eq!(fixture.read("c"), "changed");
    fixture.link("b", "d").unwrap();
    assert_eq!(fixture.find("d").unwrap().attr.nlink, 4);
    fixture.check_remount();
    fixture.unlink("b").unwrap();
    fixture.mv("c", "e");
    assert_eq!(fixture.find("e").unwrap().attr.nlink, 3);
    fixture.check_remount();
    for name in ["a", "d"] {
        fixture.unlink(name).unwrap();
    }
    fixture.check_remount();
    assert_eq!(fixture.find("e").unwrap().attr.nlink, 1);
    fixture.unlink("e").unwrap();
    fixture.check_remount();
    fixture.write("b", "fresh").unwrap();
    assert_eq!(fixture.find("b").unwrap().attr.nlink, 1);
    fixture.check_remount();
}

#[test]
fn an_upper_with_settled_links_stands_without_its_work_directory() {
    let mut fixture = Fixture::new(1, |lowers| {
        put(lowers[0].join("x/a"), "text");
        std::fs::create_dir(lowers[0].join("y")).unwrap();
        for name in ["x/b", "y/c", "y/gone"] {
            std::fs::hard_link(lowers[0].join("x/a"), lowers[0].join(name)).unwrap();
        }
    });
    fixture.link("x/b", "d").unwrap();
    fixture.unlink("y/gone").unwrap();
    let time = fixture.find("y").unwrap().attr.mtime;
    fixture.union().settle_links().unwrap();
    assert_eq!(fixture.find("y").unwrap().attr.mtime, time);
    let before = fixture.tree();
    fixture.union = None;
    // The upper becomes the topmost lower, below an empty one.
    std::fs::remove_dir_all(fixture.base.path().join("work")).unwrap();
    std::fs::create_dir(fixture.base.path().join("work")).unwrap();
    let committed = fixture.base.path().join("committed");
    std::fs::rename(fixture.upper(), &committed).unwrap();
    std::fs::create_dir(fixture.upper()).unwrap();
    fixture.lowers.insert(0, committed);
    fixture.reopen();
    assert_eq!(fixture.find("d").unwrap().attr.nlink, 4);
    let numberless = |tree: BTreeMap<String, String>| -> Vec<(String, Vec<String>)> {
        let words = |text: String| text.split(' ').map(str::to_owned).collect::<Vec<_>>();
        tree.into_iter()
            .map(|(path, text)| (path, words(text)))
            .map(|(path, mut words)| {
                words.remove(1);
                (path, words)
            })
            .collect()
    };
    assert_eq!(numberless(fixture.tree()), numberless(before));
    let node = fixture.node("d");
    for name in ["x/a", "x/b", "y/c"] {
        assert_eq!(fixture.node(name), node);
    }
}

#[test]
fn a_removed_file_lives_until_it_is_forgotten() {
    let fixture = Fixture::new(1, |lowers| put(lowers[0].join("low"), "low"));
    fixture.write("up", "up").unwrap();
    for (name, text) in [("low", "low"), ("up", "up")] {
        let entry = fixture.find(name).unwrap();
        fixture.unlink(name).unwrap();
        assert_eq!(fixture.read_node(entry.node).unwrap(), text);
        assert_eq!(fixture.union().getattr(entry.node, None).unwrap().nlink, 0);
        fixture
            .union()
            .write(entry.node, None, 0, b"X", None)
            .unwrap();
        assert_eq!(&fixture.read_node(entry.node).unwrap()[..1], "X");
        assert_eq!(fixture.union().getattr(entry.node, None).unwrap().nlink, 0);
    }
    assert!(fixture.list("").is_empty());
}

#[test]
fn forgotten_nodes_leave_the_table() {
    let fixture = Fixture::new(1, |lowers| put(lowers[0].join("d/e/f"), "f"));
    let union = fixture.union();
    for _ in 0..3 {
        let d = union.lookup(NodeId::ROOT, OsStr::new("d")).unwrap().node;
        let e = union.lookup(d, OsStr::new("e")).unwrap().node;
        let f = union.lookup(e, OsStr::new("f")).unwrap().node;
        assert_eq!(union.table.all().len(), 4);
        union.forget(d, 1);
        union.forget(e, 1);
        assert_eq!(union.table.all().len(), 4);
        union.forget(f, 1);
        assert_eq!(union.table.all().len(), 1);
    }
}

#[test]
fn marks_cannot_be_forged() {
    let mut fixture = Fixture::new(1, |lowers| put(lowers[0].join("d/a"), "a"));
    let d = fixture.node("d");
    let name = OsStr::new("trusted.overlay.opaque");
    fixture
        .union()
        .setxattr(d, name, b"y", SetXattrMode::Any)
        .unwrap();
    fixture.check_remount();
    assert_eq!(fixture.list("d"), ["a"]);
    let d = fixture.node("d");
    assert_eq!(fixture.union().getxattr(d, name).unwrap(), b"y");
    assert_eq!(fixture.union().listxattr(d).unwrap(), [name]);
    let made = fixture
        .union()
        .mknod(d, OsStr::new("w"), libc::S_IFCHR, 0, &Caller::ROOT);
    assert_eq!(errno(made), libc::EPERM);
    for name in [".wh.a", ".wh..wh..opq"] {
        fixture.write(&format!("d/{name}"), "plain").unwrap();
    }
    fixture.check_remount();
    assert_eq!(fixture.list("d"), [".wh..wh..opq", ".wh.a", "a"]);
}

#[test]
fn every_dialect_of_whiteout_is_read_in_a_lower() {
    let mut fixture = Fixture::new(2, |lowers| {
        for name in ["a", "b", "o/x", "f/x", "r/x"] {
            put(lowers[1].join(name), "below");
        }
        put(lowers[0].join(".wh.a"), "");
        put(lowers[0].join(".wh.file"), "somebody's");
        nix::sys::stat::mknod(
            &lowers[0].join("b"),
            nix::sys::stat::SFlag::S_IFCHR,
            nix::sys::stat::Mode::empty(),
            0,
        )
        .unwrap();
        put(lowers[0].join("o/.wh..wh..opq"), "");
        put(lowers[0].join("f/own"), "");
        put(lowers[0].join("r/own"), "");
        put(lowers[0].join(".wh.r"), "");
        let dir = crate::sys::fs::open_path(&lowers[0].join("f"), libc::O_RDONLY).unwrap();
        let object = crate::sys::fs::Object::Open(dir.as_fd());
        crate::sys::xattr::set(object, OsStr::new("user.fuseoverlayfs.opaque"), b"y", 0).unwrap();
    });
    assert_eq!(fixture.list(""), [".wh.file", "f", "o", "r"]);
    assert!(fixture.list("o").is_empty());
    assert_eq!(fixture.list("f"), ["own"]);
    let shown = fixture.union().listxattr(fixture.node("f")).unwrap();
    assert!(shown.is_empty(), "{shown:?}");
    assert_eq!(fixture.list("r"), ["own"]);
    assert_eq!(errno(fixture.find("a")), libc::ENOENT);
    assert_eq!(errno(fixture.find(".wh.a")), libc::ENOENT);
    fixture.check_remount();
}

#[test]
fn without_an_upper_every_change_is_erofs() {
    let fixture = Fixture::new(1, |lowers| put(lowers[0].join("f"), "f"));
    let union = Union::open(UnionConfig {
        upper: None,
        ..fixture.config()
    })
    .unwrap();
    let f = union.lookup(NodeId::ROOT, OsStr::new("f")).unwrap().node;
    assert!(union.is_read_only());
    assert_eq!(
        errno(union.unlink(NodeId::ROOT, OsStr::new("f"))),
        libc::EROFS
    );
    assert_eq!(
        errno(union.open_file(f, libc::O_WRONLY, &Caller::ROOT)),
        libc::EROFS
    );
    assert_eq!(
        errno(union.mkdir(NodeId::ROOT, OsStr::new("d"), 0o755, &Caller::ROOT)),
        libc::EROFS
    );
    assert_eq!(
        errno(union.setattr(f, None, &SetAttr::default(), &Caller::ROOT)),
        libc::EROFS
    );
    assert!(union.statfs().unwrap().blocks > 0);
}

#[test]
fn directories_that_do_not_fit_get_an_error_of_their_own() {
    let fixture = Fixture::new(1, |_| {});
    let open = |config: UnionConfig| Union::open(config).err();
    let base = fixture.config();
    assert!(matches!(
        open(base.clone()),
        Some(OpenError::WorkInUse { .. })
    ));
    assert!(matches!(
        open(UnionConfig::default()),
        Some(OpenError::NoLayer)
    ));
    let lower = |path: PathBuf| UnionConfig {
        lowers: vec![path],
        upper: None,
        ..base.clone()
    };
    assert!(matches!(
        open(lower("/nonexistent".into())),
        Some(OpenError::Lower { .. })
    ));
    put(fixture.base.path().join("file"), "");
    assert!(matches!(
        open(lower(fixture.base.path().join("file"))),
        Some(OpenError::LowerNotDirectory { .. })
    ));
    let upper = |dir: PathBuf, work: PathBuf| UnionConfig {
        upper: Some(UpperConfig { dir, work }),
        ..base.clone()
    };
    let inside = fixture.upper().join("inside");
    std::fs::create_dir(&inside).unwrap();
    assert!(matches!(
        open(upper(fixture.upper(), inside)),
        Some(OpenError::Overlap { .. })
    ));
    assert!(matches!(
        open(upper(fixture.upper(), fixture.upper())),
        Some(OpenError::Overlap { .. })
    ));
    assert!(matches!(
        open(upper(fixture.upper(), "/dev/shm".into())),
        Some(OpenError::DifferentFileSystems { .. })
    ));
}

/// The caller was told that nothing happened, and setuid and setgid were gone.
#[test]
fn a_request_for_room_that_the_host_does_not_know_changes_nothing() {
    let mut fixture = Fixture::new(1, |_| {});
    let tmpfs = Tmpfs::mount(fixture.base.path().join("tmpfs"), "nr_inodes=64");
    let (dir, work) = (tmpfs.0.join("upper"), tmpfs.0.join("work"));
    std::fs::create_dir(&dir).unwrap();
    std::fs::create_dir(&work).unwrap();
    let upper = Some(UpperConfig { dir, work });
    fixture.union = None;
    let config = UnionConfig {
        upper,
        ..fixture.config()
    };
    fixture.union = Some(Union::open(config).unwrap());
    fixture.write("f", "text").unwrap();
    let (union, f) = (fixture.union(), fixture.node("f"));
    let set = SetAttr {
        perm: Some(0o6777),
        ..SetAttr::default()
    };
    let before = union.setattr(f, None, &set, &Caller::ROOT).unwrap();
    let somebody = Caller {
        uid: 1000,
        gid: 1000,
        ..Caller::ROOT
    };
    let allocate = |mode| union.fallocate(f, None, mode, 0, 2, &somebody);
    // tmpfs has no such thing.
    let unknown = allocate(libc::FALLOC_FL_ZERO_RANGE);
    assert_eq!(errno(unknown), libc::EOPNOTSUPP);
    let after = union.getattr(f, None).unwrap();
    assert_eq!((after.perm, after.mtime), (0o6777, before.mtime));
    assert_eq!(after.ctime, before.ctime);
    allocate(libc::FALLOC_FL_PUNCH_HOLE | libc::FALLOC_FL_KEEP_SIZE).unwrap();
    assert_eq!(union.getattr(f, None).unwrap().perm, 0o777);

    // Where nothing can be made, room is given back all the same.
    union.setattr(f, None, &set, &Caller::ROOT).unwrap();
    while let Ok(n) = std::fs::read_dir(&tmpfs.0).map(Iterator::count)
        && std::fs::File::create(tmpfs.0.join(format!("full{n}"))).is_ok()
    {}
    allocate(libc::FALLOC_FL_PUNCH_HOLE | libc::FALLOC_FL_KEEP_SIZE).unwrap();
    assert_eq!(union.getattr(f, None).unwrap().perm, 0o777);
    fixture.union = None;
}

/// A tmpfs of the test's own.
struct Tmpfs(PathBuf);

impl Tmpfs {
    fn mount(at: PathBuf, options: &str) -> Self {
        std::fs::create_dir(&at).unwrap();
        let kind = Some("tmpfs");
        mount(kind, &at, kind, MsFlags::empty(), Some(options)).unwrap();
        Self(at)
    }
}

impl Drop for Tmpfs {
    fn drop(&mut self) {
        let _ = umount2(&self.0, MntFlags::MNT_DETACH);
    }
}

/// A read took /proc only when it was to move no access time.
#[test]
fn a_read_that_moves_no_access_time_needs_no_proc() {
    let fixture = Fixture::new(1, |_| {});
    fixture.write("f", "text").unwrap();
    let node = fixture.node("f");
    std::thread::scope(|scope| {
        let thread = scope.spawn(|| {
            leave_namespace();
            let kind = Some("tmpfs");
            mount(kind, "/proc", kind, MsFlags::empty(), None::<&str>).unwrap();
            let mut buf = [0; 8];
            let read = fixture.union().read_quietly(node, 0, &mut buf);
            (read.unwrap(), buf)
        });
        assert_eq!(thread.join().unwrap(), (4, *b"text\0\0\0\0"));
    });
}

/// Two that waited for one who never ended took each other for one who does, and waited for good.
#[test]
fn who_waits_for_a_work_directory_is_not_one_who_ends() {
    let fixture = Fixture::new(1, |_| {});
    let base = std::fs::File::open(fixture.base.path().join("work")).unwrap();
    let look = || open::is_ending(base.as_fd());
    let waiter = std::fs::File::open(fixture.base.path().join("work/work")).unwrap();
    crate::sys::fs::try_lock_shared(waiter.as_fd()).unwrap();
    assert!(!look());
    drop(waiter);
    fixture.union().ends();
    assert!(look());
}

#[test]
fn directories_are_waited_for_as_long_as_their_last_user_takes_to_end() {
    let mut fixture = Fixture::new(1, |_| {});
    let union = fixture.union.take().unwrap();
    let open = || Union::open(fixture.config()).map(drop);
    union.ends();
    std::thread::scope(|scope| {
        let opened = scope.spawn(open);
        std::thread::sleep(open::PATIENCE + std::time::Duration::from_secs(1));
        assert!(!opened.is_finished());
        drop(union);
        opened.join().unwrap().unwrap();
    });
}
