//! The file systems that are compared, the tree that they mount, and a mount that takes itself down.

use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

/// Runs a command to its end; its output is the error.
pub fn sh(command: &mut Command) -> Result<String, String> {
    let out = command
        .stdin(Stdio::null())
        .output()
        .map_err(|e| format!("{command:?}: {e}"))?;
    if !out.status.success() {
        return Err(format!(
            "{command:?}: {}\n{}",
            out.status,
            String::from_utf8_lossy(&out.stderr)
        ));
    }
    Ok(String::from_utf8_lossy(&out.stdout).into_owned())
}

/// The Debian root in four layers.
pub struct Image {
    pub dir: PathBuf,
    /// Layers, the topmost first.
    layers: Vec<PathBuf>,
}

impl Image {
    pub fn prepare(top: &Path) -> Result<Self, String> {
        let dir = top.join("target/bench/image");
        let made = Command::new(top.join("benches/image.sh"))
            .arg(&dir)
            .status()
            .map_err(|e| format!("benches/image.sh: {e}"))?;
        if !made.success() {
            return Err("benches/image.sh failed".into());
        }
        let layers = (1..=4).rev().map(|n| dir.join(n.to_string())).collect();
        Ok(Self { dir, layers })
    }

    /// This one with another layer on top.
    pub fn below(&self, layer: PathBuf) -> Self {
        let mut layers = vec![layer];
        layers.extend(self.layers.iter().cloned());
        Self {
            dir: self.dir.clone(),
            layers,
        }
    }

    /// What the untar row unpacks.
    pub fn tar(&self) -> PathBuf {
        self.dir.join("tree.tar")
    }
}

enum Kind {
    Overlayfs,
    FuseOverlayfs,
    Plyfs(String),
}

/// One of the file systems that are compared.
pub struct System {
    pub name: String,
    kind: Kind,
}

impl System {
    pub fn overlayfs() -> Self {
        Self {
            name: "overlayfs".into(),
            kind: Kind::Overlayfs,
        }
    }

    pub fn fuse_overlayfs() -> Self {
        Self {
            name: "fuse-overlayfs".into(),
            kind: Kind::FuseOverlayfs,
        }
    }

    pub fn plyfs(name: &str, options: &str) -> Self {
        Self {
            name: name.into(),
            kind: Kind::Plyfs(options.into()),
        }
    }

    /// Mounts the image with an empty upper in a new directory.
    pub fn mount(&self, image: &Image) -> Result<Mount, String> {
        let name = format!("run-{}-{}", std::process::id(), self.name.replace(' ', "-"));
        self.mount_at(image, image.dir.with_file_name(name))
    }

    /// As `mount`, in the directory `base`.
    pub fn mount_at(&self, image: &Image, base: PathBuf) -> Result<Mount, String> {
        for sub in ["upper", "work", "mnt"] {
            std::fs::create_dir_all(base.join(sub))
                .map_err(|e| format!("{}: {e}", base.display()))?;
        }
        let lowers: Vec<String> = image
            .layers
            .iter()
            .map(|l| l.display().to_string())
            .collect();
        let layers = format!(
            "lowerdir={},upperdir={},workdir={}",
            lowers.join(":"),
            base.join("upper").display(),
            base.join("work").display()
        );
        let root = base.join("mnt");
        let mount = Mount {
            base,
            is_gone: AtomicBool::new(false),
        };
        let mut command = match &self.kind {
            Kind::Overlayfs => {
                let mut c = Command::new("mount");
                c.args(["-t", "overlay", "overlay", "-o", &layers]);
                c
            }
            Kind::FuseOverlayfs => {
                let mut c = Command::new("fuse-overlayfs");
                c.args(["-o", &layers]);
                c
            }
            Kind::Plyfs(options) => {
                let mut c = Command::new(env!("CARGO_BIN_EXE_plyfs"));
                c.args(["-o", &layers, "-o", options]);
                c.arg("--control").arg(mount.control());
                c
            }
        };
        sh(command.arg(&root))?;
        Ok(mount)
    }
}

/// A mount with its upper; gone when dropped.
pub struct Mount {
    base: PathBuf,
    is_gone: AtomicBool,
}

impl Mount {
    pub fn root(&self) -> PathBuf {
        self.base.join("mnt")
    }

    /// The control socket, of plyfs alone.
    pub fn control(&self) -> PathBuf {
        self.base.join("ctl")
    }

    /// While a file in the upper is incomplete, this is there.
    pub fn incomplete(&self) -> PathBuf {
        self.base.join("work/work/incompat")
    }
}

impl Mount {
    /// Unmounts, and leaves the rest until it is dropped.
    pub fn unmount(&self) -> Result<(), String> {
        sh(Command::new("umount").arg(self.root()))?;
        self.is_gone.store(true, Ordering::Relaxed);
        Ok(())
    }
}

impl Drop for Mount {
    fn drop(&mut self) {
        let deadline = Instant::now() + Duration::from_secs(10);
        while !*self.is_gone.get_mut() && sh(Command::new("umount").arg(self.root())).is_err() {
            if Instant::now() > deadline {
                let _ = sh(Command::new("umount").arg("-l").arg(self.root()));
                break;
            }
            std::thread::sleep(Duration::from_millis(50));
        }
        let _ = sh(Command::new("rm")
            .args(["-rf", "--one-file-system"])
            .arg(&self.base));
    }
}

/// Empties the kernel's caches of everything that is clean.
pub fn drop_caches() -> Result<(), String> {
    nix::unistd::sync();
    std::fs::write("/proc/sys/vm/drop_caches", "3")
        .map_err(|e| format!("/proc/sys/vm/drop_caches: {e}"))
}
