//! The content of files: written, mapped, allocated, copied, removed while open.

mod special;

use std::fs::{self, File};
use std::io::{Read, Write};
use std::os::fd::{AsFd, AsRawFd};
use std::os::unix::fs::{FileExt, MetadataExt, OpenOptionsExt};
use std::path::Path;

use nix::fcntl::{AT_FDCWD, AtFlags, FallocateFlags, fallocate};
use nix::unistd::{Whence, lseek};

use crate::common::mapping;
use crate::fill::Fill;
use crate::outcome::{Outcome, expect, fails};
use crate::place::Place;
use crate::row::{Row, nothing, row};
use crate::tools::{holds, lists, names, open_rw};

const MIB: u64 = 1 << 20;

fn one_file(fill: &Fill) {
    fill.file("f", "old old old");
}

/// 8 MiB, with data in the first page and in the last.
fn sparse(fill: &Fill) {
    let file = File::create(fill.path(0, "f")).unwrap();
    file.set_len(8 * MIB).unwrap();
    file.write_all_at(&[b'a'; 4096], 0).unwrap();
    file.write_all_at(&[b'z'; 4096], 8 * MIB - 4096).unwrap();
}

fn hundred_pages(fill: &Fill) {
    fill.file("f", [b'x'; 100 * 4096]);
}

fn allocate(at: &Place, flags: FallocateFlags, offset: i64, length: i64) -> nix::Result<File> {
    let file = open_rw(at.path("f")).unwrap();
    fallocate(&file, flags, offset, length)?;
    Ok(file)
}

fn byte_at(file: &File, offset: u64) -> std::io::Result<u8> {
    let mut byte = [0];
    file.read_exact_at(&mut byte, offset)?;
    Ok(byte[0])
}

/// All rows of the chapter.
pub fn rows() -> Vec<Row> {
    let mut rows = writing();
    rows.extend(allocation());
    rows.extend(copying());
    rows.extend(removed());
    rows.extend(durable());
    rows.extend(special::rows());
    rows
}

