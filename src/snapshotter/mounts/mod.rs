//! The mounts of snapshots: one plyfs process for each, and one thread that sees them die.
//!
//! plyd opens /dev/fuse and mounts, so that the mount is there before the process that serves it, and
//! outlives neither: the process gets the descriptor, plyd keeps a duplicate for a successor to take
//! over. As long as that duplicate is open the end of a plyfs leaves callers hanging; so the
//! thread here watches the control connections, and at the end of one closes the duplicate, aborts the
//! connection and takes the mount away, with its directory, so that nobody writes into what lay below.
//! From then on every call on it fails at once, and the next [`Mounts::mount`] makes a new one at the
//! same place.
//!
//! A connection is aborted by its number, and the kernel gives the number of a mount that is gone to the
//! next one. So only a connection that the table shows at a place of ours is ever aborted.
//!
//! Whoever does not notice the end of a mount may write or mount below its place. What was written goes;
//! a place that something foreign is mounted in stays, and says so, until that is gone.
//!
//! Nothing here looks up a path through a mount: what is known of it comes from the control socket
//! and from the kernel's tables.
//!
//! A plyfs is in a session of its own and is left running when plyd ends. What is below the state
//! directory tells the next plyd whom to ask; whoever does not answer is cleared away.

mod copies;
mod end;
mod process;
mod refresh;
mod seal;

use std::collections::{BTreeSet, HashMap};
use std::fs;
use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::path::{Path, PathBuf};
use std::process::Child;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use end::{abort_at, connection, has_ended, kill};
use nix::errno::Errno;
use nix::fcntl::OFlag;
use nix::mount::MntFlags;
use nix::poll::{PollFd, PollFlags, PollTimeout};
use parking_lot::{Condvar, Mutex};

use super::types::*;
use crate::cow::{Damage, UnionConfig};
use crate::fuse::control::{ControlClient, Hello};
use crate::store::create_dir;
use crate::store::trash::Trash;
use crate::store::view::Verify;
use crate::sys::fuse_mount::{self, MountOptions};
use crate::sys::mountinfo;

/// How long a plyfs may take to answer a message that costs it nothing.
const ANSWER: Duration = Duration::from_secs(5);
/// As that, of one that is about to be ended in any case.
const LAST_ANSWER: Duration = Duration::from_secs(1);
/// How long a plyfs that another plyd started may take to answer: whoever does not is ended, and the
/// roots of running containers with it. One that is dead refuses the connection at once.
const ADOPTION: Duration = Duration::from_secs(60);
/// How long in all such answers are waited for before plyd serves.
const PATIENCE: Duration = Duration::from_secs(3);
/// How long a plyfs may take to end when somebody has unmounted it.
const ENDING: Duration = Duration::from_secs(5);
/// How long a plyfs may take to bring everything to the disk.
const FLUSH: Duration = Duration::from_secs(600);
/// How long it may take to copy what is missing of all files.
const COMPLETE: Duration = Duration::from_secs(3600);
/// How long a plyfs may take to serve after its start.
const START: Duration = Duration::from_secs(20);

/// All live mounts.
#[derive(Debug)]
pub(super) struct Mounts {
    dir: PathBuf,
    plyfs: Option<PathBuf>,
    verify: Verify,
    /// For what was written below a dead mount.
    trash: Trash,
    shared: Arc<Shared>,
    /// Mounts that an earlier plyd left and whose plyfs has not answered yet, by the snapshot's id.
    /// Whoever wants to do something with one waits for that.
    arriving: Mutex<HashMap<String, MountPoint>>,
    /// Told when `arriving` shrinks.
    arrived: Condvar,
    thread: Mutex<Option<JoinHandle<()>>>,
}

#[derive(Debug)]
struct Shared {
    /// By the snapshot's id. Held while the remains of a dead one are cleared, so that a new mount
    /// at the same place does not meet them.
    live: Mutex<HashMap<String, Live>>,
    /// Written to when `live` or `ending` changes.
    wake: OwnedFd,
    woken: OwnedFd,
    ending: AtomicBool,
    /// Mounts that have ended and could not read something of theirs.
    damaged: AtomicU64,
}

struct Live {
    point: MountPoint,
    control: Arc<ControlClient>,
    /// The duplicate of the /dev/fuse descriptor.
    fuse: OwnedFd,
    connection: u64,
    /// Its process, if this plyd started it: to be reaped.
    child: Option<Child>,
    /// Its snapshot is committed; only copies that others made of the mount are left.
    left: bool,
}

