//! What small requests wait for while others copy and sync large files, and while a large file is completed: p50 and
//! p99 of a look-up, an open and a 4 KiB read of unrelated files, without that load and under it, in one run.

use std::fs::{self, File};
use std::io::Write;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use plywood::fuse::control::ControlClient;

use super::systems::{Image, System};

const FOR: Duration = Duration::from_secs(4);
const LARGE: &str = "srv/app/data/large";
const KINDS: [&str; 3] = ["look-up", "open", "read 4 KiB"];

/// Seconds of each operation, one list a kind.
type Taken = [Vec<f64>; 3];

/// Asks for some seconds, and as long as there is load.
fn probe(root: &Path, names: &mut u64, goes_on: impl Fn() -> bool) -> Result<Taken, String> {
    let failed = |e: std::io::Error| format!("{}: {e}", root.display());
    let small = root.join("etc/passwd");
    let data = File::open(root.join("usr/bin/python3.11")).map_err(failed)?;
    let mut taken = [Vec::new(), Vec::new(), Vec::new()];
    let end = Instant::now() + FOR;
    let mut block = [0; 4096];
    while Instant::now() < end || goes_on() {
        *names += 1;
        let start = Instant::now();
        // Never asked for before, so that no cache of the kernel's knows it.
        let missing = fs::symlink_metadata(root.join(format!("etc/missing{names}")));
        taken[0].push(start.elapsed().as_secs_f64());
        if missing.is_ok() {
            return Err("a name that nobody made is there".into());
        }
        let start = Instant::now();
        drop(File::open(&small).map_err(failed)?);
        taken[1].push(start.elapsed().as_secs_f64());
        let start = Instant::now();
        let offset = *names * 7919 % 1000 * 4096;
        data.read_at(&mut block, offset).map_err(failed)?;
        taken[2].push(start.elapsed().as_secs_f64());
        std::thread::sleep(Duration::from_millis(1));
    }
    Ok(taken)
}

/// Writes, syncs and copies large files until told to stop.
fn load(root: &Path, number: u32, stop: &AtomicBool) -> std::io::Result<()> {
    let block = vec![0x5a; 1 << 20];
    while !stop.load(Ordering::Relaxed) {
        let path = root.join(format!("srv/load{number}"));
        let mut file = File::create(&path)?;
        for _ in 0..64 {
            file.write_all(&block)?;
        }
        file.sync_all()?;
        fs::copy(root.join(LARGE), &path)?;
        File::options()
            .append(true)
            .open(root.join(LARGE))?
            .write_all(b"x")?;
    }
    Ok(())
}

fn quantile(sorted: &[f64], part: f64) -> f64 {
    let at = (sorted.len() as f64 * part) as usize;
    sorted
        .get(at.min(sorted.len().saturating_sub(1)))
        .map_or(f64::NAN, |v| v * 1e3)
}

fn print_rows(system: &str, without: Taken, under: Taken) {
    for (kind, (mut before, mut after)) in KINDS.iter().zip(without.into_iter().zip(under)) {
        before.sort_by(f64::total_cmp);
        after.sort_by(f64::total_cmp);
        let [a, b] = [0.5, 0.99].map(|part| quantile(&before, part));
        let [c, d] = [0.5, 0.99].map(|part| quantile(&after, part));
        println!("| {system} | {kind} | {a:.3} | {b:.3} | {c:.3} | {d:.3} |");
    }
}

pub fn run(systems: &[System], image: &Image) -> Result<(), String> {
    println!(
        "\nMilliseconds of small requests without load and while large files are written, synced and copied:\n"
    );
    println!(
        "| system | request | p50 | p99 | p50 under load | p99 under load |\n|---|---|---|---|---|---|"
    );
    for system in systems {
        let mount = system.mount(image)?;
        let root = mount.root();
        let mut names = 0;
        let without = probe(&root, &mut names, || false)?;
        let stop = AtomicBool::new(false);
        let under = std::thread::scope(|scope| {
            let (root, stop) = (&root, &stop);
            let loads: Vec<_> = (0..3)
                .map(|n| scope.spawn(move || load(root, n, stop)))
                .collect();
            let under = probe(root, &mut names, || false);
            stop.store(true, Ordering::Relaxed);
            for one in loads {
                match one.join() {
                    Ok(done) => done.map_err(|e| format!("the load on {}: {e}", system.name))?,
                    Err(_) => return Err("the load panicked".to_owned()),
                }
            }
            under
        })?;
        print_rows(&system.name, without, under);
    }
    Ok(())
}

