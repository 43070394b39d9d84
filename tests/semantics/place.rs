//! The five file systems, and a tree on one of them for a row to work on.

use std::cell::{Cell, RefCell};
use std::fs;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use nix::mount::{MntFlags, MsFlags, mount, umount2};

use crate::common::mode::{self, Mode};
use crate::fill::Fill;
use crate::outcome::{Outcome, Said};

/// How long anything may take that normally takes an instant.
const DEADLINE: Duration = Duration::from_secs(60);

const ALL_ON: &str = ",redirect_dir=on,index=on,metacopy=on,xino=on";

/// A file system that rows run on; a column of the table.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Peer {
    /// A plain copy of the merged tree.
    Native,
    /// Kernel overlayfs as it comes.
    Overlay,
    /// Kernel overlayfs with everything on.
    OverlayAll,
    /// Debian's fuse-overlayfs.
    FuseOverlayfs,
    /// The program under test.
    Plyfs,
}

impl Peer {
    /// In the order of the table.
    pub const ALL: [Self; 5] = [
        Self::Native,
        Self::Overlay,
        Self::OverlayAll,
        Self::FuseOverlayfs,
        Self::Plyfs,
    ];

    /// As the command line has it.
    pub fn name(self) -> &'static str {
        match self {
            Self::Native => "native",
            Self::Overlay => "overlay",
            Self::OverlayAll => "overlay-all",
            Self::FuseOverlayfs => "fuse-overlayfs",
            Self::Plyfs => "plyfs",
        }
    }
}

/// A mounted tree. Everything is below one directory.
pub struct Place {
    pub peer: Peer,
    /// More options for plyfs.
    more: String,
    dir: PathBuf,
    lowers: RefCell<Vec<PathBuf>>,
    /// Uppers so far: a new one for each layer on top.
    uppers: RefCell<usize>,
    server: RefCell<Option<Child>>,
    /// How many files the next server may open.
    descriptors: Cell<Option<u64>>,
}

impl Place {
    /// Makes the tree in `dir`, of lowers that are filled already, and mounts it. A native tree that is
    /// too deep to be copied takes its only lower away.
    pub fn new(
        peer: Peer,
        options: &str,
        dir: &Path,
        fill: &Fill,
        too_deep: bool,
    ) -> Result<Self, Said> {
        let place = Self {
            peer,
            more: options.to_owned(),
            dir: dir.to_owned(),
            lowers: RefCell::new(fill.lowers()),
            uppers: RefCell::new(0),
            server: RefCell::new(None),
            descriptors: Cell::new(None),
        };
        if peer == Peer::Native && too_deep {
            // No program copies it; this column is the last that needs it.
            fs::rename(fill.lower(0), place.root())?;
            return Ok(place);
        }
        fs::create_dir(place.root())?;
        if peer == Peer::Native {
            fill.merge_into(&place.root());
        } else {
            place.make_upper()?;
            place.mount(true)?;
        }
        Ok(place)
    }

    fn make_upper(&self) -> Outcome {
        *self.uppers.borrow_mut() += 1;
        fs::create_dir(self.upper())?;
        Ok(fs::create_dir(self.work())?)
    }

    /// The topmost directory.
    pub fn root(&self) -> PathBuf {
        self.dir.join("mnt")
    }

    /// Something in the tree.
    pub fn path(&self, path: impl AsRef<Path>) -> PathBuf {
        self.root().join(path)
    }

    /// A lower directory on the host, 0 the topmost.
    pub fn lower(&self, n: usize) -> PathBuf {
        self.lowers.borrow()[n].clone()
    }

    /// Where changes go on the host.
    pub fn upper(&self) -> PathBuf {
        match self.peer {
            Peer::Native => self.root(),
            _ => self.dir.join(format!("upper{}", self.uppers.borrow())),
        }
    }

    fn work(&self) -> PathBuf {
        self.dir.join(format!("work{}", self.uppers.borrow()))
    }

    /// The directory that holds all of it, on the same host file system.
    pub fn host(&self) -> &Path {
        &self.dir
    }

    fn options(&self, writable: bool) -> String {
        let lowers = self.lowers.borrow();
        let upper = self.upper();
        let all = lowers.iter().map(|path| path.to_str().unwrap());
        let read_only = (!writable).then(|| upper.to_str().unwrap());
        let all: Vec<&str> = read_only.into_iter().chain(all).collect();
        let mut options = format!("lowerdir={}", all.join(":"));
        if writable {
            let (upper, work) = (self.upper(), self.work());
            options += &format!(",upperdir={},workdir={}", upper.display(), work.display());
        }
        options
    }

