//! What is compared at the paths of a layer is all that there is.

use std::cell::Cell;
use std::path::Path;

use proptest::prelude::*;
use proptest::test_runner::TestRunner;
use tar::EntryType;

use super::*;
use crate::snapshotter::diff::ordered;
use crate::store::LayerName;
use crate::store::ingest::Settings;
use crate::store::layers::{Expected, Layers};
use crate::store::view::Verify;

/// A tar stream that is written entry by entry.
struct Stream(tar::Builder<Vec<u8>>);

impl Stream {
    fn new() -> Self {
        Self(tar::Builder::new(Vec::new()))
    }

    fn entry(mut self, kind: EntryType, path: &str, target: &str, mode: u32) -> Self {
        let mut header = tar::Header::new_gnu();
        header.set_entry_type(kind);
        header.set_mode(mode);
        header.set_size(0);
        match kind {
            EntryType::Link | EntryType::Symlink => {
                self.0.append_link(&mut header, path, target).unwrap();
            }
            _ => self.0.append_data(&mut header, path, &[][..]).unwrap(),
        }
        self
    }

    fn file(self, path: &str) -> Self {
        self.entry(EntryType::Regular, path, "", 0o644)
    }

    fn dir(self, path: &str) -> Self {
        self.entry(EntryType::Directory, path, "", 0o755)
    }

    fn symlink(self, path: &str, target: &str) -> Self {
        self.entry(EntryType::Symlink, path, target, 0o777)
    }

    fn hard(self, path: &str, target: &str, mode: u32) -> Self {
        self.entry(EntryType::Link, path, target, mode)
    }

    /// With an attribute of the next entry.
    fn xattr(mut self, value: &str) -> Self {
        let pax = [("SCHILY.xattr.user.name", value.as_bytes())];
        self.0.append_pax_extensions(pax).unwrap();
        self
    }
}

struct Store {
    _dir: tempfile::TempDir,
    layers: Layers,
    chain: Vec<LayerName>,
}

impl Store {
    fn new() -> Self {
        let dir = tempfile::tempdir().unwrap();
        let (layers, _) = Layers::open(dir.path(), Settings::default()).unwrap();
        Self {
            _dir: dir,
            layers,
            chain: Vec::new(),
        }
    }

    /// Puts a layer on top, unless it cannot lie there.
    fn put(&mut self, stream: Stream) -> bool {
        let stream = stream.0.into_inner().unwrap();
        let imported = self.layers.import(&*stream, &Expected::default(), &());
        let Ok(layer) = imported else {
            return false;
        };
        self.chain.push(layer);
        let fits = self.layers.check(&self.chain).is_ok();
        if !fits {
            self.chain.pop();
        }
        fits
    }

    /// What the topmost layer changes, as both ways have it; the first if it can be used.
    fn both(&self) -> (Option<Vec<Change>>, Vec<Change>) {
        let (top, below) = self.chain.split_last().unwrap();
        let view = |chain| self.layers.view(chain, Verify::First).unwrap();
        let new = view(&self.chain);
        let old = (!below.is_empty()).then(|| view(below));
        let views = Views {
            new: &new,
            old: old.as_ref(),
            topmost: below.len() as u16,
        };
        let index = self.layers.index(*top).unwrap();
        let at_paths = views.at_paths_of(&index).unwrap();
        (at_paths.map(ordered), ordered(views.everywhere().unwrap()))
    }
}

const PATHS: [&str; 14] = [
    "a", "b", "c", "a/a", "a/b", "a/c", "b/a", "b/b", "c/a", "a/a/a", "a/a/b", "a/b/a", "b/a/b",
    "a/a/a/a",
];
const TARGETS: [&str; 6] = ["a", "/b", "c", "../a/b", "a/a", "b/a"];

/// Names of three files.
const LINKED: [&str; 6] = ["a/a/b", "b/a/b", "a/b/a", "c/a", "b/b", "a/c"];

/// The entry that these numbers choose.
type Entry = (u8, u8, u8);

