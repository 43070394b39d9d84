//! `-o passthrough`: lower files that the kernel reads by itself.

use std::fs::{self, File, Permissions};
use std::io::{self, Read, Write};
use std::os::fd::AsRawFd;
use std::os::unix::fs::{DirEntryExt, FileExt, MetadataExt, OpenOptionsExt, PermissionsExt};
use std::path::Path;
use std::process::Command;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use nix::fcntl::{FallocateFlags, PosixFadviseAdvice, fallocate, posix_fadvise};
use nix::sys::signal::Signal;
use nix::unistd::{Whence, lseek, truncate};
use rustix::fs::copy_file_range;

use crate::common::mapping;
use crate::common::mode::kernel_passes;
use crate::common::mount::wait_until;
use crate::common::{Layers, Mount, errno};

/// A mount that passes files through, in every mode of the run; `None` on a kernel that cannot.
fn passing(layers: &Layers, more: &str) -> Option<Mount> {
    let options = format!("passthrough,kernel_features=+passthrough,{more}");
    let mount = Mount::new(layers, &options);
    kernel_passes().then_some(mount)
}

fn writer(path: impl AsRef<Path>) -> File {
    File::options().read(true).write(true).open(path).unwrap()
}

fn read(file: &File) -> Vec<u8> {
    let mut content = Vec::new();
    // From its beginning, whatever was read before.
    lseek(file, 0, Whence::SeekSet).unwrap();
    { file }.read_to_end(&mut content).unwrap();
    content
}

fn again(file: &File) -> String {
    format!("/proc/self/fd/{}", file.as_raw_fd())
}

#[test]
fn what_is_open_is_read_on_when_the_server_is_dead() {
    let layers = Layers::new(1);
    let content: Vec<u8> = (0..1_000_000u32).map(|n| (n >> 8) as u8).collect();
    Layers::write(&layers.lower(0).join("d/f"), &content);
    let Some(mount) = passing(&layers, "") else {
        return;
    };
    let file = File::open(mount.join("d/f")).unwrap();
    let map = mapping::shared(&file);
    let outlives = mapping::private(&File::open(mount.join("d/f")).unwrap());
    mount.signal(Signal::SIGKILL);
    assert!(mount.wait_for_end());
    assert!(errno(File::open(mount.join("d/f"))) != 0);
    assert!(read(&file) == content && map[..] == content && outlives[..] == content);
}

#[test]
fn the_page_cache_is_that_of_the_lower_file() {
    const PAGES: usize = 64;
    let layers = Layers::new(1);
    let below = layers.lower(0).join("f");
    Layers::write(&below, [7; PAGES * 4096]);
    for options in [format!("{},", layers.options()), layers.lower_options()] {
        let quietly = File::options()
            .read(true)
            .custom_flags(libc::O_NOATIME)
            .open(&below);
        let lower = quietly.unwrap();
        lower.sync_all().unwrap();
        let options = format!("passthrough,kernel_features=+passthrough,{options}");
        let mount = Mount::with_options(&layers.mnt(), &options);
        if !kernel_passes() {
            return;
        }
        let map = mapping::shared(&File::open(mount.join("f")).unwrap());
        posix_fadvise(&lower, 0, 0, PosixFadviseAdvice::POSIX_FADV_DONTNEED).unwrap();
        // None, unless the layers lie in memory.
        let seen = mapping::resident(&mapping::shared(&lower));
        assert_eq!(mapping::resident(&map), seen);
        read(&lower);
        assert_eq!(mapping::resident(&map), PAGES);
        drop(map);
        mount.unmount();
    }
}

/// Layers with these files, each with the content `old old old`.
fn old_files(names: &[&str]) -> Layers {
    let layers = Layers::new(1);
    for name in names {
        Layers::write(&layers.lower(0).join(name), "old old old");
    }
    // A file that is just being written back may show no blocks, and some a moment later.
    rustix::fs::syncfs(File::open(layers.lower(0)).unwrap()).unwrap();
    layers
}