fn writing() -> Vec<Row> {
    vec![
        row(
            "append",
            "Two O_APPEND descriptors of a lower file always write at its end.",
            one_file,
            |at| {
                let open = || File::options().append(true).open(at.path("f"));
                let (mut one, mut other) = (open()?, open()?);
                one.write_all(b"1")?;
                other.write_all(b"2")?;
                one.write_all(b"3")?;
                holds(at.path("f"), "old old old123")
            },
        ),
        row(
            "truncate",
            "truncate to less and to more; what was added reads as zero.",
            one_file,
            |at| {
                nix::unistd::truncate(&at.path("f"), 3)?;
                nix::unistd::truncate(&at.path("f"), 6)?;
                holds(at.path("f"), "old\0\0\0")
            },
        ),
        row(
            "truncate_by_open",
            "O_TRUNC empties a lower file and keeps mode and owner.",
            |fill| {
                one_file(fill);
                std::os::unix::fs::chown(fill.path(0, "f"), Some(5), Some(6)).unwrap();
            },
            |at| {
                File::create(at.path("f"))?;
                let m = fs::metadata(at.path("f"))?;
                expect((m.size(), m.uid(), m.gid()) == (0, 5, 6), "wrong")
            },
        ),
        row(
            "exclusive",
            "O_CREAT|O_EXCL is EEXIST for a lower name and makes a removed one.",
            one_file,
            |at| {
                fails(File::create_new(at.path("f")), nix::Error::EEXIST)?;
                fs::remove_file(at.path("f"))?;
                File::create_new(at.path("f"))?;
                holds(at.path("f"), "")
            },
        ),
        row(
            "anonymous",
            "O_TMPFILE makes a file without a name, which linkat can name.",
            nothing,
            |at| {
                let flags = libc::O_TMPFILE;
                let mut options = File::options();
                let mut file = options
                    .read(true)
                    .write(true)
                    .custom_flags(flags)
                    .open(at.root())?;
                file.write_all(b"text")?;
                expect(file.metadata()?.nlink() == 0, "has a name")?;
                let path = format!("/proc/self/fd/{}", file.as_raw_fd());
                let follow = AtFlags::AT_SYMLINK_FOLLOW;
                let path = Path::new(&path);
                nix::unistd::linkat(AT_FDCWD, path, AT_FDCWD, &at.path("f"), follow)?;
                holds(at.path("f"), "text")
            },
        ),
        row(
            "direct",
            "O_DIRECT reads and writes what others see.",
            |fill| fill.file("f", [b'o'; 8192]),
            |at| {
                // Page-aligned memory comes from a mapping.
                let mut page = memmap2::MmapMut::map_anon(4096)?;
                let mut options = File::options();
                options.read(true).write(true).custom_flags(libc::O_DIRECT);
                let file = options.open(at.path("f"))?;
                expect(
                    file.read_at(&mut page, 4096)? == 4096 && page[0] == b'o',
                    "wrong",
                )?;
                page.fill(b'n');
                expect(file.write_at(&page, 0)? == 4096, "short")?;
                let text = fs::read(at.path("f"))?;
                expect(text[0] == b'n' && text[4096] == b'o', "stale")
            },
        ),
        row(
            "large_offset",
            "A byte is written at 1 TiB and read back.",
            one_file,
            |at| {
                let file = open_rw(at.path("f"))?;
                file.write_all_at(b"x", 1 << 40)?;
                expect(file.metadata()?.size() == (1 << 40) + 1, "wrong size")?;
                expect(byte_at(&file, 1 << 40)? == b'x', "lost")?;
                Ok(fs::remove_file(at.path("f"))?)
            },
        ),
        row(
            "mapping_written",
            "A store through a shared mapping of a lower file is read by others at once, and kept over a remount.",
            |fill| fill.file("f", [b'o'; 10_000]),
            |at| {
                let file = open_rw(at.path("f"))?;
                let mut map = mapping::shared_mut(&file);
                map[9000] = b'n';
                let other = File::open(at.path("f"))?;
                expect(byte_at(&other, 9000)? == b'n', "stale")?;
                drop((map, file, other));
                at.remount()?;
                expect(byte_at(&File::open(at.path("f"))?, 9000)? == b'n', "lost")
            },
        ),
        row(
            "mapping_sees_writes",
            "A mapping and write(2) of the same file see each other.",
            |fill| fill.file("f", [b'o'; 4096]),
            |at| {
                let file = open_rw(at.path("f"))?;
                let mut map = mapping::shared_mut(&file);
                file.write_all_at(b"n", 7)?;
                expect(map[7] == b'n', "stale")?;
                map[8] = b'm';
                expect(byte_at(&file, 8)? == b'm', "stale")
            },
        ),
        row(
            "mapping_private",
            "A store through a private mapping changes no file and copies none up.",
            |fill| fill.file("f", [b'o'; 4096]),
            |at| {
                let file = File::open(at.path("f"))?;
                let mut map = mapping::private(&file);
                map[0] = b'n';
                expect(byte_at(&file, 0)? == b'o', "changed")?;
                expect(
                    at.peer == crate::place::Peer::Native || !at.upper().join("f").exists(),
                    "copied up",
                )
            },
        ),
    ]
}

