//! Images of several layers, made from Debian's packages.

use std::collections::BTreeMap;
use std::fs::{self, File};
use std::io::{Read, Write};
use std::path::{Path, PathBuf};

use flate2::{Compression, read::GzDecoder, write::GzEncoder};
use serde_json::{Value, json};
use sha2::{Digest, Sha256};
use tar::{EntryType, Header};

use super::host::sh;

/// Name of the Debian image.
pub const DEBIAN: &str = "localhost/debian:odd";

/// An archive of Debian's busybox-static in two layers, as `make run` uses it.
pub fn busybox(dir: &Path) -> PathBuf {
    let out = dir.join("busybox.tar");
    let script = Path::new(env!("CARGO_MANIFEST_DIR")).join("contrib/busybox-archive");
    sh(script.to_str().unwrap(), &[out.to_str().unwrap()]);
    out
}

/// Name of the image that [`many`] makes.
pub const MANY: &str = "localhost/many:small";
/// Its layers.
pub const MANY_LAYERS: usize = 3;

/// An archive of layers with so many small files that their unpacking can be cut off anywhere.
pub fn many(dir: &Path) -> PathBuf {
    let layers: Vec<Vec<u8>> = (0..MANY_LAYERS)
        .map(|number| gzip(&many_files(number)))
        .collect();
    let out = dir.join("many.tar");
    archive(&out, MANY, &layers);
    out
}

/// The directories of a layer of that image: of its own, and some that all of them have.
fn many_dirs(layer: usize) -> impl Iterator<Item = String> {
    let shared = (0..10).map(|dir| format!("shared-{dir}"));
    shared.chain((0..10).map(move |dir| format!("layer-{layer}-{dir}")))
}

/// The times that its layers give to its directories.
pub fn many_times() -> BTreeMap<Vec<u8>, i64> {
    let dirs = (0..MANY_LAYERS).flat_map(many_dirs);
    dirs.map(|dir| (dir.into_bytes(), DIR.mtime.cast_signed()))
        .collect()
}

/// Files and hard links in all of those. Each layer but the first makes one directory opaque, and takes away from
/// another what the layer below put there.
fn many_files(layer: usize) -> Vec<u8> {
    let mut l = Layer::new();
    for dir in many_dirs(layer) {
        l.dir(&format!("{dir}/"), &DIR);
        if layer > 0 && dir == format!("shared-{layer}") {
            l.whiteout(&format!("{dir}/.wh..wh..opq"));
        }
        for file in 0..40 {
            let path = format!("{dir}/file-{layer}-{file}");
            let owner = Meta {
                owner: (file, 7),
                ..PLAIN
            };
            l.file(&path, &owner, &vec![file as u8; 97 * file as usize]);
            if file % 4 == 0 {
                l.link(
                    &format!("{dir}/link-{layer}-{file}"),
                    EntryType::Link,
                    &path,
                    &owner,
                );
            }
            if layer > 0 && file % 8 == 0 && dir == "shared-7" {
                l.whiteout(&format!("{dir}/.wh.file-{}-{file}", layer - 1));
            }
        }
    }
    l.finish()
}

/// An archive of a small Debian and of layers above it that hold what layers can hold, and the time that the last
/// header of each directory gives it.
pub fn debian(dir: &Path) -> (PathBuf, BTreeMap<Vec<u8>, i64>) {
    let base = debian_base();
    let layers = [
        fs::read(base).unwrap(),
        gzip(&changes()),
        gzip(&more_changes()),
        gzip(&Layer::new().finish()),
    ];
    let made = dir.join("made.tar");
    archive(&made, DEBIAN, &layers);
    // skopeo reads it and writes it again: the archive is one that the world's tools accept.
    let out = dir.join("debian.tar");
    sh(
        "skopeo",
        &[
            "--insecure-policy",
            "copy",
            "-q",
            &format!("oci-archive:{}:{DEBIAN}", made.display()),
            &format!("oci-archive:{}:{DEBIAN}", out.display()),
        ],
    );
    fs::remove_file(made).unwrap();
    let mut headers = BTreeMap::new();
    for layer in &layers {
        let mut tar = tar::Archive::new(GzDecoder::new(&layer[..]));
        for entry in tar.entries().unwrap() {
            let entry = entry.unwrap();
            if entry.header().entry_type().is_dir() {
                let path = entry.path_bytes();
                let path = path.strip_prefix(b"./").unwrap_or(&path);
                let path = path.strip_suffix(b"/").unwrap_or(path);
                headers.insert(path.to_vec(), entry.header().mtime().unwrap() as i64);
            }
        }
    }
    (out, headers)
}

