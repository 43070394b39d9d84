//! What a snapshot changes as a layer: a tar stream as the OCI image specification has it.
//!
//! The same changes are always the same bytes. What the form cannot say is refused, but for sockets, which nobody can use
//! without the process that made them and which containerd's differ leaves out too. The root directory has no entry,
//! and neither have extended attributes that are the host's own business.

use std::io::Write;
use std::path::Path;

use super::Change;
use super::entries::{Fault, Object, Output, at, tell};
use crate::cow::{FileKind, Union};
use crate::snapshotter::types::*;
use crate::store::Time;
use crate::store::tar::write::{NewEntry, Writer, is_carried, parts};
use crate::store::tar::{Kind, WHITEOUT};
use crate::store::view::View;

const BUFFER: usize = 256 << 10;

/// Writes the changes, which are in the order of a walk, of the union `new`. `view` is that of the packed layers in
/// it. With an `epoch`, later times of modification become that one, and whiteouts have it.
pub(in crate::snapshotter) fn write(
    changes: &[Change],
    new: &Union,
    view: Option<&View>,
    out: impl Write,
    epoch: Option<Time>,
) -> Result<()> {
    let mut layer = Layer {
        out: Writer::new(out),
        epoch,
        buffer: vec![0; BUFFER],
    };
    tell(changes, new, view, &mut layer)?;
    let ended = layer.out.finish().map(drop);
    ended.map_err(|source| at(Path::new("/"), source.into()))
}

struct Layer<W> {
    out: Writer<W>,
    epoch: Option<Time>,
    buffer: Vec<u8>,
}

impl<W: Write> Output for Layer<W> {
    fn object(&mut self, object: &Object<'_>) -> Result<(), Fault> {
        check(object.path)?;
        let kind = match object.attr.kind {
            FileKind::Regular => Kind::Regular,
            FileKind::Directory => Kind::Directory,
            FileKind::Symlink => Kind::Symlink,
            FileKind::Fifo => Kind::Fifo,
            FileKind::BlockDevice => Kind::BlockDevice,
            FileKind::CharDevice => Kind::CharDevice,
            FileKind::Socket => return Ok(()),
        };
        let mut xattrs = object.xattrs()?;
        xattrs.retain(|(name, _)| is_carried(name));
        let mut entry = self.entry_of(object, kind);
        entry.xattrs = &xattrs;
        match kind {
            Kind::Regular => self.file(entry, object),
            Kind::Symlink => {
                let target = object.target()?;
                entry.link = &target;
                Ok(self.out.entry(&entry)?)
            }
            Kind::CharDevice | Kind::BlockDevice => {
                entry.device = object.device()?;
                Ok(self.out.entry(&entry)?)
            }
            _ => Ok(self.out.entry(&entry)?),
        }
    }

    fn link(&mut self, object: &Object<'_>, target: &[u8]) -> Result<(), Fault> {
        check(object.path)?;
        if object.attr.kind == FileKind::Socket {
            return Ok(());
        }
        Ok(self.out.entry(&NewEntry {
            link: target,
            ..self.entry_of(object, Kind::HardLink)
        })?)
    }

    fn remove(&mut self, path: &[u8]) -> Result<(), Fault> {
        check(path)?;
        let name = path.rsplit(|&byte| byte == b'/').next().unwrap_or_default();
        let above = &path[..path.len() - name.len()];
        let path = [above, WHITEOUT, name].concat();
        Ok(self.out.entry(&NewEntry {
            mtime: self.epoch.unwrap_or_default(),
            ..NewEntry::new(&path, Kind::Regular)
        })?)
    }
}

