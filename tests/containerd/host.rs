//! plyd and a containerd that uses it, in directories of their own; gone with everything they started when dropped.

use std::fs::{self, File};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use tempfile::TempDir;

use super::committed::Committed;

/// Runs a program and answers its standard output; anything but success is a panic with what it said.
pub fn sh(program: &str, args: &[&str]) -> String {
    try_sh(program, args).unwrap_or_else(|e| panic!("{e}"))
}

pub fn try_sh(program: &str, args: &[&str]) -> Result<String, String> {
    let mut command = Command::new(program);
    command.args(args);
    output_of(command)
}

fn output_of(mut command: Command) -> Result<String, String> {
    let out = command
        .stdin(Stdio::null())
        .output()
        .map_err(|e| format!("{command:?}: {e}; `make test` installs what the tests need"))?;
    let stdout = String::from_utf8_lossy(&out.stdout).into_owned();
    if out.status.success() {
        return Ok(stdout);
    }
    Err(format!(
        "{command:?}: {}\n{stdout}\n{}",
        out.status,
        String::from_utf8_lossy(&out.stderr)
    ))
}

/// A containerd and the form of its configuration that is shipped for it.
pub struct Release {
    /// Directory of its programs; the host's own ones without.
    pub programs: Option<PathBuf>,
    /// File in contrib/containerd.
    pub config: &'static str,
}

pub struct Host {
    pub dir: PathBuf,
    release: Release,
    plyd: Option<Child>,
    containerd: Option<Child>,
    committed: Committed,
    _temp: TempDir,
}

impl Host {
    /// With the containerd that is installed.
    pub fn start() -> Self {
        Self::start_with(Release {
            programs: None,
            config: "config.toml",
        })
    }

    pub fn start_with(release: Release) -> Self {
        // Short, since paths of Unix sockets are limited to 107 bytes.
        let temp = tempfile::Builder::new()
            .prefix("ply-ctrd-")
            .tempdir_in("/tmp")
            .unwrap();
        let mut host = Self {
            dir: temp.path().to_path_buf(),
            release,
            plyd: None,
            containerd: None,
            committed: Committed::of(&temp.path().join("ply")),
            _temp: temp,
        };
        host.restart_plyd();
        host.start_containerd();
        host
    }

    fn log(&self, name: &str) -> File {
        File::options()
            .create(true)
            .append(true)
            .open(self.dir.join(name))
            .unwrap()
    }

    fn plyd_socket(&self) -> PathBuf {
        self.dir.join("plyd.sock")
    }

    fn containerd_socket(&self) -> PathBuf {
        self.dir.join("containerd.sock")
    }

    pub fn restart_plyd(&mut self) {
        let address = format!("unix://{}", self.plyd_socket().display());
        let child = Command::new(env!("CARGO_BIN_EXE_plyd"))
            .arg("--root")
            .arg(self.dir.join("ply"))
            .arg("--state")
            .arg(self.dir.join("ply-state"))
            .args(["--address", &address])
            .arg("--containerd-address")
            .arg(format!("unix://{}", self.containerd_socket().display()))
            .stdin(Stdio::null())
            .stdout(self.log("plyd.log"))
            .stderr(self.log("plyd.log"))
            .spawn()
            .unwrap();
        self.plyd = Some(child);
        self.until("plyd answers", || {
            self.try_snapctl(&["system", "info"]).is_ok()
        });
    }

    /// kill -9.
    pub fn kill_plyd(&mut self) {
        let mut child = self.plyd.take().unwrap();
        child.kill().unwrap();
        child.wait().unwrap();
    }

    /// The configuration that is shipped, with the paths of this host.
    fn start_containerd(&mut self) {
        let shipped = fs::read_to_string(
            Path::new(env!("CARGO_MANIFEST_DIR"))
                .join("contrib/containerd")
                .join(self.release.config),
        )
        .unwrap();
        let version = shipped.lines().find(|l| l.starts_with("version = "));
        let version = version.unwrap();
        let dir = self.dir.display();
        let config = shipped
            .replace(
                "/run/plywood/plyd.sock",
                self.plyd_socket().to_str().unwrap(),
            )
            .replace(
                "linux/amd64",
                &format!("linux/{}", super::image::architecture()),
            )
            .replace(
                version,
                &format!(
                    "{version}\nroot = \"{dir}/containerd\"\nstate = \"{dir}/containerd-state\""
                ),
            )
            + &format!(
                "\n[grpc]\n  address = \"{}\"\n[ttrpc]\n  address = \"{dir}/ttrpc.sock\"\n",
                self.containerd_socket().display()
            );
        let path = self.dir.join("containerd.toml");
        fs::write(&path, config).unwrap();
        let child = self
            .program("containerd")
            .arg("--config")
            .arg(&path)
            .stdin(Stdio::null())
            .stdout(self.log("containerd.log"))
            .stderr(self.log("containerd.log"))
            .spawn()
            .expect("containerd; `make test` installs it");
        self.containerd = Some(child);
        self.until("containerd answers", || self.try_ctr(&["version"]).is_ok());
    }

