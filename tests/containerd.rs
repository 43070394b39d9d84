//! Debian's containerd with plyd as its proxy snapshotter: images are imported and unpacked with the stock
//! differ, containers run, the collector collects.

#[path = "common/committed.rs"]
#[allow(dead_code, reason = "each test program uses a part of it")]
mod committed;
#[path = "containerd/crash.rs"]
mod crash;
#[path = "containerd/host.rs"]
mod host;
#[path = "containerd/image.rs"]
mod image;
#[path = "containerd/links.rs"]
mod links;
#[path = "containerd/releases.rs"]
mod releases;
#[path = "common/snapshot.rs"]
mod snapshot;
#[path = "containerd/tree.rs"]
mod tree;

use std::fs;
use std::path::PathBuf;
use std::time::{SystemTime, UNIX_EPOCH};

use host::{Host, sh};

/// Seconds since the epoch.
fn now() -> i64 {
    let since = SystemTime::now().duration_since(UNIX_EPOCH);
    since.unwrap().as_secs().cast_signed()
}

/// The names that the image's odd layers end up with, and what they are there for.
#[test]
fn a_debian_image_is_what_the_native_snapshotter_makes_of_it_and_runs() {
    let host = Host::start();
    let (archive, headers) = image::debian(&host.dir);
    let began = now();
    for snapshotter in ["native", "plywood"] {
        host.ctr(&[
            "images",
            "import",
            "--snapshotter",
            snapshotter,
            archive.to_str().unwrap(),
        ]);
    }
    let top = host.chain_id(image::DEBIAN);
    let [native, plywood] = ["native", "plywood"].map(|s| host.look_into(s, &top));
    let (want, got) = (tree::read(&native), tree::read(&plywood));
    assert!(
        want.len() > 3000,
        "the image has only {} entries",
        want.len()
    );
    // The odd entries came through at all: the comparison would hold for two empty trees as well.
    for path in [
        "opt/omitted/parent/file",
        "usr/bin/dash-link",
        "usr/bin/ls-through-bin",
        "etc/was-a-directory",
        "opt/caps",
        "opt/null",
    ] {
        assert!(
            want.contains_key(path.as_bytes()),
            "the native snapshotter has no {path}"
        );
    }
    for path in [
        "usr/share/doc/dash",
        "usr/share/perl5/Debconf",
        "opt/opaque/old",
        "opt/links/b",
        "etc/was-a-directory/inside",
    ] {
        assert!(
            !want.contains_key(path.as_bytes()),
            "the native snapshotter still has {path}"
        );
    }
    let differences = tree::differences(&want, &got, began, &headers);
    assert!(
        differences.is_empty(),
        "{} differences:\n{}",
        differences.len(),
        differences[..differences.len().min(40)].join("\n")
    );
    host.look_away("native", &native);
    host.look_away("plywood", &plywood);
    releases::differ_makes_the_same(&archive, &want, began, &headers);

    installs_a_package(&host);
    two_containers_do_not_see_each_other(&host);

    // Everything that containerd made goes when containerd lets go of it.
    host.ctr(&["images", "rm", "--sync", image::DEBIAN]);
    host.until("every snapshot is collected", || {
        host.snapshots("plywood").is_empty()
    });
    host.until("every mount is gone", || host.plyd_mounts().is_empty());
}

fn installs_a_package(host: &Host) {
    let dir = host.dir.join("package");
    fs::create_dir_all(dir.join("DEBIAN")).unwrap();
    fs::create_dir_all(dir.join("usr/share/plywood-test")).unwrap();
    fs::write(
        dir.join("DEBIAN/control"),
        "Package: plywood-test\nVersion: 1.0\nArchitecture: all\nMaintainer: nobody <nobody@localhost>\nDescription: test\n",
    )
    .unwrap();
    fs::write(
        dir.join("DEBIAN/postinst"),
        "#!/bin/sh\nset -e\necho configured >/usr/share/plywood-test/state\n",
    )
    .unwrap();
    sh(
        "chmod",
        &["755", dir.join("DEBIAN/postinst").to_str().unwrap()],
    );
    fs::write(dir.join("usr/share/plywood-test/file"), "packaged\n").unwrap();
    let shared = host.dir.join("shared");
    fs::create_dir_all(&shared).unwrap();
    sh(
        "dpkg-deb",
        &[
            "--build",
            "--root-owner-group",
            dir.to_str().unwrap(),
            shared.join("plywood-test.deb").to_str().unwrap(),
        ],
    );
    let mount = format!(
        "type=bind,src={},dst=/mnt,options=rbind:ro",
        shared.display()
    );
    let out = host.ctr(&[
        "run", "--rm", "--snapshotter", "plywood", "--mount", &mount, image::DEBIAN, "install", "/bin/sh", "-ec",
        "dpkg -i /mnt/plywood-test.deb >/dev/null; dpkg-query -W -f '${Status}\\n' plywood-test; cat /usr/share/plywood-test/file /usr/share/plywood-test/state; \
         dpkg -P plywood-test >/dev/null 2>&1; test ! -e /usr/share/plywood-test/file; echo purged",
    ]);
    assert_eq!(out, "install ok installed\npackaged\nconfigured\npurged\n");
}

