//! Sequences that random testing found, each with what was wrong; and a few that the history of union
//! file systems says one should never leave to chance. All run on the union and on a mount, and, where it
//! understands the layers, on kernel overlayfs.

use crate::layers::{Layer, Meta, Object, Opaque, Whiteout, parts};
use crate::ops::{Access, Fill, How, MtimeChange, Op, OpenFlags};
use crate::replay::{Which, replay};
use crate::tree::Path;

fn everywhere(stack: &[Layer], ops: &[Op]) {
    let mut subjects = vec![
        Which::Direct,
        Which::Plyfs(""),
        Which::Plyfs(",no_open,writeback"),
    ];
    if !stack.iter().any(Layer::is_foreign_to_kernel) {
        subjects.push(Which::Kernel);
    }
    for which in subjects {
        replay(which, stack, ops).unwrap_or_else(|why| panic!("{which:?}: {why}"));
    }
}

fn file(seed: u8) -> Object {
    Object::File(Fill { seed, len: 5000 })
}

fn dir() -> Object {
    Object::Dir(Opaque::No)
}

fn path(text: &str) -> Path {
    parts(text)
}

fn rename(from: &str, to: &str) -> Op {
    Op::Rename {
        from: path(from),
        to: path(to),
        how: How::Replace,
    }
}

fn exchange(from: &str, to: &str) -> Op {
    Op::Rename {
        from: path(from),
        to: path(to),
        how: How::Exchange,
    }
}

fn unlink(at: &str) -> Op {
    Op::Unlink { path: path(at) }
}

fn mkdir(at: &str) -> Op {
    Op::Mkdir {
        path: path(at),
        mode: 0o755,
    }
}

fn open(slot: usize, at: &str, access: Access) -> Op {
    Op::Open {
        slot,
        path: path(at),
        flags: OpenFlags::plain(access),
        mode: 0,
    }
}

fn create(slot: usize, at: &str) -> Op {
    Op::Open {
        slot,
        path: path(at),
        flags: OpenFlags::create(Access::Both),
        mode: 0o644,
    }
}

fn write(slot: usize, offset: u64, seed: u8, len: usize) -> Op {
    Op::Write {
        slot,
        offset,
        fill: Fill { seed, len },
    }
}

/// The link count of the names that stayed was still that of the layer once every node had been
/// forgotten: the count lived in memory until the file was copied up. Unlinking one of several
/// names of a lower file now takes the file into the index first, as kernel overlayfs does.
#[test]
fn unlinking_one_name_of_a_lower_file_lowers_the_count_of_the_others() {
    let layer = Layer::default()
        .with("/a", file(1))
        .with("/b/b", Object::Link(path("/a")));
    everywhere(std::slice::from_ref(&layer), &[unlink("/a")]);
    everywhere(
        &[layer],
        &[
            mkdir("/d"),
            create(0, "/d/new"),
            rename("/d/new", "/b/b"),
            Op::Remount,
        ],
    );
}

/// The mark by which fuse-overlayfs says "opaque" was obeyed, and shown as an attribute too, so that
/// a commit would have put it into an image.
#[test]
fn the_opaque_mark_of_fuse_overlayfs_is_not_shown() {
    let top = Layer::default()
        .with("/a", Object::Dir(Opaque::FuseOverlayfs))
        .with("/a/top", file(1));
    let bottom = Layer::default().with("/a/bottom", file(2));
    let chmod = Op::Chmod {
        path: path("/a"),
        mode: 0o700,
    };
    everywhere(&[top, bottom], &[chmod, Op::Remount]);
}

/// `/c` came up empty: the search for what continues it stopped at `/a`, which is opaque, although the
/// directory that was moved below `/a` says itself where it continues. Kernel overlayfs forgets the stop at
/// an absolute redirect too.
#[test]
fn a_redirected_directory_below_an_opaque_one_keeps_its_content_when_moved_again() {
    let top = Layer::default().with("/a/x", file(1)).with("/c", dir());
    let bottom = Layer::default()
        .with("/a/in/z", file(3))
        .with("/b/q", file(4));
    let ops = [
        rename("/a", "/d"),
        mkdir("/a"),
        rename("/d", "/b/d"),
        rename("/b", "/a/b"),
        // The last third comes after a commit.
        exchange("/a/b/d", "/c"),
        Op::List { path: path("/c") },
    ];
    everywhere(&[top, bottom], &ops);
}

