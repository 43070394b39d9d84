#!/usr/bin/env bash
# Makes the tree that the benchmarks mount: a Debian root in four layers, as a Dockerfile would leave them.
#
#   benches/image.sh DIR
#
# DIR/1 is Debian, DIR/2 adds Python, DIR/3 an application, DIR/4 removes documentation (whiteouts) and changes files.
# DIR/tree.tar is what the untar row unpacks. Made once; needs mmdebstrap and kernel overlayfs.
set -euo pipefail
dir=${1:?usage: benches/image.sh DIR}
[ -e "$dir/complete" ] && exit 0
rm -rf "$dir"
mkdir -p "$dir"
dir=$(cd "$dir" && pwd)
trap 'umount "$dir/mnt/dev" "$dir/mnt/proc" 2>/dev/null || true; umount "$dir/mnt" 2>/dev/null || true' EXIT

echo "making the benchmark's image in $dir (once)" >&2
mkdir "$dir/1" "$dir/mnt"
mmdebstrap --quiet --variant=minbase bookworm "$dir/1"
rm -rf "$dir"/1/dev "$dir"/1/var/cache/apt/archives/*.deb
mkdir "$dir/1/dev"

# layer N COMMAND: runs COMMAND in a chroot of the layers below and keeps what it changed as layer N
layer() {
  local n=$1 lower="" i
  for ((i = 1; i < n; i++)); do lower="$dir/$i${lower:+:$lower}"; done
  mkdir "$dir/$n" "$dir/work"
  mount -t overlay overlay -o "lowerdir=$lower,upperdir=$dir/$n,workdir=$dir/work" "$dir/mnt"
  mount -t proc proc "$dir/mnt/proc"
  mount --bind /dev "$dir/mnt/dev"
  cp /etc/resolv.conf "$dir/mnt/etc/resolv.conf"
  chroot "$dir/mnt" /bin/sh -ec "$2"
  umount "$dir/mnt/dev" "$dir/mnt/proc" "$dir/mnt"
  rm -rf "$dir/work"
}
layer 2 'export DEBIAN_FRONTEND=noninteractive
apt-get -qq update
apt-get -qq install -y --no-install-recommends python3 python3-pip >/dev/null 2>&1
apt-get -qq clean; rm -rf /var/lib/apt/lists/*
python3 -m compileall -q /usr/lib/python3 || true'
layer 3 'mkdir -p /srv/app/data && cp -r /usr/lib/python3.11/asyncio /usr/lib/python3.11/json /srv/app/
head -c 67108864 /dev/urandom >/srv/app/data/large'
layer 4 'rm -rf /usr/share/doc /usr/share/man; chmod -R g-w /srv/app; echo changed >/etc/motd'
tar -C "$dir/1" -cf "$dir/tree.tar" usr/share usr/lib
rmdir "$dir/mnt"
touch "$dir/complete"
