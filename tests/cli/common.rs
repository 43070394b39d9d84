//! A plyd of a test's own, and snapctl to talk to it.
#![allow(
    dead_code,
    reason = "each test binary uses its own part of what they share"
)]

use std::ffi::OsStr;
use std::fs;
use std::io::Write;
use std::os::unix::ffi::{OsStrExt, OsStringExt};
use std::os::unix::process::ExitStatusExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Output, Stdio};
use std::sync::{Arc, OnceLock};
use std::thread::sleep;
use std::time::{Duration, Instant};

use nix::errno::Errno;
use nix::mount::{MntFlags, umount2};
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use tempfile::TempDir;

#[path = "../common/committed.rs"]
pub mod committed;
#[path = "../common/snapshot.rs"]
pub mod snapshot;

use committed::Committed;

/// How long anything may take before a test gives up; nothing is measured by it.
pub const PATIENCE: Duration = Duration::from_secs(60);

/// The program under test.
pub const PLYD: &str = env!("CARGO_BIN_EXE_plyd");

/// The name that [`Plyd::load_busybox`] gives to its image.
pub const BUSYBOX: &str = "localhost/busybox:latest";

/// A running plyd. When it is dropped its containers, processes, mounts and files are gone, and every
/// layer that was committed is as it was.
pub struct Plyd {
    dir: TempDir,
    child: Option<Child>,
    committed: Arc<Committed>,
}

impl Plyd {
    /// Starts plyd on an empty root and waits until it answers.
    pub fn start() -> Self {
        Self::start_with(Command::new(PLYD))
    }

    /// As `start`, with more arguments, or by a program that takes plyd's command line as arguments.
    pub fn start_with(command: Command) -> Self {
        Self::start_on(|_| {}, command)
    }

    /// As `start_with`, once `prepare` has made what is to be there first, of which it is told the root.
    pub fn start_on(prepare: impl FnOnce(&Path), command: Command) -> Self {
        // Short: a socket's path has 107 bytes at most.
        let dir = tempfile::Builder::new().prefix("ply-").tempdir().unwrap();
        prepare(&dir.path().join("root"));
        let committed = Arc::new(Committed::of(&dir.path().join("root")));
        let mut plyd = Self {
            dir,
            child: None,
            committed,
        };
        plyd.launch_with(command);
        plyd
    }

    /// The directory that everything of it lies in.
    pub fn dir(&self) -> &Path {
        self.dir.path()
    }

    /// Where it keeps what lasts.
    pub fn root(&self) -> PathBuf {
        self.dir().join("root")
    }

    /// Where it keeps what a reboot ends.
    pub fn state(&self) -> PathBuf {
        self.dir().join("state")
    }

    /// Its committed layers, none of which may change.
    pub fn committed(&self) -> Arc<Committed> {
        Arc::clone(&self.committed)
    }

    /// The address of its socket.
    pub fn address(&self) -> String {
        format!("unix://{}", self.dir().join("s").display())
    }

    /// What it has logged.
    pub fn log(&self) -> String {
        String::from_utf8_lossy(&fs::read(self.dir().join("log")).unwrap_or_default()).into_owned()
    }

    /// Starts it (again) and waits until it answers.
    pub fn launch(&mut self) {
        self.launch_with(Command::new(PLYD));
    }

    /// As `launch`, by another command.
    pub fn launch_with(&mut self, mut command: Command) {
        let log = fs::File::options()
            .create(true)
            .append(true)
            .open(self.dir().join("log"))
            .unwrap();
        let child = command
            .args(["--root".as_ref(), self.root().as_os_str()])
            .args(["--state".as_ref(), self.state().as_os_str()])
            .args(["--address", &self.address()])
            .stdin(Stdio::null())
            .stdout(log.try_clone().unwrap())
            .stderr(log)
            .spawn()
            .unwrap();
        self.child = Some(child);
        let deadline = Instant::now() + PATIENCE;
        while self.snapctl(["system", "info"]).code != 0 {
            let ended = self.child.as_mut().unwrap().try_wait().unwrap();
            assert!(
                ended.is_none() && Instant::now() < deadline,
                "plyd does not answer ({ended:?}):\n{}",
                self.log()
            );
            sleep(Duration::from_millis(20));
        }
    }