#[test]
fn a_passed_descriptor_writes_nothing_and_changes_attributes_of_the_copy() {
    let layers = old_files(&["f"]);
    let Some(mount) = passing(&layers, "") else {
        return;
    };
    let file = File::open(mount.join("f")).unwrap();
    assert_eq!(errno(file.write_at(b"new", 0)), libc::EBADF);
    assert_eq!(errno(file.set_len(1)), libc::EINVAL);
    let allocated = fallocate(&file, FallocateFlags::empty(), 0, 100);
    assert_eq!(errno(allocated), libc::EBADF);
    assert_eq!(errno(mapping::try_shared_mut(&file)), libc::EACCES);
    let mut private = mapping::private(&file);
    private[..3].copy_from_slice(b"own");
    assert_eq!(read(&file), b"old old old");
    file.set_permissions(Permissions::from_mode(0o604)).unwrap();
    file.set_modified(std::time::UNIX_EPOCH).unwrap();
    let (by_path, by_file) = (
        fs::metadata(mount.join("f")).unwrap(),
        file.metadata().unwrap(),
    );
    assert_eq!(by_path.mode() & 0o777, 0o604);
    assert_eq!(by_path.mtime(), 0);
    assert_eq!((by_file.ino(), by_file.mtime()), (by_path.ino(), 0));
    // Without data, so the readers stay as they are, and more may come.
    let other = File::open(mount.join("f")).unwrap();
    assert!(read(&file) == b"old old old" && read(&other) == b"old old old");
    // The one that has a file open can only read it; nobody can look up this name again.
    let reopened = File::options().write(true).open(again(&file));
    assert_eq!(errno(reopened), libc::ESTALE);
    assert_eq!(fs::read(mount.join("f")).unwrap(), b"old old old");
}

/// Whoever lists a directory into memory that nobody brings holds it for as long. The server tells the kernel of second
/// numbers, which waits for that, and who wrote to any file with a reader waited with it.
#[test]
fn a_listing_that_does_not_end_keeps_nobody_from_writing_elsewhere() {
    let layers = old_files(&["held/f", "free/f"]);
    let Some(mount) = passing(&layers, "") else {
        return;
    };
    let stuck = old_files(&["memory"]);
    let stuck = Mount::new(&stuck, "");
    let memory = writer(stuck.join("memory"));
    memory.set_len(4096).unwrap();
    let mut memory = mapping::shared_mut(&memory);
    let held = File::open(mount.join("held")).unwrap();
    let readers = ["held/f", "free/f"].map(|name| File::open(mount.join(name)).unwrap());
    let stopped = Stopped::all_of(&stuck);
    let ended = AtomicBool::new(false);
    std::thread::scope(|scope| {
        scope.spawn(|| {
            mapping::list_into(&held, &mut memory);
            ended.store(true, Ordering::Release);
        });
        std::thread::sleep(Duration::from_millis(300));
        let (tell, told) = std::sync::mpsc::channel();
        let (told_estale, path) = (tell.clone(), again(&readers[0]));
        // Not by its name, which would be looked up in the directory.
        scope.spawn(move || {
            let opened = File::options().write(true).open(path);
            told_estale.send(("held", errno(opened)))
        });
        std::thread::sleep(Duration::from_millis(50));
        let path = mount.join("free/f");
        scope.spawn(move || tell.send(("free", errno(fs::write(path, "new")))));
        let mut opened = [(); 2].map(|()| told.recv_timeout(Duration::from_secs(20)));
        // On a slow machine they may come in the other order.
        opened.sort_unstable_by_key(|opened| opened.ok());
        let listed = ended.load(Ordering::Acquire);
        drop(stopped);
        assert_eq!(opened, [Ok(("free", 0)), Ok(("held", libc::ESTALE))]);
        assert!(!listed, "the listing has ended");
    });
    fs::write(mount.join("held/f"), "new").unwrap();
    for (name, reader) in ["held/f", "free/f"].iter().zip(&readers) {
        assert_eq!(fs::read(mount.join(name)).unwrap(), b"new");
        assert_eq!(read(reader), b"old old old");
    }
}

