//! Large files, of which only what changes is copied up.

use std::os::unix::fs::{FileExt, MetadataExt};

use super::foreign::read_by_others;
use super::*;

pub(super) const CHUNK: u64 = 4096;
const MAP_BOOT: u64 = 24;

/// What `n` bytes of a lower file are; never zero.
pub(super) fn pattern(n: u64, seed: u8) -> Vec<u8> {
    (0..n)
        .map(|at| ((at >> 9) as u8 ^ at as u8 ^ seed) | 1)
        .collect()
}

pub(super) fn config(fixture: &Fixture) -> UnionConfig {
    UnionConfig {
        chunking: Chunking {
            size: CHUNK,
            whole_up_to: 0,
        },
        ..fixture.config()
    }
}

/// Opens the union anew, as after a kill: nothing is finished or synced.
pub(super) fn reopen(fixture: &mut Fixture, config: UnionConfig) {
    reopen_as(fixture, config, true);
}

/// As `reopen`; without `/proc` unless it `knows_run`.
pub(super) fn reopen_as(fixture: &mut Fixture, config: UnionConfig, knows_run: bool) {
    fixture.union = None;
    let mut union = Union::open(config).unwrap();
    let upper = union.upper.as_mut().unwrap();
    // So that a host that can share content does not spare us the chunks.
    *upper.clones.get_mut() = false;
    if !knows_run {
        upper.maps.forget_run();
    }
    fixture.union = Some(union);
}

pub(super) fn fixture(names: &[&str], content: &[u8]) -> Fixture {
    let mut fixture = Fixture::new(1, |lowers| {
        for name in names {
            put(lowers[0].join(name), "");
            std::fs::write(lowers[0].join(name), content).unwrap();
        }
    });
    let config = config(&fixture);
    reopen(&mut fixture, config);
    fixture
}

fn read_at(fixture: &Fixture, node: NodeId, offset: u64, len: usize) -> Vec<u8> {
    let mut buf = vec![0xaa; len];
    let n = fixture.union().read(node, None, offset, &mut buf).unwrap();
    buf.truncate(n);
    buf
}

pub(super) fn read_all(fixture: &Fixture, path: &str) -> Vec<u8> {
    let attr = fixture.find(path).unwrap().attr;
    read_at(fixture, fixture.node(path), 0, attr.size as usize + 10)
}

pub(super) fn write(fixture: &Fixture, path: &str, offset: u64, data: &[u8]) {
    let node = fixture.node(path);
    let n = fixture.union().write(node, None, offset, data, None);
    assert_eq!(n.unwrap(), data.len());
}

pub(super) fn cut(fixture: &Fixture, path: &str, size: u64) {
    let set = SetAttr {
        size: Some(size),
        ..SetAttr::default()
    };
    let node = fixture.node(path);
    let attr = fixture.union().setattr(node, None, &set, &Caller::ROOT);
    assert_eq!(attr.unwrap().size, size);
}

pub(super) fn maps(fixture: &Fixture) -> Vec<PathBuf> {
    let dir = fixture
        .base
        .path()
        .join("work/work/incompat/plywood.chunks");
    match std::fs::read_dir(dir) {
        Ok(entries) => entries.map(|entry| entry.unwrap().path()).collect(),
        Err(_) => Vec::new(),
    }
}

/// Lets the host look as if it had restarted.
pub(super) fn restart(fixture: &Fixture) {
    for map in maps(fixture) {
        let file = std::fs::File::options().write(true).open(map).unwrap();
        file.write_all_at(&[7; 16], MAP_BOOT).unwrap();
    }
}

pub(super) fn assert_plain(fixture: &Fixture, path: &str, content: &[u8]) {
    assert!(maps(fixture).is_empty());
    assert!(!fixture.base.path().join("work/work/incompat").exists());
    let host = fixture.upper().join(path);
    assert!(std::fs::read(&host).unwrap() == content, "{path}");
    let object = std::fs::File::open(&host).unwrap();
    let object = crate::sys::fs::Object::Open(std::os::fd::AsFd::as_fd(&object));
    let names = crate::sys::xattr::list(object).unwrap();
    let left = names.iter().any(|name| name == "trusted.overlay.metacopy");
    assert!(!left, "{names:?}");
}

