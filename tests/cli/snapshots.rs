//! `snapctl snapshot`.

use std::collections::BTreeMap;
use std::fs;
use std::os::unix::fs::{FileExt, MetadataExt, PermissionsExt};
use std::path::Path;
use std::process::Command;

use plywood::grpc::pb::containerd::services::snapshots::v1::PrepareSnapshotRequest;
use plywood::grpc::pb::containerd::services::snapshots::v1::snapshots_client::SnapshotsClient;

use crate::common::{BUSYBOX, Plyd, mounts_below, unmount};
use crate::stdio::OnTerminal;

#[test]
fn a_snapshot_from_prepare_to_removal() {
    let plyd = Plyd::start();
    assert_eq!(plyd.ok(["snapshot", "prepare", "work"]), "work\n");
    let info = plyd.json(["snapshot", "info", "work", "--json"]);
    assert_eq!(info["key"], "work");
    assert_eq!(info["kind"], "active");
    assert_eq!(info["owner"], "snapctl");
    assert_eq!(info["parent"], serde_json::Value::Null);

    let mnt = plyd.dir().join("mnt");
    fs::create_dir(&mnt).unwrap();
    let dir = mnt.to_str().unwrap();
    plyd.ok(["mount", "work", dir]);
    fs::create_dir(mnt.join("etc")).unwrap();
    fs::write(mnt.join("etc/hosts"), "localhost\n").unwrap();
    let refused = plyd.snapctl(["snapshot", "rm", "work"]);
    assert_eq!(refused.code, 1);
    let cure = format!("snapctl umount {dir}");
    assert!(refused.stderr.contains(&cure), "{}", refused.stderr);
    plyd.umount(dir);
    assert_eq!(fs::read_dir(&mnt).unwrap().count(), 0);

    let committed = plyd.ok([
        "snapshot",
        "commit",
        "work",
        "base",
        "--label",
        "purpose=test",
    ]);
    assert_eq!(committed, "base\n");
    let base = plyd.json(["snapshot", "info", "base", "--json"]);
    assert_eq!(base["labels"]["purpose"], "test");
    assert_eq!(plyd.snapctl(["snapshot", "info", "work"]).code, 1);

    let prepared = plyd.json(["snapshot", "prepare", "next", "base", "--json"]);
    assert_eq!(prepared["parent"], "base");
    plyd.ok(["mount", "next", dir]);
    assert_eq!(
        fs::read_to_string(mnt.join("etc/hosts")).unwrap(),
        "localhost\n"
    );
    fs::write(mnt.join("etc/hosts"), "changed\n").unwrap();
    fs::write(mnt.join("new file"), "x").unwrap();
    fs::create_dir(mnt.join("etc/gone")).unwrap();
    fs::remove_dir(mnt.join("etc/gone")).unwrap();
    let diff = plyd.ok(["snapshot", "diff", "next"]);
    assert!(
        diff.contains("M /etc/hosts\n") && diff.contains("A /new file\n"),
        "{diff}"
    );
    let quiet = plyd.ok(["snapshot", "diff", "-q", "next"]);
    assert!(quiet.lines().any(|line| line == "/new file"), "{quiet}");
    let json = plyd.json(["snapshot", "diff", "--json", "next"]);
    let added = serde_json::json!({"change": "added", "path": "/new file"});
    assert!(json.as_array().unwrap().contains(&added), "{json}");
    plyd.umount(dir);

    let usage = plyd.json(["snapshot", "usage", "--json", "next"]);
    assert!(
        usage["size"].as_u64() > Some(0) && usage["inodes"].as_u64() > Some(1),
        "{usage}"
    );

    for (children, words) in [(1, "another one builds on it"), (2, "2 others build on it")] {
        if children == 2 {
            plyd.ok(["snapshot", "view", "look", "base"]);
        }
        let busy = plyd.snapctl(["snapshot", "rm", "base"]);
        assert_eq!(busy.code, 1);
        assert!(
            busy.stderr.contains("\"base\"") && busy.stderr.contains(words),
            "{}",
            busy.stderr
        );
    }
    plyd.ok(["snapshot", "rm", "look"]);
    assert_eq!(plyd.ok(["snapshot", "rm", "next", "base"]), "next\nbase\n");
    assert_eq!(
        plyd.json(["snapshot", "ls", "--json"]),
        serde_json::json!([])
    );
    assert_eq!(mounts_below(plyd.dir()), Vec::<std::path::PathBuf>::new());
}

