//! What is mounted in a container.

use std::path::Path;

use serde_json::{Value, json};

use super::{Cgroups, ContainerSpec};

/// Files that plyd makes for each container, and where the container finds them.
const FILES: [(&str, &str); 3] = [
    ("resolv.conf", "/etc/resolv.conf"),
    ("hostname", "/etc/hostname"),
    ("hosts", "/etc/hosts"),
];

/// The `mounts` array: what every container has, then the volumes, the outer before the inner. A
/// volume takes the place of a mount with the same target.
pub(super) fn all(spec: &ContainerSpec<'_>) -> Vec<Value> {
    let mut mounts = defaults(spec.cgroups);
    for (file, target) in FILES {
        mounts.push(bind(
            &spec.files.join(file),
            Path::new(target),
            spec.read_only,
        ));
    }
    let mut volumes: Vec<_> = spec.volumes.iter().collect();
    volumes.sort_by_key(|volume| volume.target.components().count());
    for volume in volumes {
        mounts.retain(|mount| mount["destination"] != json!(volume.target));
        mounts.push(bind(&volume.source, &volume.target, volume.read_only));
    }
    mounts
}

fn bind(source: &Path, target: &Path, read_only: bool) -> Value {
    let mode = if read_only { "ro" } else { "rw" };
    json!({
        "destination": target,
        "type": "bind",
        "source": source,
        "options": ["rbind", "rprivate", mode],
    })
}

fn defaults(cgroups: Cgroups) -> Vec<Value> {
    let mount = |destination: &str, kind: &str, source: &str, options: &[&str]| json!({"destination": destination, "type": kind, "source": source, "options": options});
    let mut mounts = vec![
        mount("/proc", "proc", "proc", &["nosuid", "noexec", "nodev"]),
        mount(
            "/dev",
            "tmpfs",
            "tmpfs",
            &["nosuid", "strictatime", "mode=755", "size=65536k"],
        ),
        mount(
            "/dev/pts",
            "devpts",
            "devpts",
            &[
                "nosuid",
                "noexec",
                "newinstance",
                "ptmxmode=0666",
                "mode=0620",
                "gid=5",
            ],
        ),
        mount(
            "/sys",
            "sysfs",
            "sysfs",
            &["nosuid", "noexec", "nodev", "ro"],
        ),
        mount(
            "/dev/mqueue",
            "mqueue",
            "mqueue",
            &["nosuid", "noexec", "nodev"],
        ),
        mount(
            "/dev/shm",
            "tmpfs",
            "shm",
            &["nosuid", "noexec", "nodev", "mode=1777", "size=67108864"],
        ),
    ];
    if cgroups != Cgroups::None {
        let options = ["nosuid", "noexec", "nodev", "relatime", "ro"];
        mounts.push(mount("/sys/fs/cgroup", "cgroup", "cgroup", &options));
    }
    mounts
}
