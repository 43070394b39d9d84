//! The OCI runtime (runc or crun): finding one that works on this host, and what it says when it fails.
//!
//! A runtime may be installed and still refuse the host (crun 1.8 does where cgroup v1 hierarchies and
//! an empty v2 one are mounted together), so the choice is made by trying: a container is created from
//! an empty root whose program does not exist. A runtime that complains about the missing program, and
//! about nothing before it, has made the namespaces, the cgroups and the mounts.

use std::fs;
use std::io;
use std::os::unix::fs::{DirBuilderExt, PermissionsExt};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use super::user::IF_DAMAGED;
use crate::sys::spawn;

/// Names to look for, the more widely proven first.
const NAMES: [&str; 2] = ["runc", "crun"];
/// Where distributions put them, should PATH not say so.
const PLACES: [&str; 6] = [
    "/usr/local/sbin",
    "/usr/local/bin",
    "/usr/sbin",
    "/usr/bin",
    "/sbin",
    "/bin",
];

/// `run`'s exit code when the engine failed.
pub const ENGINE_FAILED: i32 = 125;
/// `run`'s exit code when the program cannot be executed.
pub const CANNOT_EXECUTE: i32 = 126;
/// `run`'s exit code when there is no such program.
pub const NOT_FOUND: i32 = 127;

/// An OCI runtime that works on this host.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct OciRuntime {
    /// The program.
    pub path: PathBuf,
    /// The first line of its `--version`.
    pub version: String,
}

/// Why there is no OCI runtime to use.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// None is installed.
    #[error(
        "there is no OCI runtime on this host; install runc (`apt-get install runc`, `dnf install runc`, `zypper install runc`, `apk add runc`), or name one with --oci-runtime"
    )]
    Missing,
    /// The configured one is not a program.
    #[error(
        "the OCI runtime {path} cannot be executed: {source}; name runc or crun with --oci-runtime, or leave that out: the first that works is used then"
    )]
    NotExecutable {
        /// The program.
        path: PathBuf,
        /// What the host said.
        source: io::Error,
    },
    /// The configured one refuses this host, or is none.
    #[error(
        "the OCI runtime {path} does not work on this host, it says: {problem}; name another one with --oci-runtime, or leave that out: the first of runc and crun that works is used then"
    )]
    Useless {
        /// The program.
        path: PathBuf,
        /// What it said.
        problem: String,
    },
    /// All that are installed refuse this host.
    #[error("no OCI runtime works on this host: {}; install another one, or name it with --oci-runtime", .problems.join("; "))]
    Refused {
        /// What each said.
        problems: Vec<String>,
    },
    /// The trial could not be set up.
    #[error("cannot try the OCI runtime in {path}: {source}")]
    Scratch {
        /// Directory of the trial.
        path: PathBuf,
        /// What the host said.
        source: io::Error,
    },
}

impl OciRuntime {
    /// Finds a runtime and tries it in a directory of its own below `scratch`. `configured` is the
    /// only candidate if it is given.
    pub fn find(configured: Option<&Path>, scratch: &Path) -> Result<Self, Error> {
        let candidates = match configured {
            Some(path) => vec![named(path)?],
            None => NAMES.iter().flat_map(|name| on_path(name)).collect(),
        };
        if candidates.is_empty() {
            return Err(Error::Missing);
        }
        let mut problems = Vec::new();
        for path in candidates {
            let version = match spawn::version(&path) {
                Ok(version) => version,
                Err(source) if configured.is_some() => {
                    return Err(Error::NotExecutable { path, source });
                }
                Err(error) => {
                    problems.push(format!("{} cannot be executed: {error}", path.display()));
                    continue;
                }
            };
            match trial(&path, scratch)? {
                None => return Ok(Self { path, version }),
                Some(problem) if configured.is_some() => {
                    return Err(Error::Useless { path, problem });
                }
                Some(problem) => problems.push(format!("{} says: {problem}", path.display())),
            }
        }
        Err(Error::Refused { problems })
    }

