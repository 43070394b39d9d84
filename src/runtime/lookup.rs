//! What has to be looked up or made inside a container's root before a process can start in it: its
//! user, its working directory, the targets of its volumes.
//!
//! The root is a FUSE mount, and a path on it may hang. So `plyd` does none of this itself: it asks a
//! short-lived `plyshim lookup`, which it can kill ([`super::client::look_up`]).

use std::fs;
use std::io;
use std::path::{Path, PathBuf};

use nix::fcntl::{OFlag, openat};
use nix::sys::stat::{Mode, SFlag};
use serde::{Deserialize, Serialize};

use super::user::{self, Identity};
use crate::sys::inroot;

/// What is asked.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Question {
    /// The container's root on the host.
    pub root: PathBuf,
    /// Who is to run; see [`user::look_up`].
    pub user: String,
    /// Working directory; made if it is missing and `make` says so.
    pub working_dir: String,
    /// Make what is missing.
    pub make: bool,
    /// Volumes, in the order of the answer.
    pub volumes: Vec<VolumeQuestion>,
}

/// A volume whose target is to be found or made.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct VolumeQuestion {
    /// Absolute path on the host; has to exist.
    pub source: PathBuf,
    /// Absolute path in the container.
    pub target: String,
}

/// What is answered.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Answer {
    /// Who runs.
    pub identity: Identity,
    /// Files of the root that cannot be read, which the OCI runtime reads all the same; see [`user::Found`].
    pub damaged: Vec<String>,
    /// Where each volume goes: without links, and inside the root.
    pub targets: Vec<PathBuf>,
}

/// Why it cannot be answered.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// The user.
    #[error(transparent)]
    User(#[from] user::Error),
    /// The working directory.
    #[error("the working directory {path:?} cannot be used: {}", why(.source))]
    WorkingDir {
        /// The directory.
        path: String,
        /// What is wrong.
        source: inroot::Error,
    },
    /// A volume's source.
    #[error("the volume's source {path} cannot be used: {source}; create it first")]
    Source {
        /// On the host.
        path: PathBuf,
        /// What the host said.
        source: io::Error,
    },
    /// A volume's target.
    #[error("the volume's target {path:?} cannot be used: {}", why(.source))]
    Target {
        /// In the container.
        path: String,
        /// What is wrong.
        source: inroot::Error,
    },
    /// A volume's target cannot be made.
    #[error("the volume's target {path:?} cannot be made: {source}")]
    MakeTarget {
        /// In the container.
        path: String,
        /// What the host said.
        source: io::Error,
    },
    /// The two do not fit.
    #[error("the volume's target {path:?} is {there} in the image, but its source is {wanted}")]
    Kind {
        /// In the container.
        path: String,
        /// What it is.
        there: &'static str,
        /// What it should be.
        wanted: &'static str,
    },
    /// The root cannot be covered.
    #[error("a volume cannot have the container's root as its target")]
    Root,
}

/// What is wrong with a path inside the root, which the sentence has named already.
fn why(error: &inroot::Error) -> String {
    match error {
        inroot::Error::Io { source, .. } if source.kind() == io::ErrorKind::NotADirectory => {
            "it, or a part of it, is not a directory in the container".to_owned()
        }
        inroot::Error::Io { source, .. } => format!("{source}{}", user::advice(error)),
        other => other.to_string(),
    }
}

/// Answers the question.
pub fn answer(question: &Question) -> Result<Answer, Error> {
    let user::Found { identity, damaged } = user::look_up(&question.root, &question.user)?;
    if question.make {
        let path = Path::new(&question.working_dir);
        inroot::mkdir_all(&question.root, path, 0o755).map_err(|source| Error::WorkingDir {
            path: question.working_dir.clone(),
            source,
        })?;
    }
    let targets = question.volumes.iter();
    let targets = targets.map(|volume| target(&question.root, volume));
    Ok(Answer {
        identity,
        damaged,
        targets: targets.collect::<Result<_, _>>()?,
    })
}

