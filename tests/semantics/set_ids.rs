//! Setuid and setgid, also where setgid means no execution with the group.

use std::fs::{self, File, Permissions};
use std::io;
use std::os::unix::fs::{FileExt, MetadataExt, PermissionsExt, chown, fchown};
use std::path::Path;
use std::process::Command;

use nix::fcntl::{FallocateFlags, fallocate};
use rustix::fs::copy_file_range;

use crate::fill::Fill;
use crate::outcome::{Outcome, expect};
use crate::place::Place;
use crate::row::{Row, row};
use crate::tools::{USER, as_member, as_user, mode, open_rw};

/// A group that the user may be in.
const GROUP: u32 = 77;
/// An access ACL as the kernel stores it: rwx for the owner and user 1, r-x for the group and others.
const LIST: [u8; 44] = [
    2, 0, 0, 0, // version
    1, 0, 7, 0, 255, 255, 255, 255, // owner
    2, 0, 7, 0, 1, 0, 0, 0, // user 1
    4, 0, 5, 0, 255, 255, 255, 255, // group
    16, 0, 7, 0, 255, 255, 255, 255, // mask
    32, 0, 5, 0, 255, 255, 255, 255, // others
];

fn file(fill: &Fill, owner: u32, mode: u32) {
    fill.file("f", "old old old");
    let path = fill.path(0, "f");
    chown(&path, Some(owner), Some(GROUP)).unwrap();
    fs::set_permissions(&path, Permissions::from_mode(mode)).unwrap();
}

/// Waits until the clock that files get their times from has moved.
fn a_tick() {
    std::thread::sleep(std::time::Duration::from_millis(20));
}

/// Changes the content in every way, each time from the same mode, as somebody who is in the given groups.
fn changes(at: &Place, groups: &[u32], before: u32, after: u32) -> Outcome {
    type Change = fn(&Path) -> io::Result<()>;
    let all: [Change; 4] = [
        |path| open_rw(path)?.write_all_at(b"new", 0),
        |path| Ok(nix::unistd::truncate(path, 3)?),
        |path| File::create(path).map(drop),
        |path| Ok(fallocate(open_rw(path)?, FallocateFlags::empty(), 0, 50)?),
    ];
    for change in all {
        as_member(USER, groups, || change(&at.path("f")))?;
        expect(
            mode(at.path("f"))? == after,
            if after == before { "cleared" } else { "kept" },
        )?;
        fs::set_permissions(at.path("f"), Permissions::from_mode(before))?;
    }
    Ok(())
}

