//! What tells one snapshot from another that is not its parent: two trees, compared whole, name by name. Where both have the
//! same packed layers, only what lies above those is looked at.
//!
//! Nothing says which of the two changed a file, so what looks the same on both sides is compared down to its content, and
//! names that belong together on one side are told together.

use std::collections::{BTreeSet, HashMap, HashSet};
use std::ffi::OsString;
use std::path::PathBuf;

use super::sides::Sides;
#[cfg(test)]
use super::walk::COMPARED;
use super::walk::looks_different;
use super::{Change, ChangeKind, ordered, xattrs_of};
use crate::cow::{self, ContentPart, CopiedLinks, Entry, FileKind, NodeId, Union};
use crate::snapshotter::types::*;
use crate::store::Xattrs;
use crate::store::tar::write::is_carried;

const BUFFER: usize = 256 << 10;

/// What makes the tree of `new` of that of `old`, or of an empty one, in the order of a walk. `same_view` says that the
/// packed layers of both are the same.
pub(super) fn compare(new: &Union, old: Option<Union>, same_view: bool) -> Result<Vec<Change>> {
    let links = new.copied_links()?;
    let old_links = old.as_ref().map(Union::copied_links).transpose()?;
    let sides = Sides::new(new, old);
    let (new, old) = sides.roots();
    let root = Pair {
        path: "/".into(),
        new,
        old,
        is_shared: false,
    };
    let mut comparison = Comparison {
        sides,
        same_view,
        links,
        old_links: old_links.unwrap_or_default(),
        waiting: vec![root],
        changes: Vec::new(),
        linked: Vec::new(),
        buffers: [vec![0; BUFFER], vec![0; BUFFER]],
    };
    while let Some(at) = comparison.waiting.pop() {
        comparison.directory(&at)?;
    }
    let sides = &comparison.sides;
    if sides.all().any(Union::has_missed_links) {
        return Err(Error::LinksChanged);
    }
    comparison.tell_links();
    Ok(ordered(comparison.changes))
}

/// Not a recursion: a container decides how deep its directories are.
struct Comparison<'a> {
    sides: Sides<'a>,
    same_view: bool,
    /// What either side shows otherwise than its packed layers have it, under names that nothing above those has.
    links: CopiedLinks,
    old_links: CopiedLinks,
    waiting: Vec<Pair>,
    changes: Vec<Change>,
    /// Names on the new side of files that have several on either.
    linked: Vec<Name>,
    buffers: [Vec<u8>; 2],
}

/// Two directories to compare; a lookup of each is held.
struct Pair {
    path: PathBuf,
    new: NodeId,
    old: Option<NodeId>,
    /// They are one of the packed layers, and nothing is above it.
    is_shared: bool,
}

/// A name of a file, with the numbers of what both sides have there.
struct Name {
    path: PathBuf,
    new: u64,
    old: Option<u64>,
    is_told: bool,
}

