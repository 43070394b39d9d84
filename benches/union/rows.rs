//! The jobs that are timed. Each answers the seconds that the job itself took, without its preparation.

use std::fs::{self, File, OpenOptions};
use std::io::{Read, Write};
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Instant;

use super::common::{drop_caches, sh};
use super::systems::{Image, Mount};

type Job = fn(&Mount, &Image) -> Result<f64, String>;

/// One line of the table.
pub struct Row {
    pub name: &'static str,
    pub run: Job,
}

const fn row(name: &'static str, run: Job) -> Row {
    Row { name, run }
}

const LARGE: &str = "srv/app/data/large";

/// All lines, in the table's order.
pub const ROWS: &[Row] = &[
    row("walk, cold", |m, _| cold(|| walk(&m.root()).map(drop))),
    row("walk, warm", |m, _| warm(|| walk(&m.root()).map(drop))),
    row("stat of known names", stat_known),
    row("stat of missing names", stat_missing),
    row("read all files, cold", |m, _| cold(|| read_all(&m.root()))),
    row("read all files, warm", |m, _| warm(|| read_all(&m.root()))),
    row("create 5,000 files", |m, _| small_files(m, Step::Create)),
    row("rename 5,000 files", |m, _| small_files(m, Step::Rename)),
    row("unlink 5,000 files", |m, _| small_files(m, Step::Unlink)),
    row("untar 7,500 entries", untar),
    row("rm -rf of a lower tree", |m, _| {
        timed(|| {
            command(
                Command::new("rm")
                    .arg("-rf")
                    .arg(m.root().join("usr/share")),
            )
        })
    }),
    row("chmod -R of a lower tree", |m, _| {
        let tree = m.root().join("usr/lib/python3.11");
        timed(|| command(Command::new("chmod").args(["-R", "g+w"]).arg(&tree)))
    }),
    row("python imports, cold", |m, _| cold(|| python(&m.root(), 1))),
    row("python imports, warm", |m, _| warm(|| python(&m.root(), 5))),
    row("sequential read 64 MiB, cold", |m, _| {
        cold(|| read_file(&m.root().join(LARGE)))
    }),
    row("sequential read 64 MiB, warm", |m, _| {
        warm(|| read_file(&m.root().join(LARGE)))
    }),
    row("sequential write 256 MiB", |m, _| {
        timed(|| write_file(&m.root().join("srv/new"), 256))
    }),
    row("random read 4 KiB, 5,000 times", random_read),
    row("random write 4 KiB, 20,000 times", random_write),
    row("copy-up of 64 MiB", |m, _| {
        timed(|| append(&m.root().join(LARGE)))
    }),
    row("SQLite, 200 transactions", sqlite),
];

fn err(path: &Path) -> impl Fn(std::io::Error) -> String + '_ {
    move |e| format!("{}: {e}", path.display())
}

fn timed(job: impl FnOnce() -> Result<(), String>) -> Result<f64, String> {
    let start = Instant::now();
    job()?;
    Ok(start.elapsed().as_secs_f64())
}

fn cold(job: impl FnOnce() -> Result<(), String>) -> Result<f64, String> {
    drop_caches()?;
    timed(job)
}

fn warm(job: impl Fn() -> Result<(), String>) -> Result<f64, String> {
    job()?;
    timed(job)
}

fn command(c: &mut Command) -> Result<(), String> {
    sh(c).map(drop)
}

/// Every file, directory and link below `dir`, each lstat'ed.
fn walk(dir: &Path) -> Result<Vec<(PathBuf, fs::Metadata)>, String> {
    let mut found = Vec::new();
    let mut todo = vec![dir.to_path_buf()];
    while let Some(d) = todo.pop() {
        for entry in fs::read_dir(&d).map_err(err(&d))? {
            let path = entry.map_err(err(&d))?.path();
            let meta = fs::symlink_metadata(&path).map_err(err(&path))?;
            if meta.is_dir() {
                todo.push(path.clone());
            }
            found.push((path, meta));
        }
    }
    Ok(found)
}

fn stat_known(m: &Mount, _: &Image) -> Result<f64, String> {
    let paths: Vec<PathBuf> = walk(&m.root())?.into_iter().map(|e| e.0).collect();
    timed(|| {
        for _ in 0..3 {
            for p in &paths {
                fs::symlink_metadata(p).map_err(err(p))?;
            }
        }
        Ok(())
    })
}

/// What an interpreter does that looks for a module along its path: the same few missing names in every
/// directory, again and again.
fn stat_missing(m: &Mount, _: &Image) -> Result<f64, String> {
    let dirs: Vec<PathBuf> = walk(&m.root())?
        .into_iter()
        .filter(|e| e.1.is_dir())
        .map(|e| e.0)
        .collect();
    timed(|| {
        for _ in 0..3 {
            for d in &dirs {
                for name in ["missing.py", "missing.so", "missing.abi3.so", ".missing"] {
                    if fs::symlink_metadata(d.join(name)).is_ok() {
                        return Err(format!("{name} exists in {}", d.display()));
                    }
                }
            }
        }
        Ok(())
    })
}

