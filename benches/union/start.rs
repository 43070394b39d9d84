//! `snapctl run --rm` of `true` beside `ctr run --rm` on containerd's overlayfs snapshotter, in turns.

use std::path::Path;
use std::process::Command;
use std::time::Instant;

use super::common::{Daemon, Dir, median, sh, until_ready};

const IMAGE: &str = "localhost/busybox:latest";

/// Starts both daemons, loads the image into both and prints how long a container takes.
pub fn run(rounds: usize) -> Result<(), String> {
    let dir = Dir::new("start")?;
    let at = |name: &str| dir.at(name);
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
    let _plyd = Daemon::start(&mut plyd, Path::new(&at("plyd.log")))?;
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
    let _containerd = Daemon::start(
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
