//! Runs operations on a mounted tree by real system calls.
//!
//! A thread of its own takes the mount for its root directory, so that absolute symlinks and `..` stay
//! inside as in the model; and because the caller waits with a deadline, a file system that hangs fails
//! a test instead of hanging it.

use std::collections::BTreeMap;
use std::ffi::CStr;
use std::fs::File;
use std::io::Read;
use std::mem::MaybeUninit;
use std::os::fd::OwnedFd;
use std::os::unix::fs::FileExt;
use std::panic::{AssertUnwindSafe, catch_unwind, resume_unwind};
use std::path::{Path as HostPath, PathBuf};
use std::sync::mpsc;
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use rustix::fs::{
    AtFlags, CWD, FallocateFlags, FileType, Gid, Mode, OFlags, RawDir, RenameFlags, Stat, Timespec,
    Timestamps, Uid, XattrFlags,
};
use rustix::io::Errno;

use crate::ops::{How, MtimeChange, Op, Outcome, SLOTS, XattrHow};
use crate::tree::{Facts, Item, Kind, Path, Snapshot, Time, show};

/// Longer than any operation takes on the busiest machine; only a hang gets here.
const DEADLINE: Duration = Duration::from_secs(120);

type Job = Box<dyn FnOnce(&mut Slots) + Send>;
pub type Slots = Vec<Option<File>>;

/// A thread whose root directory is `root`.
pub struct Jail {
    jobs: Option<mpsc::Sender<Job>>,
    thread: Option<JoinHandle<()>>,
    root: PathBuf,
}

impl Jail {
    pub fn enter(root: &HostPath) -> Self {
        let (jobs, inbox) = mpsc::channel::<Job>();
        let (entered, has_entered) = mpsc::channel();
        let path = root.to_owned();
        let thread = std::thread::spawn(move || {
            let outside = File::open("/").unwrap();
            nix::sched::unshare(nix::sched::CloneFlags::CLONE_FS).unwrap();
            nix::unistd::chroot(&path).unwrap();
            nix::unistd::chdir("/").unwrap();
            nix::sys::stat::umask(nix::sys::stat::Mode::empty());
            entered.send(()).unwrap();
            let mut slots: Slots = (0..SLOTS).map(|_| None).collect();
            for job in inbox {
                job(&mut slots);
            }
            drop(slots);
            // Leave the mount before anyone waits for this thread, so that it can be unmounted.
            nix::unistd::fchdir(&outside).unwrap();
            nix::unistd::chroot(".").unwrap();
        });
        has_entered
            .recv_timeout(DEADLINE)
            .expect("cannot enter the mount");
        Self {
            jobs: Some(jobs),
            thread: Some(thread),
            root: root.to_owned(),
        }
    }

    /// Runs `job` inside and waits for it, up to the deadline.
    pub fn run<T: Send + 'static>(&self, job: impl FnOnce(&mut Slots) -> T + Send + 'static) -> T {
        let (answer, answered) = mpsc::channel();
        let job: Job = Box::new(move |slots| {
            let _ = answer.send(catch_unwind(AssertUnwindSafe(|| job(slots))));
        });
        self.jobs
            .as_ref()
            .unwrap()
            .send(job)
            .expect("the jail's thread goes on until it is dropped");
        match answered.recv_timeout(DEADLINE) {
            Ok(Ok(value)) => value,
            Ok(Err(panic)) => resume_unwind(panic),
            Err(_) => {
                crate::mounts::abort(&self.root);
                panic!("no answer from {} within {DEADLINE:?}", self.root.display())
            }
        }
    }

    pub fn perform(&self, op: &Op) -> Outcome {
        let op = op.clone();
        self.run(move |slots| {
            perform(slots, &op).unwrap_or_else(|errno| Outcome::Errno(errno.raw_os_error()))
        })
    }

    pub fn snapshot(&self) -> (Snapshot, Vec<Oddity>) {
        self.run(|_| snapshot())
    }
}

impl Drop for Jail {
    fn drop(&mut self) {
        self.jobs.take();
        if let Some(thread) = self.thread.take() {
            // After a hang it may never end; whoever unmounts will say so.
            let start = Instant::now();
            while !thread.is_finished() && start.elapsed() < DEADLINE {
                std::thread::sleep(Duration::from_micros(100));
            }
        }
    }
}

type Result<T> = std::result::Result<T, Errno>;

fn io(error: std::io::Error) -> Errno {
    Errno::from_raw_os_error(error.raw_os_error().unwrap_or(libc::EIO))
}

