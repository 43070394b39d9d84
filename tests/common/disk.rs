//! A file system of its own for a test, in a file.

use std::fs::File;
use std::path::{Path, PathBuf};
use std::process::Command;

use nix::mount::{MntFlags, umount2};

/// What kind.
#[derive(Clone, Copy, Debug)]
pub enum Disk {
    /// Small enough to be filled; that part of it, in hundredths, is kept for root.
    Ext4 { mib: u32, reserved: u32 },
    /// With quotas.
    Btrfs,
    /// It shares content between files.
    Xfs,
}

/// One that is mounted over a directory; taken away when dropped.
pub struct Attached {
    target: PathBuf,
}

impl Disk {
    /// Makes and mounts it. Nothing where the host's kernel lacks the file system.
    pub fn attach(self, target: &Path) -> Option<Attached> {
        let image = target.with_extension("img");
        let size = match self {
            Self::Ext4 { mib, .. } => u64::from(mib) << 20,
            Self::Btrfs => 128 << 20,
            // Smaller ones are not made.
            Self::Xfs => 320 << 20,
        };
        File::create(&image).unwrap().set_len(size).unwrap();
        let made = match self {
            Self::Ext4 { reserved, .. } => run(Command::new("mkfs.ext4")
                .args(["-qF", "-m", &reserved.to_string()])
                .arg(&image)),
            Self::Btrfs => run(Command::new("mkfs.btrfs").arg("-q").arg(&image)),
            Self::Xfs => run(Command::new("mkfs.xfs")
                .args(["-q", "-m", "reflink=1"])
                .arg(&image)),
        };
        assert!(made, "mkfs of {}", image.display());
        let mounted = run(Command::new("mount")
            .args(["-o", "loop"])
            .arg(&image)
            .arg(target));
        assert!(
            mounted || !self.is_in_kernel(),
            "mount of {}",
            image.display()
        );
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

    /// Asked after mount(8) has loaded what there is.
    fn is_in_kernel(self) -> bool {
        let name = match self {
            Self::Ext4 { .. } => "ext4",
            Self::Btrfs => "btrfs",
            Self::Xfs => "xfs",
        };
        let known = std::fs::read_to_string("/proc/filesystems").unwrap();
        known.split_whitespace().any(|word| word == name)
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
