//! Large files that are copied up in chunks, on an upper that cannot share content with the lower.

use std::fs::{self, File};
use std::os::unix::fs::{FileExt, MetadataExt, OpenOptionsExt, PermissionsExt};
use std::path::PathBuf;

use nix::mount::{MntFlags, MsFlags, mount, umount2};
use nix::sys::signal::Signal;

use crate::common::mapping;
use crate::common::mode::Mode;
use crate::common::mount::{unmount, wait_until};
use crate::common::{Layers, Mount, errno};

const MIB: u64 = 1 << 20;

/// A lower with a file `f`, and a tmpfs for the upper.
struct Place {
    layers: Layers,
    space: PathBuf,
}

impl Place {
    fn new(size: &str, fill: impl FnOnce(&File)) -> Self {
        let layers = Layers::new(1);
        fill(&File::create(layers.lower(0).join("f")).unwrap());
        layers.seal();
        let space = layers.path("space");
        fs::create_dir(&space).unwrap();
        let tmpfs = Some("tmpfs");
        let options = format!("size={size}");
        mount(
            tmpfs,
            &space,
            tmpfs,
            MsFlags::empty(),
            Some(options.as_str()),
        )
        .unwrap();
        for name in ["upper", "work"] {
            fs::create_dir(space.join(name)).unwrap();
        }
        Self { layers, space }
    }

    fn mount(&self, more: &str) -> Mount {
        let options = format!(
            "{},upperdir={1}/upper,workdir={1}/work,{more}",
            self.layers.lower_options(),
            self.space.display()
        );
        Mount::with_options(&self.layers.mnt(), &options)
    }

    fn copy(&self) -> PathBuf {
        self.space.join("upper/f")
    }

    fn is_incomplete(&self) -> bool {
        self.space.join("work/work/incompat").exists()
    }
}

impl Drop for Place {
    fn drop(&mut self) {
        // Its content is of no use to anybody any more.
        let _ = umount2(&self.space, MntFlags::MNT_DETACH);
    }
}

fn pattern(length: u64) -> Vec<u8> {
    (0..length).map(|at| ((at >> 10) ^ at) as u8 | 1).collect()
}

fn open(mount: &Mount, flags: i32) -> File {
    File::options()
        .read(true)
        .write(true)
        .custom_flags(flags)
        .open(mount.join("f"))
        .unwrap()
}

/// How to open a file whose every answered write has reached the server: what the kernel gathers is nobody's promise.
fn to_the_server() -> i32 {
    match Mode::of_run().gathers() {
        true => libc::O_SYNC,
        false => 0,
    }
}

#[test]
fn a_small_write_to_a_large_file_takes_one_chunk() {
    let part = pattern(MIB);
    let (size, at) = (200 * MIB, 150 * MIB);
    let place = Place::new("64m", |file| {
        file.set_len(size).unwrap();
        file.write_all_at(&part, at).unwrap();
    });
    // A reader that is there first would see nothing of the writing with passthrough.
    for options in [
        "no_passthrough",
        "no_open",
        "writeback",
        "no_passthrough,kernel_features=-all",
    ] {
        let mount = place.mount(options);
        let reader = File::open(mount.join("f")).unwrap();
        let mut block = [0; 4096];
        reader.read_exact_at(&mut block, at).unwrap();
        let file = open(&mount, 0);
        file.write_all_at(&[b'x'; 4096], at).unwrap();
        file.sync_all().unwrap();
        let blocks = fs::metadata(place.copy()).unwrap().blocks();
        assert!(blocks <= 128, "{options}: {blocks}");
        assert_eq!(file.metadata().unwrap().len(), size);
        reader.read_exact_at(&mut block, at).unwrap();
        assert_eq!(block, [b'x'; 4096]);
        reader.read_exact_at(&mut block, at + 4096).unwrap();
        assert!(block == part[4096..8192]);
        drop((reader, file));
        assert!(place.is_incomplete());
        mount.unmount();
        // What was not a hole is there, and holes are holes.
        assert!(!place.is_incomplete());
        let copy = File::open(place.copy()).unwrap();
        assert_eq!(copy.metadata().unwrap().len(), size);
        assert!(copy.metadata().unwrap().blocks() <= 2 * MIB / 512);
        copy.read_exact_at(&mut block, at + MIB - 4096).unwrap();
        assert!(block == part[MIB as usize - 4096..]);
        fs::remove_file(place.copy()).unwrap();
    }
}

