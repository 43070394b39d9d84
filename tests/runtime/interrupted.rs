//! Whoever makes a container goes away before it is made: nothing of it stays.

use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};

use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;

use crate::common::{BUSYBOX, PLYD, Plyd, until};
use crate::crash::assert_clean;

/// A plyd whose creations of containers stop half-way until they are told to go on.
struct Halting {
    plyd: Plyd,
    dir: tempfile::TempDir,
}

impl Halting {
    fn start() -> Self {
        let dir = tempfile::tempdir().unwrap();
        let shim = dir.path().join("plyshim");
        let script = format!(
            r#"#!/bin/sh
if [ "$1" = lookup ]; then
    : >{dir}/halted
    while [ -e {dir}/halt ]; do sleep 0.02; done
fi
exec {shim} "$@"
"#,
            dir = dir.path().display(),
            shim = Path::new(PLYD).with_file_name("plyshim").display()
        );
        fs::write(&shim, script).unwrap();
        fs::set_permissions(&shim, fs::Permissions::from_mode(0o755)).unwrap();
        let mut command = Command::new(PLYD);
        command.arg("--plyshim").arg(&shim);
        let plyd = Plyd::start_with(command);
        plyd.load_busybox();
        Self { plyd, dir }
    }

    fn file(&self, name: &str) -> PathBuf {
        self.dir.path().join(name)
    }

    /// Begins a command and comes back when plyd is in the middle of its creation.
    fn begin(&self, args: &[&str]) -> Child {
        fs::write(self.file("halt"), "").unwrap();
        let mut command = self.plyd.command();
        command.args(args).args([BUSYBOX, "true"]);
        command.stdout(Stdio::null()).stderr(Stdio::null());
        let child = command.spawn().unwrap();
        until("the creation is under way", || self.file("halted").exists());
        fs::remove_file(self.file("halted")).unwrap();
        assert_ne!(self.roots(), "");
        child
    }

    fn go_on(&self) {
        fs::remove_file(self.file("halt")).unwrap();
    }

    /// The root file systems of containers.
    fn roots(&self) -> String {
        let roots = ["snapshot", "ls", "-q", "--owner", "container"];
        self.plyd.ok(roots)
    }
}

/// Sends the signal until the process has ended; answers its exit code.
fn insist(child: &mut Child, signal: Signal) -> Option<i32> {
    let pid = Pid::from_raw(child.id().try_into().unwrap());
    let mut status = None;
    until("it ends", || {
        kill(pid, signal).unwrap();
        status = child.try_wait().unwrap();
        status.is_some()
    });
    status.unwrap().code()
}

#[test]
fn a_creation_whose_client_goes_away_is_undone() {
    let halting = Halting::start();
    for (args, signal, code) in [
        (&["run", "--rm"][..], Signal::SIGINT, Some(130)),
        (&["run", "--rm"], Signal::SIGKILL, None),
        (&["run", "--rm", "-d"], Signal::SIGTERM, Some(143)),
        (&["run"], Signal::SIGTERM, Some(143)),
        (&["create", "--name", "job"], Signal::SIGINT, None),
    ] {
        let mut child = halting.begin(args);
        assert_eq!(insist(&mut child, signal), code, "{args:?}");
        halting.go_on();
        until("what was made is removed", || halting.roots().is_empty());
        assert_clean(&halting.plyd);
    }
    // The name is free again.
    let made = halting
        .plyd
        .ok(["create", "--name", "job", BUSYBOX, "true"]);
    assert_eq!(made.trim_end().len(), 64);
    halting.plyd.ok(["rm", "job"]);
    assert_clean(&halting.plyd);
}

#[test]
fn one_signal_waits_for_what_is_being_created_and_removes_it() {
    let halting = Halting::start();
    for args in [&["run", "--rm"][..], &["run", "--rm", "-d"]] {
        let mut child = halting.begin(args);
        let pid = child.id();
        kill(Pid::from_raw(pid.try_into().unwrap()), Signal::SIGTERM).unwrap();
        until("snapctl has got it", || {
            let status = fs::read_to_string(format!("/proc/{pid}/status")).unwrap();
            status.contains("ShdPnd:\t0000000000000000")
        });
        halting.go_on();
        let code = child.wait().unwrap().code();
        assert_eq!(code, Some(143), "{args:?}");
        // Nothing is left when it ends, not some time later.
        assert_clean(&halting.plyd);
    }
}
