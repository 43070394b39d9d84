//! Limits: many layers, many files, few descriptors, memory that is given back.

use std::fs::{self, File};
use std::os::unix::fs::FileExt;
use std::time::{Duration, Instant};

use nix::sys::resource::{Resource, getrlimit, setrlimit};

use crate::fill::Fill;
use crate::outcome::{Outcome, Said, expect};
use crate::place::Place;
use crate::row::{Row, row};
use crate::tools::{holds, names, open_rw};

const DESCRIPTORS: u64 = 1024;

/// Names of one file.
const NAMES: usize = 16_000;

/// How long the server may take to give memory back; nothing is measured by it.
const DEADLINE: Duration = Duration::from_secs(60);

/// Files of the memory row.
fn many_files() -> usize {
    if crate::run::full() {
        1_000_000
    } else {
        50_000
    }
}

fn many(fill: &Fill) {
    for n in 0..1500 {
        fill.file(&format!("f{}/{n}", n % 10), format!("{n}"));
        fill.dir(&format!("d{}/{n}", n % 10));
    }
}

/// Mounts again with a server that may open 1024 files; this process may open more.
fn with_few_descriptors(at: &Place) -> Outcome {
    let (_, hard) = getrlimit(Resource::RLIMIT_NOFILE)?;
    setrlimit(Resource::RLIMIT_NOFILE, hard, hard)?;
    at.limit_descriptors(DESCRIPTORS);
    at.remount()
}

fn descriptors(at: &Place) -> Result<usize, Said> {
    let server = at.server().ok_or_else(|| Said("no server".to_owned()))?;
    Ok(fs::read_dir(format!("/proc/{server}/fd"))?.count())
}

/// KiB that belong to the server alone.
fn private_memory(at: &Place) -> Result<u64, Said> {
    let server = at.server().ok_or_else(|| Said("no server".to_owned()))?;
    let text = fs::read_to_string(format!("/proc/{server}/smaps_rollup"))?;
    let of = |line: &str| line.split_whitespace().nth(1)?.parse::<u64>().ok();
    Ok(text
        .lines()
        .filter(|line| line.starts_with("Private_"))
        .filter_map(of)
        .sum())
}

/// Ticks that the server has run, in user space and in the kernel, which do not depend on what else runs.
fn processor_time(at: &Place) -> Result<u64, Said> {
    let server = at.server().ok_or_else(|| Said("no server".to_owned()))?;
    let text = fs::read_to_string(format!("/proc/{server}/stat"))?;
    // proc_pid_stat(5): what follows the name in parentheses begins with the third field; 14 and 15 are wanted.
    let (_, fields) = text.rsplit_once(") ").unwrap_or_default();
    let times = fields.split(' ').skip(11).take(2);
    Ok(times.filter_map(|time| time.parse::<u64>().ok()).sum())
}

