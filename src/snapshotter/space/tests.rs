//! What is divided among what has it.

use std::collections::BTreeMap;

use super::super::tests::Place;
use super::*;
use crate::cow::{Caller, RenameMode, UpperConfig};
use crate::store::layers::Expected;

/// Makes the snapshot `done` of a layer and `work` on it; answers the former.
fn work_on(snapshots: &Snapshotter, stream: &[u8]) -> ParentRef {
    let owner = Owner::Snapctl;
    snapshots
        .prepare(owner, "base", None, BTreeMap::new())
        .unwrap();
    let layer = (stream, &Expected::default());
    snapshots.apply_layer(owner, "base", layer, &()).unwrap();
    snapshots
        .commit(owner, "done", "base", BTreeMap::new())
        .unwrap();
    let parent = ParentRef {
        owner,
        key: "done".to_owned(),
    };
    snapshots
        .prepare(owner, "work", Some(&parent), BTreeMap::new())
        .unwrap();
    parent
}

/// A snapshot on a packed layer with files of 1, 2, 4... KiB.
fn prepared(snapshots: &Snapshotter, linked: bool) -> UpperConfig {
    let mut tar = tar::Builder::new(Vec::new());
    let names = ["a", "d/b", "d/c", "d/e/f", "gone/g", "gone/h/i", "moved/j"];
    for (at, name) in names.iter().enumerate() {
        let content = vec![1; 1024 << at];
        let mut header = tar::Header::new_gnu();
        header.set_mode(0o644);
        header.set_size(content.len() as u64);
        tar.append_data(&mut header, name, &*content).unwrap();
    }
    if linked {
        let mut header = tar::Header::new_gnu();
        header.set_entry_type(tar::EntryType::Link);
        header.set_size(0);
        tar.append_link(&mut header, "d/link", "a").unwrap();
    }
    let stream = tar.into_inner().unwrap();
    let owner = work_on(snapshots, &stream).owner;
    snapshots
        .union_config(owner, "work")
        .unwrap()
        .upper
        .unwrap()
}

#[test]
fn what_a_snapshot_changes_is_counted_as_all_of_it_is() {
    for linked in [false, true] {
        let place = Place::new();
        let snapshots = place.open();
        let upper = prepared(&snapshots, linked).dir;
        let config = snapshots.union_config(Owner::Snapctl, "work").unwrap();
        let all = Below {
            lowers: vec![upper],
            view: config.view.clone(),
            work: None,
        };
        let before = snapshots
            .packed
            .logical(&[snapshots.packed_layers().list()[0].0]);
        let before = before.unwrap();
        assert_eq!(before, 127 << 10);
        let check = |countable: bool| {
            let whole = count(&Union::open(all.clone().union()).unwrap()).unwrap();
            let change = Change::of(&all).unwrap();
            assert_eq!(change.is_some(), countable);
            if let Some(change) = change {
                assert_eq!(before.saturating_add_signed(change), whole);
            }
            let space = snapshots.space(&[]).unwrap().snapshots;
            let work = space.iter().find(|(info, _)| info.key == "work").unwrap();
            assert_eq!(work.1.logical.map(u128::from), Some(whole));
            whole
        };
        check(true);
        {
            let union = Union::open(config).unwrap();
            let root = NodeId::ROOT;
            let dir = |name: &str| union.lookup(root, name.as_ref()).unwrap().node;
            let (d, gone) = (dir("d"), dir("gone"));
            union.unlink(d, "b".as_ref()).unwrap();
            union.unlink(gone, "g".as_ref()).unwrap();
            // A directory of the layer goes elsewhere, and another one comes in its place.
            union
                .rename(
                    root,
                    "moved".as_ref(),
                    d,
                    "e2".as_ref(),
                    RenameMode::Replace,
                )
                .unwrap();
            union
                .mkdir(root, "moved".as_ref(), 0o755, &Caller::ROOT)
                .unwrap();
            let made = union.create(d, "new".as_ref(), 0o644, libc::O_RDWR, &Caller::ROOT);
            let (entry, handle) = made.unwrap();
            union
                .write(entry.node, Some(&handle), 0, &[7; 3000], None)
                .unwrap();
            union.release(entry.node, handle);
        }
        assert_eq!(check(true), (127 << 10) - (2 << 10) - (16 << 10) + 3000);
        {
            let config = snapshots.union_config(Owner::Snapctl, "work").unwrap();
            let union = Union::open(config).unwrap();
            union.unlink(NodeId::ROOT, "a".as_ref()).unwrap();
        }
        let left = check(!linked);
        let expected = (127 << 10) - (2 << 10) - (16 << 10) + 3000;
        assert_eq!(left, expected - if linked { 0 } else { 1 << 10 });
    }
}

