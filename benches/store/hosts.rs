//! A containerd of the release line that has differs as plugins, with its own overlayfs snapshotter or with plyd.

use std::path::{Path, PathBuf};
use std::process::Command;

use crate::common::{Daemon, Dir, sh, until_ready};

/// Who keeps the layers.
#[derive(Clone, Copy, PartialEq)]
pub enum Keeper {
    /// containerd's overlayfs snapshotter and its own differ.
    Overlayfs,
    /// plyd as snapshotter and differ.
    Plywood,
}

impl Keeper {
    pub fn name(self) -> &'static str {
        match self {
            Self::Overlayfs => "overlayfs",
            Self::Plywood => "plywood",
        }
    }
}

/// A containerd in a directory of its own, and a plyd if it needs one.
pub struct Host {
    keeper: Keeper,
    programs: PathBuf,
    // In the order in which they have to end.
    _containerd: Daemon,
    _plyd: Option<Daemon>,
    dir: Dir,
}

/// Debian trixie's containerd, fetched once.
fn programs(top: &Path) -> Result<PathBuf, String> {
    let files = top.join("target/bench/containerd-trixie");
    if !files.exists() {
        let fetch = top.join("tests/containerd/fetch");
        sh(Command::new(fetch).arg("trixie").arg(&files))?;
    }
    Ok(files.join("usr/bin"))
}

impl Host {
    pub fn start(top: &Path, keeper: Keeper) -> Result<Self, String> {
        let programs = programs(top)?;
        let dir = Dir::new(keeper.name())?;
        let mut config = "version = 2\n".to_owned();
        let mut plyd = None;
        if keeper == Keeper::Plywood {
            plyd = Some(start_plyd(&dir)?);
            let shipped = top.join("contrib/containerd/config-1.7.toml");
            config = std::fs::read_to_string(&shipped)
                .map_err(|e| format!("{}: {e}", shipped.display()))?
                .replace("/run/plywood/plyd.sock", &dir.at("plyd.sock"));
        }
        let places = format!(
            "version = 2\nroot = \"{}\"\nstate = \"{}\"\ndisabled_plugins = [\"io.containerd.grpc.v1.cri\"]",
            dir.at("ctr"),
            dir.at("ctr-state")
        );
        config = config.replacen("version = 2", &places, 1)
            + &format!(
                "\n[grpc]\n  address = \"{}\"\n[ttrpc]\n  address = \"{}\"\n",
                dir.at("ctr.sock"),
                dir.at("ttrpc.sock")
            );
        let path = dir.at("containerd.toml");
        std::fs::write(&path, config).map_err(|e| format!("{path}: {e}"))?;
        let mut command = Command::new(programs.join("containerd"));
        let containerd = Daemon::start(
            command.args(["--config", &path]),
            Path::new(&dir.at("containerd.log")),
        )?;
        let host = Self {
            keeper,
            programs,
            _containerd: containerd,
            _plyd: plyd,
            dir,
        };
        until_ready(|| host.ctr(&["version"]))?;
        // `ctr snapshots unpack` does not know its own --snapshotter.
        let default = format!("containerd.io/defaults/snapshotter={}", keeper.name());
        host.ctr(&["namespaces", "label", "default", &default])?;
        Ok(host)
    }

    fn ctr(&self, args: &[&str]) -> Result<String, String> {
        sh(Command::new(self.programs.join("ctr"))
            .args(["--address", &self.dir.at("ctr.sock")])
            .args(args))
    }

    /// Brings an archive into the content store, without its layers, and answers the digest of its manifest.
    pub fn import(&self, archive: &Path, name: &str) -> Result<String, String> {
        let archive = archive.display().to_string();
        self.ctr(&["images", "import", "--no-unpack", &archive])?;
        let listed = self.ctr(&["images", "ls", &format!("name=={name}")])?;
        let digest = listed
            .split_whitespace()
            .find(|word| word.starts_with("sha256:"));
        digest
            .map(str::to_owned)
            .ok_or_else(|| format!("containerd does not know {name}: {listed}"))
    }

    /// Makes snapshots of an image's layers.
    pub fn unpack(&self, manifest: &str) -> Result<(), String> {
        self.ctr(&["snapshots", "unpack", manifest]).map(drop)
    }

    /// Where the layers are kept.
    pub fn kept(&self) -> String {
        self.dir.at(match self.keeper {
            Keeper::Overlayfs => "ctr/io.containerd.snapshotter.v1.overlayfs",
            Keeper::Plywood => "ply",
        })
    }
}

fn start_plyd(dir: &Dir) -> Result<Daemon, String> {
    let address = format!("unix://{}", dir.at("plyd.sock"));
    let containerd = format!("unix://{}", dir.at("ctr.sock"));
    let mut plyd = Command::new(env!("CARGO_BIN_EXE_plyd"));
    plyd.args(["--root", &dir.at("ply"), "--state", &dir.at("ply-state")])
        .args([
            "--address",
            &address,
            "--containerd-address",
            &containerd,
            "--log-level",
            "warn",
        ]);
    let plyd = Daemon::start(&mut plyd, Path::new(&dir.at("plyd.log")))?;
    until_ready(|| {
        sh(Command::new(env!("CARGO_BIN_EXE_snapctl")).args([
            "--address",
            &address,
            "system",
            "info",
        ]))
    })?;
    Ok(plyd)
}
