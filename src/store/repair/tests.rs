use std::fs::File;
use std::os::unix::fs::FileExt;
use std::path::Path;

use super::*;
use crate::store::format::ObjectName;
use crate::store::format::tables::Object;
use crate::store::ingest::Settings;
use crate::store::object::{Objects, Place};

fn open(dir: &Path) -> Layers {
    let settings = Settings {
        small: 4096,
        workers: 2,
        ..Settings::default()
    };
    Layers::open(dir, settings).unwrap().0
}

fn content(name: &str) -> Vec<u8> {
    let times = if name.starts_with("large") { 1000 } else { 100 };
    // Nothing that a compression makes small.
    (0..times)
        .flat_map(|number| *blake3::hash(format!("{name} {number}").as_bytes()).as_bytes())
        .collect()
}

fn stream(names: &[&str]) -> Vec<u8> {
    let mut builder = tar::Builder::new(Vec::new());
    for name in names {
        let content = content(name);
        let mut header = tar::Header::new_ustar();
        header.set_size(content.len() as u64);
        header.set_mode(0o644);
        builder.append_data(&mut header, name, &*content).unwrap();
    }
    builder.into_inner().unwrap()
}

const FILES: [&str; 4] = ["a", "b", "large one", "large two"];

/// A store with one layer of `FILES` and another that shares `a` with it.
struct Store {
    dir: tempfile::TempDir,
    layers: Layers,
    layer: LayerName,
    other: LayerName,
}

impl Store {
    fn new() -> Self {
        let dir = tempfile::tempdir().unwrap();
        let layers = open(dir.path());
        let import = |names: &[&str]| {
            let stream = stream(names);
            layers.import(&*stream, &Expected::default(), &()).unwrap()
        };
        let (layer, other) = (import(&FILES), import(&["a", "other"]));
        Self {
            dir,
            layers,
            layer,
            other,
        }
    }

    fn reopen(self) -> Self {
        let Self {
            dir,
            layers,
            layer,
            other,
        } = self;
        drop(layers);
        let layers = open(dir.path());
        Self {
            dir,
            layers,
            layer,
            other,
        }
    }

    /// The only file below `dir` of the store, or the one with the largest size.
    fn file(&self, dir: &str) -> PathBuf {
        let mut found = Vec::new();
        let mut waiting = vec![self.dir.path().join(dir)];
        while let Some(dir) = waiting.pop() {
            for entry in fs::read_dir(dir).unwrap() {
                let entry = entry.unwrap();
                match entry.file_type().unwrap().is_dir() {
                    true => waiting.push(entry.path()),
                    false => found.push((entry.metadata().unwrap().len(), entry.path())),
                }
            }
        }
        found.sort();
        found.pop().unwrap().1
    }

    fn faults(&self) -> usize {
        [self.layer, self.other]
            .iter()
            .map(|layer| self.layers.verify_layer(*layer, true, &()).len())
            .sum()
    }

    fn restore(&self) {
        let stream = stream(&FILES);
        let restored = self
            .layers
            .restore(self.layer, &*stream, &Expected::default(), &());
        assert_eq!(restored.unwrap(), self.layer);
    }

    /// Everything is as it should be, also to who opens the store anew, and nothing is left to be collected.
    fn assert_whole(self) {
        assert_eq!(self.faults(), 0);
        let store = self.reopen();
        assert_eq!(store.faults(), 0);
        for (layer, names) in [(store.layer, &FILES[..]), (store.other, &["a", "other"])] {
            let mut exported = Vec::new();
            store.layers.export(layer, &mut exported).unwrap();
            assert!(exported == stream(names));
        }
        let collected = store.layers.collect(false, &());
        assert!(collected.errors.is_empty(), "{:?}", collected.errors);
        assert_eq!(collected.orphans, []);
    }
}

fn flip(path: &Path, at: u64) {
    let file = File::options().read(true).write(true).open(path).unwrap();
    let mut byte = [0];
    file.read_exact_at(&mut byte, at).unwrap();
    file.write_all_at(&[byte[0] ^ 0x20], at).unwrap();
}