fn perform(slots: &mut Slots, op: &Op) -> Result<Outcome> {
    // Under a model every slot that is used is open; under stress nobody knows.
    let needs_open = op.slots();
    if needs_open.iter().any(|slot| slots[*slot].is_none()) {
        return Ok(Outcome::Skip);
    }
    let file = |slot: &usize| slots[*slot].as_ref().expect("was looked at");
    let at = |path: &Path| show(path);
    let follow = |follow: &bool| {
        if *follow {
            AtFlags::empty()
        } else {
            AtFlags::SYMLINK_NOFOLLOW
        }
    };
    match op {
        Op::Open {
            slot,
            path,
            flags,
            mode,
        } => {
            slots[*slot] = None;
            let flags =
                OFlags::from_bits_retain(u32::try_from(flags.bits()).unwrap()) | OFlags::NONBLOCK;
            // Or the server of another mount would keep this one busy.
            let flags = flags | OFlags::CLOEXEC;
            slots[*slot] =
                Some(rustix::fs::open(at(path), flags, Mode::from_raw_mode(*mode))?.into());
        }
        Op::Close { slot } => slots[*slot] = None,
        Op::Read { slot, offset, len } => {
            let mut buf = vec![0; *len];
            let mut done = 0;
            loop {
                let got = file(slot)
                    .read_at(&mut buf[done..], offset + done as u64)
                    .map_err(io)?;
                done += got;
                if got == 0 || done == *len {
                    break;
                }
            }
            buf.truncate(done);
            return Ok(Outcome::Data(buf));
        }
        Op::Write { slot, offset, fill } => {
            let bytes = fill.bytes();
            let mut done = 0;
            loop {
                done += file(slot)
                    .write_at(&bytes[done..], offset + done as u64)
                    .map_err(io)?;
                if done == bytes.len() {
                    return Ok(Outcome::Count(done as u64));
                }
            }
        }
        Op::SetLen { slot, len } => rustix::fs::ftruncate(file(slot), *len)?,
        Op::Stat { slot } => return Ok(Outcome::Facts(facts(&rustix::fs::fstat(file(slot))?))),
        Op::ChmodOpen { slot, mode } => rustix::fs::fchmod(file(slot), Mode::from_raw_mode(*mode))?,
        Op::Sync { slot } => rustix::fs::fsync(file(slot))?,
        Op::Punch { slot, offset, len } => {
            let mode = FallocateFlags::PUNCH_HOLE | FallocateFlags::KEEP_SIZE;
            rustix::fs::fallocate(file(slot), mode, *offset, *len)?;
        }
        Op::CopyRange {
            from,
            from_offset,
            to,
            to_offset,
            len,
        } => {
            let (mut from_offset, mut to_offset, mut done) = (*from_offset, *to_offset, 0);
            loop {
                let left = usize::try_from(len - done).unwrap();
                let some = rustix::fs::copy_file_range(
                    file(from),
                    Some(&mut from_offset),
                    file(to),
                    Some(&mut to_offset),
                    left,
                )?;
                done += some as u64;
                if some == 0 || done == *len {
                    return Ok(Outcome::Count(done));
                }
            }
        }
        Op::ReadAll { path } => return Ok(Outcome::Data(read_all(&at(path))?)),
        Op::StatPath { path, follow: how } => {
            return Ok(Outcome::Facts(facts(&rustix::fs::statat(
                CWD,
                at(path),
                follow(how),
            )?)));
        }
        Op::List { path } => {
            let mut names: Vec<(String, Kind)> = list(&at(path))?
                .into_iter()
                .map(|(name, kind, _)| (name, kind))
                .collect();
            names.sort();
            return Ok(Outcome::Names(names));
        }
        Op::Truncate { path, len } => {
            let path = at(path);
            nix::unistd::truncate(path.as_str(), i64::try_from(*len).unwrap())
                .map_err(|errno| Errno::from_raw_os_error(errno as i32))?;
        }
        Op::Mkdir { path, mode } => rustix::fs::mkdir(at(path), Mode::from_raw_mode(*mode))?,
        Op::Mknod {
            path,
            kind,
            mode,
            rdev,
        } => {
            let kind = match kind {
                Kind::Fifo => FileType::Fifo,
                Kind::Socket => FileType::Socket,
                Kind::CharDev => FileType::CharacterDevice,
                Kind::BlockDev => FileType::BlockDevice,
                other => panic!("mknod of {other:?}"),
            };
            rustix::fs::mknodat(CWD, at(path), kind, Mode::from_raw_mode(*mode), *rdev)?;
        }
        Op::Symlink { target, path } => rustix::fs::symlink(target, at(path))?,
        Op::Readlink { path } => {
            let target = rustix::fs::readlink(at(path), Vec::new())?;
            return Ok(Outcome::Data(target.into_bytes()));
        }
        Op::Link { from, to } => rustix::fs::linkat(CWD, at(from), CWD, at(to), AtFlags::empty())?,
        Op::Unlink { path } => rustix::fs::unlink(at(path))?,
        Op::Rmdir { path } => rustix::fs::rmdir(at(path))?,
        Op::Rename { from, to, how } => {
            let flags = match how {
                How::Replace => RenameFlags::empty(),
                How::NoReplace => RenameFlags::NOREPLACE,
                How::Exchange => RenameFlags::EXCHANGE,
            };
            rustix::fs::renameat_with(CWD, at(from), CWD, at(to), flags)?;
        }
        Op::Chmod { path, mode } => rustix::fs::chmod(at(path), Mode::from_raw_mode(*mode))?,
        Op::Chown {
            path,
            uid,
            gid,
            follow: how,
        } => {
            rustix::fs::chownat(
                CWD,
                at(path),
                uid.map(Uid::from_raw),
                gid.map(Gid::from_raw),
                follow(how),
            )?;
        }
        Op::SetMtime {
            path,
            at: change,
            follow: how,
        } => {
            let omit = Timespec {
                tv_sec: 0,
                tv_nsec: libc::UTIME_OMIT,
            };
            let now = Timespec {
                tv_sec: 0,
                tv_nsec: libc::UTIME_NOW,
            };
            let time = match change {
                MtimeChange::At(sec, nsec) => Timespec {
                    tv_sec: *sec,
                    tv_nsec: i64::from(*nsec),
                },
                MtimeChange::Now => now,
                MtimeChange::Omit => omit,
            };
            let times = Timestamps {
                // Nothing at all to change would not even look at the path.
                last_access: match change {
                    MtimeChange::Omit => now,
                    _ => omit,
                },
                last_modification: time,
            };
            rustix::fs::utimensat(CWD, at(path), &times, follow(how))?;
        }
        Op::SetXattr {
            path,
            name,
            value,
            how,
        } => {
            let flags = match how {
                XattrHow::Any => XattrFlags::empty(),
                XattrHow::Create => XattrFlags::CREATE,
                XattrHow::Replace => XattrFlags::REPLACE,
            };
            rustix::fs::lsetxattr(at(path), name, value, flags)?;
        }
        Op::GetXattr { path, name } => return get_xattr(&at(path), name).map(Outcome::Data),
        Op::RemoveXattr { path, name } => rustix::fs::lremovexattr(at(path), name)?,
        Op::Remount => unreachable!("done by whoever holds the mount"),
    }
    Ok(Outcome::Done)
}

