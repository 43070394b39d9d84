//! Many threads at once: nothing deadlocks, nothing is lost, and what is seen is what is stored.

use std::cell::Cell;
use std::fs::File;
use std::os::fd::AsFd;
use std::os::unix::fs::MetadataExt;
use std::sync::Barrier;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use nix::errno::Errno;

use super::lend::{self, Lent};
use super::*;
use crate::sys::fs::Object;

/// A small generator of numbers, so that a failure can be repeated.
struct Dice(u64);

impl Dice {
    fn roll(&mut self, sides: usize) -> usize {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        (self.0 % sides as u64) as usize
    }
}

fn fill(lowers: &[PathBuf]) {
    for (n, lower) in lowers.iter().enumerate() {
        for dir in ["a", "b", "a/c", "b/d"] {
            for file in ["w", "x", "y", "z"] {
                if (file.len() + dir.len() + n) % 3 != 0 {
                    put(lower.join(dir).join(file), &format!("{n}{dir}{file}"));
                }
            }
        }
        std::fs::hard_link(lower.join("a/c/w"), lower.join("b/linked")).ok();
    }
}

fn name(dice: &mut Dice) -> String {
    let dirs = ["", "a", "b", "a/c", "b/d", "e", "a/e"];
    let names = ["w", "x", "y", "z", "linked", "c", "d", "e"];
    let dir = dirs[dice.roll(dirs.len())];
    let file = names[dice.roll(names.len())];
    if dir.is_empty() {
        file.to_owned()
    } else {
        format!("{dir}/{file}")
    }
}

/// One operation on random names; failures that names explain are no failures.
fn step(fixture: &Fixture, dice: &mut Dice) {
    let union = fixture.union();
    let parent_of = |path: &str| -> Option<(NodeId, OsString)> {
        let (parent, name) = path.rsplit_once('/').unwrap_or(("", path));
        Some((fixture.find(parent).ok()?.node, name.into()))
    };
    let (one, two) = (name(dice), name(dice));
    let (Some((parent, name)), Some((other, new))) = (parent_of(&one), parent_of(&two)) else {
        return;
    };
    let result = match dice.roll(9) {
        0 => union.mkdir(parent, &name, 0o755, &Caller::ROOT).map(drop),
        1 => union
            .create(parent, &name, 0o644, libc::O_RDWR, &Caller::ROOT)
            .map(|(entry, handle)| union.release(entry.node, handle)),
        2 => union.unlink(parent, &name),
        3 => union.rmdir(parent, &name),
        4 => union.rename(parent, &name, other, &new, RenameMode::Replace),
        5 => union.rename(parent, &name, other, &new, RenameMode::Exchange),
        6 => fixture
            .find(&one)
            .and_then(|found| union.link(found.node, other, &new))
            .map(drop),
        7 => fixture
            .find(&one)
            .and_then(|found| union.write(found.node, None, 0, b"written", None))
            .map(drop),
        _ => fixture.find(&one).and_then(|found| {
            let handle = union.open_dir(found.node)?;
            union.read_dir(found.node, &handle, 0, &mut |_| true)
        }),
    };
    let expected = [
        0,
        libc::ENOENT,
        libc::EEXIST,
        libc::ENOTDIR,
        libc::EISDIR,
        libc::ENOTEMPTY,
        libc::EINVAL,
        libc::EPERM,
        libc::ESTALE,
        libc::EMLINK,
    ];
    let errno = errno(result);
    assert!(expected.contains(&errno), "{one} {two}: {errno}");
}

#[test]
fn random_operations_from_many_threads_leave_a_consistent_tree() {
    for seed in 1..=4u64 {
        let mut fixture = Fixture::new(3, fill);
        std::thread::scope(|scope| {
            for thread in 0..4 {
                let fixture = &fixture;
                scope.spawn(move || {
                    let mut dice = Dice(seed * 1000 + thread + 1);
                    for _ in 0..1500 {
                        step(fixture, &mut dice);
                    }
                });
            }
        });
        fixture.check_remount();
    }
}

#[test]
fn one_thread_of_random_operations_survives_a_remount_at_any_time() {
    for seed in 1..=8u64 {
        let mut fixture = Fixture::new(3, fill);
        let mut dice = Dice(seed * 77);
        for _ in 0..25 {
            for _ in 0..12 {
                step(&fixture, &mut dice);
            }
            fixture.check_remount();
        }
    }
}

#[test]
fn one_name_is_created_once() {
    let fixture = Fixture::new(1, |lowers| put(lowers[0].join("f"), "lower"));
    for _ in 0..50 {
        fixture.unlink("f").unwrap();
        let made = AtomicU64::new(0);
        std::thread::scope(|scope| {
            for _ in 0..4 {
                scope.spawn(|| {
                    let result = fixture.union().create(
                        NodeId::ROOT,
                        OsStr::new("f"),
                        0o644,
                        libc::O_EXCL,
                        &Caller::ROOT,
                    );
                    match result {
                        Ok((entry, handle)) => {
                            fixture.union().release(entry.node, handle);
                            made.fetch_add(1, Ordering::Relaxed);
                        }
                        Err(error) => assert_eq!(error.errno, libc::EEXIST),
                    }
                });
            }
        });
        assert_eq!(made.load(Ordering::Relaxed), 1);
    }
}

