//! Packs, large objects in frames, recipes of tar streams, and record files.

use std::fs;
use std::io::{self, Cursor};
use std::path::PathBuf;

use blake3::hazmat::HasherExt;
use plywood::store::layers::{Expected, LayerRecord};
use plywood::store::object::{Check, Content, Objects};
use plywood::store::record::RecordDir;
use plywood::store::{LayerName, Object, ObjectName};

use super::archive::Layer;
use super::engine::Choices;
use super::formats::{Faults, damage};
use super::seeds::{PutBack, Store, assert_names, text};

const PACK_HEADER: usize = 64;
const TABLE_ENTRY: usize = 56;

fn short_sum(bytes: &mut [u8]) {
    let sum = blake3::hash(&bytes[..56]);
    bytes[56..64].copy_from_slice(&sum.as_bytes()[..8]);
}

/// A pack, read by the places that views have and by those that it gives itself.
pub struct Packs {
    store: Store,
    path: PathBuf,
    good: Vec<u8>,
    objects: Vec<Object>,
}

impl Packs {
    pub fn new() -> Self {
        let store = Store::new();
        let mut packs = store.files("packs");
        packs.sort_by_key(|path| fs::metadata(path).unwrap().len());
        let path = packs.pop().unwrap();
        let layers = store.open();
        let objects = store.chain.iter().flat_map(|name| {
            let index = layers.index(*name).unwrap();
            let all = (0..index.object_count()).map(|number| index.object(number).unwrap());
            all.collect::<Vec<_>>()
        });
        let objects = objects.collect();
        Self {
            good: fs::read(&path).unwrap(),
            store,
            path,
            objects,
        }
    }

    pub fn case(&self, choices: &mut Choices<'_>) {
        let mut bytes = self.good.clone();
        if choices.once_in(3) {
            damage(&mut bytes, choices);
        } else {
            forge_pack(&mut bytes, choices);
        }
        let _put_back = PutBack::after(&self.path, &bytes);
        let objects = Objects::new(self.store.path());
        for _ in 0..12 {
            let object = &self.objects[choices.below(self.objects.len())];
            let verify = !choices.once_in(3);
            match objects.read(object, None, verify) {
                Ok(content) => assert_is(object, &content, verify),
                Err(error) => {
                    let message = error.to_string();
                    let pack = self.path.file_stem().unwrap().to_str().unwrap();
                    let named =
                        message.contains(pack) || message.contains(&object.name.to_string());
                    assert!(named, "{message}");
                }
            }
        }
        if choices.once_in(12) {
            let layers = self.store.open();
            layers.verify(true, &Faults::default()).unwrap();
            // It looks into every pack, too.
            layers.collect(true, &());
            for name in &self.store.chain {
                let _exported = layers.export(*name, &mut io::sink());
            }
        }
    }
}

fn assert_is(object: &Object, content: &Content, verify: bool) {
    let mut bytes = vec![0; object.size as usize + 1];
    let count = content.read_at(&mut bytes, 0).unwrap();
    assert_eq!(count as u64, object.size);
    let name = ObjectName::of(&bytes[..count]);
    assert!(!verify || name == object.name, "wrong data");
}

