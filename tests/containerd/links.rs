//! Files of an image with several names: what a diff tells of them, beside what containerd's own differ, which walks through the
//! mount, finds.

use std::collections::BTreeSet;
use std::fs;
use std::os::unix::fs::{FileExt, PermissionsExt};
use std::path::{Path, PathBuf};

use super::host::{Host, Release, sh};
use super::releases::{LINES, programs};
use super::tree;

const SNAPSHOTS: [&str; 3] = ["snapshots", "--snapshotter", "plywood"];

/// Prepares a snapshot and mounts it.
fn prepare(host: &Host, key: &str, parent: &[&str]) -> PathBuf {
    let target = host.dir.join(format!("mount-{key}"));
    fs::create_dir(&target).unwrap();
    let prepare = ["prepare", "--target", target.to_str().unwrap(), key];
    let script = host.ctr(&[&SNAPSHOTS[..], &prepare, parent].concat());
    sh("sh", &["-ec", &script]);
    target
}

fn unmount(host: &Host, target: &Path) {
    host.until("the mount is not busy", || {
        nix::mount::umount(target).is_ok()
    });
}

fn write(path: &Path, at: u64) {
    let file = fs::File::options().write(true).open(path).unwrap();
    file.write_all_at(b"changed", at).unwrap();
}

fn fill(root: &Path) {
    for dir in ["d", "e/deep", "m", "untouched"] {
        fs::create_dir_all(root.join(dir)).unwrap();
    }
    for (name, size, others) in [
        ("d/a", 5000, &["d/b", "e/deep/c", "untouched/d"][..]),
        ("m/large", 3 << 20, &["untouched/large"]),
        ("m/mode", 10, &["untouched/mode"]),
        ("m/same", 10, &["untouched/same"]),
        ("m/gone", 10, &["untouched/one", "untouched/two"]),
        ("alone", 10, &[]),
    ] {
        fs::write(root.join(name), vec![b'0'; size]).unwrap();
        for other in others {
            fs::hard_link(root.join(name), root.join(other)).unwrap();
        }
    }
}

fn change(root: &Path) {
    write(&root.join("d/a"), 0);
    write(&root.join("m/large"), 1 << 20);
    let mode = fs::Permissions::from_mode(0o711);
    fs::set_permissions(root.join("untouched/mode"), mode).unwrap();
    fs::remove_file(root.join("d/b")).unwrap();
    // Nothing of the file but the number of its names is another.
    fs::remove_file(root.join("m/gone")).unwrap();
    fs::remove_file(root.join("alone")).unwrap();
    fs::rename(root.join("e"), root.join("moved")).unwrap();
    fs::hard_link(root.join("d/a"), root.join("m/new")).unwrap();
}

/// Makes the snapshot `base`, and `work` with changes, which stays mounted.
fn in_use(host: &Host) -> PathBuf {
    let root = prepare(host, "fill", &[]);
    fill(&root);
    unmount(host, &root);
    host.ctr(&[&SNAPSHOTS[..], &["commit", "base", "fill"]].concat());
    let root = prepare(host, "work", &["base"]);
    change(&root);
    root
}

/// What is no directory in a layer.
fn files_in(layer: &Path) -> BTreeSet<String> {
    let listed = sh("tar", &["-tzf", layer.to_str().unwrap()]);
    let files = listed.lines().filter(|name| !name.ends_with('/'));
    files.map(str::to_owned).collect()
}

/// Debian's containerd leaves a diff to nobody but its own differ.
#[test]
fn a_changed_file_is_told_by_the_names_that_the_stock_differ_finds() {
    let host = Host::start();
    let root = in_use(&host);
    let layer = host.dir.join("layer");
    let walked = host.ctr_bytes(&[&SNAPSHOTS[..], &["diff", "work"]].concat());
    fs::write(&layer, walked).unwrap();
    let keys = host.snapctl(&["snapshot", "ls", "--owner", "containerd", "-q"]);
    let key = keys.lines().find(|key| key.ends_with("/work")).unwrap();
    let told = host.snapctl(&["snapshot", "diff", "--owner", "containerd", key]);
    let told = told.lines().filter_map(|line| {
        let (kind, path) = line.split_once(" /").unwrap();
        let (dir, name) = path.rsplit_once('/').unwrap_or(("", path));
        match kind {
            "D" if dir.is_empty() => Some(format!(".wh.{name}")),
            "D" => Some(format!("{dir}/.wh.{name}")),
            _ if root.join(path).is_dir() => None,
            _ => Some(path.to_owned()),
        }
    });
    let told: BTreeSet<String> = told.collect();
    assert_eq!(told, files_in(&layer));
    assert_eq!(told.len(), 12, "{told:?}");
    unmount(&host, &root);
}

/// Unpacked by GNU tar on a copy of what lies below, our layer gives what the mount shows.
#[test]
fn a_layer_with_a_changed_file_is_what_the_mount_shows() {
    let line = &LINES[0];
    let host = Host::start_with(Release {
        programs: Some(programs(line.suite)),
        config: line.config,
    });
    let root = in_use(&host);
    let layer = host.dir.join("layer");
    let diff = host.ctr_bytes(&[&SNAPSHOTS[..], &["diff", "work"]].concat());
    fs::write(&layer, diff).unwrap();
    let shown = tree::read(&root);
    unmount(&host, &root);

    let base = prepare(&host, "look", &["base"]);
    let copy = host.dir.join("copy");
    sh(
        "cp",
        &["-a", base.to_str().unwrap(), copy.to_str().unwrap()],
    );
    unmount(&host, &base);
    let names = files_in(&layer);
    for (whiteout, name) in names.iter().filter_map(|whiteout| {
        let name = whiteout.rsplit('/').next()?.strip_prefix(".wh.")?;
        Some((copy.join(whiteout), name))
    }) {
        let gone = whiteout.with_file_name(name);
        sh("rm", &["-r", gone.to_str().unwrap()]);
    }
    let [layer, into] = [&layer, &copy].map(|path| path.to_str().unwrap());
    sh("tar", &["-xpzf", layer, "-C", into, "--exclude=.wh.*"]);
    let mut unpacked = tree::read(&copy);
    let mut shown = shown;
    // The root has no entry.
    for tree in [&mut shown, &mut unpacked] {
        tree.remove(&b""[..]);
    }
    assert_eq!(unpacked, shown);
    assert!(names.contains("untouched/large") && !names.contains("m/same"));
}
