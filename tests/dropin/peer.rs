//! The programs that are compared, and what is compared of a tree.

use std::collections::BTreeMap;
use std::fs;
use std::os::unix::fs::{FileTypeExt, MetadataExt, PermissionsExt};
use std::path::{Path, PathBuf};
use std::process::Command;

use nix::mount::{MntFlags, umount2};

use crate::common::mount::{PLYFS, unmount, wait_until};
use crate::common::snapshot::Snapshot;

const FUSE_OVERLAYFS: &str = "/usr/bin/fuse-overlayfs";

/// A mount program.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Program {
    Plyfs,
    FuseOverlayfs,
    /// Kernel overlayfs, with everything on that plyfs does.
    Kernel,
}

impl Program {
    pub const BOTH: [Self; 2] = [Self::Plyfs, Self::FuseOverlayfs];

    pub fn other(self) -> Self {
        match self {
            Self::Plyfs => Self::FuseOverlayfs,
            Self::FuseOverlayfs | Self::Kernel => Self::Plyfs,
        }
    }

    fn command(self, target: &Path, options: &str) -> Command {
        let mut command = match self {
            Self::Plyfs => Command::new(PLYFS),
            Self::FuseOverlayfs => Command::new(FUSE_OVERLAYFS),
            Self::Kernel => Command::new("mount"),
        };
        command.arg("-o");
        if self == Self::Kernel {
            let on = "redirect_dir=on,index=on,metacopy=on,xino=on";
            command.arg(format!("{options},{on}"));
            command.args(["-t", "overlay", "overlay"]);
        } else {
            command.arg(options);
        }
        command.arg(target);
        command
    }

    /// Runs `body` on a mount that is gone when this returns, and has changed no lower layer.
    pub fn on_mount<T>(self, target: &Path, options: &str, body: impl FnOnce(&Path) -> T) -> T {
        let lowers: Vec<_> = lowers_of(options)
            .map(|lower| (lower, Snapshot::but_access_times(lower)))
            .collect();
        let output = self.command(target, options).output().unwrap();
        assert!(output.status.success(), "{self:?} -o {options}: {output:?}");
        let mount = Mounted(target.to_owned());
        let result = body(target);
        unmount(target);
        std::mem::forget(mount);
        // The server goes on for a moment.
        let text = target.to_str().unwrap().to_owned();
        assert!(
            wait_until(|| !mentions(&text)),
            "{self:?} outlived its mount"
        );
        for (lower, before) in lowers {
            before.assert_same(lower);
        }
        result
    }
}

/// The lower directories that the options name.
fn lowers_of(options: &str) -> impl Iterator<Item = &Path> {
    let lowers = options
        .split(',')
        .filter_map(|word| word.strip_prefix("lowerdir="));
    lowers.flat_map(|list| list.split(':')).map(Path::new)
}

/// Directories for mounts by both programs. fuse-overlayfs moves access times of lower layers, so these are not
/// sealed as [`Layers`](crate::common::Layers) are; [`Program::on_mount`] compares all the rest.
pub struct Dirs(tempfile::TempDir);

impl Dirs {
    pub fn new() -> Self {
        let dirs = Self(
            tempfile::Builder::new()
                .prefix("ply-test.")
                .tempdir()
                .unwrap(),
        );
        fs::set_permissions(dirs.path(""), fs::Permissions::from_mode(0o755)).unwrap();
        for name in ["lower", "upper", "work", "mnt"] {
            fs::create_dir(dirs.path(name)).unwrap();
        }
        dirs
    }

    pub fn path(&self, name: &str) -> PathBuf {
        match name {
            "" => self.0.path().to_owned(),
            name => self.0.path().join(name),
        }
    }

    pub fn lower(&self) -> PathBuf {
        self.path("lower")
    }

    pub fn upper(&self) -> PathBuf {
        self.path("upper")
    }

    pub fn mnt(&self) -> PathBuf {
        self.path("mnt")
    }

    pub fn options(&self) -> String {
        let path = |name| self.path(name).to_str().unwrap().to_owned();
        let (lower, upper, work) = (path("lower"), path("upper"), path("work"));
        format!("lowerdir={lower},upperdir={upper},workdir={work}")
    }
}

struct Mounted(PathBuf);

impl Drop for Mounted {
    fn drop(&mut self) {
        // When the body fails, its message counts.
        let _ = umount2(&self.0, MntFlags::MNT_DETACH);
    }
}

/// Whether a mount program still has this path on its command line.
fn mentions(path: &str) -> bool {
    fs::read_dir("/proc").unwrap().flatten().any(|entry| {
        fs::read(entry.path().join("cmdline")).is_ok_and(|line| {
            let mut words = line.split(|byte| *byte == 0);
            let program = words.next().unwrap_or_default();
            [PLYFS, FUSE_OVERLAYFS]
                .map(str::as_bytes)
                .contains(&program)
                && words.any(|word| word == path.as_bytes())
        })
    })
}

/// Path to what a program sees there; link counts of directories and inode numbers are each mount's own.
pub type Seen = BTreeMap<String, String>;

/// Everything below `dir`, and `dir` itself as "".
pub fn seen(dir: &Path) -> Seen {
    let mut out = Seen::new();
    out.insert(String::new(), describe(dir));
    walk(dir, "", &mut out);
    out
}

fn walk(dir: &Path, prefix: &str, out: &mut Seen) {
    for entry in fs::read_dir(dir).unwrap() {
        let entry = entry.unwrap();
        let path = format!("{prefix}{}", entry.file_name().to_str().unwrap());
        out.insert(path.clone(), describe(&entry.path()));
        if entry.file_type().unwrap().is_dir() {
            walk(&entry.path(), &format!("{path}/"), out);
        }
    }
}

fn describe(path: &Path) -> String {
    let stat = fs::symlink_metadata(path).unwrap();
    let kind = stat.file_type();
    let content = if kind.is_file() {
        format!("{:?}", String::from_utf8_lossy(&fs::read(path).unwrap()))
    } else if kind.is_symlink() {
        format!("-> {:?}", fs::read_link(path).unwrap())
    } else if kind.is_char_device() || kind.is_block_device() {
        format!("device {:x}", stat.rdev())
    } else {
        String::new()
    };
    let links = if kind.is_dir() { 1 } else { stat.nlink() };
    let mut attributes: Vec<String> = xattr::list(path)
        .unwrap()
        .map(|name| {
            let value = xattr::get(path, &name).unwrap().unwrap_or_default();
            format!("{name:?}={:?}", String::from_utf8_lossy(&value))
        })
        .collect();
    attributes.sort();
    format!(
        "{:o} {}:{} {links} {} {content} {attributes:?}",
        stat.mode(),
        stat.uid(),
        stat.gid(),
        if kind.is_dir() { 0 } else { stat.mtime() },
    )
}