#[test]
fn mappings_direct_writes_and_cuts_agree() {
    const SIZE: u64 = 3 * MIB;
    let place = Place::new("64m", |file| file.write_all_at(&pattern(SIZE), 0).unwrap());
    let mut expected = pattern(SIZE);
    let mount = place.mount("chunk_size=4K,copy_whole=0,complete=off");
    {
        let file = open(&mount, 0);
        let mut map = mapping::shared_mut(&file);
        for at in [5, 4096, 70_000, 2 * MIB as usize + 4095] {
            map[at] = 0;
            expected[at] = 0;
        }
        map.flush().unwrap();
        let direct = open(&mount, libc::O_DIRECT);
        let mut aligned = mapping::shared_mut(&file);
        aligned[..4096].copy_from_slice(&[9; 4096]);
        expected[..4096].fill(9);
        aligned.flush().unwrap();
        let block = mapping::shared_mut(&file);
        direct.write_all_at(&block[..4096], 1 << 20).unwrap();
        expected[1 << 20..(1 << 20) + 4096].fill(9);
    }
    let file = open(&mount, 0);
    file.set_len(2 * MIB + 100).unwrap();
    file.set_len(SIZE).unwrap();
    expected[2 * MIB as usize + 100..].fill(0);
    assert!(fs::read(mount.join("f")).unwrap() == expected);
    drop(file);
    mount.unmount();
    assert!(fs::read(place.copy()).unwrap() == expected);
}

#[test]
fn a_killed_server_loses_no_write() {
    const SIZE: u64 = 4 * MIB;
    let place = Place::new("64m", |file| file.write_all_at(&pattern(SIZE), 0).unwrap());
    let mut expected = pattern(SIZE);
    for round in 0..6u8 {
        let mount = place.mount("chunk_size=4K,copy_whole=0,complete=off");
        assert!(fs::read(mount.join("f")).unwrap() == expected, "{round}");
        let file = open(&mount, to_the_server());
        for n in 0..40u64 {
            let at = (n * 97 + u64::from(round) * 31) % (SIZE / 4096 - 1) * 4096 + n * 13;
            file.write_all_at(&[round; 4096], at).unwrap();
            expected[at as usize..at as usize + 4096].fill(round);
            if n % 8 == 0 {
                file.sync_data().unwrap();
            }
        }
        mount.signal(Signal::SIGKILL);
        assert!(mount.wait_for_end());
    }
    assert!(place.is_incomplete());
    place.mount("").unmount();
    assert!(!place.is_incomplete());
    assert!(fs::read(place.copy()).unwrap() == expected);
}

#[test]
fn a_file_that_is_largely_there_is_completed_in_the_background() {
    const SIZE: u64 = 2 * MIB;
    let place = Place::new("64m", |file| file.write_all_at(&pattern(SIZE), 0).unwrap());
    let mut expected = pattern(SIZE);
    let mount = place.mount("chunk_size=4K,copy_whole=0,complete=1");
    let file = open(&mount, 0);
    file.write_all_at(&vec![3; SIZE as usize / 2], 0).unwrap();
    expected[..SIZE as usize / 2].fill(3);
    let before = file.metadata().unwrap();
    assert!(wait_until(|| !place.is_incomplete()));
    let after = file.metadata().unwrap();
    assert_eq!(
        (before.mtime_nsec(), before.ctime_nsec()),
        (after.mtime_nsec(), after.ctime_nsec())
    );
    file.write_all_at(&[4; 100], SIZE - 50).unwrap();
    expected.truncate(SIZE as usize - 50);
    expected.extend([4; 100]);
    assert!(fs::read(mount.join("f")).unwrap() == expected);
}

