//! Files: contents, sizes, times, owners, kinds, names.

use std::ffi::OsStr;
use std::fs::{self, File};
use std::io::{Read, Seek, SeekFrom, Write};
use std::os::fd::AsFd;
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::{
    FileExt, FileTypeExt, MetadataExt, OpenOptionsExt, PermissionsExt, chown, symlink,
};
use std::path::Path;

use nix::fcntl::{AT_FDCWD, FallocateFlags, fallocate};
use nix::sys::stat::{Mode, SFlag, UtimensatFlags, makedev, mknod, utimensat};
use nix::sys::time::TimeSpec;
use nix::unistd::{Gid, Uid, Whence, lseek, setfsgid, setfsuid};

use crate::common::mode;
use crate::common::{Layers, Mount, errno};

const MIB: u64 = 1 << 20;

/// One lower with a file `f` of this content.
fn with_file(content: &[u8]) -> (Layers, Mount) {
    let layers = Layers::new(1);
    fs::write(layers.lower(0).join("f"), content).unwrap();
    layers.seal();
    let mount = Mount::new(&layers, "");
    (layers, mount)
}

#[test]
fn a_lower_file_is_read_and_written_without_being_changed() {
    let (layers, mount) = with_file(b"lower");
    let path = mount.join("f");
    assert_eq!(fs::read(&path).unwrap(), b"lower");
    assert!(!layers.upper().join("f").exists());
    let inode = fs::metadata(&path).unwrap().ino();
    let mut file = File::options().append(true).open(&path).unwrap();
    file.write_all(b" and upper").unwrap();
    assert_eq!(fs::read(&path).unwrap(), b"lower and upper");
    assert_eq!(fs::metadata(&path).unwrap().ino(), inode);
    drop(file);
    assert_eq!(
        fs::read(layers.upper().join("f")).unwrap(),
        b"lower and upper"
    );
    mount.unmount();
}

#[test]
fn a_descriptor_from_before_the_copy_up_sees_what_is_written_after_it() {
    let layers = Layers::new(1);
    Layers::write(&layers.lower(0).join("f"), b"old old old");
    let mount = Mount::new(&layers, "no_passthrough");
    let mut reader = File::open(mount.join("f")).unwrap();
    let writer = File::options().write(true).open(mount.join("f")).unwrap();
    writer.write_all_at(b"new", 0).unwrap();
    let mut text = String::new();
    reader.read_to_string(&mut text).unwrap();
    assert_eq!(text, "new old old");
    assert_eq!(reader.metadata().unwrap().size(), 11);
}

#[test]
fn truncation_by_open_by_path_and_by_descriptor() {
    let (_layers, mount) = with_file(&[b'x'; 9000]);
    let path = mount.join("f");
    let file = File::options().write(true).open(&path).unwrap();
    file.set_len(5000).unwrap();
    assert_eq!(fs::read(&path).unwrap(), vec![b'x'; 5000]);
    file.set_len(5010).unwrap();
    assert_eq!(&fs::read(&path).unwrap()[4998..], b"xx\0\0\0\0\0\0\0\0\0\0");
    nix::unistd::truncate(&path, 3).unwrap();
    assert_eq!(fs::read(&path).unwrap(), b"xxx");
    drop(File::create(&path).unwrap());
    assert_eq!(fs::read(&path).unwrap(), b"");
}

#[test]
fn times_are_set_to_the_nanosecond_also_before_1970() {
    let (_layers, mount) = with_file(b"");
    let path = mount.join("f");
    for (sec, nsec) in [
        (1, 1),
        (1_700_000_000, 123_456_789),
        (-2, 200_000_000),
        (-1, 0),
    ] {
        let time = TimeSpec::new(sec, nsec);
        utimensat(
            AT_FDCWD,
            &path,
            &time,
            &time,
            UtimensatFlags::NoFollowSymlink,
        )
        .unwrap();
        let m = fs::metadata(&path).unwrap();
        assert_eq!((m.mtime(), m.mtime_nsec()), (sec, nsec));
        assert_eq!((m.atime(), m.atime_nsec()), (sec, nsec));
    }
    let before = fs::metadata(&path).unwrap();
    let (now, omit) = (
        TimeSpec::new(0, libc::UTIME_NOW),
        TimeSpec::new(0, libc::UTIME_OMIT),
    );
    utimensat(
        AT_FDCWD,
        &path,
        &omit,
        &now,
        UtimensatFlags::NoFollowSymlink,
    )
    .unwrap();
    let after = fs::metadata(&path).unwrap();
    assert_eq!(after.atime(), before.atime());
    assert!(after.mtime() > 1_700_000_000);
}

