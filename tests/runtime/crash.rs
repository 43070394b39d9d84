//! plyd and plyshim are killed at any moment; what runs goes on, what is lost is said, nothing stays.
//!
//! Each of the three processes is killed with -9 in the middle of each of four operations; after that the
//! state is consistent, nothing is left, and the operation is repeated. Where that is tested:
//!
//! - import: plyfs in `containerd/crash` and `snapshots/crash`, plyd in `containerd/crash` and, for `snapctl
//!   image load`, which unpacks without a plyfs, in `image/service`; no plyshim takes part in one;
//! - commit: plyfs and plyd in `snapshots/commit`; no plyshim takes part in one, for a container's root is not
//!   committed;
//! - run: all three here;
//! - removal: all three here, of snapshots plyfs and plyd in `snapshots/crash`.

use std::fs;
use std::io::Read;
use std::path::Path;
use std::process::Stdio;
use std::time::{Duration, Instant};

use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;

use crate::common::{BUSYBOX, PATIENCE, Plyd, mounts_below, until, wait_for};

fn plyd() -> Plyd {
    let plyd = Plyd::start();
    plyd.load_busybox();
    plyd
}

/// Nothing of any container is left, or will be soon: no process, mount, cgroup, or state of the OCI runtime.
pub fn assert_clean(plyd: &Plyd) {
    assert_eq!(plyd.ok(["ps", "-aq"]), "");
    // A container no longer exists before all that was its own is cleared away.
    until("no root is left", || {
        plyd.ok(["snapshot", "ls", "-q", "--owner", "container"])
            .is_empty()
    });
    until("no mount is left", || mounts_below(plyd.dir()).is_empty());
    until("the shims have ended", || shims(plyd).is_empty());
    for place in ["root/containers", "state/containers", "state/oci"] {
        until(&format!("{place} is empty"), || {
            names(&plyd.dir().join(place)).is_empty()
        });
    }
}

pub fn names(dir: &Path) -> Vec<String> {
    let entries = fs::read_dir(dir).unwrap().flatten();
    entries
        .map(|entry| entry.file_name().into_string().unwrap())
        .collect()
}

/// Process ids of the shims below plyd's directory.
fn shims(plyd: &Plyd) -> Vec<Pid> {
    processes(plyd, "plyshim\0serve")
}

/// Who is killed in the middle of something.
#[derive(Clone, Copy, Debug)]
enum Victim {
    Plyfs,
    Plyd,
    Shim,
}

impl Victim {
    const ALL: [Self; 3] = [Self::Plyfs, Self::Plyd, Self::Shim];

    fn is_there(self, plyd: &Plyd) -> bool {
        match self {
            Self::Plyfs => !processes(plyd, "plyfs\0").is_empty(),
            Self::Plyd => true,
            Self::Shim => !shims(plyd).is_empty(),
        }
    }

    /// Kills it. A plyd is to be launched again.
    fn kill(self, plyd: &mut Plyd) {
        let pids = match self {
            Self::Plyfs => processes(plyd, "plyfs\0"),
            Self::Shim => shims(plyd),
            Self::Plyd => {
                plyd.signal(Signal::SIGKILL);
                return;
            }
        };
        for pid in pids {
            // It may have ended by itself.
            let _gone = kill(pid, Signal::SIGKILL);
        }
    }
}

/// Processes that have `words` and plyd's directory on their command lines.
fn processes(plyd: &Plyd, words: &str) -> Vec<Pid> {
    let here = plyd.dir().to_str().unwrap();
    let pids = fs::read_dir("/proc").unwrap().flatten();
    let pids = pids.filter_map(|entry| entry.file_name().to_str()?.parse::<i32>().ok());
    pids.filter(|pid| {
        let line = fs::read(format!("/proc/{pid}/cmdline")).unwrap_or_default();
        let line = String::from_utf8_lossy(&line).into_owned();
        line.contains(words) && line.contains(here)
    })
    .map(Pid::from_raw)
    .collect()
}

pub fn cgroups_of(id: &str) -> Vec<String> {
    let mut found = Vec::new();
    let mut dirs = vec![std::path::PathBuf::from("/sys/fs/cgroup")];
    while let Some(dir) = dirs.pop() {
        for entry in fs::read_dir(dir).into_iter().flatten().flatten() {
            if entry.file_type().is_ok_and(|kind| kind.is_dir()) {
                if entry.file_name() == id {
                    found.push(entry.path().display().to_string());
                }
                dirs.push(entry.path());
            }
        }
    }
    found
}