/// A mount whose server stands still until this goes.
struct Stopped<'a>(&'a Mount);

impl<'a> Stopped<'a> {
    /// Waits until each thread stands: one that has not heard of it yet would answer.
    fn all_of(mount: &'a Mount) -> Self {
        mount.signal(Signal::SIGSTOP);
        let stopped = Self(mount);
        // One that just ends cannot be read, and counts with the next look.
        let stands = |task: io::Result<fs::DirEntry>| {
            let stat = task.and_then(|task| fs::read_to_string(task.path().join("stat")));
            stat.is_ok_and(|stat| stat.rsplit(") ").next().is_some_and(|s| s.starts_with('T')))
        };
        let tasks = format!("/proc/{}/task", mount.pid());
        assert!(wait_until(|| fs::read_dir(&tasks).unwrap().all(stands)));
        stopped
    }
}

impl Drop for Stopped<'_> {
    fn drop(&mut self) {
        self.0.signal(Signal::SIGCONT);
    }
}

#[test]
fn who_has_a_file_open_keeps_it_while_others_write_it() {
    type Change = fn(&Path);
    let changes: [(&str, Change, &[u8]); 6] = [
        (
            "written",
            |f| writer(f).write_all(b"new").unwrap(),
            b"new old old",
        ),
        (
            "appended",
            |f| {
                let file = File::options().append(true).create(true).open(f);
                file.unwrap().write_all(b" new").unwrap();
            },
            b"old old old new",
        ),
        ("emptied", |f| drop(File::create(f).unwrap()), b""),
        ("replaced", |f| fs::write(f, "new").unwrap(), b"new"),
        ("cut", |f| truncate(f, 3).unwrap(), b"old"),
        ("grown", |f| truncate(f, 12).unwrap(), b"old old old\0"),
    ];
    for more in [
        "",
        "threads=1,metacopy=off",
        "copy_whole=0,kernel_features=-atomic_trunc",
    ] {
        let names: Vec<&str> = changes.iter().map(|(name, _, _)| *name).collect();
        let layers = old_files(&names);
        let Some(mount) = passing(&layers, more) else {
            return;
        };
        for (name, change, expected) in &changes {
            let path = mount.join(name);
            let reader = File::open(&path).unwrap();
            let before = reader.metadata().unwrap();
            let map = mapping::shared(&reader);
            change(&path);
            assert_eq!(fs::read(&path).unwrap(), *expected, "{name} {more}");
            let after = fs::metadata(&path).unwrap();
            assert_eq!(after.size(), expected.len() as u64, "{name} {more}");
            assert_ne!(after.ino(), before.ino(), "{name} {more}");
            assert_eq!(after.nlink(), 1);
            let listed = fs::read_dir(mount.join("")).unwrap().map(Result::unwrap);
            let listed: Vec<u64> = listed
                .filter(|entry| entry.file_name() == *name)
                .map(|entry| entry.ino())
                .collect();
            assert_eq!(listed, [after.ino()], "{name} {more}");

            assert!(read(&reader) == b"old old old" && &map[..] == b"old old old");
            let kept = reader.metadata().unwrap();
            assert_eq!(
                (kept.ino(), kept.size(), kept.mtime()),
                (before.ino(), 11, before.mtime())
            );
            assert_eq!(lseek(&reader, 0, Whence::SeekEnd), Ok(11));
            assert_eq!(lseek(&reader, 3, Whence::SeekData), Ok(3));
            assert_eq!(lseek(&reader, 3, Whence::SeekHole), Ok(11));
            assert_eq!(errno(lseek(&reader, 11, Whence::SeekData)), libc::ENXIO);
            let copy = writer_of(&mount.join("copy"));
            let (mut from, mut to) = (0, 0);
            assert_eq!(
                copy_file_range(&reader, Some(&mut from), &copy, Some(&mut to), 100),
                Ok(11)
            );
            assert_eq!(read(&copy), b"old old old");
            // There is one file: what is done by the old descriptor is done to it.
            reader
                .set_permissions(Permissions::from_mode(0o604))
                .unwrap();
            assert_eq!(
                fs::metadata(&path).unwrap().mode() & 0o777,
                0o604,
                "{name} {more}"
            );
            assert_eq!(errno(File::open(again(&reader))), libc::ESTALE);
            // Later writers and readers share one content, in mappings too.
            let (writer, map) = (writer(&path), mapping::shared_or_none(&path));
            writer.write_at(b"more", 0).unwrap();
            if let Some(map) = map {
                assert_eq!(map[..3], b"mor"[..], "{name} {more}");
            }
            assert_eq!(fs::read(&path).unwrap()[..4], b"more"[..]);
        }
        mount.unmount();
        let mount = Mount::new(&layers, more);
        assert_eq!(fs::read(mount.join("cut")).unwrap(), b"more");
    }
}

