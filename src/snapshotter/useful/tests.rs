//! What the layers of an image cost while it is unpacked, and what is left of that.

use std::collections::BTreeMap;
use std::fs;
use std::path::PathBuf;

use super::super::tests::{Place, prepare};
use super::*;
use crate::cow::Union;
use crate::snapshotter::upper;
use crate::store::LayerName;
use crate::store::layers::Expected;
use crate::sys::fs::Object;
use crate::sys::xattr;

const OWNER: Owner = Owner::Containerd;
const BASE: usize = 2000;

/// A layer of empty files; with `link`, the one of that name is a hard link to it.
fn tar<'a>(names: impl IntoIterator<Item = &'a str>, link: Option<&str>) -> Vec<u8> {
    let mut tar = tar::Builder::new(Vec::new());
    let mut header = tar::Header::new_gnu();
    header.set_mode(0o644);
    header.set_size(0);
    for name in names {
        match link {
            Some(target) if name == "link" => {
                header.set_entry_type(tar::EntryType::Link);
                tar.append_link(&mut header, name, target).unwrap();
            }
            _ => tar.append_data(&mut header, name, &[][..]).unwrap(),
        }
    }
    tar.into_inner().unwrap()
}

fn base() -> Vec<u8> {
    let names: Vec<_> = (0..BASE).map(|number| format!("file{number}")).collect();
    tar(names.iter().map(String::as_str), None)
}

/// As containerd has a layer unpacked by our differ.
fn unpack(snapshots: &Snapshotter, name: &str, on: Option<&str>, stream: &[u8]) -> Result<()> {
    let key = format!("extract {name}");
    prepare(snapshots, &key, on);
    let layer = (stream, &Expected::default());
    let applied = snapshots.apply_layer(OWNER, &key, layer, &());
    match applied {
        Ok(_) => drop(snapshots.commit(OWNER, name, &key, BTreeMap::new())?),
        Err(error) => {
            snapshots.remove(OWNER, &key)?;
            return Err(error);
        }
    }
    Ok(())
}

/// Of an image with ten layers of one file on a base: `0` is the base, `10` the top.
fn unpack_image(snapshots: &Snapshotter) {
    unpack(snapshots, "0", None, &base()).unwrap();
    for number in 1..=10 {
        let (name, below) = (number.to_string(), (number - 1).to_string());
        let file = format!("new{number}");
        unpack(snapshots, &name, Some(&below), &tar([&*file], None)).unwrap();
    }
}

/// Layers on each other, the lowest first, as `image load` has them; each has a file of its own name.
fn load(snapshots: &Snapshotter, names: &[&str]) {
    let mut parent = None;
    for name in names {
        let stream = tar([*name], None);
        let layer = (&*stream, &Expected::default());
        let labels = BTreeMap::new();
        snapshots
            .commit_layer(Owner::Image, name, parent.as_ref(), labels, layer, &())
            .unwrap();
        parent = Some(ParentRef {
            owner: Owner::Image,
            key: (*name).to_owned(),
        });
    }
}

/// The views on the disk.
fn views(place: &Place) -> HashSet<PathBuf> {
    let dir = fs::read_dir(place.root().join("store/views")).unwrap();
    dir.map(|entry| entry.unwrap().path()).collect()
}

/// Has the view of the snapshot made, as a mount would; answers its place.
fn look(snapshots: &Snapshotter, key: &str) -> PathBuf {
    let found = snapshots.catalog.resolve(OWNER, key).unwrap();
    let view = snapshots.below(&found).unwrap().view.unwrap();
    view.path().to_owned()
}

fn collect(snapshots: &Snapshotter) {
    let collected = snapshots.packed_layers().collect(false, &());
    assert!(collected.errors.is_empty(), "{:?}", collected.errors);
}

#[test]
fn a_layer_costs_its_own_entries_however_many_lie_below_it() {
    let place = Place::new();
    let snapshots = place.open();
    unpack_image(&snapshots);
    let merged = || snapshots.packed_layers().merged_entries();
    assert_eq!(merged(), BASE as u64 + 10);
    assert_eq!(views(&place), HashSet::new());
    // Nor does the first mount merge anything.
    prepare(&snapshots, "container", Some("10"));
    look(&snapshots, "container");
    assert_eq!(merged(), BASE as u64 + 10);
    load(
        &snapshots,
        &["image0", "image1", "image2", "image3", "image4"],
    );
    assert_eq!(merged(), BASE as u64 + 15);
    assert_eq!(views(&place).len(), 1);
}

