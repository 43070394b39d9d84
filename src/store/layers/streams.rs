//! Tests of streams in the forms that builders give them, and of what follows their ends.

use std::fs;
use std::io::Write;
use std::path::Path;

use sha2::{Digest, Sha256};

use crate::store::error::Result;
use crate::store::export::sha256;
use crate::store::ingest::Settings;
use crate::store::layers::{Expected, Layers};

fn open(dir: &Path) -> Layers {
    let settings = Settings {
        small: 4096,
        workers: 2,
        ..Settings::default()
    };
    Layers::open(dir, settings).unwrap().0
}

const FILES: [(&str, usize); 3] = [("empty", 0), ("small", 700), ("large", 20_000)];

/// Header, content with its padding, and so on for each file, and the trailer.
fn parts(files: &[(&str, usize)]) -> Vec<Vec<u8>> {
    let mut parts = Vec::new();
    for (name, bytes) in files {
        let mut header = tar::Header::new_ustar();
        header.set_path(name).unwrap();
        header.set_size(*bytes as u64);
        header.set_mode(0o644);
        header.set_cksum();
        let mut content = name.as_bytes().repeat(*bytes);
        content.truncate(*bytes);
        content.resize(bytes.next_multiple_of(512), 0);
        parts.extend([header.as_bytes().to_vec(), content]);
    }
    parts.push(vec![0; 1024]);
    parts
}

fn gzip(data: &[u8]) -> Vec<u8> {
    let mut encoder = flate2::write::GzEncoder::new(Vec::new(), flate2::Compression::fast());
    encoder.write_all(data).unwrap();
    encoder.finish().unwrap()
}

fn zstd(data: &[u8]) -> Vec<u8> {
    zstd::encode_all(data, 1).unwrap()
}

fn skippable(data: &[u8]) -> Vec<u8> {
    let length = (data.len() as u32).to_le_bytes();
    [&[0x50, 0x2a, 0x4d, 0x18][..], &length, data].concat()
}

/// Takes in a blob whose content is `stream`, and answers the names of its entries and its stream as it is given back.
fn through(layers: &Layers, blob: &[u8], stream: &[u8]) -> Result<(Vec<String>, Vec<u8>)> {
    let digest = |bytes: &[u8]| sha256(&Sha256::digest(bytes).into());
    let (of_blob, of_stream) = (digest(blob), digest(stream));
    let expected = Expected {
        blob: Some(&of_blob),
        diff_id: Some(&of_stream),
    };
    let name = layers.import(blob, &expected, &())?;
    let index = layers.index(name)?;
    let path = |number| {
        let path = index.path(index.entry(number)?.path)?;
        Ok(String::from_utf8(path.join(&b'/')).unwrap())
    };
    let names = (0..index.len()).map(path).collect::<Result<_>>()?;
    let mut exported = Vec::new();
    layers.export(name, &mut exported)?;
    Ok((names, exported))
}

/// Blobs of which a part can be read without the rest, whose tables of contents a layer has besides.
#[test]
fn estargz_and_zstd_chunked_come_back_bit_for_bit() {
    let tmp = tempfile::tempdir().unwrap();
    let layers = open(tmp.path());
    // One has its table as the last entry of the stream, and where that is in the extra field of an empty member.
    let with_table = [&FILES[..], &[("stargz.index.json", 300)]].concat();
    let estargz = parts(&with_table);
    let footer = flate2::GzBuilder::new()
        .extra(*b"SG\x16\x000000000000001000STARGZ")
        .write(Vec::new(), flate2::Compression::none())
        .finish()
        .unwrap();
    let members: Vec<u8> = estargz.iter().flat_map(|part| gzip(part)).collect();
    // The other has both in frames that are passed over.
    let chunked = parts(&FILES);
    let table = skippable(&zstd(b"{\"version\":1}"));
    let place = skippable(&[b"\0".repeat(56), b"GNUlInUx".to_vec()].concat());
    let frames: Vec<u8> = chunked.iter().flat_map(|part| zstd(part)).collect();
    for (what, blob, stream, files) in [
        (
            "eStargz",
            [members, footer].concat(),
            estargz.concat(),
            &with_table[..],
        ),
        (
            "zstd:chunked",
            [frames, table, place].concat(),
            chunked.concat(),
            &FILES,
        ),
    ] {
        let (names, exported) = through(&layers, &blob, &stream).unwrap();
        assert_eq!(
            names,
            files.iter().map(|(name, _)| *name).collect::<Vec<_>>()
        );
        assert!(exported == stream, "{what}");
    }
}

/// No tool reads it, but the diff id is of all of it.
#[test]
fn what_follows_the_end_of_a_stream_comes_back_with_it() {
    let tmp = tempfile::tempdir().unwrap();
    let layers = open(tmp.path());
    let whole = parts(&FILES).concat();
    let ghost = parts(&[("ghost", 600)]).concat();
    for (what, rest) in [
        ("the rest of a record of GNU tar", vec![0; 10_240]),
        ("more than is read at once", vec![0; 3 << 20]),
        ("no whole block", b"garbage".to_vec()),
        ("another stream", ghost),
        ("what looks like a compression", gzip(b"content")),
    ] {
        let stream = [&whole[..], &rest].concat();
        for blob in [stream.clone(), gzip(&stream), zstd(&stream)] {
            let (names, exported) = through(&layers, &blob, &stream).unwrap();
            assert_eq!(names, FILES.map(|(name, _)| name), "{what}");
            assert!(exported == stream, "{what}");
        }
    }
}

/// What is no member and no frame is no part of the content either.
#[test]
fn what_follows_a_compressed_stream_is_refused() {
    let tmp = tempfile::tempdir().unwrap();
    let layers = open(tmp.path());
    let stream = parts(&FILES).concat();
    for compress in [gzip, zstd] {
        for rest in [&b"garbage"[..], &[0; 512]] {
            let blob = [&compress(&stream)[..], rest].concat();
            let refused = through(&layers, &blob, &stream).unwrap_err().to_string();
            assert!(refused.contains("cannot be decompressed"), "{refused}");
        }
    }
    assert_eq!(layers.list(), []);
    for dir in ["layers", "packs", "objects", "tmp"] {
        assert_eq!(
            fs::read_dir(tmp.path().join(dir)).unwrap().count(),
            0,
            "{dir}"
        );
    }
}
