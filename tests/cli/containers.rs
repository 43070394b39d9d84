//! Containers from `create` to `rm`, and the exit codes of `run` and `exec`.

use std::fs;
use std::process::Command;

use nix::sys::signal::Signal;

use crate::common::{BUSYBOX, PLYD, Plyd, mounts_below, until};

fn plyd() -> Plyd {
    let plyd = Plyd::start();
    plyd.load_busybox();
    plyd
}

#[test]
fn exit_codes_are_docker_s() {
    let plyd = plyd();
    for (args, code) in [
        (&["run", "--rm", BUSYBOX, "true"][..], 0),
        (&["run", "--rm", BUSYBOX, "sh", "-c", "exit 42"], 42),
        (
            &[
                "run",
                "--rm",
                BUSYBOX,
                "sh",
                "-c",
                "exec 2>/dev/null; sleep 1000 & kill -9 $!; wait $!",
            ],
            137,
        ),
        (&["run", "--rm", BUSYBOX, "/no/such/program"], 127),
        (&["run", "--rm", BUSYBOX, "no-such-program"], 127),
        (&["run", "--rm", BUSYBOX, "/etc/passwd"], 126),
        (&["run", "--rm", BUSYBOX, "/etc"], 126),
        (&["run", "--rm", "no-such-image"], 125),
        (&["run", "--rm", "-u", "nobody-here", BUSYBOX, "true"], 125),
        (&["exec", "no-such-container", "true"], 125),
    ] {
        let done = plyd.snapctl(args);
        assert_eq!(
            (done.code, done.stdout.as_str()),
            (code, ""),
            "{args:?}: {}",
            done.stderr
        );
        let failed = matches!(code, 125..=127);
        assert_eq!(done.stderr.is_empty(), !failed, "{args:?}: {}", done.stderr);
        assert!(done.stderr.lines().count() <= 1, "{}", done.stderr);
    }
    // --rm took all of them away.
    assert_eq!(plyd.ok(["ps", "-aq"]), "");
    assert_eq!(mounts_below(plyd.dir()), Vec::<std::path::PathBuf>::new());
}

#[test]
fn a_container_is_what_its_options_say() {
    let plyd = plyd();
    let volume = plyd.dir().join("volume");
    fs::create_dir(&volume).unwrap();
    fs::write(volume.join("file"), "from the host\n").unwrap();
    let spec = format!("{}:/data:ro", volume.display());
    let script = "id -u; id -g; pwd; echo $A; hostname; cat /data/file; \
                  touch /data/x 2>/dev/null || echo read-only; touch /tmp/y || echo read-only";
    let output = plyd.ok([
        "run",
        "--rm",
        "--name",
        "job",
        "-e",
        "A=b=c",
        "-w",
        "/tmp",
        "-u",
        "1000:1000",
        "-v",
        &spec,
        "--hostname",
        "plank",
        BUSYBOX,
        "sh",
        "-c",
        script,
    ]);
    assert_eq!(
        output,
        "1000\n1000\n/tmp\nb=c\nplank\nfrom the host\nread-only\n"
    );

    let read_only = plyd.ok([
        "run",
        "--rm",
        "--read-only",
        BUSYBOX,
        "sh",
        "-c",
        "touch /x 2>/dev/null || echo no",
    ]);
    assert_eq!(read_only, "no\n");
    let entrypoint = plyd.ok([
        "run",
        "--rm",
        "--entrypoint",
        "echo",
        BUSYBOX,
        "-n",
        "hello",
    ]);
    assert_eq!(entrypoint, "hello");
    let links = plyd.ok(["run", "--rm", BUSYBOX, "ls", "/sys/class/net"]);
    assert_eq!(links, "lo\n");
    let host = plyd.ok([
        "run",
        "--rm",
        "--network",
        "host",
        BUSYBOX,
        "ls",
        "/sys/class/net",
    ]);
    let mut own: Vec<String> = fs::read_dir("/sys/class/net")
        .unwrap()
        .flatten()
        .map(|e| e.file_name().into_string().unwrap())
        .collect();
    own.sort();
    assert_eq!(host.lines().collect::<Vec<_>>(), own);
}