#[test]
fn every_kind_of_damage_is_made_good_by_the_stream() {
    type Break = fn(&Store);
    let breaks: [(&str, Break); 9] = [
        ("a byte of an object in a pack", |store| {
            flip(&store.file("packs"), 500);
        }),
        ("a byte of a large object", |store| {
            flip(&store.file("objects"), 500);
        }),
        ("a large object that is cut off", |store| {
            let file = File::options().write(true).open(store.file("objects"));
            file.unwrap().set_len(100).unwrap();
        }),
        ("a large object that is gone", |store| {
            fs::remove_file(store.file("objects")).unwrap();
        }),
        ("an index that is cut off", |store| {
            let file = File::options()
                .write(true)
                .open(store.layers.index_path(store.layer));
            file.unwrap().set_len(1500).unwrap();
        }),
        ("an index that is gone", |store| {
            fs::remove_file(store.layers.index_path(store.layer)).unwrap();
        }),
        ("a recipe that is gone", |store| {
            fs::remove_file(store.layers.recipe_path(store.layer)).unwrap();
        }),
        ("a pack that is gone", |store| {
            fs::remove_file(store.file("packs")).unwrap();
        }),
        ("an index and contents", |store| {
            flip(&store.layers.index_path(store.layer), 1100);
            flip(&store.file("packs"), 500);
            flip(&store.file("objects"), 500);
        }),
    ];
    for (what, damage) in breaks {
        for restart in [false, true] {
            let mut store = Store::new();
            damage(&store);
            if restart {
                store = store.reopen();
            }
            assert!(store.faults() > 0, "{what}");
            store.restore();
            assert_eq!(store.faults(), 0, "{what}");
            store.assert_whole();
        }
    }
}

fn cut(path: &Path, length: u64) {
    let file = File::options().write(true).open(path).unwrap();
    file.set_len(length).unwrap();
}

/// Bytes of `a` or `b` in a pack, with its header and padding.
const PACKED: u64 = 64 + 3200;
/// Where the table of their pack starts.
const TABLE: u64 = 64 + 2 * PACKED;

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
            let mended = store.layers.mend(&());
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
        let mended = store.layers.mend(&());
        assert!(mended.errors.is_empty(), "{:?}", mended.errors);
        assert_eq!(mended.packs, [""; 0].map(PathBuf::from), "{what}");
        // By where the view has it.
        assert_eq!(readable(), 1, "{what}");
        store.restore();
        assert_eq!(store.layers.mend(&()).packs, [pack], "{what}");
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
    assert_eq!(store.layers.mend(&()).packs, [pack]);
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
    let other = crate::store::pack::PackId([7; 16]);
    bytes[40..56].copy_from_slice(&other.0);
    let sum = crate::store::format::short_sum(&bytes[..56]);
    bytes[56..64].copy_from_slice(&sum);
    bytes[500] ^= 0x20;
    fs::write(store.layers.objects().pack_path(other), bytes).unwrap();
    flip(&pack, 3);
    let store = store.reopen();
    assert!(store.faults() > 0);
    assert_eq!(store.layers.mend(&()).packs, [pack]);
    store.assert_whole();
}

#[test]
fn a_bad_copy_that_has_to_stay_is_not_found_again() {
    // Whichever of the packs is read first.
    for _ in 0..8 {
        let store = Store::new();
        let pack = store.file("packs");
        let mut bytes = fs::read(&pack).unwrap();
        // A read-only compatible feature, which forbids to write it anew.
        bytes[24] = 1;
        let sum = crate::store::format::short_sum(&bytes[..56]);
        bytes[56..64].copy_from_slice(&sum);
        bytes[500] ^= 0x20;
        fs::write(&pack, &bytes).unwrap();
        assert!(store.faults() > 0);
        store.restore();
        assert!(fs::read(&pack).unwrap() == bytes);
        assert_eq!(store.faults(), 0);
        assert_eq!(store.reopen().faults(), 0);
    }
}

