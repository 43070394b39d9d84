//! What the maps of incompletely copied files hold through kills, and what a sync makes of them.

use std::ffi::OsStr;
use std::os::fd::AsFd;
use std::os::unix::fs::{FileExt, MetadataExt};
use std::time::Duration;

use super::chunks::{CHUNK, config, cut, fixture, maps, pattern, read_all, reopen, reopen_as};
use super::chunks::{assert_plain, restart, write};
use super::*;

/// Files of this process that lie in the directory of the maps.
fn open_maps(fixture: &Fixture) -> usize {
    let dir = fixture
        .base
        .path()
        .join("work/work/incompat/plywood.chunks");
    std::fs::read_dir("/proc/self/fd")
        .unwrap()
        .filter_map(|entry| std::fs::read_link(entry.unwrap().path()).ok())
        .filter(|path| path.starts_with(&dir) && *path != dir)
        .count()
}

#[test]
fn a_sync_of_many_maps_holds_none_of_them_open() {
    const FILES: usize = 300;
    let names: Vec<String> = (0..FILES).map(|n| format!("f{n}")).collect();
    let names: Vec<&str> = names.iter().map(String::as_str).collect();
    let content = pattern(2 * CHUNK, 1);
    let mut fixture = fixture(&names, &content);
    let config = config(&fixture);
    for name in &names {
        write(&fixture, name, CHUNK, b"new");
    }
    // Nobody has used them since: they are on the disk alone.
    reopen(&mut fixture, config.clone());
    let mut seen = None;
    let maps = &fixture.union().upper().unwrap().maps;
    maps.sync(|| {
        seen = Some(open_maps(&fixture));
        Ok(())
    })
    .unwrap();
    assert_eq!(seen, Some(0));
    fixture.union = None;
    restart(&fixture);
    reopen(&mut fixture, config);
    let mut expected = content;
    expected[CHUNK as usize..CHUNK as usize + 3].copy_from_slice(b"new");
    for name in &names {
        assert!(read_all(&fixture, name) == expected, "{name}");
    }
}

#[test]
fn a_damaged_map_fails_a_sync_and_keeps_no_other_from_it() {
    let content = pattern(2 * CHUNK, 1);
    let mut fixture = fixture(&["a", "b", "c"], &content);
    let config = config(&fixture);
    for name in ["a", "b", "c"] {
        write(&fixture, name, 0, b"new");
    }
    fixture.union = None;
    let damaged = maps(&fixture).remove(1);
    let saved = std::fs::read(&damaged).unwrap();
    std::fs::write(&damaged, vec![1; saved.len()]).unwrap();
    reopen(&mut fixture, config.clone());
    assert_eq!(errno(fixture.union().sync()), libc::EIO);
    fixture.union = None;
    // What could be noted is.
    restart(&fixture);
    std::fs::write(&damaged, saved).unwrap();
    reopen(&mut fixture, config.clone());
    let mut expected = content;
    expected[..3].copy_from_slice(b"new");
    for name in ["a", "b", "c"] {
        assert!(read_all(&fixture, name) == expected, "{name}");
    }
    // A file whose map is gone is no reason to fail: it was completed, or removed.
    std::fs::remove_file(&damaged).unwrap();
    fixture.union().sync().unwrap();
}

#[test]
fn a_sync_that_fails_notes_nothing() {
    let content = pattern(2 * CHUNK, 1);
    let mut fixture = fixture(&["f"], &content);
    write(&fixture, "f", 0, b"new");
    let maps = &fixture.union().upper().unwrap().maps;
    let failed = maps.sync(|| Err(nix::errno::Errno::ENOSPC.into()));
    assert_eq!(errno(failed), libc::ENOSPC);
    fixture.union = None;
    restart(&fixture);
    let config = config(&fixture);
    reopen(&mut fixture, config);
    assert!(read_all(&fixture, "f") == content);
}