impl std::fmt::Debug for Live {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Live")
            .field("point", &self.point)
            .field("connection", &self.connection)
            .finish_non_exhaustive()
    }
}

impl Mounts {
    /// Starts to watch. `plyfs` is the program that the configuration names.
    pub(super) fn open(state: &Path, plyfs: Option<PathBuf>, verify: Verify) -> Result<Self> {
        create_dir(state, 0o700).map_err(io_error("make", state))?;
        let dir = state.join("mounts");
        create_dir(&dir, 0o700).map_err(io_error("make", &dir))?;
        // mount(2) resolves links and the kernel's table shows the result.
        let dir = fs::canonicalize(&dir).map_err(io_error("resolve", &dir))?;
        let trash = state.join("trash");
        let trash = Trash::open(&trash).map_err(io_error("open", &trash))?;
        warn_if_unseen();
        let (woken, wake) = nix::unistd::pipe2(OFlag::O_CLOEXEC | OFlag::O_NONBLOCK)
            .map_err(|errno| io_error("watch the mounts in", &dir)(errno.into()))?;
        let shared = Arc::new(Shared {
            live: Mutex::default(),
            wake,
            woken,
            ending: AtomicBool::new(false),
            damaged: AtomicU64::new(0),
        });
        let watcher = Arc::clone(&shared);
        let thread = std::thread::Builder::new()
            .name("mounts".to_owned())
            .spawn(move || watcher.watch())
            .map_err(io_error("watch the mounts in", &dir))?;
        Ok(Self {
            dir,
            plyfs,
            verify,
            trash,
            shared,
            arriving: Mutex::default(),
            arrived: Condvar::new(),
            thread: Mutex::new(Some(thread)),
        })
    }

    /// Ends the watching and leaves every mount as it is.
    pub(super) fn close(&self) {
        self.shared.ending.store(true, Ordering::Release);
        self.shared.wake_up();
        if let Some(thread) = self.thread.lock().take() {
            // A panic in there was reported when it happened.
            let _ = thread.join();
        }
    }

    /// Takes over what an earlier plyd left: live mounts of snapshots that `keep` knows go on,
    /// everything else is cleared away. A plyfs that does not answer soon is waited for in the
    /// background, so that it keeps nobody else from being served.
    pub(super) fn adopt(self: &Arc<Self>, keep: impl Fn(&str) -> bool) -> Result<()> {
        for entry in fs::read_dir(&self.dir).map_err(io_error("list", &self.dir))? {
            let entry = entry.map_err(io_error("list", &self.dir))?;
            let Ok(id) = entry.file_name().into_string() else {
                continue;
            };
            let place = self.place(&id);
            let dialled = ControlClient::dial(&place.socket(), ANSWER)
                .and_then(|control| Ok((control.peer_pid()?, control)));
            let (pid, control) = match dialled {
                Ok(dialled) => dialled,
                Err(error) => {
                    self.clear_unserved(&id, &error);
                    continue;
                }
            };
            let path = place.root();
            let point = MountPoint { path, pid };
            self.arriving.lock().insert(id.clone(), point);
            let (this, kept) = (Arc::clone(self), keep(&id));
            std::thread::Builder::new()
                .name("adoption".to_owned())
                .spawn(move || {
                    this.welcome(&id, pid, control, kept);
                    this.arriving.lock().remove(&id);
                    this.arrived.notify_all();
                })
                .map_err(io_error("take over the mounts in", &self.dir))?;
        }
        let deadline = Instant::now() + PATIENCE;
        let mut arriving = self.arriving.lock();
        while !arriving.is_empty() {
            if self.arrived.wait_until(&mut arriving, deadline).timed_out() {
                for (id, MountPoint { pid, .. }) in &*arriving {
                    tracing::warn!(id, pid, "a plyfs does not answer; waiting for it goes on");
                }
                break;
            }
        }
        Ok(())
    }

    fn welcome(&self, id: &str, pid: u32, control: ControlClient, keep: bool) {
        let control = Arc::new(control);
        match self.connect(id, Arc::clone(&control)) {
            Ok(live) => {
                self.shared.live.lock().insert(id.to_owned(), live);
                self.shared.wake_up();
                if keep {
                    tracing::info!(id, pid, "a mount goes on");
                    return;
                }
                tracing::info!(id, pid, "ending the mount of a removed snapshot");
                if let Err(error) = self.end(id) {
                    tracing::error!(id, %error, "the mount of a removed snapshot stays");
                }
            }
            Err(error) => {
                // Should it wake up, it must not find the upper in the hands of a successor.
                if !has_ended(&control, Duration::ZERO) {
                    kill(pid);
                }
                self.clear_unserved(id, &error);
            }
        }
    }