/// The base layer, made once for a build directory.
fn debian_base() -> PathBuf {
    let cache = Path::new(env!("CARGO_TARGET_TMPDIR")).join("debian-base.tar.gz");
    if !cache.exists() {
        let part = cache.with_extension(format!("part-{}", std::process::id()));
        let script = format!(
            "mmdebstrap --quiet --variant=essential --format=tar bookworm - | gzip -1 >'{}'",
            part.display()
        );
        sh("bash", &["-o", "pipefail", "-c", &script]);
        fs::rename(part, &cache).unwrap();
    }
    cache
}

/// A layer under construction.
struct Layer(tar::Builder<Vec<u8>>);

/// What an entry is beside its name.
struct Meta {
    mode: u32,
    owner: (u64, u64),
    mtime: u64,
}

const PLAIN: Meta = Meta {
    mode: 0o644,
    owner: (0, 0),
    mtime: 1_600_000_000,
};
const DIR: Meta = Meta {
    mode: 0o755,
    ..PLAIN
};

impl Layer {
    fn new() -> Self {
        Self(tar::Builder::new(Vec::new()))
    }

    fn entry(
        &mut self,
        path: &[u8],
        kind: EntryType,
        meta: &Meta,
        device: Option<(u32, u32)>,
        link: Option<&str>,
        data: &[u8],
    ) {
        let mut header = Header::new_ustar();
        header.set_entry_type(kind);
        header.set_mode(meta.mode);
        header.set_uid(meta.owner.0);
        header.set_gid(meta.owner.1);
        header.set_mtime(meta.mtime);
        header.set_size(data.len() as u64);
        if let Some((major, minor)) = device {
            header.set_device_major(major).unwrap();
            header.set_device_minor(minor).unwrap();
        }
        if path.len() <= 100 {
            // By hand: the library refuses nothing that a test wants to see, such as names that are not UTF-8.
            header.as_old_mut().name[..path.len()].copy_from_slice(path);
        } else {
            self.pax(&[("path", path)]);
            header.as_old_mut().name[..100].copy_from_slice(&path[..100]);
        }
        if let Some(link) = link {
            header.set_link_name(link).unwrap();
        }
        header.set_cksum();
        self.0.append(&header, data).unwrap();
    }

    fn pax(&mut self, records: &[(&str, &[u8])]) {
        self.0
            .append_pax_extensions(records.iter().copied())
            .unwrap();
    }

    fn file(&mut self, path: &str, meta: &Meta, data: &[u8]) {
        self.entry(path.as_bytes(), EntryType::Regular, meta, None, None, data);
    }

    fn dir(&mut self, path: &str, meta: &Meta) {
        self.entry(path.as_bytes(), EntryType::Directory, meta, None, None, b"");
    }

    fn link(&mut self, path: &str, kind: EntryType, target: &str, meta: &Meta) {
        self.entry(path.as_bytes(), kind, meta, None, Some(target), b"");
    }

    fn device(&mut self, path: &str, kind: EntryType, major: u32, minor: u32, mode: u32) {
        self.entry(
            path.as_bytes(),
            kind,
            &Meta { mode, ..PLAIN },
            Some((major, minor)),
            None,
            b"",
        );
    }

    fn whiteout(&mut self, path: &str) {
        self.file(path, &PLAIN, b"");
    }

    fn finish(self) -> Vec<u8> {
        self.0.into_inner().unwrap()
    }
}

/// Revision 2 of `struct vfs_cap_data`: cap_net_raw, effective and permitted.
const NET_RAW: [u8; 20] = [
    1, 0, 0, 2, 0, 0x20, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0,
];