#[test]
fn without_proc_a_kill_loses_no_answered_write() {
    let content = pattern(12 * CHUNK, 1);
    for volatile in [false, true] {
        let mut fixture = fixture(&["f"], &content);
        let config = UnionConfig {
            volatile,
            ..config(&fixture)
        };
        let mut expected = content.clone();
        for round in 0..3u64 {
            reopen_as(&mut fixture, config.clone(), false);
            assert!(read_all(&fixture, "f") == expected, "{round}");
            // Part of a chunk, two whole ones and part of a third.
            let at = 3 * CHUNK * round + 5;
            let data = vec![7; 2 * CHUNK as usize + 100];
            write(&fixture, "f", at, &data);
            expected[at as usize..at as usize + data.len()].copy_from_slice(&data);
        }
        reopen_as(&mut fixture, config.clone(), false);
        let size = 10 * CHUNK + 9;
        cut(&fixture, "f", size);
        expected.truncate(size as usize);
        reopen_as(&mut fixture, config.clone(), false);
        cut(&fixture, "f", 11 * CHUNK);
        expected.resize(11 * CHUNK as usize, 0);
        // Also when the next server has it again, and when the host has gone down.
        for knows_run in [false, true] {
            reopen_as(&mut fixture, config.clone(), knows_run);
            assert!(read_all(&fixture, "f") == expected);
        }
    }
}

#[test]
fn without_proc_attributes_do_not_wait_for_the_sync_of_a_completion() {
    let content = pattern(4 * CHUNK, 1);
    let mut fixture = fixture(&["f"], &content);
    let config = config(&fixture);
    reopen_as(&mut fixture, config, false);
    write(&fixture, "f", 0, b"new");
    let (union, id) = (fixture.union(), fixture.node("f"));
    let node = union.table.get(id).unwrap();
    let chunks = node.place.read().rare.chunks.clone().unwrap();
    let map = chunks.known_map();
    std::thread::scope(|scope| {
        let completed = map.while_synced(|| {
            let completed = scope.spawn(|| union.complete_partial());
            while map.progress() != (4, 4) {
                std::thread::yield_now();
            }
            let (done, changed) = std::sync::mpsc::channel();
            scope.spawn(move || {
                let set = SetAttr {
                    perm: Some(0o640),
                    ..SetAttr::default()
                };
                done.send(union.setattr(id, None, &set, &Caller::ROOT))
            });
            let changed = changed.recv_timeout(Duration::from_secs(20));
            assert_eq!(changed.unwrap().unwrap().perm, 0o640);
            completed
        });
        completed.join().unwrap().unwrap();
    });
    assert!(maps(&fixture).is_empty());
}

#[test]
fn what_was_written_with_proc_is_not_dropped_without() {
    let content = pattern(4 * CHUNK, 1);
    let mut fixture = fixture(&["f"], &content);
    let config = config(&fixture);
    write(&fixture, "f", CHUNK, b"not synced");
    reopen_as(&mut fixture, config.clone(), false);
    let node = fixture.node("f");
    let refused = fixture.union().read(node, None, 0, &mut [0; 10]);
    assert_eq!(errno(refused), libc::EIO);
    assert_eq!(errno(fixture.union().sync()), libc::EIO);
    let mut expected = content;
    expected[CHUNK as usize..CHUNK as usize + 10].copy_from_slice(b"not synced");
    reopen(&mut fixture, config.clone());
    assert!(read_all(&fixture, "f") == expected);
    // Once it is synced there is nothing to tell.
    fixture.union().sync().unwrap();
    reopen_as(&mut fixture, config, false);
    assert!(read_all(&fixture, "f") == expected);
}

