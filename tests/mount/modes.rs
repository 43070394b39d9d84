//! The same work under every mode and with features masked as on an old kernel: the outcome must be
//! that of a plain directory.

use std::collections::BTreeMap;
use std::fs::{self, File};
use std::io::Write;
use std::os::unix::fs::{FileExt, MetadataExt, PermissionsExt, chown, symlink};
use std::path::{Path, PathBuf};
use std::process::Command;

use nix::fcntl::{AT_FDCWD, FallocateFlags, RenameFlags, fallocate, posix_fallocate, renameat2};
use nix::unistd::{Whence, lseek};

use crate::common::snapshot::xattrs;
use crate::common::{Layers, Mount, errno};

/// What a program sees of a tree; the times that the clock gave are left out.
fn view(root: &Path) -> BTreeMap<PathBuf, String> {
    fn add(root: &Path, dir: &Path, view: &mut BTreeMap<PathBuf, String>) {
        for entry in fs::read_dir(dir).unwrap() {
            let path = entry.unwrap().path();
            let m = fs::symlink_metadata(&path).unwrap();
            let content = if m.is_symlink() {
                format!("{:?}", fs::read_link(&path).unwrap())
            } else if m.is_file() {
                blake3::hash(&fs::read(&path).unwrap()).to_string()
            } else {
                String::new()
            };
            let links = if m.is_dir() { 0 } else { m.nlink() };
            let size = if m.is_dir() { 0 } else { m.size() };
            let old = if m.mtime() < 1_600_000_000 {
                m.mtime()
            } else {
                0
            };
            let facts = format!(
                "{:o} {}:{} links {links} size {size} rdev {} mtime {old} {:?} {content}",
                m.mode(),
                m.uid(),
                m.gid(),
                m.rdev(),
                xattrs(&path)
            );
            view.insert(path.strip_prefix(root).unwrap().to_owned(), facts);
            if m.is_dir() {
                add(root, &path, view);
            }
        }
    }
    let mut all = BTreeMap::new();
    add(root, root, &mut all);
    all
}

/// A tree to start from.
fn fill(dir: &Path) {
    for i in 0..30 {
        Layers::write(&dir.join(format!("etc/conf{i}")), format!("value {i}\n"));
    }
    Layers::write(&dir.join("usr/bin/tool"), [0x7f; 30_000]);
    fs::set_permissions(dir.join("usr/bin/tool"), fs::Permissions::from_mode(0o4755)).unwrap();
    Layers::write(&dir.join("usr/lib/deep/er/lib.so"), [3; 5000]);
    symlink("lib.so", dir.join("usr/lib/deep/er/lib.so.1")).unwrap();
    fs::hard_link(dir.join("etc/conf1"), dir.join("etc/conf1-link")).unwrap();
    fs::create_dir(dir.join("var")).unwrap();
    Layers::write(&dir.join("var/log"), "line\n");
}

/// Work as a package manager and a service do it.
fn work(dir: &Path) {
    let at = |name: &str| dir.join(name);
    for i in 0..30 {
        match i % 5 {
            0 => fs::write(at(&format!("etc/conf{i}")), "changed").unwrap(),
            1 => File::options()
                .append(true)
                .open(at(&format!("etc/conf{i}")))
                .unwrap()
                .write_all(b"appended")
                .unwrap(),
            2 => fs::remove_file(at(&format!("etc/conf{i}"))).unwrap(),
            3 => {
                // Replaced as an editor does it.
                let new = at("etc/.new");
                fs::write(&new, format!("replaced {i}")).unwrap();
                File::open(&new).unwrap().sync_all().unwrap();
                fs::rename(&new, at(&format!("etc/conf{i}"))).unwrap();
            }
            _ => chown(at(&format!("etc/conf{i}")), Some(5), Some(6)).unwrap(),
        }
    }
    fs::rename(at("usr/lib/deep"), at("usr/lib/shallow")).unwrap();
    fs::create_dir(at("usr/lib/deep")).unwrap();
    fs::write(at("usr/lib/deep/new"), "in the place of the old").unwrap();
    fs::write(at("usr/lib/shallow/er/lib.so"), [4; 6000]).unwrap();
    fs::remove_file(at("etc/conf0")).unwrap();
    fs::create_dir(at("etc/conf0")).unwrap();
    fs::write(at("etc/conf1-link"), "through the other name").unwrap();
    fs::set_permissions(at("usr/bin"), fs::Permissions::from_mode(0o711)).unwrap();
    let log = File::options()
        .read(true)
        .write(true)
        .open(at("var/log"))
        .unwrap();
    for i in 0..200u64 {
        log.write_all_at(format!("{i:06}\n").as_bytes(), i * 7)
            .unwrap();
    }
    log.set_len(1000).unwrap();
    let mut map = crate::common::mapping::shared_mut(&log);
    map[999] = b'!';
    drop((map, log));
    let status = Command::new("sh")
        .arg("-ec")
        .arg(
            "cd \"$1\"; mkdir -p tmp/a/b; tar -cf tmp/etc.tar etc usr; mkdir tmp/x; tar -C tmp/x -xf tmp/etc.tar; \
             rm tmp/etc.tar; cp -a usr tmp/copy; rm -rf usr/lib/shallow; touch -d 2001-01-01 tmp/copy/bin/tool; \
             setfattr -n user.note -v kept etc/conf4; umask 027; echo x >tmp/by-umask",
        )
        .arg("sh")
        .arg(dir)
        .status()
        .unwrap();
    assert!(status.success());
}

