//! The chunk map of one file: which parts of it are in the upper. `docs/chunks.md` has the format byte
//! by byte.
//!
//! It holds every fact twice. The live half is written at once and counts as long as the host has not
//! restarted, so a killed process loses nothing; the durable half is written after the data that it speaks of
//! was synced, and counts after a restart, whatever of the live half has reached the disk before its data.
//! Where nobody can tell whether the host has restarted, the durable half alone counts, and is kept up with every
//! write ([`Map::is_behind`]).

use std::fmt::Write;
use std::os::fd::BorrowedFd;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};

use nix::errno::Errno;
use parking_lot::{Mutex, RwLock};

use super::super::error::{Context, Error, Result};
use crate::sys::fs;

const MAGIC: [u8; 8] = *b"plychunk";
const VERSION: u16 = 1;
/// Before the bits.
const HEADER: usize = 64;
const RUN_AT: u64 = 24;
const LIVE_LIMIT_AT: u64 = 40;
const DURABLE_LIMIT_AT: u64 = 48;
/// The parts of the header that never change.
const FIXED: usize = 24;
/// A map of a file of 1 TiB in chunks of 4 KiB is smaller.
const MAX_BYTES: usize = 128 << 20;

/// Tells one run of the host's kernel from all others.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Run([u8; 16]);

impl Run {
    /// Of a process that cannot tell: like no other, not even itself.
    pub(super) const UNKNOWN: Self = Self([0; 16]);

    /// This one.
    pub(super) fn current() -> Self {
        match std::fs::read_to_string("/proc/sys/kernel/random/boot_id") {
            Ok(text) if !text.trim().is_empty() => {
                let hash = blake3::hash(text.trim().as_bytes());
                let mut run = [0; 16];
                run.copy_from_slice(&hash.as_bytes()[..16]);
                Self(run)
            }
            Ok(_) => Self::UNKNOWN,
            Err(error) => {
                tracing::debug!(%error, "without /proc chunks are synced as they are copied up");
                Self::UNKNOWN
            }
        }
    }

    fn is_known(self) -> bool {
        self != Self::UNKNOWN
    }
}

/// What is durable.
struct Durable {
    bits: Vec<u64>,
    limit: u64,
    /// The map itself, its name and the mark on the file are.
    begun: bool,
    /// Nobody will read the map any more.
    is_retired: bool,
}

/// A map at work.
pub(in super::super) struct Map {
    run: Run,
    shift: u32,
    /// Bytes that it speaks of: the length of the file when it was begun.
    covers: u64,
    /// Bit set: the chunk is the upper's.
    live: Vec<AtomicU64>,
    /// Bytes from here on are the upper's in any case: the shortest that the file has been.
    limit: AtomicU64,
    /// The limit that the mark on the file says; none: the largest number.
    marked: AtomicU64,
    durable: Mutex<Durable>,
    /// Held alone while a chunk changes sides or the length changes, and shared by whatever else changes
    /// the file, so that times can be put back.
    pub(in super::super) turn: RwLock<()>,
    /// The upper was looked through for what a crash has left in chunks that are still the lower's.
    pub(super) is_scrubbed: AtomicBool,
    /// The upper may have other bytes than zeros in a chunk that is still the lower's.
    pub(super) has_remains: AtomicBool,
    /// The live half does not count, and has something that the durable half has not.
    is_behind: AtomicBool,
}

/// What of a map is about to be durable.
pub(super) struct Taken {
    bits: Vec<u64>,
    limit: u64,
}

fn damaged() -> Error {
    Error {
        errno: libc::EIO,
        context: "the chunk map of an incompletely copied file is damaged; restore it or delete the file's copy in the upper directory".into(),
    }
}

fn word(bytes: &[u8], at: usize) -> u64 {
    let mut word = [0; 8];
    word.copy_from_slice(&bytes[at..at + 8]);
    u64::from_le_bytes(word)
}

fn write_all(fd: BorrowedFd<'_>, bytes: &[u8], at: u64) -> Result<()> {
    let written = match fs::pwrite_full(fd, bytes, at) {
        Ok(n) if n < bytes.len() => Err(Errno::ENOSPC),
        result => result.map(drop),
    };
    written.context("writing a chunk map")
}

impl Map {
    /// The map of a file of which nothing is in the upper yet.
    pub(super) fn new(run: Run, shift: u32, covers: u64) -> Self {
        let bits = vec![0; Self::words(shift, covers)];
        let durable = Durable {
            bits: bits.clone(),
            limit: covers,
            begun: false,
            is_retired: false,
        };
        Self::with(run, shift, covers, (bits, covers), durable)
    }

