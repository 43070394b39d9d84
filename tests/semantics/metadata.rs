//! Owners, modes, times, extended attributes.

use std::fs::{self, File, Permissions};
use std::io::Read;
use std::os::unix::fs::{FileExt, MetadataExt, OpenOptionsExt, PermissionsExt, chown, symlink};
use std::path::Path;

use nix::fcntl::AT_FDCWD;
use nix::sys::stat::{UtimensatFlags, umask, utimensat};
use nix::sys::time::TimeSpec;
use rustix::fs::{AtFlags, StatxFlags, XattrFlags};

use crate::acls;
use crate::fill::Fill;
use crate::outcome::{Outcome, Said, expect, fails};
use crate::row::{Row, nothing, row};
use crate::tools::{USER, as_user, mode, open_rw};

const CAPABILITY: &str = "security.capability";
/// `cap_net_raw+ep`, as setcap(8) stores it.
const NET_RAW: [u8; 20] = [
    1, 0, 0, 2, 0, 0x20, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0,
];

pub fn one_file(fill: &Fill) {
    fill.file("d/f", "old");
}

pub fn set_mode(path: &Path, mode: u32) {
    fs::set_permissions(path, Permissions::from_mode(mode)).unwrap();
}

fn set_times(path: &Path, sec: i64, nsec: i64) -> nix::Result<()> {
    let time = TimeSpec::new(sec, nsec);
    utimensat(
        AT_FDCWD,
        path,
        &time,
        &time,
        UtimensatFlags::NoFollowSymlink,
    )
}

/// All rows of the chapter.
pub fn rows() -> Vec<Row> {
    let mut rows = owners();
    rows.extend(times());
    rows.extend(attributes());
    rows.extend(acls::rows());
    rows.push(flags());
    rows
}

/// A file that everybody may write, with setuid, setgid and the group's execution.
fn set_ids(fill: &Fill) {
    fill.file("f", "old old old");
    set_mode(&fill.path(0, "f"), 0o6777);
}

