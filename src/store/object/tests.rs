use super::*;
use crate::store::compression::Compressor;
use crate::store::pack::{Encoded, PackWriter};

fn object(content: &[u8]) -> Object {
    Object {
        name: ObjectName::of(content),
        size: content.len() as u64,
    }
}

fn bytes(content: &Content, size: usize) -> Vec<u8> {
    let mut buffer = vec![0; size + 10];
    let count = content.read_at(&mut buffer, 0).unwrap();
    buffer.truncate(count);
    buffer
}

fn packed(dir: &Path, content: &[u8]) -> SealedPack {
    let mut pack = PackWriter::create(dir).unwrap();
    let encoded = Encoded::new(
        object(content),
        content.to_vec(),
        &mut Compressor::new(1).unwrap(),
    )
    .unwrap();
    pack.append(&encoded).unwrap();
    pack.seal().unwrap()
}

fn store(dir: &Path) -> Objects {
    let mut objects = Objects::new(dir);
    objects.prepare().unwrap();
    objects
}

#[test]
fn objects_are_found_at_once_and_after_opening_again() {
    let tmp = tempfile::tempdir().unwrap();
    let objects = store(tmp.path());
    let mut file = FileWriter::create(tmp.path()).unwrap();
    file.write(b"large ").unwrap();
    file.write(b"one").unwrap();
    let pack = packed(tmp.path(), b"small one");
    objects
        .publish(Some(pack), vec![file.finish().unwrap()])
        .unwrap();
    for objects in [objects, store(tmp.path()), Objects::new(tmp.path())] {
        for content in [&b"large one"[..], b"small one"] {
            let read = objects.read(&object(content), None, true).unwrap();
            assert_eq!(bytes(&read, content.len()), content);
        }
        assert_eq!(objects.find(&ObjectName::of(b"none")).unwrap(), None);
        let error = objects.read(&object(b"none"), None, true).unwrap_err();
        assert!(error.to_string().contains("neither"), "{error}");
    }
}

#[test]
fn an_object_that_has_moved_is_looked_for_by_its_name() {
    let tmp = tempfile::tempdir().unwrap();
    let objects = store(tmp.path());
    objects
        .publish(Some(packed(tmp.path(), b"content")), Vec::new())
        .unwrap();
    let of = object(b"content");
    let gone = Place::Packed {
        pack: PackId([7; 16]),
        offset: 64,
        stored: 7,
    };
    let Some(Place::Packed { pack, stored, .. }) = objects.find(&of.name).unwrap() else {
        panic!("it is in a pack");
    };
    let elsewhere = Place::Packed {
        pack,
        offset: 0,
        stored,
    };
    for place in [gone, elsewhere, Place::File] {
        let read = objects.read(&of, Some(place), true).unwrap();
        assert_eq!(bytes(&read, 7), b"content");
    }
}

#[test]
fn damage_to_a_file_is_seen_when_it_is_verified() {
    let tmp = tempfile::tempdir().unwrap();
    let objects = store(tmp.path());
    let mut file = FileWriter::create(tmp.path()).unwrap();
    file.write(b"content").unwrap();
    objects.publish(None, vec![file.finish().unwrap()]).unwrap();
    let of = object(b"content");
    let path = objects.path_of(&of.name);
    fs::write(&path, b"contend").unwrap();
    assert!(objects.read(&of, None, false).is_ok());
    let error = objects.read(&of, None, true).unwrap_err();
    assert!(matches!(error, Error::Damaged { .. }), "{error}");
    fs::write(&path, b"conten").unwrap();
    assert!(objects.read(&of, None, false).is_err());
}