#[test]
fn a_merged_directory_goes_through_a_chain_of_renames_and_remounts() {
    let top = Layer::default()
        .with("/a/x", file(1))
        .with("/a/in/y", file(2))
        .with("/c", dir());
    let bottom = Layer::default()
        .with("/a/in/z", file(3))
        .with("/a/w", Object::Whiteout(Whiteout::Device))
        .with("/b/q", file(4));
    let ops = [
        rename("/a", "/d"),
        mkdir("/a"),
        create(0, "/a/x"),
        write(0, 3, 9, 10),
        Op::Remount,
        rename("/d/in", "/c/in"),
        rename("/d", "/b/d"),
        unlink("/c/in/y"),
        Op::Remount,
        rename("/c/in", "/b/in"),
        rename("/b", "/a/b"),
        exchange("/a/b/d", "/c"),
        Op::Remount,
        create(1, "/a/b/in/y"),
        exchange("/a/b/in", "/c/x"),
        Op::Remount,
    ];
    everywhere(&[top, bottom], &ops);
}

#[test]
fn a_name_that_was_a_lower_directory_starts_anew() {
    let layer = Layer::default()
        .with("/a/old", file(1))
        .with("/a/sub/older", file(2))
        .with("/b", file(3));
    let ops = [
        unlink("/a/old"),
        unlink("/a/sub/older"),
        Op::Rmdir {
            path: path("/a/sub"),
        },
        Op::Rmdir { path: path("/a") },
        mkdir("/a"),
        Op::List { path: path("/a") },
        Op::Remount,
        mkdir("/a/sub"),
        Op::Rmdir {
            path: path("/a/sub"),
        },
        Op::Rmdir { path: path("/a") },
        rename("/b", "/a"),
        Op::Remount,
        unlink("/a"),
        mkdir("/a"),
        Op::List { path: path("/a") },
    ];
    everywhere(&[layer], &ops);
}

#[test]
fn an_open_lower_file_sees_what_is_written_through_another_name_after_renames() {
    let layer = Layer::default()
        .with("/a", file(1))
        .with("/b", Object::Link(path("/a")))
        .with("/d", dir());
    let ops = [
        open(0, "/a", Access::Read),
        open(1, "/b", Access::Both),
        write(1, 100, 7, 200),
        Op::Read {
            slot: 0,
            offset: 0,
            len: 5000,
        },
        rename("/a", "/d/a"),
        unlink("/b"),
        write(1, 6000, 8, 10),
        Op::Stat { slot: 0 },
        unlink("/d/a"),
        Op::Read {
            slot: 0,
            offset: 0,
            len: 7000,
        },
        Op::ChmodOpen {
            slot: 1,
            mode: 0o600,
        },
        Op::Stat { slot: 1 },
    ];
    everywhere(&[layer], &ops);
}

#[test]
fn a_copy_up_keeps_times_of_the_file_and_of_the_directories_above() {
    let mut layer = Layer::default();
    let meta = |mode| Meta {
        mtime: (1_234_567_890, 123_456_789),
        ..Meta::plain(mode)
    };
    layer.add(&path("/a"), dir(), meta(0o755));
    layer.add(&path("/a/b"), dir(), meta(0o2755));
    layer.add(&path("/a/b/f"), file(1), meta(0o4755));
    let ops = [
        Op::Chmod {
            path: path("/a/b/f"),
            mode: 0o700,
        },
        Op::SetMtime {
            path: path("/a/b/f"),
            at: MtimeChange::Omit,
            follow: true,
        },
        Op::StatPath {
            path: path("/a/b"),
            follow: true,
        },
        Op::Chown {
            path: path("/a"),
            uid: Some(7),
            gid: None,
            follow: false,
        },
        Op::Remount,
        open(0, "/a/b/f", Access::Write),
        Op::StatPath {
            path: path("/a/b/f"),
            follow: true,
        },
    ];
    everywhere(&[layer], &ops);
}
