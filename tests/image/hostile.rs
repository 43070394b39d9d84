//! What is refused: each with a message that names the blob and the entry, and nothing of it stays.

use plywood::image::{Error, Limits};

use super::archive::*;
use super::store::{Quiet, Store, names};

/// A good layer below, the bad one above; the bad one's digest must be in the message.
fn refuses_layer(store: &Store, layer: Layer, words: &[&str]) {
    let below = Blob::gzip(
        Layer::new()
            .dir("dir", 0o755)
            .file("dir/file", 0o644, b"x")
            .symlink("loop", "loop"),
    );
    let bad = Blob::plain(layer);
    let digest = bad.digest.clone();
    let mut all = vec![digest.as_str()];
    all.extend(words);
    store.refuses(&archive("bad", &[below, bad]), &all);
}

/// The store is as good as new.
fn still_works(store: &Store) {
    let image = store.load_one(&archive(
        "good",
        &[Blob::gzip(Layer::new().file("fine", 0o644, b"fine"))],
    ));
    assert_eq!(store.tree(&image).len(), 1);
}

#[test]
fn entries_that_lead_out_of_the_layer() {
    let store = Store::new();
    for name in ["../out", "a/../../out", "/../out", ".."] {
        let layer = Layer::new().file(name, 0o644, b"");
        refuses_layer(&store, layer, &["leads out of the layer", "out"]);
    }
    for target in ["../../etc/passwd", "/../etc/passwd"] {
        let layer = Layer::new().hardlink("mine", target, 0o644);
        refuses_layer(&store, layer, &["mine", "leads out of the layer"]);
    }
    still_works(&store);
    assert_eq!(
        names(store.dir.path()).len(),
        2,
        "root and state, nothing else"
    );
}

#[test]
fn whiteouts_of_no_name() {
    let store = Store::new();
    for name in [
        ".wh.",
        ".wh..",
        ".wh...",
        "dir/.wh.",
        "dir/.wh..",
        "dir/.wh...",
    ] {
        let layer = Layer::new().file(name, 0o644, b"");
        refuses_layer(&store, layer, &[name, "whiteout of no name"]);
    }
    let below = Layer::new().file(".wh.dir/file", 0o644, b"");
    refuses_layer(&store, below, &["lies below a whiteout"]);
    still_works(&store);
}

#[test]
fn objects_that_cannot_be() {
    let store = Store::new();
    let overlay = Layer::new().device("gone", b'3', (0, 0));
    refuses_layer(&store, overlay, &["gone", "0:0"]);
    let below_file = Layer::new().file("dir/file/x", 0o644, b"");
    refuses_layer(&store, below_file, &["dir/file/x", "not a directory"]);
    let through_loop = Layer::new().file("loop/x", 0o644, b"");
    refuses_layer(&store, through_loop, &["loop/x", "circle"]);
    let to_nothing = Layer::new().hardlink("link", "nowhere/x", 0o644);
    refuses_layer(&store, to_nothing, &["link", "nowhere/x", "does not exist"]);
    let to_itself = Layer::new().file("f", 0o644, b"").hardlink("f", "f", 0o644);
    refuses_layer(&store, to_itself, &["does not exist"]);
    let to_directory = Layer::new().hardlink("link", "dir", 0o644);
    refuses_layer(&store, to_directory, &["link", "is a directory"]);
    let empty_link = Layer::new().symlink("link", "");
    refuses_layer(&store, empty_link, &["link to nothing"]);
    let large_device = Layer::new().device("dev", b'4', (1 << 12, 0));
    refuses_layer(&store, large_device, &["device number"]);
    still_works(&store);
}

#[test]
fn names_that_are_too_long_or_too_deep() {
    let store = Store::new();
    let deep = Layer::new().file(&"d/".repeat(100_000), 0o644, b"");
    refuses_layer(&store, deep, &["4095"]);
    let wide = Layer::new().file(&"n".repeat(256), 0o644, b"");
    refuses_layer(&store, wide, &["255"]);
    // Each name is short, but links make it long.
    let part = "x".repeat(250);
    let long = vec![part.as_str(); 15].join("/");
    let by_links = Layer::new()
        .symlink("l", &long)
        .file(&format!("l/{part}/{part}"), 0o644, b"");
    refuses_layer(&store, by_links, &["4095", "links are followed"]);
    // A directory a step deeper each time, through a link that is moved along.
    let mut ladder = Layer::new().dir("a", 0o755).symlink("l", "a");
    let mut path = "a".to_owned();
    for _ in 0..30 {
        path = format!("{path}/{part}");
        ladder = ladder.dir(&format!("l/{part}"), 0o755);
        if path.len() > 4095 {
            break;
        }
        ladder = ladder.symlink("l", &path);
    }
    refuses_layer(&store, ladder, &["4095"]);
    still_works(&store);
}