#[test]
fn a_small_write_to_a_huge_file_copies_one_chunk() {
    const HUGE: u64 = 10 << 30;
    let mut fixture = Fixture::new(1, |lowers| {
        let file = std::fs::File::create(lowers[0].join("f")).unwrap();
        file.set_len(HUGE).unwrap();
        file.write_all_at(&pattern(1 << 20, 1), 5 << 30).unwrap();
    });
    let config = UnionConfig {
        chunking: Chunking::default(),
        ..fixture.config()
    };
    reopen(&mut fixture, config);
    write(&fixture, "f", (5 << 30) + 5000, &[b'x'; 4096]);
    let stat = std::fs::metadata(fixture.upper().join("f")).unwrap();
    assert_eq!(stat.len(), HUGE);
    // The chunk, and what the host needs to find it.
    assert!(
        stat.blocks() * 512 <= (64 << 10) + 16384,
        "{}",
        stat.blocks()
    );
    let mut expected = pattern(1 << 20, 1);
    expected[5000..9096].fill(b'x');
    let node = fixture.node("f");
    assert!(read_at(&fixture, node, 5 << 30, 1 << 20) == expected);
    let union = fixture.union();
    assert_eq!(
        union.lseek(node, None, 0, libc::SEEK_DATA).unwrap(),
        5 << 30
    );
    let hole = union.lseek(node, None, 5 << 30, libc::SEEK_HOLE).unwrap();
    assert_eq!(hole, (5 << 30) + (1 << 20));
    let after = union.lseek(node, None, hole, libc::SEEK_DATA);
    assert_eq!(errno(after), libc::ENXIO);
}

