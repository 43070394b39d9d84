use std::fs;

use super::*;
use crate::store::compression::Compressor;

/// Half of it can be compressed.
fn content(size: usize) -> Vec<u8> {
    let mut random = blake3::Hasher::new().finalize_xof();
    let mut content = vec![0; size];
    random.fill(&mut content);
    for part in content.chunks_mut(FRAME).step_by(2) {
        part.fill(7);
    }
    content
}

fn written(path: &Path, content: &[u8]) -> Object {
    let file = File::create_new(path).unwrap();
    let size = content.len() as u64;
    let mut layout = Layout::new(size);
    let mut compressor = Compressor::new(1).unwrap();
    for (number, part) in content.chunks(FRAME).enumerate() {
        let place = ((number * FRAME) as u64, size);
        let frame = Frame::new(part.to_vec(), place, &mut compressor).unwrap();
        layout.append(&file, &frame).unwrap();
    }
    let object = layout.finish(&file).unwrap();
    let name = ObjectName::of(content);
    assert_eq!(object, Object { name, size });
    object
}

fn open(path: &Path, object: &Object, check: &Check) -> Result<Framed> {
    let file = File::open(path).unwrap();
    let length = file.metadata().unwrap().len();
    Framed::open(path, file, length, object, check, &Arc::default())
}

fn parts(verify: Verify, frames: Option<&Framed>) -> Check {
    Check::Parts {
        verify,
        known: false,
        frames: frames.map(|framed| Arc::clone(framed.checks())),
    }
}

/// Compares the bytes at `from` with those of `content`; an error is that of the read.
fn compare(framed: &Framed, content: &[u8], from: usize, length: usize) -> io::Result<()> {
    let mut buffer = vec![0xee; length];
    let count = framed.read_at(&mut buffer, from as u64)?;
    let expected = content.get(from..).unwrap_or_default();
    let expected = &expected[..length.min(expected.len())];
    assert!(buffer[..count] == *expected, "{length} at {from}");
    Ok(())
}

#[test]
fn every_part_reads_as_the_whole_does() {
    let tmp = tempfile::tempdir().unwrap();
    for size in [1, FRAME - 1, FRAME, FRAME + 1, 3 * FRAME + 500] {
        let path = tmp.path().join(size.to_string());
        let content = content(size);
        let object = written(&path, &content);
        for check in [
            Check::Nothing,
            Check::Whole,
            Check::PARTS,
            parts(Verify::Always, None),
        ] {
            let framed = open(&path, &object, &check).unwrap();
            for (from, length) in [
                (0, size),
                (0, 1),
                (size - 1, 10),
                (size, 10),
                (size / 2, FRAME),
                (FRAME - 5, 10),
                (2 * FRAME - 5, FRAME + 10),
                (FRAME + 1, FRAME - 2),
            ] {
                compare(&framed, &content, from, length).unwrap();
            }
        }
    }
}

#[test]
fn a_file_in_frames_never_has_as_many_bytes_as_its_content() {
    let tmp = tempfile::tempdir().unwrap();
    // The first frame is stored as it is; the second is made shorter by as much as the rest takes.
    let mut met = false;
    for zeros in 0..600 {
        let mut content = vec![0; FRAME + 300];
        blake3::Hasher::new().finalize_xof().fill(&mut content);
        content.extend(std::iter::repeat_n(0, zeros));
        let path = tmp.path().join("object");
        let object = written(&path, &content);
        let length = fs::metadata(&path).unwrap().len();
        assert_ne!(length, object.size);
        open(&path, &object, &Check::Whole).unwrap();
        fs::remove_file(&path).unwrap();
        met |= length == object.size + 1;
    }
    assert!(met, "no content was as long as its frames");
}

