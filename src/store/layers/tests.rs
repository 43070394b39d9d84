use std::os::unix::fs::{FileExt, symlink};
use std::process::Command;
use std::sync::atomic::{AtomicU64, Ordering};

use proptest::prelude::*;

use super::*;
use crate::store::format::ObjectName;
use crate::store::ingest::Limits;
use crate::store::layer::index::Action;

fn settings() -> Settings {
    Settings {
        small: 4096,
        workers: 2,
        ..Settings::default()
    }
}

fn open(dir: &Path) -> Layers {
    let (layers, damaged) = Layers::open(dir, settings()).unwrap();
    assert!(damaged.is_empty());
    layers
}

fn import(layers: &Layers, stream: &[u8]) -> Result<LayerName> {
    layers.import(stream, &Expected::default(), &())
}

fn exported(layers: &Layers, name: LayerName) -> Result<Vec<u8>> {
    let mut stream = Vec::new();
    layers.export(name, &mut stream)?;
    Ok(stream)
}

/// A stream of files with these names and contents.
fn files(files: &[(&str, &[u8])]) -> Vec<u8> {
    let mut builder = tar::Builder::new(Vec::new());
    for (name, content) in files {
        let mut header = tar::Header::new_ustar();
        header.set_size(content.len() as u64);
        header.set_mode(0o644);
        builder.append_data(&mut header, name, *content).unwrap();
    }
    builder.into_inner().unwrap()
}

fn gnu_tar(dir: &Path, arguments: &[&str]) -> Vec<u8> {
    let output = Command::new("tar")
        .args(["--create", "--file=-", "--numeric-owner"])
        .args(arguments)
        .arg("--directory")
        .arg(dir)
        .arg(".")
        .output()
        .unwrap();
    assert!(output.status.success(), "{output:?}");
    output.stdout
}

/// Every file below `dir`, with its length.
fn tree(dir: &Path) -> Vec<(PathBuf, u64)> {
    let mut found = Vec::new();
    let mut waiting = vec![dir.to_owned()];
    while let Some(dir) = waiting.pop() {
        for entry in fs::read_dir(dir).unwrap() {
            let entry = entry.unwrap();
            if entry.file_type().unwrap().is_dir() {
                waiting.push(entry.path());
            } else {
                found.push((entry.path(), entry.metadata().unwrap().len()));
            }
        }
    }
    found.sort();
    found
}

#[test]
fn a_layer_comes_back_bit_for_bit_from_every_compression() {
    let tmp = tempfile::tempdir().unwrap();
    let layers = open(tmp.path());
    let large = vec![b'l'; 10_000];
    let stream = files(&[
        ("a", b"small"),
        ("b", &large),
        ("c", b""),
        ("d", b"small"),
        (".wh.e", b"content of a whiteout"),
        ("a", b"again"),
    ]);
    let gzip = |data: &[u8]| {
        let mut encoder = flate2::write::GzEncoder::new(Vec::new(), flate2::Compression::fast());
        encoder.write_all(data).unwrap();
        encoder.finish().unwrap()
    };
    let (first, second) = stream.split_at(700);
    let mut names = Vec::new();
    for blob in [
        stream.clone(),
        [gzip(first), gzip(second)].concat(),
        [
            zstd::encode_all(first, 1).unwrap(),
            zstd::encode_all(second, 1).unwrap(),
            vec![0x50, 0x2a, 0x4d, 0x18, 3, 0, 0, 0, 1, 2, 3],
        ]
        .concat(),
    ] {
        use sha2::{Digest, Sha256};
        let digest = |bytes: &[u8]| sha256(&Sha256::digest(bytes).into());
        let (blob_digest, diff_id) = (digest(&blob), digest(&stream));
        let expected = Expected {
            blob: Some(&blob_digest),
            diff_id: Some(&diff_id),
        };
        let name = layers.import(blob.as_slice(), &expected, &()).unwrap();
        assert_eq!(
            layers.known(&Expected {
                diff_id: Some(&diff_id),
                blob: None
            }),
            Some(name)
        );
        assert_eq!(exported(&layers, name).unwrap(), stream);
        names.push(name);
    }
    assert_eq!(names[0], names[1]);
    assert_eq!(names[0], names[2]);
    let record = layers.get(names[0]).unwrap();
    assert_eq!((record.entries, record.objects), (6, 3));
    assert_eq!(record.content_bytes, 5 + 10_000 + 5);
    let index = layers.index(names[0]).unwrap();
    assert_eq!(index.entry(4).unwrap().action, Action::Remove);
    assert_eq!(index.path(index.entry(4).unwrap().path).unwrap(), [b"e"]);
    drop(layers);
    let layers = open(tmp.path());
    assert_eq!(layers.get(names[0]), Some(record));
    assert_eq!(exported(&layers, names[0]).unwrap(), stream);
    assert!(layers.remove(names[0]).unwrap());
    assert!(matches!(
        exported(&layers, names[0]),
        Err(Error::NoLayer { .. })
    ));
}