fn forge_pack(bytes: &mut Vec<u8>, choices: &mut Choices<'_>) {
    let end = bytes.len() - PACK_HEADER;
    let word = |bytes: &[u8], at: usize| u64::from_le_bytes(bytes[at..at + 8].try_into().unwrap());
    let (count, table) = (
        word(bytes, end + 8) as usize,
        word(bytes, end + 16) as usize,
    );
    for _ in 0..1 + choices.below(3) {
        let entry = table + TABLE_ENTRY * choices.below(count);
        // Forged before, it may be anything.
        let object = (word(bytes, entry + 32) as usize).min(table - PACK_HEADER);
        let value = match choices.below(3) {
            0 => choices.number(),
            _ => choices.number() % (bytes.len() as u64 + 100),
        };
        match choices.below(8) {
            0 => {
                let at = choices.one_of(&[8, 10, 16, 24, 32, 40]);
                put(bytes, at, value);
            }
            // The object: its encoding, sizes, and what is stored.
            1 => put(bytes, object + choices.one_of(&[4, 8, 16, 24]), value),
            2 => put(bytes, object + 8, choices.number()),
            3 => {
                let at = object + PACK_HEADER + choices.below(40);
                bytes[at] = choices.byte();
            }
            // The table: place, sizes, names.
            4 | 5 => put(bytes, entry + choices.one_of(&[0, 32, 40, 48]), value),
            6 => {
                let other = table + TABLE_ENTRY * choices.below(count);
                bytes.copy_within(other..other + TABLE_ENTRY, entry);
            }
            _ => put(bytes, end + choices.one_of(&[8, 16]), value),
        }
        short_sum(&mut bytes[object..object + PACK_HEADER]);
    }
    short_sum(&mut bytes[..PACK_HEADER]);
    if choices.once_in(8) {
        // Without a table it is scanned.
        bytes.truncate(end + choices.below(PACK_HEADER));
        return;
    }
    let mut hash = blake3::Hasher::new();
    hash.update(&bytes[table..end])
        .update(&bytes[end..end + 32]);
    let sum = hash.finalize();
    bytes[end + 32..].copy_from_slice(sum.as_bytes());
}

fn put(bytes: &mut [u8], at: usize, value: u64) {
    if let Some(field) = bytes.get_mut(at..at + 8) {
        field.copy_from_slice(&value.to_le_bytes());
    }
}

/// A large object in frames.
pub struct Frames {
    store: Store,
    objects: Vec<FramedObject>,
}

struct FramedObject {
    path: PathBuf,
    good: Vec<u8>,
    object: Object,
    content: Vec<u8>,
}

const FRAMES_HEADER: usize = 64;
/// Bytes of a frame's entry in the table.
const ENTRY: usize = 36;
/// Plain bytes of a frame that is written.
const FRAME: usize = 128 << 10;

impl Frames {
    pub fn new() -> Self {
        let store = Store::new();
        let mut random = vec![0; FRAME + 100];
        blake3::Hasher::new().finalize_xof().fill(&mut random);
        let contents = [
            text(60_000),
            // Frames of either kind.
            [&text(30_000)[..FRAME], &random, &[7; FRAME]].concat(),
            random[..FRAME + 50].to_vec(),
            text(200),
        ];
        let mut layer = Layer::new();
        for (number, content) in contents.iter().enumerate() {
            layer = layer.file(&number.to_string(), 0o644, content);
        }
        let stream = layer.tar();
        let imported = store
            .open()
            .import(stream.as_slice(), &Expected::default(), &());
        imported.unwrap();
        let objects = contents.map(|content| {
            let object = Object {
                name: ObjectName::of(&content),
                size: content.len() as u64,
            };
            let name = object.name.to_string();
            let path = store.path().join("objects").join(&name[..2]).join(&name);
            let good = fs::read(&path).unwrap();
            assert!(good.starts_with(b"plyframe") && good.len() != content.len());
            FramedObject {
                path,
                good,
                object,
                content,
            }
        });
        Self {
            objects: objects.into(),
            store,
        }
    }