#[test]
fn a_commit_in_the_order_of_ctr_is_told_ours() {
    let plyd = Plyd::start();
    plyd.ok(["snapshot", "prepare", "work"]);
    let swapped = plyd.snapctl(["snapshot", "commit", "layer", "work"]);
    assert_eq!((swapped.code, swapped.stdout.as_str()), (1, ""));
    assert!(
        swapped
            .stderr
            .contains("`snapctl snapshot commit work layer`"),
        "{}",
        swapped.stderr
    );
    let neither = plyd.snapctl(["snapshot", "commit", "nope", "layer"]);
    assert_eq!(neither.code, 1);
    assert!(
        neither.stderr.contains("there is no snapshot \"nope\""),
        "{}",
        neither.stderr
    );
    let help = plyd.ok(["snapshot", "commit", "--help"]);
    assert!(help.contains("ctr snapshots commit"), "{help}");
    plyd.ok(["snapshot", "commit", "work", "layer"]);
}

#[test]
fn digests_are_cut_on_a_terminal_alone() {
    let plyd = Plyd::start();
    plyd.load_busybox();
    let keys = plyd.ok(["snapshot", "ls", "-q"]);
    let key = keys.lines().find(|key| key.starts_with("sha256:")).unwrap();
    assert_eq!(key.len(), "sha256:".len() + 64);
    for list in ["ls", "tree"] {
        let piped = plyd.ok(["snapshot", list]);
        assert!(piped.contains(key) && !piped.contains("..."), "{piped}");
        let cut = format!("{}... ", &key[.."sha256:".len() + 12]);
        OnTerminal::new(&plyd, &["snapshot", list]).expect(&cut);
        OnTerminal::new(&plyd, &["snapshot", list, "--no-trunc"]).expect(key);
    }
    OnTerminal::new(&plyd, &["snapshot", "ls", "--json"]).expect(key);
    OnTerminal::new(&plyd, &["snapshot", "ls", "--quiet"]).expect(key);
}

#[test]
fn lists_are_tables_names_or_json() {
    let plyd = Plyd::start();
    plyd.ok(["snapshot", "prepare", "one"]);
    plyd.ok(["snapshot", "commit", "one", "base"]);
    plyd.ok(["snapshot", "prepare", "two", "base"]);
    plyd.ok(["snapshot", "view", "three", "base"]);

    let table = plyd.ok(["snapshot", "ls"]);
    let lines: Vec<Vec<&str>> = table
        .lines()
        .map(|l| l.split_whitespace().collect())
        .collect();
    assert_eq!(
        lines[0],
        ["KEY", "OWNER", "KIND", "PARENT", "CREATED", "MOUNTED"]
    );
    assert_eq!(lines.len(), 4);
    assert!(
        lines
            .iter()
            .any(|line| line[..4] == ["two", "snapctl", "active", "base"]),
        "{table}"
    );
    assert!(!table.contains('|') && !table.lines().any(|line| line.ends_with(' ')));

    let mut names: Vec<String> = plyd
        .ok(["snapshot", "ls", "-q"])
        .lines()
        .map(Into::into)
        .collect();
    names.sort();
    assert_eq!(names, ["base", "three", "two"]);

    let json = plyd.json(["snapshot", "ls", "--json"]);
    let view = json
        .as_array()
        .unwrap()
        .iter()
        .find(|s| s["key"] == "three")
        .unwrap();
    let mut fields: Vec<&str> = view
        .as_object()
        .unwrap()
        .keys()
        .map(String::as_str)
        .collect();
    fields.sort_unstable();
    let documented = [
        "created",
        "damaged_contents",
        "damaged_view",
        "id",
        "key",
        "kind",
        "labels",
        "layer_dirs",
        "mountpoint",
        "owner",
        "packed_layers",
        "parent",
        "plyfs_pid",
        "updated",
        "upper_dir",
    ];
    assert_eq!(fields, documented);
    assert_eq!(view["kind"], "view");

    assert_eq!(
        plyd.ok(["snapshot", "tree"]),
        "base (snapctl committed)\n|-- two (snapctl active, mounted)\n`-- three (snapctl view, mounted)\n"
    );
    assert_eq!(plyd.ok(["snapshot", "tree", "-q"]), "base\ntwo\nthree\n");
    let tree = plyd.json(["snapshot", "tree", "--json"]);
    assert_eq!(tree[0]["children"][1]["key"], "three");
    assert_eq!(
        plyd.ok(["snapshot", "ls", "-q", "--owner", "containerd"]),
        ""
    );
}

