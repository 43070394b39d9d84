mod attributes;
mod cost;
mod forward;
mod frames;
mod names;
mod written_over;

use std::fs;
use std::path::Path;

use super::*;
use crate::store::format::Time;
use crate::store::ingest::Settings;
use crate::store::layers::{Expected, Layers};

/// No capability at all, as the kernel writes it.
const CAPABILITY: [u8; 20] = *b"\0\0\0\x02\0\0\0\0\0\0\0\0\0\0\0\0\0\0\0\0";

/// A tar stream that is written entry by entry.
struct Stream(tar::Builder<Vec<u8>>);

impl Stream {
    fn new() -> Self {
        Self(tar::Builder::new(Vec::new()))
    }

    fn entry(
        mut self,
        kind: tar::EntryType,
        path: &str,
        content: &[u8],
        change: impl FnOnce(&mut tar::Header),
    ) -> Self {
        let mut header = tar::Header::new_ustar();
        header.set_entry_type(kind);
        header.set_size(content.len() as u64);
        header.set_mode(if kind.is_dir() { 0o750 } else { 0o640 });
        header.set_mtime(1000);
        change(&mut header);
        self.0.append_data(&mut header, path, content).unwrap();
        self
    }

    fn file(self, path: &str, content: &str) -> Self {
        self.entry(tar::EntryType::Regular, path, content.as_bytes(), |_| {})
    }

    fn dir(self, path: &str) -> Self {
        self.entry(tar::EntryType::Directory, path, b"", |_| {})
    }

    fn link(self, path: &str, target: &str) -> Self {
        let set = |header: &mut tar::Header| header.set_link_name(target).unwrap();
        self.entry(tar::EntryType::Symlink, path, b"", set)
    }

    fn hard(self, path: &str, target: &str) -> Self {
        let set = |header: &mut tar::Header| {
            header.set_link_name(target).unwrap();
            header.set_mode(0o600);
            header.set_uid(5);
        };
        self.entry(tar::EntryType::Link, path, b"", set)
    }

    /// Extended attributes of the next entry.
    fn xattrs(mut self, xattrs: &[(&str, &[u8])]) -> Self {
        let records = xattrs
            .iter()
            .map(|(name, value)| (format!("SCHILY.xattr.{name}"), *value))
            .collect::<Vec<_>>();
        let records = records.iter().map(|(name, value)| (name.as_str(), *value));
        self.0.append_pax_extensions(records).unwrap();
        self
    }
}

/// A store in a directory of its own.
struct Fixture {
    dir: tempfile::TempDir,
    layers: Layers,
}

impl Fixture {
    fn new() -> Self {
        Self::keeping(true)
    }

    /// Whose large contents are kept as they are if they are to be `plain`, else in frames.
    fn keeping(plain: bool) -> Self {
        let dir = tempfile::tempdir().unwrap();
        let settings = Settings {
            small: 1000,
            plain,
            ..Settings::default()
        };
        let (layers, _) = Layers::open(dir.path(), settings).unwrap();
        Self { dir, layers }
    }

    fn import(&self, stream: Stream) -> LayerName {
        let bytes = stream.0.into_inner().unwrap();
        let expected = Expected::default();
        self.layers
            .import(bytes.as_slice(), &expected, &())
            .unwrap()
    }

    fn chain(&self, streams: Vec<Stream>) -> Vec<LayerName> {
        streams
            .into_iter()
            .map(|stream| self.import(stream))
            .collect()
    }

    fn try_view(&self, streams: Vec<Stream>) -> Result<View> {
        self.layers.view(&self.chain(streams), Verify::First)
    }

    fn view(&self, streams: Vec<Stream>) -> View {
        self.try_view(streams).unwrap()
    }
}

