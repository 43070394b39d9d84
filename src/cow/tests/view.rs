//! A union over a merged view of packed layers.

use std::io::Write;
use std::sync::Arc;

use super::*;
use crate::store::ingest::Settings;
use crate::store::layers::{Expected, Layers};
use crate::store::view::{Verify, View};

/// A store with one layer, and a union over its view.
struct Packed {
    base: tempfile::TempDir,
    view: Arc<View>,
}

impl Packed {
    fn new(fill: impl FnOnce(&mut tar::Builder<Vec<u8>>)) -> Self {
        let base = tempfile::tempdir().unwrap();
        let mut builder = tar::Builder::new(Vec::new());
        fill(&mut builder);
        let stream = builder.into_inner().unwrap();
        let settings = Settings {
            small: 10_000,
            ..Settings::default()
        };
        let (layers, _) = Layers::open(&base.path().join("store"), settings).unwrap();
        let expected = Expected::default();
        let layer = layers.import(stream.as_slice(), &expected, &()).unwrap();
        let view = Arc::new(layers.view(&[layer], Verify::First).unwrap());
        for name in ["upper", "work"] {
            std::fs::create_dir(base.path().join(name)).unwrap();
        }
        Self { base, view }
    }

    fn open(&self) -> Union {
        self.open_chunked(16 << 10)
    }

    /// Files of more bytes than `whole_up_to` come up in chunks.
    fn open_chunked(&self, whole_up_to: u64) -> Union {
        Union::open(UnionConfig {
            view: Some(Arc::clone(&self.view)),
            upper: Some(UpperConfig {
                dir: self.base.path().join("upper"),
                work: self.base.path().join("work"),
            }),
            volatile: true,
            chunking: Chunking {
                whole_up_to,
                ..Chunking::default()
            },
            ..UnionConfig::default()
        })
        .unwrap()
    }
}

fn file(builder: &mut tar::Builder<Vec<u8>>, path: &str, content: &[u8]) {
    let mut header = tar::Header::new_ustar();
    header.set_size(content.len() as u64);
    header.set_mode(0o644);
    builder.append_data(&mut header, path, content).unwrap();
}

fn find(union: &Union, path: &str) -> Entry {
    let mut entry = None;
    for name in Path::new(path) {
        let above = entry.map_or(NodeId::ROOT, |entry: Entry| entry.node);
        entry = Some(union.lookup(above, name).unwrap());
    }
    entry.unwrap()
}

fn read(union: &Union, path: &str) -> Vec<u8> {
    let mut buffer = vec![0; 1 << 20];
    let count = union
        .read(find(union, path).node, None, 0, &mut buffer)
        .unwrap();
    buffer.truncate(count);
    buffer
}

fn write(union: &Union, path: &str, offset: u64, data: &[u8]) {
    let node = find(union, path).node;
    let handle = union.open_file(node, libc::O_RDWR, &Caller::ROOT).unwrap();
    let count = union
        .write(node, Some(&handle), offset, data, None)
        .unwrap();
    assert_eq!(count, data.len());
    union.release(node, handle);
}

#[test]
fn identity_and_content_last_over_copy_up_and_remount() {
    let large: Vec<u8> = (0..100_000u32).flat_map(u32::to_le_bytes).collect();
    let packed = Packed::new(|builder| {
        file(builder, "d/a", b"small");
        file(builder, "large", &large);
        let mut link = tar::Header::new_ustar();
        link.set_entry_type(tar::EntryType::Link);
        link.set_mode(0o644);
        link.set_size(0);
        builder.append_link(&mut link, "d/hard", "d/a").unwrap();
        builder.get_mut().flush().unwrap();
    });
    let numbers =
        |union: &Union| ["d", "d/a", "d/hard", "large"].map(|path| find(union, path).attr.ino);
    let union = packed.open();
    let before = numbers(&union);
    assert_eq!(before[1], before[2]);
    assert_eq!(find(&union, "d/a").attr.nlink, 2);
    write(&union, "d/hard", 0, b"SM");
    write(&union, "large", 300_000, b"middle");
    let mut expected = large.clone();
    expected[300_000..300_006].copy_from_slice(b"middle");
    // Twice: as it is served, and as the next mount finds it.
    let mut served = Some(union);
    for _ in 0..2 {
        let union = served.take().unwrap_or_else(|| packed.open());
        assert_eq!(numbers(&union), before);
        assert_eq!(read(&union, "d/a"), b"SMall");
        assert_eq!(read(&union, "d/hard"), b"SMall");
        assert!(read(&union, "large") == expected);
    }
    let union = packed.open();
    union
        .unlink(find(&union, "d").node, OsStr::new("a"))
        .unwrap();
    union
        .rename(
            NodeId::ROOT,
            OsStr::new("d"),
            NodeId::ROOT,
            OsStr::new("e"),
            RenameMode::Replace,
        )
        .unwrap();
    drop(union);
    let union = packed.open();
    assert_eq!(read(&union, "e/hard"), b"SMall");
    assert_eq!(find(&union, "e/hard").attr.ino, before[1]);
    let gone = union.lookup(find(&union, "e").node, OsStr::new("a"));
    assert!(gone.is_err_and(|error| error.errno == libc::ENOENT));
    // The layer is what it was.
    let root = packed.view.inode(View::ROOT).unwrap();
    assert!(packed.view.lookup(&root, b"d").unwrap().is_some());
}

