//! Many threads on one tree. No model can follow them, so only what holds for any order is checked:
//! no operation fails in a way that no order explains, nobody hangs or panics, listings are
//! consistent, what is seen at the end is seen again after a remount, and the lowers are untouched.

use std::path::PathBuf;
use std::sync::Arc;

use proptest::prelude::*;
use proptest::strategy::ValueTree;
use proptest::test_runner::{Config, RngAlgorithm, TestRng, TestRunner};

use crate::direct::{self, Direct};
use crate::jail::{Jail, Oddity};
use crate::layers::{self, Layer};
use crate::mounts::{Dirs, Mount};
use crate::ops::{self, Op, Outcome};
use crate::replay::Subject;
use crate::tree::{Snapshot, compare};

const THREADS: u8 = 8;

/// Errors that no order of operations explains.
const NEVER: [i32; 9] = [
    libc::EIO,
    libc::ENOTCONN,
    libc::ECONNABORTED,
    libc::ENOSYS,
    libc::EXDEV,
    libc::ESTALE,
    libc::EUCLEAN,
    libc::EOPNOTSUPP,
    libc::EINTR,
];

fn draw<T>(seed: u8, strategy: impl Strategy<Value = T>) -> T {
    let rng = TestRng::from_seed(RngAlgorithm::ChaCha, &[seed; 32]);
    let mut runner = TestRunner::new_with_rng(Config::default(), rng);
    strategy
        .new_tree(&mut runner)
        .expect("random values can be drawn")
        .current()
}

/// What one thread does.
fn program(round: u8, thread: u8, len: usize) -> Vec<Op> {
    let ops = draw(
        round.wrapping_mul(31) ^ thread,
        prop::collection::vec(ops::op(), len),
    );
    ops.into_iter().filter(|op| *op != Op::Remount).collect()
}

/// Layers with many files and directories in them.
fn full_stack(round: u8) -> Vec<Layer> {
    let mut runner_seed = round;
    loop {
        let stack = draw(runner_seed, layers::stack(false));
        if stack.len() > 1 && stack.iter().map(|layer| layer.entries.len()).sum::<usize>() > 20 {
            return stack;
        }
        runner_seed = runner_seed.wrapping_add(101);
    }
}

struct Ground {
    dirs: Dirs,
    before: Vec<Vec<String>>,
    base: tempfile::TempDir,
}

impl Ground {
    fn new(round: u8) -> Self {
        let base = tempfile::Builder::new()
            .prefix("plywood-stress")
            .tempdir()
            .unwrap();
        let stack = full_stack(round);
        let lowers: Vec<PathBuf> = (0..stack.len())
            .map(|at| base.path().join(format!("l{at}")))
            .collect();
        for (layer, dir) in stack.iter().zip(&lowers) {
            std::fs::create_dir(dir).unwrap();
            layer.write(dir);
        }
        let before = lowers.iter().map(|dir| layers::fingerprint(dir)).collect();
        Self {
            dirs: Dirs::make(base.path(), &lowers),
            before,
            base,
        }
    }

    fn check(&self, seen: &(Snapshot, Vec<Oddity>), again: &(Snapshot, Vec<Oddity>)) {
        assert!(seen.1.is_empty(), "odd: {:?}", seen.1);
        assert!(again.1.is_empty(), "odd after a remount: {:?}", again.1);
        let why = compare(&seen.0, &again.0, 0);
        assert!(why.is_empty(), "a remount has changed:\n{why}");
        let moved: Vec<_> = seen
            .0
            .iter()
            .filter(|(path, item)| again.0[*path].ino != item.ino)
            .collect();
        assert!(
            moved.is_empty(),
            "a remount has changed inode numbers: {moved:?}"
        );
        for (dir, before) in self.dirs.lowers.iter().zip(&self.before) {
            assert_eq!(
                layers::fingerprint(dir),
                *before,
                "a lower layer has changed"
            );
        }
        // Kernel overlayfs sees the same, but for the links of files whose other names layers hide.
        let mount = Mount::kernel(&self.dirs);
        let jail = Jail::enter(mount.root());
        let (kernel, _) = jail.snapshot();
        drop(jail);
        mount.unmount();
        let mut seen = seen.0.clone();
        seen.values_mut().for_each(|item| item.facts.nlink = None);
        let why = compare(&seen, &kernel, 0);
        assert!(
            why.is_empty(),
            "kernel overlayfs sees another tree below {}:\n{why}",
            self.base.path().display()
        );
    }
}

fn judge(thread: u8, done: &[(Op, Outcome)]) {
    let wrong: Vec<_> = done
        .iter()
        .filter(|(_, outcome)| matches!(outcome, Outcome::Errno(errno) if NEVER.contains(errno)))
        .collect();
    assert!(wrong.is_empty(), "thread {thread}: {wrong:?}");
}

#[test]
fn eight_threads_on_one_union() {
    let len = crate::from_env("PLYWOOD_STRESS_OPS", 1500) as usize;
    for round in 0..3 {
        let ground = Ground::new(round);
        let union = Arc::new(direct::open(&ground.dirs));
        std::thread::scope(|scope| {
            let threads: Vec<_> = (0..THREADS)
                .map(|thread| {
                    let mut user = Direct::sharing(&ground.dirs, Arc::clone(&union));
                    scope.spawn(move || {
                        let run = |op: Op| (op.clone(), user.perform(&op));
                        let done: Vec<_> =
                            program(round, thread, len).into_iter().map(run).collect();
                        judge(thread, &done);
                    })
                })
                .collect();
            for thread in threads {
                thread.join().expect("no thread panics");
            }
        });
        let mut user = Direct::sharing(&ground.dirs, union);
        let seen = user.snapshot();
        user.remount();
        let again = user.snapshot();
        drop(user);
        ground.check(&seen, &again);
    }
}

#[test]
fn eight_threads_on_one_mount() {
    let len = crate::from_env("PLYWOOD_STRESS_OPS", 1000) as usize;
    for round in 0..3 {
        let ground = Ground::new(round);
        let mount = Mount::plyfs(&ground.dirs);
        std::thread::scope(|scope| {
            for thread in 0..THREADS {
                let jail = Jail::enter(mount.root());
                scope.spawn(move || {
                    let run = |op: Op| (op.clone(), jail.perform(&op));
                    let done: Vec<_> = program(round, thread, len).into_iter().map(run).collect();
                    judge(thread, &done);
                });
            }
        });
        let look = |mount: Mount| {
            let jail = Jail::enter(mount.root());
            let seen = jail.snapshot();
            drop(jail);
            mount.unmount();
            seen
        };
        let seen = look(mount);
        let again = look(Mount::plyfs(&ground.dirs));
        ground.check(&seen, &again);
    }
}