#[test]
fn headers_that_lie() {
    let store = Store::new();
    let mut absurd = head(b"bomb", b'0');
    absurd.size = u64::MAX >> 1;
    refuses_layer(&store, Layer::new().header(&absurd), &["bomb", "bytes"]);
    let pax: [(&[u8], &[u8], &str); 6] = [
        (b"size", b"99999999999999999999999", "size"),
        (b"uid", b"4294967295", "4294967295"),
        (b"gid", b"-1", "-1"),
        (b"mtime", b"now", "time"),
        (b"path", b"a\0b", "zero byte"),
        (b"GNU.sparse.major", b"1", "sparse"),
    ];
    for (key, value, word) in pax {
        let layer = Layer::new().pax(&[(key, value)]).file("f", 0o644, b"");
        refuses_layer(&store, layer, &[word]);
    }
    let mut damaged = head(b"x", b'x');
    damaged.size = 11;
    let layer = Layer::new().header(&damaged).data(b"99 path=abc");
    refuses_layer(&store, layer.file("f", 0o644, b""), &["PAX"]);
    let mut endless = head(b"x", b'x');
    endless.size = 1 << 30;
    refuses_layer(&store, Layer::new().header(&endless), &["1 MiB"]);
    endless.flag = b'L';
    refuses_layer(&store, Layer::new().header(&endless), &["1 MiB"]);
    for (flag, word) in [(b'S', "sparse"), (b'M', "type 'M'"), (0xff, "type")] {
        refuses_layer(
            &store,
            Layer::new().header(&head(b"odd", flag)),
            &["odd", word],
        );
    }
    let nameless = ": the checksum of a header is wrong";
    refuses_layer(&store, Layer::new().raw(&[b'A'; 512]), &[nameless]);
    let message = store.load(&archive(
        "bad",
        &[Blob::plain(Layer::new().raw(&[b'A'; 512]))],
    ));
    let message = message.unwrap_err().to_string();
    assert!(!message.contains("\"\""), "{message}");
    let hole = Layer::new().raw(&[0; 512]).file("after", 0o644, b"");
    refuses_layer(&store, hole, &["zeros"]);
    still_works(&store);
}

#[test]
fn extended_attributes_that_do_not_fit() {
    let store = Store::new();
    let large = vec![b'v'; (64 << 10) + 1];
    let layer = Layer::new().pax(&[(b"SCHILY.xattr.user.large", &large)]);
    refuses_layer(
        &store,
        layer.file("f", 0o644, b""),
        &["user.large", "64 KiB"],
    );
    let name = [&b"SCHILY.xattr.user."[..], &[b'n'; 300]].concat();
    let layer = Layer::new().pax(&[(&name, b"v")]);
    refuses_layer(&store, layer.file("f", 0o644, b""), &["cannot be used"]);
    let layer = Layer::new().pax(&[(b"SCHILY.xattr.", b"v")]);
    refuses_layer(&store, layer.file("f", 0o644, b""), &["cannot be used"]);
    still_works(&store);
}

#[test]
fn bombs() {
    let store = Store::with(Limits {
        bytes: 1 << 20,
        entries: 100,
        names: 1000,
        ..Limits::default()
    });
    let zeros = vec![0; 10 << 20];
    let trailer = Layer::new()
        .file("f", 0o644, b"")
        .raw(&[0; 1024])
        .raw(&zeros);
    for layer in [Layer::new().file("zeros", 0o644, &zeros), trailer] {
        for blob in [Blob::gzip(layer.clone()), Blob::zstd(layer)] {
            let digest = blob.digest.clone();
            store.refuses(&archive("bomb", &[blob]), &[&digest, "bytes"]);
        }
    }
    let many = (0..200).fold(Layer::new(), |layer, number| {
        layer.file(&number.to_string(), 0o644, b"")
    });
    refuses_layer(&store, many, &["100 entries"]);
    let named = (0..50).fold(Layer::new(), |layer, number| {
        layer.dir(&format!("{number}-{}", "n".repeat(30)), 0o755)
    });
    refuses_layer(&store, named, &["the names in the layer"]);
    still_works(&store);
}

