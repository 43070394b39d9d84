//! What survives a copy-up here and not on kernel overlayfs: watches, locks, maps and descriptors,
//! because the file stays the same file.

use std::fs::{File, OpenOptions};
use std::io::Write;
use std::os::unix::fs::{FileExt, MetadataExt};

use rustix::fs::{FlockOperation, flock, inotify};

use crate::Ground;
use crate::mounts::mode::Mode;

#[test]
fn a_watch_on_a_lower_file_sees_it_change() {
    let ground = Ground::new("echo lower > file");
    let path = ground.root().join("file");
    let watch = inotify::init(inotify::CreateFlags::NONBLOCK).unwrap();
    inotify::add_watch(
        &watch,
        &path,
        inotify::WatchFlags::MODIFY | inotify::WatchFlags::ATTRIB,
    )
    .unwrap();
    OpenOptions::new()
        .append(true)
        .open(&path)
        .unwrap()
        .write_all(b"more\n")
        .unwrap();
    let mut buf = [std::mem::MaybeUninit::uninit(); 4096];
    let mut events = inotify::Reader::new(&watch, &mut buf);
    let event = events.next().expect("an event is there at once");
    assert!(
        event.events().contains(inotify::ReadFlags::MODIFY),
        "{event:?}"
    );
    ground.finish();
}

#[test]
fn a_lock_on_a_lower_file_holds_after_its_copy_up() {
    let ground = Ground::new("echo lower > file");
    let path = ground.root().join("file");
    let holder = File::open(&path).unwrap();
    flock(&holder, FlockOperation::LockExclusive).unwrap();
    let writer = OpenOptions::new().write(true).open(&path).unwrap();
    writer.write_at(b"L", 0).unwrap();
    let other = File::open(&path).unwrap();
    // With `-o passthrough` it is another file once it is written, of which nobody has the lock.
    let expected = match Mode::of_run().passes() {
        true => Ok(()),
        false => Err(rustix::io::Errno::WOULDBLOCK),
    };
    let locked = flock(&other, FlockOperation::NonBlockingLockExclusive);
    assert_eq!(locked, expected);
    // A close would not do: what another test is just forking shares the lock until it executes.
    flock(&holder, FlockOperation::Unlock).unwrap();
    flock(&other, FlockOperation::NonBlockingLockExclusive).unwrap();
    drop((holder, writer, other));
    ground.finish();
}

#[test]
fn eight_processes_count_under_one_lock() {
    let ground = Ground::new("echo 0 > counter");
    if Mode::of_run().passes() {
        // What is in the upper before it is opened is one file for all.
        ground.sh("echo 0 > counter");
    }
    ground.sh(
        "count() { for i in $(seq 25); do flock counter bash -c 'echo $(($(cat counter) + 1)) > counter'; done; }
         for p in 1 2 3 4 5 6 7 8; do count & pids+=($!); done; for pid in ${pids[@]}; do wait $pid; done",
    );
    assert_eq!(ground.sh("cat counter"), "200\n");
    ground.finish();
}

#[test]
fn a_descriptor_from_before_a_copy_up_is_the_same_file() {
    if Mode::of_run().passes() {
        return another_file_once_written();
    }
    let ground = Ground::new("echo lower > file");
    let path = ground.root().join("file");
    let early = File::open(&path).unwrap();
    let number = early.metadata().unwrap().ino();
    OpenOptions::new()
        .write(true)
        .open(&path)
        .unwrap()
        .write_at(b"UPPER", 0)
        .unwrap();
    let mut seen = [0; 6];
    early.read_exact_at(&mut seen, 0).unwrap();
    assert_eq!(&seen, b"UPPER\n");
    assert_eq!(std::fs::metadata(&path).unwrap().ino(), number);
    std::fs::remove_file(&path).unwrap();
    early.read_exact_at(&mut seen, 0).unwrap();
    assert_eq!((&seen, early.metadata().unwrap().nlink()), (b"UPPER\n", 0));
    drop(early);
    ground.finish();
}

#[test]
fn a_shared_map_of_a_lower_file_reaches_the_file() {
    let ground = Ground::new("head -c 10000 /dev/zero > file");
    let script = "import mmap, os
fd = os.open('file', os.O_RDWR)
m = mmap.mmap(fd, 10000)
m[5000:5005] = b'hello'
os.pwrite(fd, b'there', 100)
assert m[100:105] == b'there', m[100:105]
m.flush(); m.close(); os.close(fd)
assert open('file', 'rb').read()[5000:5005] == b'hello'";
    ground.sh(&format!("python3 -c \"{script}\""));
    ground.finish();
}

/// What `-o passthrough` costs: who has a lower file open goes on with it, and who writes has another one.
fn another_file_once_written() {
    let ground = Ground::new("echo lower > file");
    let path = ground.root().join("file");
    let early = File::open(&path).unwrap();
    let writer = OpenOptions::new().write(true).open(&path).unwrap();
    writer.write_at(b"UPPER", 0).unwrap();
    let mut seen = [0; 6];
    early.read_exact_at(&mut seen, 0).unwrap();
    assert_eq!(&seen, b"lower\n");
    let numbers = [&early, &writer].map(|file| file.metadata().unwrap().ino());
    assert_ne!(numbers[0], numbers[1]);
    drop((early, writer));
    ground.finish();
}