    pub fn case(&self, choices: &mut Choices<'_>) {
        let which = choices.below(self.objects.len());
        let of = &self.objects[which];
        let mut bytes = of.good.clone();
        if choices.once_in(3) {
            let frame = choices.one_of(&[4096, 8192, FRAME, 1 << 20, 16 << 20]);
            bytes = in_frames(&of.content, frame, choices);
        }
        let sound = choices.once_in(6);
        if !sound {
            match choices.once_in(3) {
                true => damage(&mut bytes, choices),
                false => forge_frames(&mut bytes, choices),
            }
        }
        let _put_back = PutBack::after(&of.path, &bytes);
        let objects = Objects::new(self.store.path());
        let size = of.content.len() as u64;
        for check in [Check::Nothing, Check::PARTS] {
            let Ok((content, _)) = objects.open(&of.object, None, &check) else {
                assert!(!sound);
                continue;
            };
            for _ in 0..6 {
                let from = match choices.below(6) {
                    0 => choices.number(),
                    1 => FRAME as u64 * choices.below(4) as u64,
                    _ => choices.word() % (size + 10),
                };
                let most = choices.one_of(&[1, 4096, FRAME, 3 * FRAME]);
                let mut buffer = vec![0; most];
                let expected = size.saturating_sub(from).min(most as u64);
                match content.read_at(&mut buffer, from) {
                    Ok(count) => {
                        assert_eq!(count as u64, expected);
                        if count > 0 && (sound || matches!(check, Check::Parts { .. })) {
                            let from = from as usize;
                            assert!(
                                buffer[..count] == of.content[from..from + count],
                                "wrong data"
                            );
                        }
                    }
                    Err(error) => {
                        let known = error.kind() == io::ErrorKind::InvalidData;
                        assert!(known && !sound && expected > 0, "{error:?}");
                    }
                }
            }
        }
        // Frames that are kept are of one object.
        let other = &self.objects[(which + 1) % self.objects.len()];
        let mut read = [0; 600];
        let content = objects.read(&other.object, None, false).unwrap();
        content.read_at(&mut read, 0).unwrap();
        assert!(read == other.content[..600], "wrong data");
        match objects.read(&of.object, None, true) {
            Ok(content) => {
                let mut read = vec![0; of.content.len() + 1];
                let count = content.read_at(&mut read, 0).unwrap();
                assert!(read[..count] == of.content, "wrong data");
            }
            Err(error) => {
                assert!(!sound, "{error}");
                assert_names(&error, &of.path);
            }
        }
    }
}

/// What another writer may make of `content`.
fn in_frames(content: &[u8], frame: usize, choices: &mut Choices<'_>) -> Vec<u8> {
    let mut bytes = vec![0; FRAMES_HEADER];
    bytes[..8].copy_from_slice(b"plyframe");
    bytes[8] = 2;
    put(&mut bytes, 40, content.len() as u64);
    put_word(&mut bytes, 48, frame as u64);
    short_sum(&mut bytes);
    let mut body = Vec::new();
    for (number, part) in content.chunks(frame).enumerate() {
        let compressed = zstd::encode_all(part, 1).unwrap();
        let (stored, plain) = match compressed.len() > part.len() || choices.once_in(3) {
            true => (part, 1 << 31),
            false => (&*compressed, 0),
        };
        bytes.extend((stored.len() as u32 | plain).to_le_bytes());
        bytes.extend(match part.len() == content.len() {
            true => *blake3::hash(part).as_bytes(),
            false => blake3::Hasher::new()
                .set_input_offset((number * frame) as u64)
                .update(part)
                .finalize_non_root(),
        });
        body.extend_from_slice(stored);
    }
    let sum = blake3::hash(&bytes);
    bytes.extend_from_slice(sum.as_bytes());
    bytes.extend(body);
    if bytes.len() == content.len() {
        bytes.push(0);
    }
    bytes
}