#[test]
fn what_one_entry_claims() {
    let store = Store::with(Limits {
        file: 1 << 20,
        path: 40,
        xattr: 100,
        ..Limits::default()
    });
    let sparse = |size: &[u8]| {
        let records = [
            (&b"GNU.sparse.size"[..], size),
            (b"GNU.sparse.numblocks", b"0"),
        ];
        Layer::new().pax(&records).file("hole", 0o644, b"")
    };
    refuses_layer(
        &store,
        sparse(b"1048577"),
        &["hole", "1048577 bytes", "a file of a layer"],
    );
    let path = "d/".repeat(20) + "f";
    refuses_layer(
        &store,
        Layer::new().file(&path, 0o644, b""),
        &["longer than 40 bytes"],
    );
    let removed = "d/".repeat(20) + ".wh.f";
    refuses_layer(
        &store,
        Layer::new().file(&removed, 0o644, b""),
        &["what it removes is longer"],
    );
    let link = Layer::new().hardlink("l", &path, 0o644);
    refuses_layer(&store, link, &["l", "its hard link's target is longer"]);
    let xattr = Layer::new().pax(&[(b"SCHILY.xattr.user.x", &[b'v'; 101])]);
    refuses_layer(
        &store,
        xattr.file("f", 0o644, b""),
        &["user.x", "more than 100 bytes"],
    );
    let fits = sparse(b"1048576")
        .file(&path[2..], 0o644, b"")
        .file(&removed[2..], 0o644, b"")
        .hardlink("l", "hole", 0o644)
        .pax(&[(b"SCHILY.xattr.user.x", &[b'v'; 100])])
        .file("f", 0o644, b"");
    store.load_one(&archive("fits", &[Blob::plain(fits)]));
}

#[test]
fn blobs_that_are_not_what_they_should_be() {
    let store = Store::new();
    let good = Layer::new().file("f", 0o644, &[7; 100_000]);
    let tar = good.clone().tar();
    let with = |change: &dyn Fn(&mut Blob)| {
        let mut blob = Blob::gzip(good.clone());
        change(&mut blob);
        (blob.digest.clone(), archive("bad", &[blob]))
    };

    let (digest, wrong_content) = with(&|blob| blob.bytes[50] ^= 1);
    store.refuses(&wrong_content, &[&digest.replace(':', "/"), "digest"]);
    let (digest, wrong_size) = with(&|blob| blob.size += 1);
    store.refuses(&wrong_size, &[&digest, "bytes"]);
    let (digest, wrong_diff_id) = with(&|blob| blob.diff_id = sha256(b"other"));
    store.refuses(&wrong_diff_id, &[&digest, &sha256(b"other"), &sha256(&tar)]);
    let (digest, unknown) = with(&|blob| blob.media_type = "application/x-lzma".to_owned());
    store.refuses(&unknown, &[&digest, "application/x-lzma"]);
    let (_, bad_diff_id) = with(&|blob| blob.diff_id = "md5:00".to_owned());
    store.refuses(&bad_diff_id, &["md5:00"]);

    for cut in [gzip(&tar), zstd(&tar)] {
        let cut = cut[..cut.len() / 2].to_vec();
        let blob = Blob::new("+gzip", &tar, cut);
        let digest = blob.digest.clone();
        store.refuses(&archive("bad", &[blob]), &[&digest, "decompress"]);
    }
    let mut garbage = gzip(&tar);
    garbage.extend_from_slice(b"garbage");
    let blob = Blob::new("+gzip", &tar, garbage);
    store.refuses(&archive("bad", &[blob]), &["decompress"]);
    for cut in [100, 700, tar.len() - 2000] {
        let blob = Blob::new("", &tar[..cut], tar[..cut].to_vec());
        store.refuses(&archive("bad", &[blob]), &["ends within"]);
    }

    let mut missing = Layout::new();
    let manifest = missing.image(&[Blob::plain(good.clone())], "");
    missing.list(&manifest, Some("bad"));
    missing.files.retain(|(_, bytes)| *bytes != tar);
    store.refuses(&missing.tar(), &[&sha256(&tar), "missing"]);
    still_works(&store);
}

