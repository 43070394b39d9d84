//! Damage of what lies on disk.

use std::fs;
use std::io::Write;
use std::path::{Path, PathBuf};

use nix::sys::signal::Signal;
use plywood::grpc::pb::containerd::services::snapshots::v1::Info;

use super::client::{Snapshots, labels, source};
use super::common::{BUSYBOX, Plyd, unmount};
use super::crash::{assert_tidy, names, plyfs_of};

/// The record of the snapshot with that key.
fn record_of(plyd: &Plyd, key: &str) -> PathBuf {
    let quoted = format!("\"{key}\"");
    fs::read_dir(plyd.root().join("snapshots/records"))
        .unwrap()
        .map(|entry| entry.unwrap().path())
        .find(|path| fs::read_to_string(path).unwrap().contains(&quoted))
        .unwrap()
}

#[test]
fn a_corrupt_record_is_named_and_costs_nothing_else() {
    let mut plyd = Plyd::start();
    let snapshots = Snapshots::of(&plyd);
    snapshots.layer("one", "", |_| {});
    snapshots.layer("two", "", |root| fs::write(root.join("file"), "1").unwrap());
    plyd.signal(Signal::SIGTERM);
    let of_one = record_of(&plyd, "one");
    let good = fs::read(&of_one).unwrap();
    fs::write(&of_one, &good[..good.len() - 70]).unwrap();

    plyd.launch();
    let name = of_one.file_name().unwrap().to_str().unwrap();
    assert!(plyd.log().contains(name), "{}", plyd.log());
    let snapshots = Snapshots::of(&plyd);
    assert_eq!(snapshots.names(), ["two"]);
    let view = source(&snapshots.view("v", "two").unwrap());
    assert_eq!(fs::read(view.join("file")).unwrap(), b"1");
    assert_eq!(names(&plyd.root().join("store/records")).len(), 2);

    fs::write(&of_one, &good).unwrap();
    plyd.signal(Signal::SIGTERM);
    plyd.launch();
    assert_eq!(Snapshots::of(&plyd).names(), ["one", "two", "v"]);
}

/// Its snapshot was once taken for a removed one, and whoever worked in the mount got ENOTCONN.
#[test]
fn a_mount_whose_record_is_corrupt_goes_on() {
    let mut plyd = Plyd::start();
    let root = source(&Snapshots::of(&plyd).prepare("a", "").unwrap());
    let mut inside = fs::File::create(root.join("file")).unwrap();
    let before = plyfs_of(plyd.dir());
    plyd.signal(Signal::SIGTERM);
    let record = record_of(&plyd, "a");
    let good = fs::read(&record).unwrap();
    fs::write(&record, &good[..good.len() / 2]).unwrap();

    plyd.launch();
    let name = record.file_name().unwrap().to_str().unwrap();
    assert!(plyd.log().contains(name), "{}", plyd.log());
    inside.write_all(b"written on").unwrap();
    assert_eq!(fs::read(root.join("file")).unwrap(), b"written on");

    plyd.signal(Signal::SIGTERM);
    fs::write(&record, &good).unwrap();
    plyd.launch();
    let snapshots = Snapshots::of(&plyd);
    assert_eq!(source(&snapshots.mounts("a").unwrap()), root);
    assert_eq!(plyfs_of(plyd.dir()), before);
    drop(inside);
    snapshots.commit("base", "a").unwrap();
    assert_tidy(&plyd, &snapshots, 0);
}

/// Three snapshots on each other of which the lowest one's record went while plyd was stopped, and a plain one beside them.
fn without_the_lowest() -> (Plyd, Vec<u8>, PathBuf) {
    let mut plyd = Plyd::start();
    let snapshots = Snapshots::of(&plyd);
    for (name, parent) in [
        ("base", ""),
        ("middle", "base"),
        ("top", "middle"),
        ("beside", ""),
    ] {
        snapshots.layer(name, parent, |root| {
            fs::write(root.join(name), name).unwrap()
        });
    }
    snapshots.prepare("work", "top").unwrap();
    plyd.signal(Signal::SIGTERM);
    let record = record_of(&plyd, "base");
    let good = fs::read(&record).unwrap();
    fs::remove_file(&record).unwrap();
    plyd.launch();
    (plyd, good, record)
}