/// Adds an entry. Only the last choices lead somewhere else than where it says.
fn add(stream: Stream, (what, path, other): Entry, choices: u8) -> Stream {
    let path = PATHS[usize::from(path) % PATHS.len()];
    let mode = 0o600 | u32::from(other % 2);
    let other = usize::from(other / 2);
    let (above, name) = path.rsplit_once('/').unwrap_or((".", path));
    match what % choices {
        0..4 => stream.entry(EntryType::Regular, path, "", mode),
        4 => stream.xattr(["1", "2"][other % 2]).dir(path),
        5..9 => stream.entry(EntryType::Directory, path, "", mode),
        9..12 => stream.file(&format!("{above}/.wh.{name}")),
        12 => stream.file(&format!("{path}/.wh..wh..opq")),
        13 => stream.file(path).hard(&format!("{path}-link"), path, mode),
        14 => stream.entry(EntryType::Fifo, path, "", mode),
        15 => stream.hard(&format!("{path}-link"), LINKED[other % 6], mode),
        16 => stream.hard(path, LINKED[other % 6], mode),
        _ => stream.symlink(path, TARGETS[other % TARGETS.len()]),
    }
}

#[test]
fn what_is_told_of_the_paths_of_a_layer_is_what_is_told_of_all() {
    let config = ProptestConfig {
        cases: 120,
        failure_persistence: None,
        ..ProptestConfig::default()
    };
    let entries = proptest::collection::vec(any::<Entry>(), 1..10);
    let layers = proptest::collection::vec((entries, 15..20u8), 1..5);
    let counts = Cell::new((0, 0));
    let ran = TestRunner::new(config).run(&layers, |layers| {
        let mut store = Store::new();
        let base = LINKED.chunks(2).fold(Stream::new(), |stream, names| {
            let file = stream.entry(EntryType::Regular, names[0], "", 0o600);
            file.hard(names[1], names[0], 0o600)
        });
        assert!(store.put(base));
        for (entries, choices) in layers {
            let of = |choices| {
                let entries = entries.iter();
                entries.fold(Stream::new(), |stream, entry| add(stream, *entry, choices))
            };
            // Without links, where one of them leads nowhere.
            if !store.put(of(choices)) && !store.put(of(15)) {
                continue;
            }
            if let (Some(at_paths), everywhere) = store.both() {
                let (used, changed) = counts.get();
                counts.set((used + 1, changed + everywhere.len()));
                prop_assert_eq!(at_paths, everywhere);
            }
        }
        Ok(())
    });
    ran.unwrap();
    // Otherwise this would say little.
    let (used, changed) = counts.get();
    assert!(used > 50 && changed > 2 * used, "{used} {changed}");
}

/// Of each of these, more changes than the layer has paths.
#[test]
fn what_reaches_beyond_the_paths_of_a_layer_is_compared_whole() {
    let base = || {
        Stream::new()
            .file("usr/bin/old")
            .symlink("bin", "usr/bin")
            .file("one")
            .hard("two", "one", 0o644)
            .file("dir/inside")
    };
    let tops = [
        Stream::new().file("bin/.wh.old"),
        Stream::new().file("bin/.wh..wh..opq"),
        Stream::new().hard("three", "one", 0o600),
        Stream::new().hard("three", "one", 0o600).file(".wh.three"),
        Stream::new().hard("three", "one", 0o600).file("one"),
        Stream::new()
            .symlink("to", "dir")
            .file("to/.wh.inside")
            .file(".wh.to")
            .dir("to"),
        Stream::new().file(".wh..wh..opq").file("dir/new"),
    ];
    for (number, top) in tops.into_iter().enumerate() {
        let mut store = Store::new();
        assert!(store.put(base()) && store.put(top), "{number}");
        let (at_paths, everywhere) = store.both();
        assert!(!everywhere.is_empty());
        // The root's marker is at a path of the layer.
        let expected = (number == 6).then_some(everywhere);
        assert_eq!(at_paths, expected, "{number}");
    }
}

#[test]
fn a_directory_that_was_removed_and_made_again_has_lost_what_was_in_it() {
    let mut store = Store::new();
    let base = Stream::new()
        .file("dir/deep/one")
        .file("dir/two")
        .dir("dir/three");
    assert!(store.put(base));
    let top = Stream::new()
        .file(".wh.dir")
        .file("dir/two")
        .dir("dir/deep");
    assert!(store.put(top));
    let (at_paths, everywhere) = store.both();
    assert_eq!(at_paths.as_ref(), Some(&everywhere));
    let told = everywhere.iter().map(|change| (&*change.path, change.kind));
    use ChangeKind::{Deleted, Modified};
    let expected = [
        ("/dir/deep/one", Deleted),
        ("/dir/three", Deleted),
        ("/dir/two", Modified),
    ];
    let expected = expected.map(|(path, kind)| (Path::new(path), kind));
    assert!(
        expected
            .iter()
            .all(|change| told.clone().any(|told| told == *change))
    );
}
