//! Real programs at work on a plyfs mount over a lower layer that they have to copy up: version
//! control, a database, a package manager, archivers, a build, watchers and locks.
//!
//! What each of them says of its own data is the check; the lower layer is compared afterwards.
#![allow(
    clippy::expect_used,
    clippy::panic,
    clippy::unwrap_used,
    reason = "a test fails by panicking, in its helpers too"
)]

#[path = "../common/mounts.rs"]
mod mounts;

mod archive;
mod build;
mod database;
mod debian;
mod packages;
mod repository;
mod watch;

use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use mounts::{Dirs, Mount};

/// A lower that a test fills, and the mount over it.
struct Ground {
    // In this order: the mount ends before its directories go.
    mount: Option<Mount>,
    dirs: Dirs,
    base: tempfile::TempDir,
    before: String,
}

impl Ground {
    /// Mounts over a lower that the shell `script` fills; it runs in the lower's directory.
    fn new(script: &str) -> Self {
        let base = tempfile::Builder::new()
            .prefix("plywood-programs")
            .tempdir()
            .unwrap();
        let lower = base.path().join("lower");
        std::fs::create_dir(&lower).unwrap();
        sh(&lower, script);
        let before = listing(&lower);
        let dirs = Dirs::make(base.path(), std::slice::from_ref(&lower));
        Self {
            mount: Some(Mount::plyfs(&dirs)),
            dirs,
            base,
            before,
        }
    }

    fn root(&self) -> &Path {
        &self.dirs.mountpoint
    }

    /// A directory beside the mount, on the host's own file system.
    fn outside(&self, name: &str) -> PathBuf {
        let dir = self.base.path().join(name);
        std::fs::create_dir_all(&dir).unwrap();
        dir
    }

    /// Runs a script in the mount; what it prints.
    fn sh(&self, script: &str) -> String {
        sh(self.root(), script)
    }

    fn remount(&mut self) {
        if let Some(mount) = self.mount.take() {
            mount.unmount();
        }
        self.mount = Some(Mount::plyfs(&self.dirs));
    }

    /// Ends the mount and sees that the lower is as it was.
    fn finish(mut self) {
        if let Some(mount) = self.mount.take() {
            mount.unmount();
        }
        assert_eq!(
            listing(&self.dirs.lowers[0]),
            self.before,
            "the lower layer has changed"
        );
    }
}

/// Every file of a tree with its attributes, times and the sum of its content.
fn listing(dir: &Path) -> String {
    sh(
        dir,
        "find . -printf '%p %y %m %U:%G %s %n %T@ %C@ %l\\n' | sort; find . -type f -print0 | sort -z | xargs -0r md5sum",
    )
}

/// Runs a shell script in `dir` and panics with its output unless it succeeds.
fn sh(dir: &Path, script: &str) -> String {
    let mut command = Command::new("bash");
    command
        .args(["-euo", "pipefail", "-c", script])
        .current_dir(dir)
        .env("LC_ALL", "C")
        .env("GIT_CONFIG_GLOBAL", "/dev/null")
        .env("GIT_AUTHOR_NAME", "A")
        .env("GIT_AUTHOR_EMAIL", "a@example.org")
        .env("GIT_COMMITTER_NAME", "A")
        .env("GIT_COMMITTER_EMAIL", "a@example.org")
        .stdin(Stdio::null());
    succeed(&mut command, script)
}

/// What a command that runs `script` prints; panics with it unless the command succeeds.
fn succeed(command: &mut Command, script: &str) -> String {
    let output = command.output().unwrap();
    let text = |bytes: &[u8]| String::from_utf8_lossy(bytes).into_owned();
    assert!(
        output.status.success(),
        "{script}\nended with {}\n{}{}",
        output.status,
        text(&output.stdout),
        text(&output.stderr)
    );
    text(&output.stdout)
}
