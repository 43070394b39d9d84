//! Names and paths.

use std::ffi::{OsStr, OsString};
use std::fs::{self, File};
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::symlink;
use std::path::Path;
use std::process::Command;

use crate::fill::Fill;
use crate::outcome::{Outcome, expect, fails};
use crate::row::{Row, nothing, row};
use crate::tools::{holds, lists, names};

fn longest() -> String {
    "n".repeat(255)
}

/// Not UTF-8, control characters, and what shells and marks trip over.
const ODD: [&[u8]; 8] = [
    b"\xff\xfe",
    b"new\nline",
    b"\x01\x7f",
    b"-dash",
    b"back\\slash",
    b"a,b:c",
    b"...",
    b"\"'$ ",
];

/// A directory name of 200 bytes, 25 of which make a path longer than PATH_MAX.
fn step() -> String {
    "d".repeat(200)
}

const STEPS: usize = 25;

/// Goes down so many steps, making them first if told to. Ends in the deepest.
fn descend(top: &Path, make: bool) -> std::io::Result<()> {
    std::env::set_current_dir(top)?;
    for _ in 0..STEPS {
        if make {
            fs::create_dir(step())?;
        }
        std::env::set_current_dir(step())?;
    }
    Ok(())
}

fn deep(fill: &Fill) {
    // Rows run side by side in the process that fills, whose working directory is one.
    let mut dir = File::open(fill.lower(0)).unwrap();
    for _ in 0..STEPS {
        let name = step();
        rustix::fs::mkdirat(&dir, &name, rustix::fs::Mode::from_raw_mode(0o755)).unwrap();
        let flags = rustix::fs::OFlags::DIRECTORY;
        let next = rustix::fs::openat(&dir, &name, flags, rustix::fs::Mode::empty()).unwrap();
        dir = File::from(next);
    }
    let flags = rustix::fs::OFlags::CREATE | rustix::fs::OFlags::WRONLY;
    let mode = rustix::fs::Mode::from_raw_mode(0o644);
    let file = rustix::fs::openat(&dir, "f", flags, mode).unwrap();
    std::io::Write::write_all(&mut File::from(file), b"deep").unwrap();
}

fn deep_directory(fill: &Fill) {
    deep(fill);
    let mut dir = File::open(fill.lower(0)).unwrap();
    let flags = rustix::fs::OFlags::DIRECTORY;
    for name in std::iter::repeat_n(step(), STEPS) {
        let next = rustix::fs::openat(&dir, &name, flags, rustix::fs::Mode::empty()).unwrap();
        dir = File::from(next);
    }
    rustix::fs::mkdirat(&dir, "d", rustix::fs::Mode::from_raw_mode(0o755)).unwrap();
    rustix::fs::renameat(&dir, "f", &dir, "d/f").unwrap();
}

fn remove_upwards() -> Outcome {
    for _ in 0..STEPS {
        std::env::set_current_dir("..")?;
        fs::remove_dir(step())?;
    }
    Ok(())
}

