//! Files mapped for reading.
//!
//! An access to a part of a mapping that the file does not have any more, or that the disk cannot read, is a SIGBUS. A handler
//! puts a page of zeros there, so that the process goes on, and counts it: [`FileMap::get`] then gives nothing until the map is
//! [renewed](FileMap::renew). Any other SIGBUS takes the way that it took before.

use std::fs::File;
use std::hint::black_box;
use std::io;
use std::os::fd::AsRawFd;
use std::ptr;
use std::sync::OnceLock;
use std::sync::atomic::{AtomicPtr, AtomicUsize, Ordering::SeqCst};

use libc::{c_int, c_void, siginfo_t};

/// A whole file, mapped read-only.
#[derive(Debug)]
pub struct FileMap {
    map: memmap2::Mmap,
    guard: &'static Guard,
    /// The value of `Guard::replaced` up to which everything is in place again.
    renewed: AtomicUsize,
}

/// What the handler knows of a mapping. It may run at any instruction of any thread, so these are never freed, and used again.
#[derive(Debug, Default)]
struct Guard {
    /// Address of the mapping; 0 while there is none.
    start: AtomicUsize,
    /// Where it ends; 0 while the handler is not to look at it.
    end: AtomicUsize,
    /// How many mappings have had it and gone.
    mappings: AtomicUsize,
    /// Pages that are about to become zeros. What somebody reads there was counted before.
    begun: AtomicUsize,
    /// Pages that have become so.
    replaced: AtomicUsize,
    /// Set before others can see it, never changed.
    next: AtomicPtr<Self>,
}

/// The guards, the newest first.
static GUARDS: AtomicPtr<Guard> = AtomicPtr::new(ptr::null_mut());
/// What SIGBUS did before, and the size of a page.
static BEFORE: OnceLock<(libc::sigaction, usize)> = OnceLock::new();

impl FileMap {
    /// Maps `file`, to which nobody writes any more.
    pub fn read_only(file: &File) -> io::Result<Self> {
        install()?;
        // SAFETY: the bytes are only ever read as bytes, and the caller has made sure that the file does not
        // change while it is mapped. Where it does all the same, they are compared with a sum before they are used.
        let map = unsafe { memmap2::Mmap::map(file) }?;
        let start = map.as_ptr() as usize;
        let guard = Guard::take(start);
        let renewed = guard.begun.load(SeqCst);
        guard.end.store(start + map.len(), SeqCst);
        Ok(Self {
            map,
            guard,
            renewed: renewed.into(),
        })
    }

    /// Part of its bytes; `None` if it does not go that far, or if something of the map has been lost.
    pub fn get(&self, from: usize, to: usize) -> Option<&[u8]> {
        let bytes = self.map.get(from..to)?;
        // What is not there turns out now. The handler's zeros begin at a page of the machine, and none is smaller.
        const LEAST_PAGE: usize = 4096;
        let last = bytes.last();
        for byte in bytes.iter().step_by(LEAST_PAGE).chain(last) {
            // SAFETY: a reference to a byte can be read from.
            black_box(unsafe { ptr::read_volatile(byte) });
        }
        (!self.is_lost()).then_some(bytes)
    }

    /// Whether zeros stand where something was.
    pub fn is_lost(&self) -> bool {
        self.guard.begun.load(SeqCst) != self.renewed.load(SeqCst)
    }

    /// Maps the file anew, in the same place. What is missing from it now is found missing when it is used.
    pub fn renew(&self, file: &File) -> io::Result<()> {
        let replaced = self.guard.replaced.load(SeqCst);
        // SAFETY: replaces exactly the pages of this mapping by those of a file, which readers can read at every moment.
        let mapped = unsafe {
            libc::mmap(
                self.map.as_ptr().cast_mut().cast(),
                self.map.len(),
                libc::PROT_READ,
                libc::MAP_SHARED | libc::MAP_FIXED,
                file.as_raw_fd(),
                0,
            )
        };
        if mapped == libc::MAP_FAILED {
            return Err(io::Error::last_os_error());
        }
        // Zeros that come from now on are counted beyond this number.
        self.renewed.store(replaced, SeqCst);
        Ok(())
    }
}

impl Drop for FileMap {
    fn drop(&mut self) {
        self.guard.free();
    }
}

