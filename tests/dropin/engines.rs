//! plyfs as the mount program of podman and buildah, as root and as an ordinary user, and over storage that
//! fuse-overlayfs has served before. Each scenario has storage, configuration, processes and mounts of its own.

use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::process::Command;

use crate::common::mount::PLYFS;
use crate::peer::Dirs;

/// Who calls the engine.
#[derive(Clone, Copy, PartialEq, Eq)]
enum User {
    Root,
    /// With 65,536 subordinate ids, and /dev/fuse open to all, as udev has it.
    Ordinary,
}

/// Runs as root of the host in a mount and process namespace of its own; what it adds to /etc is seen there alone.
const OUTSIDE: &str = r#"
set -e
cd "$1"
if [ "$2" = root ]; then exec bash -c ". ./inside"; fi
id=43210
for file in passwd group shadow subuid subgid; do
    touch /etc/$file
    cp /etc/$file etc.$file
done
echo "ply:x:$id:$id::$1/home:/bin/sh" >>etc.passwd
echo "ply:x:$id:" >>etc.group
echo 'ply:*:1:0:99999:7:::' >>etc.shadow
echo "ply:3000000:65536" | tee etc.subuid >etc.subgid
for file in passwd group shadow subuid subgid; do mount --bind etc.$file /etc/$file; done
mknod -m 666 fuse c 10 229
mount --bind fuse /dev/fuse
chown -R $id:$id .
exec setpriv --reuid $id --regid $id --clear-groups --reset-env bash -c ". ./inside"
"#;

/// Settings, and `on PROGRAM`, which chooses the mount program.
const INSIDE: &str = r#"
set -e
export HOME=$PWD/home XDG_RUNTIME_DIR=$PWD/run TMPDIR=$PWD/tmp BUILDAH_ISOLATION=oci
export CONTAINERS_CONF=$PWD/containers.conf CONTAINERS_REGISTRIES_CONF=$PWD/registries.conf
export CONTAINERS_STORAGE_CONF=$PWD/storage.conf
[ "$(id -u)" = 0 ] || BUILDAH_ISOLATION=rootless
mkdir -p -m 700 home run tmp
: >registries.conf
cat >containers.conf <<END
[containers]
default_ulimits = ["nofile=1024:1024", "nproc=1024:1024"]
netns = "host"
log_driver = "k8s-file"
[engine]
cgroup_manager = "cgroupfs"
runtime = "runc"
events_logger = "none"
END
on() {
    cat >storage.conf <<END
[storage]
driver = "overlay"
graphroot = "$PWD/storage"
runroot = "$PWD/run/storage"
[storage.options.overlay]
mount_program = "$1"
mountopt = "metacopy=off"
END
}
root_type="sed -n 's,^[^ ]* / \([^ ]*\) .*,\1,p' /proc/mounts"
on "$PWD/plyfs"
podman load -qi image.tar >&2
. ./scenario
podman rm -af >&2
"#;

/// Runs a scenario; what it prints has to be `expected`.
#[track_caller]
fn check(user: User, scenario: &str, expected: &str) {
    let dirs = Dirs::new();
    let made = Command::new("contrib/busybox-archive")
        .arg(dirs.path("image.tar"))
        .arg("localhost/box:1")
        .output()
        .unwrap();
    assert!(made.status.success(), "{made:?}");
    fs::copy(PLYFS, dirs.path("plyfs")).unwrap();
    fs::write(dirs.path("inside"), INSIDE).unwrap();
    fs::write(dirs.path("scenario"), scenario).unwrap();
    fs::write(dirs.path("file"), "from outside\n").unwrap();
    fs::set_permissions(dirs.path("file"), fs::Permissions::from_mode(0o640)).unwrap();
    let output = Command::new("unshare")
        .args(["--mount", "--pid", "--fork", "--kill-child", "--mount-proc"])
        .args(["bash", "-c", OUTSIDE, "outside"])
        .arg(dirs.path(""))
        .arg(match user {
            User::Root => "root",
            User::Ordinary => "ordinary",
        })
        .output()
        .unwrap();
    let printed = String::from_utf8_lossy(&output.stdout);
    let said = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "{printed}\n{said}");
    assert_eq!(printed, expected, "{said}");
}

const RUN_AND_COMMIT: &str = r#"
podman run --rm localhost/box:1 sh -c "$root_type; cat /etc/motd; touch /new; chown 1000:1000 /new; stat -c '%u:%g' /new"
podman run --name made localhost/box:1 sh -c '
    rm /etc/motd; rm -r /var; mkdir /var; mv /home /home2; echo text >/text; chown 5:6 /text; chmod 4750 /text'