#[test]
fn owner_and_mode_change_and_the_data_does_not() {
    let (_layers, mount) = with_file(&[7; 100_000]);
    let path = mount.join("f");
    fs::set_permissions(&path, fs::Permissions::from_mode(0o4751)).unwrap();
    assert_eq!(fs::metadata(&path).unwrap().mode() & 0o7777, 0o4751);
    chown(&path, Some(12), Some(34)).unwrap();
    let m = fs::metadata(&path).unwrap();
    assert_eq!((m.uid(), m.gid(), m.mode() & 0o7777), (12, 34, 0o751));
    assert_eq!(fs::read(&path).unwrap(), [7; 100_000]);
}

#[test]
fn every_kind_of_object_is_made_and_found_in_a_lower() {
    let layers = Layers::new(1);
    let make_all = |dir: &Path, devices: bool| {
        let mode = Mode::from_bits_truncate(0o640);
        for (name, kind, device) in [
            ("fifo", SFlag::S_IFIFO, 0),
            ("socket", SFlag::S_IFSOCK, 0),
            ("null", SFlag::S_IFCHR, makedev(1, 3)),
            ("far", SFlag::S_IFCHR, makedev(300, 70_000)),
            ("block", SFlag::S_IFBLK, makedev(7, 99)),
        ] {
            let made = mknod(&dir.join(name), kind, mode, device);
            let refused = device != 0 && !devices;
            assert_eq!(errno(made), if refused { libc::EPERM } else { 0 });
        }
        symlink("some/where", dir.join("link")).unwrap();
    };
    let check_all = |dir: &Path, devices: bool| {
        let kind = |name: &str| fs::symlink_metadata(dir.join(name)).unwrap();
        assert!(kind("fifo").file_type().is_fifo());
        assert!(kind("socket").file_type().is_socket());
        assert_eq!(
            fs::read_link(dir.join("link")).unwrap(),
            Path::new("some/where")
        );
        if !devices {
            return;
        }
        assert!(kind("null").file_type().is_char_device());
        assert_eq!(kind("null").rdev(), makedev(1, 3));
        assert_eq!(kind("far").rdev(), makedev(300, 70_000));
        assert!(kind("block").file_type().is_block_device());
        assert_eq!(kind("block").rdev(), makedev(7, 99));
    };
    make_all(&layers.lower(0), true);
    layers.seal();
    let mount = Mount::new(&layers, "");
    check_all(&mount.join(""), true);
    fs::create_dir(mount.join("new")).unwrap();
    let devices = mode::Mode::of_run().makes_devices();
    make_all(&mount.join("new"), devices);
    check_all(&mount.join("new"), devices);
    // Device nodes of a mount by root work.
    fs::write(mount.join("null"), "gone").unwrap();
}