fn writer_of(path: &Path) -> File {
    File::options()
        .read(true)
        .write(true)
        .create(true)
        .truncate(true)
        .open(path)
        .unwrap()
}

#[test]
fn all_names_of_a_file_show_what_is_written_by_one() {
    let layers = old_files(&["d/a"]);
    fs::create_dir(layers.lower(0).join("e")).unwrap();
    fs::hard_link(layers.lower(0).join("d/a"), layers.lower(0).join("e/b")).unwrap();
    let Some(mount) = passing(&layers, "") else {
        return;
    };
    let reader = File::open(mount.join("d/a")).unwrap();
    fs::hard_link(mount.join("d/a"), mount.join("c")).unwrap();
    let number = fs::metadata(mount.join("e/b")).unwrap().ino();
    fs::write(mount.join("c"), "new").unwrap();
    for name in ["e/b", "d/a", "c"] {
        let found = fs::metadata(mount.join(name)).unwrap();
        assert_eq!((found.size(), found.nlink()), (3, 3), "{name}");
        assert_ne!(found.ino(), number, "{name}");
        assert_eq!(fs::read(mount.join(name)).unwrap(), b"new", "{name}");
    }
    fs::remove_file(mount.join("c")).unwrap();
    fs::rename(mount.join("e/b"), mount.join("g")).unwrap();
    assert_eq!(fs::metadata(mount.join("g")).unwrap().nlink(), 2);
    assert_eq!(reader.metadata().unwrap().nlink(), 2);
    assert_eq!(read(&reader), b"old old old");
    drop(reader);
    fs::write(mount.join("g"), "newer").unwrap();
    assert_eq!(fs::read(mount.join("d/a")).unwrap(), b"newer");
    mount.unmount();
    let mount = Mount::new(&layers, "");
    // The second number was of that mount alone.
    assert_eq!(fs::metadata(mount.join("g")).unwrap().ino(), number);
}

#[test]
fn a_file_that_nobody_reads_keeps_its_number() {
    const FILES: usize = 300;
    let names: Vec<String> = (0..FILES).map(|n| n.to_string()).collect();
    let layers = old_files(&names.iter().map(String::as_str).collect::<Vec<_>>());
    let Some(mount) = passing(&layers, "") else {
        return;
    };
    let mut kept = 0;
    for name in &names {
        let path = mount.join(name);
        let number = fs::metadata(&path).unwrap().ino();
        // The close of the reader is told to the server while the writer opens the file.
        assert_eq!(fs::read(&path).unwrap(), b"old old old");
        let file = writer(&path);
        file.write_all_at(b"new", 0).unwrap();
        kept += usize::from(file.metadata().unwrap().ino() == number);
        assert_eq!(
            fs::metadata(&path).unwrap().ino(),
            file.metadata().unwrap().ino()
        );
        // It is served from now on: all share one content.
        let reader = File::open(&path).unwrap();
        file.write_all_at(b"NEW", 8).unwrap();
        assert_eq!(read(&reader), b"new old NEW");
    }
    // A server that gets no processor for as long as a claim waits hears of a close too late.
    assert!(kept > FILES * 9 / 10, "{kept} of {FILES}");
}

