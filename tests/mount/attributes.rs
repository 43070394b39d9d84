//! Extended attributes, access control lists, file capabilities, and marks that must not be forged.

use std::fs::{self, File};
use std::os::unix::fs::{MetadataExt, PermissionsExt, chown};
use std::path::Path;
use std::process::Command;

use nix::sys::stat::{Mode, SFlag, mknod};
use rustix::fs::XattrFlags;

use crate::common::mode;
use crate::common::snapshot::{age_access_times, xattrs};
use crate::common::{Layers, Mount, errno};

fn set(path: &Path, name: &str, value: &[u8]) -> rustix::io::Result<()> {
    rustix::fs::lsetxattr(path, name, value, XattrFlags::empty())
}

fn get(path: &Path, name: &str) -> rustix::io::Result<Vec<u8>> {
    let mut value = vec![0; 65536];
    let length = rustix::fs::lgetxattr(path, name, &mut value)?;
    value.truncate(length);
    Ok(value)
}

/// The words of an ACL that `setfacl` takes, and what `getfacl` says of it.
fn acl(words: &str, path: &Path) {
    let status = Command::new("setfacl")
        .args(["-m", words])
        .arg(path)
        .status()
        .expect("setfacl (package acl)");
    assert!(status.success());
}

fn as_nobody(script: &str) -> bool {
    Command::new("setpriv")
        .args([
            "--reuid=65534",
            "--regid=65534",
            "--clear-groups",
            "sh",
            "-c",
            script,
        ])
        .stderr(std::process::Stdio::null())
        .status()
        .unwrap()
        .success()
}

#[test]
fn attributes_are_set_listed_and_removed() {
    let layers = Layers::new(1);
    let lower = layers.lower(0).join("f");
    fs::write(&lower, "").unwrap();
    set(&lower, "user.old", b"lower").unwrap();
    set(&lower, "trusted.t", b"1").unwrap();
    layers.seal();
    let mount = Mount::new(&layers, "");
    let path = mount.join("f");
    assert_eq!(get(&path, "user.old").unwrap(), b"lower");
    set(&path, "user.new", &[b'v'; 3000]).unwrap();
    assert_eq!(get(&path, "user.new").unwrap(), [b'v'; 3000]);
    let mut short = [0u8; 10];
    let error = rustix::fs::lgetxattr(&path, "user.new", &mut short);
    assert_eq!(errno(error), libc::ERANGE);
    let again = rustix::fs::lsetxattr(&path, "user.new", b"", XattrFlags::CREATE);
    assert_eq!(errno(again), libc::EEXIST);
    let missing = rustix::fs::lsetxattr(&path, "user.none", b"", XattrFlags::REPLACE);
    assert_eq!(errno(missing), libc::ENODATA);
    rustix::fs::lremovexattr(&path, "user.old").unwrap();
    let names: Vec<Vec<u8>> = xattrs(&path).into_keys().collect();
    assert_eq!(names, [b"trusted.t".to_vec(), b"user.new".to_vec()]);
}

#[test]
fn lists_of_access_rights_are_kept_and_enforced() {
    let layers = Layers::new(1);
    let lower = layers.lower(0).join("f");
    fs::write(&lower, "secret").unwrap();
    fs::set_permissions(&lower, fs::Permissions::from_mode(0o600)).unwrap();
    layers.seal();
    let mount = Mount::new(&layers, "");
    let path = mount.join("f");
    let read = format!("cat {} >/dev/null", path.display());
    assert!(!as_nobody(&read));
    if !mode::Mode::of_run().is_new() {
        // Nobody would enforce them.
        let value = [2, 0, 0, 0];
        let result = set(&path, "system.posix_acl_access", &value);
        return assert_eq!(errno(result), libc::EOPNOTSUPP);
    }
    acl("u:65534:r", &path);
    assert!(as_nobody(&read));
    assert_eq!(fs::metadata(&path).unwrap().mode() & 0o777, 0o640);
    // chmod of the group class is the mask of the list.
    fs::set_permissions(&path, fs::Permissions::from_mode(0o600)).unwrap();
    assert!(!as_nobody(&read));
    fs::create_dir(mount.join("d")).unwrap();
    acl("d:u:65534:rwx", &mount.join("d"));
    File::create(mount.join("d/inherits")).unwrap();
    assert!(get(&mount.join("d/inherits"), "system.posix_acl_access").is_ok());
}

