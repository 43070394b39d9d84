//! Unions mounted by plyfs and by kernel overlayfs, for tests that compare the two; they end with the
//! test, whatever happens.
#![allow(dead_code, reason = "each test program uses a part of it")]

use std::fs;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Stdio};
use std::time::{Duration, Instant};

use nix::mount::{MntFlags, MsFlags, mount, umount2};

#[path = "mode.rs"]
pub mod mode;

const DEADLINE: Duration = Duration::from_secs(60);

/// The directories of one union: shared lowers, and an upper of its own.
#[derive(Clone, Debug)]
pub struct Dirs {
    pub lowers: Vec<PathBuf>,
    pub upper: PathBuf,
    pub work: PathBuf,
    pub mountpoint: PathBuf,
    /// More options for plyfs, with a comma before each.
    pub profile: &'static str,
    /// The upper is left out.
    pub is_read_only: bool,
}

impl Dirs {
    /// Makes an empty upper, a work directory and a mount point below `base`.
    pub fn make(base: &Path, lowers: &[PathBuf]) -> Self {
        let dirs = Self {
            lowers: lowers.to_vec(),
            upper: base.join("upper"),
            work: base.join("work"),
            mountpoint: base.join("mnt"),
            profile: "",
            is_read_only: false,
        };
        for dir in [base, &dirs.upper, &dirs.work, &dirs.mountpoint] {
            fs::create_dir_all(dir).unwrap();
        }
        dirs
    }

    fn options(&self) -> String {
        let lowers: Vec<&str> = self
            .lowers
            .iter()
            .map(|dir| dir.to_str().unwrap())
            .collect();
        if self.is_read_only {
            return format!("lowerdir={}", lowers.join(":"));
        }
        format!(
            "lowerdir={},upperdir={},workdir={}",
            lowers.join(":"),
            self.upper.display(),
            self.work.display()
        )
    }
}

/// A mounted union.
pub struct Mount {
    dirs: Dirs,
    daemon: Option<Child>,
}

impl Mount {
    /// Mounts by kernel overlayfs with every feature that Plywood answers for. It makes no metacopies of its
    /// own: when it opens one for writing, it moves the time of the last change, which no open may do.
    pub fn kernel(dirs: &Dirs) -> Self {
        let has_metacopies = rustix::fs::getxattr(
            &dirs.upper,
            "trusted.overlay.plywood.metacopies",
            &mut [0; 8],
        );
        let options = format!(
            "{},redirect_dir=on,index=on,xino=on,metacopy={}",
            dirs.options(),
            if has_metacopies.is_ok() { "on" } else { "off" }
        );
        let start = Instant::now();
        loop {
            let flags = MsFlags::empty();
            let kind = Some("overlay");
            match mount(kind, &dirs.mountpoint, kind, flags, Some(options.as_str())) {
                Ok(()) => break,
                // A mount namespace that somebody made meanwhile may keep the last mount for a moment.
                Err(nix::Error::EBUSY) if start.elapsed() < DEADLINE => {
                    std::thread::sleep(Duration::from_millis(10));
                }
                Err(errno) => panic!("kernel overlayfs does not mount {options}: {errno}"),
            }
        }
        Self {
            dirs: dirs.clone(),
            daemon: None,
        }
    }

    /// Mounts by plyfs, in front so that its end can be awaited.
    pub fn plyfs(dirs: &Dirs) -> Self {
        let outside = fs::metadata(&dirs.mountpoint).unwrap().dev();
        let mut daemon = mode::plyfs()
            .arg("-f")
            .args(["-o", mode::Mode::of_run().options_before(dirs.profile)])
            .args(["-o", &(dirs.options() + dirs.profile)])
            .arg(&dirs.mountpoint)
            .stdin(Stdio::null())
            .spawn()
            .unwrap();
        let start = Instant::now();
        while fs::metadata(&dirs.mountpoint).unwrap().dev() == outside {
            if let Some(status) = daemon.try_wait().unwrap() {
                panic!("plyfs ended instead of mounting: {status}");
            }
            assert!(start.elapsed() < DEADLINE, "plyfs does not mount");
            std::thread::sleep(Duration::from_millis(2));
        }
        Self {
            dirs: dirs.clone(),
            daemon: Some(daemon),
        }
    }

    pub fn root(&self) -> &Path {
        &self.dirs.mountpoint
    }

    /// Unmounts and waits until nothing holds the directories any more.
    pub fn unmount(mut self) {
        let start = Instant::now();
        while let Err(errno) = umount2(&self.dirs.mountpoint, MntFlags::empty()) {
            assert!(
                errno == nix::Error::EBUSY && start.elapsed() < DEADLINE,
                "cannot unmount: {errno}"
            );
            std::thread::sleep(Duration::from_millis(2));
        }
        let Some(mut daemon) = self.daemon.take() else {
            return;
        };
        let status = loop {
            if let Some(status) = daemon.try_wait().unwrap() {
                break status;
            }
            if start.elapsed() > DEADLINE {
                let _ = daemon.kill();
                panic!("plyfs goes on after its mount has ended");
            }
            std::thread::sleep(Duration::from_millis(2));
        };
        assert!(status.success(), "plyfs ended with {status}");
    }
}

impl Drop for Mount {
    fn drop(&mut self) {
        // After `unmount` there is nothing here any more.
        let _ = umount2(&self.dirs.mountpoint, MntFlags::MNT_DETACH);
        if let Some(mut daemon) = self.daemon.take() {
            let _ = daemon.kill();
            let _ = daemon.wait();
        }
    }
}

/// A tmpfs, for layers on a second file system.
pub struct Tmpfs(PathBuf);

impl Tmpfs {
    pub fn mount(at: &Path) -> Self {
        fs::create_dir(at).unwrap();
        let options = Some("mode=755,size=64m");
        mount(Some("tmpfs"), at, Some("tmpfs"), MsFlags::empty(), options).unwrap();
        Self(at.to_owned())
    }

    pub fn path(&self) -> &Path {
        &self.0
    }
}

impl Drop for Tmpfs {
    fn drop(&mut self) {
        let _ = umount2(&self.0, MntFlags::MNT_DETACH);
    }
}

/// Ends the FUSE connection of the mount at `root`, so that whoever hangs in it gets an error.
pub fn abort(root: &Path) {
    let mountinfo = fs::read_to_string("/proc/self/mountinfo").unwrap_or_default();
    let line = mountinfo
        .lines()
        .find(|line| line.split(' ').nth(4) == root.to_str());
    let minor = line.and_then(|line| line.split(' ').nth(2)?.split(':').nth(1));
    if let Some(minor) = minor {
        let _ = fs::write(format!("/sys/fs/fuse/connections/{minor}/abort"), "1");
    }
}
