//! Directories: renamed, removed, made anew; what remains of it after a remount and below more layers.

use std::fs::{self, File};
use std::os::unix::fs::FileExt;

use nix::fcntl::RenameFlags;

use crate::fill::Fill;
use crate::outcome::{Outcome, expect, fails};
use crate::place::Place;
use crate::row::{Row, nothing, row};
use crate::tools::{absent, exchange, holds, lists, nlink, open_rw, rename_with};

/// `lower` is of one layer, `merged` of two, with inner directories in both.
fn tree(fill: &Fill) {
    fill.file("lower/f", "lower");
    fill.file("lower/inner/g", "lower");
    fill.file("merged/top", "top");
    fill.file("merged/both", "top");
    fill.file_in(1, "merged/both", "below");
    fill.file_in(1, "merged/below", "below");
    fill.file_in(1, "merged/inner/g", "below");
}

fn merged_is_at(at: &Place, path: &str) -> Outcome {
    lists(at.path(path), &["below", "both", "inner", "top"])?;
    holds(at.path(path).join("both"), "top")?;
    holds(at.path(path).join("inner/g"), "below")
}

fn remounted(at: &Place, check: fn(&Place) -> Outcome) -> Outcome {
    check(at)?;
    at.remount()?;
    check(at)?;
    at.stack()?;
    check(at)
}

/// A directory with all of its lower names removed.
fn emptied(at: &Place, dir: &str) -> Outcome {
    for entry in fs::read_dir(at.path(dir))? {
        let entry = entry?;
        if entry.file_type()?.is_dir() {
            fs::remove_dir_all(entry.path())?;
        } else {
            fs::remove_file(entry.path())?;
        }
    }
    lists(at.path(dir), &[])
}

/// All rows of the chapter.
pub fn rows() -> Vec<Row> {
    let mut rows = renames();
    rows.extend(removals());
    rows.extend(counts());
    rows
}

