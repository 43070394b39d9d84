//! Indexes of layers, and views.

use std::fs;
use std::ops::Range;
use std::path::Path;

use sha2::{Digest, Sha256};

use super::page::{Table, digits, features, number, page, rows};
use super::sample::{LARGE, SMALL, Sample, large, noise};
use super::{assert_newer, newer};
use crate::store::error::{Error, Result};
use crate::store::format::index_file::Section;
use crate::store::format::tables::Object;
use crate::store::layer::index::LayerIndex;
use crate::store::view::{Verify, View};
use crate::store::{LayerName, ObjectName, ViewKey};

/// The bytes of an index or a view, whose sections are found as the page says.
struct Index {
    bytes: Vec<u8>,
    header: Table,
    slot: Table,
}

impl Index {
    fn read(path: &Path) -> Self {
        let index = Self {
            bytes: fs::read(path).unwrap(),
            header: Table::of("Index files", "header"),
            slot: Table::of("Index files", "section"),
        };
        index.header.holds(&index.bytes);
        index.slot.fills(32);
        index
    }

    fn number(&self, text: &str) -> u64 {
        self.header.number(&self.bytes, text)
    }

    /// Where the headers of sections are.
    fn slots(&self) -> impl Iterator<Item = usize> {
        let first = self.header.field("sections").range();
        assert_eq!(first.len(), 32);
        let first = first.start;
        (0..self.number("number of sections") as usize).map(move |number| first + 32 * number)
    }

    /// Where a section is; at the end of the header if it is missing.
    fn place(&self, section: Section) -> Range<usize> {
        for at in self.slots() {
            let slot = &self.bytes[at..];
            if self.slot.number(slot, "which one") == section as u64 {
                let record = self.slot.number(slot, "bytes of a record");
                assert_eq!(record, section.record() as u64);
                let start = self.slot.number(slot, "where it starts") as usize;
                let bytes = self.slot.number(slot, "bytes, a multiple") as usize;
                return start..start + bytes;
            }
        }
        1024..1024
    }

    fn section(&self, section: Section) -> &[u8] {
        &self.bytes[self.place(section)]
    }

    fn record(&self, section: Section, number: u64) -> &[u8] {
        let size = section.record();
        &self.section(section)[number as usize * size..][..size]
    }

    fn text(&self, start: u64, bytes: u64) -> &[u8] {
        &self.section(Section::Texts)[start as usize..][..bytes as usize]
    }

    fn xattrs(&self, set: u64) -> Vec<(&[u8], &[u8])> {
        let (of_set, of_xattr) = (Table::beside("set"), Table::beside("extended attribute"));
        let set = self.record(Section::XattrSets, set);
        let first = of_set.number(set, "first attribute");
        (first..first + of_set.number(set, "number of them"))
            .map(|number| {
                let record = self.record(Section::Xattrs, number);
                let get = |text| of_xattr.number(record, text);
                let value_bytes = number_at(record, of_xattr.field("value in").range().end);
                (
                    self.text(get("name in the texts"), number_at(record, 4)),
                    self.text(get("value in the texts"), value_bytes),
                )
            })
            .collect()
    }

    fn object(&self, number: u64) -> Object {
        let of_object = Table::beside("object");
        let record = self.record(Section::Objects, number);
        Object {
            name: ObjectName(of_object.get(record, "name").try_into().unwrap()),
            size: of_object.number(record, "bytes"),
        }
    }

    /// Offset, bytes and offset in the object of the parts of a file of the object that is the whole content `small`.
    fn parts(&self, inode: &[u8]) -> Vec<[u64; 3]> {
        let (of_inode, of_extent) = (Table::of("Inodes", "inode"), Table::beside("extent"));
        let first = of_inode.number(inode, "*start*");
        (first..first + of_inode.number(inode, "*count*"))
            .map(|number| {
                let record = self.record(Section::Extents, number);
                let object = self.object(of_extent.number(record, "number of the object"));
                assert_eq!(object.name, ObjectName::of(b"small"));
                [
                    of_extent.number(record, "offset in the file"),
                    of_extent.number(record, "bytes"),
                    of_extent.number(record, "offset in the object"),
                ]
            })
            .collect()
    }

    /// What all inodes of the committed layer have, in a layer or a view.
    fn assert_attributes(&self, inode: &[u8], kind: u32, links: u64) {
        let of_inode = Table::of("Inodes", "inode");
        let get = |text| of_inode.number(inode, text);
        let is_link = kind == libc::S_IFLNK;
        assert_eq!(
            get("type and permissions"),
            u64::from(kind | 0o1750),
            "{is_link}"
        );
        assert_eq!(get("number of links"), links);
        assert_eq!([get("owner"), get("group")], [3, 4]);
        assert_eq!(get("seconds of the last modification").cast_signed(), -5);
        assert_eq!(get("its nanoseconds"), 6);
        let of_time = Table::beside("access time");
        let time = self.record(Section::Times, get("access time: 1 +") - 1);
        assert_eq!(of_time.number(time, "seconds"), 7);
        assert_eq!(of_time.number(time, "nanoseconds"), 8);
    }

