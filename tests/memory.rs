//! What an import takes of memory, however large the layer is: half of what its setting allows for contents on their way, the other
//! half for the window of a stream of zstd, and the index of the layer on top. And what plyfs takes for files that the kernel knows.
//!
//! `make test` imports about a gigabyte with little memory allowed, `make test-full` also 10 GiB with the default, of which
//! the index is a part, too.
#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    reason = "a test that cannot go on ends"
)]

#[path = "common/mod.rs"]
mod common;

use std::env;
use std::fs;
use std::io::{self, Read};
use std::os::unix::fs::MetadataExt;
use std::path::Path;
use std::process::Command;

use plywood::store::ingest::Settings;
use plywood::store::layers::{Expected, Layers};
use plywood::store::view::Verify;

use common::Mount;

const MIB: u64 = 1 << 20;
/// What this program takes without an import.
const BASE: u64 = 24 * MIB;
/// Bytes that an entry with a content of its own takes until the index is written: its part of the index, of the table of
/// the pack, and of what finds names and contents again.
const ENTRY: u64 = 500;

/// A layer that is made while it is read: small files, then large ones.
struct Stream {
    small: u64,
    large: u64,
    large_bytes: u64,
    /// Files so far.
    file: u64,
    /// The header, content and padding of the file at hand: of which so many bytes are to come.
    header: Vec<u8>,
    content: u64,
    padding: u64,
    /// Of the content.
    pattern: Vec<u8>,
    at: usize,
}

impl Stream {
    fn new(small: u64, large: u64, large_bytes: u64) -> Self {
        Self {
            small,
            large,
            large_bytes,
            file: 0,
            header: Vec::new(),
            content: 0,
            padding: 0,
            pattern: Vec::new(),
            at: 0,
        }
    }

    fn bytes_of(&self, file: u64) -> u64 {
        if file < self.small {
            // 1 to 20 KiB.
            1024 + file * 7919 % (19 << 10)
        } else {
            self.large_bytes
        }
    }

    /// Begins the next file; answers false after the last.
    fn next(&mut self) -> bool {
        if self.file == self.small + self.large {
            return false;
        }
        let bytes = self.bytes_of(self.file);
        let mut header = tar::Header::new_ustar();
        let path = format!("directory-{}/file-{}", self.file / 1000, self.file);
        header.set_path(path).unwrap();
        header.set_size(bytes);
        header.set_mode(0o644);
        header.set_cksum();
        self.header = header.as_bytes().to_vec();
        self.content = bytes;
        self.padding = bytes.wrapping_neg() % 512;
        // Half of it cannot be compressed. Of the large ones some are equal, which spares the disk.
        let seed = match self.file < self.small {
            true => self.file,
            false => u64::MAX - self.file % 4,
        };
        self.pattern = vec![b'p'; 4096];
        let mut hash = blake3::Hasher::new();
        hash.update(&seed.to_le_bytes());
        hash.finalize_xof().fill(&mut self.pattern[..2048]);
        self.at = 0;
        self.file += 1;
        true
    }
}

impl Read for Stream {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        if self.header.is_empty() && self.content == 0 && self.padding == 0 && !self.next() {
            return Ok(0);
        }
        if !self.header.is_empty() {
            let count = buffer.len().min(self.header.len());
            buffer[..count].copy_from_slice(&self.header[..count]);
            self.header.drain(..count);
            return Ok(count);
        }
        if self.content > 0 {
            let count = buffer.len().min(self.pattern.len() - self.at);
            let count = count.min(usize::try_from(self.content).unwrap());
            buffer[..count].copy_from_slice(&self.pattern[self.at..self.at + count]);
            self.at = (self.at + count) % self.pattern.len();
            self.content -= count as u64;
            return Ok(count);
        }
        let count = buffer.len().min(self.padding as usize);
        buffer[..count].fill(0);
        self.padding -= count as u64;
        Ok(count)
    }
}

/// The most bytes that this program has in memory while `work` is done.
fn peak(work: impl FnOnce()) -> u64 {
    fs::write("/proc/self/clear_refs", "5").unwrap();
    work();
    let status = fs::read_to_string("/proc/self/status").unwrap();
    let line = status.lines().find(|line| line.starts_with("VmHWM:"));
    let kib = line.and_then(|line| line.split_whitespace().nth(1));
    kib.unwrap().parse::<u64>().unwrap() << 10
}

fn stays_within(memory: u64, small: u64, large: u64, large_bytes: u64) {
    let dir = tempfile::tempdir().unwrap();
    let settings = Settings {
        memory,
        ..Settings::default()
    };
    let (layers, _) = Layers::open(dir.path(), settings).unwrap();
    let stream = Stream::new(small, large, large_bytes);
    let taken = peak(|| {
        let name = layers.import(stream, &Expected::default(), &()).unwrap();
        let record = layers.get(name).unwrap();
        eprintln!(
            "{} MiB in {} entries",
            record.tar_bytes / MIB,
            record.entries
        );
    });
    let most = BASE + memory / 2 + ENTRY * (small + large);
    eprintln!("{} MiB of {} MiB", taken / MIB, most / MIB);
    assert!(taken <= most, "{taken} bytes, and {most} were allowed");
}

