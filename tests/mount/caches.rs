//! What the kernel keeps, because this process alone changes the tree: whoever looks again costs no request.

use std::collections::BTreeMap;
use std::fs;
use std::os::unix::fs::symlink;
use std::path::Path;
use std::process::{Child, Stdio};

use nix::mount::{MntFlags, umount2};

use crate::common::mode::{self, Mode};
use crate::common::mount::wait_until;
use crate::common::{Layers, errno};

/// A server in front that logs every request.
struct Logged {
    layers: Layers,
    child: Child,
}

impl Logged {
    fn new(layers: Layers) -> Self {
        let options = format!("{},{}", Mode::of_run().options_before(""), layers.options());
        let child = mode::plyfs()
            .args(["-d", "-o", &options, "--log-file"])
            .arg(layers.path("log"))
            .arg(layers.mnt())
            .stdin(Stdio::null())
            .stderr(Stdio::null())
            .spawn()
            .unwrap();
        let logged = Self { layers, child };
        assert!(wait_until(|| logged.log().contains(": serving ")));
        logged
    }

    fn log(&self) -> String {
        fs::read_to_string(self.layers.path("log")).unwrap_or_default()
    }

    /// How many requests of each kind `work` costs.
    fn requests(&self, work: impl FnOnce(&Path)) -> BTreeMap<String, usize> {
        let before = self.log().len();
        work(&self.layers.mnt());
        let mut counts = BTreeMap::new();
        for line in self.log()[before..].lines() {
            let Some((_, request)) = line.split_once(" FUSE(") else {
                continue;
            };
            let kind = request
                .split_whitespace()
                .skip_while(|word| *word != "ino")
                .nth(2);
            *counts.entry(kind.unwrap().to_owned()).or_default() += 1;
        }
        counts
    }
}

impl Drop for Logged {
    fn drop(&mut self) {
        let _ = umount2(&self.layers.mnt(), MntFlags::MNT_DETACH);
        let _ = self.child.wait();
    }
}

const FILES: usize = 8;

fn fill(dir: &Path) {
    for n in 0..FILES {
        Layers::write(&dir.join(format!("dir/file{n}")), vec![7; 50_000]);
        symlink("file0", dir.join(format!("dir/link{n}"))).unwrap();
    }
}

/// Lists, looks at, and reads everything, and asks for what is not there.
fn walk(root: &Path) {
    let dir = root.join("dir");
    let mut names: Vec<_> = fs::read_dir(&dir)
        .unwrap()
        .map(|entry| entry.unwrap().path())
        .collect();
    names.sort();
    for path in names {
        match fs::symlink_metadata(&path).unwrap().is_symlink() {
            true => assert_eq!(fs::read_link(&path).unwrap(), Path::new("file0")),
            false => assert_eq!(fs::read(&path).unwrap().len(), 50_000),
        }
    }
    assert_eq!(errno(fs::metadata(dir.join("missing"))), libc::ENOENT);
}

#[test]
fn who_looks_again_costs_no_request() {
    for in_upper in [false, true] {
        let layers = Layers::new(1);
        fill(&if in_upper {
            layers.upper()
        } else {
            layers.lower(0)
        });
        let logged = Logged::new(layers);
        let first = logged.requests(walk);
        assert!(first.contains_key("LOOKUP"), "{first:?}");
        // The first look has moved access times, which the second one learns.
        logged.requests(walk);
        let mut again = logged.requests(walk);
        for needed in ["OPEN", "RELEASE", "OPENDIR", "RELEASEDIR", "FLUSH"] {
            again.remove(needed);
        }
        let mode = Mode::of_run();
        let mut forgotten = 0;
        if !mode.keeps_listings() {
            // Which are asked for each time, and move the access times of the directory and the links.
            for asked in ["READDIR", "READDIRPLUS", "READLINK"] {
                again.remove(asked);
            }
            forgotten += 2 + FILES;
        }
        if mode.gathers() || mode.passes() {
            // At the end of each use the kernel forgets the room that a file takes, or when it was read.
            forgotten += FILES;
        }
        let learned = again.remove("GETATTR").unwrap_or_default();
        assert!(learned <= forgotten, "upper: {in_upper}: {learned} GETATTR");
        assert!(again.is_empty(), "upper: {in_upper}: {again:?}");
    }
}
