//! The lower directories of a row, and the plain tree that they merge to.

use std::fs;
use std::os::unix::fs::{FileTypeExt, MetadataExt};
use std::path::{Path, PathBuf};
use std::process::Command;

use nix::mount::{MsFlags, mount};
use nix::sys::stat::{Mode, SFlag, mknod};

const OPAQUE: &str = "trusted.overlay.opaque";

/// Lower directories being filled; number 0 is the topmost.
pub struct Fill {
    base: PathBuf,
}

impl Fill {
    /// In a directory that is there and empty.
    pub fn new(base: &Path) -> Self {
        let fill = Self {
            base: base.to_owned(),
        };
        fill.lower(0);
        fill
    }

    /// A lower directory, made when it is first asked for.
    pub fn lower(&self, n: usize) -> PathBuf {
        let path = self.base.join(format!("{n}"));
        fs::create_dir_all(&path).unwrap();
        path
    }

    /// Puts the topmost one into memory, where a great many files are made fast.
    pub fn on_tmpfs(&self) {
        let none: Option<&str> = None;
        let options = Some("nr_inodes=0,mode=755");
        mount(
            none,
            &self.lower(0),
            Some("tmpfs"),
            MsFlags::empty(),
            options,
        )
        .unwrap();
    }

    /// All of them, the topmost first.
    pub fn lowers(&self) -> Vec<PathBuf> {
        let mut lowers = Vec::new();
        while self.base.join(format!("{}", lowers.len())).exists() {
            lowers.push(self.lower(lowers.len()));
        }
        lowers
    }

    /// A path in a lower, its parents made.
    pub fn path(&self, n: usize, path: &str) -> PathBuf {
        let path = self.lower(n).join(path);
        fs::create_dir_all(path.parent().unwrap()).unwrap();
        path
    }

    /// A file of the topmost lower.
    pub fn file(&self, path: &str, content: impl AsRef<[u8]>) {
        self.file_in(0, path, content);
    }

    /// A file.
    pub fn file_in(&self, n: usize, path: &str, content: impl AsRef<[u8]>) {
        fs::write(self.path(n, path), content).unwrap();
    }

    /// A directory of the topmost lower.
    pub fn dir(&self, path: &str) {
        self.dir_in(0, path);
    }

    /// A directory.
    pub fn dir_in(&self, n: usize, path: &str) {
        fs::create_dir_all(self.path(n, path)).unwrap();
    }

    /// Another name of a file of the topmost lower.
    pub fn link(&self, from: &str, to: &str) {
        fs::hard_link(self.path(0, from), self.path(0, to)).unwrap();
    }

    /// A whiteout.
    pub fn whiteout(&self, n: usize, path: &str) {
        mknod(&self.path(n, path), SFlag::S_IFCHR, Mode::empty(), 0).unwrap();
    }

    /// An opaque directory.
    pub fn opaque(&self, n: usize, path: &str) {
        self.dir_in(n, path);
        xattr::set(self.path(n, path), OPAQUE, b"y").unwrap();
    }

    /// Makes in `target` what the layers merge to, as plain files.
    pub fn merge_into(&self, target: &Path) {
        for layer in self.lowers().iter().rev() {
            make_room(layer, target);
            let status = Command::new("cp")
                .args(["-a", "--"])
                .arg(layer.join("."))
                .arg(target)
                .status()
                .unwrap();
            assert!(status.success(), "cp of {}", layer.display());
            drop_marks(target);
        }
    }
}

/// Removes from `target` what `layer` hides or replaces.
fn make_room(layer: &Path, target: &Path) {
    let opaque = xattr::get(layer, OPAQUE).unwrap().is_some();
    for entry in fs::read_dir(target).unwrap().flatten() {
        let above = fs::symlink_metadata(layer.join(entry.file_name()));
        let is_dir = entry.file_type().unwrap().is_dir();
        match above {
            Ok(above) if above.is_dir() && is_dir && !opaque => {
                make_room(&layer.join(entry.file_name()), &entry.path());
            }
            Err(_) if !opaque => {}
            _ if is_dir => fs::remove_dir_all(entry.path()).unwrap(),
            _ => fs::remove_file(entry.path()).unwrap(),
        }
    }
}

/// Removes whiteouts and opaque marks that were copied along.
fn drop_marks(target: &Path) {
    if xattr::get(target, OPAQUE).unwrap().is_some() {
        xattr::remove(target, OPAQUE).unwrap();
    }
    for entry in fs::read_dir(target).unwrap().flatten() {
        let m = fs::symlink_metadata(entry.path()).unwrap();
        if m.is_dir() {
            drop_marks(&entry.path());
        } else if m.file_type().is_char_device() && m.rdev() == 0 {
            fs::remove_file(entry.path()).unwrap();
        }
    }
}