#[test]
fn without_space_a_file_stays_incomplete_and_whole() {
    const SIZE: u64 = 8 * MIB;
    const PIECE: usize = 1 << 16;
    let place = Place::new("16m", |file| file.write_all_at(&pattern(SIZE), 0).unwrap());
    let mut expected = pattern(SIZE);
    let mount = place.mount("complete=off");
    let file = open(&mount, to_the_server());
    file.write_all_at(b"written", 5 * MIB).unwrap();
    // The room that there was when the file was opened goes to another.
    let other = File::options()
        .write(true)
        .create_new(true)
        .custom_flags(to_the_server())
        .open(mount.join("other"))
        .unwrap();
    while other
        .write_at(&[1; 1 << 16], other.metadata().unwrap().len())
        .is_ok()
    {}
    expected[5 * MIB as usize..][..7].copy_from_slice(b"written");
    let mut answered = 0;
    let full = loop {
        match file.write_all_at(&[5; PIECE], answered as u64) {
            Ok(()) => answered += PIECE,
            full => break full,
        }
    };
    assert_eq!(errno(full), libc::ENOSPC);
    expected[..answered].fill(5);
    // The one that was refused may have come through in part.
    let settle = |expected: &mut [u8], seen: &[u8]| {
        for block in (answered..answered + PIECE).step_by(4096) {
            if seen[block..block + 4096] == [5; 4096] {
                expected[block..block + 4096].fill(5);
            }
        }
    };
    let seen = fs::read(mount.join("f")).unwrap();
    // What a kernel has gathered it shows, also what it could not write down.
    let gathers = Mode::of_run().gathers();
    if !gathers {
        settle(&mut expected, &seen);
        assert!(seen == expected);
    }
    drop((file, other));
    mount.unmount();
    assert!(place.is_incomplete());
    let mount = place.mount("complete=off");
    let seen = fs::read(mount.join("f")).unwrap();
    if gathers {
        settle(&mut expected, &seen);
    }
    assert!(seen == expected);
    fs::remove_file(mount.join("f")).unwrap();
    mount.unmount();
    assert!(!place.is_incomplete());
}

#[test]
fn a_file_that_cannot_fit_is_refused_when_it_is_opened() {
    const SIZE: u64 = 8 * MIB;
    let place = Place::new("4m", |file| file.write_all_at(&pattern(SIZE), 0).unwrap());
    let mount = place.mount("no_writeback,complete=off");
    for flags in [0, libc::O_APPEND] {
        let opened = File::options()
            .write(true)
            .custom_flags(flags)
            .open(mount.join("f"));
        // A kernel that opens by itself has the first write say it.
        let written = opened.and_then(|file| match Mode::of_run().opens() {
            true => Ok(()),
            false => file.write_all_at(b"x", 0),
        });
        assert_eq!(errno(written), libc::ENOSPC);
    }
    assert!(!place.is_incomplete() && !place.copy().exists());
    assert!(fs::read(mount.join("f")).unwrap() == pattern(SIZE));
    // Of a file that is cut at once nothing has to fit.
    if Mode::of_run().truncates_at_open() {
        fs::write(mount.join("f"), "short").unwrap();
    } else {
        nix::unistd::truncate(&mount.join("f"), 0).unwrap();
        fs::write(mount.join("f"), "short").unwrap();
    }
    assert_eq!(fs::read(mount.join("f")).unwrap(), b"short");
}

#[test]
fn a_new_mount_goes_on_where_the_last_one_was_completing() {
    const SIZE: u64 = 40 * MIB;
    let place = Place::new("64m", |file| file.write_all_at(&pattern(SIZE), 0).unwrap());
    let mut expected = pattern(SIZE);
    for round in 0..5u8 {
        let mount = place.mount("complete=off");
        let at = SIZE / 2 + u64::from(round) * 100_000;
        open(&mount, 0).write_all_at(&[round; 5000], at).unwrap();
        expected[at as usize..at as usize + 5000].fill(round);
        // The server goes on for a while; the next one finds its work directory in use.
        unmount(&place.layers.mnt());
        let again = place.mount("complete=off");
        assert!(fs::read(again.join("f")).unwrap() == expected);
        again.unmount();
        drop(mount);
    }
    assert!(wait_until(|| !place.is_incomplete()));
    assert!(fs::read(place.copy()).unwrap() == expected);
}

