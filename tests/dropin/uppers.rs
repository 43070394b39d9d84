//! Uppers that fuse-overlayfs has written, served by plyfs, and the other way round.

use std::fs;
use std::path::Path;
use std::process::Command;

use crate::common::Layers;
use crate::common::mount::PLYFS;
use crate::peer::{Dirs, Program, seen};

/// A lower with something for every kind of change.
fn fill(lower: &Path) {
    for name in [
        "stays",
        "gone",
        "dir/below",
        "dir/also",
        "whole/below",
        "renamed",
    ] {
        Layers::write(&lower.join(name), name);
    }
}

fn change(mnt: &Path) {
    fs::remove_file(mnt.join("gone")).unwrap();
    fs::remove_file(mnt.join("dir/below")).unwrap();
    fs::remove_dir_all(mnt.join("whole")).unwrap();
    fs::create_dir(mnt.join("whole")).unwrap();
    fs::write(mnt.join("whole/new"), "new").unwrap();
    fs::rename(mnt.join("renamed"), mnt.join("dir/to")).unwrap();
    fs::write(mnt.join("stays"), "changed").unwrap();
}

#[test]
fn an_upper_goes_to_fuse_overlayfs_and_back() {
    for first in Program::BOTH {
        let dirs = Dirs::new();
        fill(&dirs.lower());
        // fuse-overlayfs does not look for a file's data below the upper.
        let options = format!("{},metacopy=off", dirs.options());
        let before = first.on_mount(&dirs.mnt(), &options, |mnt| {
            change(mnt);
            seen(mnt)
        });
        let middle = first.other().on_mount(&dirs.mnt(), &options, |mnt| {
            assert_eq!(seen(mnt), before, "after {first:?}");
            fs::remove_file(mnt.join("stays")).unwrap();
            fs::remove_dir_all(mnt.join("dir")).unwrap();
            fs::create_dir(mnt.join("dir")).unwrap();
            fs::write(mnt.join("gone"), "again").unwrap();
            seen(mnt)
        });
        first.on_mount(&dirs.mnt(), &options, |mnt| {
            assert_eq!(seen(mnt), middle, "{first:?} again");
        });
    }
}

/// In a user namespace neither has `trusted.` attributes, and fuse-overlayfs writes forms of its own.
#[test]
fn so_does_an_upper_that_was_made_in_a_user_namespace() {
    const SCRIPT: &str = r#"
        set -e
        show() { (cd mnt && find . ! -type d -printf '%p %m %s\n' -o -printf '%p %m\n' | sort; cat stays gone whole/* 2>/dev/null || true; getfattr -dR -m- .); }
        on() { "$1" -o lowerdir=lower,upperdir=upper,workdir=work mnt 2>/dev/null; shift; (cd mnt; eval "$*"); show >"$out"; umount mnt; }
        for pair in "$PLYFS fuse-overlayfs" "fuse-overlayfs $PLYFS"; do
            set -- $pair
            rm -rf upper work; mkdir upper work
            out=1 on "$1" 'rm -r gone dir/below whole; mkdir whole; echo new >whole/new; mv renamed dir/to; echo changed >stays'
            out=2 on "$2" :
            diff 1 2
            out=2 on "$2" 'rm stays; rm -r dir; mkdir dir; touch gone'
            out=1 on "$1" :
            diff 2 1
            [ ! -e mnt/stays ]
        done
        echo same
    "#;
    let dirs = Dirs::new();
    fill(&dirs.lower());
    let output = Command::new("unshare")
        .args(["--user", "--map-root-user", "--mount", "bash", "-c", SCRIPT])
        .current_dir(dirs.path(""))
        .env("PLYFS", PLYFS)
        .output()
        .unwrap();
    assert_eq!(
        (output.status.success(), output.stdout.as_slice()),
        (true, b"same\n".as_slice()),
        "{}\n{}",
        String::from_utf8_lossy(&output.stdout),
        String::from_utf8_lossy(&output.stderr)
    );
}

/// What fuse-overlayfs writes where it can make no devices.
#[test]
fn whiteouts_by_name_in_an_upper_are_taken_over_once() {
    let dirs = Dirs::new();
    fill(&dirs.lower());
    let upper = dirs.upper();
    fs::write(upper.join(".wh.gone"), "").unwrap();
    fs::write(upper.join(".wh.with-text"), "text").unwrap();
    fs::create_dir(upper.join("whole")).unwrap();
    fs::write(upper.join("whole/.wh..wh..opq"), "").unwrap();
    fs::create_dir_all(upper.join("dir/deep/er")).unwrap();
    fs::write(upper.join("dir/.wh.below"), "").unwrap();
    fs::write(upper.join("dir/deep/er/file"), "").unwrap();
    xattr::set(upper.join("dir/deep"), "user.fuseoverlayfs.opaque", b"y").unwrap();
    xattr::set(
        upper.join("dir/deep/er/file"),
        "user.fuseoverlayfs.origin",
        b"f",
    )
    .unwrap();
    let options = dirs.options();
    for _ in 0..2 {
        Program::Plyfs.on_mount(&dirs.mnt(), &options, |mnt| {
            let seen = seen(mnt);
            let names: Vec<&str> = seen.keys().map(String::as_str).collect();
            assert_eq!(
                names,
                [
                    "",
                    ".wh.with-text",
                    "dir",
                    "dir/also",
                    "dir/deep",
                    "dir/deep/er",
                    "dir/deep/er/file",
                    "renamed",
                    "stays",
                    "whole"
                ]
            );
            assert!(seen["dir/deep/er/file"].ends_with("[]"), "{seen:?}");
        });
    }
    // From then on such a name is one like others.
    Program::Plyfs.on_mount(&dirs.mnt(), &options, |mnt| {
        fs::write(mnt.join(".wh.stays"), "").unwrap();
    });
    Program::Plyfs.on_mount(&dirs.mnt(), &options, |mnt| {
        assert!(mnt.join(".wh.stays").exists() && mnt.join("stays").exists());
    });
}
