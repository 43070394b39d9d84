//! Mounting a FUSE file system: /dev/fuse and mount(2) as root, `fusermount3` otherwise.
//!
//! What mount(2) wants in its data is in the kernel's `fs/fuse/inode.c` (`fuse_fs_parameters`); the
//! protocol of `fusermount3` is an environment variable with the number of a Unix socket over which
//! it sends the descriptor back.

use std::ffi::{OsStr, OsString};
use std::fs::{self, File};
use std::io;
use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::os::unix::ffi::{OsStrExt, OsStringExt};
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use nix::fcntl::{FcntlArg, FdFlag, fcntl};
use nix::mount::{MntFlags, MsFlags};
use nix::sys::socket::{AddressFamily, SockFlag, SockType, socketpair};

use super::fd_passing::recv_with_fds;

/// How a mount appears to the host. The defaults are those of a mount by root that is to be a root
/// file system: device nodes and setuid work, everyone may enter, the kernel checks permissions.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct MountOptions {
    /// First column of the mount table.
    pub source: OsString,
    /// What follows `fuse.` in the type column.
    pub subtype: OsString,
    /// Refuse every change with EROFS.
    pub read_only: bool,
    /// Ignore setuid and setgid bits and file capabilities.
    pub nosuid: bool,
    /// Device nodes do not work.
    pub nodev: bool,
    /// Nothing can be executed.
    pub noexec: bool,
    /// Times of last access are never updated.
    pub noatime: bool,
    /// The same for directories alone.
    pub nodiratime: bool,
    /// Writes wait for the disk.
    pub synchronous: bool,
    /// Users other than the mounting one may enter.
    pub allow_other: bool,
    /// Options that the kernel parses itself, as `context=...`.
    pub extra: Vec<OsString>,
}

impl Default for MountOptions {
    fn default() -> Self {
        Self {
            source: "plyfs".into(),
            subtype: "plyfs".into(),
            read_only: false,
            nosuid: false,
            nodev: false,
            noexec: false,
            noatime: false,
            nodiratime: false,
            synchronous: false,
            allow_other: true,
            extra: Vec::new(),
        }
    }
}

/// Why a mount failed.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum MountError {
    /// There is no device.
    #[error(
        "cannot open /dev/fuse: {0}; load the module (`modprobe fuse`), or in a container pass the device (`--device /dev/fuse`)"
    )]
    Device(#[source] io::Error),
    /// There is a device, for others.
    #[error(
        "may not open /dev/fuse: {0}; let this user read and write it (udev's mode for it is 0666), or run as root"
    )]
    Forbidden(#[source] io::Error),
    /// The mount point cannot be used.
    #[error("cannot mount on {path}: {source}; {}", way_out(.source))]
    Target {
        /// The mount point.
        path: PathBuf,
        /// What the host said.
        source: io::Error,
    },
    /// mount(2) refused.
    #[error(
        "mount(2) on {path} failed: {source}; see the kernel's log (`dmesg`) for the option at fault"
    )]
    Mount {
        /// The mount point.
        path: PathBuf,
        /// What the host said.
        source: io::Error,
    },
    /// The set-user-id helper could not be started.
    #[error(
        "not allowed to mount, and `fusermount3` cannot be started: {0}; run as root or install the package fuse3"
    )]
    HelperMissing(#[source] io::Error),
    /// The set-user-id helper refused.
    #[error("fusermount3 could not mount on {path}: {message}")]
    Helper {
        /// The mount point.
        path: PathBuf,
        /// What it printed.
        message: String,
    },
}