/// Every path with what is there: a directory, the target of a link, or content.
fn tree(view: &View) -> Vec<String> {
    let mut found = Vec::new();
    let mut waiting = vec![(String::new(), View::ROOT)];
    while let Some((path, number)) = waiting.pop() {
        let inode = view.inode(number).unwrap();
        let mut last: Option<Vec<u8>> = None;
        for place in 0.. {
            let Some(entry) = view.nth(&inode, place).unwrap() else {
                break;
            };
            assert!(last.is_none_or(|last| last.as_slice() < entry.name));
            last = Some(entry.name.to_vec());
            assert_eq!(view.lookup(&inode, entry.name).unwrap(), Some(entry));
            let child = view.inode(entry.inode).unwrap();
            assert_eq!(child.kind(), entry.kind);
            let path = format!("{path}/{}", entry.name.escape_ascii());
            match child.kind() {
                libc::S_IFDIR => {
                    found.push(format!("{path}/"));
                    waiting.push((path, entry.inode));
                }
                libc::S_IFLNK => {
                    let target = view.target(&child).unwrap().escape_ascii().to_string();
                    found.push(format!("{path} -> {target}"));
                }
                libc::S_IFREG => found.push(format!("{path} = {}", read(view, &child))),
                kind => found.push(format!("{path} {kind:o} {:?}", child.device())),
            }
        }
    }
    found.sort();
    found
}

fn read(view: &View, inode: &Inode) -> String {
    let file = view.open_file(inode).unwrap();
    let mut buffer = vec![0; file.size() as usize + 1];
    let count = file.read_at(&mut buffer, 0).unwrap();
    String::from_utf8_lossy(&buffer[..count]).into_owned()
}

fn at(view: &View, path: &str) -> (u32, Inode) {
    let mut number = View::ROOT;
    for name in Path::new(path) {
        let inode = view.inode(number).unwrap();
        let found = view.lookup(&inode, name.as_encoded_bytes()).unwrap();
        number = found.unwrap_or_else(|| panic!("there is no {path}")).inode;
    }
    (number, view.inode(number).unwrap())
}

#[test]
fn upper_layers_replace_remove_and_hide() {
    let fixture = Fixture::new();
    let view = fixture.view(vec![
        Stream::new()
            .dir("a")
            .file("a/1", "one")
            .file("a/2", "two")
            .dir("b")
            .file("b/3", "three")
            .file("c", "file")
            .dir("d")
            .file("d/4", "four"),
        Stream::new()
            .file("a/1", "new")
            .file("a/.wh.2", "")
            .file("b/.wh..wh..opq", "")
            .file("b/5", "five")
            .dir("c")
            .file("c/6", "six")
            .file("d", "was a directory"),
        Stream::new()
            .file(".wh.absent", "")
            .file("d/.wh.4", "")
            .file("a/7", "seven")
            .file("b/5", "again")
            .file("b/5", "and again"),
    ]);
    assert_eq!(
        tree(&view),
        [
            "/a/",
            "/a/1 = new",
            "/a/7 = seven",
            "/b/",
            "/b/5 = and again",
            "/c/",
            "/c/6 = six",
            "/d = was a directory",
        ]
    );
    // The names know which layer wrote them.
    let root = view.inode(View::ROOT).unwrap();
    let layer = |name: &[u8]| view.lookup(&root, name).unwrap().unwrap().layer;
    assert_eq!([layer(b"a"), layer(b"c"), layer(b"d")], [2, 1, 1]);
    assert_eq!(view.lookup(&root, b"absent").unwrap(), None);
    assert_eq!(root.links, 5);
    assert_eq!(root.mode, 0o40755);
}

#[test]
fn an_opaque_marker_spares_what_its_layer_wrote_wherever_it_comes() {
    let fixture = Fixture::new();
    let base = || Stream::new().file("a/old", "").file("a/deep/old", "");
    let marker = |stream: Stream| stream.file("a/.wh..wh..opq", "");
    let new = |stream: Stream| stream.file("a/deep/new", "n");
    for stream in [marker(new(Stream::new())), new(marker(Stream::new()))] {
        let view = fixture.view(vec![base(), stream]);
        assert_eq!(tree(&view), ["/a/", "/a/deep/", "/a/deep/new = n"]);
    }
    // As containerd, which knows what was written by its path.
    let again = new(Stream::new())
        .file("a/.wh.deep", "")
        .file("a/deep/.wh.x", "");
    let view = fixture.view(vec![base(), marker(again)]);
    assert_eq!(tree(&view), ["/a/", "/a/deep/"]);
    let root = fixture.view(vec![base(), Stream::new().file(".wh..wh..opq", "")]);
    assert!(root.is_empty());
}