#[test]
fn what_a_layer_gets_wrong_is_told_when_it_is_applied() {
    let place = Place::new();
    let snapshots = place.open();
    unpack_image(&snapshots);
    let wrong = unpack(
        &snapshots,
        "wrong",
        Some("10"),
        &tar(["half", "link"], Some("nowhere")),
    );
    let wrong = wrong.unwrap_err().to_string();
    assert!(
        wrong.contains("link") && wrong.contains("nowhere"),
        "{wrong}"
    );
    // Half of the wrong layer is not below the next one.
    let right = tar(["link"], Some("new10"));
    unpack(&snapshots, "right", Some("10"), &right).unwrap();
    prepare(&snapshots, "container", Some("right"));
    let union = Union::open(snapshots.union_config(OWNER, "container").unwrap()).unwrap();
    let root = crate::cow::NodeId::ROOT;
    assert_eq!(union.lookup(root, "link".as_ref()).unwrap().attr.nlink, 2);
    assert!(union.lookup(root, "half".as_ref()).is_err());
}

#[test]
fn views_between_the_layers_of_an_image_do_not_stay() {
    let place = Place::new();
    let snapshots = place.open();
    unpack_image(&snapshots);
    let between: Vec<_> = ["0", "3", "7"].map(|key| look(&snapshots, key)).into();
    let top = look(&snapshots, "10");
    // Nobody has said yet which images there are.
    collect(&snapshots);
    assert_eq!(views(&place).len(), 4);

    // What was asked for while the image was unpacked comes before what is said now.
    snapshots.wait_until_deleted();
    snapshots.set_tops(Some(HashSet::new()));
    prepare(&snapshots, "container", Some("3"));
    let dry = snapshots.packed_layers().collect(true, &());
    assert_eq!(dry.orphans.len(), 2);
    assert_eq!(views(&place).len(), 4);
    collect(&snapshots);
    let left = HashSet::from([between[1].clone(), top.clone()]);
    assert_eq!(views(&place), left);
    snapshots.remove(OWNER, "container").unwrap();
    collect(&snapshots);
    assert_eq!(views(&place), HashSet::from([top.clone()]));
    // Made again as it is needed.
    assert_eq!(look(&snapshots, "3"), between[1]);

    // The next image on it makes it one that lies between.
    unpack(&snapshots, "11", Some("10"), &tar(["more"], None)).unwrap();
    snapshots.wait_until_deleted();
    assert_eq!(views(&place), HashSet::new());
}

/// The disk is not asked for what is known already.
#[test]
fn what_is_of_use_is_told_by_what_was_read_once() {
    let place = Place::new();
    let snapshots = place.open();
    unpack_image(&snapshots);
    snapshots.wait_until_deleted();
    let (between, top) = (look(&snapshots, "3"), look(&snapshots, "10"));
    let found = snapshots.catalog.resolve(OWNER, "7").unwrap();
    let record = format!("snapshots/records/{}.record", found.id);
    let record = place.root().join(record);
    fs::write(&record, "damaged").unwrap();
    snapshots.set_tops(Some(HashSet::new()));
    collect(&snapshots);
    assert_eq!(views(&place), HashSet::from([top.clone()]));
    // Nobody knows what a record says that was damaged from the start.
    snapshots.wait_until_deleted();
    drop(snapshots);
    let snapshots = place.open();
    let found = snapshots.catalog.resolve(OWNER, "3").unwrap();
    drop(snapshots.below(&found).unwrap());
    snapshots.set_tops(Some(HashSet::new()));
    collect(&snapshots);
    assert_eq!(views(&place), HashSet::from([between, top]));
}

#[test]
fn the_top_of_an_image_keeps_its_view_whatever_lies_on_it() {
    let place = Place::new();
    let snapshots = place.open();
    load(&snapshots, &["base", "top"]);
    let found = snapshots.catalog.resolve(Owner::Image, "base").unwrap();
    snapshots.below(&found).unwrap();
    snapshots.set_tops(Some(HashSet::from(["base".to_owned()])));
    collect(&snapshots);
    assert_eq!(views(&place).len(), 1);
    snapshots.set_tops(Some(HashSet::from(["top".to_owned()])));
    collect(&snapshots);
    assert_eq!(views(&place).len(), 0);
}

#[test]
fn a_view_that_is_mounted_stays_where_it_is() {
    use crate::store::view::{Verify, View};

    let place = Place::new();
    let snapshots = place.open();
    unpack_image(&snapshots);
    snapshots.set_tops(Some(HashSet::new()));
    let path = look(&snapshots, "5");
    let mounted = View::open_stored(&path, Verify::First).unwrap();
    collect(&snapshots);
    assert!(path.exists());
    drop(mounted);
    collect(&snapshots);
    assert!(!path.exists());
}

