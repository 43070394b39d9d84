//! plyd as a program.

use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::path::Path;
use std::process::{Command, Output};

use nix::sys::signal::Signal;

use super::client::{Snapshots, source};
use super::common::{BUSYBOX, PLYD, Plyd, until};

fn plyd(args: &[&str]) -> Output {
    Command::new(PLYD).args(args).output().unwrap()
}

/// Runs what must end by itself, and answers its exit code and what it complains of.
fn refused(args: &[&str]) -> (i32, String) {
    let output = plyd(args);
    let stderr = String::from_utf8_lossy(&output.stderr).into_owned();
    (output.status.code().unwrap(), stderr)
}

fn text(path: &Path) -> &str {
    path.to_str().unwrap()
}

#[test]
fn a_wrong_configuration_is_refused_by_name() {
    let tmp = tempfile::tempdir().unwrap();
    let config = tmp.path().join("config.toml");
    for (content, word) in [
        ("rooot = \"/x\"", "rooot"),
        ("root = 7", "root"),
        ("log_format = \"xml\"", "xml"),
        ("address = \"tcp://1.2.3.4\"", "tcp://1.2.3.4"),
        ("log_level = \"a=b=c\"", "a=b=c"),
        ("verify = \"often\"", "verify"),
        ("import_memory = \"1M\"", "import_memory is 1048576"),
        ("small_object_limit = \"1kB\"", "small_object_limit"),
        ("zstd_level = 99", "zstd_level is 99"),
        ("import_workers = 0", "import_workers is 0"),
        ("layer_max_entries = 0", "layer_max_entries is 0"),
    ] {
        fs::write(&config, content).unwrap();
        let root = tmp.path().join("root");
        let (code, stderr) = refused(&[
            "--config",
            text(&config),
            "--state",
            text(&root),
            "--root",
            text(&root),
        ]);
        // The flags above win over the file, but a value of the wrong type is no value.
        assert_eq!(code, 2, "{content}");
        assert!(stderr.contains(word), "{content}: {stderr}");
        assert!(!root.exists(), "{content}");
    }
    fs::write(&config, "").unwrap();
    let root = tmp.path().join("root");
    for (flag, value) in [
        ("--address", "unix://relative"),
        ("--log-level", "a=b=c"),
        ("--log-level", "loud"),
        ("--log-level", "info,loud"),
        ("--log-format", "xml"),
        ("--verify", "often"),
        ("--import-memory", "12x"),
        ("--zstd-level", "99"),
    ] {
        let dirs = ["--state", text(&root), "--root", text(&root)];
        let (code, stderr) =
            refused(&[&["--config", text(&config), flag, value][..], &dirs].concat());
        assert_eq!(code, 2, "{flag} {value}");
        assert!(stderr.contains(value), "{flag} {value}: {stderr}");
        assert!(!root.exists(), "{flag} {value}");
    }
    let missing = tmp.path().join("missing.toml");
    let (code, stderr) = refused(&["--config", text(&missing)]);
    assert_eq!(code, 2);
    assert!(stderr.contains("missing.toml"), "{stderr}");
}

#[test]
fn one_plyd_for_each_root_and_each_socket() {
    let first = Plyd::start();
    let other = first.dir().join("other");
    let address = first.address();
    let elsewhere = format!("unix://{}", other.join("s").display());
    let state = first.state();
    let (code, stderr) = refused(&[
        "--root",
        text(&first.root()),
        "--state",
        text(&state),
        "--address",
        &elsewhere,
    ]);
    assert_eq!(code, 1);
    assert!(stderr.contains(&first.pid().to_string()), "{stderr}");
    assert!(stderr.contains("in use"), "{stderr}");
    let (code, stderr) = refused(&[
        "--root",
        text(&other),
        "--state",
        text(&other),
        "--address",
        &address,
    ]);
    assert_eq!(code, 1);
    assert!(stderr.contains("served by another process"), "{stderr}");
    first.ok(["system", "info"]);
}

#[test]
fn the_socket_is_private_and_a_stale_one_is_replaced() {
    let mut plyd = Plyd::start();
    let socket = plyd.address().replace("unix://", "");
    let mode = |path: &Path| fs::metadata(path).unwrap().permissions().mode() & 0o7777;
    assert_eq!(mode(Path::new(&socket)), 0o600);
    assert_eq!(mode(&plyd.root()), 0o700);
    assert_eq!(mode(&plyd.state()), 0o700);
    plyd.signal(Signal::SIGKILL);
    assert!(Path::new(&socket).exists());
    plyd.launch();
    assert!(plyd.signal(Signal::SIGTERM).success());
    assert!(!Path::new(&socket).exists());

    fs::write(&socket, "precious").unwrap();
    let (code, stderr) = refused(&[
        "--root",
        text(&plyd.root()),
        "--state",
        text(&plyd.state()),
        "--address",
        &plyd.address(),
    ]);
    assert_eq!(code, 1);
    assert!(stderr.contains("not a socket"), "{stderr}");
    assert_eq!(fs::read(&socket).unwrap(), b"precious");
}

#[test]
fn the_json_log_is_one_object_a_line() {
    let mut command = Command::new(PLYD);
    let level = "info,plywood=debug";
    command.args(["--log-format", "json", "--log-level", level]);
    let mut plyd = Plyd::start_with(command);
    let snapshots = Snapshots::of(&plyd);
    // An error with a name that JSON has to escape.
    snapshots.remove("no \"such\"\nsnapshot").unwrap_err();
    snapshots.layer("base", "", |_| {});
    plyd.signal(Signal::SIGTERM);
    let log = plyd.log();
    let lines: Vec<serde_json::Value> = log
        .lines()
        .map(|line| serde_json::from_str(line).unwrap_or_else(|error| panic!("{error}: {line}")))
        .collect();
    assert!(lines.len() >= 2, "{log}");
    for line in &lines {
        for key in ["timestamp", "level", "fields", "target"] {
            assert!(line.get(key).is_some(), "no {key} in {line}");
        }
    }
    assert!(
        lines
            .iter()
            .any(|line| line["fields"]["message"] == "serving"),
        "{log}"
    );
}