#[test]
fn mounts_says_what_to_mount() {
    let plyd = Plyd::start();
    plyd.ok(["snapshot", "prepare", "work"]);
    let mounts = plyd.json(["snapshot", "mounts", "--json", "work"]);
    assert_eq!(mounts.as_array().unwrap().len(), 1);
    assert_eq!(mounts[0]["type"], "bind");
    let source = plyd.ok(["snapshot", "mounts", "-q", "work"]);
    assert_eq!(mounts[0]["source"], source.trim_end());
    let info = plyd.json(["snapshot", "info", "--json", "work"]);
    assert_eq!(info["mountpoint"], mounts[0]["source"]);
    assert!(info["plyfs_pid"].as_u64() > Some(1), "{info}");
}

/// Makes a snapshot as containerd does.
fn prepare_as_containerd(plyd: &Plyd, key: &str) {
    let runtime = tokio::runtime::Runtime::new().unwrap();
    runtime.block_on(async {
        let endpoint = tonic::transport::Endpoint::try_from(plyd.address()).unwrap();
        let mut client = SnapshotsClient::new(endpoint.connect().await.unwrap());
        let mut request = tonic::Request::new(PrepareSnapshotRequest {
            key: key.to_owned(),
            ..PrepareSnapshotRequest::default()
        });
        let namespace = "default".parse().unwrap();
        request
            .metadata_mut()
            .insert("containerd-namespace", namespace);
        client.prepare(request).await.unwrap();
    });
}

#[test]
fn a_snapshot_that_is_called_by_another_name_is_told_its_own() {
    let plyd = Plyd::start();
    plyd.load_busybox();
    let id = plyd.ok(["create", "--name", "web", BUSYBOX, "true"]);
    let id = id.trim_end();
    let image = plyd.json(["image", "inspect", BUSYBOX])[0]["chain_id"].clone();
    let image = image.as_str().unwrap();
    prepare_as_containerd(&plyd, "default/12/theirs");
    plyd.ok(["snapshot", "prepare", "work"]);
    plyd.ok(["snapshot", "commit", "work", "base"]);
    let refused = |args: &[&str], words: &[&str]| {
        let done = plyd.snapctl(args);
        assert_eq!((done.code, done.stdout.as_str()), (1, ""), "{args:?}");
        assert_eq!(done.stderr.lines().count(), 1, "{}", done.stderr);
        for word in words {
            assert!(done.stderr.contains(word), "{args:?}: {}", done.stderr);
        }
    };
    for command in ["info", "usage", "diff", "materialize"] {
        for name in ["web", &id[..8]] {
            let words = [format!("has the key {id} and --owner container")];
            refused(&["snapshot", command, name], &[&words[0]]);
        }
        let words = format!("has the key {image} and --owner image");
        refused(&["snapshot", command, BUSYBOX], &[&words]);
        refused(
            &["snapshot", command, BUSYBOX, "--owner", "image"],
            &[&words],
        );
    }
    plyd.ok(["snapshot", "usage", id, "--owner", "container"]);
    plyd.ok(["snapshot", "usage", image, "--owner", "image"]);

    for (key, words) in [
        ("base", "`snapctl snapshot view NEW base`"),
        (image, &format!("`snapctl snapshot view NEW {image}`")),
        (BUSYBOX, &format!("`snapctl snapshot view NEW {BUSYBOX}`")),
        (id, "belongs to the container web"),
        ("web", "has the key"),
        ("default/12/theirs", "belongs to containerd"),
    ] {
        refused(&["mount", key, "/mnt"], &[words]);
        refused(&["snapshot", "mounts", key], &[words]);
    }
    for (key, words) in [
        (image, "`snapctl image rm`"),
        (id, "`snapctl rm web`"),
        (
            "default/12/theirs",
            "`ctr -n default snapshots --snapshotter plywood rm theirs`",
        ),
    ] {
        refused(&["snapshot", "rm", key], &[words]);
    }
    let prepare = format!("`snapctl snapshot prepare NEW {image}`");
    let changed = format!("`snapctl snapshot diff {id}`");
    let of_container = ["belongs to the container web", &*changed];
    for (key, words) in [
        (id, &of_container[..]),
        ("web", &of_container),
        (image, &["belongs to an image", &*prepare]),
        (BUSYBOX, &["there is no snapshot", "--owner image"]),
        (
            "default/12/theirs",
            &["`ctr -n default snapshots --snapshotter plywood commit NEW theirs`"],
        ),
    ] {
        refused(&["snapshot", "commit", key, "new"], words);
    }
}

