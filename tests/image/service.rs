//! The Images service of a real plyd whose clients and itself are killed in the middle.

use std::io::Write;
use std::path::Path;
use std::process::{Child, Stdio};

use nix::sys::signal::Signal;

use super::archive::*;
use super::common::{Plyd, until};
use super::store::names;

/// An image that takes long enough to unpack for a kill to fall into it.
fn slow() -> Vec<u8> {
    let layer = |prefix: &str| {
        (0..4000).fold(Layer::new(), |layer, number| {
            let content = noise(prefix.len() as u64 * 10_000 + number, 1000);
            layer.file(
                &format!("{prefix}/{}/{number}", number % 40),
                0o644,
                &content,
            )
        })
    };
    archive("slow", &[Blob::gzip(layer("a")), Blob::zstd(layer("bb"))])
}

fn load(plyd: &Plyd) -> Child {
    plyd.command()
        .args(["image", "load", "--quiet"])
        .stdin(Stdio::piped())
        .stdout(Stdio::null())
        .stderr(Stdio::null())
        .spawn()
        .unwrap()
}

fn spooled(root: &Path) -> bool {
    let spools = root.join("images/spool");
    names(&spools)
        .iter()
        .any(|spool| !names(&spools.join(spool)).is_empty())
}

fn is_empty(plyd: &Plyd) -> bool {
    let root = plyd.root();
    [
        "images/spool",
        "images/records",
        "layers",
        "store/layers",
        "store/records",
        "store/tmp",
        "snapshots/data",
        "snapshots/records",
        "trash",
    ]
    .iter()
    .all(|dir| names(&root.join(dir)).is_empty())
}

fn still_loads(plyd: &Plyd, archive: &[u8]) {
    let done = plyd.piped(["image", "load", "-q"], archive);
    assert_eq!(done.code, 0, "{}", done.stderr);
    plyd.ok(["image", "rm", "slow"]);
    until("everything is removed", || is_empty(plyd));
}

#[test]
fn a_client_that_goes_away_leaves_nothing() {
    let plyd = Plyd::start();
    let archive = slow();
    // While it sends.
    let mut client = load(&plyd);
    let mut stdin = client.stdin.take().unwrap();
    stdin.write_all(&archive[..archive.len() / 2]).unwrap();
    until("something is spooled", || spooled(&plyd.root()));
    client.kill().unwrap();
    client.wait().unwrap();
    until("the spool is gone", || is_empty(&plyd));
    // While plyd unpacks.
    let mut client = load(&plyd);
    let mut stdin = client.stdin.take().unwrap();
    stdin.write_all(&archive).unwrap();
    drop(stdin);
    until("something is unpacked", || {
        !names(&plyd.root().join("store/tmp")).is_empty()
    });
    client.kill().unwrap();
    client.wait().unwrap();
    until("the half-made layer is gone", || is_empty(&plyd));
    still_loads(&plyd, &archive);
}

#[test]
fn an_archive_that_breaks_off_is_refused() {
    let plyd = Plyd::start();
    let archive = slow();
    let done = plyd.piped(["image", "load"], &archive[..archive.len() / 3]);
    assert_eq!(done.code, 1);
    assert!(done.stderr.contains("ends within"), "{}", done.stderr);
    until("nothing is left", || is_empty(&plyd));
    still_loads(&plyd, &archive);
}

#[test]
fn each_bad_archive_has_a_message_of_its_own_and_leaves_nothing() {
    let plyd = Plyd::start();
    let good = Blob::plain(Layer::new().file("f", 0o644, b"f"));
    let hostile = Blob::plain(Layer::new().file("../../out", 0o644, b"f"));
    let mut wrong = Blob::plain(Layer::new().file("g", 0o644, b"g"));
    wrong.bytes[600] ^= 1;
    let mut missing = Layout::new();
    let manifest = missing.image(std::slice::from_ref(&good), "");
    missing.list(&manifest, Some("bad"));
    missing.files.retain(|(_, bytes)| *bytes != good.bytes);
    let of_wrong = wrong.digest.replace(':', "/");
    for (archive, words) in [
        (
            archive("bad", std::slice::from_ref(&wrong)),
            [&*of_wrong, "the blob's digest is"],
        ),
        (
            missing.tar(),
            [&good.digest, "the blob is missing from the archive"],
        ),
        (
            archive("bad", std::slice::from_ref(&hostile)),
            [&hostile.digest, "leads out of the layer"],
        ),
    ] {
        let done = plyd.piped(["image", "load"], &archive);
        assert_eq!((done.code, &*done.stdout), (1, ""), "{}", done.stderr);
        let said = done.stderr.lines().last().unwrap();
        assert!(said.starts_with("snapctl: "), "{said}");
        assert!(words.iter().all(|word| said.contains(word)), "{said}");
        until("nothing is left", || is_empty(&plyd));
    }
    still_loads(&plyd, &archive("slow", &[good]));
}

#[test]
fn plyd_killed_in_an_import_clears_up_and_can_repeat_it() {
    let mut plyd = Plyd::start();
    let archive = slow();
    let kill = |plyd: &mut Plyd, when: &dyn Fn(&Path) -> bool, send: usize| {
        let mut client = load(plyd);
        let mut stdin = client.stdin.take().unwrap();
        stdin.write_all(&archive[..send]).unwrap();
        // Unpacking starts at the end of the stream.
        let stdin = (send < archive.len()).then_some(stdin);
        let root = plyd.root();
        until("the import is under way", || when(&root));
        plyd.signal(Signal::SIGKILL);
        drop(stdin);
        assert!(!client.wait().unwrap().success());
        plyd.launch();
        until("everything is cleared", || is_empty(plyd));
        assert_eq!(plyd.ok(["image", "ls", "-q"]), "");
    };
    kill(&mut plyd, &spooled, archive.len() / 2);
    let under_way = |root: &Path| !names(&root.join("store/tmp")).is_empty();
    kill(&mut plyd, &under_way, archive.len());
    // Once the first layer is committed.
    let layers = |root: &Path| !names(&root.join("store/records")).is_empty();
    kill(&mut plyd, &layers, archive.len());
    still_loads(&plyd, &archive);
}
