//! The command line: what is accepted, what each mistake is told, and with which exit code.

use std::ffi::OsStr;
use std::fs;
use std::os::unix::fs::{MetadataExt, chown, symlink};
use std::path::{Path, PathBuf};

use nix::mount::{MntFlags, MsFlags, mount, umount2};

use crate::common::mode;
use crate::common::mount::{plyfs, unmount};
use crate::common::snapshot::Snapshot;
use crate::common::{Layers, Mount, errno};

/// Exit code 1: the mount could not be made. 2: the command line is wrong.
#[track_caller]
fn refused(options: &str, target: &Path, code: i32, message: &str) {
    let output = plyfs(&[OsStr::new("-o"), OsStr::new(options), target.as_os_str()]);
    let text = String::from_utf8_lossy(&output.stderr);
    assert_eq!(output.status.code(), Some(code), "{options}: {text}");
    assert!(text.contains(message), "{options}: {text}");
    assert_eq!(text.lines().count(), 1, "{text}");
    assert!(
        crate::common::mount::server_of(target).is_none(),
        "a server is left behind"
    );
}

#[test]
fn a_command_line_that_makes_no_sense_is_exit_code_2() {
    let layers = Layers::new(1);
    let lower = layers.lower_options();
    let target = layers.mnt();
    for (more, message) in [
        (
            "frobnicate",
            "unknown option `frobnicate`; `plyfs --help` lists",
        ),
        ("frob=1", "unknown option `frob=1`"),
        ("upperdir=/x", "needs `workdir`"),
        ("workdir=/x", "only with `upperdir`"),
        ("xino=perhaps", "say `on` or `off` or `auto`"),
        ("kernel_features=-nonsense", "plyfs --probe"),
        ("threads=none", "1 to 64"),
        ("passthrough,writeback", "`passthrough` and `writeback`"),
        ("no_open,passthrough", "`passthrough` and `no_open`"),
    ] {
        refused(&format!("{lower},{more}"), &target, 2, message);
    }
    refused("", &target, 2, "no directory to show");
    refused("lowerdir=/a::/b", &target, 2, "empty name");
    let nothing: [&str; 0] = [];
    assert_eq!(plyfs(&nothing).status.code(), Some(2));
}

#[test]
fn directories_that_cannot_be_used_are_exit_code_1() {
    let layers = Layers::new(1);
    let (target, lower) = (layers.mnt(), layers.lower(0));
    let (upper, work) = (layers.upper(), layers.path("work"));
    let (file, missing) = (layers.path("file"), layers.path("missing"));
    fs::write(&file, "").unwrap();
    for dir in [&lower, &upper] {
        fs::create_dir(dir.join("inside")).unwrap();
        fs::write(dir.join("inside/file"), "precious").unwrap();
    }
    let lower_options = layers.lower_options();
    let before = Snapshot::of(&layers.path(""));
    let shown = |path: &Path| path.to_str().unwrap().to_owned();
    let check = |options: String, target: &Path, message: String| {
        refused(&options, target, 1, &message);
        before.assert_same(&layers.path(""));
    };

    for (dir, message) in [
        (&missing, "cannot open the lower directory {}"),
        (&file, "the lower layer {} is not a directory"),
    ] {
        let message = message.replace("{}", &shown(dir));
        check(format!("lowerdir={}", shown(dir)), &target, message);
    }
    let list = format!("lowerdir_file={}", shown(&missing));
    check(list.clone(), &target, format!("cannot read `{list}`"));
    for (target, message) in [
        (&missing, format!("cannot mount on {}", shown(&missing))),
        (&file, format!("cannot mount on {}", shown(&file))),
        (&lower, "would contain itself".to_owned()),
        (&lower.join("inside"), "would contain itself".to_owned()),
    ] {
        check(lower_options.clone(), target, message);
    }
    let both = |upper: &Path, work: &Path| {
        let (upper, work) = (shown(upper), shown(work));
        format!("{lower_options},upperdir={upper},workdir={work}")
    };
    for (upper, work, message) in [
        (&missing, &work, "cannot open the upper directory {upper}"),
        (&upper, &missing, "cannot use the work directory {work}"),
        (&file, &work, "the upper layer {upper} is not a directory"),
        (
            &upper,
            &file,
            "the work directory {work} is not a directory",
        ),
    ] {
        let message = message.replace("{upper}", &shown(upper));
        let message = message.replace("{work}", &shown(work));
        check(both(upper, work), &target, message);
    }
    for (upper, work, one, other) in [
        (&upper, &upper, "upper", "work"),
        (&upper, &upper.join("inside"), "upper", "work"),
        (&upper.join("inside"), &upper, "upper", "work"),
        (&lower, &work, "upper", "lower"),
        (&lower.join("inside"), &work, "upper", "lower"),
        (&upper, &lower.join("inside"), "work", "lower"),
    ] {
        let (a, b) = (
            if one == "work" { work } else { upper },
            if other == "work" { work } else { &lower },
        );
        let message = format!(
            "the {one} directory {} and the {other} directory {} overlap",
            shown(a),
            shown(b)
        );
        check(both(upper, work), &target, message);
    }
}