fn changes() -> Vec<u8> {
    let mut l = Layer::new();
    // Whiteouts of a tree and of a file, an opaque directory with something new in it.
    l.whiteout("usr/share/.wh.doc");
    l.whiteout("etc/.wh.issue");
    l.dir("usr/share/perl5/", &DIR);
    l.whiteout("usr/share/perl5/.wh..wh..opq");
    l.file("usr/share/perl5/alone", &PLAIN, b"alone\n");
    // Hard links to files of the layer below, by their path and through a symlink of that layer (bin -> usr/bin).
    l.link(
        "usr/bin/dash-link",
        EntryType::Link,
        "usr/bin/dash",
        &Meta {
            mode: 0o755,
            ..PLAIN
        },
    );
    l.link(
        "usr/bin/ls-through-bin",
        EntryType::Link,
        "bin/ls",
        &Meta {
            mode: 0o755,
            ..PLAIN
        },
    );
    l.file(
        "bin/through-the-link",
        &Meta {
            mode: 0o755,
            ..PLAIN
        },
        b"#!/bin/sh\n",
    );
    // Parents that no layer names.
    l.file("opt/omitted/parent/file", &PLAIN, b"deep\n");
    // Every type, odd owners, modes and times.
    l.dir(
        "opt/",
        &Meta {
            mode: 0o1777,
            owner: (0, 50),
            mtime: 1_234_567_890,
        },
    );
    l.device("opt/null", EntryType::Char, 1, 3, 0o666);
    l.device("opt/loop", EntryType::Block, 7, 200, 0o660);
    l.entry(
        b"opt/fifo",
        EntryType::Fifo,
        &Meta {
            mode: 0o600,
            owner: (7, 8),
            ..PLAIN
        },
        None,
        None,
        b"",
    );
    l.file(
        "opt/suid",
        &Meta {
            mode: 0o6755,
            owner: (1000, 1001),
            ..PLAIN
        },
        b"suid\n",
    );
    l.file(
        "opt/nobody",
        &Meta {
            mode: 0,
            owner: (65534, 65534),
            mtime: 0,
        },
        b"",
    );
    l.pax(&[
        ("mtime", b"1500000000.123456789"),
        ("SCHILY.xattr.user.note", b"a \x00 byte"),
    ]);
    l.file("opt/times", &PLAIN, b"nanoseconds\n");
    l.pax(&[("SCHILY.xattr.security.capability", &NET_RAW)]);
    l.file(
        "opt/caps",
        &Meta {
            mode: 0o755,
            owner: (3, 4),
            ..PLAIN
        },
        b"caps\n",
    );
    l.pax(&[("uid", b"3000000"), ("gid", b"4000000")]);
    l.file("opt/big-ids", &PLAIN, b"");
    l.link(
        "opt/dangling",
        EntryType::Symlink,
        "/does/not/exist",
        &Meta {
            mode: 0o777,
            owner: (5, 6),
            ..PLAIN
        },
    );
    l.entry(
        b"opt/not-utf8-\xff\xfe",
        EntryType::Regular,
        &PLAIN,
        None,
        None,
        b"bytes\n",
    );
    l.entry(
        &[b"opt/".to_vec(), vec![b'n'; 255]].concat(),
        EntryType::Regular,
        &PLAIN,
        None,
        None,
        b"255\n",
    );
    l.file("opt/hash#and space", &PLAIN, b"\n");
    // Names that mean something to a union and nothing to a tar.
    l.pax(&[
        ("SCHILY.xattr.trusted.overlay.opaque", b"y"),
        ("SCHILY.xattr.user.overlay.opaque", b"y"),
    ]);
    l.dir("usr/share/bash-completion/", &DIR);
    // Three links of one file, to be taken apart by the next layer.
    l.dir("opt/links/", &DIR);
    l.file(
        "opt/links/a",
        &Meta {
            mode: 0o640,
            ..PLAIN
        },
        b"linked\n",
    );
    l.link(
        "opt/links/b",
        EntryType::Link,
        "opt/links/a",
        &Meta {
            mode: 0o640,
            ..PLAIN
        },
    );
    l.link(
        "opt/links/c",
        EntryType::Link,
        "opt/links/a",
        &Meta {
            mode: 0o640,
            ..PLAIN
        },
    );
    l.dir("opt/opaque/", &DIR);
    l.file("opt/opaque/old", &PLAIN, b"old\n");
    l.dir("etc/was-a-directory/", &DIR);
    l.file("etc/was-a-directory/inside", &PLAIN, b"inside\n");
    l.file("opt/was-a-file", &PLAIN, b"file\n");
    l.link("opt/was-a-link", EntryType::Symlink, "links", &PLAIN);
    l.file("etc/hostname-of-image", &PLAIN, b"image\n");
    l.finish()
}

fn more_changes() -> Vec<u8> {
    let mut l = Layer::new();
    l.whiteout("opt/links/.wh.b");
    l.file("opt/links/c", &PLAIN, b"no link any more\n");
    l.link(
        "opt/links/d",
        EntryType::Link,
        "opt/links/a",
        &Meta {
            mode: 0o600,
            ..PLAIN
        },
    );
    l.link(
        "usr/bin/dash-again",
        EntryType::Link,
        "usr/bin/dash-link",
        &Meta {
            mode: 0o755,
            ..PLAIN
        },
    );
    l.dir(
        "opt/opaque/",
        &Meta {
            mode: 0o700,
            owner: (9, 9),
            ..DIR
        },
    );
    l.whiteout("opt/opaque/.wh..wh..opq");
    l.file("opt/opaque/new", &PLAIN, b"new\n");
    l.file("etc/was-a-directory", &PLAIN, b"now a file\n");
    l.dir("opt/was-a-file/", &DIR);
    l.file("opt/was-a-file/inside", &PLAIN, b"inside\n");
    l.dir("opt/was-a-link/", &DIR);
    l.file("opt/was-a-link/inside", &PLAIN, b"not in links\n");
    // Deleted by the layer below, here again.
    l.dir("usr/share/doc/", &DIR);
    l.file("usr/share/doc/new", &PLAIN, b"back\n");
    // Metadata of directories and files that other layers filled.
    l.dir(
        "usr/share/",
        &Meta {
            mode: 0o751,
            owner: (11, 12),
            mtime: 1_111_111_111,
        },
    );
    l.dir(
        "var/",
        &Meta {
            mode: 0o755,
            owner: (0, 0),
            mtime: 999,
        },
    );
    l.finish()
}