#[test]
fn a_working_directory_is_told_of_as_the_container_has_it() {
    let plyd = plyd();
    let dir = plyd.dir().to_str().unwrap();
    plyd.ok(["run", "-d", "--name", "long", BUSYBOX, "sleep", "1000"]);
    for (args, code, words) in [
        (
            &["run", "--rm", "-w", "/etc/passwd", BUSYBOX, "true"][..],
            125,
            "\"/etc/passwd\" cannot be used: it, or a part of it, is not a directory in the container",
        ),
        (
            &["run", "--rm", "-v", "/etc:/etc/passwd/x", BUSYBOX, "true"],
            125,
            "\"/etc/passwd/x\" cannot be used",
        ),
        (
            &["exec", "-w", "/missing", "long", "true"],
            126,
            "the working directory \"/missing\" cannot be used in the container: no such file",
        ),
        (
            &["exec", "-w", "/etc/passwd", "long", "true"],
            126,
            "the working directory \"/etc/passwd\" cannot be used in the container: not a dir",
        ),
    ] {
        let done = plyd.snapctl(args);
        assert_eq!(done.code, code, "{args:?}: {}", done.stderr);
        assert!(done.stderr.contains(words), "{args:?}: {}", done.stderr);
        assert!(!done.stderr.contains(dir), "{args:?}: {}", done.stderr);
    }
}

#[test]
fn an_oci_runtime_that_is_none_is_named() {
    let mut command = Command::new(PLYD);
    // It has a version, and no idea of containers.
    command.args(["--oci-runtime", "/bin/echo"]);
    let plyd = Plyd::start_with(command);
    plyd.load_busybox();
    let done = plyd.snapctl(["run", "--rm", BUSYBOX, "true"]);
    assert_eq!(done.code, 125);
    for words in ["/bin/echo does not work on this host", "--oci-runtime"] {
        assert!(done.stderr.contains(words), "{}", done.stderr);
    }
}