#[test]
fn holes_are_kept_found_and_made() {
    let layers = Layers::new(1);
    let lower = File::create(layers.lower(0).join("f")).unwrap();
    lower.set_len(8 * MIB).unwrap();
    lower.write_all_at(&[1; 4096], 4 * MIB).unwrap();
    drop(lower);
    layers.seal();
    let mount = Mount::new(&layers, "");
    let file = File::options()
        .read(true)
        .write(true)
        .open(mount.join("f"))
        .unwrap();
    file.write_all_at(b"up", 0).unwrap();
    // In some modes it is not copied up before it is written back.
    file.sync_all().unwrap();
    assert!(
        fs::metadata(layers.upper().join("f")).unwrap().blocks() * 512 < MIB,
        "the copy-up filled the holes"
    );
    if mode::Mode::of_run().is_new() {
        assert_eq!(
            lseek(&file, MIB as i64, Whence::SeekData).unwrap(),
            4 * MIB as i64
        );
        assert_eq!(
            lseek(&file, 4 * MIB as i64, Whence::SeekHole).unwrap(),
            4 * MIB as i64 + 4096
        );
    }
    let punch = FallocateFlags::FALLOC_FL_PUNCH_HOLE | FallocateFlags::FALLOC_FL_KEEP_SIZE;
    fallocate(file.as_fd(), punch, 4 * MIB as i64, 4096).unwrap();
    let mut page = [9; 4096];
    file.read_exact_at(&mut page, 4 * MIB).unwrap();
    assert_eq!(page, [0; 4096]);
    fallocate(file.as_fd(), FallocateFlags::FALLOC_FL_ZERO_RANGE, 0, 2).unwrap();
    file.read_exact_at(&mut page[..2], 0).unwrap();
    assert_eq!(&page[..2], [0, 0]);
    fallocate(file.as_fd(), FallocateFlags::empty(), 0, 9 * MIB as i64).unwrap();
    assert_eq!(file.metadata().unwrap().size(), 9 * MIB);
}

/// The kernel sends SEEK_DATA before it has written what a program wrote through a mapping or, with
/// the writeback cache, by write(2).
#[test]
fn a_search_for_data_finds_what_was_just_written() {
    if !mode::Mode::of_run().is_new() {
        // The kernel knows no holes; `modes` has what it answers.
        return;
    }
    for options in ["", "writeback", "no_open", "no_open,writeback"] {
        let layers = Layers::new(1);
        let mount = Mount::new(&layers, options);
        let file = File::options()
            .read(true)
            .write(true)
            .create_new(true)
            .open(mount.join("f"))
            .unwrap();
        file.set_len(4 * MIB).unwrap();
        file.write_all_at(b"here", MIB).unwrap();
        assert_eq!(
            lseek(&file, 0, Whence::SeekData).unwrap(),
            MIB as i64,
            "{options}"
        );
        let mut map = crate::common::mapping::shared_mut(&file);
        map[3 * MIB as usize] = 1;
        assert_eq!(
            lseek(&file, 2 * MIB as i64, Whence::SeekData).unwrap(),
            3 * MIB as i64,
            "{options}"
        );
    }
}

#[test]
fn direct_io_and_large_io() {
    let content: Vec<u8> = (0..3 * MIB).map(|i| (i % 251) as u8).collect();
    let (_layers, mount) = with_file(&content);
    let direct = File::options()
        .read(true)
        .write(true)
        .custom_flags(libc::O_DIRECT)
        .open(mount.join("f"))
        .unwrap();
    // A whole page in the middle of a larger buffer is aligned.
    let mut buffer = vec![0; 3 * 4096];
    let start = buffer.as_ptr().align_offset(4096);
    let page = &mut buffer[start..start + 4096];
    direct.read_exact_at(page, 8192).unwrap();
    assert_eq!(page, &content[8192..12288]);
    page.fill(5);
    direct.write_all_at(page, 8192).unwrap();
    let whole = fs::read(mount.join("f")).unwrap();
    assert!(whole[..8192] == content[..8192] && whole[12288..] == content[12288..]);
    assert_eq!(whole[8192..12288], [5; 4096]);
}

#[test]
fn ranges_are_copied_between_lower_and_new_files() {
    let content: Vec<u8> = (0..300_000u32).map(|i| (i / 7) as u8).collect();
    let (_layers, mount) = with_file(&content);
    let from = File::open(mount.join("f")).unwrap();
    let to = File::create(mount.join("copy")).unwrap();
    let mut copied = 0;
    while copied < content.len() {
        let length = content.len() - copied;
        copied += rustix::fs::copy_file_range(&from, None, &to, None, length).unwrap();
    }
    assert_eq!(fs::read(mount.join("copy")).unwrap(), content);
}

