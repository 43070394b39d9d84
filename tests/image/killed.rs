//! kill -9 of plyd while it brings good copies of damaged contents: at random moments, and when a good one is there and the bad one
//! has not left the disk. The seed of the moments is printed; `PLYWOOD_KILLS_SEED` sets it.

use std::fs;
use std::path::Path;
use std::process::{Child, Stdio};
use std::time::Duration;

use nix::sys::signal::Signal;
use rand::rngs::StdRng;
use rand::{Rng, SeedableRng};

use super::archive::*;
use super::care::stored;
use super::common::Plyd;
use super::damage::{assert_sound, flip, load, mount};

const ROUNDS: u64 = 16;

fn image(name: &str) -> Vec<u8> {
    let layer = Layer::new()
        .file("small", 0o644, &noise(1, 40 << 10))
        .file("large", 0o644, &noise(2, 300 << 10))
        .file("name", 0o644, name.as_bytes());
    archive(name, &[Blob::gzip(layer)])
}

/// Whether a file of an image is what it was; it may be an error, but nothing else.
fn is_right(mnt: &Path, name: &str) -> bool {
    let good = match name {
        "small" => noise(1, 40 << 10),
        _ => noise(2, 300 << 10),
    };
    match fs::read(mnt.join(name)) {
        Ok(bytes) => {
            assert!(bytes == good, "{name}");
            true
        }
        Err(error) => {
            assert_eq!(error.raw_os_error(), Some(libc::EIO), "{name}");
            false
        }
    }
}

/// The bad copy stayed on the disk for good, and after a start whoever found it first had nothing but that.
#[test]
fn a_kill_between_a_good_copy_and_the_end_of_the_bad_one_costs_nothing() {
    let seed = std::env::var("PLYWOOD_KILLS_SEED")
        .map_or_else(|_| rand::random(), |seed| seed.parse().unwrap());
    eprintln!("PLYWOOD_KILLS_SEED={seed}");
    let mut random = StdRng::seed_from_u64(seed);
    let mut plyd = Plyd::start();
    load(&plyd, &image("first"));
    plyd.ok(["snapshot", "view", "look", "first"]);
    let mnt = mount(&plyd, "look");
    let mut between = 0;
    for round in 0..ROUNDS {
        let bad = stored(&plyd, "packs").remove(0);
        flip(&bad, 5000);
        flip(&stored(&plyd, "objects")[0], 5000);
        assert_eq!(plyd.snapctl(["system", "verify", "--deep"]).code, 1);
        let dir = plyd.root().join("store/packs");
        let count = || fs::read_dir(&dir).unwrap().count();
        let packs = count();

        let name = format!("image-{round}");
        let archive = plyd.dir().join("archive");
        fs::write(&archive, image(&name)).unwrap();
        let mut loading = plyd.command();
        loading.args(["image", "load", "-qi"]).arg(&archive);
        loading.stderr(Stdio::null());
        let mut loading = loading.spawn().unwrap();
        if random.random_bool(0.5) {
            let is_under_way = |loading: &mut Child| {
                let ended = loading.try_wait().unwrap().is_some();
                !ended && count() == packs
            };
            while is_under_way(&mut loading) {}
        } else {
            std::thread::sleep(Duration::from_millis(random.random_range(0..100)));
        }
        plyd.signal(Signal::SIGKILL);
        loading.wait().unwrap();

        let has_come = count() > packs || !bad.exists();
        between += u64::from(has_come && bad.exists());
        let check = |mnt: &Path, is_whole: bool| {
            assert!(is_right(mnt, "small") || !has_come, "{round}");
            assert!(is_right(mnt, "large") || !is_whole, "{round}");
        };
        check(&mnt, false);
        plyd.launch();
        let images = plyd.ok(["image", "ls"]);
        let is_whole = images.contains(&name);
        check(&mnt, is_whole);
        // To who finds out only now where things are.
        plyd.ok(["snapshot", "view", "new", "first"]);
        let new = mount(&plyd, "new");
        check(&new, is_whole);

        let mended = plyd.piped(["system", "repair", "-i", "-"], &image("first"));
        assert_eq!(mended.code, 0, "{}{}", mended.stdout, mended.stderr);
        assert_sound(&plyd);
        assert!(!bad.exists());
        for mnt in [&mnt, &new] {
            assert!(is_right(mnt, "small") && is_right(mnt, "large"), "{round}");
        }
        plyd.umount(&new);
        fs::remove_dir(&new).unwrap();
        plyd.ok(["snapshot", "rm", "new"]);
    }
    assert!(between > 0, "never between the two");
    plyd.umount(&mnt);
}
