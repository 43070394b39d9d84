//! When contents are compared with their names, and what is remembered of that.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, AtomicUsize, Ordering};

/// When contents are compared with their names.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Verify {
    /// Never.
    Never,
    /// When they are first read after the view was opened.
    #[default]
    First,
    /// Those in frames whenever they are read from the disk, and each open has all of them read anew; others whenever they
    /// are opened.
    Always,
}

impl Verify {
    /// Its word in options and settings.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Never => "never",
            Self::First => "first",
            Self::Always => "always",
        }
    }
}

/// How a content that is opened is compared with its name.
#[derive(Clone, Debug)]
pub enum Check {
    /// Not at all.
    Nothing,
    /// All of it, before any of it is handed out.
    Whole,
    /// If it is in frames, each of these as it is read; else all of it, before any of it is handed out.
    Parts {
        /// When.
        verify: Verify,
        /// Whether the whole was compared before.
        known: bool,
        /// What is known of its frames.
        frames: Option<Arc<FrameChecks>>,
    },
}

impl Check {
    /// If it is in frames, each of these as it is first read; else all of it.
    pub const PARTS: Self = Self::Parts {
        verify: Verify::First,
        known: false,
        frames: None,
    };

    /// The same of a content of which the whole was not compared before.
    pub(super) fn of_unknown(&self) -> Self {
        match self {
            Self::Parts { verify, frames, .. } => Self::Parts {
                verify: *verify,
                known: false,
                frames: frames.clone(),
            },
            Self::Nothing | Self::Whole => self.clone(),
        }
    }

    /// Whether all of it is compared before any of it is handed out, wherever it is.
    pub(super) fn is_whole(&self) -> bool {
        matches!(self, Self::Whole)
    }

    /// Whether a content that is not in frames is compared.
    pub(super) fn is_due(&self) -> bool {
        match self {
            Self::Nothing => false,
            Self::Whole => true,
            Self::Parts { verify, known, .. } => match verify {
                Verify::Never => false,
                Verify::First => !known,
                Verify::Always => true,
            },
        }
    }
}

/// A bit for each of a number of things, which any thread may set.
#[derive(Debug)]
pub(in crate::store) struct Bits(Box<[AtomicU64]>);

impl Bits {
    pub(in crate::store) fn new(count: u64) -> Self {
        Self((0..count.div_ceil(64)).map(|_| AtomicU64::new(0)).collect())
    }

    // Relaxed throughout: nothing else is told by a bit, and at worst two threads do the same work.

    /// Whether it is set; what there is no bit for is not.
    pub(in crate::store) fn get(&self, number: u64) -> bool {
        self.word(number)
            .is_some_and(|(word, bit)| word.load(Ordering::Relaxed) & bit != 0)
    }

    /// Sets it; answers whether it was not set before.
    pub(in crate::store) fn set(&self, number: u64) -> bool {
        self.word(number)
            .is_some_and(|(word, bit)| word.fetch_or(bit, Ordering::Relaxed) & bit == 0)
    }

    /// Takes it back; answers whether it was set before.
    fn clear(&self, number: u64) -> bool {
        self.word(number)
            .is_some_and(|(word, bit)| word.fetch_and(!bit, Ordering::Relaxed) & bit != 0)
    }

    fn word(&self, number: u64) -> Option<(&AtomicU64, u64)> {
        let word = self.0.get(usize::try_from(number / 64).ok()?)?;
        Some((word, 1 << (number % 64)))
    }
}

/// What is known of the frames of an object, also after its file was closed: two bits for each.
#[derive(Debug)]
pub struct FrameChecks {
    verify: Verify,
    /// The sum of the table whose values make the name of the object.
    table: [u8; 32],
    /// Frames that were what their value says.
    sound: Bits,
    /// Frames that were not when they were last read, and their number.
    failed: Bits,
    failures: AtomicUsize,
}

impl FrameChecks {
    /// Of an object with so many frames, of which nothing is known.
    pub(super) fn new(verify: Verify, table: [u8; 32], frames: u64) -> Self {
        Self {
            verify,
            table,
            sound: Bits::new(frames),
            failed: Bits::new(frames),
            failures: AtomicUsize::new(0),
        }
    }

    /// Whether this is of the table with this sum, with frames compared as `verify` says. The values in such a table need not
    /// be compared with the name: they are the same, byte for byte.
    pub(super) fn knows(&self, table: &[u8; 32], verify: Verify) -> bool {
        self.verify == verify && self.table == *table
    }

    /// Whether both are of one table, with frames compared at the same times.
    pub(in crate::store) fn is_like(&self, other: &Self) -> bool {
        self.knows(&other.table, other.verify)
    }

    /// Whether the content of a frame that comes from the disk is to be compared.
    pub(super) fn is_due(&self, frame: u64) -> bool {
        match self.verify {
            Verify::Never => false,
            Verify::First => !self.sound.get(frame),
            Verify::Always => true,
        }
    }

    /// Notes that a frame is what its value says.
    pub(super) fn is_sound(&self, frame: u64) {
        self.sound.set(frame);
    }

    /// Notes whether a frame could be used.
    pub(super) fn note(&self, frame: u64, usable: bool) {
        if !usable && self.failed.set(frame) {
            self.failures.fetch_add(1, Ordering::Relaxed);
        } else if usable && self.has_failed() && self.failed.clear(frame) {
            self.failures.fetch_sub(1, Ordering::Relaxed);
        }
    }

    /// Whether a frame could not be used when it was last read.
    pub(in crate::store) fn has_failed(&self) -> bool {
        self.failures.load(Ordering::Relaxed) > 0
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_frame_that_can_be_used_again_is_no_damage() {
        let checks = FrameChecks::new(Verify::First, [0; 32], 130);
        for frame in [0, 64, 129, 129] {
            checks.note(frame, false);
        }
        assert!(checks.has_failed());
        for frame in [0, 64, 65, 129] {
            assert!(checks.has_failed());
            checks.note(frame, true);
        }
        assert!(!checks.has_failed());
    }

    #[test]
    fn what_is_known_of_frames_says_which_are_to_be_compared() {
        let table = [7; 32];
        for (verify, before, after) in [
            (Verify::Never, false, false),
            (Verify::First, true, false),
            (Verify::Always, true, true),
        ] {
            let checks = FrameChecks::new(verify, table, 100);
            assert_eq!(checks.is_due(99), before, "{verify:?}");
            checks.is_sound(99);
            assert_eq!(checks.is_due(99), after, "{verify:?}");
            assert_eq!(checks.is_due(98), before, "{verify:?}");
            assert!(!checks.knows(&[8; 32], verify));
            for other in [Verify::Never, Verify::First, Verify::Always] {
                assert_eq!(checks.knows(&table, other), other == verify);
            }
        }
    }
}
