//! containerd's Snapshots service.

use std::fs::{self, File};
use std::io::Read;
use std::os::unix::fs::{OpenOptionsExt, PermissionsExt, symlink};
use std::path::Path;

use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use tonic::Code;

use super::client::{Bind, Snapshots, labels, source};
use super::common::{Plyd, mounts_below, unmount, until};
use super::crash::only_plyfs_of;

const REF: &str = "containerd.io/snapshot.ref";

fn code<T: std::fmt::Debug>(result: Result<T, tonic::Status>) -> Code {
    result.unwrap_err().code()
}

#[test]
fn layers_are_written_through_the_mount_and_seen_by_all_above() {
    let plyd = Plyd::start();
    let snapshots = Snapshots::of(&plyd);
    snapshots.layer("base", "", |root| {
        fs::create_dir(root.join("dir")).unwrap();
        fs::write(root.join("dir/a"), "base").unwrap();
        fs::write(root.join("b"), vec![7; 100_000]).unwrap();
    });
    snapshots.layer("top", "base", |root| {
        fs::write(root.join("dir/a"), "top").unwrap();
        fs::remove_file(root.join("b")).unwrap();
        fs::rename(root.join("dir"), root.join("moved")).unwrap();
    });
    let view = source(&snapshots.view("view", "top").unwrap());
    assert_eq!(fs::read(view.join("moved/a")).unwrap(), b"top");
    assert!(!view.join("b").exists() && !view.join("dir").exists());
    let error = fs::write(view.join("c"), "").unwrap_err();
    assert_eq!(error.kind(), std::io::ErrorKind::ReadOnlyFilesystem);
    let old = source(&snapshots.view("old", "base").unwrap());
    assert_eq!(fs::read(old.join("dir/a")).unwrap(), b"base");

    let usage = snapshots.usage("base").unwrap();
    assert!(usage.size >= 100_000 && usage.inodes == 4, "{usage:?}");
    for key in ["view", "old", "top", "base"] {
        snapshots.remove(key).unwrap();
    }
    snapshots.cleanup().unwrap();
    assert_eq!(snapshots.names(), [""; 0]);
    assert_eq!(
        mounts_below(plyd.dir()),
        [""; 0].map(std::path::PathBuf::from)
    );
    assert_eq!(fs::read_dir(plyd.root().join("layers")).unwrap().count(), 0);
    assert_eq!(fs::read_dir(plyd.root().join("trash")).unwrap().count(), 0);
}

#[test]
fn mounts_answers_the_same_each_time() {
    let plyd = Plyd::start();
    let snapshots = Snapshots::of(&plyd);
    snapshots.layer("base", "", |_| {});
    let first = snapshots.prepare("a", "base").unwrap();
    assert_eq!(first[0].options, ["rbind", "rw"]);
    assert_eq!(snapshots.mounts("a").unwrap(), first);
    let view = snapshots.view("v", "base").unwrap();
    assert_eq!(view[0].options, ["rbind", "ro"]);
    assert_eq!(code(snapshots.mounts("base")), Code::FailedPrecondition);
}

#[test]
fn every_refusal_has_its_code() {
    let plyd = Plyd::start();
    let snapshots = Snapshots::of(&plyd);
    snapshots.layer("base", "", |_| {});
    snapshots.prepare("active", "base").unwrap();

    assert_eq!(code(snapshots.prepare("active", "")), Code::AlreadyExists);
    assert_eq!(code(snapshots.view("base", "")), Code::AlreadyExists);
    assert_eq!(code(snapshots.prepare("x", "nowhere")), Code::NotFound);
    assert_eq!(
        code(snapshots.prepare("x", "active")),
        Code::InvalidArgument
    );
    assert_eq!(code(snapshots.prepare("", "")), Code::InvalidArgument);
    assert_eq!(
        code(snapshots.commit("base", "active")),
        Code::AlreadyExists
    );
    assert_eq!(
        code(snapshots.commit("x", "base")),
        Code::FailedPrecondition
    );
    for result in [
        snapshots.commit("x", "nowhere"),
        snapshots.remove("nowhere"),
        snapshots.stat("nowhere").map(drop),
        snapshots.usage("nowhere").map(drop),
        snapshots.mounts("nowhere").map(drop),
    ] {
        let status = result.unwrap_err();
        assert_eq!(status.code(), Code::NotFound);
        assert!(status.message().contains("nowhere"), "{status}");
    }
    let status = snapshots.remove("base").unwrap_err();
    assert_eq!(status.code(), Code::FailedPrecondition);
    assert!(status.message().contains("remove"), "{status}");
    let huge = labels(&[("k", &"x".repeat(4096))]);
    assert_eq!(
        code(snapshots.prepare_with("x", "", huge)),
        Code::InvalidArgument
    );
    assert_eq!(code(snapshots.list(&["name=="])), Code::InvalidArgument);
    assert_eq!(snapshots.names(), ["base", "active"]);
}

