//! Paths inside a directory tree that somebody else fills, such as a container's root.
//!
//! A path is resolved as `chroot` would: an absolute symbolic link starts at the tree's root, `..` stops
//! there, and no name leads out of it, whatever is changed meanwhile. It is walked one component at a
//! time with `O_PATH | O_NOFOLLOW`, links are read and followed by hand, and `..` goes back to the
//! descriptor that the walk came from. That is what openat2 with `RESOLVE_IN_ROOT` and
//! `RESOLVE_NO_MAGICLINKS` does, with two differences: it works on every kernel since 2.6.39, and it
//! can say what the resolved path is.
//!
//! Nothing here blocks: a fifo or a device is recognised before it is opened, and refused.

use std::collections::VecDeque;
use std::ffi::{OsStr, OsString};
use std::fs::File;
use std::io::{self, Read};
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::ffi::{OsStrExt, OsStringExt};
use std::path::{Path, PathBuf};

use nix::errno::Errno;
use nix::fcntl::{OFlag, openat, readlinkat};
use nix::sys::stat::{FileStat, Mode, SFlag, fstat, mkdirat};

/// As the kernel's own limit for one path.
const MOST_LINKS: usize = 40;
/// Components that one path may have after its links are followed; bounds the descriptors held.
const MOST_COMPONENTS: usize = 256;

/// Why a path inside a root could not be used. Whoever filled the root reads it, so it says nothing of where
/// that lies on the host.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// The host refused, e.g. because nothing is there.
    #[error("cannot open {path} inside the root: {source}")]
    Io {
        /// The tree.
        root: PathBuf,
        /// The path inside it, as it was asked for.
        path: PathBuf,
        /// What the host said.
        source: io::Error,
    },
    /// It is there, but it is a fifo, a device, a directory or a socket.
    #[error("{path} inside the root is not a regular file")]
    NotRegular {
        /// The tree.
        root: PathBuf,
        /// The path inside it, as it was asked for.
        path: PathBuf,
    },
    /// A symbolic link on the way names something above the root, or by an absolute path something that
    /// is not inside.
    #[error(
        "{path} is a symbolic link that leads out of the root, and is not followed; put a regular file in its place"
    )]
    LeadsOut {
        /// The tree.
        root: PathBuf,
        /// The path inside it, as it was asked for.
        path: PathBuf,
    },
    /// It has more bytes than the caller takes.
    #[error("{path} inside the root has more than {limit} bytes")]
    TooLarge {
        /// The tree.
        root: PathBuf,
        /// The path inside it, as it was asked for.
        path: PathBuf,
        /// What the caller takes.
        limit: u64,
    },
}

impl Error {
    /// Whether the path simply does not exist.
    pub fn is_not_found(&self) -> bool {
        matches!(self, Self::Io { source, .. } if source.kind() == io::ErrorKind::NotFound)
    }
}

/// Result of an operation inside a root.
pub type Result<T, E = Error> = std::result::Result<T, E>;

/// What `path` is inside `root` once every link is followed: absolute, without links, `.` and `..`,
/// with `/` for the root itself. Everything on it exists.
pub fn resolve(root: &Path, path: &Path) -> Result<PathBuf> {
    walk(root, path, None)
        .map(|walk| walk.resolved())
        .map_err(io_error(root, path))
}

/// As [`resolve`], but makes the directories that are missing, with `mode`. What is there already must
/// be directories.
pub fn mkdir_all(root: &Path, path: &Path, mode: u32) -> Result<PathBuf> {
    walk(root, path, Some(Mode::from_bits_truncate(mode)))
        .and_then(|walk| {
            let directory = is(&fstat(walk.last())?, SFlag::S_IFDIR);
            directory.then(|| walk.resolved()).ok_or(Errno::ENOTDIR)
        })
        .map_err(io_error(root, path))
}

/// A descriptor (`O_PATH`) of whatever `path` is inside `root`, links followed, and what it is.
pub fn open_path(root: &Path, path: &Path) -> Result<(OwnedFd, FileStat)> {
    walk(root, path, None)
        .and_then(|walk| {
            let fd = walk.into_last();
            let stat = fstat(&fd)?;
            Ok((fd, stat))
        })
        .map_err(io_error(root, path))
}

