//! A file system of its own for a row, in a file.

use std::fs::File;
use std::path::{Path, PathBuf};
use std::process::Command;

use nix::mount::{MntFlags, umount2};

/// What kind.
#[derive(Clone, Copy)]
pub enum Disk {
    /// Small enough to be filled.
    Ext4 { mib: u32 },
    /// With quotas.
    Btrfs,
}

/// One that is mounted over a directory; taken away when dropped.
pub struct Attached {
    target: PathBuf,
}

impl Disk {
    /// Makes and mounts it. Nothing where the host lacks the file system.
    pub fn attach(self, target: &Path) -> Option<Attached> {
        let image = target.with_extension("img");
        let size = match self {
            Self::Ext4 { mib } => u64::from(mib) << 20,
            Self::Btrfs => 128 << 20,
        };
        File::create(&image).unwrap().set_len(size).unwrap();
        let made = match self {
            Self::Ext4 { .. } => run(Command::new("mkfs.ext4").args(["-qF", "-m0"]).arg(&image)),
            Self::Btrfs => run(Command::new("mkfs.btrfs").arg("-q").arg(&image)),
        };
        assert!(made, "mkfs of {}", image.display());
        let mounted = run(Command::new("mount")
            .args(["-o", "loop"])
            .arg(&image)
            .arg(target));
        let attached = mounted.then(|| Attached {
            target: target.to_owned(),
        });
        match self {
            Self::Btrfs if mounted => {
                let enabled = run(Command::new("btrfs").args(["quota", "enable"]).arg(target));
                assert!(enabled, "quotas of {}", target.display());
            }
            _ => {}
        }
        attached
    }
}

impl Drop for Attached {
    fn drop(&mut self) {
        let _ = umount2(&self.target, MntFlags::MNT_DETACH);
    }
}

fn run(command: &mut Command) -> bool {
    let output = command.output().unwrap();
    if !output.status.success() {
        eprintln!("{command:?}: {}", String::from_utf8_lossy(&output.stderr));
    }
    output.status.success()
}
