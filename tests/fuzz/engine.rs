//! Runs cases of a target one after the other, and watches over them.
//!
//! A case is a string of bytes, from which a target makes its choices; it is drawn from a number, so that this number brings it
//! back. A panic in any thread, a case that does not end, and one that takes much memory are findings.

use std::fs;
use std::panic;
use std::path::Path;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, Once, PoisonError};
use std::thread::sleep;
use std::time::{Duration, Instant};

use nix::sys::resource::{Resource, setrlimit};
use rand::rngs::StdRng;
use rand::{Rng, RngCore, SeedableRng};

/// How long a case may take before it is called a hang; nothing is measured by it.
const PATIENCE: Duration = Duration::from_secs(60);
/// Bytes that this program may have in memory: what the largest case needs, and much less than a forged size asks for.
const MOST_RESIDENT: u64 = 600 << 20;
/// Bytes of address space, of which threads and allocators take much more than they use.
const MOST_MAPPED: u64 = 3 << 30;

/// What a target draws from.
pub struct Choices<'a>(&'a [u8]);

impl<'a> Choices<'a> {
    /// Draws from these bytes; what comes after them is zero.
    pub fn new(bytes: &'a [u8]) -> Self {
        Self(bytes)
    }

    /// The next byte; zeros at the end.
    pub fn byte(&mut self) -> u8 {
        let Some((first, rest)) = self.0.split_first() else {
            return 0;
        };
        self.0 = rest;
        *first
    }

    pub fn word(&mut self) -> u64 {
        (0..8).fold(0, |word, _| word << 8 | u64::from(self.byte()))
    }

    /// A number below `end`, 0 if there is none.
    pub fn below(&mut self, end: usize) -> usize {
        let drawn = match end {
            0..=256 => u64::from(self.byte()),
            257..=65536 => u64::from(self.byte()) << 8 | u64::from(self.byte()),
            _ => self.word(),
        };
        drawn.checked_rem(end as u64).unwrap_or(0) as usize
    }

    pub fn one_of<T: Copy>(&mut self, of: &[T]) -> T {
        of[self.below(of.len())]
    }

    /// Whether something happens that happens once in `times`.
    pub fn once_in(&mut self, times: usize) -> bool {
        self.below(times) == 1
    }

    /// A number of the kind that breaks things.
    pub fn number(&mut self) -> u64 {
        match self.below(8) {
            0 => u64::from(self.byte()),
            1 => self.word() >> self.below(64),
            2 => 1 << self.below(64),
            3 => (1u64 << self.below(64)).wrapping_sub(1),
            4 => u64::MAX - u64::from(self.byte()),
            5 => u64::from(u32::MAX) - u64::from(self.byte() % 4),
            6 => 4096 * u64::from(self.byte()),
            _ => 0,
        }
    }

    pub fn bytes(&mut self, most: usize) -> Vec<u8> {
        let count = self.below(most + 1);
        (0..count).map(|_| self.byte()).collect()
    }
}

fn setting(name: &str) -> Option<u64> {
    std::env::var(name)
        .ok()
        .map(|text| text.parse().expect("a number"))
}

/// What panicked since the program began.
fn panics() -> &'static Mutex<Vec<String>> {
    static PANICS: Mutex<Vec<String>> = Mutex::new(Vec::new());
    static HOOK: Once = Once::new();
    HOOK.call_once(|| {
        let before = panic::take_hook();
        panic::set_hook(Box::new(move |info| {
            // A thread of the store that panics is only an error for who waits for it.
            PANICS.lock().unwrap().push(info.to_string());
            before(info);
        }));
        setrlimit(Resource::RLIMIT_AS, MOST_MAPPED, MOST_MAPPED).unwrap();
    });
    &PANICS
}

