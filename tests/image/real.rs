//! Images made by other programs, and what those programs and containerd make of them.

use std::fs;
use std::os::unix::fs::symlink;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use plywood::image::Image;

use super::archive::{Blob, archive};
use super::good;
use super::store::Store;
use super::tree::{self, Object, Tree};

const PATIENCE: Duration = Duration::from_secs(60);

fn run(program: &str, args: &[&str]) -> String {
    let output = Command::new(program).args(args).output().unwrap();
    assert!(
        output.status.success(),
        "{program} {args:?}: {}",
        String::from_utf8_lossy(&output.stderr)
    );
    String::from_utf8(output.stdout).unwrap()
}

fn path(path: &Path) -> &str {
    path.to_str().unwrap()
}

/// Debian's containerd with its native (plain directory) snapshotter, in a directory of its own.
struct Containerd {
    dir: tempfile::TempDir,
    process: Child,
}

impl Containerd {
    fn start() -> Self {
        let dir = tempfile::Builder::new().prefix("ply-").tempdir().unwrap();
        let at = path(dir.path());
        let config = format!(
            "version = 2\nroot = \"{at}/root\"\nstate = \"{at}/state\"\n\
             disabled_plugins = [\"io.containerd.grpc.v1.cri\", \"io.containerd.internal.v1.opt\"]\n\
             [grpc]\naddress = \"{at}/s\"\n"
        );
        fs::write(dir.path().join("config.toml"), config).unwrap();
        let log = fs::File::create(dir.path().join("log")).unwrap();
        let process = Command::new("containerd")
            .args(["-c", &format!("{at}/config.toml")])
            .stdin(Stdio::null())
            .stdout(log.try_clone().unwrap())
            .stderr(log)
            .spawn()
            .unwrap();
        let this = Self { dir, process };
        let deadline = Instant::now() + PATIENCE;
        while !this.ctr(&["version"]).status().unwrap().success() {
            assert!(Instant::now() < deadline, "containerd does not answer");
            std::thread::sleep(Duration::from_millis(50));
        }
        this
    }

    fn ctr(&self, args: &[&str]) -> Command {
        let mut command = Command::new("ctr");
        command
            .args(["-a", path(&self.dir.path().join("s"))])
            .args(args);
        command.stdout(Stdio::null()).stderr(Stdio::null());
        command
    }

    /// The tree of an image, as `archive.Apply` makes it in a plain directory.
    fn tree(&self, archive: &Path, image: &Image) -> Tree {
        let imported = self
            .ctr(&["images", "import", "--snapshotter", "native", path(archive)])
            .stderr(Stdio::piped())
            .output()
            .unwrap();
        let stderr = String::from_utf8_lossy(&imported.stderr);
        assert!(imported.status.success(), "{stderr}");
        let snapshots = ["snapshots", "--snapshotter", "native"];
        let prepared = self
            .ctr(&snapshots)
            .args(["prepare", &image.id, &image.chain_id])
            .stderr(Stdio::inherit())
            .status()
            .unwrap();
        assert!(prepared.success());
        let mounts = self
            .ctr(&snapshots)
            .args(["mounts", "/target", &image.id])
            .stdout(Stdio::piped())
            .output()
            .unwrap();
        // mount -t bind SOURCE /target -o rbind,rw
        let line = String::from_utf8(mounts.stdout).unwrap();
        let source = line.split_whitespace().nth(3).unwrap();
        tree::of_directory(Path::new(source))
    }
}

impl Drop for Containerd {
    fn drop(&mut self) {
        let _ended = self.process.kill();
        let _ended = self.process.wait();
    }
}

/// A directory that a layer changes without an entry of its own has the time of the unpacking, except
/// with umoci.
fn without_times_of_directories(_path: &str, object: &Object) -> Object {
    let mut object = object.clone();
    if object.kind == 'd' {
        object.mtime = (0, 0);
    }
    object
}

fn fill_first_layer(root: &Path) {
    for dir in [
        "usr/bin",
        "usr/lib/doc",
        "etc/conf.d",
        "var/empty",
        "dev",
        "home/a",
        "opt/tree/deep",
    ] {
        fs::create_dir_all(root.join(dir)).unwrap();
    }
    symlink("usr/bin", root.join("bin")).unwrap();
    symlink("/usr/lib", root.join("lib")).unwrap();
    fs::copy("/bin/busybox", root.join("usr/bin/busybox")).unwrap();
    for applet in ["sh", "ls", "cat"] {
        fs::hard_link(
            root.join("usr/bin/busybox"),
            root.join("usr/bin").join(applet),
        )
        .unwrap();
    }
    for number in 0..300 {
        let name = root.join(format!("usr/lib/doc/file-{number}"));
        fs::write(name, format!("{number}\n").repeat(number)).unwrap();
    }
    fs::write(root.join("etc/passwd"), "root:x:0:0:root:/:/bin/sh\n").unwrap();
    fs::write(root.join("opt/tree/deep/file"), "deep").unwrap();
    fs::write(root.join("opt/keep"), "keep").unwrap();
    let at = |name: &str| root.join(name).to_str().unwrap().to_owned();
    fs::write(root.join("usr/bin/ping"), "#!/bin/sh\n").unwrap();
    run("setcap", &["cap_net_raw+ep", &at("usr/bin/ping")]);
    fs::write(root.join("usr/bin/su"), "#!/bin/sh\n").unwrap();
    run("chmod", &["6755", &at("usr/bin/su")]);
    run(
        "setfattr",
        &["-n", "user.note", "-v", "with=sign", &at("etc/passwd")],
    );
    run("mknod", &[&at("dev/null"), "c", "1", "3"]);
    run("mkfifo", &[&at("dev/fifo")]);
    run("chown", &["-R", "1000:1001", &at("home/a")]);
    run("chmod", &["1777", &at("var/empty")]);
    run(
        "touch",
        &["-d", "2001-02-03T04:05:06.789012345Z", &at("opt/keep")],
    );
}

