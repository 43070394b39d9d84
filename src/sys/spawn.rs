//! Starting a program that is to outlive this one, with descriptors under numbers of our choice; asking one what
//! it is.

use std::io::{self, BufRead, BufReader, Read};
use std::os::fd::{AsRawFd, OwnedFd, RawFd};
use std::os::unix::process::CommandExt;
use std::path::Path;
use std::process::{Command, Stdio};
use std::thread::sleep;
use std::time::{Duration, Instant};

/// How long a program may take to say its version.
const ANSWER: Duration = Duration::from_secs(30);
/// Bytes of its answer that are read; more than a pipe takes would keep it from ending.
const LONGEST_ANSWER: u64 = 4096;

/// The first line that `program --version` prints.
pub fn version(program: &Path) -> io::Result<String> {
    let mut child = Command::new(program)
        .arg("--version")
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .stderr(Stdio::null())
        .spawn()?;
    let deadline = Instant::now() + ANSWER;
    let status = loop {
        if let Some(status) = child.try_wait()? {
            break status;
        }
        if Instant::now() >= deadline {
            child.kill()?;
            child.wait()?;
            let problem = format!(
                "it has not answered --version for {} seconds",
                ANSWER.as_secs()
            );
            return Err(io::Error::new(io::ErrorKind::TimedOut, problem));
        }
        sleep(Duration::from_millis(2));
    };
    let mut line = String::new();
    if let Some(stdout) = child.stdout.take() {
        BufReader::new(stdout.take(LONGEST_ANSWER)).read_line(&mut line)?;
    }
    match line.trim() {
        line if status.success() && !line.is_empty() => Ok(line.to_owned()),
        _ => Err(io::Error::other("it does not answer --version")),
    }
}

/// Makes the child the leader of a session of its own, so that no signal that this process's terminal
/// or group gets reaches it, and gives it `fd` under the number `number`. The original stays
/// close-on-exec, so no other child that is started meanwhile inherits it.
pub fn detached_with_fd(command: &mut Command, fd: OwnedFd, number: RawFd) {
    // SAFETY: between fork and exec only setsid, dup2 and fcntl are called, all async-signal-safe,
    // and nothing is allocated: an `io::Error` of an errno is a plain number.
    unsafe {
        command.pre_exec(move || {
            nix::unistd::setsid()?;
            let raw = fd.as_raw_fd();
            let result = if raw == number {
                libc::fcntl(raw, libc::F_SETFD, 0)
            } else {
                libc::dup2(raw, number)
            };
            if result == -1 {
                return Err(io::Error::last_os_error());
            }
            Ok(())
        });
    }
}

#[cfg(test)]
mod tests {
    use std::fs::File;
    use std::io::{Seek, Write};

    use super::*;

    #[test]
    fn the_child_has_the_descriptor_and_its_own_session() {
        let mut file = tempfile::tempfile().unwrap();
        file.write_all(b"x").unwrap();
        let mut command = Command::new("sh");
        command.args(["-c", "cut -d' ' -f 1,6 /proc/$$/stat >&7"]);
        detached_with_fd(&mut command, file.try_clone().unwrap().into(), 7);
        let mut child = command.spawn().unwrap();
        assert!(child.wait().unwrap().success());
        let mut text = String::new();
        let mut file: File = file;
        file.rewind().unwrap();
        file.read_to_string(&mut text).unwrap();
        let numbers: Vec<&str> = text.trim_start_matches('x').split_whitespace().collect();
        assert_eq!(numbers, [child.id().to_string(), child.id().to_string()]);
    }
}
