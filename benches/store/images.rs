//! Real images: how fast they are unpacked, and what they take of the disk.

use std::fs::{self, File};
use std::io::{Read, Write};
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Instant;

use plywood::store::ingest::Settings;
use plywood::store::layers::{Expected, Layers};

use crate::common::{Dir, median, sh};
use crate::hosts::{Host, Keeper};

/// All of them, the one below the others first.
const ALL: [&str; 5] = ["debian", "python", "node", "postgres", "redis"];
/// Those that are timed.
const TIMED: [&str; 2] = ["python", "postgres"];

pub struct Images {
    top: PathBuf,
    dir: PathBuf,
}

impl Images {
    pub fn prepare(top: &Path) -> Result<Self, String> {
        let dir = top.join("target/bench/store-images");
        let made = Command::new(top.join("benches/store/images.sh"))
            .arg(&dir)
            .status()
            .map_err(|e| format!("benches/store/images.sh: {e}"))?;
        if !made.success() {
            return Err("benches/store/images.sh failed".into());
        }
        Ok(Self {
            top: top.to_owned(),
            dir,
        })
    }

    fn archive(&self, name: &str) -> PathBuf {
        self.dir.join(format!("{name}.tar"))
    }

    /// Unpacks each image from containerd's content store into an empty store, in turns.
    pub fn unpack(&self, rounds: usize) -> Result<(), String> {
        println!("\nUnpacking an image, median of {rounds} in turns:\n");
        println!(
            "| image | entries | overlayfs (ms) | overlayfs and sync (ms) | plywood, durable (ms) | plywood / overlayfs | plywood / overlayfs and sync |"
        );
        println!("|---|---|---|---|---|---|---|");
        for image in TIMED {
            let (mut theirs, mut synced, mut ours) = (Vec::new(), Vec::new(), Vec::new());
            for round in 0..rounds {
                let mut keepers = [Keeper::Overlayfs, Keeper::Plywood];
                keepers.rotate_left(round % 2);
                for keeper in keepers {
                    let host = Host::start(&self.top, keeper)?;
                    let name = format!("localhost/{image}:latest");
                    let manifest = host.import(&self.archive(image), &name)?;
                    nix::unistd::sync();
                    let start = Instant::now();
                    host.unpack(&manifest)?;
                    let unpacked = start.elapsed().as_secs_f64();
                    match keeper {
                        Keeper::Plywood => ours.push(unpacked),
                        Keeper::Overlayfs => {
                            theirs.push(unpacked);
                            sh(Command::new("sync").arg("-f").arg(host.kept()))?;
                            synced.push(start.elapsed().as_secs_f64());
                        }
                    }
                }
            }
            let [theirs, synced, ours] = [theirs, synced, ours].map(|v| median(&v) * 1e3);
            println!(
                "| {image} | {} | {theirs:.0} | {synced:.0} | {ours:.0} | {:.2} | {:.2} |",
                self.entries(image)?,
                ours / theirs,
                ours / synced
            );
        }
        Ok(())
    }

    fn layers_of(&self, image: &str) -> Vec<PathBuf> {
        let layer = |name: &str| self.dir.join(format!("{name}.layer.tar"));
        match image {
            "debian" => vec![layer("debian")],
            image => vec![layer("debian"), layer(image)],
        }
    }

    fn entries(&self, image: &str) -> Result<usize, String> {
        let mut entries = 0;
        for layer in self.layers_of(image) {
            entries += sh(Command::new("tar").arg("-tf").arg(layer))?
                .lines()
                .count();
        }
        Ok(entries)
    }

    /// Keeps all images and adds up what that takes.
    pub fn disk(&self) -> Result<(), String> {
        let mut taken = Vec::new();
        for keeper in [Keeper::Overlayfs, Keeper::Plywood] {
            let host = Host::start(&self.top, keeper)?;
            for image in ALL {
                let name = format!("localhost/{image}:latest");
                let manifest = host.import(&self.archive(image), &name)?;
                host.unpack(&manifest)?;
            }
            nix::unistd::sync();
            taken.push(disk_usage(&host.kept())?);
        }
        println!(
            "\nDebian, Python, Node, PostgreSQL and Redis on one Debian: overlayfs {:.1} MiB, plywood {:.1} MiB, ratio {:.2}",
            mib(taken[0]),
            mib(taken[1]),
            taken[1] as f64 / taken[0] as f64
        );
        Ok(())
    }

    /// Takes in an image of which four fifths of the bytes are known, but in another layer.
    pub fn second(&self) -> Result<(), String> {
        let dir = Dir::new("second")?;
        let failed = |e: &dyn std::fmt::Display| format!("{}: {e}", dir.0.display());
        let (layers, _) =
            Layers::open(&dir.0.join("store"), Settings::default()).map_err(|e| failed(&e))?;
        let known = self.dir.join("python.layer.tar");
        let open = |path: &Path| File::open(path).map_err(|e| format!("{}: {e}", path.display()));
        let import = |path: &Path| {
            let stream = open(path)?;
            let imported = layers.import(stream, &Expected::default(), &());
            imported.map_err(|e| format!("{}: {e}", path.display()))
        };
        import(&known)?;
        nix::unistd::sync();
        let before = disk_usage(&dir.at("store"))?;
        let second = dir.0.join("second.tar");
        let bytes = with_fifth_new(&known, &second).map_err(|e| failed(&e))?;
        import(&second)?;
        nix::unistd::sync();
        let cost = disk_usage(&dir.at("store"))? - before;
        println!(
            "\nA second image of {:.1} MiB, of which 80 % of the content is known: {:.1} MiB more, {:.1} % of its size",
            mib(bytes),
            mib(cost),
            100.0 * cost as f64 / bytes as f64
        );
        Ok(())
    }
}

/// Writes the layer again with a quarter of its bytes added as new files that no compression makes smaller. Answers the bytes of the
/// stream.
fn with_fifth_new(known: &Path, to: &Path) -> std::io::Result<u64> {
    const FILE: usize = 20_000;
    fs::copy(known, to)?;
    let size = fs::metadata(known)?.len();
    let scratch = to.with_extension("new");
    fs::create_dir(&scratch)?;
    let mut random = File::open("/dev/urandom")?;
    let mut content = vec![0; FILE];
    for number in 0..size / 4 / FILE as u64 {
        random.read_exact(&mut content)?;
        File::create(scratch.join(format!("new-{number}")))?.write_all(&content)?;
    }
    sh(Command::new("tar")
        .arg("-C")
        .arg(&scratch)
        .arg("-rf")
        .arg(to)
        .arg("."))
    .map_err(std::io::Error::other)?;
    fs::remove_dir_all(&scratch)?;
    Ok(fs::metadata(to)?.len())
}

/// Bytes allocated below a directory.
fn disk_usage(dir: &str) -> Result<u64, String> {
    let said = sh(Command::new("du").args(["-s", "-B1", dir]))?;
    said.split_whitespace()
        .next()
        .and_then(|bytes| bytes.parse().ok())
        .ok_or_else(|| format!("du {dir}: {said}"))
}

fn mib(bytes: u64) -> f64 {
    bytes as f64 / f64::from(1 << 20)
}
