//! The OCI runtime specification of a container, with Docker's defaults: what a program finds in a
//! container of Docker, it finds here.

mod env;
mod mounts;
mod seccomp;

use std::fs;
use std::path::{Path, PathBuf};

use serde_json::{Value, json};

pub use env::{DEFAULT_PATH, environment, merge_environment};

use super::user::Identity;
use crate::sys::process::first_open_files;

/// Docker's default capabilities: 0x00000000a80425fb.
const CAPABILITIES: [&str; 14] = [
    "CAP_CHOWN",
    "CAP_DAC_OVERRIDE",
    "CAP_FSETID",
    "CAP_FOWNER",
    "CAP_MKNOD",
    "CAP_NET_RAW",
    "CAP_SETGID",
    "CAP_SETUID",
    "CAP_SETFCAP",
    "CAP_SETPCAP",
    "CAP_NET_BIND_SERVICE",
    "CAP_SYS_CHROOT",
    "CAP_KILL",
    "CAP_AUDIT_WRITE",
];

const MASKED_PATHS: [&str; 12] = [
    "/proc/acpi",
    "/proc/asound",
    "/proc/interrupts",
    "/proc/kcore",
    "/proc/keys",
    "/proc/latency_stats",
    "/proc/sched_debug",
    "/proc/scsi",
    "/proc/timer_list",
    "/proc/timer_stats",
    "/sys/devices/virtual/powercap",
    "/sys/firmware",
];

const READ_ONLY_PATHS: [&str; 5] = [
    "/proc/bus",
    "/proc/fs",
    "/proc/irq",
    "/proc/sys",
    "/proc/sysrq-trigger",
];

/// The network of a container.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Network {
    /// A loopback interface of its own.
    None,
    /// The host's.
    Host,
}

/// A host path shown in the container.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Bind {
    /// On the host.
    pub source: PathBuf,
    /// In the container, resolved.
    pub target: PathBuf,
    /// Not to be written to.
    pub read_only: bool,
}

/// How the host's cgroups are mounted.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Cgroups {
    /// One hierarchy for each controller.
    V1,
    /// One hierarchy for all.
    V2,
    /// The former, and an empty one of the latter.
    Hybrid,
    /// Not at all.
    None,
}

impl Cgroups {
    /// What this host has.
    pub fn of_host() -> Self {
        let mounts = fs::read_to_string("/proc/self/mountinfo").unwrap_or_default();
        Self::from_mounts(&mounts)
    }

    fn from_mounts(mounts: &str) -> Self {
        let has = |kind: &str| {
            let mut lines = mounts.lines().filter_map(|line| line.split_once(" - "));
            lines.any(|(_, after)| after.split(' ').next() == Some(kind))
        };
        match (has("cgroup"), has("cgroup2")) {
            (true, true) => Self::Hybrid,
            (true, false) => Self::V1,
            (false, true) => Self::V2,
            (false, false) => Self::None,
        }
    }

    /// The word for it in `system info`.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::V1 => "v1",
            Self::V2 => "v2",
            Self::Hybrid => "hybrid",
            Self::None => "none",
        }
    }
}

/// A process, as the specification wants it.
#[derive(Clone, Copy, Debug)]
pub struct ProcessSpec<'a> {
    /// Program and arguments; not empty.
    pub args: &'a [String],
    /// Its whole environment.
    pub env: &'a [String],
    /// Working directory; exists.
    pub working_dir: &'a str,
    /// Who runs it.
    pub identity: &'a Identity,
    /// It gets a terminal.
    pub tty: bool,
}

/// A container, as the specification wants it.
#[derive(Clone, Copy, Debug)]
pub struct ContainerSpec<'a> {
    /// Its id.
    pub id: &'a str,
    /// Its root on the host.
    pub root: &'a Path,
    /// The directory that holds `hosts`, `hostname` and `resolv.conf`.
    pub files: &'a Path,
    /// Its first process.
    pub process: ProcessSpec<'a>,
    /// Its host name.
    pub hostname: &'a str,
    /// Its root is not to be written to.
    pub read_only: bool,
    /// Its network.
    pub network: Network,
    /// Its volumes.
    pub volumes: &'a [Bind],
    /// The host's cgroups.
    pub cgroups: Cgroups,
}

