//! Large files of which a little is changed.

use std::fs::{self, File};
use std::io::Write;
use std::os::unix::fs::{FileExt, MetadataExt};

use nix::fcntl::{FallocateFlags, fallocate};
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;

use crate::common::mapping;
use crate::fill::Fill;
use crate::outcome::{Outcome, Said, expect};
use crate::place::{Peer, Place};
use crate::row::{Row, row};
use crate::tools::open_rw;

const MIB: u64 = 1 << 20;
const SIZE: u64 = 8 * MIB;
/// A few chunks of 64 KiB and what the host needs beside them.
const LITTLE: u64 = 512 * 1024;

fn pattern() -> Vec<u8> {
    (0..SIZE).map(|at| ((at >> 10) ^ at) as u8 | 1).collect()
}

fn large(fill: &Fill) {
    fill.file("f", pattern());
}

/// The upper has little of the file, and the mount all of it, also after a remount.
fn partly(at: &Place, expected: &[u8]) -> Outcome {
    let all = || expect(fs::read(at.path("f"))? == expected, "wrong content");
    all()?;
    if at.peer != Peer::Native {
        let room = 512 * fs::metadata(at.upper().join("f"))?.blocks();
        expect(room <= LITTLE, "whole")?;
    }
    at.remount()?;
    all()
}

/// All rows of the chapter.
pub fn rows() -> Vec<Row> {
    vec![
        row(
            "written",
            "The first small write to a large lower file brings a chunk to the upper, and not the file.",
            large,
            |at| {
                let (file, mut expected) = (open_rw(at.path("f"))?, pattern());
                file.write_all_at(b"new", 5 * MIB + 1)?;
                file.sync_all()?;
                expected[5 * MIB as usize + 1..][..3].copy_from_slice(b"new");
                drop(file);
                partly(at, &expected)
            },
        ),
        row(
            "appended",
            "So does an append.",
            large,
            |at| {
                let mut file = File::options().append(true).open(at.path("f"))?;
                file.write_all(b"new")?;
                file.sync_all()?;
                drop(file);
                partly(at, &[&pattern()[..], b"new"].concat())
            },
        ),
        row(
            "mapped",
            "So does a store through a mapping.",
            large,
            |at| {
                let (file, mut expected) = (open_rw(at.path("f"))?, pattern());
                let mut map = mapping::shared_mut(&file);
                map[6 * MIB as usize] = 0;
                map.flush()?;
                expected[6 * MIB as usize] = 0;
                drop((map, file));
                partly(at, &expected)
            },
        ),
        row(
            "truncated",
            "A large lower file cut off in the middle of a chunk and made longer again reads as zeros from there, with little copied.",
            large,
            |at| {
                let (file, mut expected) = (open_rw(at.path("f"))?, pattern());
                file.set_len(3 * MIB + 5)?;
                file.set_len(SIZE)?;
                file.sync_all()?;
                expected[3 * MIB as usize + 5..].fill(0);
                drop(file);
                partly(at, &expected)
            },
        ),
        row(
            "punched",
            "A hole punched across chunks of a large lower file reads as zeros, and the rest as before, with little copied.",
            large,
            |at| {
                let (file, mut expected) = (open_rw(at.path("f"))?, pattern());
                let flags = FallocateFlags::FALLOC_FL_PUNCH_HOLE | FallocateFlags::FALLOC_FL_KEEP_SIZE;
                let (from, length) = (2 * MIB - 1000, 70_000);
                fallocate(&file, flags, from as i64, length)?;
                file.sync_all()?;
                expected[from as usize..][..length as usize].fill(0);
                drop(file);
                partly(at, &expected)
            },
        ),
        row(
            "holes",
            "A byte written into a large hole of a lower file leaves the rest of it one, also after the unmount.",
            |fill| File::create(fill.path(0, "f")).unwrap().set_len(SIZE).unwrap(),
            |at| {
                let file = open_rw(at.path("f"))?;
                file.write_all_at(b"x", 5 * MIB)?;
                drop(file);
                at.remount()?;
                let room = 512 * fs::metadata(at.upper().join("f"))?.blocks();
                expect(room <= LITTLE, "filled")
            },
        ),
        row(
            "plain_after_unmount",
            "After the unmount the upper has the whole file, and nothing else is needed to read it.",
            large,
            |at| {
                let (file, mut expected) = (open_rw(at.path("f"))?, pattern());
                file.write_all_at(b"new", 0)?;
                drop(file);
                at.unmount()?;
                expected[..3].copy_from_slice(b"new");
                expect(fs::read(at.upper().join("f"))? == expected, "incomplete")?;
                at.mount_again()
            },
        ),
        row(
            "refused_by_kernel",
            "Kernel overlayfs refuses an upper that a killed server has left with a part of a file; plyfs goes on with it.",
            large,
            |at| {
                let (file, mut expected) = (open_rw(at.path("f"))?, pattern());
                file.write_all_at(b"new", 0)?;
                file.sync_all()?;
                let server = at.server().ok_or_else(|| Said("no server".to_owned()))?;
                kill(Pid::from_raw(server as i32), Signal::SIGKILL)?;
                at.wait_for_server()?;
                drop(file);
                at.unmount()?;
                expect(at.mount_by_kernel().is_err(), "mounted")?;
                at.mount_again()?;
                expected[..3].copy_from_slice(b"new");
                expect(fs::read(at.path("f"))? == expected, "wrong content")
            },
        )
        .plyfs_alone(),
    ]
}