    fn clear_unserved(&self, id: &str, reason: &io::Error) {
        tracing::warn!(id, error = %reason, "clearing a mount that nobody serves");
        if let Err(error) = self.clear(id) {
            tracing::error!(id, %error, "the place of a dead mount stays");
        }
    }

    /// Waits until it is known what becomes of a mount that an earlier plyd left.
    fn wait_for_arrival(&self, id: &str) {
        let mut arriving = self.arriving.lock();
        while arriving.contains_key(id) {
            self.arrived.wait(&mut arriving);
        }
    }

    fn connect(&self, id: &str, control: Arc<ControlClient>) -> io::Result<Live> {
        let hello = control.hello(ADOPTION)?;
        if !hello.serving {
            return Err(io::Error::other("it has not begun to serve"));
        }
        let fuse = control.fuse_fd(ADOPTION)?;
        self.assemble(id, control, &hello, fuse, None)
    }

    fn assemble(
        &self,
        id: &str,
        control: Arc<ControlClient>,
        hello: &Hello,
        fuse: OwnedFd,
        child: Option<Child>,
    ) -> io::Result<Live> {
        let path = self.place(id).root();
        let connection = mountinfo::at(&path)?
            .and_then(|entry| connection(&entry))
            .ok_or_else(|| io::Error::other("its mount is gone"))?;
        Ok(Live {
            point: MountPoint {
                path,
                pid: hello.pid,
            },
            control,
            fuse,
            connection,
            child,
            left: false,
        })
    }

    /// The live mount of a snapshot, if there is one.
    pub(super) fn point(&self, id: &str) -> Option<MountPoint> {
        // In this order: one that arrives is in both for a moment, and never in none.
        if let Some(point) = self.arriving.lock().get(id) {
            return Some(point.clone());
        }
        let live = self.shared.live.lock();
        live.get(id).map(|live| live.point.clone())
    }

    /// The ids of the snapshots that have one.
    pub(super) fn ids(&self) -> Vec<String> {
        // In this order: as in `point`.
        let mut ids: BTreeSet<String> = self.arriving.lock().keys().cloned().collect();
        let live = self.shared.live.lock();
        let here = live.iter().filter(|(_, live)| !live.left);
        ids.extend(here.map(|(id, _)| id.clone()));
        ids.into_iter().collect()
    }

    /// Mounts the union for the snapshot `id` unless that is done. The caller sees to it that nobody
    /// else does the same.
    pub(super) fn mount(&self, id: &str, union: &UnionConfig) -> Result<MountPoint> {
        self.wait_for_arrival(id);
        // Its death may be so young that the thread has not seen it.
        let control = self.control(id);
        if let Some(control) = control {
            if self.is_ending(id, &control)? {
                self.shared.bury(id, &control);
            } else if let Some(point) = self.point(id) {
                return Ok(point);
            }
        }
        self.clear(id)?;
        let live = self.start(id, union).inspect_err(|_| {
            if let Err(error) = self.clear(id) {
                tracing::error!(id, %error, "cannot clear a failed mount");
            }
        })?;
        let point = live.point.clone();
        self.shared.live.lock().insert(id.to_owned(), live);
        self.shared.wake_up();
        Ok(point)
    }

    /// Whether a plyfs has ended, or does so because somebody has unmounted it. If it does not end then, as a copy of the mount
    /// is in use, that is an error: what lies at its place now is an empty directory.
    fn is_ending(&self, id: &str, control: &ControlClient) -> Result<bool> {
        let root = self.place(id).root();
        let there = mountinfo::at(&root).map_err(io_error("look for mounts at", &root))?;
        let patience = match there {
            Some(_) => Duration::ZERO,
            None => ENDING,
        };
        match has_ended(control, patience) {
            false if there.is_none() => Err(Error::Unmounted { mountpoint: root }),
            has_ended => Ok(has_ended),
        }
    }

