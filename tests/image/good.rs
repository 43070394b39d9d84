//! What is accepted, and what comes of it.

use std::ffi::OsStr;
use std::sync::atomic::{AtomicUsize, Ordering};

use plywood::image::{Error, Image, Observer, Phase, Progress, Removed};

use super::archive::*;
use super::store::{Quiet, Store};
use super::tree::{Object, Tree};

fn at<'a>(tree: &'a Tree, path: &str) -> &'a Object {
    tree.get(path)
        .unwrap_or_else(|| panic!("{path} is missing"))
}

fn paths(tree: &Tree) -> Vec<&str> {
    tree.keys().map(String::as_str).collect()
}

fn nobody(_: &Image) -> Option<String> {
    None
}

#[test]
fn every_kind_of_object_is_made_as_it_is_written() {
    let store = Store::new();
    let long = format!("{}/{}", "d".repeat(200), "f".repeat(255));
    let layer = Layer::new()
        .dir("etc", 0o750)
        .file("etc/passwd", 0o640, b"root:x:0:0\n")
        .pax(&[
            (b"mtime", b"1500000000.123456789"),
            (b"uid", b"4000000000"),
            (b"gid", b"2097152"),
            (b"SCHILY.xattr.user.bytes", b"\x00\n=\xff"),
        ])
        .file("etc/shadow", 0o600, b"secret")
        .pax(&[(
            b"SCHILY.xattr.security.capability",
            b"\x01\x00\x00\x02\x00\x20\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00",
        )])
        .file("ping", 0o755, b"#!")
        .file("su", 0o6755, b"#!")
        .symlink("link", "/etc/passwd")
        .symlink("dangling", "nowhere")
        .hardlink("passwd-too", "etc/passwd", 0o640)
        .device("null", b'3', (1, 3))
        .device("loop", b'4', (7, 0))
        .header(&head(b"fifo", b'6'))
        .dir("tmp", 0o1777)
        .file("a/b/c", 0o644, b"parents are not mentioned")
        .file(&long, 0o644, b"")
        .file("empty", 0o644, b"");
    for blob in [Blob::plain, Blob::gzip, Blob::zstd] {
        let image = store.load_one(&archive("busybox", &[blob(layer.clone())]));
        let tree = store.tree(&image);
        assert_eq!(tree.len(), 18, "{:?}", paths(&tree));
        assert_eq!(at(&tree, "/etc").mode, 0o750);
        assert_eq!(at(&tree, "/etc").mtime, (TIME as i64, 0));
        let passwd = at(&tree, "/etc/passwd");
        assert_eq!((passwd.kind, passwd.mode, passwd.nlink), ('f', 0o640, 2));
        assert_eq!(passwd.content, sha256(b"root:x:0:0\n"));
        assert_eq!(at(&tree, "/passwd-too").same_as, "/etc/passwd");
        let shadow = at(&tree, "/etc/shadow");
        assert_eq!(shadow.mtime, (1_500_000_000, 123_456_789));
        assert_eq!(shadow.owner, (4_000_000_000, 2_097_152));
        assert_eq!(shadow.xattrs[OsStr::new("user.bytes")], b"\x00\n=\xff");
        let ping = at(&tree, "/ping");
        assert_eq!(ping.xattrs[OsStr::new("security.capability")].len(), 20);
        assert_eq!(at(&tree, "/su").mode, 0o6755);
        assert_eq!(at(&tree, "/link").content, "/etc/passwd");
        assert_eq!(at(&tree, "/dangling").kind, 'l');
        let null = at(&tree, "/null");
        assert_eq!((null.kind, null.rdev), ('c', libc::makedev(1, 3)));
        let block = at(&tree, "/loop");
        assert_eq!((block.kind, block.rdev), ('b', libc::makedev(7, 0)));
        assert_eq!(at(&tree, "/fifo").kind, 'p');
        assert_eq!(at(&tree, "/tmp").mode, 0o1777);
        assert_eq!(at(&tree, "/a").mode, 0o755);
        assert_eq!(at(&tree, "/empty").size, 0);
        assert!(tree.contains_key(&format!("/{long}")));
        store.images.remove("busybox", false, &nobody).unwrap();
        store.assert_empty();
    }
}

