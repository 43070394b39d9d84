//! Opening a union: what the directories must be, and the locking of those that it writes to.

use std::ffi::{OsStr, OsString};
use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64};
use std::time::{Duration, Instant};

use nix::errno::Errno;
use parking_lot::{Mutex, RwLock};

use super::adopt;
use super::attr::attr_of;
use super::chunks::{Maps, features_of_others};
use super::dir_lower::DirLower;
use super::error::OpenError;
use super::fdcache::Budget;
use super::foreign_index::ForeignIndex;
use super::lower::Lower;
use super::node::{LowerAt, Node, Place, Table};
use super::number::Numbers;
use super::seal::Root;
use super::types::{Chunking, FileKind, NodeId, UnionConfig, UpperConfig, XattrFamily};
use super::union::Union;
use super::upper::{Upper, makes_nameless, remove_tree};
use super::view_lower::ViewLower;
use crate::store::view::Verify;
use crate::sys::fs::{self, Object};
use crate::sys::{dirents, mountinfo, xattr};

/// In the work directory: somebody waits for it.
pub(super) const WANTED: &str = "plywood.wanted";
/// How long a directory is waited for that is in use.
pub(super) const PATIENCE: Duration = Duration::from_secs(3);

/// Kernel overlayfs's mark of an upper that it has never synced, in `work/incompat`.
const VOLATILE: &str = "volatile";

/// A directory of the configuration, for telling overlaps.
struct Given {
    role: &'static str,
    path: PathBuf,
    real: PathBuf,
}

impl Given {
    fn new(role: &'static str, path: &Path) -> Self {
        Self {
            role,
            path: path.to_owned(),
            real: std::fs::canonicalize(path).unwrap_or_else(|_| path.to_owned()),
        }
    }

    fn overlaps(&self, other: &Self) -> bool {
        self.real.starts_with(&other.real) || other.real.starts_with(&self.real)
    }
}

impl Union {
    /// Checks the directories, locks those that it writes to and opens the layers. Any number of unions
    /// may be open in one process: each keeps few descriptors.
    pub fn open(config: UnionConfig) -> Result<Self, OpenError> {
        const FEW: u64 = 128;
        Self::open_keeping(config, FEW)
    }

    /// As `open`, keeping at most `limit` descriptors open (more if the lowers are as many), and half as many again of removed files.
    /// Those that operations hold while they run come on top.
    pub fn open_keeping(config: UnionConfig, limit: u64) -> Result<Self, OpenError> {
        if config.lowers.is_empty() && config.view.is_none() && config.upper.is_none() {
            return Err(OpenError::NoLayer);
        }
        const LEAST: u64 = 32;
        // Every lower keeps one for good.
        let limit = limit.saturating_sub(config.lowers.len() as u64).max(LEAST);
        let budget = Budget::new(usize::try_from(limit).unwrap_or(usize::MAX));
        let family = config.xattr_family;
        for path in &config.lowers {
            check_directory(
                path,
                |path, source| OpenError::Lower { path, source },
                |path| OpenError::LowerNotDirectory { path },
            )?;
        }
        let mut lowers: Vec<Box<dyn Lower>> = Vec::new();
        let work = config.lower_work.as_deref();
        let opened = DirLower::open_all(&config.lowers, work, family, &budget);
        let mut index_of_others = None;
        for (path, opened) in config.lowers.iter().zip(opened) {
            let failed = |source| OpenError::Lower {
                path: path.clone(),
                source,
            };
            let lower = opened.map_err(failed)?;
            if let Some(index) = lower.index().filter(|_| lowers.is_empty()) {
                index_of_others = Some(ForeignIndex::open(index).map_err(failed)?);
            }
            lowers.push(Box::new(lower));
        }
        if let Some(view) = &config.view {
            let opened = ViewLower::open(Arc::clone(view), family);
            lowers.push(Box::new(opened.map_err(|error| OpenError::View {
                path: view.path().to_owned(),
                problem: error.to_string(),
            })?));
        }
        let upper = match &config.upper {
            Some(upper) => Some(open_upper(upper, &config, limit)?),
            None => None,
        };
        let numbers = Numbers::new(
            upper
                .iter()
                .map(|upper| upper.dev)
                .chain(lowers.iter().map(|lower| lower.number_space())),
        );
        let origin_numbers = lowers.iter().any(|lower| !lower.decodes_origins());
        let table = Table::new();
        let union = Self {
            family,
            owners: config.owners.clone(),
            stat_override: upper.as_ref().and_then(|upper| upper.stat_override),
            static_nlink: config.static_nlink,
            no_xattrs: config.no_xattrs,
            volatile: config.volatile,
            no_acl: config.no_acl.into(),
            quiet: config.quiet,
            // Its readers with owners in attributes know no such files.
            no_metacopy: config.no_metacopy
                || upper
                    .as_ref()
                    .is_some_and(|upper| upper.stat_override.is_some()),
            chunking: match &upper {
                Some(upper) if upper.stat_override.is_some() => Chunking::OFF,
                _ => config.chunking,
            },
            verifies_each_open: config
                .view
                .as_ref()
                .is_some_and(|view| view.when_verified() == Verify::Always),
            refreshes: AtomicU64::new(0),
            origin_numbers,
            numbers,
            table,
            budget,
            rename_lock: Mutex::new(()),
            busy: Mutex::default(),
            busy_count: std::sync::atomic::AtomicUsize::new(0),
            on_side_effect: std::sync::OnceLock::new(),
            lowers,
            reads_upper: config.lower_work.is_some(),
            index_of_others,
            upper,
        };
        union.add_root(&config)?;
        Ok(union)
    }

