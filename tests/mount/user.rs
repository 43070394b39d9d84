//! Mounts by a user who is not root, with the help of `fusermount3`.
//!
//! Each test is in a mount namespace of its own, where /dev/fuse may be opened by everyone, as udev has it, and
//! /etc/fuse.conf says what the test wants.

use std::fs;
use std::os::unix::fs::{MetadataExt, PermissionsExt, chown};
use std::path::{Path, PathBuf};
use std::process::{Command, Output};

use nix::mount::{MntFlags, MsFlags, mount, umount2};
use nix::sched::{CloneFlags, unshare};
use nix::sys::stat::{Mode, SFlag, makedev, mknod};

use crate::common::Layers;
use crate::common::mount::{PLYFS, wait_until};

/// Debian's `nobody` and `nogroup`: fusermount3 refuses who has no name.
const NOBODY: u32 = 65534;
/// Another user.
const DAEMON: u32 = 1;

/// What one user has: the layers are his, with a file and a directory in the lower one.
struct Home {
    layers: Layers,
    tmpfs: PathBuf,
}

/// Runs a test in a mount namespace that is gone at its end, and with it every mount.
fn in_a_home(test: impl FnOnce(&Home) + Send) {
    std::thread::scope(|scope| {
        let thread = scope.spawn(|| {
            unshare(CloneFlags::CLONE_NEWNS | CloneFlags::CLONE_FS).unwrap();
            let none: Option<&str> = None;
            mount(none, "/", none, MsFlags::MS_REC | MsFlags::MS_PRIVATE, none).unwrap();
            let home = Home::new();
            test(&home);
            home.end();
        });
        if let Err(panic) = thread.join() {
            std::panic::resume_unwind(panic);
        }
    });
}

impl Home {
    fn new() -> Self {
        let layers = Layers::new(1);
        Layers::write(&layers.lower(0).join("file"), "lower\n");
        Layers::write(&layers.lower(0).join("dir/inside"), "inside\n");
        Layers::write(&layers.lower(0).join("closed/inside"), "inside\n");
        for name in [
            "lower0",
            "lower0/file",
            "lower0/dir",
            "lower0/closed",
            "upper",
            "work",
            "mnt",
        ] {
            chown(layers.path(name), Some(NOBODY), Some(NOBODY)).unwrap();
        }
        // Where the build directory is may be closed to others.
        // By a process of its own: a child of another test would keep what this one writes open, and the kernel does not run it then.
        let copied = Command::new("cp")
            .arg(PLYFS)
            .arg(layers.path("plyfs"))
            .status();
        assert!(copied.unwrap().success());
        let tmpfs = layers.path("tmpfs");
        fs::create_dir(&tmpfs).unwrap();
        let none: Option<&str> = None;
        let kind = Some("tmpfs");
        mount(kind, &tmpfs, kind, MsFlags::empty(), Some("mode=755")).unwrap();
        let device = tmpfs.join("fuse");
        mknod(&device, SFlag::S_IFCHR, Mode::empty(), makedev(10, 229)).unwrap();
        fs::write(tmpfs.join("fuse.conf"), "").unwrap();
        for (from, to) in [("fuse", "/dev/fuse"), ("fuse.conf", "/etc/fuse.conf")] {
            mount(Some(&tmpfs.join(from)), to, none, MsFlags::MS_BIND, none).unwrap();
        }
        let home = Self { layers, tmpfs };
        home.let_open_fuse(true);
        home
    }

    fn let_open_fuse(&self, everyone: bool) {
        let mode = fs::Permissions::from_mode(if everyone { 0o666 } else { 0o600 });
        fs::set_permissions(self.tmpfs.join("fuse"), mode).unwrap();
    }

    /// The directories can be removed only when nothing of this namespace is mounted below them.
    fn end(self) {
        assert!(self.server_ends());
        umount2(&self.tmpfs, MntFlags::MNT_DETACH).unwrap();
    }

    fn run_as(&self, user: u32, program: &str, args: &[&str]) -> Output {
        let mut command = Command::new("setpriv");
        command.args(["--reuid", &user.to_string(), "--regid", &user.to_string()]);
        command.args(["--clear-groups", "--", program]).args(args);
        command.current_dir("/").output().unwrap()
    }

