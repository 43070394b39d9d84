//! Starting a plyfs, and the directory that it shares with plyd.

use std::ffi::{OsStr, OsString};
use std::fs::{self, File, OpenOptions};
use std::io::{self, Read, Seek, SeekFrom};
use std::os::fd::{OwnedFd, RawFd};
use std::os::unix::ffi::{OsStrExt, OsStringExt};
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use super::super::types::*;
use super::{ANSWER, START};
use crate::cow::UnionConfig;
use crate::fuse::control::{ControlClient, Hello};
use crate::store::create_dir;
use crate::store::trash::Trash;
use crate::store::view::Verify;
use crate::sys::{mountinfo, spawn};

/// Under which number the child finds its /dev/fuse.
const FUSE_FD: RawFd = 3;
/// How much of a failed plyfs's log goes into the error.
const LAST_WORDS: u64 = 2000;
/// How much of the log of a mount that has ended is kept.
const PASSED_ON: u64 = 64 << 10;

/// `STATE/mounts/ID`; see the snapshotter's essay.
#[derive(Debug)]
pub(super) struct Place {
    dir: PathBuf,
}

impl Place {
    pub(super) fn new(dir: PathBuf) -> Self {
        Self { dir }
    }

    pub(super) fn root(&self) -> PathBuf {
        self.dir.join("root")
    }

    pub(super) fn socket(&self) -> PathBuf {
        self.dir.join("ctl.sock")
    }

    fn lowers(&self) -> PathBuf {
        self.dir.join("lowers")
    }

    fn log(&self) -> PathBuf {
        self.dir.join("plyfs.log")
    }

    /// Makes everything that a plyfs for `union` needs.
    pub(super) fn make(&self, union: &UnionConfig) -> Result<()> {
        let root = self.root();
        create_dir(&self.dir, 0o700)
            .and_then(|()| create_dir(&root, 0o755))
            .map_err(io_error("make", &root))?;
        let mut lines = Vec::new();
        for lower in &union.lowers {
            lines.extend_from_slice(lower.as_os_str().as_bytes());
            lines.push(b'\n');
        }
        let lowers = self.lowers();
        fs::write(&lowers, lines).map_err(io_error("write", &lowers))
    }

    /// Removes it; what lies where nothing is mounted any more goes through `trash`. Refused as long as
    /// something is mounted in it, which is not ours, for ours went with the mount at the root.
    pub(super) fn remove(&self, trash: &Trash) -> Result<()> {
        let table = mountinfo::read().map_err(io_error("look for mounts below", &self.dir))?;
        if let Some(foreign) = table
            .iter()
            .find(|entry| entry.target.starts_with(&self.dir))
        {
            return Err(Error::ForeignMount {
                place: self.dir.clone(),
                mount: foreign.target.clone(),
            });
        }
        self.pass_on_words();
        let gone = |result: io::Result<()>| match result {
            Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(()),
            result => result,
        };
        for file in [self.socket(), self.lowers(), self.log()] {
            gone(fs::remove_file(&file)).map_err(io_error("remove", &file))?;
        }
        let root = self.root();
        let removed = match fs::remove_dir(&root) {
            // Someone who did not notice the end of a mount wrote to the directory below it.
            Err(error) if error.kind() == io::ErrorKind::DirectoryNotEmpty => {
                tracing::warn!(path = %root.display(), "removing what was written where nothing is mounted");
                trash.put(&root)
            }
            removed => removed,
        };
        gone(removed).map_err(io_error("remove", &root))?;
        gone(fs::remove_dir(&self.dir)).map_err(io_error("remove", &self.dir))
    }

    /// What the process warned of, for plyd's log: its own is about to go.
    fn pass_on_words(&self) {
        let mount = self.dir.display();
        let (words, before) = match self.words(PASSED_ON) {
            Ok(words) => words,
            Err(error) => {
                tracing::warn!(%mount, %error, "what a plyfs that has ended had said cannot be read");
                return;
            }
        };
        if before > 0 {
            tracing::warn!(%mount, bytes = before, "what a plyfs that has ended had said first is not kept");
        }
        for line in words.lines() {
            // Its time and its level come first, unless it is no line of the log.
            let level = line.split_whitespace().nth(1);
            if !matches!(level, None | Some("INFO" | "DEBUG" | "TRACE")) {
                tracing::warn!(%mount, "a plyfs that has ended had said: {line}");
            }
        }
    }

    /// The end of what the process said, as an addition to an error.
    pub(super) fn last_words(&self) -> String {
        match self.words(LAST_WORDS) {
            Ok((words, _)) if words.trim().is_empty() => String::new(),
            Ok((words, _)) => format!("; it said: {}", words.trim()),
            Err(error) => format!("; what it said cannot be read: {error}"),
        }
    }

    /// The last lines of the log, `most` bytes of it at most, and how many bytes come before. None of it is there yet where no process
    /// was started.
    fn words(&self, most: u64) -> io::Result<(String, u64)> {
        let mut log = match File::open(self.log()) {
            Err(error) if error.kind() == io::ErrorKind::NotFound => {
                return Ok((String::new(), 0));
            }
            log => log?,
        };
        let mut before = log.metadata()?.len().saturating_sub(most);
        // One byte more tells whether a line starts there.
        log.seek(SeekFrom::Start(before.saturating_sub(1)))?;
        let mut tail = Vec::new();
        // Somebody may write to it still.
        log.take(most + 1).read_to_end(&mut tail)?;
        if before > 0 {
            let start = tail.iter().position(|byte| *byte == b'\n');
            let start = start.map_or(tail.len(), |end| end + 1);
            before += start as u64 - 1;
            tail.drain(..start);
        }
        Ok((String::from_utf8_lossy(&tail).into_owned(), before))
    }
}