fn allocation() -> Vec<Row> {
    vec![
        row(
            "fallocate",
            "fallocate grows a lower file, with FALLOC_FL_KEEP_SIZE only its room.",
            one_file,
            |at| {
                let file = allocate(at, FallocateFlags::FALLOC_FL_KEEP_SIZE, 0, 100_000)?;
                expect(file.metadata()?.size() == 11, "grown")?;
                let file = allocate(at, FallocateFlags::empty(), 0, 100_000)?;
                expect(file.metadata()?.size() == 100_000, "not grown")?;
                expect(file.metadata()?.blocks() * 512 >= 98_304, "no room")
            },
        ),
        row(
            "punch_hole",
            "FALLOC_FL_PUNCH_HOLE makes a hole in a lower file.",
            hundred_pages,
            |at| {
                let flags =
                    FallocateFlags::FALLOC_FL_PUNCH_HOLE | FallocateFlags::FALLOC_FL_KEEP_SIZE;
                let file = allocate(at, flags, 4096, 8192)?;
                expect(
                    byte_at(&file, 5000)? == 0 && byte_at(&file, 4095)? == b'x',
                    "wrong",
                )?;
                expect(lseek(&file, 0, Whence::SeekHole)? == 4096, "no hole")
            },
        ),
        row(
            "zero_range",
            "FALLOC_FL_ZERO_RANGE clears a part of a lower file.",
            hundred_pages,
            |at| {
                let file = allocate(at, FallocateFlags::FALLOC_FL_ZERO_RANGE, 100, 100)?;
                expect(
                    byte_at(&file, 150)? == 0 && byte_at(&file, 200)? == b'x',
                    "wrong",
                )
            },
        ),
        row(
            "collapse_range",
            "FALLOC_FL_COLLAPSE_RANGE takes a part out.",
            hundred_pages,
            |at| {
                let file = allocate(at, FallocateFlags::FALLOC_FL_COLLAPSE_RANGE, 4096, 4096)?;
                expect(file.metadata()?.size() == 99 * 4096, "wrong size")
            },
        ),
        row(
            "insert_range",
            "FALLOC_FL_INSERT_RANGE puts a hole in.",
            hundred_pages,
            |at| {
                let file = allocate(at, FallocateFlags::FALLOC_FL_INSERT_RANGE, 4096, 4096)?;
                expect(file.metadata()?.size() == 101 * 4096, "wrong size")?;
                expect(
                    byte_at(&file, 5000)? == 0 && byte_at(&file, 9000)? == b'x',
                    "wrong",
                )
            },
        ),
        row(
            "seek_hole",
            "SEEK_HOLE and SEEK_DATA find the holes of a lower file, before and after its copy-up.",
            sparse,
            |at| {
                let check = |file: &File| -> Outcome {
                    expect(lseek(file, 0, Whence::SeekHole)? == 4096, "not found")?;
                    let data = i64::try_from(8 * MIB - 4096).unwrap();
                    expect(lseek(file, 4096, Whence::SeekData)? == data, "not found")?;
                    fails(
                        lseek(file, data + 4096, Whence::SeekData),
                        nix::Error::ENXIO,
                    )
                };
                check(&File::open(at.path("f"))?)?;
                let file = open_rw(at.path("f"))?;
                file.write_all_at(b"b", 0)?;
                check(&file)
            },
        ),
        row(
            "holes_kept",
            "A sparse lower file takes no more room after its copy-up.",
            sparse,
            |at| {
                open_rw(at.path("f"))?.write_all_at(b"b", 0)?;
                at.remount()?;
                let m = fs::metadata(at.path("f"))?;
                expect(m.size() == 8 * MIB && m.blocks() * 512 < MIB, "filled")
            },
        ),
        row(
            "blocks",
            "st_blocks of a file that was written shows its room.",
            nothing,
            |at| {
                let mut file = File::create(at.path("f"))?;
                file.write_all(&[1; 100_000])?;
                file.sync_all()?;
                expect(
                    fs::metadata(at.path("f"))?.blocks() * 512 >= 98_304,
                    "not shown",
                )
            },
        ),
    ]
}

fn copying() -> Vec<Row> {
    vec![
        row(
            "copy_file_range",
            "copy_file_range from a lower file into a new one is exact.",
            hundred_pages,
            |at| {
                let (from, to) = (File::open(at.path("f"))?, File::create(at.path("g"))?);
                let mut rest = 100 * 4096;
                while rest > 0 {
                    let copied = rustix::fs::copy_file_range(&from, None, &to, None, rest)?;
                    expect(copied > 0, "short")?;
                    rest -= copied;
                }
                expect(fs::read(at.path("g"))? == [b'x'; 100 * 4096], "wrong")
            },
        ),
        row(
            "copy_between_layers",
            "copy_file_range from one lower file into another keeps the rest of that one.",
            |fill| {
                one_file(fill);
                fill.file_in(1, "g", "G G G");
            },
            |at| {
                let (from, to) = (File::open(at.path("f"))?, open_rw(at.path("g"))?);
                let copied = rustix::fs::copy_file_range(&from, None, &to, Some(&mut 2), 1)?;
                expect(copied == 1, "short")?;
                holds(at.path("g"), "G o G")
            },
        ),
        row(
            "sendfile",
            "sendfile from a lower file is exact.",
            hundred_pages,
            |at| {
                let (from, to) = (File::open(at.path("f"))?, File::create(at.path("g"))?);
                let mut rest = 100 * 4096;
                while rest > 0 {
                    rest -= rustix::fs::sendfile(&to, &from, None, rest)?;
                }
                expect(fs::read(at.path("g"))? == [b'x'; 100 * 4096], "wrong")
            },
        ),
        row(
            "splice",
            "splice from a lower file into a pipe is exact.",
            one_file,
            |at| {
                let (reader, writer) = nix::unistd::pipe()?;
                let file = File::open(at.path("f"))?;
                let flags = rustix::pipe::SpliceFlags::empty();
                rustix::pipe::splice(&file, None, &writer, None, 100, flags)?;
                drop(writer);
                let mut text = String::new();
                File::from(reader).read_to_string(&mut text)?;
                expect(text == "old old old", "wrong")
            },
        ),
    ]
}