#[test]
fn documents_that_make_no_sense() {
    let store = Store::new();
    let manifest_type = "application/vnd.oci.image.manifest.v1+json";
    let of = |media_type: &str, json: &str| {
        let mut layout = Layout::new();
        let descriptor = layout.document(media_type, json, "");
        layout.list(&descriptor, Some("bad"));
        (sha256(json.as_bytes()), layout.tar())
    };
    let (digest, not_json) = of(manifest_type, "{");
    store.refuses(&not_json, &[&digest, "understood"]);
    let (digest, odd_type) = of("text/plain", "{}");
    store.refuses(&odd_type, &[&digest, "text/plain"]);
    let (digest, large) = of(manifest_type, &" ".repeat(4 << 20));
    store.refuses(&large, &[&digest, "document"]);
    let foreign = r#"{"schemaVersion":2,"manifests":[{"mediaType":"application/vnd.oci.image.manifest.v1+json","digest":"sha256:0000000000000000000000000000000000000000000000000000000000000000","size":2,"platform":{"architecture":"s390x","os":"linux"}}]}"#;
    let (digest, no_platform) = of("application/vnd.oci.image.index.v1+json", foreign);
    store.refuses(&no_platform, &[&digest, "linux/s390x"]);

    let mut uneven = Layout::new();
    let manifest = uneven.image(&[Blob::plain(Layer::new())], "");
    let config =
        r#"{"architecture":"amd64","os":"linux","rootfs":{"type":"layers","diff_ids":[]}}"#;
    let config = uneven.document("application/vnd.oci.image.config.v1+json", config, "");
    let layer = Blob::plain(Layer::new());
    let json = format!(
        r#"{{"schemaVersion":2,"config":{config},"layers":[{{"mediaType":"{}","digest":"{}","size":{}}}]}}"#,
        layer.media_type, layer.digest, layer.size
    );
    let uneven_manifest = uneven.document(manifest_type, &json, "");
    uneven.list(&manifest, Some("fine"));
    uneven.list(&uneven_manifest, Some("bad"));
    store.refuses(&uneven.tar(), &["0 diff ids", "1 layers"]);

    let mut sha512 = Layout::new();
    let digest = format!("sha512:{}", "0".repeat(128));
    sha512.list(
        &format!(r#"{{"mediaType":"{manifest_type}","digest":"{digest}","size":2}}"#),
        None,
    );
    store.refuses(&sha512.tar(), &[&digest, "sha256"]);
    still_works(&store);
}

#[test]
fn archives_that_are_none() {
    let store = Store::new();
    let good = archive("x", &[Blob::plain(Layer::new().file("f", 0o644, b""))]);
    let what = "a tar of an OCI layout or of `docker save`";
    store.refuses(b"", &["no image archive", "it is empty", what]);
    for text in [&b"root:x:0:0:root:/root:/bin/bash\n"[..], &[b'x'; 4096]] {
        store.refuses(text, &["no image archive", "as a tar does", what]);
        store.refuses(&gzip(text), &["no image archive", "as a tar does", what]);
    }
    let other = Layer::new().file("etc/passwd", 0o644, b"root").tar();
    store.refuses(&other, &["neither index.json nor manifest.json", what]);
    store.refuses(&good[..good.len() - 3000], &["ends within"]);
    store.refuses(&gzip(&good)[..200], &["could not be read to its end"]);
    let with = |name: &str, bytes: &[u8]| {
        let mut layout = Layout::new();
        layout.files.retain(|(other, _)| other != name);
        layout.put(name, bytes.to_vec());
        layout.tar()
    };
    store.refuses(
        &with("oci-layout", br#"{"imageLayoutVersion":"2.0.0"}"#),
        &["oci-layout", "2.0.0"],
    );
    store.refuses(&with("../escape", b""), &["escape", "leads out"]);
    store.refuses(&with("x", b""), &["names no image"]);
    let index_only = Layer::new().file("index.json", 0o644, b"{}").tar();
    store.refuses(&index_only, &["oci-layout", "missing"]);
    let device = Layer::new().device("dev", b'3', (1, 3)).tar();
    store.refuses(&device, &["dev", "no place"]);
    let docker = Layer::new()
        .file(
            "manifest.json",
            0o644,
            br#"[{"Config":"c","Layers":["/etc/passwd"]}]"#,
        )
        .tar();
    store.refuses(&docker, &["\"c\"", "missing"]);
    store.refuses(
        &archive("Not A Name", &[Blob::plain(Layer::new())]),
        &["Not A Name"],
    );
    let mut two = Layout::new();
    for content in [b"1", b"2"] {
        let manifest = two.image(&[Blob::plain(Layer::new().file("f", 0o644, content))], "");
        two.list(&manifest, None);
    }
    let refused = store
        .images
        .load(&mut two.tar().as_slice(), Some("one-name"), 0, &Quiet);
    let refused = refused.unwrap_err();
    assert!(matches!(refused, Error::Archive { .. }));
    assert!(
        refused.to_string().contains("2 images")
            && refused.to_string().contains("leave out --name"),
        "{refused}"
    );
    store.assert_empty();
    still_works(&store);
}

/// A file system of its own, with little room.
pub struct SmallDisk(pub std::path::PathBuf);

impl SmallDisk {
    pub fn mount(dir: std::path::PathBuf) -> Self {
        use nix::mount::{MsFlags, mount};
        std::fs::create_dir(&dir).unwrap();
        let options = Some("size=16m,mode=700");
        mount(
            Some("tmpfs"),
            &dir,
            Some("tmpfs"),
            MsFlags::empty(),
            options,
        )
        .unwrap();
        Self(dir)
    }
}

impl Drop for SmallDisk {
    fn drop(&mut self) {
        let _gone = nix::mount::umount2(&self.0, nix::mount::MntFlags::MNT_DETACH);
    }
}

#[test]
fn a_full_disk_fails_the_import_and_gives_everything_back() {
    let dir = tempfile::tempdir().unwrap();
    let disk = SmallDisk::mount(dir.path().join("disk"));
    let store = Store::within(&disk.0);
    // What comes again after 200 KiB: the blob's compression sees that, and that of the store, in frames, does not.
    let mut part = vec![0; 200 << 10];
    blake3::Hasher::new().finalize_xof().fill(&mut part);
    let large = part.repeat(103);
    let layer = || Layer::new().file("large", 0o644, &large);
    // The blob fits and its content does not; neither fits.
    for (blob, what) in [
        (Blob::zstd(layer()), "store/tmp"),
        (Blob::plain(layer()), "spool"),
    ] {
        let below = Blob::gzip(Layer::new().file("below", 0o644, b""));
        let error = store.load(&archive("x", &[below, blob])).unwrap_err();
        let message = error.to_string();
        assert!(message.contains(what), "{message}");
        let errno = match error {
            Error::Io { source, .. } => source.raw_os_error(),
            Error::Union { source, .. } => Some(source.errno),
            _ => None,
        };
        assert_eq!(errno, Some(libc::ENOSPC), "{message}");
        store.assert_empty();
    }
    still_works(&store);
}

#[test]
fn what_a_crash_leaves_is_cleared_and_damaged_records_are_not() {
    use plywood::snapshotter::{Owner, ParentRef};

    let store = Store::new();
    let base = Blob::plain(Layer::new().file("base", 0o644, b""));
    let image = store.load_one(&archive("x", std::slice::from_ref(&base)));
    let parent = ParentRef {
        owner: Owner::Image,
        key: image.chain_id.clone(),
    };
    // As if killed while a second layer was unpacked, and after a third was committed.
    for key in ["unpack-sha256:1-a", "unpack-sha256:2-b"] {
        store
            .snapshotter
            .prepare(Owner::Image, key, Some(&parent), Default::default())
            .unwrap();
    }
    store
        .snapshotter
        .commit(
            Owner::Image,
            "sha256:2",
            "unpack-sha256:2-b",
            Default::default(),
        )
        .unwrap();
    let spool = store.root().join("images/spool/left");
    std::fs::create_dir(&spool).unwrap();
    std::fs::write(spool.join("1"), "half a blob").unwrap();
    let store = store.reopen();
    assert_eq!(names(&store.root().join("images/spool")).len(), 0);
    assert_eq!(store.snapshotter.list(None).unwrap().len(), 1);
    assert_eq!(store.tree(&image).len(), 1);

    // A record that cannot be read: its layers stay, other images work, loading it again mends it.
    let record = store
        .root()
        .join(format!("images/records/{}.record", image.id));
    std::fs::write(&record, "damaged").unwrap();
    let store = store.reopen();
    assert_eq!(store.images.list().unwrap(), []);
    let refused = store.images.resolve("x").unwrap_err();
    assert!(matches!(refused, Error::Record(_)), "{refused}");
    assert_eq!(store.snapshotter.list(None).unwrap().len(), 1);
    store.load_one(&archive(
        "y",
        &[Blob::plain(Layer::new().file("y", 0o644, b""))],
    ));
    assert_eq!(store.load_one(&archive("x", &[base])), image);
    assert_eq!(store.tree(&image).len(), 1);
}
