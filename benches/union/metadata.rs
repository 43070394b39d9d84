//! A change of attributes of 1 GiB in a lower layer, beside kernel overlayfs where that copies no data either.

use std::fs;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Instant;

use super::common::{median, sh};
use super::systems::{Image, System};

const TREE: &str = "attributes";
const FILES: usize = 1024;
const FILE: usize = 1 << 20;

/// The layer with the tree, removed at the end.
struct Layer(PathBuf);

impl Layer {
    fn make(dir: PathBuf) -> std::io::Result<Self> {
        let layer = Self(dir);
        let block = vec![0x5a; FILE];
        for n in 0..FILES {
            let dir = layer.0.join(TREE).join(format!("{}", n / 64));
            fs::create_dir_all(&dir)?;
            fs::write(dir.join(format!("{n}")), &block)?;
        }
        Ok(layer)
    }
}

impl Drop for Layer {
    fn drop(&mut self) {
        // It lies in the target directory, should that fail.
        let _ = fs::remove_dir_all(&self.0);
    }
}

/// Bytes that a directory takes with all that is in it.
fn taken(dir: &Path) -> std::io::Result<u64> {
    let mut bytes = 0;
    for entry in fs::read_dir(dir)? {
        let entry = entry?;
        let meta = entry.metadata()?;
        bytes += meta.blocks() * 512;
        if meta.is_dir() {
            bytes += taken(&entry.path())?;
        }
    }
    Ok(bytes)
}

pub fn run(image: &Image, rounds: usize) -> Result<(), String> {
    println!("\nAttributes of {FILES} files of 1 MiB in a lower layer:\n");
    println!(
        "| command | overlayfs, metacopy=on (ms) | plyfs / overlayfs | overlayfs's upper (KiB) | plyfs's upper (KiB) |\n|---|---|---|---|---|"
    );
    let failed = |e: std::io::Error| format!("the tree of {FILES} files: {e}");
    let name = format!("attributes-{}", std::process::id());
    let layer = Layer::make(image.dir.with_file_name(name)).map_err(failed)?;
    let image = image.below(layer.0.clone());
    let systems = [
        System::overlayfs_metacopy(),
        System::plyfs("plyfs", "metacopy=on"),
    ];
    // ext4 looks for a new inode among those that were deleted a short time ago, which takes longer than all the rest: no
    // upper goes before the end.
    let mut kept = Vec::new();
    for command in [["chown", "7:7"], ["chmod", "g+w"]] {
        let mut seconds = [Vec::new(), Vec::new()];
        let mut bytes = [0; 2];
        for round in 0..rounds {
            for turn in 0..systems.len() {
                let n = (turn + round) % systems.len();
                let base = format!("run-{}-{}", std::process::id(), kept.len());
                let mount = systems[n].mount_at(&image, image.dir.with_file_name(base))?;
                nix::unistd::sync();
                let tree = mount.root().join(TREE);
                let start = Instant::now();
                sh(Command::new(command[0]).arg("-R").arg(command[1]).arg(tree))?;
                seconds[n].push(start.elapsed().as_secs_f64());
                mount.unmount()?;
                bytes[n] = taken(&mount.upper()).map_err(failed)?;
                kept.push(mount);
            }
        }
        let [kernel, plyfs] = seconds.map(|seconds| median(&seconds));
        let [of_kernel, of_plyfs] = bytes.map(|bytes| bytes >> 10);
        println!(
            "| {} -R | {:.1} | {:.2} | {of_kernel} | {of_plyfs} |",
            command[0],
            kernel * 1e3,
            plyfs / kernel
        );
    }
    Ok(())
}