#[test]
fn appends_of_two_descriptors_follow_each_other() {
    let (_layers, mount) = with_file(b"0\n");
    let open = || File::options().append(true).open(mount.join("f")).unwrap();
    let (mut one, mut two) = (open(), open());
    for i in 1..50 {
        let file = if i % 2 == 0 { &mut one } else { &mut two };
        writeln!(file, "{i}").unwrap();
    }
    let lines: Vec<String> = (0..50).map(|i| i.to_string()).collect();
    assert_eq!(
        fs::read_to_string(mount.join("f")).unwrap(),
        lines.join("\n") + "\n"
    );
}

#[test]
fn names_of_255_bytes_and_of_any_bytes() {
    let layers = Layers::new(1);
    let odd: [&[u8]; 4] = [b"\xff\xfe", b"a\nb", b"-rf", b"\x01\x7f \\'\""];
    let longest = "n".repeat(255);
    for name in odd {
        fs::write(layers.lower(0).join(OsStr::from_bytes(name)), name).unwrap();
    }
    fs::write(layers.lower(0).join(&longest), "long").unwrap();
    layers.seal();
    let mount = Mount::new(&layers, "");
    for name in odd {
        assert_eq!(fs::read(mount.join(OsStr::from_bytes(name))).unwrap(), name);
        fs::write(mount.join(OsStr::from_bytes(name)), b"new").unwrap();
    }
    assert_eq!(fs::read(mount.join(&longest)).unwrap(), b"long");
    fs::rename(mount.join(&longest), mount.join("m".repeat(255))).unwrap();
    let too_long = mount.join("n".repeat(256));
    assert_eq!(errno(fs::metadata(&too_long)), libc::ENAMETOOLONG);
    assert_eq!(errno(File::create(&too_long)), libc::ENAMETOOLONG);
    assert_eq!(errno(fs::create_dir(&too_long)), libc::ENAMETOOLONG);
}

#[test]
fn an_unlinked_file_lives_until_it_is_closed() {
    let (_layers, mount) = with_file(b"lower");
    let mut lower = File::open(mount.join("f")).unwrap();
    fs::remove_file(mount.join("f")).unwrap();
    fs::write(mount.join("g"), "upper").unwrap();
    let upper = File::options()
        .read(true)
        .write(true)
        .open(mount.join("g"))
        .unwrap();
    fs::remove_file(mount.join("g")).unwrap();
    let mut text = String::new();
    lower.read_to_string(&mut text).unwrap();
    assert_eq!(text, "lower");
    assert_eq!(lower.metadata().unwrap().nlink(), 0);
    upper.write_all_at(b"UP", 0).unwrap();
    let mut buffer = [0; 5];
    upper.read_exact_at(&mut buffer, 0).unwrap();
    assert_eq!((&buffer, upper.metadata().unwrap().nlink()), (b"UPper", 0));
    assert_eq!(fs::read_dir(mount.join("")).unwrap().count(), 0);
}

#[test]
fn hard_links_of_a_lower_stay_one_file() {
    let layers = Layers::new(1);
    fs::write(layers.lower(0).join("a"), "one").unwrap();
    fs::hard_link(layers.lower(0).join("a"), layers.lower(0).join("b")).unwrap();
    layers.seal();
    let mount = Mount::new(&layers, "");
    let inode = |name: &str| fs::metadata(mount.join(name)).unwrap().ino();
    assert_eq!(inode("a"), inode("b"));
    fs::write(mount.join("a"), "two").unwrap();
    assert_eq!(fs::read(mount.join("b")).unwrap(), b"two");
    fs::hard_link(mount.join("b"), mount.join("c")).unwrap();
    assert_eq!(inode("a"), inode("c"));
    assert_eq!(fs::metadata(mount.join("a")).unwrap().nlink(), 3);
    fs::remove_file(mount.join("a")).unwrap();
    assert_eq!(fs::metadata(mount.join("b")).unwrap().nlink(), 2);
}

