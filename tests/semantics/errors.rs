//! Errors: those of the caller, of read-only mounts, and of the host below.

use std::fs::{self, File};
use std::os::unix::fs::{FileExt, OpenOptionsExt, symlink};
use std::path::Path;
use std::process::Command;
use std::time::{Duration, Instant};

use nix::mount::{MsFlags, mount};
use nix::sys::statvfs::statvfs;

use crate::fill::Fill;
use crate::outcome::{Outcome, Said, expect, fails};
use crate::place::{Peer, Place};
use crate::row::{Row, nothing, row};
use crate::tools::{absent, holds, lists, open_rw};

const MIB: usize = 1 << 20;

/// How long anything may take that normally takes an instant.
const DEADLINE: Duration = Duration::from_secs(60);

fn tree(fill: &Fill) {
    fill.file("d/f", "old");
    fill.file_in(1, "d/g", "below");
    symlink("f", fill.path(0, "d/s")).unwrap();
}

fn tree_is_unchanged(at: &Place) -> Outcome {
    lists(at.path("d"), &["f", "g", "s"])?;
    holds(at.path("d/f"), "old")?;
    holds(at.path("d/g"), "below")
}

/// Every kind of change, each with its name.
fn changes(at: &Place) -> Vec<(&'static str, Result<(), std::io::Error>)> {
    let path = |name: &str| at.path(name);
    let perm = std::os::unix::fs::PermissionsExt::from_mode(0o600);
    vec![
        ("create", File::create(path("d/new")).map(drop)),
        ("mkdir", fs::create_dir(path("d/new"))),
        ("symlink", symlink("x", path("d/new"))),
        ("link", fs::hard_link(path("d/f"), path("d/new"))),
        ("rename", fs::rename(path("d/f"), path("d/new"))),
        ("rename of a directory", fs::rename(path("d"), path("e"))),
        ("unlink", fs::remove_file(path("d/g"))),
        ("open for writing", open_rw(path("d/f")).map(drop)),
        ("chmod", fs::set_permissions(path("d/f"), perm)),
        ("setxattr", xattr::set(path("d/f"), "user.x", b"y")),
        (
            "truncate",
            nix::unistd::truncate(&path("d/f"), 0).map_err(Into::into),
        ),
    ]
}

fn all_fail(at: &Place, errno: nix::Error) -> Outcome {
    for (name, result) in changes(at) {
        let outcome = fails(result, errno);
        if outcome.is_err() {
            eprintln!("{name}: {outcome:?}");
        }
        outcome?;
    }
    tree_is_unchanged(at)
}

/// Writes a file until the disk is full.
fn fill_up(path: &Path) -> Result<(), Said> {
    let file = File::create(path)?;
    let mut at = 0;
    for step in [MIB / 4, 4096, 512] {
        let bytes = vec![7; step];
        while file
            .write_all_at(&bytes, at)
            .and_then(|()| file.sync_data())
            .is_ok()
        {
            at += step as u64;
        }
    }
    Ok(())
}

/// Waits until the host has given back the room of a removed file: a FUSE server is told of its end some
/// time after the last close.
fn wait_for_room(at: &Place) -> Outcome {
    let start = Instant::now();
    while statvfs(at.host())?.blocks_available() * 4096 < 6 * MIB as u64 {
        expect(start.elapsed() < DEADLINE, "no room")?;
        std::thread::sleep(Duration::from_millis(5));
    }
    Ok(())
}

fn disk(at: &Place, flags: MsFlags) -> nix::Result<()> {
    let none: Option<&str> = None;
    mount(none, at.host(), none, MsFlags::MS_REMOUNT | flags, none)
}

/// All rows of the chapter.
pub fn rows() -> Vec<Row> {
    let mut rows = of_the_caller();
    rows.extend(read_only());
    rows.extend(of_the_host());
    rows
}