#[test]
fn upper_and_work_on_two_file_systems_are_refused() {
    let layers = Layers::new(1);
    let other = layers.path("other");
    fs::create_dir(&other).unwrap();
    mount(
        Some("tmpfs"),
        &other,
        Some("tmpfs"),
        MsFlags::empty(),
        None::<&str>,
    )
    .unwrap();
    let options = format!(
        "{},upperdir={},workdir={}",
        layers.lower_options(),
        layers.upper().display(),
        other.display()
    );
    let result = std::panic::catch_unwind(|| refused(&options, &layers.mnt(), 1, "file system"));
    umount2(&other, MntFlags::MNT_DETACH).unwrap();
    result.unwrap();
}

/// Two mounts of one upper were once let in if each had a work directory of its own, and showed different trees.
#[test]
fn an_upper_or_a_work_directory_in_use_is_refused() {
    let layers = Layers::new(1);
    let first = Mount::new(&layers, "");
    let [second, other_upper, other_work] = ["second", "other upper", "other work"].map(|name| {
        let dir = layers.path(name);
        fs::create_dir(&dir).unwrap();
        dir
    });
    let (upper, work) = (layers.upper(), layers.path("work"));
    for (upper, work, what, whose) in [
        (&upper, &work, "work", &work),
        (&other_upper, &work, "work", &work),
        (&upper, &other_work, "upper", &upper),
    ] {
        let lower = layers.lower_options();
        let [shown_upper, shown_work] = [upper, work].map(|path| path.display());
        let options = format!("{lower},upperdir={shown_upper},workdir={shown_work}");
        let message = format!(
            "the {what} directory {} is in use by another mount",
            whose.display()
        );
        refused(&options, &second, 1, &message);
    }
    fs::write(first.join("still"), "works").unwrap();
    first.unmount();
    Mount::with_options(&second, &layers.options()).unmount();
}

#[test]
fn five_hundred_lowers_come_from_a_file() {
    let layers = Layers::new(500);
    for n in 0..500 {
        fs::write(layers.lower(n).join(format!("only-{n}")), "").unwrap();
        fs::write(layers.lower(n).join("shared"), n.to_string()).unwrap();
    }
    layers.seal();
    let list: Vec<String> = (0..500)
        .map(|n| format!("{}\n", layers.lower(n).display()))
        .collect();
    let file = layers.path("list");
    fs::write(&file, list.concat()).unwrap();
    let options = format!(
        "lowerdir_file={},upperdir={},workdir={}",
        file.display(),
        layers.upper().display(),
        layers.path("work").display()
    );
    let mount = Mount::with_options(&layers.mnt(), &options);
    assert_eq!(fs::read_dir(mount.join("")).unwrap().count(), 501);
    assert_eq!(fs::read(mount.join("shared")).unwrap(), b"0");
    fs::write(mount.join("only-499"), "written").unwrap();
    assert_eq!(
        fs::read(layers.upper().join("only-499")).unwrap(),
        b"written"
    );
}

#[test]
fn odd_names_of_layers_are_escaped() {
    let layers = Layers::new(1);
    let odd = |name: &str| {
        let dir = layers.path(name);
        fs::create_dir(&dir).unwrap();
        dir
    };
    let dirs = [odd("a:b"), odd("c,d"), odd(r"e\f"), odd("g h")];
    for (n, dir) in dirs.iter().enumerate() {
        fs::write(dir.join(format!("f{n}")), "").unwrap();
    }
    let base = layers.path("");
    let base = base.to_str().unwrap();
    let options = format!(
        r"lowerdir={base}/a\:b:{base}/c\,d:{base}/e\\f,upperdir={base}/g h,workdir={base}/work"
    );
    let mount = Mount::with_options(&layers.mnt(), &options);
    assert_eq!(fs::read_dir(mount.join("")).unwrap().count(), 4);
}

#[test]
fn relative_layers_are_found_and_the_callers_directory_stays_free() {
    let layers = Layers::new(1);
    fs::write(layers.lower(0).join("f"), "x").unwrap();
    layers.seal();
    let status = mode::plyfs()
        .current_dir(layers.path(""))
        .args(["-o", "lowerdir=lower0,upperdir=upper", "-o", "workdir=work"])
        .arg("mnt")
        .status()
        .unwrap();
    assert!(status.success());
    assert_eq!(fs::read(layers.mnt().join("f")).unwrap(), b"x");
    unmount(&layers.mnt());
}

