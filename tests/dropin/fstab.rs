//! mount(8) and fstab, in a mount namespace of their own, with plyfs where a package would install it.

use std::process::Command;

use crate::common::Layers;
use crate::common::mount::PLYFS;
use crate::peer::Dirs;

const PROLOGUE: &str = r#"
set -e
exec 2>&1
cd "$1"
plyfs=$2
options=lowerdir=$1/lower,upperdir=$1/upper,workdir=$1/work
# Not before the server has ended is the work directory free for the next.
gone() {
  umount mnt
  for _ in $(seq 1200); do
    pgrep -f "$1/mnt" >/dev/null || return 0
    sleep 0.05
  done
  echo "plyfs does not end"
  return 1
}
shown() { sed -n "s,^\([^ ]*\) $1/mnt \([^ ]*\) \([a-z]*\).*,\1 \2 \3,p" /proc/mounts; }
line() { printf '%s\n' "$*" >fstab; }
"#;

#[track_caller]
fn check(script: &str, expected: &str) {
    let dirs = Dirs::new();
    Layers::write(&dirs.lower().join("file"), "text");
    let output = Command::new("unshare")
        .args(["--mount", "--pid", "--fork", "--kill-child", "--mount-proc"])
        .args(["bash", "-c", &format!("{PROLOGUE}{script}"), "script"])
        .arg(dirs.path(""))
        .arg(PLYFS)
        .output()
        .unwrap();
    assert_eq!(String::from_utf8_lossy(&output.stdout), expected);
    assert!(output.status.success(), "{output:?}");
}

/// Debian's mount.fuse3 runs the program that the type names, from where a shell looks without a PATH.
#[test]
fn through_the_helper_of_the_package_fuse3() {
    check(
        r#"
        mkdir bin
        cp "$plyfs" bin/plyfs
        mount --bind bin /usr/local/bin
        mount -t fuse.plyfs layers mnt -o "$options,noatime"
        shown "$1"; cat mnt/file; echo
        gone "$1"
        line "layers $1/mnt fuse.plyfs $options,nofail,x-systemd.requires=/tmp,_netdev 0 0"
        mount -T fstab mnt
        shown "$1"; touch mnt/new
        gone "$1"; ls upper
        mount -T fstab -a
        mount -T fstab -a
        shown "$1"
        gone "$1"
        line "plyfs#layers $1/mnt fuse lowerdir=$1/lower 0 0"
        mount -T fstab mnt
        shown "$1"
        "#,
        "layers fuse.plyfs rw\ntext\n\
         layers fuse.plyfs rw\nnew\n\
         layers fuse.plyfs rw\n\
         layers fuse.plyfs ro\n",
    );
}

/// mount(8) prefers a helper of the type's own, which plyfs is under that name.
#[test]
fn as_a_helper_of_its_own() {
    check(
        r#"
        mkdir own sbin
        ln -s "$plyfs" own/mount.fuse.plyfs
        mount --bind /usr/sbin sbin
        "$plyfs" -o lowerdir=own:sbin /usr/sbin
        line "layers $1/mnt fuse.plyfs $options 0 0"
        mount -T fstab mnt
        shown "$1"; cat mnt/file; echo
        mount -o remount,ro mnt || echo "exit $?"
        mount -t fuse.plyfs layers mnt -o lowerdir=/missing || echo "exit $?"
        "#,
        "layers fuse.plyfs rw\ntext\n\
         plyfs: option `remount` cannot be used with plyfs: the options of a mount are fixed; unmount it and mount it again\n\
         exit 2\n\
         plyfs: cannot open the lower directory /missing: No such file or directory (os error 2); name an existing directory\n\
         exit 1\n",
    );
}
