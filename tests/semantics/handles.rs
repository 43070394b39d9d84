//! File handles: `name_to_handle_at(2)` and `open_by_handle_at(2)`, as an NFS server uses them.

use std::ffi::OsStr;
use std::fs::{self, File};
use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::os::unix::fs::{FileExt, MetadataExt};
use std::path::Path;

use plywood::sys::fs::Object;
use plywood::sys::handle::{self, Handle};

use crate::fill::Fill;
use crate::outcome::{Outcome, Said, expect, fails};
use crate::place::Place;
use crate::row::{Row, row};
use crate::tools::{holds, names, open_rw};

fn tree(fill: &Fill) {
    fill.file("d/e/f", "lower");
    fill.file("d/g", "lower");
    fill.file_in(1, "d/e/below", "lower");
}

fn handle_of(path: &Path) -> Result<Handle, Said> {
    let dir = File::open(path.parent().unwrap())?;
    let name = path.file_name().unwrap_or(OsStr::new("."));
    Ok(handle::of(Object::Entry(dir.as_fd(), name))?)
}

/// Opens a handle and tells how to reach what it names.
fn open(at: &Place, handle: &Handle) -> Result<(OwnedFd, String), Said> {
    let root = File::open(at.root())?;
    let fd = handle::open(root.as_fd(), handle)?;
    let path = format!("/proc/self/fd/{}", fd.as_raw_fd());
    Ok((fd, path))
}

fn leads_to(at: &Place, handle: &Handle, path: &str) -> Outcome {
    let (_fd, found) = open(at, handle)?;
    let (one, other) = (fs::metadata(&found)?, fs::metadata(at.path(path))?);
    let same = (one.ino(), one.mode(), one.size()) == (other.ino(), other.mode(), other.size());
    expect(same, "another file")?;
    if one.is_dir() {
        return expect(names(&found)? == names(at.path(path))?, "wrong listing");
    }
    expect(
        fs::read(&found)? == fs::read(at.path(path))?,
        "wrong content",
    )
}