/// `ctr snapshots ls` asks for each snapshot that it lists, and failed altogether.
#[test]
fn what_builds_on_a_record_that_is_gone_can_be_asked_for_and_not_be_used() {
    let (plyd, good, record) = without_the_lowest();
    let snapshots = Snapshots::of(&plyd);
    assert_eq!(snapshots.names(), ["middle", "top", "beside", "work"]);
    for (name, parent) in [("middle", ""), ("top", "middle"), ("work", "top")] {
        let info = snapshots.stat(name).unwrap();
        assert_eq!(info.parent, parent, "{name}");
        let changed = Info {
            labels: labels(&[("is", name)]),
            ..info
        };
        let updated = snapshots.update(changed, &[]).unwrap();
        assert_eq!((&*updated.parent, &*updated.labels["is"]), (parent, name));
        assert_eq!(snapshots.stat(name).unwrap(), updated);
        snapshots.usage(name).unwrap();
    }
    let told = format!(
        "the record {} cannot be used: it is gone; nothing here tells what it said: restore it from a backup and run `snapctl system repair`, or have containerd remove the containers on it and each image that has it (`ctr containers rm`, `ctr images rm --sync`; `crictl rm`, `crictl rmi`), and only then pull the image again",
        record.display()
    );
    for refused in [
        snapshots.mounts("work").map(drop),
        snapshots.prepare("new", "base").map(drop),
        snapshots.prepare("new", "middle").map(drop),
        snapshots.view("new", "top").map(drop),
        snapshots.commit("new", "work"),
    ] {
        let refused = refused.unwrap_err();
        assert_eq!(refused.code(), tonic::Code::DataLoss);
        assert_eq!(refused.message(), told);
    }
    // Nothing is left of those.
    assert_eq!(snapshots.names(), ["middle", "top", "beside", "work"]);
    // Of containerd's listing only that leaves the others.
    let missing = snapshots.stat("base").unwrap_err();
    assert_eq!(missing.code(), tonic::Code::NotFound);

    fs::write(&record, good).unwrap();
    plyd.ok(["system", "repair"]);
    assert_eq!(snapshots.stat("middle").unwrap().parent, "base");
    let view = source(&snapshots.view("new", "top").unwrap());
    for name in ["base", "middle", "top"] {
        assert_eq!(fs::read_to_string(view.join(name)).unwrap(), name);
    }
    assert_eq!(snapshots.stat("top").unwrap().labels["is"], "top");
}

/// They stayed until a repair or the next start, and a collection took nothing of them.
#[test]
fn layers_that_were_kept_for_a_record_that_is_gone_go_with_the_last_that_builds_on_it() {
    let (plyd, ..) = without_the_lowest();
    let snapshots = Snapshots::of(&plyd);
    let layers = || names(&plyd.root().join("store/records")).len();
    for (name, left) in [("work", 4), ("top", 4), ("middle", 1), ("beside", 0)] {
        snapshots.remove(name).unwrap();
        assert_eq!(layers(), left, "{name}");
    }
    snapshots.cleanup().unwrap();
    assert_tidy(&plyd, &snapshots, 0);
    plyd.ok(["system", "verify"]);
}

/// The next repair let it go, but nobody had a reason to ask for one.
#[test]
fn layers_of_nobody_go_once_verify_finds_that_all_records_are_known() {
    let mut plyd = Plyd::start();
    let snapshots = Snapshots::of(&plyd);
    for name in ["one", "two"] {
        snapshots.layer(name, "", |root| fs::write(root.join(name), name).unwrap());
    }
    plyd.signal(Signal::SIGTERM);
    let of_one = record_of(&plyd, "one");
    let good = fs::read(&of_one).unwrap();
    fs::write(&of_one, &good[..good.len() / 2]).unwrap();
    plyd.launch();
    let snapshots = Snapshots::of(&plyd);
    snapshots.remove("two").unwrap();
    let layers = || names(&plyd.root().join("store/records")).len();
    assert_eq!(layers(), 2);
    fs::write(&of_one, &good).unwrap();
    plyd.ok(["system", "verify"]);
    assert_eq!(layers(), 1);
}

