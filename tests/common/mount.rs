//! A plyfs mount that goes away with its guard, also when the test fails.

use std::ffi::OsStr;
use std::fs;
use std::os::unix::ffi::OsStrExt;
use std::path::{Path, PathBuf};
use std::process::{Command, Output};
use std::time::{Duration, Instant};

use nix::errno::Errno;
use nix::mount::{MntFlags, umount2};
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;

use super::Layers;
pub use super::mode::PLYFS;
use super::mode::{self, Mode};

/// How long anything may take that normally takes an instant.
pub const DEADLINE: Duration = Duration::from_secs(60);

/// A mount and the process behind it.
pub struct Mount {
    path: PathBuf,
    pid: i32,
}

/// Runs plyfs to its end (of the process in front).
pub fn plyfs<S: AsRef<OsStr>>(arguments: &[S]) -> Output {
    mode::plyfs().args(arguments).output().unwrap()
}

impl Mount {
    /// Mounts the layers read-write. `more` are further options, without a leading comma.
    pub fn new(layers: &Layers, more: &str) -> Self {
        Self::with_options(&layers.mnt(), &format!("{},{more}", layers.options()))
    }

    /// Mounts with these options.
    pub fn with_options(target: &Path, options: &str) -> Self {
        Self::started_by(mode::plyfs(), target, options)
    }

    /// As `with_options`, with a control socket at `control`.
    pub fn with_control(target: &Path, options: &str, control: &Path) -> Self {
        let mut plyfs = mode::plyfs();
        plyfs.arg("--control").arg(control);
        Self::started_by(plyfs, target, options)
    }

    /// As `with_options`, by a server that may have no more files open than most shells allow.
    pub fn with_few_files(target: &Path, options: &str) -> Self {
        let plyfs = mode::plyfs();
        let mut limited = Command::new("prlimit");
        limited
            .args(["--nofile=1024:1024".as_ref(), plyfs.get_program()])
            .args(plyfs.get_args());
        Self::started_by(limited, target, options)
    }

    fn started_by(mut plyfs: Command, target: &Path, options: &str) -> Self {
        let mode = Mode::of_run().options_before(options);
        let options = &format!("{mode},{options}");
        let output = plyfs.args(["-o", options]).arg(target).output().unwrap();
        assert!(
            output.status.success() && output.stdout.is_empty() && output.stderr.is_empty(),
            "plyfs -o {options}: {output:?}"
        );
        let pid = server_of(target).expect("a process with the mount point on its command line");
        Self {
            path: target.to_owned(),
            pid,
        }
    }

    /// Something in the mount; "" is its root.
    pub fn join(&self, name: impl AsRef<Path>) -> PathBuf {
        if name.as_ref().as_os_str().is_empty() {
            return self.path.clone();
        }
        self.path.join(name)
    }

    /// The server's process.
    pub fn pid(&self) -> i32 {
        self.pid
    }

    /// Sends the server a signal.
    pub fn signal(&self, signal: Signal) {
        kill(Pid::from_raw(self.pid), signal).unwrap();
    }

    /// Whether the server is gone.
    pub fn wait_for_end(&self) -> bool {
        wait_until(|| !is_alive(self.pid))
    }

    /// Unmounts and waits for the server.
    pub fn unmount(self) {
        unmount(&self.path);
        assert!(self.wait_for_end(), "plyfs outlived its mount");
    }
}

impl Drop for Mount {
    fn drop(&mut self) {
        // Gone already after `unmount`.
        let _ = umount2(&self.path, MntFlags::MNT_DETACH);
        if !self.wait_for_end() {
            let _ = kill(Pid::from_raw(self.pid), Signal::SIGKILL);
        }
    }
}

/// Takes away what is mounted at a place.
pub fn unmount(target: &Path) {
    let unmounted = wait_until(|| match umount2(target, MntFlags::empty()) {
        // A child that another test has just forked has every open file until it runs its program.
        Err(Errno::EBUSY) => false,
        result => {
            result.unwrap();
            true
        }
    });
    assert!(unmounted, "the mount stays busy");
}

/// Waits for something that comes about soon; false when it did not by the deadline.
pub fn wait_until(mut condition: impl FnMut() -> bool) -> bool {
    let deadline = Instant::now() + DEADLINE;
    while !condition() {
        if Instant::now() > deadline {
            return false;
        }
        std::thread::sleep(Duration::from_millis(10));
    }
    true
}

fn is_alive(pid: i32) -> bool {
    match fs::read_to_string(format!("/proc/{pid}/stat")) {
        // A dead process that nobody has waited for yet is none.
        Ok(stat) => !stat
            .rsplit(')')
            .next()
            .unwrap()
            .trim_start()
            .starts_with('Z'),
        Err(_) => false,
    }
}

/// The process that was started with exactly this mount point.
pub fn server_of(target: &Path) -> Option<i32> {
    for entry in fs::read_dir("/proc").unwrap().flatten() {
        let Some(pid) = entry
            .file_name()
            .to_str()
            .and_then(|name| name.parse().ok())
        else {
            continue;
        };
        let Ok(command) = fs::read(entry.path().join("cmdline")) else {
            continue;
        };
        let mut words = command.split(|byte| *byte == 0);
        let is_plyfs = words.next() == Some(PLYFS.as_bytes());
        if is_plyfs && words.any(|word| word == target.as_os_str().as_bytes()) && is_alive(pid) {
            return Some(pid);
        }
    }
    None
}