    fn mount(&self, options: &str) -> Output {
        let plyfs = self.layers.path("plyfs");
        let mnt = self.layers.mnt();
        let [plyfs, mnt] = [&plyfs, &mnt].map(|path| path.to_str().unwrap());
        self.run_as(NOBODY, plyfs, &["-o", options, mnt])
    }

    fn mounted(&self, options: &str) {
        let output = self.mount(options);
        let silent = output.stdout.is_empty() && output.stderr.is_empty();
        assert!(output.status.success() && silent, "{options}: {output:?}");
        assert!(self.line().is_some());
    }

    fn refused(&self, options: &str, why: &str) {
        let output = self.mount(options);
        let said = String::from_utf8(output.stderr).unwrap();
        assert!(
            !output.status.success() && said.contains(why),
            "{options}: {said}"
        );
        assert_eq!(self.line(), None);
        assert!(self.server_ends());
    }

    /// The mount in the table, from its options on.
    fn line(&self) -> Option<String> {
        let table = fs::read_to_string("/proc/thread-self/mountinfo").unwrap();
        let mnt = format!(" {} ", self.layers.mnt().display());
        table
            .lines()
            .find_map(|line| Some(line.split_once(&mnt)?.1.to_owned()))
    }

    fn unmounted(&self) {
        let mnt = self.layers.mnt();
        let output = self.run_as(NOBODY, "fusermount3", &["-u", mnt.to_str().unwrap()]);
        assert!(output.status.success(), "{output:?}");
        assert_eq!(self.line(), None);
        assert!(self.server_ends(), "plyfs outlived its mount");
    }

    fn server_ends(&self) -> bool {
        let program = self.layers.path("plyfs");
        wait_until(|| {
            let processes = fs::read_dir("/proc").unwrap().flatten();
            let mut programs = processes.filter_map(|p| fs::read_link(p.path().join("exe")).ok());
            !programs.any(|exe| exe == program)
        })
    }

    /// What `user` gets when he reads `path`.
    fn read_as(&self, user: u32, path: &Path) -> Result<String, String> {
        let output = self.run_as(user, "cat", &[path.to_str().unwrap()]);
        let text = |bytes| String::from_utf8(bytes).unwrap();
        if output.status.success() {
            Ok(text(output.stdout))
        } else {
            Err(text(output.stderr))
        }
    }
}

impl Drop for Home {
    fn drop(&mut self) {
        // A test that failed has not unmounted, and plyfs would go on in this namespace for good.
        let _ = umount2(&self.layers.mnt(), MntFlags::MNT_DETACH);
    }
}

#[test]
fn a_user_mounts_writes_and_unmounts() {
    in_a_home(|home| {
        let mnt = home.layers.mnt();
        // What root alone may give is not given, asked for or not.
        for more in ["", ",suid,dev"] {
            home.mounted(&(home.layers.options() + more));
            let line = home.line().unwrap();
            assert!(line.starts_with("rw,nosuid,nodev"), "{line}");
            assert!(
                line.contains(" - fuse.plyfs ") && line.contains("user_id=65534"),
                "{line}"
            );
            home.unmounted();
        }
        home.mounted(&home.layers.options());
        let script = "set -e; cd \"$0\"; echo more >>file; mv dir moved; mkdir new; echo 1 >new/file; ln file link; \
                      chmod 640 file; chmod 555 closed; ln -s file soft; rm moved/inside; mkfifo fifo";
        let output = home.run_as(NOBODY, "sh", &["-c", script, mnt.to_str().unwrap()]);
        assert!(output.status.success(), "{output:?}");
        // Nobody else may enter, root neither.
        assert!(fs::read_dir(&mnt).is_err());
        let denied = home.read_as(DAEMON, &mnt.join("new/file"));
        assert!(denied.unwrap_err().contains("Permission denied"));
        home.unmounted();

        // All of it is his, and there again at the next mount.
        let file = fs::metadata(home.layers.upper().join("file")).unwrap();
        assert_eq!((file.uid(), file.gid(), file.nlink()), (NOBODY, NOBODY, 2));
        home.mounted(&home.layers.options());
        let script = "cd \"$0\" && cat link soft new/file && ls . moved && stat -c %a:%u link";
        let output = home.run_as(NOBODY, "sh", &["-c", script, mnt.to_str().unwrap()]);
        let said = String::from_utf8(output.stdout).unwrap();
        let listing = ".:\nclosed\nfifo\nfile\nlink\nmoved\nnew\nsoft\n\nmoved:\n640:65534\n";
        assert_eq!(said, format!("lower\nmore\nlower\nmore\n1\n{listing}"));
        home.unmounted();

        home.mounted(&format!(
            "ro,noexec,noatime,{}",
            home.layers.lower_options()
        ));
        let line = home.line().unwrap();
        assert!(line.starts_with("ro,nosuid,nodev,noexec,noatime"), "{line}");
        assert_eq!(home.read_as(NOBODY, &mnt.join("file")).unwrap(), "lower\n");
        home.unmounted();
    });
}

