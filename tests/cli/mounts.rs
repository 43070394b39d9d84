//! `snapctl mount` and `umount`.

use std::fs;
use std::path::Path;

use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;

use crate::common::{BUSYBOX, Plyd, mounts_below, unmount, until};

#[test]
fn several_directories_are_unmounted_at_once() {
    let plyd = Plyd::start();
    plyd.ok(["snapshot", "prepare", "work"]);
    let dirs = ["one", "two"].map(|name| plyd.dir().join(name).to_str().unwrap().to_owned());
    for dir in &dirs {
        fs::create_dir(dir).unwrap();
        plyd.ok(["mount", "work", dir]);
    }
    // One that is no mount point does not keep the others.
    let done = plyd.snapctl(["umount", &dirs[0], "/no-such-dir/x", &dirs[1]]);
    assert_eq!(done.code, 1);
    assert_eq!(done.stderr.lines().count(), 1, "{}", done.stderr);
    for dir in &dirs {
        assert!(!mounts_below(plyd.dir()).contains(&dir.into()), "{dir}");
    }
}

#[test]
fn a_view_is_mounted_read_only() {
    let plyd = Plyd::start();
    plyd.load_busybox();
    plyd.ok(["snapshot", "view", "look", BUSYBOX]);
    let mnt = plyd.dir().join("mnt");
    fs::create_dir(&mnt).unwrap();
    plyd.ok(["mount", "look", mnt.to_str().unwrap()]);
    assert!(mnt.join("bin/busybox").is_file());
    assert!(!mnt.join("etc/first-layer-only").exists());
    let error = fs::write(mnt.join("x"), "x").unwrap_err();
    assert_eq!(error.kind(), std::io::ErrorKind::ReadOnlyFilesystem);
    plyd.umount(&mnt);
}

#[test]
fn only_mounts_of_snapshots_are_unmounted() {
    let plyd = Plyd::start();
    plyd.ok(["snapshot", "prepare", "work"]);
    let source = plyd.ok(["snapshot", "mounts", "-q", "work"]);
    let own = plyd.snapctl(["umount", source.trim_end()]);
    assert_eq!(own.code, 1);
    assert!(own.stderr.contains("plyd's own mount"), "{}", own.stderr);
    let none = plyd.snapctl(["umount", plyd.dir().to_str().unwrap()]);
    assert_eq!(none.code, 1);
    assert!(
        none.stderr.contains("is not a mount point"),
        "{}",
        none.stderr
    );
    let absent = plyd.dir().join("nosuch");
    let absent = plyd.snapctl(["umount", absent.to_str().unwrap()]);
    assert_eq!(absent.code, 1);
    assert!(
        absent.stderr.contains("nosuch: No such file or directory"),
        "{}",
        absent.stderr
    );
    let foreign = plyd.snapctl(["umount", "/proc"]);
    assert_eq!(foreign.code, 1);
    assert!(
        foreign.stderr.contains("is not the mount of a snapshot"),
        "{}",
        foreign.stderr
    );
    let missing = plyd.snapctl(["mount", "work", "/no/such/dir"]);
    assert_eq!(missing.code, 1);
    assert!(
        missing.stderr.contains("`mkdir -p /no/such/dir`"),
        "{}",
        missing.stderr
    );
    let not_one = plyd.snapctl(["mount", "work", "/etc/passwd/x"]);
    assert_eq!(not_one.code, 1);
    assert!(
        not_one.stderr.contains("cannot mount at /etc/passwd/x"),
        "{}",
        not_one.stderr
    );
}

#[test]
fn a_directory_shows_one_snapshot_and_that_once() {
    let plyd = Plyd::start();
    for key in ["work", "other"] {
        plyd.ok(["snapshot", "prepare", key]);
    }
    let mnt = plyd.dir().join("mnt");
    fs::create_dir(&mnt).unwrap();
    let dir = mnt.to_str().unwrap();
    let mounted = || {
        let all = mounts_below(plyd.dir());
        all.into_iter().filter(|mount| *mount == mnt).count()
    };
    plyd.ok(["mount", "work", dir]);
    fs::write(mnt.join("file"), "1").unwrap();
    let again = plyd.snapctl(["mount", "work", dir]);
    assert_eq!(again.code, 0, "{}", again.stderr);
    assert!(
        again.stderr.contains("is mounted at") && again.stderr.contains("already"),
        "{}",
        again.stderr
    );
    let other = plyd.snapctl(["mount", "other", dir]);
    assert_eq!(other.code, 1);
    assert!(
        other.stderr.contains("unmount that first"),
        "{}",
        other.stderr
    );
    assert_eq!(mounted(), 1);
    assert!(mnt.join("file").exists());
    plyd.umount(dir);
    assert_eq!(mounted(), 0);
    // What is mounted there otherwise is a directory like any other.
    let none: Option<&str> = None;
    let flags = nix::mount::MsFlags::empty();
    nix::mount::mount(Some("tmpfs"), &mnt, Some("tmpfs"), flags, none).unwrap();
    plyd.ok(["mount", "other", dir]);
    assert_eq!(mounted(), 2);
    plyd.umount(dir);
    unmount(&mnt);
}

#[test]
fn a_mount_whose_plyfs_has_died_is_unmounted() {
    let plyd = Plyd::start();
    plyd.ok(["snapshot", "prepare", "work"]);
    let mnt = plyd.dir().join("mnt");
    fs::create_dir(&mnt).unwrap();
    let mnt = mnt.to_str().unwrap();
    plyd.ok(["mount", "work", mnt]);
    let info = plyd.json(["snapshot", "info", "--json", "work"]);
    let pid = info["plyfs_pid"].as_i64().unwrap().try_into().unwrap();
    kill(Pid::from_raw(pid), Signal::SIGKILL).unwrap();
    until("plyd has taken its own mount away", || {
        plyd.log().contains("plyfs died")
    });
    assert!(fs::read_dir(mnt).is_err());
    let again = plyd.snapctl(["mount", "work", mnt]);
    assert_eq!(again.code, 1);
    let advice = format!("`snapctl umount {mnt}`");
    assert!(again.stderr.contains(&advice), "{}", again.stderr);
    plyd.umount(mnt);
    assert_eq!(fs::read_dir(mnt).unwrap().count(), 0);
    // The next one works.
    plyd.ok(["mount", "work", mnt]);
    fs::write(Path::new(mnt).join("file"), "1").unwrap();
    plyd.umount(mnt);
}
