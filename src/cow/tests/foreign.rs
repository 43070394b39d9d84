//! An upper that is read as a layer while its own union goes on.

use std::sync::Arc;
use std::time::Duration;

use super::chunks::{CHUNK, config, cut, fixture, maps, pattern, reopen, restart, write};
use super::*;
use crate::cow::chunks::content_over;
use crate::cow::copyup::Content;
use crate::cow::dir_lower::HostFile;
use crate::cow::export::{Links, copy_index, copy_layer, copy_upper};

/// The upper as the topmost layer, with its work directory.
fn as_layers(fixture: &Fixture) -> UnionConfig {
    let lowers = [fixture.upper()].into_iter();
    UnionConfig {
        lowers: lowers.chain(fixture.lowers.clone()).collect(),
        lower_work: Some(fixture.base.path().join("work")),
        ..UnionConfig::default()
    }
}

fn reader(fixture: &Fixture) -> Union {
    Union::open(as_layers(fixture)).unwrap()
}

/// The content of a file as others see it, of which no data is said to be a hole.
pub(super) fn read_by_others(fixture: &Fixture, name: &str) -> Vec<u8> {
    let union = reader(fixture);
    let found = union.lookup(NodeId::ROOT, name.as_ref()).unwrap();
    let content = read_node(&union, found.node).unwrap();
    assert_eq!(content.len() as u64, found.attr.size);
    let seek = |from: usize, whence| match union.lseek(found.node, None, from as i64, whence) {
        Ok(at) => at as usize,
        Err(error) => {
            assert_eq!(error.errno, libc::ENXIO);
            content.len()
        }
    };
    let mut at = 0;
    while at < content.len() {
        let data = seek(at, libc::SEEK_DATA);
        assert!(content[at..data].iter().all(|byte| *byte == 0));
        at = seek(data, libc::SEEK_HOLE);
    }
    content
}

fn read_node(union: &Union, node: NodeId) -> Result<Vec<u8>> {
    let mut buf = vec![0; 1 << 20];
    let n = union.read(node, None, 0, &mut buf)?;
    buf.truncate(n);
    Ok(buf)
}

fn read_by(union: &Union, name: &str) -> Result<Vec<u8>> {
    read_node(union, union.lookup(NodeId::ROOT, name.as_ref())?.node)
}

fn put_at(content: &mut [u8], at: u64, new: &[u8]) {
    content[at as usize..at as usize + new.len()].copy_from_slice(new);
}

#[test]
fn a_file_is_read_as_it_is_whatever_becomes_of_it() {
    let mut expected = pattern(10 * CHUNK, 1);
    let mut fixture = fixture(&["f"], &expected);
    let config = config(&fixture);
    // The directory has been listed, without the file.
    let before = reader(&fixture);
    assert!(read_by(&before, "nothing").is_err());
    let attributes = SetAttr {
        perm: Some(0o640),
        ..SetAttr::default()
    };
    let node = fixture.node("f");
    let union = fixture.union();
    union
        .setattr(node, None, &attributes, &Caller::ROOT)
        .unwrap();
    let no_data = reader(&fixture);
    let found = no_data.lookup(NodeId::ROOT, "f".as_ref()).unwrap().node;

    let mut change = |at: u64, new: &[u8]| {
        write(&fixture, "f", at, new);
        put_at(&mut expected, at, new);
        expected.clone()
    };
    let now = change(CHUNK + 5, b"first");
    assert!(read_by(&before, "f").unwrap() == now);
    // It was found without any data.
    assert!(read_node(&no_data, found).unwrap() == now);
    let held = reader(&fixture);
    let file = held.lookup(NodeId::ROOT, "f".as_ref()).unwrap();
    assert_eq!((file.attr.size, file.attr.perm), (10 * CHUNK, 0o640));
    assert!(read_node(&held, file.node).unwrap() == now);
    let now = change(7 * CHUNK - 2, b"second");
    assert!(read_node(&held, file.node).unwrap() == now);

    cut(&fixture, "f", 6 * CHUNK + 3);
    cut(&fixture, "f", 9 * CHUNK);
    let mut cut_off = now[..6 * CHUNK as usize + 3].to_vec();
    cut_off.resize(9 * CHUNK as usize, 0);
    fixture.mv("f", "g");
    for _ in 0..2 {
        assert!(read_node(&held, file.node).unwrap() == cut_off);
        assert!(read_by_others(&fixture, "g") == cut_off);
        // As after a kill.
        reopen(&mut fixture, config.clone());
    }
    fixture.union().complete_partial().unwrap();
    assert!(maps(&fixture).is_empty());
    write(&fixture, "g", 3 * CHUNK, b"third");
    put_at(&mut cut_off, 3 * CHUNK, b"third");
    assert!(read_node(&held, file.node).unwrap() == cut_off);
    assert!(read_by_others(&fixture, "g") == cut_off);
}