/// An upper on a union, as inside of a container, where a whiteout is an attribute of a file of this user's.
#[test]
fn a_user_removes_where_whiteouts_cannot_be_devices() {
    in_a_home(|home| {
        let layers = &home.layers;
        let at = home.tmpfs.join("host");
        let [lower, upper, work] = ["l", "u", "w"].map(|name| home.tmpfs.join(name));
        for dir in [&at, &lower, &upper, &work] {
            fs::create_dir(dir).unwrap();
        }
        let [lower, upper, work] = [&lower, &upper, &work].map(|dir| dir.display());
        let options = format!("lowerdir={lower},upperdir={upper},workdir={work},userxattr");
        let kind = Some("overlay");
        mount(kind, &at, kind, MsFlags::empty(), Some(options.as_str())).unwrap();
        for name in ["upper", "work"] {
            fs::create_dir(at.join(name)).unwrap();
            chown(at.join(name), Some(NOBODY), Some(NOBODY)).unwrap();
        }
        let (lower, at) = (layers.lower_options(), at.display());
        let options = format!("{lower},upperdir={at}/upper,workdir={at}/work");
        for (script, names) in [
            (
                "ls; rm file; mv dir moved; mkdir file; ls",
                "closed\ndir\nfile\nclosed\nfile\nmoved\n",
            ),
            ("ls; rmdir file; ls", "closed\nfile\nmoved\nclosed\nmoved\n"),
        ] {
            home.mounted(&options);
            let script = format!("cd \"$0\"; {script}");
            let mnt = layers.mnt();
            let output = home.run_as(NOBODY, "sh", &["-c", &script, mnt.to_str().unwrap()]);
            let (said, errors) = (String::from_utf8(output.stdout), output.stderr);
            assert_eq!(said.unwrap(), names, "{}", String::from_utf8_lossy(&errors));
            home.unmounted();
        }
        umount2(&home.tmpfs.join("host"), MntFlags::MNT_DETACH).unwrap();
    });
}

