//! `snapctl mount` and `snapctl umount`: a snapshot at a directory of the user's choice.

use std::fs;
use std::io;
use std::os::unix::ffi::{OsStrExt, OsStringExt};
use std::path::{Path, PathBuf};

use clap::Args;
use nix::mount::{MntFlags, MsFlags, mount as mount2, umount2};

use super::args::name;
use super::client::Client;
use super::error::{Error, Result};
use super::output::{note, report};
use super::snapshot::fetch_mounts;
use crate::grpc::pb::plywood::{InfoSystemRequest, Mount};

/// The type that the kernel shows for a mount of plyfs.
const PLYFS_TYPE: &[u8] = b"fuse.plyfs";

/// Arguments of `mount`.
#[derive(Args, Debug)]
pub struct MountArgs {
    /// Key of the snapshot
    #[arg(value_parser = name())]
    key: String,
    /// The directory to mount it at
    dir: PathBuf,
}

/// Arguments of `umount`.
#[derive(Args, Debug)]
pub struct UmountArgs {
    /// Directories that snapshots are mounted at
    #[arg(required = true, value_name = "DIR")]
    dirs: Vec<PathBuf>,
}

/// Runs `snapctl mount`.
pub async fn mount(args: MountArgs, client: &Client) -> Result<()> {
    let dir = fs::canonicalize(&args.dir).map_err(|error| match error.kind() {
        io::ErrorKind::NotFound => Error::Refused(format!(
            "there is no directory {dir} to mount at; make it first (`mkdir -p {dir}`)",
            dir = args.dir.display()
        )),
        _ => failed("mount at", &args.dir, error),
    })?;
    let mounts = fetch_mounts(args.key.clone(), client).await?;
    for one in &mounts {
        let source = Path::new(&one.source);
        let source = fs::canonicalize(source).unwrap_or_else(|_| source.to_owned());
        if is_mounted(&mount_table()?, &dir, &source).map_err(Error::Refused)? {
            note(&format!(
                "snapctl: {} is mounted at {} already",
                args.key,
                dir.display()
            ));
            return Ok(());
        }
    }
    for (done, one) in mounts.iter().enumerate() {
        if let Err(error) = mount_one(one, &dir) {
            // What was mounted before the failure must not stay.
            for _ in 0..done {
                let _ignored = umount2(&dir, MntFlags::UMOUNT_NOFOLLOW);
            }
            return Err(failed("mount at", &dir, error));
        }
    }
    Ok(())
}

