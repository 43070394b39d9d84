//! Uppers that kernel overlayfs has made are read as it reads them itself. Mounts overlayfs.

use std::os::unix::fs::{MetadataExt, PermissionsExt};

use nix::mount::{MntFlags, umount2};

use super::*;

/// A mount of kernel overlayfs over a fixture's directories. Only this thread has it: in a copy of the namespace, as another test makes
/// one, it would outlive its end, and the next one of the same upper would be refused with EBUSY.
struct Mounted(PathBuf);

impl Mounted {
    fn new(fixture: &Fixture) -> Self {
        Self::try_new(fixture).unwrap()
    }

    fn try_new(fixture: &Fixture) -> nix::Result<Self> {
        let at = fixture.base.path().join("mnt");
        std::fs::create_dir_all(&at).unwrap();
        let lowers: Vec<_> = fixture
            .lowers
            .iter()
            .map(|path| path.to_str().unwrap())
            .collect();
        let options = format!(
            "lowerdir={},upperdir={},workdir={},redirect_dir=on,index=on,metacopy=on",
            lowers.join(":"),
            fixture.upper().display(),
            fixture.base.path().join("work").display()
        );
        mount(
            Some("overlay"),
            &at,
            Some("overlay"),
            MsFlags::empty(),
            Some(options.as_str()),
        )?;
        Ok(Self(at))
    }

    fn path(&self, path: &str) -> PathBuf {
        self.0.join(path)
    }
}

impl Drop for Mounted {
    fn drop(&mut self) {
        umount2(&self.0, MntFlags::MNT_DETACH).ok();
    }
}

/// Path to what a program sees there.
type Seen = BTreeMap<String, String>;

fn seen_by_host(dir: &Path, prefix: &str, out: &mut Seen) {
    for entry in std::fs::read_dir(dir).unwrap() {
        let entry = entry.unwrap();
        let path = format!("{prefix}{}", entry.file_name().to_str().unwrap());
        let stat = entry.metadata().unwrap();
        let content = if stat.is_file() {
            std::fs::read_to_string(entry.path()).unwrap()
        } else {
            String::new()
        };
        let links = if stat.is_dir() { 1 } else { stat.nlink() };
        out.insert(
            path.clone(),
            format!("{:o} {links} {content}", stat.mode() & 0o7777),
        );
        if stat.is_dir() {
            seen_by_host(&entry.path(), &format!("{path}/"), out);
        }
    }
}

fn seen_by_us(fixture: &Fixture, dir: &str, out: &mut Seen) {
    for name in fixture.list(dir) {
        let path = if dir.is_empty() {
            name
        } else {
            format!("{dir}/{name}")
        };
        let attr = fixture.find(&path).unwrap().attr;
        let content = if attr.kind == FileKind::Regular {
            fixture.read(&path)
        } else {
            String::new()
        };
        let links = match attr.kind {
            FileKind::Directory => 1,
            _ => attr.nlink,
        };
        out.insert(path.clone(), format!("{:o} {links} {content}", attr.perm));
        if attr.kind == FileKind::Directory {
            seen_by_us(fixture, &path, out);
        }
    }
}

#[test]
fn an_upper_made_by_us_is_read_by_the_kernel_as_we_read_it() {
    leave_namespace();
    let mut fixture = Fixture::new(2, |lowers| {
        for (n, lower) in lowers.iter().enumerate() {
            for path in ["a/b/c/f", "a/b/g", "d/h", "mode", "old", "gone", "x", "y"] {
                put(lower.join(path), &format!("{path} of {n}\n"));
            }
            put(lower.join(format!("a/only{n}")), "here");
        }
        for name in ["mode2", "d/mode3"] {
            std::fs::hard_link(lowers[1].join("a/only1"), lowers[1].join(name)).unwrap();
        }
    });
    let mode = |fixture: &Fixture, path: &str, perm| {
        let set = SetAttr {
            perm: Some(perm),
            ..SetAttr::default()
        };
        let node = fixture.node(path);
        fixture
            .union()
            .setattr(node, None, &set, &Caller::ROOT)
            .unwrap();
    };
    mode(&fixture, "mode", 0o600);
    mode(&fixture, "a/b/c/f", 0o601);
    fixture.mv("old", "d/moved");
    fixture.mv("d/moved", "d/again");
    mode(&fixture, "mode2", 0o604);
    fixture.mv("a/only1", "a/b/renamed");
    fixture.link("d/h", "linked").unwrap();
    fixture.mv("a/b", "d/b2");
    fixture.mv("d/b2/g", "d/b2/c/g2");
    fixture.rename("x", "y", RenameMode::Exchange).unwrap();
    fixture.unlink("gone").unwrap();
    fixture.mkdir("new").unwrap();
    fixture.mv("d/again", "new/there");
    fixture.reopen();
    let mut expected = Seen::new();
    seen_by_us(&fixture, "", &mut expected);
    fixture.union = None;
    let mut found = Seen::new();
    {
        let mounted = Mounted::new(&fixture);
        seen_by_host(&mounted.0, "", &mut found);
        assert_eq!(found, expected);
        // And the kernel goes on from there.
        std::fs::write(mounted.path("new/there"), "written").unwrap();
        std::fs::rename(mounted.path("linked"), mounted.path("new/linked")).unwrap();
    }
    fixture.reopen();
    assert_eq!(fixture.read("new/there"), "written");
    assert_eq!(fixture.read("new/linked"), "d/h of 0\n");
    assert_eq!(fixture.read("mode"), "mode of 0\n");
}

