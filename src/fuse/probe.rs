//! What FUSE offers on this host and what Plywood makes of it, found out by a mount that nobody
//! sees: in a mount name space of a short-lived thread, on a directory that exists everywhere.

use std::fmt::Write as _;
use std::path::Path;
use std::sync::{Arc, OnceLock};
use std::thread;

use fuser::{Config, Filesystem, KernelConfig, Request, Session, SessionACL, Version};
use nix::mount::MsFlags;
use nix::sched::CloneFlags;

use super::features;
use super::options::SessionOptions;
use super::policy::{NEEDS_ADMIN, Policy};
use crate::sys::fuse_mount::{self, MountOptions};
use crate::sys::process;

/// One optional feature on this host.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Feature {
    /// Its name, as in `-o kernel_features=`.
    pub name: &'static str,
    /// The first protocol that has it, such as `7.23`.
    pub since: String,
    /// The kernel offers it.
    pub supported: bool,
    /// A mount with default options uses it.
    pub in_use: bool,
    /// Why it is not in use.
    pub reason: Option<String>,
}

/// Only the handshake matters: no request is ever served.
struct Handshake(Arc<OnceLock<(Version, Policy)>>);

impl Filesystem for Handshake {
    fn init(&mut self, _request: &Request, config: &mut KernelConfig) -> std::io::Result<()> {
        let policy = Policy::negotiate(config, &SessionOptions::default(), false);
        // The kernel says INIT once.
        let _ = self.0.set((config.kernel_abi(), policy));
        Ok(())
    }
}

/// What FUSE is on this host.
#[derive(Clone, Debug)]
pub struct Probe {
    /// The protocol that the kernel speaks, such as `7.45`; `None` when nothing can be mounted.
    pub abi: Option<String>,
    /// Every optional feature. When nothing can be mounted, none is supported and each says why.
    pub features: Vec<Feature>,
}

/// Asks the kernel.
pub fn probe() -> Probe {
    let answer = handshake();
    Probe {
        abi: answer.as_ref().ok().map(|(abi, _)| abi.to_string()),
        features: features(&answer.map(|(_, policy)| policy)),
    }
}

fn features(policy: &Result<Policy, String>) -> Vec<Feature> {
    features::ALL
        .iter()
        .map(|description| {
            let supported = policy
                .as_ref()
                .is_ok_and(|policy| policy.offered.contains(description.feature));
            let in_use = policy
                .as_ref()
                .is_ok_and(|policy| policy.in_use.contains(description.feature));
            let reason = match (policy, supported, in_use, description.unused) {
                (_, _, true, _) => None,
                (Err(error), ..) => Some(error.clone()),
                (_, false, ..) => Some("this kernel does not offer it".to_owned()),
                (_, _, _, Some(why)) => Some(why.to_owned()),
                _ if description.feature == features::Feature::Passthrough
                    && !process::administers_the_host() =>
                {
                    Some(NEEDS_ADMIN.to_owned())
                }
                _ => Some(format!(
                    "off by default; -o {} switches it on",
                    description.name
                )),
            };
            Feature {
                name: description.name,
                since: format!("7.{}", description.minor),
                supported,
                in_use,
                reason,
            }
        })
        .collect()
}

fn handshake() -> Result<(Version, Policy), String> {
    let probe = thread::Builder::new()
        .name("fuse-probe".into())
        .spawn(|| -> Result<(Version, Policy), String> {
            // Of this thread alone, so nobody else ever sees the mount, and it goes with the thread.
            nix::sched::unshare(CloneFlags::CLONE_FS | CloneFlags::CLONE_NEWNS)
                .map_err(|errno| format!("a private mount name space is needed: {errno}"))?;
            nix::mount::mount(
                None::<&str>,
                "/",
                None::<&str>,
                MsFlags::MS_REC | MsFlags::MS_PRIVATE,
                None::<&str>,
            )
            .map_err(|errno| format!("a private mount name space is needed: {errno}"))?;
            let device = fuse_mount::mount(Path::new("/"), &MountOptions::default())
                .map_err(|error| error.to_string())?;
            let answer = Arc::new(OnceLock::new());
            let session = Session::from_fd(
                Handshake(answer.clone()),
                device,
                SessionACL::All,
                Config::default(),
            )
            .map_err(|error| error.to_string())?;
            drop(session);
            answer
                .get()
                .copied()
                .ok_or_else(|| "the kernel sent no INIT".to_owned())
        })
        .map_err(|error| error.to_string())?;
    probe
        .join()
        .unwrap_or_else(|_| Err("the probe failed by a defect".to_owned()))
}

impl Probe {
    /// As one object, on a line: `abi` and `features`.
    pub fn json(&self) -> String {
        let features = self.features.iter().map(|feature| {
            serde_json::json!({
                "name": feature.name,
                "since": feature.since,
                "supported": feature.supported,
                "in_use": feature.in_use,
                "reason": feature.reason,
            })
        });
        let features: Vec<_> = features.collect();
        format!(
            "{}\n",
            serde_json::json!({ "abi": self.abi, "features": features })
        )
    }

    /// As a table for a terminal.
    pub fn table(&self) -> String {
        let mut table = match &self.abi {
            Some(abi) => format!("The kernel speaks FUSE {abi}; Linux 3.10 spoke 7.22.\n\n"),
            None => String::new(),
        };
        table += &format!(
            "{:<18} {:<6} {:<10} {:<7} {}\n",
            "feature", "since", "supported", "in use", "why not"
        );
        for feature in &self.features {
            let yes_or_no = |yes| if yes { "yes" } else { "no" };
            // Writing to a string does not fail.
            let _ = writeln!(
                table,
                "{:<18} {:<6} {:<10} {:<7} {}",
                feature.name,
                feature.since,
                yes_or_no(feature.supported),
                yes_or_no(feature.in_use),
                feature.reason.as_deref().unwrap_or("")
            );
        }
        table
    }
}