#[test]
fn a_server_that_is_told_to_end_loses_nothing_of_writers_that_go_on() {
    const BLOCKS: usize = 1024;
    const WRITERS: usize = 3;
    let size = (BLOCKS * 4096) as u64;
    let place = Place::new("64m", |file| file.write_all_at(&pattern(size), 0).unwrap());
    let mut expected = pattern(size);
    for round in 0..3u8 {
        let mount = place.mount("chunk_size=4K,copy_whole=0,complete=1");
        assert!(fs::read(mount.join("f")).unwrap() == expected, "{round}");
        let (told, heard) = std::sync::mpsc::channel();
        let written: Vec<_> = std::thread::scope(|scope| {
            let writers: Vec<_> = (0..WRITERS)
                .map(|writer| {
                    // One that a loaded machine has not begun yet has its file all the same.
                    let file = open(&mount, to_the_server());
                    let told = told.clone();
                    scope.spawn(move || write_until_it_fails(&file, writer, round, &told))
                })
                .collect();
            // Enough is written to be completed.
            for _ in 0..100 * WRITERS {
                heard.recv().unwrap();
            }
            mount.signal(Signal::SIGTERM);
            assert!(mount.wait_for_end());
            writers.into_iter().map(|one| one.join().unwrap()).collect()
        });
        let again = place.mount("complete=off");
        let seen = fs::read(again.join("f")).unwrap();
        for (answered, last) in written {
            for (block, value) in answered {
                expected[block * 4096..][..4096].fill(value);
            }
            // The one that was under way may have come through, chunk by chunk.
            let (block, value) = last;
            if seen[block * 4096] == value {
                expected[block * 4096..][..4096].fill(value);
            }
        }
        assert!(seen == expected, "{round}");
        again.unmount();
    }
    assert!(!place.is_incomplete());

    /// Answers what was written, block by block, and what was not answered.
    fn write_until_it_fails(
        file: &File,
        writer: usize,
        round: u8,
        told: &std::sync::mpsc::Sender<()>,
    ) -> (Vec<(usize, u8)>, (usize, u8)) {
        let mut answered = Vec::new();
        for n in 0.. {
            // Each has blocks of its own, here and there in the file.
            let block = (n * 37 % (BLOCKS / WRITERS)) * WRITERS + writer;
            let value = (n / 7) as u8 ^ round << 6 | 1;
            if file
                .write_all_at(&[value; 4096], (block * 4096) as u64)
                .is_err()
            {
                return (answered, (block, value));
            }
            answered.push((block, value));
            // Nobody listens any more after the first hundreds.
            let _ = told.send(());
        }
        unreachable!("the server ends")
    }
}

#[test]
fn attributes_that_change_beside_a_completion_keep_their_values() {
    const SIZE: u64 = 6 * MIB;
    let place = Place::new("64m", |file| file.write_all_at(&pattern(SIZE), 0).unwrap());
    // The completion may come before or after all changes of a round, but hardly of each.
    for round in 0..4 {
        let mount = place.mount("chunk_size=4K,copy_whole=0,complete=1");
        let file = open(&mount, 0);
        file.write_all_at(&vec![3; SIZE as usize / 2 + 4096], 0)
            .unwrap();
        // A kernel that gathers writes has not begun yet.
        file.sync_data().unwrap();
        let path = mount.join("f");
        let mut changes = 0u32;
        let mut last = (0, 0, 0, 0);
        let deadline = std::time::Instant::now() + std::time::Duration::from_secs(60);
        while place.is_incomplete() || changes < 20 {
            assert!(
                std::time::Instant::now() < deadline,
                "it is never completed"
            );
            changes += 1;
            last = (
                0o4600 | (changes & 0o77),
                1000 + changes % 7,
                2000 + changes % 5,
                i64::from(1_000_000 + changes),
            );
            let (mode, uid, gid, mtime) = last;
            std::os::unix::fs::chown(&path, Some(uid), Some(gid)).unwrap();
            // chown(2) takes setuid away, so it comes first.
            fs::set_permissions(&path, fs::Permissions::from_mode(mode)).unwrap();
            let value = changes.to_le_bytes();
            rustix::fs::setxattr(&path, "user.k", &value, rustix::fs::XattrFlags::empty()).unwrap();
            let time = std::time::UNIX_EPOCH + std::time::Duration::from_secs(mtime as u64);
            file.set_modified(time).unwrap();
            check(&path, last, changes);
        }
        check(&path, last, changes);
        drop(file);
        mount.unmount();
        check(&place.copy(), last, changes);
        let copy = fs::read(place.copy()).unwrap();
        assert!(copy[SIZE as usize / 2 + 4096..] == pattern(SIZE)[SIZE as usize / 2 + 4096..]);
        assert!(!place.is_incomplete(), "{round}");
        fs::remove_file(place.copy()).unwrap();
    }

    fn check(path: &std::path::Path, expected: (u32, u32, u32, i64), changes: u32) {
        let stat = fs::metadata(path).unwrap();
        let seen = (stat.mode() & 0o7777, stat.uid(), stat.gid(), stat.mtime());
        assert_eq!(seen, expected, "{}", path.display());
        let mut value = [0; 4];
        rustix::fs::getxattr(path, "user.k", &mut value).unwrap();
        assert_eq!(u32::from_le_bytes(value), changes);
    }
}
