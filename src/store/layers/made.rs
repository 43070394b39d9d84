//! Tests of layers that are made of entries.

use std::fs;
use std::path::Path;

use crate::store::error::{Error, Result};
use crate::store::format::tables::Object;
use crate::store::format::{ObjectName, Time};
use crate::store::ingest::{NewLayer, Settings};
use crate::store::layer::index::{Attributes, Body};
use crate::store::layers::{Expected, Layers, Made};
use crate::store::view::{Verify, View};
use crate::store::{Extent, LayerName};

fn open(dir: &Path) -> Layers {
    let settings = Settings {
        small: 4096,
        workers: 2,
        ..Settings::default()
    };
    Layers::open(dir, settings).unwrap().0
}

fn attributes(kind: u32, xattrs: &[(&str, &str)]) -> Attributes {
    let pair = |(name, value): &(&str, &str)| (name.as_bytes().to_vec(), value.as_bytes().to_vec());
    Attributes {
        mode: kind as u16 | 0o1750,
        uid: 3,
        gid: 4,
        mtime: Time { sec: -5, nsec: 6 },
        atime: Time::default(),
        xattrs: xattrs.iter().map(pair).collect(),
    }
}

fn make(layers: &Layers, fill: impl Fn(&mut NewLayer<'_, '_>) -> Result<()>) -> Made {
    layers.make(fill).unwrap()
}

/// A file, a name of it, a socket, a file in parts of two objects, and what is gone, in a directory below the root.
fn fill(layer: &mut NewLayer<'_, '_>) -> Result<()> {
    layer.make(
        &[],
        &attributes(libc::S_IFDIR, &[("user.root", "1")]),
        &Body::Nothing,
    )?;
    layer.make(&[b"dir"], &attributes(libc::S_IFDIR, &[]), &Body::Nothing)?;
    let mut numbers = Vec::new();
    for content in [&b"small"[..], &[7; 10_000]] {
        let mut new = layer.begin(content.len() as u64)?;
        new.write(content)?;
        numbers.push(layer.end(new)?);
    }
    let file = attributes(libc::S_IFREG, &[("user.name", "value"), ("trusted.x", "y")]);
    let whole = Body::Whole {
        size: 5,
        content: numbers[0],
    };
    layer.make(&[b"dir", b"file"], &file, &whole)?;
    layer.link(&[b"dir", b"name"], &file, b"dir/file")?;
    let extent = |offset, length, object_offset, object| Extent {
        offset,
        length,
        object_offset,
        object,
    };
    let parts = Body::Sparse {
        size: 30_000,
        extents: vec![
            extent(0, 5000, 1000, numbers[1]),
            extent(5000, 5, 0, numbers[0]),
            extent(20_000, 1000, 0, numbers[1]),
        ],
    };
    layer.make(&[b"dir", b"parts"], &attributes(libc::S_IFREG, &[]), &parts)?;
    layer.make(
        &[b"dir", b"socket"],
        &attributes(libc::S_IFSOCK, &[]),
        &Body::Nothing,
    )?;
    layer.remove(&[b"gone"])
}

fn view(layers: &Layers, chain: &[LayerName]) -> View {
    layers.view(chain, Verify::Always).unwrap()
}

fn find(view: &View, path: &str) -> Option<u32> {
    let mut number = View::ROOT;
    for name in path.split('/') {
        let inode = view.inode(number).unwrap();
        number = view.lookup(&inode, name.as_bytes()).unwrap()?.inode;
    }
    Some(number)
}

fn names(view: &View, number: u32) -> Vec<String> {
    let xattrs = view.inode(number).unwrap();
    let xattrs = view.xattrs(&xattrs).unwrap();
    xattrs
        .into_iter()
        .map(|(name, _)| String::from_utf8(name.to_vec()).unwrap())
        .collect()
}

