//! Lower files and directories that chattr(1) has protected.

use std::fs::{self, Permissions};
use std::os::unix::fs::{FileExt, PermissionsExt, chown};
use std::path::PathBuf;
use std::process::Command;

use crate::fill::Fill;
use crate::outcome::{Outcome, expect, fails};
use crate::place::{Peer, Place};
use crate::row::{Row, row};
use crate::tools::{holds, lists, open_rw};

fn tree(fill: &Fill) {
    fill.file("d/f", "old");
    fill.file("d/g", "other");
}

/// A flag, for as long as this lives: what has one cannot be removed when the row is over.
struct Flag {
    path: PathBuf,
    flag: char,
}

impl Flag {
    fn set(at: &Place, path: &str, flag: char) -> Result<Self, crate::outcome::Said> {
        let path = match at.peer {
            Peer::Native => at.path(path),
            _ => at.lower(0).join(path),
        };
        change(&path, &format!("+{flag}"))?;
        Ok(Self { path, flag })
    }
}

impl Drop for Flag {
    fn drop(&mut self) {
        let _ = change(&self.path, &format!("-{}", self.flag));
    }
}

fn change(path: &std::path::Path, word: &str) -> Outcome {
    let status = Command::new("chattr").arg(word).arg(path).status()?;
    expect(status.success(), "chattr fails")
}

/// Nothing of it can be changed, and it is what it was.
fn untouchable(at: &Place) -> Outcome {
    let file = || at.path("d/f");
    let refused = |result: std::io::Result<()>| fails(result, nix::Error::EPERM);
    let written = || -> std::io::Result<()> {
        // With `no_open` it is the write that is refused.
        open_rw(file())?.write_all_at(b"new", 0)
    };
    refused(written())?;
    refused(nix::unistd::truncate(&file(), 0).map_err(Into::into))?;
    refused(fs::set_permissions(file(), Permissions::from_mode(0o600)))?;
    refused(chown(file(), Some(5), None))?;
    refused(xattr::set(file(), "user.x", b"y"))?;
    refused(fs::hard_link(file(), at.path("new")))?;
    refused(fs::rename(file(), at.path("new")))?;
    refused(fs::rename(at.path("d/g"), file()))?;
    refused(fs::remove_file(file()))?;
    holds(file(), "old")?;
    lists(at.path("d"), &["f", "g"])
}

/// Nothing of the directory can be changed.
fn unchangeable(at: &Place) -> Outcome {
    let refused = |result: std::io::Result<()>| fails(result, nix::Error::EPERM);
    refused(fs::write(at.path("d/new"), ""))?;
    refused(fs::create_dir(at.path("d/new")))?;
    refused(fs::remove_file(at.path("d/f")))?;
    refused(fs::rename(at.path("d/f"), at.path("h")))?;
    refused(fs::hard_link(at.path("d/f"), at.path("d/h")))?;
    refused(fs::rename(at.path("d"), at.path("e")))?;
    let mode = Permissions::from_mode(0o700);
    refused(fs::set_permissions(at.path("d"), mode))?;
    lists(at.path("d"), &["f", "g"])
}

/// All rows of the chapter. The flags are changed in the lower directories themselves, so those do not stay the same.
pub fn rows() -> Vec<Row> {
    let rows = vec![
        row(
            "immutable_file",
            "A lower file that is immutable (chattr +i) is not written, changed, linked, renamed or removed: EPERM.",
            tree,
            |at| {
                let _flag = Flag::set(at, "d/f", 'i')?;
                untouchable(at)
            },
        ),
        row(
            "append_only_file",
            "Nor is one that is append-only, but for appending.",
            tree,
            |at| {
                let _flag = Flag::set(at, "d/f", 'a')?;
                untouchable(at)
            },
        ),
        row(
            "append_to_append_only",
            "A lower file that is append-only can be appended to.",
            tree,
            |at| {
                let _flag = Flag::set(at, "d/f", 'a')?;
                let mut file = fs::File::options().append(true).open(at.path("d/f"))?;
                std::io::Write::write_all(&mut file, b"new")?;
                file.sync_all()?;
                holds(at.path("d/f"), "oldnew")
            },
        ),
        row(
            "immutable_directory",
            "In a lower directory that is immutable nothing is made, renamed or removed, nor is it changed: EPERM.",
            tree,
            |at| {
                let _flag = Flag::set(at, "d", 'i')?;
                unchangeable(at)
            },
        ),
        row(
            "immutable_directory_kept",
            "It stays so when a file in it is written or its mode is changed, also after a remount.",
            tree,
            |at| {
                let _flag = Flag::set(at, "d", 'i')?;
                open_rw(at.path("d/f"))?.write_all_at(b"new", 0)?;
                fs::set_permissions(at.path("d/g"), Permissions::from_mode(0o600))?;
                for remounted in [false, true] {
                    if remounted {
                        at.remount()?;
                    }
                    unchangeable(at)?;
                }
                holds(at.path("d/f"), "new")
            },
        ),
    ];
    rows.into_iter().map(Row::unseen).collect()
}