fn forge_frames(bytes: &mut Vec<u8>, choices: &mut Choices<'_>) {
    let size = u64::from_le_bytes(bytes[40..48].try_into().unwrap());
    let count = size.div_ceil(u64::from(word(bytes, 48))) as usize;
    let table_end = FRAMES_HEADER + ENTRY * count;
    let body = table_end + 32;
    for _ in 0..1 + choices.below(3) {
        let entry = FRAMES_HEADER + ENTRY * choices.below(count);
        let value = choices.number();
        match choices.below(10) {
            // The header: version, features, sizes.
            0 => put(bytes, choices.one_of(&[8, 16, 24, 32, 40]), value),
            1 => put_word(bytes, choices.one_of(&[48, 52]), value),
            // For which the table may still fit.
            2 => {
                let least = size.div_ceil(count as u64);
                put_word(bytes, 48, least + u64::from(choices.byte()));
            }
            // The table: what is stored of a frame, and how.
            3 => put_word(bytes, entry, value),
            4 => bytes[entry + 3] ^= 0x80,
            5 => {
                // Frames that are cut elsewhere, of as many bytes in all.
                let other = FRAMES_HEADER + ENTRY * choices.below(count);
                let by = choices.below(1000) as u32;
                let more = word(bytes, entry).wrapping_add(by);
                put_word(bytes, entry, u64::from(more));
                let fewer = word(bytes, other).wrapping_sub(by);
                put_word(bytes, other, u64::from(fewer));
            }
            // The values of frames.
            6 => bytes[entry + 4 + choices.below(32)] ^= choices.byte(),
            7 => {
                let other = FRAMES_HEADER + ENTRY * choices.below(count);
                bytes.copy_within(other + 4..other + ENTRY, entry + 4);
            }
            // The frames.
            8 => {
                let at = body + choices.below(bytes.len() - body);
                bytes[at] = choices.byte();
            }
            // One of more than it should be.
            _ => {
                let bomb = zstd::encode_all(Cursor::new(vec![choices.byte(); 8 << 20]), 1).unwrap();
                let end = bytes.len().min(body + stored(bytes, FRAMES_HEADER));
                put_word(bytes, FRAMES_HEADER, bomb.len() as u64);
                bytes.splice(body..end, bomb);
            }
        }
    }
    short_sum(&mut bytes[..FRAMES_HEADER]);
    let sum = blake3::hash(&bytes[..table_end]);
    bytes[table_end..body].copy_from_slice(sum.as_bytes());
    if choices.once_in(3) {
        // So that the table is right about the bytes of the file.
        let entries = (FRAMES_HEADER..table_end).step_by(ENTRY);
        let all = body + entries.map(|at| stored(bytes, at)).sum::<usize>();
        if all < bytes.len() + (1 << 20) {
            bytes.resize(all + usize::from(all as u64 == size), 0);
        }
    }
}

/// The bytes of a frame by its entry at `at`.
fn stored(bytes: &[u8], at: usize) -> usize {
    (word(bytes, at) & !(1 << 31)) as usize
}

fn word(bytes: &[u8], at: usize) -> u32 {
    u32::from_le_bytes(bytes[at..at + 4].try_into().unwrap())
}

fn put_word(bytes: &mut [u8], at: usize, value: u64) {
    bytes[at..at + 4].copy_from_slice(&(value as u32).to_le_bytes());
}

/// The recipe of a tar stream: what is exported is the stream, or nothing is.
pub struct Recipe {
    store: Store,
    layers: plywood::store::layers::Layers,
    parts: Vec<Vec<u8>>,
}

impl Recipe {
    pub fn new() -> Self {
        let store = Store::new();
        let parts = store.chain.iter().map(|name| {
            let bytes = fs::read(recipe(&store, *name)).unwrap();
            zstd::decode_all(&bytes[PACK_HEADER..]).unwrap()
        });
        Self {
            parts: parts.collect(),
            layers: store.open(),
            store,
        }
    }