/// The plyfs program: the one configured, or the one beside this program, or the one on PATH.
pub(super) fn find(configured: Option<&Path>) -> Result<PathBuf> {
    if let Some(program) = configured {
        return Ok(program.to_owned());
    }
    let executable = std::env::current_exe().map_err(io_error("find", Path::new("plyfs")))?;
    let beside = executable.with_file_name("plyfs");
    let path = std::env::var_os("PATH").unwrap_or_default();
    std::iter::once(beside)
        .chain(std::env::split_paths(&path).map(|dir| dir.join("plyfs")))
        .find(|program| program.is_file())
        .ok_or(Error::NoPlyfs { executable })
}

/// Starts `program` for the mount at `place`, whose descriptor is `fuse`.
pub(super) fn start(
    program: &Path,
    place: &Place,
    union: &UnionConfig,
    verify: Verify,
    fuse: &OwnedFd,
) -> Result<Child> {
    let failed = io_error("start", program);
    let log = OpenOptions::new()
        .append(true)
        .create(true)
        .mode(0o600)
        .open(place.log());
    let prepared = log.and_then(|log| Ok((log.try_clone()?, log, fuse.try_clone()?)));
    let (stdout, stderr, fuse): (File, File, OwnedFd) = match prepared {
        Ok(prepared) => prepared,
        Err(error) => return Err(failed(error)),
    };
    let mut command = Command::new(program);
    command
        .arg("--fuse-fd")
        .arg(FUSE_FD.to_string())
        .arg("--control")
        .arg(place.socket())
        .arg("-o")
        .arg(options(place, union, verify))
        .arg(place.root())
        .current_dir("/")
        .stdin(Stdio::null())
        .stdout(stdout)
        .stderr(stderr);
    spawn::detached_with_fd(&mut command, fuse, FUSE_FD);
    command.spawn().map_err(failed)
}

fn options(place: &Place, union: &UnionConfig, verify: Verify) -> OsString {
    let mut options = OsString::new();
    let mut add = |name: &str, path: &Path| {
        if !options.is_empty() {
            options.push(",");
        }
        options.push(name);
        options.push("=");
        options.push(escaped(path.as_os_str()));
    };
    if !union.lowers.is_empty() {
        add("lowerdir_file", &place.lowers());
    }
    if let Some(view) = &union.view {
        add("view", view.path());
        add("verify", verify.as_str().as_ref());
    }
    if let Some(upper) = &union.upper {
        add("upperdir", &upper.dir);
        add("workdir", &upper.work);
    }
    options
}

fn escaped(word: &OsStr) -> OsString {
    let mut bytes = Vec::with_capacity(word.len());
    for &byte in word.as_bytes() {
        if matches!(byte, b',' | b':' | b'\\') {
            bytes.push(b'\\');
        }
        bytes.push(byte);
    }
    OsString::from_vec(bytes)
}

/// Waits until the kernel's first request is answered, so that whoever touches the mount is served.
pub(super) fn wait_until_served(
    child: &mut Child,
    place: &Place,
) -> io::Result<(ControlClient, Hello)> {
    let deadline = Instant::now() + START;
    let mut pause = Duration::from_millis(1);
    loop {
        let problem = match ControlClient::connect(&place.socket(), ANSWER) {
            Ok((control, hello)) if hello.serving => return Ok((control, hello)),
            Ok(_) => "it does not answer the kernel".to_owned(),
            Err(error) => error.to_string(),
        };
        if let Some(status) = child.try_wait()? {
            return Err(io::Error::other(format!("it ended with {status}")));
        }
        if Instant::now() >= deadline {
            return Err(io::Error::other(problem));
        }
        std::thread::sleep(pause);
        pause = (pause * 2).min(Duration::from_millis(50));
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::cow::UpperConfig;

    /// The whole log was read for its end, and nothing was said where it could not be.
    #[test]
    fn of_a_log_whole_lines_from_its_end_are_read() {
        let dir = tempfile::tempdir().unwrap();
        let place = Place::new(dir.path().to_owned());
        let words = |most| place.words(most).unwrap();
        assert_eq!(words(10), (String::new(), 0));
        fs::write(place.log(), "one\ntwo\nthree\n").unwrap();
        for (most, kept, before) in [
            (14, "one\ntwo\nthree\n", 0),
            (13, "two\nthree\n", 4),
            (10, "two\nthree\n", 4),
            (9, "three\n", 8),
            (6, "three\n", 8),
            (5, "", 14),
        ] {
            assert_eq!(words(most), (kept.to_owned(), before), "{most}");
        }
        assert_eq!(place.last_words(), "; it said: one\ntwo\nthree");
        // Longer than any memory; what a hole has is read as one long line.
        let log = OpenOptions::new().write(true).open(place.log()).unwrap();
        log.set_len(1 << 40).unwrap();
        assert_eq!(words(1000), (String::new(), 1 << 40));
        fs::remove_file(place.log()).unwrap();
        fs::create_dir(place.log()).unwrap();
        let told = place.last_words();
        assert!(
            told.starts_with("; what it said cannot be read: "),
            "{told}"
        );
    }

    #[test]
    fn paths_are_escaped() {
        let union = UnionConfig {
            lowers: vec!["/l".into()],
            upper: Some(UpperConfig {
                dir: "/a,b/upper".into(),
                work: "/a:b\\/work".into(),
            }),
            ..UnionConfig::default()
        };
        assert_eq!(
            options(&Place::new("/s".into()), &union, Verify::First),
            "lowerdir_file=/s/lowers,upperdir=/a\\,b/upper,workdir=/a\\:b\\\\/work"
        );
    }
}
