//! What views cost: looking up in those of long chains, opening a large one, and serving it.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::{Duration, Instant};

use plywood::store::LayerName;
use plywood::store::ingest::Settings;
use plywood::store::layers::{Expected, Layers};
use plywood::store::view::{Verify, View};

use crate::common::{Dir, drop_caches, median, sh};

/// Lengths of chains whose views are compared.
const CHAINS: [usize; 4] = [1, 16, 128, 500];
const DIRECTORIES: usize = 100;
const FILES: usize = 20_000;
/// Of the large view.
const LARGE: usize = 100_000;

fn failed(e: impl std::fmt::Display) -> String {
    e.to_string()
}

fn path_of(file: usize, directories: usize) -> (String, String) {
    (
        format!("dir-{:04}", file % directories),
        format!("file-{file:09}"),
    )
}

/// A layer of the files, each with a content of its own.
fn layer(
    layers: &Layers,
    files: impl Iterator<Item = usize>,
    directories: usize,
) -> Result<LayerName, String> {
    let mut tar = tar::Builder::new(Vec::new());
    for file in files {
        let (directory, name) = path_of(file, directories);
        let content = file.to_string();
        let mut header = tar::Header::new_ustar();
        header.set_size(content.len() as u64);
        header.set_mode(0o644);
        let path = format!("{directory}/{name}");
        tar.append_data(&mut header, path, content.as_bytes())
            .map_err(failed)?;
    }
    let stream = tar.into_inner().map_err(failed)?;
    let imported = layers.import(stream.as_slice(), &Expected::default(), &());
    imported.map_err(failed)
}

/// Looks up the same files in views of 1 to 500 layers.
pub fn lookups(rounds: usize) -> Result<(), String> {
    let dir = Dir::new("views")?;
    let (layers, _) = Layers::open(&dir.0.join("store"), Settings::default()).map_err(failed)?;
    let mut views = Vec::new();
    for length in CHAINS {
        let chain: Vec<LayerName> = (0..length)
            .map(|number| layer(&layers, (number..FILES).step_by(length), DIRECTORIES))
            .collect::<Result<_, _>>()?;
        let view = layers.view(&chain, Verify::First).map_err(failed)?;
        views.push((length, view, Vec::new()));
    }
    for _ in 0..rounds {
        for (_, view, taken) in &mut views {
            let start = Instant::now();
            look_up_all(view)?;
            taken.push(start.elapsed().as_secs_f64());
        }
    }
    let nanos = |taken: &[f64]| median(taken) * 1e9 / (2 * FILES) as f64;
    let one = nanos(&views[0].2);
    println!("\n| layers | nanoseconds a look-up | beside one layer |\n|---|---|---|");
    for (length, _, taken) in &views {
        let nanos = nanos(taken);
        println!("| {length} | {nanos:.0} | {:.2} |", nanos / one);
    }
    Ok(())
}

fn look_up_all(view: &View) -> Result<(), String> {
    let root = view.inode(View::ROOT).map_err(failed)?;
    for file in 0..FILES {
        let (directory, name) = path_of(file, DIRECTORIES);
        let missing = || format!("{directory}/{name} is not in the view");
        let found = view.lookup(&root, directory.as_bytes()).map_err(failed)?;
        let directory_inode = view
            .inode(found.ok_or_else(missing)?.inode)
            .map_err(failed)?;
        let found = view
            .lookup(&directory_inode, name.as_bytes())
            .map_err(failed)?;
        found.ok_or_else(missing)?;
    }
    Ok(())
}

/// Opens and serves a view of 100,000 files.
pub fn large(rounds: usize) -> Result<(), String> {
    let dir = Dir::new("large")?;
    let (layers, _) = Layers::open(&dir.0.join("store"), Settings::default()).map_err(failed)?;
    let name = layer(&layers, 0..LARGE, 1000)?;
    let view = layers.view(&[name], Verify::First).map_err(failed)?;
    let path = view.path().to_owned();
    let entries = f64::from(view.len());
    let index = layers.index(name).map_err(failed)?.bytes();
    println!(
        "\nA view of {} inodes: {:.0} bytes of index and {:.0} of view for each",
        view.len(),
        index as f64 / entries,
        view.bytes() as f64 / entries
    );
    drop(view);
    let (mut cold, mut warm) = (Vec::new(), Vec::new());
    for _ in 0..rounds {
        drop_caches()?;
        for taken in [&mut cold, &mut warm] {
            let start = Instant::now();
            View::open_stored(&path, Verify::First).map_err(failed)?;
            taken.push(start.elapsed().as_secs_f64() * 1e3);
        }
    }
    println!(
        "opened in {:.2} ms cold and {:.2} ms warm, median of {rounds}",
        median(&cold),
        median(&warm)
    );
    let kib = walked(&dir, &path)?;
    println!(
        "plyfs has {:.1} MiB of private memory after a walk of all of it",
        kib as f64 / 1024.0
    );
    Ok(())
}

/// Serves the view, stats everything, and answers what the server has of its own, in KiB.
fn walked(dir: &Dir, view: &Path) -> Result<u64, String> {
    let root = dir.0.join("mnt");
    fs::create_dir(&root).map_err(failed)?;
    let option = format!("view={}", view.display());
    sh(Command::new(env!("CARGO_BIN_EXE_plyfs"))
        .args(["-o", &option])
        .arg(&root))?;
    let seen = sh(Command::new("find").arg(&root).args(["-ls"])).map(|out| out.lines().count());
    let private = server_of(&root).and_then(|pid| {
        let status = fs::read_to_string(format!("/proc/{pid}/status")).map_err(failed)?;
        let line = status.lines().find_map(|l| l.strip_prefix("RssAnon:"));
        line.and_then(|l| l.split_whitespace().next()?.parse().ok())
            .ok_or_else(|| "/proc/PID/status has no RssAnon".to_owned())
    });
    unmount(&root)?;
    if seen? <= LARGE {
        return Err("the walk has not met all files".into());
    }
    private
}

fn unmount(root: &Path) -> Result<(), String> {
    let deadline = Instant::now() + Duration::from_secs(10);
    loop {
        match sh(Command::new("umount").arg(root)) {
            Err(_) if Instant::now() < deadline => std::thread::sleep(Duration::from_millis(50)),
            result => return result.map(drop),
        }
    }
}

/// The process that has the mount point on its command line.
fn server_of(root: &Path) -> Result<u32, String> {
    let wanted = root.display().to_string();
    for entry in fs::read_dir("/proc").map_err(failed)?.flatten() {
        let command: PathBuf = entry.path().join("cmdline");
        // Others end at any moment.
        let Ok(line) = fs::read(command) else {
            continue;
        };
        let mut words = line.split(|byte| *byte == 0);
        if words.any(|word| word == wanted.as_bytes())
            && let Some(pid) = entry.file_name().to_str().and_then(|pid| pid.parse().ok())
        {
            return Ok(pid);
        }
    }
    Err(format!("no process serves {wanted}"))
}