/// Two layers, the second of which does to the first whatever a layer can do.
pub fn tricks() -> (Layer, Layer) {
    let below = Layer::new()
        .dir("usr", 0o755)
        .dir("usr/bin", 0o755)
        .file("usr/bin/tool", 0o755, b"tool")
        .file("usr/bin/other", 0o755, b"other")
        .symlink("bin", "usr/bin")
        .dir("gone", 0o755)
        .dir("gone/deep", 0o755)
        .file("gone/deep/er", 0o644, b"")
        .dir("opaque", 0o755)
        .file("opaque/old", 0o644, b"")
        .dir("opaque/kept", 0o700)
        .file("opaque/kept/old", 0o644, b"")
        .file("file-to-dir", 0o644, b"")
        .dir("dir-to-file", 0o755)
        .file("dir-to-file/x", 0o644, b"")
        .dir("merged", 0o755)
        .file("merged/low", 0o644, b"")
        .symlink("replaced-link", "merged")
        .file("linked", 0o644, b"shared");
    let above = Layer::new()
        .file("bin/tool", 0o700, b"new tool")
        .file(".wh.gone", 0o644, b"")
        .file(".wh.never-was", 0o644, b"")
        .dir("opaque", 0o711)
        .dir("opaque/kept", 0o750)
        .file("opaque/kept/new", 0o644, b"")
        .file("opaque/.wh..wh..opq", 0o644, b"")
        .file("opaque/late", 0o644, b"")
        .dir("file-to-dir", 0o755)
        .file("file-to-dir/in", 0o644, b"")
        .file("dir-to-file", 0o644, b"now a file")
        .dir("merged", 0o500)
        .file("merged/high", 0o644, b"")
        .file("replaced-link", 0o644, b"now a file")
        .hardlink("lower-link", "linked", 0o600)
        .hardlink("through-link", "bin/other", 0o755)
        .file("twice", 0o644, b"first")
        .file("twice", 0o600, b"second")
        .file(".wh..wh.plnk/1.2", 0o644, b"")
        .file(".wh..wh.aufs", 0o644, b"");
    (below, above)
}

#[test]
fn layers_change_those_below_as_the_specification_says() {
    let store = Store::new();
    let (below, above) = tricks();
    let image = store.load_one(&archive("a", &[Blob::gzip(below), Blob::zstd(above)]));
    let tree = store.tree(&image);
    assert_eq!(
        paths(&tree),
        [
            "/bin",
            "/dir-to-file",
            "/file-to-dir",
            "/file-to-dir/in",
            "/linked",
            "/lower-link",
            "/merged",
            "/merged/high",
            "/merged/low",
            "/opaque",
            "/opaque/kept",
            "/opaque/kept/new",
            "/opaque/late",
            "/replaced-link",
            "/through-link",
            "/twice",
            "/usr",
            "/usr/bin",
            "/usr/bin/other",
            "/usr/bin/tool",
        ]
    );
    assert_eq!(at(&tree, "/bin").kind, 'l');
    assert_eq!(at(&tree, "/usr/bin/tool").content, sha256(b"new tool"));
    assert_eq!(at(&tree, "/usr/bin/tool").mode, 0o700);
    assert_eq!(at(&tree, "/opaque").mode, 0o711);
    assert_eq!(at(&tree, "/merged").mode, 0o500);
    assert_eq!(at(&tree, "/merged").mtime, (TIME as i64, 0));
    assert_eq!(at(&tree, "/lower-link").same_as, "/linked");
    assert_eq!(
        at(&tree, "/linked").mode,
        0o600,
        "the entry's mode is the file's"
    );
    assert_eq!(at(&tree, "/linked").nlink, 2);
    assert_eq!(at(&tree, "/usr/bin/other").same_as, "/through-link");
    assert_eq!(at(&tree, "/twice").content, sha256(b"second"));
    assert_eq!(at(&tree, "/twice").nlink, 1);
}