#[test]
fn paths_pass_through_links_of_layers_below() {
    let fixture = Fixture::new();
    let base = || {
        Stream::new()
            .dir("usr")
            .dir("usr/bin")
            .file("usr/bin/old", "old")
            .link("bin", "usr/bin")
            .link("abs", "/usr/bin/../bin")
            .link("up", "../../../usr")
            .link("loop", "loop")
            .link("dangling", "new/place")
    };
    let view = fixture.view(vec![
        base(),
        Stream::new()
            .file("bin/sh", "shell")
            .file("abs/ls", "list")
            .file("up/lib/x", "library")
            .file("bin/.wh.old", "")
            .file("dangling/y", "made")
            .hard("bin/dash", "bin/sh"),
    ]);
    assert_eq!(
        tree(&view),
        [
            "/abs -> /usr/bin/../bin",
            "/bin -> usr/bin",
            "/dangling -> new/place",
            "/loop -> loop",
            "/new/",
            "/new/place/",
            "/new/place/y = made",
            "/up -> ../../../usr",
            "/usr/",
            "/usr/bin/",
            "/usr/bin/dash = shell",
            "/usr/bin/ls = list",
            "/usr/bin/sh = shell",
            "/usr/lib/",
            "/usr/lib/x = library",
        ]
    );
    assert_eq!(at(&view, "usr/bin/sh").0, at(&view, "usr/bin/dash").0);
    // A directory in the place of a link replaces it.
    let view = fixture.view(vec![base(), Stream::new().dir("bin").file("bin/x", "x")]);
    assert_eq!(at(&view, "bin/x").1.size, 1);
    assert_eq!(at(&view, "usr").1.links, 3);

    for (stream, words) in [
        (
            Stream::new().file("loop/x", ""),
            "loop/x: the symbolic links",
        ),
        (Stream::new().file("usr/bin/old/x", ""), "not a directory"),
        (
            Stream::new().hard("x", "absent"),
            "target absent does not exist",
        ),
        (Stream::new().hard("x", "usr"), "target usr is a directory"),
    ] {
        let error = fixture
            .try_view(vec![base(), stream])
            .unwrap_err()
            .to_string();
        assert!(error.contains(words), "{error}");
    }
}

#[test]
fn a_hard_link_speaks_for_the_file_of_the_layer_below() {
    let fixture = Fixture::new();
    let view = fixture.view(vec![
        Stream::new()
            .xattrs(&[("user.kept", b"1"), ("security.capability", &CAPABILITY)])
            .file("a", "content"),
        Stream::new()
            .xattrs(&[("user.new", b"2")])
            .hard("b", "a")
            .file(".wh.a", ""),
    ]);
    assert_eq!(tree(&view), ["/b = content"]);
    let (_, inode) = at(&view, "b");
    assert_eq!((inode.mode, inode.uid, inode.links), (0o100_600, 5, 1));
    assert_eq!(inode.mtime, Time { sec: 1000, nsec: 0 });
    let xattrs = view.xattrs(&inode).unwrap();
    assert_eq!(
        xattrs,
        [
            (&b"user.kept"[..], &b"1"[..]),
            (&b"user.new"[..], &b"2"[..])
        ]
    );
}

#[test]
fn a_view_is_built_once_and_again_when_it_is_damaged() {
    let fixture = Fixture::new();
    let chain = fixture.chain(vec![
        Stream::new().file("a", "1"),
        Stream::new().file("b", "2"),
    ]);
    let key = fixture.layers.view(&chain, Verify::First).unwrap().key();
    let path = fixture.dir.path().join(format!("views/{key}.view"));
    let good = fs::read(&path).unwrap();
    let written = fs::metadata(&path).unwrap().modified().unwrap();
    fixture.layers.view(&chain, Verify::First).unwrap();
    assert_eq!(fs::metadata(&path).unwrap().modified().unwrap(), written);
    fs::write(&path, &good[..good.len() - 1]).unwrap();
    let view = fixture.layers.view(&chain, Verify::First).unwrap();
    assert_eq!(tree(&view), ["/a = 1", "/b = 2"]);
    assert_eq!(fs::read(&path).unwrap(), good);
    assert_eq!(view.layer(1).unwrap(), chain[1]);
    assert!(view.layer(2).is_err());
    // The name of one chain does not open another's.
    let other = fixture.layers.view(&chain[..1], Verify::First).unwrap();
    let objects = Arc::clone(fixture.layers.objects());
    assert!(View::open(&path, other.key(), objects, Verify::First).is_err());
    // What lies there is whole, and of another chain.
    fs::copy(other.path(), &path).unwrap();
    let view = fixture.layers.view(&chain, Verify::First).unwrap();
    assert_eq!(tree(&view), ["/a = 1", "/b = 2"]);
    assert_eq!(fs::read(&path).unwrap(), good);
}