impl<W: Write> Layer<W> {
    fn entry_of<'a>(&self, object: &Object<'a>, kind: Kind) -> NewEntry<'a> {
        let attr = object.attr;
        let mtime = Time {
            sec: attr.mtime.sec,
            nsec: attr.mtime.nsec,
        };
        NewEntry {
            perm: attr.perm,
            uid: attr.uid,
            gid: attr.gid,
            mtime: self.epoch.map_or(mtime, |epoch| mtime.min(epoch)),
            ..NewEntry::new(object.path, kind)
        }
    }

    fn file(&mut self, entry: NewEntry<'_>, object: &Object<'_>) -> Result<(), Fault> {
        let (union, node, size) = (object.union, object.node, object.attr.size);
        if size > 0 {
            // What cannot be opened is not to be taken for a hole below.
            union.read(node, None, 0, &mut [])?;
        }
        let seek = |from: u64, whence| {
            let from = i64::try_from(from).unwrap_or(i64::MAX);
            let found = union.lseek(node, None, from, whence)?;
            Ok::<_, crate::cow::Error>(u64::try_from(found).unwrap_or_default())
        };
        let parts = parts(
            size,
            |from| match seek(from, libc::SEEK_DATA) {
                Err(error) if error.errno == libc::ENXIO => Ok(None),
                // A file system that cannot tell.
                Err(error) if error.errno == libc::EINVAL => Ok(Some(from)),
                data => data.map(Some),
            },
            |from| match seek(from, libc::SEEK_HOLE) {
                Err(error) if error.errno == libc::EINVAL => Ok(size),
                hole => hole,
            },
        )?;
        let entry = NewEntry { size, ..entry };
        let read = |buffer: &mut [u8], at| match union.read(node, None, at, buffer) {
            // Somebody has cut it since its size was told: as with GNU tar zeros take the place of what is gone.
            Ok(0) if union.is_live() => {
                buffer.fill(0);
                Ok(buffer.len())
            }
            Ok(count) => Ok(count),
            Err(error) => Err(Fault::Content(error)),
        };
        self.out
            .file(&entry, &parts, &mut self.buffer, read, Fault::from)
    }
}

/// Refuses a name that means something else in a stream.
fn check(path: &[u8]) -> Result<(), Fault> {
    let name = path.rsplit(|&byte| byte == b'/').next();
    match name.is_some_and(|name| name.starts_with(WHITEOUT)) {
        true => Err(Fault::Unspeakable(
            "its name begins with \".wh.\", which marks a deletion in a layer",
        )),
        false => Ok(()),
    }
}

#[cfg(test)]
pub(super) mod tests {
    use std::collections::BTreeMap;
    use std::ffi::OsStr;

    use super::*;
    use crate::cow::{Caller, NodeId, RenameMode, SetAttr, SetXattrMode};
    use crate::snapshotter::Snapshotter;
    use crate::snapshotter::tests::{Place, prepare, tree};
    use crate::store::layers::Expected;

    const OWNER: Owner = Owner::Containerd;

    pub(in crate::snapshotter::diff) fn base() -> Vec<u8> {
        let mut tar = tar::Builder::new(Vec::new());
        let mut add = |path: &str, kind, content: &[u8], link: &str| {
            let mut header = tar::Header::new_gnu();
            header.set_entry_type(kind);
            header.set_mode(0o755);
            header.set_mtime(1_000_000_000);
            header.set_size(content.len() as u64);
            if !link.is_empty() {
                header.set_link_name(link).unwrap();
            }
            tar.append_data(&mut header, path, content).unwrap();
        };
        use tar::EntryType::{Directory, Link, Regular};
        for dir in ["d", "d/inside", "gone", "opaque", "same", "same/deep"] {
            add(dir, Directory, b"", "");
        }
        for file in [
            "becomes-a-directory",
            "changed",
            "d/inside/file",
            "gone/file",
            "link-one",
            "opaque/old",
            "removed",
            "same/deep/file",
        ] {
            add(file, Regular, file.as_bytes(), "");
        }
        for link in ["link-three", "link-two"] {
            add(link, Link, b"", "link-one");
        }
        tar.into_inner().unwrap()
    }

