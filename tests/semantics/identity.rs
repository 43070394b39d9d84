//! One identity: a lower file stays the file that it was when it is copied up.

use std::collections::HashSet;
use std::fs::{self, File};
use std::io::Read;
use std::os::unix::fs::{FileExt, MetadataExt, OpenOptionsExt};
use std::path::Path;

use nix::fcntl::{FcntlArg, fcntl};
use rustix::fs::inotify;

use crate::common::mapping;
use crate::fill::Fill;
use crate::outcome::{Outcome, expect, fails};
use crate::place::Place;
use crate::row::{Row, row};
use crate::tools::{ino, numbers, open_rw};

fn one_file(fill: &Fill) {
    fill.file("f", "old old old");
}

fn tree(fill: &Fill) {
    for n in 0..2 {
        for name in ["same", &format!("own{n}")] {
            fill.file_in(n, &format!("merged/{name}"), format!("{n}"));
            fill.file_in(n, &format!("merged/{name}.d/inner"), "");
        }
        fill.file_in(n, &format!("alone{n}/f"), "");
    }
}

/// Copies everything up that can be.
fn touch_all(dir: &Path) -> Outcome {
    for (path, _) in numbers(dir)? {
        let m = fs::symlink_metadata(&path)?;
        if m.is_file() {
            open_rw(&path)?.write_all_at(b"new", 0)?;
        }
        fs::set_permissions(&path, m.permissions())?;
    }
    Ok(())
}

fn events(watch: &std::os::fd::OwnedFd, wanted: inotify::ReadFlags) -> bool {
    let mut buffer = [std::mem::MaybeUninit::uninit(); 4096];
    let mut reader = inotify::Reader::new(watch, &mut buffer);
    while let Ok(event) = reader.next() {
        if event.events().intersects(wanted) {
            return true;
        }
    }
    false
}

fn write_lock(exclusive: bool) -> libc::flock {
    libc::flock {
        l_type: if exclusive {
            libc::F_WRLCK
        } else {
            libc::F_RDLCK
        } as libc::c_short,
        l_whence: libc::SEEK_SET as libc::c_short,
        l_start: 0,
        l_len: 0,
        l_pid: 0,
    }
}