fn of_the_caller() -> Vec<Row> {
    vec![
        row(
            "directories",
            "EISDIR and ENOTDIR are told of lower objects as of native ones.",
            tree,
            |at| {
                fails(open_rw(at.path("d")), nix::Error::EISDIR)?;
                fails(fs::remove_file(at.path("d")), nix::Error::EISDIR)?;
                fails(fs::remove_dir(at.path("d/f")), nix::Error::ENOTDIR)?;
                fails(fs::metadata(at.path("d/f/x")), nix::Error::ENOTDIR)?;
                fs::create_dir(at.path("e"))?;
                fails(
                    fs::rename(at.path("e"), at.path("d/f")),
                    nix::Error::ENOTDIR,
                )?;
                fails(fs::rename(at.path("d/f"), at.path("e")), nix::Error::EISDIR)
            },
        ),
        row(
            "missing",
            "ENOENT is told of names that no layer has, by every call.",
            tree,
            |at| {
                let none = at.path("d/none");
                fails(fs::metadata(&none), nix::Error::ENOENT)?;
                fails(fs::remove_file(&none), nix::Error::ENOENT)?;
                fails(fs::remove_dir(&none), nix::Error::ENOENT)?;
                fails(fs::rename(&none, at.path("x")), nix::Error::ENOENT)?;
                fails(fs::hard_link(&none, at.path("x")), nix::Error::ENOENT)?;
                fails(File::create(none.join("x")), nix::Error::ENOENT)
            },
        ),
        row(
            "existing",
            "EEXIST is told of names that only a lower layer has, by every call.",
            tree,
            |at| {
                for name in ["d/g", "d"] {
                    fails(fs::create_dir(at.path(name)), nix::Error::EEXIST)?;
                    fails(symlink("x", at.path(name)), nix::Error::EEXIST)?;
                    fails(
                        fs::hard_link(at.path("d/f"), at.path(name)),
                        nix::Error::EEXIST,
                    )?;
                    let fifo = nix::unistd::mkfifo(&at.path(name), nix::sys::stat::Mode::empty());
                    fails(fifo, nix::Error::EEXIST)?;
                }
                Ok(())
            },
        ),
        row(
            "kinds",
            "readlink of a file is EINVAL, writing to a fifo without a reader ENXIO.",
            tree,
            |at| {
                fails(fs::read_link(at.path("d/f")), nix::Error::EINVAL)?;
                let mode = nix::sys::stat::Mode::from_bits_truncate(0o600);
                nix::unistd::mkfifo(&at.path("p"), mode)?;
                let mut options = File::options();
                let open = options
                    .write(true)
                    .custom_flags(libc::O_NONBLOCK)
                    .open(at.path("p"));
                fails(open, nix::Error::ENXIO)
            },
        ),
        row(
            "no_exdev",
            "No rename or link within the mount is EXDEV, whatever layers the two ends are of.",
            tree,
            |at| {
                fs::create_dir(at.path("e"))?;
                fs::rename(at.path("d/g"), at.path("e/g"))?;
                fs::hard_link(at.path("d/f"), at.path("e/f"))?;
                fs::rename(at.path("d"), at.path("e/d"))?;
                fs::rename(at.path("e"), at.path("d"))?;
                holds(at.path("d/d/f"), "old")
            },
        ),
        row(
            "statfs",
            "statfs shows names of 255 bytes and the free room of the file system below the upper.",
            nothing,
            |at| {
                let (one, other) = (statvfs(&at.root())?, statvfs(at.host())?);
                expect(one.name_max() == 255, "wrong names")?;
                expect(one.blocks() == other.blocks(), "wrong size")?;
                expect(one.files() == other.files(), "wrong count")
            },
        ),
    ]
}

fn read_only() -> Vec<Row> {
    vec![
        row(
            "without_upper",
            "Without an upper the tree is merged and every change is EROFS.",
            tree,
            |at| {
                if at.peer == Peer::Native {
                    // What comes nearest: the same tree in a read-only mount.
                    let none: Option<&str> = None;
                    mount(Some(&at.root()), &at.root(), none, MsFlags::MS_BIND, none)?;
                    let flags = MsFlags::MS_REMOUNT | MsFlags::MS_BIND | MsFlags::MS_RDONLY;
                    mount(none, &at.root(), none, flags, none)?;
                } else {
                    at.remount_without_upper()?;
                }
                all_fail(at, nix::Error::EROFS)
            },
        ),
        row(
            "remounted_read_only",
            "After `mount -o remount,ro` every change is EROFS, after `remount,rw` none is.",
            tree,
            |at| {
                let none: Option<&str> = None;
                if at.peer == Peer::Native {
                    mount(Some(&at.root()), &at.root(), none, MsFlags::MS_BIND, none)?;
                }
                let bind = match at.peer {
                    Peer::Native => MsFlags::MS_BIND,
                    _ => MsFlags::empty(),
                };
                let flags = MsFlags::MS_REMOUNT | bind;
                mount(none, &at.root(), none, flags | MsFlags::MS_RDONLY, none)?;
                all_fail(at, nix::Error::EROFS)?;
                mount(none, &at.root(), none, flags, none)?;
                fs::write(at.path("d/f"), "new")?;
                holds(at.path("d/f"), "new")
            },
        ),
    ]
}