#[test]
fn every_operation_does_what_it_does_on_a_plain_file() {
    use proptest::prelude::*;

    #[derive(Clone, Debug)]
    enum Op {
        Write(u64, usize, u8),
        Read(u64, usize),
        Cut(u64),
        Punch(u64, u64),
        Zero(u64, u64, bool),
        Allocate(u64, u64, bool),
        Copy(u64, u64, u64),
        Seek(u64),
        Sync,
        Remount,
        Complete,
        Rename,
        Chmod,
    }
    const SIZE: u64 = 60_000;
    let at = 0..SIZE + 9000;
    let len = prop_oneof![1..300u64, 1..20_000u64, Just(CHUNK), Just(2 * CHUNK)];
    let place = prop_oneof![
        at.clone(),
        (0..17u64).prop_map(|chunk| chunk * CHUNK),
        (1..17u64).prop_map(|chunk| chunk * CHUNK - 3),
    ];
    let op = prop_oneof![
        6 => (place.clone(), len.clone(), any::<u8>()).prop_map(|(at, len, byte)| Op::Write(at, len as usize, byte)),
        4 => (place.clone(), len.clone()).prop_map(|(at, len)| Op::Read(at, len as usize)),
        3 => place.clone().prop_map(Op::Cut),
        2 => (place.clone(), len.clone()).prop_map(|(at, len)| Op::Punch(at, len)),
        1 => (place.clone(), len.clone(), any::<bool>()).prop_map(|(at, len, keep)| Op::Zero(at, len, keep)),
        1 => (place.clone(), len.clone(), any::<bool>()).prop_map(|(at, len, keep)| Op::Allocate(at, len, keep)),
        2 => (place.clone(), place.clone(), len).prop_map(|(from, to, len)| Op::Copy(from, to, len)),
        3 => place.prop_map(Op::Seek),
        1 => Just(Op::Sync),
        2 => Just(Op::Remount),
        1 => Just(Op::Complete),
        1 => Just(Op::Rename),
        1 => Just(Op::Chmod),
    ];
    let holes = prop::collection::vec((0..SIZE / CHUNK, 1..4u64), 0..3);
    // Without it all is synced, which takes its time.
    let knows_run = prop::bool::weighted(0.9);
    let input = (holes, prop::collection::vec(op, 1..40), knows_run);
    let run = |(holes, ops, knows_run): (Vec<(u64, u64)>, Vec<Op>, bool)| {
        let mut model = pattern(SIZE, 3);
        let mut fixture = fixture(&["f"], &model);
        fixture.union = None;
        let lower = std::fs::File::options()
            .write(true)
            .open(fixture.lowers[0].join("f"))
            .unwrap();
        for (start, count) in holes {
            let (start, end) = (start * CHUNK, ((start + count) * CHUNK).min(SIZE));
            model[start as usize..end as usize].fill(0);
            let mode = libc::FALLOC_FL_PUNCH_HOLE | libc::FALLOC_FL_KEEP_SIZE;
            let fd = std::os::fd::AsFd::as_fd(&lower);
            crate::sys::fs::fallocate(fd, mode, start, end - start).unwrap();
        }
        let original = model.clone();
        let config = config(&fixture);
        reopen_as(&mut fixture, config.clone(), knows_run);
        let mut name = "f";
        for op in ops {
            let node = fixture.node(name);
            let union = fixture.union();
            let size = model.len() as u64;
            match op {
                Op::Write(at, len, byte) => {
                    let data: Vec<u8> = (0..len).map(|n| byte.wrapping_add(n as u8)).collect();
                    let n = union.write(node, None, at, &data, None).unwrap();
                    assert_eq!(n, len);
                    let end = at as usize + len;
                    if model.len() < end {
                        model.resize(end, 0);
                    }
                    model[at as usize..end].copy_from_slice(&data);
                }
                Op::Read(at, len) => {
                    let end = (at as usize + len).min(model.len());
                    let expected = model.get(at as usize..end).unwrap_or(&[]);
                    assert!(read_at(&fixture, node, at, len) == expected, "at {at}");
                }
                Op::Cut(size) => {
                    cut(&fixture, name, size);
                    model.resize(size as usize, 0);
                }
                Op::Punch(at, len) | Op::Zero(at, len, _) | Op::Allocate(at, len, _) => {
                    let (mode, keep, clears) = match op {
                        Op::Punch(..) => (libc::FALLOC_FL_PUNCH_HOLE, true, true),
                        Op::Zero(.., keep) => (libc::FALLOC_FL_ZERO_RANGE, keep, true),
                        Op::Allocate(.., keep) => (0, keep, false),
                        _ => unreachable!(),
                    };
                    let flags = mode | if keep { libc::FALLOC_FL_KEEP_SIZE } else { 0 };
                    union
                        .fallocate(node, None, flags, at, len, &Caller::ROOT)
                        .unwrap();
                    if !keep && size < at + len {
                        model.resize((at + len) as usize, 0);
                    }
                    let end = ((at + len) as usize).min(model.len());
                    if clears && (at as usize) < end {
                        model[at as usize..end].fill(0);
                    }
                }
                Op::Copy(from, to, len) => {
                    let len = len.min(size.saturating_sub(from));
                    if len == 0 || (from < to + len && to < from + len) {
                        continue;
                    }
                    let mut done = 0;
                    while done < len {
                        let n = union
                            .copy_file_range(
                                node,
                                None,
                                from + done,
                                node,
                                None,
                                to + done,
                                len - done,
                                &Caller::ROOT,
                            )
                            .unwrap();
                        assert!(n > 0);
                        done += n as u64;
                    }
                    let part = model[from as usize..(from + len) as usize].to_vec();
                    let end = (to + len) as usize;
                    if model.len() < end {
                        model.resize(end, 0);
                    }
                    model[to as usize..end].copy_from_slice(&part);
                }
                Op::Seek(at) => {
                    let hole = union.lseek(node, None, at as i64, libc::SEEK_HOLE);
                    let data = union.lseek(node, None, at as i64, libc::SEEK_DATA);
                    if at >= size {
                        assert_eq!((errno(hole), errno(data)), (libc::ENXIO, libc::ENXIO));
                        continue;
                    }
                    // What is said to be a hole has no data.
                    let data = data.map_or(size, |data| data as u64);
                    assert!(
                        model[at as usize..data as usize]
                            .iter()
                            .all(|byte| *byte == 0)
                    );
                    assert!((at..=size).contains(&(hole.unwrap() as u64)));
                }
                Op::Sync => union.fsync(node, None, false).unwrap(),
                Op::Remount => {
                    reopen_as(&mut fixture, config.clone(), knows_run);
                }
                Op::Complete => {
                    let before = union.getattr(node, None).unwrap();
                    union.complete_hot().unwrap();
                    let after = union.getattr(node, None).unwrap();
                    let times = |attr: Attr| (attr.mtime, attr.ctime, attr.size);
                    assert_eq!(times(before), times(after));
                }
                Op::Rename => {
                    let new = if name == "f" { "g" } else { "f" };
                    fixture.mv(name, new);
                    name = new;
                }
                Op::Chmod => {
                    let set = SetAttr {
                        perm: Some(0o640),
                        ..SetAttr::default()
                    };
                    union.setattr(node, None, &set, &Caller::ROOT).unwrap();
                }
            }
            let size = fixture.find(name).unwrap().attr.size;
            assert_eq!(size, model.len() as u64);
            assert!(read_by_others(&fixture, name) == model, "by others");
        }
        assert!(read_all(&fixture, name) == model, "at the end");
        reopen_as(&mut fixture, config.clone(), knows_run);
        assert!(read_all(&fixture, name) == model, "after a remount");
        reopen_as(&mut fixture, config, knows_run);
        fixture.union().complete().unwrap();
        fixture.union().complete_partial().unwrap();
        assert!(read_all(&fixture, name) == model, "when it is complete");
        if fixture.upper().join(name).exists() {
            assert_plain(&fixture, name, &model);
        }
        assert!(std::fs::read(fixture.lowers[0].join("f")).unwrap() == original);
        Ok(())
    };
    let cases = std::env::var("PLYWOOD_MODEL_CASES").map_or(200, |text| text.parse().unwrap());
    let config = ProptestConfig {
        cases,
        failure_persistence: None,
        ..ProptestConfig::default()
    };
    proptest::test_runner::TestRunner::new(config)
        .run(&input, run)
        .unwrap();
}

