//! What needs no work of plyd: help, bad command lines, addresses that nobody serves.

use std::ffi::OsString;
use std::os::unix::ffi::OsStringExt;
use std::os::unix::net::UnixListener;
use std::process::{Command, Stdio};

use crate::common::{Done, Plyd};

fn snapctl(args: &[&str]) -> Done {
    let mut command = Command::new(env!("CARGO_BIN_EXE_snapctl"));
    command.env_remove("PLYWOOD_ADDRESS").stdin(Stdio::null());
    Done::from(command.args(args).output().unwrap())
}

#[test]
fn help_and_version_go_to_stdout() {
    for args in [
        &["--help"][..],
        &["run", "--help"],
        &["image", "load", "-h"],
    ] {
        let done = snapctl(args);
        assert_eq!((done.code, done.stderr.as_str()), (0, ""), "{args:?}");
        assert!(done.stdout.contains("Usage: snapctl"), "{}", done.stdout);
    }
    let version = snapctl(&["--version"]).stdout;
    assert_eq!(version, format!("snapctl {}\n", env!("CARGO_PKG_VERSION")));
}

#[test]
fn a_bad_command_line_is_2_and_125_where_other_codes_are_the_process_s() {
    for (args, code) in [
        (&["nope"][..], 2),
        (&["ps", "--json", "--quiet"], 2),
        (&["image", "rm"], 2),
        (&["run"], 125),
        (&["run", "--nope", "image"], 125),
        (&["exec", "container"], 125),
        (&["run", "-v", "data:/data", "image"], 125),
        (&["create", "--network", "bridge", "image"], 2),
        (&["--address", "tcp://localhost:1", "ps"], 2),
        (&["--address", "", "ps"], 2),
        (&["kill", "-s", "BOGUS", "container"], 2),
        (&["kill", "-s", "65", "container"], 2),
    ] {
        let done = snapctl(args);
        assert_eq!((done.code, done.stdout.as_str()), (code, ""), "{args:?}");
        assert!(
            done.stderr.starts_with("error:") || done.stderr.contains("Usage:"),
            "{}",
            done.stderr
        );
        let asked_for = args.contains(&"--address");
        let shown = done.stderr.contains("--address <ADDRESS>");
        assert!(asked_for || !shown, "{}", done.stderr);
    }
}

#[test]
fn a_signal_that_is_none_is_told_which_there_are() {
    let done = snapctl(&["kill", "-s", "BOGUS", "container"]);
    for words in [
        "there is no signal \"BOGUS\"",
        "1 to 64",
        "HUP, INT",
        "RTMIN+N",
    ] {
        assert!(done.stderr.contains(words), "{}", done.stderr);
    }
}

#[test]
fn the_variable_names_plyd_unless_it_is_empty() {
    let with = |variable: &str, args: &[&str]| {
        let mut command = Command::new(env!("CARGO_BIN_EXE_snapctl"));
        command.env("PLYWOOD_ADDRESS", variable).args(args);
        Done::from(command.stdin(Stdio::null()).output().unwrap())
    };
    for (args, code) in [(&["ps"][..], 2), (&["run", "image"], 125)] {
        let wrong = with("tcp://localhost:1", args);
        assert_eq!(wrong.code, code, "{}", wrong.stderr);
        assert!(
            wrong.stderr.starts_with("snapctl: PLYWOOD_ADDRESS: "),
            "{}",
            wrong.stderr
        );
    }
    // Whether anybody serves the default is the host's affair.
    let empty = with("", &["ps"]);
    let reached = empty.code == 0;
    let tried = empty.stderr.contains(" /run/plywood/plyd.sock");
    assert!(reached || tried, "{}", empty.stderr);
}