/// All rows of the chapter.
pub fn rows() -> Vec<Row> {
    vec![
        row(
            "descriptor",
            "A read descriptor from before the copy-up reads what is written after it.",
            one_file,
            |at| {
                let mut reader = File::open(at.path("f"))?;
                open_rw(at.path("f"))?.write_all_at(b"new", 0)?;
                let mut text = String::new();
                reader.read_to_string(&mut text)?;
                expect(text == "new old old", "stale")
            },
        ),
        row(
            "descriptor_stat",
            "fstat of such a descriptor shows the size, mode and number that stat shows.",
            one_file,
            |at| {
                let reader = File::open(at.path("f"))?;
                open_rw(at.path("f"))?.set_len(3)?;
                let perm = std::os::unix::fs::PermissionsExt::from_mode(0o640);
                fs::set_permissions(at.path("f"), perm)?;
                let (one, other) = (reader.metadata()?, fs::metadata(at.path("f"))?);
                let facts = |m: &fs::Metadata| (m.ino(), m.dev(), m.size(), m.mode(), m.nlink());
                expect(facts(&one) == facts(&other) && one.size() == 3, "stale")
            },
        ),
        row(
            "path_descriptor",
            "An O_PATH descriptor from before the copy-up leads to what is written after it.",
            one_file,
            |at| {
                let path = File::options()
                    .read(true)
                    .custom_flags(libc::O_PATH)
                    .open(at.path("f"))?;
                open_rw(at.path("f"))?.write_all_at(b"new", 0)?;
                let again = format!("/proc/self/fd/{}", std::os::fd::AsRawFd::as_raw_fd(&path));
                expect(fs::read(again)? == b"new old old", "stale")
            },
        ),
        row(
            "mapping",
            "A shared mapping from before the copy-up shows what is written after it.",
            |fill| fill.file("f", [b'o'; 10_000]),
            |at| {
                let map = mapping::shared(&File::open(at.path("f"))?);
                expect(map[0] == b'o' && map[9000] == b'o', "wrong content")?;
                let writer = open_rw(at.path("f"))?;
                writer.write_all_at(b"new", 0)?;
                writer.write_all_at(b"new", 9000)?;
                expect(&map[..3] == b"new" && &map[9000..9003] == b"new", "stale")
            },
        ),
        row(
            "two_writers",
            "Two descriptors for reading and writing share one content, whichever copied the file up.",
            one_file,
            |at| {
                let (one, other) = (open_rw(at.path("f"))?, open_rw(at.path("f"))?);
                other.write_all_at(b"NEW", 0)?;
                one.write_all_at(b"OLD", 8)?;
                let mut bytes = [0; 11];
                one.read_exact_at(&mut bytes, 0)?;
                expect(&bytes == b"NEW old OLD", "not shared")
            },
        ),
        row(
            "watch_of_file",
            "An inotify watch of a lower file tells of a later writer.",
            one_file,
            |at| {
                let watch = inotify::init(inotify::CreateFlags::NONBLOCK)?;
                inotify::add_watch(&watch, at.path("f"), inotify::WatchFlags::MODIFY)?;
                open_rw(at.path("f"))?.write_all_at(b"new", 0)?;
                expect(events(&watch, inotify::ReadFlags::MODIFY), "nothing seen")
            },
        ),
        row(
            "watch_of_attributes",
            "An inotify watch of a lower file tells of a later change of its mode.",
            one_file,
            |at| {
                let watch = inotify::init(inotify::CreateFlags::NONBLOCK)?;
                inotify::add_watch(&watch, at.path("f"), inotify::WatchFlags::ATTRIB)?;
                let perm = std::os::unix::fs::PermissionsExt::from_mode(0o640);
                fs::set_permissions(at.path("f"), perm)?;
                expect(events(&watch, inotify::ReadFlags::ATTRIB), "nothing seen")
            },
        ),
        row(
            "watch_of_directory",
            "An inotify watch of a lower directory tells of what is made and removed in it.",
            |fill| fill.file("d/f", ""),
            |at| {
                let watch = inotify::init(inotify::CreateFlags::NONBLOCK)?;
                let wanted = inotify::WatchFlags::CREATE | inotify::WatchFlags::DELETE;
                inotify::add_watch(&watch, at.path("d"), wanted)?;
                File::create(at.path("d/new"))?;
                expect(events(&watch, inotify::ReadFlags::CREATE), "nothing seen")?;
                fs::remove_file(at.path("d/f"))?;
                expect(events(&watch, inotify::ReadFlags::DELETE), "nothing seen")
            },
        ),
        row(
            "flock",
            "A flock taken through a read descriptor keeps a later writer's out.",
            one_file,
            |at| {
                use rustix::fs::{FlockOperation, flock};
                let reader = File::open(at.path("f"))?;
                flock(&reader, FlockOperation::LockExclusive)?;
                let writer = open_rw(at.path("f"))?;
                let tried = flock(&writer, FlockOperation::NonBlockingLockExclusive);
                fails(tried, nix::Error::EAGAIN)?;
                drop(reader);
                Ok(flock(&writer, FlockOperation::NonBlockingLockExclusive)?)
            },
        ),
        row(
            "record_lock",
            "A record lock taken through a read descriptor keeps a later writer's out.",
            one_file,
            |at| {
                let reader = File::open(at.path("f"))?;
                fcntl(&reader, FcntlArg::F_OFD_SETLK(&write_lock(false)))?;
                let writer = open_rw(at.path("f"))?;
                let tried = fcntl(&writer, FcntlArg::F_OFD_SETLK(&write_lock(true)));
                fails(tried, nix::Error::EAGAIN)?;
                drop(reader);
                fcntl(&writer, FcntlArg::F_OFD_SETLK(&write_lock(true)))?;
                Ok(())
            },
        ),
        row(
            "unique_numbers",
            "No two objects share an inode number, and listings show the numbers that stat shows.",
            tree,
            |at| {
                let all = numbers(&at.root())?;
                let distinct: HashSet<u64> = all.iter().map(|(_, number)| *number).collect();
                expect(distinct.len() == all.len() && all.len() == 14, "not unique")
            },
        ),
        row(
            "unique_numbers_after_copy_up",
            "The same once everything was copied up.",
            tree,
            |at| {
                touch_all(&at.root())?;
                let all = numbers(&at.root())?;
                let distinct: HashSet<u64> = all.iter().map(|(_, number)| *number).collect();
                expect(distinct.len() == all.len() && all.len() == 14, "not unique")
            },
        ),
        row(
            "one_device",
            "All objects show one st_dev, so that du -x and find -xdev see the whole tree.",
            tree,
            |at| {
                let dev = fs::metadata(at.root())?.dev();
                for (path, _) in numbers(&at.root())? {
                    expect(fs::symlink_metadata(path)?.dev() == dev, "differs")?;
                }
                Ok(())
            },
        ),
        row(
            "number_over_copy_up",
            "A file and a directory keep their inode number when they are copied up.",
            tree,
            |at| {
                let before = numbers(&at.root())?;
                touch_all(&at.root())?;
                expect(numbers(&at.root())? == before, "changes")
            },
        ),
        row(
            "number_over_dropped_caches",
            "They keep it when the kernel has forgotten them.",
            tree,
            |at| {
                touch_all(&at.path("merged"))?;
                let before = numbers(&at.root())?;
                at.drop_caches();
                expect(numbers(&at.root())? == before, "changes")
            },
        ),
        row(
            "number_over_rename",
            "A file and a directory keep their inode number when they are renamed.",
            tree,
            |at| {
                let (file, dir) = (ino(at.path("merged/own1"))?, ino(at.path("alone1"))?);
                fs::rename(at.path("merged/own1"), at.path("f"))?;
                expect(ino(at.path("f"))? == file, "changes")?;
                fs::rename(at.path("alone1"), at.path("merged/d"))?;
                expect(ino(at.path("merged/d"))? == dir, "changes")
            },
        ),
        row(
            "number_over_remount",
            "All numbers are the same after a remount, of what was copied up, renamed and made too.",
            tree,
            |at| {
                touch_all(&at.path("merged"))?;
                fs::rename(at.path("merged/own1"), at.path("f"))?;
                fs::write(at.path("merged/made"), "")?;
                let before = numbers(&at.root())?;
                at.remount()?;
                expect(numbers(&at.root())? == before, "changes")
            },
        ),
        row(
            "number_over_directory_rename",
            "The same with a renamed lower directory.",
            tree,
            |at| {
                fs::rename(at.path("alone1"), at.path("moved"))?;
                touch_all(&at.path("moved"))?;
                let before = numbers(&at.root())?;
                at.remount()?;
                expect(numbers(&at.root())? == before, "changes")
            },
        ),
        row(
            "running_program",
            "A lower program runs on while a new one is renamed over it.",
            |fill| {
                fs::copy("/bin/sleep", fill.path(0, "sleep")).unwrap();
            },
            |at: &Place| {
                let mut child = std::process::Command::new(at.path("sleep"))
                    .arg("60")
                    .spawn()?;
                fs::copy("/bin/true", at.path("new"))?;
                fs::rename(at.path("new"), at.path("sleep"))?;
                let alive = child.try_wait()?.is_none();
                child.kill()?;
                child.wait()?;
                expect(alive, "dies")?;
                let status = std::process::Command::new(at.path("sleep")).status()?;
                expect(status.success(), "old program")
            },
        ),
        row(
            "proc_self_fd",
            "/proc/self/fd shows the path of an open file, after its copy-up and rename too.",
            |fill| fill.file("d/f", "old"),
            |at| {
                let file = File::open(at.path("d/f"))?;
                let link = format!("/proc/self/fd/{}", std::os::fd::AsRawFd::as_raw_fd(&file));
                expect(fs::read_link(&link)? == at.path("d/f"), "another path")?;
                open_rw(at.path("d/f"))?.write_all_at(b"new", 0)?;
                fs::rename(at.path("d/f"), at.path("g"))?;
                expect(fs::read_link(&link)? == at.path("g"), "old path")
            },
        ),
    ]
}
