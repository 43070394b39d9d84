//! What `docs/layer-format.md` says byte by byte is what lies on the disk: files that the store has written are read here by the
//! tables of that page alone, and what it says of readers is tried on them.

mod indexes;
mod page;
mod sample;

use std::fs;
use std::path::Path;

use blake3::hazmat::HasherExt;

use super::short_sum;
use crate::store::ObjectName;
use crate::store::error::{Error, Result};
use crate::store::format::tables::Object;
use crate::store::ingest::recipe;
use crate::store::layer::index::{LARGEST_XATTR, LONGEST_NAME, LONGEST_PATH};
use crate::store::object::{LARGEST_FRAMED, Objects};
use crate::store::pack;
use page::{Table, digits, features, number, page, rows};
use sample::{LARGE, SMALL, Sample, large, noise};

/// A later version may use all that this one says nothing of.
fn newer(header: &Table, file: &mut [u8]) {
    file[header.field("version").at] += 1;
    header.zeros().for_each(|at| file[at] = 1);
}

fn assert_newer(error: &Error) {
    assert!(matches!(error, Error::Unsupported { .. }), "{error}");
    let told = error.to_string();
    assert!(told.contains("needs a newer release of Plywood"), "{told}");
}

#[test]
fn a_pack_is_as_documented() {
    let sample = Sample::new();
    let (path, id) = sample.pack_of(&noise(SMALL));
    let pack = fs::read(&path).unwrap();
    let [header, object, entry, end] = ["header", "object", "entry of the table", "end record"]
        .map(|title| Table::of("Packs", title));
    header.fills(64);
    entry.fills(56);
    end.fills(64);
    header.holds(&pack);
    let stem = path.file_stem().unwrap().to_str().unwrap();
    let drawn = u128::from_be_bytes(header.get(&pack, "ID").try_into().unwrap());
    assert_eq!(format!("{drawn:032x}"), stem);

    let last = &pack[pack.len() - 64..];
    end.holds(last);
    let (count, start) = (
        end.number(last, "number of objects") as usize,
        end.number(last, "where the table starts") as usize,
    );
    let table = &pack[start..pack.len() - 64];
    assert_eq!((count, table.len()), (2, 2 * 56));
    let of_sum = &end.field("sum of the table").text;
    let (_, to) = of_sum.split_once(" 0 to ").unwrap();
    let sum = blake3::hash(&[table, &last[..=digits(to).unwrap()]].concat());
    assert_eq!(end.get(last, "sum of the table"), sum.as_bytes());

    let mut end_of_last = 64;
    let mut found = Vec::new();
    for record in table.chunks(56) {
        let starts = entry.number(record, "where its object starts") as usize;
        let at = &pack[starts..];
        object.holds(at);
        let (size, stored) = (
            object.number(at, "bytes of plain content"),
            object.number(at, "bytes stored"),
        );
        assert_eq!(entry.number(record, "bytes of plain content"), size);
        assert_eq!(entry.number(record, "bytes stored"), stored);
        assert_eq!(starts % 8, 0);
        let body = object.field("what is stored").at;
        let bytes = &at[body..body + stored as usize];
        let content = match object.get(at, "encoding") {
            [0] => bytes.to_vec(),
            [1] => zstd::decode_all(bytes).unwrap(),
            other => panic!("{other:?}"),
        };
        assert_eq!(content.len() as u64, size);
        let name = ObjectName::of(&content).0;
        assert_eq!(object.get(at, "name"), name);
        assert_eq!(entry.get(record, "name"), name);
        end_of_last = end_of_last.max((starts + body + stored as usize).next_multiple_of(8));
        found.push((name, content));
    }
    assert_eq!(end_of_last, start);
    assert!(found.is_sorted_by_key(|(name, _)| *name));
    let mut contents: Vec<_> = found.into_iter().map(|(_, content)| content).collect();
    contents.sort();
    let mut written = vec![vec![b'a'; SMALL], noise(SMALL)];
    written.sort();
    assert!(contents == written);

    // What the page says of a reader.
    let look = |change: &dyn Fn(&mut Vec<u8>)| {
        let mut changed = pack.clone();
        change(&mut changed);
        let sum = header.field("short sum");
        let short = short_sum(&changed[..sum.at]);
        changed[sum.range()].copy_from_slice(&short);
        let tmp = tempfile::NamedTempFile::new().unwrap();
        fs::write(tmp.path(), changed).unwrap();
        pack::look_into(tmp.path(), id)
    };
    for at in header.zeros() {
        let found = look(&|pack| pack[at] = 1).unwrap();
        assert_eq!((found.features, found.has_table), (None, true), "byte {at}");
    }
    for at in end.zeros() {
        let found = look(&|pack| {
            let last = pack.len() - 64;
            pack[last + at] = 1;
            let sum = blake3::hash(&pack[start..last + 32]);
            pack[last + 32..].copy_from_slice(sum.as_bytes());
        });
        assert!(!found.unwrap().has_table, "byte {at}");
    }
    for (word, is_refused) in features(&header) {
        let found = look(&|pack| pack[word.start] = 4);
        assert_eq!(found.is_err(), is_refused);
        found.err().iter().for_each(assert_newer);
    }
    assert_newer(&look(&|pack| newer(&header, pack)).unwrap_err());
}

/// Changes bytes of a header of 64 bytes whose last 8 are its short sum, and has `read` read the file. At `sum_at` is that of
/// all before, if there is one.
fn with_short_header<T>(
    path: &Path,
    change: &dyn Fn(&mut [u8]),
    sum_at: Option<usize>,
    read: impl FnOnce() -> Result<T>,
) -> Result<T> {
    let good = fs::read(path).unwrap();
    let mut changed = good.clone();
    change(&mut changed);
    let sum = short_sum(&changed[..56]);
    changed[56..64].copy_from_slice(&sum);
    if let Some(at) = sum_at {
        let sum = blake3::hash(&changed[..at]);
        changed[at..at + 32].copy_from_slice(sum.as_bytes());
    }
    fs::write(path, changed).unwrap();
    let found = read();
    fs::write(path, good).unwrap();
    found
}

