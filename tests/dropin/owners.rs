//! Options that change whose objects are shown as, beside fuse-overlayfs.

use std::fs;
use std::os::unix::fs::{MetadataExt, PermissionsExt, chown, lchown, symlink};
use std::path::Path;

use crate::common::{Layers, errno};
use crate::peer::{Dirs, Program, seen};

fn owner(path: &Path) -> (u32, u32) {
    let stat = fs::symlink_metadata(path).unwrap();
    (stat.uid(), stat.gid())
}

fn mode(path: &Path) -> u32 {
    fs::symlink_metadata(path).unwrap().mode() & 0o7777
}

/// A lower with `file` of user 5 and group 6, a directory and a link of root's.
fn dirs() -> Dirs {
    let dirs = Dirs::new();
    Layers::write(&dirs.lower().join("file"), "text");
    chown(dirs.lower().join("file"), Some(5), Some(6)).unwrap();
    fs::set_permissions(
        dirs.lower().join("file"),
        fs::Permissions::from_mode(0o4750),
    )
    .unwrap();
    fs::create_dir(dirs.lower().join("dir")).unwrap();
    Layers::write(&dirs.lower().join("dir/inner"), "inner");
    dirs
}

#[test]
fn a_mapping_is_that_of_fuse_overlayfs() {
    for program in Program::BOTH {
        let dirs = dirs();
        let options = format!(
            "{},uidmapping=5:1000:1:0:2000:3,gidmapping=0:3000:10",
            dirs.options()
        );
        let upper = dirs.upper();
        program.on_mount(&dirs.mnt(), &options, |mnt| {
            assert_eq!(owner(mnt), (2000, 3000), "{program:?}");
            assert_eq!(owner(&mnt.join("file")), (1000, 3006), "{program:?}");
            // Root itself is outside of the mapping here.
            fs::write(mnt.join("new"), "").unwrap();
            assert_eq!(owner(&mnt.join("new")), (65_534, 65_534), "{program:?}");
            assert_eq!(owner(&upper.join("new")), (65_534, 65_534), "{program:?}");
            chown(mnt.join("new"), Some(1000), Some(3004)).unwrap();
            chown(mnt.join("dir"), Some(2001), Some(3001)).unwrap();
            assert_eq!(owner(&mnt.join("dir")), (2001, 3001), "{program:?}");
            chown(mnt.join("file"), None, Some(3009)).unwrap();
            assert_eq!(owner(&mnt.join("file")), (1000, 3009), "{program:?}");
        });
        assert_eq!(owner(&upper.join("new")), (5, 4), "{program:?}");
        assert_eq!(owner(&upper.join("dir")), (1, 1), "{program:?}");
        assert_eq!(owner(&upper.join("file")), (5, 9), "{program:?}");
    }
}

#[test]
fn an_owner_that_a_mapping_has_not_is_refused() {
    let dirs = dirs();
    let options = format!("{},uidmapping=0:1000:10", dirs.options());
    Program::Plyfs.on_mount(&dirs.mnt(), &options, |mnt| {
        let file = mnt.join("file");
        assert_eq!(errno(chown(&file, Some(7), None)), libc::EINVAL);
        assert_eq!(owner(&file), (1005, 6));
        assert!(!dirs.upper().join("file").exists(), "copied up for nothing");
    });
}

#[test]
fn everything_is_one_users_when_squashed() {
    for (words, shown) in [
        ("squash_to_root", (0, 0)),
        ("squash_to_root,squash_to_uid=55", (55, 0)),
        ("squash_to_uid=55,squash_to_gid=56", (55, 56)),
        ("squash_to_gid=56", (5, 56)),
    ] {
        for program in Program::BOTH {
            let dirs = dirs();
            let options = format!("{},{words}", dirs.options());
            program.on_mount(&dirs.mnt(), &options, |mnt| {
                assert_eq!(owner(&mnt.join("file")), shown, "{program:?} {words}");
                fs::write(mnt.join("new"), "").unwrap();
                chown(mnt.join("new"), Some(5), Some(8)).unwrap();
                assert_eq!(owner(&mnt.join("new")), shown, "{program:?} {words}");
            });
        }
    }
}

#[test]
fn directories_have_one_link_when_asked_for() {
    for program in Program::BOTH {
        let dirs = dirs();
        let options = format!("{},static_nlink", dirs.options());
        program.on_mount(&dirs.mnt(), &options, |mnt| {
            fs::create_dir_all(mnt.join("new/inner")).unwrap();
            for name in ["", "dir", "new"] {
                let links = fs::metadata(mnt.join(name)).unwrap().nlink();
                assert_eq!(links, 1, "{program:?} {name}");
            }
        });
    }
}

#[test]
fn extended_attributes_can_be_switched_off() {
    for program in Program::BOTH {
        let dirs = dirs();
        xattr::set(dirs.lower().join("file"), "user.lower", b"1").unwrap();
        let options = format!("{},noxattrs=1", dirs.options());
        program.on_mount(&dirs.mnt(), &options, |mnt| {
            let file = mnt.join("file");
            let set = errno(xattr::set(&file, "user.name", b"1"));
            assert_eq!(set, libc::EOPNOTSUPP, "{program:?}");
            let got = errno(xattr::get(&file, "user.lower"));
            assert_eq!(got, libc::EOPNOTSUPP, "{program:?}");
            fs::remove_dir_all(mnt.join("dir")).unwrap();
            fs::create_dir(mnt.join("dir")).unwrap();
        });
        // The union's own marks are needed all the same.
        program.on_mount(&dirs.mnt(), &options, |mnt| {
            assert_eq!(fs::read_dir(mnt.join("dir")).unwrap().count(), 0);
        });
    }
}