/// All rows of the chapter.
pub fn rows() -> Vec<Row> {
    vec![
        row(
            "longest",
            "Names of 255 bytes are made, found, renamed, copied up and removed.",
            |fill| fill.file(&longest(), "old"),
            |at| {
                let long = longest();
                fs::write(at.path(&long), "new")?;
                let other = long.replace('n', "m");
                fs::rename(at.path(&long), at.path(&other))?;
                fs::create_dir(at.path(&long))?;
                at.remount()?;
                holds(at.path(&other), "new")?;
                fs::remove_file(at.path(&other))?;
                lists(at.root(), &[&long])
            },
        ),
        row(
            "too_long",
            "Names of 256 bytes are ENAMETOOLONG for every call.",
            |fill| fill.file("f", ""),
            |at| {
                let long = at.path("n".repeat(256));
                let too_long = nix::Error::ENAMETOOLONG;
                fails(fs::metadata(&long), too_long)?;
                fails(File::create(&long), too_long)?;
                fails(fs::create_dir(&long), too_long)?;
                fails(symlink("x", &long), too_long)?;
                fails(fs::rename(at.path("f"), &long), too_long)?;
                fails(fs::hard_link(at.path("f"), &long), too_long)?;
                fails(fs::remove_file(&long), too_long)
            },
        ),
        row(
            "odd",
            "Names with any bytes but `/` and NUL work, from lower layers and made.",
            |fill| {
                for name in ODD {
                    fs::write(fill.lower(0).join(OsStr::from_bytes(name)), name).unwrap();
                }
            },
            |at| {
                for name in ODD {
                    let path = at.path(OsStr::from_bytes(name));
                    expect(fs::read(&path)? == name, "wrong content")?;
                    fs::write(&path, "new")?;
                    let other = at.path(OsStr::from_bytes(&[name, b"2"].concat()));
                    fs::rename(&path, &other)?;
                    fs::create_dir(&path)?;
                }
                at.remount()?;
                let mut wanted: Vec<OsString> = Vec::new();
                for name in ODD {
                    wanted.push(OsStr::from_bytes(name).into());
                    wanted.push(OsStr::from_bytes(&[name, b"2"].concat()).into());
                }
                wanted.sort();
                expect(names(at.root())? == wanted, "wrong listing")
            },
        ),
        row(
            "longest_link",
            "A symbolic link of 4095 bytes is kept, over copy-up and remount.",
            |fill| symlink("t".repeat(4095), fill.path(0, "s")).unwrap(),
            |at| {
                std::os::unix::fs::lchown(at.path("s"), Some(1), Some(1))?;
                symlink("u".repeat(4095), at.path("new"))?;
                at.remount()?;
                let target = |name| fs::read_link(at.path(name));
                expect(
                    target("s")?.as_os_str() == OsStr::new(&"t".repeat(4095)),
                    "wrong",
                )?;
                expect(
                    target("new")?.as_os_str() == OsStr::new(&"u".repeat(4095)),
                    "wrong",
                )
            },
        ),
        row(
            "loop",
            "Symbolic links that lead to each other are ELOOP.",
            |fill| {
                symlink("b", fill.path(0, "a")).unwrap();
                symlink("a", fill.path(0, "b")).unwrap();
            },
            |at| fails(fs::metadata(at.path("a")), nix::Error::ELOOP),
        ),
        row(
            "no_follow",
            "O_NOFOLLOW of a symbolic link is ELOOP, O_CREAT through a dangling one makes its target.",
            |fill| symlink("target", fill.path(0, "s")).unwrap(),
            |at| {
                let mut options = File::options();
                let no_follow = std::os::unix::fs::OpenOptionsExt::custom_flags(
                    options.read(true),
                    libc::O_NOFOLLOW,
                );
                fails(no_follow.open(at.path("s")), nix::Error::ELOOP)?;
                fs::write(at.path("s"), "text")?;
                holds(at.path("target"), "text")
            },
        ),
        row(
            "trailing_slash",
            "A lower file with a slash after its name is ENOTDIR, a directory is itself.",
            |fill| {
                fill.file("f", "");
                fill.dir("d");
            },
            |at| {
                fails(fs::metadata(at.path("f/")), nix::Error::ENOTDIR)?;
                expect(fs::metadata(at.path("d/"))?.is_dir(), "no directory")?;
                Ok(fs::create_dir(at.path("e/"))?)
            },
        ),
        row(
            "deep_lower",
            "A lower tree deeper than PATH_MAX is read, changed and removed by relative steps.",
            deep,
            |at| {
                descend(&at.root(), false)?;
                holds("f", "deep")?;
                fs::write("f", "new")?;
                fs::rename("f", "g")?;
                fs::create_dir("made")?;
                lists(".", &["g", "made"])?;
                fs::remove_dir("made")?;
                fs::remove_file("g")?;
                remove_upwards()?;
                lists(".", &[])
            },
        )
        .unseen(),
        row(
            "deep_directory_moved",
            "mv moves a lower directory whose path is longer than an attribute of the host can be.",
            deep_directory,
            |at| {
                descend(&at.root(), false)?;
                let moved = at.path("moved");
                let status = Command::new("mv").arg("d").arg(&moved).status()?;
                expect(status.success(), "mv fails")?;
                lists(".", &[])?;
                std::env::set_current_dir("/")?;
                at.remount()?;
                holds(moved.join("f"), "deep")
            },
        )
        .unseen(),
        row(
            "deep_file_moved",
            "A lower file whose path is as long is linked and renamed, and keeps its data.",
            deep,
            |at| {
                descend(&at.root(), false)?;
                fs::hard_link("f", at.path("linked"))?;
                fs::rename("f", at.path("renamed"))?;
                lists(".", &[])?;
                std::env::set_current_dir("/")?;
                at.remount()?;
                holds(at.path("linked"), "deep")?;
                holds(at.path("renamed"), "deep")
            },
        )
        .unseen(),
        row(
            "deep_file_renamed",
            "A lower file whose path is as long, and whose owner was changed, is renamed and keeps its data.",
            deep,
            |at| {
                descend(&at.root(), false)?;
                std::os::unix::fs::chown("f", Some(1), Some(1))?;
                fs::rename("f", at.path("renamed"))?;
                std::env::set_current_dir("/")?;
                at.remount()?;
                holds(at.path("renamed"), "deep")
            },
        )
        .unseen(),
        row(
            "deep_made",
            "A tree deeper than PATH_MAX is made, found after a remount, and removed.",
            nothing,
            |at| {
                descend(&at.root(), true)?;
                fs::write("f", "new")?;
                std::env::set_current_dir("/")?;
                at.remount()?;
                descend(&at.root(), false)?;
                holds("f", "new")?;
                fs::remove_file("f")?;
                remove_upwards()?;
                lists(".", &[])
            },
        ),
    ]
}
