//! Reading directories, also while they change.

use std::collections::{HashMap, HashSet};
use std::ffi::OsString;
use std::fs::{self, File};
use std::mem::MaybeUninit;
use std::os::unix::ffi::{OsStrExt, OsStringExt};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;

use rustix::fs::{RawDir, SeekFrom, seek};

use crate::fill::Fill;
use crate::outcome::{Outcome, Said, expect};
use crate::place::Place;
use crate::row::{Row, row};
use crate::tools::{ino, lists, names};

/// 600 names, half of each layer.
fn many(fill: &Fill) {
    for n in 0..300 {
        fill.file(&format!("d/top{n}"), "");
        fill.file_in(1, &format!("d/below{n}"), "");
    }
}

/// Links of a hundred files: no file system allows 100,000 of one.
fn hundred_thousand(fill: &Fill) {
    for n in 0..100_000 {
        let first = n % 100;
        if n == first {
            fill.file(&format!("d/{n}"), "");
        } else {
            fill.link(&format!("d/{first}"), &format!("d/{n}"));
        }
    }
}

/// Entries as getdents64 hands them out, with the offset after each.
fn entries(dir: &File, limit: usize) -> Result<Vec<(OsString, u64)>, Said> {
    let mut buffer = [MaybeUninit::uninit(); 512];
    let mut entries = Vec::new();
    let mut raw = RawDir::new(dir, &mut buffer);
    while let Some(entry) = raw.next() {
        let entry = entry?;
        let name = OsString::from_vec(entry.file_name().to_bytes().to_vec());
        entries.push((name, entry.next_entry_cookie()));
        if entries.len() == limit {
            break;
        }
    }
    Ok(entries)
}

/// The number of `..` in the listing of a directory.
fn dot_dot(dir: &Path) -> Result<u64, Said> {
    let dir = File::open(dir)?;
    let mut buffer = [MaybeUninit::uninit(); 512];
    let mut raw = RawDir::new(&dir, &mut buffer);
    let mut number = None;
    // To the end, or the kernel keeps nothing.
    while let Some(entry) = raw.next() {
        let entry = entry?;
        if entry.file_name().to_bytes() == b".." {
            number = Some(entry.ino());
        }
    }
    number.ok_or_else(|| Said("missing".to_owned()))
}

/// Reads while others make and remove names: what was there all along is seen exactly once.
fn read_while_changing(at: &Place, kept: usize) -> Outcome {
    let dir = at.path("d");
    let done = AtomicBool::new(false);
    let seen = thread::scope(|scope| {
        for worker in 0..2 {
            let (dir, done) = (&dir, &done);
            scope.spawn(move || {
                let mut n = 0;
                while !done.load(Ordering::Relaxed) {
                    let name = dir.join(format!("made{worker}-{n}"));
                    fs::write(&name, "").unwrap();
                    if n % 2 == 0 {
                        fs::remove_file(&name).unwrap();
                    }
                    n += 1;
                }
            });
        }
        let read = || -> Result<HashMap<OsString, usize>, Said> {
            let mut seen = HashMap::new();
            for entry in fs::read_dir(&dir)? {
                *seen.entry(entry?.file_name()).or_default() += 1;
            }
            Ok(seen)
        };
        let seen = read();
        done.store(true, Ordering::Relaxed);
        seen
    })?;
    expect(seen.values().all(|count| *count == 1), "repeats")?;
    let old = |name: &&OsString| !name.as_bytes().starts_with(b"made");
    expect(seen.keys().filter(old).count() == kept, "loses")
}

