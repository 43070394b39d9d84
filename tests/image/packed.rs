//! What stands on packed layers: comparison, export, and the sharing and the end of layers.

use std::collections::BTreeMap;
use std::fs;
use std::os::unix::fs::{FileExt, MetadataExt, PermissionsExt, symlink};
use std::path::Path;
use std::process::Command;

use plywood::snapshotter::{ChangeKind, Owner, ParentRef};

use super::archive::*;
use super::common::{Plyd, unmount};
use super::store::{Store, names};

fn below() -> Layer {
    Layer::new()
        .dir("d", 0o755)
        .file("d/same", 0o644, b"same")
        .file("d/changed", 0o644, b"before")
        .file("d/again", 0o644, b"again")
        .file("d/mode", 0o644, b"mode")
        .file("gone", 0o644, b"")
        .dir("all/gone", 0o755)
        .file("all/gone/file", 0o644, b"")
        .dir("turns", 0o755)
        .file("turns/inside", 0o644, b"")
        .file("opaque/old", 0o644, b"")
}

fn above() -> Layer {
    Layer::new()
        .file("d/changed", 0o644, b"after it")
        .file("d/again", 0o644, b"again")
        .file("d/mode", 0o600, b"mode")
        .file(".wh.gone", 0o644, b"")
        .file("all/.wh.gone", 0o644, b"")
        .file("turns", 0o644, b"a file now")
        .file("opaque/.wh..wh..opq", 0o644, b"")
        .file("opaque/new", 0o644, b"")
        .file("fresh/deep/file", 0o644, b"")
}

#[test]
fn a_packed_layer_is_compared_with_those_below_it() {
    use ChangeKind::{Added, Deleted, Modified};

    let store = Store::new();
    let image = store.load_one(&archive("x", &[Blob::gzip(below()), Blob::zstd(above())]));
    let changes = store.snapshotter.diff(Owner::Image, &image.chain_id);
    let changes: Vec<_> = changes
        .unwrap()
        .into_iter()
        .map(|change| (change.path.to_str().unwrap().to_owned(), change.kind))
        // Parents that the layer does not list are not told apart from changed ones by their times.
        .filter(|(path, _)| path != "/d" && path != "/all" && path != "/opaque")
        .collect();
    let expected = [
        ("/all/gone", Deleted),
        ("/d/again", Modified),
        ("/d/changed", Modified),
        ("/d/mode", Modified),
        ("/fresh", Added),
        ("/fresh/deep", Added),
        ("/fresh/deep/file", Added),
        ("/gone", Deleted),
        ("/opaque/new", Added),
        ("/opaque/old", Deleted),
        ("/turns", Modified),
    ];
    let expected = expected.map(|(path, kind)| (path.to_owned(), kind));
    assert_eq!(changes, expected);
    let lowest = &store.snapshotter.list(None).unwrap()[0];
    let all = store.snapshotter.diff(Owner::Image, &lowest.key).unwrap();
    assert!(all.iter().all(|change| change.kind == Added));
    assert_eq!(all.len(), 13);
}

#[test]
fn a_layer_of_two_images_goes_with_the_last_of_them() {
    let store = Store::new();
    let of = |name: &str, layers: &[Layer]| {
        let blobs: Vec<_> = layers.iter().cloned().map(Blob::gzip).collect();
        store.load_one(&archive(name, &blobs))
    };
    // The same layer at the bottom of one chain and in the middle of another.
    of("first", &[above()]);
    let second = of("second", &[below(), above()]);
    let layers = || names(&store.root().join("store/records")).len();
    assert_eq!(layers(), 2);
    let key = ParentRef {
        owner: Owner::Image,
        key: second.chain_id.clone(),
    };
    let tree = store.tree(&second);
    store.images.remove("first", false, &|_| None).unwrap();
    assert_eq!(layers(), 2);
    assert_eq!(store.tree(&second), tree);
    // A snapshot keeps what it stands on.
    let on_it = store
        .snapshotter
        .prepare(Owner::Snapctl, "work", Some(&key), BTreeMap::new());
    on_it.unwrap();
    store.images.remove("second", false, &|_| None).unwrap();
    assert_eq!(layers(), 2);
    let store = store.reopen();
    store.snapshotter.remove(Owner::Snapctl, "work").unwrap();
    store.images.sweep_and_log();
    assert_eq!(names(&store.root().join("store/records")).len(), 0);
    store.assert_empty();
}

