//! Streams of layers: tar, plain and compressed, from a grammar that knows what hurts.

use std::io::{self, Write};

use plywood::store::LayerName;
use plywood::store::layers::{Expected, Layers};
use plywood::store::view::Verify;

use super::archive::{Layer, gzip, head, zstd};
use super::engine::Choices;
use super::formats::{Faults, damage};
use super::seeds::{Store, read_index, read_view, settings};

/// After so many layers those that were taken are collected.
const TIDY_AFTER: usize = 200;

/// The way of a stream into the store and out again.
pub struct Streams {
    store: Store,
    layers: Layers,
    bombs: Vec<Vec<u8>>,
    taken: usize,
}

impl Streams {
    pub fn new() -> Self {
        let store = Store::new();
        Self {
            layers: store.open(),
            store,
            bombs: bombs(),
            taken: 0,
        }
    }

    pub fn tar_case(&mut self, choices: &mut Choices<'_>) {
        let mut tar = match choices.below(4) {
            0 => self.store.streams[choices.below(2)].clone(),
            _ => grammar(choices),
        };
        for _ in 0..choices.below(4) {
            change_header(&mut tar, choices);
        }
        if choices.once_in(6) {
            damage(&mut tar, choices);
        }
        self.take(&tar, choices);
    }

    pub fn compressed_case(&mut self, choices: &mut Choices<'_>) {
        let tar = match choices.below(6) {
            0 => self.bombs[choices.below(self.bombs.len())].clone(),
            _ => self.store.streams[choices.below(2)].clone(),
        };
        let mut stream = Vec::new();
        let mut rest = tar.as_slice();
        // In members and frames.
        for number in 0.. {
            if rest.is_empty() {
                break;
            }
            let (part, more) = rest.split_at(match choices.below(3) {
                0 if number < 8 => choices.below(rest.len()) + 1,
                _ => rest.len(),
            });
            rest = more;
            stream.extend(match choices.below(5) {
                0 | 1 => gzip(part),
                2 | 3 => zstd(part),
                _ => part.to_vec(),
            });
            if choices.once_in(6) {
                // A skippable frame, that says of itself how long it is.
                stream.extend([0x50 | choices.byte() & 15, 0x2a, 0x4d, 0x18]);
                stream.extend((choices.number() as u32).to_le_bytes());
                stream.extend(choices.bytes(30));
            }
        }
        for _ in 0..choices.below(3) {
            damage(&mut stream, choices);
            if stream.is_empty() {
                break;
            }
        }
        self.take(&stream, choices);
    }

    fn take(&mut self, stream: &[u8], choices: &mut Choices<'_>) {
        // What is refused is refused in a sentence.
        let taken = match self.layers.import(stream, &Expected::default(), &()) {
            Ok(name) => name,
            Err(error) => {
                assert!(
                    error.to_string().len() < 10_000,
                    "no client can be told that"
                );
                return;
            }
        };
        self.look_at(taken, choices);
        let known = self.store.chain.contains(&taken);
        if !known {
            self.layers.remove(taken).unwrap();
        }
        self.taken += 1;
        if self.taken.is_multiple_of(TIDY_AFTER) {
            let collected = self.layers.collect(false, &());
            assert!(collected.errors.is_empty(), "{:?}", collected.errors);
        }
    }

    /// What was accepted is sound, can be given back, and can be mounted or is refused on what lies below it.
    fn look_at(&self, taken: LayerName, choices: &mut Choices<'_>) {
        let layers = &self.layers;
        let record = layers.get(taken).unwrap();
        assert!(record.tar_bytes <= settings().limits.bytes);
        assert!(u64::from(record.entries) <= settings().limits.entries);
        read_index(&layers.index(taken).unwrap()).unwrap();
        // Compares the diff id.
        layers.export(taken, &mut io::sink()).unwrap();
        let below = self.store.chain[0];
        let chains = [&[taken][..], &[below, taken], &[taken, below]];
        if let Ok(view) = layers.view(choices.one_of(&chains), Verify::First) {
            read_view(&view).unwrap();
            view.verify().unwrap();
        }
        if !choices.once_in(8) {
            return;
        }
        let faults = Faults::default();
        layers.verify(true, &faults).unwrap();
        let faults = faults.0.into_inner().unwrap();
        assert!(faults.is_empty(), "{faults:?}");
    }
}