/// Sets a bit of a word of features in the header of a pack.
fn set_feature(pack: &Path, word: usize) {
    let mut bytes = fs::read(pack).unwrap();
    bytes[word] |= 4;
    let sum = crate::store::format::short_sum(&bytes[..56]);
    bytes[56..64].copy_from_slice(&sum);
    fs::write(pack, bytes).unwrap();
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
    let mended = store.layers.mend(&());
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
            pack: crate::store::pack::PackId::of_file(pack.file_name().unwrap().to_str().unwrap())
                .unwrap(),
            offset: 64,
            stored: 3200,
        };
        // By where a view has it.
        let refused = objects.read(&object, Some(place), false).unwrap_err();
        assert!(matches!(refused, Error::Unsupported { .. }), "{refused}");
        assert!(store.faults() > 0);
        assert!(store.layers.mend(&()).errors.is_empty());
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

#[test]
fn what_another_stream_has_is_not_taken_for_the_layer() {
    let store = Store::new();
    flip(&store.file("packs"), 500);
    let faults = store.faults();
    let other = stream(&["x"]);
    let restored = store
        .layers
        .restore(store.layer, &*other, &Expected::default(), &());
    assert_ne!(restored.unwrap(), store.layer);
    assert_eq!(store.faults(), faults);
    let broken = &stream(&FILES)[..5000];
    let restored = store
        .layers
        .restore(store.layer, broken, &Expected::default(), &());
    assert!(restored.is_err());
    assert_eq!(store.faults(), faults);
}

#[test]
fn what_another_layer_has_lost_stays_lost_and_nothing_else() {
    let tmp = tempfile::tempdir().unwrap();
    let layers = open(tmp.path());
    let import = |names: &[&str]| {
        let stream = stream(names);
        layers.import(&*stream, &Expected::default(), &()).unwrap()
    };
    // One pack of which both layers have a part.
    let first = import(&["a", "b", "c"]);
    let second = import(&["b", "d"]);
    let pack = layers.objects().all_packs().unwrap();
    let packs: Vec<_> = pack
        .iter()
        .map(|id| layers.objects().pack_path(*id))
        .collect();
    let large = packs
        .iter()
        .max_by_key(|path| fs::metadata(path).unwrap().len());
    // `a` and `b`, in whatever order they lie.
    for at in [200, 3500, 6800] {
        flip(large.unwrap(), at);
    }
    let faults = |layer| layers.verify_layer(layer, true, &()).len();
    assert_eq!((faults(first), faults(second)), (3, 1));
    let source = stream(&["b", "d"]);
    let restored = layers.restore(second, &*source, &Expected::default(), &());
    assert_eq!(restored.unwrap(), second);
    assert_eq!((faults(first), faults(second)), (2, 0));
    let source = stream(&["a", "b", "c"]);
    let restored = layers.restore(first, &*source, &Expected::default(), &());
    assert_eq!(restored.unwrap(), first);
    assert_eq!((faults(first), faults(second)), (0, 0));
}

#[test]
fn a_pack_with_a_damaged_header_loses_nothing_that_can_be_read() {
    let tmp = tempfile::tempdir().unwrap();
    let layers = open(tmp.path());
    let import = |names: &[&str]| {
        let stream = stream(names);
        layers.import(&*stream, &Expected::default(), &()).unwrap()
    };
    let first = import(&["a", "b", "c"]);
    let second = import(&["b"]);
    let place = layers.objects().find(&ObjectName::of(&content("b")));
    let Some(Place::Packed { pack, offset, .. }) = place.unwrap() else {
        panic!("it is in a pack");
    };
    let path = layers.objects().pack_path(pack);
    flip(&path, 3);
    flip(&path, offset + 500);
    let source = stream(&["b"]);
    let restored = layers.restore(second, &*source, &Expected::default(), &());
    assert_eq!(restored.unwrap(), second);
    assert!(!path.exists());
    drop(layers);
    let layers = open(tmp.path());
    for layer in [first, second] {
        assert!(layers.verify_layer(layer, true, &()).is_empty());
    }
}

