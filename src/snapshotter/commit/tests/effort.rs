//! What a commit looks at.

use super::*;
use crate::snapshotter::diff::COMPARED;

/// As many directories of a hundred files each.
fn base(directories: usize) -> Vec<u8> {
    let mut tar = tar::Builder::new(Vec::new());
    let mut header = tar::Header::new_gnu();
    header.set_mode(0o644);
    header.set_size(0);
    for number in 0..directories * 100 {
        let path = format!("d{}/file{}", number / 100, number % 100);
        tar.append_data(&mut header, path, &[][..]).unwrap();
    }
    tar.into_inner().unwrap()
}

/// Changes, removes and makes files of an image with so many directories. Answers how many names the commit of that compared, how many
/// entries of layers it merged, and how many entries it made.
fn effort(directories: usize) -> (u64, u64, u32) {
    let place = Place::new();
    let snapshots = place.open();
    prepare(&snapshots, "unpack", None);
    let layer = (&*base(directories), &Expected::default());
    snapshots.apply_layer(OWNER, "unpack", layer, &()).unwrap();
    commit(&snapshots, "base", "unpack");
    prepare(&snapshots, "work", Some("base"));
    let union = open(&snapshots, "work");
    let changed = find(&union, "d1/file7");
    union.write(changed, None, 0, b"changed", None).unwrap();
    union
        .unlink(find(&union, "d2"), OsStr::new("file8"))
        .unwrap();
    let made = union.mkdir(ROOT, OsStr::new("made"), 0o755, &Caller::ROOT);
    write(&union, made.unwrap().node, "file", b"made");
    drop(union);
    let merged = snapshots.packed_layers().merged_entries();
    COMPARED.set(0);
    let info = commit(&snapshots, "done", "work");
    let merged = snapshots.packed_layers().merged_entries() - merged;
    let made = snapshots.packed_layers().get(info.packed_layers[0]);
    (COMPARED.get(), merged, made.unwrap().entries)
}

#[test]
fn a_commit_looks_at_what_was_changed_however_large_the_image_is() {
    let small = effort(3);
    assert_eq!(effort(40), small);
    // d1, its file, d2, its file, made, its file; and the root's entry.
    assert_eq!(small, (6, 0, 7));
}