    /// A program of the release, which also finds the others of it.
    fn program(&self, name: &str) -> Command {
        let Some(programs) = &self.release.programs else {
            return Command::new(name);
        };
        let mut command = Command::new(programs.join(name));
        let path = std::env::var("PATH").unwrap();
        command.env("PATH", format!("{}:{path}", programs.display()));
        command
    }

    /// Where containerd is, and a namespace: the shim's and runc's state lie below /run by its name.
    fn ctr_args(&self) -> Vec<String> {
        let namespace = self.dir.file_name().unwrap().to_str().unwrap();
        let socket = self.containerd_socket();
        let own = [
            "--address",
            socket.to_str().unwrap(),
            "--namespace",
            namespace,
        ];
        own.map(Into::into).to_vec()
    }

    /// A ctr that runs by itself; what it complains of can be read from it.
    pub fn spawn_ctr(&self, args: &[&str]) -> Child {
        self.program("ctr")
            .args(self.ctr_args())
            .args(args)
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(Stdio::piped())
            .spawn()
            .unwrap()
    }

    /// What ctr writes to its standard output, which is no text.
    pub fn ctr_bytes(&self, args: &[&str]) -> Vec<u8> {
        let mut ctr = self.program("ctr");
        let out = ctr.args(self.ctr_args()).args(args).output().unwrap();
        assert!(
            out.status.success(),
            "{args:?}: {}",
            String::from_utf8_lossy(&out.stderr)
        );
        out.stdout
    }

    pub fn try_ctr(&self, args: &[&str]) -> Result<String, String> {
        let mut ctr = self.program("ctr");
        ctr.args(self.ctr_args()).args(args);
        output_of(ctr).map_err(|e| format!("{e}\nplyd said:\n{}", self.tail("plyd.log")))
    }

    pub fn ctr(&self, args: &[&str]) -> String {
        self.watched(args, |args| self.try_ctr(args))
    }

    pub fn try_snapctl(&self, args: &[&str]) -> Result<String, String> {
        let address = format!("unix://{}", self.plyd_socket().display());
        try_sh(
            env!("CARGO_BIN_EXE_snapctl"),
            &[&["--address", &address][..], args].concat(),
        )
        .map_err(|e| format!("{e}\nplyd said:\n{}", self.tail("plyd.log")))
    }

    pub fn snapctl(&self, args: &[&str]) -> String {
        self.watched(args, |args| self.try_snapctl(args))
    }

    /// Runs a command that must succeed. No layer has changed when an image is to go.
    fn watched(
        &self,
        args: &[&str],
        run: impl FnOnce(&[&str]) -> Result<String, String>,
    ) -> String {
        let of_images = ["image", "images"].contains(&args[0]);
        if of_images && args[1] == "rm" {
            assert!(self.committed.check() > 0, "no layer was looked at");
        }
        let out = run(args).unwrap_or_else(|e| panic!("{e}"));
        if of_images && ["load", "import"].contains(&args[1]) {
            self.committed.remember();
        }
        out
    }

    fn tail(&self, log: &str) -> String {
        let text = fs::read_to_string(self.dir.join(log)).unwrap_or_default();
        let lines: Vec<&str> = text.lines().collect();
        lines[lines.len().saturating_sub(15)..].join("\n")
    }

    /// Waits for something that happens in the background.
    pub fn until(&self, what: &str, mut ready: impl FnMut() -> bool) {
        let deadline = Instant::now() + Duration::from_secs(60);
        while !ready() {
            assert!(
                Instant::now() < deadline,
                "waited for a minute, but not: {what}\nplyd said:\n{}",
                self.tail("plyd.log")
            );
            std::thread::sleep(Duration::from_millis(100));
        }
    }

    /// Keys of the snapshots that containerd sees.
    pub fn snapshots(&self, snapshotter: &str) -> Vec<String> {
        let out = self.ctr(&["snapshots", "--snapshotter", snapshotter, "ls"]);
        out.lines()
            .skip(1)
            .filter_map(|l| l.split_whitespace().next())
            .map(Into::into)
            .collect()
    }

    /// Chain id of an image's topmost layer.
    pub fn chain_id(&self, image: &str) -> String {
        let config = super::image::config_of(
            &self.ctr(&["images", "ls", &format!("name=={image}")]),
            |digest| self.ctr(&["content", "get", digest]),
        );
        super::image::chain_id(&config)
    }