#[test]
fn every_mode_does_what_a_plain_directory_does() {
    let layers = Layers::new(1);
    fill(&layers.lower(0));
    layers.seal();
    let plain = layers.path("plain");
    fs::create_dir(&plain).unwrap();
    fill(&plain);
    work(&plain);
    let expected = view(&plain);
    for options in [
        "",
        "writeback",
        "no_open",
        "no_open,writeback",
        "passthrough",
        "passthrough,threads=1",
        "passthrough,kernel_features=-atomic_trunc,-no_flush,metacopy=off",
        "threads=1",
        "threads=8",
        "volatile",
        "kernel_features=-all",
        "kernel_features=-readdirplus",
        "kernel_features=-readdirplus_auto",
        "kernel_features=-atomic_trunc,-killpriv_v2",
        "kernel_features=-dont_mask,-posix_acl",
        "kernel_features=-max_pages,-parallel_dirops,-cache_symlinks",
        "kernel_features=-cache_dir,-no_flush,-async_dio,-explicit_inval",
        "kernel_features=7.22",
        "kernel_features=7.22,-all,-fallocate",
    ] {
        let mount = Mount::new(&layers, options);
        work(&mount.join(""));
        let seen = view(&mount.join(""));
        compare(&expected, &seen, &format!("mounted with {options}"));
        mount.unmount();
        let mount = Mount::new(&layers, options);
        let seen = view(&mount.join(""));
        compare(&expected, &seen, &format!("mounted again with {options}"));
        mount.unmount();
        for name in ["upper", "work"] {
            fs::remove_dir_all(layers.path(name)).unwrap();
            fs::create_dir(layers.path(name)).unwrap();
        }
        layers.check();
    }
}

fn compare(expected: &BTreeMap<PathBuf, String>, seen: &BTreeMap<PathBuf, String>, when: &str) {
    for path in expected.keys().chain(seen.keys()) {
        assert_eq!(
            expected.get(path),
            seen.get(path),
            "{}, {when}",
            path.display()
        );
    }
}

/// What programs are told where the kernel has no request for what they want: the answers of a kernel
/// that old, on a file system of its own.
#[test]
fn a_request_that_the_kernel_does_not_have_is_done_without() {
    let layers = Layers::new(1);
    let content = [7; 3 * 65_536];
    Layers::write(&layers.lower(0).join("old"), content);
    Layers::write(&layers.lower(0).join("other"), "other");
    let mount = Mount::new(&layers, "kernel_features=7.22,-fallocate");
    let rename = |from: &str, to: &str, flags| {
        let (from, to) = (mount.join(from), mount.join(to));
        errno(renameat2(AT_FDCWD, &from, AT_FDCWD, &to, flags))
    };
    assert_eq!(
        rename("old", "other", RenameFlags::RENAME_EXCHANGE),
        libc::EINVAL
    );
    assert_eq!(
        rename("old", "new", RenameFlags::RENAME_NOREPLACE),
        libc::EINVAL
    );
    assert_eq!(rename("old", "new", RenameFlags::empty()), 0);
    assert_eq!(fs::read(mount.join("new")).unwrap(), content);

    let file = File::options()
        .read(true)
        .write(true)
        .open(mount.join("new"))
        .unwrap();
    let allocated = fallocate(&file, FallocateFlags::FALLOC_FL_PUNCH_HOLE, 0, 65_536);
    assert_eq!(errno(allocated), libc::EOPNOTSUPP);
    // Grown by the C library, which writes.
    posix_fallocate(&file, 0, 4 * 65_536).unwrap();
    // No holes are known: everything is data, up to the end.
    assert_eq!(lseek(&file, 5, Whence::SeekData), Ok(5));
    assert_eq!(lseek(&file, 5, Whence::SeekHole), Ok(4 * 65_536));

    // std asks for a copy by the kernel, which then reads and writes.
    fs::copy(mount.join("new"), mount.join("copy")).unwrap();
    assert_eq!(
        fs::read(mount.join("copy")).unwrap()[..content.len()],
        content
    );
}

/// A server that the kernel tells nothing about setuid: the kernel takes the bit away itself, by a
/// change of the mode before the write.
#[test]
fn a_write_clears_setuid_also_where_the_kernel_does_so() {
    for options in [
        "kernel_features=7.22",
        "no_open,kernel_features=-killpriv_v2",
    ] {
        let layers = Layers::new(1);
        let below = layers.lower(0).join("tool");
        Layers::write(&below, "tool");
        fs::set_permissions(&below, fs::Permissions::from_mode(0o6777)).unwrap();
        let mount = Mount::new(&layers, options);
        let status = Command::new("setpriv")
            .args(["--reuid=1000", "--regid=1000", "--clear-groups"])
            .args(["sh", "-c", "echo new >>\"$1\"", "sh"])
            .arg(mount.join("tool"))
            .status()
            .unwrap();
        assert!(status.success(), "{options}");
        let mode = fs::metadata(mount.join("tool")).unwrap().mode();
        assert_eq!(mode & 0o7777, 0o777, "{options}");
        mount.unmount();
        let mode = fs::metadata(layers.upper().join("tool")).unwrap().mode();
        assert_eq!(mode & 0o7777, 0o777, "{options}: in the upper");
    }
}