/// Runs `target` on cases for as long as is asked for: `PLYWOOD_FUZZ_SECONDS`, else a few seconds. The cases come from
/// `PLYWOOD_FUZZ_SEED`; `PLYWOOD_FUZZ_CASE` runs a single one.
pub fn run(name: &'static str, mut target: impl FnMut(&mut Choices<'_>)) {
    // One after the other, so that a panic in a thread of the store is that of the case at hand, and so is the memory.
    static ONE_AT_A_TIME: Mutex<()> = Mutex::new(());
    let _alone = ONE_AT_A_TIME.lock().unwrap_or_else(PoisonError::into_inner);
    panics().lock().unwrap().clear();
    let only = setting("PLYWOOD_FUZZ_CASE");
    let seconds = setting("PLYWOOD_FUZZ_SECONDS").unwrap_or(5);
    let seed = setting("PLYWOOD_FUZZ_SEED").unwrap_or_else(rand::random);
    eprintln!("{name}: PLYWOOD_FUZZ_SEED={seed}");
    let watch = Watch::start(name);
    let mut random = StdRng::seed_from_u64(seed);
    let mut cases = 0;
    let end = Instant::now() + Duration::from_secs(seconds);
    while Instant::now() < end {
        let case = only.unwrap_or_else(|| random.random());
        watch.begins(case);
        one(name, case, &mut target);
        cases += 1;
        if only.is_some() {
            break;
        }
    }
    eprintln!("{name}: {cases} cases");
    assert!(cases > 0);
}

fn one(name: &str, case: u64, target: &mut impl FnMut(&mut Choices<'_>)) {
    let mut random = StdRng::seed_from_u64(case);
    let mut bytes = vec![0; random.random_range(16..2000)];
    random.fill_bytes(&mut bytes);
    // Forgets the most that was in memory so far.
    fs::write("/proc/self/clear_refs", "5").unwrap();
    let finding = panic::catch_unwind(panic::AssertUnwindSafe(|| {
        target(&mut Choices::new(&bytes))
    }));
    let heard = panics().lock().unwrap().clone();
    assert!(
        finding.is_ok() && heard.is_empty(),
        "{name}: PLYWOOD_FUZZ_CASE={case}: {heard:?}"
    );
    let resident = most_resident();
    assert!(
        resident < MOST_RESIDENT,
        "{name}: PLYWOOD_FUZZ_CASE={case} took {resident} bytes"
    );
}

/// The most bytes that this program has had in memory of late.
fn most_resident() -> u64 {
    let status = fs::read_to_string("/proc/self/status").unwrap();
    let line = status.lines().find(|line| line.starts_with("VmHWM:"));
    let kib = line.and_then(|line| line.split_whitespace().nth(1));
    kib.unwrap().parse::<u64>().unwrap() << 10
}

/// Ends the program when a case does not end, and remembers the case in a file, for a program that is ended by the kernel.
struct Watch {
    current: Arc<AtomicU64>,
    count: Arc<AtomicU64>,
    file: fs::File,
}

impl Watch {
    fn start(name: &'static str) -> Self {
        let path = Path::new(env!("CARGO_TARGET_TMPDIR")).join(format!("fuzz-{name}-case"));
        let (current, count) = (Arc::new(AtomicU64::new(0)), Arc::new(AtomicU64::new(0)));
        let watched = (Arc::downgrade(&current), Arc::downgrade(&count));
        std::thread::spawn(move || {
            let mut last = (0, Instant::now());
            while let (Some(current), Some(count)) = (watched.0.upgrade(), watched.1.upgrade()) {
                let now = count.load(Ordering::Relaxed);
                if now != last.0 {
                    last = (now, Instant::now());
                }
                if last.1.elapsed() > PATIENCE {
                    let case = current.load(Ordering::Relaxed);
                    eprintln!("{name}: PLYWOOD_FUZZ_CASE={case} does not end");
                    std::process::abort();
                }
                sleep(Duration::from_millis(200));
            }
        });
        Self {
            current,
            count,
            file: fs::File::create(path).unwrap(),
        }
    }

    fn begins(&self, case: u64) {
        use std::os::unix::fs::FileExt;

        self.current.store(case, Ordering::Relaxed);
        self.count.fetch_add(1, Ordering::Relaxed);
        let text = format!("PLYWOOD_FUZZ_CASE={case:020}\n");
        self.file.write_all_at(text.as_bytes(), 0).unwrap();
    }
}
