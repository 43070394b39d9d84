//! What a process finds in a container: Docker's defaults, and nothing of the host.

use std::fs;
use std::os::unix::fs::symlink;

use serde_json::json;

use crate::common::{BUSYBOX, Plyd};
use crate::image::Image;

fn plyd() -> Plyd {
    let plyd = Plyd::start();
    plyd.load_busybox();
    plyd
}

fn shell(plyd: &Plyd, options: &[&str], script: &str) -> String {
    let mut args = vec!["run", "--rm"];
    args.extend(options);
    args.extend([BUSYBOX, "sh", "-c", script]);
    plyd.ok(args)
}

#[test]
fn privileges_are_docker_s() {
    let plyd = plyd();
    let status = shell(
        &plyd,
        &[],
        "grep -E '^(Cap|Seccomp:|NoNewPrivs)' /proc/self/status",
    );
    for line in [
        "CapInh:\t0000000000000000",
        "CapPrm:\t00000000a80425fb",
        "CapEff:\t00000000a80425fb",
        "CapBnd:\t00000000a80425fb",
        "CapAmb:\t0000000000000000",
        "NoNewPrivs:\t0",
        "Seccomp:\t2",
    ] {
        assert!(
            status.lines().any(|found| found == line),
            "{line} in\n{status}"
        );
    }
    let user = shell(&plyd, &["-u", "user"], "grep CapEff /proc/self/status; id");
    assert_eq!(
        user,
        "CapEff:\t0000000000000000\nuid=1000(user) gid=1000(user) groups=1000(user)\n"
    );
    // What the filter refuses, and what the kernel hides.
    let script = "mount -t tmpfs x /tmp 2>/dev/null || echo no mount; \
                  unshare -U true 2>/dev/null || echo no namespace; \
                  cat /proc/keys | wc -c; \
                  touch /proc/sys/kernel/x 2>/dev/null || echo read-only; \
                  ls /sys/firmware | wc -l; \
                  touch /sys/x 2>/dev/null || echo read-only; \
                  mknod /tmp/disk b 253 0 && head -c1 /tmp/disk >/dev/null 2>&1 || echo no disk";
    assert_eq!(
        shell(&plyd, &[], script),
        "no mount\nno namespace\n0\nread-only\n0\nread-only\nno disk\n"
    );
}

#[test]
fn the_container_s_own_names_and_files() {
    let plyd = plyd();
    let script = "hostname; cat /etc/hostname; grep -c localhost /etc/hosts; echo $HOSTNAME; \
                  echo $HOME; echo $PATH; echo \"[$TERM]\"; pwd; \
                  test $(ls -d /proc/[0-9]* | wc -l) -lt 10 && echo alone; \
                  for d in null zero full random urandom tty; do test -c /dev/$d || echo $d; done; \
                  df -k /dev/shm | tail -1 | awk '{print $2}'; stat -c %a /dev/shm";
    let output = shell(&plyd, &["--hostname", "plank"], script);
    assert_eq!(
        output,
        "plank\nplank\n2\nplank\n/root\n/bin\n[]\n/\nalone\n65536\n1777\n"
    );
    let id = plyd.ok(["create", BUSYBOX, "hostname"]);
    assert_eq!(plyd.ok(["start", id.trim_end()]).trim_end(), id.trim_end());
    plyd.ok(["wait", id.trim_end()]);
    assert_eq!(plyd.ok(["logs", id.trim_end()]).trim_end(), &id[..12]);
}

#[test]
fn users_come_from_the_image_and_hostile_files_are_named() {
    let plyd = Plyd::start();
    let image = Image::new(&plyd, "users").set("User", json!("ann"));
    let passwd = image.root().join("etc/passwd");
    let group = image.root().join("etc/group");
    fs::write(&passwd, "root:x:0:0::/root:\nann:x:1234:55::/home/ann:\n").unwrap();
    fs::write(&group, "root:x:0:\nann:x:55:\naudio:x:29:bob,ann\n").unwrap();
    image.load(&plyd, "users");
    let ids = "echo $(id -u) $(id -g) $(id -G) $HOME";
    let run = |user: &[&str]| {
        let mut args = vec!["run", "--rm"];
        args.extend(user);
        args.extend(["users", "sh", "-c", ids]);
        plyd.ok(args)
    };
    assert_eq!(run(&[]), "1234 55 55 29 /home/ann\n");
    assert_eq!(run(&["-u", "ann:audio"]), "1234 29 29 /home/ann\n");
    assert_eq!(run(&["-u", "0"]), "0 0 0 /root\n");
    assert_eq!(run(&["-u", "77:88"]), "77 88 88 /\n");
    let nobody = plyd.snapctl(["run", "--rm", "-u", "eve", "users", "true"]);
    assert_eq!(nobody.code, 125);
    assert!(nobody.stderr.contains("eve"), "{}", nobody.stderr);

    fs::remove_file(&passwd).unwrap();
    let mode = nix::sys::stat::Mode::S_IRWXU;
    nix::unistd::mkfifo(&passwd, mode).unwrap();
    image.load(&plyd, "fifo");
    for user in ["ann", "7:8"] {
        let fifo = plyd.snapctl(["run", "--rm", "-u", user, "fifo", "true"]);
        assert_eq!(fifo.code, 125);
        assert!(
            fifo.stderr.contains("not a regular file"),
            "{}",
            fifo.stderr
        );
    }

    // Out of the root there is nothing for it, whoever is asked for.
    for target in ["../../../../../../etc/hostname", "/etc/hostname"] {
        fs::remove_file(&passwd).unwrap();
        symlink(target, &passwd).unwrap();
        image.load(&plyd, "link");
        for user in ["ann", "root", "0"] {
            let link = plyd.snapctl(["run", "--rm", "-u", user, "link", "true"]);
            assert_eq!(link.code, 125, "{target} {user}");
            let said = "/etc/passwd is a symbolic link that leads out of the root";
            assert!(link.stderr.contains(said), "{}", link.stderr);
        }
    }
    // Inside, a link is a link.
    fs::remove_file(&passwd).unwrap();
    fs::write(image.root().join("users"), "ann:x:4321:55::/:\n").unwrap();
    symlink("/users", &passwd).unwrap();
    image.load(&plyd, "inside");
    assert_eq!(plyd.ok(["run", "--rm", "inside", "id", "-u"]), "4321\n");
    assert_eq!(plyd.ok(["ps", "-aq"]), "");
    assert_eq!(
        plyd.ok(["snapshot", "ls", "-q", "--owner", "container"]),
        ""
    );
}

