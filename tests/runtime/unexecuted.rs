//! Programs that are there and cannot be executed. The kernel says so when the OCI runtime has said that the
//! container runs.

use std::fs;
use std::os::unix::fs::PermissionsExt;

use crate::common::{BUSYBOX, Done, Plyd};
use crate::crun;

/// Content, exit code, and how the reason ends.
const PROGRAMS: [(&str, &[u8], i32, &str); 5] = [
    (
        "text",
        b"neither a program nor a script\n",
        126,
        "xec format error",
    ),
    ("cut", b"\x7fELF\x02\x01\x01", 126, "xec format error"),
    ("empty", b"", 126, "xec format error"),
    ("closed", b"#!/etc/passwd\n", 126, "ermission denied"),
    (
        "script",
        b"#!/no/such/interpreter\n",
        127,
        "; the file is there, but the interpreter or loader that it names is not",
    ),
];

/// Nothing but the exit code of the OCI runtime's child told of them: 1, as many a program's own. `run -d` gave an id
/// and 0.
#[test]
fn what_cannot_be_executed_is_126_or_127_for_every_command() {
    let plyd = Plyd::start();
    plyd.load_busybox();
    check(&plyd);
}

#[test]
fn so_it_is_with_crun() {
    check(&crun::plyd());
}

fn check(plyd: &Plyd) {
    let dir = plyd.dir().join("programs");
    fs::create_dir(&dir).unwrap();
    for (name, content, ..) in PROGRAMS {
        fs::write(dir.join(name), content).unwrap();
        fs::set_permissions(dir.join(name), fs::Permissions::from_mode(0o755)).unwrap();
    }
    let volume = format!("{}:/p", dir.display());
    let volume = ["-v", volume.as_str()];
    let run =
        |options: &[&str], rest: &[&str]| plyd.snapctl([&["run"], options, &volume, rest].concat());
    run(&["-d", "--name", "long"], &[BUSYBOX, "sleep", "1000"]);
    for (name, _, code, reason) in PROGRAMS {
        let program = format!("/p/{name}");
        let check = |done: &Done, command: &str| {
            assert_eq!(
                (done.code, &*done.stdout),
                (code, ""),
                "{command} {name}: {}",
                done.stderr
            );
            assert!(
                done.stderr.starts_with("snapctl: cannot ")
                    && done.stderr.trim_end().ends_with(reason)
                    && done.stderr.lines().count() == 1,
                "{command} {name}: {}",
                done.stderr
            );
        };
        for options in [&["--rm"][..], &["--rm", "-t"], &["-d", "--rm"]] {
            check(&run(options, &[BUSYBOX, &program]), &options.join(" "));
        }
        for options in [&["long"][..], &["-t", "long"]] {
            let args = [&["exec"], options, &[&*program]].concat();
            check(&plyd.snapctl(args), &options.join(" "));
        }
        assert_eq!(plyd.ok(["ps", "-aq"]).lines().count(), 1);

        // One that is kept says why, and can be started again once that is mended.
        check(&run(&["--name", "job"], &[BUSYBOX, &program]), "kept");
        let job = &plyd.json(["inspect", "job"])[0];
        assert_eq!(job["status"], "created");
        assert!(job["error"].as_str().unwrap().ends_with(reason), "{job}");
        let again = plyd.snapctl(["start", "job"]);
        assert_eq!(again.code, 1, "{}", again.stderr);
        assert!(again.stderr.contains("cannot start"), "{}", again.stderr);
        let file = dir.join(name);
        let bad = fs::read(&file).unwrap();
        fs::write(&file, "#!/bin/sh\necho mended; exit 3\n").unwrap();
        plyd.ok(["start", "job"]);
        assert_eq!(plyd.ok(["wait", "job"]), "3\n");
        assert_eq!(plyd.ok(["logs", "job"]), "mended\n");
        plyd.ok(["rm", "job"]);
        fs::write(&file, bad).unwrap();
    }
    // A code of the program's own is that.
    for code in ["1", "126", "255"] {
        let exit = format!("exit {code}");
        let done = run(&["--rm"], &[BUSYBOX, "sh", "-c", &exit]);
        assert_eq!((done.code.to_string(), &*done.stderr), (code.into(), ""));
    }
}
