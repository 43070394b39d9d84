//! Tests of what becomes of a view that several want at once, or that the disk cannot read.

use std::collections::HashMap;
use std::fs::{self, File};
use std::os::fd::AsFd;
use std::os::unix::fs::symlink;
use std::path::{Path, PathBuf};
use std::thread;
use std::time::{Duration, Instant};

use crate::store::error::Error;
use crate::store::ingest::Settings;
use crate::store::layers::{Expected, Layers};
use crate::store::view::{Verify, View};
use crate::store::{LayerName, ViewKey};
use crate::sys::fs::lock_shared;

/// Longer than anything here takes, where nothing keeps it from going on.
const MOMENT: Duration = Duration::from_millis(300);

/// A store with one layer of so many empty files and one that is not.
fn store(dir: &Path, files: usize) -> (Layers, LayerName) {
    let (layers, _) = Layers::open(dir, Settings::default()).unwrap();
    let mut builder = tar::Builder::new(Vec::new());
    let empty = (0..files).map(|number| (format!("file {number}"), &b""[..]));
    for (name, content) in empty.chain([("full".to_owned(), &b"content"[..])]) {
        let mut header = tar::Header::new_ustar();
        header.set_mode(0o644);
        header.set_size(content.len() as u64);
        builder.append_data(&mut header, name, content).unwrap();
    }
    let stream = builder.into_inner().unwrap();
    let name = layers.import(&*stream, &Expected::default(), &()).unwrap();
    (layers, name)
}

fn place(layers: &Layers, chain: &[LayerName]) -> PathBuf {
    layers.views().join(format!("{}.view", ViewKey::of(chain)))
}

/// How many names the file of a view has.
fn names(view: &View) -> u64 {
    nix::sys::stat::fstat(view).unwrap().st_nlink
}

/// Two that mounted one chain at a time each built its view. The second took the name from the first, which was mounted by then,
/// and what it names was not looked for by any collection.
#[test]
fn a_view_that_was_built_and_mounted_meanwhile_is_not_replaced() {
    let tmp = tempfile::tempdir().unwrap();
    let (layers, name) = store(tmp.path(), 20_000);
    let chain = [name];
    let path = place(&layers, &chain);
    layers.view(&chain, Verify::First).unwrap();
    let built = fs::read(&path).unwrap();
    fs::remove_file(&path).unwrap();
    let is_writing = || fs::read_dir(layers.tmp()).unwrap().next().is_some();
    let mounted = thread::scope(|scope| {
        let second = scope.spawn(|| layers.view(&chain, Verify::First).unwrap());
        while !is_writing() {
            thread::yield_now();
        }
        // It has found none, and what it builds has no name yet.
        let looking = layers.looking.lock();
        thread::sleep(MOMENT);
        fs::write(&path, &built).unwrap();
        let mounted = View::open_stored(&path, Verify::First).unwrap();
        drop(looking);
        second.join().unwrap();
        mounted
    });
    assert_eq!(names(&mounted), 1);
    assert_eq!(fs::read_dir(layers.views()).unwrap().count(), 1);
}

/// A repair or a collection has found a damaged view, and before it takes that away somebody builds another in its place, and is
/// about to mount that.
#[test]
fn a_view_that_was_built_again_meanwhile_is_not_taken_away() {
    let tmp = tempfile::tempdir().unwrap();
    let (layers, name) = store(tmp.path(), 10);
    let chain = [name];
    let path = place(&layers, &chain);
    layers.view(&chain, Verify::First).unwrap();
    let built = fs::read(&path).unwrap();
    type Take = fn(&Layers);
    let takers: [Take; 2] = [
        |layers| drop(layers.mend(&HashMap::new(), &())),
        |layers| drop(layers.collect(false, &())),
    ];
    for take in takers {
        let mut damaged = built.clone();
        damaged[100] ^= 1;
        fs::write(&path, damaged).unwrap();
        thread::scope(|scope| {
            let looking = layers.looking.lock();
            let taker = scope.spawn(|| take(&layers));
            let begun = Instant::now();
            while begun.elapsed() < MOMENT {
                assert!(path.exists() && !taker.is_finished());
                thread::yield_now();
            }
            fs::write(&path, &built).unwrap();
            drop(looking);
            taker.join().unwrap();
        });
        assert!(path.exists());
    }
}

