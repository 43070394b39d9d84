//! What small requests wait for while others copy and sync large files: p50 and p99 of a look-up, an open and a
//! 4 KiB read of unrelated files, without that load and under it, in one run.

use std::fs::{self, File};
use std::io::Write;
use std::os::unix::fs::FileExt;
use std::path::Path;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use super::systems::{Image, System};

const FOR: Duration = Duration::from_secs(4);
const LARGE: &str = "srv/app/data/large";
const KINDS: [&str; 3] = ["look-up", "open", "read 4 KiB"];

/// Seconds of each operation, one list a kind.
fn probe(root: &Path, names: &mut u64) -> Result<[Vec<f64>; 3], String> {
    let failed = |e: std::io::Error| format!("{}: {e}", root.display());
    let small = root.join("etc/passwd");
    let data = File::open(root.join("usr/bin/python3.11")).map_err(failed)?;
    let mut taken = [Vec::new(), Vec::new(), Vec::new()];
    let end = Instant::now() + FOR;
    let mut block = [0; 4096];
    while Instant::now() < end {
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
        let without = probe(&root, &mut names)?;
        let stop = AtomicBool::new(false);
        let under = std::thread::scope(|scope| {
            let (root, stop) = (&root, &stop);
            let loads: Vec<_> = (0..3)
                .map(|n| scope.spawn(move || load(root, n, stop)))
                .collect();
            let under = probe(root, &mut names);
            stop.store(true, Ordering::Relaxed);
            for one in loads {
                match one.join() {
                    Ok(done) => done.map_err(|e| format!("the load on {}: {e}", system.name))?,
                    Err(_) => return Err("the load panicked".to_owned()),
                }
            }
            under
        })?;
        for (kind, (mut before, mut after)) in KINDS.iter().zip(without.into_iter().zip(under)) {
            before.sort_by(f64::total_cmp);
            after.sort_by(f64::total_cmp);
            let [a, b] = [0.5, 0.99].map(|part| quantile(&before, part));
            let [c, d] = [0.5, 0.99].map(|part| quantile(&after, part));
            println!(
                "| {} | {kind} | {a:.3} | {b:.3} | {c:.3} | {d:.3} |",
                system.name
            );
        }
    }
    Ok(())
}