/// Type, mode, owner, links, length, target and content of everything in a directory.
fn seen(dir: &Path) -> BTreeMap<String, String> {
    let shown = "%p %y %m %U:%G %n %s %l %T@\\0";
    let listed = Command::new("find")
        .args([".", "!", "-type", "d", "-printf", shown])
        .args(["-o", "-printf", "%p %y %m %U:%G\\0"])
        .current_dir(dir)
        .output()
        .unwrap();
    assert!(listed.status.success(), "{listed:?}");
    let text = String::from_utf8(listed.stdout).unwrap();
    let lines = text.split_terminator('\0').map(|line| {
        let (path, rest) = line.split_once(' ').unwrap();
        let at = dir.join(path);
        let content = match at.symlink_metadata().unwrap().is_file() {
            true => fs::read(at).unwrap(),
            false => Vec::new(),
        };
        let content = String::from_utf8_lossy(&content).into_owned();
        (path.to_owned(), format!("{rest} {content:?}"))
    });
    lines.collect()
}

#[test]
fn kernel_overlayfs_mounts_what_is_exported_from_packed_layers_to_the_same_tree() {
    let plyd = Plyd::start();
    let at = |name: &str| plyd.dir().join(name);
    let large = "large\n".repeat(500_000);
    let mark: (&[u8], &[u8]) = (b"SCHILY.xattr.user.overlay.opaque", b"y");
    let image = archive(
        "x",
        &[
            Blob::gzip(
                below()
                    .file("large", 0o644, large.as_bytes())
                    .file("one", 0o644, b"one")
                    .hardlink("two", "one", 0o644)
                    .hardlink("d/three", "one", 0o644)
                    .symlink("link", "one")
                    .device("null", b'3', (1, 3))
                    .pax(&[mark])
                    .dir("marked", 0o755)
                    .file("marked/file", 0o644, b""),
            ),
            Blob::zstd(above().file("marked/more", 0o644, b"")),
        ],
    );
    let loaded = plyd.piped(["image", "load", "-q"], &image);
    assert_eq!(loaded.code, 0, "{}", loaded.stderr);
    let image = plyd.json(["image", "inspect", "x"]);
    let chain = image[0]["chain_id"].as_str().unwrap();
    let mnt = at("mnt");
    fs::create_dir(&mnt).unwrap();
    let dir = mnt.to_str().unwrap();
    plyd.ok(["snapshot", "view", "look", chain]);
    plyd.ok(["mount", "look", dir]);
    let view = seen(&mnt);
    plyd.umount(dir);

    plyd.ok(["snapshot", "prepare", "work", chain]);
    plyd.ok(["mount", "work", dir]);
    assert_eq!(seen(&mnt), view);
    fs::rename(mnt.join("d"), mnt.join("moved")).unwrap();
    fs::remove_dir_all(mnt.join("opaque")).unwrap();
    fs::write(mnt.join("two"), "by its second name").unwrap();
    symlink("nowhere", mnt.join("moved/dangling")).unwrap();
    // Copied up in part only, and without data.
    let file = fs::File::options().write(true).open(mnt.join("large"));
    file.unwrap().write_all_at(b"changed", 1_000_000).unwrap();
    fs::set_permissions(mnt.join("turns"), fs::Permissions::from_mode(0o4750)).unwrap();
    let active = seen(&mnt);
    plyd.umount(dir);

    for (key, expected) in [("work", &active), ("look", &view)] {
        let to = at(&format!("exported-{key}"));
        let options = plyd.ok(["snapshot", "export-overlay", key, to.to_str().unwrap()]);
        nix::mount::mount(
            Some("overlay"),
            &mnt,
            Some("overlay"),
            nix::mount::MsFlags::empty(),
            Some(options.trim_end()),
        )
        .unwrap_or_else(|error| panic!("{key}: {error}: {options}"));
        let found = seen(&mnt);
        unmount(&mnt);
        assert_eq!(&found, expected, "{key}: {options}");
    }
    // A commit on packed layers is one more of them.
    plyd.ok(["snapshot", "commit", "work", "done"]);
    let info = plyd.json(["snapshot", "info", "done", "--json"]);
    assert_eq!(info["layer_dirs"].as_array().unwrap().len(), 0);
    assert_eq!(info["packed_layers"].as_array().unwrap().len(), 3);
    let lines = plyd.ok(["snapshot", "info", "done"]);
    let name = info["packed_layers"][0].as_str().unwrap();
    assert!(
        lines.contains(&format!("\npacked layer {name}\n")),
        "{lines}"
    );
    plyd.ok(["snapshot", "view", "again", "done"]);
    plyd.ok(["mount", "again", dir]);
    assert_eq!(seen(&mnt), active);
    for name in ["one", "two", "moved/three"] {
        assert_eq!(fs::metadata(mnt.join(name)).unwrap().nlink(), 3, "{name}");
    }
    plyd.umount(dir);
}

