//! Mappings and locks: what the kernel keeps of an inode that stays the same over copy-up.

use std::fs::{self, File};
use std::os::unix::fs::{FileExt, MetadataExt};
use std::process::Command;

use nix::fcntl::{FcntlArg, Flock, FlockArg, fcntl};

use crate::common::{Layers, Mount, errno, mapping};

fn with_file(options: &str, content: &[u8]) -> (Layers, Mount) {
    let layers = Layers::new(1);
    fs::write(layers.lower(0).join("f"), content).unwrap();
    layers.seal();
    let mount = Mount::new(&layers, options);
    (layers, mount)
}

fn read_write(mount: &Mount) -> File {
    File::options()
        .read(true)
        .write(true)
        .open(mount.join("f"))
        .unwrap()
}

#[test]
fn a_shared_mapping_from_before_the_copy_up_sees_later_writes() {
    for options in [
        "no_passthrough",
        "no_open",
        "writeback",
        "no_open,writeback",
    ] {
        let (_layers, mount) = with_file(options, &[b'a'; 8192]);
        let map = mapping::shared(&File::open(mount.join("f")).unwrap());
        assert_eq!(map[5000], b'a');
        read_write(&mount).write_all_at(b"b", 5000).unwrap();
        assert_eq!(map[5000], b'b', "{options}");
    }
}

#[test]
fn what_a_mapping_wrote_is_there_after_a_remount() {
    for options in ["", "no_open", "writeback", "no_open,writeback"] {
        let (layers, mount) = with_file(options, &[b'a'; 10_000]);
        let file = read_write(&mount);
        let before = file.metadata().unwrap().mtime_nsec();
        let mut map = mapping::shared_mut(&file);
        map[9_999] = b'z';
        drop((map, file));
        let again = fs::read(mount.join("f")).unwrap();
        assert_eq!((again.len(), again[9_999]), (10_000, b'z'));
        assert_ne!(fs::metadata(mount.join("f")).unwrap().mtime_nsec(), before);
        mount.unmount();
        let mount = Mount::new(&layers, options);
        assert_eq!(fs::read(mount.join("f")).unwrap()[9_999], b'z', "{options}");
    }
}

#[test]
fn a_private_mapping_changes_nothing_and_copies_nothing_up() {
    let (layers, mount) = with_file("", b"lower");
    let mut map = mapping::private(&File::open(mount.join("f")).unwrap());
    map[0] = b'X';
    assert_eq!(&map[..], b"Xower");
    assert_eq!(fs::read(mount.join("f")).unwrap(), b"lower");
    assert!(!layers.upper().join("f").exists());
}

#[test]
fn a_lock_taken_before_the_copy_up_still_excludes_after_it() {
    let (_layers, mount) = with_file("no_passthrough", b"lower");
    let holder = Flock::lock(
        File::open(mount.join("f")).unwrap(),
        FlockArg::LockExclusiveNonblock,
    )
    .map_err(|(_, error)| error)
    .unwrap();
    let writer = read_write(&mount);
    writer.write_all_at(b"upper", 0).unwrap();
    let refused = Flock::lock(writer, FlockArg::LockSharedNonblock).map_err(|(_, error)| error);
    assert_eq!(errno(refused), libc::EWOULDBLOCK);
    drop(holder);
    Flock::lock(read_write(&mount), FlockArg::LockExclusiveNonblock)
        .map_err(|(_, error)| error)
        .unwrap();
}

#[test]
fn record_locks_exclude_where_they_overlap() {
    let (_layers, mount) = with_file("", &[0; 100]);
    let range = |start, len| libc::flock {
        l_type: libc::F_WRLCK as i16,
        l_whence: libc::SEEK_SET as i16,
        l_start: start,
        l_len: len,
        l_pid: 0,
    };
    let (one, two) = (read_write(&mount), read_write(&mount));
    fcntl(&one, FcntlArg::F_OFD_SETLK(&range(0, 50))).unwrap();
    fcntl(&two, FcntlArg::F_OFD_SETLK(&range(50, 50))).unwrap();
    let overlap = fcntl(&two, FcntlArg::F_OFD_SETLK(&range(40, 20)));
    assert_eq!(errno(overlap), libc::EAGAIN);
    drop(one);
    fcntl(&two, FcntlArg::F_OFD_SETLK(&range(40, 20))).unwrap();
}

#[test]
fn a_program_runs_from_the_mount() {
    let layers = Layers::new(1);
    fs::copy("/bin/true", layers.lower(0).join("f")).unwrap();
    layers.seal();
    for options in ["", "no_open", "kernel_features=-all"] {
        let mount = Mount::new(&layers, options);
        let status = Command::new(mount.join("f")).status().unwrap();
        assert!(status.success(), "{options}");
        mount.unmount();
    }
}