    /// Mounts a snapshot on a committed one and answers where. Not a view: ctr protects only what it prepares from
    /// containerd's collector.
    pub fn look_into(&self, snapshotter: &str, parent: &str) -> PathBuf {
        let target = self.dir.join(format!("look-{snapshotter}"));
        fs::create_dir_all(&target).unwrap();
        let script = self.ctr(&[
            "snapshots",
            "--snapshotter",
            snapshotter,
            "prepare",
            "--target",
            target.to_str().unwrap(),
            "look",
            parent,
        ]);
        sh("sh", &["-ec", &script]);
        target
    }

    pub fn look_away(&self, snapshotter: &str, target: &Path) {
        // A child that another test has just forked has every open file until it runs its program.
        self.until("the mount is not busy", || {
            nix::mount::umount(target).is_ok()
        });
        self.ctr(&["snapshots", "--snapshotter", snapshotter, "rm", "look"]);
    }

    /// How many entries a directory below plyd's root has.
    pub fn stored(&self, dir: &str) -> usize {
        fs::read_dir(self.dir.join("ply").join(dir))
            .unwrap()
            .count()
    }

    /// What is in a directory below plyd's root.
    pub fn files(&self, dir: &str) -> Vec<PathBuf> {
        fs::read_dir(self.dir.join("ply").join(dir))
            .unwrap()
            .map(|entry| entry.unwrap().path())
            .collect()
    }

    /// The plyfs processes of this plyd.
    pub fn plyfs(&self) -> Vec<i32> {
        let here = self.dir.to_string_lossy().into_owned();
        let pids = fs::read_dir("/proc").unwrap().flatten();
        let pids = pids.filter_map(|entry| entry.file_name().to_str()?.parse().ok());
        pids.filter(|pid: &i32| {
            let file = |name: &str| fs::read(format!("/proc/{pid}/{name}")).unwrap_or_default();
            file("comm").starts_with(b"plyfs")
                && String::from_utf8_lossy(&file("cmdline")).contains(&here)
        })
        .collect()
    }

    pub fn log_of_plyd(&self) -> String {
        fs::read_to_string(self.dir.join("plyd.log")).unwrap()
    }

    /// Everything that is mounted below this host's directory.
    pub fn mounts(&self) -> Vec<String> {
        let prefix = format!("{}/", self.dir.display());
        let text = fs::read_to_string("/proc/self/mountinfo").unwrap();
        text.lines()
            .filter_map(|l| l.split_whitespace().nth(4))
            .filter(|m| m.starts_with(&prefix))
            .map(Into::into)
            .collect()
    }

    /// Mounts that plyd keeps.
    pub fn plyd_mounts(&self) -> Vec<String> {
        let state = format!("{}/", self.dir.join("ply-state").display());
        self.mounts()
            .into_iter()
            .filter(|m| m.starts_with(&state))
            .collect()
    }
}

impl Drop for Host {
    fn drop(&mut self) {
        if std::thread::panicking() {
            for log in ["plyd.log", "containerd.log"] {
                eprintln!("--- {log}\n{}", self.tail(log));
            }
        }
        for child in [&mut self.containerd, &mut self.plyd].into_iter().flatten() {
            let pid = nix::unistd::Pid::from_raw(child.id() as i32);
            let _ = nix::sys::signal::kill(pid, nix::sys::signal::Signal::SIGTERM);
            let _ = child.wait();
        }
        // Shims, their containers and plyfs processes name this directory on their command lines.
        let needle = self.dir.to_string_lossy().into_owned();
        for entry in fs::read_dir("/proc").into_iter().flatten().flatten() {
            let Some(pid) = entry
                .file_name()
                .to_str()
                .and_then(|n| n.parse::<i32>().ok())
            else {
                continue;
            };
            let line = fs::read(entry.path().join("cmdline")).unwrap_or_default();
            if pid != std::process::id() as i32 && String::from_utf8_lossy(&line).contains(&needle)
            {
                let _ = nix::sys::signal::kill(
                    nix::unistd::Pid::from_raw(pid),
                    nix::sys::signal::Signal::SIGKILL,
                );
            }
        }
        for mount in self.mounts().into_iter().rev() {
            let _ = nix::mount::umount2(mount.as_str(), nix::mount::MntFlags::MNT_DETACH);
        }
        // What runc and the shim leave when they are killed.
        let runc = Path::new("/run/containerd/runc").join(self.dir.file_name().unwrap_or_default());
        let _ = fs::remove_dir_all(runc);
        if !std::thread::panicking() {
            self.committed.check();
        }
    }
}