/// The `process` object.
pub fn process(spec: &ProcessSpec<'_>) -> Value {
    let Identity {
        uid, gid, groups, ..
    } = spec.identity;
    // The primary group among the others, so that leaving it (CVE-2022-36109) opens nothing.
    let mut all_groups = vec![*gid];
    all_groups.extend(groups.iter().filter(|group| *group != gid));
    // As execve drops them for a process that is not root.
    let effective: &[&str] = if *uid == 0 { &CAPABILITIES } else { &[] };
    json!({
        "terminal": spec.tty,
        "user": {"uid": uid, "gid": gid, "additionalGids": all_groups},
        "args": spec.args,
        "env": spec.env,
        "cwd": spec.working_dir,
        "capabilities": {
            "bounding": CAPABILITIES,
            "effective": effective,
            "permitted": effective,
        },
        "noNewPrivileges": false,
        "oomScoreAdj": oom_score_adj(),
        "rlimits": limits(first_open_files()),
    })
}

/// Programs that close every number up to the soft limit of open files, or use select(2), must not get
/// the one that this program raised for itself; and some releases of runc raise it for their own.
fn limits(open_files: Option<(u64, u64)>) -> Vec<Value> {
    let limit = |(soft, hard)| json!({"type": "RLIMIT_NOFILE", "soft": soft, "hard": hard});
    open_files.into_iter().map(limit).collect()
}

/// The whole `config.json`.
pub fn container(spec: &ContainerSpec<'_>) -> Value {
    let mut namespaces = vec!["pid", "mount", "ipc", "uts"];
    if spec.network == Network::None {
        namespaces.push("network");
    }
    if spec.cgroups == Cgroups::V2 {
        namespaces.push("cgroup");
    }
    let namespaces: Vec<Value> = namespaces
        .into_iter()
        .map(|kind| json!({"type": kind}))
        .collect();
    json!({
        "ociVersion": "1.0.2",
        "process": process(&spec.process),
        "root": {"path": spec.root, "readonly": spec.read_only},
        "hostname": spec.hostname,
        "mounts": mounts::all(spec),
        "linux": {
            "cgroupsPath": format!("/plywood/{}", spec.id),
            "resources": {"devices": device_rules()},
            "namespaces": namespaces,
            "seccomp": seccomp::default_profile(),
            "maskedPaths": MASKED_PATHS,
            "readonlyPaths": READ_ONLY_PATHS,
        },
    })
}

/// Zero, or what we have if that is more: lowering it needs a privilege that plyd may lack.
fn oom_score_adj() -> i32 {
    let ours = fs::read_to_string("/proc/self/oom_score_adj").unwrap_or_default();
    ours.trim().parse().unwrap_or(0).max(0)
}

/// Everything is forbidden but the making of nodes, and the devices that every container has.
fn device_rules() -> Value {
    let rule = |kind: &str, major: i32, minor: i32| json!({"allow": true, "type": kind, "major": major, "minor": minor, "access": "rwm"});
    json!([
        {"allow": false, "access": "rwm"},
        {"allow": true, "type": "c", "access": "m"},
        {"allow": true, "type": "b", "access": "m"},
        rule("c", 1, 3),
        rule("c", 1, 5),
        rule("c", 1, 7),
        rule("c", 1, 8),
        rule("c", 1, 9),
        rule("c", 5, 0),
        rule("c", 5, 1),
        rule("c", 5, 2),
        {"allow": true, "type": "c", "major": 136, "access": "rwm"},
    ])
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn cgroups_are_told_by_their_mounts() {
        let v1 = "31 25 0:28 / /sys/fs/cgroup/cpu rw - cgroup cgroup rw,cpu\n";
        let v2 = "30 25 0:27 / /sys/fs/cgroup rw - cgroup2 cgroup2 rw\n";
        assert_eq!(Cgroups::from_mounts(v1), Cgroups::V1);
        assert_eq!(Cgroups::from_mounts(v2), Cgroups::V2);
        assert_eq!(Cgroups::from_mounts(&format!("{v1}{v2}")), Cgroups::Hybrid);
        assert_eq!(Cgroups::from_mounts(""), Cgroups::None);
    }

    #[test]
    fn only_root_starts_with_capabilities() {
        let mut identity = Identity {
            uid: 0,
            gid: 0,
            groups: vec![],
            home: "/".into(),
        };
        let capabilities = |identity: &Identity| {
            let spec = ProcessSpec {
                args: &["true".to_owned()],
                env: &[],
                working_dir: "/",
                identity,
                tty: false,
            };
            process(&spec)["capabilities"].clone()
        };
        let root = capabilities(&identity);
        assert_eq!(root["effective"], root["bounding"]);
        identity.uid = 1000;
        let other = capabilities(&identity);
        assert_eq!(other["bounding"], root["bounding"]);
        assert_eq!(other["effective"], json!([]));
    }
}