impl Guard {
    /// One that is free, or a new one, for a mapping at `start`.
    fn take(start: usize) -> &'static Self {
        let free = |guard: &&Self| {
            guard
                .start
                .compare_exchange(0, start, SeqCst, SeqCst)
                .is_ok()
        };
        if let Some(guard) = Self::all().find(free) {
            return guard;
        }
        let guard: &'static Self = Box::leak(Box::new(Self {
            start: start.into(),
            ..Self::default()
        }));
        let mut newest = GUARDS.load(SeqCst);
        loop {
            guard.next.store(newest, SeqCst);
            let own = ptr::from_ref(guard).cast_mut();
            match GUARDS.compare_exchange(newest, own, SeqCst, SeqCst) {
                Ok(_) => return guard,
                Err(now) => newest = now,
            }
        }
    }

    fn all() -> impl Iterator<Item = &'static Self> {
        // SAFETY: what these pointers lead to was leaked, and is only changed by atomic operations.
        let follow = |at: &AtomicPtr<Self>| unsafe { at.load(SeqCst).as_ref() };
        std::iter::successors(follow(&GUARDS), move |guard| follow(&guard.next))
    }

    /// The mapping has gone.
    fn free(&self) {
        // Before the start becomes that of another mapping, there is no end, and another number.
        self.end.store(0, SeqCst);
        self.mappings.fetch_add(1, SeqCst);
        self.start.store(0, SeqCst);
    }

    fn covers(&self, address: usize) -> bool {
        let mappings = self.mappings.load(SeqCst);
        let end = self.end.load(SeqCst);
        let start = self.start.load(SeqCst);
        // Of one mapping are both only if it has not gone meanwhile.
        end != 0 && (start..end).contains(&address) && self.mappings.load(SeqCst) == mappings
    }

    /// Puts zeros at `at`, from a signal handler. Says whether it could.
    fn replace(&self, at: usize, page: usize) -> bool {
        self.begun.fetch_add(1, SeqCst);
        // SAFETY: the page belongs to a mapping that somebody reads from at this instant, so it is not unmapped meanwhile, and
        // whoever reads it knows that it is not to be believed. errno is as it was for whoever was interrupted.
        let mapped = unsafe {
            let errno = *libc::__errno_location();
            let mapped = libc::mmap(
                at as *mut c_void,
                page,
                libc::PROT_READ,
                libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_FIXED,
                -1,
                0,
            );
            *libc::__errno_location() = errno;
            mapped
        };
        self.replaced.fetch_add(1, SeqCst);
        mapped != libc::MAP_FAILED
    }
}

/// Has SIGBUS be handled; only the first call does something.
fn install() -> io::Result<()> {
    static INSTALLED: parking_lot::Mutex<bool> = parking_lot::Mutex::new(false);
    let mut installed = INSTALLED.lock();
    if *installed {
        return Ok(());
    }
    // SAFETY: sysconf(3) reads a number, and an action of zeros is one without flags, mask and restorer. The handler
    // calls only what signal-safety(7) allows.
    let failed = unsafe {
        let page = libc::sysconf(libc::_SC_PAGESIZE);
        let mut action: libc::sigaction = std::mem::zeroed();
        let mut before: libc::sigaction = std::mem::zeroed();
        action.sa_sigaction = on_sigbus as *const () as usize;
        action.sa_flags = libc::SA_SIGINFO | libc::SA_ONSTACK;
        libc::sigaction(libc::SIGBUS, ptr::null(), &mut before);
        BEFORE.get_or_init(|| (before, usize::try_from(page).unwrap_or(4096)));
        libc::sigaction(libc::SIGBUS, &action, ptr::null_mut()) != 0
    };
    if failed {
        return Err(io::Error::last_os_error());
    }
    *installed = true;
    Ok(())
}