#[test]
fn volumes_stay_inside_the_root() {
    let plyd = Plyd::start();
    let image = Image::new(&plyd, "volumes");
    let outside = plyd.dir().join("outside");
    let source = plyd.dir().join("source");
    fs::create_dir(&outside).unwrap();
    fs::create_dir(&source).unwrap();
    fs::write(source.join("file"), "content\n").unwrap();
    symlink(&outside, image.root().join("way-out")).unwrap();
    symlink("/srv", image.root().join("link")).unwrap();
    symlink("../../../../../etc/ply-volume", image.root().join("up")).unwrap();
    symlink("/nowhere/at/all", image.root().join("dangling")).unwrap();
    symlink("loop", image.root().join("loop")).unwrap();
    fs::create_dir(image.root().join("srv")).unwrap();
    image.load(&plyd, "volumes");
    let source = source.to_str().unwrap();
    let run = |volume: &str, script: &str| {
        plyd.snapctl(["run", "--rm", "-v", volume, "volumes", "sh", "-c", script])
    };
    let linked = run(
        &format!("{source}:/link/sub"),
        "cat /srv/sub/file; echo more >/srv/sub/new",
    );
    assert_eq!((linked.code, linked.stdout.as_str()), (0, "content\n"));
    assert_eq!(
        fs::read_to_string(format!("{source}/new")).unwrap(),
        "more\n"
    );
    let file = run(
        &format!("{source}/file:/etc/one/file:ro"),
        "cat /etc/one/file; echo x >/etc/one/file",
    );
    assert_eq!((file.code, file.stdout.as_str()), (1, "content\n"));
    // A link that would lead out leads to the same path inside, for the volume as for the process.
    for target in ["/way-out/sub", "/up/sub", "/way-out", "/dangling/sub"] {
        let inside = run(
            &format!("{source}:{target}:ro"),
            &format!("cat {target}/file"),
        );
        assert_eq!(
            (inside.code, inside.stdout.as_str()),
            (0, "content\n"),
            "{target}: {}",
            inside.stderr
        );
        assert!(fs::read_dir(&outside).unwrap().next().is_none());
        assert!(!fs::exists("/etc/ply-volume").unwrap());
    }
    for (volume, word) in [
        (format!("{source}:/loop/sub"), "/loop/sub"),
        (format!("{source}:/etc/passwd/sub"), "/etc/passwd/sub"),
        (format!("{source}/missing:/srv"), "missing"),
        (format!("{source}/file:/srv"), "/srv"),
        (format!("{source}:/"), "root"),
    ] {
        let refused = run(&volume, "true");
        assert_eq!(refused.code, 125, "{volume}");
        assert!(refused.stderr.contains(word), "{}", refused.stderr);
    }
}

#[test]
fn the_image_s_words_and_the_caller_s() {
    let plyd = Plyd::start();
    let image = Image::new(&plyd, "words")
        .set("Entrypoint", json!(["echo", "entry"]))
        .set("Cmd", json!(["cmd"]))
        .set("WorkingDir", json!("/made/for/it"));
    image.load(&plyd, "words");
    assert_eq!(plyd.ok(["run", "--rm", "words"]), "entry cmd\n");
    assert_eq!(plyd.ok(["run", "--rm", "words", "mine"]), "entry mine\n");
    assert_eq!(
        plyd.ok(["run", "--rm", "--entrypoint", "pwd", "words"]),
        "/made/for/it\n"
    );
    let nothing = plyd.snapctl(["run", "--rm", "--entrypoint", "", "words"]);
    assert_eq!(nothing.code, 125);
    assert!(nothing.stderr.contains("program"), "{}", nothing.stderr);
}