fn renames() -> Vec<Row> {
    vec![
        row(
            "rename_lower",
            "rename of a lower directory takes everything along, also after a remount and below more layers.",
            tree,
            |at| {
                fs::rename(at.path("lower"), at.path("new"))?;
                remounted(at, |at| {
                    absent(at.path("lower"))?;
                    lists(at.path("new"), &["f", "inner"])?;
                    holds(at.path("new/inner/g"), "lower")
                })
            },
        ),
        row(
            "rename_merged",
            "The same of a directory that several layers merge.",
            tree,
            |at| {
                fs::rename(at.path("merged"), at.path("new"))?;
                remounted(at, |at| {
                    absent(at.path("merged"))?;
                    merged_is_at(at, "new")
                })
            },
        ),
        row(
            "rename_changed",
            "The same of one that was changed before: files made, written and removed in it.",
            tree,
            |at| {
                fs::write(at.path("merged/made"), "made")?;
                fs::remove_file(at.path("merged/below"))?;
                open_rw(at.path("merged/top"))?.write_all_at(b"TOP", 0)?;
                fs::rename(at.path("merged"), at.path("new"))?;
                remounted(at, |at| {
                    lists(at.path("new"), &["both", "inner", "made", "top"])?;
                    holds(at.path("new/top"), "TOP")
                })
            },
        ),
        row(
            "rename_open",
            "What is open in a renamed directory stays open and is reached by the new name.",
            tree,
            |at| {
                let file = open_rw(at.path("merged/below"))?;
                let dir = File::open(at.path("merged/inner"))?;
                fs::rename(at.path("merged"), at.path("new"))?;
                file.write_all_at(b"BELOW", 0)?;
                holds(at.path("new/below"), "BELOW")?;
                let inner = std::os::fd::AsRawFd::as_raw_fd(&dir);
                holds(format!("/proc/self/fd/{inner}/g"), "below")
            },
        ),
        row(
            "rename_again",
            "A directory renamed three times, once through another directory, is where it went last.",
            tree,
            |at| {
                fs::rename(at.path("merged"), at.path("one"))?;
                fs::rename(at.path("one"), at.path("lower/two"))?;
                at.remount()?;
                fs::rename(at.path("lower/two"), at.path("three"))?;
                remounted(at, |at| {
                    lists(at.path("lower"), &["f", "inner"])?;
                    merged_is_at(at, "three")
                })
            },
        ),
        row(
            "rename_back",
            "A directory renamed away and back is what it was.",
            tree,
            |at| {
                fs::rename(at.path("merged"), at.path("new"))?;
                fs::rename(at.path("new"), at.path("merged"))?;
                remounted(at, |at| {
                    absent(at.path("new"))?;
                    merged_is_at(at, "merged")
                })
            },
        ),
        row(
            "rename_into_each_other",
            "A lower directory moves into another one, which is renamed, and both move on.",
            tree,
            |at| {
                fs::rename(at.path("merged"), at.path("lower/inner/m"))?;
                fs::rename(at.path("lower"), at.path("merged"))?;
                fs::rename(at.path("merged/inner/m"), at.path("lower"))?;
                fs::rename(at.path("merged"), at.path("lower/inner/l"))?;
                remounted(at, |at| {
                    lists(at.root(), &["lower"])?;
                    merged_is_at(at, "lower")?;
                    holds(at.path("lower/inner/l/inner/g"), "lower")
                })
            },
        ),
        row(
            "rename_child_then_parent",
            "Renaming a lower directory's child and then itself keeps both.",
            tree,
            |at| {
                fs::rename(at.path("merged/inner"), at.path("merged/i2"))?;
                fs::rename(at.path("merged"), at.path("new"))?;
                fs::rename(at.path("new/i2"), at.path("new/i3"))?;
                remounted(at, |at| {
                    lists(at.path("new"), &["below", "both", "i3", "top"])?;
                    holds(at.path("new/i3/g"), "below")
                })
            },
        ),
        row(
            "rename_into_itself",
            "rename of a lower directory into itself is EINVAL.",
            tree,
            |at| {
                let result = fs::rename(at.path("merged"), at.path("merged/inner/x"));
                fails(result, nix::Error::EINVAL)
            },
        ),
        row(
            "exchange",
            "RENAME_EXCHANGE of two lower directories, one of them merged.",
            tree,
            |at| {
                exchange(&at.path("lower"), &at.path("merged"))?;
                remounted(at, |at| {
                    merged_is_at(at, "lower")?;
                    holds(at.path("merged/inner/g"), "lower")
                })
            },
        ),
        row(
            "exchange_of_files",
            "RENAME_EXCHANGE of two lower files, also after a remount, and of one with a file that was made.",
            |fill| {
                fill.file("d/f", "f");
                fill.file_in(1, "g", "g");
            },
            |at| {
                exchange(&at.path("d/f"), &at.path("g"))?;
                holds(at.path("d/f"), "g")?;
                at.remount()?;
                holds(at.path("d/f"), "g")?;
                holds(at.path("g"), "f")?;
                fs::write(at.path("made"), "made")?;
                exchange(&at.path("made"), &at.path("g"))?;
                at.remount()?;
                holds(at.path("made"), "f")?;
                holds(at.path("g"), "made")
            },
        ),
        row(
            "exchange_with_file",
            "RENAME_EXCHANGE of a lower directory and a lower file.",
            tree,
            |at| {
                exchange(&at.path("merged"), &at.path("lower/f"))?;
                remounted(at, |at| {
                    merged_is_at(at, "lower/f")?;
                    holds(at.path("merged"), "lower")
                })
            },
        ),
        row(
            "noreplace",
            "RENAME_NOREPLACE is EEXIST for a name that only a lower layer has.",
            tree,
            |at| {
                let noreplace = RenameFlags::RENAME_NOREPLACE;
                let result = rename_with(&at.path("lower/f"), &at.path("merged/below"), noreplace);
                fails(result, nix::Error::EEXIST)?;
                fs::remove_file(at.path("merged/below"))?;
                Ok(rename_with(
                    &at.path("lower/f"),
                    &at.path("merged/below"),
                    noreplace,
                )?)
            },
        ),
        row(
            "rename_over_emptied",
            "A directory is renamed over a lower one that was emptied, whose names stay away.",
            tree,
            |at| {
                emptied(at, "merged")?;
                fs::create_dir(at.path("new"))?;
                fs::write(at.path("new/f"), "new")?;
                fs::rename(at.path("new"), at.path("merged"))?;
                remounted(at, |at| {
                    absent(at.path("new"))?;
                    lists(at.path("merged"), &["f"])
                })
            },
        ),
        row(
            "rename_lower_over_emptied",
            "A lower directory is renamed over a lower one that was emptied.",
            tree,
            |at| {
                emptied(at, "lower")?;
                fs::rename(at.path("merged"), at.path("lower"))?;
                remounted(at, |at| {
                    absent(at.path("merged"))?;
                    merged_is_at(at, "lower")
                })
            },
        ),
        row(
            "rename_over_full",
            "rename over a directory in which a lower name is visible is ENOTEMPTY.",
            tree,
            |at| {
                fs::create_dir(at.path("new"))?;
                let result = fs::rename(at.path("new"), at.path("merged"));
                fails(result, nix::Error::ENOTEMPTY)
            },
        ),
        row(
            "old_name_anew",
            "A directory made under the old name of a renamed one is empty, also after a remount.",
            tree,
            |at| {
                fs::rename(at.path("merged"), at.path("new"))?;
                fs::create_dir(at.path("merged"))?;
                remounted(at, |at| {
                    lists(at.path("merged"), &[])?;
                    merged_is_at(at, "new")
                })
            },
        ),
    ]
}