/// Whoever has no CAP_DAC_OVERRIDE is held to modes also as the owner, and so was plyfs where the kernel holds nobody to them: a
/// read-only file with attributes `user.*`, plyfs's own marks among them, could not be copied up, nor a read-only directory,
/// nor a file in it, and what was closed was not found any more once it was forgotten.
#[test]
fn a_user_does_to_what_is_read_only_or_closed_what_its_owner_may() {
    const CHANGES: &str = "\
        setfattr -n user.late -v v attributed\n\
        chmod 444 attributed && setfattr -n user.later -v v attributed\n\
        chmod 400 attributed linked\n\
        mv linked renamed\n\
        ln renamed added\n\
        rm -f other added\n\
        mkdir empty; chmod 000 secret shut empty bare\n\
        echo more >>closed/inside\n\
        chmod 444 closed/inside\n\
        mv inner deep/moved\n\
        chmod 755 deep/read-only && touch deep/read-only/new && chmod 555 deep/read-only\n\
        rmdir gone && (umask 222; mkdir gone)\n\
        printf x | dd of=large conv=notrunc status=none && chmod 444 large\n\
        echo new >made && chmod 200 made\n";
    const LATER: &str = "\
        echo more >>made; cat made; chmod 644 secret made; cat secret made\n\
        rmdir empty bare; chmod 755 shut; ls shut\n\
        cksum large; chmod 644 large; printf y | dd of=large conv=notrunc status=none; cksum large\n\
        getfattr -d --absolute-names -m ^user.[^o] attributed closed\n\
        cat renamed closed/inside\n\
        stat -c '%A %h %U %G %n' . closed deep deep/*; find . -type f -exec stat -c '%A %h %U %G %s %n' {} + | sort -k6\n";
    in_a_home(|home| {
        let lower = home.layers.lower(0);
        let fill = "set -e; cd \"$0\"; for f in attributed linked secret closed/inside deep/read-only/old inner/f shut/in; do \
                    mkdir -p $(dirname $f); echo $f >$f; done; ln linked other; mkdir gone bare; head -c 3000000 /dev/zero >large; \
                    for f in attributed linked closed deep/read-only; do setfattr -n user.early -v v $f; done; \
                    chmod 444 attributed linked; chmod 555 closed deep/read-only inner; chown -R 65534:65534 .";
        let sh = |script: &str, dir: &Path| {
            let output = Command::new("sh").arg("-c").arg(script).arg(dir).output();
            let output = output.unwrap();
            assert!(output.status.success(), "{output:?}");
        };
        sh(fill, &lower);
        // Before the first mount: from then on nobody reads the lower but plyfs.
        sh(
            "cp -a \"$0\" \"$0\"/../plain; cp -a \"$0\" \"$0\"/../metacopy",
            &lower,
        );
        let mnt = home.layers.mnt();
        let said = |dir: &Path, script: &str| {
            let script = format!("cd \"$0\"; exec 2>&1; {script}");
            let output = home.run_as(NOBODY, "sh", &["-c", &script, dir.to_str().unwrap()]);
            String::from_utf8(output.stdout).unwrap()
        };
        for (native, options) in [("plain", ""), ("metacopy", ",metacopy=on")] {
            let native = home.layers.path(native);
            let options = home.layers.options() + options;
            home.mounted(&options);
            assert_eq!(said(&mnt, CHANGES), said(&native, CHANGES));
            home.unmounted();
            home.mounted(&options);
            assert_eq!(said(&mnt, LATER), said(&native, LATER));
            home.unmounted();
            let anew = "cd \"$0\"; rm -rf upper/* work/*";
            sh(anew, &home.layers.path(""));
        }
    });
}

/// What lies in it was EACCES for plyfs, also for who had it open. A mode was refused that had been set all the same.
#[test]
fn a_user_goes_on_with_what_is_open_in_a_directory_that_he_closes() {
    const SCRIPT: &str = "import os
names = ['low/f', 'low/sub/g', 'up/f', 'up/sub/g']
for name in ['up/f', 'up/sub/g']:
    os.chmod(name, 0o600)
files = [os.open(name, os.O_RDWR) for name in names]
dirs = [os.open(name, os.O_RDONLY) for name in ['low/sub', 'up/sub']]
for name in ['low', 'up']:
    os.chmod(name, 0)
for file in files:
    os.fchmod(file, 0o640)
    os.utime(file, (1, 2))
    os.setxattr(file, 'user.late', b'v')
    os.pwrite(file, b'new', 0)
    os.fsync(file)
    stat = os.fstat(file)
    print(oct(stat.st_mode), stat.st_size, os.pread(file, 99, 0), os.getxattr(file, 'user.late'))
for dir in dirs:
    os.fchmod(dir, 0o711)
    print(oct(os.fstat(dir).st_mode), os.listdir(dir), oct(os.stat('g', dir_fd=dir).st_mode))
for name in ['low', 'up']:
    try:
        os.stat(name + '/f')
    except PermissionError:
        print(oct(os.stat(name).st_mode))
    os.chmod(name, 0o755)
for name in names:
    print(oct(os.stat(name).st_mode), open(name).read())";
    in_a_home(|home| {
        let lower = home.layers.lower(0);
        for name in ["low/f", "low/sub/g", "up/f", "up/sub/g"] {
            Layers::write(&lower.join(name), "older");
        }
        let native = home.layers.path("native");
        let script = "chown -R 65534:65534 \"$0\"; cp -a \"$0\" \"$1\"";
        let mut command = Command::new("sh");
        command.args(["-c", script]).arg(&lower).arg(&native);
        assert!(command.status().unwrap().success());
        home.mounted(&home.layers.options());
        let mnt = home.layers.mnt();
        let [here, there] = [&mnt, &native].map(|dir| {
            let script = format!("cd \"$0\" && exec python3 -c \"{SCRIPT}\" 2>&1");
            let output = home.run_as(NOBODY, "sh", &["-c", &script, dir.to_str().unwrap()]);
            String::from_utf8(output.stdout).unwrap()
        });
        assert_eq!(here, there);
        assert!(!there.contains("Error"), "{there}");
        home.unmounted();
    });
}