#[test]
fn a_content_is_kept_once_for_all_layers() {
    let tmp = tempfile::tempdir().unwrap();
    let layers = open(tmp.path());
    let large: Vec<u8> = (0..40_000u32).flat_map(u32::to_le_bytes).collect();
    let small = &large[..3000];
    let first = files(&[("a", &large), ("b", small), ("c", &large), ("d", small)]);
    import(&layers, &first).unwrap();
    let contents = |dir: &Path| {
        let of = |name: &str| tree(&dir.join(name)).len();
        (of("objects"), of("packs"))
    };
    assert_eq!(contents(tmp.path()), (1, 1));
    let second = files(&[("other", &large), ("one", small)]);
    import(&layers, &second).unwrap();
    // Not even a pack is made for a layer without anything new.
    assert_eq!(contents(tmp.path()), (1, 1));
    // Also what was found when the store was opened.
    drop(layers);
    let layers = open(tmp.path());
    let third = files(&[("x", small), ("y", b"new")]);
    let name = import(&layers, &third).unwrap();
    assert_eq!(contents(tmp.path()), (1, 2));
    let packs = tree(&tmp.path().join("packs"));
    assert!(packs.iter().any(|(_, bytes)| *bytes < 400));
    assert_eq!(exported(&layers, name).unwrap(), third);
}

#[test]
fn sparse_files_of_all_forms_are_taken_without_their_holes() {
    let source = tempfile::tempdir().unwrap();
    let file = File::create(source.path().join("sparse")).unwrap();
    file.set_len(20 << 20).unwrap();
    file.write_all_at(&[1; 5000], 1 << 20).unwrap();
    file.write_all_at(&[2; 5000], 10 << 20).unwrap();
    let tmp = tempfile::tempdir().unwrap();
    let layers = open(tmp.path());
    for arguments in [
        &["--format=gnu", "--sparse"][..],
        &["--format=pax", "--sparse", "--sparse-version=0.0"],
        &["--format=pax", "--sparse", "--sparse-version=0.1"],
        &["--format=pax", "--sparse", "--sparse-version=1.0"],
    ] {
        let stream = gnu_tar(source.path(), arguments);
        let name = import(&layers, &stream).unwrap();
        assert_eq!(exported(&layers, name).unwrap(), stream, "{arguments:?}");
        let index = layers.index(name).unwrap();
        let file = (0..index.len())
            .map(|number| index.entry(number).unwrap())
            .find(|entry| entry.inode.kind() == libc::S_IFREG)
            .unwrap();
        assert_eq!(file.inode.size, 20 << 20);
        let extents = index.extents(&file.inode).unwrap();
        assert!(extents.len() >= 2 && extents[0].offset <= 1 << 20);
        assert!(extents.iter().map(|extent| extent.length).sum::<u64>() < 40_000);
    }
}