    /// Mounts by kernel overlayfs what another has left on disk.
    pub fn mount_by_kernel(&self) -> Outcome {
        self.mount_overlay(&(self.options(true) + ALL_ON))
    }

    fn mount_overlay(&self, options: &str) -> Outcome {
        let start = Instant::now();
        loop {
            let kind = Some("overlay");
            match mount(kind, &self.root(), kind, MsFlags::empty(), Some(options)) {
                // The last mount may live for a moment in a mount name space that somebody made.
                Err(nix::Error::EBUSY) if start.elapsed() < DEADLINE => pause(),
                result => return Ok(result?),
            }
        }
    }

    fn mount(&self, writable: bool) -> Outcome {
        let mut options = self.options(writable);
        let program = match self.peer {
            Peer::Native => return Ok(()),
            Peer::Overlay => return self.mount_overlay(&options),
            Peer::OverlayAll => return self.mount_overlay(&(options + ALL_ON)),
            Peer::FuseOverlayfs => {
                options += ",allow_other,suid,dev";
                "fuse-overlayfs"
            }
            Peer::Plyfs => {
                let mode = Mode::of_run().options_before(&self.more);
                options += &format!(",{mode},{}", self.more);
                "plyfs"
            }
        };
        let outside = fs::metadata(self.root())?.dev();
        let program = match self.peer {
            Peer::Plyfs => mode::plyfs(),
            _ => Command::new(program),
        };
        let mut command = match self.descriptors.get() {
            Some(limit) => {
                let mut command = Command::new("prlimit");
                command
                    .arg(format!("--nofile={limit}:{limit}"))
                    .arg(program.get_program())
                    .args(program.get_args());
                command
            }
            None => program,
        };
        command.arg("-f").args(["-o", &options]).arg(self.root());
        if self.peer == Peer::FuseOverlayfs {
            command.stderr(Stdio::null());
        }
        let mut server = command.stdin(Stdio::null()).stdout(Stdio::null()).spawn()?;
        let start = Instant::now();
        while fs::metadata(self.root())?.dev() == outside {
            let ended = server.try_wait()?.is_some();
            if ended || start.elapsed() > DEADLINE {
                return Err(Said("cannot mount".to_owned()));
            }
            pause();
        }
        *self.server.borrow_mut() = Some(server);
        Ok(())
    }

    /// Unmounts and waits until nothing holds the directories any more.
    pub fn unmount(&self) -> Outcome {
        if self.peer == Peer::Native {
            return Ok(());
        }
        let start = Instant::now();
        while let Err(errno) = umount2(&self.root(), MntFlags::empty()) {
            if errno != nix::Error::EBUSY || start.elapsed() > DEADLINE {
                return Err(errno.into());
            }
            pause();
        }
        let Some(mut server) = self.server.take() else {
            return Ok(());
        };
        while server.try_wait()?.is_none() {
            if start.elapsed() > DEADLINE {
                server.kill()?;
                return Err(Said("outlives its mount".to_owned()));
            }
            pause();
        }
        Ok(())
    }

    /// Unmounts and mounts again.
    pub fn remount(&self) -> Outcome {
        self.unmount()?;
        self.mount(true)
    }

    /// Mounts what is left after an unmount.
    pub fn mount_again(&self) -> Outcome {
        self.mount(true)
    }

    /// Mounts what is there as layers below a new upper.
    pub fn stack(&self) -> Outcome {
        if self.peer == Peer::Native {
            return Ok(());
        }
        self.unmount()?;
        self.lowers.borrow_mut().insert(0, self.upper());
        self.make_upper()?;
        self.mount(true)
    }

    /// Mounts all of it as read-only layers, without an upper.
    pub fn remount_without_upper(&self) -> Outcome {
        self.unmount()?;
        self.mount(false)
    }

    /// The process that serves the mount, if there is one.
    pub fn server(&self) -> Option<u32> {
        self.server.borrow().as_ref().map(Child::id)
    }

    /// Lets the next server open no more files than this.
    pub fn limit_descriptors(&self, limit: u64) {
        self.descriptors.set(Some(limit));
    }

    /// Waits until a server that was killed is gone.
    pub fn wait_for_server(&self) -> Outcome {
        if let Some(mut server) = self.server.take() {
            server.wait()?;
        }
        Ok(())
    }

    /// Makes the kernel forget what it knows of the tree.
    pub fn drop_caches(&self) {
        // Dentries hold inodes, so the second round is what drops these.
        for _ in 0..2 {
            fs::write("/proc/sys/vm/drop_caches", "2").unwrap();
        }
    }
}

fn pause() {
    std::thread::sleep(Duration::from_millis(2));
}