#[test]
fn the_root_of_layers_is_that_of_their_view() {
    let place = Place::new();
    let snapshots = place.open();
    let same = |key: &str| {
        let found = snapshots.catalog.resolve(OWNER, key).unwrap();
        let of_layers = snapshots.root_of(&found).unwrap().unwrap();
        let of_view = upper::Root::of(snapshots.below(&found).unwrap().union()).unwrap();
        assert_eq!(of_layers, of_view, "{key}");
        of_layers
    };
    unpack(&snapshots, "image", None, &tar(["a"], None)).unwrap();
    let untouched = same("image");
    let dir = prepare(&snapshots, "work", Some("image"))
        .upper_dir
        .unwrap();
    let opened = fs::File::open(&dir).unwrap();
    for name in ["user.name", "trusted.overlay.overlay.name", "trusted.name"] {
        use std::os::fd::AsFd;
        xattr::set(Object::Open(opened.as_fd()), name.as_ref(), b"value", 0).unwrap();
    }
    use std::os::unix::fs::{PermissionsExt, chown};
    chown(&dir, Some(7), Some(8)).unwrap();
    fs::set_permissions(&dir, fs::Permissions::from_mode(0o1751)).unwrap();
    snapshots
        .commit(OWNER, "changed", "work", BTreeMap::new())
        .unwrap();
    let changed = same("changed");
    assert_ne!(changed, untouched);
    // A layer that says nothing of it changes nothing.
    unpack(&snapshots, "top", Some("changed"), &tar(["b"], None)).unwrap();
    assert_eq!(same("top"), changed);
}

#[test]
fn an_import_that_nobody_waits_for_leaves_the_snapshot_as_it_was() {
    struct Gone;
    impl crate::store::ingest::Observer for Gone {
        fn cancelled(&self) -> bool {
            true
        }
    }

    let place = Place::new();
    let snapshots = place.open();
    prepare(&snapshots, "work", None);
    let stream = base();
    let layer = (&*stream, &Expected::default());
    let ended = snapshots.apply_layer(OWNER, "work", layer, &Gone);
    let cancelled = crate::store::Error::Cancelled;
    assert_eq!(ended.unwrap_err().to_string(), cancelled.to_string());
    assert_eq!(snapshots.packed_layers().list(), []);
    let layer = (&*stream, &Expected::default());
    snapshots.apply_layer(OWNER, "work", layer, &()).unwrap();
    let names: Vec<LayerName> = snapshots.stat(OWNER, "work").unwrap().packed_layers;
    assert_eq!(names.len(), 1);
}

/// Overwrites the header of the index of a snapshot's own packed layer.
fn damage(place: &Place, snapshots: &Snapshotter, key: &str) {
    use std::os::unix::fs::FileExt;
    let layer = snapshots.catalog.resolve(OWNER, key).unwrap().record.packed;
    let index = format!("store/layers/{}.index", layer.unwrap());
    let file = fs::File::options()
        .write(true)
        .open(place.root().join(index))
        .unwrap();
    file.write_all_at(&[0xff; 64], 0).unwrap();
}

/// A damaged index once kept containers of its image from starting, though their view was there.
#[test]
fn a_view_is_enough_for_what_lies_on_it() {
    let place = Place::new();
    let snapshots = place.open();
    for (name, below) in [("0", None), ("1", Some("0")), ("unseen", None)] {
        unpack(&snapshots, name, below, &tar([name], None)).unwrap();
    }
    let dir = prepare(&snapshots, "work", Some("1")).upper_dir.unwrap();
    std::os::unix::fs::chown(&dir, Some(7), Some(8)).unwrap();
    snapshots
        .commit(OWNER, "changed", "work", BTreeMap::new())
        .unwrap();
    look(&snapshots, "1");
    look(&snapshots, "changed");
    let found = snapshots.catalog.resolve(OWNER, "changed").unwrap();
    let root = snapshots.root_of(&found).unwrap();
    for key in ["0", "changed", "unseen"] {
        damage(&place, &snapshots, key);
    }
    for (key, below) in [("on stream", "1"), ("on commit", "changed")] {
        prepare(&snapshots, key, Some(below));
        look(&snapshots, key);
    }
    assert_eq!(snapshots.root_of(&found).unwrap(), root);
    // Layers that came as streams are not asked for a root at all.
    prepare(&snapshots, "on unseen", Some("unseen"));
}