/// All rows of the chapter.
pub fn rows() -> Vec<Row> {
    vec![
        row(
            "cleared_for_others",
            "Writing, truncating and fallocate by somebody outside the group clear setgid without the group's execution, too.",
            |fill| file(fill, 0, 0o2766),
            |at| changes(at, &[], 0o2766, 0o766),
        ),
        row(
            "cleared_with_others_execution",
            "Whether others may execute it makes no difference.",
            |fill| file(fill, 0, 0o2767),
            |at| changes(at, &[], 0o2767, 0o767),
        ),
        row(
            "cleared_beside_setuid",
            "Setuid goes with it.",
            |fill| file(fill, 0, 0o6766),
            |at| changes(at, &[], 0o6766, 0o766),
        ),
        row(
            "cleared_for_owner",
            "The owner outside of the group is no exception.",
            |fill| file(fill, USER, 0o2744),
            |at| changes(at, &[], 0o2744, 0o744),
        ),
        row(
            "kept_in_group",
            "Somebody who is in the group, be it by a supplementary one, keeps setgid without the group's execution.",
            |fill| file(fill, 0, 0o2766),
            |at| changes(at, &[5, GROUP, 78], 0o2766, 0o2766),
        ),
        row(
            "cleared_before_execution",
            "A program of which a write, fallocate, copy_file_range or O_TRUNC has cleared them runs without them at once.",
            |fill| {
                fs::copy("/usr/bin/id", fill.path(0, "f")).unwrap();
                fs::copy("/usr/bin/id", fill.path(0, "same")).unwrap();
            },
            |at| {
                type Change<'a> = dyn Fn(&Path) -> io::Result<()> + 'a;
                let same = File::open(at.path("same"))?;
                let whole = fs::read(at.path("same"))?;
                let changes: [&Change<'_>; 5] = [
                    &|path| open_rw(path)?.write_all_at(&whole[..1], 0),
                    &|path| {
                        let file = File::options().append(true).open(path)?;
                        Ok(nix::unistd::write(&file, b"x").map(drop)?)
                    },
                    &|path| {
                        let room = 100 + whole.len() as i64;
                        Ok(fallocate(open_rw(path)?, FallocateFlags::empty(), 0, room)?)
                    },
                    &|path| {
                        let file = open_rw(path)?;
                        let (mut from, mut to) = (0, 0);
                        let copied =
                            copy_file_range(&same, Some(&mut from), &file, Some(&mut to), 1);
                        Ok(copied.map(drop)?)
                    },
                    &|path| fs::write(path, &whole),
                ];
                for change in changes {
                    fs::set_permissions(at.path("f"), Permissions::from_mode(0o6777))?;
                    let (user, group) = as_user(USER, || {
                        change(&at.path("f"))?;
                        let ask = |word| Command::new(at.path("f")).arg(word).output();
                        io::Result::Ok((ask("-u")?, ask("-g")?))
                    })?;
                    let own = format!("{USER}\n").into_bytes();
                    expect(user.stdout == own && group.stdout == own, "kept")?;
                }
                Ok(())
            },
        ),
        row(
            "cleared_by_acl",
            "An ACL set by an owner outside the group clears setgid, one set by an owner in the group does not.",
            |fill| file(fill, USER, 0o2755),
            |at| {
                let list = || xattr::set(at.path("f"), "system.posix_acl_access", &LIST);
                as_member(USER, &[GROUP], list)?;
                expect(mode(at.path("f"))? == 0o2775, "cleared")?;
                as_user(USER, list)?;
                expect(mode(at.path("f"))? == 0o775, "kept")
            },
        ),
        row(
            "cleared_by_change_of_group",
            "A new group from an owner outside the old one clears setgid without the group's execution.",
            |fill| file(fill, USER, 0o2644),
            |at| {
                as_user(USER, || chown(at.path("f"), None, Some(USER)))?;
                expect(mode(at.path("f"))? == 0o644, "kept")
            },
        ),
        row(
            "cleared_by_empty_chown",
            "chown with neither owner nor group clears setuid and setgid, and moves the time of change.",
            |fill| file(fill, USER, 0o6755),
            |at| {
                let before = fs::metadata(at.path("f"))?;
                as_user(USER, || chown(at.path("f"), None, None))?;
                expect(mode(at.path("f"))? == 0o755, "kept")?;
                let after = fs::metadata(at.path("f"))?;
                let time = |m: &fs::Metadata| (m.ctime(), m.ctime_nsec());
                expect(time(&after) > time(&before), "ctime unmoved")?;
                fs::set_permissions(at.path("f"), Permissions::from_mode(0o6644))?;
                chown(at.path("f"), None, None)?;
                expect(mode(at.path("f"))? == 0o2644, "kept")
            },
        ),
        row(
            "empty_chown_of_directory",
            "Such a chown of a directory keeps its bits and moves its time of change, whoever calls it.",
            |fill| {
                fill.dir("d");
                fs::set_permissions(fill.path(0, "d"), Permissions::from_mode(0o2755)).unwrap();
            },
            |at| {
                let changed = || fs::metadata(at.path("d")).map(|m| (m.ctime(), m.ctime_nsec()));
                for caller in [0, USER] {
                    let before = changed()?;
                    a_tick();
                    as_user(caller, || chown(at.path("d"), None, None))?;
                    expect(mode(at.path("d"))? == 0o2755, "cleared")?;
                    expect(changed()? > before, "ctime unmoved")?;
                }
                Ok(())
            },
        ),
        row(
            "kept_from_chown_of_others",
            "Such a chown by somebody else clears neither.",
            |fill| file(fill, 0, 0o6755),
            |at| {
                for before in [0o6755, 0o2745] {
                    fs::set_permissions(at.path("f"), Permissions::from_mode(before))?;
                    // Whether it is an error differs; that it takes nothing away must not.
                    let _ = as_user(USER, || chown(at.path("f"), None, None));
                    expect(mode(at.path("f"))? == before, "cleared")?;
                    let _ = as_user(USER, || fchown(File::open(at.path("f"))?, None, None));
                    expect(mode(at.path("f"))? == before, "cleared")?;
                }
                Ok(())
            },
        ),
    ]
}
