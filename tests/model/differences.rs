//! Where kernel overlayfs, by design, does not do what the model says; nothing else is excused.

use crate::jail::Oddity;
use crate::model::Model;
use crate::ops::{Op, Outcome};
use crate::tree::Kind;

/// One known difference: which comparison it excuses, and why.
pub struct Difference {
    pub reason: &'static str,
    applies: fn(&Op, &Outcome, &Outcome) -> bool,
}

const GHOSTS: &str = "a directory of one layer alone is listed as it is, its whiteouts included";

const OF_KERNEL: &[Difference] = &[
    Difference {
        reason: GHOSTS,
        applies: |_, want, got| match (want, got) {
            (Outcome::Names(want), Outcome::Names(got)) => {
                let ghost = |(_, kind): &&(String, Kind)| *kind == Kind::CharDev;
                want.iter().all(|name| got.contains(name))
                    && got
                        .iter()
                        .filter(|name| !want.contains(name))
                        .all(|name| ghost(&name))
            }
            _ => false,
        },
    },
    Difference {
        reason: "what was unlinked in a lower is not copied up: a whiteout has its place in the index",
        applies: |op, _, got| {
            let taken = [libc::EEXIST, libc::ENOTDIR, libc::EISDIR, libc::ESTALE];
            matches!(op, Op::ChmodOpen { .. })
                && taken.iter().any(|errno| *got == Outcome::Errno(*errno))
        },
    },
];

/// The reason why kernel overlayfs may answer `got` where the model answers `want`.
pub fn of_kernel(op: &Op, want: &Outcome, got: &Outcome) -> Option<&'static str> {
    OF_KERNEL
        .iter()
        .find(|known| (known.applies)(op, want, got))
        .map(|known| known.reason)
}

/// The reason why a tree may be odd under kernel overlayfs.
pub fn oddity_of_kernel(oddity: &Oddity) -> Option<&'static str> {
    matches!(oddity, Oddity::Ghost(_)).then_some(GHOSTS)
}

/// Blurs in the model what kernel overlayfs may have changed by an operation that failed: it copies up
/// before it knows that a rename will not work, and the copy-up of a directory touches its parent.
pub fn blur_for_kernel(model: &mut Model, op: &Op, want: &Outcome) {
    if let (Op::Rename { from, to, .. }, Outcome::Errno(_)) = (op, want) {
        model.blur_parent_time(from);
        model.blur_parent_time(to);
    }
}