#[test]
fn a_marker_spares_what_the_layer_wrote_and_may_find_nothing() {
    let store = Store::new();
    let below = Layer::new()
        .file("a/old", 0o644, b"")
        .file("a/dir/old", 0o644, b"")
        .file("old", 0o644, b"");
    // No entry for a and a/dir: containerd's native snapshotter loses a/dir/new here, against the
    // specification, and its overlayfs snapshotter does not.
    let above = Layer::new()
        .file("a/dir/new", 0o644, b"")
        .file(".wh..wh..opq", 0o644, b"")
        .file("file", 0o644, b"")
        .file("file/.wh.x", 0o644, b"")
        .file("file/.wh..wh..opq", 0o644, b"")
        .file("made/.wh.thing", 0o644, b"");
    let image = store.load_one(&archive("a", &[Blob::gzip(below), Blob::gzip(above)]));
    let tree = store.tree(&image);
    assert_eq!(
        paths(&tree),
        ["/a", "/a/dir", "/a/dir/new", "/file", "/made"]
    );
}

#[test]
fn symbolic_links_and_dots_lead_nowhere_but_into_the_layer() {
    let store = Store::new();
    let outside = store.dir.path().join("outside");
    std::fs::create_dir(&outside).unwrap();
    let target = outside.to_str().unwrap();
    let layer = Layer::new()
        .symlink("absolute", target)
        .file("absolute/one", 0o644, b"1")
        .symlink("dots", "../../../../../../../../../../../..")
        .file("dots/two", 0o644, b"2")
        .file("/leading/slash", 0o644, b"3")
        .file("up/../and/down", 0o644, b"4")
        .symlink("sub/link", "../absolute/../x")
        .file("sub/link/five", 0o644, b"5")
        .hardlink("six", "/absolute/one", 0o644);
    let image = store.load_one(&archive("a", &[Blob::plain(layer)]));
    let tree = store.tree(&image);
    assert_eq!(at(&tree, &format!("{target}/one")).content, sha256(b"1"));
    assert_eq!(at(&tree, "/two").content, sha256(b"2"));
    assert_eq!(at(&tree, "/leading/slash").content, sha256(b"3"));
    assert_eq!(at(&tree, "/and/down").content, sha256(b"4"));
    assert!(tree.keys().any(|path| path.ends_with("/x/five")));
    assert_eq!(at(&tree, "/six").content, sha256(b"1"));
    assert_eq!(
        super::store::names(&outside),
        Vec::<std::ffi::OsString>::new()
    );
}

#[test]
fn private_xattrs_of_the_union_are_only_data_or_nothing() {
    let store = Store::new();
    let mut layer = Layer::new().dir("d", 0o755).file("d/below", 0o644, b"");
    layer = layer.file("f", 0o644, b"content");
    let forged: [(&str, &[u8]); 4] = [
        ("trusted.overlay.opaque", b"y"),
        ("trusted.overlay.redirect", b"/etc"),
        ("trusted.overlay.metacopy", b""),
        ("user.overlay.opaque", b"y"),
    ];
    let mut above = Layer::new();
    for (path, flag) in [("d", b'5'), ("g", b'0')] {
        let keys: Vec<_> = forged
            .iter()
            .map(|(name, value)| (format!("SCHILY.xattr.{name}").into_bytes(), *value))
            .collect();
        let records: Vec<_> = keys
            .iter()
            .map(|(key, value)| (key.as_slice(), *value))
            .collect();
        above = above.pax(&records).header(&head(path.as_bytes(), flag));
    }
    let image = store.load_one(&archive("a", &[Blob::plain(layer), Blob::plain(above)]));
    let tree = store.tree(&image);
    assert_eq!(paths(&tree), ["/d", "/d/below", "/f", "/g"]);
    for path in ["/d", "/g"] {
        let kept: Vec<_> = at(&tree, path).xattrs.iter().collect();
        let (name, value) = forged[3];
        assert_eq!(kept, [(&name.into(), &value.to_vec())], "{path}");
    }
}