#[test]
fn what_an_image_alone_had_leaves_the_disk_with_it() {
    let store = Store::new();
    let large = vec![7; 1 << 20];
    let layer = || Layer::new().file("large", 0o644, &large);
    store.load_one(&archive(
        "first",
        &[Blob::gzip(layer().file("a", 0o644, b"a"))],
    ));
    store.load_one(&archive(
        "second",
        &[Blob::gzip(layer().file("b", 0o644, b"b"))],
    ));
    let objects = || {
        store.snapshotter.wait_until_deleted();
        let dir = store.root().join("store/objects");
        let files = names(&dir)
            .into_iter()
            .map(|name| names(&dir.join(name)).len());
        files.sum::<usize>()
    };
    let packs = || names(&store.root().join("store/packs")).len();
    // Both have the large file, which is there once.
    assert_eq!((objects(), packs()), (1, 2));
    store.images.remove("first", false, &|_| None).unwrap();
    assert_eq!((objects(), packs()), (1, 1));
    store.images.remove("second", false, &|_| None).unwrap();
    assert_eq!((objects(), packs()), (0, 0));
    store.assert_empty();
}

#[test]
fn damage_is_named_by_verify_and_what_nobody_needs_by_gc() {
    let plyd = Plyd::start();
    let large = vec![7; 1 << 20];
    let image = archive(
        "x",
        &[Blob::gzip(Layer::new().file("dir/large", 0o644, &large))],
    );
    plyd.piped(["image", "load", "-q"], &image);
    let sound = plyd.ok(["system", "verify", "--deep"]);
    assert!(
        sound.contains("1 layer with 1 content,") && sound.contains("0 damaged"),
        "{sound}"
    );
    assert_eq!(
        plyd.ok(["system", "gc", "--dry-run"]),
        "0 B would come free, in 0 files\n"
    );

    let objects = plyd.root().join("store/objects");
    let dir = objects.join(&names(&objects)[0]);
    let object = dir.join(&names(&dir)[0]);
    let file = fs::File::options().write(true).open(&object).unwrap();
    file.write_all_at(b"rot", 1000).unwrap();
    assert_eq!(plyd.snapctl(["system", "verify"]).code, 0);
    let damaged = plyd.snapctl(["system", "verify", "--deep"]);
    assert_eq!(damaged.code, 1);
    assert!(
        damaged.stdout.contains("/dir/large: ") && damaged.stdout.contains("(of sha256:"),
        "{}",
        damaged.stdout
    );
    let told = plyd.snapctl(["system", "verify", "--deep", "--json"]);
    let told: serde_json::Value = serde_json::from_str(&told.stdout).unwrap();
    assert_eq!(told["faults"][0]["path"], "/dir/large");
    // So is it for who needs it; once only the pack was named.
    let layer = plyd.ok(["layer", "ls", "-q"]);
    let place = format!("/dir/large of the layer {}", layer.trim());
    plyd.ok(["snapshot", "prepare", "work", "x"]);
    let to = plyd.dir().join("to");
    let to = to.to_str().unwrap();
    for reads in [
        &["layer", "export", layer.trim(), "-o", to][..],
        &["snapshot", "export-overlay", "work", to],
    ] {
        let failed = plyd.snapctl(reads);
        assert_eq!(failed.code, 1, "{reads:?}");
        assert!(failed.stderr.contains(&place), "{}", failed.stderr);
        assert!(!Path::new(to).exists(), "{reads:?}");
    }
    plyd.ok(["snapshot", "rm", "work"]);

    // An orphan, as a crash in the middle of an import leaves it.
    let orphan = objects.join("00").join("0".repeat(64));
    fs::create_dir_all(orphan.parent().unwrap()).unwrap();
    fs::write(&orphan, "x").unwrap();
    let explained = plyd.ok(["system", "gc", "--dry-run", "--explain"]);
    assert!(
        explained.contains("no layer names this object"),
        "{explained}"
    );
    assert!(orphan.exists());
    assert_eq!(
        plyd.ok(["system", "gc", "-q"]),
        format!("{}\n", orphan.display())
    );
    assert!(!orphan.exists());
    assert!(object.exists());
}