#[test]
fn without_lists_they_are_refused() {
    let layers = Layers::new(1);
    fs::write(layers.lower(0).join("f"), "").unwrap();
    layers.seal();
    let mount = Mount::new(&layers, "noacl");
    let value = [2, 0, 0, 0];
    let result = set(&mount.join("f"), "system.posix_acl_access", &value);
    assert_eq!(errno(result), libc::EOPNOTSUPP);
}

/// A capability set of version 2 with CAP_NET_RAW permitted and effective.
const CAPABILITY: [u8; 20] = [
    1, 0, 0, 2, 0, 0x20, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0,
];

#[test]
fn file_capabilities_survive_chmod_and_go_with_a_write_or_chown() {
    let layers = Layers::new(1);
    for name in ["chmod", "write", "chown"] {
        let lower = layers.lower(0).join(name);
        fs::write(&lower, "x").unwrap();
        set(&lower, "security.capability", &CAPABILITY).unwrap();
    }
    layers.seal();
    for options in ["", "writeback", "no_open", "kernel_features=-killpriv_v2"] {
        let mount = Mount::new(&layers, options);
        let has = |name: &str| get(&mount.join(name), "security.capability").is_ok();
        fs::set_permissions(mount.join("chmod"), fs::Permissions::from_mode(0o755)).unwrap();
        assert!(has("chmod"), "{options}");
        fs::OpenOptions::new()
            .append(true)
            .open(mount.join("write"))
            .and_then(|mut file| {
                std::io::Write::write_all(&mut file, b"y")?;
                file.sync_all()
            })
            .unwrap();
        assert!(!has("write"), "{options}");
        chown(mount.join("chown"), Some(1), Some(1)).unwrap();
        assert!(!has("chown"), "{options}");
        mount.unmount();
        fs::remove_dir_all(layers.upper()).unwrap();
        fs::create_dir(layers.upper()).unwrap();
    }
}

#[test]
fn the_unions_own_marks_cannot_be_forged() {
    let layers = Layers::new(1);
    Layers::write(&layers.lower(0).join("d/f"), "visible");
    Layers::write(&layers.lower(0).join("other/g"), "elsewhere");
    layers.seal();
    let mount = Mount::new(&layers, "");
    let whiteout = mknod(
        &mount.join("d/f2"),
        SFlag::S_IFCHR,
        Mode::from_bits_truncate(0o600),
        0,
    );
    assert_eq!(errno(whiteout), libc::EPERM);
    for (name, value) in [
        ("trusted.overlay.opaque", &b"y"[..]),
        ("trusted.overlay.redirect", b"/other"),
        ("trusted.overlay.metacopy", b""),
        ("user.overlay.opaque", b"y"),
        ("user.fuseoverlayfs.opaque", b"y"),
    ] {
        // Refused or kept as plain data: either way it means nothing.
        let _ = set(&mount.join("d"), name, value);
    }
    fs::write(mount.join("d/.wh.f"), "an ordinary name").unwrap();
    fs::write(mount.join("d/.wh..wh..opq"), "another").unwrap();
    mount.unmount();
    let mount = Mount::new(&layers, "");
    assert_eq!(fs::read(mount.join("d/f")).unwrap(), b"visible");
    assert_eq!(
        fs::read(mount.join("d/.wh.f")).unwrap(),
        b"an ordinary name"
    );
    assert!(mount.join("d/.wh..wh..opq").exists());
    assert!(!mount.join("d/g").exists());
}

/// 256 MiB of lower files get other owners, modes and names.
#[test]
fn attributes_of_a_tree_change_without_its_data() {
    const FILES: usize = 4;
    const SIZE: usize = 64 << 20;
    let layers = Layers::new(1);
    for n in 0..FILES {
        let content: Vec<u8> = (0..SIZE).map(|at| (at >> 10) as u8 ^ n as u8).collect();
        let path = layers.lower(0).join(format!("tree/d{n}/f"));
        Layers::write(&path, content);
        // Until it is written down, the host's count of its blocks is a guess.
        File::open(path).unwrap().sync_all().unwrap();
    }
    layers.seal();
    for options in ["", "no_open,writeback"] {
        let mount = Mount::new(&layers, options);
        let tree = mount.join("tree");
        for command in [["chown", "-R", "12:34"], ["chmod", "-R", "u=rwX,go="]] {
            let status = Command::new(command[0])
                .args(&command[1..])
                .arg(&tree)
                .status()
                .unwrap();
            assert!(status.success());
        }
        fs::rename(tree.join("d0/f"), tree.join("d1/g")).unwrap();
        mount.unmount();
        let mount = Mount::new(&layers, options);
        let tree = mount.join("tree");
        for path in ["d1/g", "d1/f", "d2/f", "d3/f"] {
            let stat = fs::metadata(tree.join(path)).unwrap();
            assert_eq!((stat.uid(), stat.mode() & 0o777), (12, 0o600), "{path}");
            assert_eq!(stat.len(), SIZE as u64);
            assert!(stat.blocks() * 512 >= stat.len(), "{path}");
        }
        let file = fs::read(tree.join("d1/g")).unwrap();
        assert!(
            file.iter()
                .enumerate()
                .all(|(at, byte)| *byte == (at >> 10) as u8)
        );
        mount.unmount();
        let mut blocks = 0;
        let mut pending = vec![layers.upper()];
        while let Some(path) = pending.pop() {
            blocks += fs::symlink_metadata(&path).unwrap().blocks();
            if path.is_dir() {
                pending.extend(
                    fs::read_dir(&path)
                        .unwrap()
                        .map(|entry| entry.unwrap().path()),
                );
            }
        }
        let written = blocks * 512;
        assert!(written * 100 < (FILES * SIZE) as u64, "{written} bytes");
        fs::remove_dir_all(layers.upper()).unwrap();
        fs::create_dir(layers.upper()).unwrap();
    }
}

