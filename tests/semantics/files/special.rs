//! What is more than content: fifos, sockets, devices, programs that run.

use std::fs::{self, File, Permissions};
use std::io::{Read, Write};
use std::os::unix::fs::{FileTypeExt, MetadataExt};
use std::os::unix::net::{UnixListener, UnixStream};

use nix::fcntl::{OFlag, open};
use nix::sys::stat::{Mode, SFlag, makedev, mknod};

use crate::outcome::{expect, fails};
use crate::row::{Row, row};
use crate::tools::{absent, holds, open_rw};

/// Rows of the chapter on them.
pub fn rows() -> Vec<Row> {
    vec![
        row(
            "fifo",
            "A lower fifo passes data, also after its mode was changed.",
            |fill| {
                nix::unistd::mkfifo(&fill.path(0, "p"), Mode::from_bits_truncate(0o600)).unwrap()
            },
            |at| {
                let perm = std::os::unix::fs::PermissionsExt::from_mode(0o640);
                for _ in 0..2 {
                    let flags = OFlag::O_RDWR;
                    let pipe = open(&at.path("p"), flags, Mode::empty())?;
                    let mut pipe = File::from(pipe);
                    pipe.write_all(b"x")?;
                    let mut byte = [0];
                    pipe.read_exact(&mut byte)?;
                    expect(byte == *b"x", "lost")?;
                    fs::set_permissions(at.path("p"), Permissions::clone(&perm))?;
                }
                Ok(())
            },
        ),
        row(
            "socket",
            "A Unix socket is bound in a lower directory and connected to.",
            |fill| fill.dir("d"),
            |at| {
                // Its path is limited to some hundred bytes.
                std::env::set_current_dir(at.path("d"))?;
                let listener = UnixListener::bind("s")?;
                let mut client = UnixStream::connect("s")?;
                let (mut server, _) = listener.accept()?;
                client.write_all(b"x")?;
                let mut byte = [0];
                server.read_exact(&mut byte)?;
                expect(fs::metadata("s")?.file_type().is_socket(), "wrong type")
            },
        ),
        row(
            "devices",
            "Device nodes of a lower keep type and numbers over copy-up and rename, and work.",
            |fill| {
                let mode = Mode::from_bits_truncate(0o666);
                for (name, kind, device) in [
                    ("null", SFlag::S_IFCHR, makedev(1, 3)),
                    ("far", SFlag::S_IFBLK, makedev(300, 70_000)),
                ] {
                    mknod(&fill.path(0, name), kind, mode, device).unwrap();
                }
            },
            |at| {
                for (name, device) in [("null", makedev(1, 3)), ("far", makedev(300, 70_000))] {
                    std::os::unix::fs::chown(at.path(name), Some(1), Some(1))?;
                    fs::rename(at.path(name), at.path(format!("{name}2")))?;
                    expect(
                        fs::metadata(at.path(format!("{name}2")))?.rdev() == device,
                        "wrong",
                    )?;
                    absent(at.path(name))?;
                }
                fs::write(at.path("null2"), "gone")?;
                holds(at.path("null2"), "")
            },
        ),
        row(
            "program",
            "A lower program runs, is written to by none meanwhile (ETXTBSY), and changes afterwards.",
            |fill| {
                fs::copy("/bin/sleep", fill.path(0, "sleep")).unwrap();
            },
            |at| {
                let mut child = std::process::Command::new(at.path("sleep"))
                    .arg("60")
                    .spawn()?;
                let tried = open_rw(at.path("sleep"));
                child.kill()?;
                child.wait()?;
                fails(tried, nix::Error::ETXTBSY)?;
                open_rw(at.path("sleep"))?;
                Ok(())
            },
        ),
        row(
            "program_cut_off",
            "Nor does an open with O_TRUNC for reading cut a running program off (ETXTBSY); once it has ended, it does.",
            |fill| {
                fs::copy("/bin/sleep", fill.path(0, "sleep")).unwrap();
            },
            |at| {
                let path = at.path("sleep");
                let whole = fs::metadata(&path)?.len();
                for _ in 0..20 {
                    let mut child = std::process::Command::new(&path).arg("60").spawn()?;
                    let tried = open(&path, OFlag::O_TRUNC, Mode::empty());
                    let length = fs::metadata(&path)?.len();
                    let runs = child.try_wait()?.is_none();
                    child.kill()?;
                    child.wait()?;
                    fails(tried, nix::Error::ETXTBSY)?;
                    expect(length == whole, "cut off")?;
                    expect(runs, "the program has ended")?;
                }
                open(&path, OFlag::O_TRUNC, Mode::empty())?;
                holds(path, "")
            },
        ),
    ]
}
