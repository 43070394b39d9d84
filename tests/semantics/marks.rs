//! Whiteouts, opaque directories and the other marks of the union, and those who would forge them.

use std::fs;
use std::path::Path;

use nix::fcntl::RenameFlags;
use nix::sys::stat::{Mode, SFlag, mknod};

use crate::fill::Fill;
use crate::outcome::{expect, fails};
use crate::place::Peer;
use crate::row::{Row, nothing, row};
use crate::tools::{absent, exchange, holds, lists, rename_with};

fn tree(fill: &Fill) {
    fill.file("d/f", "top");
    fill.file_in(1, "d/g", "below");
    fill.file_in(1, "secret/f", "below");
}

fn set(path: &Path, name: &str, value: &[u8]) -> std::io::Result<()> {
    xattr::set(path, name, value)
}

/// All rows of the chapter.
pub fn rows() -> Vec<Row> {
    vec![
        row(
            "whiteout",
            "A name hidden by a lower whiteout is gone, can be made anew, and goes again.",
            |fill| {
                fill.file_in(1, "f", "below");
                fill.whiteout(0, "f");
            },
            |at| {
                absent(at.path("f"))?;
                lists(at.root(), &[])?;
                fs::write(at.path("f"), "new")?;
                at.remount()?;
                holds(at.path("f"), "new")?;
                fs::remove_file(at.path("f"))?;
                at.remount()?;
                absent(at.path("f"))
            },
        ),
        row(
            "created_and_removed",
            "A lower name made and removed a hundred times shows the last content and then nothing.",
            |fill| fill.file("f", "lower"),
            |at| {
                for n in 0..100 {
                    fs::remove_file(at.path("f"))?;
                    fs::write(at.path("f"), format!("{n}"))?;
                    holds(at.path("f"), &format!("{n}"))?;
                }
                fs::remove_file(at.path("f"))?;
                at.remount()?;
                lists(at.root(), &[])
            },
        ),
        row(
            "no_residue",
            "Removing what was only made through the mount leaves nothing in the upper.",
            nothing,
            |at| {
                fs::write(at.path("f"), "")?;
                fs::create_dir(at.path("d"))?;
                fs::rename(at.path("f"), at.path("d/f"))?;
                fs::remove_dir_all(at.path("d"))?;
                lists(at.upper(), &[])
            },
        ),
        row(
            "marks_hidden",
            "The union's own attributes are not listed and not read.",
            tree,
            |at| {
                fs::rename(at.path("d"), at.path("moved"))?;
                fs::remove_dir_all(at.path("secret"))?;
                fs::create_dir(at.path("secret"))?;
                for name in ["moved", "secret", "moved/f"] {
                    expect(xattr::list(at.path(name))?.next().is_none(), "shown")?;
                }
                expect(
                    xattr::get(at.path("secret"), "trusted.overlay.opaque")?.is_none(),
                    "read",
                )
            },
        ),
        row(
            "forged_opaque",
            "Setting trusted.overlay.opaque through the mount is refused or hides nothing.",
            tree,
            |at| {
                let _ = set(&at.path("d"), "trusted.overlay.opaque", b"y");
                let _ = set(&at.path("d"), "user.overlay.opaque", b"y");
                at.remount()?;
                lists(at.path("d"), &["f", "g"])
            },
        ),
        row(
            "forged_redirect",
            "Setting trusted.overlay.redirect through the mount is refused or leads nowhere.",
            tree,
            |at| {
                fs::create_dir(at.path("new"))?;
                let _ = set(&at.path("new"), "trusted.overlay.redirect", b"/secret");
                let _ = set(&at.path("new"), "user.overlay.redirect", b"/secret");
                at.remount()?;
                lists(at.path("new"), &[])
            },
        ),
        row(
            "forged_metacopy",
            "Setting trusted.overlay.metacopy through the mount is refused or shows no other file's data.",
            tree,
            |at| {
                fs::write(at.path("d/new"), "own")?;
                let _ = set(&at.path("d/new"), "trusted.overlay.metacopy", b"");
                let _ = set(&at.path("d/new"), "trusted.overlay.redirect", b"/secret/f");
                at.remount()?;
                holds(at.path("d/new"), "own")
            },
        ),
        row(
            "nested",
            "A private attribute set through the mount comes back as it was set, as an inner overlay needs it.",
            tree,
            |at| {
                set(&at.path("d"), "trusted.overlay.opaque", b"y")?;
                at.remount()?;
                let value = xattr::get(at.path("d"), "trusted.overlay.opaque")?;
                expect(value.as_deref() == Some(b"y"), "lost")
            },
        ),
        row(
            "device_0_0",
            "mknod of a character device 0:0, which would be a whiteout, is EPERM.",
            tree,
            |at| {
                let made = mknod(&at.path("d/new"), SFlag::S_IFCHR, Mode::empty(), 0);
                fails(made, nix::Error::EPERM)
            },
        ),
        row(
            "rename_whiteout",
            "RENAME_WHITEOUT, which would leave a whiteout, is EINVAL.",
            tree,
            |at| {
                let flags = RenameFlags::RENAME_WHITEOUT;
                fails(
                    rename_with(&at.path("d/f"), &at.path("d/h"), flags),
                    nix::Error::EINVAL,
                )
            },
        ),
        row(
            "wh_names",
            "Names like .wh.f and .wh..wh..opq are ordinary when they are made through the mount.",
            tree,
            |at| {
                for name in ["d/.wh.f", "d/.wh.g", "d/.wh..wh..opq"] {
                    fs::write(at.path(name), "")?;
                }
                let all = [".wh..wh..opq", ".wh.f", ".wh.g", "f", "g"];
                lists(at.path("d"), &all)?;
                at.remount()?;
                lists(at.path("d"), &all)
            },
        ),
        row(
            "overlay_format",
            "Removals are whiteouts 0:0 in the upper, which kernel overlayfs shows the same.",
            tree,
            |at| {
                fs::remove_file(at.path("d/g"))?;
                fs::remove_dir_all(at.path("secret"))?;
                fs::create_dir(at.path("secret"))?;
                exchange(&at.path("d"), &at.path("secret"))?;
                fs::write(at.path("secret/made"), "made")?;
                if at.peer == Peer::Native {
                    return Ok(());
                }
                at.unmount()?;
                at.mount_by_kernel()?;
                lists(at.path("secret"), &["f", "made"])?;
                lists(at.path("d"), &[])
            },
        ),
    ]
}