fn read_file(path: &Path) -> Result<(), String> {
    let mut file = File::open(path).map_err(err(path))?;
    let mut buf = vec![0; 1 << 20];
    while file.read(&mut buf).map_err(err(path))? > 0 {}
    Ok(())
}

fn read_all(dir: &Path) -> Result<(), String> {
    for (path, meta) in walk(&dir.join("usr"))? {
        if meta.is_file() {
            read_file(&path)?;
        }
    }
    Ok(())
}

#[derive(Clone, Copy, PartialEq)]
enum Step {
    Create,
    Rename,
    Unlink,
}

fn small_files(m: &Mount, measured: Step) -> Result<f64, String> {
    let dir = m.root().join("srv/small");
    fs::create_dir(&dir).map_err(err(&dir))?;
    for step in [Step::Create, Step::Rename, Step::Unlink] {
        let seconds = timed(|| {
            for i in 0..5000 {
                let (old, new) = (dir.join(format!("f{i}")), dir.join(format!("g{i}")));
                match step {
                    Step::Create => fs::write(&old, [b'x'; 1024]).map_err(err(&old))?,
                    Step::Rename => fs::rename(&old, &new).map_err(err(&old))?,
                    Step::Unlink => fs::remove_file(&new).map_err(err(&new))?,
                }
            }
            Ok(())
        })?;
        if step == measured {
            return Ok(seconds);
        }
    }
    Err("no such step".into())
}

fn untar(m: &Mount, image: &Image) -> Result<f64, String> {
    let dir = m.root().join("srv/untar");
    fs::create_dir(&dir).map_err(err(&dir))?;
    let mut tar = Command::new("tar");
    tar.arg("-C").arg(&dir).arg("-xf").arg(image.tar());
    timed(|| command(&mut tar))
}

const IMPORTS: &str = "import json, asyncio, email, http.client, sqlite3, xml.dom, unittest, decimal, ssl, ctypes, multiprocessing";

/// Starts Python `times` times in a chroot of the mount.
pub fn python(root: &Path, times: usize) -> Result<(), String> {
    for _ in 0..times {
        command(
            Command::new("chroot")
                .arg(root)
                .args(["python3", "-c", IMPORTS]),
        )?;
    }
    Ok(())
}

fn write_file(path: &Path, mib: usize) -> Result<(), String> {
    let mut file = File::create(path).map_err(err(path))?;
    let buf = vec![0x5a; 1 << 20];
    for _ in 0..mib {
        file.write_all(&buf).map_err(err(path))?;
    }
    Ok(())
}

fn append(path: &Path) -> Result<(), String> {
    let mut file = OpenOptions::new()
        .append(true)
        .open(path)
        .map_err(err(path))?;
    file.write_all(b"x").map_err(err(path))
}

/// Offsets that are random but the same for every system.
fn offsets(count: usize, blocks: u64) -> impl Iterator<Item = u64> {
    let mut x = 0x9e37_79b9_7f4a_7c15_u64;
    (0..count).map(move |_| {
        x ^= x << 13;
        x ^= x >> 7;
        x ^= x << 17;
        (x % blocks) * 4096
    })
}

fn random_read(m: &Mount, _: &Image) -> Result<f64, String> {
    let path = m.root().join(LARGE);
    drop_caches()?;
    let file = File::open(&path).map_err(err(&path))?;
    let mut buf = [0; 4096];
    timed(|| {
        for at in offsets(5000, 16384) {
            file.read_exact_at(&mut buf, at).map_err(err(&path))?;
        }
        Ok(())
    })
}

fn random_write(m: &Mount, _: &Image) -> Result<f64, String> {
    let path = m.root().join("srv/random");
    write_file(&path, 64)?;
    let file = OpenOptions::new()
        .write(true)
        .open(&path)
        .map_err(err(&path))?;
    timed(|| {
        for at in offsets(20_000, 16384) {
            file.write_all_at(&[7; 4096], at).map_err(err(&path))?;
        }
        drop(file);
        Ok(())
    })
}

fn sqlite(m: &Mount, _: &Image) -> Result<f64, String> {
    let db = m.root().join("srv/db.sqlite");
    let mut sql = String::from("CREATE TABLE t(a INTEGER PRIMARY KEY, b TEXT);\n");
    for i in 0..200 {
        sql.push_str(&format!(
            "INSERT INTO t VALUES({i}, hex(randomblob(100)));\n"
        ));
    }
    timed(|| command(Command::new("sqlite3").arg(&db).arg(&sql)))
}
