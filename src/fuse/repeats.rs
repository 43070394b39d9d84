//! What was logged before, and is not to be logged again at once.
//!
//! Whoever reads a damaged file in a loop has the same to be said of each request, and the log of a mount mostly lies in memory. So
//! the same line waits before it is said again, each time longer, and there are only so many different ones at a time.

use std::collections::HashMap;
use std::time::{Duration, Instant};

use parking_lot::Mutex;

/// How long a line waits after it was said first, and at most.
const SHORTEST: Duration = Duration::from_secs(60);
const LONGEST: Duration = Duration::from_secs(24 * 60 * 60);
/// Lines that are remembered.
const MOST: usize = 256;

/// Lines that were logged.
#[derive(Default)]
pub struct Repeats(Mutex<HashMap<String, Said>>);

struct Said {
    again: Instant,
    wait: Duration,
    /// How often it was not said since.
    missed: u64,
}

impl Repeats {
    /// Whether a line is to be said at the time `now`, and how often it was not since it was said last.
    pub fn admit(&self, line: &str, now: Instant) -> Option<u64> {
        let mut all = self.0.lock();
        if let Some(said) = all.get_mut(line) {
            if now < said.again {
                said.missed += 1;
                return None;
            }
            said.wait = (said.wait * 2).min(LONGEST);
            said.again = now + said.wait;
            return Some(std::mem::take(&mut said.missed));
        }
        if all.len() >= MOST {
            // Those that nobody has asked for since they could be said again.
            all.retain(|_, said| now < said.again);
        }
        if all.len() >= MOST {
            return None;
        }
        let said = Said {
            again: now + SHORTEST,
            wait: SHORTEST,
            missed: 0,
        };
        all.insert(line.to_owned(), said);
        Some(0)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Some thirteen thousand lines came of three seconds.
    #[test]
    fn the_same_is_said_ever_more_rarely_with_how_often_it_was_not() {
        let (repeats, start) = (Repeats::default(), Instant::now());
        let at = |seconds| start + Duration::from_secs(seconds);
        assert_eq!(repeats.admit("a", at(0)), Some(0));
        for _ in 0..1000 {
            assert_eq!(repeats.admit("a", at(59)), None);
        }
        assert_eq!(repeats.admit("b", at(59)), Some(0));
        assert_eq!(repeats.admit("a", at(60)), Some(1000));
        assert_eq!(repeats.admit("a", at(179)), None);
        assert_eq!(repeats.admit("a", at(180)), Some(1));
        let said =
            (0..7 * 24 * 3600).filter(|second| repeats.admit("a", at(200 + second)).is_some());
        assert!(said.count() < 20);
    }

    #[test]
    fn as_many_different_lines_as_there_may_be_are_said_and_later_others() {
        let (repeats, start) = (Repeats::default(), Instant::now());
        let said = |from: usize, now| {
            let admitted = |number: &usize| repeats.admit(&number.to_string(), now).is_some();
            (from..from + 1000).filter(admitted).count()
        };
        assert_eq!(said(0, start), MOST);
        assert_eq!(said(0, start), 0);
        assert_eq!(said(5000, start + SHORTEST), MOST);
    }
}
