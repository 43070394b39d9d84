use std::collections::HashMap;
use std::path::Path;
use std::sync::atomic::{AtomicBool, Ordering};

use super::*;
use crate::store::format::ViewKey;
use crate::store::ingest::Settings;
use crate::store::layers::Expected;
use crate::store::repair::ViewCure;
use crate::store::verify::{Fault, Told};
use crate::store::view::{Verify, View};

fn open(dir: &Path) -> Layers {
    let settings = Settings {
        small: 4096,
        workers: 2,
        ..Settings::default()
    };
    let (layers, damaged) = Layers::open(dir, settings).unwrap();
    assert!(damaged.is_empty(), "{damaged:?}");
    layers
}

/// A layer of files whose contents are their names, `large` of them long ones.
fn layer(names: &[&str]) -> Vec<u8> {
    let mut builder = tar::Builder::new(Vec::new());
    for name in names {
        let times = if name.starts_with("large") { 1000 } else { 100 };
        // Nothing that a compression makes small.
        let content: Vec<u8> = (0..times)
            .flat_map(|number| *blake3::hash(format!("{name} {number}").as_bytes()).as_bytes())
            .collect();
        let mut header = tar::Header::new_ustar();
        header.set_size(content.len() as u64);
        header.set_mode(0o644);
        builder.append_data(&mut header, name, &*content).unwrap();
    }
    builder.into_inner().unwrap()
}

fn import(layers: &Layers, names: &[&str]) -> LayerName {
    let stream = layer(names);
    layers.import(&*stream, &Expected::default(), &()).unwrap()
}

fn files(dir: &Path) -> Vec<PathBuf> {
    let mut found = Vec::new();
    let mut waiting = vec![dir.to_owned()];
    while let Some(dir) = waiting.pop() {
        for entry in fs::read_dir(dir).unwrap() {
            let path = entry.unwrap().path();
            match path.is_dir() {
                true => waiting.push(path),
                false => found.push(path),
            }
        }
    }
    found.sort();
    found
}

fn collect(layers: &Layers) -> Vec<Reason> {
    let collected = layers.collect(false, &());
    assert!(collected.errors.is_empty(), "{:?}", collected.errors);
    collected
        .orphans
        .iter()
        .map(|orphan| orphan.reason)
        .collect()
}

/// Nothing of the layers is missing or damaged.
fn assert_sound(layers: &Layers) {
    struct Sound;
    impl Observer for Sound {}
    impl Told for Sound {
        fn fault(&self, fault: Fault) {
            panic!("{fault:?}");
        }
        fn sum(&self, _layers: u64, _total: u64, _objects: u64, _bytes: u64) {}
    }
    layers.verify(true, &Sound).unwrap();
    for (name, record) in layers.list() {
        let mut stream = Vec::new();
        layers.export(name, &mut stream).unwrap();
        assert_eq!(stream.len() as u64, record.tar_bytes);
    }
}

#[test]
fn what_no_layer_names_goes_and_nothing_else() {
    let tmp = tempfile::tempdir().unwrap();
    let layers = open(tmp.path());
    let first = import(&layers, &["a", "shared", "large one", "large shared"]);
    let second = import(&layers, &["b", "shared", "large two", "large shared"]);
    layers.view(&[first, second], Verify::First).unwrap();
    assert_eq!(collect(&layers), []);
    layers.remove(second).unwrap();
    let before = files(tmp.path());
    let dry = layers.collect(true, &());
    assert_eq!(files(tmp.path()), before);
    let reasons = collect(&layers);
    let dry: Vec<_> = dry.orphans.iter().map(|orphan| orphan.reason).collect();
    assert_eq!(reasons, dry);
    let expected = [
        Reason::ChainIsGone,
        Reason::NothingAlive,
        Reason::NoLayerNamesIt,
    ];
    assert_eq!(reasons, expected);
    assert_sound(&layers);
    assert_eq!(collect(&layers), []);
    layers.remove(first).unwrap();
    assert_eq!(collect(&layers).len(), 3);
    assert_eq!(files(tmp.path()), Vec::<PathBuf>::new());
}

/// Counts what goes between two looks at whether to go on.
struct Steps<'a> {
    dir: &'a Path,
    left: parking_lot::Mutex<Vec<usize>>,
}