/// Never waits for the other end of a fifo.
fn read_all(path: &str) -> Result<Vec<u8>> {
    let flags = OFlags::RDONLY | OFlags::NONBLOCK | OFlags::CLOEXEC;
    let mut file: File = rustix::fs::open(path, flags, Mode::empty())?.into();
    let mut data = Vec::new();
    file.read_to_end(&mut data).map_err(io)?;
    Ok(data)
}

/// Name, type and inode number of each entry but `.` and `..`; a name that comes twice is a failure.
pub fn list(path: &str) -> Result<Vec<(String, Kind, u64)>> {
    let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::CLOEXEC;
    let dir: OwnedFd = rustix::fs::open(path, flags, Mode::empty())?;
    let mut buf = [MaybeUninit::<u8>::uninit(); 4096];
    let mut raw = RawDir::new(&dir, &mut buf);
    let mut found: BTreeMap<String, (Kind, u64)> = BTreeMap::new();
    while let Some(entry) = raw.next() {
        let entry = entry?;
        let name = entry.file_name().to_string_lossy().into_owned();
        if name != "." && name != ".." {
            let kind = kind_of(entry.file_type());
            assert!(
                found.insert(name.clone(), (kind, entry.ino())).is_none(),
                "{path} lists {name} twice"
            );
        }
    }
    Ok(found
        .into_iter()
        .map(|(name, (kind, ino))| (name, kind, ino))
        .collect())
}