/// A path that means something to a layer.
fn path(choices: &mut Choices<'_>) -> Vec<u8> {
    const PARTS: &[&str] = &[
        "a",
        "b",
        "c",
        "usr",
        "bin",
        "etc",
        "sh",
        "many",
        "dev",
        "loop",
        "..",
        ".",
        "",
        ".wh.a",
        ".wh.b",
        ".wh.usr",
        ".wh..wh..opq",
        ".wh..wh.x",
        ".wh.",
        ".wh...",
    ];
    let mut path = Vec::new();
    if choices.once_in(10) {
        path.push(b'/');
    }
    for number in 0..1 + choices.below(4) {
        if number > 0 {
            path.push(b'/');
        }
        match choices.below(40) {
            0 => path.extend(choices.bytes(40)),
            1 => path.extend(std::iter::repeat_n(
                b'n',
                choices.one_of(&[254, 255, 256, 4100]),
            )),
            2 => path.extend(b"d/".repeat(choices.one_of(&[10, 2000, 2046, 2047, 2048]))),
            _ => path.extend(choices.one_of(PARTS).as_bytes()),
        }
    }
    if choices.once_in(8) {
        path.push(b'/');
    }
    path
}

fn grammar(choices: &mut Choices<'_>) -> Vec<u8> {
    let mut layer = Layer::new();
    for _ in 0..1 + choices.below(12) {
        if choices.once_in(3) {
            layer = pax(layer, choices);
        }
        if choices.once_in(16) {
            // GNU's long name or link.
            let mut long = path(choices);
            long.push(0);
            let mut header = head(b"././@LongLink", choices.one_of(b"LK"));
            header.size = long.len() as u64;
            layer = layer.header(&header).data(&long);
        }
        if choices.once_in(5) {
            layer = sparse(layer, choices);
            continue;
        }
        let name = path(choices);
        let target = path(choices);
        let flag = choices.one_of(b"000000011122223456755\0S7xgK?");
        let content = match choices.below(4) {
            0 => choices.bytes(1500),
            1 => vec![choices.byte(); choices.below(3000)],
            2 => b"3\n0\n5\n512\n5\n9000\n2\n".to_vec(),
            _ => Vec::new(),
        };
        let mut header = head(&name, flag);
        if matches!(flag, b'1' | b'2') {
            header.link = &target;
        }
        header.mode = choices.one_of(&[0o644, 0o755, 0o7777, 0, 0o177_777]);
        header.device = choices.one_of(&[(0, 0), (1, 3), (0o77777, 0o77777), (4095, 0o77777)]);
        header.size = match choices.below(12) {
            0 => choices.number() & 0o7777_7777,
            _ => content.len() as u64,
        };
        layer = layer.header(&header).data(&content);
    }
    match choices.below(6) {
        0 => layer.raw(&choices.bytes(700)).tar(),
        _ => layer.tar(),
    }
}

