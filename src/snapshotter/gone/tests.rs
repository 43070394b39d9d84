//! Records that are gone when plyd starts, or damaged, and are put back.

use std::collections::BTreeMap;
use std::fs;
use std::path::PathBuf;

use crate::snapshotter::tests::{Place, layer, prepare};
use crate::snapshotter::{Error, Owner, ParentRef, SnapshotInfo, Snapshotter};
use crate::store::layers::Expected;

const OWNER: Owner = Owner::Containerd;

fn record_of(place: &Place, snapshots: &Snapshotter, owner: Owner, key: &str) -> PathBuf {
    let id = snapshots.stat(owner, key).unwrap().id;
    place.root().join(format!("snapshots/records/{id}.record"))
}

/// Ends it, does that, opens it again.
fn meanwhile(place: &Place, snapshots: Snapshotter, work: impl FnOnce()) -> Snapshotter {
    snapshots.close().unwrap();
    drop(snapshots);
    work();
    place.open()
}

/// The same with a record that goes; what it was comes with it.
fn lose(place: &Place, snapshots: Snapshotter, record: &PathBuf) -> (Snapshotter, Vec<u8>) {
    let good = fs::read(record).unwrap();
    let snapshots = meanwhile(place, snapshots, || fs::remove_file(record).unwrap());
    (snapshots, good)
}

fn of(owner: Owner, key: &str) -> ParentRef {
    let key = key.to_owned();
    ParentRef { owner, key }
}

/// A committed snapshot on `on` whose packed layer is `stream`.
fn commit(
    snapshots: &Snapshotter,
    (owner, name): (Owner, &str),
    on: Option<ParentRef>,
    stream: &[u8],
) -> SnapshotInfo {
    let layer = (stream, &Expected::default());
    snapshots
        .commit_layer(owner, name, on.as_ref(), BTreeMap::new(), layer, &())
        .unwrap()
}

/// An empty tar.
const EMPTY: [u8; 1024] = [0; 1024];

/// As soon as nothing told of it any more, its layer was erased, though the record was there.
#[test]
fn a_record_that_was_put_back_is_not_given_up_with_what_builds_on_it() {
    let place = Place::new();
    let snapshots = place.open();
    layer(&snapshots, "base", None);
    prepare(&snapshots, "on it", Some("base"));
    let record = record_of(&place, &snapshots, OWNER, "base");
    let (snapshots, good) = lose(&place, snapshots, &record);
    assert!(!snapshots.settle_records());
    fs::write(&record, good).unwrap();
    assert!(!snapshots.settle_records());
    snapshots.remove(OWNER, "on it").unwrap();
    assert!(snapshots.settle_records());
    prepare(&snapshots, "again", Some("base"));
    let base = snapshots.stat(OWNER, "base").unwrap().packed_layers;
    assert!(snapshots.packed_layers().is_whole(base[0]));
}

/// Its layer was that of another one as well, and went with it; and what it might build on could not be removed any more.
#[test]
fn a_record_that_was_put_back_is_as_any_other_once_it_is_changed() {
    let place = Place::new();
    let snapshots = place.open();
    for name in ["one", "two"] {
        commit(&snapshots, (OWNER, name), None, &EMPTY);
    }
    commit(&snapshots, (Owner::Snapctl, "other"), None, &EMPTY);
    let record = record_of(&place, &snapshots, OWNER, "one");
    let good = fs::read(&record).unwrap();
    let damage = || fs::write(&record, "nonsense").unwrap();
    let snapshots = meanwhile(&place, snapshots, damage);
    fs::write(&record, good).unwrap();
    snapshots.set_labels(OWNER, "one", BTreeMap::new()).unwrap();
    snapshots.remove(Owner::Snapctl, "other").unwrap();
    snapshots.remove(OWNER, "one").unwrap();
    assert!(snapshots.settle_records());
    let two = snapshots.stat(OWNER, "two").unwrap().packed_layers;
    assert!(snapshots.packed_layers().is_whole(two[0]));
    snapshots.remove(OWNER, "two").unwrap();
    assert!(snapshots.packed_layers().list().is_empty());
}