/// Whoever opens a file for writing that others read is sent to its second number, for which the kernel looks once. When the
/// readers had left by then the file had its first number again, and the next reader was in the way once more: ESTALE.
#[test]
fn a_second_number_is_kept_until_it_can_be_looked_up() {
    let names: Vec<String> = (0..20).map(|n| n.to_string()).collect();
    let layers = old_files(&names.iter().map(String::as_str).collect::<Vec<_>>());
    let Some(mount) = passing(&layers, "") else {
        return;
    };
    let looked_up_at_once = names.iter().any(|name| {
        let path = mount.join(name);
        let begun = Instant::now();
        let reader = File::open(&path).unwrap();
        let first = reader.metadata().unwrap().ino();
        // Not by its name, so that nobody looks it up.
        let opened = File::options().write(true).open(again(&reader));
        assert_eq!(errno(opened), libc::ESTALE);
        drop(reader);
        // The server learns that the kernel has forgotten it.
        std::thread::sleep(Duration::from_millis(100));
        let number = fs::metadata(&path).unwrap().ino();
        let at_once = begun.elapsed() < Duration::from_secs(2);
        assert!(number != first || !at_once);
        at_once
    });
    assert!(looked_up_at_once);
}

#[test]
fn opens_and_writes_at_once_fail_nobody() {
    const FILES: usize = 60;
    let names: Vec<String> = (0..FILES).map(|n| n.to_string()).collect();
    let layers = old_files(&names.iter().map(String::as_str).collect::<Vec<_>>());
    let Some(mount) = passing(&layers, "threads=4") else {
        return;
    };
    /// Ends the readers when the writer has ended, also by a panic, which would wait for them without end.
    struct EndsReaders<'a>(&'a AtomicBool);
    impl Drop for EndsReaders<'_> {
        fn drop(&mut self) {
            self.0.store(true, Ordering::Relaxed);
        }
    }
    let over = AtomicBool::new(false);
    std::thread::scope(|scope| {
        let _ends_readers = EndsReaders(&over);
        for _ in 0..3 {
            scope.spawn(|| {
                // Some stay open for a while, so that there is something in the writer's way.
                let mut kept = Vec::new();
                while !over.load(Ordering::Relaxed) {
                    for name in &names {
                        let file = File::open(mount.join(name)).unwrap();
                        let content = read(&file);
                        // FUSE's kernel side reads up to the old length while a truncation is under way, and what is
                        // gone by then are zeros.
                        let end = content.iter().rposition(|byte| *byte != 0);
                        let text = &content[..end.map_or(0, |last| last + 1)];
                        let possible: [&[u8]; 4] = [b"old old old", b"new old old", b"", b"new"];
                        assert!(possible.contains(&text), "{content:?}");
                        kept.push(file);
                        if kept.len() == 100 {
                            kept.clear();
                        }
                    }
                }
            });
        }
        for (n, name) in names.iter().enumerate() {
            let path = mount.join(name);
            match n % 3 {
                0 => writer(&path).write_all(b"new").unwrap(),
                1 => fs::write(&path, "new").unwrap(),
                _ => truncate(&path, 12).unwrap(),
            }
            let expected: &[u8] = [&b"new old old"[..], b"new", b"old old old\0"][n % 3];
            assert_eq!(fs::read(&path).unwrap(), expected, "{name}");
            assert_eq!(fs::metadata(&path).unwrap().size(), expected.len() as u64);
        }
    });
}