    /// Whether the program that is configured is there and answers. Whether it works on this host is for
    /// [`find`](Self::find) to try.
    pub fn check(configured: &Path) -> Result<(), Error> {
        let path = named(configured)?;
        match spawn::version(&path) {
            Ok(_) => Ok(()),
            Err(source) => Err(Error::NotExecutable { path, source }),
        }
    }
}

/// The program of that name or path.
fn named(configured: &Path) -> Result<PathBuf, Error> {
    let fail = |source| Error::NotExecutable {
        path: configured.to_owned(),
        source,
    };
    if configured.components().count() > 1 || configured.is_absolute() {
        // Shims run elsewhere.
        return std::path::absolute(configured).map_err(fail);
    }
    let found = on_path(&configured.to_string_lossy());
    let none = || io::Error::new(io::ErrorKind::NotFound, "there is none on PATH");
    found.into_iter().next().ok_or_else(|| fail(none()))
}

/// The runtime's command line up to the subcommand; its errors go to `log` as JSON lines.
pub fn command(program: &Path, root: &Path, log: &Path) -> Command {
    let mut command = Command::new(program);
    command.arg("--root").arg(root);
    command.arg("--log").arg(log);
    command.args(["--log-format", "json"]);
    command
}

/// What a runtime's failure means: the exit code that `run` owes its caller, and a sentence.
pub fn failure(log: &str, stderr: &str) -> (i32, String) {
    let mut from_log = log.lines().filter_map(|line| {
        let entry: serde_json::Value = serde_json::from_str(line).ok()?;
        (entry["level"] == "error").then(|| entry["msg"].as_str().map(str::to_owned))?
    });
    let message = from_log
        .next_back()
        .or_else(|| {
            let line = stderr.lines().map(str::trim).rfind(|line| !line.is_empty());
            line.map(str::to_owned)
        })
        .unwrap_or_else(|| "the OCI runtime failed without saying why".to_owned());
    let advice = match message.to_lowercase().contains("input/output error") {
        true => IF_DAMAGED,
        false => "",
    };
    match about_working_dir(&message) {
        Some(message) => (CANNOT_EXECUTE, message + advice),
        None => (classify(&message), message + advice),
    }
}

/// What it means that a process which the OCI runtime had started ended with `code` before it ran its program; `words`
/// is what it wrote.
pub fn not_executed(code: i32, words: &str) -> (i32, String) {
    // crun's are JSON, as in its log, and coloured on a terminal.
    let words = without_colours(words);
    let (class, mut message) = failure(&words, &words);
    if class == NOT_FOUND {
        // Else the runtime had not started it.
        message += "; the file is there, but the interpreter or loader that it names is not";
    }
    match words.trim().is_empty() {
        // Of a signal, say, for want of memory.
        true => (
            ENGINE_FAILED,
            format!("its process ended before it ran the program, with exit code {code}"),
        ),
        false if class == NOT_FOUND => (NOT_FOUND, message),
        false => (CANNOT_EXECUTE, message),
    }
}

fn without_colours(words: &str) -> String {
    let mut parts = words.split("\x1b[");
    let first = parts.next().unwrap_or_default();
    let rest = parts.map(|part| part.split_once('m').map_or(part, |(_, text)| text));
    std::iter::once(first).chain(rest).collect()
}

/// What runc (`chdir to cwd ("/x") set in config.json failed: R`) and crun (``chdir to `/x`: R``, some
/// releases without the path) say of a working directory that cannot be entered, in terms of the container.
fn about_working_dir(message: &str) -> Option<String> {
    let (_, rest) = message.split_once("chdir")?;
    let (_, reason) = rest.rsplit_once(": ")?;
    let quoted = rest.trim_start_matches(" to").trim_start_matches(" cwd");
    let quoted = quoted.trim_start_matches([' ', '(', '"', '`', '\'']);
    let path = match quoted.find(['"', '`', '\'']) {
        Some(end) if quoted.starts_with('/') => format!(" {:?}", &quoted[..end]),
        _ if quoted.starts_with(": ") => String::new(),
        // Of another directory.
        _ => return None,
    };
    Some(format!(
        "the working directory{path} cannot be used in the container: {reason}"
    ))
}