#[test]
fn bad_requests_are_told_in_one_sentence() {
    let plyd = Plyd::start();
    plyd.ok(["snapshot", "prepare", "work"]);
    for (args, code) in [
        (&["snapshot", "info", "nope"][..], 1),
        (&["snapshot", "prepare", "work"], 1),
        (&["snapshot", "prepare", "x", "no-parent"], 1),
        (&["snapshot", "prepare", "x", "work"], 1),
        (&["snapshot", "commit", "nope", "x"], 1),
        (&["snapshot", "mounts", "nope"], 1),
        (&["snapshot", "diff", "nope"], 1),
        (&["snapshot", "usage", "nope"], 1),
        (&["snapshot", "export-overlay", "nope", "/nowhere/x"], 1),
        (&["snapshot", "materialize", "nope"], 1),
        (&["mount", "nope", "/mnt"], 1),
    ] {
        let done = plyd.snapctl(args);
        assert_eq!(
            (done.code, done.stdout.as_str()),
            (code, ""),
            "{args:?}: {}",
            done.stderr
        );
        assert_eq!(done.stderr.lines().count(), 1, "{}", done.stderr);
        assert!(done.stderr.starts_with("snapctl: "), "{}", done.stderr);
    }
    // One bad target of several: the others are done.
    plyd.ok(["snapshot", "prepare", "other"]);
    let done = plyd.snapctl(["snapshot", "rm", "nope", "other"]);
    assert_eq!((done.code, done.stdout.as_str()), (1, "other\n"));
}

/// Path to type, mode, owner, links and content of all that is below.
fn seen(dir: &Path) -> BTreeMap<String, String> {
    let listed = Command::new("find")
        .args([
            ".",
            "!",
            "-type",
            "d",
            "-printf",
            "%p %y %m %U:%G %n %s %l\\0",
        ])
        .args(["-o", "-printf", "%p %y %m %U:%G\\0"])
        .current_dir(dir)
        .output()
        .unwrap();
    assert!(listed.status.success(), "{listed:?}");
    let text = String::from_utf8(listed.stdout).unwrap();
    text.split_terminator('\0')
        .map(|line| {
            let (path, rest) = line.split_once(' ').unwrap();
            let at = dir.join(path);
            let content = match at.symlink_metadata().unwrap().is_file() {
                true => String::from_utf8_lossy(&fs::read(at).unwrap()).into_owned(),
                false => String::new(),
            };
            (path.to_owned(), format!("{rest} {content:?}"))
        })
        .collect()
}

/// Writes into the middle of a file.
fn change(path: &Path, at: u64, data: &[u8]) {
    let file = fs::File::options().write(true).open(path).unwrap();
    file.write_all_at(data, at).unwrap();
}

#[test]
fn a_file_that_is_copied_up_in_part_is_made_whole_when_asked_and_not_by_who_looks() {
    let plyd = Plyd::start();
    let mnt = plyd.dir().join("mnt");
    fs::create_dir(&mnt).unwrap();
    let dir = mnt.to_str().unwrap();
    let mut content = vec![b'x'; 3 << 20];
    plyd.ok(["snapshot", "prepare", "first"]);
    plyd.ok(["mount", "first", dir]);
    fs::write(mnt.join("large"), &content).unwrap();
    plyd.umount(dir);
    plyd.ok(["snapshot", "commit", "first", "base"]);
    for (key, mounted, ask) in [
        ("mounted", true, "materialize"),
        ("unmounted", false, "materialize"),
        ("compared", true, "diff"),
    ] {
        plyd.ok(["snapshot", "prepare", key, "base"]);
        plyd.ok(["mount", key, dir]);
        change(&mnt.join("large"), 2 << 20, b"changed");
        content[2 << 20..][..7].copy_from_slice(b"changed");
        let upper = plyd.json(["snapshot", "info", "--json", key])["upper_dir"].clone();
        let upper = Path::new(upper.as_str().unwrap()).join("large");
        assert!(upper.metadata().unwrap().blocks() < 1000, "{key}");
        if !mounted {
            plyd.umount(dir);
        }
        let told = plyd.ok(["snapshot", ask, key]);
        match ask {
            "diff" => {
                assert!(told.contains("/large"), "{told}");
                assert!(upper.metadata().unwrap().blocks() < 1000);
            }
            _ => assert!(fs::read(&upper).unwrap() == content, "{key}"),
        }
        if mounted {
            assert!(fs::read(mnt.join("large")).unwrap() == content);
            plyd.umount(dir);
        }
    }
    // What is not written to has nothing missing.
    plyd.ok(["snapshot", "materialize", "base"]);
}

