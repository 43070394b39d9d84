//! What is left of a container when its user has heard of its end.

use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::process::Command;

use tempfile::TempDir;

use crate::common::{BUSYBOX, PLYD, Plyd};

/// An OCI runtime whose `start` takes longer than what it has started lives, as on a busy host.
const SLOW: &str = r#"#!/bin/sh
runtime=$(command -v runc || command -v crun)
"$runtime" "$@" || exit
case " $* " in
*" start "*)
    ask=$(echo "$*" | sed 's/ start / state /')
    until "$runtime" $ask | grep -q '"status": "stopped"'; do sleep 0.05; done
    ;;
esac
"#;

#[test]
fn who_hears_of_an_end_finds_the_container_ended_however_late_its_start_is_told() {
    let dir = TempDir::new().unwrap();
    let slow = dir.path().join("slow");
    fs::write(&slow, SLOW).unwrap();
    fs::set_permissions(&slow, fs::Permissions::from_mode(0o755)).unwrap();
    let mut command = Command::new(PLYD);
    command.arg("--oci-runtime").arg(&slow);
    let plyd = Plyd::start_with(command);
    plyd.load_busybox();
    // What is asked next goes over a connection of its own: only what plyd itself knows counts.
    for (program, code) in [("true", 0), ("false", 1), ("nosuch", 127), ("/etc", 126)] {
        for _ in 0..3 {
            let done = plyd.snapctl(["run", "--rm", BUSYBOX, program]);
            let left = plyd.ok(["ps", "-a"]);
            assert_eq!(done.code, code, "{program}: {}", done.stderr);
            assert_eq!(left.lines().count(), 1, "{program}: {left}");
            let roots = plyd.ok(["snapshot", "ls", "-q", "--owner", "container"]);
            assert_eq!(roots, "", "{program}");
        }
    }
    // One that stays has stopped, so it can be removed without force.
    for _ in 0..3 {
        let done = plyd.snapctl(["run", "--name", "job", BUSYBOX, "false"]);
        assert_eq!(done.code, 1, "{}", done.stderr);
        let job = &plyd.json(["inspect", "job"])[0];
        assert_eq!(
            (&job["status"], &job["exit_code"]),
            (&"stopped".into(), &1.into())
        );
        plyd.ok(["rm", "job"]);
    }
}

/// nix has no word for such a signal. The shim could not tell who had died of it, waited for nobody any more, and neither `stop` nor
/// `rm` came to an end.
#[test]
fn a_process_that_dies_of_a_real_time_signal_has_ended_like_others() {
    let plyd = Plyd::start();
    plyd.load_busybox();
    let dies = ["sh", "-c", "kill -34 $$; exit 1"];
    plyd.ok(["run", "-d", "--name", "job", BUSYBOX, "sleep", "1000"]);
    for _ in 0..2 {
        let exec = ["exec", "job"];
        assert_eq!(plyd.snapctl([&exec[..], &dies].concat()).code, 162);
        plyd.ok(["exec", "job", "true"]);
    }
    plyd.ok(["stop", "-t", "1", "job"]);
    plyd.ok(["rm", "job"]);
}
