//! Who needs which file below plyd's root.

use std::collections::BTreeSet;
use std::fs;
use std::path::{Path, PathBuf};

use nix::sys::signal::Signal;
use plywood::store::ingest::Settings;
use plywood::store::layers::Layers;
use plywood::store::object::Place;
use plywood::store::{LayerName, ObjectName, PackId, ViewKey};
use serde_json::Value;

use super::common::{Plyd, until};

/// What there is, as plyd says.
#[derive(Default)]
struct Needed {
    snapshots: BTreeSet<String>,
    /// Those with a directory of their own.
    active: BTreeSet<String>,
    images: BTreeSet<String>,
    names: usize,
    dirs: BTreeSet<PathBuf>,
    layers: BTreeSet<LayerName>,
    views: BTreeSet<ViewKey>,
    packs: BTreeSet<PackId>,
    objects: BTreeSet<ObjectName>,
}

/// Fails on a file below the root that nobody needs, and on one that is missing. plyd is started again for it.
pub fn every_file(plyd: &mut Plyd) {
    let root = plyd.root();
    until("what was removed is deleted", || {
        fs::read_dir(root.join("trash")).unwrap().next().is_none()
    });
    let mut needed = Needed::default();
    for snapshot in plyd.json(["snapshot", "ls", "--json"]).as_array().unwrap() {
        needed.add_snapshot(snapshot);
    }
    for image in plyd.json(["image", "ls", "--json"]).as_array().unwrap() {
        let id = image["id"].as_str().unwrap();
        needed
            .images
            .insert(id.trim_start_matches("sha256:").to_owned());
        needed.names += image["names"].as_array().unwrap().len();
    }
    plyd.signal(Signal::SIGTERM);
    needed.add_contents(&root.join("store"));

    let mut names = 0;
    let mut found = Vec::new();
    list(&root, &root, &mut found);
    for path in &found {
        let text = path.to_str().unwrap();
        names += usize::from(text.starts_with("images/names/"));
        assert!(needed.needs(path), "nobody needs {text}");
    }
    assert_eq!(names, needed.names);
    let there = |of: String| {
        assert!(
            found.iter().any(|path| path == Path::new(&of)),
            "{of} is missing"
        );
    };
    needed
        .snapshots
        .iter()
        .for_each(|id| there(format!("snapshots/records/{id}.record")));
    for layer in &needed.layers {
        there(format!("store/records/{layer}.record"));
        there(format!("store/layers/{layer}.index"));
    }
    needed
        .packs
        .iter()
        .for_each(|pack| there(format!("store/packs/{pack}.pack")));
    plyd.launch();
}

impl Needed {
    fn add_snapshot(&mut self, snapshot: &Value) {
        let id = snapshot["id"].as_str().unwrap().to_owned();
        if snapshot["kind"] != "committed" {
            self.active.insert(id.clone());
        }
        self.snapshots.insert(id);
        let texts = |of: &str| -> Vec<String> {
            let list = snapshot[of].as_array().unwrap().iter();
            list.map(|text| text.as_str().unwrap().to_owned()).collect()
        };
        self.dirs
            .extend(texts("layer_dirs").iter().map(PathBuf::from));
        let mut chain: Vec<LayerName> = texts("packed_layers")
            .iter()
            .map(|name| name.parse().unwrap())
            .collect();
        self.layers.extend(&chain);
        chain.reverse();
        // What a chain is mounted for may go while it stays, but not before it.
        self.views
            .extend((1..=chain.len()).map(|end| ViewKey::of(&chain[..end])));
    }

    fn add_contents(&mut self, store: &Path) {
        let (layers, damaged) = Layers::open(store, Settings::default()).unwrap();
        assert!(damaged.is_empty(), "{damaged:?}");
        let recorded: BTreeSet<_> = layers.list().into_iter().map(|(name, _)| name).collect();
        assert_eq!(recorded, self.layers, "layers and what snapshots have");
        for layer in &self.layers {
            let index = layers.index(*layer).unwrap();
            for number in 0..index.object_count() {
                let object = index.object(number).unwrap();
                match layers.objects().find(&object.name).unwrap().unwrap() {
                    Place::File => drop(self.objects.insert(object.name)),
                    Place::Packed { pack, .. } => drop(self.packs.insert(pack)),
                }
            }
        }
    }

    fn needs(&self, path: &Path) -> bool {
        let parts: Vec<&str> = path.iter().map(|part| part.to_str().unwrap()).collect();
        let has = |name: &str, suffix: &str, is: &dyn Fn(&str) -> bool| {
            name.strip_suffix(suffix).is_some_and(is)
        };
        match parts[..] {
            ["lock"] | ["index", ..] => true,
            ["snapshots", "records", name] => {
                has(name, ".record", &|id| self.snapshots.contains(id))
            }
            ["snapshots", "data", id, ..] => self.active.contains(id),
            ["layers", layer, ..] => self.dirs.iter().any(|dir| dir.ends_with(layer)),
            ["images", "records", name] => has(name, ".record", &|id| self.images.contains(id)),
            // They are counted.
            ["images", "names", name] => name.ends_with(".record"),
            ["store", "records", name] => has(name, ".record", &|name| self.has_layer(name)),
            ["store", "layers", name] => {
                has(name, ".index", &|name| self.has_layer(name))
                    || has(name, ".tar", &|name| self.has_layer(name))
            }
            ["store", "packs", name] => has(name, ".pack", &|id| {
                self.packs.iter().any(|pack| pack.to_string() == id)
            }),
            ["store", "objects", _, name] => {
                name.parse().is_ok_and(|name| self.objects.contains(&name))
            }
            ["store", "views", name] => has(name, ".view", &|key| {
                key.parse().is_ok_and(|key| self.views.contains(&key))
            }),
            _ => false,
        }
    }

    fn has_layer(&self, name: &str) -> bool {
        name.parse().is_ok_and(|name| self.layers.contains(&name))
    }
}

/// Every file below `dir`, as a path from `root`.
fn list(root: &Path, dir: &Path, found: &mut Vec<PathBuf>) {
    for entry in fs::read_dir(dir).unwrap() {
        let entry = entry.unwrap();
        if entry.file_type().unwrap().is_dir() {
            list(root, &entry.path(), found);
        } else {
            found.push(entry.path().strip_prefix(root).unwrap().to_owned());
        }
    }
}
