//! Indexes of layers and merged views.
//!
//! A damaged byte is found by a sum, and then the file is named, or the byte means nothing. What is forged has its sums made anew, so that
//! it comes to what is behind them; then only panics, hangs and great appetites are wrong.

use std::fs;
use std::io;
use std::sync::Mutex;

use plywood::store::LayerName;
use plywood::store::ingest::Observer;
use plywood::store::layer::index::LayerIndex;
use plywood::store::layers::{LayerRecord, Layers};
use plywood::store::record::RecordDir;
use plywood::store::verify::{Fault, Told};
use plywood::store::view::{Verify, View};

use super::engine::Choices;
use super::seeds::{PutBack, Store, assert_names, read_index, read_view};

const HEADER: usize = 1024;
const SECTIONS_AT: usize = 128;
const SUM_AT: usize = HEADER - 32;
const PAGE: usize = 4096;

/// Notes what a verification finds.
#[derive(Default)]
pub struct Faults(pub Mutex<Vec<String>>);

impl Observer for Faults {}

impl Told for Faults {
    fn fault(&self, fault: Fault) {
        let Fault { layer, path, error } = fault;
        self.0
            .lock()
            .unwrap()
            .push(format!("{layer:?} {path:?} {error}"));
    }

    fn sum(&self, _layers: u64, _total: u64, _objects: u64, _bytes: u64) {}
}

fn number(bytes: &[u8], at: usize, width: usize) -> u64 {
    let mut word = [0; 8];
    word[..width].copy_from_slice(&bytes[at..at + width]);
    u64::from_le_bytes(word)
}

/// Changes some numbers of a sound file.
fn forge(bytes: &mut [u8], choices: &mut Choices<'_>) {
    let count = number(bytes, 10, 2) as usize;
    for _ in 0..1 + choices.below(4) {
        if choices.once_in(12) {
            // The header: counts, places and lengths.
            let at = choices.one_of(&[8, 10, 12, 16, 24, 32, 40, 48, 56, 96]);
            put(bytes, at, 1 << choices.below(4), choices.number());
            continue;
        }
        let slot = SECTIONS_AT + 32 * choices.below(count);
        if choices.once_in(12) {
            let field = slot + choices.one_of(&[0, 4, 8, 16, 24]);
            put(bytes, field, 4, choices.number());
            continue;
        }
        let (record, start) = (number(bytes, slot + 4, 4), number(bytes, slot + 8, 8));
        let length = number(bytes, slot + 16, 8);
        let (record, start, length) = (record as usize, start as usize, length as usize);
        if record == 0 || length < record || start + length > bytes.len() {
            continue;
        }
        let records = length / record;
        let of = |choices: &mut Choices<'_>| start + record * choices.below(records);
        let (from, to) = (of(choices), of(choices));
        let width = 1 << choices.below(4);
        let field = choices.below(record) / width * width;
        match choices.below(4) {
            // Another record in its place.
            0 => bytes.copy_within(from..from + record, to),
            // A number of another record in place of its own.
            1 if field + width <= record => {
                bytes.copy_within(from + field..from + field + width, to + field);
            }
            // A little more or less.
            2 if field + width <= record => {
                let was = number(bytes, to + field, width);
                put(
                    bytes,
                    to + field,
                    width,
                    was.wrapping_add(choices.number() % 5).wrapping_sub(2),
                );
            }
            _ => put(bytes, to + field, width, choices.number()),
        }
    }
    make_sound(bytes);
}

fn put(bytes: &mut [u8], at: usize, width: usize, value: u64) {
    if let Some(field) = bytes.get_mut(at..at + width) {
        field.copy_from_slice(&value.to_le_bytes()[..width]);
    }
}

/// Makes the sums anew.
fn make_sound(bytes: &mut [u8]) {
    let end = number(bytes, 48, 8) as usize;
    if end >= HEADER && end <= bytes.len() {
        let (pages, sums) = bytes.split_at_mut(end);
        for (page, sum) in pages[HEADER..].chunks(PAGE).zip(sums.chunks_mut(32)) {
            let made = blake3::hash(page);
            sum.copy_from_slice(&made.as_bytes()[..sum.len()]);
        }
        let sum = *blake3::hash(sums).as_bytes();
        bytes[64..96].copy_from_slice(&sum);
    }
    let sum = *blake3::hash(&bytes[..SUM_AT]).as_bytes();
    bytes[SUM_AT..HEADER].copy_from_slice(&sum);
}

/// Changes a sound file as a disk does.
pub fn damage(bytes: &mut Vec<u8>, choices: &mut Choices<'_>) {
    match choices.below(6) {
        0 => bytes.truncate(choices.below(bytes.len())),
        1 => {
            let at = choices.below(bytes.len());
            let end = bytes.len().min(at + 512);
            bytes[at..end].fill(0);
        }
        2 => bytes.extend(choices.bytes(100)),
        _ => {
            let at = choices.below(bytes.len());
            bytes[at] ^= 1 << choices.below(8);
        }
    }
}