#[test]
fn every_damaged_byte_is_an_error_or_changes_nothing() {
    let fixture = Fixture::new();
    let chain = fixture.chain(vec![
        Stream::new()
            .dir("directory")
            .xattrs(&[("user.a", b"b")])
            .file("directory/file", "content")
            .link("link", "directory/file")
            .hard("hard", "directory/file"),
    ]);
    let view = fixture.layers.view(&chain, Verify::First).unwrap();
    let expected = tree(&view);
    let key = view.key();
    let path = fixture.dir.path().join(format!("views/{key}.view"));
    let good = fs::read(&path).unwrap();
    let open = || {
        View::open(
            &path,
            key,
            Arc::clone(fixture.layers.objects()),
            Verify::First,
        )
    };
    for at in 0..good.len() {
        let mut bad = good.clone();
        bad[at] ^= 0x08;
        fs::write(&path, &bad).unwrap();
        // A page that is wrong is an error wherever something in it is used.
        if let Ok(view) = open()
            && view.verify().is_ok()
        {
            assert_eq!(tree(&view), expected, "byte {at}");
        }
    }
    // Nor does an index whose sums are right, but whose numbers lead nowhere.
    for at in (1024..good.len() - 32).step_by(1) {
        for value in [0x00, 0x7f, 0xff] {
            let mut bad = good.clone();
            bad[at] = value;
            repair_sums(&mut bad);
            fs::write(&path, &bad).unwrap();
            if let Ok(view) = open() {
                let _ = walk(&view);
            }
        }
    }
}

/// Makes all sums of an index with one page right.
fn repair_sums(file: &mut [u8]) {
    let end = file.len() - 32;
    let page = *blake3::hash(&file[1024..end]).as_bytes();
    file[end..].copy_from_slice(&page);
    let sums = *blake3::hash(&file[end..]).as_bytes();
    file[64..96].copy_from_slice(&sums);
    let header = *blake3::hash(&file[..992]).as_bytes();
    file[992..1024].copy_from_slice(&header);
}

/// Asks a view for everything, up to a number of steps that no sound view of this test takes.
fn walk(view: &View) -> Result<()> {
    for number in 0..view.len().min(50) {
        let inode = view.inode(number)?;
        let _ = view.xattrs(&inode);
        let _ = view.target(&inode);
        let _ = view.lookup(&inode, b"file");
        if let Ok(file) = view.open_file(&inode) {
            let _ = file.read_at(&mut [0; 100], 0);
        }
        for place in 0..50 {
            if view.nth(&inode, place)?.is_none() {
                break;
            }
        }
    }
    Ok(())
}

#[test]
fn damage_to_a_content_is_seen_when_it_is_to_be_verified() {
    let fixture = Fixture::new();
    let chain = fixture.chain(vec![Stream::new().file("a", &"x".repeat(2000))]);
    let objects = fixture.dir.path().join("objects");
    let dir = fs::read_dir(objects).unwrap().next().unwrap().unwrap();
    let object = fs::read_dir(dir.path()).unwrap().next().unwrap().unwrap();
    let open = |verify| {
        let view = fixture.layers.view(&chain, verify).unwrap();
        let inode = at(&view, "a").1;
        (view, inode)
    };
    let (first, inode) = open(Verify::First);
    assert!(first.open_file(&inode).unwrap().host_file().is_some());
    fs::write(object.path(), "y".repeat(2000)).unwrap();
    // It has been verified, and what rots later is for a check of everything to find.
    assert!(first.open_file(&inode).is_ok());
    assert!(open(Verify::Never).0.open_file(&inode).is_ok());
    assert!(open(Verify::First).0.open_file(&inode).is_err());
    assert!(open(Verify::Always).0.open_file(&inode).is_err());
}

