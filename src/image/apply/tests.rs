//! Random layers, unpacked onto a copy of the layers below and taken into the layer store: both must show the
//! same tree.

use std::collections::BTreeMap;
use std::ffi::OsStr;
use std::fs;
use std::os::unix::ffi::OsStrExt;
use std::process::Command;
use std::sync::Arc;

use proptest::prelude::*;
use sha2::{Digest, Sha256};

use super::*;
use crate::cow::{FileKind, NodeId, UnionConfig, UpperConfig};
use crate::store::ingest::Settings;
use crate::store::layers::{Expected, Layers};
use crate::store::view::{Verify, View};

/// What an entry of a layer is.
#[derive(Clone, Debug)]
enum Thing {
    File(u8),
    Directory,
    Symlink(String),
    HardLink(String),
    Whiteout,
    Opaque,
}

fn path() -> impl Strategy<Value = String> {
    prop::collection::vec("[a-c]", 1..4).prop_map(|names| names.join("/"))
}

fn target() -> impl Strategy<Value = String> {
    prop_oneof![
        path(),
        path().prop_map(|path| format!("/{path}")),
        path().prop_map(|path| format!("../{path}")),
        path().prop_map(|path| format!("{path}/..")),
        Just("..".to_owned()),
    ]
}

fn entry() -> impl Strategy<Value = (String, Thing, u8)> {
    let thing = prop_oneof![
        4 => any::<u8>().prop_map(Thing::File),
        3 => Just(Thing::Directory),
        3 => target().prop_map(Thing::Symlink),
        3 => path().prop_map(Thing::HardLink),
        2 => Just(Thing::Whiteout),
        1 => Just(Thing::Opaque),
    ];
    (path(), thing, any::<u8>())
}

/// The tar stream of these entries; `number` gives them attributes of their own.
fn stream(entries: &[(String, Thing, u8)]) -> Vec<u8> {
    let mut builder = ::tar::Builder::new(Vec::new());
    for (path, thing, number) in entries {
        let mut header = ::tar::Header::new_ustar();
        header.set_size(0);
        header.set_mode(0o700 + u32::from(number % 64));
        header.set_uid(u64::from(number % 3));
        header.set_gid(u64::from(number % 5));
        header.set_mtime(1_000_000 + u64::from(*number));
        if number % 4 == 0 && !matches!(thing, Thing::Symlink(_)) {
            let name = format!("SCHILY.xattr.user.t{}", number % 3);
            builder
                .append_pax_extensions([(name.as_str(), &[*number][..])])
                .unwrap();
        }
        let (kind, content, path) = match thing {
            Thing::File(byte) => (
                ::tar::EntryType::Regular,
                vec![*byte; usize::from(*byte)],
                path.clone(),
            ),
            Thing::Directory => (::tar::EntryType::Directory, vec![], path.clone()),
            Thing::Symlink(_) => (::tar::EntryType::Symlink, vec![], path.clone()),
            Thing::HardLink(_) => (::tar::EntryType::Link, vec![], path.clone()),
            Thing::Opaque => {
                let path = format!("{path}/.wh..wh..opq");
                (::tar::EntryType::Regular, vec![], path)
            }
            Thing::Whiteout => {
                let (above, name) = path.rsplit_once('/').unwrap_or((".", path));
                let path = format!("{above}/.wh.{name}");
                (::tar::EntryType::Regular, vec![], path)
            }
        };
        header.set_entry_type(kind);
        if let Thing::Symlink(target) | Thing::HardLink(target) = thing {
            header.set_link_name_literal(target).unwrap();
        }
        header.set_size(content.len() as u64);
        builder
            .append_data(&mut header, path, content.as_slice())
            .unwrap();
    }
    builder.into_inner().unwrap()
}

/// All that is compared of an object, and the names of its hard links.
type Tree = BTreeMap<String, (String, String)>;

/// Names the first path of each inode, so that numbers need not be equal.
fn with_links(found: BTreeMap<String, (u64, String)>) -> Tree {
    let mut first = BTreeMap::new();
    found
        .into_iter()
        .map(|(path, (number, text))| {
            let first = first.entry(number).or_insert_with(|| path.clone()).clone();
            (path, (first, text))
        })
        .collect()
}