/// A sparse file in one of its forms, whose map is nearly right.
fn sparse(layer: Layer, choices: &mut Choices<'_>) -> Layer {
    let (mut end, mut stored) = (0, 0);
    let mut parts: Vec<(u64, u64)> = Vec::new();
    for _ in 0..choices.below(7) {
        let (hole, data) = (
            u64::from(choices.byte()) * 40,
            u64::from(choices.byte()) * 8,
        );
        parts.push((end + hole, data));
        (end, stored) = (end + hole + data, stored + data);
    }
    let mut size = end + u64::from(choices.byte());
    if choices.once_in(3) {
        // Its parts overlap, or have another length than the content, or than the file.
        match (choices.below(4), parts.len()) {
            (0, 1..) => parts[0].0 = choices.number(),
            (1, 2..) => parts.swap(0, 1),
            (2, 1..) => parts[0].1 = choices.number(),
            _ => size = choices.number() % (end + 2),
        }
    }
    let content = vec![choices.byte(); stored as usize];
    let text = |number: u64| number.to_string().into_bytes();
    let real = text(size);
    match choices.below(4) {
        0 => {
            let map = parts.iter().map(|(at, length)| format!("{at},{length}"));
            let map = map.collect::<Vec<_>>().join(",").into_bytes();
            layer
                .pax(&[(b"GNU.sparse.size", &real), (b"GNU.sparse.map", &map)])
                .file("sparse/a", 0o644, &content)
        }
        1 => {
            let numbers: Vec<_> = parts
                .iter()
                .map(|(at, length)| (text(*at), text(*length)))
                .collect();
            let mut records: Vec<(&[u8], &[u8])> = vec![(b"GNU.sparse.size", &real)];
            for (at, length) in &numbers {
                records.push((b"GNU.sparse.offset", at));
                records.push((b"GNU.sparse.numbytes", length));
            }
            layer.pax(&records).file("sparse/b", 0o644, &content)
        }
        2 => {
            let mut data = format!("{}\n", parts.len()).into_bytes();
            for (at, length) in &parts {
                data.extend(format!("{at}\n{length}\n").into_bytes());
            }
            data.resize(data.len().next_multiple_of(512), 0);
            data.extend(content);
            let version = [
                (&b"GNU.sparse.major"[..], &b"1"[..]),
                (b"GNU.sparse.minor", b"0"),
            ];
            layer
                .pax(&[version[0], version[1], (b"GNU.sparse.realsize", &real)])
                .file("sparse/c", 0o644, &data)
        }
        _ => old_sparse(layer, &parts, size, &content),
    }
}

/// GNU's old form, with up to four parts in the header and the others in one block behind it.
fn old_sparse(layer: Layer, parts: &[(u64, u64)], size: u64, content: &[u8]) -> Layer {
    let mut header = tar::Header::new_gnu();
    header.set_path("sparse/d").unwrap();
    header.set_mode(0o644);
    header.set_size(content.len() as u64);
    header.set_entry_type(tar::EntryType::GNUSparse);
    let mut block = *header.as_bytes();
    let octal = |field: &mut [u8], number: u64| {
        let text = format!("{:011o}", number & 0o77_777_777_777);
        field[..11].copy_from_slice(text.as_bytes());
    };
    octal(&mut block[483..], size);
    let mut more = [0; 512];
    for (number, (at, length)) in parts.iter().enumerate() {
        let field = match number {
            0..4 => &mut block[386 + 24 * number..],
            _ => &mut more[24 * (number - 4)..],
        };
        octal(&mut field[..12], *at);
        octal(&mut field[12..24], *length);
    }
    block[482] = u8::from(parts.len() > 4);
    set_sum(&mut block);
    let layer = layer.raw(&block);
    let layer = if parts.len() > 4 {
        layer.raw(&more)
    } else {
        layer
    };
    layer.data(content)
}

fn pax(layer: Layer, choices: &mut Choices<'_>) -> Layer {
    const KEYS: &[&str] = &[
        "path",
        "linkpath",
        "size",
        "uid",
        "gid",
        "mtime",
        "atime",
        "ctime",
        "GNU.sparse.major",
        "GNU.sparse.minor",
        "GNU.sparse.name",
        "GNU.sparse.realsize",
        "GNU.sparse.size",
        "GNU.sparse.map",
        "GNU.sparse.offset",
        "GNU.sparse.numbytes",
        "GNU.sparse.numblocks",
        "SCHILY.xattr.user.a",
        "SCHILY.xattr.trusted.overlay.opaque",
        "SCHILY.xattr.security.capability",
        "SCHILY.xattr.user.overlay.whiteout",
        "LIBARCHIVE.xattr.user.%41",
        "SCHILY.xattr.",
        "x",
    ];
    let mut records = Vec::new();
    for _ in 0..1 + choices.below(4) {
        let key = choices.one_of(KEYS);
        let value = match choices.below(8) {
            0 => choices.bytes(30),
            1 => choices.number().to_string().into_bytes(),
            2 => format!("-{}.{}", choices.number(), choices.number()).into_bytes(),
            3 => path(choices),
            4 => {
                let numbers = (0..choices.below(12)).map(|_| match choices.once_in(6) {
                    true => choices.number().to_string(),
                    false => choices.byte().to_string(),
                });
                numbers.collect::<Vec<_>>().join(",").into_bytes()
            }
            5 => choices
                .one_of(&["0", "1", "-1", "", "9223372036854775807"])
                .as_bytes()
                .to_vec(),
            6 => vec![b'v'; choices.one_of(&[0, 65_536, 65_537, 1 << 20])],
            _ => b"QUJD".to_vec(),
        };
        records.push((key, value));
    }
    let records: Vec<_> = records
        .iter()
        .map(|(key, value)| (key.as_bytes(), value.as_slice()))
        .collect();
    layer.pax(&records)
}