#[test]
fn kernel_overlayfs_mounts_what_is_exported_to_the_same_tree() {
    let plyd = Plyd::start();
    let at = |name: &str| plyd.dir().join(name);
    let mnt = at("mnt");
    fs::create_dir(&mnt).unwrap();
    let dir = mnt.to_str().unwrap();
    let write = |name: &str, text: &str| {
        let path = mnt.join(name);
        fs::create_dir_all(path.parent().unwrap()).unwrap();
        fs::write(path, text).unwrap();
    };
    plyd.ok(["snapshot", "prepare", "first"]);
    plyd.ok(["mount", "first", dir]);
    for name in [
        "gone",
        "a/b/deep",
        "whole/below",
        "one",
        "mode",
        "name:with,signs\\",
    ] {
        write(name, name);
    }
    write("large", &"large\n".repeat(500_000));
    fs::hard_link(mnt.join("one"), mnt.join("two")).unwrap();
    fs::hard_link(mnt.join("one"), mnt.join("a/three")).unwrap();
    std::os::unix::fs::symlink("one", mnt.join("link")).unwrap();
    plyd.umount(dir);
    plyd.ok(["snapshot", "commit", "first", "base"]);

    plyd.ok(["snapshot", "prepare", "second", "base"]);
    plyd.ok(["mount", "second", dir]);
    fs::remove_file(mnt.join("gone")).unwrap();
    fs::rename(mnt.join("a"), mnt.join("moved")).unwrap();
    plyd.umount(dir);
    plyd.ok(["snapshot", "commit", "second", "middle"]);

    plyd.ok(["snapshot", "prepare", "work", "middle"]);
    plyd.ok(["mount", "work", dir]);
    fs::rename(mnt.join("moved/b"), mnt.join("b2")).unwrap();
    fs::remove_dir_all(mnt.join("whole")).unwrap();
    write("whole/new", "new");
    write("two", "by its second name");
    // Copied up in part only.
    change(&mnt.join("large"), 1_000_000, b"changed");
    fs::set_permissions(mnt.join("mode"), fs::Permissions::from_mode(0o4750)).unwrap();
    let active = seen(&mnt);
    plyd.umount(dir);
    plyd.ok(["snapshot", "view", "look", "middle"]);
    plyd.ok(["mount", "look", dir]);
    let view = seen(&mnt);
    plyd.umount(dir);

    for (key, expected) in [("work", &active), ("look", &view), ("middle", &view)] {
        let to = at(&format!("exported:{key},here"));
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
        let again = plyd.snapctl(["snapshot", "export-overlay", key, to.to_str().unwrap()]);
        assert_eq!(again.code, 1);
        assert!(again.stderr.contains("exists already"), "{}", again.stderr);
    }
}

/// The layers of an image that went before a snapshot on it once stayed until plyd started again.
#[test]
fn the_layers_of_an_image_go_with_the_last_snapshot_on_them() {
    let plyd = Plyd::start();
    plyd.load_busybox();
    plyd.ok(["snapshot", "prepare", "work", BUSYBOX]);
    plyd.ok(["image", "rm", BUSYBOX]);
    assert_eq!(plyd.ok(["snapshot", "ls", "-q"]).lines().count(), 3);
    plyd.ok(["snapshot", "rm", "work"]);
    assert_eq!(plyd.ok(["snapshot", "ls", "-q"]), "");
    assert_eq!(plyd.ok(["layer", "ls", "-q"]), "");
}