#[test]
fn what_cannot_be_taken_leaves_nothing() {
    let tmp = tempfile::tempdir().unwrap();
    let layers = open(tmp.path());
    let before = tree(tmp.path());
    let large = vec![7; 10_000];
    let good = files(&[("a", b"small"), ("b", &large)]);
    let refuse = |stream: &[u8], expected: &Expected<'_>, words: &str| {
        let error = layers
            .import(stream, expected, &())
            .unwrap_err()
            .to_string();
        assert!(error.contains(words), "{error}");
        assert_eq!(tree(tmp.path()), before, "{error}");
        assert!(layers.list().is_empty());
    };
    let none = Expected::default();
    let digest = format!("sha256:{}", "0".repeat(64));
    let blob = Expected {
        blob: Some(&digest),
        diff_id: None,
    };
    refuse(&good, &blob, "blob of the layer has the digest");
    let diff_id = Expected {
        blob: None,
        diff_id: Some(&digest),
    };
    refuse(&good, &diff_id, "content of the layer has the digest");
    refuse(
        &good[..5000],
        &none,
        "b: the stream ends within its content",
    );
    let mut device = tar::Header::new_ustar();
    device.set_path("null").unwrap();
    device.set_entry_type(tar::EntryType::Char);
    device.set_size(0);
    device.set_device_major(0).unwrap();
    device.set_device_minor(0).unwrap();
    device.set_cksum();
    let bad = [&good[..good.len() - 1024], device.as_bytes()].concat();
    refuse(&bad, &none, "null: it is the character device 0:0");
    let zstd = zstd::encode_all(good.as_slice(), 1).unwrap();
    refuse(&zstd[..zstd.len() - 3], &none, "cannot be decompressed");
    refuse(b"\x1f\x8bgarbage", &none, "cannot be decompressed");
    refuse(&[b'x'; 600], &none, "checksum");
}

#[test]
fn limits_hold() {
    let tmp = tempfile::tempdir().unwrap();
    let limited = |limits: Limits| {
        let settings = Settings {
            limits,
            ..settings()
        };
        let (layers, _) = Layers::open(tmp.path(), settings).unwrap();
        let stream = files(&[("a", &[1; 3000]), ("b", &[2; 3000]), ("c", &[3; 3000])]);
        import(&layers, &stream).map_err(|error| error.to_string())
    };
    let all = Limits::default();
    assert!(
        limited(Limits { entries: 2, ..all })
            .unwrap_err()
            .contains("more than 2 entries")
    );
    assert!(
        limited(Limits { names: 1, ..all })
            .unwrap_err()
            .contains("names")
    );
    assert!(
        limited(Limits { bytes: 5000, ..all })
            .unwrap_err()
            .contains("5000 bytes")
    );
    assert!(limited(Limits { entries: 3, ..all }).is_ok());
    // What the last entry brings counts, too.
    let last = |limits: Limits, path: &str| {
        let settings = Settings {
            limits,
            ..settings()
        };
        let (layers, _) = Layers::open(tmp.path(), settings).unwrap();
        import(&layers, &files(&[(path, &[])])).map_err(|error| error.to_string())
    };
    let deep = "a/b/c/d/e/f";
    let refused = last(Limits { entries: 5, ..all }, deep).unwrap_err();
    assert!(refused.contains("more than 5 entries"), "{refused}");
    assert!(last(Limits { entries: 6, ..all }, deep).is_ok());
    let refused = last(Limits { names: 5, ..all }, deep).unwrap_err();
    assert!(refused.contains("names"), "{refused}");
    assert!(last(Limits { names: 64, ..all }, deep).is_ok());
}

#[test]
fn an_index_does_not_grow_without_end() {
    // Only names counted once: a blob of a few megabytes had plyd fill the host's memory with attributes that differ in
    // a byte, or with the maps of files that are nearly all holes.
    let tmp = tempfile::tempdir().unwrap();
    let settings = Settings {
        limits: Limits {
            names: 100_000,
            ..Limits::default()
        },
        ..settings()
    };
    let (layers, _) = Layers::open(tmp.path(), settings).unwrap();
    let refused = |add: &dyn Fn(&mut tar::Builder<Vec<u8>>, u32)| {
        let mut builder = tar::Builder::new(Vec::new());
        for number in 0..8 {
            add(&mut builder, number);
            let mut header = tar::Header::new_ustar();
            header.set_size(1000);
            builder
                .append_data(&mut header, "f", [7; 1000].as_slice())
                .unwrap();
        }
        let error = import(&layers, &builder.into_inner().unwrap()).unwrap_err();
        assert!(error.to_string().contains("names in the layer"), "{error}");
    };
    refused(&|builder, number| {
        let value = format!("{number}{}", "v".repeat(30_000));
        let xattr = ("SCHILY.xattr.user.x", value.as_bytes());
        builder.append_pax_extensions([xattr]).unwrap();
    });
    refused(&|builder, _| {
        let map: Vec<String> = (0..1000).map(|part| format!("{},1", 5 * part)).collect();
        let records = [
            ("GNU.sparse.size", "5000".to_owned()),
            ("GNU.sparse.map", map.join(",")),
        ];
        let records = records.iter().map(|(key, value)| (*key, value.as_bytes()));
        builder.append_pax_extensions(records).unwrap();
    });
}