#[test]
fn a_container_from_create_to_rm() {
    let plyd = plyd();
    let id = plyd.ok([
        "create",
        "--name",
        "job",
        BUSYBOX,
        "sh",
        "-c",
        "echo out; echo err >&2; exec sleep 1000",
    ]);
    let id = id.trim_end();
    assert!(
        id.len() == 64 && id.bytes().all(|b| b.is_ascii_hexdigit()),
        "{id}"
    );
    assert_eq!(plyd.ok(["ps", "-q"]), "");
    let created = plyd.json(["ps", "-a", "--json"]);
    assert_eq!(created[0]["status"], "created");
    let mut fields: Vec<&str> = created[0]
        .as_object()
        .unwrap()
        .keys()
        .map(String::as_str)
        .collect();
    fields.sort_unstable();
    let documented = [
        "args",
        "auto_remove",
        "created",
        "error",
        "exit_code",
        "finished",
        "id",
        "image",
        "image_id",
        "name",
        "oom_killed",
        "pid",
        "snapshot",
        "started",
        "status",
        "tty",
    ];
    assert_eq!(fields, documented);
    let taken = plyd.snapctl(["create", "--name", "job", BUSYBOX]);
    assert_eq!(taken.code, 1);
    assert!(taken.stderr.contains("job"), "{}", taken.stderr);

    assert_eq!(plyd.ok(["start", "job"]), "job\n");
    let table = plyd.ok(["ps"]);
    let row: Vec<&str> = table.lines().nth(1).unwrap().split_whitespace().collect();
    assert_eq!(row[..3], [&id[..12], "job", BUSYBOX]);
    assert!(table.contains("running"), "{table}");
    assert!(
        table.contains("sh -c echo out; echo err >&2; ..."),
        "{table}"
    );
    let whole = plyd.ok(["ps", "--no-trunc"]);
    assert!(whole.contains(id), "{whole}");
    assert!(whole.contains("echo err >&2; exec sleep 1000"), "{whole}");
    let inspected = plyd.json(["inspect", "job"]);
    assert_eq!(inspected[0]["status"], "running");
    assert!(inspected[0]["pid"].as_u64() > Some(1));
    assert_eq!(inspected[0]["spec"]["process"]["args"][0], "sh");

    until("the output is logged", || {
        plyd.ok(["logs", "job"]) == "out\n"
    });
    assert_eq!(plyd.snapctl(["logs", "job"]).stderr, "err\n");
    assert_eq!(plyd.ok(["exec", "job", "echo", "hello"]), "hello\n");
    assert_eq!(plyd.snapctl(["exec", "job", "sh", "-c", "exit 9"]).code, 9);
    assert_eq!(plyd.snapctl(["exec", "job", "no-such-program"]).code, 127);
    assert_eq!(
        plyd.ok([
            "exec",
            "-e",
            "A=1",
            "-w",
            "/etc",
            "-u",
            "1000",
            "job",
            "sh",
            "-c",
            "echo $A $(pwd) $(id -u)"
        ]),
        "1 /etc 1000\n"
    );

    let running = plyd.snapctl(["rm", "job"]);
    assert_eq!(running.code, 1);
    assert!(
        running.stderr.contains("-f") || running.stderr.contains("stop"),
        "{}",
        running.stderr
    );
    assert_eq!(plyd.ok(["kill", "-s", "KILL", "job"]), "job\n");
    assert_eq!(plyd.ok(["wait", "job"]), "137\n");
    assert_eq!(plyd.json(["ps", "-a", "--json"])[0]["exit_code"], 137);
    assert_eq!(plyd.ok(["stop", "job"]), "job\n");
    assert_eq!(plyd.snapctl(["kill", "job"]).code, 1);
    assert_eq!(plyd.ok(["rm", &id[..6]]), format!("{}\n", &id[..6]));
    assert_eq!(plyd.ok(["ps", "-aq"]), "");
    let gone = plyd.snapctl(["inspect", "job"]);
    assert_eq!((gone.code, gone.stdout.as_str()), (1, "[]\n"));
}

#[test]
fn stop_asks_first_and_logs_follow() {
    let plyd = plyd();
    let script = "trap 'echo asked; exit 5' TERM; echo ready; while :; do sleep 0.1; done";
    plyd.ok(["run", "-d", "--name", "job", BUSYBOX, "sh", "-c", script]);
    let follow = plyd
        .command()
        .args(["logs", "-f", "job"])
        .stdout(std::process::Stdio::piped())
        .spawn()
        .unwrap();
    until("it is ready", || plyd.ok(["logs", "job"]) == "ready\n");
    plyd.ok(["stop", "job"]);
    assert_eq!(plyd.ok(["wait", "job"]), "5\n");
    let followed = follow.wait_with_output().unwrap();
    assert_eq!(
        String::from_utf8(followed.stdout).unwrap(),
        "ready\nasked\n"
    );
    assert_eq!(plyd.ok(["logs", "--tail", "1", "job"]), "asked\n");
    let stamped = plyd.ok(["logs", "-t", "job"]);
    assert!(stamped.lines().all(|line| line.contains("Z ")), "{stamped}");
    // A container can be started again; force ends what runs.
    plyd.ok(["start", "job"]);
    assert_eq!(plyd.ok(["ps", "-q"]).lines().count(), 1);
    plyd.ok(["rm", "-f", "job"]);
}

