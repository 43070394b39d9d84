//! Contents that are gone, most often many at once with the pack that they were in.

use std::collections::{BTreeSet, HashMap};
use std::fs;
use std::io;
use std::path::{Path, PathBuf};

use parking_lot::Mutex;

use super::View;
use crate::store::error::Error;
use crate::store::object::Place;

/// Files of which the errors are told one by one, of those whose contents were lost together.
const MOST_NAMED: usize = 5;

/// Inodes whose errors name them, by the pack that their contents are gone with.
#[derive(Debug, Default)]
pub(super) struct NamedLost(Mutex<HashMap<Option<PathBuf>, BTreeSet<u32>>>);

impl NamedLost {
    /// Whether an inode is one of the first.
    fn admit(&self, pack: Option<&Path>, inode: u32) -> bool {
        let mut all = self.0.lock();
        let named = all.entry(pack.map(Path::to_owned)).or_default();
        let is_named = named.len() < MOST_NAMED || named.contains(&inode);
        if is_named {
            named.insert(inode);
        }
        is_named
    }

    /// What was lost may have come back.
    pub(super) fn forget(&self) {
        self.0.lock().clear();
    }
}

impl View {
    /// `error`, with which the content at `place` was not found, in terms of what is gone.
    pub(super) fn or_lost(&self, place: Option<Place>, error: Error) -> Error {
        match error {
            Error::Damaged { path, .. }
                if path.starts_with(self.objects.files()) && is_gone(&path) =>
            {
                let pack = match place {
                    Some(Place::Packed { pack, .. }) => {
                        let pack = self.objects.packs().join(pack.file_name());
                        is_gone(&pack).then_some(pack)
                    }
                    Some(Place::File) | None => None,
                };
                Error::Lost {
                    pack,
                    file: path,
                    more: false,
                }
            }
            error => error,
        }
    }

    /// The same error for all but the first files whose contents were lost together; `None` for these, and for any other error.
    pub(super) fn lost_with_others(&self, inode: u32, error: &Error) -> Option<Error> {
        match error {
            Error::Lost { pack, file, .. } if !self.lost.admit(pack.as_deref(), inode) => {
                Some(Error::Lost {
                    pack: pack.clone(),
                    file: file.clone(),
                    more: true,
                })
            }
            _ => None,
        }
    }
}

fn is_gone(path: &Path) -> bool {
    let looked = fs::symlink_metadata(path);
    looked.is_err_and(|error| error.kind() == io::ErrorKind::NotFound)
}
