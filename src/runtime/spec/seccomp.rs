//! The system calls that a container may make: Docker's default profile, resolved for the default
//! capabilities. `seccomp.json` beside this file holds the names; the conditions are its keys.

use serde::Deserialize;
use serde_json::{Value, json};

const ENOSYS: i32 = libc::ENOSYS;

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct Profile {
    /// Always allowed.
    allow: Vec<String>,
    /// Allowed on one architecture, by Rust's name for it.
    allow_by_architecture: std::collections::BTreeMap<String, Vec<String>>,
    /// Allowed from Linux 4.8 on, where a tracer can no longer evade the filter.
    allow_from_kernel_4_8: Vec<String>,
    /// `personality` is allowed with these arguments.
    allow_personalities: Vec<u64>,
    /// `socket` is allowed but for this family (AF_VSOCK).
    refuse_socket_family: u64,
    /// `clone` is allowed without any of these flags (CLONE_NEW*).
    refuse_clone_flags: u64,
    /// Answered ENOSYS instead of EPERM, so that libc falls back: what `clone` refuses cannot be seen
    /// in `clone3`'s arguments.
    not_implemented: Vec<String>,
}

/// The `seccomp` object.
pub(super) fn default_profile() -> Value {
    let kernel = nix::sys::utsname::uname()
        .map(|name| name.release().to_string_lossy().into_owned())
        .unwrap_or_default();
    build(std::env::consts::ARCH, at_least_4_8(&kernel))
}

fn build(architecture: &str, tracers: bool) -> Value {
    #[allow(
        clippy::expect_used,
        reason = "the file is part of the program; a test reads it"
    )]
    let profile: Profile =
        serde_json::from_str(include_str!("seccomp.json")).expect("seccomp.json is sound");
    let mut allowed = profile.allow;
    if tracers {
        allowed.extend(profile.allow_from_kernel_4_8);
    }
    let here = profile.allow_by_architecture.get(architecture);
    allowed.extend(here.into_iter().flatten().cloned());

    let on_argument = |name: &str, index: u32, value: u64, operator: &str| {
        let arguments = json!([{"index": index, "value": value, "op": operator}]);
        json!({"names": [name], "action": "SCMP_ACT_ALLOW", "args": arguments})
    };
    // s390 has the first two parameters of clone the other way round.
    let flags_index = u32::from(architecture == "s390x");
    let mut rules = vec![
        json!({"names": allowed, "action": "SCMP_ACT_ALLOW"}),
        on_argument("socket", 0, profile.refuse_socket_family, "SCMP_CMP_NE"),
        on_argument(
            "clone",
            flags_index,
            profile.refuse_clone_flags,
            "SCMP_CMP_MASKED_EQ",
        ),
        json!({"names": profile.not_implemented, "action": "SCMP_ACT_ERRNO", "errnoRet": ENOSYS}),
    ];
    for personality in profile.allow_personalities {
        rules.push(on_argument("personality", 0, personality, "SCMP_CMP_EQ"));
    }
    let mut filter = json!({
        "defaultAction": "SCMP_ACT_ERRNO",
        "defaultErrnoRet": libc::EPERM,
        "syscalls": rules,
    });
    let architectures = architectures(architecture);
    if !architectures.is_empty() {
        filter["architectures"] = json!(architectures);
    }
    filter
}

/// The architecture's own calls, and those of its 32-bit forms. Empty: the native one only.
fn architectures(name: &str) -> &'static [&'static str] {
    match name {
        "x86_64" => &["SCMP_ARCH_X86_64", "SCMP_ARCH_X86", "SCMP_ARCH_X32"],
        "aarch64" => &["SCMP_ARCH_AARCH64", "SCMP_ARCH_ARM"],
        "s390x" => &["SCMP_ARCH_S390X", "SCMP_ARCH_S390"],
        "riscv64" => &["SCMP_ARCH_RISCV64"],
        _ => &[],
    }
}

fn at_least_4_8(release: &str) -> bool {
    let mut numbers = release
        .split(|c: char| !c.is_ascii_digit())
        .map_while(|part| part.parse::<u32>().ok());
    (numbers.next().unwrap_or(0), numbers.next().unwrap_or(0)) >= (4, 8)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn allowed(filter: &Value) -> Vec<&str> {
        let names = filter["syscalls"][0]["names"].as_array().unwrap();
        names.iter().map(|name| name.as_str().unwrap()).collect()
    }

    #[test]
    fn the_profile_has_what_matters() {
        let filter = build("x86_64", true);
        let names = allowed(&filter);
        for name in [
            "read",
            "openat2",
            "chroot",
            "ptrace",
            "arch_prctl",
            "futex_waitv",
        ] {
            assert!(names.contains(&name), "{name}");
        }
        for name in [
            "mount",
            "bpf",
            "io_uring_setup",
            "clone",
            "clone3",
            "keyctl",
            "kexec_load",
        ] {
            assert!(!names.contains(&name), "{name}");
        }
        let mut unique = names.clone();
        unique.sort_unstable();
        unique.dedup();
        assert_eq!(unique.len(), names.len());
        assert!(!allowed(&build("aarch64", false)).contains(&"ptrace"));
    }

    #[test]
    fn kernel_releases_are_compared_by_number() {
        for (release, expected) in [
            ("3.10.0-1160.el7.x86_64", false),
            ("4.7.10", false),
            ("4.8.0", true),
            ("4.18.0-553.el8", true),
            ("6.1", true),
            ("", false),
        ] {
            assert_eq!(at_least_4_8(release), expected, "{release}");
        }
    }
}
