//! The server as a process: its start, its signals, its death.

use std::fs::{self, File};
use std::io::Read;
use std::process::{Command, Stdio};

use nix::sys::signal::Signal;

use crate::common::mode;
use crate::common::mount::{unmount, wait_until};
use crate::common::{Layers, Mount, errno};

fn is_mounted(layers: &Layers) -> bool {
    let table = fs::read_to_string("/proc/self/mountinfo").unwrap();
    table.contains(&format!(" {} ", layers.mnt().display()))
}

#[test]
fn nothing_of_the_server_is_left_on_the_callers_streams() {
    let layers = Layers::new(1);
    let child = mode::plyfs()
        .args(["-o", &layers.options()])
        .arg(layers.mnt())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .unwrap();
    // Waits for the end of both streams, which the server would keep open.
    let output = child.wait_with_output().unwrap();
    assert!(output.status.success(), "{output:?}");
    let pid = crate::common::mount::server_of(&layers.mnt()).unwrap();
    for stream in 0..3 {
        let target = fs::read_link(format!("/proc/{pid}/fd/{stream}")).unwrap();
        assert_eq!(target.to_str(), Some("/dev/null"));
    }
    assert_eq!(
        fs::read_link(format!("/proc/{pid}/cwd")).unwrap().to_str(),
        Some("/")
    );
    unmount(&layers.mnt());
}

/// A script that locks with `flock 9` and mounts would never have been rid of its lock.
#[test]
fn nothing_that_the_caller_had_open_is_left_open() {
    let layers = Layers::new(1);
    let lock = layers.path("lock");
    fs::write(layers.path("more"), layers.path("lower1").to_str().unwrap()).unwrap();
    fs::create_dir(layers.path("lower1")).unwrap();
    fs::write(layers.path("lower1/f"), "x").unwrap();
    let plyfs = mode::plyfs();
    let output = Command::new("bash")
        .args([
            "-c",
            r#"exec 9>"$1" 8<"$2"; flock 9; shift 2; exec "$@""#,
            "bash",
        ])
        .args([&lock, &layers.path("more")])
        .arg(plyfs.get_program())
        .args(plyfs.get_args())
        .args(["-o", &layers.options(), "-o", "lowerdir_file=/dev/fd/8"])
        .arg(layers.mnt())
        .output()
        .unwrap();
    assert!(output.status.success(), "{output:?}");
    assert_eq!(fs::read(layers.mnt().join("f")).unwrap(), b"x");
    let status = Command::new("flock")
        .args(["-n"])
        .arg(&lock)
        .arg("true")
        .status();
    let pid = crate::common::mount::server_of(&layers.mnt()).unwrap();
    let held: Vec<_> = fs::read_dir(format!("/proc/{pid}/fd"))
        .unwrap()
        .filter_map(|entry| fs::read_link(entry.unwrap().path()).ok())
        .filter(|target| *target == lock || *target == layers.path("more"))
        .collect();
    unmount(&layers.mnt());
    assert!(status.unwrap().success(), "the lock stays");
    assert!(held.is_empty(), "{held:?}");
}

#[test]
fn a_killed_server_gives_its_clients_an_error_at_once() {
    let layers = Layers::new(1);
    fs::write(layers.lower(0).join("f"), "x").unwrap();
    layers.seal();
    let mount = Mount::new(&layers, "");
    let mut file = File::open(mount.join("f")).unwrap();
    mount.signal(Signal::SIGKILL);
    assert!(mount.wait_for_end());
    // The second for a request that was sent while the last thread of the server was still ending.
    let over = [libc::ENOTCONN, libc::ECONNABORTED];
    assert!(over.contains(&errno(fs::read_dir(mount.join("")))));
    let result = errno(file.read(&mut [0; 1]));
    // What the kernel reads by itself needs no server.
    assert!(over.contains(&result) || mode::Mode::of_run().passes() && result == 0);
    drop(mount);
    // Nothing that the dead one left stands in the way.
    let mount = Mount::new(&layers, "");
    assert_eq!(fs::read(mount.join("f")).unwrap(), b"x");
}