    /// Its process id.
    pub fn pid(&self) -> u32 {
        self.child.as_ref().unwrap().id()
    }

    /// Sends it a signal and waits for its end.
    pub fn signal(&mut self, signal: Signal) -> std::process::ExitStatus {
        let mut child = self.child.take().expect("plyd runs");
        kill(pid_of(&child), signal).unwrap();
        wait_for(&mut child).unwrap_or_else(|| {
            child.kill().unwrap();
            panic!("plyd does not end on {signal}:\n{}", self.log())
        })
    }

    /// A snapctl command that talks to it.
    pub fn command(&self) -> Command {
        let mut command = Command::new(env!("CARGO_BIN_EXE_snapctl"));
        command.env("PLYWOOD_ADDRESS", self.address());
        command.stdin(Stdio::null());
        command
    }

    /// Runs snapctl to its end.
    pub fn snapctl<S: AsRef<OsStr>>(&self, args: impl IntoIterator<Item = S>) -> Done {
        let args: Vec<_> = args.into_iter().map(|a| a.as_ref().to_owned()).collect();
        let first = |words: [&str; 2]| args.iter().take(2).eq(words);
        if first(["image", "rm"]) || first(["snapshot", "rm"]) {
            self.committed.check();
        }
        let done = Done::from(self.command().args(&args).output().unwrap());
        if done.code == 0 && (first(["image", "load"]) || first(["snapshot", "commit"])) {
            self.committed.remember();
        }
        done
    }

    /// Runs snapctl, which must succeed, and returns its stdout.
    pub fn ok<S: AsRef<OsStr>>(&self, args: impl IntoIterator<Item = S>) -> String {
        let args: Vec<_> = args.into_iter().map(|a| a.as_ref().to_owned()).collect();
        let done = self.snapctl(&args);
        assert_eq!(done.code, 0, "{args:?}: {}\n{}", done.stderr, self.log());
        done.stdout
    }

    /// Has snapctl take a mount away.
    pub fn umount(&self, dir: impl AsRef<OsStr>) {
        let dir = dir.as_ref();
        until("the mount is taken away", || {
            let done = self.snapctl(["umount".as_ref(), dir]);
            // As for `unmount`.
            let is_busy = done.stderr.contains("Device or resource busy");
            assert!(done.code == 0 || is_busy, "{done:?}");
            done.code == 0
        });
    }

    /// Runs snapctl with `input` as its stdin.
    pub fn piped<S: AsRef<OsStr>>(&self, args: impl IntoIterator<Item = S>, input: &[u8]) -> Done {
        let mut child = self
            .command()
            .args(args)
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .spawn()
            .unwrap();
        let mut stdin = child.stdin.take().unwrap();
        let input = input.to_vec();
        let writer = std::thread::spawn(move || {
            // A command that ends early does not read everything.
            let _ignored = stdin.write_all(&input);
        });
        let output = child.wait_with_output().unwrap();
        writer.join().unwrap();
        Done::from(output)
    }

    /// Runs snapctl, which must succeed, and parses the JSON that it prints.
    pub fn json<S: AsRef<OsStr>>(&self, args: impl IntoIterator<Item = S>) -> serde_json::Value {
        serde_json::from_str(&self.ok(args)).unwrap()
    }

    /// Loads the busybox image as [`BUSYBOX`].
    pub fn load_busybox(&self) {
        self.ok([
            OsStr::new("image"),
            "load".as_ref(),
            "-qi".as_ref(),
            busybox_archive().as_ref(),
        ]);
    }
}

impl Drop for Plyd {
    fn drop(&mut self) {
        if self.child.is_some() {
            let ids = self.snapctl(["ps", "-aq"]).stdout;
            if !ids.is_empty() {
                self.snapctl(["rm", "-f"].into_iter().chain(ids.lines()));
            }
        }
        if let Some(mut child) = self.child.take() {
            let _ended = kill(pid_of(&child), Signal::SIGTERM);
            if wait_for(&mut child).is_none() {
                let _ended = child.kill();
                let _ended = child.wait();
            }
        }
        sweep(self.dir.path());
        if std::thread::panicking() {
            eprintln!("plyd's log:\n{}", self.log());
        } else {
            self.committed.check();
        }
    }
}

