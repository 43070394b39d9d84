//! One client's steps, and what it was promised.

use std::collections::BTreeMap;
use std::fs;
use std::io::Write;
use std::path::Path;
use std::process::{Command, Stdio};
use std::sync::Arc;

use rand::rngs::StdRng;
use rand::{Rng, SeedableRng};
use serde_json::Value;

use super::archive::{Blob, Layer, archive, noise};
use super::common::Plyd;
use super::many::many;

/// What an acknowledgement has promised, or a step that was cut off has left open.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Known {
    There,
    Gone,
    /// Both are right.
    Open,
}

/// Archives that all clients load. They share layers and contents, small and large.
pub struct Work {
    layers: Vec<Blob>,
}

impl Work {
    pub fn new() -> Self {
        let shared =
            Blob::gzip(many("shared", 120, 1).file("bin/large", 0o755, &noise(9, 400_000)));
        let own = (2..5).map(|number| {
            let large = noise(77 + number % 2, 300_000);
            Blob::zstd(many("own", 40, number).file("data/large", 0o644, &large))
        });
        let layers = std::iter::once(shared).chain(own).collect();
        Self { layers }
    }

    /// The image of that number, which is the client's own by its name and a layer.
    fn archive(&self, name: &str, number: usize) -> Vec<u8> {
        let mark = Blob::plain(Layer::new().file("mark", 0o644, name.as_bytes()));
        let own = &self.layers[1 + number % (self.layers.len() - 1)];
        archive(name, &[self.layers[0].clone(), own.clone(), mark])
    }
}

/// A client whose names are its own.
pub struct Client {
    number: u64,
    random: StdRng,
    work: Arc<Work>,
    images: BTreeMap<String, Known>,
    snapshots: BTreeMap<String, Known>,
    made: u64,
    /// How often each step was acknowledged.
    pub done: BTreeMap<&'static str, u64>,
}

impl Client {
    pub fn new(number: u64, seed: u64, work: Arc<Work>) -> Self {
        Self {
            number,
            random: StdRng::seed_from_u64(seed ^ (number + 1)),
            work,
            images: BTreeMap::new(),
            snapshots: BTreeMap::new(),
            made: 0,
            done: BTreeMap::new(),
        }
    }

    /// One step after the other, until one is not acknowledged.
    pub fn work_until_it_fails(&mut self, address: &str) {
        while self.step(address) {}
    }

    fn step(&mut self, address: &str) -> bool {
        match self.random.random_range(0..10) {
            0..=3 => self.load(address),
            4..=5 => self.commit(address),
            6..=7 => self.remove_image(address),
            8 => self.remove_snapshot(address),
            _ => self.acknowledged("gc", run(address, &["system", "gc", "-q"])),
        }
    }

    fn load(&mut self, address: &str) -> bool {
        let number = self.random.random_range(0..3);
        let name = format!("localhost/{}-{number}:latest", self.number);
        let archive = self.work.archive(&name, number);
        // Loaded once more it stays.
        let was = self.images.get(&name).copied().unwrap_or(Known::Gone);
        if was != Known::There {
            self.images.insert(name.clone(), Known::Open);
        }
        let loaded = piped(address, &["image", "load", "-q"], &archive);
        if loaded {
            self.images.insert(name, Known::There);
        }
        self.acknowledged("load", loaded)
    }

    fn remove_image(&mut self, address: &str) -> bool {
        let Some(name) = self.any(&self.images.clone()) else {
            return true;
        };
        self.images.insert(name.clone(), Known::Open);
        let removed = run(address, &["image", "rm", "-q", &name]);
        if removed {
            self.images.insert(name, Known::Gone);
        }
        self.acknowledged("rm", removed)
    }

    /// On nothing, on an image or on another commit.
    fn commit(&mut self, address: &str) -> bool {
        self.made += 1;
        let key = format!("work-{}-{}", self.number, self.made);
        let name = format!("done-{}-{}", self.number, self.made);
        let parent = match self.random.random_range(0..3) {
            0 => None,
            1 => self.any(&self.images.clone()),
            _ => self.any(&self.snapshots.clone()),
        };
        let parent = parent.as_deref();
        let prepare = ["snapshot", "prepare", &key].into_iter().chain(parent);
        if !run(address, &prepare.collect::<Vec<_>>()) {
            return false;
        }
        let Some(root) = mounted(address, &key) else {
            return false;
        };
        let written = fs::write(root.join("name"), &name)
            .and_then(|()| fs::write(root.join("own"), noise(self.made, 150_000)))
            .and_then(|()| fs::write(root.join("again"), noise(77, 300_000)));
        if written.is_err() {
            return false;
        }
        self.snapshots.insert(name.clone(), Known::Open);
        let committed = run(address, &["snapshot", "commit", &key, &name]);
        if committed {
            self.snapshots.insert(name, Known::There);
        }
        self.acknowledged("commit", committed)
    }