/// The index of a layer, and all that is made of it: views, exports, verification, collection.
pub struct Index {
    store: Store,
    /// Of each layer its record, what is in its index, and what is read of that.
    layers: Vec<(LayerRecord, Vec<u8>, String)>,
}

impl Index {
    pub fn new() -> Self {
        let store = Store::new();
        let open = store.open();
        let layers = store.chain.iter().map(|name| {
            let bytes = fs::read(path(&store, *name)).unwrap();
            let seen = read_index(&open.index(*name).unwrap()).unwrap();
            (open.get(*name).unwrap(), bytes, seen)
        });
        let layers = layers.collect();
        Self { store, layers }
    }

    pub fn case(&self, choices: &mut Choices<'_>) {
        let which = choices.below(self.layers.len());
        let (record, good, seen) = &self.layers[which];
        let name = self.store.chain[which];
        let mut bytes = good.clone();
        if choices.once_in(4) {
            damage(&mut bytes, choices);
            let path = path(&self.store, name);
            let _put_back = PutBack::after(&path, &bytes);
            match LayerIndex::open(&path, name).and_then(|index| read_index(&index)) {
                Ok(now) => assert!(now == *seen, "wrong data"),
                Err(error) => assert_names(&error, &path),
            }
            return;
        }
        forge(&mut bytes, choices);
        let mut sum = [0; 32];
        sum.copy_from_slice(&bytes[SUM_AT..HEADER]);
        self.forged(which, LayerName(sum), &bytes, record, choices);
    }

    fn forged(
        &self,
        which: usize,
        name: LayerName,
        bytes: &[u8],
        record: &LayerRecord,
        choices: &mut Choices<'_>,
    ) {
        let store = &self.store;
        if store.chain.contains(&name) {
            // Nothing was changed.
            return;
        }
        fs::write(path(store, name), bytes).unwrap();
        let recipe = |name| store.path().join("layers").join(format!("{name}.tar"));
        fs::copy(recipe(store.chain[which]), recipe(name)).unwrap();
        let records = RecordDir::<LayerRecord>::open(&store.path().join("records")).unwrap();
        records.put(&name.to_string(), record).unwrap();

        let layers = store.open();
        let read = layers.index(name).and_then(|index| read_index(&index));
        let mut chain = store.chain.clone();
        chain[which] = name;
        self.all_that_is_made_of_it(&layers, name, &chain);
        if choices.once_in(8) {
            layers.verify(true, &Faults::default()).unwrap();
        }
        // A file that nobody can open keeps a collection from removing anything.
        let collected = layers.collect(true, &());
        assert!(
            read.is_err() || collected.errors.is_empty(),
            "{:?}",
            collected.errors
        );
        layers.remove(name).unwrap();
        layers.collect(false, &());
    }

    fn all_that_is_made_of_it(&self, layers: &Layers, name: LayerName, chain: &[LayerName]) {
        if let Ok(view) = layers.view(chain, Verify::First) {
            // The view itself is sound, whatever the layer says.
            view.verify().unwrap();
            // Though not all that it names may be there.
            let _read = read_view(&view);
        }
        let _checked = layers.check(chain);
        let _exported = layers.export(name, &mut io::sink());
    }
}

fn path(store: &Store, name: LayerName) -> std::path::PathBuf {
    store.path().join("layers").join(format!("{name}.index"))
}

/// A merged view.
pub struct Views {
    store: Store,
    path: std::path::PathBuf,
    good: Vec<u8>,
    seen: String,
}

impl Views {
    pub fn new() -> Self {
        let store = Store::new();
        let path = store.files("views").remove(0);
        let good = fs::read(&path).unwrap();
        let seen = read_view(&View::open_stored(&path, Verify::First).unwrap()).unwrap();
        Self {
            store,
            path,
            good,
            seen,
        }
    }

    pub fn case(&self, choices: &mut Choices<'_>) {
        let mut bytes = self.good.clone();
        let damaged = choices.once_in(4);
        if damaged {
            damage(&mut bytes, choices);
        } else {
            forge(&mut bytes, choices);
        }
        let _put_back = PutBack::after(&self.path, &bytes);
        let verify = choices.one_of(&[Verify::First, Verify::Always, Verify::Never]);
        let read = View::open_stored(&self.path, verify).and_then(|view| read_view(&view));
        if !damaged {
            return;
        }
        match read {
            Ok(now) => assert!(now == self.seen, "wrong data"),
            Err(error) => assert_names(&error, &self.path),
        }
        if choices.once_in(8) {
            // Whoever opens it next has it built again, or is told.
            let layers = self.store.open();
            match layers
                .view(&self.store.chain, Verify::First)
                .and_then(|view| read_view(&view))
            {
                Ok(now) => assert!(now == self.seen, "wrong data"),
                Err(error) => assert_names(&error, &self.path),
            }
        }
    }
}
