//! What the kernel does for native files and FUSE has no words for.

use std::fs::File;
use std::io::Read;
use std::os::unix::fs::{FileExt, OpenOptionsExt};
use std::process::Command;

use nix::unistd::{Whence, lseek};

use crate::fill::Fill;
use crate::outcome::{expect, fails};
use crate::row::{Row, row};
use crate::tools::open_rw;

/// Beyond the longest file of ext4 with blocks of 4 KiB.
const TOO_FAR: u64 = 17 << 40;

fn one_file(fill: &Fill) {
    fill.file("f", [b'x'; 8192]);
}

/// All rows of the chapter.
pub fn rows() -> Vec<Row> {
    vec![
        row(
            "write_beyond_limit",
            "A write beyond the longest file of the host is EFBIG and leaves the length as it is.",
            one_file,
            |at| {
                let file = open_rw(at.path("f"))?;
                for offset in [TOO_FAR, i64::MAX as u64 - 1] {
                    fails(file.write_at(b"x", offset), nix::Error::EFBIG)?;
                }
                expect(file.metadata()?.len() == 8192, "longer")
            },
        ),
        row(
            "seek_beyond_limit",
            "lseek beyond the longest file of the host is EINVAL.",
            one_file,
            |at| {
                let file = File::open(at.path("f"))?;
                let far = i64::try_from(TOO_FAR).unwrap();
                fails(lseek(&file, far, Whence::SeekSet), nix::Error::EINVAL)
            },
        ),
        row(
            "direct_unaligned",
            "A read with O_DIRECT into memory or from an offset that is not aligned is EINVAL.",
            one_file,
            |at| {
                let mut file = File::options();
                let mut file = file
                    .read(true)
                    .custom_flags(libc::O_DIRECT)
                    .open(at.path("f"))?;
                fails(file.read(&mut [0; 3]), nix::Error::EINVAL)
            },
        ),
        row(
            "extents",
            "FIEMAP, as filefrag(8) asks it, tells where the data of a file lies.",
            one_file,
            |at| {
                let file = open_rw(at.path("f"))?;
                file.write_all_at(b"new", 0)?;
                file.sync_all()?;
                let output = Command::new("filefrag").arg(at.path("f")).output()?;
                let text = String::from_utf8_lossy(&output.stdout);
                expect(text.contains("1 extent found"), "none")
            },
        ),
    ]
}