/// Changes of owner and mode, through a mount.
fn change(mnt: &Path) {
    chown(mnt.join("file"), Some(10), Some(11)).unwrap();
    fs::write(mnt.join("new"), "new").unwrap();
    // In this order: fuse-overlayfs 1.10 forgets the owner when the mode is changed.
    fs::set_permissions(mnt.join("new"), fs::Permissions::from_mode(0o640)).unwrap();
    chown(mnt.join("new"), Some(7), Some(8)).unwrap();
    fs::create_dir(mnt.join("made")).unwrap();
    fs::set_permissions(mnt.join("made"), fs::Permissions::from_mode(0o1700)).unwrap();
    chown(mnt.join("made"), Some(9), Some(9)).unwrap();
    fs::set_permissions(mnt.join("dir"), fs::Permissions::from_mode(0o711)).unwrap();
    fs::write(mnt.join("dir/inner"), "written").unwrap();
}

#[test]
fn owners_in_attributes_are_read_by_fuse_overlayfs_and_written_by_it() {
    for form in ["1", "2"] {
        for writer in Program::BOTH {
            let dirs = dirs();
            let options = format!("{},xattr_permissions={form}", dirs.options());
            let written = writer.on_mount(&dirs.mnt(), &options, |mnt| {
                change(mnt);
                seen(mnt)
            });
            let case = format!("xattr_permissions={form} by {writer:?}");
            let upper = dirs.upper();
            assert_eq!(owner(&upper.join("new")), (0, 0), "{case}");
            assert_eq!(mode(&upper.join("made")), 0o755, "{case}");
            let reader = writer.other();
            let read = reader.on_mount(&dirs.mnt(), &options, |mnt| {
                assert_eq!(owner(&mnt.join("new")), (7, 8), "{case}");
                assert_eq!(mode(&mnt.join("made")), 0o1700, "{case}");
                seen(mnt)
            });
            // fuse-overlayfs shows some of its own attributes.
            let essence = |seen: &crate::peer::Seen| -> Vec<String> {
                seen.iter()
                    .map(|(path, what)| format!("{path} {}", what.split(" [").next().unwrap()))
                    .collect()
            };
            assert_eq!(essence(&read), essence(&written), "{case}");
        }
    }
}

#[test]
fn an_upper_keeps_its_way_of_owning_unasked() {
    let dirs = dirs();
    let options = dirs.options();
    // As containers-storage marks the directories of its dirs when it is told `force_mask`.
    let mark = "user.containers.override_stat";
    xattr::set(dirs.upper(), mark, b"3:4:0750").unwrap();
    Program::Plyfs.on_mount(&dirs.mnt(), &options, |mnt| {
        assert_eq!((owner(mnt), mode(mnt)), ((3, 4), 0o750));
        change(mnt);
        symlink("target", mnt.join("link")).unwrap();
        lchown(mnt.join("link"), Some(12), Some(12)).unwrap();
        assert_eq!(owner(&mnt.join("link")), (12, 12));
        // It is no attribute of the tree.
        let names = xattr::list(mnt.join("new")).unwrap().count();
        assert_eq!(names, 0);
        assert_eq!(
            errno(xattr::set(mnt.join("new"), mark, b"0:0:777")),
            libc::EPERM
        );
    });
    let upper = dirs.upper();
    let stored = |name: &str| {
        let value = xattr::get(upper.join(name), mark).unwrap().unwrap();
        String::from_utf8(value).unwrap()
    };
    assert_eq!(stored("new"), "7:8:0640");
    assert_eq!(stored("made"), "9:9:01700");
    assert_eq!(owner(&upper.join("new")), (0, 0));
    Program::Plyfs.on_mount(&dirs.mnt(), &options, |mnt| {
        assert_eq!(
            (owner(&mnt.join("new")), mode(&mnt.join("new"))),
            ((7, 8), 0o640)
        );
        assert_eq!(mode(&mnt.join("dir")), 0o711);
        fs::write(mnt.join("new"), "more").unwrap();
        assert_eq!(owner(&mnt.join("new")), (7, 8));
    });
    // As a lower layer, for fuse-overlayfs too.
    for program in Program::BOTH {
        let options = format!("lowerdir={}", upper.display());
        program.on_mount(&dirs.mnt(), &options, |mnt| {
            assert_eq!(owner(&mnt.join("made")), (9, 9), "{program:?}");
            assert_eq!(mode(&mnt.join("made")), 0o1700, "{program:?}");
        });
    }
}

#[test]
fn a_tree_cannot_say_that_its_owners_lie_in_attributes() {
    let dirs = dirs();
    let options = dirs.options();
    let mark = "user.containers.override_stat";
    Program::Plyfs.on_mount(&dirs.mnt(), &options, |mnt| {
        xattr::set(mnt, mark, b"1:1:0700").unwrap();
        xattr::set(mnt.join("file"), mark, b"0:0:04755").unwrap();
    });
    for _ in 0..2 {
        Program::Plyfs.on_mount(&dirs.mnt(), &options, |mnt| {
            assert_eq!(owner(mnt), (0, 0));
            assert_eq!(owner(&mnt.join("file")), (5, 6));
            assert_eq!(xattr::get(mnt, mark).unwrap().unwrap(), b"1:1:0700");
        });
    }
}
