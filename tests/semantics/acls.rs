//! Access control lists, a part of the chapter on metadata.

use std::fs::{self, File, Permissions};
use std::io::Write;
use std::os::unix::fs::{FileExt, OpenOptionsExt, PermissionsExt, symlink};
use std::path::Path;
use std::process::Command;

use nix::sys::stat::umask;

use crate::metadata::{one_file, set_mode};
use crate::outcome::{Outcome, expect, fails};
use crate::row::{Row, row};
use crate::tools::{USER, as_user, mode, open_rw};

fn run(program: &str, arguments: &[&str], path: &Path) -> Outcome {
    let output = Command::new(program).args(arguments).arg(path).output()?;
    let why = String::from_utf8_lossy(&output.stderr).into_owned();
    eprint!("{why}");
    expect(output.status.success(), &format!("{program} fails"))
}

/// The rows.
pub fn rows() -> Vec<Row> {
    vec![
        row(
            "acl_enforced",
            "An access control list set on a lower file lets in whom it names, and chmod takes it back.",
            |fill| {
                one_file(fill);
                set_mode(&fill.path(0, "d/f"), 0o600);
            },
            |at| {
                run("setfacl", &["-m", "u:1234:rw"], &at.path("d/f"))?;
                as_user(USER, || open_rw(at.path("d/f")))?;
                fs::set_permissions(at.path("d/f"), Permissions::from_mode(0o600))?;
                fails(
                    as_user(USER, || open_rw(at.path("d/f"))),
                    nix::Error::EACCES,
                )
            },
        ),
        row(
            "acl_kept_by_copy_up",
            "The list of a lower file is enforced before and after its copy-up.",
            |fill| {
                one_file(fill);
                set_mode(&fill.path(0, "d/f"), 0o600);
                run("setfacl", &["-m", "u:1234:rw"], &fill.path(0, "d/f")).unwrap();
            },
            |at| {
                as_user(USER, || open_rw(at.path("d/f"))?.write_all_at(b"new", 0))?;
                as_user(USER, || open_rw(at.path("d/f")))?;
                let other = as_user(USER + 1, || open_rw(at.path("d/f")));
                fails(other, nix::Error::EACCES)
            },
        ),
        row(
            "acl_inherited",
            "New files and directories inherit the default list of a lower directory; the umask is left out.",
            |fill| {
                fill.dir("d");
                run("setfacl", &["-m", "d:u:1234:rwx"], &fill.path(0, "d")).unwrap();
            },
            |at| {
                umask(nix::sys::stat::Mode::from_bits_truncate(0o077));
                let mut options = File::options();
                let mut file = options
                    .write(true)
                    .create_new(true)
                    .mode(0o666)
                    .open(at.path("d/f"))?;
                file.write_all(b"new")?;
                fs::create_dir(at.path("d/sub"))?;
                as_user(USER, || open_rw(at.path("d/f")))?;
                as_user(USER, || fs::write(at.path("d/sub/f"), ""))?;
                expect(mode(at.path("d/f"))? == 0o664, "wrong mode")
            },
        ),
        row(
            "acl_of_made_over_whiteout",
            "The same of a file made where a lower one was removed.",
            |fill| {
                one_file(fill);
                run("setfacl", &["-m", "d:u:1234:rwx"], &fill.path(0, "d")).unwrap();
            },
            |at| {
                fs::remove_file(at.path("d/f"))?;
                let mut options = File::options();
                options
                    .write(true)
                    .create_new(true)
                    .mode(0o666)
                    .open(at.path("d/f"))?;
                as_user(USER, || open_rw(at.path("d/f")).map(drop))?;
                expect(mode(at.path("d/f"))? == 0o664, "wrong mode")
            },
        ),
        row(
            "acl_not_of_links",
            "A symbolic link made there inherits nothing, and what it points to keeps its mode.",
            |fill| {
                one_file(fill);
                fill.file("g", "");
                run("setfacl", &["-m", "d:u:1234:rwx"], &fill.path(0, "d")).unwrap();
            },
            |at| {
                let inside = at.path("g");
                let outside = at.host().join("outside");
                fs::write(&outside, "")?;
                for target in [&inside, &outside] {
                    set_mode(target, 0o600);
                    fs::remove_file(at.path("d/f"))?;
                    symlink(target, at.path("d/f"))?;
                    expect(mode(target)? == 0o600, "mode of the target")?;
                    expect(fs::read_link(at.path("d/f"))? == *target, "wrong target")?;
                }
                Ok(())
            },
        ),
        row(
            "acl_removed_twice",
            "Removing an ACL that is not there succeeds, and so does setting one without entries.",
            one_file,
            |at| {
                for (name, path) in [
                    ("system.posix_acl_access", "d/f"),
                    ("system.posix_acl_access", "d"),
                    ("system.posix_acl_default", "d"),
                ] {
                    xattr::remove(at.path(path), name)?;
                    xattr::set(at.path(path), name, &2u32.to_le_bytes())?;
                }
                Ok(())
            },
        ),
    ]
}
