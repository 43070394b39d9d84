//! Files of which nobody has heard but the kernel: each was written through a mapping alone. With `no_open` a mount learns of such a
//! file when its first page comes, and syncfs(2) does not wait until they have come.

use std::fs;

use plywood::store::layers::Expected;

use super::{OWNER, Place, SMALL, mapping, writer};

const FILES: usize = 400;

fn check(options: &str) {
    let place = Place::new(options);
    let root = place.prepare("fill", None);
    let name = |number: usize| format!("f{number:03}");
    for number in 0..FILES {
        fs::write(root.join(name(number)), vec![b'0'; SMALL]).unwrap();
    }
    place.commit("base", "fill");
    let root = place.prepare("work", Some("base"));
    let mut maps: Vec<_> = (0..FILES)
        .map(|number| mapping::shared_mut(&writer(root.join(name(number)))))
        .collect();
    for round in *b"123" {
        for map in &mut maps {
            map[SMALL / 2..].fill(round);
        }
        let mut stream = Vec::new();
        let snapshots = &place.snapshots;
        snapshots
            .write_layer(OWNER, "work", &mut stream, None)
            .unwrap();
        let copy = place.prepare("copy", Some("base"));
        let told = (&*stream, &Expected::default());
        snapshots.apply_layer(OWNER, "copy", told, &()).unwrap();
        for number in 0..FILES {
            let name = name(number);
            let content = fs::read(copy.join(&name)).unwrap();
            let is_round = content[SMALL / 2..].iter().all(|byte| *byte == round);
            assert!(is_round, "{options}: {name} in round {round}");
        }
        snapshots.unmount(OWNER, "copy").unwrap();
        snapshots.remove(OWNER, "copy").unwrap();
    }
}

in_every_mode!(check);
