//! What the tests share: a root directory of busybox, a bundle, and a shim that is gone at the end.

use std::fs;
use std::os::unix::fs::symlink;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::OnceLock;
use std::sync::atomic::{AtomicU32, Ordering};

use plywood::runtime::client::{self, ShimClient, ShimReader};
use plywood::runtime::log::{self, LogReader};
use plywood::runtime::oci::OciRuntime;
use plywood::runtime::shim::Config;
use plywood::runtime::wire::{Frame, Reply, Request};
use serde_json::{Value, json};
use tempfile::TempDir;

/// The OCI runtime that works here.
pub fn oci() -> &'static OciRuntime {
    static FOUND: OnceLock<OciRuntime> = OnceLock::new();
    FOUND.get_or_init(|| {
        let scratch = tempfile::tempdir().unwrap();
        OciRuntime::find(None, scratch.path()).unwrap()
    })
}

/// Fills `root` with a static busybox and what a program expects to find.
pub fn fill_root(root: &Path) {
    for dir in ["bin", "etc", "tmp", "proc", "sys", "dev", "root"] {
        fs::create_dir_all(root.join(dir)).unwrap();
    }
    let busybox = ["/bin/busybox", "/usr/bin/busybox"].map(Path::new);
    let busybox = busybox.into_iter().find(|path| path.exists());
    let busybox = busybox.expect("install busybox-static");
    fs::copy(busybox, root.join("bin/busybox")).unwrap();
    let list = Command::new(busybox).arg("--list").output().unwrap();
    for applet in String::from_utf8(list.stdout).unwrap().lines() {
        if applet != "busybox" {
            symlink("busybox", root.join("bin").join(applet)).unwrap();
        }
    }
    fs::write(root.join("etc/passwd"), "root:x:0:0:root:/root:/bin/sh\n").unwrap();
    fs::write(root.join("etc/group"), "root:x:0:\n").unwrap();
}

/// A container on a directory, without plyd.
pub struct Bench {
    dir: TempDir,
    pub config: Config,
}

impl Bench {
    pub fn new(args: &[&str], tty: bool, stdin: bool) -> Self {
        static NEXT: AtomicU32 = AtomicU32::new(0);
        let dir = tempfile::tempdir().unwrap();
        let number = NEXT.fetch_add(1, Ordering::Relaxed);
        let config = Config {
            id: format!("plywood-test-{}-{number}", std::process::id()),
            dir: dir.path().join("data"),
            run_dir: dir.path().join("run"),
            runtime: oci().path.clone(),
            runtime_root: dir.path().join("oci"),
            tty,
            stdin,
        };
        let root = config.dir.join("bundle/rootfs");
        fs::create_dir_all(&root).unwrap();
        fs::create_dir_all(&config.run_dir).unwrap();
        fill_root(&root);
        let bench = Self { dir, config };
        bench.write_spec(args);
        bench
    }

    fn write_spec(&self, args: &[&str]) {
        let mut spec = json!({
            "ociVersion": "1.0.2",
            "process": process(args, self.config.tty),
            "root": {"path": "rootfs"},
            "mounts": [
                {"destination": "/proc", "type": "proc", "source": "proc"},
                {"destination": "/dev", "type": "tmpfs", "source": "tmpfs"},
                {"destination": "/dev/pts", "type": "devpts", "source": "devpts", "options": ["newinstance", "ptmxmode=0666"]},
            ],
            "linux": {
                "cgroupsPath": format!("/plywood/{}", self.config.id),
                "namespaces": [{"type": "pid"}, {"type": "mount"}, {"type": "ipc"}, {"type": "uts"}],
            },
        });
        spec["process"]["terminal"] = self.config.tty.into();
        fs::write(self.config.dir.join("bundle/config.json"), spec.to_string()).unwrap();
    }

    pub async fn launch(&self) {
        client::launch(Path::new(env!("CARGO_BIN_EXE_plyshim")), &self.config)
            .await
            .unwrap();
    }

    pub async fn connect(&self) -> ShimClient {
        ShimClient::connect(&self.config.run_dir).await.unwrap()
    }

    pub async fn start(&self) -> client::Result<Reply> {
        self.connect()
            .await
            .ask(&Request::Start { window: None })
            .await
    }

    /// Starts the container and waits for its exit code.
    pub async fn run(&self) -> i32 {
        self.launch().await;
        let mut waiter = self.connect().await;
        waiter.send(&Request::Wait).await.unwrap();
        self.start().await.unwrap();
        exit_code(waiter.hear().await.unwrap())
    }

    /// Everything in the log.
    pub fn log(&self) -> Collected {
        let mut collected = Collected::default();
        let mut reader = LogReader::open(&self.log_path(), None).unwrap();
        while let Some(record) = reader.next_record().unwrap() {
            collected.add(&record);
        }
        collected
    }

    pub fn log_path(&self) -> PathBuf {
        self.config.dir.join("log")
    }

    /// Waits until the shim has ended.
    pub async fn gone(&self) {
        while ShimClient::connect(&self.config.run_dir).await.is_ok() {
            tokio::time::sleep(std::time::Duration::from_millis(5)).await;
        }
    }
}

impl Drop for Bench {
    fn drop(&mut self) {
        let log = self.dir.path().join("cleanup.log");
        let _ =
            plywood::runtime::oci::command(&self.config.runtime, &self.config.runtime_root, &log)
                .args(["delete", "--force", &self.config.id])
                .output();
    }
}

/// An OCI process.
pub fn process(args: &[&str], tty: bool) -> Value {
    json!({
        "terminal": tty,
        "args": args,
        "cwd": "/",
        "env": ["PATH=/bin", "HOME=/root", "TERM=xterm"],
        "user": {"uid": 0, "gid": 0},
    })
}

/// Output, taken apart.
#[derive(Debug, Default)]
pub struct Collected {
    pub stdout: Vec<u8>,
    pub stderr: Vec<u8>,
    pub exit: Option<i32>,
}

impl Collected {
    fn add(&mut self, record: &log::Record) {
        match record.stream {
            log::Stream::Stdout => self.stdout.extend(&record.data),
            log::Stream::Stderr => self.stderr.extend(&record.data),
        }
    }

    pub fn stdout(&self) -> String {
        String::from_utf8(self.stdout.clone()).unwrap()
    }

    pub fn stderr(&self) -> String {
        String::from_utf8(self.stderr.clone()).unwrap()
    }
}

/// Reads a stream to its end.
pub async fn collect(reader: &mut ShimReader) -> Collected {
    let mut collected = Collected::default();
    while let Some(frame) = reader.next_frame().await.unwrap() {
        match frame {
            Frame::Data(bytes) => collected.add(&log::parse(&bytes).unwrap()),
            message => collected.exit = Some(exit_code(message.message().unwrap())),
        }
    }
    collected
}

pub fn exit_code(reply: Reply) -> i32 {
    match reply {
        Reply::Exit { code, .. } => code,
        other => panic!("{other:?}"),
    }
}
