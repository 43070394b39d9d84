//! Contents that come with other layers, or are put back.

use std::sync::atomic::AtomicU64;

use super::*;
use crate::store::format::tables::Object;

fn name_of(file: &str) -> ObjectName {
    ObjectName::of(&content(file))
}

/// Damages `a`, which two layers have, `b` and a large content, and finds that out.
fn damaged() -> Store {
    let store = Store::new();
    for at in [200, 3500] {
        flip(&store.file("packs"), at);
    }
    flip(&store.file("objects"), 200);
    assert_eq!(store.faults(), 4);
    store
}

fn import(store: &Store, stream: &[u8]) -> Result<LayerName> {
    store.layers.import(stream, &Expected::default(), &())
}

#[test]
fn an_import_brings_damaged_contents_for_all_layers() {
    let store = damaged();
    assert_eq!(store.layers.doubted().len(), 2);
    let new = import(&store, &stream(&["a", "b", "large one", "large two"])).unwrap();
    // Nothing has looked at them since.
    assert_eq!(store.layers.doubted().len(), 0);
    assert!(store.layers.take_mended());
    assert_eq!(store.faults(), 0);
    assert!(store.layers.verify_layer(new, true, &()).is_empty());
    store.assert_whole();
}

/// What it did not trust would be lost, though maybe it can be read another time.
#[test]
fn an_import_that_fails_leaves_damaged_contents_where_they_were() {
    let store = damaged();
    let all = stream(&["a", "new"]);
    let place = || store.layers.objects().find(&name_of("a")).unwrap();
    let before = place();
    assert!(before.is_some());
    assert!(import(&store, &all[..all.len() / 2]).is_err());
    assert_eq!(place(), before);
    assert_eq!(store.faults(), 4);
    import(&store, &all).unwrap();
    assert_ne!(place(), before);
    assert_eq!(store.faults(), 2);
}

/// A layer that is made of entries may name what is damaged: it has no other copy of it.
#[test]
fn a_damaged_content_can_be_named() {
    let store = damaged();
    let object = Object {
        name: name_of("a"),
        size: content("a").len() as u64,
    };
    let made = store.layers.make(|layer| layer.known(object).map(drop));
    made.unwrap();
}

#[test]
fn contents_come_out_of_any_stream() {
    let store = damaged();
    let layers = &store.layers;
    let mut lacking = layers.lacking([store.layer, store.other]);
    assert_eq!(lacking.len(), 3);
    let mut pick = |names: &[&str], cut: usize| {
        let stream = stream(names);
        let picked = layers.pick(&stream[..stream.len() - cut], &mut lacking, &());
        (picked.is_ok(), lacking.len())
    };
    assert_eq!(pick(&["b", "c", "large three"], 0), (true, 2));
    // What is cut off itself is none.
    assert_eq!(pick(&["x", "a"], 3000), (false, 2));
    // It was thrown away with the rest of the stream.
    assert_eq!(pick(&["x", "a", "y"], 5000), (false, 1));
    assert_eq!(pick(&["x", "a", "large three"], 0), (true, 1));
    assert_eq!(pick(&["large one", "a", "large two"], 5000), (true, 0));
    // Nothing else was kept.
    store.assert_whole();
}

/// The same bytes again and again.
struct Again<'a> {
    bytes: Vec<u8>,
    /// How many were read.
    count: &'a AtomicU64,
}

impl Read for Again<'_> {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        let at = self.count.load(Ordering::Relaxed) as usize % self.bytes.len();
        let count = (&self.bytes[at..]).read(buffer)?;
        self.count.fetch_add(count as u64, Ordering::Relaxed);
        Ok(count)
    }
}

#[test]
fn of_a_stream_no_more_is_read_than_what_is_lacking() {
    const MOST: u64 = 2 << 30;
    let store = damaged();
    let mut lacking = store.layers.lacking([store.layer, store.other]);
    let names = ["a", "b", "large one", "large two", "x"];
    let without_end = |names: &[&str]| {
        let mut stream = stream(names);
        stream.truncate(stream.len() - 1024);
        stream
    };
    let count = AtomicU64::new(0);
    let again = Again {
        bytes: without_end(&["large three"]),
        count: &count,
    };
    let wanted = without_end(&names);
    let stream = wanted.as_slice().chain(again.take(MOST));
    store.layers.pick(stream, &mut lacking, &()).unwrap();
    assert!(lacking.is_empty());
    assert!(count.into_inner() < MOST / 2);
    store.assert_whole();
}

/// A store that has lost its pack and its file; their places, and where they are.
fn with_contents_away() -> (Store, [(PathBuf, PathBuf); 2]) {
    let store = Store::new();
    let away = ["packs", "objects"].map(|dir| {
        let path = store.file(dir);
        let away = path.with_extension("away");
        fs::rename(&path, &away).unwrap();
        (path, away)
    });
    (store.reopen(), away)
}

#[test]
fn what_is_put_back_is_found() {
    let (store, away) = with_contents_away();
    let none = store.layers.take_put_back().unwrap();
    assert!(none.packs.is_empty() && none.files == 0);
    assert_eq!(store.faults(), 4);
    // One of them has come in another way meanwhile.
    import(&store, &stream(&["b"])).unwrap();
    let b = store.layers.objects().find(&name_of("b")).unwrap();
    for (path, away) in &away {
        fs::rename(away, path).unwrap();
    }
    assert!(store.layers.take_mended());
    let found = store.layers.take_put_back().unwrap();
    assert_eq!((found.packs, found.files), (vec![away[0].0.clone()], 1));
    assert!(store.layers.take_mended());
    assert_eq!(store.layers.objects().find(&name_of("b")).unwrap(), b);
    assert_eq!(store.layers.doubted().len(), 0);
    assert_eq!(store.faults(), 0);
    let again = store.layers.take_put_back().unwrap();
    assert!(again.packs.is_empty() && again.files == 0);
    assert_eq!(store.reopen().faults(), 0);
}

/// Copies that were not what had been lost took the doubt away with them, though nobody had read them: the next image was
/// loaded on them.
#[test]
fn what_is_put_back_is_read_before_anybody_relies_on_it() {
    let (store, away) = with_contents_away();
    let look = |store: &Store| {
        let layers = [store.layer, store.other];
        let faults = |layer| store.layers.verify_layer(layer, false, &()).len();
        layers.map(faults).into_iter().sum::<usize>()
    };
    assert_eq!(look(&store), 4);
    for at in [200, 3500] {
        flip(&away[0].1, at);
    }
    flip(&away[1].1, 200);
    for (path, away) in &away {
        fs::rename(away, path).unwrap();
    }
    let found = store.layers.take_put_back().unwrap();
    assert_eq!((found.packs.len(), found.files), (1, 1));
    // They are there, but not what they were.
    assert_eq!(look(&store), 4);
    assert!(!store.layers.is_whole(store.layer));
    let new = import(&store, &stream(&["a", "b", "large one"])).unwrap();
    assert!(store.layers.verify_layer(new, true, &()).is_empty());
    assert_eq!(store.faults(), 0);
}
