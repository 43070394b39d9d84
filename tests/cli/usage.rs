//! What needs no work of plyd: help, bad command lines, addresses that nobody serves.

use std::ffi::OsString;
use std::fs::Permissions;
use std::os::unix::ffi::OsStringExt;
use std::os::unix::fs::PermissionsExt;
use std::os::unix::net::UnixListener;
use std::os::unix::process::CommandExt;
use std::path::Path;
use std::process::{Command, Stdio};

use crate::common::{BUSYBOX, Done, PLYD, Plyd};

const PLYFS: &str = env!("CARGO_BIN_EXE_plyfs");

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
        (&["snapshot", "prepare", "key", "--label", "a"], 2),
        (&["stop", "-t", "-1", "container"], 2),
        (&["logs", "-n", "x", "container"], 2),
        (&["inspect", ""], 2),
        (&["image", "inspect", ""], 2),
        (&["snapshot", "rm", ""], 2),
        (&["run", "-u", "", "image"], 125),
        (&["create", "-w", "", "image"], 2),
        (&["create", "--hostname", "", "image"], 2),
        (&["exec", "-u", "", "container", "true"], 125),
    ] {
        let done = snapctl(args);
        assert_eq!((done.code, done.stdout.as_str()), (code, ""), "{args:?}");
        let lines: Vec<&str> = done.stderr.lines().collect();
        assert_eq!(lines.len(), 3, "{}", done.stderr);
        assert!(lines[0].starts_with("snapctl: "), "{}", done.stderr);
        assert!(lines[1].starts_with("Usage: snapctl "), "{}", done.stderr);
        assert!(lines[2].ends_with(" --help` says more"), "{}", done.stderr);
        assert!(!done.stderr.contains("tip:"), "{}", done.stderr);
    }
    // Nothing at all: the commands that there are.
    for (args, command) in [(&[][..], "completions"), (&["image"], "load")] {
        let done = snapctl(args);
        assert_eq!((done.code, done.stdout.as_str()), (2, ""), "{args:?}");
        let first = done.stderr.lines().next().unwrap();
        assert!(first.starts_with("snapctl: name a command of "), "{first}");
        assert!(first.contains(command), "{first}");
        assert!(done.stderr.contains("\nUsage: snapctl"), "{}", done.stderr);
    }
}

#[test]
fn what_was_meant_is_said() {
    const OPTIONAL: &str = "\"\" is no name; give one, or leave the argument out";
    for (args, words) in [
        (
            &["image", "load", "x.tar"][..],
            "`snapctl image load -i x.tar`",
        ),
        (&["image", "ls", "--jsn"], "did you mean --json?"),
        (&["run", "--name", "", "image"], OPTIONAL),
        (&["create", "--name=", "image"], OPTIONAL),
        (&["image", "load", "--name", ""], OPTIONAL),
        (&["snapshot", "prepare", "key", ""], OPTIONAL),
        (&["inspect", ""], "snapctl: CONTAINER: \"\" is no name"),
        (&["logs", "-n", "x", "c"], "is not a number of lines"),
        (&["stop", "-t", "-1", "c"], "is not a number of seconds"),
        (
            &["snapshot", "info", "-q", "key"],
            "`snapctl snapshot info` has no option -q",
        ),
    ] {
        let done = snapctl(args);
        let first = done.stderr.lines().next().unwrap();
        assert!(first.contains(words), "{args:?}: {first}");
    }
}

/// It was said to leave out also what has to be there.
#[test]
fn what_has_to_be_there_is_not_said_to_be_left_out() {
    for args in [
        &["layer", "export", ""][..],
        &["layer", "inspect", ""],
        &["mount", "", "/mnt"],
        &["snapshot", "info", ""],
        &["image", "rm", ""],
        &["logs", ""],
    ] {
        let done = snapctl(args);
        let first = done.stderr.lines().next().unwrap();
        assert!(first.ends_with("\"\" is no name; give one"), "{first}");
    }
}