#[test]
fn a_layer_of_entries_says_what_a_stream_cannot() {
    let tmp = tempfile::tempdir().unwrap();
    let layers = open(tmp.path());
    let base = make(&layers, |layer| {
        let two = attributes(libc::S_IFDIR, &[("user.a", "1"), ("user.b", "2")]);
        layer.make(&[b"dir"], &two, &Body::Nothing)?;
        layer.make(&[b"gone"], &attributes(libc::S_IFIFO, &[]), &Body::Nothing)
    });
    let top = make(&layers, fill);
    assert_eq!((top.inodes, top.bytes), (5, 10_005));
    let shown = view(&layers, &[base.name, top.name]);
    assert_eq!(names(&shown, View::ROOT), ["user.root"]);
    let root = shown.inode(View::ROOT).unwrap();
    assert_eq!(
        (root.mode & 0o7777, root.uid, root.mtime.sec),
        (0o1750, 3, -5)
    );
    // Those of the layer below are gone.
    let dir = find(&shown, "dir").unwrap();
    assert_eq!(names(&shown, dir), [""; 0]);
    assert_eq!(find(&shown, "gone"), None);
    let socket = shown.inode(find(&shown, "dir/socket").unwrap()).unwrap();
    assert_eq!(socket.kind(), libc::S_IFSOCK);
    let file = find(&shown, "dir/file").unwrap();
    assert_eq!(find(&shown, "dir/name"), Some(file));
    assert_eq!(names(&shown, file), ["trusted.x", "user.name"]);
    let linked = shown.linked().unwrap();
    assert_eq!(linked[&file], [b"dir/file".to_vec(), b"dir/name".to_vec()]);
    let parts = shown.inode(find(&shown, "dir/parts").unwrap()).unwrap();
    let mut content = vec![1; 30_000];
    let opened = shown.open_file(&parts).unwrap();
    assert_eq!(opened.read_at(&mut content, 0).unwrap(), 30_000);
    let mut expected = vec![0; 30_000];
    expected[..5000].fill(7);
    expected[5000..5005].copy_from_slice(b"small");
    expected[20_000..21_000].fill(7);
    assert!(content == expected);

    // The same again is the same layer, whose files are left alone.
    let index = layers.index_path(top.name);
    let before = fs::metadata(&index).unwrap().modified().unwrap();
    assert_eq!(make(&layers, fill).name, top.name);
    assert_eq!(fs::metadata(&index).unwrap().modified().unwrap(), before);
}

#[test]
fn what_the_store_does_not_have_cannot_be_named() {
    let tmp = tempfile::tempdir().unwrap();
    let layers = open(tmp.path());
    let object = Object {
        name: ObjectName::of(b"nowhere"),
        size: 7,
    };
    let made = layers.make(|layer| layer.known(object).map(drop));
    assert!(matches!(made, Err(Error::NoObject { .. })));
    assert_eq!(layers.list(), []);
    assert_eq!(fs::read_dir(tmp.path().join("tmp")).unwrap().count(), 0);
}

#[test]
fn every_damaged_byte_of_a_layer_of_entries_is_an_error_or_changes_nothing() {
    let tmp = tempfile::tempdir().unwrap();
    let layers = open(tmp.path());
    let made = make(&layers, fill);
    let exported = |layers: &Layers| {
        let mut stream = Vec::new();
        layers.export(made.name, &mut stream).map(|()| stream)
    };
    let stream = exported(&layers).unwrap();
    assert!(exported(&layers).unwrap() == stream);
    // Without the root, the socket and what a stream does not carry, it is a layer as any other.
    let imported = layers.import(&*stream, &Expected::default(), &()).unwrap();
    let copy = view(&layers, &[imported]);
    assert_eq!(names(&copy, View::ROOT), [""; 0]);
    assert_eq!(find(&copy, "dir/socket"), None);
    let file = find(&copy, "dir/file").unwrap();
    assert_eq!(find(&copy, "dir/name"), Some(file));
    assert_eq!(names(&copy, file), ["user.name"]);

    let path = layers.index_path(made.name);
    let good = fs::read(&path).unwrap();
    for at in 0..good.len() {
        let mut bad = good.clone();
        bad[at] ^= 0x20;
        fs::write(&path, &bad).unwrap();
        match exported(&layers) {
            Ok(seen) => assert!(seen == stream, "byte {at}"),
            Err(Error::Damaged { .. } | Error::Unsupported { .. } | Error::Entry { .. }) => {}
            Err(error) => panic!("byte {at}: {error}"),
        }
    }
}
