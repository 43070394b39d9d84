//! What a snapshot takes that somebody works with.

use std::fs::{self, File};
use std::os::unix::fs::FileExt;
use std::path::Path;

use nix::sys::signal::Signal;

use super::archive::*;
use super::care::{df, load, user};
use super::common::Plyd;

const LARGE: usize = 3 << 20;
const SMALL: usize = 100_000;

/// One byte that was written to a large file of an image once hid what the snapshot takes, and made the command fail, until
/// somebody mounted the snapshot anew.
#[test]
fn a_file_that_is_copied_up_in_part_counts_as_the_mount_shows_it() {
    let mut plyd = Plyd::start();
    let layer = Layer::new()
        .file("large", 0o644, &noise(1, LARGE))
        .file("other", 0o644, &noise(2, LARGE))
        .file("small", 0o644, &noise(3, SMALL));
    load(&plyd, &archive("image", &[Blob::gzip(layer)]));
    let mnt = plyd.dir().join("mnt");
    fs::create_dir(&mnt).unwrap();
    let dir = mnt.to_str().unwrap().to_owned();
    plyd.ok(["snapshot", "prepare", "work", "image"]);
    plyd.ok(["mount", "work", &dir]);
    let open = |name: &str| File::options().write(true).open(mnt.join(name)).unwrap();
    let upper = plyd.json(["snapshot", "info", "work", "--json"])["upper_dir"].clone();
    let upper = upper.as_str().unwrap().to_owned();
    let check = |plyd: &Plyd, sizes: &[usize]| {
        let mark = xattr::get(Path::new(&upper).join("large"), "trusted.overlay.metacopy");
        assert_eq!(mark.unwrap().unwrap()[0], b'P');
        // The host may find room for it only now.
        rustix::fs::syncfs(File::open(&upper).unwrap()).unwrap();
        let df = df(plyd);
        let work = user(&df, "snapshot", "work");
        assert_eq!(work["logical"], sizes.iter().sum::<usize>(), "{df:#}");
        assert!(work["unique"].as_u64().unwrap() < 1 << 20, "{df:#}");
    };

    open("large").write_all_at(b"x", 2_000_000).unwrap();
    check(&plyd, &[LARGE, LARGE, SMALL]);
    // Longer than before, by a hole, and shorter.
    open("large").set_len(5 << 20).unwrap();
    open("other").write_all_at(b"x", 100).unwrap();
    open("other").set_len(2 << 20).unwrap();
    check(&plyd, &[5 << 20, 2 << 20, SMALL]);
    // All of the tree is counted then.
    fs::hard_link(mnt.join("small"), mnt.join("again")).unwrap();
    fs::rename(mnt.join("other"), mnt.join("moved")).unwrap();
    check(&plyd, &[5 << 20, 2 << 20, SMALL]);
    plyd.umount(&dir);
    check(&plyd, &[5 << 20, 2 << 20, SMALL]);
    plyd.signal(Signal::SIGTERM);
    plyd.launch();
    check(&plyd, &[5 << 20, 2 << 20, SMALL]);
}