/// Cancels when something was read, and remembers what it was told.
#[derive(Default)]
struct Impatient(AtomicU64);

impl Observer for Impatient {
    fn progress(&self, bytes: u64) {
        self.0.store(bytes, Ordering::Relaxed);
    }

    fn cancelled(&self) -> bool {
        self.0.load(Ordering::Relaxed) != 0
    }
}

#[test]
fn an_import_can_be_cancelled() {
    let tmp = tempfile::tempdir().unwrap();
    let layers = open(tmp.path());
    let content = vec![5; 8 << 20];
    let stream = files(&[("a", &content), ("b", &content)]);
    let observer = Impatient::default();
    let error = layers
        .import(stream.as_slice(), &Expected::default(), &observer)
        .unwrap_err();
    assert!(matches!(error, Error::Cancelled), "{error}");
    assert!(observer.0.load(Ordering::Relaxed) > 0);
    assert!(tree(&tmp.path().join("tmp")).is_empty());
}

#[test]
fn every_damaged_byte_of_a_store_is_an_error_or_changes_nothing() {
    let tmp = tempfile::tempdir().unwrap();
    let layers = open(tmp.path());
    let large: Vec<u8> = (0..1200u32).flat_map(u32::to_le_bytes).collect();
    let stream = files(&[
        ("directory/a", b"small"),
        ("b", &b"words ".repeat(50)),
        ("c", &large),
    ]);
    let name = import(&layers, &stream).unwrap();
    drop(layers);
    for (path, _) in tree(tmp.path()) {
        let good = fs::read(&path).unwrap();
        // The large object is one hash; each of its bytes is as good as any other.
        let step = if path.starts_with(tmp.path().join("objects")) {
            97
        } else {
            1
        };
        for at in (0..good.len()).step_by(step) {
            let mut bad = good.clone();
            bad[at] ^= 0x20;
            fs::write(&path, &bad).unwrap();
            let (layers, damaged) = Layers::open(tmp.path(), settings()).unwrap();
            match exported(&layers, name) {
                Ok(seen) => assert!(seen == stream, "{} byte {at}", path.display()),
                Err(error) => assert!(
                    !damaged.is_empty()
                        || matches!(
                            error,
                            Error::Damaged { .. }
                                | Error::Unsupported { .. }
                                | Error::NoLayer { .. }
                                | Error::Entry { .. }
                        ),
                    "{} byte {at}: {error}",
                    path.display()
                ),
            }
        }
        fs::write(&path, &good).unwrap();
    }
    assert_eq!(exported(&open(tmp.path()), name).unwrap(), stream);
}

#[test]
fn what_a_crash_left_is_cleared_and_the_layers_stay() {
    let tmp = tempfile::tempdir().unwrap();
    let layers = open(tmp.path());
    let stream = files(&[("a", b"content")]);
    let name = import(&layers, &stream).unwrap();
    drop(layers);
    fs::write(tmp.path().join("tmp/object-1"), b"half").unwrap();
    // A pack that was renamed before it was whole cannot be; one that is cut off all the same is
    // used as far as it goes.
    let (pack, bytes) = tree(&tmp.path().join("packs")).remove(0);
    let file = OpenOptions::new().write(true).open(&pack).unwrap();
    file.set_len(bytes - 100).unwrap();
    let layers = open(tmp.path());
    assert!(tree(&tmp.path().join("tmp")).is_empty());
    assert_eq!(exported(&layers, name).unwrap(), stream);
    // An object that is lost is brought back by the next import that has it.
    drop(layers);
    file.set_len(80).unwrap();
    let layers = open(tmp.path());
    assert!(exported(&layers, name).is_err());
    assert_eq!(import(&layers, &stream).unwrap(), name);
    assert_eq!(exported(&layers, name).unwrap(), stream);
    let object = ObjectName::of(b"content");
    assert!(layers.objects().find(&object).unwrap().is_some());
}