fn two_containers_do_not_see_each_other(host: &Host) {
    let script = |name: &str| {
        format!(
            "cat /etc/hostname-of-image; echo {name} >/etc/hostname-of-image; rm /etc/debian_version; echo {name} >/only-{name}; sleep 1000"
        )
    };
    for name in ["one", "two"] {
        host.ctr(&[
            "run",
            "-d",
            "--snapshotter",
            "plywood",
            image::DEBIAN,
            name,
            "/bin/sh",
            "-ec",
            &script(name),
        ]);
    }
    for (name, other) in [("one", "two"), ("two", "one")] {
        let look = format!(
            "until test -e /only-{name}; do sleep 0.1; done; cat /etc/hostname-of-image; ls / | grep ^only-"
        );
        let out = host.ctr(&[
            "tasks",
            "exec",
            "--exec-id",
            "look",
            name,
            "/bin/sh",
            "-c",
            &look,
        ]);
        assert_eq!(
            out,
            format!("{name}\nonly-{name}\n"),
            "{name} sees what {other} did"
        );
    }
    let out = host.ctr(&[
        "run",
        "--rm",
        "--snapshotter",
        "plywood",
        image::DEBIAN,
        "three",
        "/bin/sh",
        "-c",
        "cat /etc/hostname-of-image; test -e /etc/debian_version && echo there",
    ]);
    assert_eq!(out, "image\nthere\n", "the image itself has changed");
    for name in ["one", "two"] {
        host.ctr(&["tasks", "kill", "--signal", "SIGKILL", name]);
        host.until("the task has ended", || {
            host.ctr(&["tasks", "ls"])
                .lines()
                .all(|l| !l.starts_with(name) || l.contains("STOPPED"))
        });
        host.ctr(&["tasks", "rm", name]);
        host.ctr(&["containers", "rm", name]);
    }
}

/// containerd's collector walks its snapshotter without a filter and removes every name that it does not know.
#[test]
fn the_collector_cannot_touch_what_snapctl_and_the_runtime_own() {
    let host = Host::start();
    let archive = image::busybox(&host.dir);
    let archive = archive.to_str().unwrap();
    host.snapctl(&["image", "load", "--quiet", "-i", archive]);
    host.snapctl(&["snapshot", "prepare", "mine", "localhost/busybox:latest"]);
    host.snapctl(&[
        "create",
        "--name",
        "kept",
        "localhost/busybox:latest",
        "true",
    ]);
    let before = host.snapctl(&["snapshot", "ls", "--quiet"]);
    assert!(
        before.lines().any(|l| l == "mine"),
        "snapctl snapshot ls does not list its own: {before}"
    );

    host.ctr(&["images", "import", "--snapshotter", "plywood", archive]);
    assert_eq!(
        host.ctr(&[
            "run",
            "--rm",
            "--snapshotter",
            "plywood",
            "localhost/busybox:latest",
            "c",
            "/bin/echo",
            "runs"
        ]),
        "runs\n"
    );
    assert!(
        !host.snapshots("plywood").iter().any(|key| key == "mine"),
        "containerd sees a snapshot of snapctl"
    );
    host.ctr(&["images", "rm", "--sync", "localhost/busybox:latest"]);
    host.until("containerd's own snapshots are collected", || {
        host.snapshots("plywood").is_empty()
    });
    let left = host.snapctl(&["snapshot", "ls", "--quiet"]);
    let sorted = |s: &str| {
        let mut v: Vec<String> = s.lines().map(Into::into).collect();
        v.sort();
        v
    };
    assert_eq!(sorted(&left), sorted(&before));

    assert_eq!(
        host.snapctl(&[
            "run",
            "--rm",
            "localhost/busybox:latest",
            "cat",
            "/etc/image-name"
        ]),
        "busybox from Debian\n"
    );
    for args in [
        &["rm", "kept"][..],
        &["snapshot", "rm", "mine"],
        &["image", "rm", "localhost/busybox:latest"],
    ] {
        host.snapctl(args);
    }
    assert_eq!(host.snapctl(&["snapshot", "ls", "--quiet"]), "");
    host.until("every mount is gone", || host.plyd_mounts().is_empty());
}