/// What was written while the lines were counted was printed, too.
#[test]
fn the_last_lines_are_those_of_the_moment_while_a_container_writes() {
    let plyd = plyd();
    // In bursts, 1 MB/s or so: a slow machine's disk is not filled.
    let script =
        "i=0; while :; do i=$((i+1)); echo line $i; [ $((i%500)) -ne 0 ] || usleep 10000; done";
    plyd.ok(["run", "-d", "--name", "job", BUSYBOX, "sh", "-c", script]);
    until("there is much to count", || {
        let last = plyd.ok(["logs", "--tail", "1", "job"]);
        let number = last.split_whitespace().nth(1);
        number.is_some_and(|number| number.parse::<u64>().unwrap() > 80_000)
    });
    for lines in [1, 3, 20] {
        for _ in 0..5 {
            let shown = plyd.ok(["logs", "--tail", &lines.to_string(), "job"]);
            assert_eq!(shown.lines().count(), lines, "{shown}");
        }
    }
    plyd.ok(["rm", "-f", "job"]);
}

#[test]
fn writes_stay_in_their_own_container() {
    let plyd = plyd();
    plyd.ok([
        "run",
        "--name",
        "one",
        BUSYBOX,
        "sh",
        "-c",
        "echo mine >/etc/motd; echo new >/new",
    ]);
    let seen = plyd.ok(["run", "--rm", BUSYBOX, "sh", "-c", "cat /etc/motd; ls /"]);
    assert!(
        seen.starts_with("This file belongs to the image.\n") && !seen.contains("new"),
        "{seen}"
    );
    let id = plyd.ok(["ps", "-aq"]);
    let diff = plyd.ok(["snapshot", "diff", "--owner", "container", id.trim_end()]);
    assert!(
        diff.contains("M /etc/motd\n") && diff.contains("A /new\n"),
        "{diff}"
    );
}

#[test]
fn all_words_after_the_image_belong_to_its_command() {
    let plyd = plyd();
    let words = ["--name", "foo", "-d", "--rm", "--help", "--address", "x"];
    let mut run = vec!["run", "--rm", "--entrypoint", "echo", BUSYBOX];
    run.extend(words);
    assert_eq!(plyd.ok(run), "--name foo -d --rm --help --address x\n");
    assert_eq!(plyd.ok(["ps", "-aq"]), "");
    plyd.ok(["run", "-d", "--name", "long", BUSYBOX, "sleep", "1000"]);
    assert_eq!(
        plyd.ok(["exec", "long", "echo", "-i", "--user"]),
        "-i --user\n"
    );
    let unknown = plyd.snapctl(["run", "--nope", BUSYBOX]);
    assert_eq!(unknown.code, 125);
    assert!(
        unknown.stderr.contains("no option --nope"),
        "{}",
        unknown.stderr
    );
}

/// It was said not to exist, and its image to be in nobody's use.
#[test]
fn a_container_whose_record_is_damaged_is_told_by_its_id() {
    let mut plyd = plyd();
    let id = plyd
        .ok(["create", "--name", "bad", BUSYBOX])
        .trim()
        .to_owned();
    plyd.ok(["create", "--name", "good", BUSYBOX]);
    plyd.signal(Signal::SIGTERM);
    let record = plyd.root().join(format!("containers/{id}.record"));
    let sound = fs::read(&record).unwrap();
    fs::write(&record, &sound[..sound.len() / 2]).unwrap();
    plyd.launch();

    let path = record.to_str().unwrap();
    for reference in [&id, &id[..12], "bad"] {
        for command in ["inspect", "start", "rm"] {
            let done = plyd.snapctl([command, reference]);
            let told = &done.stderr;
            assert_eq!(done.code, 1, "{told}");
            assert!(told.contains(path) && told.contains("restore it"), "{told}");
            let by_name = reference == "bad";
            assert_eq!(told.contains("there is no container"), by_name, "{told}");
        }
    }
    assert_eq!(plyd.ok(["ps", "-a", "-q"]).lines().count(), 1);
    plyd.ok(["rm", "good"]);
    let refused = plyd.snapctl(["image", "rm", BUSYBOX]);
    assert_eq!(refused.code, 1);
    assert!(refused.stderr.contains(path), "{}", refused.stderr);

    plyd.signal(Signal::SIGTERM);
    fs::write(&record, &sound).unwrap();
    plyd.launch();
    plyd.ok(["rm", "bad"]);
    plyd.ok(["image", "rm", BUSYBOX]);
}