#[test]
fn what_was_cut_off_does_not_come_back() {
    let content = pattern(10 * CHUNK, 1);
    let mut fixture = fixture(&["f"], &content);
    write(&fixture, "f", 0, b"begun");
    let config = config(&fixture);
    for (size, again) in [
        (5 * CHUNK + 7, 9 * CHUNK),
        (CHUNK, 20 * CHUNK),
        (0, 3 * CHUNK),
    ] {
        cut(&fixture, "f", size);
        reopen(&mut fixture, config.clone());
        cut(&fixture, "f", again);
        for _ in 0..2 {
            let now = read_all(&fixture, "f");
            assert_eq!(now.len() as u64, again);
            assert!(now[size as usize..].iter().all(|byte| *byte == 0));
            reopen(&mut fixture, config.clone());
        }
    }
}

#[test]
fn a_cut_that_a_kill_interrupts_holds_through_the_next_one() {
    let content = pattern(20 * CHUNK, 1);
    let mut fixture = fixture(&["f"], &content);
    let config = config(&fixture);
    write(&fixture, "f", 0, b"begun");
    // Killed between the cut of the file and that of its map.
    let upper = std::fs::File::options()
        .write(true)
        .open(fixture.upper().join("f"))
        .unwrap();
    upper.set_len(2 * CHUNK).unwrap();
    reopen(&mut fixture, config.clone());
    write(&fixture, "f", 10 * CHUNK + 5, b"new");
    let node = fixture.node("f");
    fixture.union().fsync(node, None, false).unwrap();
    reopen(&mut fixture, config);
    let mut expected = content[..2 * CHUNK as usize].to_vec();
    expected[..5].copy_from_slice(b"begun");
    expected.resize(10 * CHUNK as usize + 5, 0);
    expected.extend_from_slice(b"new");
    assert!(read_all(&fixture, "f") == expected);
}