#[test]
fn the_help_has_what_is_not_obvious() {
    for (args, words) in [
        (["stop", "--help"], "[default: 10]"),
        (["kill", "--help"], "[default: SIGKILL]"),
    ] {
        let done = snapctl(&args);
        assert!(done.stdout.contains(words), "{}", done.stdout);
    }
    let remove = snapctl(&["image", "rm", "--help"]).stdout;
    assert!(remove.contains("Print a JSON object:"), "{remove}");
}

#[test]
fn every_list_has_json_and_quiet() {
    for list in [
        "image ls",
        "ps",
        "snapshot ls",
        "snapshot tree",
        "snapshot mounts",
        "snapshot diff",
    ] {
        let mut args: Vec<&str> = list.split(' ').collect();
        args.push("--help");
        let help = snapctl(&args).stdout;
        assert!(
            help.contains("--json") && help.contains("-q, --quiet"),
            "{help}"
        );
    }
}

#[test]
fn each_program_tells_its_own_name() {
    for (program, name) in [
        (PLYD, "plyd"),
        (env!("CARGO_BIN_EXE_plyfs"), "plyfs"),
        (env!("CARGO_BIN_EXE_plyshim"), "plyshim"),
        (env!("CARGO_BIN_EXE_snapctl"), "snapctl"),
    ] {
        let output = Command::new(program).arg("--version").output().unwrap();
        let version = format!("{name} {}\n", env!("CARGO_PKG_VERSION"));
        assert_eq!(String::from_utf8(output.stdout).unwrap(), version);
    }
}

/// Runs a plyd that must not start, in `dir`; answers its exit code and what it complains of.
fn refused_plyd(dir: &Path, program: &Path, user: u32, args: &[&str]) -> (i32, String) {
    let mut command = Command::new(program);
    // What is given later counts no more than once, so what is tested comes alone.
    for (option, value) in [
        ("--root", dir.join("root").display().to_string()),
        ("--state", dir.join("state").display().to_string()),
        ("--address", format!("unix://{}", dir.join("s").display())),
    ] {
        if !args.contains(&option) {
            command.args([option, &value]);
        }
    }
    let output = command
        .args(args)
        .uid(user)
        .current_dir("/")
        .output()
        .unwrap();
    let stderr = String::from_utf8(output.stderr).unwrap();
    (output.status.code().unwrap(), stderr)
}