impl Observer for Steps<'_> {
    fn cancelled(&self) -> bool {
        self.left.lock().push(files(self.dir).len());
        false
    }
}

#[test]
fn a_collection_goes_by_steps_of_a_pack_or_a_directory() {
    let tmp = tempfile::tempdir().unwrap();
    let layers = open(tmp.path());
    for layer in 0..5 {
        let names: Vec<_> = (0..40).map(|n| format!("large {layer} {n}")).collect();
        let names: Vec<_> = names.iter().map(String::as_str).chain(["small"]).collect();
        let name = import(&layers, &names);
        layers.remove(name).unwrap();
    }
    let dirs = fs::read_dir(tmp.path().join("objects")).unwrap();
    let of_dirs = dirs.map(|dir| files(&dir.unwrap().path()).len());
    let most = of_dirs.max().unwrap().max(1);
    let before = files(tmp.path()).len();
    assert!(before > 200 && most < 20, "{before} files, {most} in one");
    let steps = Steps {
        dir: tmp.path(),
        left: parking_lot::Mutex::new(vec![before]),
    };
    layers.collect(false, &steps);
    let mut left = steps.left.into_inner();
    left.push(files(tmp.path()).len());
    assert_eq!(left.last(), Some(&0));
    let largest = left.windows(2).map(|step| step[0] - step[1]).max();
    assert_eq!(largest, Some(most));
}

#[test]
fn what_comes_free_is_what_was_allocated() {
    let tmp = tempfile::tempdir().unwrap();
    let layers = open(tmp.path());
    let name = import(&layers, &["a", "large one"]);
    layers.view(&[name], Verify::First).unwrap();
    layers.remove(name).unwrap();
    let taken = || -> u64 {
        let files = files(tmp.path()).into_iter();
        files
            .map(|path| crate::store::own_bytes(&path).unwrap())
            .sum()
    };
    let before = taken();
    let dry = layers.collect(true, &()).bytes();
    let collected = layers.collect(false, &()).bytes();
    assert_eq!((dry, collected, taken()), (before, before, 0));
}

#[test]
fn a_pack_that_is_mostly_dead_is_written_anew_under_a_mounted_view() {
    let tmp = tempfile::tempdir().unwrap();
    let layers = open(tmp.path());
    let large = import(&layers, &["a", "b", "c", "kept"]);
    let small = import(&layers, &["kept"]);
    layers.view(&[small], Verify::Always).unwrap();
    let key = ViewKey::of(&[small]);
    let path = tmp.path().join("views").join(format!("{key}.view"));
    // As plyfs opens it, which learns nothing of what the collection does.
    let mounted = View::open_stored(&path, Verify::Always).unwrap();
    let read = || {
        let root = mounted.inode(View::ROOT).unwrap();
        let entry = mounted.lookup(&root, b"kept").unwrap().unwrap();
        let inode = mounted.inode(entry.inode).unwrap();
        let file = mounted.open_file(&inode)?;
        let mut content = vec![0; 5000];
        let count = file.read_at(&mut content, 0).unwrap();
        content.truncate(count);
        Ok::<_, Error>(content)
    };
    let content = read().unwrap();
    layers.remove(large).unwrap();
    assert_eq!(collect(&layers), [Reason::MostlyDead]);
    assert_eq!(read().unwrap(), content);
    // Once more: the places that it has read meanwhile are out of date again.
    let again = import(&layers, &["d", "e", "f", "kept"]);
    layers.remove(small).unwrap();
    layers.remove(again).unwrap();
    let last = import(&layers, &["kept"]);
    assert_eq!(last, small);
    collect(&layers);
    assert_eq!(read().unwrap(), content);
    assert_sound(&layers);
}

#[test]
fn what_is_mounted_stays_without_its_layers() {
    let tmp = tempfile::tempdir().unwrap();
    let layers = open(tmp.path());
    let names = ["a", "b", "large"];
    let name = import(&layers, &names);
    let path = layers
        .view(&[name], Verify::First)
        .unwrap()
        .path()
        .to_owned();
    // As plyfs opens it.
    let mounted = View::open_stored(&path, Verify::Always).unwrap();
    layers.remove(name).unwrap();
    for _ in 0..2 {
        assert_eq!(collect(&layers), []);
        for name in names {
            let root = mounted.inode(View::ROOT).unwrap();
            let entry = mounted.lookup(&root, name.as_bytes()).unwrap().unwrap();
            let inode = mounted.inode(entry.inode).unwrap();
            mounted.open_file(&inode).unwrap();
        }
    }
    drop(mounted);
    assert_eq!(collect(&layers).len(), 3);
    assert_eq!(files(tmp.path()), Vec::<PathBuf>::new());
}

