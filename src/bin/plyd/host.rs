//! What plyd wants of the host before it begins: told at its start, where an administrator looks, and not by
//! the first container.

use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};

use plywood::sys::spawn;

/// Whether this process may do what plyd has to do.
pub fn privileged() -> Result<(), String> {
    if nix::unistd::geteuid().is_root() {
        return Ok(());
    }
    Err(
        "it mounts file systems, so it has to run as root; start it with sudo, or by systemd: `systemctl start plywood`"
            .to_owned(),
    )
}

/// The directory that `option` names, absolute. It may be missing: it is made.
pub fn directory(option: &str, path: &Path) -> Result<PathBuf, String> {
    let path = std::path::absolute(path)
        .map_err(|error| format!("cannot use {} for {option}: {error}", path.display()))?;
    let there = path.ancestors().find(|dir| dir.symlink_metadata().is_ok());
    match there {
        Some(there) if !there.is_dir() => Err(format!(
            "{} is not a directory; name one, or one that can be made, with {option}",
            there.display()
        )),
        _ => Ok(path),
    }
}

/// The program of ours, `name`, that `option` gives by its path or its name: one that answers.
pub fn program(option: &str, name: &str, given: &Path) -> Result<PathBuf, String> {
    let bad = |what: String| {
        format!(
            "{option} is {}, {what}; give the path of {name}, or leave it out: the one beside plyd is used then",
            given.display()
        )
    };
    let path = if given.components().count() == 1 && !given.is_absolute() {
        let path = std::env::var_os("PATH").unwrap_or_default();
        std::env::split_paths(&path)
            .filter(|dir| dir.is_absolute())
            .map(|dir| dir.join(given))
            .find(|file| file.is_file())
            .ok_or_else(|| bad("and PATH has no such program".to_owned()))?
    } else {
        std::path::absolute(given)
            .map_err(|error| bad(format!("which cannot be used ({error})")))?
    };
    let status = fs::metadata(&path)
        .map_err(|error| bad(format!("which cannot be used ({})", plain(&error))))?;
    if !status.is_file() {
        return Err(bad("which is not a file".to_owned()));
    }
    if status.permissions().mode() & 0o111 == 0 {
        return Err(bad("which is not executable".to_owned()));
    }
    let version = spawn::version(&path)
        .map_err(|error| bad(format!("which does not work ({})", plain(&error))))?;
    if version.split_whitespace().next() != Some(name) {
        return Err(bad(format!("which is another program ({version:?})")));
    }
    Ok(path)
}

/// An error of the host without its number.
fn plain(error: &std::io::Error) -> String {
    let text = error.to_string();
    let end = text.find(" (os error").unwrap_or(text.len());
    text[..end].to_owned()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_program_is_the_one_that_is_meant() {
        let dir = tempfile::tempdir().unwrap();
        let at = |name: &str, text: &str, mode: u32| {
            let path = dir.path().join(name);
            fs::write(&path, text).unwrap();
            fs::set_permissions(&path, fs::Permissions::from_mode(mode)).unwrap();
            path
        };
        let good = at("good", "#!/bin/sh\necho plyfs 0.1.0\n", 0o755);
        assert_eq!(program("--plyfs", "plyfs", &good), Ok(good));
        for (path, words) in [
            (dir.path().join("none"), "No such file"),
            (dir.path().to_owned(), "is not a file"),
            (at("plain", "", 0o644), "is not executable"),
            (at("odd", "#!/no/such/shell\n", 0o755), "does not work"),
            (at("fails", "#!/bin/sh\nexit 3\n", 0o755), "does not work"),
            (
                at("other", "#!/bin/sh\necho runc 1\n", 0o755),
                "another program",
            ),
            ("no-such-program".into(), "PATH has no such program"),
        ] {
            let problem = program("--plyfs", "plyfs", &path).unwrap_err();
            assert!(
                problem.starts_with("--plyfs is ") && problem.contains(words),
                "{problem}"
            );
        }
    }

    #[test]
    fn a_directory_is_one_or_can_be_made() {
        let dir = tempfile::tempdir().unwrap();
        let below = dir.path().join("a/b");
        assert_eq!(directory("--root", &below), Ok(below));
        let file = dir.path().join("file");
        fs::write(&file, "").unwrap();
        for path in [file.clone(), file.join("x")] {
            let problem = directory("--root", &path).unwrap_err();
            let words = format!("{} is not a directory", file.display());
            assert!(problem.starts_with(&words), "{problem}");
        }
    }
}
