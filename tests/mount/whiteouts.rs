//! Removals where whiteouts cannot be devices: on a host that is a union itself, as inside of a container, and without
//! the right to make devices before Linux 5.8. They are attributes then.

use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};

use nix::mount::{MntFlags, MsFlags, mount, umount2};

use crate::common::{Layers, Mount};

/// A directory on kernel overlayfs, which refuses to make what it takes for its own whiteouts.
struct Host(PathBuf);

impl Host {
    fn new(layers: &Layers) -> Self {
        let [lower, upper, work, at] =
            ["host-lower", "host-upper", "host-work", "host"].map(|name| layers.path(name));
        for dir in [&lower, &upper, &work, &at] {
            fs::create_dir(dir).unwrap();
        }
        let options = format!(
            "lowerdir={},upperdir={},workdir={}",
            lower.display(),
            upper.display(),
            work.display()
        );
        let kind = Some("overlay");
        mount(kind, &at, kind, MsFlags::empty(), Some(options.as_str())).unwrap();
        for name in ["upper", "work"] {
            fs::create_dir(at.join(name)).unwrap();
        }
        Self(at)
    }

    fn options(&self, layers: &Layers) -> String {
        let (lower, host) = (layers.lower_options(), self.0.display());
        format!("{lower},upperdir={host}/upper,workdir={host}/work")
    }
}

impl Drop for Host {
    fn drop(&mut self) {
        let _ = umount2(&self.0, MntFlags::MNT_DETACH);
    }
}

fn fill(dir: &Path) {
    for name in [
        "a",
        "b",
        "moved/in",
        "whole/x/y",
        "from/d/in",
        "to/gone",
        "to/stays",
    ] {
        Layers::write(&dir.join(name), name);
    }
}

/// What is there, looked at by listing and by name.
fn seen(root: &Path) -> BTreeMap<PathBuf, String> {
    fn add(root: &Path, dir: &Path, seen: &mut BTreeMap<PathBuf, String>) {
        for entry in fs::read_dir(dir).unwrap() {
            let path = entry.unwrap().path();
            let is_dir = fs::symlink_metadata(&path).unwrap().is_dir();
            let content = match is_dir {
                true => "a directory".to_owned(),
                false => fs::read_to_string(&path).unwrap(),
            };
            seen.insert(path.strip_prefix(root).unwrap().to_owned(), content);
            if is_dir {
                add(root, &path, seen);
            }
        }
    }
    let mut all = BTreeMap::new();
    add(root, root, &mut all);
    all
}

type Step = fn(&Path);

/// Each after everything was looked at, when the server knows that no directory has whiteouts yet.
const STEPS: [Step; 9] = [
    |at| fs::remove_file(at.join("a")).unwrap(),
    |at| fs::rename(at.join("b"), at.join("c")).unwrap(),
    |at| fs::create_dir(at.join("a")).unwrap(),
    |at| fs::rename(at.join("moved"), at.join("elsewhere")).unwrap(),
    |at| fs::remove_dir_all(at.join("whole")).unwrap(),
    |at| fs::write(at.join("whole"), "a file now").unwrap(),
    |at| fs::remove_file(at.join("to/gone")).unwrap(),
    // The whiteout changes places with the directory.
    |at| fs::rename(at.join("from/d"), at.join("to/gone")).unwrap(),
    |at| fs::remove_dir_all(at.join("to")).unwrap(),
];

#[test]
fn what_is_removed_stays_gone_where_whiteouts_cannot_be_devices() {
    for remounts in [false, true] {
        let layers = Layers::new(1);
        fill(&layers.lower(0));
        let plain = layers.path("plain");
        fs::create_dir(&plain).unwrap();
        fill(&plain);
        let host = Host::new(&layers);
        let options = host.options(&layers);
        let mut mount = Mount::with_options(&layers.mnt(), &options);
        for (number, step) in STEPS.iter().enumerate() {
            let root = mount.join("");
            assert_eq!(seen(&root), seen(&plain), "before step {number}");
            step(&root);
            step(&plain);
            assert_eq!(seen(&root), seen(&plain), "after step {number}");
            if remounts {
                mount.unmount();
                mount = Mount::with_options(&layers.mnt(), &options);
                let root = mount.join("");
                assert_eq!(seen(&root), seen(&plain), "mounted again, {number}");
            }
        }
        mount.unmount();
        let mount = Mount::with_options(&layers.mnt(), &options);
        assert_eq!(seen(&mount.join("")), seen(&plain), "at the end");
    }
}
