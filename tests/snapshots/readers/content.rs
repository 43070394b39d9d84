//! Names, sizes and bytes of files that are written and mapped, and stay open.

use std::collections::BTreeMap;
use std::fs;
use std::os::unix::fs::{FileExt, MetadataExt};
use std::path::Path;

use plywood::store::layers::Expected;

use super::{LARGE, OWNER, Place, SMALL, mapping, writer};

/// Size, time of the last change, and content of every file.
type Seen = BTreeMap<String, (u64, (i64, i64), blake3::Hash)>;

fn seen(root: &Path) -> Seen {
    let look = |entry: std::io::Result<fs::DirEntry>| {
        let entry = entry.unwrap();
        let content = fs::read(entry.path()).unwrap();
        let metadata = entry.metadata().unwrap();
        let time = (metadata.mtime(), metadata.mtime_nsec());
        let name = entry.file_name().into_string().unwrap();
        (name, (metadata.len(), time, blake3::hash(&content)))
    };
    fs::read_dir(root).unwrap().map(look).collect()
}

/// The same without times: of a file that is mapped, the kernel may find out when it was written only while it is flushed.
fn contents(seen: &Seen) -> Vec<(&String, u64, blake3::Hash)> {
    let files = seen.iter();
    files
        .map(|(name, (size, _, hash))| (name, *size, *hash))
        .collect()
}

fn check(options: &str) {
    let place = Place::new(options);
    let root = place.prepare("fill", None);
    for (name, size) in [
        ("large", LARGE),
        ("mapped", SMALL),
        ("stored", SMALL),
        ("cut", SMALL),
        ("left", SMALL),
    ] {
        fs::write(root.join(name), vec![b'0'; size]).unwrap();
    }
    place.commit("base", "fill");

    let root = place.prepare("work", Some("base"));
    let open = |name: &str| writer(root.join(name));
    let files = ["large", "mapped", "cut", "new"].map(open);
    let [large, mapped, cut, new] = &files;
    // Nobody tells of these but the kernel, when it writes their pages.
    let stored = ["stored", "made"].map(open);
    for new in [new, &stored[1]] {
        new.set_len(SMALL as u64).unwrap();
    }
    let mut maps = [large, mapped, new, &stored[0], &stored[1]].map(mapping::shared_mut);
    let write = |maps: &mut [memmap2::MmapMut; 5], round: u8| {
        for file in &files {
            let at = u64::from(round) * 20_000;
            file.write_all_at(&[b'w'; 10_000], at).unwrap();
        }
        let end = cut.metadata().unwrap().len();
        cut.set_len(end - 7).unwrap();
        new.write_all_at(b"end", (SMALL + usize::from(round)) as u64)
            .unwrap();
        // Last, for the kernel soon begins to write them by itself.
        for map in &mut *maps {
            let middle = map.len() / 2;
            map[middle + usize::from(round) * 10..][..5].fill(b'm');
        }
    };

    write(&mut maps, 1);
    // Each of them has to find what nobody has flushed.
    let reader = seen(&root);
    assert_eq!(reader["new"].0, SMALL as u64 + 4);

    write(&mut maps, 2);
    let mut stream = Vec::new();
    let snapshots = &place.snapshots;
    snapshots
        .write_layer(OWNER, "work", &mut stream, None)
        .unwrap();
    let reader = seen(&root);
    assert_eq!(reader.len(), 7);
    let copy = place.prepare("copy", Some("base"));
    let layer = (&*stream, &Expected::default());
    snapshots.apply_layer(OWNER, "copy", layer, &()).unwrap();
    assert_eq!(seen(&copy), reader, "{options}: the diff");

    write(&mut maps, 3);
    let reader = seen(&root);
    place.commit("done", "work");
    let view = place.prepare("look", Some("done"));
    let committed = seen(&view);
    assert_eq!(
        contents(&committed),
        contents(&reader),
        "{options}: the commit"
    );
}

in_every_mode!(check);
