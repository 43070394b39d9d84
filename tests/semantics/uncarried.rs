//! What the kernel does for native files and FUSE has no words for.

use std::fs::File;
use std::io::Read;
use std::os::unix::fs::{FileExt, MetadataExt, OpenOptionsExt};
use std::path::Path;
use std::process::Command;

use nix::fcntl::AT_FDCWD;
use nix::sys::stat::{UtimensatFlags, utimensat};
use nix::sys::time::TimeSpec;
use nix::unistd::{Whence, lseek};

use crate::fill::Fill;
use crate::outcome::{Said, expect, fails};
use crate::row::{Row, row};
use crate::tools::open_rw;

/// Beyond the longest file of ext4 with blocks of 4 KiB.
const TOO_FAR: u64 = 17 << 40;

fn one_file(fill: &Fill) {
    fill.file("f", [b'x'; 8192]);
}

/// In seconds.
fn set_times(path: &Path, accessed: i64, changed: i64) -> nix::Result<()> {
    let (accessed, changed) = (TimeSpec::new(accessed, 0), TimeSpec::new(changed, 0));
    let follow = UtimensatFlags::FollowSymlink;
    utimensat(AT_FDCWD, path, &accessed, &changed, follow)
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
            "time_beyond_limit",
            "A time that the host cannot store is shown as the nearest that it can, also after a remount.",
            one_file,
            |at| {
                let time = || Ok::<_, Said>(std::fs::metadata(at.path("f"))?.mtime());
                set_times(&at.path("f"), 1 << 34, 1 << 34)?;
                let shown = time()?;
                at.remount()?;
                expect(time()? == shown, "changes")
            },
        ),
        row(
            "truncation_to_same_length",
            "truncate(2) to the length that a file has moves its times of change.",
            one_file,
            |at| {
                set_times(&at.path("f"), 1_000_000_000, 1_100_000_000)?;
                nix::unistd::truncate(&at.path("f"), 8192)?;
                let time = std::fs::metadata(at.path("f"))?.mtime();
                expect(time > 1_100_000_000, "unmoved")
            },
        ),
        row(
            "access_time_of_cached",
            "Reading moves an access time that is older than the last change also if the data was read before.",
            one_file,
            |at| {
                std::fs::read(at.path("f"))?;
                set_times(&at.path("f"), 1_000_000_000, 1_100_000_000)?;
                std::fs::read(at.path("f"))?;
                let time = std::fs::metadata(at.path("f"))?.atime();
                expect(time > 1_100_000_000, "unmoved")
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