/// All rows of the chapter.
pub fn rows() -> Vec<Row> {
    vec![
        row(
            "lowers_500",
            "500 lower directories merge; the bottom one is reached and written.",
            |fill| {
                for n in 0..500 {
                    fill.file_in(n, &format!("d/f{n}"), format!("{n}"));
                    fill.file_in(n, "d/same", format!("{n}"));
                }
            },
            |at| {
                holds(at.path("d/f499"), "499")?;
                holds(at.path("d/same"), "0")?;
                expect(names(at.path("d"))?.len() == 501, "wrong listing")?;
                fs::write(at.path("d/f499"), "new")?;
                fs::remove_file(at.path("d/f498"))?;
                fs::rename(at.path("d"), at.path("e"))?;
                at.remount()?;
                holds(at.path("e/f499"), "new")?;
                expect(names(at.path("e"))?.len() == 500, "wrong listing")
            },
        ),
        row(
            "descriptors_of_open_files",
            "With 1024 descriptors the server keeps 1500 lower files open for writing.",
            many,
            |at| {
                with_few_descriptors(at)?;
                let mut files = Vec::new();
                for n in 0..1500 {
                    files.push(open_rw(at.path(format!("f{}/{n}", n % 10)))?);
                }
                for (n, file) in files.iter().enumerate() {
                    file.write_all_at(b"new", 10)?;
                    let mut text = vec![0; n.to_string().len()];
                    file.read_exact_at(&mut text, 0)?;
                    expect(text == n.to_string().as_bytes(), "wrong content")?;
                }
                expect(descriptors(at)? < 1024, "too many")
            },
        )
        .plyfs_alone(),
        row(
            "descriptors_of_removed_files",
            "The same of 1500 lower files that were removed, some written before, some after.",
            many,
            |at| {
                with_few_descriptors(at)?;
                let mut files = Vec::new();
                for n in 0..1500 {
                    let path = at.path(format!("f{}/{n}", n % 10));
                    let file = if n % 3 == 0 { File::open(&path)? } else { open_rw(&path)? };
                    fs::remove_file(&path)?;
                    files.push((file, n));
                }
                for (file, n) in &files {
                    let again = format!("/proc/self/fd/{}", std::os::fd::AsRawFd::as_raw_fd(file));
                    open_rw(again)?.write_all_at(b"new", 10)?;
                    let mut text = vec![0; n.to_string().len()];
                    file.read_exact_at(&mut text, 0)?;
                    expect(text == n.to_string().as_bytes(), "wrong content")?;
                }
                expect(descriptors(at)? < 1024, "too many")
            },
        )
        .plyfs_alone(),
        row(
            "descriptors_of_removed_directories",
            "The same of 3000 directories, half of them lower ones, that were removed while open.",
            many,
            |at| {
                with_few_descriptors(at)?;
                let mut dirs = Vec::new();
                for n in 0..3000 {
                    let path = if n < 1500 {
                        at.path(format!("d{}/{n}", n % 10))
                    } else {
                        at.path(format!("d{}/made{n}", n % 10))
                    };
                    if n >= 1500 {
                        fs::create_dir(&path)?;
                    } else if n % 2 == 0 {
                        // Copied up first, so that there is an upper directory to keep.
                        let open = std::os::unix::fs::PermissionsExt::from_mode(0o700);
                        fs::set_permissions(&path, open)?;
                    }
                    let dir = File::open(&path)?;
                    fs::remove_dir(&path)?;
                    dirs.push(dir);
                }
                for dir in &dirs {
                    expect(std::os::unix::fs::MetadataExt::nlink(&dir.metadata()?) == 0, "has a name")?;
                    let path = format!("/proc/self/fd/{}", std::os::fd::AsRawFd::as_raw_fd(dir));
                    expect(names(path)?.is_empty(), "wrong listing")?;
                }
                expect(descriptors(at)? < 1024, "too many")?;
                drop(dirs);
                fs::create_dir(at.path("after"))?;
                at.remount()?;
                expect(names(at.path("d0"))?.is_empty(), "left behind")
            },
        )
        .plyfs_alone(),
        row(
            "descriptors_of_directories",
            "The same of a tree of 3000 directories that are all open.",
            many,
            |at| {
                with_few_descriptors(at)?;
                let mut dirs = Vec::new();
                for n in 0..1500 {
                    dirs.push(File::open(at.path(format!("d{}/{n}", n % 10)))?);
                    fs::create_dir(at.path(format!("d{}/{n}/made", n % 10)))?;
                    dirs.push(File::open(at.path(format!("d{}/{n}/made", n % 10)))?);
                }
                for n in 0..1500 {
                    fs::write(at.path(format!("d{}/{n}/made/f", n % 10)), "")?;
                }
                expect(descriptors(at)? < 1024, "too many")
            },
        )
        .plyfs_alone(),
        row(
            "names_of_one_file",
            "A directory of 16,000 names of one file is listed with its attributes, and names in it removed, about as fast as one of as many files.",
            |fill| {
                fill.on_tmpfs();
                fill.file("one/f", "");
                fill.dir("many");
                for n in 0..NAMES {
                    fill.link("one/f", &format!("one/{n}"));
                    File::create(fill.path(0, &format!("many/{n}"))).unwrap();
                }
            },
            |at| {
                let time = |dir: &str| -> Result<u64, Said> {
                    let start = processor_time(at)?;
                    for entry in fs::read_dir(at.path(dir))? {
                        fs::symlink_metadata(entry?.path())?;
                    }
                    for n in 0..NAMES / 16 {
                        fs::remove_file(at.path(format!("{dir}/{n}")))?;
                    }
                    Ok(processor_time(at)? - start)
                };
                let (many, one) = (time("many")?, time("one")?);
                // It is 10 times where each name is compared with all others.
                match one < 5 * many {
                    true => Ok(()),
                    false => Err(Said(format!("{one} ticks instead of {many}"))),
                }
            },
        )
        .unseen()
        .plyfs_alone(),
        row(
            "memory",
            "After 50,000 files (a million in `make test-full`) were looked at and forgotten, the server's memory is near what it was.",
            |fill| {
                fill.on_tmpfs();
                for n in 0..many_files() {
                    let dir = fill.lower(0).join(format!("d{}", n / 1000));
                    if n % 1000 == 0 {
                        fs::create_dir(&dir).unwrap();
                    }
                    File::create(dir.join(n.to_string())).unwrap();
                }
            },
            |at| {
                let look = || -> Outcome {
                    for dir in fs::read_dir(at.root())? {
                        for entry in fs::read_dir(dir?.path())? {
                            fs::symlink_metadata(entry?.path())?;
                        }
                    }
                    Ok(())
                };
                let before = private_memory(at)?;
                look()?;
                let full = private_memory(at)?;
                let start = Instant::now();
                loop {
                    at.drop_caches();
                    let now = private_memory(at)?;
                    // A quarter of what was taken, beside what the allocator keeps for itself.
                    if now < before + (full - before) / 4 + 4096 {
                        return Ok(());
                    }
                    if start.elapsed() > DEADLINE {
                        eprintln!("KiB before {before}, full {full}, forgotten {now}");
                        return Err(Said("kept".to_owned()));
                    }
                    std::thread::sleep(Duration::from_millis(50));
                }
            },
        )
        .unseen()
        .plyfs_alone(),
    ]
}