impl Comparison<'_> {
    fn directory(&mut self, at: &Pair) -> Result<()> {
        let names = match at.is_shared {
            true => self.names_to_links(at)?,
            false => self.sides.names(Some(at.new), at.old)?,
        };
        for name in names {
            #[cfg(test)]
            COMPARED.set(COMPARED.get() + 1);
            let found = self.sides.lookup(Some(at.new), at.old, &name)?;
            self.entry(at.path.join(&name), found)?;
        }
        self.sides.forget(Some(at.new), at.old);
        Ok(())
    }

    /// The names of a shared directory that are not shared, or lead to such.
    fn names_to_links(&self, at: &Pair) -> Result<BTreeSet<OsString>> {
        let mut names = self.sides.new.names_to_links(&self.links, at.new)?;
        if let Some((union, old)) = self.sides.old.as_ref().zip(at.old) {
            names.extend(union.names_to_links(&self.old_links, old)?);
        }
        Ok(names)
    }

    fn leads_to_links(&self, new: NodeId, old: NodeId) -> Result<bool> {
        let of_old = match &self.sides.old {
            Some(union) => union.leads_to_links(&self.old_links, old)?,
            None => false,
        };
        Ok(of_old || self.sides.new.leads_to_links(&self.links, new)?)
    }

    fn entry(&mut self, path: PathBuf, (new, old): (Option<Entry>, Option<Entry>)) -> Result<()> {
        let is_directory = |entry: &Entry| entry.attr.kind == FileKind::Directory;
        let is_linked = |entry: &Entry| entry.attr.nlink > 1 && !is_directory(entry);
        let mut is_shared = false;
        let kind = match (&new, &old) {
            (None, None) => None,
            (None, Some(_)) => Some(ChangeKind::Deleted),
            (Some(_), None) => Some(ChangeKind::Added),
            (Some(new), Some(old)) => {
                let (of_new, of_old) = self.shared(new, old)?;
                is_shared = of_new.is_some() && of_new == of_old;
                if is_shared && !(is_directory(new) && self.leads_to_links(new.node, old.node)?) {
                    // And so is all that is below it.
                    self.sides.forget(Some(new.node), Some(old.node));
                    return Ok(());
                }
                // The other names of what one side has of the layers may not be looked at.
                let is_apart = of_new != of_old && (is_linked(new) || is_linked(old));
                (is_apart || self.differ(new, old)?).then_some(ChangeKind::Modified)
            }
        };
        if let Some(kind) = kind {
            let path = path.clone();
            self.changes.push(Change { path, kind });
        }
        if let Some(new) = &new
            && (is_linked(new) || old.as_ref().is_some_and(is_linked))
        {
            self.linked.push(Name {
                path: path.clone(),
                new: new.attr.ino,
                old: old.as_ref().map(|old| old.attr.ino),
                is_told: kind.is_some(),
            });
        }
        let old_directory = old.filter(is_directory).map(|old| old.node);
        if old_directory.is_none() {
            self.sides.forget(None, old.map(|old| old.node));
        }
        match new {
            Some(new) if is_directory(&new) => self.waiting.push(Pair {
                path,
                new: new.node,
                old: old_directory,
                is_shared,
            }),
            new => self.sides.forget(new.map(|new| new.node), old_directory),
        }
        Ok(())
    }

    /// The inodes of the packed layers that both sides have, as far as nothing is above them.
    fn shared(&self, new: &Entry, old: &Entry) -> Result<(Option<u32>, Option<u32>)> {
        Ok(match &self.sides.old {
            Some(union) if self.same_view => (
                self.sides.new.stored_inode(new.node)?,
                union.stored_inode(old.node)?,
            ),
            _ => (None, None),
        })
    }

    /// Whether what both sides have under a name is not the same to whoever looks at it.
    fn differ(&mut self, new: &Entry, old: &Entry) -> Result<bool> {
        let Some(of_old) = &self.sides.old else {
            return Ok(true);
        };
        let of_new = self.sides.new;
        let kind = new.attr.kind;
        if looks_different(&new.attr, &old.attr)
            || carried(of_new, new.node)? != carried(of_old, old.node)?
        {
            return Ok(true);
        }
        Ok(match kind {
            FileKind::Symlink => of_new.readlink(new.node)? != of_old.readlink(old.node)?,
            FileKind::Regular => {
                !is_same_content((of_new, new.node), (of_old, old.node), &mut self.buffers)?
            }
            _ => false,
        })
    }

    /// Tells all names of a file of which one is told, and of files that share their names in another way than on the old
    /// side. Link counts say nothing of that: they are what a layer below says, also where some of the names are gone.
    fn tell_links(&mut self) {
        let mut told = HashSet::new();
        let (mut old_of, mut new_of) = (HashMap::new(), HashMap::new());
        for Name {
            new, old, is_told, ..
        } in &self.linked
        {
            let is_same = !is_told
                && old_of.entry(*new).or_insert(*old) == old
                && old.is_none_or(|old| new_of.entry(old).or_insert(*new) == new);
            if !is_same {
                told.insert(*new);
            }
        }
        for name in self.linked.drain(..) {
            if !name.is_told && told.contains(&name.new) {
                self.changes.push(Change {
                    path: name.path,
                    kind: ChangeKind::Modified,
                });
            }
        }
    }
}

/// The extended attributes that a layer's stream has.
fn carried(union: &Union, node: NodeId) -> Result<Xattrs> {
    let mut xattrs = xattrs_of(union, node)?;
    xattrs.retain(|(name, _)| is_carried(name));
    Ok(xattrs)
}

