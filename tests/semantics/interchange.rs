//! Uppers that go to kernel overlayfs and come from there, and layers in the formats of others.

use std::fs::{self, Permissions};
use std::os::unix::fs::{MetadataExt, PermissionsExt, symlink};
use std::path::{Path, PathBuf};

use crate::fill::Fill;
use crate::outcome::{Outcome, Said, expect};
use crate::place::{Peer, Place};
use crate::row::{Row, nothing, row};
use crate::tools::{absent, holds, lists};

fn tree(fill: &Fill) {
    for name in ["gone", "stays", "mode", "d/f", "d/g", "whole/below", "one"] {
        fill.file(name, name);
        fill.file_in(1, &format!("{name}.below"), name);
    }
    fill.link("one", "d/two");
}

/// Each kind of change once.
fn change(at: &Place) -> Outcome {
    fs::remove_file(at.path("gone"))?;
    fs::remove_dir_all(at.path("whole"))?;
    fs::create_dir(at.path("whole"))?;
    fs::write(at.path("whole/new"), "new")?;
    fs::write(at.path("d/two"), "written")?;
    fs::rename(at.path("d/f"), at.path("moved"))?;
    fs::hard_link(at.path("stays"), at.path("d/again"))?;
    fs::set_permissions(at.path("mode"), Permissions::from_mode(0o600))?;
    xattr::set(at.path("stays"), "user.x", b"y")?;
    Ok(symlink("moved", at.path("link"))?)
}

/// What is to be the same: path, mode, number of links of a file, content.
type Seen = Vec<(PathBuf, u32, u64, Vec<u8>)>;

fn seen(root: &Path) -> Result<Seen, Said> {
    let (mut all, mut pending) = (Vec::new(), vec![root.to_owned()]);
    while let Some(dir) = pending.pop() {
        for entry in fs::read_dir(dir)? {
            let path = entry?.path();
            let m = fs::symlink_metadata(&path)?;
            let inside = path.strip_prefix(root).unwrap().to_owned();
            let (links, content) = match (m.is_dir(), m.is_symlink()) {
                (true, _) => (0, Vec::new()),
                (_, true) => (
                    m.nlink(),
                    fs::read_link(&path)?.into_os_string().into_encoded_bytes(),
                ),
                _ => (m.nlink(), fs::read(&path)?),
            };
            all.push((inside, m.mode(), links, content));
            if m.is_dir() {
                pending.push(path);
            }
        }
    }
    all.sort();
    Ok(all)
}

/// Kernel overlayfs, mounted on what is left, must show the same.
fn same_by_kernel(at: &Place) -> Outcome {
    let before = seen(&at.root())?;
    if at.peer == Peer::Native {
        return Ok(());
    }
    at.unmount()?;
    at.mount_by_kernel()?;
    expect(seen(&at.root())? == before, "another tree")
}

/// All rows of the chapter.
pub fn rows() -> Vec<Row> {
    vec![
        row(
            "to_kernel",
            "Kernel overlayfs with everything on shows the same tree of an upper with every kind of change.",
            tree,
            |at| {
                change(at)?;
                same_by_kernel(at)
            },
        ),
        row(
            "to_kernel_renamed",
            "Also when lower directories were renamed.",
            tree,
            |at| {
                fs::rename(at.path("d"), at.path("e"))?;
                fs::rename(at.path("whole"), at.path("e/whole"))?;
                change_in_renamed(at)?;
                same_by_kernel(at)
            },
        ),
        row(
            "from_kernel",
            "What kernel overlayfs with everything on has written is shown the same.",
            tree,
            |at| {
                if at.peer == Peer::Native {
                    return Ok(());
                }
                at.unmount()?;
                at.mount_by_kernel()?;
                change(at)?;
                fs::rename(at.path("d"), at.path("e"))?;
                let before = seen(&at.root())?;
                at.remount()?;
                expect(seen(&at.root())? == before, "another tree")
            },
        ),
        row(
            "names_of_whiteouts",
            "In a lower directory `.wh.NAME` hides a name of the layers below, and `.wh..wh..opq` all of them.",
            |fill| {
                fill.file("d/.wh.f", "");
                fill.file("o/.wh..wh..opq", "");
                fill.file_in(1, "d/f", "");
                fill.file_in(1, "o/f", "");
            },
            |at| {
                lists(at.path("d"), &[])?;
                lists(at.path("o"), &[])
            },
        ),
        row(
            "attributes_of_whiteouts",
            "An empty file with overlay.whiteout hides a name where its directory says that there are such.",
            |fill| {
                fill.file_in(1, "d/f", "");
                fill.file("d/f", "");
                fill.file("d/g", "");
                xattr::set(fill.path(0, "d"), "trusted.overlay.opaque", b"x").unwrap();
                xattr::set(fill.path(0, "d/f"), "trusted.overlay.whiteout", b"y").unwrap();
            },
            |at| {
                absent(at.path("d/f"))?;
                lists(at.path("d"), &["g"])
            },
        ),
        row(
            "opaque_of_fuse_overlayfs",
            "A lower directory with user.fuseoverlayfs.opaque hides what is below.",
            |fill| {
                fill.file_in(1, "d/f", "");
                fill.file("d/g", "g");
                xattr::set(fill.path(0, "d"), "user.fuseoverlayfs.opaque", b"y").unwrap();
            },
            |at| {
                lists(at.path("d"), &["g"])?;
                holds(at.path("d/g"), "g")
            },
        ),
        row(
            "no_marks_for_made",
            "An upper that has only new files and directories has no attributes but those that were set.",
            nothing,
            |at| {
                fs::create_dir(at.path("d"))?;
                fs::write(at.path("d/f"), "")?;
                at.unmount()?;
                for name in ["d", "d/f"] {
                    expect(
                        xattr::list(at.upper().join(name))?.next().is_none(),
                        "marked",
                    )?;
                }
                at.mount_again()
            },
        ),
    ]
}

/// Changes in what was renamed.
fn change_in_renamed(at: &Place) -> Outcome {
    fs::remove_file(at.path("e/g"))?;
    fs::write(at.path("e/f"), "written")?;
    fs::remove_file(at.path("e/whole/below"))?;
    Ok(fs::write(at.path("e/whole/new"), "new")?)
}