/// What built on it took its layer along.
#[test]
fn a_record_whose_key_is_anothers_now_keeps_its_layer_and_what_it_lies_on() {
    let place = Place::new();
    let snapshots = place.open();
    layer(&snapshots, "below", None);
    layer(&snapshots, "base", Some("below"));
    prepare(&snapshots, "on it", Some("base"));
    let record = record_of(&place, &snapshots, OWNER, "base");
    let (snapshots, good) = lose(&place, snapshots, &record);
    commit(&snapshots, (OWNER, "base"), None, &EMPTY);
    fs::write(&record, good).unwrap();
    let refused = snapshots.remove(OWNER, "below");
    assert!(
        matches!(refused, Err(Error::HasChildren { .. })),
        "{refused:?}"
    );
    assert!(snapshots.damaged_records().unwrap().is_empty());
    snapshots.remove(OWNER, "on it").unwrap();
    assert!(snapshots.settle_records());
    assert_eq!(snapshots.packed_layers().list().len(), 3);

    // The index is lost: the key means the one that was made last.
    let index = place.root().join("index");
    let snapshots = meanwhile(&place, snapshots, || fs::remove_dir_all(&index).unwrap());
    let is_put_back =
        |snapshots: &Snapshotter| record_of(&place, snapshots, OWNER, "base") == record;
    assert!(!is_put_back(&snapshots));
    snapshots.remove(OWNER, "base").unwrap();
    assert!(is_put_back(&snapshots));
    assert_eq!(snapshots.packed_layers().list().len(), 2);
}

/// Nobody told of it, and it went with the layer of another one that has the same.
#[test]
fn a_record_that_nothing_tells_of_keeps_its_layer_once_it_is_put_back() {
    let place = Place::new();
    let snapshots = place.open();
    for name in ["one", "two"] {
        commit(&snapshots, (OWNER, name), None, &EMPTY);
    }
    let record = record_of(&place, &snapshots, OWNER, "one");
    let (snapshots, good) = lose(&place, snapshots, &record);
    assert!(snapshots.settle_records());
    fs::write(&record, good).unwrap();
    snapshots.remove(OWNER, "two").unwrap();
    let one = snapshots.stat(OWNER, "one").unwrap().packed_layers;
    assert!(snapshots.packed_layers().is_whole(one[0]));
}

/// It was told of by nobody, and kept what it might build on for good.
#[test]
fn a_damaged_record_that_was_removed_is_told_of_until_the_next_start() {
    let place = Place::new();
    let snapshots = place.open();
    let own = |key| (Owner::Snapctl, key);
    commit(&snapshots, own("base"), None, &EMPTY);
    commit(
        &snapshots,
        own("on it"),
        Some(of(Owner::Snapctl, "base")),
        &EMPTY,
    );
    let on_it = of(Owner::Snapctl, "on it");
    snapshots
        .prepare(Owner::Snapctl, "top", Some(&on_it), BTreeMap::new())
        .unwrap();
    let record = record_of(&place, &snapshots, Owner::Snapctl, "on it");
    let damage = || fs::write(&record, "nonsense").unwrap();
    let snapshots = meanwhile(&place, snapshots, damage);
    fs::remove_file(&record).unwrap();
    // Once, though the snapshot on it tells of it, too.
    assert_eq!(snapshots.count_damaged_records().unwrap(), 1);
    snapshots.remove(Owner::Snapctl, "top").unwrap();
    assert_eq!(snapshots.count_damaged_records().unwrap(), 1);
    let told = snapshots
        .damaged_records()
        .unwrap()
        .remove(0)
        .damaged
        .to_string();
    assert!(
        told.contains("it is gone") && told.contains("start plyd again"),
        "{told}"
    );
    let refused = snapshots.remove(Owner::Snapctl, "base");
    assert!(
        matches!(refused, Err(Error::MayHaveChildren { .. })),
        "{refused:?}"
    );
    let snapshots = meanwhile(&place, snapshots, || ());
    assert_eq!(snapshots.count_damaged_records().unwrap(), 0);
    snapshots.remove(Owner::Snapctl, "base").unwrap();
    assert!(snapshots.packed_layers().list().is_empty());
}