#[test]
fn a_plyd_that_cannot_start_says_what_to_do() {
    let tmp = tempfile::tempdir().unwrap();
    let at = |name: &str| tmp.path().join(name).to_str().unwrap().to_owned();
    let file = at("file");
    std::fs::write(&file, "rot = 1\n").unwrap();
    let (below, dir, missing) = (at("file/below"), at(""), at("missing"));
    let long = format!("unix:///tmp/{}", "x".repeat(103));
    for (args, code, words) in [
        (
            ["--root", &file],
            1,
            "is not a directory; name one, or one that can be made, with --root",
        ),
        (["--root", &below], 1, "is not a directory"),
        (["--state", &file], 1, "with --state"),
        (
            ["--address", &long],
            2,
            "has 108 bytes, and that of a socket has 107 at most; give a shorter one with --address",
        ),
        (["--config", &missing], 2, "there is no configuration file"),
        (["--config", &dir], 2, "cannot read the configuration file"),
        (
            ["--config", &file],
            2,
            "is wrong in line 1, `rot = 1`: unknown field `rot`",
        ),
        (["--plyfs", &missing], 1, "--plyfs is "),
        (["--plyfs", "no-such-plyfs"], 1, "PATH has no such program"),
        (["--plyfs", "/bin/true"], 1, "give the path of plyfs"),
        (
            ["--plyshim", &file],
            1,
            "which is not executable; give the path of plyshim",
        ),
        (
            ["--plyshim", env!("CARGO_BIN_EXE_plyfs")],
            1,
            "is another program",
        ),
        (
            ["--oci-runtime", &file],
            1,
            "name runc or crun with --oci-runtime",
        ),
        (
            ["--oci-runtime", "no-such-runtime"],
            1,
            "there is none on PATH",
        ),
        (
            ["--oci-runtime", "/bin/false"],
            1,
            "it does not answer --version",
        ),
    ] {
        let (ended, stderr) = refused_plyd(tmp.path(), PLYD.as_ref(), 0, &args);
        assert_eq!(ended, code, "{args:?}: {stderr}");
        assert!(
            stderr.starts_with("plyd: ") && stderr.contains(words),
            "{args:?}: {stderr}"
        );
        assert_eq!(stderr.lines().count(), 1, "{stderr}");
        assert!(!tmp.path().join("root").exists(), "{args:?}");
    }
    // Where an ordinary user reaches it.
    let copy = tmp.path().join("plyd");
    std::fs::copy(PLYD, &copy).unwrap();
    for path in [tmp.path(), &copy] {
        std::fs::set_permissions(path, Permissions::from_mode(0o755)).unwrap();
    }
    let (ended, stderr) = refused_plyd(tmp.path(), &copy, 65534, &[]);
    assert_eq!(ended, 1, "{stderr}");
    assert!(
        stderr.contains("has to run as root; start it with sudo"),
        "{stderr}"
    );
    assert_eq!(stderr.lines().count(), 1, "{stderr}");
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

#[test]
fn the_servers_tell_a_bad_command_line_as_snapctl_does() {
    for (program, name, args, sentence) in [
        (PLYD, "plyd", &["--nope"][..], "`plyd` has no option --nope"),
        (PLYD, "plyd", &["--rot", "/x"], "did you mean --root?"),
        (
            PLYD,
            "plyd",
            &["--log-format", "xml"],
            "it is one of json, text",
        ),
        (PLYD, "plyd", &["x"], "\"x\" is one argument too many"),
        (
            PLYFS,
            "plyfs",
            &["--nope", "/mnt"],
            "`plyfs` has no option --nope",
        ),
        (PLYFS, "plyfs", &[], "MOUNTPOINT is missing"),
        (
            PLYFS,
            "plyfs",
            &["--fuse-fd", "x", "/mnt"],
            "--fuse-fd cannot be \"x\"",
        ),
        (
            PLYFS,
            "plyfs",
            &["a", "b", "c"],
            "\"c\" is one argument too many",
        ),
    ] {
        let done = Done::from(Command::new(program).args(args).output().unwrap());
        assert_eq!((done.code, done.stdout.as_str()), (2, ""), "{args:?}");
        let lines: Vec<&str> = done.stderr.lines().collect();
        assert_eq!(lines.len(), 3, "{}", done.stderr);
        assert!(
            lines[0].starts_with(&format!("{name}: ")),
            "{}",
            done.stderr
        );
        assert!(lines[0].contains(sentence), "{}", done.stderr);
        assert!(
            lines[1].starts_with(&format!("Usage: {name} ")),
            "{}",
            done.stderr
        );
        assert_eq!(lines[2], format!("`{name} --help` says more"));
    }
}

#[test]
fn what_plyd_refuses_says_what_to_give_instead() {
    let plyd = Plyd::start();
    plyd.load_busybox();
    let long = "h".repeat(65);
    for (args, code, words) in [
        (
            &["run", "--hostname", &long, BUSYBOX, "true"][..],
            125,
            "has 65 bytes, and the kernel takes 64 at most",
        ),
        (
            &["create", "--hostname", "a b", BUSYBOX],
            1,
            "leave out slashes, spaces",
        ),
        (
            &["image", "load", "-i", "/no/such/file"],
            1,
            "name an image archive with -i",
        ),
        // Which of the words is the image is not for the parser to say.
        (&["run", "", "true"], 125, "IMAGE: \"\" is no name"),
        (&["exec", "", "true"], 125, "CONTAINER: \"\" is no name"),
    ] {
        let done = plyd.snapctl(args);
        assert_eq!((done.code, done.stdout.as_str()), (code, ""), "{args:?}");
        assert!(done.stderr.contains(words), "{}", done.stderr);
        let usage = done.stderr.contains("Usage: snapctl");
        assert_eq!(usage, words.contains("is no name"), "{}", done.stderr);
    }
    // An empty word is the command's.
    assert_eq!(plyd.ok(["run", "--rm", BUSYBOX, "echo", ""]), "\n");
}