/// A record that is removed is given up with a start, and not as long as another may be about to take its place.
#[test]
fn an_images_layers_go_once_the_record_is_given_up_that_may_build_on_them() {
    let mut plyd = Plyd::start();
    plyd.load_busybox();
    plyd.ok(["snapshot", "prepare", "work", BUSYBOX]);
    plyd.signal(Signal::SIGTERM);
    let record = record_of(&plyd, "work");
    fs::write(&record, "").unwrap();
    plyd.launch();
    plyd.ok(["image", "rm", BUSYBOX]);
    let layers = |plyd: &Plyd| names(&plyd.root().join("store/records")).len();
    assert_eq!(layers(&plyd), 2);
    fs::remove_file(&record).unwrap();
    plyd.ok(["system", "gc"]);
    assert_eq!(layers(&plyd), 2);
    let told = plyd.snapctl(["system", "verify"]);
    assert!(told.stdout.contains("start plyd again"), "{}", told.stdout);
    plyd.signal(Signal::SIGTERM);
    plyd.launch();
    assert_eq!(layers(&plyd), 0);
}

#[test]
fn the_index_can_be_damaged_or_missing() {
    let mut plyd = Plyd::start();
    Snapshots::of(&plyd).layer("base", "", |_| {});
    let index = plyd.root().join("index");
    let truncated = |index: &Path, length: u64| {
        let file = fs::File::options().write(true).open(index.join("sled/db"));
        file.unwrap().set_len(length).unwrap();
    };
    let damages: [&dyn Fn(&Path); 6] = [
        &|index| fs::remove_dir_all(index).unwrap(),
        &|index| truncated(index, 0),
        &|index| truncated(index, 100),
        &|index| truncated(index, 300_000),
        &|index| fs::write(index.join("sled/db"), [0xff; 300_000]).unwrap(),
        &|index| fs::write(index.join("sled/conf"), "garbage").unwrap(),
    ];
    for damage in damages {
        plyd.signal(Signal::SIGTERM);
        damage(&index);
        plyd.launch();
        let snapshots = Snapshots::of(&plyd);
        assert_eq!(snapshots.stat("base").unwrap().name, "base");
        snapshots.prepare("a", "base").unwrap();
        snapshots.remove("a").unwrap();
    }
    // Not of an index that is missing, nor where what is held is there all the same.
    let told = plyd.log().matches("is unusable and is made anew").count();
    assert!(told >= 2, "{}", plyd.log());
}

/// It was advised to start the container again, which gets the mount that is there.
#[test]
fn it_is_said_how_a_damaged_view_of_containerd_s_is_mounted_again() {
    let plyd = Plyd::start();
    let snapshots = Snapshots::of(&plyd);
    snapshots.layer("base", "", |root| {
        fs::write(root.join("file"), "1").unwrap()
    });
    let root = source(&snapshots.prepare("a", "base").unwrap());
    let mut views = fs::read_dir(plyd.root().join("store/views")).unwrap();
    let view = views.next().unwrap().unwrap().path();
    assert!(views.next().is_none());
    let length = fs::metadata(&view).unwrap().len();
    fs::write(&view, vec![0; length as usize]).unwrap();
    assert!(fs::read(root.join("file")).is_err());
    let all = plyd.json(["snapshot", "ls", "--json"]);
    let mut all = all.as_array().unwrap().iter();
    let key = &all.find(|info| info["kind"] == "active").unwrap()["key"];
    let told = plyd.snapctl(["system", "repair"]);
    assert_eq!(told.code, 1);
    let advice = format!(
        "; stop the container on containerd's snapshot {}, unmount {} (umount(8)), and start it again\n",
        key.as_str().unwrap(),
        root.display()
    );
    assert!(told.stdout.contains(&advice), "{}", told.stdout);
    // What containerd does when the container starts.
    assert_eq!(source(&snapshots.mounts("a").unwrap()), root);
    assert!(fs::read(root.join("file")).is_err());
    assert_eq!(plyd.snapctl(["system", "verify"]).code, 1);
    unmount(&root);
    assert_eq!(source(&snapshots.mounts("a").unwrap()), root);
    assert_eq!(fs::read(root.join("file")).unwrap(), b"1");
    let told = plyd.ok(["system", "verify", "--deep"]);
    assert!(told.ends_with(": 0 damaged\n"), "{told}");
}
