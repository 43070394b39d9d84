//! Changes of large lower files that are none of their data.

use std::fs::{self, Permissions};
use std::os::unix::fs::{MetadataExt, PermissionsExt, chown};
use std::path::Path;

use nix::fcntl::AT_FDCWD;
use nix::sys::stat::{UtimensatFlags, utimensat};
use nix::sys::time::TimeSpec;

use crate::fill::Fill;
use crate::outcome::{Outcome, expect};
use crate::place::{Peer, Place};
use crate::row::{Row, row};

const SIZE: usize = 4 << 20;

fn large(fill: &Fill) {
    fill.file("d/f", vec![b'x'; SIZE]);
}

fn room(dir: &Path) -> std::io::Result<u64> {
    let mut sum = 0;
    for entry in fs::read_dir(dir)? {
        let entry = entry?;
        let m = entry.metadata()?;
        sum += if m.is_dir() {
            room(&entry.path())?
        } else {
            512 * m.blocks()
        };
    }
    Ok(sum)
}

/// The upper has no data, and the file at `name` has it all, also after a remount.
fn light(at: &Place, name: &str) -> Outcome {
    if at.peer != Peer::Native {
        expect(room(&at.upper())? < SIZE as u64 / 100, "copied")?;
    }
    let whole = || {
        expect(
            fs::read(at.path(name))? == vec![b'x'; SIZE],
            "wrong content",
        )
    };
    whole()?;
    at.remount()?;
    whole()
}

/// All rows of the chapter.
pub fn rows() -> Vec<Row> {
    vec![
        row(
            "chown",
            "chown of a large lower file copies no data.",
            large,
            |at| {
                chown(at.path("d/f"), Some(5), Some(6))?;
                light(at, "d/f")
            },
        ),
        row("chmod", "Nor does chmod.", large, |at| {
            fs::set_permissions(at.path("d/f"), Permissions::from_mode(0o600))?;
            light(at, "d/f")
        }),
        row("utimes", "Nor does setting times.", large, |at| {
            let time = TimeSpec::new(1000, 1);
            let flags = UtimensatFlags::FollowSymlink;
            utimensat(AT_FDCWD, &at.path("d/f"), &time, &time, flags)?;
            light(at, "d/f")
        }),
        row("setxattr", "Nor does an attribute.", large, |at| {
            xattr::set(at.path("d/f"), "user.x", b"y")?;
            light(at, "d/f")
        }),
        row("rename", "Nor does rename.", large, |at| {
            fs::rename(at.path("d/f"), at.path("g"))?;
            light(at, "g")
        }),
        row("link", "Nor does a second name.", large, |at| {
            fs::hard_link(at.path("d/f"), at.path("g"))?;
            light(at, "g")
        }),
    ]
}