/// Opens the regular file `path` inside `root` for reading. Where a link that would lead out of the root
/// leads to nothing inside, that is an error of its own.
pub fn open_file(root: &Path, path: &Path) -> Result<File> {
    let not_regular = || Error::NotRegular {
        root: root.to_owned(),
        path: path.to_owned(),
    };
    let fail = |errno: Errno| io_error(root, path)(errno);
    let mut led_out = false;
    let walk = walk_watched(root, path, None, &mut led_out).map_err(|errno| match errno {
        Errno::ENOENT if led_out => Error::LeadsOut {
            root: root.to_owned(),
            path: path.to_owned(),
        },
        errno => fail(errno),
    })?;
    let found = fstat(walk.last()).map_err(fail)?;
    if !is(&found, SFlag::S_IFREG) {
        return Err(not_regular());
    }
    let (parent, name) = walk.into_parent().ok_or_else(not_regular)?;
    // Between the look and the open the name may have come to mean something else: O_NONBLOCK keeps
    // a fifo from holding us up, and only the very file that was looked at is given out.
    let flags = OFlag::O_RDONLY
        | OFlag::O_NOFOLLOW
        | OFlag::O_NONBLOCK
        | OFlag::O_NOCTTY
        | OFlag::O_CLOEXEC;
    let fd = openat(parent, name.as_os_str(), flags, Mode::empty()).map_err(fail)?;
    let opened = fstat(&fd).map_err(fail)?;
    if (opened.st_dev, opened.st_ino) != (found.st_dev, found.st_ino)
        || !is(&opened, SFlag::S_IFREG)
    {
        return Err(not_regular());
    }
    Ok(File::from(fd))
}

/// The content of the regular file `path` inside `root`, which may have up to `limit` bytes.
pub fn read_limited(root: &Path, path: &Path, limit: u64) -> Result<Vec<u8>> {
    let file = open_file(root, path)?;
    let mut content = Vec::new();
    file.take(limit.saturating_add(1))
        .read_to_end(&mut content)
        .map_err(|source| Error::Io {
            root: root.to_owned(),
            path: path.to_owned(),
            source,
        })?;
    if content.len() as u64 > limit {
        return Err(Error::TooLarge {
            root: root.to_owned(),
            path: path.to_owned(),
            limit,
        });
    }
    Ok(content)
}

fn io_error(root: &Path, path: &Path) -> impl FnOnce(Errno) -> Error + use<> {
    let (root, path) = (root.to_owned(), path.to_owned());
    move |errno| Error::Io {
        root,
        path,
        source: errno.into(),
    }
}

fn is(stat: &FileStat, kind: SFlag) -> bool {
    stat.st_mode & SFlag::S_IFMT.bits() == kind.bits()
}

/// Where a walk has come to: the root, and each component below it.
struct Walk {
    root: OwnedFd,
    below: Vec<(OsString, OwnedFd)>,
}

impl Walk {
    fn last(&self) -> BorrowedFd<'_> {
        match self.below.last() {
            Some((_, fd)) => fd.as_fd(),
            None => self.root.as_fd(),
        }
    }

    fn into_last(mut self) -> OwnedFd {
        match self.below.pop() {
            Some((_, fd)) => fd,
            None => self.root,
        }
    }

    /// The directory that holds the last component, and its name there; `None` at the root.
    fn into_parent(mut self) -> Option<(OwnedFd, OsString)> {
        let (name, _) = self.below.pop()?;
        Some((self.into_last(), name))
    }

    fn resolved(&self) -> PathBuf {
        let mut path = PathBuf::from("/");
        path.extend(self.below.iter().map(|(name, _)| name));
        path
    }
}

fn walk(root: &Path, path: &Path, create: Option<Mode>) -> nix::Result<Walk> {
    walk_watched(root, path, create, &mut false)
}