fn union_tree(union: &Union) -> Tree {
    let mut found = BTreeMap::new();
    let mut waiting = vec![(String::new(), NodeId::ROOT)];
    while let Some((path, directory)) = waiting.pop() {
        let handle = union.open_dir(directory).unwrap();
        let mut names = Vec::new();
        union
            .read_dir(directory, &handle, 0, &mut |child| {
                names.push(child.name);
                true
            })
            .unwrap();
        for name in names {
            if name == "." || name == ".." {
                continue;
            }
            let entry = union.lookup(directory, &name).unwrap();
            let (node, attr) = (entry.node, entry.attr);
            let path = format!("{path}/{}", name.to_str().unwrap());
            let mut mtime = attr.mtime.sec;
            let (kind, what) = match attr.kind {
                FileKind::Directory => {
                    waiting.push((path.clone(), node));
                    mtime = 0;
                    ('d', String::new())
                }
                FileKind::Symlink => ('l', format!("{:?}", union.readlink(node).unwrap())),
                FileKind::Regular => {
                    let mut buffer = vec![0; 300];
                    let count = union.read(node, None, 0, &mut buffer).unwrap();
                    ('f', content(&buffer[..count]))
                }
                other => panic!("{path} is a {other:?}"),
            };
            let mut xattrs = Vec::new();
            for name in union.listxattr(node).unwrap() {
                let value = union.getxattr(node, &name).unwrap();
                xattrs.push((name.as_bytes().to_vec(), value));
            }
            xattrs.sort();
            let text = shown(
                kind, attr.perm, attr.uid, attr.gid, mtime, attr.nlink, &xattrs, &what,
            );
            found.insert(path, (attr.ino, text));
        }
    }
    with_links(found)
}

fn view_tree(view: &View) -> Tree {
    let mut found = BTreeMap::new();
    let mut waiting = vec![(String::new(), View::ROOT)];
    while let Some((path, directory)) = waiting.pop() {
        let directory = view.inode(directory).unwrap();
        for place in 0..directory_len(view, &directory) {
            let entry = view.nth(&directory, place).unwrap().unwrap();
            let inode = view.inode(entry.inode).unwrap();
            let path = format!("{path}/{}", std::str::from_utf8(entry.name).unwrap());
            let mut mtime = inode.mtime.sec;
            let (kind, what) = match inode.kind() {
                libc::S_IFDIR => {
                    waiting.push((path.clone(), entry.inode));
                    mtime = 0;
                    ('d', String::new())
                }
                libc::S_IFLNK => {
                    let target = OsStr::from_bytes(view.target(&inode).unwrap());
                    ('l', format!("{target:?}"))
                }
                libc::S_IFREG => {
                    let mut buffer = vec![0; 300];
                    let file = view.open_file(&inode).unwrap();
                    let count = file.read_at(&mut buffer, 0).unwrap();
                    ('f', content(&buffer[..count]))
                }
                other => panic!("{path} is a {other:o}"),
            };
            let xattrs: Vec<(Vec<u8>, Vec<u8>)> = view
                .xattrs(&inode)
                .unwrap()
                .into_iter()
                .map(|(name, value)| (name.to_vec(), value.to_vec()))
                .collect();
            let perm = inode.mode & 0o7777;
            let text = shown(
                kind,
                perm,
                inode.uid,
                inode.gid,
                mtime,
                inode.links,
                &xattrs,
                &what,
            );
            found.insert(path, (u64::from(entry.inode), text));
        }
    }
    with_links(found)
}

fn directory_len(view: &View, directory: &crate::store::Inode) -> u32 {
    (0..)
        .find(|place| view.nth(directory, *place).unwrap().is_none())
        .unwrap()
}

