mod descriptors;
mod heal;
mod packs;
mod refresh;

use std::os::unix::fs::FileExt;
use std::path::Path;

use sha2::{Digest, Sha256};

use super::*;
use crate::store::format::ObjectName;
use crate::store::ingest::Settings;
use crate::store::object::{Objects, Place};
use crate::store::record::Record;

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

/// The view of the layer of `FILES`, as a plyfs opens it.
fn view_of(store: &Store, verify: Verify) -> View {
    let chain = [store.layer];
    let made = store.layers.view(&chain, verify).unwrap();
    let objects = Arc::new(Objects::new(store.dir.path()));
    View::open(made.path(), ViewKey::of(&chain), objects, verify).unwrap()
}

fn read(view: &View, name: &str) -> Result<Vec<u8>> {
    let root = view.inode(View::ROOT)?;
    let entry = view.lookup(&root, name.as_bytes())?.unwrap();
    let inode = view.inode(entry.inode)?;
    let file = view.open_file(&inode)?;
    let mut bytes = vec![0; inode.size as usize];
    view.read_at(&file, &mut bytes, 0)?;
    Ok(bytes)
}

#[test]
fn an_open_view_reads_what_was_restored() {
    let store = Store::new();
    let view = view_of(&store, Verify::First);
    let read = |name: &str| read(&view, name);
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
    let mend = |layers: &Layers| layers.mend(&HashMap::new(), &());
    let sound = mend(&store.layers);
    assert!(sound.views.is_empty() && sound.records.is_empty());
    // All of it is in one page, also of which layers it is.
    flip(&path, 1024 + 60);
    let mended = mend(&store.layers);
    let removed = MendedView {
        path: path.clone(),
        key: ViewKey::of(&chain),
        cure: ViewCure::Removed,
    };
    assert_eq!(mended.views, [removed]);
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
    let mended = mend(&store.layers);
    assert_eq!(mended.records, [store.layer]);
    let expected = LayerRecord { blob: None, ..was };
    assert_eq!(store.layers.get(store.layer), Some(expected));
    assert!(store.layers.is_whole(store.layer));
    store.assert_whole();
}

/// Whoever had it mounted had to mount it again.
#[test]
fn a_view_is_restored_below_those_who_have_it_open() {
    let store = Store::new();
    let names: Vec<String> = (0..300).map(|number| format!("file {number}")).collect();
    let names: Vec<&str> = names.iter().map(String::as_str).collect();
    let stream = stream(&names);
    let many = store
        .layers
        .import(&*stream, &Expected::default(), &())
        .unwrap();
    let chain = [store.layer, many];
    let path = store.layers.view(&chain, Verify::First).unwrap();
    let path = path.path().to_owned();
    let good = fs::read(&path).unwrap();
    let key = ViewKey::of(&chain);
    let chains = HashMap::from([(key, chain.to_vec())]);
    let open = || View::open_stored(&path, Verify::First).unwrap();
    let entries = |view: &View| {
        let root = view.inode(View::ROOT)?;
        let mut found = 0;
        while let Some(entry) = view.nth(&root, found)? {
            view.inode(entry.inode)?;
            found += 1;
        }
        Ok::<_, Error>(found)
    };
    // A page that neither opening nor the first look needs, two, and one that the view is found by.
    for damage in [&[9000][..], &[9000, 14_000], &[1030]] {
        let view = match damage {
            [1030] => None,
            _ => Some(open()),
        };
        damage.iter().for_each(|at| flip(&path, *at));
        if let Some(view) = &view {
            assert!(entries(view).is_err() && view.is_damaged());
        }
        let bad = store.layers.verify_views(&()).unwrap();
        assert_eq!(bad.len(), 1);
        assert_eq!((&bad[0].path, bad[0].key), (&path, key));
        assert!(
            bad[0]
                .error
                .problem()
                .contains("is damaged: the sum of its page")
        );
        let mended = store.layers.mend(&chains, &());
        assert_eq!(mended.views[0].cure, ViewCure::Restored);
        assert!(fs::read(&path).unwrap() == good);
        if let Some(view) = &view {
            assert_eq!(entries(view).unwrap(), 304);
            assert!(!view.is_damaged());
        }
    }
    // It was removed before its layer was mended by the same repair.
    let index = store.layers.index_path(many);
    let sound = fs::read(&index).unwrap();
    flip(&path, 9000);
    flip(&index, 9000);
    let mended = store.layers.mend_before_layers(&chains, &());
    assert_eq!(mended.views, []);
    fs::write(&index, sound).unwrap();
    let mended = store.layers.mend(&chains, &());
    assert_eq!(mended.views[0].cure, ViewCure::Restored);
    assert!(fs::read(&path).unwrap() == good);
    // Without its header nobody knows what it was.
    let view = open();
    flip(&path, 100);
    let mended = store.layers.mend(&chains, &());
    assert_eq!(mended.views[0].cure, ViewCure::RemovedBelow);
    // Whoever has it keeps a damaged one, which is found as long as it is so.
    let bad = store.layers.verify_views(&()).unwrap();
    assert_eq!((bad.len(), bad[0].key, bad[0].replaced), (1, key, true));
    drop(view);
    assert!(store.layers.verify_views(&()).unwrap().is_empty());
    let again = store.layers.view(&chain, Verify::First).unwrap();
    assert!(fs::read(again.path()).unwrap() == good);
}