fn owners() -> Vec<Row> {
    vec![
        row(
            "setuid_cleared_by_write",
            "A write by a user without privileges clears setuid and setgid of a lower file.",
            set_ids,
            |at| {
                as_user(USER, || open_rw(at.path("f"))?.write_all_at(b"new", 0))?;
                expect(mode(at.path("f"))? == 0o777, "kept")
            },
        ),
        row(
            "setuid_cleared_by_truncation",
            "So does a truncation.",
            set_ids,
            |at| {
                as_user(USER, || nix::unistd::truncate(&at.path("f"), 3))?;
                expect(mode(at.path("f"))? == 0o777, "kept")
            },
        ),
        row(
            "setuid_cleared_by_open",
            "So does opening it with O_TRUNC.",
            set_ids,
            |at| {
                as_user(USER, || File::create(at.path("f")).map(drop))?;
                expect(mode(at.path("f"))? == 0o777, "kept")
            },
        ),
        row(
            "setuid_cleared_by_chown",
            "chown clears setuid and setgid.",
            set_ids,
            |at| {
                chown(at.path("f"), Some(1), Some(1))?;
                expect(mode(at.path("f"))? == 0o777, "kept")
            },
        ),
        row(
            "setuid_kept",
            "A write by root keeps them.",
            set_ids,
            |at| {
                open_rw(at.path("f"))?.write_all_at(b"new", 0)?;
                expect(mode(at.path("f"))? == 0o6777, "cleared")
            },
        ),
        row(
            "capabilities_cleared_by_write",
            "A write removes the file capabilities of a lower file.",
            |fill| {
                fill.file("f", "old");
                xattr::set(fill.path(0, "f"), CAPABILITY, &NET_RAW).unwrap();
            },
            |at| {
                expect(xattr::get(at.path("f"), CAPABILITY)?.is_some(), "not shown")?;
                open_rw(at.path("f"))?.write_all_at(b"new", 0)?;
                expect(xattr::get(at.path("f"), CAPABILITY)?.is_none(), "kept")
            },
        ),
        row(
            "capabilities_kept_by_copy_up",
            "chmod and utimes keep the file capabilities of a lower file.",
            |fill| {
                fill.file("f", "old");
                xattr::set(fill.path(0, "f"), CAPABILITY, &NET_RAW).unwrap();
            },
            |at| {
                set_times(&at.path("f"), 5, 5)?;
                fs::set_permissions(at.path("f"), Permissions::from_mode(0o755))?;
                expect(xattr::get(at.path("f"), CAPABILITY)?.is_some(), "lost")
            },
        ),
        row(
            "permissions",
            "Owner, group and others get what the mode of a lower file says.",
            |fill| {
                fill.file("f", "");
                set_mode(&fill.path(0, "f"), 0o640);
                chown(fill.path(0, "f"), Some(0), Some(USER)).unwrap();
            },
            |at| {
                as_user(USER, || File::open(at.path("f")))?;
                fails(as_user(USER, || open_rw(at.path("f"))), nix::Error::EACCES)?;
                let other = as_user(USER + 1, || File::open(at.path("f")));
                fails(other, nix::Error::EACCES)
            },
        ),
        row(
            "made_by_user",
            "What a user makes in a lower directory belongs to it, with the umask taken off.",
            |fill| {
                fill.dir("d");
                set_mode(&fill.path(0, "d"), 0o777);
            },
            |at| {
                umask(nix::sys::stat::Mode::from_bits_truncate(0o027));
                as_user(USER, || {
                    fs::create_dir(at.path("d/sub"))?;
                    let mut options = File::options();
                    options
                        .write(true)
                        .create_new(true)
                        .mode(0o666)
                        .open(at.path("d/f"))
                })?;
                let (file, dir) = (
                    fs::metadata(at.path("d/f"))?,
                    fs::metadata(at.path("d/sub"))?,
                );
                expect(
                    (file.uid(), file.gid(), file.mode() & 0o7777) == (USER, USER, 0o640),
                    "wrong",
                )?;
                expect(
                    (dir.uid(), dir.gid(), dir.mode() & 0o7777) == (USER, USER, 0o750),
                    "wrong",
                )
            },
        ),
        row(
            "setgid_directory",
            "In a lower directory with setgid new objects get its group, and directories the bit.",
            |fill| {
                fill.dir("d");
                chown(fill.path(0, "d"), Some(0), Some(77)).unwrap();
                set_mode(&fill.path(0, "d"), 0o2777);
            },
            |at| {
                as_user(USER, || {
                    fs::create_dir(at.path("d/sub"))?;
                    fs::write(at.path("d/f"), "")
                })?;
                expect(fs::metadata(at.path("d/f"))?.gid() == 77, "wrong group")?;
                expect(fs::metadata(at.path("d/sub"))?.gid() == 77, "wrong group")?;
                expect(mode(at.path("d/sub"))? & 0o2000 != 0, "no setgid")
            },
        ),
        row(
            "sticky_directory",
            "In a sticky lower directory a user cannot remove or rename what is another's.",
            |fill| {
                fill.file("d/f", "");
                set_mode(&fill.path(0, "d"), 0o1777);
            },
            |at| {
                let removed = as_user(USER, || fs::remove_file(at.path("d/f")));
                fails(removed, nix::Error::EPERM)?;
                let renamed = as_user(USER, || fs::rename(at.path("d/f"), at.path("d/g")));
                fails(renamed, nix::Error::EPERM)?;
                as_user(USER, || {
                    fs::write(at.path("d/own"), "")?;
                    fs::remove_file(at.path("d/own"))
                })?;
                Ok(())
            },
        ),
        row(
            "chmod_of_others",
            "A user cannot chmod or chown what is another's.",
            one_file,
            |at| {
                let perm = || Permissions::from_mode(0o777);
                let changed = as_user(USER, || fs::set_permissions(at.path("d/f"), perm()));
                fails(changed, nix::Error::EPERM)?;
                let given = as_user(USER, || chown(at.path("d/f"), Some(USER), None));
                fails(given, nix::Error::EPERM)
            },
        ),
        row(
            "symlink_owner",
            "lchown of a lower symbolic link changes the link and not its target.",
            |fill| {
                fill.file("f", "");
                symlink("f", fill.path(0, "s")).unwrap();
            },
            |at| {
                std::os::unix::fs::lchown(at.path("s"), Some(5), Some(6))?;
                let m = fs::symlink_metadata(at.path("s"))?;
                expect((m.uid(), m.gid()) == (5, 6), "unchanged")?;
                expect(fs::metadata(at.path("s"))?.uid() == 0, "target changed")
            },
        ),
    ]
}