fn of_the_host() -> Vec<Row> {
    vec![
        row(
            "enospc_of_write",
            "Writing on a full disk is ENOSPC by the time of fsync; what was there stays, removing makes room.",
            tree,
            |at| {
                fs::write(at.path("kept"), "kept")?;
                fill_up(&at.path("filler"))?;
                let more = File::options().append(true).open(at.path("filler"))?;
                let written = more.write_all_at(&[1; MIB], 64 << 20).and_then(|()| more.sync_all());
                fails(written, nix::Error::ENOSPC)?;
                drop(more);
                holds(at.path("kept"), "kept")?;
                fs::remove_file(at.path("filler"))?;
                wait_for_room(at)?;
                fs::write(at.path("after"), vec![1; MIB])?;
                tree_is_unchanged(at)
            },
        )
        .on_disk_of(16),
        row(
            "enospc_of_copy_up",
            "Writing to a lower file on a full disk is ENOSPC, and the file is what it was; with room it succeeds.",
            |fill| {
                tree(fill);
                fill.file("large", vec![b'l'; 4 * MIB]);
            },
            |at| {
                fill_up(&at.path("filler"))?;
                let write = || {
                    let file = open_rw(at.path("large"))?;
                    // Holes elsewhere, so that a native file needs room as well.
                    file.write_all_at(&vec![b'n'; 4 * MIB], 4 * MIB as u64)?;
                    file.sync_all()
                };
                fails(write(), nix::Error::ENOSPC)?;
                let text = fs::read(at.path("large"))?;
                expect(text[..4 * MIB] == vec![b'l'; 4 * MIB], "damaged")?;
                tree_is_unchanged(at)?;
                fs::remove_file(at.path("filler"))?;
                wait_for_room(at)?;
                write()?;
                at.remount()?;
                let text = fs::read(at.path("large"))?;
                expect(text[..4 * MIB] == vec![b'l'; 4 * MIB], "damaged")?;
                expect(text[4 * MIB..] == vec![b'n'; 4 * MIB], "lost")
            },
        )
        .on_disk_of(24),
        row(
            "enospc_of_names",
            "Making what needs room on a full disk is ENOSPC and leaves nothing.",
            tree,
            |at| {
                fill_up(&at.path("filler"))?;
                // The host may have room for a few more names.
                let mut made = 0;
                let result = loop {
                    let name = at.path(format!("e{made}"));
                    match fs::create_dir(&name).and_then(|()| fs::write(name.join("f"), "text")) {
                        Ok(()) if made < 100_000 => made += 1,
                        result => break result,
                    }
                };
                fails(result, nix::Error::ENOSPC)?;
                // Only the last may be there, without its file's content.
                let names = crate::tools::names(at.root())?;
                expect(names.len() >= made + 2 && names.len() <= made + 3, "leaves something")?;
                tree_is_unchanged(at)?;
                at.remount()?;
                expect(crate::tools::names(at.root())? == names, "leaves something")?;
                tree_is_unchanged(at)
            },
        )
        .on_disk_of(8),
        row(
            "edquot",
            "What goes beyond a quota of the host is EDQUOT, and what was there stays.",
            tree,
            |at| {
                fs::write(at.path("kept"), "kept")?;
                limit(at, "4M")?;
                let file = File::create(at.path("large"))?;
                let written = file.write_all_at(&vec![1; 16 * MIB], 0).and_then(|()| file.sync_all());
                fails(written, nix::Error::EDQUOT)?;
                holds(at.path("kept"), "kept")?;
                tree_is_unchanged(at)?;
                limit(at, "none")?;
                fs::write(at.path("after"), vec![1; MIB])?;
                holds(at.path("kept"), "kept")
            },
        )
        .on_quota_disk(),
        row(
            "erofs",
            "When the host's file system is remounted read-only changes are EROFS, and reading goes on.",
            tree,
            |at| {
                disk(at, MsFlags::MS_RDONLY)?;
                all_fail(at, nix::Error::EROFS)?;
                disk(at, MsFlags::empty())?;
                fs::write(at.path("d/f"), "new")?;
                holds(at.path("d/f"), "new")
            },
        )
        .on_disk_of(8),
        row(
            "eio",
            "What the host cannot read is EIO; other files are read as before.",
            tree,
            |at| {
                fs::write(at.path("large"), vec![1; 4 * MIB])?;
                let files = [at.path("large"), at.upper().join("large")];
                for path in &files {
                    File::open(path)?.sync_all()?;
                }
                for path in &files {
                    let advice = nix::fcntl::PosixFadviseAdvice::POSIX_FADV_DONTNEED;
                    nix::fcntl::posix_fadvise(&File::open(path)?, 0, 0, advice)?;
                }
                // The disk loses all blocks but the first ones.
                let image = File::options().write(true).open(at.host().with_extension("img"))?;
                image.set_len(512 << 10)?;
                fails(fs::read(at.path("large")), nix::Error::EIO)?;
                if at.peer == Peer::Native {
                    return Ok(());
                }
                holds(at.path("d/f"), "old")?;
                holds(at.path("d/g"), "below")
            },
        )
        .on_disk_of(16),
        row(
            "server_killed",
            "When the server is killed its callers get an error at once.",
            tree,
            |at| {
                let Some(server) = at.server() else {
                    return Ok(());
                };
                let file = File::open(at.path("d/f"))?;
                Command::new("kill").args(["-9", &server.to_string()]).status()?;
                at.wait_for_server()?;
                fails(fs::metadata(at.path("d/g")), nix::Error::ENOTCONN)?;
                expect(file.read_at(&mut [0; 3], 0).is_err() || at.peer == Peer::Native, "reads on")?;
                drop(file);
                at.remount()?;
                tree_is_unchanged(at)?;
                absent(at.path("d/new"))
            },
        ),
    ]
}

/// Limits what the whole disk of a row may hold.
fn limit(at: &Place, size: &str) -> Outcome {
    let mut command = Command::new("btrfs");
    command.args(["qgroup", "limit", size]).arg(at.host());
    expect(command.status()?.success(), "no quotas")
}