    fn start(&self, id: &str, union: &UnionConfig) -> Result<Live> {
        let place = self.place(id);
        place.make(union)?;
        let root = place.root();
        let options = MountOptions {
            read_only: union.upper.is_none(),
            // Binds show it too, and it tells them from other mounts when this one is gone.
            source: root.clone().into_os_string(),
            ..MountOptions::default()
        };
        let fuse = fuse_mount::mount(&root, &options)?;
        let program = process::find(self.plyfs.as_deref())?;
        let mut child = process::start(&program, &place, union, self.verify, &fuse)?;
        let served = process::wait_until_served(&mut child, &place)
            .and_then(|(control, hello)| self.assemble(id, Arc::new(control), &hello, fuse, None));
        match served {
            Ok(live) => Ok(Live {
                child: Some(child),
                ..live
            }),
            Err(error) => {
                // Its descriptor and ours are the only ones: the connection ends with them.
                let _ = child.kill();
                let _ = child.wait();
                Err(Error::PlyfsFailed {
                    mountpoint: root,
                    problem: format!("{error}{}", place.last_words()),
                })
            }
        }
    }

    /// Brings what was written through the mount to the upper, and that to the disk. Answers whether
    /// there is a mount.
    pub(super) fn flush(&self, id: &str) -> io::Result<bool> {
        self.wait_for_arrival(id);
        match self.control(id) {
            Some(control) => control.flush(FLUSH).map(|()| true),
            None => Ok(false),
        }
    }

    /// Brings up all data that files of the upper still have in lower layers. Answers whether there is a mount.
    pub(super) fn complete(&self, id: &str) -> io::Result<bool> {
        self.wait_for_arrival(id);
        if self.control(id).is_none() {
            return Ok(false);
        }
        // A connection of its own: it may take long, and the calls on one take turns.
        let (control, _) = ControlClient::connect(&self.place(id).socket(), ANSWER)?;
        control.complete(COMPLETE).map(|()| true)
    }

    /// What the plyfs of a snapshot could not use when it last read it; `None` if there is none, or it does not answer by
    /// `deadline`.
    pub(super) fn damage(&self, id: &str, deadline: Instant) -> Option<Damage> {
        self.point(id)?;
        let timeout = deadline.checked_duration_since(Instant::now())?;
        // A connection of its own: calls on one take turns, and a flush may take long.
        let connected = ControlClient::connect(&self.place(id).socket(), timeout);
        let (_, hello) = connected
            .inspect_err(|error| tracing::debug!(id, %error, "a plyfs does not tell of damage"))
            .ok()?;
        Some(Damage {
            contents: hello.damaged,
            view: hello.damaged_view,
        })
    }

    /// Ends the mount, if there is one, and its process, and with them every copy of the mount that
    /// someone still holds: whoever uses one gets errors.
    pub(super) fn unmount(&self, id: &str) -> Result<()> {
        self.wait_for_arrival(id);
        self.end(id)
    }

    fn end(&self, id: &str) -> Result<()> {
        let Some(live) = self.shared.live.lock().remove(id) else {
            return self.clear(id);
        };
        self.shared.wake_up();
        self.remember(Self::met_damage(&live));
        if live.is_in_use(id) {
            tracing::warn!(id, "ending a mount that is still in use");
            live.abort();
        }
        self.take_away(live)?.end();
        self.clear(id)
    }

    /// Whether a mount that is about to end could not read something. To be asked while it is there: its process ends with it.
    fn met_damage(live: &Live) -> bool {
        // Who does not answer is ended all the same.
        let hello = live.control.hello(LAST_ANSWER);
        hello.is_ok_and(|hello| hello.damaged > 0 || hello.damaged_view)
    }

    /// Counts a mount that has ended, if it met damage.
    fn remember(&self, met_damage: bool) {
        self.shared
            .damaged
            .fetch_add(met_damage.into(), Ordering::Relaxed);
    }

    /// How many mounts have ended that could not read something of theirs, since this was last forgotten.
    pub(super) fn damaged_and_ended(&self) -> u64 {
        self.shared.damaged.load(Ordering::Relaxed)
    }

    /// Forgets them, for what they could not read was mended.
    pub(super) fn forget_ended(&self) {
        self.shared.damaged.store(0, Ordering::Relaxed);
    }

