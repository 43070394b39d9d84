//! What the kernel tells of a FUSE connection (`Documentation/filesystems/fuse.rst`, "Control filesystem").

use std::io;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

/// Where it is mounted, by whoever has set the host up.
const CONTROL: &str = "/sys/fs/fuse/connections";
/// Between two looks.
const PAUSE: Duration = Duration::from_micros(50);

/// Waits until a moment at which the connection of the mount with that device number has no request that is not answered; whether
/// there was one in that time. Fails where the kernel's control file system is not mounted, or may not be read.
pub fn wait_until_idle(device: u64, at_most: Duration) -> io::Result<bool> {
    wait(&file(Path::new(CONTROL), device), at_most)
}

/// Devices of mounts have no major number, and the connection has the name of the minor one.
fn file(control: &Path, device: u64) -> PathBuf {
    control
        .join(libc::minor(device).to_string())
        .join("waiting")
}

fn wait(file: &Path, at_most: Duration) -> io::Result<bool> {
    let begun = Instant::now();
    loop {
        if std::fs::read_to_string(file)?.trim_end() == "0" {
            return Ok(true);
        }
        if begun.elapsed() > at_most {
            return Ok(false);
        }
        std::thread::sleep(PAUSE);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_connection_is_idle_when_nothing_waits() {
        let dir = tempfile::tempdir().unwrap();
        let file = file(dir.path(), libc::makedev(0, 70_000));
        assert!(file.ends_with("70000/waiting"));
        assert!(wait(&file, Duration::ZERO).is_err());
        std::fs::create_dir(file.parent().unwrap()).unwrap();
        for (waiting, is_idle) in [("0\n", true), ("10\n", false)] {
            std::fs::write(&file, waiting).unwrap();
            assert_eq!(wait(&file, Duration::ZERO).unwrap(), is_idle);
        }
    }
}