/// Mounts on `target` and gives the descriptor over which the kernel speaks. The descriptor is
/// close-on-exec; who hands it to a child duplicates it. The kernel's first request (INIT) lies
/// ready on it when this returns, and whoever touches the mount waits until it is answered.
pub fn mount(target: &Path, options: &MountOptions) -> Result<OwnedFd, MountError> {
    let failed = |source| MountError::Target {
        path: target.to_path_buf(),
        source,
    };
    let metadata = fs::metadata(target).map_err(failed)?;
    if !metadata.is_dir() {
        return Err(failed(io::Error::from_raw_os_error(libc::ENOTDIR)));
    }
    match mount_directly(target, options, metadata.mode()) {
        Err(MountError::Mount { source, .. })
            if source.raw_os_error() == Some(libc::EPERM) && !nix::unistd::geteuid().is_root() =>
        {
            mount_by_helper(target, options)
        }
        result => result,
    }
}

fn mount_directly(target: &Path, options: &MountOptions, mode: u32) -> Result<OwnedFd, MountError> {
    let device = File::options()
        .read(true)
        .write(true)
        .open("/dev/fuse")
        .map_err(|source| match source.kind() {
            io::ErrorKind::PermissionDenied => MountError::Forbidden(source),
            _ => MountError::Device(source),
        })?;
    let mut fstype = OsString::from("fuse.");
    fstype.push(&options.subtype);
    nix::mount::mount(
        Some(options.source.as_os_str()),
        target,
        Some(fstype.as_os_str()),
        flags(options),
        Some(data(options, &device, mode).as_os_str()),
    )
    .map_err(|errno| MountError::Mount {
        path: target.to_path_buf(),
        source: errno.into(),
    })?;
    Ok(device.into())
}

fn flags(options: &MountOptions) -> MsFlags {
    [
        (options.read_only, MsFlags::MS_RDONLY),
        (options.nosuid, MsFlags::MS_NOSUID),
        (options.nodev, MsFlags::MS_NODEV),
        (options.noexec, MsFlags::MS_NOEXEC),
        (options.noatime, MsFlags::MS_NOATIME),
        (options.nodiratime, MsFlags::MS_NODIRATIME),
        (options.synchronous, MsFlags::MS_SYNCHRONOUS),
    ]
    .into_iter()
    .filter(|(wanted, _)| *wanted)
    .fold(MsFlags::empty(), |all, (_, flag)| all | flag)
}

fn data(options: &MountOptions, device: &File, mode: u32) -> OsString {
    let mut data = OsString::from(format!(
        "fd={},rootmode={:o},user_id={},group_id={},default_permissions",
        device.as_raw_fd(),
        mode & libc::S_IFMT,
        nix::unistd::geteuid(),
        nix::unistd::getegid(),
    ));
    if options.allow_other {
        data.push(",allow_other");
    }
    for extra in &options.extra {
        data.push(",");
        data.push(extra);
    }
    data
}

/// The words of `fusermount3 -o`, whose names for the flags are mount(8)'s.
fn helper_words(options: &MountOptions) -> OsString {
    let mut words = OsString::from("default_permissions,fsname=");
    words.push(escaped(&options.source));
    words.push(",subtype=");
    words.push(escaped(&options.subtype));
    let named = [
        (options.allow_other, "allow_other"),
        (options.read_only, "ro"),
        (options.nosuid, "nosuid"),
        (options.nodev, "nodev"),
        (options.noexec, "noexec"),
        (options.noatime, "noatime"),
        (options.nodiratime, "nodiratime"),
        (options.synchronous, "sync"),
    ];
    for (_, name) in named.iter().filter(|(wanted, _)| *wanted) {
        words.push(",");
        words.push(name);
    }
    words
}

/// `fusermount3` splits its words at commas and takes a backslash as escape.
fn escaped(word: &OsStr) -> OsString {
    let mut out = Vec::with_capacity(word.len());
    for &byte in word.as_bytes() {
        if matches!(byte, b',' | b'\\') {
            out.push(b'\\');
        }
        out.push(byte);
    }
    OsString::from_vec(out)
}