/// A collection once took for unmounted what it could not read, and removed all that it names.
#[test]
fn what_is_mounted_stays_though_its_view_cannot_be_read() {
    let tmp = tempfile::tempdir().unwrap();
    let layers = open(tmp.path());
    let name = import(&layers, &["a", "large"]);
    let view = layers.view(&[name], Verify::First).unwrap();
    let path = view.path().to_owned();
    drop(view);
    let mounted = View::open_stored(&path, Verify::Always).unwrap();
    layers.remove(name).unwrap();
    let mut bytes = fs::read(&path).unwrap();
    // In the table of page sums.
    let last = bytes.len() - 1;
    bytes[last] ^= 1;
    fs::write(&path, bytes).unwrap();
    let before = files(tmp.path());
    for dry in [true, false] {
        let collected = layers.collect(dry, &());
        assert_eq!(collected.orphans, []);
        let told = collected.errors[0].to_string();
        let first = format!(
            "no content was collected, for nobody can tell what a view that is mounted needs: {} is damaged",
            path.display()
        );
        assert!(told.starts_with(&first), "{told}");
        assert_eq!(files(tmp.path()), before);
    }
    let told = layers.unreadable_mounted();
    assert!(matches!(&told[..], [Error::Damaged { path: told, .. }] if *told == path));
    drop(mounted);
    assert!(layers.unreadable_mounted().is_empty());
    assert_eq!(collect(&layers).len(), 3);
    assert_eq!(files(tmp.path()), Vec::<PathBuf>::new());
}

#[test]
fn no_object_is_removed_while_nobody_can_say_whether_a_view_is_mounted() {
    let tmp = tempfile::tempdir().unwrap();
    let layers = open(tmp.path());
    let name = import(&layers, &["a", "large"]);
    layers.remove(name).unwrap();
    let before = files(tmp.path());
    // What nobody can open to lock it.
    let strange = tmp.path().join("views/strange.view");
    fs::create_dir(&strange).unwrap();
    let collected = layers.collect(false, &());
    assert_eq!(collected.orphans, []);
    let told = collected.errors[0].to_string();
    assert!(told.contains(strange.to_str().unwrap()), "{told}");
    assert_eq!(files(tmp.path()), before);
    fs::remove_dir(&strange).unwrap();
    assert_eq!(collect(&layers).len(), 2);
}

/// A lock is bound to a file and not to its name: a view that was replaced, or removed to be built again, once passed for
/// unmounted.
#[test]
fn what_is_mounted_stays_though_another_view_has_taken_its_place() {
    let names: Vec<String> = (0..200).map(|number| format!("file {number}")).collect();
    let names: Vec<&str> = names.iter().map(String::as_str).collect();
    for mend in [true, false] {
        let tmp = tempfile::tempdir().unwrap();
        let layers = open(tmp.path());
        let name = import(&layers, &names);
        let chain = [name];
        let path = layers
            .view(&chain, Verify::First)
            .unwrap()
            .path()
            .to_owned();
        let mounted = View::open_stored(&path, Verify::Always).unwrap();
        let mut bytes = fs::read(&path).unwrap();
        // In the first page, which has inodes and is read by who opens the view; no object is named there.
        bytes[5000] ^= 1;
        fs::write(&path, bytes).unwrap();
        if mend {
            // Of this chain it has another page there, as if packs had been written anew since; so it cannot be restored.
            let chains = HashMap::from([(ViewKey::of(&chain), Vec::new())]);
            let mended = layers.mend(&chains, &());
            assert!(mended.errors.is_empty(), "{:?}", mended.errors);
            let views: Vec<_> = mended
                .views
                .iter()
                .map(|view| (&*view.path, view.cure))
                .collect();
            assert_eq!(views, [(&*path, ViewCure::RemovedBelow)]);
        }
        let anew = layers.view(&chain, Verify::First).unwrap();
        anew.verify().unwrap();
        let stored = || {
            let dirs = ["packs", "objects"];
            dirs.map(|dir| files(&tmp.path().join(dir)).len())
        };
        let before = stored();
        assert_eq!(collect(&layers), []);
        layers.remove(name).unwrap();
        // The one that nobody has mounted; without a repair the one that is mounted was written whole in its place.
        match mend {
            true => assert_eq!(collect(&layers), [Reason::ChainIsGone]),
            false => mounted.verify().unwrap(),
        }
        assert_eq!(collect(&layers), []);
        assert_eq!(stored(), before);
        drop(mounted);
        collect(&layers);
        assert_eq!(files(tmp.path()), Vec::<PathBuf>::new());
    }
}