/// It was younger than what built on it, and passed for one on which a record that was gone could not build.
#[test]
fn of_two_records_of_one_layer_the_one_that_stays_is_older_than_what_builds_on_it() {
    let place = Place::new();
    let snapshots = place.open();
    let base = (Owner::Image, "chain");
    commit(&snapshots, base, None, &EMPTY);
    let middle = (Owner::Snapctl, "middle");
    commit(&snapshots, middle, Some(of(base.0, base.1)), &EMPTY);
    snapshots
        .prepare(
            Owner::Snapctl,
            "child",
            Some(&of(middle.0, middle.1)),
            BTreeMap::new(),
        )
        .unwrap();
    let record = record_of(&place, &snapshots, base.0, base.1);
    let index = place.root().join("index");
    let snapshots = meanwhile(&place, snapshots, || fs::remove_dir_all(&index).unwrap());
    let (snapshots, good) = lose(&place, snapshots, &record);
    let snapshots = meanwhile(&place, snapshots, || fs::remove_dir_all(&index).unwrap());
    commit(&snapshots, base, None, &EMPTY);
    let snapshots = meanwhile(&place, snapshots, || fs::write(&record, good).unwrap());
    let on = snapshots.stat(middle.0, middle.1).unwrap();
    assert_eq!(on.parent, Some(of(base.0, base.1)));
    let stays = snapshots.stat(base.0, base.1).unwrap();
    assert!(stays.created < on.created);

    let record = record_of(&place, &snapshots, middle.0, middle.1);
    let (snapshots, good) = lose(&place, snapshots, &record);
    let refused = snapshots.remove(base.0, base.1);
    assert!(
        matches!(refused, Err(Error::MayHaveChildren { .. })),
        "{refused:?}"
    );
    fs::write(&record, good).unwrap();
    snapshots.take_put_back().unwrap();
    assert_eq!(
        snapshots
            .stat(Owner::Snapctl, "child")
            .unwrap()
            .packed_layers
            .len(),
        2
    );
}

/// `snapctl snapshot prepare` takes any parent.
#[test]
fn a_layer_of_containerds_stays_on_which_a_snapshot_of_others_may_build() {
    let place = Place::new();
    let snapshots = place.open();
    layer(&snapshots, "base", None);
    let own = (Owner::Snapctl, "own");
    commit(&snapshots, own, Some(of(OWNER, "base")), &EMPTY);
    let record = record_of(&place, &snapshots, own.0, own.1);
    // Also where the index tells nothing of it.
    let damage = || {
        let good = fs::read_to_string(&record).unwrap();
        fs::write(&record, good.replace("packed", "")).unwrap();
        fs::remove_dir_all(place.root().join("index")).unwrap();
    };
    let snapshots = meanwhile(&place, snapshots, damage);
    let refused = snapshots.remove(OWNER, "base");
    assert!(
        matches!(refused, Err(Error::MayHaveChildren { .. })),
        "{refused:?}"
    );
}

/// Nothing could be made of it, and to remove it took the one that could be used.
#[test]
fn of_two_active_snapshots_of_one_name_the_one_goes_of_which_nothing_is_left() {
    let place = Place::new();
    let snapshots = place.open();
    let old = prepare(&snapshots, "work", None);
    let record = record_of(&place, &snapshots, OWNER, "work");
    let good = fs::read(&record).unwrap();
    snapshots.remove(OWNER, "work").unwrap();
    let new = prepare(&snapshots, "work", None);
    let snapshots = meanwhile(&place, snapshots, || fs::write(&record, good).unwrap());
    assert_ne!(old.id, new.id);
    let all = snapshots.list(None).unwrap();
    assert_eq!(all.len(), 1);
    assert_eq!(all[0].id, new.id);
    assert!(!record.exists());
}