/// A collection once forgot where dead files were, let go of the locks, and removed the files by their names, which an
/// import had brought again meanwhile.
#[test]
fn a_file_that_comes_again_while_its_directory_is_swept_stays() {
    let tmp = tempfile::tempdir().unwrap();
    let objects = store(tmp.path());
    let first = b"first".to_vec();
    let dir = ObjectName::of(&first).to_string()[..2].to_owned();
    let mut others = (0u32..).map(|number| number.to_le_bytes().to_vec());
    let beside = |content: &Vec<u8>| ObjectName::of(content).to_string().starts_with(&dir);
    let contents = [first, others.find(beside).unwrap()];
    let bring = || {
        let _importing = objects.importing();
        for content in &contents {
            let of = object(content);
            assert_eq!(
                objects.find_for_import(&of, &Seen::default()).unwrap(),
                None
            );
            let mut file = FileWriter::create(tmp.path()).unwrap();
            file.write(content).unwrap();
            objects.publish(None, vec![file.finish().unwrap()]).unwrap();
        }
    };
    bring();
    let _collecting = objects.collecting();
    let mut removed = 0;
    let told = &mut |_, _| {
        if removed == 0 {
            bring();
        }
        removed += 1;
    };
    objects
        .sweep_files(&dir, &Live::new(), false, told)
        .unwrap();
    assert_eq!(removed, 1);
    for content in &contents {
        let read = objects.read(&object(content), None, true).unwrap();
        assert_eq!(bytes(&read, content.len()), *content);
    }
}

/// A pack that ended within the last bytes of a content was long enough for it, for nobody counted the header.
#[test]
fn a_pack_is_too_short_when_the_last_byte_of_a_content_is_gone() {
    let tmp = tempfile::tempdir().unwrap();
    let objects = store(tmp.path());
    let content = b"content";
    let sealed = packed(tmp.path(), content);
    let path = objects.pack_path(sealed.id);
    objects.publish(Some(sealed), Vec::new()).unwrap();
    let object = object(content);
    objects.look_for(&object, &Seen::default()).unwrap();
    let Some(Place::Packed { offset, stored, .. }) = objects.find(&object.name).unwrap() else {
        panic!("it is not in a pack");
    };
    let end = offset + 64 + u64::from(stored);
    let file = File::options().write(true).open(path).unwrap();
    for (length, is_there) in [(end, true), (end - 1, false)] {
        file.set_len(length).unwrap();
        assert_eq!(objects.read(&object, None, true).is_ok(), is_there);
        assert_eq!(
            objects.look_for(&object, &Seen::default()).is_ok(),
            is_there,
            "{length} bytes"
        );
    }
}

#[test]
fn what_is_not_published_is_removed() {
    let tmp = tempfile::tempdir().unwrap();
    let mut file = FileWriter::create(tmp.path()).unwrap();
    file.write(b"content").unwrap();
    drop(file.finish().unwrap());
    drop(FileWriter::create(tmp.path()).unwrap());
    assert_eq!(fs::read_dir(tmp.path()).unwrap().count(), 0);
}

/// A store with one object, and the path of the pack that it lies in.
fn with_content(dir: &Path) -> (Objects, Object, PathBuf) {
    let objects = store(dir);
    let sealed = packed(dir, b"content");
    let path = objects.pack_path(sealed.id);
    objects.publish(Some(sealed), Vec::new()).unwrap();
    (objects, object(b"content"), path)
}

/// The end of another import gave a bad copy its place back while one was bringing a good one.
#[test]
fn nothing_is_given_back_while_an_import_is_under_way() {
    let tmp = tempfile::tempdir().unwrap();
    let (objects, object, path) = with_content(tmp.path());
    let place = objects.find(&object.name).unwrap();
    assert!(place.is_some());
    fs::remove_file(path).unwrap();
    let importing = objects.importing();
    assert_eq!(
        objects.find_for_import(&object, &Seen::default()).unwrap(),
        None
    );
    objects.give_back();
    assert_eq!(objects.find(&object.name).unwrap(), None);
    drop(importing);
    assert_eq!(objects.find(&object.name).unwrap(), place);
}

/// Each of ten thousand contents of a pack had an import look for it.
#[test]
fn an_import_looks_once_for_a_pack() {
    let tmp = tempfile::tempdir().unwrap();
    let (objects, object, path) = with_content(tmp.path());
    let _importing = objects.importing();
    let first = Seen::default();
    assert!(objects.find_for_import(&object, &first).unwrap().is_some());
    fs::remove_file(path).unwrap();
    assert!(objects.find_for_import(&object, &first).unwrap().is_some());
    // The next one misses it.
    let next = Seen::default();
    assert_eq!(objects.find_for_import(&object, &next).unwrap(), None);
}