#[test]
fn layers_are_shared_and_go_with_the_last_image() {
    let store = Store::new();
    let base = Blob::gzip(Layer::new().file("base", 0o644, b"base"));
    let top = |name: &str| Blob::gzip(Layer::new().file(name, 0o644, b""));
    let one = store.load_one(&archive("one", &[base.clone(), top("one")]));
    let watch = Watch::default();
    let second = archive("two:v2", &[base.clone(), top("two")]);
    let two = store
        .images
        .load(&mut second.as_slice(), None, 0, &watch)
        .unwrap()
        .remove(0)
        .image;
    assert_eq!(watch.exists.load(Ordering::Relaxed), 1);
    assert_eq!(store.snapshotter.list(None).unwrap().len(), 3);
    assert_eq!(one.diff_ids[0], two.diff_ids[0]);
    assert_eq!(two.names, ["docker.io/library/two:v2"]);
    let removed = store.images.remove("one", false, &nobody).unwrap();
    assert_eq!(removed.removed, [one.id]);
    assert_eq!(store.snapshotter.list(None).unwrap().len(), 2);
    let store = store.reopen();
    assert_eq!(store.images.list().unwrap(), std::slice::from_ref(&two));
    assert_eq!(paths(&store.tree(&two)), ["/base", "/two"]);
    store.images.remove(&two.id[..4], false, &nobody).unwrap();
    store.assert_empty();
}

#[derive(Default)]
struct Watch {
    exists: AtomicUsize,
}

impl Observer for Watch {
    fn progress(&self, progress: Progress) {
        if progress.phase == Phase::Exists {
            self.exists.fetch_add(1, Ordering::Relaxed);
        }
    }
    fn cancelled(&self) -> bool {
        false
    }
}

#[test]
fn layers_of_an_image_removed_by_force_go_with_its_last_container() {
    use plywood::runtime::containers::{ImageRoots, Roots};

    let store = Store::new();
    let image = store.load_one(&archive("x", &[Blob::plain(Layer::new().dir("d", 0o755))]));
    let roots = ImageRoots {
        snapshotter: store.snapshotter.clone(),
        images: store.images.clone(),
    };
    roots.prepare("c1", image.parent().as_ref()).unwrap();
    store.images.remove("x", true, &nobody).unwrap();
    assert_eq!(store.snapshotter.list(None).unwrap().len(), 2);
    roots.remove("c1").unwrap();
    store.assert_empty();
}

#[test]
fn names_ids_and_digests_find_an_image() {
    let store = Store::new();
    let image = store.load_one(&archive(
        "localhost/mine:1.0",
        &[Blob::plain(Layer::new().file("x", 0o644, b""))],
    ));
    for reference in [
        "localhost/mine:1.0",
        "mine:1.0",
        &image.id,
        &image.id[..4],
        &image.manifest_digest,
        &format!("sha256:{}", image.id),
        &format!("whatever@{}", image.manifest_digest),
    ] {
        let found = store.images.resolve(reference).unwrap();
        assert_eq!(found.image, image, "{reference}");
    }
    for reference in ["mine", "docker.io/mine:1.0", "0000", &"0".repeat(64), "x"] {
        assert!(
            matches!(store.images.resolve(reference), Err(Error::NotFound { .. })),
            "{reference}"
        );
    }
    let details = store.images.inspect("mine:1.0").unwrap();
    assert_eq!(
        sha256(details.config_json.as_bytes()),
        format!("sha256:{}", image.id)
    );
    assert_eq!(
        sha256(details.manifest_json.as_bytes()),
        image.manifest_digest
    );
    let user = |_: &Image| Some("the container c1".to_owned());
    let refused = store.images.remove("mine:1.0", false, &user).unwrap_err();
    assert!(
        refused.to_string().contains("the container c1"),
        "{refused}"
    );
    assert_eq!(
        store.images.remove("mine:1.0", true, &user).unwrap(),
        Removed {
            untagged: vec!["localhost/mine:1.0".to_owned()],
            removed: vec![image.id],
        }
    );
    store.assert_empty();
}

#[test]
fn a_name_moves_to_the_image_that_was_loaded_last() {
    let store = Store::new();
    let of = |content: &[u8]| archive("x", &[Blob::plain(Layer::new().file("x", 0o644, content))]);
    let first = store.load_one(&of(b"first"));
    let second = store.load_one(&of(b"second"));
    assert_ne!(first.id, second.id);
    assert_eq!(store.images.resolve("x").unwrap().image, second);
    assert_eq!(store.load_one(&of(b"second")), second, "again is no change");
    let all = store.images.list().unwrap();
    assert_eq!(all.len(), 2);
    assert_eq!(all[1].names, Vec::<String>::new());
    let store = store.reopen();
    assert_eq!(store.images.resolve("x").unwrap().image, second);
    store.images.remove(&first.id, false, &nobody).unwrap();
    store.images.remove("x", false, &nobody).unwrap();
    store.assert_empty();
}