/// How a file that is copied up in part becomes whole.
#[derive(Clone, Copy)]
enum Completion {
    /// By plyfs itself, once half of it is there.
    Background,
    /// On demand, of a mount in use.
    Materialize,
    /// At the end of its mount, beside another one.
    Unmount,
}

impl Completion {
    const ALL: [Self; 3] = [Self::Background, Self::Materialize, Self::Unmount];

    fn name(self) -> &'static str {
        match self {
            Self::Background => "in the background",
            Self::Materialize => "on demand",
            Self::Unmount => "at unmount, beside another mount",
        }
    }
}

/// In a layer of its own.
const HUGE: &str = "huge";

/// The layer with the huge file, removed at the end.
struct HugeLayer(PathBuf);

impl HugeLayer {
    fn make(dir: PathBuf, bytes: u64) -> std::io::Result<Self> {
        fs::create_dir_all(&dir)?;
        let layer = Self(dir);
        let mut file = File::create(layer.0.join(HUGE))?;
        let block: Vec<u8> = (0..1 << 20)
            .map(|at: u32| (at >> 8 ^ at) as u8 | 1)
            .collect();
        for _ in 0..bytes >> 20 {
            file.write_all(&block)?;
        }
        file.sync_all()?;
        Ok(layer)
    }
}

impl Drop for HugeLayer {
    fn drop(&mut self) {
        // It lies in the target directory, should that fail.
        let _ = fs::remove_dir_all(&self.0);
    }
}

/// As `run`, of plyfs alone, while a file of so many bytes is completed.
pub fn complete(image: &Image, bytes: u64) -> Result<(), String> {
    println!(
        "\nMilliseconds of small requests to plyfs without load and while a file of {} MiB is completed:\n",
        bytes >> 20
    );
    println!(
        "| completed | request | p50 | p99 | p50 meanwhile | p99 meanwhile |\n|---|---|---|---|---|---|"
    );
    let failed = |e: std::io::Error| format!("the huge file: {e}");
    let name = format!("huge-{}", std::process::id());
    let layer = HugeLayer::make(image.dir.with_file_name(name), bytes).map_err(failed)?;
    let image = image.below(layer.0.clone());
    for way in Completion::ALL {
        let every = match way {
            Completion::Background => "complete=1",
            _ => "complete=off",
        };
        let mount = System::plyfs("plyfs", every).mount(&image)?;
        let other = System::plyfs("plyfs beside", "").mount(&image)?;
        let asked = match way {
            Completion::Unmount => other.root(),
            _ => mount.root(),
        };
        let mut names = 0;
        let without = probe(&asked, &mut names, || false)?;
        let huge = File::options().write(true).open(mount.root().join(HUGE));
        begin(&huge.map_err(failed)?, way, bytes).map_err(failed)?;
        let goes_on = AtomicBool::new(true);
        let under = std::thread::scope(|scope| {
            let (goes_on, mount) = (&goes_on, &mount);
            let completer = scope.spawn(move || {
                let done = match way {
                    Completion::Background => Ok(()),
                    Completion::Materialize => materialize(&mount.control()),
                    Completion::Unmount => mount.unmount().map_err(std::io::Error::other),
                };
                while done.is_ok() && mount.incomplete().exists() {
                    std::thread::sleep(Duration::from_millis(10));
                }
                goes_on.store(false, Ordering::Relaxed);
                done
            });
            let under = probe(&asked, &mut names, || goes_on.load(Ordering::Relaxed))?;
            match completer.join() {
                Ok(done) => done.map_err(failed)?,
                Err(_) => return Err("the completion panicked".to_owned()),
            }
            Ok(under)
        })?;
        print_rows(way.name(), without, under);
    }
    Ok(())
}

/// Writes to the file what its completion needs to begin.
fn begin(huge: &File, way: Completion, bytes: u64) -> std::io::Result<()> {
    let block = vec![0x5a; 1 << 20];
    let written = match way {
        Completion::Background => bytes / 2 + (1 << 20),
        _ => 1 << 20,
    };
    for at in (0..written).step_by(1 << 20) {
        huge.write_all_at(&block, at)?;
    }
    Ok(())
}

fn materialize(control: &Path) -> std::io::Result<()> {
    const LONG: Duration = Duration::from_secs(3600);
    let (client, _) = ControlClient::connect(control, LONG)?;
    client.complete(LONG)
}
