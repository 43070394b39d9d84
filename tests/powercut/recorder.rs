//! A disk that remembers every write and every flush, in their order.
//!
//! It is one file of a FUSE file system in this process. The kernel's loop device makes a block device of it, and turns a
//! flush of that (also one that a write with FUA asks for) into an fsync of the file. So what stands in the log is
//! what a disk with a volatile cache would see, whatever the file system on it and the program above it think.

use std::collections::BTreeMap;
use std::ffi::OsStr;
use std::fs::{self, File};
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex};
use std::thread::sleep;
use std::time::{Duration, Instant, UNIX_EPOCH};

use fuser::{
    BackgroundSession, Config, Errno, FileAttr, FileHandle, FileType, Filesystem, FopenFlags,
    Generation, INodeNo, LockOwner, OpenFlags, ReplyAttr, ReplyData, ReplyEmpty, ReplyEntry,
    ReplyOpen, ReplyWrite, Request, WriteFlags,
};

const DISK: &str = "disk.img";
const INODE: INodeNo = INodeNo(2);
/// How long a file system may take to end.
const PATIENCE: Duration = Duration::from_secs(60);
const FOREVER: Duration = Duration::from_secs(1 << 20);
/// What a disk writes as a whole, and what is kept of it together.
const BLOCK: u64 = 4096;

/// What the disk was asked.
pub enum Event {
    Write { at: u64, bytes: Vec<u8> },
    Flush,
}

/// What a disk has been asked so far.
pub type Log = Arc<Mutex<Vec<Event>>>;

/// The disk, there until it is dropped. What is mounted from it has to go first.
pub struct Recorder {
    log: Log,
    path: PathBuf,
    session: Option<BackgroundSession>,
}

impl Recorder {
    /// A disk of so many bytes, all of them zero, at a path below `dir`.
    pub fn new(dir: &Path, size: u64) -> Self {
        let log = Log::default();
        let content = tempfile::tempfile_in(dir).unwrap();
        content.set_len(size).unwrap();
        let disk = Disk {
            content,
            size,
            log: Arc::clone(&log),
        };
        let mnt = dir.join("recorder");
        fs::create_dir(&mnt).unwrap();
        // One thread, so that the log has the order in which the requests came.
        let session = fuser::spawn_mount(disk, &mnt, &Config::default()).unwrap();
        Self {
            log,
            path: mnt.join(DISK),
            session: Some(session),
        }
    }

    /// The file that is the disk.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// How many events there were.
    pub fn position(&self) -> usize {
        self.log.lock().unwrap().len()
    }

    /// Takes the disk away and answers what it was asked.
    pub fn finish(mut self) -> Vec<Event> {
        // What was unmounted lazily may have much to write before it lets go of the disk.
        let deadline = Instant::now() + PATIENCE;
        while self.is_in_use() && Instant::now() < deadline {
            sleep(Duration::from_millis(20));
        }
        self.session.take().unwrap().umount_and_join().unwrap();
        std::mem::take(&mut *self.log.lock().unwrap())
    }

    /// Whether there is a block device of it.
    fn is_in_use(&self) -> bool {
        let mut devices = fs::read_dir("/sys/block").unwrap();
        devices.any(|device| {
            let backing = device.unwrap().path().join("loop/backing_file");
            fs::read_to_string(backing).is_ok_and(|path| Path::new(path.trim_end()) == self.path)
        })
    }
}

struct Disk {
    content: File,
    size: u64,
    log: Log,
}

impl Disk {
    fn attributes(&self, inode: INodeNo) -> FileAttr {
        let (kind, size) = match inode {
            INODE => (FileType::RegularFile, self.size),
            _ => (FileType::Directory, 0),
        };
        FileAttr {
            ino: inode,
            size,
            blocks: size / 512,
            atime: UNIX_EPOCH,
            mtime: UNIX_EPOCH,
            ctime: UNIX_EPOCH,
            crtime: UNIX_EPOCH,
            kind,
            perm: 0o700,
            nlink: 1,
            uid: 0,
            gid: 0,
            rdev: 0,
            blksize: BLOCK as u32,
            flags: 0,
        }
    }
}

impl Filesystem for Disk {
    fn lookup(&self, _: &Request, _: INodeNo, name: &OsStr, reply: ReplyEntry) {
        if name == DISK {
            reply.entry(&FOREVER, &self.attributes(INODE), Generation(0));
        } else {
            reply.error(Errno::ENOENT);
        }
    }

    fn getattr(&self, _: &Request, inode: INodeNo, _: Option<FileHandle>, reply: ReplyAttr) {
        reply.attr(&FOREVER, &self.attributes(inode));
    }

    fn open(&self, _: &Request, _: INodeNo, _: OpenFlags, reply: ReplyOpen) {
        // No page cache may lie between the block device and the log.
        reply.opened(FileHandle(0), FopenFlags::FOPEN_DIRECT_IO);
    }

    fn read(
        &self,
        _: &Request,
        _: INodeNo,
        _: FileHandle,
        offset: u64,
        size: u32,
        _: OpenFlags,
        _: Option<LockOwner>,
        reply: ReplyData,
    ) {
        let mut buffer = vec![0; u64::from(size).min(self.size.saturating_sub(offset)) as usize];
        match self.content.read_exact_at(&mut buffer, offset) {
            Ok(()) => reply.data(&buffer),
            Err(_) => reply.error(Errno::EIO),
        }
    }

    fn write(
        &self,
        _: &Request,
        _: INodeNo,
        _: FileHandle,
        offset: u64,
        data: &[u8],
        _: WriteFlags,
        _: OpenFlags,
        _: Option<LockOwner>,
        reply: ReplyWrite,
    ) {
        let end = offset.saturating_add(data.len() as u64);
        if end > self.size || self.content.write_all_at(data, offset).is_err() {
            reply.error(Errno::EIO);
            return;
        }
        self.log.lock().unwrap().push(Event::Write {
            at: offset,
            bytes: data.to_vec(),
        });
        reply.written(data.len() as u32);
    }

    fn fsync(&self, _: &Request, _: INodeNo, _: FileHandle, _: bool, reply: ReplyEmpty) {
        self.log.lock().unwrap().push(Event::Flush);
        reply.ok();
    }
}

/// The content of a disk at some moment.
#[derive(Clone, Default)]
pub struct Image {
    size: u64,
    /// By their numbers; all others are zero.
    blocks: BTreeMap<u64, Box<[u8]>>,
}

impl Image {
    /// Nothing but zeros.
    pub fn new(size: u64) -> Self {
        Self {
            size,
            blocks: BTreeMap::new(),
        }
    }

    /// Writes those blocks of `bytes` that `takes` takes.
    pub fn write(&mut self, mut at: u64, mut bytes: &[u8], mut takes: impl FnMut() -> bool) {
        while !bytes.is_empty() {
            let (number, within) = (at / BLOCK, (at % BLOCK) as usize);
            let count = bytes.len().min(BLOCK as usize - within);
            if takes() {
                let block = self.blocks.entry(number);
                let block = block.or_insert_with(|| vec![0; BLOCK as usize].into());
                block[within..within + count].copy_from_slice(&bytes[..count]);
            }
            (at, bytes) = (at + count as u64, &bytes[count..]);
        }
    }

    /// Makes a file of it.
    pub fn save(&self, path: &Path) {
        let file = File::create(path).unwrap();
        file.set_len(self.size).unwrap();
        for (number, block) in &self.blocks {
            file.write_all_at(block, number * BLOCK).unwrap();
        }
    }
}