#[test]
fn a_container_outlives_plyd() {
    let mut plyd = plyd();
    let script = "echo before; while ! test -e /go; do sleep 0.05; done; echo after; exit 6";
    let id = plyd.ok(["run", "-d", "--name", "job", BUSYBOX, "sh", "-c", script]);
    let id = id.trim_end().to_owned();
    let pid = plyd.json(["inspect", "job"])[0]["pid"].clone();
    plyd.signal(Signal::SIGKILL);
    plyd.launch();
    let found = plyd.json(["inspect", "job"]);
    assert_eq!(
        (&found[0]["status"], &found[0]["pid"]),
        (&"running".into(), &pid)
    );
    assert_eq!(plyd.ok(["exec", "job", "echo", "hello"]), "hello\n");
    let mut follow = plyd
        .command()
        .args(["logs", "-f", "job"])
        .stdout(Stdio::piped())
        .spawn()
        .unwrap();
    plyd.ok(["exec", "job", "touch", "/go"]);
    assert!(wait_for(&mut follow).unwrap().success());
    let mut text = String::new();
    follow
        .stdout
        .take()
        .unwrap()
        .read_to_string(&mut text)
        .unwrap();
    assert_eq!(text, "before\nafter\n");
    assert_eq!(plyd.ok(["wait", "job"]), "6\n");
    plyd.ok(["rm", "job"]);
    assert_eq!(cgroups_of(&id), Vec::<String>::new());
    assert_clean(&plyd);
}

#[test]
fn a_corrupt_record_of_one_container_is_named_and_costs_no_other() {
    let mut plyd = plyd();
    let create = |name: &str| {
        let script = "echo said; exit 3";
        let id = plyd.ok(["create", "--name", name, BUSYBOX, "sh", "-c", script]);
        id.trim_end().to_owned()
    };
    let (damaged, stopped, _sound) = (create("damaged"), create("stopped"), create("sound"));
    plyd.ok(["start", "stopped"]);
    assert_eq!(plyd.ok(["wait", "stopped"]), "3\n");
    let containers = plyd.root().join("containers");
    let record = containers.join(format!("{damaged}.record"));
    let state = containers.join(&stopped).join("state/state.record");
    plyd.signal(Signal::SIGTERM);
    until("the shims have ended", || shims(&plyd).is_empty());
    let good = [&record, &state].map(|path| fs::read(path).unwrap());
    for (path, good) in [&record, &state].into_iter().zip(&good) {
        fs::write(path, &good[..good.len() - 70]).unwrap();
    }
    plyd.launch();
    for path in [&record, &state] {
        let log = plyd.log();
        assert!(log.contains(path.to_str().unwrap()), "{log}");
    }
    assert_ne!(plyd.snapctl(["start", "damaged"]).code, 0);
    let found = plyd.json(["inspect", "stopped"]);
    assert_eq!(
        (&found[0]["status"], &found[0]["exit_code"]),
        (&"stopped".into(), &137.into())
    );
    let error = found[0]["error"].as_str().unwrap();
    assert!(error.contains("state.record"), "{error}");
    assert_eq!(plyd.ok(["logs", "stopped"]), "said\n");
    let start = plyd.snapctl(["start", "stopped"]);
    assert_ne!(start.code, 0);
    assert!(start.stderr.contains("state.record"), "{}", start.stderr);
    // It is no want of the program.
    assert!(!start.stderr.contains("--plyshim"), "{}", start.stderr);
    plyd.ok(["start", "sound"]);
    assert_eq!(plyd.ok(["wait", "sound"]), "3\n");

    // Nothing was lost: with the files back all is as before.
    plyd.signal(Signal::SIGTERM);
    fs::write(&record, &good[0]).unwrap();
    fs::write(&state, &good[1]).unwrap();
    plyd.launch();
    assert_eq!(plyd.json(["inspect", "stopped"])[0]["exit_code"], 3);
    plyd.ok(["start", "damaged"]);
    assert_eq!(plyd.ok(["wait", "damaged"]), "3\n");
    plyd.ok(["rm", "damaged", "stopped", "sound"]);
    assert_clean(&plyd);
}