#[derive(Clone, Debug)]
enum Thing {
    File(Vec<u8>),
    Sparse(Vec<(u8, u16)>),
    Directory,
    Symlink(String),
    HardLink,
}

fn things() -> impl Strategy<Value = Vec<(Vec<u8>, Thing)>> {
    let name = prop_oneof![
        4 => "[a-d]{1,2}".prop_map(String::into_bytes),
        1 => "[x-z]{200}".prop_map(String::into_bytes),
    ];
    let path = prop::collection::vec(name, 1..4).prop_map(|names| names.join(&b'/'));
    let thing = prop_oneof![
        4 => prop::collection::vec(any::<u8>(), 0..6000).prop_map(Thing::File),
        1 => any::<u8>().prop_map(|byte| Thing::File(vec![byte; 20_000])),
        2 => prop::collection::vec((any::<u8>(), 1..9000u16), 0..5).prop_map(Thing::Sparse),
        2 => Just(Thing::Directory),
        1 => "[a-z/.]{1,150}".prop_map(Thing::Symlink),
        2 => Just(Thing::HardLink),
    ];
    prop::collection::vec((path, thing), 0..25)
}

fn make(dir: &Path, things: &[(Vec<u8>, Thing)]) {
    use std::ffi::OsStr;
    use std::os::unix::ffi::OsStrExt;
    let mut last = None;
    for (at, (path, thing)) in things.iter().enumerate() {
        let path = dir.join(OsStr::from_bytes(path));
        // What is in the way stays: the tree is random anyway. A link in the way would lead out of it.
        let mut way = path.ancestors().take_while(|above| *above != dir);
        let leads_away = way.any(|above| above.is_symlink());
        if leads_away || path.exists() || fs::create_dir_all(path.parent().unwrap()).is_err() {
            continue;
        }
        let made = match thing {
            Thing::File(content) => fs::write(&path, content),
            Thing::Sparse(parts) => File::create(&path).and_then(|file| {
                file.set_len(3 << 20)?;
                parts.iter().try_for_each(|(at, length)| {
                    file.write_all_at(&vec![7; usize::from(*length)], u64::from(*at) << 13)
                })
            }),
            Thing::Directory => fs::create_dir(&path),
            Thing::Symlink(target) => symlink(target, &path),
            Thing::HardLink => match &last {
                Some(last) => fs::hard_link(last, &path),
                None => continue,
            },
        };
        if made.is_ok() && matches!(thing, Thing::File(_) | Thing::Sparse(_)) {
            if at % 3 == 0 {
                xattr::set(&path, format!("user.{at}"), &[at as u8; 40]).unwrap();
            }
            last = Some(path);
        }
    }
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 24, ..ProptestConfig::default() })]

    #[test]
    fn random_trees_come_back_bit_for_bit(first in things(), second in things()) {
        let tmp = tempfile::tempdir().unwrap();
        let layers = open(&tmp.path().join("store"));
        for (number, things) in [first, second].iter().enumerate() {
            let source = tmp.path().join(number.to_string());
            fs::create_dir(&source).unwrap();
            make(&source, things);
            for arguments in [
                &["--format=gnu"][..],
                &["--format=gnu", "--sparse"],
                &["--format=pax", "--sparse", "--xattrs"],
            ] {
                let stream = gnu_tar(&source, arguments);
                let name = import(&layers, &stream).unwrap();
                prop_assert!(exported(&layers, name).unwrap() == stream);
                layers.index(name).unwrap().verify().unwrap();
            }
        }
    }
}