/// The soft and the hard limit of open files of a process.
fn open_files(pid: u32) -> (String, String) {
    let limits = fs::read_to_string(format!("/proc/{pid}/limits")).unwrap();
    let line = limits
        .lines()
        .find(|line| line.starts_with("Max open files"));
    let mut words = line.unwrap().split_whitespace().skip(3);
    let mut next = || words.next().unwrap().to_owned();
    (next(), next())
}

#[test]
fn plyd_raises_its_limit_of_open_files_and_not_that_of_containers() {
    let mut command = Command::new("prlimit");
    command.args(["--nofile=200:4096", PLYD]);
    let plyd = Plyd::start_with(command);
    assert_eq!(open_files(plyd.pid()), ("4096".into(), "4096".into()));
    plyd.load_busybox();
    let script = "ulimit -Sn; ulimit -Hn";
    let run = ["run", "--rm", BUSYBOX, "sh", "-c", script];
    assert_eq!(plyd.ok(run), "200\n4096\n");
    plyd.ok(["run", "-d", "--name", "c", BUSYBOX, "sleep", "1000"]);
    // While a runc of Go 1.19 sets the limits of what it executes, that raises its own, as each program of Go does when it
    // begins, and now and then comes second. A limit that plyd handed on would be seen each time.
    let exec = || plyd.ok(["exec", "c", "sh", "-c", script]);
    let seen: Vec<String> = (0..5).map(|_| exec()).collect();
    let is_known = |seen: &String| ["200\n4096\n", "4096\n4096\n"].contains(&&**seen);
    assert!(seen.iter().all(is_known), "{seen:?}");
    assert!(seen.iter().any(|seen| seen == "200\n4096\n"), "{seen:?}");
}

/// The system calls of a process from now until it is dropped, one a line, with the paths of descriptors.
struct Trace {
    strace: std::process::Child,
    file: std::path::PathBuf,
}

impl Trace {
    fn of(pid: u32, calls: &str, file: std::path::PathBuf) -> Self {
        let strace = Command::new("strace")
            .args(["-f", "-y", "-e", calls, "-p", &pid.to_string(), "-o"])
            .arg(&file)
            .stderr(std::process::Stdio::null())
            .spawn()
            .expect("install strace");
        let trace = Self { strace, file };
        until("every thread is traced", || {
            fs::read_dir(format!("/proc/{pid}/task"))
                .unwrap()
                .flatten()
                .all(|task| {
                    // It may end meanwhile.
                    fs::read_to_string(task.path().join("status"))
                        .is_ok_and(|status| !status.contains("TracerPid:\t0\n"))
                })
        });
        trace
    }
}

impl Drop for Trace {
    fn drop(&mut self) {
        let _ = self.strace.kill();
        let _ = self.strace.wait();
    }
}

#[test]
fn that_a_snapshot_is_mounted_is_on_the_disk_before_anybody_can_write() {
    let plyd = Plyd::start();
    let snapshots = Snapshots::of(&plyd);
    let calls = "trace=fsync,openat,mount,execve";
    let trace = Trace::of(plyd.pid(), calls, plyd.dir().join("trace"));
    snapshots.prepare("a", "").unwrap();
    let log = || fs::read_to_string(&trace.file).unwrap();
    until("the start of plyfs is seen", || log().contains("execve("));
    let log = log();
    let data = fs::read_dir(plyd.root().join("snapshots/data")).unwrap();
    let [dir] = &data.map(|entry| entry.unwrap().path()).collect::<Vec<_>>()[..] else {
        panic!("not one snapshot");
    };
    let mark = format!("\"{}\"", dir.join("mounted").display());
    let (_, after) = log.split_once(&mark).expect("the mark is made");
    let (between, _) = after.split_once("execve(").expect("plyfs is started");
    let synced = format!("<{}>", dir.display());
    assert!(
        between
            .lines()
            .any(|line| line.contains("fsync(") && line.contains(&synced)),
        "{log}"
    );
}

/// plyfs below plyd leaves it to plyd.
#[test]
fn what_was_written_is_on_the_disk_before_a_snapshot_counts_as_whole() {
    let plyd = Plyd::start();
    let snapshots = Snapshots::of(&plyd);
    let root = source(&snapshots.prepare("a", "").unwrap());
    fs::write(root.join("file"), "x").unwrap();
    let calls = "trace=syncfs,umount2,unlink,unlinkat";
    let trace = Trace::of(plyd.pid(), calls, plyd.dir().join("trace"));
    snapshots.commit("base", "a").unwrap();
    let log = fs::read_to_string(&trace.file).unwrap();
    let line = |words: [&str; 2]| {
        let has = |line: &str| words.iter().all(|word| line.contains(word));
        log.lines()
            .position(has)
            .unwrap_or_else(|| panic!("{words:?}: {log}"))
    };
    let unmounted = line(["umount2(", "/root\""]);
    let marked = line(["unlink", "/mounted\""]);
    let between = log.lines().take(marked).skip(unmounted);
    let synced = between.filter(|line| line.contains("syncfs(") && line.contains("/upper>"));
    assert_eq!(synced.count(), 1, "{log}");
}