/// The host failed right after it had taken the mark off: the next write that made the file longer was ENODATA then, and so
/// was every later completion.
#[test]
fn a_completion_that_fails_at_its_end_leaves_a_file_to_write_and_to_complete() {
    let mut fixture = fixture(&["f"], &pattern(8 * CHUNK, 1));
    let durable = UnionConfig {
        volatile: false,
        ..config(&fixture)
    };
    reopen(&mut fixture, durable);
    let all = pattern(8 * CHUNK, 2);
    write(&fixture, "f", 0, &all);
    let host = std::fs::File::open(fixture.upper().join("f")).unwrap();
    let host = crate::sys::fs::Object::Open(host.as_fd());
    crate::sys::xattr::remove(host, OsStr::new("trusted.overlay.metacopy")).unwrap();
    cut(&fixture, "f", 3 * CHUNK + 5);
    write(&fixture, "f", 6 * CHUNK, b"new");
    let mut expected = all[..3 * CHUNK as usize + 5].to_vec();
    expected.resize(6 * CHUNK as usize, 0);
    expected.extend_from_slice(b"new");
    assert!(read_all(&fixture, "f") == expected);
    fixture.union().complete_partial().unwrap();
    assert_plain(&fixture, "f", &expected);
}

/// What a file has that a look at it is not to change: its time of change, its capabilities, and the space it takes.
fn kept(file: &std::fs::File) -> (i64, i64, Option<Vec<u8>>, u64) {
    let metadata = file.metadata().unwrap();
    let object = crate::sys::fs::Object::Open(file.as_fd());
    let capability = crate::sys::xattr::get(object, OsStr::new("security.capability")).ok();
    (
        metadata.mtime(),
        metadata.mtime_nsec(),
        capability,
        metadata.blocks(),
    )
}

/// What was reserved and then read looks like data to the host: when the file was opened anew, plyfs took it for what a crash
/// had left, and a commit had the time of that instead of the program's, no capabilities, and holes.
#[test]
fn what_was_reserved_stays_as_it_is_when_a_file_is_opened_anew() {
    let content = pattern(8 * CHUNK, 1);
    let mut fixture = fixture(&["f"], &content);
    let config = config(&fixture);
    let node = fixture.node("f");
    let union = fixture.union();
    union
        .fallocate(node, None, 0, 2 * CHUNK, 4 * CHUNK, &Caller::ROOT)
        .unwrap();
    let host = std::fs::File::options()
        .read(true)
        .write(true)
        .open(fixture.upper().join("f"))
        .unwrap();
    let object = crate::sys::fs::Object::Open(host.as_fd());
    let capability = copyup::CAPABILITY;
    crate::sys::xattr::set(object, OsStr::new("security.capability"), &capability, 0).unwrap();
    let old = std::time::UNIX_EPOCH + Duration::new(1_000_000_000, 123_456_789);
    host.set_modified(old).unwrap();
    let before = kept(&host);
    assert!(before.2.is_some() && before.3 > 0, "{before:?}");
    host.read_exact_at(&mut [0], 3 * CHUNK).unwrap();
    let offset = (2 * CHUNK) as i64;
    let data = crate::sys::fs::lseek(host.as_fd(), offset, libc::SEEK_DATA).unwrap();
    assert!(
        data < (6 * CHUNK) as i64,
        "the host shows no data, so this shows nothing"
    );

    reopen(&mut fixture, config.clone());
    assert!(read_all(&fixture, "f") == content);
    assert_eq!(kept(&host), before);

    // What a crash has left does go, and nobody can tell.
    host.write_all_at(b"torn", 3 * CHUNK).unwrap();
    crate::sys::xattr::set(object, OsStr::new("security.capability"), &capability, 0).unwrap();
    host.set_modified(old).unwrap();
    let (seconds, nanoseconds, capability, _) = kept(&host);
    reopen(&mut fixture, config);
    assert!(read_all(&fixture, "f") == content);
    let mut left = [1; 4];
    host.read_exact_at(&mut left, 3 * CHUNK).unwrap();
    assert_eq!(left, [0; 4]);
    let after = kept(&host);
    assert_eq!(
        (after.0, after.1, after.2),
        (seconds, nanoseconds, capability)
    );
}