/// Holes cost nobody anything, so an image or a program can have files of any size: their sum fits in no 64 bits.
#[test]
fn files_as_large_as_can_be_are_counted() {
    use crate::store::tar::Kind;
    use crate::store::tar::write::{NewEntry, Writer};

    const LARGEST: u64 = i64::MAX as u64;
    let place = Place::new();
    let snapshots = place.open();
    let mut tar = Writer::new(Vec::new());
    for name in ["a", "b", "c", "k"] {
        let entry = NewEntry {
            perm: 0o644,
            size: if name == "k" { 0 } else { LARGEST },
            parts: (name != "k").then_some(&[]),
            ..NewEntry::new(name.as_bytes(), Kind::Regular)
        };
        tar.entry(&entry).unwrap();
    }
    let link = NewEntry {
        link: b"k",
        ..NewEntry::new(b"l", Kind::HardLink)
    };
    tar.entry(&link).unwrap();
    let stream = tar.finish().unwrap();
    let parent = work_on(&snapshots, &stream);
    let owner = parent.owner;
    let logical = |key: &str| {
        let space = snapshots.space(&[]).unwrap().snapshots;
        let found = space.iter().find(|(info, _)| info.key == key);
        found.unwrap().1.logical
    };
    let unlink = |name: &str| {
        let config = snapshots.union_config(owner, "work").unwrap();
        let union = Union::open(config).unwrap();
        union.unlink(NodeId::ROOT, name.as_ref()).unwrap();
    };
    // Three of them are more than can be said.
    assert_eq!([logical("done"), logical("work")], [Some(u64::MAX); 2]);
    unlink("a");
    assert_eq!(logical("work"), Some(2 * LARGEST));
    unlink("b");
    unlink("c");
    assert_eq!(logical("work"), Some(0));

    // All is counted where one of several names was removed.
    snapshots
        .prepare(owner, "linked", Some(&parent), BTreeMap::new())
        .unwrap();
    let config = snapshots.union_config(owner, "linked").unwrap();
    let union = Union::open(config).unwrap();
    union.unlink(NodeId::ROOT, "l".as_ref()).unwrap();
    drop(union);
    assert_eq!(logical("linked"), Some(u64::MAX));
}

/// The name that it was written by and the others were taken for two files.
#[test]
fn a_changed_file_with_several_names_is_counted_once() {
    let place = Place::new();
    let snapshots = place.open();
    prepared(&snapshots, true);
    let config = snapshots.union_config(Owner::Snapctl, "work").unwrap();
    let union = Union::open(config).unwrap();
    let file = union.lookup(NodeId::ROOT, "a".as_ref()).unwrap().node;
    union.write(file, None, 0, &[2; 3 << 10], None).unwrap();
    let space = snapshots.space(&[]).unwrap().snapshots;
    let found = space.iter().find(|(info, _)| info.key == "work");
    assert_eq!(found.unwrap().1.logical, Some((127 << 10) + (2 << 10)));
}

/// Its row was all `?`, for its tree could not be read, and nothing said why.
#[test]
fn what_is_removed_meanwhile_has_no_row() {
    let place = Place::new();
    let snapshots = place.open();
    let upper = prepared(&snapshots, false).dir;
    fs::write(upper.join("file"), [1; 4096]).unwrap();
    let all = snapshots.catalog.all().unwrap();
    let keys = |space: &Space| -> Vec<String> {
        let rows = space.snapshots.iter();
        rows.map(|(info, taken)| {
            assert!(taken.logical.is_some() && taken.on_disk.is_some());
            info.key.clone()
        })
        .collect()
    };
    let before = snapshots.space_of(&all, &[]).unwrap();
    assert_eq!(keys(&before), ["done", "work"]);
    snapshots.remove(Owner::Snapctl, "work").unwrap();
    let after = snapshots.space_of(&all, &[]).unwrap();
    assert_eq!(keys(&after), ["done"]);
    assert_eq!(after.problems, Vec::<String>::new());
    assert!(after.unclaimed.is_some());
    snapshots.remove(Owner::Snapctl, "done").unwrap();
    let after = snapshots.space_of(&all, &[]).unwrap();
    assert_eq!(after.problems, Vec::<String>::new());
}

/// A question about the disk wrote to it.
#[test]
fn what_is_counted_leaves_no_view() {
    let place = Place::new();
    let snapshots = place.open();
    let upper = prepared(&snapshots, false).dir;
    fs::write(upper.join("new"), [7; 5000]).unwrap();
    let layers = snapshots.packed_layers();
    let views = place.root().join("store/views");
    let list = |dir: &Path| -> Vec<_> {
        let entries = fs::read_dir(dir).unwrap();
        entries.map(|entry| entry.unwrap().path()).collect()
    };
    for view in list(&views) {
        fs::remove_file(view).unwrap();
    }
    let space = snapshots.space(&[]).unwrap();
    assert_eq!(space.problems, [""; 0]);
    let mut all = space.snapshots.iter();
    let (_, taken) = all.find(|(info, _)| info.key == "work").unwrap();
    assert_eq!(taken.logical, Some((127 << 10) + 5000));
    assert_eq!(list(&views), [""; 0].map(PathBuf::from));
    assert_eq!(
        list(&place.root().join("store/tmp")),
        [""; 0].map(PathBuf::from)
    );
    // There was none to be found.
    let chain = [layers.list()[0].0];
    drop(layers.view(&chain, store::view::Verify::First).unwrap());
    assert_eq!(list(&views).len(), 1);
}