    pub fn case(&self, choices: &mut Choices<'_>) {
        let which = choices.below(self.parts.len());
        let name = self.store.chain[which];
        let path = recipe(&self.store, name);
        let mut bytes = fs::read(&path).unwrap();
        if choices.once_in(3) {
            damage(&mut bytes, choices);
        } else {
            let mut parts = self.parts[which].clone();
            for _ in 0..1 + choices.below(3) {
                if parts.is_empty() {
                    break;
                }
                let at = choices.below(parts.len());
                match choices.below(5) {
                    0 => parts[at] = choices.byte() % 4,
                    1 => put(&mut parts, at, choices.number()),
                    2 => parts.truncate(at),
                    3 => drop(parts.splice(at..at, std::iter::repeat_n(2, choices.below(3000)))),
                    _ => drop(parts.drain(at..parts.len().min(at + 8))),
                }
            }
            bytes.truncate(PACK_HEADER);
            if choices.once_in(8) {
                put(
                    &mut bytes,
                    choices.one_of(&[8, 16, 24, 32]),
                    choices.number(),
                );
            }
            short_sum(&mut bytes);
            let level = 1;
            bytes.extend(zstd::encode_all(Cursor::new(&parts), level).unwrap());
            if choices.once_in(8) {
                // More content than any stream has.
                let bomb = vec![choices.byte() % 3; 4 << 20];
                bytes.extend(zstd::encode_all(Cursor::new(&bomb), level).unwrap());
            }
        }
        let _put_back = PutBack::after(&path, &bytes);
        let mut out = Vec::new();
        match self.layers.export(name, &mut out) {
            Ok(()) => assert!(out == self.store.streams[which], "wrong data"),
            Err(error) => assert_names_either(&error, &name),
        }
        assert!(
            out.len() <= self.store.streams[which].len(),
            "it does not end in time"
        );
    }
}

fn assert_names_either(error: &plywood::store::Error, name: &LayerName) {
    use plywood::store::Error::{Damaged, Digest, Io, Unsupported};
    match error {
        // By the caller, who knows which layer it asked for.
        Digest { .. } => {}
        Damaged { path, .. } | Unsupported { path, .. } | Io { path, .. } => {
            assert_names(error, path);
            assert!(error.to_string().contains(&name.to_string()), "{error}");
        }
        other => panic!("{other}"),
    }
}

fn recipe(store: &Store, name: LayerName) -> PathBuf {
    store.path().join("layers").join(format!("{name}.tar"))
}

/// A record file, with a sum that is right.
pub struct Records {
    store: Store,
    good: Vec<u8>,
    record: LayerRecord,
}

impl Records {
    pub fn new() -> Self {
        let store = Store::new();
        let good = fs::read(&store.files("records")[0]).unwrap();
        let name = store.files("records")[0].file_stem().unwrap().to_owned();
        let name = name.to_str().unwrap().parse().unwrap();
        let record = store.open().get(name).unwrap();
        Self {
            store,
            good,
            record,
        }
    }

    pub fn case(&self, choices: &mut Choices<'_>) {
        let path = &self.store.files("records")[0];
        let mut bytes = self.good.clone();
        let damaged = choices.once_in(4);
        if damaged {
            damage(&mut bytes, choices);
        } else {
            bytes.truncate(bytes.len() - 65);
            for _ in 0..1 + choices.below(4) {
                let at = choices.below(bytes.len());
                match choices.below(5) {
                    0 => bytes[at] = choices.byte(),
                    1 => drop(bytes.drain(at..bytes.len().min(at + 1 + choices.below(20)))),
                    2 => {
                        let text = choices.number().to_string().into_bytes();
                        bytes.splice(at..at, text);
                    }
                    3 => {
                        // Deeper than a parser that calls itself can go.
                        let open = choices.one_of(b"[{");
                        bytes.splice(at..at, std::iter::repeat_n(open, 20_000));
                    }
                    _ => drop(bytes.splice(at..at, choices.bytes(20))),
                }
            }
            let sum = blake3::hash(&bytes).to_hex();
            bytes.extend_from_slice(sum.as_bytes());
            bytes.push(b'\n');
        }
        let _put_back = PutBack::after(path, &bytes);
        let id = path.file_stem().unwrap().to_str().unwrap();
        let records = RecordDir::<LayerRecord>::open(path.parent().unwrap()).unwrap();
        let listing = records.list().unwrap();
        assert_eq!(listing.records.len() + listing.damaged.len(), 2);
        match records.get(id) {
            Ok(record) => assert!(
                !damaged || record.as_ref() == Some(&self.record),
                "wrong data"
            ),
            Err(error) => {
                let message = error.to_string();
                assert!(message.contains(id), "{message}");
                assert_eq!(listing.damaged.len(), 1);
            }
        }
    }
}