fn pid_of(child: &Child) -> Pid {
    Pid::from_raw(child.id().try_into().unwrap())
}

/// Waits for a process to end; `None` when it does not.
pub fn wait_for(child: &mut Child) -> Option<std::process::ExitStatus> {
    let deadline = Instant::now() + PATIENCE;
    while Instant::now() < deadline {
        if let Some(status) = child.try_wait().unwrap() {
            return Some(status);
        }
        sleep(Duration::from_millis(10));
    }
    None
}

/// Waits until `condition` holds.
pub fn until(what: &str, mut condition: impl FnMut() -> bool) {
    let deadline = Instant::now() + PATIENCE;
    while !condition() {
        assert!(Instant::now() < deadline, "waited in vain: {what}");
        sleep(Duration::from_millis(20));
    }
}

/// Ends the processes whose command lines name `dir`, and takes away the mounts below it.
fn sweep(dir: &Path) {
    for entry in fs::read_dir("/proc").unwrap().flatten() {
        let name = entry.file_name();
        let Some(pid) = name.to_str().and_then(|name| name.parse::<i32>().ok()) else {
            continue;
        };
        let line = fs::read(entry.path().join("cmdline")).unwrap_or_default();
        let needle = dir.as_os_str().as_bytes();
        let ours = line.windows(needle.len()).any(|window| window == needle);
        if ours && pid != i32::try_from(std::process::id()).unwrap() {
            let _gone = kill(Pid::from_raw(pid), Signal::SIGKILL);
        }
    }
    for mount in mounts_below(dir).iter().rev() {
        let _gone = umount2(mount, MntFlags::MNT_DETACH);
    }
}

/// The mount points below `dir`, parents first.
pub fn mounts_below(dir: &Path) -> Vec<PathBuf> {
    let table = fs::read("/proc/self/mountinfo").unwrap();
    let mut mounts: Vec<PathBuf> = table
        .split(|byte| *byte == b'\n')
        .filter_map(|line| line.split(|byte| *byte == b' ').nth(4))
        .map(|path| PathBuf::from(std::ffi::OsString::from_vec(path.to_vec())))
        .filter(|path| path.starts_with(dir))
        .collect();
    mounts.sort();
    mounts
}

/// What a command came to.
#[derive(Debug)]
pub struct Done {
    /// Exit code; 128+n after signal n.
    pub code: i32,
    /// What it printed.
    pub stdout: String,
    /// What it complained of.
    pub stderr: String,
    /// What it printed, byte by byte.
    pub bytes: Vec<u8>,
}

impl From<Output> for Done {
    fn from(output: Output) -> Self {
        let status = output.status;
        let code = status.code().or(status.signal().map(|n| 128 + n));
        Self {
            code: code.unwrap(),
            stdout: String::from_utf8_lossy(&output.stdout).into_owned(),
            stderr: String::from_utf8_lossy(&output.stderr).into_owned(),
            bytes: output.stdout,
        }
    }
}

/// Takes away what is mounted at a place.
pub fn unmount(target: &Path) {
    until("the mount is not busy", || {
        match umount2(target, MntFlags::empty()) {
            // A child that another test has just forked has every open file until it runs its program.
            Err(Errno::EBUSY) => false,
            result => {
                result.unwrap();
                true
            }
        }
    });
}

/// An OCI archive of busybox: two layers, the second with a whiteout of `/etc/first-layer-only`.
pub fn busybox_archive() -> &'static Path {
    static ARCHIVE: OnceLock<PathBuf> = OnceLock::new();
    ARCHIVE.get_or_init(|| {
        // Test binaries may run at the same time: each writes its own file, then they agree on one.
        let dir = Path::new(env!("CARGO_TARGET_TMPDIR"));
        let own = dir.join(format!("busybox.{}", std::process::id()));
        let script = concat!(env!("CARGO_MANIFEST_DIR"), "/contrib/busybox-archive");
        let done = Command::new(script).arg(&own).arg(BUSYBOX).status();
        assert!(done.unwrap().success());
        let path = dir.join("busybox.tar");
        fs::rename(&own, &path).unwrap();
        path
    })
}