    /// The file with a change, and sums that are right.
    fn changed(&self, change: impl FnOnce(&mut Vec<u8>)) -> Vec<u8> {
        let mut bytes = self.bytes.clone();
        change(&mut bytes);
        let sums = self.number("where the page sums start") as usize;
        let pages: Vec<u8> = bytes[1024..sums]
            .chunks(4096)
            .flat_map(|page| *blake3::hash(page).as_bytes())
            .collect();
        bytes[sums..].copy_from_slice(&pages);
        let of_sums = self.header.field("sum of the page sums").range();
        bytes[of_sums].copy_from_slice(blake3::hash(&pages).as_bytes());
        let sum = self.header.field("sum of bytes").range();
        let header = blake3::hash(&bytes[..sum.start]);
        bytes[sum].copy_from_slice(header.as_bytes());
        bytes
    }
}

fn number_at(record: &[u8], at: usize) -> u64 {
    number(&record[at..at + 4])
}

#[test]
fn sections_are_as_documented() {
    use Section::{
        DirEntries, Entries, Extents, Inodes, Layers, Locations, Names, Objects, Packs, Paths,
        Texts, Times, XattrSets, Xattrs,
    };
    let all = [
        Entries, Paths, Inodes, DirEntries, Names, Texts, Objects, Extents, Xattrs, XattrSets,
        Times, Locations, Packs, Layers,
    ];
    let rows = rows("Index files", "| section | number | record | in |");
    let documented: Vec<_> = rows
        .iter()
        .map(|row| (digits(&row[1]).unwrap(), digits(&row[2]).unwrap()))
        .collect();
    let written = all.map(|section| (section as usize, section.record()));
    assert_eq!(documented, written);
    Table::of("Inodes", "inode").fills(Inodes.record());
    Table::of("The index of a layer", "path").fills(Paths.record());
    Table::of("The index of a layer", "entry").fills(Entries.record());
    Table::of("Views", "directory entry").fills(DirEntries.record());
    Table::of("Views", "location of the object with the same number").fills(Locations.record());
    for (title, section) in [
        ("object", Objects),
        ("extent", Extents),
        ("extended attribute", Xattrs),
        ("set", XattrSets),
        ("access time", Times),
    ] {
        Table::beside(title).fills(section.record());
    }
}

