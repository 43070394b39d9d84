//! Starting a program that is to outlive this one, with descriptors under numbers of our choice.

use std::os::fd::{AsRawFd, OwnedFd, RawFd};
use std::os::unix::process::CommandExt;
use std::process::Command;

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
                return Err(std::io::Error::last_os_error());
            }
            Ok(())
        });
    }
}

#[cfg(test)]
mod tests {
    use std::fs::File;
    use std::io::{Read, Seek, Write};

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