#[test]
fn a_mount_without_an_upper_is_read_only() {
    let layers = Layers::new(1);
    fs::write(layers.lower(0).join("f"), "x").unwrap();
    layers.seal();
    for options in [
        layers.lower_options(),
        format!("{},ro", layers.options()),
        format!(
            "{},upperdir={},ro",
            layers.lower_options(),
            layers.upper().display()
        ),
    ] {
        let mount = Mount::with_options(&layers.mnt(), &options);
        assert_eq!(fs::read(mount.join("f")).unwrap(), b"x");
        assert_eq!(errno(fs::write(mount.join("f"), "y")), libc::EROFS);
        assert_eq!(errno(fs::create_dir(mount.join("d"))), libc::EROFS);
        assert_eq!(errno(fs::remove_file(mount.join("f"))), libc::EROFS);
        mount.unmount();
    }
}

/// The line of the mount table for this mount point.
fn table_line(target: &Path) -> String {
    let table = fs::read_to_string("/proc/self/mountinfo").unwrap();
    let needle = format!(" {} ", target.display());
    table
        .lines()
        .find(|line| line.contains(&needle))
        .unwrap()
        .to_owned()
}

#[test]
fn the_mount_table_shows_what_was_asked_for() {
    let layers = Layers::new(1);
    let mount = Mount::new(&layers, "");
    let line = table_line(&layers.mnt());
    assert!(line.contains("fuse.plyfs plyfs"), "{line}");
    assert!(
        !line.contains("nosuid") && !line.contains("nodev"),
        "{line}"
    );
    assert!(
        line.contains("allow_other") && line.contains("default_permissions"),
        "{line}"
    );
    mount.unmount();
    let mount = Mount::new(&layers, "nosuid,nodev,noexec,noatime,fsname=mine");
    let line = table_line(&layers.mnt());
    for word in ["nosuid", "nodev", "noexec", "noatime", " mine "] {
        assert!(line.contains(word), "{word}: {line}");
    }
    mount.unmount();
    // As mount.fuse calls it.
    let output = plyfs(&[
        "the-source",
        layers.mnt().to_str().unwrap(),
        "-o",
        &layers.options(),
        "-o",
        "dev,suid",
    ]);
    assert!(output.status.success(), "{output:?}");
    let line = table_line(&layers.mnt());
    unmount(&layers.mnt());
    assert!(line.contains(" the-source "), "{line}");
}

#[test]
fn everything_belongs_to_root_when_squashed() {
    let layers = Layers::new(1);
    fs::write(layers.lower(0).join("f"), "x").unwrap();
    chown(layers.lower(0).join("f"), Some(1000), Some(1001)).unwrap();
    layers.seal();
    let mount = Mount::new(&layers, "squash_to_root");
    let m = fs::metadata(mount.join("f")).unwrap();
    assert_eq!((m.uid(), m.gid()), (0, 0));
}

#[test]
fn words_without_a_meaning_here_are_taken() {
    let layers = Layers::new(1);
    let words = "redirect_dir=on,metacopy=on,index=on,xino=auto,volatile,,noatime,x-gvfs-hide,_netdev,relatime,threads=1";
    let mount = Mount::new(&layers, words);
    fs::write(mount.join("f"), "x").unwrap();
    mount.unmount();
    assert_eq!(fs::read(layers.upper().join("f")).unwrap(), b"x");
}

/// `xino` was shown as a choice and read nowhere.
#[test]
fn inode_numbers_are_what_they_are_whatever_xino_says() {
    let layers = Layers::new(2);
    for n in 0..2 {
        fs::write(layers.lower(n).join(format!("f{n}")), "x").unwrap();
    }
    layers.seal();
    let numbers = ["on", "off", "auto"].map(|xino| {
        let mount = Mount::new(&layers, &format!("xino={xino}"));
        let numbers = ["", "f0", "f1"].map(|name| fs::metadata(mount.join(name)).unwrap().ino());
        mount.unmount();
        numbers
    });
    assert_eq!(numbers[0], numbers[1]);
    assert_eq!(numbers[0], numbers[2]);
    let help = plyfs(&["--help"]);
    let help = String::from_utf8(help.stdout).unwrap();
    let (choices, without_effect) = help.split_once("without effect").unwrap();
    assert!(
        !choices.contains("xino") && without_effect.contains("xino="),
        "{help}"
    );
}

#[test]
fn layers_behind_links_are_found() {
    let layers = Layers::new(1);
    fs::write(layers.lower(0).join("f"), "x").unwrap();
    layers.seal();
    symlink(layers.lower(0), layers.path("link")).unwrap();
    let options = format!("lowerdir={}", layers.path("link").display());
    let mount = Mount::with_options(&layers.mnt(), &options);
    assert_eq!(fs::read(mount.join("f")).unwrap(), b"x");
}