#[test]
fn readers_see_the_old_content_or_the_new_while_a_file_is_copied_up() {
    let text = "x".repeat(300_000);
    let fixture = Fixture::new(1, |lowers| put(lowers[0].join("f"), &text));
    let node = fixture.node("f");
    std::thread::scope(|scope| {
        for _ in 0..3 {
            scope.spawn(|| {
                for _ in 0..200 {
                    let mut buf = vec![0; 400_000];
                    let n = fixture.union().read(node, None, 0, &mut buf).unwrap();
                    assert_eq!(n, text.len());
                    assert!(buf[1..n].iter().all(|byte| *byte == b'x'));
                }
            });
        }
        scope.spawn(|| fixture.union().write(node, None, 0, b"y", None).unwrap());
    });
    assert!(fixture.upper().join("f").exists());
}

/// Makes a file that its owner may not write.
fn read_only(fixture: &Fixture, name: &str) -> NodeId {
    fixture.write(name, "text").unwrap();
    let node = fixture.node(name);
    let set = SetAttr {
        perm: Some(0o444),
        ..SetAttr::default()
    };
    let done = fixture.union().setattr(node, None, &set, &Caller::ROOT);
    done.unwrap();
    node
}

/// The kernel was told of it, and kept it for good.
#[test]
fn a_lent_mode_is_told_to_nobody() {
    let mut fixture = Fixture::new(1, |_| {});
    for name in ["known", "new"] {
        read_only(&fixture, name);
    }
    fixture.reopen();
    let (union, known) = (fixture.union(), fixture.node("known"));
    let upper = union.upper.as_ref().unwrap();
    // As a plyfs of an ordinary user has it.
    upper.lends.store(true, Ordering::Release);
    let files = ["known", "new"].map(|name| File::open(fixture.upper().join(name)).unwrap());
    std::thread::scope(|scope| {
        let turn = upper.modes.write();
        let lent = files
            .each_ref()
            .map(|file| Lent::new(Object::Open(file.as_fd()), lend::WRITE).unwrap());
        let by_number = scope.spawn(|| union.getattr(known, None).unwrap());
        let by_name = scope.spawn(|| union.lookup(NodeId::ROOT, OsStr::new("new")).unwrap());
        std::thread::sleep(Duration::from_millis(50));
        drop(lent);
        drop(turn);
        assert_eq!(by_number.join().unwrap().perm, 0o444);
        assert_eq!(by_name.join().unwrap().attr.perm, 0o444);
    });
}

/// Of two at once the later one took the lent mode for the object's own, and left it.
#[test]
fn nobody_else_lends_or_tells_a_mode_meanwhile() {
    let fixture = Fixture::new(1, |_| {});
    read_only(&fixture, "f");
    let file = File::open(fixture.upper().join("f")).unwrap();
    let upper = fixture.union().upper.as_ref().unwrap();
    let perm = || file.metadata().unwrap().mode() & 0o7777;
    let tries = Cell::new(0);
    let done = upper.permitted(Object::Open(file.as_fd()), lend::WRITE, || {
        let free = upper.modes.try_read().is_some();
        tries.set(tries.get() + 1);
        // As for a plyfs that is held to modes.
        match tries.get() {
            1 => Err(Errno::EACCES),
            _ => Ok((perm(), free)),
        }
    });
    assert_eq!(done, Ok((0o644, false)));
    assert_eq!((perm(), tries.get()), (0o444, 2));
    assert!(upper.modes.try_write().is_some());
}

/// Who had lent it lacked it, and put back a mode without the set-id bits that the data had cost the file meanwhile.
#[test]
fn a_mode_that_is_lent_is_not_put_back_after_data_was_brought_up() {
    let fixture = Fixture::new(1, |_| {});
    let union = fixture.union();
    let node = union.node(read_only(&fixture, "f")).unwrap();
    let file = File::open(fixture.upper().join("f")).unwrap();
    let perm = || file.metadata().unwrap().mode() & 0o7777;
    let upper = union.upper.as_ref().unwrap();
    let meeting = Barrier::new(2);
    std::thread::scope(|scope| {
        scope.spawn(|| {
            meeting.wait();
            let _turn = upper.modes.write();
            let _lent = Lent::new(Object::Open(file.as_fd()), lend::WRITE).unwrap();
            meeting.wait();
            std::thread::sleep(Duration::from_millis(50));
            assert_eq!(perm(), 0o644);
        });
        let bring_up = || {
            meeting.wait();
            meeting.wait();
            Ok(())
        };
        union.quietly(&node, file.as_fd(), bring_up).unwrap();
    });
    assert_eq!(perm(), 0o444);
}