    /// Takes the mount away from its place. One that stays there is ended: nobody watches over it any more.
    fn take_away(&self, live: Live) -> Result<Live> {
        let path = &live.point.path;
        let taken = match nix::mount::umount2(path, MntFlags::UMOUNT_NOFOLLOW) {
            Ok(()) | Err(Errno::EINVAL | Errno::ENOENT) => Ok(()),
            Err(_) => fuse_mount::unmount_lazily(path).map_err(io_error("unmount", path)),
        };
        match taken {
            Ok(()) => Ok(live),
            Err(error) => {
                live.abort();
                live.end();
                Err(error)
            }
        }
    }

    /// Takes away whatever is at the place of a mount that nobody serves.
    fn clear(&self, id: &str) -> Result<()> {
        let place = self.place(id);
        let root = place.root();
        let find = || mountinfo::at(&root).map_err(io_error("look for mounts at", &root));
        while find()?.is_some() {
            abort_at(&root);
            fuse_mount::unmount_lazily(&root).map_err(io_error("unmount", &root))?;
        }
        place.remove(&self.trash)
    }

    fn control(&self, id: &str) -> Option<Arc<ControlClient>> {
        let live = self.shared.live.lock();
        live.get(id).map(|live| Arc::clone(&live.control))
    }

    fn place(&self, id: &str) -> process::Place {
        process::Place::new(self.dir.join(id))
    }
}

impl Drop for Mounts {
    fn drop(&mut self) {
        self.close();
    }
}

impl Shared {
    fn watch(&self) {
        while !self.ending.load(Ordering::Acquire) {
            let watched: Vec<(String, Arc<ControlClient>)> = {
                let live = self.live.lock();
                live.iter()
                    .map(|(id, live)| (id.clone(), Arc::clone(&live.control)))
                    .collect()
            };
            let mut fds = vec![PollFd::new(self.woken.as_fd(), PollFlags::POLLIN)];
            // A hang-up is always told; data is the answer to someone's request.
            let quiet = PollFlags::empty();
            fds.extend(watched.iter().map(|(_, c)| PollFd::new(c.as_fd(), quiet)));
            match nix::poll::poll(&mut fds, PollTimeout::NONE) {
                Ok(_) | Err(Errno::EINTR) => {}
                Err(errno) => {
                    tracing::error!(%errno, "the death of a plyfs will not be noticed; restart plyd");
                    return;
                }
            }
            let mut bytes = [0; 64];
            while matches!(nix::unistd::read(&self.woken, &mut bytes), Ok(n) if n > 0) {}
            for ((id, control), fd) in watched.iter().zip(&fds[1..]) {
                if fd.any().unwrap_or(true) {
                    self.bury(id, control);
                }
            }
        }
    }

    /// What is to be done when a plyfs has died under its mount.
    fn bury(&self, id: &str, control: &Arc<ControlClient>) {
        let mut all = self.live.lock();
        let is_it = |live: &Live| Arc::ptr_eq(&live.control, control);
        if !all.get(id).is_some_and(is_it) {
            return; // It was ended on purpose.
        }
        let Some(live) = all.remove(id) else { return };
        if live.left {
            drop(all);
            live.reap_aside(id);
            return;
        }
        let (path, pid) = (live.point.path.clone(), live.point.pid);
        abort_at(&path);
        // EINVAL: asked to end by a signal, it has taken its mount away itself.
        match fuse_mount::unmount_lazily(&path) {
            Err(error) if error.raw_os_error() != Some(libc::EINVAL) => {
                tracing::error!(id, %error, "cannot take a dead mount away");
            }
            _ => {}
        }
        if let Err(error) = fs::remove_dir(&path) {
            tracing::warn!(id, %error, "the directory of a dead mount stays");
        }
        drop(all);
        tracing::error!(
            id,
            pid,
            "plyfs died: whatever runs on its mount fails from now on; start it again"
        );
        live.reap_aside(id);
    }

    fn wake_up(&self) {
        // A full pipe wakes as well as a fuller one.
        let _ = nix::unistd::write(&self.wake, &[1]);
    }
}

/// A mount made in a name space of plyd's own is of no use to containerd.
fn warn_if_unseen() {
    let (ours, init) = (
        fs::read_link("/proc/self/ns/mnt"),
        fs::read_link("/proc/1/ns/mnt"),
    );
    if let (Ok(ours), Ok(init)) = (ours, init)
        && ours != init
    {
        tracing::warn!(
            "plyd runs in a mount name space of its own: containerd sees its mounts only if it runs in the same one; under systemd, unset PrivateMounts, PrivateTmp, ProtectSystem and the like"
        );
    }
}