#[test]
fn an_argument_that_is_not_utf8_is_named() {
    let name = OsString::from_vec(b"caf\xe9".to_vec());
    let output = Command::new(env!("CARGO_BIN_EXE_snapctl"))
        .args(["run".into(), "image".into(), name])
        .output()
        .unwrap();
    let done = Done::from(output);
    assert_eq!(done.code, 125);
    assert!(
        done.stderr.contains(r#""caf\xE9" is not UTF-8"#),
        "{}",
        done.stderr
    );
}

#[test]
fn an_address_that_nobody_serves_says_how_to_start_plyd() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("plyd.sock");
    let address = format!("unix://{}", path.display());
    let check = |code: i32, args: &[&str]| {
        let done = snapctl(args);
        assert_eq!(done.code, code, "{}", done.stderr);
        assert!(
            done.stderr.contains("is it running? Start it with `plyd`"),
            "{}",
            done.stderr
        );
        assert!(
            done.stderr.contains(path.to_str().unwrap()),
            "{}",
            done.stderr
        );
        assert_eq!(done.stderr.lines().count(), 1, "{}", done.stderr);
    };
    check(1, &["--address", &address, "ps"]);
    check(125, &["run", "--address", &address, "image"]);
    // A socket that its owner left behind.
    drop(UnixListener::bind(&path).unwrap());
    check(1, &["--address", &address, "ps"]);
}

#[test]
fn completions_need_no_plyd() {
    for shell in ["bash", "zsh", "fish"] {
        let done = snapctl(&["completions", shell]);
        assert_eq!(done.code, 0, "{}", done.stderr);
        assert!(done.stdout.contains("snapctl"), "{shell}");
    }
}

#[test]
fn a_reader_that_went_away_is_no_news() {
    let plyd = Plyd::start();
    for n in 0..50 {
        plyd.ok(["snapshot", "prepare", &format!("snapshot-{n}")]);
    }
    let line = format!(
        "{} snapshot ls --json | head -c 1 >/dev/null; echo ${{PIPESTATUS[0]}}",
        env!("CARGO_BIN_EXE_snapctl")
    );
    let mut shell = Command::new("bash");
    shell
        .args(["-c", &line])
        .env("PLYWOOD_ADDRESS", plyd.address());
    let done = Done::from(shell.output().unwrap());
    assert_eq!(done.stderr, "");
    assert!(
        ["0\n", "141\n"].contains(&done.stdout.as_str()),
        "{}",
        done.stdout
    );
}

#[test]
fn system_info_tells_of_plyd_and_the_host() {
    let plyd = Plyd::start();
    let info = plyd.json(["system", "info", "--json"]);
    assert_eq!(info["version"], env!("CARGO_PKG_VERSION"));
    assert_eq!(info["pid"], plyd.pid());
    assert_eq!(info["root"], plyd.root().to_str().unwrap());
    let kernel = std::fs::read_to_string("/proc/sys/kernel/osrelease").unwrap();
    assert_eq!(info["kernel"], kernel.trim());
    assert!(
        info["fuse_abi"].as_str().unwrap().starts_with("7."),
        "{info}"
    );
    let features = info["features"].as_array().unwrap();
    assert!(!features.is_empty());
    for feature in features {
        // Whatever is not used has a reason.
        let idle = feature["in_use"] == false;
        assert_eq!(idle, feature["reason"] != "", "{feature}");
        assert!(feature["supported"] == true || idle, "{feature}");
    }
    assert_ne!(info["oci_runtime"]["path"], "", "{info}");
    assert_eq!(info["snapshots"], 0);
    let text = plyd.ok(["system", "info"]);
    for word in [
        "plyd",
        "kernel",
        "FUSE protocol",
        "OCI runtime",
        "FUSE FEATURE",
    ] {
        assert!(text.contains(word), "{text}");
    }
}

#[test]
fn a_second_plyd_is_kept_off_the_root_and_off_the_state_directory() {
    let plyd = Plyd::start();
    let other = plyd.dir().join("other");
    let address = format!("unix://{}", plyd.dir().join("other.sock").display());
    for (root, state, taken) in [
        (&plyd.root(), &other, &plyd.root()),
        (&other, &plyd.state(), &plyd.state()),
    ] {
        let second = Command::new(env!("CARGO_BIN_EXE_plyd"))
            .args(["--address", &address, "--root"])
            .arg(root)
            .arg("--state")
            .arg(state)
            .output()
            .unwrap();
        let said = String::from_utf8(second.stderr).unwrap();
        assert_eq!(second.status.code(), Some(1), "{said}");
        let words = format!("{} is in use by another plyd", taken.display());
        assert!(said.contains(&words), "{said}");
    }
}