#[test]
fn every_damaged_byte_is_an_error() {
    let tmp = tempfile::tempdir().unwrap();
    let path = tmp.path().join("object");
    let content = content(2 * FRAME + 100);
    let object = written(&path, &content);
    let whole = fs::read(&path).unwrap();
    // The header, the table, the compressed frames; of the plain one some bytes.
    for at in (0..2000).chain((2000..whole.len()).step_by(997)) {
        let mut bad = whole.clone();
        bad[at] ^= 0x41;
        fs::write(&path, &bad).unwrap();
        // Bytes of the header that nobody reads yet are under its sum as well.
        assert!(open(&path, &object, &Check::Whole).is_err(), "{at}");
        // The first who reads something of it is told, also when it is less than a frame.
        let length = [FRAME, 40_000][at % 2];
        if at % 7 == 0
            && let Ok(framed) = open(&path, &object, &Check::PARTS)
        {
            let mut reads = (0..content.len()).step_by(length);
            let failed = reads.any(|from| compare(&framed, &content, from, length).is_err());
            assert!(failed && framed.checks().has_failed(), "{at}");
        }
    }
    for length in [0, 1, 63, 64, 100, whole.len() - 1] {
        fs::write(&path, &whole[..length]).unwrap();
        assert!(
            open(&path, &object, &Check::Nothing).is_err(),
            "cut at {length}"
        );
    }
}

/// Once all of an object was read and hashed before its first byte was handed out.
#[test]
fn nothing_is_read_that_was_not_asked_for_and_only_what_is_damaged_fails() {
    let tmp = tempfile::tempdir().unwrap();
    let path = tmp.path().join("object");
    let content = content(5 * FRAME);
    let object = written(&path, &content);
    let sound = open(&path, &object, &Check::PARTS).unwrap();
    let damage = |number: u64| {
        let Stored { start, .. } = sound.table.stored(number).unwrap();
        let file = File::options().write(true).open(&path).unwrap();
        file.write_all_at(b"rot", start + 5).unwrap();
    };
    // One that is compressed and one that is not.
    damage(2);
    damage(3);
    for verify in [Verify::First, Verify::Always] {
        let framed = open(&path, &object, &parts(verify, None)).unwrap();
        for number in [0, 1, 4] {
            compare(&framed, &content, number * FRAME, FRAME).unwrap();
            compare(&framed, &content, number * FRAME + 9, 100).unwrap();
        }
        assert!(!framed.checks().has_failed());
        for number in [2, 3] {
            for (within, length) in [(0, FRAME), (0, 1), (FRAME - 1, 1), (FRAME - 1, 2)] {
                let failed = compare(&framed, &content, number * FRAME + within, length);
                let error = failed.unwrap_err();
                assert_eq!(error.kind(), io::ErrorKind::InvalidData);
                let message = error.to_string();
                let named = message.contains(&format!("its frame {number}"));
                assert!(
                    named && message.contains(path.to_str().unwrap()),
                    "{message}"
                );
            }
        }
        assert!(framed.checks().has_failed());
    }
    assert!(open(&path, &object, &Check::Whole).is_err());
}

#[test]
fn a_frame_is_compared_as_often_as_it_is_to_be() {
    let tmp = tempfile::tempdir().unwrap();
    let path = tmp.path().join("object");
    let content = content(4 * FRAME);
    let object = written(&path, &content);
    let whole = fs::read(&path).unwrap();
    // In its second frame, which is not compressed, and after which others come.
    let mut bad = whole.clone();
    bad[whole.len() - FRAME - FRAME / 2] ^= 1;
    let second = |framed: &Framed| {
        let mut buffer = vec![0; FRAME];
        framed.read_at(&mut buffer, FRAME as u64).is_ok()
    };
    for (verify, before, after) in [
        (Verify::Never, true, true),
        (Verify::First, false, true),
        (Verify::Always, false, false),
    ] {
        fs::write(&path, &bad).unwrap();
        let framed = open(&path, &object, &parts(verify, None)).unwrap();
        assert_eq!(second(&framed), before, "{verify:?}");
        fs::write(&path, &whole).unwrap();
        assert!(second(&framed), "{verify:?}");
        assert!(!framed.checks().has_failed());
        // Also after it was closed and opened again.
        fs::write(&path, &bad).unwrap();
        let again = open(&path, &object, &parts(verify, Some(&framed))).unwrap();
        for framed in [framed, again] {
            assert_eq!(second(&framed), after, "{verify:?}");
        }
    }
}

