//! What a packed layer changes against those below it: two merged views, compared name by name.

use std::collections::BTreeMap;
use std::ffi::OsStr;
use std::os::unix::ffi::OsStrExt;
use std::path::PathBuf;

use super::{Change, ChangeKind};
use crate::snapshotter::types::*;
use crate::store::Inode;
use crate::store::view::View;

/// Two directories of one path.
struct Directory {
    path: PathBuf,
    new: Inode,
    old: Option<Inode>,
}

/// A name on one side.
struct Named {
    inode: Inode,
    layer: u16,
}

/// Compares `new`, the view of a chain, with `old`, the view of the chain without its topmost layer. In no order.
pub(super) fn compare(new: &View, old: Option<&View>, topmost: u16) -> Result<Vec<Change>> {
    let mut changes = Vec::new();
    let mut waiting = vec![Directory {
        path: "/".into(),
        new: new.inode(View::ROOT)?,
        old: old.map(|old| old.inode(View::ROOT)).transpose()?,
    }];
    while let Some(at) = waiting.pop() {
        let of_new = names(Some(new), Some(&at.new))?;
        let mut of_old = names(old, at.old.as_ref())?;
        for (name, now) in of_new {
            let path = at.path.join(OsStr::from_bytes(name));
            let before = of_old.remove(name);
            let kind = match &before {
                None => Some(ChangeKind::Added),
                Some(before) => {
                    let changed = is_changed(&now, before, topmost)
                        || (now.layer == topmost && xattrs_differ((new, &now), (old, before))?);
                    changed.then_some(ChangeKind::Modified)
                }
            };
            if let Some(kind) = kind {
                let path = path.clone();
                changes.push(Change { path, kind });
            }
            if is_directory(&now.inode) {
                waiting.push(Directory {
                    path,
                    new: now.inode,
                    old: before.map(|before| before.inode).filter(is_directory),
                });
            }
        }
        // What is below a directory that is gone, or a file now, is gone with it.
        for name in of_old.into_keys() {
            let path = at.path.join(OsStr::from_bytes(name));
            let kind = ChangeKind::Deleted;
            changes.push(Change { path, kind });
        }
    }
    Ok(changes)
}

fn names<'a>(
    view: Option<&'a View>,
    directory: Option<&Inode>,
) -> Result<BTreeMap<&'a [u8], Named>> {
    let mut names = BTreeMap::new();
    let (Some(view), Some(directory)) = (view, directory) else {
        return Ok(names);
    };
    let mut place = 0;
    while let Some(entry) = view.nth(directory, place)? {
        let named = Named {
            inode: view.inode(entry.inode)?,
            layer: entry.layer,
        };
        names.insert(entry.name, named);
        place += 1;
    }
    Ok(names)
}

fn is_directory(inode: &Inode) -> bool {
    inode.kind() == libc::S_IFDIR
}

/// Matters to directories: whatever else the topmost layer names it has changed.
fn xattrs_differ(
    (new, now): (&View, &Named),
    (old, before): (Option<&View>, &Named),
) -> Result<bool> {
    let of_old = match old {
        Some(old) => old.xattrs(&before.inode)?,
        None => Vec::new(),
    };
    Ok(new.xattrs(&now.inode)? != of_old)
}

fn is_changed(new: &Named, old: &Named, topmost: u16) -> bool {
    let look = |inode: &Inode| (inode.mode, inode.uid, inode.gid, inode.mtime);
    let directories = is_directory(&new.inode) && is_directory(&old.inode);
    look(&new.inode) != look(&old.inode)
        || (!directories && (new.layer == topmost || new.inode.size != old.inode.size))
}