#[test]
fn labels_filters_and_batches() {
    let plyd = Plyd::start();
    let snapshots = Snapshots::of(&plyd);
    snapshots
        .prepare_with("a", "", labels(&[("x/y", "1"), ("gone", "2")]))
        .unwrap();
    snapshots
        .commit_with("base", "a", labels(&[("x/y", "3"), ("empty", "")]))
        .unwrap();
    let mut info = snapshots.stat("base").unwrap();
    assert_eq!(info.labels, labels(&[("x/y", "3")]));
    info.labels = labels(&[("x/y", "4"), ("ignored", "5")]);
    let info = snapshots.update(info, &["labels.x/y"]).unwrap();
    assert_eq!(info.labels, labels(&[("x/y", "4")]));
    assert_eq!(
        code(snapshots.update(info, &["kind"])),
        Code::InvalidArgument
    );

    for number in 0..3 {
        snapshots.view(&format!("v{number}"), "base").unwrap();
    }
    let (names, messages) = snapshots.list(&["kind==view,parent==base"]).unwrap();
    assert_eq!((names.len(), messages), (3, 1));
    let (names, _) = snapshots
        .list(&["labels.\"x/y\"==4", "name~=/^v[12]$/"])
        .unwrap();
    assert_eq!(names, ["base", "v1", "v2"]);
}

#[test]
fn a_layer_that_another_name_space_has_is_not_unpacked_again() {
    let plyd = Plyd::start();
    let snapshots = Snapshots::of(&plyd);
    let wanted = || labels(&[(REF, "sha256:abc")]);
    snapshots
        .prepare_with("default/1/extract", "", wanted())
        .unwrap();
    snapshots
        .commit_with("default/2/sha256:abc", "default/1/extract", wanted())
        .unwrap();
    let again = |parent: &str| snapshots.prepare_with("k8s.io/3/extract", parent, wanted());
    assert_eq!(code(again("")), Code::AlreadyExists);
    let (found, _) = snapshots
        .list(&["labels.\"containerd.io/snapshot.ref\"==sha256:abc,parent==\"\""])
        .unwrap();
    assert_eq!(found, ["default/2/sha256:abc"]);
    // On another parent it is another layer.
    again("default/2/sha256:abc").unwrap();
}

#[test]
fn containerds_service_cannot_touch_what_is_not_its_own() {
    let plyd = Plyd::start();
    plyd.load_busybox();
    plyd.ok(["snapshot", "prepare", "mine"]);
    let snapshots = Snapshots::of(&plyd);
    snapshots.layer("base", "", |_| {});
    let others: Vec<String> = plyd
        .ok(["snapshot", "ls", "-q"])
        .lines()
        .map(str::to_owned)
        .collect();
    assert!(others.len() > 2, "{others:?}");
    // What containerd's collector does: it removes every name that it does not know.
    for name in snapshots.names() {
        snapshots.remove(&name).unwrap();
    }
    for name in others.iter().filter(|name| *name != "base") {
        assert_eq!(code(snapshots.remove(name)), Code::NotFound, "{name}");
        assert_eq!(code(snapshots.stat(name)), Code::NotFound, "{name}");
        assert_eq!(code(snapshots.prepare("x", name)), Code::NotFound, "{name}");
    }
    snapshots.cleanup().unwrap();
    let left = plyd.ok(["snapshot", "ls", "-q"]);
    assert_eq!(left.lines().count(), others.len() - 1);
}