#[test]
fn who_has_waited_for_a_view_that_is_gone_mounts_the_next() {
    let tmp = tempfile::tempdir().unwrap();
    let layers = open(tmp.path());
    let name = import(&layers, &["a"]);
    let chain = [name];
    let path = layers
        .view(&chain, Verify::First)
        .unwrap()
        .path()
        .to_owned();
    let unused = view::claim(&path).unwrap().unwrap();
    std::thread::scope(|scope| {
        let mounting = scope.spawn(|| View::open_stored(&path, Verify::Always).unwrap());
        // Time to open it and to wait for the lock; without that nothing is told.
        std::thread::sleep(std::time::Duration::from_millis(200));
        let next = tmp.path().join("tmp/next");
        fs::copy(&path, &next).unwrap();
        fs::rename(&next, &path).unwrap();
        drop(unused);
        let mounted = mounting.join().unwrap();
        assert!(view::claim(&path).unwrap().is_none());
        drop(mounted);
        assert!(view::claim(&path).unwrap().is_some());
    });
}

#[test]
fn of_a_pack_that_is_there_twice_after_a_crash_one_goes() {
    let tmp = tempfile::tempdir().unwrap();
    let layers = open(tmp.path());
    let large = import(&layers, &["a", "b", "c", "kept"]);
    import(&layers, &["kept"]);
    layers.remove(large).unwrap();
    let packs = tmp.path().join("packs");
    let old = files(&packs).remove(0);
    let saved = fs::read(&old).unwrap();
    collect(&layers);
    // Killed before the old one was removed.
    fs::write(&old, saved).unwrap();
    drop(layers);
    let layers = open(tmp.path());
    assert_eq!(files(&packs).len(), 2);
    collect(&layers);
    assert_eq!(files(&packs).len(), 1);
    assert_sound(&layers);
}

#[test]
fn a_pack_with_unknown_features_is_not_written_anew() {
    let tmp = tempfile::tempdir().unwrap();
    let layers = open(tmp.path());
    let large = import(&layers, &["a", "b", "c", "kept"]);
    import(&layers, &["kept"]);
    layers.remove(large).unwrap();
    let pack = files(&tmp.path().join("packs")).remove(0);
    let mut bytes = fs::read(&pack).unwrap();
    // A read-only compatible one.
    bytes[24] = 1;
    let sum = crate::store::format::short_sum(&bytes[..56]);
    bytes[56..64].copy_from_slice(&sum);
    fs::write(&pack, bytes).unwrap();
    assert_eq!(collect(&layers), []);
    assert_sound(&layers);
}

/// An import once relied on what was known of files that somebody had removed, and its layer could not be read.
#[test]
fn what_is_gone_without_a_collection_comes_with_the_next_import() {
    let tmp = tempfile::tempdir().unwrap();
    let layers = open(tmp.path());
    let names = ["a", "b", "large"];
    let lost = import(&layers, &names);
    for dir in ["packs", "objects"] {
        for path in files(&tmp.path().join(dir)) {
            fs::remove_file(path).unwrap();
        }
    }
    layers.remove(lost).unwrap();
    assert_eq!(collect(&layers), []);
    import(&layers, &names);
    assert_sound(&layers);
}

