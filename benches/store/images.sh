#!/usr/bin/env bash
# Makes the images that the benchmarks of the store load: Debian, and Python, Node, PostgreSQL and Redis on it.
#
#   benches/store/images.sh DIR
#
# DIR/NAME.tar is an OCI archive of localhost/NAME:latest, DIR/NAME.layer.tar its own layer. Made once; needs mmdebstrap and kernel
# overlayfs.
set -euo pipefail
here=$(cd "$(dirname "$0")" && pwd)
dir=${1:?usage: benches/store/images.sh DIR}
[ -e "$dir/complete" ] && exit 0
rm -rf "$dir"
mkdir -p "$dir/base" "$dir/mnt"
dir=$(cd "$dir" && pwd)
trap 'umount "$dir/mnt/dev" "$dir/mnt/proc" 2>/dev/null || true; umount "$dir/mnt" 2>/dev/null || true' EXIT

echo "making the images of the benchmark in $dir (once)" >&2
mmdebstrap --quiet --variant=minbase bookworm "$dir/base"
rm -rf "$dir"/base/dev "$dir"/base/var/cache/apt/archives/*.deb
mkdir "$dir/base/dev"
"$here/../layer-tar" "$dir/base" "$dir/debian.layer.tar"
"$here/oci-archive" "$dir/debian.tar" localhost/debian:latest "$dir/debian.layer.tar"

# image NAME PACKAGE...: what the packages bring, as one layer on Debian
image() {
  local name=$1
  shift
  mkdir "$dir/upper" "$dir/work"
  mount -t overlay overlay -o "lowerdir=$dir/base,upperdir=$dir/upper,workdir=$dir/work" "$dir/mnt"
  mount -t proc proc "$dir/mnt/proc"
  mount --bind /dev "$dir/mnt/dev"
  cp /etc/resolv.conf "$dir/mnt/etc/resolv.conf"
  printf '#!/bin/sh\nexit 101\n' >"$dir/mnt/usr/sbin/policy-rc.d"
  chmod 755 "$dir/mnt/usr/sbin/policy-rc.d"
  chroot "$dir/mnt" env DEBIAN_FRONTEND=noninteractive sh -ec 'apt-get -qq update
apt-get -qq install -y --no-install-recommends "$@" >/dev/null 2>&1
apt-get -qq clean
rm -rf /var/lib/apt/lists/* /usr/sbin/policy-rc.d' sh "$@"
  umount "$dir/mnt/dev" "$dir/mnt/proc" "$dir/mnt"
  "$here/../layer-tar" "$dir/upper" "$dir/$name.layer.tar"
  rm -rf "$dir/upper" "$dir/work"
  "$here/oci-archive" "$dir/$name.tar" "localhost/$name:latest" "$dir/debian.layer.tar" "$dir/$name.layer.tar"
}
image python python3 python3-pip python3-venv
image node nodejs
image postgres postgresql
image redis redis-server
rm -rf "$dir/base" "$dir/mnt"
touch "$dir/complete"