#[test]
fn a_copy_of_a_committed_snapshots_mount_can_be_read_and_not_written() {
    let plyd = Plyd::start();
    let snapshots = Snapshots::of(&plyd);
    let mounts = snapshots.prepare("a", "").unwrap();
    let place = plyd.dir().join("consumer");
    let bind = Bind::new(&mounts, &place);
    fs::write(place.join("file"), "1").unwrap();
    fs::create_dir(place.join("dir")).unwrap();
    symlink("file", place.join("link")).unwrap();
    // Known to the server, which is not to go on with what it has open.
    assert_eq!(fs::read(place.join("file")).unwrap(), b"1");
    snapshots.commit("base", "a").unwrap();
    // The layer is compared with what it was when this test ends, its access times too.
    let file = File::options()
        .read(true)
        .custom_flags(libc::O_DIRECT)
        .open(place.join("file"));
    let mut text = String::new();
    file.unwrap().read_to_string(&mut text).unwrap();
    assert_eq!(text, "1");
    assert_eq!(fs::read_dir(&place).unwrap().count(), 3);
    assert_eq!(fs::read_dir(place.join("dir")).unwrap().count(), 0);
    assert_eq!(
        fs::read_link(place.join("link")).unwrap(),
        Path::new("file")
    );
    let error = fs::write(place.join("file"), "2").unwrap_err();
    assert_eq!(error.kind(), std::io::ErrorKind::ReadOnlyFilesystem);
    let view = source(&snapshots.view("v", "base").unwrap());
    assert_eq!(fs::read(view.join("file")).unwrap(), b"1");
    drop(bind);
}

#[test]
fn a_copy_is_read_until_nobody_has_it_any_more() {
    let mut plyd = Plyd::start();
    let snapshots = Snapshots::of(&plyd);
    snapshots.layer("base", "", |root| {
        fs::write(root.join("lower"), vec![1; 300_000]).unwrap();
    });
    let place = plyd.dir().join("consumer");
    let mounts = snapshots.prepare("a", "base").unwrap();
    let bind = Bind::new(&mounts, &place);
    fs::write(place.join("new"), "new").unwrap();
    // Its data stays where it is.
    fs::set_permissions(place.join("lower"), fs::Permissions::from_mode(0o600)).unwrap();
    snapshots.commit("top", "a").unwrap();
    let data = plyd.root().join("snapshots/data");
    assert_eq!(fs::read_dir(&data).unwrap().count(), 1);
    assert_eq!(fs::read(place.join("new")).unwrap(), b"new");
    plyd.signal(Signal::SIGKILL);
    plyd.launch();
    let snapshots = Snapshots::of(&plyd);
    assert_eq!(fs::read(place.join("lower")).unwrap(), [1; 300_000]);
    let error = fs::write(place.join("new"), "2").unwrap_err();
    assert_eq!(error.kind(), std::io::ErrorKind::ReadOnlyFilesystem);
    snapshots.remove("top").unwrap();
    snapshots.cleanup().unwrap();
    assert_eq!(fs::read_dir(&place).unwrap().count(), 2);
    drop(bind);
    until("the upper goes", || {
        fs::read_dir(&data).unwrap().count() == 0
    });
}

/// A collection once took away under it what lay in the layers below.
#[test]
fn a_copy_is_read_when_snapshot_and_parent_are_removed() {
    let mut plyd = Plyd::start();
    let snapshots = Snapshots::of(&plyd);
    let content = |name: &str| {
        name.repeat(if name.starts_with("large") {
            40_000
        } else {
            500
        })
    };
    let names = ["first", "large first", "second", "large second"];
    snapshots.layer("base", "", |root| {
        for name in names {
            fs::write(root.join(name), content(name)).unwrap();
        }
    });
    let place = plyd.dir().join("consumer");
    let mounts = snapshots.prepare("a", "base").unwrap();
    let bind = Bind::new(&mounts, &place);
    snapshots.commit("top", "a").unwrap();
    snapshots.remove("top").unwrap();
    snapshots.remove("base").unwrap();
    snapshots.cleanup().unwrap();
    let store = plyd.root().join("store");
    let stored = || {
        let count = |dir: &str| fs::read_dir(store.join(dir)).unwrap().count();
        ["records", "layers", "views", "packs"].map(count)
    };
    // Nobody has read any of it yet.
    for (collect, names) in [(false, &names[..2]), (true, &names[2..])] {
        if collect {
            plyd.signal(Signal::SIGKILL);
            plyd.launch();
        }
        plyd.ok(["system", "gc"]);
        assert_eq!(stored(), [0, 0, 1, 1]);
        for name in names {
            let read = fs::read_to_string(place.join(name)).unwrap();
            assert!(read == content(name), "{name}");
        }
    }
    drop(bind);
    until("what was read goes", || {
        plyd.ok(["system", "gc"]);
        stored() == [0; 4]
    });
}