    /// Everything that can be done to a tree.
    pub(in crate::snapshotter::diff) fn change(union: &Union) {
        const ROOT: NodeId = NodeId::ROOT;
        let name = |name: &'static str| OsStr::new(name);
        let find = |at: &str| {
            at.split('/').fold(ROOT, |parent, name| {
                union.lookup(parent, name.as_ref()).unwrap().node
            })
        };
        let make = |parent, name: &OsStr, content: &[u8], offset: u64| {
            let (entry, handle) = union.create(parent, name, 0o640, 0, &Caller::ROOT).unwrap();
            union
                .write(entry.node, None, offset, content, None)
                .unwrap();
            union.release(entry.node, handle);
            entry.node
        };
        union
            .rename(ROOT, name("d"), ROOT, name("moved"), RenameMode::Replace)
            .unwrap();
        union.unlink(ROOT, name("removed")).unwrap();
        union.unlink(find("gone"), name("file")).unwrap();
        union.rmdir(ROOT, name("gone")).unwrap();
        union.unlink(find("opaque"), name("old")).unwrap();
        union.rmdir(ROOT, name("opaque")).unwrap();
        let opaque = union.mkdir(ROOT, name("opaque"), 0o700, &Caller::ROOT);
        make(opaque.unwrap().node, name("new"), b"new", 0);
        union.unlink(ROOT, name("becomes-a-directory")).unwrap();
        let directory = union.mkdir(ROOT, name("becomes-a-directory"), 0o711, &Caller::ROOT);
        let long = "n".repeat(250);
        make(directory.unwrap().node, long.as_ref(), b"long", 0);
        union
            .write(find("changed"), None, 3, b"CHANGED", None)
            .unwrap();
        union
            .write(find("link-two"), None, 0, b"all three", None)
            .unwrap();
        let sparse = make(find("same/deep"), name("sparse"), &[1; 10_000], 3 << 20);
        union.write(sparse, None, 5000, b"in a hole", None).unwrap();
        union.link(sparse, ROOT, name("z-sparse-too")).unwrap();
        let owner = SetAttr {
            uid: Some(3_000_000_000),
            gid: Some(7),
            perm: Some(0o6755),
            ..SetAttr::default()
        };
        union
            .setattr(find("same/deep/file"), None, &owner, &Caller::ROOT)
            .unwrap();
        union
            .setxattr(sparse, name("user.name"), b"v\0=\n", SetXattrMode::Any)
            .unwrap();
        union
            .symlink(ROOT, name("symlink"), name("/no/where"), &Caller::ROOT)
            .unwrap();
        for (name, mode, device) in [
            ("fifo", libc::S_IFIFO | 0o600, 0),
            ("null", libc::S_IFCHR | 0o666, libc::makedev(1, 3)),
            ("disk", libc::S_IFBLK | 0o660, libc::makedev(254, 70_000)),
        ] {
            union
                .mknod(ROOT, name.as_ref(), mode, device, &Caller::ROOT)
                .unwrap();
        }
    }

    fn written(snapshots: &Snapshotter, key: &str) -> Result<Vec<u8>> {
        let mut stream = Vec::new();
        snapshots.write_layer(OWNER, key, &mut stream, None)?;
        Ok(stream)
    }

    fn open(snapshots: &Snapshotter, key: &str) -> Union {
        Union::open(snapshots.union_config(OWNER, key).unwrap()).unwrap()
    }

    #[test]
    fn a_layer_makes_of_the_parent_what_the_snapshot_is() {
        let place = Place::new();
        let snapshots = place.open();
        let apply = |key: &str, stream: &[u8]| {
            let applied = snapshots.apply_layer(OWNER, key, (stream, &Expected::default()), &());
            applied.unwrap();
        };
        prepare(&snapshots, "unpack", None);
        apply("unpack", &base());
        snapshots
            .commit(OWNER, "base", "unpack", BTreeMap::new())
            .unwrap();
        prepare(&snapshots, "work", Some("base"));
        let union = open(&snapshots, "work");
        change(&union);
        union.settle_links().unwrap();
        let changed = tree(&union);
        drop(union);
        let stream = written(&snapshots, "work").unwrap();
        assert!(stream.len() < 100_000, "{}: no holes", stream.len());
        assert!(written(&snapshots, "work").unwrap() == stream);

        prepare(&snapshots, "copy", Some("base"));
        apply("copy", &stream);
        let copy = tree(&open(&snapshots, "copy"));
        assert_eq!(copy, changed);
        // Again from the packed layer that it has become, and from that which a commit makes.
        assert!(written(&snapshots, "copy").unwrap() == stream);
        snapshots
            .commit(OWNER, "done", "work", BTreeMap::new())
            .unwrap();
        assert!(written(&snapshots, "done").unwrap() == stream);
        prepare(&snapshots, "next", Some("done"));
        assert_eq!(written(&snapshots, "next").unwrap(), [0; 1024]);
    }