#[test]
fn after_a_restart_of_the_host_what_was_synced_is_read() {
    let mut expected = pattern(8 * CHUNK, 1);
    let mut fixture = fixture(&["f"], &expected);
    let durable = UnionConfig {
        volatile: false,
        ..config(&fixture)
    };
    reopen(&mut fixture, durable.clone());
    write(&fixture, "f", 100, b"synced");
    put_at(&mut expected, 100, b"synced");
    fixture.union().sync().unwrap();
    write(&fixture, "f", 5 * CHUNK, b"not synced");
    fixture.union = None;
    restart(&fixture);
    let map = maps(&fixture).remove(0);
    let saved = std::fs::read(&map).unwrap();
    assert!(read_by(&reader(&fixture), "f").unwrap() == expected);
    // Whoever only reads leaves that to the next mount.
    assert!(std::fs::read(&map).unwrap() == saved);
    std::fs::write(&map, b"").unwrap();
    assert!(read_by(&reader(&fixture), "f").unwrap() == pattern(8 * CHUNK, 1));
    std::fs::remove_file(&map).unwrap();
    assert_eq!(errno(read_by(&reader(&fixture), "f")), libc::EIO);
    std::fs::write(&map, saved).unwrap();
    // As a layer of its own it lacks its maps.
    let layer = UnionConfig {
        lower_work: None,
        ..as_layers(&fixture)
    };
    let found = Union::open(layer)
        .unwrap()
        .lookup(NodeId::ROOT, "f".as_ref());
    assert_eq!(errno(found), libc::EIO);
}

/// Its map is gone by the time it is looked for.
#[test]
fn a_file_that_is_completed_while_it_is_opened_is_read_itself() {
    let mut expected = pattern(4 * CHUNK, 1);
    let fixture = fixture(&["f"], &expected);
    write(&fixture, "f", CHUNK, b"new");
    put_at(&mut expected, CHUNK, b"new");
    let open = |path| {
        let file = std::fs::File::open(path).unwrap();
        Arc::new(HostFile::new(file.into(), 4 * CHUNK))
    };
    let work = fixture.base.path().join("work");
    let file = content_over(
        open(fixture.upper().join("f")),
        &work,
        XattrFamily::Trusted,
        || {
            fixture.union().complete_partial().unwrap();
            Ok((open(fixture.lowers[0].join("f")) as Arc<_>, 4 * CHUNK))
        },
    );
    let mut content = vec![0; 5 * CHUNK as usize];
    let length = file.unwrap().read_at(&mut content, 0).unwrap();
    assert!(content[..length] == expected);
}

#[test]
fn a_file_is_read_right_while_it_is_written_and_completed() {
    let content = pattern(64 * CHUNK, 1);
    let names: Vec<String> = (0..50).map(|n| format!("f{n}")).collect();
    let names: Vec<&str> = names.iter().map(String::as_str).collect();
    let mut fixture = fixture(&names, &content);
    let config = config(&fixture);
    reopen(&mut fixture, config);
    let mut after = content.clone();
    put_at(&mut after, 20 * CHUNK, b"new");
    std::thread::scope(|scope| {
        let writer = scope.spawn(|| {
            for name in &names {
                write(&fixture, name, 20 * CHUNK, b"new");
                std::thread::sleep(Duration::from_micros(300));
                let node = fixture.union().table.get(fixture.node(name)).unwrap();
                fixture.union().copy_up(&node, Content::All).unwrap();
            }
        });
        while !writer.is_finished() {
            let reader = reader(&fixture);
            for name in &names {
                let now = read_by(&reader, name).unwrap();
                assert!(now == content || now == after, "{name}");
            }
        }
    });
}

/// What of the index has a map, too, is whole in a copy, also if its names are the layers' alone.
#[test]
fn a_copy_has_all_the_data_and_no_map() {
    let content = pattern(10 * CHUNK, 1);
    let mut fixture = Fixture::new(1, |lowers| {
        std::fs::write(lowers[0].join("a"), &content).unwrap();
        std::fs::write(lowers[0].join("own"), &content).unwrap();
        std::fs::hard_link(lowers[0].join("a"), lowers[0].join("b")).unwrap();
    });
    let config = config(&fixture);
    reopen(&mut fixture, config);
    let mut expected = content;
    for name in ["a", "own"] {
        write(&fixture, name, 3 * CHUNK, b"new");
    }
    put_at(&mut expected, 3 * CHUNK, b"new");
    fixture.unlink("a").unwrap();
    fixture.mv("own", "moved");

    let to = fixture.base.path().join("copy");
    std::fs::create_dir(&to).unwrap();
    let [lower, upper, work] = ["lower", "upper", "work"].map(|name| to.join(name));
    let mut links = Links::default();
    copy_layer(&fixture.lowers[0], &lower, &mut links).unwrap();
    let refused = copy_layer(&fixture.upper(), &to.join("refused"), &mut Links::default());
    assert!(
        refused
            .unwrap_err()
            .to_string()
            .contains("upper/moved is copied up in part")
    );
    copy_upper(&fixture.upper(), &upper, &mut links, &reader(&fixture)).unwrap();
    copy_index(&fixture.base.path().join("work"), None, &work, &links).unwrap();
    assert_eq!(maps(&fixture).len(), 2);
    assert!(!work.join("work").exists());
    let copy = Union::open(UnionConfig {
        lowers: vec![lower],
        upper: Some(UpperConfig { dir: upper, work }),
        ..UnionConfig::default()
    });
    let copy = copy.unwrap();
    for name in ["b", "moved"] {
        assert!(read_by(&copy, name).unwrap() == expected, "{name}");
    }
    assert!(read_by(&copy, "a").is_err());
}