/// A running task does not depend on plyd, and containerd connects to its successor by itself.
#[test]
fn containers_survive_the_death_of_plyd() {
    let mut host = Host::start();
    let archive = image::busybox(&host.dir);
    host.ctr(&[
        "images",
        "import",
        "--snapshotter",
        "plywood",
        archive.to_str().unwrap(),
    ]);
    host.ctr(&[
        "run",
        "-d",
        "--snapshotter",
        "plywood",
        "localhost/busybox:latest",
        "c",
        "/bin/sh",
        "-c",
        "echo before >/file; sleep 1000",
    ]);
    let exec = |host: &Host, id: &str, script: &str| {
        host.ctr(&[
            "tasks",
            "exec",
            "--exec-id",
            id,
            "c",
            "/bin/sh",
            "-c",
            script,
        ])
    };
    assert_eq!(
        exec(
            &host,
            "a",
            "until test -s /file; do sleep 0.1; done; cat /file"
        ),
        "before\n"
    );
    host.kill_plyd();
    assert_eq!(
        exec(&host, "b", "echo during >>/file; cat /file"),
        "before\nduring\n"
    );
    host.restart_plyd();
    assert_eq!(exec(&host, "d", "cat /file"), "before\nduring\n");
    // The successor knows the mount: it can be asked for, and it goes with its snapshot.
    host.until("containerd has connected again", || {
        host.try_ctr(&[
            "snapshots",
            "--snapshotter",
            "plywood",
            "mounts",
            "/tmp",
            "c",
        ])
        .is_ok()
    });
    host.ctr(&["tasks", "kill", "--signal", "SIGKILL", "c"]);
    host.until("the task has ended", || {
        host.ctr(&["tasks", "ls"]).contains("STOPPED")
    });
    host.ctr(&["tasks", "rm", "c"]);
    host.ctr(&["containers", "rm", "c"]);
    host.ctr(&["images", "rm", "--sync", "localhost/busybox:latest"]);
    host.until("every snapshot is collected", || {
        host.snapshots("plywood").is_empty()
    });
    host.until("every mount is gone", || host.plyd_mounts().is_empty());
}

/// containerd listed nothing at all, and a layer stayed for good where all that it had was removed. That it believes a snapshot to be there
/// whose record is gone is its own: an import says that it is done then, and mends nothing.
#[test]
fn a_layer_without_a_record_is_had_again_once_containerd_has_let_go_of_it() {
    let mut host = Host::start();
    let archive = image::busybox(&host.dir);
    let import = [
        "images",
        "import",
        "--snapshotter",
        "plywood",
        archive.to_str().unwrap(),
    ];
    let name = "localhost/busybox:latest";
    let snapshotter = ["run", "--snapshotter", "plywood"];
    let runs = [&snapshotter[..], &["--rm", name, "other", "echo", "runs"]].concat();
    let script = "echo written >/file; sleep 1000";
    let works = [&snapshotter[..], &["-d", name, "c", "sh", "-c", script]].concat();
    for is_lowest in [true, false] {
        host.ctr(&import);
        host.ctr(&works);
        let mut records = host.files("snapshots/records");
        let text = |path: &PathBuf| fs::read_to_string(path).unwrap();
        records.retain(|path| text(path).contains("\"kind\":\"committed\""));
        records.sort_by_key(|path| !text(path).contains("\"parent\":null"));
        assert_eq!(records.len(), 2);
        host.kill_plyd();
        fs::remove_file(&records[usize::from(!is_lowest)]).unwrap();
        host.restart_plyd();
        host.until("containerd has connected again", || {
            let list = ["snapshots", "--snapshotter", "plywood", "ls"];
            host.try_ctr(&list).is_ok()
        });
        let left = host.snapshots("plywood");
        assert_eq!(left.len(), 2, "{left:?}");
        assert_eq!(host.stored("store/records"), 2);
        let written = ["tasks", "exec", "--exec-id", "look", "c", "cat", "/file"];
        assert_eq!(host.ctr(&written), "written\n");

        let removed = ["images", "rm", "--sync", name];
        host.ctr(&import);
        for _ in 0..2 {
            let refused = host.try_ctr(&runs).unwrap_err();
            // After the kill the index, which knew whose record it was, was made anew.
            let told = match is_lowest {
                true => "`ctr images rm --sync`",
                false => "to be the parent: not found",
            };
            let line = refused.lines().find(|line| line.starts_with("ctr: "));
            assert!(line.unwrap().contains(told), "{refused}");
            // Not while the container has it.
            host.ctr(&removed);
            host.ctr(&import);
        }
        host.ctr(&["tasks", "kill", "--signal", "SIGKILL", "c"]);
        host.until("the task has ended", || {
            host.ctr(&["tasks", "ls"]).contains("STOPPED")
        });
        host.ctr(&["tasks", "rm", "c"]);
        host.ctr(&["containers", "rm", "c"]);
        host.ctr(&removed);
        host.until("every snapshot is collected", || {
            host.stored("snapshots/records") == 0
        });
        assert_eq!(host.stored("store/records"), 0);
        host.ctr(&import);
        assert_eq!(host.ctr(&runs), "runs\n");
        host.ctr(&removed);
        host.until("every snapshot is collected", || {
            host.stored("snapshots/records") == 0
        });
        assert_eq!(host.stored("store/records"), 0);
    }
}
