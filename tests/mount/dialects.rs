//! Whiteouts and opaque directories in every dialect that is read, and the one that is written.

use std::fs;
use std::os::unix::fs::{FileTypeExt, MetadataExt};
use std::path::Path;

use nix::sys::stat::{Mode, SFlag, mknod};
use rustix::fs::XattrFlags;

use crate::common::mode;
use crate::common::{Layers, Mount};

fn set(path: &Path, name: &str, value: &[u8]) {
    rustix::fs::lsetxattr(path, name, value, XattrFlags::empty()).unwrap();
}

fn whiteout(path: &Path) {
    mknod(path, SFlag::S_IFCHR, Mode::empty(), 0).unwrap();
}

/// A bottom layer with `gone`, `stays` and `dir/below`, and one above it to be marked.
fn two_layers() -> Layers {
    let layers = Layers::new(2);
    Layers::write(&layers.lower(1).join("gone"), "x");
    Layers::write(&layers.lower(1).join("stays"), "x");
    Layers::write(&layers.lower(1).join("dir/below"), "x");
    fs::create_dir(layers.lower(0).join("dir")).unwrap();
    layers
}

fn check(layers: Layers) {
    layers.seal();
    let mount = Mount::new(&layers, "");
    assert!(!mount.join("gone").exists());
    assert!(mount.join("stays").exists());
    assert!(!mount.join("dir/below").exists());
    assert_eq!(fs::read_dir(mount.join("dir")).unwrap().count(), 0);
    assert_eq!(fs::read_dir(mount.join("")).unwrap().count(), 2);
}

#[test]
fn overlayfs() {
    let layers = two_layers();
    whiteout(&layers.lower(0).join("gone"));
    set(&layers.lower(0).join("dir"), "trusted.overlay.opaque", b"y");
    check(layers);
}

#[test]
fn overlayfs_with_whiteouts_by_attribute() {
    let layers = two_layers();
    fs::write(layers.lower(0).join("gone"), "").unwrap();
    set(
        &layers.lower(0).join("gone"),
        "trusted.overlay.whiteout",
        b"y",
    );
    set(&layers.lower(0), "trusted.overlay.opaque", b"x");
    set(&layers.lower(0).join("dir"), "trusted.overlay.opaque", b"y");
    check(layers);
}

#[test]
fn names_of_the_image_format() {
    let layers = two_layers();
    fs::write(layers.lower(0).join(".wh.gone"), "").unwrap();
    fs::write(layers.lower(0).join("dir/.wh..wh..opq"), "").unwrap();
    check(layers);
}

#[test]
fn fuse_overlayfs() {
    let layers = two_layers();
    fs::write(layers.lower(0).join(".wh.gone"), "").unwrap();
    set(
        &layers.lower(0).join("dir"),
        "user.fuseoverlayfs.opaque",
        b"y",
    );
    check(layers);
}

#[test]
fn what_is_written_is_overlayfs() {
    let layers = Layers::new(1);
    Layers::write(&layers.lower(0).join("file"), "x");
    Layers::write(&layers.lower(0).join("dir/below"), "x");
    layers.seal();
    let mount = Mount::new(&layers, "");
    fs::remove_file(mount.join("file")).unwrap();
    fs::remove_dir_all(mount.join("dir")).unwrap();
    fs::create_dir(mount.join("dir")).unwrap();
    mount.unmount();
    let (upper, file) = (layers.upper(), layers.upper().join("file"));
    let get = |path: &Path, name: &str| {
        let mut value = [0; 8];
        let length = rustix::fs::lgetxattr(path, name, &mut value).unwrap();
        value[..length].to_vec()
    };
    let mark = fs::symlink_metadata(&file).unwrap();
    if mode::Mode::of_run().makes_devices() {
        assert!(mark.file_type().is_char_device());
        assert_eq!(mark.rdev(), 0);
    } else {
        assert!(mark.is_file() && mark.len() == 0);
        assert_eq!(get(&file, "trusted.overlay.whiteout"), b"y");
        assert_eq!(get(&upper, "trusted.overlay.opaque"), b"x");
    }
    assert_eq!(get(&upper.join("dir"), "trusted.overlay.opaque"), b"y");
}
