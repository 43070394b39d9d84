use super::*;
use crate::store::Error;

fn sample() -> Vec<u8> {
    let mut writer = IndexWriter::default();
    writer.section(Section::Names, b"names".to_vec());
    writer.section(Section::Texts, vec![7; 10_000]);
    writer.section(Section::Packs, vec![1; 32]);
    let mut file = Vec::new();
    let identity = Identity {
        key: [3; 32],
        tar_bytes: 5,
    };
    writer.write(&mut file, Kind::View, &identity).unwrap();
    file
}

fn opened(bytes: &[u8]) -> Result<IndexFile> {
    let tmp = tempfile::NamedTempFile::new().unwrap();
    std::fs::write(tmp.path(), bytes).unwrap();
    IndexFile::open(tmp.path(), Kind::View)
}

/// It was written over by pages of the one that it had replaced.
#[test]
fn pages_are_not_restored_in_another_file_that_has_taken_the_place() {
    let tmp = tempfile::tempdir().unwrap();
    let path = tmp.path().join("view");
    let good = tmp.path().join("good");
    std::fs::write(&good, sample()).unwrap();
    let mut bytes = sample();
    bytes[HEADER + 5000] ^= 1;
    std::fs::write(&path, &bytes).unwrap();
    let damaged = IndexFile::open(&path, Kind::View).unwrap();
    let new = tmp.path().join("new");
    std::fs::write(&new, b"another").unwrap();
    std::fs::rename(&new, &path).unwrap();
    let good = File::open(&good).unwrap();
    assert!(!damaged.restore_pages(&good).unwrap());
    assert_eq!(std::fs::read(&path).unwrap(), b"another");
}

/// Everything that a reader can get of it.
fn contents(index: &IndexFile) -> Result<Vec<Vec<u8>>> {
    [Section::Names, Section::Texts, Section::Packs]
        .into_iter()
        .map(|section| {
            let bytes = u64::from(index.count(section)) * section.record() as u64;
            index.slice(section, 0, bytes).map(<[u8]>::to_vec)
        })
        .collect()
}

#[test]
fn gives_back_what_was_written() {
    let index = opened(&sample()).unwrap();
    assert_eq!(index.identity().key, [3; 32]);
    assert_eq!(index.identity().tar_bytes, 5);
    assert_eq!(index.slice(Section::Names, 1, 3).unwrap(), b"ame");
    assert_eq!(index.count(Section::Packs), 2);
    assert_eq!(index.record(Section::Packs, 1).unwrap().0, [1; 16]);
    assert_eq!(index.count(Section::Layers), 0);
    index.verify_all().unwrap();
}

#[test]
fn nothing_outside_a_section_is_reached() {
    let index = opened(&sample()).unwrap();
    for (section, at, bytes) in [
        (Section::Names, 0, 6),
        (Section::Names, 6, 0),
        (Section::Names, u64::MAX, 2),
        (Section::Texts, 10_000, 1),
        (Section::Layers, 0, 1),
    ] {
        assert!(index.slice(section, at, bytes).is_err(), "{section:?} {at}");
    }
    assert!(index.record(Section::Packs, 2).is_err());
    assert!(index.record(Section::Packs, u32::MAX).is_err());
}

#[test]
fn every_damaged_byte_is_an_error_or_changes_nothing() {
    let good = sample();
    let expected = contents(&opened(&good).unwrap()).unwrap();
    for at in 0..good.len() {
        let mut bad = good.clone();
        bad[at] ^= 0x10;
        let seen = opened(&bad).and_then(|index| contents(&index));
        // Padding between sections is covered by a page's sum, too.
        assert!(seen.is_err() || seen.unwrap() == expected, "byte {at}");
    }
    for length in (0..good.len()).step_by(97) {
        assert!(opened(&good[..length]).is_err(), "cut at {length}");
    }
}

#[test]
fn damage_is_known_from_when_it_is_read_until_what_is_read_is_sound() {
    let tmp = tempfile::NamedTempFile::new().unwrap();
    std::fs::write(tmp.path(), sample()).unwrap();
    let index = IndexFile::open(tmp.path(), Kind::View).unwrap();
    let flip = |at: u64| {
        let file = File::options().read(true).write(true).open(tmp.path());
        let (file, mut byte) = (file.unwrap(), [0]);
        file.read_exact_at(&mut byte, at).unwrap();
        file.write_all_at(&[byte[0] ^ 1], at).unwrap();
    };
    flip(HEADER as u64 + PAGE + 7);
    index.slice(Section::Names, 0, 5).unwrap();
    assert!(!index.is_damaged());
    assert!(contents(&index).is_err());
    assert!(index.is_damaged());
    flip(HEADER as u64 + PAGE + 7);
    contents(&index).unwrap();
    assert!(!index.is_damaged());
}

#[test]
fn a_file_that_is_cut_off_while_it_is_open_is_an_error_and_no_signal() {
    let tmp = tempfile::NamedTempFile::new().unwrap();
    std::fs::write(tmp.path(), sample()).unwrap();
    let index = IndexFile::open(tmp.path(), Kind::View).unwrap();
    tmp.as_file().set_len(2000).unwrap();
    assert!(matches!(contents(&index), Err(Error::Damaged { .. })));
}

#[test]
fn unknown_features_are_honoured() {
    let patched = |at: usize, value: u8| {
        let mut file = sample();
        file[at] = value;
        let sum = *blake3::hash(&file[..SUM_AT]).as_bytes();
        file[SUM_AT..HEADER].copy_from_slice(&sum);
        opened(&file)
    };
    assert!(patched(16, 1).is_ok());
    assert!(patched(24, 1).is_ok());
    for (at, value) in [(32, 1), (8, 2)] {
        let error = patched(at, value).unwrap_err();
        assert!(error.to_string().contains("newer release"), "{error}");
    }
}