#[test]
fn attributes_that_look_like_marks_are_attributes() {
    let packed = Packed::new(|builder| {
        let name = "SCHILY.xattr.user.overlay.opaque";
        builder.append_pax_extensions([(name, &b"y"[..])]).unwrap();
        file(builder, "a", b"");
    });
    for family in [XattrFamily::Trusted, XattrFamily::User] {
        let union = Union::open(UnionConfig {
            view: Some(Arc::clone(&packed.view)),
            xattr_family: family,
            ..UnionConfig::default()
        });
        let union = union.unwrap();
        let node = find(&union, "a").node;
        let name = OsStr::new("user.overlay.opaque");
        assert_eq!(union.listxattr(node).unwrap(), [name]);
        assert_eq!(union.getxattr(node, name).unwrap(), b"y");
        let other = OsStr::new("user.overlay.redirect");
        let missing = union.getxattr(node, other).unwrap_err();
        assert_eq!(missing.errno, libc::ENODATA);
    }
}

#[test]
fn damage_is_an_error_of_that_file_that_names_it() {
    let packed = Packed::new(|builder| {
        file(builder, "d/bad", &[b'b'; 20_000]);
        file(builder, "good", &[b'g'; 20_000]);
    });
    let name = blake3::hash(&[b'b'; 20_000]).to_hex();
    let object = format!("store/objects/{}/{name}", &name[..2]);
    let object = packed.base.path().join(object);
    let mut stored = std::fs::read(&object).unwrap();
    *stored.last_mut().unwrap() ^= 1;
    std::fs::write(&object, stored).unwrap();
    let union = packed.open_chunked(1 << 20);
    assert_eq!(read(&union, "good"), [b'g'; 20_000]);
    let node = find(&union, "d/bad").node;
    let read = union.read(node, None, 0, &mut [0; 10]).unwrap_err();
    // What was copied up said only the last part of the path.
    let written = union.open_file(node, libc::O_RDWR, &Caller::ROOT);
    let layer = packed.view.layer(0).unwrap().to_string();
    for error in [read, written.err().unwrap()] {
        assert_eq!(error.errno, libc::EIO);
        let text = error.to_string();
        assert!(
            text.contains("/d/bad of the layer") && text.contains(&layer),
            "{text}"
        );
    }
}

/// As long as the kernel knew a file that was read once, its content was held.
#[test]
fn a_small_content_is_held_while_somebody_has_the_file_open() {
    let large = vec![7; 20_000];
    let packed = Packed::new(|builder| {
        file(builder, "small", b"text");
        file(builder, "large", &large);
    });
    let union = packed.open();
    for (name, stays) in [("small", false), ("large", true)] {
        let node = union.lookup(NodeId::ROOT, OsStr::new(name)).unwrap().node;
        let is_held = || union.node(node).unwrap().io.get().is_some();
        let open = || {
            let opened = union.open_file(node, libc::O_RDONLY, &Caller::ROOT);
            opened.unwrap()
        };
        let (first, second) = (open(), open());
        let mut buffer = [0; 4];
        union.read(node, Some(&first), 0, &mut buffer).unwrap();
        assert!(is_held(), "{name}");
        union.release(node, first);
        assert!(is_held(), "{name}");
        union.release(node, second);
        // Of a large one it is a descriptor.
        assert_eq!(is_held(), stays, "{name}");
    }
}