#[test]
fn an_end_that_nobody_watched_is_reported() {
    let mut plyd = plyd();
    let script = "while test -e /stay; do sleep 0.05; done; echo bye; exit 8";
    plyd.ok(["run", "--name", "first", BUSYBOX, "true"]);
    plyd.ok([
        "create",
        "--name",
        "job",
        BUSYBOX,
        "sh",
        "-c",
        &format!("touch /stay; {script}"),
    ]);
    plyd.ok([
        "run", "-d", "--rm", "--name", "brief", BUSYBOX, "sleep", "1000",
    ]);
    plyd.ok(["start", "job"]);
    let inspected = plyd.json(["inspect", "job", "brief"]);
    let pids: Vec<_> = (0..2)
        .map(|n| inspected[n]["pid"].as_i64().unwrap())
        .map(|pid| Pid::from_raw(pid.try_into().unwrap()))
        .collect();
    plyd.signal(Signal::SIGKILL);
    let stay = format!("/proc/{}/root/stay", pids[0]);
    until("it has begun", || fs::remove_file(&stay).is_ok());
    kill(pids[1], Signal::SIGKILL).unwrap();
    until("both have ended", || shims(&plyd).is_empty());
    plyd.launch();
    let job = &plyd.json(["inspect", "job"])[0];
    assert_eq!(
        (&job["status"], &job["exit_code"]),
        (&"stopped".into(), &8.into())
    );
    assert_eq!(plyd.ok(["logs", "job"]), "bye\n");
    // The one that removes itself has been removed by the successor.
    assert_eq!(plyd.ok(["ps", "-aq"]).lines().count(), 2);
    plyd.ok(["rm", "job", "first"]);
    assert_clean(&plyd);
}

#[test]
fn a_shim_that_is_killed_takes_its_container_along_and_says_so() {
    let plyd = plyd();
    let id = plyd.ok([
        "run",
        "-d",
        "--name",
        "job",
        BUSYBOX,
        "sh",
        "-c",
        "echo here; exec sleep 1000",
    ]);
    let id = id.trim_end();
    until("it has written", || plyd.ok(["logs", "job"]) == "here\n");
    let pid = plyd.json(["inspect", "job"])[0]["pid"].as_i64().unwrap();
    for shim in shims(&plyd) {
        kill(shim, Signal::SIGKILL).unwrap();
    }
    assert_eq!(plyd.ok(["wait", "job"]), "137\n");
    let job = &plyd.json(["inspect", "job"])[0];
    assert!(job["error"].as_str().unwrap().contains("plyshim"), "{job}");
    until("its process is gone", || {
        !Path::new(&format!("/proc/{pid}")).exists()
    });
    assert_eq!(plyd.ok(["logs", "job"]), "here\n");
    // It can be started again.
    plyd.ok(["start", "job"]);
    assert_eq!(plyd.ok(["exec", "job", "echo", "again"]), "again\n");
    plyd.ok(["rm", "-f", "job"]);
    assert_eq!(cgroups_of(id), Vec::<String>::new());
    assert_clean(&plyd);
}

#[test]
fn a_client_hears_of_the_end_of_a_container_whose_shim_is_killed() {
    let plyd = plyd();
    for remove in [&[][..], &["--rm"]] {
        let mut command = plyd.command();
        command.args(["run", "--name", "job"]).args(remove);
        command.args([BUSYBOX, "sh", "-c", "echo here; exec sleep 1000"]);
        let mut child = command.stdout(Stdio::piped()).spawn().unwrap();
        until("it has written", || {
            plyd.snapctl(["logs", "job"]).stdout == "here\n"
        });
        for shim in shims(&plyd) {
            kill(shim, Signal::SIGKILL).unwrap();
        }
        assert_eq!(wait_for(&mut child).unwrap().code(), Some(137));
        let mut text = String::new();
        let mut stdout = child.stdout.take().unwrap();
        stdout.read_to_string(&mut text).unwrap();
        assert_eq!(text, "here\n");
        if remove.is_empty() {
            plyd.ok(["rm", "job"]);
        }
    }
    assert_clean(&plyd);
}

#[test]
fn both_killed_together_leave_nothing_that_runs() {
    let mut plyd = plyd();
    plyd.ok(["run", "-d", "--name", "job", BUSYBOX, "sleep", "1000"]);
    let pid = plyd.json(["inspect", "job"])[0]["pid"].as_i64().unwrap();
    plyd.signal(Signal::SIGKILL);
    for shim in shims(&plyd) {
        kill(shim, Signal::SIGKILL).unwrap();
    }
    plyd.launch();
    // Killed by now; its parent of the moment may take a while to bury it.
    until("its process is gone", || {
        !Path::new(&format!("/proc/{pid}")).exists()
    });
    assert_eq!(plyd.json(["inspect", "job"])[0]["exit_code"], 137);
    plyd.ok(["rm", "job"]);
    assert_clean(&plyd);
}