fn removed() -> Vec<Row> {
    vec![
        row(
            "unlinked",
            "A removed lower file that is open is read, and shows no link.",
            one_file,
            |at| {
                let mut file = File::open(at.path("f"))?;
                fs::remove_file(at.path("f"))?;
                let mut text = String::new();
                file.read_to_string(&mut text)?;
                expect(
                    text == "old old old" && file.metadata()?.nlink() == 0,
                    "wrong",
                )
            },
        ),
        row(
            "unlinked_written",
            "A removed file that is open is written and read, and takes a mode and attributes.",
            one_file,
            |at| {
                let file = open_rw(at.path("f"))?;
                fs::remove_file(at.path("f"))?;
                file.write_all_at(b"new", 0)?;
                file.set_len(5)?;
                rustix::fs::fsetxattr(&file, "user.x", b"y", rustix::fs::XattrFlags::empty())?;
                file.set_permissions(std::os::unix::fs::PermissionsExt::from_mode(0o600))?;
                let m = file.metadata()?;
                expect((m.size(), m.mode() & 0o7777) == (5, 0o600), "wrong")?;
                let mut text = [0; 5];
                file.read_exact_at(&mut text, 0)?;
                expect(&text == b"new o", "wrong content")
            },
        ),
        row(
            "unlinked_read_then_written",
            "A lower file removed while only a read descriptor is open is reopened by /proc and written.",
            one_file,
            |at| {
                let file = File::open(at.path("f"))?;
                fs::remove_file(at.path("f"))?;
                let path = format!("/proc/self/fd/{}", file.as_raw_fd());
                open_rw(path)?.write_all_at(b"new", 0)?;
                let mut text = [0; 11];
                file.read_exact_at(&mut text, 0)?;
                expect(&text == b"new old old", "stale")?;
                lists(at.root(), &[])
            },
        ),
        row(
            "replaced",
            "A file that another was renamed over stays what it was for whoever has it open.",
            |fill| {
                one_file(fill);
                fill.file_in(1, "g", "other");
            },
            |at| {
                let mut file = open_rw(at.path("f"))?;
                fs::rename(at.path("g"), at.path("f"))?;
                file.write_all(b"new")?;
                expect(file.metadata()?.nlink() == 0, "has a name")?;
                holds(at.path("f"), "other")
            },
        ),
        row(
            "no_leftovers",
            "No .nfs or .fuse_hidden name ever appears, in the mount or in the upper.",
            one_file,
            |at| {
                let files: Vec<File> = (0..20)
                    .map(|n| File::create(at.path(format!("made{n}"))))
                    .collect::<Result<_, _>>()?;
                let lower = open_rw(at.path("f"))?;
                for name in names(at.root())? {
                    fs::remove_file(at.path(name))?;
                }
                lists(at.root(), &[])?;
                if at.peer != crate::place::Peer::Native {
                    let left = names(at.upper())?;
                    expect(left.iter().all(|name| name == "f"), "appears")?;
                }
                drop((files, lower));
                lists(at.root(), &[])
            },
        ),
    ]
}

fn durable() -> Vec<Row> {
    vec![
        row(
            "fsync",
            "fsync and fdatasync of a lower file, of a written one and of directories succeed.",
            |fill| fill.file("d/f", ""),
            |at| {
                File::open(at.path("d/f"))?.sync_all()?;
                File::open(at.path("d"))?.sync_all()?;
                let mut file = open_rw(at.path("d/f"))?;
                file.write_all(b"new")?;
                file.sync_data()?;
                file.sync_all()?;
                Ok(File::open(at.path("d"))?.sync_all()?)
            },
        ),
        row("syncfs", "sync and syncfs succeed.", one_file, |at| {
            fs::write(at.path("g"), "new")?;
            let root = File::open(at.root())?;
            nix::unistd::syncfs(root.as_fd())?;
            Ok(())
        }),
        row(
            "fsync_reaches_upper",
            "What was written through a mapping is in the upper after fsync.",
            |fill| fill.file("f", [b'o'; 4096]),
            |at| {
                let file = open_rw(at.path("f"))?;
                let mut map = mapping::shared_mut(&file);
                map[0] = b'n';
                file.sync_all()?;
                expect(fs::read(at.upper().join("f"))?[0] == b'n', "missing")
            },
        ),
    ]
}
