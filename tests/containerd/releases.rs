//! Other releases of containerd than the installed one, each with the form of the configuration that is shipped for it.

use std::collections::BTreeMap;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};

use super::host::{Host, Release, sh};
use super::image::{DEBIAN, MANY, many};
use super::tree::{self, Tree};

/// A Debian suite, the release line of containerd in it, and the configuration for that.
pub struct Line {
    pub suite: &'static str,
    version: &'static str,
    pub config: &'static str,
}

pub const LINES: [Line; 2] = [
    Line {
        suite: "trixie",
        version: "1.7.",
        config: "config-1.7.toml",
    },
    // A suite that moves: only where `make test-full` asks for it.
    Line {
        suite: "forky",
        version: "2.",
        config: "config-2.toml",
    },
];

/// What the suite has, fetched once for a build directory.
pub fn programs(suite: &str) -> PathBuf {
    let files = Path::new(env!("CARGO_TARGET_TMPDIR")).join(format!("containerd-{suite}"));
    if !files.exists() {
        let script = concat!(env!("CARGO_MANIFEST_DIR"), "/tests/containerd/fetch");
        sh(script, &[suite, files.to_str().unwrap()]);
    }
    files.join("usr/bin")
}

/// Has containerd's content store lose the blobs of all layers.
fn remove_layers(host: &Host) {
    for blob in host.ctr(&["content", "ls"]).lines() {
        if blob.contains("containerd.io/uncompressed=") {
            let digest = blob.split_whitespace().next().unwrap();
            host.ctr(&["content", "rm", digest]);
        }
    }
}

/// With our differ in place of the stock one: the same tree as the native snapshotter's, without a mount to unpack through.
pub fn differ_makes_the_same(
    archive: &Path,
    want: &Tree,
    began: i64,
    headers: &BTreeMap<Vec<u8>, i64>,
) {
    let line = &LINES[0];
    let host = Host::start_with(Release {
        programs: Some(programs(line.suite)),
        config: line.config,
    });
    let archive = archive.to_str().unwrap();
    host.ctr(&["images", "import", "--snapshotter", "plywood", archive]);
    let root = host.look_into("plywood", &host.chain_id(DEBIAN));
    let mut times = headers.clone();
    // The root, and directories that no layer lists: what is made has the epoch's time, whenever it is made.
    for path in ["", "opt/omitted", "opt/omitted/parent"] {
        times.insert(path.into(), 0);
    }
    let differences = tree::differences(want, &tree::read(&root), began, &times);
    host.look_away("plywood", &root);
    assert!(differences.is_empty(), "{}", differences.join("\n"));
    assert!(host.stored("store/layers") > 2);
    assert_came_as_streams(&host);
    host.ctr(&["images", "rm", "--sync", DEBIAN]);
    host.until("nothing is left", || {
        ["store/layers", "store/packs", "snapshots/data", "trash"].map(|dir| host.stored(dir))
            == [0; 4]
    });
}

#[test]
fn other_releases_of_containerd_import_and_run_with_the_shipped_configurations() {
    let full = std::env::var_os("PLYWOOD_TEST_FULL").is_some();
    for line in &LINES[..if full { 2 } else { 1 }] {
        let host = Host::start_with(Release {
            programs: Some(programs(line.suite)),
            config: line.config,
        });
        imports_and_runs(&host, line);
    }
}

#[test]
fn damaged_layers_are_restored_from_the_content_store() {
    let line = &LINES[0];
    let host = Host::start_with(Release {
        programs: Some(programs(line.suite)),
        config: line.config,
    });
    let busybox = super::image::busybox(&host.dir);
    let import = ["images", "import", "--snapshotter", "plywood"];
    // Not by the helper, which sees to it that nobody damages what was imported.
    host.try_ctr(&[&import[..], &[busybox.to_str().unwrap()]].concat())
        .unwrap();
    let damage = || {
        let layers = host.files("store/layers").into_iter();
        for recipe in layers.filter(|path| path.extension().is_some_and(|of| of == "tar")) {
            std::fs::remove_file(recipe).unwrap();
        }
        for pack in host.files("store/packs") {
            // One that a collection takes away meanwhile needs no damage.
            if let Ok(file) = std::fs::File::options().write(true).open(pack) {
                file.write_all_at(&[0xff; 64], 130).unwrap();
            }
        }
    };
    damage();
    let told = host.try_snapctl(&["system", "verify", "--deep"]);
    let told = told.unwrap_err();
    let advice = "; run `snapctl system repair`; if that leaves it, fetch the blob sha256:";
    assert!(told.contains(advice), "{told}");
    let told = host.snapctl(&["system", "repair"]);
    assert_eq!(
        told.matches("restored from containerd's content store")
            .count(),
        2,
        "{told}"
    );
    host.snapctl(&["system", "verify", "--deep"]);

    // What containerd does not have any more is said by its name. Manifest and configuration stay: without them containerd
    // would remove the snapshots, and nobody would need the layers.
    damage();
    remove_layers(&host);
    let told = host.try_snapctl(&["system", "repair"]).unwrap_err();
    assert!(told.contains("left: layer"), "{told}");
    assert!(told.contains("fetch the blob sha256:"), "{told}");
}

