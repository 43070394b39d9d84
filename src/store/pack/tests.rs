use super::*;

fn contents() -> Vec<Vec<u8>> {
    vec![
        b"a".to_vec(),
        b"plywood ".repeat(100),
        (0..=255).collect(),
        vec![0; 5000],
    ]
}

fn object(content: &[u8]) -> Object {
    Object {
        name: ObjectName::of(content),
        size: content.len() as u64,
    }
}

fn sealed(dir: &Path) -> SealedPack {
    let mut writer = PackWriter::create(dir).unwrap();
    for content in contents() {
        let encoded =
            Encoded::new(object(&content), content, &mut Compressor::new(1).unwrap()).unwrap();
        writer.append(&encoded).unwrap();
    }
    writer.seal().unwrap()
}

fn sorted(mut objects: Vec<(Object, Slot)>) -> Vec<(Object, Slot)> {
    objects.sort_unstable_by_key(|(object, _)| object.name);
    objects
}

#[test]
fn objects_come_back_and_are_compressed_where_it_pays() {
    let tmp = tempfile::tempdir().unwrap();
    let pack = sealed(tmp.path());
    let found = look_into(&pack.path, pack.id).unwrap();
    assert_eq!((found.problem(), &found.objects), (None, &pack.objects));
    let file = File::open(&pack.path).unwrap();
    for content in contents() {
        let of = object(&content);
        let (_, slot) = pack.objects.iter().find(|(other, _)| *other == of).unwrap();
        assert_eq!(read(&file, &of, *slot, true).unwrap(), content);
        assert_eq!(
            (slot.stored as usize) < content.len() / 2,
            content.len() > 256
        );
    }
}

#[test]
fn a_pack_without_an_end_is_read_up_to_its_tail() {
    let tmp = tempfile::tempdir().unwrap();
    let pack = sealed(tmp.path());
    let whole = fs::read(&pack.path).unwrap();
    let mut ends: Vec<u64> = pack
        .objects
        .iter()
        .map(|(_, slot)| {
            let stored = u64::from(slot.stored);
            slot.offset + HEADER as u64 + stored + padding(stored)
        })
        .collect();
    ends.sort_unstable();
    for length in HEADER..whole.len() {
        fs::write(&pack.path, &whole[..length]).unwrap();
        let found = look_into(&pack.path, pack.id).unwrap();
        assert_eq!((found.features, found.has_table), (Some(0), false));
        assert!(found.problem().is_some());
        let found = sorted(found.objects);
        let complete = ends.iter().filter(|end| **end <= length as u64).count();
        assert_eq!(found.len(), complete, "cut at {length}");
        assert!(found.iter().all(|entry| pack.objects.contains(entry)));
    }
    for length in 0..HEADER {
        fs::write(&pack.path, &whole[..length]).unwrap();
        let found = look_into(&pack.path, pack.id).unwrap();
        assert_eq!((found.features, found.has_table), (None, false));
        assert!(found.problem().is_some() && found.objects.is_empty());
    }
}

#[test]
fn objects_are_found_by_a_sound_table_or_a_sound_start() {
    let tmp = tempfile::tempdir().unwrap();
    let pack = sealed(tmp.path());
    let whole = fs::read(&pack.path).unwrap();
    let table = whole.len() - HEADER - contents().len() * TABLE_ENTRY;
    let in_header = (0..8).chain(40..HEADER);
    let in_table = (table..table + TABLE_ENTRY).chain(whole.len() - HEADER..whole.len() - 40);
    for damaged in in_header.clone().map(|at| vec![at]).chain([vec![]]) {
        for also in in_table.clone().map(|at| vec![at]).chain([vec![]]) {
            let mut bad = whole.clone();
            for at in damaged.iter().chain(&also) {
                bad[*at] ^= 0x41;
            }
            fs::write(&pack.path, &bad).unwrap();
            let found = look_into(&pack.path, pack.id).unwrap();
            assert_eq!(found.features.is_none(), !damaged.is_empty());
            assert_eq!(found.has_table, also.is_empty());
            let is_sound = damaged.is_empty() && also.is_empty();
            assert_eq!(found.problem().is_none(), is_sound);
            assert_eq!(sorted(found.objects), pack.objects, "{damaged:?} {also:?}");
        }
    }
    // Under another's name it is read, too.
    fs::write(&pack.path, &whole).unwrap();
    let other = look_into(&pack.path, PackId([7; 16])).unwrap();
    assert_eq!((other.features, other.objects), (None, pack.objects));
}

#[test]
fn what_the_host_cannot_read_is_told_and_no_error() {
    let tmp = tempfile::tempdir().unwrap();
    // Something that can be opened, has a length, and fails each read.
    let found = look_into(tmp.path(), PackId([7; 16])).unwrap();
    assert_eq!((found.features, found.has_table), (None, false));
    assert!(found.objects.is_empty());
    let problem = found.problem().unwrap();
    let error = File::open(tmp.path()).unwrap().read_at(&mut [0], 0);
    assert!(
        problem.ends_with(&error.unwrap_err().to_string()),
        "{problem}"
    );
}

#[test]
fn every_damaged_byte_is_an_error_or_changes_nothing() {
    let tmp = tempfile::tempdir().unwrap();
    let pack = sealed(tmp.path());
    let whole = fs::read(&pack.path).unwrap();
    for at in 0..whole.len() {
        let mut bad = whole.clone();
        bad[at] ^= 0x41;
        fs::write(&pack.path, &bad).unwrap();
        let file = File::open(&pack.path).unwrap();
        // By the slots that a view or an index in memory has.
        for content in contents() {
            let of = object(&content);
            let (_, slot) = pack.objects.iter().find(|(other, _)| *other == of).unwrap();
            if let Ok(seen) = read(&file, &of, *slot, true) {
                assert_eq!(seen, content, "byte {at}");
            }
        }
        // By the slots that the pack itself gives.
        let found = look_into(&pack.path, pack.id).map(|found| found.objects);
        for (object, slot) in found.unwrap_or_default() {
            if let Ok(seen) = read(&file, &object, slot, true) {
                assert_eq!(ObjectName::of(&seen), object.name, "byte {at}");
            }
        }
    }
}

#[test]
fn what_was_not_sealed_is_removed() {
    let tmp = tempfile::tempdir().unwrap();
    drop(PackWriter::create(tmp.path()).unwrap());
    assert_eq!(fs::read_dir(tmp.path()).unwrap().count(), 0);
}

#[test]
fn names_of_files_have_one_spelling() {
    let id = PackId([0xab; 16]);
    assert_eq!(PackId::of_file(&id.file_name()), Some(id));
    for name in ["ab.pack", "x", &id.file_name().to_uppercase()] {
        assert_eq!(PackId::of_file(name), None, "{name}");
    }
}