    fn with(
        run: Run,
        shift: u32,
        covers: u64,
        (live, limit): (Vec<u64>, u64),
        durable: Durable,
    ) -> Self {
        Self {
            run,
            shift,
            covers,
            live: live.into_iter().map(AtomicU64::new).collect(),
            limit: AtomicU64::new(limit),
            marked: AtomicU64::new(u64::MAX),
            durable: Mutex::new(durable),
            turn: RwLock::new(()),
            is_scrubbed: AtomicBool::new(false),
            has_remains: AtomicBool::new(false),
            is_behind: AtomicBool::new(false),
        }
    }

    fn words(shift: u32, covers: u64) -> usize {
        let chunks = covers.div_ceil(1 << shift);
        usize::try_from(chunks.div_ceil(64)).unwrap_or(usize::MAX)
    }

    /// Writes the whole of it, so that it takes all the space that it will need.
    pub(super) fn store(&self, fd: BorrowedFd<'_>) -> Result<()> {
        let durable = self.durable.lock();
        let mut bytes = Vec::with_capacity(HEADER + 16 * self.live.len());
        bytes.extend_from_slice(&MAGIC);
        bytes.extend_from_slice(&VERSION.to_le_bytes());
        bytes.extend_from_slice(&0u16.to_le_bytes());
        bytes.extend_from_slice(&self.shift.to_le_bytes());
        bytes.extend_from_slice(&self.covers.to_le_bytes());
        let check = blake3::hash(&bytes);
        bytes.extend_from_slice(&self.run.0);
        bytes.extend_from_slice(&self.limit().to_le_bytes());
        bytes.extend_from_slice(&durable.limit.to_le_bytes());
        bytes.extend_from_slice(&check.as_bytes()[..8]);
        for live in &self.live {
            bytes.extend_from_slice(&live.load(Ordering::Acquire).to_le_bytes());
        }
        for bits in &durable.bits {
            bytes.extend_from_slice(&bits.to_le_bytes());
        }
        write_all(fd, &bytes, 0)
    }

    /// Reads a map, to write it from now on. None: nothing of it has reached the disk, so nothing that it knew was durable.
    pub(super) fn load(fd: BorrowedFd<'_>, run: Run) -> Result<Option<Self>> {
        let Some((map, is_same_run)) = Self::read(fd, run)? else {
            return Ok(None);
        };
        if !is_same_run {
            map.store_live(fd)?;
        }
        Ok(Some(map))
    }

    /// As `load`, and changes nothing. Answers as well whether it was written in this run.
    pub(super) fn read(fd: BorrowedFd<'_>, run: Run) -> Result<Option<(Self, bool)>> {
        let stat = fs::fstat(fd)?;
        let len = usize::try_from(stat.st_size).unwrap_or(usize::MAX);
        if len > MAX_BYTES {
            return Err(damaged());
        }
        let mut bytes = vec![0; len];
        let n = fs::pread_full(fd, &mut bytes, 0)?;
        bytes.truncate(n);
        if bytes.len() < HEADER || bytes.iter().all(|byte| *byte == 0) {
            return Ok(None);
        }
        let mut version = [0; 2];
        version.copy_from_slice(&bytes[8..10]);
        if bytes[..8] == MAGIC && u16::from_le_bytes(version) != VERSION {
            return Err(Error {
                errno: libc::EIO,
                context: "the chunk map of an incompletely copied file is of another version; complete the file with the release that wrote it".into(),
            });
        }
        let check = blake3::hash(&bytes[..FIXED]);
        let shift = (word(&bytes, 8) >> 32) as u32;
        let covers = word(&bytes, 16);
        if bytes[..8] != MAGIC || bytes[56..HEADER] != check.as_bytes()[..8] || shift >= 48 {
            return Err(damaged());
        }
        let words = Self::words(shift, covers);
        if words > MAX_BYTES / 16 || bytes.len() < HEADER + 16 * words {
            return Err(damaged());
        }
        let at = |half: usize, n: usize| word(&bytes, HEADER + 8 * (half * words + n));
        let durable = Durable {
            bits: (0..words).map(|n| at(1, n)).collect(),
            limit: word(&bytes, DURABLE_LIMIT_AT as usize).min(covers),
            begun: false,
            is_retired: false,
        };
        let live: Vec<u64> = (0..words).map(|n| at(0, n)).collect();
        let limit = word(&bytes, LIVE_LIMIT_AT as usize).min(covers);
        let mut written_by = Run::UNKNOWN;
        written_by
            .0
            .copy_from_slice(&bytes[RUN_AT as usize..][..16]);
        let is_same_run = run.is_known() && written_by == run;
        let differs = live != durable.bits || limit != durable.limit;
        if differs && !run.is_known() && written_by.is_known() {
            return Err(Error {
                errno: libc::EIO,
                context: "whether the host has restarted since an incompletely copied file was written cannot be told without /proc; mount /proc first".into(),
            });
        }
        let live = match is_same_run {
            true => (live, limit),
            false => (durable.bits.clone(), durable.limit),
        };
        let map = Self::with(run, shift, covers, live, durable);
        Ok(Some((map, is_same_run)))
    }

