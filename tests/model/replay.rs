//! One run: the same operations on the model and on a subject, compared after each and at the end.

use std::fmt::Write as _;
use std::path::{Path as HostPath, PathBuf};

use crate::differences;
use crate::direct::{self, Direct};
use crate::jail::{Jail, Oddity};
use crate::layers::{self, Layer, Meta};
use crate::model::Model;
use crate::mounts::mode::Mode;
use crate::mounts::{Dirs, Mount, Tmpfs};
use crate::ops::{Access, How, Op, Outcome};
use crate::tree::{InodeMap, Snapshot, compare, data_differs};

/// Whatever claims to be a union.
pub trait Subject {
    fn perform(&mut self, op: &Op) -> Outcome;
    fn snapshot(&mut self) -> (Snapshot, Vec<Oddity>);
    /// Closes every open file, unmounts, and mounts again.
    fn remount(&mut self);
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Which {
    /// Kernel overlayfs.
    Kernel,
    /// A plyfs mount, with these options beside the directories.
    Plyfs(&'static str),
    /// The union without a mount.
    Direct,
}

impl Which {
    /// The operations without those that the mode of this run has no request for: asked for plainly. Nor does it hold with
    /// what that mode does otherwise.
    fn possible(self, ops: &[Op]) -> Vec<Op> {
        let mode = Mode::of_run();
        let has = |how| match how {
            How::Replace => true,
            How::NoReplace => mode.is_new(),
            How::Exchange => mode.exchanges(),
        };
        let mut ops = ops.to_vec();
        if matches!(self, Self::Plyfs(_)) {
            for op in &mut ops {
                match op {
                    Op::Rename { how, .. } if !has(*how) => *how = How::Replace,
                    // Who only reads a lower file would go on with its old data.
                    Op::Open { flags, .. } if mode.passes() && flags.access == Access::Read => {
                        flags.access = Access::Both;
                    }
                    _ => {}
                }
            }
        }
        ops
    }

    fn start(self, dirs: &Dirs) -> Box<dyn Subject> {
        match self {
            Self::Kernel => Box::new(Mounted::new(dirs, Mount::kernel)),
            Self::Plyfs(profile) => {
                let dirs = Dirs {
                    profile,
                    ..dirs.clone()
                };
                Box::new(Mounted::new(&dirs, Mount::plyfs))
            }
            Self::Direct => Box::new(Direct::new(dirs)),
        }
    }
}

/// A union that is reached by system calls.
struct Mounted {
    dirs: Dirs,
    how: fn(&Dirs) -> Mount,
    // In this order, because the jail has to be left before the mount can end.
    live: Option<(Jail, Mount)>,
}

impl Mounted {
    fn new(dirs: &Dirs, how: fn(&Dirs) -> Mount) -> Self {
        let mut new = Self {
            dirs: dirs.clone(),
            how,
            live: None,
        };
        new.mount();
        new
    }

    fn mount(&mut self) {
        let mount = (self.how)(&self.dirs);
        self.live = Some((Jail::enter(mount.root()), mount));
    }

    fn unmount(&mut self) {
        if let Some((jail, mount)) = self.live.take() {
            drop(jail);
            mount.unmount();
        }
    }

    fn jail(&self) -> &Jail {
        &self.live.as_ref().expect("is mounted").0
    }
}

impl Subject for Mounted {
    fn perform(&mut self, op: &Op) -> Outcome {
        self.jail().perform(op)
    }

    fn snapshot(&mut self) -> (Snapshot, Vec<Oddity>) {
        self.jail().snapshot()
    }

    fn remount(&mut self) {
        self.unmount();
        self.mount();
    }
}

impl Drop for Mounted {
    fn drop(&mut self) {
        if !std::thread::panicking() {
            self.unmount();
        }
    }
}

/// Runs `ops` on a union of `stack` (the topmost first) and tells the first thing that is not as in the model.
pub fn replay(which: Which, stack: &[Layer], ops: &[Op]) -> Result<(), String> {
    replay_on(Hosts::One, which, stack, ops)
}

/// Where the lowers lie.
#[derive(Clone, Copy, PartialEq, Eq)]
pub enum Hosts {
    /// All on the file system of the upper.
    One,
    /// Every other one on a tmpfs, so that inode numbers come from two spaces.
    Two,
}

/// As [`replay`], with the lowers on one file system or on two.
pub fn replay_on(hosts: Hosts, which: Which, stack: &[Layer], ops: &[Op]) -> Result<(), String> {
    let base = tempfile::Builder::new()
        .prefix("plywood-model")
        .tempdir()
        .unwrap();
    let second = (hosts == Hosts::Two).then(|| Tmpfs::mount(&base.path().join("second")));
    let lowers: Vec<PathBuf> = (0..stack.len())
        .map(|at| match &second {
            Some(second) if at % 2 == 0 => second.path().join(format!("l{at}")),
            _ => base.path().join(format!("l{at}")),
        })
        .collect();
    for (layer, dir) in stack.iter().zip(&lowers) {
        std::fs::create_dir(dir).unwrap();
        layer.write(dir);
    }
    let ops = &which.possible(ops);
    let before: Vec<_> = lowers.iter().map(|dir| layers::fingerprint(dir)).collect();
    let (mut run, dirs) = Run::new(which, stack, base.path(), &lowers);
    // The last third of the operations is for the commit that follows.
    let (first, rest) = ops.split_at(ops.len() - ops.len() / 3);
    run.ops(&dirs, first)?;
    // What Plywood wrote, kernel overlayfs reads, and the other way round.
    let is_foreign = stack.iter().any(Layer::is_foreign_to_kernel);
    match which {
        Which::Kernel => run.look_again(Which::Direct, &dirs, "the same upper under Plywood")?,
        _ if is_foreign => {}
        _ => run.look_again(
            Which::Kernel,
            &dirs,
            "the same upper under kernel overlayfs",
        )?,
    }
    // Kernel overlayfs keeps hard links of lowers in its work directory, which a commit leaves behind.
    let loses_links = which == Which::Kernel && stack.iter().any(Layer::has_links);
    if !loses_links {
        run.ops_above(base.path(), &dirs, rest)?;
    }
    are_unchanged(&lowers, &before)
}

fn are_unchanged(lowers: &[PathBuf], before: &[Vec<String>]) -> Result<(), String> {
    for (dir, before) in lowers.iter().zip(before) {
        let after = layers::fingerprint(dir);
        if after != *before {
            let changed: Vec<_> = after.iter().filter(|line| !before.contains(line)).collect();
            return Err(format!("a lower layer has changed: {changed:#?}"));
        }
    }
    Ok(())
}

/// Runs `ops`, in turns, on two unions of the same lowers with an upper each, beside two without any that look on:
/// none may notice another.
pub fn replay_beside(which: Which, stack: &[Layer], ops: [&[Op]; 2]) -> Result<(), String> {
    let base = tempfile::Builder::new()
        .prefix("plywood-model")
        .tempdir()
        .unwrap();
    let lowers: Vec<PathBuf> = (0..stack.len())
        .map(|at| base.path().join(format!("l{at}")))
        .collect();
    for (layer, dir) in stack.iter().zip(&lowers) {
        std::fs::create_dir(dir).unwrap();
        layer.write(dir);
    }
    // Without an upper this is the root.
    layers::set_mtime(&lowers[0], Meta::plain(0o755).mtime);
    let before: Vec<_> = lowers.iter().map(|dir| layers::fingerprint(dir)).collect();
    let mut onlookers = Vec::new();
    for name in ["third", "fourth"] {
        let (mut run, mut dirs) = Run::new(which, stack, &base.path().join(name), &lowers);
        dirs.is_read_only = true;
        let mut subject = which.start(&dirs);
        run.look(subject.as_mut(), "without an upper")?;
        onlookers.push((run, subject));
    }
    let mut actors = Vec::new();
    for (name, ops) in ["one", "two"].into_iter().zip(ops) {
        let (run, dirs) = Run::new(which, stack, &base.path().join(name), &lowers);
        let subject = which.start(&dirs);
        actors.push((run, subject, which.possible(ops).into_iter()));
    }
    loop {
        let mut done = true;
        for (run, subject, ops) in &mut actors {
            if let Some(op) = ops.next() {
                run.op(subject.as_mut(), &op)?;
                done = false;
            }
        }
        if done {
            break;
        }
    }
    for (run, subject, _) in &mut actors {
        run.end(subject.as_mut())?;
    }
    for (run, subject) in &mut onlookers {
        run.look(subject.as_mut(), "beside two that write")?;
    }
    drop((actors, onlookers));
    are_unchanged(&lowers, &before)
}

/// Runs `ops` on a plyfs mount and on a kernel overlayfs mount of the same lowers, step by step: after each both have to
/// have answered what the model does, and the same; so at the end do their trees.
pub fn replay_on_both(options: &'static str, stack: &[Layer], ops: &[Op]) -> Result<(), String> {
    let base = tempfile::Builder::new()
        .prefix("plywood-model")
        .tempdir()
        .unwrap();
    let lowers: Vec<PathBuf> = (0..stack.len())
        .map(|at| base.path().join(format!("l{at}")))
        .collect();
    for (layer, dir) in stack.iter().zip(&lowers) {
        std::fs::create_dir(dir).unwrap();
        layer.write(dir);
    }
    let before: Vec<_> = lowers.iter().map(|dir| layers::fingerprint(dir)).collect();
    let plyfs = Which::Plyfs(options);
    let [(mut ours, mut mount), (mut kernels, mut overlay)] =
        [(plyfs, "ours"), (Which::Kernel, "kernel")].map(|(which, name)| {
            let (run, dirs) = Run::new(which, stack, &base.path().join(name), &lowers);
            let subject = which.start(&dirs);
            (run, subject)
        });
    for op in &plyfs.possible(ops) {
        let step = ours.op(mount.as_mut(), op)?;
        match (step, kernels.op(overlay.as_mut(), op)?) {
            (Step::Agreed { got, .. }, Step::Agreed { want, got: kernel }) => {
                if let Some(why) = kernels.disagree(&got.at_time_of(want), &kernel) {
                    return Err(format!("after\n{}kernel overlayfs: {why}", kernels.done));
                }
            }
            // What the kernel has closed with it is closed here, too.
            (_, Step::Excused) => {
                if let Op::ChmodOpen { slot, .. } = op {
                    ours.op(mount.as_mut(), &Op::Close { slot: *slot })?;
                }
            }
            _ => {}
        }
    }
    for when in ["at the end", "after a remount"] {
        let mut seen = ours.look(mount.as_mut(), when)?;
        let kernel = kernels.look(overlay.as_mut(), when)?;
        // Both took the time from the clock where the model says no more than that.
        for (path, item) in kernels.model.snapshot() {
            if let Some(seen) = seen.get_mut(&path) {
                seen.facts.mtime = item.facts.mtime;
            }
        }
        let why = compare(&seen, &kernel, kernels.began);
        if !why.is_empty() {
            let done = &kernels.done;
            return Err(format!(
                "after\n{done}{when}, kernel overlayfs beside plyfs:\n{why}"
            ));
        }
        for (run, subject) in [(&mut ours, &mut mount), (&mut kernels, &mut overlay)] {
            run.model.run(&Op::Remount);
            subject.remount();
        }
    }
    drop((mount, overlay));
    are_unchanged(&lowers, &before)
}

/// What became of an operation on one subject.
enum Step {
    /// It is nothing that one can compare.
    Skipped,
    /// The subject is known to do otherwise here.
    Excused,
    Agreed {
        want: Outcome,
        got: Outcome,
    },
}

struct Run {
    which: Which,
    model: Model,
    inodes: InodeMap,
    began: i64,
    done: String,
}

impl Run {
    /// Of one union below `base`, which has nothing in its upper.
    fn new(which: Which, stack: &[Layer], base: &HostPath, lowers: &[PathBuf]) -> (Self, Dirs) {
        let root = Meta::plain(0o755);
        let run = Self {
            which,
            model: layers::merge(stack, &root),
            inodes: InodeMap::default(),
            began: now(),
            done: String::new(),
        };
        let dirs = Dirs::make(base, lowers);
        layers::set_mtime(&dirs.upper, root.mtime);
        (run, dirs)
    }

    fn ops(&mut self, dirs: &Dirs, ops: &[Op]) -> Result<(), String> {
        let mut subject = self.which.start(dirs);
        self.look(subject.as_mut(), "right after mounting")?;
        for op in ops {
            self.op(subject.as_mut(), op)?;
        }
        self.end(subject.as_mut())
    }

    fn op(&mut self, subject: &mut dyn Subject, op: &Op) -> Result<Step, String> {
        let want = self.model.run(op);
        if want == Outcome::Skip {
            return Ok(Step::Skipped);
        }
        let _ = writeln!(self.done, "  {op:?}");
        if *op == Op::Remount {
            self.look(subject, "before a remount")?;
            subject.remount();
            self.look(subject, "after a remount")?;
            return Ok(Step::Skipped);
        }
        if self.which == Which::Kernel {
            differences::blur_for_kernel(&mut self.model, op, &want);
        }
        let got = subject.perform(op);
        let Some(why) = self.disagree(&want, &got) else {
            return Ok(Step::Agreed { want, got });
        };
        if self.which != Which::Kernel || differences::of_kernel(op, &want, &got).is_none() {
            return Err(format!("after\n{}{why}", self.done));
        }
        // From here on the two open files are no longer the same.
        if let Op::ChmodOpen { slot, .. } = op {
            self.model.run(&Op::Close { slot: *slot });
            subject.perform(&Op::Close { slot: *slot });
        }
        Ok(Step::Excused)
    }

    fn end(&mut self, subject: &mut dyn Subject) -> Result<(), String> {
        self.look(subject, "at the end")?;
        self.model.run(&Op::Remount);
        subject.remount();
        self.look(subject, "after the last remount")?;
        Ok(())
    }

    fn disagree(&self, want: &Outcome, got: &Outcome) -> Option<String> {
        match (want, got) {
            (Outcome::Facts(want), Outcome::Facts(got)) => want.differs(got, self.began),
            _ if want == got => None,
            (Outcome::Data(want), Outcome::Data(got)) => Some(data_differs(want, got)),
            _ => Some(format!("expected {want:?}, seen {got:?}")),
        }
    }

    fn look(&mut self, subject: &mut dyn Subject, when: &str) -> Result<Snapshot, String> {
        let want = self.model.snapshot();
        let (seen, odd) = subject.snapshot();
        let mut why = compare(&want, &seen, self.began);
        self.inodes.check(&want, &seen, &mut why);
        for oddity in odd {
            if self.which != Which::Kernel || differences::oddity_of_kernel(&oddity).is_none() {
                let _ = writeln!(why, "  {oddity:?}");
            }
        }
        if why.is_empty() {
            Ok(seen)
        } else {
            Err(format!("after\n{}{when}:\n{why}", self.done))
        }
    }

    /// The same directories, mounted by someone else. Inode numbers are then others'.
    fn look_again(&mut self, by: Which, dirs: &Dirs, what: &str) -> Result<(), String> {
        self.inodes = InodeMap::default();
        let mut subject = by.start(dirs);
        let which = std::mem::replace(&mut self.which, by);
        let result = self.look(subject.as_mut(), what);
        self.which = which;
        result.map(drop)
    }

    /// Commits: the upper becomes the topmost lower below a fresh one, and work goes on.
    fn ops_above(&mut self, base: &HostPath, dirs: &Dirs, ops: &[Op]) -> Result<(), String> {
        if self.which != Which::Kernel {
            let union = direct::open(dirs);
            union
                .settle_links()
                .map_err(|error| format!("links do not settle: {error}"))?;
            union
                .complete()
                .map_err(|error| format!("the upper is not completed: {error}"))?;
            drop(union);
            std::fs::remove_dir_all(&dirs.work).unwrap();
        }
        let mut lowers = vec![dirs.upper.clone()];
        lowers.extend(dirs.lowers.iter().cloned());
        let before = layers::fingerprint(&dirs.upper);
        let above = Dirs::make(&base.join("above"), &lowers);
        // The root shows the new upper's attributes, which nobody copies from the old one.
        let root = Meta::plain(0o755);
        layers::set_mtime(&above.upper, root.mtime);
        self.model.set_root(&root);
        self.inodes = InodeMap::default();
        self.done.push_str("  commit\n");
        self.ops(&above, ops)?;
        if layers::fingerprint(&dirs.upper) != before {
            return Err(format!(
                "after\n{}the committed layer has changed",
                self.done
            ));
        }
        Ok(())
    }
}

fn now() -> i64 {
    let since = std::time::SystemTime::now()
        .duration_since(std::time::UNIX_EPOCH)
        .unwrap();
    i64::try_from(since.as_secs()).unwrap()
}