fn mount_by_helper(target: &Path, options: &MountOptions) -> Result<OwnedFd, MountError> {
    let refused = |message: String| MountError::Helper {
        path: target.to_path_buf(),
        message,
    };
    if let Some(word) = options.extra.first() {
        let word = word.to_string_lossy();
        return Err(refused(format!(
            "it cannot set {word}; mount as root, or leave that out"
        )));
    }
    let (ours, theirs) = socketpair(
        AddressFamily::Unix,
        SockType::Stream,
        None,
        SockFlag::SOCK_CLOEXEC,
    )
    .map_err(|errno| MountError::HelperMissing(errno.into()))?;
    fcntl(&theirs, FcntlArg::F_SETFD(FdFlag::empty()))
        .map_err(|errno| MountError::HelperMissing(errno.into()))?;
    let output = Command::new("fusermount3")
        .arg("-o")
        .arg(helper_words(options))
        .arg("--")
        .arg(target)
        .env("_FUSE_COMMFD", theirs.as_raw_fd().to_string())
        .stdin(Stdio::null())
        .output()
        .map_err(MountError::HelperMissing)?;
    drop(theirs);
    if !output.status.success() {
        return Err(refused(
            String::from_utf8_lossy(&output.stderr).trim().to_owned(),
        ));
    }
    let (_, fds) =
        recv_with_fds(ours.as_fd(), &mut [0; 16]).map_err(|error| refused(error.to_string()))?;
    fds.into_iter()
        .next()
        .ok_or_else(|| refused("it sent no descriptor".to_owned()))
}

/// Takes the mount away from the name space at once; what is still open on it keeps working until
/// it is closed.
pub fn unmount_lazily(target: &Path) -> io::Result<()> {
    match nix::mount::umount2(target, MntFlags::MNT_DETACH | MntFlags::UMOUNT_NOFOLLOW) {
        Err(nix::errno::Errno::EPERM) if !nix::unistd::geteuid().is_root() => {
            let output = Command::new("fusermount3")
                .args(["-u", "-z", "--"])
                .arg(target)
                .stdin(Stdio::null())
                .output()?;
            if output.status.success() {
                Ok(())
            } else {
                Err(io::Error::other(
                    String::from_utf8_lossy(&output.stderr).trim().to_owned(),
                ))
            }
        }
        result => Ok(result?),
    }
}

/// What to do where a mount point cannot be used.
pub fn way_out(error: &io::Error) -> &'static str {
    match error.raw_os_error() {
        Some(libc::ENOTCONN) => {
            "it has the mount of a server that has ended: take that away with umount(8), then repeat this"
        }
        _ => "name an existing directory",
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_helper_gets_its_words_escaped() {
        let options = MountOptions {
            source: "a,b\\c".into(),
            read_only: true,
            allow_other: false,
            ..MountOptions::default()
        };
        assert_eq!(
            helper_words(&options),
            "default_permissions,fsname=a\\,b\\\\c,subtype=plyfs,ro"
        );
    }

    #[test]
    fn what_the_helper_cannot_pass_on_is_refused_and_not_dropped() {
        let options = MountOptions {
            extra: vec!["context=\"u:r:t:s0\"".into()],
            ..MountOptions::default()
        };
        let error = mount_by_helper(Path::new("/nowhere"), &options).unwrap_err();
        assert!(error.to_string().contains("context="), "{error}");
    }

    #[test]
    fn flags_are_those_that_were_asked_for() {
        let options = MountOptions {
            nodev: true,
            noatime: true,
            ..MountOptions::default()
        };
        assert_eq!(flags(&options), MsFlags::MS_NODEV | MsFlags::MS_NOATIME);
    }

    #[test]
    fn a_target_that_is_no_directory_is_refused_before_anything_is_mounted() {
        let file = tempfile::NamedTempFile::new().unwrap();
        let error = mount(file.path(), &MountOptions::default()).unwrap_err();
        assert!(matches!(error, MountError::Target { .. }), "{error}");
    }
}
