//! Views on a disk that cannot be written.

use std::fs::{self, File};
use std::io::{self, Write};
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};

use nix::mount::{MsFlags, mount};
use nix::sys::statvfs::statvfs;
use plywood::store::ingest::Settings;
use plywood::store::layers::{Expected, Layers};
use plywood::store::view::{Verify, View};
use plywood::store::{Error, LayerName};

use super::hostile::SmallDisk;

/// A store with a layer of many files, on a disk of its own with little room.
struct Full {
    layers: Layers,
    chain: [LayerName; 1],
    disk: SmallDisk,
    _dir: tempfile::TempDir,
}

impl Full {
    fn new() -> Self {
        let dir = tempfile::tempdir().unwrap();
        let disk = SmallDisk::mount(dir.path().join("disk"));
        let (layers, _) = Layers::open(&disk.0.join("store"), Settings::default()).unwrap();
        let mut builder = tar::Builder::new(Vec::new());
        for number in 0..20_000 {
            let mut header = tar::Header::new_ustar();
            header.set_mode(0o644);
            let name = format!("file {number}");
            builder.append_data(&mut header, name, io::empty()).unwrap();
        }
        let stream = builder.into_inner().unwrap();
        let name = layers.import(&*stream, &Expected::default(), &());
        Self {
            layers,
            chain: [name.unwrap()],
            disk,
            _dir: dir,
        }
    }

    fn view(&self) -> Result<View, Error> {
        self.layers.view(&self.chain, Verify::First)
    }

    fn free(&self) -> u64 {
        let disk = statvfs(&self.disk.0).unwrap();
        disk.blocks_available() * disk.fragment_size()
    }

    /// Leaves so many bytes free until the file is removed.
    fn fill(&self, left: u64) -> PathBuf {
        let path = self.disk.0.join("filler");
        let mut file = File::create(&path).unwrap();
        let mut room = self.free() - left;
        while room > 0 {
            let count = room.min(1 << 20);
            file.write_all(&vec![1; usize::try_from(count).unwrap()])
                .unwrap();
            room -= count;
        }
        path
    }

    fn remount(&self, flags: MsFlags) {
        let none: Option<&str> = None;
        let flags = MsFlags::MS_REMOUNT | flags;
        // Refused as long as a child that another test is about to execute something in has a file open for writing.
        while let Err(errno) = mount(none, &self.disk.0, none, flags, none) {
            assert_eq!(errno, nix::Error::EBUSY);
            std::thread::yield_now();
        }
    }

    fn half_made(&self) -> usize {
        fs::read_dir(self.disk.0.join("store/tmp")).unwrap().count()
    }
}

fn cut_off(view: &Path) {
    let file = File::options().write(true).open(view).unwrap();
    file.set_len(1024).unwrap();
}

/// Fails unless the host has refused it for that reason.
fn assert_fails(result: Result<View, Error>, errno: i32) {
    let error = result.unwrap_err();
    let Error::Io { source, .. } = &error else {
        panic!("{error}");
    };
    assert_eq!(source.raw_os_error(), Some(errno), "{error}");
}

/// What is left of the view that is mounted cannot be made whole, for there is room for one more and not for two.
#[test]
fn a_view_is_built_anew_where_the_disk_has_no_room_to_restore_the_one_that_is_mounted() {
    let full = Full::new();
    let path = full.view().unwrap().path().to_owned();
    let good = fs::read(&path).unwrap();
    let mounted = View::open_stored(&path, Verify::First).unwrap();
    cut_off(&path);
    let filler = full.fill(good.len() as u64 * 3 / 2);
    let anew = full.view().unwrap();
    anew.verify().unwrap();
    assert!(fs::read(&path).unwrap() == good);
    assert!(mounted.verify().is_err());
    assert_eq!(full.half_made(), 0);
    // The other has a name as long as it is mounted.
    let views = || fs::read_dir(path.parent().unwrap()).unwrap().count();
    assert_eq!(views(), 2);
    full.layers.collect(false, &());
    assert_eq!(views(), 2);
    drop(mounted);
    full.layers.collect(false, &());
    assert_eq!(views(), 1);
    fs::remove_file(filler).unwrap();
}

#[test]
fn a_full_disk_keeps_nobody_from_views_that_are_there_and_leaves_nothing_of_others() {
    let full = Full::new();
    let path = full.view().unwrap().path().to_owned();
    let filler = full.fill(0);
    full.view().unwrap().verify().unwrap();
    let taken: u64 = [&path, &filler]
        .map(|path| fs::metadata(path).unwrap().blocks() * 512)
        .iter()
        .sum();
    fs::remove_file(&path).unwrap();
    fs::remove_file(filler).unwrap();
    // A child that another test is about to execute something in may still have the view open.
    while full.free() < taken {
        std::thread::yield_now();
    }
    let filler = full.fill(100 << 10);
    assert_fails(full.view(), libc::ENOSPC);
    assert_eq!(full.half_made(), 0);
    assert!(!path.exists());
    fs::remove_file(filler).unwrap();
    full.view().unwrap().verify().unwrap();
}

#[test]
fn a_read_only_disk_keeps_nobody_from_views_that_are_sound() {
    let full = Full::new();
    let path = full.view().unwrap().path().to_owned();
    full.remount(MsFlags::MS_RDONLY);
    full.view().unwrap().verify().unwrap();
    View::open_stored(&path, Verify::First).unwrap();
    full.remount(MsFlags::empty());
    cut_off(&path);
    full.remount(MsFlags::MS_RDONLY);
    assert_fails(full.view(), libc::EROFS);
    // Nor does a repair, or a collection, take that for done which it could not do.
    let mended = full.layers.mend(&Default::default(), &());
    assert!(mended.views.is_empty() && !mended.errors.is_empty());
    assert_eq!(full.layers.collect(false, &()).orphans, []);
    full.remount(MsFlags::empty());
    full.view().unwrap().verify().unwrap();
}
