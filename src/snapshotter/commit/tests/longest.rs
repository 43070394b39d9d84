//! Names and paths as long as they can be.

use super::*;

/// Directories in each other whose names have so many bytes, and the one that is the last. The union holds a lookup of each.
fn down(union: &Union, lengths: &[usize], fill: char) -> NodeId {
    lengths.iter().fold(ROOT, |directory, length| {
        let name = fill.to_string().repeat(*length);
        let made = union.mkdir(directory, name.as_ref(), 0o755, &Caller::ROOT);
        made.unwrap().node
    })
}

fn find_down(union: &Union, depth: usize, fill: char) -> NodeId {
    (0..depth).fold(ROOT, |directory, _| {
        let name = fill.to_string().repeat(255);
        union.lookup(directory, name.as_ref()).unwrap().node
    })
}

/// The stream of the layer that a snapshot was committed to.
fn exported(snapshots: &Snapshotter, key: &str) -> Vec<u8> {
    let layer = snapshots.stat(OWNER, key).unwrap().packed_layers[0];
    let mut stream = Vec::new();
    let layers = snapshots.packed_layers();
    layers.export(layer, &mut stream).unwrap();
    stream
}

/// The marker of a deletion has four bytes more than what was deleted, and a directory's name ends with a slash: our own
/// layers were refused when they came back.
#[test]
fn the_longest_names_and_paths_go_out_and_come_back() {
    let place = Place::new();
    let snapshots = place.open();
    prepare(&snapshots, "base", None);
    let union = open(&snapshots, "base");
    for length in 250..=255 {
        write(&union, ROOT, &"f".repeat(length), b"f");
    }
    // Fifteen names and their slashes are 3840 bytes, so what is in there has 4095 at most.
    let directory = down(&union, &[255; 15], 'd');
    write(&union, directory, &"l".repeat(255), b"longest");
    for length in 251..=254 {
        let name = "m".repeat(length);
        union
            .mkdir(directory, name.as_ref(), 0o700, &Caller::ROOT)
            .unwrap();
    }
    let longest = "n".repeat(255);
    union
        .mkdir(directory, longest.as_ref(), 0o700, &Caller::ROOT)
        .unwrap();
    drop(union);
    commit(&snapshots, "first", "base");

    prepare(&snapshots, "work", Some("first"));
    let union = open(&snapshots, "work");
    for length in 250..=255 {
        union.unlink(ROOT, "f".repeat(length).as_ref()).unwrap();
    }
    let directory = find_down(&union, 15, 'd');
    union.unlink(directory, "l".repeat(255).as_ref()).unwrap();
    for length in 251..=253 {
        union.rmdir(directory, "m".repeat(length).as_ref()).unwrap();
    }
    drop(union);
    commit(&snapshots, "second", "work");

    prepare(&snapshots, "shown", Some("second"));
    let (_, shown) = everything(&snapshots, "shown");
    let streams = ["first", "second"].map(|key| exported(&snapshots, key));

    let other = Place::new();
    let snapshots = other.open();
    let mut below = None;
    for (key, stream) in ["first", "second"].into_iter().zip(&streams) {
        let work = format!("{key}-work");
        prepare(&snapshots, &work, below);
        let layer = (stream.as_slice(), &Expected::default());
        snapshots.apply_layer(OWNER, &work, layer, &()).unwrap();
        commit(&snapshots, key, &work);
        assert!(exported(&snapshots, key) == *stream);
        below = Some(key);
    }
    prepare(&snapshots, "shown", Some("second"));
    // The root is what whoever imports a layer makes of it.
    assert!(everything(&snapshots, "shown").1 == shown);
}