fn classify(message: &str) -> i32 {
    let lower = message.to_lowercase();
    let about_program = lower.contains("exec") && !lower.contains("mount");
    let any = |words: &[&str]| words.iter().any(|word| lower.contains(word));
    if !about_program {
        ENGINE_FAILED
    } else if any(&[
        "permission denied",
        "is a directory",
        "not a directory",
        "exec format error",
        "input/output error",
        // crun's word for what is no file.
        "open executable: operation not permitted",
    ]) {
        CANNOT_EXECUTE
    } else if any(&["no such file or directory", "not found in", "not found"]) {
        NOT_FOUND
    } else {
        ENGINE_FAILED
    }
}

fn on_path(name: &str) -> Vec<PathBuf> {
    let path = std::env::var_os("PATH").unwrap_or_default();
    let listed: Vec<PathBuf> = std::env::split_paths(&path).collect();
    let mut found: Vec<PathBuf> = Vec::new();
    for dir in listed.into_iter().chain(PLACES.map(PathBuf::from)) {
        let file = dir.join(name);
        let executable = fs::metadata(&file)
            .is_ok_and(|status| status.is_file() && status.permissions().mode() & 0o111 != 0);
        // /usr/sbin and /sbin are often one.
        let Ok(real) = file.canonicalize() else {
            continue;
        };
        if executable && dir.is_absolute() && !found.contains(&real) {
            found.push(real);
        }
    }
    found
}

/// Creates a container that must fail at its missing program. Answers what else it failed at.
fn trial(program: &Path, scratch: &Path) -> Result<Option<String>, Error> {
    let id = format!("plywood-trial-{}", std::process::id());
    let dir = scratch.join(&id);
    let prepared = prepare_trial(&dir, &id);
    let outcome = prepared
        .and_then(|()| run_trial(program, &dir, &id))
        .map_err(|source| Error::Scratch {
            path: dir.clone(),
            source,
        });
    // What stays of it is an empty root in plyd's state directory, cleared at the next trial.
    let _ = fs::remove_dir_all(&dir);
    outcome
}

fn prepare_trial(dir: &Path, id: &str) -> io::Result<()> {
    if dir.exists() {
        fs::remove_dir_all(dir)?;
    }
    fs::DirBuilder::new()
        .recursive(true)
        .mode(0o700)
        .create(dir.join("rootfs"))?;
    let spec = serde_json::json!({
        "ociVersion": "1.0.2",
        "process": {
            "args": ["/there-is-no-such-program"],
            "cwd": "/",
            "env": ["PATH=/bin"],
            "user": {"uid": 0, "gid": 0},
        },
        "root": {"path": "rootfs"},
        // crun fails without a /dev.
        "mounts": [
            {"destination": "/proc", "type": "proc", "source": "proc"},
            {"destination": "/dev", "type": "tmpfs", "source": "tmpfs"},
        ],
        "linux": {
            "cgroupsPath": format!("/plywood/{id}"),
            "resources": {"devices": [{"allow": false, "access": "rwm"}]},
            "namespaces": [
                {"type": "pid"}, {"type": "mount"}, {"type": "ipc"}, {"type": "uts"}, {"type": "network"},
            ],
        },
    });
    fs::write(dir.join("config.json"), spec.to_string())
}