    fn remove_snapshot(&mut self, address: &str) -> bool {
        // Others stand on the older ones.
        let newest = self.snapshots.iter().rev();
        let mut newest = newest.filter(|(_, known)| **known == Known::There);
        let Some((name, _)) = newest.next() else {
            return true;
        };
        let name = name.clone();
        self.snapshots.insert(name.clone(), Known::Open);
        if run(address, &["snapshot", "rm", &name]) {
            self.snapshots.insert(name, Known::Gone);
            return self.acknowledged("snapshot rm", true);
        }
        // It may have been refused.
        run(address, &["system", "info"])
    }

    fn acknowledged(&mut self, what: &'static str, done: bool) -> bool {
        *self.done.entry(what).or_default() += u64::from(done);
        done
    }

    fn any(&mut self, of: &BTreeMap<String, Known>) -> Option<String> {
        let there: Vec<_> = of
            .iter()
            .filter(|(_, known)| **known == Known::There)
            .map(|(name, _)| name.clone())
            .collect();
        let count = there.len();
        (count > 0).then(|| there[self.random.random_range(0..count)].clone())
    }

    /// Fails if a promise was broken; what was open is not any more.
    pub fn check(&mut self, images: &Value, snapshots: &Value) {
        let images: Vec<&str> = list(images)
            .flat_map(|image| list(&image["names"]))
            .map(|name| name.as_str().unwrap())
            .collect();
        let snapshots: Vec<&str> = list(snapshots)
            .map(|snapshot| snapshot["key"].as_str().unwrap())
            .collect();
        for (promised, found) in [(&mut self.images, images), (&mut self.snapshots, snapshots)] {
            for (name, known) in promised {
                let now = match found.contains(&&**name) {
                    true => Known::There,
                    false => Known::Gone,
                };
                assert!(
                    *known == Known::Open || *known == now,
                    "{name} is not {known:?}"
                );
                *known = now;
            }
        }
    }

    /// Removes what a step left in the middle.
    pub fn clear_up(&self, plyd: &Plyd, snapshots: &Value) {
        let own = format!("work-{}-", self.number);
        for snapshot in list(snapshots) {
            let key = snapshot["key"].as_str().unwrap();
            if key.starts_with(&own) {
                plyd.ok(["snapshot", "rm", key]);
            }
        }
    }

    /// Fails if a commit has not what was written to it.
    pub fn check_contents(&self, plyd: &Plyd) {
        for (name, known) in &self.snapshots {
            if *known != Known::There {
                continue;
            }
            plyd.ok(["snapshot", "view", "look", name]);
            let root = mounted(&plyd.address(), "look").unwrap();
            let content = |file: &str| fs::read(root.join(file)).unwrap();
            assert_eq!(content("name"), name.as_bytes());
            let made = name.rsplit('-').next().unwrap().parse().unwrap();
            assert!(content("own") == noise(made, 150_000), "own of {name}");
            assert!(content("again") == noise(77, 300_000), "again of {name}");
            plyd.ok(["snapshot", "rm", "look"]);
        }
    }

    /// Removes its snapshots, the newest first.
    pub fn remove_all(&mut self, plyd: &Plyd) {
        let numbered = |name: &String| -> u64 { name.rsplit('-').next().unwrap().parse().unwrap() };
        let mut there: Vec<_> = self.snapshots.iter().collect();
        there.retain(|(_, known)| **known == Known::There);
        there.sort_by_key(|(name, _)| std::cmp::Reverse(numbered(name)));
        for (name, _) in there {
            plyd.ok(["snapshot", "rm", name]);
        }
    }
}

fn list(of: &Value) -> impl Iterator<Item = &Value> {
    of.as_array().unwrap().iter()
}

/// Where a snapshot is mounted.
fn mounted(address: &str, key: &str) -> Option<std::path::PathBuf> {
    let output = snapctl(address)
        .args(["snapshot", "mounts", key, "--json"])
        .output()
        .unwrap();
    if !output.status.success() {
        return None;
    }
    let mounts: Value = serde_json::from_slice(&output.stdout).unwrap();
    Some(Path::new(mounts[0]["source"].as_str().unwrap()).to_owned())
}

fn snapctl(address: &str) -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_snapctl"));
    command.env("PLYWOOD_ADDRESS", address);
    command.stdin(Stdio::null());
    command
}

fn run(address: &str, args: &[&str]) -> bool {
    let output = snapctl(address).args(args).output().unwrap();
    output.status.success()
}

fn piped(address: &str, args: &[&str], input: &[u8]) -> bool {
    let mut child = snapctl(address)
        .args(args)
        .stdin(Stdio::piped())
        .stdout(Stdio::null())
        .stderr(Stdio::null())
        .spawn()
        .unwrap();
    // Whoever dies does not read everything.
    let _ignored = child.stdin.take().unwrap().write_all(input);
    child.wait().unwrap().success()
}