#[test]
fn a_frame_that_is_kept_is_compared_for_who_wants_that() {
    let tmp = tempfile::tempdir().unwrap();
    let path = tmp.path().join("object");
    let content = content(2 * FRAME);
    let object = written(&path, &content);
    // Another content, compressed into the frame's bytes.
    let mut whole = fs::read(&path).unwrap();
    let mut compressor = Compressor::new(1).unwrap();
    let other = compressor.compress(&[8; FRAME]).unwrap();
    let start = table::body(2) as usize;
    assert_eq!(other.len(), whole.len() - start - FRAME);
    whole[start..start + other.len()].copy_from_slice(&other);
    fs::write(&path, &whole).unwrap();
    let cache = Arc::new(FrameCache::default());
    let open = |check| {
        let file = File::open(&path).unwrap();
        let length = whole.len() as u64;
        Framed::open(&path, file, length, &object, &check, &cache).unwrap()
    };
    let careless = open(Check::Nothing);
    let mut buffer = [0; 10];
    careless.read_at(&mut buffer, 0).unwrap();
    assert_eq!(buffer, [8; 10]);
    for verify in [Verify::First, Verify::Always] {
        let careful = open(parts(verify, None));
        assert!(careful.read_at(&mut buffer, 0).is_err(), "{verify:?}");
    }
}

#[test]
fn values_that_do_not_make_the_name_are_refused() {
    let tmp = tempfile::tempdir().unwrap();
    let path = tmp.path().join("object");
    let content = content(3 * FRAME);
    let mut other = content.clone();
    other[FRAME + 7] ^= 1;
    // A sound file of another object.
    let found = written(&path, &other);
    let object = Object {
        name: ObjectName::of(&content),
        ..found
    };
    open(&path, &object, &Check::Nothing).unwrap();
    let known = open(&path, &found, &Check::PARTS).unwrap();
    for check in [
        Check::Whole,
        Check::PARTS,
        parts(Verify::Always, None),
        parts(Verify::Always, Some(&known)),
    ] {
        let error = open(&path, &object, &check).unwrap_err().to_string();
        assert!(error.contains("do not make its name"), "{error}");
    }
    // What is known of another table says nothing of this one.
    let elsewhere = tmp.path().join("elsewhere");
    let sound = written(&elsewhere, &content);
    let known = open(&elsewhere, &sound, &Check::PARTS).unwrap();
    let check = parts(Verify::First, Some(&known));
    assert!(open(&path, &object, &check).is_err());
}

#[test]
fn the_form_before_the_first_release_is_refused_with_a_sentence() {
    let tmp = tempfile::tempdir().unwrap();
    let path = tmp.path().join("object");
    let object = written(&path, &content(2 * FRAME));
    let mut bytes = fs::read(&path).unwrap();
    let mut with = |version: u8| {
        bytes[8] = version;
        let sum = crate::store::format::short_sum(&bytes[..56]);
        bytes[56..64].copy_from_slice(&sum);
        fs::write(&path, &bytes).unwrap();
        open(&path, &object, &Check::Nothing).unwrap_err()
    };
    let old = with(1).to_string();
    assert!(
        old.contains("before the first release") && old.contains("system repair"),
        "{old}"
    );
    let new = with(3);
    assert!(matches!(new, Error::Unsupported { .. }), "{new}");
    assert!(new.to_string().contains("version 3"), "{new}");
}

#[test]
fn what_is_kept_of_frames_is_bounded() {
    let tmp = tempfile::tempdir().unwrap();
    let path = tmp.path().join("object");
    let content = vec![7; 40 * FRAME];
    let framed = open(&path, &written(&path, &content), &Check::PARTS).unwrap();
    for number in (0..40).chain(0..40) {
        compare(&framed, &content, number * FRAME + 10, 10).unwrap();
        compare(&framed, &content, number * FRAME + 20, 10).unwrap();
    }
    assert!(framed.cache.0.lock().len() <= MOST_KEPT);
}