/// Changes a block as if it were a header, with a sum that is right.
fn change_header(tar: &mut [u8], choices: &mut Choices<'_>) {
    let start = 512 * choices.below(tar.len() / 512);
    let Some(block) = tar.get_mut(start..start + 512) else {
        return;
    };
    let at = choices.one_of(&[
        0, 100, 108, 116, 124, 136, 156, 157, 257, 263, 329, 337, 345, 386, 482, 483,
    ]);
    match choices.below(4) {
        0 => {
            // As GNU writes large numbers.
            block[at] = choices.one_of(&[0x80, 0xff, 0xc0]);
            let number = choices.number().to_be_bytes();
            let end = (at + 9).min(512);
            block[at + 1..end].copy_from_slice(&number[..end - at - 1]);
        }
        1 => {
            let octal = format!("{:011o}", choices.number() & 0o77_777_777_777);
            let end = (at + 11).min(512);
            block[at..end].copy_from_slice(&octal.as_bytes()[..end - at]);
        }
        2 => block[257..265].copy_from_slice(choices.one_of(&[
            b"ustar  \0",
            b"ustar\x0000",
            b"\0\0\0\0\0\0\0\0",
        ])),
        _ => block[at] = choices.byte(),
    }
    set_sum(block);
}

fn set_sum(block: &mut [u8]) {
    block[148..156].fill(b' ');
    let sum: u32 = block.iter().map(|byte| u32::from(*byte)).sum();
    write!(&mut block[148..156], "{sum:06o}\0").unwrap();
}

/// Each of them small, and large once it is decompressed or in memory: just within what a layer may have, and beyond.
fn bombs() -> Vec<Vec<u8>> {
    let most = settings().limits;
    let zeros = |size: u64| {
        let mut header = head(b"zeros", b'0');
        header.size = size;
        Layer::new()
            .header(&header)
            .data(&vec![0; size as usize])
            .tar()
    };
    let entries = |count: u64| {
        let entry = |layer: Layer, number| layer.dir(&format!("{number}"), 0o755);
        (0..count).fold(Layer::new(), entry).tar()
    };
    let names = |count: u64| {
        let long = "n".repeat(200);
        let entry =
            |layer: Layer, number| layer.file(&format!("{number}/{long}/{long}"), 0o644, b"");
        (0..count).fold(Layer::new(), entry).tar()
    };
    let parts = |count: u64| {
        let mut data = format!("{count}\n").into_bytes();
        data.extend((0..count).flat_map(|part| format!("{}\n1\n", part * 2).into_bytes()));
        data.resize(data.len().next_multiple_of(512), 0);
        data.resize(data.len() + count as usize, 7);
        Layer::new()
            .pax(&[
                (b"GNU.sparse.major", b"1"),
                (b"GNU.sparse.minor", b"0"),
                (b"GNU.sparse.realsize", (count * 2).to_string().as_bytes()),
            ])
            .file("parts", 0o644, &data)
            .tar()
    };
    vec![
        zeros(most.bytes - 4096),
        zeros(most.bytes + 1),
        zeros(4 * most.bytes),
        entries(most.entries),
        entries(most.entries + 1),
        names(most.names / 500),
        names(most.names / 300),
        parts(1000),
        parts(80_000),
    ]
}