#[test]
fn the_kernel_refuses_a_file_that_is_copied_up_in_part() {
    leave_namespace();
    let content = "line\n".repeat(20_000);
    let mut fixture = Fixture::new(1, |lowers| put(lowers[0].join("d/f"), &content));
    fixture.union = None;
    let config = UnionConfig {
        chunking: Chunking {
            size: 4096,
            whole_up_to: 0,
        },
        ..fixture.config()
    };
    let union = Union::open(config.clone()).unwrap();
    let clones = &union.upper().unwrap().clones;
    clones.store(false, std::sync::atomic::Ordering::Relaxed);
    fixture.union = Some(union);
    let node = fixture.node("d/f");
    fixture
        .union()
        .write(node, None, 50_000, b"LINE", None)
        .unwrap();
    fixture.union = None;
    let refused = Mounted::try_new(&fixture).err();
    assert_eq!(refused, Some(nix::Error::EINVAL));
    // With another work directory it mounts, and still does not show the file as something else.
    let work = fixture.base.path().join("work");
    let kept = fixture.base.path().join("kept");
    std::fs::rename(&work, &kept).unwrap();
    std::fs::create_dir(&work).unwrap();
    {
        let mounted = Mounted::new(&fixture);
        let read = std::fs::read(mounted.path("d/f"));
        assert_eq!(read.unwrap_err().raw_os_error(), Some(libc::EIO));
    }
    std::fs::remove_dir_all(&work).unwrap();
    std::fs::rename(&kept, &work).unwrap();
    fixture.union = Some(Union::open(config).unwrap());
    fixture.union().complete_partial().unwrap();
    fixture.union = None;
    let mut expected = content;
    expected.replace_range(50_000..50_004, "LINE");
    let mounted = Mounted::new(&fixture);
    assert!(std::fs::read_to_string(mounted.path("d/f")).unwrap() == expected);
}

#[test]
fn an_upper_made_by_the_kernel_is_read_as_the_kernel_reads_it() {
    leave_namespace();
    let mut fixture = Fixture::new(2, |lowers| {
        for (n, lower) in lowers.iter().enumerate() {
            for path in [
                "a/b/c/f",
                "a/b/g",
                "d/e/h",
                "data",
                "moved-data",
                "gone/x",
                "d/own",
            ] {
                put(lower.join(path), &format!("{path} of {n}\n"));
            }
            put(lower.join(format!("a/b/only{n}")), "here");
        }
        for name in ["h2", "d/h3"] {
            std::fs::hard_link(lowers[1].join("data"), lowers[1].join(name)).unwrap();
        }
    });
    fixture.union = None;
    let mut expected = Seen::new();
    {
        let mounted = Mounted::new(&fixture);
        let at = |path: &str| mounted.path(path);
        let mode = |path: &str, mode| {
            std::fs::set_permissions(at(path), std::fs::Permissions::from_mode(mode)).unwrap();
        };
        // Metadata alone is copied up; then the file moves away from its data.
        mode("data", 0o600);
        mode("moved-data", 0o640);
        std::fs::rename(at("moved-data"), at("d/elsewhere")).unwrap();
        mode("h2", 0o604);
        std::fs::rename(at("a/b"), at("d/b2")).unwrap();
        std::fs::rename(at("d/b2/c"), at("d/b2/c2")).unwrap();
        std::fs::rename(at("d"), at("dd")).unwrap();
        std::fs::remove_file(at("gone/x")).unwrap();
        std::fs::remove_dir(at("gone")).unwrap();
        std::fs::create_dir(at("gone")).unwrap();
        std::fs::write(at("gone/new"), "new").unwrap();
        std::fs::remove_file(at("dd/b2/g")).unwrap();
        std::fs::hard_link(at("dd/own"), at("dd/own2")).unwrap();
        // Not marks for the kernel, so not for who comes after it.
        std::fs::write(at("gone/.wh.new"), "").unwrap();
        std::fs::write(at("a/.wh..wh..opq"), "").unwrap();
        seen_by_host(&mounted.0, "", &mut expected);
    }
    fixture.reopen();
    let mut found = Seen::new();
    seen_by_us(&fixture, "", &mut found);
    assert_eq!(found, expected);
    // What has only metadata in the upper gets its data there at the first write.
    for path in ["dd/elsewhere", "data", "h2"] {
        let text = fixture.read(path);
        let node = fixture.node(path);
        fixture.union().write(node, None, 0, b"W", None).unwrap();
        assert_eq!(fixture.read(path), format!("W{}", &text[1..]));
    }
    fixture.check_remount();
}
