//! Packs of which the header or the table is damaged, cannot be read, or is a newer release's.

use super::*;
use crate::store::format::short_sum;
use crate::store::format::tables::Object;
use crate::store::pack::PackId;

fn cut(path: &Path, length: u64) {
    let file = File::options().write(true).open(path).unwrap();
    file.set_len(length).unwrap();
}

/// Bytes of `a` or `b` in a pack, with its header and padding.
const PACKED: u64 = 64 + 3200;
/// Where the table of their pack starts.
const TABLE: u64 = 64 + 2 * PACKED;

/// Sets a bit of a word of features in the header of a pack.
fn set_feature(pack: &Path, word: usize) {
    let mut bytes = fs::read(pack).unwrap();
    bytes[word] |= 4;
    let sum = short_sum(&bytes[..56]);
    bytes[56..64].copy_from_slice(&sum);
    fs::write(pack, bytes).unwrap();
}

/// What is done to a pack.
type Damage = (&'static str, fn(&Path));

/// Damage to a pack that leaves what is in it.
const SPOILT: [Damage; 4] = [
    ("its header", |pack| flip(pack, 3)),
    ("its table", |pack| flip(pack, TABLE + 60)),
    ("both", |pack| {
        flip(pack, 3);
        flip(pack, TABLE + 60);
    }),
    ("its end is missing", |pack| cut(pack, TABLE + 10)),
];

/// A collection does nothing, and is content.
fn assert_nothing_goes(store: &Store) {
    let collected = store.layers.collect(false, &());
    assert!(collected.errors.is_empty(), "{:?}", collected.errors);
    assert_eq!(collected.orphans, []);
}

#[test]
fn a_spoilt_pack_is_written_anew_without_a_source() {
    for (what, spoil) in SPOILT {
        for restart in [false, true] {
            let mut store = Store::new();
            let pack = store.file("packs");
            spoil(&pack);
            if restart {
                store = store.reopen();
            }
            // All of it can be read, and yet it is told.
            assert_eq!(store.faults(), 0, "{what}");
            let told = store.layers.verify_packs();
            assert_eq!(told.len(), 1, "{what}");
            let problem = told[0].error.problem();
            assert!(problem.starts_with(pack.to_str().unwrap()), "{problem}");
            assert_nothing_goes(&store);
            let mended = store.layers.mend(&HashMap::new(), &());
            assert!(mended.errors.is_empty(), "{:?}", mended.errors);
            assert_eq!(mended.packs, [&*pack], "{what}");
            assert!(!pack.exists());
            assert!(store.layers.verify_packs().is_empty());
            store.assert_whole();
        }
    }
}

#[test]
fn a_spoilt_pack_that_no_layer_needs_is_collected() {
    let gone: Damage = ("all of it", |pack| fs::write(pack, [0; 500]).unwrap());
    let short: Damage = ("nearly all of it", |pack| cut(pack, 10));
    for (what, spoil) in SPOILT.into_iter().chain([gone, short]) {
        for restart in [false, true] {
            let mut store = Store::new();
            spoil(&store.file("packs"));
            if restart {
                store = store.reopen();
            }
            store.layers.remove(store.layer).unwrap();
            store.layers.remove(store.other).unwrap();
            let collected = store.layers.collect(false, &());
            assert!(
                collected.errors.is_empty(),
                "{what}: {:?}",
                collected.errors
            );
            assert_eq!(store.layers.objects().all_packs().unwrap(), [], "{what}");
        }
    }
}

#[test]
fn a_pack_that_may_have_what_is_missing_stays_until_nothing_is() {
    let lost: [Damage; 3] = [
        ("the second half", |pack| cut(pack, 64 + PACKED + 100)),
        ("the table, and the header of the first object", |pack| {
            flip(pack, 64 + 1);
            flip(pack, TABLE + 60);
        }),
        ("that, and the header of the pack", |pack| {
            flip(pack, 3);
            flip(pack, 64 + 1);
            flip(pack, TABLE + 60);
        }),
    ];
    for (what, spoil) in lost {
        let store = Store::new();
        let pack = store.file("packs");
        let chain = [store.layer];
        let view = store.layers.view(&chain, Verify::Never).unwrap();
        let readable = || {
            let root = view.inode(View::ROOT).unwrap();
            let names = ["a", "b"].into_iter().filter(|name| {
                let entry = view.lookup(&root, name.as_bytes()).unwrap().unwrap();
                let file = view.open_file(&view.inode(entry.inode).unwrap());
                file.is_ok_and(|file| {
                    let mut bytes = vec![0; 3200];
                    file.read_at(&mut bytes, 0).unwrap();
                    bytes == content(name)
                })
            });
            names.count()
        };
        spoil(&pack);
        let store = store.reopen();
        assert!(store.faults() > 0, "{what}");
        assert_nothing_goes(&store);
        let mended = store.layers.mend(&HashMap::new(), &());
        assert!(mended.errors.is_empty(), "{:?}", mended.errors);
        assert_eq!(mended.packs, [""; 0].map(PathBuf::from), "{what}");
        // By where the view has it.
        assert_eq!(readable(), 1, "{what}");
        store.restore();
        assert_eq!(
            store.layers.mend(&HashMap::new(), &()).packs,
            [pack],
            "{what}"
        );
        store.assert_whole();
    }
}

#[test]
fn what_is_known_of_a_spoilt_pack_is_kept_though_nobody_could_find_it_again() {
    let store = Store::new();
    let pack = store.file("packs");
    flip(&pack, 3);
    flip(&pack, 64 + 1);
    flip(&pack, TABLE + 60);
    let faults = store.faults();
    assert!((1..3).contains(&faults));
    assert_nothing_goes(&store);
    assert_eq!(store.layers.mend(&HashMap::new(), &()).packs, [pack]);
    assert_eq!(store.faults(), faults);
    let store = store.reopen();
    assert_eq!(store.faults(), faults);
    store.restore();
    store.assert_whole();
}

#[test]
fn a_bad_copy_in_a_sound_pack_is_not_taken_for_a_good_one_in_a_spoilt_pack() {
    let store = Store::new();
    let pack = store.file("packs");
    let mut bytes = fs::read(&pack).unwrap();
    let other = PackId([7; 16]);
    bytes[40..56].copy_from_slice(&other.0);
    let sum = short_sum(&bytes[..56]);
    bytes[56..64].copy_from_slice(&sum);
    bytes[500] ^= 0x20;
    fs::write(store.layers.objects().pack_path(other), bytes).unwrap();
    flip(&pack, 3);
    let store = store.reopen();
    assert_eq!(store.faults(), 0);
    // The spoilt pack, and the copy.
    assert_eq!(store.layers.verify_packs().len(), 2);
    assert_eq!(store.layers.mend(&HashMap::new(), &()).packs, [pack]);
    store.assert_whole();
}

#[test]
fn a_bad_copy_that_has_to_stay_is_not_found_again() {
    // Whichever of the packs is read first.
    for _ in 0..8 {
        let store = Store::new();
        let pack = store.file("packs");
        // A read-only compatible feature, which forbids to write it anew.
        set_feature(&pack, 24);
        flip(&pack, 500);
        let bytes = fs::read(&pack).unwrap();
        assert!(store.faults() > 0);
        store.restore();
        assert!(fs::read(&pack).unwrap() == bytes);
        assert_eq!(store.faults(), 0);
        assert_eq!(store.reopen().faults(), 0);
    }
}

/// All that is told of packs is this: that it needs a newer release, for those features.
fn assert_needs_newer(store: &Store, pack: &Path) {
    let told = store.layers.verify_packs();
    let [fault] = &told[..] else {
        panic!("{told:?}");
    };
    assert!(matches!(fault.error, Error::Unsupported { .. }));
    let problem = fault.error.problem();
    let named = format!("{} needs a newer release", pack.display());
    assert!(
        problem.starts_with(&named) && problem.contains("0x4"),
        "{problem}"
    );
}

#[test]
fn a_damaged_pack_that_a_feature_forbids_to_write_anew_needs_a_newer_release() {
    let store = Store::new();
    let pack = store.file("packs");
    set_feature(&pack, 24);
    assert!(store.layers.verify_packs().is_empty());
    flip(&pack, TABLE + 60);
    assert_needs_newer(&store, &pack);
    let mended = store.layers.mend(&HashMap::new(), &());
    assert_eq!(mended.packs, [""; 0].map(PathBuf::from));
    assert!(
        matches!(mended.errors[..], [Error::Unsupported { .. }]),
        "{:?}",
        mended.errors
    );
    assert_eq!(store.reopen().faults(), 0);
}

#[test]
fn a_pack_with_an_unknown_incompatible_feature_is_refused_and_stays() {
    for restart in [false, true] {
        let mut store = Store::new();
        let pack = store.file("packs");
        set_feature(&pack, 32);
        let bytes = fs::read(&pack).unwrap();
        if restart {
            store = store.reopen();
        }
        assert_needs_newer(&store, &pack);
        let object = Object {
            name: ObjectName::of(&content("b")),
            size: 3200,
        };
        let objects = Objects::new(store.dir.path());
        let place = Place::Packed {
            pack: PackId::of_file(pack.file_name().unwrap().to_str().unwrap()).unwrap(),
            offset: 64,
            stored: 3200,
        };
        // By where a view has it.
        let refused = objects.read(&object, Some(place), false).unwrap_err();
        assert!(matches!(refused, Error::Unsupported { .. }), "{refused}");
        assert!(store.faults() > 0);
        assert!(store.layers.mend(&HashMap::new(), &()).errors.is_empty());
        assert_eq!(store.layers.collect(false, &()).orphans, []);
        store.restore();
        assert_eq!(store.faults(), 0);
        assert!(fs::read(&pack).unwrap() == bytes);
    }
}

/// One bad sector once kept the whole store from being opened.
#[test]
fn a_store_is_opened_though_a_pack_cannot_be_read() {
    let store = Store::new();
    let pack = store.file("packs");
    let aside = store.dir.path().join("aside");
    fs::rename(&pack, &aside).unwrap();
    // What the host refuses to read.
    fs::create_dir(&pack).unwrap();
    let store = store.reopen();
    let told = store.layers.verify_packs();
    assert_eq!(told.len(), 1);
    let problem = told[0].error.problem();
    assert!(problem.contains("cannot be read"), "{problem}");
    let faults = |layer| store.layers.verify_layer(layer, true, &()).len();
    assert!(faults(store.layer) > 0);
    // It has `a` of the pack, and the rest in its own.
    assert_eq!(faults(store.other), 1);
    assert_nothing_goes(&store);
    fs::remove_dir(&pack).unwrap();
    fs::rename(&aside, &pack).unwrap();
    store.reopen().assert_whole();
}

fn move_away(pack: &Path) {
    fs::rename(pack, pack.with_extension("moved")).unwrap();
}

/// Ways to take a pack from its place.
const TAKEN: [Damage; 3] = [
    ("it is moved away", move_away),
    ("it is removed", |pack| fs::remove_file(pack).unwrap()),
    ("another file is in its place", |pack| {
        move_away(pack);
        fs::write(pack, [0; 500]).unwrap();
    }),
];

/// One that was moved away was read on from what was open of it. Nobody missed it before the next start, and nothing was left of it
/// then.
#[test]
fn a_pack_that_is_not_in_its_place_is_missed_and_put_back_from_what_is_open_of_it() {
    for (what, take) in TAKEN {
        let store = Store::new();
        // Which reads it.
        assert_eq!(store.faults(), 0);
        let pack = store.file("packs");
        take(&pack);
        for _ in 0..2 {
            assert!(store.faults() > 0, "{what}");
        }
        assert_nothing_goes(&store);
        let mended = store.layers.mend(&HashMap::new(), &());
        assert!(mended.errors.is_empty(), "{:?}", mended.errors);
        assert_eq!(mended.put_back, std::slice::from_ref(&pack), "{what}");
        assert_eq!(store.faults(), 0, "{what}");
        assert_eq!(
            store.layers.mend(&HashMap::new(), &()).put_back,
            [""; 0].map(PathBuf::from),
            "{what}"
        );
        store.assert_whole();
    }
}

#[test]
fn a_pack_that_is_not_in_its_place_and_not_open_comes_from_the_stream() {
    for (what, take) in TAKEN {
        let store = Store::new().reopen();
        take(&store.file("packs"));
        assert!(store.faults() > 0, "{what}");
        let mended = store.layers.mend(&HashMap::new(), &());
        assert!(mended.errors.is_empty(), "{:?}", mended.errors);
        assert_eq!(mended.put_back, [""; 0].map(PathBuf::from), "{what}");
        assert!(store.faults() > 0, "{what}");
        store.restore();
        assert_eq!(store.faults(), 0, "{what}");
        store.layers.mend(&HashMap::new(), &());
        store.assert_whole();
    }
}

#[test]
fn what_is_open_of_a_pack_is_not_put_over_what_is_as_good() {
    let store = Store::new();
    assert_eq!(store.faults(), 0);
    let pack = store.file("packs");
    let bytes = fs::read(&pack).unwrap();
    let unwanted = |what: &str| {
        let there = fs::read(&pack).unwrap();
        let mended = store.layers.mend(&HashMap::new(), &());
        assert!(mended.errors.is_empty(), "{:?}", mended.errors);
        assert_eq!(mended.put_back, [""; 0].map(PathBuf::from), "{what}");
        assert!(fs::read(&pack).unwrap() == there, "{what}");
    };
    move_away(&pack);
    fs::write(&pack, &bytes).unwrap();
    assert_eq!(store.faults(), 0);
    unwanted("a copy");
    // What is open now is damaged, and so is what takes its place.
    flip(&pack, 500);
    assert!(store.faults() > 0);
    move_away(&pack);
    fs::write(&pack, &bytes).unwrap();
    flip(&pack, 501);
    assert!(store.faults() > 0);
    unwanted("a damaged one");
    store.restore();
    store.assert_whole();
}

/// It had fewer that were sound, and one of them the other had not.
#[test]
fn what_is_open_of_a_pack_is_not_put_over_what_it_does_not_have() {
    let store = Store::new();
    let stream = stream(&["c", "d", "e"]);
    let import = store.layers.import(&*stream, &Expected::default(), &());
    let layer = import.unwrap();
    let faults = || store.layers.verify_layer(layer, true, &()).len();
    assert_eq!(faults(), 0);
    let pack = store.file("packs");
    let bytes = fs::read(&pack).unwrap();
    assert!(bytes.len() as u64 > 3 * PACKED);
    let first = 64 + 100;
    flip(&pack, first);
    move_away(&pack);
    fs::write(&pack, &bytes).unwrap();
    flip(&pack, first + PACKED);
    flip(&pack, first + 2 * PACKED);
    let there = fs::read(&pack).unwrap();
    assert!(faults() > 0);
    let mended = store.layers.mend(&HashMap::new(), &());
    assert!(mended.errors.is_empty(), "{:?}", mended.errors);
    assert_eq!(mended.put_back, [""; 0].map(PathBuf::from));
    assert!(fs::read(&pack).unwrap() == there);
}

/// It stayed until the next start, whatever was in it.
#[test]
fn a_pack_that_is_in_its_place_again_is_collected() {
    for is_worse in [false, true] {
        let store = Store::new();
        assert_eq!(store.faults(), 0);
        let pack = store.file("packs");
        let bytes = fs::read(&pack).unwrap();
        move_away(&pack);
        if is_worse {
            fs::write(&pack, &bytes).unwrap();
            flip(&pack, 64 + 100);
        }
        assert!(store.faults() > 0);
        match is_worse {
            true => assert_eq!(
                store.layers.mend(&HashMap::new(), &()).put_back,
                std::slice::from_ref(&pack)
            ),
            false => fs::rename(pack.with_extension("moved"), &pack).unwrap(),
        }
        assert_eq!(store.faults(), 0);
        store.layers.remove(store.layer).unwrap();
        let collected = store.layers.collect(false, &());
        assert!(collected.errors.is_empty(), "{:?}", collected.errors);
        // `a` is in another one.
        assert!(!pack.exists(), "{is_worse}");
    }
}