#[test]
fn the_config_is_what_a_container_needs() {
    let store = Store::new();
    let mut layout = Layout::new();
    let config = r#""Entrypoint":["/init"],"Cmd":["a","b"],"Env":["PATH=/bin"],"User":"me:us","WorkingDir":"/home","StopSignal":"SIGINT","Volumes":{"/b":{},"/a":{}},"Labels":{"k":"v"},"ExposedPorts":{"80/tcp":{}},"Healthcheck":{"Test":["NONE"]},"OnBuild":null"#;
    let manifest = layout.image(&[Blob::plain(Layer::new())], config);
    layout.list(&manifest, Some("x"));
    store.load_one(&layout.tar());
    let resolved = store.images.resolve("x").unwrap();
    let config = resolved.config;
    assert_eq!(config.entrypoint, ["/init"]);
    assert_eq!(config.cmd, ["a", "b"]);
    assert_eq!(config.env, ["PATH=/bin"]);
    assert_eq!(config.user, "me:us");
    assert_eq!(config.working_dir, "/home");
    assert_eq!(config.stop_signal, "SIGINT");
    assert_eq!(config.volumes, ["/a", "/b"]);
    assert_eq!(config.labels["k"], "v");
    assert_eq!(config.architecture, "amd64");
    assert!(resolved.image.created.is_some());
}

#[test]
fn an_index_leads_to_the_image_of_this_host() {
    let store = Store::new();
    let mut layout = Layout::new();
    let host = match std::env::consts::ARCH {
        "x86_64" => "amd64",
        "aarch64" => "arm64",
        other => other,
    };
    let foreign = layout.image(&[Blob::plain(Layer::new().file("foreign", 0o644, b""))], "");
    let own = layout.image(&[Blob::gzip(Layer::new().file("own", 0o644, b""))], "");
    let with = |descriptor: &str, arch: &str| {
        format!(
            r#"{},"platform":{{"architecture":"{arch}","os":"linux"}}}}"#,
            descriptor.trim_end_matches('}')
        )
    };
    let attestation = layout.document(
        "application/vnd.oci.image.manifest.v1+json",
        "{}",
        r#","annotations":{"vnd.docker.reference.type":"attestation-manifest"},"platform":{"architecture":"unknown","os":"unknown"}"#,
    );
    let inner = format!(
        r#"{{"schemaVersion":2,"mediaType":"application/vnd.oci.image.index.v1+json","manifests":[{},{},{attestation}]}}"#,
        with(&foreign, "s390x"),
        with(&own, host)
    );
    let inner = layout.document("application/vnd.oci.image.index.v1+json", &inner, "");
    let outer = format!(r#"{{"schemaVersion":2,"manifests":[{inner}]}}"#);
    let outer = layout.document(
        "application/vnd.docker.distribution.manifest.list.v2+json",
        &outer,
        "",
    );
    layout.list(&outer, Some("multi"));
    let image = store.load_one(&layout.tar());
    assert_eq!(paths(&store.tree(&image)), ["/own"]);
}

#[test]
fn docker_archives_compressed_archives_and_images_without_layers_are_taken() {
    let store = Store::new();
    let tar = Layer::new().file("in-layer", 0o644, b"x").tar();
    let config = format!(
        r#"{{"architecture":"amd64","os":"linux","rootfs":{{"type":"layers","diff_ids":["{0}","{0}"]}}}}"#,
        sha256(&tar)
    );
    let manifest = r#"[{"Config":"c.json","RepoTags":["me/app:1","me/app:2"],"Layers":["a/layer.tar","b/layer.tar"]},
        {"Config":"empty.json","RepoTags":null,"Layers":null}]"#;
    let empty = r#"{"architecture":"amd64","os":"linux","rootfs":{"type":"layers","diff_ids":[]}}"#;
    let docker = Layer::new()
        .file("manifest.json", 0o644, manifest.as_bytes())
        .file("c.json", 0o644, config.as_bytes())
        .file("empty.json", 0o644, empty.as_bytes())
        .file("b/layer.tar", 0o644, &tar)
        .dir("a", 0o755)
        .symlink("a/layer.tar", "../b/layer.tar")
        .tar();
    for archive in [docker.clone(), gzip(&docker), zstd(&docker)] {
        let images = store.load(&archive).unwrap();
        assert_eq!(images.len(), 2);
        assert_eq!(
            images[0].names,
            ["docker.io/me/app:1", "docker.io/me/app:2"]
        );
        assert_eq!(paths(&store.tree(&images[0])), ["/in-layer"]);
        assert_eq!(images[1].chain_id, "");
        assert_eq!(images[1].parent(), None);
        let removed = store.images.remove("me/app:1", false, &nobody).unwrap();
        assert_eq!(removed.removed, Vec::<String>::new());
        store.images.remove("me/app:2", false, &nobody).unwrap();
        store.images.remove(&images[1].id, false, &nobody).unwrap();
        store.assert_empty();
    }
}

