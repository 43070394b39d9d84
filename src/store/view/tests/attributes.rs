//! Extended attributes that an object cannot have.

use super::*;
use crate::store::layer::index::LayerIndex;
use crate::store::view::tree::Tree;

const ACL: &str = "system.posix_acl_access";
const DEFAULT_ACL: &str = "system.posix_acl_default";

/// An ACL of these tags and permissions.
fn acl(version: u8, entries: &[(u16, u16)]) -> Vec<u8> {
    let mut acl = vec![version, 0, 0, 0];
    for (tag, perm) in entries {
        acl.extend(tag.to_le_bytes());
        acl.extend(perm.to_le_bytes());
        // Users and groups have a number, the others have none.
        let id = if matches!(tag, 2 | 8) { 7 } else { u32::MAX };
        acl.extend(id.to_le_bytes());
    }
    acl
}

fn names(view: &View, path: &str) -> Vec<String> {
    let inode = at(view, path).1;
    let xattrs = view.xattrs(&inode).unwrap();
    let name = |(name, _): &(&[u8], &[u8])| String::from_utf8_lossy(name).into_owned();
    xattrs.iter().map(name).collect()
}

#[test]
fn what_an_object_cannot_have_is_not_shown_and_costs_no_image() {
    let fixture = Fixture::new();
    let good = acl(2, &[(1, 6), (2, 7), (4, 4), (8, 1), (16, 7), (32, 4)]);
    let stream = || {
        Stream::new()
            .xattrs(&[("user.a", b"1"), ("security.x", b"2"), (ACL, &good)])
            .link("link", "file")
            .xattrs(&[("user.a", b"1"), ("security.x", b"2"), (ACL, &good)])
            .entry(tar::EntryType::Fifo, "fifo", b"", |_| {})
            .xattrs(&[
                ("user.a", b"1"),
                ("foo.bar", b"1"),
                ("user", b"1"),
                ("user.", b"1"),
                ("system.other", b"1"),
                ("btrfs.compression", b"zstd"),
                (ACL, &good),
                (DEFAULT_ACL, &good),
            ])
            .file("file", "")
            .xattrs(&[(ACL, &good), (DEFAULT_ACL, &good)])
            .dir("dir")
    };
    let view = fixture.view(vec![stream()]);
    assert_eq!(names(&view, "link"), ["security.x"]);
    assert_eq!(names(&view, "fifo"), ["security.x", ACL]);
    assert_eq!(names(&view, "file"), [ACL, "user.a"]);
    assert_eq!(names(&view, "dir"), [ACL, DEFAULT_ACL]);
    // The layer keeps what its stream says.
    let bytes = stream().0.into_inner().unwrap();
    let mut exported = Vec::new();
    let name = fixture.import(stream());
    fixture.layers.export(name, &mut exported).unwrap();
    assert!(exported == bytes);
}

#[test]
fn the_first_that_is_left_out_is_told_with_their_number_once_for_its_layer() {
    let fixture = Fixture::new();
    let link = |name: &str| {
        Stream::new()
            .xattrs(&[("user.a", b"1"), ("foo.bar", b"1")])
            .link(name, "target")
    };
    let mut tree = Tree::new();
    let mut told = |stream: Stream, number: u16| {
        let name = fixture.import(stream);
        let path = fixture
            .dir
            .path()
            .join("layers")
            .join(format!("{name}.index"));
        let index = LayerIndex::open(&path, name).unwrap();
        tree.apply(&index, number).unwrap();
        let left_out = tree.left_out();
        left_out.map(|first| (first.path.clone(), first.attribute.clone(), first.count))
    };
    let first = |path: &str| Some((path.to_owned(), "foo.bar".to_owned(), 2));
    assert_eq!(told(link("one"), 0), first("one"));
    assert_eq!(told(Stream::new().file("f", ""), 1), None);
    assert_eq!(told(link("two"), 2), first("two"));
}

#[test]
fn an_acl_that_is_none_is_not_shown() {
    let fixture = Fixture::new();
    let whole = [(1, 6), (2, 7), (4, 4), (8, 1), (16, 7), (32, 4)];
    let without = |tag: u16| -> Vec<(u16, u16)> {
        let entries = whole.iter().copied();
        entries.filter(|entry| entry.0 != tag).collect()
    };
    let mut swapped = whole.to_vec();
    swapped.swap(1, 2);
    let mut nobody = acl(2, &whole);
    nobody[16..20].fill(0xff);
    let good = acl(2, &whole);
    let bad = [
        b"junk".to_vec(),
        b"ju".to_vec(),
        acl(1, &whole),
        good[..good.len() - 1].to_vec(),
        acl(2, &without(1)),
        acl(2, &without(4)),
        acl(2, &without(16)),
        acl(2, &without(32)),
        acl(2, &swapped),
        acl(2, &[(1, 8), (4, 4), (32, 4)]),
        acl(2, &[(1, 6), (4, 4), (64, 4), (32, 4)]),
        acl(2, &[(1, 6), (4, 4), (32, 4), (32, 4)]),
        nobody,
    ];
    for acl in &bad {
        let view = fixture.view(vec![Stream::new().xattrs(&[(ACL, acl)]).file("f", "")]);
        assert_eq!(names(&view, "f"), [""; 0], "{acl:?}");
    }
    let least = acl(2, &[(1, 6), (4, 4), (32, 4)]);
    for acl in [&good, &least] {
        let view = fixture.view(vec![Stream::new().xattrs(&[(ACL, acl)]).file("f", "")]);
        assert_eq!(names(&view, "f"), [ACL]);
    }
    // One without entries takes away what a directory had.
    let had = Stream::new().xattrs(&[(DEFAULT_ACL, &least)]).dir("d");
    let none = Stream::new()
        .xattrs(&[(DEFAULT_ACL, &acl(2, &[]))])
        .dir("d");
    assert_eq!(names(&fixture.view(vec![had, none]), "d"), [""; 0]);
}

#[test]
fn capabilities_that_are_none_are_refused() {
    let fixture = Fixture::new();
    let refused = |value: &[u8]| {
        let stream = Stream::new().xattrs(&[("security.capability", value)]);
        let bytes = stream.file("ping", "").0.into_inner().unwrap();
        let imported = fixture
            .layers
            .import(bytes.as_slice(), &Expected::default(), &());
        imported.err().map(|error| error.to_string())
    };
    let capability = |magic: u32, bytes: usize| {
        let mut value = magic.to_le_bytes().to_vec();
        value.resize(bytes, 0);
        value
    };
    for (magic, bytes) in [(0x0200_0001, 20), (0x0200_0000, 20), (0x0300_0001, 24)] {
        assert_eq!(refused(&capability(magic, bytes)), None);
    }
    for bad in [
        b"junk".to_vec(),
        Vec::new(),
        capability(0x0100_0001, 12),
        capability(0x0200_0001, 24),
        capability(0x0300_0001, 20),
        capability(0x0200_0002, 20),
        capability(0x0200_0001, 19),
    ] {
        let problem = refused(&bad).unwrap();
        assert!(
            problem.contains("ping: its extended attribute security.capability"),
            "{problem}"
        );
    }
}