#[test]
fn without_an_index_no_object_is_removed() {
    let tmp = tempfile::tempdir().unwrap();
    let layers = open(tmp.path());
    let damaged = import(&layers, &["a", "large one"]);
    let removed = import(&layers, &["b", "large two"]);
    layers.remove(removed).unwrap();
    let index = tmp.path().join("layers").join(format!("{damaged}.index"));
    let sound = fs::read(&index).unwrap();
    fs::write(&index, &sound[..sound.len() / 2]).unwrap();
    let before = files(tmp.path());
    // Nobody was told that nothing could go.
    let refused = |what: &str| {
        let collected = layers.collect(false, &());
        let [error] = &collected.errors[..] else {
            panic!("{:?}", collected.errors);
        };
        let told = error.to_string();
        let first = format!(
            "no content was collected, for nobody can tell what the layer {damaged} needs: "
        );
        assert!(
            told.starts_with(&first)
                && told.contains(what)
                && told.contains("`snapctl system repair`"),
            "{told}"
        );
    };
    refused("is damaged");
    assert_eq!(files(tmp.path()), before);
    fs::remove_file(&index).unwrap();
    refused("No such file");
    fs::write(&index, sound).unwrap();
    assert_eq!(collect(&layers).len(), 2);
    assert_sound(&layers);
}

#[test]
fn damage_is_told_with_its_layer_and_path() {
    use parking_lot::Mutex;

    #[derive(Default)]
    struct Noted(Mutex<Vec<Fault>>);
    impl Observer for Noted {}
    impl Told for Noted {
        fn fault(&self, fault: Fault) {
            self.0.lock().push(fault);
        }
        fn sum(&self, _layers: u64, _total: u64, _objects: u64, _bytes: u64) {}
    }
    let tmp = tempfile::tempdir().unwrap();
    let layers = open(tmp.path());
    let first = import(&layers, &["a", "large"]);
    let second = import(&layers, &["large", "b"]);
    let faults = |deep| {
        let noted = Noted::default();
        layers.verify(deep, &noted).unwrap();
        let mut all = noted.0.into_inner();
        all.sort_by_key(|fault| fault.layer != Some(first));
        all
    };
    assert!(faults(true).is_empty());
    let object = files(&tmp.path().join("objects")).remove(0);
    let mut content = fs::read(&object).unwrap();
    content[7] ^= 1;
    fs::write(&object, content).unwrap();
    assert!(faults(false).is_empty());
    let found = faults(true);
    assert_eq!(found.len(), 2);
    for (fault, layer) in found.iter().zip([first, second]) {
        assert_eq!(
            (fault.layer, fault.path.as_deref()),
            (Some(layer), Some("/large"))
        );
        let name = object.file_name().unwrap().to_str().unwrap();
        assert!(fault.error.to_string().contains(name));
    }
    let recipe = tmp.path().join("layers").join(format!("{second}.tar"));
    fs::write(&recipe, b"cut").unwrap();
    // What is known to be damaged is read.
    let mut found = faults(false);
    found.retain(|fault| fault.path.as_deref() != Some("/large"));
    assert_eq!(faults(false).len(), found.len() + 2);
    assert_eq!(found.len(), 1);
    assert_eq!(
        (found[0].layer, found[0].path.as_deref()),
        (Some(second), None)
    );
}

/// Imports, removals and collections at once: what is recorded is whole at any time.
#[test]
fn layers_come_and_go_while_it_is_collected() {
    let tmp = tempfile::tempdir().unwrap();
    let layers = open(tmp.path());
    let done = AtomicBool::new(false);
    std::thread::scope(|scope| {
        let collector = scope.spawn(|| {
            let mut rounds = 0;
            while !done.load(Ordering::Acquire) || rounds < 10 {
                collect(&layers);
                rounds += 1;
            }
        });
        let importers: Vec<_> = (0..3)
            .map(|number| {
                let layers = &layers;
                scope.spawn(move || {
                    for round in 0..25 {
                        let own = format!("own {number} {round}");
                        let large = format!("large {}", round % 3);
                        // The same contents are found, brought and given up by all of them.
                        let names = [&*own, "shared", "large shared", &large];
                        let name = import(layers, &names);
                        let mut stream = Vec::new();
                        layers.export(name, &mut stream).unwrap();
                        assert_eq!(stream, layer(&names));
                        layers.remove(name).unwrap();
                    }
                })
            })
            .collect();
        let ended: Vec<_> = importers
            .into_iter()
            .map(|importer| importer.join())
            .collect();
        // Before anybody fails: the collector waits for it.
        done.store(true, Ordering::Release);
        collector.join().unwrap();
        assert!(ended.iter().all(Result::is_ok));
    });
    collect(&layers);
    assert_eq!(files(tmp.path()), Vec::<PathBuf>::new());
}