/// What the collection had listed under its name was gone when it looked, and under the other name it had not listed it.
#[test]
fn a_repair_gives_no_view_another_name_while_a_collection_looks_for_them() {
    let tmp = tempfile::tempdir().unwrap();
    let (layers, name) = store(tmp.path(), 10);
    let path = place(&layers, &[name]);
    layers.view(&[name], Verify::First).unwrap();
    let mounted = View::open_stored(&path, Verify::First).unwrap();
    let mut bytes = fs::read(&path).unwrap();
    bytes[100] ^= 1;
    fs::write(&path, bytes).unwrap();
    thread::scope(|scope| {
        let collecting = layers.collecting.lock();
        let mending = scope.spawn(|| layers.mend(&HashMap::new(), &()));
        let begun = Instant::now();
        while begun.elapsed() < MOMENT {
            assert!(path.exists() && !mending.is_finished());
            thread::yield_now();
        }
        drop(collecting);
        assert_eq!(mending.join().unwrap().views.len(), 1);
    });
    assert!(!path.exists());
    assert_eq!(names(&mounted), 1);
}

/// Such a chain was mounted by nobody before a repair, and one whose view was only not what was written by everybody.
#[test]
fn a_view_that_the_disk_cannot_read_is_built_again() {
    let tmp = tempfile::tempdir().unwrap();
    let (layers, name) = store(tmp.path(), 10);
    let path = place(&layers, &[name]);
    // Its first byte is in no part of a process, and reading that is EIO.
    symlink("/proc/self/mem", &path).unwrap();
    let failed = View::open(
        &path,
        ViewKey::of(&[name]),
        layers.objects().clone(),
        Verify::First,
    );
    let failed = failed.unwrap_err();
    assert!(
        matches!(&failed, Error::Io { source, .. } if source.raw_os_error() == Some(libc::EIO))
    );
    let view = layers.view(&[name], Verify::First).unwrap();
    view.verify().unwrap();
    assert!(!path.is_symlink());
}

/// Of a plyd that was taken back to an earlier release.
#[test]
fn a_view_of_a_newer_release_stays_for_who_has_it_mounted_and_is_built_anew() {
    let tmp = tempfile::tempdir().unwrap();
    let (layers, name) = store(tmp.path(), 10);
    let path = place(&layers, &[name]);
    layers.view(&[name], Verify::First).unwrap();
    let mut bytes = fs::read(&path).unwrap();
    // An incompatible feature, and the sum of the header.
    bytes[32] |= 4;
    let sum = blake3::hash(&bytes[..992]);
    bytes[992..1024].copy_from_slice(sum.as_bytes());
    fs::write(&path, &bytes).unwrap();
    let mounted = File::open(&path).unwrap();
    lock_shared(mounted.as_fd()).unwrap();
    let refused = View::open_stored(&path, Verify::First).unwrap_err();
    let told = format!("{} needs a newer release of Plywood", path.display());
    assert!(refused.to_string().starts_with(&told), "{refused}");

    layers
        .view(&[name], Verify::First)
        .unwrap()
        .verify()
        .unwrap();
    let views = || fs::read_dir(layers.views()).unwrap();
    let aside = views().map(|entry| entry.unwrap().path());
    let aside: Vec<_> = aside.filter(|found| *found != path).collect();
    assert_eq!(aside.len(), 1);
    assert!(fs::read(&aside[0]).unwrap() == bytes);
    // Nobody here knows what that needs.
    layers.remove(name).unwrap();
    let collected = layers.collect(false, &());
    let removed: Vec<_> = collected
        .orphans
        .iter()
        .map(|orphan| &orphan.path)
        .collect();
    assert_eq!(removed, [&path]);
    let told: Vec<_> = collected.errors.iter().map(ToString::to_string).collect();
    assert!(
        told.len() == 1 && told[0].contains("needs a newer release"),
        "{told:?}"
    );
    drop(mounted);
    assert_eq!(layers.collect(false, &()).orphans.len(), 2);
    assert_eq!(views().count(), 0);
}

/// Nobody could look at it, for want of descriptors or memory: that is no reason to take it away.
#[test]
fn a_view_that_could_not_be_looked_at_is_not_collected() {
    let tmp = tempfile::tempdir().unwrap();
    let (layers, name) = store(tmp.path(), 10);
    let path = place(&layers, &[name]);
    // It can be locked, and reading it is EINVAL.
    symlink("/proc/self/clear_refs", &path).unwrap();
    let collected = layers.collect(false, &());
    assert_eq!(collected.orphans, []);
    assert!(path.is_symlink());
    // Nor does anybody say that it is not mounted, as long as something goes by that.
    layers.remove(name).unwrap();
    let collected = layers.collect(false, &());
    let told: Vec<_> = collected.errors.iter().map(ToString::to_string).collect();
    assert!(
        told.iter().any(|error| error.contains("Invalid argument")),
        "{told:?}"
    );
    assert!(path.is_symlink());
}