fn mount_one(one: &Mount, dir: &Path) -> io::Result<()> {
    let mut flags = MsFlags::empty();
    let mut data = Vec::new();
    for option in &one.options {
        match option.as_str() {
            "bind" => flags |= MsFlags::MS_BIND,
            "rbind" => flags |= MsFlags::MS_BIND | MsFlags::MS_REC,
            "ro" => flags |= MsFlags::MS_RDONLY,
            "rw" => {}
            other => data.push(other),
        }
    }
    let kind = (!flags.contains(MsFlags::MS_BIND)).then_some(one.r#type.as_str());
    let data = (!data.is_empty()).then(|| data.join(","));
    mount2(Some(one.source.as_str()), dir, kind, flags, data.as_deref())?;
    if flags.contains(MsFlags::MS_BIND | MsFlags::MS_RDONLY) {
        // The kernel ignores the flag when it makes a bind and obeys it when it changes one.
        let none: Option<&str> = None;
        let flags = MsFlags::MS_REMOUNT | MsFlags::MS_BIND | MsFlags::MS_RDONLY;
        if let Err(error) = mount2(none, dir, none, flags, none) {
            let _ignored = umount2(dir, MntFlags::UMOUNT_NOFOLLOW);
            return Err(error.into());
        }
    }
    Ok(())
}

/// Runs `snapctl umount`. Only mounts of this plyd's snapshots are taken away, and never plyd's own
/// ones, which its containers and containerd stand on.
pub async fn umount(args: UmountArgs, client: &Client) -> Result<()> {
    let info = client.system().info(InfoSystemRequest {}).await?;
    let state = PathBuf::from(info.into_inner().state);
    let state = fs::canonicalize(&state).unwrap_or(state);
    let mut ended = Ok(());
    for dir in &args.dirs {
        if let Err(error) = umount_one(dir, &state) {
            report(&error);
            ended = Err(Error::Reported);
        }
    }
    ended
}

fn umount_one(dir: &Path, state: &Path) -> Result<()> {
    let dir = real_path(dir)?;
    let table = mount_table()?;
    if table.iter().all(|line| line.path != dir) {
        fs::symlink_metadata(&dir).map_err(|e| failed("unmount", &dir, e))?;
    }
    may_unmount(&table, &dir, state).map_err(Error::Refused)?;
    umount2(&dir, MntFlags::UMOUNT_NOFOLLOW).map_err(|e| failed("unmount", &dir, e.into()))
}

/// The path without symlinks. Its last part is not looked at: a dead mount there must not fail us.
fn real_path(dir: &Path) -> Result<PathBuf> {
    let (Some(parent), Some(name)) = (dir.parent(), dir.file_name()) else {
        return fs::canonicalize(dir).map_err(|e| failed("unmount", dir, e));
    };
    let parent = if parent.as_os_str().is_empty() {
        Path::new(".")
    } else {
        parent
    };
    let parent = fs::canonicalize(parent).map_err(|e| failed("unmount", dir, e))?;
    Ok(parent.join(name))
}

/// A line of `/proc/self/mountinfo`, see proc(5).
#[derive(Debug, PartialEq, Eq)]
struct MountLine {
    device: Vec<u8>,
    path: PathBuf,
    kind: Vec<u8>,
    /// What plyd mounts names its own place below the state directory here, and every bind of it as well.
    source: PathBuf,
}

fn mount_table() -> Result<Vec<MountLine>> {
    let path = Path::new("/proc/self/mountinfo");
    let table = fs::read(path).map_err(|e| failed("read", path, e))?;
    Ok(parse_mountinfo(&table))
}

fn parse_mountinfo(table: &[u8]) -> Vec<MountLine> {
    table
        .split(|b| *b == b'\n')
        .filter_map(parse_line)
        .collect()
}

fn parse_line(line: &[u8]) -> Option<MountLine> {
    let mut fields = line.split(|b| *b == b' ');
    let device = fields.nth(2)?.to_vec();
    let path = unescape(fields.nth(1)?);
    // Optional fields, as many as there are, end with a dash.
    let mut fields = fields.skip_while(|field| *field != b"-");
    let kind = fields.nth(1)?.to_vec();
    let source = unescape(fields.next()?);
    let to_path = |bytes| PathBuf::from(std::ffi::OsString::from_vec(bytes));
    Some(MountLine {
        device,
        path: to_path(path),
        kind,
        source: to_path(source),
    })
}

/// Undoes the kernel's `\040` for a blank and the like.
fn unescape(field: &[u8]) -> Vec<u8> {
    let mut out = Vec::with_capacity(field.len());
    let mut rest = field;
    while let Some((first, after)) = rest.split_first() {
        let octal = after.get(..3).filter(|_| *first == b'\\');
        let digits = octal.and_then(|octal| std::str::from_utf8(octal).ok());
        match digits.and_then(|digits| u8::from_str_radix(digits, 8).ok()) {
            Some(byte) => {
                out.push(byte);
                rest = &after[3..];
            }
            None => {
                out.push(*first);
                rest = after;
            }
        }
    }
    out
}

/// Whether what lies on top at `dir` is the snapshot's mount at `source` already; why nothing may be
/// mounted there: one snapshot must not hide another, which would come to light when this one is taken
/// away. Any other mount is a directory like any other.
fn is_mounted(table: &[MountLine], dir: &Path, source: &Path) -> Result<bool, String> {
    let at = |path: &Path| table.iter().rev().find(|line| line.path == path);
    let Some(top) = at(dir).filter(|line| line.kind == PLYFS_TYPE) else {
        return Ok(false);
    };
    let shown = dir.display();
    match at(source) {
        Some(own) if own.device == top.device => Ok(true),
        Some(own) if own.source == top.source => Err(format!(
            "{shown} still has the mount of a plyfs that died; take it away with \
             `snapctl umount {shown}`, then repeat this"
        )),
        _ => Err(format!(
            "{shown} has the mount {} already; unmount that first, or name another directory",
            top.source.display()
        )),
    }
}

/// Whether the topmost mount at `dir` is a bind of one that plyd keeps, or kept, below `state`; why not.
fn may_unmount(table: &[MountLine], dir: &Path, state: &Path) -> Result<(), String> {
    let shown = dir.display();
    let Some(top) = table.iter().rev().find(|line| line.path == dir) else {
        return Err(format!("{shown} is not a mount point"));
    };
    if dir.starts_with(state) {
        return Err(format!(
            "{shown} is plyd's own mount; remove its snapshot or container instead"
        ));
    }
    // One whose plyfs has died is not below `state` any more.
    if top.kind != PLYFS_TYPE || !top.source.starts_with(state) {
        return Err(format!(
            "{shown} is not the mount of a snapshot ({} is mounted there); use umount(8)",
            std::ffi::OsStr::from_bytes(&top.kind).to_string_lossy()
        ));
    }
    Ok(())
}

fn failed(action: &'static str, path: &Path, source: io::Error) -> Error {
    Error::File {
        action,
        path: path.to_owned(),
        source,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const TABLE: &[u8] = b"\
21 1 254:0 / / rw,relatime shared:1 - ext4 /dev/vda rw
30 21 0:50 / /run/plywood/mnt/1 rw shared:2 master:1 - fuse.plyfs /run/plywood/mnt/1 rw
31 21 0:50 / /mnt/with\\040blank rw - fuse.plyfs /run/plywood/mnt/1 rw
32 21 0:51 / /mnt/foreign rw - fuse.plyfs x rw
33 21 0:52 / /mnt/tmp rw - tmpfs tmpfs rw
35 21 0:53 / /mnt/dead rw - fuse.plyfs /run/plywood/mnt/gone rw
34 21 0:52 / /mnt/with\\040blank/below rw - tmpfs tmpfs rw
";

    #[test]
    fn only_binds_of_snapshots_are_unmounted() {
        let table = parse_mountinfo(TABLE);
        assert_eq!(table.len(), 7);
        let check = |dir: &str| may_unmount(&table, Path::new(dir), Path::new("/run/plywood"));
        assert_eq!(check("/mnt/with blank"), Ok(()));
        assert_eq!(check("/mnt/dead"), Ok(()));
        assert!(
            check("/run/plywood/mnt/1")
                .unwrap_err()
                .contains("plyd's own")
        );
        assert!(
            check("/mnt/foreign")
                .unwrap_err()
                .contains("not the mount of a snapshot")
        );
        assert!(check("/mnt/tmp").unwrap_err().contains("tmpfs"));
        assert!(check("/mnt").unwrap_err().contains("not a mount point"));
    }

    #[test]
    fn a_snapshot_is_mounted_once_and_hides_no_other() {
        let table = parse_mountinfo(TABLE);
        let check = |dir: &str, source: &str| {
            let source = Path::new("/run/plywood/mnt").join(source);
            is_mounted(&table, Path::new(dir), &source)
        };
        assert_eq!(check("/mnt", "1"), Ok(false));
        assert_eq!(check("/mnt/tmp", "1"), Ok(false));
        assert_eq!(check("/mnt/with blank", "1"), Ok(true));
        let other = check("/mnt/with blank", "2").unwrap_err();
        assert!(other.contains("has the mount /run/plywood/mnt/1 already"));
        // The snapshot has a new mount where the one had been that is bound here.
        let mut text = TABLE.to_vec();
        text.extend_from_slice(
            b"41 21 0:61 / /run/plywood/mnt/gone rw - fuse.plyfs /run/plywood/mnt/gone rw\n",
        );
        let table = parse_mountinfo(&text);
        let gone = Path::new("/run/plywood/mnt/gone");
        let dead = is_mounted(&table, Path::new("/mnt/dead"), gone).unwrap_err();
        assert!(dead.contains("`snapctl umount /mnt/dead`"), "{dead}");
    }

    #[test]
    fn the_topmost_mount_counts() {
        let mut text = TABLE.to_vec();
        text.extend_from_slice(b"40 31 0:60 / /mnt/with\\040blank rw - tmpfs tmpfs rw\n");
        let table = parse_mountinfo(&text);
        assert!(
            may_unmount(
                &table,
                Path::new("/mnt/with blank"),
                Path::new("/run/plywood")
            )
            .is_err()
        );
    }

    #[test]
    fn escapes() {
        assert_eq!(unescape(b"a\\040b\\134"), b"a b\\");
        assert_eq!(unescape(b"a\\04"), b"a\\04");
        assert_eq!(unescape(b"a\\999"), b"a\\999");
    }
}
