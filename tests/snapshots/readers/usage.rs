//! Usage is what du(1) says of the same work in a plain directory: allocated bytes, and every inode once.

use std::fs::{self, File, Permissions};
use std::os::unix::fs::{FileExt, PermissionsExt, symlink};
use std::path::{Path, PathBuf};
use std::process::Command;

use memmap2::MmapMut;
use nix::sys::stat::{Mode, SFlag, makedev, mknod};
use plywood::snapshotter::Usage;

use super::{LARGE, OWNER, Place, SMALL, mapping, writer};

const BLOCK: u64 = 4096;
/// What a mount copies up at a time of a large file.
const CHUNK: usize = 64 << 10;

/// What du(1) says of a directory.
fn du(dir: &Path) -> Usage {
    // It counts what is reserved for pages that are written, but not what is not written at all.
    rustix::fs::syncfs(File::open(dir).unwrap()).unwrap();
    let number = |how: &str| {
        let output = Command::new("du").args(["-s", how]).arg(dir).output();
        let text = String::from_utf8(output.unwrap().stdout).unwrap();
        text.split_whitespace().next().unwrap().parse().unwrap()
    };
    Usage {
        size: number("--block-size=1"),
        inodes: number("--inodes"),
    }
}

fn same(place: &Place, key: &str, twin: &Path, when: &str) {
    assert_eq!(same_but_for_marks(place, key, twin, when), 0, "{when}");
}

/// A copy has marks, for which the host may need a block. Answers what those take.
fn same_but_for_marks(place: &Place, key: &str, twin: &Path, when: &str) -> u64 {
    let usage = place.snapshots.usage(OWNER, key).unwrap();
    let twin = du(twin);
    assert_eq!(usage.inodes, twin.inodes, "{when}");
    let upper = place.snapshots.stat(OWNER, key).unwrap().upper_dir;
    assert_eq!(usage, du(&upper.unwrap()), "{when}");
    let marks = usage.size.checked_sub(twin.size);
    let marks = marks.unwrap_or_else(|| panic!("{when}: {usage:?}, {twin:?}"));
    assert!(marks <= usage.inodes * BLOCK, "{when}: {marks}");
    marks
}

/// What somebody has open who goes on.
struct AtWork {
    root: PathBuf,
    appended: File,
    cut: File,
    stored: MmapMut,
    /// Takes room, but not in the snapshot: it has no name.
    _gone: File,
}

impl AtWork {
    fn begin(root: &Path) -> Self {
        let root = root.to_owned();
        fs::create_dir_all(root.join("d/deep")).unwrap();
        fs::write(root.join("d/closed"), vec![1; SMALL]).unwrap();
        fs::hard_link(root.join("d/closed"), root.join("d/deep/link")).unwrap();
        fs::write(root.join("empty"), "").unwrap();
        symlink("closed", root.join("d/short")).unwrap();
        symlink("a".repeat(300), root.join("d/long")).unwrap();
        for (name, kind, device) in [
            ("fifo", SFlag::S_IFIFO, 0),
            ("null", SFlag::S_IFCHR, makedev(1, 3)),
        ] {
            mknod(&root.join(name), kind, Mode::S_IRUSR, device).unwrap();
        }
        let appended = writer(root.join("appended"));
        appended.write_all_at(&[1; 10_000], 0).unwrap();
        let cut = writer(root.join("cut"));
        cut.set_len(50 << 20).unwrap();
        for at in [0, 4 << 20, 30 << 20] {
            cut.write_all_at(&[1; 5000], at).unwrap();
        }
        let stored = writer(root.join("stored"));
        stored.set_len(10 * SMALL as u64).unwrap();
        let mut stored = mapping::shared_mut(&stored);
        stored[..SMALL].fill(1);
        let gone = writer(root.join("gone"));
        gone.write_all_at(&[1; SMALL], 0).unwrap();
        fs::remove_file(root.join("gone")).unwrap();
        Self {
            root,
            appended,
            cut,
            stored,
            _gone: gone,
        }
    }