/// `led_out` tells whether the component at which it failed is one of a link that would have led out of
/// the root: an absolute one, or one with a `..` too many.
fn walk_watched(
    root: &Path,
    path: &Path,
    create: Option<Mode>,
    led_out: &mut bool,
) -> nix::Result<Walk> {
    let directory = OFlag::O_PATH | OFlag::O_DIRECTORY | OFlag::O_CLOEXEC;
    let mut walk = Walk {
        root: nix::fcntl::open(root, directory, Mode::empty())?,
        below: Vec::new(),
    };
    let mut to_do: VecDeque<OsString> = split(path.as_os_str());
    let mut links = 0;
    // How much was left to do when the path led to a link: what is in front of that is of the link.
    let mut behind_link = usize::MAX;
    while let Some(name) = to_do.pop_front() {
        let of_link = to_do.len() >= behind_link;
        *led_out &= of_link;
        if walk.below.len() + to_do.len() >= MOST_COMPONENTS {
            return Err(Errno::ENAMETOOLONG);
        }
        if name == ".." {
            // Like the kernel: only a directory has a parent to go to.
            if !is(&fstat(walk.last())?, SFlag::S_IFDIR) {
                return Err(Errno::ENOTDIR);
            }
            *led_out |= walk.below.pop().is_none() && of_link;
            continue;
        }
        if name == "." {
            if !is(&fstat(walk.last())?, SFlag::S_IFDIR) {
                return Err(Errno::ENOTDIR);
            }
            continue;
        }
        let fd = open_component(walk.last(), &name, create)?;
        if is(&fstat(&fd)?, SFlag::S_IFLNK) {
            links += 1;
            if links > MOST_LINKS {
                return Err(Errno::ELOOP);
            }
            let target = readlinkat(&fd, "")?;
            if !of_link {
                behind_link = to_do.len();
            }
            if target.as_bytes().first() == Some(&b'/') {
                walk.below.clear();
                *led_out = true;
            }
            for part in split(&target).into_iter().rev() {
                to_do.push_front(part);
            }
        } else {
            walk.below.push((name, fd));
        }
    }
    Ok(walk)
}

/// Opens one component without following it; makes it as a directory if it is missing and `create`
/// says so.
fn open_component(
    parent: BorrowedFd<'_>,
    name: &OsStr,
    create: Option<Mode>,
) -> nix::Result<OwnedFd> {
    let flags = OFlag::O_PATH | OFlag::O_NOFOLLOW | OFlag::O_CLOEXEC;
    match (openat(parent, name, flags, Mode::empty()), create) {
        (Err(Errno::ENOENT), Some(mode)) => {
            match mkdirat(parent, name, mode) {
                // Somebody else was faster; what it made is looked at like anything else.
                Ok(()) | Err(Errno::EEXIST) => {}
                Err(errno) => return Err(errno),
            }
            openat(parent, name, flags, Mode::empty())
        }
        (result, _) => result,
    }
}

/// The components; a trailing slash counts as `.`, for it asks for a directory.
fn split(path: &OsStr) -> VecDeque<OsString> {
    let bytes = path.as_bytes();
    let mut parts: VecDeque<OsString> = bytes
        .split(|&byte| byte == b'/')
        .filter(|part| !part.is_empty())
        .map(|part| OsString::from_vec(part.to_vec()))
        .collect();
    if bytes.last() == Some(&b'/') && !parts.is_empty() {
        parts.push_back(OsString::from("."));
    }
    parts
}

#[cfg(test)]
mod tests {
    use std::fs;
    use std::os::unix::fs::symlink;

    use super::*;

    /// A root with `etc/passwd`, beside a secret that must never be reached.
    fn tree() -> (tempfile::TempDir, PathBuf) {
        let tmp = tempfile::tempdir().unwrap();
        let root = tmp.path().join("root");
        fs::create_dir_all(root.join("etc")).unwrap();
        fs::create_dir_all(root.join("usr/bin")).unwrap();
        fs::write(root.join("etc/passwd"), "root:x:0:0::/:/bin/sh\n").unwrap();
        fs::write(tmp.path().join("secret"), "secret").unwrap();
        symlink("usr/bin", root.join("bin")).unwrap();
        (tmp, root)
    }

    fn errno<T: std::fmt::Debug>(result: Result<T>) -> Option<i32> {
        match result {
            Err(Error::Io { source, .. }) => source.raw_os_error(),
            other => panic!("{other:?}"),
        }
    }