fn times() -> Vec<Row> {
    fn shown(path: &Path, sec: i64, nsec: i64) -> Outcome {
        let m = fs::symlink_metadata(path)?;
        expect((m.mtime(), m.mtime_nsec()) == (sec, nsec), "rounded")?;
        expect((m.atime(), m.atime_nsec()) == (sec, nsec), "rounded")
    }
    vec![
        row(
            "times_of_nanoseconds",
            "Times are kept to the nanosecond, also over a remount.",
            one_file,
            |at| {
                set_times(&at.path("d/f"), 1_700_000_000, 123_456_789)?;
                shown(&at.path("d/f"), 1_700_000_000, 123_456_789)?;
                at.remount()?;
                shown(&at.path("d/f"), 1_700_000_000, 123_456_789)
            },
        ),
        row(
            "times_before_1970",
            "Times before 1970 are kept, with their fraction.",
            |fill| {
                one_file(fill);
                set_times(&fill.path(0, "d/f"), -100, 700_000_000).unwrap();
            },
            |at| {
                let m = fs::metadata(at.path("d/f"))?;
                expect((m.mtime(), m.mtime_nsec()) == (-100, 700_000_000), "wrong")?;
                set_times(&at.path("d/f"), -2, 200_000_000)?;
                shown(&at.path("d/f"), -2, 200_000_000)?;
                at.remount()?;
                shown(&at.path("d/f"), -2, 200_000_000)
            },
        ),
        row(
            "times_after_2038",
            "Times after 2038 are kept.",
            one_file,
            |at| {
                set_times(&at.path("d/f"), 5_000_000_000, 1)?;
                shown(&at.path("d/f"), 5_000_000_000, 1)
            },
        ),
        row(
            "times_of_copy_up",
            "A change of mode keeps the times of a lower file; a directory copied up for it keeps its own.",
            |fill| {
                one_file(fill);
                set_times(&fill.path(0, "d/f"), 1000, 1).unwrap();
                set_times(&fill.path(0, "d"), 2000, 2).unwrap();
            },
            |at| {
                fs::set_permissions(at.path("d/f"), Permissions::from_mode(0o600))?;
                let (file, dir) = (fs::metadata(at.path("d/f"))?, fs::metadata(at.path("d"))?);
                expect(
                    (file.mtime(), file.mtime_nsec()) == (1000, 1),
                    "file changed",
                )?;
                expect(
                    (dir.mtime(), dir.mtime_nsec()) == (2000, 2),
                    "directory changed",
                )
            },
        ),
        row(
            "times_of_directory",
            "Making, removing and renaming a name moves the times of its lower directory.",
            |fill| {
                one_file(fill);
                fill.file("d/g", "");
                set_times(&fill.path(0, "d"), 2000, 2).unwrap();
            },
            |at| {
                type Change = fn(&Path) -> std::io::Result<()>;
                let changes: [Change; 3] = [
                    |d| fs::write(d.join("new"), ""),
                    |d| fs::remove_file(d.join("g")),
                    |d| fs::rename(d.join("f"), d.join("h")),
                ];
                for change in changes {
                    change(&at.path("d"))?;
                    expect(
                        fs::metadata(at.path("d"))?.mtime() > 1_000_000_000,
                        "unmoved",
                    )?;
                    set_times(&at.path("d"), 2000, 2)?;
                }
                Ok(())
            },
        ),
        row(
            "times_of_write",
            "A write moves mtime and ctime, chmod only ctime, and stat shows both at once.",
            |fill| {
                one_file(fill);
                set_times(&fill.path(0, "d/f"), 1000, 1).unwrap();
            },
            |at| {
                let before = fs::metadata(at.path("d/f"))?;
                fs::set_permissions(at.path("d/f"), Permissions::from_mode(0o600))?;
                let chmod = fs::metadata(at.path("d/f"))?;
                expect(chmod.mtime() == before.mtime(), "mtime moved")?;
                expect(chmod.ctime() >= before.ctime(), "ctime unmoved")?;
                let file = open_rw(at.path("d/f"))?;
                file.write_all_at(b"new", 0)?;
                expect(
                    fs::metadata(at.path("d/f"))?.mtime() > 1_000_000_000,
                    "mtime unmoved",
                )
            },
        ),
        row(
            "times_of_written_kept",
            "The mtime that a file shows after a write is there when the kernel has forgotten it, and after a remount.",
            one_file,
            |at| {
                let time = |name: &str| -> std::io::Result<_> {
                    let m = fs::metadata(at.path(name))?;
                    Ok((m.mtime(), m.mtime_nsec()))
                };
                let mut shown = Vec::new();
                for n in 0..60 {
                    let name = format!("d/made{n}");
                    fs::write(at.path(&name), "new")?;
                    shown.push((time(&name)?, name));
                }
                open_rw(at.path("d/f"))?.write_all_at(b"new", 0)?;
                shown.push((time("d/f")?, "d/f".to_owned()));
                let same = || -> Outcome {
                    for (mtime, name) in &shown {
                        expect(time(name)? == *mtime, "moves")?;
                    }
                    Ok(())
                };
                at.drop_caches();
                same()?;
                at.remount()?;
                same()
            },
        ),
        row(
            "times_of_mapping",
            "A store through a mapping moves mtime by the time of msync.",
            |fill| {
                one_file(fill);
                set_times(&fill.path(0, "d/f"), 1000, 1).unwrap();
            },
            |at| {
                let file = open_rw(at.path("d/f"))?;
                let mut map = crate::common::mapping::shared_mut(&file);
                map[0] = b'n';
                map.flush()?;
                drop(map);
                expect(
                    fs::metadata(at.path("d/f"))?.mtime() > 1_000_000_000,
                    "unmoved",
                )
            },
        ),
        row(
            "times_of_reading",
            "Reading a lower file whose access time is old moves it, as relatime has it.",
            one_file,
            |at| {
                fs::read(at.path("d/f"))?;
                expect(
                    fs::metadata(at.path("d/f"))?.atime() > 1_500_000_000,
                    "unmoved",
                )
            },
        ),
        row(
            "times_of_quiet_reading",
            "Reading with O_NOATIME moves no access time, of a lower file and of one that was written.",
            |fill| {
                one_file(fill);
                fill.file("d/written", "old");
            },
            |at| {
                open_rw(at.path("d/written"))?.write_all_at(b"new", 0)?;
                set_times(&at.path("d/written"), 1_000_000_000, 0)?;
                // The kernel asks for what it has not.
                at.remount()?;
                for name in ["d/f", "d/written"] {
                    let time = || Ok::<_, Said>(fs::metadata(at.path(name))?.atime());
                    let before = time()?;
                    let mut options = File::options();
                    let options = options.read(true).custom_flags(libc::O_NOATIME);
                    options.open(at.path(name))?.read_exact(&mut [0; 3])?;
                    expect(time()? == before, "moved")?;
                }
                Ok(())
            },
        ),
        row(
            "time_of_birth",
            "statx shows a time of birth.",
            one_file,
            |at| {
                let path = at.path("d/f");
                let statx =
                    rustix::fs::statx(rustix::fs::CWD, &path, AtFlags::empty(), StatxFlags::BTIME)?;
                let has = statx.stx_mask & StatxFlags::BTIME.bits() != 0;
                expect(has, "not shown")
            },
        ),
    ]
}