#[test]
fn an_open_view_reads_what_was_restored() {
    let store = Store::new();
    let chain = [store.layer];
    let path = store
        .layers
        .view(&chain, Verify::First)
        .unwrap()
        .path()
        .to_owned();
    // As a plyfs opens it.
    let objects = Arc::new(Objects::new(store.dir.path()));
    let key = crate::store::ViewKey::of(&chain);
    let view = View::open(&path, key, objects, Verify::First).unwrap();
    let read = |name: &str| {
        let root = view.inode(View::ROOT).unwrap();
        let entry = view.lookup(&root, name.as_bytes()).unwrap().unwrap();
        let inode = view.inode(entry.inode).unwrap();
        let file = view.open_file(&inode)?;
        let mut bytes = vec![0; inode.size as usize];
        view.read_at(&file, &mut bytes, 0)?;
        Ok::<_, Error>(bytes)
    };
    for at in [500, 4000] {
        flip(&store.file("packs"), at);
    }
    flip(&store.file("objects"), 500);
    let broken = FILES.iter().filter(|name| read(name).is_err()).count();
    assert_eq!(broken, 3);
    store.restore();
    for name in FILES {
        assert!(read(name).unwrap() == content(name), "{name}");
    }
    store.assert_whole();
}

#[test]
fn a_damaged_view_is_dropped_and_a_damaged_record_made_anew() {
    let store = Store::new();
    let chain = [store.layer, store.other];
    let view = store.layers.view(&chain, Verify::First).unwrap();
    let path = view.path().to_owned();
    let sound = store.layers.mend(&());
    assert!(sound.views.is_empty() && sound.records.is_empty());
    flip(&path, 1024 + 60);
    let mended = store.layers.mend(&());
    assert_eq!(mended.views, std::slice::from_ref(&path));
    assert!(!path.exists());
    let again = store.layers.view(&chain, Verify::First).unwrap();
    again.verify().unwrap();
    drop((view, again));

    let was = store.layers.get(store.layer).unwrap();
    let record = store
        .dir
        .path()
        .join(format!("records/{}.record", store.layer));
    flip(&record, fs::metadata(&record).unwrap().len() / 2);
    let store = store.reopen();
    assert_eq!(store.layers.get(store.layer), None);
    assert!(!store.layers.is_whole(store.layer));
    let mended = store.layers.mend(&());
    assert_eq!(mended.records, [store.layer]);
    let expected = LayerRecord { blob: None, ..was };
    assert_eq!(store.layers.get(store.layer), Some(expected));
    assert!(store.layers.is_whole(store.layer));
    store.assert_whole();
}

#[test]
fn what_was_found_damaged_is_not_relied_on_any_more() {
    let store = Store::new();
    flip(&store.file("objects"), 500);
    // Nobody has read it.
    assert!(store.layers.is_whole(store.layer));
    struct Deaf;
    impl Observer for Deaf {}
    impl crate::store::verify::Told for Deaf {
        fn fault(&self, _fault: crate::store::verify::Fault) {}
        fn sum(&self, _layers: u64, _total: u64, _objects: u64, _bytes: u64) {}
    }
    store.layers.verify(true, &Deaf);
    assert!(!store.layers.is_whole(store.layer));
    store.restore();
    assert!(store.layers.is_whole(store.layer));
    fs::remove_file(store.layers.recipe_path(store.layer)).unwrap();
    assert!(!store.layers.is_whole(store.layer));
}

#[test]
fn the_blob_that_a_layer_came_as_first_is_the_one_that_is_known() {
    let store = Store::new();
    let was = store.layers.get(store.layer).unwrap();
    let compressed = zstd::encode_all(&*stream(&FILES), 1).unwrap();
    let restored = store
        .layers
        .restore(store.layer, &*compressed, &Expected::default(), &());
    assert_eq!(restored.unwrap(), store.layer);
    assert_eq!(store.layers.get(store.layer), Some(was));
    store.assert_whole();
}