fn target(root: &Path, volume: &VolumeQuestion) -> Result<PathBuf, Error> {
    let source = fs::metadata(&volume.source).map_err(|source| Error::Source {
        path: volume.source.clone(),
        source,
    })?;
    let path = Path::new(&volume.target);
    let fail = |source| Error::Target {
        path: volume.target.clone(),
        source,
    };
    let wants_dir = source.is_dir();
    let resolved = match inroot::resolve(root, path) {
        Ok(resolved) => resolved,
        Err(error) if error.is_not_found() && wants_dir => {
            inroot::mkdir_all(root, path, 0o755).map_err(fail)?
        }
        Err(error) if error.is_not_found() => make_file(root, &volume.target)?,
        Err(error) => return Err(fail(error)),
    };
    if resolved == Path::new("/") {
        return Err(Error::Root);
    }
    let (_, there) = inroot::open_path(root, &resolved).map_err(fail)?;
    let is_dir = there.st_mode & SFlag::S_IFMT.bits() == SFlag::S_IFDIR.bits();
    if is_dir != wants_dir {
        let word = |dir| if dir { "a directory" } else { "no directory" };
        return Err(Error::Kind {
            path: volume.target.clone(),
            there: word(is_dir),
            wanted: word(wants_dir),
        });
    }
    Ok(resolved)
}

/// Makes an empty file as the place for a bind mount, and its parents.
fn make_file(root: &Path, target: &str) -> Result<PathBuf, Error> {
    let path = Path::new(target);
    let fail = |source| Error::Target {
        path: target.to_owned(),
        source,
    };
    let (Some(parent), Some(name)) = (path.parent(), path.file_name()) else {
        return Err(Error::Root);
    };
    let parent = inroot::mkdir_all(root, parent, 0o755).map_err(fail)?;
    let (dir, _) = inroot::open_path(root, &parent).map_err(fail)?;
    let flags =
        OFlag::O_WRONLY | OFlag::O_CREAT | OFlag::O_EXCL | OFlag::O_NOFOLLOW | OFlag::O_CLOEXEC;
    openat(&dir, name, flags, Mode::from_bits_truncate(0o644)).map_err(|errno| {
        Error::MakeTarget {
            path: target.to_owned(),
            source: errno.into(),
        }
    })?;
    Ok(parent.join(name))
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::symlink;

    use super::*;

    fn question(root: &Path, source: &Path, target: &str) -> Question {
        Question {
            root: root.to_owned(),
            user: String::new(),
            working_dir: "/work/here".to_owned(),
            make: true,
            volumes: vec![VolumeQuestion {
                source: source.to_owned(),
                target: target.to_owned(),
            }],
        }
    }

    #[test]
    fn targets_are_made_inside_the_root_only() {
        let dir = tempfile::tempdir().unwrap();
        let root = dir.path().join("root");
        let outside = dir.path().join("outside");
        fs::create_dir_all(root.join("data")).unwrap();
        fs::create_dir(&outside).unwrap();
        symlink(&outside, root.join("way-out")).unwrap();
        symlink("/data", root.join("link")).unwrap();
        let target = |source: &Path, target| {
            answer(&question(&root, source, target)).map(|answer| answer.targets[0].clone())
        };
        let file = dir.path().join("file");
        fs::write(&file, "x").unwrap();
        assert_eq!(
            target(&outside, "/link/sub").unwrap(),
            Path::new("/data/sub")
        );
        assert_eq!(
            target(&file, "/link/file").unwrap(),
            Path::new("/data/file")
        );
        assert!(root.join("work/here").is_dir());
        // Inside the root the link's target is another, which is made there.
        let made = target(&outside, "/way-out/sub");
        assert!(fs::read_dir(&outside).unwrap().next().is_none(), "{made:?}");
        assert!(matches!(
            target(&outside, "/link/file"),
            Err(Error::Kind { .. })
        ));
        assert!(matches!(target(&outside, "/data/.."), Err(Error::Root)));
        let missing = dir.path().join("missing");
        assert!(matches!(
            target(&missing, "/data"),
            Err(Error::Source { .. })
        ));
    }
}
