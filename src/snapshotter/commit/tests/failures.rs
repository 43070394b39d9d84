//! Commits that come to nothing.

use super::*;

#[test]
fn a_commit_that_fails_leaves_the_snapshot_as_it_was() {
    let place = Place::new();
    let snapshots = base(&place);
    let upper = prepare(&snapshots, "work", Some("base")).upper_dir.unwrap();
    let union = open(&snapshots, "work");
    let mut directory = ROOT;
    // Deeper than any path of a layer.
    for _ in 0..20 {
        let name = "n".repeat(250);
        let made = union.mkdir(directory, name.as_ref(), 0o755, &Caller::ROOT);
        directory = made.unwrap().node;
    }
    write(&union, ROOT, "new", &noise(1, 300_000));
    set(
        &union,
        find(&union, "large"),
        SetAttr {
            uid: Some(5),
            ..SetAttr::default()
        },
    );
    drop(union);
    let (shown, before) = (everything(&snapshots, "work"), stored(&place));
    let failed = snapshots.commit(OWNER, "top", "work", BTreeMap::new());
    let problem = failed.unwrap_err().to_string();
    assert!(problem.contains("longer than 4095 bytes"), "{problem}");
    assert_eq!(everything(&snapshots, "work"), shown);
    assert_eq!(stored(&place), before);
    assert_eq!(
        fs::read_dir(place.root().join("store/tmp"))
            .unwrap()
            .count(),
        0
    );
    assert_eq!(snapshots.packed_layers().list().len(), 1);

    let union = open(&snapshots, "work");
    remove_all(&union, ROOT, "n".repeat(250).as_ref());
    drop(union);
    let shown = everything(&snapshots, "work");
    commit(&snapshots, "top", "work");
    snapshots.wait_until_deleted();
    assert!(!upper.exists());
    prepare(&snapshots, "look", Some("top"));
    assert_eq!(everything(&snapshots, "look"), shown);
}

#[test]
fn what_a_crash_leaves_of_a_commit_is_cleared() {
    let place = Place::new();
    let snapshots = base(&place);
    let info = prepare(&snapshots, "work", Some("base"));
    fs::write(info.upper_dir.as_ref().unwrap().join("file"), "1").unwrap();
    // Killed before the record of the snapshot was replaced.
    let found = snapshots.catalog.resolve(OWNER, "work").unwrap();
    std::mem::forget(snapshots.pack(&found).unwrap());
    assert_eq!(snapshots.packed_layers().list().len(), 2);
    drop(snapshots);
    let snapshots = place.open();
    assert_eq!(snapshots.packed_layers().list().len(), 1);
    assert_eq!(
        changes(&snapshots, "work"),
        [("/file".to_owned(), ChangeKind::Added)]
    );
    commit(&snapshots, "top", "work");
    snapshots.wait_until_deleted();
    drop(snapshots);

    // Killed before the upper was thrown away; of one of the two a plyfs is still there.
    let data = place.root().join("snapshots/data");
    let read = data.join(&info.id);
    for dir in [&read, &data.join("nobody's")] {
        fs::create_dir_all(dir.join("upper")).unwrap();
        fs::create_dir_all(dir.join("work")).unwrap();
    }
    let plyfs = File::open(read.join("work")).unwrap();
    fs_lock(&plyfs);
    let snapshots = place.open();
    snapshots.wait_until_deleted();
    assert_eq!(fs::read_dir(&data).unwrap().count(), 1);
    // A removal leaves it to its readers, too.
    snapshots.remove(OWNER, "top").unwrap();
    snapshots.wait_until_deleted();
    assert!(read.join("upper").exists());
    drop(plyfs);
    while read.exists() {
        std::thread::yield_now();
    }
}

fn fs_lock(file: &File) {
    crate::sys::fs::try_lock(file.as_fd()).unwrap();
}

#[test]
fn a_full_disk_fails_a_commit_and_costs_nothing() {
    use nix::mount::{MntFlags, MsFlags, mount, umount2};

    struct Small(tempfile::TempDir);
    impl Drop for Small {
        fn drop(&mut self) {
            let _ = umount2(self.0.path(), MntFlags::MNT_DETACH);
        }
    }
    let small = Small(tempfile::tempdir().unwrap());
    let (kind, size) = (Some("tmpfs"), Some("size=24m"));
    mount(kind, small.0.path(), kind, MsFlags::empty(), size).unwrap();
    let place = Place::at(small.0.path());
    let snapshots = place.open();
    prepare(&snapshots, "work", None);
    let union = open(&snapshots, "work");
    write(&union, ROOT, "file", &noise(1, 8 << 20));
    drop(union);
    let (shown, hoard) = (everything(&snapshots, "work"), small.0.path().join("hoard"));
    fs::write(&hoard, vec![1; 12 << 20]).unwrap();
    let failed = snapshots.commit(OWNER, "done", "work", BTreeMap::new());
    let problem = failed.unwrap_err().to_string();
    assert!(problem.contains("No space left"), "{problem}");
    assert_eq!(everything(&snapshots, "work"), shown);
    fs::remove_file(hoard).unwrap();
    commit(&snapshots, "done", "work");
    prepare(&snapshots, "look", Some("done"));
    assert_eq!(everything(&snapshots, "look"), shown);
    drop(snapshots);
}