#[test]
fn a_restart_of_the_host_takes_back_no_more_than_was_not_synced() {
    let content = pattern(8 * CHUNK, 1);
    let mut fixture = fixture(&["f"], &content);
    let durable = UnionConfig {
        volatile: false,
        ..config(&fixture)
    };
    reopen(&mut fixture, durable.clone());
    let node = fixture.node("f");
    write(&fixture, "f", 100, b"synced");
    fixture.union().fsync(node, None, true).unwrap();
    write(&fixture, "f", CHUNK + 100, b"not synced");
    fixture.union = None;
    // Part of what was not synced has reached the disk.
    restart(&fixture);
    reopen(&mut fixture, durable.clone());
    let mut expected = content;
    expected[100..106].copy_from_slice(b"synced");
    assert!(read_all(&fixture, "f") == expected);
    // And does not turn up where the file has a hole or is written next.
    write(&fixture, "f", CHUNK, b"new");
    expected[CHUNK as usize..CHUNK as usize + 3].copy_from_slice(b"new");
    assert!(read_all(&fixture, "f") == expected);
    // A cut is durable before the file grows again, and so is everything after a sync of all.
    cut(&fixture, "f", 2 * CHUNK + 5);
    cut(&fixture, "f", 4 * CHUNK);
    expected.truncate(2 * CHUNK as usize + 5);
    expected.resize(4 * CHUNK as usize, 0);
    fixture.union().sync().unwrap();
    fixture.union = None;
    restart(&fixture);
    reopen(&mut fixture, durable);
    assert!(read_all(&fixture, "f") == expected);
}

#[test]
fn a_cut_file_that_has_grown_shows_nothing_old_after_a_power_cut_and_waits_for_no_sync() {
    let content = pattern(8 * CHUNK, 1);
    let mut fixture = fixture(&["f"], &content);
    let durable = UnionConfig {
        volatile: false,
        ..config(&fixture)
    };
    write(&fixture, "f", 0, b"begun");
    let mut expected = content.clone();
    expected[..5].copy_from_slice(b"begun");
    fixture.union().sync().unwrap();
    // The second cut is deeper, and the file has grown in between.
    for (size, again) in [(4 * CHUNK + 7, 6 * CHUNK), (2 * CHUNK + 5, 7 * CHUNK)] {
        reopen(&mut fixture, durable.clone());
        cut(&fixture, "f", size);
        write(&fixture, "f", again - 3, b"new");
        expected.truncate(size as usize);
        expected.resize(again as usize - 3, 0);
        expected.extend_from_slice(b"new");
        fixture.union = None;
        // All that happened to the file itself has reached the disk, and of the map nothing.
        let map = maps(&fixture).remove(0);
        assert_eq!(
            std::fs::read(&map).unwrap()[48..56],
            (8 * CHUNK).to_le_bytes()
        );
        restart(&fixture);
        assert!(read_by_others(&fixture, "f") == expected, "{size}");
        reopen(&mut fixture, durable.clone());
        assert!(read_all(&fixture, "f") == expected, "{size}");
        // As after a kill.
        reopen(&mut fixture, durable.clone());
        assert!(read_all(&fixture, "f") == expected, "{size}");
    }
    fixture.union().complete_partial().unwrap();
    assert_plain(&fixture, "f", &expected);
}

#[test]
fn a_map_that_never_reached_the_disk_knew_nothing() {
    let content = pattern(8 * CHUNK, 1);
    let mut fixture = fixture(&["f"], &content);
    write(&fixture, "f", 100, b"not synced");
    fixture.union = None;
    let map = maps(&fixture).remove(0);
    std::fs::File::create(&map).unwrap();
    let config = config(&fixture);
    reopen(&mut fixture, config.clone());
    assert!(read_all(&fixture, "f") == content);
    fixture.union = None;
    std::fs::write(&map, [1; 4000]).unwrap();
    reopen(&mut fixture, config.clone());
    let node = fixture.node("f");
    let damaged = fixture.union().read(node, None, 0, &mut [0; 10]);
    assert_eq!(errno(damaged), libc::EIO);
    fixture.union = None;
    std::fs::remove_file(&map).unwrap();
    reopen(&mut fixture, config);
    let node = fixture.node("f");
    let missing = fixture.union().write(node, None, 0, b"x", None);
    assert_eq!(errno(missing), libc::EIO);
}