/// Nobody knows the blob of such a layer, nor its diff id; the image had to be loaded once more beside it.
#[test]
fn layers_that_came_as_files_get_contents_from_blobs_of_the_content_store_and_from_an_archive() {
    // The installed release, which unpacks through the mount.
    let host = Host::start();
    let busybox = super::image::busybox(&host.dir);
    let busybox = busybox.to_str().unwrap();
    host.try_ctr(&["images", "import", "--snapshotter", "plywood", busybox])
        .unwrap();
    let damage = || {
        for pack in host.files("store/packs") {
            let file = std::fs::File::options().write(true).open(pack).unwrap();
            file.write_all_at(&[0xff; 64], 130).unwrap();
        }
        let dirs = host.files("store/objects").into_iter();
        for file in dirs.flat_map(|dir| std::fs::read_dir(dir).unwrap()) {
            let file = file.unwrap().path();
            let file = std::fs::File::options().write(true).open(file).unwrap();
            file.set_len(100).unwrap();
        }
        host.try_snapctl(&["system", "verify", "--deep"])
            .unwrap_err()
    };
    let told = damage();
    let advice =
        "; run `snapctl system repair`; if that leaves it, get the archive of its image, or of ";
    assert!(told.contains(advice), "{told}");
    let mended = |told: &str| told.contains(" lacked came with other layers\n");
    let told = host.snapctl(&["system", "repair"]);
    assert!(mended(&told), "{told}");
    host.snapctl(&["system", "verify", "--deep"]);

    damage();
    remove_layers(&host);
    let told = host.try_snapctl(&["system", "repair"]).unwrap_err();
    assert!(told.contains("left: layer"), "{told}");
    let told = host.snapctl(&["system", "repair", "-i", busybox]);
    assert!(mended(&told), "{told}");
    host.snapctl(&["system", "verify", "--deep"]);
    assert_eq!(host.snapctl(&["image", "ls", "-q"]), "");
}

fn imports_and_runs(host: &Host, line: &Line) {
    let server = host.ctr(&["version"]);
    let (_, server) = server.split_once("Server:").unwrap();
    let version = server.split_once("Version:").unwrap().1.trim_start();
    assert!(version.starts_with(line.version), "{server}");

    let (busybox, many) = (super::image::busybox(&host.dir), many(&host.dir));
    let began = super::now();
    for (snapshotter, archive) in [("native", &many), ("plywood", &many), ("plywood", &busybox)] {
        let archive = archive.to_str().unwrap();
        // The native snapshotter is the oracle and has no entry in the transfer service's configuration.
        let local = (snapshotter == "native" && line.version == "2.").then_some("--local");
        let args = ["images", "import", "--snapshotter", snapshotter].into_iter();
        host.ctr(&args.chain(local).chain([archive]).collect::<Vec<_>>());
    }
    let top = host.chain_id(MANY);
    let trees = ["native", "plywood"].map(|snapshotter| {
        let root = host.look_into(snapshotter, &top);
        let tree = tree::read(&root);
        host.look_away(snapshotter, &root);
        tree
    });
    assert!(trees[0].len() > 2000, "{}", trees[0].len());
    let mut times = super::image::many_times();
    // A root of which no layer says anything.
    times.insert(Vec::new(), 0);
    let differences = tree::differences(&trees[0], &trees[1], began, &times);
    assert!(differences.is_empty(), "{}", differences.join("\n"));
    assert_came_as_streams(host);
    // The top of each image.
    host.until("views between the layers of an image are gone", || {
        host.stored("store/views") <= 2
    });

    const BUSYBOX: &str = "localhost/busybox:latest";
    let script =
        "echo ran; echo 1 >/made; rm /etc/image-name; test -e /made && ! test -e /etc/image-name";
    for name in ["one", "two"] {
        let run = ["run", "--rm", "--snapshotter", "plywood", BUSYBOX, name];
        let out = host.ctr(&[&run[..], &["/bin/sh", "-ec", script]].concat());
        assert_eq!(out, "ran\n");
    }
    let layer = what_a_container_changed_is_a_layer(host, BUSYBOX, script);
    two_containers_are_compared_with_each_other(host, BUSYBOX);
    a_layer_that_cannot_be_written_is_refused_and_leaves_nothing(host, BUSYBOX);
    for image in [MANY, BUSYBOX] {
        host.ctr(&["images", "rm", "--sync", image]);
    }
    // Nothing names it yet, and nobody but plyd has a lease on it.
    let blobs = host.ctr(&["content", "ls", "-q"]);
    assert!(blobs.contains(&layer), "{layer} not in {blobs}");
    host.until("every snapshot is collected", || {
        host.snapshots("plywood").is_empty() && host.stored("store/layers") == 0
    });
    host.until("every mount is gone", || host.mounts().is_empty());
}

