//! What a commit looks at.

use super::*;
use crate::cow::SETTLED;
use crate::snapshotter::diff::COMPARED;
use crate::store::view::PASSES;

/// As many directories of a hundred files each, and three of files with two names.
fn base(directories: usize) -> Vec<u8> {
    let mut tar = tar::Builder::new(Vec::new());
    let mut header = tar::Header::new_gnu();
    header.set_mode(0o644);
    header.set_size(0);
    for number in 0..directories * 100 {
        let path = format!("d{}/file{}", number / 100, number % 100);
        tar.append_data(&mut header, path, &[][..]).unwrap();
    }
    for (target, link) in [("l/a", "m/a"), ("l/b", "m/b"), ("l/c", "n/c")] {
        header.set_entry_type(tar::EntryType::Regular);
        tar.append_data(&mut header, target, &[][..]).unwrap();
        header.set_entry_type(tar::EntryType::Link);
        tar.append_link(&mut header, link, target).unwrap();
    }
    tar.into_inner().unwrap()
}

/// What a commit did.
#[derive(Debug, PartialEq, Eq)]
struct Effort {
    /// Names that it compared.
    compared: u64,
    /// Entries of layers that it merged.
    merged: u64,
    /// Entries that it made.
    made: u32,
    /// Names that it looked at for links of files that were copied up.
    settled: u64,
    /// Passes over the names of the image, each 16 bytes.
    passes: u64,
    /// Names that were compared to tell the changes of what was made.
    told: u64,
}

/// A place with the image of so many directories as `base`.
fn with_base(directories: usize) -> (Place, Snapshotter) {
    let place = Place::new();
    let snapshots = place.open();
    prepare(&snapshots, "unpack", None);
    let layer = (&*base(directories), &Expected::default());
    snapshots.apply_layer(OWNER, "unpack", layer, &()).unwrap();
    commit(&snapshots, "base", "unpack");
    (place, snapshots)
}

/// Makes `change` to an image with so many directories. Answers what the commit of that did.
fn effort(directories: usize, change: impl Fn(&Union)) -> Effort {
    let (_place, snapshots) = with_base(directories);
    prepare(&snapshots, "work", Some("base"));
    let union = open(&snapshots, "work");
    change(&union);
    drop(union);
    let merged = snapshots.packed_layers().merged_entries();
    for counted in [&COMPARED, &SETTLED, &PASSES] {
        counted.set(0);
    }
    let info = commit(&snapshots, "done", "work");
    let made = snapshots.packed_layers().get(info.packed_layers[0]);
    let (compared, passes) = (COMPARED.replace(0), PASSES.get());
    let merged = snapshots.packed_layers().merged_entries() - merged;
    changes(&snapshots, "done");
    Effort {
        compared,
        merged,
        made: made.unwrap().entries,
        settled: SETTLED.get(),
        passes,
        told: COMPARED.get(),
    }
}

#[test]
fn a_commit_and_its_diff_look_at_what_was_changed_however_large_the_image_is() {
    let change = |union: &Union| {
        let changed = find(union, "d1/file7");
        union.write(changed, None, 0, b"changed", None).unwrap();
        union
            .unlink(find(union, "d2"), OsStr::new("file8"))
            .unwrap();
        let made = union.mkdir(ROOT, OsStr::new("made"), 0o755, &Caller::ROOT);
        write(union, made.unwrap().node, "file", b"made");
    };
    let small = effort(3, change);
    assert_eq!(effort(40, change), small);
    let expected = Effort {
        // d1, its file, d2, its file, made, its file; and the root's entry.
        compared: 6,
        merged: 0,
        made: 7,
        settled: 0,
        passes: 0,
        told: 6,
    };
    assert_eq!(small, expected);
}

/// Every directory of the image was listed for the one other name.
#[test]
fn so_does_one_of_files_with_several_names() {
    let copied_up = |union: &Union| {
        let mode = SetAttr {
            perm: Some(0o600),
            ..SetAttr::default()
        };
        set(union, find(union, "l/a"), mode);
        union.unlink(find(union, "l"), OsStr::new("b")).unwrap();
    };
    let small = effort(3, copied_up);
    assert_eq!(effort(40, copied_up), small);
    let expected = Effort {
        // l, its two files, m, its two.
        compared: 6,
        merged: 0,
        made: 7,
        // l, m, and of both a and b.
        settled: 6,
        passes: 1,
        told: 6,
    };
    assert_eq!(small, expected);

    let moved = |union: &Union| {
        let renamed = union.rename(ROOT, "n".as_ref(), ROOT, "o".as_ref(), RenameMode::Replace);
        renamed.unwrap();
    };
    let small = effort(3, moved);
    assert_eq!(effort(40, moved), small);
    let expected = Effort {
        // n, o, its file.
        compared: 3,
        merged: 0,
        made: 4,
        settled: 0,
        passes: 1,
        told: 3,
    };
    assert_eq!(small, expected);
}

/// As many names are compared, and the names of the image gone through as often, by a diff of a snapshot in use with its parent, and
/// with another on it.
#[test]
fn so_does_a_diff_of_a_snapshot_in_use() {
    let look = |directories| {
        let (_place, snapshots) = with_base(directories);
        for key in ["left", "work"] {
            prepare(&snapshots, key, Some("base"));
        }
        let union = open(&snapshots, "work");
        let changed = find(&union, "d1/file7");
        union.write(changed, None, 0, b"changed", None).unwrap();
        let mut counted = Vec::new();
        let mut count = || {
            for counted in [&COMPARED, &PASSES] {
                counted.set(0);
            }
            changes(&snapshots, "work");
            counted.push((COMPARED.replace(0), PASSES.replace(0)));
            let mut stream = Vec::new();
            snapshots
                .write_difference(OWNER, Some("left"), "work", &mut stream, None)
                .unwrap();
            counted.push((COMPARED.get(), PASSES.get()));
        };
        count();
        let linked = find(&union, "l/a");
        union.write(linked, None, 0, b"changed", None).unwrap();
        count();
        (counted, directories)
    };
    let (small, few) = look(3);
    let (large, many) = look(40);
    // What the root of the image has is compared with that of the upper.
    let root = |directories: usize| directories as u64 + 3;
    let expected = |directories| {
        [
            // d1, its file.
            (2, 0),
            // In d1 all of its files, for the upper has that.
            (root(directories) + 100, 0),
            // l and m, and a in both.
            (6, 1),
            // All in l, and a in m.
            (root(directories) + 100 + 3 + 1, 1),
        ]
    };
    assert_eq!(small, expected(few));
    assert_eq!(large, expected(many));
}