#[test]
fn a_change_of_a_lower_file_is_none_of_its_directory() {
    let layers = Layers::new(1);
    for name in ["a", "b", "c"] {
        Layers::write(&layers.lower(0).join("d").join(name), "text");
    }
    layers.seal();
    let mount = Mount::new(&layers, "");
    let dir = mount.join("d");
    let times = || {
        let stat = fs::metadata(&dir).unwrap();
        (
            (stat.mtime(), stat.mtime_nsec()),
            (stat.ctime(), stat.ctime_nsec()),
        )
    };
    // Comes with a copy of the directory itself.
    chown(dir.join("a"), Some(12), None).unwrap();
    let before = times();
    chown(dir.join("b"), Some(12), None).unwrap();
    set(&dir.join("c"), "user.new", b"v").unwrap();
    assert_eq!(times(), before);
    // A host's clock may stand still for so long.
    let tick = || std::thread::sleep(std::time::Duration::from_millis(20));
    tick();
    fs::remove_file(dir.join("b")).unwrap();
    let (mtime, ctime) = times();
    assert!(mtime > before.0 && ctime > before.1);
    tick();
    fs::set_permissions(&dir, fs::Permissions::from_mode(0o711)).unwrap();
    assert_eq!(times().0, mtime);
    assert!(times().1 > ctime);
}

#[test]
fn the_unions_own_marks_do_not_show() {
    let layers = Layers::new(1);
    Layers::write(&layers.lower(0).join("d/f"), "x");
    layers.seal();
    let mount = Mount::new(&layers, "");
    fs::rename(mount.join("d"), mount.join("e")).unwrap();
    fs::set_permissions(mount.join("e/f"), fs::Permissions::from_mode(0o600)).unwrap();
    for path in ["", "e", "e/f"] {
        let names = xattrs(&mount.join(path));
        assert!(names.is_empty(), "{path}: {names:?}");
    }
}

/// The kernel leaves the access times of a FUSE mount to its server, so its own `noatime` alone did nothing.
#[test]
fn noatime_and_nodiratime_keep_access_times() {
    for (options, files_move, directories_move) in [
        ("relatime", true, true),
        ("nodiratime", true, false),
        ("noatime", false, false),
    ] {
        let layers = Layers::new(1);
        let (upper, lower) = (layers.upper(), layers.lower(0));
        Layers::write(&lower.join("below"), "x");
        Layers::write(&upper.join("dir/above"), "x");
        age_access_times(&upper);
        let mount = Mount::new(&layers, options);
        let atime = |path: &Path| fs::metadata(path).unwrap().atime();
        let read = [mount.join("below"), mount.join("dir/above")];
        let before = read.each_ref().map(|path| atime(path));
        let listed = atime(&upper.join("dir"));
        for path in &read {
            fs::read(path).unwrap();
        }
        assert_eq!(fs::read_dir(mount.join("dir")).unwrap().count(), 1);
        let after = read.each_ref().map(|path| atime(path));
        for (before, after) in before.iter().zip(after) {
            assert_eq!(after > *before, files_move, "{options}");
        }
        let of_upper = atime(&upper.join("dir/above"));
        assert_eq!(of_upper > before[1], files_move, "{options}");
        let of_directory = atime(&upper.join("dir"));
        assert_eq!(of_directory > listed, directories_move, "{options}");
        mount.unmount();
    }
}