/// A repair once made such a record from the index, which does not know the blob.
#[test]
fn a_record_of_which_all_is_known_is_written_as_it_was() {
    let store = Store::new();
    let record = |layer| store.dir.path().join(format!("records/{layer}.record"));
    let [of_layer, of_other] = [record(store.layer), record(store.other)];
    let good = [&of_layer, &of_other].map(|path| fs::read(path).unwrap());
    flip(&of_layer, 70);
    fs::remove_file(&of_other).unwrap();
    let damaged = store.layers.damaged_records().unwrap();
    let mut paths: Vec<_> = damaged.iter().map(|damaged| &damaged.path).collect();
    paths.sort();
    let mut expected = [&of_layer, &of_other];
    expected.sort();
    assert_eq!(paths, expected);
    assert!(damaged[0].to_string().ends_with(LayerRecord::REMEDY));
    assert!(!store.layers.is_whole(store.layer));
    let mended = store.layers.mend(&HashMap::new(), &());
    assert_eq!((mended.rewritten.len(), mended.records.len()), (2, 0));
    assert!(store.layers.damaged_records().unwrap().is_empty());
    for (path, good) in [&of_layer, &of_other].into_iter().zip(&good) {
        assert!(fs::read(path).unwrap() == *good);
    }
    // A layer that is removed takes its record with it, and a repair does not bring it back.
    store.layers.remove(store.other).unwrap();
    assert!(store.layers.damaged_records().unwrap().is_empty());
    store.layers.mend(&HashMap::new(), &());
    assert!(!of_other.exists());
}

#[test]
fn which_blob_a_layer_came_as_is_believed_once_it_was_read() {
    let mut store = Store::new();
    let blob = zstd::encode_all(&*stream(&FILES), 1).unwrap();
    let digest = format!("sha256:{:x}", Sha256::digest(&blob));
    let record = store
        .dir
        .path()
        .join(format!("records/{}.record", store.layer));
    flip(&record, 70);
    store = store.reopen();
    store.layers.mend(&HashMap::new(), &());
    let diff_id = store.layers.get(store.layer).unwrap().diff_id.unwrap();
    let without = [(store.layer, diff_id.clone())];
    assert_eq!(store.layers.without_blob(), without);
    let by_blob = |store: &Store| {
        store.layers.known(&Expected {
            blob: Some(&digest),
            diff_id: None,
        })
    };
    store.layers.claim_blob(store.layer, &digest).unwrap();
    // Also after a restart. Whoever asks for a blob must not get another's content on somebody's word.
    store = store.reopen();
    let claimed = store.layers.get(store.layer).unwrap();
    assert_eq!(claimed.blob.as_deref(), Some(&*digest));
    assert_eq!(
        (by_blob(&store), store.layers.without_blob()),
        (None, without.to_vec())
    );
    store
        .layers
        .claim_blob(store.layer, "sha256:other")
        .unwrap();
    assert_eq!(store.layers.get(store.layer), Some(claimed));

    let other = stream(&["x"]);
    assert!(!store.layers.learn_blob(store.layer, &*other, &()).unwrap());
    assert!(
        store
            .layers
            .learn_blob(store.layer, &blob[..900], &())
            .is_err()
    );
    assert_eq!(by_blob(&store), None);
    assert!(store.layers.learn_blob(store.layer, &*blob, &()).unwrap());
    assert_eq!(by_blob(&store), Some(store.layer));
    assert_eq!(store.layers.without_blob(), []);
    store = store.reopen();
    assert_eq!(by_blob(&store), Some(store.layer));
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

/// One content that was gone kept the whole chain from being mounted.
#[test]
fn a_chain_that_lacks_contents_is_mounted_without_them() {
    let store = Store::new();
    let pack = store.file("packs");
    fs::remove_file(&pack).unwrap();
    let store = store.reopen();
    let chain = [store.layer, store.other];
    let path = store.layers.view(&chain, Verify::First).unwrap();
    let view = View::open_stored(path.path(), Verify::First).unwrap();
    let read = |name: &str| {
        let root = view.inode(View::ROOT)?;
        let entry = view.lookup(&root, name.as_bytes())?.unwrap();
        let file = view.open_file(&view.inode(entry.inode)?)?;
        let mut bytes = vec![0; file.size() as usize];
        view.read_at(&file, &mut bytes, 0)?;
        Ok::<_, Error>(bytes)
    };
    for name in ["a", "b"] {
        let error = read(name).unwrap_err();
        let object = ObjectName::of(&content(name)).to_string();
        assert!(matches!(error, Error::Lost { .. }), "{error}");
        assert!(error.to_string().contains(&object), "{error}");
    }
    assert_eq!(view.damaged(), 2);
    for name in ["large one", "large two", "other"] {
        assert!(read(name).unwrap() == content(name), "{name}");
    }

    store.restore();
    for name in ["a", "b"] {
        assert!(read(name).unwrap() == content(name), "{name}");
    }
    assert_eq!(view.damaged(), 0);
    store.assert_whole();
}
