//! Contents of which a bad and a good copy lie on the disk, as plyd leaves them when it is killed after it has brought the good one.

use super::descriptors::Faults;
use super::*;
use crate::store::verify::Fault;

/// What a verification that reads everything finds, which is no layer's.
fn bad_copies(store: &Store) -> Vec<String> {
    let found = Faults::default();
    store.layers.verify(true, &found).unwrap();
    let told = |fault: Fault| {
        assert_eq!(fault.layer, None, "{fault:?}");
        fault.error.problem()
    };
    found.0.into_inner().into_iter().map(told).collect()
}

/// A store in which `file` has had a good copy brought elsewhere, and is killed before the bad one has left the disk. Answers where
/// that lies.
fn killed(is_large: bool) -> (Store, PathBuf) {
    let mut store = Store::new();
    let (dir, at, names) = match is_large {
        true => ("objects", 500, ["large one", "large two"]),
        false => ("packs", 64 + 64 + 500, ["a", "b"]),
    };
    let bad = store.file(dir);
    flip(&bad, at);
    let bytes = fs::read(&bad).unwrap();
    if is_large {
        // What was a file comes in a pack now.
        store.layers = {
            drop(store.layers);
            let settings = Settings {
                small: 1 << 20,
                ..Settings::default()
            };
            Layers::open(store.dir.path(), settings).unwrap().0
        };
    }
    assert!(store.faults() > 0);
    let stream = stream(&names);
    let import = store.layers.import(&*stream, &Expected::default(), &());
    import.unwrap();
    assert!(!bad.exists());
    fs::write(&bad, bytes).unwrap();
    (store.reopen(), bad)
}

fn assert_readable(store: &Store) {
    for verify in [Verify::First, Verify::Always] {
        let view = view_of(store, verify);
        // Also by whoever comes after the first, for whom nothing is compared.
        for name in FILES.iter().chain(&FILES) {
            assert!(read(&view, name).unwrap() == content(name), "{name}");
        }
        assert_eq!(view.damaged(), 0);
    }
    assert_eq!(store.faults(), 0);
}

/// Whichever copy was found first counted, and where that was the bad one its file was EIO though the good one was there.
#[test]
fn a_bad_copy_beside_a_good_one_is_passed_over_told_and_purged() {
    // Whichever of the packs is read first.
    for is_large in [true].into_iter().chain([false; 8]) {
        let (store, bad) = killed(is_large);
        assert_readable(&store);
        let told = bad_copies(&store);
        assert_eq!(told.len(), 1, "{told:?}");
        assert!(told[0].starts_with(bad.to_str().unwrap()), "{told:?}");
        // Until it is gone.
        assert_eq!(bad_copies(&store), told);
        assert_eq!(store.layers.verify_packs().len(), 1);
        let mended = store.layers.mend(&HashMap::new(), &());
        assert!(mended.errors.is_empty(), "{:?}", mended.errors);
        assert_eq!(mended.duplicates, BTreeSet::from([bad.clone()]));
        assert!(!bad.exists());
        assert_eq!(bad_copies(&store), [""; 0]);
        store.assert_whole();
    }
}

/// A collection took the pack with the good copy for one in which nothing is alive.
#[test]
fn a_collection_keeps_the_good_copy() {
    for is_large in [true].into_iter().chain([false; 8]) {
        let (store, bad) = killed(is_large);
        let collected = store.layers.collect(false, &());
        assert!(collected.errors.is_empty(), "{:?}", collected.errors);
        assert_readable(&store);
        // Where a collection has no reason to compare the two, a repair does.
        store.layers.verify(true, &Faults::default()).unwrap();
        store.layers.mend(&HashMap::new(), &());
        assert!(!bad.exists());
        store.assert_whole();
    }
}

#[test]
fn an_import_goes_on_with_the_good_copy() {
    for is_large in [true].into_iter().chain([false; 8]) {
        let (store, bad) = killed(is_large);
        let objects = store.layers.objects();
        let packs = objects.all_packs().unwrap();
        // As if it was found damaged by a read.
        for name in FILES {
            objects.doubt(ObjectName::of(&content(name)));
        }
        let stream = stream(&["new", "a", "b", "large one", "large two"]);
        let import = store.layers.import(&*stream, &Expected::default(), &());
        import.unwrap();
        let mut brought = objects.all_packs().unwrap();
        brought.retain(|id| !packs.contains(id));
        let [brought] = brought[..] else {
            panic!("{brought:?}");
        };
        // Only what was not there.
        let bytes = fs::metadata(objects.pack_path(brought)).unwrap().len();
        assert!((3200..6400).contains(&bytes), "{bytes}");
        store.layers.verify(true, &Faults::default()).unwrap();
        store.layers.mend(&HashMap::new(), &());
        assert!(!bad.exists());
        store.assert_whole();
    }
}