/// Puts zeros where a mapping cannot be read. Only calls what a signal handler may.
extern "C" fn on_sigbus(signal: c_int, info: *mut siginfo_t, context: *mut c_void) {
    let Some((before, page)) = BEFORE.get() else {
        return;
    };
    // SAFETY: the kernel passes a siginfo_t of a SIGBUS, which has an address if it was not sent by somebody.
    let (code, address) = unsafe { ((*info).si_code, (*info).si_addr() as usize) };
    let guard = (code > 0).then(|| Guard::all().find(|guard| guard.covers(address)));
    let is_replaced = guard
        .flatten()
        .is_some_and(|guard| guard.replace(address & !(page - 1), *page));
    if is_replaced {
        return;
    }
    // SAFETY: what stood there before is called as the kernel would have called it, or set again.
    unsafe {
        match before.sa_sigaction {
            libc::SIG_DFL | libc::SIG_IGN => {
                let mut action: libc::sigaction = std::mem::zeroed();
                action.sa_sigaction = libc::SIG_DFL;
                libc::sigaction(signal, &action, ptr::null_mut());
                libc::raise(signal);
            }
            handler if before.sa_flags & libc::SA_SIGINFO != 0 => {
                let handler: extern "C" fn(c_int, *mut siginfo_t, *mut c_void) =
                    std::mem::transmute(handler);
                handler(signal, info, context);
            }
            handler => {
                let handler: extern "C" fn(c_int) = std::mem::transmute(handler);
                handler(signal);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::FileExt;
    use std::process::Command;

    use super::*;

    const PAGE: usize = 4096;

    fn file(pages: usize) -> tempfile::NamedTempFile {
        let file = tempfile::NamedTempFile::new().unwrap();
        let bytes: Vec<u8> = (0..pages * PAGE).map(|at| (at / PAGE + 1) as u8).collect();
        file.as_file().write_all_at(&bytes, 0).unwrap();
        file
    }

    /// Each of these was a SIGBUS that ended the process.
    #[test]
    fn what_is_cut_off_is_missed_and_not_made_up() {
        let tmp = file(3);
        let map = FileMap::read_only(tmp.as_file()).unwrap();
        assert_eq!(map.get(PAGE - 1, PAGE + 1).unwrap(), [1, 2]);
        assert_eq!(map.get(0, 3 * PAGE + 1), None);
        tmp.as_file().set_len(PAGE as u64).unwrap();
        assert_eq!(map.get(1, 2).unwrap(), [1]);
        assert_eq!(map.get(0, 2 * PAGE), None);
        assert!(map.is_lost());
        // Nor is the zeros' neighbour believed, until it was looked at again.
        assert_eq!(map.get(0, 1), None);
        map.renew(tmp.as_file()).unwrap();
        assert_eq!(map.get(0, 1).unwrap(), [1]);
        assert_eq!(map.get(2 * PAGE, 2 * PAGE + 1), None);

        tmp.as_file()
            .write_all_at(&[9; 2 * PAGE], PAGE as u64)
            .unwrap();
        map.renew(tmp.as_file()).unwrap();
        assert_eq!(map.get(2 * PAGE, 2 * PAGE + 1).unwrap(), [9]);
        assert!(!map.is_lost());
    }

    #[test]
    fn a_map_says_nothing_of_another() {
        let (cut, whole) = (file(2), file(2));
        let maps = [&cut, &whole].map(|file| FileMap::read_only(file.as_file()).unwrap());
        cut.as_file().set_len(0).unwrap();
        assert_eq!(maps[0].get(0, 1), None);
        assert_eq!(maps[1].get(PAGE, PAGE + 1).unwrap(), [2]);
        drop(maps);
        // What it knew goes with a map, whoever uses the guard next.
        let again = FileMap::read_only(whole.as_file()).unwrap();
        assert_eq!(again.get(0, 1).unwrap(), [1]);
    }

    #[test]
    fn many_threads_see_what_is_there_or_nothing() {
        let tmp = file(8);
        let map = FileMap::read_only(tmp.as_file()).unwrap();
        std::thread::scope(|scope| {
            for _ in 0..4 {
                scope.spawn(|| {
                    for round in 0..2000 {
                        let page = round % 8;
                        if let Some(byte) = map.get(page * PAGE, page * PAGE + 1) {
                            assert_eq!(byte, [page as u8 + 1]);
                        } else {
                            map.renew(tmp.as_file()).unwrap();
                        }
                    }
                });
            }
            for _ in 0..200 {
                tmp.as_file().set_len(PAGE as u64).unwrap();
                for page in 1..8 {
                    let bytes = [page as u8 + 1; PAGE];
                    tmp.as_file()
                        .write_all_at(&bytes, (page * PAGE) as u64)
                        .unwrap();
                }
            }
        });
    }

    /// Zeros that are counted for another mapping are taken for what the file has.
    #[test]
    fn a_guard_that_changes_hands_covers_neither_what_lies_between_both() {
        let guard = Guard::default();
        let ends = AtomicUsize::new(0);
        std::thread::scope(|scope| {
            scope.spawn(|| {
                for _ in 0..200_000 {
                    for (start, end) in [(10, 20), (100, 200)] {
                        guard.start.store(start, SeqCst);
                        guard.end.store(end, SeqCst);
                        guard.free();
                    }
                }
                ends.store(1, SeqCst);
            });
            while ends.load(SeqCst) == 0 {
                assert!(!guard.covers(50));
            }
        });
    }

    /// Set in the process that is to die.
    const DIE: &str = "PLYWOOD_TEST_DIE_OF_SIGBUS";

    #[test]
    fn another_sigbus_is_as_deadly_as_it_was() {
        if let Some(how) = std::env::var_os(DIE) {
            let tmp = file(2);
            let _guarded = FileMap::read_only(tmp.as_file()).unwrap();
            if how == "sent" {
                nix::sys::signal::raise(nix::sys::signal::Signal::SIGBUS).unwrap();
                nix::sys::signal::raise(nix::sys::signal::Signal::SIGBUS).unwrap();
            }
            // SAFETY: of a file that nobody but this process has.
            let other = unsafe { memmap2::Mmap::map(tmp.as_file()) }.unwrap();
            tmp.as_file().set_len(0).unwrap();
            black_box(other[PAGE]);
            unreachable!("it was read");
        }
        let name = "sys::map::tests::another_sigbus_is_as_deadly_as_it_was";
        for how in ["own", "sent"] {
            let ended = Command::new(std::env::current_exe().unwrap())
                .args(["--exact", name])
                .env(DIE, how)
                .output()
                .unwrap();
            let signal = std::os::unix::process::ExitStatusExt::signal(&ended.status);
            assert_eq!(signal, Some(libc::SIGBUS), "{how}: {ended:?}");
        }
    }
}