    fn go_on(&mut self) {
        self.appended.write_all_at(&[1; 70_000], 10_000).unwrap();
        self.cut.set_len((4 << 20) + 10).unwrap();
        self.stored[5 * SMALL..].fill(1);
        fs::create_dir(self.root.join("d/more")).unwrap();
        fs::write(self.root.join("d/more/file"), [1; 5000]).unwrap();
        fs::remove_file(self.root.join("d/closed")).unwrap();
        fs::remove_file(self.root.join("empty")).unwrap();
    }
}

fn check(options: &str) {
    let place = Place::new(options);
    let twin = place.dir.path().join("alone");
    fs::create_dir(&twin).unwrap();
    let root = place.prepare("alone", None);
    let mut both = [&root, &twin].map(|root| AtWork::begin(root));
    same(&place, "alone", &twin, &format!("{options}: begun"));
    both.iter_mut().for_each(AtWork::go_on);
    same(&place, "alone", &twin, &format!("{options}: gone on"));
    // Whoever looks from inside sees the same, now that the host knows all.
    assert_eq!(du(&root), du(&twin), "{options}: inside");
    both[0].stored[3 * SMALL..4 * SMALL].fill(1);
    both[1].stored[3 * SMALL..4 * SMALL].fill(1);
    same(&place, "alone", &twin, &format!("{options}: stored to"));

    on_a_layer(&place, options);
}

/// What is copied up counts, and nothing else of the layers below.
fn on_a_layer(place: &Place, options: &str) {
    let root = place.prepare("fill", None);
    fs::create_dir_all(root.join("d/below")).unwrap();
    let files = ["large", "stored", "cut", "left", "mode", "gone", "d/file"];
    for name in files {
        let size = if name == "large" { LARGE } else { SMALL };
        fs::write(root.join(name), vec![b'0'; size]).unwrap();
    }
    place.commit("base", "fill");
    let root = place.prepare("work", Some("base"));
    let twin = place.dir.path().join("upper");
    fs::create_dir(&twin).unwrap();
    same(place, "work", &twin, &format!("{options}: nothing"));

    let [large, stored, cut] = ["large", "stored", "cut"].map(|name| writer(root.join(name)));
    large.write_all_at(&[1; 10_000], 1000).unwrap();
    cut.set_len(SMALL as u64 / 2).unwrap();
    let mut maps = [&large, &stored].map(mapping::shared_mut);
    maps[0][10 * CHUNK] = 1;
    maps[1][0] = 1;
    fs::set_permissions(root.join("mode"), Permissions::from_mode(0o600)).unwrap();
    fs::remove_file(root.join("gone")).unwrap();
    fs::write(root.join("d/file"), "new").unwrap();

    let copy = writer(twin.join("large"));
    copy.set_len(LARGE as u64).unwrap();
    for chunk in [0, 10] {
        copy.write_all_at(&[1; CHUNK], (chunk * CHUNK) as u64)
            .unwrap();
    }
    fs::write(twin.join("stored"), [1; SMALL]).unwrap();
    fs::write(twin.join("cut"), [1; SMALL / 2]).unwrap();
    fs::create_dir(twin.join("d")).unwrap();
    fs::write(twin.join("d/file"), "new").unwrap();
    // A file that is the lower's but for its mode, and the mark of one that is gone.
    File::create(twin.join("mode")).unwrap();
    mknod(&twin.join("gone"), SFlag::S_IFCHR, Mode::empty(), 0).unwrap();
    let when = format!("{options}: on a layer");
    let marks = same_but_for_marks(place, "work", &twin, &when);

    maps[0][20 * CHUNK] = 1;
    copy.write_all_at(&[1; CHUNK], (20 * CHUNK) as u64).unwrap();
    let when = format!("{options}: one chunk more");
    assert_eq!(
        same_but_for_marks(place, "work", &twin, &when),
        marks,
        "{when}"
    );
}

in_every_mode!(check);