/// plyfs notes in an attribute how much of a file is left before it grows, which its mode forbade.
#[test]
fn a_user_goes_on_with_a_large_file_that_he_has_open_and_makes_read_only() {
    const SCRIPT: &str = "import os
file = os.open('large', os.O_RDWR)
os.pwrite(file, b'x', 0)
os.fchmod(file, 0o444)
os.ftruncate(file, 1000001)
os.pwrite(file, b'new', 2000000)
print(os.fstat(file).st_size, os.pread(file, 9, 1999997))
os.ftruncate(file, 500001)
os.ftruncate(file, 600000)
print(os.fstat(file).st_size, os.pread(file, 9, 500000))";
    in_a_home(|home| {
        let large = home.layers.lower(0).join("large");
        fs::write(&large, vec![b'l'; 3_000_000]).unwrap();
        chown(&large, Some(NOBODY), Some(NOBODY)).unwrap();
        home.mounted(&home.layers.options());
        let mnt = home.layers.mnt();
        let script = format!("cd \"$0\" && exec python3 -c \"{SCRIPT}\" 2>&1");
        let output = home.run_as(NOBODY, "sh", &["-c", &script, mnt.to_str().unwrap()]);
        assert_eq!(
            String::from_utf8(output.stdout).unwrap(),
            "2000003 b'\\x00\\x00\\x00new'\n600000 b'l\\x00\\x00\\x00\\x00\\x00\\x00\\x00\\x00'\n"
        );
        home.unmounted();
    });
}

/// Passing files through takes a capability on the host: they are served instead.
#[test]
fn a_user_who_asks_for_passthrough_is_served() {
    in_a_home(|home| {
        home.mounted(&format!("passthrough,{}", home.layers.options()));
        let script = "cd \"$0\" && exec 5<file && echo more >>file && cat <&5";
        let mnt = home.layers.mnt();
        let output = home.run_as(NOBODY, "sh", &["-c", script, mnt.to_str().unwrap()]);
        assert_eq!(String::from_utf8(output.stdout).unwrap(), "lower\nmore\n");
        home.unmounted();
    });
}

#[test]
fn others_may_enter_where_the_administrator_lets_users_allow_it() {
    in_a_home(|home| {
        let options = format!("allow_other,{}", home.layers.options());
        home.refused(&options, "user_allow_other");
        fs::write(home.tmpfs.join("fuse.conf"), "user_allow_other\n").unwrap();
        home.mounted(&options);
        let file = home.layers.mnt().join("file");
        for user in [0, DAEMON, NOBODY] {
            assert_eq!(home.read_as(user, &file).unwrap(), "lower\n", "{user}");
        }
        home.unmounted();
    });
}

#[test]
fn what_a_user_may_not_do_is_said() {
    in_a_home(|home| {
        let mnt = home.layers.mnt();
        let options = home.layers.options();
        chown(&mnt, Some(0), Some(0)).unwrap();
        home.refused(&options, "no write access to mountpoint");
        chown(&mnt, Some(NOBODY), Some(NOBODY)).unwrap();
        home.let_open_fuse(false);
        home.refused(&options, "may not open /dev/fuse");
        home.let_open_fuse(true);
        let upper = home.layers.upper();
        chown(&upper, Some(0), Some(0)).unwrap();
        fs::set_permissions(&upper, fs::Permissions::from_mode(0o700)).unwrap();
        home.refused(&options, upper.to_str().unwrap());
    });
}