    fn add_root(&self, config: &UnionConfig) -> Result<(), OpenError> {
        let mut place = Place::default();
        let mut stack = Vec::new();
        let mut opaque = false;
        if let (Some(upper), Some(given)) = (&self.upper, &config.upper) {
            let failed = |errno: Errno| OpenError::Upper {
                path: given.dir.clone(),
                source: errno.into(),
            };
            let (root, _) = upper.root.get();
            let object = Object::Open(root.as_fd());
            place.upper = Some(object.stat().map_err(failed)?.st_ino);
            opaque = xattr::get(object, self.family.opaque()).is_ok_and(|value| value == b"y");
        }
        for (layer, lower) in self.lowers.iter().enumerate() {
            if opaque {
                break;
            }
            let object = lower.root();
            let marks = object.marks().map_err(|error| OpenError::Lower {
                path: config.lowers.get(layer).cloned().unwrap_or_default(),
                source: io::Error::from_raw_os_error(error.errno),
            })?;
            opaque = marks.opaque;
            stack.push(LowerAt { layer, object });
        }
        place.lowers = stack.into();
        let generation = self.table.next_generation();
        let root = Node::new(NodeId::ROOT, generation, FileKind::Directory, place);
        let added = self.table.insert(root);
        debug_assert!(added.is_ok(), "the table is empty before the root");
        Ok(())
    }
}

fn check_directory(
    path: &Path,
    missing: impl FnOnce(PathBuf, io::Error) -> OpenError,
    other: impl FnOnce(PathBuf) -> OpenError,
) -> Result<(), OpenError> {
    match std::fs::metadata(path) {
        Ok(found) if found.is_dir() => Ok(()),
        Ok(_) => Err(other(path.to_owned())),
        Err(source) => Err(missing(path.to_owned(), source)),
    }
}