    /// Every directory with a neighbour like `name-more` was told a second time, before what lies below it.
    #[test]
    fn no_path_is_told_twice() {
        let place = Place::new();
        let snapshots = place.open();
        let upper = prepare(&snapshots, "work", None).upper_dir.unwrap();
        for dir in ["a", "a-b", "a.c/d", "a.c/d!", "a!"] {
            std::fs::create_dir_all(upper.join(dir)).unwrap();
            std::fs::write(upper.join(dir).join("file"), dir).unwrap();
        }
        let listed = |key: &str| {
            let stream = written(&snapshots, key).unwrap();
            let mut archive = tar::Archive::new(&*stream);
            let entries = archive.entries().unwrap();
            let paths = entries.map(|entry| entry.unwrap().path().unwrap().display().to_string());
            paths.collect::<Vec<_>>()
        };
        let expected = [
            "a/",
            "a/file",
            "a!/",
            "a!/file",
            "a-b/",
            "a-b/file",
            "a.c/",
            "a.c/d/",
            "a.c/d/file",
            "a.c/d!/",
            "a.c/d!/file",
        ];
        assert_eq!(listed("work"), expected);
        snapshots
            .commit(OWNER, "done", "work", BTreeMap::new())
            .unwrap();
        assert_eq!(listed("done"), expected);
    }

    #[test]
    fn nothing_in_a_layer_is_later_than_its_epoch() {
        let place = Place::new();
        let snapshots = place.open();
        prepare(&snapshots, "unpack", None);
        let layer = (&*base(), &Expected::default());
        snapshots.apply_layer(OWNER, "unpack", layer, &()).unwrap();
        snapshots
            .commit(OWNER, "base", "unpack", BTreeMap::new())
            .unwrap();
        let upper = prepare(&snapshots, "work", Some("base")).upper_dir.unwrap();
        std::fs::create_dir(upper.join("made")).unwrap();
        std::fs::write(upper.join("made/now"), "new").unwrap();
        std::fs::hard_link(upper.join("made/now"), upper.join("made/too")).unwrap();
        let old = std::time::UNIX_EPOCH + std::time::Duration::from_secs(5);
        let file = std::fs::File::create(upper.join("old")).unwrap();
        file.set_modified(old).unwrap();
        std::os::unix::fs::symlink("made", upper.join("link")).unwrap();
        open(&snapshots, "work")
            .unlink(NodeId::ROOT, OsStr::new("removed"))
            .unwrap();
        let mut stream = Vec::new();
        let epoch = Time { sec: 1000, nsec: 0 };
        snapshots
            .write_layer(OWNER, "work", &mut stream, Some(epoch))
            .unwrap();
        let mut archive = tar::Archive::new(&*stream);
        let times: BTreeMap<_, _> = archive
            .entries()
            .unwrap()
            .map(|entry| {
                let entry = entry.unwrap();
                let path = entry.path().unwrap().to_string_lossy().into_owned();
                (path, entry.header().mtime().unwrap())
            })
            .collect();
        let expected = [
            (".wh.removed", 1000),
            ("link", 1000),
            ("made/", 1000),
            ("made/now", 1000),
            ("made/too", 1000),
            ("old", 5),
        ];
        let expected = expected.map(|(path, time)| (path.to_owned(), time));
        assert_eq!(times, BTreeMap::from(expected));
    }

    #[test]
    fn what_a_layer_cannot_say_is_refused_or_left_out() {
        let place = Place::new();
        let snapshots = place.open();
        let upper = prepare(&snapshots, "work", None).upper_dir.unwrap();
        std::os::unix::net::UnixListener::bind(upper.join("socket")).unwrap();
        assert_eq!(written(&snapshots, "work").unwrap(), [0; 1024]);
        let union = open(&snapshots, "work");
        let dir = union.mkdir(NodeId::ROOT, "dir".as_ref(), 0o755, &Caller::ROOT);
        let (dir, name) = (dir.unwrap().node, OsStr::new(".wh.name"));
        let made = union.create(dir, name, 0o644, 0, &Caller::ROOT).unwrap();
        union.release(made.0.node, made.1);
        drop(union);
        let refused = written(&snapshots, "work")
            .map(drop)
            .unwrap_err()
            .to_string();
        assert!(
            refused.contains("/dir/.wh.name") && refused.contains("marks a deletion"),
            "{refused}"
        );
    }
}
