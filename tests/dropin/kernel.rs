//! Uppers that go from plyfs to kernel overlayfs and back, over plain directories, as root.

use std::fs;
use std::os::unix::fs::{MetadataExt, PermissionsExt, chown, symlink};
use std::path::Path;

use crate::common::Layers;
use crate::peer::{Dirs, Program, Seen, seen};

/// A lower with links, directories to be moved, and attributes that look like marks.
fn fill(lower: &Path) {
    for name in [
        "gone",
        "stays",
        "a/b/c/deep",
        "a/b/file",
        "d/e/inner",
        "whole/below",
        "mode",
        "moved",
    ] {
        Layers::write(&lower.join(name), name);
    }
    Layers::write(&lower.join("one"), "linked");
    fs::hard_link(lower.join("one"), lower.join("two")).unwrap();
    fs::hard_link(lower.join("one"), lower.join("d/three")).unwrap();
    Layers::write(&lower.join("alone"), "linked as well");
    fs::hard_link(lower.join("alone"), lower.join("d/other")).unwrap();
    symlink("stays", lower.join("link")).unwrap();
}

/// Each kind of change once.
fn first(mnt: &Path) {
    let at = |name: &str| mnt.join(name);
    fs::remove_file(at("gone")).unwrap();
    fs::rename(at("a/b"), at("d/b2")).unwrap();
    fs::rename(at("d/b2/c"), at("d/b2/c2")).unwrap();
    fs::rename(at("d"), at("dd")).unwrap();
    fs::remove_dir_all(at("whole")).unwrap();
    fs::create_dir(at("whole")).unwrap();
    fs::write(at("whole/new"), "new").unwrap();
    fs::write(at("two"), "written by its second name").unwrap();
    fs::hard_link(at("stays"), at("dd/stays2")).unwrap();
    fs::set_permissions(at("mode"), fs::Permissions::from_mode(0o600)).unwrap();
    chown(at("moved"), Some(3), Some(4)).unwrap();
    fs::rename(at("moved"), at("dd/e/elsewhere")).unwrap();
    xattr::set(at("dd"), "trusted.overlay.opaque", b"y").unwrap();
    xattr::set(at("stays"), "trusted.overlay.metacopy", b"").unwrap();
    xattr::set(at("stays"), "user.plain", b"1").unwrap();
}

/// The same over again, on what the first round has left.
fn second(mnt: &Path) {
    let at = |name: &str| mnt.join(name);
    fs::write(at("gone"), "again").unwrap();
    fs::rename(at("dd/b2"), at("b3")).unwrap();
    fs::create_dir(at("a/b")).unwrap();
    fs::remove_file(at("b3/file")).unwrap();
    fs::remove_file(at("one")).unwrap();
    fs::hard_link(at("two"), at("whole/four")).unwrap();
    fs::set_permissions(at("alone"), fs::Permissions::from_mode(0o640)).unwrap();
    fs::write(at("mode"), "content at last").unwrap();
    fs::remove_dir_all(at("dd/e")).unwrap();
    xattr::remove(at("dd"), "trusted.overlay.opaque").unwrap();
}

/// Which names are one file.
fn links(mnt: &Path, seen: &Seen) -> Vec<Vec<String>> {
    let mut groups = std::collections::BTreeMap::<u64, Vec<String>>::new();
    for path in seen.keys() {
        let stat = fs::symlink_metadata(mnt.join(path)).unwrap();
        if stat.is_file() && stat.nlink() > 1 {
            groups.entry(stat.ino()).or_default().push(path.clone());
        }
    }
    let mut groups: Vec<_> = groups.into_values().collect();
    groups.sort();
    groups
}

fn state(mnt: &Path) -> (Seen, Vec<Vec<String>>) {
    let seen = seen(mnt);
    let links = links(mnt, &seen);
    (seen, links)
}

#[test]
fn an_upper_goes_to_kernel_overlayfs_and_back() {
    for begins in [Program::Plyfs, Program::Kernel] {
        let ends = match begins {
            Program::Plyfs => Program::Kernel,
            _ => Program::Plyfs,
        };
        let dirs = Dirs::new();
        fill(&dirs.lower());
        let options = dirs.options();
        let before = begins.on_mount(&dirs.mnt(), &options, |mnt| {
            first(mnt);
            state(mnt)
        });
        let expected: [&[&str]; 3] = [
            &["alone", "dd/other"],
            &["dd/stays2", "stays"],
            &["dd/three", "one", "two"],
        ];
        assert_eq!(before.1, expected, "{begins:?}");
        let middle = ends.on_mount(&dirs.mnt(), &options, |mnt| {
            assert_eq!(state(mnt), before, "after {begins:?}");
            second(mnt);
            state(mnt)
        });
        begins.on_mount(&dirs.mnt(), &options, |mnt| {
            assert_eq!(state(mnt), middle, "{begins:?} again");
        });
    }
}
