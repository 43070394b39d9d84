//! Damage of what lies on disk.

use std::fs;
use std::io::Write;
use std::path::{Path, PathBuf};

use nix::sys::signal::Signal;

use super::client::{Snapshots, source};
use super::common::{Plyd, unmount};
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
