//! Views of contents that are compressed in frames.

use super::*;

/// A store with `a`, a content of 300 KiB in frames, and its chain.
fn in_frames() -> (Fixture, Vec<LayerName>, Vec<u8>) {
    let fixture = Fixture::keeping(false);
    let mut content = vec![0; 300 << 10];
    blake3::Hasher::new().finalize_xof().fill(&mut content);
    let stream = Stream::new().entry(tar::EntryType::Regular, "a", &content, |_| {});
    let chain = fixture.chain(vec![stream.file("b", "small")]);
    (fixture, chain, content)
}

#[test]
fn damage_to_a_frame_is_counted_until_the_frame_can_be_read() {
    for verify in [Verify::First, Verify::Always] {
        let (fixture, chain, content) = in_frames();
        let view = fixture.layers.view(&chain, verify).unwrap();
        let digits = ObjectName::of(&content).to_string();
        let object = fixture.dir.path().join("objects").join(&digits[..2]);
        let object = object.join(digits);
        let sound = fs::read(&object).unwrap();
        let put = |bytes: &[u8]| {
            let new = fixture.dir.path().join("new");
            fs::write(&new, bytes).unwrap();
            fs::rename(&new, &object).unwrap();
        };
        let mut bad = sound.clone();
        *bad.last_mut().unwrap() ^= 1;
        put(&bad);
        let inode = at(&view, "a").1;
        let read = |file: &ViewFile, from: usize| {
            let mut buffer = [0; 10];
            view.read_at(file, &mut buffer, from as u64)?;
            assert!(buffer == content[from..from + 10]);
            Ok::<_, crate::store::Error>(())
        };
        let file = view.open_file(&inode).unwrap();
        read(&file, 5).unwrap();
        assert_eq!((view.damaged(), file.has_failed()), (0, false));
        let error = read(&file, content.len() - 20).unwrap_err();
        let named = error.to_string().contains(object.to_str().unwrap());
        assert!(
            matches!(error, crate::store::Error::Damaged { .. }) && named,
            "{error}"
        );
        assert_eq!((view.damaged(), file.has_failed()), (1, true));
        // Neither a sound frame nor another open takes that back.
        read(&file, 5).unwrap();
        let again = view.open_file(&inode).unwrap();
        assert_eq!(view.damaged(), 1, "{verify:?}");
        read(&again, 200_000).unwrap();
        assert_eq!((view.damaged(), again.has_failed()), (1, false));
        put(&sound);
        let mended = view.open_file(&inode).unwrap();
        assert_eq!(view.damaged(), 1);
        read(&mended, content.len() - 20).unwrap();
        assert_eq!(view.damaged(), 0);
    }
}

/// Of two who opened a file at once one went on with notes that nobody else looked at.
#[test]
fn all_who_open_at_once_know_the_same_of_frames() {
    const READERS: usize = 4;
    let (fixture, chain, _) = in_frames();
    for verify in [Verify::First, Verify::Always] {
        for _ in 0..200 {
            let view = fixture.layers.view(&chain, verify).unwrap();
            let inode = at(&view, "a").1;
            let barrier = std::sync::Barrier::new(READERS);
            let open = || {
                barrier.wait();
                view.open_file(&inode).unwrap()
            };
            let files = std::thread::scope(|scope| {
                let readers = [(); READERS].map(|()| scope.spawn(open));
                readers.map(|reader| reader.join().unwrap())
            });
            let checks = |file: &ViewFile| Arc::clone(file.framed().next().unwrap().1.checks());
            let first = checks(&files[0]);
            for file in &files {
                assert!(Arc::ptr_eq(&first, &checks(file)), "{verify:?}");
            }
        }
    }
}