#[test]
fn an_entry_takes_150_bytes_of_index_at_most() {
    const ENTRIES: u32 = 10_000;
    let fixture = Fixture::new();
    let mut stream = Stream::new();
    for number in 0..ENTRIES {
        let path = format!("usr/share/d{:03}/file-{number:06}.py", number % 100);
        stream = stream.file(&path, &number.to_string());
    }
    let chain = fixture.chain(vec![stream]);
    let layer = fixture.layers.get(chain[0]).unwrap();
    let view = fixture.layers.view(&chain, Verify::First).unwrap();
    assert_eq!(view.len(), 1 + 2 + 100 + ENTRIES);
    // Every file has a content of its own, which is the worst there can be.
    for bytes in [layer.index_bytes, view.bytes()] {
        println!("{} bytes", bytes / u64::from(ENTRIES));
        assert!(bytes <= 150 * u64::from(ENTRIES), "{bytes}");
    }
}

/// Entries that ask for a thousand times as much as they are long had plyd take the host's memory, or hours.
#[test]
fn what_entries_ask_for_is_bounded_by_their_number() {
    let fixture = Fixture::new();
    let refused = |stream: Stream, words: &str| {
        let error = fixture.try_view(vec![stream]).unwrap_err().to_string();
        assert!(error.contains(words), "{error}");
    };
    let long_link = |mut stream: Stream, path: &str, target: &str| {
        let record = ("linkpath", target.as_bytes());
        stream.0.append_pax_extensions([record]).unwrap();
        stream.link(path, "in the record")
    };

    // A path through links that lead through links.
    let mut stream = Stream::new().dir("d").dir("end");
    for number in 0..200 {
        let next = match number {
            199 => "end".to_owned(),
            _ => format!("l{}", number + 1),
        };
        let target = format!("{}{next}", "d/../".repeat(700));
        stream = long_link(stream, &format!("l{number}"), &target);
    }
    let entry = |stream: Stream, number| stream.file(&format!("l0/{number}"), "");
    let stream = (0..20).fold(stream, entry);
    refused(stream, "l0/7: the paths of the layer lead through too much");

    // Directories that no entry lists.
    let mut stream = Stream::new();
    for number in 0..80 {
        let target = format!("{number}/{}", "d/".repeat(1900));
        stream = long_link(stream, &format!("l{number}"), &target);
        stream = stream.file(&format!("l{number}/x"), "");
    }
    refused(stream, "/x: the layer makes too many directories");

    // The same ones, made and removed and made again.
    let target = format!("top/{}", "d/".repeat(1900));
    let mut stream = long_link(Stream::new(), "deep", &target);
    for _ in 0..80 {
        stream = stream.file("deep/x", "").file(".wh.top", "");
    }
    refused(
        stream,
        "deep/x: the paths of the layer lead through too much",
    );

    // A directory that gets one more attribute by each of its entries.
    let mut stream = Stream::new();
    for number in 0..40 {
        let name = format!("user.{number}");
        stream = stream.xattrs(&[(&name, &[7; 30_000])]).dir("d");
    }
    refused(stream, "d: it has more than 1 MiB of extended attributes");
}

/// Few objects with much of their own stayed in memory as a small tree does.
#[test]
fn a_tree_that_takes_much_memory_does_not_wait_for_the_next_layer() {
    let fixture = Fixture::new();
    let mut stream = Stream::new();
    for number in 0..600u32 {
        let value = [&number.to_le_bytes()[..], &[7; 60_000]].concat();
        stream = stream.xattrs(&[("user.a", &value)]);
        stream = stream.file(&number.to_string(), "");
    }
    let waits = |stream: Stream| {
        let layer = fixture.import(stream);
        fixture.layers.check(&[layer]).unwrap();
        fixture.layers.has_merged()
    };
    assert!(!waits(stream));
    assert!(waits(Stream::new().file("f", "")));
    // Whatever it is that is long.
    let bytes = |stream: Stream| {
        let layer = fixture.import(stream);
        fixture.layers.merge(&[layer]).unwrap().bytes()
    };
    let little = bytes(Stream::new().link("l", "t"));
    let long = bytes(Stream::new().link("l", &"t".repeat(81)));
    assert_eq!(long - little, 80);
    let long = bytes(Stream::new().link(&"l".repeat(61), "t"));
    assert_eq!(long - little, 60);
}