fn open_upper(given: &UpperConfig, config: &UnionConfig, limit: u64) -> Result<Upper, OpenError> {
    let UpperConfig { dir, work } = given;
    let (family, form) = (config.xattr_family, config.stat_override);
    check_directory(
        dir,
        |path, source| OpenError::Upper { path, source },
        |path| OpenError::UpperNotDirectory { path },
    )?;
    check_directory(
        work,
        |path, source| OpenError::Work { path, source },
        |path| OpenError::WorkNotDirectory { path },
    )?;
    check_overlaps(given, &config.lowers)?;
    let upper_failed = |errno: Errno| OpenError::Upper {
        path: dir.clone(),
        source: errno.into(),
    };
    let work_failed = |errno: Errno| OpenError::Work {
        path: work.clone(),
        source: errno.into(),
    };
    let flags = libc::O_RDONLY | libc::O_DIRECTORY;
    let root = fs::open_path(dir, flags).map_err(upper_failed)?;
    let base = fs::open_path(work, flags).map_err(work_failed)?;
    let dev = fs::fstat(root.as_fd()).map_err(upper_failed)?.st_dev;
    if dev != fs::fstat(base.as_fd()).map_err(work_failed)?.st_dev {
        return Err(OpenError::DifferentFileSystems {
            upper: dir.clone(),
            work: work.clone(),
        });
    }
    lock(base.as_fd()).map_err(|errno| match errno {
        Errno::EWOULDBLOCK => OpenError::WorkInUse { path: work.clone() },
        errno => work_failed(errno),
    })?;
    // The work directory alone would not tell two unions with one each: what one writes the other's caches never see.
    wait_for_lock(root.as_fd(), || false).map_err(|errno| match errno {
        Errno::EWOULDBLOCK => OpenError::UpperInUse { path: dir.clone() },
        errno => upper_failed(errno),
    })?;
    check_overlays(given, root.as_fd(), base.as_fd())?;
    let scratch = subdirectory(base.as_fd(), "work").map_err(|errno| match errno {
        Errno::EROFS => OpenError::UpperReadOnly {
            path: dir.clone(),
            source: errno.into(),
        },
        errno => work_failed(errno),
    })?;
    let features = features_of_others(scratch.as_fd()).map_err(work_failed)?;
    check_features(given, &features, config.volatile)?;
    let index = subdirectory(base.as_fd(), "index").map_err(work_failed)?;
    clear(scratch.as_fd()).map_err(work_failed)?;
    let scratch = Arc::new(scratch);
    let indexed = tidy_index(index.as_fd(), family).map_err(work_failed)?;
    let place = adopt::Place {
        root: root.as_fd(),
        base: base.as_fd(),
        scratch: scratch.as_fd(),
        family,
    };
    let form = adopt::adopt(&place, form).map_err(|errno| match errno {
        Errno::EROFS => OpenError::UpperReadOnly {
            path: dir.clone(),
            source: errno.into(),
        },
        errno => OpenError::NoXattr {
            path: dir.clone(),
            prefix: family.prefix(),
            source: errno.into(),
        },
    })?;
    let metacopies = xattr::get(Object::Open(root.as_fd()), family.metacopies()).is_ok();
    Ok(Upper {
        root: Root::new(dir.clone(), root),
        dev,
        gives_way: AtomicBool::new(false),
        maps: Maps::open(&scratch).map_err(work_failed)?,
        nameless: makes_nameless(scratch.as_fd()),
        work: scratch,
        index: Arc::new(index),
        indexed: AtomicBool::new(indexed),
        base,
        next_name: AtomicU64::new(0),
        orphan_fds: AtomicU64::new(0),
        orphan_fd_limit: limit / 2,
        clones: AtomicBool::new(true),
        metacopies: AtomicBool::new(metacopies),
        device_whiteouts: AtomicBool::new(true),
        stat_override: form,
        modes: RwLock::default(),
        lends: AtomicBool::new(!nix::unistd::geteuid().is_root()),
    })
}

/// Locks the work directory. A server that is only completing files gives way. One that cannot be asked is waited for.
fn lock(work: BorrowedFd<'_>) -> Result<(), Errno> {
    let name = OsStr::new(WANTED);
    let result = wait_for_lock(work, || {
        let flags = libc::O_CREAT | libc::O_WRONLY;
        if let Err(errno) = fs::openat(work, name, flags, 0o600) {
            tracing::debug!(%errno, "the user of a work directory cannot be asked for it");
        }
        is_ending(work)
    });
    match fs::unlinkat(work, name) {
        Ok(()) | Err(Errno::ENOENT) => {}
        Err(errno) => tracing::debug!(%errno, "the request for a work directory stays"),
    }
    result
}

/// Locks a directory, and calls `ask` whenever it is not to be had. The server of a mount that has just been unmounted
/// may need a moment to end; one of which `ask` says that it has begun to is waited for however long it takes.
fn wait_for_lock(dir: BorrowedFd<'_>, ask: impl Fn() -> bool) -> Result<(), Errno> {
    let mut deadline = Instant::now() + PATIENCE;
    loop {
        match fs::try_lock(dir) {
            Err(Errno::EWOULDBLOCK) if Instant::now() < deadline => {
                if ask() {
                    deadline = Instant::now() + PATIENCE;
                }
                std::thread::sleep(Duration::from_millis(20));
            }
            result => return result,
        }
    }
}

/// Whether a lock tells that the user of a work directory only ends. Shared, so that those who look are none to each other.
pub(super) fn is_ending(base: BorrowedFd<'_>) -> bool {
    let flags = libc::O_RDONLY | libc::O_DIRECTORY;
    fs::openat(base, OsStr::new("work"), flags, 0)
        .is_ok_and(|work| fs::try_lock_shared(work.as_fd()) == Err(Errno::EWOULDBLOCK))
}

impl Union {
    /// Says that the mount is gone and only the upper is seen to: whoever opens these directories waits until this union is
    /// gone, too.
    pub fn ends(&self) {
        if let Some(upper) = &self.upper
            // Whoever looks at it has it for an instant.
            && let Err(errno) = fs::lock(upper.work())
        {
            tracing::debug!(%errno, "who waits for the work directory cannot be told to go on");
        }
    }
}

