//! The file systems that are compared, the tree that they mount, and a mount that takes itself down.

use std::fs::File;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use plywood::store::ingest::Settings;
use plywood::store::layers::{Expected, Layers};
use plywood::store::view::Verify;

use super::common::sh;

/// The Debian root in four layers.
pub struct Image {
    pub dir: PathBuf,
    /// Layers, the topmost first.
    layers: Vec<PathBuf>,
    /// A view of the same layers, packed.
    view: PathBuf,
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
        let layers: Vec<PathBuf> = (1..=4).rev().map(|n| dir.join(n.to_string())).collect();
        let view = pack(top, &layers)?;
        Ok(Self { dir, layers, view })
    }

    /// This one with another layer on top.
    pub fn below(&self, layer: PathBuf) -> Self {
        let mut layers = vec![layer];
        layers.extend(self.layers.iter().cloned());
        Self {
            dir: self.dir.clone(),
            layers,
            view: self.view.clone(),
        }
    }

    /// What the untar row unpacks.
    pub fn tar(&self) -> PathBuf {
        self.dir.join("tree.tar")
    }
}

/// Packs the layers, the topmost first, anew: what the last run left may be of another form.
fn pack(top: &Path, layers: &[PathBuf]) -> Result<PathBuf, String> {
    let dir = top.join("target/bench/packed");
    sh(Command::new("rm").arg("-rf").arg(&dir))?;
    let (store, _) = Layers::open(&dir, Settings::default()).map_err(|e| e.to_string())?;
    let mut chain = Vec::new();
    for layer in layers.iter().rev() {
        let stream = dir.join("layer.tar");
        sh(Command::new(top.join("benches/layer-tar"))
            .arg(layer)
            .arg(&stream))?;
        let file = File::open(&stream).map_err(|e| format!("{}: {e}", stream.display()))?;
        let packed = store.import(file, &Expected::default(), &());
        chain.push(packed.map_err(|e| format!("{}: {e}", layer.display()))?);
        std::fs::remove_file(&stream).map_err(|e| format!("{}: {e}", stream.display()))?;
    }
    let view = store.view(&chain, Verify::First);
    view.map(|view| view.path().to_owned())
        .map_err(|e| e.to_string())
}

enum Kind {
    /// With options besides the layers.
    Overlayfs(&'static str),
    FuseOverlayfs,
    Plyfs(String),
    /// On packed layers.
    Packed,
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
            kind: Kind::Overlayfs(""),
        }
    }

    /// Kernel overlayfs that copies no data for a change of attributes.
    pub fn overlayfs_metacopy() -> Self {
        Self {
            name: "overlayfs metacopy".into(),
            kind: Kind::Overlayfs(",metacopy=on,redirect_dir=on"),
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

    /// plyfs on packed layers.
    pub fn packed() -> Self {
        Self {
            name: "plyfs packed".into(),
            kind: Kind::Packed,
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
        let lowers = match &self.kind {
            Kind::Packed => format!("view={}", image.view.display()),
            _ => format!("lowerdir={}", lowers.join(":")),
        };
        let layers = format!(
            "{lowers},upperdir={},workdir={}",
            base.join("upper").display(),
            base.join("work").display()
        );
        let root = base.join("mnt");
        let mount = Mount {
            base,
            is_gone: AtomicBool::new(false),
        };
        let mut command = match &self.kind {
            Kind::Overlayfs(options) => {
                let mut c = Command::new("mount");
                c.args(["-t", "overlay", "overlay", "-o"]);
                c.arg(format!("{layers}{options}"));
                c
            }
            Kind::FuseOverlayfs => {
                let mut c = Command::new("fuse-overlayfs");
                c.args(["-o", &layers]);
                c
            }
            Kind::Plyfs(_) | Kind::Packed => {
                let mut c = Command::new(env!("CARGO_BIN_EXE_plyfs"));
                c.args(["-o", &layers]);
                if let Kind::Plyfs(options) = &self.kind {
                    c.args(["-o", options]);
                }
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

    pub fn upper(&self) -> PathBuf {
        self.base.join("upper")
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