fn attributes() -> Vec<Row> {
    fn marked(fill: &Fill) {
        one_file(fill);
        for name in ["user.kept", "trusted.kept", "security.kept"] {
            xattr::set(fill.path(0, "d/f"), name, name.as_bytes()).unwrap();
        }
        xattr::set(fill.path(0, "d"), "user.kept", b"dir").unwrap();
    }
    vec![
        row(
            "attributes_kept",
            "Attributes user.*, trusted.* and security.* of lower objects are there after copy-up and remount.",
            marked,
            |at| {
                open_rw(at.path("d/f"))?.write_all_at(b"new", 0)?;
                at.remount()?;
                for name in ["user.kept", "trusted.kept", "security.kept"] {
                    let value = xattr::get(at.path("d/f"), name)?;
                    expect(value.as_deref() == Some(name.as_bytes()), "lost")?;
                }
                expect(xattr::get(at.path("d"), "user.kept")?.is_some(), "lost")
            },
        ),
        row(
            "attributes_changed",
            "Attributes of a lower file are set, replaced and removed, with the errors of native files.",
            marked,
            |at| {
                let path = at.path("d/f");
                let set = |name: &str, flags| rustix::fs::setxattr(&path, name, b"value", flags);
                fails(set("user.kept", XattrFlags::CREATE), nix::Error::EEXIST)?;
                fails(set("user.new", XattrFlags::REPLACE), nix::Error::ENODATA)?;
                let both = XattrFlags::CREATE | XattrFlags::REPLACE;
                fails(set("user.kept", both), nix::Error::EEXIST)?;
                fails(set("user.new", both), nix::Error::ENODATA)?;
                set("user.new", XattrFlags::CREATE)?;
                set("user.kept", XattrFlags::REPLACE)?;
                xattr::remove(&path, "user.kept")?;
                fails(
                    rustix::fs::removexattr(&path, "user.kept"),
                    nix::Error::ENODATA,
                )?;
                at.remount()?;
                expect(xattr::get(&path, "user.kept")?.is_none(), "came back")?;
                expect(
                    xattr::get(&path, "user.new")?.as_deref() == Some(b"value"),
                    "lost",
                )
            },
        ),
        row(
            "attribute_sizes",
            "A buffer that is too small is ERANGE, values may be empty or of 3 KiB.",
            marked,
            |at| {
                let path = at.path("d/f");
                let small = rustix::fs::getxattr(&path, "user.kept", &mut [0_u8; 3][..]);
                fails(small, nix::Error::ERANGE)?;
                rustix::fs::setxattr(&path, "user.empty", b"", XattrFlags::empty())?;
                expect(
                    xattr::get(&path, "user.empty")?.as_deref() == Some(b""),
                    "lost",
                )
            },
        ),
        row(
            "attributes_of_symlink",
            "A symbolic link takes trusted.* and refuses user.* with EPERM.",
            |fill| symlink("nowhere", fill.path(0, "s")).unwrap(),
            |at| {
                let set = |name: &str| {
                    rustix::fs::lsetxattr(at.path("s"), name, b"value", XattrFlags::empty())
                };
                fails(set("user.x"), nix::Error::EPERM)?;
                set("trusted.x")?;
                let mut value = [0_u8; 16];
                let len = rustix::fs::lgetxattr(at.path("s"), "trusted.x", &mut value[..])?;
                expect(&value[..len] == b"value", "lost")
            },
        ),
        row(
            "trusted_is_roots",
            "trusted.* is hidden from users without privileges.",
            marked,
            |at| {
                let names = as_user(USER, || xattr::list(at.path("d/f")))?;
                let trusted =
                    |name: std::ffi::OsString| name.to_string_lossy().starts_with("trusted.");
                expect(!names.into_iter().any(trusted), "shown")?;
                let set = as_user(USER, || xattr::set(at.path("d/f"), "trusted.x", b""));
                fails(set, nix::Error::EPERM)
            },
        ),
    ]
}

fn flags() -> Row {
    row(
        "flags",
        "The flags that lsattr(1) shows can be read.",
        nothing,
        |at| {
            fs::write(at.path("f"), "")?;
            let file = File::open(at.path("f"))?;
            rustix::fs::ioctl_getflags(&file)?;
            Ok(())
        },
    )
}