    /// Bytes from `limit` on are the upper's for whoever reads by this one; its file stays as it is.
    pub(super) fn narrow(&self, limit: u64) {
        self.limit.fetch_min(limit, Ordering::AcqRel);
    }

    /// The bits before the word of which run they are, so that they never count for another.
    fn store_live(&self, fd: BorrowedFd<'_>) -> Result<()> {
        let mut bytes = Vec::with_capacity(8 * self.live.len());
        for live in &self.live {
            bytes.extend_from_slice(&live.load(Ordering::Acquire).to_le_bytes());
        }
        write_all(fd, &bytes, HEADER as u64)?;
        write_all(fd, &self.limit().to_le_bytes(), LIVE_LIMIT_AT)?;
        write_all(fd, &self.run.0, RUN_AT)
    }

    /// Bytes from here on are the upper's.
    pub(super) fn limit(&self) -> u64 {
        self.limit.load(Ordering::Acquire)
    }

    /// The chunk that a byte lies in: its first and last byte plus one.
    pub(super) fn chunk(&self, offset: u64) -> (u64, u64) {
        let start = offset >> self.shift << self.shift;
        (start, start.saturating_add(1 << self.shift))
    }

    /// Whether a byte is still the lower's.
    pub(super) fn is_lower(&self, offset: u64) -> bool {
        if offset >= self.limit() {
            return false;
        }
        let number = offset >> self.shift;
        let index = usize::try_from(number / 64).unwrap_or(usize::MAX);
        match self.live.get(index) {
            Some(word) => word.load(Ordering::Acquire) & 1 << (number % 64) == 0,
            None => false,
        }
    }

    /// The run of bytes of one kind from `offset` on, no longer than to `end`: where it ends, and whether it is
    /// the lower's.
    pub(super) fn run(&self, offset: u64, end: u64) -> (u64, bool) {
        let lower = self.is_lower(offset);
        let limit = self.limit();
        let mut at = offset;
        loop {
            if !lower && at >= limit {
                return (end, false);
            }
            let (_, next) = self.chunk(at);
            at = if lower { next.min(limit) } else { next };
            if at >= end {
                return (end, lower);
            }
            if self.is_lower(at) != lower {
                return (at, lower);
            }
        }
    }

    /// The first byte from `offset` on that is still the lower's.
    pub(super) fn next_lower(&self, offset: u64) -> Option<u64> {
        let limit = self.limit();
        if offset >= limit {
            return None;
        }
        match self.run(offset, limit) {
            (_, true) => Some(offset),
            (end, false) => (end < limit).then_some(end),
        }
    }

    /// Chunks that are the upper's, and all.
    pub(in super::super) fn progress(&self) -> (u64, u64) {
        let limit = self.limit();
        let all = limit.div_ceil(1 << self.shift);
        let mut lower = 0;
        let mut at = 0;
        while let Some(start) = self.next_lower(at) {
            let (end, _) = self.run(start, limit);
            lower += (end - start).div_ceil(1 << self.shift);
            at = end;
        }
        (all - lower.min(all), all)
    }

    /// Notes that the chunks that begin in `start..end` are the upper's, after their data has been written.
    pub(super) fn set(&self, fd: BorrowedFd<'_>, start: u64, end: u64) -> Result<()> {
        let word_of = |chunk: u64| usize::try_from(chunk / 64).unwrap_or(usize::MAX);
        let chunks = start >> self.shift..end.div_ceil(1 << self.shift);
        let words = word_of(chunks.start)..word_of(chunks.end.saturating_sub(1)) + 1;
        let Some(live) = self.live.get(words.clone()) else {
            return Err(Errno::EIO).context("a chunk is not in its map");
        };
        let mut new: Vec<u64> = live
            .iter()
            .map(|word| word.load(Ordering::Acquire))
            .collect();
        for chunk in chunks {
            new[word_of(chunk) - words.start] |= 1 << (chunk % 64);
        }
        let bytes: Vec<u8> = new.iter().flat_map(|word| word.to_le_bytes()).collect();
        write_all(fd, &bytes, (HEADER + 8 * words.start) as u64)?;
        for (word, bits) in live.iter().zip(new) {
            word.store(bits, Ordering::Release);
        }
        self.fall_behind();
        Ok(())
    }

    /// Notes that the file was cut off at `size`.
    pub(super) fn cut(&self, fd: BorrowedFd<'_>, size: u64) -> Result<()> {
        if size < self.limit() {
            // Known here first: what was cut off must not come back, whatever fails.
            self.limit.store(size, Ordering::Release);
            self.fall_behind();
            write_all(fd, &size.to_le_bytes(), LIVE_LIMIT_AT)?;
        }
        Ok(())
    }