/// plyd asked every shim how its container is, and served only when all had answered.
#[test]
fn a_shim_that_hangs_does_not_keep_plyd_from_serving() {
    let mut plyd = plyd();
    plyd.ok(["run", "-d", "--name", "stuck", BUSYBOX, "sleep", "1000"]);
    let stopped = shims(&plyd);
    for shim in &stopped {
        kill(*shim, Signal::SIGSTOP).unwrap();
    }
    plyd.signal(Signal::SIGKILL);
    plyd.launch();
    assert_eq!(plyd.ok(["run", "--rm", BUSYBOX, "echo", "fine"]), "fine\n");
    for shim in &stopped {
        kill(*shim, Signal::SIGCONT).unwrap();
    }
    until("the container is found again", || {
        plyd.json(["inspect", "stuck"])[0]["status"] == "running"
    });
    plyd.ok(["rm", "-f", "stuck"]);
    assert_clean(&plyd);
}

#[test]
fn a_removal_can_be_repeated_whoever_is_killed_in_the_middle() {
    let mut plyd = plyd();
    for round in 0..4 {
        for victim in Victim::ALL {
            let name = format!("job-{round}");
            let id = plyd.ok(["run", "-d", "--name", &name, BUSYBOX, "sleep", "1000"]);
            assert!(victim.is_there(&plyd));
            let mut removal = plyd.command();
            removal.args(["rm", "-f", &name]).stdout(Stdio::null());
            let mut removal = removal.stderr(Stdio::null()).spawn().unwrap();
            std::thread::sleep(Duration::from_millis(20 * round));
            victim.kill(&mut plyd);
            assert!(wait_for(&mut removal).is_some(), "snapctl hangs");
            if matches!(victim, Victim::Plyd) {
                plyd.launch();
            }
            if !plyd.ok(["ps", "-aq"]).is_empty() {
                plyd.ok(["rm", "-f", &name]);
            }
            assert_clean(&plyd);
            assert_eq!(cgroups_of(id.trim_end()), Vec::<String>::new());
        }
    }
}

#[test]
fn a_run_can_be_repeated_whoever_is_killed_in_the_middle() {
    /// So many runs are cut off, however fast the machine.
    const ENOUGH: usize = 4;

    let mut plyd = plyd();
    for victim in Victim::ALL {
        let mut deadline = Instant::now() + PATIENCE;
        let (mut cut_off, mut round) = (0, 0);
        while cut_off < ENOUGH {
            assert!(
                Instant::now() < deadline,
                "{victim:?}: {cut_off} of {round} runs were cut off"
            );
            let mut command = plyd.command();
            let script = "cp /bin/busybox /copy && cat /copy >/dev/null && cp /copy /again";
            command.args(["run", "--rm", BUSYBOX, "sh", "-c", script]);
            command.stdout(Stdio::null()).stderr(Stdio::null());
            let mut run = command.spawn().unwrap();
            until("there is somebody to kill", || {
                run.try_wait().unwrap().is_some() || victim.is_there(&plyd)
            });
            // At another point each time.
            std::thread::sleep(Duration::from_millis(17 * (round % 10)));
            round += 1;
            victim.kill(&mut plyd);
            let status = wait_for(&mut run).expect("snapctl hangs");
            if !status.success() {
                cut_off += 1;
                deadline = Instant::now() + PATIENCE;
            }
            if matches!(victim, Victim::Plyd) {
                plyd.launch();
            }
            until("nothing is left of it", || {
                plyd.ok(["ps", "-aq"]).is_empty()
            });
            assert_eq!(plyd.ok(["run", "--rm", BUSYBOX, "echo", "fine"]), "fine\n");
            assert_clean(&plyd);
        }
    }
}