fn check_overlaps(given: &UpperConfig, lowers: &[PathBuf]) -> Result<(), OpenError> {
    let upper = Given::new("upper", &given.dir);
    let work = Given::new("work", &given.work);
    let lowers = lowers.iter().map(|path| Given::new("lower", path));
    let mut pairs = vec![];
    for lower in lowers {
        for writable in [&upper, &work] {
            if writable.overlaps(&lower) {
                return Err(overlap(writable, &lower));
            }
        }
        pairs.push(lower);
    }
    if upper.overlaps(&work) {
        return Err(overlap(&upper, &work));
    }
    Ok(())
}

fn overlap(a: &Given, b: &Given) -> OpenError {
    OpenError::Overlap {
        a_role: a.role,
        a: a.path.clone(),
        b_role: b.role,
        b: b.path.clone(),
    }
}

/// Refuses what a mount of kernel overlayfs writes to, which no lock tells of.
fn check_overlays(
    given: &UpperConfig,
    root: BorrowedFd<'_>,
    base: BorrowedFd<'_>,
) -> Result<(), OpenError> {
    let named = match mountinfo::overlay_directories() {
        Ok(named) => named,
        Err(error) => {
            tracing::warn!(%error, "cannot look whether kernel overlayfs uses the upper directory");
            return Ok(());
        }
    };
    let is_one = |dir: BorrowedFd<'_>| {
        fs::fstat(dir).is_ok_and(|ours| {
            let same =
                |stat: std::fs::Metadata| (stat.dev(), stat.ino()) == (ours.st_dev, ours.st_ino);
            // Where whoever mounted it was elsewhere the name says nothing.
            let mut named = named.iter().filter(|path| path.is_absolute());
            named.any(|path| std::fs::metadata(path).is_ok_and(same))
        })
    };
    if is_one(root) {
        return Err(OpenError::UpperInUse {
            path: given.dir.clone(),
        });
    }
    if is_one(base) {
        return Err(OpenError::WorkInUse {
            path: given.work.clone(),
        });
    }
    Ok(())
}

/// Refuses an upper that is not to be used without a feature that is not ours.
fn check_features(
    given: &UpperConfig,
    features: &[OsString],
    volatile: bool,
) -> Result<(), OpenError> {
    let is_mark = |feature: &OsString| feature == VOLATILE;
    if let Some(feature) = features.iter().find(|feature| !is_mark(feature)) {
        return Err(OpenError::UnknownFeature {
            work: given.work.clone(),
            feature: feature.to_string_lossy().into_owned(),
        });
    }
    if !volatile && features.iter().any(is_mark) {
        return Err(OpenError::Volatile {
            upper: given.dir.clone(),
            mark: given.work.join("work/incompat").join(VOLATILE),
        });
    }
    Ok(())
}

fn subdirectory(base: BorrowedFd<'_>, name: &str) -> Result<OwnedFd, Errno> {
    let name = OsStr::new(name);
    match fs::mkdirat(base, name, 0o700) {
        Ok(()) | Err(Errno::EEXIST) => {}
        Err(errno) => return Err(errno),
    }
    fs::openat(base, name, libc::O_RDONLY | libc::O_DIRECTORY, 0)
}

fn names(dir: BorrowedFd<'_>) -> Result<Vec<OsString>, Errno> {
    let mut names = Vec::new();
    dirents::read_all(dir, &mut |entry| names.push(entry.name.to_owned()))?;
    Ok(names)
}

/// Removes what an earlier mount has left behind.
fn clear(work: BorrowedFd<'_>) -> Result<(), Errno> {
    for name in names(work)? {
        if name != adopt::OURS && !Maps::is_place(&name) {
            remove_tree(work, &name);
        }
    }
    Ok(())
}

/// Removes index entries whose copy never got a name; answers whether any is left.
fn tidy_index(index: BorrowedFd<'_>, family: XattrFamily) -> Result<bool, Errno> {
    let mut left = false;
    for name in names(index)? {
        let object = Object::Entry(index, &name);
        let stat = object.stat()?;
        let file = stat.st_mode & libc::S_IFMT != libc::S_IFDIR;
        let stored = xattr::get(object, family.nlink()).ok();
        if file && super::index::is_dead(stored.as_deref(), attr_of(&stat).nlink) {
            fs::unlinkat(index, &name)?;
        } else {
            left = true;
        }
    }
    Ok(left)
}