#[expect(
    clippy::too_many_arguments,
    reason = "it is the list of what is compared"
)]
fn shown(
    kind: char,
    perm: u16,
    uid: u32,
    gid: u32,
    mtime: i64,
    links: u32,
    xattrs: &[(Vec<u8>, Vec<u8>)],
    what: &str,
) -> String {
    // The number of links of a directory is a matter of the union.
    let links = if kind == 'd' { 0 } else { links };
    format!("{kind} {perm:o} {uid} {gid} {mtime} {links} {xattrs:?} {what}")
}

/// The contents of the test are one byte many times.
fn content(bytes: &[u8]) -> String {
    let first = bytes.first().copied().unwrap_or_default();
    assert!(bytes.iter().all(|byte| *byte == first));
    format!("{} times {first}", bytes.len())
}

struct Silent;

impl Observer for Silent {
    fn progress(&self, _progress: Progress) {}
    fn cancelled(&self) -> bool {
        false
    }
}

/// What unpacking says of a hard link to nothing.
const NO_TARGET: &str = "does not exist in this layer or in those below";

fn compare(layers: &[Vec<(String, Thing, u8)>]) {
    let tmp = tempfile::tempdir().unwrap();
    let (store, _) = Layers::open(&tmp.path().join("store"), Settings::default()).unwrap();
    let mut chain = Vec::new();
    for (number, entries) in layers.iter().enumerate() {
        let stream = stream(entries);
        let file = tmp.path().join(format!("layer-{number}"));
        fs::write(&file, &stream).unwrap();
        let digest = format!("sha256:{:x}", Sha256::digest(&stream));
        // As containerd's native snapshotter: every layer on a copy of all below it.
        let upper = tmp.path().join(format!("upper-{number}"));
        let work = tmp.path().join(format!("work-{number}"));
        match number.checked_sub(1) {
            None => fs::create_dir(&upper).unwrap(),
            Some(below) => {
                let below = tmp.path().join(format!("upper-{below}"));
                let copied = Command::new("cp").arg("-a").arg(below).arg(&upper).status();
                assert!(copied.unwrap().success());
            }
        }
        fs::create_dir(&work).unwrap();
        let config = UnionConfig {
            upper: Some(UpperConfig { dir: upper, work }),
            volatile: true,
            ..UnionConfig::default()
        };
        let source = Source {
            digest: &digest,
            diff_id: &digest,
            file: &file,
            size: stream.len() as u64,
        };
        let union = Union::open(config).unwrap();
        let unpacked = apply(&union, &source, &Limits::default(), &Silent);
        let view = store
            .import(stream.as_slice(), &Expected::default(), &())
            .and_then(|name| {
                chain.push(name);
                store.view(&chain, Verify::First)
            });
        let view = match (unpacked, view) {
            (Ok(()), view) => view.unwrap(),
            // Only a view has links that are listed before their targets.
            (Err(Error::Layer { problem, .. }), Ok(_)) if problem.ends_with(NO_TARGET) => return,
            (Err(error), Ok(_)) => panic!("the view has no error, and unpacking has {error}"),
            (Err(_), Err(_)) => return,
        };
        let expected = union_tree(&union);
        assert_eq!(view_tree(&view), expected, "layer {number}");
        let served = Union::open(UnionConfig {
            view: Some(Arc::new(view)),
            ..UnionConfig::default()
        });
        assert_eq!(union_tree(&served.unwrap()), expected, "layer {number}");
    }
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 100,
        failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn a_view_shows_what_unpacking_shows(
        layers in prop::collection::vec(prop::collection::vec(entry(), 1..10), 1..4),
    ) {
        compare(&layers);
    }
}

#[test]
fn a_path_that_was_removed_again_counts_as_written() {
    let entry = |path: &str, thing| (path.to_owned(), thing, 1);
    compare(&[vec![
        entry("a/b/c", Thing::File(1)),
        entry("a/b", Thing::Whiteout),
        entry("a/b/x", Thing::Whiteout),
        entry("a", Thing::Opaque),
    ]]);
}

#[test]
fn a_link_to_a_symbolic_link_has_no_attributes_of_users() {
    compare(&[
        vec![("a".to_owned(), Thing::Symlink("a".to_owned()), 0)],
        vec![("b".to_owned(), Thing::HardLink("a".to_owned()), 188)],
    ]);
}