#[test]
fn names_come_and_go_while_a_file_is_incomplete() {
    let content = pattern(6 * CHUNK, 1);
    let mut fixture = fixture(&["a", "d/b", "gone"], &content);
    std::fs::hard_link(fixture.lowers[0].join("a"), fixture.lowers[0].join("d/a2")).unwrap();
    let config = config(&fixture);
    reopen(&mut fixture, config.clone());
    let mut expected = content;
    expected[CHUNK as usize..CHUNK as usize + 3].copy_from_slice(b"new");
    for path in ["a", "d/b", "gone"] {
        write(&fixture, path, CHUNK, b"new");
    }
    assert_eq!(maps(&fixture).len(), 3);
    fixture.mv("d/b", "d/moved");
    fixture.mv("d", "e");
    fixture.link("e/moved", "also").unwrap();
    for _ in 0..2 {
        for path in ["a", "e/a2", "e/moved", "also"] {
            assert!(read_all(&fixture, path) == expected, "{path}");
        }
        reopen(&mut fixture, config.clone());
    }
    // A removed file is used on, and its map goes with it.
    let entry = fixture.find("gone").unwrap();
    fixture.unlink("gone").unwrap();
    let union = fixture.union();
    union.write(entry.node, None, 0, b"0", None).unwrap();
    assert_eq!(read_at(&fixture, entry.node, 0, 1), b"0");
    union.forget(entry.node, 1);
    union.forget(entry.node, u64::MAX);
    assert_eq!(maps(&fixture).len(), 2);
    // The name in the upper goes; the one in the index has to do.
    fixture.unlink("a").unwrap();
    reopen(&mut fixture, config);
    fixture.union().complete_partial().unwrap();
    for path in ["e/a2", "e/moved", "also"] {
        assert!(read_all(&fixture, path) == expected, "{path}");
        assert_plain(&fixture, path, &expected);
    }
}

#[test]
fn readers_and_writers_go_on_while_a_file_is_completed() {
    const CHUNKS: u64 = 200;
    let content = pattern(CHUNKS * CHUNK, 1);
    let fixture = fixture(&["f"], &content);
    write(&fixture, "f", 0, &content[..10]);
    let node = fixture.node("f");
    let union = fixture.union();
    std::thread::scope(|scope| {
        let completer = scope.spawn(|| union.complete_partial().unwrap());
        for thread in 0..4u64 {
            scope.spawn(move || {
                // Each has chunks of its own, and bytes of its own in shared ones.
                for round in 0..3u8 {
                    for chunk in 0..CHUNKS {
                        let at = chunk * CHUNK + thread * 10;
                        let data = [round + 1; 10];
                        assert_eq!(union.write(node, None, at, &data, None).unwrap(), 10);
                        let mut seen = [0; 10];
                        union.read(node, None, at, &mut seen).unwrap();
                        assert_eq!(seen, data);
                    }
                }
            });
        }
        completer.join().unwrap();
    });
    let mut expected = content;
    for chunk in 0..CHUNKS {
        let at = (chunk * CHUNK) as usize;
        expected[at..at + 40].fill(3);
    }
    assert!(read_all(&fixture, "f") == expected);
    union.complete_partial().unwrap();
    assert_plain(&fixture, "f", &expected);
}

#[test]
fn a_file_without_chunks_is_copied_whole() {
    let content = pattern(3 * CHUNK, 1);
    let mut fixture = fixture(&["f"], &content);
    for chunking in [Chunking::OFF, Chunking::default()] {
        let config = UnionConfig {
            chunking,
            ..config(&fixture)
        };
        reopen(&mut fixture, config);
        write(&fixture, "f", 0, &content[..1]);
        assert_plain(&fixture, "f", &content);
    }
}
