//! Hard links.

use std::fs::{self, File};
use std::os::unix::fs::{FileExt, MetadataExt, symlink};
use std::path::Path;

use nix::fcntl::{AT_FDCWD, AtFlags};

use crate::fill::Fill;
use crate::outcome::{Outcome, expect, fails};
use crate::place::Place;
use crate::row::{Row, row};
use crate::tools::{absent, holds, ino, nlink, open_rw};

/// One file with three names, one of them in another directory.
fn three(fill: &Fill) {
    fill.file("d/a", "old");
    fill.link("d/a", "d/b");
    fill.link("d/a", "e/c");
}

/// These are one file, of so many links.
fn one_file(at: &Place, names: &[&str], links: u64) -> Outcome {
    for name in names {
        expect(ino(at.path(name))? == ino(at.path(names[0]))?, "broken")?;
        expect(nlink(at.path(name))? == links, "wrong count")?;
        let (one, other) = (fs::read(at.path(name))?, fs::read(at.path(names[0]))?);
        expect(one == other, "broken")?;
    }
    Ok(())
}

fn write(path: impl AsRef<Path>, text: &str) -> Outcome {
    Ok(open_rw(path)?.write_all_at(text.as_bytes(), 0)?)
}

/// All rows of the chapter.
pub fn rows() -> Vec<Row> {
    vec![
        row(
            "survive_copy_up",
            "Hard links between lower files are links still when one was written.",
            three,
            |at| {
                write(at.path("d/a"), "new")?;
                one_file(at, &["d/a", "d/b", "e/c"], 3)?;
                holds(at.path("e/c"), "new")
            },
        ),
        row(
            "survive_change_of_mode",
            "They are when the mode of one was changed.",
            three,
            |at| {
                let perm = std::os::unix::fs::PermissionsExt::from_mode(0o640);
                fs::set_permissions(at.path("d/b"), perm)?;
                one_file(at, &["d/a", "d/b", "e/c"], 3)?;
                expect(crate::tools::mode(at.path("e/c"))? == 0o640, "broken")
            },
        ),
        row(
            "survive_remount",
            "They are after a remount, and a write through the third name reaches all.",
            three,
            |at| {
                write(at.path("d/a"), "new")?;
                at.remount()?;
                one_file(at, &["d/a", "d/b", "e/c"], 3)?;
                write(at.path("e/c"), "NEW")?;
                one_file(at, &["d/a", "d/b", "e/c"], 3)?;
                holds(at.path("d/a"), "NEW")
            },
        ),
        row(
            "survive_dropped_caches",
            "They are when the kernel has forgotten the names between two writes.",
            three,
            |at| {
                write(at.path("d/a"), "new")?;
                at.drop_caches();
                write(at.path("e/c"), "NEW")?;
                one_file(at, &["d/a", "d/b", "e/c"], 3)?;
                holds(at.path("d/b"), "NEW")
            },
        ),
        row(
            "survive_rename",
            "They are when names were renamed into other directories, also after a remount.",
            three,
            |at| {
                fs::rename(at.path("d/a"), at.path("e/a"))?;
                fs::rename(at.path("e/c"), at.path("c"))?;
                one_file(at, &["e/a", "d/b", "c"], 3)?;
                at.remount()?;
                write(at.path("d/b"), "new")?;
                one_file(at, &["e/a", "d/b", "c"], 3)?;
                holds(at.path("c"), "new")
            },
        ),
        row(
            "survive_rename_of_directory",
            "They are when a directory with one of the names was renamed.",
            three,
            |at| {
                fs::rename(at.path("e"), at.path("d/e"))?;
                write(at.path("d/a"), "new")?;
                one_file(at, &["d/a", "d/b", "d/e/c"], 3)?;
                at.remount()?;
                one_file(at, &["d/a", "d/b", "d/e/c"], 3)
            },
        ),
        row(
            "across_layers",
            "A link made in one layer to a file of the layer below is a link below a third layer.",
            |fill| fill.file("d/a", "old"),
            |at| {
                fs::create_dir(at.path("e"))?;
                fs::hard_link(at.path("d/a"), at.path("e/b"))?;
                at.stack()?;
                one_file(at, &["d/a", "e/b"], 2)?;
                write(at.path("e/b"), "new")?;
                one_file(at, &["d/a", "e/b"], 2)?;
                holds(at.path("d/a"), "new")
            },
        ),
        row(
            "across_layers_partly",
            "Links of a lower file, of which a layer in between has copied up one name, are links below a third.",
            three,
            |at| {
                write(at.path("d/a"), "new")?;
                at.stack()?;
                one_file(at, &["d/a", "d/b", "e/c"], 3)?;
                write(at.path("e/c"), "NEW")?;
                holds(at.path("d/a"), "NEW")
            },
        ),
        row(
            "count_after_unlink",
            "The count goes down with every name that is removed, also over a remount.",
            three,
            |at| {
                fs::remove_file(at.path("d/a"))?;
                one_file(at, &["d/b", "e/c"], 2)?;
                at.remount()?;
                one_file(at, &["d/b", "e/c"], 2)?;
                fs::remove_file(at.path("e/c"))?;
                one_file(at, &["d/b"], 1)?;
                at.remount()?;
                one_file(at, &["d/b"], 1)
            },
        ),
        row(
            "count_after_link",
            "A new name of a lower file counts, also over a remount.",
            three,
            |at| {
                fs::hard_link(at.path("d/b"), at.path("new"))?;
                one_file(at, &["d/a", "d/b", "e/c", "new"], 4)?;
                at.remount()?;
                one_file(at, &["d/a", "d/b", "e/c", "new"], 4)
            },
        ),
        row(
            "all_removed",
            "When all names are removed one of them made anew is a file of its own.",
            three,
            |at| {
                for name in ["d/a", "d/b", "e/c"] {
                    fs::remove_file(at.path(name))?;
                }
                fs::write(at.path("d/b"), "fresh")?;
                at.remount()?;
                absent(at.path("d/a"))?;
                absent(at.path("e/c"))?;
                holds(at.path("d/b"), "fresh")?;
                one_file(at, &["d/b"], 1)
            },
        ),
        row(
            "rename_of_two_names",
            "rename of one name over another of the same file does nothing.",
            three,
            |at| {
                fs::rename(at.path("d/a"), at.path("d/b"))?;
                one_file(at, &["d/a", "d/b", "e/c"], 3)
            },
        ),
        row(
            "open_descriptor_counts",
            "fstat of a descriptor follows the names that come and go, down to 0.",
            |fill| fill.file("f", ""),
            |at| {
                let file = File::open(at.path("f"))?;
                fs::hard_link(at.path("f"), at.path("g"))?;
                expect(file.metadata()?.nlink() == 2, "wrong count")?;
                fs::remove_file(at.path("f"))?;
                fs::remove_file(at.path("g"))?;
                expect(file.metadata()?.nlink() == 0, "wrong count")
            },
        ),
        row(
            "of_symlink",
            "A lower symbolic link gets a second name.",
            |fill| symlink("target", fill.path(0, "s")).unwrap(),
            |at| {
                fs::hard_link(at.path("s"), at.path("t"))?;
                expect(
                    fs::read_link(at.path("t"))? == Path::new("target"),
                    "wrong target",
                )?;
                expect(ino(at.path("s"))? == ino(at.path("t"))?, "broken")
            },
        ),
        row(
            "of_directory",
            "A link to a directory is EPERM.",
            |fill| fill.dir("d"),
            |at| fails(fs::hard_link(at.path("d"), at.path("e")), nix::Error::EPERM),
        ),
        row(
            "of_removed",
            "A removed file that is open gets no name again (ENOENT).",
            |fill| fill.file("f", ""),
            |at| {
                let file = File::open(at.path("f"))?;
                fs::remove_file(at.path("f"))?;
                let path = format!("/proc/self/fd/{}", std::os::fd::AsRawFd::as_raw_fd(&file));
                let follow = AtFlags::AT_SYMLINK_FOLLOW;
                let path = Path::new(&path);
                let linked = nix::unistd::linkat(AT_FDCWD, path, AT_FDCWD, &at.path("g"), follow);
                fails(linked, nix::Error::ENOENT)
            },
        ),
        row(
            "over_existing",
            "A link to a name that a lower layer has is EEXIST.",
            |fill| {
                fill.file("f", "");
                fill.file_in(1, "g", "");
            },
            |at| {
                fails(
                    fs::hard_link(at.path("f"), at.path("g")),
                    nix::Error::EEXIST,
                )
            },
        ),
    ]
}