fn fill_second_layer(root: &Path) {
    fs::remove_dir_all(root.join("opt/tree")).unwrap();
    fs::remove_dir_all(root.join("usr/lib/doc")).unwrap();
    fs::create_dir(root.join("usr/lib/doc")).unwrap();
    fs::write(root.join("usr/lib/doc/new"), "new").unwrap();
    fs::remove_file(root.join("usr/bin/ping")).unwrap();
    fs::write(root.join("etc/passwd"), "root:x:0:0:changed:/:/bin/sh\n").unwrap();
    fs::hard_link(root.join("opt/keep"), root.join("opt/keep-too")).unwrap();
    run("chmod", &["0700", root.join("home/a").to_str().unwrap()]);
}

/// An OCI layout of two layers, made by umoci.
fn layout(dir: &Path) -> PathBuf {
    let layout = dir.join("layout");
    let (bundle, image) = (dir.join("bundle"), format!("{}:it", layout.display()));
    run("umoci", &["init", "--layout", path(&layout)]);
    run("umoci", &["new", "--image", &image]);
    run("umoci", &["unpack", "--image", &image, path(&bundle)]);
    for fill in [fill_first_layer, fill_second_layer] {
        fill(&bundle.join("rootfs"));
        run(
            "umoci",
            &[
                "repack",
                "--refresh-bundle",
                "--image",
                &image,
                path(&bundle),
            ],
        );
    }
    layout
}

#[test]
fn images_of_umoci_and_skopeo_are_what_containerd_and_umoci_unpack() {
    let dir = tempfile::tempdir().unwrap();
    let layout = layout(dir.path());
    let source = format!("oci:{}:it", layout.display());
    let file = |name: &str| dir.path().join(name);
    let copy = |to: &str, name: &str, options: &[&str]| {
        let target = format!("{to}:{}:example.org/it:1", file(name).display());
        let mut args = vec!["--insecure-policy", "copy", "--quiet"];
        args.extend(options);
        args.extend([source.as_str(), target.as_str()]);
        run("skopeo", &args);
        fs::read(file(name)).unwrap()
    };
    let gzip = copy("oci-archive", "gzip.tar", &[]);
    let zstd_options = [
        "--dest-compress-format=zstd",
        "--dest-force-compress-format",
    ];
    let has_force = run("skopeo", &["copy", "--help"]).contains(zstd_options[1]);
    let zstd = copy(
        "oci-archive",
        "zstd.tar",
        if has_force { &zstd_options } else { &[] },
    );
    let docker = copy("docker-archive", "docker.tar", &[]);

    let store = Store::new();
    let image = store.load_one(&gzip);
    assert_eq!(image.names, ["example.org/it:1"]);
    let ours = store.tree(&image);
    assert!(ours.len() > 20);
    // All forms have the same layers.
    for (archive, from) in [(&zstd, "zstd"), (&docker, "docker")] {
        let other = store.load_one(archive);
        assert_eq!(other.chain_id, image.chain_id, "{from}");
    }

    let unpacked = file("unpacked");
    let name = format!("{}:it", layout.display());
    run("umoci", &["unpack", "--image", &name, path(&unpacked)]);
    let umoci = tree::of_directory(&unpacked.join("rootfs"));
    let differences = tree::differences(&ours, &umoci, &without_times_of_directories);
    assert!(differences.is_empty(), "umoci:\n{}", differences.join("\n"));

    let theirs = Containerd::start().tree(&file("gzip.tar"), &image);
    let differences = tree::differences(&ours, &theirs, &without_times_of_directories);
    assert!(
        differences.is_empty(),
        "containerd:\n{}",
        differences.join("\n")
    );
}

#[test]
fn layers_with_every_trick_are_what_containerd_unpacks() {
    let store = Store::new();
    let (below, above) = good::tricks();
    let archive = archive(
        "example.org/tricks:1",
        &[Blob::gzip(below), Blob::gzip(above)],
    );
    let image = store.load_one(&archive);
    let file = store.dir.path().join("tricks.tar");
    fs::write(&file, archive).unwrap();
    let theirs = Containerd::start().tree(&file, &image);
    let ours = store.tree(&image);
    let mut differences = tree::differences(&ours, &theirs, &without_times_of_directories);
    // AUFS's own files are left out here; containerd makes the directory that they lie in.
    differences.retain(|difference| !difference.starts_with("only theirs: /.wh..wh.plnk"));
    assert!(differences.is_empty(), "{}", differences.join("\n"));
}