    fn fall_behind(&self) {
        if !self.run.is_known() {
            self.is_behind.store(true, Ordering::Release);
        }
    }

    /// Whether a kill would lose something that the durable half has not: then no write is answered before it has.
    /// Asked and changed with the turn taken.
    pub(super) fn is_behind(&self) -> bool {
        self.is_behind.load(Ordering::Acquire)
    }

    /// The durable half has all that the live half has.
    pub(super) fn has_caught_up(&self) {
        self.is_behind.store(false, Ordering::Release);
    }

    /// Whether the file was cut off and a power cut could undo that: then it must not grow.
    pub(super) fn cut_is_pending(&self) -> bool {
        let known = self.marked.load(Ordering::Acquire);
        self.durable.lock().limit.min(known) > self.limit()
    }

    /// The mark on the file says this limit.
    pub(super) fn was_marked(&self, limit: u64) {
        self.marked.store(limit, Ordering::Release);
    }

    /// Whether what is known is durable, the map and the mark on the file included.
    pub(super) fn is_begun(&self) -> bool {
        self.durable.lock().begun
    }

    /// All that is known is on the disk, which somebody else has seen to.
    pub(super) fn is_durable(&self) {
        self.durable.lock().begun = true;
    }

    /// Whether the durable half lacks something of what was taken.
    pub(super) fn has_news(&self, taken: &Taken) -> bool {
        let durable = self.durable.lock();
        let is_new = |(known, taken): (&u64, &u64)| known | taken != *known;
        !durable.is_retired
            && (taken.limit < durable.limit
                || std::iter::zip(&durable.bits, &taken.bits).any(is_new))
    }

    /// What can be made durable once the file's data is.
    pub(super) fn take(&self) -> Taken {
        Taken {
            bits: self
                .live
                .iter()
                .map(|live| live.load(Ordering::Acquire))
                .collect(),
            limit: self.limit(),
        }
    }

    /// Writes down what was taken, after the data was synced, and syncs that. `sync_name` makes the map's own
    /// name durable; it is called once. Without it that is left to the next call with it.
    pub(super) fn make_durable(
        &self,
        fd: BorrowedFd<'_>,
        taken: &Taken,
        sync_name: Option<&dyn Fn() -> Result<()>>,
    ) -> Result<()> {
        // Held while the disk is waited for: whoever finds nothing left to do may rely on it.
        let mut durable = self.durable.lock();
        let limit = durable.limit.min(taken.limit);
        let bits: Vec<u64> = std::iter::zip(&durable.bits, &taken.bits)
            .map(|(known, taken)| known | taken)
            .collect();
        if durable.is_retired {
            return Ok(());
        }
        let begun = durable.begun || sync_name.is_none();
        if begun && limit == durable.limit && bits == durable.bits {
            return Ok(());
        }
        let is_new = |n: &usize| bits[*n] != durable.bits[*n];
        let first = (0..bits.len()).find(is_new);
        let last = (0..bits.len()).rfind(is_new);
        if let (Some(first), Some(last)) = (first, last) {
            let bytes: Vec<u8> = bits[first..=last]
                .iter()
                .flat_map(|word| word.to_le_bytes())
                .collect();
            write_all(fd, &bytes, (HEADER + 8 * (bits.len() + first)) as u64)?;
        }
        write_all(fd, &limit.to_le_bytes(), DURABLE_LIMIT_AT)?;
        fs::fsync(fd, true).context("making a chunk map durable")?;
        let begun = match sync_name {
            Some(sync_name) if !durable.begun => sync_name().map(|()| true)?,
            _ => durable.begun,
        };
        *durable = Durable {
            bits,
            limit,
            begun,
            is_retired: false,
        };
        Ok(())
    }

    /// As if a sync of what is known were under way while `work` is done.
    #[cfg(test)]
    pub(in super::super) fn while_synced<T>(&self, work: impl FnOnce() -> T) -> T {
        let _durable = self.durable.lock();
        work()
    }

    /// The upper has all of the file: from now on nothing is the lower's, and there is nothing to note.
    pub(super) fn retire(&self) {
        self.limit.store(0, Ordering::Release);
        let mut durable = self.durable.lock();
        durable.limit = 0;
        durable.is_retired = true;
    }
}

/// The name of the map of a file with this handle, or else number.
pub(super) fn name_of(handle: Option<&crate::sys::handle::Handle>, ino: u64) -> String {
    let Some(handle) = handle else {
        return format!("ino-{ino:x}");
    };
    let mut name = format!("{:x}-", handle.kind);
    for byte in &handle.data {
        // Writing to a string cannot fail.
        let _ = write!(name, "{byte:02x}");
    }
    name
}