#[test]
fn the_index_of_a_layer_is_as_documented() {
    let sample = Sample::new();
    let path = sample.layers.index_path(sample.names[0]);
    let of_stream = Index::read(&path);
    assert_eq!(
        of_stream.number("bytes of the tar stream"),
        sample.stream.len() as u64
    );
    let diff_id = of_stream.header.get(&of_stream.bytes, "layer: diff id");
    let expected: [u8; 32] = Sha256::digest(&sample.stream).into();
    assert_eq!(diff_id, expected);
    assert_eq!(&of_stream.changed(|_| {}), &of_stream.bytes);

    let path = sample.layers.index_path(sample.names[1]);
    let index = Index::read(&path);
    assert_eq!(index.number("bytes of the file"), index.bytes.len() as u64);
    let id = index.header.get(&index.bytes, "sum of bytes");
    assert_eq!(id, sample.names[1].0);
    assert_eq!(index.changed(|_| {}), index.bytes);
    let (of_path, of_entry) = (
        Table::of("The index of a layer", "path"),
        Table::of("The index of a layer", "entry"),
    );
    let of_inode = Table::of("Inodes", "inode");
    let path_of = |number: u64| {
        let mut names: Vec<&[u8]> = Vec::new();
        let mut at = number;
        while at != 0 {
            let record = index.record(Section::Paths, at);
            let start = of_path.number(record, "where its name starts") as usize;
            let bytes = of_path.number(record, "bytes of the name") as usize;
            names.push(&index.section(Section::Names)[start..start + bytes]);
            at = of_path.number(record, "number of the path above");
        }
        names.reverse();
        String::from_utf8(names.join(&b'/')).unwrap()
    };
    let entries: Vec<&[u8]> = index.section(Section::Entries).chunks(64).collect();
    let told: Vec<_> = entries
        .iter()
        .map(|entry| {
            (
                path_of(of_entry.number(entry, "path")),
                of_entry.number(entry, "kind"),
            )
        })
        .collect();
    let kind = |words: &str| {
        let rows = rows("The index of a layer", "| kind | asks to |");
        let row = rows.iter().find(|row| row[1].starts_with(words)).unwrap();
        digits(&row[0]).unwrap() as u64
    };
    let kinds: Vec<u64> = of_stream
        .section(Section::Entries)
        .chunks(64)
        .map(|entry| of_entry.number(entry, "kind"))
        .collect();
    let make = kind("make the object. A directory that is there stays");
    let clear = kind("remove from the directory");
    assert_eq!(
        kinds,
        [make, make, make, make, clear, kind("remove the path")]
    );
    let exactly = kind("make the object, as 1; its extended attributes are those of this entry");
    let expected = [
        ("", exactly),
        ("dir", exactly),
        ("dir/whole", exactly),
        ("dir/linked", kind("make a hard link")),
        ("dir/parts", exactly),
        ("dir/symlink", exactly),
        ("dir/zdevice", exactly),
        ("gone", kind("remove the path")),
    ];
    assert_eq!(told, expected.map(|(path, kind)| (path.to_owned(), kind)));
    let kinds = [
        libc::S_IFDIR,
        libc::S_IFDIR,
        libc::S_IFREG,
        libc::S_IFREG,
        libc::S_IFREG,
        libc::S_IFLNK,
        libc::S_IFBLK,
    ];
    for (entry, kind) in entries.iter().zip(kinds) {
        index.assert_attributes(of_entry.get(entry, "inode"), kind, 0);
    }
    let inode = |number: usize| of_entry.get(entries[number], "inode");
    assert_eq!(of_entry.get(entries[7], "inode"), [0; 56]);
    let set = of_inode.number(inode(2), "set of extended attributes");
    assert_eq!(
        index.xattrs(set),
        [
            (&b"user.name"[..], &b"value"[..]),
            (&b"user.two"[..], &b"2"[..])
        ]
    );
    assert_eq!(index.xattrs(0), []);
    let small = Object {
        name: ObjectName::of(b"small"),
        size: 5,
    };
    assert_eq!(of_inode.number(inode(2), "flags"), 1);
    assert_eq!(index.object(of_inode.number(inode(2), "*start*")), small);
    assert_eq!(index.parts(inode(4)), [[10, 2, 1], [20, 2, 3]]);
    for (number, target) in [(3, &b"dir/whole"[..]), (5, b"to/there")] {
        let start = of_inode.number(inode(number), "*start*");
        let bytes = of_inode.number(inode(number), "*count*");
        assert_eq!(index.text(start, bytes), target);
    }
    let size = of_inode.number(inode(6), "regular file: bytes; device");
    assert_eq!(size, (8 << 32) + 9);

    // What the page says of a reader.
    let read = |change: &dyn Fn(&mut Vec<u8>)| {
        let changed = index.changed(|bytes| change(bytes));
        let sum = index.header.field("sum of bytes").range();
        let name = LayerName(changed[sum].try_into().unwrap());
        let tmp = tempfile::NamedTempFile::new().unwrap();
        fs::write(tmp.path(), changed).unwrap();
        let layer = LayerIndex::open(tmp.path(), name)?;
        for number in 0..layer.len() {
            let entry = layer.entry(number)?;
            layer.path(entry.path)?;
            layer.xattrs(entry.inode.xattrs)?;
            if entry.inode.kind() == libc::S_IFREG && entry.inode.size > 0 {
                layer.extents(&entry.inode)?;
            }
        }
        Ok(())
    };
    read(&|_| {}).unwrap();
    let records = [
        (&of_path, Section::Paths, 1),
        (&of_entry, Section::Entries, 1),
        (&Table::beside("extent"), Section::Extents, 1),
        (&Table::beside("extended attribute"), Section::Xattrs, 1),
        (&Table::beside("access time"), Section::Times, 0),
    ];
    let in_records = records.into_iter().flat_map(|(table, section, number)| {
        let at = index.place(section).start + number * section.record();
        let zeros: Vec<_> = table.zeros().map(|zero| at + zero).collect();
        assert!(!zeros.is_empty(), "{section:?}");
        zeros
    });
    let in_slots = index
        .slots()
        .flat_map(|at| index.slot.zeros().map(move |zero| at + zero));
    let behind_slots = index.slots().last().unwrap() + 32;
    let zeros = index.header.zeros().chain(in_slots).chain(in_records);
    for at in zeros.chain([behind_slots, 991]) {
        let error = read(&|bytes| bytes[at] = 1).unwrap_err();
        assert!(matches!(error, Error::Damaged { .. }), "byte {at}: {error}");
    }
    assert_features(&index, &read);
}

/// Reads a file that was changed so.
type Read<'a> = dyn Fn(&dyn Fn(&mut Vec<u8>)) -> Result<()> + 'a;

fn assert_features(index: &Index, read: &Read<'_>) {
    for (word, is_refused) in features(&index.header) {
        let found = read(&|bytes| bytes[word.start] = 4);
        assert_eq!(found.is_err(), is_refused);
        found.err().iter().for_each(assert_newer);
    }
    assert_newer(&read(&|bytes| newer(&index.header, bytes)).unwrap_err());
}