/// What the page says of who reads a file with this header, tried on one with a change.
fn assert_refuses<T: std::fmt::Debug>(
    header: &Table,
    read: impl Fn(&dyn Fn(&mut [u8])) -> Result<T>,
) {
    for at in header.zeros() {
        assert!(read(&|file| file[at] = 1).is_err(), "byte {at}");
    }
    for (word, is_refused) in features(header) {
        let found = read(&|file| file[word.start] = 4);
        assert_eq!(found.is_err(), is_refused);
        found.err().iter().for_each(assert_newer);
    }
    assert_newer(&read(&|file| newer(header, file)).unwrap_err());
}

#[test]
fn a_large_object_is_as_documented() {
    let sample = Sample::new();
    let path = sample.object(&large());
    let file = fs::read(&path).unwrap();
    let header = Table::of("Large objects", "");
    let entry = Table::of("Large objects", "entry of the table");
    entry.fills(36);
    header.holds(&file);
    assert_eq!(header.number(&file, "bytes of the object"), LARGE as u64);
    let frame = header.number(&file, "plain bytes of a frame") as usize;
    let text = &header.field("plain bytes of a frame").text;
    assert!(text.contains(&format!("shorter: {frame};")), "{text}");
    assert_eq!(LARGEST_FRAMED, 64 << 30);

    let entries = header.field("the table").range();
    assert_eq!(entries.len(), 36);
    let entries = entries.start;
    let mut at = entries + LARGE.div_ceil(frame) * 36;
    let sum_at = at;
    let sum = blake3::hash(&file[..at]);
    assert_eq!(&file[at..at + 32], sum.as_bytes());
    at += 32;
    let mut content = Vec::new();
    let mut forms = Vec::new();
    for record in file[entries..].chunks(36).take(LARGE.div_ceil(frame)) {
        let stored = entry.number(record, "bytes stored of the frame");
        let is_plain = stored >> 31 == 1;
        let end = at + (stored & 0x7fff_ffff) as usize;
        let plain = match is_plain {
            true => file[at..end].to_vec(),
            false => zstd::decode_all(&file[at..end]).unwrap(),
        };
        let value = blake3::Hasher::new()
            .set_input_offset(content.len() as u64)
            .update(&plain)
            .finalize_non_root();
        assert_eq!(entry.get(record, "its value"), value);
        content.extend(plain);
        forms.push(is_plain);
        at = end;
    }
    assert!(content == large() && at == file.len());
    assert_eq!(forms, [false, true, true]);

    let object = Object {
        name: ObjectName::of(&content),
        size: LARGE as u64,
    };
    let read = |change: &dyn Fn(&mut [u8])| {
        with_short_header(&path, change, Some(sum_at), || {
            Objects::new(sample.dir.path()).read(&object, None, false)
        })
    };
    read(&|_| {}).unwrap();
    assert_refuses(&header, read);
}

#[test]
fn the_recipe_of_a_stream_is_as_documented() {
    let sample = Sample::new();
    let path = sample.layers.recipe_path(sample.names[0]);
    let file = fs::read(&path).unwrap();
    let header = Table::of("The tar recipe", "");
    header.holds(&file);
    let frame = header.field("one zstd frame").at;
    let mut parts = &*zstd::decode_all(&file[frame..]).unwrap();
    let mut stream = Vec::new();
    let mut contents = [vec![b'a'; SMALL], noise(SMALL), large()].into_iter();
    let kinds = rows("The tar recipe", "| byte | then | stands for |");
    assert_eq!([&*kinds[0][0], &*kinds[1][0]], ["1", "2"]);
    assert!(kinds[0][1].starts_with("length (4 bytes), that many bytes"));
    assert!(kinds[1][2].starts_with("the content of the next regular file"));
    while let Some((kind, rest)) = parts.split_first() {
        parts = match kind {
            1 => {
                let (length, rest) = rest.split_at(4);
                let (bytes, rest) = rest.split_at(number(length) as usize);
                stream.extend(bytes);
                rest
            }
            2 => {
                stream.extend(contents.next().unwrap());
                rest
            }
            other => panic!("{other}"),
        };
    }
    assert!(stream == sample.stream && contents.next().is_none());

    let read = |change: &dyn Fn(&mut [u8])| {
        with_short_header(&path, change, None, || {
            let mut out = Vec::new();
            recipe::Reader::open(&path)?.verify()?;
            sample.layers.export(sample.names[0], &mut out)?;
            assert!(out == sample.stream);
            Ok(())
        })
    };
    assert_refuses(&header, read);
}

#[test]
fn limits_are_as_documented() {
    let rows = rows("Limits", "| what | most |");
    let most = |what: &str| {
        let row = rows.iter().find(|row| row[0].starts_with(what)).unwrap();
        row[1].clone()
    };
    assert_eq!(
        most("name, path, symbolic link"),
        format!(
            "{LONGEST_NAME}, {LONGEST_PATH}, {LONGEST_PATH} bytes; a setting can have less for paths"
        )
    );
    let value = format!("255, {} KiB,", LARGEST_XATTR >> 10);
    assert!(most("extended attribute").starts_with(&value));
    assert_eq!(
        most("object in a pack"),
        format!("{} MiB", pack::LARGEST >> 20)
    );
    assert!(page().contains(&format!("has no more than {} GiB", LARGEST_FRAMED >> 30)));
}