/// All rows of the chapter.
pub fn rows() -> Vec<Row> {
    vec![
        row("file", "A handle of a lower file opens it.", tree, |at| {
            let handle = handle_of(&at.path("d/e/f"))?;
            leads_to(at, &handle, "d/e/f")
        }),
        row(
            "directory",
            "A handle of a merged directory opens it.",
            tree,
            |at| {
                let handle = handle_of(&at.path("d/e"))?;
                leads_to(at, &handle, "d/e")
            },
        ),
        row(
            "made",
            "A handle of a file that was made through the mount opens it.",
            tree,
            |at| {
                fs::write(at.path("d/e/new"), "upper")?;
                let handle = handle_of(&at.path("d/e/new"))?;
                leads_to(at, &handle, "d/e/new")
            },
        ),
        row(
            "over_copy_up",
            "A handle of a lower file opens the same file after its copy-up.",
            tree,
            |at| {
                let handle = handle_of(&at.path("d/e/f"))?;
                open_rw(at.path("d/e/f"))?.write_all_at(b"UPPER", 0)?;
                leads_to(at, &handle, "d/e/f")
            },
        ),
        row(
            "over_rename",
            "A handle opens the file after it was renamed into another directory.",
            tree,
            |at| {
                let handle = handle_of(&at.path("d/e/f"))?;
                fs::rename(at.path("d/e/f"), at.path("moved"))?;
                leads_to(at, &handle, "moved")
            },
        ),
        row(
            "dropped_caches_file",
            "A handle of a lower file opens it after the kernel has forgotten it.",
            tree,
            |at| {
                let handle = handle_of(&at.path("d/e/f"))?;
                at.drop_caches();
                leads_to(at, &handle, "d/e/f")
            },
        ),
        row(
            "dropped_caches_directory",
            "The same of a merged directory.",
            tree,
            |at| {
                let handle = handle_of(&at.path("d/e"))?;
                at.drop_caches();
                leads_to(at, &handle, "d/e")
            },
        ),
        row(
            "dropped_caches_copied_up",
            "The same of a file that was copied up and renamed, in a directory that was renamed.",
            tree,
            |at| {
                let handle = handle_of(&at.path("d/e/f"))?;
                open_rw(at.path("d/e/f"))?.write_all_at(b"UPPER", 0)?;
                fs::rename(at.path("d/e/f"), at.path("d/e/h"))?;
                fs::rename(at.path("d"), at.path("moved"))?;
                at.drop_caches();
                leads_to(at, &handle, "moved/e/h")
            },
        ),
        row(
            "dropped_caches_made",
            "The same of a file that was made through the mount.",
            tree,
            |at| {
                fs::write(at.path("d/e/new"), "upper")?;
                let handle = handle_of(&at.path("d/e/new"))?;
                at.drop_caches();
                leads_to(at, &handle, "d/e/new")
            },
        ),
        row(
            "dropped_caches_renamed_directory",
            "The same of a merged directory that was renamed.",
            tree,
            |at| {
                let handle = handle_of(&at.path("d/e"))?;
                fs::rename(at.path("d/e"), at.path("moved"))?;
                at.drop_caches();
                leads_to(at, &handle, "moved")
            },
        ),
        row(
            "dropped_caches_other_name",
            "The same of a lower file with several names, when the one that it had the handle from is gone.",
            |fill| {
                tree(fill);
                fill.link("d/g", "d/e/h");
                fill.link("d/g", "i");
            },
            |at| {
                let handle = handle_of(&at.path("d/g"))?;
                fs::remove_file(at.path("d/g"))?;
                at.drop_caches();
                leads_to(at, &handle, "d/e/h")?;
                fs::rename(at.path("i"), at.path("j"))?;
                fs::remove_file(at.path("d/e/h"))?;
                at.drop_caches();
                leads_to(at, &handle, "j")
            },
        ),
        row(
            "removed_and_open",
            "A handle of a removed file opens it as long as somebody has it open, and is ESTALE then.",
            tree,
            |at| {
                let handle = handle_of(&at.path("d/g"))?;
                let file = open_rw(at.path("d/g"))?;
                fs::remove_file(at.path("d/g"))?;
                at.drop_caches();
                let (by_handle, path) = open(at, &handle)?;
                open_rw(&path)?.write_all_at(b"UPPER", 0)?;
                holds(&path, "UPPER")?;
                drop((file, by_handle));
                at.drop_caches();
                fails(open(at, &handle), nix::Error::ESTALE)
            },
        ),
        row(
            "write",
            "A file opened by its handle can be written, and the writing is seen by name.",
            tree,
            |at| {
                let handle = handle_of(&at.path("d/g"))?;
                at.drop_caches();
                let (_fd, path) = open(at, &handle)?;
                open_rw(path)?.write_all_at(b"UPPER", 0)?;
                holds(at.path("d/g"), "UPPER")
            },
        ),
        row(
            "removed",
            "A handle of a removed file or directory is ESTALE.",
            tree,
            |at| {
                let file = handle_of(&at.path("d/g"))?;
                fs::create_dir(at.path("made"))?;
                let dir = handle_of(&at.path("made"))?;
                fs::remove_file(at.path("d/g"))?;
                fs::remove_dir(at.path("made"))?;
                at.drop_caches();
                fails(open(at, &file), nix::Error::ESTALE)?;
                fails(open(at, &dir), nix::Error::ESTALE)
            },
        ),
        row(
            "reused_number",
            "A handle of a removed file never opens another one that got its inode number.",
            tree,
            |at| {
                fs::write(at.path("old"), "")?;
                let old = handle_of(&at.path("old"))?;
                let number = fs::metadata(at.path("old"))?.ino();
                fs::remove_file(at.path("old"))?;
                at.drop_caches();
                // The host gives the lowest free number, so it comes back soon.
                for n in 0..200 {
                    let path = at.path(format!("new{n}"));
                    fs::write(&path, "")?;
                    if fs::metadata(&path)?.ino() == number {
                        expect(handle_of(&path)? != old, "same handle")?;
                    }
                }
                fails(open(at, &old), nix::Error::ESTALE)?;
                at.drop_caches();
                fails(open(at, &old), nix::Error::ESTALE)
            },
        ),
    ]
}
