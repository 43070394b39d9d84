//! What plyd is asked to do, and what has to be there once it was acknowledged.

use std::fs;
use std::path::Path;

use serde_json::Value;

use super::archive::{Blob, archive, noise};
use super::common::Plyd;
use super::many::many;

/// Something that was acknowledged.
pub struct Fact {
    what: What,
    /// From that event of the disk on,
    pub from: usize,
    /// up to that one, where something was begun that changes it.
    until: usize,
}

enum What {
    /// An image of that name is there, or is not.
    Image(&'static str, bool),
    /// So is a snapshot of that key.
    Snapshot(&'static str, bool),
    /// A file of a committed snapshot has this content.
    Content(&'static str, &'static str, Vec<u8>),
}

impl Fact {
    /// Fails if plyd does not know what had been acknowledged at that moment.
    pub fn check(&self, plyd: &Plyd, moment: usize) {
        if !(self.from..=self.until).contains(&moment) {
            return;
        }
        match &self.what {
            What::Image(name, there) => {
                let images = plyd.json(["image", "ls", "--json"]);
                let has = |image: &Value| {
                    let names = image["names"].as_array().unwrap();
                    names.iter().any(|known| known == name)
                };
                let found = images.as_array().unwrap().iter().any(has);
                assert_eq!(found, *there, "the image {name}");
            }
            What::Snapshot(key, there) => {
                let found = plyd.snapctl(["snapshot", "info", key]).code == 0;
                assert_eq!(found, *there, "the snapshot {key}");
            }
            What::Content(key, path, content) => {
                looking_at(plyd, key, |root| {
                    let found = fs::read(root.join(path)).unwrap();
                    assert!(found == *content, "{path} of {key}");
                });
            }
        }
    }
}

/// Mounts a view of a committed snapshot while `look` looks at it.
fn looking_at(plyd: &Plyd, key: &str, look: impl FnOnce(&Path)) {
    plyd.ok(["snapshot", "view", "look", key]);
    with_mount(plyd, "look", look);
    plyd.ok(["snapshot", "rm", "look"]);
}

fn with_mount(plyd: &Plyd, key: &str, work: impl FnOnce(&Path)) {
    let dir = plyd.dir().join("mnt");
    fs::create_dir_all(&dir).unwrap();
    plyd.ok(["mount", key, dir.to_str().unwrap()]);
    work(&dir);
    plyd.umount(&dir);
}

/// Archives that share layers and contents.
pub struct Images {
    first: Vec<u8>,
    second: Vec<u8>,
    third: Vec<u8>,
}

const FIRST: &str = "localhost/first:latest";
const AGAIN: &str = "localhost/again:latest";
const SECOND: &str = "localhost/second:latest";
const THIRD: &str = "localhost/third:latest";

impl Images {
    pub fn new() -> Self {
        let shared =
            Blob::gzip(many("shared", 300, 1).file("bin/large", 0o755, &noise(9, 700_000)));
        let own = |name: &str, number| Blob::zstd(many(name, 60, number));
        let with_large = |name: &str| {
            let large = noise(77, 400_000);
            Blob::gzip(many(name, 40, 5).file("data/large", 0o644, &large))
        };
        Self {
            first: archive(FIRST, &[shared.clone(), own("first", 2)]),
            second: archive(SECOND, &[shared, own("second", 3), with_large("x")]),
            // Of which `second` has the large file, too.
            third: archive(THIRD, &[with_large("y")]),
        }
    }
}

/// Does all of it. `now` is how many events the disk has seen.
pub fn work(plyd: &Plyd, images: &Images, now: &dyn Fn() -> usize) -> Vec<Fact> {
    let mut done = Done {
        facts: Vec::new(),
        now,
    };
    let image = |name, there| What::Image(name, there);
    done.step(vec![image(FIRST, true)], || load(plyd, &images.first));
    done.step(vec![image(SECOND, true)], || load(plyd, &images.second));
    done.step(vec![image(AGAIN, true)], || {
        let loaded = plyd.piped(["image", "load", "-q", "--name", AGAIN], &images.first);
        assert_eq!(loaded.code, 0, "{}", loaded.stderr);
    });
    let changed = noise(100, 500_000);
    plyd.ok(["snapshot", "prepare", "work", FIRST]);
    with_mount(plyd, "work", |root| {
        fs::write(root.join("bin/large"), &changed).unwrap();
        fs::write(root.join("shared/0"), "small").unwrap();
        fs::remove_file(root.join("shared/1")).unwrap();
        for number in 0..50 {
            fs::write(root.join(format!("new-{number}")), noise(number, 3000)).unwrap();
        }
    });
    let committed = vec![
        What::Snapshot("done", true),
        What::Content("done", "bin/large", changed),
        What::Content("done", "shared/0", b"small".to_vec()),
        What::Content("done", "new-7", noise(7, 3000)),
        What::Content("done", "first/9", noise(2 << 32 | 9, 200 + 37 * 9)),
    ];
    done.step(committed, || {
        plyd.ok(["snapshot", "commit", "work", "done"]);
    });
    done.ends(&image(SECOND, true));
    done.step(vec![image(SECOND, false)], || {
        plyd.ok(["image", "rm", SECOND]);
    });
    plyd.ok(["system", "gc"]);
    done.step(vec![image(THIRD, true)], || load(plyd, &images.third));
    plyd.ok(["snapshot", "prepare", "more", "done"]);
    with_mount(plyd, "more", |root| {
        fs::write(root.join("more"), noise(8, 200_000)).unwrap();
        fs::rename(root.join("shared"), root.join("moved")).unwrap();
    });
    let committed = vec![
        What::Snapshot("top", true),
        What::Content("top", "more", noise(8, 200_000)),
        What::Content("top", "moved/0", b"small".to_vec()),
    ];
    done.step(committed, || {
        plyd.ok(["snapshot", "commit", "more", "top"]);
    });
    done.ends(&image(FIRST, true));
    done.step(vec![image(FIRST, false)], || {
        plyd.ok(["image", "rm", FIRST]);
    });
    done.ends_snapshot("top");
    done.step(vec![What::Snapshot("top", false)], || {
        plyd.ok(["snapshot", "rm", "top"]);
    });
    done.facts
}

/// A client's next steps on what a power cut has left.
pub fn go_on(plyd: &Plyd, images: &Images) {
    load(plyd, &images.third);
    looking_at(plyd, THIRD, |root| {
        let large = fs::read(root.join("data/large")).unwrap();
        assert!(large == noise(77, 400_000));
    });
}

fn load(plyd: &Plyd, archive: &[u8]) {
    let loaded = plyd.piped(["image", "load", "-q"], archive);
    assert_eq!(loaded.code, 0, "{}", loaded.stderr);
}

struct Done<'a> {
    facts: Vec<Fact>,
    now: &'a dyn Fn() -> usize,
}

impl Done<'_> {
    /// Has something done that makes these true.
    fn step(&mut self, makes: Vec<What>, work: impl FnOnce()) {
        work();
        let from = (self.now)();
        self.facts.extend(makes.into_iter().map(|what| Fact {
            what,
            from,
            until: usize::MAX,
        }));
    }

    /// Something is about to be done after which `what` is not true any more.
    fn ends(&mut self, what: &What) {
        let now = (self.now)();
        let same = |fact: &&mut Fact| match (&fact.what, what) {
            (What::Image(name, there), What::Image(other, was)) => name == other && there == was,
            _ => false,
        };
        self.facts
            .iter_mut()
            .filter(same)
            .for_each(|fact| fact.until = now);
    }

    /// As `ends`, for all that is known of a snapshot.
    fn ends_snapshot(&mut self, of: &str) {
        let now = (self.now)();
        for fact in &mut self.facts {
            if let What::Snapshot(key, _) | What::Content(key, ..) = &fact.what
                && *key == of
            {
                fact.until = now;
            }
        }
    }
}