fn two_containers_are_compared_with_each_other(host: &Host, image: &str) {
    for (name, script) in [
        ("left", "echo >/left; rm /etc/image-name"),
        ("right", "echo >/right"),
    ] {
        let run = ["run", "--snapshotter", "plywood", image, name];
        host.ctr(&[&run[..], &["/bin/sh", "-ec", script]].concat());
    }
    let diff = ["snapshots", "--snapshotter", "plywood", "diff"];
    let layer = host.ctr_bytes(&[&diff[..], &["left", "right"]].concat());
    let file = host.dir.join("layer");
    std::fs::write(&file, &layer).unwrap();
    let listed = sh("tar", &["-tzf", file.to_str().unwrap()]);
    for name in [".wh.left", "etc/image-name", "right"] {
        assert!(listed.lines().any(|line| line == name), "{name}: {listed}");
    }
    // What both have of the image is not in it.
    assert!(!listed.contains("bin/busybox"), "{listed}");
    host.ctr(&["containers", "rm", "left", "right"]);
}

fn a_layer_that_cannot_be_written_is_refused_and_leaves_nothing(host: &Host, image: &str) {
    let run = ["run", "--snapshotter", "plywood", image, "refused"];
    let script = "head -c 3000000 /dev/urandom >/large; : >/.wh.name";
    host.ctr(&[&run[..], &["/bin/sh", "-ec", script]].concat());
    for _ in 0..5 {
        let diff = ["snapshots", "--snapshotter", "plywood", "diff", "refused"];
        let told = host.try_ctr(&diff).unwrap_err();
        assert!(told.contains("/.wh.name: its name begins"), "{told}");
    }
    let ingest = "containerd/io.containerd.content.v1.content/ingest";
    let left = std::fs::read_dir(host.dir.join(ingest)).unwrap();
    assert_eq!(left.count(), 0);
    host.ctr(&["containers", "rm", "refused"]);
}

/// Only what our differ has applied has its stream kept beside its index; what the stock one has unpacked through a mount is
/// made a layer by the commit.
fn assert_came_as_streams(host: &Host) {
    let layers = host.files("store/layers").into_iter();
    let (recipes, indexes): (Vec<_>, Vec<_>) =
        layers.partition(|path| path.extension().is_some_and(|of| of == "tar"));
    let unpacked: Vec<_> = indexes
        .iter()
        .filter(|index| !recipes.contains(&index.with_extension("tar")))
        .collect();
    assert!(unpacked.is_empty(), "unpacked: {unpacked:?}");
    assert!(!recipes.is_empty());
}

/// Through the diff service, which containerd asks first.
fn what_a_container_changed_is_a_layer(host: &Host, image: &str, script: &str) -> String {
    let run = ["run", "--snapshotter", "plywood", image, "changed"];
    host.ctr(&[&run[..], &["/bin/sh", "-ec", script]].concat());
    for (media_type, begins) in [
        (
            "application/vnd.oci.image.layer.v1.tar+gzip",
            &[0x1f, 0x8b][..],
        ),
        (
            "application/vnd.oci.image.layer.v1.tar+zstd",
            &[0x28, 0xb5, 0x2f, 0xfd],
        ),
        ("application/vnd.oci.image.layer.v1.tar", b"PaxHeaders.0/"),
    ] {
        let diff = [
            "snapshots",
            "--snapshotter",
            "plywood",
            "diff",
            "--media-type",
        ];
        let diff = || host.ctr_bytes(&[&diff[..], &[media_type, "changed"]].concat());
        let layer = diff();
        assert!(layer.starts_with(begins), "{media_type}");
        assert!(diff() == layer, "{media_type}: not the same bytes again");
        let file = host.dir.join("layer");
        std::fs::write(&file, &layer).unwrap();
        let list = ["--utc", "--full-time", "-tvf", file.to_str().unwrap()];
        let listed = sh("tar", &list);
        let line = |name: &str| listed.lines().find(|line| line.ends_with(name));
        assert!(line(" made").is_some(), "{listed}");
        // The stock differ would give it the time of the comparison.
        let whiteout = line(" etc/.wh.image-name").unwrap();
        assert!(whiteout.contains("1970-01-01 00:00:00"), "{whiteout}");
    }
    host.ctr(&["containers", "rm", "changed"]);
    // What the leases that last while a layer is written are followed by.
    let soon = sh("date", &["-u", "-d", "+11 minutes", "+%Y-%m-%dT%H:%M:%S"]);
    let leases = host.ctr(&["leases", "ls"]);
    let of_plyd = leases.lines().filter(|line| line.starts_with("plywood-"));
    for lease in of_plyd {
        let (_, end) = lease.split_once("gc.expire=").unwrap();
        assert!(end[..19] < soon[..19], "{lease}");
    }
    let sum = sh("sha256sum", &[host.dir.join("layer").to_str().unwrap()]);
    format!("sha256:{}", &sum[..64])
}
