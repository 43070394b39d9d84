//! Deletes trees in the background, and never anything but the trees it was given.
//!
//! A tree becomes garbage by one rename into the trash directory, so that a crash in the middle
//! of a deletion leaves nothing half-deleted where it was; what is in the trash is deleted by a
//! thread, after a crash by the next process's. The thread knows no recursion: it empties one
//! directory at a time, unlinks what is not a directory and moves directories up into the trash.
//! So depth costs nothing, symbolic links are unlinked and not followed, and a directory with a mount
//! on it cannot be entered by mistake: the kernel refuses to rename it.

use std::collections::VecDeque;
use std::fs;
use std::io;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::thread::JoinHandle;

use parking_lot::{Condvar, Mutex};

use super::durable::create_dir;

/// The trash of one file system.
#[derive(Debug)]
pub struct Trash {
    shared: Arc<Shared>,
    thread: Option<JoinHandle<()>>,
}

#[derive(Debug)]
struct Shared {
    dir: PathBuf,
    next: AtomicU64,
    state: Mutex<State>,
    changed: Condvar,
}

#[derive(Debug, Default)]
struct State {
    waiting: VecDeque<PathBuf>,
    working: bool,
    ending: bool,
}

impl Trash {
    /// Where it lies.
    pub fn dir(&self) -> &Path {
        &self.shared.dir
    }

    /// Opens the trash in `dir`, on the file system of all that will be thrown into it, and goes on
    /// with what it still holds.
    pub fn open(dir: &Path) -> io::Result<Self> {
        create_dir(dir, 0o700)?;
        let mut waiting = VecDeque::new();
        let mut next = 0;
        for entry in fs::read_dir(dir)? {
            let entry = entry?;
            let number = entry
                .file_name()
                .to_str()
                .and_then(|name| name.parse().ok());
            next = next.max(number.map_or(0, |number: u64| number + 1));
            waiting.push_back(entry.path());
        }
        let shared = Arc::new(Shared {
            dir: dir.to_owned(),
            next: AtomicU64::new(next),
            state: Mutex::new(State {
                waiting,
                ..State::default()
            }),
            changed: Condvar::new(),
        });
        let worker = Arc::clone(&shared);
        let thread = std::thread::Builder::new()
            .name("trash".to_owned())
            .spawn(move || worker.run())?;
        Ok(Self {
            shared,
            thread: Some(thread),
        })
    }

    /// Moves `path` here and has it deleted. Not there is as good as deleted.
    pub fn put(&self, path: &Path) -> io::Result<()> {
        match self.shared.take(path) {
            Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(()),
            Err(error) => Err(error),
            Ok(garbage) => {
                self.shared.state.lock().waiting.push_back(garbage);
                self.shared.changed.notify_all();
                Ok(())
            }
        }
    }

    /// Waits until all that was put here is deleted.
    pub fn wait_until_empty(&self) {
        let mut state = self.shared.state.lock();
        while state.working || !state.waiting.is_empty() {
            self.shared.changed.wait(&mut state);
        }
    }
}

impl Drop for Trash {
    /// Ends after the directory at hand; the next process goes on with the rest.
    fn drop(&mut self) {
        self.shared.state.lock().ending = true;
        self.shared.changed.notify_all();
        if let Some(thread) = self.thread.take() {
            // A panic in there was reported when it happened.
            let _ = thread.join();
        }
    }
}

impl Shared {
    fn take(&self, path: &Path) -> io::Result<PathBuf> {
        let number = self.next.fetch_add(1, Ordering::Relaxed);
        let garbage = self.dir.join(number.to_string());
        fs::rename(path, &garbage)?;
        Ok(garbage)
    }

    fn run(&self) {
        loop {
            let path = {
                let mut state = self.state.lock();
                state.working = false;
                loop {
                    if state.ending {
                        return;
                    }
                    if let Some(path) = state.waiting.pop_front() {
                        state.working = true;
                        break path;
                    }
                    self.changed.notify_all();
                    self.changed.wait(&mut state);
                }
            };
            match self.delete(&path) {
                Ok(more) => self.state.lock().waiting.extend(more),
                Err(error) => {
                    tracing::warn!(path = %path.display(), %error, "cannot delete; it is tried again at the next start");
                }
            }
        }
    }