/// The same for a stream that is compressed: with gzip, or with a window of zstd of two to the power of `window`.
fn compressed_stays_within(memory: u64, window: Option<u32>) {
    let dir = tempfile::tempdir().unwrap();
    let settings = Settings {
        memory,
        ..Settings::default()
    };
    let (layers, _) = Layers::open(&dir.path().join("store"), settings).unwrap();
    let (small, mut stream) = (5000, Stream::new(5000, 1, 128 * MIB));
    // What compresses it takes memory, too, which is given back before anything is measured.
    let path = dir.path().join("blob");
    let file = fs::File::create(&path).unwrap();
    match window {
        Some(window) => {
            let mut encoder = zstd::Encoder::new(file, 1).unwrap();
            encoder.window_log(window).unwrap();
            io::copy(&mut stream, &mut encoder).unwrap();
            encoder.finish().unwrap();
        }
        None => {
            let fast = flate2::Compression::fast();
            let mut encoder = flate2::write::GzEncoder::new(file, fast);
            io::copy(&mut stream, &mut encoder).unwrap();
            encoder.finish().unwrap();
        }
    }
    let blob = fs::File::open(&path).unwrap();
    let mut imported = None;
    let taken = peak(|| imported = Some(layers.import(blob, &Expected::default(), &())));
    let imported = imported.unwrap();
    match window {
        Some(window) if 1 << window > memory / 2 => {
            let refused = imported.unwrap_err().to_string();
            assert!(refused.contains("raise import_memory"), "{refused}");
        }
        _ => drop(imported.unwrap()),
    }
    let may = if window.is_some() { memory } else { memory / 2 };
    let most = BASE + may + ENTRY * (small + 1);
    eprintln!("{} MiB of {} MiB", taken / MIB, most / MIB);
    assert!(taken <= most, "{taken} bytes, and {most} were allowed");
}

/// Set where a case is to be measured: to its name.
const CASE: &str = "PLYWOOD_MEMORY_CASE";

/// Measures each case in a process of its own: what others have left to the heap would count.
fn each_alone(test: &str, cases: &[(&str, fn())]) {
    if let Some(named) = env::var_os(CASE) {
        let (_, case) = cases.iter().find(|(name, _)| named == *name).unwrap();
        return case();
    }
    for (name, _) in cases {
        let mut alone = Command::new(env::current_exe().unwrap());
        alone.args(["--exact", test, "--nocapture"]).env(CASE, name);
        let measured = alone.output().unwrap();
        let told = String::from_utf8_lossy(&measured.stderr);
        eprintln!("{name}: {told}");
        assert!(measured.status.success(), "{name}");
    }
}

#[test]
fn an_import_takes_no_more_memory_than_it_may() {
    let mut cases: Vec<(&str, fn())> = vec![
        ("tar", || stays_within(32 * MIB, 40_000, 5, 128 * MIB)),
        ("gzip", || compressed_stays_within(32 * MIB, None)),
        // With the largest window that half of the memory has room for, and with one that has none.
        ("window", || compressed_stays_within(32 * MIB, Some(24))),
        ("too large a window", || {
            compressed_stays_within(32 * MIB, Some(27));
        }),
    ];
    if env::var_os("PLYWOOD_TEST_FULL").is_some() {
        cases.push(("10 GiB", || {
            stays_within(Settings::default().memory, 200_000, 32, 256 * MIB);
        }));
    }
    each_alone("an_import_takes_no_more_memory_than_it_may", &cases);
}

/// A layer of many small files.
fn many_files(layers: &common::Layers, files: u64) -> io::Result<fs::File> {
    let path = layers.path("many.tar");
    let mut tar = tar::Builder::new(fs::File::create(&path)?);
    for file in 0..files {
        let content = file.to_string();
        let mut header = tar::Header::new_ustar();
        header.set_size(content.len() as u64);
        header.set_mode(0o644);
        let path = format!("dir-{:04}/file-{file:09}", file % 1000);
        tar.append_data(&mut header, path, content.as_bytes())?;
    }
    tar.into_inner()?;
    fs::File::open(path)
}

/// The files below a directory, which the kernel then knows.
fn walk(dir: &Path) -> u64 {
    let entries = fs::read_dir(dir).unwrap().map(|entry| entry.unwrap());
    entries
        .map(|entry| match entry.metadata().unwrap() {
            metadata if metadata.is_dir() => walk(&entry.path()),
            metadata => u64::from(metadata.size() > 0),
        })
        .sum()
}

/// A few bytes more for each node, and it was past that without anybody having noticed.
#[test]
fn plyfs_has_less_than_40_mib_after_a_walk_of_100_000_files() {
    const FILES: u64 = 100_000;
    let layers = common::Layers::new(0);
    let (store, _) = Layers::open(&layers.path("store"), Settings::default()).unwrap();
    let stream = many_files(&layers, FILES).unwrap();
    let layer = store.import(stream, &Expected::default(), &()).unwrap();
    let view = store.view(&[layer], Verify::First).unwrap();
    let option = format!("view={}", view.path().display());
    let mount = Mount::with_options(&layers.mnt(), &option);
    assert_eq!(walk(&layers.mnt()), FILES);
    let status = fs::read_to_string(format!("/proc/{}/status", mount.pid())).unwrap();
    let line = status
        .lines()
        .find_map(|line| line.strip_prefix("RssAnon:"));
    let kib = line.and_then(|line| line.split_whitespace().next());
    let private = kib.unwrap().parse::<u64>().unwrap() << 10;
    eprintln!("{private} bytes, {} for each file", private / FILES);
    assert!(private < 40 * MIB, "{private} bytes");
    mount.unmount();
}