podman diff made | sort
podman commit -q made localhost/box:2 >&2
podman run --rm localhost/box:2 sh -c '
    stat -c "%n %a %u:%g" /text; cat /text; ls /home2; find /var /home /etc/motd 2>&1 | sort'
"#;

const RAN_AND_COMMITTED: &str = "\
fuse.plyfs
This file belongs to the image.
1000:1000
A /home2
A /home2/user
A /text
C /etc
C /var
D /etc/motd
D /home
D /var/log
/text 4750 5:6
text
user
/var
find: /etc/motd: No such file or directory
find: /home: No such file or directory
";

#[test]
fn podman_runs_and_commits_as_root() {
    check(User::Root, RUN_AND_COMMIT, RAN_AND_COMMITTED);
}

#[test]
fn podman_runs_and_commits_as_an_ordinary_user() {
    check(User::Ordinary, RUN_AND_COMMIT, RAN_AND_COMMITTED);
}

const BUILD: &str = r#"
mkdir context
cp file context
cat >context/Containerfile <<END
FROM localhost/box:1
RUN rm /etc/passwd && echo x >/made && chown 3:4 /made
RUN mv /var /var2 && mv /made /var2/moved && ln /var2/moved /var2/linked
COPY file /copied
RUN rm -r /home && mkdir /home && echo RUN >/home/last
END
podman build -q -t localhost/built context >&2
podman run --rm localhost/built sh -c '
    find /var /var2 /home /etc/passwd 2>&1 | sort; cat /copied; stat -c "%h %u:%g" /var2/linked; stat -c %a /copied'
box=$(buildah from localhost/box:1)
buildah run "$box" sh -c "$root_type; rm /etc/motd; echo run >/run-made"
buildah copy -q "$box" file /copied >&2
buildah commit -q "$box" localhost/committed >&2
buildah rm "$box" >&2
podman run --rm localhost/committed sh -c 'cat /run-made /copied; ls /etc/motd 2>&1 || true'
"#;

const BUILT: &str = "\
/home
/home/last
/var2
/var2/linked
/var2/log
/var2/moved
find: /etc/passwd: No such file or directory
find: /var: No such file or directory
from outside
2 3:4
640
fuse.plyfs
run
from outside
ls: /etc/motd: No such file or directory
";

#[test]
fn podman_and_buildah_build_as_root() {
    check(User::Root, BUILD, BUILT);
}

#[test]
fn podman_and_buildah_build_as_an_ordinary_user() {
    check(User::Ordinary, BUILD, BUILT);
}

/// One container, started by one mount program after the other.
const SWITCH: &str = r#"
on /usr/bin/fuse-overlayfs
podman run --name box localhost/box:1 sh -ec "$root_type"'
    step=$(cat /step 2>/dev/null || echo 0)
    case $step in
    0)  rm /etc/motd; rm -r /var; mkdir /var; echo a >/a; chown 5:6 /a; mv /etc/image-name /name;;
    1)  rm /a; rm -r /home; mkdir /home; mv /etc/group /group; touch /etc/motd; chmod 700 /root; mkdir /var/log;;
    2)  rm -r /var; mkdir /var; rm /group;;
    esac
    find /etc/motd /etc/group /a /group /name -type f 2>/dev/null | sort | xargs stat -c "%n %a %u:%g %s"
    find /var /home | sort
    stat -c %a /root
    echo $((step + 1)) >/step'
podman commit -q box localhost/box:old >&2
on "$PWD/plyfs"
podman start -a box
podman run --rm localhost/box:old sh -c "$root_type; ls /etc/motd /var /name 2>&1 || true"
on /usr/bin/fuse-overlayfs
podman start -a box
on "$PWD/plyfs"
podman start -a box
"#;

const SWITCHED: &str = "\
fuse.fuse-overlayfs
/a 644 5:6 2
/etc/group 644 0:0 23
/name 644 0:0 20
/home
/home/user
/var
755
fuse.plyfs
/etc/motd 644 0:0 0
/group 644 0:0 23
/name 644 0:0 20
/home
/var
/var/log
700
fuse.plyfs
ls: /etc/motd: No such file or directory
/name

/var:
fuse.fuse-overlayfs
/etc/motd 644 0:0 0
/name 644 0:0 20
/home
/var
700
fuse.plyfs
/etc/motd 644 0:0 0
/name 644 0:0 20
/home
/var
700
";

#[test]
fn storage_of_roots_goes_from_fuse_overlayfs_to_plyfs_and_back() {
    check(User::Root, SWITCH, SWITCHED);
}

#[test]
fn storage_of_a_user_goes_from_fuse_overlayfs_to_plyfs_and_back() {
    check(User::Ordinary, SWITCH, SWITCHED);
}