/// Where in the store `a` is found.
fn place_of_a(store: &Store) -> Option<Place> {
    let name = ObjectName::of(&content("a"));
    store.layers.objects().find(&name).unwrap()
}

/// Damages a pack and finds that out.
fn damaged() -> (Store, PathBuf) {
    let store = Store::new();
    let pack = store.file("packs");
    for at in [200, 3500] {
        flip(&pack, at);
    }
    assert!(store.faults() > 0);
    (store, pack)
}

/// The bad copy was forgotten with the import, and stayed on the disk for good.
#[test]
fn a_bad_copy_goes_with_the_next_import_where_one_has_failed_after_it_had_brought_a_good_one() {
    let (store, pack) = damaged();
    let names = ["a", "b", "new"];
    let name = {
        let other = Store::new();
        let stream = stream(&names);
        let import = other.layers.import(&*stream, &Expected::default(), &());
        import.unwrap()
    };
    // Its index cannot come to its place.
    fs::create_dir_all(store.layers.index_path(name).join("in the way")).unwrap();
    let before = place_of_a(&store);
    let import = |names: &[&str]| {
        let stream = stream(names);
        store.layers.import(&*stream, &Expected::default(), &())
    };
    import(&names).unwrap_err();
    assert_ne!(place_of_a(&store), before);
    assert!(pack.exists());
    assert_eq!(store.layers.verify_packs().len(), 2);
    import(&["another"]).unwrap();
    assert!(!pack.exists());
    assert!(store.layers.verify_packs().is_empty());
    fs::remove_dir_all(store.layers.index_path(name)).unwrap();
    store.layers.collect(false, &());
    store.assert_whole();
}

/// A purge that failed forgot what it was to take away.
#[test]
fn a_purge_that_failed_is_tried_again() {
    for collects in [false, true] {
        let store = Store::new();
        let pack = store.file("packs");
        // The other one has to be written anew.
        flip(&pack, 200);
        assert!(store.faults() > 0);
        let stream = stream(&["a", "b"]);
        // As by an import that is cut off before it purges.
        let taken = store.layers.take_in(&*stream, &Expected::default(), &());
        taken.unwrap();
        let objects = store.layers.objects();
        let nowhere = store.dir.path().join("nowhere");
        objects.purge(&nowhere, 1).unwrap_err();
        assert!(pack.exists());
        assert_eq!(store.layers.verify_packs().len(), 1);
        match collects {
            true => drop(store.layers.collect(false, &())),
            false => drop(store.layers.mend(&HashMap::new(), &())),
        }
        assert!(!pack.exists());
        assert!(store.layers.verify_packs().is_empty());
        store.assert_whole();
    }
}

/// With the good copy, which nobody needed any more, what was known of the bad one was gone, and the next layer relied on it.
#[test]
fn a_bad_copy_that_outlives_the_good_one_is_not_relied_on() {
    // Whichever of the packs is read first.
    for _ in 0..8 {
        let tmp = tempfile::tempdir().unwrap();
        let import = |layers: &Layers, names: &[&str]| {
            let stream = stream(names);
            layers.import(&*stream, &Expected::default(), &()).unwrap()
        };
        let layers = open(tmp.path());
        let all = import(&layers, &["a", "b", "c"]);
        // Its pack stays for these.
        import(&layers, &["b", "c"]);
        let a = ObjectName::of(&content("a"));
        let Some(Place::Packed { pack, offset, .. }) = layers.objects().find(&a).unwrap() else {
            panic!("it is not in a pack");
        };
        let pack = layers.objects().pack_path(pack);
        flip(&pack, offset + 100);
        let bad = fs::read(&pack).unwrap();
        assert_eq!(layers.verify_layer(all, true, &()).len(), 1);
        // Killed after a good one was brought.
        let only = import(&layers, &["a"]);
        fs::write(&pack, bad).unwrap();
        drop(layers);
        let layers = open(tmp.path());
        layers.verify(true, &Faults::default()).unwrap();
        for layer in [all, only] {
            layers.remove(layer).unwrap();
        }
        let collected = layers.collect(false, &());
        assert!(collected.errors.is_empty(), "{:?}", collected.errors);
        import(&layers, &["new"]);
        let again = import(&layers, &["a"]);
        assert_eq!(layers.verify_layer(again, true, &()).len(), 0);
    }
}