#[test]
fn a_snapshot_whose_commit_has_failed_can_be_mounted_and_committed() {
    let plyd = Plyd::start();
    let snapshots = Snapshots::of(&plyd);
    let place = plyd.dir().join("consumer");
    let mounts = snapshots.prepare("a", "").unwrap();
    let bind = Bind::new(&mounts, &place);
    fs::write(place.join("file"), "1").unwrap();
    let data = fs::read_dir(plyd.root().join("snapshots/data"));
    let own = data.unwrap().next().unwrap().unwrap().path();
    // It cannot be taken away, which is done when the mount has been sealed.
    let mark = own.join("mounted");
    fs::remove_file(&mark).unwrap();
    fs::create_dir(&mark).unwrap();
    assert!(snapshots.commit("base", "a").is_err());
    assert!(fs::read_dir(&place).is_err());
    fs::remove_dir(&mark).unwrap();
    let again = source(&snapshots.mounts("a").unwrap());
    fs::write(again.join("more"), "2").unwrap();
    drop(bind);
    snapshots.commit("base", "a").unwrap();
    let view = source(&snapshots.view("v", "base").unwrap());
    assert_eq!(fs::read(view.join("file")).unwrap(), b"1");
    assert_eq!(fs::read(view.join("more")).unwrap(), b"2");
}

#[test]
fn writers_that_are_still_there_cannot_reach_a_committed_layer() {
    use std::io::Write;

    let plyd = Plyd::start();
    let snapshots = Snapshots::of(&plyd);
    let mounts = snapshots.prepare("a", "").unwrap();
    let mut writer = File::create(source(&mounts).join("file")).unwrap();
    writer.write_all(b"before").unwrap();
    snapshots.commit("base", "a").unwrap();
    let written = writer.write_all(b" after").and_then(|()| writer.sync_all());
    assert!(written.is_err());
    // Whoever wonders why a container has failed knows the key, and no id.
    let log = plyd.log();
    let mut lines = log.lines();
    let told = "committed while files of its mount are open for writing";
    let told = lines.find(|line| line.contains(told)).unwrap();
    assert!(
        told.contains("snapshot=\"") && told.contains("a\""),
        "{told}"
    );
    let view = source(&snapshots.view("v", "base").unwrap());
    assert_eq!(fs::read(view.join("file")).unwrap(), b"before");
}

/// As long as its plyfs had not ended, the place was answered as if the mount was there: an empty directory.
#[test]
fn what_was_just_unmounted_is_mounted_anew() {
    let plyd = Plyd::start();
    let snapshots = Snapshots::of(&plyd);
    let root = source(&snapshots.prepare("a", "").unwrap());
    fs::write(root.join("file"), "1").unwrap();
    let pid = only_plyfs_of(plyd.dir());
    let pid = Pid::from_raw(pid);
    kill(pid, Signal::SIGSTOP).unwrap();
    unmount(&root);
    let mounts = std::thread::scope(|scope| {
        let asked = scope.spawn(|| Snapshots::of(&plyd).mounts("a"));
        std::thread::sleep(std::time::Duration::from_millis(300));
        kill(pid, Signal::SIGCONT).unwrap();
        asked.join().unwrap().unwrap()
    });
    assert_eq!(source(&mounts), root);
    assert_eq!(fs::read(root.join("file")).unwrap(), b"1");
}