#[test]
fn a_layer_may_end_without_padding_and_trailer() {
    let store = Store::new();
    let whole = Layer::new().file("f", 0o644, b"abc").tar();
    for end in [512 + 3, 512 + 100, 1024, 1024 + 512] {
        let tar = &whole[..end];
        let image = store.load_one(&archive("x", &[Blob::new("+gzip", tar, gzip(tar))]));
        assert_eq!(at(&store.tree(&image), "/f").content, sha256(b"abc"));
    }
}

#[test]
fn a_given_name_replaces_those_of_the_archive() {
    let store = Store::new();
    let one = archive("theirs", &[Blob::plain(Layer::new().file("x", 0o644, b""))]);
    let images = store
        .images
        .load(&mut one.as_slice(), Some("mine"), 0, &Quiet)
        .unwrap();
    assert_eq!(images[0].given, ["docker.io/library/mine:latest"]);
    assert_eq!(images[0].image.names, images[0].given);
    let bad = store
        .images
        .load(&mut one.as_slice(), Some("No!"), 0, &Quiet);
    assert!(matches!(bad, Err(Error::BadName { .. })));
}

#[test]
fn a_cancelled_import_leaves_nothing() {
    struct After(AtomicUsize);
    impl Observer for After {
        fn progress(&self, _progress: Progress) {}
        fn cancelled(&self) -> bool {
            let left = self.0.load(Ordering::Relaxed);
            self.0.store(left.saturating_sub(1), Ordering::Relaxed);
            left == 0
        }
    }
    let store = Store::new();
    let mut layer = Layer::new();
    for number in 0..200 {
        layer = layer.file(&format!("f{number}"), 0o644, &[7; 5000]);
    }
    let archive = archive("x", &[Blob::gzip(layer.clone()), Blob::plain(layer)]);
    for polls in [0, 1, 2, 3, 5, 9, 17, 100, 400, 900, 1700] {
        let observer = After(AtomicUsize::new(polls));
        match store
            .images
            .load(&mut archive.as_slice(), None, 0, &observer)
        {
            Err(Error::Cancelled) => store.assert_empty(),
            Ok(_) => {
                store.images.remove("x", false, &nobody).unwrap();
                store.assert_empty();
            }
            Err(error) => panic!("after {polls}: {error}"),
        }
    }
}

#[test]
fn two_imports_at_once_share_their_layers() {
    let store = Store::new();
    let base = Blob::gzip((0..500).fold(Layer::new(), |layer, number| {
        layer.file(&format!("f{number}"), 0o644, &[1; 1000])
    }));
    std::thread::scope(|scope| {
        for number in 0..4 {
            let top = Blob::gzip(Layer::new().file(&format!("top{number}"), 0o644, b""));
            let archive = archive(&format!("image{number}"), &[base.clone(), top]);
            let store = &store;
            scope.spawn(move || store.load_one(&archive));
        }
    });
    assert_eq!(store.images.list().unwrap().len(), 4);
    assert_eq!(store.snapshotter.list(None).unwrap().len(), 5);
    for image in store.images.list().unwrap() {
        assert_eq!(store.tree(&image).len(), 501);
        store.images.remove(&image.id, false, &nobody).unwrap();
    }
    store.assert_empty();
}