#[test]
fn plyd_is_killed_in_the_middle_of_everything() {
    let mut plyd = plyd();
    plyd.ok(["run", "-d", "--name", "steady", BUSYBOX, "sleep", "1000"]);
    for round in 0..6 {
        let name = format!("job-{round}");
        let mut children = Vec::new();
        for args in [
            vec![
                "run",
                "--name",
                &name,
                BUSYBOX,
                "sh",
                "-c",
                "head -c 100000 /dev/zero",
            ],
            vec!["run", "--rm", BUSYBOX, "true"],
            vec!["exec", "steady", "sh", "-c", "head -c 100000 /dev/zero"],
            vec!["rm", "-f", "job-0", "job-1", "job-2", "job-3", "job-4"],
        ] {
            let mut command = plyd.command();
            command
                .args(args)
                .stdout(Stdio::null())
                .stderr(Stdio::null());
            children.push(command.spawn().unwrap());
        }
        std::thread::sleep(Duration::from_millis(20 + 40 * round));
        plyd.signal(Signal::SIGKILL);
        for child in &mut children {
            assert!(wait_for(child).is_some(), "snapctl hangs");
        }
        plyd.launch();
        assert_eq!(plyd.ok(["exec", "steady", "echo", "here"]), "here\n");
        // Whatever was under way can be done again.
        assert_eq!(plyd.ok(["run", "--rm", BUSYBOX, "echo", "fine"]), "fine\n");
    }
    // One of `run --rm` whose client died with plyd is removed by plyd itself, at a moment of its own.
    until("every container is gone", || {
        let ids = plyd.ok(["ps", "-aq"]);
        for id in ids.lines() {
            plyd.snapctl(["rm", "-f", id]);
        }
        ids.is_empty()
    });
    assert_clean(&plyd);
}

#[test]
fn plyd_s_end_leaves_containers_alone_and_ends_its_streams() {
    let mut plyd = plyd();
    plyd.ok(["run", "-d", "--name", "job", BUSYBOX, "sleep", "1000"]);
    let mut follow = plyd
        .command()
        .args(["logs", "-f", "job"])
        .stderr(Stdio::null())
        .spawn()
        .unwrap();
    let status = plyd.signal(Signal::SIGTERM);
    assert!(status.success(), "{status}");
    assert!(!wait_for(&mut follow).unwrap().success());
    plyd.launch();
    assert_eq!(plyd.ok(["exec", "job", "echo", "hello"]), "hello\n");
    plyd.ok(["rm", "-f", "job"]);
    assert_clean(&plyd);
}

#[test]
fn a_root_that_fails_is_said_and_can_be_removed() {
    let plyd = plyd();
    let id = plyd.ok(["run", "-d", "--name", "job", BUSYBOX, "sleep", "1000"]);
    let snapshot = plyd.json([
        "snapshot",
        "info",
        "--json",
        "--owner",
        "container",
        id.trim_end(),
    ]);
    let pid = snapshot["plyfs_pid"].as_i64().unwrap();
    // Before it sleeps it may still need a page of its program, and dies of that.
    until("the process sleeps", || {
        let job = &plyd.json(["inspect", "job"])[0];
        let call = fs::read_to_string(format!("/proc/{}/syscall", job["pid"]));
        call.is_ok_and(|call| {
            let number = call
                .split(' ')
                .next()
                .and_then(|number| number.parse().ok());
            [Some(libc::SYS_nanosleep), Some(libc::SYS_clock_nanosleep)].contains(&number)
        })
    });
    kill(Pid::from_raw(pid.try_into().unwrap()), Signal::SIGKILL).unwrap();
    until("it is said", || {
        let job = &plyd.json(["inspect", "job"])[0];
        job["error"]
            .as_str()
            .is_some_and(|error| error.contains("plyfs"))
    });
    let exec = plyd.snapctl(["exec", "job", "ls", "/"]);
    assert_eq!(exec.code, 125);
    assert!(
        exec.stderr.contains("the plyfs that served its root"),
        "{}",
        exec.stderr
    );
    let listed = plyd.ok(["ps"]);
    assert!(
        listed.contains("running, but its root has failed"),
        "{listed}"
    );
    plyd.ok(["rm", "-f", "job"]);
    assert_clean(&plyd);
}

#[test]
fn many_at_once() {
    let plyd = plyd();
    let children: Vec<_> = (0..20)
        .map(|n| {
            let script = format!("echo {n}; exit {n}");
            let mut command = plyd.command();
            command.args(["run", "--rm", BUSYBOX, "sh", "-c", &script]);
            command.stdout(Stdio::piped()).spawn().unwrap()
        })
        .collect();
    for (n, child) in children.into_iter().enumerate() {
        let output = child.wait_with_output().unwrap();
        assert_eq!(String::from_utf8(output.stdout).unwrap(), format!("{n}\n"));
        assert_eq!(output.status.code(), Some(n.try_into().unwrap()));
    }
    assert_clean(&plyd);
}