/// All rows of the chapter.
pub fn rows() -> Vec<Row> {
    vec![
        row(
            "merge",
            "A listing shows every visible name once, without those that were removed.",
            |fill| {
                many(fill);
                fill.file_in(1, "d/top7", "hidden");
                fill.whiteout(0, "d/below9");
            },
            |at| {
                fs::remove_file(at.path("d/below10"))?;
                fs::write(at.path("d/new"), "")?;
                let names = names(at.path("d"))?;
                let distinct: HashSet<_> = names.iter().collect();
                expect(distinct.len() == names.len(), "repeats")?;
                expect(names.len() == 599, "wrong listing")
            },
        ),
        row(
            "dots",
            "`.` and `..` come once each, with the numbers of the directories.",
            |fill| fill.dir("d/e"),
            |at| {
                let dir = File::open(at.path("d/e"))?;
                let all = entries(&dir, usize::MAX)?;
                let names: Vec<&OsString> = all.iter().map(|(name, _)| name).collect();
                expect(names == [".", ".."] || names == ["..", "."], "missing")?;
                let up = fs::metadata(at.path("d/e/.."))?;
                let parent = fs::metadata(at.path("d"))?;
                let number = std::os::unix::fs::MetadataExt::ino;
                expect(number(&up) == number(&parent), "wrong parent")
            },
        ),
        row(
            "dots_after_rename",
            "After a directory has moved to another one `..` has the number of that, also where it was listed before.",
            |fill| {
                fill.dir("a/x");
                fill.dir("b");
            },
            |at| {
                fs::create_dir(at.path("a/made"))?;
                for name in ["x", "made"] {
                    let (from, to) = (at.path("a").join(name), at.path("b").join(name));
                    // The kernel keeps what is listed more than once.
                    for _ in 0..3 {
                        expect(dot_dot(&from)? == ino(at.path("a"))?, "wrong parent")?;
                    }
                    fs::rename(from, &to)?;
                    for _ in 0..3 {
                        expect(dot_dot(&to)? == ino(at.path("b"))?, "old parent")?;
                    }
                }
                Ok(())
            },
        ),
        row(
            "unlink_while_reading",
            "Every name is seen when each is removed as it is read.",
            many,
            |at| {
                let mut count = 0;
                for entry in fs::read_dir(at.path("d"))? {
                    fs::remove_file(entry?.path())?;
                    count += 1;
                }
                expect(count == 600, "loses")?;
                fs::remove_dir(at.path("d"))?;
                lists(at.root(), &[])
            },
        ),
        row(
            "changing",
            "While others make and remove names, those that were there all along are seen once.",
            many,
            |at| read_while_changing(at, 600),
        ),
        row(
            "changing_100_000",
            "The same in a directory of 100,000 names.",
            hundred_thousand,
            |at| read_while_changing(at, 100_000),
        )
        .plyfs_alone(),
        row(
            "seek",
            "Every offset that was handed out leads back to the name that followed it.",
            many,
            |at| {
                let dir = File::open(at.path("d"))?;
                let all = entries(&dir, usize::MAX)?;
                for n in (0..all.len() - 1).rev().step_by(37) {
                    seek(&dir, SeekFrom::Start(all[n].1))?;
                    expect(entries(&dir, 1)?[0].0 == all[n + 1].0, "elsewhere")?;
                }
                Ok(())
            },
        ),
        row(
            "seek_while_changing",
            "Also after other names were removed.",
            many,
            |at| {
                let dir = File::open(at.path("d"))?;
                let all = entries(&dir, usize::MAX)?;
                let half = all.len() / 2;
                for (name, _) in &all[..half] {
                    if name != "." && name != ".." {
                        fs::remove_file(at.path("d").join(name))?;
                    }
                }
                seek(&dir, SeekFrom::Start(all[half].1))?;
                let rest: Vec<OsString> = entries(&dir, usize::MAX)?
                    .into_iter()
                    .map(|(name, _)| name)
                    .collect();
                let wanted: Vec<OsString> = all[half + 1..]
                    .iter()
                    .map(|(name, _)| name.clone())
                    .collect();
                expect(rest == wanted, "loses")
            },
        ),
        row(
            "rewind",
            "A stream that is rewound shows what was made and removed since.",
            many,
            |at| {
                let dir = File::open(at.path("d"))?;
                entries(&dir, usize::MAX)?;
                fs::write(at.path("d/new"), "")?;
                fs::remove_file(at.path("d/top0"))?;
                fs::remove_file(at.path("d/below0"))?;
                seek(&dir, SeekFrom::Start(0))?;
                let now: HashSet<OsString> = entries(&dir, usize::MAX)?
                    .into_iter()
                    .map(|(name, _)| name)
                    .collect();
                expect(now.contains(&OsString::from("new")), "stale")?;
                expect(now.len() == 2 + 599, "stale")
            },
        ),
        row(
            "types",
            "The type in a listing is that of the topmost layer, after a replacement too.",
            |fill| {
                fill.dir_in(1, "x");
                fill.file("x", "");
                fill.file("y", "");
            },
            |at| {
                fs::remove_file(at.path("y"))?;
                fs::create_dir(at.path("y"))?;
                let kinds: HashMap<PathBuf, bool> = fs::read_dir(at.root())?
                    .map(|entry| {
                        let entry = entry?;
                        Ok((entry.file_name().into(), entry.file_type()?.is_dir()))
                    })
                    .collect::<Result<_, std::io::Error>>()?;
                let wanted = [("x".into(), false), ("y".into(), true)];
                expect(kinds == HashMap::from(wanted), "wrong type")
            },
        ),
        row(
            "removed",
            "A stream of a directory that was removed shows nothing any more; it ends or is ENOENT.",
            |fill| fill.file("d/f", ""),
            |at| {
                let dir = File::open(at.path("d"))?;
                fs::remove_dir_all(at.path("d"))?;
                match entries(&dir, usize::MAX) {
                    Ok(left) => expect(left.len() <= 2, "stale"),
                    Err(said) if said == nix::Error::ENOENT.into() => Ok(()),
                    Err(said) => Err(said),
                }
            },
        ),
    ]
}