    #[test]
    fn links_and_dots_stay_inside_the_root() {
        let (tmp, root) = tree();
        let outside = tmp.path().join("secret");
        symlink(&outside, root.join("absolute")).unwrap();
        symlink("../../../../secret", root.join("dots")).unwrap();
        symlink("/etc/passwd", root.join("usr/bin/inside")).unwrap();
        symlink("/", root.join("top")).unwrap();
        for path in ["absolute", "dots"] {
            let result = read_limited(&root, Path::new(path), 100);
            assert!(matches!(result, Err(Error::LeadsOut { .. })), "{path}");
        }
        symlink("/bin/nothing", root.join("through-a-link")).unwrap();
        let result = read_limited(&root, Path::new("through-a-link"), 100);
        assert!(matches!(result, Err(Error::LeadsOut { .. })));
        symlink("nothing", root.join("inside")).unwrap();
        symlink("/etc", root.join("directory")).unwrap();
        for path in [
            "directory/nothing",
            "inside",
            "../secret",
            "/../secret",
            "top/../secret",
        ] {
            let result = read_limited(&root, Path::new(path), 100);
            assert!(result.unwrap_err().is_not_found(), "{path}");
        }
        for path in [
            "etc/passwd",
            "/etc/passwd",
            "../../etc/passwd",
            "bin/inside",
            "/top/bin/../../etc//./passwd",
        ] {
            let content = read_limited(&root, Path::new(path), 100).unwrap();
            assert!(content.starts_with(b"root:"), "{path}");
            let resolved = resolve(&root, Path::new(path)).unwrap();
            assert_eq!(resolved, Path::new("/etc/passwd"), "{path}");
        }
        assert_eq!(resolve(&root, Path::new("..")).unwrap(), Path::new("/"));
        assert_eq!(
            resolve(&root, Path::new("bin/")).unwrap(),
            Path::new("/usr/bin")
        );
    }

    #[test]
    fn what_is_no_regular_file_is_refused_without_blocking() {
        let (_tmp, root) = tree();
        nix::unistd::mkfifo(&root.join("etc/group"), Mode::from_bits_truncate(0o666)).unwrap();
        symlink("group", root.join("etc/link")).unwrap();
        for path in ["etc/group", "etc/link", "etc", "/"] {
            assert!(
                matches!(
                    open_file(&root, Path::new(path)),
                    Err(Error::NotRegular { .. })
                ),
                "{path}"
            );
        }
    }

    #[test]
    fn loops_files_as_directories_and_large_files_are_refused() {
        let (_tmp, root) = tree();
        symlink("loop", root.join("loop")).unwrap();
        assert_eq!(
            errno(resolve(&root, Path::new("loop/x"))),
            Some(libc::ELOOP)
        );
        for path in [
            "etc/passwd/x",
            "etc/passwd/",
            "etc/passwd/..",
            "etc/passwd/.",
        ] {
            assert_eq!(
                errno(resolve(&root, Path::new(path))),
                Some(libc::ENOTDIR),
                "{path}"
            );
        }
        let deep = "a/".repeat(300);
        assert_eq!(
            errno(mkdir_all(&root, Path::new(&deep), 0o755)),
            Some(libc::ENAMETOOLONG)
        );
        assert!(!root.join("a").exists());
        assert!(matches!(
            read_limited(&root, Path::new("etc/passwd"), 21),
            Err(Error::TooLarge { limit: 21, .. })
        ));
        assert_eq!(
            read_limited(&root, Path::new("etc/passwd"), 22)
                .unwrap()
                .len(),
            22
        );
    }

    #[test]
    fn missing_directories_are_made_inside_the_root_only() {
        let (tmp, root) = tree();
        symlink("/made/by/link", root.join("dangling")).unwrap();
        let made = mkdir_all(&root, Path::new("bin/../new/../../x/y"), 0o700).unwrap();
        assert_eq!(made, Path::new("/x/y"));
        assert_eq!(
            mkdir_all(&root, Path::new("dangling/z"), 0o755).unwrap(),
            Path::new("/made/by/link/z")
        );
        assert!(root.join("made/by/link/z").is_dir());
        assert_eq!(
            errno(mkdir_all(&root, Path::new("etc/passwd"), 0o755)),
            Some(libc::ENOTDIR)
        );
        let names: Vec<_> = fs::read_dir(tmp.path()).unwrap().collect();
        assert_eq!(names.len(), 2);
    }
}
