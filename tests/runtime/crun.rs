//! crun as the OCI runtime; every other test takes runc where both are installed.

use std::process::Command;

use crate::common::{BUSYBOX, PLYD, Plyd, until};
use crate::crash::{cgroups_of, names};

/// plyd with crun. Debian 12's refuses a host where the cgroup v2 hierarchy beside those of v1 has controllers of its
/// own, so that one is hidden from it, in a mount namespace that only plyd and what it starts are in.
pub fn plyd() -> Plyd {
    let script = "if mountpoint -q /sys/fs/cgroup/unified; then umount /sys/fs/cgroup/unified; fi; exec \"$@\"";
    let mut command = Command::new("unshare");
    command.args(["--mount", "sh", "-ec", script, "sh", PLYD]);
    command.args(["--oci-runtime", "crun"]);
    let plyd = Plyd::start_with(command);
    plyd.load_busybox();
    plyd
}

#[test]
fn crun_runs_a_container() {
    let plyd = plyd();
    let done = plyd.snapctl([
        "run",
        "--rm",
        BUSYBOX,
        "sh",
        "-c",
        "echo out; echo err >&2; exit 7",
    ]);
    assert_eq!(
        (done.code, &*done.stdout, &*done.stderr),
        (7, "out\n", "err\n")
    );
    let info = plyd.json(["system", "info", "--json"]);
    assert!(info.to_string().contains("crun version"), "{info}");
    // Its input, a terminal, a user, a directory.
    let done = plyd.piped(["run", "--rm", "-i", BUSYBOX, "cat"], b"piped");
    assert_eq!((done.code, &*done.stdout), (0, "piped"));
    let done = plyd.snapctl(["run", "--rm", "-t", BUSYBOX, "tty"]);
    assert_eq!((done.code, &*done.stdout), (0, "/dev/pts/0\r\n"));
    let who = "id -u; id -g; pwd";
    let args = [
        "run", "--rm", "-u", "5:6", "-w", "/tmp", BUSYBOX, "sh", "-c", who,
    ];
    assert_eq!(plyd.ok(args), "5\n6\n/tmp\n");

    let script = "echo started; trap 'echo asked; exit 9' TERM; while :; do sleep 0.1; done";
    let id = plyd.ok(["run", "-d", "--name", "job", BUSYBOX, "sh", "-c", script]);
    let done = plyd.snapctl([
        "exec",
        "job",
        "sh",
        "-c",
        "echo inside; touch /made; exit 3",
    ]);
    assert_eq!((done.code, &*done.stdout), (3, "inside\n"));
    assert_eq!(plyd.ok(["exec", "job", "ls", "/made"]), "/made\n");
    assert_eq!(plyd.ok(["exec", "-t", "job", "echo", "there"]), "there\r\n");
    assert_eq!(plyd.snapctl(["exec", "job", "nosuch"]).code, 127);
    until("it has written", || plyd.ok(["logs", "job"]) == "started\n");
    plyd.ok(["kill", "--signal", "TERM", "job"]);
    assert_eq!(plyd.ok(["wait", "job"]), "9\n");
    assert_eq!(plyd.ok(["logs", "job"]), "started\nasked\n");
    plyd.ok(["start", "job"]);
    plyd.ok(["kill", "job"]);
    assert_eq!(plyd.ok(["wait", "job"]), "137\n");
    plyd.ok(["rm", "job"]);

    for (program, code) in [("nosuch", 127), ("/etc", 126), ("/etc/passwd", 126)] {
        let done = plyd.snapctl(["run", "--rm", BUSYBOX, program]);
        assert_eq!(done.code, code, "{program}: {}", done.stderr);
    }
    assert_eq!(plyd.ok(["ps", "-aq"]), "");
    assert_eq!(names(&plyd.state().join("oci")), Vec::<String>::new());
    assert_eq!(cgroups_of(id.trim_end()), Vec::<String>::new());
}