#[test]
fn stop_sends_the_signal_that_the_image_names() {
    let plyd = Plyd::start();
    let archive = plyd.dir().join("archive.tar");
    let config = r#"{"Env":["PATH=/bin"],"Cmd":["/bin/sh"],"StopSignal":"SIGUSR1"}"#;
    let maker = concat!(env!("CARGO_MANIFEST_DIR"), "/contrib/busybox-archive");
    let mut making = Command::new(maker);
    making.arg(&archive).args(["localhost/stops:1", config]);
    assert!(making.status().unwrap().success());
    plyd.ok(["image", "load", "-qi", archive.to_str().unwrap()]);
    // The first process of a container is not ended by a signal that it has no handler for.
    let script =
        "trap 'exit 42' USR1; trap 'exit 15' TERM; echo ready; while :; do sleep 0.1; done";
    plyd.ok([
        "run",
        "-d",
        "--name",
        "c",
        "localhost/stops:1",
        "sh",
        "-c",
        script,
    ]);
    until("the handlers are there", || {
        plyd.ok(["logs", "c"]) == "ready\n"
    });
    plyd.ok(["stop", "-t", "60", "c"]);
    assert_eq!(plyd.ok(["wait", "c"]), "42\n");
}

#[test]
fn without_an_oci_runtime_the_error_says_what_to_install() {
    // plyd looks where distributions put them, whatever PATH says; here it finds what is no program.
    let script = r#"
        for dir in /usr/local/sbin /usr/local/bin /usr/sbin /usr/bin /sbin /bin; do
            for name in runc crun; do
                [ ! -e $dir/$name ] || mount --bind /dev/null $dir/$name
            done
        done
        exec env PATH=/nowhere "$@""#;
    let mut command = Command::new("unshare");
    command.args(["--mount", "--propagation", "private"]);
    command.args(["sh", "-c", script, "sh", PLYD]);
    let plyd = Plyd::start_with(command);
    plyd.load_busybox();
    let done = plyd.snapctl(["run", "--rm", BUSYBOX, "true"]);
    assert_eq!(done.code, 125, "{}", done.stderr);
    for words in [
        "there is no OCI runtime",
        "apt-get install runc",
        "--oci-runtime",
    ] {
        assert!(done.stderr.contains(words), "{}", done.stderr);
    }
    assert_eq!(plyd.ok(["ps", "-aq"]), "");
    let info = plyd.json(["system", "info", "--json"]);
    let problem = info["oci_runtime"]["problem"].as_str().unwrap();
    assert!(problem.contains("install runc"), "{problem}");
}

#[test]
fn a_prefix_that_fits_several_containers_is_refused() {
    let plyd = plyd();
    let mut ids: Vec<String> = Vec::new();
    // There are 16 digits that an id can begin with.
    let (first, other) = loop {
        assert!(ids.len() < 17);
        let id = plyd.ok(["create", BUSYBOX]).trim().to_owned();
        if let Some(other) = ids.iter().find(|other| other[..1] == id[..1]) {
            break (id.clone(), other.clone());
        }
        ids.push(id);
    };
    let prefix = &first[..1];
    let done = plyd.snapctl(["rm", prefix]);
    assert_eq!(done.code, 1);
    let told = format!("\"{prefix}\" fits 2 containers; give more digits of the id");
    assert!(done.stderr.contains(&told), "{}", done.stderr);
    let shared = std::iter::zip(first.bytes(), other.bytes()).take_while(|(a, b)| a == b);
    let unique = &first[..=shared.count()];
    plyd.ok(["rm", unique]);
    assert_eq!(plyd.ok(["rm", prefix]).trim(), prefix);
}