#[test]
fn the_probe_names_every_feature_and_says_why_not() {
    let output = plyfs(&["--probe"]);
    assert!(output.status.success());
    let table = String::from_utf8(output.stdout).unwrap();
    for name in [
        "readdirplus",
        "writeback",
        "no_open",
        "passthrough",
        "resend",
    ] {
        assert!(table.contains(name), "{table}");
    }
    let rows: Vec<Vec<&str>> = table
        .lines()
        .skip_while(|line| !line.starts_with("feature "))
        .skip(1)
        .map(|line| line.split_whitespace().collect())
        .collect();
    for words in &rows {
        assert!(words[3] == "yes" || words.len() > 4, "{words:?}");
    }
    let output = plyfs(&["--probe", "--json"]);
    assert!(output.status.success());
    let probe: serde_json::Value = serde_json::from_slice(&output.stdout).unwrap();
    assert!(probe["abi"].as_str().unwrap().starts_with("7."));
    let features = probe["features"].as_array().unwrap();
    assert_eq!(features.len(), rows.len());
    for (feature, row) in features.iter().zip(rows) {
        assert_eq!(feature["name"], row[0]);
        assert_eq!(feature["since"], row[1]);
        assert_eq!(feature["in_use"].as_bool().unwrap(), row[3] == "yes");
        assert_eq!(feature["reason"].is_null(), row[3] == "yes", "{feature}");
    }
}

/// A mount by the kernel alone.
struct Kernel(PathBuf);

impl Kernel {
    fn overlay(target: &Path, options: &str) -> Self {
        let kind = Some("overlay");
        mount(kind, target, kind, MsFlags::empty(), Some(options)).unwrap();
        Self(target.to_owned())
    }

    fn bind(source: &Path, target: &Path) -> Self {
        let none: Option<&str> = None;
        mount(Some(source), target, none, MsFlags::MS_BIND, none).unwrap();
        Self(target.to_owned())
    }
}

impl Drop for Kernel {
    fn drop(&mut self) {
        let _ = umount2(&self.0, MntFlags::MNT_DETACH);
    }
}

/// Kernel overlayfs marks what it has never synced, and no later version may use what a feature has changed that it
/// does not know.
#[test]
fn marks_of_others_in_the_work_directory_are_honoured() {
    let layers = Layers::new(1);
    let (options, target) = (layers.options(), layers.mnt());
    let volatile = format!("{options},volatile");
    let kernel = Kernel::overlay(&target, &volatile);
    fs::write(target.join("new"), "never synced").unwrap();
    drop(kernel);
    let mark = layers.path("work/work/incompat/volatile");
    for _ in 0..2 {
        refused(&options, &target, 1, "by kernel overlayfs with `volatile`");
        assert!(mark.join("dirty").exists());
        let mount = Mount::new(&layers, "volatile");
        let read = fs::read(mount.join("new")).unwrap();
        assert_eq!(read, b"never synced");
        mount.unmount();
        assert!(mark.join("dirty").exists());
    }
    fs::remove_dir_all(&mark).unwrap();
    // What is said of plyfs's own: podman mounts so, and again after a crash.
    Mount::new(&layers, "volatile").unmount();
    Mount::new(&layers, "").unmount();

    let inside = layers.path("work/work/incompat/unheard-of/inside");
    fs::create_dir_all(&inside).unwrap();
    for options in [&options, &volatile] {
        refused(options, &target, 1, "needs the feature `unheard-of`");
        assert!(inside.exists());
    }
}

#[test]
fn what_kernel_overlayfs_writes_to_is_in_use() {
    let layers = Layers::new(1);
    for name in ["kernel", "upper2", "work2", "bound", "a space"] {
        fs::create_dir(layers.path(name)).unwrap();
    }
    let shown = |name: &str| layers.path(name).to_str().unwrap().to_owned();
    let _bound = Kernel::bind(&layers.upper(), &layers.path("bound"));
    let options = |upper: &str, work: &str| {
        let lower = layers.lower_options();
        format!("{lower},upperdir={},workdir={}", shown(upper), shown(work))
    };
    for (theirs, ours, used) in [
        (("upper", "work"), ("upper", "work"), "upper"),
        (("upper", "work"), ("upper", "work2"), "upper"),
        (("upper", "work"), ("bound", "work2"), "bound"),
        (("upper", "work"), ("upper2", "work"), "work"),
        (("a space", "work"), ("a space", "work2"), "a space"),
    ] {
        let kernel = Kernel::overlay(&layers.path("kernel"), &options(theirs.0, theirs.1));
        let scratch = layers.path("work/work/in-use");
        fs::write(&scratch, "").unwrap();
        let message = format!("directory {} is in use by another", shown(used));
        refused(&options(ours.0, ours.1), &layers.mnt(), 1, &message);
        assert!(scratch.exists());
        drop(kernel);
    }
    Mount::new(&layers, "").unmount();
}