#[test]
fn what_is_open_outlasts_its_name() {
    let layers = old_files(&["removed", "renamed", "covered", "other"]);
    let Some(mount) = passing(&layers, "") else {
        return;
    };
    let open = |name: &str| File::open(mount.join(name)).unwrap();
    let readers = [open("removed"), open("renamed"), open("covered")];
    fs::remove_file(mount.join("removed")).unwrap();
    fs::rename(mount.join("renamed"), mount.join("new name")).unwrap();
    fs::rename(mount.join("other"), mount.join("covered")).unwrap();
    fs::write(mount.join("removed"), "another").unwrap();
    fs::write(mount.join("new name"), "new").unwrap();
    for reader in &readers {
        assert_eq!(read(reader), b"old old old");
    }
    assert_eq!(readers[0].metadata().unwrap().nlink(), 0);
    assert_eq!(fs::read(mount.join("removed")).unwrap(), b"another");
    assert_eq!(fs::read(mount.join("new name")).unwrap(), b"new");
}

#[test]
fn a_lower_program_runs_and_cannot_be_written_meanwhile() {
    let layers = Layers::new(1);
    let below = layers.lower(0).join("sleep");
    fs::copy("/bin/sleep", &below).unwrap();
    let Some(mount) = passing(&layers, "") else {
        return;
    };
    let mut child = Command::new(mount.join("sleep"))
        .arg("600")
        .spawn()
        .unwrap();
    let busy = File::options().write(true).open(mount.join("sleep"));
    child.kill().unwrap();
    child.wait().unwrap();
    assert_eq!(errno(busy), libc::ETXTBSY);
    fs::copy("/bin/true", mount.join("sleep")).unwrap();
    assert!(
        Command::new(mount.join("sleep"))
            .status()
            .unwrap()
            .success()
    );
}

#[test]
fn what_cannot_be_passed_is_served() {
    let layers = old_files(&["f"]);
    // Masked, or on a kernel that has no such thing.
    let mount = Mount::new(&layers, "passthrough,kernel_features=-passthrough");
    let reader = File::open(mount.join("f")).unwrap();
    writer(mount.join("f")).write_all(b"new").unwrap();
    assert_eq!(read(&reader), b"new old old");
    drop(reader);
    mount.unmount();

    // A layer on a mount that passes files through itself is one stack too many.
    let Some(mount) = passing(&layers, "") else {
        return;
    };
    let upper = Layers::new(0);
    let options = format!(
        "passthrough,lowerdir={},upperdir={},workdir={}",
        mount.join("").display(),
        upper.upper().display(),
        upper.path("work").display()
    );
    let second = Mount::with_options(&upper.mnt(), &options);
    let reader = File::open(second.join("f")).unwrap();
    writer(second.join("f")).write_all(b"NEW").unwrap();
    assert_eq!(read(&reader), b"NEW old old");
    assert_eq!(fs::read(mount.join("f")).unwrap(), b"new old old");
    drop(reader);
    second.unmount();
    mount.unmount();
}

#[test]
fn with_direct_io_a_file_is_served() {
    let layers = Layers::new(1);
    Layers::write(&layers.lower(0).join("f"), [7; 8192]);
    let Some(mount) = passing(&layers, "") else {
        return;
    };
    let reader = File::open(mount.join("f")).unwrap();
    let direct = |flags: i32| {
        let mut options = File::options();
        options.read(true).custom_flags(flags).open(mount.join("f"))
    };
    let file = direct(libc::O_DIRECT).unwrap();
    assert_eq!(file.metadata().unwrap().size(), 8192);
    assert!(read(&reader) == [7; 8192] && fs::read(mount.join("f")).unwrap() == [7; 8192]);
}
