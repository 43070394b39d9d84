//! Views whose files are written over while they are read.

use std::os::unix::fs::FileExt;

use super::*;

/// Every file was a pipe, and whoever opened one waited for ever.
#[test]
fn what_is_written_over_while_it_is_read_is_damaged_and_no_pipe() {
    let fixture = Fixture::new();
    let chain = fixture.chain(vec![Stream::new().file("file", "content")]);
    let view = fixture.layers.view(&chain, Verify::First).unwrap();
    let good = fs::read(view.path()).unwrap();
    let number = at(&view, "file").0;
    walk(&view).unwrap();
    // In its place, for it is mapped.
    let write = |bytes: &[u8]| {
        let file = OpenOptions::new().write(true).open(view.path());
        file.unwrap().write_all_at(bytes, 0).unwrap();
    };
    write(&vec![0; good.len()]);
    for _ in 0..2 {
        assert!(view.inode(number).is_err());
    }
    assert!(view.is_damaged());
    write(&good);
    assert_eq!(at(&view, "file").0, number);
    assert!(!view.is_damaged());
}