    /// Deletes `path`, whose own directories become new garbage that is answered.
    fn delete(&self, path: &Path) -> io::Result<Vec<PathBuf>> {
        if !fs::symlink_metadata(path)?.is_dir() {
            fs::remove_file(path)?;
            return Ok(Vec::new());
        }
        let mut moved = Vec::new();
        for entry in fs::read_dir(path)? {
            let entry = entry?;
            let child = entry.path();
            let outcome = if !entry.file_type()?.is_dir() {
                fs::remove_file(&child)
            } else if fs::remove_dir(&child).is_ok() {
                Ok(())
            } else {
                self.take(&child).map(|garbage| moved.push(garbage))
            };
            if let Err(error) = outcome {
                tracing::warn!(path = %child.display(), %error, "cannot delete");
            }
        }
        // Fails if something above could not be deleted; that was said already.
        let _ = fs::remove_dir(path);
        Ok(moved)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn deletes_deep_trees_and_no_target_of_a_link() {
        let tmp = tempfile::tempdir().unwrap();
        let keep = tmp.path().join("keep");
        fs::create_dir(&keep).unwrap();
        fs::write(keep.join("file"), b"1").unwrap();
        let tree = tmp.path().join("tree");
        let mut deep = tree.clone();
        for _ in 0..300 {
            deep.push("directory");
        }
        fs::create_dir_all(&deep).unwrap();
        fs::write(deep.join("file"), b"2").unwrap();
        std::os::unix::fs::symlink(&keep, tree.join("link")).unwrap();
        std::os::unix::fs::symlink(&keep, tmp.path().join("root-link")).unwrap();

        let trash = Trash::open(&tmp.path().join("trash")).unwrap();
        trash.put(&tree).unwrap();
        trash.put(&tmp.path().join("root-link")).unwrap();
        trash.put(&tmp.path().join("missing")).unwrap();
        trash.wait_until_empty();
        assert_eq!(fs::read_dir(tmp.path().join("trash")).unwrap().count(), 0);
        assert!(!tree.exists());
        assert_eq!(fs::read(keep.join("file")).unwrap(), b"1");
    }

    #[test]
    fn goes_on_with_what_a_crash_left() {
        let tmp = tempfile::tempdir().unwrap();
        fs::create_dir_all(tmp.path().join("7/a/b")).unwrap();
        fs::write(tmp.path().join("7/a/b/c"), b"").unwrap();
        let trash = Trash::open(tmp.path()).unwrap();
        trash.wait_until_empty();
        assert_eq!(fs::read_dir(tmp.path()).unwrap().count(), 0);
    }

    #[test]
    fn never_enters_a_mount() {
        use nix::mount::{MntFlags, MsFlags, mount, umount2};
        let tmp = tempfile::tempdir().unwrap();
        let outside = tmp.path().join("outside");
        fs::create_dir(&outside).unwrap();
        fs::write(outside.join("precious"), b"1").unwrap();
        let tree = tmp.path().join("tree");
        fs::create_dir_all(tree.join("a/mounted")).unwrap();
        let none: Option<&str> = None;
        mount(
            Some(&outside),
            &tree.join("a/mounted"),
            none,
            MsFlags::MS_BIND,
            none,
        )
        .unwrap();
        let trash = Trash::open(&tmp.path().join("trash")).unwrap();
        trash.put(&tree).unwrap();
        trash.wait_until_empty();
        assert_eq!(fs::read(outside.join("precious")).unwrap(), b"1");
        for entry in fs::read_dir(tmp.path().join("trash")).unwrap() {
            let _ = umount2(&entry.unwrap().path().join("mounted"), MntFlags::MNT_DETACH);
        }
    }
}