fn gzip(data: &[u8]) -> Vec<u8> {
    let mut encoder = GzEncoder::new(Vec::new(), Compression::fast());
    encoder.write_all(data).unwrap();
    encoder.finish().unwrap()
}

fn digest(data: &[u8]) -> String {
    format!("sha256:{}", hex(&Sha256::digest(data)))
}

fn hex(bytes: &[u8]) -> String {
    bytes.iter().map(|b| format!("{b:02x}")).collect()
}

/// This machine's, in the words of an image's platform.
pub fn architecture() -> &'static str {
    match std::env::consts::ARCH {
        "x86_64" => "amd64",
        "aarch64" => "arm64",
        other => other,
    }
}

/// An OCI archive of one image; its layers are given as gzip.
fn archive(out: &Path, name: &str, layers: &[Vec<u8>]) {
    let mut tar = tar::Builder::new(File::create(out).unwrap());
    let mut add = |path: String, data: &[u8]| {
        let mut header = Header::new_gnu();
        header.set_mode(0o644);
        header.set_size(data.len() as u64);
        tar.append_data(&mut header, path, data).unwrap();
    };
    let mut blob = |kind: &str, data: &[u8]| {
        let digest = digest(data);
        add(format!("blobs/sha256/{}", &digest[7..]), data);
        json!({"mediaType": kind, "digest": digest, "size": data.len()})
    };
    let mut diff_ids = Vec::new();
    let mut descriptors = Vec::new();
    for layer in layers {
        let mut plain = Vec::new();
        GzDecoder::new(&layer[..]).read_to_end(&mut plain).unwrap();
        diff_ids.push(digest(&plain));
        descriptors.push(blob("application/vnd.oci.image.layer.v1.tar+gzip", layer));
    }
    let config = json!({
        "architecture": architecture(), "os": "linux",
        "config": {"Env": ["PATH=/usr/sbin:/usr/bin:/sbin:/bin"], "Cmd": ["/bin/sh"]},
        "rootfs": {"type": "layers", "diff_ids": diff_ids},
    });
    let config = blob(
        "application/vnd.oci.image.config.v1+json",
        config.to_string().as_bytes(),
    );
    let manifest = json!({
        "schemaVersion": 2, "mediaType": "application/vnd.oci.image.manifest.v1+json",
        "config": config, "layers": descriptors,
    });
    let mut manifest = blob(
        "application/vnd.oci.image.manifest.v1+json",
        manifest.to_string().as_bytes(),
    );
    manifest["annotations"] =
        json!({"org.opencontainers.image.ref.name": name, "io.containerd.image.name": name});
    add(
        "index.json".into(),
        json!({"schemaVersion": 2, "manifests": [manifest]})
            .to_string()
            .as_bytes(),
    );
    add("oci-layout".into(), br#"{"imageLayoutVersion":"1.0.0"}"#);
    tar.into_inner().unwrap().flush().unwrap();
}

/// The config of the image that a line of `ctr images ls` is about; `content` gets a blob by its digest.
pub fn config_of(listing: &str, content: impl Fn(&str) -> String) -> Value {
    let digest = listing
        .split_whitespace()
        .find(|w| w.starts_with("sha256:"))
        .unwrap();
    let mut manifest: Value = serde_json::from_str(&content(digest)).unwrap();
    if let Some(inner) = manifest["manifests"][0]["digest"]
        .as_str()
        .map(String::from)
    {
        manifest = serde_json::from_str(&content(&inner)).unwrap();
    }
    serde_json::from_str(&content(manifest["config"]["digest"].as_str().unwrap())).unwrap()
}

/// OCI image spec, "Layer ChainID".
pub fn chain_id(config: &Value) -> String {
    let diff_ids = config["rootfs"]["diff_ids"].as_array().unwrap();
    let mut ids = diff_ids.iter().map(|id| id.as_str().unwrap().to_owned());
    let first = ids.next().unwrap();
    ids.fold(first, |chain, diff| {
        digest(format!("{chain} {diff}").as_bytes())
    })
}