#[test]
fn the_server_cannot_write_past_quotas_and_reserved_blocks() {
    const CAP_SYS_RESOURCE: u64 = 1 << 24;
    let layers = Layers::new(1);
    let mount = Mount::new(&layers, "");
    for task in fs::read_dir(format!("/proc/{}/task", mount.pid())).unwrap() {
        let status = match fs::read_to_string(task.unwrap().path().join("status")) {
            Ok(status) => status,
            // A thread that helped the start has ended.
            Err(error) if error.kind() == std::io::ErrorKind::NotFound => continue,
            Err(error) => panic!("{error}"),
        };
        for set in ["CapEff:", "CapPrm:"] {
            let line = status.lines().find(|line| line.starts_with(set)).unwrap();
            let bits = u64::from_str_radix(line[set.len()..].trim(), 16).unwrap();
            assert_eq!(bits & CAP_SYS_RESOURCE, 0, "{status}");
        }
    }
}

#[test]
fn what_was_synced_before_a_kill_is_there() {
    let layers = Layers::new(1);
    let mount = Mount::new(&layers, "writeback");
    let file = File::create(mount.join("f")).unwrap();
    std::io::Write::write_all(&mut &file, b"acknowledged").unwrap();
    file.sync_all().unwrap();
    mount.signal(Signal::SIGKILL);
    assert!(mount.wait_for_end());
    drop(file);
    drop(mount);
    let mount = Mount::new(&layers, "");
    assert_eq!(fs::read(mount.join("f")).unwrap(), b"acknowledged");
}

#[test]
fn a_signal_writes_everything_down_and_takes_the_mount_away() {
    for signal in [Signal::SIGTERM, Signal::SIGINT] {
        let layers = Layers::new(1);
        let mount = Mount::new(&layers, "writeback");
        let file = File::create(mount.join("f")).unwrap();
        std::io::Write::write_all(&mut &file, b"not synced by anyone").unwrap();
        mount.signal(signal);
        assert!(mount.wait_for_end());
        assert!(!is_mounted(&layers));
        assert_eq!(
            fs::read(layers.upper().join("f")).unwrap(),
            b"not synced by anyone"
        );
    }
}

#[test]
fn in_front_it_serves_until_it_is_told_to_end() {
    let layers = Layers::new(1);
    let mut child = mode::plyfs()
        .args(["-f", "-o", &layers.options()])
        .arg(layers.mnt())
        .stderr(Stdio::null())
        .spawn()
        .unwrap();
    let mounted = wait_until(|| is_mounted(&layers));
    let written = fs::write(layers.mnt().join("f"), "x");
    nix::sys::signal::kill(
        nix::unistd::Pid::from_raw(child.id() as i32),
        Signal::SIGTERM,
    )
    .unwrap();
    let status = child.wait().unwrap();
    assert!(mounted && written.is_ok() && status.success());
    assert!(!is_mounted(&layers));
}

#[test]
fn the_log_goes_where_it_is_sent() {
    let layers = Layers::new(1);
    let log = layers.path("log");
    let output = mode::plyfs()
        .args(["-o", &layers.options(), "--log-file"])
        .arg(&log)
        .arg(layers.mnt())
        .output()
        .unwrap();
    assert!(output.status.success(), "{output:?}");
    unmount(&layers.mnt());
    assert!(wait_until(|| {
        let text = fs::read_to_string(&log).unwrap();
        text.contains("serving") && text.contains("ended")
    }));
    // How the kernel is served is for whoever looks for a defect.
    assert!(!fs::read_to_string(&log).unwrap().contains("policy"));
}

#[test]
fn an_aborted_connection_ends_the_server_and_its_mount() {
    let layers = Layers::new(1);
    let mount = Mount::new(&layers, "");
    let m = fs::metadata(mount.join("")).unwrap();
    let connection = nix::sys::stat::minor(std::os::unix::fs::MetadataExt::dev(&m));
    let connections = "/sys/fs/fuse/connections";
    if fs::read_dir(connections).unwrap().next().is_none() {
        Command::new("mount")
            .args(["-t", "fusectl", "none", connections])
            .status()
            .unwrap();
    }
    fs::write(format!("{connections}/{connection}/abort"), "1").unwrap();
    assert!(mount.wait_for_end());
    assert!(wait_until(|| !is_mounted(&layers)));
}