fn run_trial(program: &Path, dir: &Path, id: &str) -> io::Result<Option<String>> {
    let log = dir.join("log");
    let root = dir.join("oci");
    let create = command(program, &root, &log)
        .arg("create")
        .arg("--bundle")
        .arg(dir)
        .arg(id)
        .stdin(Stdio::null())
        .output()?;
    let said = fs::read_to_string(&log).unwrap_or_default();
    // crun looks for the program only when the container is started.
    let (said, stderr, failed) = if create.status.success() {
        fs::write(&log, "")?;
        let start = command(program, &root, &log).args(["start", id]).output()?;
        let said = fs::read_to_string(&log).unwrap_or_default();
        (said, start.stderr, !start.status.success())
    } else {
        (said, create.stderr, true)
    };
    // A container that failed to be created is usually gone already; then this has nothing to do.
    command(program, &root, &log)
        .args(["delete", "--force", id])
        .output()?;
    if !failed {
        let problem = "nothing, where a program that does not exist was to be started";
        return Ok(Some(problem.to_owned()));
    }
    let (code, message) = failure(&said, &String::from_utf8_lossy(&stderr));
    Ok((code != NOT_FOUND).then_some(message))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn failures_become_docker_s_exit_codes() {
        for (message, code) in [
            (
                r#"runc create failed: unable to start container process: exec: "nosuch": executable file not found in $PATH"#,
                127,
            ),
            (
                r#"runc create failed: unable to start container process: exec: "/nosuch": stat /nosuch: no such file or directory"#,
                127,
            ),
            (
                r#"runc create failed: unable to start container process: exec: "/etc": permission denied"#,
                126,
            ),
            (
                "executable file `nosuch` not found in $PATH: No such file or directory",
                127,
            ),
            ("open executable: Operation not permitted", 126),
            ("open executable: Bad message", 125),
            ("runc create failed: cgroup: no such file or directory", 125),
        ] {
            let log = serde_json::json!({"level": "error", "msg": message}).to_string();
            assert_eq!(failure(&log, ""), (code, message.to_owned()));
        }
        assert_eq!(failure("", "one\ntwo\n\n").1, "two");
        let damaged = failure("", "exec: \"sh\": stat /bin/sh: Input/output error").1;
        assert!(damaged.ends_with(IF_DAMAGED), "{damaged}");
    }

    #[test]
    fn what_ended_before_its_program_could_not_be_executed() {
        let crun = "\x1b[1;31m{\"msg\":\"exec container process `/p`: Permission denied\",\"level\":\"error\"}\x1b[0m\n";
        let missing = "exec /p: no such file or directory; the file is there, but the interpreter or loader that it names is not";
        let damaged = format!("exec /p: input/output error{IF_DAMAGED}");
        let killed = "its process ended before it ran the program, with exit code 137";
        for (ended, words, code, told) in [
            (
                255,
                "exec /p: exec format error\n",
                CANNOT_EXECUTE,
                "exec /p: exec format error",
            ),
            (
                1,
                "exec /p: too many levels of symbolic links",
                CANNOT_EXECUTE,
                "exec /p: too many levels of symbolic links",
            ),
            (
                1,
                "exec /p: no such file or directory\n",
                NOT_FOUND,
                missing,
            ),
            (
                1,
                "exec /p: input/output error\n",
                CANNOT_EXECUTE,
                &*damaged,
            ),
            (
                1,
                crun,
                CANNOT_EXECUTE,
                "exec container process `/p`: Permission denied",
            ),
            (137, "", ENGINE_FAILED, killed),
        ] {
            assert_eq!(not_executed(ended, words), (code, told.to_owned()));
        }
    }

    #[test]
    fn a_working_directory_is_told_in_terms_of_the_container() {
        for (message, told) in [
            (
                r#"exec failed: unable to start container process: chdir to cwd ("/x") set in config.json failed: no such file or directory"#,
                "the working directory \"/x\" cannot be used in the container: no such file or directory",
            ),
            (
                "chdir to `/x`: Not a directory",
                "the working directory \"/x\" cannot be used in the container: Not a directory",
            ),
            (
                "chdir: Permission denied",
                "the working directory cannot be used in the container: Permission denied",
            ),
        ] {
            assert_eq!(failure("", message), (CANNOT_EXECUTE, told.to_owned()));
        }
        let other = "chdir to newroot: Invalid argument";
        assert_eq!(failure("", other), (ENGINE_FAILED, other.to_owned()));
    }

    #[test]
    fn a_runtime_that_is_not_there_is_named() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("nosuch");
        let error = OciRuntime::find(Some(&path), dir.path()).unwrap_err();
        assert!(error.to_string().contains("nosuch"), "{error}");
    }
}