fn kind_of(kind: FileType) -> Kind {
    match kind {
        FileType::RegularFile => Kind::File,
        FileType::Directory => Kind::Dir,
        FileType::Symlink => Kind::Symlink,
        FileType::Fifo => Kind::Fifo,
        FileType::CharacterDevice => Kind::CharDev,
        FileType::BlockDevice => Kind::BlockDev,
        FileType::Socket => Kind::Socket,
        FileType::Unknown => panic!("a type is not told"),
    }
}

pub fn facts(stat: &Stat) -> Facts {
    let kind = kind_of(FileType::from_raw_mode(stat.st_mode));
    let has_size = matches!(kind, Kind::File | Kind::Symlink);
    let is_device = matches!(kind, Kind::CharDev | Kind::BlockDev);
    Facts {
        kind,
        mode: stat.st_mode & 0o7777,
        uid: stat.st_uid,
        gid: stat.st_gid,
        size: if has_size {
            u64::try_from(stat.st_size).unwrap()
        } else {
            0
        },
        rdev: if is_device { stat.st_rdev } else { 0 },
        nlink: (kind != Kind::Dir).then_some(stat.st_nlink),
        mtime: Time::At(stat.st_mtime, u32::try_from(stat.st_mtime_nsec).unwrap()),
    }
}

fn get_xattr(path: &str, name: &str) -> Result<Vec<u8>> {
    let mut value = vec![0; 4096];
    let len = rustix::fs::lgetxattr(path, name, &mut value[..])?;
    value.truncate(len);
    Ok(value)
}

/// All extended attributes but those that the host's security modules add.
pub fn xattrs_of(path: &HostPath) -> Vec<(String, Vec<u8>)> {
    let path = path.to_str().expect("test paths are UTF-8");
    let mut names = vec![0; 65_536];
    let len = rustix::fs::llistxattr(path, &mut names[..]).expect("xattrs can be listed");
    let mut found: Vec<(String, Vec<u8>)> = names[..len]
        .split_inclusive(|byte| *byte == 0)
        .map(|name| {
            CStr::from_bytes_with_nul(name)
                .unwrap()
                .to_string_lossy()
                .into_owned()
        })
        .filter(|name| name != "security.selinux")
        .map(|name| {
            let value = get_xattr(path, &name)
                .unwrap_or_else(|errno| panic!("{path}: {name} is listed but: {errno}"));
            (name, value)
        })
        .collect();
    found.sort();
    found
}

/// The tree below `/`, and what is odd about it without any model: names that are listed and not
/// there, types and inode numbers of a listing that are not those of stat, files that cannot be read.
pub fn snapshot() -> (Snapshot, Vec<Oddity>) {
    let mut found = Snapshot::new();
    let mut odd = Vec::new();
    let mut todo = vec![(Path::new(), None)];
    while let Some((path, listed)) = todo.pop() {
        let at = show(&path);
        let Ok(stat) = rustix::fs::lstat(at.as_str()) else {
            odd.push(Oddity::Ghost(path));
            continue;
        };
        let facts = facts(&stat);
        if listed.is_some_and(|listed| listed != (facts.kind, stat.st_ino)) {
            odd.push(Oddity::Other(format!(
                "{at}: listed as {listed:x?}, is {:x?}",
                (facts.kind, stat.st_ino)
            )));
        }
        let read = match facts.kind {
            Kind::File => read_all(&at),
            Kind::Symlink => {
                rustix::fs::readlink(at.as_str(), Vec::new()).map(|target| target.into_bytes())
            }
            Kind::Dir => list(&at).map(|inside| {
                for (name, kind, ino) in inside {
                    let mut inner = path.clone();
                    inner.push(name);
                    todo.push((inner, Some((kind, ino))));
                }
                Vec::new()
            }),
            _ => Ok(Vec::new()),
        };
        let data = read.unwrap_or_else(|errno| {
            odd.push(Oddity::Other(format!("{at}: cannot be read: {errno}")));
            Vec::new()
        });
        let xattrs = xattrs_of(HostPath::new(&at)).into_iter().collect();
        let ino = stat.st_ino;
        found.insert(
            path,
            Item {
                facts,
                data,
                xattrs,
                ino,
            },
        );
    }
    (found, odd)
}

/// What can be wrong with a tree in itself.
pub enum Oddity {
    /// Listed, but not there.
    Ghost(Path),
    Other(String),
}

impl std::fmt::Debug for Oddity {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Self::Ghost(path) => write!(f, "{}: is listed, but is not there", show(path)),
            Self::Other(text) => f.write_str(text),
        }
    }
}
