//! A process that may open no more files, or few. What it cannot look at is not damaged for that.

use std::collections::BTreeMap;
use std::os::fd::AsRawFd;
use std::process::Command;

use nix::sys::resource::{Resource, getrlimit, setrlimit};
use parking_lot::Mutex;

use super::*;
use crate::store::verify::{Fault, Told};

/// Set in a process of its own: the limit is one of all threads.
const FEW: &str = "PLYWOOD_TEST_FEW_DESCRIPTORS";
/// More than anything here opens at a time.
const MOST: u64 = 12;

/// Has `work` be done with so many descriptors left, and answers what comes of it.
fn with_few<T>(left: u64, work: impl FnOnce() -> T) -> T {
    let (soft, hard) = getrlimit(Resource::RLIMIT_NOFILE).unwrap();
    let next = File::open("/dev/null").unwrap().as_raw_fd();
    let next = u64::try_from(next).unwrap();
    setrlimit(Resource::RLIMIT_NOFILE, next + left, hard).unwrap();
    let done = work();
    setrlimit(Resource::RLIMIT_NOFILE, soft, hard).unwrap();
    done
}

/// What lies in the store, byte by byte.
fn everything(store: &Store) -> BTreeMap<PathBuf, Vec<u8>> {
    let mut found = BTreeMap::new();
    let mut waiting = vec![store.dir.path().to_owned()];
    while let Some(dir) = waiting.pop() {
        for entry in fs::read_dir(dir).unwrap() {
            let path = entry.unwrap().path();
            match path.is_dir() {
                true => waiting.push(path),
                false => drop(found.insert(path.clone(), fs::read(path).unwrap())),
            }
        }
    }
    found
}

/// All that a verification tells.
#[derive(Default)]
pub(super) struct Faults(pub(super) Mutex<Vec<Fault>>);

impl Observer for Faults {}

impl Told for Faults {
    fn fault(&self, fault: Fault) {
        self.0.lock().push(fault);
    }
    fn sum(&self, _layers: u64, _total: u64, _objects: u64, _bytes: u64) {}
}

fn all_of_it() {
    let store = Store::new();
    let chain = [store.layer, store.other];
    let key = ViewKey::of(&chain);
    let chains = HashMap::from([(key, chain.to_vec())]);
    let path = store.layers.view(&chain, Verify::First).unwrap();
    let path = path.path().to_owned();
    let good = everything(&store);

    // What is sound stays as it is, whatever could not be looked at.
    let mut told = 0;
    for left in 0..MOST {
        let mended = with_few(left, || {
            let found = Faults::default();
            told += usize::from(store.layers.verify(true, &found).is_err());
            let found = found.0.into_inner();
            assert!(found.is_empty(), "{left} descriptors: {found:?}");
            drop(store.layers.verify_layer(store.layer, true, &()));
            for name in FILES {
                let name = ObjectName::of(&content(name));
                assert!(!store.layers.objects().is_doubted(&name));
            }
            assert!(store.layers.doubted().is_empty());
            drop(store.layers.collect(false, &()));
            drop(store.layers.view(&chain, Verify::First));
            store.layers.mend(&chains, &())
        });
        assert!(
            mended.views.is_empty() && mended.packs.is_empty(),
            "{mended:?}"
        );
        assert!(mended.put_back.is_empty() && mended.records.is_empty());
        assert!(left > 0 || !mended.errors.is_empty());
        assert!(everything(&store) == good, "{left} descriptors");
    }
    assert!(told > 0);
    assert_eq!(store.faults(), 0);
    assert!(store.layers.doubted().is_empty());

    // What is damaged is mended as soon as there are enough, and nothing is lost by a try before that.
    for left in 0..MOST {
        flip(&path, 1024 + 60);
        flip(&store.file("packs"), 8);
        with_few(left, || drop(store.layers.mend(&chains, &())));
        let mended = store.layers.mend(&chains, &());
        assert!(mended.errors.is_empty(), "{left}: {:?}", mended.errors);
        assert_eq!(store.faults(), 0, "{left} descriptors");
        assert!(store.layers.verify_views(&()).unwrap().is_empty());
        store.layers.view(&chain, Verify::First).unwrap();
    }

    // A view that another has taken the place of is not passed over where nobody can tell whether it is mounted.
    let view = View::open_stored(&path, Verify::First).unwrap();
    flip(&path, 100);
    store.layers.mend(&chains, &());
    for left in 0..MOST {
        if let Ok(bad) = with_few(left, || store.layers.verify_views(&())) {
            assert_eq!(bad.len(), 1, "{left} descriptors");
        }
    }
    drop(view);
    store.layers.collect(false, &());
    store.assert_whole();
}

/// Sound views were once removed by who could not open them.
#[test]
fn who_can_open_no_more_files_takes_nothing_for_damaged() {
    if std::env::var_os(FEW).is_some() {
        return all_of_it();
    }
    let name =
        "store::repair::tests::descriptors::who_can_open_no_more_files_takes_nothing_for_damaged";
    let done = Command::new(std::env::current_exe().unwrap())
        .args(["--exact", name, "--nocapture"])
        .env(FEW, "1")
        .output()
        .unwrap();
    let told = String::from_utf8_lossy(&done.stderr);
    assert!(done.status.success(), "{told}");
}