#[test]
fn what_the_library_cannot_carry_is_refused_with_its_documented_errno() {
    let (_layers, mount) = with_file(b"");
    let unnamed = File::options()
        .read(true)
        .write(true)
        .custom_flags(libc::O_TMPFILE)
        .open(mount.join(""));
    assert_eq!(errno(unnamed), libc::EOPNOTSUPP);
    let statx = rustix::fs::statx(
        rustix::fs::CWD,
        mount.join("f"),
        rustix::fs::AtFlags::empty(),
        rustix::fs::StatxFlags::ALL | rustix::fs::StatxFlags::BTIME,
    )
    .unwrap();
    assert_eq!(
        statx.stx_mask & rustix::fs::StatxFlags::BTIME.bits(),
        0,
        "a birth time is shown"
    );
}

#[test]
fn fsync_and_statfs_answer() {
    let (layers, mount) = with_file(b"x");
    let file = File::options().write(true).open(mount.join("f")).unwrap();
    file.sync_all().unwrap();
    file.sync_data().unwrap();
    File::open(mount.join("")).unwrap().sync_all().unwrap();
    let ours = nix::sys::statvfs::statvfs(&mount.join("")).unwrap();
    let hosts = nix::sys::statvfs::statvfs(&layers.upper()).unwrap();
    assert_eq!(ours.name_max(), 255);
    assert_eq!(
        ours.blocks() * ours.fragment_size(),
        hosts.blocks() * hosts.fragment_size()
    );
}

#[test]
fn offsets_and_seeks_beyond_the_end() {
    let (_layers, mount) = with_file(b"abc");
    let mut file = File::options()
        .read(true)
        .write(true)
        .open(mount.join("f"))
        .unwrap();
    assert_eq!(file.seek(SeekFrom::End(10)).unwrap(), 13);
    file.write_all(b"z").unwrap();
    assert_eq!(
        fs::read(mount.join("f")).unwrap(),
        b"abc\0\0\0\0\0\0\0\0\0\0z"
    );
    assert_eq!(file.read(&mut [0; 4]).unwrap(), 0);
}

#[test]
fn a_write_by_others_than_root_clears_setuid() {
    let layers = Layers::new(1);
    fs::write(layers.lower(0).join("from"), "other").unwrap();
    fs::write(layers.lower(0).join("f"), "x").unwrap();
    fs::set_permissions(
        layers.lower(0).join("f"),
        fs::Permissions::from_mode(0o6777),
    )
    .unwrap();
    layers.seal();
    for options in ["", "writeback", "kernel_features=-killpriv_v2"] {
        let mount = Mount::new(&layers, options);
        let status = std::process::Command::new("setpriv")
            .args([
                "--reuid=65534",
                "--regid=65534",
                "--clear-groups",
                "sh",
                "-c",
            ])
            .arg(format!("echo more >>{}", mount.join("f").display()))
            .status()
            .unwrap();
        assert!(status.success());
        let expect_cleared = |by: &str| {
            let mode = fs::metadata(mount.join("f")).unwrap().mode() & 0o7777;
            assert_eq!(mode, 0o777, "{by}, {options}");
            fs::set_permissions(mount.join("f"), fs::Permissions::from_mode(0o6777)).unwrap();
        };
        expect_cleared("write");
        as_nobody(|| {
            let file = File::options().write(true).open(mount.join("f")).unwrap();
            fallocate(file.as_fd(), FallocateFlags::empty(), 0, 4096).unwrap();
        });
        expect_cleared("fallocate");
        as_nobody(|| {
            let from = File::open(mount.join("from")).unwrap();
            let to = File::options().write(true).open(mount.join("f")).unwrap();
            let copied = rustix::fs::copy_file_range(&from, None, &to, None, 5).unwrap();
            assert_eq!(copied, 5);
        });
        expect_cleared("copy_file_range");
        mount.unmount();
    }
}

/// Runs `body` in a thread that uses files as an ordinary user does, with none of root's rights.
fn as_nobody(body: impl FnOnce() + Send) {
    std::thread::scope(|scope| {
        let thread = scope.spawn(|| {
            setfsgid(Gid::from_raw(65534));
            setfsuid(Uid::from_raw(65534));
            body();
        });
        thread.join().unwrap();
    });
}
