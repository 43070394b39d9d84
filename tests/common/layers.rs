//! Directories for one union, on a file system with extended attributes.

use std::fs;
use std::path::{Path, PathBuf};
use std::sync::OnceLock;

use super::snapshot::Snapshot;

/// Fresh lower directories, an upper, a work directory and a mount point, all removed when dropped.
/// The lowers are to be filled first: whoever asks for options is about to mount, and from then on no
/// byte, time or attribute of a lower may change.
pub struct Layers {
    dir: tempfile::TempDir,
    lowers: usize,
    sealed: OnceLock<Vec<(PathBuf, Snapshot)>>,
}

impl Layers {
    /// With that many lowers; number 0 is the topmost.
    pub fn new(lowers: usize) -> Self {
        let dir = tempfile::Builder::new()
            .prefix("ply-test.")
            .tempdir()
            .unwrap();
        // So that tests can work as another user below it.
        fs::set_permissions(
            dir.path(),
            std::os::unix::fs::PermissionsExt::from_mode(0o755),
        )
        .unwrap();
        let layers = Self {
            dir,
            lowers,
            sealed: OnceLock::new(),
        };
        for n in 0..lowers {
            fs::create_dir(layers.lower(n)).unwrap();
        }
        for name in ["upper", "work", "mnt"] {
            fs::create_dir(layers.path(name)).unwrap();
        }
        layers
    }

    /// Something in the directory that holds all of them.
    pub fn path(&self, name: &str) -> PathBuf {
        self.dir.path().join(name)
    }

    /// A lower directory.
    pub fn lower(&self, n: usize) -> PathBuf {
        self.path(&format!("lower{n}"))
    }

    /// The upper directory.
    pub fn upper(&self) -> PathBuf {
        self.path("upper")
    }

    /// The mount point.
    pub fn mnt(&self) -> PathBuf {
        self.path("mnt")
    }

    /// `lowerdir=...` alone.
    pub fn lower_options(&self) -> String {
        self.seal();
        let lowers: Vec<String> = (0..self.lowers)
            .map(|n| self.lower(n).to_str().unwrap().to_owned())
            .collect();
        format!("lowerdir={}", lowers.join(":"))
    }

    /// `lowerdir=...,upperdir=...,workdir=...`.
    pub fn options(&self) -> String {
        format!(
            "{},upperdir={},workdir={}",
            self.lower_options(),
            self.upper().display(),
            self.path("work").display()
        )
    }

    /// From here on no lower may change; [`check`](Self::check) and the drop look.
    pub fn seal(&self) {
        self.sealed.get_or_init(|| {
            let lowers = (0..self.lowers).map(|n| {
                let lower = self.lower(n);
                super::snapshot::age_access_times(&lower);
                (lower.clone(), Snapshot::of(&lower))
            });
            lowers.collect()
        });
    }

    /// Fails when a sealed lower is not what it was.
    pub fn check(&self) {
        for (path, before) in self.sealed.get().into_iter().flatten() {
            before.assert_same(path);
        }
    }

    /// Writes a file with its parent directories.
    pub fn write(path: &Path, content: impl AsRef<[u8]>) {
        fs::create_dir_all(path.parent().unwrap()).unwrap();
        fs::write(path, content).unwrap();
    }
}

impl Drop for Layers {
    fn drop(&mut self) {
        if !std::thread::panicking() {
            self.check();
        }
    }
}