/// Compares two files of one size. What a packed layer has is not read.
fn is_same_content(
    (new, of_new): (&Union, NodeId),
    (old, of_old): (&Union, NodeId),
    [buffer, other]: &mut [Vec<u8>; 2],
) -> Result<bool, cow::Error> {
    let (new_parts, old_parts) = (new.content_of(of_new)?, old.content_of(of_old)?);
    let mut all = new_parts.iter().chain(&old_parts);
    if new_parts == old_parts && all.all(|part| matches!(part, ContentPart::Stored(_))) {
        return Ok(true);
    }
    // What is a hole on both sides is the same.
    let parts = new_parts.iter().chain(&old_parts).map(|part| match part {
        ContentPart::Stored(part) => (part.offset, part.offset + part.length),
        ContentPart::Own { offset, length } => (*offset, offset + length),
    });
    let mut parts: Vec<(u64, u64)> = parts.collect();
    parts.sort_unstable();
    let mut done = 0;
    for (from, to) in parts {
        done = done.max(from);
        while done < to {
            // No more than the buffer has.
            let most = (to - done).min(BUFFER as u64) as usize;
            let count = new.read(of_new, None, done, &mut buffer[..most])?;
            let count = old.read(of_old, None, done, &mut other[..count])?;
            if count == 0 || buffer[..count] != other[..count] {
                return Ok(false);
            }
            done += count as u64;
        }
    }
    Ok(true)
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeMap;
    use std::ffi::OsStr;
    use std::fs;
    use std::os::unix::fs::{MetadataExt, PermissionsExt, symlink};
    use std::path::Path;
    use std::time::{Duration, UNIX_EPOCH};

    use nix::fcntl::AT_FDCWD;
    use nix::sys::stat::{UtimensatFlags, utimensat};
    use nix::sys::time::TimeSpec;

    use super::super::layer::tests::{base, change};
    use super::*;
    use crate::snapshotter::Snapshotter;
    use crate::snapshotter::tests::{Place, prepare, tree};
    use crate::store::layers::Expected;

    const OWNER: Owner = Owner::Containerd;

    fn open(snapshots: &Snapshotter, key: &str) -> Union {
        Union::open(snapshots.union_config(OWNER, key).unwrap()).unwrap()
    }

    fn apply(snapshots: &Snapshotter, key: &str, stream: &[u8]) {
        let layer = (stream, &Expected::default());
        snapshots.apply_layer(OWNER, key, layer, &()).unwrap();
    }

    fn commit(snapshots: &Snapshotter, key: &str) -> String {
        let name = format!("{key}, committed");
        let committed = snapshots.commit(OWNER, &name, key, BTreeMap::new());
        committed.unwrap().key
    }

    fn difference(snapshots: &Snapshotter, left: Option<&str>, right: &str) -> Vec<u8> {
        let mut stream = Vec::new();
        let written = snapshots.write_difference(OWNER, left, right, &mut stream, None);
        written.unwrap();
        stream
    }

    fn names(stream: &[u8]) -> Vec<String> {
        let mut archive = tar::Archive::new(stream);
        let entries = archive.entries().unwrap();
        let name = |entry: std::io::Result<tar::Entry<'_, _>>| {
            entry
                .unwrap()
                .path()
                .unwrap()
                .to_string_lossy()
                .into_owned()
        };
        entries.map(name).collect()
    }

    /// All that `change` does not do, and some of it to the same names in another way.
    fn change_otherwise(upper: &Path, union: &Union) {
        let find = |name: &str| union.lookup(NodeId::ROOT, OsStr::new(name)).unwrap().node;
        for name in ["link-one", "changed"] {
            union.unlink(NodeId::ROOT, OsStr::new(name)).unwrap();
        }
        union.unlink(find("gone"), OsStr::new("file")).unwrap();
        union.write(find("removed"), None, 0, b"R", None).unwrap();
        union.settle_links().unwrap();
        fs::create_dir_all(upper.join("fifo/is/none/here")).unwrap();
        fs::write(upper.join("onlyA"), "only A").unwrap();
        symlink("/else/where", upper.join("symlink")).unwrap();
        fs::write(upper.join("moved"), "a file").unwrap();
    }

    #[test]
    fn what_is_told_makes_of_the_one_tree_the_other() {
        let place = Place::new();
        let snapshots = place.open();
        prepare(&snapshots, "unpack", None);
        apply(&snapshots, "unpack", &base());
        let base = commit(&snapshots, "unpack");
        let of_a = prepare(&snapshots, "a", Some(&base)).upper_dir.unwrap();
        change_otherwise(&of_a, &open(&snapshots, "a"));
        prepare(&snapshots, "b", Some(&base));
        {
            let union = open(&snapshots, "b");
            change(&union);
            union.settle_links().unwrap();
        }
        prepare(&snapshots, "untouched", Some(&base));
        let alone = prepare(&snapshots, "alone", None).upper_dir.unwrap();
        fs::write(alone.join("changed"), "alone").unwrap();
        prepare(&snapshots, "nothing", None);
        // The same to whoever looks at it, but not one file with its other names.
        let apart = prepare(&snapshots, "apart", Some(&base)).upper_dir.unwrap();
        fs::write(apart.join("link-two"), "link-one").unwrap();
        let file = fs::File::open(apart.join("link-two")).unwrap();
        file.set_permissions(fs::Permissions::from_mode(0o755))
            .unwrap();
        file.set_modified(UNIX_EPOCH + Duration::from_secs(1_000_000_000))
            .unwrap();

        let all = ["a", "b", "untouched", "alone", "nothing", "apart"];
        let pairs = (0..36).map(|n| (n / 6, n % 6));
        let told: Vec<_> = pairs
            .map(|(left, right)| {
                let stream = difference(&snapshots, Some(all[left]), all[right]);
                assert!(difference(&snapshots, Some(all[left]), all[right]) == stream);
                (left, right, stream)
            })
            .collect();
        assert_eq!(
            names(&difference(&snapshots, None, "alone")),
            ["changed"].map(str::to_owned)
        );
        let committed = all.map(|key| commit(&snapshots, key));
        let views = committed.clone().map(|name| {
            let view = format!("view of {name}");
            let on = ParentRef {
                owner: OWNER,
                key: name,
            };
            let made = snapshots.view(OWNER, &view, Some(&on), BTreeMap::new());
            made.unwrap().key
        });
        // Which have the link counts that there are names.
        let trees = views.each_ref().map(|key| tree(&open(&snapshots, key)));
        for (left, right, stream) in &told {
            let (left, right) = (*left, *right);
            if left == right {
                assert_eq!(*stream, [0; 1024], "{}", all[left]);
            }
            let key = format!("{} to {}", all[left], all[right]);
            prepare(&snapshots, &key, Some(&committed[left]));
            apply(&snapshots, &key, stream);
            assert_eq!(tree(&open(&snapshots, &key)), trees[right], "{key}");
        }
        // As well from the packed layers that they have become.
        for (left, right, _) in told {
            let stream = difference(&snapshots, Some(&views[left]), &views[right]);
            let key = format!("view of {} to {}", all[left], all[right]);
            prepare(&snapshots, &key, Some(&committed[left]));
            apply(&snapshots, &key, &stream);
            assert_eq!(tree(&open(&snapshots, &key)), trees[right], "{key}");
        }
    }

    #[test]
    fn what_both_have_in_their_layers_is_not_looked_at() {
        let place = Place::new();
        let snapshots = place.open();
        let upper = prepare(&snapshots, "unpack", None).upper_dir.unwrap();
        for n in 0..1000 {
            let dir = upper.join(format!("{}", n % 10));
            fs::create_dir_all(&dir).unwrap();
            fs::write(dir.join(n.to_string()), "").unwrap();
        }
        let base = commit(&snapshots, "unpack");
        for key in ["a", "b"] {
            let upper = prepare(&snapshots, key, Some(&base)).upper_dir.unwrap();
            fs::write(upper.join(key), key).unwrap();
        }
        COMPARED.set(0);
        let told = names(&difference(&snapshots, Some("a"), "b"));
        assert_eq!(told, [".wh.a", "b"].map(str::to_owned));
        assert_eq!(COMPARED.get(), 12);
    }

    /// Size, times and all other attributes of two files say nothing of their content, nor of which names are one file.
    #[test]
    fn what_looks_the_same_is_compared_with_its_content_and_names() {
        let place = Place::new();
        let snapshots = place.open();
        for (key, content, target, pairs) in [
            ("a", "one", "/a", [("1", "2"), ("3", "4")]),
            ("b", "two", "/b", [("1", "3"), ("2", "4")]),
        ] {
            let upper = prepare(&snapshots, key, None).upper_dir.unwrap();
            let time = UNIX_EPOCH + Duration::from_secs(5);
            let write = |name: &str, content: &[u8]| {
                fs::write(upper.join(name), content).unwrap();
                fs::set_permissions(upper.join(name), fs::Permissions::from_mode(0o644)).unwrap();
                let file = fs::File::options().write(true).open(upper.join(name));
                file.unwrap().set_modified(time).unwrap();
            };
            write("other", content.as_bytes());
            write("same", b"same");
            for (one, two) in pairs {
                write(one, b"linked");
                fs::hard_link(upper.join(one), upper.join(two)).unwrap();
            }
            // One file on the left side, two on the right.
            write("5", b"once linked");
            match key {
                "a" => fs::hard_link(upper.join("5"), upper.join("6")).unwrap(),
                _ => write("6", b"once linked"),
            }
            symlink(target, upper.join("symlink")).unwrap();
            let (symlink, time) = (upper.join("symlink"), TimeSpec::new(5, 0));
            utimensat(
                AT_FDCWD,
                &symlink,
                &time,
                &time,
                UtimensatFlags::NoFollowSymlink,
            )
            .unwrap();
            assert_eq!(fs::metadata(upper.join("1")).unwrap().nlink(), 2);
        }
        let told = names(&difference(&snapshots, Some("a"), "b"));
        assert_eq!(
            told,
            ["1", "2", "3", "4", "6", "other", "symlink"].map(str::to_owned)
        );
    }
}
