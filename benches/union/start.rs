//! `snapctl run --rm` of `true` beside `ctr run --rm` on containerd's overlayfs snapshotter, in turns.

use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use super::median;
use super::systems::sh;

const IMAGE: &str = "localhost/busybox:latest";

/// A daemon that ends in order when dropped.
struct Daemon(Child);

impl Drop for Daemon {
    fn drop(&mut self) {
        let _ = sh(Command::new("kill").arg(self.0.id().to_string()));
        let _ = self.0.wait();
    }
}

fn daemon(command: &mut Command, log: &Path) -> Result<Daemon, String> {
    let log = std::fs::File::create(log).map_err(|e| format!("{}: {e}", log.display()))?;
    let child = command
        .stdin(Stdio::null())
        .stdout(log.try_clone().map_err(|e| e.to_string())?)
        .stderr(log)
        .spawn()
        .map_err(|e| format!("{command:?}: {e}"))?;
    Ok(Daemon(child))
}

/// Repeats `ask` until it is answered.
fn until_ready(mut ask: impl FnMut() -> Result<String, String>) -> Result<(), String> {
    let deadline = Instant::now() + Duration::from_secs(30);
    loop {
        match ask() {
            Ok(_) => return Ok(()),
            Err(e) if Instant::now() > deadline => return Err(e),
            Err(_) => std::thread::sleep(Duration::from_millis(100)),
        }
    }
}

/// The directory of both daemons; its name is short, for the paths of sockets.
struct Dir(PathBuf);

impl Drop for Dir {
    fn drop(&mut self) {
        let _ = sh(Command::new("rm")
            .args(["-rf", "--one-file-system"])
            .arg(&self.0));
    }
}

/// Starts both daemons, loads the image into both and prints how long a container takes.
pub fn run(rounds: usize) -> Result<(), String> {
    let dir = Dir(PathBuf::from(format!(
        "/tmp/ply-start-{}",
        std::process::id()
    )));
    std::fs::create_dir(&dir.0).map_err(|e| format!("{}: {e}", dir.0.display()))?;
    let at = |name: &str| dir.0.join(name).display().to_string();
    let archive = at("busybox.tar");
    let maker = Path::new(env!("CARGO_MANIFEST_DIR")).join("contrib/busybox-archive");
    sh(Command::new(maker).args([&archive, IMAGE]))?;

    let address = format!("unix://{}", at("plyd.sock"));
    let mut plyd = Command::new(env!("CARGO_BIN_EXE_plyd"));
    plyd.args([
        "--root",
        &at("ply"),
        "--state",
        &at("ply-state"),
        "--address",
        &address,
    ]);
    let _plyd = daemon(&mut plyd, Path::new(&at("plyd.log")))?;
    let snapctl = |args: &[&str]| {
        let program = env!("CARGO_BIN_EXE_snapctl");
        sh(Command::new(program)
            .args(["--address", &address])
            .args(args))
    };
    until_ready(|| snapctl(&["system", "info"]))?;
    snapctl(&["image", "load", "--quiet", "-i", &archive])?;

    let config = at("containerd.toml");
    let text = format!(
        "version = 2\nroot = \"{}\"\nstate = \"{}\"\ndisabled_plugins = [\"io.containerd.grpc.v1.cri\"]\n\
         [grpc]\n  address = \"{}\"\n[ttrpc]\n  address = \"{}\"\n",
        at("ctr"),
        at("ctr-state"),
        at("ctr.sock"),
        at("ttrpc.sock")
    );
    std::fs::write(&config, text).map_err(|e| format!("{config}: {e}"))?;
    let _containerd = daemon(
        Command::new("containerd").args(["--config", &config]),
        Path::new(&at("containerd.log")),
    )?;
    let ctr = |args: &[&str]| {
        sh(Command::new("ctr")
            .args(["--address", &at("ctr.sock")])
            .args(args))
    };
    until_ready(|| ctr(&["version"]))?;
    ctr(&["images", "import", "--snapshotter", "overlayfs", &archive])?;

    let (mut ours, mut theirs) = (Vec::new(), Vec::new());
    for _ in 0..rounds {
        let start = Instant::now();
        snapctl(&["run", "--rm", IMAGE, "true"])?;
        ours.push(start.elapsed().as_secs_f64());
        let start = Instant::now();
        ctr(&[
            "run",
            "--rm",
            "--snapshotter",
            "overlayfs",
            IMAGE,
            "bench",
            "true",
        ])?;
        theirs.push(start.elapsed().as_secs_f64());
    }
    snapctl(&["image", "rm", IMAGE])?;
    println!(
        "\nA container of busybox that runs `true`, median of {rounds}: snapctl run --rm {:.0} ms, ctr run --rm on \
         overlayfs {:.0} ms, ratio {:.2}",
        median(&ours) * 1e3,
        median(&theirs) * 1e3,
        median(&ours) / median(&theirs)
    );
    Ok(())
}