#[test]
fn a_view_is_as_documented() {
    let sample = Sample::new();
    let index = Index::read(sample.view.path());
    assert_eq!(index.changed(|_| {}), index.bytes);
    let mut named = b"plywood view 1\0".to_vec();
    named.extend(sample.names.iter().flat_map(|name| name.0));
    let key = blake3::hash(&named);
    assert_eq!(
        index.header.get(&index.bytes, "layer: diff id"),
        key.as_bytes()
    );
    assert!(page().contains(
        "the sum of `plywood view 1`, a zero byte, and the IDs of its layers, the lowest first"
    ));
    let stem = sample.view.path().file_stem().unwrap();
    assert_eq!(stem.to_str().unwrap(), key.to_string());
    let layers: Vec<&[u8]> = index.section(Section::Layers).chunks(32).collect();
    assert_eq!(layers, sample.names.each_ref().map(|name| &name.0[..]));

    let of_inode = Table::of("Inodes", "inode");
    let of_entry = Table::of("Views", "directory entry");
    let inode = |number| index.record(Section::Inodes, number);
    let names = |directory: u64| {
        let first = of_inode.number(inode(directory), "*start*");
        let last = first + of_inode.number(inode(directory), "*count*");
        let entry = |number| {
            let record = index.record(Section::DirEntries, number);
            let get = |text| of_entry.number(record, text);
            let start = get("where its name starts") as usize;
            let bytes = get("bytes of the name") as usize;
            let name = &index.section(Section::Names)[start..start + bytes];
            let mut four = name.to_vec();
            four.resize(4, 0);
            let prefix = u32::from_be_bytes(four[..4].try_into().unwrap());
            assert_eq!(get("the first four bytes"), u64::from(prefix));
            let mode = of_inode.number(inode(get("inode")), "type and permissions");
            assert_eq!(get("type of the inode"), mode >> 12);
            let name = String::from_utf8(name.to_vec()).unwrap();
            (name, get("inode"), get("number of the layer"))
        };
        (first..last).map(entry).collect::<Vec<_>>()
    };
    let root = names(0);
    let expected = [("a", 1, 0), ("b", 2, 0), ("dir", 3, 1), ("large", 4, 0)];
    assert_eq!(
        root,
        expected.map(|(name, inode, layer)| (name.to_owned(), inode, layer))
    );
    let found = names(3);
    let expected = [
        ("linked", 5),
        ("parts", 6),
        ("symlink", 7),
        ("whole", 5),
        ("zdevice", 8),
    ];
    assert_eq!(
        found,
        expected.map(|(name, inode)| (name.to_owned(), inode, 1))
    );
    for (number, kind, links) in [
        (0, libc::S_IFDIR, 3),
        (3, libc::S_IFDIR, 2),
        (5, libc::S_IFREG, 2),
        (6, libc::S_IFREG, 1),
        (8, libc::S_IFBLK, 1),
    ] {
        index.assert_attributes(inode(number), kind, links);
    }
    assert_eq!(index.parts(inode(6)), [[10, 2, 1], [20, 2, 3]]);

    let location = Table::of("Views", "location of the object with the same number");
    for (number, content) in [(1, vec![b'a'; SMALL]), (2, noise(SMALL)), (4, large())] {
        assert_eq!(of_inode.number(inode(number), "flags"), 1);
        let object = of_inode.number(inode(number), "*start*");
        assert_eq!(index.object(object).name, ObjectName::of(&content));
        let record = index.record(Section::Locations, object);
        let pack = location.number(record, "number of the pack");
        if content.len() == LARGE {
            assert_eq!(pack, u64::from(u32::MAX));
            continue;
        }
        let (path, id) = sample.pack_of(&content);
        assert_eq!(index.record(Section::Packs, pack), id.0);
        let bytes = fs::read(path).unwrap();
        let at = &bytes[location.number(record, "where the object starts") as usize..];
        let object = Table::of("Packs", "object");
        assert_eq!(object.get(at, "name"), ObjectName::of(&content).0);
        let stored = location.number(record, "bytes stored");
        assert_eq!(object.number(at, "bytes stored"), stored);
    }

    let read = |change: &dyn Fn(&mut Vec<u8>)| {
        let tmp = tempfile::NamedTempFile::new().unwrap();
        fs::write(tmp.path(), index.changed(|bytes| change(bytes))).unwrap();
        let key = ViewKey::of(&sample.names);
        let view = View::open(
            tmp.path(),
            key,
            sample.layers.objects().clone(),
            Verify::First,
        )?;
        view.verify()
    };
    read(&|_| {}).unwrap();
    assert_features(&index, &read);
}