fn removals() -> Vec<Row> {
    vec![
        row(
            "rmdir_full_of_whiteouts",
            "rmdir removes a directory of which every lower name was removed, for good.",
            tree,
            |at| {
                emptied(at, "merged")?;
                fs::remove_dir(at.path("merged"))?;
                remounted(at, |at| lists(at.root(), &["lower"]))
            },
        ),
        row(
            "rmdir_full",
            "rmdir is ENOTEMPTY while a lower name is visible.",
            tree,
            |at| {
                fs::remove_file(at.path("merged/top"))?;
                fails(fs::remove_dir(at.path("merged")), nix::Error::ENOTEMPTY)
            },
        ),
        row(
            "made_anew",
            "A lower directory removed and made again is empty, also after a remount.",
            tree,
            |at| {
                fs::remove_dir_all(at.path("merged"))?;
                fs::create_dir(at.path("merged"))?;
                remounted(at, |at| lists(at.path("merged"), &[]))
            },
        ),
        row(
            "replaced_by_file",
            "A lower directory gives way to a file, and that to a directory, with nothing of the old.",
            tree,
            |at| {
                fs::remove_dir_all(at.path("merged"))?;
                fs::write(at.path("merged"), "file")?;
                at.remount()?;
                holds(at.path("merged"), "file")?;
                fs::remove_file(at.path("merged"))?;
                fs::create_dir(at.path("merged"))?;
                remounted(at, |at| lists(at.path("merged"), &[]))
            },
        ),
        row(
            "removed_cwd",
            "In a working directory that was removed nothing can be made, and it lists nothing.",
            tree,
            |at| {
                std::env::set_current_dir(at.path("lower/inner"))?;
                fs::remove_dir_all(at.path("lower"))?;
                fails(File::create("f"), nix::Error::ENOENT)?;
                fails(fs::create_dir("d"), nix::Error::ENOENT)?;
                lists(".", &[])
            },
        ),
        row(
            "file_between",
            "Directories do not merge through a file in a layer between.",
            |fill| {
                fill.file("x/top", "");
                fill.file_in(1, "x", "file");
                fill.file_in(2, "x/bottom", "");
            },
            |at| lists(at.path("x"), &["top"]),
        ),
        row(
            "opaque",
            "An opaque lower directory hides the layers below it.",
            |fill| {
                fill.opaque(0, "x");
                fill.file("x/top", "");
                fill.file_in(1, "x/bottom", "");
            },
            |at| lists(at.path("x"), &["top"]),
        ),
    ]
}

fn counts() -> Vec<Row> {
    fn three(fill: &Fill) {
        for name in ["a", "b", "c"] {
            fill.dir(&format!("lower/{name}"));
            fill.dir_in(1, &format!("merged/{name}"));
        }
        fill.dir("merged/a");
        fill.dir("merged/top");
        fill.file("merged/file", "");
    }
    vec![
        row(
            "links_of_lower",
            "st_nlink of a lower directory is 2 and its subdirectories.",
            three,
            |at| expect(nlink(at.path("lower"))? == 5, "not counted"),
        ),
        row(
            "links_of_merged",
            "st_nlink of a merged directory is 2 and its visible subdirectories.",
            three,
            |at| {
                expect(nlink(at.path("merged"))? == 6, "not counted")?;
                expect(nlink(at.root())? == 4, "not counted")
            },
        ),
        row(
            "links_after_changes",
            "It follows mkdir, rmdir of a lower directory and rename, and stays so over a remount.",
            three,
            |at| {
                fs::create_dir(at.path("lower/new"))?;
                expect(nlink(at.path("lower"))? == 6, "not counted")?;
                fs::remove_dir(at.path("lower/a"))?;
                fs::remove_dir(at.path("merged/a"))?;
                expect(nlink(at.path("lower"))? == 5, "not counted")?;
                expect(nlink(at.path("merged"))? == 5, "not counted")?;
                fs::write(at.path("merged/made"), "")?;
                fs::rename(at.path("merged/b"), at.path("lower/moved"))?;
                let check = |at: &Place| {
                    expect(nlink(at.path("lower"))? == 6, "not counted")?;
                    expect(nlink(at.path("merged"))? == 4, "not counted")
                };
                check(at)?;
                exchange(&at.path("merged/file"), &at.path("lower/moved"))?;
                expect(nlink(at.path("lower"))? == 5, "not counted")?;
                expect(nlink(at.path("merged"))? == 5, "not counted")?;
                exchange(&at.path("merged/file"), &at.path("lower/moved"))?;
                check(at)?;
                at.remount()?;
                check(at)
            },
        ),
        row(
            "links_of_made",
            "st_nlink of a directory made through the mount is counted.",
            nothing,
            |at| {
                fs::create_dir_all(at.path("d/e/f"))?;
                fs::create_dir(at.path("d/g"))?;
                expect(nlink(at.path("d"))? == 4, "not counted")
            },
        ),
        row(
            "links_of_removed",
            "st_nlink of an open directory that was removed is 0.",
            three,
            |at| {
                let dir = File::open(at.path("lower/a"))?;
                fs::remove_dir(at.path("lower/a"))?;
                let links = std::os::unix::fs::MetadataExt::nlink(&dir.metadata()?);
                expect(links == 0, "not 0")
            },
        ),
    ]
}