/// The other names of a file are found by what the view says, not by a walk over all directories.
#[test]
fn links_of_a_view_are_settled_wherever_their_directories_have_come() {
    let packed = Packed::new(|builder| {
        file(builder, "a/x", b"before");
        for path in [
            "a/deep/y",
            "b/z",
            "c/hidden",
            "e/gone/w",
            "only/below/v",
            "same/u",
        ] {
            let mut link = tar::Header::new_ustar();
            link.set_entry_type(tar::EntryType::Link);
            link.set_mode(0o644);
            link.set_size(0);
            builder.append_link(&mut link, path, "a/x").unwrap();
        }
        file(builder, "b/other", b"");
    });
    let union = packed.open();
    let node = |path: &str| match path {
        "" => NodeId::ROOT,
        path => find(&union, path).node,
    };
    write(&union, "a/x", 0, b"after!");
    let made = union.mkdir(NodeId::ROOT, OsStr::new("new"), 0o755, &Caller::ROOT);
    let new = made.unwrap().node;
    for (from, name, to, new_name) in [("a", "deep", new, "inner"), ("", "b", node("a"), "b2")] {
        let (name, new_name) = (OsStr::new(name), OsStr::new(new_name));
        union
            .rename(node(from), name, to, new_name, RenameMode::Replace)
            .unwrap();
    }
    union.unlink(node("c"), OsStr::new("hidden")).unwrap();
    union.unlink(node("e/gone"), OsStr::new("w")).unwrap();
    union.rmdir(node("e"), OsStr::new("gone")).unwrap();
    let again = union.mkdir(node("e"), OsStr::new("gone"), 0o755, &Caller::ROOT);
    again.unwrap();
    // In the upper already, but for the file.
    let made = union.mkdir(node("same"), OsStr::new("made"), 0o755, &Caller::ROOT);
    made.unwrap();
    union.settle_links().unwrap();
    drop(union);

    // Without the work directory nothing but the upper tells.
    let union = Union::open(UnionConfig {
        lowers: vec![packed.base.path().join("upper")],
        view: Some(Arc::clone(&packed.view)),
        ..UnionConfig::default()
    });
    let union = union.unwrap();
    for path in ["a/x", "new/inner/y", "a/b2/z", "only/below/v", "same/u"] {
        assert_eq!(read(&union, path), b"after!", "{path}");
    }
    for path in ["c/hidden", "e/gone/w", "a/deep", "b"] {
        let (above, name) = path.rsplit_once('/').unwrap_or(("", path));
        let above = match above {
            "" => NodeId::ROOT,
            above => find(&union, above).node,
        };
        assert!(union.lookup(above, OsStr::new(name)).is_err(), "{path}");
    }
}

/// What was opened of a file was kept, and what was found out about its content, after the content was mended.
#[test]
fn a_refreshed_union_reads_and_compares_once_more() {
    let mut noise = vec![0; 200_000];
    blake3::Hasher::new().finalize_xof().fill(&mut noise);
    let packed = Packed::new(|builder| {
        file(builder, "large", &noise);
        file(builder, "partly", &noise[1..]);
        file(builder, "written", b"old");
    });
    let union = packed.open();
    write(&union, "written", 0, b"new");
    write(&union, "partly", 0, b"new");
    let mut partly = noise[1..].to_vec();
    partly[..3].copy_from_slice(b"new");
    assert!(read(&union, "large") == noise && read(&union, "partly") == partly);
    let mut objects = Vec::new();
    for entry in std::fs::read_dir(packed.base.path().join("store/objects")).unwrap() {
        for entry in std::fs::read_dir(entry.unwrap().path()).unwrap() {
            objects.push(entry.unwrap().path());
        }
    }
    assert_eq!(objects.len(), 2);
    let flip = || {
        for path in &objects {
            let mut bytes = std::fs::read(path).unwrap();
            // Past the first chunk of each.
            let at = bytes
                .windows(32)
                .position(|window| *window == noise[150_000..150_032]);
            bytes[at.unwrap() + 50] ^= 1;
            std::fs::write(path, bytes).unwrap();
        }
    };
    flip();
    assert!(read(&union, "large") != noise && read(&union, "partly") != partly);
    let nodes = union.refresh();
    for (path, shows) in [("large", true), ("partly", true), ("written", false)] {
        assert_eq!(nodes.contains(&find(&union, path).node), shows, "{path}");
    }
    for path in ["large", "partly"] {
        let node = find(&union, path).node;
        let mut buffer = vec![0; noise.len()];
        let error = union.read(node, None, 0, &mut buffer).unwrap_err();
        assert_eq!(error.errno, libc::EIO, "{path}: {error}");
    }
    flip();
    assert!(read(&union, "large") == noise && read(&union, "partly") == partly);
}
